import pytest
import torch

from quant_runtime.kernels.attention_blocks import key_mask
from quant_runtime.sparsity.base import AttentionCall, Seen, TokenLayout
from quant_runtime.sparsity.topk import TopK

ONE_BLOCK = 0.5  # a row keeps a whole number of blocks: the density is met to half a block of a row


def blocks(policy, layout, device, batch=2, heads=2, size=16):
    q, k = (torch.randn(batch, heads, layout.tokens, size, device=device) for _ in range(2))
    return policy.blocks(Seen.of(q, k, policy.block), AttentionCall(0, 0, 1, layout), None)


@pytest.mark.parametrize("density", [0.35, 0.5, 0.77, 1.0])
@pytest.mark.parametrize(
    "layout", [TokenLayout(9, 12, 20), TokenLayout(8, 16, 16, special=5), TokenLayout(5, 8, 16, text=70)]
)
def test_the_density_asked_for_is_the_density_that_runs(density, layout, device):
    kept = blocks(TopK(density), layout, device)
    assert abs(float(kept.density()) - density) * kept.keys <= ONE_BLOCK


def test_always_kept_tokens_set_the_least_density(device):
    layout = TokenLayout(9, 12, 20)
    kept = blocks(TopK(0.01, first_frame=True), layout, device)
    assert kept.kept.eq(torch.arange(4, device=device)).all(), "240 tokens of a first frame lie in 4 blocks of 64"


def test_the_first_frame_is_kept_by_every_row(device):
    kept = blocks(TopK(0.25, first_frame=True), TokenLayout(9, 12, 20), device)
    assert key_mask(kept.kept, kept.counts, kept.keys)[..., :4].all()


def test_text_sees_all_and_is_seen_by_all(device):
    layout = TokenLayout(5, 8, 16, text=70)  # 640 tokens of video fill 10 blocks
    kept = blocks(TopK(0.3), layout, device)
    seen = key_mask(kept.kept, kept.counts, kept.keys)
    assert seen[:, :, :, 10:].all()
    assert seen[:, :, 10:].all()
    assert not seen[:, :, :10, :10].all()


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("text", [9, 70, 226])
def test_every_block_that_holds_text_is_kept_though_text_fills_it_only_partly(text, text_first, device):
    layout = TokenLayout(5, 7, 18, text=text, text_first=text_first)  # 630 tokens of video: no border is a block's
    kept = blocks(TopK(0.3), layout, device)
    seen = key_mask(kept.kept, kept.counts, kept.keys)
    places = torch.arange(text) if text_first else torch.arange(630, layout.tokens)
    with_text = (places // 64).unique().to(device)
    assert seen[:, :, :, with_text].all()
    assert seen[:, :, with_text].all()
    assert not seen.all()


def test_special_tokens_are_gathered_in_front():
    layout = TokenLayout(3, 2, 2, special=2)
    (order,) = TopK().orders(layout, 64)
    assert order.tolist() == [0, 1, 6, 7, 12, 13, 2, 3, 4, 5, 8, 9, 10, 11, 14, 15, 16, 17]
    assert TopK().orders(TokenLayout(3, 2, 2, text=4), 64) is None


def test_gathered_special_tokens_fill_blocks_of_their_own(device):
    kept = blocks(TopK(0.15), TokenLayout(8, 16, 16, special=5), device)  # 40 special tokens: one block of 64
    seen = key_mask(kept.kept, kept.counts, kept.keys)
    assert seen[:, :, :, 0].all()
    assert seen[:, :, 0].all()


def test_few_tokens_are_one_block(device):
    kept = blocks(TopK(0.1), TokenLayout(1, 3, 3), device)
    assert kept.kept.shape[2:] == (1, 1)
    assert float(kept.density()) == 1.0


@pytest.mark.parametrize(("fields", "named"), [({"density": 0.0}, "got 0.0"), ({"block": 48}, "got 48")])
def test_fields_out_of_range_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        TopK(**fields)
