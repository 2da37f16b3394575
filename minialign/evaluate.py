"""The method's section 4, judging: alignment with intervals, fidelity and diversity of a pipeline's images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def wilson_interval(good: int, total: int, z: float = 1.96) -> list[float]:
    """Interval of a fraction from `good` of `total` independent judgements (Wilson 1927); z 1.96 is 95 %."""
    if total == 0:
        return [0.0, 1.0]
    p = good / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def paired_interval(before: Sequence[float], after: Sequence[float], z: float = 1.96) -> list[float]:
    """Interval of the mean gain of pairs drawn from the same starting noise (normal approximation)."""
    gains = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    half = z * float(gains.std(unbiased=True)) / math.sqrt(len(gains)) if len(gains) > 1 else 1.0
    return [float(gains.mean()) - half, float(gains.mean()) + half]


def compare(groups: Sequence[Sequence[str]], before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Alignment of two sets of judgements (1 aligned, 0 not) on the same prompts and noise, by group.

    groups[i] names the groups that item i belongs to, such as ("count", "seen"). Every item counts in "overall".
    """
    table: dict[str, Any] = {"before": {}, "after": {}, "ci95": {"before": {}, "after": {}, "gain": {}}}
    for name in ["overall", *dict.fromkeys(name for names in groups for name in names)]:
        rows = [i for i, names in enumerate(groups) if name == "overall" or name in names]
        sides = {"before": [before[i] for i in rows], "after": [after[i] for i in rows]}
        for side, values in sides.items():
            table[side][name] = sum(values) / len(values)
            table["ci95"][side][name] = wilson_interval(round(sum(values)), len(values))
        table["ci95"]["gain"][name] = paired_interval(sides["before"], sides["after"])
    return table


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Frechet distance of Gaussians fitted to features (N,E) and (M,E) (Heusel et al. 2017, equation 6)."""
    a, b = features.double(), reference.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # the trace of the root of cov_a cov_b from that product's eigenvalues, which are real and not negative
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(mean + torch.trace(cov_a) + torch.trace(cov_b) - 2 * root))


def diversity(features: Tensor, prompts: Sequence[str]) -> float | None:
    """Mean cosine distance of features (N,E) between images of one prompt, over all such pairs; None without any."""
    unit = F.normalize(features.double(), dim=1)
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
