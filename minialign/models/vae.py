"""The autoencoder of latent diffusion (Rombach et al. 2022): images to latents and back; diffusers' AutoencoderKL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import (
    MOST,
    Attention,
    Conv2d,
    Downsample,
    GroupNorm,
    ResnetBlock,
    Upsample,
    count,
    norm_silu_conv,
    per_level,
    pixels,
    read_config,
    tokens,
)

EPS = 1e-6  # of every group norm in this network
SLICE = 2**16  # pixels of the images that go through at once: one of 256 px kept two cores busy, more only take memory

SETTINGS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "sample_size": None,  # a hint for image sizes that the network itself does not need
    "force_upcast": None,  # a hint to run XL's in float32, read by the pipeline
    "down_block_types": None,
    "up_block_types": None,
}
BUILT: dict[str, tuple] = {  # with SETTINGS all that changes diffusers' network
    "act_fn": ("silu", "swish"),
    "shift_factor": (None, 0, 0.0),
    "latents_mean": (None,),
    "latents_std": (None,),
}


class VAEAttention(Attention):
    """Single-head attention over pixels with its own norm and residual: (B,C,h,w) -> (B,C,h,w)."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, 1, bias=True)
        self.group_norm = GroupNorm(groups, channels, EPS)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # it attends to itself alone
        return x + pixels(super().forward(tokens(self.group_norm(x))), x.shape[-2:])


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups, EPS) for _ in range(2)])
        self.attentions = nn.ModuleList([VAEAttention(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Stage(nn.Module):
    """Residual blocks at one resolution, then a change of resolution except in the last stage."""

    def __init__(self, channels: int, out_channels: int, layers: int, groups: int, down: bool, last: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResnetBlock(channels if i == 0 else out_channels, out_channels, groups, EPS) for i in range(layers)]
        )
        if not last and down:
            self.downsamplers = nn.ModuleList([Downsample(out_channels, padding=0)])
        elif not last:
            self.upsamplers = nn.ModuleList([Upsample(out_channels)])


def layers(stages: nn.ModuleList) -> Iterator[nn.Module]:
    """The layers of all stages in order; one loop over them lets go of each map as soon as the next one is there."""
    return (layer for stage in stages for block in stage.children() for layer in block)  # type: ignore[attr-defined]


class Encoder(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        widths, groups = c["block_out_channels"], c["norm_num_groups"]
        self.conv_in = Conv2d(c["in_channels"], widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [
                Stage(widths[max(i - 1, 0)], width, c["layers_per_block"], groups, True, i == len(widths) - 1)
                for i, width in enumerate(widths)
            ]
        )
        self.mid_block = MidBlock(widths[-1], groups, c["mid_block_add_attention"])
        self.conv_norm_out = GroupNorm(groups, widths[-1], EPS)
        self.conv_out = Conv2d(widths[-1], 2 * c["latent_channels"], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))  # the faster layout for maps this large
        for layer in layers(self.down_blocks):
            x = layer(x)
        return norm_silu_conv(self.mid_block(x), self.conv_norm_out, self.conv_out)


class Decoder(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        widths, groups = c["block_out_channels"][::-1], c["norm_num_groups"]
        self.conv_in = Conv2d(c["latent_channels"], widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, c["mid_block_add_attention"])
        self.up_blocks = nn.ModuleList(
            [
                Stage(widths[max(i - 1, 0)], width, c["layers_per_block"] + 1, groups, False, i == len(widths) - 1)
                for i, width in enumerate(widths)
            ]
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], EPS)
        self.conv_out = Conv2d(widths[-1], c["out_channels"], 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.mid_block(self.conv_in(z.contiguous(memory_format=torch.channels_last)))
        for layer in layers(self.up_blocks):
            z = layer(z)
        return norm_silu_conv(z, self.conv_norm_out, self.conv_out)


class VAE(nn.Module):
    """Images (B,3,H,W) in [-1,1] <-> latents (B,C,H/f,W/f), f = 2 ** (levels - 1).

    `scaling_factor` (from the config) brings latents to about unit variance; `encode` and `decode` leave it to the
    caller, as diffusers does: the diffusion model sees latents times `scaling_factor`.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        c = read_config("AutoencoderKL", config, SETTINGS, BUILT)
        for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            for name in c[key] or []:
                if name != kind:
                    raise ValueError(f"AutoencoderKL config: {key} has {name!r}; accepted: {kind!r}")
            per_level(c[key] or 1, len(c["block_out_channels"]), key)  # refuses a list of another length
        if count(c, "layers_per_block") * len(c["block_out_channels"]) > MOST:
            raise ValueError(f"AutoencoderKL config: more than {MOST} layers")
        self.config = config
        self.scaling_factor = float(c["scaling_factor"])
        if not self.scaling_factor > 0:
            raise ValueError(f"AutoencoderKL config: scaling_factor={self.scaling_factor} must be positive")
        self.factor = 2 ** (len(c["block_out_channels"]) - 1)
        self.latent_channels: int = c["latent_channels"]
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        if c["use_quant_conv"]:
            self.quant_conv = Conv2d(2 * self.latent_channels, 2 * self.latent_channels, 1)
        if c["use_post_quant_conv"]:
            self.post_quant_conv = Conv2d(self.latent_channels, self.latent_channels, 1)

    @staticmethod
    def current_key(key: str) -> str:
        """Today's name of a stored weight: attention was once query, key, value and proj_attn."""
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            key = key.replace(f".{old}.", f".{new}.")
        return key

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, each (B,C,h,w), of the Gaussian over latents; not scaled."""
        moments = torch.cat([self.encoder(chunk) for chunk in images.split(slice_size(images, 1))])
        if hasattr(self, "quant_conv"):
            moments = self.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B,3,H,W), about [-1,1], of unscaled latents."""
        if hasattr(self, "post_quant_conv"):
            latents = self.post_quant_conv(latents)
        return torch.cat([self.decoder(chunk) for chunk in latents.split(slice_size(latents, self.factor))])


def slice_size(x: Tensor, factor: int) -> int:
    """How many images go through the network at once: x (B,C,h,w) at 1/factor of their size."""
    return max(1, SLICE // (x.shape[2] * x.shape[3] * factor**2))
