"""The project as installed: floors, the wheel, and what `import fewstep` costs."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
WHAT_THE_ZOO_HOLDS = ("model.safetensors", "config.json", "merges.txt", "card.md", "card.jinja")
HEAVY = {"torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "torchvision", "matplotlib"}


def requirements(*extras: str) -> list[Requirement]:
    lines = PROJECT["dependencies"] + [line for extra in extras for line in EXTRAS[extra]]
    return [r for line in lines if (r := Requirement(line)).name != "fewstep"]


@pytest.mark.parametrize("requirement", requirements("dev", "report", "tb"), ids=lambda r: r.name)
def test_the_floor_is_met_here(requirement):
    assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)


@pytest.mark.parametrize("requirement", requirements(*EXTRAS), ids=lambda r: r.name)
def test_there_is_a_floor_and_no_ceiling(requirement):
    assert [s.operator for s in requirement.specifier] == [">="]


def test_the_extras_are_those_of_the_readme():
    assert EXTRAS.keys() == {"xformers", "bnb", "data", "report", "tb", "wandb", "dev"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what the wheel is built from, with one more zoo teacher of every kind of file."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "fewstep", tree / "fewstep", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    (tree / "README.md").touch()
    for folder in ("tests", "eval", "samplers", "configs"):
        (tree / folder).mkdir()
        (tree / folder / "__init__.py").touch()
    for name in WHAT_THE_ZOO_HOLDS:
        file = tree / "fewstep/zoo/new-teacher/unet" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    return tree


@pytest.fixture(scope="module")
def wheel(tree) -> zipfile.ZipFile:
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    done = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return zipfile.ZipFile(next(tree.glob("fewstep-*.whl")))


def test_fewstep_is_the_only_import_name_in_the_wheel(wheel):
    assert {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name} == {"fewstep"}


def test_every_file_of_the_package_is_in_the_wheel(tree, wheel):
    expected = {str(f.relative_to(tree)) for f in (tree / "fewstep").rglob("*") if f.is_file()}
    missing = expected - set(wheel.namelist())
    assert not missing, f"a folder without __init__.py, or a kind of file that package-data leaves out: {sorted(missing)}"


def test_the_wheel_carries_the_licence_and_the_command(wheel):
    entry_points = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "fewstep = fewstep.cli:main" in wheel.read(entry_points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


@pytest.mark.parametrize(
    "module", [m for m in ("fewstep", "fewstep.cli") if m == "fewstep" or (ROOT / "fewstep/cli.py").exists()]
)
def test_importing_it_loads_nothing_heavy(module):
    script = f"import sys, {module}; print(*sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_an_unknown_name_is_an_attribute_error():
    import fewstep

    with pytest.raises(AttributeError, match="no attribute 'destil'"):
        _ = fewstep.destil
    assert {"distill", "Run", "load_teacher"} <= set(dir(fewstep))
