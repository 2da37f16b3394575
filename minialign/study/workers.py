"""Processes that compute the cells of a study, each a cell that no other process has computed or is computing."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from ..engine.commands import run_command
from ..engine.processes import say
from ..engine.run import Busy, locked
from ..files import InputError, write_json
from .cells import CELLS
from .filling import fill, world


def result_of(folder: Path, name: str, seed: int) -> Path:
    return folder / name / f"seed-{seed}" / "result.json"


def missing(folder: Path, seeds: Sequence[int]) -> list[tuple[str, int]]:
    """The cells, by name and seed, that have no result yet."""
    return [(name, seed) for seed in seeds for name in CELLS if not result_of(folder, name, seed).exists()]


def work(folder: Path, names: Sequence[str], seeds: Sequence[int], size: str, threads: int) -> None:
    """Fill the cells that nobody has filled or is filling, until all are filled."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    longest = sorted(names, key=lambda name: -CELLS[name].times)  # last, other processes would wait for it
    left = [(name, seed) for seed in seeds for name in longest]
    while left:
        waiting = []
        for name, seed in left:
            if parent is not None and not parent.is_alive():
                return
            if result_of(folder, name, seed).exists():
                continue
            waiting.append((name, seed))
            with suppress(Busy):
                fill_one(folder, name, seed, seeds, size)
        if len(waiting) == len(left):
            time.sleep(1)  # the rest is in other hands
        left = waiting


def fill_one(folder: Path, name: str, seed: int, seeds: Sequence[int], size: str) -> None:
    """Fill one cell of a seed unless it is filled, and remove what is large. Busy where another process is at it."""
    path = result_of(folder, name, seed)
    with locked(path.parent):
        if path.exists():
            return
        begin = time.perf_counter()
        result = fill(name, world(folder, seed, size), path.parent)
        seconds = round(time.perf_counter() - begin, 1)
        for place in path.parent.iterdir():  # a killed process has not finished before all of it is gone
            if place.is_dir():
                shutil.rmtree(place)
        write_json(path, result | {"seconds": seconds})
    aligned = f"aligned {result['aligned']:.1%}, " if "aligned" in result else ""
    total = len(seeds) * len(CELLS)
    say(f"[{total - len(missing(folder, seeds))}/{total}] {name}, seed {seed}: {aligned}{seconds:.0f} s")


def fill_all(folder: Path, names: Sequence[str], seeds: Sequence[int], size: str, jobs: int) -> None:
    """Run `work` in `jobs` processes; where one fails, this process fails with the same exit code."""
    os.environ["TQDM_DISABLE"] = "1"  # bars of several processes would be mixed
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")
    job = partial(run_command, partial(work, folder, names, seeds, size, threads))
    workers = [context.Process(target=job) for _ in range(jobs)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the workers, too
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
                worker.join()
    if failed := [worker.exitcode for worker in workers if worker.exitcode]:
        if failed[0] < 0:
            raise InputError(
                f"a process was killed by signal {-failed[0]}; the same command continues; see also --jobs"
            )
        sys.exit(failed[0])
