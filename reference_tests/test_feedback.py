"""The label store, and the label files that others bring."""

import json
import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from minialign import feedback
from minialign.feedback import (
    FeedbackStore,
    cohen_kappa,
    export_labels,
    fleiss_kappa,
    import_labels,
    read_feedback,
)
from minialign.models.pretrained import InputError


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
    again.database.execute("PRAGMA user_version=99")
    again.close()
    with pytest.raises(InputError, match="schema version 99; supported: up to 2"):
        FeedbackStore(tmp_path)


V1 = """
CREATE TABLE prompts (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE);
CREATE TABLE images (
    id INTEGER PRIMARY KEY, prompt INTEGER NOT NULL REFERENCES prompts, path TEXT NOT NULL, seed INTEGER,
    UNIQUE (prompt, path)
);
CREATE TABLE labels (
    image INTEGER NOT NULL REFERENCES images, labeller TEXT NOT NULL, verdict TEXT NOT NULL, time TEXT NOT NULL,
    PRIMARY KEY (image, labeller)
);
INSERT INTO prompts VALUES (1, 'a cat'), (2, 'a dog');
INSERT INTO images VALUES (1, 1, 'images/0.png', 7), (2, 1, '/else/1.png', NULL), (5, 2, 'images/0.png', 0);
INSERT INTO labels VALUES (5, 'bob', 'bad', '2026-01-01T00:00:00.000Z'), (1, 'bob', 'good', '2026-01-02T00:00:00.000Z'),
                          (1, 'ann', 'skip', '2026-01-03T00:00:00.000Z');
PRAGMA user_version=1;
"""


def first_version(folder):
    database = sqlite3.connect(folder / "feedback.sqlite")
    database.executescript(V1)
    tables = {name: database.execute(f"SELECT * FROM {name} ORDER BY 1, 2").fetchall() for name in TABLES}
    database.close()
    return tables


TABLES = ("prompts", "images", "labels")


def test_a_store_of_the_first_version_is_taken_over_whole(tmp_path):
    before = first_version(tmp_path)
    with ThreadPoolExecutor(4) as pool:  # whoever is first
        for store in pool.map(lambda _: FeedbackStore(tmp_path), range(4)):
            assert store.database.execute("PRAGMA user_version").fetchone() == (2,)
            after = {name: store.database.execute(f"SELECT * FROM {name} ORDER BY 1, 2").fetchall() for name in TABLES}
            assert after == before | {"images": [(*row, None, None) for row in before["images"]]}
            assert store.images()[1] == (2, "a cat", "/else/1.png", None)
            assert store.labels() == {1: 1.0, 5: 0.0}
            assert store.database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            store.close()


@pytest.mark.parametrize("step", range(8))
def test_a_takeover_that_fails_leaves_the_old_store(tmp_path, monkeypatch, step):
    before = first_version(tmp_path)
    broken = (*feedback.MIGRATIONS[1][:step], "no SQL", *feedback.MIGRATIONS[1][step:])
    with monkeypatch.context() as change:
        change.setattr(feedback, "MIGRATIONS", (feedback.MIGRATIONS[0], broken))
        with pytest.raises(InputError, match="cannot be used"):
            FeedbackStore(tmp_path)
    database = sqlite3.connect(tmp_path / "feedback.sqlite")
    assert database.execute("PRAGMA user_version").fetchone() == (1,)
    assert {name: database.execute(f"SELECT * FROM {name} ORDER BY 1, 2").fetchall() for name in TABLES} == before
    database.close()
    FeedbackStore(tmp_path).close()


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


def test_cohen_kappa():
    # 50 items, 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: p_o = 0.7, p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5
    assert cohen_kappa(np.array([[20, 5], [10, 15]])) == pytest.approx(0.4)
    assert cohen_kappa(np.diag([3, 4, 5])) == pytest.approx(1)
    assert cohen_kappa(np.outer([1, 2, 3], [4, 5, 6])) == pytest.approx(0)  # independent
    assert cohen_kappa(np.array([[0, 5], [5, 0]])) == pytest.approx(-1)
    assert cohen_kappa(np.array([[9, 0], [0, 0]])) is None


def test_fleiss_kappa():
    # three items by three labellers: P = (1 + 1/3 + 1/3) / 3 = 5/9, p = (5/9, 4/9), P_e = 41/81
    assert fleiss_kappa(np.array([[3, 0], [1, 2], [1, 2]])) == pytest.approx((5 / 9 - 41 / 81) / (1 - 41 / 81))
    assert fleiss_kappa(np.array([[3, 0, 0], [0, 3, 0]])) == pytest.approx(1)
    assert fleiss_kappa(np.array([[3, 0], [2, 0]])) is None
    # of two labellers a fixed item it is Scott's pi: p_o = 0.7, p = 0.55 and 0.45
    pairs = [[2, 0]] * 20 + [[1, 1]] * 15 + [[0, 2]] * 15
    assert fleiss_kappa(np.array(pairs)) == pytest.approx((0.7 - 0.505) / (1 - 0.505))
    rng = np.random.default_rng(0)  # chance alone
    assert abs(fleiss_kappa(rng.multinomial(5, [0.5, 0.3, 0.2], size=20_000))) < 0.01


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
    assert read_feedback(path) == [(p, (images / i).resolve(), v) for (p, i, _), v in zip(ROWS, verdicts)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,image,label\na,0.png,bad\n", "none of its 1 images is labelled good"),
        ("prompt,image,label\na,0.png,good\na,0.png,bad\n", "none of its 2 images is labelled good"),
        ("prompt,image,label\na,0.png,fine\n", "line 2: label 'fine'; accepted: 1, 0, true, false, good, bad, skip"),
        ("prompt,picture,label\na,0.png,good\n", "line 2: no 'image'; columns needed: prompt, image, label"),
        ("prompt,image,label\na,9.png,good\n", "9.png cannot be read"),
        ('prompt,image,label\n"a\nb",0.png,good\na,0.png,fine\n', "line 4: label 'fine'"),
        ('prompt,image,label\n"a,0.png,good\n' + 200_000 * "x", "not CSV (field larger than field limit"),
        ("prompt,image,label\na,labels.csv,good\n", "labels.csv cannot be read"),
        ("prompt,image,label\na,half.png,good\n", "half.png cannot be read"),
    ],
)
def test_bad_label_files_are_named(images, text, message):
    path = images / "labels.csv"
    path.write_text(text)
    Image.effect_noise((32, 32), 50).save(images / "whole.png")
    (images / "half.png").write_bytes((images / "whole.png").read_bytes()[:400])
    with pytest.raises(InputError) as error:
        read_feedback(path)
    assert message in str(error.value) and "\n" not in str(error.value) and "labels.csv" in str(error.value)


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
    assert read_feedback(path)[:2] == verdicts  # what finetune reads
    again = FeedbackStore(images / "sub")
    assert import_labels(again, path) == 5
    there = [(prompt, os.path.join(run, path), *rest) for prompt, path, *rest in everything(store)]
    assert [tuple(row) for row in everything(again)] == there
    assert import_labels(again, path) == 0 == import_labels(store, path)  # nothing new
    before = everything(store)
    store.add_labels("bob", [(1, "good")])  # later than the file's, which does not take its place
    assert import_labels(store, path) == 0 and everything(store) != before
    store.database.execute("UPDATE labels SET time = '2020-01-01T00:00:00.000Z'")
    assert import_labels(store, path) == 5 and everything(store) == before
    Image.new("RGB", (8, 8), "red").save(run / "images/1.png")
    with pytest.raises(InputError, match="line [345]: image .*1.png is not the one that was labelled"):
        import_labels(store, path)
    assert everything(store) == before and not list(images.rglob("*.tmp"))
    store.close()
    again.close()


def test_files_of_others_go_in(images):
    path = images / "theirs.csv"
    path.write_text("prompt,image,label\na cat,0.png,1\na cat,0.png,0\na dog,1.png,skip\n")
    store = FeedbackStore(images)
    assert import_labels(store, path) == 3
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
        assert import_labels(store, path) == 1 and everything(store)[0][-1] == f"2026-01-31T{kept}"
        store.close()
