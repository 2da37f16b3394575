"""The autoencoder: values of the reference, and what is refused."""

from __future__ import annotations

import pytest
import torch
from comparisons import check_vae, golden, names

from minialign.models.vae import VAE

SMALL = {"block_out_channels": [8, 8], "norm_num_groups": 2}


@pytest.mark.parametrize("name", names("vae"))
def test_golden(name):
    check_vae(*golden("vae", name))


@pytest.mark.parametrize(("bias", "logvar"), [(100.0, 20), (-100.0, -30)])
def test_log_variance_is_clamped(bias, logvar):
    vae = VAE(SMALL | {"use_quant_conv": False})
    torch.nn.init.constant_(vae.encoder.conv_out.bias, bias)
    mean, actual = vae.encode(torch.zeros(1, 3, 8, 8))
    assert actual.eq(logvar).all() and mean.abs().min() > 30  # the mean is not


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("act_fn", "relu"),
        ("shift_factor", 0.1),
        ("latents_mean", [0.0]),
        ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
        ("up_block_types", ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]),
    ],
)
def test_refuses_what_is_not_built(key, value):
    with pytest.raises(ValueError, match=rf"AutoencoderKL config: {key}\b.*accepted: "):
        VAE(SMALL | {key: value})


@pytest.mark.parametrize(
    ("key", "value"), [("down_block_types", ["DownEncoderBlock2D"]), ("up_block_types", ["UpDecoderBlock2D"] * 3)]
)
def test_refuses_a_list_of_another_length(key, value):
    with pytest.raises(ValueError, match=f"{key} has {len(value)} entries for 2 levels"):
        VAE(SMALL | {key: value})
