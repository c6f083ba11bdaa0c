"""Wan (arXiv:2503.20314) in diffusers' layout: text to video.

The linear layers of its blocks shrink, its self-attention goes sparse.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import pydantic
import torch
import transformers
from diffusers import WanPipeline
from safetensors import SafetensorError
from torch import Tensor, nn

import quant_runtime.diffusers
from models import convolutions, run_record, video_files
from models.base import BadInput, Kind, OnStep, OutputFile, Outputs, SceneInputs, VideoInputs, VideoLimits
from models.precision import fast_float
from models.run_record import Clock
from quant_runtime import artifact, quality
from quant_runtime.artifact import Manifest
from quant_runtime.attention import AttentionPlan, AttentionState, attend, describe_paths
from quant_runtime.kernels._cpu import give_back_freed_memory
from quant_runtime.linear import QuantLinear, fuse
from quant_runtime.sparsity.base import TokenLayout

SERVING = "serving.json"  # beside model_index.json: what this checkpoint takes, where that is not Wan's own
PROMPTS = (  # where a checkpoint names none of its own
    "A ginger cat walks along a garden wall at sunset, the camera follows from the side",
    "Waves break on a rocky shore under a grey sky, slow motion",
    "A chef tosses vegetables in a pan over a high flame, close-up",
    "A red tram crosses a rainy square at night, reflections on the ground",
    "A child blows soap bubbles in a park, the bubbles drift towards the camera",
    "An eagle glides over snowy mountains, aerial view",
    "A potter shapes a clay bowl on a spinning wheel, hands in focus",
    "Time-lapse of clouds passing over a wheat field",
)
WAN_LIMITS = VideoLimits(
    size_multiple=16, max_pixels=1280 * 720, max_side=1280, max_frames=81, width=832, height=480, frames=81, fps=16,
    steps=50, guidance=5.0,
)  # fmt: skip


_STRICT = pydantic.ConfigDict(extra="forbid")
_Prompts = Annotated[tuple[str, ...], pydantic.Field(min_length=1)]


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class _Limits(VideoLimits):
    """Checked."""


class Serving(pydantic.BaseModel):
    """What a checkpoint is run with. The defaults are Wan 2.1's."""

    model_config = _STRICT

    limits: _Limits | VideoLimits = WAN_LIMITS
    max_tokens: Annotated[int, pydantic.Field(ge=1, strict=True)] = 512  # prompts are padded to it; longer are refused
    calibration: _Prompts = PROMPTS[:4]
    judging: _Prompts = PROMPTS[4:]

    @classmethod
    def read(cls, folder: Path) -> Serving:
        """The checkpoint's own, where it has one. ValueError names the file and the field that will not do."""
        path = folder / SERVING
        if not path.is_file():
            return cls()
        try:
            return cls.model_validate_json(path.read_bytes())
        except pydantic.ValidationError as error:
            raise ValueError(f"{path}: {error}") from None


class SelfAttention:
    """diffusers' processor of `attn1`, with our attention. Dense and unquantized it computes what theirs does."""

    def __init__(self, layer: int, model: WanModel) -> None:
        self.layer, self.model = layer, model

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        fused = getattr(attn, "fused_qkv", None)
        if fused is not None:
            q, k, v = fused(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        assert rotary_emb is not None
        q, k = (rotated(x.unflatten(2, (attn.heads, -1)), *rotary_emb) for x in (attn.norm_q(q), attn.norm_k(k)))
        v = v.unflatten(2, (attn.heads, -1))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = attend(q, k, v, layer=self.layer, layout=self.model.layout, state=self.model.attention)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring channels of x [B, N, H, D] turned as pairs; cos and sin [1, N, 1, D] hold each angle twice."""
    turn = torch.complex(cos[..., 0::2].float(), sin[..., 1::2].float())
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).type_as(x)


class WanModel:
    """One loaded pipeline. `network` is its transformer."""

    kind: Kind = "video"

    def __init__(self, pipe: WanPipeline, serving: Serving, device: str) -> None:
        self.pipe, self.serving = pipe, serving
        self.kernels = describe_paths(device)
        self.network: Any = pipe.transformer
        pipe.set_progress_bar_config(disable=True)
        self.layout = TokenLayout(1, 1, 1)
        self.network.register_forward_pre_hook(self._see_layout, with_kwargs=True)
        self.attend(AttentionPlan())

    def attend(self, plan: AttentionPlan) -> None:
        self.attention = AttentionState(plan)
        for i, block in enumerate(self.network.blocks):
            block.attn1.set_processor(SelfAttention(i, self))

    def _see_layout(self, network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        t, h, w = (n // p for n, p in zip(latents.shape[2:], network.config.patch_size, strict=True))
        self.layout = TokenLayout(frames=t, height=h, width=w)

    def layers(self) -> list[str]:
        """Everything linear inside the blocks. Embedders, time projection and head stay as they are."""
        return [n for n, m in self.network.named_modules() if n.startswith("blocks.") and isinstance(m, nn.Linear)]

    def shared(self) -> list[Sequence[str]]:
        groups: list[Sequence[str]] = []
        for i in range(len(self.network.blocks)):
            groups.append([f"blocks.{i}.attn1.to_{x}" for x in "qkv"])
            groups.append([f"blocks.{i}.attn2.to_{x}" for x in "kv"])
        return groups

    def limits(self) -> VideoLimits:
        return self.serving.limits

    def calibrate(self, samples: int, on_sample: OnStep) -> None:
        """Short runs (8 steps at most) of the default size: each prompt sees noise of every level."""
        self._films(self.serving.calibration, samples, min(8, self.limits().steps), on_sample)

    def outputs(self, samples: int, on_sample: OnStep) -> list[Tensor]:
        """uint8 [T, H, W, 3] of each judging prompt, seed 0 and up, defaults throughout."""
        return self._films(self.serving.judging, samples, self.limits().steps, on_sample)

    def _films(self, prompts: Sequence[str], samples: int, steps: int, on_sample: OnStep) -> list[Tensor]:
        size, films = self.limits(), []
        for i in range(samples):
            inputs = VideoInputs(
                prompt=prompts[i % len(prompts)], width=size.width, height=size.height, frames=size.frames,
                fps=size.fps, steps=steps, guidance=size.guidance, seed=i,
            )  # fmt: skip
            films.append(torch.from_numpy(self.film(inputs, lambda done, of: None).frames))
            on_sample(i + 1, samples)
        return films

    def run(self, inputs: VideoInputs | SceneInputs, folder: Path, on_step: OnStep) -> Outputs:
        """video.mp4, poster.jpg and run.json."""
        if not isinstance(inputs, VideoInputs):
            raise BadInput("artifact", "this artifact makes videos from prompts; it reconstructs no scenes")
        begun = time.perf_counter()
        film = self.film(inputs, on_step)
        video_files.write_mp4(film.frames, folder / "video.mp4", inputs.fps)
        video_files.write_poster(film.frames, folder / "poster.jpg")
        seconds = film.seconds | {"total": time.perf_counter() - begun}
        return Outputs(
            (
                OutputFile("video.mp4", "video/mp4", folder / "video.mp4"),
                OutputFile("poster.jpg", "image/jpeg", folder / "poster.jpg"),
                run_record.write(folder, inputs, self, seconds, tokens=self.layout.tokens),
            )
        )

    @torch.inference_mode()
    def film(self, inputs: VideoInputs, on_step: OnStep) -> Film:
        """The same inputs on the same device give the same film; noise is drawn on the CPU."""
        self._check(inputs)
        self.attention.start(inputs.steps)
        clock = Clock()
        prompt, negative = self.pipe.encode_prompt(
            inputs.prompt,
            inputs.negative_prompt,
            do_classifier_free_guidance=inputs.guidance > 1,
            max_sequence_length=self.serving.max_tokens,
        )
        clock.lap("text")

        def stepped(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step + 1, inputs.steps)
            if step + 1 < inputs.steps:
                self.attention.at(step + 1)
            else:
                clock.lap("denoise")
            return tensors

        video = self.pipe(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            height=inputs.height,
            width=inputs.width,
            num_frames=inputs.frames,
            num_inference_steps=inputs.steps,
            guidance_scale=inputs.guidance,
            generator=torch.Generator("cpu").manual_seed(inputs.seed),
            callback_on_step_end=stepped,
            output_type="pt",
        ).frames[0]
        if not bool(torch.isfinite(video).all()):
            raise FloatingPointError("the model made values that are not finite")
        frames = (video.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        give_back_freed_memory()
        clock.lap("decode")
        return Film(frames, clock.seconds)

    def _check(self, inputs: VideoInputs) -> None:
        """What would end deep inside the pipeline, or be cut unseen, said at the door."""
        size = self.limits()
        for name, value in (("width", inputs.width), ("height", inputs.height)):
            if value % size.size_multiple or not 0 < value <= size.max_side:
                raise BadInput(name, f"{name} is a multiple of {size.size_multiple} up to {size.max_side}, got {value}")
        if inputs.width * inputs.height > size.max_pixels:
            asked = f"{inputs.width}x{inputs.height}"
            raise BadInput("width", f"width times height is at most {size.max_pixels} pixels, got {asked}")
        if (inputs.frames - 1) % size.frames_step or not 0 < inputs.frames <= size.max_frames:
            wanted = f"{size.frames_step}n + 1 up to {size.max_frames}"
            raise BadInput("frames", f"frames are {wanted}, got {inputs.frames}")
        if not 0 < inputs.steps <= size.max_steps:
            raise BadInput("steps", f"steps are 1 to {size.max_steps}, got {inputs.steps}")
        for name, text in (("prompt", inputs.prompt), ("negative_prompt", inputs.negative_prompt)):
            tokens = len(self.pipe.tokenizer(text).input_ids)
            if tokens > self.serving.max_tokens:
                raise BadInput(name, f"{name} is at most {self.serving.max_tokens} tokens long, got {tokens}")


@dataclass(frozen=True)
class Film:
    frames: np.ndarray  # uint8 [T, H, W, 3]
    seconds: dict[str, float]  # text, denoise, decode


class Wan:
    """diffusers' WanPipeline folders."""

    name = "wan"
    kind = "video"
    component = "transformer"

    def recognizes(self, folder: Path) -> bool:
        path = folder / "model_index.json"
        if not path.is_file():
            return False
        try:
            index = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        return isinstance(index, dict) and index.get("_class_name") == "WanPipeline"

    def load(self, folder: Path, device: str, dtype: torch.dtype | dict[str, torch.dtype]) -> WanModel:
        for library in (diffusers, transformers):  # their bars would be drawn across ours, and into a worker's log
            library.utils.logging.disable_progress_bar()
        try:
            pipe = WanPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ValueError(f"{folder} is not a whole WanPipeline: {error}") from error
        if pipe.transformer_2 is not None:
            raise ValueError(f"{folder} has a transformer_2, as Wan 2.2 A14B has: two networks are not run yet")
        pipe.to(device)
        if device == "cpu":
            convolutions.by_onednn(pipe.vae)
        return WanModel(pipe, Serving.read(folder), device)

    def open(self, folder: Path, manifest: Manifest, device: str) -> WanModel:
        """In bfloat16 where the device multiplies it itself, else in float32.

        On a CPU int8 layers come with float32 around them: there norms and roundings are faster so.
        """
        half = fast_float(device)
        around = torch.float32 if device == "cpu" and manifest.layers else half
        model = self.load(folder, device, {"transformer": around, "text_encoder": around, "default": half})
        fuse_projections(model.network)
        if manifest.attention is not None:
            model.attend(manifest.attention.plan())
        return model

    def write(self, model: WanModel, source: Path, target: Path) -> None:
        for path in sorted(source.iterdir()):
            if path.name != self.component:
                artifact.link_or_copy(path, target / path.name)
        network = model.network
        specs = {name: m.spec for name, m in network.named_modules() if isinstance(m, QuantLinear)}
        if specs:
            quant_runtime.diffusers.mark(network, specs)
        narrow(network)
        network.save_pretrained(target / self.component)

    def score(self, outputs: Sequence[Tensor], full: Sequence[Tensor]) -> dict[str, float]:
        """PSNR in dB and SSIM against full precision, mean over the films."""
        pairs = list(zip(full, outputs, strict=True))
        return {
            "psnr": sum(quality.psnr(a, b) for a, b in pairs) / len(pairs),
            "ssim": sum(quality.ssim(a, b) for a, b in pairs) / len(pairs),
        }

    def tiny(self, folder: Path) -> None:
        from models.demo.video import networks

        pipe = networks.pipeline(networks.TINY)
        for part in (pipe.transformer, pipe.text_encoder, pipe.vae):
            narrow(part)
        pipe.save_pretrained(folder)
        limits = VideoLimits(
            size_multiple=16, max_pixels=64 * 96, max_side=96, max_frames=9, max_steps=50, max_prompt=200, width=96,
            height=64, frames=9, fps=8, steps=3, guidance=2.0,
        )  # fmt: skip
        write_serving(
            folder,
            Serving(limits=limits, max_tokens=networks.MAX_TOKENS, calibration=PROMPTS[:1], judging=PROMPTS[1:2]),
        )


def fuse_projections(network: Any) -> None:
    """Quantized q, k and v of each self-attention become one layer, so that their input is rounded once."""
    for block in network.blocks:
        projections = [block.attn1.to_q, block.attn1.to_k, block.attn1.to_v]
        if all(isinstance(p, QuantLinear) for p in projections):
            block.attn1.fused_qkv = fuse(projections)
            del block.attn1.to_q, block.attn1.to_k, block.attn1.to_v


def write_serving(folder: Path, serving: Serving) -> None:
    (folder / SERVING).write_text(serving.model_dump_json(indent=1) + "\n")


def narrow(network: nn.Module) -> None:
    """Floats to bfloat16. Of a checkpoint in bfloat16 nothing is lost; others are rounded here."""
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.bfloat16)
