"""Which images are shown to each labeller next."""

from __future__ import annotations

import zlib
from collections.abc import Collection

import numpy as np

REMEMBERED = 32  # labellers whose order is kept in memory; that of others is computed again when they come back
DONE = np.iinfo(np.int64).max


class Queue:
    """The next item of each labeller: that of the image with the fewest verdicts among those without one of theirs.

    group (N,): the item of each of N rows (images), 0 to M-1; counts (N,): the number of verdicts on each. Items with
    equal counts come in a random order for each labeller, so that people who work at the same time seldom see the same.
    The next item is the minimum of N keys, in whatever order verdicts come. An image with `enough` verdicts is done.
    """

    def __init__(self, group: np.ndarray, counts: np.ndarray, enough: int | None = None):
        self.group, self.counts, self.enough = group, counts, enough
        self.size = int(group.max()) + 1 if len(group) else 0
        self.order = np.argsort(group, kind="stable")
        self.starts = np.searchsorted(group[self.order], np.arange(self.size + 1))
        self.ranks: dict[str, np.ndarray] = {}
        self.keys: dict[str, np.ndarray] = {}

    def open(self, labeller: str, done: np.ndarray) -> None:
        """Add a labeller, who has given a verdict on the rows `done`."""
        if len(self.keys) >= REMEMBERED:
            oldest = next(iter(self.keys))
            del self.keys[oldest], self.ranks[oldest]
        self.ranks[labeller] = np.random.default_rng(zlib.crc32(labeller.encode())).permutation(self.size)
        self.keys[labeller] = self.counts * self.size + self.ranks[labeller][self.group]
        self.keys[labeller][done] = DONE

    def add(self, labeller: str, row: int, change: int) -> None:
        """A row gets a verdict of the labeller (change 1), loses it (-1), or has one from elsewhere (0)."""
        self.counts[row] += change
        for key in self.keys.values():
            if key[row] != DONE:
                key[row] += change * self.size
        again = self.counts[row] * self.size + self.ranks[labeller][self.group[row]]
        self.keys[labeller][row] = again if change < 0 else DONE

    def next(self, labeller: str, without: Collection[int]) -> int | None:
        """The next item that is not in `without`; None where no other is left for the labeller."""
        key = self.keys[labeller]
        hidden = np.concatenate([self.rows(item) for item in without] or [np.empty(0, int)])
        kept, key[hidden] = key[hidden], DONE
        row = int(key.argmin()) if len(key) else 0
        open_ = len(key) > 0 and key[row] != DONE and (self.enough is None or self.counts[row] < self.enough)
        item = int(self.group[row]) if open_ else None
        key[hidden] = kept
        return item

    def rows(self, item: int) -> np.ndarray:
        return self.order[self.starts[item] : self.starts[item + 1]]

    def left(self, labeller: str) -> int:
        """The number of rows that still need a verdict of the labeller."""
        left = self.keys[labeller] != DONE
        return int(np.count_nonzero(left if self.enough is None else left & (self.counts < self.enough)))

    def done(self, labeller: str) -> int:
        """The number of rows that have a verdict of the labeller."""
        return int(np.count_nonzero(self.keys[labeller] == DONE))
