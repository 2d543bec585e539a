"""The published systems' configurations: they parse, and have the published size."""

import math
import re

import pytest
import torch
from conftest import CONFIGS, ROOT, load_config, settings, sine_model

import train_gpt as tg

SYSTEMS = [name for name in CONFIGS if name.startswith("pr")]


@pytest.mark.parametrize("name", SYSTEMS)
def test_published_parameter_count(name):
    s = tg.Settings.from_env(load_config(name))
    text = (ROOT / "configs" / f"{name}.env").read_text().replace("\n# ", " ")
    published = int(re.search(r"([\d,]+) parameters", text).group(1).replace(",", ""))
    assert sum(math.prod(shape) for shape in tg.GPT.shapes(s).values()) == published
    with torch.device("meta"):
        model = tg.GPT(s)
    assert sum(p.numel() for p in model.parameters()) == published
    assert set(dict(model.named_parameters())) <= set(tg.ROLES)


@pytest.mark.parametrize("name", SYSTEMS)
def test_authors_command_works_alone_and_changes_nothing_after_its_configuration(name):
    text = (ROOT / "configs" / f"{name}.env").read_text()
    lines = re.findall(r"^#   (\S+=.*)$", text, re.M)
    command = dict(pair.split("=", 1) for line in lines for pair in line.split())
    assert command
    tg.Settings.from_env(command)
    config = load_config(name)
    alone, both = (tg.Settings.from_env(env).as_env() for env in (config, {**config, **command}))
    # what they keep of the clock is a least here: what the rehearsal needs is kept in any case
    assert {k for k in alone if alone[k] != both[k]} <= {"GPTQ_RESERVE_SECONDS"}


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_name_of_a_configuration_is_known(name):
    known = {f.name.upper() for f in tg.fields(tg.Settings)}
    known |= set(tg.NO_SETTINGS) | set(tg.ALIASES)
    assert set(load_config(name)) <= known


def test_best_is_the_default_and_names_every_choice():
    best, default = load_config("best"), tg.Settings()
    assert tg.Settings.from_env(best) == default
    choices = {f.name.upper() for f in tg.fields(default) if f.name.endswith("_enabled")}
    choices |= set(tg.closest_system(default)[1])
    assert choices <= set(best) | {"FUSED_CE_ENABLED", "LQER_ASYM_ENABLED"}


def test_systems_with_equal_settings_are_named_together():
    name, differs = tg.closest_system(tg.Settings.from_env(load_config("pr1741")))
    assert name == "pr1610, pr1741" and not differs


@pytest.mark.parametrize("name", SYSTEMS)
def test_small_sizes_keep_the_mechanisms(name):
    full, small = (tg.Settings.from_env(load_config(*names)) for names in ((name,), (name, "small")))
    assert set(tg.GPT.shapes(full)) == set(tg.GPT.shapes(small))
    assert tg.layer_plan(full, True) == tg.layer_plan(small, True)
    switches = [f.name for f in tg.fields(full) if f.name.endswith("_enabled") or f.metadata["choices"]]
    assert [getattr(full, n) for n in switches] == [getattr(small, n) for n in switches]
    assert len(tg.context_stages(full)) == len(tg.context_stages(small))


def test_start_names_the_nearest_system():
    changed = {**load_config("pr2014"), "MATRIX_LR": "0.03", "DATA_PATH": "/elsewhere", "BIGRAM_DIM": "64"}
    name, differs = tg.closest_system(tg.Settings.from_env(changed))
    assert name == "pr2014" and differs == {"MATRIX_LR": [0.03, 0.026], "BIGRAM_DIM": [64, 128]}


def test_new_tensors_survive_quantising_and_packing():
    s = settings(
        BIGRAM_VOCAB_SIZE=800, BIGRAM_DIM=96, VE_ENABLED=1, VE_DIM=256, VE_LAYERS="1,3", MLP_MULT=17,
        AWQ_LITE_ENABLED=1, AWQ_LITE_GROUP_SIZE=16, AWQ_LITE_GROUP_TOP_K=3, ASYM_LOGIT_RESCALE=1,
        PARALLEL_LANES="separate", SMEAR_GATE_KIND="channels", LQER_GAIN_SELECT=1,
    )
    model = sine_model(s)
    weights = tg.matrix_views({n: p.detach() for n, p in model.named_parameters()})
    hessians = {n: torch.eye(w.shape[1]) for n, w in weights.items() if ".mlp." in n}
    q = tg.Quantiser(s, weights, tg.Curvature(hessians))()
    back = tg.read_artifact(s, tg.pack_model(s, q), "test").model
    restored = tg.dequantise(back)
    assert back.forms == q.forms and set(restored) == set(weights)
    for key, want in tg.dequantise(q).items():
        assert torch.equal(restored[key], want), key
    assert all(q.forms[f"{n}.embed.weight"].startswith("gptq (int7)") for n in ("bigram", "ve_shared"))
    assert sum(x.sum() for key, x in q.tensors.items() if key.endswith(".awqg_fine")) == 3 * 16
    protected = next(n for n, form in q.forms.items() if "awqgrp" in form)
    fine = q.tensors[f"{protected}.awqg_fine"].bool()
    error = (restored[protected] - weights[protected]).abs()
    assert error[:, fine].mean() < 0.5 * error.mean()
    tg.load_weights(model, restored, "test")
