"""The wheel, and what the README promises."""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from networks import small_model
from PIL import Image

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files beside the sources
    for name in ("fastdeeplab", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
            *("--wheel-dir", folder, source),
        ],
        check=True,
    )
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "fastdeeplab").rglob("*.py")}
    expected |= {f"fastdeeplab/{path.name}" for path in (ROOT / "fastdeeplab").glob("*.safetensors")}
    expected |= {f"fastdeeplab/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.*")}
    assert names == expected
    assert "fastdeeplab/data/__init__.py" in names


def test_the_installed_wheel_segments_a_picture(wheel: Path, tmp_path: Path) -> None:
    """In a new environment that holds the wheel; its dependencies are those of this one, reached by a path file."""
    venv.create(tmp_path / "venv", with_pip=False)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    python = tmp_path / "venv/bin/python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel],
        check=True,
    )

    def run(*command: object) -> str:
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    where = run(python, "-c", "import fastdeeplab.kernels as k; print(k.__file__)")
    assert Path(where.strip()).is_relative_to(site)

    program = tmp_path / "venv/bin/fastdeeplab"
    assert "torch" in run(program, "info")
    small_model().save(tmp_path / "small.safetensors")
    Image.effect_noise((40, 30), 50).convert("RGB").save(tmp_path / "noise.jpg")
    run(program, "segment", "noise.jpg", "--out", "masks", "--weights", "small.safetensors", "--resize", "64")
    with Image.open(tmp_path / "masks/noise.png") as mask:
        assert mask.size == (40, 30)
        assert mask.mode == "P"


def test_ci_runs_what_the_readme_prints() -> None:
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
    printed = set(re.findall(r"^\$ (make \w+)", readme, re.MULTILINE))
    assert printed == {"make demo", "make test"}
    assert "make test" in ci.splitlines()
    assert "make lint" in ci.splitlines()


def test_constraints_pin_every_dependency() -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in constraints.splitlines() if "==" in line}
    project = (ROOT / "pyproject.toml").read_text().split("[project.scripts]")[0].split("dependencies = [", 1)[1]
    wanted = set(re.findall(r'"([a-z][a-z0-9-]*)[^"\[]*"', project))
    assert wanted
    assert wanted <= pinned
    assert "torch==2.13.0" in constraints.splitlines()


def test_every_fault_of_the_table_has_its_tests() -> None:
    """Each row names the files that hold tests of its fault, and no file with such a test is left out."""
    rows = [line.split("|") for line in (ROOT / "tests/FAULTS.md").read_text().splitlines() if line.startswith("| ")]
    listed = {int(row[1]): set(re.findall(r"`(test_\w+\.py)`", row[4])) for row in rows if row[1].strip().isdigit()}
    found: dict[int, set[str]] = {}
    for path in (ROOT / "tests").glob("test_*.py"):
        for number in re.findall(r"def test_fault_(\d+)_", path.read_text()):
            found.setdefault(int(number), set()).add(path.name)
    assert listed == found
