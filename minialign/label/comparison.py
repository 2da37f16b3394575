"""What the labelling page shows and saves with --compare: two images of a prompt, blind, the better one or a tie."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..feedback import PREFERENCES, FeedbackStore, StoredImage
from ..feedback.judgements import Judgements
from ..measures import wilson_interval
from .book import LabelBook, Refused, number


class ComparisonBook(LabelBook):
    """Comparisons of a run's images with another's of the same prompts.

    An image of the run stands left or right by a hash of its id and the other folder, so it stands there again after a
    reload; the page and the addresses of the images do not say which is whose.
    """

    mode, verdicts = "compare", ("left", "right", "tie")

    def __init__(self, store: FeedbackStore, other: Path, enough: int | None = None):
        self.other = other.resolve()
        super().__init__(store, [self.other], enough)

    def kept(self) -> Judgements:
        return Judgements(self.store, self.other)

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        self.pairs = match(self.store, self.other)
        ids = np.array(sorted(self.pairs), np.int64)
        return ids, np.arange(len(ids))

    def side(self, image: int) -> str:
        """Where the run's own image stands."""
        told = hashlib.sha256(f"{image}\0{self.other}".encode()).digest()
        return ("left", "right")[told[0] & 1]

    def addresses(self, image: int) -> list[str]:
        return [f"image/{image}/left", f"image/{image}/right"]

    def write(self, labeller: str, image: int, verdict: str) -> None:
        side = self.side(image)
        preference = "tie" if verdict == "tie" else "this" if verdict == side else "other"
        self.store.add_comparison(labeller, image, self.other, Path(self.pairs[image]), preference, side)

    def given(self, labeller: str, images: Sequence[int]) -> dict[int, tuple[str, str]]:
        def shown(image: int, preference: str) -> str:
            here = self.side(image)
            there = "right" if here == "left" else "left"
            return {"this": here, "other": there}.get(preference, "tie")

        found = super().given(labeller, images)
        return {image: (shown(image, verdict), time) for image, (verdict, time) in found.items()}

    def picture(self, image: int, side: str | None) -> tuple[str, bytes]:
        if side is None or image not in self.pairs:
            raise Refused(404, "no such image")
        try:
            return super().picture(image, None) if side == self.side(image) else self.read(self.pairs[image], None)
        except Refused as error:
            raise Refused(error.status, "the image cannot be shown") from error  # its name would tell whose it is

    def told(self, labeller: str | None) -> list[str]:
        return compared(self.store.folder, self.other) if self.finished(labeller) else []


def compared(folder: Path, other: Path) -> list[str]:
    """How the comparisons of a run with another ended, in lines."""
    store = FeedbackStore(folder, read_only=True)
    try:
        query = "SELECT verdict, COUNT(*) FROM comparisons WHERE other = ? GROUP BY verdict"
        counts = dict.fromkeys(PREFERENCES, 0) | dict(store.query(query, (str(other.resolve()),)))
    finally:
        store.close()
    wins, decided = counts["this"], counts["this"] + counts["other"]
    if not decided:
        return [f"Nothing decided yet; {number(counts['tie'], 'tie')}"]
    low, high = wilson_interval(wins, decided)
    return [
        f"{folder} wins {wins / decided:.0%} of {number(decided, 'decided comparison')} "
        f"with {other.resolve()} (95 % interval {low:.0%} to {high:.0%})",
        f"{wins:,} won, {counts['other']:,} lost, {number(counts['tie'], 'tie')}",
    ]


def match(store: FeedbackStore, other: Path) -> dict[int, str]:
    """Image id of the run -> the other folder's image of the same prompt, as an absolute path.

    Where both are runs, prompt and seed decide; for a prompt of which no seed is in both, the order of its images. Of a
    folder without a store the file of the same name is the other image: its place below the run, or below its images/.
    Where a file is missing there is no pair.
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
    drawn: dict[tuple[str, int | None], str] = {}
    prompts: dict[str, list[str]] = {}
    for image in there:
        path = os.path.abspath(image.file)
        prompts.setdefault(image.prompt, []).append(path)
        drawn.setdefault((image.prompt, image.seed), path)
    pairs = {i.id: drawn[i.prompt, i.seed] for i in here if i.seed is not None and (i.prompt, i.seed) in drawn}
    seeded = {image.prompt for image in here if image.id in pairs}
    for image in here:
        if image.prompt not in seeded and prompts.get(image.prompt):
            pairs[image.id] = prompts[image.prompt].pop(0)
    return pairs
