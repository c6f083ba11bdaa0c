import pytest
import torch

from quant_runtime import residual
from quant_runtime.residual import Residual, ResidualCache, leading, used
from tests.support import relative_error

ON_GPU = torch.cuda.is_available()
# Products of some hundred numbers, added up in another order; a GPU makes them of 11 bits, of vectors near the best.
FLOAT32 = 2e-3 if ON_GPU else 1e-5
TEN_TIMES = 2e-3 if ON_GPU else 1e-4  # of numbers ten times as large
BF16 = 2**-8  # two roundings of a number to 9 bits: of what is kept, and of what was
INT8 = (
    0.02  # a row's largest of some dozen normal numbers is 2 to 3, so 1/254 of it is 1 % of their size; measured: 0.008
)
SHAPE = (2, 3, 70, 32)  # batch, heads, tokens, size
TYPES = [(16, torch.float32, FLOAT32), (16, torch.bfloat16, BF16), (8, torch.float32, INT8)]


def laid_out(x):
    """As attention answers: [B, H, N, D] that lies in memory as [B, N, H, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def noise(device, rank=None):
    if rank is None:
        return torch.randn(SHAPE, device=device)
    batch, heads, tokens, size = SHAPE
    left, right = (
        torch.randn(batch, heads, tokens, rank, device=device),
        torch.randn(batch, heads, rank, size, device=device),
    )
    return left @ right / rank**0.5


def given(cache, key=(0, 0)):
    values, scale = cache.cached(key)
    return values.float() if scale is None else values * scale[..., None]


def kept_by(cache, key=(0, 0)):
    """Delta of the last refresh, and what it has foretold of the next, float32 [B, H, N, D]."""
    entry = cache._home.all_of(key)

    def real(rows):
        values = rows.values.transpose(1, 2).float()
        return values if rows.scale is None else values * rows.scale[..., None]

    foretold = real(entry.left) @ entry.right.mT
    return real(entry.dense) - entry.added * foretold, foretold


def cache_of(*deltas, dtype=torch.float32, **fields):
    """Of one layer, whose refreshes at steps 0, 1, ... lost these."""
    cache = ResidualCache(Residual(**fields))
    for step, delta in enumerate(deltas):
        lost = laid_out(delta.to(dtype))
        cache.keep((0, 0), step, torch.ones_like(lost), lost)
    return cache


@pytest.mark.parametrize(("bits", "dtype", "error"), TYPES)
def test_the_first_order_is_what_the_last_refresh_lost(bits, dtype, error, device):
    deltas = [noise(device) for _ in range(3)]
    cache = cache_of(*deltas, dtype=dtype, order=1, bits=bits)
    assert relative_error(given(cache), deltas[-1]) < error
    assert given(cache).transpose(1, 2).is_contiguous(), "attention adds it as it lies"


def test_the_second_order_of_a_first_refresh_is_the_first(device):
    delta = noise(device)
    assert torch.equal(given(cache_of(delta, bits=16)), delta)


def with_trend(before, after, **settings):
    """A cache of the second order: a refresh ahead of these two lost so much less that their difference came true."""
    return cache_of(2 * before - after, before, after, **settings)


@pytest.mark.parametrize(("bits", "dtype", "error"), TYPES)
def test_of_a_rank_of_the_heads_size_nothing_is_cut_off(bits, dtype, error, device):
    before = noise(device)
    after = before + 0.5 * noise(device)
    cache = with_trend(before, after, dtype=dtype, rank=SHAPE[3], bits=bits)
    assert relative_error(given(cache), 2 * after - before) < 2 * error, "the cache before was rounded too"


def test_of_a_lower_rank_the_best_approximation_of_each_head_is_kept(device):
    before = noise(device)
    after = before + 0.5 * noise(device)
    left, values, right = torch.linalg.svd((after - before).double(), full_matrices=False)
    best = (left[..., :8] * values[..., None, :8]) @ right[..., :8, :]
    found = given(with_trend(before, after, rank=8, bits=16))
    assert relative_error(found, after + best) < FLOAT32
    assert relative_error(found, 2 * after - before) > 0.1, "not all of it"


def test_what_is_lost_in_proportion_to_the_step_is_met_where_the_next_refresh_would_be(device):
    base, slope, period = noise(device), noise(device, rank=4) / 10, 6

    def lost(step):
        return base + step * slope

    first, second = (cache_of(*(lost(n * period) for n in range(3)), order=order, rank=4, bits=16) for order in (1, 2))
    for k in range(1, period + 1):
        assert relative_error(lost(2 * period + k) - given(first), k * slope) < TEN_TIMES
        missed = lost(2 * period + k) - given(second)
        assert (missed - (k - period) * slope).norm() < TEN_TIMES * (period * slope).norm()


@pytest.mark.parametrize(("bits", "dtype", "error"), TYPES)
@pytest.mark.parametrize("rank", [4, 32])
def test_the_loss_of_the_last_refresh_comes_back_from_what_is_kept(bits, dtype, error, rank, device):
    before = noise(device)
    after = before + 0.5 * noise(device)
    cache = with_trend(before, after, dtype=dtype, rank=rank, bits=bits)
    assert cache._home.all_of((0, 0)).added == 1
    back, _ = kept_by(cache)
    assert relative_error(back, after) < (1e-3 if dtype == torch.float32 and bits == 16 else 2 * error)


def test_what_was_lost_is_not_written_to(device):
    base, step = noise(device), noise(device)
    deltas = [laid_out(base + number * step) for number in range(4)]
    before = [delta.clone() for delta in deltas]
    cache = ResidualCache(Residual(rank=4, bits=16))
    for step, delta in enumerate(deltas):
        cache.keep((0, 0), step, delta, delta)
    assert all(torch.equal(one, other) for one, other in zip(deltas, before, strict=True))


@pytest.mark.parametrize(("bits", "dtype", "error"), TYPES)
def test_a_trend_that_has_not_foretold_anything_is_not_added_and_still_kept(bits, dtype, error, device):
    """Nothing is known of the first; the third refresh sees the second come true, the fourth sees the third fail."""
    base, step = noise(device), 0.3 * noise(device)
    deltas = [base, base + step, base + 2 * step, base + step]
    settings = {"dtype": dtype, "rank": SHAPE[3], "bits": bits}
    for count, trend in ((2, 0), (3, 1), (4, 0)):
        cache = cache_of(*deltas[:count], **settings)
        assert relative_error(given(cache), deltas[count - 1] + trend * step) < 2 * error
        back, foretold = kept_by(cache)
        assert relative_error(back, deltas[count - 1]) < 2 * error
        assert relative_error(foretold, deltas[count - 1] - deltas[count - 2]) < 8 * error, "of two"
    size, moved = (float(x.square().mean() ** 0.5) for x in (base, step))  # beside a dense answer of ones
    found = used([cache]).refreshes
    near = {"rel": 8 * error, "abs": 8 * error}
    assert [refresh.fell_back for refresh in found] == [1, 1, 0, 1]
    assert found[0].lost == pytest.approx(size, **near)
    assert [refresh.first_error for refresh in found] == [None, *[pytest.approx(moved, **near)] * 3]
    errors = [pytest.approx(x, **near) for x in (0, 2 * moved)]
    assert [refresh.second_error for refresh in found] == [None, None, *errors]


def test_layers_fall_back_one_by_one(device):
    base, step = noise(device), 0.3 * noise(device)
    cache = ResidualCache(Residual(bits=16, rank=32))
    for number, away in enumerate((0, 1, 2)):
        for layer in range(2):
            lost = laid_out(base + (away if layer == 0 else number % 2) * step)
            cache.keep((layer, 0), number, torch.ones_like(lost), lost)
    assert relative_error(given(cache, (0, 0)), base + 3 * step) < FLOAT32
    assert torch.equal(given(cache, (1, 0)), base)
    assert used([cache]).refreshes[2].fell_back == 1


def test_heads_are_worked_on_a_few_at_a_time(device, monkeypatch):
    before = noise(device)
    deltas = (before, before + noise(device) / 2)
    whole = with_trend(*deltas)
    monkeypatch.setattr(residual, "AT_ONCE", 2 * 70 * 32 * 2)
    assert len(residual._chunks(deltas[0])) == 2
    assert relative_error(given(with_trend(*deltas)), given(whole)) < INT8


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("bits", "dtype", "error"), TYPES)
def test_what_a_cache_takes_is_known_before(order, bits, dtype, error, device):
    batch, heads, tokens, size = SHAPE
    cache = cache_of(noise(device), noise(device), dtype=dtype, order=order, rank=8, bits=bits)
    assert cache.bytes == batch * cache.residual.bytes(tokens, heads, size, dtype.itemsize)
    (entry,) = cache._home._held.values()
    rounded = sum(1 << (one.nbytes - 1).bit_length() for one in residual._tensors(entry))
    assert rounded == batch * cache.residual.bytes(tokens, heads, size, dtype.itemsize, pinned=True)
    cache.clear()
    assert cache.empty
    assert cache.bytes > 0, "as it was"


def test_zeros_and_what_is_not_finite_stay_what_they_are(device):
    delta = noise(device)
    delta[0, 0, 0], delta[0, 0, 1] = 0.0, float("nan")
    found = given(cache_of(delta, bits=8))
    assert not found[0, 0, 0].any()
    assert found[0, 0, 1].isnan().all()
    assert found[0, 0, 2:].isfinite().all()


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0])
def test_eigenvectors_that_are_iterated_to_leave_out_hardly_more_than_the_best(decay, device):
    """Of 128 eigenvalues that fall like a power of their number, and where all of them are about the same."""
    values = torch.arange(1, 129, device=device) ** -decay
    x = torch.randn(2, 400, 128, device=device) * values.sqrt()
    x = x @ torch.linalg.qr(torch.randn(2, 128, 128, device=device)).Q
    best = torch.linalg.eigh(x.mT @ x).eigenvectors[..., -16:]
    found = residual.leading_by_iteration(x.mT @ x, 16)
    assert relative_error(found.mT @ found, torch.eye(16, device=device).expand(2, 16, 16)) < FLOAT32
    left_out, least = ((x - x @ vectors @ vectors.mT).norm() for vectors in (found, best))
    assert left_out < 1.02 * least
    assert (x @ found).norm() > 0.97 * (x @ best).norm()


def test_iteration_copes_with_few_directions_and_with_none(device):
    x = torch.randn(2, 400, 3, device=device) @ torch.randn(2, 3, 128, device=device)
    found = residual.leading_by_iteration(x.mT @ x, 16)
    assert relative_error(x @ found @ found.mT, x) < 1e-3, "Gram matrices have half of float32's digits"
    assert not residual.leading_by_iteration(torch.zeros(2, 128, 128, device=device), 16).any()


def test_few_directions_of_very_different_sizes_have_eigenvectors(device):
    """As where a head loses next to nothing: float32 gives up on a sixth of these."""
    for _ in range(50):
        x, columns = torch.zeros(240, 64, device=device), torch.randperm(64)[:12]
        x[:, columns] = torch.randn(240, 12, device=device) * 10 ** (-18 * torch.rand(12, device=device))
        vectors = leading((x.mT @ x)[None], 8)
        assert vectors.dtype == torch.float32
        assert relative_error(x @ vectors[0] @ vectors[0].mT, x) < 1e-3


def test_eigenvectors_are_those_of_the_largest_eigenvalues(device):
    vectors = torch.linalg.qr(torch.randn(3, 16, 16, device=device)).Q
    grams = (vectors * torch.arange(1, 17, device=device)) @ vectors.mT
    found = leading(grams, 2)
    assert relative_error(found @ found.mT, vectors[..., -2:] @ vectors[..., -2:].mT) < FLOAT32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has one memory")
@pytest.mark.parametrize("bits", [8, 16])
def test_on_the_host_it_is_the_same_as_on_the_device(bits):
    here, there = (ResidualCache(Residual(rank=8, bits=bits, place=place)) for place in ("device", "host"))
    keys = [(layer, branch) for branch in range(2) for layer in range(3)]
    for step in range(3):
        for key in keys:
            lost = laid_out(noise("cuda"))
            for cache in (here, there):
                cache.keep(key, step, torch.ones_like(lost), lost)
        for _ in range(3):  # and steps without a refresh
            for key in keys:
                torch.cuda._sleep(1_000_000)  # what is brought beside it must not come early
                assert torch.equal(given(there, key), given(here, key))
    assert there.bytes == here.bytes
    assert not there._home.all_of(keys[0]).dense.values.is_cpu
    assert there._home._held[keys[0]].dense.values.is_pinned()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"interval": 0}, "interval is at least 1; got 0"),
        ({"rank": 0}, "rank is at least 1; got 0"),
        ({"order": 3}, "order is one of 1, 2; got 3"),
        ({"bits": 4}, "bits is one of 8, 16; got 4"),
        ({"place": "disk"}, "place is one of device, host, auto; got disk"),
    ],
)
def test_settings_out_of_range_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        Residual(**fields)


def test_a_rank_above_the_heads_size_and_calls_of_another_shape_are_refused(device):
    with pytest.raises(ValueError, match="at most the heads' size, 32; got 33"):
        cache_of(noise(device), rank=33)
    cache = cache_of(noise(device))
    other = torch.zeros(1, 3, 70, 32, device=device)
    with pytest.raises(ValueError, match=r"layer 0, branch 0 had attention \[2, 3, 70, 32\]; got \[1, 3, 70, 32\]"):
        cache.keep((0, 0), 1, other, other)


def test_a_call_that_was_not_refreshed_has_no_residual(device):
    cache = cache_of(noise(device))
    with pytest.raises(RuntimeError, match="layer 0, branch 1 has no residual"):
        cache.cached((0, 1))
