"""Every request is accepted within its artifact's limits, or told what would be."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from service.api.accept import accept_video, fingerprint
from service.api.problems import ProblemError
from service.jobs import VideoRequest
from tests.service.support import VIDEO_LIMITS, film

WHOLE = st.one_of(st.integers(-5, 400), st.integers(-(2**31), 2**31 - 1))
PROMPTS = st.text(max_size=250).filter(str.isprintable)
SIDES = range(VIDEO_LIMITS.size_multiple, VIDEO_LIMITS.max_side + 1, VIDEO_LIMITS.size_multiple)
FRAMES = range(1, VIDEO_LIMITS.max_frames + 1, VIDEO_LIMITS.frames_step)
ALLOWED = {"width": SIDES, "height": SIDES, "frames": FRAMES}


def refusal(**fields: object) -> ProblemError | None:
    """None where the request was accepted, and every field of the task is what its artifact takes."""
    try:
        task = accept_video(VideoRequest(**fields), film())
    except ProblemError as error:
        return error
    assert {task.width, task.height} <= set(SIDES)
    assert task.width * task.height <= VIDEO_LIMITS.max_pixels
    assert task.frames in FRAMES
    assert 0 < task.steps <= VIDEO_LIMITS.max_steps
    assert task.prompt.strip()
    assert len(task.prompt) <= VIDEO_LIMITS.max_prompt
    return None


@given(prompt=PROMPTS, width=WHOLE, height=WHOLE, frames=WHOLE, steps=WHOLE)
def test_what_is_accepted_is_within_the_limits(**fields):
    refused = refusal(**fields)
    assert refused is None or {error.field for error in refused.problem.errors} <= set(fields)


@given(field=st.sampled_from(sorted(ALLOWED)), value=WHOLE)
def test_a_refusal_names_the_nearest_values_that_would_do(field, value):
    refused = refusal(prompt="x", **{field: value})
    if refused is None:
        assert value in ALLOWED[field]
        return
    told = {int(number) for number in re.findall(r"\d+", refused.problem.errors[0].message.split("; ")[1])}
    assert told <= set(ALLOWED[field])
    assert min(ALLOWED[field], key=lambda allowed: abs(allowed - value)) in told


def test_a_fingerprint_is_of_what_was_sent():
    request = VideoRequest(prompt="x")
    assert fingerprint("/a", request) == fingerprint("/a", VideoRequest(prompt="x"))
    others = [
        fingerprint("/b", request),
        fingerprint("/a", VideoRequest(prompt="x", seed=1)),
        fingerprint("/a", VideoRequest(prompt="x", steps=None)),
        fingerprint("/a", request, ["hash of a file"]),
    ]
    assert len({fingerprint("/a", request), *others}) == 5
