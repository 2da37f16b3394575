"""The cells of the study: each is the main job with one choice changed. Their definition, not their computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..engine.settings import defaults
from ..finetune import WEIGHTINGS
from ..measures import platt
from ..reward.labels import Labelled

Score = Callable[[Tensor, Tensor], Tensor]  # of embeddings of images and prompts, both (B,E): (B,) in [0,1]
DEFAULTS = defaults(embedded=True)
SIZES: dict[str, dict[str, Any]] = {
    # run: settings of a seed's main job; cell: of its cells; long: of the long one. looks: steps of the long one after
    # which it is judged, beside the last. distances: images that distances are computed from, always as many
    "full": {
        "run": {},
        "cell": {"steps": 64, "batch_size": 32, "test_images": 320},
        "long": {"steps": 10 * DEFAULTS["steps"], "batch_size": 16, "ema": 0.99},
        "looks": [0, 100, 200, 400, 800, 1600, 2800],
        "distances": 256,
    },
    "quick": {  # tries every line; its numbers mean nothing
        "run": {"images": 192, "labels": 128, "test_images": 24, "pretrain_images": 16, "steps": 4, "batch_size": 8,
                "sampling_steps": 3, "hidden": 64, "reward_steps": 60},
        "cell": {"steps": 2, "batch_size": 8, "test_images": 24, "warmup": 1},
        "long": {"steps": 20, "batch_size": 8, "ema": 0.9},
        "looks": [0, 2, 10],
        "distances": 8,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One choice changed: what is fine-tuned again from a seed's images and labels, or sampled without fine-tuning."""

    settings: dict[str, Any] = field(default_factory=dict)  # of the reward and of fine-tuning that are changed
    score: Callable[[Labelled, Tensor, Tensor], Tensor] | None = None  # takes the reward model's place: see `Score`
    weight: Callable[[Tensor], Tensor] | None = None  # of the images, as a function of their rewards (N,)
    fraction: float = 1.0  # of the labels that the reward model learns from
    unlabelled: bool = True  # whether images without a label are scored and learned from, too
    flipped: float = 0.0  # probability that a labeller says the opposite
    labellers: int = 1  # of each image, whose majority counts
    best_of: Sequence[int] = ()  # images a prompt, of which the reward chooses one; nothing is fine-tuned
    model_of: str = ""  # the cell whose model is sampled from; "": the pre-trained one
    times: int = 1  # the steps of other cells
    long: bool = False  # has the settings "long" and a constant learning rate, and is judged along the way; a moving
    # average of its weights takes out what a rate that does not fall shakes

    @property
    def relearns(self) -> bool:
        """Whether a reward model is trained for the cell alone."""
        return self.fraction < 1 or self.flipped > 0 or not self.settings.keys().isdisjoint(("lambda", "temperature"))


def clip_score(data: Labelled, image: Tensor, text: Tensor) -> Tensor:
    """The CLIP score, 0 where it is negative."""
    return torch.cosine_similarity(image, text).clamp(min=0)


def fitted_clip_score(data: Labelled, image: Tensor, text: Tensor) -> Tensor:
    """The CLIP score through a logistic regression on the labels that are not held out: two learned numbers."""
    pairs = data.pairs(data.split.learn)
    a, b = platt(torch.cosine_similarity(data.images[pairs.image], data.texts[pairs.prompts[:, 0]]), pairs.label)
    return (a * torch.cosine_similarity(image, text) + b).sigmoid()


BETAS = (0, 0.1, 0.5, 1, 2)
LAMBDAS, TEMPERATURES = (0, 0.25, 0.5, 1), (0.1, 1, 2)  # the default of both is 0.5
BEST_OF, BEST_OF_TUNED = (2, 4), 4
LONGER = 3
CELLS: dict[str, Cell] = {
    "base": Cell(best_of=(1,)),
    "default": Cell(),
    **{f"beta-{beta:g}": Cell({"beta": beta}) for beta in BETAS},
    "clip-raw": Cell(score=clip_score),
    "clip-fitted": Cell(score=fitted_clip_score),
    **{f"lambda-{weight:g}": Cell({"lambda": weight}) for weight in LAMBDAS if weight != DEFAULTS["lambda"]},
    **{f"temperature-{t:g}": Cell({"temperature": t}) for t in TEMPERATURES},
    **{f"labels-{percent}": Cell(fraction=percent / 100) for percent in (5, 10, 25, 50)},
    **{f"labels-{percent}-alone": Cell(fraction=percent / 100, unlabelled=False) for percent in (5, 10, 25, 50, 100)},
    **{f"flipped-{percent}": Cell(flipped=percent / 100) for percent in (10, 20, 30)},
    "flipped-30-majority": Cell(flipped=0.3, labellers=3),
    "plain": Cell(weight=torch.ones_like),
    "inverted": Cell(weight=lambda r: 1 - r),
    **{name: Cell({"weighting": name}) for name in WEIGHTINGS if name != "reward"},
    "best-of": Cell(best_of=BEST_OF),
    "best-of-tuned": Cell(best_of=(BEST_OF_TUNED,), model_of="default"),
    "longer": Cell(times=LONGER),
    "long": Cell(long=True),
}
KEPT = {cell.model_of for cell in CELLS.values()}  # their models are sampled from by other cells


def cell_settings(seed: int, size: str) -> dict[str, Any]:
    """Settings of a cell in which nothing is changed."""
    return DEFAULTS | SIZES[size]["run"] | SIZES[size]["cell"] | {"seed": seed}


def looked_at(size: str) -> list[int]:
    """Steps of the long one after which it is judged."""
    return [*SIZES[size]["looks"], SIZES[size]["long"]["steps"]]
