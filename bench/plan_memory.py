"""The memory of fine-tuning Stable Diffusion, counted without a GPU and without the memory: python bench/plan_memory.py

The trainer's own step (minialign/finetune/loop.py, `step_loss` and `State.update`) runs on torch's fake tensors, which
have a shape and no content, and the bytes of every tensor are counted while it lives by what counts them for real ones
(`counts.peak_memory`). The tables go to stdout and between two marks of docs/stable-diffusion.md.

The tensors are of the CPU, whose operations keep what CUDA's keep but for norms under autocast (`as_on_cuda`).
Attention is the fused one, which keeps its result and a number a row, as CUDA's flash and memory-efficient kernels do.

Not counted: what kernels use inside (cuDNN, cuBLAS, the buffers of attention's backward pass), the CUDA context and
libraries (about half a GiB), and what the allocator loses between blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from configs import SD1_UNET, VAE_CONFIG
from counts import Memory, peak_memory
from report import DOCS, _table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from minialign import NoiseSchedule
from minialign.engine.checkpoints import training_state
from minialign.engine.optimising import progress, trained
from minialign.finetune import FineTuning, step_loss
from minialign.finetune.loop import State
from minialign.models.blocks import ResnetBlock, Transformer2D
from minialign.models.clip import CLIPTowers, ProjectedTextEncoder, TextEncoder
from minialign.models.lora import adapters, add_lora
from minialign.models.unet import UNet
from minialign.models.vae import VAE

BEGIN, END = "<!-- computed: python bench/plan_memory.py -->", "<!-- end of what was computed -->"
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
OPENCLIP = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
VISION_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
CLIP_OF_REWARD = {"text_config": CLIP_L, "vision_config": VISION_L | {"patch_size": 14}, "projection_dim": 768}
RANK = 16  # of the adapters in the tables


@dataclass(frozen=True, eq=False)  # a key by itself
class Model:
    """A released checkpoint: configs, and the shapes (C,h,w) and so on of what its UNet reads for an image."""

    name: str
    unet: dict[str, Any]
    latents: tuple[int, int, int]
    context: tuple[tuple[int, ...], ...]
    text_encoders: tuple[tuple[type[nn.Module], dict[str, Any]], ...]


SD1 = Model(
    "Stable Diffusion 1.x, 512 px",
    SD1_UNET,
    (4, 64, 64),
    ((77, 768),),
    ((TextEncoder, CLIP_L),),
)
XL = Model(
    "Stable Diffusion XL base, 1024 px",
    {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    (4, 128, 128),
    ((77, 2048), (2816,)),
    ((TextEncoder, CLIP_L), (ProjectedTextEncoder, OPENCLIP | {"projection_dim": 1280})),
)


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Norms in float32 under autocast, as CUDA has them and the CPU has not (torch's lists of autocast operations)."""
    whole = {name: getattr(F, name) for name in ("group_norm", "layer_norm")}

    def in_float32(norm: Callable[..., Tensor], x: Tensor, *more: Any) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return norm(x, *more)
        return norm(x.float(), *(part.float() if isinstance(part, Tensor) else part for part in more))

    for name, norm in whole.items():
        setattr(F, name, partial(in_float32, norm))
    try:
        yield
    finally:
        for name, norm in whole.items():
            setattr(F, name, norm)


def prepared(config: dict[str, Any], dtype: torch.dtype, lora: int, checkpointing: bool) -> UNet:
    """The UNet as `finetune_pipeline` trains it: what adapters leave frozen is as short as the arithmetic."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype if lora else torch.float32)  # fake weights cannot be brought to another one
    try:
        unet = UNet(config)
    finally:
        torch.set_default_dtype(before)
    if lora:
        add_lora(unet, lora)
        for layer in adapters(unet).values():
            layer.lora_A, layer.lora_B = (nn.Parameter(p.detach().float()) for p in (layer.lora_A, layer.lora_B))
    unet.checkpointing = checkpointing
    return unet.train()


@dataclass(frozen=True)
class Plan:
    """Bytes on one device while the UNet is trained, without the networks that are not."""

    weights: int
    gradients: int
    moments: int  # AdamW's two
    step: np.ndarray  # what is there besides weights and moments after each operation of a step
    one_more: np.ndarray  # and besides the gradients of the first part, of a further part of the same step
    root: int  # of the weights: what FSDP2 keeps gathered from the forward pass to the end of the backward pass
    block: int  # and the largest of the blocks that it gathers in their turn

    def peak(self, accumulate: bool = False) -> int:
        """In a single process. `accumulate`: the rows of a step are computed in several parts."""
        more = self.gradients + self.one_more.max() if accumulate else self.step.max()
        return self.weights + self.moments + int(more)

    def ddp(self, accumulate: bool = False) -> int:
        """In each of several processes with whole copies: the buckets that travel are as large as the gradients."""
        return self.peak(accumulate) + self.gradients

    def fsdp(self, processes: int, accumulate: bool = False) -> int:
        """In each of so many processes with shards of weights, gradients and moments.

        Gathered at the worst moment, in the backward pass: the weights of the root and of two blocks as large as the
        largest one, in use and fetched ahead; the gradients of the root, of a block, and of one more that are sent.
        Between the parts of a step FSDP2 keeps gradients whole. Arithmetic, where all else here is counted.
        """
        at_rest = self.weights + self.gradients + self.moments
        gathered = (self.root + 2 * self.block) * (self.weights + self.gradients) // self.weights
        return -(-at_rest // processes) + int(self.one_more.max()) + gathered + accumulate * self.gradients


def size(network: nn.Module) -> int:
    """Bytes of all weights."""
    return sum(p.nbytes for p in network.parameters())


def measured(
    unet: UNet, latents: Sequence[int], context: Sequence[Sequence[int]], rows: int, dtype: torch.dtype
) -> Plan:
    """The plan of a step of `rows` images, run here, on fake tensors or real ones.

    latents: shape (C,h,w) of an image's; context: shapes of the parts of a prompt's. As in the trainer, a quarter of
    the rows, as an example, are pre-training pairs: their number changes no byte.
    """
    schedule = NoiseSchedule(torch.rand(1000))
    state = State(unet, FineTuning(steps=1, beta=1.0, batch_size=rows, learning_rate=1e-5, dtype=dtype))
    moments = [t for name, t in training_state(unet, state.optimizer, None, None).items() if ".exp_avg" in name]

    def backward(micro_batches: int) -> Tensor:
        x0, noise = torch.randn(rows, *latents), torch.randn(rows, *latents)
        t, is_pair = torch.randint(1000, (rows,)), torch.arange(rows) >= rows - rows // 4
        prompt = [torch.randn(rows, *shape) for shape in context]
        loss, _ = step_loss(unet, schedule, x0, noise, t, prompt, torch.rand(rows), is_pair, dtype=dtype)
        (loss / micro_batches).backward()
        return loss.detach()

    with as_on_cuda():
        alone = live_memory(lambda: state.update(0, backward(1)))
        for p in trained(unet).values():
            p.grad = torch.zeros_like(p)
        further = live_memory(lambda: backward(2))
    blocks = [size(module) for module in unet.modules() if isinstance(module, (ResnetBlock, Transformer2D))]
    return Plan(
        weights=size(unet),
        gradients=sum(p.nbytes for p in trained(unet).values()),
        moments=sum(t.nbytes for t in moments),
        step=alone,
        one_more=further,
        root=size(unet) - sum(blocks),
        block=max(blocks),
    )


def live_memory(call: Callable[[], object]) -> np.ndarray:
    """Bytes after each operation of a call; the largest is `peak_memory`'s."""

    class Trace(Memory):
        def __torch_dispatch__(self, *args: Any, **kwargs: Any) -> Any:
            out = super().__torch_dispatch__(*args, **kwargs)
            trace.append(self.live)
            return out

    trace: list[int] = []
    with Trace():
        call()
    return np.array(trace)


def plans(
    model: Model, rows: Sequence[int], dtype: torch.dtype, checkpointing: bool = False, lora: int = 0
) -> dict[int, Plan]:
    """The plans of steps of so many images each, in one process and part, without the memory.

    After each operation there is what does not depend on the rows, and so much for each: two runs tell both.
    """
    with FakeTensorMode():
        two, three = (
            measured(prepared(model.unet, dtype, lora, checkpointing), model.latents, model.context, n, dtype)
            for n in (2, 3)
        )
    return {
        n: replace(
            two,
            step=two.step + (n - 2) * (three.step - two.step),
            one_more=two.one_more + (n - 2) * (three.one_more - two.one_more),
        )
        for n in rows
    }


def sampling(model: Model, rows: int) -> int:
    """The most that sampling `rows` images adds to the weights: guided, so that the UNet reads twice as many."""
    with FakeTensorMode(), torch.no_grad():
        unet, vae = UNet(model.unet).eval(), VAE(VAE_CONFIG).eval()
        latents = torch.randn(rows, *model.latents)
        context = [torch.randn(2 * rows, *shape) for shape in model.context]
        one_step = peak_memory(lambda: unet(torch.cat([latents, latents]), torch.zeros(2 * rows), *context))
        return max(one_step, peak_memory(lambda: vae.decode(latents)))


def idle(model: Model) -> dict[str, int]:
    """Bytes, in float32, of the networks that fine-tuning leaves on the device without calling them."""
    with torch.device("meta"):
        encoders = sum(size(build(config)) for build, config in model.text_encoders)
        return {"VAE": size(VAE(VAE_CONFIG)), "text": encoders, "CLIP": size(CLIPTowers(CLIP_OF_REWARD))}


HALF = torch.bfloat16  # float16 takes the same bytes
ALL, ADAPTERS = "all weights", f"`--lora {RANK}`"
AGAIN = "`--gradient-checkpointing`"
MODES: dict[tuple[str, str, str], dict[str, Any]] = {
    (ALL, "float32", ""): {"dtype": torch.float32},
    (ALL, "float32", AGAIN): {"dtype": torch.float32, "checkpointing": True},
    (ALL, "half", ""): {"dtype": HALF},
    (ALL, "half", AGAIN): {"dtype": HALF, "checkpointing": True},
    (ADAPTERS, "half", ""): {"dtype": HALF, "lora": RANK},
    (ADAPTERS, "half", AGAIN): {"dtype": HALF, "lora": RANK, "checkpointing": True},
}
ROWS = {SD1: (1, 2, 4, 8, 16, 32), XL: (1, 2, 4, 8)}
SAMPLED = (1, 4, 16, 64)  # images sampled at once
PROCESSES = (2, 4, 8)


def main() -> None:
    models = list(ROWS)
    found: dict[tuple, Plan] = {}
    for model, mode in progress([(model, mode) for model in models for mode in MODES], "plan"):
        found |= {(model, *mode, rows): one for rows, one in plans(model, ROWS[model], **MODES[mode]).items()}
    parts = []
    for model in models:
        rest = sum(idle(model).values())
        table = [[*mode, *(gib(rest + found[(model, *mode, rows)].peak()) for rows in ROWS[model])] for mode in MODES]
        header = ["trained", "`--dtype`", "", *map(str, ROWS[model])]
        parts.append(
            f"### {model.name}: GiB on the GPU by images in a micro-batch of a process\n\n" + _table(header, table)
        )
    parts += [at_rest(found), in_processes(found), stages(), on_disk(found)]
    body = "\n\n".join(parts)
    print(body)
    path = DOCS / "stable-diffusion.md"
    text = path.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}", encoding="utf-8")


def gib(number: float) -> str:
    return f"{number / 2**30:.1f}"


def at_rest(found: dict[tuple, Plan]) -> str:
    """What is there before the first image, and what flags add."""
    table = []
    for model in ROWS:
        for trains in (ALL, ADAPTERS):
            p = found[model, trains, "half", "", 1]
            more = (q.peak(True) - q.peak() for key, q in found.items() if key[:3] == (model, trains, "half"))
            unused = idle(model)
            row = [p.weights, p.gradients, p.moments, unused["VAE"] + unused["text"], unused["CLIP"]]
            row += [p.ddp() - p.peak(), p.gradients, max(more)]
            table.append([model.name.split(",")[0], trains, *map(gib, row)])
    header = ["", "trained", "UNet", "gradients", "AdamW", "VAE, text", "CLIP", "ddp", "`--ema`", "`--accumulate`"]
    return "### What stays in memory, and the most that flags add (GiB, half precision)\n\n" + _table(header, table)


def in_processes(found: dict[tuple, Plan]) -> str:
    table = []
    for model in ROWS:
        rest = sum(idle(model).values())
        for again in ("", AGAIN):
            for rows in ROWS[model][-2:]:
                p = found[model, ALL, "half", again, rows]
                shards = (gib(rest + p.fsdp(number)) for number in PROCESSES)
                table.append([model.name.split(",")[0], again, str(rows), gib(rest + p.ddp()), *shards])
    header = ["", "", "images", "ddp", *(f"fsdp, {number} processes" for number in PROCESSES)]
    return "### GiB on each GPU of several (all weights, half precision)\n\n" + _table(header, table)


def stages() -> str:
    """Sampling and evaluation work in float32, with one pipeline and the reward's CLIP on the device."""
    table = []
    for model in ROWS:
        unused = idle(model)
        with torch.device("meta"):
            there = size(UNet(model.unet)) + sum(unused.values())
        table.append([model.name.split(",")[0], *(gib(there + sampling(model, rows)) for rows in SAMPLED)])
    title = "### Sampling and evaluation: GiB in float32, by `--sampling-batch-size`"
    return f"{title}\n\n" + _table(["", *map(str, SAMPLED)], table)


def on_disk(found: dict[tuple, Plan]) -> str:
    table = []
    for model in ROWS:
        latents = 2 * torch.Size(model.latents).numel()  # mean and deviation
        text = sum(torch.Size(shape).numel() for shape in model.context)
        full, lora = (found[model, trains, "half", "", 1] for trains in (ALL, ADAPTERS))
        unused = idle(model)
        checkpoints = [f"{(p.gradients + p.moments) / 1e9:.2f} GB" for p in (full, lora)]
        folder = full.weights + unused["VAE"] + unused["text"]
        kept = [f"{2 * latents:,}", f"{2 * text:,}", *checkpoints, f"{lora.gradients / 1e6:.1f} MB"]
        table.append([model.name.split(",")[0], *kept, f"{folder / 1e9:.1f} GB"])
    header = ["", "cache: bytes an image", "a caption", "checkpoint", f"with {ADAPTERS}", "lora.safetensors", "model/"]
    return "### On disk (half precision: cached float32 takes twice the bytes)\n\n" + _table(header, table)


if __name__ == "__main__":
    main()
