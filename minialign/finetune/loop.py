"""Stage 3 of the method: the loss of a step, the settings of fine-tuning, and the loop (Lee et al. 2023, section 3.3).

    L = E_model[ r(x,z) ||eps - eps_theta(x_t,t,z)||^2 ] + beta E_pre[ ||eps - eps_theta(x_t,t,z)||^2 ]

Only the UNet learns; text encoder and autoencoder are frozen, so that latents and contexts are computed once, before.
Not the paper's, and off unless asked for: min-SNR weights of timesteps, noise offset, a moving average of the weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion import NoiseSchedule
from ..engine.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from ..engine.optimising import EMA, Stop, Terminated, learning_rate, progress, trained
from ..engine.processes import distributed, full_tensor, gathered, processes, reshard, synchronise
from ..files import InputError
from ..loss import reward_weighted_loss
from .batches import Sample, TrainingData, micro_batch, sample_step, split_rows
from .weights import min_snr_weight


# --------------------------------------------------------------------------------------------------------- the loss
def step_loss(
    network: Callable[..., Tensor],
    schedule: NoiseSchedule,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    context: Sequence[Tensor],
    factors: Tensor,
    is_pair: Tensor | None = None,
    beta: float = 1.0,
    *,
    min_snr: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The reward-weighted loss of a batch, a float32 scalar, and the squared error (B,) of each row, without gradient.

    network(x_t, t, *context) -> (B,C,h,w). x0, noise (B,C,h,w): latents and the Gaussian noise that is added to them.
    t (B,): timesteps. context: tensors (B,L,D) and so on. factors (B,): weights of the model images, r in the paper.
    is_pair (B,) bool: rows that are pre-training pairs, whose mean weighs beta in place of a factor; None: none are.
    min_snr: gamma of `min_snr_weight`; 0 weighs every timestep one. dtype: of the network's arithmetic.
    """
    with torch.autocast(x0.device.type, dtype, enabled=dtype != torch.float32):
        prediction = network(schedule.add_noise(x0, noise, t), t, *context)
    target = schedule.target(x0, noise, t)
    errors = (prediction.detach().float() - target).square().flatten(1).mean(1)
    if min_snr:
        root = min_snr_weight(schedule, t, min_snr).sqrt()[:, None, None, None]
        prediction, target = prediction * root, target * root
    return reward_weighted_loss(prediction, target, factors, is_pair, beta), errors


# ----------------------------------------------------------------------------------------------------- the settings
@dataclass(frozen=True)
class FineTuning:
    """The settings of fine-tuning. From `parallel` on they change rounding, memory or files, but not the method."""

    steps: int  # updates of the weights
    beta: float  # weight of the pre-training term; 0: none
    batch_size: int  # rows of a step: model images and pre-training pairs, in all processes and micro-batches together
    learning_rate: float  # peak, of AdamW
    pretrain_fraction: float = 0.125  # of the rows that are pre-training pairs; each term is the mean over its own rows
    lr_schedule: str = "cosine"  # of the learning rate after the warm-up: constant, linear or cosine
    warmup: int = 20  # first steps, in which the learning rate rises
    clip_norm: float = 1.0  # largest norm of the gradient
    ema: float = 0.0  # decay of a moving average of the weights that takes their place in the end; 0: none
    image_sampling: str = "proportional"  # of model images: in proportion to their weights, or uniform (`SAMPLINGS`)
    prompt_dropout: float = 0.1  # probability of the empty prompt, so that guidance keeps its unconditional model
    min_snr: float = 0.0  # gamma of the min-SNR weight of timesteps; 0: each weighs one
    noise_offset: float = 0.0  # standard deviation of the noise that all pixels of a channel share
    seed: int = 0  # of everything random
    dtype: torch.dtype = torch.float32  # of the arithmetic; weights are float32, and in float16 the loss is scaled
    identity: str = ""  # of the model and of what it learns from: a checkpoint of another one is refused
    parallel: str = "ddp"  # how processes share the work: "ddp" has copies, "fsdp" has shards
    accumulate: int = 1  # micro-batches of a step in each process, one after the other, to save memory
    checkpoint_every: int = 100  # steps
    keep: int = 2  # newest checkpoints
    log_every: int = 10  # steps
    validate_every: int = 0  # steps; 0: never

    @property
    def digest(self) -> str:
        """What stands for the method's settings in a checkpoint, SHA-256 in hexadecimal."""
        free = [field.name for field in fields(self)]
        free = free[free.index("parallel") :]
        method = {field.name: str(getattr(self, field.name)) for field in fields(self) if field.name not in free}
        return hashlib.sha256(json.dumps(method).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------- what is trained
class State:
    """What a step changes, and a checkpoint holds: weights, AdamW's moments, their average, the scale of the loss."""

    def __init__(self, unet: nn.Module, settings: FineTuning):
        self.unet, self.settings, self.device = unet, settings, next(unet.parameters()).device
        self.network = distributed(unet, settings.parallel, self.device)  # first of all: it may replace parameters
        self.optimizer = torch.optim.AdamW(
            trained(unet).values(), settings.learning_rate, weight_decay=1e-2, fused=True
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.dtype == torch.float16)
        self.average = EMA(unet, settings.ema) if settings.ema else None
        # the first step that was not finite, `steps` until there is one; on the device, so that no step waits for it
        self.first_bad = torch.tensor(settings.steps, device=self.device)

    def load(self, folder: Path) -> int:
        """Restore the newest checkpoint; the number of steps it had finished, 0 where there is none."""
        return load_checkpoint(folder, self.unet, self.optimizer, self.average, self.scaler, self.settings.digest)

    def save(self, folder: Path, step: int) -> None:
        """Write a checkpoint after `step` finished steps, and remove the oldest ones."""
        s = self.settings
        save_checkpoint(folder, step, self.unet, self.optimizer, self.average, self.scaler, s.keep, s.digest)

    def update(self, step: int, loss: Tensor) -> Tensor:
        """Update the weights by the accumulated gradient of a step; its norm () before it was clipped.

        A step whose loss or gradient is not finite is noted; where float16 overflows in the gradient alone, the scaler
        leaves the step out and scales less.
        """
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, s.steps, s.learning_rate, min(s.warmup, s.steps), s.lr_schedule)
        self.scaler.unscale_(self.optimizer)
        norm = full_tensor(nn.utils.clip_grad_norm_(trained(self.unet).values(), s.clip_norm))
        finite = loss.isfinite() if self.scaler.is_enabled() else loss.isfinite() & norm.isfinite()
        self.first_bad = torch.where(finite, self.first_bad, self.first_bad.clamp(max=step))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.unet, step)
        return norm

    @contextmanager
    def as_left(self) -> Iterator[None]:
        """The UNet as fine-tuning would leave it now: with the average as its weights, in the training's arithmetic."""
        dtype = self.settings.dtype
        average = self.average.in_place(self.unet) if self.average is not None else nullcontext()
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32), average:
            yield
            reshard(self.unet)


# --------------------------------------------------------------------------------------------------------- the loop
def finetune(
    unet: nn.Module,
    schedule: NoiseSchedule,
    data: TrainingData,
    folder: Path,
    settings: FineTuning,
    *,
    log: Callable[[dict[str, Any]], None] = lambda row: None,
    validate: Callable[[int], None] = lambda step: None,
) -> None:
    """Fine-tune what is not frozen of `unet` in place by the reward-weighted loss, from the newest checkpoint on.

    folder: of the checkpoints. `log` gets the numbers of every `log_every`-th step, `validate` the number of finished
    steps every `validate_every`. A resumed run repeats an uninterrupted one, on a CPU bit by bit where the number of
    processes is the same. SIGTERM ends the step, saves and raises Terminated. InputError where a loss is not finite:
    no such weights are kept.
    """
    s = settings
    rows = split_rows(s.batch_size, s.pretrain_fraction, s.beta if data.pairs is not None else 0, s.accumulate)
    state = State(unet, s)
    sample_of = partial(
        sample_step, data=data, rows=rows, timesteps=len(schedule.alphas_cumprod),
        image_sampling=s.image_sampling, prompt_dropout=s.prompt_dropout, noise_offset=s.noise_offset, seed=s.seed,
    )  # fmt: skip
    first, schedule = state.load(folder), schedule.to(state.device)
    unet.train()
    if first and s.validate_every and first % s.validate_every == 0:  # a killed run may not have come to it
        with state.as_left():
            validate(first)
    with Stop() as stop:
        bar = progress(range(first, s.steps), "fine-tune", s.steps, first)
        for step in bar:
            # 1. A batch (section 3.3): model images x_0 sampled by r(x,z), pre-training pairs, noise, timesteps.
            sample = sample_of(step)
            # 2. The gradient of E_model[r ||eps - eps_theta(x_t,t,z)||^2] + beta E_pre[||eps - eps_theta(x_t,t,z)||^2].
            loss, errors = backward(state, schedule, data, sample)
            # 3. AdamW's update of the UNet by the clipped gradient (appendix D); the average of the weights follows.
            norm = state.update(step, loss)
            # 4. Every few steps log the numbers, save and validate: reading from a GPU waits for it.
            done, last = step + 1, step + 1 == s.steps
            asked = any(gathered(stop.asked))  # among hosts: no device is waited for
            save = asked or last or done % s.checkpoint_every == 0
            if save or done % s.log_every == 0:
                bad, row = step_metrics(done, state, rows, loss, errors, norm)
                if bad < s.steps:
                    raise InputError(_not_finite(bad, s, data, sample_of(bad), folder))
                log(row)
                bar.set_postfix_str(f"loss {row['loss']:.3g}, lr {row['learning_rate']:.1e}", refresh=False)
            if save:
                state.save(folder, done)
            if asked:
                raise Terminated(f"SIGTERM at step {done}, which is saved")
            if s.validate_every and done % s.validate_every == 0:
                with state.as_left():
                    validate(done)
        if any(gathered(stop.asked)):
            raise Terminated(f"SIGTERM at step {s.steps}, which is saved")
    if state.average is not None:
        state.average.put_into(unet)
    unet.eval()


def backward(state: State, schedule: NoiseSchedule, data: TrainingData, sample: Sample) -> tuple[Tensor, Tensor]:
    """Accumulate the gradient of a step, micro-batch by micro-batch; this process's share of two sums over the step.

    The shares are of the loss, () and of the squared errors of model images and of pre-training pairs, (2,).
    """
    s, (rank, size), device = state.settings, processes(), state.device
    loss, errors, total = torch.zeros((), device=device), torch.zeros(2, device=device), size * s.accumulate
    for i in range(s.accumulate):
        synchronise(state.network, now=i == s.accumulate - 1)
        batch = micro_batch(sample, rank * s.accumulate + i, total, data, s.beta, device)
        micro_loss, of_rows = step_loss(state.network, schedule, **vars(batch), min_snr=s.min_snr, dtype=s.dtype)
        state.scaler.scale(micro_loss / s.accumulate).backward()
        loss = loss + micro_loss.detach() / total
        errors = errors + torch.stack([(of_rows * ~batch.is_pair).sum(), (of_rows * batch.is_pair).sum()])
    return loss, errors


def step_metrics(
    step: int, state: State, rows: tuple[int, int], loss: Tensor, errors: Tensor, norm: Tensor
) -> tuple[int, dict[str, Any]]:
    """The first step that was not finite (`steps` where there is none), and the row of the log after `step` steps.

    The row has the loss, the mean squared error of model images and of pre-training pairs, the learning rate, and the
    norm of the gradient unless float16 overflowed in it. InputError where float16 always overflows.
    """
    seen = gathered((int(state.first_bad.item()), *torch.stack([loss, *errors, norm]).tolist()))
    first_bad, losses, of_model, of_pairs, norms = zip(*seen)
    bad = min(first_bad)
    if bad == state.settings.steps and state.scaler.is_enabled() and state.scaler.get_scale() < 1e-3:
        raise InputError(
            f"step {step}: in float16 the gradient overflows at any scale of the loss; "
            "accepted: --dtype bfloat16 or float32"
        )
    row = {"step": step, "loss": sum(losses), "learning_rate": state.optimizer.param_groups[0]["lr"]}
    row["model_loss"] = sum(of_model) / rows[0]
    if rows[1]:
        row["pretrain_loss"] = sum(of_pairs) / rows[1]
    if math.isfinite(norms[0]):
        row["gradient_norm"] = norms[0]  # the same in all processes
    return bad, row


def _not_finite(step: int, settings: FineTuning, data: TrainingData, sample: Sample, folder: Path) -> str:
    precision = str(settings.dtype).removeprefix("torch.")
    batch = [(data.model_images, i) for i in sample.model_images.tolist()]
    batch += [(data.pairs, i) for i in sample.pairs.tolist()] if data.pairs is not None else []
    names = list(dict.fromkeys(images.names[i] if images.names else f"image {i}" for images, i in batch))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    last = ", ".join(map(str, checkpoints(folder)[-1:])) or "none"
    return (
        f"step {step + 1}: the loss is not finite at --learning-rate {settings.learning_rate:g} --dtype {precision}; "
        f"accepted: a smaller learning rate{'' if precision == 'float32' else ', or --dtype float32'}; no such weights "
        f"are kept; the last good checkpoint: {last}; the batch: {', '.join(names[:8])}{more}"
    )
