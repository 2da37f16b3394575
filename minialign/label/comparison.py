"""What the label page shows and saves with --compare: two images of a prompt, blind, and which is better or a tie.

With --sets N two sets of N images of a prompt, as in the paper (Lee et al. 2023, section 4).
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..engine.commands import plural
from ..feedback import PREFERENCES, FeedbackStore, StoredImage
from ..feedback.verdicts import Verdicts
from ..measures import two_thirds, wilson_interval
from .book import LabelBook, Refused

LARGEST_SET = 9  # images of a set, so that each can be seen


class ComparisonBook(LabelBook):
    """Comparisons of images of a run, or of sets of `size` of them, with those of another for the same prompts.

    The first image of a set stands for it. A hash of that image's id and of the other folder decides whether the run's
    own set is left or right, so that a reload does not change it. Neither the page nor the addresses of the images say
    which run an image is from.
    """

    mode, verdicts = "compare", ("left", "right", "tie")

    def __init__(
        self, store: FeedbackStore, other: Path, enough: int | None = None, size: int = 1, roots: Sequence[Path] = ()
    ):
        self.folder, self.other, self.size = other.resolve(), compared_with(other, size), size
        super().__init__(store, [self.folder, *roots], enough)

    def open_verdicts(self) -> Verdicts:
        return Verdicts(self.store, self.other)

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        self.pairs = match(self.store, self.folder)
        prompts: dict[str, list[int]] = {}
        for image in self.store.images():
            if image.id in self.pairs:
                prompts.setdefault(image.prompt, []).append(image.id)
        sets = [same[k : k + self.size] for same in prompts.values() for k in range(0, len(same), self.size)]
        self.sets = {one[0]: one for one in sets if len(one) == self.size}
        self.first = {image: first for first, same in self.sets.items() for image in same}
        ids = np.array(sorted(self.sets), np.int64)
        return ids, np.arange(len(ids))

    def side(self, image: int) -> str:
        """The side of the run's own image."""
        hashed = hashlib.sha256(f"{self.first[image]}\0{self.other}".encode()).digest()
        return ("left", "right")[hashed[0] & 1]

    def addresses(self, image: int) -> list[str]:
        return [f"image/{one}/{side}" for side in ("left", "right") for one in self.sets[image]]

    def write(self, labeller: str, image: int, verdict: str) -> None:
        side = self.side(image)
        preference = "tie" if verdict == "tie" else "this" if verdict == side else "other"
        self.store.add_comparison(labeller, image, self.other, Path(self.pairs[image]), preference, side)

    def verdicts_of(self, labeller: str, images: Sequence[int]) -> dict[int, tuple[str, str]]:
        def shown(image: int, preference: str) -> str:
            here = self.side(image)
            there = "right" if here == "left" else "left"
            return {"this": here, "other": there}.get(preference, "tie")

        verdicts = super().verdicts_of(labeller, images)
        return {image: (shown(image, verdict), time) for image, (verdict, time) in verdicts.items()}

    def picture(self, image: int, side: str | None) -> tuple[str, bytes]:
        if side is None or image not in self.first:
            raise Refused(404, "no such image")
        try:
            return super().picture(image, None) if side == self.side(image) else self.read(self.pairs[image], None)
        except Refused as error:
            raise Refused(error.status, "the image cannot be shown") from error  # a name would tell which run it is of

    def results(self, labeller: str | None) -> list[str]:
        return compared(self.store.folder, self.folder, self.size) if self.finished(labeller) else []


def compared_with(other: Path, size: int = 1) -> str:
    """The key under which the store keeps comparisons with a folder: its path and, for sets, their size.

    So comparisons of sets of one size are kept apart from those of another size and of single images.
    """
    return f"{other.resolve()}" + f"//{size}" * (size > 1)


def compared(folder: Path, other: Path, size: int = 1) -> list[str]:
    """The results of the comparisons of a run with another, in lines. A set is won by two thirds of its votes."""
    store = FeedbackStore(folder, read_only=True)
    try:
        query = "SELECT image, verdict FROM comparisons WHERE other = ? ORDER BY image"
        rows = store.query(query, (compared_with(other, size),))
    finally:
        store.close()
    if size > 1:
        return _sets_compared(folder, other.resolve(), size, rows)
    counts = dict.fromkeys(PREFERENCES, 0) | Counter(verdict for _, verdict in rows)
    wins, decided = counts["this"], counts["this"] + counts["other"]
    if not decided:
        return [f"No comparison is decided yet; {plural(counts['tie'], 'tie')}"]
    low, high = wilson_interval(wins, decided)
    return [
        f"{folder} wins {wins / decided:.0%} of {plural(decided, 'decided comparison')} "
        f"with {other.resolve()} (95 % interval {low:.0%} to {high:.0%})",
        f"{wins:,} won, {counts['other']:,} lost, {plural(counts['tie'], 'tie')}",
    ]


def _sets_compared(folder: Path, other: Path, size: int, rows: Sequence[tuple[int, str]]) -> list[str]:
    votes: dict[int, list[int]] = {}
    for image, verdict in rows:
        votes.setdefault(image, []).append({"this": 1, "other": -1, "tie": 0}[verdict])
    if not votes:
        return [f"No sets of {size} compared yet"]
    counts = Counter(int(two_thirds(torch.tensor(of_one)[:, None])) for of_one in votes.values())
    ends = ", ".join(f"{counts[k] / len(votes):.0%} {name}" for k, name in ((1, "won"), (0, "tied"), (-1, "lost")))
    return [
        f"{folder} against {other}, sets of {size} images of a prompt: {ends} of {plural(len(votes), 'set')}",
        f"{plural(len(rows), 'vote')}; a set is won or lost by two thirds of its votes",
    ]


def match(store: FeedbackStore, other: Path) -> dict[int, str]:
    """Image id of the run -> the absolute path of the other folder's image of the same prompt.

    Of two runs, the images of the same prompt and seed are a pair; for a prompt with no seed in common, images are
    paired in their order. In a folder without a store, the other image is the file with the same path relative to the
    run, or to its images/. Where a file is missing there is no pair.
    """
    here = store.images()
    if (other / "feedback.sqlite").exists():
        pairs = _match_runs(here, other)
    else:
        root, pairs = os.path.abspath(store.folder), {}
        for image in here:
            name = Path(os.path.relpath(os.path.abspath(image.file), root))
            names = [name, name.relative_to("images")] if name.parts[0] == "images" else [name]
            pairs[image.id] = next((str(other / name) for name in names if (other / name).is_file()), "")
    files = {image.id: image.file for image in here}
    return {i: path for i, path in pairs.items() if os.path.isfile(path) and os.path.isfile(files[i])}


def _match_runs(here: Sequence[StoredImage], other: Path) -> dict[int, str]:
    theirs = FeedbackStore(other, read_only=True)
    try:
        there = theirs.images()
    finally:
        theirs.close()
    sampled: dict[tuple[str, int | None], str] = {}
    prompts: dict[str, list[str]] = {}
    for image in there:
        path = os.path.abspath(image.file)
        prompts.setdefault(image.prompt, []).append(path)
        sampled.setdefault((image.prompt, image.seed), path)
    pairs = {i.id: sampled[i.prompt, i.seed] for i in here if i.seed is not None and (i.prompt, i.seed) in sampled}
    seeded = {image.prompt for image in here if image.id in pairs}
    for image in here:
        if image.prompt not in seeded and prompts.get(image.prompt):
            pairs[image.id] = prompts[image.prompt].pop(0)
    return pairs
