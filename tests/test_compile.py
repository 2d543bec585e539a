"""What torch.compile makes of the forward: whole graphs, few of them, all met before a clock runs.

A GPU's kernels are stood in for by masked attention that can be traced, and only tracing is tried (backend
"eager"): a break in a graph, or one more graph for another number of rows, chunk or phase, shows here too.
"""

import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import documents, settings, sine_model, tg
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode

# Few layers: what is traced takes its time by the layer.
SHAPE = dict(NUM_LAYERS=2, LOOP_START=0, LOOP_END=0, PARALLEL_START_LAYER=1, XSA_LAST_N=2,
             TTT_BATCH_SIZE=8, TTT_SHORT_SCORE_FIRST_STEPS="32:8", TTT_LORA_LR=0.001)


def masked_attention(q, k, v, cu, longest):
    """attend_plain's results without a loop over documents."""
    if cu is None:
        return tg.plain_rows(q, k, v)
    rows = [x.flatten(0, 1)[None].transpose(1, 2) for x in (q, k, v)]
    at = torch.arange(rows[0].size(2), dtype=cu.dtype)
    document = torch.searchsorted(cu, at, right=True)
    mask = (document[:, None] == document) & (at[:, None] >= at)
    grouped = q.shape[2] != k.shape[2]
    y = F.scaled_dot_product_attention(*rows, attn_mask=mask, enable_gqa=grouped)
    return y.transpose(1, 2).reshape(q.shape)


@pytest.fixture
def tracing(monkeypatch):
    """Compilation as on a GPU, by dynamo alone; yields the number of graphs made so far."""
    torch._dynamo.reset()
    counters.clear()
    tg.set_up(settings(), tg.World())
    # it remembers what operators give, which costs more here than it saves
    monkeypatch.setattr(torch._dynamo.config, "fake_tensor_cache_enabled", False)
    monkeypatch.setitem(tg.BACKENDS, "plain", masked_attention)
    monkeypatch.setattr(tg, "compiles", lambda s, device: s.compile != "0")
    monkeypatch.setattr(tg, "compiled", lambda s, device, fn, **how: torch.compile(
        fn, backend="eager", **how) if s.compile != "0" else fn)
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def adapted(s, model, val) -> float:
    return tg.PhasedTTT(s, tg.World(), model, val).run().loss


def test_training_meets_no_graph_that_its_warm_up_has_not(data, tracing):
    s = settings(DATA_PATH=data, TRAIN_SEQ_SCHEDULE="32@0.5,64@1", ITERATIONS=6,
                 RECUR_START_STEP=2, LATE_QAT_THRESHOLD=0.5, LATE_QAT_MIN_STEP=3,
                 BIGRAM_VOCAB_SIZE=64, BIGRAM_DIM=16, **SHAPE)
    world, model = tg.World(), sine_model(s)
    trainer = tg.Trainer(s, world, model)
    trainer.warm_up()
    known, stream = tracing(), tg.Prefetch(tg.open_train_stream(s, world, trainer.tokens), world.device)
    curriculum, looped = tg.Curriculum(s), set()
    for step in range(s.iterations):
        length, looping, lr = curriculum.at(step, step / s.iterations)
        trainer.micro_step(stream.next(length), tg.layer_plan(s, looping))
        trainer.update(lr, 0.9)
        looped.add(looping)
    stream.close()
    assert looped == {False, True} and trainer.sharpness is not None
    # with and without the loop and soft rounding; the stand-in does not look at the longest segment
    assert known == tracing() == 4


def test_evaluation_meets_no_graph_that_its_probes_have_not(tracing):
    """Five documents in rounds of two, two and one; keys cached; the watchdog's way out."""
    s, world = settings(**SHAPE, SLIDING_WINDOW_ENABLED=0), tg.World()
    model, val = sine_model(s), tg.Validation.of(documents(5, 3, lo=5, hi=200))
    assert tg.Scorer(s, world, model).windows(val, s.eval_seq_len) and tracing() == 1
    assert all(p.ok for p in tg.run_probes(s, world, model))
    known = tracing()

    def scores(s):
        scorer = tg.Scorer(s, world, model)
        hurried = tg.PhasedTTT(s, world, model, val)
        hurried.level = tg.NO_ADAPTATION
        with tg.weights_kept(model):
            return [scorer.windows(val, s.eval_seq_len).loss, scorer.windows(val, s.eval_stride).loss,
                    hurried.run().loss, adapted(s, model, val)]

    compiled = scores(s)
    assert tracing() == known
    assert np.allclose(compiled, scores(settings(**SHAPE, COMPILE="0")), rtol=0, atol=1e-4)


@pytest.mark.parametrize("changes, graphs", [
    # a document's beginning, and what goes on from cached keys
    (dict(TTT_CACHE_LAMBDA=0.3, CORRECTOR_ALPHA=0.3, CORRECTOR_ORDERS="2,3"), 2),
    (dict(TTT_SUFFIX=20, TTT_STEP_SHARE=0.1), 2),
    pytest.param(
        dict(TTT_KV_REUSE=0, TTT_SHARED_A=0, TTT_OPTIMIZER="adam", TTT_DOC_ORDER="length"), 1,
        marks=pytest.mark.long),
])
def test_adaptation_needs_few_graphs(changes, graphs, tracing):
    """21 documents in groups of 8 and two phases: fewer rows, other chunks and suffixes and new weights need
    no graph."""
    s = settings(**SHAPE, **changes)
    ttt = tg.PhasedTTT(s, tg.World(), sine_model(s), tg.Validation.of(documents(21, 5, lo=5, hi=200)))
    ttt.run()
    if s.ttt_suffix:
        ttt.model.requires_grad_(False)
        for ttt.level in (2, 3):
            ttt.adapt_group(np.arange(5, 9))
    assert tracing() == graphs


@pytest.mark.parametrize("kernel", ["torch", pytest.param("fa4", marks=pytest.mark.long)])
def test_the_kernels_of_a_gpu_are_traced_whole(kernel, tracing, monkeypatch):
    """Shapes alone, through the fused kernels' operators and one attention backend: a graph per plan in
    training, two for adaptation that goes on, whatever the rows and chunks."""
    monkeypatch.setitem(tg.FLASH, "torch", importlib.import_module("torch.nn.attention.varlen"))
    monkeypatch.setitem(tg.BACKENDS, "plain", tg.BACKENDS[kernel])
    monkeypatch.setattr(tg, "use_triton", lambda wanted, sensible: True)
    s = settings(**SHAPE)
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
        for rows in (slice(None), slice(3, None)):
            adapter, cache = tg.Adapter(s, tg.layer_plan(s, True), 8), tg.KeyCache(64)
            adapter.keep(rows)
            for begin, end in zip((0, 8, 16, 32, 48), (8, 16, 32, 48, 64)):
                if begin:
                    cache.advance(end - begin)
                ids = torch.zeros((adapter.b["q"].size(1), end - begin), dtype=torch.int64)
                loss = adapting(ids, ids, tg.layer_plan(s, True), None, adapter, None, cache)
                cache.seal(ids)
                loss.sum().backward(inputs=adapter.trained())
                for p in adapter.trained():
                    p.grad = None
    assert tracing() == 4
