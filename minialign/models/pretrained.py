"""Checkpoints in and out: where a source's files are, a network's config and weights from and to a folder.

Weights are safetensors only; nothing from a checkpoint is executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..files import (
    CONVERT,
    MALFORMED,
    PICKLES,
    InputError,
    first_line,
    read_json,
    read_weights,
    write_tensors,
)

EMBEDDED = Path(__file__).parent.parent / "shapes" / "checkpoint"
WEIGHTS = ("diffusion_pytorch_model", "model")  # diffusers' and transformers' file names
ACCEPTED = (
    "accepted: a folder in the diffusers layout or a hub id such as owner/name, or a .safetensors file in the original "
    "layout"
)
Network = TypeVar("Network", bound=nn.Module)


def weights_names(name: str, variant: str | None = None) -> tuple[str, str]:
    """The weights' file beside config.json, and the index of weights in several files; variant is such as "fp16"."""
    infix = f".{variant}" if variant else ""
    return f"{name}{infix}.safetensors", f"{name}.safetensors.index{infix}.json"


def weights_patterns(folder: str, name: str, variant: str | None = None) -> list[str]:
    """What to fetch of a hub repository for one network: its config, and its weights in one file or in shards."""
    single, index = weights_names(name, variant)
    first, last = (f".{variant}", f".{variant}") if variant else ("", "")
    shards = {f"{name}{first}-?????-of-?????.safetensors", f"{name}-?????-of-?????{last}.safetensors"}
    return [folder + file for file in ("config.json", single, index, *sorted(shards))]


def resolve(
    source: str | Path | None,
    patterns: list[str],
    *,
    accepted: str = ACCEPTED,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Where a source is: None is the bundled model, a folder or .safetensors file is itself, a hub id fetched.

    Of a hub repository only files that match `patterns` are fetched; what is in the cache needs no network. `accepted`
    is said where the source is none. The other keywords are huggingface_hub's; its environment variables (HF_TOKEN,
    HF_HOME, HF_HUB_OFFLINE) work too.
    """
    if source is None:
        return EMBEDDED
    path = Path(source)
    try:
        if path.is_dir():
            return path
        is_file = path.is_file()
    except OSError as error:  # a name too long, a folder that may not be looked into
        raise InputError(f"{source}: cannot be read ({error.strerror})") from error
    if is_file and path.suffix == ".safetensors":
        return path
    if is_file:
        raise InputError(f"{source}: {CONVERT if path.suffix in PICKLES else 'a file'}; {accepted}")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(source)):
        raise InputError(f"{source}: not found; {accepted}")
    from huggingface_hub import snapshot_download  # slow to import, and most runs need no hub

    options: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    options = {key: value for key, value in options.items() if value}
    try:
        return Path(str(snapshot_download(str(source), revision=revision, allow_patterns=patterns, **options)))
    except Exception as error:  # the hub's errors, those of its HTTP library and of proxies have no common base
        raise InputError(
            f"{source}: neither a folder nor a hub id that can be fetched ({first_line(error)})"
        ) from error


def load_network(
    build: Callable[[dict[str, Any]], Network],
    folder: Path,
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> Network:
    """A network from `folder`/config.json and its weights `name`, see `build_network`."""
    config_path = folder / "config.json"
    config = read_json(config_path)
    files = weights_files(folder, name, variant)
    weights: dict[str, Tensor] = {}
    for path in files:
        weights |= read_weights(path)
    place = files[0] if len(files) == 1 else folder
    return build_network(build, config, weights, config_path, place, device=device, dtype=dtype)


def build_network(
    build: Callable[[dict[str, Any]], Network],
    config: dict[str, Any],
    weights: dict[str, Tensor],
    config_path: Path,
    weights_path: Path,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
) -> Network:
    """The network of a config with these weights, in evaluation mode.

    Built on the meta device, and weights are assigned: nothing is initialised only to be overwritten, and what is
    stored as `dtype` stays mapped from its file. Keys of older exports are brought to today's names by the network's
    `current_key`, and those that begin like one of its `unused` are left out. InputError names the file and the key of
    an unsupported config value and of weights that are missing, unexpected or of another shape.
    """
    try:
        with torch.device("meta"):
            network = build(config)
    except MALFORMED as error:
        raise InputError(f"{config_path}: {first_line(error)}") from error
    current_key: Callable[[str], str] = getattr(network, "current_key", str)
    unused: tuple[str, ...] = getattr(network, "unused", ())
    # position_ids are a buffer of older exports that holds 0, 1, 2, ...
    weights = {key: t for key, t in weights.items() if not key.endswith("position_ids") and not key.startswith(unused)}
    named = {current_key(key): tensor for key, tensor in weights.items()}
    if len(named) < len(weights):
        raise InputError(f"{weights_path}: has a weight twice, under its name of today and an older one")
    weights, expected = named, dict(network.named_parameters())
    for problem, keys in (
        ("lacks", expected.keys() - weights.keys()),
        ("has unexpected", weights.keys() - expected.keys()),
    ):
        if keys:
            raise InputError(f"{weights_path}: {problem} {', '.join(sorted(keys)[:3])} ({len(keys)} keys in all)")
    for key, tensor in weights.items():
        shape = expected[key].shape
        if tensor.shape == (*shape, 1, 1):  # a linear layer that was a 1x1 convolution
            weights[key] = tensor[..., 0, 0]
        elif tensor.shape != shape:
            raise InputError(f"{weights_path}: {key} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        if not tensor.is_floating_point():
            raise InputError(f"{weights_path}: {key} is of {tensor.dtype}; accepted: floating point")
    modules = dict(network.named_modules())
    for key, tensor in weights.items():
        path, _, name = key.rpartition(".")
        setattr(modules[path], name, nn.Parameter(tensor.to(device, dtype)))
    return network.eval()


def variants(folder: Path, name: str) -> set[str | None]:
    """The variants of a network's weights that a folder has, such as "fp16", and None for weights without one."""
    pattern = re.compile(rf"{name}(?:\.(\w+))?\.safetensors|{name}\.safetensors\.index(?:\.(\w+))?\.json")
    matches = (pattern.fullmatch(path.name) for path in folder.glob(f"{name}.*"))
    return {match[1] or match[2] for match in matches if match}


def weights_files(folder: Path, name: str, variant: str | None = None) -> list[Path]:
    """The safetensors files of a network's folder; a pickled one is refused with the way to convert it.

    Where the network has not the variant, its weights without one are read, and where it has no such, those of the one
    variant that is there.
    """
    there = variants(folder, name)
    if variant not in there:
        variant = next(iter(there)) if len(there) == 1 else None
    single, index = weights_names(name, variant)
    if (folder / single).is_file():
        return [folder / single]
    if (folder / index).is_file():
        named = read_json(folder / index).get("weight_map")
        if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
            raise InputError(f"{folder / index}: weight_map is needed, with a file name for each weight")
        for file in sorted(set(named.values())):
            if not re.fullmatch(r"[\w.-]+\.safetensors", file):
                raise InputError(f"{folder / index}: {file!r} is not the name of a .safetensors file beside it")
        return [folder / file for file in sorted(set(named.values()))]
    if there:
        named = " or ".join(sorted(map(str, there)))
        raise InputError(f"{folder}: has weights of variants alone; accepted: variant={named}")
    for path in sorted(folder.glob("*")):
        if path.suffix in PICKLES:
            raise InputError(f"{path}: {CONVERT}")
    # of a hub repository neither pickles nor variants that were not asked for are fetched
    raise InputError(f"{folder}: no weights; accepted: {single} or {index}, or a variant by its name ({CONVERT})")


def save_network(network: nn.Module, folder: Path, name: str = WEIGHTS[0], dtype: torch.dtype | None = None) -> None:
    """Write config.json and the weights, as `dtype` if given, so that diffusers or transformers load them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(network.config, indent=2) + "\n", encoding="utf-8")
    weights = {key: tensor.to("cpu", dtype) for key, tensor in network.state_dict().items()}
    # with one entry of metadata, since safetensors writes two in an order of its own and the bytes would differ
    write_tensors(folder / f"{name}.safetensors", weights, {"format": "pt"})
    for stale in (folder / weights_names(name)[1], *folder.glob(f"{name}-?????-of-?????.safetensors")):
        stale.unlink(missing_ok=True)  # of a model in shards that was here before: diffusers would read them
