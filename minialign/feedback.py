"""Stage 1 of the method: where images and what people (or a simulated annotator) said of them are kept.

One SQLite file a run: prompts, images (a path, a seed), labels (labeller, verdict). A label is on disk when
`add_labels` returns.
"""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .models.pretrained import InputError

VERDICTS = ("good", "bad", "skip")
WORDS = {"1": "good", "0": "bad", "true": "good", "false": "bad"} | {verdict: verdict for verdict in VERDICTS}
SCHEMA = """
CREATE TABLE IF NOT EXISTS prompts (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS images (
    id INTEGER PRIMARY KEY, prompt INTEGER NOT NULL REFERENCES prompts, path TEXT NOT NULL, seed INTEGER,
    UNIQUE (prompt, path)
);
CREATE TABLE IF NOT EXISTS labels (
    image INTEGER NOT NULL REFERENCES images, labeller TEXT NOT NULL, verdict TEXT NOT NULL, time TEXT NOT NULL,
    PRIMARY KEY (image, labeller)
);
"""
VERSION = 1


@dataclass(frozen=True)
class StoredImage:
    """An image of the store: its id, the prompt it was drawn for, its file, and the seed of its starting noise."""

    id: int
    prompt: str
    path: Path
    seed: int | None


class FeedbackStore:
    """The labels of one run. Image paths are kept relative to `folder`, the run; absolute ones stay absolute."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / "feedback.sqlite"
        self.database = sqlite3.connect(path)
        try:
            self.database.execute("PRAGMA journal_mode=WAL")
            self.database.execute("PRAGMA synchronous=FULL")
            version = self.database.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION):
                raise InputError(f"{path}: schema version {version}; supported: {VERSION}")
            self.database.executescript(SCHEMA)
            self.database.execute(f"PRAGMA user_version={VERSION}")
        except sqlite3.DatabaseError as error:
            raise InputError(f"{path}: cannot be used ({error})") from error

    def close(self) -> None:
        self.database.close()

    def add_images(self, rows: Iterable[tuple[str, str, int | None]]) -> None:
        """Add (prompt, path, seed) rows in one transaction; a pair that is known already is left as it is."""
        with self.database as db:
            for prompt, path, seed in rows:
                db.execute("INSERT OR IGNORE INTO prompts (text) VALUES (?)", (prompt,))
                db.execute(
                    "INSERT OR IGNORE INTO images (prompt, path, seed) SELECT id, ?, ? FROM prompts WHERE text = ?",
                    (path, seed, prompt),
                )

    def add_labels(self, labeller: str, verdicts: Iterable[tuple[int, str]]) -> None:
        """Add (image id, verdict) rows of one labeller; a second verdict on an image takes the first one's place."""
        with self.database as db:
            db.executemany(
                "INSERT OR REPLACE INTO labels VALUES (?, ?, ?, strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))",
                [(image, labeller, verdict) for image, verdict in verdicts],
            )

    def images(self) -> list[StoredImage]:
        """All images in the order they were added."""
        query = "SELECT images.id, text, path, seed FROM images JOIN prompts ON prompts.id = prompt ORDER BY images.id"
        return [StoredImage(i, text, self.folder / path, seed) for i, text, path, seed in self.database.execute(query)]

    def labels(self) -> dict[int, float]:
        """Image id -> 1 (good) or 0 (bad) by majority of its labellers; skips and ties are left out."""
        query = """SELECT image, SUM(verdict = 'good') - SUM(verdict = 'bad') AS vote FROM labels
                   GROUP BY image HAVING vote != 0 ORDER BY image"""
        return {image: float(vote > 0) for image, vote in self.database.execute(query)}


def read_feedback(path: Path) -> list[tuple[str, Path, str]]:
    """(prompt, image file, verdict) rows of a label file: CSV or JSON lines with columns prompt, image, label.

    Image paths are relative to the file's folder. Labels are good, bad or skip (or 1/0, true/false), in any case; the
    majority counts where the file judges a pair of prompt and image several times. InputError names the file, the line
    and what is accepted; every image is opened, and at least one must be good.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from error
    rows = []
    for number, row in _rows(path, text):
        missing = [key for key in ("prompt", "image", "label") if row.get(key) in (None, "")]
        if missing:
            raise InputError(f"{path}, line {number}: no {missing[0]!r}; columns needed: prompt, image, label")
        verdict = WORDS.get(str(row["label"]).strip().lower())
        if verdict is None:
            raise InputError(f"{path}, line {number}: label {row['label']!r}; accepted: {', '.join(WORDS)}")
        image = path.parent / str(row["image"])
        check_image(image, f"{path}, line {number}")
        rows.append((str(row["prompt"]), image.resolve(), verdict))
    if not any(vote > 0 for vote in count_votes(rows).values()):
        raise InputError(f"{path}: none of its {len(rows)} images is labelled good; at least one is needed")
    return rows


def count_votes(rows: Iterable[tuple[str, Path, str]]) -> Counter[tuple[str, Path]]:
    """For each pair of prompt and image the number of good verdicts less that of bad ones."""
    votes: Counter[tuple[str, Path]] = Counter()
    for prompt, image, verdict in rows:
        votes[prompt, image] += {"good": 1, "bad": -1, "skip": 0}[verdict]
    return votes


def check_image(path: Path, where: str) -> None:
    """InputError unless the file is an image that decodes whole."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{where}: image {path} cannot be read ({error})") from error


def _rows(path: Path, text: str) -> Iterable[tuple[int, dict[str, Any]]]:
    """(line number, columns) of a CSV or JSON lines file."""
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            yield from ((reader.line_num, row) for row in reader)
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"{path}, line {number}: not JSON ({error}); accepted: .csv, or a JSON object a line"
            ) from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: a JSON object is needed")
        yield number, row
