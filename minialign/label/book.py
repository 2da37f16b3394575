"""What the labelling page shows and saves: up to three images of one prompt, a verdict for each."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..feedback import VERDICTS, FeedbackStore
from ..feedback.judgements import Judgements
from .queue import Queue

TOGETHER = 3  # images of one prompt that are shown at once: the paper's
PICTURE = 64 * 2**20  # bytes of an image at most
PAUSE = 60  # seconds: a longer wait between two verdicts is not work
FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}


class Refused(Exception):
    """A request that is not answered as asked: an HTTP status and one line for the page."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class LabelBook:
    """The labels of a run as the page asks for them and gives them. For many threads at once."""

    mode: str = "label"
    verdicts: Sequence[str] = VERDICTS

    def __init__(self, store: FeedbackStore, roots: Sequence[Path] = (), enough: int | None = None):
        """roots: folders besides the run's that images may lie in; enough: labels that an image needs (None: all)."""
        self.store, self.enough, self.lock = store, enough, threading.RLock()
        self.judgements = self.kept()
        self.roots = [root.resolve() for root in (store.folder, *roots)]
        self.newest: int | None = -1
        self.refresh()

    def kept(self) -> Judgements:
        return Judgements(self.store)

    def refresh(self) -> None:
        """Take in images that were added to the store since."""
        with self.lock:
            newest = self.judgements.newest_image()
            if newest != self.newest:
                self.ids, group = self.load()
                counts = np.zeros(len(self.ids), np.int64)
                images, numbers = self.judgements.counts()
                rows, known = self.rows(images)
                counts[rows] = numbers[known]
                self.queue = Queue(group, counts, self.enough)
                self.newest = newest

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Image ids in ascending order, and the item of each: TOGETHER images of a prompt in the order they came."""
        ids, prompts = self.judgements.images()
        order = np.argsort(prompts, kind="stable")
        same = prompts[order]
        place = np.arange(len(ids)) - np.searchsorted(same, same)  # of an image among its prompt's
        group = np.empty(len(ids), np.int64)
        group[order] = np.cumsum(place % TOGETHER == 0) - 1
        return ids, group

    def rows(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of those images that the book has, and which those are (N,)."""
        rows = np.searchsorted(self.ids, images)
        known = rows < len(self.ids)
        known[known] = self.ids[rows[known]] == images[known]
        return rows[known], known

    def row(self, image: int) -> int:
        row = int(np.searchsorted(self.ids, image))
        if row == len(self.ids) or self.ids[row] != image:
            raise Refused(404, "no such image")
        return row

    def open(self, labeller: str) -> None:
        self.refresh()
        if labeller not in self.queue.keys:
            self.queue.open(labeller, self.rows(self.judgements.judged(labeller))[0])

    def next(self, labeller: str, without: Sequence[int] = (), number: int = 1) -> list[dict[str, Any]]:
        """Up to `number` items; `without` are keys of items that the page has already."""
        with self.lock:
            self.open(labeller)
            hidden = {int(self.queue.group[self.row(key)]) for key in without}
            found: list[dict[str, Any]] = []
            while len(found) < number and (item := self.queue.next(labeller, hidden)) is not None:
                hidden.add(item)
                shown = self.item(labeller, item)
                judged = [slot["id"] for slot in shown["slots"] if slot["verdict"] is not None]
                for image in judged:  # perhaps by another server: what is shown has something left to judge
                    self.queue.add(labeller, self.row(image), 0)
                if len(judged) < len(shown["slots"]):
                    found.append(shown)
            return found

    def back(self, labeller: str, before: str) -> dict[str, Any] | None:
        """The item that the labeller judged last before a time ("" is now), to look at and change."""
        with self.lock:
            self.open(labeller)
            image = self.judgements.last(labeller, before or "9")
            rows = self.rows(np.array([] if image is None else [image], np.int64))[0]
            return self.item(labeller, int(self.queue.group[rows[0]])) if len(rows) else None

    def judge(self, labeller: str, image: int, verdict: str | None) -> dict[str, Any]:
        """Save a verdict, or take it back (None); on the disk when this returns."""
        if verdict is not None and verdict not in self.verdicts:
            raise Refused(400, f"verdict {verdict!r}; accepted: {', '.join(self.verdicts)}")
        with self.lock:
            self.open(labeller)
            row = self.row(image)
            had = self.given(labeller, [image])
            if verdict is not None:
                self.write(labeller, image, verdict)
            elif had:
                self.judgements.remove(labeller, image)
            if bool(had) != (verdict is not None):
                self.queue.add(labeller, row, -1 if had else 1)
            time = self.given(labeller, [image]).get(image, (None, None))[1]
            return {"time": time, "progress": self.progress(labeller)}

    def write(self, labeller: str, image: int, verdict: str) -> None:
        self.store.add_labels(labeller, [(image, verdict)])

    def given(self, labeller: str, images: Sequence[int]) -> dict[int, tuple[str, str]]:
        """Image id -> (verdict, time) of those that the labeller has judged, as the page shows them."""
        return self.judgements.given(labeller, images)

    def item(self, labeller: str, item: int) -> dict[str, Any]:
        """An item as the page gets it; its key is its first image's id."""
        images = [int(image) for image in self.ids[self.queue.rows(item)]]
        given = self.given(labeller, images)
        slots = []
        for image in images:
            verdict, time = given.get(image, (None, None))
            slots.append({"id": image, "images": self.addresses(image), "verdict": verdict, "time": time})
        return {"item": images[0], "prompt": self.judgements.prompt(images[0]), "slots": slots}

    def addresses(self, image: int) -> list[str]:
        return [f"image/{image}"]

    def progress(self, labeller: str) -> dict[str, Any]:
        """How many images the labeller has judged, of how many, and at what speed of late (a minute, or None)."""
        with self.lock:
            self.open(labeller)
            times = self.judgements.moments(labeller, 31)
            done, left = self.queue.done(labeller), self.queue.left(labeller)
        worked = sum(min(b - a, PAUSE) for a, b in zip(times[1:], times))
        speed = 60 * (len(times) - 1) / worked if worked > 1 else None
        return {"done": done, "total": done + left, "speed": speed}

    def picture(self, image: int, side: str | None) -> tuple[str, bytes]:
        """Content type and bytes of an image. Refused unless it lies in a root and is what was sampled."""
        if side is not None:
            raise Refused(404, "no such image")
        with self.lock:
            found = self.judgements.file(image)
        if found is None:
            raise Refused(404, "no such image")
        return self.read(*found)

    def read(self, name: str, sha256: str | None) -> tuple[str, bytes]:
        try:
            path = (self.store.folder / name).resolve()
            if not any(path.is_relative_to(root) for root in self.roots):
                raise Refused(403, f"the image lies outside the run: {name}; --images FOLDER lets it in")
            if not path.is_file():
                raise Refused(410, f"the image is gone: {name}")
            with open(path, "rb") as file:
                content = file.read(PICTURE + 1)
                file.seek(0)
                with Image.open(file, formats=list(FORMATS)) as opened:
                    kind = FORMATS[opened.format or ""]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise Refused(415, f"not an image that can be shown (PNG, JPEG, WebP or GIF): {name}") from error
        if len(content) > PICTURE:
            raise Refused(413, f"the image has more than {PICTURE >> 20} MiB: {name}")
        if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
            raise Refused(409, f"the image is not the one that was sampled, its SHA-256 differs: {name}")
        return kind, content

    def told(self, labeller: str | None) -> list[str]:
        """What a labeller may know of all labels: agreement only at the end, for it would sway verdicts."""
        return summary(self.store.folder, agreement=self.finished(labeller))

    def finished(self, labeller: str | None) -> bool:
        """Whether nothing is left for a labeller to judge."""
        if labeller is None:
            return False
        with self.lock:
            self.open(labeller)
            return self.queue.left(labeller) == 0


def summary(folder: Path, agreement: bool = True) -> list[str]:
    """What a run's store holds, in lines; through a connection of its own, for it takes seconds of millions."""
    store = FeedbackStore(folder, read_only=True)
    try:
        ((labels, images),) = store.query("SELECT COUNT(*), COUNT(DISTINCT image) FROM labels")
        ((total,),) = store.query("SELECT COUNT(*) FROM images")
        ((pairs,),) = store.query("SELECT COUNT(*) FROM comparisons WHERE other = path")  # of the run's own images
        names = store.labellers()
        found = store.agreement() if agreement else None
    finally:
        store.close()
    lines = [f"{number(labels, 'label')} by {number(len(names), 'labeller')} on {images:,} of {number(total, 'image')}"]
    lines += [f"{number(pairs, 'comparison')} of two images"] if pairs else []
    return lines + ([str(found) if found else "No image was judged by two labellers yet"] if agreement else [])


def number(value: int, what: str) -> str:
    return f"{value:,} {what}{'' if value == 1 else 's'}"
