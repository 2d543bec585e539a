"""Several ranks do what one does."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import LANES, TABLES, environment, events, free_port, run_here, run_script, summary


def losses(folder):
    return [e["loss"] for e in events(folder, "train")]


def test_one_rank_two_ranks_and_two_nodes_agree(data, tmp_path):
    same = dict(ITERATIONS=4, TRAIN_LOG_EVERY=1, WARMUP_STEPS=0, EVAL_STRIDE=32)
    one, two, port = tmp_path / "one", tmp_path / "two", free_port()
    assert run_here(environment(data, ARTIFACT_DIR=one, GRAD_ACCUM_STEPS=2, **same))[0] == 0

    def rank(i):
        env = environment(data, ARTIFACT_DIR=two, GRAD_ACCUM_STEPS=1, GLOO_SOCKET_IFNAME="lo", RANK=i,
                          LOCAL_RANK=i, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=port, **same)
        return run_script(env)

    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(rank, range(2)))
    assert [status for status, _ in ended] == [0, 0], ended
    nodes, port = [tmp_path / "node0", tmp_path / "node1"], free_port()

    def node(i):
        launcher = (
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc_per_node=1",
            f"--node_rank={i}",
            "--rdzv_backend=c10d",
            f"--rdzv_endpoint=127.0.0.1:{port}",
            "--rdzv_id=t",
            "--local_addr=127.0.0.1",
        )
        # on the loopback alone: resolving this machine's name can take a minute
        env = environment(data, ARTIFACT_DIR=nodes[i], GRAD_ACCUM_STEPS=1, GLOO_SOCKET_IFNAME="lo", **same)
        return run_script(env, launcher=launcher)

    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(node, range(2)))
    assert [status for status, _ in ended] == [0, 0], ended
    joined = next(n for n in nodes if (n / "summary.json").exists())
    for other in (two, joined):
        assert summary(other)["world_size"] == 2
        assert summary(one)["probes"].keys() == summary(other)["probes"].keys()
        assert all(probe["ok"] for probe in summary(other)["probes"].values())
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
