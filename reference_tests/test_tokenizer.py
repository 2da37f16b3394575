"""The tokenizer: ids of the reference for awkward text, and files in and out."""

from __future__ import annotations

import json

import pytest
from comparisons import GOLDENS, check_tokens, golden, names

from minialign.models.tokenizer import END, Tokenizer, byte_characters


@pytest.mark.parametrize("name", names("tokens"))
def test_golden(name):
    check_tokens(golden("tokens", name)[0], GOLDENS / name)


@pytest.mark.parametrize("name", names("tokens"))
def test_saved_tokenizer_gives_the_same_ids(name, tmp_path):
    Tokenizer.from_pretrained(GOLDENS / name).save_pretrained(tmp_path)
    check_tokens(golden("tokens", name)[0], tmp_path)


def test_every_byte_has_a_character_of_its_own():
    characters = byte_characters()
    assert len(set(characters)) == 256 and all(character.isprintable() for character in characters)
    assert set(characters) <= json.loads((GOLDENS / "tokenizer" / "vocab.json").read_text(encoding="utf-8")).keys()


def test_long_text_keeps_its_start_and_the_end_token():
    tokenizer = Tokenizer.from_pretrained(GOLDENS / "tokenizer")
    row = tokenizer(["dog " * 100])[0].tolist()
    assert len(row) == 77 and row[0] == tokenizer.start and row[-1] == tokenizer.end and tokenizer.end not in row[:-1]
    assert tokenizer([]).shape == (0, 77)


@pytest.mark.parametrize(("given", "length"), [(20, 20), (10**30, 77), (None, 77)])
def test_length(given, length, tmp_path):
    Tokenizer.from_pretrained(GOLDENS / "tokenizer").save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": given}))
    assert Tokenizer.from_pretrained(tmp_path)(["a dog"]).shape == (1, length)


def test_refuses_a_vocabulary_without_the_special_tokens():
    with pytest.raises(ValueError, match="startoftext"):
        Tokenizer({END: 0}, [])
