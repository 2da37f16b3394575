"""The pieces that the UNet and the autoencoder share: time embedding, residual block, transformer block, resampling.

Submodules are named so that state-dict keys equal diffusers'. Shapes: B batch, C channels, h,w spatial size, L tokens,
D width of the text context.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MOST = 1024  # heads or layers
OFF: tuple = (None, False, [], {})  # values that switch an unsupported setting off


class _Unfilled:
    """Initialises nothing on the meta device, where weights are assigned later: twice as fast to build."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # type: ignore[attr-defined]
            super().reset_parameters()  # type: ignore[misc]  # torch's layer is the other base


class Linear(_Unfilled, nn.Linear): ...


class Conv2d(_Unfilled, nn.Conv2d):
    @property
    def kernel(self) -> Tensor:
        """The weight, to which an adapter adds."""
        return self.weight


class GroupNorm(_Unfilled, nn.GroupNorm): ...


class LayerNorm(_Unfilled, nn.LayerNorm): ...


class Embedding(_Unfilled, nn.Embedding): ...


def read_config(kind: str, config: dict[str, Any], settings: dict[str, Any], built: dict[str, tuple]) -> dict[str, Any]:
    """The settings of a network out of a checkpoint's config.json, or ValueError for an unsupported one.

    `settings` maps each key that the network reads to its default; `built` maps each other key that would change the
    network to the supported values, the first being the default; a list of such values is one a level. Keys in
    neither table change no network: settings of a trainer or of a moving average, notes.
    """
    for key, values in built.items():
        value = config.get(key, values[0])
        if value not in values and not (isinstance(value, list) and all(entry in values for entry in value)):
            raise ValueError(f"{kind} config: {key}={value!r} is not supported; accepted: {_listed(values)}")
    read = {key: values[0] for key, values in built.items()} | settings
    return read | {key: value for key, value in config.items() if key in read}


def _listed(values: tuple) -> str:
    return ", ".join(repr(value) for value in values)


def count(config: dict[str, Any], key: str) -> int:
    """config[key], a number of layers; ValueError for one that is none, or so large that building would not end."""
    value = config[key]
    if type(value) is not int or not 1 <= value <= MOST:
        raise ValueError(f"config: {key}={value!r} is out of range; accepted: 1 to {MOST}")
    return value


def check_heads(width: int, heads: int) -> int:
    """`heads`, or ValueError where they do not divide the width."""
    if width % heads:
        raise ValueError(f"config: {heads} attention heads do not divide a width of {width}")
    return heads


def per_level(value: int | list[int], levels: int, key: str) -> list[int]:
    """A config value that is one number for all resolution levels or a list with one number a level."""
    values = [value] * levels if isinstance(value, int) else list(value)
    if len(values) != levels:
        raise ValueError(f"config: {key} has {len(values)} entries for {levels} levels")
    if any(not isinstance(entry, str) and (type(entry) is not int or not 1 <= entry <= MOST) for entry in values):
        raise ValueError(
            f"config: {key}={value!r} is not supported; accepted: one value of 1 to {MOST}, or one a level"
        )
    return values


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """Sinusoids of the timesteps (B,) as (B, width) float32, cosines first (Ho et al. 2020, section 4)."""
    half = width // 2
    steps = torch.arange(half, device=timesteps.device, dtype=torch.float32)
    frequencies = torch.exp(-math.log(10000) * steps / half)  # in this order every bit is diffusers'
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepMLP(nn.Module):
    """Sinusoids (B, width_in) -> time embedding (B, width)."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.linear_1 = Linear(width_in, width)
        self.linear_2 = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


def recomputed(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    """function(x), of which only x is kept: the backward pass computes what lies between once more (Chen et al. 2016).

    The last operation of `function` is not repeated, as only its inputs are missing. So elementwise operations ahead
    of a convolution or a matrix product take no memory, for little time.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # a compiler weighs for itself what to keep
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


def norm_silu_conv(x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d) -> Tensor:
    """conv(SiLU(norm(x))) that keeps only x for the backward pass, and without one works in the norm's memory."""
    inplace = not torch.is_grad_enabled()
    return recomputed(lambda x: conv(F.silu(norm(x), inplace=inplace)), x)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with group norm and SiLU, the time embedding added between: (B,C,h,w) -> (B,C',h,w)."""

    def __init__(self, channels: int, out_channels: int, groups: int, eps: float, time_width: int | None = None):
        super().__init__()
        self.norm1 = GroupNorm(groups, channels, eps)
        self.conv1 = Conv2d(channels, out_channels, 3, padding=1)
        if time_width is not None:
            self.time_emb_proj = Linear(time_width, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.conv_shortcut = Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = norm_silu_conv(x, self.norm1, self.conv1)
        if time is not None:
            h += self.time_emb_proj(F.silu(time))[:, :, None, None]  # a convolution does not keep what it returns
        h = norm_silu_conv(h, self.norm2, self.conv2)
        h += self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x
        return h


class Attention(nn.Module):
    """Multi-head attention of norm(x) (B,N,C) to context (B,L,D), or to itself: (B,N,C).

    The backward pass computes the norm again, and for self-attention two of the three projections.
    """

    def __init__(
        self, channels: int, heads: int, context: int | None = None, *, bias: bool = False, upcast: bool = False
    ):
        super().__init__()
        self.heads, self.upcast = check_heads(channels, heads), upcast
        self.to_q = Linear(channels, channels, bias=bias)
        self.to_k = Linear(context or channels, channels, bias=bias)
        self.to_v = Linear(context or channels, channels, bias=bias)
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor | None = None, norm: nn.Module | None = None) -> Tensor:
        own = [self.to_q, self.to_k, self.to_v] if context is None else [self.to_q]

        def project(x: Tensor) -> list[Tensor]:
            x = x if norm is None else norm(x)
            return [linear(x) for linear in own]

        projected = project(x) if norm is None else recomputed(project, x)
        if context is not None:
            projected += [self.to_k(context), self.to_v(context)]
        q, k, v = (tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2) for tensor in projected)
        if self.upcast:  # SD 2.1 overflows in float16 without it
            q, k, v = q.float(), k.float(), v.float()
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.to_out[0](out.to(x.dtype))


class GEGLU(nn.Module):
    """Linear layer whose second half gates the first by GELU (Shazeer 2020)."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.proj = Linear(channels, 2 * out_channels)

    @staticmethod
    def gate(x: Tensor) -> Tensor:
        """(B,N,2C) -> (B,N,C)"""
        hidden, gate = x.chunk(2, dim=-1)
        return hidden * F.gelu(gate)


class FeedForward(nn.Module):
    """Gated feed-forward of norm(x) (B,N,C), whose norm and gate the backward pass computes again."""

    def __init__(self, channels: int):
        super().__init__()
        # the gap at index 1 is diffusers' dropout, which has no weights
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), Linear(4 * channels, channels)])

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        geglu, _, last = self.net
        hidden = recomputed(lambda x: geglu.proj(norm(x)), x)  # type: ignore[operator, union-attr]
        return recomputed(lambda h: last(geglu.gate(h)), hidden)  # type: ignore[operator, union-attr]


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward: x (B,N,C), context (B,L,D) -> (B,N,C)."""

    def __init__(self, channels: int, heads: int, context: int, upcast: bool):
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn1 = Attention(channels, heads, upcast=upcast)
        self.norm2 = LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context, upcast=upcast)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.attn1(x, norm=self.norm1).add_(x)
        x = self.attn2(x, context, self.norm2).add_(x)
        return self.ff(x, self.norm3).add_(x)


class Transformer2D(nn.Module):
    """Transformer blocks over the pixels of a feature map: x (B,C,h,w), context (B,L,D) -> (B,C,h,w)."""

    def __init__(
        self, channels: int, heads: int, context: int, groups: int, depth: int, linear: bool, upcast: bool = False
    ):
        super().__init__()
        self.linear = linear  # SD 2.x projects after flattening, SD 1.x by a 1x1 convolution: same maths, other keys
        self.norm = GroupNorm(groups, channels, 1e-6)
        self.proj_in = Linear(channels, channels) if linear else Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, heads, context, upcast) for _ in range(depth)]
        )
        self.proj_out = Linear(channels, channels) if linear else Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        size = x.shape[-2:]
        h = self.norm(x).contiguous(memory_format=torch.channels_last)  # whose tokens are contiguous
        h = self.proj_in(tokens(h)) if self.linear else tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, context)
        h = pixels(self.proj_out(h), size) if self.linear else self.proj_out(pixels(h, size))
        return x + h  # in the memory format of x


def tokens(x: Tensor) -> Tensor:
    """(B,C,h,w) -> (B,h*w,C)"""
    return x.flatten(2).transpose(1, 2)


def pixels(x: Tensor, size: torch.Size) -> Tensor:
    """(B,h*w,C) -> (B,C,h,w)"""
    return x.transpose(1, 2).unflatten(2, tuple(size))


class Downsample(nn.Module):
    """3x3 convolution of stride 2: (B,C,h,w) -> (B,C,ceil(h/2),ceil(w/2)).

    With padding 0 (the VAE) only the right and lower edge are padded, and odd sizes round down.
    """

    def __init__(self, channels: int, padding: int = 1):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.conv.padding == (0, 0) else x)


class Upsample(nn.Module):
    """Nearest-neighbour enlargement to `size` (default: doubled), then a 3x3 convolution.

    Doubled, both are one transposed convolution of stride 2 whose 4x4 kernel is the 3x3 one under a 2x2 box: 16
    products for every pixel of x where the enlarged image takes 36, and no enlarged image.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        if size is not None and tuple(size) != (2 * x.shape[2], 2 * x.shape[3]):
            return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))
        return recomputed(self._doubled, x)  # or the kernel, larger than the weights, would be kept

    def _doubled(self, x: Tensor) -> Tensor:
        weight = self.conv.kernel
        taps = torch.eye(9, dtype=weight.dtype, device=weight.device).view(9, 1, 3, 3)
        boxes = F.avg_pool2d(taps.flip(2, 3), 2, stride=1, padding=1, divisor_override=1).flatten(1)  # (9,16)
        kernel = (weight.flatten(2) @ boxes).unflatten(2, (4, 4)).transpose(0, 1)
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)
