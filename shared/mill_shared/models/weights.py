"""What weights are, by their content: SHA-256 from a SHA256SUMS file beside them, or computed."""

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mill_shared.errors import ConfigError

SUMS = "SHA256SUMS"
_SUM = re.compile(r"(?P<digest>[0-9a-fA-F]{64}) [ *](?P<name>.+)")
"""A line of sha256sum, of a text or a binary file."""
READ_BYTES = 8 * 2**20
NOT_WEIGHTS = frozenset({SUMS, "README", "LICENSE"})
"""Names without suffix of files that say nothing of what a model answers."""


def file_digests(path: Path) -> dict[str, str]:
    """Return relative name -> SHA-256 of a file, or of every file in a folder but dotfiles, README and LICENSE.

    A `SHA256SUMS` file (the format of sha256sum) beside the file, or in the folder, is believed for what it lists.

    Raises:
        ConfigError: there is no such file or folder, or it is empty.
    """
    try:
        if path.is_file():
            root, names = path.parent, [path.name]
        elif path.is_dir():
            root = path
            found = (item.relative_to(path) for item in path.rglob("*") if item.is_file())
            names = sorted(
                item.as_posix()
                for item in found
                if item.stem not in NOT_WEIGHTS and not any(part.startswith(".") for part in item.parts)
            )
        else:
            raise ConfigError(f"{path}: no such file or folder; put the weights there, or correct the run file")
        if not names:
            raise ConfigError(f"{path}: the folder is empty; put the model's files there")
        listed = _read_sums(root / SUMS)
        missing = [name for name in names if name not in listed]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            listed |= zip(missing, pool.map(lambda name: _sha256(root / name), missing), strict=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return {name: listed[name] for name in names}


def content_digest(path: Path) -> str:
    """Return one SHA-256 over names and digests of a weight file or folder. Raises as `file_digests`.

    A file's own name is left out, so that it may be renamed.
    """
    digests = file_digests(path)
    if path.is_file():
        return digests[path.name]
    return hashlib.sha256("".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()).hexdigest()


def _read_sums(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if match := _SUM.fullmatch(line):
            found[match["name"].removeprefix("./")] = match["digest"].lower()
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
