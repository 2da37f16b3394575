"""Tables and JSON, read row by row as strictly as label files need it, and written.

A row is (where, columns by their names in small letters), `where` for messages about it: the file and the line.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..files import InputError, atomic, read_bytes

TABLES = (".csv", ".tsv")
LINES = (".jsonl", ".ndjson", ".json")
SEPARATORS = ",;\t"
FORMULA = re.compile(r"'*[=+\-@\t\r]")  # how a cell begins that a spreadsheet would run
JSON = "one JSON object per line, one array of objects, or one object of objects"
IMAGEFOLDER = {"prompt": "text", "image": "file_name"}  # what the hub's imagefolder calls these columns
KEY = "(its name)"  # the column that holds the name of each object in a JSON object of objects


def columns_needed(needed: Sequence[str], present: Iterable[str]) -> str:
    names = ", ".join(filter(None, present)) or "none"
    said = f"columns needed: {', '.join(needed)}; " if needed else ""
    return f"{said}found: {names if len(names) < 200 else f'{names[:200]} ...'}"


def read_rows(path: Path, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, columns by their names in small letters) of a table or, by any other name, of JSON.

    JSON is one object a line, an array of objects, or an object of objects, of which each is called by its image.
    InputError where a column of `needed` is missing from the table's header, or a row is not what it says it is.
    """
    text = read_text(path)
    read = _read_table if path.suffix.lower() in TABLES else _read_json
    for where, row in read(path, text, needed):
        for key, value in row.items():
            if not all(_is_text(item) for item in (value if isinstance(value, list) else [value])):
                raise InputError(f"{where}: {key} holds half a character (a lone surrogate) or a NUL; accepted: UTF-8")
        yield where, row


def read_text(path: Path) -> str:
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read as text ({error}); accepted: UTF-8") from error
    if "\0" in text:
        raise InputError(
            f"{path}, line {len(lines_of(text[: text.index(chr(0))]))}: a NUL character; accepted: UTF-8 text"
        )
    return text


def lines_of(text: str) -> list[str]:
    """Lines that end in a line feed, a carriage return, or both."""
    return re.split(r"\r\n|\r|\n", text)


def _is_text(value: Any) -> bool:
    return not isinstance(value, str) or "\0" not in value and not re.search("[\ud800-\udfff]", value)


def _read_table(path: Path, text: str, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of CSV (RFC 4180), separated as the header is; a file of one column has no separator."""
    header = next((line for line in lines_of(text) if line.strip()), "")
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
                yield where, dict(zip_longest(columns, map(_unguarded, cells), fillvalue=""))
                continue
            columns = [cell.strip().lower() for cell in cells]
            if twice := [name for name, number in Counter(columns).items() if name and number > 1]:
                raise InputError(f"{where}: the column {twice[0]!r} is there twice")
            if missing := [name for name in needed if name not in columns]:
                raise InputError(f"{where}: no column {missing[0]!r}; {columns_needed(needed, columns)}")
    except csv.Error as error:
        reason = f'not CSV ({error}); a quote within a quoted field is written twice: "a 12"" star"'
        raise InputError(f"{path}, in the row that begins in line {begin}: {reason}") from error
    if not columns:
        raise InputError(f"{path}: is empty; {columns_needed(needed, ())}")


def _read_json(path: Path, text: str, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, row in _json_objects(path, text):
        if not isinstance(row, dict):
            raise InputError(f"{where}: a JSON object is needed; accepted: {JSON}")
        yield where, {key.strip().lower(): value for key, value in row.items()}


def _json_objects(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """(where, what should be an object) of JSON lines, of one array, or of one object of objects."""
    lines = [(number, line) for number, line in enumerate(lines_of(text), 1) if line.strip()]
    first = lines[0][1].strip() if lines else ""
    if first[:1] == "[" or first == "{" or len(lines) == 1:  # one value over all lines
        content = _loaded(text, str(path))
        if isinstance(content, list):
            yield from ((f"{path}, row {number}", row) for number, row in enumerate(content, 1))
            return
        if isinstance(content, dict) and content and all(isinstance(row, dict) for row in content.values()):
            yield from ((f"{path}, {name!r:.80}", {KEY: name} | row) for name, row in content.items())
            return
        if isinstance(content, dict) and len(lines) > 1:
            raise InputError(f"{path}: is one JSON object, and not of objects; accepted: {JSON}")
    for number, line in lines:
        where = f"{path}, line {number}"
        yield where, _loaded(line, where)


def _loaded(text: str, where: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for name, number in Counter(name for name, _ in pairs).items():
            if number > 1:
                raise ValueError(f"{name!r:.80} is there twice")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); accepted: {JSON}, or .csv") from error


def _guarded(value: Any) -> Any:
    """A cell that a spreadsheet does not take for a formula; `_unguarded` gives the text back."""
    return f"'{value}" if FORMULA.match(str(value)) else value


def _unguarded(cell: str) -> str:
    return cell[1:] if cell[:1] == "'" and FORMULA.match(cell) else cell


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> int:
    """Write a table or JSON lines; the number of rows.

    A file whose name is metadata.csv or metadata.jsonl has the columns' names of the hub's imagefolder.
    """
    kind = path.suffix.lower()
    if path.stem == "metadata":
        columns = [IMAGEFOLDER.get(name, name) for name in columns]
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
