"""The one call that a family's attention processors make: dense or sparse, by the plan, the layer and the step."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from quant_runtime.kernels._cpu import cpu_has_bfloat16, cpu_int8_path
from quant_runtime.kernels.attention_blocks import attention_blocks
from quant_runtime.kernels.attention_fp8 import attention_fp8, has_fp8, takes
from quant_runtime.kernels.pack_heads import Packed, pack_heads
from quant_runtime.kernels.quantize_heads import key_center, quantize_heads
from quant_runtime.sparsity.base import LAYOUTS, AttentionCall, Blocks, Policy, TokenLayout, every_block
from quant_runtime.sparsity.dense import Dense

QkBits = Literal[8, 16]
DENSE_BLOCK = 64  # the block of dense attention in int8
PACKED_BLOCK = 128  # the block of queries and of keys where P V is in FP8


@dataclass(frozen=True)
class AttentionPlan:
    """How a model's self-attention runs. q and k have 16 bits, as they come, or 8: keys centred, then rounded.

    With `pv_bits` 8 the values, and what multiplies them, are FP8 (e4m3) wherever q and k have 8 bits, and blocks are
    128 tokens whatever the policy says.
    """

    policy: Policy = field(default_factory=Dense)
    warmup: float = 0.0  # the fraction of steps, from the first, that run dense; at least one step if it is not 0
    dense_layers: tuple[int, ...] = ()  # that run dense in every step
    qk_bits: QkBits = 8  # of sparse calls
    dense_qk_bits: QkBits = 16  # of dense calls; 16 is torch's own scaled_dot_product_attention
    pv_bits: QkBits = 16

    def __post_init__(self) -> None:
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a fraction of the steps, 0 to 1; got {self.warmup}")
        for name in ("qk_bits", "dense_qk_bits", "pv_bits"):
            if getattr(self, name) not in (8, 16):
                raise ValueError(f"{name} is 8 or 16; got {name}={getattr(self, name)}")

    def is_dense(self, call: AttentionCall) -> bool:
        warm = max(round(self.warmup * call.steps), 1) if self.warmup else 0  # a tenth of four steps is one of them
        return call.step < warm or call.layer in self.dense_layers

    def packed(self, call: AttentionCall, size: int, device: torch.device) -> bool:
        """Whether q, k and v of this call, heads of `size`, go as pack_heads makes them: in 8 bits, in their order."""
        dense = self.is_dense(call) or isinstance(self.policy, Dense)
        bits = self.dense_qk_bits if dense else self.qk_bits
        fits = takes(size) and has_fp8(device) and (dense or self.policy.order(call.layout) is None)
        return self.pv_bits == 8 and bits == 8 and fits


@dataclass(frozen=True)
class Density:
    """The kept fraction of key blocks, always-kept tokens included; 1 is dense."""

    effective: float  # mean over all steps, dense ones included
    sparse: float | None  # mean over the calls that were not dense; None if all were
    networks: Mapping[str, float] = field(default_factory=dict)  # the effective one of each, where several take turns
    packed: float = 0.0  # the fraction of calls with values in FP8


class AttentionState:
    """What the attention calls of one loaded model share: its plan, the step it is at, and what was kept so far.

    A generator calls `start` before its first step and `at` before every step. Not thread-safe, like the generator it
    belongs to.
    """

    def __init__(self, plan: AttentionPlan) -> None:
        self.plan = plan
        self.start(steps=1)

    def start(self, steps: int) -> None:
        """A new generation of this many steps: the record begins anew, at step 0."""
        if steps < 1:
            raise ValueError(f"a generation has at least one step; got {steps}")
        self.steps, self.step = steps, 0
        self._kept: dict[int, list[Tensor]] = {}  # step → the density of each call, on the device until asked for
        self._sparse: list[Tensor] = []
        self._packed = 0  # calls

    def at(self, step: int) -> None:
        if not 0 <= step < self.steps:
            raise ValueError(f"this generation has steps 0 to {self.steps - 1}; got {step}")
        self.step = step

    def record(self, blocks: Blocks | None, packed: bool = False) -> None:
        self._packed += packed
        density = torch.ones(()) if blocks is None else blocks.density()
        self._kept.setdefault(self.step, []).append(density)
        if blocks is not None:
            self._sparse.append(density)

    def call(self, layer: int, layout: TokenLayout) -> AttentionCall:
        return AttentionCall(layer, self.step, self.steps, layout)

    def density(self) -> Density:
        """Of the calls since `start`. Refused before the first of them."""
        return _density(self._kept, self._sparse, self._packed)


class SharedState(AttentionState):
    """The states of networks that take turns in one generation, as one: what it is told they are told.

    A step belongs to the networks that made calls in it. What each of them keeps is in its own state.
    """

    def __init__(self, states: Mapping[str, AttentionState]) -> None:
        self.states = states
        super().__init__(next(iter(states.values())).plan)

    def start(self, steps: int) -> None:
        super().start(steps)
        for state in self.states.values():
            state.start(steps)

    def at(self, step: int) -> None:
        super().at(step)
        for state in self.states.values():
            state.at(step)

    def density(self) -> Density:
        """Over all of them. A network that had no turn is not among `networks`."""
        kept: dict[int, list[Tensor]] = {}
        for state in self.states.values():
            for step, calls in state._kept.items():
                kept[step] = [*kept.get(step, []), *calls]
        sparse = [density for state in self.states.values() for density in state._sparse]
        whole = _density(kept, sparse, sum(state._packed for state in self.states.values()))
        own = {name: state.density().effective for name, state in self.states.items() if state._kept}
        return replace(whole, networks=own)


def _density(kept: Mapping[int, list[Tensor]], sparse: list[Tensor], packed: int) -> Density:
    if not kept:
        raise ValueError("no attention call has been made since the generation started")
    steps = [_mean(calls) for calls in kept.values()]
    share = packed / sum(len(calls) for calls in kept.values())
    return Density(sum(steps) / len(steps), _mean(sparse) if sparse else None, packed=share)


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
        return attend_packed(pack_heads(q, k, v, PACKED_BLOCK), call, state, v.dtype)
    order = None
    blocks = None
    if not plan.is_dense(call):
        order = _order(plan.policy, layout, q.device)
        if order is not None:
            q, k, v = (x.index_select(2, order) for x in (q, k, v))
        blocks = plan.policy.blocks(q, k, call)
    state.record(blocks)

    if blocks is None and plan.dense_qk_bits == 16:
        out = F.scaled_dot_product_attention(q, k, v)
    elif blocks is None:
        out = _over_blocks(q, k, v, every_block(q, k, DENSE_BLOCK), plan.dense_qk_bits)
    else:
        out = _over_blocks(q, k, v, blocks, plan.qk_bits)
    return out if order is None else torch.empty_like(out).index_copy_(2, order, out)


def attend_packed(packed: Packed, call: AttentionCall, state: AttentionState, out_dtype: torch.dtype) -> Tensor:
    """The same of operands that pack_heads has made in blocks of PACKED_BLOCK, where the plan has them `packed`."""
    blocks = None
    if not state.plan.is_dense(call):
        blocks = state.plan.policy.blocks_by_means(packed.q_means, packed.k_means, call, PACKED_BLOCK)
    state.record(blocks, packed=True)
    if blocks is None:
        blocks = every_block(packed.q, packed.q, PACKED_BLOCK)
    operands = (packed.q, packed.k, packed.v, packed.q_scale, packed.k_scale, packed.v_scale)
    return attention_fp8(
        *operands, blocks.kept, blocks.counts, packed.q.shape[2], blocks.block_q, blocks.block_k, out_dtype
    )


@functools.lru_cache(maxsize=LAYOUTS)
def _order(policy: Policy, layout: TokenLayout, device: torch.device) -> Tensor | None:
    order = policy.order(layout)
    return None if order is None else order.to(device)


def _over_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, qk_bits: QkBits) -> Tensor:
    lists = (blocks.kept, blocks.counts, blocks.block_q, blocks.block_k)
    if qk_bits == 16:
        return attention_blocks(q, k, v, *lists)
    whole_q, q_scale = quantize_heads(q)
    whole_k, k_scale = quantize_heads(k, key_center(k))
    values = v.to(_value_dtype(v))
    return attention_blocks(whole_q, whole_k, values, *lists, q_scale, k_scale).to(v.dtype)


def _value_dtype(v: Tensor) -> torch.dtype:
    """float32 values take the 16-bit matrix units where there are some; 16-bit values stay what they are."""
    wide = v.dtype == torch.float32
    return torch.bfloat16 if wide and (v.device.type != "cpu" or cpu_has_bfloat16()) else v.dtype


def describe_paths(device: torch.device | str) -> dict[str, str]:
    """Which arithmetic runs on this device, in words, for logs, reports and /artifacts."""
    if torch.device(device).type != "cpu":
        present = not torch.cuda.is_available() or has_fp8(torch.device(device))
        values = "16-bit or FP8 PV" if present else "16-bit PV: this GPU has no FP8"
        return {"linear": "int8, Triton", "attention": f"int8 QK, {values}, Triton; 16-bit dense, torch"}
    products = {
        "onednn": "int8, oneDNN",
        "float32": "int8 as float32 products: this CPU has no fast, exact int8 matmul",
    }[cpu_int8_path()]
    values = "bfloat16 PV" if cpu_has_bfloat16() else "float32 PV: this CPU does not multiply bfloat16 itself"
    return {"linear": products, "attention": f"QK {products}; {values}; 16-bit dense, torch"}
