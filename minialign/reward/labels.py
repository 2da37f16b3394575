"""The labels of a run as the reward model learns them: which are held out, and which prompts contrast with which."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.cache import features
from ..feedback import FeedbackStore, StoredImage
from ..files import InputError
from ..models.clip import CLIP
from ..prompts import contrastive_prompts
from .trainer import Pairs

HELD_OUT = 0.1  # of the prompts are held out whole, and as large a fraction of the other prompts' images
FEWEST = 20  # labels, below which a warning says that they are few
CONTRASTIVE = 7  # contrastive prompts of each image; how many the paper has is not known
PARTS = ("known prompts", "new prompts")  # of the held-out labels


class Split(NamedTuple):
    """Rows of labelled images: to learn from, and to judge by, of known and of new prompts."""

    learn: list[int]
    known: list[int]
    new: list[int]

    @property
    def judging(self) -> dict[str, list[int]]:
        """The rows of labels that judge, by PARTS; a part without any is missing."""
        return {name: rows for name, rows in zip(PARTS, self[1:]) if rows}


def split_labels(prompts: Sequence[object], seed: int) -> Split:
    """Hold out some prompts whole and some images of the others; `prompts` are anything that tells prompts apart.

    HELD_OUT of the prompts, at least one where there are three, and HELD_OUT of the other prompts' images.
    """
    rng = random.Random(seed)
    order = list(dict.fromkeys(prompts))
    rng.shuffle(order)
    held_out = set(order[: max(1, round(HELD_OUT * len(order)))] if len(order) >= 3 else [])
    new = [i for i, prompt in enumerate(prompts) if prompt in held_out]
    rest = [i for i, prompt in enumerate(prompts) if prompt not in held_out]
    rng.shuffle(rest)
    judging = round(HELD_OUT * len(rest))
    return Split(sorted(rest[judging:]), sorted(rest[:judging]), new)


def split_rows(known: Mapping[int, object], labels: Mapping[int, float], seed: int) -> Split:
    """`split_labels` of rows by what tells their prompts apart; nothing is held out where labels are too few for it."""
    rows = list(known)
    split = Split(*([rows[i] for i in part] for part in split_labels(list(known.values()), seed)))
    if len({labels[i] > 0.5 for i in split.learn}) < len({labels[i] > 0.5 for i in rows}):
        return Split(rows, [], [])
    return split


def read_labels(folder: Path, soft: bool = False) -> tuple[list[Any], list[StoredImage], dict[int, float]]:
    """What stands for the images of a run's store, the images, and by their number there the labels in [0,1].

    `soft`: the mean of an image's labels in place of their majority. InputError names a folder without a store, and
    images that are missing or not the ones that were labelled.
    """
    if not (folder / "feedback.sqlite").is_file():
        raise InputError(f"{folder}: no feedback.sqlite; accepted: a run of generate, or label --import FILE")
    store = FeedbackStore(folder, read_only=True)
    try:
        store.check_images()
        content, images, labels = store.content(), store.images(), store.labels(soft=soft)
    finally:
        store.close()
    return content, images, {i: labels[image.id] for i, image in enumerate(images) if image.id in labels}


def check_labels(folder: Path, labels: dict[int, float], prompts: int) -> None:
    """Say what few or one-sided labels mean; InputError where there is nothing to learn from."""
    if not labels:
        raise InputError(f"{folder}: no labels; python -m minialign.label {folder} takes them")
    good = sum(label > 0.5 for label in labels.values())
    if not any(labels.values()):
        raise InputError(f"{folder}: none of its {len(labels)} labels is good: there is nothing to learn from")
    if good == len(labels):
        warn("all labels are good: every reward will be near 1, and fine-tuning is plain training on these images")
    elif len(labels) < FEWEST:
        warn(f"{len(labels)} labels are too few for a reward model to say anything of other images")
    if prompts == 1:
        warn("one prompt only: there are no contrastive prompts, so the auxiliary loss is left out")


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def contrastive_table(
    prompts: Sequence[str], among: Sequence[str], same: dict[str, Any], seed: int
) -> tuple[list[str], Tensor]:
    """A table of texts, and for each of the prompts (B,) the rows (B,N) of itself and of its contrastive prompts.

    Contrastive prompts are other prompts that have feedback, `among`, never one that nobody judged: the model would
    learn that it is wrong for every image. same[prompt]: its token ids, by which prompts are told apart. -1 stands for
    none.
    """
    rng = random.Random(seed)
    table: dict[str, int] = {}
    columns: dict[str, list[int]] = {}
    for prompt in dict.fromkeys(prompts):
        others = [other for other in among if same[other] != same[prompt]]
        chosen = [prompt, *contrastive_prompts(prompt, CONTRASTIVE, others, rng)]
        columns[prompt] = [table.setdefault(text, len(table)) for text in chosen]
        columns[prompt] += [-1] * (1 + CONTRASTIVE - len(chosen))
    return list(table), torch.tensor([columns[prompt] for prompt in prompts])


class Labelled(NamedTuple):
    """What the trainer and the judges read of a run with I images, P different texts and N texts an image."""

    images: Tensor  # (I,E), CLIP's embeddings
    texts: Tensor  # (P,E)
    columns: Tensor  # (I,N): rows of `texts`, an image's prompt and its contrastive prompts; -1: none
    labels: dict[int, float]  # by the row of an image
    split: Split
    prompts: dict[int, tuple[int, ...]]  # token ids of a labelled image's prompt, by the row of the image

    def pairs(self, rows: Sequence[int]) -> Pairs:
        device = self.images.device
        label = torch.tensor([self.labels[i] for i in rows], dtype=torch.float32)
        return Pairs(torch.tensor(rows).to(device), self.columns[list(rows)].to(device), label.to(device))

    @property
    def held_out(self) -> dict[str, list[int]]:
        return self.split.judging


def read_labelled(folder: Path, clip: CLIP, settings: dict[str, Any]) -> Labelled:
    """The labels of a run, split into those to learn from and to judge by, and CLIP's embeddings of its images."""
    _, stored, labels = read_labels(folder, settings["soft"])
    prompts = [image.prompt for image in stored]
    unique = list(dict.fromkeys(prompts))
    tokens = {text: tuple(row) for text, row in zip(unique, clip.tokenizer(unique).tolist())} if unique else {}
    known = {i: tokens[prompts[i]] for i in sorted(labels)}
    check_labels(folder, labels, len(set(known.values())))
    split = split_rows(known, labels, settings["seed"])
    among = list(dict.fromkeys(prompts[i] for i in split.learn))
    texts, columns = contrastive_table(prompts, among, tokens, settings["seed"])
    paths = [image.path for image in stored]
    images, embeds = features(folder / "cache" / "features.safetensors", clip, paths, texts)
    device = clip.logit_scale.device
    return Labelled(images.to(device), embeds.to(device), columns, labels, split, known)
