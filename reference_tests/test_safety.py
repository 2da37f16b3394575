"""Broken and hostile checkpoints: every outcome is a load or one clear line, never a crash or a hang."""

import json
import random
import re
import shutil
import signal
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from comparisons import SMALL_UNET
from safetensors.torch import load_file, save_file

from minialign import CLIP, Pipeline
from minialign.diffusion import NoiseSchedule
from minialign.files import InputError
from minialign.models.clip import TextEncoder
from minialign.models.lora import add_lora, load_lora, save_lora
from minialign.models.pretrained import EMBEDDED
from minialign.models.tokenizer import Tokenizer
from minialign.models.unet import UNet
from minialign.models.vae import VAE

UNET = SMALL_UNET | {"cross_attention_dim": 4, "sample_size": 4}
ROUNDS = 2000


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A tiny pipeline with its UNet in two shards, and a tiny CLIP."""
    folder = tmp_path_factory.mktemp("whole")
    tokenizer = Tokenizer.from_pretrained(EMBEDDED / "tokenizer")
    text = {"vocab_size": len(tokenizer.vocab), "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 1, "hidden_act": "gelu", "max_position_embeddings": tokenizer.length}
    vae = VAE({"block_out_channels": [4], "norm_num_groups": 2, "layers_per_block": 1})
    Pipeline(UNet(UNET), vae, TextEncoder(text), tokenizer, NoiseSchedule.from_config({})).save_pretrained(folder)
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    placed = {key: names[i % 2] for i, key in enumerate(weights)}
    for name in names:
        save_file({key: t for key, t in weights.items() if placed[key] == name}, folder / "unet" / name)
    path.unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    vision = text | {"image_size": 8, "patch_size": 4}
    clip = CLIP({"text_config": text, "vision_config": vision, "projection_dim": 4})
    clip.tokenizer, clip.preprocessing = (
        tokenizer,
        {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}},
    )
    clip.save_pretrained(folder / "clip")
    return folder


ODD = [None, True, -1, 0, 1, 2, 3, 10**9, 10**30, 1.5, 1e308, float("nan"), "", "x", "../../../etc/passwd", [], {}]
ODD += [[1], [1] * 2000, [[1], [2]], {"a": 1}, [None], "diffusion_pytorch_model.safetensors", "\x00", "gelu", "linear"]


def odd_json(value: object, pick: random.Random) -> object:
    """The same JSON with one value, somewhere inside, changed, added or taken away."""
    if isinstance(value, dict) and value and pick.random() < 0.9:
        key = pick.choice(list(value))
        change = pick.random()
        if change < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if change < 0.2:
            return value | {pick.choice(["x", "dropout", "class_embed_type", "", key + "x"]): pick.choice(ODD)}
        return value | {key: odd_json(value[key], pick)}
    if isinstance(value, list) and value and pick.random() < 0.5:
        i = pick.randrange(len(value))
        return [*value[:i], odd_json(value[i], pick), *value[i + 1 :]]
    return pick.choice(ODD)


def odd_bytes(content: bytes, pick: random.Random) -> bytes:
    change = pick.random()
    if change < 0.3:
        return content[: pick.randrange(len(content))]
    if change < 0.4:
        return pick.choice(
            [b"", b"[" * 100_000, b"null", b"{}", b"\xff\xfe", content + b"x", struct.pack("<Q", 2**63) + content]
        )
    noisy = bytearray(content)
    for _ in range(pick.choice([1, 1, 2, 20])):
        noisy[pick.randrange(min(len(noisy), pick.choice([8, 200, 10**9])))] = pick.randrange(256)
    return bytes(noisy)


def odd_weights(content: bytes, pick: random.Random) -> bytes:
    """A safetensors file whose header says something else."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json.dumps(odd_json(json.loads(content[8 : 8 + size]), pick)).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def hangs(*_) -> None:
    raise TimeoutError("a load that does not end")


def load(folder: Path, part: Path | None = None) -> None:
    """What reads the file `part`, or everything, and reads a prompt with it."""
    if part is None or "clip" not in part.parts:
        Pipeline.from_pretrained(folder).encode_prompts(["a red star"])
    if part is None or "clip" in part.parts:
        CLIP.from_pretrained(folder / "clip")


def refused(path: Path, changed: bytes, load: Callable[[], object], named: Path) -> bool:
    """Whether `load` refuses the file with other content, by one line with the path `named`; restores the file."""
    content = path.read_bytes()
    path.unlink()  # what is mapped from the old file stays whole
    path.write_bytes(changed)
    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(20)
    try:
        load()
        return False
    except InputError as error:
        assert "\n" not in str(error) and str(named) in str(error), error
        return True
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        path.unlink()
        path.write_bytes(content)


@pytest.mark.parametrize("rounds", [ROUNDS // 8, pytest.param(ROUNDS, marks=pytest.mark.slow)])
def test_thousands_of_broken_checkpoints(whole, tmp_path, rounds):
    load(whole)
    pick = random.Random(0)
    folder = Path(shutil.copytree(whole, tmp_path / "broken"))
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".safetensors", ".txt")]
    number = 0
    for _ in range(rounds):
        path = pick.choice(files)
        content = path.read_bytes()
        if pick.random() < 0.3 or path.suffix == ".txt":
            changed = odd_bytes(content, pick)
        elif path.suffix == ".json":
            changed = json.dumps(odd_json(json.loads(content), pick)).encode()
        else:
            changed = odd_weights(content, pick)
        number += refused(path, changed, partial(load, folder, path.relative_to(folder)), folder)
    assert number > rounds / 4
    load(folder)


@pytest.mark.parametrize("rounds", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_hundreds_of_broken_single_files_and_adapters(tmp_path, rounds):
    from peers import original_file

    _, path = original_file(tmp_path, "sd1")
    unet, lora = UNet(UNET), tmp_path / "lora.safetensors"
    add_lora(unet, 2)
    save_lora(unet, lora)
    pick, number = random.Random(0), 0

    def renumbered(content: bytes) -> bytes:
        """One key with another number in it."""
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        key = pick.choice([key for key in header if re.search(r"\d", key)])
        header[re.sub(r"\d+", str(pick.choice([0, 1, 7, 12, 30, 10**9])), key, count=1)] = header.pop(key)
        changed = json.dumps(header).encode()
        return struct.pack("<Q", len(changed)) + changed + content[8 + size :]

    changes = [renumbered, partial(odd_weights, pick=pick), partial(odd_bytes, pick=pick)]
    for _ in range(rounds):
        number += refused(path, pick.choice(changes)(path.read_bytes()), lambda: Pipeline.from_pretrained(path), path)
        number += refused(lora, pick.choice(changes)(lora.read_bytes()), lambda: load_lora(UNet(UNET), lora), lora)
    assert number > rounds / 2


def test_layers_that_multiply_are_refused():
    for many in ({"layers_per_block": 600}, {"layers_per_block": 30, "transformer_layers_per_block": 30}):
        with pytest.raises(ValueError, match="more than 1024 layers"):
            UNet(UNET | many)
    with pytest.raises(ValueError, match="more than 1024 layers"):
        VAE({"block_out_channels": [4, 4], "norm_num_groups": 2, "layers_per_block": 600})


SHARDS = "unet/diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize(
    "name", ["../text_encoder/model.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", 5, "..\\x.safetensors"]
)
def test_an_index_cannot_name_files_elsewhere(whole, tmp_path, name):
    folder = Path(shutil.copytree(whole, tmp_path / "hostile"))
    index = json.loads((folder / SHARDS).read_text())
    index["weight_map"]["conv_in.bias"] = name
    (folder / SHARDS).write_text(json.dumps(index))
    with pytest.raises(
        InputError, match=r"index.json: (weight_map is needed|.* is not the name of a .safetensors file)"
    ):
        Pipeline.from_pretrained(folder)


def test_an_index_that_names_a_missing_shard(whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "half"))
    (folder / "unet/diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="00002-of-00002.safetensors: not a readable safetensors file"):
        Pipeline.from_pretrained(folder)


def header_of(change) -> bytes:
    entries = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    entries["b"] = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}
    change(entries)
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + bytes(16)


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e["b"].update(data_offsets=[4, 12]),
        lambda e: e["b"].update(data_offsets=[8, 24]),
        lambda e: e["b"].update(data_offsets=[16, 8]),
        lambda e: e["b"].update(shape=[3]),
        lambda e: e["b"].update(shape=[2**62, 2**62]),
        lambda e: e["b"].update(dtype="OBJECT"),
        lambda e: e.pop("b"),
    ],
    ids=["overlapping", "out of range", "backwards", "another shape", "overflow", "unknown type", "bytes of no one"],
)
def test_headers_that_lie(whole, tmp_path, change):
    folder = Path(shutil.copytree(whole, tmp_path / "lies"))
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    path.unlink()
    path.write_bytes(header_of(change))
    with pytest.raises(InputError, match="vae/diffusion_pytorch_model.safetensors: not a readable safetensors file"):
        Pipeline.from_pretrained(folder)


def test_whole_numbers_and_names_of_two_times_are_refused(whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "odd"))
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    key = "decoder.mid_block.attentions.0.to_q.bias"
    for more, message in (
        ({key: weights[key].long()}, f"{key} is of torch.int64; accepted: floating point"),
        ({key.replace("to_q", "query"): weights[key].clone()}, "has a weight twice"),
    ):
        path.unlink()
        save_file(weights | more, path)
        with pytest.raises(InputError, match=message):
            Pipeline.from_pretrained(folder)


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt"])
def test_pickles_are_not_opened(whole, tmp_path, suffix):
    folder = Path(shutil.copytree(whole, tmp_path / "pickled"))
    shutil.rmtree(folder / "vae")
    (folder / "vae").mkdir()
    (folder / "vae/config.json").write_text((whole / "vae/config.json").read_text())
    torch.save({"x": torch.zeros(1)}, folder / f"vae/diffusion_pytorch_model{suffix}")
    with pytest.raises(InputError, match="can run code and are refused; convert them with .*save_pretrained"):
        Pipeline.from_pretrained(folder)
