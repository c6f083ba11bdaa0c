import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import nn

from models.cogvideox import CogVideoXModel, Serving
from models.cogvideox_blocks import Block
from quant_runtime.attention import AttentionPlan
from quant_runtime.formats import QuantFormat
from quant_runtime.methods import METHODS
from quant_runtime.sparsity.topk import TopK
from tests.support import relative_error

FLOAT32 = 1e-6  # the same sums in another order
FLIPS = 2e-3  # here and there an entry falls to the other side of a half, and attention hands it on to every token
FP8_VALUES = 0.02  # what P and V in FP8 do to the whole network
ONE_LAYER = 0.02  # what rounding the inputs of one layer does
PACKED = AttentionPlan(dense_qk_bits=8, pv_bits=8)
PLANS = [PACKED, AttentionPlan(TopK(0.5), pv_bits=8)]
TEXT = 26  # tokens, fewer than a block of 128


def network(rotary=True, layers=3):
    torch.manual_seed(0)
    made = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, time_embed_dim=16,
        text_embed_dim=16, num_layers=layers, sample_width=18, sample_height=16, sample_frames=17,
        max_text_seq_length=TEXT, use_rotary_positional_embeddings=rotary,
    )  # fmt: skip
    for weight in made.parameters():
        if weight.dim() == 1:
            weight.data += 0.1 * torch.randn_like(weight)
    return made.eval().requires_grad_(False)


def inputs(batch=2, rotary=True):
    angles = torch.rand(5 * 8 * 9, 32).repeat_interleave(2, dim=1)
    return {
        "hidden_states": torch.randn(batch, 5, 4, 16, 18),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "timestep": torch.tensor([500, 300][:batch]),
        "image_rotary_emb": (angles.cos(), angles.sin()) if rotary else None,
        "return_dict": False,
    }


def model(method="rtn", rotary=True, layers=3, kept=()):
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae", "scheduler"))
    made = CogVideoXModel(CogVideoXPipeline(**parts, transformer=network(rotary, layers)), Serving(), "cpu")
    for name in made.layers():
        if name not in kept:
            layer = made.network.get_submodule(name)
            made.network.set_submodule(name, METHODS[method]().quantize(layer, None, QuantFormat.parse("W8A8")))
    return made


def packed(*args, **kwargs):
    made = model(*args, **kwargs)
    made.fuse_projections()
    return made


def run(made, plan, given):
    made.attend(plan)
    with torch.inference_mode():
        return made.network(**given)[0]


def are_packed(made):
    return [isinstance(block.forward, Block) for block in made.network.transformer_blocks]


@pytest.mark.parametrize(("method", "batch", "rotary"), [("rtn", 2, True), ("quarot", 1, True), ("rtn", 2, False)])
def test_packed_blocks_answer_what_diffusers_blocks_answer(method, batch, rotary):
    """5B turns queries and keys, 2B adds sines to its tokens."""
    given = inputs(batch, rotary)
    for plan in PLANS:
        stock, made = model(method, rotary), packed(method, rotary)
        assert are_packed(made) == [True] * 3
        assert relative_error(run(made, plan, given), run(stock, plan, given)) < FLIPS
        assert made.attention.density() == stock.attention.density()


def test_of_one_packed_block_most_tokens_are_exactly_those():
    given = inputs()
    for plan in PLANS:
        answers = []
        for made in (packed(layers=1), model(layers=1)):
            hook = made.network.transformer_blocks[0].register_forward_hook(
                lambda *call, answers=answers: answers.append(call[2])
            )
            run(made, plan, given)
            hook.remove()
        for got, want in zip(*answers, strict=True):
            assert ((got - want).norm(dim=2) / want.norm(dim=2)).median() < FLOAT32


def test_text_and_video_are_each_modulated_by_their_own():
    given, made = inputs(), packed()
    want = run(made, PACKED, given)
    for block in made.network.transformer_blocks:
        scale = block.norm1.linear.weight_scale.view(torch.bfloat16).unflatten(0, (6, -1))
        scale.copy_(scale.roll(3, dims=0))
        block.norm1.linear.bias.data = block.norm1.linear.bias.unflatten(0, (6, -1)).roll(3, dims=0).flatten()
    assert relative_error(run(made, PACKED, given), want) > 10 * FLIPS


def test_a_plan_with_16_bit_values_runs_diffusers_blocks():
    made, given = packed(), inputs()
    want = run(made, AttentionPlan(), given)
    got = run(made, PACKED, given)
    assert not torch.equal(got, want)
    assert relative_error(got, want) < FP8_VALUES


def test_blocks_of_one_plan_may_be_packed_and_not_in_turn():
    """A dense layer has 16 bits here, and those around it 8: what is owed is added in between."""
    plan, given = AttentionPlan(TopK(0.5), pv_bits=8, dense_layers=(1,)), inputs()
    assert relative_error(run(packed(), plan, given), run(model(), plan, given)) < FLIPS


def test_a_block_behind_one_of_16_bits_is_handed_the_whole_sum():
    given = inputs()
    made = packed(kept=("transformer_blocks.1.ff.net.2",))
    assert are_packed(made) == [True, False, True]
    assert isinstance(made.network.transformer_blocks[1].ff.net[2], nn.Linear)
    assert relative_error(run(made, PACKED, given), run(model(), PACKED, given)) < ONE_LAYER


def test_a_pass_that_is_broken_off_leaves_nothing_to_the_next_and_none_keeps_tensors():
    made, given = packed(), inputs()
    want = run(made, PACKED, given)

    def broken(*_):
        raise InterruptedError

    last = made.network.transformer_blocks[-1]
    last.ff.net[2].product = broken
    with pytest.raises(InterruptedError):
        run(made, PACKED, given)
    streams = last.forward.streams
    assert streams._rope is not None, "it was broken off within"
    del last.ff.net[2].product
    assert torch.equal(run(made, PACKED, given), want)
    assert (streams._rope, streams._joint, streams._owed) == (None, None, [])
