"""The published systems' configurations: they parse, and have the published size."""

import math
import re

import pytest
import torch
from conftest import CONFIGS, ROOT, load_config, sine_model, without_awaited

import train_gpt as tg

SYSTEMS = [name for name in CONFIGS if name.startswith("pr")]


@pytest.mark.parametrize("name", SYSTEMS)
def test_published_parameter_count(name):
    s = tg.Settings.from_env(load_config(name))
    text = (ROOT / "configs" / f"{name}.env").read_text().replace("\n# ", " ")
    published = int(re.search(r"([\d,]+) parameters", text).group(1).replace(",", ""))
    assert sum(math.prod(shape) for shape in tg.parameter_shapes(s).values()) == published
    with torch.device("meta"):
        model = tg.GPT(s)
    assert sum(p.numel() for p in model.parameters()) == published
    assert set(dict(model.named_parameters())) <= set(tg.ROLES)


@pytest.mark.parametrize("name", SYSTEMS)
def test_authors_command_is_accepted(name):
    text = (ROOT / "configs" / f"{name}.env").read_text()
    lines = re.findall(r"^#   (\S+=.*)$", text, re.M)
    command = dict(pair.split("=", 1) for line in lines for pair in line.split())
    assert command
    tg.Settings.from_env(without_awaited(command))


@pytest.mark.parametrize("name", SYSTEMS)
def test_no_setting_of_a_configuration_is_read_by_nothing(name):
    known = {f.name.upper() for f in tg.fields(tg.Settings)}
    assert set(load_config(name)) <= known | set(tg.NO_EFFECT) | set(tg.ONLY) | set(tg.ALIASES)


def test_best_is_the_default():
    assert tg.Settings.from_env(load_config("best")) == tg.Settings()


@pytest.mark.parametrize("name", SYSTEMS)
def test_small_sizes_keep_the_mechanisms(name):
    full, small = (tg.Settings.from_env(load_config(*names)) for names in ((name,), (name, "small")))
    assert set(tg.parameter_shapes(full)) == set(tg.parameter_shapes(small))
    assert tg.layer_plan(full, True) == tg.layer_plan(small, True)
    switches = [f.name for f in tg.fields(full) if f.name.endswith("_enabled") or f.metadata["choices"]]
    assert [getattr(full, n) for n in switches] == [getattr(small, n) for n in switches]
    assert len(tg.context_stages(full)) == len(tg.context_stages(small))


@pytest.mark.parametrize("name", ("pr1302", "pr1550", "pr2014"))
def test_new_tensors_survive_quantising_and_packing(name):
    s = tg.Settings.from_env({**load_config(name, "small"), "VOCAB_SIZE": "600"})
    model = sine_model(s)
    weights = tg.matrix_views({n: p.detach() for n, p in model.named_parameters()})
    hessians = {n: torch.eye(w.shape[1]) for n, w in weights.items()
                if tg.storage_of(s, n, w)[0] == "gptq" and "embed" not in n}
    q = tg.Quantiser(s, weights, tg.Curvature(hessians))()
    back = tg.unpack_model(s, tg.pack_model(s, q), "test")
    assert back.meta == q.meta
    restored = tg.dequantise(back)
    for key, want in tg.dequantise(q).items():
        assert torch.equal(restored[key], want), key
    if s.bigram_vocab_size:
        assert q.meta["bigram.embed.weight"].startswith("gptq")
    if s.awq_lite_enabled:
        assert sum("awqgrp" in how for how in q.meta.values()) == 1
    tg.load_weights(model, restored, "test")
