"""The VGGT network (arXiv:2503.11651): views of a scene in; cameras, depth and optionally points out.

Written from the paper's description and the released checkpoints' tensor names, which this module's state dict repeats
exactly, so `facebook/VGGT-1B` loads as it is. All sizes are fields of `VGGTConfig`, whose names are those of the
checkpoint's own `config.json`; the defaults are VGGT-1B. The track head is not built: `load` names what it leaves out.

Numerics: rotary angles, camera head and the last activations are float32 whatever surrounds them; only the tapped
blocks' outputs are kept. Attention is a callable on each block (`block.attn.attend`), so that a sparse or a quantized
one takes the place of the dense one without touching the network.

Between parts `forward` calls `on_step`, from which a caller sees how far it is, and may leave by raising.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor, nn

from quant_runtime.sparsity.base import TokenLayout

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as DINOv2 was trained
LAST = 32  # channels of a dense head in front of its last product
ROPE_BASE = 100.0
CAMERA_ITERATIONS = 4


@dataclass(frozen=True)
class VGGTConfig:
    """Sizes of a VGGT. Everything a checkpoint's `config.json` does not say is VGGT-1B's."""

    img_size: int = 518  # the square that the position table is made for; other sizes interpolate it
    patch_size: int = 14
    embed_dim: int = 1024
    num_heads: int = 16
    mlp_ratio: int = 4
    registers: int = 4
    encoder_depth: int = 24
    depth: int = 24  # pairs of one frame block and one global block
    taps: tuple[int, int, int, int] = (4, 11, 17, 23)  # pairs whose outputs the heads read
    camera_depth: int = 4  # blocks of the camera head's trunk, at twice embed_dim
    camera_heads: int = 16
    dpt_features: int = 256
    dpt_channels: tuple[int, int, int, int] = (256, 512, 1024, 1024)
    point_head: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "taps", tuple(self.taps))  # JSON has lists
        object.__setattr__(self, "dpt_channels", tuple(self.dpt_channels))
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size is a multiple of patch_size, got {self.img_size} and {self.patch_size}")
        if self.embed_dim % self.num_heads or self.embed_dim // self.num_heads % 4:
            raise ValueError(f"heads have a multiple of 4 channels, got {self.embed_dim} over {self.num_heads} heads")
        if 2 * self.embed_dim % self.camera_heads:
            raise ValueError(f"camera_heads divides twice embed_dim, got {self.camera_heads} and {self.embed_dim}")
        if (
            len(self.taps) != 4
            or list(self.taps) != sorted(set(self.taps))
            or not 0 <= self.taps[0] <= self.taps[3] < self.depth
        ):
            raise ValueError(f"taps are four rising pairs below depth {self.depth}, got {self.taps}")
        if len(self.dpt_channels) != 4 or any(
            channels % 4 for channels in (*self.dpt_channels, self.dpt_features // 2)
        ):
            raise ValueError(f"DPT maps have a multiple of 4 channels, got {self.dpt_channels} and {self.dpt_features}")

    @property
    def special(self) -> int:
        """Tokens in front of each frame's patches: one camera token and the registers."""
        return 1 + self.registers


# How the tokens lie; None where they lie on no grid of ours (the encoder, the camera head).
Attend = Callable[[Tensor, Tensor, Tensor, TokenLayout | None], Tensor]
OnStep = Callable[[int, int], None]  # (steps done, of how many)


def dense(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout | None) -> Tensor:
    """softmax(q kᵀ / sqrt(head dim)) v. All [n, heads, tokens, head dim], one dtype; strides are free."""
    return F.scaled_dot_product_attention(q, k, v)


def narrow_dense(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout | None) -> Tensor:
    """The same with both products in bfloat16 and the softmax in float32; the answer has v's dtype.

    For a CPU that multiplies bfloat16 itself and sequences of a few hundred tokens, where torch's own takes half as
    long again.
    """
    narrow = torch.bfloat16
    scores = (q.to(narrow) @ k.to(narrow).mT).float().mul_(q.shape[-1] ** -0.5)
    return (scores.softmax(-1).to(narrow) @ v.to(narrow)).to(v.dtype)


@dataclass(frozen=True)
class Prediction:
    """What VGGT says about S views of B scenes, in the frame of view 0's camera and an arbitrary scale; float32."""

    pose_iterations: Tensor  # [4, B, S, 9], see models/cameras.py; the last is the answer
    depth: Tensor | None  # [B, S, H, W], z-depth
    depth_conf: Tensor | None  # [B, S, H, W], above 1
    points: Tensor | None  # [B, S, H, W, 3], from the point head
    points_conf: Tensor | None  # [B, S, H, W], above 1

    @property
    def pose(self) -> Tensor:
        return self.pose_iterations[-1]


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Projections of a self-attention; `attend` is the attention itself, free to be replaced."""

    attend: Attend

    def __init__(self, dim: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(dim // heads, eps=1e-5) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads, eps=1e-5) if qk_norm else nn.Identity()
        self.attend = dense

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """x [n, tokens, dim] to q, k, v [n, tokens, heads, head dim]; queries and keys are normed, then rotated."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return q.to(v.dtype), k.to(v.dtype), v


class Block(nn.Module):
    """x + attention, then x + MLP, pre-norm, each branch with its own scale per channel."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int, eps: float, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, qk_norm)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, mlp_ratio * dim, dim)
        self.ls2 = LayerScale(dim)

    def before(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """All that happens to a token on its own ahead of the attention."""
        return self.attn.project(self.norm1(x), rope)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """All that happens to a token on its own behind the attention; `attended` is [n, tokens, dim]."""
        x = x + self.ls1(self.attn.proj(attended))
        return x + self.ls2(self.mlp(self.norm2(x)))

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None, layout: TokenLayout | None = None
    ) -> Tensor:
        """x [n * frames, tokens, dim]: each run of `layout.frames` rows attends to itself as one sequence."""
        rows, tokens, dim = x.shape
        frames = layout.frames if layout else 1
        joined = (rows // frames, frames * tokens, self.attn.heads, -1)
        q, k, v = (part.reshape(joined).transpose(1, 2) for part in self.before(x, rope))
        attended = self.attn.attend(q, k, v, layout)
        return self.after(x, attended.transpose(1, 2).reshape(rows, tokens, dim))


def rope_table(height: int, width: int, special: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each channel's cosine and signed sine, as `rotate` takes them: float32 [special + height * width, 1, head_dim].

    Special tokens stand at (0, 0), patches at (row + 1, column + 1).
    """
    rows = torch.arange(1, height + 1, device=device).repeat_interleave(width)
    columns = torch.arange(1, width + 1, device=device).repeat(height)
    places = F.pad(torch.stack((rows, columns), dim=-1).float(), (0, 0, special, 0))
    count = head_dim // 4
    frequencies = ROPE_BASE ** (-torch.arange(count, device=device, dtype=torch.float32) / count)
    angles = (places[:, :, None] * frequencies)[:, None]  # [tokens, 1, axis (y, x), frequency]
    cosines, sines = angles.cos(), angles.sin()
    return torch.cat((cosines, cosines), dim=-1).flatten(-2), torch.cat((-sines, sines), dim=-1).flatten(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in two axes: the first half of the channels turns with y, the second with x. float32 out.

    x [..., tokens, heads, head dim]; in each half, channel i pairs with channel i + a quarter of the head.
    """
    x = x.float()
    partner = x.unflatten(-1, (2, 2, -1)).flip(-2).flatten(-3)
    return torch.addcmul(x * cos, partner, sin)


class PatchEmbed(nn.Module):
    """Only the projection, under the name that the checkpoint gives it."""

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """DINOv2 with registers: a picture to its patch tokens."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        dim, self.patch, self.grid = config.embed_dim, config.patch_size, config.img_size // config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, 4, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # in the checkpoint, and never used
        self.patch_embed = PatchEmbed(config.patch_size, dim)
        self.blocks = nn.ModuleList(
            Block(dim, config.num_heads, config.mlp_ratio, eps=1e-6, qk_norm=False) for _ in range(config.encoder_depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def positions(self, height: int, width: int) -> Tensor:
        """The position table for a grid of patches, [1, 1 + height * width, dim], float32."""
        table = self.pos_embed.float()
        if (height, width) == (self.grid, self.grid):
            return table
        patches = table[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size=(height, width), mode="bicubic", antialias=True)
        return torch.cat((table[:, :1], patches.flatten(2).transpose(1, 2)), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [n, 3, H, W] to patch tokens [n, patches, dim]."""
        n, _, height, width = images.shape
        patches = self.patch_embed(images).to(self.cls_token.dtype)  # under autocast the residual stream stays float32
        x = torch.cat((self.cls_token.expand(n, -1, -1), patches), dim=1)
        x = x + self.positions(height // self.patch, width // self.patch).to(x.dtype)
        registers = self.register_tokens.expand(n, -1, -1)
        x = torch.cat((x[:, :1], registers, x[:, 1:]), dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1 + registers.shape[1] :]


class Aggregator(nn.Module):
    """Pictures to tokens that know of each other: frame blocks and global blocks in turn."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        dim, self.config = config.embed_dim, config
        self.patch_embed = Encoder(config)
        # Slot 0 is for the first view, slot 1 for every other: the only thing that tells views apart.
        self.camera_token = nn.Parameter(torch.zeros(1, 2, 1, dim))
        self.register_token = nn.Parameter(torch.zeros(1, 2, config.registers, dim))
        self.frame_blocks, self.global_blocks = (
            nn.ModuleList(
                Block(dim, config.num_heads, config.mlp_ratio, eps=1e-5, qk_norm=True) for _ in range(config.depth)
            )
            for _ in range(2)
        )
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, on_part: Callable[[], None] | None = None) -> list[Tensor]:
        """Images [B, S, 3, H, W] in 0..1 to four taps [B, S, tokens, 2 * dim]: frame block's output, global's.

        `on_part` is called after the encoder and after each pair of blocks.
        """
        batch, frames, _, height, width = images.shape
        special = self.config.special
        x = self.patch_embed((images.flatten(0, 1) - self.mean) / self.std)
        if on_part is not None:
            on_part()
        tokens = torch.cat((self.camera_token, self.register_token), dim=2)  # [1, 2, special, dim]
        tokens = torch.cat((tokens[:, :1], tokens[:, 1:].expand(-1, frames - 1, -1, -1)), dim=1)
        tokens = tokens.expand(batch, -1, -1, -1).flatten(0, 1)
        x = torch.cat((tokens.to(x.dtype), x), dim=1)

        grid = (height // self.config.patch_size, width // self.config.patch_size)
        head_dim = self.config.embed_dim // self.config.num_heads
        rope = rope_table(*grid, special, head_dim, x.device)
        one, all_of_them = TokenLayout(1, *grid, special), TokenLayout(frames, *grid, special)
        taps = []
        for index, (frame_block, global_block) in enumerate(zip(self.frame_blocks, self.global_blocks, strict=True)):
            within = frame_block(x, rope, one)
            x = global_block(within, rope, all_of_them)
            if index in self.config.taps:
                taps.append(torch.cat((within, x), dim=-1).unflatten(0, (batch, frames)))
            if on_part is not None:
                on_part()
        return taps


class CameraHead(nn.Module):
    """The camera tokens of all views to pose encodings, in four rounds, each from the tokens and the last estimate."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        dim = 2 * config.embed_dim
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, 9))
        self.embed_pose = nn.Linear(9, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.token_norm = nn.LayerNorm(dim, eps=1e-5)
        self.trunk = nn.Sequential(
            *(
                Block(dim, config.camera_heads, config.mlp_ratio, eps=1e-5, qk_norm=False)
                for _ in range(config.camera_depth)
            )
        )
        self.trunk_norm = nn.LayerNorm(dim, eps=1e-5)
        self.pose_branch = Mlp(dim, dim // 2, 9)

    def forward(self, tap: Tensor) -> Tensor:
        """The last tap [B, S, tokens, 2 * dim] to pose encodings [4, B, S, 9]."""
        return self.rounds(tap[:, :, 0])

    def rounds(self, tokens: Tensor) -> Tensor:
        """The same of the camera tokens alone, [B, S, 2 * dim]."""
        tokens = self.token_norm(tokens.to(self.token_norm.weight.dtype))
        plain = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        estimate: Tensor | None = None
        rounds = []
        for _ in range(CAMERA_ITERATIONS):
            known = self.empty_pose_tokens.expand(*tokens.shape[:2], -1) if estimate is None else estimate.detach()
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(known.to(tokens.dtype))).chunk(3, dim=-1)
            change = self.pose_branch(self.trunk_norm(self.trunk(tokens + gate * (plain * (1 + scale) + shift))))
            # What is fed back is the sum before the activation, and every round starts from the tokens again.
            estimate = change.float() if estimate is None else estimate + change.float()
            rounds.append(torch.cat((estimate[..., :7], estimate[..., 7:].relu()), dim=-1))
        return torch.stack(rounds)


class ResidualUnit(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()  # the skip carries the rectified input too: the published network rectifies in place
        return x + self.conv2(self.conv1(x).relu())


class Fusion(nn.Module):
    def __init__(self, channels: int, two_inputs: bool) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(channels, channels, 1)
        if two_inputs:
            self.resConfUnit1 = ResidualUnit(channels)
        self.resConfUnit2 = ResidualUnit(channels)

    def forward(self, x: Tensor, side: Tensor | None, size: tuple[int, int]) -> Tensor:
        if side is not None:
            x = x + self.resConfUnit1(side)
        # A 1×1 convolution and a bilinear resize commute; this way round it has a quarter of the pixels to do.
        return resize(self.out_conv(self.resConfUnit2(x)), size)


class Scratch(nn.Module):
    """The part of a DPT head between the projections and the output, under the checkpoint's names."""

    def __init__(self, channels: Iterable[int], features: int, out: int) -> None:
        super().__init__()
        for index, count in enumerate(channels, start=1):
            setattr(self, f"layer{index}_rn", nn.Conv2d(count, features, 3, padding=1, bias=False))
            setattr(self, f"refinenet{index}", Fusion(features, two_inputs=index < 4))
        self.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, LAST, 3, padding=1), nn.ReLU(), nn.Conv2d(LAST, out, 1)
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        sides = [getattr(self, f"layer{index}_rn")(x) for index, x in enumerate(maps, start=1)]
        sizes = [(2 * sides[0].shape[2], 2 * sides[0].shape[3]), *(tuple(side.shape[2:]) for side in sides)]
        x = None
        for index in (4, 3, 2, 1):
            side, size = sides[index - 1], sizes[index - 1]
            fuse = getattr(self, f"refinenet{index}")
            x = fuse(side, None, size) if x is None else fuse(x, side, size)
        return self.output_conv1(x)


class DPTHead(nn.Module):
    """Four taps to a dense map at the pictures' size. Frames do not see each other here."""

    def __init__(self, config: VGGTConfig, out: int) -> None:
        super().__init__()
        dim, channels = 2 * config.embed_dim, config.dpt_channels
        self.special = config.special
        self.norm = nn.LayerNorm(dim, eps=1e-5)  # one for the four taps
        self.projects = nn.ModuleList(nn.Conv2d(dim, count, 1) for count in channels)
        self.resize_layers = nn.ModuleList(
            (
                nn.ConvTranspose2d(channels[0], channels[0], 4, stride=4),
                nn.ConvTranspose2d(channels[1], channels[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(channels[3], channels[3], 3, stride=2, padding=1),
            )
        )
        self.scratch = Scratch(channels, config.dpt_features, out)

    def forward(
        self,
        taps: list[Tensor],
        size: tuple[int, int],
        patch: int,
        chunk: int,
        on_part: Callable[[], None] | None = None,
    ) -> Tensor:
        """Taps [B, S, tokens, 2 * dim] to [B, S, out, H, W], float32, before the last activation.

        `chunk` views are worked on at a time, which bounds memory and changes nothing; 0 is all of them. `on_part` is
        called after each of these.
        """
        batch, frames = taps[0].shape[:2]
        flat = [tap.flatten(0, 1) for tap in taps]
        rows = batch * frames
        parts = []
        for start in range(0, rows, chunk or rows):
            parts.append(self.mapped([tap[start : start + (chunk or rows)] for tap in flat], size, patch))
            if on_part is not None:
                on_part()
        return torch.cat(parts).unflatten(0, (batch, frames))

    def mapped(self, taps: list[Tensor], size: tuple[int, int], patch: int) -> Tensor:
        """Of some views, whose taps are [n, tokens, 2 * dim]: [n, out, H, W]."""
        grid = (size[0] // patch, size[1] // patch)
        maps = []
        for tap, project, to_scale in zip(taps, self.projects, self.resize_layers, strict=True):
            x = self.norm(tap[:, self.special :].to(self.norm.weight.dtype)).transpose(1, 2).unflatten(2, grid)
            maps.append(to_scale(place_embedded(project(x), size)))
        conv, _, last = self.scratch.output_conv2
        x = conv(place_embedded(resize(self.scratch(maps), size), size)).relu_()
        # In bfloat16 the logarithm of a depth has steps of half a percent: a wall would come out as stairs.
        # A 1×1 convolution is a product of matrices, which is faster than the convolutions a CPU has in float32.
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        dense = x.permute(0, 2, 3, 1).to(last.weight.dtype) @ last.weight.flatten(1).t() + last.bias
        return dense.permute(0, 3, 1, 2).float()


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def place_embedded(x: Tensor, image: tuple[int, int]) -> Tensor:
    """x [n, channels, h, w] plus a tenth of sines and cosines of each pixel's place on an image of (height, width).

    The places span the image's shape scaled to unit diagonal, so the same place means the same at every resolution.
    """
    across, down = (half.to(x.dtype) for half in places(x.shape[2], x.shape[3], x.shape[1], image, x.device))
    table = torch.cat((across.expand(len(down), -1, -1), down[:, None].expand(-1, len(across), -1)), dim=2)
    return x + table.permute(2, 0, 1)  # channels last, as x lies where it is to be fast


@functools.lru_cache(maxsize=64)  # five of a head and a size of image
@torch.inference_mode(False)  # what is kept serves whoever trains, too
def places(
    height: int, width: int, channels: int, image: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """What place_embedded adds, float32: [width, channels / 2] to the first half of the channels, and to the others
    [height, channels / 2]."""
    aspect = image[1] / image[0]
    diagonal = math.sqrt(aspect * aspect + 1)
    count = channels // 4
    rate = 100.0 ** (-torch.arange(count, device=device, dtype=torch.float64) / count)
    halves = []
    for side, extent in ((width, aspect / diagonal), (height, 1 / diagonal)):
        edge = extent * (side - 1) / side
        angles = torch.linspace(-edge, edge, side, device=device, dtype=torch.float64)[:, None] * rate
        halves.append((torch.cat((angles.sin(), angles.cos()), dim=1) * 0.1).float())
    across, down = halves
    return across, down


class VGGT(nn.Module):
    """The whole network. `forward` takes any number of views whose sides are multiples of the patch size."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        self.config = config
        self.aggregator = Aggregator(config)
        self.camera_head = CameraHead(config)
        self.depth_head = DPTHead(config, out=2)
        self.point_head = DPTHead(config, out=4) if config.point_head else None

    def forward(
        self, images: Tensor, dense_views: int | None = None, chunk: int = 8, on_step: OnStep | None = None
    ) -> Prediction:
        """Images [B, S, 3, H, W] in 0..1 (or [S, 3, H, W], one scene) to a Prediction.

        `dense_views` of each scene get depth and points, from the first on (None: all; 0: cameras only, and no maps);
        the dense heads work on `chunk` views at a time (0: all at once). Steps are the encoder, each pair of blocks,
        the camera head and each chunk of a dense head.
        """
        if images.dim() == 4:
            images = images[None]
        size, patch = (images.shape[-2], images.shape[-1]), self.config.patch_size
        if images.dim() != 5 or images.shape[2] != 3 or size[0] % patch or size[1] % patch or 0 in images.shape:
            raise ValueError(f"images are [B, S, 3, H, W] with H and W multiples of {patch}, got {tuple(images.shape)}")
        on_part = self._counted(on_step, images.shape[0], images.shape[1], dense_views, chunk) if on_step else None
        return self.heads(self.aggregator(images, on_part), size, dense_views, chunk, on_part)

    def _counted(
        self, on_step: OnStep, batch: int, frames: int, dense_views: int | None, chunk: int
    ) -> Callable[[], None]:
        rows = batch * len(range(frames)[:dense_views])
        dense_heads = 1 if self.point_head is None else 2
        steps = 2 + self.config.depth + dense_heads * len(range(0, rows, chunk or rows or 1))
        done = itertools.count(1)
        return lambda: on_step(next(done), steps)

    def heads(
        self,
        taps: list[Tensor],
        size: tuple[int, int],
        dense_views: int | None = None,
        chunk: int = 8,
        on_part: Callable[[], None] | None = None,
    ) -> Prediction:
        """The taps of `aggregator` for images of `size` (height, width) to a Prediction.

        `on_part` is called after the camera head and after each chunk of a dense head.
        """
        with torch.autocast(taps[-1].device.type, enabled=False):  # a pose in bf16 would be off by a fifth of a degree
            poses = self.camera_head(taps[-1])
        if on_part is not None:
            on_part()
        depth = depth_conf = points = points_conf = None
        if dense_views != 0:
            seen = [tap[:, :dense_views] for tap in taps]
            log_depth, log_conf = self.depth_head(seen, size, self.config.patch_size, chunk, on_part).unbind(2)
            depth, depth_conf = log_depth.exp(), 1 + log_conf.exp()
            if self.point_head is not None:
                raw = self.point_head(seen, size, self.config.patch_size, chunk, on_part)
                xyz = raw[:, :, :3].permute(0, 1, 3, 4, 2)
                points, points_conf = xyz.sign() * xyz.abs().expm1(), 1 + raw[:, :, 3].exp()
        return Prediction(poses, depth, depth_conf, points, points_conf)


def load(folder: Path | str) -> tuple[VGGT, list[str]]:
    """A checkpoint folder (`config.json`, `model.safetensors` or `model.pt`) to a network and the groups it leaves out.

    The point head is built where the checkpoint has one. The track head is known and left out; any other key that the
    network does not have, and any that it misses, is refused by name. Pickles are read with weights_only.
    """
    folder = Path(folder)
    if (folder / "model.safetensors").exists():
        from safetensors.torch import load_file

        state = load_file(folder / "model.safetensors")
    else:
        state = torch.load(folder / "model.pt", map_location="cpu", weights_only=True, mmap=True)
    state = {_bare(key): value for key, value in state.items()}
    config = replace(
        read_config(folder / "config.json"), point_head=any(key.startswith("point_head.") for key in state)
    )
    with torch.device("meta"):
        net = VGGT(config)
    return net, fill(net, state)


def read_config(path: Path) -> VGGTConfig:
    """A checkpoint's or an artifact's `config.json`. Names not ours are passed over: published ones have such."""
    return TypeAdapter(VGGTConfig).validate_json(path.read_bytes())


def fill(net: VGGT, state: Mapping[str, Tensor]) -> list[str]:
    """Give a network on the meta device its weights, strictly, as they are. Returns the groups left out, by name."""
    tracker = track_head_shapes(net.config)
    left_out = {key for key, value in state.items() if tracker.get(key) == tuple(value.shape)}
    kept = {key: value for key, value in state.items() if key not in left_out}
    wanted = net.state_dict()
    wrong = [
        f"{key}: {tuple(kept[key].shape) if key in kept else 'missing'}, "
        f"wanted {tuple(wanted[key].shape) if key in wanted else 'no such tensor'}"
        for key in sorted(wanted.keys() | kept.keys())
        if key not in kept or key not in wanted or kept[key].shape != wanted[key].shape
    ]
    if wrong:
        raise ValueError(f"not a VGGT of this config: {len(wrong)} tensors differ, the first: " + "; ".join(wrong[:5]))
    net.load_state_dict(kept, assign=True)
    fill_constants(net)
    return sorted({key.split(".")[0] for key in left_out})


def fill_constants(net: VGGT) -> None:
    """Give a network that was on the meta device the buffers that no checkpoint holds, on the CPU."""
    for name, values in (("mean", MEAN), ("std", STD)):
        setattr(net.aggregator, name, torch.tensor(values).view(1, 3, 1, 1))


def save_config(config: VGGTConfig, path: Path) -> None:
    path.write_text(json.dumps(asdict(config), indent=2) + "\n")


def _bare(key: str) -> str:
    return key.removeprefix("module.").removeprefix("model.")


def track_head_shapes(config: VGGTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published track head, which is not built here: what a checkpoint may hold besides."""
    width, token, features = 384, 388, 128
    dim, channels, fused = 2 * config.embed_dim, config.dpt_channels, features
    shapes: dict[str, tuple[int, ...]] = {}

    def add(prefix: str, *shape: int, bias: int | None = None) -> None:
        shapes[f"track_head.{prefix}.weight"] = shape
        if bias is not None:
            shapes[f"track_head.{prefix}.bias"] = (bias,)

    def linear(prefix: str, out: int, into: int) -> None:
        add(prefix, out, into, bias=out)

    def norm(prefix: str, size: int) -> None:
        add(prefix, size, bias=size)

    head = "feature_extractor"
    norm(f"{head}.norm", dim)
    for index, count in enumerate(channels):
        add(f"{head}.projects.{index}", count, dim, 1, 1, bias=count)
        add(f"{head}.scratch.layer{index + 1}_rn", fused, count, 3, 3)
        add(f"{head}.scratch.refinenet{index + 1}.out_conv", fused, fused, 1, 1, bias=fused)
        for unit in (2,) if index == 3 else (1, 2):
            for conv in (1, 2):
                add(f"{head}.scratch.refinenet{index + 1}.resConfUnit{unit}.conv{conv}", fused, fused, 3, 3, bias=fused)
    for index, side in ((0, 4), (1, 2), (3, 3)):
        add(f"{head}.resize_layers.{index}", channels[index], channels[index], side, side, bias=channels[index])
    add(f"{head}.scratch.output_conv1", features, fused, 3, 3, bias=features)

    linear("tracker.corr_mlp.fc1", width, 567)
    linear("tracker.corr_mlp.fc2", features, width)
    norm("tracker.fmap_norm", features)
    norm("tracker.ffeat_norm", features)
    linear("tracker.ffeat_updater.0", features, features)
    linear("tracker.vis_predictor.0", 1, features)
    linear("tracker.conf_predictor.0", 1, features)
    shapes["track_head.tracker.query_ref_token"] = (1, 2, token)
    former = "tracker.updateformer"
    shapes[f"track_head.{former}.virual_tracks"] = (1, 64, 1, width)  # the checkpoint's own spelling
    norm(f"{former}.input_norm", token)
    linear(f"{former}.input_transform", width, token)
    norm(f"{former}.output_norm", width)
    linear(f"{former}.flow_head", 2 + features, width)
    kinds = {
        "time_blocks": ("attn", ("norm1", "norm2")),
        "space_virtual_blocks": ("attn", ("norm1", "norm2")),
        "space_point2virtual_blocks": ("cross_attn", ("norm1", "norm_context", "norm2")),
        "space_virtual2point_blocks": ("cross_attn", ("norm1", "norm_context", "norm2")),
    }
    for kind, (attention, norms) in kinds.items():
        for index in range(6):
            block = f"{former}.{kind}.{index}"
            for name in norms:
                norm(f"{block}.{name}", width)
            shapes[f"track_head.{block}.{attention}.in_proj_weight"] = (3 * width, width)
            shapes[f"track_head.{block}.{attention}.in_proj_bias"] = (3 * width,)
            linear(f"{block}.{attention}.out_proj", width, width)
            linear(f"{block}.mlp.fc1", 4 * width, width)
            linear(f"{block}.mlp.fc2", width, 4 * width)
    return shapes
