"""Images and captions from disk: every layout, everything that can be wrong with it, and the order of reading."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from seeded import image

from minialign.data import LARGEST, ImageFiles, Skipped, Unusable, image_pairs, read_pairs, shuffled
from minialign.models.pretrained import InputError


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
        ("[1]", "line 1: a JSON object with file_name and text is needed"),
        ('{"text": "a"}', "line 1: a JSON object with file_name and text is needed"),
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


# ------------------------------------------------------------------------------------------------- what cannot be used
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
    members |= {"d.png": encoded(1), "d.json": b'{"text": ["a"]}'}
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

    assert why("000.png") == why("003.png") == "not an image" and "004.png" not in pairs
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
    with pytest.raises(InputError, match="001.png: the image cannot be read"):
        files[0:2]


def test_images_stand_upright(tmp_path):
    picture, exif = image(9, 8, "RGB"), Image.Exif()
    exif[0x0112] = 6  # turned by the camera
    picture.save(tmp_path / "a.png", exif=exif)
    assert ImageFiles([tmp_path / "a.png"])[0].tobytes() == picture.transpose(Image.Transpose.ROTATE_270).tobytes()


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
    far = torch.tensor([LARGEST - 1, LARGEST, 5 * LARGEST + 1, 2**62])
    values = shuffled(far, LARGEST, seed=2**70)
    assert values.dtype == torch.int64 and (values >= 0).all() and (values < LARGEST).all()
    large = shuffled(torch.arange(200_000), LARGEST - 12_345, seed=0)
    assert len(large.unique()) == 200_000 and large.max() > 0.99 * LARGEST
    for length in (0, LARGEST + 1):
        with pytest.raises(ValueError, match="accepted: 1 to 2"):
            shuffled(torch.arange(2), length, seed=0)


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
