"""Checkpoints in and out: where a source's files are, a network's config and weights from and to a folder.

Weights are safetensors only; nothing from a checkpoint is executed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

EMBEDDED = Path(__file__).parent.parent / "shapes" / "checkpoint"
WEIGHTS = ("diffusion_pytorch_model", "model")  # diffusers' and transformers' file names
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
CONVERT = (
    "pickled weights can run code and are refused; convert them with diffusers or transformers: load them there "
    "(from_pretrained, from_single_file or load_lora_weights) and call save_pretrained(folder, "
    "safe_serialization=True) or save_lora_weights"
)
ACCEPTED = (
    "accepted: a folder in the diffusers layout or a hub id such as owner/name, or a .safetensors file in the original "
    "layout"
)
Network = TypeVar("Network", bound=nn.Module)


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that names it and says what is accepted."""


# what nonsense in a config raises
MALFORMED = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError, MemoryError)


def weights_names(name: str, variant: str | None = None) -> tuple[str, str]:
    """The weights' file beside config.json, and the index of weights in several files; variant is such as "fp16"."""
    part = f".{variant}" if variant else ""
    return f"{name}{part}.safetensors", f"{name}.safetensors.index{part}.json"


def weights_patterns(folder: str, name: str, variant: str | None = None) -> list[str]:
    """What to fetch of a hub repository for one network: its config, and its weights whole or in numbered parts."""
    whole, index = weights_names(name, variant)
    first, last = (f".{variant}", f".{variant}") if variant else ("", "")
    parts = {f"{name}{first}-?????-of-?????.safetensors", f"{name}-?????-of-?????{last}.safetensors"}
    return [folder + file for file in ("config.json", whole, index, *sorted(parts))]


def resolve(
    source: str | Path | None,
    patterns: list[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Where a source is: None is the embedded checkpoint, a folder or .safetensors file is itself, a hub id fetched.

    Of a hub repository only files that match `patterns` are fetched; what is in the cache needs no network. The
    keywords are huggingface_hub's; its environment variables (HF_TOKEN, HF_HOME, HF_HUB_OFFLINE) work too.
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
        raise InputError(f"{source}: {CONVERT if path.suffix in PICKLES else 'a file'}; {ACCEPTED}")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(source)):
        raise InputError(f"{source}: not found; {ACCEPTED}")
    from huggingface_hub import snapshot_download  # slow to import, and most runs need no hub

    how: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    how = {key: value for key, value in how.items() if value}
    try:
        return Path(str(snapshot_download(str(source), revision=revision, allow_patterns=patterns, **how)))
    except Exception as error:  # the hub's errors, those of its HTTP library and of proxies have no common base
        raise InputError(
            f"{source}: neither a folder nor a hub id that can be fetched ({first_line(error)})"
        ) from error


def first_line(error: Exception) -> str:
    """What went wrong, in one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def read_bytes(path: Path) -> bytes:
    """A file's content; InputError names a file that cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint or a run."""
    try:
        value = json.loads(read_bytes(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object is needed, not {type(value).__name__}")
    return value


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
    `current_key`. InputError names the file and the key of a config value that is not built and of weights that are
    missing, unexpected or of another shape.
    """
    try:
        with torch.device("meta"):
            network = build(config)
    except MALFORMED as error:
        raise InputError(f"{config_path}: {first_line(error)}") from error
    current_key: Callable[[str], str] = getattr(network, "current_key", str)
    # position_ids are a buffer of older exports that holds 0, 1, 2, ...
    weights = {key: tensor for key, tensor in weights.items() if not key.endswith("position_ids")}
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


def weights_files(folder: Path, name: str, variant: str | None = None) -> list[Path]:
    """The safetensors files of a network's folder; a pickled one is refused with the way to convert it."""
    whole, index = weights_names(name, variant)
    if (folder / whole).is_file():
        return [folder / whole]
    if (folder / index).is_file():
        named = read_json(folder / index).get("weight_map")
        if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
            raise InputError(f"{folder / index}: weight_map is needed, with a file name for each weight")
        for file in sorted(set(named.values())):
            if not re.fullmatch(r"[\w.-]+\.safetensors", file):
                raise InputError(f"{folder / index}: {file!r} is not the name of a .safetensors file beside it")
        return [folder / file for file in sorted(set(named.values()))]
    for path in sorted(folder.glob("*")):
        if path.suffix in PICKLES:
            raise InputError(f"{path}: {CONVERT}")
    # of a hub repository pickles are not even fetched
    raise InputError(f"{folder}: no weights; accepted: {whole} or {index} ({CONVERT})")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, mapped into memory, so that reading them is left to their first use."""
    if path.suffix in PICKLES:
        raise InputError(f"{path}: {CONVERT}")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError, *MALFORMED) as error:
        raise InputError(f"{path}: not a readable safetensors file ({first_line(error)})") from error


def save_network(network: nn.Module, folder: Path, name: str = WEIGHTS[0], dtype: torch.dtype | None = None) -> None:
    """Write config.json and the weights, as `dtype` if given, so that diffusers or transformers load them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(network.config, indent=2) + "\n", encoding="utf-8")
    weights = {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in network.state_dict().items()}
    path = folder / f"{name}.safetensors"
    # not in place, because the network's own weights may be mapped from that file
    save_file(weights, path.with_suffix(".tmp"), {"format": "pt", "made_by": "minialign"})
    os.replace(path.with_suffix(".tmp"), path)
    for stale in (folder / weights_names(name)[1], *folder.glob(f"{name}-?????-of-?????.safetensors")):
        stale.unlink(missing_ok=True)  # of a model in shards that was here before: diffusers would read them
