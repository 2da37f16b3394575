"""The method's section 4, the analysis: what each choice does to alignment and fidelity: python -m minialign.study

For each seed the main job is run; then, from its images, labels and reward, the pre-trained model is fine-tuned again
with one choice changed, a cell of the study. Every cell is kept: the same command goes on. Labels and judgements are
the simulated annotator's, the world is the embedded one.

A seed is a block: its cells share images, labels, prompts of the test and starting noise, so that a cell is compared
with another within each seed. y_cs = mu_c + b_s + e_cs (Fisher 1935); the interval of mu_c - mu_0 is Student's t.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .command import Parser, in_range, run_command
from .data import ImageFiles
from .evaluate import judge_images
from .feedback import FeedbackStore
from .finetune import WEIGHTINGS, finetune_pipeline, grid, run
from .generate import draw, draw_to_folder
from .models.clip import CLIP
from .models.pretrained import InputError, read_json, read_weights
from .pipeline import Pipeline
from .reward import RewardModel, embed_images, embed_texts, held_out_labels, learn_reward, measure, platt
from .runs import EMBEDDED_DEFAULTS, Busy, check_folder, locked, open_run, say
from .shapes.task import shapes_task
from .study_page import (
    Question,
    Results,
    Row,
    block,
    categories_block,
    plot,
    plot_categories,
    plot_strips,
    plot_trade_off,
    with_blocks,
    write_page,
)
from .task import LAST_SEED, Task, next_round, noise_seed
from .training import atomic, write_json, write_tensors

SEEDS = [21, 22, 23]  # no setting was chosen on these
SIZES: dict[str, dict[str, Any]] = {  # "run": the main job of a seed; "cell": its cells; "long": the long one
    "full": {
        "run": {},
        "cell": {"steps": 64, "batch_size": 32, "test_images": 320},
        "long": {"steps": 10 * EMBEDDED_DEFAULTS["steps"], "batch_size": 16, "ema": 0.99},
        "looks": [0, 100, 200, 400, 800, 1600, 2800],  # steps of the long one at which it is judged, beside the last
    },
    "quick": {  # tries every line; its numbers mean nothing
        "run": {"images": 192, "labels": 128, "test_images": 24, "pretrain_images": 16, "steps": 4, "batch_size": 8,
                "sampling_steps": 3, "hidden": 64, "reward_steps": 60},
        "cell": {"steps": 2, "batch_size": 8, "test_images": 24, "warmup": 1},
        "long": {"steps": 20, "batch_size": 8, "ema": 0.9},
        "looks": [0, 2, 10],
    },
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One choice changed: what is fine-tuned again from a seed's images and labels, or drawn without fine-tuning."""

    settings: dict[str, Any] = field(default_factory=dict)  # of fine-tuning and reward, in place of the study's
    score: Callable[[World, Tensor, Tensor], Tensor] | None = None  # in place of the reward: of embeddings (B,E), (B,)
    weight: Callable[[Tensor], Tensor] | None = None  # of the images, made of their reward r (N,)
    part: float = 1.0  # of the labels that the reward learns from
    unlabelled: bool = True  # images without a label are scored and learned from, too
    flipped: float = 0.0  # chance that a labeller says the opposite
    labellers: int = 1  # whose majority counts
    goes_on: str = ""  # from the model of which cell
    round: int = 0  # with new images, by that model, scored by the reward of the first
    best_of: Sequence[int] = ()  # images a prompt, of which the reward chooses one; nothing is fine-tuned
    times: int = 1  # the steps of other cells
    long: bool = False  # the sizes' "long" settings at a constant learning rate, judged along the way; the average of
    # the weights takes out what the rate shakes

    @property
    def teaches(self) -> bool:
        """Whether the reward is learned anew."""
        return self.part < 1 or self.flipped > 0 or not self.settings.keys().isdisjoint(("lambda", "temperature"))


@dataclass(frozen=True)
class World:
    """What the cells of a seed share: N images for feedback, the test's prompts, who judges."""

    folder: Path  # of the main job
    settings: dict[str, Any]  # `cell_settings`
    task: Task
    clip: CLIP
    reward: RewardModel  # of the main job, which judges all cells
    paths: list[Path]
    prompts: list[str]
    labels: dict[int, float]  # by the number of an image
    held_out: dict[int, float]  # those of them that no reward learns from
    image: Tensor  # (N,E)
    text: Tensor  # (N,E)
    test_text: Tensor
    reference: Tensor | None
    unseen: tuple[Tensor, Tensor, Tensor]  # embeddings of images of unseen prompts and of these (U,E), their labels


def clip_score(here: World, image: Tensor, text: Tensor) -> Tensor:
    return torch.cosine_similarity(image, text).clamp(min=0)


def fitted_clip_score(here: World, image: Tensor, text: Tensor) -> Tensor:
    """The CLIP score by a logistic regression on the labels, two numbers that are learned."""
    known = sorted(here.labels.keys() - here.held_out.keys())
    label = torch.tensor([here.labels[i] for i in known])
    a, b = platt(torch.cosine_similarity(here.image[known], here.text[known]), label)
    return (a * torch.cosine_similarity(image, text) + b).sigmoid()


BETAS = (0, 0.1, 0.5, 1, 2)
LAMBDAS, TEMPERATURES = (0, 0.25, 0.5, 1), (0.1, 1, 2)  # the default of both is 0.5
BEST_OF, BEST_OF_TUNED = (2, 4), 4
ROUNDS = 3
STRIP = 8  # images, spread over the test
CELLS: dict[str, Cell] = {
    "base": Cell(best_of=(1,)),
    "default": Cell(),
    **{f"beta-{beta:g}": Cell({"beta": beta}) for beta in BETAS},
    "clip-raw": Cell(score=clip_score),
    "clip-fitted": Cell(score=fitted_clip_score),
    **{f"lambda-{weight:g}": Cell({"lambda": weight}) for weight in LAMBDAS if weight != EMBEDDED_DEFAULTS["lambda"]},
    **{f"temperature-{t:g}": Cell({"temperature": t}) for t in TEMPERATURES},
    **{f"labels-{percent}": Cell(part=percent / 100) for percent in (5, 10, 25, 50)},
    **{f"labels-{percent}-alone": Cell(part=percent / 100, unlabelled=False) for percent in (5, 10, 25, 50, 100)},
    **{f"flipped-{percent}": Cell(flipped=percent / 100) for percent in (10, 20, 30)},
    "flipped-30-majority": Cell(flipped=0.3, labellers=3),
    "plain": Cell(weight=torch.ones_like),
    "inverted": Cell(weight=lambda r: 1 - r),
    **{name: Cell({"weighting": name}) for name in WEIGHTINGS if name != "reward"},
    "best-of": Cell(best_of=BEST_OF),
    "best-of-tuned": Cell(best_of=(BEST_OF_TUNED,), goes_on="default"),
    "longer": Cell(times=ROUNDS),
    **{f"round-{i}": Cell(goes_on=f"round-{i - 1}" if i > 2 else "default", round=i) for i in range(2, ROUNDS + 1)},
    "long": Cell(long=True),
}


# -------------------------------------------------------------------------------------------------------- the cells
def cell_settings(seed: int, size: str) -> dict[str, Any]:
    """Settings of a cell in which nothing is changed."""
    return EMBEDDED_DEFAULTS | SIZES[size]["run"] | SIZES[size]["cell"] | {"model": None, "clip": None, "seed": seed}


def looked_at(size: str) -> list[int]:
    """Steps of the long one at which it is judged."""
    return [*SIZES[size]["looks"], SIZES[size]["long"]["steps"]]


def shapes(settings: dict[str, Any]) -> Task:
    return shapes_task(*(settings[key] for key in ("images", "labels", "test_images", "pretrain_images", "seed")))


@cache
def world(folder: Path, seed: int, size: str) -> World:
    """What the main job of a seed left in `folder`, and the tests of the study."""
    job, settings = folder / f"seed-{seed}", cell_settings(seed, size)
    task = shapes(settings)
    store = FeedbackStore(job)
    try:
        images, verdicts = store.images(), store.labels()
    finally:
        store.close()
    labels = {i: verdicts[image.id] for i, image in enumerate(images) if image.id in verdicts}
    paths, prompts = [image.path for image in images], [image.prompt for image in images]
    clip = CLIP.from_pretrained()
    text = embed_texts(clip, [*prompts, *(item.prompt for item in task.test)])
    rows = [i for i, item in enumerate(task.test) if "unseen" in item.groups]
    items = [(task.test[i].prompt, task.test[i].seed) for i in rows]
    drawn = list(draw(Pipeline.from_pretrained(), items, **_sampling(settings), title="unseen prompts"))
    judged = task.judge(drawn, [prompt for prompt, _ in items]) if task.judge else []
    sure = [k for k, verdict in enumerate(judged) if verdict != "skip"]
    label = torch.tensor([float(judged[k] == "good") for k in sure])
    unseen = embed_images(clip, drawn)[sure], text[len(prompts) :][[rows[k] for k in sure]], label
    return World(
        job,
        settings,
        task,
        clip,
        RewardModel.from_pretrained(job / "reward"),
        paths,
        prompts,
        labels,
        {i: labels[i] for i in held_out_labels(labels, random.Random(seed))},  # the main job's own
        embed_images(clip, ImageFiles(paths)),
        text[: len(prompts)],
        text[len(prompts) :],
        embed_images(clip, task.reference()) if task.reference else None,
        unseen,
    )


def fill(name: str, here: World, folder: Path, size: str) -> dict[str, Any]:
    """Fine-tune and judge one cell of a seed; the content of its result.json. `folder` keeps what it goes on with."""
    cell, seed = CELLS[name], here.settings["seed"]
    settings = here.settings | cell.settings | {"steps": cell.times * here.settings["steps"]}
    if cell.long:
        settings |= SIZES[size]["long"] | {"lr_schedule": "constant", "validate_every": SIZES[size]["looks"][1]}
    settings["tau"] = settings["tau"] or WEIGHTINGS[settings["weighting"]].tau
    start = folder.parent.parent / cell.goes_on / folder.name / "model" if cell.goes_on else None
    if cell.best_of:
        return {"points": best_of(here, cell.best_of, Pipeline.from_pretrained(start))}
    paths, prompts, image, text = here.paths, here.prompts, here.image, here.text
    if cell.round:
        fresh = next_round(here.task, cell.round, seed).draw[::2]
        pipe = Pipeline.from_pretrained(start)
        paths = draw_to_folder(pipe, fresh, folder / "images", **_sampling(settings), title="generate")
        prompts = [prompt for prompt, _ in fresh]
        image, text = embed_images(here.clip, ImageFiles(paths)), embed_texts(here.clip, prompts)

    labels = labels_of(cell, {i: here.labels[i] for i in here.labels.keys() - here.held_out.keys()}, seed)
    learned = None if cell.teaches else here.folder / "reward"
    learn_reward(
        here.task.contrastive, here.clip, image, text, prompts, labels, settings, folder, lambda row: None, learned,
        here.held_out,
    )  # fmt: skip
    scored, result = read_weights(folder / "cache" / "reward.safetensors"), {}
    if cell.score is not None:
        scored["reward"] = cell.score(here, image, text)
    if not cell.round:  # these rewards are of images with held-out labels among them
        result = measured(cell, here, RewardModel.from_pretrained(folder / "reward"), scored["reward"])
    if cell.weight is not None:
        scored["reward"] = cell.weight(scored["reward"])
    if not cell.unlabelled:
        rows = sorted(labels)
        scored = {key: value[rows] for key, value in scored.items()}
        paths, prompts = [paths[i] for i in rows], [prompts[i] for i in rows]
    write_tensors(folder / "cache" / "reward.safetensors", scored)

    seen = folder / "points.json"  # of the long one, in case it is interrupted

    def points() -> dict[str, Any]:
        return read_json(seen) if seen.exists() else {}

    def look(pipe: Pipeline, *_: Any) -> Callable[[int], None]:
        def judge(step: int) -> None:
            if cell.long and step in SIZES[size]["looks"] and str(step) not in points():
                found = judge_pipeline(pipe, here, folder / f"step-{step}.png")
                write_json(seen, points() | {str(step): found})

        judge(0)
        return judge

    finetune_pipeline(
        Pipeline.from_pretrained(start), here.task, ImageFiles(paths), prompts, settings, folder, lambda row: None,
        here.folder / "cache", look,
    )  # fmt: skip
    steps = settings["steps"]
    strip = folder / f"step-{steps}.png" if cell.long else None
    last = judge_pipeline(Pipeline.from_pretrained(folder / "model"), here, strip)
    return result | {"points": points() | {str(steps) if cell.long else "": last}}


@torch.no_grad()
def measured(cell: Cell, here: World, model: RewardModel, reward: Tensor) -> dict[str, Any]:
    """How well a cell's rewards foretell labels: of held-out images of known prompts, and of images of unseen ones."""
    rows, (image, text, label) = sorted(here.held_out), here.unseen
    truth = torch.tensor([here.held_out[i] for i in rows])
    score = model(image, text) if cell.score is None else cell.score(here, image, text)
    return {"held_out": measure(reward[rows], truth), "unseen": measure(score, label)}


def labels_of(cell: Cell, labels: dict[int, float], seed: int) -> dict[int, float]:
    """The labels that a cell learns its reward from: a part of them, and what most of its labellers say.

    A smaller part is a part of a larger one; what a labeller says wrong with a small chance he says with a larger one.
    """
    rng, known = random.Random(seed), sorted(labels)
    rng.shuffle(known)
    known = known[: max(8, round(cell.part * len(known)))]  # the quick one's few should hold a good one
    wrong = {i: [rng.random() < cell.flipped for _ in range(cell.labellers)] for i in known}
    return {i: labels[i] if 2 * sum(wrong[i]) < cell.labellers else 1 - labels[i] for i in known}


def best_of(here: World, numbers: Sequence[int], pipe: Pipeline) -> dict[str, Any]:
    """A pipeline judged on the best by the reward of N images a test item, for each N."""
    number = len(here.task.test)
    noises = [noise_seed(here.settings["seed"], k, test=True) for k in range(max(numbers) * number)]
    items = [(here.task.test[k % number].prompt, seed) for k, seed in enumerate(noises)]
    images = list(draw(pipe, items, **_sampling(here.settings), title="best of"))
    score = here.reward(embed_images(here.clip, images), here.test_text.repeat(max(numbers), 1)).view(-1, number)
    points = {}
    for n in numbers:
        best = score[:n].argmax(dim=0)
        points[str(n) if n > 1 else ""] = _judged([images[int(k) * number + i] for i, k in enumerate(best)], here)
    return points


def judge_pipeline(pipe: Pipeline, here: World, strip: Path | None = None) -> dict[str, Any]:
    """What is said of a pipeline's images of the test: the numbers of `judge_images`, and the part that is aligned.

    `strip` is where some of the images are kept, side by side.
    """
    items = [(item.prompt, item.seed) for item in here.task.test]
    images = list(draw(pipe, items, **_sampling(here.settings), title="judge"))
    if strip is not None:
        with atomic(strip) as temporary:
            grid(images[:: len(images) // STRIP][:STRIP], STRIP).save(temporary, format="PNG")
    return _judged(images, here)


def _judged(images: Sequence[Any], here: World) -> dict[str, Any]:
    found = judge_images(images, here.task, here.clip, here.reward, here.test_text, here.reference)
    good = [verdict == "good" for verdict in found.pop("verdicts")]
    unseen = [value for value, item in zip(good, here.task.test) if "unseen" in item.groups]
    found |= {"aligned": sum(good) / len(good), "unseen": sum(unseen) / len(unseen)}
    return found | {"gap": found["mean_reward"] - found["aligned"]}


def _sampling(settings: dict[str, Any]) -> dict[str, Any]:
    return {"steps": settings["sampling_steps"], "guidance": settings["guidance"], "batch": settings["draw_batch"]}


def missing(folder: Path, seeds: Sequence[int]) -> list[tuple[str, int]]:
    """The cells, by name and seed, that have no result yet."""
    cells = [(name, seed) for name in CELLS for seed in seeds]
    return [cell for cell in cells if not (folder / cell[0] / f"seed-{cell[1]}" / "result.json").exists()]


def work(folder: Path, seeds: Sequence[int], size: str, threads: int) -> None:
    """Fill the cells that nobody has filled or is filling, until all are filled."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    left = [(name, seed) for name in sorted(CELLS, key=lambda name: name != "long") for seed in seeds]
    kept = {cell.goes_on for cell in CELLS.values()}  # others go on from their models
    while left:
        waiting = []
        for name, seed in left:
            place, before = folder / name / f"seed-{seed}", CELLS[name].goes_on
            if parent is not None and not parent.is_alive():
                return
            if (place / "result.json").exists():
                continue
            waiting.append((name, seed))
            if before and not (folder / before / f"seed-{seed}" / "result.json").exists():
                continue
            try:
                with locked(place):
                    if (place / "result.json").exists():
                        continue
                    begin = time.perf_counter()
                    result = fill(name, world(folder, seed, size), place, size)
                    seconds = round(time.perf_counter() - begin, 1)
                    for path in place.iterdir():  # what is large; a killed run is not finished before it is gone
                        if path.is_dir() and not (path.name == "model" and name in kept):
                            shutil.rmtree(path)
                    write_json(place / "result.json", result | {"seconds": seconds})
            except Busy:
                continue
            aligned = " ".join(f"{point['aligned']:.1%}" for point in result["points"].values())
            done = len(seeds) * len(CELLS) - len(missing(folder, seeds))
            say(f"[{done}/{len(seeds) * len(CELLS)}] {name}, seed {seed}: aligned {aligned} ({seconds:.0f} s)")
        if len(waiting) == len(left):
            time.sleep(1)  # the rest is in other hands
        left = waiting


# ---------------------------------------------------------------------------------------------------- the questions
BASE = Row("no fine-tuning", "base", apart=True)


def questions(size: str) -> dict[str, Question]:
    """All but the first, which the main jobs answer."""
    looks = looked_at(size)
    betas = sorted([EMBEDDED_DEFAULTS["beta"], *BETAS])

    def cell(key: str, value: float) -> str:
        return "default" if value == EMBEDDED_DEFAULTS[key] else f"{key}-{value:g}"

    return {
        "beta": Question(
            "The weight of the pre-training term",
            [BASE, *(Row(f"beta {beta:g}", cell("beta", beta), x=beta) for beta in betas)],
            1 + betas.index(EMBEDDED_DEFAULTS["beta"]),
            ("fidelity", "diversity"),
            axis="beta, the weight of the pre-training term",
        ),
        "reward": Question(
            "The reward",
            [
                BASE,
                Row("CLIP score as it is", "clip-raw"),
                Row("CLIP score, fitted to the labels", "clip-fitted"),
                *(
                    Row(f"lambda {weight:g}" + " (squared error alone)" * (weight == 0), cell("lambda", weight))
                    for weight in LAMBDAS
                ),
                *(Row(f"T {t:g}", f"temperature-{t:g}") for t in TEMPERATURES),
            ],
            3 + LAMBDAS.index(EMBEDDED_DEFAULTS["lambda"]),
            ("held_out auc", "unseen auc", "aligned", "fidelity"),
            rewards=True,
        ),
        "feedback": Question(
            "How much feedback",
            [
                BASE,
                *(
                    Row(f"{n} % of the labels" + ", these images alone" * alone, name, x=n, series=series)
                    for alone, series in enumerate(("all images scored by the reward", "labelled images alone"))
                    for n in (5, 10, 25, 50, 100)
                    for name in ["default" if n == 100 and not alone else f"labels-{n}" + "-alone" * alone]
                ),
            ],
            5,
            ("aligned", "fidelity", "held_out auc"),
            axis="labels, % of the main job's",
            rewards=True,
        ),
        "noise": Question(
            "Wrong labels",
            [
                BASE,
                *(
                    Row(f"{n} % flipped", f"flipped-{n}" if n else "default", x=n, series="one labeller")
                    for n in (0, 10, 20, 30)
                ),
                Row("30 % flipped, majority of three", "flipped-30-majority", x=30, series="majority of three"),
            ],
            1,
            ("aligned", "fidelity", "held_out auc"),
            axis="labels flipped, %",
            rewards=True,
        ),
        "neighbours": Question(
            "Reward-weighted likelihood and its neighbours",
            [
                BASE,
                Row("weight r (the method)", "default"),
                Row("1: all images alike", "plain"),
                Row("1 - r (a control: must hurt)", "inverted", apart=True),
                Row(f"good ones alone: 1 where r > {WEIGHTINGS['threshold'].tau:g}", "threshold"),
                Row(f"exponential: exp((r - 1) / {WEIGHTINGS['exponential'].tau:g})", "exponential"),
                Row("TextNorm", "textnorm"),
                Row("advantage, signed", "advantage", apart=True),
                *(Row(f"best of {n} by r, nothing fine-tuned", "best-of", str(n), apart=True) for n in BEST_OF),
                Row(f"best of {BEST_OF_TUNED} by r, fine-tuned by r", "best-of-tuned", str(BEST_OF_TUNED)),
                *(Row(f"r, round {i}, no new labels", f"round-{i}") for i in range(2, ROUNDS + 1)),
                Row(f"r, one round as long as {ROUNDS}", "longer"),
            ],
            1,
            ("aligned", "fidelity", "diversity"),
        ),
        "overoptimisation": Question(
            "Ten times the steps",
            [Row(f"{n:,} steps", "long", str(n), x=n, apart=n == 0) for n in looks],
            looks.index(looks[-1] // 10),
            ("aligned", "mean_reward", "gap", "fidelity", "diversity"),
            axis="fine-tuning steps",
            metrics=("aligned", "mean_reward", "gap", "readable", "fidelity", "cmmd", "diversity"),
        ),
    }


def page(folder: Path, path: Path, seeds: Sequence[int], size: str) -> None:
    """Write what all cells and main jobs found to the page `path` and its figures."""
    found = {
        (name, seed): read_json(folder / name / f"seed-{seed}" / "result.json") for name in CELLS for seed in seeds
    }
    jobs = [read_json(folder / f"seed-{seed}" / "results.json") for seed in seeds]
    asked = questions(size)
    blocks = {"setting": ("How it was measured", setting(folder, found, jobs, seeds, size))}
    blocks["categories"] = ("Before and after, by category", categories_block(jobs))
    blocks |= {name: (question.title, block(name, question, found, seeds)) for name, question in asked.items()}
    blocks["strips"] = ("The same prompts and noise along the long run", "![The long run](study-strips.png)")
    test = shapes(cell_settings(seeds[0], size)).test
    strips = {f"{n:,} steps": folder / "long" / f"seed-{seeds[0]}" / f"step-{n}.png" for n in looked_at(size)}
    figures = {name: partial(plot, question=question, found=found, seeds=seeds) for name, question in asked.items()}
    figures["beta"] = partial(plot_trade_off, question=asked["beta"], found=found, seeds=seeds)
    figures["categories"] = partial(plot_categories, jobs=jobs)
    prompts = [item.prompt for item in test[:: len(test) // STRIP][:STRIP]]
    figures["strips"] = partial(plot_strips, strips=strips, prompts=prompts)
    write_page(path, blocks, figures)


def setting(folder: Path, found: Results, jobs: Sequence[dict[str, Any]], seeds: Sequence[int], size: str) -> str:
    """The command, and what it did, in Markdown."""
    cell, long, config = SIZES[size]["cell"], SIZES[size]["long"], read_json(folder / "config.json")
    flags = " --quick" * (size == "quick") + f" --seeds {' '.join(map(str, seeds))}" * (list(seeds) != SEEDS)
    main_jobs, cells = sum(job["seconds"]["total"] for job in jobs), sum(one["seconds"] for one in found.values())
    return (
        f"    python -m minialign.study{flags}\n\n"
        f"{len(seeds)} seeds ({', '.join(map(str, seeds))}), {len(found)} cells, with torch "
        f"{config['versions']['torch']}: {main_jobs / 60:.0f} minutes on {config['threads']} cores for the main jobs, "
        f"and {cells / 60:.0f} minutes of one core for the cells. A main job for each seed, as `python -m "
        "minialign.finetune --seed N` runs it, then each cell from its images, labels and reward: "
        f"{cell['steps']} steps of {cell['batch_size']} images, judged on {cell['test_images']} images of the test; "
        f"and the long run {long['steps']:,} steps of {long['batch_size']} at a constant learning rate, of which a "
        f"moving average of the weights is judged (decay {long['ema']})."
    )


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m minialign.study", description=(__doc__ or "").split("\n\n")[1])
    add = parser.add_argument
    add("--quick", action="store_true", help="a few minutes: tries everything, its numbers mean nothing")
    add("--seeds", type=in_range(int, 0, LAST_SEED), nargs="+", default=SEEDS, help="three or more (default: 21 22 23)")
    add("--out", type=Path, help="the study's folder (default: runs/study; with --quick: runs/study-quick)")
    add("--docs", type=Path, help="folder of results.md and its figures (default: docs; with --quick: OUT/docs)")
    jobs = torch.get_num_threads()
    add("--jobs", type=in_range(int, 1), default=jobs, help=f"processes that fill cells (default: a core each, {jobs})")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    size = "quick" if args.quick else "full"
    folder = args.out or Path("runs/study-quick" if args.quick else "runs/study")
    docs = args.docs or (folder / "docs" if args.quick else Path("docs"))
    seeds = list(dict.fromkeys(args.seeds))
    if len(seeds) < 3:
        raise InputError(f"--seeds: {len(seeds)} seeds say too little of chance; accepted: three or more that differ")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the study draws figures: it needs matplotlib (pip install 'minialign[report]')")
    check_folder(folder)
    names = ["setting", "categories", "strips", *questions(size)]
    with_blocks(docs / "results.md", dict.fromkeys(names, ("", "")))  # or it would be known in an hour
    try:
        docs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--docs {docs}: cannot be used ({error.strerror}); accepted: a folder") from error
    with locked(folder):
        job = open_run(folder, {"size": size, **SIZES[size], "defaults": EMBEDDED_DEFAULTS})
        numbers = ", ".join(map(str, seeds))
        with job.stage(f"main jobs of {numbers}", "all three stages, and the images that the cells learn from") as todo:
            for seed in seeds if todo else ():
                settings = EMBEDDED_DEFAULTS | {"model": None, "clip": None} | SIZES[size]["run"] | {"seed": seed}
                settings["tau"] = WEIGHTINGS[settings["weighting"]].tau
                settings.pop("out")
                run(settings, shapes(settings), folder / f"seed-{seed}", torch.device("cpu"))
        with job.stage(f"cells of {numbers}", f"{len(CELLS)} for each seed, in {args.jobs} processes"):
            if missing(folder, seeds):
                fill_all(folder, seeds, size, args.jobs)
        page(folder, docs / "results.md", seeds, size)
    print(f"\n{docs / 'results.md'}, with its figures")


def fill_all(folder: Path, seeds: Sequence[int], size: str, jobs: int) -> None:
    """`work` in so many processes; the first failure of one is this one's."""
    os.environ["TQDM_DISABLE"] = "1"  # bars of several processes would be mixed
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")
    job = partial(run_command, partial(work, folder, seeds, size, threads))
    workers = [context.Process(target=job) for _ in range(jobs)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the workers, too
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
                worker.join()
    if failed := [worker.exitcode for worker in workers if worker.exitcode]:
        if failed[0] < 0:
            raise InputError(f"a process was killed by signal {-failed[0]}; the same command goes on; see also --jobs")
        sys.exit(failed[0])


if __name__ == "__main__":
    run_command(main)
