"""Chunks: what goes in comes out, equal input gives equal bytes, and no changed byte goes unseen."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mill_shared.errors import CorruptError
from mill_shared.records import (
    ChunkMeta,
    Dropped,
    ImageRecord,
    Region,
    RegionMask,
    check_chunk,
    decode_chunk,
    encode_chunk,
)

EVIDENCE = pa.struct([("stability", pa.float64()), ("answers", pa.list_(pa.string()))])
META = ChunkMeta(label_digest="ab" * 32, pass_index=1, chunk=42)
RECORDS = [
    ImageRecord(
        row=1, image_id=2**52, key="ordner/zwei wörter.jpg", status="ok", width=640, height=480,
        regions=(
            Region(
                (1.5, 2.0, 30.25, 40.0), "foreground", label="dog", score=0.1 + 0.2,
                mask=RegionMask(480, 640, b"\x00ab"), text_id=7, view="flip",
                evidence={"stability": 0.9, "answers": ["Yes", "Dog\n"]},
            ),
            Region((0.0, 0.0, 1.0, 1.0), "absent", reason="no", evidence={"stability": 1.0, "answers": []}),
        ),
        dropped=(Dropped((0.0, 0.0, 5.0, 5.0), 0.7, "inner"),), files={"map.png": "f" * 64},
    ),
    ImageRecord(row=0, image_id=1, key="a.jpg", status="failed", reason="truncated", detail="ends early"),
    ImageRecord(row=2, image_id=3, key="c.jpg", status="empty", width=1, height=1),
]  # fmt: skip


def test_records_survive_the_round_trip_in_row_order() -> None:
    data = encode_chunk(RECORDS, META, EVIDENCE)
    assert decode_chunk(data) == sorted(RECORDS, key=lambda record: record.row)
    meta = check_chunk(data)
    assert (meta.label_digest, meta.pass_index, meta.chunk) == ("ab" * 32, 1, 42)


def test_the_order_of_arrival_does_not_change_the_bytes() -> None:
    assert encode_chunk(RECORDS, META, EVIDENCE) == encode_chunk(RECORDS[::-1], META, EVIDENCE)


def test_every_changed_byte_is_seen() -> None:
    data = encode_chunk(RECORDS, META, EVIDENCE)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0x20
        with pytest.raises(CorruptError):
            check_chunk(bytes(damaged))


@given(st.binary(max_size=300) | st.integers(0, 6000).map(lambda n: encode_chunk(RECORDS, META, EVIDENCE)[:n]))
def test_what_is_no_whole_chunk_is_refused(data: bytes) -> None:
    if data != encode_chunk(RECORDS, META, EVIDENCE):
        with pytest.raises(CorruptError):
            check_chunk(data)


def test_an_empty_answer_list_and_a_missing_mask_are_told_apart_from_values() -> None:
    region = decode_chunk(encode_chunk(RECORDS, META, EVIDENCE))[1].regions[1]
    assert region.mask is None
    assert region.evidence == {"stability": 1.0, "answers": []}
