"""The page: numbers of the whole final, a sample of its labels with their pictures, and nothing from outside.

Names and answers come from a model, so they are text everywhere: the template escapes, the script writes text nodes,
and the page's policy lets no other script run and nothing be fetched.
"""

import base64
import hashlib
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import duckdb
import jinja2
import msgspec
import numpy as np
import structlog
from markupsafe import Markup
from numpy.typing import NDArray

from mill_jobs.config import RunConfig
from mill_jobs.evaluate import Evaluation, Scores, gather_final, same_name
from mill_jobs.final import Manifest, fetch_final, read_manifest
from mill_jobs.finalize import record_table
from mill_jobs.recipes.base import ClassRow, Summary
from mill_jobs.report.sample import KEPT, Sample, ShownImage, script_json, take_sample
from mill_jobs.run import open_images
from mill_jobs.trainer.classes import ClassEntry, ClassList
from mill_shared.errors import ConfigError, CorruptError, ImageError, KeyMissing, OutsideError
from mill_shared.keys import RunKeys
from mill_shared.pictures import decode_picture
from mill_shared.plan import RunPlan, read_passes
from mill_shared.storage import Store

log = structlog.get_logger()

PAGE_BYTES = 20_000_000
"""The page is never larger."""
CARDS_BYTES = 6_000_000
"""The part of it that boxes, masks and answers may take."""
JPEGS = ((640, 80), (640, 65), (512, 70), (400, 65), (288, 60), (200, 50), (120, 40))
"""(longer side in pixels, quality), the best that fits the picture's share of the page."""
WHY_CHARS = 200
PICTURES_AT_ONCE = 16
READERS = 8
OTHER_NAMES = 100
"""Of the names that became no class, so many are listed."""
TOP_CLASSES = 10
SCORE_BARS = 20
MOST_PER_IMAGE = 20
"""The last bar of boxes per image counts this many and more."""
TEMPLATE = Path(__file__).parent / "template.html"


class _Picture(msgspec.Struct, frozen=True, omit_defaults=True):
    jpeg: str | None = None
    """Base64."""
    why: str | None = None
    """Why there is none."""


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram."""

    label: str
    kept: int
    other: int


@dataclass(frozen=True)
class Histogram:
    """A distribution over the whole final."""

    title: str
    caption: str
    bars: tuple[Bar, ...]
    unit: str
    """What is counted."""

    @property
    def tallest(self) -> int:
        """The height of the highest bar, at least 1."""
        return max([1, *(bar.kept + bar.other for bar in self.bars)])


@dataclass(frozen=True)
class Totals:
    """Numbers of the whole final."""

    regions: int
    """Those that were asked about."""
    kept: int
    labelled_images: int
    """Images with a kept label."""
    median_score: float | None
    fates: tuple[tuple[str, int], ...]
    """Regions by fate, `kept` first, then the most frequent."""
    histograms: tuple[Histogram, ...]


@dataclass(frozen=True)
class ClassLine:
    """One class or name."""

    row: ClassRow
    entry: ClassEntry | None
    scores: Scores | None


def write_report(config: RunConfig, plan: RunPlan, store: Store, digest: str) -> str:
    """Make the report of a final, store it beside the final and return its key.

    Pictures that cannot be read are placeholders. The same final, pictures and evaluations give the same bytes.

    Raises:
        ConfigError: no such final.
        CorruptError: a file of the final is missing or damaged.
    """
    manifest = read_manifest(store, plan.run, digest)
    if manifest is None:
        raise ConfigError(f"run {plan.run}: no final {digest}; see the refs, or make one with `mill finalize`")
    evaluations = read_evaluations(store, plan.run, digest)
    with tempfile.TemporaryDirectory(prefix="mill-report-") as name:
        scratch = Path(name)
        names = ("regions.parquet", "classes.json", "summary.json")
        fetch_final(store, plan.run, digest, scratch, names)
        summary = msgspec.json.decode((scratch / "summary.json").read_bytes(), type=Summary)
        classes = ClassList.from_json((scratch / "classes.json").read_bytes())
        gathered = gather_final(store, plan, digest, scratch)
        with record_table(gathered, plan, scratch) as table:
            con = table.connection
            con.execute(
                "create temp table images as "
                "select row, image_id, key, width, height, status, reason, detail from records"
            )
            con.read_parquet(str(scratch / "regions.parquet")).create_view("settled")
            totals = count_totals(con)
            sample = take_sample(con, gathered, read_passes(store, plan), CARDS_BYTES)
    page = _Page(manifest, summary, classes, totals, sample, evaluations)
    room = PAGE_BYTES - len(page.render(()))
    pictures = read_pictures(config, sample.images, room)
    data = page.render(pictures)
    assert len(data) <= PAGE_BYTES, "every picture keeps to its share"
    key = RunKeys(plan.run).report(digest, "report.html")
    store.put(key, data)
    shown = sum(picture.jpeg is not None for picture in pictures)
    log.info("report written", key=key, size_bytes=len(data), pictures=shown, placeholders=len(pictures) - shown)
    return key


def read_evaluations(store: Store, run: str, digest: str) -> list[Evaluation]:
    """Return the evaluations of a final, one a truth.

    Raises:
        CorruptError: one cannot be read.
    """
    found = []
    for entry in store.list(RunKeys(run).evaluations(digest)):
        if not entry.key.endswith("/evaluation.json"):
            continue
        try:
            found.append(msgspec.json.decode(store.get(entry.key), type=Evaluation))
        except msgspec.DecodeError as error:
            raise CorruptError(f"{entry.key}: cannot be read: {error}; evaluate the final again") from error
    return found


# Numbers


def count_totals(con: duckdb.DuckDBPyConnection) -> Totals:
    """Count the regions of a final; `con` has `settled` and `images`."""
    query = con.execute
    fates = query("select fate, count(*) from settled group by fate order by fate <> ?, 2 desc, fate", [KEPT])
    counted = tuple(fates.fetchall())
    kept, images, median = query(
        "select count(*), count(distinct row), median(score) from settled where fate = ?", [KEPT]
    ).fetchall()[0]
    histograms = (_score_histogram(con), _images_histogram(con), _area_histogram(con))
    return Totals(
        regions=sum(count for _, count in counted), kept=kept, labelled_images=images, median_score=median,
        fates=counted, histograms=tuple(found for found in histograms if found is not None),
    )  # fmt: skip


def _counts(con: duckdb.DuckDBPyConnection, expression: str) -> dict[int, tuple[int, int]]:
    """Return value of an expression -> (kept regions, others)."""
    rows = con.execute(
        f"select {expression} as bar, count(*) filter (fate = '{KEPT}'), count(*) filter (fate <> '{KEPT}') "
        "from settled group by bar having bar is not null"
    ).fetchall()
    return {int(bar): (kept, other) for bar, kept, other in rows}


def _score_histogram(con: duckdb.DuckDBPyConnection) -> Histogram | None:
    low, high, count = con.execute(
        "select min(score), max(score), count(score) from settled where isfinite(score)"
    ).fetchall()[0]
    if not count:
        return None
    low, high = min(0.0, low), max(1.0, high)
    width = (high - low) / SCORE_BARS
    counts = _counts(
        con, f"case when isfinite(score) then least({SCORE_BARS - 1}, floor((score - {low!r}) / {width!r})) end"
    )
    bars = [
        Bar(f"{low + place * width:.2f} to {low + (place + 1) * width:.2f}", *counts.get(place, (0, 0)))
        for place in range(SCORE_BARS)
    ]
    quarters = con.execute(
        "select quantile_cont(score, [0.25, 0.5, 0.75]) from settled where fate = ? and isfinite(score)", [KEPT]
    ).fetchall()[0][0]
    caption = "no label has a score"
    if quarters:
        caption = f"half of the labels lie between {quarters[0]:.2f} and {quarters[2]:.2f}, the median is " + (
            f"{quarters[1]:.2f}"
        )
    return Histogram("Scores", caption, tuple(bars), "regions")


def _images_histogram(con: duckdb.DuckDBPyConnection) -> Histogram | None:
    rows = con.execute(
        f"select least({MOST_PER_IMAGE}, coalesce(labels, 0)) as bar, count(*), max(coalesce(labels, 0)) from images "
        f"left join (select row, count(*) as labels from settled where fate = '{KEPT}' group by row) using (row) "
        "where status <> 'failed' group by bar order by bar"
    ).fetchall()
    if not rows:
        return None
    counts = {bar: count for bar, count, _ in rows}
    most = max(highest for _, _, highest in rows)
    bars = [
        Bar(f"{place} or more" if place == MOST_PER_IMAGE else str(place), counts.get(place, 0), 0)
        for place in range(min(MOST_PER_IMAGE, most) + 1)
    ]
    return Histogram("Labels per image", f"{counts.get(0, 0):,} images have none, the most is {most:,}",
                     tuple(bars), "images")  # fmt: skip


def _area_histogram(con: duckdb.DuckDBPyConnection) -> Histogram | None:
    counts = _counts(con, "floor(log2(greatest(1, (x1 - x0) * (y1 - y0))))")
    if not counts:
        return None
    sides = {place: f"{2 ** (place / 2):,.0f} to {2 ** ((place + 1) / 2):,.0f} px" for place in counts}
    bars = [Bar(sides.get(place, ""), *counts.get(place, (0, 0))) for place in range(min(counts), max(counts) + 1)]
    (side,) = con.execute(
        "select median(sqrt(greatest(0, (x1 - x0) * (y1 - y0)))) from settled where fate = ?", [KEPT]
    ).fetchall()[0]
    caption = "no labels" if side is None else f"the median label is as large as a square of {side:,.0f} px"
    return Histogram("Box sizes", caption + ", square root of the area", tuple(bars), "regions")


# Pictures


def read_pictures(config: RunConfig, images: Sequence[ShownImage], room: int) -> list[_Picture]:
    """Read and shrink the pictures of the sample; what one leaves of its share goes to the next ones.

    Args:
        config: where they are.
        images: which.
        room: bytes that all of them may take in the page.
    """
    found: list[_Picture] = []
    load = _loader(config)
    with ThreadPoolExecutor(READERS, thread_name_prefix="report") as pool:
        for start in range(0, len(images), PICTURES_AT_ONCE):
            for loaded in pool.map(load, [image.key for image in images[start : start + PICTURES_AT_ONCE]]):
                picture = _encode(loaded, room // (len(images) - len(found)))
                room -= len(script_json(picture)) + 1
                found.append(picture)
    return found


def _loader(config: RunConfig) -> Callable[[str], NDArray[np.uint8] | str]:
    """Return a function from a key to the picture, or why there is none; it gives up on a store that is down."""
    try:
        store = open_images(config)
    except ConfigError as error:
        why = str(error)
        return lambda key: why
    down: list[str] = []

    def load(key: str) -> NDArray[np.uint8] | str:
        if down:
            return down[0]
        try:
            data = store.get(key)
            return decode_picture(data, max_side=JPEGS[0][0], max_pixels=config.dataset.max_pixels).image_rgb
        except KeyMissing:
            return "the file is gone"
        except ImageError as error:
            return f"{error.reason}: {error}"
        except (ConfigError, OutsideError) as error:
            down.append(str(error))
            return str(error)

    return load


def _encode(loaded: NDArray[np.uint8] | str, share: int) -> _Picture:
    """Return the best JPEG that fits a share of the page."""
    if isinstance(loaded, str):
        return _Picture(why=loaded[:WHY_CHARS])
    longer = max(loaded.shape[:2])
    for side, quality in JPEGS:
        image = loaded
        if side < longer:
            size = tuple(max(1, round(length * side / longer)) for length in loaded.shape[1::-1])
            image = cv2.resize(loaded, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
        done, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        assert done, "a picture of 8 bits always encodes"
        picture = _Picture(jpeg=base64.b64encode(data.tobytes()).decode())
        if len(script_json(picture)) < share:
            return picture
    return _Picture(why="no room for it on this page")


# The page


@dataclass(frozen=True)
class _Page:
    manifest: Manifest
    summary: Summary
    classes: ClassList
    totals: Totals
    sample: Sample
    evaluations: Sequence[Evaluation]

    def render(self, pictures: Sequence[_Picture]) -> bytes:
        source = TEMPLATE.read_text(encoding="utf-8")
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters["number"] = lambda value: "-" if value is None else f"{value:,}"
        environment.filters["score"] = lambda value: "-" if value is None else f"{value:.3f}"
        environment.filters["percent"] = lambda part, whole: f"{100 * part / max(1, whole):.1f} %"
        environment.filters["most"] = lambda counts: sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        environment.filters["words"] = lambda text: text.replace("_", " ")
        kept, other = self._class_lines()
        shown = {"images": self.sample.images, "cards": self.sample.cards, "fates": dict(self.totals.fates)}
        text = environment.from_string(source).render(
            manifest=self.manifest,
            summary=self.summary,
            totals=self.totals,
            evaluations=self.evaluations,
            best=self.evaluations[0].subsets.get("all") if self.evaluations else None,
            kept=kept,
            top=sorted(kept, key=lambda line: -(line.entry.boxes if line.entry else 0))[:TOP_CLASSES],
            other=other[:OTHER_NAMES],
            other_more=(len(other[OTHER_NAMES:]), sum(line.row.boxes for line in other[OTHER_NAMES:])),
            files_bytes=sum(file.size_bytes for file in self.manifest.files),
            settings=msgspec.json.format(msgspec.json.encode(self.manifest.finalize), indent=2).decode(),
            pictures=len(self.sample.images),
            cards=len(self.sample.cards),
            left_out=self.sample.left_out,
            policy=_policy(source),
            data=Markup(script_json(shown).decode()),
            picture_data=Markup(script_json(pictures).decode()),
        )
        return text.encode()

    def _class_lines(self) -> tuple[list[ClassLine], list[ClassLine]]:
        entries: Mapping[str, ClassEntry] = {entry.name: entry for entry in self.classes.classes}
        scores: Mapping[str, Scores] = self.evaluations[0].classes if self.evaluations else {}
        lines = [ClassLine(row, entries.get(row.name), scores.get(same_name(row.name))) for row in self.summary.classes]
        return [line for line in lines if line.row.kept], [line for line in lines if not line.row.kept]


def _policy(source: str) -> str:
    """Return the page's content security policy: its own script and style by their digests, pictures in the page."""

    def digest(tag: str) -> str:
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", source, re.DOTALL)
        return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; img-src blob:; script-src '{digest('script')}'; style-src '{digest('style')}'; "
        "base-uri 'none'; form-action 'none'"
    )
