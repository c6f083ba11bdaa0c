"""The HunyuanVideo family on a checkpoint of half a megabyte, with the layout of a real one."""

from __future__ import annotations

import pytest
import torch
from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

from models.base import BadInput
from models.hunyuan_video import HunyuanVideo, HunyuanVideoModel, Serving
from quant_runtime.attention import AttentionPlan
from quant_runtime.sparsity.base import TokenLayout
from quant_runtime.sparsity.topk import TopK
from tests.models import films
from tests.models.films import FLOAT32, ROUNDING, apart, inputs, nothing
from tests.support import relative_error


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hunyuan_video") / "checkpoint"
    HunyuanVideo().tiny(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return HunyuanVideo().load(checkpoint, "cpu", torch.float32)


def given(text, padding):
    """What the network takes: 72 tokens of video, `text` tokens of text and padding after them."""
    return {
        "hidden_states": torch.randn(1, 4, 3, 8, 12),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, text + padding, 16),
        "encoder_attention_mask": torch.tensor([[1.0] * text + [0.0] * padding]),
        "pooled_projections": torch.randn(1, 16),
        "guidance": torch.tensor([6000.0]),
    }


@torch.inference_mode()
def test_its_attention_is_that_of_diffusers_with_the_padding_masked(checkpoint, model):
    network = HunyuanVideoTransformer3DModel.from_pretrained(checkpoint, subfolder="transformer")
    asked = given(text=21, padding=11)
    want = network(**asked).sample
    assert relative_error(model.network(**asked).sample, want) < FLOAT32
    assert model.layout == TokenLayout(3, 4, 6, text=21)
    other = model.network(**given(text=21, padding=11)).sample
    assert relative_error(other, want) > 100 * FLOAT32, "other inputs give another answer"


@torch.inference_mode()
def test_sparse_attention_leaves_the_text_its_dense_answer(model):
    asked, seen = given(text=21, padding=11), []
    hook = model.network.transformer_blocks[0].attn.register_forward_hook(lambda *call: seen.append(call[-1]))
    for plan in (AttentionPlan(), AttentionPlan(TopK(0.5, block=16), qk_bits=16)):
        model.attend(plan)
        model.network(**asked)
    hook.remove()
    model.attend(AttentionPlan())
    (video, text), (sparse_video, sparse_text) = seen
    assert relative_error(sparse_text, text) < FLOAT32
    assert relative_error(sparse_video, video) > 100 * FLOAT32


@torch.inference_mode()
def test_a_mask_of_16_bit_floats_is_counted_exactly(model):
    network, asked = model.network, given(text=301, padding=3)
    network(**asked | {"encoder_attention_mask": asked["encoder_attention_mask"].bfloat16()})
    assert model.layout.text == 301, "of whole numbers above 256, bfloat16 has the even ones"


@pytest.mark.parametrize("mask", [[[0.0, 1.0, 1.0]], [[1.0, 0.0, 1.0]], [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]])
def test_padding_that_is_not_at_the_end_of_all_texts_is_refused(model, mask):
    asked = given(3, 0) | {"encoder_attention_mask": torch.tensor(mask)}
    with pytest.raises(ValueError, match="padding after them"):
        model.network(**asked)


def test_a_checkpoint_that_has_not_learned_guidance_is_guided_by_two_passes(checkpoint):
    pipe = HunyuanVideoPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    config = dict(pipe.transformer.config) | {"guidance_embeds": False}
    pipe.register_modules(transformer=HunyuanVideoTransformer3DModel.from_config(config).eval())
    want = films.stock(pipe, negative_prompt="dark", true_cfg_scale=2.0, max_sequence_length=128)
    model = HunyuanVideoModel(pipe, Serving.read(checkpoint), "cpu")
    assert apart(model.film(inputs(negative_prompt="dark"), nothing).frames, want) <= ROUNDING


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"frames": 8}, "frames"),
        ({"prompt": "ball " * 200}, "prompt"),
        ({"negative_prompt": "dark"}, "negative_prompt"),
    ],
)
def test_what_it_cannot_film_is_refused_by_the_field_s_name(model, change, field):
    with pytest.raises(BadInput) as refused:
        model.film(inputs(**change), nothing)
    assert refused.value.field == field


def test_a_checkpoint_that_starts_from_a_picture_is_refused(checkpoint, tmp_path):
    films.changed(checkpoint, tmp_path, "transformer/config.json", image_condition_type="latent_concat")
    for enter in (HunyuanVideo().skeleton, lambda folder: HunyuanVideo().load(folder, "cpu", torch.float32)):
        with pytest.raises(ValueError, match="takes a start image"):
            enter(tmp_path)


def test_its_layers_are_those_of_the_blocks_modulation_included(model):
    double, single = model.network.config.num_layers, model.network.config.num_single_layers
    assert len(model.layers()) == 14 * double + 6 * single
    assert {"transformer_blocks.0.norm1_context.linear", "single_transformer_blocks.1.norm.linear"} < {*model.layers()}
    assert all(name.startswith(("transformer_blocks.", "single_transformer_blocks.")) for name in model.layers())
