"""The training programs themselves, on a configuration of a few kilobytes: the loss must fall by half."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from models.demo.video import refine_decoder, train_dit, train_vae


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    out = tmp_path_factory.mktemp("vae")
    logged = train_vae.train(train_vae.TINY, seconds=200, out=out, device="cpu", steps=40)
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
    """In 120 steps, to 0.32 to 0.44: the rate rises by the clock, and in 60 a fast machine has hardly begun."""
    logged = train_dit.train(train_dit.TINY, autoencoder[0], seconds=200, out=tmp_path, device="cpu", steps=120)
    assert logged[-1] < 0.5 * logged[0]
    assert {p.name for p in tmp_path.glob("*.safetensors")} >= {"text_encoder.safetensors", "transformer-0.safetensors"}


def test_refining_moves_the_decoder_and_leaves_the_latents_as_they_are(autoencoder, tmp_path):
    recipe = refine_decoder.Recipe(
        clips=2, frames=5, height=48, width=80, crop=48, batch=2, measured=train_vae.TINY
    )  # fmt: skip
    refine_decoder.refine(recipe, autoencoder[0], seconds=200, out=tmp_path, device="cpu", steps=3)
    before, after = (AutoencoderKLWan.from_pretrained(folder) for folder in (autoencoder[0], tmp_path / "vae"))
    assert before.config.latents_mean == after.config.latents_mean
    assert before.config.latents_std == after.config.latents_std
    changed = {name for name, p in before.state_dict().items() if not torch.equal(p, after.state_dict()[name])}
    assert changed
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
