"""What every test needs: a device for kernels, torchvision importable (before any imports it plainly), seed, cache.

Without a GPU Triton's interpreter runs the kernels, on CPU tensors: a kernel's test has the same body on either.
"""

import os
from pathlib import Path

import pytest
import torch

os.environ.pop("COLUMNS", None)  # pytest-xdist's, in which every console would stay as narrow
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported

import hypothesis
from hypothesis.internal.conjecture import providers
from import_torchvision import torchvision as torchvision

# The same examples in each run; ``pytest --hypothesis-profile=default`` looks for others.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")
if hasattr(providers, "_get_local_constants"):  # numbers in imported modules would be, too
    providers._get_local_constants = lambda: providers._local_constants


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """PyTorch's cache directory, for measurements and checkpoints: the user's own is never written or read."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch"


@pytest.fixture
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in fp32 as they are written: PyTorch's default lets a GPU round their inputs to TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if item.get_closest_marker("interpreter") and torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
