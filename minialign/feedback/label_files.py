"""Stage 1 of the method: reading of label files and prompt files, and writing of label files.

CSV, tab-separated, JSON and JSON lines; docs/formats.md describes the columns, rows.py reads what a row says. Reading
is strict: what cannot be read as it was meant is refused with its file and line, because a row that is cut or swallowed
teaches something else in silence.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ..files import InputError
from .rows import USUAL, WORDS, Preference, Reading, as_number, as_text, judgements, named
from .store import LONGEST_NAME, FeedbackStore, NewComparison, NewLabel, clean_name, digest
from .tables import LINES, TABLES, columns_needed, lines_of, read_rows, read_text, write_rows

COLUMNS = ("prompt", "image", "label", "labeller", "time", "seed", "sha256", "settings", "soft")  # three are needed
COMPARED = ("prompt", "image", "other", "verdict", "side", "labeller", "time", "seed", "images")
LONGEST_SHAPE = 32  # an image's longer side by its shorter one: CLIP scales the shorter one to 224 pixels
# how a row of a label file ends that a quote swallowed
ROW_END = re.compile(rf"[,;\t]({'|'.join(WORDS)}|-?\d(\.\d+)?)$", re.I)


class FileLabel(NamedTuple):
    """What a row of a label file says of an image; what the file does not say is None."""

    prompt: str
    image: Path
    verdict: str | None
    labeller: str | None
    time: str | None
    seed: int | None
    soft: float | None = None


class FileComparison(NamedTuple):
    """What a row says of two images of a prompt: which is better, one of PREFERENCES."""

    prompt: str
    image: Path
    other: Path
    verdict: str
    labeller: str | None
    time: str | None


# -------------------------------------------------------------------------------------------------------- label files
@dataclass(frozen=True)
class LabelFile:
    """A label file, how it is read, and what it says, which is read once; with `unlabelled` images without a label."""

    path: Path
    reading: Reading = USUAL
    unlabelled: bool = False

    @cached_property
    def judgements(self) -> tuple[list[FileLabel], list[FileComparison]]:
        return read_judgements(self.path, self.reading, self.unlabelled)


def read_judgements(
    path: Path, reading: Reading = USUAL, unlabelled: bool = False
) -> tuple[list[FileLabel], list[FileComparison]]:
    """The labels and the comparisons of a file of any of the shapes of rows.py.

    Image paths are relative to the file's folder. InputError names the file, the line and what is accepted; every image
    is opened. Where one labeller labels an image, or two images, several times, the latest verdict is kept: by time,
    where a line without a time is as late as the reading; of the same time, the later line's. unlabelled: images
    without a label are read too, with None for the verdict.
    """
    latest: dict[Any, FileLabel | FileComparison] = {}
    opened: dict[Path, str | None] = {}
    for where, row in read_rows(path, ()):
        for judgement in _read_judgements(path, where, named(row, where, reading), reading, unlabelled, opened):
            one = isinstance(judgement, FileLabel)
            of = judgement.image if isinstance(judgement, FileLabel) else frozenset((judgement.image, judgement.other))
            key = (one, judgement.prompt, of, judgement.labeller) if judgement.labeller else len(latest)
            if key in latest and (latest[key].time or "9") > (judgement.time or "9"):
                continue
            latest[key] = judgement
    if not latest:
        raise InputError(f"{path}: no row of it judges an image; accepted: labels, pairs or rankings of images")
    labels = [judgement for judgement in latest.values() if isinstance(judgement, FileLabel)]
    return labels, [judgement for judgement in latest.values() if isinstance(judgement, FileComparison)]


def _read_judgements(
    path: Path, where: str, row: dict[str, Any], reading: Reading, unlabelled: bool, opened: dict[Path, str | None]
) -> Iterator[FileLabel | FileComparison]:
    """One row; `opened` keeps the SHA-256 of the images that were checked."""
    for judgement in list(judgements(row, where, reading, unlabelled)):
        prompt = as_text(row, "prompt", where)
        if any(ROW_END.search(line) for line in prompt.splitlines()[:-1]):
            raise InputError(
                f"{where}: a quote that opens here swallows the rows that follow; accepted: quotes in pairs"
            )
        labeller, time, seed = _besides(row, where)
        if isinstance(judgement, Preference):
            image, other = (
                _image(path.parent, file, None, where, opened) for file in (judgement.image, judgement.other)
            )
            if image == other:
                raise InputError(f"{where}: image {image} is compared with itself; accepted: two images")
            yield FileComparison(prompt, image, other, judgement.verdict, labeller, time)
        else:
            image = _image(path.parent, judgement.image, row.get("sha256"), where, opened)
            soft = judgement.soft if judgement.soft is not None else _soft(row, where)
            yield FileLabel(prompt, image, judgement.verdict, labeller, time, seed, soft)


def _besides(row: dict[str, Any], where: str) -> tuple[str | None, str | None, int | None]:
    """Labeller, time and seed of a row, None where it does not say."""
    labeller, time, seed = (row.get(key) for key in ("labeller", "time", "seed"))
    name = None if labeller in (None, "") else clean_name(str(labeller))
    if name is None and labeller not in (None, ""):
        raise InputError(f"{where}: labeller {labeller!r}; accepted: a name of 1 to {LONGEST_NAME} characters")
    said = None if time in (None, "") else _time(str(time))
    if said is None and time not in (None, ""):
        raise InputError(f"{where}: time {time!r}; accepted: UTC such as 2026-01-31T12:30:00.000Z")
    if seed not in (None, "") and not re.fullmatch(r"-?\d{1,18}", str(seed)):
        raise InputError(f"{where}: seed {str(seed)[:40]!r}; accepted: a whole number")
    return name, said, None if seed in (None, "") else int(str(seed))


def _soft(row: dict[str, Any], where: str) -> float | None:
    """The soft label of an export, which lies in [0,1]."""
    if row.get("soft") in (None, ""):
        return None
    soft = as_number(row["soft"])
    if soft is None or not 0 <= soft <= 1:
        raise InputError(f"{where}: soft {row['soft']!r}; accepted: a number from 0 to 1")
    return soft


def _image(folder: Path, named: str, sha256: Any, where: str, opened: dict[Path, str | None]) -> Path:
    """The file of an image that a label file in `folder` names, once it has been checked."""
    if re.match(r"(https?|s3|gs|hf|data):", named):
        raise InputError(f"{where}: image {named[:80]!r} is an address; accepted: a file on this machine")
    image = folder / named
    if image not in opened:
        check_image(image, where)
        opened[image] = None
    if sha256 not in (None, ""):
        opened[image] = opened[image] or digest(image)
        if sha256 != opened[image]:
            raise InputError(f"{where}: image {image} is not the one that was labelled: its SHA-256 differs")
    return image.resolve()


def import_into_run(folder: Path, path: Path, reading: Reading = USUAL) -> tuple[int, int]:
    """Take the labels and comparisons of a file into a run; how many of each are new or newer than the store's."""
    return merge_into_run(folder, *new_judgements(folder, LabelFile(path, reading)))


def merge_into_run(
    folder: Path, labels: Sequence[NewLabel], comparisons: Sequence[NewComparison] = ()
) -> tuple[int, int]:
    """`FeedbackStore.merge` into a run, which is made where there is none; nothing is left where this fails."""
    there = folder.exists()
    begun = (folder / "feedback.sqlite").exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        store = FeedbackStore(folder)
        try:
            return store.merge(labels, comparisons)
        finally:
            store.close()
    except BaseException as error:
        if not begun:
            for file in folder.glob("feedback.sqlite*"):
                file.unlink()
            if not there and folder.is_dir():
                folder.rmdir()
        if isinstance(error, OSError):
            raise InputError(f"{folder}: cannot be used as a run ({error.strerror})") from error
        raise


def new_judgements(folder: Path, file: LabelFile) -> tuple[list[NewLabel], list[NewComparison]]:
    """The labels and comparisons of a file as the store of the run `folder` takes them.

    A label without a labeller is by the file's name, with a number where the file labels a pair of prompt and image
    again; without a time it is now.
    """
    root = folder.resolve()
    unnamed = clean_name(file.path.stem[: LONGEST_NAME - 8]) or "a file"
    times: Counter[Any] = Counter()

    def place(image: Path) -> str:
        return str(image.relative_to(root) if image.is_relative_to(root) else image)

    def name(labeller: str | None, *of: Any) -> str:
        times[of] += labeller is None
        return labeller or (unnamed if times[of] == 1 else f"{unnamed}, {times[of]}")

    labels, compared = file.judgements
    rows = [
        NewLabel(one.prompt, place(one.image), one.seed, name(one.labeller, one.prompt, one.image),
                 one.verdict, one.time, one.soft)
        for one in labels
    ]  # fmt: skip
    pairs = [
        NewComparison(one.prompt, place(one.image), place(one.other),
                      name(one.labeller, one.prompt, frozenset((one.image, one.other))), one.verdict, one.time)
        for one in compared
    ]  # fmt: skip
    return rows, pairs


def export_labels(store: FeedbackStore, path: Path) -> int:
    """Write all labels to a label file, its kind by its name; their number.

    Image paths are relative to the file's folder, so that `read_judgements` reads it where it is.
    """
    place = _Places(store.folder, path)
    return write_rows(path, COLUMNS, ((row[0], place(row[1]), *row[2:]) for row in store.label_rows()))


def export_comparisons(store: FeedbackStore, path: Path) -> int:
    """Write all comparisons to a file, its kind by its name; their number. `verdict` is of PREFERENCES.

    `images` is the size of the sets that were compared, 1 for single images; the first image stands for a set.
    """
    place = _Places(store.folder, path)
    rows = (
        (row[0], place(row[1]), place(row[2]), *row[3:-1], int(row[-1].partition("//")[2] or 1))
        for row in store.comparison_rows()
    )
    return write_rows(path, COMPARED, rows)


def check_image(path: Path, where: str) -> None:
    """InputError unless the file is an image that the stages can read, and not a mere line."""
    from ..data import Unusable, open_image  # not needed by the store alone

    try:
        if not path.is_file():  # a pipe would never end
            what = "is no file" if path.exists() else "does not exist"
            raise InputError(f"{where}: image {path} {what}")
        image = open_image(path)
    except Unusable as error:
        raise InputError(f"{where}: {error}") from error
    except OSError as error:
        raise InputError(f"{where}: image {path} cannot be read ({error.strerror})") from error
    if max(image.size) > LONGEST_SHAPE * min(image.size):
        size = " x ".join(map(str, image.size))
        raise InputError(f"{where}: image {path} has {size} pixels; accepted: sides up to 1 : {LONGEST_SHAPE}")


class _Places:
    """Image paths of a store as a file in another folder names them."""

    def __init__(self, store: Path, file: Path):
        self.store, self.folder = os.path.abspath(store), os.path.dirname(os.path.abspath(file))

    def __call__(self, path: str) -> str:
        return os.path.relpath(os.path.join(self.store, path), self.folder)


# ------------------------------------------------------------------------------------------------------- prompt files
def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, each once: one per line, or the column `prompt` of a table or of JSON lines.

    InputError names the file, the line and what is accepted.
    """
    if path.suffix.lower() in TABLES + LINES:
        texts = []
        for where, row in read_rows(path, ("prompt",)):
            if not str(row.get("prompt") or "").strip():
                raise InputError(f"{where}: no 'prompt'; {columns_needed(('prompt',), row)}")
            texts.append(as_text(row, "prompt", where))
    else:
        texts = lines_of(read_text(path))
    prompts = list(dict.fromkeys(prompt.strip() for prompt in texts if prompt.strip()))
    if not prompts:
        raise InputError(f"{path}: no prompts; accepted: one per line, or .csv, .tsv or .jsonl with a column prompt")
    return prompts


def _time(text: str) -> str | None:
    """A time as the store keeps it, to the millisecond, so that times sort as text; None unless it is one."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z", text)
    try:
        return match and f"{datetime.fromisoformat(match[1]).isoformat()}.{(match[2] or '') + '000':.3}Z"
    except ValueError:
        return None
