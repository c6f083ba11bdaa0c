"""The CogVideoX family on a checkpoint of a quarter of a megabyte, with the layout of a real one."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from models import load, video
from models.base import BadInput
from models.cogvideox import CogVideoX, CogVideoXModel, Serving
from models.video import PROMPTS
from quant_runtime.attention import AttentionPlan
from quant_runtime.sparsity.base import TokenLayout
from quant_runtime.sparsity.topk import TopK
from tests.models import films
from tests.models.films import FLOAT32, RECIPES, ROUNDING, apart, inputs, nothing
from tests.support import relative_error

TEXT = 40  # tokens that every prompt is padded to


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cogvideox") / "checkpoint"
    CogVideoX().tiny(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return CogVideoX().load(checkpoint, "cpu", torch.float32)


@pytest.fixture
def stock(checkpoint):
    return CogVideoXPipeline.from_pretrained(checkpoint, dtype=torch.float32)


def given():
    """What the network takes: a batch of two, 72 tokens of video and their places."""
    angles = torch.rand(72, 8).repeat_interleave(2, dim=1)
    return {
        "hidden_states": torch.randn(2, 3, 4, 8, 12),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "timestep": torch.tensor([500, 500]),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


@torch.inference_mode()
def test_its_attention_is_that_of_diffusers(checkpoint, model):
    network = CogVideoXTransformer3DModel.from_pretrained(checkpoint, subfolder="transformer")
    asked = given()
    want = network(**asked).sample
    assert relative_error(model.network(**asked).sample, want) < FLOAT32
    assert model.layout == TokenLayout(3, 4, 6, text=TEXT, text_first=True)
    turned = asked | {"image_rotary_emb": given()["image_rotary_emb"]}
    assert relative_error(model.network(**turned).sample, want) > 10 * FLOAT32, "places count"


@torch.inference_mode()
def test_sparse_attention_leaves_the_text_its_dense_answer(model):
    asked, seen = given(), []
    hook = model.network.transformer_blocks[0].attn1.register_forward_hook(lambda *call: seen.append(call[-1]))
    for plan in (AttentionPlan(), AttentionPlan(TopK(0.5, block=16), qk_bits=16)):
        model.attend(plan)
        model.network(**asked)
    hook.remove()
    model.attend(AttentionPlan())
    (video, text), (sparse_video, sparse_text) = seen
    assert relative_error(sparse_text, text) < FLOAT32
    assert relative_error(sparse_video, video) > 100 * FLOAT32


def test_a_negative_prompt_is_what_it_is_guided_away_from(model, stock):
    want = films.stock(stock, negative_prompt="dark", guidance_scale=2.0, max_sequence_length=TEXT)
    assert apart(model.film(inputs(negative_prompt="dark"), nothing).frames, want) <= ROUNDING
    assert apart(model.film(inputs(negative_prompt="bright"), nothing).frames, want) > ROUNDING


def test_it_runs_the_2b_checkpoint_s_places_and_the_other_scheduler(checkpoint, stock):
    """2B adds sines to its tokens where 5B turns queries and keys; a DPM scheduler comes with changing guidance."""
    config = dict(stock.transformer.config) | {"use_rotary_positional_embeddings": False}
    stock.register_modules(
        transformer=CogVideoXTransformer3DModel.from_config(config).eval(),
        scheduler=CogVideoXDPMScheduler.from_config(stock.scheduler.config),
    )
    want = films.stock(stock, negative_prompt="", guidance_scale=2.0, use_dynamic_cfg=True, max_sequence_length=TEXT)
    model = CogVideoXModel(stock, Serving.read(checkpoint), "cpu")
    assert apart(model.film(inputs(), nothing).frames, want) <= ROUNDING


def test_a_tokenizer_that_comes_as_sentencepiece_alone_is_read(stock, checkpoint, tmp_path):
    """As the published folders have it. `transformers` takes two more packages for that, which `worker` brings."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    stock.save_pretrained(tmp_path)
    tokenizer = tmp_path / "tokenizer"
    (tokenizer / "tokenizer.json").unlink()
    named = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": TEXT}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(named))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "prompts.txt"), model_prefix=str(tokenizer / "spiece"), vocab_size=90, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"tokenizer": ["transformers", "T5Tokenizer"]}))
    (tmp_path / "serving.json").write_bytes((checkpoint / "serving.json").read_bytes())
    model = CogVideoX().load(tmp_path, "cpu", torch.float32)
    own = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "spiece.model"))
    text = "A red tram, a grey sky"
    assert model.pipe.tokenizer(text).input_ids == [*own.encode(text), 1]
    assert model.film(inputs(), nothing).frames.any()


def test_one_frame_and_no_guidance(model):
    assert model.film(inputs(frames=1, guidance=1.0), nothing).frames.shape == (1, 32, 48, 3)


@pytest.mark.parametrize(("change", "field"), [({"frames": 5}, "frames"), ({"prompt": "ball " * 99}, "prompt")])
def test_what_it_cannot_film_is_refused_by_the_field_s_name(model, change, field):
    with pytest.raises(BadInput) as refused:
        model.film(inputs(**change), nothing)
    assert refused.value.field == field


def test_patches_that_join_frames_are_refused(checkpoint, tmp_path):
    films.changed(checkpoint, tmp_path, "transformer/config.json", patch_size_t=2)
    for enter in (CogVideoX().skeleton, lambda folder: CogVideoX().load(folder, "cpu", torch.float32)):
        with pytest.raises(ValueError, match=r"1\.5"):
            enter(tmp_path)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float32])
def test_the_decoder_has_the_type_of_the_latents_on_every_device(checkpoint, half, tmp_path, monkeypatch):
    made = films.made(CogVideoX(), checkpoint, RECIPES["w4a8"], tmp_path / "artifact")
    monkeypatch.setattr(video, "fast_float", lambda device: half)
    model = load.load(made.folder, "cpu", check=False)
    assert model.network.dtype == model.pipe.vae.dtype
    assert apart(model.film(inputs(), nothing).frames, made.before) <= ROUNDING


def test_between_the_steps_latents_are_float32_whatever_the_network_computes_in(checkpoint):
    model = CogVideoX().load(checkpoint, "cpu", torch.bfloat16)
    seen = []
    step = model.pipe.scheduler.step
    model.pipe.scheduler.step = lambda *args, **kwargs: seen.append(args[2].dtype) or step(*args, **kwargs)
    model.film(inputs(), nothing)
    assert seen
    assert {*seen} == {torch.float32}


def test_its_layers_are_those_of_the_blocks_modulation_included(model):
    assert len(model.layers()) == 8 * model.network.config.num_layers
    assert {"transformer_blocks.0.norm1.linear", "transformer_blocks.1.norm2.linear"} < {*model.layers()}
    assert all(name.startswith("transformer_blocks.") for name in model.layers())
