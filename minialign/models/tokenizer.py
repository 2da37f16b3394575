"""CLIP's byte-pair tokenizer (Radford et al. 2021; byte-pair encoding: Sennrich et al. 2016).

Reads and writes vocab.json and merges.txt, gives the same ids as transformers' CLIPTokenizer.
"""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .pretrained import MALFORMED, InputError, read_bytes, read_json

START, END = "<|startoftext|>", "<|endoftext|>"
SUFFIXES = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def byte_characters() -> list[str]:
    """A printable character for each byte 0..255, as GPT-2 chose them: itself where printable, else 256 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def split_words(text: str) -> list[str]:
    """Lower-cased text in the pieces that are encoded one by one.

    A piece is an English suffix such as 's, a run of letters, a single digit or other number, or a run of anything else
    that is not white space (Unicode categories L*, N*, and the rest).
    """
    # one character at a time, because str.lower() knows that a sigma ends a word and the reference does not
    text = "".join(character.lower() for character in unicodedata.normalize("NFC", text))
    words, i = [], 0
    while i < len(text):
        piece = next((piece for piece in SUFFIXES if text.startswith(piece, i)), None)
        if piece is None:
            kind, end = _kind(text[i]), i + 1
            while kind in "LO" and end < len(text) and _kind(text[end]) == kind:
                end += 1
            piece = text[i:end]
            if kind == " ":
                i = end
                continue
        words.append(piece)
        i += len(piece)
    return words


def _kind(character: str) -> str:
    if character.isspace() and not "\x1c" <= character <= "\x1f":  # separators to Python, not to Unicode
        return " "
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "O"


class Tokenizer:
    """Call it with a list of strings to get ids (B, length), padded and truncated; length is 77 for CLIP."""

    FILES = (
        "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json",
    )  # fmt: skip

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], config: dict[str, Any] | None = None):
        self.merges, self.config = merges, config or {}
        length = self.config.get("model_max_length") or 77
        self.length: int = length if length < 1 << 16 else 77  # transformers writes 1e30 where none was set
        pad = self.config.get("pad_token") or END
        pad = pad["content"] if isinstance(pad, dict) else pad
        added = {token["content"]: int(i) for i, token in (self.config.get("added_tokens_decoder") or {}).items()}
        self.vocab = vocab = vocab | added
        for token in (START, END, pad):
            if token not in vocab:
                raise ValueError(f"tokenizer: vocab.json has no {token!r}")
        if any(type(i) is not int or i < 0 for i in vocab.values()):
            raise ValueError("tokenizer: vocab.json has an id that is not a number from 0 on")
        self.start, self.end, self.pad = vocab[START], vocab[END], vocab[pad]
        special = sorted({START, END, pad, *added}, key=len, reverse=True)  # the longest first
        self._special = re.compile("(" + "|".join(map(re.escape, special)) + ")")
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._bytes = byte_characters()
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def from_pretrained(cls, folder: str | Path, settings: dict[str, Any] | None = None) -> Tokenizer:
        """Read vocab.json and merges.txt, or tokenizer.json alone, and tokenizer_config.json of a folder.

        `settings` go before those of the files. InputError names a file that is missing or not what it should be.
        """
        folder = Path(folder)
        path = folder / "tokenizer_config.json"
        config = read_json(path) if path.exists() else {}
        path = folder / "special_tokens_map.json"  # goes before the config: 2.x says its padding there
        config |= {key: token for key, token in (read_json(path) if path.exists() else {}).items() if "_token" in key}
        config |= settings or {}
        path = folder / "added_tokens.json"
        try:
            added = dict(config.get("added_tokens_decoder") or {})
            if path.exists():
                added |= {str(i): {"content": token} for token, i in read_json(path).items()}
            if (folder / "vocab.json").exists():
                vocab = read_json(folder / "vocab.json")
                lines = read_bytes(folder / "merges.txt").decode("utf-8").split("\n")
                pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
            else:  # what transformers writes since version 5
                whole = read_json(folder / "tokenizer.json")
                vocab = whole["model"]["vocab"]
                added |= {str(token["id"]): token for token in whole["added_tokens"]}
                pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in whole["model"]["merges"]]
            return cls(vocab, [(a, b) for a, b in pairs], config | ({"added_tokens_decoder": added} if added else {}))
        except InputError:
            raise
        except MALFORMED as error:
            raise InputError(f"{folder}: not a CLIP tokenizer's files ({error})") from error

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.length, "bos_token": START}
        config |= {"eos_token": END, "unk_token": END, "pad_token": END} | self.config
        special = {key: config[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
        merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in self.merges), ""])
        (folder / "vocab.json").write_text(json.dumps(self.vocab, ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text(merges, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")

    def __call__(self, texts: list[str]) -> Tensor:
        rows = []
        for text in texts:
            ids = [self.start, *self.encode(text)[: self.length - 2], self.end]
            rows.append(ids + [self.pad] * (self.length - len(ids)))
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), self.length)

    def encode(self, text: str) -> list[int]:
        """The ids of a text without start and end; a special token that stands in the text is taken as such."""
        ids = []
        for i, piece in enumerate(self._special.split(text)):
            if i % 2:  # split puts what matched at the odd places
                ids.append(self.vocab[piece])
            else:
                ids += [token for word in split_words(piece) for token in self._encode_word(word)]
        return ids

    def _encode_word(self, word: str) -> list[int]:
        if word not in self._cache:
            parts = [self._bytes[byte] for byte in word.encode("utf-8")]
            parts[-1] += "</w>"
            while len(parts) > 1:
                pairs = list(zip(parts, parts[1:]))
                best = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
                if best not in self._ranks:
                    break
                merged, i = [], 0
                while i < len(parts):
                    step = 2 if tuple(parts[i : i + 2]) == best else 1
                    merged.append("".join(parts[i : i + step]))
                    i += step
                parts = merged
            self._cache[word] = [self.vocab.get(part, self.end) for part in parts]
        return self._cache[word]
