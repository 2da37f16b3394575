"""The label store, and the label files that others bring."""

import json

import pytest
from PIL import Image

from minialign.feedback import FeedbackStore, read_feedback
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
    assert [(i.prompt, i.path, i.seed) for i in again.images()][1] == ("a dog", tmp_path / "images/1.png", 6)
    assert again.labels() == {ids[0]: 1.0, ids[1]: 0.0, ids[2]: 1.0}
    again.add_labels("bob", [(ids[2], "bad")])
    again.add_labels("cy", [(ids[2], "good")])  # one good, one bad and a skip: a tie
    assert ids[2] not in again.labels()
    again.database.execute("PRAGMA user_version=99")
    again.close()
    with pytest.raises(InputError, match="schema version 99; supported: 1"):
        FeedbackStore(tmp_path)


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
