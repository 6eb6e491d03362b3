"""What every test needs: torchvision importable (before any test imports it plainly), one seed."""

import pytest
import torch
from import_torchvision import torchvision as torchvision


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
