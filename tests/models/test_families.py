"""What every video family does, of every kind of checkpoint that it runs: on tiny ones with the layout of real ones."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from models import load, registry
from models.video import networks
from quant_runtime import narrow_linear, quality, wide_face
from quant_runtime.attention import AttentionPlan
from quant_runtime.linear import QuantLinear
from quant_runtime.narrow_linear import NarrowLinear
from quant_runtime.residual import Residual
from quant_runtime.sparsity.topk import TopK
from tests.models import films
from tests.models.films import CASES, FLOAT32, RECIPES, ROUNDING, SPARSE, apart, nothing
from tests.support import relative_error

COMPRESSED = pytest.mark.parametrize(  # without a picture it is the checkpoint that it is with one
    "case", [name for name in CASES if name != "wan-ti2v-5b"], indirect=True, scope="module"
)
HALF_PSNR = 30.0  # dB: bfloat16 throughout against float32; noise of another seed gives 25 at most
SAME_PSNR = 40.0  # dB: int8 against float32, the decoder perhaps in bfloat16; another seed gives 25 at most


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def checkpoint(case, tmp_path_factory):
    folder = tmp_path_factory.mktemp("video") / "checkpoint"
    case.tiny(folder)
    return folder


@pytest.fixture(scope="module")
def model(case, checkpoint):
    return case.family.load(checkpoint, "cpu", torch.float32)


@pytest.fixture(scope="module", params=RECIPES)
def made(request, case, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("artifacts") / request.param
    return films.made(case.family, checkpoint, RECIPES[request.param], out, case.inputs(checkpoint))


def test_a_folder_is_recognized_by_its_index_alone(case, checkpoint):
    assert registry.family_of(checkpoint).name == case.family.name


def test_dense_in_full_precision_it_films_what_diffusers_films(case, checkpoint, model):
    """Each answer of each network, attention processor and order of the experts included, and so the film."""
    want, film = case.stock(checkpoint)
    other = {"image": films.another(checkpoint)} if case.image else {"prompt": "two blue boxes"}
    asked, changed = case.inputs(checkpoint), case.inputs(checkpoint, **other)
    with films.answers(*networks(model.network).values()) as got:
        assert apart(model.film(asked, nothing).frames, film) <= ROUNDING
    assert [relative_error(*pair) < FLOAT32 for pair in zip(got, want, strict=True)] == [True] * len(want)
    with films.answers(*networks(model.network).values()) as got:
        model.film(changed, nothing)
    assert relative_error(got[0], want[0]) > 10 * FLOAT32, f"{other} counts"


def test_every_step_is_told_and_what_is_raised_there_ends_the_run(case, checkpoint, model):
    seen = []
    model.film(case.inputs(checkpoint), lambda done, of: seen.append((done, of)))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    def stop(done, of):
        seen.append((done, of))
        raise InterruptedError

    with pytest.raises(InterruptedError):
        model.film(case.inputs(checkpoint), stop)
    assert seen[3:] == [(1, 3)]


def test_from_one_seed_it_films_the_same_in_bfloat16_as_on_a_gpu(case, checkpoint, model):
    family = case.family
    half = family.load(checkpoint, "cpu", family.dtypes(torch.bfloat16, torch.bfloat16))
    assert {network.dtype for network in networks(half.network).values()} == {torch.bfloat16}
    got, want = (torch.from_numpy(m.film(case.inputs(checkpoint), nothing).frames) for m in (half, model))
    assert quality.psnr(want, got) > HALF_PSNR


@pytest.mark.parametrize("policy", SPARSE)
def test_it_films_by_every_policy_and_tells_the_density(case, checkpoint, model, policy):
    model.attend(SPARSE[policy])
    with films.answers(*networks(model.network).values()) as got:
        film = model.film(case.inputs(checkpoint, width=96, height=64), nothing)
    density = model.attention.density()
    model.attend(AttentionPlan())
    assert film.frames.any()
    assert all(bool(answer.isfinite().all()) for answer in got)
    assert 0 < density.sparse < 1
    assert density.effective == density.sparse


def test_what_a_residual_takes_is_known_before_it_is_taken_and_then_it_is_gone(case, checkpoint, model):
    asked = case.inputs(checkpoint, steps=6)
    model.attend(AttentionPlan(TopK(0.5, block=16), qk_bits=16, residual=Residual(1, rank=4)))
    told = model.residual_bytes(asked)
    assert model.residual_bytes(case.inputs(checkpoint, guidance=1.0)) == told / model.sequences(asked)
    model.film(asked, nothing)
    expected, taken = model.expected(asked), model.attention.density().residual.bytes
    assert replace(model.layout, text=expected.text) == expected
    assert told * model.layout.tokens / expected.tokens - 8192 <= taken <= told, "shorter texts take less"
    states = getattr(model.attention, "states", {"": model.attention})
    assert all(state.cache.empty for state in states.values())

    def stop(done, of):
        assert not all(state.cache.empty for state in states.values())
        raise InterruptedError

    with pytest.raises(InterruptedError):
        model.film(asked, stop)
    assert all(state.cache.empty for state in states.values()), "of a film that was broken off, too"
    model.attend(AttentionPlan())
    assert (model.residual_bytes(asked), model.place(asked)) == (0, None)


def test_a_film_with_a_residual_is_nearer_the_dense_one(case, checkpoint, model):
    asked = case.inputs(checkpoint, steps=8)
    films = {}
    for name, its in {"none": None, "first": Residual(2, 1), "second": Residual(2, rank=4)}.items():
        model.attend(AttentionPlan(TopK(0.3, block=16), 0.25, qk_bits=16, residual=its))
        films[name] = torch.from_numpy(model.film(asked, nothing).frames)
    model.attend(AttentionPlan())
    dense = torch.from_numpy(model.film(asked, nothing).frames)
    psnr = {name: quality.psnr(dense, film) for name, film in films.items()}
    assert psnr["none"] < min(psnr["first"], psnr["second"]), psnr


def test_a_rank_above_the_size_of_the_heads_is_refused(case, model):
    with pytest.raises(ValueError, match=r"at most the size of this model's heads, .*; got 300"):
        case.family.suits(model.network, AttentionPlan(TopK(), residual=Residual(rank=300)))
    with pytest.raises(ValueError, match="got 300"):
        model.attend(AttentionPlan(TopK(), residual=Residual(rank=300)))


@COMPRESSED
def test_an_artifact_films_what_was_filmed_before_it_was_saved(case, checkpoint, made):
    model = case.family.load(made.folder, "cpu", torch.float32)
    model.attend(made.manifest.attention.plan())
    assert apart(model.film(case.inputs(checkpoint), nothing).frames, made.before) == 0


@COMPRESSED
def test_on_a_cpu_its_large_layers_stay_in_16_bits_and_it_films_the_same(case, checkpoint, made, monkeypatch):
    """Of a tiny network every layer counts as large."""
    want = load.load(made.folder, "cpu")
    monkeypatch.setattr(narrow_linear, "LARGE", 1)
    monkeypatch.setattr(wide_face, "LEAST", 1)
    got = load.load(made.folder, "cpu")
    asked, fed = case.inputs(checkpoint), []
    for network in networks(got.network).values():
        assert network.dtype == torch.float32, "what its pipeline feeds it with"
        low = [m for m in network.modules() if isinstance(m, NarrowLinear)]
        assert low
        assert {m.weight.dtype for m in low} == {torch.bfloat16}
        for layer in low:
            layer.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].dtype))
    frames = [torch.from_numpy(model.film(asked, nothing).frames) for model in (got, want)]
    assert quality.psnr(*frames) > SAME_PSNR
    assert {*fed} == {torch.float32}


@COMPRESSED
def test_a_worker_makes_files_of_it(case, checkpoint, made, tmp_path):
    model = load.load(made.folder, "cpu")
    outputs = model.run(case.inputs(checkpoint), tmp_path, nothing)
    assert [file.name for file in outputs.files] == ["video.mp4", "poster.jpg", "run.json"]
    assert all(file.path.stat().st_size for file in outputs.files)
    density, each = model.attention.density(), len(networks(model.network))
    assert density.sparse is None if made.recipe is not RECIPES["sparse"] else 0 < density.sparse < 1
    assert len(json.loads((tmp_path / "run.json").read_text())["attention"]["network_densities"]) == each * (each > 1)
    if made.recipe.judging_samples:
        assert made.manifest.quality["psnr"] > SAME_PSNR


@COMPRESSED
def test_the_layers_of_the_manifest_are_all_of_the_blocks_and_add_up_to_the_files(case, made, model):
    assert list(made.manifest.layers) == model.layers()
    stored = 0
    for folder in case.family.components(made.folder):
        tensors = load_file(made.folder / folder / "diffusion_pytorch_model.safetensors")
        prefix = f"{folder}." if len(networks(model.network)) > 1 else ""
        own = [t for key, t in tensors.items() if f"{prefix}{key}".rpartition(".")[0] in made.manifest.layers]
        stored += sum(tensor.numel() * tensor.element_size() for tensor in own)
    assert made.manifest.layer_bytes()[0] == stored
    assert {layer.format for layer in made.manifest.layers.values()} == {str(made.recipe.format)}


@COMPRESSED
def test_diffusers_opens_it_with_the_layers_that_a_worker_opens(case, made):
    importlib.import_module("quant_runtime.diffusers")  # teaches from_pretrained what an artifact's layers are
    pipe = DiffusionPipeline.from_pretrained(made.folder, dtype=torch.float32)
    parts = {name: getattr(pipe, name) for name in case.family.components(made.folder)}
    low = [
        f"{folder}." * (len(parts) > 1) + name
        for folder, part in parts.items()
        for name, module in part.named_modules()
        if isinstance(module, QuantLinear)
    ]
    assert set(low) == set(made.manifest.layers)
