"""The inputs of a fine-tuning step: its random samples, and the tensors of its micro-batches.

What is random in a step depends on (seed, step) alone and is sampled on the CPU for the whole batch, so that any number
of processes and micro-batches computes the same step, and a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import shuffled
from ..data.cache import Rows
from ..engine.optimising import generator
from ..engine.processes import processes
from ..files import InputError
from .weights import SAMPLINGS


@dataclass(frozen=True)
class Latents:
    """Images as the UNet reads them: mean and std (N,C,h,w) of their latents, the row (N,) of their context.

    On the CPU: tensors, or what is read like one by a tensor of row numbers (`cache.Rows`).
    """

    mean: Rows | Tensor
    std: Rows | Tensor
    row: Tensor
    names: Sequence[str] = ()  # of their files, for messages


@dataclass(frozen=True)
class TrainingData:
    """What fine-tuning learns from, on the CPU."""

    context: Sequence[Rows | Tensor]  # of Z prompts and, as last row, of the empty one (Z+1,L,D); SDXL has a second
    model_images: Latents
    weight: Tensor  # (N,) of each model image, r in the paper; not negative
    pairs: Latents | None = None  # for pre-training; None: there are none, whatever beta


# ------------------------------------------------------------------------------------------------- what is random
@dataclass(frozen=True)
class Sample:
    """What is random in a step: M model images first, then P pre-training pairs; B = M + P rows."""

    model_images: Tensor  # (M,) row numbers, by one of `SAMPLINGS`
    factors: Tensor  # (M,) of their losses
    pairs: Tensor  # (P,) row numbers
    latents: Tensor  # (B,C,h,w) standard Gaussian: latents are mean + std times this
    noise: Tensor  # (B,C,h,w) epsilon
    t: Tensor  # (B,) timesteps
    no_prompt: Tensor  # (B,) bool: these rows see the empty prompt


def sample_step(
    step: int,
    data: TrainingData,
    rows: tuple[int, int],
    timesteps: int,
    *,
    image_sampling: str = "proportional",
    prompt_dropout: float = 0.0,
    noise_offset: float = 0.0,
    seed: int = 0,
) -> Sample:
    """Sample everything random of a step, counted from 0; the same for the same arguments, whatever came before.

    rows: the numbers M of model images and P of pre-training pairs in a step (`split_rows`). Pairs come in a random
    order, each once an epoch. timesteps: their number in the noise schedule. image_sampling: how model images are
    sampled, one of SAMPLINGS. prompt_dropout: probability of the empty prompt (Ho & Salimans 2022, algorithm 1).
    noise_offset: standard deviation of what is added to all of a channel's noise (Guttenberg 2023).
    """
    g = generator(seed, 5, step)
    (model_rows, pair_rows), batch = rows, sum(rows)
    # of their own generator: however rows are sampled, the rest of a step is the same
    chosen, factors = SAMPLINGS[image_sampling](data.weight, model_rows, generator(seed, 8, step))
    others = torch.arange(step * pair_rows, (step + 1) * pair_rows)
    if data.pairs is not None and pair_rows:
        others = shuffled(others, len(data.pairs.row), seed)
    latents, noise = torch.randn(2, batch, *data.model_images.mean.shape[1:], generator=g)
    t = stratified_timesteps(timesteps, batch, g)
    no_prompt = torch.rand(batch, generator=g) < prompt_dropout
    if noise_offset:
        noise += noise_offset * torch.randn(*noise.shape[:2], 1, 1, generator=g)
    return Sample(chosen, factors, others, latents, noise, t, no_prompt)


def stratified_timesteps(total: int, number: int, g: torch.Generator) -> Tensor:
    """Uniform timesteps (number,) that cover 0..total-1 evenly, in random order (Kingma et al. 2021, section I.1)."""
    strata = torch.randperm(number, generator=g, dtype=torch.float64)
    return (
        ((strata + torch.rand(number, generator=g, dtype=torch.float64)) * total / number).long().clamp(max=total - 1)
    )


# --------------------------------------------------------------------------------------------------- micro-batches
def split_rows(batch_size: int, pretrain_fraction: float, beta: float, accumulate: int) -> tuple[int, int]:
    """The numbers of model images and of pre-training pairs in a step; with beta 0 there are no pairs.

    InputError where a micro-batch would have no model image.
    """
    pair_rows = max(1, round(pretrain_fraction * batch_size)) if beta > 0 else 0
    model_rows, size = batch_size - pair_rows, processes()[1]
    if model_rows < size * accumulate:
        raise InputError(
            f"batch size {batch_size}: {model_rows} rows of model images cannot be split into "
            f"{size * accumulate} micro-batches ({size} processes, {accumulate} accumulated)"
        )
    return model_rows, pair_rows


@dataclass(frozen=True)
class MicroBatch:
    """The arguments of `step_loss` for the rows that are computed at once."""

    x0: Tensor  # (B,C,h,w) latents
    noise: Tensor  # (B,C,h,w)
    t: Tensor  # (B,)
    context: tuple[Tensor, ...]  # (B,L,D) of their prompts, and SDXL's second conditioning
    factors: Tensor  # (B,)
    is_pair: Tensor  # (B,) bool
    beta: float


def micro_batch(
    sample: Sample, number: int, total: int, data: TrainingData, beta: float, device: torch.device
) -> MicroBatch:
    """Micro-batch `number` of `total` of a step: every `total`-th of its model images and of its pairs, on `device`.

    The mean of the losses of all micro-batches is the loss of the step: factors and beta are scaled so that means over
    the rows of a micro-batch become means over the rows of the step.
    """
    model_rows, pair_rows = len(sample.model_images), len(sample.pairs)
    of_model, of_pairs = torch.arange(model_rows)[number::total], torch.arange(pair_rows)[number::total]
    rows = torch.cat([of_model, model_rows + of_pairs])
    read = [(data.model_images, sample.model_images[of_model])]
    if data.pairs is not None and len(of_pairs):
        read.append((data.pairs, sample.pairs[of_pairs]))
    mean, std, row = (
        torch.cat([getattr(images, name)[chosen] for images, chosen in read]) for name in ("mean", "std", "row")
    )
    x0 = mean + std * sample.latents[rows]
    row = torch.where(sample.no_prompt[rows], len(data.context[0]) - 1, row)
    model_scale, pair_scale = total * len(of_model) / model_rows, total * len(of_pairs) / max(pair_rows, 1)
    factors = torch.cat([sample.factors[of_model] * model_scale, torch.ones(len(of_pairs))])
    is_pair = torch.arange(len(rows)) >= len(of_model)
    tensors = (x0, sample.noise[rows], sample.t[rows], factors, is_pair, *(table[row] for table in data.context))
    x0, noise, t, factors, is_pair, *context = (on_device(tensor, device) for tensor in tensors)
    return MicroBatch(x0, noise, t, tuple(context), factors, is_pair, beta * pair_scale)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, copied without waiting."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
