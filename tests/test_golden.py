"""Our own golden numbers: what the suite holds to where the public reference numbers are missing.

They were written by this file (`python tests/test_golden.py`) from a version that passes tests/parity.py.
Weights and tokens follow formulas, so no random generator is involved.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import settings, sine_model, tg
from parity import gptq

GOLDEN = Path(__file__).with_name("golden.json")


def formula_tokens(rows, columns):
    at = torch.arange(rows * columns)
    ids = 4 + (at * at * 7 + at * 13) % 290
    ids[::37] = tg.BOS
    return ids.view(rows, columns)


def checksum(x):
    x = x.double()
    return [x.sum().item(), x.square().sum().item(), x.flatten()[x.numel() // 3].item()]


def forward_numbers():
    out = {}
    for name, changes in {
        "default": {},
        "dense": dict(SPARSE_ATTN_GATE_ENABLED=0, GATED_ATTN_ENABLED=1),
        "out": dict(SPARSE_ATTN_GATE_ENABLED=0, ATTN_OUT_GATE_ENABLED=1),
        "plain": dict(PARALLEL_START_LAYER=0, SMEAR_GATE_ENABLED=0, TIE_EMBEDDINGS=0),
    }.items():
        s, x = settings(**changes), formula_tokens(1, 96)
        model, plan = sine_model(s), tg.layer_plan(s, True)
        bounds, longest = tg.segment_bounds(np.flatnonzero(x[0].numpy() == tg.BOS), 96, 0)
        losses = model.losses(x, x.roll(-1, 1), plan, tg.Layout(torch.from_numpy(bounds), longest))
        losses.mean().backward()
        out[f"forward.{name}"] = checksum(losses.detach())
        out[f"gradient.{name}"] = [
            sum(p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None)
            ** 0.5
        ]
    return out


def training_numbers():
    s = settings(ITERATIONS=3, MUON_DTYPE="float32")
    model = sine_model(s)
    trainer, losses = tg.Trainer(s, tg.World(), model), []
    for step in range(3):
        x = formula_tokens(2, 65 + step)
        losses.append(
            trainer.micro_step(tg.Batch(x[:, :-1], x[:, 1:], None, 66), tg.layer_plan(s, step > 0)).item()
        )
        trainer.update(tg.warmdown_share(s, step / 3), tg.muon_momentum(s, step))
    return {
        "train.losses": losses,
        "train.ema": [v for n in sorted(trainer.ema) for v in checksum(trainer.ema[n])[1:2]],
    }


def quantiser_numbers():
    at = torch.arange(48 * 64, dtype=torch.float64)
    w = (torch.sin(at * 0.731) * torch.cos(at * 0.113)).view(48, 64).float()
    x = torch.sin(torch.arange(200 * 64, dtype=torch.float64) * 0.917).view(200, 64).float()
    scale = tg.row_scales(w, 5, 4.0)
    h = x.mT @ x / 200 + 0.05 * torch.eye(64)
    error = w - gptq(w, h, scale, 5) * scale[:, None].float()
    return {
        "gptq": [((error @ h) * error).sum().item()],  # codes at the edge between two hang on last bits
        "scales": checksum(scale),
        "orthogonal": checksum(tg.orthogonalise(w, torch.float32)),
    }


def evaluation_numbers():
    tokens = np.concatenate([formula_tokens(1, n)[0].numpy() for n in (30, 74, 111, 20)]).astype(np.uint16)
    tokens[0] = tg.BOS
    s = settings(TTT_LORA_RANK=2, PHASED_TTT_PREFIX_DOCS=2, PHASED_TTT_NUM_PHASES=1)
    val = tg.Validation.of(tokens)
    val.target_bytes *= 3

    def wave(event, adapter=None, **_):
        if event == "lora":
            with torch.no_grad():
                for a in adapter.a.values():
                    a.copy_(torch.sin(torch.arange(a.numel(), dtype=torch.float64)).view(a.shape) * 0.1)

    plain = tg.Scorer(s, tg.World(), sine_model(s)).windows(val, 16)
    exact = tg.dataclasses.replace(
        s, ttt_kv_reuse=False, ttt_warm_start_a=True, ttt_optimizer="adam", ttt_doc_order="length",
        ttt_short_score_first_enabled=False, ttt_base_share=0,
    )
    out = {"sliding": [plain.loss, plain.bpb]}
    for name, how in (("ttt", exact), ("ttt_fast", s)):
        adapted = tg.PhasedTTT(how, tg.World(), sine_model(s), val, wave).run()
        out[name] = [adapted.loss, adapted.bpb]
    return out


def numbers():
    return {**forward_numbers(), **training_numbers(), **quantiser_numbers(), **evaluation_numbers()}


@pytest.fixture(scope="module")
def ours():
    return numbers()


@pytest.mark.parametrize("name", sorted(json.loads(GOLDEN.read_text())) if GOLDEN.exists() else [])
def test_golden(name, ours):
    near = dict(rel=0.01) if name == "gptq" else dict(rel=2e-4, abs=2e-4)
    assert ours[name] == pytest.approx(json.loads(GOLDEN.read_text())[name], **near)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(numbers(), indent=1, sort_keys=True) + "\n")
    print(f"wrote {GOLDEN.name} with torch {torch.__version__}", file=sys.stderr)
