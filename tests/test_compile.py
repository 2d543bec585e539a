"""What torch.compile makes of the forward: whole graphs, few of them, all met before a clock runs.

A GPU's kernels are stood in for by masked attention that can be traced, and only tracing is tried (backend
"eager"): a break in a graph, or one more graph for another number of rows, chunk or phase, shows here too.
"""

import importlib

import pytest
import torch
from conftest import FEW_LAYERS, settings, sine_model, tg
from torch._subclasses import FakeTensorMode


def test_training_meets_no_graph_that_its_warm_up_has_not(data, tracing):
    s = settings(DATA_PATH=data, TRAIN_SEQ_SCHEDULE="32@0.5,64@1", ITERATIONS=6,
                 RECUR_START_STEP=2, LATE_QAT_THRESHOLD=0.5, LATE_QAT_MIN_STEP=3,
                 BIGRAM_VOCAB_SIZE=64, BIGRAM_DIM=16, **FEW_LAYERS)
    world, model = tg.World(), sine_model(s)
    trainer = tg.Trainer(s, world, model)
    trainer.warm_up()
    known, stream = tracing(), tg.Prefetch(tg.open_train_stream(s, world, trainer.tokens), world.device)
    curriculum, looped = tg.Curriculum(s), set()
    for step in range(s.iterations):
        length, looping, lr = curriculum.advance(step, step / s.iterations)
        trainer.micro_step(stream.next(length), tg.layer_plan(s, looping))
        trainer.update(lr, 0.9)
        looped.add(looping)
    stream.close()
    assert looped == {False, True} and trainer.sharpness is not None
    # with and without the loop and soft rounding; the stand-in does not look at the longest segment
    assert known == tracing() == 4


@pytest.mark.parametrize("kernel", ["torch", pytest.param("fa4", marks=pytest.mark.long)])
def test_the_kernels_of_a_gpu_are_traced_whole(kernel, tracing, monkeypatch):
    """Shapes alone, through the fused kernels' operators and one attention backend: a graph per plan in
    training, two for adaptation that goes on, whatever the rows and chunks."""
    monkeypatch.setitem(tg.FLASH, "torch", importlib.import_module("torch.nn.attention.varlen"))
    monkeypatch.setitem(tg.BACKENDS, "plain", tg.BACKENDS[kernel])
    monkeypatch.setattr(tg, "use_triton", lambda kernel, wanted, sensible: True)
    s = settings(**FEW_LAYERS)
    with FakeTensorMode():
        model = tg.GPT(s)
        model.compute_dtype = torch.bfloat16
        losses = torch.compile(model.losses, fullgraph=True, backend="eager")
        ids = torch.zeros((1, 512), dtype=torch.int64)
        for looping in (False, True):
            layout = tg.Layout(torch.zeros(32, dtype=torch.int32), 64)
            losses(ids, ids, tg.layer_plan(s, looping), layout, training=True).mean().backward()
        assert tracing() == 2 and model.qo_bank.grad.shape == model.qo_bank.shape
        model.requires_grad_(False)
        adapting = torch.compile(model.losses, fullgraph=True, dynamic=True, backend="eager")
        plan = tg.layer_plan(s, False)      # a layer that is traced again makes no other graph
        for rows in (slice(None), slice(3, None)):
            adapter, cache = tg.Adapter(s, plan, 8), tg.KeyCache(64)
            adapter.keep(rows)
            for begin, end in zip((0, 8, 16), (8, 16, 32)):
                if begin:
                    cache.advance(end - begin)
                ids = torch.zeros((adapter.b["q"].size(1), end - begin), dtype=torch.int64)
                loss = adapting(ids, ids, plan, None, adapter, cache)
                cache.seal(ids)
                loss.sum().backward(inputs=adapter.parameters())
                for p in adapter.parameters():
                    p.grad = None
    assert tracing() == 4


def test_operators_of_products_have_one_graph_for_all_numbers_of_tokens(tracing):
    """They keep a number of tokens that is a symbol: their room is no fixed number of rows."""
    def both(hidden, weight, targets, factor, gain, angles):
        losses = tg.ce_of_head(hidden[0], weight, targets, 30.0)
        return *losses, *tg.qkv_product(hidden, weight, factor, gain, angles, angles)

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="eager")
    with FakeTensorMode():
        weight, gain = torch.zeros(32, 16, dtype=torch.bfloat16), torch.zeros(4)
        for tokens in (24, 40):
            hidden = torch.zeros(1, tokens, 16, dtype=torch.bfloat16)
            targets = torch.zeros(tokens, dtype=torch.int64)
            made = compiled(hidden, weight, targets, hidden[..., :1].float(), gain, torch.zeros(tokens, 2))
            shapes = [tuple(x.shape) for x in made[1:]]
            assert shapes == [(tokens,), (tokens, 32), (1, tokens, 8, 4), (1, tokens, 6)]
    assert tracing() == 1
