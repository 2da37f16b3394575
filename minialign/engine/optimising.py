"""What every training loop needs: random generators, learning rates, averages of weights, progress, SIGTERM."""

from __future__ import annotations

import math
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from .processes import is_main_process, local

T = TypeVar("T")


def generator(*key: int) -> torch.Generator:
    """A random generator that depends on the key alone, so that any step can be repeated without those before it.

    A CPU generator uses only the low 32 bits of its seed, which by multiplication never depend on higher bits of
    the key: these have a hash of their own, which is 0 where there are none.
    """
    state = beyond = 0
    for number in key:  # a multiplicative hash (Knuth 1998, section 6.4) keeps neighbouring keys apart
        state = ((state ^ number) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) % 2**63
        beyond = (beyond ^ (number >> 32)) * 0xD1342543DE82EF95 % 2**64
    return torch.Generator().manual_seed(state ^ (beyond >> 32))


SCHEDULES = {  # of the learning rate after its warm-up: fraction done -> fraction of the peak
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),  # Loshchilov & Hutter 2017
}


def learning_rate(
    step: int, steps: int, peak: float, warmup: int = 0, schedule: str = "cosine", decay: float = 1.0
) -> float:
    """The rate of step `step` (from 0): it rises linearly to `peak` over `warmup` steps, then falls to 0 at `steps`.

    It falls by `schedule`, after the warm-up, and only during the last fraction `decay` of all steps.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    start = max(warmup, steps * (1 - decay))
    if step < start or decay == 0:
        return peak
    return peak * SCHEDULES[schedule]((step - start) / (steps - start))


class EMA:
    """Exponential moving average of trained weights: shadow <- decay * shadow + (1 - decay) * weights."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in trained(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update after step `step` (from 0). The decay is smaller at first: the initial weights are soon forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [local(p.detach()) for p in trained(model).values()]
        torch._foreach_lerp_([local(weight) for weight in self.weights.values()], current, 1 - decay)

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> None:
        """Replace the model's weights by the averages."""
        for name, p in trained(model).items():
            p.copy_(self.weights[name])

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Within the context the averages are the model's weights."""
        kept = [p.detach().clone() for p in trained(model).values()]
        self.put_into(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, weight in zip(trained(model).values(), kept):
                    p.copy_(weight)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class _Lines(tqdm):
    """Progress in a file: every line stays, and nothing is written that a terminal alone understands."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if msg is None:
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False  # there is nothing that `close` could erase


def progress(items: Iterable[T], description: str, total: int | None = None, done: int = 0) -> tqdm[T]:
    """An iterator's progress on stderr with the time left; `set_postfix_str` adds figures, such as a loss.

    In a terminal it is a bar, of which one line stays at the end; a bar inside another leaves none, nor does one that
    ends within half a second. In a file it is one line a minute. Only the main process shows it, and TQDM_DISABLE=1
    turns it off.
    """
    options: dict[str, Any] = {"desc": description, "total": total, "initial": done, "file": sys.stderr}
    if not is_main_process():
        options["disable"] = True
    if not sys.stderr.isatty():
        line = "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} left{postfix}"
        minute = {"mininterval": 60, "delay": 60, "miniters": 1}  # 1: the clock is looked at after every item
        return _Lines(items, bar_format=line, leave=False, **minute, **options)
    bar = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    return tqdm(items, bar_format=bar, leave=None, mininterval=0.5, delay=0.5, dynamic_ncols=True, **options)


class Terminated(Exception):
    """The process got SIGTERM and has saved its work."""


class Stop:
    """A context in which SIGTERM, which clusters send before the end, sets `asked` and does not kill the process.

    The loop can then finish its step and save. Only the main thread gets signals: in others `asked` stays False.
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
