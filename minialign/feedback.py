"""Stage 1 of the method: where images and what people (or a simulated annotator) said of them are kept.

One SQLite file a run: prompts, images (a path, a seed, how it was drawn), labels (labeller, verdict, time), and blind
comparisons with another run's images; docs/formats.md tells the tables. What a method writes is on disk when it
returns. Label files go in and out, and `agreement` says how far labellers say the same.
"""

from __future__ import annotations

import csv
import gc
import io
import json
import os
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .models.pretrained import InputError
from .training import atomic, checksum

VERDICTS = ("good", "bad", "skip")
PREFERENCES = ("this", "other", "tie")  # of a comparison: the run's own image, the other one, neither
WORDS = {"1": "good", "0": "bad", "true": "good", "false": "bad"} | {verdict: verdict for verdict in VERDICTS}
LONGEST_NAME = 64  # characters of a labeller's name
NOW = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')"  # UTC to the millisecond; sorts as text
MIGRATIONS = (  # the statements of number i bring a store of schema version i to the next
    (
        "CREATE TABLE IF NOT EXISTS prompts (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE)",
        """CREATE TABLE IF NOT EXISTS images (
            id INTEGER PRIMARY KEY, prompt INTEGER NOT NULL REFERENCES prompts, path TEXT NOT NULL, seed INTEGER,
            UNIQUE (prompt, path)
        )""",
        """CREATE TABLE IF NOT EXISTS labels (
            image INTEGER NOT NULL REFERENCES images, labeller TEXT NOT NULL, verdict TEXT NOT NULL, time TEXT NOT NULL,
            PRIMARY KEY (image, labeller)
        )""",
    ),
    (
        "ALTER TABLE images ADD COLUMN settings TEXT",
        "ALTER TABLE images ADD COLUMN sha256 TEXT",
        "ALTER TABLE labels RENAME TO labels_1",
        # kept in the order of the images, so that millions are counted in one pass over the file
        """CREATE TABLE labels (
            image INTEGER NOT NULL REFERENCES images, labeller TEXT NOT NULL, verdict TEXT NOT NULL, time TEXT NOT NULL,
            PRIMARY KEY (image, labeller)
        ) WITHOUT ROWID""",
        "INSERT INTO labels SELECT image, labeller, verdict, time FROM labels_1 ORDER BY image, labeller",
        "DROP TABLE labels_1",
        "CREATE INDEX labels_by_time ON labels (labeller, time)",
        """CREATE TABLE comparisons (
            image INTEGER NOT NULL REFERENCES images, other TEXT NOT NULL, path TEXT NOT NULL, labeller TEXT NOT NULL,
            verdict TEXT NOT NULL, side TEXT NOT NULL, time TEXT NOT NULL, PRIMARY KEY (image, other, labeller)
        ) WITHOUT ROWID""",
        "CREATE INDEX comparisons_by_time ON comparisons (other, labeller, time)",
    ),
)
VERSION = len(MIGRATIONS)


class StoredImage(NamedTuple):
    """An image of the store: its id, the prompt it was drawn for, its file, and the seed of its starting noise."""

    id: int
    prompt: str
    file: str
    seed: int | None

    @property
    def path(self) -> Path:
        return Path(self.file)


class FeedbackStore:
    """The labels of one run. Image paths are kept relative to `folder`, the run; absolute ones stay absolute.

    A store of an older schema is brought to this one, whole or not at all. Other processes and connections may use the
    same file meanwhile; one connection is for one thread at a time.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / "feedback.sqlite"
        try:
            self.database = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
            self.database.execute("PRAGMA journal_mode=WAL")
            self.database.execute("PRAGMA synchronous=FULL")  # a commit is on the disk when it returns
            self.database.execute("PRAGMA foreign_keys=ON")
            if self._version() != VERSION:
                with self.transaction() as db:
                    version = self._version()  # again: another process may have been faster
                    if not 0 <= version <= VERSION:
                        raise InputError(f"{path}: schema version {version}; supported: up to {VERSION}")
                    for statement in (line for step in MIGRATIONS[version:] for line in step):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version={VERSION}")
        except sqlite3.DatabaseError as error:
            raise InputError(f"{path}: cannot be used ({error})") from error

    def _version(self) -> int:
        return self.database.execute("PRAGMA user_version").fetchone()[0]

    def close(self) -> None:
        self.database.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """What is written within is there whole, on disk, or not at all."""
        self.database.execute("BEGIN IMMEDIATE")
        try:
            yield self.database
            self.database.execute("COMMIT")
        except BaseException:
            if self.database.in_transaction:  # SQLite itself ends it when the disk is full
                self.database.execute("ROLLBACK")
            raise

    def add_images(
        self, rows: Iterable[tuple[str, str, int | None]], settings: Mapping[str, Any] | None = None
    ) -> None:
        """Add (prompt, path, seed) rows in one transaction; a pair that is known already is left as it is.

        `settings` says how they were drawn and is kept as JSON. The SHA-256 of a file is kept where it is there.
        """
        told = None if settings is None else json.dumps(settings, sort_keys=True)
        with self.transaction() as db:
            for prompt, path, seed in rows:
                db.execute("INSERT OR IGNORE INTO prompts (text) VALUES (?)", (prompt,))
                db.execute(
                    """INSERT OR IGNORE INTO images (prompt, path, seed, settings, sha256)
                       SELECT id, ?, ?, ?, ? FROM prompts WHERE text = ?""",
                    (path, seed, told, _sha256(self.folder / path), prompt),
                )

    def add_labels(self, labeller: str, verdicts: Iterable[tuple[int, str]]) -> None:
        """Add (image id, verdict) rows of one labeller; a second verdict on an image takes the first one's place.

        ValueError where a verdict is none of VERDICTS; sqlite3.IntegrityError where an image is not in the store.
        """
        with self.transaction() as db:
            db.executemany(
                f"INSERT OR REPLACE INTO labels VALUES (?, ?, ?, {NOW})",
                ((image, labeller, _one_of(VERDICTS, verdict)) for image, verdict in verdicts),
            )

    def add_comparison(self, labeller: str, image: int, other: Path, path: Path, verdict: str, side: str) -> None:
        """Which of two images of a prompt is better: the run's `image`, shown on `side`, or `path` of `other`."""
        with self.transaction() as db:
            db.execute(
                f"INSERT OR REPLACE INTO comparisons VALUES (?, ?, ?, ?, ?, ?, {NOW})",
                (
                    image,
                    str(other),
                    str(path),
                    labeller,
                    _one_of(PREFERENCES, verdict),
                    _one_of(("left", "right"), side),
                ),
            )

    def images(self) -> list[StoredImage]:
        """All images in the order they were added."""
        query = """SELECT images.id, text, CASE WHEN substr(path, 1, 1) = '/' THEN path ELSE ? || path END, seed
                   FROM images JOIN prompts ON prompts.id = prompt ORDER BY images.id"""
        rows = self.database.execute(query, (os.path.join(self.folder, ""),))
        collecting = gc.isenabled()
        gc.disable()  # a third of the time for a million, and there is nothing to collect
        try:
            return list(map(partial(tuple.__new__, StoredImage), rows))  # type: ignore[arg-type]  # _make, but faster
        finally:
            if collecting:
                gc.enable()

    def labels(self, soft: bool = False) -> dict[int, float]:
        """Image id -> 1 (good) or 0 (bad) by majority of its labellers; skips and ties are left out.

        soft: image id -> the mean of its labellers' 1 (good) and 0 (bad); skips are left out, ties are 0.5.
        """
        mean = "SELECT image, AVG(verdict = 'good') AS mean FROM labels WHERE verdict != 'skip' GROUP BY image"
        vote = f"SELECT image, CAST(mean > 0.5 AS REAL) FROM ({mean}) WHERE mean != 0.5"
        return dict(self.database.execute(f"{mean if soft else vote} ORDER BY image"))

    def labellers(self) -> list[str]:
        """All who labelled, in alphabetical order; one look-up each, however many labels there are."""
        query = """WITH RECURSIVE found (name) AS (
                       SELECT MIN(labeller) FROM labels
                       UNION ALL SELECT (SELECT MIN(labeller) FROM labels WHERE labeller > name) FROM found
                       WHERE name IS NOT NULL
                   ) SELECT name FROM found WHERE name IS NOT NULL"""
        return [name for (name,) in self.database.execute(query)]

    def agreement(self) -> Agreement | None:
        """How far labellers agree on the images that two or more of them judged; None where there are none."""
        several = "SELECT image FROM labels GROUP BY image HAVING COUNT(*) > 1"
        names = self.database.execute(f"SELECT COUNT(DISTINCT labeller) FROM labels WHERE image IN ({several})")
        labellers = names.fetchone()[0]
        if labellers == 2:
            pairs = self.database.execute(
                """SELECT a.verdict, b.verdict, COUNT(*) FROM labels AS a JOIN labels AS b
                   ON a.image = b.image AND a.labeller < b.labeller GROUP BY a.verdict, b.verdict"""
            )
            table = np.zeros((3, 3))
            for first, second, number in pairs:
                table[VERDICTS.index(first), VERDICTS.index(second)] = number
            return Agreement(int(table.sum()), 2, table.trace() / table.sum(), cohen_kappa(table))
        columns = ", ".join(f"SUM(verdict = '{verdict}')" for verdict in VERDICTS)
        rows = self.database.execute(f"SELECT {columns} FROM labels GROUP BY image HAVING COUNT(*) > 1").fetchall()
        if not rows:
            return None
        counts = np.array(rows, dtype=float)
        return Agreement(len(rows), labellers, float(_pairs_alike(counts).mean()), fleiss_kappa(counts))


@dataclass(frozen=True)
class Agreement:
    """Of `images` that two or more of `labellers` judged: the fraction of judgements that are alike, and kappa.

    Good, bad and skip are three verdicts. Of two labellers `alike` is the fraction of images and kappa Cohen's, of more
    the mean over images of the fraction of pairs of labellers, and Fleiss' kappa. kappa is 0 where they agree as often
    as chance has it, 1 where always, None where it has no value: where all say one thing only.
    """

    images: int
    labellers: int
    alike: float
    kappa: float | None

    def __str__(self) -> str:
        name = "Cohen's" if self.labellers == 2 else "Fleiss'"
        kappa = "undefined, for all verdicts are alike" if self.kappa is None else f"{self.kappa:.2f}"
        return f"{self.labellers} labellers agree on {self.alike:.0%} of {self.images:,} images ({name} kappa: {kappa})"


def cohen_kappa(table: np.ndarray) -> float | None:
    """(p_o - p_e) / (1 - p_e) of two labellers' verdicts (Cohen 1960); table (K,K)[i,j] counts items said i and j.

    p_o is the fraction said alike, p_e what independent labellers with the same habits would reach; None where it is 1.
    """
    share = table / table.sum()
    observed, expected = share.trace(), float(share.sum(0) @ share.sum(1))
    return None if np.isclose(expected, 1) else float((observed - expected) / (1 - expected))


def fleiss_kappa(counts: np.ndarray) -> float | None:
    """(P - P_e) / (1 - P_e) of many labellers' verdicts (Fleiss 1971); counts (N,K)[i,j]: labellers who said j of i.

    P is the mean over items of the fraction of pairs of labellers that agree, P_e = sum_j p_j^2. Items may have
    different numbers of labellers, two or more: p_j is then the mean of the items' fractions. None where P_e is 1.
    """
    expected = float(np.square((counts / counts.sum(1, keepdims=True)).mean(0)).sum())
    return None if np.isclose(expected, 1) else float((_pairs_alike(counts).mean() - expected) / (1 - expected))


def _pairs_alike(counts: np.ndarray) -> np.ndarray:
    """(N,) of counts (N,K): the fraction of an item's pairs of labellers that say the same."""
    n = counts.sum(1)
    return (counts * (counts - 1)).sum(1) / (n * (n - 1))


# ------------------------------------------------------------------------------------------------------ label files
COLUMNS = ("prompt", "image", "label", "labeller", "time", "seed", "sha256", "settings")  # the first three are needed
COMPARED = ("prompt", "image", "other", "verdict", "side", "labeller", "time", "seed")


class FileLabel(NamedTuple):
    """A line of a label file; what the file does not say is None."""

    prompt: str
    image: Path
    verdict: str
    labeller: str | None
    time: str | None
    seed: int | None


def read_feedback(path: Path) -> list[tuple[str, Path, str]]:
    """(prompt, image file, verdict) rows of a label file: CSV or JSON lines with columns prompt, image, label.

    Image paths are relative to the file's folder. Labels are good, bad or skip (or 1/0, true/false), in any case; the
    majority counts where the file judges a pair of prompt and image several times. InputError names the file, the line
    and what is accepted; every image is opened, and at least one must be good.
    """
    rows = [(row.prompt, row.image, row.verdict) for row in read_labels(path)]
    if not any(vote > 0 for vote in count_votes(rows).values()):
        raise InputError(f"{path}: none of its {len(rows)} images is labelled good; at least one is needed")
    return rows


def read_labels(path: Path) -> list[FileLabel]:
    """The lines of a label file, with the columns that are not needed too; errors as of `read_feedback`."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from error
    rows: list[FileLabel] = []
    opened: dict[Path, str | None] = {}
    for number, row in read_rows(path, text):
        where = f"{path}, line {number}"
        missing = [key for key in COLUMNS[:3] if row.get(key) in (None, "")]
        if missing:
            raise InputError(f"{where}: no {missing[0]!r}; columns needed: prompt, image, label")
        verdict = WORDS.get(str(row["label"]).strip().lower())
        if verdict is None:
            raise InputError(f"{where}: label {row['label']!r}; accepted: {', '.join(WORDS)}")
        image = path.parent / str(row["image"])
        if image not in opened:
            check_image(image, where)
            opened[image] = None if row.get("sha256") in (None, "") else _sha256(image)
        labeller, time, seed, sha256 = (row.get(key) for key in ("labeller", "time", "seed", "sha256"))
        name = None if labeller in (None, "") else clean_name(str(labeller))
        if name is None and labeller not in (None, ""):
            raise InputError(f"{where}: labeller {labeller!r}; accepted: a name of 1 to {LONGEST_NAME} characters")
        said = None if time in (None, "") else _time(str(time))
        if said is None and time not in (None, ""):
            raise InputError(f"{where}: time {time!r}; accepted: UTC such as 2026-01-31T12:30:00.000Z")
        if seed not in (None, "") and not re.fullmatch(r"-?\d{1,18}", str(seed)):
            raise InputError(f"{where}: seed {seed!r}; accepted: a whole number")
        if sha256 not in (None, "", opened[image] or _sha256(image)):
            raise InputError(f"{where}: image {image} is not the one that was labelled: its SHA-256 differs")
        drawn_from = None if seed in (None, "") else int(str(seed))
        rows.append(FileLabel(str(row["prompt"]), image.resolve(), verdict, name, said, drawn_from))
    return rows


def import_labels(store: FeedbackStore, path: Path) -> int:
    """Take a label file into the store, in one transaction; how many of its labels are new or newer than the store's.

    Images that are not in the store are added. Without a column labeller the file's name stands for it, with a number
    where the file judges a pair of prompt and image again; without a time it is now.
    """
    rows = read_labels(path)
    root = store.folder.resolve()
    known = {(image.prompt, os.path.realpath(image.file)): image.id for image in store.images()}
    new = {(row.prompt, row.image): row.seed for row in rows if (row.prompt, str(row.image)) not in known}
    store.add_images(
        (prompt, str(image.relative_to(root) if image.is_relative_to(root) else image), seed)
        for (prompt, image), seed in new.items()
    )
    known = {(image.prompt, os.path.realpath(image.file)): image.id for image in store.images()}
    times: Counter[tuple[str, Path, str | None]] = Counter()
    with store.transaction() as db:
        before = db.total_changes
        for prompt, image, verdict, labeller, time, _ in rows:
            times[prompt, image, labeller] += 1
            again = times[prompt, image, labeller]
            name = labeller or (path.stem if again == 1 else f"{path.stem}, {again}")[-LONGEST_NAME:]
            db.execute(
                f"""INSERT INTO labels VALUES (?, ?, ?, COALESCE(?, {NOW})) ON CONFLICT DO UPDATE
                    SET verdict = excluded.verdict, time = excluded.time WHERE excluded.time > time""",
                (known[prompt, str(image)], name, verdict, time),
            )
        return db.total_changes - before


def export_labels(store: FeedbackStore, path: Path) -> int:
    """Write all labels to a label file, CSV or JSON lines by its name; their number.

    Image paths are relative to the file's folder, so that `read_feedback` and `import_labels` read it where it is.
    """
    query = """SELECT text, path, verdict, labeller, time, seed, sha256, settings FROM labels
               JOIN images ON images.id = image JOIN prompts ON prompts.id = prompt ORDER BY image, labeller"""
    place = _Places(store.folder, path)
    return _write_rows(path, COLUMNS, ((row[0], place(row[1]), *row[2:]) for row in store.database.execute(query)))


def export_comparisons(store: FeedbackStore, path: Path) -> int:
    """Write all comparisons to a CSV or JSON lines file; their number. `verdict` is of PREFERENCES."""
    query = """SELECT text, images.path, comparisons.path, verdict, side, labeller, time, seed FROM comparisons
               JOIN images ON images.id = image JOIN prompts ON prompts.id = prompt ORDER BY image, other, labeller"""
    place = _Places(store.folder, path)
    rows = ((row[0], place(row[1]), place(row[2]), *row[3:]) for row in store.database.execute(query))
    return _write_rows(path, COMPARED, rows)


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


def clean_name(text: str) -> str | None:
    """A labeller's name with single spaces; None unless it has 1 to LONGEST_NAME characters, all printable."""
    name = " ".join(text.split())
    return name if 0 < len(name) <= LONGEST_NAME and name.isprintable() else None


def _one_of(accepted: Sequence[str], value: str) -> str:
    if value not in accepted:
        raise ValueError(f"{value!r}; accepted: {', '.join(accepted)}")
    return value


def _time(text: str) -> str | None:
    """A time as the store keeps it, to the millisecond, so that times sort as text; None unless it is one."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z", text)
    try:
        return found and f"{datetime.fromisoformat(found[1]).isoformat()}.{(found[2] or '') + '000':.3}Z"
    except ValueError:
        return None


def _sha256(path: Path) -> str | None:
    try:
        return checksum(path)
    except OSError:
        return None


class _Places:
    """Image paths of a store as a file in another folder names them."""

    def __init__(self, store: Path, file: Path):
        self.store, self.folder = os.path.abspath(store), os.path.dirname(os.path.abspath(file))

    def __call__(self, path: str) -> str:
        return os.path.relpath(os.path.join(self.store, path), self.folder)


def read_rows(path: Path, text: str) -> Iterable[tuple[int, dict[str, Any]]]:
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


def _write_rows(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> int:
    """Write a CSV or JSON lines file; the number of rows."""
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise InputError(f"{path}: cannot be written; accepted: a name that ends in .csv or .jsonl")
    number = 0
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file) if path.suffix.lower() == ".csv" else None
        if table:
            table.writerow(columns)
        for row in rows:
            if table:
                table.writerow(row)
            else:
                kept = {key: value for key, value in zip(columns, row) if value is not None}
                file.write(json.dumps(kept, ensure_ascii=False) + "\n")
            number += 1
    return number
