import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

from models.wan import WanModel
from models.wan_blocks import Block, pack_blocks
from quant_runtime.attention import AttentionPlan, AttentionState
from quant_runtime.formats import QuantFormat
from quant_runtime.linear import QuantLinear, fuse
from quant_runtime.methods import METHODS
from quant_runtime.sparsity.base import TokenLayout
from quant_runtime.sparsity.topk import TopK
from tests.support import relative_error

SAME = 1e-6
FLIPPED = 2e-3  # where an entry falls to the other side of a half: of some draws one does, and 1e-3 is the most seen
DRAWS = 4
PLANS = [AttentionPlan(dense_qk_bits=8, pv_bits=8), AttentionPlan(TopK(0.5), pv_bits=8)]


class Model:
    """What a processor asks of its model."""

    projected, projections = WanModel.projected, WanModel.projections
    layout = TokenLayout(2, 8, 9)


def network(method="rtn", picture=False):
    torch.manual_seed(0)
    made = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=96, num_layers=3, image_dim=24 if picture else None, added_kv_proj_dim=64 if picture else None,
    )  # fmt: skip
    for weight in made.parameters():
        if weight.dim() == 1:
            weight.data += 0.1 * torch.randn_like(weight)
    for name, layer in list(made.named_modules()):
        if name.startswith("blocks.") and isinstance(layer, nn.Linear):
            made.set_submodule(name, METHODS[method]().quantize(layer, None, QuantFormat.parse("W8A8")))
    return made.eval().requires_grad_(False)


def inputs(picture=False):
    seen = {"encoder_hidden_states_image": torch.randn(2, 7, 24)} if picture else {}
    return seen | {
        "hidden_states": torch.randn(2, 4, 2, 16, 18),
        "timestep": torch.tensor([500, 300]),
        "encoder_hidden_states": torch.randn(2, 512, 16),
        "return_dict": False,
    }


def run(made, plan, given):
    state = AttentionState(plan)
    for layer, block in enumerate(made.blocks):
        block.attn1.set_processor(WanModel.processor(layer, Model(), state))
    with torch.inference_mode():
        return made(**given)[0]


def packed(method="rtn", picture=False):
    made = network(method, picture)
    for block in made.blocks:
        block.attn1.fused_qkv = fuse([block.attn1.to_q, block.attn1.to_k, block.attn1.to_v])
        del block.attn1.to_q, block.attn1.to_k, block.attn1.to_v
    pack_blocks(made)
    assert all(isinstance(block.forward, Block) for block in made.blocks)
    return made


@pytest.mark.parametrize("method", ["rtn", "quarot"])
@pytest.mark.parametrize("picture", [False, True])
def test_packed_blocks_answer_what_diffusers_blocks_answer(method, picture):
    draws = [inputs(picture) for _ in range(DRAWS)]
    for plan in PLANS:
        errors = []
        for given in draws:
            got, want = run(packed(method, picture), plan, given), run(network(method, picture), plan, given)
            errors.append(relative_error(got, want))
        assert min(errors) < SAME
        assert max(errors) < FLIPPED


def test_a_plan_with_16_bit_values_runs_diffusers_blocks_and_so_does_a_time_for_every_token():
    plan, given = AttentionPlan(), inputs()
    assert relative_error(run(packed(), plan, given), run(network(), plan, given)) < 1e-5
    given["timestep"] = torch.tensor([500, 300])[:, None].expand(2, 2 * 8 * 9)
    assert relative_error(run(packed(), PLANS[0], given), run(network(), PLANS[0], given)) < SAME


def test_a_block_behind_one_of_16_bits_is_handed_the_whole_sum():
    made = network()
    for block in made.blocks:
        block.attn1.fused_qkv = fuse([block.attn1.to_q, block.attn1.to_k, block.attn1.to_v])
    kept = made.blocks[1].ffn.net[2]
    made.blocks[1].ffn.net[2] = nn.Linear(kept.in_features, kept.out_features)
    made.blocks[1].ffn.net[2].weight.data = kept.effective_weight()
    made.blocks[1].ffn.net[2].bias = kept.bias
    pack_blocks(made)
    assert [isinstance(block.forward, Block) for block in made.blocks] == [True, False, True]
    assert isinstance(kept, QuantLinear)
    given = inputs()
    assert relative_error(run(made, PLANS[0], given), run(network(), PLANS[0], given)) < 0.02, (
        "one layer is not rounded"
    )


def test_a_pass_that_is_broken_off_leaves_nothing_to_the_next_and_none_keeps_tensors():
    made, given = packed(), inputs()
    want = run(made, PLANS[0], given)

    def broken(*_):
        raise InterruptedError

    last = made.blocks[-1].ffn.net[2]
    last.product = broken
    with pytest.raises(InterruptedError):
        run(made, PLANS[0], given)
    assert made.blocks[-1].forward.debts._rope is not None, "it was broken off within"
    del last.product
    assert torch.equal(run(made, PLANS[0], given), want)
    debts = made.blocks[-1].forward.debts
    assert debts._rope is None
    assert not debts._owed
