from __future__ import annotations

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from models import registry
from models.published import PUBLISHED
from quant_runtime.tensor_files import TensorFiles
from service import dev
from service.cli import app
from tests.models.synthetics import NAME, WAN


@pytest.mark.parametrize(("dtype", "made"), [(None, torch.float16), ("float32", torch.float32)])
def test_a_published_checkpoint_is_made_in_its_own_type_or_in_the_one_asked(tmp_path, monkeypatch, dtype, made):
    monkeypatch.setitem(PUBLISHED, "small", WAN)
    dev.synth("small", tmp_path / "c", 0, dtype, Console(quiet=True))
    assert registry.family_of(tmp_path / "c").name == "wan"
    with TensorFiles.open(tmp_path / "c" / "transformer", NAME) as files:
        assert {stored.dtype for stored in files.tensors.values()} == {made}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hunyuan", "DIR"], "there are wan-2.1-1.3b, "),
        (["hunyuan-video", "DIR", "--dtype", "int8"], "--dtype is bfloat16, float16, float32; got int8"),
    ],
)
def test_what_there_is_none_of_is_said_in_one_line(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["dev", "synth", *words])
    assert done.exit_code == 2
    assert said in done.stderr
    assert not list(tmp_path.iterdir())
