"""Stage 1 of the method: reading of label files and prompt files, and writing of label files.

CSV, tab-separated and JSON lines; docs/formats.md describes the columns. Reading is strict: what cannot be read as it
was meant is refused with its file and line, because a row that is cut or swallowed teaches something else in silence.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..files import InputError, atomic, read_bytes
from .store import LONGEST_NAME, VERDICTS, FeedbackStore, NewLabel, clean_name, digest

WORDS = {"1": "good", "0": "bad", "true": "good", "false": "bad"} | {verdict: verdict for verdict in VERDICTS}
COLUMNS = ("prompt", "image", "label", "labeller", "time", "seed", "sha256", "settings")  # the first three are needed
COMPARED = ("prompt", "image", "other", "verdict", "side", "labeller", "time", "seed", "images")
TABLES = (".csv", ".tsv")
LINES = (".jsonl", ".ndjson", ".json")
SEPARATORS = ",;\t"
LONGEST_SHAPE = 32  # an image's longer side by its shorter one: CLIP scales the shorter one to 224 pixels
ROW_END = re.compile(rf"[,;\t]({'|'.join(WORDS)})$", re.I)  # how a row of a label file ends that a quote swallowed
FORMULA = re.compile(r"'*[=+\-@\t\r]")  # how a cell begins that a spreadsheet would run


class FileLabel(NamedTuple):
    """A line of a label file; what the file does not say is None."""

    prompt: str
    image: Path
    verdict: str
    labeller: str | None
    time: str | None
    seed: int | None


# -------------------------------------------------------------------------------------------------------- label files
def read_feedback(path: Path) -> list[tuple[str, Path, str]]:
    """(prompt, image file, verdict) rows of a label file: a table or JSON lines with columns prompt, image, label.

    Image paths are relative to the file's folder. Labels are good, bad or skip (or 1/0, true/false), in any case; the
    majority counts where the file judges a pair of prompt and image several times. InputError names the file, the line
    and what is accepted; every image is opened, and at least one must be good.
    """
    rows = [(row.prompt, row.image, row.verdict) for row in read_labels(path)]
    if not any(vote > 0 for vote in count_votes(rows).values()):
        raise InputError(f"{path}: none of its {len(rows)} images is labelled good; at least one is needed")
    return rows


def read_labels(path: Path) -> list[FileLabel]:
    """The labels of a file, with the columns that are not needed too; errors as of `read_feedback`.

    Where one labeller judges an image several times, the latest verdict is kept: by time, where a line without a time
    is as late as the reading; of the same time, the later line's.
    """
    latest: dict[Any, FileLabel] = {}
    opened: dict[Path, str | None] = {}
    for where, row in read_rows(path, COLUMNS[:3]):
        label = _read_label(path, where, row, opened)
        key = (label.prompt, label.image, label.labeller) if label.labeller else len(latest)
        if key in latest and (latest[key].time or "9") > (label.time or "9"):
            continue
        latest[key] = label
    if not latest:
        raise InputError(f"{path}: has no labels; {_columns_needed(COLUMNS[:3], ())}")
    return list(latest.values())


def _read_label(path: Path, where: str, row: dict[str, Any], opened: dict[Path, str | None]) -> FileLabel:
    """One row; `opened` keeps the SHA-256 of the images that were checked."""
    for key in COLUMNS[:3]:
        if row.get(key) in (None, ""):
            raise InputError(f"{where}: no {key!r}; {_columns_needed(COLUMNS[:3], row)}")
    verdict = WORDS.get(str(row["label"]).strip().lower())
    if verdict is None:
        raise InputError(f"{where}: label {row['label']!r}; accepted: {', '.join(WORDS)}")
    prompt, file = (_text(row, key, where) for key in ("prompt", "image"))
    if any(ROW_END.search(line) for line in prompt.splitlines()[:-1]):
        raise InputError(f"{where}: a quote that opens here swallows the rows that follow; accepted: quotes in pairs")
    image = path.parent / file
    labeller, time, seed, sha256 = (row.get(key) for key in ("labeller", "time", "seed", "sha256"))
    name = None if labeller in (None, "") else clean_name(str(labeller))
    if name is None and labeller not in (None, ""):
        raise InputError(f"{where}: labeller {labeller!r}; accepted: a name of 1 to {LONGEST_NAME} characters")
    said = None if time in (None, "") else _time(str(time))
    if said is None and time not in (None, ""):
        raise InputError(f"{where}: time {time!r}; accepted: UTC such as 2026-01-31T12:30:00.000Z")
    if seed not in (None, "") and not re.fullmatch(r"-?\d{1,18}", str(seed)):
        raise InputError(f"{where}: seed {str(seed)[:40]!r}; accepted: a whole number")
    if image not in opened:
        check_image(image, where)
        opened[image] = None
    if sha256 not in (None, ""):
        opened[image] = opened[image] or digest(image)
        if sha256 != opened[image]:
            raise InputError(f"{where}: image {image} is not the one that was labelled: its SHA-256 differs")
    return FileLabel(prompt, image.resolve(), verdict, name, said, None if seed in (None, "") else int(str(seed)))


def import_labels(store: FeedbackStore, path: Path) -> int:
    """Take the labels of a file into the store; how many are new or newer than the store's.

    Images that are not in the store are added. A label without a labeller is by the file's name, with a number where
    the file judges a pair of prompt and image again; without a time it is now.
    """
    return store.merge_labels(_new_labels(store.folder, path))


def import_into_run(folder: Path, path: Path) -> int:
    """`import_labels` into the store of a run, which is made where there is none; nothing is left where this fails."""
    labels = _new_labels(folder, path)
    there = folder.exists()
    begun = (folder / "feedback.sqlite").exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        store = FeedbackStore(folder)
        try:
            return store.merge_labels(labels)
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


def _new_labels(folder: Path, path: Path) -> list[NewLabel]:
    """The labels of a file as the store of a run takes them."""
    root = folder.resolve()
    unnamed = clean_name(path.stem[: LONGEST_NAME - 8]) or "a file"
    times: Counter[tuple[str, Path]] = Counter()
    rows = []
    for prompt, image, verdict, labeller, time, seed in read_labels(path):
        if labeller is None:
            times[prompt, image] += 1
            again = times[prompt, image]
            labeller = unnamed if again == 1 else f"{unnamed}, {again}"
        place = str(image.relative_to(root) if image.is_relative_to(root) else image)
        rows.append(NewLabel(prompt, place, seed, labeller, verdict, time))
    return rows


def export_labels(store: FeedbackStore, path: Path) -> int:
    """Write all labels to a label file, its kind by its name; their number.

    Image paths are relative to the file's folder, so that `read_labels` reads it where it is.
    """
    place = _Places(store.folder, path)
    return _write_rows(path, COLUMNS, ((row[0], place(row[1]), *row[2:]) for row in store.label_rows()))


def export_comparisons(store: FeedbackStore, path: Path) -> int:
    """Write all comparisons to a file, its kind by its name; their number. `verdict` is of PREFERENCES.

    `images` is the size of the sets that were compared, 1 for single images; the first image stands for a set.
    """
    place = _Places(store.folder, path)
    rows = (
        (row[0], place(row[1]), place(row[2]), *row[3:-1], int(row[-1].partition("//")[2] or 1))
        for row in store.comparison_rows()
    )
    return _write_rows(path, COMPARED, rows)


def count_votes(rows: Iterable[tuple[str, Path, str]]) -> Counter[tuple[str, Path]]:
    """For each pair of prompt and image the number of good verdicts less that of bad ones."""
    votes: Counter[tuple[str, Path]] = Counter()
    for prompt, image, verdict in rows:
        votes[prompt, image] += {"good": 1, "bad": -1, "skip": 0}[verdict]
    return votes


def check_image(path: Path, where: str) -> None:
    """InputError unless the file is an image that decodes whole and is not a mere line."""
    try:
        if not path.is_file():  # a pipe would never end
            what = "is no file" if path.exists() else "does not exist"
            raise InputError(f"{where}: image {path} {what}")
        with Image.open(path) as image:
            if max(image.size) > LONGEST_SHAPE * min(image.size):
                size = " x ".join(map(str, image.size))
                raise InputError(f"{where}: image {path} has {size} pixels; accepted: sides up to 1 : {LONGEST_SHAPE}")
            image.load()
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{where}: image {path} cannot be read ({error})") from error


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
        found = []
        for where, row in read_rows(path, ("prompt",)):
            if not str(row.get("prompt") or "").strip():
                raise InputError(f"{where}: no 'prompt'; {_columns_needed(('prompt',), row)}")
            found.append(_text(row, "prompt", where))
    else:
        found = _lines(_read_text(path))
    prompts = list(dict.fromkeys(prompt.strip() for prompt in found if prompt.strip()))
    if not prompts:
        raise InputError(f"{path}: no prompts; accepted: one per line, or .csv, .tsv or .jsonl with a column prompt")
    return prompts


# --------------------------------------------------------------------------------------------------- tables and lines
def read_rows(path: Path, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, columns by their names in small letters) of a table or, by any other name, of JSON lines.

    InputError where a column of `needed` is missing from the table's header, or a row is not what it says it is.
    """
    text = _read_text(path)
    read = _read_table if path.suffix.lower() in TABLES else _read_json_lines
    for where, row in read(path, text, needed):
        for key, value in row.items():
            if isinstance(value, str) and not _is_text(value):
                raise InputError(f"{where}: {key} holds half a character (a lone surrogate) or a NUL; accepted: UTF-8")
        yield where, row


def _read_text(path: Path) -> str:
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read as text ({error}); accepted: UTF-8") from error
    if "\0" in text:
        raise InputError(
            f"{path}, line {len(_lines(text[: text.index(chr(0))]))}: a NUL character; accepted: UTF-8 text"
        )
    return text


def _lines(text: str) -> list[str]:
    """Lines that end in a line feed, a carriage return, or both."""
    return re.split(r"\r\n|\r|\n", text)


def _is_text(value: str) -> bool:
    return "\0" not in value and not re.search("[\ud800-\udfff]", value)


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(row[key], str):
        raise InputError(f"{where}: {key} {row[key]!r}; accepted: text")
    return row[key]


def _columns_needed(needed: Sequence[str], found: Iterable[str]) -> str:
    names = ", ".join(filter(None, found))
    return f"columns needed: {', '.join(needed)}; found: {names if len(names) < 200 else f'{names[:200]} ...'}"


def _read_table(path: Path, text: str, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of CSV (RFC 4180), separated as the header is; a file of one column has no separator."""
    header = next((line for line in _lines(text) if line.strip()), "")
    separator = max(SEPARATORS, key=lambda sign: len(next(csv.reader([header], delimiter=sign))))
    if len(next(csv.reader([header], delimiter=separator))) == 1:
        separator = "\x1f"  # which no line holds: a comma belongs to its prompt
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    columns: list[str] = []
    begin = 1  # the line where the row, and so a quoted field that does not end, begins
    try:
        for cells in reader:
            where, begin = f"{path}, line {begin}", reader.line_num + 1
            if not any(cells):
                continue
            if columns:
                if len(cells) > len(columns):
                    what = f"{len(cells)} fields where the header has {len(columns)}"
                    raise InputError(f'{where}: {what}; a field that holds the separator stands in quotes: "a, b"')
                yield where, dict(zip(columns, map(_unguarded, cells)))
                continue
            columns = [cell.strip().lower() for cell in cells]
            if twice := [name for name, number in Counter(columns).items() if name and number > 1]:
                raise InputError(f"{where}: the column {twice[0]!r} is there twice")
            if missing := [name for name in needed if name not in columns]:
                raise InputError(f"{where}: no column {missing[0]!r}; {_columns_needed(needed, columns)}")
    except csv.Error as error:
        reason = f'not CSV ({error}); a quote within a quoted field is written twice: "a 12"" star"'
        raise InputError(f"{path}, in the row that begins in line {begin}: {reason}") from error
    if not columns:
        raise InputError(f"{path}: is empty; {_columns_needed(needed, ())}")


def _read_json_lines(path: Path, text: str, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if (whole := _json_kind(text)) is not None:
                raise InputError(f"{path}: is one JSON {whole}; accepted: JSON lines, one object per line") from error
            raise InputError(f"{where}: not JSON ({error}); accepted: one JSON object per line, or .csv") from error
        if not isinstance(row, dict):
            what = (
                f"{path}: is one JSON array"
                if isinstance(row, list) and _json_kind(text)
                else f"{where}: a JSON object is needed"
            )
            raise InputError(f"{what}; accepted: JSON lines, one object per line")
        yield where, {key.strip().lower(): value for key, value in row.items()}


def _json_kind(text: str) -> str | None:
    """What a text is as one JSON value over all its lines; None where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return "array" if isinstance(value, list) else "object" if isinstance(value, dict) else None


def _guarded(value: Any) -> Any:
    """A cell that a spreadsheet does not take for a formula; `_unguarded` gives the text back."""
    return f"'{value}" if FORMULA.match(str(value)) else value


def _unguarded(cell: str) -> str:
    return cell[1:] if cell[:1] == "'" and FORMULA.match(cell) else cell


def _write_rows(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> int:
    """Write a table or JSON lines; the number of rows."""
    kind = path.suffix.lower()
    if kind not in (*TABLES, ".jsonl"):
        raise InputError(f"{path}: cannot be written; accepted: a name that ends in .csv, .tsv or .jsonl")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; accepted: the name of a file")
    number = 0
    try:
        with atomic(path) as temporary:
            temporary.unlink(missing_ok=True)
            with open(temporary, "x", encoding="utf-8", newline="") as file:  # "x" follows no link
                table = csv.writer(file, delimiter="\t" if kind == ".tsv" else ",") if kind in TABLES else None
                if table:
                    table.writerow(columns)
                for row in rows:
                    if table:
                        table.writerow(map(_guarded, row))
                    else:
                        kept = {key: value for key, value in zip(columns, row) if value is not None}
                        file.write(json.dumps(kept, ensure_ascii=False) + "\n")
                    number += 1
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    return number


def _time(text: str) -> str | None:
    """A time as the store keeps it, to the millisecond, so that times sort as text; None unless it is one."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z", text)
    try:
        return found and f"{datetime.fromisoformat(found[1]).isoformat()}.{(found[2] or '') + '000':.3}Z"
    except ValueError:
        return None
