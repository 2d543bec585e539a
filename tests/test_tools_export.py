"""tools/export.py: curves and artifacts go where they should, by stand-ins of the libraries."""

import inspect
import json
import shutil
import sys
import types

import pytest
from made_runs import change, make_run

from tools import export
from tools.common import ARTIFACT, ToolError


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "mine", 1, 60)


@pytest.fixture
def without(monkeypatch):
    """A function that makes a package as if it were not installed."""
    return lambda name: monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def tensorboard(monkeypatch):
    """A stand-in for TensorBoard's writer: {folder: its scalars}."""
    written = {}

    class SummaryWriter:
        def __init__(self, log_dir):
            self.scalars = written.setdefault(log_dir, [])

        def add_scalar(self, tag, value, step, walltime=None):
            self.scalars.append((tag, value, step, walltime))

        def add_text(self, tag, text):
            json.loads(text)

        def close(self):
            self.scalars.append("closed")

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return written


class Hub:
    """A stand-in for huggingface_hub: repositories are folders."""

    def __init__(self, root):
        self.root, self.private = root, {}

    def HfApi(self):
        return self

    def create_repo(self, repo_id, private=None, exist_ok=False):
        if repo_id.startswith("other/"):
            raise RuntimeError("403 Forbidden\nyou have no rights")
        self.private.setdefault(repo_id, private)

    def upload_folder(self, repo_id, folder_path, commit_message=None):
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def snapshot_download(self, repo_id, local_dir=None, allow_patterns=None):
        for path in (self.root / repo_id).iterdir():
            if path.name in allow_patterns:
                (self.root.parent / local_dir).mkdir(exist_ok=True)
                shutil.copy(path, local_dir)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    made = Hub(tmp_path / "hub")
    made.root.mkdir()
    monkeypatch.setitem(sys.modules, "huggingface_hub", made)
    return made


def test_the_stand_in_takes_what_the_library_takes():
    library = pytest.importorskip("huggingface_hub")
    pairs = [(library.HfApi.create_repo, Hub.create_repo), (library.HfApi.upload_folder, Hub.upload_folder),
             (library.snapshot_download, Hub.snapshot_download)]
    for real, mine in pairs:
        assert set(inspect.signature(mine).parameters) - {"self"} <= set(inspect.signature(real).parameters)


def test_curves_to_tensorboard(run, tensorboard, tmp_path, capsys):
    with open(run / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"event": "losses", "step": 12, "losses": [6.5, None, 6.25]}) + "\n")
    assert export.main([str(run), "--tensorboard", str(tmp_path / "tb")]) == 0
    scalars = tensorboard[str(tmp_path / "tb" / "mine")]
    assert ("train/loss", 6.0, 1000, 1.7e9 + 12) in scalars and scalars[-1] == "closed"
    assert ("validation/val_bpb", 1.09, 4000, 1.7e9 + 16) in scalars
    assert [s[1:3] for s in scalars if s[0] == "losses/loss"] == [(6.5, 10), (6.25, 12)]
    assert [s[:3] for s in scalars if s[0] == "final/val_bpb"] == [("final/val_bpb", 1.06, 4000)]
    assert "probe" not in str(scalars) and "tensorboard --logdir" in capsys.readouterr().out
    (tmp_path / "tb" / "mine").mkdir(parents=True)
    (tmp_path / "tb" / "mine" / "events").write_text("")
    with pytest.raises(ToolError, match="earlier export"):
        export.main([str(run), "--tensorboard", str(tmp_path / "tb")])


def test_curves_to_wandb(run, monkeypatch):
    rows, said = [], {}

    class Run:
        summary = {}

        def define_metric(self, name, step_metric=None):
            said[name] = step_metric

        def log(self, row):
            rows.append(row)

        def finish(self):
            said["finished"] = True

    def init(project, name, config):
        said.update(project=project, name=name, config=config)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    assert export.main([str(run), "--wandb", "golf"]) == 0
    assert said["project"] == "golf" and said["name"] == "mine" and said["finished"] and said["*"] == "step"
    assert said["config"]["MATRIX_LR"] == 0.026 and Run.summary["val_bpb"] == 1.06
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [6.999, 6.998, 6.5, 6, 5, 4, 3]
    assert all("step" in row for row in rows)


def test_an_artifact_goes_up_and_comes_down(run, hub, tmp_path, capsys):
    assert export.main([str(run), "--upload", "me/model"]) == 0
    assert hub.private == {"me/model": True} and "uploaded" in capsys.readouterr().out
    there = hub.root / "me" / "model"
    assert {path.name for path in there.iterdir()} == {*export.FILES, "README.md"}
    assert "/mnt/data" not in (there / "train.log").read_text()
    assert export.load_run(there).source() == export.load_run(run).source()
    assert "1.060000 bits per byte (seed 1, 8 x NVIDIA H100" in (there / "README.md").read_text()
    back = tmp_path / "back"
    assert export.main(["--download", "me/model", str(back)]) == 0
    assert (back / ARTIFACT).read_bytes() == (run / ARTIFACT).read_bytes()
    assert "EVAL_ONLY_QUANTIZED_PATH=" in capsys.readouterr().out
    with pytest.raises(ToolError, match="holds an artifact already"):
        export.main(["--download", "me/model", str(back)])
    assert export.main([str(run), "--upload", "me/open", "--public"]) == 0 and hub.private["me/open"] is False


def test_what_is_damaged_or_refused_is_said(run, hub, tmp_path):
    with pytest.raises(ToolError, match="other/x .RuntimeError: 403 Forbidden you have no rights"):
        export.main([str(run), "--upload", "other/x"])
    export.main([str(run), "--upload", "me/model"])
    (hub.root / "me" / "model" / ARTIFACT).write_bytes(b"cut")
    with pytest.raises(ToolError, match="has 3 bytes, its summary says 1000"):
        export.main(["--download", "me/model", str(tmp_path / "back")])
    (hub.root / "me" / "empty").mkdir()
    with pytest.raises(ToolError, match="me/empty has no summary.json"):
        export.main(["--download", "me/empty", str(tmp_path / "other")])
    change(run, "summary", artifact_digest="0" * 16)
    with pytest.raises(ToolError, match="other contents than its summary says"):
        export.main([str(run), "--upload", "me/again"])
    change(run, "summary", artifact_bytes=999)
    with pytest.raises(ToolError, match="has 1,000 bytes, its summary says 999"):
        export.main([str(run), "--upload", "me/again"])


@pytest.mark.parametrize("module, way, package", [
    ("torch.utils.tensorboard", ["--tensorboard", "tb"], "tensorboard"), ("wandb", ["--wandb", "p"], "wandb"),
    ("huggingface_hub", ["--upload", "me/model"], "huggingface_hub")])
def test_a_package_that_lacks_is_named_with_its_command(module, way, package, run, without):
    without(module)
    with pytest.raises(ToolError, match=f"needs the package {package} .*: pip install {package}$"):
        export.main([str(run), *way])


@pytest.mark.parametrize("words, text", [([], "say where to, once"), (["RUN"], "say where to, once"),
                                         (["--wandb", "p"], "no run is named"),
                                         (["RUN", "--upload", "model"], "give owner/name"),
                                         (["RUN", "RUN", "--wandb", "p"], "two of the runs are called mine"),
                                         (["RUN", "--download", "a/b", "c"], "takes no RUN")])
def test_mistakes_are_one_clear_line(words, text, run):
    with pytest.raises(ToolError, match=text):
        export.main([str(run) if word == "RUN" else word for word in words])
