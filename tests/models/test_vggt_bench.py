from __future__ import annotations

import torch

from models import vggt_bench
from models.vggt_net import VGGTConfig

SMALL = VGGTConfig(
    img_size=56, embed_dim=64, num_heads=1, encoder_depth=1, depth=4, taps=(0, 1, 2, 3), camera_depth=1, camera_heads=2,
    dpt_features=16, dpt_channels=(8, 8, 16, 16), point_head=False,
)  # fmt: skip
W8A8 = 0.1  # what rounding a small random network to 8 bits does to its taps in bfloat16
GIVEN = ["--device", "cpu", "--views", "2,3", "--whole", "2", "--size", "56x42", "--bits", "w8a8", "--rounds", "1"]


def measured(*more):
    with torch.inference_mode():
        return [*vggt_bench.rows(vggt_bench.arguments([*GIVEN, *more]), SMALL)]


def test_each_number_of_views_is_measured_beside_bfloat16_and_answers_the_same():
    rows = measured("--no-compile", "--densities", "0.5")
    cases = ["2 views, aggregator", "3 views, aggregator", "2 views, end to end"]
    runs = ["bfloat16 cuDNN", "W8A8 rtn dense", "W8A8 rtn density 0.5"]
    assert [row["case"] for row in rows] == [f"vggt-1b 56x42, {case}, {run}" for run in runs for case in cases]
    assert {row["metric"] for row in rows} == {"time"}, "a CPU has no peak of memory to tell"
    assert [row["baseline"] is None for row in rows] == [True] * 3 + [False] * 6
    for got in rows[3:]:
        assert 0 < got["error"] < W8A8


def test_ours_alone_is_measured_without_an_error():
    rows = measured("--no-baseline", "--densities", "")
    assert [(row["baseline"], row["error"]) for row in rows] == [(None, None)] * 3
