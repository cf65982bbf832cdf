"""What a trainer's config must say about a class list, and the overlay that says it without touching the config."""

import colorsys
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from mill_jobs.trainer.classes import ClassList
from mill_jobs.trainer.config import TargetTable
from mill_jobs.trainer.embeddings import CLASSES, GROUPS

INSTANCES = "instances.json"
HERE = "{{ fileDirname }}"
"""mmengine puts the folder of the config in place of this."""
EMBEDDING_FILES = {
    "embeddings": CLASSES["plain"],
    "embeddings_attn12": CLASSES["attn12"],
    "background": GROUPS["plain"],
    "background_attn12": GROUPS["attn12"],
}
"""Field of the target table -> file of the bundle."""
WIDTH = 79
"""Columns of a written line, as mmdetection's own files have."""
GOLDEN_RATIO = 0.618033988749895
"""Steps of this part of the colour circle keep neighbours apart for any number of classes."""


@dataclass(frozen=True)
class Edit:
    """One value that a trainer's config must hold."""

    what: str
    """Field of the target table that it comes from."""
    paths: tuple[str, ...]
    """Where; one at least must exist."""
    value: Any
    """int, str, or lists, tuples and dicts of them."""
    key: str | None = None
    """Set this key beside the path's last name, and make it where it is missing. Default: the last name itself."""


def make_palette(count: int) -> list[tuple[int, int, int]]:
    """Return one RGB colour a class, 0 to 255; the first ones never depend on how many follow."""
    colours = (colorsys.hsv_to_rgb(index * GOLDEN_RATIO % 1, (0.9, 0.6)[index % 2], 0.9) for index in range(count))
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in colours]


def make_edits(
    classes: ClassList, targets: TargetTable, files: Collection[str] = (), *,
    folder: str = HERE, annotation_file: str = INSTANCES, metainfo: bool = True,
) -> list[Edit]:  # fmt: skip
    """Return every value that the class list gives to a trainer's config.

    Args:
        classes: of the bundle.
        targets: where the values go.
        files: embedding files that the bundle holds; places of the others are left alone.
        folder: of the bundle, as the trainer sees it.
        annotation_file: name of the COCO file in it.
        metainfo: also set class names and palette on the training datasets.
    """
    names = tuple(entry.name for entry in classes.classes)
    annotations = f"{folder}/{annotation_file}"
    # num_pls goes first: what derives from it is then right already.
    wanted: list[tuple[str, Any]] = [
        ("num_pls", len(classes.extras)),
        ("num_classes", len(names)),
        ("class_weight", classes.class_weight),
        ("annotations", annotations),
        ("annotation_copies", annotations),
    ]
    wanted += [(what, f"{folder}/{file}") for what, file in EMBEDDING_FILES.items() if file in files]
    edits = [Edit(what, getattr(targets, what), value) for what, value in wanted if getattr(targets, what)]
    if metainfo and targets.annotations:
        value = {"classes": names, "palette": make_palette(len(names))}
        edits.append(Edit("metainfo", targets.annotations, value, "metainfo"))
    return edits


def literal(value: Any, indent: int = 0, quote: str = "'") -> str:
    """Return a value as Python text, broken into lines behind `WIDTH` columns.

    Args:
        value: int, float, str, or lists, tuples and dicts (with names as keys) of them.
        indent: column at which the text begins; later lines stand one further.
        quote: of strings, where the string has neither quotes nor escapes.
    """
    match value:
        case str():
            plain = re.search(r"""['"\\]""", value) is None and value.isprintable()
            text = f"{quote}{value}{quote}" if plain else repr(value)
            # mmengine puts values in place of double braces, and a model may answer with anything.
            return text if value.startswith(HERE) else text.replace("{{", "{\\x7b")
        case dict():
            inner = indent + len("dict(")
            items = [f"{key}={literal(item, inner + len(key) + 1, quote)}" for key, item in value.items()]
            return f"dict({(chr(10).join((',', ' ' * inner))).join(items)})"
        case list() | tuple():
            opening, closing = "[]" if isinstance(value, list) else ("(", ",)" if len(value) == 1 else ")")
            lines = [""]
            for number, item in enumerate(value, 1):
                text = literal(item, quote=quote) + ("," if number < len(value) else "")
                if lines[-1] and indent + 1 + len(lines[-1]) + 1 + len(text) > WIDTH:
                    lines.append(text)
                else:
                    lines[-1] += f" {text}" if lines[-1] else text
            return opening + ("\n" + " " * (indent + 1)).join(lines) + closing
        case _:
            return repr(value)


_FUNCTIONS = '''

def _set(node, steps, key, value):
    """Return a copy of `node` with the value set, and how often; None stands for any number of levels."""
    if isinstance(node, (list, tuple)):
        done = [_set(item, steps, key, value) for item in node]
        return type(node)(item for item, _ in done), sum(count for _, count in done)
    if not isinstance(node, dict):
        return node, 0
    if steps[0] is None:
        node, found = _set(node, steps[1:], key, value)
        for name in list(node):
            node[name], count = _set(node[name], steps, key, value)
            found += count
        return node, found
    node, found = dict(node), 0
    if steps[0] in node:
        if len(steps) == 1:
            node[key or steps[0]], found = value, 1
        else:
            node[steps[0]], found = _set(node[steps[0]], steps[1:], key, value)
    return node, found


def _override(base, edits):
    """Return the base's sections with every value set; a place that the base lacks is an error, never a new key."""
    for paths, key, value in edits:
        found = 0
        for path in paths:
            base, count = _set(base, [None if step == '**' else step for step in path.split('.')], key, value)
            found += count
        if not found:
            raise ValueError(f'overlay: the base config has none of {", ".join(paths)}; correct the target table')
    return base


'''


def make_overlay(
    classes: ClassList, targets: TargetTable, base: str, files: Collection[str] = (), *,
    annotation_file: str = INSTANCES,
) -> str:  # fmt: skip
    """Return an mmengine config that inherits from the trainer's own and states every value of the class list.

    mmengine does not carry an overridden top-level variable to the places that were made from it, and replaces lists as
    a whole. So the overlay walks through the sections that its base comes to and sets each place itself. A place that
    the base lacks stops the trainer. Files are named relative to the overlay's own folder.

    Args:
        classes: of the bundle.
        targets: where the values go.
        base: the trainer's config: an absolute path, or `package::path`.
        files: embedding files beside the overlay.
        annotation_file: name of the COCO file beside it.
    """
    edits = make_edits(classes, targets, files, annotation_file=annotation_file)
    # A lone variable is stated for the reader; the base need not have it.
    variables = [(path, edit.value) for edit in edits for path in edit.paths if "." not in path]
    places = [(tuple(path for path in edit.paths if "." in path), edit) for edit in edits]
    sections = dict.fromkeys(path.split(".")[0] for paths, _ in places for path in paths)
    rows = [f"    ({literal(paths)}, {edit.key!r},{_shown(edit)}),\n" for paths, edit in places if paths]
    metainfo = [f"_metainfo = {literal(edit.value, 12)}\n" for edit in edits if edit.what == "metainfo"]
    return "".join(
        (
            f'"""The trainer\'s config for {len(classes.classes)} classes. Train with this file; its base stays as it'
            ' is."""\n\n',
            f"_base_ = [{literal(base)}]\n",
            _FUNCTIONS,
            *metainfo,
            "_edits = [\n",
            *rows,
            "]\n",
            f"_sections = _override({{name: _base_[name] for name in {list(sections)!r} if name in _base_}}, _edits)\n",
            *(f"{name} = _sections[{name!r}]\n" for name in sections),
            *(f"{name} = {literal(value, len(name) + 3)}\n" for name, value in variables),
            f"del _edits, _sections{', _metainfo' if metainfo else ''}\n",
        )
    )


def _shown(edit: Edit) -> str:
    if edit.what == "metainfo":
        return " _metainfo"
    return f"\n     {literal(edit.value, 5)}" if isinstance(edit.value, list) else f" {literal(edit.value)}"
