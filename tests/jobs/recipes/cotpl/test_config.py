"""What the labels depend on beside the run file."""

from pathlib import Path

import pytest

from mill_jobs.recipes.cotpl.config import CotplConfig
from mill_shared.errors import ConfigError


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name, content in (
        ("sam.pth", b"weights"), ("sam.json", b"{}"), ("chat/config.json", b"{}"), ("truth.json", b"{}"),
        ("mine.yaml", b"{version: mine, presence: p, name: n, name_again: a, layer: '{name}'}"),
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def content(models: Path, architecture: str = "custom", **changes: object) -> dict[str, str]:
    label = {
        "masks": {"kind": "sam", "checkpoint": models / "sam.pth", "architecture": architecture},
        "chat": {"kind": "transformers", "model": models / "chat"},
        **changes,
    }
    return CotplConfig.model_validate({"label": label}).content()


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ("sam.pth", "label.masks.checkpoint"),
        ("sam.json", "label.masks.sizes"),
        ("chat/config.json", "label.chat.model"),
        ("mine.yaml", "label.prompts"),
    ],
)
def test_each_file_that_changes_the_labels_is_told_by_its_content(models: Path, changed: str, field: str) -> None:
    before = content(models, prompts=models / "mine.yaml")
    (models / changed).write_bytes((models / changed).read_bytes().replace(b"p,", b"q,") + b" ")
    after = content(models, prompts=models / "mine.yaml")
    assert [name for name in before if before[name] != after[name]] == [field]


def test_where_the_files_lie_is_no_content(models: Path, tmp_path: Path) -> None:
    before = content(models)
    (models / "sam.pth").rename(models / "renamed.pth")
    (models / "sam.json").rename(models / "renamed.json")
    masks = {"kind": "sam", "checkpoint": models / "renamed.pth", "architecture": "custom"}
    assert content(models, masks=masks) == before


def test_the_truths_of_oracles_are_content(models: Path) -> None:
    oracle = {"kind": "oracle", "truth": str(models / "truth.json")}
    assert content(models, masks=oracle, chat=oracle).keys() == {
        "label.prompts", "label.masks.truth", "label.chat.truth",
    }  # fmt: skip


def test_official_architectures_need_no_sizes_and_custom_ones_do(models: Path) -> None:
    (models / "sam.json").unlink()
    assert "label.masks.sizes" not in content(models, "vit_b")
    with pytest.raises(ConfigError, match=r"sam\.json: no such file"):
        content(models, "custom")


def test_imported_labels_depend_on_nothing_else() -> None:
    assert CotplConfig().content() == {}
