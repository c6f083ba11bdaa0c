"""The training programs themselves, on a configuration of a few kilobytes: the loss must fall by half."""

import pytest
from diffusers import AutoencoderKLWan

from models.demo.video import train_dit, train_vae


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    out = tmp_path_factory.mktemp("vae")
    logged = train_vae.train(train_vae.TINY, seconds=200, out=out, device="cpu", steps=60)
    return out / "vae", logged


def test_the_autoencoders_loss_falls_by_half(autoencoder):
    _, logged = autoencoder
    assert logged[-1] < 0.5 * logged[0]


def test_the_autoencoder_is_saved_with_its_latents_mean_and_spread(autoencoder):
    folder, _ = autoencoder
    vae = AutoencoderKLWan.from_pretrained(folder)
    assert len(vae.config.latents_mean) == 16
    assert min(vae.config.latents_std) > 0


def test_the_transformers_loss_falls_by_half(autoencoder, tmp_path):
    logged = train_dit.train(train_dit.TINY, autoencoder[0], seconds=200, out=tmp_path, device="cpu", steps=60)
    assert logged[-1] < 0.5 * logged[0]
    assert {p.name for p in tmp_path.glob("*.safetensors")} >= {"text_encoder.safetensors", "transformer-0.safetensors"}
