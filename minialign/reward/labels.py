"""The labels of a run as the reward model learns them: which are held out, and which prompts contrast with which."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.cache import features
from ..feedback import FeedbackStore, StoredImage
from ..files import InputError, read_json
from ..models.clip import CLIP
from ..models.reward import RewardModel
from ..prompts import contrastive_prompts
from .trainer import Comparisons, Pairs, train_reward

HELD_OUT = 0.1  # of the prompts are held out entirely, and as large a fraction of the other prompts' images
FEWEST = 20  # labels, below which a warning says that they are few
CONTRASTIVE = 7  # contrastive prompts of each image; how many the paper has is not known
SUBSETS = ("known prompts", "new prompts")  # of the held-out labels
LEARN = "learn"  # the subset that is learned from
PREFERRED = {"this": 1.0, "other": 0.0, "tie": 0.5}  # of the first of two compared images, as L_bt has it
Compared = tuple[int, int, float]  # two images by their numbers, and PREFERRED of the judgement


class Split(NamedTuple):
    """Rows of labelled images: to learn from, and held out, of known and of new prompts."""

    learn: list[int]
    known: list[int]
    new: list[int]

    @property
    def held_out(self) -> dict[str, list[int]]:
        """The rows of held-out labels, by SUBSETS; a subset without any is missing."""
        return {name: rows for name, rows in zip(SUBSETS, self[1:]) if rows}


def split_labels(prompts: Sequence[object], seed: int) -> Split:
    """Hold out some prompts entirely and some images of the others; `prompts` are anything that distinguishes prompts.

    HELD_OUT of the prompts, at least one where there are three, and HELD_OUT of the other prompts' images.
    """
    rng = random.Random(seed)
    order = list(dict.fromkeys(prompts))
    rng.shuffle(order)
    held_out = set(order[: max(1, round(HELD_OUT * len(order)))] if len(order) >= 3 else [])
    new = [i for i, prompt in enumerate(prompts) if prompt in held_out]
    rest = [i for i, prompt in enumerate(prompts) if prompt not in held_out]
    rng.shuffle(rest)
    number = round(HELD_OUT * len(rest))
    return Split(sorted(rest[number:]), sorted(rest[:number]), new)


def read_labels(folder: Path, soft: bool = False) -> tuple[list[Any], list[StoredImage], dict[int, float]]:
    """What stands for the images of a run's store, the images, and by their number there the labels in [0,1].

    `soft`: the mean of an image's labels in place of their majority. InputError names a folder without a store.
    """
    if not (folder / "feedback.sqlite").is_file():
        raise InputError(f"{folder}: no feedback.sqlite; accepted: a run of generate, or label --import FILE")
    store = FeedbackStore(folder, read_only=True)
    try:
        content, images, labels = store.content(), store.images(), store.labels(soft=soft)
    finally:
        store.close()
    return content, images, {i: labels[image.id] for i, image in enumerate(images) if image.id in labels}


def read_comparisons(folder: Path) -> list[Compared]:
    """Every comparison of two images of a run's store, by the images' numbers there as `read_labels` has them."""
    store = FeedbackStore(folder, read_only=True)
    try:
        number = {image.id: i for i, image in enumerate(store.images())}
        preferences = store.preferred()
    finally:
        store.close()
    return [(number[one.image], number[one.other], PREFERRED[one.verdict]) for one in preferences]


def check_labels(folder: Path, labels: dict[int, float], prompts: int, comparisons: int = 0) -> None:
    """Say what few or one-sided labels mean; InputError where there is nothing to learn from."""
    if comparisons:
        without = "there is no auxiliary loss, for no image is labelled good"
        if not labels:
            relative = "r is only relative, it tells which of two images of a prompt is better, not whether one is good"
            warn(f"{comparisons} comparisons and no label: {relative}; {without}")
        elif not any(labels.values()):
            warn(without)
        return
    if not labels:
        raise InputError(f"{folder}: no labels; collect them with python -m minialign.label {folder}")
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


def read_contrastive(path: Path, prompts: Iterable[str], quiet: bool = False) -> dict[str, list[str]]:
    """Contrastive prompts that the user chose: a JSON object, prompt -> list of prompts.

    A prompt in its own list is left out, as CLIP reads it: in small letters, with single spaces. InputError where an
    entry cannot be used, or where none of the run's `prompts` is in the file.
    """
    contrastive, own = read_json(path), 0
    for prompt, others in contrastive.items():
        accepted = "accepted: a list of other prompts"
        if not isinstance(others, list) or not others or not all(isinstance(one, str) and one for one in others):
            raise InputError(f"{path}: {prompt!r:.80}: {json.dumps(others):.80}; {accepted}")
        contrastive[prompt] = [one for one in others if one.lower().split() != prompt.lower().split()]
        if not contrastive[prompt]:
            raise InputError(f"{path}: {prompt!r:.80} is its own only contrastive prompt; {accepted}")
        own += len(contrastive[prompt]) < len(others)
    if not contrastive.keys() & set(prompts):
        raise InputError(
            f"{path}: none of its {len(contrastive)} prompts is one of the run's; accepted: prompt -> [prompts]"
        )
    if own and not quiet:
        warn(f"{path}: prompts that stand in their own list of contrastive prompts are left out of it: {own:,}")
    return contrastive


def contrastive_table(
    prompts: Sequence[str], among: Sequence[str], same: dict[str, Any], seed: int, own: Mapping[str, list[str]] = {}
) -> tuple[list[str], Tensor]:
    """A table of texts, and for each of the prompts (B,) the rows (B,N) of itself and of its contrastive prompts.

    Contrastive prompts are other prompts that have feedback, `among`, never one that nobody labelled: the model would
    learn that it is wrong for every image. same[prompt]: its token ids, which distinguish prompts. -1 stands for
    none. own[prompt], where it is there, takes the place of all this: what it says is its author's choice.
    """
    rng = random.Random(seed)
    table: dict[str, int] = {}
    columns: dict[str, list[int]] = {}
    for prompt in dict.fromkeys(prompts):
        others = [other for other in among if same[other] != same[prompt]]
        chosen = own[prompt] if prompt in own else contrastive_prompts(prompt, CONTRASTIVE, others, rng)
        columns[prompt] = [table.setdefault(text, len(table)) for text in (prompt, *chosen)]
    width = max(1 + CONTRASTIVE, *map(len, columns.values())) if columns else 0
    rows = {prompt: row + [-1] * (width - len(row)) for prompt, row in columns.items()}
    return list(table), torch.tensor([rows[prompt] for prompt in prompts])


class Labelled(NamedTuple):
    """What training and measuring read of a run with I images, P different texts and N texts an image."""

    images: Tensor  # (I,E), CLIP's embeddings
    texts: Tensor  # (P,E)
    columns: Tensor  # (I,N): rows of `texts`, an image's prompt and its contrastive prompts; -1: none
    labels: dict[int, float]  # by the row of an image
    split: Split
    prompts: dict[int, tuple[int, ...]]  # token ids of the prompt of an image with feedback, by the row of the image
    compared: Mapping[str, list[Compared]] = {}  # LEARN and those of SUBSETS that have any

    def pairs(self, rows: Sequence[int]) -> Pairs:
        device = self.images.device
        label = torch.tensor([self.labels[i] for i in rows], dtype=torch.float32)
        return Pairs(
            torch.tensor(rows, dtype=torch.long).to(device), self.columns[list(rows)].to(device), label.to(device)
        )

    def comparisons(self, subset: str) -> Comparisons | None:
        """Those to learn from (LEARN), or of SUBSETS; None where there are none."""
        if not self.compared.get(subset):
            return None
        first, second, preferred = zip(*self.compared[subset])
        device, prompt = self.images.device, self.columns[list(first), 0]
        i, j = torch.tensor([first, second]).to(device)
        return Comparisons(i, j, prompt.to(device), torch.tensor(preferred, dtype=torch.float32).to(device))


def read_labelled(folder: Path, clip: CLIP, settings: dict[str, Any]) -> Labelled:
    """The labels of a run, split into those to learn from and held-out ones, and CLIP's embeddings of its images."""
    _, stored, labels = read_labels(folder, settings["soft"])
    comparisons = read_comparisons(folder)
    prompts = [image.prompt for image in stored]
    unique = list(dict.fromkeys(prompts))
    tokens = {text: tuple(row) for text, row in zip(unique, clip.tokenizer(unique).tolist())} if unique else {}
    known = {i: tokens[prompts[i]] for i in with_feedback(labels, comparisons)}
    check_labels(folder, labels, len(set(known.values())), len(comparisons))
    split, compared = split_feedback(known, labels, comparisons, settings["seed"])
    own = read_contrastive(Path(settings["contrastive"]), unique, quiet=True) if settings.get("contrastive") else {}
    among = list(dict.fromkeys(prompts[i] for i in split.learn))
    texts, columns = contrastive_table(prompts, among, tokens, settings["seed"], own)
    paths = [image.path for image in stored]
    images, embeds = features(folder / "cache" / "features.safetensors", clip, paths, texts)
    device = clip.logit_scale.device
    return Labelled(images.to(device), embeds.to(device), columns, labels, split, known, compared)


def with_feedback(labels: Mapping[int, float], comparisons: Sequence[Compared]) -> list[int]:
    """The numbers of the images that have a label or are compared, in ascending order."""
    return sorted(labels.keys() | {i for pair in comparisons for i in pair[:2]})


def split_feedback(
    prompts: Mapping[int, object], labels: Mapping[int, float], comparisons: Sequence[Compared], seed: int
) -> tuple[Split, dict[str, list[Compared]]]:
    """`split_labels` of the images with feedback, prompts[i] of image i: labels by image, and comparisons with them.

    A comparison is held out where one of its images is, so that nothing is learned of held-out images: of new prompts
    with its prompt, else of known ones. Nothing is held out where too little would be left to learn from.
    """
    rows = list(prompts)
    subsets = [{rows[i] for i in subset} for subset in split_labels(list(prompts.values()), seed)]
    learn, _, new = subsets
    compared: dict[str, list[Compared]] = {LEARN: [], SUBSETS[0]: [], SUBSETS[1]: []}
    for pair in comparisons:
        compared[SUBSETS[1] if pair[0] in new else LEARN if {*pair[:2]} <= learn else SUBSETS[0]].append(pair)
    lost = len({labels[i] > 0.5 for i in learn if i in labels}) < len({label > 0.5 for label in labels.values()})
    if lost or (comparisons and not compared[LEARN]):
        subsets, compared = [set(rows), set(), set()], {LEARN: list(comparisons)}
    split = Split(*(sorted(subset & labels.keys()) for subset in subsets))
    return split, {name: pairs for name, pairs in compared.items() if pairs}


def train(
    data: Labelled,
    settings: dict[str, Any],
    weight_of_classification: float,
    log: Callable[[dict[str, Any]], None] = lambda row: None,
    quiet: bool = False,
) -> RewardModel:
    """`train_reward` on the labels that are not held out, with the settings of a run."""
    config = {"width": data.images.shape[1], "hidden": settings["hidden"], "clip": settings["clip"]}
    return train_reward(
        data.images, data.texts, data.pairs(data.split.learn), config,
        steps=settings["reward_steps"], batch_size=settings["reward_batch_size"],
        learning_rate=settings["reward_learning_rate"], weight_of_classification=weight_of_classification,
        temperature=settings["temperature"], balanced=settings["balanced"], seed=settings["seed"], log=log,
        quiet=quiet,
        comparisons=data.comparisons(LEARN), comparison_temperature=settings["comparison_temperature"],
    )  # fmt: skip
