import pytest
import torch

from quant_runtime.kernels.attention_blocks import key_mask
from quant_runtime.sparsity.base import AttentionCall, Seen, TokenLayout
from quant_runtime.sparsity.topp import TopP

LAYOUT = TokenLayout(9, 12, 20)  # 34 blocks of 64


def seen_by(policy, layout, device, alike=True, size=16):
    """Blocks of keys that are each one direction, or noise."""
    q, k = torch.randn(2, 1, 2, layout.tokens, size, device=device)
    if alike:
        shared = torch.randn(1, 2, -(-layout.tokens // 64), size, device=device).repeat_interleave(64, dim=2)
        q, k = (0.1 * x + 0.7 * shared[:, :, : layout.tokens] for x in (q, k))
    found = policy.blocks(Seen.of(q, k, policy.block), AttentionCall(0, 0, 1, layout), None)
    return key_mask(found.kept, found.counts, found.keys), found, q, k


@pytest.mark.parametrize("mass", [0.5, 0.9])
def test_a_row_keeps_the_mass_of_its_mean_scores_with_as_few_blocks_as_will_do(mass, device):
    seen, found, q, k = seen_by(TopP(mass), LAYOUT, device)
    means = [torch.stack([part.double().mean(dim=2) for part in x.split(64, dim=2)], dim=2) for x in (q, k)]
    share = (means[0] @ means[1].mT / 4).softmax(dim=3)
    held = share.masked_fill(~seen, 0.0)
    assert held.sum(dim=3).min() > mass - 1e-5
    least = held.masked_fill(~seen, 1.0).amin(dim=3)
    assert (held.sum(dim=3) - least).max() < mass + 1e-5
    assert found.counts.unique().numel() > 3, "rows differ in how much they need"


def test_more_mass_keeps_more(device):
    densities = [float(seen_by(TopP(mass), LAYOUT, device)[1].density()) for mass in (0.3, 0.6, 0.9, 1.0)]
    assert densities == sorted(set(densities))
    assert densities[-1] == 1.0


def test_blocks_of_noise_are_stood_for_by_no_mean(device):
    assert float(seen_by(TopP(0.3, 0.3), LAYOUT, device, alike=False)[1].density()) == 1.0
    assert float(seen_by(TopP(0.3, 0.0), LAYOUT, device, alike=False)[1].density()) < 0.5
    assert float(seen_by(TopP(0.3, 0.3), LAYOUT, device)[1].density()) < 0.5


def test_keys_are_compared_without_what_they_have_in_common(device):
    q = torch.ones(1, 1, 128, 16, device=device)
    k = torch.randn(1, 1, 128, 16, device=device) + 50.0
    found = TopP(0.3, 0.3).blocks(Seen.of(q, k, 64), AttentionCall(0, 0, 1, TokenLayout(1, 8, 16)), None)
    assert found.counts.eq(2).all()


def test_a_row_is_bounded_on_both_sides(device):
    counts = seen_by(TopP(0.99, 0.0, least=0.2, most=0.3), LAYOUT, device, alike=False)[1].counts
    assert (int(counts.min()), int(counts.max())) == (10, 10), "a tenth of 34 blocks below 0.3, noise needs more"
    counts = seen_by(TopP(0.01, 0.0, least=0.2), LAYOUT, device)[1].counts
    assert int(counts.min()) == 7


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mass": 0}, "got 0"),
        ({"alike": 2}, "got 2"),
        ({"least": 0.5, "most": 0.2}, "got 0.5, 0.2"),
        ({"most": 0}, "fractions"),
        ({"block": 48}, "got 48"),
    ],
)
def test_fields_out_of_range_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        TopP(**fields)
