import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from quant_runtime.quality import psnr, sqnr, ssim

SKIMAGE = 1e-6  # two float64 programs for one formula


def frames(count, height=32, width=40):
    smooth = torch.nn.functional.interpolate(torch.rand(count, 3, 5, 6), (height, width), mode="bilinear")
    return (smooth * 255).round().to(torch.uint8).movedim(1, -1)


def test_noise_of_a_tenth_is_20_db():
    want = torch.randn(1000)
    assert math.isclose(sqnr(want, want * 1.1), 20.0, abs_tol=1e-5)
    assert sqnr(want, want) == math.inf


def test_psnr_is_the_mean_over_frames_of_their_decibels():
    want = torch.zeros(3, 8, 8, 3, dtype=torch.uint8)
    got = want.clone()
    got[0] += 255  # 0 dB
    got[1] += 1  # 48.13 dB
    assert math.isclose(psnr(want[:2], got[:2]), 10 * math.log10(255**2) / 2, abs_tol=1e-9)
    assert psnr(want[2:], got[2:]) == 100.0, "a frame without difference"


def test_ssim_is_that_of_scikit_image():
    want = frames(2)
    got = (want.int() + torch.randint(-20, 21, want.shape)).clamp(0, 255).to(torch.uint8)
    theirs = [
        structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=-1
        )
        for a, b in zip(want.numpy(), got.numpy(), strict=True)
    ]
    assert math.isclose(ssim(want, got), np.mean(theirs), abs_tol=SKIMAGE)
    assert math.isclose(ssim(want, want), 1.0, abs_tol=1e-12)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"uint8 \[..., H, W, 3\]"):
        psnr(frames(1).float(), frames(1).float())
    with pytest.raises(ValueError, match="one shape"):
        psnr(frames(1), frames(2))
    with pytest.raises(ValueError, match="windows of 11"):
        ssim(frames(1, 10, 40), frames(1, 10, 40))
