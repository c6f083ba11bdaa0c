"""The self-test finds every way in which a kernel can be wrong, and with `fallback` puts another in its place."""

import importlib
import pkgutil
from dataclasses import replace

import pytest
import torch
from torch._library.custom_ops import OPDEFS

from quant_runtime import kernels, selftest
from quant_runtime.attention import AttentionPlan, describe_paths
from quant_runtime.compiles import Compile
from quant_runtime.formats import QuantFormat
from quant_runtime.kernels import (
    _triton,
    attention_blocks,
    attention_fp8,
    block_map,
    blocks_by_mass,
    linear_fp8,
    linear_packed,
    linear_w8a8,
    quantize_rows,
    residual_passes,
    unpack,
)
from quant_runtime.kernels._versions import OPS, Version, examined
from quant_runtime.linear import LinearSpec
from quant_runtime.residual import Residual
from quant_runtime.selftest import JUDGES, Error, Layer, Needs, Piece, Report, pieces, run
from quant_runtime.sparsity.bands import Bands
from quant_runtime.sparsity.base import TokenLayout
from quant_runtime.sparsity.topk import TopK
from quant_runtime.sparsity.topp import TopP

LAYOUT = TokenLayout(5, 10, 12, text=7)
LAYERS = (
    Layer(LinearSpec(QuantFormat.parse("W8A8")), 256, 512, bias=True),
    Layer(LinearSpec(QuantFormat.parse("W4A8"), scaled=True, rotation=64), 320, 511, bias=False),
    Layer(LinearSpec(QuantFormat.parse("W3A6")), 3072, 9216, bias=True),
)
FP8_LAYERS = (
    Layer(LinearSpec(QuantFormat.parse("FP8"), scaled=True), 256, 512, bias=True),
    Layer(LinearSpec(QuantFormat.parse("W4AFP8"), rotation=64), 320, 511, bias=False),
)
TABLE = Bands(0.4, table=("stts" * 3,) * 2)  # of a model with 12 heads
PLAN = AttentionPlan(TopK(0.25), warmup=0.3, dense_layers=(1,), dense_qk_bits=8)
NEEDS = Needs(LAYERS, PLAN, (64,), LAYOUT, torch.float32)
LINEAR = replace(NEEDS, layers=LAYERS[:1], plan=AttentionPlan())


@pytest.fixture
def broken(device, monkeypatch):
    """Puts a version of the test's own in front of an op's."""
    changed = []

    def put(name, call, named="broken"):
        op = OPS[name]
        changed.append(op)
        monkeypatch.setitem(op._versions, device, (Version(call, named), *op._versions[device]))

    yield put
    for op in changed:
        op.rise(device)


def test_every_op_has_a_judge():
    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"quant_runtime.kernels.{module.name}")
    assert JUDGES.keys() == OPS.keys()
    registered = {name.removeprefix("quant_runtime::") for name in OPDEFS if name.startswith("quant_runtime::")}
    assert registered - {name for name in registered if name.startswith("a_test_")} == OPS.keys(), (
        "none beside the table"
    )


@pytest.mark.parametrize(
    ("plan", "ops"),
    [
        (PLAN, {"quantize_heads", "attention_blocks", "pool_blocks", "choose_blocks"}),
        (replace(PLAN, pv_bits=8), {"pack_heads", "attention_fp8", "choose_blocks"}),
        (replace(PLAN, qk_bits=16), {"quantize_heads", "attention_blocks", "pool_blocks", "choose_blocks"}),
        (replace(PLAN, policy=TABLE), {"quantize_heads", "attention_blocks"}),
        (replace(PLAN, policy=TABLE, pv_bits=8), {"pack_heads", "attention_fp8"}),
        (AttentionPlan(), set()),
    ],
)
def test_what_is_needed_is_tested_and_nothing_else_and_passes(plan, ops, device):
    report = run(pieces(replace(NEEDS, plan=plan), device), device)
    assert report.failures == {}
    assert report.verdict == "passed"
    linear = {"quantize_rows", "hadamard_quantize", "linear_w8a8", "linear_packed"}
    assert {line.op for line in report.lines} == linear | ops
    assert all(line.version == line.own and line.cases >= 2 for line in report.lines)
    assert not any(line.error.found > line.error.allowed for line in report.lines)


def test_layers_in_fp8_are_tested_as_they_run(device):
    report = run(pieces(replace(NEEDS, layers=FP8_LAYERS, plan=AttentionPlan()), device), device)
    assert (report.verdict, report.failures) == ("passed", {})
    assert {line.op for line in report.lines} == {"quantize_rows", "hadamard_quantize", "linear_fp8", "unpack"}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("linear_fp8", lambda x, w, *rest: linear_fp8.reference(x, w.roll(1, 0), *rest)),
        ("linear_fp8", lambda *args: linear_fp8.reference(*args[:4], None, args[5])),
        ("unpack", lambda packed, inputs, bits, dtype: -unpack.reference(packed, inputs, bits, torch.int8).to(dtype)),
        ("quantize_rows", lambda *args: truncated(*quantize_rows.reference(*args))),
    ],
)
def test_what_is_wrong_with_fp8_is_found(name, wrong, broken, device):
    broken(name, wrong)
    layers = (FP8_LAYERS[0], replace(FP8_LAYERS[1], spec=LinearSpec(QuantFormat.parse("W4AFP8"))))
    assert run(pieces(replace(LINEAR, layers=layers), device), device).failures.keys() == {name}


def truncated(q, scale):
    """Without the last bit."""
    return (q.view(torch.uint8) & 0xFE).view(q.dtype), scale


def one_column_short(x, w, *rest):
    y = linear_w8a8.reference(x, w, *rest)
    short = torch.empty_like(y)
    short[:, :-1] = y[:, :-1]  # the last column is never written
    return short


def saturated(x, w, x_scale, w_scale, bias, out_dtype):
    """Sums of pairs in 16 bits, of x that is made unsigned first: as oneDNN has it on an AVX2 CPU."""
    pairs = ((x[:, None].int() + 128) * w[None].int()).unflatten(2, (-1, 2)).sum(dim=3).clamp(-32768, 32767)
    real = (pairs.sum(dim=2) - 128 * w.int().sum(dim=1)).double() * x_scale[:, None] * w_scale
    return (real if bias is None else real + bias).to(out_dtype)


def raising(*args):
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")


WRONG = {
    "a column is left out": (one_column_short, "off by nan"),
    "sums saturate": (saturated, "off by"),
    "a bit is lost": (lambda *args: linear_w8a8.reference(*args) * (1 + 2**-16), "off by 1.53e-05, where 1e-06 is"),
    "no compiler": (raising, "RuntimeError: Failed to find C compiler. Please specify via CC environment variable."),
    "another shape": (
        lambda *args: linear_w8a8.reference(*args)[:2],
        "broken answers torch.float32 [2, 272], where torch.float32 [131, 272] is",
    ),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_kernel_is_found_and_refused_and_nothing_else_is_blamed(how, broken, device):
    call, said = WRONG[how]
    broken("linear_w8a8", call)
    report = run(pieces(LINEAR, device), device)
    assert report.verdict == "refused"
    assert report.failures.keys() == {"linear_w8a8"}
    assert said in report.failures["linear_w8a8"]
    assert "\n" not in report.failures["linear_w8a8"]
    assert str(OPS["linear_w8a8"].running(device)) == "broken", "nothing has changed"


@pytest.mark.parametrize("how", WRONG)
def test_with_fallback_the_next_version_is_tested_and_runs_from_then_on(how, broken, device):
    call, said = WRONG[how]
    broken("linear_w8a8", call)
    own = str(OPS["linear_w8a8"].versions(device)[1])
    report = run(pieces(LINEAR, device), device, fallback=True)
    assert (report.verdict, report.fell, report.versions["linear_w8a8"]) == ("fallback", True, own)
    assert said in report.failures["linear_w8a8"]
    x, ones = torch.ones(3, 8, dtype=torch.int8, device=device), torch.ones(3, device=device)
    answer = linear_w8a8.linear_w8a8(x, x, ones, ones, None, torch.float32)
    assert answer.unique().tolist() == [8.0]
    again = run(pieces(LINEAR, device), device)
    assert (again.verdict, again.fell, again.failures) == ("fallback", False, report.failures)


def test_where_every_version_is_wrong_even_fallback_refuses(broken, device, monkeypatch):
    monkeypatch.setitem(OPS["linear_packed"]._versions, device, (Version(raising, "one"), Version(raising, "two")))
    report = run(pieces(replace(LINEAR, layers=LAYERS[2:]), device), device, fallback=True)
    assert report.verdict == "refused"
    assert report.failures.keys() == {"linear_packed"}
    OPS["linear_packed"].rise(device)


def test_whole_numbers_that_are_off_by_more_than_a_rounding_are_found(broken, device):
    def off(x, bits, factor):
        q, scale = quantize_rows.reference(x, bits, factor)
        q[0, 0] += 2
        return q, scale

    broken("quantize_rows", off)
    report = run(pieces(LINEAR, device), device)
    assert report.failures["quantize_rows"].startswith("broken is off by inf")


def test_an_answer_written_into_a_tensor_is_tested_as_any_other(broken, device):
    def partly(x, w, x_scale, w_scale, bias, out):
        out[:-1] = linear_w8a8.reference(x, w, x_scale, w_scale, bias, out.dtype)[:-1]

    def piece():
        x, w = (torch.ones(n, 16, dtype=torch.int8, device=device) for n in (5, 8))
        out = torch.empty(5, 8, device=device)
        scales = torch.ones(5, device=device), torch.ones(8, device=device)
        linear_w8a8.linear_w8a8(x, w, *scales, None, torch.float32, out)
        assert out.eq(16).all(), "the reference's answer goes on"

    assert run([Piece("into", piece)], device).verdict == "passed"
    broken("linear_w8a8_into", partly)
    report = run([Piece("into", piece)], device)
    assert report.broken == {}
    assert "off by nan" in report.failures["linear_w8a8_into"]


@pytest.mark.parametrize("policy", [TopK(0.25), TopP(0.7)])
def test_block_lists_are_judged_by_what_they_keep(policy, broken, device):
    name, module = ("choose_blocks", block_map) if isinstance(policy, TopK) else ("blocks_by_mass", blocks_by_mass)
    reference = getattr(module, "choose_reference", None) or module.reference
    broken(name, lambda q_means, k_means, *rest: reference(q_means, -k_means, *rest))
    needs = replace(NEEDS, layers=(), plan=replace(PLAN, policy=policy))
    assert run(pieces(needs, device), device).failures.keys() == {name}


def test_a_refresh_that_loses_nothing_is_found(broken, device):
    def lossless(*args):
        dense, lost = attention_fp8.refresh_reference(*args)
        return dense, torch.zeros_like(lost)

    plan = replace(PLAN, pv_bits=8, residual=Residual())
    needs = replace(NEEDS, layers=(), plan=plan)
    report = run(pieces(needs, device), device)
    assert report.verdict == "passed"
    assert "attention_fp8_refresh" in report.versions
    broken("attention_fp8_refresh", lossless)
    assert run(pieces(needs, device), device).failures.keys() == {"attention_fp8_refresh"}


def no_differences(*args):
    return tuple(torch.zeros_like(one) for one in residual_passes.differences_reference(*args))


def without_left(*args):
    dense, dense_scale, left, left_scale = residual_passes.entry_reference(*args)
    return dense, dense_scale, torch.zeros_like(left), left_scale


def without_a_trend(call):
    """Passes over what was foretold."""
    return lambda lost, values, scale, left, left_scale, right, added, *rest: call(
        lost, values, scale, None, None, None, None, *rest
    )


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("residual_differences", no_differences),
        ("residual_differences", without_a_trend(residual_passes.differences_reference)),
        ("residual_entry", without_left),
        ("residual_entry", without_a_trend(residual_passes.entry_reference)),
    ],
)
@pytest.mark.parametrize("bits", [8, 16])
def test_a_residual_that_knows_no_change_is_found(name, wrong, bits, broken, device):
    broken(name, wrong)
    needs = replace(NEEDS, layers=(), plan=replace(PLAN, pv_bits=8, residual=Residual(bits=bits)))
    assert run(pieces(needs, device), device).failures.keys() == {name}


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.8])
def test_a_third_refresh_meets_a_trend_that_has_come_true(warmup, device):
    met = []

    def seen(op, device, args):
        if op.name == "residual_entry":
            met.append((args[3] is not None, float(args[8])))
        return op.running(device).call(*args)

    plan = replace(PLAN, warmup=warmup, pv_bits=8, residual=Residual())
    torch.manual_seed(selftest.SEED)
    with examined(seen):
        for piece in pieces(replace(NEEDS, layers=(), plan=plan), device):
            piece.call()
    assert met[0] == (False, 0.0), "the second"
    assert (True, 1.0) in met[1:]


def moved_in_a_row(*args):
    """One row of blocks of one head keeps another block than it would."""
    kept, counts = blocks_by_mass.reference(*args)
    kept, row = kept.clone(), int(counts[0, 0].argmin())
    missing = set(range(kept.shape[3])) - set(kept[0, 0, row, : counts[0, 0, row]].tolist())
    listed = [*kept[0, 0, row, 1 : counts[0, 0, row]].tolist(), min(missing)]
    kept[0, 0, row, : counts[0, 0, row]] = torch.tensor(sorted(listed), dtype=torch.int32, device=kept.device)
    return kept, counts


def longer_in_a_row(*args):
    kept, counts = blocks_by_mass.reference(*args)
    counts, row = counts.clone(), int(counts[0, 0].argmin())
    counts[0, 0, row] = kept.shape[3]
    kept = kept.clone()
    kept[0, 0, row] = torch.arange(kept.shape[3], dtype=torch.int32, device=kept.device)
    return kept, counts


@pytest.mark.parametrize("wrong", [moved_in_a_row, longer_in_a_row])
def test_one_row_that_does_not_hold_its_mass_is_found(wrong, broken, device):
    broken("blocks_by_mass", wrong)
    needs = replace(NEEDS, layers=(), plan=replace(PLAN, policy=TopP(0.5)))
    assert run(pieces(needs, device), device).failures.keys() == {"blocks_by_mass"}


@pytest.mark.parametrize(
    "plan",
    [
        replace(PLAN, pv_bits=8, residual=Residual()),
        replace(PLAN, policy=TABLE, pv_bits=8),
        AttentionPlan(dense_qk_bits=8, pv_bits=8),
    ],
)
def test_what_a_gpu_is_given_besides_has_more_tiles_than_run_at_once_and_passes(plan, device, monkeypatch):
    monkeypatch.setattr(selftest, "STEPS", 2)  # a refresh, where there is one, and what follows
    needs, kept = replace(NEEDS, plan=plan, head_sizes=(32,)), []
    tried = selftest.large(needs, 72)

    def seen(op, device, args):
        if op.name.startswith("attention_fp8"):
            q, counts = args[0], args[7]
            assert q.shape[0] * q.shape[1] * -(-q.shape[2] // 128) > 72
            kept.append((int(counts.min()), int(counts.max()), -(-args[8] // 128)))
        return op.running(device).call(*args)

    few = [one._replace(plan=replace(one.plan, warmup=0.0)) for one in tried]
    with examined(seen):
        selftest._attend(few, torch.float32, 32, torch.device(device))
    assert all(least >= selftest.MANY_BLOCKS for least, _, _ in kept)
    assert any(least == every for least, _, every in kept), "all are kept"
    report = run([Piece("large", lambda: selftest._attend(few, torch.float32, 32, torch.device(device)))], device)
    assert (report.verdict, report.failures) == ("passed", {})


def test_memory_that_runs_out_is_told_and_no_kernel_is_blamed(broken, device):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    broken("linear_w8a8", full)
    made = [*pieces(LINEAR, device)] * 3
    named = [piece._replace(name=f"piece {n}") for n, piece in enumerate(made)]
    report = run(named, device, fallback=True)
    assert report.verdict == "refused"
    said = "OutOfMemoryError: linear_w8a8: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert [report.broken[f"piece {n}"] for n in range(len(named)) if f"piece {n}" in report.broken] == [said] * 3
    assert "linear_w8a8" not in report.failures


def test_attention_that_drops_a_key_is_found(broken, device):
    def short(q, k, v, kept, counts, *rest):
        return attention_blocks.reference(q, k, v, kept, counts - 1, *rest)

    broken("attention_blocks", short)
    assert run(pieces(replace(NEEDS, layers=()), device), device).failures.keys() == {"attention_blocks"}


def test_a_piece_that_breaks_outside_of_an_op_refuses_by_its_name(device):
    def piece():
        raise MemoryError("all of it is taken")

    report = run([Piece("a large layer", piece)], device, fallback=True)
    assert (report.verdict, report.failures) == ("refused", {"a large layer": "MemoryError: all of it is taken"})


def test_a_missing_triton_is_called_so(broken, device, monkeypatch):
    broken("linear_w8a8", linear_w8a8.launch, "Triton")
    monkeypatch.setattr(_triton, "triton", None)
    failures = run(pieces(LINEAR, device), device).failures
    assert failures["linear_w8a8"] == "Triton is not installed"
    assert {*failures.values()} == {"Triton is not installed"}, "a GPU rounds by it, too"
    assert len(failures) == (1 if device == "cpu" else 2)


@pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed")
def test_triton_kernels_pass_and_leave_torch_as_they_found_it(broken, device, monkeypatch):
    """On a CPU in the interpreter, which computes bfloat16 and FP8 wrongly and is not asked for them."""
    launches = {"linear_w8a8": linear_w8a8, "quantize_rows": quantize_rows, "linear_packed": linear_packed}
    for name, module in (launches | {"attention_blocks": attention_blocks}).items():
        broken(name, module.launch, "Triton")
    monkeypatch.setattr(selftest, "STEPS", 2)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    layers = (replace(LAYERS[0], outputs=40), replace(LAYERS[2], inputs=100, outputs=40))
    small = Needs(layers, replace(PLAN, warmup=0.5, dense_layers=()), (32,), TokenLayout(2, 7, 10), torch.float16)
    report = run(pieces(small, device), device)
    assert report.failures == {}
    assert [line.version for line in report.lines if line.op == "linear_packed"] == ["Triton"]
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.is_inference_mode_enabled()


def test_an_op_that_has_fallen_is_named_where_the_paths_are_described(broken, device):
    said = describe_paths(device)
    broken("linear_w8a8", raising)
    run(pieces(LINEAR, device), device, fallback=True)
    now = describe_paths(device)
    assert now.keys() == said.keys() | {"linear_w8a8"}
    assert now["linear_w8a8"].startswith(f"{OPS['linear_w8a8'].running(device)}, not broken: RuntimeError: Failed")


def test_no_error_passes_that_is_not_a_number():
    assert not Error(float("nan"), 1.0).passes
    assert Error(0.0, 0.0).passes


@pytest.mark.parametrize(
    ("cached", "said"),
    [([], "unused"), ([False, False], "cold"), ([True, False], "in part"), ([True, True], "warm")],
)
def test_the_report_says_how_the_cache_was_found(cached, said):
    compiles = tuple(Compile("_quantize_rows", 0.5, one) for one in cached)
    report = Report("cpu", (), {}, 1.0, compiles)
    assert (report.cache, report.compile_seconds) == (said, 0.5 * len(cached))
