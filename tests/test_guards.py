"""Promises about the code itself: layers, start-up, help, generated text, what the wheel holds."""

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import click
import pytest
from hatchling.builders.wheel import WheelBuilder

from mill_jobs.cli import mill
from mill_jobs.config import RunConfig
from mill_jobs.reference import END, START, reference
from mill_shared.config import Section

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def imported(code: str) -> set[str]:
    program = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    return set(json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout))


def test_layers_hold() -> None:
    linter = Path(sys.executable).parent / "lint-imports"
    found = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    "module",
    [
        "mill_jobs.finalize",
        "mill_jobs.recipes.cotpl.finalize",
        "mill_jobs.recipes.vlplm.finalize",
        "mill_jobs.verify",
        "mill_jobs.evaluate",
    ],
)
def test_nothing_after_labelling_imports_torch(module: str) -> None:
    assert not {"torch", "transformers", "segment_anything"} & imported(f"import {module}")


def test_help_needs_neither_torch_nor_numpy() -> None:
    code = "from click.testing import CliRunner\nfrom mill_jobs.cli import mill\nCliRunner().invoke(mill, ['--help'])"
    assert not {"torch", "numpy", "pyarrow", "pydantic", "boto3"} & imported(code)


@pytest.mark.parametrize("name", sorted(mill.commands))
def test_every_command_has_help_and_is_in_the_readme(name: str) -> None:
    command = mill.commands[name]
    assert command.help
    assert f"`mill {name}" in README
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            assert parameter.help or parameter.name in ("folder", "workers"), f"{name} {parameter.name}"


def sections(section: type[Section]) -> set[type[Section]]:
    found = {section}
    for kind in Section.__subclasses__():
        found |= {kind, *kind.__subclasses__()}
    return found


SECTIONS = sorted(sections(RunConfig), key=lambda section: section.__name__)


@pytest.mark.parametrize("section", SECTIONS, ids=[section.__name__ for section in SECTIONS])
def test_every_config_field_says_what_it_is(section: type[Section]) -> None:
    assert [name for name, field in section.model_fields.items() if not field.description] == []


def test_the_config_reference_is_fresh() -> None:
    shown = README.partition(START)[2].partition(END)[0].strip()
    assert shown == reference(), "run `make docs`"


def test_every_make_target_is_listed_by_help() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony
    listed = set(re.findall(r"^([a-z0-9-]+):.*## ", makefile, re.MULTILINE))
    assert set(phony[1].split()) == listed


def test_the_wheel_holds_the_packages_whole_and_nothing_else(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = [ROOT / package for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
    files = {
        path.relative_to(package.parent).as_posix()
        for package in packages
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == files
    assert {f"mill_jobs/demo/models/{name}" for name in ("sam.pth", "sam.json", "chat/model.safetensors")} <= names
    assert {name.partition("/")[0] for name in names} == {"mill_shared", "mill_jobs", "mill_k8s"}
    assert not [name for name in names if re.search(r"(^|/)(tests?/|test_|conftest)", name)]
