import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from quant_runtime.attention import AttentionPlan, AttentionState, SharedState, attend, describe_paths
from quant_runtime.kernels._cpu import cpu_int8_path
from quant_runtime.sparsity.base import AttentionCall, TokenLayout
from quant_runtime.sparsity.dense import Dense
from quant_runtime.sparsity.topk import TopK
from tests.support import relative_error

FP32_ROUNDING = 1e-6
INT8_AND_BF16 = 0.02  # q and k in 8 bits, values in bfloat16, on inputs of size one; measured: 0.010
FP8_VALUES = 0.06  # and values, with what multiplies them, in e4m3; measured: 0.036
CPU = torch.device("cpu")
VIDEO = TokenLayout(5, 6, 9)  # 270 tokens, no block is filled evenly
VIEWS = TokenLayout(4, 7, 7, special=5)


def qkv(layout, device, heads=2, size=32, dtype=torch.float32):
    """As a processor has them: views of [B, N, H, D]."""
    return (torch.randn(2, layout.tokens, heads, size, device=device, dtype=dtype).transpose(1, 2) for _ in range(3))


@pytest.mark.parametrize("layout", [VIDEO, VIEWS])
def test_a_density_of_one_is_dense_attention(layout, device):
    q, k, v = qkv(layout, device)
    want = scaled_dot_product_attention(q, k, v)
    for policy, bits, error in ((Dense(), 8, 1e-9), (TopK(1.0), 16, FP32_ROUNDING), (TopK(1.0), 8, INT8_AND_BF16)):
        state = AttentionState(AttentionPlan(policy, qk_bits=bits))
        assert relative_error(attend(q, k, v, layer=0, layout=layout, state=state), want) <= error
        assert state.density().effective == 1.0


def test_dense_calls_run_in_8_bits_where_the_plan_says_so(device):
    q, k, v = qkv(VIDEO, device)
    state = AttentionState(AttentionPlan(dense_qk_bits=8))
    error = relative_error(attend(q, k, v, layer=0, layout=VIDEO, state=state), scaled_dot_product_attention(q, k, v))
    assert 1e-4 < error < INT8_AND_BF16
    assert state.density().sparse is None


@pytest.mark.parametrize("plan", [AttentionPlan(dense_qk_bits=8, pv_bits=8), AttentionPlan(TopK(1.0), pv_bits=8)])
def test_values_go_in_8_bits_where_the_plan_says_so(plan, device):
    q, k, v = qkv(VIDEO, device)
    state = AttentionState(plan)
    error = relative_error(attend(q, k, v, layer=0, layout=VIDEO, state=state), scaled_dot_product_attention(q, k, v))
    assert INT8_AND_BF16 < error < FP8_VALUES
    assert (state.density().effective, state.density().packed) == (1.0, 1.0)


def test_values_of_8_bits_go_with_queries_and_keys_of_8_and_with_tokens_in_the_order_they_have():
    call = AttentionCall(0, 1, 10, VIDEO)
    assert not AttentionPlan(pv_bits=8).packed(call, 128, CPU), "dense, in 16 bits"
    assert AttentionPlan(dense_qk_bits=8, pv_bits=8).packed(call, 128, CPU)
    assert AttentionPlan(TopK(), pv_bits=8).packed(call, 128, CPU)
    assert not AttentionPlan(TopK(), pv_bits=8, warmup=0.2).packed(call, 128, CPU), "a dense step, in 16 bits"
    assert not AttentionPlan(TopK(), qk_bits=16, pv_bits=8).packed(call, 128, CPU)
    assert not AttentionPlan(TopK()).packed(call, 128, CPU)
    assert not AttentionPlan(TopK(), pv_bits=8).packed(call, 16, CPU), "no kernel has heads of 16"
    assert not AttentionPlan(TopK(), pv_bits=8).packed(AttentionCall(0, 1, 10, VIEWS), 128, CPU), (
        "special tokens go first"
    )


def test_a_sparse_call_of_8_bits_keeps_the_density_of_blocks_of_128(device):
    layout = TokenLayout(5, 16, 16)  # ten blocks
    q, k, v = qkv(layout, device)
    state = AttentionState(AttentionPlan(TopK(0.3, block=16), pv_bits=8))
    out = attend(q, k, v, layer=0, layout=layout, state=state)
    assert state.density().effective == pytest.approx(0.3)
    assert out.isfinite().all()


def test_special_tokens_get_their_dense_answer_and_all_tokens_their_place(device):
    q, k, v = qkv(VIEWS, device)
    state = AttentionState(AttentionPlan(TopK(0.3, block=16), qk_bits=16))
    out, want = attend(q, k, v, layer=0, layout=VIEWS, state=state), scaled_dot_product_attention(q, k, v)
    error = (out - want).norm(dim=-1) / want.norm(dim=-1)  # of each token
    special = torch.arange(VIEWS.tokens, device=device) % VIEWS.frame_tokens < VIEWS.special
    assert error[:, :, special].max() < 1e-5
    assert error[:, :, ~special].mean() > 0.1, "the others see a third of the keys"
    alike = torch.nn.functional.cosine_similarity(out, want, dim=-1)
    assert alike.mean() > 0.5, "and their answers stand where they belong"


@pytest.mark.parametrize("text_first", [False, True])
def test_text_gets_its_dense_answer(text_first, device):
    layout = TokenLayout(5, 6, 9, text=21, text_first=text_first)
    q, k, v = qkv(layout, device)
    state = AttentionState(AttentionPlan(TopK(0.3, block=16), qk_bits=16))
    out, want = attend(q, k, v, layer=0, layout=layout, state=state), scaled_dot_product_attention(q, k, v)
    error = (out - want).norm(dim=-1) / want.norm(dim=-1)
    place = torch.arange(layout.tokens, device=device)
    is_text = place < 21 if text_first else place >= 270
    text, video = error[:, :, is_text], error[:, :, ~is_text]
    assert text.max() < 1e-5
    assert video.mean() > 0.1, "the others see a third of the keys"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 16])
def test_the_answer_has_the_dtype_of_the_values(dtype, bits, device):
    if dtype == torch.bfloat16 and device != "cpu":
        pytest.skip("covered by the kernel's own test")
    q, k, v = qkv(VIDEO, device, dtype=dtype)
    out = attend(q, k, v, layer=0, layout=VIDEO, state=AttentionState(AttentionPlan(TopK(0.5), qk_bits=bits)))
    assert (out.dtype, out.shape) == (dtype, v.shape)


@pytest.mark.parametrize(
    ("plan", "dense"),
    [
        (AttentionPlan(TopK(), warmup=0.0), []),
        (AttentionPlan(TopK(), warmup=0.01), [(0, 0), (0, 1)]),
        (AttentionPlan(TopK(), warmup=0.2), [(0, 0), (0, 1), (1, 0), (1, 1)]),
        (AttentionPlan(TopK(), warmup=0.1, dense_layers=(1,)), [(0, 0)] + [(step, 1) for step in range(10)]),
        (AttentionPlan(TopK(), warmup=1.0), [(step, layer) for step in range(10) for layer in range(2)]),
    ],
)
def test_the_first_steps_and_the_named_layers_run_dense(plan, dense):
    calls = [AttentionCall(layer, step, 10, VIDEO) for step in range(10) for layer in range(2)]
    assert [(call.step, call.layer) for call in calls if plan.is_dense(call)] == sorted(dense)


def test_the_effective_density_counts_dense_steps(device):
    q, k, v = qkv(VIDEO, device)
    state = AttentionState(AttentionPlan(TopK(0.4), warmup=0.25))
    state.start(steps=4)
    for step in range(4):
        state.at(step)
        for layer in range(3):
            attend(q, k, v, layer=layer, layout=VIDEO, state=state)
    found = state.density()
    assert found.sparse == pytest.approx(2 / 5), "2 of 5 blocks"
    assert found.effective == pytest.approx((1 + 3 * 2 / 5) / 4)
    state.start(steps=2)
    with pytest.raises(ValueError, match="no attention call"):
        state.density()


def test_networks_that_take_turns_have_a_density_each_and_one_together(device):
    q, k, v = qkv(VIDEO, device)
    plan = AttentionPlan(TopK(0.4), warmup=0.25)
    states = {name: AttentionState(plan) for name in ("first", "second", "idle")}
    together = SharedState(states)
    together.start(steps=4)
    for step in range(4):
        together.at(step)
        attend(q, k, v, layer=0, layout=VIDEO, state=states["first" if step < 3 else "second"])
    found = together.density()
    assert found.networks == {"first": pytest.approx((1 + 2 * 2 / 5) / 3), "second": pytest.approx(2 / 5)}
    assert found.effective == pytest.approx((1 + 3 * 2 / 5) / 4)
    assert found.sparse == pytest.approx(2 / 5)
    together.start(steps=2)
    with pytest.raises(ValueError, match="no attention call"):
        together.density()


def test_a_layout_of_other_tokens_is_refused(device):
    q, k, v = qkv(VIDEO, device)
    with pytest.raises(ValueError, match="has 216 tokens; got q and k with 270 and 270"):
        attend(q, k, v, layer=0, layout=VIEWS, state=AttentionState(AttentionPlan()))


@pytest.mark.parametrize(
    ("fields", "named"), [({"warmup": 1.5}, "got 1.5"), ({"qk_bits": 4}, "qk_bits=4"), ({"dense_qk_bits": 4}, "=4")]
)
def test_a_plan_out_of_range_is_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        AttentionPlan(**fields)


def test_a_step_out_of_range_is_refused():
    state = AttentionState(AttentionPlan())
    with pytest.raises(ValueError, match="at least one step; got 0"):
        state.start(0)
    with pytest.raises(ValueError, match="steps 0 to 0; got 1"):
        state.at(1)


def test_the_arithmetic_of_a_device_is_said_in_words():
    said = describe_paths("cpu")
    assert said.keys() == {"linear", "attention"}
    assert ("oneDNN" in said["linear"]) == (cpu_int8_path() == "onednn")
    assert "Triton" in describe_paths("cuda")["linear"]
