"""The autoencoder of Stable Diffusion on four images of 256 px, beside diffusers: pytest bench/test_vae.py"""

import pytest
import torch
from pairs import VAE_CONFIG, compare, compare_memory, vae

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("way", ["encode", "decode"])
def test_autoencoder(benchmark, way, images):
    ours, theirs = vae(), diffusers.AutoencoderKL(**VAE_CONFIG).eval().requires_grad_(False)
    theirs.load_state_dict(ours.state_dict())
    pixels, latents = torch.rand(images, 3, 256, 256) * 2 - 1, torch.randn(images, 4, 32, 32)
    with torch.no_grad():
        if way == "encode":
            mine, peer = (lambda: ours.encode(pixels)[0]), (lambda: theirs.encode(pixels).latent_dist.mean)
        else:
            mine, peer = (lambda: ours.decode(latents)), (lambda: theirs.decode(latents).sample)
        work = f"VAE {way}, 256 px, batch {images}"
        found = compare(benchmark, work, mine, peer, goal=1.2, rounds=5)
        compare_memory(found, mine, peer, goal=0.6)
