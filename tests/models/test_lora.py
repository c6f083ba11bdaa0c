"""LoRAs as the hub has them, merged into tiny checkpoints on both ways to an artifact."""

from __future__ import annotations

import copy
import hashlib
import json

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as diffusers_names
from safetensors.torch import load_file, save_file

from models import compress, stream
from models.compress import Recipe
from models.hunyuan_video import ORIGINALS, HunyuanVideo
from models.lora import Lora, Loras
from models.wan import Wan
from quant_runtime.attention import AttentionPlan
from quant_runtime.formats import W4A8, W16A16
from quant_runtime.methods import Keep, Rtn
from tests.models.films import nothing

RANK = 3
FLOAT32 = 1e-5  # of products of some size, in another order; a change that is missed is larger by far
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "checkpoint"
    Wan().tiny(folder)
    return folder


@pytest.fixture
def network(checkpoint):
    return Wan().load(checkpoint, "cpu", torch.float32).network


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "hunyuan"
    HunyuanVideo().tiny(folder)
    return HunyuanVideo().load(folder, "cpu", torch.float32).network


def pair(rows, columns, *shape):
    return torch.randn(RANK, columns, *shape), torch.randn(rows, RANK, *[1 for _ in shape])


def layers(network):
    """A LoRA's pairs, down and up, for every linear layer of the blocks."""
    names = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    inside = [name for name in names if name.startswith(Wan.model.blocks)]
    return {name: pair(*network.get_submodule(name).weight.shape) for name in inside}


def peft(pairs, prefix="transformer."):
    return {
        f"{prefix}{name}.lora_{which}.weight": tensor
        for name, (down, up) in pairs.items()
        for which, tensor in (("A", down), ("B", up))
    }


def merged(network, path, originals=(), scale=1.0):
    """Every tensor of the network, changed."""
    with Loras([Lora(path, scale)], network, originals) as loras:
        return {key: loras.merged(key, tensor) for key, tensor in network.state_dict().items()}


def saved(path, tensors, **metadata):
    save_file({key: tensor.detach().clone() for key, tensor in tensors.items()}, path, metadata=metadata or None)
    return path


def apart(one, other):
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def made(way, checkpoint, out, loras, method, format_):
    words = {"base": "tiny", "device": "cpu"}
    if way == "stream":
        return stream.compress(
            Wan(), checkpoint, method, format_, AttentionPlan(), out, loras=loras, on_bytes=nothing, **words
        )
    recipe = Recipe(method if format_.quantized else Keep(), format_, judging_samples=0, loras=loras)
    return compress.compress(Wan(), checkpoint, recipe, out, on_progress=lambda *_: None, **words)


@pytest.mark.parametrize("way", ["whole", "stream"])
def test_the_artifact_has_the_weights_of_the_formula(checkpoint, network, tmp_path, way):
    pairs, alpha = layers(network), 5.0
    alphas = {f"transformer.{name}.alpha": torch.tensor(alpha) for name in pairs}
    first = saved(tmp_path / "first.safetensors", peft(pairs) | alphas)
    second = saved(tmp_path / "second.safetensors", peft(dict(list(pairs.items())[:3]), "base_model.model."))
    manifest = made(way, checkpoint, tmp_path / "out", (Lora(first, 0.5), Lora(second, -1.0)), Rtn(), W16A16)
    got, was = load_file(tmp_path / "out" / WEIGHTS), load_file(checkpoint / WEIGHTS)
    for number, (name, (down, up)) in enumerate(pairs.items()):
        want = was[f"{name}.weight"].float() + 0.5 * alpha / RANK * (up @ down)
        want = want - up @ down if number < 3 else want
        assert torch.equal(got[f"{name}.weight"], want.bfloat16())
    others = was.keys() - {f"{name}.weight" for name in pairs}
    assert all(torch.equal(got[key], was[key]) for key in others)
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (first, second)]
    records = [(lora.name, lora.scale, lora.sha256) for lora in manifest.base.loras]
    assert records == [("first.safetensors", 0.5, sums[0]), ("second.safetensors", -1.0, sums[1])]


def test_both_ways_round_the_same_weights(checkpoint, network, tmp_path):
    lora = Lora(saved(tmp_path / "lora.safetensors", peft(layers(network))), 0.1)
    for way in ("whole", "stream"):
        made(way, checkpoint, tmp_path / way, (lora,), Rtn(), W4A8)
    made("stream", checkpoint, tmp_path / "without", (), Rtn(), W4A8)
    one, other, without = (load_file(tmp_path / way / WEIGHTS) for way in ("whole", "stream", "without"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not torch.equal(one["blocks.0.ffn.net.2.qweight"], without["blocks.0.ffn.net.2.qweight"])


def test_another_scale_does_not_go_on_with_what_was_begun(checkpoint, network, tmp_path):
    path = saved(tmp_path / "lora.safetensors", peft(layers(network)))

    def full(done, of):
        if done > of / 2:
            raise OSError("full")

    words = {"base": "tiny", "device": "cpu", "sync_bytes": 1}
    given = (Wan(), checkpoint, Rtn(), W4A8, AttentionPlan())
    with pytest.raises(OSError, match="goes on there"):
        stream.compress(*given, tmp_path / "out", loras=[Lora(path)], on_bytes=full, **words)
    again = stream.compress(*given, tmp_path / "out", loras=[Lora(path, 0.5)], on_bytes=nothing, **words)
    fresh = stream.compress(*given, tmp_path / "fresh", loras=[Lora(path, 0.5)], on_bytes=nothing, **words)
    assert again.files == fresh.files


def wans(network):
    """The layers of the blocks under the names of Wan's authors."""
    swaps = (("attn1", "self_attn"), ("attn2", "cross_attn"), ("to_out.0", "o"), ("to_", ""))
    swaps = (*swaps, ("net.0.proj", "0"), ("net.2", "2"))
    named = {}
    for name, tensors in layers(network).items():
        theirs = name
        for swap in swaps:
            theirs = theirs.replace(*swap)
        named[theirs] = tensors
    return named


AROUND = {  # of the network's other layers, by the names of Wan's authors
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}


def test_names_of_wans_authors_mean_what_diffusers_takes_them_for(network, tmp_path):
    given, inside = {}, wans(network)
    around = {name: pair(*network.get_submodule(layer).weight.shape) for name, layer in AROUND.items()}
    for name, (down, up) in (inside | around).items():
        given[f"diffusion_model.{name}.lora_down.weight"], given[f"diffusion_model.{name}.lora_up.weight"] = down, up
        given[f"diffusion_model.{name}.diff_b"] = torch.randn(len(up))
    given |= {f"diffusion_model.{name}.alpha": torch.tensor(2.0) for name in inside}
    theirs = saved(tmp_path / "theirs.safetensors", given)
    ours = saved(tmp_path / "ours.safetensors", diffusers_names._convert_non_diffusers_wan_lora_to_diffusers(given))
    one, other, own = merged(network, theirs, Wan.originals), merged(network, ours), network.state_dict()
    assert apart(one, other) < FLOAT32
    assert sum(not torch.equal(one[key], own[key]) for key in own) == 2 * len(inside | around)


def test_flat_names_of_musubi_mean_what_diffusers_takes_them_for(network, tmp_path):
    given = {}
    for name, (down, up) in wans(network).items():
        flat = f"lora_unet_{name.replace('.', '_')}"
        given[f"{flat}.lora_down.weight"], given[f"{flat}.lora_up.weight"] = down, up
        given[f"{flat}.alpha"] = torch.tensor(1.0)
    theirs = saved(tmp_path / "theirs.safetensors", given)
    ours = saved(tmp_path / "ours.safetensors", diffusers_names._convert_musubi_wan_lora_to_diffusers(dict(given)))
    one, other = merged(network, theirs, Wan.originals), merged(network, ours)
    assert apart(one, other) < FLOAT32
    assert apart(one, network.state_dict()) > 0.1


def test_layers_that_hunyuans_authors_have_as_one_are_cut_as_diffusers_cuts_them(hunyuan, tmp_path):
    block, given = hunyuan.transformer_blocks[0], {}
    for name, layer, parts in (
        ("img_attn_qkv", block.attn.to_q, 3), ("txt_attn_qkv", block.attn.add_q_proj, 3),
        ("img_attn_proj", block.attn.to_out[0], 1), ("txt_attn_proj", block.attn.to_add_out, 1),
        ("img_mod.linear", block.norm1.linear, 1), ("txt_mod.linear", block.norm1_context.linear, 1),
        ("img_mlp.fc1", block.ff.net[0].proj, 1), ("txt_mlp.fc2", block.ff_context.net[2], 1),
    ):  # fmt: skip
        down, up = pair(parts * layer.out_features, layer.in_features)
        given[f"double_blocks.0.{name}.lora_A.weight"], given[f"double_blocks.0.{name}.lora_B.weight"] = down, up
    theirs = saved(tmp_path / "theirs.safetensors", given)
    renamed = diffusers_names._convert_hunyuan_video_lora_to_diffusers(dict(given))
    one = merged(hunyuan, theirs, ORIGINALS)
    assert apart(one, merged(hunyuan, saved(tmp_path / "ours.safetensors", renamed))) < FLOAT32
    changed = [key for key, tensor in hunyuan.state_dict().items() if not torch.equal(one[key], tensor)]
    assert len(changed) == 12


def test_rows_of_a_layer_that_is_one_there_go_to_queries_keys_values_and_mlp_in_this_order(hunyuan, tmp_path):
    block = hunyuan.single_transformer_blocks[1]
    cut = (block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp)
    down, up = pair(sum(layer.out_features for layer in cut), block.attn.to_q.in_features)
    given = {"single_blocks.1.linear1.lora_A.weight": down, "single_blocks.1.linear1.lora_B.weight": up}
    got = merged(hunyuan, saved(tmp_path / "lora.safetensors", given), ORIGINALS)
    want = torch.cat([layer.weight.detach() for layer in cut]) + up @ down
    names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    both = torch.cat([got[f"single_transformer_blocks.1.{name}.weight"] for name in names])
    assert float((both - want).abs().max()) < FLOAT32


TO_Q = "blocks.0.attn1.to_q"


@pytest.mark.parametrize("where", ["file", "folder"])
def test_alpha_is_taken_from_what_the_file_says_of_its_training(network, tmp_path, where):
    down, up = pair(*network.get_submodule(TO_Q).weight.shape)
    other = "blocks.0.ffn.net.2"
    low, high = pair(*network.get_submodule(other).weight.shape)
    tensors = peft({TO_Q: (down, up), other: (low, high)}, "transformer." if where == "file" else "base_model.model.")
    trained = {"r": RANK, "lora_alpha": 6, "alpha_pattern": {"net.2": 12}, "target_modules": ["to_q"]}
    if where == "file":
        said = json.dumps({f"transformer.{name}": its for name, its in trained.items()} | {"text_encoder.r": 4})
        path = saved(tmp_path / "lora.safetensors", tensors, format="pt", lora_adapter_metadata=said)
    else:
        saved(tmp_path / "adapter_model.safetensors", tensors)
        (tmp_path / "adapter_config.json").write_text(json.dumps(trained))
        path = tmp_path
    got, was = merged(network, path), network.state_dict()
    assert torch.equal(got[f"{TO_Q}.weight"], was[f"{TO_Q}.weight"] + 6 / RANK * (up @ down))
    assert torch.equal(got[f"{other}.weight"], was[f"{other}.weight"] + 12 / RANK * (high @ low))


def test_convolutions_and_whole_differences_are_merged(network, tmp_path):
    weight = network.patch_embedding.weight
    down, up = pair(weight.shape[0], weight.shape[1], *weight.shape[2:])
    whole = torch.randn(network.blocks[0].norm2.weight.shape)
    given = {"patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": up}
    given["blocks.0.norm3.diff"] = whole
    got = merged(network, saved(tmp_path / "lora.safetensors", given), Wan.originals, scale=2.0)
    want = weight.detach() + 2 * torch.einsum("or,ricde->oicde", up[:, :, 0, 0, 0], down)
    assert float((got["patch_embedding.weight"] - want).abs().max()) < FLOAT32
    assert torch.equal(got["blocks.0.norm2.weight"], network.blocks[0].norm2.weight + 2 * whole)


ALPHA = f"transformer.{TO_Q}.alpha"
A, B = f"transformer.{TO_Q}.lora_A.weight", f"transformer.{TO_Q}.lora_B.weight"


def infinite(given):
    given[B][0, 0] = torch.inf


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda given: given.pop(B), rf"{A} comes without its lora_B"),
        (lambda given: given.pop(A), rf"{B} comes without its lora_A"),
        (infinite, rf"{B} has a value that is not finite"),
        (lambda given: given.update({B: given[B][:, 1:]}), rf"{B} is .* they have no common rank"),
        (lambda given: given.update({A: given[A][:, 1:]}), rf"{A} is \[3, 23\]; .*to_q.weight \[24, 24\]"),
        (lambda given: given.update({B: given[B][1:]}), rf"{B} is \[23, 3\]"),
        (lambda given: given.update({"text_encoder.q.lora_A.weight": given[A]}), "text_encoder.q.lora_A.weight fits"),
        (lambda given: given.update({f"{TO_Q}.hada_w1_a": given[A]}), "hada_w1_a is nothing that is merged"),
        (lambda given: given.update({ALPHA: torch.tensor(torch.nan)}), "alpha is no single finite"),
        (lambda given: given.update({f"{TO_Q}.dora_scale": given[A]}), "dora_scale is nothing"),
        (lambda given: given.update({f"{TO_Q}.lora_A.weight": given[A]}), "are the same"),
        (lambda given: given.update({A: given[A].to(torch.int32)}), rf"{A} is torch.int32"),
        (lambda given: given.update({"scale_shift_table.diff": given[A]}), "scale_shift_table.diff fits no layer"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("way", ["whole", "stream"])
def test_what_cannot_be_merged_is_refused_by_its_key_and_leaves_nothing(checkpoint, network, tmp_path, way, how, said):
    given = peft({TO_Q: pair(*network.get_submodule(TO_Q).weight.shape)})
    how(given)
    path, room = saved(tmp_path / "lora.safetensors", given), tmp_path / "room"
    with pytest.raises(ValueError, match=said):
        made(way, checkpoint, room / "out", (Lora(path),), Rtn(), W4A8)
    assert not [*room.glob("*"), *room.glob(".*")]


def test_of_several_networks_the_one_that_is_named_is_changed(network, tmp_path):
    down, up = pair(*network.get_submodule(TO_Q).weight.shape)
    given = {f"diffusion_model.{wan}": tensor for wan, tensor in peft({"blocks.0.self_attn.q": (down, up)}, "").items()}
    path = saved(tmp_path / "lora.safetensors", given)
    two = torch.nn.ModuleDict({"transformer": network, "transformer_2": copy.deepcopy(network)})
    with Loras([Lora(path, network="transformer_2")], two, Wan.originals) as loras:
        loras.merge_into(two)
    weights = [two[folder].get_submodule(TO_Q).weight for folder in two]
    assert torch.equal(weights[1], weights[0] + up @ down)
    with pytest.raises(ValueError, match=r"has transformer and transformer_2: say for which, as transformer_2=PATH"):
        Loras([Lora(path)], two, Wan.originals)
    with pytest.raises(ValueError, match=r"is for transformer_2; the checkpoint has one network"):
        Loras([Lora(path, network="transformer_2")], network, Wan.originals)


def test_a_path_may_end_in_a_scale(tmp_path):
    odd = tmp_path / "a:2"
    odd.mkdir()
    assert Lora.parse("x.safetensors") == Lora(tmp_path.__class__("x.safetensors"), 1.0)
    assert Lora.parse("x.safetensors:-0.5").scale == -0.5
    assert Lora.parse(str(odd)) == Lora(odd)
    assert Lora.parse(f"transformer_2={odd}:0.5") == Lora(odd, 0.5, "transformer_2")
    assert Lora.parse("dir/a=b.safetensors").network == ""
    for wrong in ("x:big", "x:nan", "x:0", "x:"):
        with pytest.raises(ValueError, match=r"--lora"):
            Lora.parse(wrong)


def test_a_file_that_is_not_there_is_named(network, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.safetensors"):
        merged(network, tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match=r"neither pytorch_lora_weights\.safetensors"):
        merged(network, tmp_path)
