"""The benchmarks of whole networks on small ones, on a CPU: what is measured is a GPU's, that they run is not."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from models import step_bench
from models.published import PUBLISHED

SMALL = {
    "wan-2.1-1.3b": {
        "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "text_dim": 16,
        "freq_dim": 16, "ffn_dim": 96, "num_layers": 2,
    },
    "hunyuan-video": {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1,
        "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 16, "pooled_projection_dim": 16,
        "rope_axes_dim": (8, 12, 12),
    },
    "cogvideox-5b": {
        "num_attention_heads": 2, "attention_head_dim": 64, "in_channels": 4, "out_channels": 4, "time_embed_dim": 16,
        "text_embed_dim": 16, "num_layers": 2, "use_rotary_positional_embeddings": True,
    },
}  # fmt: skip
W8A8 = 0.1  # what rounding a small random network to 8 bits does to its answer in bfloat16


def chosen(**change):
    usual = {
        "size": "192x128", "frames": 17, "method": "rtn", "bits": "w8a8", "densities": "0.5", "rounds": 1,
        "device": "cpu", "steps": 2, "warmup": 0.5, "no_dense": False, "no_baseline": False, "no_compile": True,
        "no_eager": False, "profile": None,
        "policy": "topk", "refresh": 0, "residual_order": 2, "residual_rank": 4, "residual_bits": 8,
        "residual_place": "device",
    }  # fmt: skip
    return Namespace(**usual | change)


@pytest.mark.parametrize(("bits", "error"), [("fp8", 2 * W8A8), ("w4afp8", 10 * W8A8)])
def test_a_step_in_fp8_is_measured_under_its_name(bits, error, monkeypatch):
    name = "hunyuan-video"
    monkeypatch.setitem(step_bench.PUBLISHED, name, replace(PUBLISHED[name], config=SMALL[name]))
    with torch.inference_mode():
        rows = [*step_bench.rows(name, chosen(bits=bits, steps=0))]
    cases = [row["case"].removeprefix(f"{name} 192x128x17 ") for row in rows]
    assert cases == ["bfloat16 cuDNN", f"{bits.upper()} rtn dense", f"{bits.upper()} rtn density 0.5"]
    assert 0 < rows[1]["error"] < error


@pytest.mark.parametrize("name", SMALL)
def test_a_step_is_measured_beside_bfloat16_and_answers_the_same(name, monkeypatch):
    monkeypatch.setitem(step_bench.PUBLISHED, name, replace(PUBLISHED[name], config=SMALL[name]))
    with torch.inference_mode():
        rows = [*step_bench.rows(name, chosen())]
    assert [(row["case"].removeprefix(f"{name} 192x128x17 "), row["metric"]) for row in rows] == [
        ("bfloat16 cuDNN", "step"),
        ("W8A8 rtn dense", "step"),
        ("W8A8 rtn density 0.5", "step"),
        ("W8A8 rtn density 0.5, first 50% dense", "2 steps"),
    ]
    assert rows[0]["error"] is None
    assert 0 < rows[1]["error"] < W8A8
    assert 0 < rows[2]["error"] < 2 * W8A8
    assert 0.7 < rows[3]["error"]["effective_density"] < 0.9, "one step of two is dense"
    assert [row["baseline"] and row["baseline"]["name"] for row in rows] == [
        None, "bfloat16 cuDNN", "bfloat16 cuDNN", "2 x bfloat16 cuDNN",
    ]  # fmt: skip


@pytest.mark.parametrize("policy", ["topp", "bands", "tiles"])
def test_a_step_runs_by_every_policy(policy, monkeypatch):
    monkeypatch.setitem(
        step_bench.PUBLISHED, "wan-2.1-1.3b", replace(PUBLISHED["wan-2.1-1.3b"], config=SMALL["wan-2.1-1.3b"])
    )
    with torch.inference_mode():
        given = chosen(policy=policy, steps=0, no_baseline=True, no_dense=True)
        (row,) = step_bench.rows("wan-2.1-1.3b", given)
    assert row["case"].endswith(f"W8A8 rtn {policy} 0.5")


def test_a_whole_run_with_refreshes_says_what_its_residual_takes(monkeypatch):
    monkeypatch.setitem(
        step_bench.PUBLISHED, "wan-2.1-1.3b", replace(PUBLISHED["wan-2.1-1.3b"], config=SMALL["wan-2.1-1.3b"])
    )
    with torch.inference_mode():
        rows = [
            *step_bench.rows("wan-2.1-1.3b", chosen(steps=4, warmup=0.25, refresh=1, no_baseline=True, no_dense=True))
        ]
    assert [row["metric"] for row in rows] == ["step", "4 steps", "residual on the device"]
    assert rows[2]["value"] > 0


def test_cogvideox_is_given_the_tokens_that_its_default_film_has():
    config = PUBLISHED["cogvideox-5b"].on_meta().config
    given = step_bench.cogvideox_inputs(config, 720, 480, 49, "cpu")
    assert given["hidden_states"].shape == (2, 13, 16, 60, 90)
    assert given["encoder_hidden_states"].shape == (2, 226, 4096)
    assert [t.shape for t in given["image_rotary_emb"]] == [(13 * 30 * 45, 64)] * 2


def test_methods_that_need_data_are_refused():
    with pytest.raises(ValueError, match="needs calibration"):
        step_bench.timing.quantize(torch.nn.Sequential(torch.nn.Linear(8, 8)), ["0"], "smoothquant", "w8a8")
