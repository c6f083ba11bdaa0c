import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from models import calibration, compress, load, stream
from models.base import VideoInputs
from models.compress import Recipe
from models.wan import Wan
from quant_runtime import artifact
from quant_runtime.attention import AttentionPlan
from quant_runtime.formats import FP8, W4A8, W4AFP8, W8A8, W16A16
from quant_runtime.methods import Keep, QuaRot, Rtn, SmoothQuant
from quant_runtime.rules import Rule
from tests.models import films
from tests.models.films import CASES

KILLS = 20
KILLS_CALIBRATING = 6  # in three steps
STEPS = 3  # of a calibration sample of the tiny checkpoint
INPUTS = VideoInputs(prompt="a red ball", width=96, height=64, frames=9, fps=8, steps=2, guidance=2.0, seed=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "checkpoint"
    Wan().tiny(folder)
    return folder


@pytest.fixture
def checkpoint(whole, tmp_path):
    """A copy whose weights lie in several shards, as those of a large model do."""
    folder = tmp_path / "checkpoint"
    artifact.link_or_copy(whole, folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    shards = [dict(list(tensors.items())[i::3]) for i in range(3)]
    where = {}
    for number, shard in enumerate(shards, start=1):
        file = f"diffusion_pytorch_model-{number:05}-of-00003.safetensors"
        save_file(shard, folder / "transformer" / file)
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def streamed(source, out, method=None, format_=W4A8, on_bytes=lambda done, of: None, **options):
    return stream.compress(
        Wan(),
        source,
        method or Rtn(),
        format_,
        AttentionPlan(),
        out,
        base="tiny",
        device="cpu",
        on_bytes=on_bytes,
        **options,
    )


def shard_of(checkpoint, key):
    index = checkpoint / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    return checkpoint / "transformer" / json.loads(index.read_text())["weight_map"][key]


def change(checkpoint, key, how):
    file = shard_of(checkpoint, key)
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    how(tensors)
    file.unlink()  # and not written over: it may be a link to another test's
    save_file(tensors, file)


def left(out):
    return [path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}")]


@pytest.mark.parametrize(
    ("method", "format_"),
    [(Rtn(), W4A8), (QuaRot(), W8A8), (Rtn(clip="mse"), FP8), (QuaRot(), W4AFP8), (Keep(), W16A16)],
)
def test_layer_by_layer_comes_out_what_comes_out_of_the_whole(checkpoint, whole, tmp_path, method, format_):
    recipe = Recipe(method=method, format=format_, judging_samples=0)
    compress.compress(Wan(), whole, recipe, tmp_path / "a", base="tiny", device="cpu", on_progress=lambda *_: None)
    made = streamed(checkpoint, tmp_path / "b", method if format_.quantized else Rtn(), format_)
    artifact.verify(tmp_path / "b", made)
    one, other = (load_file(tmp_path / x / "transformer" / "diffusion_pytorch_model.safetensors") for x in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    films = [load.load(tmp_path / x, "cpu").film(INPUTS, lambda done, of: None).frames for x in "ab"]
    assert (films[0] == films[1]).all()
    assert not left(tmp_path / "b")


MIXED = (Rule("to_v", W8A8), Rule("blocks.1.attn1.to_q", W16A16), Rule("text_embedder.*", W8A8), Rule("ffn.*", FP8))


@pytest.mark.parametrize("method", [Rtn(), QuaRot()])
def test_formats_by_pattern_come_out_the_same_both_ways_and_run_where_projections_differ(
    checkpoint, whole, tmp_path, method
):
    recipe = Recipe(method, W4A8, judging_samples=0, rules=MIXED)
    compress.compress(Wan(), whole, recipe, tmp_path / "a", base="tiny", device="cpu", on_progress=lambda *_: None)
    made = streamed(checkpoint, tmp_path / "b", method, rules=MIXED)
    one, other = (load_file(tmp_path / x / "transformer" / "diffusion_pytorch_model.safetensors") for x in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert made.kept == ("blocks.1.attn1.to_q",)
    assert made.layers["blocks.0.attn1.to_v"].format == "W8A8"
    assert made.layers["condition_embedder.text_embedder.linear_2"].format == "W8A8"
    model = Wan().load(tmp_path / "b", "cpu", torch.float32)
    model.fuse_projections()
    assert not hasattr(model.network.blocks[0].attn1, "fused_qkv")
    plain = DiffusionPipeline.from_pretrained(tmp_path / "b", dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    want = films.stock(plain, negative_prompt="", guidance_scale=2.0, max_sequence_length=64)
    assert films.apart(model.film(films.inputs(), films.nothing).frames, want) <= 1  # a rounding of 8 bits


def test_equal_projections_are_fused_beside_others_that_are_not(checkpoint, tmp_path):
    streamed(checkpoint, tmp_path / "out", rules=(Rule("blocks.0.attn1.to_v", W8A8),))
    blocks = load.load(tmp_path / "out", "cpu").network.blocks
    assert [hasattr(block.attn1, "fused_qkv") for block in blocks] == [False, True]


def both(case, folder, method=None, **options):
    """The same by the whole and layer by layer: their manifests."""
    method = method or Rtn()
    case.tiny(folder / "checkpoint")
    given, words = (case.family, folder / "checkpoint"), {"base": "tiny", "device": "cpu"}
    recipe = Recipe(method, W4A8, judging_samples=0, calibration_samples=2)
    whole = compress.compress(*given, recipe, folder / "a", on_progress=lambda *_: None, **words)
    last = {"on_bytes": lambda *_: None, "samples": 2, **words, **options}
    return whole, stream.compress(*given, method, W4A8, AttentionPlan(), folder / "b", **last)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("wan-t2v", "wan-ti2v-5b")])
def test_other_families_go_layer_by_layer_too(name, tmp_path):
    made = both(CASES[name], tmp_path)
    assert [*made[0].layers] == [*made[1].layers]
    assert made[0].layer_bytes() == made[1].layer_bytes()
    for component in CASES[name].family.components(tmp_path / "b"):
        one, other = (load_file(tmp_path / x / component / "diffusion_pytorch_model.safetensors") for x in "ab")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    load.load(tmp_path / "b", "cpu")  # every hash and every tensor in its place


@pytest.mark.parametrize("name", [name for name in CASES if name != "wan-ti2v-5b"])
def test_calibrated_layer_by_layer_it_is_the_same_as_of_the_whole(name, tmp_path):
    """The same tensors, and the same said of every layer: the same sums in the same order."""
    read = []
    told = {"on_calibration": lambda done, of: read.append((done, of))}
    whole, made = both(CASES[name], tmp_path, SmoothQuant(), **told)
    assert made.calibration == whole.calibration
    assert made.layers == whole.layers
    for component in CASES[name].family.components(tmp_path / "b"):
        one, other = (load_file(tmp_path / x / component / "diffusion_pytorch_model.safetensors") for x in "ab")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert read[0][1] is None
    assert read[-1][0] == read[-1][1]
    assert not left(tmp_path / "b")


def test_norms_of_no_use_that_published_checkpoints_hold_are_left_behind(tmp_path):
    """diffusers' WanTransformer3DModel passes over `norm_added_q`."""
    case = CASES["wan-i2v"]
    case.tiny(tmp_path / "checkpoint")
    weights = tmp_path / "checkpoint" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    own = set(tensors)
    useless = {
        key.replace("_added_k", "_added_q"): tensor.clone() for key, tensor in tensors.items() if "norm_added_k" in key
    }
    assert useless
    save_file(tensors | useless, weights)
    case.family.load(tmp_path / "checkpoint", "cpu", torch.float32)
    given, words = (case.family, tmp_path / "checkpoint"), {"base": "tiny", "device": "cpu"}
    stream.compress(*given, Rtn(), W16A16, AttentionPlan(), tmp_path / "out", on_bytes=lambda *_: None, **words)
    assert set(load_file(tmp_path / "out" / "transformer" / weights.name)) == own


def test_killed_inside_the_second_expert_it_goes_on_there(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(done, of):
        if done > 0.52 * of:
            raise Killed

    case = CASES["wan-t2v-a14b"]
    case.tiny(tmp_path / "checkpoint")
    words = {"base": "tiny", "device": "cpu", "sync_bytes": 1}
    given = (case.family, tmp_path / "checkpoint", Rtn(), W4A8, AttentionPlan())
    want = stream.compress(*given, tmp_path / "want", on_bytes=lambda *_: None, **words)
    with pytest.raises(Killed):
        stream.compress(*given, tmp_path / "out", on_bytes=die, **words)
    rounded = []
    quantize = Rtn.quantize
    monkeypatch.setattr(Rtn, "quantize", lambda *args: rounded.append(1) or quantize(*args))
    made = stream.compress(*given, tmp_path / "out", on_bytes=lambda *_: None, **words)
    assert 0 < len(rounded) < len(made.layers) / 2
    assert made.model_dump() == want.model_dump()
    assert artifact.verify(tmp_path / "out")
    assert not left(tmp_path / "out")


@pytest.mark.parametrize("expert", ["transformer", "transformer_2"])
def test_a_damaged_expert_is_named(tmp_path, expert):
    case = CASES["wan-t2v-a14b"]
    case.tiny(tmp_path / "checkpoint")
    weights = tmp_path / "checkpoint" / expert / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{expert}/diffusion_pytorch_model.safetensors has .* it is not whole"):
        stream.compress(
            case.family, tmp_path / "checkpoint", Rtn(), W4A8, AttentionPlan(), tmp_path / "out",
            base="tiny", device="cpu", on_bytes=lambda *_: None,
        )  # fmt: skip


def test_the_layers_of_the_manifest_add_up_to_the_file(checkpoint, tmp_path):
    made = streamed(checkpoint, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    of_layers = {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] in made.layers}
    assert made.layer_bytes()[0] == sum(t.numel() * t.element_size() for t in of_layers.values())
    assert made.layers["blocks.0.ffn.net.2"].weight_sqnr > 10


ATTEMPT = """
    import os, sys, time
    from functools import partial
    from pathlib import Path
    import torch
    torch.set_num_threads(1)  # a process that is going to be forked starts no threads
    from models import stream
    from models.wan import Wan
    from quant_runtime.attention import AttentionPlan
    from quant_runtime.formats import W4A8
    from quant_runtime.methods import METHODS

    def say(*words):
        os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # at once: a kill cuts no line in two

    def told(what, done, of):
        say(what, done)
        time.sleep(0.005)  # a pace that whoever kills it can follow

    def attempt():
        stream.compress(
            Wan(), Path(sys.argv[1]), METHODS[sys.argv[3]](), W4A8, AttentionPlan(), Path(sys.argv[2]), base="tiny",
            device="cpu", samples=int(sys.argv[4]), sync_bytes=1,
            on_bytes=partial(told, "read"), on_calibration=partial(told, "calibrated"),
        )

    for line in sys.stdin:  # one attempt a line
        child = os.fork()
        if child == 0:
            try:
                attempt()
            except BaseException as error:
                say("failed", repr(error))
                os._exit(1)
            os._exit(0)
        say("pid", child)
        say("ended", os.waitpid(child, 0)[1])
"""


def attempts(checkpoint, out, method, samples, untils):
    """The same command again and again, killed once it has read so many tensors; the last of them to its end.

    What each has read, in its own words, and whether it was killed.
    """
    command = [sys.executable, "-c", textwrap.dedent(ATTEMPT), str(checkpoint), str(out), method, str(samples)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        for until in (*untils, math.inf):
            print("go", file=process.stdin, flush=True)
            pid, read = int(process.stdout.readline().split()[1]), []
            for line in iter(process.stdout.readline, ""):
                if line.startswith("ended"):
                    yield read, line == "ended 9\n"
                    break
                assert not line.startswith("failed"), line
                read.append(line)
                if len(read) >= until:
                    with suppress(ProcessLookupError):  # it has ended meanwhile
                        os.kill(pid, signal.SIGKILL)
                    until = math.inf
            if out.exists():
                break
        process.stdin.close()


def same_as(want, out):
    return artifact.read_manifest(out).model_dump() == want.model_dump() and artifact.verify(out) and not left(out)


BUSY = "a busy machine reads late what a child says, and it may have ended"


def test_killed_at_any_moment_the_same_command_goes_on_and_ends_with_the_same_bytes(checkpoint, tmp_path):
    reads, drawn = [], random.Random(0)  # of the network's tensors, in a run that nothing disturbs
    want = streamed(checkpoint, tmp_path / "want", on_bytes=lambda *_: reads.append(1))
    untils = [drawn.uniform(0, 0.98) * len(reads) for _ in range(KILLS)]
    ended = [killed for _, killed in attempts(checkpoint, tmp_path / "out", "rtn", 1, untils)]
    assert sum(ended) >= 0.9 * KILLS, BUSY
    assert same_as(want, tmp_path / "out")


def test_killed_while_it_calibrates_it_goes_on_behind_the_last_whole_step_and_ends_with_the_same_bytes(
    checkpoint, tmp_path
):
    reads, drawn = [], random.Random(0)
    told = {"on_bytes": lambda *_: None, "on_calibration": lambda *_: reads.append(1)}
    want = streamed(checkpoint, tmp_path / "want", SmoothQuant(), samples=2, **told)
    step = len(reads) / STEPS
    untils = [drawn.uniform(0.3, 1.4) * step for _ in range(KILLS_CALIBRATING)]
    made = [*attempts(checkpoint, tmp_path / "out", "smoothquant", 2, untils)]
    assert sum(killed for _, killed in made) >= 0.9 * KILLS_CALIBRATING, BUSY
    assert same_as(want, tmp_path / "out")
    calibrating = [[line for line in read if line.startswith("calibrated")] for read, _ in made]
    assert sum(map(len, calibrating)) <= len(reads) + KILLS_CALIBRATING * step, "of each no more than a step was lost"
    begun = [int(read[0].split()[1]) for read in calibrating if read]
    assert begun == sorted(begun), "none began ahead of the one before"
    assert len({*begun}) > 1, "some went on"


def test_what_is_done_is_not_done_again(checkpoint, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(done, of):
        if done > of / 2:
            raise Killed

    out = tmp_path / "out"
    with pytest.raises(Killed):
        streamed(checkpoint, out, on_bytes=die, sync_bytes=1)
    assert left(out)
    assert not out.exists()
    rounded = []
    quantize = Rtn.quantize
    monkeypatch.setattr(Rtn, "quantize", lambda *args: rounded.append(1) or quantize(*args))
    made = streamed(checkpoint, out)
    assert 0 < len(rounded) < len(made.layers)


def test_what_calibration_saw_is_not_asked_for_again(checkpoint, tmp_path, monkeypatch):
    def full(done, of):
        raise OSError(errno.ENOSPC, "No space left on device")

    out, method = tmp_path / "out", SmoothQuant()
    want = streamed(checkpoint, tmp_path / "want", method)
    with pytest.raises(OSError, match="No space left"):
        streamed(checkpoint, out, method, on_bytes=full)

    def again(*_):
        raise LookupError("calibrates")

    monkeypatch.setattr(Wan, "paged", again)
    assert streamed(checkpoint, out, method).files == want.files
    assert not left(out)
    with pytest.raises(LookupError, match="calibrates"):
        streamed(checkpoint, out, method, replace=True, samples=2)


def test_no_room_for_what_calibration_saw_is_said_as_a_full_disk_is(checkpoint, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match=r"No space left on device; what is done lies in .*\.out\.partial"):
            streamed(checkpoint, tmp_path / "out", SmoothQuant())
    assert streamed(checkpoint, tmp_path / "out", SmoothQuant()).calibration
    assert not left(tmp_path / "out")


def cut_off(checkpoint, out, monkeypatch, steps):
    """A calibration that ends behind so many steps, and the folder of what it saw."""
    save, saved = calibration._Begun.save, []

    def until(*given):
        save(*given)
        saved.append(1)
        if len(saved) == steps:
            raise OSError(errno.EIO, "the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(calibration._Begun, "save", until)
        with pytest.raises(OSError, match="the disk is gone"):
            streamed(checkpoint, out, SmoothQuant(), samples=2)
    return out.parent / f".{out.name}.calibration"


def test_a_calibration_that_was_cut_off_goes_on_and_its_steps_are_not_made_again(checkpoint, tmp_path, monkeypatch):
    want = streamed(checkpoint, tmp_path / "want", SmoothQuant(), samples=2)
    folder, read = cut_off(checkpoint, tmp_path / "out", monkeypatch, steps=2), []
    assert sorted(path.name for path in folder.iterdir()) == [
        "answers-00000.safetensors", "answers-00001.safetensors", "begun.safetensors",
    ]  # fmt: skip
    told = {"on_calibration": lambda done, of: read.append((done, of))}
    assert streamed(checkpoint, tmp_path / "out", SmoothQuant(), samples=2, **told).files == want.files
    assert read[0][1] == read[-1][0], "what is left is known at once"
    assert read[0][0] > 2 / 3 * read[-1][0]
    assert not left(tmp_path / "out")


def test_what_another_command_saw_is_not_gone_on_with(checkpoint, tmp_path, monkeypatch):
    cut_off(checkpoint, tmp_path / "out", monkeypatch, steps=2)
    read = []
    told = {"on_calibration": lambda done, of: read.append((done, of)), "samples": 1}
    want = streamed(checkpoint, tmp_path / "want", SmoothQuant(), samples=1)
    assert streamed(checkpoint, tmp_path / "out", SmoothQuant(), **told).files == want.files
    assert read[0][1] is None


def test_answers_that_are_gone_are_named_and_the_same_command_begins_again(checkpoint, tmp_path, monkeypatch):
    folder = cut_off(checkpoint, tmp_path / "out", monkeypatch, steps=2)
    (folder / "answers-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"answers-00001.safetensors is not there"):
        streamed(checkpoint, tmp_path / "out", SmoothQuant(), samples=2)
    assert not left(tmp_path / "out")


def test_another_command_does_not_go_on_with_it(checkpoint, tmp_path):
    out = tmp_path / "out"

    def full(done, of):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device; what is done lies in .*\.out\.partial"):
        streamed(checkpoint, out, on_bytes=full, sync_bytes=1)
    made = streamed(checkpoint, out, format_=W8A8)
    assert {layer.format for layer in made.layers.values()} == {"W8A8"}
    assert artifact.verify(out)


def test_a_full_disk_is_known_before_the_first_layer(checkpoint, tmp_path, monkeypatch):
    def full(handle, offset, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    seen = []
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        streamed(checkpoint, tmp_path / "out", on_bytes=lambda done, of: seen.append(done))
    assert not seen


BIAS = "blocks.0.ffn.net.2.bias"


def nan(tensors):
    tensors[BIAS][3] = torch.nan


def renamed(tensors):
    tensors["renamed"] = tensors.pop(BIAS)


def whole_numbers(tensors):
    tensors[BIAS] = tensors[BIAS].to(torch.int32)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (nan, f"{BIAS} has a value that is not finite"),
        (renamed, "do not agree about blocks.0.ffn.net.2.bias, renamed"),
        (whole_numbers, f"{BIAS} is torch.int32"),
        (lambda tensors: tensors.update({BIAS: tensors[BIAS][1:].clone()}), f"{BIAS} is torch.bfloat16"),
    ],
)
def test_a_checkpoint_that_will_not_do_is_refused_by_name_and_leaves_nothing(checkpoint, tmp_path, how, words):
    change(checkpoint, BIAS, how)
    with pytest.raises(ValueError, match=words):
        streamed(checkpoint, tmp_path / "out")
    assert not left(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_key_of_no_layer_is_named(whole, tmp_path):
    folder = tmp_path / "one file"
    artifact.link_or_copy(whole, folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["blocks.0.ffn.net.2.bios"] = tensors.pop(BIAS)
    weights.unlink()
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=rf"missing: \['{BIAS}'\]; tensors of no layer: \['blocks.0.ffn.net.2.bios'\]"):
        streamed(folder, tmp_path / "out")


def test_a_shard_that_is_missing_or_cut_off_is_named(checkpoint, tmp_path):
    file = shard_of(checkpoint, BIAS)
    data = file.read_bytes()
    file.unlink()
    with pytest.raises(ValueError, match=f"{file.name}, which is not there"):
        streamed(checkpoint, tmp_path / "out")
    file.write_bytes(data[:-100])
    with pytest.raises(ValueError, match=rf"{file.name} has .* it is not whole"):
        streamed(checkpoint, tmp_path / "out")


def test_a_config_of_another_network_is_named(checkpoint, tmp_path):
    (checkpoint / "transformer" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json describes no WanTransformer3DModel"):
        streamed(checkpoint, tmp_path / "out")


def test_a_method_that_makes_no_layers_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="method none does not go layer by layer: take rtn or smoothquant or quarot"):
        streamed(checkpoint, tmp_path / "out", method=Keep(), format_=W16A16)


def test_two_do_not_write_the_same_artifact(checkpoint, tmp_path):
    out = tmp_path / "out"

    def again(done, of):
        with pytest.raises(BlockingIOError, match="another process"):
            streamed(checkpoint, out)

    streamed(checkpoint, out, on_bytes=again)
    assert artifact.verify(out)
