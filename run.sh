#!/usr/bin/env bash
# ./run.sh         set up, then run the main job: the full configuration where GPUs and FineWeb shards are, else the demo
# ./run.sh test    set up, then pass the tests; ./run.sh test quick passes those of tests/quick.txt
# ./run.sh doctor  set up, then say whether this machine will complete a run
# ./run.sh pod     set up, then go from a bare rented machine to a packed record; --rehearse on a CPU
# ./run.sh help    list every command of this repository
set -euo pipefail
cd "$(dirname "$0")"
die() { echo "error: $*" >&2; exit 2; }

if [ "${1:-}" = help ]; then
    command -v python3 >/dev/null || die "python3 is not installed: Python 3.10 or later is needed"
    exec python3 tools
fi

# --- python: the active environment, else our own
if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    PYTHON=python
else
    command -v python3 >/dev/null || die "python3 is not installed: Python 3.10 or later is needed"
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        # a torch that already works on this machine is used from inside the environment too
        site=$(python3 -c 'import torch; torch.ones(1)' 2>/dev/null && echo --system-site-packages || true)
        rm -rf .venv
        python3 -m venv $site .venv || { rm -rf .venv; die "python3 -m venv failed: install Python's venv module"; }
    fi
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
    echo "installing, which takes a few minutes and, with torch, 1 GB or more: $(echo "$list" | tr '\n' ' ')"
    local quiet=-q
    [ -t 1 ] && quiet=                           # on a terminal pip shows how far it is
    # shellcheck disable=SC2086
    "$PYTHON" -m pip install $quiet --disable-pip-version-check $list || die "pip could not install the packages above"
}

# The demo only where no shards are: a damaged or mismatched data folder must be reported, not replaced.
no_shards() {
    folder=$("$PYTHON" -c 'import os, train_gpt as t; print(t.Settings.from_env(os.environ).shards)') \
        || "$PYTHON" train_gpt.py --check settings || exit 2
    [ -z "${DATA_PATH:-}" ] && [ ! -d "$folder" ]
}
use_demo() {
    echo "no shards in $folder (see data/README.md): $1 the demo on a small corpus made here"
    "$PYTHON" data/demo.py
    while IFS='=' read -r name value; do          # settings that are already set win over the demo's
        case "$name" in ''|\#*) continue ;; esac
        [ -n "${!name:-}" ] || export "$name=$value"
    done < configs/demo.env
}

case "${1:-}" in
test)
    install requirements.txt data/requirements.txt tools/requirements.txt requirements-dev.txt
    if [ "${2:-}" = quick ]; then
        # shellcheck disable=SC2046
        exec "$PYTHON" -m pytest $(grep '^tests/' tests/quick.txt) "${@:3}"
    fi
    exec "$PYTHON" -m pytest "${@:2}"
    ;;
doctor)
    install requirements.txt data/requirements.txt tools/requirements.txt
    if [ "$GPUS" -eq 0 ] && no_shards; then use_demo checking; fi
    exec "$PYTHON" tools/doctor.py "${@:2}"
    ;;
pod)
    install requirements.txt data/requirements.txt tools/requirements.txt
    exec "$PYTHON" tools/pod.py "${@:2}"
    ;;
"") ;;
*) die "unknown command '$1': use ./run.sh, or one of test, doctor, pod, help: ./run.sh help" ;;
esac

if [ "$GPUS" -eq 0 ]; then
    install requirements.txt data/requirements.txt tools/requirements.txt     # to look at what the demo made
else
    install requirements.txt
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
        || die "nvidia-smi lists $GPUS GPUs but torch cannot use them: install a torch build for this driver"
    GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
fi
if no_shards; then
    use_demo running
    GPUS=$((GPUS > 0))
fi
if [ "$GPUS" -gt 1 ]; then
    exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$GPUS" train_gpt.py
fi
# one process needs no launcher, whose trace would bury the line that says what is wrong
exec "$PYTHON" train_gpt.py
