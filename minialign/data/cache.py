"""Outputs of the frozen networks for images and prompts, computed once, kept on disk, shared by processes and runs.

Fine-tuning (Lee et al. 2023, section 3.3) trains the UNet alone, so that the moments of an image's latents and the
context of a prompt never change. They are kept in a folder of safetensors shards that are mapped into memory. The key
of an entry is a digest of all that it depends on: the network's weights, the preprocessing, the file or the text.

    entries = encode_pairs(pipe, source, folder, batch=8, process=(rank, processes))
    keys = encode_texts(pipe, entries.captions, folder, batch=64, process=(rank, processes))
    barrier()  # now everybody's shards are there
    cache = Cache(folder)
    entries = entries.kept(cache)  # without what could not be read; 5 % at most
    mean, std = cache.rows("mean", entries.keys), cache.rows("std", entries.keys)
    context = cache.context(keys)  # the last row of each: no prompt
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..engine.optimising import progress
from ..files import MALFORMED, InputError, checksum, first_line, read_weights, write_tensors
from ..models.clip import CLIP
from ..models.tokenizer import Tokenizer
from ..pipeline import PREPROCESSING, Pipeline, resized
from .pairs import READING, Pair, Skipped, Unusable, open_image, read_pairs, regular

KEY = np.dtype("S16")  # keys are arrays of this: 16 bytes, compared as bytes
SHARD_BYTES = 2**28  # of entries, after which a shard is written
SHARD_SECONDS = 120  # or after so long: what a killed process has to do again
BATCH = 128  # images and prompts that CLIP embeds at once


class Rows:
    """Rows of shards that read like a float32 tensor along its first axis: rows[LongTensor] -> Tensor.

    Nothing is read before it is asked for: shards are mapped into memory, whose pages are the system's cache, are
    shared by all processes, and are let go of when memory is short. What is returned is a copy.
    """

    def __init__(self, shards: Sequence[_Shard], name: str, shard: np.ndarray, row: np.ndarray):
        self._tensors = {i: shards[i].tensors[name] for i in np.unique(shard).tolist()}
        self._shard, self._row = shard, row
        kinds = {(tensor.shape[1:], tensor.dtype) for tensor in self._tensors.values()}
        if len(kinds) > 1:
            raise ValueError(f"{name}: the entries are of several shapes or types: {kinds}")
        self.shape = torch.Size((len(shard), *next((shape for shape, _ in kinds), ())))

    def __len__(self) -> int:
        return len(self._shard)

    def __getitem__(self, index: Tensor) -> Tensor:
        if index.dtype != torch.int64:
            raise TypeError(f"rows are asked for by an int64 tensor, not by {index.dtype}")
        flat = index.cpu().numpy().reshape(-1)
        places = zip(self._shard[flat].tolist(), self._row[flat].tolist())
        rows = [self._tensors[shard][row] for shard, row in places]
        values = torch.stack(rows).float() if rows else torch.empty(0)
        return values.view(*index.shape, *self.shape[1:])


class _Shard:
    """A mapped shard: its keys (n,), and the rows (n,...) of each tensor. Raises SafetensorError or some of MALFORMED
    where it is damaged.

    The header, the sizes and the keys are checked. The entries are not read, which would take as long as all of them.
    """

    def __init__(self, path: Path):
        with safe_open(path, "pt") as file:  # which keeps no file descriptor
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}
            checksum_of_keys = file.metadata()["keys_crc32"]
        data = self.tensors.pop("keys").numpy().tobytes()
        if f"{zlib.crc32(data):08x}" != checksum_of_keys:
            raise ValueError("the checksum is not that of its keys")
        self.keys = np.frombuffer(data, KEY)
        for name, tensor in self.tensors.items():
            if len(tensor) != len(self.keys):
                raise ValueError(f"{len(tensor)} rows of {name} for {len(self.keys)} keys")


class Cache:
    """The entries of a folder as they are when it is opened. Shards may share keys: any of their entries is taken.

    A damaged shard is named on stderr and set aside; its entries are missing, so that they are encoded again.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._shards: list[_Shard] = []
        for path in sorted(folder.glob("entries-*.safetensors")):
            try:
                self._shards.append(_Shard(path))
            except (OSError, RuntimeError) as error:  # RuntimeError: torch's, of what cannot be mapped
                raise InputError(f"{path}: cannot be read ({first_line(error)})") from error
            except (SafetensorError, *MALFORMED) as error:
                print(
                    f"warning: {path} is damaged ({first_line(error)}); set aside as {path.name}.bad", file=sys.stderr
                )
                with suppress(OSError):  # another process was faster
                    os.replace(path, path.with_name(f"{path.name}.bad"))
        counts = [len(shard.keys) for shard in self._shards]
        keys = np.concatenate([np.empty(0, KEY), *(shard.keys for shard in self._shards)])
        order = keys.argsort(kind="stable")
        self._keys = keys[order]
        self._shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)[order]
        self._row = np.concatenate([np.empty(0, np.int32), *(np.arange(n, dtype=np.int32) for n in counts)])[order]

    def __len__(self) -> int:
        return len(self._keys)

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Which of the keys (N,) are there, (N,) bool."""
        return self._find(keys)[1]

    def _find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the keys are among the sorted ones, and whether they are there."""
        if len(self._keys) == 0:
            return np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
        at = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return at, self._keys[at] == keys

    def rows(self, name: str, keys: np.ndarray) -> Rows:
        """The tensor `name` of the entries of the keys (N,), in their order; InputError where entries are missing."""
        at, present = self._find(keys)
        if not present.all():
            raise InputError(f"{self.folder}: {(~present).sum()} of {len(keys)} entries are missing; run again")
        return Rows(self._shards, name, self._shard[at], self._row[at])

    def context(self, keys: np.ndarray) -> tuple[Rows, ...]:
        """The tensors of the contexts of `encode_texts`' keys (P+1,), the last row of each being no prompt's."""
        at, present = self._find(keys[-1:])
        names = sorted(self._shards[self._shard[at[0]]].tensors) if present.all() else ["context0"]
        return tuple(self.rows(name, keys) for name in names)


@dataclass(frozen=True)
class Entries:
    """Keys (N,), names and captions of images, in the order of their source."""

    keys: np.ndarray
    names: list[str]
    captions: list[str]
    skipped: Skipped | None

    def kept(self, cache: Cache) -> Entries:
        """Those that the cache has, once all processes have written theirs.

        The rest could not be read and is in the logs; InputError where that is more than 5 % of the source. All
        processes see the same, so that all of them stop or none.
        """
        present = cache.has(self.keys)
        missing = int((~present).sum())
        if self.skipped is not None:
            self.skipped.check(len(present), missing)
            left_out = self.skipped.listed + missing
            if self.skipped.process[0] == 0:
                named = f", each named in {self.skipped.logs}" if left_out else ""
                counts = f"{len(present) - missing:,} pairs are read, {left_out:,} left out"
                print(f"{self.skipped.source}: {counts}{named}", flush=True)
        elif missing:
            raise InputError(f"{cache.folder}: {missing} of {len(present)} entries are missing; run again")
        kept = np.flatnonzero(present).tolist()
        return Entries(
            self.keys[present], [self.names[i] for i in kept], [self.captions[i] for i in kept], self.skipped
        )


def encode_pairs(
    pipe: Pipeline,
    pairs: str | Sequence[Pair],
    folder: Path,
    *,
    batch: int,
    dtype: torch.dtype = torch.float32,
    process: tuple[int, int] = (0, 1),
    skipped: Skipped | None = None,
    seed: int = 0,
) -> Entries:
    """Encode those images that are not in the cache yet, `batch` at a time; the entries of all of them.

    pairs: a source (see `read_pairs`, also for `seed`) or pairs at hand. process: (rank, number of processes); each
    encodes every so manyth image. dtype: float32 or float16, as what is kept. An image that cannot be read goes to
    `skipped` (of a source: skipped.jsonl in the folder, unless given) and is tried again by the next run; without
    `skipped` it raises Unusable.
    """
    if isinstance(pairs, str) and skipped is None:
        skipped = Skipped(folder / "skipped.jsonl", process)

    def read() -> Iterable[Pair]:
        if not isinstance(pairs, str):
            return pairs
        assert skipped is not None
        return read_pairs(pairs, skipped, seed)

    key = _image_keys(pipe, dtype)
    keys, names, captions = bytearray(), [], []
    for pair in read():  # decodes nothing, so that a later run, which finds all, starts at once
        keys += key(pair.identity)
        names.append(pair.name)
        captions.append(pair.caption)
    entries = Entries(np.frombuffer(bytes(keys), KEY), names, captions, skipped)
    todo = _todo(entries.keys, folder, process)
    if not todo.any():
        return entries
    size = pipe.image_size

    def images() -> Iterator[tuple[bytes, Image.Image]]:
        for pair, wanted in zip(read(), todo.tolist()):
            if not wanted:
                continue
            try:
                image = resized(pair.open(), size)
            except Unusable as error:
                if skipped is None:
                    raise
                skipped.add(error)
            else:
                yield key(pair.identity), image

    waiting = iter(progress(images(), "encode images", int(todo.sum())))
    with _Writer(folder, dtype) as writer:
        while chunk := list(islice(waiting, batch)):
            mean, std = pipe.encode_images([image for _, image in chunk])
            writer.add([key for key, _ in chunk], mean=mean, std=std)
    return entries


def encode_texts(
    pipe: Pipeline,
    texts: Sequence[str],
    folder: Path,
    *,
    batch: int,
    dtype: torch.dtype = torch.float32,
    process: tuple[int, int] = (0, 1),
) -> np.ndarray:
    """Encode those prompts that are not in the cache yet; the keys (P+1,) of all, the last one that of no prompt.

    `dtype` and `process` as in `encode_pairs`.
    """
    key = _text_keys(pipe, dtype)
    keys = np.frombuffer(b"".join([*(key(f"prompt {text}") for text in texts), key("none")]), KEY)
    todo = np.flatnonzero(_todo(keys, folder, process)).tolist()
    prompts = [i for i in todo if i < len(texts)]
    with _Writer(folder, dtype) as writer:
        if len(prompts) < len(todo):
            writer.add([keys[-1:].tobytes()], **_by_name(pipe.encode_unconditional()))
        for start in progress(range(0, len(prompts), batch), "encode prompts"):
            chunk = prompts[start : start + batch]
            context = pipe.encode_prompts([texts[i] for i in chunk])
            writer.add([keys[i : i + 1].tobytes() for i in chunk], **_by_name(context))
    return keys


def _by_name(context: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"context{i}": tensor for i, tensor in enumerate(context)}


def _todo(keys: np.ndarray, folder: Path, process: tuple[int, int]) -> np.ndarray:
    """Which of the keys (N,) this process encodes, (N,) bool.

    By their number, not by what others have left: that changes while they write.
    """
    first = np.zeros(len(keys), bool)
    first[np.unique(keys, return_index=True)[1]] = True
    return first & (np.arange(len(keys)) % process[1] == process[0]) & ~Cache(folder).has(keys)


class _Writer:
    """Collects entries and writes them as shards of unique names, the last one at the end of the context."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        if dtype not in (torch.float32, torch.float16):
            raise ValueError(f"{dtype}; accepted: torch.float32, torch.float16")
        self.folder, self.dtype = folder, dtype
        self._clear()

    def _clear(self) -> None:
        self.keys: list[bytes] = []
        self.chunks: dict[str, list[Tensor]] = {}
        self.bytes, self.begun = 0, time.monotonic()

    def __enter__(self) -> _Writer:
        return self

    def add(self, keys: list[bytes], **tensors: Tensor) -> None:
        """Entries' keys, 16 bytes each, and tensors with a row each."""
        kept = {name: tensor.detach().to("cpu", self.dtype) for name, tensor in tensors.items()}
        for name, tensor in kept.items():  # all of them before any is taken: rows and keys stay together
            if not tensor.isfinite().all():
                raise InputError(f"{name}: what the network says is not finite in {self.dtype}; accepted: float32")
        for name, tensor in kept.items():
            self.chunks.setdefault(name, []).append(tensor)
            self.bytes += tensor.nbytes
        self.keys += keys
        if self.bytes >= SHARD_BYTES or time.monotonic() - self.begun >= SHARD_SECONDS:
            self.write()

    def write(self) -> None:
        keys = b"".join(self.keys)
        tensors = {name: torch.cat(chunks) for name, chunks in self.chunks.items()}
        tensors["keys"] = torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(-1, KEY.itemsize)
        metadata = {"keys_crc32": f"{zlib.crc32(keys):08x}"}
        write_tensors(self.folder / f"entries-{uuid.uuid4().hex}.safetensors", tensors, metadata)
        self._clear()

    def __exit__(self, *error: object) -> None:
        if self.keys:  # after an interruption too
            self.write()


# ----------------------------------------------------------------------------------------------------- CLIP's features
def features(path: Path, clip: CLIP, images: Sequence[Path], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """CLIP embeddings (I,E) of image files and (P,E) of texts, on the CPU; what the file `path` holds is kept.

    The file holds a SHA-256 of each row's image or text, and one of CLIP (`clip_digest`): an image that has changed is
    embedded again, and with another CLIP everything is. Images are opened one at a time; a killed process loses a
    minute's work at most. Unusable names an image that cannot be read.
    """
    made_by = clip_digest(clip)
    known: dict[bytes, Tensor] = {}
    with suppress(InputError, KeyError):  # of a damaged file nothing is taken
        saved = read_weights(path) if path.exists() else {"clip": torch.empty(0)}
        if saved["clip"].numpy().tobytes() == made_by:
            known = dict(zip((key.tobytes() for key in saved["keys"].numpy()), saved["features"]))

    def save() -> None:
        keys = torch.tensor([list(key) for key in known], dtype=torch.uint8)
        clip_key = torch.tensor(list(made_by), dtype=torch.uint8)
        write_tensors(path, {"clip": clip_key, "keys": keys, "features": torch.stack(list(known.values()))})

    def embed(keys: list[bytes], items: Sequence[Any], what: str, call: Callable[[Any], Tensor]) -> Tensor:
        missing = {key: item for key, item in zip(keys, items) if key not in known}
        last = time.monotonic()
        for start in progress(range(0, len(missing), BATCH), f"CLIP, {what}"):
            chunk = dict(islice(missing.items(), start, start + BATCH))
            known.update(zip(chunk, call(list(chunk.values())).float().cpu()))
            if time.monotonic() - last > 60 or start + BATCH >= len(missing):
                save()
                last = time.monotonic()
        return torch.stack([known[key] for key in keys]) if keys else torch.empty(0, clip.width)

    device = clip.logit_scale.device
    image_keys = [_content(image) for image in images]
    text_keys = [hashlib.sha256(b"text\0" + text.encode()).digest() for text in texts]
    with torch.no_grad():
        return (
            embed(image_keys, images, "images", lambda chunk: embed_files(clip, chunk)),
            embed(text_keys, texts, "prompts", lambda chunk: clip.encode_text(clip.tokenizer(chunk).to(device))),
        )


@torch.no_grad()
def embed_files(clip: CLIP, paths: Sequence[str | Path]) -> Tensor:
    """CLIP embeddings (B,E) of image files, which are decoded one at a time. Unusable names one that cannot be read."""
    pixels = torch.cat([clip.preprocess([open_image(path)]) for path in paths])
    return clip.encode_image(pixels.to(clip.logit_scale.device))


def _content(path: Path) -> bytes:
    """The SHA-256 of a file's content."""
    regular(path, str(path))
    try:
        return bytes.fromhex(checksum(path))
    except OSError as error:
        raise Unusable(str(path), f"the image cannot be read ({first_line(error)})") from error


# ---------------------------------------------------------------------------------------------------------------- keys
def clip_digest(clip: CLIP) -> bytes:
    """The SHA-256 of all that decides CLIP's features: weights, config, preprocessing of images, tokenizer."""
    digest = hashlib.sha256(json.dumps([READING, clip.preprocessing], sort_keys=True).encode())
    _add_network(digest, clip)
    digest.update(_tokenizer(clip.tokenizer))
    return digest.digest()


def pipeline_digest(pipe: Pipeline) -> str:
    """The SHA-256, in hexadecimal, of all that decides a pipeline's images and latents.

    Of the weights of UNet, VAE and text encoders in float32, whatever the type they are loaded in, of their
    configs, the tokenizers and the noise schedule. Another folder with the same files has the same digest.
    """
    digest = hashlib.sha256()
    _add_network(digest, pipe.unet, dtype=torch.float32)
    _add_network(digest, pipe.vae, dtype=torch.float32)
    _add_text(digest, pipe, torch.float32)
    schedule = {name: value for name, value in pipe.schedule.config.items() if not name.startswith("_")}
    digest.update(json.dumps([schedule, pipe.zero_unconditional], sort_keys=True).encode())
    return digest.hexdigest()


def _image_keys(pipe: Pipeline, dtype: torch.dtype) -> Callable[[str], bytes]:
    digest = hashlib.sha256()
    _add_network(digest, pipe.vae, ("decoder.", "post_quant_conv."))
    options = [READING, PREPROCESSING, pipe.image_size, str(pipe.dtype), str(dtype)]
    return _keys(["image", digest.hexdigest(), *options])


def _text_keys(pipe: Pipeline, dtype: torch.dtype) -> Callable[[str], bytes]:
    digest = hashlib.sha256()
    _add_text(digest, pipe)
    xl = [pipe.image_size, pipe.unet.time_id_width, pipe.zero_unconditional] if pipe.text_encoder_2 is not None else []
    return _keys(["text", digest.hexdigest(), xl, str(pipe.dtype), str(dtype)])


def _keys(what: list[object]) -> Callable[[str], bytes]:
    """The 16-byte digest of an identity, in the name of `what`."""
    begun = hashlib.blake2b(json.dumps(what).encode() + b"\n", digest_size=KEY.itemsize)

    def key(identity: str) -> bytes:
        digest = begun.copy()
        digest.update(identity.encode("utf-8", "surrogatepass"))
        return digest.digest()

    return key


def _add_text(digest: hashlib._Hash, pipe: Pipeline, dtype: torch.dtype | None = None) -> None:
    for encoder, tokenizer in ((pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2)):
        if encoder is not None and tokenizer is not None:
            _add_network(digest, encoder, dtype=dtype)
            digest.update(_tokenizer(tokenizer))


def _add_network(
    digest: hashlib._Hash, network: Any, without: tuple[str, ...] = (), dtype: torch.dtype | None = None
) -> None:
    """All weights, as `dtype` if given, except of those whose names begin so, and the config, its notes left out."""
    config = {name: value for name, value in network.config.items() if not name.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True).encode())
    for name, weight in sorted(network.state_dict().items()):
        if not name.startswith(without):
            weight = weight.to("cpu", dtype).contiguous()
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.flatten().view(torch.uint8).numpy())


def _tokenizer(tokenizer: Tokenizer) -> bytes:
    what = [tokenizer.vocab, tokenizer.merges, tokenizer.length, tokenizer.start, tokenizer.end, tokenizer.pad]
    return json.dumps(what, sort_keys=True).encode()
