"""Sets of images of a prompt, compared as the paper does (Lee et al. 2023, section 4): two thirds of the raters decide.

With the bundled model a rater is the simulated annotator, or a copy of it that errs at random. Alignment: the set with
more good images is better. Fidelity: the one with more clean images (`clean`) is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import open_image
from ..engine.optimising import generator
from ..feedback import SIMULATED
from ..measures import two_thirds
from ..models.clip import CLIP
from ..models.reward import embed_images
from ..shapes.world import GRAMMAR, read, shown
from .judges import PEOPLE, Judged, TestItem

RATERS, WRONG = 9, 0.1  # nine as in the paper; each errs on an image with this probability
NOISY = "nine noisy copies"
OUTCOMES = {"won": 1, "tied": 0, "lost": -1}
DRAWN, NEAREST = 4, 0.95  # see `clean`


def outcomes(ours: Tensor, theirs: Tensor, raters: int = 1, wrong: float = 0.0, seed: int = 0) -> Tensor:
    """Which of two sets of S images the raters prefer, for each of P prompts: 1 ours, -1 theirs, 0 neither; (P,).

    ours, theirs (P,S): 1 for a good image and 0 for another. Each rater takes each image for the opposite with
    probability `wrong`, and prefers the set with more good images; two thirds of them decide.
    """
    g = generator(seed, 9)
    seen = [
        torch.where(torch.rand(raters, *side.shape, generator=g) < wrong, 1 - side, side).sum(-1)
        for side in (ours, theirs)
    ]
    return two_thirds((seen[0] - seen[1]).sign())


def rated(ours: Tensor, theirs: Tensor, seed: int) -> dict[str, Tensor]:
    """`outcomes` by the annotator alone, and by nine noisy copies of it."""
    return {SIMULATED: outcomes(ours, theirs), NOISY: outcomes(ours, theirs, RATERS, WRONG, seed)}


def outcome_fractions(results: Tensor) -> dict[str, Any]:
    """Outcomes (P,) in numbers: the fractions of the prompts, and their number."""
    return {name: float((results == value).double().mean()) for name, value in OUTCOMES.items()} | {"n": len(results)}


def clean(paths: Sequence[Path], features: Tensor, clip: CLIP, seed: int) -> list[float]:
    """1 for an image that looks like a fresh drawing of what it shows, 0 for another and for one that is unreadable.

    It looks like one where its row of the CLIP features (N,E) is as near to those of fresh drawings of what it shows as
    19 of 20 of these drawings are to one another. This one threshold is of all the images together, so what is compared
    is asked for in one call. Images of none or several of the palette's colors do not count in it: their drawings,
    each of another color, are far apart.
    """
    pictures = [open_image(path) for path in paths]
    again = [shown(pictures, 1000 * seed + k) for k in range(DRAWN)]
    readable = [i for i, image in enumerate(again[0]) if image is not None]
    scenes = [scene for scene in map(read, pictures) if scene is not None]
    plain = [k for k, scene in enumerate(scenes) if scene.color in GRAMMAR.colors]
    if not plain:
        return [0.0] * len(pictures)
    drawn = torch.stack([embed_images(clip, [image for image in one if image is not None]) for one in again])
    unit = torch.nn.functional.normalize(drawn, dim=-1)
    others = unit.sum(0) - unit  # (K,R,E): of each drawing the others
    least = torch.cosine_similarity(unit, others, dim=-1)[:, plain].flatten().quantile(1 - NEAREST)
    near = torch.cosine_similarity(features[readable].to(unit.device), others[0], dim=-1) >= least
    values = [0.0] * len(pictures)
    for i, one in zip(readable, near.tolist()):
        values[i] = float(one)
    return values


def rows_of_sets(items: Sequence[TestItem], size: int) -> list[list[int]]:
    """The rows of each set: `size` images of one prompt in the order of the items; incomplete sets are left out."""
    rows: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        rows.setdefault(item.prompt, []).append(i)
    return [same[k : k + size] for same in rows.values() for k in range(0, len(same) - size + 1, size)]


def compared_sets(
    sides: Sequence[Judged], items: Sequence[TestItem], size: int, clip: CLIP, seed: int
) -> dict[str, Any]:
    """Each model's sets against the first's: alignment or fidelity -> rater -> model -> group -> fractions."""
    sets = rows_of_sets(items, size)
    values: dict[tuple[str, str], Sequence[Sequence[float | None] | None]]
    values = {("alignment", name): [side.values.get(name) for side in sides] for name in (SIMULATED, PEOPLE)}
    if all(SIMULATED in side.values for side in sides):
        paths = [path for side in sides for path in side.paths]
        together = clean(paths, torch.cat([side.features for side in sides]), clip, seed)
        values["fidelity", SIMULATED] = [together[k : k + len(items)] for k in range(0, len(paths), len(items))]
    groups = ["overall", *dict.fromkeys(name for item in items for name in item.groups)]
    compared: dict[str, Any] = {}
    for (kind, rater), (base, *others) in values.items():
        for side, mine in zip(sides[1:], others):
            if base is None or mine is None:
                continue
            complete = [rows for rows in sets if all(None not in (base[i], mine[i]) for i in rows)]
            if not complete:
                continue
            ours, theirs = (torch.tensor([[one[i] for i in rows] for rows in complete]) for one in (mine, base))
            said = rated(ours, theirs, seed) if rater == SIMULATED else {rater: outcomes(ours, theirs)}
            for name, result in said.items():
                table = compared.setdefault(kind, {}).setdefault(name, {}).setdefault(side.name, {})
                for group in groups:
                    of = [k for k, rows in enumerate(complete) if group in ("overall", *items[rows[0]].groups)]
                    if of:
                        table[group] = outcome_fractions(result[of])
    return {"size": size, "compared": compared}
