import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from quant_runtime import roofline
from quant_runtime.tables import RESULTS

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs/pictures/roofline.svg"


def test_the_picture_in_the_docs_is_what_the_rows_say():
    assert PICTURE.read_text() == roofline.drawn(ROOT / RESULTS)


def test_a_matmuls_operations_a_byte_count_operands_once_and_the_answer_in_16_bits():
    rows = [{"case": "100x200->300 INT8", "value": 5.0}, {"case": "100x200->300 bfloat16 cuBLAS", "value": 4.0}]
    ours, theirs = roofline.matmuls(rows)
    assert ours.intensity == 2 * 100 * 200 * 300 / (100 * 200 + 200 * 300 + 2 * 100 * 300)
    assert theirs.intensity == 2 * 100 * 200 * 300 / (2 * (100 * 200 + 200 * 300 + 100 * 300))
    assert (ours.kind, ours.rate) == ("ours", 5.0)


def test_attention_that_keeps_a_tenth_does_a_tenth_for_the_same_bytes():
    rows = [{"case": f"{kept}, INT8 and FP8", "value": 800.0} for kept in ("dense", "density 0.1")]
    dense, sparse = roofline.attentions(rows)
    assert sparse.intensity == pytest.approx(dense.intensity / 10)


def test_every_point_lies_on_the_picture_and_faster_lies_higher(tmp_path):
    cases = [("8192x8192->8192 INT8", 1200.0), ("8192x8192->8192 bfloat16 cuBLAS", 700.0)]
    files = {
        "gemm-cuda": cases,
        "attention_720p-cuda": [("dense, INT8 and FP8", 900.0)],
        "fused-cuda": [("copy", 3000.0)],
    }
    for name, rows in files.items():
        lines = [json.dumps({"case": case, "value": value}) for case, value in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    svg = ElementTree.fromstring(roofline.drawn(tmp_path))
    circles = [one.attrib for one in svg.iter("{http://www.w3.org/2000/svg}circle")]
    assert len(circles) == 2
    assert all(0 < float(one["cx"]) < roofline.WIDTH and 0 < float(one["cy"]) < roofline.HEIGHT for one in circles)
    assert float(circles[0]["cy"]) < float(circles[1]["cy"])
