"""The noise predictor eps_theta(x_t, t, z) of Stable Diffusion 1.x, 2.x and XL; diffusers' UNet2DConditionModel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .blocks import (
    MOST,
    Conv2d,
    Downsample,
    GroupNorm,
    ResnetBlock,
    TimestepMLP,
    Transformer2D,
    Upsample,
    norm_silu_conv,
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
    "transformer_layers_per_block": 1,  # one number, one a level, or for a level a list with one a layer
    "reverse_transformer_layers_per_block": None,  # of the way up, where it is not the way down reversed
    "addition_time_embed_dim": None,  # SDXL: width of the sinusoids of each of the six time ids
    "projection_class_embeddings_input_dim": None,  # SDXL: width of the second conditioning
    "sample_size": None,  # default image size, read by the pipeline
}
BUILT: dict[str, tuple] = {  # with SETTINGS all that changes diffusers' network but its dropout in training
    "act_fn": ("silu", "swish"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),  # the last two in distilled networks
    "addition_embed_type": (None, "text_time"),  # the second is SDXL's
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1, 1.0),
    "dual_cross_attention": (False,),
    "only_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "class_embeddings_concat": (False,),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
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

    def __init__(self, widths_in: list[int], width: int, time_width: int, attentions: list[dict[str, Any]], c: dict):
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResnetBlock(n, width, c["norm_num_groups"], c["norm_eps"], time_width) for n in widths_in]
        )
        if attentions:
            self.attentions = nn.ModuleList([Transformer2D(width, **attention) for attention in attentions])

    def layer(self, i: int, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[i](x, time)
        return self.attentions[i](x, context) if hasattr(self, "attentions") else x


class MidBlock(nn.Module):
    """A residual block, then attention and a second one unless the network is distilled (`attention` None)."""

    def __init__(self, width: int, time_width: int, attention: dict[str, Any] | None, c: dict):
        super().__init__()
        self.resnets = nn.ModuleList(
            [
                ResnetBlock(width, width, c["norm_num_groups"], c["norm_eps"], time_width)
                for _ in range(1 if attention is None else 2)
            ]
        )
        if attention is not None:
            self.attentions = nn.ModuleList([Transformer2D(width, **attention)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[0](x, time)
        if hasattr(self, "attentions"):
            x = self.resnets[1](self.attentions[0](x, context), time)
        return x


class UNet(nn.Module):
    """Built from a diffusers config; state-dict keys equal diffusers'."""

    mid_block: MidBlock  # unless the config has none
    add_embedding: TimestepMLP  # SDXL's
    checkpointing = False  # True: the backward pass computes every block again, of which only the input is kept

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        c = read_config("UNet2DConditionModel", config, SETTINGS, BUILT)
        _check_size(c["sample_size"])
        self.config = config
        self.in_channels: int = c["in_channels"]
        self.context_width: int = _context_width(c)
        widths = list(c["block_out_channels"])
        levels = len(widths)
        heads = per_level(c["attention_head_dim"], levels, "attention_head_dim")
        layers = per_level(c["layers_per_block"], levels, "layers_per_block")
        down_depths, up_depths = _depths(c, layers)
        time_width = 4 * widths[0]

        def attention(level: int, depth: int) -> dict[str, Any]:
            return {
                "heads": heads[level],
                "context": self.context_width,
                "groups": c["norm_num_groups"],
                "depth": depth,
                "linear": c["use_linear_projection"],
                "upcast": c["upcast_attention"],
            }

        self.conv_in = Conv2d(self.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepMLP(widths[0], time_width)
        self.added_width, self.time_id_width = 0, 0  # of SDXL's second conditioning
        if c["addition_embed_type"] == "text_time":
            self.added_width, self.time_id_width = _added_widths(c)
            self.add_embedding = TimestepMLP(self.added_width, time_width)
        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]  # widths of the feature maps kept for the way up
        for i, (kind, width) in enumerate(zip(_kinds(c, "down", levels), widths)):
            inputs = [skips[-1]] + [width] * (layers[i] - 1)
            attentions = [attention(i, depth) for depth in down_depths[i]] if kind else []
            stage = Stage(inputs, width, time_width, attentions, c)
            skips += [width] * layers[i]
            if i < levels - 1:
                stage.downsamplers = nn.ModuleList([Downsample(width)])
                skips.append(width)
            self.down_blocks.append(stage)
        if c["mid_block_type"] is not None:
            middle = attention(levels - 1, down_depths[-1][0]) if c["mid_block_type"].endswith("CrossAttn") else None
            self.mid_block = MidBlock(widths[-1], time_width, middle, c)
        self.up_blocks = nn.ModuleList()
        below = widths[-1]
        for i, kind in enumerate(_kinds(c, "up", levels)):
            level = levels - 1 - i
            inputs = []
            for _ in range(layers[level] + 1):
                inputs.append(below + skips.pop())
                below = widths[level]
            attentions = [attention(level, depth) for depth in up_depths[i]] if kind else []
            stage = Stage(inputs, below, time_width, attentions, c)
            if level > 0:
                stage.upsamplers = nn.ModuleList([Upsample(below)])
            self.up_blocks.append(stage)
        self.conv_norm_out = GroupNorm(c["norm_num_groups"], widths[0], c["norm_eps"])
        self.conv_out = Conv2d(widths[0], c["out_channels"], 3, padding=1)

    def second_conditioning(self, pooled: Tensor, time_ids: Tensor) -> Tensor:
        """SDXL's `added` (B,A): the pooled text (B,P) beside the sinusoids of the time ids (B,6).

        Time ids are height and width of the original image, top and left of the crop, and height and width that are
        asked for, in pixels (Podell et al. 2023, section 2.2).
        """
        sinusoids = timestep_embedding(time_ids.flatten(), self.time_id_width).view(len(time_ids), -1)
        return torch.cat([pooled, sinusoids.to(pooled.dtype)], dim=1)

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor, added: Tensor | None = None) -> Tensor:
        """Latents (B,C,h,w) of any size, timesteps (B,), text context (B,L,D) -> prediction (B,C,h,w).

        `added` (B,A) is SDXL's second conditioning, made by `second_conditioning`; None for the other families.
        """
        time = timestep_embedding(timesteps, self.conv_in.out_channels)
        time = self.time_embedding(time.to(latents.dtype))
        if (added is None) != (self.added_width == 0):
            takes = "no second conditioning" if added is not None else f"a second conditioning (B,{self.added_width})"
            raise ValueError(f"added: this UNet takes {takes}")
        if added is not None:
            time = time + self.add_embedding(added.to(latents.dtype))
        x = self.conv_in(latents)
        skips = [x]
        for stage in _stages(self.down_blocks):
            for i in range(len(stage.resnets)):
                x = self._run(stage.layer, i, x, time, context)
                skips.append(x)
            if hasattr(stage, "downsamplers"):
                x = stage.downsamplers[0](x)
                skips.append(x)
        if hasattr(self, "mid_block"):
            x = self._run(self.mid_block, x, time, context)
        for stage in _stages(self.up_blocks):
            for i in range(len(stage.resnets)):
                x = self._run(stage.layer, i, torch.cat([x, skips.pop()], dim=1), time, context)
            if hasattr(stage, "upsamplers"):
                x = stage.upsamplers[0](x, skips[-1].shape[-2:])
        return norm_silu_conv(x, self.conv_norm_out, self.conv_out)

    def _run(self, block: Callable[..., Tensor], *inputs: Any) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]
        return block(*inputs)


def _check_size(sample_size: Any) -> None:
    size = sample_size if isinstance(sample_size, list) else [sample_size or 1] * 2
    if len(size) != 2 or any(type(n) is not int or n < 1 for n in size):
        raise ValueError(f"UNet2DConditionModel config: sample_size={sample_size!r} is not a size")


def _context_width(c: dict[str, Any]) -> int:
    """The width D of the text context, which is that of all levels."""
    context = c["cross_attention_dim"]
    if isinstance(context, list) and len(set(context)) == 1:  # one a level
        context = context[0]
    if not isinstance(context, int):
        raise ValueError(
            f"UNet2DConditionModel config: cross_attention_dim={context!r} is not supported; accepted: one"
        )
    return context


def _added_widths(c: dict[str, Any]) -> tuple[int, int]:
    """The widths of SDXL's second conditioning (B,A) and of the sinusoids of one of its time ids."""
    added, time_id = c["projection_class_embeddings_input_dim"], c["addition_time_embed_dim"]
    if type(added) is not int or type(time_id) is not int:
        raise ValueError(
            "UNet2DConditionModel config: addition_embed_type='text_time' is not supported without the widths "
            "projection_class_embeddings_input_dim and addition_time_embed_dim; accepted: both, or null"
        )
    return added, time_id


def _depths(c: dict[str, Any], layers: list[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Transformer blocks in each attention of each level, on the way down and on the way up (from the lowest level).

    The way up has a layer more a level. Distilled networks give lists for a level, and the way up by its own key.
    """

    def listed(values: list, counts: list[int], key: str) -> list[list[int]]:
        depths = [[value] * count if type(value) is int else value for value, count in zip(values, counts)]
        for depth, count in zip(depths, counts):
            if (
                not isinstance(depth, list)
                or len(depth) < count
                or any(type(n) is not int or not 0 <= n <= MOST for n in depth)
            ):
                raise ValueError(
                    f"UNet2DConditionModel config: {key}={values!r} is not supported; accepted: one number, one a "
                    "level, or lists with one a layer"
                )
        return [depth[:count] for depth, count in zip(depths, counts)]

    key = "transformer_layers_per_block"
    down = c[key] if isinstance(c[key], list) else [c[key]] * len(layers)
    up = down[::-1] if c["reverse_" + key] is None else c["reverse_" + key]
    for name, values in ((key, down), ("reverse_" + key, up)):
        if not isinstance(values, list) or len(values) != len(layers):
            has = len(values) if isinstance(values, list) else 1
            raise ValueError(f"UNet2DConditionModel config: {name} has {has} entries for {len(layers)} levels")
    depths = listed(down, layers, key), listed(up, [n + 1 for n in layers[::-1]], "reverse_" + key)
    if sum(layers) + sum(sum(map(sum, way)) for way in depths) > MOST:
        raise ValueError(f"UNet2DConditionModel config: more than {MOST} layers and transformer blocks")
    return depths


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
            raise ValueError(f"UNet2DConditionModel config: {key} has {name!r}; accepted: {', '.join(known)}")
    return [known[name] for name in c[key]]
