"""CoT-PL's labeller on given masks and given answers: what is asked, and what becomes of every candidate."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from mill_jobs.recipes.base import Sample
from mill_jobs.recipes.cotpl import label as label_module
from mill_jobs.recipes.cotpl.config import LabelConfig
from mill_jobs.recipes.cotpl.evidence import EVIDENCE
from mill_jobs.recipes.cotpl.label import CotplLabeller
from mill_jobs.recipes.cotpl.prompts import DEFAULT_PROMPTS, LAYER_ANSWERS, PRESENCE_ANSWERS
from mill_jobs.recipes.cotpl.render import boost_colours, render_region
from mill_shared.errors import OutsideError
from mill_shared.geometry import Rle, decode_mask
from mill_shared.models.protocols import Answer, Masks, Question
from mill_shared.records import Box, ChunkMeta, ImageRecord, decode_chunk, encode_chunk

HEIGHT, WIDTH = 60, 80
GOOD = (0.95, 0.99)
FAULT = Answer("", error="the picture has no pixels")
ORACLE = {"kind": "oracle", "truth": "unused.json"}

Rectangle = tuple[int, int, int, int]
"""x, y, w, h in pixels."""
Image = dict[Rectangle, Sequence[str | Answer]]
"""The answers to each region's questions, in turn."""
LEFT, MIDDLE, RIGHT = (2, 5, 20, 30), (28, 10, 20, 30), (55, 20, 20, 30)


@dataclass
class GivenMasks:
    """Returns what it was given for an image."""

    found: dict[int, Masks]
    can_halve: bool = False

    def generate(self, image_rgb: NDArray[np.uint8], image_id: int) -> Masks:
        return self.found[image_id]

    def halve_batch(self) -> bool:
        return self.can_halve


@dataclass
class GivenAnswers:
    """Answers each region's questions from its own list, in turn, and records all batches."""

    table: dict[tuple[int, Box], Sequence[str | Answer]]
    can_halve: bool = False
    batches: list[list[Question]] = field(default_factory=list)

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        self.batches.append(list(questions))
        return [self._answer(question) for question in questions]

    def _answer(self, question: Question) -> Answer:
        found = self.table[question.image_id, question.box_xyxy][self._asked_before(question)]
        return found if isinstance(found, Answer) else Answer(found)

    def _asked_before(self, question: Question) -> int:
        return len(self.questions(question.image_id, question.box_xyxy)) - 1

    def questions(self, image_id: int, box_xyxy: Box) -> list[Question]:
        return [
            question
            for batch in self.batches
            for question in batch
            if (question.image_id, question.box_xyxy) == (image_id, box_xyxy)
        ]

    def halve_batch(self) -> bool:
        return self.can_halve


class AlwaysDog(GivenAnswers):
    """Every region is a foreground dog."""

    def _answer(self, question: Question) -> Answer:
        return Answer({"presence": "Yes", "name": "dog"}.get(question.asks, "Foreground"))


def half_open(rectangle: Rectangle) -> Box:
    x, y, w, h = rectangle
    return (float(x), float(y), float(x + w), float(y + h))


def masks_of(
    *candidates: tuple[Rectangle, tuple[float, float]], height: int = HEIGHT, width: int = WIDTH
) -> Masks:  # fmt: skip
    masks = np.zeros((len(candidates), height, width), bool)
    for mask, ((x, y, w, h), _) in zip(masks, candidates, strict=True):
        mask[y : y + h, x : x + w] = True
    ious, stabilities = (np.array([scores[i] for _, scores in candidates], np.float32) for i in (0, 1))
    return Masks(masks, ious, stabilities)


def sample(row: int, height: int = HEIGHT, width: int = WIDTH) -> Sample:
    picture = np.random.default_rng(row).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Sample(row, 100 + row, f"{row}.jpg", picture, width * 2, height * 2, 0.5)


def config(**changes: Any) -> LabelConfig:
    return LabelConfig.model_validate({"masks": ORACLE, "chat": ORACLE, "min_box_area_px": 100, **changes})


def label(images: Sequence[Image], **changes: Any) -> tuple[list[ImageRecord], GivenAnswers]:
    """Label images of disjoint, good regions with their answers; returns their records and what was asked."""
    masks = {100 + row: masks_of(*((rectangle, GOOD) for rectangle in image)) for row, image in enumerate(images)}
    chat = GivenAnswers(
        {
            (100 + row, half_open(rectangle)): answers
            for row, image in enumerate(images)
            for rectangle, answers in image.items()
        }
    )
    labeller = CotplLabeller(config(**changes), GivenMasks(masks), chat)
    return [outcome.record for outcome in labeller.label([sample(row) for row in range(len(images))])], chat


def label_masks(found: Masks, **changes: Any) -> ImageRecord:
    """Label one image; every region is a foreground dog."""
    height, width = found.masks.shape[1:]
    (outcome,) = CotplLabeller(config(**changes), GivenMasks({107: found}), AlwaysDog({})).label(
        [sample(7, height, width)]
    )
    return outcome.record


def kept(record: ImageRecord) -> list[tuple[str, int, str]]:
    (region,) = record.regions
    return [(answer["question"], answer["attempt"], answer["text"]) for answer in region.evidence["answers"]]


# Strict: fates, and what was asked on the way to them

SENTENCE = "It is a dog that runs over a field"
P0, P1, N0, N1, L0, L1 = (
    ("presence", 0), ("presence", 1), ("name", 0), ("name", 1), ("layer", 0), ("layer", 1)
)  # fmt: skip
STRICT = [
    (("Yes", "Zebra", "Foreground"), [P0, N0, L0], ("foreground", None, "zebra")),
    (("Yes.", "A Dog.", "background"), [P0, N0, L0], ("background", None, "dog")),
    (("No",), [P0], ("absent", "no", None)),
    (("Unsure",), [P0], ("absent", "unsure", None)),
    (("",), [P0], ("absent", "unsure", None)),
    (("No, eyes closed", "Yes", "Cat", "Foreground"), [P0, P1, N0, L0], ("foreground", None, "cat")),
    (("No, eyes closed", "No"), [P0, P1], ("absent", "no", None)),
    (("maybe", "maybe"), [P0, P1], ("undecided", "parse_presence", None)),
    (("Yes", SENTENCE, "Dog", "Foreground"), [P0, N0, N1, L0], ("foreground", None, "dog")),
    (("Yes", "", SENTENCE), [P0, N0, N1], ("undecided", "parse_name", None)),
    (("Yes", "Sky", "", "Background"), [P0, N0, L0, L1], ("background", None, "sky")),
    (("Yes", "Cup", "ground", "o"), [P0, N0, L0, L1], ("undecided", "parse_layer", None)),
    (("maybe", "Yes", "", "Cup", "o", "Foreground"), [P0, P1, N0, N1, L0, L1], ("foreground", None, "cup")),
    ((FAULT,), [P0], ("undecided", "error", None)),
    (("maybe", FAULT), [P0, P1], ("undecided", "error", None)),
    (("Yes", FAULT), [P0, N0], ("undecided", "error", None)),
    (("Yes", "", FAULT), [P0, N0, N1], ("undecided", "error", None)),
    (("Yes", "Cup", FAULT), [P0, N0, L0], ("undecided", "error", None)),
    (("Yes", "Cup", "o", FAULT), [P0, N0, L0, L1], ("undecided", "error", None)),
]


@pytest.mark.parametrize(("answers", "asked", "expected"), STRICT)
def test_strict_leads_every_region_to_a_fate_and_keeps_every_answer(
    answers: tuple[str | Answer, ...], asked: list[tuple[str, int]], expected: tuple[str, str | None, str | None]
) -> None:
    (record,), chat = label([{LEFT: answers}])
    (region,) = record.regions
    assert (region.fate, region.reason, region.label) == expected
    texts = [f"(no answer: {answer.error})" if isinstance(answer, Answer) else answer for answer in answers]
    assert kept(record) == [(*which, text) for which, text in zip(asked, texts, strict=True)]
    assert [question.asks for question in chat.questions(100, half_open(LEFT))] == [which for which, _ in asked]
    assert record.status == "ok"


def test_strict_asks_again_with_the_allowed_answers_alone_and_for_a_name_in_other_words() -> None:
    _, chat = label([{LEFT: ("maybe", "Yes", SENTENCE, "Wine glass", "o", "Foreground")}])
    layer = DEFAULT_PROMPTS.layer.replace("{name}", "wine glass")
    assert "{name}" in DEFAULT_PROMPTS.layer
    assert [(question.text, question.choices) for question in chat.questions(100, half_open(LEFT))] == [
        (DEFAULT_PROMPTS.presence, None),
        (DEFAULT_PROMPTS.presence, PRESENCE_ANSWERS),
        (DEFAULT_PROMPTS.name, None),
        (DEFAULT_PROMPTS.name_again, None),
        (layer, None),
        (layer, LAYER_ANSWERS),
    ]


def test_your_own_wording_is_asked(tmp_path: Path) -> None:
    wording = {"version": "mine", "presence": "p?", "name": "n?", "name_again": "n again?", "layer": "{name} or {name}"}
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump(wording))
    _, chat = label([{LEFT: ("Yes", "", "cup", "Foreground")}], prompts=tmp_path / "prompts.yaml")
    assert [batch[0].text for batch in chat.batches] == ["p?", "n?", "n again?", "cup or cup"]


# Reference. Source: specs/cotpl.md 8.4: Q1, Q2, Q3 and the original's result.

REFERENCE = [
    (("Yes", "Zebra", "Foreground"), ("foreground", None, "zebra")),
    (("Yes.", "A Dog.", "foreground"), ("foreground", None, "a dog.")),
    (("Answer: Yes", "Wine glass", "FOREGROUND"), ("foreground", None, "wine glass")),
    (("No",), ("absent", "no", None)),
    (("Unsure",), ("absent", "no", None)),
    (("",), ("absent", "no", None)),
    (("No, eyes closed", "Cat", "Foreground"), ("foreground", None, "cat")),
    (("YES it is", "Traffic Light\n", "Foreground."), ("background", None, "traffic light")),
    (("Yes", "Sky", "Background"), ("background", None, "sky")),
    (("Yes", "Sky", ""), ("foreground", None, "sky")),
    (("Yes", "Cup", "ground"), ("foreground", None, "cup")),
    (("Yes", "Cup", "The object is in the foreground"), ("background", None, "cup")),
    (("Yes", "", "Foreground"), ("foreground", None, "")),
    (("Yes", "  Cell  Phone ", "o"), ("foreground", None, "cell  phone")),
]


@pytest.mark.parametrize(("answers", "expected"), REFERENCE)
def test_reference_asks_each_question_once_and_reads_as_the_original(
    answers: tuple[str, ...], expected: tuple[str, str | None, str | None]
) -> None:
    (record,), chat = label([{LEFT: answers}], profile="reference")
    (region,) = record.regions
    assert (region.fate, region.reason, region.label) == expected
    assert kept(record) == [(*which, text) for which, text in zip([P0, N0, L0], answers, strict=False)]
    # The place of the name stays as it is written. Source: specs/cotpl.md 1.6.
    texts = [DEFAULT_PROMPTS.presence, DEFAULT_PROMPTS.name, DEFAULT_PROMPTS.layer][: len(answers)]
    asked = chat.questions(100, half_open(LEFT))
    assert [(question.text, question.choices) for question in asked] == [(text, None) for text in texts]


@pytest.mark.parametrize("answers", [(FAULT,), ("Yes", FAULT), ("Yes", "Cup", FAULT)])
def test_reference_loses_the_image_with_one_region_and_no_other_image(answers: tuple[str | Answer, ...]) -> None:
    good = ("Yes", "Dog", "Foreground")
    (lost, other), _ = label([{LEFT: good, RIGHT: answers}, {LEFT: good}], profile="reference")
    assert (lost.status, lost.reason, lost.regions) == ("failed", "answer", ())
    assert lost.detail == "the original loses the image with one region: (no answer: the picture has no pixels)"
    assert (lost.row, lost.image_id, lost.key, lost.width, lost.height) == (0, 100, "0.jpg", 160, 120)
    assert [region.label for region in other.regions] == ["dog"]


# Regions and images beside each other


def test_a_bad_region_costs_no_other_region_its_label() -> None:
    good = ("Yes", "Dog", "Foreground")
    images: list[Image] = [
        {LEFT: good, MIDDLE: (FAULT,), RIGHT: good},
        {LEFT: ("Yes", "Cup", FAULT), RIGHT: good},
    ]
    records, _ = label(images)
    assert [[region.fate for region in record.regions] for record in records] == [
        ["foreground", "undecided", "foreground"],
        ["undecided", "foreground"],
    ]


def test_one_batch_asks_one_question_of_all_regions_of_all_images() -> None:
    good = ("Yes", "Dog", "Foreground")
    images: list[Image] = [
        {LEFT: good, MIDDLE: ("No",), RIGHT: ("maybe", "Yes", "Cat", "Background")},
        {LEFT: ("Yes", "", "Cup", "Foreground")},
        {LEFT: good, RIGHT: ("Yes", "Sky", "o", "Background")},
    ]
    records, chat = label(images)
    assert [(batch[0].asks, len(batch)) for batch in chat.batches] == [
        ("presence", 6), ("presence", 1), ("name", 5), ("name", 1), ("layer", 5), ("layer", 1),
    ]  # fmt: skip
    assert [[region.label for region in record.regions] for record in records] == [
        ["dog", None, "cat"], ["cup"], ["dog", "sky"],
    ]  # fmt: skip
    _, chat = label([{LEFT: good, RIGHT: good}] * 3, profile="reference")
    assert [(batch[0].asks, len(batch)) for batch in chat.batches] == [("presence", 6), ("name", 6), ("layer", 6)]


def test_pictures_that_do_not_fit_are_asked_about_in_turn_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images: list[Image] = [
        {LEFT: ("Yes", "Dog", "Foreground"), RIGHT: ("No",)},
        {MIDDLE: ("Yes", "Sky", "Background")},
        {},
    ]
    together, chat = label(images)
    assert len(chat.batches) == 3
    monkeypatch.setattr(label_module, "PICTURES_BYTES", 1)
    in_turn, chat = label(images)
    assert [{question.image_id for question in batch} for batch in chat.batches] == [{100}] * 3 + [{101}] * 3
    assert in_turn == together


def test_all_questions_about_a_region_share_its_picture() -> None:
    _, chat = label([{LEFT: ("maybe", "Yes", "", "Cup", "o", "Foreground"), RIGHT: ("No",)}])
    first, *others = chat.questions(100, half_open(LEFT))
    assert len(others) == 5
    assert all(question.picture_rgb is first.picture_rgb for question in others)
    image = sample(0).image_rgb
    mask = masks_of((LEFT, GOOD)).masks[0]
    x, y, w, h = LEFT
    assert np.array_equal(first.picture_rgb, render_region(image, boost_colours(image), mask, (x, y, w - 1, h - 1)))


# Candidates that are not asked about, boxes, order

BIG = (0, 0, 40, 50)
CANDIDATES = (
    ((45, 0, 9, 11), GOOD),  # 99 pixels
    ((1, 0, 40, 50), (0.9, 0.9)),  # IoU with the big one 39/41
    (BIG, (0.95, 0.98)),
    ((0, 0, 0, 0), (0.99, 0.99)),
    ((5, 5, 10, 12), GOOD),  # inside the big one
    ((60, 30, 20, 20), (0.8, 0.7)),
    ((60, 0, 20, 20), (0.9, 0.95)),
)


def test_what_is_not_asked_about_keeps_its_box_score_and_reason() -> None:
    record = label_masks(masks_of(*CANDIDATES))
    assert [(drop.reason, drop.box_xyxy) for drop in record.dropped] == [
        ("small", (45, 0, 54, 11)),
        ("duplicate", (1, 0, 41, 50)),
        ("empty_mask", (0, 0, 0, 0)),
        ("inner", (5, 5, 15, 17)),
        ("low_score", (60, 30, 80, 50)),
    ]
    scores = [np.float64(np.float32(iou)) * np.float64(np.float32(stable)) for _, (iou, stable) in CANDIDATES]
    assert [drop.score for drop in record.dropped] == [scores[index] for index in (0, 1, 3, 4, 5)]
    assert [region.box_xyxy for region in record.regions] == [half_open(BIG), (60, 0, 80, 20)]
    assert [region.score for region in record.regions] == [scores[2], scores[6]]


def test_a_region_holds_its_mask_and_its_scores() -> None:
    found = masks_of(*CANDIDATES)
    region = label_masks(found).regions[1]
    assert region.mask is not None
    assert np.array_equal(decode_mask(Rle((region.mask.height, region.mask.width), region.mask.counts)), found.masks[6])
    assert region.evidence["predicted_iou"] == float(np.float32(0.9))
    assert region.evidence["stability"] == float(np.float32(0.95))


def test_records_fit_the_evidence_that_the_labeller_declares() -> None:
    records, _ = label([{LEFT: ("maybe", "Yes", "Cup", FAULT), RIGHT: ("No",)}, {}])
    meta = ChunkMeta(label_digest="0" * 64, pass_index=0, chunk=0)
    assert CotplLabeller.evidence == EVIDENCE
    assert decode_chunk(encode_chunk(records, meta, EVIDENCE)) == records


def test_regions_come_by_descending_score_and_ties_in_the_order_of_the_masks() -> None:
    found = masks_of((MIDDLE, (0.9, 0.9)), (RIGHT, (0.95, 0.95)), (LEFT, (0.9, 0.9)))
    assert [region.box_xyxy for region in label_masks(found).regions] == [*map(half_open, (RIGHT, MIDDLE, LEFT))]


@pytest.mark.parametrize(
    ("profile", "boxes"),
    [("strict", [(28.0, 10.0, 48.0, 40.0)]), ("reference", [(28.0, 10.0, 47.0, 39.0)])],
)
def test_boxes_are_half_open_and_in_the_reference_end_at_the_last_pixel(profile: str, boxes: list[Box]) -> None:
    """Source: specs/cotpl.md 1.3, step 9."""
    weak = ((60, 0, 10, 10), (0.5, 0.5))
    record = label_masks(masks_of((MIDDLE, GOOD), weak), profile=profile)
    assert [region.box_xyxy for region in record.regions] == boxes
    assert record.dropped[0].box_xyxy == ((60, 0, 70, 10) if profile == "strict" else (60, 0, 69, 9))


def test_questions_hold_half_open_boxes_in_both_profiles() -> None:
    for profile in ("strict", "reference"):
        _, chat = label([{MIDDLE: ("No",)}], profile=profile)
        assert [question.box_xyxy for batch in chat.batches for question in batch] == [half_open(MIDDLE)]


@pytest.mark.parametrize(
    ("side", "profile", "is_asked"),
    [(100, "strict", True), (99, "strict", False), (101, "reference", True), (100, "reference", False)],
)
def test_the_size_filter_counts_as_the_profile_measures(side: int, profile: str, is_asked: bool) -> None:
    """Source: specs/cotpl.md 1.5 step 1: a square of 101 x 101 pixels has w = h = 100 there and is kept."""
    found = masks_of(((3, 4, side, side), GOOD), height=110, width=120)
    record = label_masks(found, profile=profile, min_box_area_px=10_000)
    assert (len(record.regions), [drop.reason for drop in record.dropped]) == ((1, []) if is_asked else (0, ["small"]))
    assert record.status == ("ok" if is_asked else "empty")


# Images with little or nothing. Source: specs/cotpl.md 1.3, 1.4 and cases N13, N15, N16, N19 of 8.1.

WEAK = [((x, 0, 10, 20), (0.7 + x / 1000, 0.86)) for x in (0, 20, 40, 60)]


def test_strict_finds_an_image_without_masks_empty_and_asks_nothing() -> None:
    (record,), chat = label([{}])
    assert (record.status, record.regions, record.dropped, chat.batches) == ("empty", (), (), [])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_strict_asks_about_the_three_best_where_no_mask_passes(count: int) -> None:
    record = label_masks(masks_of(*WEAK[:count]))
    best = sorted(WEAK[:count], key=lambda candidate: -candidate[1][0])[:3]
    assert [region.box_xyxy for region in record.regions] == [half_open(rectangle) for rectangle, _ in best]
    assert [drop.reason for drop in record.dropped] == ["low_score"] * (count - len(best))


@pytest.mark.parametrize(("count", "status"), [(0, "failed"), (1, "failed"), (2, "failed"), (3, "ok"), (4, "ok")])
def test_reference_loses_images_with_fewer_than_three_masks_where_none_passes(count: int, status: str) -> None:
    record = label_masks(masks_of(*WEAK[:count]), profile="reference")
    assert (record.status, record.reason) == (status, "reference_drops" if status == "failed" else None)
    assert len(record.regions) == (3 if status == "ok" else 0)


def test_an_image_that_the_reference_loses_costs_no_other_image() -> None:
    good = ("Yes", "Dog", "Foreground")
    records, _ = label([{LEFT: good}, {}, {RIGHT: good}], profile="reference")
    assert [(record.row, record.status) for record in records] == [(0, "ok"), (1, "failed"), (2, "ok")]


# What the loop relies on


def test_what_is_unavailable_outside_never_becomes_a_record() -> None:
    class Lost(GivenAnswers):
        def ask(self, questions: Sequence[Question]) -> list[Answer]:
            raise OutsideError("the chat server does not answer")

    labeller = CotplLabeller(config(), GivenMasks({100: masks_of((LEFT, GOOD))}), Lost({}))
    with pytest.raises(OutsideError):
        labeller.label([sample(0)])


@pytest.mark.parametrize(("masks", "chat"), [(True, True), (True, False), (False, True), (False, False)])
def test_halving_goes_on_while_either_model_can(masks: bool, chat: bool) -> None:
    labeller = CotplLabeller(config(), GivenMasks({}, can_halve=masks), GivenAnswers({}, can_halve=chat))
    assert labeller.halve_batch() == (masks or chat)
