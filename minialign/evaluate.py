"""The method's section 4, judging: alignment, fidelity, diversity, best of N: python -m minialign.evaluate RUN

Compares pipelines, the fine-tuned model of a run with its base unless others are named: they draw from the same new
noise for the same prompts, and are judged by the run's reward model, by CLIP, by people (python -m minialign.label on
the folders of RUN/compare) or, in the embedded world, by the simulated annotator.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .command import Parser, in_range, run_command
from .feedback import FeedbackStore
from .generate import draw, fingerprint, generate, grammar_of, read_prompts
from .models.clip import CLIP
from .models.pretrained import InputError, read_json
from .pipeline import Pipeline
from .prompts import SHAPES, parse, recognise, split
from .reward import RewardModel, embed_images, embed_texts, features
from .runs import EMBEDDED_DEFAULTS, OWN_CLIP, OWN_DEFAULTS, SIMULATED, locked, open_run, pick_device
from .shapes.annotator import judge
from .shapes.scenes import draw as draw_scene
from .shapes.scenes import sample_scene
from .task import NOISES, Task
from .training import atomic, progress, write_json

SAMPLES = 8  # before/after pairs of each group that the report shows


def wilson_interval(good: int, total: int, z: float = 1.96) -> list[float]:
    """Interval of a fraction from `good` of `total` independent judgements (Wilson 1927); z 1.96 is 95 %."""
    if total == 0:
        return [0.0, 1.0]
    p = good / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def paired_interval(
    before: Sequence[float], after: Sequence[float], prompts: Sequence[str], z: float = 1.96
) -> list[float]:
    """Interval of the mean gain of pairs drawn from the same starting noise (normal approximation).

    Gains on one prompt resemble each other, so their deviations are summed within each prompt before they are squared:
    the cluster-robust variance (Liang & Zeger 1986), of which the usual one is the case of a pair a prompt.
    """
    gains = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    cluster, n = torch.tensor([numbers[prompt] for prompt in prompts]), len(numbers)
    sums = torch.zeros(n, dtype=torch.float64).index_add_(0, cluster, gains - gains.mean())
    half = z * math.sqrt(float(sums.square().sum()) * n / (n - 1)) / len(gains) if n > 1 else 1.0
    return [float(gains.mean()) - half, float(gains.mean()) + half]


@cache
def student_t(freedom: int, level: float = 0.95) -> float:
    """Half the width of Student's t interval in standard errors (Student 1908): the quantile at (1 + level) / 2.

    With t = sqrt(n) tan(a) the density of n degrees of freedom is proportional to cos(a)^(n - 1), summed here to 1e-7.
    """
    angle = torch.linspace(0, math.pi / 2, 2_000_001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(angle.cos() ** (freedom - 1), angle)
    place = int(torch.searchsorted(mass, level * mass[-1]))
    return math.sqrt(freedom) * math.tan(float(angle[place + 1]))


def contrasts(values: Tensor, reference: int, apart: Sequence[int] = ()) -> list[tuple[float, float, float]]:
    """Each of R treatments against one of them in S blocks: its mean difference and the ends of its 95 % interval.

    values (R,S) in float64 are y_rs = mu_r + b_s + e_rs with one variance of e, as in a randomised block design (Fisher
    1935); the residuals of R' rows estimate it with (R' - 1)(S - 1) degrees of freedom. These are all but the rows
    `apart`, whose variance may be another: each of these is compared by itself, the paired t test.
    """
    alike = [i for i in range(len(values)) if i not in apart]
    part, blocks = values[alike], values.shape[1]
    freedom = (len(alike) - 1) * (blocks - 1)
    residuals = part - part.mean(1, keepdim=True) - part.mean(0) + part.mean()
    found = []
    for i, difference in enumerate((values.mean(1) - values[reference].mean()).tolist()):
        if i in apart:
            found.append(contrasts(values[[reference, i]], 0)[1])
        else:
            half = student_t(freedom) * math.sqrt(float(residuals.square().sum()) / freedom * 2 / blocks)
            found.append((difference, difference - half, difference + half))
    return found


def compare(
    groups: Sequence[Sequence[str]], prompts: Sequence[str], before: Sequence[float], after: Sequence[float]
) -> dict[str, Any]:
    """Alignment of two sets of judgements (1 aligned, 0 not) on the same prompts and noise, by group.

    groups[i] names the groups that item i belongs to, such as ("count", "seen"). Every item counts in "overall".
    "ci95" holds Wilson's interval of each side, for these prompts, and `paired_interval` of the gain.
    """
    table: dict[str, Any] = {"before": {}, "after": {}, "ci95": {"before": {}, "after": {}, "gain": {}}}
    for name in ["overall", *dict.fromkeys(name for names in groups for name in names)]:
        rows = [i for i, names in enumerate(groups) if name == "overall" or name in names]
        sides = {"before": [before[i] for i in rows], "after": [after[i] for i in rows]}
        for side, values in sides.items():
            table[side][name] = sum(values) / len(values)
            table["ci95"][side][name] = wilson_interval(round(sum(values)), len(values))
        table["ci95"]["gain"][name] = paired_interval(sides["before"], sides["after"], [prompts[i] for i in rows])
    return table


def frechet_distance(features: Tensor, reference: Tensor) -> float | None:
    """Frechet distance of Gaussians fitted to features (N,E) and (M,E) (Heusel et al. 2017, equation 6).

    None where it has no value: fewer than two rows.
    """
    a, b = features.cpu().double(), reference.cpu().double()
    if min(len(a), len(b)) < 2:
        return None
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # the trace of the root of cov_a cov_b from that product's eigenvalues, which are real and not negative
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(mean + torch.trace(cov_a) + torch.trace(cov_b) - 2 * root))


def diversity(features: Tensor, prompts: Sequence[str]) -> float | None:
    """Mean cosine distance of features (N,E) between images of one prompt, over all such pairs; None without any."""
    unit = F.normalize(features.cpu().double(), dim=1)
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    total, pairs = 0.0, 0
    for same in rows.values():
        n = len(same)
        gram = unit[same] @ unit[same].T
        total += float(n * (n - 1) - (gram.sum() - gram.trace()))
        pairs += n * (n - 1)
    return total / pairs if pairs else None


def cmmd(feats: Tensor, reference: Tensor, sigma: float = 10.0) -> float | None:
    """CLIP maximum mean discrepancy of features (N,E) and (M,E), 1000 MMD^2 (Jayasumana et al. 2024, equation 3).

    A Gaussian kernel exp(-|x - y|^2 / (2 sigma^2)) on features of unit length, without the pairs of a row with itself:
    an unbiased estimate, which may be below 0. None where it has no value: fewer than two rows.
    """
    a, b = (F.normalize(part.cpu().double(), dim=1) for part in (feats, reference))
    if min(len(a), len(b)) < 2:
        return None

    def total(x: Tensor, y: Tensor) -> float:  # the sum of all kernel values, |x - y|^2 = 2 - 2 x y
        return sum(float(((rows @ y.T - 1) / sigma**2).exp().sum()) for rows in x.split(1024))

    own = [(total(x, x) - len(x)) / (len(x) * (len(x) - 1)) for x in (a, b)]
    return 1000 * (own[0] + own[1] - 2 * total(a, b) / (len(a) * len(b)))


def best_of(scores: Sequence[float], outcomes: Sequence[float]) -> list[float]:
    """For N = 1 to n the expected outcome of the best by score of N of n images, drawn without replacement.

    Exact, by order statistics: of the C(n,N) sets, the image of rank i (from the worst, 1) is the best of C(i-1,N-1).
    Among equal scores the best is drawn at random. This is rejection sampling with a reward (paper, section 4).
    """
    n, order = len(scores), sorted(range(len(scores)), key=lambda i: scores[i])
    means: list[float] = []  # by rank, the mean outcome of images with that score
    for _, group in itertools.groupby(order, key=lambda i: scores[i]):
        same = [outcomes[i] for i in group]
        means += [sum(same) / len(same)] * len(same)
    return [
        sum(math.comb(i, number - 1) * value for i, value in enumerate(means)) / math.comb(n, number)
        for number in range(1, n + 1)
    ]


@torch.no_grad()
def judge_both(
    before: Callable[[], Pipeline],
    after: Callable[[], Pipeline],
    task: Task,
    clip: CLIP,
    reward: RewardModel,
    sampling: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Alignment, readability, fidelity and diversity of both pipelines on the task's test items, and sample pairs.

    before, after: load a pipeline; one at a time is there.
    """
    items = [(item.prompt, item.seed) for item in task.test]
    prompts = [item.prompt for item in task.test]
    text = embed_texts(clip, prompts)
    reference = embed_images(clip, task.reference()) if task.reference else None
    drawn: dict[str, list[Image.Image]] = {}
    judged: dict[str, dict[str, Any]] = {}
    for side, load in (("before", before), ("after", after)):
        drawn[side] = list(draw(load(), items, **sampling, title=f"draw {side}"))
        judged[side] = judge_images(drawn[side], task, clip, reward, text, reference)
    verdicts = {side: found.pop("verdicts") for side, found in judged.items()}
    write_samples(folder, task, drawn, verdicts)
    aligned = [[float(verdict == "good") for verdict in verdicts[side]] for side in ("before", "after")]
    measured = {name: {side: judged[side][name] for side in judged} for name in judged["before"]}
    return {
        "alignment": compare([item.groups for item in task.test], prompts, *aligned),
        "judge": task.judge_name,
    } | measured


@torch.no_grad()
def judge_images(
    images: Sequence[Image.Image],
    task: Task,
    clip: CLIP,
    reward: RewardModel,
    text: Tensor,
    reference: Tensor | None,
) -> dict[str, Any]:
    """What is said of B images, one for each of the task's test items: their verdicts, and numbers of all of them.

    text (B,E), reference (M,E): CLIP's embeddings of the prompts, and of what good images look like, if any do.
    """
    features, prompts = embed_images(clip, images), [item.prompt for item in task.test]
    score = reward(features, text)
    if task.judge:
        verdicts = task.judge(images, prompts)
    else:
        verdicts = ["good" if value > 0.5 else "bad" for value in score.tolist()]
    return {
        "verdicts": verdicts,
        "readable": sum(verdict != "skip" for verdict in verdicts) / len(images) if task.judge else None,
        "fidelity": frechet_distance(features, reference) if reference is not None else None,
        "cmmd": cmmd(features, reference) if reference is not None else None,
        "diversity": diversity(features, prompts),
        "mean_reward": float(score.mean()),
    }


def write_samples(
    folder: Path, task: Task, drawn: dict[str, list[Image.Image]], verdicts: dict[str, list[str]]
) -> None:
    """Before/after pairs for the report: the first few of each group, not chosen by hand."""
    shown: dict[tuple[str, ...], list[int]] = {}
    for i, item in enumerate(task.test):
        shown.setdefault(item.groups, []).append(i)
    samples = []
    for groups, rows in shown.items():
        for i in rows[:SAMPLES]:
            item = task.test[i]
            entry: dict[str, Any] = {"prompt": item.prompt, "seed": item.seed}
            entry |= {"category": groups[0] if len(groups) > 1 else None, "split": groups[-1]}
            for side in ("before", "after"):
                name = f"samples/{side}-{i:04d}.png"
                with atomic(folder / name) as temporary:
                    drawn[side][i].save(temporary, format="PNG")
                entry[side] = {"image": name, "verdict": verdicts[side][i]}
            samples.append(entry)
    write_json(folder / "samples.json", {"judge": task.judge_name, "samples": samples})


def model_card(results: dict[str, Any]) -> str:
    """The README.md of a fine-tuned model: how it was made, what was measured, and what its maker has to fill in."""
    settings = results["settings"]
    base = settings["model"] or "minialign's embedded shapes checkpoint"
    front = ["---", "license: other  # fill in; the base model's licence holds for what is made from it"]
    if settings["model"] and not Path(settings["model"]).exists():
        front.append(f"base_model: {settings['model']}")
    front += ["library_name: diffusers", "pipeline_tag: text-to-image", "tags: [minialign, human-feedback]", "---"]
    told = [f"| {key} | {value} |" for key, value in settings.items() if value is not None]
    return "\n".join(
        [
            *front,
            "",
            "# Fine-tuned with human feedback",
            "",
            f"Made from {base} by minialign {results['minialign']}, reward-weighted likelihood after Lee et al. 2023",
            "(arXiv 2302.12192), in the diffusers layout.",
            "",
            f"## Measured before and after, on {results['counts']['evaluated']} images a side",
            "",
            "```",
            summary(results),
            "```",
            "",
            "## Settings",
            "",
            "| setting | value |",
            "| --- | --- |",
            *told,
            "",
        ]
    )


def summary(results: dict[str, Any]) -> str:
    """The table of before and after that ends a run."""
    alignment = results["alignment"]
    lines = [
        f"{'aligned (' + results['judge'] + ')':32}{'before':>8}{'after':>8}{'gain':>8}   95 % interval of the gain"
    ]
    for name, value in alignment["before"].items():
        low, high = alignment["ci95"]["gain"][name]
        after = alignment["after"][name]
        lines.append(
            f"  {name:30}{value:8.1%}{after:8.1%}{100 * (after - value):+8.1f}   {100 * low:+.1f} to {100 * high:+.1f}"
        )
    for name, note in (("readable", ""), ("fidelity", " (Frechet, lower is better)"), ("diversity", "")):
        before, after = results[name]["before"], results[name]["after"]
        if before is not None:
            lines.append(f"{name + note:32}{before:8.3f}{after:8.3f}{after - before:+8.3f}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ pipelines compared
PEOPLE, REWARD, CLIP_SCORE = "people", "reward", "CLIP score"  # who judges, beside the simulated annotator
LABELLED = (PEOPLE, SIMULATED)  # they say good or bad


@dataclass(frozen=True)
class Drawn:
    """What one pipeline drew: I images, their CLIP features (I,E), and what each judge says of each of them.

    judged: judge -> I numbers, 1 for aligned and 0 for not by people or the annotator; None where nobody said so.
    """

    name: str
    source: str
    folder: Path
    features: Tensor
    judged: dict[str, list[float | None]]
    readable: float | None


def chosen_prompts(folder: Path, file: Path | None, number: int, seed: int) -> tuple[list[str], list[tuple[str, ...]]]:
    """At most `number` prompts to compare pipelines on, and each one's groups, such as ("count", "seen").

    Those of `file`, or the run's own and, where they are of a grammar, those that it holds out. They are spread evenly
    over the groups. InputError where there are none.
    """
    seen: list[str] = []
    if (folder / "feedback.sqlite").is_file():
        store = FeedbackStore(folder)
        seen = list(dict.fromkeys(image.prompt for image in store.images()))
        store.close()
    known = [recognise(text) for text in seen]
    if file is not None:
        texts = read_prompts(file)
    elif seen and all(known):
        grammars = dict.fromkeys(found[1] for found in known if found)
        texts = seen + [prompt.text for grammar in grammars for prompt in split(grammar, seed)[1]]
    else:
        texts = seen
    if not texts:
        raise InputError(f"{folder}: no feedback.sqlite with prompts; accepted: such a run, or --prompts FILE")
    groups: dict[tuple[str, ...], list[str]] = {}
    for text in dict.fromkeys(texts):
        found = recognise(text)
        category = (found[0].category,) if found else ()
        groups.setdefault((*category, "seen" if text in seen else "unseen"), []).append(text)
    rng = random.Random(seed)
    mixed = [[(text, names) for text in rng.sample(part, len(part))] for names, part in groups.items()]
    turns = [pair for turn in itertools.zip_longest(*mixed) for pair in turn if pair is not None][:number]
    return [text for text, _ in turns], [names for _, names in turns]


def draw_and_judge(
    folder: Path,
    name: str,
    source: str | None,
    prompts: Sequence[str],
    settings: dict[str, Any],
    clip: CLIP,
    reward: RewardModel | None,
    batch: int,
) -> Drawn:
    """Images of a pipeline for the prompts, in a folder of their own in `folder`/compare, and what is said of them.

    The folder is named by all that the images depend on: drawn ones are kept, and labels in its feedback.sqlite count.
    """
    device = clip.logit_scale.device
    pipe = Pipeline.from_pretrained(source, device=device, dtype=getattr(torch, settings["dtype"]))
    settings = settings | {"checkpoint_crc32": fingerprint(pipe)}
    number = zlib.crc32(json.dumps(settings, sort_keys=True).encode())
    stem = re.sub(r"[^\w.-]+", "-", "embedded" if source is None else source.rstrip("/").split("/")[-1])
    place = folder / "compare" / f"{stem}-{number:08x}"
    open_run(place, settings)
    generate(pipe, prompts, settings, place, batch, test=True)
    store = FeedbackStore(place)
    try:
        images, labels = store.images(), store.labels()
    finally:
        store.close()
    paths, texts = [image.path for image in images], [image.prompt for image in images]
    own = grammar_of(pipe) is SHAPES
    del pipe  # the next one takes its memory
    image, table = features(folder / "cache" / "features.safetensors", clip, paths, list(dict.fromkeys(texts)))
    row = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    text = table[[row[text] for text in texts]]
    judged: dict[str, list[float | None]] = {}
    if labels:
        judged[PEOPLE] = [labels.get(image.id) for image in images]
    parsed, readable = [parse(text, SHAPES) for text in texts], None
    if own and all(parsed):
        verdicts = []
        for path, prompt in progress(list(zip(paths, parsed)), SIMULATED):
            with Image.open(path) as picture:
                verdicts += judge([picture], [prompt] if prompt else [])
        judged[SIMULATED] = [float(verdict == "good") for verdict in verdicts]
        readable = sum(verdict != "skip" for verdict in verdicts) / len(verdicts)
    if reward is not None:
        with torch.no_grad():
            judged[REWARD] = reward(image.to(device), text.to(device)).tolist()
    judged[CLIP_SCORE] = torch.cosine_similarity(image, text).tolist()
    return Drawn(name, source or "embedded", place, image, judged, readable)


def by_group(
    sides: Sequence[Drawn], judge_name: str, prompts: Sequence[str], groups: Sequence[Sequence[str]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """What a judge says of each pipeline by group: model -> group -> value, n, ci95, and gain over the first pipeline.

    The interval is Wilson's for labels and `paired_interval`'s, which sums within prompts, for numbers and all gains.
    """
    table: dict[str, dict[str, dict[str, Any]]] = {}
    first = sides[0].judged.get(judge_name)
    for side in sides:
        values = side.judged.get(judge_name)
        if values is None:
            continue
        table[side.name] = {}
        for name in ["overall", *dict.fromkeys(name for names in groups for name in names)]:
            rows = [i for i, names in enumerate(groups) if name == "overall" or name in names]
            told = [(prompts[i], value) for i in rows if (value := values[i]) is not None]
            if not told:
                continue
            texts, numbers = zip(*told)
            if judge_name in LABELLED:
                interval = wilson_interval(round(sum(numbers)), len(numbers))
            else:
                interval = paired_interval([0.0] * len(numbers), numbers, texts)
            entry = {"value": sum(numbers) / len(numbers), "n": len(numbers), "ci95": interval}
            if side is not sides[0] and first is not None:
                both = [(prompts[i], was, is_now) for i in rows if (was := first[i]) is not None
                        and (is_now := values[i]) is not None]  # fmt: skip
                if both:
                    texts, before, after = zip(*both)
                    entry["gain"] = (sum(after) - sum(before)) / len(both)
                    entry["gain_ci95"] = paired_interval(before, after, texts)
            table[side.name][name] = entry
    return table


def best_of_curves(sides: Sequence[Drawn], prompts: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """`best_of`, averaged over the prompts: chooser -> judge -> model -> value and ci95 (lists over N = 1, 2, ...).

    Over prompts of which the judge judged every image; the interval of a mean over prompts is the normal one.
    """
    curves: dict[str, dict[str, dict[str, Any]]] = {}
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    for chooser, side in itertools.product((REWARD, CLIP_SCORE), sides):
        scores = side.judged.get(chooser)
        for judge_name, values in side.judged.items():
            number = judge_name not in LABELLED  # of interest where it chooses itself
            if scores is None or (
                number and (judge_name != chooser or chooser == CLIP_SCORE and REWARD in side.judged)
            ):
                continue
            whole = [same for same in rows.values() if all(values[i] is not None for i in same)]
            if not whole:
                continue
            found = [best_of([scores[i] or 0.0 for i in same], [values[i] or 0.0 for i in same]) for same in whole]
            means = [list(column) for column in zip(*found)]
            names = [str(i) for i in range(len(found))]
            curves.setdefault(chooser, {}).setdefault(judge_name, {})[side.name] = {
                "value": [sum(column) / len(column) for column in means],
                "ci95": [paired_interval([0.0] * len(column), column, names) for column in means],
            }
    return curves


def reference_features(
    folder: Path, images: Path | None, sides: Sequence[Drawn], prompts: Sequence[str], clip: CLIP, seed: int
) -> tuple[Tensor | None, str]:
    """CLIP features (M,E) of what good images look like, and where they are from.

    The image files below `images`; else, in the embedded world, drawings of the prompts; else the images of the run
    that are labelled good.
    """
    cache = folder / "cache" / "features.safetensors"
    if images is not None:
        kinds = (".png", ".jpg", ".jpeg", ".webp")
        paths = sorted(path for path in images.rglob("*") if path.suffix.lower() in kinds) if images.is_dir() else []
        if len(paths) < 2:
            raise InputError(f"--reference {images}: fewer than two images; accepted: a folder of {', '.join(kinds)}")
        return features(cache, clip, paths, [])[0], str(images)
    if all(SIMULATED in side.judged for side in sides):
        rng = random.Random(seed + 2)
        drawings = [draw_scene(sample_scene(parse(text, SHAPES), rng), rng) for text in prompts]
        return embed_images(clip, drawings).cpu(), "drawings of the prompts"
    paths = []
    if (folder / "feedback.sqlite").is_file():
        store = FeedbackStore(folder)
        labels = store.labels()
        paths = [image.path for image in store.images() if labels.get(image.id)]
        store.close()
    return (features(cache, clip, paths, [])[0], "images labelled good") if len(paths) > 1 else (None, "")


def compare_pipelines(
    folder: Path,
    sources: Sequence[tuple[str, str | None]],
    prompts: Sequence[str],
    groups: Sequence[tuple[str, ...]],
    settings: dict[str, Any],
    clip: CLIP,
    reward: RewardModel | None,
    *,
    batch: int,
    reference: Path | None = None,
) -> dict[str, Any]:
    """Pipelines (name, source) compared on prompts with their groups; the content of evaluation-compare.json."""
    number = settings["images_per_prompt"]
    texts = [text for text in prompts for _ in range(number)]
    names = [group for group in groups for _ in range(number)]
    sides = [draw_and_judge(folder, name, source, prompts, settings, clip, reward, batch) for name, source in sources]
    target, origin = reference_features(folder, reference, sides, texts, clip, settings["seed"])
    judges = dict.fromkeys(judge_name for side in sides for judge_name in side.judged)
    return {
        "models": {
            side.name: {"source": side.source, "images": str(side.folder.relative_to(folder))} for side in sides
        },
        "prompts": len(prompts),
        "settings": settings,
        "judged": {judge_name: by_group(sides, judge_name, texts, names) for judge_name in judges},
        "reference": origin or None,
        "frechet": {
            side.name: frechet_distance(side.features, target) if target is not None else None for side in sides
        },
        "cmmd": {side.name: cmmd(side.features, target) if target is not None else None for side in sides},
        "diversity": {side.name: diversity(side.features, texts) for side in sides},
        "readable": {side.name: side.readable for side in sides},
        "best_of_n": best_of_curves(sides, texts),
    }


def comparison(found: dict[str, Any]) -> str:
    """What `compare_pipelines` found, as a table of text."""
    models = list(found["models"])
    width = max(20, *(len(name) + 2 for name in models))
    lines = [f"{'(95 % intervals)':34}{'images':>7}" + "".join(f"{name:>{width}}" for name in models)]

    def number(value: float | None, percent: bool, interval: Sequence[float] | None = None) -> str:
        if value is None:
            return "-"
        low, high = interval or (None, None)
        ends = "" if low is None or high is None else f" ({100 * low:.0f}-{100 * high:.0f})"
        if not percent:
            ends = ends and f" ({low:.2f}-{high:.2f})"
        return (f"{value:.1%}" if percent else f"{value:.3f}") + ends

    for judge_name, table in found["judged"].items():
        percent = judge_name in LABELLED
        lines.append(_aligned(judge_name))
        for group in dict.fromkeys(group for entries in table.values() for group in entries):
            entries = [table.get(name, {}).get(group, {}) for name in models]
            count = max(entry.get("n", 0) for entry in entries)
            cells = [number(entry.get("value"), percent, entry.get("ci95")) for entry in entries]
            lines.append(f"  {group:32}{count:7}" + "".join(f"{cell:>{width}}" for cell in cells))
        for name in models:
            entry = table.get(name, {}).get("overall", {})
            if "gain" in entry:
                scale, unit, digits = (100, " points", 1) if percent else (1, "", 3)
                gain, low, high = (f"{scale * value:+.{digits}f}" for value in (entry["gain"], *entry["gain_ci95"]))
                lines.append(f"  {name} over {models[0]}: {gain}{unit} ({low} to {high})")
    what = {"frechet": "Frechet distance (lower)", "cmmd": "CMMD (lower)", "diversity": "diversity (higher)"}
    for key, title in (what | {"readable": "readable (higher)"}).items():
        if any(value is not None for value in found[key].values()):
            row = "".join(f"{number(found[key][name], key == 'readable'):>{width}}" for name in models)
            lines.append(f"{title:41}{row}")
    for chooser, tables in found["best_of_n"].items():
        for judge_name, curves in tables.items():
            percent = judge_name in LABELLED
            lines.append(f"best of N by {chooser}: {_aligned(judge_name)}")
            for i in range(max(len(curve["value"]) for curve in curves.values())):
                row = "".join(
                    f"{number(curves[name]['value'][i] if name in curves else None, percent):>{width}}"
                    for name in models
                )
                lines.append(f"  {'N = ' + str(i + 1):39}{row}")
    if found["reference"]:
        lines.append(f"(distances are to {found['reference']})")
    return "\n".join(lines)


def _aligned(judge_name: str) -> str:
    return f"aligned, by {judge_name}" if judge_name in LABELLED else judge_name


def plot_best_of(path: Path, curves: dict[str, dict[str, dict[str, Any]]]) -> None:
    """The best-of-N curves as PNG, a panel a judge; nothing without matplotlib (the extra `report`)."""
    try:
        from matplotlib.figure import Figure  # slow to import
    except ImportError:
        return
    judges = list(dict.fromkeys(judge_name for tables in curves.values() for judge_name in tables))
    figure = Figure(figsize=(4.2 * len(judges), 3.8), layout="constrained")
    panels = figure.subplots(1, len(judges), squeeze=False)[0]
    colors = ("#777777", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
    for axes, judge_name in zip(panels, judges):
        drawn = [
            (chooser, name, curve)
            for chooser, tables in curves.items()
            for name, curve in tables.get(judge_name, {}).items()
        ]
        names = list(dict.fromkeys(name for _, name, _ in drawn))
        for chooser, name, curve in drawn:
            x, color = range(1, len(curve["value"]) + 1), colors[names.index(name) % len(colors)]
            style = "-" if chooser == REWARD else "--"
            axes.plot(x, curve["value"], style, color=color, marker=".", label=f"{name}, by {chooser}")
            if chooser == REWARD or REWARD not in curves:
                axes.fill_between(x, *zip(*curve["ci95"]), color=color, alpha=0.15, linewidth=0)
        axes.set(xlabel="N images to choose from", title=f"best of N: {_aligned(judge_name)}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("mean over prompts, band: 95 %")
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m minialign.evaluate", description=(__doc__ or "").split("\n\n")[1])
    add = parser.add_argument
    add("run", type=Path, help="folder of a run; the result is its evaluation-compare.json")
    what = "pipelines to compare, the first is what gains are over: folders, hub ids, .safetensors files, embedded"
    add("--models", nargs="+", metavar="MODEL", help=f"{what} (default: the run's base model and RUN/model)")
    add("--prompts", type=Path, help="file of prompts (default: the run's, and those that its grammar holds out)")
    add("--max-prompts", type=in_range(int, 1), default=160, help="spread evenly over the groups (default: 160)")
    add("--images-per-prompt", type=in_range(int, 1, 1000), default=4, help="of each pipeline (default: 4)")
    add("--reward", type=Path, help="a reward model's folder (default: RUN/reward, where there is one)")
    add("--clip", help="CLIP, folder or hub id, where there is no reward model to name it (default: the run's)")
    add("--reference", type=Path, help="folder of images that distances are to (default: the run's good ones)")
    add("--sampling-steps", type=in_range(int, 1, 1000), help="steps of DDIM (default: the run's)")
    add("--guidance", type=in_range(float, 0), help="weight of classifier-free guidance (default: the run's)")
    add("--batch-size", type=in_range(int, 1), help="images drawn at once (default: 64, of other models 8)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the pipelines")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps ... (default: cuda where there is one, else cpu)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device = pick_device(args.device)
    if not args.run.is_dir():
        raise InputError(f"{args.run}: no such folder; accepted: a run")
    path = args.run / "config.json"
    made_with = read_json(path).get("settings", {}) if path.exists() else {}
    embedded = "model" in made_with and made_with["model"] is None
    defaults = (EMBEDDED_DEFAULTS if embedded else OWN_DEFAULTS) | made_with
    if args.models is None:
        if not (args.run / "model").is_dir() or "model" not in made_with:
            raise InputError(f"{args.run}: no model/ to compare; accepted: a finished run of finetune, or --models A B")
        sources: list[tuple[str, str | None]] = [
            ("base", made_with["model"]),
            ("fine-tuned", str(args.run / "model")),
        ]
    else:
        sources = [(name, None if name == "embedded" else name) for name in dict.fromkeys(args.models)]
    seed = defaults["seed"]
    prompts, groups = chosen_prompts(args.run, args.prompts, args.max_prompts, seed)
    if len(prompts) * args.images_per_prompt > NOISES:
        raise InputError(f"--images-per-prompt: {len(prompts)} prompts times it; accepted: {NOISES} images in all")
    settings = {"seed": seed, "images_per_prompt": args.images_per_prompt, "dtype": args.dtype}
    for key in ("sampling_steps", "guidance"):
        given = getattr(args, key)
        settings[key] = defaults[key] if given is None else given
    settings["prompts_crc32"] = f"{zlib.crc32(chr(10).join(prompts).encode()):08x}"
    place = args.reward or args.run / "reward"
    reward = RewardModel.from_pretrained(place, device=device) if args.reward or place.is_dir() else None
    if reward is not None:
        source = reward.config.get("clip")
    else:
        source = args.clip or made_with.get("clip", None if embedded else OWN_CLIP)
    clip = CLIP.from_pretrained(source, device=device)
    batch = args.batch_size or min(64, (EMBEDDED_DEFAULTS if embedded else OWN_DEFAULTS)["batch_size"])
    with locked(args.run):
        found = compare_pipelines(
            args.run, sources, prompts, groups, settings, clip, reward, batch=batch, reference=args.reference
        )
        write_json(args.run / "evaluation-compare.json", found)
        plot_best_of(args.run / "best-of-n.png", found["best_of_n"])
    print(f"\n{comparison(found)}\n\n{args.run / 'evaluation-compare.json'}")
    print(f"people label these: {', '.join(str(args.run / one['images']) for one in found['models'].values())}")


if __name__ == "__main__":
    run_command(main)
