"""What sparse attention loses, kept from one dense step to the next: QuantSparse's SSAR (arXiv:2509.23681, 3.3).

At a *refresh* a layer's attention runs dense, and what its kept blocks lack of that, Delta = dense - sparse, is formed
of the same quantized q, k and v. The sparse steps behind it add what was cached to their answers (equations 14, 16):

    order 1    Delta at the last refresh, as DiTFastAttn (arXiv:2406.08552) caches it
    order 2    Delta + its best approximation of `rank`, head by head, of Delta - Delta at the refresh before

The approximation is the truncated SVD D V V^T of the difference D, float [tokens, head size]: V are the leading
eigenvectors of its Gram matrix D^T D. C = Delta + D V V^T is kept as it is added, and D V and V beside it, so that the
next refresh has Delta back as C - (D V) V^T without a second tensor of that size. It can also tell how far off each
order has come out by then: the first by D, the second by D less what was approximated of the difference before. Where
the second was not nearer, or none was there to be looked at, a call's cache is of the first order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from quant_runtime.in_place import taken
from quant_runtime.kernels.residual_passes import Before, residual_differences, residual_entry

Place = Literal["device", "host"]
Key = tuple[int, int]  # layer and branch: the n-th call of a layer within a step is branch n
AT_ONCE = 1 << 26  # floats of a tensor that a refresh works on at a time: some heads of one layer

ROUNDS = 8  # of power iteration; what 16 of 128 vectors leave out is then within a few percent of the least there is


@dataclass(frozen=True)
class Residual:
    """How what is lost is cached. `interval` sparse steps follow a refresh: of `interval` + 1 steps one is dense."""

    interval: int = 5
    order: Literal[1, 2] = 2
    rank: int = 16  # of the second order; that of the heads' size leaves nothing out
    bits: Literal[8, 16] = 8  # int8, a scale for each token and head; 16: as values come, 32 bits where those have 32
    place: Literal["device", "host", "auto"] = "device"  # host: pinned memory; auto: where the device has no room
    freeze: bool = (
        True  # sparse steps keep the blocks that the refresh has chosen: what others lose is not what was lost
    )

    def __post_init__(self) -> None:
        for name in ("interval", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"a residual's {name} is at least 1; got {getattr(self, name)}")
        for name, known in (("order", (1, 2)), ("bits", (8, 16)), ("place", ("device", "host", "auto"))):
            if getattr(self, name) not in known:
                told = ", ".join(map(str, known))
                raise ValueError(f"a residual's {name} is one of {told}; got {getattr(self, name)}")

    def words(self) -> str:
        order = "first order" if self.order == 1 else f"second order of rank {self.rank}"
        return f"refreshed after {self.interval} sparse steps, {order}, {self.bits} bits"

    def due(self, step: int, warm: int) -> bool:
        """Whether the step is a refresh of the schedule: the last of `warm` dense ones, or the first of all, and on."""
        return step >= _first(warm) and (step - _first(warm)) % (self.interval + 1) == 0

    def refreshes(self, step: int, warm: int, steps: int) -> bool:
        """Whether what it loses is kept: it is due, or one of two warm steps ahead of that; and sparse ones follow.

        It takes three to know a difference, and whether the one before it has told where it would go.
        """
        before = self.order == 2 and 0 < _first(warm) - step <= 2
        return (before or self.due(step, warm)) and max(step, _first(warm)) < steps - 1

    def bytes(self, tokens: int, heads: int, size: int, value_bytes: int, pinned: bool = False) -> int:
        """Of the cache of one layer's attention, for each sequence of its batch and each branch.

        Where it is `pinned`, torch rounds the bytes of each tensor up to a power of two.
        """
        rank = min(self.rank, size) if self.order == 2 else 0
        widths = [size, rank] if rank else [size]
        values = [tokens * width * (1 if self.bits == 8 else value_bytes) for width in widths]
        scales = [4 * tokens for _ in widths] if self.bits == 8 else []
        across = [4 * size * rank] if rank else []
        tensors = [heads * one for one in (*values, *scales, *across)]
        return sum(1 << (one - 1).bit_length() for one in tensors) if pinned else sum(tensors)


def _first(warm: int) -> int:
    return max(warm - 1, 0)


@dataclass(frozen=True)
class Refresh:
    """One step that was one: norms, relative to the dense answer's, over all its calls."""

    step: int
    lost: float  # of Delta
    first_error: float | None = None  # how far the first order of the refresh before is off by now; None without it
    second_error: float | None = None  # and the second; None where there was none, or the order is 1
    fell_back: int = 0  # calls of order 2 whose cache is of the first


@dataclass(frozen=True)
class ResidualUse:
    """What a generation's caches were."""

    refreshes: tuple[Refresh, ...]
    bytes: int  # at most, of all of them together
    place: Place


class ResidualCache:
    """What was lost in each layer and branch at the last refresh. `place` is where it lies on a GPU.

    On a CPU there is one memory, and `host` is the same as `device`.
    """

    def __init__(self, residual: Residual, place: Place | None = None) -> None:
        self.residual = residual
        self.place: Place = place or ("host" if residual.place == "host" else "device")
        self.bytes = 0  # at most, since it was made
        self._home: _Home | None = None
        self.norms: list[tuple[int, Tensor, int]] = []  # of each call of a refresh: step, as `refreshed`, errors known

    @property
    def empty(self) -> bool:
        return self._home is None

    def clear(self) -> None:
        """Holds no memory until the next refresh; what was counted stays."""
        self._home = None

    def read(self) -> list[Tensor]:
        """What `cached` answers from, of all calls."""
        return self._home.read() if isinstance(self._home, _OnDevice) else []

    def keep(self, key: Key, step: int, dense: Tensor, lost: Tensor) -> bool:
        """At a refresh: dense and lost, float [B, H, N, D]. Refuses a rank above D.

        Whether what `cached` answers for this call lies elsewhere now.
        """
        its = self.residual
        lost = lost.transpose(1, 2).contiguous().transpose(1, 2)  # torch's own attention lays its answers out otherwise
        if its.order == 2 and its.rank > lost.shape[3]:
            raise ValueError(f"a residual's rank is at most the heads' size, {lost.shape[3]}; got {its.rank}")
        if self._home is None:
            host = self.place == "host" and lost.device.type == "cuda"
            self._home = _OnHost(lost.device) if host else _OnDevice()
        before = self._home.all_of(key) if key in self._home else None
        if before is not None and before.dense.values.shape != lost.transpose(1, 2).shape:
            was = before.dense.values.transpose(1, 2).shape
            raise ValueError(f"layer {key[0]}, branch {key[1]} had attention {list(was)}; got {list(lost.shape)}")
        made, squares = refreshed(its, dense, lost, before)
        self.norms.append((step, squares, 0 if its.order == 1 or before is None else 1 if before.left is None else 2))
        moved = self._home.put(key, made)
        self.bytes = max(self.bytes, self._home.bytes)
        return moved

    def cached(self, key: Key) -> tuple[Tensor, Tensor | None]:
        """What the sparse answer of this call is to be given: [B, H, N, D], laid out as attention answers; its scale.

        With int8 a scale, float32 [B, H, N]; None with floats. To be read at once: the next call may reuse its memory.
        """
        if self._home is None or key not in self._home:
            raise RuntimeError(
                f"layer {key[0]}, branch {key[1]} has no residual: it made no such call when its network was refreshed"
            )
        rows = self._home.dense_of(key)
        return rows.values.transpose(1, 2), rows.scale


def used(caches: Sequence[ResidualCache | None]) -> ResidualUse | None:
    """By the caches of networks that took turns; None where there was none to keep. Reads the device."""
    own = [cache for cache in caches if cache is not None]
    if not own:
        return None
    steps: dict[int, list[tuple[Tensor, int]]] = {}
    for cache in own:
        for step, squares, known in cache.norms:
            steps.setdefault(step, []).append((squares, known))
    refreshes = []
    for step, calls in sorted(steps.items()):
        least = min(known for _, known in calls)  # of two networks that meet in a step one may have no errors yet
        delta, first, second, whole, fell_back = _sum([squares for squares, _ in calls])
        errors = (_ratio(first, whole) if least > 0 else None, _ratio(second, whole) if least > 1 else None)
        refreshes.append(Refresh(step, _ratio(delta, whole), *errors, int(fell_back)))
    return ResidualUse(tuple(refreshes), max(cache.bytes for cache in own), own[0].place)


def _ratio(square: float, other: float) -> float:
    return math.sqrt(square / other) if other else 0.0


def _sum(squares: Sequence[Tensor]) -> list[float]:
    found: list[float] = torch.stack([one.double().cpu() for one in squares]).sum(dim=0).tolist()
    return found


@dataclass(frozen=True)
class Rows:
    """[B, N, H, D] in memory, as floats or as int8 with a scale float32 [B, H, N]."""

    values: Tensor
    scale: Tensor | None

    @classmethod
    def like(cls, x: Tensor, width: int, bits: int) -> Rows:
        """To be filled: for x [B, H, N, ...], in its dtype or in int8."""
        batch, heads, tokens = x.shape[:3]
        dtype = torch.int8 if bits == 8 else x.dtype
        scale = torch.empty(batch, heads, tokens, device=x.device) if bits == 8 else None
        return cls(torch.empty(batch, tokens, heads, width, dtype=dtype, device=x.device), scale)

    def write(self, heads: slice, x: Tensor) -> None:
        """float32 [B, h, N, D], rounded: to the nearest of 255, the largest of each row the last of them."""
        into = self.values[:, :, heads].transpose(1, 2)
        if self.scale is None:
            into.copy_(x)
            return
        scale = x.abs().amax(dim=3).clamp_(min=torch.finfo(torch.float32).tiny * 127) / 127
        self.scale[:, heads] = scale
        into.copy_((x / scale[..., None]).round_())

    def tensors(self) -> list[Tensor]:
        return [self.values] if self.scale is None else [self.values, self.scale]

    def take(self, other: Rows) -> bool:
        """Whether they are what `other` is now, and where they were: those of other shapes or dtypes are left alone."""
        return taken(self.tensors(), other.tensors())


@dataclass(frozen=True)
class Entry:
    """The cache of one layer and branch."""

    dense: Rows  # C, as it is added
    left: Rows | None = None  # D V, [B, N, H, r]
    right: Tensor | None = None  # V, float32 [B, H, D, r]
    added: Tensor | None = None  # float32 []: 1 where D V V^T is in C, 0 where C is of the first order

    def parts(self) -> Before:
        left = None if self.left is None else (self.left.values, self.left.scale)
        return (self.dense.values, self.dense.scale), left, self.right, self.added


def refreshed(its: Residual, dense: Tensor, lost: Tensor, before: Entry | None) -> tuple[Entry, Tensor]:
    """The new cache; and float32 [5]: squared norms of Delta, of the errors of both orders before and of `dense`; and 1
    if it fell back.

    The differences are formed in each of two passes, for their Gram matrices and to be projected, and kept in neither.
    """
    squares = lost.new_zeros(5, dtype=torch.float32)
    squares[0] = torch.linalg.vector_norm(lost, dtype=torch.float32).square()
    squares[3] = torch.linalg.vector_norm(dense, dtype=torch.float32).square()
    if its.order == 1 or before is None:
        entry = Entry(Rows.like(lost, lost.shape[3], its.bits))
        for heads in _chunks(lost):
            entry.dense.write(heads, lost[:, heads].float())
        squares[4] = its.order == 2
        return entry, squares

    grams, found = residual_differences(lost, before.parts())
    squares[1], squares[2] = found.unbind()
    nearer = squares[2] < squares[1] if before.left is not None else torch.zeros_like(squares[1])
    added = nearer.float()  # on the device alone
    squares[4] = 1 - added
    right = leading(grams, its.rank)
    dense_rows, left = residual_entry(lost, before.parts(), right, added, its.bits)
    return Entry(Rows(*dense_rows), Rows(*left), right, added), squares


def leading(grams: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the `rank` largest eigenvalues of float32 [..., D, D], symmetric: [..., D, rank].

    torch solves matrices above 32 one after another on a GPU, each in milliseconds: there they are iterated to, and a
    matrix of 2 * rank is solved at the end, which is above 32 for a rank above 16. It waits for the GPU.
    """
    size = grams.shape[-1]
    if grams.device.type == "cpu" or size <= 32 or size < 2 * rank:
        vectors: Tensor = torch.linalg.eigh(grams.double()).eigenvectors  # in float32 it gives up on few directions
        return vectors[..., -rank:].float()
    return leading_by_iteration(grams, rank)


def leading_by_iteration(grams: Tensor, rank: int) -> Tensor:
    """The same by ROUNDS of block power iteration on twice as many vectors, and the eigenvectors of what they span.

    Of neighbouring eigenvalues that are almost one it may mix the vectors: with either the approximation is as good.
    """
    wide = grams.double()
    basis = _start(grams.shape[-1], 2 * rank, grams.device)
    for _ in range(ROUNDS):
        basis = _orthonormal(wide @ basis)
    basis = _orthonormal(basis)
    vectors: Tensor = torch.linalg.eigh(basis.mT @ wide @ basis).eigenvectors
    return (basis @ vectors[..., -rank:]).float()


@functools.lru_cache(maxsize=8)
def _start(size: int, width: int, device: torch.device) -> Tensor:
    """float64 [size, width], the same in every program."""
    return torch.randn(size, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)


def _orthonormal(x: Tensor) -> Tensor:
    """A basis of what the columns of float64 [..., D, r] span, without reading back; next to nothing of none."""
    inner = x.mT @ x
    least = 1e-14 * inner.diagonal(dim1=-2, dim2=-1).sum(dim=-1, keepdim=True) + torch.finfo(torch.float64).tiny
    lower, _ = torch.linalg.cholesky_ex(inner + torch.diag_embed(least.expand(inner.shape[:-1])))
    solved: Tensor = torch.linalg.solve_triangular(lower, x.mT, upper=False)
    return solved.mT


def _chunks(x: Tensor) -> list[slice]:
    """Of the heads of x [B, H, N, D]: so many that AT_ONCE numbers hold them, and at least one."""
    batch, heads, tokens, size = x.shape
    some = max(1, AT_ONCE // (batch * tokens * size))
    return [slice(start, min(start + some, heads)) for start in range(0, heads, some)]


class _Home(Protocol):
    """Where entries lie."""

    bytes: int

    def __contains__(self, key: Key) -> bool: ...

    def put(self, key: Key, entry: Entry) -> bool:
        """Whether `dense` lies elsewhere now than what this call had."""
        ...

    def all_of(self, key: Key) -> Entry: ...

    def dense_of(self, key: Key) -> Rows: ...


class _OnDevice:
    def __init__(self) -> None:
        self._held: dict[Key, Entry] = {}
        self.bytes = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._held

    def put(self, key: Key, entry: Entry) -> bool:
        """What steps read stays where it is, for recordings of them (quant_runtime/graphs.py)."""
        held = self._held.get(key)
        stays = held is not None and held.dense.take(entry.dense)
        self._held[key] = replace(entry, dense=held.dense) if held is not None and stays else entry
        self.bytes = sum(_bytes(one) for one in self._held.values())
        return not stays

    def read(self) -> list[Tensor]:
        return [tensor for entry in self._held.values() for tensor in entry.dense.tensors()]

    def all_of(self, key: Key) -> Entry:
        return self._held[key]

    def dense_of(self, key: Key) -> Rows:
        return self._held[key].dense


def _bytes(entry: Entry) -> int:
    return sum(tensor.nbytes for tensor in _tensors(entry))


def _tensors(entry: Entry) -> list[Tensor]:
    tensors = entry.dense.tensors()
    if entry.left is not None and entry.right is not None:
        tensors += [*entry.left.tensors(), entry.right]
    return tensors


class _Slot:
    """Memory on the device that one entry's `dense` is brought to."""

    def __init__(self) -> None:
        self.rows: Rows | None = None
        self.ready = torch.cuda.Event()
        self.key: Key | None = None


class _OnHost:
    """In pinned memory. While a call runs, what the next one adds is brought to the device on a stream of its own.

    Two slots take turns: the copy into one waits for all that was launched before the other was asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._held: dict[Key, Entry] = {}
        self._slots = (_Slot(), _Slot())
        self._put: torch.cuda.Event | None = None
        self.bytes = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._held

    def put(self, key: Key, entry: Entry) -> bool:
        if self._put is not None:
            self._put.synchronize()  # one entry is on its way at a time: more of them would fill the device
        held = self._held.get(key)
        if held is None or (held.left is None) != (entry.left is None):
            self._held[key] = held = _pinned(entry)
            self.bytes = sum(_bytes(one) for one in self._held.values())
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for ours, theirs in zip(_tensors(held), _tensors(entry), strict=True):
                ours.copy_(theirs, non_blocking=True)
                theirs.record_stream(self._stream)
            self._put = self._stream.record_event()
        self._held[key] = replace(held, added=entry.added)  # one number, which stays on the device
        for slot in self._slots:
            slot.key = None  # what was brought before is not this
        return True

    def all_of(self, key: Key) -> Entry:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        held = self._held[key]
        left = None if held.left is None else _moved(held.left, self._device)
        right = None if held.right is None else held.right.to(self._device, non_blocking=True)
        return Entry(_moved(held.dense, self._device), left, right, held.added)

    def dense_of(self, key: Key) -> Rows:
        now = torch.cuda.current_stream(self._device)
        mine = next((slot for slot in self._slots if slot.key == key), self._slots[0])
        other = self._slots[1] if mine is self._slots[0] else self._slots[0]
        rows = self._bring(key, mine, now)
        self._bring(self._following(key), other, now)
        now.wait_event(mine.ready)
        return rows

    def _following(self, key: Key) -> Key:
        """In the order in which they were put first, which is that of a step's calls; behind the last, the first."""
        keys = list(self._held)
        return keys[(keys.index(key) + 1) % len(keys)]

    def _bring(self, key: Key, slot: _Slot, now: torch.cuda.Stream) -> Rows:
        dense = self._held[key].dense
        if slot.rows is None or slot.rows.values.shape != dense.values.shape:
            slot.rows, slot.key = _empty(dense, self._device), None
        if slot.key != key:
            self._stream.wait_stream(now)  # whoever read the slot before
            with torch.cuda.stream(self._stream):
                for ours, theirs in zip(slot.rows.tensors(), dense.tensors(), strict=True):
                    ours.copy_(theirs, non_blocking=True)
                    ours.record_stream(self._stream)
                slot.ready.record(self._stream)
            slot.key = key
        return slot.rows


def _pinned(entry: Entry) -> Entry:
    left = None if entry.left is None else _empty(entry.left, torch.device("cpu"))
    right = None if entry.right is None else torch.empty(entry.right.shape, pin_memory=True)
    return Entry(_empty(entry.dense, torch.device("cpu")), left, right)


def _empty(rows: Rows, device: torch.device) -> Rows:
    """As large; pinned on a CPU."""
    pinned = device.type == "cpu"
    made = [torch.empty(x.shape, dtype=x.dtype, device=device, pin_memory=pinned) for x in rows.tensors()]
    return Rows(made[0], made[1] if len(made) > 1 else None)


def _moved(rows: Rows, device: torch.device) -> Rows:
    moved = [x.to(device, non_blocking=True) for x in rows.tensors()]
    return Rows(moved[0], moved[1] if len(moved) > 1 else None)
