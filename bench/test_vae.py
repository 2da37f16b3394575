"""The autoencoder of Stable Diffusion on images of 256 px, beside diffusers: pytest bench/test_vae.py"""

import pytest
import torch
from configs import VAE_CONFIG
from pairs import vae

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def networks(device, dtype):
    ours, theirs = vae(), diffusers.AutoencoderKL(**VAE_CONFIG).eval().requires_grad_(False)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(device, dtype), theirs.to(device, dtype)


@pytest.mark.parametrize("images", [1, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", ["encode", "decode"])
def test_autoencoder(compare, networks, device, dtype, way, images):
    ours, theirs = networks
    pixels, latents = torch.rand(images, 3, 256, 256) * 2 - 1, torch.randn(images, 4, 32, 32)
    pixels, latents = pixels.to(device, dtype), latents.to(device, dtype)
    with torch.no_grad():
        if way == "encode":
            mine, peer = (lambda: ours.encode(pixels)[0]), (lambda: theirs.encode(pixels).latent_dist.mean)
        else:
            mine, peer = (lambda: ours.decode(latents)), (lambda: theirs.decode(latents).sample)
        compare(f"VAE {way}, 256 px, batch {images}", mine, peer, goal=1.2)
