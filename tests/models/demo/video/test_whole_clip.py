import torch

from models.demo.video import networks, whole_clip
from tests.support import largest_error

FLOAT32_SUMS = 1e-5  # the same products in another order


def test_one_pass_equals_diffusers_chunks():
    torch.manual_seed(0)
    vae = networks.vae(networks.TINY).eval()
    for frames in (1, 5, 9):
        video = torch.rand(2, 3, frames, 32, 48) * 2 - 1
        with torch.no_grad():
            mean, log_variance = whole_clip.encode(vae, video)
            chunked = vae.encode(video).latent_dist
            assert largest_error(mean, chunked.mean) < FLOAT32_SUMS
            assert largest_error(log_variance, chunked.logvar) < FLOAT32_SUMS
            got = whole_clip.decode(vae, mean).clamp(-1, 1)
            assert largest_error(got, vae.decode(mean).sample) < FLOAT32_SUMS
