"""Several ranks do what one does."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import LANES, ROOT, TABLES, environment, events, free_port, run_here, run_script, summary


def losses(folder):
    return [e["loss"] for e in events(folder, "train")]


# The second pair of ranks: what comes after its training was rehearsed, and its scores probed, by the first.
SHORT_CUT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train_gpt as tg

tg.rehearse = lambda *_: 0.0
tg.run_probes = lambda *_: []
sys.exit(tg.main([]))
"""


def test_one_rank_two_ranks_and_two_nodes_agree(data, tmp_path):
    # an odd number of layers: the ranks' shares of the matrices are not alike
    same = dict(ITERATIONS=4, TRAIN_LOG_EVERY=1, WARMUP_STEPS=0, EVAL_STRIDE=32, NUM_LAYERS=3, LOOP_START=1,
                LOOP_END=1, PARALLEL_START_LAYER=2, XSA_LAST_N=3)
    one, two, nodes = tmp_path / "one", tmp_path / "two", [tmp_path / "node0", tmp_path / "node1"]
    assert run_here(environment(data, ARTIFACT_DIR=one, GRAD_ACCUM_STEPS=2, **same))[0] == 0

    def both(folders, script, node_size):
        port = free_port()

        def rank(i):
            env = environment(data, ARTIFACT_DIR=folders[i], GRAD_ACCUM_STEPS=1, GLOO_SOCKET_IFNAME="lo",
                              RANK=i, LOCAL_RANK=i % node_size, WORLD_SIZE=2, LOCAL_WORLD_SIZE=node_size,
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **same)
            return run_script(env, script=script)

        with ThreadPoolExecutor(2) as pool:
            ended = list(pool.map(rank, range(2)))
        assert [status for status, _ in ended] == [0, 0], ended

    both([two, two], ROOT / "train_gpt.py", 2)
    script = tmp_path / "train_gpt.py"
    script.write_text(SHORT_CUT)
    both(nodes, script, 1)
    assert summary(one)["probes"].keys() == summary(two)["probes"].keys()
    assert all(probe["ok"] for probe in summary(two)["probes"].values())
    assert not (nodes[1] / "summary.json").exists()
    for other in (two, nodes[0]):
        assert summary(other)["world_size"] == 2
        assert np.allclose(losses(one), losses(other), atol=1e-5)
        for key in ("sliding_val_bpb", "quantized_val_bpb", "prequant_val_bpb", "val_bpb"):
            assert summary(one)[key] == pytest.approx(summary(other)[key], abs=2e-5), key
        for a, b in zip(events(one, "profile"), events(other, "profile"), strict=True):
            assert a["nats"] == pytest.approx(b["nats"], rel=2e-5)
            assert {**a, "nats": 0, "time": 0} == {**b, "nats": 0, "time": 0}


@pytest.mark.long
def test_one_and_two_ranks_agree_with_all_of_them(data, tmp_path):
    every = dict(
        TABLES, **LANES, ASYM_LOGIT_RESCALE=1, MATRIX_LR_EARLY=0.01, BANK_SPLIT=2,
        LATE_QAT_THRESHOLD=0.9, LATE_QAT_MIN_STEP=2, TRAIN_SEQ_SCHEDULE="16@0.4,64@1", RECUR_START_STEP=2,
        SEQ_CHANGE_WARMUP_STEPS=2, QUANTIZE_ONLY=1, TTT_ENABLED=0, MUON_DTYPE="float32", WARMUP_STEPS=0,
        GRAD_CLIP_NORM=0, AWQ_LITE_ENABLED=1,
    )
    weights = []
    for ranks in (1, 2):
        env = environment(data, **every, ARTIFACT_DIR=tmp_path / str(ranks), GRAD_ACCUM_STEPS=2 // ranks)
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
        status, output = run_script(env, launcher=launcher if ranks > 1 else ())
        assert status == 0, output
        assert summary(tmp_path / str(ranks))["steps"] == 4
        weights.append(torch.load(tmp_path / str(ranks) / "final_model.pt", weights_only=True)["weights"])
    assert "bigram.embed.weight" in weights[0] and "softcap_pos" in weights[0]
    for name, one in weights[0].items():
        assert np.allclose(one, weights[1][name], atol=2e-4), name
