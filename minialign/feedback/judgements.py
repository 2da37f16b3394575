"""What the labelling page reads and changes of a store: one kind of verdict, of one labeller after the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .store import SIMULATED, FeedbackStore


class Judgements:
    """The labels of a store or, with `other`, the comparisons of its images with that folder's, or of sets of them."""

    def __init__(self, store: FeedbackStore, other: str | None = None):
        self.store = store
        self.table = "labels" if other is None else "comparisons"
        self.mine = "labeller = ?" if other is None else "other = ? AND labeller = ?"
        # how many judgements an image has: the simulated annotator's do not count
        self.counted = "labeller != ?" if other is None else "other = ?"
        self.other = () if other is None else (other,)

    def _columns(self, sql: str, given: Sequence[str] = ()) -> np.ndarray:
        """The two columns of whole numbers that a query finds, (2,N)."""
        rows = self.store.query(sql, given)
        return np.fromiter((value for row in rows for value in row), np.int64).reshape(-1, 2).T

    def newest_image(self) -> int | None:
        return self.store.query("SELECT MAX(id) FROM images")[0][0]

    def images(self) -> np.ndarray:
        """Image ids in ascending order and the prompt's id of each, (2,N)."""
        return self._columns("SELECT id, prompt FROM images ORDER BY id")

    def counts(self) -> np.ndarray:
        """The images that have judgements, and how many, (2,N)."""
        query = f"SELECT image, COUNT(*) FROM {self.table} WHERE {self.counted} GROUP BY image"
        return self._columns(query, self.other or (SIMULATED,))

    def judged(self, labeller: str) -> np.ndarray:
        """The images that a labeller has judged, (N,)."""
        return self._columns(f"SELECT image, 0 FROM {self.table} WHERE {self.mine}", (*self.other, labeller))[0]

    def last(self, labeller: str, before: str) -> int | None:
        """The image that a labeller judged last before a time."""
        query = f"SELECT image FROM {self.table} WHERE {self.mine} AND time < ? ORDER BY time DESC LIMIT 1"
        found = self.store.query(query, (*self.other, labeller, before))
        return found[0][0] if found else None

    def given(self, labeller: str, images: Sequence[int]) -> dict[int, tuple[str, str]]:
        """Image id -> (verdict, time) of those that the labeller has judged."""
        marks = ", ".join("?" * len(images))
        query = f"SELECT image, verdict, time FROM {self.table} WHERE {self.mine} AND image IN ({marks})"
        rows = self.store.query(query, (*self.other, labeller, *images))
        return {image: (verdict, time) for image, verdict, time in rows}

    def remove(self, labeller: str, image: int) -> None:
        with self.store.transaction() as db:
            given = (*self.other, labeller, image)
            db.execute(f"DELETE FROM {self.table} WHERE {self.mine} AND image = ?", given)

    def moments(self, labeller: str, number: int) -> list[float]:
        """The seconds at which a labeller gave the latest verdicts, the last one first."""
        query = f"SELECT julianday(time) * 86400 FROM {self.table} WHERE {self.mine} ORDER BY time DESC LIMIT ?"
        rows = self.store.query(query, (*self.other, labeller, number))
        return [moment for (moment,) in rows if moment is not None]

    def prompt(self, image: int) -> str:
        query = "SELECT text FROM images JOIN prompts ON prompts.id = prompt WHERE images.id = ?"
        return self.store.query(query, (image,))[0][0]

    def file(self, image: int) -> tuple[str, str | None] | None:
        """The path of an image as the store has it, and its SHA-256; None where there is no such image."""
        found = self.store.query("SELECT CAST(path AS TEXT), sha256 FROM images WHERE id = ?", (image,))
        return found[0] if found else None
