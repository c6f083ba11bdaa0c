import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models import compress
from models.compress import Recipe
from models.vggt import VGGT_LIMITS, Vggt, VggtModel
from models.vggt_blocks import Block, neighbours, pack_blocks, turned
from models.vggt_net import VGGT, VGGTConfig, rope_table, rotate, save_config
from quant_runtime.attention import AttentionPlan
from quant_runtime.formats import QuantFormat
from quant_runtime.methods import METHODS, Rtn
from quant_runtime.sparsity.base import TokenLayout
from quant_runtime.sparsity.topk import TopK
from tests.support import relative_error

FLOAT32 = 1e-6  # the same sums in another order
FLIPS = 1e-3  # here and there an entry falls to the other side of a half
MANY_FLIPS = 0.03  # 14 blocks hand each of them on to every token, as they hand on what rounding itself does
FP8_VALUES = 0.03  # what P and V in FP8 do to the taps
FORMATS = [("rtn", "W8A8"), ("quarot", "W4A8"), ("rtn", "W3A6"), ("rtn", "FP8")]
PACKED = AttentionPlan(dense_qk_bits=8, pv_bits=8)
PLANS = {
    "packed": PACKED,
    "sparse": AttentionPlan(TopK(0.5), dense_qk_bits=8, pv_bits=8),
    "sparse across frames, 16 bits inside": AttentionPlan(TopK(0.5, block=16), pv_bits=8),
    "16 bits": AttentionPlan(),
}
CONFIG = VGGTConfig(
    img_size=56, embed_dim=128, num_heads=2, encoder_depth=2, depth=6, taps=(0, 1, 3, 5), camera_depth=1,
    camera_heads=2, dpt_features=16, dpt_channels=(8, 8, 16, 16), point_head=False,
)  # fmt: skip


def network():
    drawn = torch.Generator().manual_seed(0)
    net = VGGT(CONFIG)
    for name, parameter in net.named_parameters():
        noise = torch.randn(parameter.shape, generator=drawn)
        if parameter.dim() > 1:
            parameter.data = noise / math.sqrt(parameter[0].numel())
        else:
            parameter.data = 0.3 * noise + (0 if name.endswith("bias") else 1)
        if name.endswith("gamma"):
            parameter.data *= 0.2  # of blocks that answer more than they are given, each makes a flip larger
    return net.eval().requires_grad_(False)


def model(method="rtn", bits="W8A8", kept=()):
    made = VggtModel(network(), VGGT_LIMITS)
    for name in made.layers():
        if name not in kept:
            layer = made.net.get_submodule(name)
            made.net.set_submodule(name, METHODS[method]().quantize(layer, None, QuantFormat.parse(bits)))
    return made


def packed(*args, **kwargs):
    made = model(*args, **kwargs)
    pack_blocks(made.net)
    return made


def blocks(made):
    inside = made.net.aggregator
    return [*inside.patch_embed.blocks, *inside.frame_blocks, *inside.global_blocks]


def run(made, plan, images):
    """The taps, frame blocks' answers and global ones' side by side."""
    made.attend(plan)
    with torch.inference_mode():
        return torch.stack(made.net.aggregator(images))


@pytest.fixture
def images():
    return torch.rand(2, 7, 3, 42, 56)  # two scenes of 119 tokens: with 21 a view, none fills a block


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("method", "bits"), FORMATS)
def test_a_packed_block_answers_what_the_networks_own_answers(plan, method, bits):
    """Most tokens exactly that: of the others an entry has fallen to the other side of a half."""
    stock, made = model(method, bits), packed(method, bits)
    x, rope = torch.randn(14, 17, 128), rope_table(3, 4, 5, 64, torch.device("cpu"))
    one, seven = TokenLayout(1, 3, 4, 5), TokenLayout(7, 3, 4, 5)
    for m in (stock, made):
        m.attend(PLANS[plan])
    for (own, block), *where in (
        (pair(stock, made, "patch_embed.blocks"), None, None),
        (pair(stock, made, "frame_blocks"), rope, one),
        (pair(stock, made, "global_blocks"), rope, seven),
    ):
        assert isinstance(block.forward, Block)
        block.forward.followed = False
        with torch.inference_mode():
            want, got = own(x, *where), block(x, *where)
        assert ((got - want).norm(dim=2) / want.norm(dim=2)).median() < FLOAT32
        assert relative_error(got, want) < FLIPS


def pair(stock, made, chain):
    """The second block of either."""
    return [m.net.get_submodule(f"aggregator.{chain}.1") for m in (stock, made)]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("method", "bits"), FORMATS)
def test_a_network_of_packed_blocks_answers_what_it_answered(plan, method, bits, images):
    stock, made = model(method, bits), packed(method, bits)
    assert all(isinstance(block.forward, Block) for block in blocks(made))
    assert relative_error(run(made, PLANS[plan], images), run(stock, PLANS[plan], images)) < MANY_FLIPS
    assert made.attention.density() == stock.attention.density()
    assert made.attention.density().packed == (plan != "16 bits")
    assert made.packs_frames() == (plan in ("packed", "sparse"))


def test_channels_that_lie_side_by_side_turn_as_those_that_lie_apart():
    """Scores do not know in which order channels are."""
    q, k = torch.randn(2, 3, 17, 2, 64)
    cos, sin = rope_table(3, 4, 5, 64, q.device)
    order = neighbours(64, torch.device("cpu"))
    pairs = [t[:, 0, order[1::2]] for t in (cos, sin)]
    want_q, want_k = rotate(q, cos, sin), rotate(k, cos, sin)
    got_q, got_k = turned(q[..., order], *pairs), turned(k[..., order], *pairs)
    assert relative_error(got_q, want_q[..., order]) < FLOAT32
    want, got = (a.transpose(1, 2) @ b.transpose(1, 2).mT for a, b in ((want_q, want_k), (got_q, got_k)))
    assert relative_error(got, want) < FLOAT32
    assert relative_error(turned(q, *pairs), want_q) > 0.1, "the order counts"


def test_attention_in_8_bits_is_attention_but_for_its_rounding(images):
    made = packed()
    want, got = run(made, AttentionPlan(), images), run(made, PACKED, images)
    assert not torch.equal(got, want)
    assert relative_error(got, want) < FP8_VALUES


def test_a_block_behind_one_of_16_bits_is_handed_the_whole_sum(images):
    kept = "aggregator.global_blocks.2.mlp.fc2"
    made = packed(kept=(kept,))
    assert isinstance(made.net.get_submodule(kept), nn.Linear)
    assert [isinstance(block.forward, Block) for block in made.net.aggregator.global_blocks].count(False) == 1
    assert relative_error(run(made, PACKED, images), run(model(), PACKED, images)) < MANY_FLIPS


def test_a_packed_projection_is_not_found_by_the_name_that_it_is_written_by():
    state = packed().net.state_dict()
    assert "aggregator.frame_blocks.0.attn.qkv.qweight" not in state
    assert "aggregator.patch_embed.blocks.0.attn.qkv.qweight" in state, "nothing turns in the encoder"


def test_a_pass_that_is_broken_off_leaves_nothing_to_the_next_and_none_keeps_tensors(images):
    made = packed()
    want = run(made, PACKED, images)

    def broken(*_):
        raise InterruptedError

    last = made.net.aggregator.global_blocks[-1]
    last.mlp.fc2.product = broken
    with pytest.raises(InterruptedError):
        run(made, PACKED, images)
    scene = last.forward.scene
    assert scene._turns.keys() == {1, 7}, "it was broken off within"
    del last.mlp.fc2.product
    assert torch.equal(run(made, PACKED, images), want)
    assert (scene._turns, scene._table, scene._owed) == ({}, None, [])


def test_an_artifact_in_8_bits_throughout_reconstructs_the_same_whenever_it_is_opened(tmp_path, images):
    net = network().half()
    net.camera_head.pose_branch.fc2.weight.mul_(0.05)  # cameras that could be some
    save_config(CONFIG, tmp_path / "config.json")
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    out = tmp_path / "artifact"
    recipe = Recipe(Rtn(), QuantFormat.parse("W8A8"), PACKED)
    manifest = compress.compress(Vggt(), tmp_path, recipe, out, base="small", device="cpu", on_progress=lambda *_: None)
    assert manifest.attention.fp8_calls == 1.0
    assert manifest.quality["depth_difference"] < FP8_VALUES
    got, want = (Vggt().open(out, manifest, "cpu").predict(images[:1], lambda *_: None) for _ in range(2))
    assert torch.equal(got.depth, want.depth)
    opened = Vggt().open(out, manifest, "cpu")
    assert all(isinstance(block.forward, Block) for block in blocks(opened))
    assert "bfloat16" not in opened.kernels.get("attention inside of frames", "")
    opened.attend(AttentionPlan())
    assert relative_error(opened.predict(images[:1], lambda *_: None).depth, want.depth) < FP8_VALUES
