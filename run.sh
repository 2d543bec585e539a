#!/usr/bin/env bash
# ./run.sh         set up, then run the main job: the full configuration where GPUs and FineWeb shards are, else the demo
# ./run.sh test    set up, then pass the tests
set -euo pipefail
cd "$(dirname "$0")"
die() { echo "error: $*" >&2; exit 2; }

# --- python: the active environment, else our own
if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    PYTHON=python
else
    command -v python3 >/dev/null || die "python3 is not installed: Python 3.10 or later is needed"
    [ -x .venv/bin/python ] || python3 -m venv .venv || die "python3 -m venv failed: install Python's venv module"
    PYTHON=$PWD/.venv/bin/python
fi
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "Python 3.10 or later is needed"

GPUS=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)

# --- packages: what is missing of a requirements file; nothing is fetched when all is there, so it works offline
missing() {
    "$PYTHON" - "$GPUS" "$@" <<'PY'
import re
import sys
from importlib import metadata

gpus, files = int(sys.argv[1]), sys.argv[2:]
for line in (line.split("#")[0].strip() for file in files for line in open(file)):
    name, _, version = line.partition("==")
    try:
        have = metadata.version(name) if name else version
    except metadata.PackageNotFoundError:
        have = ""
    if name == "torch" and have:
        try:
            import torch
            if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) >= (2, 9):
                continue                     # a working torch of the machine's own is kept
        except Exception:
            pass                             # broken: install ours
    if name.startswith("flash-attn") and not gpus:
        continue
    if line and have.split("+")[0] != version:
        print(line)
PY
}
install() {
    local list; list=$(missing "$@")
    [ -z "$list" ] && return
    echo "installing: $(echo "$list" | tr '\n' ' ')"
    # shellcheck disable=SC2086
    "$PYTHON" -m pip install -q --disable-pip-version-check $list || die "pip could not install the packages above"
}

# On a shared CPU a spinning thread only slows the others, and freed activations are better kept than faulted in again.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-33554432} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-17179869184}

case "${1:-}" in
test)
    install requirements.txt data/requirements.txt requirements-dev.txt
    exec "$PYTHON" -m pytest "${@:2}"
    ;;
"") ;;
*) die "unknown command '$1': use ./run.sh or ./run.sh test" ;;
esac

install requirements.txt
if [ -z "${DATA_PATH:-}" ] && ! "$PYTHON" train_gpt.py --check data >/dev/null 2>&1; then
    echo "no FineWeb shards found (see data/README.md): running the demo on a small corpus made here"
    "$PYTHON" data/demo.py
    set -a
    . configs/demo.env
    set +a
fi
exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$([ "$GPUS" -gt 0 ] && echo "$GPUS" || echo 1)" \
    train_gpt.py
