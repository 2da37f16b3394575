"""The cells of the study, each the main job with one choice changed: their definition and their cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..engine.settings import defaults
from ..evaluate.judges import DISTANCES
from ..finetune import WEIGHTINGS
from ..measures import platt
from ..reward.labels import Labelled

Score = Callable[[Tensor, Tensor], Tensor]  # of embeddings of images and prompts, both (B,E): (B,) in [0,1]
DEFAULTS = defaults(bundled=True)
SIZES: dict[str, dict[str, Any]] = {
    # run: settings of a seed's main job; cell: of its cells, whose length a pilot decides (docs/results.md). distances:
    # images that a Frechet distance is computed from, always as many. set_prompts: of the comparisons of sets
    "full": {
        "run": {},
        "cell": {"steps": 240, "batch_size": 32, "ema": 0.97, "test_images": 640},
        "distances": DISTANCES,
        "set_prompts": 96,
    },
    "quick": {  # tries every line; its numbers mean nothing
        "run": {"images": 192, "labels": 128, "test_images": 24, "pretrain_images": 16, "steps": 4, "batch_size": 8,
                "sampling_steps": 5, "hidden": 64, "reward_steps": 60},
        "cell": {"steps": 4, "batch_size": 8, "ema": 0.5, "test_images": 24, "warmup": 1},
        "distances": 8,
        "set_prompts": 6,
    },
}  # fmt: skip
SET, POOL = 4, 16  # images of a set, and of a prompt that the reward chooses the best of: the paper's, Fig. 6
BACKWARD = 3  # forward passes that a row of training counts as: its own, and twice that for its gradient


@dataclass(frozen=True)
class Cell:
    """One choice changed: what is fine-tuned again from a seed's images and labels.

    kind: "tuned"; "reward", whose reward model is measured and not used; "base", the pre-trained model; "sets", sets of
    images of the pre-trained and of the main job's model.
    """

    settings: dict[str, Any] = field(default_factory=dict)  # of the reward and of fine-tuning that are changed
    kind: str = "tuned"
    score: Callable[[Labelled, Tensor, Tensor], Tensor] | None = None  # takes the reward model's place: see `Score`
    weight: Callable[[Tensor], Tensor] | None = None  # of the images, as a function of their rewards (N,)
    fraction: float = 1.0  # of the labels of each prompt that the reward model learns from
    unlabelled: bool = True  # whether images without a label are scored and learned from, too
    flipped: float = 0.0  # probability that a labeller says the opposite
    labellers: int = 1  # of each image, whose majority counts
    clean: bool = False  # whether captions of pre-training pairs have no mistakes
    times: float = 1  # the steps of other cells

    @property
    def relearns(self) -> bool:
        """Whether a reward model is trained for the cell alone."""
        return self.fraction < 1 or self.flipped > 0 or not self.settings.keys().isdisjoint(("lambda", "temperature"))


def clip_score(data: Labelled, image: Tensor, text: Tensor) -> Tensor:
    """The CLIP score through a logistic regression on the labels that are not held out: two learned numbers."""
    pairs = data.pairs(data.split.learn)
    a, b = platt(torch.cosine_similarity(data.images[pairs.image], data.texts[pairs.prompts[:, 0]]), pairs.label)
    return (a * torch.cosine_similarity(image, text) + b).sigmoid()


BETAS = (0.3, 1)
CELLS: dict[str, Cell] = {
    "base": Cell(kind="base"),
    "sets": Cell(kind="sets"),
    "default": Cell(),
    # Table 3
    "labelled": Cell({"beta": 0}, unlabelled=False),
    "scored": Cell({"beta": 0}),
    "pairs-half": Cell({"beta": 1, "pretrain_fraction": 0.5}),  # half of each step are pre-training pairs: the paper's
    # beta, with captions as noisy as those that the base model learned from, and with clean ones
    **{f"beta-{beta:g}": Cell({"beta": beta}) for beta in BETAS},
    **{f"clean-{beta:g}": Cell({"beta": beta}, clean=True) for beta in BETAS},
    # the reward (Fig. 3): what it is, what it learns from
    "clip": Cell(score=clip_score),
    "lambda-0": Cell({"lambda": 0}),
    "temperature-2": Cell({"temperature": 2}),
    "lambda-2-temperature-2": Cell({"lambda": 2, "temperature": 2}, kind="reward"),
    "temperature-0.125": Cell({"temperature": 0.125}, kind="reward"),
    **{f"labels-{percent}": Cell(fraction=percent / 100) for percent in (10, 50)},
    "flipped-30": Cell(flipped=0.3),
    "flipped-30-majority": Cell(flipped=0.3, labellers=3),
    # how images are weighted
    "uniform": Cell({"image_sampling": "uniform"}),
    "plain": Cell(weight=torch.ones_like),
    **{name: Cell({"weighting": name}) for name in WEIGHTINGS if name != "reward"},
    # length
    "steps-quarter": Cell(times=0.25),
    "steps-4": Cell(times=4),
}


def cell_settings(name: str, seed: int, size: str) -> dict[str, Any]:
    """Settings of a cell."""
    settings = DEFAULTS | SIZES[size]["run"] | SIZES[size]["cell"] | {"seed": seed} | CELLS[name].settings
    steps, warmup = (round(CELLS[name].times * settings[key]) for key in ("steps", "warmup"))
    return settings | {"steps": steps, "warmup": max(1, warmup)}


def described(name: str, seed: int, size: str) -> dict[str, Any]:
    """What makes a cell what it is, as its result.json has it: a result with another one is of another cell."""
    choices = {key: getattr(value, "__name__", value) for key, value in vars(CELLS[name]).items()}
    return json.loads(json.dumps(choices | {"settings": cell_settings(name, seed, size)}))


# ---------------------------------------------------------------------------------------------------------------- cost
def training_calls(settings: dict[str, Any]) -> int:
    """Passes of the UNet over one image that fine-tuning takes, a row of a step counted as BACKWARD of them."""
    return int(settings["steps"] * settings["batch_size"] * BACKWARD)


def sampling_calls(images: int, settings: dict[str, Any]) -> int:
    """Passes of the UNet over one image that sampling takes: with and without the prompt in every step."""
    return int(images * settings["sampling_steps"] * 2)


def cell_calls(name: str, size: str) -> int:
    """Passes of the UNet over one image that a cell takes with its test."""
    settings, kind = cell_settings(name, 0, size), CELLS[name].kind
    tested = {"reward": 0, "sets": SIZES[size]["set_prompts"] * SET}.get(kind, settings["test_images"])
    return sampling_calls(tested, settings) + (training_calls(settings) if kind == "tuned" else 0)


def job_calls(size: str) -> int:
    """Those of a seed's main job, and of the images that rewards are measured on and sets are made of."""
    settings = DEFAULTS | SIZES[size]["run"]
    images = settings["images"] + 2 * settings["test_images"] + SIZES[size]["set_prompts"] * POOL
    return sampling_calls(images, settings) + training_calls(settings)
