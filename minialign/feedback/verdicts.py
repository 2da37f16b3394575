"""What the label page reads from a store and writes to it: labels of images, or comparisons with another run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .store import SIMULATED, FeedbackStore


class Verdicts:
    """The labels in a store or, with `other`, the comparisons of its images, or sets of them, with that folder's."""

    def __init__(self, store: FeedbackStore, other: str | None = None):
        self.store = store
        self.table = "labels" if other is None else "comparisons"
        self.mine = "labeller = ?" if other is None else "other = ? AND labeller = ?"
        # which verdicts an image is said to have: the simulated annotator's labels do not count
        self.counted = "labeller != ?" if other is None else "other = ?"
        self.other = () if other is None else (other,)

    def _columns(self, sql: str, given: Sequence[str] = ()) -> np.ndarray:
        """The result of a query for two columns of integers, (2,N)."""
        rows = self.store.query(sql, given)
        return np.fromiter((value for row in rows for value in row), np.int64).reshape(-1, 2).T

    def newest_image(self) -> int | None:
        return self.store.query("SELECT MAX(id) FROM images")[0][0]

    def images(self) -> np.ndarray:
        """The ids of all images in ascending order, and of the prompt of each, (2,N)."""
        return self._columns("SELECT id, prompt FROM images ORDER BY id")

    def counts(self) -> np.ndarray:
        """The ids of the images that have verdicts, and the number of these, (2,N)."""
        query = f"SELECT image, COUNT(*) FROM {self.table} WHERE {self.counted} GROUP BY image"
        return self._columns(query, self.other or (SIMULATED,))

    def images_of(self, labeller: str) -> np.ndarray:
        """The ids of the images that have a verdict of the labeller, (N,)."""
        return self._columns(f"SELECT image, 0 FROM {self.table} WHERE {self.mine}", (*self.other, labeller))[0]

    def last(self, labeller: str, before: str) -> int | None:
        """The id of the image that got the labeller's last verdict before a time."""
        query = f"SELECT image FROM {self.table} WHERE {self.mine} AND time < ? ORDER BY time DESC LIMIT 1"
        rows = self.store.query(query, (*self.other, labeller, before))
        return rows[0][0] if rows else None

    def of(self, labeller: str, images: Sequence[int]) -> dict[int, tuple[str, str]]:
        """Image id -> (verdict, time), of those images that have a verdict of the labeller."""
        marks = ", ".join("?" * len(images))
        query = f"SELECT image, verdict, time FROM {self.table} WHERE {self.mine} AND image IN ({marks})"
        rows = self.store.query(query, (*self.other, labeller, *images))
        return {image: (verdict, time) for image, verdict, time in rows}

    def remove(self, labeller: str, image: int) -> None:
        with self.store.transaction() as db:
            db.execute(f"DELETE FROM {self.table} WHERE {self.mine} AND image = ?", (*self.other, labeller, image))

    def times(self, labeller: str, number: int) -> list[float]:
        """The times in seconds of the labeller's latest verdicts, the last one first."""
        query = f"SELECT julianday(time) * 86400 FROM {self.table} WHERE {self.mine} ORDER BY time DESC LIMIT ?"
        rows = self.store.query(query, (*self.other, labeller, number))
        return [time for (time,) in rows if time is not None]

    def prompt(self, image: int) -> str:
        query = "SELECT text FROM images JOIN prompts ON prompts.id = prompt WHERE images.id = ?"
        return self.store.query(query, (image,))[0][0]

    def file(self, image: int) -> tuple[str, str | None] | None:
        """The path of an image as the store has it, and its SHA-256; None where there is no such image."""
        rows = self.store.query("SELECT CAST(path AS TEXT), sha256 FROM images WHERE id = ?", (image,))
        return rows[0] if rows else None
