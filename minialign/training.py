"""What every training run needs: learning rates, moving averages, stateless randomness, checkpoints on disk."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .models.pretrained import InputError, first_line, read_weights

T = TypeVar("T")
STATE, CHECKSUM = "state.safetensors", "state.sha256"  # the files of a checkpoint


def generator(*key: int) -> torch.Generator:
    """A random generator that depends on the key alone, so that any step can be replayed without those before it."""
    state = 0
    for part in key:  # a multiplicative hash (Knuth 1998, section 6.4) keeps neighbouring keys apart
        state = ((state ^ part) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) % 2**63
    return torch.Generator().manual_seed(state)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 0, decay: float = 1.0) -> float:
    """Linear warm-up over `warmup` steps, constant, then cosine to zero over the last fraction `decay`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    start = steps * (1 - decay)
    if step < start or decay == 0:
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - start) / (steps - start)))


class EMA:
    """Exponential moving average of a model's weights: shadow <- decay * shadow + (1 - decay) * weights."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After step `step` (from 0). Young averages follow faster, so that they do not keep the first weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.weights.values()), [p.detach() for p in model.parameters()], 1 - decay)


def progress(items: Iterable[T], description: str, total: int | None = None, done: int = 0) -> Iterator[T]:
    """A progress bar on stderr with rate and time left."""
    yield from tqdm(items, description, total, initial=done, file=sys.stderr, dynamic_ncols=True, mininterval=0.5)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write a file or folder to; flushed and renamed to `path` at the end.

    A killed process leaves the old content or the new, never a part; of a folder that is replaced the old content may
    be left under the name that `remove_unfinished` puts back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        for file in [*temporary.rglob("*"), temporary] if temporary.is_dir() else [temporary]:
            _flush(file)
        if path.is_dir():  # a folder cannot be replaced in one step: move the old one aside first
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
        _flush(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process was writing by `atomic`; put back a folder that it had moved aside."""
    for old in folder.rglob(".*.old"):
        place = old.with_name(old.name[1:].rsplit(".", 2)[0])
        shutil.rmtree(old) if place.exists() else os.replace(old, place)
    for left in folder.rglob(".*.tmp"):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    with atomic(path) as temporary:
        save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, temporary, metadata)


class Terminated(Exception):
    """The process was asked to end and has saved what it did."""


class Stop:
    """`asked` turns true at SIGTERM, by which clusters announce the end, so that a step ends and a checkpoint is kept.

    As a context; in another thread than the main one, where Python takes no signals, it never does.
    """

    asked = False

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True

    def __exit__(self, *error: object) -> None:
        if hasattr(self, "before"):
            signal.signal(signal.SIGTERM, self.before)


KEEP = 2  # checkpoints of a run: a damaged one falls back to the one before


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None = None
) -> None:
    """Write `folder`/step-N and remove all but the last KEEP. `step` is the number of finished steps.

    InputError names what the system says where it cannot be written; the earlier ones are whole then.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{key}.{names[index]}": torch.as_tensor(value) for key, value in state.items()}
    if ema is not None:
        tensors |= {f"ema.{name}": weight for name, weight in ema.weights.items()}
    place = folder / f"step-{step}"
    try:
        with atomic(place) as temporary:
            temporary.mkdir()
            path = temporary / STATE
            save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, path)
            (temporary / CHECKSUM).write_text(f"{checksum(path)}  {STATE}\n")  # as sha256sum -c reads it
    except (OSError, SafetensorError) as error:
        last = ", ".join(map(str, checkpoints(folder)[-1:])) or "none"
        raise InputError(f"{place}: cannot be written ({first_line(error)}); the last checkpoint: {last}") from error
    for old in checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old)


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name[5:]))


def whole_checkpoint(folder: Path) -> tuple[Path, dict[str, Tensor]] | None:
    """The newest checkpoint whose checksum holds, and its tensors; a damaged one is named on stderr and set aside."""
    for place in reversed(checkpoints(folder)):
        try:
            if (place / CHECKSUM).read_text().split()[:1] != [checksum(place / STATE)]:
                raise InputError("its checksum is not that of its content")
            return place, read_weights(place / STATE)
        except (OSError, UnicodeDecodeError, InputError) as error:
            aside = place.with_name(f"damaged-{place.name}")
            print(f"warning: {place} is damaged ({first_line(error)}); renamed to {aside.name}", file=sys.stderr)
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(place, aside)
    return None


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None = None) -> int:
    """Restore the newest whole checkpoint in place; the number of steps it had finished, 0 where there is none."""
    found = whole_checkpoint(folder)
    if found is None:
        return 0
    place, tensors = found
    state = optimizer.state_dict()
    with torch.no_grad():
        for index, (name, p) in enumerate((n, p) for n, p in model.named_parameters() if p.requires_grad):
            p.copy_(tensors[f"model.{name}"])
            state["state"][index] = {"step": tensors[f"optimizer.step.{name}"]}
            for key in ("exp_avg", "exp_avg_sq"):  # in the layout of the weights, which fused AdamW takes for granted
                state["state"][index][key] = torch.empty_like(p).copy_(tensors[f"optimizer.{key}.{name}"])
        if ema is not None:
            for name, weight in ema.weights.items():
                weight.copy_(tensors[f"ema.{name}"])
    optimizer.load_state_dict(state)
    return int(place.name[5:])
