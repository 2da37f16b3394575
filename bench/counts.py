"""What a call costs in numbers that do not depend on the machine: python bench/counts.py

Writes the table of counts of docs/benchmarks.md, which reference_tests/test_counts.py holds. The works of the table
need neither a GPU nor the memory of full-sized networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from configs import SD1_UNET, UNET
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from minialign import NoiseSchedule, reward_weighted_loss
from minialign.diffusion import ddim_sample
from minialign.engine.checkpoints import training_state
from minialign.finetune import FineTuning, Latents, TrainingData
from minialign.finetune.batches import sample_step
from minialign.finetune.loop import State, backward
from minialign.models.unet import UNet

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- counted: python bench/counts.py -->", "<!-- end of what was counted -->"


# ---------------------------------------------------------------------------------------------------------- counting
class Memory(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.known = WeakIdKeyDictionary()  # storages that live, ours and those from before
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors((args, kwargs)):
            self.known.setdefault(tensor.untyped_storage(), None)
        out = func(*args, **kwargs or {})
        for tensor in tensors(out):
            storage = tensor.untyped_storage()
            if storage not in self.known:
                self.known[storage] = _Held(self, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out


class _Held:
    """Bytes that count as long as this object lives, which is as long as its storage."""

    def __init__(self, memory: Memory, size: int):
        self.memory, self.size = memory, size
        memory.live += size

    def __del__(self) -> None:
        self.memory.live -= self.size


def tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Counts(NamedTuple):
    """Of one call. Views and empty tensors cost nothing; all else is an operation, on a GPU about a kernel each."""

    flops: int  # floating-point operations of products, convolutions and attentions
    moved: int  # bytes of the tensors that operations read and write
    operations: int
    peak: int  # most bytes at once of what the call allocates; what lived before, such as weights, is free
    copies: int  # operations between two devices, and numbers that the host reads from a tensor


class Counting(Memory):
    """Counts all of `Counts` of what runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.moved = self.operations = self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace == "prim":  # asks a fake tensor for its device
            return out
        flops = FLOPS.get(func.overloadpacket)
        self.flops += flops(*args, **kwargs or {}, out_val=out) if flops else 0
        if not func.is_view and not any(name in func.overloadpacket.__name__ for name in ("empty", "_unsafe_view")):
            self.operations += 1
            self.moved += sum(tensor.nbytes for tensor in tensors((args, kwargs, out)))
        devices = {tensor.device.type for tensor in tensors((args, kwargs, out))}
        self.copies += len(devices) > 1 or func is torch.ops.aten._local_scalar_dense.default
        return out

    @property
    def counts(self) -> Counts:
        return Counts(self.flops, self.moved, self.operations, self.peak, self.copies)


def _attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    batch, heads, n, width = q.shape
    return 4 * batch * heads * n * k.shape[2] * width


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> int:
    return _attention(q, k, k) * 5 // 2  # five products in place of two


FLOPS: dict[Any, Callable[..., int]] = flop_registry | {  # torch does not count the attention of CPUs
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def count(call: Callable[[], object]) -> Counts:
    with Counting() as counting:
        call()
    return counting.counts


def peak_memory(call: Callable[[], object]) -> int:
    """Peak bytes of what a call allocates through torch; what lived before, such as weights and gradients, is free."""
    return count(call).peak


def trainer_step(
    network: UNet, batch: int, size: int, dtype: torch.dtype = torch.float32
) -> tuple[Callable[[], object], State]:
    """A step of fine-tuning as the trainer does it, from made-up latents and contexts on the host, and what it changes.

    Half of the rows are pre-training pairs. A step samples its rows, copies them to the network's device, computes loss
    and gradient, clips it and has AdamW update the weights.
    """
    images, pairs = (Latents(*torch.rand(2, 8, 4, size, size), torch.arange(8)) for _ in range(2))
    data = TrainingData([torch.randn(9, 77, 768)], images, torch.ones(8), pairs)
    state = State(network, FineTuning(steps=10, beta=1.0, batch_size=batch, learning_rate=1e-5, dtype=dtype))
    schedule = NoiseSchedule.from_config({}).to(state.device)

    def step() -> None:
        loss, _ = backward(state, schedule, data, sample_step(0, data, (batch // 2, batch // 2), 1000))
        state.update(0, loss)

    return step, state


# --------------------------------------------------------------------------------------------- the works of the table
# They run on torch's meta device, whose tensors have a shape and no content: full-sized networks need no memory, and it
# stands for a GPU, since what the host would have to wait for or to copy fails or is seen.
@contextmanager
def on_meta() -> Iterator[None]:
    """Let the meta device have what CPUs and GPUs have: fused attention, whose matrix is never stored, and AdamW."""

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **how: Any) -> Tensor:
        how.pop("enable_gqa", None)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=attn_mask, **how)[0]

    with ExitStack() as patches:
        patches.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", attention))
        # these know no such device, though the operations do, and in float32 nothing is cast
        patches.enter_context(mock.patch("torch.optim.adam._device_dtype_check_for_fused"))
        patches.enter_context(mock.patch("torch.autocast", lambda *how, **more: nullcontext()))
        yield


def made(config: dict[str, Any]) -> UNet:
    """A UNet on the meta device with gradients that are there already, so that they do not count."""
    with torch.device("meta"):
        network = UNet(config)
        for p in network.parameters():
            p.grad = torch.zeros_like(p)
    return network


def unet_step(config: dict[str, Any], batch: int, size: int) -> Counts:
    """Forward and backward pass of a UNet on latents of size x size."""
    network = made(config)
    with torch.device("meta"):
        x, t, context = torch.randn(batch, 4, size, size), torch.full((batch,), 500), torch.randn(batch, 77, 768)
    return count(lambda: network(x, t, context).square().mean().backward())


def sampling_step(config: dict[str, Any], batch: int, size: int) -> Counts:
    """One guided step of DDIM: what a second step adds to the first, but for the peak, which is the largest of both."""
    network, schedule, found = made(config), NoiseSchedule.from_config({}), []
    with torch.device("meta"):
        x, context = torch.randn(batch, 4, size, size), torch.randn(batch, 77, 768)
    for steps in (1, 2):
        with torch.no_grad():
            call = partial(ddim_sample, network, schedule, x, (context,), (context,), steps=steps, guidance=7.5)
            found.append(count(call))
    return Counts(*(b - a for a, b in zip(*found)))._replace(peak=found[1].peak)


def loss_call(rows: int, size: int, dtype: torch.dtype) -> Counts:
    """The loss of a batch of latents, half of them pre-training pairs, and its gradient."""
    with torch.device("meta"):
        prediction, target = (torch.randn(rows, 4, size, size, dtype=dtype) for _ in range(2))
        reward, pretrain = torch.rand(rows), torch.arange(rows) >= rows // 2
    prediction.requires_grad_()
    return count(lambda: reward_weighted_loss(prediction, target, reward, pretrain).backward())


def finetuning_step(config: dict[str, Any], batch: int, size: int) -> Counts:
    """The trainer's step."""
    step, state = trainer_step(made(config), batch, size)
    training_state(state.unet, state.optimizer, None, None)  # makes AdamW's moments
    state.optimizer.zero_grad()
    return count(step)


WORKS: dict[str, tuple[Callable[..., Counts], tuple[Any, ...]]] = {
    "UNet step, half width, batch 4, 256 px": (unet_step, (UNET, 4, 32)),
    "UNet step, Stable Diffusion 1.x, batch 1, 512 px": (unet_step, (SD1_UNET, 1, 64)),
    "sampling step, half width, batch 4, 256 px": (sampling_step, (UNET, 4, 32)),
    "sampling step, Stable Diffusion 1.x, batch 1, 512 px": (sampling_step, (SD1_UNET, 1, 64)),
    "loss, 512 x 4 x 64 x 64, float32": (loss_call, (512, 64, torch.float32)),
    "loss, 512 x 4 x 64 x 64, bfloat16": (loss_call, (512, 64, torch.bfloat16)),
    "fine-tuning step, half width, batch 4, 256 px": (finetuning_step, (UNET, 4, 32)),
}
HEADER = ["work", "FLOPs", "bytes moved", "operations", "peak bytes", "copies"]


def row(work: str) -> str:
    """A work's line of the table."""
    call, given = WORKS[work]
    with on_meta():
        return "| " + " | ".join([work, *(f"{number:,}" for number in call(*given))]) + " |"


def table() -> Iterator[str]:
    yield f"Counted with torch {torch.__version__.split('+')[0]}:"
    yield ""
    yield "| " + " | ".join(HEADER) + " |"
    yield "| " + " | ".join(["---"] * len(HEADER)) + " |"
    yield from map(row, WORKS)


def main() -> None:
    body = "\n".join(table())
    print(body)
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
