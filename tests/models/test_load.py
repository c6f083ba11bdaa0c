"""An artifact on its way into a worker: read once, hashed by the way, and in memory once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from models import load, registry, stream, synthetic, video
from models.wan import Wan
from quant_runtime.artifact import ArtifactError
from quant_runtime.attention import AttentionPlan
from quant_runtime.formats import W8A8
from quant_runtime.methods import Rtn
from tests.models.synthetics import nothing

GIB, MIB = 2**30, 2**20
BESIDE = 24 * MIB  # of what loading takes: what passes through, small floats made wider, and what Python needs
ALLOWED = GIB  # and what a whole process may, with its imports
ENCODER = {  # what is large in it: 114 million weights
    "vocab_size": 30000, "d_model": 1024, "d_kv": 64, "d_ff": 8192, "num_layers": 2, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def compressed(checkpoint, out, family=None):
    words = {"base": "tiny", "device": "cpu", "on_bytes": nothing}
    return stream.compress(family or Wan(), checkpoint, Rtn(), W8A8, AttentionPlan(), out, **words)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    Wan().tiny(folder / "checkpoint")
    compressed(folder / "checkpoint", folder / "artifact")
    return folder / "artifact"


@pytest.fixture
def copy(small, tmp_path):
    shutil.copytree(small, tmp_path / "copy")
    return tmp_path / "copy"


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "file",
    [WEIGHTS, "transformer/config.json", "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"],
)
def test_a_changed_byte_of_any_file_is_refused_by_the_file_s_name(copy, file):
    load.load(copy, "cpu")
    flip(copy / file)
    with pytest.raises(ArtifactError, match=f"{file} is damaged"):
        load.load(copy, "cpu")


def test_a_changed_byte_of_the_header_is_refused_too(copy):
    """It lies before the first tensor: a space behind the JSON became another."""
    path = copy / WEIGHTS
    data = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    data[data.index(b'"pt"', 0, end) + 1] ^= 1  # what the format's own field says
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{WEIGHTS} is damaged"):
        load.load(copy, "cpu")


def test_hashes_can_be_left_out_and_names_cannot(copy):
    flip(copy / WEIGHTS)
    load.load(copy, "cpu", check=False)
    tensors = load_file(copy / WEIGHTS)
    tensors["blocks.0.ffn.net.2.bios"] = tensors.pop("blocks.0.ffn.net.2.bias")
    save_file(tensors, copy / WEIGHTS)
    with pytest.raises(ArtifactError, match=r"missing: \['blocks\.0\.ffn\.net\.2\.bias'\]"):
        load.load(copy, "cpu", check=False)


PROGRAM = """
    import json, sys
    from pathlib import Path
    from models import load, video

    video.describe_paths = lambda device: {}  # nothing is run on the meta device

    def held(what):  # not ru_maxrss: it begins with what the parent held
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

    folder, device = Path(sys.argv[1]), sys.argv[2]
    load.load(folder.parent / "small", device)  # all that is imported when it is first needed
    before = held("VmRSS:")
    model = load.load(folder, device)
    assert model.network.device.type == device
    print(json.dumps([before, held("VmHWM:")]))
"""


def peak_of(folder, device):
    """(memory before, the most while it was loaded), in bytes, of a process that loads it."""
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(folder), device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", ["wan", "hunyuan_video", "cogvideox"])
def test_on_a_device_with_memory_of_its_own_nothing_of_a_model_is_on_the_host(family, tmp_path, monkeypatch):
    its = registry.family(family)
    its.tiny(tmp_path / "checkpoint")
    compressed(tmp_path / "checkpoint", tmp_path / "artifact", its)
    monkeypatch.setattr(video, "describe_paths", lambda device: {})  # nothing is run on the meta device
    pipe = load.load(tmp_path / "artifact", "meta").pipe
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    assert parts.keys() >= {"transformer", "text_encoder", "vae"}
    for name, part in parts.items():
        assert {its.device.type for its in (*part.parameters(), *part.buffers())} == {"meta"}, name


def test_the_peak_of_loading_is_the_artifact_and_little_more(small, tmp_path):
    """Some 380 MiB, the text encoder among it: held twice, or mapped beside what was read of it, or in float32 what
    lies in 16 bits, it would be far over.

    The meta device stands for one with memory of its own: the host does not hold even the largest tensor.
    """
    shutil.copytree(small, tmp_path / "small")
    shutil.copytree(small, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("manifest.json", "transformer"))
    config = {"num_attention_heads": 8, "attention_head_dim": 128, "num_layers": 6, "ffn_dim": 8192, "text_dim": 64}
    with torch.device("meta"):
        network = Wan.transformer.from_config(config)
    synthetic.write_network(network, tmp_path / "checkpoint" / "transformer", torch.bfloat16, 1 << 28, 0, nothing)
    shutil.rmtree(tmp_path / "checkpoint" / "text_encoder")
    synthetic.write_encoder(
        UMT5EncoderModel, UMT5Config(**ENCODER), tmp_path / "checkpoint" / "text_encoder", 1 << 27, 0
    )
    assert len([*(tmp_path / "checkpoint" / "text_encoder").glob("model-*.safetensors")]) == 2
    manifest = compressed(tmp_path / "checkpoint", tmp_path / "large")
    shutil.rmtree(tmp_path / "checkpoint")
    size = sum(record.bytes for record in manifest.files.values())
    assert size > 3 * BESIDE
    before, peak = peak_of(tmp_path / "large", "cpu")
    assert before + size < peak < before + size + BESIDE
    assert peak < size + ALLOWED
    before, peak = peak_of(tmp_path / "large", "meta")
    assert peak < before + BESIDE < before + 2 * ENCODER["vocab_size"] * ENCODER["d_model"]


DEEP = """
    import sys
    from dataclasses import replace
    from pathlib import Path
    import torch
    from models import registry, step_bench
    from models.published import PUBLISHED
    from models.video import linear_inside
    from quant_runtime.convert import prepare
    from quant_runtime.formats import W4A8
    from quant_runtime.kernels._cpu import keep_freed_memory
    from quant_runtime.linear import LinearSpec

    def held(what):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

    keep_freed_memory()  # as a worker does
    blocks = int(sys.argv[1])
    config = {"num_layers": blocks, "num_single_layers": blocks, "num_attention_heads": 12, "num_refiner_layers": 1}
    network = replace(PUBLISHED["hunyuan-video"], config=config).on_meta()
    layers = linear_inside(network, registry.family("hunyuan_video").model.blocks)
    prepare(network, dict.fromkeys(layers, LinearSpec(W4A8)))
    state = {key: torch.ones(its.shape, dtype=its.dtype) for key, its in network.state_dict().items()}
    network.load_state_dict(state, assign=True)
    del state
    model = step_bench.model_of("hunyuan-video", network.requires_grad_(False), "cpu")
    before = held("VmRSS:")
    model.fuse_projections()
    print(held("VmHWM:") - before)
"""


def test_fusing_on_a_cpu_takes_no_more_of_many_blocks_than_of_few():
    """Of 12 blocks of each kind what is fused anew has 121 MiB: what it replaces is given back as it goes."""
    command = [sys.executable, "-c", textwrap.dedent(DEEP), "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < BESIDE
