"""What every benchmark beside a peer shares: two things timed in turn in one process, and the machine's own limit."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def compare(benchmark, ours: Callable[[], object], theirs: Callable[[], object], rounds: int = 7) -> float:
    """Median over `rounds` of theirs / ours, a pair one after the other; the times go to benchmark.extra_info."""
    ours(), theirs()  # warm-up
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for i in range(rounds):
        pair = [("ours", ours), ("theirs", theirs)]
        for name, call in pair if i % 2 else pair[::-1]:  # neither always after the other
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    ratio = statistics.median(b / a for a, b in zip(times["ours"], times["theirs"]))
    benchmark.extra_info |= {"ratio": round(ratio, 3), "ours_s": round(statistics.median(times["ours"]), 5)}
    benchmark.extra_info["theirs_s"] = round(statistics.median(times["theirs"]), 5)
    benchmark.pedantic(ours, rounds=1)  # what pytest-benchmark keeps to track from version to version
    return ratio


def matmul_rate(dtype: torch.dtype = torch.float32, size: int = 2048, rounds: int = 5) -> float:
    """Floating-point operations per second of one large matrix product, the limit a network is measured against."""
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    a @ b
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / statistics.median(times)
