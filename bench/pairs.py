"""What the benchmarks beside a peer share: pairs timed in turn in one process, the device's limits, the networks.

Every benchmark leaves what it measured in pytest-benchmark's `extra_info`, from which report.py makes its tables.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from configs import TEXT, UNET, VAE_CONFIG
from counts import count
from torch import Tensor

from minialign.models.clip import TextEncoder
from minialign.models.unet import UNet
from minialign.models.vae import VAE

Call = Callable[[], object]
Clock = Callable[[], float]


def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(UNET)


def vae() -> VAE:
    torch.manual_seed(1)
    return VAE(VAE_CONFIG).eval().requires_grad_(False)


def text_encoder() -> TextEncoder:
    torch.manual_seed(2)
    return TextEncoder(TEXT).eval().requires_grad_(False)


def arithmetic(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Autocast to `dtype`, unless it is float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


class EventClock:
    """Seconds of a CUDA device: waits for all that was started before, and reads the time between events."""

    def __init__(self) -> None:
        self.seconds, self.last = 0.0, None

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self.last is not None:
            self.seconds += self.last.elapsed_time(event) / 1000  # in milliseconds
        self.last = event
        return self.seconds


def clock_of(device: torch.device) -> Clock:
    return EventClock() if device.type == "cuda" else time.perf_counter


def timed(call: Call, clock: Clock) -> float:
    begin = clock()
    call()
    return clock() - begin


def limits(device: torch.device, dtype: torch.dtype, clock: Clock, rounds: int = 9) -> dict[str, float]:
    """What the device does at best: floating-point operations a second of a product of two large matrices, and bytes a
    second, read and written, of a large copy."""
    size, length = (8192, 2**28) if device.type == "cuda" else (1024, 2**24)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    x, y = torch.zeros(2, length, device=device)
    median = [
        statistics.median(timed(call, clock) for _ in range(rounds + 1)) for call in (lambda: a @ b, lambda: y.copy_(x))
    ]
    return {"flops": 2 * size**3 / median[0], "bytes": 2 * x.nbytes / median[1]}


def compare(
    benchmark: Any,
    side: str,
    clock: Clock,
    limit: Callable[[], dict[str, float]],
    work: str,
    ours: Call,
    theirs: Call,
    *,
    goal: float | None = None,
    memory_goal: float | None = None,
    rounds: int = 5,
    times: float = 1.0,
    counted: bool = True,
) -> dict[str, Any]:
    """One side of a pair: an entry of pytest-benchmark of `rounds` rounds, before each of which the other side runs.

    So both sides of a group run in turn, and neither always after the other. What report.py shows is kept in
    `extra_info`, which is returned: the seconds of each pair (ours, theirs), and in the entry of minialign the counts
    of both sides. The ratio is that of theirs to ours, `times` as often.
    """
    results = ours(), theirs()  # warm-up
    if all(isinstance(result, Tensor) and result.dtype == torch.float32 for result in results):
        torch.testing.assert_close(*results, atol=2e-2, rtol=2e-2)  # the same work; the tests are stricter
    mine, other = (ours, theirs) if side == "minialign" else (theirs, ours)
    seconds: list[float] = []
    benchmark.group = work
    benchmark.pedantic(mine, setup=lambda: seconds.append(timed(other, clock)), rounds=rounds)
    own = benchmark.stats.stats.data if benchmark.stats else []  # there are none under --benchmark-disable
    measured = benchmark.extra_info
    measured |= {"work": work, "goal": goal, "times": times}
    measured["pairs"] = [[a, b] if side == "minialign" else [b, a] for a, b in zip(own, seconds)]
    if counted and side == "minialign":
        measured["counts"] = {"minialign": count(ours)._asdict(), "peer": count(theirs)._asdict()}
        measured |= {"memory_goal": memory_goal, "limits": limit()}
    return measured
