"""Which labels the report shows, and what it shows of each.

The sample is the same for the same final: of every fate and every class the best, the worst and the middle one first,
then what lies between. All regions of a chosen image are shown, since its picture is there anyway.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import duckdb
import msgspec
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mill_jobs.finalize import Gathered
from mill_shared.geometry import Rle, decode_mask
from mill_shared.plan import LabelPass

PICTURES = 300
"""Images in the sample, where its classes do not ask for more."""
MOST_PICTURES = 1500
FAILED_PICTURES = 24
NAMES_PER_FATE = 24
"""Of a fate other than `kept`, only so many names are looked at by themselves, the most frequent first."""
EIGHTHS = (0, 8, 4, 2, 6, 1, 7, 3, 5)
"""Where in a ranking labels are taken, in this order: the best, the worst, the middle one, the quarters, ..."""
VIEW_SIDE = 1000
"""Boxes and masks are given in a frame whose longer side this is."""
PATH_CHARS = 4000
TOLERANCES = (1.5, 3.0, 6.0, 12.0, 24.0, 48.0)
"""How far an outline may lie from the mask, in the frame's units: the first that makes the path short enough."""
TEXT_CHARS = 2000
"""Longer answers are cut."""
LIST_ITEMS = 50
DEPTH = 4

KEPT, FAILED = "kept", "failed"


class ShownImage(msgspec.Struct, frozen=True):
    """An image of the sample."""

    key: str
    id: int
    width: int | None
    """Pixels of the upright original; None where nobody knows them."""
    height: int | None
    view: tuple[int, int]
    """Width and height of the frame of its boxes and masks."""


class Card(msgspec.Struct, frozen=True):
    """A region, or an image that failed: then only `image`, `fate` and `reason` are set, and `evidence` says more."""

    image: int
    """Place among the images of the sample."""
    fate: str
    reason: str | None = None
    name: str | None = None
    label: str | None = None
    """The answer that became the name."""
    score: float | None = None
    box: tuple[float, float, float, float] | None = None
    """x0, y0, x1, y1 in the frame of the image's `view`."""
    path: str = ""
    """Outline of the mask as an SVG path, to be filled even-odd."""
    evidence: dict[str, Any] = {}


@dataclass(frozen=True)
class Sample:
    """What the gallery shows."""

    images: tuple[ShownImage, ...]
    cards: tuple[Card, ...]
    """By image, in the order of the record."""
    left_out: int
    """Regions of these images for which there was no room."""


@dataclass(frozen=True)
class _Place:
    row: int
    region: int


def take_sample(
    con: duckdb.DuckDBPyConnection, gathered: Gathered, passes: Sequence[LabelPass], most_bytes: int
) -> Sample:
    """Choose images and read their regions, masks and evidence.

    Args:
        con: has `settled` (regions.parquet of the final) and `images` (a row an image).
        gathered: the chunks that the final was made from; only those of chosen images are read.
        passes: of the run.
        most_bytes: room for the cards, as JSON.
    """
    picks = choose_labels(con)
    rows = list(dict.fromkeys(pick.row for pick in picks))
    failed = choose_failed(con)
    query = con.execute
    sizes = query(
        "select row, key, image_id, width, height from images where row in ? order by row", [[*rows, *failed]]
    ).fetchall()
    images = {row: ShownImage(key, id_, width, height, _view(width, height)) for row, key, id_, width, height in sizes}
    place = {row: index for index, row in enumerate(images)}
    settled = query(
        "select row, region, fate, reason, name, label, score, x0, y0, x1, y1 from settled "
        "where row in ? order by row, region",
        [rows],
    ).fetchall()
    found = {_Place(line[0], line[1]): line[2:] for line in settled}
    nested = read_regions(gathered, passes, rows)
    details = query("select row, reason, detail from images where row in ? order by row", [failed]).fetchall()
    cards: dict[_Place, Card] = {}
    room = most_bytes
    for row, reason, detail in details:
        card = Card(place[row], FAILED, reason, evidence={} if detail is None else {"detail": _plain(detail)})
        cards[_Place(row, 0)] = card
        room -= len(script_json(card))
    left_out = 0
    for where in dict.fromkeys([*picks, *found]):
        card = _card(place[where.row], images[where.row], found[where], nested[where.row][where.region])
        size = len(script_json(card))
        if size > room:
            left_out += 1
            continue
        cards[where] = card
        room -= size
    ordered = sorted(cards, key=lambda where: (where.row, where.region))
    return Sample(tuple(images.values()), tuple(cards[where] for where in ordered), left_out)


def read_regions(gathered: Gathered, passes: Sequence[LabelPass], rows: Sequence[int]) -> dict[int, list[Any]]:
    """Return row -> the regions of its newest record that did not fail, masks and evidence included."""
    paths = {(item.pass_index, item.chunk): item.path for item in gathered.chunks}
    found: dict[int, list[Any]] = {}
    for label_pass in reversed(passes):
        listed = np.asarray(label_pass.rows)
        places = np.flatnonzero(np.isin(listed, [row for row in rows if row not in found]))
        for chunk in np.unique(places // label_pass.chunk_size).tolist():
            if (label_pass.index, chunk) not in paths:
                continue
            table = pq.ParquetFile(paths[label_pass.index, chunk]).read(["row", "status", "regions"])
            wanted = np.isin(table["row"].to_numpy(), listed[places])
            for line in table.take(np.flatnonzero(wanted)).to_pylist():
                if line["status"] != FAILED:
                    found[line["row"]] = line["regions"]
    return found


def choose_labels(con: duckdb.DuckDBPyConnection, most_names: int = NAMES_PER_FATE) -> list[_Place]:
    """Return the labels of the sample, the most telling first, on at most `MOST_PICTURES` images.

    Args:
        con: has `settled`.
        most_names: of a fate other than `kept`.
    """
    by_fate = con.execute("select fate, count(*) from settled group by fate order by count(*) desc, fate").fetchall()
    fates = sorted((fate for fate, _ in by_fate), key=lambda fate: fate != KEPT)
    rank = {fate: index for index, fate in enumerate(fates)}
    ranked: list[tuple[tuple[Any, ...], _Place]] = []
    for fate, _, _, turn, where in _turns(con, "null"):
        # The first three of every fate come before all else, so that no fate is without a picture.
        ranked.append(((0 if turn < 3 else turn, 0, turn, rank[fate]), where))
    classes = 0
    names_of: dict[str, set[str]] = {}
    for fate, name, boxes, turn, where in _turns(con, "name"):
        names = names_of.setdefault(fate, set())
        if fate != KEPT and name not in names and len(names) >= most_names:
            continue
        classes += fate == KEPT and name not in names
        names.add(name)
        ranked.append(((turn + (1 if fate == KEPT else 2), 1, rank[fate], -boxes, name), where))
    most = min(MOST_PICTURES, max(PICTURES, classes + 3 * len(fates)))
    rows: set[int] = set()
    chosen = []
    for _, where in sorted(ranked, key=lambda item: (item[0], item[1].row, item[1].region)):
        if where.row in rows or len(rows) < most:
            rows.add(where.row)
            chosen.append(where)
    return list(dict.fromkeys(chosen))


def _turns(con: duckdb.DuckDBPyConnection, group: str) -> Iterator[tuple[str, str, int, int, _Place]]:
    """Yield (fate, name, boxes of the group, turn, place), the largest groups first; turn 0 is the group's best."""
    places = ", ".join(f"{eighth} * (boxes - 1) // 8" for eighth in EIGHTHS)
    rows = con.execute(
        "select * from (select fate, grouped, row, region, "
        "row_number() over (partition by fate, grouped order by score desc nulls last, row, region) - 1 as place, "
        f"count(*) over (partition by fate, grouped) as boxes from (select *, {group} as grouped from settled)) "
        f"where place in ({places}) {'and grouped is not null' if group != 'null' else ''} "
        "order by boxes desc, fate, grouped, place"
    ).fetchall()
    for fate, name, row, region, place, boxes in rows:
        turns = list(dict.fromkeys(eighth * (boxes - 1) // 8 for eighth in EIGHTHS))
        yield fate, name or "", boxes, turns.index(place), _Place(row, region)


def choose_failed(con: duckdb.DuckDBPyConnection) -> list[int]:
    """Return rows of images that failed, of every reason in turn."""
    rows = con.execute(
        "select row from (select row, reason, row_number() over (partition by reason order by row) as turn "
        "from images where status = 'failed') order by turn, reason limit ?",
        [FAILED_PICTURES],
    ).fetchall()
    return [row for (row,) in rows]


def _view(width: int | None, height: int | None) -> tuple[int, int]:
    if not width or not height:
        return VIEW_SIDE, VIEW_SIDE * 3 // 4
    longer = max(width, height)
    return max(1, round(width * VIEW_SIDE / longer)), max(1, round(height * VIEW_SIDE / longer))


def _card(image: int, shown: ShownImage, line: Sequence[Any], region: Mapping[str, Any]) -> Card:
    fate, reason, name, label, score, x0, y0, x1, y1 = line
    scale = 1.0 if not shown.width or not shown.height else VIEW_SIDE / max(shown.width, shown.height)
    box = tuple(round(value * scale, 1) for value in (x0, y0, x1, y1))
    more = {key: region[key] for key in ("text_id", "view") if region[key] is not None}
    mask, path = region["mask"], ""
    if mask is not None:
        try:
            path = outline_path(decode_mask(Rle((mask["height"], mask["width"]), mask["counts"])), shown.view)
        except ValueError as error:  # imported labels may hold anything
            more["mask"] = f"cannot be drawn: {error}"
    evidence = {key: _plain(value) for key, value in {**more, **(region["evidence"] or {})}.items()}
    score = None if score is None or not math.isfinite(score) else round(score, 5)
    return Card(image, fate, reason, name, label, score, (box[0], box[1], box[2], box[3]), path, evidence)


def outline_path(mask: NDArray[np.bool_], view: tuple[int, int]) -> str:
    """Return the outline of a mask as an SVG path, to be filled even-odd, no longer than it has to be.

    Args:
        mask: (H, W), of the whole picture at any resolution.
        view: width and height of the frame of the path.
    """
    height, width = mask.shape
    across, down = view[0] / width, view[1] / height
    rings, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    # Outlines run through the centres of pixels.
    scaled = [((ring.reshape(-1, 2) + 0.5) * (across, down)).astype(np.float32) for ring in rings]
    path = ""
    for tolerance in TOLERANCES:
        path = "".join(_ring_path(ring, tolerance) for ring in scaled)
        if len(path) <= PATH_CHARS:
            break
    return path


def _ring_path(ring: NDArray[np.float32], tolerance: float) -> str:
    if cv2.contourArea(ring) < (2 * tolerance) ** 2:
        return ""
    corners = cv2.approxPolyDP(ring, tolerance, closed=True).reshape(-1, 2).round().astype(int)
    if len(corners) < 3:
        return ""
    steps = np.diff(corners, axis=0).tolist()
    return f"M{corners[0, 0]} {corners[0, 1]}l" + " ".join(f"{x} {y}" for x, y in steps) + "z"


def script_json(value: object) -> bytes:
    """Return JSON that may stand in a script element: it cannot end the element."""
    text = msgspec.json.encode(value)
    return text.replace(b"&", b"\\u0026").replace(b"<", b"\\u003c").replace(b">", b"\\u003e")


def _plain(value: Any, depth: int = DEPTH) -> Any:
    """Return evidence of any recipe as what JSON knows, cut to what a reader can take in."""
    if isinstance(value, float):
        return round(value, 5) if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, Mapping | list | tuple) and depth == 0:
        return "..."
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        more = [f"... and {len(value) - LIST_ITEMS} more"] if len(value) > LIST_ITEMS else []
        return [_plain(item, depth - 1) for item in value[:LIST_ITEMS]] + more
    text = str(value)
    return text if len(text) <= TEXT_CHARS else f"{text[:TEXT_CHARS]}... ({len(text) - TEXT_CHARS} characters more)"
