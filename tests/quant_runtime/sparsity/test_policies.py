"""What every policy does, on the float path and on the packed one."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from quant_runtime.attention import AttentionPlan, AttentionState, attend
from quant_runtime.kernels.attention_blocks import key_mask
from quant_runtime.kernels.pack_heads import _stride
from quant_runtime.sparsity import POLICIES
from quant_runtime.sparsity.bands import Bands
from quant_runtime.sparsity.base import AttentionCall, Seen, TokenLayout, blocks_with, first_frame, placeless
from quant_runtime.sparsity.tiles import Tiles
from quant_runtime.sparsity.topk import TopK
from quant_runtime.sparsity.topp import TopP
from tests.support import relative_error

FP32_ROUNDING = {"cpu": 1e-6, "cuda": 3e-6}  # two answers in float32; an H100's were 1.4e-6 apart at most
INT8_AND_BF16 = 0.02  # q and k in 8 bits, values in bfloat16, on inputs of size one
FP8_VALUES = 0.06  # and values, with what multiplies them, in e4m3
LAYOUTS = {
    "video": TokenLayout(5, 6, 9),  # 270 tokens, no block is filled evenly
    "views": TokenLayout(4, 7, 7, special=5),
    "text behind": TokenLayout(5, 6, 9, text=21),
    "text in front": TokenLayout(5, 6, 9, text=21, text_first=True),
    "larger": TokenLayout(9, 12, 20),
}
WHOLE = [TopK(1.0), TopP(1.0), Bands(1.0), Tiles(1.0), Tiles(window=(9, 99, 99))]
SPARSE = [
    TopK(0.3, block=16),
    TopP(0.5, 0.0, block=16),
    TopP(0.5, 0.2, block=16),
    Bands(0.3, block=16),
    Bands(0.3, block=16, first_frame=True),
    Bands(0.3, block=16, table=("st",)),
    Tiles(0.3, block=16),
    Tiles(block=16, window=(1, 2, 2)),
]


def name(policy):
    return str(policy).replace("(", " ").replace(")", "")


def qkv(layout, device, heads=2, size=32):
    return (torch.randn(2, layout.tokens, heads, size, device=device).transpose(1, 2) for _ in range(3))


def coherent(layout, device, heads=2, size=32):
    """The same, of which neighbours are alike in the first two thirds: means stand for them there, and not behind."""
    rough = [x.clone() for x in qkv(layout, device, heads, size)]
    for x in rough[:2]:
        shared = torch.randn(2, heads, -(-layout.tokens // 64), size, device=device).repeat_interleave(64, dim=2)
        x[:, :, : layout.tokens * 2 // 3] += 2 * shared[:, :, : layout.tokens * 2 // 3]
    return rough


def state(policy, **fields):
    return AttentionState(AttentionPlan(policy, **fields))


def order_of(policy, layout, block, way=0):
    orders = policy.orders(layout, block)
    return torch.arange(layout.tokens) if orders is None else orders[way]


def lists(policy, layout, device, ways=None, block=16):
    q, k, _ = coherent(layout, device)
    if ways is None and isinstance(policy, Bands):
        ways = torch.tensor([[0, 1], [1, 0]], device=device)
    return policy.blocks(Seen.of(q, k, block), AttentionCall(0, 0, 1, layout), ways), ways


def test_each_of_them_is_tested_here():
    assert (
        {type(policy) for policy in WHOLE}
        == {type(policy) for policy in SPARSE}
        == {*POLICIES.values()} - {POLICIES["dense"]}
    )


@pytest.mark.parametrize("policy", WHOLE, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_density_of_one_is_dense_attention(policy, layout, device):
    q, k, v = qkv(layout, device)
    want = scaled_dot_product_attention(q, k, v)
    for fields, error in (({"qk_bits": 16}, FP32_ROUNDING[device]), ({}, INT8_AND_BF16), ({"pv_bits": 8}, FP8_VALUES)):
        its = state(policy, **fields)
        assert relative_error(attend(q, k, v, layer=0, layout=layout, state=its), want) <= error
        assert its.density().effective == 1.0


@pytest.mark.parametrize("policy", SPARSE, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_its_lists_ascend_and_keep_what_is_always_kept(policy, layout, device):
    found, ways = lists(policy, layout, device)
    seen = key_mask(found.kept, found.counts, found.keys)
    listed = torch.arange(found.kept.shape[3], device=device) < found.counts[..., None]
    assert found.counts.min() >= 1
    assert ((found.kept.diff(dim=3) > 0) | ~listed[..., 1:]).all()
    assert torch.equal(seen.sum(dim=3), found.counts.long()), "none is listed twice"
    for b in range(2):
        for h in range(2):
            order = order_of(policy, layout, 16, 0 if ways is None else int(ways[b, h]))
            assert torch.equal(order.sort().values, torch.arange(layout.tokens)), "each token has one place"
            free = blocks_with(placeless(layout)[order], 16).to(device)
            assert seen[b, h][:, free].all(), "text and special tokens are seen by all"
            assert seen[b, h][free].all(), "and see all"
            if policy.first_frame:
                assert seen[b, h][:, blocks_with(first_frame(layout)[order], 16).to(device)].all()
            assert not seen[b, h].all()


@pytest.mark.parametrize("policy", SPARSE, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_runs_is_attention_over_the_tokens_of_the_kept_blocks(policy, layout, device):
    """Of tokens in the order that they come in, on which places and blocks leave no trace but what is seen."""
    q, k, v = coherent(layout, device)
    its = state(policy, qk_bits=16)
    got = attend(q, k, v, layer=0, layout=layout, state=its)
    ways = its._ways.get((0, 0))
    mask = torch.zeros(2, 2, layout.tokens, layout.tokens, dtype=torch.bool, device=device)
    for b in range(2):
        for h in range(2):
            order = order_of(policy, layout, 16, 0 if ways is None else int(ways[b, h])).to(device)
            placed = [x[b : b + 1, h : h + 1].index_select(2, order) for x in (q, k)]
            its_ways = None if ways is None else ways[b : b + 1, h : h + 1]
            found = policy.blocks(Seen.of(*placed, 16), AttentionCall(0, 0, 1, layout), its_ways)
            block_of = torch.empty_like(order).index_copy_(0, order, torch.arange(layout.tokens, device=device) // 16)
            seen = key_mask(found.kept, found.counts, found.keys)[0, 0]
            mask[b, h] = seen[block_of][:, block_of]
    want = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert relative_error(got, want) < FP32_ROUNDING[device]
    assert its.density().effective < 1


@pytest.mark.parametrize("policy", SPARSE, ids=name)
@pytest.mark.parametrize("layout", ["larger", "views", "text in front"])
def test_packed_it_answers_what_it_answers_of_floats(policy, layout, device):
    """Of the same blocks of 128: what their choice goes by is not rounded.

    Likenesses are of centred keys, and packing's centre is that of a sample of them: here the mean of all is the same.
    """
    layout = LAYOUTS[layout]
    q, k, v = coherent(layout, device)
    sample = k[:, :, :: _stride(layout.tokens)]
    sample -= (sample.mean(dim=2, keepdim=True) - k.mean(dim=2, keepdim=True)) / (1 - sample.shape[2] / layout.tokens)
    wide = POLICIES[next(n for n, kind in POLICIES.items() if type(policy) is kind)](
        **{field: getattr(policy, field) for field in policy.__dataclass_fields__} | {"block": 128}
    )
    packed, floats = state(policy, pv_bits=8), state(wide, qk_bits=16)
    got = attend(q, k, v, layer=0, layout=layout, state=packed)
    floats._ways = dict(packed._ways)  # of noise one way is as good as the other
    want = attend(q, k, v, layer=0, layout=layout, state=floats)
    assert packed.density().packed == 1.0
    assert packed.density().sparse == floats.density().sparse
    assert relative_error(got, want) < FP8_VALUES


class NothingIsReadBack(TorchDispatchMode):
    """Fails where a value would leave the device, or a shape depend on one: what a CUDA graph could not record."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique", "is_nonzero", "equal", "item")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        called = function._schema.name.removeprefix("aten::").split(".")[0]
        assert not called.startswith(self.READS), called
        assert not (called in ("index", "index_put_") and _by_mask(args[1])), "a mask's length is a value"
        assert not (called == "_to_copy" and (kwargs or {}).get("device")), "a copy from one device to another"
        return function(*args, **kwargs or {})


def _by_mask(indices):
    return any(index is not None and index.dtype == torch.bool for index in indices)


@pytest.mark.parametrize("policy", SPARSE, ids=name)
@pytest.mark.parametrize("pv_bits", [8, 16])
def test_a_call_reads_nothing_back_from_its_device(policy, pv_bits, device, monkeypatch):
    """But for the attention itself, whose CPU version groups rows by their counts."""
    layout = LAYOUTS["text behind"]
    q, k, v = qkv(layout, device)
    its = state(policy, pv_bits=pv_bits)
    attend(q, k, v, layer=0, layout=layout, state=its)  # what follows from the layout is made here
    its.start(1)
    answer = torch.empty(2, layout.tokens, 2, 32, device=device).transpose(1, 2)
    monkeypatch.setattr("quant_runtime.attention.attention_fp8", lambda *_, **__: answer)
    monkeypatch.setattr("quant_runtime.attention.attention_blocks", lambda *_, **__: answer)
    with NothingIsReadBack():
        attend(q, k, v, layer=0, layout=layout, state=its)


def test_that_would_be_seen():
    x = torch.ones(3)
    for reads in (lambda: x.sum().item(), lambda: x[x > 0], lambda: (x > 0).nonzero(), lambda: bool(x.any())):
        with pytest.raises(AssertionError), NothingIsReadBack():
            reads()
