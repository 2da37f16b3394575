"""The method's section 4, judging: alignment with intervals, fidelity and diversity of a pipeline's images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .generate import draw
from .models.clip import CLIP
from .pipeline import Pipeline
from .reward import RewardModel, embed_images, embed_texts
from .task import Task
from .training import atomic, write_json

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


@torch.no_grad()
def judge_both(
    before: Pipeline,
    after: Pipeline,
    task: Task,
    clip: CLIP,
    reward: RewardModel,
    sampling: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Alignment, readability, fidelity and diversity of both pipelines on the task's test items, and sample pairs."""
    items = [(item.prompt, item.seed) for item in task.test]
    prompts = [item.prompt for item in task.test]
    text = embed_texts(clip, prompts)
    reference = embed_images(clip, task.reference()) if task.reference else None
    aligned: dict[str, list[float]] = {}
    drawn: dict[str, list[Image.Image]] = {}
    verdicts: dict[str, list[str]] = {}
    measured: dict[str, dict[str, float | None]] = {"readable": {}, "fidelity": {}, "diversity": {}, "reward": {}}
    for side, pipe in (("before", before), ("after", after)):
        drawn[side] = list(draw(pipe, items, **sampling, title=f"draw {side}"))
        features = embed_images(clip, drawn[side])
        score = reward(features, text)
        if task.judge:
            verdicts[side] = task.judge(drawn[side], prompts)
        else:
            verdicts[side] = ["good" if value > 0.5 else "bad" for value in score.tolist()]
        aligned[side] = [float(verdict == "good") for verdict in verdicts[side]]
        measured["readable"][side] = sum(v != "skip" for v in verdicts[side]) / len(items) if task.judge else None
        measured["fidelity"][side] = frechet_distance(features, reference) if reference is not None else None
        measured["diversity"][side] = diversity(features, prompts)
        measured["reward"][side] = float(score.mean())
    write_samples(folder, task, drawn, verdicts)
    mean_reward = measured.pop("reward")
    alignment = compare([item.groups for item in task.test], prompts, aligned["before"], aligned["after"])
    return {"alignment": alignment, "judge": task.judge_name, **measured, "mean_reward": mean_reward}


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
