"""One process, or several under torchrun: which one writes, what they exchange, how they share a network."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..files import InputError
from ..models.blocks import ResnetBlock, Transformer2D

T = TypeVar("T")
PARALLEL = ("ddp", "fsdp")


# -------------------------------------------------------------------------------------------------------- processes
def pick_device(name: str) -> torch.device:
    """The torch device of a --device flag; under torchrun the GPU of this process's number on its machine."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and dist.is_torchelastic_launched():
        here, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if here >= there:
            raise InputError(
                f"--nproc-per-node: process {here + 1} of a machine with {there} GPUs; accepted: one for each GPU"
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


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """The process group of a torchrun launch while the context lasts; yields `device`, this process's.

    Objects and flags travel by gloo, gradients on CUDA by NCCL.
    """
    if not dist.is_torchelastic_launched():
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # long: the others wait while the main process trains the reward model; torchrun notices processes that died
    backend, timeout = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timedelta(days=1)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        # torchrun keeps its store over restarts, with the addresses of those who died (on several machines
        # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 turns that off: there the count is not the same everywhere)
        store = dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    yield device
    barrier()  # else torchrun would kill a process that still writes when another one fails at its exit
    dist.destroy_process_group()  # not after an error: NCCL would wait for the others


def processes() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return processes()[0] == 0


def say(line: str) -> None:
    """Print in the main process."""
    if is_main_process():
        print(line, flush=True)


def barrier() -> None:
    """Wait for all processes."""
    gathered(None)


def gathered(value: T) -> list[T]:
    """`value` of every process, in the order of ranks."""
    values: list[Any] = [value] * processes()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


# ---------------------------------------------------------------------------------------------------- shared networks
def distributed(network: nn.Module, parallel: str, device: torch.device) -> nn.Module:
    """The module to call in place of `network` so that all processes train it; `network` itself in a single process.

    With "ddp" each process has a copy and gradients are averaged. With "fsdp" each has a shard of every weight (FSDP2:
    Zhao et al. 2023), gathered one block at a time. This may replace parameters: build the optimizer afterwards.
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
    """Set whether the next backward pass exchanges gradients: only that of the last micro-batch does."""
    if isinstance(network, nn.parallel.DistributedDataParallel):
        network.require_backward_grad_sync = now
    elif hasattr(network, "set_requires_gradient_sync"):  # FSDP2's
        network.set_requires_gradient_sync(now)  # type: ignore[operator]


def reshard(network: nn.Module) -> None:
    """Free the weights that FSDP2 gathered for a call without a backward pass, which would free them."""
    for module in network.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor: the full tensor unless FSDP2 shards it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor that FSDP2 may shard, in every process."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather_weights(network: nn.Module) -> None:
    """Replace sharded parameters by full ones, to save the network, which must not be called afterwards."""
    for module in network.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(full_tensor(p).detach(), requires_grad=p.requires_grad))
