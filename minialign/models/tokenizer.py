"""CLIP's byte-pair tokenizer (Radford et al. 2021; byte-pair encoding: Sennrich et al. 2016).

Reads and writes transformers' files, gives the same ids as transformers' CLIPTokenizer.
"""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import MALFORMED, InputError, read_bytes, read_json

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
        added = (self.config.get("added_tokens_decoder") or {}).items()
        self.vocab = vocab = vocab | {token["content"]: int(i) for i, token in added}
        for token in (START, END, pad):
            if token not in vocab:
                raise ValueError(f"tokenizer: vocab.json has no {token!r}")
        if any(type(i) is not int or i < 0 for i in vocab.values()):
            raise ValueError("tokenizer: vocab.json has an id that is not a number from 0 on")
        self.start, self.end, self.pad = vocab[START], vocab[END], vocab[pad]
        # tokens that are found before the text is cut into words, some of them in upper or lower case
        self._any_case = {token["content"].lower(): int(i) for i, token in added if token.get("normalized")}
        exact = {START, END, pad, *(token["content"] for _, token in added)}
        special = sorted(exact | self._any_case.keys(), key=len, reverse=True)  # the longest first
        patterns = (f"(?i:{re.escape(token)})" if token in self._any_case else re.escape(token) for token in special)
        self._special = re.compile("(" + "|".join(patterns) + ")")
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._bytes = byte_characters()
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def from_pretrained(cls, folder: str | Path, settings: dict[str, Any] | None = None) -> Tokenizer:
        """Read tokenizer.json, or vocab.json and merges.txt, and tokenizer_config.json of a folder.

        Where two files disagree, the one that transformers goes by is read: tokenizer.json before vocab.json, which
        may be an older version's, and the config's added_tokens_decoder before special_tokens_map.json and
        added_tokens.json. `settings` go before all. InputError names a file that is missing or not what it should be.
        """
        folder = Path(folder)

        def optional(name: str) -> dict[str, Any]:
            return read_json(folder / name) if (folder / name).exists() else {}

        try:
            config, combined = optional("tokenizer_config.json"), optional("tokenizer.json")
            if combined:
                vocab, merges = combined["model"]["vocab"], combined["model"]["merges"]
            else:
                vocab = read_json(folder / "vocab.json")
                lines = re.split(r"\r?\n", read_bytes(folder / "merges.txt").decode("utf-8"))
                merges = [line for line in lines if line and not line.startswith("#version")]
            if "added_tokens_decoder" not in config:
                added = {
                    str(i): {"content": token, "normalized": True} for token, i in optional("added_tokens.json").items()
                }
                added |= {str(token["id"]): token for token in combined.get("added_tokens", [])}
                config |= {key: token for key, token in optional("special_tokens_map.json").items() if "_token" in key}
                config |= {"added_tokens_decoder": added} if added else {}
            pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
            return cls(vocab, [(a, b) for a, b in pairs], config | (settings or {}))
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
        for stale in ("tokenizer.json", "added_tokens.json"):
            (folder / stale).unlink(missing_ok=True)  # of a tokenizer that was here before: it would be read first

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
                ids.append(self.vocab[piece] if piece in self.vocab else self._any_case[piece.lower()])
            else:
                ids += [token for word in split_words(piece) for token in self._encode_word(word)]
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, in lower case and with a space after each word or mark."""
        tokens, byte = {i: token for token, i in self.vocab.items()}, {c: bytes([i]) for i, c in enumerate(self._bytes)}
        text = "".join(tokens[i] for i in ids).replace("</w>", " ").rstrip()
        return b"".join(byte.get(c) or c.encode() for c in text).decode("utf-8", errors="replace")

    def _encode_word(self, word: str) -> list[int]:
        if word not in self._cache:
            symbols = [self._bytes[byte] for byte in word.encode("utf-8")]
            symbols[-1] += "</w>"
            while len(symbols) > 1:
                pairs = list(zip(symbols, symbols[1:]))
                best = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
                if best not in self._ranks:
                    break
                merged, i = [], 0
                while i < len(symbols):
                    step = 2 if tuple(symbols[i : i + 2]) == best else 1
                    merged.append("".join(symbols[i : i + step]))
                    i += step
                symbols = merged
            self._cache[word] = [self.vocab.get(symbol, self.end) for symbol in symbols]
        return self._cache[word]
