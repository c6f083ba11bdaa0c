import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quant_runtime import tensor_files
from quant_runtime.tensor_files import Blank, TensorFiles, TensorWriter, fill

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.arange(5, dtype=torch.uint8),
    "c": torch.tensor(2.5, dtype=torch.bfloat16),
    "d": torch.zeros(0, 7, dtype=torch.float16),
    "e": torch.arange(-3, 4, dtype=torch.int8),
}
BLANKS = {key: Blank(tensor.dtype, tuple(tensor.shape)) for key, tensor in TENSORS.items()}


def write(folder, shard_bytes=1 << 20, order=TENSORS):
    with TensorWriter(folder, "model", BLANKS, shard_bytes) as writer:
        for key in order:
            writer.write(key, TENSORS[key])
        writer.sync()


def poured(held, digests=None, **changed):
    """What comes of it in tensors of the dtypes in which they lie, or of those that are `changed`."""
    kinds = {key: its.dtype for key, its in held.tensors.items()} | changed
    into = {key: torch.full(its.shape, 3).to(kinds[key]) for key, its in held.tensors.items()}
    held.pour(into, digests)
    return into


def same(one, other):
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


@pytest.mark.parametrize("shard_bytes", [1 << 20, 30, 1])
def test_what_is_written_is_what_safetensors_and_we_read(tmp_path, shard_bytes):
    write(tmp_path, shard_bytes, order=reversed(TENSORS))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes < 1 << 20)
    theirs = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert same(theirs, TENSORS)
    with TensorFiles.open(tmp_path, "model") as held:
        assert same({key: held.read(key) for key in held.tensors}, TENSORS)


def test_what_safetensors_writes_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with TensorFiles.open(tmp_path, "model") as held:
        assert same({key: held.read(key) for key in TENSORS}, TENSORS)


@pytest.mark.parametrize("shard_bytes", [1 << 20, 30, 1])
def test_pouring_reads_every_tensor_once_and_hashes_the_same_reading(tmp_path, shard_bytes, monkeypatch):
    write(tmp_path, shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    read, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: read.append(preadv(*args)) or read[-1])
    with TensorFiles.open(tmp_path, "model") as held:
        assert same(poured(held, digests), TENSORS)
    assert sum(read) == sum(file.stat().st_size for file in files), "once, and every byte"


@pytest.mark.parametrize("word", [b'"pt"', None])
def test_a_file_that_is_another_is_refused_behind_its_last_tensor(tmp_path, word):
    """Another word in its header, or another last byte."""
    write(tmp_path, 30)
    file = min(tmp_path.glob("*.safetensors"))
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in tmp_path.glob("*.safetensors")}
    data = bytearray(file.read_bytes())
    data[data.index(word) + 1 if word else -1] ^= 1
    file.write_bytes(data)
    with TensorFiles.open(tmp_path, "model") as held, pytest.raises(ValueError, match=f"{file.name} is damaged"):
        poured(held, digests)


@pytest.mark.parametrize("left", [*TENSORS])
def test_the_hash_is_that_of_the_file_where_not_all_of_it_is_wanted(tmp_path, left, monkeypatch):
    monkeypatch.setattr(tensor_files, "PASSED", 8)
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
    with TensorFiles.open(tmp_path, "model") as held:
        some = {key: stored for key, stored in held.tensors.items() if key != left}
        place = held.tensors[left]
    with TensorFiles(some) as held:
        assert same(poured(held, digests), {key: its for key, its in TENSORS.items() if key != left})
    if place.bytes:
        data = bytearray(file.read_bytes())
        data[place.offset] ^= 1
        file.write_bytes(data)
        with TensorFiles(some) as held, pytest.raises(ValueError, match="is damaged"):
            poured(held, digests)


def test_a_tied_tensor_lies_in_no_file_and_is_the_one_that_it_names(tmp_path):
    with torch.device("meta"):
        network = nn.ModuleDict({"words": nn.Embedding(5, 3), "again": nn.Embedding(5, 3)})
    save_file({"words.weight": torch.arange(15.0).view(5, 3)}, tmp_path / "m.safetensors")
    with TensorFiles.open(tmp_path, "m") as held:
        fill(network, held, "cpu", tied={"again.weight": "words.weight"})
        with pytest.raises(ValueError, match=r"missing: \['again\.weight'\]"):
            fill(network, held, "cpu")
    assert network["again"].weight[4, 2] == 14
    assert network["again"].weight.data_ptr() == network["words"].weight.data_ptr()


def test_files_without_an_index_are_read_together(tmp_path):
    write(tmp_path, 30)
    with TensorFiles.among(sorted(tmp_path.glob("*.safetensors"))) as held:
        assert same(poured(held), TENSORS)
    file = min(tmp_path.glob("*.safetensors"))
    (tmp_path / "again.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=rf"again\.safetensors has a, and so has {file.name}"):
        TensorFiles.among([file, tmp_path / "again.safetensors"])


def test_a_network_is_filled_strictly_and_tensor_by_tensor(tmp_path):
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    state = {key: torch.full(its.shape, 3, dtype=its.dtype) for key, its in network.state_dict().items()}
    save_file({key: t.half() if t.is_floating_point() else t for key, t in state.items()}, tmp_path / "m.safetensors")

    def wide(key, stored):
        assert stored == held.tensors[key]
        return torch.float32 if stored.dtype.is_floating_point else stored.dtype

    with TensorFiles.open(tmp_path, "m") as held:
        fill(network, held, "cpu", kind=wide)
        assert same(dict(network.state_dict()), state)
        fill(network, held, "cpu")
        assert {its.dtype for its in network.state_dict().values()} == {torch.float16, torch.int64}
        assert same({key: its.to(state[key].dtype) for key, its in network.state_dict().items()}, state)
        fill(network, held, "meta")
        assert {its.device.type for its in network.state_dict().values()} == {"meta"}
        with pytest.raises(ValueError, match=r"0\.weight is torch\.float16 \[4, 3\]; .* torch\.float32 \[4, 5\]"):
            fill(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), held, "cpu")
        with pytest.raises(ValueError, match=r"missing: none; tensors of no layer: \['1.bias', "):
            fill(nn.Sequential(nn.Linear(3, 4)), held, "cpu")


WIDER = {"a": torch.float64, "c": torch.float32, "e": torch.int32}


@pytest.mark.parametrize("passed", [8, 24, 1 << 10])
def test_what_is_to_be_of_another_dtype_passes_in_parts_through_one_place(tmp_path, passed, monkeypatch):
    """And what lies as it is to be is read where it is to be: nothing larger than that place is beside the tensors."""
    monkeypatch.setattr(tensor_files, "PASSED", passed)
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
    sizes, empty = [], torch.empty
    with TensorFiles.open(tmp_path, "model") as held:
        monkeypatch.setattr(torch, "empty", lambda *args, **words: sizes.append(args) or empty(*args, **words))
        got = poured(held, digests, **WIDER)
        monkeypatch.setattr(torch, "empty", empty)
    assert same(got, {key: its.to(WIDER.get(key, its.dtype)) for key, its in TENSORS.items()})
    assert sizes == [(passed,)]


def test_a_device_with_memory_of_its_own_gets_every_part(tmp_path, monkeypatch):
    """The meta device stands for it: what is copied there is seen on its way."""
    monkeypatch.setattr(tensor_files, "PASSED", 24)
    write(tmp_path)
    seen, copy = [], torch.Tensor.copy_

    def copied(target, source):
        seen.append((target.device.type, source.clone()))
        return copy(target, source)

    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    with TensorFiles.open(tmp_path, "model") as held:
        held.pour({key: torch.empty(its.shape, dtype=its.dtype, device="meta") for key, its in held.tensors.items()})
    assert {device for device, _ in seen} == {"meta"}
    whole = [TENSORS[key].view(-1) for key in held.tensors]
    want = [part for its in whole for part in its.split(24 // its.element_size()) if len(part)]
    assert [(part.dtype, part.tolist()) for _, part in seen] == [(part.dtype, part.tolist()) for part in want]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU takes the parts out of pinned memory")
def test_a_gpu_gets_the_values_as_they_lie_and_as_they_are_to_be(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "PASSED", 24)
    write(tmp_path)
    with TensorFiles.open(tmp_path, "model") as held:
        kinds = {key: WIDER.get(key, its.dtype) for key, its in held.tensors.items()}
        into = {key: torch.empty(its.shape, dtype=kinds[key], device="cuda") for key, its in held.tensors.items()}
        held.pour(into)
    assert same({key: its.cpu() for key, its in into.items()}, {key: t.to(kinds[key]) for key, t in TENSORS.items()})


def test_whole_numbers_are_not_taken_for_floats(tmp_path):
    network = nn.Linear(3, 4)
    save_file({"weight": torch.zeros(4, 3, dtype=torch.int32), "bias": torch.zeros(4)}, tmp_path / "m.safetensors")
    with TensorFiles.open(tmp_path, "m") as held, pytest.raises(ValueError, match=r"weight is torch\.int32"):
        fill(network, held, "cpu")


def test_a_file_that_was_begun_is_gone_on_with(tmp_path):
    with TensorWriter(tmp_path, "model", BLANKS, 30) as writer:
        writer.write("a", TENSORS["a"])
    with TensorWriter(tmp_path, "model", BLANKS, 30) as writer:
        for key in list(TENSORS)[1:]:
            writer.write(key, TENSORS[key])
    with TensorFiles.open(tmp_path, "model") as held:
        assert same({key: held.read(key) for key in held.tensors}, TENSORS)


def test_a_tensor_that_is_not_as_planned_is_refused_by_name(tmp_path):
    with TensorWriter(tmp_path, "model", BLANKS, 30) as writer, pytest.raises(ValueError, match="a was planned as"):
        writer.write("a", TENSORS["a"].half())


@pytest.mark.parametrize("cut", [3, 40, 1])
def test_a_file_that_is_cut_off_is_refused_by_name(tmp_path, cut):
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: cut if cut > 1 else -1])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        TensorFiles.open(tmp_path, "model")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "F128"}, r"a\.dtype"),
        ({"shape": [-1]}, r"a\.shape"),
        ({"data_offsets": [0, 4]}, "a lies at"),
        ({"more": 1}, r"a\.more"),
    ],
)
def test_a_header_that_cannot_be_is_refused_by_field(tmp_path, change, words):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change
    text = json.dumps({"a": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match=words):
        TensorFiles.open(tmp_path, "model")


def test_a_missing_shard_and_a_wrong_index_are_named(tmp_path):
    write(tmp_path, shard_bytes=1)
    index = tmp_path / "model.safetensors.index.json"
    given = json.loads(index.read_text())
    first = given["weight_map"]["a"]
    index.write_text(json.dumps(given | {"weight_map": {**given["weight_map"], "x": first}}))
    with pytest.raises(ValueError, match="do not agree about x"):
        TensorFiles.open(tmp_path, "model")
    index.write_text(json.dumps(given | {"weight_map": {"a": "../elsewhere"}}))
    with pytest.raises(ValueError, match="no file of this folder"):
        TensorFiles.open(tmp_path, "model")
    index.write_text(json.dumps(given))
    (tmp_path / first).unlink()
    with pytest.raises(ValueError, match=f"{first}, which is not there"):
        TensorFiles.open(tmp_path, "model")


def test_a_folder_without_weights_says_what_would_do(tmp_path):
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        TensorFiles.open(tmp_path, "model")
