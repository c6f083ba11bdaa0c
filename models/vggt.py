"""VGGT (arXiv:2503.11651): pictures of a scene become its cameras, its depth and its points, in one pass.

The linear layers of all transformer blocks shrink: the encoder's, the alternating frame and global blocks', and the
camera head's trunk. QuantVGGT (arXiv:2509.21302) speaks of the alternating blocks; the memory that it reports needs the
others as well. Embedders, dense heads and what is behind the camera's trunk stay in 16 bits. Only global attention is
quadratic in the number of views, and only it is sparse; that inside of frames is dense, in FP8 where the plan has dense
attention so, and else in 16 bits.

A checkpoint's point head and track head are left out: points come from depth and cameras, which the paper finds nearer
to the truth.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor, nn

from models import packed_pieces, run_record, scene_files, vggt_images, vggt_net
from models.base import BadInput, Kind, OnStep, Outputs, SceneInputs, SceneLimits, VideoInputs
from models.cameras import decode_pose, encode_pose, relative_to_first
from models.packed_pieces import Packing
from models.precision import fast_float
from models.run_record import Clock
from models.scene_files import View
from models.scene_metrics import abs_rel, auc, pose_errors, relative_poses
from models.vggt_blocks import Planned, pack_blocks
from models.vggt_graph import LaunchedAggregator, launch_heads
from models.vggt_images import Placement
from models.vggt_maps import pass_maps, tried, tried_last
from models.vggt_net import VGGT, Attend, Block, Prediction, VGGTConfig, dense, narrow_dense
from quant_runtime import artifact
from quant_runtime.artifact import Manifest
from quant_runtime.attention import AttentionPlan, AttentionState, describe_paths
from quant_runtime.linear import QuantLinear
from quant_runtime.narrow_linear import LARGE
from quant_runtime.selftest import Layer, Needs, Piece, distinct, layers_of, pieces, plan_of, quantized
from quant_runtime.sparsity.base import TokenLayout
from quant_runtime.sparsity.dense import Dense

SERVING = "serving.json"  # beside config.json: {"limits": what this checkpoint takes}, where that is not the default
COMPANIONS = (SERVING, "LICENSE", "README.md")  # of a checkpoint's files, what an artifact takes along
VGGT_LIMITS = SceneLimits(min_views=1, max_views=100)
BLOCKS = (
    "aggregator.patch_embed.blocks.",
    "aggregator.frame_blocks.",
    "aggregator.global_blocks.",
    "camera_head.trunk.",
)
# Scenes of models/demo/scene, by split and seed; the demo checkpoint was trained on seed 0.
CALIBRATION, JUDGING = ("train", 1), ("held-out", 1)
VIEWS = (4, 8, 6)  # of the first sample, the second, the third, and so on round
VIEWS_AT_ONCE = 4  # in the dense heads: it bounds memory, and a run can be stopped between any two
POSE = 9  # numbers of a pose encoding
PACKING = Packing(bias=True, exact=True, always=True, all_turn=True, wide=True)


def suits(plan: AttentionPlan) -> None:
    if plan.residual is not None:
        raise ValueError("a scene is reconstructed in one step, which leaves no residual to another: leave it out")


class VggtModel:
    """One loaded network. float32 where a pose or a depth is put together, whatever surrounds it."""

    kind: Kind = "scene"

    def __init__(self, net: VGGT, limits: SceneLimits) -> None:
        self.net, self._limits = net, limits
        self.network: nn.Module = net
        self.device = net.aggregator.camera_token.device
        self.kernels = describe_paths(self.device)
        self.in_16_bits: Attend = dense  # attention inside of frames
        self.by_graph: LaunchedAggregator | None = None
        self.attend(AttentionPlan())

    def launch_as_one(self) -> None:
        """Few views, from the second scene of so many on: for a GPU, and a network that stays as it is."""
        aggregator: Any = self.net.aggregator
        self.by_graph = LaunchedAggregator(aggregator, lambda: (self.attention, self.inside_frames))
        aggregator.forward = self.by_graph
        launch_heads(self.net, self.by_graph)

    def attend(self, plan: AttentionPlan) -> None:
        suits(plan)
        if self.by_graph is not None:
            self.by_graph.forget()
        self.attention = AttentionState(plan)
        self.inside_frames = AttentionState(replace(plan, policy=Dense()))
        inside = self.net.aggregator
        for layer, pair in enumerate(zip(inside.frame_blocks, inside.global_blocks, strict=True)):
            of_frame, of_scene = pair
            assert isinstance(of_frame, Block)
            assert isinstance(of_scene, Block)
            of_frame.attn.attend = Planned(layer, self.inside_frames) if self.packs_frames() else self.in_16_bits
            of_scene.attn.attend = Planned(layer, self.attention)

    def packs_frames(self) -> bool:
        """Whether attention inside of frames is in 8 bits throughout."""
        state, config = self.inside_frames, self.net.config
        call = state.call(0, TokenLayout(1, 1, 1))
        return state.plan.packed(call, config.embed_dim // config.num_heads, self.device)

    def layers(self) -> list[str]:
        modules = self.network.named_modules()
        return [name for name, module in modules if name.startswith(BLOCKS) and isinstance(module, nn.Linear)]

    def shared(self) -> list[Sequence[str]]:
        """None: queries, keys and values are one layer already."""
        return []

    def limits(self) -> SceneLimits:
        return self._limits

    def calibrate(self, samples: int, on_sample: OnStep) -> None:
        """Scenes of the demo's kind, rendered at the network's size: for a foreign checkpoint too, until it brings its
        own pictures."""
        for _ in self._rendered(CALIBRATION, samples, on_sample):
            pass

    def outputs(self, samples: int, on_sample: OnStep) -> list[Tensor]:
        """For each held-out scene float32 [2, S, 9 + side²] on the CPU: the network's answer, then the truth.

        Each view's pose encoding, and behind it its depth, side by side pixels row by row.
        """
        return [
            torch.stack([torch.cat((pose, depth.flatten(1)), dim=1).cpu() for pose, depth in both])
            for both in self._rendered(JUDGING, samples, on_sample)
        ]

    @torch.inference_mode()
    def _rendered(self, source: tuple[Any, int], samples: int, on_sample: OnStep) -> list[list[tuple[Tensor, Tensor]]]:
        """Poses [S, 9] and depths [S, side, side] of each scene: found and true."""
        from models.demo.scene import render, scenes, textures

        pyramid, side = textures.load().to(self.device), self.net.config.img_size
        found = []
        for sample in range(samples):
            views = min(max(VIEWS[sample % len(VIEWS)], self._limits.min_views), self._limits.max_views)
            drawn = scenes.draw(scenes.generator(*source, sample), 1, views).to(self.device)
            true = render.render(drawn, side, pyramid)
            got = self.predict(true.images, lambda done, of: None)
            assert got.depth is not None
            pose = encode_pose(true.extrinsics, true.intrinsics, (side, side))
            found.append([(got.pose[0], got.depth[0]), (pose[0], true.depth[0])])
            on_sample(sample + 1, samples)
        return found

    @torch.inference_mode()
    def predict(self, images: Tensor, on_step: OnStep) -> Prediction:
        """Pictures float32 [1, S, 3, H, W] in 0..1, H and W multiples of the patch size, to a Prediction.

        Refuses, with FloatingPointError, to answer what is not finite.
        """

        def done(step: int, of: int) -> None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # a step that is told is a step that is done
            on_step(step, of)

        self.attention.start(steps=1)
        self.inside_frames.start(steps=1)
        got: Prediction = self.net(images.to(self.device), chunk=VIEWS_AT_ONCE, on_step=done)
        assert got.depth is not None
        assert got.depth_conf is not None
        if not all(bool(torch.isfinite(part).all()) for part in (got.pose, got.depth, got.depth_conf)):
            raise FloatingPointError("the model made values that are not finite")
        return got

    def run(self, inputs: VideoInputs | SceneInputs, folder: Path, on_step: OnStep) -> Outputs:
        if not isinstance(inputs, SceneInputs):
            raise BadInput("artifact", "this artifact reconstructs scenes from pictures; it makes no videos")
        begun, clock = time.perf_counter(), Clock()
        images, placements = self._loaded(inputs)
        clock.lap("read")

        def stepped(done: int, of: int) -> None:
            if done == 1 and not (self.by_graph is not None and self.by_graph.launched):
                clock.lap("encode")  # launched as one with what follows, nobody sees where it ends
            elif done == 1 + self.net.config.depth:
                clock.lap("aggregate")
            on_step(done, of)

        prediction = self.predict(images[None], stepped)
        views = views_of(inputs.images, images, placements, prediction)
        clock.lap("heads")
        files, points = scene_files.write(views, folder, inputs.formats)
        clock.lap("write")
        seconds = clock.seconds | {"total": time.perf_counter() - begun}
        record = run_record.write(folder, inputs, self, seconds, views=len(views), points=points)
        return Outputs((*files, record))

    def _loaded(self, inputs: SceneInputs) -> tuple[Tensor, list[Placement]]:
        """What the network can never do, said at the door."""
        takes = self._limits
        if not takes.min_views <= len(inputs.images) <= takes.max_views:
            message = f"takes {takes.min_views} to {takes.max_views} pictures, got {len(inputs.images)}"
            raise BadInput("images", message)
        unknown = sorted(set(inputs.formats) - set(takes.formats))
        if unknown:
            raise BadInput("formats", f"makes {', '.join(takes.formats)}; got {', '.join(unknown)}")
        config = self.net.config
        try:
            return vggt_images.load(inputs.images, config.img_size, config.patch_size, "crop")
        except ValueError as error:
            raise BadInput("images", str(error)) from error


def views_of(
    paths: Sequence[Path], images: Tensor, placements: Sequence[Placement], prediction: Prediction
) -> list[View]:
    """A prediction about one scene, picture by picture; padding is cut off, and the first camera is the world.

    FloatingPointError where a field of view is not one.
    """
    assert prediction.depth is not None
    assert prediction.depth_conf is not None
    size = (images.shape[-2], images.shape[-1])
    extrinsics, intrinsics = decode_pose(prediction.pose[0].double().cpu(), size)
    if not bool(((intrinsics[:, [0, 1], [0, 1]] > 0) & intrinsics[:, [0, 1], [0, 1]].isfinite()).all()):
        raise FloatingPointError("the model saw a camera whose field of view is zero or more than half of all there is")
    extrinsics = relative_to_first(extrinsics)
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    depth, confidence = prediction.depth[0].cpu().numpy(), prediction.depth_conf[0].cpu().numpy()
    views = []
    for index, (path, where) in enumerate(zip(paths, placements, strict=True)):
        rows, columns = seen = where.visible(size)
        cut = intrinsics[index].clone()
        cut[:2, 2] -= cut.new_tensor([columns.start, rows.start])
        views.append(
            View(
                name=path.name,
                width=where.width,
                height=where.height,
                intrinsics=where.to_picture(intrinsics[index]).numpy(),
                extrinsics=extrinsics[index].numpy(),
                pixels=pixels[index][seen],
                depth=depth[index][seen],
                confidence=confidence[index][seen],
                depth_intrinsics=cut.numpy(),
            )
        )
    return views


class Vggt:
    """Folders as `facebook/VGGT-1B` is published: `config.json` and `model.safetensors` or `model.pt`."""

    name = "vggt"
    kind: Kind = "scene"
    component = ""
    originals: Sequence[tuple[str, str]] = ()

    def components(self, folder: Path) -> tuple[str, ...]:
        return (self.component,)

    def hashed(self, folder: Path) -> tuple[str, ...]:
        return self.components(folder)

    def recognizes(self, folder: Path) -> bool:
        path = folder / "config.json"
        return path.is_file() and {"img_size", "patch_size", "embed_dim"} <= json.loads(path.read_text()).keys()

    def load(self, folder: Path, device: str, dtype: torch.dtype) -> VggtModel:
        network, _ = vggt_net.load(folder)
        network.point_head, network.config = None, replace(network.config, point_head=False)
        settle(network, device, dtype, dtype)
        return VggtModel(network, read_limits(folder))

    def suits(self, network: nn.Module, plan: AttentionPlan) -> None:
        suits(plan)

    def open(self, folder: Path, manifest: Manifest, device: str, check: bool = False) -> VggtModel:
        """On a CPU, int8 layers are fastest fed with float32, and the dense heads with bfloat16 where it has that.

        So are the attentions inside of a frame; and the camera head's few rows are fastest without int8. What is one
        pass over memory on a GPU is several on a CPU: there blocks are packed for FP8 alone, which asks for it.
        """
        with torch.device("meta"):
            network = VGGT(vggt_net.read_config(folder / "config.json"))
        artifact.load_into(network, folder, component=self.component, device=device, check=check)
        vggt_net.fill_constants(network)
        dtype = _between(manifest, device)
        settle(network, device, dtype, fast_float(device))
        model = VggtModel(network, read_limits(folder))
        if manifest.attention is not None:
            model.attend(manifest.attention.plan())
        if manifest.layers and torch.device(device).type == "cpu":
            _spare_small_work(model)
        if torch.device(device).type != "cpu" or model.attention.plan.pv_bits == 8:
            pack_blocks(network)
        if torch.device(device).type == "cuda":
            pass_maps(network)
            model.launch_as_one()
        return model

    def pieces(self, folder: Path, manifest: Manifest, device: str) -> Iterable[Piece]:
        config = vggt_net.read_config(folder / "config.json")
        sizes, layout = [config.embed_dim // config.num_heads], TokenLayout(5, 10, 12, special=config.special)
        needs = Needs(layers_of(manifest), plan_of(manifest), sizes, layout, _between(manifest, device))
        yield from pieces(needs, device)
        if not isinstance(needs.plan.policy, Dense):  # inside of frames
            frames = replace(needs, layers=[], plan=replace(needs.plan, policy=Dense(), residual=None))
            for piece in pieces(frames, device):
                yield piece._replace(name=f"{piece.name}, inside of frames")
        yield from packed_pieces.pieces(needs, config.embed_dim, PACKING, torch.device(device))
        if torch.device(device).type == "cuda":
            kind, there = fast_float(device), torch.device(device)
            for width in sorted({*config.dpt_channels, config.dpt_features, config.dpt_features // 2}):
                yield Piece(f"maps of {width} channels", partial(tried, width, kind, there))
            for outputs in (2, 4) if config.point_head else (2,):
                yield Piece(f"{outputs} numbers a pixel", partial(tried_last, outputs, kind, there))
        for layer in distinct(needs.layers) if torch.device(device).type == "cpu" else ():
            widened = partial(_widen, layer, torch.device(device), needs.dtype)
            yield Piece(f"weights of {layer.inputs} inputs in floats", widened)

    def write(self, model: VggtModel, source: Path, target: Path) -> None:
        """The model is float16 afterwards."""
        _write_network(model.net, target)
        for name in COMPANIONS:
            if (source / name).is_file():
                artifact.link_or_copy(source / name, target / name)

    def score(self, outputs: Sequence[Tensor], full: Sequence[Tensor]) -> dict[str, float]:
        """Means over the scenes, as models/scene_metrics.py has them.

        Against the truth, and beside it what full precision scores: AUC@30 of the poses in 0..100, AbsRel of the depth.
        Against full precision: the median pair's pose error in degrees, and the mean relative difference of the depth.
        """
        rows = []
        for (got, true), (want, _) in zip(outputs, full, strict=True):
            (pose, depth), (pose_full, depth_full), (pose_true, depth_true) = map(_parted, (got, want, true))
            rows.append(
                {
                    "auc30": auc(pose_errors(pose, pose_true), 30),
                    "auc30_full": auc(pose_errors(pose_full, pose_true), 30),
                    "depth_absrel": abs_rel(depth, depth_true),
                    "depth_absrel_full": abs_rel(depth_full, depth_true),
                    "pose_difference": pose_errors(pose, pose_full).median(),
                    "depth_difference": ((depth - depth_full).abs() / depth_full).double().mean(),
                }
            )
        return {name: sum(float(row[name]) for row in rows) / len(rows) for name in rows[0]}

    def tiny(self, folder: Path) -> None:
        config = VGGTConfig(
            img_size=56, embed_dim=32, num_heads=2, encoder_depth=1, depth=4, taps=(0, 1, 2, 3), camera_depth=1,
            camera_heads=2, dpt_features=16, dpt_channels=(8, 8, 16, 16), point_head=False,
        )  # fmt: skip
        drawn = torch.Generator().manual_seed(0)
        network = VGGT(config)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                noise = torch.randn(parameter.shape, generator=drawn)
                if parameter.dim() > 1:
                    parameter.copy_(noise / math.sqrt(parameter[0].numel()))
                else:
                    parameter.copy_(0.02 * noise + (0 if name.endswith("bias") else 1))
                if name.endswith("pose_branch.fc2.weight"):
                    parameter.mul_(0.05)
            # Four rounds add up to a camera that could be one: no turn, and fields of view of about a radian.
            network.camera_head.pose_branch.fc2.bias.copy_(torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1]) / 4)
        limits = SceneLimits(min_views=1, max_views=3)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SERVING).write_text(json.dumps({"limits": asdict(limits)}, indent=1) + "\n")
        _write_network(network, folder)


def _widen(layer: Layer, device: torch.device, dtype: torch.dtype) -> None:
    """As _spare_small_work does."""
    quantized(layer, device, dtype).effective_weight()


def _between(manifest: Manifest, device: str) -> torch.dtype:
    """What goes from layer to layer."""
    return torch.float32 if manifest.layers and torch.device(device).type == "cpu" else fast_float(device)


def _write_network(network: VGGT, folder: Path) -> None:
    """Floats as float16: a VGGT's weights are far inside its range, and it keeps three bits more than bfloat16.

    The network's tensors become that too. ValueError names one that is too large.
    """
    for name, tensor in floats_of(network):
        tensor.data = tensor.data.to(torch.float16)
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} does not fit float16: it has values beyond 65504, or none")
    vggt_net.save_config(network.config, folder / "config.json")
    artifact.write_weights(network, folder)


def _parted(views: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Views [S, 9 + side²] as `VggtModel.outputs` has them: all pairs' poses, and depth [1, S, side, side]."""
    side = math.isqrt(views.shape[1] - POSE)
    extrinsics, _ = decode_pose(views[None, :, :POSE], (side, side))
    return relative_poses(extrinsics), views[None, :, POSE:].unflatten(2, (side, side))


def settle(network: VGGT, device: torch.device | str, dtype: torch.dtype, maps: torch.dtype) -> None:
    """Put a network where it runs: `dtype` in its blocks, `maps` in its dense heads, which lie channels-last.

    The camera head and the last convolution of a dense head are float32, so that poses and depths are.
    """
    constants = ("aggregator.mean", "aggregator.std")
    for name, tensor in floats_of(network):
        in_heads = name.startswith(("depth_head.", "point_head."))
        if name.startswith("camera_head.") or ".output_conv2.2." in name or name in constants:
            kind = torch.float32
        else:
            kind = maps if in_heads else dtype
        layout = torch.channels_last if in_heads and tensor.dim() == 4 else torch.contiguous_format
        tensor.data = tensor.data.to(device, kind).contiguous(memory_format=layout)
    network.to(device).eval().requires_grad_(False)


def floats_of(network: VGGT) -> list[tuple[str, Tensor]]:
    tensors = chain(network.named_parameters(), network.named_buffers())
    return [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]


def _spare_small_work(model: VggtModel) -> None:
    """What int8 and fused attention are too much effort for, on a CPU. Layers that are LARGE in float32 stay int8."""
    for name, layer in list(model.net.camera_head.named_modules()):
        if isinstance(layer, QuantLinear) and layer.in_features * layer.out_features < LARGE:
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            plain.weight = nn.Parameter(layer.effective_weight(), requires_grad=False)
            plain.register_parameter("bias", layer.bias)
            model.net.camera_head.set_submodule(name, plain)
    model.kernels = model.kernels | {"camera head": "float32 where it is small, the artifact's weights: a row a view"}
    if fast_float("cpu") == torch.bfloat16:
        for block in model.net.aggregator.patch_embed.blocks:
            assert isinstance(block, Block)
            block.attn.attend = narrow_dense
        model.in_16_bits = narrow_dense
        model.attend(model.attention.plan)
        if not model.packs_frames():
            model.kernels = model.kernels | {"attention inside of frames": "bfloat16 products, float32 softmax"}


def read_limits(folder: Path) -> SceneLimits:
    """What a checkpoint's serving.json says it takes, or the family's own. ValueError names a field that is none."""
    path = folder / SERVING
    if not path.is_file():
        return VGGT_LIMITS
    try:
        read = _Serving.model_validate_json(path.read_bytes())
    except pydantic.ValidationError as error:
        raise ValueError(f"{path}: {error}") from None
    return read.limits


_STRICT = pydantic.ConfigDict(extra="forbid")


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class _Limits(SceneLimits):
    """Checked."""


class _Serving(pydantic.BaseModel):
    model_config = _STRICT
    limits: _Limits
