"""What every training run needs: processes, learning rates, averages, stateless randomness, checkpoints on disk."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .models.blocks import ResnetBlock, Transformer2D
from .models.pretrained import InputError, first_line

T = TypeVar("T")
CHECKSUMS = "SHA256SUMS"  # of a checkpoint's files, as sha256sum -c reads it
PARALLEL = ("ddp", "fsdp")


# ------------------------------------------------------------------------------------------------------- processes
@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """The process group of a torchrun launch while the context lasts; yields `device`, this process's.

    Objects and flags travel by gloo, gradients on CUDA by NCCL.
    """
    if not dist.is_torchelastic_launched():
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # the others wait while the leader learns a reward; who died is torchrun's to find out
    backend, timeout = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timedelta(days=1)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        # torchrun keeps its store over restarts, with the addresses of those who died (on several machines it is told
        # not to by TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: there the count is not the same everywhere)
        store = dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    yield device
    dist.destroy_process_group()  # not after an error: then the process just ends, where NCCL would wait for the others


def processes() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def leading() -> bool:
    """Whether this process is the one that writes and prints."""
    return processes()[0] == 0


def barrier() -> None:
    """Wait for all processes."""
    gathered(None)


def gathered(value: T) -> list[T]:
    """`value` of every process, in the order of ranks."""
    values: list[Any] = [value] * processes()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def distributed(network: nn.Module, parallel: str, device: torch.device) -> nn.Module:
    """What to call in place of `network` so that all processes train it together; itself in a single process.

    "ddp" keeps it whole in each and averages gradients; "fsdp" keeps a shard of every weight in each (FSDP2: Zhao et
    al. 2023), gathered a block at a time. Parameters may be others afterwards: build the optimizer after this.
    """
    if processes()[1] == 1:
        return network
    if parallel == "ddp":
        return nn.parallel.DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes()[1],))
    for module in network.modules():
        if isinstance(module, (ResnetBlock, Transformer2D)):
            fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def synchronise(network: nn.Module, now: bool) -> None:
    """Whether the next call and its backward pass exchange gradients: of the accumulated parts the last one alone."""
    if isinstance(network, nn.parallel.DistributedDataParallel):
        network.require_backward_grad_sync = now
    elif hasattr(network, "set_requires_gradient_sync"):  # FSDP2's
        network.set_requires_gradient_sync(now)  # type: ignore[operator]


def reshard(network: nn.Module) -> None:
    """After a call without a backward pass: what FSDP2 has gathered for it becomes shards again."""
    for module in network.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it unless FSDP2 shards it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP2 may shard, in every process."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather_weights(network: nn.Module) -> None:
    """Put whole parameters in the place of sharded ones, to save the network: it is not to be called any more."""
    for module in network.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(whole(p).detach(), requires_grad=p.requires_grad))


# -------------------------------------------------------------------------------------------- schedules and averages


def generator(*key: int) -> torch.Generator:
    """A random generator that depends on the key alone, so that any step can be replayed without those before it."""
    state = 0
    for part in key:  # a multiplicative hash (Knuth 1998, section 6.4) keeps neighbouring keys apart
        state = ((state ^ part) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) % 2**63
    return torch.Generator().manual_seed(state)


SCHEDULES = {  # of the learning rate after its warm-up: fraction done -> fraction of the peak
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),  # Loshchilov & Hutter 2017
}


def learning_rate(
    step: int, steps: int, peak: float, warmup: int = 0, schedule: str = "cosine", decay: float = 1.0
) -> float:
    """Linear warm-up over `warmup` steps, constant, then by `schedule` over the last fraction `decay` of all steps."""
    if step < warmup:
        return peak * (step + 1) / warmup
    start = steps * (1 - decay)
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
        """After step `step` (from 0). Young averages follow faster, so that they do not keep the first weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [local(p.detach()) for p in trained(model).values()]
        torch._foreach_lerp_([local(weight) for weight in self.weights.values()], current, 1 - decay)

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> None:
        """Give the model the averages as its weights."""
        for name, p in trained(model).items():
            p.copy_(self.weights[name])

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """The model has the averages as its weights while the context lasts."""
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


def progress(items: Iterable[T], description: str, total: int | None = None, done: int = 0) -> Iterator[T]:
    """A progress bar on stderr with rate and time left, of the leading process; none under TQDM_DISABLE=1."""
    how: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True, "mininterval": 0.5}
    if not leading():
        how["disable"] = True
    yield from tqdm(items, description, total, initial=done, **how)


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


# ------------------------------------------------------------------------------------------------------ checkpoints
def training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None, scaler: torch.amp.GradScaler | None
) -> dict[str, Tensor]:
    """What a training goes on from, by name: the tensors themselves, of which FSDP2 shards some."""
    tensors: dict[str, Tensor] = {}
    for name, p in trained(model).items():
        state = optimizer.state[p]
        if not state:  # as AdamW begins
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


MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None = None,
    scaler: torch.amp.GradScaler | None = None,
    keep: int = 2,
) -> None:
    """Write `folder`/step-N and remove all but the last `keep`. `step` is the number of finished steps.

    All processes call it, and each writes its part, in safetensors files of at most about 1 GiB by
    torch.distributed.checkpoint. InputError names what the system says where it cannot be written; the earlier ones
    are whole then.
    """
    from torch.distributed import checkpoint as dcp  # slow to import

    place, temporary = folder / f"step-{step}", folder / f".step-{step}.tmp"
    rank, size = processes()
    state = {name: t.contiguous() for name, t in training_state(model, optimizer, ema, scaler).items()}
    files, total = {}, 0
    for name, tensor in state.items():
        files[name] = 1 + total // 2**30
        total += tensor.numel() * tensor.element_size()
    try:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        barrier()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of there being one process
            dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(temporary), files, save_distributed=True))
        mine = sorted(temporary.glob(f"shard-{rank + 1:05d}-*"))
        sums = gathered([f"{checksum(path)}  {path.name}\n" for path in mine])
        if rank == 0:
            (temporary / CHECKSUMS).write_text("".join(line for lines in sums for line in lines))
            _flush(temporary / CHECKSUMS)
            _flush(temporary)
            os.replace(temporary, place)
            _flush(folder)
    except (OSError, SafetensorError, dcp.CheckpointException) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        cause = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
        if not isinstance(cause, (OSError, SafetensorError)):
            raise cause from None
        last = ", ".join(map(str, checkpoints(folder)[-1:])) or "none"
        raise InputError(f"{place}: cannot be written ({first_line(cause)}); the last checkpoint: {last}") from error
    if rank == 0:
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    barrier()


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


def whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose checksums hold; a damaged one is named on stderr and set aside.

    All processes call it, and each reads a part of the files.
    """
    rank, size = processes()
    for place in reversed(checkpoints(folder)):
        try:
            sums = [line.split("  ") for line in (place / CHECKSUMS).read_text().splitlines()]
            wrong = [name for value, name in sums[rank::size] if checksum(place / name) != value]
            reason = (
                f"the checksum of {wrong[0]} is not that of its content" if wrong else "" if sums else "no checksums"
            )
        except (OSError, ValueError) as error:
            reason = first_line(error)
        reasons = [reason for reason in gathered(reason) if reason]
        if not reasons:
            return place
        if rank == 0:
            aside = place.with_name(f"damaged-{place.name}")
            print(f"warning: {place} is damaged ({reasons[0]}); renamed to {aside.name}", file=sys.stderr)
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(place, aside)
    return None


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> int:
    """Restore the newest whole checkpoint in place; the number of steps it had finished, 0 where there is none.

    Of any number of processes on any other: each reads what it holds.
    """
    place = whole_checkpoint(folder)
    if place is None:
        return 0
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
