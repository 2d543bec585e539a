"""The worked example of CONTRIBUTING.md, applied to a copy of the script: it does what is said there."""

import re

import pytest
import torch
from conftest import ROOT, imported, settings, settings_of, sine_model, tg, tokens

EXAMPLE = re.search("```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL).group(1)


def patched(source: str) -> str:
    """The source with the example's hunks in it, as `git apply` puts them there: by their context."""
    hunks = re.split(r"^@@.*\n", EXAMPLE, flags=re.MULTILINE)[1:]
    assert len(hunks) == 3
    for hunk in hunks:
        lines = hunk.splitlines(keepends=True)
        before, after = ("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
        if after not in source:      # else somebody is trying it
            assert source.count(before) == 1, before
            source = source.replace(before, after)
    return source


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """The changed script, imported."""
    path = tmp_path_factory.mktemp("idea") / "train_gpt.py"
    path.write_text(patched((ROOT / "train_gpt.py").read_text()))
    return imported(path)


def packed(script, s, model) -> bytes:
    """An artifact of the model."""
    weights = script.matrix_views({n: p.detach() for n, p in model.named_parameters()})
    return script.pack_model(s, script.Quantiser(s, weights, script.Curvature({}))(0.05))


def test_the_new_parameter_is_trained_stored_and_read_back(changed):
    s = settings_of(changed, EMBED_SCALE_ENABLED=1)
    model, x = changed.GPT(s, torch.Generator().manual_seed(0)), tokens(2, 30)
    trainer = changed.Trainer(s, changed.World(), model)
    trainer.micro_step(changed.Batch(x[:, :-1], x[:, 1:], None, 64), changed.layer_plan(s, True))
    trainer.update(1.0, 0.9)
    scale = model.embed_scale.detach()
    assert (scale != 1).all()
    blob = packed(changed, s, model)
    assert torch.equal(changed.read_artifact(s, blob, "x").weights["embed_scale"], scale.half().float())
    with pytest.raises(changed.UserError, match="EMBED_SCALE_ENABLED=True there, False here"):
        changed.read_artifact(settings_of(changed), blob, "x")


def test_files_from_before_are_read_and_bits_are_the_same(changed, tmp_path):
    here, there = settings(), settings_of(changed)
    old, new, x = sine_model(here), changed.GPT(there), tokens(2, 30)
    path = tmp_path / "final_model.pt"
    facts = tg.weight_facts(here, tg.World(), 3, 1.0, "")
    path.write_bytes(tg.weights_to_bytes(here, dict(old.named_parameters()), facts))
    assert changed.read_weights(str(path), new) == facts
    losses = [model.losses(x, x, tg.layer_plan(here, True)) for model in (old, new)]
    assert torch.equal(*losses)
    blob = packed(tg, here, old)
    read = [script.read_artifact(s, blob, "x").weights for script, s in ((tg, here), (changed, there))]
    assert read[0].keys() == read[1].keys() and all(torch.equal(w, read[1][n]) for n, w in read[0].items())
    with pytest.raises(changed.UserError, match="EMBED_SCALE_ENABLED=False there, True here"):
        changed.read_artifact(settings_of(changed, EMBED_SCALE_ENABLED=1), blob, "x")
