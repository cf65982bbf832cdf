"""What VL-PLM keeps with each proposal beside the fixed core: enough to make any final from it."""

import pyarrow as pa

EVIDENCE = pa.struct(
    [
        ("objectness", pa.float64()),
        ("probabilities", pa.list_(pa.float32())),
        ("distractor_mass", pa.float32()),
        ("feature", pa.binary()),
        ("category_id", pa.int64()),
        ("position", pa.int64()),
        ("whole", pa.int8()),
    ]
)
"""`objectness`: of the proposal before refinement; `probabilities`: of each target class, in their order;
`distractor_mass`: what the softmax gave to all other columns; `feature`: the image feature, float16 little endian,
where it is stored. `category_id` and `position` (of its image in the reading order of the files) only where the scores
were imported. `whole`: bit i is set where the original writes side i of the box (x0, y0, x1, y1) as an integer, since
it was clamped. Source: specs/vlplm.md 1.1, steps E to K, and 2.1."""
SCORED = "scored"
"""`Region.fate` of every proposal that was classified; its `score` is the probability of its class."""
