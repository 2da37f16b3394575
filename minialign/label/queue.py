"""Which images each labeller is asked for next."""

from __future__ import annotations

import zlib
from collections.abc import Collection

import numpy as np

REMEMBERED = 32  # labellers whose order is kept in memory; another's is made anew when they come back
DONE = np.iinfo(np.int64).max


class Queue:
    """The next item of each labeller: the one with the least labelled of the images that they have not judged.

    group (N,): the item of each of N rows (images), 0 to M-1; counts (N,): the labels that each has. Among equals items
    come in an order of the labeller's own, so that people who work at once seldom judge the same. The next one is the
    least of N numbers, whatever the order that labels came in. An image with `enough` labels is asked for no more.
    """

    def __init__(self, group: np.ndarray, counts: np.ndarray, enough: int | None = None):
        self.group, self.counts, self.enough = group, counts, enough
        self.size = int(group.max()) + 1 if len(group) else 0
        self.order = np.argsort(group, kind="stable")
        self.starts = np.searchsorted(group[self.order], np.arange(self.size + 1))
        self.ranks: dict[str, np.ndarray] = {}
        self.keys: dict[str, np.ndarray] = {}

    def open(self, labeller: str, done: np.ndarray) -> None:
        """Begin with a labeller who has judged the rows `done`."""
        if len(self.keys) >= REMEMBERED:
            oldest = next(iter(self.keys))
            del self.keys[oldest], self.ranks[oldest]
        self.ranks[labeller] = np.random.default_rng(zlib.crc32(labeller.encode())).permutation(self.size)
        self.keys[labeller] = self.counts * self.size + self.ranks[labeller][self.group]
        self.keys[labeller][done] = DONE

    def add(self, labeller: str, row: int, change: int) -> None:
        """The labeller judged a row (change 1), took a verdict back (-1), or judged it elsewhere before (0)."""
        self.counts[row] += change
        for key in self.keys.values():
            if key[row] != DONE:
                key[row] += change * self.size
        again = self.counts[row] * self.size + self.ranks[labeller][self.group[row]]
        self.keys[labeller][row] = again if change < 0 else DONE

    def next(self, labeller: str, without: Collection[int]) -> int | None:
        """An item that is none of `without`; None where the labeller has judged all others, or they have enough."""
        key = self.keys[labeller]
        hidden = np.concatenate([self.rows(item) for item in without] or [np.empty(0, int)])
        kept, key[hidden] = key[hidden], DONE
        row = int(key.argmin()) if len(key) else 0
        open_ = len(key) > 0 and key[row] != DONE and (self.enough is None or self.counts[row] < self.enough)
        found = int(self.group[row]) if open_ else None
        key[hidden] = kept
        return found

    def rows(self, item: int) -> np.ndarray:
        return self.order[self.starts[item] : self.starts[item + 1]]

    def left(self, labeller: str) -> int:
        """How many rows the labeller has not judged and have not enough labels."""
        left = self.keys[labeller] != DONE
        return int(np.count_nonzero(left if self.enough is None else left & (self.counts < self.enough)))

    def done(self, labeller: str) -> int:
        """How many rows the labeller has judged."""
        return int(np.count_nonzero(self.keys[labeller] == DONE))
