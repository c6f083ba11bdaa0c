import json
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

import quant_runtime.diffusers
from quant_runtime import artifact, formats
from quant_runtime.calibrate import observe
from quant_runtime.convert import convert
from quant_runtime.linear import QuantLinear
from quant_runtime.methods import QuaRot, SmoothQuant


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, without a vocabulary to download."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {letter: n for n, letter in enumerate(alphabet, start=3)}
    letters = Tokenizer(models.BPE(vocab=numbers, merges=[], unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def wan() -> WanPipeline:
    """Wan's own classes, two layers, random weights."""
    pipeline = WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
        ).eval(),
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=32,
            freq_dim=32,
            ffn_dim=48,
            num_layers=2,
            cross_attn_norm=True,
            rope_max_seq_len=32,
        ).eval(),
        vae=AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval(),
        scheduler=UniPCMultistepScheduler(flow_shift=3.0, prediction_type="flow_prediction", use_flow_sigmas=True),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def video(pipeline: DiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    drawn = torch.Generator().manual_seed(0)
    sizes = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 16}
    return pipeline("a red ball", **sizes, generator=drawn, output_type="pt").frames


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, pipeline): an artifact of a small Wan with layers of four formats, and what it was saved from."""
    torch.manual_seed(0)
    pipeline = wan()
    network = pipeline.transformer
    names = [n for n, layer in network.named_modules() if isinstance(layer, nn.Linear) and n.startswith("blocks.")]
    stats = observe(network, names, lambda _: video(pipeline))
    turned = {"ffn.net.0.proj": formats.W4AFP8, "ffn.net.2": formats.W4A8}
    plan = {name: (QuaRot(), fmt) for name in names for end, fmt in turned.items() if name.endswith(end)}
    plan |= {
        name: (SmoothQuant(), formats.FP8 if "attn2" in name else formats.W8A8) for name in names if name not in plan
    }
    reports = convert(network, plan, stats)
    quant_runtime.diffusers.mark(network, {name: report.spec for name, report in reports.items()})
    folder = tmp_path_factory.mktemp("artifacts") / "wan"
    draft = artifact.Manifest(
        family="wan",
        base=artifact.Base(name="tiny"),
        method=artifact.method_record(QuaRot()),
        layers=artifact.layer_records(reports),
    )
    artifact.save(folder, draft, pipeline.save_pretrained)
    return folder, pipeline


def test_a_pipeline_opens_an_artifact_and_answers_bit_for_bit(saved):
    folder, pipeline = saved
    artifact.verify(folder)
    opened = DiffusionPipeline.from_pretrained(folder)
    assert sum(isinstance(layer, QuantLinear) for layer in opened.transformer.modules()) == 20
    assert torch.equal(video(opened), video(pipeline))


def test_a_loader_that_casts_leaves_whole_numbers_and_scales_alone(saved):
    folder, pipeline = saved
    cast = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer", dtype=torch.bfloat16)
    layer, own = cast.blocks[0].ffn.net[2], pipeline.transformer.blocks[0].ffn.net[2]
    assert layer.bias.dtype == torch.bfloat16
    assert cast.scale_shift_table.dtype == torch.float32, "Wan keeps it so, with us as without us"
    for name in ("qweight", "weight_scale", "input_signs"):
        assert torch.equal(getattr(layer, name), getattr(own, name))
    layer, own = cast.blocks[0].attn2.to_q, pipeline.transformer.blocks[0].attn2.to_q
    assert layer.spec.format == formats.FP8
    for name in ("qweight", "weight_scale", "input_factor"):
        assert torch.equal(getattr(layer, name), getattr(own, name))


def test_an_opened_artifact_can_be_saved_again(saved, tmp_path):
    folder, _ = saved
    WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").save_pretrained(tmp_path)
    configs = [json.loads((path / "config.json").read_text()) for path in (folder / "transformer", tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert configs[0]["quantization_config"]["layers"]["blocks.0.ffn.net.2"]["format"] == "W4A8"
    assert configs[0]["quantization_config"]["layers"]["blocks.1.attn2.to_q"]["format"] == "FP8"
    assert configs[0]["quantization_config"]["layers"]["blocks.1.ffn.net.0.proj"]["format"] == "W4AFP8"


def test_our_own_loader_reads_the_same_folder(saved):
    folder, pipeline = saved
    config = WanTransformer3DModel.load_config(folder / "transformer")
    config.pop("quantization_config")
    loaded = WanTransformer3DModel.from_config(config)
    artifact.load_into(loaded, folder, component="transformer")
    own = pipeline.transformer.state_dict()
    assert all(torch.equal(own[key], tensor) for key, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version': 2"),
        ({"groups": 64}, "'groups': 64"),
        ({"layers": {"blocks.0.attn1.to_q": {"format": "W4A8", "colour": "red"}}}, "colour"),
        ({"layers": {"blocks.0.attn1.norm_q": {"format": "W4A8"}}}, "norm_q is a RMSNorm"),
        ({"layers": {"patch_embedding": {"format": "W4A8"}}}, "patch_embedding is a Conv3d"),
    ],
)
def test_a_config_that_it_does_not_know_is_refused(saved, tmp_path, change, said):
    folder, _ = saved
    artifact.link_or_copy(folder / "transformer", tmp_path / "t")
    config = json.loads((folder / "transformer/config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "t/config.json").unlink()
    (tmp_path / "t/config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, TypeError), match=said):
        WanTransformer3DModel.from_pretrained(tmp_path / "t")


def test_a_checkpoint_without_the_tensors_of_a_layer_is_refused(saved, tmp_path):
    """A layer that was saved in 16 bits, named as quantized: its packed weights are not there."""
    folder, _ = saved
    artifact.link_or_copy(folder / "transformer", tmp_path / "t")
    config = json.loads((folder / "transformer/config.json").read_text())
    config["quantization_config"]["layers"]["proj_out"] = {"format": "W4A8"}
    (tmp_path / "t/config.json").unlink()
    (tmp_path / "t/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has no proj_out\.(qweight|weight_scale)"):
        WanTransformer3DModel.from_pretrained(tmp_path / "t")


def test_the_runtime_itself_needs_neither_diffusers_nor_pydantic():
    program = (
        "import sys, quant_runtime.attention, quant_runtime.convert, quant_runtime.fields;"
        "print(sorted({'diffusers', 'pydantic', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr[-2000:]
