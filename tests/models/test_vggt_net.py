import hashlib
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file

from models import vggt_net
from models.vggt_net import VGGT, Block, VGGTConfig
from quant_runtime.sparsity.base import TokenLayout
from tests.support import relative_error

SMALL = VGGTConfig(
    img_size=56,
    embed_dim=32,
    num_heads=2,
    encoder_depth=2,
    depth=4,
    taps=(0, 1, 2, 3),
    camera_depth=1,
    camera_heads=2,
    dpt_features=16,
    dpt_channels=(8, 8, 16, 16),
    point_head=True,
)
# Random weights, float32: what reordering sums may cost, measured against the size of the answer.
FLOAT32 = 2e-5


@pytest.fixture
def net():
    return loud()


def loud():
    """A small network none of whose parts is silent: no zero token, no zero bias."""
    built = VGGT(SMALL).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return built


def outputs(prediction):
    return {name: value for name, value in vars(prediction).items() if value is not None}


def test_vggt_1b_has_the_released_checkpoints_tensors():
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in VGGT(VGGTConfig()).state_dict().items()}
    assert sum(math.prod(shape) for shape in shapes.values()) == 1_256_537_516 - 65_941_396
    shapes |= vggt_net.track_head_shapes(VGGTConfig())
    lines = "\n".join(sorted(f"{key}|{'x'.join(map(str, shape))}" for key, shape in shapes.items()))
    want = "1b604c02c99e4a6dc3354fade94e4ac05086d7442cdb19a234b82b31abd6e122"
    assert (len(shapes), hashlib.sha256(lines.encode()).hexdigest()) == (1797, want)


@pytest.mark.parametrize("size", [(56, 56), (42, 84), (28, 28)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_encoder_is_dinov2_with_registers(net, size):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=4,
        image_size=56,
        patch_size=14,
        num_register_tokens=4,
        layer_norm_eps=1e-6,
    )
    theirs = Dinov2WithRegistersModel(config).eval()
    ours = net.aggregator.patch_embed
    state = {}
    for key, value in ours.state_dict().items():
        for old, new in (
            ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
            ("cls_token", "embeddings.cls_token"),
            ("mask_token", "embeddings.mask_token"),
            ("register_tokens", "embeddings.register_tokens"),
            ("pos_embed", "embeddings.position_embeddings"),
            ("blocks.", "encoder.layer."),
            ("ls1.gamma", "layer_scale1.lambda1"),
            ("ls2.gamma", "layer_scale2.lambda1"),
        ):
            key = key.replace(old, new)
        if key.startswith("norm."):
            key = "layernorm." + key.removeprefix("norm.")
        state[key] = value
    wanted = theirs.state_dict()
    for key in [key for key in state if ".attn." in key]:
        value, kind = state.pop(key), key.rsplit(".", 1)[1]
        layer = key.split(".attn.")[0]
        parts = dict(zip("qkv", value.chunk(3), strict=True)) if ".qkv." in key else {"o": value}
        for letter, part in parts.items():
            options = (f"{layer}.attention.{letter}_proj.{kind}", f"{layer}.attention.o_proj.{kind}")
            state[next(name for name in options if name in wanted)] = part
    theirs.load_state_dict(state)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        want = theirs(images).last_hidden_state[:, 5:]
        got = ours(images)
    assert relative_error(got, want) < 1e-6


def test_rotary_channels_turn_by_place_as_complex_numbers_do():
    cos, sin = vggt_net.rope_table(2, 3, special=2, head_dim=16, device=torch.device("cpu"))
    x = torch.randn(8, 1, 16)
    got = vggt_net.rotate(x, cos, sin)
    places = [(0, 0), (0, 0)] + [(row, column) for row in (1, 2) for column in (1, 2, 3)]
    for token, place in enumerate(places):
        for axis, start in ((0, 0), (1, 8)):
            for f in range(4):
                turned = complex(x[token, 0, start + f], x[token, 0, start + 4 + f])
                angle = place[axis] * 100 ** (-2 * f / 8)
                turned *= complex(math.cos(angle), math.sin(angle))
                assert got[token, 0, start + f] == pytest.approx(turned.real, abs=1e-5)
                assert got[token, 0, start + 4 + f] == pytest.approx(turned.imag, abs=1e-5)


def test_rotary_angles_stay_exact_in_a_bfloat16_network():
    cos, sin = vggt_net.rope_table(37, 37, special=5, head_dim=64, device=torch.device("cpu"))
    assert cos.dtype == sin.dtype == torch.float32


def test_the_skip_of_a_residual_unit_carries_the_rectified_input():
    unit = vggt_net.ResidualUnit(4)
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        got, want = unit(x), unit.conv2(unit.conv1(x.relu()).relu()) + x.relu()
    assert relative_error(got, want) < 1e-6
    assert relative_error(got, want - x.relu() + x) > 0.1


def test_views_after_the_first_may_come_in_any_order(net):
    images, order = torch.rand(1, 4, 3, 28, 42), [0, 3, 1, 2]
    with torch.no_grad():
        one, other = outputs(net(images)), outputs(net(images[:, order]))
    for name, value in one.items():
        dim = 2 if name == "pose_iterations" else 1
        assert relative_error(other[name], value.index_select(dim, torch.tensor(order))) < FLOAT32, name


def test_which_view_is_first_matters(net):
    images = torch.rand(1, 3, 3, 28, 28)
    with torch.no_grad():
        one, other = net(images).pose, net(images[:, [1, 0, 2]]).pose
    assert relative_error(other, one[:, [1, 0, 2]]) > 1e-3


def test_with_one_view_a_global_block_is_a_frame_block(net):
    block = net.aggregator.global_blocks[0]
    rope = vggt_net.rope_table(2, 2, 5, 16, torch.device("cpu"))
    x = torch.randn(3, 9, 32)
    with torch.no_grad():
        alone = torch.cat([block(row[None], rope, TokenLayout(1, 2, 2, 5)) for row in x])
        assert relative_error(block(x, rope), alone) < FLOAT32
        assert relative_error(block(x, rope, TokenLayout(3, 2, 2, 5)), alone) > 1e-3
        assert net(torch.rand(1, 1, 3, 28, 28)).pose.isfinite().all()


def test_a_batch_of_two_scenes_is_two_runs(net):
    images = torch.rand(2, 3, 3, 28, 42)
    with torch.no_grad():
        both = outputs(net(images))
        for index in range(2):
            for name, value in outputs(net(images[index])).items():
                got = both[name][:, index : index + 1] if name == "pose_iterations" else both[name][index : index + 1]
                assert relative_error(got, value) < FLOAT32, name


def test_the_dense_heads_do_not_care_for_the_chunk(net):
    images = torch.rand(2, 3, 3, 28, 28)
    with torch.no_grad():
        all_at_once, one_by_one = net(images, chunk=0), net(images, chunk=1)
        fewer = net(images, dense_views=2)
    for name in ("depth", "depth_conf", "points", "points_conf"):
        assert relative_error(getattr(one_by_one, name), getattr(all_at_once, name)) < FLOAT32
        assert relative_error(getattr(fewer, name), getattr(all_at_once, name)[:, :2]) < FLOAT32
    assert net(images, dense_views=0).depth is None


def test_outputs_have_the_sizes_that_they_promise(net):
    got = net(torch.rand(2, 3, 3, 28, 42))
    assert got.pose_iterations.shape == (4, 2, 3, 9)
    assert got.depth.shape == got.depth_conf.shape == got.points_conf.shape == (2, 3, 28, 42)
    assert got.points.shape == (2, 3, 28, 42, 3)
    assert (got.depth > 0).all()
    assert (got.depth_conf > 1).all()
    assert (got.pose[..., 7:] >= 0).all()


def test_each_pose_iteration_starts_from_the_tokens_and_feeds_back_without_gradient(net):
    net.camera_head.zero_grad()
    tap = torch.randn(1, 2, 9, 64)
    rounds = net.camera_head(tap)
    rounds[0].sum().backward()
    first = net.camera_head.pose_branch.fc2.weight.grad.clone()
    assert first.abs().sum() > 0
    assert net.camera_head.empty_pose_tokens.grad.abs().sum() > 0
    net.camera_head.zero_grad()
    rounds = net.camera_head(tap)
    (rounds[1] - rounds[0]).sum().backward()  # the second change alone: its input estimate is detached
    assert net.camera_head.empty_pose_tokens.grad.abs().sum() == 0


def test_an_attention_can_be_replaced_and_learns_how_the_tokens_lie(net):
    seen = []

    def spy(q, k, v, layout):
        seen.append((tuple(q.shape), layout))
        return vggt_net.dense(q, k, v, layout)

    for block in [*net.aggregator.frame_blocks, *net.aggregator.global_blocks]:
        block.attn.attend = spy
    images = torch.rand(2, 3, 3, 28, 28)
    with torch.no_grad():
        got = net(images).pose
        want_frame = ((6, 2, 9, 16), TokenLayout(1, 2, 2, special=5))
        want_global = ((2, 2, 27, 16), TokenLayout(3, 2, 2, special=5))
        assert seen == [want_frame, want_global] * 4
        for block in net.aggregator.modules():
            if isinstance(block, Block):
                block.attn.attend = vggt_net.dense
        assert torch.equal(got, net(images).pose)


@pytest.mark.parametrize(("views", "dense_views", "chunk", "steps"), [(3, None, 2, 10), (3, 0, 8, 6), (1, None, 0, 8)])
def test_every_part_is_a_step_and_the_last_is_the_last(net, views, dense_views, chunk, steps):
    told = []
    with torch.no_grad():
        net(torch.rand(1, views, 3, 28, 28), dense_views, chunk, lambda *step: told.append(step))
    assert told == [(step, steps) for step in range(1, steps + 1)]


def test_whoever_is_told_of_a_step_can_end_the_run_there(net):
    def stop(step, of):
        if step == 2:
            raise InterruptedError

    ran = []
    net.aggregator.frame_blocks[1].register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad(), pytest.raises(InterruptedError):
        net(torch.rand(1, 2, 3, 28, 28), on_step=stop)
    assert not ran


def test_a_resize_and_a_pointwise_convolution_commute():
    fusion = vggt_net.Fusion(8, two_inputs=True)
    x, side = torch.randn(2, 8, 5, 6), torch.randn(2, 8, 5, 6)
    with torch.no_grad():
        got = fusion(x, side, (9, 13))
        want = fusion.out_conv(vggt_net.resize(fusion.resConfUnit2(x + fusion.resConfUnit1(side)), (9, 13)))
    assert relative_error(got, want) < 1e-6


def test_images_of_other_sizes_are_refused(net):
    for shape in [(1, 2, 3, 30, 28), (1, 2, 4, 28, 28), (1, 0, 3, 28, 28), (3, 28, 28)]:
        with pytest.raises(ValueError, match="multiples of 14"):
            net(torch.zeros(shape))


def checkpoint(folder, net, extra=None, drop=()):
    state = {f"module.{key}": value for key, value in net.state_dict().items() if not key.startswith(tuple(drop))}
    save_file(state | (extra or {}), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(asdict(net.config) | {"license": "none"}))


def test_a_checkpoint_loads_and_what_is_left_out_is_named(net, tmp_path):
    tracker = {key: torch.zeros(shape) for key, shape in vggt_net.track_head_shapes(SMALL).items()}
    checkpoint(tmp_path, net, tracker)
    loaded, left_out = vggt_net.load(tmp_path)
    assert left_out == ["track_head"]
    images = torch.rand(1, 2, 3, 28, 28)
    with torch.no_grad():
        assert relative_error(loaded.eval()(images).points, net(images).points) < FLOAT32  # other addresses, other sums


def test_a_checkpoint_without_a_point_head_gives_a_network_without_one(net, tmp_path):
    checkpoint(tmp_path, net, drop=("point_head",))
    loaded, left_out = vggt_net.load(tmp_path)
    assert (loaded.point_head, left_out) == (None, [])


@pytest.mark.parametrize(
    ("extra", "drop", "named"),
    [
        ({"aggregator.surprise": torch.zeros(2)}, (), "aggregator.surprise.*no such tensor"),
        ({}, ("camera_head.embed_pose",), "camera_head.embed_pose.bias: missing"),
        ({"track_head.tracker.fmap_norm.weight": torch.zeros(5)}, (), "track_head.tracker.fmap_norm.weight"),
    ],
)
def test_a_checkpoint_with_other_tensors_is_refused_by_name(net, tmp_path, extra, drop, named):
    checkpoint(tmp_path, net, extra, drop)
    with pytest.raises(ValueError, match=named):
        vggt_net.load(tmp_path)


@pytest.mark.parametrize("change", [{"taps": (0, 1, 2, 4)}, {"img_size": 57}, {"num_heads": 3}, {"dpt_features": 12}])
def test_sizes_that_cannot_be_are_refused(change):
    with pytest.raises(ValueError, match="got"):
        replace(SMALL, **change)


BFLOAT16 = 2**-7  # two products with 8 bits of mantissa each, of the size of the answer


def test_narrow_attention_is_attention():
    q, k, v = (torch.randn(3, 2, 37, 16).transpose(1, 2).contiguous().transpose(1, 2) for _ in range(3))
    got, want = vggt_net.narrow_dense(q, k, v, None), vggt_net.dense(q.double(), k.double(), v.double(), None)
    assert got.dtype == v.dtype
    assert 0 < relative_error(got, want) < BFLOAT16
