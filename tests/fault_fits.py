"""Random small models under random limits through the fitter: `python tests/fault_fits.py [COUNT] [SEED]`.

A fit may end in two ways: an artifact within the limit that reads back as it was written, or a UserError that
says that no step reaches the limit. Weights and curvature are made as bad as training could leave them.
"""

import collections
import contextlib
import itertools
import random
import sys
import traceback
from unittest import mock

import torch
from conftest import settings, tg

SMALL = dict(VOCAB_SIZE=96, MODEL_DIM=32, NUM_LAYERS=2, NUM_HEADS=2, NUM_KV_HEADS=1, NUM_LOOPS=0,
             LOOP_START=0, LOOP_END=1, PARALLEL_START_LAYER=0, XSA_LAST_N=0, FIT_MARGIN_BYTES=256)
CHOICES = dict(
    MATRIX_BITS=(2, 4, 6, 8), EMBED_BITS=(2, 7, 8), MATRIX_CLIP_SIGMAS=(0.1, 3, 13),
    LQER_ENABLED=(0, 1), LQER_RANK=(1, 4), LQER_TOP_K=(1, 99),
    LQER_ASYM_ENABLED=(0, 1), LQER_GAIN_SELECT=(0, 1), LQER_ASYM_GROUP=(8, 64),
    TIE_EMBEDDINGS=(0, 1), SPARSE_ATTN_GATE_ENABLED=(0, 1), QUANT_TRELLIS=(0, 1))
BY_HAND = dict(AWQ_LITE_ENABLED=(0, 1), AWQ_LITE_GROUP_SIZE=(8,), QUANT_CLIP=("sigmas", "percentile"))


# --- weights: each changes a matrix (R, C) in place

def zero_rows(w, rng):
    w[rng.randrange(len(w))::rng.choice((1, 2, 5))] = 0


def constant_rows(w, rng):
    w[rng.randrange(len(w))::rng.choice((1, 3))] = rng.choice((0.02, -3.0, 1e-6))


def all_alike(w, rng):
    w.fill_(rng.choice((0.0, 0.5)))


def huge(w, rng):
    w.mul_(rng.choice((1e3, 1e6, 1e20)))


def small(w, rng):
    w.mul_(rng.choice((1e-4, 1e-8, 1e-30)))


def one_outlier(w, rng):
    w.view(-1)[rng.randrange(w.numel())] = rng.choice((10.0, -1e4, 1e12))


def few_values(w, rng):
    w.copy_(w.sign() * 0.01)


def wide_rows(w, rng):
    w.mul_(torch.logspace(-6, 6, len(w))[:, None])


# --- curvature: each makes a Hessian (C, C) of a width

def usual(width, generator):
    x = torch.randn(4 * width, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return x.mT @ x / len(x)


def few_rows(width, generator):
    x = torch.randn(width // 4, width, generator=generator)
    return x.mT @ x


def dead_inputs(width, generator):
    h = usual(width, generator)
    h[::3] = 0
    h[:, ::3] = 0
    return h


def twins(width, generator):
    """Every input comes twice, one of each a thousand times the size: singular, and badly scaled."""
    x = torch.randn(3 * width, width // 2, generator=generator)
    x = torch.cat((x, 1000 * x), dim=1)
    return x.mT @ x


def no_input(width, generator):
    return torch.zeros(width, width)


def tiny_inputs(width, generator):
    return usual(width, generator) * 1e-36


def huge_inputs(width, generator):
    return usual(width, generator) * 1e30


def broken(width, generator):
    return torch.full((width, width), float("nan"))


SPOILS = (zero_rows, constant_rows, all_alike, huge, small, one_outlier, few_values, wide_rows)
HESSIANS = (usual, few_rows, dead_inputs, twins, no_input, tiny_inputs, huge_inputs, broken)


def case(seed: int):
    """(settings, weights, curvature, bytes beside the script) of one fit."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    allocation = rng.choice(("hand", "fisher"))
    choices = {**CHOICES, **(BY_HAND if allocation == "hand" else {})}
    chosen = {name: rng.choice(values) for name, values in choices.items()}
    s = settings(**SMALL, QUANT_ALLOCATION=allocation, **chosen)
    shapes = tg.matrix_views({n: p.detach() for n, p in tg.GPT(s).named_parameters()})
    weights = {n: 0.05 * torch.randn(w.shape, generator=generator) for n, w in shapes.items()}
    for w in weights.values():
        if w.dim() == 2 and rng.random() < 0.5:
            rng.choice(SPOILS)(w, rng)
    hessians, fisher = {}, {}
    for name, w in weights.items():
        if w.dim() == 2 and tg.input_of(name) == name and rng.random() < 0.9:
            hessians[name] = rng.choice(HESSIANS)(w.size(1), generator)
        if w.dim() == 2 and rng.random() < 0.9:
            size = rng.choice((0.0, 1e-30, 1.0, 1.0, 1e30, float("inf")))
            fisher[name] = size * torch.rand(len(w), generator=generator)
    codes = sum(w.numel() for w in weights.values() if w.dim() == 2)
    size = int(codes * rng.choice((0.15, 0.3, 0.5, 0.8, 1.5, 2.5)))
    return s, weights, tg.Curvature(hessians, fisher), size


class Tries:
    """A log of the fitter's tries."""

    def __init__(self):
        self.steps = []

    def log(self, event, **values):
        if event == "pack":
            self.steps.append(values["base_step"])


@contextlib.contextmanager
def limit_of(size: int):
    """Inside, an artifact may take `size` bytes, and matrices of this size have codes."""
    limit = tg.code_bytes() + tg.MARK_BYTES + size
    with mock.patch.object(tg, "SMALL_TENSOR", 500), mock.patch.object(tg, "ARTIFACT_LIMIT", limit):
        yield limit


def coarsest(s, weights, curvature) -> int:
    """Bytes of the artifact beside its script when steps are as wide as they get."""
    return len(tg.pack_model(s, tg.Quantiser(s, weights, curvature)(2.0 ** 40)))


def one_fit(seed: int) -> str:
    """fitted, or refused with reason; short (bytes left that finer steps could use) is a pity; over, missed
    (refused although it can be done), unread or crashed are faults."""
    s, weights, curvature, size = case(seed)
    written, tries = {}, Tries()

    def pack(s, q, real=tg.pack_model):
        blob = real(s, q)
        written[blob] = tg.dequantise(q)
        return blob

    with limit_of(size) as limit, mock.patch.object(tg, "pack_model", pack):
        try:
            blob = tg.quantise_to_fit(s, tg.World(), tries, weights, curvature)
        except tg.UserError:
            room = limit - tg.code_bytes() - tg.MARK_BYTES
            return "refused" if coarsest(s, weights, curvature) > room else "missed"
        if len(blob) + tg.code_bytes() > limit:
            return "over"
        try:
            back = tg.read_artifact(s, blob, "the artifact").weights
        except tg.UserError as error:
            print(f"seed {seed}: {error}", file=sys.stderr)
            return "unread"
        same = all(torch.equal(back[n], w) for n, w in written[blob].items())
        if not same or set(back) != set(weights):
            return "unread"
        left = limit - tg.code_bytes() - tg.MARK_BYTES - len(blob)
        if left <= s.fit_margin_bytes or tries.steps[-1] <= tg.Quantiser(s, weights, curvature).finest:
            return "fitted"
        return "short"


def fits(count: int, seed: int = 0) -> collections.Counter:
    """How `count` fits ended, from this seed on; what crashed is shown."""
    ends = collections.Counter()
    for number in itertools.islice(itertools.count(seed), count):
        try:
            end = one_fit(number)
        except Exception:  # noqa: BLE001 - whatever it is, it is counted
            print(f"seed {number}:", file=sys.stderr)
            traceback.print_exc()
            end = "crashed"
        ends[end] += 1
    return ends


def main() -> int:
    count, seed = (int(x) for x in (sys.argv[1:] + ["100", "0"][len(sys.argv) - 1:])[:2])
    ends = fits(count, seed)
    print(f"{count} fits from seed {seed}: " + ", ".join(f"{n} {end}" for end, n in sorted(ends.items())))
    return 1 if set(ends) - {"fitted", "refused", "short"} else 0


if __name__ == "__main__":
    sys.exit(main())
