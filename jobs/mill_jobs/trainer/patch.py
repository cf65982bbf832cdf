"""Patches a trainer's Python files by their syntax tree: the named values change and every other byte stays.

The tree says where a value stands, and the new text is put there. Nothing is printed anew from the tree, so comments,
line ends, encodings and form feeds need no care.
"""

import ast
import io
import itertools
import os
import re
import tempfile
import tokenize
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from pydantic import TypeAdapter, ValidationError

from mill_jobs.recipes.base import FinalWriter
from mill_jobs.trainer.classes import ClassList
from mill_jobs.trainer.config import (
    BARON_TARGETS,
    MMDET_TARGETS,
    BaronTrainer,
    MmdetTrainer,
    NoTrainer,
    TargetTable,
    TrainerConfig,
)
from mill_jobs.trainer.overlay import (
    EMBEDDING_FILES,
    INSTANCES,
    Edit,
    literal,
    make_edits,
    make_overlay,
    make_palette,
)
from mill_shared.errors import ConfigError

OVERLAY, PATCHED, METAINFO = "overlay.py", "trainer_config.py", "coco_metainfo.py"
LARGEST = 1_000_000
"""Elements of a list that is evaluated; a longer one counts as unknown."""


class PatchRefused(ConfigError):
    """The file is sound, but a value cannot be patched where it stands. The file is left alone."""


class _UnknownValue(Exception):
    """An expression whose value cannot be told from the file alone."""


@dataclass(frozen=True)
class _Place:
    value: ast.expr
    siblings: Mapping[str, ast.expr]
    """All entries of the dict that holds it; empty for a variable."""
    entry: ast.AST
    """Where the entry begins: its keyword or its key."""
    braces: bool
    """The dict is `{...}`, not `dict(...)`."""


class _Source:
    """A Python file as text and as a tree."""

    def __init__(self, data: bytes, name: str) -> None:
        self.name = name
        try:
            self.encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0]
            self.text = data.decode(self.encoding)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # escapes in the user's strings are the user's
                self.tree = ast.parse(self.text)
        except (SyntaxError, ValueError) as error:
            raise ConfigError(f"{name}: no Python file: {error}") from error
        if self.text.encode(self.encoding) != data:
            raise PatchRefused(
                f"{name}: its {self.encoding} text cannot be written back byte for byte; save it as UTF-8"
            )
        # Lines as Python counts them: form feeds and the like end none.
        self.lines = [0, *(found.end() for found in re.finditer(r"\r\n|\r|\n", self.text)), len(self.text)]
        self.newline = "\r\n" if "\r\n" in self.text else "\n"
        self.stores = defaultdict[str, list[int]](list)
        self.values = dict[str, ast.expr]()
        self._collect()

    def _collect(self) -> None:
        for node in ast.walk(self.tree):
            target: ast.expr | None = None
            match node:
                case ast.Name(ctx=ast.Store() | ast.Del()):
                    target = node
                case ast.Attribute(value=value, ctx=ast.Store() | ast.Del()):
                    target = value
                case ast.Subscript(value=value, ctx=ast.Store() | ast.Del()):
                    target = value
                case ast.Expr(value=ast.Call(func=ast.Attribute(value=value))):
                    target = value  # a method called for its effect: append, update, ...
            while isinstance(target, ast.Attribute | ast.Subscript):
                target = target.value
            if isinstance(target, ast.Name):
                self.stores[target.id].append(target.lineno)
        for node in self.tree.body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self.values[name] = value
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    self.values[name] = value

    # Where things stand

    def start(self, node: Any) -> int:
        """Return the offset of a node in the text; the tree counts UTF-8 bytes of a line."""
        return self._offset(node.lineno, node.col_offset)

    def span(self, node: ast.expr) -> tuple[int, int]:
        """Return where a node begins and ends in the text."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.start(node), self._offset(node.end_lineno, node.end_col_offset)

    def _offset(self, line: int, column_bytes: int) -> int:
        start, end = self.lines[line - 1], self.lines[line]
        # The tree never counts a byte order mark, and decoding has dropped it.
        return start + len(self.text[start:end].encode("utf-8")[:column_bytes].decode("utf-8"))

    def where(self, node: Any) -> str:
        """Return file and line, for a message."""
        return f"{self.name}, line {node.lineno}"

    # What the names mean

    def variable(self, name: str) -> ast.expr | None:
        """Return what is assigned to a variable; None where the file never does.

        Raises:
            PatchRefused: not exactly one plain assignment on the top level.
        """
        lines = self.stores.get(name)
        if not lines:
            return None
        if len(lines) > 1:
            shown = ", ".join(str(line) for line in sorted(lines))
            raise PatchRefused(
                f"{self.name}: {name} is set or changed in lines {shown}; assign it once, or train with the overlay"
            )
        if name not in self.values:
            raise PatchRefused(
                f"{self.name}, line {lines[0]}: {name} is not plainly assigned on the top level; write it as "
                f"`{name} = ...`, or train with the overlay"
            )
        return self.values[name]

    def follow(self, node: ast.Name) -> ast.expr | None:
        """Return what was assigned to a name before it is used here; None where that is not in the file.

        Raises:
            PatchRefused: as `variable`.
        """
        value = self.variable(node.id)
        # A later assignment is no help to Python either; following it could lead in circles.
        return value if value is not None and self.span(value)[1] <= self.start(node) else None

    def find(self, path: str) -> list[_Place]:
        """Return every place of a target path; see `TargetTable`. Names are followed to their variables."""
        first, *steps = path.split(".")
        value = self.variable(first)
        if value is None:
            return []
        if not steps:
            return [_Place(value, {}, value, False)]
        return list(self.walk(value, steps))

    def walk(self, node: ast.expr, steps: Sequence[str]) -> Iterator[_Place]:
        """Yield every place that the steps lead to from a node."""
        searching = steps[0] == "**"
        match node:
            case ast.Name():
                try:
                    value = self.follow(node)
                except PatchRefused:
                    if searching:  # it passes over what it cannot follow; a named step must not
                        return
                    raise
                if value is not None:
                    yield from self.walk(value, steps)
            case ast.List(elts=items) | ast.Tuple(elts=items):
                for item in items:
                    yield from self.walk(item.value if isinstance(item, ast.Starred) else item, steps)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                yield from self.walk(left, steps)
                yield from self.walk(right, steps)
            case ast.Dict() | ast.Call(func=ast.Name(id="dict")):
                entries = self.entries(node)
                siblings = {name: value for name, _, value in entries}
                if searching:
                    yield from self.walk(node, steps[1:])
                    for _, _, value in entries:
                        yield from self.walk(value, steps)
                    return
                for name, entry, value in entries:
                    if name != steps[0]:
                        continue
                    if len(steps) == 1:
                        yield _Place(value, siblings, entry, isinstance(node, ast.Dict))
                    else:
                        yield from self.walk(value, steps[1:])

    def entries(self, node: ast.Dict | ast.Call) -> list[tuple[str, ast.AST, ast.expr]]:
        """Return (name, where the entry begins, value) of a dict in either form.

        Raises:
            PatchRefused: entries come from elsewhere, so that one of them may be the wanted one.
        """
        found: list[tuple[str, ast.AST, ast.expr]]
        if isinstance(node, ast.Dict):
            pairs = [(key, key, value) for key, value in zip(node.keys, node.values, strict=True)]
            found = [
                (key.value, entry, value)
                for key, entry, value in pairs
                if isinstance(key, ast.Constant) and isinstance(key.value, str) and entry is not None
            ]
            hidden = any(key is None for key, _, _ in pairs)
        else:
            found = [(item.arg, item, item.value) for item in node.keywords if item.arg is not None]
            hidden = bool(node.args) or len(found) < len(node.keywords)
        if hidden:
            raise PatchRefused(
                f"{self.where(node)}: the dict takes entries from elsewhere (`**` or another dict); write them out, or "
                "train with the overlay"
            )
        return found

    def evaluate(self, node: ast.expr, instead: Mapping[int, Any] | None = None) -> Any:
        """Return what an expression of literals and variables comes to.

        Args:
            node: the expression.
            instead: id of a node -> value that it is taken to have.

        Raises:
            _UnknownValue: it needs anything else.
        """
        if instead and id(node) in instead:
            return instead[id(node)]
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name():
                try:
                    assigned = self.follow(node)
                except PatchRefused as error:
                    raise _UnknownValue from error
                if assigned is not None:
                    return self.evaluate(assigned, instead)
            case ast.List(elts=elements):
                return self._elements(elements, instead)
            case ast.Tuple(elts=elements):
                return tuple(self._elements(elements, instead))
            case ast.Dict() | ast.Call(func=ast.Name(id="dict")):
                try:
                    return {name: self.evaluate(value, instead) for name, _, value in self.entries(node)}
                except PatchRefused as error:
                    raise _UnknownValue from error
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                value = self.evaluate(operand, instead)
                if isinstance(value, int | float):
                    return -value
            case ast.BinOp(left=left, op=op, right=right):
                return _operate(self.evaluate(left, instead), op, self.evaluate(right, instead))
        raise _UnknownValue

    def _elements(self, elements: Sequence[ast.expr], instead: Mapping[int, Any] | None) -> list[Any]:
        values = list[Any]()
        for element in elements:
            if isinstance(element, ast.Starred):
                several = self.evaluate(element.value, instead)
                if not isinstance(several, list | tuple):
                    raise _UnknownValue
                values += several
            else:
                values.append(self.evaluate(element, instead))
        return values

    # What is to be written

    def changes(self, place: _Place, edit: Edit) -> dict[tuple[int, int], str]:
        """Return span -> text of what makes a place right; nothing where it is."""
        if edit.key is None:
            return self._replace(place.value, edit.value)
        if edit.key in place.siblings:
            return self._replace(place.siblings[edit.key], edit.value)
        start = self.start(place.entry)
        opening = f"{edit.key!r}: " if place.braces else f"{edit.key}="
        return {(start, start): f"{opening}{self._literal(edit.value, start, len(opening))}, "}

    def _replace(self, node: ast.expr, wanted: Any) -> dict[tuple[int, int], str]:
        while isinstance(node, ast.Name):
            assigned = self.follow(node)
            if assigned is None:
                raise PatchRefused(
                    f"{self.where(node)}: {node.id} is not assigned before; write its value here, or train with the "
                    "overlay"
                )
            node = assigned
        if self._comes_to(node, wanted):
            return {}
        head = self._head(node)
        if isinstance(wanted, list) and head is not None:
            fixed = list(itertools.takewhile(lambda element: not isinstance(element, ast.Starred), head.elts))
            if len(fixed) <= len(wanted):
                instead = {id(element): value for element, value in zip(fixed, wanted, strict=False)}
                if self._comes_to(node, wanted, instead):
                    return {
                        self.span(element): self._literal(value, 0)
                        for element, value in zip(fixed, wanted, strict=False)
                        if not self._comes_to(element, value)
                    }
        start, end = self.span(node)
        quote = '"' if self.text[start] == '"' else "'"
        return {(start, end): self._literal(wanted, start, quote=quote)}

    def _head(self, node: ast.expr) -> ast.List | None:
        """Return the list that a sum of lists begins with."""
        match node:
            case ast.List():
                return node
            case ast.BinOp(left=left, op=ast.Add()):
                return self._head(left)
            case ast.Name():
                with suppress(PatchRefused):
                    value = self.follow(node)
                    return None if value is None else self._head(value)
        return None

    def _comes_to(self, node: ast.expr, wanted: Any, instead: Mapping[int, Any] | None = None) -> bool:
        try:
            return bool(self.evaluate(node, instead) == wanted)
        except _UnknownValue:
            return False

    def _literal(self, value: Any, at: int, further: int = 0, quote: str = "'") -> str:
        indent = at - max(line for line in self.lines if line <= at) + further
        text = literal(value, indent, quote).replace("\n", self.newline)
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            # Only strings hold such characters, and there an escape means the same.
            text = text.encode("ascii", "backslashreplace").decode()
        return text

    def spliced(self, changes: Mapping[tuple[int, int], str]) -> bytes:
        """Return the file with texts put in place of spans."""
        text = self.text
        for (start, end), new in sorted(changes.items(), reverse=True):
            text = text[:start] + new + text[end:]
        return text.encode(self.encoding)


def _operate(left: Any, op: ast.operator, right: Any) -> Any:
    numbers = isinstance(left, int | float) and isinstance(right, int | float)
    match op:
        case ast.Add() if numbers or (type(left) is type(right) and isinstance(left, list | tuple | str)):
            return left + right
        case ast.Sub() if numbers:
            return left - right
        case ast.Mult() if numbers:
            return left * right
        case ast.Mult() if isinstance(left, int) and isinstance(right, list | tuple):
            return _operate(right, op, left)
        case ast.Mult() if isinstance(left, list | tuple) and isinstance(right, int) and len(left) * right <= LARGEST:
            return left * right
    raise _UnknownValue


def patch_configs(sources: Mapping[str, bytes], edits: Sequence[Edit]) -> dict[str, bytes]:
    """Return configs with every edit made, wherever its places stand; nothing else changes, a second time nothing.

    A name is followed to its variable. An expression that comes to the right value stays, so what derives from another
    patched variable stays derived; of a sum of lists, the first list is corrected where that suffices.

    Args:
        sources: name -> content of a config and of the files that it inherits from.
        edits: in order; what derives from another one comes behind it.

    Raises:
        PatchRefused: a place is in none of the files, or cannot be patched where it stands. Nothing is half done.
        ConfigError: a file is no Python.
    """
    result = dict(sources)
    missing = list[str]()
    for edit in edits:
        found = 0
        for name, data in result.items():
            source = _Source(data, name)
            places = [place for path in edit.paths for place in source.find(path)]
            found += len(places)
            changes = dict[tuple[int, int], str]()
            for place in places:
                changes |= source.changes(place, edit)
            result[name] = source.spliced(changes)
        if not found:
            missing.append(f"{edit.what} ({' or '.join(edit.paths)})")
    if missing:
        raise PatchRefused(
            f"{', '.join(sources)}: not set there: {', '.join(missing)}; name the inherited files that set them too, "
            "or train with the overlay"
        )
    for name, data in result.items():
        source = _Source(data, name)
        for edit in edits:
            for place in (place for path in edit.paths for place in source.find(path)):
                if source.changes(place, edit):
                    raise PatchRefused(
                        f"{source.where(place.value)}: {edit.what} shares a variable with another value; give each its "
                        "own, or train with the overlay"
                    )
    return result


def patch_config(source: bytes, edits: Sequence[Edit], name: str = "config") -> bytes:
    """Return one config with every edit made; see `patch_configs`.

    Args:
        source: content of a Python file of any encoding and line end.
        edits: see `make_edits`.
        name: of the file, for messages.

    Raises:
        PatchRefused: a place is not in the file, or cannot be patched where it stands.
        ConfigError: it is no Python.
    """
    return patch_configs({name: source}, edits)[name]


def patch_metainfo(source: bytes, classes: ClassList, name: str = "coco.py") -> bytes:
    """Return mmdetection's `datasets/coco.py` with the class names and a colour for each in `CocoDataset.METAINFO`.

    Colours that are there stay.

    Raises:
        PatchRefused: there is no such class, or its METAINFO is not one plain dict with `classes`.
        ConfigError: it is no Python.
    """
    names = tuple(entry.name for entry in classes.classes)
    palette = make_palette(len(names))
    for key in ("classes", "palette"):
        parsed = _Source(source, name)
        bodies = [
            node.body for node in parsed.tree.body if isinstance(node, ast.ClassDef) and node.name == "CocoDataset"
        ]
        found = [
            node.value
            for body in bodies
            for node in body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name) and target.id == "METAINFO"
        ]
        places = list(parsed.walk(found[0], ["classes"])) if len(found) == 1 else []
        if len(places) != 1:
            raise PatchRefused(
                f"{name}: CocoDataset.METAINFO is not one dict with `classes`; is it mmdetection's file?"
            )
        value: Any = names
        if key == "palette":
            old = list[Any]()
            with suppress(_UnknownValue, KeyError, TypeError):
                old = list(parsed.evaluate(places[0].siblings["palette"]))
            value = [*old, *palette[len(old) :]][: len(names)]
        source = parsed.spliced(parsed.changes(places[0], Edit(key, (), value, key)))
    return source


# Files of a final


def write_trainer_files(
    settings: TrainerConfig, classes: ClassList, *, config_path: Path | None, metainfo_path: Path | None,
    out: FinalWriter, annotation_file: str = INSTANCES, embeddings: Collection[str] = (),
) -> list[str]:  # fmt: skip
    """Write overlay, patched config and patched metainfo into a final, as far as the settings ask for them.

    Args:
        settings: of the run file.
        classes: of the final.
        config_path: local copy of `settings.config`.
        metainfo_path: local copy of `settings.metainfo_file`.
        out: takes the files.
        annotation_file: name of the COCO file in the final.
        embeddings: names of the embedding files in the final.

    Returns:
        Notes for the user, a line each.

    Raises:
        ConfigError: a file cannot be read or is no Python; the metainfo file is not mmdetection's.
    """
    if isinstance(settings, NoTrainer):
        return []
    notes = list[str]()
    if metainfo_path is not None:
        _write(out, METAINFO, patch_metainfo(_read(metainfo_path), classes, str(settings.metainfo_file)))
    if config_path is None:
        return [*notes, "no trainer config was given, so there is no overlay; see finalize.trainer.config"]
    name = str(settings.config)
    source = _read(config_path)
    if _inherits_by_import(_Source(source, name)):
        return [
            *notes,
            f"{name} inherits with read_base(), which an overlay cannot; patch it in place with `mill patch`",
        ]
    targets = settings.targets
    unset = [file for what, file in EMBEDDING_FILES.items() if getattr(targets, what) and file not in embeddings]
    if unset:
        notes.append(
            f"places of {', '.join(unset)} keep their value in the trainer's config: the bundle has no such file"
        )
    overlay = make_overlay(classes, targets, settings.base, embeddings, annotation_file=annotation_file)
    _write(out, OVERLAY, overlay.encode())
    edits = make_edits(
        classes, targets, embeddings, annotation_file=annotation_file, metainfo=settings.metainfo_file is None
    )
    try:
        patched = patch_config(source, edits, name)
        _write(out, PATCHED, patch_config(patched, _absolute_bases(_Source(patched, name), settings), name))
    except PatchRefused as error:
        notes.append(f"no {PATCHED}: {error}")
    return notes


def _absolute_bases(source: _Source, settings: MmdetTrainer | BaronTrainer) -> list[Edit]:
    """Return what keeps `_base_` right once the config lies in the bundle."""
    value = source.variable("_base_")
    try:
        named = [] if value is None else source.evaluate(value)
    except _UnknownValue as error:
        raise PatchRefused(f"{source.name}: _base_ is no list of names; train with the overlay") from error
    bases = [named] if isinstance(named, str) else list(named)
    if all("::" in base or Path(base).is_absolute() for base in bases):
        return []
    if "::" in settings.base:
        raise PatchRefused(f"{source.name}: its _base_ is relative to a package; train with the overlay")
    folder = os.path.dirname(settings.base)  # noqa: PTH120 - the trainer's path, never looked up here
    absolute = [base if "::" in base else os.path.normpath(f"{folder}/{base}") for base in bases]
    return [Edit("_base_", ("_base_",), absolute[0] if isinstance(named, str) else absolute)]


def _inherits_by_import(source: _Source) -> bool:
    return any(
        isinstance(item.context_expr, ast.Call)
        and isinstance(item.context_expr.func, ast.Name)
        and item.context_expr.func.id == "read_base"
        for node in source.tree.body
        if isinstance(node, ast.With)
        for item in node.items
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error


def _write(out: FinalWriter, name: str, data: bytes) -> None:
    with out.create(name) as stream:
        stream.write(data)


# Files in place


class _Manifest(msgspec.Struct, frozen=True):
    finalize: dict[str, Any] = {}


def bundle_targets(bundle: Path, kind: str | None) -> TargetTable:
    """Return where a bundle's values go.

    Args:
        bundle: folder with a fetched final.
        kind: `mmdet` or `baron`; default: the trainer that the final was made for, with its own table.

    Raises:
        ConfigError: there is no kind, and the final was made for none.
    """
    if kind is not None:
        return {"mmdet": MMDET_TARGETS, "baron": BARON_TARGETS}[kind]
    path = bundle / "manifest.json"
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=_Manifest) if path.exists() else _Manifest()
        parts = manifest.finalize.get("finalize", {}).get("trainer", {"kind": "none"})
        settings = TypeAdapter[TrainerConfig](TrainerConfig).validate_python(parts)
    except (msgspec.DecodeError, ValidationError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}; fetch the bundle again") from error
    if isinstance(settings, NoTrainer):
        raise ConfigError(
            f"{bundle}: this final was made for no trainer in particular; say --kind mmdet or --kind baron"
        )
    return settings.targets


def plan_patch(bundle: Path, configs: Sequence[Path], targets: TargetTable, metainfo: Path | None) -> dict[Path, bytes]:
    """Return the files that a bundle changes, and what they become. Nothing is written.

    Args:
        bundle: folder with a fetched final; its absolute path goes into the configs.
        configs: the trainer's config and inherited files that set some of the values.
        targets: where the values go.
        metainfo: mmdetection's `datasets/coco.py`; it then holds the class names, and the configs are left without.

    Raises:
        ConfigError: a file cannot be read or patched.
    """
    classes = ClassList.from_json(_read(bundle / "classes.json"), str(bundle / "classes.json"))
    files = [file for file in EMBEDDING_FILES.values() if (bundle / file).exists()]
    edits = make_edits(classes, targets, files, folder=bundle.absolute().as_posix(), metainfo=metainfo is None)
    before = {path: _read(path) for path in configs}
    patched = patch_configs({str(path): data for path, data in before.items()}, edits)
    after = {path: patched[str(path)] for path in configs}
    if metainfo is not None:
        before[metainfo] = _read(metainfo)
        after[metainfo] = patch_metainfo(before[metainfo], classes, str(metainfo))
    return {path: data for path, data in after.items() if data != before[path]}


def replace_file(path: Path, data: bytes) -> None:
    """Put new content in place of a file's, at once or not at all; links and permissions stay.

    Raises:
        ConfigError: it cannot be written.
    """
    real = path.resolve()
    try:
        handle, name = tempfile.mkstemp(dir=real.parent, prefix=f".{real.name}-")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.chmod(real.stat().st_mode & 0o7777)
            temporary.replace(real)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error
