"""Low-rank adapters of a UNet's attention (Hu et al. 2022): W x + B A x, of which A and B alone are trained.

adapters = add_lora(pipe.unet, rank=8)       # the UNet's own weights are frozen
...                                          # train `adapters`
save_lora(pipe.unet, "lora.safetensors")     # diffusers' load_lora_weights reads it
merge_lora(pipe.unet)                        # W + B A: a plain UNet again, until unmerge_lora

`load_lora` reads the files of diffusers, peft and kohya's trainer, which may adapt any linear layer and convolution.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from ..files import MALFORMED, InputError, first_line, read_json, read_weights, write_tensors
from .blocks import OFF, Attention, Conv2d, Linear, read_config
from .original import unet_rules

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
Weights = dict[str, Tensor]

# How keys begin and end in adapter files: today's, those of the first attention processors, kohya's.
UNET = re.compile(r"(unet\.|base_model\.model\.|lora_unet_)*")
TEXT = ("text_encoder.", "text_encoder_2.", "lora_te_", "lora_te1_", "lora_te2_")
ENDS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora.down.weight": "A",
    "lora.up.weight": "B",
    "lora_down.weight": "A",
    "lora_up.weight": "B",
    "lora.alpha": "alpha",
    "alpha": "alpha",
}
KEY = re.compile(rf"(?P<layer>.+?)[._](?P<end>{'|'.join(map(re.escape, ENDS))})")
OTHER_KINDS = {"lora_magnitude_vector": "DoRA", "dora_scale": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT"}
OTHER_KINDS |= {"lora_mid": "LoCon with a core between A and B", ".bias": "an adapter of a bias"}

# peft's settings that matter to a network whose A and B are given, and what is built of the others
PEFT_SETTINGS: dict[str, Any] = {"lora_alpha": 8, "alpha_pattern": {}, "use_rslora": False}
PEFT_BUILT: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),  # the others change W
    "use_dora": OFF,
    "use_qalora": OFF,
    "use_bdlora": OFF,
    "lora_bias": OFF,
    "modules_to_save": OFF,
    "layer_replication": OFF,
    "target_parameters": OFF,
    "trainable_token_indices": OFF,
    "alora_invocation_tokens": OFF,
    "arrow_config": OFF,
    "kasa_config": OFF,
    "monteclora_config": OFF,
}


class Adapted(nn.Module):
    """A layer with an adapter of rank r, in place of `layer`, whose weight and bias it shares."""

    weight: Tensor
    bias: Any

    def _adapt(self, layer: nn.Linear | nn.Conv2d, a: Tensor, b: Tensor, scale: float) -> None:
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A, self.lora_B, self.scale = nn.Parameter(a), nn.Parameter(b), scale

    def change(self, dtype: torch.dtype) -> Tensor:
        """scale B A in the shape of the weight."""
        a, b = self.lora_A.flatten(1).to(dtype), self.lora_B.flatten(1).to(dtype)
        return (self.scale * b @ a).view_as(self.weight)


class LoRALinear(Adapted, Linear):
    """A linear layer with an adapter of rank r: x (...,N) -> W x + b + scale B A x, A (r,N), B (M,r)."""

    def __init__(self, layer: nn.Linear, a: Tensor, b: Tensor, scale: float):
        super().__init__(**_form(layer))
        self._adapt(layer, a, b, scale)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


class LoRAConv2d(Adapted, Conv2d):
    """A convolution with an adapter of rank r: its kernel is W + scale B A, A (r,C,k,k), B (M,r,1,1)."""

    def __init__(self, layer: nn.Conv2d, a: Tensor, b: Tensor, scale: float):
        super().__init__(**_form(layer))
        self._adapt(layer, a, b, scale)

    @property
    def kernel(self) -> Tensor:
        return self.weight + self.change(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.kernel, self.bias)


def _form(layer: nn.Module) -> dict[str, Any]:
    """What a linear layer or convolution of the same shapes, without weights, is built with."""
    if isinstance(layer, nn.Linear):
        names = ["in_features", "out_features"]
    else:
        names = ["in_channels", "out_channels", "kernel_size", "stride", "padding"]
    return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None, "device": "meta"}


def add_lora(unet: nn.Module, rank: int, alpha: float | None = None) -> list[nn.Parameter]:
    """Freeze `unet`, give every attention projection an adapter that adds nothing yet; the adapters' parameters.

    The adapter is scaled by alpha / rank; alpha is the rank unless given, so that the scale is one.
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


def adapters(unet: nn.Module) -> dict[str, Adapted]:
    """The layers that have an adapter, by name."""
    return {name: layer for name, layer in unet.named_modules() if isinstance(layer, Adapted)}


@torch.no_grad()
def merge_lora(unet: nn.Module) -> None:
    """Put plain layers with the weight W + scale B A in place of those with adapters."""
    for name, layer in adapters(unet).items():
        build: Any = Linear if isinstance(layer, Linear) else Conv2d
        merged = build(**_form(layer))
        weight = layer.weight.double() + layer.change(torch.float64)
        merged.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
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
            weights[f"unet.{name}.{key}.weight"] = tensor.to("cpu", dtype)
    if not weights:
        raise ValueError("this UNet has no adapters; unmerge_lora first if they are merged")
    write_tensors(Path(path), weights, {"format": "pt"})


def load_lora(unet: nn.Module, path: str | Path) -> None:
    """Give `unet` the adapters of a file, or of the folder that peft or diffusers writes it to.

    Read are the names of diffusers, peft (with adapter_config.json beside) and kohya's trainer, for XL in the original
    layout too. What the file has for text encoders is left out, with a warning. InputError names what does not fit.
    """
    path = Path(path)
    if path.is_dir():
        named = [path / "adapter_model.safetensors", path / "pytorch_lora_weights.safetensors"]
        path = next((file for file in named if file.exists()), named[0])
    if adapters(unet):
        raise ValueError("this UNet has adapters already; merge_lora first")
    weights = read_weights(path)
    text = [key for key in weights if key.startswith(TEXT)]
    by_layer = _by_layer(unet, {key: weights[key] for key in weights if key not in text}, path)
    settings, modules = _settings(path, peft=any("base_model.model." in key for key in weights)), {}
    for name, tensors in by_layer.items():
        layer = unet.get_submodule(name)
        a, b, rank = _halves(name, layer, tensors, path)
        try:
            scale = _scale(name, rank, float(tensors["alpha"]) if "alpha" in tensors else None, settings)
        except (re.error, *MALFORMED) as error:
            raise InputError(f"{path}: alpha of {name} cannot be read ({first_line(error)})") from error
        adapt: Any = LoRALinear if isinstance(layer, nn.Linear) else LoRAConv2d
        modules[name] = adapt(layer, a, b, scale)
    unet.requires_grad_(False)
    for name, adapted in modules.items():
        unet.set_submodule(name, adapted)
    if text:
        message = f"{path}: its adapters of the UNet are read; those of text encoders ({len(text)} keys) are not"
        warnings.warn(message, stacklevel=2)


def _by_layer(unet: nn.Module, weights: Weights, path: Path) -> dict[str, Weights]:
    """The tensors of each adapted layer, A, B and alpha, by the layer's name.

    All names are compared with underscores for dots, since kohya's have no dots.
    """
    blocks: Any = unet.down_blocks
    rules = [(r"_processor_", "_"), (r"_to_out_$", "_to_out_0_")]
    rules += [
        (pattern.replace(r"\.", "_"), name.replace(".", "_"))
        for pattern, name in unet_rules(len(blocks[0].resnets), len(blocks))
    ]
    layers = {
        name.replace(".", "_"): name
        for name, module in unet.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    by_layer: dict[str, Weights] = {}
    for key, tensor in weights.items():
        kind = next((kind for mark, kind in OTHER_KINDS.items() if mark in key), None)
        match = KEY.fullmatch(key)
        if kind or match is None:
            raise InputError(f"{path}: {key} is {kind or 'no adapter'}; accepted: LoRA (A and B of a layer, alpha)")
        name = UNET.sub("", match["layer"], count=1).replace(".", "_") + "_"
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        layer = layers.get(name[:-1])
        if layer is None:
            raise InputError(f"{path}: {key}: this UNet has no such linear layer or convolution")
        tensors = by_layer.setdefault(layer, {})
        if ENDS[match["end"]] in tensors:
            raise InputError(f"{path}: {key} is there twice, under two names")
        tensors[ENDS[match["end"]]] = tensor
    if not by_layer:
        raise InputError(f"{path}: has no adapters of a UNet")
    return by_layer


def _halves(name: str, layer: nn.Module, tensors: Weights, path: Path) -> tuple[Tensor, Tensor, int]:
    """A and B in the shapes and precision of the layer, and their rank; a 1x1 kernel may be stored as a matrix."""
    if not {"A", "B"} <= tensors.keys():
        raise InputError(f"{path}: {name} has one half of an adapter only")
    a, b = tensors["A"], tensors["B"]
    weight: Any = layer.weight
    rank = a.shape[0] if a.ndim else 0

    def matrix(tensor: Tensor) -> torch.Size:
        return tensor.shape[:2] if tensor.shape[2:] == (1, 1) else tensor.shape

    if rank < 1 or matrix(a) != (rank, *matrix(weight)[1:]) or matrix(b) != (len(weight), rank):
        shapes = f"A {tuple(a.shape)} and B {tuple(b.shape)}"
        expected = ",".join(map(str, weight.shape[1:]))
        raise InputError(f"{path}: {name} has {shapes}, expected (r,{expected}) and ({len(weight)},r)")
    ones = (1,) * (weight.ndim - 2)
    return a.to(weight).reshape(rank, *weight.shape[1:]), b.to(weight).reshape(len(weight), rank, *ones), rank


def _settings(path: Path, peft: bool) -> dict[str, Any]:
    """peft's settings: diffusers keeps them in the file's metadata, under "unet." or bare, peft beside the file."""
    if peft:
        path = path.parent / "adapter_config.json"
        if not path.exists():
            raise InputError(f"{path}: is needed beside adapters in peft's names, since it says how they are scaled")
        settings = read_json(path)
    else:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
        try:
            items = json.loads(text).items()
            settings = {key.removeprefix("unet."): value for key, value in items if not key.startswith(TEXT)}
        except MALFORMED as error:
            raise InputError(f"{path}: its lora_adapter_metadata cannot be read ({error})") from error
    try:
        return read_config("peft adapter", settings, PEFT_SETTINGS, PEFT_BUILT) if settings else {}
    except MALFORMED as error:
        raise InputError(f"{path}: {first_line(error)}") from error


def _scale(name: str, rank: int, alpha: float | None, settings: dict[str, Any]) -> float:
    """alpha / rank, or alpha / sqrt(rank) of rank-stabilised adapters (Kalajdzievski 2023)."""
    if alpha is None:
        alpha = settings.get("lora_alpha", rank)
        for pattern, value in (settings.get("alpha_pattern") or {}).items():  # as peft does, the first that matches
            if re.fullmatch(rf"(.*\.)?({pattern})", name):
                alpha = value
                break
    scale = float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)  # type: ignore[arg-type]
    if not math.isfinite(scale):
        raise ValueError(f"{alpha} is not finite")
    return scale
