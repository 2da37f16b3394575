"""How many labels are enough: how well the reward predicts held-out labels, by the number of labels to learn from.

Each random split holds out a fifth of the prompts. Of the labels of the other prompts a reward model learns from all,
from half of them, from a quarter and so on, with the settings of the run and in at most STEPS steps. The gain of the
last doubling is measured; that of one more doubling is not, and such curves flatten.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch

from ..engine.optimising import progress
from ..files import InputError
from ..measures import area_under_curve, preferred, student_t
from .labels import Labelled, Split, train
from .trainer import rewards_of

HELD_OUT = 0.2  # of the prompts, in each split
SPLITS, SIZES = 5, 4  # random splits; numbers of labels
FEWEST = 16  # labels that a model learns from
STEPS = 150  # of a training: more change the AUC little (by 0.02 from 100 to 300 steps, on 1,280 drawings)
MEASURES = ("accuracy", "auc", "pairs")


def split_prompts(data: Labelled, seed: int) -> tuple[list[int], list[int]]:
    """Rows of labels to learn from, in random order, and those of the prompts that are held out entirely."""
    rng = random.Random(seed)
    order = list(dict.fromkeys(data.prompts[i] for i in data.labels))
    rng.shuffle(order)
    held = set(order[: max(1, round(HELD_OUT * len(order)))])
    learn = [i for i in data.labels if data.prompts[i] not in held]
    rng.shuffle(learn)
    return learn, [i for i in data.labels if data.prompts[i] in held]


def measured(data: Labelled, learn: Sequence[int], held_out: Sequence[int], settings: dict[str, Any]) -> dict[str, Any]:
    """MEASURES of a model that learns from some rows, on others; None where one kind of label is missing.

    A prompt that has labels, but none to learn from, is no contrastive prompt either.
    """
    prompts, others = data.columns[:, 0], list(data.labels.keys() - set(learn))
    unknown = torch.isin(data.columns, prompts[others]) & ~torch.isin(data.columns, prompts[list(learn)])
    columns = data.columns.masked_fill(unknown, -1)
    known = data._replace(columns=columns, split=Split(list(learn), [], []), compared={})
    shorter = settings | {"reward_steps": min(STEPS, settings["reward_steps"])}
    model = train(known, shorter, settings["lambda"], quiet=True)
    pairs = data.pairs(held_out)
    reward = rewards_of(model, data.images, data.texts, pairs.image, pairs.prompts[:, :1])[:, 0].cpu()
    label = pairs.label.cpu()
    return {
        "accuracy": float(((reward > 0.5) == (label > 0.5)).float().mean()),
        "auc": area_under_curve(reward, label),
        "pairs": preferred(reward, label, [data.prompts[i] for i in held_out]),
    }


def learning_curve(data: Labelled, settings: dict[str, Any]) -> dict[str, Any]:
    """`labels`, numbers of them, and for each of MEASURES `value` and `ci95` by these numbers over SPLITS splits.

    And `gain`, of the AUC by the last doubling, with its interval. InputError where labels or prompts are too few.
    """
    prompts = len({data.prompts[i] for i in data.labels})
    splits = [split_prompts(data, settings["seed"] + 1000 * k) for k in range(SPLITS)]
    largest = min(len(learn) for learn, _ in splits)
    numbers = [n for k in range(SIZES) if (n := largest >> (SIZES - 1 - k)) >= FEWEST]
    if prompts < 5 or len(numbers) < 2:
        raise InputError(
            f"--curve: {len(data.labels)} labels of {prompts} prompts are too few; accepted: "
            f"at least {math.ceil(2 * FEWEST / (1 - HELD_OUT))} labels of 5 prompts"
        )
    rows: list[list[dict[str, Any]]] = []
    for learn, held_out in progress(splits, "learning curve"):
        rows.append([measured(data, learn[:n], held_out, settings) for n in numbers])
    curve: dict[str, Any] = {"labels": numbers, "splits": SPLITS, "held_out_prompts": HELD_OUT}
    for key in MEASURES:
        columns = [[row[i][key] for row in rows if row[i][key] is not None] for i in range(len(numbers))]
        means = [mean_interval(column, 0.0) for column in columns]
        curve[key] = {"value": [mean for mean, _ in means], "ci95": [ends for _, ends in means]}
    last = [(row[-2]["auc"], row[-1]["auc"]) for row in rows]
    gain = mean_interval([after - before for before, after in last if None not in (before, after)])
    return curve | {"gain": {"value": gain[0], "ci95": gain[1]}}


def mean_interval(values: Sequence[float], least: float = -1.0) -> tuple[float | None, list[float] | None]:
    """The mean and Student's 95 % interval of it, cut off at `least` and 1; None for an interval of fewer than two."""
    n = len(values)
    if n < 2:
        return (values[0] if n else None), None
    mean = sum(values) / n
    half = student_t(n - 1) * math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return mean, [max(least, mean - half), min(1.0, mean + half)]
