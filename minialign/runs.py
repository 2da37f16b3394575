"""The settings of a run and its folder: its stages, its logs, its lock; what `python -m minialign.*` share."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import __version__
from .feedback import FeedbackStore
from .models.pretrained import InputError, read_json
from .training import atomic, barrier, gathered, leading, remove_unfinished, write_json

SIMULATED, FROM_FILE = "simulated annotator", "file, "  # labellers that are no people
COMMON_DEFAULTS: dict[str, Any] = {
    "beta": 1.0,
    "pretrain_share": 0.125,  # of a batch's rows (--recipe paper: half); each term is averaged over its own
    "weighting": "reward",
    "tau": None,  # the weighting's own
    "lr_schedule": "cosine",
    "warmup": 20,
    "clip_norm": 1.0,
    "ema": 0.0,
    "prompt_dropout": 0.1,
    "min_snr": 0.0,
    "noise_offset": 0.0,
    "lora": 0,
    "dtype": "float32",
    "accumulate": 1,
    "gradient_checkpointing": False,
    "compile": False,
    "parallel": "ddp",
    "checkpoint_every": 100,
    "keep": 2,
    "validate_every": 0,
    "reward_steps": 1000,
    "lambda": 0.5,  # the paper's
    "seed": 0,
}
EMBEDDED_DEFAULTS = COMMON_DEFAULTS | {  # how they were chosen: docs/results.md
    "steps": 400,
    "beta": 0.03,
    "batch_size": 64,
    "learning_rate": 1e-3,
    "sampling_steps": 10,
    "draw_batch": 64,
    "guidance": 3.0,
    "images": 2560,
    "labels": 1280,
    "test_images": 640,
    "pretrain_images": 512,
    "hidden": 512,
    "temperature": 0.5,
    "out": "runs/shapes",
}
OWN_DEFAULTS = COMMON_DEFAULTS | {  # the paper's learning rate, beta and reward; one GPU's batch
    "steps": 2000,
    "batch_size": 8,
    "learning_rate": 1e-5,
    "sampling_steps": 30,
    "draw_batch": 4,
    "guidance": 7.5,
    "test_images": 64,
    "hidden": 1024,
    "temperature": 2.0,
    "out": "runs/own",
}
RECIPES: dict[str, dict[str, Any]] = {  # Lee et al. 2023; clipping, prompt dropout and sampler stay ours
    "paper": {
        "steps": 10_000,
        "beta": 1.0,
        "batch_size": 512,
        "pretrain_share": 0.5,  # 256 of each
        "learning_rate": 1e-5,
        "lr_schedule": "constant",
        "warmup": 0,
        "guidance": 7.5,
        "hidden": 1024,
        "temperature": 2.0,
        "dtype": "bfloat16",  # the paper says half precision
    }
}
FREE = (  # settings that may change when a run goes on: they change its rounding, or what is kept, alone
    "checkpoint_every",
    "keep",
    "validate_every",
    "accumulate",
    "gradient_checkpointing",
    "compile",
    "parallel",
    "draw_batch",
)
OWN_CLIP = "openai/clip-vit-large-patch14"  # the paper's


class Busy(InputError):
    """A run that another process is at work on."""


class Run:
    """The folder of a run and its stages (stages.json: how often each was begun, and the seconds that it took)."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / "stages.json"
        self.stages: dict[str, dict[str, float]] = read_json(path) if path.exists() else {}

    @contextmanager
    def stage(self, name: str, why: str, together: bool = False) -> Iterator[bool]:
        """Announce a stage; True where its work is still to be done: in the leading process, or in all `together`.

        No process leaves a stage before all have come to its end.
        """
        state = self.stages.setdefault(name, {"begun": 0})
        if gathered("seconds" in state)[0]:
            say(f"{name}: done before ({state['seconds']:.0f} s)")
            yield False
            return
        say(f"{name}: {why}")
        state["begun"] += 1
        self._write()
        begin = time.perf_counter()
        yield together or leading()
        barrier()
        state["seconds"] = round(time.perf_counter() - begin, 2)
        self._write()

    def _write(self) -> None:
        if leading():
            write_json(self.folder / "stages.json", self.stages)

    def log(self, stage: str) -> Callable[[dict[str, Any]], None]:
        """Appends rows of a stage to metrics.jsonl, where a step that is done again takes its old row's place.

        And to tensorboard/ where TensorBoard is installed (the extra `tensorboard`).
        """
        path, board = self.folder / "metrics.jsonl", None

        def append(row: dict[str, Any]) -> None:
            nonlocal board
            if board is None:
                if path.exists():
                    old = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
                    kept = [other for other in old if other["stage"] != stage or other["step"] < row["step"]]
                    with atomic(path) as temporary:
                        temporary.write_text("".join(json.dumps(other) + "\n" for other in kept))
                board = open_board(self.folder / "tensorboard" / stage, row["step"])
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": stage, **row}) + "\n")
            if board:
                for key in row.keys() - {"step"}:
                    board.add_scalar(key, row[key], row["step"])
                board.flush()

        return append if leading() else lambda row: None


def open_board(folder: Path, step: int) -> Any:
    """TensorBoard's writer, which forgets what an interrupted run wrote from `step` on; False without TensorBoard."""
    if importlib.util.find_spec("tensorboard") is None:
        return False
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    return SummaryWriter(str(folder), purge_step=step)


def say(line: str) -> None:
    """Print in the leading process."""
    if leading():
        print(line, flush=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second run out of a folder; the lock goes with the process that holds it, the leading one."""
    if not leading():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    except BlockingIOError as error:
        raise Busy(f"--out {folder}: another process is at work on this run") from error


def open_run(folder: Path, settings: dict[str, Any], remedy: str = "use another --out") -> Run:
    """The run in `folder`, new or gone on with; InputError, with a remedy, where it was begun with other settings."""
    path = folder / "config.json"
    if leading():
        if path.exists():
            begun = read_json(path)["settings"]
            for key, value in settings.items():
                if (was := begun.get(key)) != value and key not in FREE:
                    raise InputError(f"--out {folder}: was begun with {key}={was!r}, not {value!r}; {remedy}")
            remove_unfinished(folder)
        else:
            versions = {"python": platform.python_version(), "torch": torch.__version__}
            made_by = {"minialign": __version__, "versions": versions, "threads": torch.get_num_threads()}
            write_json(path, {"settings": settings} | made_by)
    barrier()
    return Run(folder)


def check_folder(folder: Path) -> None:
    """InputError unless `folder` is a run, empty, or to be made where it can be written."""
    try:
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        writable = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
        names = [path.name for path in folder.iterdir()] if writable and place == folder else []
        strange = not _is_run(folder) and any(not name.endswith((".tmp", ".old", ".lock")) for name in names)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be used ({error.strerror})") from error
    if not writable:
        raise InputError(f"--out {folder}: not a folder that can be written")
    if strange:
        raise InputError(
            f"--out {folder}: holds files that are not a run's; accepted: a run, or an empty or new folder"
        )


def _is_run(folder: Path) -> bool:
    path = folder / "config.json"
    return path.exists() and "minialign" in read_json(path)


def remove_run(folder: Path) -> None:
    """Remove what a run wrote, and nothing else. What makes it a run goes last, so that a killed removal is one too.

    InputError where people have labelled its images: their work is not for a flag to delete.
    """
    for place in (folder, *folder.glob("round-*"), *folder.glob("compare/*")):
        if (place / "feedback.sqlite").exists():
            store = FeedbackStore(place)
            people = [name for name in store.labellers() if name != SIMULATED and not name.startswith(FROM_FILE)]
            store.close()
            if people:
                raise InputError(
                    f"--fresh: {place / 'feedback.sqlite'} holds labels by {', '.join(people)}; move it away first "
                    f"(python -m minialign.label {place} --export FILE keeps them in a file)"
                )
    (folder / "stages.json").unlink(missing_ok=True)
    names = (
        "images",
        "reward",
        "cache",
        "checkpoints",
        "model",
        "samples",
        "compare",
        "validation",
        "tensorboard",
    )
    for path in (*(folder / name for name in names), *folder.glob("round-*")):
        shutil.rmtree(path, ignore_errors=True)
    files = ["samples.json", "evaluation.json", "results.json", "metrics.jsonl", "report.html", "config.json"]
    files += [
        "lora.safetensors",
        "evaluation-compare.json",
        "best-of-n.png",
        *(path.name for path in folder.glob("skipped*.jsonl")),
    ]
    for path in (*folder.glob("feedback.sqlite*"), *(folder / name for name in files)):
        path.unlink(missing_ok=True)


def pick_device(name: str) -> torch.device:
    """The torch device of a --device flag; under torchrun the GPU of this process's number on its machine."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and dist.is_torchelastic_launched():
        here, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if here >= there:
            raise InputError(
                f"--nproc-per-node: process {here + 1} of a machine with {there} GPUs; accepted: one a GPU"
            )
        return torch.device("cuda", here)
    try:
        if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", name):
            raise RuntimeError("not one of these")
        if dist.is_torchelastic_launched() and name != "cpu":
            raise RuntimeError("under torchrun every process has a GPU of its own: cuda, auto or cpu")
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"--device {name}: cannot be used ({reason}); accepted: cpu, cuda, cuda:N, mps") from error
