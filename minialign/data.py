"""Images and captions from disk, and the order in which training sees them.

The pre-training term of the method (Lee et al. 2023, section 3.3) asks for image-text pairs like those that the model
was trained on. They come from a folder or from WebDataset's shards, one at a time; what cannot be used is named in a
log. `shuffled` is the order of an epoch as a function of the position alone.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import math
import os
import stat
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .models.pretrained import InputError, first_line, read_bytes

METADATA = "metadata.jsonl"
KINDS = ("png", "jpg", "jpeg", "webp", "bmp")  # of images beside their captions
SHARDED = ("png", "jpg", "jpeg", "webp")  # of images in shards
SHARDS = (".tar", ".tar.gz", ".tgz")
ACCEPTED = (
    f"accepted: a folder with {METADATA} (rows of file_name and text), a folder with a caption .txt beside each image "
    f"({', '.join(KINDS)}), WebDataset's shards ({', '.join(SHARDS)}) by path or glob"
)
ONE_IN = 20  # images may be unusable: 5 %
LARGEST = 2**40  # entries that can be shuffled
ROUNDS = 10  # of the Feistel network


class Unusable(InputError):
    """An image or its caption that cannot be used: its name and why."""

    def __init__(self, name: str, why: str):
        super().__init__(f"{name}: {why}")
        self.name, self.why = name, why


class Skipped:
    """Counts what a source has that cannot be used, and names it in a log: a JSON object of name and why a line.

    Each of several processes, part = (its number, how many), keeps a log of its own: `path`, and of the others path-1,
    path-2 ... before the suffix. What all of them find, because it shows in the listing, the first one alone writes
    down. A new reading (`begin`) starts the logs again.
    """

    def __init__(self, path: Path, part: tuple[int, int] = (0, 1)):
        self.path, self.part = path, part
        self.source = ""
        self.listed = 0  # of all that are listed, how many cannot be used as the listing shows already

    def _log(self, rank: int) -> Path:
        return self.path if rank == 0 else self.path.with_name(f"{self.path.stem}-{rank}{self.path.suffix}")

    def begin(self, source: str) -> None:
        self.source, self.listed = source, 0
        rank, size = self.part
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
        if not listed or self.part[0] == 0:
            with open(self._log(self.part[0]), "a", encoding="utf-8") as file:
                file.write(json.dumps({"name": error.name, "why": error.why}) + "\n")

    def check(self, pairs: int, unusable: int = 0) -> None:
        """InputError where more than 5 % of what was seen cannot be used; of the listed pairs, so many turned out so.

        All processes know the same numbers, so that all of them stop or none.
        """
        seen, bad = self.listed + pairs, self.listed + unusable
        if bad * ONE_IN > seen:
            several = "*" * (self.part[1] > 1)
            log = self.path.with_name(f"{self.path.stem}{several}{self.path.suffix}")
            raise InputError(
                f"{self.source}: {bad} of {seen} images or captions cannot be used, more than {100 // ONE_IN} %; each "
                f"is named in {log}"
            )


@dataclass(frozen=True)
class Pair:
    """An image and its caption. `name` is for logs; `identity` is another one when the image is.

    `open()` decodes the image, in RGB and upright, or raises Unusable. A pair of a compressed shard holds the file's
    bytes, the others none.
    """

    name: str
    caption: str
    identity: str
    open: Callable[[], Image.Image] = field(repr=False, compare=False)


def decode(name: str, source: Callable[[], Any]) -> Image.Image:
    """The image, in RGB and upright, of what `source` returns: a path or an open file. Unusable where there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source()) as image:
                ImageOps.exif_transpose(image, in_place=True)  # as cameras say it
                return image.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"{Image.MAX_IMAGE_PIXELS:,} pixels (PIL.Image.MAX_IMAGE_PIXELS)"
        raise Unusable(name, f"the image is too large; accepted: up to {limit}") from error
    except UnidentifiedImageError as error:  # whose own words name an address in memory
        raise Unusable(name, "not an image") from error
    except Exception as error:  # what decoders raise over a broken file has no common base
        raise Unusable(name, f"the image cannot be read ({first_line(error)})") from error


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
            return [decode(path, partial(str, path)) for path in self.paths[index]]
        return decode(self.paths[index], partial(str, self.paths[index]))


def image_pairs(images: Sequence[Image.Image], captions: Sequence[str]) -> list[Pair]:
    """Pairs of images that are at hand; the identity of one that has no file is a hash of its pixels."""
    if isinstance(images, ImageFiles):
        return [_file_pair(path, os.path.realpath(path), caption) for path, caption in zip(images.paths, captions)]
    pairs = []
    for i, (image, caption) in enumerate(zip(images, captions)):
        digest = hashlib.blake2b(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()
        pairs.append(Pair(f"image {i}", caption, f"pixels {digest}", partial(image.convert, "RGB")))
    return pairs


def read_pairs(source: str, skipped: Skipped) -> Iterator[Pair]:
    """Stream the pairs of a source in an order that stays; no image is decoded before its `open()`.

    source: a folder with metadata.jsonl (the hub's imagefolder convention: rows with file_name, relative to the folder,
    and text); a folder with a caption .txt beside each image, searched to the bottom; or WebDataset's tar shards by
    path or glob, in the order of their names: members whose names agree up to the first dot of the last part belong
    together, the caption is the .txt or "text" or "caption" of the .json. A caption or image that is missing goes to
    `skipped`. InputError where the source is not there, holds nothing, is damaged, or has more than 5 % of such.
    """
    skipped.begin(source)
    pairs = 0
    for pair in _folder(source, skipped) if os.path.isdir(source) else _shards(source, skipped):
        pairs += 1
        yield pair
    if pairs + skipped.listed == 0:
        raise InputError(f"{source}: holds no images with captions; {ACCEPTED}")
    skipped.check(pairs)


def _file_pair(path: str, real: str, caption: object) -> Pair:
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise Unusable(path, f"the image is missing ({first_line(error)})") from error
    if not stat.S_ISREG(found.st_mode):
        raise Unusable(path, "the image is missing (not a file)")
    identity = f"{real}|{found.st_size}|{found.st_mtime_ns}"
    return Pair(path, _caption(path, caption), identity, partial(decode, path, partial(str, path)))


def _caption(name: str, text: object) -> str:
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        str(text).encode()  # JSON may hold halves of surrogate pairs
    except UnicodeError as error:
        raise Unusable(name, "its caption is not UTF-8") from error
    if not isinstance(text, str) or not text.strip():
        raise Unusable(name, "it has no caption")
    return text.strip()


def _folder(source: str, skipped: Skipped) -> Iterator[Pair]:
    rows = _metadata(source) if os.path.isfile(os.path.join(source, METADATA)) else _beside(source)
    root = os.path.realpath(source)
    for name, caption in rows:
        try:
            pair = _file_pair(os.path.join(source, name), os.path.join(root, name), caption)
        except Unusable as error:
            skipped.add(error, listed=True)
        else:
            yield pair


def _metadata(folder: str) -> Iterator[tuple[str, object]]:
    """(file_name, text) of each row."""
    path = os.path.join(folder, METADATA)
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                name = row.get("file_name") if isinstance(row, dict) else None
                if not isinstance(name, str) or not name:
                    raise InputError(f"{path}, line {number}: a JSON object with file_name and text is needed")
                if os.path.isabs(name) or ".." in Path(name).parts:
                    raise InputError(f"{path}, line {number}: file_name {name!r} leaves the folder")
                yield name, row.get("text")
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {number}: cannot be read as JSON lines ({first_line(error)})") from error


def _beside(folder: str) -> Iterator[tuple[str, object]]:
    """(name relative to the folder, content of the .txt) of each image, however deep; hidden ones are left alone."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        within = os.path.relpath(place, folder)
        captions = {name for name in files if name.endswith(".txt")}
        for name in sorted(files):
            stem, _, kind = name.rpartition(".")
            if not stem or name.startswith(".") or kind.lower() not in KINDS:
                continue
            text = read_bytes(Path(place, f"{stem}.txt")) if f"{stem}.txt" in captions else None
            yield name if within == "." else os.path.join(within, name), text


def _shards(source: str, skipped: Skipped) -> Iterator[Pair]:
    shards = [source] if os.path.isfile(source) else sorted(glob.glob(source, recursive=True))
    if not shards:
        raise InputError(f"{source}: not found; {ACCEPTED}")
    for shard in shards:
        if not shard.lower().endswith(SHARDS) or not os.path.isfile(shard):
            raise InputError(f"{shard}: not a shard; {ACCEPTED}")
    for shard in shards:
        found = os.stat(shard)
        version = f"{found.st_size}|{found.st_mtime_ns}"
        for _, members in groupby(_members(shard), lambda member: member.sample):
            try:
                pair = _sample(list(members), os.path.realpath(shard), version)
            except Unusable as error:
                skipped.add(error, listed=True)
            else:
                yield pair


@dataclass(frozen=True)
class _Member:
    shard: str
    path: str  # in the shard
    sample: str  # what the names of its sample's members have in common
    kind: str  # the rest of the name
    read: Callable[[], bytes]


def _sample(members: list[_Member], shard: str, version: str) -> Pair:
    """The pair of one sample's members."""
    images = [member for member in members if member.kind in SHARDED]
    texts = {member.kind: member for member in members if member.kind in ("txt", "json")}
    first = (images or members)[0]
    name = f"{first.shard}/{first.path}"
    if not images:
        raise Unusable(name, "the image is missing")
    text: object = None
    if "txt" in texts:
        text = texts["txt"].read()
    elif "json" in texts:
        try:
            row = json.loads(texts["json"].read())
        except (ValueError, RecursionError) as error:
            raise Unusable(name, f"its .json cannot be read ({first_line(error)})") from error
        text = (row.get("text") or row.get("caption")) if isinstance(row, dict) else None
    identity = f"{shard}/{first.path}|{version}"
    return Pair(name, _caption(name, text), identity, partial(decode, name, lambda: io.BytesIO(first.read())))


def _members(shard: str) -> Iterator[_Member]:
    """Images and captions of a shard; images of one that is not compressed are read when they are asked for."""
    packed = not shard.lower().endswith(".tar")
    try:
        # compressed shards through gzip, which checks what tarfile would not, and forward only
        opened: Any = gzip.open if packed else open
        with opened(shard, "rb") as file, tarfile.open(fileobj=file, mode="r|" if packed else "r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # or a large shard's headers would all stay in memory
                folder, slash, base = info.name.rpartition("/")
                stem, _, kind = base.partition(".")
                kind = kind.lower()
                if not info.isfile() or not stem or kind not in (*SHARDED, "txt", "json"):
                    continue
                if not packed and kind in SHARDED:
                    read = partial(_read, shard, info.offset_data, info.size)
                else:  # in passing: of a compressed shard there is no way back
                    read = partial(bytes, tar.extractfile(info).read())  # type: ignore[union-attr]  # a file's
                yield _Member(shard, info.name, folder + slash + stem, kind, read)
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


def shuffled(position: Tensor, length: int, seed: int) -> Tensor:
    """Which of `length` entries (1 to 2**40) come at these positions (N,) int64 of an endless shuffled reading.

    Position p is entry p % length of epoch p // length, each epoch a pseudo-random permutation of 0..length-1 keyed by
    (seed, epoch): any process computes any batch with neither state nor replay. The permutation is a Feistel network
    over Z_a x Z_b, a b >= length, whose values outside are encrypted again until they are inside (Black & Rogaway 2002,
    "Ciphers with arbitrary finite domains", generalized Feistel and cycle walking); its round function is the mixer
    of SplitMix64 (Steele, Lea & Flood 2014). For shuffling, not for secrets.
    """
    if not 1 <= length <= LARGEST:
        raise ValueError(f"length={length}; accepted: 1 to 2**40")
    epoch, place = np.divmod(position.numpy().reshape(-1), length)
    value = place.astype(np.uint64)
    key = _mix(_mix(np.full_like(value, seed % 2**64)) ^ epoch.astype(np.uint64))
    value = _permute(value, key, length)
    while (outside := value >= length).any():
        value[outside] = _permute(value[outside], key[outside], length)
    return torch.from_numpy(value.astype(np.int64)).view(position.shape)


def _permute(value: np.ndarray, key: np.ndarray, length: int) -> np.ndarray:
    """A permutation of 0 .. a b - 1 for each key."""
    a = math.isqrt(length - 1) + 1
    b = -(-length // a)
    right, left = np.divmod(value, np.uint64(a))  # left in Z_a, right in Z_b
    for i in range(ROUNDS):
        round_key = _mix(key + np.uint64((i + 1) * 0x9E3779B97F4A7C15 % 2**64))
        if i % 2 == 0:
            left = (left + _mix(round_key ^ right) % np.uint64(a)) % np.uint64(a)
        else:
            right = (right + _mix(round_key ^ left) % np.uint64(b)) % np.uint64(b)
    return right * np.uint64(a) + left


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's mixer of 64 bits."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
