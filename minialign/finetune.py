"""Stage 3 of the method, and the main job of all three stages: python -m minialign.finetune

Draws images with a pre-trained model, has a part of them labelled, learns a reward from the labels, fine-tunes the
UNet by reward-weighted likelihood plus a pre-training term (Lee et al. 2023, section 3.3; loss.py), and judges the
result on fresh noise. With no argument it runs on the embedded world and needs no network; --model and --feedback
take the place of its pieces. Every finished stage is kept: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import re
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from . import __version__
from .command import Parser, in_range, run_command
from .diffusion import Context, NoiseSchedule
from .evaluate import judge_both, model_card, summary
from .feedback import FeedbackStore
from .generate import draw_to_folder
from .loss import reward_weighted_loss
from .models.clip import CLIP
from .models.pretrained import InputError, read_bytes, read_json, read_weights
from .pipeline import Pipeline
from .reward import RewardModel, learn_reward
from .shapes.task import shapes_task
from .task import LAST_SEED, Task, own_task
from .training import (
    Stop,
    Terminated,
    atomic,
    generator,
    learning_rate,
    load_checkpoint,
    progress,
    remove_unfinished,
    save_checkpoint,
    write_json,
)

EMBEDDED_DEFAULTS: dict[str, Any] = {  # how they were chosen: docs/results.md
    "steps": 400,
    "beta": 0.03,
    "batch_size": 64,
    "pretrain_share": 0.125,  # of a batch's rows; each term is averaged over its own, so this changes noise alone
    "learning_rate": 1e-3,
    "dtype": "float32",
    "sampling_steps": 10,
    "guidance": 3.0,
    "images": 2560,
    "labels": 1280,
    "test_images": 640,
    "pretrain_images": 512,
    "hidden": 512,
    "temperature": 0.5,
    "reward_steps": 1000,
    "out": "runs/shapes",
}
OWN_DEFAULTS: dict[str, Any] = {  # the paper's learning rate, beta and reward; one GPU's batch
    "steps": 2000,
    "beta": 1.0,
    "batch_size": 8,
    "pretrain_share": 0.125,
    "learning_rate": 1e-5,
    "dtype": "float32",
    "sampling_steps": 30,
    "guidance": 7.5,
    "test_images": 64,
    "hidden": 1024,
    "temperature": 2.0,
    "reward_steps": 1000,
    "out": "runs/own",
}
RECIPES: dict[str, dict[str, Any]] = {  # Lee et al. 2023; learning rate schedule, prompt dropout and sampler stay ours
    "paper": {
        "steps": 10_000,
        "beta": 1.0,
        "batch_size": 512,
        "pretrain_share": 0.5,  # 256 of each
        "learning_rate": 1e-5,
        "guidance": 7.5,
        "hidden": 1024,
        "temperature": 2.0,
        "dtype": "bfloat16",  # the paper says half precision
    }
}
DRAWN_AT_ONCE = 64  # images at most, however large the batch of fine-tuning is
NOT_SETTINGS = ("out", "fresh", "device", "recipe")  # flags that are no settings of a run
OWN_CLIP = "openai/clip-vit-large-patch14"  # the paper's
PROMPT_DROPOUT = 0.1  # of the prompts are left out, so that guidance keeps its unconditional model


@dataclass(frozen=True)
class Latents:
    """Images as the UNet sees them: mean and std (N,C,h,w) of their latents, and the row of their prompt's context."""

    mean: Tensor
    std: Tensor
    row: Tensor


def finetune(
    unet: nn.Module,
    schedule: NoiseSchedule,
    context: Context,
    model_images: Latents,
    weight: Tensor,
    pretrain_images: Latents | None,
    folder: Path,
    *,
    steps: int,
    beta: float,
    batch_size: int,
    peak_learning_rate: float,
    pretrain_share: float = 0.125,
    dtype: torch.dtype = torch.float32,
    checkpoint_every: int = 100,
    seed: int = 0,
    log: Callable[[dict[str, Any]], None] = lambda row: None,
) -> None:
    """Fine-tune `unet` in place by the reward-weighted loss, resuming from the newest checkpoint in `folder`.

    context: of P prompts and, as last row, of none: (P+1,L,D), and SDXL's second conditioning. weight (N,): of each
    model image, r in the paper. Model images are drawn in proportion to it (`draw_by_weight`), which has the
    expectation of weighting uniform draws and spends no UNet call on images that weigh nothing. Every step depends on
    (seed, step) alone, so that a resumed run repeats an uninterrupted one bit by bit. SIGTERM ends the step, saves and
    raises Terminated.
    """
    device = context[0].device
    optimizer = torch.optim.AdamW(unet.parameters(), peak_learning_rate, weight_decay=1e-2, fused=True)
    first = load_checkpoint(folder, unet, optimizer)
    finite = torch.tensor(True, device=device)
    pretrain_rows = max(1, round(pretrain_share * batch_size)) if beta > 0 and pretrain_images is not None else 0
    is_pretrain = torch.arange(batch_size, device=device) >= batch_size - pretrain_rows
    unet.train()
    with Stop() as stop:
        for step in progress(range(first, steps), "fine-tune", steps, first):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak_learning_rate, warmup=min(20, steps))
            g = generator(seed, 5, step)
            chosen, factor = draw_by_weight(weight, batch_size - pretrain_rows, g)
            x0, rows = _sample(model_images, chosen.to(device), g)
            if pretrain_images is not None and pretrain_rows:
                others = torch.randint(len(pretrain_images.row), (pretrain_rows,), generator=g)
                more, more_rows = _sample(pretrain_images, others.to(device), g)
                x0, rows = torch.cat([x0, more]), torch.cat([rows, more_rows])
            rows[torch.rand(batch_size, generator=g).to(device) < PROMPT_DROPOUT] = len(context[0]) - 1
            noise = torch.randn(x0.shape, generator=g).to(device)
            t = stratified_timesteps(len(schedule.alphas_cumprod), batch_size, g).to(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                prediction = unet(schedule.add_noise(x0, noise, t), t, *(part[rows] for part in context))
                target = schedule.target(x0, noise, t)
                loss = reward_weighted_loss(
                    prediction, target, F.pad(factor.to(device), (0, pretrain_rows)), is_pretrain, beta
                )
            loss.backward()
            finite &= nn.utils.clip_grad_norm_(unet.parameters(), 1.0).isfinite()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            save = (step + 1) % checkpoint_every == 0 or step + 1 == steps or stop.asked
            if (step + 1) % 10 == 0 or save:  # reading from the device waits for it: not at every step
                if not finite:
                    raise InputError(
                        f"step {step + 1}: the gradient is not finite (loss {loss:.3g}); no such weights are kept"
                    )
                row = {"step": step + 1, "loss": loss.item(), "learning_rate": optimizer.param_groups[0]["lr"]}
                errors = (prediction.detach().float() - target).square().flatten(1).mean(1)
                row["model_loss"] = errors[~is_pretrain].mean().item()
                if pretrain_rows:
                    row["pretrain_loss"] = errors[is_pretrain].mean().item()
                log(row)
            if save:
                save_checkpoint(folder, step + 1, unet, optimizer)
            if stop.asked and save:
                raise Terminated(f"SIGTERM at step {step + 1}, which is saved")
        if stop.asked:
            raise Terminated(f"SIGTERM at step {steps}, which is saved")
    unet.eval()


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


def _sample(images: Latents, chosen: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """x_0 of chosen images, drawn anew from the VAE's Gaussian, and their prompts' rows."""
    mean = images.mean[chosen]
    return mean + images.std[chosen] * torch.randn(mean.shape, generator=g).to(mean), images.row[chosen]


# ---------------------------------------------------------------------------------------------------- the main job
class Run:
    """The folder of a run and its stages (stages.json: how often each was begun, and the seconds that it took)."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / "stages.json"
        self.stages: dict[str, dict[str, float]] = read_json(path) if path.exists() else {}

    @contextmanager
    def stage(self, name: str, why: str) -> Iterator[bool]:
        """Announce a stage; True where its work is still to be done."""
        state = self.stages.setdefault(name, {"begun": 0})
        if "seconds" in state:
            print(f"{name}: done before ({state['seconds']:.0f} s)", flush=True)
            yield False
            return
        print(f"{name}: {why}", flush=True)
        state["begun"] += 1
        write_json(self.folder / "stages.json", self.stages)
        begin = time.perf_counter()
        yield True
        state["seconds"] = round(time.perf_counter() - begin, 2)
        write_json(self.folder / "stages.json", self.stages)

    def log(self, stage: str) -> Callable[[dict[str, Any]], None]:
        """Appends rows of a stage to metrics.jsonl, where a step that is done again takes its old row's place."""
        path = self.folder / "metrics.jsonl"
        fresh = True

        def append(row: dict[str, Any]) -> None:
            nonlocal fresh
            if fresh and path.exists():
                old = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
                kept = [other for other in old if other["stage"] != stage or other["step"] < row["step"]]
                with atomic(path) as temporary:
                    temporary.write_text("".join(json.dumps(other) + "\n" for other in kept))
            fresh = False
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": stage, **row}) + "\n")

        return append


def run(
    settings: dict[str, Any], task: Task, folder: Path, device: torch.device, fresh: bool = False
) -> dict[str, Any]:
    """The whole job; the content of results.json. `fresh` removes an earlier run first."""
    check_folder(folder)
    read = [settings["model"], settings["clip"], settings.get("feedback"), *(path for _, path, _ in task.given)]
    for source in filter(None, read):  # which --fresh would remove, and a stage overwrite
        if Path(source).resolve().is_relative_to(folder.resolve()):
            raise InputError(f"--out {folder}: holds {source}, which this run reads; use another --out")
    pipe = Pipeline.from_pretrained(settings["model"], device=device)
    clip = CLIP.from_pretrained(settings["clip"], device=device)
    weight = pipe.unet.conv_in.weight.detach().float().cpu()  # stands for the weights: with others it is another run
    settings = settings | {"checkpoint_crc32": f"{zlib.crc32(weight.numpy().tobytes()):08x}"}
    with locked(folder):
        if fresh:
            remove_run(folder)
        return run_stages(open_run(folder, settings), pipe, clip, task, settings)


def run_stages(job: Run, pipe: Pipeline, clip: CLIP, task: Task, settings: dict[str, Any]) -> dict[str, Any]:
    """All stages, each skipped where it is done; the content of results.json."""
    folder, device = job.folder, pipe.device
    sampling = {
        "steps": settings["sampling_steps"],
        "guidance": settings["guidance"],
        "batch": min(settings["batch_size"], DRAWN_AT_ONCE),
    }
    store = FeedbackStore(folder)
    try:
        with job.stage("generate", _why_generate(task)) as todo:
            if todo:
                paths = draw_to_folder(pipe, task.draw, folder / "images", **sampling, title="generate")
                rows = zip(task.draw, paths)
                store.add_images((text, str(path.relative_to(folder)), seed) for (text, seed), path in rows)
                store.add_images((text, str(path), None) for text, path, _ in task.given)
        images = store.images()
        pictures = [Image.open(image.path).convert("RGB") for image in images]
        with job.stage("label", _why_label(task)) as todo:
            if todo:
                label(store, task, pictures, settings["seed"])
        labels = store.labels()
    finally:
        store.close()
    prompts = [image.prompt for image in images]
    with job.stage("reward", f"an MLP on CLIP features learns {len(labels)} labels and scores all images") as todo:
        if todo:
            known = {i: labels[image.id] for i, image in enumerate(images) if image.id in labels}
            learn_reward(task.contrastive, clip, pictures, prompts, known, settings, folder, job.log("reward"))
    reward = RewardModel.from_pretrained(folder / "reward", device=device)
    with job.stage("finetune", "the UNet learns its own images again, the better ones more") as todo:
        if todo:
            finetune_pipeline(pipe, task, pictures, prompts, settings, folder, job.log("finetune"))
    with job.stage("evaluate", _why_evaluate(task)) as todo:
        if todo:
            after = Pipeline.from_pretrained(folder / "model", device=device)
            before = Pipeline.from_pretrained(settings["model"], device=device)
            judged = judge_both(before, after, task, clip, reward, sampling, folder)
            write_json(folder / "evaluation.json", judged)
    results = json.loads((folder / "evaluation.json").read_text())
    results["reward"] = json.loads((folder / "reward" / "held_out.json").read_text())
    results["seconds"] = {name: state["seconds"] for name, state in job.stages.items()}
    results["seconds"]["total"] = round(sum(results["seconds"].values()), 2)
    results["interruptions"] = sum(state["begun"] - 1 for state in job.stages.values())  # their time is not counted
    results |= {"settings": settings, "minialign": __version__}
    results["counts"] = {"images": len(images), "labels": len(labels), "evaluated": len(task.test)}
    write_json(folder / "results.json", results)
    card = folder / "model" / "README.md"
    if not card.exists():  # or what its maker has filled in would be lost
        with atomic(card) as temporary:
            temporary.write_text(model_card(results), encoding="utf-8")
    return results


def _why_generate(task: Task) -> str:
    if task.draw:
        return f"the pre-trained model draws {len(task.draw)} images for the prompts of its feedback"
    return f"{len(task.given)} images that were labelled before are taken in"


def _why_label(task: Task) -> str:
    return f"the {task.judge_name} says good, bad or skip of {task.labels} of them" if task.draw else "as the file says"


def _why_evaluate(task: Task) -> str:
    return (
        f"before and after draw {len(task.test)} images each from the same new noise, judged by the {task.judge_name}"
    )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process out of a run; the lock goes with the process that holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    except BlockingIOError as error:
        raise InputError(f"--out {folder}: another process is at work on this run") from error


def open_run(folder: Path, settings: dict[str, Any]) -> Run:
    """The run in `folder`, new or gone on with; InputError where it was begun with other settings."""
    path = folder / "config.json"
    if path.exists():
        begun = read_json(path)["settings"]
        for key, value in settings.items():
            if (was := begun.get(key)) != value and key != "checkpoint_every":
                raise InputError(f"{folder} was begun with {key}={was!r}, not {value!r}; use another --out, or --fresh")
        remove_unfinished(folder)
    else:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        made_by = {"minialign": __version__, "versions": versions, "threads": torch.get_num_threads()}
        write_json(path, {"settings": settings} | made_by)
    return Run(folder)


def label(store: FeedbackStore, task: Task, pictures: Sequence[Image.Image], seed: int) -> None:
    """Labels from the task's file, or by its judge on a random part of the images."""
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
            store.add_labels(f"file, {number}", verdicts)
        return
    part = sorted(torch.randperm(len(images), generator=generator(seed, 4))[: task.labels].tolist())
    judged = [task.judge([pictures[i]], [images[i].prompt])[0] for i in progress(part, "label")]
    store.add_labels(task.judge_name, zip([images[i].id for i in part], judged))


def finetune_pipeline(
    pipe: Pipeline,
    task: Task,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    settings: dict[str, Any],
    folder: Path,
    log: Callable[[dict[str, Any]], None],
) -> None:
    """Encode images and prompts once, fine-tune, and write the pipeline to `folder`/model."""
    scored = read_weights(folder / "cache" / "reward.safetensors")
    weight = WEIGHTINGS[settings["weighting"]].weight(
        scored["reward"], scored.get("contrast", torch.empty(0)), prompts, settings["tau"]
    )
    if not weight.any() or not weight.isfinite().all():
        raise InputError(f"--weighting {settings['weighting']} --tau {settings['tau']}: no image weighs anything")
    pairs = task.pretrain() if task.pretrain else []
    texts = list(dict.fromkeys([*prompts, *(text for text, _ in pairs)]))
    row = {text: i for i, text in enumerate(texts)}
    context = tuple(torch.cat(pair) for pair in zip(pipe.encode_prompts(texts), pipe.encode_unconditional()))

    def encode(images: Sequence[Image.Image], captions: Sequence[str]) -> Latents:
        batch = settings["batch_size"]
        starts = progress(range(0, len(images), batch), "encode")
        parts = [pipe.encode_images(images[i : i + batch]) for i in starts]
        mean, std = (torch.cat(part) for part in zip(*parts))
        return Latents(mean, std, torch.tensor([row[text] for text in captions], device=mean.device))

    model_images = encode(pictures, prompts)
    # without captioned images of its own kind, the model's own images, all weighing one, hold it in place
    pretrain_images = encode([image for _, image in pairs], [text for text, _ in pairs]) if pairs else model_images
    pipe.unet.requires_grad_(True)
    finetune(
        pipe.unet, pipe.schedule, context, model_images, weight, pretrain_images, folder / "checkpoints",
        steps=settings["steps"], beta=settings["beta"], batch_size=settings["batch_size"],
        peak_learning_rate=settings["learning_rate"], pretrain_share=settings["pretrain_share"],
        dtype=getattr(torch, settings["dtype"]),
        checkpoint_every=settings["checkpoint_every"], seed=settings["seed"], log=log,
    )  # fmt: skip
    pipe.card = ""  # the base model's; this model's is written when it has been judged
    with atomic(folder / "model") as temporary:
        pipe.save_pretrained(temporary)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minialign.finetune", description=__doc__.split("\n\n")[1])
    add = parser.add_argument

    def tuned(flag: str, kind: Callable[[str], Any], what: str) -> None:
        key = flag[2:].replace("-", "_")
        add(flag, type=kind, help=f"{what} (default: {EMBEDDED_DEFAULTS[key]}; with --feedback: {OWN_DEFAULTS[key]})")

    tuned("--out", Path, "the run's folder")
    add("--seed", type=in_range(int, 0, LAST_SEED), default=0, help="of everything random (default: 0)")
    tuned("--steps", in_range(int, 1), "fine-tuning steps")
    tuned("--beta", in_range(float, 0), "weight of the pre-training term")
    tuned("--batch-size", in_range(int, 2), "images in a fine-tuning step")
    tuned("--learning-rate", in_range(float, 0, 1), "peak of AdamW's")
    choices = "; ".join(
        f"{name}: {w.about}" + f" (tau: {w.tau})" * (name != "reward") for name, w in WEIGHTINGS.items()
    )
    add("--weighting", choices=WEIGHTINGS, default="reward", help=f"of the model's images: {choices} (default: reward)")
    add("--tau", type=in_range(float, 1e-6), help="of --weighting (default: its own)")
    add("--recipe", choices=RECIPES, help="paper: the settings of Lee et al. 2023 in place of the defaults")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps ... (default: cuda where there is one, else cpu)")
    precisions = ("float32", "bfloat16")
    add("--dtype", choices=precisions, help="of the fine-tuning's arithmetic (default: float32)")
    add("--checkpoint-every", type=in_range(int, 1), default=100, help="steps between checkpoints (default: 100)")
    add("--fresh", action="store_true", help="start over: remove what an earlier run left in the folder")
    add("--model", help="folder, hub id or .safetensors file (2.x: of v) to fine-tune (default: the embedded one)")
    add("--feedback", type=Path, help="labelled images: CSV or JSON lines with columns prompt, image, label")
    add("--clip", help=f"CLIP of the reward, folder or hub id (default: the embedded one; with --model: {OWN_CLIP})")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    if (args.model is None) != (args.feedback is None):
        raise InputError("--model and --feedback go together: one's labels are worth nothing for another's images")
    device = pick_device(args.device)
    defaults = EMBEDDED_DEFAULTS if args.feedback is None else OWN_DEFAULTS
    if args.recipe is not None:
        defaults = defaults | RECIPES[args.recipe]
    if args.weighting == "reward" and args.tau is not None:
        raise InputError("--tau: --weighting reward has none; accepted with the other weightings")
    args.tau = WEIGHTINGS[args.weighting].tau if args.tau is None else args.tau
    given = {key: value for key, value in vars(args).items() if value is not None}
    folder = Path(given.get("out", defaults["out"]))
    settings = defaults | {key: value for key, value in given.items() if key not in NOT_SETTINGS}
    settings = {"model": None, "clip": None if args.model is None else OWN_CLIP} | settings
    settings.pop("out")
    if args.feedback is None:
        numbers = ("images", "labels", "test_images", "pretrain_images", "seed")
        task = shapes_task(*(settings[key] for key in numbers))
    else:
        settings["feedback"] = str(args.feedback)
        settings["feedback_crc32"] = f"{zlib.crc32(read_bytes(args.feedback)):08x}"
        task = own_task(args.feedback, settings["test_images"], settings["seed"])
    results = run(settings, task, folder, device, args.fresh)
    from .report import write_report  # matplotlib is slow to import

    report = write_report(folder)
    print(f"\n{summary(results)}\n\n{results['seconds']['total']:.0f} s in all stages. Report: {report}")


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
    """Remove what a run wrote, and nothing else. What makes it a run goes last, so that a killed removal is one too."""
    (folder / "stages.json").unlink(missing_ok=True)
    for name in ("images", "reward", "cache", "checkpoints", "model", "samples", "controls"):
        shutil.rmtree(folder / name, ignore_errors=True)
    files = ["samples.json", "evaluation.json", "results.json", "metrics.jsonl", "report.html", "config.json"]
    for path in (*folder.glob("feedback.sqlite*"), *(folder / name for name in files)):
        path.unlink(missing_ok=True)


def pick_device(name: str) -> torch.device:
    """The torch device of a --device flag."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", name):
            raise RuntimeError("not one of these")
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"--device {name}: cannot be used ({reason}); accepted: cpu, cuda, cuda:N, mps") from error


if __name__ == "__main__":
    run_command(main)
