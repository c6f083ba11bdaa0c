"""The one call that a family's attention processors make: dense or sparse, by the plan, the layer and the step."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from quant_runtime.kernels._cpu import cpu_has_bfloat16, cpu_int8_path
from quant_runtime.kernels._fp8 import has_fp8
from quant_runtime.kernels._versions import OPS, fallen
from quant_runtime.kernels.attention_blocks import attention_blocks
from quant_runtime.kernels.attention_fp8 import (
    attention_fp8,
    attention_fp8_refresh,
    by_tokens,
    takes,
    unpacked_residual,
    unpacked_values,
)
from quant_runtime.kernels.linear_fp8 import linear_fp8
from quant_runtime.kernels.linear_packed import linear_packed
from quant_runtime.kernels.linear_w8a8 import linear_w8a8
from quant_runtime.kernels.pack_heads import Packed, in_places, pack_heads
from quant_runtime.kernels.quantize_heads import key_center, quantize_heads
from quant_runtime.residual import Key, Place, Residual, ResidualCache, ResidualUse, used
from quant_runtime.sparsity.base import (
    LAYOUTS,
    AttentionCall,
    Blocks,
    Choosing,
    Look,
    PackedBlocks,
    Policy,
    Seen,
    TokenLayout,
    every_block,
)
from quant_runtime.sparsity.dense import Dense

QkBits = Literal[8, 16]
DENSE_BLOCK = 64  # the block of dense attention in int8
PACKED_BLOCK = 128  # the block of queries and of keys where P V is in FP8


@dataclass(frozen=True)
class AttentionPlan:
    """How a model's self-attention runs. q and k have 16 bits, as they come, or 8: keys centred, then rounded.

    With `pv_bits` 8 the values, and what multiplies them, are FP8 (e4m3) wherever q and k have 8 bits, and blocks are
    128 tokens whatever the policy says.

    With a `residual` what sparse attention loses is cached at refreshes and added in the steps between. A refresh runs
    dense, with q, k and v of sparse calls: what it keeps is of one and the same rounded operands.
    """

    policy: Policy = field(default_factory=Dense)
    warmup: float = 0.0  # the fraction of steps, from the first, that run dense; at least one step if it is not 0
    dense_layers: tuple[int, ...] = ()  # that run dense in every step
    qk_bits: QkBits = 8  # of sparse calls
    dense_qk_bits: QkBits = 16  # of dense calls; 16 is torch's own scaled_dot_product_attention
    pv_bits: QkBits = 16
    residual: Residual | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a fraction of the steps, 0 to 1; got {self.warmup}")
        for name in ("qk_bits", "dense_qk_bits", "pv_bits"):
            if getattr(self, name) not in (8, 16):
                raise ValueError(f"{name} is 8 or 16; got {name}={getattr(self, name)}")
        if self.residual is not None and isinstance(self.policy, Dense):
            raise ValueError(
                "a residual is what sparse attention loses, and dense attention loses nothing: leave it out"
            )

    def warm(self, steps: int) -> int:
        """How many of `steps`, from the first, run dense."""
        return max(round(self.warmup * steps), 1) if self.warmup else 0  # a tenth of four steps is one of them

    def dense_step(self, step: int, steps: int) -> bool:
        """By the schedule: of refreshes the last step too, behind which nothing is sparse."""
        warm = self.warm(steps)
        return step < warm or (self.residual is not None and self.residual.due(step, warm))

    def is_dense(self, call: AttentionCall) -> bool:
        return call.refresh or self.dense_step(call.step, call.steps) or call.layer in self.dense_layers

    def packed(self, call: AttentionCall, size: int, device: torch.device) -> bool:
        """Whether q, k and v of this call, heads of `size`, go as pack_heads makes them: in 8 bits."""
        dense = (self.is_dense(call) and not call.refresh) or isinstance(self.policy, Dense)
        bits = self.dense_qk_bits if dense else self.qk_bits
        return self.pv_bits == 8 and bits == 8 and takes(size) and has_fp8(device)


@dataclass(frozen=True)
class Density:
    """The kept fraction of key blocks, always-kept tokens included; 1 is dense."""

    effective: float  # mean over all steps, dense ones included
    sparse: float | None  # mean over the calls that were not dense; None if all were
    networks: Mapping[str, float] = field(default_factory=dict)  # the effective one of each, where several take turns
    packed: float = 0.0  # the fraction of calls with values in FP8
    residual: ResidualUse | None = None  # what was cached of what sparse calls lose


@dataclass(frozen=True)
class Made:
    """A call that was made."""

    layer: int
    step: int
    density: Tensor  # a scalar on the call's device: not read back until it is asked for
    sparse: bool
    packed: bool


_places = itertools.count()


class AttentionState:
    """What the attention calls of one loaded model share: its plan, the step it is at, and what was kept so far.

    A generator calls `start` before its first step and `at` before every step. Not thread-safe, like the generator it
    belongs to.
    """

    def __init__(self, plan: AttentionPlan) -> None:
        self.plan = plan
        self.votes: dict[int, list[Tensor]] | None = None  # layer → the ways its heads chose, where they are counted
        self._turn = _Turn()
        self.start(steps=1)

    def start(self, steps: int, place: Place | None = None) -> None:
        """A new generation of this many steps: the record begins anew, at step 0, and nothing is cached or chosen.

        `place` is where the residual goes, where the plan leaves that open or not.
        """
        if steps < 1:
            raise ValueError(f"a generation has at least one step; got {steps}")
        self.steps = steps
        self.made: list[Made] = []
        self.cache = None if self.plan.residual is None else ResidualCache(self.plan.residual, place)
        self._frozen: dict[Key, PackedBlocks | None] = {}  # what the last refresh has chosen to keep
        self._place = next(_places)  # another one whenever what a sparse pass reads of what is kept lies elsewhere
        self._turn.holder = None
        self._ways: dict[tuple[int, int], Tensor] = {}  # layer and branch → what its heads chose
        self.at(0)

    def at(self, step: int) -> None:
        if not 0 <= step < self.steps:
            raise ValueError(f"this generation has steps 0 to {self.steps - 1}; got {step}")
        self.step = step
        self._branches: dict[int, int] = {}  # layer → calls in this step so far
        self._refreshes = self.cache is not None and self._is_refresh(self.cache)

    def _is_refresh(self, cache: ResidualCache) -> bool:
        """By the schedule; and where nothing is cached, as when a network has its first turn amid a generation."""
        its, warm = cache.residual, self.plan.warm(self.steps)
        missing = cache.empty and self.step >= warm and not its.due(self.step, warm)
        return missing or its.refreshes(self.step, warm, self.steps)

    def finish(self) -> None:
        """Behind the last step: nothing stays cached. The record is still there to be asked."""
        self._frozen = {}
        self._place = next(_places)
        if self.cache is not None:
            self.cache.clear()

    def record(self, call: AttentionCall, blocks: Blocks | None, packed: bool = False) -> None:
        """That the call is made: the next one of its layer in this step is of the next branch."""
        density = torch.ones(()) if blocks is None else blocks.density()
        self._note(Made(call.layer, self.step, density, blocks is not None, packed))

    def phase(self) -> Hashable | None:
        """Alike for passes whose calls run alike: dense or sparse, with a residual the same pass of a step.

        None where a pass changes what is kept, or reads it elsewhere each time; and for the few dense ones that a plan
        with a residual has beside its refreshes.
        """
        plan = self.plan
        if self._refreshes or isinstance(plan.policy, Choosing) or self.votes is not None:
            return None
        dense = plan.dense_step(self.step, self.steps)
        if self.cache is None:
            return "dense" if dense else "as the plan has it"
        return None if dense or self.cache.place == "host" else ("sparse", *sorted(self._branches.items()))

    def place(self) -> Hashable:
        """Alike as long as passes of one phase read what was kept where they did."""
        return None if self.cache is None else self._place

    def kept(self) -> list[Tensor]:
        """What sparse passes read of what refreshes write."""
        frozen = [tensor for one in self._frozen.values() if one is not None for tensor in (one.bits, one.counts)]
        return frozen if self.cache is None else [*frozen, *self.cache.read()]

    def mark(self) -> tuple[int, dict[int, int]]:
        return len(self.made), dict(self._branches)

    def back_to(self, mark: tuple[int, dict[int, int]]) -> list[Made]:
        """Calls made since that mark were not made after all."""
        count, branches = mark
        self._branches = dict(branches)
        gone, self.made = self.made[count:], self.made[:count]
        return gone

    def on_to(self, calls: Sequence[Made]) -> None:
        """Calls that were taken back were made."""
        for one in calls:
            self._note(one)

    def made_again(self, calls: Sequence[Made]) -> None:
        """That the same calls are made in this step, whoever makes them; each density is what its tensor is now."""
        here = [one.density for one in calls if one.sparse]
        now = iter(torch.stack(here)) if here else iter(())
        for one in calls:
            self._note(replace(one, step=self.step, density=next(now) if one.sparse else one.density))

    def _note(self, made: Made) -> None:
        self._branches[made.layer] = self._branches.get(made.layer, 0) + 1
        self.made.append(made)

    def call(self, layer: int, layout: TokenLayout) -> AttentionCall:
        refresh = self._refreshes and layer not in self.plan.dense_layers
        return AttentionCall(layer, self.step, self.steps, layout, self._branches.get(layer, 0), refresh)

    def ways(self, look: Look, call: AttentionCall) -> Tensor | None:
        """The way of each head, of a policy that has several: chosen in the first call, and again at refreshes.

        Where votes are counted, every call chooses.
        """
        policy, key = self.plan.policy, (call.layer, call.branch)
        if not isinstance(policy, Choosing):
            return None
        if key not in self._ways or call.refresh or self.votes is not None:
            self._ways[key] = policy.choose(look, call)
            if self.votes is not None:
                self.votes.setdefault(call.layer, []).append(self._ways[key])
        return self._ways[key]

    def lose(self, call: AttentionCall, dense: Tensor, lost: Tensor) -> None:
        """What a refresh of this call answers, and what its blocks lack of that: float [B, H, N, D]."""
        assert self.cache is not None
        self._turn.taken_by(self)
        if self.cache.keep((call.layer, call.branch), call.step, dense, lost):
            self._place = next(_places)

    def residual(self, call: AttentionCall) -> tuple[Tensor, Tensor | None] | tuple[None, None]:
        """What is to be added to this call's sparse answer, and its scale, as attention_fp8 takes them."""
        if self.cache is None:
            return None, None
        return self.cache.cached((call.layer, call.branch))

    def chosen(self, call: AttentionCall, choose: Callable[[], Blocks | None]) -> Blocks | None:
        """What this call keeps: what its refresh has chosen, where the plan's residual freezes that."""
        if self.plan.residual is None or not self.plan.residual.freeze:
            return choose()
        key = (call.layer, call.branch)
        if not call.refresh and key in self._frozen:
            frozen = self._frozen[key]
            return None if frozen is None else frozen.blocks()
        blocks = choose()
        new, before = None if blocks is None else PackedBlocks.of(blocks), self._frozen.get(key)
        if new is None or before is None or not before.take(new):
            if key not in self._frozen or new is not before:
                self._place = next(_places)
            self._frozen[key] = new
        return blocks

    def density(self) -> Density:
        """Of the calls since `start`. Refused before the first of them."""
        return replace(_density(self.made), residual=used([self.cache]))


class _Turn:
    """Of networks that take turns one at a time holds a cache."""

    def __init__(self) -> None:
        self.holder: AttentionState | None = None

    def taken_by(self, state: AttentionState) -> None:
        if self.holder is not None and self.holder is not state:
            self.holder.finish()
        self.holder = state


class SharedState(AttentionState):
    """The states of networks that take turns in one generation, as one: what it is told they are told.

    A step belongs to the networks that made calls in it. What each of them keeps is in its own state.
    """

    def __init__(self, states: Mapping[str, AttentionState]) -> None:
        self.states = states
        super().__init__(next(iter(states.values())).plan)
        for state in states.values():
            state._turn = self._turn

    def start(self, steps: int, place: Place | None = None) -> None:
        super().start(steps, place)
        for state in self.states.values():
            state.start(steps, place)

    def at(self, step: int) -> None:
        super().at(step)
        for state in self.states.values():
            state.at(step)

    def finish(self) -> None:
        for state in self.states.values():
            state.finish()

    def density(self) -> Density:
        """Over all of them. A network that had no turn is not among `networks`."""
        whole = _density([made for state in self.states.values() for made in state.made])
        own = {name: state.density().effective for name, state in self.states.items() if state.made}
        return replace(whole, networks=own, residual=used([state.cache for state in self.states.values()]))


def _density(made: Sequence[Made]) -> Density:
    if not made:
        raise ValueError("no attention call has been made since the generation started")
    steps: dict[int, list[Tensor]] = {}
    for one in made:
        steps.setdefault(one.step, []).append(one.density)
    means, sparse = [_mean(calls) for calls in steps.values()], [one.density for one in made if one.sparse]
    share = sum(one.packed for one in made) / len(made)
    return Density(sum(means) / len(means), _mean(sparse) if sparse else None, packed=share)


def _mean(densities: list[Tensor]) -> float:
    return float(torch.stack([density.cpu().double() for density in densities]).mean())


def attend(q: Tensor, k: Tensor, v: Tensor, *, layer: int, layout: TokenLayout, state: AttentionState) -> Tensor:
    """Self-attention of q, k and v, float [B, H, N, D], as the plan has it for this layer and this step.

    The answer is [B, H, N, D] in v's dtype; in memory [B, N, H, D] where the call was sparse. Refuses N other than the
    layout's. For int8 q and k, float32 values go as bfloat16 where this device multiplies that faster.
    """
    if q.shape[2] != layout.tokens or k.shape[2] != layout.tokens:
        raise ValueError(f"{layout} has {layout.tokens} tokens; got q and k with {q.shape[2]} and {k.shape[2]}")
    call, plan = state.call(layer, layout), state.plan
    if plan.packed(call, q.shape[3], q.device):
        return attend_packed(q, k, v, call, state)
    dense = plan.is_dense(call)
    tokens = None
    blocks = None
    if call.refresh or not dense:
        ways = state.ways(_Floats(q, k, v, plan.policy.block), call)
        tokens = _tokens(plan.policy, layout, plan.policy.block, ways, q)
        if tokens is not None:
            q, k, v = (in_places(x, tokens) for x in (q, k, v))
        seen = Seen.of(q, k, plan.policy.block)
        blocks = state.chosen(call, functools.partial(plan.policy.blocks, seen, call, ways))
    state.record(call, None if dense else blocks)

    if call.refresh:
        out, sparse = _dense_and_sparse(q, k, v, blocks, plan.qk_bits)
        lost = (out.float() - sparse.float()).to(out.dtype)
        out, lost = by_tokens(out, tokens), by_tokens(lost, tokens)
        state.lose(call, out, lost)
        return out
    if blocks is None and plan.dense_qk_bits == 16:
        out = F.scaled_dot_product_attention(q, k, v)
    elif blocks is None:
        out = _over_blocks(q, k, v, [every_block(q, k, DENSE_BLOCK)], plan.dense_qk_bits)[0]
    else:
        out = _over_blocks(q, k, v, [blocks], plan.qk_bits)[0]
    out = by_tokens(out, tokens)
    residual, scale = (None, None) if dense else state.residual(call)
    if residual is None or blocks is None:  # everything is kept: nothing is lost
        return out
    return (out.float() + unpacked_residual(residual, scale)).to(out.dtype)


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: AttentionCall,
    state: AttentionState,
    pack: Callable[..., Packed] = pack_heads,
) -> Tensor:
    """The same of q, k and v as pack_heads takes them, where the plan has them `packed`: [B, H, N, D] in v's dtype.

    `pack` is pack_heads with the norms and the angles that q and k have yet to go through.
    """
    policy, dense = state.plan.policy, state.plan.is_dense(call)
    if call.refresh or not dense:
        ways = state.ways(_PackedHeads(q, k, v, pack), call)
        tokens = _tokens(policy, call.layout, PACKED_BLOCK, ways, q)
        packed = pack(q, k, v, PACKED_BLOCK, tokens=tokens)
        blocks = state.chosen(call, functools.partial(policy.blocks, _seen(packed), call, ways))
    else:
        tokens, packed, blocks = None, pack(q, k, v, PACKED_BLOCK), None
    state.record(call, None if dense else blocks, packed=True)
    residual, scale = (None, None) if dense else state.residual(call)
    if blocks is None:  # everything is kept: nothing is lost
        blocks, residual, scale = every_block(packed.q, packed.q, PACKED_BLOCK), None, None
    kept = blocks.all_listed() if call.refresh else blocks.kept
    operands = (packed.q, packed.k, packed.v, packed.q_scale, packed.k_scale, packed.v_scale, kept, blocks.counts)
    rest = (packed.q.shape[2], blocks.block_q, blocks.block_k, v.dtype)
    if call.refresh:
        out, lost = attention_fp8_refresh(*operands, *rest, tokens=tokens)
        state.lose(call, out, lost)
        return out
    return attention_fp8(*operands, *rest, tokens=tokens, residual=residual, residual_scale=scale)


def _seen(packed: Packed) -> Seen:
    heads, device = (packed.q.shape[0], packed.q.shape[1]), packed.q.device
    means, alike = (packed.q_means, packed.k_means), (packed.q_alike, packed.k_alike)
    return Seen(heads, device, PACKED_BLOCK, lambda: means, lambda: alike)


def _tokens(policy: Policy, layout: TokenLayout, block: int, ways: Tensor | None, q: Tensor) -> Tensor | None:
    """int32 [B, H, N]: which token lies at each place; None for the order they have."""
    orders = _orders(policy, layout, block, q.device)
    if orders is None:
        return None
    return orders[0].expand(q.shape[:3]) if ways is None else orders[ways]


@functools.lru_cache(maxsize=LAYOUTS)
def _orders(policy: Policy, layout: TokenLayout, block: int, device: torch.device) -> Tensor | None:
    orders = policy.orders(layout, block)
    return None if orders is None else orders.to(device, torch.int32)


class _Floats:
    """A Look at queries, keys and values [B, H, N, D]."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, block: int) -> None:
        self.q, self.k, self.v, self.block = q, k, v, block
        self.heads, self.device = (q.shape[0], q.shape[1]), q.device

    def head(self, h: int, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q[:, h].index_select(1, queries).float(), self.k[:, h].float(), self.v[:, h].float()


class _PackedHeads:
    """A Look at what is yet to be packed: packed once in the order that the tokens have, if it is looked at."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, pack: Callable[..., Packed]) -> None:
        self._packed = functools.cache(lambda: pack(q, k, v, PACKED_BLOCK))
        self.heads, self.device, self.block = (q.shape[0], q.shape[1]), q.device, PACKED_BLOCK

    def head(self, h: int, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        its = self._packed()
        tokens = its.q.shape[2]
        q = its.q[:, h].index_select(1, queries) * its.q_scale[:, h].index_select(1, queries)[..., None]
        k = (its.k[:, h].unflatten(1, (-1, PACKED_BLOCK)) * its.k_scale[:, h, :, None, None]).flatten(1, 2)
        return q, k[:, :tokens], unpacked_values(its.v[:, h, None], its.v_scale[:, h, None], tokens)[:, 0]


def _dense_and_sparse(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks | None, qk_bits: QkBits) -> tuple[Tensor, Tensor]:
    """Of the same operands, rounded once. The sparse one is the dense one where no blocks are named."""
    if qk_bits == 16:
        dense = F.scaled_dot_product_attention(q, k, v)
        return dense, dense if blocks is None else _over_blocks(q, k, v, [blocks], qk_bits)[0]
    lists = [every_block(q, k, DENSE_BLOCK)] + ([] if blocks is None else [blocks])
    both = _over_blocks(q, k, v, lists, qk_bits)
    return both[0], both[-1]


def _over_blocks(q: Tensor, k: Tensor, v: Tensor, lists: Sequence[Blocks], qk_bits: QkBits) -> list[Tensor]:
    """One answer for each of the lists."""
    blocks = [(its.kept, its.counts, its.block_q, its.block_k) for its in lists]
    if qk_bits == 16:
        return [attention_blocks(q, k, v, *its) for its in blocks]
    whole_q, q_scale = quantize_heads(q)
    whole_k, k_scale = quantize_heads(k, key_center(k))
    values = v.to(_value_dtype(v))
    return [attention_blocks(whole_q, whole_k, values, *its, q_scale, k_scale).to(v.dtype) for its in blocks]


def _value_dtype(v: Tensor) -> torch.dtype:
    """float32 values take the 16-bit matrix units where there are some; 16-bit values stay what they are."""
    wide = v.dtype == torch.float32
    return torch.bfloat16 if wide and (v.device.type != "cpu" or cpu_has_bfloat16()) else v.dtype


def describe_paths(device: torch.device | str) -> dict[str, str]:
    """Which arithmetic runs on this device, in words, for logs, reports and /artifacts.

    An op that runs by another version than its own, because the self-test has found that one wrong, stands there under
    its own name, with the reason.
    """
    device = torch.device(device)
    linear, fp8 = _run_by(device, linear_w8a8, linear_packed), _run_by(device, linear_fp8)
    if device.type != "cpu":
        present = has_fp8(device)
        values = "16-bit or FP8 PV" if present else "16-bit PV: this GPU has no FP8"
        sparse = _run_by(device, attention_blocks, *([attention_fp8] if present else []))
        lacks = "" if present else ": this GPU has no FP8"
        said = {
            "linear": f"int8, {linear}; FP8 as {fp8}{lacks}",
            "attention": f"int8 QK, {values}, {sparse}; 16-bit dense, torch",
        }
    else:
        why = "" if cpu_int8_path() == "onednn" else ": this CPU has no fast, exact int8 matmul"
        values = "bfloat16 PV" if cpu_has_bfloat16() else "float32 PV: this CPU does not multiply bfloat16 itself"
        sparse = _run_by(device, attention_blocks, attention_fp8)
        said = {
            "linear": f"int8, {linear}{why}; FP8 as {fp8} products",
            "attention": f"QK int8, {sparse}{why}; {values}; 16-bit dense, torch",
        }
    falls = fallen(device).items()
    return said | {name: f"{fall.version}, not {OPS[name].versions(device)[0]}: {fall.why}" for name, fall in falls}


def _run_by(device: torch.device, *ops: Callable[..., Tensor]) -> str:
    """An op has the name of the function that calls it."""
    return " and ".join(dict.fromkeys(str(OPS[op.__name__].running(device)) for op in ops))
