"""Checkpoints of a training on disk, written whole by all processes together and checked before they are read."""

from __future__ import annotations

import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..files import InputError, checksum, first_line, flush, remove, remove_unfinished, temporary_name
from .optimising import EMA, trained
from .processes import barrier, gathered, is_main_process, processes

CHECKSUMS = "SHA256SUMS"  # of a checkpoint's files, in the format of sha256sum -c
SETTINGS = "# settings: "  # begins the line with the digest of the settings, which sha256sum skips
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's


def training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None, scaler: torch.amp.GradScaler | None
) -> dict[str, Tensor]:
    """The tensors that a training resumes from, by name; not copies, and some may be sharded by FSDP2."""
    tensors: dict[str, Tensor] = {}
    for name, p in trained(model).items():
        state = optimizer.state[p]
        if not state:  # AdamW's initial state
            state["step"] = torch.zeros((), device=p.device)
            state |= {key: torch.zeros_like(p, memory_format=torch.preserve_format) for key in MOMENTS}
        tensors |= {f"model.{name}": p.detach(), "optimizer.step": state["step"].reshape(1)}  # the same for all
        tensors |= {f"optimizer.{key}.{name}": state[key] for key in MOMENTS}
        if ema is not None:
            tensors[f"ema.{name}"] = ema.weights[name]
    if scaler is not None and scaler.is_enabled():
        state = scaler.state_dict()
        tensors["scaler"] = torch.tensor([state["scale"], state["_growth_tracker"]], dtype=torch.float64)
    return tensors


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None = None,
    scaler: torch.amp.GradScaler | None = None,
    keep: int = 2,
    digest: str = "",
) -> None:
    """Write `folder`/step-N and remove all but the last `keep`. `step` is the number of finished steps.

    `digest` stands for the settings of the training: `load_checkpoint` refuses a checkpoint with another one. All
    processes call this, and each writes its share of the tensors in safetensors files of at most about 1 GiB by
    torch.distributed.checkpoint. InputError where it cannot be written; earlier checkpoints stay whole then.
    """
    from torch.distributed import checkpoint as dcp  # slow to import

    place = folder / f"step-{step}"
    temporary = gathered(temporary_name(place))[0]
    state = {name: t.contiguous() for name, t in training_state(model, optimizer, ema, scaler).items()}
    try:
        if is_main_process():
            temporary.mkdir(parents=True)
        barrier()
        _write_state(temporary, state, digest)
        if is_main_process():
            flush(temporary)
            os.replace(temporary, place)
            flush(folder)
    except (OSError, SafetensorError, dcp.CheckpointException) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        cause = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
        if not isinstance(cause, (OSError, SafetensorError)):
            raise cause from None
        last = ", ".join(map(str, checkpoints(folder)[-1:])) or "none"
        raise InputError(f"{place}: cannot be written ({first_line(cause)}); the last checkpoint: {last}") from error
    if is_main_process():
        for old in checkpoints(folder)[:-keep]:
            remove(old)
    barrier()


def _write_state(folder: Path, state: dict[str, Tensor], digest: str) -> None:
    """Write this process's share of the tensors, in files of at most about 1 GiB; the main process adds checksums."""
    from torch.distributed import checkpoint as dcp

    rank, files, total = processes()[0], {}, 0
    for name, tensor in state.items():
        files[name] = 1 + total // 2**30
        total += tensor.numel() * tensor.element_size()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), files, save_distributed=True))
    mine = sorted(folder.glob(f"shard-{rank + 1:05d}-*"))
    sums = gathered([f"{checksum(path)}  {path.name}\n" for path in mine])
    if rank == 0:
        lines = [f"{SETTINGS}{digest}\n", *(line for of_process in sums for line in of_process)]
        (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
        flush(folder / CHECKSUMS)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; files with other names are ignored."""
    steps = [path for path in folder.glob("step-*") if re.fullmatch("step-[0-9]+", path.name)]
    return sorted(steps, key=lambda path: int(path.name[5:]))


def whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose checksums are right; a damaged one is renamed, with a warning.

    All processes call this, and each checks a share of the files.
    """
    rank, size = processes()
    for place in reversed(checkpoints(folder)):
        try:
            lines = (place / CHECKSUMS).read_text(encoding="utf-8").splitlines()
            sums = [line.split("  ") for line in lines if not line.startswith("#")]
            wrong = [name for value, name in sums[rank::size] if checksum(place / name) != value]
            reason = f"the checksum of {wrong[0]} is wrong" if wrong else "" if sums else "no checksums"
        except (OSError, ValueError) as error:
            reason = first_line(error)
        reasons = [reason for reason in gathered(reason) if reason]
        if not reasons:
            return place
        if rank == 0:
            aside = place.with_name(f"damaged-{place.name}")
            print(f"warning: {place} is damaged ({reasons[0]}); renamed to {aside.name}", file=sys.stderr)
            remove(aside)
            os.replace(place, aside)
    return None


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None = None,
    scaler: torch.amp.GradScaler | None = None,
    digest: str = "",
) -> int:
    """Restore the newest whole checkpoint in place; returns the number of finished steps, 0 where there is none.

    The number of processes may have changed: each reads its own shards. InputError where the checkpoint was saved with
    another `digest`. Unfinished files of killed processes are removed.
    """
    if is_main_process():
        remove_unfinished(folder)
    place = whole_checkpoint(folder)
    if place is None:
        return 0
    if f"{SETTINGS}{digest}" not in (place / CHECKSUMS).read_text(encoding="utf-8").splitlines():
        raise InputError(
            f"{place}: was saved with other settings or by an older version; accepted: --fresh, or another --out"
        )
    from torch.distributed import checkpoint as dcp

    state = training_state(model, optimizer, ema, scaler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(place)))
    for p in trained(model).values():
        optimizer.state[p]["step"].fill_(state["optimizer.step"].item())
    if scaler is not None and "scaler" in state:
        scale, tracker = state["scaler"].tolist()
        scaler.load_state_dict(scaler.state_dict() | {"scale": scale, "_growth_tracker": int(tracker)})
    return int(place.name[5:])
