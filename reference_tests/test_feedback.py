"""The label store, and the label files that others bring."""

import csv
import json
import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial

import numpy as np
import pytest
from PIL import Image

from minialign.feedback import (
    SIMULATED,
    FeedbackStore,
    LabelFile,
    StoreError,
    export_comparisons,
    export_labels,
    import_into_run,
    new_judgements,
    read_judgements,
    read_prompts,
)
from minialign.feedback.store import NewLabel
from minialign.files import InputError
from minialign.measures import fleiss_kappa


def import_labels(store, path):
    return store.merge(*new_judgements(store.folder, LabelFile(path)))


def verdicts_of(path):
    """(prompt, image, verdict) of each label of a file."""
    return [(label.prompt, label.image, label.verdict) for label in read_judgements(path)[0]]


def test_labels_are_kept_and_counted_by_majority(tmp_path):
    store = FeedbackStore(tmp_path)
    store.add_images([("a cat", "images/0.png", 5), ("a dog", "images/1.png", 6), ("a cat", "images/2.png", 7)])
    store.add_images([("a cat", "images/0.png", 5)])  # again: nothing new
    ids = [image.id for image in store.images()]
    assert len(ids) == 3
    store.add_labels("ann", zip(ids, ["good", "bad", "skip"]))
    store.add_labels("bob", zip(ids, ["bad", "bad", "good"]))
    store.add_labels("cy", [(ids[0], "bad")])
    store.add_labels("cy", [(ids[0], "good")])  # changed her mind
    store.close()
    again = FeedbackStore(tmp_path)
    assert again.database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert again.database.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL: a commit waits for the disk
    assert [(i.prompt, i.path, i.seed) for i in again.images()][1] == ("a dog", tmp_path / "images/1.png", 6)
    assert again.labels() == {ids[0]: 1.0, ids[1]: 0.0, ids[2]: 1.0}
    again.add_labels("bob", [(ids[2], "bad")])
    again.add_labels("cy", [(ids[2], "good")])  # one good, one bad and a skip: a tie
    assert ids[2] not in again.labels()
    again.close()


def test_threads_that_open_a_new_store_at_once_make_one(tmp_path):
    with ThreadPoolExecutor(4) as pool:  # whoever is first
        for store in pool.map(lambda _: FeedbackStore(tmp_path), range(4)):
            assert store.query("PRAGMA user_version") == [(4,)] and store.images() == []
            store.close()


def altered(tmp_path, *statements):
    FeedbackStore(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / "feedback.sqlite", isolation_level=None)) as database:
        for statement in statements:
            database.execute(statement)


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        (["PRAGMA user_version=2"], "schema version 2; accepted: 4"),
        (["PRAGMA user_version=0"], "schema version 0; accepted: 4"),
        (["CREATE TRIGGER t BEFORE INSERT ON labels BEGIN SELECT RAISE(IGNORE); END"], "holds 'trigger t'"),
        (["CREATE VIEW v AS SELECT * FROM labels"], "holds 'view v'"),
        (["DROP TABLE labels", "CREATE VIEW labels AS SELECT 1 AS image, 'a' AS labeller"], "holds 'view labels'"),
        (["DROP TABLE comparisons"], "lacks a table"),
        (["CREATE UNIQUE INDEX i ON labels (verdict)"], "holds 'index i'"),  # REPLACE would swallow labels
        (["ALTER TABLE labels ADD COLUMN more TEXT"], "holds 'table labels'"),
    ],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_a_store_of_strangers_is_refused(tmp_path, statements, message, read_only):
    altered(tmp_path, *statements)
    with pytest.raises(InputError) as error:
        FeedbackStore(tmp_path, read_only)
    assert message in str(error.value) and "\n" not in str(error.value) and "feedback.sqlite" in str(error.value)


def test_sql_of_strangers_does_not_run(tmp_path):
    store = FeedbackStore(tmp_path)
    assert store.query("PRAGMA trusted_schema") == [(0,)] and store.query("PRAGMA foreign_keys") == [(1,)]
    store.add_images([("a", "0.png", 1), ("b", "1.png", 1)])
    store.database.execute("UPDATE images SET path = x'ff00' WHERE id = 1")
    store.database.execute("INSERT INTO labels VALUES (2, 'a', 'excellent', 'x', NULL), (2, 'b', 'good', 'x', NULL)")
    assert store.labels() == {2: 1.0}  # what is no verdict does not count
    for look in (store.images, store.agreement, partial(export_labels, store, tmp_path / "out.csv")):
        with pytest.raises(InputError) if look is not store.agreement else pytest.raises(InputError, match="none of"):
            store.database.execute("INSERT OR REPLACE INTO labels VALUES (1, 'a', 'good', 'x', NULL)")
            look()
    assert not (tmp_path / "out.csv").exists()
    store.close()


def test_a_file_that_is_damaged_behind_its_first_page_is_one_line(tmp_path):
    store = FeedbackStore(tmp_path)
    store.add_images([(f"prompt {i}", f"{i}.png", i) for i in range(500)])
    store.add_labels("ann", [(i, "good") for i in range(1, 501)])
    store.close()
    path = tmp_path / "feedback.sqlite"
    content = bytearray(path.read_bytes())
    content[4096 * 8 :] = b"\xff" * (len(content) - 4096 * 8)
    path.write_bytes(content)
    told = 0
    store = FeedbackStore(tmp_path)
    add = partial(store.add_images, [("new", "new.png", 1)]), partial(store.add_labels, "bob", [(1, "bad")])
    for look in (store.images, store.labels, store.agreement, store.label_rows, store.check_images, *add):
        try:
            look()
        except StoreError as error:
            told += 1
            assert error.reason == "damaged" and "\n" not in str(error) and str(path) in str(error)
    assert told >= 5
    store.close()


def test_a_store_that_another_program_holds_is_one_line(tmp_path):
    store = FeedbackStore(tmp_path)
    store.add_images([("a", "0.png", 1)])
    store.database.execute("PRAGMA busy_timeout=10")
    with closing(sqlite3.connect(tmp_path / "feedback.sqlite", isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        for write in (
            partial(store.add_images, [("b", "1.png", 1)]),
            partial(store.add_labels, "ann", [(1, "good")]),
            partial(store.merge, [NewLabel("a", "0.png", 1, "ann", "good", None)]),
            partial(store.add_comparison, "ann", 1, tmp_path, tmp_path / "0.png", "tie", "left"),
        ):
            with pytest.raises(StoreError, match="another program holds it") as error:
                write()
            assert error.value.reason == "busy"
        assert store.labels() == {} and len(store.images()) == 1  # reading goes on
        holder.execute("ROLLBACK")
    store.add_labels("ann", [(1, "good")])
    store.close()


def test_a_run_that_cannot_be_written_is_read(tmp_path, monkeypatch):
    store = FeedbackStore(tmp_path)
    store.add_images([("a", "0.png", 1)])
    store.add_labels("ann", [(1, "good")])
    store.close()
    before = (tmp_path / "feedback.sqlite").read_bytes()
    prepared = FeedbackStore._prepared

    def write_protected(store, uri):  # as SQLite says it where the folder is, which the superuser's tests cannot have
        if "immutable" not in uri:
            raise sqlite3.OperationalError("unable to open database file")
        return prepared(store, uri)

    monkeypatch.setattr(FeedbackStore, "_prepared", write_protected)
    with pytest.raises(InputError, match="cannot be opened for writing"):
        FeedbackStore(tmp_path)
    store = FeedbackStore(tmp_path, read_only=True)
    assert store.labels() == {1: 1.0} and len(store.label_rows()) == 1
    with pytest.raises(StoreError) as error:
        store.add_labels("ann", [(1, "bad")])
    assert error.value.reason == "read-only"
    store.close()
    assert (tmp_path / "feedback.sqlite").read_bytes() == before
    (tmp_path / "feedback.sqlite-wal").write_bytes(b"labels that are not in the file yet")
    with pytest.raises(InputError, match="its latest labels are in feedback.sqlite-wal"):
        FeedbackStore(tmp_path, read_only=True)
    with pytest.raises(InputError, match="cannot be opened"):
        FeedbackStore(tmp_path / "none", read_only=True)
    assert not (tmp_path / "none").exists()


def test_where_a_person_judged_the_program_does_not_count(tmp_path):
    store = FeedbackStore(tmp_path)
    store.add_images([("a cat", f"{i}.png", i) for i in range(6)])
    store.add_labels(SIMULATED, zip(range(1, 7), ["good", "good", "bad", "good", "skip", "good"]))
    store.add_labels("ann", zip(range(1, 5), ["bad", "good", "good", "skip"]))
    store.add_labels("bob", [(2, "bad")])
    # 1 corrected; 2 a tie of people; 3 corrected; 4 skipped by a person; 5 by the program; 6 the program's alone
    assert store.labels() == {1: 0.0, 3: 1.0, 6: 1.0}
    assert store.labels(soft=True) == {1: 0.0, 2: 0.5, 3: 1.0, 6: 1.0}
    store.close()


def test_images_that_changed_after_they_were_added_are_named(images):
    store = FeedbackStore(images)
    store.add_images([("a", "0.png", 1), ("b", "1.png", 2), ("c", "later.png", 3)])
    Image.new("RGB", (8, 8)).save(images / "later.png")  # was not there: nothing is known of it
    store.check_images()
    Image.new("RGB", (8, 8), "red").save(images / "1.png")
    with pytest.raises(InputError, match=r"1\.png is not the image that was added: its SHA-256 differs$"):
        store.check_images()
    (images / "0.png").unlink()
    with pytest.raises(InputError, match=r"0\.png is gone \(1 more are gone or changed\)$"):
        store.check_images()
    store.close()


def test_what_is_kept_of_an_image(tmp_path):
    (tmp_path / "0.png").write_bytes(b"abc")
    store = FeedbackStore(tmp_path)
    store.add_images([("a cat", "0.png", 5), ("a cat", "gone.png", 6)], {"steps": 10, "guidance": 3.0})
    rows = store.database.execute("SELECT path, settings, sha256 FROM images").fetchall()
    told = '{"guidance": 3.0, "steps": 10}'
    # the digest of "abc" that FIPS 180-4 gives
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert rows == [("0.png", told, digest), ("gone.png", told, None)]
    store.close()


def test_labels_that_cannot_be_are_refused_whole(tmp_path):
    store = FeedbackStore(tmp_path)
    store.add_images([("a cat", "0.png", 5)])
    with pytest.raises(ValueError, match="'fine'; accepted: good, bad, skip"):
        store.add_labels("ann", [(1, "good"), (1, "fine")])
    with pytest.raises(sqlite3.IntegrityError):
        store.add_labels("ann", [(1, "good"), (2, "good")])
    assert store.labels() == {} and store.labellers() == []
    with pytest.raises(ValueError, match="accepted: this, other, tie"):
        store.add_comparison("ann", 1, tmp_path, tmp_path / "1.png", "left", "left")
    store.close()


def test_soft_labels_are_means(tmp_path):
    store = FeedbackStore(tmp_path)
    store.add_images([("a cat", f"{i}.png", i) for i in range(4)])
    for name, verdicts in {
        "a": ("good", "good", "skip"),
        "b": ("good", "bad", "skip"),
        "c": ("bad", "skip", "skip"),
    }.items():
        store.add_labels(name, zip((1, 2, 3), verdicts))
    assert store.labels(soft=True) == {1: pytest.approx(2 / 3), 2: 0.5}
    assert store.labels() == {1: 1.0}
    assert store.labellers() == ["a", "b", "c"]
    store.close()


def test_agreement_of_two_and_of_more(tmp_path):
    store = FeedbackStore(tmp_path)
    store.add_images([("a cat", f"{i}.png", i) for i in range(60)])
    assert store.agreement() is None
    pairs = [("good", "good")] * 20 + [("good", "bad")] * 5 + [("bad", "good")] * 10 + [("bad", "bad")] * 15
    store.add_labels("ann", [(i, a) for i, (a, _) in enumerate(pairs, 1)] + [(60, "good")])
    assert store.agreement() is None
    store.add_labels("bob", [(i, b) for i, (_, b) in enumerate(pairs, 1)])
    store.add_labels("cy", [(59, "skip")])  # whom nobody can agree with
    found = store.agreement()
    assert (found.images, found.labellers, found.alike) == (50, 2, 0.7) and found.kappa == pytest.approx(0.4)
    assert str(found) == "2 labellers agree on 70% of 50 images (Cohen's kappa: 0.40)"
    store.add_labels("cy", [(60, "good"), (1, "bad")])
    found = store.agreement()
    # 20 + 15 of 50 alike; then image 1 has good, good, bad: 1/3; image 60 has good, good: 1
    assert (found.images, found.labellers) == (51, 3) and found.alike == pytest.approx((19 + 15 + 1 / 3 + 1) / 51)
    counts = [[2, 0, 0]] * 19 + [[2, 1, 0]] + [[1, 1, 0]] * 15 + [[0, 2, 0]] * 15 + [[2, 0, 0]]
    assert found.kappa == pytest.approx(fleiss_kappa(np.array(counts)))
    store.close()


def test_an_image_is_judged_for_each_of_its_prompts(tmp_path):
    store = FeedbackStore(tmp_path)
    store.add_images([("a cat", "0.png", None), ("a dog", "0.png", None)])
    cat, dog = store.images()
    store.add_labels("ann", [(cat.id, "good"), (dog.id, "bad")])
    assert (cat.prompt, dog.prompt) == ("a cat", "a dog") and store.labels() == {cat.id: 1.0, dog.id: 0.0}
    store.close()


ROWS = [("a cat", "0.png", "good"), ("a\u2028dog", "1.png", "0"), ("a cow,\nred", "1.png", "Skip")]


@pytest.fixture
def images(tmp_path):
    for name in ("0.png", "1.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_files_of_labels_are_read(images, kind):
    path = images / f"labels.{kind}"
    if kind == "csv":
        path.write_text("prompt,image,label\n" + "".join(f'"{p}",{i},{v}\n' for p, i, v in ROWS))
    else:
        path.write_text(
            "".join(json.dumps({"prompt": p, "image": i, "label": v}, ensure_ascii=False) + "\n" for p, i, v in ROWS)
        )
    path = path.rename(path.with_suffix(path.suffix.upper()))
    verdicts = ["good", "bad", "skip"]
    assert verdicts_of(path) == [(p, (images / i).resolve(), v) for (p, i, _), v in zip(ROWS, verdicts)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "prompt,image,label\na,0.png,fine\n",
            "line 2: label 'fine'; accepted: 1, 0, true, false, yes, no, good, bad",
        ),
        (
            "prompt,picture,label\na,0.png,good\n",
            "no column 'image'; columns needed: prompt, image, label; found: prompt, pict",
        ),
        ("prompt,image,label\na,,good\n", "line 2: no 'image'; columns needed"),
        ("prompt,image,label\n", "labels.csv: no row of it judges an image; accepted: labels, pairs or rankings"),
        ("", "labels.csv: is empty"),
        ("prompt,image,label,Label\na,0.png,good,bad\n", "line 1: the column 'label' is there twice"),
        ("prompt,image,label\na,9.png,good\n", "9.png does not exist"),
        ("prompt,image,label\na,.,good\n", "is no file"),
        ('prompt,image,label\n"a\nb",0.png,good\na,0.png,fine\n', "line 4: label 'fine'"),
        (
            'prompt,image,label\n"a,0.png,good\n' + 200_000 * "x",
            "begins in line 2: not CSV (field larger than field limit",
        ),
        ("prompt,image,label\na,labels.csv,good\n", "/labels.csv: not an image; accepted: PNG, JPEG"),
        ("prompt,image,label\na,half.png,good\n", "half.png: the image cannot be read (image file is truncated"),
        ("prompt,image,label\na,pipe.png,good\n", "pipe.png is no file"),
        ("prompt,image,label\na,line.png,good\n", "line.png has 1200 x 20 pixels; accepted: sides up to 1 : 32"),
        # what no later stage reads
        ("prompt,image,label\na,icon.png,good\n", "icon.png: not an image; accepted: PNG, JPEG"),
        ("prompt,image,label\na,script.png,good\n", "script.png: not an image; accepted: PNG, JPEG"),
        ("prompt,image,label\na,deep.tif,good\n", "deep.tif: the image cannot be read (its mode is F"),
        # a comma that is not quoted
        ("image,label,prompt\n0.png,good,a circle, at night\n", "line 2: 4 fields where the header has 3"),
        # stray quotes
        ('prompt,image,label\na,0.png,good\n"b" c,0.png,bad\n', "in the row that begins in line 3: not CSV"),
        ('prompt,image,label\na,0.png,good\n"b,0.png,bad\nc,0.png,bad\na 12" d,0.png,bad\n', "begins in line 3"),
        (
            'prompt,image,label\n"b,0.png,bad\nc,0.png,bad\nd 12",0.png,bad\n',
            "line 2: a quote that opens here swallows",
        ),
        ('prompt,image,label\na,0.png,good\n"b,0.png,bad\n', "begins in line 3: not CSV (unexpected end of data)"),
        ("prompt,image,label\na\0b,0.png,good\n", "line 2: a NUL character"),
    ],
)
def test_bad_label_files_are_named(images, text, message):
    path = images / "labels.csv"
    path.write_text(text)
    Image.effect_noise((32, 32), 50).save(images / "whole.png")
    (images / "half.png").write_bytes((images / "whole.png").read_bytes()[:400])
    Image.new("RGB", (1200, 20)).save(images / "line.png")
    Image.new("RGB", (32, 32)).save(images / "icon.png", "ICO")
    Image.new("RGB", (32, 32)).save(images / "script.png", "EPS")  # PostScript runs programs
    Image.new("F", (32, 32)).save(images / "deep.tif")
    os.mkfifo(images / "pipe.png")
    with pytest.raises(InputError) as error:
        verdicts_of(path)
    assert message in str(error.value) and "\n" not in str(error.value) and "labels.csv" in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a \\ud83d", "image": "0.png", "label": 1}', "line 2: prompt holds half a character"),
        ('{"prompt": "a", "image": "0.png", "label": 1, "labeller": "\\ud83d"}', "line 2: labeller holds half"),
        (
            '{"prompt": "a\\u0000", "image": "0.png", "label": 1}',
            "line 2: prompt holds half a character (a lone surrogate) or",
        ),
        ('{"prompt": ["a"], "image": "0.png", "label": 1}', "line 2: prompt ['a']; accepted: text"),
        ('{"prompt": "a", "image": 1, "label": 1}', "line 2: image 1; accepted: text"),
        ('{"prompt": "a", "image": "0.png", "label": ["good", "fine"]}', "line 2: label 'fine'; accepted: 1, 0"),
        ('{"prompt": "a", "image": "0.png", "label": [["good"]]}', "line 2: label ['good']; accepted: 1, 0"),
        ('{"prompt": "a", "image": "0.png", "label": []}', "line 2: label []; accepted: a list"),
        ('{"prompt": "a", "image": "0.png", "label": "good", "label": "bad"}', "line 2: not JSON ('label' is there"),
        ('{"prompt": "a", "picture": "0.png", "label": 1}', "found: prompt, picture, label"),
        ('{"prompt": "a", "image": "0.png", "label": 1, "seed": %s}' % ("9" * 5000), "line 2: not JSON"),
        ('"a"', "line 2: a JSON object is needed"),
        ("[" * 100_000, "line 2: not JSON"),
    ],
)
def test_bad_lines_are_named(images, line, message):
    path = images / "labels.jsonl"
    path.write_text('{"prompt": "a", "image": "0.png", "label": "good"}\n' + line + "\n")
    for read in (verdicts_of, read_prompts):
        with pytest.raises(InputError) if read is verdicts_of else suppress(InputError) as error:
            read(path)
        assert error is None or message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("indent", [None, 1])
def test_one_json_array_is_rows_and_one_object_is_told(tmp_path, indent):
    path = tmp_path / "p.json"
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    path.write_text(json.dumps(rows, indent=indent))
    assert read_prompts(path) == ["a", "b"]
    for content, message in (
        ({"rows": rows}, "line 1: no 'prompt'; columns needed: prompt; found: rows" if indent is None else
         f"{path}: is one JSON object, and not of objects; accepted: one JSON object per line, one array of objects"),
        ([{"prompt": "a"}, "b"], f"{path}, row 2: a JSON object is needed"),
        ([{"prompt": "a"}, {"prompt": None}], f"{path}, row 2: no 'prompt'"),
    ):  # fmt: skip
        path.write_text(json.dumps(content, indent=indent))
        with pytest.raises(InputError) as error:
            read_prompts(path)
        assert message in str(error.value) and "\n" not in str(error.value)
    path.write_text('{\n"a": {"prompt": "a"},\n"b": {"prompt" "b"}}')
    with pytest.raises(InputError, match="not JSON .*line 3"):
        read_prompts(path)


HEADERS = {"csv": ",", "CSV": ";", "tsv": "\t", "csv ": "\t"}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", HEADERS)
def test_tables_as_programs_write_them(images, kind, end):
    sign = HEADERS[kind]
    path = images / f"labels.{kind.strip()}"
    rows = (
        ["\ufeffPrompt", " IMAGE", "label"],
        [f'"a{sign} ""b"""', "0.png", "Good"],
        ["c, d; e".replace(sign, "."), "1.png", "0"],
    )
    path.write_bytes((end.join(["", *map(sign.join, rows), "", sign * 2, ""])).replace("\ufeff", "").encode())
    found = [(f'a{sign} "b"', "good"), ("c, d; e".replace(sign, "."), "bad")]
    assert [(prompt, verdict) for prompt, _, verdict in verdicts_of(path)] == found
    assert read_prompts(path) == [prompt for prompt, _ in found]


def test_prompt_files(tmp_path):
    def read(name, content):
        (tmp_path / name).write_bytes(content)
        return read_prompts(tmp_path / name)

    assert read("a.txt", b"a red circle\rb, c\r\n\n a red circle \nd\n") == ["a red circle", "b, c", "d"]
    # one column: a comma is the prompt's
    assert read("b.csv", b'prompt\na red circle, at night\n"b, ""c"""\n') == ["a red circle, at night", 'b, "c"']
    assert read("c.tsv", b"Prompt\tCategory\na bear, at night\tAnimals\na cube\t\n") == ["a bear, at night", "a cube"]
    assert read("d.ndjson", b'{"PROMPT": "a"}\r{"prompt": "b"}\r') == ["a", "b"]
    for name, content, message in (
        ("e.csv", b"prompt,seed\na, b,1\n", "line 2: 3 fields where the header has 2"),
        ("f.csv", b"caption\tseed\na\t1\n", "no column 'prompt'; columns needed: prompt; found: caption, seed"),
        ("g.txt", b"a\nb\0c\n", "line 2: a NUL character"),
        ("h.txt", b"\n\n", "no prompts; accepted: one per line"),
        ("i.txt", b"\xff\xfea\0", "cannot be read as text"),
        ("j.jsonl", b'{"prompt": "a"}\n{"prompt": "\\ud83d"}\n', "line 2: prompt holds half a character"),
    ):
        with pytest.raises(InputError) as error:
            read(name, content)
        assert message in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "times", [("", ""), ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z"), ("2026-01-02T00:00:00Z", "")]
)
def test_the_later_line_of_a_labeller_is_the_later_verdict(images, times):
    path = images / "labels.csv"
    between = "".join(f"prompt {i},1.png,bad,ann,\n" for i in range(30))
    path.write_text(
        f"prompt,image,label,labeller,time\na,0.png,good,ann,{times[0]}\n{between}a,0.png,bad,ann,{times[1]}\nb,0.png,1,cy,\n"
    )
    found = {(prompt, image.name): verdict for prompt, image, verdict in verdicts_of(path)}
    assert found["a", "0.png"] == "bad" and len(verdicts_of(path)) == 32  # what finetune --feedback counts
    store = FeedbackStore(images)
    assert import_labels(store, path) == (32, 0)
    assert [row[3] for row in everything(store) if row[0] == "a"] == ["ann"] and store.labels()[1] == 0.0
    store.close()


def test_a_verdict_that_is_corrected_in_an_export_is_taken(images):
    store = FeedbackStore(images)
    store.add_images([("a", "0.png", 1)])
    store.add_labels("ann", [(1, "good")])
    path = images / "labels.csv"
    export_labels(store, path)
    assert import_labels(store, path) == (0, 0)
    path.write_text(path.read_text().replace(",good,", ",bad,"))  # by hand; its time is the same
    assert import_labels(store, path) == (1, 0) and store.labels() == {1: 0.0}
    store.close()


def test_where_a_file_tells_times_the_latest_counts_whatever_its_line(images):
    path = images / "labels.csv"
    path.write_text(
        "prompt,image,label,labeller,time\na,0.png,good,ann,2026-01-02T00:00:00Z\na,0.png,bad,ann,2026-01-01T00:00:00Z\n"
    )
    assert [row.verdict for row in read_judgements(path)[0]] == ["good"]


def test_a_failed_import_leaves_nothing(images, monkeypatch):
    path, run = images / "labels.csv", images / "new" / "run"
    path.write_text("prompt,image,label\na,0.png,good\nb,9.png,good\n")
    with pytest.raises(InputError):
        import_into_run(run, path)
    assert not run.parent.exists()
    path.write_text("prompt,image,label\na,0.png,good\n")
    with monkeypatch.context() as change:
        change.setattr(FeedbackStore, "merge", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            import_into_run(run, path)
        (images / "mine").mkdir()
        (images / "mine" / "thesis.txt").write_text("mine")
        with pytest.raises(ZeroDivisionError):
            import_into_run(images / "mine", path)
    assert not run.exists() and [file.name for file in (images / "mine").iterdir()] == ["thesis.txt"]
    assert import_into_run(run, path) == (1, 0)
    with monkeypatch.context() as change, pytest.raises(ZeroDivisionError):
        change.setattr(FeedbackStore, "merge", lambda *given: 1 / 0)
        import_into_run(run, path)
    assert (run / "feedback.sqlite").exists()  # which was there before
    with pytest.raises(InputError, match="cannot be used as a run"):
        import_into_run(path, path)


FORMULAS = ['=HYPERLINK("http://evil/","x")', "+1", "-1", "@SUM(1)", "\tx", "'=1", "''@", "'quoted'", "plain", "a=b"]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_no_cell_of_a_table_is_a_formula_and_all_come_back(images, kind):
    store = FeedbackStore(images)
    (images / "=0.png").write_bytes((images / "0.png").read_bytes())
    store.add_images([(prompt, "0.png", -5) for prompt in FORMULAS] + [("a", "=0.png", 1)])
    store.add_labels("=cmd|'/C calc'!A0", [(i, "good") for i in range(1, len(FORMULAS) + 2)])
    path = images / f"labels.{kind}"
    export_labels(store, path)
    with open(path, newline="") as file:
        cells = [cell for row in csv.reader(file, delimiter="\t" if kind == "tsv" else ",") for cell in row]
    assert not [cell for cell in cells if cell[:1] in tuple("=+-@\t\r")]
    (images / "again").mkdir()
    again = FeedbackStore(images / "again")
    import_labels(again, path)
    there = [(prompt, str(images / name), *rest) for prompt, name, *rest in everything(store)]
    assert [tuple(row) for row in everything(again)] == there
    store.close()
    again.close()


def test_an_export_replaces_no_folder(images):
    store = FeedbackStore(images)
    (images / "labels.csv").mkdir()
    (images / "labels.csv" / "thesis.txt").write_text("mine")
    for export in (export_labels, export_comparisons):
        with pytest.raises(InputError, match=r"labels\.csv: is a folder; accepted: the name of a file"):
            export(store, images / "labels.csv")
    assert (images / "labels.csv" / "thesis.txt").read_text() == "mine" and not list(images.rglob("*.tmp"))
    store.close()


def everything(store):
    query = """SELECT text, path, seed, labeller, verdict, time FROM labels
               JOIN images ON images.id = image JOIN prompts ON prompts.id = prompt ORDER BY 1, 2, 4"""
    return store.database.execute(query).fetchall()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_labels_go_out_and_in(images, kind):
    run = images / "run"
    (run / "images").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(run / f"images/{i}.png")
    prompts = ["a cat", 'two "dogs",\nred', "caf\u00e9\u2028=1+1"]
    store = FeedbackStore(run)
    store.add_images([(prompt, f"images/{i}.png", (0, -3, None)[i]) for i, prompt in enumerate(prompts)], {"steps": 5})
    store.add_images([("a cat", str(images / "0.png"), 9)])
    store.add_labels("Ann B.", [(1, "good"), (2, "bad"), (3, "skip"), (4, "good")])
    store.add_labels("bob", [(1, "bad")])
    path = images / f"sub/labels.{kind}"
    assert export_labels(store, path) == 5
    verdicts = [("a cat", run / "images/0.png", "good"), ("a cat", run / "images/0.png", "bad")]
    assert verdicts_of(path)[:2] == verdicts  # what finetune reads
    again = FeedbackStore(images / "sub")
    assert import_labels(again, path) == (5, 0)
    there = [(prompt, os.path.join(run, path), *rest) for prompt, path, *rest in everything(store)]
    assert [tuple(row) for row in everything(again)] == there
    assert import_labels(again, path) == (0, 0) == import_labels(store, path)  # nothing new
    before = everything(store)
    store.add_labels("bob", [(1, "good")])  # later than the file's, which does not take its place
    assert import_labels(store, path) == (0, 0) and everything(store) != before
    store.database.execute("UPDATE labels SET time = '2020-01-01T00:00:00.000Z'")
    assert import_labels(store, path) == (5, 0) and everything(store) == before
    Image.new("RGB", (8, 8), "red").save(run / "images/1.png")
    with pytest.raises(InputError, match="line [345]: image .*1.png is not the one that was labelled"):
        import_labels(store, path)
    assert everything(store) == before and not list(images.rglob("*.tmp"))
    store.close()
    again.close()


@pytest.fixture
def exported(images):
    """A store with a label, a skip and a score of two images; the files are in the folder of its images."""
    with closing(FeedbackStore(images)) as store:
        store.merge([NewLabel("a cat", "0.png", 5, "ann", "good", None, 0.75),
                     NewLabel('two "dogs", red', "1.png", None, "bob", "skip", None)])  # fmt: skip
        yield store


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_pandas_reads_what_is_exported(exported, images, kind):
    pandas = pytest.importorskip("pandas")
    assert export_labels(exported, images / f"labels.{kind}") == 2
    path = images / f"labels.{kind}"
    table = pandas.read_csv(path) if kind == "csv" else pandas.read_json(path, lines=True)
    assert table["prompt"].tolist() == ["a cat", 'two "dogs", red'] and table["image"].tolist() == ["0.png", "1.png"]
    assert table["label"].tolist() == ["good", "skip"] and table["labeller"].tolist() == ["ann", "bob"]
    for column, first in (("seed", 5), ("soft", 0.75)):
        assert table[column][0] == first and pandas.isna(table[column][1])


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_the_hubs_imagefolder_reads_what_is_exported(exported, images, kind):
    datasets = pytest.importorskip("datasets")
    export_labels(exported, images / f"metadata.{kind}")
    rows = datasets.load_dataset("imagefolder", data_dir=str(images), split="train", cache_dir=str(images / "cache"))
    assert [(row["text"], row["label"], row["image"].size) for row in rows] == [
        ("a cat", "good", (8, 8)),
        ('two "dogs", red', "skip", (8, 8)),
    ]


def test_files_of_others_go_in(images):
    path = images / "theirs.csv"
    path.write_text("prompt,image,label\na cat,0.png,1\na cat,0.png,0\na dog,1.png,skip\n")
    store = FeedbackStore(images)
    assert import_labels(store, path) == (3, 0)
    rows = [(prompt, name, labeller, verdict) for prompt, name, _, labeller, verdict, _ in everything(store)]
    assert rows == [
        ("a cat", "0.png", "theirs", "good"),
        ("a cat", "0.png", "theirs, 2", "bad"),
        ("a dog", "1.png", "theirs", "skip"),
    ]
    assert store.labels() == {}
    store.close()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("labeller", "x" * 65, "accepted: a name of 1 to 64 characters"),
        ("time", "yesterday", "time 'yesterday'; accepted: UTC such as 2026-01-31T12:30:00.000Z"),
        ("time", "2026-02-31T12:30:00Z", "accepted: UTC such as"),
        ("seed", "1.5", "seed '1.5'; accepted: a whole number"),
        ("sha256", "0" * 64, "its SHA-256 differs"),
    ],
)
def test_columns_that_are_not_needed_must_be_right(images, column, value, message):
    path = images / "labels.csv"
    path.write_text(f"prompt,image,label,{column}\na,0.png,good,\na,1.png,good,{value}\n")
    store = FeedbackStore(images)
    with pytest.raises(InputError, match="line 3") as error:
        import_labels(store, path)
    assert message in str(error.value) and store.images() == []
    store.close()


def test_times_of_files_sort_as_text(images):
    path = images / "labels.jsonl"
    for time, kept in (
        ("12:30:00Z", "12:30:00.000Z"),
        ("12:30:00.5Z", "12:30:00.500Z"),
        ("12:30:01.123456Z", "12:30:01.123Z"),
    ):
        row = {"prompt": "a", "image": "0.png", "label": 1, "time": f"2026-01-31T{time}", "labeller": "ann"}
        path.write_text(json.dumps(row))
        store = FeedbackStore(images)
        assert import_labels(store, path) == (1, 0) and everything(store)[0][-1] == f"2026-01-31T{kept}"
        store.close()
