"""Images and captions from disk: every layout, everything that can be wrong with it, and the order of reading."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from seeded import image

from minialign.data import (
    ImageFiles,
    Skipped,
    Unusable,
    check_source,
    image_files,
    image_pairs,
    open_image,
    read_pairs,
    shuffled,
)
from minialign.files import InputError


def encoded(number: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image(9 + number, 8, "RGB").save(stream, kind)
    return stream.getvalue()


def read(source: Path | str, log: Path, part: tuple[int, int] = (0, 1)) -> tuple[list, Skipped]:
    skipped = Skipped(log, part)
    return list(read_pairs(str(source), skipped)), skipped


def logged(path: Path) -> dict[str, str]:
    """What the log says: the last part of the name -> why."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {Path(row["name"]).name: row["why"] for row in rows}


def beside(folder: Path, number: int) -> Path:
    """A folder of images with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        (folder / f"{i:03d}.png").write_bytes(encoded(i))
        (folder / f"{i:03d}.txt").write_text(f"caption {i}\n")
    return folder


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def samples(first: int, number: int) -> dict[str, bytes]:
    members = {}
    for i in range(first, first + number):
        members |= {f"{i:05d}.png": encoded(i), f"{i:05d}.txt": f"caption {i}".encode()}
    return members


# ------------------------------------------------------------------------------------------------------------ layouts
def test_metadata(tmp_path):
    folder = tmp_path / "set"
    beside(folder / "part", 3)
    rows = [{"file_name": f"part/{i:03d}.png", "text": f" text {i} "} for i in (2, 0, 1)]
    (folder / "metadata.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    pairs, skipped = read(folder, tmp_path / "log.jsonl")
    assert [pair.caption for pair in pairs] == ["text 2", "text 0", "text 1"]  # the file's order, not the .txt
    assert [pair.name for pair in pairs] == [str(folder / row["file_name"]) for row in rows]
    assert pairs[0].open().tobytes() == image(11, 8, "RGB").tobytes()
    assert skipped.listed == 0 and (tmp_path / "log.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "../secret.png", "text": "a"}', r"metadata.jsonl, line 1: file_name '../secret.png' leaves"),
        ('{"file_name": "/etc/a.png", "text": "a"}', "line 1: file_name '/etc/a.png' leaves"),
        ("[1]", "line 1: a JSON object with file_name and text .* is needed"),
        ('{"text": "a"}', "line 1: no file_name; needed: file_name and text"),
        ("{", "line 1: cannot be read as JSON lines"),
        ("[" * 100_000, "line 1: cannot be read as JSON lines"),
    ],
)
def test_metadata_that_is_wrong(tmp_path, line, message):
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(InputError, match=message):
        read(tmp_path, tmp_path / "log.jsonl")


def test_captions_beside_images(tmp_path):
    folder = beside(tmp_path / "set" / "b", 2).parent
    for name in ("z.JPG", "y.jpeg", "x.webp", "w.bmp"):
        kind = {"JPG": "JPEG"}.get(name[2:], name[2:].upper())
        (folder / name).write_bytes(encoded(1, kind))
        (folder / f"{name[0]}.txt").write_text(f"\ufeffa {kind}", encoding="utf-8")
    beside(folder / "a", 1)
    beside(folder / ".hidden", 1)
    (folder / "._z.JPG").write_bytes(b"of another system")
    (folder / "README.txt").write_text("about")
    (folder / "notes.md").write_text("more")
    pairs, skipped = read(folder, tmp_path / "log.jsonl")
    names = ["w.bmp", "x.webp", "y.jpeg", "z.JPG", "a/000.png", "b/000.png", "b/001.png"]
    assert [os.path.relpath(pair.name, folder) for pair in pairs] == names
    assert [pair.caption for pair in pairs][:5] == ["a BMP", "a WEBP", "a JPEG", "a JPEG", "caption 0"]
    assert all(pair.open().mode == "RGB" and pair.open().size == (10, 8) for pair in pairs[:4])
    assert skipped.listed == 0


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz"])
def test_shards(tmp_path, suffix):
    tar(tmp_path / f"b-1.{suffix}", samples(3, 2))
    members = {"notes": b"no dot", ".hidden.png": b"", "in/a.b.c/": b""} | samples(0, 2)
    members |= {"in/x.y/7.cls": b"1", "in/x.y/7.JPG": encoded(7, "JPEG"), "in/x.y/7.json": b'{"caption": "by json"}'}
    members |= {
        "in/8.json": b'{"text": "no", "caption": "other"}',
        "in/8.txt": b"by txt",
        "in/8.webp": encoded(8, "WEBP"),
    }
    members |= {"8.seg.png": b"a mask", "8.png": encoded(9), "8.json": b'{"text": "of text", "caption": "no"}'}
    tar(tmp_path / f"b-0.{suffix}", members)
    opened = []
    for pair in read_pairs(str(tmp_path / f"b-*.{suffix}"), Skipped(tmp_path / "log.jsonl")):
        opened.append((os.path.relpath(pair.name, tmp_path), pair.caption, pair.open()))
    shard = f"b-0.{suffix}"
    assert [name for name, _, _ in opened] == [
        f"{shard}/00000.png", f"{shard}/00001.png", f"{shard}/in/x.y/7.JPG", f"{shard}/in/8.webp", f"{shard}/8.png",
        f"b-1.{suffix}/00003.png", f"b-1.{suffix}/00004.png",
    ]  # fmt: skip
    assert [text for _, text, _ in opened[:5]] == ["caption 0", "caption 1", "by json", "by txt", "of text"]
    assert [picture.size[0] for _, _, picture in opened] == [9, 10, 16, 17, 18, 12, 13]
    assert opened[1][2].tobytes() == image(10, 8, "RGB").tobytes()
    one, _ = read(tmp_path / f"b-1.{suffix}", tmp_path / "log.jsonl")
    assert [pair.caption for pair in one] == ["caption 3", "caption 4"]


def test_identity_changes_when_the_file_does(tmp_path):
    folder = beside(tmp_path / "set", 2)
    shard = tar(tmp_path / "a.tar", samples(0, 2))

    def identities() -> list[str]:
        return [pair.identity for source in (folder, shard) for pair in read(source, tmp_path / "log.jsonl")[0]]

    before = identities()
    assert len(set(before)) == 4 and identities() == before
    os.utime(folder / "000.png", ns=(0, 123))  # another content of the same size
    (folder / "001.txt").write_text("another caption")
    os.utime(shard, ns=(0, 123))
    after = identities()
    assert after[1] == before[1] and all(after[i] != before[i] for i in (0, 2, 3))
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert [pair.identity for pair in read(link, tmp_path / "log.jsonl")[0]] == after[:2]


def named(folder: Path, names: list[str]) -> Path:
    """Files of a folder, small images with other content each."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        (folder / name).write_bytes(encoded(i))
    return folder


def rows_of(names: list[str], key: str = "text") -> list[dict]:
    return [{"file_name": name, key: f"of {name}"} for name in names]


def as_csv(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader(), writer.writerows(rows)


NAMES = ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
def test_captions_by_other_names_and_in_other_files(tmp_path, key):
    source = tmp_path / "set"
    (named(source / "a", NAMES) / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows_of(NAMES, key))))
    as_csv(named(source / "b" / "train", NAMES) / "metadata.csv", rows_of(NAMES, key.upper()))
    named(source / "c", NAMES)
    (source / "c" / "0.CAPTION").write_text("of 0.png")
    (source / "c" / "1.json").write_text(json.dumps({"width": 3, key: "of 1.png"}))
    (source / "c" / "2.txt").write_text("of 2.png")
    (source / "c" / "2.json").write_text("{")  # not read, for .txt goes first
    pairs, skipped = read(source, tmp_path / "log.jsonl")
    assert [pair.name for pair in pairs] == [
        str(source / part / name) for part in ("a", "b/train", "c") for name in NAMES
    ]
    assert [pair.caption for pair in pairs] == [f"of {name}" for name in NAMES] * 3 and skipped.listed == 0
    members = {"0.png": encoded(0), "0.caption": b"of 0.png", "1.jfif": encoded(1, "JPEG")}
    pairs, _ = read(
        tar(tmp_path / "a.tar", members | {"1.json": json.dumps({key: "x"}).encode()}), tmp_path / "log.jsonl"
    )
    assert [pair.caption for pair in pairs] == ["of 0.png", "x"] and pairs[1].open().size == (10, 8)


@pytest.mark.parametrize("kind", ["jsonl", "json", "tar"])
def test_one_caption_of_a_list(tmp_path, kind):
    texts = {name: [f"{name} {i}" for i in range(5)] + ["", 7] for name in map(str, range(40))}
    source = named(tmp_path / "set", [f"{name}.png" for name in texts])
    if kind == "jsonl":
        rows = [{"file_name": f"{name}.png", "text": text} for name, text in texts.items()]
        (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in texts.items() if kind != "jsonl" else ():
        (source / f"{name}.json").write_text(json.dumps({"caption": text}))
    if kind == "tar":
        files = {path.name: path.read_bytes() for path in sorted(source.iterdir())}
        source = tar(tmp_path / "set.tar", files)

    def captions(place: Path, seed: int) -> list[str]:
        return sorted(pair.caption for pair in read_pairs(str(place), Skipped(tmp_path / "log.jsonl"), seed))

    first = captions(source, 0)
    assert {caption.split()[0] for caption in first} == texts.keys()
    assert {caption.split()[1] for caption in first} == set("01234")  # each of them somewhere
    assert captions(source, 0) == first != captions(source, 1)
    moved = source.rename(tmp_path / "elsewhere") if kind != "tar" else source
    assert captions(moved, 0) == first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file_name,label\n0.png,a\n", "metadata.csv: file_name and text .* needed, .* found: file_name, label"),
        ("file_name;text\n0.png;a\n", "metadata.csv: .*separated by commas; found: file_name;text"),
        ("", "metadata.csv: .*found: none"),
        ("file_name,text\n0.png,a circle, red\n", "metadata.csv, line 2: not 2 columns"),
        ("text,file_name\na\n", "metadata.csv, line 2: not 2 columns"),
        ('file_name,text\n0.png,"a" b\n', "metadata.csv, line 2: cannot be read as CSV"),
        ('file_name,text\n0.png,"a\n', "metadata.csv, line 2: cannot be read as CSV"),
        ("file_name,text\n../0.png,a\n", "line 2: file_name '../0.png' leaves the folder"),
        ("file_name,text\n0.png,\udcff\n", "metadata.csv, after line 0: cannot be read .*utf-8"),
        ("file_name,text\n0.png," + "a" * 200_000, "metadata.csv, line 2: cannot be read as CSV"),
        ("file_name,text\n" + "a" * 2**21, "metadata.csv, line 2: longer than 1,048,576 characters"),
    ],
)
def test_a_table_that_is_wrong(tmp_path, content, message):
    named(tmp_path, NAMES)
    (tmp_path / "metadata.csv").write_bytes(content.encode("utf-8", "surrogateescape"))
    for call in (lambda: read(tmp_path, tmp_path / "log.jsonl"), lambda: check_source(str(tmp_path))):
        with pytest.raises(InputError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    (tmp_path / "metadata.jsonl").write_text("{}")
    with pytest.raises(InputError, match="has metadata.jsonl and metadata.csv; accepted: one of them"):
        read(tmp_path, tmp_path / "log.jsonl")


def test_linked_folders_are_read_once(tmp_path):
    source, other = beside(tmp_path / "set" / "a", 4).parent, beside(tmp_path / "other", 6)
    (source / "linked").symlink_to(other)
    (source / "again").symlink_to(other)
    (other / "up").symlink_to(source)  # leads back
    (source / "a" / "100.png").symlink_to(other / "005.png")
    (source / "a" / "100.txt").symlink_to(other / "005.txt")
    pairs, skipped = read(source, tmp_path / "log.jsonl")
    assert len(pairs) == 4 + 6 + 1 and skipped.listed == 0
    assert len({os.path.realpath(pair.name) for pair in pairs}) == 10
    assert image_files(source) == (sorted(Path(pair.name) for pair in pairs), [])


def test_images_of_every_kind_are_read_or_named(tmp_path):
    source = tmp_path / "set"
    beside(source, 200)
    formats = {"jfif": "JPEG", "gif": "GIF", "tif": "TIFF", "TIFF": "TIFF", "JFIF": "JPEG"}
    for kind, form in formats.items():
        (source / f"x.{kind}").write_bytes(encoded(1, form))
    for kind in ("heic", "avif", "JXL"):
        (source / f"x.{kind}").write_bytes(b"?")
    (source / "x.txt").write_text("caption")
    (source / "metadata.parquet").write_bytes(b"PAR1")
    (source / "gone").symlink_to(tmp_path / "elsewhere")
    (source / "x.npz").write_bytes(b"of a cache")
    pairs, skipped = read(source, tmp_path / "log.jsonl")
    assert len(pairs) == 205 and all(pair.open().size == (10, 8) for pair in pairs[200:])
    why = logged(tmp_path / "log.jsonl")
    assert list(why) == ["gone", "metadata.parquet", "x.JXL", "x.avif", "x.heic"] and skipped.listed == 5
    assert why["x.JXL"].startswith(".jxl is not read; accepted: png, ") and why["gone"] == "a link that leads nowhere"
    assert why["metadata.parquet"] == "not read; accepted: metadata.jsonl, metadata.csv"
    kinds = [{path.suffix for path in paths} for paths in image_files(source)]
    assert kinds == [{".png", *(f".{kind}" for kind in formats)}, {".heic", ".avif", ".JXL"}]
    members = samples(0, 40) | {"x.avif": b"?", "x.cls": b"1", "y.heic": b"?", "y.txt": b"a"}
    assert len(read(tar(tmp_path / "a.tar", members), tmp_path / "log.jsonl")[0]) == 40
    why = logged(tmp_path / "log.jsonl")
    assert why == {f"{name}": f"the image is missing (.{name[2:]} is not read)" for name in ("x.avif", "y.heic")}


def test_a_list_below_a_list(tmp_path):
    source = named(tmp_path / "set", NAMES)
    (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows_of([*NAMES, "far/away/0.png"]))))
    beside(source / "far", 2)  # not in the list
    as_csv(named(source / "far" / "away", NAMES) / "metadata.csv", rows_of(NAMES))
    pairs, _ = read(source, tmp_path / "log.jsonl")
    assert [pair.caption for pair in pairs] == [f"of {name}" for name in (*NAMES, "far/away/0.png", *NAMES)]
    again, _ = read(f"{source}/", tmp_path / "log.jsonl")
    assert [pair.identity for pair in again] == [pair.identity for pair in pairs]


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_names_that_repeat_in_a_shard(tmp_path, suffix):
    def shard(*members: tuple[str, bytes]) -> dict[str, tuple]:
        with tarfile.open(tmp_path / f"a.{suffix}", "w:gz" if suffix.endswith("gz") else "w") as file:
            for name, content in [*samples(0, 60).items(), *members]:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
        pairs = read_pairs(str(tmp_path / f"a.{suffix}"), Skipped(tmp_path / "log.jsonl"))
        return {Path(pair.name).name: (pair.caption, pair.open().size[0]) for pair in pairs}

    one, two = (("x.png", encoded(70)), ("x.txt", b"one")), (("x.png", encoded(71)), ("x.txt", b"two"))
    far = shard(("00007.png", encoded(80)), ("00007.txt", b"newer"))  # as tar -r leaves it
    assert far == {f"{i:05d}.png": (f"caption {i}", 9 + i) for i in range(60)}
    assert logged(tmp_path / "log.jsonl") == {"00007.png": "its name repeats in the shard"}
    for near in ((*one, *two), (one[0], two[0], one[1], two[1]), (one[0], *two), (*one, one[0])):
        assert shard(*near) == far, near  # which of them belong together cannot be told
        assert logged(tmp_path / "log.jsonl") == {"x.png": "its name repeats in the shard"}
    assert shard(*one)["x.png"] == ("one", 79)


def test_a_source_is_checked_before_it_is_needed(tmp_path):
    cases = {
        "lost": "lost: not found; accepted: a folder",
        "lost-*.tar": "not found",
        "empty": "holds no images with captions; accepted",
    }
    (tmp_path / "empty").mkdir()
    named(tmp_path / "bare", NAMES)
    cases["bare"] = "bare: 3 of 3 images .*first: .*0.png: it has no caption.; accepted: a folder"
    named(tmp_path / "alien", [f"{i}.heic" for i in range(9)])
    cases["alien"] = "alien: 9 of 9 .*.heic is not read; accepted: png, .*; accepted: a folder"
    (named(tmp_path / "keys", NAMES) / "metadata.jsonl").write_text('{"file_name": "0.png", "label": 3, "tags": "a"}')
    cases["keys"] = "keys: 1 of 1 .*it has no caption; keys: label, tags; accepted: text, caption, prompt"
    tar(tmp_path / "cls.tar", {"0.png": encoded(0), "0.cls": b"1"})
    cases["cls.tar"] = "cls.tar: 1 of 1 .*it has no caption"
    (beside(tmp_path / "many", 210) / "000.txt").unlink()
    for i in range(105):
        (tmp_path / "many" / f"{i:03d}.txt").unlink(missing_ok=True)
    cases["many"] = "many: 105 of the first 200 "
    for name, message in cases.items():
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError, match=message) as error:
            check_source(str(tmp_path / name))
        assert "\n" not in str(error.value) and sorted(tmp_path.rglob("*")) == before
    (tmp_path / "many" / "104.txt").write_text("a caption")
    for i in range(11, 104):
        (tmp_path / "many" / f"{i:03d}.txt").write_text("a caption")
    check_source(str(tmp_path / "many"))  # more than 5 % of its begin, not of all
    check_source(str(beside(tmp_path / "good", 3)))
    check_source(str(tar(tmp_path / "good.tar", samples(0, 3))))
    (tmp_path / "bad.tar").write_text("text" * 1000)
    with pytest.raises(InputError, match="bad.tar: damaged or cut short"):
        check_source(str(tmp_path / "bad.tar"))


# ------------------------------------------------------------------------------------------------- what cannot be used
def peak(call) -> int:
    """Most bytes that Python held at once during a call."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("what", ["caption", "json", "image", "name"])
def test_a_small_shard_does_not_fill_the_memory(tmp_path, what):
    path, size = tmp_path / "a.tar.gz", 2**26 + 512
    with gzip.open(path, "wb", compresslevel=1) as file, tarfile.open(fileobj=file, mode="w|") as archive:
        for name, content in samples(0, 40).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        info = tarfile.TarInfo({"caption": "x.txt", "json": "x.json"}.get(what, "x.png"))
        info.size, info.type = size, tarfile.XHDTYPE if what == "name" else tarfile.REGTYPE
        with open("/dev/zero", "rb") as zeros:
            archive.addfile(info, zeros)
        info = tarfile.TarInfo("x.txt" if what == "image" else "x.png")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"text"))
    assert path.stat().st_size < 2**21

    def use() -> None:
        try:
            pairs, skipped = read(path, tmp_path / "log.jsonl")
        except InputError as error:
            assert what == "name" and str(error).endswith(f"damaged or cut short (a header of {size:,} bytes)")
            return
        for pair in pairs:
            try:
                pair.open()
            except Unusable as error:
                skipped.add(error)
        (why,) = logged(tmp_path / "log.jsonl").values()
        limit = 2**26 if what == "image" else 2**20
        assert why == f"it has {size:,} bytes; accepted: up to {limit:,}"

    assert peak(use) < 2**24


def test_captions_that_are_no_captions_are_not_waited_for(tmp_path):
    folder = beside(tmp_path / "set", 60)
    (folder / "003.txt").unlink(), os.mkfifo(folder / "003.txt")
    (folder / "005.txt").write_bytes(b"a" * (2**20 + 1))
    (folder / "007.png").unlink(), os.mkfifo(folder / "007.png")
    pairs, skipped = read(folder, tmp_path / "log.jsonl")
    why = logged(tmp_path / "log.jsonl")
    assert len(pairs) == 57 and why == {
        "003.png": "its caption is missing (not a file)",
        "005.png": "its caption's file has 1,048,577 bytes; accepted: up to 1,048,576",
        "007.png": "the image is missing (not a file)",
    }
    (folder / "metadata.jsonl").write_text('{"file_name": "001.png", "text": "' + "a" * 2**21)
    with pytest.raises(InputError, match="metadata.jsonl, line 1: longer than 1,048,576 characters"):
        read(folder, tmp_path / "log.jsonl")


def test_what_the_listing_shows_is_skipped_and_named(tmp_path):
    folder = beside(tmp_path / "set", 100)
    (folder / "003.txt").unlink()
    (folder / "005.txt").write_text(" \n")
    (folder / "007.txt").write_bytes(b"\xff\xfe\x00")
    pairs, skipped = read(folder, tmp_path / "logs" / "log.jsonl")
    assert len(pairs) == 97 and skipped.listed == 3
    expected = {"003.png": "it has no caption", "005.png": "it has no caption", "007.png": "its caption is not UTF-8"}
    assert logged(tmp_path / "logs" / "log.jsonl") == expected
    rows = [{"file_name": f"{i:03d}.png", "text": "a"} for i in range(96)]
    rows += [{"file_name": "lost.png", "text": "a"}, {"file_name": "a\0b", "text": "a"}, {"file_name": "001.png"}]
    rows += [{"file_name": "002.png", "text": "\ud800"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs, _ = read(folder, tmp_path / "logs" / "log.jsonl")  # a new reading starts the log again
    assert len(pairs) == 96
    why = logged(tmp_path / "logs" / "log.jsonl")
    assert list(why) == ["lost.png", "a\0b", "001.png", "002.png"]
    assert why["lost.png"].startswith("the image is missing") and why["a\0b"].startswith("the image is missing")
    assert why["001.png"] == "it has no caption" and why["002.png"] == "its caption is not UTF-8"
    members = samples(0, 96) | {"a.txt": b"alone", "b.png": encoded(1), "c.png": encoded(1), "c.json": b"{"}
    members |= {"d.png": encoded(1), "d.json": b'{"text": [" "]}'}
    pairs, skipped = read(tar(tmp_path / "a.tar", members), tmp_path / "log.jsonl")
    assert len(pairs) == 96 and skipped.listed == 4
    why = logged(tmp_path / "log.jsonl")
    assert why.pop("c.png").startswith("its .json cannot be read")
    assert why == {"a.txt": "the image is missing", "b.png": "it has no caption", "d.png": "it has no caption"}


@pytest.mark.parametrize("bad", [1, 2])
def test_more_than_5_percent_stops(tmp_path, bad):
    folder = beside(tmp_path / "set", 20)
    for i in range(bad):
        (folder / f"{i:03d}.txt").unlink()
    if bad == 1:  # exactly 5 %
        assert len(read(folder, tmp_path / "log.jsonl")[0]) == 19
        return
    with pytest.raises(InputError) as error:
        read(folder, tmp_path / "log.jsonl")
    assert str(error.value).startswith(f"{folder}: 2 of 20 ") and str(tmp_path / "log.jsonl") in str(error.value)
    assert len(logged(tmp_path / "log.jsonl")) == 2


def test_each_process_has_a_log(tmp_path):
    folder, log = beside(tmp_path / "set", 40), tmp_path / "log.jsonl"
    (folder / "003.txt").unlink()
    (tmp_path / "log-2.jsonl").write_text("of more processes")
    (tmp_path / "log-book.jsonl").write_text("of somebody else")
    (_, second), (_, first) = read(folder, log, (1, 2)), read(folder, log, (0, 2))
    second.add(Unusable("a.png", "broken"))
    assert first.listed == second.listed == 1
    assert list(logged(log)) == ["003.png"] and logged(tmp_path / "log-1.jsonl") == {"a.png": "broken"}
    assert not (tmp_path / "log-2.jsonl").exists() and (tmp_path / "log-book.jsonl").exists()
    for skipped in (first, second):
        skipped.check(39, 1)
        with pytest.raises(InputError, match=r"3 of 40 .*log\*.jsonl"):
            skipped.check(39, 2)


def test_images_that_cannot_be_decoded(tmp_path, monkeypatch):
    folder = beside(tmp_path / "set", 6)
    (folder / "000.png").write_text("this is text")
    (folder / "001.png").write_bytes(encoded(40, "JPEG")[:-200])
    (folder / "002.png").write_bytes(encoded(40)[:-60])
    (folder / "003.png").write_bytes(b"")
    (folder / "004.png").unlink()
    (folder / "004.png").mkdir()
    pairs = {Path(pair.name).name: pair for pair in read(folder, tmp_path / "log.jsonl")[0]}

    def why(name: str) -> str:
        with pytest.raises(Unusable) as error:
            pairs[name].open()
        assert str(error.value) == f"{error.value.name}: {error.value.why}" and "\n" not in str(error.value)
        assert error.value.name == str(folder / name)
        return error.value.why

    assert why("000.png") == why("003.png") and "004.png" not in pairs
    assert why("000.png").startswith("not an image; accepted: PNG, JPEG")
    assert "truncated" in why("001.png") and why("002.png").startswith("the image cannot be read")
    pixels = image(14, 8, "RGB").size[0] * 8
    assert pairs["005.png"].open().size == (14, 8)
    for limit in (pixels - 1, pixels // 3):  # PIL warns of the one and refuses the other
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert f"up to {limit} pixels" in why("005.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    assert pairs["005.png"].open().size == (14, 8)


def test_sources_that_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").write_bytes(b"")
    tar(tmp_path / "none.tar", {"a.cls": b"1"})
    for source, message in {
        "lost": "lost: not found; accepted: a folder with metadata.jsonl",
        "lost-*.tar": r"lost-\*.tar: not found",
        "empty": "empty: holds no images with captions",
        "none.tar": "none.tar: holds no images with captions",
        "a.zip": "a.zip: not a shard; accepted",
        "em*": "empty: not a shard",
    }.items():
        with pytest.raises(InputError, match=message):
            read(tmp_path / source, tmp_path / "log.jsonl")


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_a_damaged_shard_is_one_line(tmp_path, suffix):
    whole = tar(tmp_path / f"a.{suffix}", samples(0, 30)).read_bytes()
    path = tmp_path / f"b.{suffix}"
    spoiled = [whole[:size] for size in (0, 100, len(whole) // 2, len(whole) // 3 // 512 * 512)]
    if suffix == "tar":
        end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # where the zeros begin that mark the end
        spoiled += [whole[:end], whole[: end - 1]]
        for member in (1, 20, 59):
            header = whole.index(f"{member // 2:05d}.{('png', 'txt')[member % 2]}".encode())
            spoiled.append(whole[:header] + b"\xff" * 512 + whole[header + 512 :])
    else:
        spoiled += [whole[:-1], whole[:-8]]
        for place in (len(whole) // 8, len(whole) // 2, len(whole) - 20):
            spoiled.append(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
    for content in spoiled:
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"b.{suffix}: damaged or cut short") as error:
            read(path, tmp_path / "log.jsonl")
        assert "\n" not in str(error.value)
    path.write_text("not a shard at all, but text" * 100)
    with pytest.raises(InputError, match=f"b.{suffix}: damaged or cut short"):
        read(path, tmp_path / "log.jsonl")


# ------------------------------------------------------------------------------------------------- images at hand
def test_image_files(tmp_path):
    folder = beside(tmp_path, 5)
    files = ImageFiles(sorted(folder.glob("*.png")))
    wanted = [image(9 + i, 8, "RGB").tobytes() for i in range(5)]
    assert len(files) == 5 and [picture.tobytes() for picture in files] == wanted
    assert files[-1].tobytes() == wanted[-1]
    assert [picture.tobytes() for picture in files[1:4:2]] == wanted[1:4:2]
    with pytest.raises(IndexError):
        files[5]
    Image.fromarray(np.zeros((4, 3), np.uint8)).save(folder / "000.png")  # grey
    assert files[0].mode == "RGB" and files[0].size == (3, 4)
    (folder / "001.png").unlink()
    with pytest.raises(InputError, match="001.png: the image is missing"):
        files[0:2]


def over_white(image: Image.Image) -> np.ndarray:
    """c alpha + 255 (1 - alpha), rounded."""
    array = np.asarray(image.convert("RGBA"), np.float64)
    alpha = array[:, :, 3:] / 255
    return np.rint(array[:, :, :3] * alpha + 255 * (1 - alpha))


def test_what_is_transparent_lies_on_white(tmp_path):
    grey, palette = image(9, 8, "LA"), image(9, 8, "RGB").quantize(16)
    shown = {"rgba.png": image(9, 8, "RGBA"), "rgba.webp": image(9, 8, "RGBA"), "la.png": grey}
    for name, picture in shown.items():
        picture.save(tmp_path / name, lossless=True)
    for name, how in {"p.png": {"transparency": bytes(range(0, 256, 16))}, "p.gif": {"transparency": 3}}.items():
        palette.save(tmp_path / name, **how)
        shown[name] = Image.open(tmp_path / name).convert("RGBA")
    plain = image(9, 8, "RGB")
    plain.save(tmp_path / "key.png", transparency=plain.getpixel((2, 3)))
    shown["key.png"] = plain.convert("RGBA")
    shown["key.png"].putpixel((2, 3), (0, 0, 0, 0))
    for name, picture in shown.items():
        found = open_image(tmp_path / name)
        assert found.mode == "RGB" and np.abs(np.asarray(found, float) - over_white(picture)).max() <= 1, name
        assert open_image((tmp_path / name).read_bytes()).tobytes() == found.tobytes()
        (pair,) = image_pairs([Image.open(tmp_path / name)], ["a"])
        assert pair.open().tobytes() == found.tobytes()
    assert open_image(tmp_path / "key.png").getpixel((2, 3)) == (255, 255, 255)


def test_sixteen_bits_become_eight(tmp_path):
    values = np.linspace(0, 65535, 20 * 30).reshape(20, 30).astype(np.uint16)
    expected = np.repeat((values // 256).astype(np.uint8)[:, :, None], 3, axis=2)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "a.tif")
    Image.fromarray(values.astype(">u2")).save(tmp_path / "b.tif")
    (tmp_path / "a.pgm").write_bytes(b"P5 30 20 65535\n" + values.astype(">u2").tobytes())
    for name in ("a.png", "a.tif", "b.tif", "a.pgm"):
        assert np.array_equal(np.asarray(open_image(tmp_path / name)), expected), name
    Image.fromarray(values).save(tmp_path / "key.png", transparency=int(values[5, 7]))
    expected[5, 7] = 255
    assert np.array_equal(np.asarray(open_image(tmp_path / "key.png")), expected)
    for mode in ("I", "F"):
        Image.new(mode, (4, 4)).save(tmp_path / "c.tif")
        with pytest.raises(Unusable, match=f"c.tif: .*its mode is {mode}; accepted: 8 or 16 bits a channel"):
            open_image(tmp_path / "c.tif")


def test_images_that_would_cost_too_much(tmp_path):
    Image.new("L", (12_000, 1)).save(tmp_path / "a.png")
    with pytest.raises(
        Unusable, match="a.png: the image is 12000 x 1 pixels; accepted: up to 100 times as long as wide"
    ):
        open_image(tmp_path / "a.png")
    Image.new("L", (3, 300)).save(tmp_path / "b.png")
    assert open_image(tmp_path / "b.png").size == (3, 300)
    image(9, 8, "RGB").save(tmp_path / "c.png", "EPS")  # would start another program
    os.mkfifo(tmp_path / "d.png")
    for name, why in {
        "c.png": "not an image",
        "d.png": "the image is missing .not a file",
        ".": ".* .not a file",
    }.items():
        with pytest.raises(Unusable, match=f"{name}: {why}"):
            open_image(tmp_path / name)
    with pytest.raises(Unusable, match="x/y: not an image"):
        open_image(b"", "x/y")


def test_images_stand_upright(tmp_path):
    picture, exif = image(9, 8, "RGB"), Image.Exif()
    exif[0x0112] = 6  # turned by the camera
    picture.save(tmp_path / "a.png", exif=exif)
    assert ImageFiles([tmp_path / "a.png"])[0].tobytes() == picture.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_images_at_hand_are_told_apart_by_what_they_show():
    one = Image.fromarray(np.zeros((4, 4), np.uint8), "P")
    two = one.copy()
    one.putpalette([255, 0, 0]), two.putpalette([0, 0, 255])
    a, b, c = image_pairs([one, two, one.convert("RGB")], ["a"] * 3)
    assert a.identity == c.identity != b.identity


def test_pairs_of_images_at_hand(tmp_path):
    folder = beside(tmp_path, 2)
    files = image_pairs(ImageFiles(sorted(folder.glob("*.png"))), ["a", "b"])
    assert [pair.identity for pair in files] == [pair.identity for pair in read(folder, tmp_path / "log.jsonl")[0]]
    assert [pair.caption for pair in files] == ["a", "b"]
    pictures = [image(9, 8, "RGB"), image(9, 8, "L"), image(8, 9, "RGB"), image(9, 8, "RGB")]
    a, b, c, again = image_pairs(pictures, ["a"] * 4)
    assert a.identity == again.identity and len({a.identity, b.identity, c.identity}) == 3
    assert b.open().mode == "RGB" and a.open().tobytes() == pictures[0].tobytes()
    with pytest.raises(Unusable, match="lost.png: the image is missing"):
        image_pairs(ImageFiles([tmp_path / "lost.png"]), ["a"])


# ------------------------------------------------------------------------------------------------------------ shuffled
def test_shuffled_is_a_permutation_of_each_epoch():
    for length in [*range(1, 67), 255, 256, 257, 999, 1024, 4097, 10_007]:
        epochs = shuffled(torch.arange(3 * length), length, seed=7).view(3, length)
        for epoch in epochs:
            assert torch.equal(epoch.sort().values, torch.arange(length)), length
        if length > 20:
            assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
            assert not torch.equal(epochs[0], shuffled(torch.arange(length), length, seed=8))


def test_shuffled_needs_neither_state_nor_order():
    whole = shuffled(torch.arange(5000), 777, seed=3)
    g = torch.Generator().manual_seed(0)
    some = torch.randint(5000, (4, 25), generator=g)
    assert torch.equal(shuffled(some, 777, seed=3), whole[some])
    far = torch.tensor([2**40, 5 * 2**40 + 1, 2**62])
    values = shuffled(far, 777, seed=2**70)
    assert values.dtype == torch.int64 and (values >= 0).all() and (values < 777).all()
    with pytest.raises(ValueError, match="length=0; accepted: 1 and more"):
        shuffled(torch.arange(2), 0, seed=0)


def test_an_epoch_is_shuffled_once(monkeypatch):
    calls, permute = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **how: calls.append(n) or permute(n, **how))
    for start in range(0, 4002, 64):
        shuffled(torch.arange(start, start + 64), 2001, seed=987654321)
    assert calls == [2001] * 3  # of three epochs, though batches begin in one and end in the next


@pytest.mark.parametrize("length", [2, 3, 5, 8, 30])
def test_where_a_position_goes_is_uniform_over_seeds_and_epochs(length):
    number = 2000
    counts = np.zeros((2, length, length))
    for seed in range(number):
        values = shuffled(torch.arange(length), length, seed=seed)
        counts[0, np.arange(length), values] += 1
    epochs = shuffled(torch.arange(number * length), length, seed=1).view(number, length)
    for place in range(length):
        counts[1, place] = np.bincount(epochs[:, place], minlength=length)
    expected = number / length
    chi_square = ((counts - expected) ** 2 / expected).sum(2)  # (2, length), length - 1 degrees of freedom each
    degrees = length - 1
    # Wilson & Hilferty 1931: a standard normal; 4.5 standard deviations for the largest of all
    z = ((chi_square / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / (2 / (9 * degrees)) ** 0.5
    assert z.max() < 4.5


def test_neighbours_have_nothing_to_do_with_each_other():
    length = 100_003
    values = shuffled(torch.arange(2 * length), length, seed=11).double()
    for lag in (1, 2, 3, 64, length):  # the last one: the same position in the next epoch
        a, b = values[:length], values[lag : lag + length]
        correlation = torch.corrcoef(torch.stack([a, b]))[0, 1].item()
        assert abs(correlation) < 4.5 / length**0.5, lag
    steps = (values[1:length] - values[: length - 1]) % length
    counts = torch.histc(steps, 50, 0, length)
    assert ((counts - length / 50) ** 2 / (length / 50)).sum() < 49 + 4.5 * (2 * 49) ** 0.5
