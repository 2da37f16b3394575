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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

EMBEDDED = Path(__file__).parent.parent / "shapes" / "checkpoint"
WEIGHTS = ("diffusion_pytorch_model", "model")  # diffusers' and transformers' file names
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
CONVERT = (
    "pickled weights can run code and are refused; convert them with diffusers or transformers: load them there and "
    "call save_pretrained(folder, safe_serialization=True)"
)
Network = TypeVar("Network", bound=nn.Module)


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that names it and says what is accepted."""


MALFORMED = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError)  # what nonsense in a config raises


def weights_name(name: str, variant: str | None = None) -> str:
    """A weights file's name: variant "fp16" is kept beside the plain one as name.fp16.safetensors."""
    return f"{name}.{variant}.safetensors" if variant else f"{name}.safetensors"


def resolve(source: str | Path | None, patterns: list[str], revision: str | None = None) -> Path:
    """The folder of a source: None is the embedded checkpoint, a path is itself, else a hub id is downloaded.

    Of a hub repository only files that match `patterns` are fetched; what is in the cache needs no network.
    """
    if source is None:
        return EMBEDDED
    try:
        if Path(source).is_dir():
            return Path(source)
        is_file = Path(source).is_file()
    except OSError as error:  # a name too long, a folder that may not be looked into
        raise InputError(f"{source}: cannot be read ({error.strerror})") from error
    if is_file:
        raise InputError(f"{source}: a file; accepted: a folder in the diffusers layout or a hub id such as owner/name")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(source)):
        raise InputError(
            f"{source}: not found; accepted: a folder in the diffusers layout or a hub id such as owner/name"
        )
    from huggingface_hub import snapshot_download  # slow to import, and most runs need no hub

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
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
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object is needed, not {type(value).__name__}")
    return value


def load_network(
    build: Callable[[dict[str, Any]], Network],
    folder: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    prefix: str = "",
) -> Network:
    """A network from `folder`/config.json and its weights, in evaluation mode.

    Built on the meta device, so that nothing is initialised only to be overwritten. `prefix` is put before keys that
    lack it: transformers writes text towers with and without "text_model.". InputError names the file and the key of
    a config value that is not built and of weights that are missing, unexpected or of another shape.
    """
    config_path = folder / "config.json"
    config = read_json(config_path)
    try:
        with torch.device("meta"):
            network = build(config)
    except MALFORMED as error:
        raise InputError(f"{config_path}: {first_line(error)}") from error
    path = weights_file(folder, variant)
    weights = {
        key if key.startswith(prefix) else prefix + key: tensor
        for key, tensor in read_weights(path).items()
        if not key.endswith("position_ids")  # a buffer of older exports that holds 0, 1, 2, ...
    }
    expected = network.state_dict()
    for problem, keys in (
        ("lacks", expected.keys() - weights.keys()),
        ("has unexpected", weights.keys() - expected.keys()),
    ):
        if keys:
            raise InputError(f"{path}: {problem} {', '.join(sorted(keys)[:3])} ({len(keys)} keys in all)")
    for key, tensor in weights.items():
        if tensor.shape != expected[key].shape:
            raise InputError(f"{path}: {key} has shape {tuple(tensor.shape)}, expected {tuple(expected[key].shape)}")
    network.load_state_dict({key: tensor.to(device, dtype) for key, tensor in weights.items()}, assign=True)
    return network.eval()


def weights_file(folder: Path, variant: str | None = None) -> Path:
    """The safetensors file of a network's folder; a pickled one is refused with the way to convert it."""
    names = [weights_name(name, variant) for name in WEIGHTS]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    for path in sorted(folder.glob("*")):
        if path.suffix in PICKLES:
            raise InputError(f"{path}: {CONVERT}")
    # of a hub repository pickles are not even fetched
    raise InputError(f"{folder}: no weights; accepted: {' or '.join(names)} ({CONVERT})")


def read_weights(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error


def save_network(network: nn.Module, folder: Path, name: str = WEIGHTS[0], dtype: torch.dtype | None = None) -> None:
    """Write config.json and the weights, as `dtype` if given, so that diffusers or transformers load them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(network.config, indent=2) + "\n", encoding="utf-8")
    weights = {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in network.state_dict().items()}
    save_file(weights, folder / f"{name}.safetensors", {"format": "pt"})
