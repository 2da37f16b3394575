"""What the benchmarks beside a peer share: pairs timed in turn in one process, memory counted, the machine's limit.

Every benchmark leaves what it measured in pytest-benchmark's `extra_info`, from which report.py makes its tables.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from minialign.models.clip import TextEncoder
from minialign.models.unet import UNet
from minialign.models.vae import VAE

UNET: dict[str, Any] = {  # half the width of Stable Diffusion 1.x and a level less: 80 million parameters
    "block_out_channels": [160, 320, 640],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 32,
}
VAE_CONFIG: dict[str, Any] = {  # the released one
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "sample_size": 256,
}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}  # the released one


def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(UNET)


def vae() -> VAE:
    torch.manual_seed(1)
    return VAE(VAE_CONFIG).eval().requires_grad_(False)


def text_encoder() -> TextEncoder:
    torch.manual_seed(2)
    return TextEncoder(TEXT).eval().requires_grad_(False)


def compare(
    benchmark: Any,
    work: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    goal: float | None,
    rounds: int = 9,
) -> dict[str, Any]:
    """Median over `rounds` of theirs / ours, a pair one after the other, with its quartiles; what report.py shows."""
    mine, peers = ours(), theirs()  # warm-up
    if isinstance(mine, torch.Tensor) and isinstance(peers, torch.Tensor):
        torch.testing.assert_close(mine, peers, atol=2e-2, rtol=2e-2)  # the same work; the tests are stricter
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for i in range(rounds):
        pair = [("ours", ours), ("theirs", theirs)]
        for name, call in pair if i % 2 else pair[::-1]:  # neither always after the other
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    ratios = [b / a for a, b in zip(times["ours"], times["theirs"])]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    found = benchmark.extra_info
    found |= {"work": work, "goal": goal, "rounds": rounds, "ratio": ratio, "quartiles": [low, high]}
    found |= {name: statistics.median(times[name]) for name in times}
    benchmark.pedantic(ours, rounds=1)  # what pytest-benchmark keeps to track from version to version
    return found


def matmul_rate(dtype: torch.dtype = torch.float32, size: int = 2048, rounds: int = 9) -> float:
    """Floating-point operations per second of one large matrix product, the limit a network is measured against."""
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    a @ b
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / statistics.median(times)


def operations(call: Callable[[], object]) -> int:
    """Floating-point operations of the products, convolutions and attentions of a call."""
    ops = torch.ops.aten
    attention = ops._scaled_dot_product_flash_attention_for_cpu  # which torch does not count

    def forward(q: tuple, k: tuple, v: tuple, *args: Any, **kwargs: Any) -> int:
        batch, heads, n, width = q
        return 4 * batch * heads * n * k[2] * width

    def backward(grad: tuple, q: tuple, k: tuple, *args: Any, **kwargs: Any) -> int:
        return forward(q, k, k) * 5 // 2  # five products in place of two

    known = {attention: forward, ops._scaled_dot_product_flash_attention_for_cpu_backward: backward}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        call()
    return counter.get_total_flops()


KERNELS = ("convolution", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "attention")


def kernel_share(call: Callable[[], object]) -> float:
    """The part of a call's time inside the library's convolutions, products and attentions."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    times = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    return sum(time for key, time in times.items() if any(name in key for name in KERNELS)) / sum(times.values())


class Memory(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.known = WeakIdKeyDictionary()  # storages that live, ours and those from before
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in self._tensors((args, kwargs)):
            self.known.setdefault(tensor.untyped_storage(), None)
        out = func(*args, **kwargs or {})
        for tensor in self._tensors(out):
            storage = tensor.untyped_storage()
            if storage not in self.known:
                self.known[storage] = _Held(self, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    @staticmethod
    def _tensors(values: Any) -> list[torch.Tensor]:
        return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class _Held:
    """Bytes that count as long as this object lives, which is as long as its storage."""

    def __init__(self, memory: Memory, size: int):
        self.memory, self.size = memory, size
        memory.live += size

    def __del__(self) -> None:
        self.memory.live -= self.size


def peak_memory(call: Callable[[], object]) -> int:
    """Peak bytes of what a call allocates through torch; what lived before, such as weights and gradients, is free."""
    with Memory() as memory:
        call()
    return memory.peak


def compare_memory(
    found: dict[str, Any], ours: Callable[[], object], theirs: Callable[[], object], goal: float | None
) -> None:
    """Peak memory of ours / theirs."""
    mine, peers = peak_memory(ours), peak_memory(theirs)
    found |= {"memory": mine, "memory_theirs": peers, "memory_ratio": mine / peers, "memory_goal": goal}
