"""Class embeddings, made by a tiny CLIP model in the official format."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mill_jobs.finalize import ScratchWriter
from mill_jobs.trainer.classes import ClassList, make_classes
from mill_jobs.trainer.config import EmbeddingsConfig
from mill_jobs.trainer.embeddings import Embeddings, average, encoder_digest, write_embeddings
from mill_jobs.trainer.templates import BACKGROUND, ENSEMBLE, class_prompts, ensemble_prompts
from mill_shared.coco import CocoBase, CocoCategory
from mill_shared.errors import ConfigError, CorruptError
from mill_shared.models.clip import Clip
from mill_shared.models.config import ClipConfig
from mill_shared.storage import LocalStore
from tiny_clip import PROJECTED, WIDTH, save_clip

PLAIN, ATTN = "class_embeddings.npy", "class_embeddings_attn12.npy"
SKIES, SKIES_ATTN = "background_embeddings.npy", "background_embeddings_attn12.npy"
EVERY = (SKIES, SKIES_ATTN, PLAIN, ATTN)
TAXONOMY = ("person", "traffic_light", "umbrella")
EXTRAS = ("orange/lemon", "Igloo")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def write(tmp_path: Path, clip_folder: Path) -> Callable[..., tuple[Embeddings, Path]]:
    """Return a function that writes embeddings into a new folder each time."""
    folders = iter(tmp_path / f"final-{number}" for number in range(9))

    def run(
        classes: ClassList | None = None, *, clip: Path | None = clip_folder, plain: Path | None = None,
        attn12: Path | None = None, cache: Path | None = None, background: bool = False,
    ) -> tuple[Embeddings, Path]:  # fmt: skip
        out = ScratchWriter(next(folders))
        made = write_embeddings(
            EmbeddingsConfig(clip=clip, background=background), _classes() if classes is None else classes, out,
            plain_path=plain, attn12_path=attn12, cache=None if cache is None else LocalStore(cache),
        )  # fmt: skip
        return made, out.folder

    return run


Write = Callable[..., tuple[Embeddings, Path]]


def _classes(*extras: str, ids: tuple[int, ...] = (1, 10, 28), names: tuple[str, ...] = TAXONOMY) -> ClassList:
    categories = tuple(CocoCategory(id_, name, "") for id_, name in zip(ids, names, strict=True))
    return make_classes(CocoBase(categories, (), None), extras)


def _expected(folder: Path, prompts: tuple[str, ...], form: str = "plain") -> NDArray[np.float64]:
    """Normalise each feature, then their mean."""
    features = Clip(ClipConfig(model=folder, device="cpu")).encode_text(prompts)
    total = np.zeros(PROJECTED if form == "plain" else WIDTH)
    for row in (features.plain if form == "plain" else features.attn).astype(np.float64):
        total += row / np.sqrt((row**2).sum())
    found: NDArray[np.float64] = total / np.sqrt((total**2).sum())
    return found


def _read(path: Path) -> NDArray[np.float16]:
    found: NDArray[np.float16] = np.load(path, allow_pickle=False)
    return found


# Prompts


@pytest.mark.parametrize(
    ("name", "sha256"),
    [
        ("umbrella", "bad6eae4b6d39eb8e19db835c27a46d915828b99b2df4527beafd8e7988c3783"),
        ("cow", "9a5f344b2bb518533810d47168120a84eb316a118693356b1b76a89ce821d17c"),
    ],
)
def test_the_prompts_of_a_bare_name_are_those_of_the_reference(name: str, sha256: str) -> None:
    """Source: specs/vlplm.md 1.2 and 8.12."""
    prompts = ensemble_prompts(name)
    assert len(prompts) == len(ENSEMBLE) == 63
    assert hashlib.sha256("\n".join(prompts).encode()).hexdigest() == sha256


def test_58_of_63_class_prompts_become_sentences() -> None:
    """Source: specs/cotpl.md 5.2."""
    prompts = class_prompts("cow")
    assert sum(prompt.startswith("This is ") for prompt in prompts) == 58
    assert [prompt for prompt in prompts if not prompt.startswith("This is ")] == [
        "There is a cow in the scene.", "There is the cow in the scene.", "itap of a cow.", "itap of my cow.",
        "itap of the cow.",
    ]  # fmt: skip
    assert tuple(prompt.removeprefix("This is ") for prompt in prompts) == ensemble_prompts("cow")


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("umbrella", "There is an umbrella in the scene."),
        ("traffic_light", "There is a traffic light in the scene."),
        ("orange/lemon", "There is an orange or lemon in the scene."),
        ("T-Shirt...", "There is a t-shirt in the scene."),
        ("Apple", "There is a apple in the scene."),  # the reference looks at the letter as it came
        ("u.s. flag.", "There is an u.s. flag in the scene."),
        ("{name}", "There is a {name} in the scene."),
    ],
)
def test_a_name_is_cleaned_and_its_article_is_that_of_the_original(name: str, prompt: str) -> None:
    """Source: specs/cotpl.md 5.2."""
    assert class_prompts(name)[0] == prompt


def test_five_background_groups_have_six_prompts_each() -> None:
    """Source: specs/cotpl.md 5.2."""
    assert tuple(BACKGROUND) == ("sky", "water surface", "vegetation", "paved ground", "plain wall")
    assert [len(set(prompts)) for prompts in BACKGROUND.values()] == [6] * 5


def test_averages_weigh_every_prompt_the_same() -> None:
    """Source: specs/vlplm.md 8.7, whose two-scale mean is the same rule."""
    found = average(np.array([[3, 4, 0], [0, 5, 0]], np.float32))
    np.testing.assert_allclose(found, [[0.316228, 0.948683, 0]], atol=3e-4)
    assert found.dtype == np.float16


# Files


def test_both_forms_hold_a_unit_row_for_each_class_and_group(write: Write, clip_folder: Path) -> None:
    made, folder = write(_classes(*EXTRAS), background=True)
    assert made == Embeddings(EVERY, {})
    assert made.is_complete
    assert sorted(path.name for path in folder.iterdir()) == list(EVERY)
    for name, form, width in ((PLAIN, "plain", PROJECTED), (ATTN, "attn12", WIDTH)):
        rows = _read(folder / name)
        assert rows.shape == (5, width)
        assert rows.dtype == np.float16
        for row, each in zip(rows, (*TAXONOMY, *EXTRAS), strict=True):
            np.testing.assert_allclose(row, _expected(clip_folder, class_prompts(each), form), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(rows.astype(np.float64), axis=1), 1, atol=1e-3)
    for name, form, width in ((SKIES, "plain", PROJECTED), (SKIES_ATTN, "attn12", WIDTH)):
        rows = _read(folder / name)
        assert rows.shape == (5, width)
        assert rows.dtype == np.float16
        for row, prompts in zip(rows, BACKGROUND.values(), strict=True):
            np.testing.assert_allclose(row, _expected(clip_folder, prompts, form), rtol=1e-3, atol=1e-4)


def test_rows_come_in_the_order_of_category_ids(write: Write, clip_folder: Path) -> None:
    _, folder = write(_classes("igloo", ids=(28, 1, 10), names=("umbrella", "person", "traffic_light")))
    _, ascending = write(_classes("igloo"))
    for name in (PLAIN, ATTN):
        assert (folder / name).read_bytes() == (ascending / name).read_bytes()


def test_the_same_classes_give_the_same_bytes_alone_or_with_others(write: Write) -> None:
    _, all_ = write(_classes(*EXTRAS))
    _, again = write(_classes(*EXTRAS))
    _, swapped = write(_classes(*reversed(EXTRAS)))
    for name in (PLAIN, ATTN):
        assert (all_ / name).read_bytes() == (again / name).read_bytes()
        assert np.array_equal(_read(all_ / name)[[0, 1, 2, 4, 3]], _read(swapped / name))


def test_existing_rows_are_kept_bit_for_bit_and_new_ones_follow(write: Write, tmp_path: Path) -> None:
    _, made = write()
    existing = tmp_path / "shipped.npy"
    shipped = _read(made / PLAIN)
    shipped.view(np.uint16)[:] ^= 1  # the last bit of every number
    np.save(existing, np.asfortranarray(shipped))
    _, extended = write(_classes(*EXTRAS), plain=existing)
    _, new = write(_classes(*EXTRAS))
    rows = _read(extended / PLAIN)
    assert rows[:3].tobytes() == shipped.tobytes()
    assert rows[3:].tobytes() == _read(new / PLAIN)[3:].tobytes()
    assert not np.array_equal(rows[:3], _read(new / PLAIN)[:3])
    assert (extended / ATTN).read_bytes() == (new / ATTN).read_bytes()


def test_without_new_classes_existing_files_need_no_clip(write: Write, tmp_path: Path) -> None:
    _, old = write()
    made, folder = write(clip=None, plain=old / PLAIN, attn12=old / ATTN)
    assert made == Embeddings((PLAIN, ATTN), {})
    assert (folder / PLAIN).read_bytes() == (old / PLAIN).read_bytes()
    made, folder = write(clip=tmp_path / "nowhere", plain=old / PLAIN, attn12=old / ATTN)
    assert made.is_complete


def test_without_clip_what_lacks_rows_is_not_written_and_named(write: Write, tmp_path: Path) -> None:
    _, old = write()
    made, folder = write(_classes(*EXTRAS), clip=None, plain=old / PLAIN, background=True)
    assert not made.is_complete
    assert made.files == ()
    assert list(folder.iterdir()) == []
    assert made.missing == {
        PLAIN: EXTRAS, ATTN: (*TAXONOMY, *EXTRAS), SKIES: tuple(BACKGROUND), SKIES_ATTN: tuple(BACKGROUND)
    }  # fmt: skip
    assert made.notes[0] == (
        "class_embeddings.npy is missing: no embedding of orange/lemon, Igloo; name a CLIP folder in "
        "finalize.trainer.embeddings.clip and finalize again"
    )
    many, _ = write(_classes(*(f"thing {number}" for number in range(12))), clip=None, attn12=old / ATTN)
    assert "thing 9 and 2 more;" in many.notes[1]


def test_a_run_without_any_class_writes_no_class_file(write: Write) -> None:
    made, folder = write(make_classes(None, ()))
    assert made == Embeddings((), {})
    assert list(folder.iterdir()) == []


# The cache


def test_cached_rows_need_no_encoder_and_give_the_same_bytes(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "store"
    _, first = write(_classes(*EXTRAS), cache=cache, background=True)

    def refuse(*_: Any) -> None:
        raise AssertionError("every row is there")

    monkeypatch.setattr(Clip, "__init__", refuse)
    _, second = write(_classes(*EXTRAS), cache=cache, background=True)
    for name in EVERY:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_only_new_names_are_encoded(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "store"
    write(cache=cache)
    asked = list[str]()
    encode = Clip.encode_text

    def counted(self: Clip, texts: tuple[str, ...]) -> Any:
        asked.append(texts[0])
        return encode(self, texts)

    monkeypatch.setattr(Clip, "encode_text", counted)
    write(_classes(*EXTRAS), cache=cache)
    assert asked == ["There is an orange or lemon in the scene.", "There is a igloo in the scene."]


def test_another_model_shares_no_row(write: Write, tmp_path: Path) -> None:
    cache = tmp_path / "store"
    other = save_clip(tmp_path / "other", seed=2)
    assert encoder_digest(other) != encoder_digest(save_clip(tmp_path / "same", seed=1))
    _, first = write(cache=cache)
    _, second = write(cache=cache, clip=other)
    assert not np.array_equal(_read(first / PLAIN), _read(second / PLAIN))
    entries = [entry.key.split("/") for entry in LocalStore(cache).list("embeddings/")]
    assert len({encoder for _, encoder, _, _ in entries}) == 2
    assert len(entries) == 2 * 2 * len(TAXONOMY)


def test_the_first_of_two_machines_says_what_a_row_is(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "store"
    _, first = write(cache=cache)
    entries = [entry.key for entry in LocalStore(cache).list("embeddings/") if "/plain/" in entry.key]
    for key in entries:
        row = _read(cache / key)
        row.view(np.uint16)[:] ^= 1
        np.save(cache / key, row)
    read = LocalStore.get
    seen = set[str]()

    def late(self: LocalStore, key: str) -> bytes:
        """Hide each object once, as if the other machine wrote it while this one encoded."""
        if key not in seen:
            seen.add(key)
            return read(self, f"{key}-not-yet")
        return read(self, key)

    monkeypatch.setattr(LocalStore, "get", late)
    _, second = write(cache=cache)
    rows = _read(second / PLAIN)
    assert (rows.view(np.uint16) ^ 1).tobytes() == _read(first / PLAIN).view(np.uint16).tobytes()


@pytest.mark.parametrize("data", [b"", b"\x93NUMPY", b"not numbers"])
def test_a_damaged_cached_row_is_named(write: Write, tmp_path: Path, data: bytes) -> None:
    cache = tmp_path / "store"
    write(cache=cache)
    key = next(entry.key for entry in LocalStore(cache).list("embeddings/"))
    (cache / key).write_bytes(data)
    with pytest.raises(CorruptError, match=rf"{key}: .*delete it and finalize again"):
        write(cache=cache)


def test_a_cached_array_that_is_no_row_is_named(write: Write, tmp_path: Path) -> None:
    cache = tmp_path / "store"
    write(cache=cache)
    key = next(entry.key for entry in LocalStore(cache).list("embeddings/"))
    np.save(cache / key, np.zeros((2, 4), np.float16))
    with pytest.raises(CorruptError, match=rf"{key}: holds no row"):
        write(cache=cache)


def test_with_every_row_there_torch_is_not_imported(write: Write, tmp_path: Path, clip_folder: Path) -> None:
    cache, out = tmp_path / "store", tmp_path / "out"
    _, old = write(cache=cache)
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from mill_jobs.finalize import ScratchWriter\n"
        "from mill_jobs.trainer.classes import ClassList\n"
        "from mill_jobs.trainer.config import EmbeddingsConfig\n"
        "from mill_jobs.trainer.embeddings import write_embeddings\n"
        "from mill_shared.storage import LocalStore\n"
        "classes, clip, cache, out = map(Path, sys.argv[1:])\n"
        "made = write_embeddings(\n"
        "    EmbeddingsConfig(clip=clip, background=False), ClassList.from_json(classes.read_bytes()),\n"
        "    ScratchWriter(out), plain_path=None, attn12_path=None, cache=LocalStore(cache),\n"
        ")\n"
        "assert made.is_complete\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    (tmp_path / "classes.json").write_bytes(_classes().to_json())
    paths = map(str, (tmp_path / "classes.json", clip_folder, cache, out))
    done = subprocess.run(
        [sys.executable, "-c", script, *paths], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (out / PLAIN).read_bytes() == (old / PLAIN).read_bytes()


# What is refused


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.ones((4, PROJECTED), np.float16), "4 rows, but the taxonomy has 3 classes"),
        (np.ones((3, PROJECTED), np.float32), "float32 instead of float16"),
        (np.ones((3, PROJECTED), ">f2"), ">f2 instead of float16"),
        (np.ones(3, np.float16), r"has shape \(3,\)"),
        (np.ones((3, 0), np.float16), r"has shape \(3, 0\)"),
        (np.array([[1], [np.nan], [1]], np.float16), "row 1 .* is not finite"),
        (np.array([[1], [1], [np.inf]], np.float16), "row 2 .* is not finite"),
        (np.array([None, None, None]), "not a .npy file of numbers"),
    ],
)
def test_an_existing_file_that_does_not_fit_is_named(
    write: Write, tmp_path: Path, array: NDArray[Any], said: str
) -> None:
    path = tmp_path / "shipped.npy"
    np.save(path, array)
    with pytest.raises(ConfigError, match=rf"embeddings {path}: {said}"):
        write(clip=None, attn12=path)


def test_an_existing_file_that_is_none_is_named(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.npy: cannot be read: No such file"):
        write(plain=tmp_path / "none.npy")
    for data in (b"", b"\x93NUMPY\x01\x00v\x00{'descr'", b"text"):
        (tmp_path / "broken.npy").write_bytes(data)
        with pytest.raises(ConfigError, match=r"broken\.npy: not a \.npy file of numbers"):
            write(plain=tmp_path / "broken.npy")
    np.savez(tmp_path / "archive.npz", rows=np.ones(3))
    with pytest.raises(ConfigError, match=r"archive\.npz: an \.npz archive"):
        write(plain=tmp_path / "archive.npz")


def test_rows_of_another_model_or_order_are_not_extended(write: Write, tmp_path: Path) -> None:
    _, made = write()
    wider = save_clip(tmp_path / "wider", projected=PROJECTED + 8)
    with pytest.raises(ConfigError, match=rf"24 columns, but {wider} makes 32; name the CLIP model that made"):
        write(_classes(*EXTRAS), clip=wider, plain=made / PLAIN)
    other = save_clip(tmp_path / "other", seed=2)
    with pytest.raises(ConfigError, match=rf"row 0 is not what {other} makes of 'person' \(cosine -?0\.\d+\)"):
        write(_classes(*EXTRAS), clip=other, plain=made / PLAIN)
    shifted = tmp_path / "shifted.npy"
    rows = _read(made / ATTN)
    rows[-1] = -rows[-1]
    np.save(shifted, rows)
    with pytest.raises(ConfigError, match=r"row 2 is not what .* makes of 'umbrella' \(cosine -1\.000\)"):
        write(_classes(*EXTRAS), attn12=shifted)


def test_a_missing_or_damaged_clip_and_too_long_a_name_are_errors(
    write: Write, tmp_path: Path, clip_folder: Path
) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: no such f"):
        write(clip=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"nowhere: no such f"):
        write(clip=tmp_path / "nowhere", cache=tmp_path / "store")
    broken = Path(shutil.copytree(clip_folder, tmp_path / "broken"))
    (broken / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"broken: cannot be loaded"):
        write(clip=broken)
    with pytest.raises(ConfigError, match=r"tokens, at most 77 are read; shorten the name"):
        write(_classes("a" * 80))
