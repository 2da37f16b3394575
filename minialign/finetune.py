"""Stage 3 of the method, and the main job of all three stages: python -m minialign.finetune

Draws images with a pre-trained model, has a part of them labelled, learns a reward from the labels, fine-tunes the
UNet by reward-weighted likelihood plus a pre-training term (Lee et al. 2023, section 3.3; loss.py), and judges the
result on fresh noise. With no argument it runs on the embedded world and needs no network; --model and --feedback
take the place of its pieces. Every finished stage is kept: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from . import __version__
from .cache import Cache, Rows, encode_pairs, encode_texts
from .command import Parser, in_range, run_command
from .data import ACCEPTED, ImageFiles, Skipped, image_pairs, shuffled
from .diffusion import NoiseSchedule
from .evaluate import judge_both, model_card, summary
from .feedback import FeedbackStore, StoredImage
from .generate import draw, draw_to_folder, fingerprint
from .loss import reward_weighted_loss
from .models.clip import CLIP
from .models.lora import add_lora, load_lora, merge_lora, save_lora
from .models.pretrained import InputError, read_json, read_weights
from .pipeline import Pipeline
from .reward import RewardModel, embed_images, embed_texts, learn_reward
from .runs import (
    EMBEDDED_DEFAULTS,
    FROM_FILE,
    OWN_CLIP,
    OWN_DEFAULTS,
    RECIPES,
    Run,
    check_folder,
    locked,
    open_run,
    pick_device,
    remove_run,
    say,
)
from .shapes.task import shapes_task
from .task import LAST_SEED, NOISES, Task, next_round, own_task
from .training import (
    EMA,
    PARALLEL,
    SCHEDULES,
    Stop,
    Terminated,
    atomic,
    barrier,
    checkpoints,
    distributed,
    gather_weights,
    gathered,
    generator,
    joined,
    leading,
    learning_rate,
    load_checkpoint,
    processes,
    progress,
    reshard,
    save_checkpoint,
    synchronise,
    trained,
    whole,
    write_json,
)

NOT_SETTINGS = ("out", "fresh", "device", "rounds", "cache")  # flags that are no settings of a run
PASSED_ON = (  # settings that are arguments of `finetune`
    "steps", "beta", "batch_size", "pretrain_share", "accumulate", "parallel", "lr_schedule", "warmup", "clip_norm",
    "ema", "prompt_dropout", "min_snr", "noise_offset", "checkpoint_every", "keep", "seed", "validate_every",
)  # fmt: skip
LOG_EVERY = 10  # steps


@dataclass(frozen=True)
class Latents:
    """Images as the UNet sees them: mean and std (N,C,h,w) of their latents, the row (N,) of their context.

    On the CPU: tensors, or what reads like one by a tensor of row numbers (`cache.Rows`).
    """

    mean: Rows | Tensor
    std: Rows | Tensor
    row: Tensor
    names: Sequence[str] = ()  # of their files, for messages


@dataclass(frozen=True)
class Draw:
    """What is random in a step: M rows of model images, then P of pre-training pairs; B = M + P."""

    chosen: Tensor  # (M,) of the model images
    factor: Tensor  # (M,) of their terms
    others: Tensor  # (P,) of the pre-training pairs
    sample: Tensor  # (B,C,h,w) of the VAE's Gaussian
    noise: Tensor  # (B,C,h,w)
    t: Tensor  # (B,)
    dropped: Tensor  # (B,) bool: no prompt


def finetune(
    unet: nn.Module,
    schedule: NoiseSchedule,
    context: Sequence[Rows | Tensor],
    model_images: Latents,
    weight: Tensor,
    pretrain_images: Latents | None,
    folder: Path,
    *,
    steps: int,
    beta: float,  # weight of the pre-training term
    batch_size: int,  # rows of a step, of both terms, in all processes and parts together
    peak_learning_rate: float,
    pretrain_share: float = 0.125,  # of the rows; each term is averaged over its own
    accumulate: int = 1,  # parts that a process computes its rows in
    dtype: torch.dtype = torch.float32,  # of the arithmetic; in float16 the loss is scaled
    parallel: str = "ddp",  # or "fsdp": how processes share the work
    lr_schedule: str = "cosine",
    warmup: int = 20,  # steps
    clip_norm: float = 1.0,  # largest norm of the gradient
    ema: float = 0.0,  # decay of the average of the weights that is left in the end; 0: the weights themselves
    prompt_dropout: float = 0.1,  # part of the prompts left out, so that guidance keeps its unconditional model
    min_snr: float = 0.0,  # gamma of `min_snr_weight`; 0: every timestep weighs one
    noise_offset: float = 0.0,  # standard deviation of what is added to all of a channel's noise
    checkpoint_every: int = 100,
    keep: int = 2,  # checkpoints
    seed: int = 0,
    log: Callable[[dict[str, Any]], None] = lambda row: None,
    validate: Callable[[int], None] = lambda step: None,
    validate_every: int = 0,
) -> None:
    """Fine-tune what is not frozen of `unet` in place by the reward-weighted loss, from the newest checkpoint on.

    context: of P prompts and, as last row, of none: (P+1,L,D), and SDXL's second conditioning, on the CPU. weight (N,):
    of each model image, r in the paper. Model images are drawn in proportion to it (`draw_by_weight`), which has the
    expectation of weighting uniform draws and spends no UNet call on images that weigh nothing; pre-training pairs
    come in a random order, each once an epoch. A step depends on (seed, step) alone, among however many processes, so
    that a resumed run repeats an uninterrupted one, bit by bit on as many processes of a CPU. SIGTERM ends the step,
    saves and raises Terminated. InputError where a loss is not finite: no such weights are kept.
    """
    device = next(unet.parameters()).device
    rank, size = processes()
    parts = size * accumulate
    pairs = pretrain_images if beta > 0 and pretrain_images is not None else None
    model_rows, pair_rows = split_rows(batch_size, pretrain_share, beta if pairs is not None else 0, accumulate)
    network = distributed(unet, parallel, device)
    optimizer = torch.optim.AdamW(trained(unet).values(), peak_learning_rate, weight_decay=1e-2, fused=True)
    arithmetic = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    average = EMA(unet, ema) if ema else None
    first = load_checkpoint(folder, unet, optimizer, average, scaler)
    schedule = schedule.to(device)

    def draw(step: int) -> Draw:
        g = generator(seed, 5, step)
        chosen, factor = draw_by_weight(weight, model_rows, g)
        others = torch.arange(step * pair_rows, (step + 1) * pair_rows)
        others = others if pairs is None else shuffled(others, len(pairs.row), seed)
        sample, noise = torch.randn(2, batch_size, *model_images.mean.shape[1:], generator=g)
        t = stratified_timesteps(len(schedule.alphas_cumprod), batch_size, g)
        dropped = torch.rand(batch_size, generator=g) < prompt_dropout
        if noise_offset:
            noise += noise_offset * torch.randn(*noise.shape[:2], 1, 1, generator=g)
        return Draw(chosen, factor, others, sample, noise, t, dropped)

    def loss_of_part(drawn: Draw, part: int) -> tuple[Tensor, Tensor]:
        """The loss of every parts-th row, and the summed squared errors of model images and of pairs, (2,)."""
        model_part, pair_part = torch.arange(model_rows)[part::parts], torch.arange(pair_rows)[part::parts]
        rows = torch.cat([model_part, model_rows + pair_part])
        read = [(model_images, drawn.chosen[model_part])]
        if pairs is not None and len(pair_part):
            read.append((pairs, drawn.others[pair_part]))
        mean, std, row = (
            torch.cat([getattr(images, name)[chosen] for images, chosen in read]) for name in ("mean", "std", "row")
        )
        x0 = mean + std * drawn.sample[rows]
        row = torch.where(drawn.dropped[rows], len(context[0]) - 1, row)
        factor = F.pad(drawn.factor[model_part], (0, len(pair_part)))
        is_pair = torch.arange(len(rows)) >= len(model_part)
        x0, noise, t, factor, is_pair, *prompt = (
            on_device(tensor, device)
            for tensor in (x0, drawn.noise[rows], drawn.t[rows], factor, is_pair, *(part[row] for part in context))
        )
        with arithmetic:
            prediction = network(schedule.add_noise(x0, noise, t), t, *prompt)
        target = schedule.target(x0, noise, t)
        errors = (prediction.detach().float() - target).square().flatten(1).mean(1)
        if min_snr:
            root = min_snr_weight(schedule, t, min_snr).sqrt()[:, None, None, None]
            prediction, target = prediction * root, target * root
        # reward_weighted_loss takes means over the part's rows; these make them means over all rows of the step
        model_scale, pair_scale = parts * len(model_part) / model_rows, parts * len(pair_part) / max(pair_rows, 1)
        loss = reward_weighted_loss(prediction, target, factor * model_scale, is_pair, beta * pair_scale)
        return loss, torch.stack([(errors * ~is_pair).sum(), (errors * is_pair).sum()])

    def look_at(step: int) -> None:
        with arithmetic, average.in_place(unet) if average is not None else nullcontext():
            validate(step)
            reshard(unet)

    never = torch.tensor(steps, device=device)
    first_bad = never  # the first step whose loss was not finite
    unet.train()
    if first and validate_every and first % validate_every == 0:  # a killed run may not have come to it
        look_at(first)
    with Stop() as stop:
        for step in progress(range(first, steps), "fine-tune", steps, first):
            rate = learning_rate(step, steps, peak_learning_rate, min(warmup, steps), lr_schedule)
            for group in optimizer.param_groups:
                group["lr"] = rate
            drawn, total, errors = draw(step), torch.zeros((), device=device), torch.zeros(2, device=device)
            for i in range(accumulate):
                synchronise(network, now=i == accumulate - 1)
                loss, squares = loss_of_part(drawn, rank * accumulate + i)
                scaler.scale(loss / accumulate).backward()
                total, errors = total + loss.detach() / parts, errors + squares
            scaler.unscale_(optimizer)
            norm = whole(nn.utils.clip_grad_norm_(trained(unet).values(), clip_norm))
            # where float16 overflows in the gradient alone, the scaler leaves the step out and scales less
            finite = total.isfinite() if scaler.is_enabled() else total.isfinite() & norm.isfinite()
            first_bad = first_bad.minimum(torch.where(finite, never, step))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if average is not None:
                average.update(unet, step)

            save = (step + 1) % checkpoint_every == 0 or step + 1 == steps
            read = save or (step + 1) % LOG_EVERY == 0  # reading from the device waits for it: not at every step
            asked = any(gathered(stop.asked))  # among hosts: no device is waited for
            if read or asked:
                seen = gathered((first_bad.item(), total.item(), *errors.tolist()))
                bad = min(values[0] for values in seen)
                if bad < steps:
                    raise InputError(_not_finite(bad, draw(bad), model_images, pairs, folder))
                if scaler.is_enabled() and scaler.get_scale() < 1e-3:
                    raise InputError(
                        f"step {step + 1}: in float16 the gradient overflows at any scale of the loss; "
                        "accepted: --dtype bfloat16 or float32"
                    )
                row = {"step": step + 1, "loss": sum(values[1] for values in seen), "learning_rate": rate}
                row["model_loss"] = sum(values[2] for values in seen) / model_rows
                if pair_rows:
                    row["pretrain_loss"] = sum(values[3] for values in seen) / pair_rows
                log(row)
            if save or asked:
                save_checkpoint(folder, step + 1, unet, optimizer, average, scaler, keep)
            if asked:
                raise Terminated(f"SIGTERM at step {step + 1}, which is saved")
            if validate_every and (step + 1) % validate_every == 0:
                look_at(step + 1)
        if any(gathered(stop.asked)):
            raise Terminated(f"SIGTERM at step {steps}, which is saved")
    if average is not None:
        average.put_into(unet)
    unet.eval()


def split_rows(batch_size: int, pretrain_share: float, beta: float, accumulate: int) -> tuple[int, int]:
    """Rows of model images and of pre-training pairs in a step; InputError where each part of it would have none."""
    pair_rows = max(1, round(pretrain_share * batch_size)) if beta > 0 else 0
    model_rows, size = batch_size - pair_rows, processes()[1]
    if model_rows < size * accumulate:
        raise InputError(
            f"batch size {batch_size}: {model_rows} rows of model images cannot be split into "
            f"{size * accumulate} parts ({size} processes, {accumulate} accumulated)"
        )
    return model_rows, pair_rows


def _not_finite(step: int, drawn: Draw, model_images: Latents, pairs: Latents | None, folder: Path) -> str:
    batch = [(model_images, i) for i in drawn.chosen.tolist()]
    batch += [(pairs, i) for i in drawn.others.tolist()] if pairs is not None else []
    names = dict.fromkeys(images.names[i] if images.names else f"image {i}" for images, i in batch)
    last = ", ".join(map(str, checkpoints(folder)[-1:])) or "none"
    return (
        f"step {step + 1}: the loss is not finite; no such weights are kept; the last good checkpoint: {last}; "
        f"the batch: {', '.join(names)}"
    )


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, copied without waiting."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def min_snr_weight(schedule: NoiseSchedule, t: Tensor, gamma: float) -> Tensor:
    """Weights (B,) of timesteps that bound what x_0's error counts: min(SNR, gamma) of it (Hang et al. 2023, eq. 7).

    Over SNR where the network predicts noise, over SNR + 1 where it predicts v.
    """
    snr = schedule.snr(t)
    if schedule.prediction_type == "sample":
        return snr.clamp(max=gamma)
    return (gamma / snr).clamp(max=1) if schedule.prediction_type == "epsilon" else snr.clamp(max=gamma) / (snr + 1)


def draw_by_weight(weight: Tensor, number: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """`number` row numbers drawn in proportion to |weight| (N,), and the factor of each: its sign, times mean |weight|.

    weight is on the CPU, so that drawing waits for no device.

    The expectation is that of weighting uniform draws: sum_i |w_i| / sum |w| * sign(w_i) mean |w| f_i = mean(w f).
    """
    size = weight.abs()
    chosen = torch.multinomial(size.double(), number, replacement=True, generator=g)
    return chosen, size.mean() * weight[chosen].sign()


def _advantage(reward: Tensor, prompts: Sequence[str]) -> Tensor:
    """(r - mean) / std among the images of one prompt, (N,); 0 for an only one."""
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    group = torch.tensor([number[prompt] for prompt in prompts], device=reward.device)

    def mean(values: Tensor) -> Tensor:
        sums = values.new_zeros(len(number)).index_add(0, group, values)
        return (sums / group.bincount(minlength=len(number)))[group]

    centred = reward - mean(reward)
    return centred / (mean(centred.square()).sqrt() + 1e-4)


@dataclass(frozen=True)
class Weighting:
    """What a model image weighs: weight(reward (N,), contrast (N,K), prompts, tau) -> (N,).

    `contrast` are the rewards of each image for prompts of other semantics than its own, there for textnorm alone.
    """

    tau: float  # the default
    weight: Callable[[Tensor, Tensor, Sequence[str], float], Tensor]
    about: str


WEIGHTINGS = {
    "reward": Weighting(1, lambda r, c, z, tau: r, "r, the paper's"),
    "threshold": Weighting(0.5, lambda r, c, z, tau: (r > tau).float(), "1 where r > tau, rejection sampling"),
    "exponential": Weighting(
        0.2, lambda r, c, z, tau: ((r - 1) / tau).exp(), "exp((r - 1) / tau), Peters & Schaal 2007"
    ),
    "textnorm": Weighting(
        0.1,
        lambda r, c, z, tau: torch.cat([r[:, None], c], dim=1).div(tau).softmax(dim=1)[:, 0],
        "r among contrastive prompts, softmax at tau, Kim et al. 2024",
    ),
    "advantage": Weighting(
        5,
        lambda r, c, z, tau: _advantage(r, z).clamp(-tau, tau),
        "r against the prompt's other images, signed, clipped to tau, Advantage Weighted Matching 2025",
    ),
}


def stratified_timesteps(total: int, number: int, g: torch.Generator) -> Tensor:
    """Uniform timesteps (number,) that cover 0..total-1 evenly, in random order (Kingma et al. 2021, section I.1)."""
    strata = torch.randperm(number, generator=g, dtype=torch.float64)
    return (
        ((strata + torch.rand(number, generator=g, dtype=torch.float64)) * total / number).long().clamp(max=total - 1)
    )


# ---------------------------------------------------------------------------------------------------- the main job
def run(
    settings: dict[str, Any],
    task: Task,
    folder: Path,
    device: torch.device,
    fresh: bool = False,
    rounds: int = 1,
    cache: Path | None = None,
) -> dict[str, Any]:
    """The whole job; the content of results.json. `fresh` removes an earlier run first.

    Round 2 and later ones begin with the model of the one before and lie in `folder`/round-2 and so on. `cache` is
    where latents and text contexts are kept, `folder`/cache unless given.
    """
    check_folder(folder)
    read = [settings["model"], settings["clip"], settings.get("feedback"), settings.get("pretrain")]
    for source in filter(None, [*read, *(path for _, path, _ in task.given)]):
        if Path(source).resolve().is_relative_to(folder.resolve()):  # --fresh would remove it, and a stage overwrite
            raise InputError(f"--out {folder}: holds {source}, which this run reads; use another --out")
    if rounds > 1:
        next_round(task, rounds, settings["seed"])  # or it would be known after the rounds before
    if fresh and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        raise InputError("--fresh: each restart of --max-restarts would start over; use a new --out")
    if settings.get("pretrain") and not (os.path.exists(settings["pretrain"]) or glob.glob(settings["pretrain"])):
        raise InputError(f"--pretrain {settings['pretrain']}: not found; {ACCEPTED}")
    split_rows(settings["batch_size"], settings["pretrain_share"], settings["beta"], settings["accumulate"])
    stands_for = fingerprint(Pipeline.from_pretrained(settings["model"]))
    clip = CLIP.from_pretrained(settings["clip"], device=device)
    results: list[dict[str, Any]] = []
    with locked(folder):
        barrier()  # all have looked at the folder
        if fresh and leading():
            remove_run(folder)
        barrier()
        for number in range(1, rounds + 1):
            place, before = folder if number == 1 else folder / f"round-{number}", None
            if number > 1:
                say(f"\nround {number} of {rounds}")
                before = (place.parent if number == 2 else place.with_name(f"round-{number - 1}")).resolve()
                task = next_round(task, number, settings["seed"])
                settings = settings | {"model": str(before / "model"), "round": number}
                stands_for = fingerprint(Pipeline.from_pretrained(settings["model"]))
            settings = settings | {"checkpoint_crc32": stands_for}
            job = open_run(place, settings, "use another --out, or --fresh")
            results.append(run_stages(job, clip, task, settings, cache or folder / "cache", before))
        if rounds > 1:
            results[0]["rounds"] = [
                {key: one[key] for key in ("alignment", "fidelity", "diversity", "mean_reward")} for one in results
            ]
            if leading():
                write_json(folder / "results.json", results[0])
    return results[0]


def run_stages(
    job: Run,
    clip: CLIP,
    task: Task,
    settings: dict[str, Any],
    cache: Path,
    before: Path | None = None,
) -> dict[str, Any]:
    """All stages, each skipped where it is done; the content of results.json. `before` is the round before, if any."""
    folder, device = job.folder, clip.logit_scale.device
    sampling = {
        "steps": settings["sampling_steps"],
        "guidance": settings["guidance"],
        "batch": settings["draw_batch"],
    }
    load = partial(Pipeline.from_pretrained, settings["model"], device=device)  # when it is needed
    with job.stage("generate", _why_generate(task), together=True) as todo:
        if todo:
            paths = draw_to_folder(load(), task.draw, folder / "images", **sampling, title="generate", part=processes())
            barrier()
            if leading():
                store = FeedbackStore(folder)
                rows = zip(task.draw, paths)
                how = {key: settings[key] for key in ("model", "sampling_steps", "guidance")}
                store.add_images(((text, str(path.relative_to(folder)), seed) for (text, seed), path in rows), how)
                store.add_images((text, str(path), None) for text, path, _ in task.given)
                store.close()
    with job.stage("label", _why_label(task)) as todo:
        if todo:
            label(folder, task, settings["seed"])
    images, labels = gathered(_feedback(folder) if leading() else ([], {}))[0]  # one process opens the database
    pictures = ImageFiles([image.path for image in images])
    prompts = [image.prompt for image in images]
    with job.stage("reward", _why_reward(len(labels))) as todo:
        if todo:
            known = {i: labels[image.id] for i, image in enumerate(images) if image.id in labels}
            old = before / "reward" if before is not None and not known else None
            image, text = embed_images(clip, pictures), embed_texts(clip, prompts)
            learn_reward(task.contrastive, clip, image, text, prompts, known, settings, folder, job.log("reward"), old)
    with job.stage("finetune", "the UNet learns its own images again, the better ones more", together=True) as todo:
        if todo:
            finetune_pipeline(load(), task, pictures, prompts, settings, folder, job.log("finetune"), cache)
    with job.stage("evaluate", _why_evaluate(task)) as todo:
        if todo:
            reward = RewardModel.from_pretrained(folder / "reward", device=device)
            after = partial(Pipeline.from_pretrained, folder / "model", device=device)
            judged = judge_both(load, after, task, clip, reward, sampling, folder)
            write_json(folder / "evaluation.json", judged)
    results = json.loads((folder / "evaluation.json").read_text())
    results["reward"] = json.loads((folder / "reward" / "held_out.json").read_text())
    results["seconds"] = {name: state["seconds"] for name, state in job.stages.items()}
    results["seconds"]["total"] = round(sum(results["seconds"].values()), 2)
    results["interruptions"] = sum(state["begun"] - 1 for state in job.stages.values())  # their time is not counted
    results |= {"settings": settings, "minialign": __version__}
    results["counts"] = {"images": len(images), "labels": len(labels), "evaluated": len(task.test)}
    card = folder / "model" / "README.md"
    if leading():
        write_json(folder / "results.json", results)
        if not card.exists():  # or what its maker has filled in would be lost
            with atomic(card) as temporary:
                temporary.write_text(model_card(results), encoding="utf-8")
    return results


def _why_generate(task: Task) -> str:
    if task.draw:
        return f"the pre-trained model draws {len(task.draw)} images for the prompts of its feedback"
    return f"{len(task.given)} images that were labelled before are taken in"


def _why_label(task: Task) -> str:
    if task.judge is None:
        return "as the file says" if task.given else "nobody is there to label them"
    return f"the {task.judge_name} says good, bad or skip of {task.labels} of them"


def _why_reward(labels: int) -> str:
    if not labels:
        return "the reward model of the round before scores all images"
    return f"an MLP on CLIP features learns {labels} labels and scores all images"


def _why_evaluate(task: Task) -> str:
    return (
        f"before and after draw {len(task.test)} images each from the same new noise, judged by the {task.judge_name}"
    )


def _feedback(folder: Path) -> tuple[list[StoredImage], dict[int, float]]:
    """All images of a run's store, and the labels of those that have one."""
    store = FeedbackStore(folder)
    try:
        return store.images(), store.labels()
    finally:
        store.close()


def label(folder: Path, task: Task, seed: int) -> None:
    """Labels from the task's file, or by its judge on a random part of the images."""
    store = FeedbackStore(folder)
    try:
        images = store.images()
        if task.judge is None:
            known = {(image.prompt, image.path): image.id for image in images}
            votes: Counter[int] = Counter()
            labellers: dict[int, list[tuple[int, str]]] = {}
            for prompt, path, verdict in task.given:
                image = known[prompt, path]
                votes[image] += 1  # a pair that the file judges again has another labeller
                labellers.setdefault(votes[image], []).append((image, verdict))
            for number, verdicts in labellers.items():
                store.add_labels(f"{FROM_FILE}{number}", verdicts)
            return
        part = sorted(torch.randperm(len(images), generator=generator(seed, 4))[: task.labels].tolist())
        pictures = ImageFiles([images[i].path for i in part])
        judged = [task.judge([pictures[k]], [images[i].prompt])[0] for k, i in enumerate(progress(part, "label"))]
        store.add_labels(task.judge_name, zip([images[i].id for i in part], judged))
    finally:
        store.close()


def finetune_pipeline(
    pipe: Pipeline,
    task: Task,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    settings: dict[str, Any],
    folder: Path,
    log: Callable[[dict[str, Any]], None],
    cache: Path,
    look: Callable[[Pipeline, Task, dict[str, Any], Path], Callable[[int], None]] | None = None,
) -> None:
    """Encode images and prompts once, fine-tune, and write `folder`/model, and adapters to lora.safetensors.

    Without captioned images of its own kind, the model's own images, all weighing one, hold it in place. `look` makes
    what is called with the step every settings["validate_every"] of them, `validation` unless given.
    """
    scored = read_weights(folder / "cache" / "reward.safetensors")
    weight = WEIGHTINGS[settings["weighting"]].weight(
        scored["reward"], scored.get("contrast", torch.empty(0)), prompts, settings["tau"]
    )
    if not weight.any() or not weight.isfinite().all():
        raise InputError(f"--weighting {settings['weighting']} --tau {settings['tau']}: no image weighs anything")
    dtype = getattr(torch, settings["dtype"])
    part = processes()
    how: dict[str, Any] = {
        "batch": settings["draw_batch"],
        "dtype": torch.float32 if dtype == torch.float32 else torch.float16,
        "part": part,
    }
    sources = [encode_pairs(pipe, image_pairs(pictures, prompts), cache, **how)]
    if task.pretrain is not None:
        captions, images = zip(*task.pretrain())
        sources.append(encode_pairs(pipe, image_pairs(images, captions), cache, **how))
    elif settings.get("pretrain"):
        skipped = Skipped(folder / "skipped.jsonl", part)
        sources.append(encode_pairs(pipe, settings["pretrain"], cache, **how, skipped=skipped))
    barrier()
    encoded = Cache(cache)
    sources = [entries.kept(encoded) for entries in sources]
    texts = list(dict.fromkeys(text for entries in sources for text in entries.captions))
    keys = encode_texts(pipe, texts, cache, **how)
    barrier()
    context, row = Cache(cache).context(keys), {text: i for i, text in enumerate(texts)}
    latents = [
        Latents(
            encoded.rows("mean", entries.keys),
            encoded.rows("std", entries.keys),
            torch.tensor([row[text] for text in entries.captions]),
            entries.names,
        )
        for entries in sources
    ]
    pipe.unet.requires_grad_(True)
    if settings["lora"]:
        pipe.unet.to(dtype)  # what is frozen may be as short as the arithmetic
        torch.manual_seed(settings["seed"])  # the same adapters in all processes
        for p in add_lora(pipe.unet, settings["lora"]):
            p.data = p.data.float()
    pipe.unet.checkpointing = settings["gradient_checkpointing"]
    if settings["compile"]:
        pipe.unet.compile()
    finetune(
        pipe.unet, pipe.schedule, context, latents[0], weight, latents[-1], folder / "checkpoints",
        peak_learning_rate=settings["learning_rate"], dtype=dtype, log=log,
        validate=(look or validation)(pipe, task, settings, folder),
        **{key: settings[key] for key in PASSED_ON},
    )  # fmt: skip
    gather_weights(pipe.unet)
    if leading():
        if settings["lora"]:  # merged into the weights as they were stored
            save_lora(pipe.unet, folder / "lora.safetensors")
            pipe = Pipeline.from_pretrained(settings["model"])
            load_lora(pipe.unet, folder / "lora.safetensors")
            merge_lora(pipe.unet)
        pipe.card = ""  # the base model's; this model's is written when it has been judged
        with atomic(folder / "model") as temporary:
            pipe.save_pretrained(temporary)


def validation(pipe: Pipeline, task: Task, settings: dict[str, Any], folder: Path) -> Callable[[int], None]:
    """What draws the first test items with the UNet as it is, into `folder`/validation/step-N.png, two rows."""
    items = [(item.prompt, item.seed) for item in task.test[:8]]
    how = {"steps": settings["sampling_steps"], "guidance": settings["guidance"]}

    def validate(step: int) -> None:
        images = list(draw(pipe, items, **how, batch=len(items), title="validate"))  # all processes: FSDP2 needs them
        if leading():
            with atomic(folder / "validation" / f"step-{step}.png") as temporary:
                grid(images, columns=4).save(temporary, format="PNG")

    return validate


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images of one size, side by side in rows."""
    width, height = images[0].size
    sheet = Image.new("RGB", (min(columns, len(images)) * width, -(-len(images) // columns) * height))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minialign.finetune", description=__doc__.split("\n\n")[1])
    add = parser.add_argument

    def tuned(flag: str, kind: Callable[[str], Any], what: str) -> None:
        key = flag[2:].replace("-", "_")
        own, embedded = OWN_DEFAULTS[key], EMBEDDED_DEFAULTS[key]
        add(
            flag,
            type=kind,
            help=f"{what} (default: {embedded if own == embedded else f'{embedded}; with --feedback: {own}'})",
        )

    tuned("--out", Path, "the run's folder")
    add("--fresh", action="store_true", help="start over: remove what an earlier run left in the folder")
    add("--model", help="folder, hub id or .safetensors file (2.x: of v) to fine-tune (default: the embedded one)")
    add("--feedback", type=Path, help="labelled images: CSV or JSON lines with prompt, image, label; or a run's folder")
    add("--pretrain", help="pre-training pairs: folder with metadata.jsonl or captions in .txt, or tar shards (a glob)")
    add("--clip", help=f"CLIP of the reward, folder or hub id (default: the embedded one; with --model: {OWN_CLIP})")
    add("--recipe", choices=RECIPES, help="paper: the settings of Lee et al. 2023 in place of the defaults")
    rounds = "times to draw, score and fine-tune, each from the model of the one before (default: 1)"
    add("--rounds", type=in_range(int, 1), default=1, help=rounds)
    tuned("--seed", in_range(int, 0, LAST_SEED), "of everything random")
    tuned("--steps", in_range(int, 1), "fine-tuning steps")
    tuned("--beta", in_range(float, 0), "weight of the pre-training term")
    tuned("--batch-size", in_range(int, 2), "images in a fine-tuning step")
    tuned("--learning-rate", in_range(float, 0, 1), "peak of AdamW's")
    add("--lr-schedule", choices=SCHEDULES, help="of the learning rate after its warm-up (default: cosine)")
    tuned("--warmup", in_range(int, 0), "steps in which the learning rate rises")
    choices = "; ".join(
        f"{name}: {w.about}" + f" (tau: {w.tau})" * (name != "reward") for name, w in WEIGHTINGS.items()
    )
    add("--weighting", choices=WEIGHTINGS, help=f"of the model's images: {choices} (default: reward)")
    add("--tau", type=in_range(float, 1e-6), help="of --weighting (default: its own)")
    tuned("--lambda", in_range(float, 0), "weight of the reward's auxiliary loss")
    tuned("--temperature", in_range(float, 1e-6), "T of the reward's auxiliary loss")
    tuned("--clip-norm", in_range(float, 1e-6), "largest norm of the gradient")
    tuned("--ema", in_range(float, 0, 0.999999), "decay of an average of the weights, kept in their place; 0: none")
    tuned("--prompt-dropout", in_range(float, 0, 1), "part of the prompts that is left out, for guidance")
    tuned("--min-snr", in_range(float, 0), "gamma of the min-SNR weight of timesteps, 5 in its paper; 0: none")
    tuned("--noise-offset", in_range(float, 0, 1), "standard deviation of noise common to a channel")
    tuned("--lora", in_range(int, 0), "rank of adapters to train in place of the UNet; 0: all of it")
    tuned("--sampling-steps", in_range(int, 1, 1000), "of DDIM, for all images that are drawn")
    tuned("--guidance", in_range(float, 0), "weight of classifier-free guidance")
    tuned("--draw-batch", in_range(int, 1), "images drawn, encoded or judged at once")
    tuned("--test-images", in_range(int, 2, NOISES), "that judge the result, before and after")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps ... (default: cuda where there is one, else cpu)")
    precisions = ("float32", "bfloat16", "float16")
    add("--dtype", choices=precisions, help="of the fine-tuning's arithmetic (default: float32)")
    tuned("--accumulate", in_range(int, 1), "parts of a batch that are computed one after the other, to save memory")
    add("--gradient-checkpointing", action="store_true", default=None, help="compute activations twice, to save memory")
    add("--compile", action="store_true", default=None, help="the UNet by torch.compile")
    add("--parallel", choices=PARALLEL, help="under torchrun: whole copies (ddp) or shards (default: ddp)")
    tuned("--checkpoint-every", in_range(int, 1), "steps between checkpoints")
    tuned("--keep", in_range(int, 1), "checkpoints")
    tuned("--validate-every", in_range(int, 0), "steps between grids of drawn images; 0: none")
    add("--cache", type=Path, help="folder of latents and text contexts that runs may share (default: cache in --out)")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    if (args.model is None) != (args.feedback is None):
        raise InputError("--model and --feedback go together: one's labels are worth nothing for another's images")
    if args.pretrain is not None and args.feedback is None:
        raise InputError("--pretrain: the embedded world draws its own pairs; accepted with --model and --feedback")
    defaults = EMBEDDED_DEFAULTS if args.feedback is None else OWN_DEFAULTS
    if args.recipe is not None:
        defaults = defaults | RECIPES[args.recipe]
    if args.weighting in (None, "reward") and args.tau is not None:
        raise InputError("--tau: --weighting reward has none; accepted with the other weightings")
    given = {key: value for key, value in vars(args).items() if value is not None}
    folder = Path(given.get("out", defaults["out"]))
    settings = defaults | {key: value for key, value in given.items() if key not in NOT_SETTINGS}
    settings = {"model": None, "clip": None if args.model is None else OWN_CLIP} | settings
    settings["tau"] = settings["tau"] or WEIGHTINGS[settings["weighting"]].tau
    settings.pop("out")
    with joined(pick_device(args.device)) as device:
        if args.feedback is None:
            numbers = ("images", "labels", "test_images", "pretrain_images", "seed")
            task = shapes_task(*(settings[key] for key in numbers))
        else:
            task = own_task(args.feedback, settings["test_images"], settings["seed"])
            rows = json.dumps([[text, str(path), verdict] for text, path, verdict in task.given])
            settings |= {"feedback": str(args.feedback), "feedback_crc32": f"{zlib.crc32(rows.encode()):08x}"}
        results = run(settings, task, folder, device, args.fresh, args.rounds, args.cache)
        if not leading():
            return
        from .report import write_report  # matplotlib is slow to import

        places = [folder, *(folder / f"round-{number}" for number in range(2, args.rounds + 1))]
        report = [write_report(place) for place in reversed(places)][-1]
        last = read_json(places[-1] / "results.json") if args.rounds > 1 else results
        which = f" of round {args.rounds}, whose model is {places[-1] / 'model'}" if args.rounds > 1 else ""
        print(f"\n{summary(last)}\n\n{last['seconds']['total']:.0f} s in all stages{which}. Report: {report}")


if __name__ == "__main__":
    run_command(main)
