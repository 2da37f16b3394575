"""Stage 1 of the method: the store of a run's images and of the labels that annotators gave them.

One SQLite file per run holds the prompts, the images (path, seed, how each was sampled), the labels (who, verdict,
when) and comparisons of its images, with one another or, blind, with another run's; docs/formats.md describes the
tables. What a method writes is on the disk when it returns.
"""

from __future__ import annotations

import gc
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import InputError, checksum, first_line
from ..measures import Agreement, cohen_kappa, fleiss_kappa, pairs_alike

VERDICTS = ("good", "bad", "skip")
PREFERENCES = ("this", "other", "tie")  # of a comparison: the run's own image, the other one, neither
SIMULATED = "simulated annotator"  # the labeller that is a program: it does not count where a person judged
LONGEST_NAME = 64  # characters of a labeller's name
NOW = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')"  # UTC to the millisecond; sorts as text
# now, or just after a labeller's latest verdict where the clock was set back: the last verdict is the latest
NEXT = f"""SELECT MAX({NOW}, COALESCE(strftime('%Y-%m-%dT%H:%M:%fZ', MAX(time), '+0.001 seconds'), ''))
           FROM (SELECT MAX(time) AS time FROM"""
VERSION = 4  # of the schema, kept as PRAGMA user_version; a file of another version is refused
SCHEMA = (
    "CREATE TABLE prompts (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE)",
    """CREATE TABLE images (
        id INTEGER PRIMARY KEY, prompt INTEGER NOT NULL REFERENCES prompts, path TEXT NOT NULL, seed INTEGER,
        settings TEXT, sha256 TEXT, UNIQUE (prompt, path)
    )""",
    # kept in the order of the images, so that millions are counted in one pass over the file
    """CREATE TABLE labels (
        image INTEGER NOT NULL REFERENCES images, labeller TEXT NOT NULL, verdict TEXT NOT NULL, time TEXT NOT NULL,
        soft REAL, PRIMARY KEY (image, labeller)
    ) WITHOUT ROWID""",
    "CREATE INDEX labels_by_time ON labels (labeller, time)",
    """CREATE TABLE comparisons (
        image INTEGER NOT NULL REFERENCES images, other TEXT NOT NULL, path TEXT NOT NULL, labeller TEXT NOT NULL,
        verdict TEXT NOT NULL, side TEXT, time TEXT NOT NULL, PRIMARY KEY (image, other, labeller)
    ) WITHOUT ROWID""",
    "CREATE INDEX comparisons_by_time ON comparisons (other, labeller, time)",
)


MERGE_LABEL = """INSERT INTO labels (image, labeller, verdict, time, soft) VALUES (?, ?, ?, ?, ?)
    ON CONFLICT DO UPDATE SET verdict = excluded.verdict, time = excluded.time, soft = excluded.soft
    WHERE excluded.time > time
    OR excluded.time = time AND (excluded.verdict != verdict OR excluded.soft IS NOT soft)"""
MERGE_COMPARISON = """INSERT INTO comparisons (image, other, path, labeller, verdict, time)
    SELECT ?, path, path, ?, ?, ? FROM images WHERE id = ?
    ON CONFLICT DO UPDATE SET verdict = excluded.verdict, time = excluded.time
    WHERE excluded.time > time OR excluded.time = time AND excluded.verdict != verdict"""


class StoreError(InputError):
    """The store's file cannot be used; `reason` is "busy", "full", "read-only" or "damaged"."""

    def __init__(self, path: Path, error: Exception):
        text = first_line(error)
        if "locked" in text or "busy" in text:
            self.reason, message = "busy", "another program holds it; close it there and try again"
        elif "full" in text or "disk I/O" in text:
            self.reason, message = "full", "the disk is full or cannot be written; make room and try again"
        elif "readonly" in text or "unable to open" in text:
            self.reason, message = "read-only", "it or its folder cannot be opened for writing"
        else:
            self.reason, message = "damaged", "cannot be used as a feedback store"
        super().__init__(f"{path}: {message} ({text})")


class StoredImage(NamedTuple):
    """An image of the store: its id, the prompt it was sampled for, its file, and the seed of its starting noise."""

    id: int
    prompt: str
    file: str
    seed: int | None

    @property
    def path(self) -> Path:
        return Path(self.file)


class NewLabel(NamedTuple):
    """A label to merge into the store: `image` is a path relative to the run's folder, or absolute."""

    prompt: str
    image: str
    seed: int | None
    labeller: str
    verdict: str | None  # None: an image without a label
    time: str | None  # as the store keeps it; None is now
    soft: float | None = None  # in [0,1], of a score


class NewComparison(NamedTuple):
    """A comparison of two images of a prompt to merge into the store; paths and time as in `NewLabel`."""

    prompt: str
    image: str
    other: str
    labeller: str
    verdict: str  # one of PREFERENCES
    time: str | None


class Preferred(NamedTuple):
    """One judgement of two images of the store, by their ids: which is better, one of PREFERENCES."""

    image: int
    other: int
    verdict: str


class FeedbackStore:
    """The feedback of one run. Image paths are kept relative to `folder`, the run; absolute ones stay absolute.

    `read_only` reads a store that must exist, also where nothing can be written. Other processes and connections may
    use the same file meanwhile; one connection serves one thread at a time. Every method raises StoreError, one line,
    where the file is damaged, held by another program, or cannot be written. The file may come from a stranger: SQL
    that it brings (triggers, views, functions in the schema) never runs.
    """

    def __init__(self, folder: Path, read_only: bool = False):
        self.folder, self.path = folder, folder / "feedback.sqlite"
        with self._errors():
            self.database = self._connect("rw" if read_only else "rwc")
            if read_only:
                self.database.execute("PRAGMA query_only=ON")
            else:
                self.database.execute("PRAGMA journal_mode=WAL")
            self._check_schema(create=not read_only)

    def _connect(self, mode: str) -> sqlite3.Connection:
        """A connection to the file; where its folder cannot be written, to the file as it lies there."""
        location = self.path.absolute().as_uri()
        try:
            return self._prepared(f"{location}?mode={mode}")
        except sqlite3.OperationalError as error:
            journal = self.path.with_name(f"{self.path.name}-wal")
            if mode != "rw" or StoreError(self.path, error).reason != "read-only" or not self.path.is_file():
                raise
            if journal.is_file() and journal.stat().st_size:  # labels that only a writer can bring into the file
                raise InputError(
                    f"{self.path}: its latest labels are in {journal.name}; copy both to read them"
                ) from error
            return self._prepared(f"{location}?immutable=1")

    def _prepared(self, uri: str) -> sqlite3.Connection:
        database = sqlite3.connect(uri, uri=True, timeout=10, isolation_level=None, check_same_thread=False)
        database.execute("PRAGMA trusted_schema=OFF")
        database.execute("PRAGMA synchronous=FULL")  # a commit is on the disk when it returns
        database.execute("PRAGMA foreign_keys=ON")
        database.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()  # opens the file
        return database

    def _check_schema(self, create: bool) -> None:
        """InputError unless the file has this version's tables and indices and nothing else."""
        if create and not self._version():
            with self.transaction() as db:
                if not self._version() and not self._schema():  # again: another process may have been faster
                    for statement in SCHEMA:
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version={VERSION}")
        version, schema = self._version(), self._schema()
        if version != VERSION:
            raise InputError(f"{self.path}: schema version {version}; accepted: {VERSION}")
        strange = [name for name, sql in schema.items() if sql not in SCHEMA]
        if strange or len(schema) != len(SCHEMA):
            reason = f"holds {strange[0]!r}, which this version's stores do not have" if strange else "lacks a table"
            raise InputError(f"{self.path}: {reason}; refused")

    def _version(self) -> int:
        return self.database.execute("PRAGMA user_version").fetchone()[0]

    def _schema(self) -> dict[str, str]:
        rows = self.database.execute(
            "SELECT type || ' ' || name, sql FROM sqlite_master WHERE name NOT GLOB 'sqlite_*'"
        )
        return dict(rows)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):  # the caller's mistakes
            raise
        except sqlite3.Error as error:
            raise StoreError(self.path, error) from error

    def close(self) -> None:
        self.database.close()

    def query(self, sql: str, given: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        """All rows that a query finds."""
        with self._errors():
            return self.database.execute(sql, given).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """What is written within is there whole, on disk, or not at all."""
        with self._errors():
            self.database.execute("BEGIN IMMEDIATE")
            try:
                yield self.database
                self.database.execute("COMMIT")
            except BaseException:
                if self.database.in_transaction:  # SQLite itself ends it when the disk is full
                    with suppress(sqlite3.Error):
                        self.database.execute("ROLLBACK")
                raise

    # ------------------------------------------------------------------------------------------------------- writing
    def add_images(
        self, rows: Iterable[tuple[str, str, int | None]], settings: Mapping[str, Any] | None = None
    ) -> None:
        """Add (prompt, path, seed) rows in one transaction; a pair that is known already is left as it is.

        `settings` says how they were sampled and is kept as JSON. The SHA-256 of a file is kept where it is there.
        """
        with self.transaction() as db:
            self._insert_images(db, rows, None if settings is None else json.dumps(settings, sort_keys=True))

    def _insert_images(
        self, db: sqlite3.Connection, rows: Iterable[tuple[str, str, int | None]], settings: str | None
    ) -> None:
        for prompt, path, seed in rows:
            db.execute("INSERT OR IGNORE INTO prompts (text) VALUES (?)", (prompt,))
            db.execute(
                """INSERT OR IGNORE INTO images (prompt, path, seed, settings, sha256)
                   SELECT id, ?, ?, ?, ? FROM prompts WHERE text = ?""",
                (path, seed, settings, digest(self.folder / path), prompt),
            )

    def add_labels(self, labeller: str, verdicts: Iterable[tuple[int, str]]) -> None:
        """Add (image id, verdict) rows of one labeller; a second verdict on an image replaces the first.

        ValueError where a verdict is none of VERDICTS; sqlite3.IntegrityError where an image is not in the store.
        """
        with self.transaction() as db:
            (time,) = db.execute(f"{NEXT} labels WHERE labeller = ?)", (labeller,)).fetchone()
            db.executemany(
                "INSERT OR REPLACE INTO labels VALUES (?, ?, ?, ?, NULL)",
                ((image, labeller, _one_of(VERDICTS, verdict), time) for image, verdict in verdicts),
            )

    def merge(self, labels: Sequence[NewLabel], comparisons: Sequence[NewComparison] = ()) -> tuple[int, int]:
        """Add labels, comparisons, and the images that are new, in one transaction.

        Returned is how many labels and how many comparisons are new or newer than the store's. Of two judgements of one
        labeller on the same images the later one stays; at the same time, the one that comes later here.
        """
        named = [(one.prompt, one.image, one.seed) for one in labels]
        named += [(one.prompt, path, None) for one in comparisons for path in (one.image, one.other)]
        places = {path: os.path.realpath(self.folder / path) for _, path, _ in named}
        known = self._places()
        new: dict[tuple[str, str], tuple[str, str, int | None]] = {}
        for prompt, path, seed in named:
            if (prompt, places[path]) not in known:
                new.setdefault((prompt, places[path]), (prompt, path, seed))
        with self.transaction() as db:
            self._insert_images(db, new.values(), None)
            known = self._places()
            (now,) = db.execute(f"SELECT {NOW}").fetchone()
            before = db.total_changes
            for label in labels:
                if label.verdict is not None:
                    image = known[label.prompt, places[label.image]]
                    verdict = _one_of(VERDICTS, label.verdict)
                    db.execute(MERGE_LABEL, (image, label.labeller, verdict, label.time or now, label.soft))
            between = db.total_changes
            for one in comparisons:
                first, second = (known[one.prompt, places[path]] for path in (one.image, one.other))
                verdict = _one_of(PREFERENCES, one.verdict)
                if first > second:  # each pair in one order, so that a labeller has one judgement of it
                    first, second = second, first
                    verdict = {"this": "other", "other": "this"}.get(verdict, verdict)
                db.execute(MERGE_COMPARISON, (first, one.labeller, verdict, one.time or now, second))
            return between - before, db.total_changes - between

    def _places(self) -> dict[tuple[str, str], int]:
        """The ids of the images by their prompt and by where their file really is."""
        return {(image.prompt, os.path.realpath(image.file)): image.id for image in self.images()}

    def add_comparison(self, labeller: str, image: int, other: Path | str, path: Path, verdict: str, side: str) -> None:
        """Which of two images of a prompt is better: the run's `image`, shown on `side`, or `path` of `other`.

        Of two sets of images each is known by its first one; `other` then ends in // and their size.
        """
        choices = _one_of(PREFERENCES, verdict), _one_of(("left", "right"), side)
        with self.transaction() as db:
            where = "comparisons WHERE other = ? AND labeller = ?)"
            (time,) = db.execute(f"{NEXT} {where}", (str(other), labeller)).fetchone()
            db.execute(
                "INSERT OR REPLACE INTO comparisons VALUES (?, ?, ?, ?, ?, ?, ?)",
                (image, str(other), str(path), labeller, *choices, time),
            )

    def remove_labels(self, imported: bool = False) -> None:
        """Remove all labels; if they were imported, the comparisons and the images that came with them too.

        An image that a model here sampled stays.
        """
        with self.transaction() as db:
            db.execute("DELETE FROM labels")
            if imported:
                db.execute("DELETE FROM comparisons")
                db.execute("DELETE FROM images WHERE settings IS NULL")

    # ------------------------------------------------------------------------------------------------------- reading
    def sampled(self) -> list[Path]:
        """The files that `add_images` recorded with the settings they were sampled with."""
        rows = self.query("SELECT CAST(path AS TEXT) FROM images WHERE settings IS NOT NULL ORDER BY id")
        return [self.folder / path for (path,) in rows]

    def content(self) -> list[tuple[Any, ...]]:
        """(prompt, SHA-256 or else path) of every image, in the order they were added."""
        return self.query(
            """SELECT text, COALESCE(sha256, CAST(path AS TEXT)) FROM images JOIN prompts ON prompts.id = prompt
               ORDER BY images.id"""
        )

    def images(self) -> list[StoredImage]:
        """All images in the order they were added."""
        query = """SELECT images.id, text, CASE WHEN substr(path, 1, 1) = '/' THEN path ELSE ? || path END, seed
                   FROM images JOIN prompts ON prompts.id = prompt ORDER BY images.id"""
        collecting = gc.isenabled()
        gc.disable()  # a third of the time for a million, and there is nothing to collect
        try:
            rows = self.query(query, (os.path.join(self.folder, ""),))
            return list(map(partial(tuple.__new__, StoredImage), rows))  # type: ignore[arg-type]  # _make, but faster
        finally:
            if collecting:
                gc.enable()

    def check_images(self) -> None:
        """InputError names an image whose file is gone, or is not the one that was added: its SHA-256 differs."""
        digests = dict(self.query("SELECT id, sha256 FROM images"))
        wrong = []
        for image in self.images():
            if not image.path.is_file():
                wrong.append((image.file, "is gone"))
            elif digests[image.id] is not None and digest(image.path) != digests[image.id]:
                wrong.append((image.file, "is not the image that was added: its SHA-256 differs"))
        if wrong:
            file, reason = wrong[0]
            more = "" if len(wrong) == 1 else f" ({len(wrong) - 1:,} more are gone or changed)"
            raise InputError(f"{self.folder}: {file} {reason}{more}")

    def labels(self, soft: bool = False) -> dict[int, float]:
        """Image id -> 1 (good) or 0 (bad) by majority of its labellers; skips and ties are left out.

        Where a person judged, a skip included, the simulated annotator does not count. soft: image id -> the mean of
        its labellers' soft labels, or where a labeller gave none, of 1 (good) and 0 (bad); skips are left out.
        """
        people = "SELECT 1 FROM labels AS other WHERE other.image = labels.image AND other.labeller != :program"
        value = "COALESCE(soft, verdict = 'good')" if soft else "verdict = 'good'"
        labelled = "(verdict IN ('good', 'bad') OR soft IS NOT NULL)" if soft else "verdict IN ('good', 'bad')"
        mean = f"""SELECT image, AVG({value}) AS mean FROM labels WHERE {labelled}
                   AND (labeller != :program OR NOT EXISTS ({people})) GROUP BY image"""
        vote = f"SELECT image, CAST(mean > 0.5 AS REAL) FROM ({mean}) WHERE mean != 0.5"
        return dict(self.query(f"{mean if soft else vote} ORDER BY image", {"program": SIMULATED}))

    def preferred(self) -> list[Preferred]:
        """Every comparison of two images of this store, of one prompt; those with another run's images are not here."""
        rows = self.query(
            """SELECT image, second.id, verdict FROM comparisons JOIN images AS first ON first.id = image
               JOIN images AS second ON second.prompt = first.prompt AND second.path = comparisons.other
               WHERE verdict IN ('this', 'other', 'tie') ORDER BY image, second.id, labeller"""
        )
        return [Preferred(*row) for row in rows]

    def labellers(self) -> list[str]:
        """All who labelled, in alphabetical order; one look-up each, however many labels there are."""
        query = """WITH RECURSIVE names (name) AS (
                       SELECT MIN(labeller) FROM labels
                       UNION ALL SELECT (SELECT MIN(labeller) FROM labels WHERE labeller > name) FROM names
                       WHERE name IS NOT NULL
                   ) SELECT name FROM names WHERE name IS NOT NULL"""
        return [name for (name,) in self.query(query)]

    def label_rows(self) -> list[tuple[Any, ...]]:
        """(prompt, path, verdict, labeller, time, seed, SHA-256, settings, soft label) of every label."""
        return self.query(
            """SELECT text, CAST(path AS TEXT), verdict, labeller, time, seed, sha256, settings, soft FROM labels
               JOIN images ON images.id = image JOIN prompts ON prompts.id = prompt ORDER BY image, labeller"""
        )

    def comparison_rows(self) -> list[tuple[Any, ...]]:
        """(prompt, path, other path, verdict, side, labeller, time, seed, other) of every comparison."""
        return self.query(
            """SELECT text, CAST(images.path AS TEXT), CAST(comparisons.path AS TEXT), verdict, side, labeller, time,
                      seed, other
               FROM comparisons JOIN images ON images.id = image JOIN prompts ON prompts.id = prompt
               ORDER BY image, other, labeller"""
        )

    def agreement(self) -> Agreement | None:
        """How far labellers agree on the images that two or more of them judged; None where there are none."""
        several = "SELECT image FROM labels GROUP BY image HAVING COUNT(*) > 1"
        ((labellers,),) = self.query(f"SELECT COUNT(DISTINCT labeller) FROM labels WHERE image IN ({several})")
        if labellers == 2:
            pairs = self.query(
                """SELECT a.verdict, b.verdict, COUNT(*) FROM labels AS a JOIN labels AS b
                   ON a.image = b.image AND a.labeller < b.labeller GROUP BY a.verdict, b.verdict"""
            )
            table = np.zeros((3, 3))
            for first, second, number in pairs:
                if not {first, second} <= set(VERDICTS):
                    raise InputError(f"{self.path}: holds a verdict that is none of {', '.join(VERDICTS)}; refused")
                table[VERDICTS.index(first), VERDICTS.index(second)] = number
            return Agreement(int(table.sum()), 2, table.trace() / table.sum(), cohen_kappa(table))
        columns = ", ".join(f"SUM(verdict = '{verdict}')" for verdict in VERDICTS)
        rows = self.query(f"SELECT {columns} FROM labels GROUP BY image HAVING COUNT(*) > 1")
        if not rows:
            return None
        counts = np.array(rows, dtype=float)
        return Agreement(len(rows), labellers, float(pairs_alike(counts).mean()), fleiss_kappa(counts))


def clean_name(text: str) -> str | None:
    """A labeller's name with single spaces; None unless it has 1 to LONGEST_NAME characters, all printable."""
    name = " ".join(text.split())
    return name if 0 < len(name) <= LONGEST_NAME and name.isprintable() else None


def _one_of(accepted: Sequence[str], value: str) -> str:
    if value not in accepted:
        raise ValueError(f"{value!r}; accepted: {', '.join(accepted)}")
    return value


def digest(path: Path) -> str | None:
    """SHA-256 of a file in hexadecimal; None where it is no file that can be read."""
    try:
        return checksum(path) if path.is_file() else None  # a pipe would never end
    except (OSError, ValueError):
        return None
