"""Mutants: how the tests of the probes change the script, and what has to find it."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import shallow, sine_model, tg

WINDOWS, SLIDING, TTT = "C1 windows", "C1 sliding windows", "C1 test-time training"
WINDOWS_SUM, TTT_SUM = "C2 windows", "C2 test-time training"
LEDGER = "C3 C4 ledger"
once = pytest.mark.parametrize("s", ["stream"], indirect=True)      # where adapting plays no part
FIELD = dict(ttt_kv_reuse=False, ttt_warm_start_a=True, ttt_optimizer="adam", ttt_doc_order="length")


def in_form(s, name: str):
    """The default way of adapting, "stream", or the "field"'s, without sliding windows (see `scoring`). Of
    few layers: a mutant changes what stands around them, or each of them."""
    s = dataclasses.replace(shallow(s), sliding_window_enabled=False)
    return s if name == "stream" else dataclasses.replace(s, **FIELD)


def scoring(s, *, ttt=False):
    """The same settings for mutants of plain scoring: sliding windows, adaptation only where it is judged."""
    return dataclasses.replace(s, sliding_window_enabled=True, ttt_enabled=ttt)


def findings(s) -> list[str]:
    """What the probes have to say against the script as it is now."""
    return [f"{p.name}: {p.figure}" for p in tg.run_probes(s, tg.World(), sine_model(s)) if not p.ok]


def assert_caught(s, *by: str) -> None:
    found = findings(s)
    assert all(any(b in f for f in found) for b in by), f"expected {by}, found {found}"


def replace(patch, owner, name, make):
    """Put make(the real thing) in its place."""
    patch.setattr(owner, name, make(getattr(owner, name)))


def attention_one_ahead(patch):
    """The causal mask is off by one."""
    def rows(q, k, v):
        T, keys = q.shape[1], k.shape[1]
        back = torch.arange(keys - T, keys)[:, None] - torch.arange(keys)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=back >= -1, enable_gqa=True).transpose(1, 2)
    patch.setattr(tg, "plain_rows", rows)
