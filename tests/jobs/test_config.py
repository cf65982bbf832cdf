"""The run file: what is accepted, what is refused and how, what counts as identity."""

from pathlib import Path

import pytest

from mill_jobs.config import read_config
from mill_jobs.recipes.cotpl.config import CotplConfig, LabelConfig
from mill_shared.errors import ConfigError

MINIMAL = """
store: labels
dataset: {images: photos}
recipe:
  name: cotpl
  label:
    masks: {kind: sam, checkpoint: sam.pth}
    chat: {kind: transformers, model: qwen}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_a_minimal_run_file_has_the_methods_defaults(run_file: Path) -> None:
    label = read_config(run_file).recipe.label
    assert isinstance(label, LabelConfig)
    assert (label.iou_threshold, label.score_threshold, label.inner_threshold, label.min_box_area_px) == (
        0.8, 0.7, 0.5, 10_000
    )  # fmt: skip
    assert label.profile == "strict"


def test_one_field_can_be_changed_for_one_call(run_file: Path) -> None:
    config = read_config(run_file, ("sharding.chunk_size=7", "recipe.finalize.masks=true", "run=my-run"))
    assert isinstance(config.recipe, CotplConfig)
    assert (config.sharding.chunk_size, config.recipe.finalize.masks, config.run) == (7, True, "my-run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sharding.chunk_size=0", r"sharding\.chunk_size: .*greater than or equal to 1 \(got 0\)"),
        ("sharding.chunksize=3", r"sharding\.chunksize: Extra inputs are not permitted \(got 3\)"),
        ("run=My_Run", r"run: String should match pattern.*\(got 'My_Run'\)"),
        ("limits.max_failed=2", r"limits\.max_failed: .*less than or equal to 1 \(got 2\)"),
        ("recipe.name=other", r"recipe: Input tag 'other' .* 'cotpl', 'vlplm'"),
        ("store.x=1", r"--set store\.x=1: store is not a section"),
        ("store", r"--set store: expected path=value"),
    ],
)
def test_a_wrong_value_is_named_with_its_field(run_file: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(run_file, (change,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "expected a mapping of sections, got list"),
        ("a: [", "while parsing"),
        ("{}", "store: Field required; dataset: Field required; recipe: Field required"),
    ],
)
def test_a_file_that_is_no_run_file_is_one_line(run_file: Path, text: str, message: str) -> None:
    run_file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(run_file)
    assert "\n" not in str(caught.value)


def test_where_and_how_fast_is_no_identity(run_file: Path) -> None:
    before = read_config(run_file).identity()
    moved = read_config(
        run_file,
        (
            "store=s3://b/p", "storage.endpoint=http://localhost:1", "dataset.images=s3://x", "limits.max_failed=0.5",
            "recipe.label.masks.checkpoint=other/place.pth", "recipe.label.masks.device=cuda", "run=r",
            "recipe.finalize.masks=true", "finalize.taxonomy=coco-80",
        ),
    ).identity()  # fmt: skip
    assert moved == before


@pytest.mark.parametrize(
    "change",
    [
        "sharding.chunk_size=7", "dataset.max_side=512", "recipe.label.iou_threshold=0.7",
        "recipe.label.masks.precision=bfloat16", "recipe.label.chat.batch_size=2",
        "recipe.label.mask_generator.points_per_side=16",
    ],
)  # fmt: skip
def test_what_changes_the_labels_is_identity(run_file: Path, change: str) -> None:
    assert read_config(run_file, (change,)).identity() != read_config(run_file).identity()
