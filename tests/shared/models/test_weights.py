"""What weights are, by their content."""

import hashlib
from pathlib import Path

import pytest

from mill_shared.errors import ConfigError
from mill_shared.models import weights
from mill_shared.models.weights import content_digest, file_digests


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as a hub's client leaves it."""
    files = {
        "config.json": b"{}",
        "shards/model-00001.safetensors": b"first",
        "shards/model-00002.safetensors": b"second",
        "README.md": b"# Model",
        "LICENSE.txt": b"free",
        ".gitattributes": b"*.safetensors filter=lfs",
        ".cache/huggingface/download/config.json.metadata": b"etag",
        "empty.txt": b"",
    }
    for name, content in files.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes(content)
    return tmp_path / "model"


def test_a_folder_gives_its_weights_and_settings_alone(folder: Path) -> None:
    assert file_digests(folder) == {
        "config.json": sha256(b"{}"),
        "empty.txt": sha256(b""),
        "shards/model-00001.safetensors": sha256(b"first"),
        "shards/model-00002.safetensors": sha256(b"second"),
    }


def test_a_file_gives_itself(folder: Path) -> None:
    assert file_digests(folder / "config.json") == {"config.json": sha256(b"{}")}
    assert content_digest(folder / "config.json") == sha256(b"{}")


def test_large_files_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "READ_BYTES", 7)
    content = bytes(range(256)) * 3
    (tmp_path / "sam.pth").write_bytes(content)
    assert content_digest(tmp_path / "sam.pth") == sha256(content)


@pytest.mark.parametrize("mark", [" ", "*"])
def test_listed_digests_are_believed(folder: Path, mark: str) -> None:
    listed = "ab" * 32
    (folder / "SHA256SUMS").write_text(
        f"{listed.upper()} {mark}./shards/model-00001.safetensors\n{'cd' * 32} {mark}gone.bin\nnot a line\n\n"
    )
    found = file_digests(folder)
    assert found["shards/model-00001.safetensors"] == listed
    assert found["shards/model-00002.safetensors"] == sha256(b"second")
    assert not {"gone.bin", "SHA256SUMS"} & found.keys()


def test_a_list_beside_a_file_is_believed(tmp_path: Path) -> None:
    (tmp_path / "sam.pth").write_bytes(b"weights")
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  sam.pth\n")
    assert content_digest(tmp_path / "sam.pth") == "0" * 64


def test_a_list_that_is_none_lists_nothing(folder: Path) -> None:
    (folder / "SHA256SUMS").write_bytes(b"\xff\xfe" + b"z" * 64 + b"  config.json\n")
    assert file_digests(folder)["config.json"] == sha256(b"{}")


def test_content_decides_and_place_does_not(folder: Path, tmp_path: Path) -> None:
    before = content_digest(folder)
    moved = folder.rename(tmp_path / "elsewhere")
    (moved / "README.md").write_bytes(b"# Another text")
    (moved / ".cache" / "more").write_bytes(b"x")
    assert content_digest(moved) == before


@pytest.mark.parametrize("change", ["content", "name", "more"])
def test_another_content_is_another_digest(folder: Path, change: str) -> None:
    before = content_digest(folder)
    match change:
        case "content":
            (folder / "config.json").write_bytes(b"{ }")
        case "name":
            (folder / "config.json").rename(folder / "settings.json")
        case _:
            (folder / "more.json").write_bytes(b"")
    assert content_digest(folder) != before


def test_links_are_followed(folder: Path, tmp_path: Path) -> None:
    """A hub's cache holds links to blobs."""
    (tmp_path / "blob").write_bytes(b"{}")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "blob")
    assert file_digests(folder)["config.json"] == sha256(b"{}")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vit_h\.pth: no such file or folder; put the weights there"):
        content_digest(tmp_path / "vit_h.pth")
    (tmp_path / "model" / ".git").mkdir(parents=True)
    (tmp_path / "model" / ".git" / "HEAD").write_text("ref")
    with pytest.raises(ConfigError, match="model: the folder is empty; put the model's files there"):
        file_digests(tmp_path / "model")


def test_what_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "SHA256SUMS").mkdir()
    assert "config.json" in file_digests(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")
    with pytest.raises(ConfigError, match="model"):
        file_digests(folder / "config.json")
