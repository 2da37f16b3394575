"""Low-rank adapters of a UNet's attention (Hu et al. 2022): W x + B A x, of which A and B alone are trained.

adapters = add_lora(pipe.unet, rank=8)       # the UNet's own weights are frozen
...                                          # train `adapters`
save_lora(pipe.unet, "lora.safetensors")     # diffusers' load_lora_weights reads it
merge_lora(pipe.unet)                        # W + B A: a plain UNet again, until unmerge_lora
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .blocks import Attention
from .pretrained import MALFORMED, InputError, first_line, read_weights

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
# the names in adapter files: of today, of peft's predecessors, and of the first attention processors
NAME = re.compile(
    r"(?:unet\.)?(?:base_model\.model\.)?(?P<layer>.+?)\.(?:lora_(?P<today>[AB])|lora\.(?P<old>down|up))\.weight"
)


class LoRALinear(nn.Linear):
    """A linear layer with an adapter of rank r: x (...,N) -> W x + b + scale B A x, A (r,N), B (M,r)."""

    def __init__(self, layer: nn.Linear, a: Tensor, b: Tensor, scale: float):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A, self.lora_B, self.scale = nn.Parameter(a), nn.Parameter(b), scale

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def add_lora(unet: nn.Module, rank: int, alpha: float | None = None) -> list[nn.Parameter]:
    """Freeze `unet`, give every attention projection an adapter that adds nothing yet; the adapters' parameters.

    The adapter's part is scaled by alpha / rank; alpha is the rank unless given, so that the scale is one.
    """
    if rank < 1 or adapters(unet):
        raise ValueError(f"rank={rank}: accepted: 1 or more, on a UNet without adapters")
    unet.requires_grad_(False)
    for path, block in list(unet.named_modules()):
        if isinstance(block, Attention):
            for name in PROJECTIONS:
                layer = block.get_submodule(name)
                assert isinstance(layer, nn.Linear)
                a = torch.empty(rank, layer.in_features, device=layer.weight.device, dtype=layer.weight.dtype)
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as nn.Linear's own
                b = torch.zeros(layer.out_features, rank, device=a.device, dtype=a.dtype)
                unet.set_submodule(f"{path}.{name}", LoRALinear(layer, a, b, (rank if alpha is None else alpha) / rank))
    return [p for layer in adapters(unet).values() for p in (layer.lora_A, layer.lora_B)]


def adapters(unet: nn.Module) -> dict[str, LoRALinear]:
    """The layers that have an adapter, by name."""
    return {name: layer for name, layer in unet.named_modules() if isinstance(layer, LoRALinear)}


@torch.no_grad()
def merge_lora(unet: nn.Module) -> None:
    """Put plain layers with the weight W + scale B A in place of those with adapters."""
    for name, layer in adapters(unet).items():
        merged = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        change = layer.scale * layer.lora_B.double() @ layer.lora_A.double()
        merged.weight = nn.Parameter((layer.weight.double() + change).to(layer.weight.dtype), requires_grad=False)
        merged.bias = layer.bias
        merged.__dict__["unmerged"] = layer  # not a submodule: the state dict is a plain UNet's
        unet.set_submodule(name, merged)


def unmerge_lora(unet: nn.Module) -> None:
    """Undo `merge_lora`, bit by bit: the merged layers have kept what they stand for."""
    for name, layer in list(unet.named_modules()):
        if "unmerged" in layer.__dict__:
            unet.set_submodule(name, layer.__dict__["unmerged"].to(layer.weight))  # the UNet may have moved


def save_lora(unet: nn.Module, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the adapters as diffusers reads them; their scale is taken into B."""
    weights = {}
    for name, layer in adapters(unet).items():
        for key, tensor in (("lora_A", layer.lora_A), ("lora_B", layer.scale * layer.lora_B)):
            weights[f"unet.{name}.{key}.weight"] = tensor.detach().to("cpu", dtype).contiguous()
    if not weights:
        raise ValueError("this UNet has no adapters; unmerge_lora first if they are merged")
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")  # a name that the next run of a command removes
    save_file(weights, temporary, {"format": "pt"})
    os.replace(temporary, path)


def load_lora(unet: nn.Module, path: str | Path) -> None:
    """Give `unet` the adapters of a file, diffusers' own or `save_lora`'s; InputError names what does not fit."""
    path = Path(path)
    if adapters(unet):
        raise ValueError("this UNet has adapters already; merge_lora first")
    weights = read_weights(path)
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        key = re.sub(r"\.processor\.(to_\w+)_lora\.", r".\1.lora.", key).replace(".to_out.lora.", ".to_out.0.lora.")
        match = NAME.fullmatch(key)
        if match is None:
            if key.endswith(".alpha"):
                continue
            raise InputError(f"{path}: {key} is not an adapter of a UNet's linear layer in diffusers' names")
        half = {"down": "A", "up": "B"}.get(match["old"], match["today"])
        halves.setdefault(match["layer"], {})[half] = tensor
    if not halves:
        raise InputError(f"{path}: has no adapters")
    settings, modules, found = _settings(path), dict(unet.named_modules()), {}
    for name, pair in halves.items():
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear):
            raise InputError(f"{path}: {name} is not a linear layer of this UNet")
        if pair.keys() != {"A", "B"}:
            raise InputError(f"{path}: {name} has one half of an adapter only")
        a, b = pair["A"], pair["B"]
        rank = a.shape[0] if a.ndim == 2 else 0
        if rank < 1 or a.shape[1] != layer.in_features or b.shape != (layer.out_features, rank):
            has = f"A {tuple(a.shape)} and B {tuple(b.shape)}"
            raise InputError(f"{path}: {name} has {has}, expected (r,{layer.in_features}) and ({layer.out_features},r)")
        stored = [weights[key] for key in (f"unet.{name}.alpha", f"{name}.alpha") if key in weights]
        try:
            scale = _scale(name, rank, float(stored[0]) if stored else None, settings)
        except MALFORMED as error:
            raise InputError(f"{path}: alpha of {name} cannot be read ({first_line(error)})") from error
        found[name] = LoRALinear(layer, a.to(layer.weight), b.to(layer.weight), scale)
    unet.requires_grad_(False)
    for name, adapted in found.items():
        unet.set_submodule(name, adapted)


def _settings(path: Path) -> dict[str, Any]:
    """peft's settings, which diffusers keeps in the file's metadata, each under "unet." or bare."""
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        return {key.removeprefix("unet."): value for key, value in json.loads(text).items()}
    except MALFORMED as error:
        raise InputError(f"{path}: its lora_adapter_metadata cannot be read ({error})") from error


def _scale(name: str, rank: int, alpha: float | None, settings: dict[str, Any]) -> float:
    """alpha / rank, or alpha / sqrt(rank) of rank-stabilised adapters (Kalajdzievski 2023)."""
    if alpha is None:
        alpha = settings.get("lora_alpha", rank)
        for end, value in (settings.get("alpha_pattern") or {}).items():  # as peft does, the first that matches
            if f".{name}".endswith(f".{end}"):
                alpha = value
                break
    scale = float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)  # type: ignore[arg-type]
    if not math.isfinite(scale):
        raise ValueError(f"{alpha} is not finite")
    return scale
