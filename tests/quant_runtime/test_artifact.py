import json
import os

import pytest
import torch
from torch import nn

from quant_runtime import artifact, formats
from quant_runtime.artifact import ArtifactError, AttentionRecord, Base, Manifest
from quant_runtime.attention import AttentionPlan, Density
from quant_runtime.calibrate import fingerprint, observe
from quant_runtime.convert import convert
from quant_runtime.methods import QuaRot, Rtn, SmoothQuant
from quant_runtime.residual import Refresh, Residual, ResidualUse
from quant_runtime.sparsity.topk import TopK

NAMES = ["0", "2"]


def network():
    return nn.Sequential(nn.Linear(48, 64), nn.LayerNorm(64), nn.Linear(64, 48, bias=False), nn.Linear(48, 5)).eval()


@pytest.fixture
def made(tmp_path):
    """(folder, manifest, the converted model): a small artifact with a further file in a folder."""
    model, x = network(), torch.randn(20, 48)
    stats = observe(model, NAMES, lambda _: model(x))
    reports = convert(model, {"0": (QuaRot(), formats.W4A8), "2": (SmoothQuant(), formats.W8A8)}, stats)
    draft = Manifest(
        family="test",
        base=Base(name="nowhere/net", revision="1"),
        method=artifact.method_record(SmoothQuant(alpha=0.6)),
        layers=artifact.layer_records(reports),
        calibration=fingerprint(stats),
        attention=AttentionRecord.of(AttentionPlan(TopK(0.15), warmup=0.1), Density(0.23, 0.15)),
        quality={"psnr": 33.5},
        serving={"steps": 20},
    )

    def write(folder):
        (folder / "net").mkdir()
        artifact.write_weights(model, folder / "net")
        (folder / "config.json").write_text("{}")

    return tmp_path / "made", artifact.save(tmp_path / "made", draft, write), model


def test_what_was_saved_is_loaded_bit_for_bit(made):
    folder, manifest, model = made
    loaded = network()
    assert artifact.load_into(loaded, folder, component="net") == manifest == artifact.read_manifest(folder)
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    x = torch.randn(7, 48)
    assert torch.equal(loaded(x), model(x))


def test_a_network_without_memory_is_loaded_as_well(made):
    folder, _, model = made
    with torch.device("meta"):
        loaded = network()
    artifact.load_into(loaded, folder, component="net")
    x = torch.randn(7, 48)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("method", [Rtn(), SmoothQuant(), QuaRot()], ids=lambda method: type(method).__name__)
def test_fp8_is_saved_and_loaded_bit_for_bit_and_by_its_name_alone(method, tmp_path):
    model, x = network(), torch.randn(20, 48)
    stats = observe(model, NAMES, lambda _: model(x))
    reports = convert(model, {"0": (method, formats.FP8), "2": (method, formats.W4AFP8)}, stats)
    draft = Manifest(
        family="test",
        base=Base(name="n"),
        method=artifact.method_record(method),
        layers=artifact.layer_records(reports),
    )
    artifact.save(tmp_path / "a", draft, lambda folder: artifact.write_weights(model, folder))
    manifest = artifact.read_manifest(tmp_path / "a")
    assert [layer.format for layer in manifest.layers.values()] == ["FP8", "W4AFP8"]
    assert manifest.specs() == {name: report.spec for name, report in reports.items()}
    loaded = network()
    artifact.load_into(loaded, tmp_path / "a")
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
    assert torch.equal(loaded(x), model(x))
    wrong = manifest.model_dump(mode="json")["layers"]
    wrong["0"]["format"] = "W8A8"
    change(tmp_path / "a" / "manifest.json", layers=wrong)
    with pytest.raises(ArtifactError, match=r"0\.qweight is torch\.uint8 .*; the network has torch\.int8"):
        artifact.load_into(network(), tmp_path / "a")


def test_the_manifest_tells_every_layer_and_every_file(made):
    folder, manifest, model = made
    assert set(manifest.files) == {"config.json", "net/model.safetensors"}
    first = manifest.layers["0"]
    assert (first.format, first.rotation, first.scaled, first.bytes) == ("W4A8", 16, False, model[0].stored_bytes())
    assert manifest.layers["2"].scaled
    assert manifest.method.name == "smoothquant"
    assert manifest.method.fields == {"alpha": 0.6, "rounding": {"clip": "absmax"}}
    assert manifest.attention.plan() == AttentionPlan(TopK(0.15), warmup=0.1)
    assert manifest.attention.effective_density == 0.23
    assert sorted(os.listdir(folder)) == ["config.json", "manifest.json", "net"]


def test_shards_and_their_index_hold_every_tensor(tmp_path):
    model, loaded = network(), network()
    draft = Manifest(family="test", base=Base(name="n"), method=artifact.method_record(Rtn()), layers={})
    artifact.save(tmp_path / "a", draft, lambda folder: artifact.write_weights(model, folder, shard_bytes=4000))
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 4
    assert index["weight_map"].keys() == model.state_dict().keys()
    artifact.load_into(loaded, tmp_path / "a")
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


def change(path, **fields):
    given = json.loads(path.read_text())
    path.write_text(json.dumps(given | fields))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "net/model.safetensors").write_bytes(b""), r"net/model\.safetensors is damaged"),
        (lambda f: (f / "config.json").write_text("[]"), r"config\.json is damaged"),
        (lambda f: (f / "config.json").unlink(), r"missing files: \['config\.json'\]"),
        (lambda f: (f / "net/more").write_text(""), r"files of no artifact: \['net/more'\]"),
        (lambda f: (f / "net/link").symlink_to("/etc/hosts"), "net/link is a symbolic link"),
        (lambda f: (f / "manifest.json").unlink(), r"it has no manifest\.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "is not JSON"),
        (lambda f: change(f / "manifest.json", version=2), "version 2; this program reads version 1"),
        (lambda f: change(f / "manifest.json", colour="red"), "colour: Extra inputs are not permitted"),
        (lambda f: change(f / "manifest.json", family=3), "family: Input should be a valid string"),
        (
            lambda f: change(f / "manifest.json", files={"../x": {"bytes": 1, "sha256": "0"}}),
            "no path of a file inside",
        ),
        (lambda f: change(f / "manifest.json", layers={"0": {"format": "W9A8"}}), r"layers\.0\.format"),
        (lambda f: change(f / "manifest.json", layers={"0": {"format": "W8AFP8"}}), r"layers\.0\.format.*W2AFP8"),
    ],
)
def test_what_is_wrong_with_a_folder_is_refused_by_name(made, damage, said):
    folder, *_ = made
    damage(folder)
    with pytest.raises(ArtifactError, match=said):
        artifact.load_into(network(), folder, component="net")


def test_a_changed_byte_is_found_and_can_be_overlooked_on_request(made):
    folder, *_ = made
    path = folder / "net/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged"):
        artifact.verify(folder)
    artifact.load_into(network(), folder, component="net", check=False)


def test_weights_of_another_network_are_refused_by_name(made):
    folder, *_ = made
    with pytest.raises(ArtifactError, match=r"tensors missing: \['4.weight'\]; tensors of no layer: none"):
        artifact.load_into(nn.Sequential(*network(), nn.Linear(5, 1, bias=False)), folder, component="net")
    narrow = network()
    narrow[3] = nn.Linear(48, 4)
    with pytest.raises(ArtifactError, match=r"3\.weight is torch\.float32 \[5, 48\]; the network has .* \[4, 48\]"):
        artifact.load_into(narrow, folder, component="net")


def test_weights_of_another_width_are_refused_by_name(tmp_path, made):
    """What was packed in 3 bits, under a manifest that says 2 or 4."""
    _, manifest, _ = made
    model, x = network(), torch.randn(20, 48)
    reports = convert(model, {"2": (Rtn(), formats.W3A6)}, observe(model, ["2"], lambda _: model(x)))
    layers = artifact.layer_records(reports)
    assert (layers["2"].format, layers["2"].bytes) == ("W3A6", model[2].stored_bytes())
    for written in ("W2A8", "W4A8"):
        changed = {"2": layers["2"].model_copy(update={"format": written})}
        folder = tmp_path / written
        draft = manifest.model_copy(update={"layers": changed})
        artifact.save(folder, draft, lambda folder: artifact.write_weights(model, folder))
        with pytest.raises(ArtifactError, match=r"2\.qweight is torch\.uint8 \[48, 24\]; the network has .* \[48, "):
            artifact.load_into(network(), folder)


def test_a_policy_that_this_version_does_not_know_is_refused(made):
    folder, manifest, _ = made
    attention = json.loads(manifest.attention.model_dump_json())
    attention["policy"] = {"name": "topk", "fields": {"warmth": 1}}
    change(folder / "manifest.json", attention=attention)
    with pytest.raises(ArtifactError, match=r"attention\.policy: topk has no field 'warmth'"):
        artifact.read_manifest(folder).attention.plan()


def test_a_residual_goes_through_the_manifest_with_what_was_measured_of_it():
    plan = AttentionPlan(TopK(0.15), 0.1, residual=Residual(3, 2, 8, 16, "auto"))
    use = ResidualUse((Refresh(0, 0.123456), Refresh(4, 0.2, 0.1, None, 2)), 1234, "host")
    record = AttentionRecord.of(plan, Density(0.23, 0.15, residual=use))
    assert record.plan() == plan
    again = AttentionRecord.model_validate_json(record.model_dump_json())
    assert again == record
    assert (again.residual.placed, again.residual.bytes) == ("host", 1234)
    assert [(r.step, r.lost, r.first_error, r.fell_back) for r in again.residual.refreshes] == [
        (0, 0.1235, None, 0),
        (4, 0.2, 0.1, 2),
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"residual": {"interval": 0}}, "attention: a residual's interval is at least 1; got 0"),
        ({"policy": {"name": "dense", "fields": {}}}, "attention: a residual is what sparse attention loses"),
    ],
)
def test_a_residual_that_cannot_be_is_refused_by_the_field(change, said):
    record = AttentionRecord.of(AttentionPlan(TopK(), residual=Residual())).model_dump()
    for name, fields in change.items():
        record[name] |= fields
    with pytest.raises(ArtifactError, match=said):
        AttentionRecord.model_validate(record).plan()


def test_nothing_stands_under_the_name_after_a_failure(tmp_path, made):
    _, manifest, _ = made

    def fail(folder):
        (folder / "half").write_text("half")
        raise RuntimeError("no space left")

    with pytest.raises(RuntimeError, match="no space left"):
        artifact.save(tmp_path / "new", manifest, fail)
    with pytest.raises(RuntimeError, match="no space left"):
        artifact.save(tmp_path / "made", manifest, fail, replace=True)
    assert os.listdir(tmp_path) == ["made"]
    artifact.verify(tmp_path / "made")


def test_a_folder_that_exists_is_replaced_only_on_request(made):
    folder, manifest, _ = made
    with pytest.raises(FileExistsError, match="is to be replaced"):
        artifact.save(folder, manifest, lambda new: None)
    artifact.save(folder, manifest, lambda new: (new / "only").write_text("new"), replace=True)
    assert sorted(os.listdir(folder)) == ["manifest.json", "only"]
    assert os.listdir(folder.parent) == ["made"]


def test_files_are_linked_where_the_file_system_can(tmp_path):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "file").write_text("text")
    artifact.link_or_copy(source, tmp_path / "target")
    assert (tmp_path / "target/deep/file").samefile(source / "deep/file")


def test_files_are_copied_where_it_cannot(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "source").write_text("text")
    artifact.link_or_copy(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_text() == "text"
    assert not (tmp_path / "target").samefile(tmp_path / "source")
