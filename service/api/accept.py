"""A request meets the limits of its artifact: it becomes a task with every field set, or a list of what would do."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence

from pydantic import BaseModel

from service.api.problems import invalid
from service.jobs import (
    MAX_SEED,
    ArtifactInfo,
    FieldError,
    SceneLimits,
    SceneRequest,
    VideoLimits,
    VideoRequest,
    VideoTask,
)


def accept_video(
    request: VideoRequest, info: ArtifactInfo, image: bool = False, takers: Sequence[str] = ()
) -> VideoTask:
    """The task, its image still to be stored; `image` says whether one comes with the request.

    Raises ProblemError that names every field at fault, with a value near the given one that would do; `takers` are the
    artifacts that take an image.
    """
    limits = info.limits
    assert isinstance(limits, VideoLimits)
    given = request.model_dump(exclude_none=True, exclude={"artifact", "image"})
    defaults = limits.model_dump(include={"width", "height", "frames", "fps", "steps", "guidance"})
    drawn = {"seed": secrets.randbelow(MAX_SEED + 1), "negative_prompt": ""}
    task = VideoTask.model_validate(drawn | defaults | given | {"artifact": info.name})
    errors = [
        *_prompt("prompt", task.prompt, limits, needed=True),
        *_prompt("negative_prompt", task.negative_prompt, limits, needed=False),
        *_side("width", task.width, limits),
        *_side("height", task.height, limits),
        *_frames(task.frames, limits),
        *_range("steps", task.steps, 1, limits.max_steps),
        *_image(image, info, takers),
    ]
    if not errors and task.width * task.height > limits.max_pixels:
        pixels = f"width × height must be at most {limits.max_pixels}, got {task.width} × {task.height}"
        errors = [FieldError(field="width", message=pixels), FieldError(field="height", message=pixels)]
    if errors:
        raise invalid(errors)
    return task


def suits(info: ArtifactInfo, image: bool) -> bool:
    """Whether a video artifact takes a request that comes with an image, or without one."""
    return isinstance(info.limits, VideoLimits) and info.limits.image != ("none" if image else "required")


def accept_scene(request: SceneRequest, info: ArtifactInfo, images: int | None) -> tuple[int, tuple[str, ...]]:
    """max_views and formats, as asked for or by default; `images` is None where the source is a video."""
    limits = info.limits
    assert isinstance(limits, SceneLimits)
    views = limits.max_views if request.max_views is None else request.max_views
    formats = limits.formats if request.formats is None else tuple(dict.fromkeys(request.formats))
    errors = [*_range("max_views", views, limits.min_views, limits.max_views)]
    if images is not None and not limits.min_views <= images <= limits.max_views:
        wanted = f"{info.name} takes {limits.min_views} to {limits.max_views} images, got {images}"
        errors.append(FieldError(field="images", message=wanted))
    if unknown := [name for name in formats if name not in limits.formats]:
        known = f"{info.name} makes {', '.join(limits.formats)}; got {', '.join(map(ascii, unknown))}"
        errors.append(FieldError(field="formats", message=known))
    if not formats:
        errors.append(FieldError(field="formats", message=f"name at least one of {', '.join(limits.formats)}"))
    if errors:
        raise invalid(errors)
    return views, formats


def fingerprint(path: str, request: BaseModel, files: Sequence[str] = ()) -> str:
    """Of a request as it was sent: what was left out stays left out, so that a drawn seed does not tell two apart."""
    sent = [path, request.model_dump(mode="json", exclude_unset=True), list(files)]
    return hashlib.sha256(json.dumps(sent, sort_keys=True).encode()).hexdigest()


def _prompt(field: str, text: str, limits: VideoLimits, needed: bool) -> list[FieldError]:
    if needed and not text.strip():
        return [FieldError(field=field, message="must not be empty: say what is to be seen")]
    if len(text) > limits.max_prompt:
        return [FieldError(field=field, message=f"must have at most {limits.max_prompt} characters, got {len(text)}")]
    return []


def _side(field: str, value: int, limits: VideoLimits) -> list[FieldError]:
    step, most = limits.size_multiple, limits.max_side // limits.size_multiple * limits.size_multiple
    if step <= value <= most and value % step == 0:
        return []
    would_do = _around(value, step, 0, step, most)
    message = f"must be a multiple of {step} from {step} to {most}, got {value}; {would_do} would do"
    return [FieldError(field=field, message=message)]


def _frames(value: int, limits: VideoLimits) -> list[FieldError]:
    step = limits.frames_step
    most = (limits.max_frames - 1) // step * step + 1
    if 1 <= value <= most and (value - 1) % step == 0:
        return []
    would_do = _around(value, step, 1, 1, most)
    message = f"must be {step} × n + 1 from 1 to {most}, got {value}; {would_do} would do"
    return [FieldError(field="frames", message=message)]


def _range(field: str, value: int, least: int, most: int) -> list[FieldError]:
    if least <= value <= most:
        return []
    return [FieldError(field=field, message=f"must be from {least} to {most}, got {value}")]


def _image(given: bool, info: ArtifactInfo, takers: Sequence[str]) -> list[FieldError]:
    if suits(info, given):
        return []
    if not given:
        return [FieldError(field="image", message=f"is required: {info.name} films on from a picture")]
    others = f"{', '.join(takers)} would do" if takers else "nor does any other artifact here"
    return [FieldError(field="image", message=f"{info.name} takes no image; {others}")]


def _around(value: int, step: int, offset: int, least: int, most: int) -> str:
    """The allowed values next to this one: offset + step × n, from least to most."""
    below = (value - offset) // step * step + offset
    near = sorted({min(max(candidate, least), most) for candidate in (below, below + step)})
    return " or ".join(map(str, near))
