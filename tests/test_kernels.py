"""Every kernel against its plain twin, forward and backward; without a GPU, Triton runs interpreted."""

import os
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are defined, so before the import

from conftest import ROOT
from conftest import tg as kernels

from train_gpt import UserError, attention, capped_ce, leaky_square_mlp, resolve_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="needs triton (pip install triton)")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")


COMPILE = """
import subprocess, tempfile
import train_gpt as tg, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = dict(targets_ptr="*i64", signs_ptr="*u8", cap="fp32", slope="fp32", scale="fp32", eps="fp32")
FLOATS = "loss_ptr lse_ptr dloss_ptr total_ptr target_ptr factor_ptr cos_ptr sin_ptr slope_ptr"
TYPES.update(dict.fromkeys(FLOATS.split(), "*fp32"))
UP = dict(stride_k=1, **tg.PRODUCT_TILE)
DOWN = dict(stride_n=1, **tg.PRODUCT_TILE)
HEADS = dict(HEADS=8, GROUP=2, WIDTH=64, BN=16, BW=64, num_warps=8)
KEPT = dict(KEY_HEADS=4, GROUP=2, WIDTH=64, BW=64, **tg.KEPT_KEYS_TILE)
for kernel, launch in (
        (tg.ce_forward_kernel, tg.ce_launch(8192)),
        (tg.ce_backward_kernel, tg.ce_launch(8192)),
        (tg.mlp_kernel, dict(BACKWARD=False, KEEP_SIGNS=True, **UP)),
        (tg.mlp_kernel, dict(BACKWARD=True, KEEP_SIGNS=False, **DOWN)),
        (tg.head_kernel, UP),
        (tg.qkv_kernel, dict(GAINED=8, NORMED=12, WIDTH=64, ANGLES=8, **UP)),
        (tg.own_value_kernel, HEADS), (tg.own_value_backward_kernel, HEADS),
        (tg.kept_keys_kernel, KEPT), (tg.kept_keys_dq_kernel, KEPT), (tg.own_keys_gradient_kernel, KEPT)):
    options = {name: launch[name] for name in ("num_warps", "num_stages") if name in launch}
    types, values, divisible = {}, {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in launch:      # a size, or a stride of 1
            types[name], values[at,] = "constexpr", launch[name]
            continue
        types[name] = TYPES.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        if name.endswith("_ptr") or name in "M N K stride_k stride_n v_stride".split():
            divisible[at,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, values, divisible)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, text=True, capture_output=True).stdout
    used = dict(part.split(":") for part in text.split() if part.count(":") == 1)
    print(kernel.__name__, made.metadata.shared, used["REG"], used["STACK"])
"""
SHARED_MEMORY = 227 * 1024  # bytes of it that a program may have on a Hopper GPU


@needs_triton
def test_every_kernel_compiles_for_a_hopper_gpu():
    """The interpreter takes what the compiler does not, such as a name that changes its shape in a loop. As
    it is launched at full size, each kernel has room in shared memory and spills no register."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines():
        _, shared, _, stack = line.split()
        assert int(shared) <= SHARED_MEMORY and int(stack) == 0, line


class Layout(NamedTuple):
    cu_seqlens: torch.Tensor
    max_seqlen: int


def layout_of(lengths, padding=0, device=DEVICE):
    """Layout of documents of these lengths, with `padding` empty segments at the end."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    cu = torch.tensor(bounds + [bounds[-1]] * padding, dtype=torch.int32, device=device)
    return Layout(cu, max(lengths))


@pytest.fixture(autouse=True)
def interpreter_knows_bfloat16(monkeypatch):
    """The interpreter keeps bf16 as uint16, and tl.dot multiplies those: widen the operands first."""
    if kernels.triton is None or DEVICE == "cuda":
        return
    from triton.runtime.interpreter import InterpreterBuilder

    multiply = InterpreterBuilder.create_dot

    def widened(handle):
        if str(handle.dtype.scalar) != "bf16":
            return handle
        return type(handle)((handle.data.astype("uint32") << 16).view("float32"), kernels.tl.float32)

    monkeypatch.setattr(
        InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: multiply(self, widened(a), widened(b), *rest),
    )


def random(*shapes, dtype=torch.float32, seed=0, device=DEVICE, grad=True):
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(*shape, generator=generator) for shape in shapes]
    return [draw.to(device, dtype).requires_grad_(grad) for draw in draws]


def gap(got, want):
    """Relative error in the Frobenius norm."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def graded(function, leaves, dy):
    """[value, gradients …] of function(*leaves) against the cotangent dy."""
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


# ------------------------------------------------------------------------ softcapped cross-entropy
def ce_problem(N, V, dtype, scale=12.0):
    (logits,) = random((N, V), dtype=dtype)
    logits = (logits.detach() * scale).requires_grad_()
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    dloss = torch.rand(N, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    return logits, targets, dloss


@needs_triton
@pytest.mark.parametrize("N, V", [(37, 8192), (5, 1000), (3, 1), (2, 20000), (1, 8193)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("cap", [30.0, 15.0, 200.0])
def test_ce_kernel_is_its_twin(N, V, dtype, bound, cap):
    logits, targets, dloss = ce_problem(N, V, dtype)
    got = graded(lambda x: capped_ce(x, targets, cap, kernel=True), [logits], dloss)
    want = graded(lambda x: capped_ce(x, targets, cap, kernel=False), [logits], dloss)
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype
    if V == 1:
        assert got[0].abs().max() < 1e-5 and got[1].abs().max() < 1e-5  # one token: no loss, no gradient
        return
    # float32 resolves logits of size cap to cap · 6e-8; the interpreter truncates to bf16 where a GPU rounds.
    assert (got[0] - want[0]).abs().max() < 2e-5 * max(1, cap / 30)
    assert gap(got[1], want[1]) < bound * (max(1, cap / 30) if dtype == torch.float32 else 1)


@needs_triton
def test_ce_saturated_logits_and_empty_batch():
    """At ±1e4 every tail of tanh is met: no NaN, no gradient through a flat cap."""
    logits = torch.tensor([[1e4, -1e4, 0.0, 3.0]], device=DEVICE).requires_grad_()
    for target in range(4):
        targets = torch.tensor([target], device=DEVICE)
        one = torch.ones(1, device=DEVICE)
        results = [
            graded(lambda x: capped_ce(x, targets, 30.0, kernel=kernel), [logits], one)
            for kernel in (True, False)
        ]
        for got, want in zip(*results):
            assert torch.allclose(got, want, atol=1e-5)
    assert capped_ce(logits[:0], targets[:0], 30.0, kernel=True).shape == (0,)


@needs_triton
def test_ce_kernel_through_torch_compile():
    logits, targets, dloss = ce_problem(6, 1000, torch.float32)
    compiled = torch.compile(
        lambda x: capped_ce(x * 1.5, targets, 30.0, kernel=True), fullgraph=True, backend="aot_eager"
    )
    got = graded(compiled, [logits], dloss)
    want = graded(lambda x: capped_ce(x * 1.5, targets, 30.0, kernel=False), [logits], dloss)
    assert gap(got[0], want[0]) < 1e-6 and gap(got[1], want[1]) < 2e-6


@needs_triton
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("V, cap", [(1000, 30.0), (20000, 30.0), (1000, 100.0)])
def test_head_losses_are_the_head_and_the_twin(V, cap, dtype, bound):
    """Whatever comes back for each loss multiplies the gradient that was written on the way. Of a cap of 100
    the power is no float32: the logits are written then."""
    hidden, weight = random((6, 24), (V, 24), dtype=dtype)
    _, targets, d_losses = ce_problem(6, V, dtype)

    def losses(kernel):
        return lambda hidden, weight: kernels.head_losses(hidden, weight, targets, cap, kernel=kernel)

    compiled = torch.compile(losses(True), fullgraph=True, backend="aot_eager")
    want = graded(losses(False), [x.detach().float().requires_grad_() for x in (hidden, weight)], d_losses)
    for function in (losses(True), compiled):
        got = graded(function, [hidden, weight], d_losses)
        assert got[0].dtype == torch.float32 and got[1].dtype == dtype
        assert all(gap(a, b) < bound * cap / 30 for a, b in zip(got, want))


@needs_triton
def test_head_gradient_is_near_where_the_target_is_nearly_sure():
    """p - 1 is 5e-4 there, and the power beside it in bfloat16 is rounded by more."""
    hidden, weight, d_losses = random((4, 16), (50, 16), (4,), dtype=torch.bfloat16)
    with torch.no_grad():
        weight[:4] = 12 * hidden / hidden.square().sum(1, keepdim=True)
        weight[4:] *= 0.1

    def losses(kernel):
        return lambda h, w: kernels.head_losses(h, w, torch.arange(4, device=DEVICE), 30.0, kernel=kernel)

    got = graded(losses(True), [hidden, weight], d_losses)
    want = graded(losses(False), [x.detach().float().requires_grad_() for x in (hidden, weight)], d_losses)
    assert want[0].max() < 0.05 and all(gap(a, b) < 2e-2 for a, b in zip(got, want))


def test_ce_twin_is_the_definition():
    logits, targets, _ = ce_problem(9, 50, torch.float32)
    p = (30 * torch.tanh(logits / 30)).softmax(-1)
    want = -p[torch.arange(9), targets].log()
    assert torch.allclose(capped_ce(logits, targets, 30.0, kernel=False), want, atol=1e-5)


# ------------------------------------------------- norms, rotation, sums of streams: their own backward
def plain_norm(x, scale):
    return scale * torch.nn.functional.rms_norm(x, (x.size(-1),), eps=kernels.RMS_EPS)


def plain_rotation(x, cos, sin):
    half = cos.size(-1)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos + second * sin, second * cos - first * sin, rest), dim=-1)


def plain_lanes(lane0, lane1, attended, fed, keep, post):
    return torch.stack([
        keep[lane] * x + post[0, lane] * attended + post[1, lane] * fed
        for lane, x in enumerate((lane0, lane1))
    ])


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_norm_has_the_gradient_of_the_formula(dtype, bound):
    x, dy = random((2, 5, 24), (2, 5, 24))
    got = graded(lambda x: kernels.rms(x.to(dtype), 0.4).float(), [x], dy)
    want = graded(lambda x: plain_norm(x, 0.4), [x], dy)
    assert all(gap(a, b) < bound for a, b in zip(got, want))
    assert kernels.rms(torch.zeros(1, 4, dtype=dtype)).eq(0).all()


@pytest.mark.parametrize("width, rotated", [(16, 4), (16, 16), (12, 8), (6, 2)])
def test_normed_rotation_has_the_gradient_of_the_formula(width, rotated):
    x, gain, angle, dy = random((2, 7, 3, width), (3,), (7, rotated // 2), (2, 7, 3, width))
    cos, sin = angle.detach().cos(), angle.detach().sin()
    got = graded(lambda x, gain: kernels.NormedRotated.apply(x, cos, sin, gain), [x, gain], dy)
    want = graded(lambda x, gain: plain_rotation(plain_norm(x, 1.0), cos, sin) * gain[:, None], [x, gain], dy)
    assert all(gap(a, b) < 2e-6 for a, b in zip(got, want))


def test_blend_has_the_gradient_of_the_formula():
    leaves = random((2, 7, 12), (2, 7, 12), (2, 7, 12), (12,), (12,), (12,))
    (dy,) = random((2, 7, 12), seed=1)
    got = graded(lambda a, b, c, f, g, h: kernels.blend((a, f), (b, g), (c, h)), leaves, dy)
    want = graded(lambda a, b, c, f, g, h: a * f + b * g + c * h, leaves, dy)
    assert all(gap(a, b) < 2e-6 for a, b in zip(got, want))


def test_lanes_have_the_gradient_of_the_formula():
    leaves = random(*[(2, 7, 12)] * 4, (2,), (2, 2))
    (dy,) = random((2, 2, 7, 12), seed=1)
    got = graded(lambda *leaves: torch.stack(kernels.mix_lanes(*leaves)), leaves, dy)
    want = graded(plain_lanes, leaves, dy)
    assert all(gap(a, b) < 2e-6 for a, b in zip(got, want))


# ------------------------------------------------------------------------- queries, keys and values
@needs_triton
@pytest.mark.parametrize("rows, T, H, K, width, half", [(2, 70, 4, 2, 16, 4), (1, 5, 16, 8, 16, 8)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
def test_normed_heads_of_the_kernel_are_their_twins(rows, T, H, K, width, half, dtype, bound):
    """Tiles end within heads and rows, positions begin anew in every row; a gain of 0 has a gradient of 0."""
    shapes = (rows, T, H * width), ((H + 2 * K) * width, H * width), (H,), (H, 3)
    x, qkv, gain, gate = random(*shapes, dtype=dtype)
    angle, d_out = random((T, half), (rows, T, (H + 2 * K) * width + H), seed=1, grad=False)
    gain.data[0] = 0

    def results(kernel):
        def flat(x, qkv, gain, gate):
            weights = dict(qkv=qkv, q_gain=gain, attn_gate_w=gate)
            rope = angle.cos(), angle.sin()
            *heads, logits, _ = kernels.normed_heads(x, weights, rope, 0.4, kernel=kernel)
            return torch.cat([*(y.flatten(2) for y in heads), logits], dim=-1)

        return flat

    leaves = [x, qkv, gain, gate]
    got = graded(results(True), leaves, d_out)
    want = graded(results(False), [y.detach().float().requires_grad_() for y in leaves], d_out)
    assert got[0].dtype == dtype and got[3][0] == 0
    want[3][0] = 0
    assert all(gap(a, b) < bound for a, b in zip(got, want))


# ----------------------------------------------------------------- attention without the own value
@needs_triton
@pytest.mark.parametrize("rows, T, H, K, width", [(1, 40, 4, 2, 16), (3, 7, 6, 2, 12), (2, 33, 2, 2, 64)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-6), (torch.bfloat16, 1e-2)])
def test_own_value_kernel_is_its_twin(rows, T, H, K, width, dtype, bound):
    """Values are a slice of a wider row, as the joined product leaves them."""
    y, wide, gate, dout = random(
        (rows, T, H, width), (rows, T, K * width + 8), (rows, T, H), (rows, T, H, width), dtype=dtype
    )

    def removed(kernel):
        return lambda y, wide, gate: kernels.remove_own_value(
            y, wide[..., 8:].unflatten(2, (K, width)), gate, kernel=kernel
        )

    got = graded(removed(True), [y, wide, gate], dout)
    leaves = [x.detach().float().requires_grad_() for x in (y, wide, gate)]
    want = graded(removed(False), leaves, dout.float())
    assert got[0].dtype == dtype
    assert all(gap(a, b) < bound for a, b in zip(got, want))


@needs_triton
def test_own_value_kernel_meets_no_value_no_gate_and_no_token():
    y, v = random((1, 5, 2, 16), (1, 5, 1, 16))
    v = (v.detach() * torch.tensor([1, 0, 1, 1, 1.0], device=DEVICE)[None, :, None, None]).requires_grad_()
    dy = torch.ones_like(y)
    got = graded(lambda y, v: kernels.remove_own_value(y, v, kernel=True), [y, v], dy)
    want = graded(lambda y, v: kernels.remove_own_value(y, v, kernel=False), [y, v], dy)
    assert torch.equal(got[0][:, 1], y[:, 1])  # nothing to take away
    kept = [0, 2, 3, 4]
    assert gap(got[2][:, kept], want[2][:, kept]) < 3e-6 and got[2].isfinite().all()
    assert kernels.remove_own_value(y[:, :0], v[:, :0], kernel=True).shape == (1, 0, 2, 16)


@needs_triton
def test_own_value_kernel_through_torch_compile():
    y, v, gate, dy = random((1, 9, 4, 16), (1, 9, 2, 16), (1, 9, 4), (1, 9, 4, 16))

    def gated(kernel):
        return lambda y, v, gate: kernels.remove_own_value(y * 1.5, v, gate.sigmoid(), kernel=kernel)

    compiled = torch.compile(gated(True), fullgraph=True, backend="aot_eager")
    got = graded(compiled, [y, v, gate], dy)
    want = graded(gated(False), [y, v, gate], dy)
    assert all(gap(a, b) < 3e-6 for a, b in zip(got, want))


# ----------------------------------------------------------------------- attention on kept keys
def on_kept(kernel, old_k, old_v, first, seen):
    return lambda q, k, v: kernels.attention_on_kept(q, k, v, old_k, old_v, first, seen, kernel=kernel)


@needs_triton
@pytest.mark.parametrize("B, T, H, K, width, first, seen", [
    (2, 70, 4, 2, 16, 3, 90), (1, 5, 6, 2, 12, 0, 2), (3, 33, 2, 2, 64, 40, 64),
])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-6), (torch.bfloat16, 1.5e-2)])
def test_attention_on_kept_keys_is_its_twin(B, T, H, K, width, first, seen, dtype, bound):
    """Nothing of what lies around the keys that are seen has a part in it."""
    leaves = random((B, T, H, width), (B, T, K, width), (B, T, K, width), dtype=dtype)
    old_k, old_v, dy = random(*[(B, first + seen + 9, K, width)] * 2, (B, T, H, width), dtype=dtype, seed=1,
                              grad=False)
    exact = [x.detach().float().requires_grad_() for x in leaves]
    want = graded(on_kept(False, old_k.float(), old_v.float(), first, seen), exact, dy.float())
    for old in (old_k, old_v):
        old[:, :first] = old[:, first + seen:] = float("nan")
    compiled = torch.compile(on_kept(True, old_k, old_v, first, seen), fullgraph=True, backend="aot_eager")
    for function in (on_kept(True, old_k, old_v, first, seen), compiled):
        got = graded(function, leaves, dy)
        assert all(a.dtype == dtype and gap(a, b) < bound for a, b in zip(got, want))


# --------------------------------------------------------------------------------- leaky-ReLU² MLP
def plain_mlp(x, up, down, slope, scale=1.0):
    return torch.nn.functional.leaky_relu(plain_norm(x, scale) @ up.mT, slope).square() @ down.mT


@needs_triton
@pytest.mark.parametrize("N, d, m", [(130, 64, 256), (33, 40, 72), (1, 16, 300)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-6), (torch.bfloat16, 1.2e-2)])
@pytest.mark.parametrize("slope", [0.5, 0.3, 0.0])
def test_mlp_kernel_is_its_twin(N, d, m, dtype, bound, slope):
    """bfloat16: the signs and what the activation made of h tell as much of its slope as h itself would."""
    x, up, down, dy = random((N, d), (m, d), (d, m), (N, d), dtype=dtype)
    leaves = [x, up, down]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    got = graded(lambda *t: leaky_square_mlp(*t, slope, 0.6, kernel=True), leaves, dy)
    want = graded(lambda *t: plain_mlp(*t, slope, 0.6), exact, dy.double())
    for a, b in zip(got, want):
        assert a.dtype == dtype and (
            gap(a, b) < bound or float((a - b).abs().max()) < 1e-5
        )  # a zero gradient


@needs_triton
@pytest.mark.parametrize("kernel", [True, False])
def test_mlp_adds_onto_the_stream(kernel):
    leaves = random((9, 16), (32, 16), (16, 32))
    (dy,) = random((9, 16), seed=1)
    got = graded(lambda *t: leaky_square_mlp(*t, 0.5, 0.6, add=True, kernel=kernel), leaves, dy)
    want = graded(lambda x, *w: x + plain_mlp(x, *w, 0.5, 0.6), leaves, dy)
    assert all(gap(a, b) < 3e-6 for a, b in zip(got, want))
    with torch.no_grad():
        assert gap(leaky_square_mlp(*leaves, 0.5, 0.6, add=True, kernel=kernel), want[0]) < 3e-6


@needs_triton
def test_mlp_without_gradient_keeps_no_signs_and_frozen_weights_get_none():
    x, up, down, dy = random((20, 32), (48, 32), (32, 48), (20, 32))
    with torch.no_grad():
        y = leaky_square_mlp(x, up, down, 0.5, kernel=True)
    assert len(kernels.mlp_up(x, up, torch.ones(20, 1, device=DEVICE), 0.5, False)[1]) == 0
    frozen = [up.detach(), down.detach()]
    got = graded(lambda t: leaky_square_mlp(t, *frozen, 0.5, kernel=True), [x], dy)
    want = graded(lambda t: plain_mlp(t, *frozen, 0.5), [x], dy)
    assert gap(y, want[0]) < 1e-6 and all(gap(a, b) < 1e-6 for a, b in zip(got, want))


@needs_triton
def test_mlp_kernel_through_torch_compile():
    x, up, down, dy = random((20, 32), (48, 32), (32, 48), (20, 32))
    compiled = torch.compile(
        lambda *t: leaky_square_mlp(*t, 0.5, add=True, kernel=True) + 1, fullgraph=True, backend="aot_eager"
    )
    got = graded(compiled, [x, up, down], dy)
    want = graded(lambda x, *w: x + plain_mlp(x, *w, 0.5) + 1, [x, up, down], dy)
    assert all(gap(a, b) < 2e-6 for a, b in zip(got, want))


def test_forced_kernel_without_triton_names_the_remedy(monkeypatch):
    monkeypatch.setattr(kernels, "triton", None)
    x, up, down = random((2, 4), (6, 4), (4, 6))
    with pytest.raises(UserError, match="pip install triton"):
        leaky_square_mlp(x, up, down, 0.5, kernel=True)
    assert leaky_square_mlp(x, up, down, 0.5).shape == (2, 4)  # unforced: the plain twin


# ---------------------------------------------------------------------------------------- attention
def reference(q, k, v, layout):
    """Attention written as one masked softmax over all positions, in float64."""
    (B, T, H, D), keys = q.shape, k.shape[1]
    if layout is not None:
        q, k, v = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
        position = torch.arange(q.shape[1], device=q.device)
        doc = torch.bucketize(position, layout.cu_seqlens[1:].long(), right=True)
    else:
        doc = torch.zeros(keys, dtype=torch.long, device=q.device)
    Nq, Nk = q.shape[1], k.shape[1]
    back = torch.arange(Nk - Nq, Nk, device=q.device)[:, None] - torch.arange(Nk, device=q.device)
    seen = (back >= 0) & (doc[-Nq:, None] == doc)
    k, v = (x.double().repeat_interleave(H // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k) * D**-0.5
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", p, v).reshape(B, T, H, D)


PROBLEMS = {  # queries, keys, document lengths, padding
    "rows": (40, 40, None, 0),
    "cached": (7, 40, None, 0),
    "one query": (1, 33, None, 0),
    "documents": (61, 61, [1, 30, 30], 0),
    "padded end": (61, 61, [20, 41], 13),
    "long": (1300, 1300, [1100, 200], 5),
}


@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, 2e-6), (torch.float64, 1e-13), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("H, K", [(4, 4), (4, 2), (6, 1)])
def test_plain_attention_is_the_masked_softmax(name, H, K, dtype, bound):
    T, keys, lengths, padding = PROBLEMS[name]
    layout = lengths and layout_of(lengths, padding)
    B = 1 if lengths else 2
    q, k, v, dy = random((B, T, H, 16), (B, keys, K, 16), (B, keys, K, 16), (B, T, H, 16), dtype=dtype)
    got = graded(lambda *t: attention(*t, layout), [q, k, v], dy)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = graded(lambda *t: reference(*t, layout), exact, dy.double())
    for a, b in zip(got, want):
        assert a.dtype == dtype and (
            gap(a, b) < bound or float((a - b).abs().max()) < 1e-5
        )  # a zero gradient


def test_packed_gradient_by_finite_differences():
    q, k, v = random((1, 9, 4, 3), (1, 9, 2, 3), (1, 9, 2, 3), dtype=torch.float64)
    layout = layout_of([2, 7], 2)
    assert torch.autograd.gradcheck(lambda *t: attention(*t, layout), (q, k, v))


def test_documents_never_attend_across():
    """Changing a document from its 11th token on leaves the others, and its first ten rows, bit-equal."""
    layout = layout_of([30, 50, 20], 3)
    q, k, v = random((1, 100, 4, 16), (1, 100, 2, 16), (1, 100, 2, 16), grad=False)
    before = attention(q, k, v, layout)
    k[:, 40:80] += 1e3
    v[:, 40:80] -= 1e3
    after = attention(q, k, v, layout)
    unchanged = (before == after).all(-1).all(-1)[0]
    assert unchanged[:40].all() and unchanged[80:].all() and not unchanged[40:80].any()


def test_packed_gradients_stay_in_their_document():
    layout = layout_of([30, 50, 20], 3)
    q, k, v = random((1, 100, 4, 16), (1, 100, 2, 16), (1, 100, 2, 16))
    for grad in torch.autograd.grad(attention(q, k, v, layout)[:, 30:80].square().sum(), (q, k, v)):
        assert not grad[:, :30].any() and not grad[:, 80:].any() and grad[:, 30:80].any()


def test_cached_keys_continue_the_row():
    """The last 7 queries against all keys are the last 7 rows of the whole attention."""
    q, k, v = random((2, 40, 4, 16), (2, 40, 2, 16), (2, 40, 2, 16), grad=False)
    assert torch.allclose(attention(q, k, v)[:, -7:], attention(q[:, -7:], k, v), atol=1e-6)


def test_attention_refuses_what_it_cannot_mean():
    q, k, v = random((1, 10, 4, 16), (1, 12, 2, 16), (1, 12, 2, 16), grad=False)
    with pytest.raises(UserError, match="10 queries and 12 keys"):
        attention(q, k, v, layout_of([12]))
    with pytest.raises(UserError, match="12 queries and 10 keys"):
        attention(k, q, q)


# Stand-ins with the released signatures, computing with the plain twin: they test our plumbing (keywords,
# custom ops, fakes, autograd), not the kernels. Custom ops, because a loop over documents cannot be traced.
@torch.library.custom_op("golf_test::documents", mutates_args=())
def plain_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
    return kernels.attend_plain(q[None], k[None], v[None], cu, 0)[0].clone()


@plain_forward.register_fake
def _(q, k, v, cu):
    return q.new_empty(q.shape)


@torch.library.custom_op("golf_test::documents_backward", mutates_args=())
def plain_backward(
    dy: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor
) -> list[torch.Tensor]:
    """By the formula, since autograd is off inside an operator. q (N, H, D), k, v (N, K, D)."""
    (N, H, D), K = q.shape, k.shape[1]
    document = torch.searchsorted(cu.unique(), torch.arange(N), right=True)
    seen = torch.ones(N, N, dtype=torch.bool).tril() & (document[:, None] == document)
    q, dy = (x.view(N, K, H // K, D).permute(1, 2, 0, 3) for x in (q, dy))
    k, v = (x.transpose(0, 1)[:, None] for x in (k, v))
    p = (q @ k.mT * D**-0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    dp = dy @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * D**-0.5
    dq = (ds @ k).permute(2, 0, 1, 3).reshape(N, H, D)
    return [dq, *((x.sum(1).transpose(0, 1).contiguous()) for x in (ds.mT @ q, p.mT @ dy))]


@plain_backward.register_fake
def _(dy, q, k, v, cu):
    return [x.new_empty(x.shape) for x in (q, k, v)]


def keep_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


plain_forward.register_autograd(
    lambda ctx, dy: (*plain_backward(dy, *ctx.saved_tensors), None), setup_context=keep_inputs
)


def fake_fa3():
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None):
        assert causal
        return kernels.plain_rows(q, k, v)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                               seqused_q=None, seqused_k=None, softmax_scale=None, causal=False):
        assert causal and cu_seqlens_q.dtype == torch.int32
        return plain_forward(q, k, v, cu_seqlens_q)

    return SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


def fake_fa4(extra_results):
    def bounds(q, k, cu):
        (B, T), keys = q.shape[:2], k.shape[1]
        assert cu is not None or T == keys  # the stand-in serves squares and documents
        return torch.arange(B + 1, dtype=torch.int32) * T if cu is None else cu

    def _flash_attn_fwd(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
                        causal=False, return_lse=False):
        assert causal and return_lse
        flat = [x.flatten(0, -3) for x in (q, k, v)]
        rows, T, H = q.shape[:-3], q.shape[-3], q.shape[-2]
        y = plain_forward(*flat, bounds(q, k, cu_seqlens_q)).view(q.shape)
        return y, q.new_zeros(*rows, H, T).float(), *extra_results

    def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, cu_seqlens_q=None,
                        cu_seqlens_k=None):
        assert causal and out.shape == dout.shape
        grads = plain_backward(*(x.flatten(0, -3) for x in (dout, q, k, v)), bounds(q, k, cu_seqlens_q))
        return tuple(g.view(x.shape) for g, x in zip(grads, (q, k, v)))

    return SimpleNamespace(_flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)


@pytest.mark.parametrize("backend", ["fa3", "fa4 early", "fa4 now"])
@pytest.mark.parametrize("name", ["rows", "padded end"])
def test_flash_plumbing_with_stand_ins(name, backend, monkeypatch):
    module = fake_fa3() if backend == "fa3" else fake_fa4((None,) * 3 if backend == "fa4 now" else ())
    monkeypatch.setitem(kernels.FLASH, backend[:3], module)
    T, keys, lengths, padding = PROBLEMS[name]
    layout = lengths and layout_of(lengths, padding, "cpu")
    cu, longest = (layout.cu_seqlens, layout.max_seqlen) if layout else (None, keys)
    q, k, v, dy = random((1, T, 4, 16), (1, keys, 2, 16), (1, keys, 2, 16), (1, T, 4, 16), device="cpu")
    want = graded(lambda *t: reference(*t, layout), [q, k, v], dy)
    door = kernels.BACKENDS[backend[:3]]
    torch._dynamo.reset()
    for function in (door, torch.compile(door, fullgraph=True, backend="aot_eager")):
        got = graded(lambda *t: function(*t, cu, longest), [q, k, v], dy)
        assert all(gap(a, b) < 2e-6 for a, b in zip(got, want))


@pytest.mark.parametrize("name", ["cached", "padded end"])
def test_torch_varlen_traces_without_graph_breaks(name, monkeypatch):
    """No CUDA here: the forward is captured whole, the call then fails in the kernel, and only there."""
    import torch.nn.attention.varlen as varlen

    monkeypatch.setitem(kernels.FLASH, "torch", varlen)
    T, keys, lengths, padding = PROBLEMS[name]
    layout = lengths and layout_of(lengths, padding, "cpu")
    cu, longest = (layout.cu_seqlens, layout.max_seqlen) if layout else (None, keys)
    q, k, v = random((2 - bool(layout), T, 4, 16), *[(2 - bool(layout), keys, 2, 16)] * 2, device="cpu")
    captured = []
    compiled = torch.compile(
        kernels.attend_torch,
        fullgraph=True,
        dynamic=False,
        backend=lambda graph, _: captured.append(graph) or graph,
    )
    with pytest.raises(Exception, match="_flash_attention_forward|FlashAttention|CPU"):
        compiled(q, k, v, cu, longest)
    assert len(captured) == 1


def test_self_test_passes_a_right_backend_and_names_a_wrong_one(monkeypatch):
    """The stand-in passes; one that forgets the cuts between documents is caught."""
    right = fake_fa3()

    def across(q, k, v, *_, **__):
        return kernels.plain_rows(q[None], k[None], v[None])[0]

    wrong = SimpleNamespace(flash_attn_func=right.flash_attn_func, flash_attn_varlen_func=across)
    for module, verdict in ((right, ""), (wrong, "differs from the plain twin")):
        torch._dynamo.reset()
        monkeypatch.setitem(kernels.FLASH, "fa3", module)
        fault = kernels.self_test("fa3", torch.device("cpu"))
        assert fault.startswith(verdict) and bool(fault) == bool(verdict)


def test_kernels_are_tried_before_they_are_used(monkeypatch):
    """All six against their twins; one that is wrong, and one that raises, is named and done without."""
    monkeypatch.setattr(kernels, "use_triton", lambda name, wanted, sensible: False)
    right = kernels.remove_own_value

    def wrong(*inputs, kernel):
        return right(*inputs, kernel=kernel) * (1.1 if kernel else 1)

    def broken(*inputs, kernel):
        raise RuntimeError("out of resource")

    device = torch.device("cpu")
    assert kernels.kernel_faults(device) == {}
    monkeypatch.setattr(kernels, "remove_own_value", wrong)
    monkeypatch.setattr(kernels, "capped_ce", broken)
    faults = kernels.kernel_faults(device)
    assert set(faults) == {"own value", "cross-entropy", "head"}      # the head's twin is capped_ce's
    assert "differs from the plain twin by 10" in faults["own value"]
    assert faults["cross-entropy"] == "RuntimeError: out of resource"


def test_a_faulty_kernel_is_not_used(monkeypatch):
    monkeypatch.setattr(kernels, "triton", kernels.triton or object())
    monkeypatch.setitem(kernels.FAULTY, "MLP", "differs")
    assert not kernels.use_triton("MLP", None, True) and kernels.use_triton("head", None, True)
    assert kernels.use_triton("MLP", True, False)      # the caller knows better


@needs_triton
def test_no_kernel_is_faulty():
    assert kernels.kernel_faults(torch.device(DEVICE)) == {}


def test_resolve_attention_says_why():
    name, why = resolve_attention("auto", "cpu")
    assert name == "plain" and "\n" not in why
    assert all(f"not {other}: needs a CUDA GPU" in why for other in ("fa3", "fa4", "torch"))
    assert resolve_attention("plain", "cpu") == ("plain", "attention plain (forced)")
    with pytest.raises(UserError, match="ATTN_BACKEND=fa3 cannot run here.*FlashAttention 3"):
        resolve_attention("fa3", "cpu")
    with pytest.raises(UserError, match="ATTN_BACKEND=flash is unknown; choose one of auto, fa3"):
        resolve_attention("flash", "cpu")


def test_a_gpu_without_fast_attention_is_not_used_slowly(monkeypatch):
    monkeypatch.setattr(kernels, "attention_fault", lambda name, _: "" if name == "plain" else "is broken")
    monkeypatch.setattr(kernels, "is_hopper", lambda device: device.type == "cuda")
    with pytest.raises(UserError, match="no fast attention.*not fa3: is broken.*or set ATTN_BACKEND=plain"):
        resolve_attention("auto", "cuda")
    assert resolve_attention("plain", "cuda") == ("plain", "attention plain (forced)")


# -------------------------------------------------------------------------------------- on a GPU only
def document_lengths(total, longest=3072):
    """Log-normal lengths like FineWeb's (median 400, mean about 900), cut at `longest`, filling `total`."""
    draws = torch.randn(total // 100, generator=torch.Generator().manual_seed(0)).mul(1.1).add(6.0).exp()
    lengths, filled = [], 0
    for length in draws.clamp(8, longest).long().tolist():
        lengths.append(min(length, total - filled))
        filled += lengths[-1]
        if filled == total:
            return lengths


def milliseconds(function, repeats=10):
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats * 1e3


@needs_gpu
def test_attention_backends_at_training_size(monkeypatch):
    """B = 1, T = 98,304, 8 query and 4 key heads of 64, FineWeb-like documents: all that run agree."""
    T = 98304
    lengths = document_lengths(T)
    layout = layout_of(lengths, -len(lengths) % 64)
    q, k, v, dy = random((1, T, 8, 64), (1, T, 4, 64), (1, T, 4, 64), (1, T, 8, 64), dtype=torch.bfloat16)
    monkeypatch.setattr(kernels, "ATTENTION", "plain")
    want = graded(lambda *t: attention(*t, layout), [q, k, v], dy)
    for name in kernels.BACKENDS:
        fault = kernels.attention_fault(name, torch.device(DEVICE))
        if fault:
            print(f"{name:6} not here: {fault}")
            continue
        monkeypatch.setattr(kernels, "ATTENTION", name)
        got = graded(lambda *t: attention(*t, layout), [q, k, v], dy)
        errors = [gap(a, b) for a, b in zip(got, want)]
        took = milliseconds(
            lambda: graded(lambda *t: attention(*t, layout), [q, k, v], dy), 3 if name == "plain" else 10
        )
        shown = " ".join(f"{error:.4f}" for error in errors)
        print(f"{name:6} {took:8.2f} ms forward + backward, errors y dq dk dv {shown}")
        assert max(errors) < 0.02


@needs_gpu
@needs_triton
def test_kernels_at_training_size(monkeypatch):
    """The shapes of a micro-batch: 98,304 tokens, 512 wide, 4x MLP, 8,192 tokens of vocabulary."""
    x, up, down, dy = random((98304, 512), (2048, 512), (512, 2048), (98304, 512), dtype=torch.bfloat16)
    weights = [(w.detach() * 512**-0.5).requires_grad_() for w in (up, down)]
    logits, targets, dloss = ce_problem(98304, 8192, torch.bfloat16, scale=4.0)

    def mlp(*t, kernel=True):
        return leaky_square_mlp(*t, 0.5, kernel=kernel)

    def ce(t, kernel=True):
        return capped_ce(t, targets, 30.0, kernel=kernel)

    for call, leaves, cotangent, bound in ((mlp, [x, *weights], dy, 0.012), (ce, [logits], dloss, 0.004)):
        twin = torch.compile(partial(call, kernel=False))
        got, want = graded(call, leaves, cotangent), graded(twin, leaves, cotangent)
        errors = [gap(a, b) for a, b in zip(got, want)]
        fused, plain = (milliseconds(lambda: graded(f, leaves, cotangent)) for f in (call, twin))
        print(f"{call.__name__}: Triton {fused:.2f} ms, compiled twin {plain:.2f} ms, errors {errors}")
        assert max(errors) < bound
    for BM, BN, num_stages in ((128, 256, 3), (128, 256, 4), (256, 128, 3), (128, 128, 3), (128, 128, 4)):
        tile = dict(kernels.PRODUCT_TILE, BM=BM, BN=BN, num_stages=num_stages)
        monkeypatch.setattr(kernels, "PRODUCT_TILE", tile)
        print(f"{tile}: {milliseconds(lambda: graded(mlp, [x, *weights], dy)):.2f} ms")
