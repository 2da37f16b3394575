"""Measures of the evaluation: intervals, scores, agreement, distances, diversity, best of N, image statistics.

Formulas over plain numbers and tensors of features, scores or pixels; what they are of is the callers'.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FEWEST = 10  # pairs of a bin of `calibration`


# ----------------------------------------------------------------------------------------------------------- intervals
def wilson_interval(good: int, total: int, z: float = 1.96) -> list[float]:
    """Interval of a fraction from `good` of `total` independent judgements (Wilson 1927); z 1.96 is 95 %."""
    if total == 0:
        return [0.0, 1.0]
    p = good / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return [max(0.0, middle - half), min(1.0, middle + half)]


NO_INTERVAL = "n/a: one prompt"  # in the place of an interval, for people


def paired_interval(
    before: Sequence[float],
    after: Sequence[float],
    prompts: Sequence[str],
    within: tuple[float, float] = (-1.0, 1.0),
) -> list[float] | None:
    """95 % interval of the mean gain, after less before, of pairs of images from the same starting noise.

    Gains on one prompt resemble each other, so their deviations are summed within each prompt before they are squared:
    the cluster-robust variance (Liang & Zeger 1986), of which the usual one is the case of a pair a prompt. With C
    prompts the interval is Student's with C - 1 degrees of freedom; with one prompt there is none. No end leaves
    `within`, the least and the greatest gain that there can be.
    """
    gains = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    cluster, n = torch.tensor([numbers[prompt] for prompt in prompts]), len(numbers)
    if n < 2:
        return None
    sums = torch.zeros(n, dtype=torch.float64).index_add_(0, cluster, gains - gains.mean())
    half = student_t(n - 1) * math.sqrt(float(sums.square().sum()) * n / (n - 1)) / len(gains)
    return [max(within[0], float(gains.mean()) - half), min(within[1], float(gains.mean()) + half)]


@cache
def _student(freedom: int) -> tuple[Tensor, Tensor]:
    """Angles a from 0 to pi/2, and the fraction of Student's distribution (Student 1908) with |t| < sqrt(n) tan(a).

    With t = sqrt(n) tan(a) the density of n degrees of freedom is proportional to cos(a)^(n - 1), summed here to 1e-7.
    """
    angle = torch.linspace(0, math.pi / 2, 2_000_001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(angle.cos() ** (freedom - 1), angle)
    return angle[1:], mass / mass[-1]


@cache
def student_t(freedom: int, level: float = 0.95) -> float:
    """Half the width of Student's t interval in standard errors: the quantile at (1 + level) / 2."""
    angle, mass = _student(freedom)
    return math.sqrt(freedom) * math.tan(float(angle[int(torch.searchsorted(mass, level))]))


def student_p(t: float, freedom: int) -> float:
    """Probability of a t as far from 0 as this one, or farther, in either direction, where the true mean is 0."""
    angle, mass = _student(freedom)
    return 1.0 - float(mass[min(len(mass) - 1, int(torch.searchsorted(angle, math.atan(abs(t) / math.sqrt(freedom)))))])


def holm(p: Sequence[float]) -> list[float]:
    """p values of several comparisons corrected for their number (Holm 1979), in the order that they came in.

    Calling those significant that are below 5 % calls any wrongly so in at most one family of comparisons in twenty.
    The smallest of m is multiplied by m, the next by m - 1 and so on; none is below one that was smaller.
    """
    corrected, least = list(p), 0.0
    for place, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        least = max(least, min(1.0, p[i] * (len(p) - place)))
        corrected[i] = least
    return corrected


class Contrast(NamedTuple):
    """A mean difference, the ends of its 95 % interval, and the p value of there being none."""

    difference: float
    low: float
    high: float
    p: float


def contrasts(values: Tensor, reference: int, apart: Sequence[int] = ()) -> list[Contrast]:
    """Each of R treatments against one of them in S blocks.

    values (R,S) in float64 are y_rs = mu_r + b_s + e_rs with one variance of e, as in a randomised block design (Fisher
    1935); the residuals of R' rows estimate it with (R' - 1)(S - 1) degrees of freedom. These are all but the rows
    `apart`, whose variance may be another: each of these is compared by itself, the paired t test.
    """
    alike = [i for i in range(len(values)) if i not in apart]
    rows, blocks = values[alike], values.shape[1]
    freedom = max(1, (len(alike) - 1) * (blocks - 1))  # the reference alone has no residuals
    residuals = rows - rows.mean(1, keepdim=True) - rows.mean(0) + rows.mean()
    results = []
    for i, difference in enumerate((values.mean(1) - values[reference].mean()).tolist()):
        if i in apart:
            results.append(contrasts(values[[reference, i]], 0)[1])
        else:
            error = math.sqrt(float(residuals.square().sum()) / freedom * 2 / blocks)
            half = student_t(freedom) * error
            p = student_p(difference / error, freedom) if error else float(difference == 0)
            results.append(Contrast(difference, difference - half, difference + half, p))
    return results


# --------------------------------------------------------------------------------------------------- scores and labels
def area_under_curve(score: Tensor, label: Tensor) -> float | None:
    """Probability that a good pair scores above a bad one, ties counting half; None where one kind is missing.

    By ranks (Mann & Whitney 1947): the sum of the good pairs' ranks, equal scores sharing the mean of theirs, less what
    it is where they are all the lowest, counts the pairs of a good and a worse bad one. O(B log B) for scores (B,).
    """
    good = (label > 0.5).cpu()
    number, others = int(good.sum()), int((~good).sum())
    if not number or not others:
        return None
    _, place, count = torch.unique(score.cpu(), return_inverse=True, return_counts=True)
    rank = count.cumsum(0).double() - (count - 1) / 2
    return (float(rank[place[good]].sum()) - number * (number + 1) / 2) / (number * others)


def preferred(score: Tensor, label: Tensor, prompts: Sequence[object]) -> float | None:
    """How often the score prefers the better of two images of one prompt, ties counting half; None without such pairs.

    Over all pairs of a good and a bad image of a prompt: Lee et al. 2023 evaluate a reward model so (Fig. 3).
    """
    rows: dict[object, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    right, pairs = 0.0, 0
    for same in rows.values():
        auc, good = area_under_curve(score[same], label[same]), int((label[same] > 0.5).sum())
        if auc is not None:
            pairs += good * (len(same) - good)
            right += auc * good * (len(same) - good)
    return right / pairs if pairs else None


def calibration(reward: Tensor, label: Tensor, bins: int = 10, least: int = FEWEST) -> list[dict[str, float]]:
    """Mean reward and fraction labelled good in bins of equally many pairs, by their reward (a reliability diagram).

    Equal mass as of Nguyen & O'Connor 2015 and Nixon et al. 2019, so that no bin has few pairs: there are `bins` of
    them, or fewer where each would have less than `least` pairs. Pairs of equal rewards (B,) share a bin. Fewer than
    `least` pairs in all are one bin.
    """
    reward, order = reward.cpu().sort()
    label, total = label.cpu()[order], len(reward)
    number = min(bins, total // least)
    ends = torch.unique_consecutive(reward, return_counts=True)[1].cumsum(0)  # of each reward's pairs, in order
    edges = [0]
    for k in range(1, number):
        edge = int(ends[torch.searchsorted(ends, math.ceil(k * total / number))])
        if edge - edges[-1] >= least and total - edge >= least:
            edges.append(edge)
    return [
        {"predicted": float(reward[a:b].mean()), "observed": float(label[a:b].mean()), "count": b - a}
        for a, b in itertools.pairwise([*edges, total])
    ]


def expected_calibration_error(bins: Sequence[dict[str, float]]) -> float:
    """Mean |observed - predicted| over the pairs of `calibration`'s bins (Naeini et al. 2015; Guo et al. 2017)."""
    total = sum(bin["count"] for bin in bins)
    return sum(bin["count"] * abs(bin["observed"] - bin["predicted"]) for bin in bins) / total


def platt(score: Tensor, label: Tensor) -> tuple[float, float]:
    """(a, b) of the logistic regression sigmoid(a score + b) of labels (B,) in [0,1] on scores (B,) (Platt 1999).

    By Newton's method in float64, with a ridge of 1e-6 that keeps it finite where a threshold separates good from bad.
    """
    s, y = score.cpu().double(), label.cpu().double()
    middle, spread = s.mean(), s.std().clamp(min=1e-12) if len(s) > 1 else torch.tensor(1.0).double()
    x = torch.stack([(s - middle) / spread, torch.ones_like(s)], dim=1)
    w, ridge = torch.zeros(2).double(), 1e-6 * torch.eye(2).double()
    for _ in range(50):
        p = (x @ w).sigmoid()
        hessian = x.T @ (x * (p * (1 - p))[:, None]) / len(s) + ridge
        w = w + torch.linalg.solve(hessian, x.T @ (y - p) / len(s) - ridge @ w)
    return float(w[0] / spread), float(w[1] - w[0] * middle / spread)


def measure(reward: Tensor, label: Tensor, others: Tensor | None = None) -> dict[str, Any]:
    """How well rewards (B,) predict labels (B,) in [0,1]; a label above 0.5 counts as good.

    `others` (B,N-1): each image's rewards for contrastive prompts. "prompt_accuracy" is then the fraction of the good
    images that have a higher reward for their own prompt than for any of these.
    """
    good = label > 0.5
    bins = calibration(reward, label)
    return {
        "accuracy": float(((reward > 0.5) == good).float().mean()),
        "auc": area_under_curve(reward, label),
        "ece": expected_calibration_error(bins),
        "brier": float((label - reward).square().mean()),
        "prompt_accuracy": (
            float((reward[:, None] > others)[good].all(dim=1).float().mean())
            if others is not None and others.shape[1] and good.any()
            else None
        ),
        "calibration": bins,
    }


def ranked_right(first: Tensor, second: Tensor, preferred: Tensor) -> float | None:
    """Fraction of pairs of which the better image has the higher score, equal scores counting half; None without any.

    Scores (C,) and (C,) of two images; preferred (C,) is 1 where the first is better, 0 where the second one is. Ties,
    1/2, are left out.
    """
    decided = preferred != 0.5
    right = ((first - second).sign() * (2 * preferred - 1).sign() + 1) / 2
    return float(right[decided].mean()) if decided.any() else None


# ----------------------------------------------------------------------------------------------------------- labellers
@dataclass(frozen=True)
class Agreement:
    """Of `images` that two or more of `labellers` judged: the fraction of judgements that are alike, and kappa.

    Good, bad and skip are three verdicts. Of two labellers `alike` is the fraction of images and kappa Cohen's, of more
    the mean over images of the fraction of pairs of labellers, and Fleiss' kappa. kappa is 0 where they agree as often
    as chance has it, 1 where always, None where it has no value: where all say one thing only.
    """

    images: int
    labellers: int
    alike: float
    kappa: float | None

    def __str__(self) -> str:
        name = "Cohen's" if self.labellers == 2 else "Fleiss'"
        kappa = "undefined, for all verdicts are alike" if self.kappa is None else f"{self.kappa:.2f}"
        return f"{self.labellers} labellers agree on {self.alike:.0%} of {self.images:,} images ({name} kappa: {kappa})"


def cohen_kappa(table: np.ndarray) -> float | None:
    """(p_o - p_e) / (1 - p_e) of two labellers' verdicts (Cohen 1960); table (K,K)[i,j] counts items said i and j.

    p_o is the fraction said alike, p_e what independent labellers with the same habits would reach; None where it is 1.
    """
    joint = table / table.sum()
    observed, expected = joint.trace(), float(joint.sum(0) @ joint.sum(1))
    return None if np.isclose(expected, 1) else float((observed - expected) / (1 - expected))


def fleiss_kappa(counts: np.ndarray) -> float | None:
    """(P - P_e) / (1 - P_e) of many labellers' verdicts (Fleiss 1971); counts (N,K)[i,j]: labellers who said j of i.

    P is the mean over items of the fraction of pairs of labellers that agree, P_e = sum_j p_j^2. Items may have
    different numbers of labellers, two or more: p_j is then the mean of the items' fractions. None where P_e is 1.
    """
    expected = float(np.square((counts / counts.sum(1, keepdims=True)).mean(0)).sum())
    return None if np.isclose(expected, 1) else float((pairs_alike(counts).mean() - expected) / (1 - expected))


def pairs_alike(counts: np.ndarray) -> np.ndarray:
    """(N,) of counts (N,K): the fraction of an item's pairs of labellers that say the same."""
    n = counts.sum(1)
    return (counts * (counts - 1)).sum(1) / (n * (n - 1))


def two_thirds(votes: Tensor) -> Tensor:
    """What raters (R) find of pairs (P), votes (R,P) of 1 for the first, -1 for the second and 0 for neither, as (P,).

    A pair is won, 1, or lost, -1, by two thirds of the votes or more (Lee et al. 2023, section 4); else it is tied, 0.
    """
    won, lost = (3 * (votes == side).sum(0) >= 2 * len(votes) for side in (1, -1))
    return won.int() - lost.int()


# ------------------------------------------------------------------------------------------------------ sets of images
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


def cmmd(feats: Tensor, reference: Tensor, sigma: float = 10.0) -> float | None:
    """CLIP maximum mean discrepancy of features (N,E) and (M,E), 1000 MMD^2 (Jayasumana et al. 2024, equation 3).

    A Gaussian kernel exp(-|x - y|^2 / (2 sigma^2)) on features of unit length, without the pairs of a row with itself:
    an unbiased estimate, which may be below 0. None where it has no value: fewer than two rows.
    """
    a, b = (F.normalize(features.cpu().double(), dim=1) for features in (feats, reference))
    if min(len(a), len(b)) < 2:
        return None

    def total(x: Tensor, y: Tensor) -> float:  # the sum of all kernel values, |x - y|^2 = 2 - 2 x y
        return sum(float(((rows @ y.T - 1) / sigma**2).exp().sum()) for rows in x.split(1024))

    own = [(total(x, x) - len(x)) / (len(x) * (len(x) - 1)) for x in (a, b)]
    return 1000 * (own[0] + own[1] - 2 * total(a, b) / (len(a) * len(b)))


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


# ---------------------------------------------------------------------------------------------------- image statistics
# Images (N,3,H,W) in RGB from 0 to 1 in, a number (N,) of each out. The paper names oversaturated images as a failure
# of rewards that are optimised too far: such numbers show it before anyone looks.
EDGE = 0.1  # change of brightness from pixel to pixel that counts as an edge: ours
LEVELS = 8  # of each channel in the histogram of colors: ours


def saturation(images: Tensor) -> Tensor:
    """Mean over the pixels of HSV's saturation, (max - min) / max of the channels, 0 for black (Smith 1978); 0 to 1."""
    high, low = images.amax(1), images.amin(1)
    return ((high - low) / high.clamp(min=1e-12)).mean((1, 2))


def brightness(images: Tensor) -> Tensor:
    """Mean over the pixels of the luma 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601); 0 to 1."""
    return luma(images).mean((1, 2))


def edge_density(images: Tensor) -> Tensor:
    """Fraction of the pixels at which the gradient of the luma is longer than EDGE per pixel; H and W at least 2.

    By central differences, at the border by one-sided ones. The threshold is ours, so only images of one size compare.
    """
    down, right = torch.gradient(luma(images), dim=(1, 2))
    return (torch.hypot(down, right) > EDGE).to(images.dtype).mean((1, 2))


def color_entropy(images: Tensor) -> Tensor:
    """Shannon entropy in bits of an image's colors in LEVELS^3 equal cells of the RGB cube; 0 (one color) to 9 (all).

    -sum_c p_c log2 p_c over the cells c with the fraction p_c of the pixels. The cells are ours.
    """
    level = (images * LEVELS).long().clamp(0, LEVELS - 1)
    cell = ((level[:, 0] * LEVELS + level[:, 1]) * LEVELS + level[:, 2]).flatten(1)
    p = torch.stack([row.bincount(minlength=LEVELS**3) for row in cell]) / cell.shape[1]
    return torch.special.entr(p).sum(1) / math.log(2)


def luma(images: Tensor) -> Tensor:
    """The brightness (N,H,W) of each pixel as BT.601 weighs the channels."""
    return 0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]


PICTURE: dict[str, Callable[[Tensor], Tensor]] = {  # by the names that results.json has
    "saturation": saturation,
    "brightness": brightness,
    "edge density": edge_density,
    "color entropy": color_entropy,
}
