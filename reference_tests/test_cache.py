"""What frozen networks say, kept on disk: the numbers as computed anew, computed once, by any number of processes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from comparisons import GOLDENS, SMALL_UNET
from PIL import Image
from safetensors.torch import load_file, save_file
from seeded import filled, image

from minialign import Pipeline
from minialign.data import ImageFiles, Skipped, Unusable, image_pairs, open_image
from minialign.data import cache as module
from minialign.data.cache import KEY, Cache, encode_pairs, encode_texts, features, pipeline_digest
from minialign.data.pairs import READING
from minialign.diffusion import NoiseSchedule
from minialign.files import InputError
from minialign.models.clip import CLIP, ProjectedTextEncoder, TextEncoder
from minialign.models.tokenizer import Tokenizer
from minialign.models.unet import UNet
from minialign.models.vae import VAE
from minialign.pipeline import PREPROCESSING, resized

TOKENIZER = Tokenizer.from_pretrained(GOLDENS / "tokenizer")
TEXT = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "eos_token_id": 2}
TEXT |= {"vocab_size": max(TOKENIZER.vocab.values()) + 1, "projection_dim": 6}


def small_pipeline(xl: bool = False, seed: int = 0, sample_size: int = 8) -> Pipeline:
    """Images of 2 x 8 pixels."""
    vae = filled(VAE({"block_out_channels": [4, 4], "norm_num_groups": 2, "sample_size": 16}), seed)
    unet = SMALL_UNET | {"sample_size": sample_size, "cross_attention_dim": 16 if xl else 8}
    parts = {}
    if xl:
        unet |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 2}
        unet |= {"projection_class_embeddings_input_dim": 6 + 6 * 2}
        parts = {"text_encoder_2": filled(ProjectedTextEncoder(TEXT), seed + 1), "tokenizer_2": TOKENIZER}
    tower = filled(TextEncoder(TEXT), seed)
    schedule = NoiseSchedule.from_config({})
    return Pipeline(filled(UNet(unet), seed), vae, tower, TOKENIZER, schedule, **parts, zero_unconditional=xl)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return small_pipeline()


@pytest.fixture
def source(tmp_path) -> Path:
    """30 images with captions, of every proportion."""
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(30):
        image(9 + i, 24 - i // 2, "RGB").save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"{i} dogs")
    return folder


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The sizes of the batches that networks are asked for."""
    sizes: list[int] = []
    for name in ("encode_images", "encode_prompts"):
        method = getattr(Pipeline, name)
        monkeypatch.setattr(
            Pipeline, name, lambda self, items, method=method: sizes.append(len(items)) or method(self, items)
        )
    return sizes


def pictures(folder: Path) -> ImageFiles:
    return ImageFiles(sorted(folder.glob("*.png")))


# ---------------------------------------------------------------------------------------------------------- the numbers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_moments_are_those_of_the_autoencoder(pipe, source, tmp_path, dtype, calls):
    entries = encode_pairs(pipe, str(source), tmp_path / "cache", batch=4, dtype=dtype)
    assert calls == [4] * 7 + [2]
    cache = Cache(tmp_path / "cache")
    kept = entries.kept(cache)
    assert kept.names == [str(source / f"{i:03d}.png") for i in range(30)]
    assert kept.captions == [f"{i} dogs" for i in range(30)]
    expected = pipe.encode_images(pictures(source))
    for name, tensor in zip(("mean", "std"), expected):
        rows = cache.rows(name, kept.keys)
        assert len(rows) == 30 and rows.shape == tensor.shape
        chosen = torch.tensor([29, 3, -1, 3, 0])
        assert rows[chosen].dtype == torch.float32 and rows[chosen].device.type == "cpu"
        torch.testing.assert_close(
            rows[chosen], tensor[chosen], rtol=1e-5 if dtype == torch.float32 else 1e-3, atol=1e-5
        )
        stored = cache.rows(name, kept.keys[::2])[torch.arange(15)]
        assert torch.equal(stored, rows[torch.arange(0, 30, 2)])
        assert torch.equal(stored, stored.to(dtype).float())


@pytest.mark.parametrize("xl", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
def test_contexts_are_those_of_the_text_encoders(tmp_path, xl, zeros, calls):
    pipe = small_pipeline(xl)
    pipe.zero_unconditional = zeros
    texts = ["two dogs", "", "a cat", "two dogs", "a green cow"]
    keys = encode_texts(pipe, texts, tmp_path, batch=3)
    assert calls == [3, 1]  # one of the texts is there twice
    context = Cache(tmp_path).context(keys)
    expected = [torch.cat(pair) for pair in zip(pipe.encode_prompts(texts), pipe.encode_unconditional())]
    assert len(context) == len(expected) == 1 + xl
    for rows, tensor in zip(context, expected):
        assert rows.shape == tensor.shape and len(rows) == 6
        torch.testing.assert_close(rows[torch.arange(6)], tensor, rtol=1e-5, atol=1e-6)
        assert torch.equal(rows[torch.tensor([-1])], rows[torch.tensor([5])])
    assert keys[1] != keys[5]  # an empty prompt may be another thing than none


def test_rows_read_like_a_tensor(pipe, source, tmp_path):
    entries = encode_pairs(pipe, str(source), tmp_path / "cache", batch=30)
    rows = Cache(tmp_path / "cache").rows("mean", entries.keys)
    tensor = rows[torch.arange(30)]
    for index in (torch.tensor([], dtype=torch.long), torch.tensor(3), torch.tensor([[0, -30], [29, 4]])):
        assert torch.equal(rows[index], tensor[index])
    for index in (torch.tensor([30]), torch.tensor([0, -31])):
        with pytest.raises(IndexError):
            rows[index]
    for index in (torch.tensor([True] * 30), torch.tensor([1.0])):
        with pytest.raises(TypeError, match="int64"):
            rows[index]
    rows[torch.tensor([0])].zero_()  # a copy
    assert torch.equal(rows[torch.arange(30)], tensor)


def test_images_are_cropped_and_not_distorted(pipe):
    size = pipe.image_size
    assert size == (16, 16)
    for width, height in ((16, 16), (32, 32), (9, 9), (48, 48)):  # of the same proportions: as resized
        picture = image(width, height, "RGB")
        assert resized(picture, size).tobytes() == picture.resize((16, 16), Image.Resampling.LANCZOS).tobytes()
    assert resized(image(45, 30, "RGB"), (20, 30)).tobytes() == image(45, 30, "RGB").resize((30, 20), 1).tobytes()
    for width, height in ((64, 32), (32, 64), (48, 16), (16, 20)):  # of others: resized whole, then cropped
        picture, short = image(width, height, "RGB"), min(width, height)
        whole = picture.resize((width * 16 // short, height * 16 // short), Image.Resampling.LANCZOS)
        left, top = (whole.width - 16) // 2, (whole.height - 16) // 2
        expected = whole.crop((left, top, left + 16, top + 16))
        assert np.abs(np.asarray(resized(picture, size), int) - np.asarray(expected, int)).max() <= 1
    assert resized(image(1000, 1, "RGB"), size).size == (16, 16)
    assert resized(image(45, 40, "RGB"), (10, 30)).size == (30, 10)
    mean, _ = pipe.encode_images([image(64, 32, "RGB")])
    assert torch.equal(mean, pipe.encode_images([resized(image(64, 32, "RGB"), size)])[0])


# ------------------------------------------------------------------------------------------------------- computed once
def test_a_second_run_encodes_nothing(pipe, source, tmp_path, calls, monkeypatch):
    folder = tmp_path / "cache"
    first = encode_pairs(pipe, str(source), folder, batch=8)
    texts = encode_texts(pipe, first.captions, folder, batch=8)
    assert sum(calls) == 60
    calls.clear()
    files = sorted(folder.iterdir())
    monkeypatch.setattr(Image, "open", None)  # nothing is decoded
    monkeypatch.setattr(Pipeline, "encode_unconditional", None)
    again = encode_pairs(pipe, str(source), folder, batch=8)
    assert (again.keys == first.keys).all() and again.names == first.names and calls == []
    assert (encode_texts(pipe, first.captions, folder, batch=8) == texts).all() and calls == []
    assert sorted(folder.iterdir()) == files
    assert len(again.kept(Cache(folder)).names) == 30


def changed_weight(pipe, network, name):
    with torch.no_grad():
        dict(getattr(pipe, network).named_parameters())[name].view(-1)[-1] += 1e-6


def other_vocabulary(pipe):
    pipe.tokenizer = Tokenizer(TOKENIZER.vocab, TOKENIZER.merges[1:], TOKENIZER.config)


CHANGES = {  # -> (images, texts) that are encoded anew
    "the encoder": (lambda pipe: changed_weight(pipe, "vae", "encoder.conv_out.bias"), (30, 0)),
    "the last convolution": (lambda pipe: changed_weight(pipe, "vae", "quant_conv.weight"), (30, 0)),
    "the decoder": (lambda pipe: changed_weight(pipe, "vae", "decoder.conv_out.bias"), (0, 0)),
    "the UNet": (lambda pipe: changed_weight(pipe, "unet", "conv_in.bias"), (0, 0)),
    "the factor": (lambda pipe: pipe.vae.config.update(scaling_factor=0.5), (30, 0)),
    "a note": (lambda pipe: pipe.vae.config.update(_name_or_path="elsewhere"), (0, 0)),
    "the text tower": (lambda pipe: changed_weight(pipe, "text_encoder", "text_model.final_layer_norm.bias"), (0, 30)),
    "the second": (lambda pipe: changed_weight(pipe, "text_encoder_2", "text_projection.weight"), (0, 30)),
    "the tokenizer": (other_vocabulary, (0, 30)),
    "the size": (lambda pipe: pipe.unet.config.update(sample_size=6), (30, 30)),  # which XL's context knows
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_an_entry_depends_on(source, tmp_path, calls, what):
    pipe = small_pipeline(xl=True)

    def encode() -> tuple[int, int]:
        calls.clear()
        captions = encode_pairs(pipe, str(source), tmp_path / "cache", batch=99).captions
        images = sum(calls)
        encode_texts(pipe, captions, tmp_path / "cache", batch=99)
        return images, sum(calls) - images

    assert encode() == (30, 30) and encode() == (0, 0)
    change, expected = CHANGES[what]
    change(pipe)
    assert encode() == expected and encode() == (0, 0)


def test_another_precision_or_file_is_encoded_anew(source, tmp_path, calls):
    pipe = small_pipeline()
    folder = tmp_path / "cache"
    both = [encode_pairs(pipe, str(source), folder, batch=99, dtype=d) for d in (torch.float32, torch.float16)]
    assert calls == [30, 30]
    assert not set(both[0].keys) & set(both[1].keys)
    image(20, 20, "RGB").save(source / "003.png")
    (source / "004.txt").write_text("another caption of the same image")
    entries = encode_pairs(pipe, str(source), folder, batch=99)
    assert calls == [30, 30, 1] and entries.captions[4] == "another caption of the same image"
    mean = Cache(folder).rows("mean", entries.keys)[torch.tensor([3])]
    torch.testing.assert_close(mean, pipe.encode_images([image(20, 20, "RGB")])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(os.name == "nt", reason="has no time of status change")
def test_another_image_of_the_same_size_and_time_is_encoded_anew(pipe, tmp_path, calls):
    for i, color in enumerate(("red", "blue")):  # as cp -p, rsync -t and tar leave it
        Image.new("RGB", (20, 20), color).save(tmp_path / "new.bmp")
        os.utime(tmp_path / "new.bmp", ns=(0, 10**18))
        time.sleep(0.02)  # a tick of the system's clock
        os.replace(tmp_path / "new.bmp", tmp_path / "a.bmp")
        entries = encode_pairs(pipe, image_pairs(ImageFiles([tmp_path / "a.bmp"]), ["a"]), tmp_path / "cache", batch=9)
        assert (tmp_path / "a.bmp").stat().st_mtime_ns == 10**18 and calls == [1] * (i + 1)
    mean = Cache(tmp_path / "cache").rows("mean", entries.keys)[torch.tensor([0])]
    assert torch.equal(mean, pipe.encode_images([Image.new("RGB", (20, 20), "blue")])[0])


VERSIONS = {  # -> what fixed images become; who changes the one changes the other
    "1: upright, on white, 8 bits a channel": "7a0efc643ebbd0dc",
    "1: the shorter side by Lanczos, then the centre": "9deabd144b27dce7",
}


def test_the_versions_of_reading_and_preprocessing_stand_for_what_they_do(pipe, monkeypatch):
    digest = hashlib.sha256()
    picture, exif = image(37, 23, "RGBA"), Image.Exif()
    exif[0x0112] = 6
    sixteen = Image.fromarray(np.arange(40, dtype=np.uint16).reshape(5, 8) * 1638)
    for shown, how in ((picture, {"exif": exif}), (sixteen, {}), (image(9, 8, "P"), {"transparency": 3})):
        shown.save(stream := io.BytesIO(), "PNG", **how)
        digest.update(open_image(stream.getvalue()).tobytes())
    found = digest.hexdigest()[:16]
    assert VERSIONS.get(READING) == found, "another READING is needed in data/pairs.py, and its line here"
    latents = []
    # in place of the network: numbers that show each pixel exactly
    monkeypatch.setattr(pipe.vae, "encode", lambda pixels: (pixels, pixels.round()))
    for width, height in ((37, 23), (16, 16), (8, 40)):
        for moment in pipe.encode_images([image(width, height, "RGB")]):
            latents.append((moment * 2**12).round().int().numpy().tobytes())
    found = hashlib.sha256(b"".join(latents)).hexdigest()[:16]
    assert VERSIONS.get(PREPROCESSING) == found, "another PREPROCESSING is needed in pipeline.py, and its line here"


def test_one_caption_of_a_list_by_the_seed(pipe, source, tmp_path, calls, capsys):
    rows = [{"file_name": f"{i:03d}.png", "text": [f"{i} {word}" for word in ("a", "b", "c")]} for i in range(30)]
    (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = [encode_pairs(pipe, str(source), tmp_path / "cache", batch=30, seed=seed).captions for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2] and calls == [30]
    assert {caption.split()[1] for caption in found[0]} == {"a", "b", "c"}


def test_it_is_said_how_many_pairs_are_read(pipe, source, tmp_path, capsys):
    (source / "004.png").write_text("no image")
    for part, said in (((1, 2), ""), ((0, 2), "29 pairs are read, 1 left out, each named in ")):
        log = Skipped(tmp_path / "log.jsonl", part)
        entries = encode_pairs(pipe, str(source), tmp_path / "cache", batch=99, process=part, skipped=log)
        capsys.readouterr()
        if not part[0]:
            entries.kept(Cache(tmp_path / "cache"))
            assert capsys.readouterr().out == f"{source}: {said}{tmp_path}/log*.jsonl\n"
    (source / "004.png").unlink(), (source / "004.txt").unlink()
    encode_pairs(pipe, str(source), tmp_path / "cache", batch=99).kept(Cache(tmp_path / "cache"))
    assert capsys.readouterr().out == f"{source}: 29 pairs are read, 0 left out\n"


def test_the_hash_of_weights_knows_no_layout_or_device(pipe):
    other = small_pipeline()
    for p in other.vae.parameters():
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    assert module._image_keys(pipe, torch.float32)("a") == module._image_keys(other, torch.float32)("a")
    assert module._image_keys(pipe, torch.float32)("a") != module._image_keys(pipe, torch.float32)("b")
    half = small_pipeline()
    half.unet.half(), half.vae.half()
    assert module._image_keys(half, torch.float32)("a") != module._image_keys(pipe, torch.float32)("a")


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz"])
def test_two_processes_give_the_same_as_one(pipe, source, tmp_path, calls, kind):
    given = source
    if kind != "folder":
        given = Path(shutil.make_archive(str(tmp_path / "set"), {"tar": "tar", "tar.gz": "gztar"}[kind], source))
    alone = encode_pairs(pipe, str(given), tmp_path / "one", batch=4)
    assert sum(calls) == 30
    calls.clear()
    entries = [encode_pairs(pipe, str(given), tmp_path / "two", batch=4, process=(rank, 2)) for rank in (1, 0)]
    assert sum(calls) == 30 and calls == [4, 4, 4, 3] * 2
    prompts = [f"{i} dogs" for i in range(7)]
    expected = encode_texts(pipe, prompts, tmp_path / "one", batch=2)
    calls.clear()
    keys = [encode_texts(pipe, prompts, tmp_path / "two", batch=2, process=(rank, 2)) for rank in (0, 1)]
    assert calls == [2, 2, 2, 1] and (keys[0] == expected).all() and (keys[1] == expected).all()
    one, two = Cache(tmp_path / "one"), Cache(tmp_path / "two")
    assert len(one) == len(two) == 38
    for one_of_two in entries:
        kept = one_of_two.kept(two)
        assert (kept.keys == alone.keys).all() and kept.names == alone.names and kept.captions == alone.captions
    for name in ("mean", "std"):
        a, b = one.rows(name, alone.keys), two.rows(name, alone.keys)
        torch.testing.assert_close(a[torch.arange(30)], b[torch.arange(30)], rtol=1e-5, atol=1e-6)
    a, b = (cache.context(expected)[0][torch.arange(8)] for cache in (one, two))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_work_of_a_process_does_not_depend_on_what_others_have_written(pipe, tmp_path):
    texts = [f"{i} cows" for i in range(9)]
    encode_texts(pipe, texts[:4], tmp_path, batch=2)  # of an earlier run
    keys = [encode_texts(pipe, texts, tmp_path, batch=2, process=(rank, 3)) for rank in (2, 0, 1)]  # in turn
    assert Cache(tmp_path).has(keys[0]).all()


def test_the_models_own_images(pipe, source, tmp_path, calls):
    files = pictures(source)
    prompts = [f"{i} dogs" for i in range(30)]
    of_files = encode_pairs(pipe, image_pairs(files, prompts), tmp_path / "cache", batch=16)
    of_source = encode_pairs(pipe, str(source), tmp_path / "cache", batch=16)
    assert (of_files.keys == of_source.keys).all() and calls == [16, 14]
    of_pixels = encode_pairs(pipe, image_pairs(list(files), prompts), tmp_path / "cache", batch=16)
    encode_pairs(pipe, image_pairs(list(files) + [files[0]], [*prompts, "again"]), tmp_path / "cache", batch=16)
    assert calls == [16, 14] * 2
    cache = Cache(tmp_path / "cache")
    a, b = (cache.rows("mean", entries.keys) for entries in (of_files, of_pixels.kept(cache)))
    assert torch.equal(a[torch.arange(30)], b[torch.arange(30)]) and of_pixels.names[3] == "image 3"
    (source / "007.png").write_text("no image")
    with pytest.raises(Unusable, match="007.png: not an image"):  # a run's own images are all needed
        encode_pairs(pipe, image_pairs(files, prompts), tmp_path / "cache", batch=16)
    keys = np.concatenate([of_files.keys, np.frombuffer(b"0123456789abcdef", KEY)])
    with pytest.raises(InputError, match="cache: 1 of 31 entries are missing; run again"):
        cache.rows("mean", keys)


# ------------------------------------------------------------------------------------------------- what cannot be used
@pytest.mark.parametrize("bad", [1, 2])
def test_bad_images_are_left_out_up_to_5_percent(pipe, source, tmp_path, bad, calls):
    for i in range(20, 30):
        (source / f"{i:03d}.png").unlink()
        (source / f"{i:03d}.txt").unlink()
    (source / "004.png").write_bytes((source / "004.png").read_bytes()[:-40])
    if bad == 2:
        (source / "011.txt").unlink()
    for part in ((0, 1), (0, 2), (1, 2)):
        folder, log = tmp_path / f"cache-{part[1]}", tmp_path / f"log-of-{part[1]}.jsonl"
        entries = encode_pairs(pipe, str(source), folder, batch=8, process=part, skipped=Skipped(log, part))
    for rank in (0, 1):
        skipped = Skipped(tmp_path / "log-of-2.jsonl", (rank, 2))
        entries = encode_pairs(pipe, str(source), folder, batch=8, process=(rank, 2), skipped=skipped)
        if bad == 2:
            with pytest.raises(InputError, match=r"set: 2 of 20 images or captions .* 5 %.*log-of-2\*\.jsonl"):
                entries.kept(Cache(folder))
            continue
        kept = entries.kept(Cache(folder))
        assert len(kept.keys) == 19 and str(source / "004.png") not in kept.names and "4 dogs" not in kept.captions
    names = [json.loads(line)["name"] for line in (tmp_path / "log-of-1.jsonl").read_text().splitlines()]
    assert sorted(names) == [str(source / f"{i:03d}.png") for i in ([4], [4, 11])[bad - 1]]
    assert sum(calls) == 2 * (20 - bad)  # what could not be read is tried again, the rest is there


def test_the_log_of_a_source_is_in_the_cache_unless_given(pipe, source, tmp_path):
    (source / "004.png").write_text("no image")
    entries = encode_pairs(pipe, str(source), tmp_path / "cache", batch=8)
    assert len(entries.kept(Cache(tmp_path / "cache")).names) == 29
    row = json.loads((tmp_path / "cache" / "skipped.jsonl").read_text())
    assert row["name"] == str(source / "004.png") and row["why"].startswith("not an image")
    (source / "004.png").unlink()
    image(20, 20, "RGB").save(source / "004.png")  # mended
    entries = encode_pairs(pipe, str(source), tmp_path / "cache", batch=8)
    assert len(entries.kept(Cache(tmp_path / "cache")).names) == 30
    assert (tmp_path / "cache" / "skipped.jsonl").read_bytes() == b""


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    if how == "keys":
        content[-1] ^= 1  # they are last
    elif how == "header":
        content[10:20] = b"\xff" * 10
    elif how == "shape":
        content[8 : 8 + header] = content[8 : 8 + header].replace(b'"shape":[30,', b'"shape":[15,')
    elif how == "long":
        content += b"more"
    else:
        content = content[: {"empty": 0, "start": 4, "half a header": 8 + header // 2, "end": -1}[how]]
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["keys", "header", "shape", "long", "empty", "start", "half a header", "end"])
def test_a_damaged_shard_is_set_aside_and_encoded_again(pipe, source, tmp_path, capsys, calls, how):
    folder = tmp_path / "cache"
    entries = encode_pairs(pipe, str(source), folder, batch=99)
    expected = Cache(folder).rows("mean", entries.keys)[torch.arange(30)]
    texts = encode_texts(pipe, ["a"], folder, batch=9)
    (path,) = (path for path in folder.glob("entries-*") if b'"mean"' in path.read_bytes())
    damage(path, how)
    capsys.readouterr()
    cache = Cache(folder)
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {path} is damaged (") and said.count("\n") == 1
    assert len(cache) == 2 and cache.has(texts).all() and not cache.has(entries.keys).any()
    assert not path.exists() and path.with_name(path.name + ".bad").exists()
    calls.clear()
    entries = encode_pairs(pipe, str(source), folder, batch=99)
    assert calls == [30] and "damaged" not in capsys.readouterr().err
    assert torch.equal(Cache(folder).rows("mean", entries.keys)[torch.arange(30)], expected)


def test_a_shard_that_may_not_be_read_stays(pipe, tmp_path):
    encode_texts(pipe, ["a"], tmp_path, batch=9)
    (path,) = tmp_path.glob("entries-*")
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="safetensors: cannot be read"):
        Cache(tmp_path)
    assert path.exists()


def test_other_files_are_left_alone(pipe, tmp_path):
    save_file({"reward": torch.zeros(3)}, tmp_path / "reward.safetensors")
    (tmp_path / ".entries-1.safetensors.7.tmp").write_text("being written")
    encode_texts(pipe, ["a"], tmp_path, batch=9)
    assert len(Cache(tmp_path)) == 2 and load_file(tmp_path / "reward.safetensors")
    assert len(Cache(tmp_path / "not there")) == 0 and not Cache(tmp_path / "not there").has(np.zeros(2, KEY)).any()
    assert len(list(tmp_path.iterdir())) == 3
    none = encode_pairs(pipe, [], tmp_path, batch=9).kept(Cache(tmp_path))
    assert none.names == [] and len(Cache(tmp_path).rows("mean", none.keys)) == 0


def test_keys_in_several_shards_and_with_every_byte(tmp_path):
    g = np.random.default_rng(0)
    keys = [bytes(g.integers(0, 256, 16, dtype=np.uint8)) for _ in range(200)]
    keys += [b"\0" * 16, b"\xff" * 16, b"a" + b"\0" * 15, b"\0" * 15 + b"a", b"a" * 15 + b"\0", b"a" * 16]
    value = torch.arange(len(keys)).float()[:, None]
    for chosen in (range(0, 206, 2), range(206), range(1, 206, 3)):
        with module._Writer(tmp_path, torch.float32) as writer:
            writer.add([keys[i] for i in chosen], value=value[list(chosen)])
    cache = Cache(tmp_path)
    assert len(cache) == 103 + 206 + 69
    array = np.frombuffer(b"".join(keys), KEY)
    assert cache.has(array).all()
    assert torch.equal(cache.rows("value", array)[torch.arange(206)], value)
    others = np.frombuffer(b"".join(bytes(g.integers(0, 256, 16, dtype=np.uint8)) for _ in range(50)) + b"b" * 16, KEY)
    assert not cache.has(others).any()


def test_shards_are_written_as_they_fill_and_after_an_interruption(pipe, source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 2 * 10 * 4 * 8 * 8 * 4)  # 10 images: mean and std of 4 x 8 x 8 floats
    entries = encode_pairs(pipe, str(source), tmp_path / "a", batch=5)
    sizes = [len(load_file(path)["keys"]) for path in (tmp_path / "a").glob("entries-*")]
    assert sizes == [10, 10, 10] and Cache(tmp_path / "a").has(entries.keys).all()
    monkeypatch.setattr(module, "SHARD_SECONDS", 0)
    encode_pairs(pipe, str(source), tmp_path / "b", batch=5)
    assert len(list((tmp_path / "b").glob("entries-*"))) == 6
    monkeypatch.undo()
    encode, count = pipe.encode_images, iter(range(9))

    def interrupted(images):
        if next(count) == 3:
            raise KeyboardInterrupt
        return encode(images)

    monkeypatch.setattr(pipe, "encode_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode_pairs(pipe, str(source), tmp_path / "c", batch=5)
    assert len(Cache(tmp_path / "c")) == 15
    monkeypatch.setattr(pipe, "encode_images", encode)


def test_numbers_that_float16_cannot_hold_are_refused(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(pipe, "encode_prompts", lambda texts: (torch.full((len(texts), 3), 1e5),))
    with pytest.raises(InputError, match="context0: .* not finite in torch.float16; accepted: float32"):
        encode_texts(pipe, ["a"], tmp_path, batch=9, dtype=torch.float16)
    with pytest.raises(ValueError, match="torch.bfloat16; accepted: torch.float32, torch.float16"):
        encode_texts(pipe, ["a"], tmp_path, batch=9, dtype=torch.bfloat16)


READ = """
import sys, torch
from pathlib import Path
from minialign.data.cache import Cache
torch.set_num_threads(1)

def resident():  # of memory that is the process's own; mapped files are the system's cache
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

first = resident()
cache = Cache(Path(sys.argv[1]))
rows = cache.rows("value", cache._keys)
for i in range(60):
    rows[torch.randint(len(rows), (64,))]
    if i == 19:  # the allocator has its arenas
        before = resident()
print(resident() - before, resident() - first)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_memory_of_its_own_stays_flat_while_rows_are_read(tmp_path):
    with module._Writer(tmp_path, torch.float32) as writer:  # 64 MB
        writer.add([i.to_bytes(16, "big") for i in range(1024)], value=torch.zeros(1024, 2**14))
    done = subprocess.run([sys.executable, "-c", READ, tmp_path], capture_output=True, text=True, check=True)
    growth, whole = map(int, done.stdout.split())
    assert growth < 8 * 1024 and whole < 40 * 1024  # kB


def test_more_shards_than_files_may_be_open(tmp_path):
    resource = pytest.importorskip("resource")
    for i in range(100):
        with module._Writer(tmp_path, torch.float32) as writer:
            writer.add([i.to_bytes(16, "big")], value=torch.ones(1, 1))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 20, limits[1]))
    try:
        cache = Cache(tmp_path)
        assert cache.rows("value", cache._keys)[torch.arange(100)].sum() == 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# ------------------------------------------------------------------------------------------------------ CLIP's features
@pytest.fixture(scope="module")
def clip() -> CLIP:
    return CLIP.from_pretrained()


def test_features_are_of_all_that_decides_them(clip, source, tmp_path, monkeypatch):
    paths, texts, calls = sorted(source.glob("*.png"))[:3], ["a red circle", "two blue stars"], []
    for name in ("encode_image", "encode_text"):
        method = getattr(CLIP, name)
        monkeypatch.setattr(CLIP, name, lambda self, x, method=method: calls.append(len(x)) or method(self, x))

    def weight(name: str, of: CLIP) -> None:
        with torch.no_grad():
            dict(of.named_parameters())[name].view(-1)[0] += 1e-3

    changes = {
        "nothing": lambda other: None,
        "the image tower": partial(weight, "vision_model.post_layernorm.bias"),
        "the text tower": partial(weight, "text_model.final_layer_norm.bias"),
        "a projection": partial(weight, "visual_projection.weight"),
        "preprocessing": lambda other: other.preprocessing.update(image_mean=[0.4, 0.5, 0.6]),
        "the tokenizer": lambda other: setattr(
            other, "tokenizer", Tokenizer(other.tokenizer.vocab, other.tokenizer.merges[1:], other.tokenizer.config)
        ),
    }
    for what, change in changes.items():
        path = tmp_path / f"{what}.safetensors"
        features(path, clip, paths, texts)
        other = CLIP.from_pretrained()
        change(other)
        calls.clear()
        found = features(path, other, paths, texts)
        assert calls == ([] if what == "nothing" else [3, 2]), what
        fresh = features(tmp_path / "fresh.safetensors", other, paths, texts)
        (tmp_path / "fresh.safetensors").unlink()
        assert all(torch.equal(a, b) for a, b in zip(found, fresh)), what


def test_files_are_embedded_as_the_reader_sees_them_one_at_a_time(clip, tmp_path, monkeypatch):
    exif, clear = Image.Exif(), image(40, 60, "RGBA")
    exif[0x0112] = 6
    image(60, 40, "RGB").save(tmp_path / "0.png", exif=exif)
    clear.save(tmp_path / "1.png")
    white = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    shown = [image(60, 40, "RGB").transpose(Image.Transpose.ROTATE_270), white]
    open_now, preprocess = [], clip.preprocess
    monkeypatch.setattr(clip, "preprocess", lambda images: open_now.append(len(images)) or preprocess(images))
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    found, _ = features(tmp_path / "f.safetensors", clip, paths, [])
    assert open_now == [1, 1]
    with torch.no_grad():
        torch.testing.assert_close(found, clip.encode_image(preprocess(shown)), rtol=1e-4, atol=1e-5)
    for name, why in {"lost": "the image is missing", "pipe": "the image is missing .not a", "text": "not an"}.items():
        if name == "pipe":
            os.mkfifo(tmp_path / name)
        elif name == "text":
            (tmp_path / name).write_text("no image")
        with pytest.raises(InputError, match=f"{name}: {why}"):
            features(tmp_path / "f.safetensors", clip, [*paths, tmp_path / name], [])


# ------------------------------------------------------------------------------------------- what stands for a model
DECIDES = {  # what is changed -> whether images are others
    "the UNet": (lambda pipe: changed_weight(pipe, "unet", "conv_in.bias"), True),
    "the decoder": (lambda pipe: changed_weight(pipe, "vae", "decoder.conv_out.bias"), True),
    "the first convolution": (lambda pipe: changed_weight(pipe, "vae", "post_quant_conv.weight"), True),
    "the encoder": (lambda pipe: changed_weight(pipe, "vae", "encoder.conv_out.bias"), True),  # of its latents
    "the factor": (lambda pipe: pipe.vae.config.update(scaling_factor=0.5), True),
    "the text tower": (lambda pipe: changed_weight(pipe, "text_encoder", "text_model.final_layer_norm.bias"), True),
    "the second": (lambda pipe: changed_weight(pipe, "text_encoder_2", "text_projection.weight"), True),
    "the tokenizer": (other_vocabulary, True),
    "the schedule": (lambda pipe: pipe.schedule.config.update(prediction_type="v_prediction"), True),
    "no prompt": (lambda pipe: setattr(pipe, "zero_unconditional", False), True),
    "the size": (lambda pipe: pipe.unet.config.update(sample_size=6), True),
    "a note": (lambda pipe: pipe.unet.config.update(_name_or_path="elsewhere"), False),
    "the card": (lambda pipe: setattr(pipe, "card", "about"), False),
}


@pytest.mark.parametrize("what", DECIDES)
def test_what_stands_for_a_model(what):
    pipe = small_pipeline(xl=True)
    before, (change, others) = pipeline_digest(pipe), DECIDES[what]
    assert len(before) == 64 and pipeline_digest(small_pipeline(xl=True)) == before
    change(pipe)
    assert (pipeline_digest(pipe) != before) == others


def test_what_stands_for_a_model_knows_no_folder_nor_type(tmp_path):
    pipe = Pipeline.from_pretrained()  # whose files are of float16
    pipe.save_pretrained(tmp_path)
    others = [Pipeline.from_pretrained(tmp_path), Pipeline.from_pretrained(dtype=torch.float16)]
    assert {pipeline_digest(other) for other in others} == {pipeline_digest(pipe)}
