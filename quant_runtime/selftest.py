"""Every kernel that an artifact will run, run on its device and held against its reference before a job depends on it.

Small pieces of what will run are run through the functions that will run them. Each op that is called on the way runs
on the inputs it was given, with outputs that are poisoned beforehand, and is compared with its reference on that
device; the reference's answer is what goes on, so that one wrong kernel does not blame those behind it. Which ops there
are is what the pieces call: JUDGES says how far from its reference each may be.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from quant_runtime.artifact import Manifest
from quant_runtime.attention import PACKED_BLOCK, AttentionPlan, AttentionState, attend
from quant_runtime.compiles import Compile, recorded
from quant_runtime.kernels import _cuda, _triton, attention_fp8_sm90, hadamard_quantize, hadamard_quantize_sm90
from quant_runtime.kernels._fp8 import E4M3
from quant_runtime.kernels._versions import OPS, Op, Version, examined
from quant_runtime.kernels.attention_blocks import key_mask
from quant_runtime.linear import LinearSpec, QuantLinear
from quant_runtime.sparsity.bands import Bands
from quant_runtime.sparsity.base import AttentionCall, Blocks, Policy, Seen, TokenLayout
from quant_runtime.sparsity.dense import Dense

# How far apart, as the kernels' own tests have it: relative to the size of the answer where nothing else is said.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-8}  # of sums, and of the answer's dtype
VALUES_ROUNDED = 2**-7  # 16-bit values: the probabilities, the sums and the answer are each rounded
SCORES_ROUNDED = 1e-5  # of float32: scores are some hundreds here, and a weight is off as its score is, not relatively
ATTENDED = {torch.float32: SCORES_ROUNDED, torch.float16: VALUES_ROUNDED, torch.bfloat16: VALUES_ROUNDED}
SUMS_ROUNDED = 2**-4  # of weights in e4m3: where one key has them all, a sum is as far off as it is
P_ROUNDED = 0.04  # attention_fp8 on a GPU: e4m3 has 3 bits behind the first, and random values add few up
FLIPS = 2e-3  # of whole numbers may fall to the other side of a half: a GPU fuses products and sums
SHORT_SUMS = 2**-10, 0.05  # of scales, and of whole numbers: a GPU turns sums of 16-bit numbers in 11 bits
V_ROUNDED = 0.02  # of FP8 numbers: one in some hundred lies at a half
FP8_SUMS = 2**-7  # a GPU adds FP8 products up in fewer bits than float32 has
TENSOR_FLOAT = 2e-3  # a GPU multiplies float32 with 11 bits where it is told to
INT8_STEP = 0.02  # of a cached residual: entries on the other side of a half
CANCELLED = 1e-5  # how alike the tokens of a block are: of directions that cancel, a mean is a tenth of one
PLACED = 1e-5  # float32 maps resized: where a pixel comes from is told in float32, of hundreds, and a GPU fuses it
DIFFERENCES = 1e-5  # of differences, in float32: most of what they are the difference of cancels
NOTICED = 1e-3  # the size of a difference, beside what it is of, below which rounding is some of it
NEAR = 1e-4  # of the largest score: two blocks so close may change places when means are summed in another order

ROWS = (131, 5)  # of a layer's input: ragged to every tile; more than a few, and few
OUTPUTS = 272  # of a layer, at most: ragged to every tile, and a multiple of 16 as real ones are
STEPS = 8  # of the generation that attention is tried in: what a plan does at some steps alone is done
HEADS = 2
NEIGHBOURS = 60  # tokens that are alike
MOVES = 0.3  # how far values go in a step, beside their size: what is lost changes by more than rounding does
STRAYS = 0.01  # and what keys and values do besides, each by itself
MANY_BLOCKS = 9  # at least, that a row keeps where the attention is large: more than a kernel has in flight
TIMES = 2  # that an op is tested on inputs of one kind: of even rows and of uneven ones; at later steps it just runs
SEED = 0  # the same inputs every time: a machine that passes passes again

Verdict = Literal["passed", "fallback", "refused"]


class Error(NamedTuple):
    """How far an answer is from its reference, and how far it may be."""

    found: float
    allowed: float

    @property
    def passes(self) -> bool:
        return self.found <= self.allowed  # not of NaN

    @property
    def share(self) -> float:
        return self.found / self.allowed if self.allowed else math.inf if self.found else 0.0


Answers = tuple[Tensor, ...]
Judge = Callable[[tuple[Any, ...], Answers, Answers], Error]


class Piece(NamedTuple):
    """A small part of what will run, and what a message calls it."""

    name: str
    call: Callable[[], object]


@dataclass(frozen=True)
class Layer:
    """What of a quantized layer decides which kernels run, and how."""

    spec: LinearSpec
    inputs: int
    outputs: int
    bias: bool


@dataclass(frozen=True)
class Needs:
    """What of an artifact does."""

    layers: Sequence[Layer]
    plan: AttentionPlan
    head_sizes: Sequence[int]  # of the attention that the plan is for
    layout: TokenLayout  # a small one, of the family's kind
    dtype: torch.dtype  # of what goes from layer to layer


@dataclass(frozen=True)
class Line:
    """What became of one op. Of several cases: the worst error by its tolerance, and the sums of their seconds."""

    op: str
    version: str  # that runs from now on
    own: str  # that is meant to run here
    passed: bool  # the version that runs
    cases: int
    error: Error
    first_seconds: float  # with compiling, where it was not compiled before
    again_seconds: float
    failure: str = ""  # why its own version does not run, or is not to


@dataclass(frozen=True)
class Report:
    """The self-test of one artifact on one device."""

    device: str
    lines: tuple[Line, ...]
    broken: Mapping[str, str]  # pieces that did not come to their end, and why
    seconds: float
    compiles: tuple[Compile, ...]
    fell: bool = False  # whether an op has changed its version in it

    @property
    def verdict(self) -> Verdict:
        if self.broken or not all(line.passed for line in self.lines):
            return "refused"
        return "fallback" if any(line.failure for line in self.lines) else "passed"

    @property
    def failures(self) -> dict[str, str]:
        return {line.op: line.failure for line in self.lines if line.failure} | dict(self.broken)

    @property
    def versions(self) -> dict[str, str]:
        return {line.op: line.version for line in self.lines}

    @property
    def compile_seconds(self) -> float:
        return sum(one.seconds for one in self.compiles)

    @property
    def cache(self) -> str:
        """How Triton's cache on the disk was found: cold, warm, in part, or unused, where nothing was compiled."""
        if not self.compiles:
            return "unused"
        held = sum(one.cached for one in self.compiles)
        return "warm" if held == len(self.compiles) else "in part" if held else "cold"


def run(pieces: Iterable[Piece], device: torch.device | str, fallback: bool = False) -> Report:
    """Tests what `pieces` call on this device, which they are made for.

    With `fallback` an op that fails runs by its next version from now on, in this whole process, and all is tested
    again; without, nothing changes but the report.
    """
    device, begun, pieces = torch.device(device), time.perf_counter(), tuple(pieces)
    lines: dict[str, Line] = {}
    fell = False
    with recorded() as compiles, _poisoned(), _one_thread(), torch.inference_mode():
        while True:
            test = _Test(fallback)
            broken = {piece.name: why for piece in pieces if (why := test.runs(piece, device))}
            for name, line in test.lines.items():
                before = lines.get(name)
                slowest = max(line.first_seconds, before.first_seconds if before else 0.0)
                lines[name] = replace(line, first_seconds=slowest)
            fell |= test.fell
            if not test.fell:
                break
    seconds = time.perf_counter() - begun
    return Report(_words(device), tuple(lines.values()), broken, seconds, tuple(compiles), fell)


class _Test:
    """One round over all pieces."""

    def __init__(self, fallback: bool) -> None:
        self.fallback, self.fell = fallback, False
        self.lines: dict[str, Line] = {}
        self._tested: Counter[tuple[Any, ...]] = Counter()

    def runs(self, piece: Piece, device: torch.device) -> str:
        """Empty, or why the piece did not come to its end."""
        try:
            torch.manual_seed(SEED)
            with examined(self.examine):
                piece.call()
            _settle(device)
        except Exception as error:
            return _why(error)
        return ""

    def examine(self, op: Op, device: torch.device, args: tuple[Any, ...]) -> Any:
        """Tests an op on these arguments, and answers what its reference does.

        Of a kind that it has passed on often enough it answers what it does itself.
        """
        try:
            return self._answered(op, device, args)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(f"{op.name}: {error}") from error

    def _answered(self, op: Op, device: torch.device, args: tuple[Any, ...]) -> Any:
        kind = (op.name, *map(_kind, args))
        if self._tested[kind] >= TIMES and self.lines[op.name].passed:
            return op.running(device).call(*args)
        answer, want = _called(op, op.reference, args)
        while True:
            version = op.running(device)
            line = self._tried(op, version, device, args, want)
            known = self.lines.get(op.name)
            self.lines[op.name] = _together(known, line) if known and known.version == line.version else line
            if line.passed or not self.fallback or op.fall(device, line.failure) is None:
                break
            self.fell = True
        self._tested[kind] += 1
        for place, tensor in zip(op.mutated, want, strict=False):
            args[place].copy_(tensor)
        return answer

    def _tried(self, op: Op, version: Version, device: torch.device, args: tuple[Any, ...], want: Answers) -> Line:
        fall, own = op.fallen(device), str(op.versions(device)[0])
        line = Line(op.name, str(version), own, False, 1, Error(math.nan, math.nan), 0.0, 0.0)
        try:
            if str(version) == "Triton" and _triton.triton is None:
                return replace(line, failure="Triton is not installed")
            (_, got), first = _timed(lambda: _called(op, version.call, args), device)
            _, again = _timed(lambda: _called(op, version.call, args), device)
        except torch.OutOfMemoryError:
            raise  # it says nothing of the kernel
        except Exception as error:
            return replace(line, failure=_why(error))
        found, wanted = ([f"{one.dtype} {list(one.shape)}" for one in answer] for answer in (got, want))
        if found != wanted:
            return replace(line, failure=f"{version} answers {', '.join(found)}, where {', '.join(wanted)} is right")
        off = JUDGES[op.name](args, got, want)
        why = "" if off.passes else f"{version} is off by {off.found:.3g}, where {off.allowed:.3g} is allowed"
        failure = why or (fall.why if fall else "")
        return replace(line, passed=off.passes, error=off, first_seconds=first, again_seconds=again, failure=failure)


def _kind(value: Any) -> Any:
    """What of an argument decides how an op runs: of a tensor all but its numbers."""
    return (value.shape, value.dtype, value.stride(), value.device) if isinstance(value, Tensor) else value


def _called(op: Op, call: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Answers]:
    """What a version answers, and the tensors that are its answer: what it returns, or what it has written to."""
    given = list(args)
    for place in op.mutated:
        given[place] = torch.empty_like(given[place])
    answer = call(*given)
    if op.mutated:
        return answer, tuple(given[place] for place in op.mutated)
    return answer, answer if isinstance(answer, tuple) else (answer,)


def _together(one: Line, other: Line) -> Line:
    """Two cases of one op."""
    worse = other if not other.passed or (one.passed and other.error.share > one.error.share) else one
    return replace(
        worse,
        passed=one.passed and other.passed,
        cases=one.cases + other.cases,
        first_seconds=one.first_seconds + other.first_seconds,
        again_seconds=one.again_seconds + other.again_seconds,
        failure=one.failure or other.failure,
    )


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    _settle(device)
    begun = time.perf_counter()
    answer = call()
    _settle(device)
    return answer, time.perf_counter() - begun


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _why(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else ''}"[:300]


def _words(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


@contextmanager
def _poisoned() -> Iterator[None]:
    """Memory that nobody wrote reads as NaN, or the largest whole number: what a kernel leaves out shows."""
    filling: Any = torch.utils.deterministic  # whose switch torch's stubs do not know
    was, fills = torch.are_deterministic_algorithms_enabled(), filling.fill_uninitialized_memory
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of ops that have no deterministic version: none is asked for
        torch.use_deterministic_algorithms(True, warn_only=True)
        filling.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was, warn_only=warns)
            filling.fill_uninitialized_memory = fills


@contextmanager
def _one_thread() -> Iterator[None]:
    """On a CPU, small inputs gain nothing from more, and threads that wait for each other on busy cores take long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# What is allowed


def relative(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ in float64; NaN where `got` holds one."""
    got, want = got.double(), want.double()
    size = float(want.norm())
    return float((got - want).norm()) / size if size else float(got.norm())


def _worst(*errors: Error) -> Error:
    return max(errors, key=lambda error: error.share if error.passes else math.inf)


def _floats(limits: Mapping[torch.dtype, float] = ROUNDING) -> Judge:
    """Answers are floats, each within the limit of its dtype."""

    def judge(args: tuple[Any, ...], got: Answers, want: Answers) -> Error:
        pairs = [(g, w) for g, w in zip(got, want, strict=True) if w.numel()]
        return _worst(*(Error(relative(g, w), limits[w.dtype]) for g, w in pairs))

    return judge


def _flips(got: Tensor, want: Tensor, allowed: float) -> Error:
    """The fraction of whole numbers that are another, by one; by more is none allowed."""
    apart = (got.int() - want.int()).abs()
    if int(apart.max()) > 1:
        return Error(math.inf, allowed)
    return Error(float((apart > 0).double().mean()), max(allowed, 2 / apart.numel()))


def _near(got: Tensor, want: Tensor) -> Error:
    """FP8 numbers, whose steps are as large as they are."""
    return Error(relative(got.float(), want.float()), V_ROUNDED)


def _rounded(short: Callable[[tuple[Any, ...]], bool] = lambda args: False) -> Judge:
    """Whole or FP8 numbers, then their scales, then perhaps floats. `short`: whether these sums have 11 bits."""

    def judge(args: tuple[Any, ...], got: Answers, want: Answers) -> Error:
        scale, flips = SHORT_SUMS if short(args) else (ROUNDING[torch.float32], FLIPS)
        rest = [(g, w) for g, w in zip(got[2:], want[2:], strict=True) if w.numel()]
        return _worst(
            _near(got[0], want[0]) if want[0].dtype == E4M3 else _flips(got[0], want[0], flips),
            Error(relative(got[1], want[1]), scale),
            *(Error(relative(g, w), ROUNDING[w.dtype]) for g, w in rest),
        )

    return judge


def _turned_short(args: tuple[Any, ...]) -> bool:
    """By Triton's kernel, whose sums of 16-bit numbers are short: the one by hand has whole ones."""
    x, _, block, *_ = args
    runs = str(OPS["hadamard_quantize"].running(x.device))
    by_hand = runs == hadamard_quantize.HOPPER and hadamard_quantize_sm90.takes(x.contiguous(), block)
    return bool(x.device.type == "cuda" and x.dtype != torch.float32 and not by_hand)


def _same(args: tuple[Any, ...], got: Answers, want: Answers) -> Error:
    pairs = [(g.float(), w.float()) for g, w in zip(got, want, strict=True)]
    return _worst(*(Error(float((g != w).double().mean()), 0.0) for g, w in pairs))


def _fp8(args: tuple[Any, ...], got: Answers, want: Answers) -> Error:
    limits = {dtype: max(limit, P_ROUNDED) for dtype, limit in ROUNDING.items()}
    return _floats(ATTENDED if args[0].device.type == "cpu" else limits)(args, got, want)


def _with_mass(args: tuple[Any, ...], got: Answers, want: Answers) -> Error:
    """Attention, and the logarithm of what its weights sum to: of the sum itself, where there is one."""
    share = torch.where(want[1] == got[1], 1.0, (got[1] - want[1]).exp())  # of none both are -inf
    return _worst(_fp8(args, got[:1], want[:1]), Error(float((share - 1).abs().max()), SUMS_ROUNDED))


def _multiplied_fp8(args: tuple[Any, ...], got: Answers, want: Answers) -> Error:
    limits = {dtype: max(limit, FP8_SUMS) for dtype, limit in ROUNDING.items()}
    return _floats(ROUNDING if args[0].device.type == "cpu" else limits)(args, got, want)


def _refreshed(args: tuple[Any, ...], got: Answers, want: Answers) -> Error:
    """Dense attention, and what the kept blocks lack of it: a difference, as exact as what it is the difference of."""
    dense = _fp8(args, got[:1], want[:1])
    size = float(want[0].double().norm())
    return _worst(dense, Error(float((got[1].double() - want[1].double()).norm()) / size, 2 * dense.allowed))


def _beside(got: Tensor, want: Tensor, least: float) -> float:
    """‖got − want‖ beside ‖want‖, or beside `least` where that is more."""
    got, want = got.double(), want.double()
    return float((got - want).norm()) / (max(float(want.norm()), least) or 1.0)


def _differing(args: tuple[Any, ...], got: Answers, want: Answers) -> Error:
    """Sums of squares of a difference: beside themselves, where it is noticed."""
    least = NOTICED**2 * float(args[0].double().square().sum())
    allowed = 2 * TENSOR_FLOAT if args[0].device.type == "cuda" else DIFFERENCES  # a square is off by twice as much
    return _worst(*(Error(_beside(g, w, least), allowed) for g, w in zip(got, want, strict=True)))


def _kept(args: tuple[Any, ...], got: Answers, want: Answers) -> Error:
    """Rows with their scales, beside what was lost; and left with its own, beside itself where it is noticed."""
    size = float(args[0].double().norm())
    allowed = INT8_STEP if got[0].dtype == torch.int8 else max(TENSOR_FLOAT, ROUNDING[got[0].dtype])

    def real(answer: Answers, at: int) -> Tensor:
        values = answer[at].double().transpose(1, 2)
        return values * answer[at + 1].double()[..., None] if answer[at + 1].numel() else values

    dense, left = ((real(got, at), real(want, at)) for at in (0, 2))
    return _worst(Error(_beside(*dense, size), allowed), Error(_beside(*left, NOTICED * size), allowed))


def _packed(args: tuple[Any, ...], got: Answers, want: Answers) -> Error:
    """In the order of pack_heads.Packed."""
    sums = [Error(relative(got[i], want[i]), ROUNDING[torch.float32]) for i in (1, 3, 5, 6, 7)]
    sums += [Error(relative(got[i], want[i]), CANCELLED) for i in (8, 9)]
    whole = [_flips(got[i], want[i], FLIPS) for i in (0, 2)]
    return _worst(*sums, *whole, _near(got[4], want[4]))


def _in_order(kept: Tensor, counts: Tensor, blocks: int) -> bool:
    """Whether these are lists of blocks, each ascending."""
    if bool((counts < 0).any()) or bool((counts > kept.shape[3]).any()):
        return False
    listed = torch.arange(kept.shape[3], device=kept.device) < counts[..., None]
    outside = ((kept < 0) | (kept >= blocks)) & listed
    return not bool(outside.any()) and not bool(((kept.diff(dim=3) <= 0) & listed[..., 1:]).any())


def _chosen(scores: Tensor, forced: Tensor | None, got: Answers, want: Answers) -> Error:
    """Lists of blocks: as many, in order, and what they score together is what the reference's do."""
    (kept, counts), (want_kept, want_counts) = got, want
    if not torch.equal(counts, want_counts) or not _in_order(kept, counts, scores.shape[3]):
        return Error(math.inf, NEAR)
    listed = torch.arange(kept.shape[3], device=kept.device) < counts[..., None]
    largest = scores.abs().max().clamp(min=1e-30)
    if forced is not None:
        scores = scores.masked_fill(forced, 10 * float(largest))
    sums = [(scores.gather(3, lists.long()) * listed).sum(dim=3) for lists in (kept, want_kept)]
    return Error(float((sums[0] - sums[1]).abs().max() / largest), NEAR)


def _held(args: tuple[Any, ...], got: Answers, want: Answers) -> Error:
    """Lists of blocks that hold a mass, in the order of blocks_by_mass: every row by what it holds.

    A row may have another block than the reference's that holds as much, or one block more or fewer where the shorter
    list holds the mass itself. What is always kept is in both.
    """
    q_means, k_means, mass, _, _, forced, whole, q_alike, k_alike, alike = args
    (kept, counts), (want_kept, want_counts) = got, want
    scores = (q_means @ k_means.mT * q_means.shape[3] ** -0.5).double()  # of the product that both have chosen by
    if not _in_order(kept, counts, scores.shape[3]):
        return Error(math.inf, NEAR)
    ours, theirs = (key_mask(*lists, scores.shape[3]) for lists in ((kept, counts), (want_kept, want_counts)))
    apart, always = torch.zeros_like(ours), torch.zeros_like(ours)
    if k_alike is not None:
        apart |= (k_alike < alike)[:, :, None]
        always |= apart | (q_alike < alike)[..., None]
    if forced is not None:
        always |= forced
    if whole is not None:
        always |= whole[:, None]
    fewer = (counts - want_counts).abs()
    if bool(((ours != theirs) & always).any()) or int(fewer.max()) > 1:
        return Error(math.inf, NEAR)
    shares = scores.masked_fill(apart, -math.inf).softmax(dim=3).nan_to_num()  # where all are apart, all are kept
    held, wanted = ((shares * mask).sum(dim=3) for mask in (ours, theirs))
    off = torch.where(fewer == 0, (held - wanted).abs(), (torch.minimum(held, wanted) - mass).abs())
    return Error(float(off.max()), NEAR)


def _mapped(args: tuple[Any, ...], got: Answers, want: Answers) -> Error:
    return _chosen(args[0].double() @ args[1].double().mT, args[3], got, want)


JUDGES: dict[str, Judge] = {  # every op of _versions.OPS
    "attention_blocks": _floats(ATTENDED),
    "attention_fp8": _fp8,
    "attention_fp8_lse": _with_mass,
    "attention_fp8_refresh": _refreshed,
    "blocks_by_mass": _held,
    "choose_blocks": _mapped,
    "gelu_quantize": _rounded(),
    "hadamard": _floats(),
    "hadamard_quantize": _rounded(_turned_short),
    "linear_fp8": _multiplied_fp8,
    "linear_fp8_into": _multiplied_fp8,
    "linear_packed": _floats(),
    "linear_packed_into": _floats(),
    "linear_w8a8": _floats(),
    "linear_w8a8_into": _floats(),
    "map_answer": _floats(),
    "map_pass": _floats(ROUNDING | {torch.float32: PLACED}),
    "norm_modulate": _floats(),
    "norm_quantize": _rounded(),
    "pack_heads": _packed,
    "pool_blocks": _floats(),
    "quantize_heads": _rounded(),
    "quantize_rows": _rounded(),
    "residual_differences": _differing,
    "residual_entry": _kept,
    "unpack": _same,
}


# The pieces


def pieces(needs: Needs, device: torch.device | str) -> Iterator[Piece]:
    """Its layers and its attention, on this device."""
    device = torch.device(device)
    for layer in distinct(needs.layers):
        yield Piece(_named(layer), partial(_multiply, layer, needs.dtype, device))
    for size in sorted(set(needs.head_sizes)):
        tried = [small(needs), *(large(needs, _at_once(size, device)) if device.type == "cuda" else ())]
        yield Piece(f"attention of heads of {size}", partial(_attend, tried, needs.dtype, size, device))


def _at_once(size: int, device: torch.device) -> int:
    """How many tiles of attention a GPU has under way, at least: where a program has several, all of them."""
    own = attention_fp8_sm90.tiles_at_once(size) if _cuda.is_hopper(device) else 1
    return own * _triton.processors(device)


def layers_of(manifest: Manifest) -> list[Layer]:
    records = manifest.layers.values()
    return [Layer(one.spec(), one.in_features, one.out_features, one.bias) for one in records]


def plan_of(manifest: Manifest) -> AttentionPlan:
    return AttentionPlan() if manifest.attention is None else manifest.attention.plan()


def distinct(layers: Iterable[Layer]) -> list[Layer]:
    """Those that no two kernels would treat alike, with as few outputs as will do."""
    few = (replace(one, outputs=_few(one.outputs)) for one in layers)
    return list(dict.fromkeys(few))


def _few(outputs: int) -> int:
    """As many, or fewer, and a multiple of 16 or of 8 as before, or none as before."""
    if outputs <= OUTPUTS:
        return outputs
    return OUTPUTS if outputs % 16 == 0 else OUTPUTS - 8 if outputs % 8 == 0 else OUTPUTS - 3


def _named(layer: Layer) -> str:
    return f"a layer of {layer.inputs} inputs in {layer.spec.format}"


def quantized(layer: Layer, device: torch.device, dtype: torch.dtype) -> QuantLinear:
    """One like it, of random weights."""
    top, shape = layer.spec.format.weight_top, (layer.outputs, layer.inputs)
    if layer.spec.format.weight_dtype == E4M3:
        whole = (torch.randn(shape, device=device) * top / 4).clamp(-top, top).to(E4M3)
    else:
        whole = torch.randint(-int(top), int(top) + 1, shape, dtype=torch.int8, device=device)
    scale = (torch.rand(layer.outputs, device=device) + 0.5).to(torch.bfloat16) / top
    factor = (torch.rand(layer.inputs, device=device) + 0.5).to(torch.bfloat16) if layer.spec.scaled else None
    signs = None
    if layer.spec.rotation:
        signs = torch.randint(0, 2, (layer.inputs,), dtype=torch.int8, device=device) * 2 - 1
    bias = torch.randn(layer.outputs, device=device, dtype=dtype) if layer.bias else None
    return QuantLinear.of(whole, scale, layer.spec, bias, factor, signs)


def uneven(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random, and one channel in 64 is 30 times as large, as real activations have some."""
    x = torch.randn(*shape, device=device)
    x[..., ::64] *= 30
    return x.to(dtype)


def _multiply(layer: Layer, dtype: torch.dtype, device: torch.device) -> None:
    made = quantized(layer, device, dtype)
    for rows in ROWS:
        made(uneven(rows, layer.inputs, device=device, dtype=dtype))
        made(torch.randn(rows, layer.inputs, device=device, dtype=dtype))  # even: whole numbers are large, as are sums


def calls(plan: AttentionPlan, layout: TokenLayout) -> list[AttentionCall]:
    """One layer that is not always dense at every step, and one that is, at the last."""
    free = max(plan.dense_layers, default=-1) + 1
    every = [AttentionCall(free, step, STEPS, layout) for step in range(STEPS)]
    return every + [AttentionCall(layer, STEPS - 1, STEPS, layout) for layer in plan.dense_layers[:1]]


def heads(
    size: int, tried: Tried, device: torch.device, dtype: torch.dtype
) -> Callable[[int], tuple[Tensor, Tensor, Tensor]]:
    """q, k and v of a step, as a fused projection leaves them, with outlier channels.

    Keys have a part in common, and neighbours: blocks of tokens that have nothing in common are all kept, by a policy
    that looks at it. Where a residual is kept, values go on the same way from step to step, and both stray a little: so
    what sparse attention loses changes, and is in part foretold.
    """
    tokens, batch = tried.layout.tokens, tried.batch
    still = torch.randn(batch, tokens, 3, HEADS, size, device=device)
    runs = torch.randn(batch, -(-tokens // NEIGHBOURS), 3, HEADS, size, device=device)
    still += runs.repeat_interleave(NEIGHBOURS, dim=1)[:, :tokens]
    still[..., ::64] *= 10
    still[:, :, 1] += 3 * torch.randn(size, device=device)
    way = MOVES * still[:, :, 2].flip(1)

    def at(step: int) -> tuple[Tensor, Tensor, Tensor]:
        if tried.plan.residual is None:
            return _parted(still, dtype)
        x = still.clone()
        x[:, :, 1:] += STRAYS * torch.randn_like(x[:, :, 1:])
        x[:, :, 2] += step * way
        return _parted(x, dtype)

    return at


def _parted(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = x.to(dtype).permute(2, 0, 3, 1, 4)
    return q, k, v


class Tried(NamedTuple):
    """What attention is tried in: a generation of STEPS steps."""

    plan: AttentionPlan
    layout: TokenLayout
    batch: int = 1


def small(needs: Needs) -> Tried:
    """The plan for HEADS heads; one sparse step behind every refresh, so that a third one meets a trend."""
    plan = needs.plan
    if isinstance(plan.policy, Bands):
        table = tuple((letters * HEADS)[:HEADS] for letters in plan.policy.table)
        plan = replace(plan, policy=replace(plan.policy, table=table))
    if plan.residual is not None:
        plan = replace(plan, residual=replace(plan.residual, interval=1))
    return Tried(plan, needs.layout)


def large(needs: Needs, at_once: int) -> list[Tried]:
    """More tiles than run at once, each over MANY_BLOCKS key blocks or more: over half of all, and over all of them."""
    plan, layout = small(needs)[:2]
    rows = 2 * MANY_BLOCKS
    batch = at_once // (HEADS * rows) + 1
    layout = replace(layout, frames=-(-rows * PACKED_BLOCK // layout.frame_tokens))
    if isinstance(plan.policy, Dense):
        return [Tried(plan, layout, batch)] if plan.dense_qk_bits == 8 else []
    plan = replace(plan, warmup=0.0, dense_layers=())
    half, every = replace(plan, policy=Nth(plan.policy, 2)), replace(plan, policy=Nth(plan.policy, 1), residual=None)
    return [Tried(one, layout, batch) for one in (half, every)]


@dataclass(frozen=True)
class Nth:
    """A policy that keeps every n-th block, in the first order of another one."""

    policy: Policy
    n: int

    @property
    def block(self) -> int:
        return self.policy.block

    def orders(self, layout: TokenLayout, block: int) -> Tensor | None:
        orders = self.policy.orders(layout, block)
        return None if orders is None else orders[:1]

    def blocks(self, seen: Seen, call: AttentionCall, ways: Tensor | None) -> Blocks:
        keys = -(-call.layout.tokens // seen.block)
        rows = torch.arange(keys, dtype=torch.int32, device=seen.device)
        kept = rows[: keys // self.n] * self.n + (rows % self.n)[:, None]
        counts = torch.full((*seen.heads, keys), keys // self.n, dtype=torch.int32, device=seen.device)
        return Blocks(kept.expand(*seen.heads, -1, -1), counts, seen.block, seen.block, keys)


def _attend(tried: Iterable[Tried], dtype: torch.dtype, size: int, device: torch.device) -> None:
    for one in tried:
        state = AttentionState(one.plan)
        state.start(STEPS)
        drawn = heads(size, one, device, dtype)
        for call in calls(one.plan, one.layout):
            state.at(call.step)
            attend(*drawn(call.step), layer=call.layer, layout=one.layout, state=state)
