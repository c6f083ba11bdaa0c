"""The shared words mean the same to the API, to the queue and to the model side."""

from __future__ import annotations

import dataclasses
import typing

import pytest
from pydantic import BaseModel, ValidationError

import models.base
from service import jobs
from service.jobs import ArtifactInfo, JobStatus, Reason, SceneTask, VideoLimits, VideoRequest
from tests.service.support import VIDEO_LIMITS, film, room


@pytest.mark.parametrize("name", ["VideoLimits", "SceneLimits"])
def test_limits_are_those_of_the_model_side(name):
    theirs, ours = getattr(models.base, name), getattr(jobs, name)
    wanted = {
        field.name: ... if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(theirs)
    }
    assert {n: ... if field.is_required() else field.default for n, field in ours.model_fields.items()} == wanted


def test_kinds_are_those_of_the_model_side():
    assert typing.get_args(jobs.Kind) == typing.get_args(models.base.Kind)


@pytest.mark.parametrize("info", [film(), room()])
def test_an_artifact_s_description_survives_the_queue(info):
    assert ArtifactInfo.model_validate_json(info.model_dump_json()) == info


def test_limits_of_the_other_kind_are_refused():
    with pytest.raises(ValidationError, match="limits are not those of a scene"):
        ArtifactInfo.model_validate(film().model_dump() | {"kind": "scene"})


@pytest.mark.parametrize("given", [{}, {"images": ["x"], "video": "x"}])
def test_a_scene_has_one_source(given):
    with pytest.raises(ValidationError):
        SceneTask.model_validate({"artifact": "room", "max_views": 4, "formats": ["glb"]} | given)


def test_states_that_have_an_end():
    assert [status for status in JobStatus if not status.ended] == [JobStatus.QUEUED, JobStatus.RUNNING]


def test_only_what_another_attempt_may_cure_is_tried_again():
    assert {reason for reason in Reason if not reason.passing} == {"bad-input", "model-error", "out-of-memory"}


def test_every_word_refuses_unknown_fields():
    words = [
        word for word in vars(jobs).values()
        if isinstance(word, type) and issubclass(word, BaseModel) and word.__module__ == "service.jobs"
    ]  # fmt: skip
    assert len(words) > 10
    assert all(word.model_config["extra"] == "forbid" for word in words)


@pytest.mark.parametrize("text", ["日本語 😀", "two\nlines\tand a tab", "é" * 10])
def test_any_writing_is_a_prompt(text):
    assert VideoRequest(prompt=text).prompt == text


@pytest.mark.parametrize("change", [{"width": 65}, {"height": 400}, {"frames": 10}, {"frames": 37}, {"steps": 51}])
def test_defaults_that_the_limits_would_refuse_are_refused(change):
    with pytest.raises(ValidationError, match="defaults are outside its own limits"):
        VideoLimits.model_validate(VIDEO_LIMITS.model_dump() | change)
