"""The tokenizer: ids of the reference for awkward text, and files in and out."""

from __future__ import annotations

import json
import shutil

import pytest
from comparisons import GOLDENS, check_tokens, golden, names

from minialign.models.tokenizer import END, START, Tokenizer, byte_characters


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


def test_merges_with_windows_line_ends(tmp_path):
    shutil.copytree(GOLDENS / "tokenizer", tmp_path, dirs_exist_ok=True)
    lines = (tmp_path / "merges.txt").read_bytes()
    (tmp_path / "merges.txt").write_bytes(lines.replace(b"\n", b"\r\n"))
    check_tokens(golden("tokens", "tokenizer")[0], tmp_path)


def test_tokenizer_json_goes_before_an_older_vocabulary(tmp_path):
    shutil.copytree(GOLDENS / "tokenizer_json", tmp_path, dirs_exist_ok=True)
    (tmp_path / "vocab.json").write_text(json.dumps({START: 0, END: 1}))
    (tmp_path / "merges.txt").write_text("")
    check_tokens(golden("tokens", "tokenizer_json")[0], tmp_path)
    other = Tokenizer.from_pretrained(GOLDENS / "tokenizer")
    other.save_pretrained(tmp_path)  # and what is saved is what is read again
    assert Tokenizer.from_pretrained(tmp_path)(["a dog"]).tolist() == other(["a dog"]).tolist()
    assert not (tmp_path / "tokenizer.json").exists()


def test_added_tokens_in_any_case_unless_they_say_otherwise(tmp_path):
    shutil.copytree(GOLDENS / "tokenizer_json", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    for i, (token, normalized) in enumerate((("<Sks>", True), ("<Big>", False))):
        whole["added_tokens"].append({"id": 584 + i, "content": token, "normalized": normalized})
    path.write_text(json.dumps(whole))
    encode = Tokenizer.from_pretrained(tmp_path).encode
    assert encode("<sks><SKS><Sks>") == [584] * 3 and encode("<Big>") == [585] and 585 not in encode("<big><BIG>")
