"""The page as a reader meets it, in a browser."""

import json
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from playwright.sync_api import Browser, Dialog, Page, sync_playwright

import mill_jobs.report.page as page_module
from mill_jobs.config import RunConfig
from mill_jobs.evaluate import evaluate_final
from mill_jobs.final import latest_final
from mill_jobs.finalize import finalize_run
from mill_jobs.recipes.cotpl.evidence import EVIDENCE
from mill_jobs.report.page import READERS, read_pictures, write_report
from mill_jobs.report.sample import ShownImage
from mill_jobs.run import open_run, plan_run
from mill_shared.config import StorageConfig
from mill_shared.errors import ConfigError, CorruptError
from mill_shared.geometry import encode_masks
from mill_shared.keys import RunKeys
from mill_shared.plan import write_pass
from mill_shared.records import Box, ChunkMeta, ImageRecord, Region, RegionMask, encode_chunk
from oracle_run import OracleRun
from runs import mill

WIDTH, HEIGHT = 300, 200
HOSTILE = "<script>alert(1)</script>"
HOSTILE_ANSWER = "</script><img src=x onerror=alert(1)><!-- & \u2028 ' \""
IMAGES = 9
GONE, FAILED, MENDED = 7, 8, 6
"""Rows: a picture that is gone since, an image that failed, one that failed at first."""
CARD = "button.card"


def region(label: str | None, score: float | None, box: Box, fate: str = "foreground", reason: str | None = None,
           answer: str = "Yes") -> Region:  # fmt: skip
    mask = np.zeros((1, HEIGHT // 2, WIDTH // 2), bool)
    x0, y0, x1, y1 = (int(side) // 2 for side in box)
    mask[:, y0:y1, x0 : (x0 + x1) // 2] = True
    code = encode_masks(mask)[0].counts
    evidence = {
        "predicted_iou": 0.9, "stability": 0.8, "float_box": False,
        "answers": [{"question": "presence", "attempt": 0, "text": answer}],
    }  # fmt: skip
    return Region(
        box, fate, label=label, score=score, reason=reason, mask=RegionMask(HEIGHT // 2, WIDTH // 2, code),
        evidence=evidence,
    )  # fmt: skip


def records() -> list[ImageRecord]:
    """Nine images: six cats from 0.9 down to 0.4, a hostile name twice, and one of each other fate."""
    big, small = (20.0, 20.0, 220.0, 180.0), (200.0, 50.0, 290.0, 150.0)
    found = [[region("cat", 0.9 - row / 10, big)] for row in range(6)]
    found[0].append(region(HOSTILE, 0.75, small, answer=HOSTILE_ANSWER))
    found[1].append(region(HOSTILE, 0.65, small))
    found[2].append(region("lamp", 0.95, small))
    found[3].append(region("tree", 0.85, small))
    found[4].append(region("sky", 0.99, small, fate="background"))
    found[5].append(region(None, None, small, fate="undecided", reason="parse_name"))
    found += [[], [region("cat", 0.35, big)], []]
    return [
        ImageRecord(
            row=row, image_id=row + 1, key=f"{row + 1}.jpg", status="ok" if regions else "failed", width=WIDTH,
            height=HEIGHT, regions=tuple(regions), reason=None if regions else "truncated",
            detail=None if regions else "ended too <b>early</b>",
        )
        for row, regions in enumerate(found)
    ]  # fmt: skip


def picture(seed: int) -> bytes:
    """Noise, which no JPEG makes small."""
    noise = np.random.default_rng(seed).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    done, data = cv2.imencode(".jpg", noise, [cv2.IMWRITE_JPEG_QUALITY, 95])
    assert done
    return data.tobytes()


@dataclass(frozen=True)
class Reported:
    config: RunConfig
    run_file: Path
    page: Path
    """A copy: some tests write the report again, and otherwise."""
    stored: str

    def write(self) -> bytes:
        """Write the report again."""
        store, plan = open_run(self.config)
        return store.get(write_report(self.config, plan, store, latest_final(store, plan.run)))


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """Return a run of two passes, its final and its report."""
    folder = tmp_path_factory.mktemp("report")
    images = folder / "images"
    images.mkdir()
    for row in range(IMAGES):
        (images / f"{row + 1}.jpg").write_bytes(picture(row))
    tree = {
        "run": "shown",
        "store": str(folder / "store"),
        "dataset": {"images": str(images)},
        "sharding": {"chunk_size": 4},
        "limits": {"max_failed": 0.5},
        "recipe": {
            "name": "cotpl",
            "finalize": {"profile": "reference", "selection": {"by": "count", "count": 2}},
        },
    }
    run_file = folder / "run.yaml"
    run_file.write_text(json.dumps(tree))
    config = RunConfig.model_validate(tree)
    store, plan = plan_run(config)
    first = records()

    def commit(index: int, chunk: int, lines: list[ImageRecord]) -> None:
        meta = ChunkMeta(label_digest=plan.label_digest, pass_index=index, chunk=chunk)
        store.put_new(RunKeys(plan.run).chunk(index, chunk), encode_chunk(lines, meta, EVIDENCE))

    for chunk in range(3):
        commit(0, chunk, first[chunk * 4 : chunk * 4 + 4])
    write_pass(store, plan, 1, [MENDED, FAILED], [])
    mended = region("dog", 0.5, (5.0, 5.0, 105.0, 105.0), answer="second pass")
    again = ImageRecord(
        row=MENDED, image_id=MENDED + 1, key="7.jpg", status="ok", width=WIDTH, height=HEIGHT,
        regions=(mended, region("dog", 0.45, (50.0, 50.0, 150.0, 150.0))),
    )  # fmt: skip
    commit(1, 0, [again, first[FAILED]])
    finalize_run(config, plan, store)
    (images / f"{GONE + 1}.jpg").unlink()
    (images / f"{FAILED + 1}.jpg").write_bytes(b"\xff\xd8 cut")
    key = write_report(config, plan, store, latest_final(store, plan.run))
    page = folder / "page.html"
    store.get_file(key, page)
    return Reported(config, run_file, page, f"{config.store}/{key}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("these tests need a browser: apt-get install chromium")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser: Browser, reported: Reported) -> Iterator[Callable[..., Page]]:
    """Return a function that opens the report; at the end, nothing was fetched, asked or complained about."""
    troubles: list[str] = []
    pages: list[Page] = []

    def open_(**options: Any) -> Page:
        page = browser.new_page(**options)
        page.on("request", lambda request: troubles.append(request.url) if not is_own(request.url) else None)
        page.on("dialog", refuse)
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(own)
        pages.append(page)
        return page

    own = reported.page.as_uri()

    def refuse(dialog: Dialog) -> None:
        troubles.append(dialog.message)
        dialog.dismiss()

    def is_own(url: str) -> bool:
        return url == own or url.startswith("blob:")

    yield open_
    for page in pages:
        page.close()
    assert troubles == []


def shown(page: Page) -> list[tuple[str, str]]:
    """Return (name, score) of each card."""
    return [
        (card.locator(".name").inner_text(), card.locator(".num").inner_text()) for card in page.locator(CARD).all()
    ]


def choose(page: Page, *, name: str | None = None, fate: str | None = None, order: str | None = None) -> None:
    for select, value in (("#by-name", name), ("#by-fate", fate), ("#by-order", order)):
        if value is not None:
            page.locator(select).select_option(value)


CATS = ["0.900", "0.800", "0.700", "0.600", "0.500", "0.400", "0.350"]


def test_the_first_screen_says_how_many_of_what_how_good_and_what_was_lost(open_page: Callable[..., Page]) -> None:
    page = open_page(viewport={"width": 1280, "height": 800})
    assert page.locator("h1").inner_text() == "11 pseudo-labels of 3 classes"
    assert "on 8 of 9 images" in page.locator(".lead").inner_text()
    tiles = page.locator(".tiles").inner_text()
    for text in ("of 15 regions", "median score", "1 truncated", "8 ok, 1 failed"):
        assert text in tiles
    lost = page.locator(".steps").inner_text()
    for text in ("1 background", "1 undecided (parse name)", "1 excluded", "1 not selected"):
        assert text in lost
    top = page.locator("table", has=page.locator(".steps")).or_(page.locator(".two .panel").first).inner_text()
    assert re.search(r"cat\s+7", top)
    box = page.locator(".steps").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] < 800


def test_kept_labels_are_shown_first_best_first(open_page: Callable[..., Page]) -> None:
    names = shown(open_page())
    assert names == sorted(names, key=lambda item: -float(item[1]))
    assert [score for name, score in names if name == "cat"] == CATS
    assert {name for name, _ in names} == {"cat", "dog", HOSTILE}


def test_filters_change_what_is_shown(open_page: Callable[..., Page]) -> None:
    page = open_page()
    choose(page, name="=cat")
    assert shown(page) == [("cat", score) for score in CATS]
    assert "7 of 7" in page.locator("#status").inner_text()
    choose(page, name="", fate="background")
    assert shown(page) == [("sky", "0.990")]
    choose(page, fate="not_selected")
    assert shown(page) == [("lamp", "0.950")]
    choose(page, fate="excluded")
    assert shown(page) == [("tree", "0.850")]
    choose(page, fate="undecided")
    assert shown(page) == [("(no name)", "")]
    choose(page, fate="failed")
    assert shown(page) == [("image failed", "")]
    choose(page, fate="")
    assert len(shown(page)) == 16
    choose(page, name="=dog", fate="excluded")
    assert shown(page) == []
    assert "Nothing in the sample" in page.locator("#cards").inner_text()


def test_the_score_filter_is_a_range_and_reset_brings_all_back(open_page: Callable[..., Page]) -> None:
    page = open_page()
    choose(page, name="=cat")
    page.locator("#score-from").fill("60")
    assert [score for _, score in shown(page)] == CATS[:4]
    page.locator("#score-to").fill("75")
    assert [score for _, score in shown(page)] == ["0.700", "0.600"]
    assert page.locator("#score-text").inner_text() == "0.60 to 0.75"
    page.get_by_role("button", name="Reset").click()
    page.wait_for_function("document.querySelectorAll('button.card').length === 11")


def test_the_worst_come_first_and_those_without_score_always_last(open_page: Callable[..., Page]) -> None:
    page = open_page()
    choose(page, fate="", order="worst")
    scores = [score for _, score in shown(page)]
    assert scores[:2] == ["0.350", "0.400"]
    assert scores[-2:] == ["", ""]
    choose(page, order="best")
    assert [score for _, score in shown(page)][-2:] == ["", ""]
    choose(page, order="image")
    names = [name for name, _ in shown(page)]
    assert names[:4] == ["cat", HOSTILE, "cat", HOSTILE]


def test_a_class_of_a_table_leads_to_its_labels(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.locator("#classes").get_by_role("button", name="lamp").click()
    page.wait_for_function("document.querySelectorAll('button.card').length === 1")
    assert shown(page) == [("lamp", "0.950")]


def test_keys_walk_the_gallery_open_a_label_and_close_it(open_page: Callable[..., Page]) -> None:
    page = open_page(viewport={"width": 1000, "height": 800})
    choose(page, name="=cat")
    focused = "document.activeElement.getAttribute('aria-label')"
    page.locator("#masks").focus()
    for _ in range(2):
        page.keyboard.press("Tab")
    assert page.evaluate(focused).startswith("cat, kept, score 0.900"), "the gallery is one stop of the tab key"
    columns = page.evaluate("columns()")
    assert columns == 4
    for key, score in (
        ("ArrowRight", CATS[1]), ("ArrowDown", CATS[5]), ("ArrowUp", CATS[1]), ("ArrowLeft", CATS[0]),
        ("ArrowLeft", CATS[0]), ("End", CATS[6]), ("Home", CATS[0]), ("ArrowRight", CATS[1]),
    ):  # fmt: skip
        page.keyboard.press(key)
        assert page.evaluate(focused).startswith(f"cat, kept, score {score}"), key
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    assert "0.8000" in dialog.inner_text()
    page.keyboard.press("ArrowRight")
    assert "0.7000" in dialog.inner_text()
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert page.evaluate(focused).startswith("cat, kept, score 0.700"), "the focus goes back to what was seen last"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert outline == "3px"


def test_a_label_shows_its_answers_its_mask_and_its_neighbours(open_page: Callable[..., Page]) -> None:
    page = open_page()
    choose(page, name="=dog")
    page.locator(CARD).first.click()
    text = page.locator("#facts").inner_text()
    for part in ("predicted iou", "0.9", "second pass", "100 x 100 px at 5, 5", "7.jpg", "Also on this picture (1)"):
        assert part in text, part
    mask, box = (page.locator(f"#stage .overlay {part}").bounding_box() for part in (".mask", ".box"))
    assert mask is not None
    assert box is not None
    assert mask["width"] / box["width"] == pytest.approx(0.5, abs=0.04), "the left half of the box"
    page.locator("#dialog-masks").uncheck()
    assert not page.locator("#stage .overlay .mask").is_visible()
    page.locator("#dialog-all").check()
    assert page.locator("#stage .overlay").count() == 2
    page.locator("#facts").get_by_role("button", name="dog").click()
    assert "0.4500" in page.locator("#facts").inner_text()


def test_names_and_answers_of_a_model_stay_text(open_page: Callable[..., Page]) -> None:
    page = open_page()
    assert page.locator("#classes td", has_text=HOSTILE).count() == 1
    choose(page, name="=" + HOSTILE)
    assert [name for name, _ in shown(page)] == [HOSTILE, HOSTILE]
    page.locator(CARD).first.click()
    assert HOSTILE_ANSWER.split("\u2028")[0] in page.locator("#facts").inner_text()
    page.keyboard.press("Escape")
    choose(page, name="", fate="failed")
    page.locator(CARD).first.click()
    assert "ended too <b>early</b>" in page.locator("#facts").inner_text()
    assert page.locator("script").count() == 3
    assert page.locator("img").count() == 0


def test_no_other_script_runs_and_nothing_can_be_fetched(open_page: Callable[..., Page], reported: Reported) -> None:
    text = reported.page.read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None
    assert "default-src &#39;none&#39;" in policy.group(1)
    assert "unsafe" not in policy.group(1)
    assert not re.search(r"""(?:src|href)=["'](?!#)""", re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))
    open_page()


def test_a_picture_that_cannot_be_read_is_a_placeholder_with_its_box(open_page: Callable[..., Page]) -> None:
    page = open_page()
    choose(page, name="=cat", order="worst")
    card = page.locator(CARD).first
    assert "no picture" in card.inner_text()
    assert card.locator("image").count() == 0
    assert card.locator(".overlay .box").count() == 1
    assert page.locator(CARD).nth(1).locator("image").count() == 1
    card.click()
    assert "no picture: the file is gone" in page.locator("#stage").inner_text()
    page.keyboard.press("Escape")
    choose(page, name="", fate="failed")
    page.locator(CARD).first.click()
    assert re.search("no picture: (truncated|not_an_image|decode): ", page.locator("#stage").inner_text())


def test_pictures_are_really_drawn(open_page: Callable[..., Page]) -> None:
    page = open_page()
    choose(page, name="=dog")
    page.locator(CARD).first.click()
    page.wait_for_timeout(100)
    seen = cv2.imdecode(np.frombuffer(page.locator("#stage image").screenshot(), np.uint8), cv2.IMREAD_COLOR)
    assert seen is not None
    assert seen.std() > 20, "noise, not a plain frame"


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_the_width(open_page: Callable[..., Page], width: int) -> None:
    page = open_page(viewport={"width": width, "height": 800})
    page.locator(CARD).first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("dialog").evaluate("made => made.scrollWidth <= made.clientWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(open_page: Callable[..., Page], scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    style = "getComputedStyle(document.documentElement)"

    def luminance(name: str) -> float:
        code = page.evaluate(f"{style}.getPropertyValue('--{name}')").strip().lstrip("#")
        channels = [int(code[start : start + 2], 16) / 255 for start in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for ink in ("ink", "muted", "accent", "kept", "other", "failed"):
        for paper in ("panel", "paper", "sunk"):
            light, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{ink} on {paper}"


# Without a browser


def test_the_same_input_gives_the_same_bytes(reported: Reported) -> None:
    assert reported.write() == reported.page.read_bytes()


def test_the_page_keeps_to_its_limit_with_smaller_pictures(reported: Reported, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = len(reported.page.read_bytes())
    frame = whole - sum(len(text) for text in re.findall(rb'"jpeg":"([^"]+)"', reported.page.read_bytes()))
    limit = frame + (whole - frame) // 4
    monkeypatch.setattr(page_module, "PAGE_BYTES", limit)
    data = reported.write()
    assert limit * 0.5 < len(data) <= limit
    pictures = json.loads(data.split(b'id="pictures">')[1].split(b"</script>")[0])
    assert len(pictures) == IMAGES
    assert sum("jpeg" in picture for picture in pictures) == IMAGES - 2, "all that can be read"
    monkeypatch.setattr(page_module, "PAGE_BYTES", frame + 1000)
    data = reported.write()
    assert len(data) <= frame + 1000
    assert b"no room for it on this page" in data


def test_regions_without_room_are_counted(reported: Reported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "CARDS_BYTES", 3000)
    text = reported.write().decode()
    found = re.search(r"A sample: (\d+) labels .*?; (\d+) regions of these images had no room", text)
    assert found is not None
    assert int(found.group(1)) + int(found.group(2)) == 16


def test_pictures_that_are_elsewhere_now_cost_nothing_but_themselves(reported: Reported, tmp_path: Path) -> None:
    dataset = reported.config.dataset.model_copy(update={"images": str(tmp_path / "gone")})
    config = reported.config.model_copy(update={"dataset": dataset})
    text = replace(reported, config=config).write().decode()
    assert "dataset.images: no such folder" in text
    assert '"jpeg"' not in text.split('id="pictures">')[1].split("</script>")[0]


def test_a_store_that_is_down_is_asked_once_and_leaves_placeholders(
    reported: Reported, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "nobody")
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        config = reported.config.model_copy(
            update={
                "dataset": reported.config.dataset.model_copy(update={"images": "s3://bucket/images"}),
                "storage": StorageConfig(endpoint=endpoint, region="us-east-1"),
            }
        )
        shown = [ShownImage(f"{number}.jpg", number, None, None, (4, 3)) for number in range(200)]
        found = read_pictures(config, shown, 1_000_000)
    whys = [picture.why for picture in found]
    assert all("Could not connect" in (why or "") for why in whys)
    assert len(set(whys)) <= READERS


def test_the_command_says_where_the_page_is_and_writes_it(reported: Reported, tmp_path: Path) -> None:
    ended = mill("report", reported.run_file, "--to", tmp_path / "page.html")
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "page.html").read_bytes() == reported.page.read_bytes()
    ended = mill("report", reported.run_file)
    assert ended.stdout.strip() == reported.stored
    ended = mill("report", reported.run_file, "--final", "0000000000000000")
    assert ended.returncode == 78
    assert "no final 0000000000000000" in ended.stderr


def test_an_evaluation_is_on_the_page_and_a_damaged_one_is_an_error(oracle_run: OracleRun) -> None:
    run = oracle_run
    found = evaluate_final(run.config, run.plan, run.store, run.final, run.truth)
    key = write_report(run.config, run.plan, run.store, run.final)
    text = run.store.get(key).decode()
    score = found.subsets["all"].ap50
    assert score is not None
    assert f"{score:.3f} AP50" in text
    assert "rightly named" in text
    damaged = RunKeys(run.plan.run).evaluation(run.final, "damaged", "evaluation.json")
    run.store.put(damaged, b"{")
    try:
        with pytest.raises(CorruptError, match=r"damaged/evaluation\.json: cannot be read"):
            write_report(run.config, run.plan, run.store, run.final)
    finally:
        (Path(run.config.store) / damaged).unlink()
    with pytest.raises(ConfigError, match="no final ffff"):
        write_report(run.config, run.plan, run.store, "ffff")
