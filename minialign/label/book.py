"""What the label page shows and saves: up to three images of one prompt, and a verdict on each."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..engine.commands import plural
from ..feedback import VERDICTS, FeedbackStore
from ..feedback.verdicts import Verdicts
from .queue import Queue

TOGETHER = 3  # images of one prompt that are shown at once: the paper's
LARGEST_IMAGE = 64 * 2**20  # bytes
PAUSE = 60  # seconds: a longer time between two verdicts is a pause
FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}


class Refused(Exception):
    """A request that is refused, with an HTTP status and one line for the page."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class LabelBook:
    """The labels of a run, read and written as the page needs them, by many threads at once."""

    mode: str = "label"
    verdicts: Sequence[str] = VERDICTS

    def __init__(self, store: FeedbackStore, roots: Sequence[Path] = (), enough: int | None = None):
        """roots: more folders that may hold images; enough: labels that an image needs (None: everybody's)."""
        self.store, self.enough, self.lock = store, enough, threading.RLock()
        self.saved = self.open_verdicts()
        self.roots = [root.resolve() for root in (store.folder, *roots)]
        self.newest: int | None = -1
        self.refresh()

    def open_verdicts(self) -> Verdicts:
        return Verdicts(self.store)

    def refresh(self) -> None:
        """Read the images again if some were added to the store."""
        with self.lock:
            newest = self.saved.newest_image()
            if newest != self.newest:
                self.ids, group = self.load()
                counts = np.zeros(len(self.ids), np.int64)
                images, numbers = self.saved.counts()
                rows, known = self.rows(images)
                counts[rows] = numbers[known]
                self.queue = Queue(group, counts, self.enough)
                self.newest = newest

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Image ids in ascending order, and the item of each: up to TOGETHER images of a prompt, ordered by id."""
        ids, prompts = self.saved.images()
        order = np.argsort(prompts, kind="stable")
        same = prompts[order]
        place = np.arange(len(ids)) - np.searchsorted(same, same)  # of an image among those of its prompt
        group = np.empty(len(ids), np.int64)
        group[order] = np.cumsum(place % TOGETHER == 0) - 1
        return ids, group

    def rows(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of those images that the book has, and which of the images (N,) bool these are."""
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
            self.queue.open(labeller, self.rows(self.saved.images_of(labeller))[0])

    def next(self, labeller: str, without: Sequence[int] = (), number: int = 1) -> list[dict[str, Any]]:
        """Up to `number` items; `without` are keys of items that the page has already."""
        with self.lock:
            self.open(labeller)
            hidden = {int(self.queue.group[self.row(key)]) for key in without}
            items: list[dict[str, Any]] = []
            while len(items) < number and (item := self.queue.next(labeller, hidden)) is not None:
                hidden.add(item)
                shown = self.item(labeller, item)
                done = [slot["id"] for slot in shown["slots"] if slot["verdict"] is not None]
                for image in done:  # perhaps through another server
                    self.queue.add(labeller, self.row(image), 0)
                if len(done) < len(shown["slots"]):
                    items.append(shown)
            return items

    def back(self, labeller: str, before: str) -> dict[str, Any] | None:
        """The item with the labeller's last verdict before a time ("": now), which can be changed."""
        with self.lock:
            self.open(labeller)
            image = self.saved.last(labeller, before or "9")
            rows = self.rows(np.array([] if image is None else [image], np.int64))[0]
            return self.item(labeller, int(self.queue.group[rows[0]])) if len(rows) else None

    def save(self, labeller: str, image: int, verdict: str | None) -> dict[str, Any]:
        """Save a verdict, or remove it (None); it is on the disk when this returns."""
        if verdict is not None and verdict not in self.verdicts:
            raise Refused(400, f"verdict {verdict!r}; accepted: {', '.join(self.verdicts)}")
        with self.lock:
            self.open(labeller)
            row = self.row(image)
            before = self.verdicts_of(labeller, [image])
            if verdict is not None:
                self.write(labeller, image, verdict)
            elif before:
                self.saved.remove(labeller, image)
            if bool(before) != (verdict is not None):
                self.queue.add(labeller, row, -1 if before else 1)
            time = self.verdicts_of(labeller, [image]).get(image, (None, None))[1]
            return {"time": time, "progress": self.progress(labeller)}

    def write(self, labeller: str, image: int, verdict: str) -> None:
        self.store.add_labels(labeller, [(image, verdict)])

    def verdicts_of(self, labeller: str, images: Sequence[int]) -> dict[int, tuple[str, str]]:
        """Image id -> (verdict, time), of those images that have a verdict of the labeller, as the page shows them."""
        return self.saved.of(labeller, images)

    def item(self, labeller: str, item: int) -> dict[str, Any]:
        """An item as it is sent to the page; its key is the id of its first image."""
        images = [int(image) for image in self.ids[self.queue.rows(item)]]
        verdicts = self.verdicts_of(labeller, images)
        slots = []
        for image in images:
            verdict, time = verdicts.get(image, (None, None))
            slots.append({"id": image, "images": self.addresses(image), "verdict": verdict, "time": time})
        return {"item": images[0], "prompt": self.saved.prompt(images[0]), "slots": slots}

    def addresses(self, image: int) -> list[str]:
        return [f"image/{image}"]

    def progress(self, labeller: str) -> dict[str, Any]:
        """How many images have a verdict of the labeller, of how many, and the latest verdicts a minute (or None)."""
        with self.lock:
            self.open(labeller)
            times = self.saved.times(labeller, 31)
            done, left = self.queue.done(labeller), self.queue.left(labeller)
        worked = sum(min(b - a, PAUSE) for a, b in zip(times[1:], times))
        speed = 60 * (len(times) - 1) / worked if worked > 1 else None
        return {"done": done, "total": done + left, "speed": speed}

    def picture(self, image: int, side: str | None) -> tuple[str, bytes]:
        """Content type and bytes of an image. Refused unless it is in one of the roots and as it was sampled."""
        if side is not None:
            raise Refused(404, "no such image")
        with self.lock:
            file = self.saved.file(image)
        if file is None:
            raise Refused(404, "no such image")
        return self.read(*file)

    def read(self, name: str, sha256: str | None) -> tuple[str, bytes]:
        try:
            path = (self.store.folder / name).resolve()
            if not any(path.is_relative_to(root) for root in self.roots):
                raise Refused(403, f"the image is outside the run: {name}; accepted: --image-folder with its folder")
            if not path.is_file():
                raise Refused(410, f"the image is gone: {name}")
            with open(path, "rb") as file:
                content = file.read(LARGEST_IMAGE + 1)
                file.seek(0)
                with Image.open(file, formats=list(FORMATS)) as opened:
                    kind = FORMATS[opened.format or ""]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise Refused(415, f"not an image that can be shown (PNG, JPEG, WebP or GIF): {name}") from error
        if len(content) > LARGEST_IMAGE:
            raise Refused(413, f"the image has more than {LARGEST_IMAGE >> 20} MiB: {name}")
        if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
            raise Refused(409, f"the image is not the one that was sampled, its SHA-256 differs: {name}")
        return kind, content

    def results(self, labeller: str | None) -> list[str]:
        """A summary of all labels, in lines. Agreement comes only when the labeller is done: it would bias the rest."""
        return summary(self.store.folder, agreement=self.finished(labeller))

    def finished(self, labeller: str | None) -> bool:
        """Whether no image is left for a labeller."""
        if labeller is None:
            return False
        with self.lock:
            self.open(labeller)
            return self.queue.left(labeller) == 0


def summary(folder: Path, agreement: bool = True) -> list[str]:
    """How many labels a run has and how far labellers agree, in lines; a connection of its own, as it may be slow."""
    store = FeedbackStore(folder, read_only=True)
    try:
        ((labels, images),) = store.query("SELECT COUNT(*), COUNT(DISTINCT image) FROM labels")
        ((total,),) = store.query("SELECT COUNT(*) FROM images")
        ((pairs,),) = store.query("SELECT COUNT(*) FROM comparisons WHERE other = path")  # of the run's own images
        names = store.labellers()
        agreed = store.agreement() if agreement else None
    finally:
        store.close()
    lines = [f"{plural(labels, 'label')} by {plural(len(names), 'labeller')} on {images:,} of {plural(total, 'image')}"]
    lines += [f"{plural(pairs, 'comparison')} of two images"] if pairs else []
    return lines + ([str(agreed) if agreed else "No image has labels by two labellers yet"] if agreement else [])
