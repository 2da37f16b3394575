"""The only module of the toy data set that others import: its name, prompts, simulated annotator and drawings.

A pipeline is of this world where its checkpoint says so (`Pipeline.world`), as the bundled one does and every model
that is fine-tuned from it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from ..prompts import SHAPES, Prompt, all_prompts, corrupt, parse, split
from . import annotator
from .annotator import read
from .scenes import draw, sample_scene

WORLD = "shapes"
GRAMMAR = SHAPES
# Pre-training captions name the object, but say another count, color or background with this probability: what the
# paper's models get wrong too. Backgrounds are learned most easily. Without the object's name a small model draws
# in-between shapes.
CAPTION_NOISE = {"count": 0.55, "color": 0.4, "background": 0.65}


def knows(texts: Sequence[str]) -> bool:
    """Whether all of the texts are prompts of this world."""
    return all(parse(text, GRAMMAR) is not None for text in texts)


def prompts(seed: int) -> tuple[list[str], list[str]]:
    """The prompts that get feedback, and those that are held out from it, in a random order that the seed decides."""
    parts = split(GRAMMAR, seed)
    held_out = [*parts.new_combinations, *parts.new_objects]
    return [prompt.text for prompt in parts.seen], [prompt.text for prompt in held_out]


def annotate(pictures: Sequence[Image.Image], texts: Sequence[str]) -> list[str]:
    """The simulated annotator's verdicts on images for prompts: good, bad, or skip where it cannot read an image."""
    return annotator.annotate(pictures, [_parsed(text) for text in texts])


def pretraining_pairs(number: int, seed: int, *, clean: bool = False) -> list[tuple[str, Image.Image]]:
    """Drawings with captions as noisy as those of the pre-training, or clean, of prompts that are never judged."""
    rng = random.Random(seed + 1)
    pairs = []
    for caption in rng.choices(split(GRAMMAR, seed).others, k=number):
        # each of its own, so that clean and noisy pairs differ in the mistakes alone
        errs, draws = random.Random(rng.getrandbits(64)), random.Random(rng.getrandbits(64))
        # mistakes are as likely in either direction
        shown = corrupt(caption, {} if clean else CAPTION_NOISE, GRAMMAR, errs)
        pairs.append((caption.text, draw(sample_scene(shown, draws), draws)))
    return pairs


def drawings(texts: Sequence[str], seed: int) -> list[Image.Image]:
    """A fresh drawing of what each prompt asks for."""
    rng = random.Random(seed + 2)
    return [draw(sample_scene(_parsed(text), rng), rng) for text in texts]


def shown(pictures: Sequence[Image.Image], seed: int) -> list[Image.Image | None]:
    """A fresh drawing of what each image shows, whatever it was made for; None where the annotator cannot read it.

    What images look like is measured against these: drawings of the prompts would have other counts and colors than
    images that are not aligned, so that a distance to them is a measure of alignment too. Objects of several colors, or
    of none of the palette's, are drawn in one color of the palette.
    """
    rng = random.Random(seed + 3)
    found = []
    for scene in map(read, pictures):
        if scene is not None and scene.color not in GRAMMAR.colors:
            scene = replace(scene, color=rng.choice(GRAMMAR.colors))
        found.append(None if scene is None else draw(scene, rng))
    return found


def _parsed(text: str) -> Prompt:
    prompt = parse(text, GRAMMAR)
    if prompt is None:
        raise ValueError(f"{text!r} is not a prompt of the toy data set, such as {all_prompts(GRAMMAR)[-1].text!r}")
    return prompt
