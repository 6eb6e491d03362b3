"""Which implementation runs where, and the reasons given."""

import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fastdeeplab.kernels import choice, library, reference

from fastdeeplab import kernels

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _forget_reasons() -> Iterator[None]:
    choice.why_not.cache_clear()
    yield
    choice.why_not.cache_clear()


@pytest.fixture
def _capable_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")


@pytest.mark.usefixtures("_capable_gpu")
def test_auto_takes_the_kernel_on_a_gpu_and_pytorch_on_a_cpu() -> None:
    assert choice.choose("upsample_argmax", "auto", GPU, torch.bfloat16).impl == "triton"
    assert choice.choose("upsample_argmax", "torch", GPU, torch.bfloat16) == ("torch", "as asked for")
    assert choice.choose("upsample_argmax", "auto", CPU, torch.float32).impl == "torch"


@pytest.mark.usefixtures("_capable_gpu")
@pytest.mark.parametrize("name", choice.CONVOLUTIONS)
def test_a_convolutions_shape_decides_on_a_gpu(name: str) -> None:
    assert choice.choose(name, "auto", GPU, torch.bfloat16).impl == "auto"
    assert "by each layer's shape" in choice.choose(name, "auto", GPU, torch.bfloat16).why
    assert choice.choose(name, "triton", GPU, torch.bfloat16) == ("triton", "as asked for")
    assert choice.choose(name, "auto", CPU, torch.float32).impl == "torch"


@pytest.mark.usefixtures("_capable_gpu")
def test_kernel_sizes() -> None:
    assert choice.why_not_kernel_size((3, 3)) is choice.why_not_kernel_size(torch.Size((1, 1))) is None
    for size in ((7, 7), (1, 3), (2, 2)):
        obstacle = choice.why_not_kernel_size(size)
        assert choice.choose("conv_bn_relu", "auto", GPU, torch.float16, obstacle) == ("torch", obstacle)
        refused = choice.choose("conv_bn_relu", "triton", GPU, torch.float16, obstacle)
        assert refused == ("nothing", f"conv_bn_relu can't run as a Triton kernel here: {obstacle}")


# With torch 2.11 (with 2.13 it does) what is set for all of cuDNN or of PyTorch does not reach the convolutions' own
# setting, which is TF32.
FROM_ABOVE = "ieee" if torch.torch_version.TorchVersion(torch.__version__) >= (2, 13) else "tf32"


@pytest.mark.parametrize(
    ("setting", "precision"),
    [
        ("", "tf32"),
        ("cudnn.allow_tf32 = False", "ieee"),
        ("cudnn.allow_tf32 = True", "tf32"),
        ("fp32_precision = 'ieee'", FROM_ABOVE),
        ("cudnn.fp32_precision = 'ieee'", FROM_ABOVE),
        ("cudnn.conv.fp32_precision = 'ieee'", "ieee"),
        ("cudnn.conv.fp32_precision = 'none'", "ieee"),
        ("cudnn.conv.fp32_precision = 'none'; torch.backends.fp32_precision = 'tf32'", "tf32"),
        ("cuda.matmul.fp32_precision = 'tf32'; torch.backends.cudnn.conv.fp32_precision = 'ieee'", "ieee"),
    ],
)
def test_fp32_convolutions_are_as_precise_as_pytorchs(setting: str, precision: str) -> None:
    """In a process of its own for each setting. Where there is a GPU, PyTorch's own convolution bears it out."""
    program = f"""
import torch
import torch.nn.functional as F
from fastdeeplab.kernels.choice import convolution_precision
{f"torch.backends.{setting}" if setting else ""}
print(convolution_precision(torch.device("cuda", 0)), convolution_precision(torch.device("cpu")))
if torch.cuda.is_available():
    x, weight = torch.randn(1, 64, 32, 32, device="cuda"), torch.randn(64, 64, 3, 3, device="cuda")
    exact = F.conv2d(x.double(), weight.double())
    print("ieee" if (F.conv2d(x, weight) - exact).norm() < 1e-5 * exact.norm() else "tf32")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    ours, on_a_cpu, *pytorchs = run.stdout.split()
    assert (ours, on_a_cpu) == (precision, "ieee")
    if torch.cuda.is_available():  # where TF32 is allowed, cuDNN may take an algorithm without it
        assert pytorchs in ([precision], ["ieee"])


def test_fault_18_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choice.choose("upsample_argmax", "auto", CPU, torch.float32) == ("torch", "the tensors are on a CPU")
    with pytest.raises(
        RuntimeError, match="upsample_argmax can't run as a Triton kernel here: the tensors are on a CPU"
    ):
        kernels.upsample_argmax(torch.zeros(1, 2, 3, 3), (6, 6), impl="triton")


@pytest.mark.usefixtures("_capable_gpu")
def test_fault_18_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choice.why_not(GPU, torch.float16) == "Some GPU has compute capability 7.5, the kernels need 8.0"
    choice_made = choice.choose("upsample_argmax", "triton", GPU, torch.float16)
    assert choice_made.impl == "nothing"
    assert "compute capability 7.5" in choice_made.why


@pytest.mark.usefixtures("_capable_gpu")
def test_fault_18_no_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: name if name == "/opt/bin/cc" else None)
    monkeypatch.delenv("CC", raising=False)
    assert "finds no gcc or clang" in str(choice.why_not(GPU, torch.float16))
    monkeypatch.setenv("CC", "/opt/bin/cc")
    choice.why_not.cache_clear()
    assert choice.why_not(GPU, torch.float16) is None
    monkeypatch.setenv("CC", "/no/such/cc")
    choice.why_not.cache_clear()
    assert "finds no /no/such/cc" in str(choice.why_not(GPU, torch.float16))


@pytest.mark.usefixtures("_capable_gpu")
def test_fault_18_cache_directory_can_not_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/nowhere/triton")
    assert "TRITON_CACHE_DIR" in str(choice.why_not(GPU, torch.float16))


@pytest.mark.usefixtures("_capable_gpu")
def test_fault_18_cache_directory_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: Path("/dev/full").open("wb", buffering=0))  # noqa: SIM115
    assert "No space left on device" in str(choice.why_not(GPU, torch.float16))


def test_fault_18_triton_missing() -> None:
    """Everything imports and PyTorch's path runs, in a process where ``import triton`` fails."""
    program = """
import sys
import tempfile
sys.modules["triton"] = None
import torch, fastdeeplab as fdl
from fastdeeplab import kernels
from fastdeeplab.kernels import choice
logits = torch.randn(1, 5, 4, 4, requires_grad=True)
kernels.upsample_cross_entropy(logits, torch.zeros(1, 8, 8, dtype=torch.uint8)).backward()
torch.ops.fastdeeplab.upsample_argmax(logits.detach(), (8, 8), torch.uint8, "triton")
print(choice.choose("upsample_argmax", "auto", logits.device, logits.dtype), kernels.upsample_argmax(logits, (8, 8)))
weights = [torch.randn(2, 5, size, size) for size in (1, 3)]
branches = kernels.aspp_branches(logits.detach(), weights, None, torch.zeros(4), rates=(2,))
kernels.aspp_projection(branches, torch.zeros(1, 2, 1, 1), torch.zeros(3, 6, 1, 1), None, torch.zeros(3))
torch.ops.fastdeeplab.conv_bn_relu(logits.detach(), weights[1], None, torch.zeros(2), None, 1, 1, 1, True, "triton")
try:
    kernels.upsample_argmax(logits, (8, 8), impl="triton")
except RuntimeError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Triton is not installed") == 2


@pytest.mark.usefixtures("_capable_gpu")
@pytest.mark.parametrize("device", [CPU, GPU])
def test_dtypes_without_a_kernel(device: torch.device) -> None:
    assert "float64 is not one of" in str(choice.why_not(device, torch.float64))


def test_bf16_is_wrong_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreter" in str(choice.why_not(CPU, torch.bfloat16))
    assert choice.why_not(CPU, torch.float16) is None


def test_other_devices() -> None:
    assert "mps" in str(choice.why_not(torch.device("mps"), torch.float16))


@pytest.mark.usefixtures("_capable_gpu")
def test_environment_turns_every_kernel_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDEEPLAB_KERNELS", "torch")
    for impl in ("auto", "triton", "torch"):
        assert choice.choose("upsample_argmax", impl, GPU, torch.float16) == ("torch", "FASTDEEPLAB_KERNELS=torch")
    monkeypatch.setenv("FASTDEEPLAB_KERNELS", "off")
    with pytest.raises(ValueError, match='must be "torch" or unset'):
        choice.choose("upsample_argmax", "auto", GPU, torch.float16)


def test_a_wrong_implementation_is_a_value_error() -> None:
    with pytest.raises(ValueError, match='"auto", "triton" or "torch"'):
        kernels.upsample_argmax(torch.zeros(1, 2, 3, 3), (6, 6), impl="cuda")


@pytest.mark.parametrize("name", kernels.FUNCTIONS)
def test_every_form_of_a_function_has_one_signature(name: str) -> None:
    public = inspect.signature(getattr(kernels, name))
    assert public.parameters["impl"].default == "auto"
    without_impl = [parameter for parameter in public.parameters.values() if parameter.name != "impl"]
    for form in (reference, library):
        assert list(inspect.signature(getattr(form, name)).parameters.values()) == without_impl
    assert hasattr(torch.ops.fastdeeplab, name)


def test_only_verification_imports_the_reference() -> None:
    program = "import sys, fastdeeplab, fastdeeplab.kernels; print('fastdeeplab.kernels.reference' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
    assert importlib.util.find_spec("fastdeeplab.kernels.reference") is not None
