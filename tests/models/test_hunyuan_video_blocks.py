import pytest
import torch
from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

from models.hunyuan_video import HunyuanVideoModel, Serving
from models.hunyuan_video_blocks import Block
from quant_runtime.attention import AttentionPlan
from quant_runtime.formats import QuantFormat
from quant_runtime.methods import METHODS
from quant_runtime.sparsity.topk import TopK
from tests.support import relative_error

SAME = {
    "rtn": 1e-5,
    "quarot": 1e-3,
}  # of a rotated layer's input an entry falls to the other side of a half here and there
SAME_FP8 = 2e-3  # the same of FP8 activations: a step of theirs is up to an eighth of an entry
FP8_VALUES = 0.02  # what P and V in FP8 do to the whole network
PACKED = AttentionPlan(dense_qk_bits=8, pv_bits=8)


def network():
    torch.manual_seed(0)
    made = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=16, rope_axes_dim=(8, 12, 12),
    )  # fmt: skip
    for weight in made.parameters():
        if weight.dim() == 1:
            weight.data += 0.1 * torch.randn_like(weight)
    return made.eval().requires_grad_(False)


def inputs(batch):
    return {
        "hidden_states": torch.randn(batch, 4, 5, 16, 18),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, 20, 16),
        "encoder_attention_mask": torch.ones(batch, 20),
        "pooled_projections": torch.randn(batch, 16),
        "guidance": torch.full((batch,), 6000.0),
        "return_dict": False,
    }


def model(method, bits="W8A8"):
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae", "scheduler", "text_encoder_2", "tokenizer_2"))
    made = HunyuanVideoModel(HunyuanVideoPipeline(**parts, transformer=network()), Serving(), "cpu")
    for name in made.layers():
        layer = made.network.get_submodule(name)
        made.network.set_submodule(name, METHODS[method]().quantize(layer, None, QuantFormat.parse(bits)))
    return made


@pytest.mark.parametrize(("method", "bits"), [("rtn", "W8A8"), ("quarot", "W8A8"), ("rtn", "FP8"), ("rtn", "W4AFP8")])
@pytest.mark.parametrize("batch", [1, 2])
def test_packed_blocks_answer_what_diffusers_blocks_answer(method, bits, batch):
    made, given = model(method, bits), inputs(batch)
    for plan in (PACKED, AttentionPlan(TopK(0.5), pv_bits=8)):
        made.attend(plan)
        with torch.inference_mode():
            want = made.network(**given)[0]
        packed = model(method, bits)
        packed.fuse_projections()
        packed.attend(plan)
        with torch.inference_mode():
            got = packed.network(**given)[0]
        assert all(isinstance(block.forward, Block) for block in packed.network.transformer_blocks)
        assert relative_error(got, want) < (SAME[method] if bits == "W8A8" else SAME_FP8)
        assert packed.attention.density() == made.attention.density()


def test_a_plan_with_16_bit_values_runs_diffusers_blocks():
    made, given = model("rtn"), inputs(1)
    made.fuse_projections()
    with torch.inference_mode():
        want = made.network(**given)[0]
        made.attend(PACKED)
        got = made.network(**given)[0]
    assert not torch.equal(got, want)
    assert relative_error(got, want) < FP8_VALUES
