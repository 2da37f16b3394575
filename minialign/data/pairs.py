"""Images and captions from disk, and the order in which training sees them.

The pre-training term of the method (Lee et al. 2023, section 3.3) asks for image-text pairs like those that the model
was trained on. They come from a folder or from WebDataset's shards, one at a time; what cannot be used is named in a
log. `open_image` is the one reader of images of the project.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import json
import os
import stat
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TextIO, overload

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..engine.optimising import generator
from ..files import InputError, first_line

KINDS = ("png", "jpg", "jpeg", "jfif", "webp", "bmp", "gif", "tif", "tiff")  # of image files that are read
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # in which; not PostScript, which runs programs
OTHER_KINDS = ("avif", "heic", "heif", "jp2", "jxl", "svg", "psd", "tga", "ico", "dng", "raw")  # named, not read
TEXTS = ("txt", "caption", "json")  # of captions beside images, the first that is there
KEYS = ("text", "caption", "prompt")  # of a caption in JSON and CSV, the first that is there
NEEDED = "file_name and text (or caption, prompt)"  # in a row of a list
LISTS = ("metadata.jsonl", "metadata.csv")
SHARDS = (".tar", ".tar.gz", ".tgz")
ACCEPTED = (
    f"accepted: a folder with {' or '.join(LISTS)} (file_name, and the caption as {', '.join(KEYS)}), a folder with a "
    f"caption beside each image (.{', .'.join(TEXTS)}; images: {', '.join(KINDS)}), WebDataset's shards "
    f"({', '.join(SHARDS)}) by path or glob"
)
ONE_IN = 20  # images may be unusable: 5 %
LOOKED_AT = 200  # pairs of a source that is checked before it is needed
TEXT_BYTES = 2**20  # of a caption with all that stands in its file, and of a line of a list
IMAGE_BYTES = 2**26  # of an image in a shard
NARROW = 100  # times its shorter side is the longer side of an image at most: CLIP enlarges the shorter one
READING = "1: upright, on white, 8 bits a channel"  # version of `open_image`, which the keys of caches hold


class Unusable(InputError):
    """An image or its caption that cannot be used: its name and why."""

    def __init__(self, name: str, why: str):
        super().__init__(f"{name}: {why}")
        self.name, self.why = name, why


# ------------------------------------------------------------------------------------------------ the reader of images
def open_image(source: str | Path | bytes, name: str = "") -> Image.Image:
    """An image from a file or from a file's content, in RGB, upright, on white.

    The orientation that a camera wrote down (EXIF) is applied, what is transparent lies on white, 16 bits a channel
    become the upper 8, and of an animation the first frame is taken. Unusable, by `name` (the path unless given),
    where there is no such image, where it has more pixels than PIL.Image.MAX_IMAGE_PIXELS, and where its longer side
    is more than 100 times its shorter one.
    """
    name = name or (str(source) if not isinstance(source, bytes) else "image")
    if not isinstance(source, bytes):
        regular(source, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(file, formats=FORMATS) as image:
                if max(image.size) > NARROW * min(image.size):
                    size = f"{image.width} x {image.height} pixels"
                    raise Unusable(name, f"the image is {size}; accepted: up to {NARROW} times as long as wide")
                ImageOps.exif_transpose(image, in_place=True)
                return as_rgb(image)
    except Unusable:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"{Image.MAX_IMAGE_PIXELS:,} pixels (PIL.Image.MAX_IMAGE_PIXELS)"
        raise Unusable(name, f"the image is too large; accepted: up to {limit}") from error
    except UnidentifiedImageError as error:  # whose own words name an address in memory
        raise Unusable(name, f"not an image; accepted: {', '.join(FORMATS)}") from error
    except Exception as error:  # what decoders raise over a broken file has no common base
        raise Unusable(name, f"the image cannot be read ({first_line(error)})") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB on white, 8 bits a channel. ValueError where its numbers have no known range."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image)
        deep, image = image, Image.fromarray((values >> 8).astype(np.uint8))  # as Pillow does with 16 bits in color
        if "transparency" in deep.info:  # the one value that is
            image.putalpha(Image.fromarray((values != deep.info["transparency"]).astype(np.uint8) * 255))
    if image.mode in ("I", "F"):
        raise ValueError(f"its mode is {image.mode}; accepted: 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def image_files(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """The image files below a folder that `open_image` reads, and those of kinds that it does not; each sorted.

    Hidden ones are left out, links are followed.
    """
    files = [(Path(place, name), _split(name)[1]) for place, _, names in _walk(str(folder)) for name in names]
    read, left_out = (sorted(path for path, kind in files if kind in kinds) for kinds in (KINDS, OTHER_KINDS))
    return read, left_out


class ImageFiles(Sequence[Image.Image]):
    """Image files as a sequence of images in RGB, each opened when it is asked for: a slice is a list of open ones."""

    def __init__(self, paths: Iterable[str | Path]):
        self.paths = [str(path) for path in paths]

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...

    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...

    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return [open_image(path) for path in self.paths[index]]
        return open_image(self.paths[index])


def regular(path: str | Path, name: str, what: str = "the image") -> os.stat_result:
    """What the system says of a file. Unusable where there is none, and of a pipe, which to open may wait forever."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        why = getattr(error, "strerror", None) or first_line(error)
        raise Unusable(name, f"{what} is missing ({why})") from error
    if not stat.S_ISREG(status.st_mode):
        raise Unusable(name, f"{what} is missing (not a file)")
    return status


# --------------------------------------------------------------------------------------------------------------- pairs
class Skipped:
    """Counts what a source has that cannot be used, and names it in a log: a JSON object of name and why a line.

    Each of several, process = (rank, number of processes), keeps a log of its own: `path`, and of the others path-1,
    path-2 ... before the suffix. What all of them find, because it shows in the listing, the first one alone writes
    down. A new reading (`begin`) starts the logs again.
    """

    def __init__(self, path: Path, process: tuple[int, int] = (0, 1)):
        self.path, self.process = path, process
        self.source = ""
        self.listed = 0  # of all that are listed, how many cannot be used as the listing shows already
        self.first: Unusable | None = None

    def _log(self, rank: int) -> Path:
        return self.path if rank == 0 else self.path.with_name(f"{self.path.stem}-{rank}{self.path.suffix}")

    @property
    def logs(self) -> str:
        """The path of the log, with a star in place of the processes' numbers."""
        return str(self.path.with_name(f"{self.path.stem}{'*' * (self.process[1] > 1)}{self.path.suffix}"))

    def begin(self, source: str) -> None:
        self.source, self.listed, self.first = source, 0, None
        rank, size = self.process
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._log(rank).write_bytes(b"")
        if rank == 0:  # which a run with more processes has left
            for path in self.path.parent.glob(glob.escape(self.path.stem) + "-*" + glob.escape(self.path.suffix)):
                number = path.stem[len(self.path.stem) + 1 :]
                if number.isdecimal() and int(number) >= size:
                    path.unlink()

    def add(self, error: Unusable, listed: bool = False) -> None:
        """Write one down; `listed`: every process finds it."""
        self.listed += listed
        self.first = self.first or error
        if not listed or self.process[0] == 0:
            with open(self._log(self.process[0]), "a", encoding="utf-8") as file:
                file.write(json.dumps({"name": error.name, "why": error.why}) + "\n")

    def check(self, pairs: int, unusable: int = 0) -> None:
        """InputError if more than 5 % of the pairs cannot be used; `unusable` counts those of the listed pairs.

        All processes know the same numbers, so that all of them stop or none.
        """
        seen, bad = self.listed + pairs, self.listed + unusable
        if bad * ONE_IN > seen:
            first = f" (the first: {self.first})" if self.first else ""
            accepted = "" if bad < seen else f"; {ACCEPTED}"
            raise InputError(
                f"{self.source}: {bad} of {seen} images or captions cannot be used, more than {100 // ONE_IN} %"
                f"{first}; each is named in {self.logs}{accepted}"
            )


@dataclass(frozen=True)
class Pair:
    """An image and its caption. `name` is for logs; `identity` is another one when the image is.

    The identity of a file is its path, size, time of change and time of status change (ctime). The system sets the last
    one at every write, replacement and change of the other times; no program chooses it, so that a file that was
    replaced under its old size and time (cp -p, rsync -t, tar) is another one. It costs no reading, unlike a digest of
    the content, which would read an entire data set at every start. (On Windows ctime is the time of creation.)

    `open()` decodes the image by `open_image`. A pair of a compressed shard holds the file's bytes, the others none.
    """

    name: str
    caption: str
    identity: str
    open: Callable[[], Image.Image] = field(repr=False, compare=False)


def image_pairs(images: Sequence[Image.Image], captions: Sequence[str]) -> list[Pair]:
    """Pairs of images that are at hand; the identity of one that has no file is a hash of its pixels."""
    if isinstance(images, ImageFiles):
        paths = zip(images.paths, captions)
        return [_file_pair(path, os.path.realpath(path), _caption(path, caption)) for path, caption in paths]
    pairs = []
    for i, (image, caption) in enumerate(zip(images, captions)):
        image = as_rgb(image)
        digest = hashlib.blake2b(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()
        pairs.append(Pair(f"image {i}", caption, f"pixels {digest}", partial(image.convert, "RGB")))
    return pairs


def read_pairs(source: str, skipped: Skipped, seed: int = 0) -> Iterator[Pair]:
    """Stream the pairs of a source in an order that stays; no image is decoded before its `open()`.

    source: a folder, searched recursively through its links, each of its folders with a metadata.jsonl or
    metadata.csv (the hub's imagefolder convention: rows of file_name, relative to that folder, and text) or with a
    caption beside each image; or WebDataset's tar shards by path or glob, in the order of their names: members whose
    names agree up to the first dot of the last name belong together. Captions: `TEXTS`, `KEYS`; of a list of captions
    `seed` chooses one. What cannot be used goes to `skipped`. InputError where the source is not there, holds nothing,
    is damaged, or has more than 5 % of such.
    """
    skipped.begin(source)
    pairs = 0
    for item in _listed(source, seed):
        if isinstance(item, Unusable):
            skipped.add(item, listed=True)
        else:
            pairs += 1
            yield item
    if pairs + skipped.listed == 0:
        raise InputError(f"{source}: holds no images with captions; {ACCEPTED}")
    skipped.check(pairs)


def check_source(source: str) -> None:
    """InputError, before any work is done, where `read_pairs` would find nothing in a source that it can use.

    Looks at the listing of the first 200 pairs: quick, writes nothing, decodes no image. Of a smaller source more than
    5 % unusable pairs are refused, of a larger one only more than half, for these may be the only ones.
    """
    items = list(islice(_listed(source, 0), LOOKED_AT))
    bad = [item for item in items if isinstance(item, Unusable)]
    if not items:
        raise InputError(f"{source}: holds no images with captions; {ACCEPTED}")
    if len(bad) * (ONE_IN if len(items) < LOOKED_AT else 2) > len(items):
        number = f"{len(bad)} of {'the first ' * (len(items) == LOOKED_AT)}{len(items)} images or captions"
        raise InputError(f"{source}: {number} cannot be used (the first: {bad[0]}); {ACCEPTED}")


def source_digest(source: str, seed: int = 0) -> str:
    """What stands for a source's pairs, SHA-256 in hexadecimal: names and sizes of its images, and their captions.

    Of the listing alone, wherever it lies; the latents of an image that changed are computed again in any case.
    """
    digest = hashlib.sha256()
    for item in _listed(source, seed):
        if isinstance(item, Pair):
            path = Path(item.name)
            size = path.stat().st_size if path.is_file() else -1
            digest.update(json.dumps([path.name, size, item.caption]).encode())
    return digest.hexdigest()


def _listed(source: str, seed: int) -> Iterator[Pair | Unusable]:
    if os.path.isdir(source):
        return _folder(source, seed)
    shards = [source] if os.path.isfile(source) else sorted(glob.glob(source, recursive=True))
    if not shards:
        raise InputError(f"{source}: not found; {ACCEPTED}")
    for shard in shards:
        if not shard.lower().endswith(SHARDS) or not os.path.isfile(shard):
            raise InputError(f"{shard}: not a shard; {ACCEPTED}")
    return (pair for shard in shards for pair in _shard(shard, seed))


def _version(status: os.stat_result) -> str:
    return f"{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}"


def _file_pair(path: str, real: str, caption: str) -> Pair:
    return Pair(path, caption, f"{real}|{_version(regular(path, path))}", partial(open_image, path))


def _caption(name: str, text: object, choice: str = "") -> str:
    """The caption in a file's content (bytes), a row (dict), a list or a string. `choice` decides which of a list."""
    if isinstance(text, Unusable):
        raise text
    if isinstance(text, dict):
        row, text = text, next((text[key] for key in KEYS if text.get(key)), None)
        if text is None and (others := [str(key) for key in row if key not in ("file_name", *KEYS)]):
            raise Unusable(name, f"it has no caption; keys: {', '.join(others)[:200]}; accepted: {', '.join(KEYS)}")
    if isinstance(text, list):
        texts = [item for item in text if isinstance(item, str) and item.strip()]
        number = int.from_bytes(hashlib.blake2b(choice.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
        text = texts[number % len(texts)] if texts else None
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        str(text).encode()  # JSON may hold halves of surrogate pairs
    except UnicodeError as error:
        raise Unusable(name, "its caption is not UTF-8") from error
    if not isinstance(text, str) or not text.strip():
        raise Unusable(name, "it has no caption")
    return text.strip()


def _parsed(name: str, kind: str, content: bytes) -> object:
    """What the caption's file says, for `_caption`."""
    if kind != "json":
        return content
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Unusable(name, f"its .json cannot be read ({first_line(error)})") from error


def _too_large(name: str, what: str, size: int, limit: int) -> bytes:
    raise Unusable(name, f"{what} has {size:,} bytes; accepted: up to {limit:,}")


# ------------------------------------------------------------------------------------------------------------- folders
def _walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk through links, sorted, each folder once and hidden ones never."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error

    seen: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        real = os.path.realpath(place)
        if real in seen:  # a link leads back
            folders.clear()
        else:
            seen.add(real)
            yield place, folders, sorted(name for name in files if not name.startswith("."))


def _split(name: str) -> tuple[str, str]:
    stem, _, kind = name.rpartition(".")
    return stem, kind.lower()


def _folder(source: str, seed: int) -> Iterator[Pair | Unusable]:
    root = os.path.realpath(source)
    covered: set[str] = set()  # folders whose images are in a list, of theirs or of one above
    for place, _, files in _walk(source.rstrip("/") or "/"):
        lists = [name for name in LISTS if os.path.isfile(os.path.join(place, name))]
        if len(lists) > 1:
            raise InputError(f"{place}: has {' and '.join(lists)}; accepted: one of them")
        if lists or os.path.dirname(place) in covered:
            covered.add(place)
            rows = _rows(os.path.join(place, lists[0])) if lists else iter(())
        else:
            rows = _beside(place, files)
        within = os.path.relpath(place, source)
        for name, text in rows:
            path = os.path.join(place, name)
            name = name if within == "." else os.path.join(within, name)  # wherever the source is
            try:
                caption = _caption(path, text, f"{seed} {name}")
                item: Pair | Unusable = _file_pair(path, os.path.join(root, name), caption)
            except Unusable as error:
                item = error
            yield item


def _beside(place: str, files: list[str]) -> Iterator[tuple[str, object]]:
    """(file name, what is in the file of its caption) of each image in a folder, and what else may be meant as one."""
    texts = {_split(name): name for name in files if _split(name)[1] in TEXTS}
    for name in files:
        path, (stem, kind) = os.path.join(place, name), _split(name)
        if stem and kind in KINDS:
            text = next((texts[stem, kind] for kind in TEXTS if (stem, kind) in texts), None)
            yield name, text and _caption_file(os.path.join(place, text), path)
        elif stem and kind in OTHER_KINDS:
            yield name, Unusable(path, f".{kind} is not read; accepted: {', '.join(KINDS)}")
        elif name == "metadata.parquet":
            yield name, Unusable(path, f"not read; accepted: {', '.join(LISTS)}")
        elif kind not in TEXTS and not os.path.exists(path):
            yield name, Unusable(path, "a link that leads nowhere")


def _caption_file(text: str, image: str) -> object:
    try:
        size = regular(text, image, "its caption").st_size
        if size > TEXT_BYTES:
            _too_large(image, "its caption's file", size, TEXT_BYTES)
        return _parsed(image, _split(text)[1], Path(text).read_bytes())
    except OSError as error:
        return Unusable(image, f"its caption cannot be read ({error.strerror})")
    except Unusable as error:
        return error


def _rows(path: str) -> Iterator[tuple[str, object]]:
    """(file_name, all of the row) of each row of a list."""
    number, comma = 0, path.endswith(".csv")
    try:
        with open(path, encoding="utf-8-sig", newline="" if comma else None) as file:
            for number, row in _table(path, file) if comma else _json_lines(path, file):
                name = row.get("file_name")
                if not isinstance(name, str) or not name:
                    raise InputError(f"{path}, line {number}: no file_name; needed: {NEEDED}")
                if os.path.isabs(name) or ".." in Path(name).parts:
                    raise InputError(f"{path}, line {number}: file_name {name!r} leaves the folder")
                yield name, row
    except (OSError, UnicodeError) as error:
        raise InputError(f"{path}, after line {number}: cannot be read ({first_line(error)})") from error


def _lines(path: str, file: TextIO) -> Iterator[str]:
    """The lines of a text file, none of which is read to its end where it is too long."""
    read = partial(file.readline, TEXT_BYTES)
    for number, line in enumerate(iter(read, ""), 1):
        if len(line) == TEXT_BYTES:
            raise InputError(f"{path}, line {number}: longer than {TEXT_BYTES:,} characters")
        yield line


def _json_lines(path: str, file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_lines(path, file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: cannot be read as JSON lines ({first_line(error)})") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: a JSON object with {NEEDED} is needed")
        yield number, row


def _table(path: str, file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    reader, last = csv.DictReader(_lines(path, file), strict=True), 0
    try:
        columns = [str(name).strip().lower() for name in reader.fieldnames or ()]
        if "file_name" not in columns or not set(columns) & set(KEYS):
            present = ", ".join(columns)[:200] or "none"
            raise InputError(f"{path}: {NEEDED} are needed, separated by commas; found: {present}")
        reader.fieldnames, last = columns, reader.line_num
        for row in reader:
            if None in row or None in row.values():
                raise InputError(f"{path}, line {last + 1}: not {len(columns)} columns; quote what has commas")
            last = reader.line_num
            yield last, row
    except csv.Error as error:
        raise InputError(f"{path}, line {last + 1}: cannot be read as CSV ({first_line(error)})") from error


# -------------------------------------------------------------------------------------------------------------- shards
class _Header(tarfile.TarInfo):
    """Refuses names and attributes that are too long: tarfile reads them into memory, whatever size they claim."""

    LONG = (
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        b"X",
    )  # b"X": Solaris'

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        if header.type in cls.LONG and header.size > TEXT_BYTES:
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        return header


@dataclass(frozen=True)
class _Member:
    path: str  # in the shard
    sample: str  # what the names of its sample's members have in common
    kind: str  # the rest of the name
    offset: int
    read: Callable[[], bytes]


def _shard(shard: str, seed: int) -> Iterator[Pair | Unusable]:
    real = f"{os.path.realpath(shard)}|{_version(os.stat(shard))}"
    seen: set[str] = set()
    for sample, group in groupby(_members(shard), lambda member: member.sample):
        members: dict[str, _Member] = {}
        repeats = sample in seen
        for member in group:
            repeats = repeats or member.kind in members
            members.setdefault(member.kind, member)
        seen.add(sample)
        image = next((member for member in members.values() if member.kind in KINDS), None)
        name = f"{shard}/{(image or next(iter(members.values()))).path}"
        try:
            if repeats:  # which of them belong together is not known
                raise Unusable(name, "its name repeats in the shard")
            if image is None:
                others = [f"the image is missing (.{kind} is not read)" for kind in members if kind in OTHER_KINDS]
                raise Unusable(name, others[0] if others else "the image is missing")
            text = next((_parsed(name, kind, members[kind].read()) for kind in TEXTS if kind in members), None)
            caption = _caption(name, text, f"{seed} {os.path.basename(shard)}/{sample}")
            identity = f"{real}|{image.path}|{image.offset}"
            item: Pair | Unusable = Pair(name, caption, identity, partial(_open_member, image.read, name))
        except Unusable as error:
            item = error
        yield item


def _open_member(read: Callable[[], bytes], name: str) -> Image.Image:
    return open_image(read(), name)


def _members(shard: str) -> Iterator[_Member]:
    """Images and captions of a shard; images of one that is not compressed are read when they are asked for."""
    packed = not shard.lower().endswith(".tar")
    try:
        # compressed shards through gzip, which checks what tarfile would not, and forward only
        opened: Any = gzip.open if packed else open
        options: Any = {"mode": "r|" if packed else "r:", "tarinfo": _Header}
        with opened(shard, "rb") as file, tarfile.open(fileobj=file, **options) as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # or a large shard's headers would all stay in memory
                folder, slash, base = info.name.rpartition("/")
                stem, _, kind = base.partition(".")
                kind = kind.lower()
                if not info.isfile() or not stem or kind not in (*KINDS, *TEXTS, *OTHER_KINDS):
                    continue
                limit = TEXT_BYTES if kind in TEXTS else IMAGE_BYTES
                if info.size > limit:
                    read = partial(_too_large, f"{shard}/{info.name}", "it", info.size, limit)
                elif kind in OTHER_KINDS or (not packed and kind in KINDS):
                    read = partial(_read, shard, info.offset_data, info.size)
                else:  # in passing: of a compressed shard there is no way back
                    read = partial(bytes, tar.extractfile(info).read())  # type: ignore[union-attr]  # a file's
                yield _Member(info.name, folder + slash + stem, kind, info.offset_data, read)
            if packed:
                while file.read(2**20):  # to the checksum
                    pass
            else:
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes any end for the end
                    raise tarfile.ReadError(f"no valid header nor end at byte {tar.offset}")
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
        raise InputError(f"{shard}: damaged or cut short ({first_line(error)})") from error


def _read(path: str, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


# --------------------------------------------------------------------------------------------------------------- order
def shuffled(position: Tensor, length: int, seed: int) -> Tensor:
    """The entries at positions (N,) int64 of an endless sequence of shuffled epochs over `length` entries.

    Position p is entry p % length of epoch p // length, each epoch a random permutation of 0..length-1 that depends on
    (seed, epoch) alone: any process computes any batch with neither state nor replay.
    """
    if length < 1:
        raise ValueError(f"length={length}; accepted: 1 and more")
    epoch, place = np.divmod(position.numpy(), length)
    entry = np.empty_like(place)
    for number in np.unique(epoch).tolist():
        entry[epoch == number] = _permutation(length, seed, number)[place[epoch == number]]
    return torch.from_numpy(entry)


@lru_cache(maxsize=2)  # a batch may begin in one epoch and end in the next
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return torch.randperm(length, generator=generator(seed, 6, epoch)).numpy()
