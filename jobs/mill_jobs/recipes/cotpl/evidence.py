"""What CoT-PL keeps with each region beside the fixed core."""

import pyarrow as pa

EVIDENCE = pa.struct(
    [
        ("predicted_iou", pa.float64()),
        ("stability", pa.float64()),
        ("float_box", pa.bool_()),
        ("answers", pa.list_(pa.struct([("question", pa.string()), ("attempt", pa.int32()), ("text", pa.string())]))),
    ]
)
"""`float_box`: the original would write this box's numbers as floats (`12.0`). Source: specs/cotpl.md 1.3."""
