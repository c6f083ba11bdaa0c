"""What families of video generators in diffusers' layout have in common: films from prompts.

A family's own file says which pipeline it is, what of its network shrinks, how its attention runs, and what it takes.
"""

from __future__ import annotations

import inspect
import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar

import diffusers
import numpy as np
import pydantic
import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import Tensor, nn

import quant_runtime.diffusers
from models import autoencoders, convolutions, encoders, packed_pieces, run_record, video_files
from models.base import BadInput, Kind, NoRoom, OnStep, OutputFile, Outputs, SceneInputs, VideoInputs, VideoLimits
from models.packed_pieces import Packing
from models.precision import fast_float
from models.run_record import Clock
from quant_runtime import artifact, quality
from quant_runtime.artifact import Manifest
from quant_runtime.attention import AttentionPlan, AttentionState, SharedState, describe_paths
from quant_runtime.convert import prepare
from quant_runtime.graphs import MOST_TOKENS, ByGraph
from quant_runtime.kernels._cpu import give_back_freed_memory
from quant_runtime.linear import QuantLinear, fusable, fuse
from quant_runtime.memory import host_room, room
from quant_runtime.narrow_linear import keep_narrow, narrowable
from quant_runtime.paged import Pages, Read, page
from quant_runtime.residual import Place
from quant_runtime.selftest import Needs, Piece, layers_of, pieces, plan_of
from quant_runtime.sparsity.base import TokenLayout
from quant_runtime.tensor_files import Blank, TensorFiles, fill

ENCODER = "text_encoder"  # the folder of the large one
INDEX = "model_index.json"  # what a folder's pipeline is, and of what parts
SERVING = "serving.json"  # beside model_index.json: what this checkpoint takes, where that is not its family's own
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

STEP_TENSORS = 24  # a step's own memory, in tensors of its tokens' width: HunyuanVideo takes 17, and a refresh 3 more

_STRICT = pydantic.ConfigDict(extra="forbid")
Prompts = Annotated[tuple[str, ...], pydantic.Field(min_length=1)]


def _beside(path: Path | None) -> Path | None:
    if path is not None and (path.is_absolute() or ".." in path.parts):
        raise ValueError(f"{path} is no file in the checkpoint's folder")
    return path


Images = tuple[Annotated[Path | None, pydantic.AfterValidator(_beside)], ...]


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class _Limits(VideoLimits):
    """Checked."""


Limits = _Limits | VideoLimits
Tokens = Annotated[int, pydantic.Field(ge=1, strict=True)]


class Serving(pydantic.BaseModel):
    """What a checkpoint is run with. A family's own class has its defaults."""

    model_config = _STRICT

    limits: Limits
    max_tokens: Tokens  # prompts are padded to it; longer are refused
    calibration: Prompts = PROMPTS[:4]
    judging: Prompts = PROMPTS[4:]
    calibration_images: Images = ()  # what those films start from, in turn: files beside serving.json, null for none
    judging_images: Images = ()

    @pydantic.model_validator(mode="after")
    def _images_are_taken(self) -> Self:
        for name, images in (("calibration", self.calibration_images), ("judging", self.judging_images)):
            if self.limits.image == "none" and any(images):
                raise ValueError(f"{name}_images are for a model that takes a start image: its limits have none")
            if self.limits.image == "required" and not (images and all(images)):
                raise ValueError(f"{name}_images are needed, and none may be null: this model needs a start image")
        return self

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The checkpoint's own, where it has one. ValueError names the file and the field that will not do."""
        path = folder / SERVING
        try:
            serving = cls.model_validate_json(path.read_bytes() if path.is_file() else "{}")
        except pydantic.ValidationError as error:
            raise ValueError(f"{path}: {error}") from None
        for name in ("calibration_images", "judging_images"):
            images = tuple(image and folder / image for image in getattr(serving, name))
            missing = next((image for image in images if image and not image.is_file()), None)
            if missing is not None:
                raise ValueError(f"{path}: {name}: there is no {missing}")
            serving = serving.model_copy(update={name: images})
        return serving


def write_serving(folder: Path, serving: Serving) -> None:
    (folder / SERVING).write_text(serving.model_dump_json(indent=1) + "\n")


@dataclass(frozen=True)
class Film:
    frames: np.ndarray  # uint8 [T, H, W, 3]
    seconds: dict[str, float]  # text, denoise, decode


class VideoModel(ABC):
    """One loaded pipeline. `network` is its transformer, or an nn.ModuleDict of those that take turns."""

    kind: Kind = "video"
    blocks: ClassVar[tuple[str, ...]] = ("transformer_blocks.",)  # where in the network the layers are that shrink
    projections: ClassVar[Mapping[str, Sequence[str]]] = {"fused_qkv": ("to_q", "to_k", "to_v")}  # of self-attentions
    processor: ClassVar[Any]  # of a layer's number, this model and its network's state: how that self-attention runs

    def __init__(self, pipe: Any, serving: Serving, device: str) -> None:
        self.pipe, self.serving = pipe, serving
        self.pages: Mapping[str, Pages] = {}  # parts of the pipeline that lie on the disk
        self.kernels = describe_paths(device)
        self.network: Any = self.denoiser(pipe)
        pipe.set_progress_bar_config(disable=True)
        self.layout = TokenLayout(1, 1, 1)
        self._signature = inspect.signature(pipe.transformer.forward)
        for network in networks(self.network).values():
            network.register_forward_pre_hook(self._before, with_kwargs=True)
        self.by_graph: list[ByGraph] = []
        self.attend(AttentionPlan())

    def denoiser(self, pipe: Any) -> nn.Module:
        """The pipeline's network, or an nn.ModuleDict of those that take turns, by the names of their folders."""
        network: nn.Module = pipe.transformer
        return network

    @abstractmethod
    def attentions(self, network: Any) -> Mapping[str, Any]:
        """A network's self-attentions by name, in the order they run in."""

    @abstractmethod
    def enter(self, given: dict[str, Any]) -> dict[str, Any]:
        """Sets `layout` from what the network is given, by name, and returns what it is to be given instead."""

    @abstractmethod
    def asked(self, inputs: VideoInputs) -> dict[str, Any]:
        """Prompts, encoded, how strongly they guide, and a start image: what the pipeline takes for them, by name."""

    def pipeline(self, inputs: VideoInputs) -> Any:
        """diffusers' pipeline for these inputs."""
        return self.pipe

    def tokens(self, prompt: str) -> int:
        """How many of `serving.max_tokens` a prompt takes."""
        return len(self.pipe.tokenizer(prompt).input_ids)

    def _before(self, network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        return (), self.enter(dict(self._signature.bind(*args, **kwargs).arguments))

    def attend(self, plan: AttentionPlan) -> None:
        """Each network gets a state of its own: what is kept of its layers is not another's."""
        self.suits(self.network, plan)
        for its in self.by_graph:
            its.forget()
        states = {prefix.removesuffix("."): AttentionState(plan) for prefix in networks(self.network)}
        self.attention = SharedState(states) if len(states) > 1 else states[""]
        for network, state in zip(networks(self.network).values(), states.values(), strict=True):
            for layer, attention in enumerate(self.attentions(network).values()):
                attention.set_processor(self.processor(layer, self, state))

    def launch_as_one(self) -> None:
        """Passes of few tokens, from the third that is alike on: for a GPU, and networks that stay as they are."""
        for prefix, network in networks(self.network).items():
            own: Any = network
            states = partial(self._states, prefix.removesuffix("."))
            own.forward = ByGraph(own.forward, states, self._few)
            self.by_graph.append(own.forward)

    def _states(self, name: str) -> list[AttentionState]:
        shared = self.attention
        return [shared.states[name] if isinstance(shared, SharedState) else shared]

    def _few(self, hidden_states: Tensor, **given: Any) -> bool:
        return len(hidden_states) * self.layout.tokens <= MOST_TOKENS

    def _release_recordings(self) -> None:
        for its in self.by_graph:
            its.release()

    @classmethod
    def suits(cls, network: nn.Module, plan: AttentionPlan) -> None:
        """Refuses a residual whose rank is above the size of the heads."""
        parts: list[Any] = [*networks(network).values()]
        for size in (part.config.attention_head_dim for part in parts):
            if plan.residual is not None and plan.residual.order == 2 and plan.residual.rank > size:
                raise ValueError(
                    f"a residual's rank is at most the size of this model's heads, {size}; got {plan.residual.rank}"
                )

    @abstractmethod
    def expected(self, inputs: VideoInputs) -> TokenLayout:
        """What `layout` will be, with as much text as there may be."""

    def grid(self, inputs: VideoInputs, patch: Sequence[int]) -> tuple[int, int, int]:
        """Frames, height and width of a film's tokens, where a patch is so many latents of each."""
        latent = (inputs.frames - 1) // self.pipe.vae_scale_factor_temporal + 1
        sides = [side // self.pipe.vae_scale_factor_spatial for side in (inputs.height, inputs.width)]
        frames, height, width = (n // p for n, p in zip((latent, *sides), patch, strict=True))
        return frames, height, width

    def sequences(self, inputs: VideoInputs) -> int:
        """How many a step runs through a network, in one pass or in several: another one is what guides away."""
        return 2 if inputs.guidance > 1 else 1

    def residual_bytes(self, inputs: VideoInputs, pinned: bool = False) -> int:
        """What the plan caches of what sparse attention loses takes in all, for a film of these inputs."""
        plan, tokens = self.attention.plan, self.expected(inputs).tokens
        if plan.residual is None:
            return 0
        most = 0
        for network in networks(self.network).values():  # of those that take turns one holds a cache
            made: Any = network
            heads, size = made.config.num_attention_heads, made.config.attention_head_dim
            layers = len(set(range(len(self.attentions(made)))) - set(plan.dense_layers))
            most = max(most, layers * plan.residual.bytes(tokens, heads, size, made.dtype.itemsize, pinned))
        return most * self.sequences(inputs)

    def place(self, inputs: VideoInputs) -> Place | None:
        """Where the residual goes: where the plan says, or, of `auto`, on the device if it has room beside a step.

        What has no room there is refused: by BadInput, with what would do, where it can never have it, and by NoRoom
        where others hold the memory at this moment. On a CPU it lies in the host's memory wherever it is to go.
        """
        residual, card = self.attention.plan.residual, room(self._device())
        if residual is None:
            return None
        may_fit = False
        if card is not None and residual.place != "host":
            needed = self.residual_bytes(inputs)
            first: Any = next(iter(networks(self.network).values()))
            width = first.config.num_attention_heads * first.config.attention_head_dim
            tokens = self.expected(inputs).tokens
            step = STEP_TENSORS * 2 * tokens * width * self.sequences(inputs)
            if self.by_graph and tokens <= MOST_TOKENS:  # what lies within a recorded pass, beside one that refreshes
                step += STEP_TENSORS * 2 * min(tokens * self.sequences(inputs), MOST_TOKENS) * width
            if needed + step <= card.now:
                return "device"
            may_fit = needed + step <= card.ever
            if residual.place == "device":
                takes = f"{_gib(needed)} for the residual of sparse attention and {_gib(step)} for a step"
                free = f"{_gib(card.now)} are free beside the weights"
                raise _refused(takes, free, "--residual-place auto, or with ", may_fit)
        taken, host = self.residual_bytes(inputs, pinned=card is not None), host_room()
        if host is not None and taken > host.now:
            takes = f"{_gib(taken)} of the host for the residual of sparse attention"
            raise _refused(takes, f"{_gib(host.now)} are free there", "", may_fit or taken <= host.ever)
        return "device" if card is None and residual.place != "host" else "host"

    def _device(self) -> torch.device:
        return next(self.network.parameters()).device

    def layers(self) -> list[str]:
        return self.linears(self.network)

    @classmethod
    def linears(cls, network: nn.Module) -> list[str]:
        """Everything linear inside the blocks, modulation included. Embedders and head stay as they are."""
        parts = networks(network).items()
        return [f"{prefix}{name}" for prefix, part in parts for name in linear_inside(part, cls.blocks)]

    def shared(self) -> list[Sequence[str]]:
        parts = networks(self.network).items()
        return [[f"{prefix}{name}" for name in group] for prefix, part in parts for group in self.groups(part)]

    def groups(self, network: Any) -> list[Sequence[str]]:
        """Names of the layers of one network that are fed the same tensor."""
        return [
            [f"{name}.{projection}" for projection in group]
            for name, attention in self.attentions(network).items()
            for group in self.projections.values()
            if getattr(attention, group[0], None) is not None
        ]

    def fuse_projections(self) -> None:
        """Quantized projections of one input become one layer, so that it is rounded once; not those that differ.

        On a CPU what they took is given back as they go: it lies in pieces between what stays, and none of these is
        large enough for the next layer.
        """
        for attention in [a for part in networks(self.network).values() for a in self.attentions(part).values()]:
            for fused, group in self.projections.items():
                layers = [layer for name in group if isinstance(layer := getattr(attention, name, None), QuantLinear)]
                if len(layers) == len(group) and all(fusable(layers[0], layer) for layer in layers):
                    setattr(attention, fused, fuse(layers))
                    for name in group:
                        delattr(attention, name)
                    del layers
                    if self._device().type == "cpu":
                        give_back_freed_memory()

    def projected(self, attention: Any, x: Tensor, fused: str = "fused_qkv") -> Sequence[Tensor]:
        """x [B, N, C] as queries, keys and values [B, N, H * D] of `attention`, whether its layers are fused or not."""
        layer = getattr(attention, fused, None)
        if layer is None:
            return [getattr(attention, name)(x) for name in self.projections[fused]]
        return layer(x).chunk(3, dim=-1)

    def limits(self) -> VideoLimits:
        return self.serving.limits

    def calibrate(self, samples: int, on_sample: OnStep) -> None:
        for number in range(samples):
            self.denoise(self.calibration(number))
            on_sample(number + 1, samples)

    def calibration(self, number: int) -> VideoInputs:
        """Of a short run (8 steps at most) of the default size: each prompt sees noise of every level."""
        serving, steps = self.serving, min(8, self.limits().steps)
        return self._sample(serving.calibration, serving.calibration_images, number, steps)

    def denoise(self, inputs: VideoInputs) -> None:
        """A film that nobody sees: none of it is decoded."""
        with suppress(_Denoised):
            self.film(inputs, _denoised)

    def outputs(self, samples: int, on_sample: OnStep) -> list[Tensor]:
        """uint8 [T, H, W, 3] of each judging prompt and its image, seed 0 and up, defaults throughout."""
        serving, films = self.serving, []
        for number in range(samples):
            inputs = self._sample(serving.judging, serving.judging_images, number, serving.limits.steps)
            films.append(torch.from_numpy(self.film(inputs, lambda done, of: None).frames))
            on_sample(number + 1, samples)
        return films

    def _sample(self, prompts: Sequence[str], images: Images, number: int, steps: int) -> VideoInputs:
        size = self.limits()
        return VideoInputs(
            prompt=prompts[number % len(prompts)], width=size.width, height=size.height, frames=size.frames,
            fps=size.fps, steps=steps, guidance=size.guidance, seed=number,
            image=images[number % len(images)] if images else None,
        )  # fmt: skip

    def passes(self, inputs: VideoInputs) -> int:
        """How often a step asks the network, each time of what it knew before the first."""
        return 2 if inputs.guidance > 1 else 1

    def beside(self, inputs: VideoInputs, gate: Callable[[Pages, int], Any]) -> Self:
        """The same model for a run among others: pipelines of its own, in which gates stand for what is on the disk."""
        passes, own = self.passes(inputs), [*networks(self.network).values()]
        return self.split({part: gate(its, passes if its.network in own else 0) for part, its in self.pages.items()})

    def split(self, gated: Mapping[str, Any]) -> Self:
        twin = copy(self)
        twin.pipe = split(self.pipe, gated)
        return twin

    def memo(self) -> Callable[[], None]:
        """Puts back what a pass has set, after passes of others."""
        return partial(setattr, self, "layout", self.layout)

    def run(self, inputs: VideoInputs | SceneInputs, folder: Path, on_step: OnStep) -> Outputs:
        """video.mp4, poster.jpg and run.json."""
        if not isinstance(inputs, VideoInputs):
            raise BadInput("artifact", "this artifact makes videos from prompts; it reconstructs no scenes")
        begun = time.perf_counter()
        film = self.film(inputs, on_step)
        video_files.write_mp4(film.frames, folder / "video.mp4", inputs.fps)
        video_files.write_poster(film.frames, folder / "poster.jpg")
        seconds = film.seconds | {"total": time.perf_counter() - begun}
        cached = self.attention.density().residual
        return Outputs(
            (
                OutputFile("video.mp4", "video/mp4", folder / "video.mp4"),
                OutputFile("poster.jpg", "image/jpeg", folder / "poster.jpg"),
                run_record.write(folder, inputs, self, seconds, tokens=self.layout.tokens),
            ),
            {} if cached is None else {cached.place: cached.bytes},
        )

    @torch.inference_mode()
    def film(self, inputs: VideoInputs, on_step: OnStep) -> Film:
        """The same inputs on the same device give the same film; noise is drawn on the CPU."""
        self.check(inputs)
        self.attention.start(inputs.steps, self.place(inputs))
        clock = Clock()
        asked = self.asked(inputs)
        clock.lap("text")

        def stepped(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step + 1, inputs.steps)
            if step + 1 < inputs.steps:
                self.attention.at(step + 1)
                for its in self.by_graph:
                    its.release_stale()  # of a network whose turn is over
            else:
                self.attention.finish()  # decoding has the memory
                self._release_recordings()
                clock.lap("denoise")
            return tensors

        try:
            video = self.pipeline(inputs)(
                **asked,
                height=inputs.height,
                width=inputs.width,
                num_frames=inputs.frames,
                num_inference_steps=inputs.steps,
                generator=torch.Generator("cpu").manual_seed(inputs.seed),
                callback_on_step_end=stepped,
                output_type="pt",
            ).frames[0]
        finally:
            self.attention.finish()  # of a film that was broken off, too
            self._release_recordings()
        if not bool(torch.isfinite(video).all()):
            raise FloatingPointError("the model made values that are not finite")
        frames = (video.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        give_back_freed_memory()
        clock.lap("decode")
        return Film(frames, clock.seconds)

    def check(self, inputs: VideoInputs) -> None:
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
        if inputs.image is None and size.image == "required":
            raise BadInput("image", "image is needed: this model films on from a picture")
        if inputs.image is not None and size.image == "none":
            raise BadInput("image", "image is not taken: this model films from the prompt alone")
        for name, text in (("prompt", inputs.prompt), ("negative_prompt", inputs.negative_prompt)):
            tokens = self.tokens(text)
            if tokens > self.serving.max_tokens:
                raise BadInput(name, f"{name} is at most {self.serving.max_tokens} tokens long, got {tokens}")


def _refused(takes: str, free: str, also: str, passing: bool) -> BadInput | NoRoom:
    """Of a film whose residual has no room at this moment; `passing` if it may have at another."""
    said = f"a film of this size takes {takes}, and {free}"
    if passing:
        return NoRoom(f"{said} at this moment, others hold the rest")
    would_do = f"take fewer frames or a smaller picture, or make the artifact with {also}--residual-bits 8"
    return BadInput("frames", f"{said}: {would_do}")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


class _Denoised(Exception):
    """No error: the way out of a film whose frames nobody wants."""


def _denoised(done: int, of: int) -> None:
    if done == of:
        raise _Denoised


M = TypeVar("M", bound=VideoModel)


class PipelineFamily(ABC, Generic[M]):
    """Folders that diffusers' pipelines are saved in."""

    name: str
    kind: Kind = "video"
    component = "transformer"  # of every checkpoint; `components` tells of those that have more
    weights = "diffusion_pytorch_model"
    stored = torch.bfloat16
    originals: Sequence[tuple[str, str]] = ()
    packing: ClassVar[Packing]  # what its blocks in 8 bits do besides their layers
    sample: ClassVar[TokenLayout] = TokenLayout(5, 10, 12)  # tokens in this family's order, for the self-test
    pipelines: ClassVar[tuple[Any, ...]]  # diffusers' classes
    transformer: ClassVar[Any]  # and that of the network
    model: type[M]
    serving: ClassVar[type[Serving]]

    def recognizes(self, folder: Path) -> bool:
        return (folder / INDEX).is_file() and self._pipeline(folder) is not None

    def load(
        self,
        folder: Path,
        device: str,
        dtype: torch.dtype | dict[str, torch.dtype],
        given: Mapping[str, nn.Module] | None = None,
    ) -> M:
        """Networks that shrink are loaded by us, first, and straight to the device. What is `given` is not read."""
        for library in (diffusers, transformers):  # their bars would be drawn across ours, and into a worker's log
            library.utils.logging.disable_progress_bar()
        self.check(folder)
        pipeline, serving = self._pipeline(folder), self.served(folder)
        _must_be_whole(folder, pipeline)
        wanted = dtype if isinstance(dtype, dict) else {"default": dtype}
        parts = dict(given or {})
        for component in self.components(folder):
            if component not in parts:
                parts[component] = self.network(folder, component, device, wanted.get(component, wanted["default"]))
        try:
            pipe = pipeline.from_pretrained(folder, **parts, dtype=dtype, local_files_only=True)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ValueError(f"{folder} is not a whole {pipeline.__name__}: {error}") from error
        self.settle(pipe)
        pipe.to(device)
        if device == "cpu":
            convolutions.by_onednn(pipe.vae)
        return self.model(pipe, serving, device)

    def network(
        self,
        folder: Path,
        component: str,
        device: str,
        dtype: torch.dtype,
        digests: Mapping[str, str] | None = None,
        narrow: bool = False,
    ) -> nn.Module:
        """A network of a checkpoint or of an artifact, strictly, its floats as `dtype` but what it keeps wider.

        Where it is to be `narrow`, large linear layers stay in the 16 bits in which they lie, and widen as they run.
        Tensors are read a few MiB at a time and go straight to the device.
        `digests` has the SHA-256 of each file, by its path in the folder: one that is another is refused by name.
        """
        network = self._empty(folder, component)
        wide = set(self.transformer._keep_in_fp32_modules or ())
        held = TensorFiles.open(folder / component, self.weights).tensors.items()
        used = {key: its for key, its in held if not any(re.search(pattern, key) for pattern in self.ignored)}
        large = [name for name in narrowable(network) if narrow and not wide & {*name.split(".")}]
        keep_narrow(network, large)
        stay = {f"{name}.weight" for name in large}

        def kind(key: str, stored: Blank) -> torch.dtype:
            if not stored.dtype.is_floating_point or (key in stay and stored.dtype.itemsize == 2):
                return stored.dtype
            return torch.float32 if wide & {*key.split(".")} else dtype

        own = None
        if digests is not None:
            own = {Path(name).name: its for name, its in digests.items() if Path(name).parent == Path(component)}
        with TensorFiles(used) as files:
            fill(network, files, device, own, kind)
        return network.to(device)  # what no file holds

    def check(self, folder: Path) -> None:
        """Raises ValueError for a checkpoint of another kind than those that are run. Reads configs alone."""
        if self._pipeline(folder) is None:
            known = " or ".join(pipeline.__name__ for pipeline in self.pipelines)
            raise ValueError(f"{folder} is a {index(folder).get('_class_name')}; {self.name} is a {known}")

    def settle(self, pipe: Any) -> None:
        """What a pipeline is set to before it runs."""

    def components(self, folder: Path) -> tuple[str, ...]:
        """The folders inside a checkpoint that hold a network that shrinks, in the order the networks run in."""
        return (self.component,)

    def config(self, folder: Path, component: str) -> dict[str, Any]:
        """Of one network."""
        path = folder / component / "config.json"
        try:
            config: dict[str, Any] = self.transformer.load_config(path, local_files_only=True)
        except OSError as error:
            raise ValueError(f"{path} describes no {self.transformer.__name__}: {error}") from error
        return config

    @property
    def ignored(self) -> Sequence[str]:
        """Patterns of tensors that diffusers does not miss: Wan's checkpoints from pictures have norms of no use."""
        return self.transformer._keys_to_ignore_on_load_unexpected or ()

    def served(self, folder: Path) -> Serving:
        """What a checkpoint is run with."""
        return self.serving.read(folder)

    def _pipeline(self, folder: Path) -> Any:
        """diffusers' class of this folder, where it is one of this family's."""
        name = index(folder).get("_class_name")
        return next((pipeline for pipeline in self.pipelines if pipeline.__name__ == name), None)

    def open(self, folder: Path, manifest: Manifest, device: str, check: bool = False) -> M:
        """In bfloat16 where the device multiplies it itself, else in float32.

        On a CPU int8 layers come with float32 around them: there norms and roundings are faster so. What is large among
        it stays in 16 bits, and so it is in encoders and autoencoder: all take the memory that the artifact has bytes.
        """
        self.check(folder)
        half, around = fast_float(device), self.around(manifest, device)
        dtypes, networks = self.dtypes(around, half), {}
        for component in self.components(folder):
            digests = artifact.weights(manifest, component) if check else None
            its = dtypes.get(component, dtypes["default"])
            narrow = device == "cpu" and bool(manifest.layers)
            networks[component] = self.network(folder, component, device, its, digests, narrow)
        for part, (read, kind) in self._beside(folder).items():
            own = artifact.weights(manifest, part)
            digests = {Path(name).name: digest for name, digest in own.items()} if check else None
            made = read(folder / part, kind, dtypes.get(part, dtypes["default"]), device, digests)
            if made is not None:
                networks[part] = made
            elif check:
                artifact.verify(folder, manifest, later=manifest.files.keys() - own.keys())
        model = self.load(folder, device, dtypes, given=networks)
        model.fuse_projections()
        if manifest.attention is not None:
            model.attend(manifest.attention.plan())
        if torch.device(device).type == "cuda":
            model.launch_as_one()
        return model

    def hashed(self, folder: Path) -> tuple[str, ...]:
        return (*self.components(folder), *self._beside(folder))

    def _beside(self, folder: Path) -> dict[str, tuple[Any, Any]]:
        """The parts of the pipeline that are models and do not shrink: what reads each, and its class."""
        named, shrink = index(folder), self.components(folder)
        coders = {part: kind for part, kind in autoencoders.kinds(named).items() if part not in shrink}
        return {part: (encoders.read, kind) for part, kind in encoders.kinds(named).items()} | {
            part: (autoencoders.read, kind) for part, kind in coders.items()
        }

    def around(self, manifest: Manifest, device: str) -> torch.dtype:
        """What goes from layer to layer of an artifact's network."""
        return torch.float32 if torch.device(device).type == "cpu" and manifest.layers else fast_float(device)

    def needs(self, folder: Path, manifest: Manifest, device: str) -> Needs:
        sizes = [self.config(folder, component)["attention_head_dim"] for component in self.components(folder)]
        return Needs(layers_of(manifest), plan_of(manifest), sizes, self.sample, self.around(manifest, device))

    def hidden(self, folder: Path) -> int:
        """How many channels go from block to block."""
        config = self.config(folder, self.component)
        return int(config["num_attention_heads"] * config["attention_head_dim"])

    def pieces(self, folder: Path, manifest: Manifest, device: str) -> Iterable[Piece]:
        needs = self.needs(folder, manifest, device)
        yield from pieces(needs, device)
        yield from packed_pieces.pieces(needs, self.hidden(folder), self.packing, torch.device(device))

    def dtypes(self, around: torch.dtype, half: torch.dtype) -> dict[str, torch.dtype]:
        """What each part is loaded in: `around` the quantized layers, and the device's `half`."""
        return {"transformer": around, "text_encoder": around, "default": half}

    def write(self, model: M, source: Path, target: Path) -> None:
        self.write_around(model.network, source, target)
        for folder, network in self.parts(model.network).items():
            narrow(network, self.stored)
            artifact.write_weights(network, target / folder, self.weights)

    def write_around(self, network: nn.Module, source: Path, target: Path) -> None:
        """Every file of an artifact but its weights and its manifest. `network` may be on the meta device.

        Hidden ones, which are the notes of the program that brought the checkpoint, stay behind.
        """
        parts: Mapping[str, Any] = self.parts(network)
        for path in sorted(source.iterdir()):
            if path.name not in parts and not path.name.startswith("."):
                artifact.link_or_copy(path, target / path.name)
        for folder, part in parts.items():
            specs = {name: m.spec for name, m in part.named_modules() if isinstance(m, QuantLinear)}
            if specs:
                quant_runtime.diffusers.mark(part, specs)
            part.save_config(target / folder)

    @contextmanager
    def paged(self, folder: Path, device: str, read: Read) -> Iterator[M]:
        """The model that `load` gives in float32, while its network and its text encoder stay on the disk: its `pages`.

        `read` gives the network's tensors by name. Another part of the pipeline is in memory as a whole.
        """
        networks = {component: self._empty(folder, component) for component in self.components(folder)}
        encoder = _text_encoder(folder)
        with TensorFiles.open(folder / ENCODER, encoders.WEIGHTS) as stored:
            names = encoders.Names.of(encoder, stored.tensors)
        if names.missing:
            raise ValueError(f"{folder / ENCODER} has no {', '.join(names.missing[:5])}")
        with TensorFiles(names.held) as files:
            pages = {ENCODER: page(encoder, lambda key: files.read(names.tied.get(key, key)), device)}
            for component, network in networks.items():
                prefix = f"{component}." if len(networks) > 1 else ""
                pages[component] = page(network, partial(_read, read, prefix), device)
            model = self.load(folder, device, torch.float32, given={**networks, ENCODER: encoder})
            model.pages = pages
            yield model

    def skeleton(self, folder: Path) -> nn.Module:
        """The network by its config, on the meta device but for what no file holds, or an nn.ModuleDict of two."""
        self.check(folder)
        parts = {component: self._empty(folder, component) for component in self.components(folder)}
        return nn.ModuleDict(parts) if len(parts) > 1 else parts[self.component]

    def _empty(self, folder: Path, component: str) -> nn.Module:
        config = self.config(folder, component)
        try:
            with init_empty_weights():
                network: nn.Module = self.transformer.from_config(config).eval()
            if config.get("quantization_config") is not None:
                specs = quant_runtime.diffusers.LowbitConfig(**config["quantization_config"]).specs()
                prepare(network, specs)
                quant_runtime.diffusers.mark(network, specs)
        except (OSError, ValueError, TypeError) as error:
            path = folder / component / "config.json"
            raise ValueError(f"{path} describes no {self.transformer.__name__}: {error}") from error
        return network

    def parts(self, network: nn.Module) -> dict[str, nn.Module]:
        """The networks of a checkpoint by their folders."""
        return {prefix.removesuffix(".") or self.component: part for prefix, part in networks(network).items()}

    def linears(self, network: nn.Module) -> list[str]:
        return self.model.linears(network)

    def suits(self, network: nn.Module, plan: AttentionPlan) -> None:
        self.model.suits(network, plan)

    def limits(self, folder: Path) -> VideoLimits:
        return self.served(folder).limits

    def score(self, outputs: Sequence[Tensor], full: Sequence[Tensor]) -> dict[str, float]:
        """PSNR in dB and SSIM against full precision, mean over the films."""
        pairs = list(zip(full, outputs, strict=True))
        return {
            "psnr": sum(quality.psnr(a, b) for a, b in pairs) / len(pairs),
            "ssim": sum(quality.ssim(a, b) for a, b in pairs) / len(pairs),
        }

    @abstractmethod
    def tiny(self, folder: Path) -> None:
        """Write a checkpoint with random weights and the real layout, small enough for a test."""


def split(pipe: Any, gated: Mapping[str, Any]) -> Any:
    """A pipeline of the same parts, but for a scheduler of its own and what is `gated`, by the parts' names."""
    twin = copy(pipe)
    vars(twin).update(gated, scheduler=deepcopy(pipe.scheduler))
    return twin


def _read(read: Read, prefix: str, key: str) -> Tensor:
    return read(f"{prefix}{key}")


def _text_encoder(folder: Path) -> nn.Module:
    """By its config: to be filled."""
    named = index(folder)
    kind = encoders.kinds(named).get(ENCODER)
    if kind is None:
        name = named.get(ENCODER, [None, None])[1]
        raise ValueError(f"{folder / INDEX}: {ENCODER} is no model of transformers: {name}")
    return encoders.empty(folder / ENCODER, kind)


def index(folder: Path) -> dict[str, Any]:
    """A pipeline folder's model_index.json."""
    path = folder / INDEX
    try:
        read = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return read if isinstance(read, dict) else {}


def _must_be_whole(folder: Path, pipeline: Any) -> None:
    """A folder may hold what shrinks alone: that can be compressed, layer by layer, and is no pipeline."""
    given = index(folder)
    parts = [one.name for one in inspect.signature(pipeline).parameters.values() if one.default is one.empty]
    missing = [part for part in parts if not isinstance(given.get(part), list) or given[part][0] is None]
    if missing:
        raise ValueError(
            f"{folder} is no whole {pipeline.__name__}: its {INDEX} has no {', '.join(missing)}. "
            "What is there can be compressed with --stream, and not run"
        )


def networks(network: nn.Module) -> dict[str, nn.Module]:
    """By what the names of their layers begin with: nothing for one that is alone, "transformer_2." for one of two."""
    if isinstance(network, nn.ModuleDict):
        return {f"{folder}.": part for folder, part in network.items()}
    return {"": network}


def linear_inside(network: nn.Module, blocks: tuple[str, ...]) -> list[str]:
    """Names of the linear layers whose names begin so."""
    return [name for name, m in network.named_modules() if name.startswith(blocks) and isinstance(m, nn.Linear)]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring channels of x [..., D] turned as pairs; cos and sin, to be broadcast to x, hold each angle twice."""
    turn = torch.complex(cos[..., 0::2].float(), sin[..., 1::2].float())
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).type_as(x)


def narrow(network: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Floats to bfloat16. Of a checkpoint in bfloat16 nothing is lost; others are rounded here."""
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
