"""Processes that compute the cells of a study, each a cell that no other process has computed or is computing."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from ..engine.commands import run_command
from ..engine.optimising import Terminated
from ..engine.processes import say
from ..engine.run import Busy, digest, locked
from ..files import InputError, first_line, read_json, write_json
from .cells import CELLS, SIZES, described
from .filling import fill, world


def result_of(folder: Path, name: str, seed: int) -> Path:
    return folder / name / f"seed-{seed}" / "result.json"


def error_of(folder: Path, name: str, seed: int) -> Path:
    """The file that says why a cell has failed."""
    return result_of(folder, name, seed).with_name("error.txt")


def is_filled(folder: Path, name: str, seed: int, size: str) -> bool:
    """Whether a cell has a result, and of the settings that it has now."""
    path = result_of(folder, name, seed)
    return path.exists() and read_json(path).get("cell") == described(name, seed, size)


def missing(folder: Path, seeds: Sequence[int], size: str) -> list[tuple[str, int]]:
    """The cells, by name and seed, that have no result yet."""
    return [(name, seed) for seed in seeds for name in CELLS if not is_filled(folder, name, seed, size)]


def work(folder: Path, names: Sequence[str], seeds: Sequence[int], size: str, threads: int) -> None:
    """Fill the cells that nobody has filled or is filling, until all are filled or have failed."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    longest = sorted(names, key=lambda name: -CELLS[name].times)  # last, other processes would wait for it
    left = [(name, seed) for seed in seeds for name in longest]
    while left:
        waiting = []
        for name, seed in left:
            if parent is not None and not parent.is_alive():
                return
            if is_filled(folder, name, seed, size) or error_of(folder, name, seed).exists():
                continue
            waiting.append((name, seed))
            try:
                fill_one(folder, name, seed, seeds, size)
            except Busy:
                pass
            except Terminated:
                raise
            except Exception as error:
                error_of(folder, name, seed).write_text(traceback.format_exc(), encoding="utf-8")
                say(f"{name}, seed {seed}: failed ({first_line(error)}); other cells go on")
        if len(waiting) == len(left):
            time.sleep(1)  # the rest is in other hands
        left = waiting


def fill_one(folder: Path, name: str, seed: int, seeds: Sequence[int], size: str) -> None:
    """Fill one cell of a seed unless it is filled, and keep its images alone. Busy where another process is at it."""
    path, cell = result_of(folder, name, seed), described(name, seed, size)
    own = path.parent / digest(json.dumps(cell)).partition(":")[2][:8]  # nothing of other settings is continued
    with locked(path.parent):
        if is_filled(folder, name, seed, size):
            return
        if path.exists():
            say(f"{name}, seed {seed}: its result is of other settings, and is computed again")
        begin = time.perf_counter()
        result = fill(name, world(folder, seed, size), own)
        seconds = round(time.perf_counter() - begin, 1)
        for place in (*path.parent.iterdir(), *own.glob("*")):  # a killed process has not finished before they are gone
            if place.is_dir() and place not in (own, own / "compare"):
                shutil.rmtree(place)
        write_json(path, result | {"cell": cell, "seconds": seconds})
    if result.get("fidelity", 0) is None:
        few = f"{result['readable']:.1%} of its images can be read, fewer than {SIZES[size]['distances']}"
        say(f"{name}, seed {seed}: no Fréchet distance: {few}")
    aligned = f"aligned {result['aligned']:.1%}, " if "aligned" in result else ""
    total = len(seeds) * len(CELLS)
    say(f"[{total - len(missing(folder, seeds, size))}/{total}] {name}, seed {seed}: {aligned}{seconds:.0f} s")


def fill_all(folder: Path, names: Sequence[str], seeds: Sequence[int], size: str, jobs: int) -> None:
    """Run `work` in `jobs` processes; where one fails, this process fails with the same exit code.

    InputError where cells have failed, after all others are filled.
    """
    cells = [(name, seed) for seed in seeds for name in names]
    for cell in cells:
        error_of(folder, *cell).unlink(missing_ok=True)  # they are tried again
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
    if wrong := [f"{name} of seed {seed}" for name, seed in cells if error_of(folder, name, seed).exists()]:
        raise InputError(
            f"{len(wrong)} cells failed: {', '.join(wrong)}; {folder}/CELL/seed-N/error.txt says why, and the same "
            "command tries them again"
        )
