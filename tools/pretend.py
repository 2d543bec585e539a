"""A CPU build of PyTorch that believes in one H100, so that torch.compile can be followed to its last line.

What dynamo, AOTAutograd and Inductor's Triton back end ask of a GPU is little: that it is there, its sizes, a
stream. A small C++ library answers inside PyTorch (it is loaded ahead of torch, which looks for CUDA's hooks
once), functions put in the place of torch.cuda's answer in Python, and a stand-in has the operators of
FlashAttention-3. Nothing can run: every tensor has to be fake.

    torch = pretend.begin()      # in a process that has not imported torch
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

from tools.common import ToolError

TORCH = "2.13"  # whose inner parts are put in place of here, and read in tools/account.py
TRITON = "pip install triton==3.7.1"  # with which it was tried; a CPU build does not bring one
CPU_BUILD = f"install PyTorch {TORCH}.0 built for CPUs"

LIBRARY = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device;
using c10::DeviceType;
using c10::Stream;

static Device the_gpu() { return Device(DeviceType::CUDA, 0); }
static Stream the_stream() { return Stream(Stream::DEFAULT, the_gpu()); }

// The base class answers with device -1, which torch takes for "none".
struct OneDevice : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return the_gpu(); }
  Device exchangeDevice(Device) const override { return the_gpu(); }
  Stream getStream(Device) const noexcept override { return the_stream(); }
  Stream getDefaultStream(Device) const override { return the_stream(); }
  Stream exchangeStream(Stream) const noexcept override { return the_stream(); }
};
static c10::impl::DeviceGuardImplRegistrar registered(DeviceType::CUDA, new OneDevice());

namespace at {
struct PretendedHooks : CUDAHooksInterface {
  explicit PretendedHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
using CUDAHooks = PretendedHooks;  // the name under which torch looks for them
REGISTER_CUDA_HOOKS(CUDAHooks)
}
"""

H100 = dict(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=80 << 30,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
    is_integrated=False,
)
GIGABYTES_PER_S, TERAFLOPS = 3350.0, 989.0  # of its data sheet: memory; dense bf16


def installed_torch() -> tuple[str, Path]:
    """(version, folder) of the torch that an import would find; it is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        raise ToolError(f"PyTorch is missing: {CPU_BUILD}")
    return importlib.metadata.version("torch"), Path(spec.origin).parent


def check_machine(version: str, folder: Path) -> None:
    """ToolError where this torch, or what else is installed, cannot pretend."""
    if not version.startswith(TORCH + "."):
        raise ToolError(f"torch {version} has another Inductor than {TORCH}, which this tool looks into: "
                        f"in an environment of its own, {CPU_BUILD}")
    libraries = [p.name for p in (folder / "lib").glob("libtorch_*")]
    if any(name.startswith(("libtorch_cuda", "libtorch_hip")) for name in libraries):
        raise ToolError(f"torch {version} is a GPU build, whose own hooks are in the way: in an environment "
                        f"of its own, {CPU_BUILD}")
    if shutil.which("g++") is None:
        raise ToolError("g++ is not on the PATH; it compiles the pretended device: apt-get install g++")
    if importlib.util.find_spec("triton") is None:
        raise ToolError(f"Triton is missing, for which Inductor writes its kernels: {TRITON}")


def begin():
    """Pretend from here on; returns torch. ToolError where that cannot be."""
    if "torch" in sys.modules:
        raise ToolError("torch is imported already, and the pretended GPU has to come first: start "
                        "python tools/account.py as a program of its own")
    version, folder = installed_torch()
    check_machine(version, folder)
    scratch = tempfile.mkdtemp(prefix="account-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    os.environ.update(
        TORCHINDUCTOR_CACHE_DIR=f"{scratch}/inductor",
        TRITON_CACHE_DIR=f"{scratch}/triton",
        TORCHINDUCTOR_COMPILE_THREADS="1",
    )
    os.environ.pop("TRITON_INTERPRET", None)  # a setting of tests: kernels would not be kernels
    ctypes.CDLL(str(library(folder)))
    import torch

    answer_for_the_gpu(torch)
    settle_inductor(torch)
    stand_in_for_flash_attention(torch)
    return torch


def library(torch_folder: Path) -> Path:
    """The compiled LIBRARY, kept between runs of one text and one torch."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(f"{LIBRARY}{torch_folder}{TORCH}".encode()).hexdigest()[:16]
    kept = home / "parameter-golf" / f"pretended-{key}.so"
    if kept.exists():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        source, made = Path(folder, "pretended.cpp"), Path(folder, "pretended.so")
        source.write_text(LIBRARY)
        libraries = f"{torch_folder}/lib"
        command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", str(source), "-o", str(made)]
        command += [f"-I{torch_folder}/include", f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
        command += ["-lc10", "-ltorch_cpu"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or "no message").splitlines()[0][:160]
            raise ToolError(f"g++ could not compile the pretended device ({said}): it needs a g++ that knows "
                            "C++20 and PyTorch's headers")
        os.replace(made, kept)
    return kept


# --- what Python asks


def answer_for_the_gpu(torch) -> None:
    """Presence, sizes, stream and random state of one H100."""
    import triton

    card = SimpleNamespace(**H100)
    answers = dict(
        is_available=True,
        device_count=1,
        current_device=0,
        set_device=None,
        synchronize=None,
        get_device_properties=card,
        get_device_capability=(card.major, card.minor),
        get_device_name=card.name,
        is_bf16_supported=True,
        get_rng_state=torch.zeros(16, dtype=torch.uint8),
        set_rng_state=None,
        _lazy_init=None,
        _exchange_device=0,
        _maybe_exchange_device=0,
    )
    for name, value in answers.items():
        setattr(torch.cuda, name, answering(value))
    torch.version.cuda = "12.8"
    torch.accelerator.is_available = answering(False)  # True makes dynamo ask for a current stream
    torch._subclasses.fake_tensor.init_gpu_context = answering(None)  # it would allocate on the GPU
    device = torch.device("cuda", 0)
    driver = SimpleNamespace(
        get_current_target=answering(triton.backends.compiler.GPUTarget("cuda", 90, 32)),
        get_current_device=answering(0),
        get_active_torch_device=answering(device),
        get_device_interface=answering(torch.cuda),
    )
    triton.runtime.driver.set_active(driver)


def answering(value):
    """A function that always returns `value`; each is one of its own, as dynamo tells functions apart by
    identity."""

    def answer(*_, **__):
        return value

    return answer


def settle_inductor(torch) -> None:
    """Settings without which Inductor would time something, or compute on the device."""
    import torch._inductor.fx_passes.fuse_attention as patterns
    import torch._inductor.utils

    patterns._sfdp_init = answering(None)  # its patterns are traced through CUDA's attention
    torch._inductor.utils.get_gpu_dram_gbps = answering(GIGABYTES_PER_S)
    torch._inductor.utils.get_device_tflops = answering(TERAFLOPS)
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False
    torch._functorch.config.force_non_lazy_backward_lowering = True  # with the forward, not when it is run
    fold_constants_on_cpu(torch)


def fold_constants_on_cpu(torch) -> None:
    """Inductor finds tensors of one value by computing one entry of each, on the device: the CPU does it
    here."""
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
    from torch.utils._python_dispatch import TorchDispatchMode

    fold = UniformValueConstantFolder.run

    class OnCpu(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            if kwargs.get("device") is not None:
                kwargs["device"] = torch.device("cpu")
            return op(*args, **kwargs)

    def run(folder):
        with OnCpu():
            return fold(folder)

    UniformValueConstantFolder.run = run


# --- FlashAttention-3


def stand_in_for_flash_attention(torch) -> None:
    """The module flash_attn_interface: FlashAttention-3's two operators as torch.compile sees them."""
    forward, backward = flash_operators(torch)

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, cu_seqlens, longest):
            out, lse = forward(q, k, v, cu_seqlens, longest)
            ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
            ctx.longest = longest
            return out

        @staticmethod
        def backward(ctx, dout):
            q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
            grads = [torch.empty_like(x) for x in (q, k, v)]
            backward(dout, q, k, v, out, lse, cu_seqlens, ctx.longest, *grads)
            return *grads, None, None

    def flash_attn_func(q, k, v, causal=False):
        return Attention.apply(q, k, v, None, k.shape[1])

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False):
        return Attention.apply(q, k, v, cu_seqlens_q, max_seqlen_k)

    module = ModuleType("flash_attn_interface")
    module.flash_attn_func = flash_attn_func
    module.flash_attn_varlen_func = flash_attn_varlen_func
    sys.modules["flash_attn_interface"] = module


def flash_operators(torch) -> tuple:
    """(forward, backward). Rows (…, H, Dh) of q and the same of k, v with fewer heads; the forward returns
    (out like q, log-sum-exp (H, tokens) float32), the backward writes dq, dk, dv."""
    Tensor = torch.Tensor

    def forward(q, k, v, cu_seqlens, longest):
        heads, width = q.shape[-2:]
        lse = q.new_empty((heads, q.numel() // (heads * width)), dtype=torch.float32)
        return torch.empty_like(q, memory_format=torch.contiguous_format), lse

    def backward(dout, q, k, v, out, lse, cu_seqlens, longest, dq, dk, dv):
        return torch.empty_like(lse)

    # set, not written above: as texts, which `from __future__` makes of them, they would not be resolved
    several = dict(q=Tensor, k=Tensor, v=Tensor, cu_seqlens=Tensor | None, longest=int)
    forward.__annotations__.update(several, **{"return": tuple[Tensor, Tensor]})
    gradients = dict.fromkeys(("dout", "out", "lse", "dq", "dk", "dv", "return"), Tensor)
    backward.__annotations__.update(several, **gradients)
    made = []
    for function, written in ((forward, ()), (backward, ("dq", "dk", "dv"))):
        name = f"flash_attn_3::_flash_attn_{function.__name__}"
        operator = torch.library.custom_op(name, function, mutates_args=written)
        operator.register_fake(function)
        made.append(operator)
    return tuple(made)
