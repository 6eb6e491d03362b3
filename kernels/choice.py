"""Which implementation of a function runs, the Triton kernel or PyTorch, and why."""

import functools
import importlib.util
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

MIN_CAPABILITY = (8, 0)  # Ampere: bf16 and cp.async
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


CONVOLUTIONS = ("conv_bn_relu", "aspp_branches", "aspp_projection")


class Choice(NamedTuple):
    impl: str  # "triton", "torch", "auto" if each layer's shape decides, or "nothing" if what was asked for can't run
    why: str


def choose(function: str, impl: str, device: torch.device, dtype: torch.dtype, obstacle: str | None = None) -> Choice:
    """Choose how ``function`` runs on tensors of this device and dtype when ``impl`` is asked for.

    ``obstacle`` is one that the arguments' shapes make. Where a layer's shape decides, ``decisions.decide`` does it
    when the operator runs. Compiled code keeps the choice that was made here while it was traced.
    """
    if kernels_are_off():
        return Choice("torch", "FASTDEEPLAB_KERNELS=torch")
    if impl == "torch":
        return Choice("torch", "as asked for")
    obstacle = why_not(device, dtype) or obstacle
    if impl == "triton":
        if obstacle:
            return Choice("nothing", f"{function} can't run as a Triton kernel here: {obstacle}")
        return Choice("triton", "as asked for")
    if obstacle:
        return Choice("torch", obstacle)
    if device.type == "cpu":
        return Choice("torch", "the interpreter is for tests")
    if function in CONVOLUTIONS:
        return Choice("auto", "by each layer's shape: what was measured to be faster, else what is predicted to be")
    return Choice("triton", "predicted: it never writes the full-size logits")


# What torch.compiler.assume_constant_result does, without importing the compiler, which takes seconds.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def kernels_are_off() -> bool:
    """Whether the user has turned every kernel off, for debugging."""
    value = os.environ.get("FASTDEEPLAB_KERNELS", "")
    if value not in ("", "torch"):
        raise ValueError(f'the environment variable FASTDEEPLAB_KERNELS must be "torch" or unset, got {value!r}')
    return value == "torch"


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels can't run on tensors of this device and dtype; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if dtype not in DTYPES:
        return f"{str(dtype).removeprefix('torch.')} is not one of float32, float16, bfloat16"
    if interpreting() and dtype == torch.bfloat16:
        return "Triton's interpreter gets bfloat16 wrong"
    if device.type == "cpu":
        return None if interpreting() else "the tensors are on a CPU"
    if device.type != "cuda":
        return f"the tensors are on {device.type}, the kernels are for NVIDIA GPUs"
    if torch.version.hip:
        return "this PyTorch is built for ROCm, the kernels are for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
    return _why_triton_can_not_compile()


def why_not_kernel_size(size: Sequence[int]) -> str | None:
    """Why the convolutions' kernels can't run a weight with this (kH, kW); None if they can."""
    return None if tuple(size) in ((1, 1), (3, 3)) else "the weight is neither 1x1 nor 3x3"


def convolution_precision(device: torch.device) -> str:
    """How fp32 convolutions multiply: ``"tf32"`` or ``"ieee"``, as PyTorch's own do.

    ``torch.backends.cudnn.conv.fp32_precision`` says so whether the setting was made there, by the legacy
    ``allow_tf32`` (reading that raises once the newer settings were used) or, where PyTorch's version lets these reach
    the convolutions, for all of cuDNN or of PyTorch. Those use TF32 where it is ``"tf32"`` alone: ``"none"``, nothing
    set anywhere, is IEEE arithmetic.
    """
    tf32 = device.type == "cuda" and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if tf32 else "ieee"


def _why_triton_can_not_compile() -> str | None:
    """Triton builds its launchers with a C compiler, and writes what it compiled to a cache directory."""
    from triton import knobs

    compilers = [knobs.build.cc] if knobs.build.cc else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"Triton needs a C compiler and finds no {' or '.join(compilers)}: install one, or name it in CC"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Triton needs Python's headers and finds no Python.h: install python3-dev"
    cache = Path(knobs.cache.dir)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache) as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        return f"Triton can't write its cache directory {cache} ({error.strerror}): name another in TRITON_CACHE_DIR"
    return None
