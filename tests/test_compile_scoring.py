"""What torch.compile makes of scoring and adapting, as test_compile.py looks at training."""


import numpy as np
import pytest
from conftest import FEW_LAYERS, documents, settings, sine_model, tg

ONCE = dict(FEW_LAYERS, NUM_LOOPS=0)      # a layer that is traced again makes no other graph


def adapted(s, model, val) -> float:
    return tg.PhasedTTT(s, tg.World(), model, val).run().loss


def test_evaluation_meets_no_graph_that_its_probes_have_not(tracing):
    """Five documents in rounds of two, two and one; cached keys, of which a suffix is run again; the
    watchdog's way out."""
    default_steps = dict(TTT_SUFFIX="8", TTT_STEP_SHARE="0.25")
    s, world = settings(**ONCE, **default_steps, SLIDING_WINDOW_ENABLED=0), tg.World()
    model, val = sine_model(s), tg.Validation.of(documents(5, 3, lo=5, hi=200))
    assert tg.Scorer(s, world, model).windows(val, s.eval_seq_len) and tracing() == 1
    assert all(p.ok for p in tg.run_probes(s, world, model))
    known = tracing()

    def scores(s):
        scorer = tg.Scorer(s, world, model)
        hurried = tg.PhasedTTT(s, world, model, val)
        hurried.watch.level = tg.NO_ADAPTATION
        with tg.weights_kept(model):
            return [scorer.windows(val, s.eval_seq_len).loss, scorer.windows(val, s.eval_stride).loss,
                    hurried.run().loss, adapted(s, model, val)]

    compiled = scores(s)
    assert tracing() == known
    plain = scores(settings(**ONCE, **default_steps, COMPILE="0"))
    assert np.allclose(compiled, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("changes, graphs", [
    # a document's beginning, what goes on from cached keys, and the step; without adapters two more
    pytest.param(
        dict(TTT_CACHE_LAMBDA=0.3, CORRECTOR_ALPHA=0.3, CORRECTOR_ORDERS="2,3"), 5, marks=pytest.mark.long),
    (dict(TTT_SUFFIX=20, TTT_STEP_SHARE=0.1), 5),
    (dict(TTT_SUFFIX=20, TTT_STEP_SHARE=0.1, TTT_BASE_SHARE=0), 3),
    pytest.param(
        dict(TTT_KV_REUSE=0, TTT_WARM_START_A=1, TTT_OPTIMIZER="adam", TTT_DOC_ORDER="length"), 3,
        marks=pytest.mark.long),
])
def test_adaptation_needs_few_graphs(changes, graphs, tracing):
    """21 documents in groups of 8 and two phases: fewer rows, other chunks and suffixes and new weights need
    no graph."""
    s = settings(**ONCE, **changes)
    ttt = tg.PhasedTTT(s, tg.World(), sine_model(s), tg.Validation.of(documents(21, 5, lo=5, hi=200)))
    ttt.run()
    if s.ttt_suffix:
        ttt.model.requires_grad_(False)
        for ttt.watch.level in (2, 3):
            ttt.adapt_group(np.arange(5, 9))
    assert tracing() == graphs
