"""The order of the house: imports run one way, optional packages are imported where they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = {"torch", "triton", "numpy"}
LARGE = {"torchvision", "torchmetrics", "kornia", "tensorboard", "matplotlib"}


def imports(path: Path, module_level_only: bool = False) -> set[str]:
    """Modules that a file imports, relative imports with their dots."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if module_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {base} if node.module else {base + alias.name for alias in node.names}
    return found


def top_level(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names if not name.startswith(".")}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_kernels_know_nothing_of_the_model(path: Path) -> None:
    assert top_level(imports(path)) - set(sys.stdlib_module_names) <= CORE


@pytest.mark.parametrize(
    ("stem", "shared"),
    [
        ("argmax", {".tiles"}),
        ("cross_entropy", {".tiles"}),
        ("cross_entropy_backward", {".tiles"}),
        ("conv", {".candidates", ".cuts", ".splits"}),
        ("conv_tma", {".candidates", ".cuts", ".splits"}),
    ],
)
def test_kernel_files_do_not_import_each_other(stem: str, shared: set[str]) -> None:
    relative = {name for name in imports(ROOT / "kernels" / f"{stem}.py") if name.startswith(".")}
    assert relative <= {".checks", *shared}


@pytest.mark.parametrize(
    "path", [*(ROOT / "kernels").glob("*.py"), *(ROOT / "fastdeeplab").rglob("*.py")], ids=lambda path: path.name
)
def test_nothing_that_ships_imports_the_reference_but_the_verification(path: Path) -> None:
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in nodes for alias in node.names} | imports(path)
    verifies = path.parent.name == "verification" and path.name in ("tail.py", "convolutions.py")
    assert any(name.endswith("reference") for name in names) == verifies


@pytest.mark.parametrize("path", sorted((ROOT / "fastdeeplab").rglob("*.py")), ids=lambda path: path.name)
def test_the_package_knows_nothing_of_tests_and_benchmarks(path: Path) -> None:
    """Nor of torchvision, but where a function compares with it; large packages are imported where they are used."""
    assert not top_level(imports(path)) & {"tests", "benchmarks", "kernels"}
    assert not top_level(imports(path, module_level_only=True)) & LARGE


@pytest.mark.parametrize(("room", "whole"), [("speed", "bench"), ("training", "train"), ("verification", "verify")])
def test_parts_do_not_import_what_puts_them_together(room: str, whole: str) -> None:
    files = list((ROOT / "fastdeeplab" / room).glob("*.py"))
    assert len(files) > 1
    for path in files:
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        names = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names} | imports(path)
        assert not any(f"{name}.".startswith(f"fastdeeplab.{whole}.") for name in names), path


def test_import_is_light() -> None:
    """No optional package, no CUDA context, no test package is loaded by ``import fastdeeplab``."""
    program = """
import sys
import torch
before = set(sys.modules)
import fastdeeplab
optional = {"PIL", "typer", "rich", "safetensors", "torchvision", "skimage", "triton", "pytest", "matplotlib"}
optional |= {"kornia", "tensorboard", "tomli_w", "torchmetrics"}
print(sorted({name.split(".")[0] for name in set(sys.modules) - before} & optional), torch.cuda.is_initialized())
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[] False"
