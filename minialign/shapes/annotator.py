"""A simulated annotator for stage 1: it reads pixels alone, and finds an image good or bad for a prompt.

Its verdict is skip where it cannot read the image. It finds the background from the frame, objects as connected
regions of another color, and the shape of each region from four numbers that do not depend on place, size or tilt.
People are better at it; this one is tireless, and its errors are measured against the truth of drawings
(reference_tests/test_shapes.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..prompts import SHAPES, Prompt
from .scenes import BACKGROUNDS, COLORS, Scene

Array = NDArray[np.floating[Any]]
SPECK, OBJECT = 12, 60  # regions of fewer pixels than SPECK are ignored, those between SPECK and OBJECT are defects
FAR = 75.0  # RGB distance beyond which a color is none of the palette
FRAME = 0.25  # fraction of the frame's pixels beyond which what differs from the background is no object
SPREAD = 0.1  # how much rougher, in each shape number, the pictures that a model draws may be than drawings
DOUBT = 16.0  # squared Mahalanobis distance beyond which a region has none of the shapes
MARGIN = 4.0  # by which the likeliest shape must beat the next, in twice the log likelihood
STATISTICS = Path(__file__).parent / "checkpoint" / "annotator.json"


@dataclass(frozen=True)
class Region:
    """One object: its mean color (3,) and its shape numbers (4,), see `shape_numbers`."""

    color: Array
    numbers: Array


def read(image: Image.Image) -> Scene | None:
    """What a drawing shows, or None where it cannot be read: not clean, no object, or shapes that differ.

    The color is "other" where it is none of the palette's, or not the same for all objects.
    """
    found = segment(image)
    if found is None:
        return None
    background, regions = found
    colors = {_nearest(region.color, COLORS) for region in regions}
    shapes = {_shape(region.numbers) for region in regions}
    shape = shapes.pop()
    if shapes or shape is None or len(regions) > len(SHAPES.counts):
        return None
    color = colors.pop() if len(colors) == 1 else None
    return Scene(len(regions), color or "other", shape, background)


def annotate(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[str]:
    """The simulated label, "good", "bad" or "skip" (cannot be read), of each image for its prompt."""
    verdicts = []
    for image, prompt in zip(images, prompts, strict=True):
        scene = read(image)
        verdicts.append("skip" if scene is None else "good" if scene.shows(prompt) else "bad")
    return verdicts


def segment(image: Image.Image) -> tuple[str, list[Region]] | None:
    """The background's name and the regions that stand out from it, or None for a picture that is not clean."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    frame = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(frame, axis=0)
    background = _nearest(ground, BACKGROUNDS)
    different = np.linalg.norm(pixels - ground, axis=2)
    crossed = (np.linalg.norm(frame - ground, axis=1) > FAR).mean()  # objects keep off the frame
    if background is None or crossed > FRAME or not (different > FAR).any():
        return None
    color = np.median(pixels[different > FAR], axis=0)
    # how much of each pixel an object covers: its place between the two colors
    span = color - ground
    cover = np.clip((pixels - ground) @ span / (span @ span), 0, 1)
    regions = []
    for mask in _components(np.maximum(cover, different / 150) > 0.5):
        area = int(mask.sum())
        if area >= OBJECT:
            around = _grow(mask)
            inside = pixels[mask & (cover > 0.9)] if (mask & (cover > 0.9)).any() else pixels[mask]
            regions.append(Region(np.median(inside, axis=0), shape_numbers(np.where(around, cover, 0))))
        elif area >= SPECK:
            return None
    return (background, regions) if regions else None


@np.errstate(invalid="ignore", divide="ignore")  # what covers nothing has no numbers, and so none of the shapes
def shape_numbers(cover: Array) -> Array:
    """Four numbers of a region that do not change with place, size and tilt.

    With z = x + iy from the centroid, weighted by cover: how strongly the region repeats every 1/3, 1/4 and 1/5 turn,
    |sum z^k| / sum |z|^k, and how compact it is, area^2 / (2 pi sum |z|^2), which is 1 for a disc.
    """
    y, x = np.nonzero(cover)
    weight = cover[y, x]
    z = x + 1j * y
    z = z - (weight * z).sum() / weight.sum()
    size = np.abs(z)
    turns = [np.abs((weight * z**k).sum()) / (weight * size**k).sum() for k in (3, 4, 5)]
    return np.array([*turns, weight.sum() ** 2 / (2 * np.pi * (weight * size**2).sum())])


def calibrate(images: Sequence[Image.Image], scenes: Sequence[Scene]) -> dict[str, dict[str, list]]:
    """Mean and covariance of the shape numbers of each shape, measured on pictures whose truth is known."""
    numbers: dict[str, list[Array]] = {name: [] for name in SHAPES.objects}
    for image, scene in zip(images, scenes, strict=True):
        found = segment(image)
        if found is not None and len(found[1]) == scene.count:
            numbers[scene.object] += [region.numbers for region in found[1]]
    return {
        name: {"mean": np.mean(rows, axis=0).tolist(), "covariance": np.cov(np.array(rows).T).tolist()}
        for name, rows in numbers.items()
    }


@cache
def _statistics() -> dict[str, tuple[Array, Array, float]]:
    """For each shape the mean, inverse covariance and log determinant of its numbers."""
    table = json.loads(STATISTICS.read_text(encoding="utf-8"))
    result = {}
    for name, entry in table.items():
        covariance = np.array(entry["covariance"]) + SPREAD**2 * np.eye(4)
        result[name] = np.array(entry["mean"]), np.linalg.inv(covariance), float(np.linalg.slogdet(covariance)[1])
    return result


def _shape(numbers: Array) -> str | None:
    """The likeliest shape under a Gaussian for each (quadratic discriminant); None where all are far or two near."""
    scored = []
    for name, (mean, precision, logdet) in _statistics().items():
        distance = float((numbers - mean) @ precision @ (numbers - mean))
        scored.append((distance + logdet, distance, name))
    (best, distance, name), (second, _, _) = sorted(scored)[:2]
    return name if distance < DOUBT and second - best > MARGIN else None


def _nearest(color: Array, palette: dict[str, tuple[int, int, int]]) -> str | None:
    distances = {name: float(np.linalg.norm(color - np.array(value))) for name, value in palette.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] < FAR else None


def _grow(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask and its four-neighbours."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _components(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The four-connected regions of a mask."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask))}
    regions = []
    while left:
        region = np.zeros_like(mask)
        waiting = [left.pop()]
        while waiting:
            y, x = waiting.pop()
            region[y, x] = True
            for place in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if place in left:
                    left.remove(place)
                    waiting.append(place)
        regions.append(region)
    return regions
