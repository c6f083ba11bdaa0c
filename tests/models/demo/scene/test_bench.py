from models.demo.scene import bench
from models.vggt import Vggt


def test_every_way_is_timed_stage_by_stage_beside_the_faster_baseline(tmp_path):
    Vggt().tiny(tmp_path / "tiny")
    rows = list(bench.rows(tmp_path / "tiny", "cpu", 3, 2, tmp_path))
    timed = {(row["case"].split(", ")[1], row["metric"]): row for row in rows if row["unit"] == "ms"}
    assert {name for name, _ in timed} == {"float32", "bfloat16", *bench.RECIPES}
    for name in bench.RECIPES:
        whole = timed[name, "whole pass"]
        assert whole["value"] >= 0.9 * sum(timed[name, stage]["value"] for stage in bench.STAGES)
        fastest = min(timed[one, "whole pass"]["value"] for one in bench.BASELINES)
        assert whole["baseline"]["value"] == fastest
        assert 0 < whole["error"]["depth_difference"] < 1
    assert timed["float32", "whole pass"]["error"]["depth_difference"] == 0
    smaller = {row["case"]: row["baseline"]["value"] / row["value"] for row in rows if row["metric"] == "block linears"}
    assert smaller["W4A8 quarot"] > smaller["W8A8 rtn"] > 1
