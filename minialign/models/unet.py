"""The noise predictor eps_theta(x_t, t, z) of Stable Diffusion 1.x and 2.x; diffusers' UNet2DConditionModel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import (
    Downsample,
    ResnetBlock,
    TimestepMLP,
    Transformer2D,
    Upsample,
    per_level,
    read_config,
    timestep_embedding,
)

SETTINGS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "attention_head_dim": 8,  # diffusers' name for the number of heads, kept by every released checkpoint
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "use_linear_projection": False,
    "upcast_attention": False,
    "transformer_layers_per_block": 1,
    "sample_size": None,  # default image size, read by the pipeline
    "addition_embed_type_num_heads": 64,  # of an embedding that is refused unless off
}
BUILT: dict[str, tuple] = {
    "act_fn": ("silu",),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1, 1.0),
    "dropout": (0.0, 0),
    "dual_cross_attention": (False,),
    "only_cross_attention": (False,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0, 1),
    "time_embedding_type": ("positional",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
}


class Stage(nn.Module):
    """One resolution of the way down or up: residual blocks, each followed by attention where the level has it."""

    downsamplers: nn.ModuleList  # of all levels of the way down but the last
    upsamplers: nn.ModuleList

    def __init__(self, widths_in: list[int], width: int, time_width: int, attention: dict[str, Any] | None, c: dict):
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResnetBlock(n, width, c["norm_num_groups"], c["norm_eps"], time_width) for n in widths_in]
        )
        if attention is not None:
            self.attentions = nn.ModuleList([Transformer2D(width, **attention) for _ in widths_in])

    def layer(self, i: int, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[i](x, time)
        return self.attentions[i](x, context) if hasattr(self, "attentions") else x


class MidBlock(nn.Module):
    def __init__(self, width: int, time_width: int, attention: dict[str, Any], c: dict):
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResnetBlock(width, width, c["norm_num_groups"], c["norm_eps"], time_width) for _ in range(2)]
        )
        self.attentions = nn.ModuleList([Transformer2D(width, **attention)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, time), context)
        return self.resnets[1](x, time)


class UNet(nn.Module):
    """Built from a diffusers config; state-dict keys equal diffusers'."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        c = read_config("UNet2DConditionModel", config, SETTINGS, BUILT)
        self.config = config
        if not isinstance(c["cross_attention_dim"], int):
            width = c["cross_attention_dim"]
            raise ValueError(f"UNet2DConditionModel config: cross_attention_dim={width!r} is not built; supported: one")
        self.in_channels: int = c["in_channels"]
        self.context_width: int = c["cross_attention_dim"]
        widths = list(c["block_out_channels"])
        levels = len(widths)
        heads = per_level(c["attention_head_dim"], levels, "attention_head_dim")
        layers = per_level(c["layers_per_block"], levels, "layers_per_block")
        depths = per_level(c["transformer_layers_per_block"], levels, "transformer_layers_per_block")
        time_width = 4 * widths[0]

        def attention(level: int) -> dict[str, Any]:
            return {
                "heads": heads[level],
                "context": self.context_width,
                "groups": c["norm_num_groups"],
                "depth": depths[level],
                "linear": c["use_linear_projection"],
                "upcast": c["upcast_attention"],
            }

        self.conv_in = nn.Conv2d(self.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepMLP(widths[0], time_width)
        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]  # widths of the feature maps kept for the way up
        for i, (kind, width) in enumerate(zip(_kinds(c, "down", levels), widths)):
            inputs = [skips[-1]] + [width] * (layers[i] - 1)
            stage = Stage(inputs, width, time_width, attention(i) if kind else None, c)
            skips += [width] * layers[i]
            if i < levels - 1:
                stage.downsamplers = nn.ModuleList([Downsample(width)])
                skips.append(width)
            self.down_blocks.append(stage)
        self.mid_block = MidBlock(widths[-1], time_width, attention(levels - 1), c)
        self.up_blocks = nn.ModuleList()
        below = widths[-1]
        for i, kind in enumerate(_kinds(c, "up", levels)):
            level = levels - 1 - i
            inputs = []
            for _ in range(layers[level] + 1):
                inputs.append(below + skips.pop())
                below = widths[level]
            stage = Stage(inputs, below, time_width, attention(level) if kind else None, c)
            if level > 0:
                stage.upsamplers = nn.ModuleList([Upsample(below)])
            self.up_blocks.append(stage)
        self.conv_norm_out = nn.GroupNorm(c["norm_num_groups"], widths[0], c["norm_eps"])
        self.conv_out = nn.Conv2d(widths[0], c["out_channels"], 3, padding=1)

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor, added: None = None) -> Tensor:
        """Latents (B,C,h,w) of any size, timesteps (B,), text context (B,L,D) -> prediction (B,C,h,w).

        `added` is SDXL's second conditioning, which no network of this family takes; it must be None.
        """
        if added is not None:
            raise ValueError("added: this UNet has no second conditioning (SDXL's); pass None")
        time = timestep_embedding(timesteps, self.conv_in.out_channels)
        time = self.time_embedding(time.to(latents.dtype))
        x = self.conv_in(latents)
        skips = [x]
        for stage in _stages(self.down_blocks):
            for i in range(len(stage.resnets)):
                x = stage.layer(i, x, time, context)
                skips.append(x)
            if hasattr(stage, "downsamplers"):
                x = stage.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block(x, time, context)
        for stage in _stages(self.up_blocks):
            for i in range(len(stage.resnets)):
                x = stage.layer(i, torch.cat([x, skips.pop()], dim=1), time, context)
            if hasattr(stage, "upsamplers"):
                x = stage.upsamplers[0](x, skips[-1].shape[-2:])
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def _stages(blocks: nn.ModuleList) -> Iterator[Stage]:
    return iter(blocks)  # type: ignore[arg-type]  # a ModuleList does not know what it holds


def _kinds(c: dict[str, Any], direction: str, levels: int) -> list[bool]:
    """For each level of the way down or up, whether it has attention."""
    key = f"{direction}_block_types"
    known = {f"CrossAttn{direction.capitalize()}Block2D": True, f"{direction.capitalize()}Block2D": False}
    if len(c[key]) != levels:
        raise ValueError(f"UNet2DConditionModel config: {key} has {len(c[key])} entries for {levels} levels")
    for name in c[key]:
        if name not in known:
            raise ValueError(f"UNet2DConditionModel config: {key} has {name!r}; supported: {', '.join(known)}")
    return [known[name] for name in c[key]]
