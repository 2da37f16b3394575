"""Labels and scores of the judges, and image statistics, as means with intervals: by group of prompts; best of N."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import open_image
from ..measures import PICTURE, best_of, diversity, paired_interval, wilson_interval
from .judges import CLIP_SCORE, LABELLERS, REWARD, Judged, TestItem

SAMPLES = 8  # of each group that the report shows
# the least and the greatest value of a number, where they are not 0 and 1
RANGES = {CLIP_SCORE: (-1.0, 1.0), "color entropy": (0.0, 9.0), "diversity": (0.0, 2.0)}


def by_group(sides: Sequence[Judged], judge: str, items: Sequence[TestItem]) -> dict[str, dict[str, dict[str, Any]]]:
    """Means of a judge's labels or scores: model -> group -> value, n, ci95, and gain over the first model.

    The interval of a fraction is Wilson's, that of a mean number and of a gain `paired_interval`'s, over prompts.
    """
    table: dict[str, dict[str, dict[str, Any]]] = {}
    first = sides[0].values.get(judge)
    names = ["overall", *dict.fromkeys(name for item in items for name in item.groups)]
    for side in sides:
        values = side.values.get(judge)
        if values is None:
            continue
        table[side.name] = {}
        for name in names:
            rows = [i for i, item in enumerate(items) if name == "overall" or name in item.groups]
            rows = [i for i in rows if values[i] is not None]
            if rows:
                entry = _mean([values[i] or 0.0 for i in rows], [items[i].prompt for i in rows], judge)
                both = [i for i in rows if first is not None and first[i] is not None]
                if side is not sides[0] and both and first is not None:
                    entry |= _gain([(items[i].prompt, first[i] or 0.0, values[i] or 0.0) for i in both], judge)
                table[side.name][name] = entry
    return table


def _mean(numbers: Sequence[float], texts: Sequence[str], judge: str) -> dict[str, Any]:
    if judge in LABELLERS:
        interval: list[float] | None = wilson_interval(round(sum(numbers)), len(numbers))
    else:
        interval = paired_interval([0.0] * len(numbers), numbers, texts, RANGES.get(judge, (0.0, 1.0)))
    return {"value": sum(numbers) / len(numbers), "n": len(numbers), "ci95": interval}


def _gain(rows: Sequence[tuple[str, float, float]], judge: str) -> dict[str, Any]:
    texts, before, after = zip(*rows)
    low, high = RANGES.get(judge, (0.0, 1.0))
    gain = (sum(after) - sum(before)) / len(rows)
    return {"gain": gain, "gain_ci95": paired_interval(before, after, texts, (low - high, high - low))}


def picture(sides: Sequence[Judged], items: Sequence[TestItem]) -> dict[str, dict[str, dict[str, Any]]]:
    """Image statistics, `measures.PICTURE`: name -> model -> value, n, ci95, and gain over the first model.

    Values are means over the images, intervals `paired_interval`'s over prompts.
    """
    texts = [item.prompt for item in items]
    table: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in PICTURE}
    first: dict[str, list[float]] = {}
    for side in sides:
        numbers: dict[str, list[float]] = {name: [] for name in PICTURE}
        for path in side.paths:
            pixels = torch.from_numpy(np.array(open_image(path))).permute(2, 0, 1)[None] / 255
            for name, number in PICTURE.items():
                numbers[name].append(float(number(pixels)))
        for name, values in numbers.items():
            table[name][side.name] = _mean(values, texts, name)
            if side is not sides[0]:
                table[name][side.name] |= _gain(list(zip(texts, first[name], values)), name)
        first = first or numbers
    return table


def gains(sides: Sequence[Judged], items: Sequence[TestItem]) -> dict[str, dict[str, dict[str, Any]]]:
    """Diversity and the readable fraction against the first model's: name -> model -> gain and gain_ci95."""
    table: dict[str, dict[str, dict[str, Any]]] = {"diversity": {}, "readable": {}}
    first, texts = sides[0], [item.prompt for item in items]
    for side in sides[1:]:
        pairs = zip(_pair_distances(first.features, texts), _pair_distances(side.features, texts))
        if rows := [(text, distance, now) for (text, distance), (_, now) in pairs]:
            table["diversity"][side.name] = _gain(rows, "diversity")
        if first.readable is not None and side.readable is not None:
            before, after = ([float(verdict != "skip") for verdict in one.verdicts] for one in (first, side))
            table["readable"][side.name] = _gain(list(zip(texts, before, after)), "readable")
    return table


def _pair_distances(features: Tensor, texts: Sequence[str]) -> list[tuple[str, float]]:
    """For each ordered pair of images of one prompt: the prompt, and the mean distance of all its pairs.

    `diversity` is the mean of these numbers. An interval sums them within each prompt: each pair's own distance would
    give the same one.
    """
    rows: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        rows.setdefault(text, []).append(i)
    distances = [(text, diversity(features[same], [text] * len(same)), len(same)) for text, same in rows.items()]
    return [(text, mean) for text, mean, n in distances if mean is not None for _ in range(n * (n - 1))]


def best_of_curves(sides: Sequence[Judged], items: Sequence[TestItem]) -> dict[str, dict[str, dict[str, Any]]]:
    """`best_of`, averaged over the prompts: chooser -> judge -> model -> value and ci95 (lists over N = 1, 2, ...).

    Over prompts of which the judge judged every image, up to the number of images that all of them have.
    """
    curves: dict[str, dict[str, dict[str, Any]]] = {}
    rows: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        rows.setdefault(item.prompt, []).append(i)
    for chooser, side in itertools.product((REWARD, CLIP_SCORE), sides):
        scores = side.values.get(chooser)
        for judge, values in side.values.items():
            number = judge not in LABELLERS  # of interest where it chooses itself
            if scores is None or (number and (judge != chooser or chooser == CLIP_SCORE and REWARD in side.values)):
                continue
            complete = [same for same in rows.values() if all(values[i] is not None for i in same)]
            if not complete:
                continue
            chosen = [best_of([scores[i] or 0.0 for i in same], [values[i] or 0.0 for i in same]) for same in complete]
            means = [list(column) for column in zip(*chosen)]
            prompts = [str(i) for i in range(len(chosen))]
            curves.setdefault(chooser, {}).setdefault(judge, {})[side.name] = {
                "value": [sum(column) / len(column) for column in means],
                "ci95": [
                    paired_interval([0.0] * len(column), column, prompts, RANGES.get(judge, (0.0, 1.0)))
                    for column in means
                ],
            }
    return curves


def samples(sides: Sequence[Judged], items: Sequence[TestItem], folder: Any) -> list[dict[str, Any]]:
    """The first few items of each group with every model's image and verdict, not chosen by hand."""
    shown: dict[tuple[str, ...], list[int]] = {}
    for i, item in enumerate(items):
        shown.setdefault(item.groups, []).append(i)
    return [
        {
            "prompt": items[i].prompt,
            "seed": items[i].seed,
            "groups": list(groups),
            "images": {side.name: side.paths[i].relative_to(folder).as_posix() for side in sides},
            "verdicts": {side.name: side.verdicts[i] for side in sides},
        }
        for groups, rows in shown.items()
        for i in rows[:SAMPLES]
    ]
