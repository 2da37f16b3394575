"""Stage 1 of the method: the shapes of rows in which people keep judgements of images, and what each row says.

One table, `SHAPES`: verdicts and scores of single images, and pairs and rankings, which become comparisons. A preferred
image is not a good one: a comparison says only which of two images of a prompt is better. docs/formats.md lists public
data sets with the shape of each.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ..files import InputError
from .store import PREFERENCES, VERDICTS
from .tables import KEY, columns_needed

WORDS = {"1": "good", "0": "bad", "true": "good", "false": "bad", "yes": "good", "no": "bad"} | {
    verdict: verdict for verdict in VERDICTS
}
NAMES = {  # what a column is also called in public files; the first that is there counts
    "prompt": ("prompt", "caption", "text"),
    "image": ("image", "file_name", "image_path", KEY),
    "label": ("label", "human_labels"),
    "labeller": ("labeller", "user_id", "user_hash"),
}


class Verdict(NamedTuple):
    """What a row says of one image: good, bad, skip, or nothing (None); and its soft label in [0,1], if it has one."""

    image: str
    verdict: str | None
    soft: float | None = None


class Preference(NamedTuple):
    """What a row says of two images: which is better, one of PREFERENCES."""

    image: str
    other: str
    verdict: str


class Reading(NamedTuple):
    """How a label file is read where its columns or words are other ones than usual: `add_reading_flags`.

    columns: (what it is, the file's column) pairs. skip: labels that count as skip. good_from: labels are scores, good
    from here on. scale: labels are scores between these two, and soft labels in [0,1] on this scale.
    """

    columns: tuple[tuple[str, str], ...] = ()
    skip: tuple[str, ...] = ()
    good_from: float | None = None
    scale: tuple[float, float] | None = None


USUAL = Reading()


class Shape(NamedTuple):
    """A kind of row: the columns that it is known by, besides the prompt, and what reads it."""

    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str, Reading], Iterator[Verdict | Preference]]


# ----------------------------------------------------------------------------------------------------------- the flags
def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a label file is read; `given_reading` takes their values."""
    add = parser.add_argument_group("label files").add_argument
    about = f"columns of other names, as prompt=caption,image=file_name,label=rating; accepted: {', '.join(ROLES)}"
    add("--columns", type=_columns, metavar="WHAT=NAME,...", default=(), help=about)
    add("--skip", type=_words, metavar="LABEL,...", default=(), help="labels that count as skip, such as -1")
    add("--good-from", type=_number, metavar="SCORE", help="labels are scores: good from this one on, else bad")
    about = "labels are scores on this scale, such as 1,5: soft labels from 0 to 1 for --soft; above the middle is good"
    add("--scale", type=_scale, metavar="LOW,HIGH", help=f"{about} (unless --good-from says otherwise)")


def given_reading(arguments: argparse.Namespace) -> Reading:
    """The values of `add_reading_flags`."""
    return Reading(arguments.columns, arguments.skip, arguments.good_from, arguments.scale)


def _columns(text: str) -> tuple[tuple[str, str], ...]:
    pairs = [tuple(word.strip().lower() for word in pair.split("=", 1)) for pair in text.split(",")]
    for pair in pairs:
        if len(pair) != 2 or pair[0] not in ROLES or not pair[1]:
            accepted = f"accepted: WHAT=NAME with commas between, WHAT one of {', '.join(ROLES)}"
            raise argparse.ArgumentTypeError(f"{'='.join(pair)!r}; {accepted}")
    if len({what for what, *_ in pairs}) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} names a column twice; accepted: each once")
    return tuple((what, name) for what, name in pairs)


def _words(text: str) -> tuple[str, ...]:
    return tuple(plain(word) for word in text.split(","))


def _number(text: str) -> float:
    value = as_number(text)
    if value is None:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: a number")
    return value


def _scale(text: str) -> tuple[float, float]:
    ends = [as_number(word) for word in text.split(",")]
    if len(ends) != 2 or ends[0] is None or ends[1] is None or ends[0] >= ends[1]:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: two numbers, the lower one first, such as 1,5")
    return ends[0], ends[1]


# ---------------------------------------------------------------------------------------------------------- one row
def judgements(
    row: Mapping[str, Any], where: str, reading: Reading, unlabelled: bool
) -> Iterator[Verdict | Preference]:
    """What a row, with its columns as `named` has them, says of images. InputError says what is wrong `where`.

    A row whose label is empty, null or nan, as pandas writes a gap, is an image that nobody has labelled yet; with
    `unlabelled` also one without a column of labels.
    """
    shape = _shape(row)
    if shape.read is _pair and WORDS.get(plain(row.get("has_label", True))) == "bad":
        return  # a pair without a label, whose cells may be empty, says nothing
    gap = "label" in row and (label := plain(row["label"])) in ("", "none", "nan") and label not in reading.skip
    unjudged = shape is SHAPES[-1] and (gap or (unlabelled and "label" not in row))
    needed = shape.columns[:1] if unjudged else shape.columns
    for what in ("prompt", *needed):
        if row.get(what) in (None, ""):
            missing, accepted = f"no {what!r}", ""
            if what not in row:
                missing, accepted = f"no column {what!r}", f"; one of another name: --columns {what}=NAME"
            raise InputError(f"{where}: {missing}; {columns_needed(('prompt', *needed), row)}{accepted}")
    if unjudged:
        yield Verdict(as_text(row, "image", where), None)
    else:
        yield from shape.read(row, where, reading)


def _shape(row: Mapping[str, Any]) -> Shape:
    """The first shape whose columns are all there; where there is none, the one that the row is meant to be."""
    complete = next((shape for shape in SHAPES if all(what in row for what in shape.columns)), None)
    if complete is None and "image" not in row:
        complete = max(reversed(SHAPES), key=lambda shape: sum(what in row for what in shape.columns))
    return complete or SHAPES[-1]


def named(row: Mapping[str, Any], where: str, reading: Reading) -> dict[str, Any]:
    """A row by what its columns are: `reading` decides, else their names in `NAMES`; other columns keep theirs."""
    renamed = dict(row)
    for what, names in NAMES.items():
        name = next((name for name in names if name in row), None)
        if name is not None:
            renamed[what] = row[name]
    for what, name in reading.columns:
        if name not in row:
            raise InputError(f"{where}: --columns {what}={name}: no such column; found: {', '.join(row)[:200]}")
        renamed[what] = row[name]
    return renamed


def as_text(row: Mapping[str, Any], what: str, where: str) -> str:
    if not isinstance(row[what], str):
        raise InputError(f"{where}: {what} {row[what]!r}; accepted: text")
    return row[what]


def plain(value: Any) -> str:
    """A word in small letters; a whole number without the .0 that a column with gaps gets."""
    text = str(value).strip().lower()
    return re.sub(r"(?<=\d)\.0*$", "", text) if as_number(text) is not None else text


def as_number(value: Any) -> float | None:
    """A finite number, of itself or of its text; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def _list(row: Mapping[str, Any], what: str, where: str) -> list[Any]:
    """A list, as JSON has it or as JSON text in the cell of a table."""
    value = row[what]
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            problem = f"{where}: {what} {row[what]!r:.80}: not JSON ({error})"
            raise InputError(f'{problem}; accepted: [1, 0] or ["0.png", "1.png"], in double quotes') from error
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: {what} {value!r:.80}; accepted: a list")
    return value


def _files(row: Mapping[str, Any], what: str, where: str, values: list[Any], of: str) -> list[str]:
    """A list of image files, as many as there are values."""
    files = _list(row, what, where)
    if not all(isinstance(file, str) and file for file in files):
        raise InputError(f"{where}: {what} {files!r:.80}; accepted: a list of image files")
    if len(files) != len(values) or len(files) < 2:
        raise InputError(
            f"{where}: {len(files)} images in {what}, {len(values)} numbers in {of}; accepted: as many, two or more"
        )
    return files


def _numbers(row: Mapping[str, Any], what: str, where: str) -> list[float]:
    values = [as_number(value) for value in _list(row, what, where)]
    if None in values:
        raise InputError(f"{where}: {what} {row[what]!r:.80}; accepted: a list of numbers")
    return values  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------ what each shape says
def _verdicts(row: Mapping[str, Any], where: str, reading: Reading) -> Iterator[Verdict]:
    """A label, or a list with one label a person."""
    image, label = as_text(row, "image", where), row["label"]
    several = isinstance(label, list) or (isinstance(label, str) and label.lstrip().startswith("["))
    if several and row.get("labeller") not in (None, ""):
        raise InputError(f"{where}: a list of labels, one a person, and a labeller; accepted: one of them")
    for value in _list(row, "label", where) if several else [label]:
        yield Verdict(image, *_verdict(value, where, reading))


def _verdict(value: Any, where: str, reading: Reading) -> tuple[str, float | None]:
    """good, bad or skip, and the soft label of a score on a scale."""
    word = plain(value)
    if word in reading.skip or word == "skip":
        return "skip", None
    if reading.good_from is None and reading.scale is None:
        if word not in WORDS or isinstance(value, (list, dict)):
            raise InputError(f"{where}: label {value!r}; accepted: {', '.join(WORDS)}{_hint(word)}")
        return WORDS[word], None
    score = as_number(value)
    low, high = reading.scale or (-math.inf, math.inf)
    if score is None or not low <= score <= high:
        accepted = "a number" if reading.scale is None else f"a number from {low:g} to {high:g} (--scale)"
        raise InputError(f"{where}: label {value!r}; accepted: {accepted}")
    soft = None if reading.scale is None else (score - low) / (high - low)
    if reading.good_from is not None:
        return "good" if score >= reading.good_from else "bad", soft
    return "skip" if soft == 0.5 else "good" if soft is not None and soft > 0.5 else "bad", soft


def _hint(word: str) -> str:
    if word in ("none", "nan"):
        return f"; --skip {word}"
    number = as_number(word)
    return "" if number is None else f"; --skip {word}" if number < 0 else "; of scores: --good-from or --scale"


def _pair(row: Mapping[str, Any], where: str, reading: Reading) -> Iterator[Preference]:
    """Pick-a-Pic: 1 for the better image and 0 for the other, or 0.5 for both."""
    labels: Any = as_number(row["label_0"]), as_number(row["label_1"])
    verdict = {(1, 0): "this", (0, 1): "other", (0.5, 0.5): "tie"}.get(labels)
    if verdict is None:
        both = f"label_0 {row['label_0']!r}, label_1 {row['label_1']!r}"
        raise InputError(f"{where}: {both}; accepted: 1 and 0, 0 and 1, 0.5 and 0.5")
    yield Preference(as_text(row, "image_0", where), as_text(row, "image_1", where), verdict)


def _ranking(row: Mapping[str, Any], where: str, reading: Reading) -> Iterator[Preference]:
    """ImageReward: rank 1 is the best; ranks may have gaps, and equal ranks are ties. Every pair is a comparison."""
    ranks = _numbers(row, "ranking", where)
    files = _files(row, "generations", where, ranks, "ranking")
    for j in range(1, len(files)):
        for i in range(j):
            verdict = "this" if ranks[i] < ranks[j] else "other" if ranks[i] > ranks[j] else "tie"
            yield Preference(files[i], files[j], verdict)


def _choice(row: Mapping[str, Any], where: str, reading: Reading) -> Iterator[Preference]:
    """HPD v2: 1 for an image that was preferred, 0 for the others. Of two others nothing is said."""
    chosen = _numbers(row, "human_preference", where)
    files = _files(row, "file_path", where, chosen, "human_preference")
    if set(chosen) != {0, 1}:
        accepted = "accepted: 1 for a preferred image, 0 for the others, both kinds"
        raise InputError(f"{where}: human_preference {row['human_preference']!r:.80}; {accepted}")
    for j in range(1, len(files)):
        for i in range(j):
            if chosen[i] != chosen[j]:
                yield Preference(files[i], files[j], "this" if chosen[i] else "other")


def _chosen(row: Mapping[str, Any], where: str, reading: Reading) -> Iterator[Preference]:
    yield Preference(as_text(row, "chosen", where), as_text(row, "rejected", where), "this")


def _compared(row: Mapping[str, Any], where: str, reading: Reading) -> Iterator[Preference]:
    """A comparison as `label --compare OTHER --export FILE` writes it."""
    if plain(row.get("images", 1)) not in ("", "1"):
        accepted = "accepted: 1, for a verdict on sets says nothing of two single images"
        raise InputError(f"{where}: images {row['images']!r}; {accepted}")
    verdict = plain(row["verdict"])
    if verdict not in PREFERENCES:
        raise InputError(f"{where}: verdict {row['verdict']!r}; accepted: {', '.join(PREFERENCES)}")
    yield Preference(as_text(row, "image", where), as_text(row, "other", where), verdict)


SHAPES = (  # the first whose columns are all there
    Shape(("image_0", "image_1", "label_0", "label_1"), _pair),
    Shape(("generations", "ranking"), _ranking),
    Shape(("file_path", "human_preference"), _choice),
    Shape(("chosen", "rejected"), _chosen),
    Shape(("image", "other", "verdict"), _compared),
    Shape(("image", "label"), _verdicts),
)
MORE = ("labeller", "time", "seed", "sha256", "soft")  # columns that a row may have besides
ROLES = tuple(dict.fromkeys(("prompt", *SHAPES[-1].columns, *(c for shape in SHAPES for c in shape.columns), *MORE)))
