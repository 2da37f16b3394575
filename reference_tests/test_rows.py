"""Judgements in the shapes that people have: each shape of a row, what it becomes in the store, and what is refused."""

import json
from contextlib import closing

import pytest
from helpers import command
from PIL import Image

from minialign.feedback import FeedbackStore, Reading, export_comparisons, export_labels, import_into_run
from minialign.feedback.rows import USUAL, judgements
from minialign.files import InputError
from minialign.label.__main__ import main as label


@pytest.fixture
def images(tmp_path):
    (tmp_path / "sub").mkdir()
    for i in range(7):
        Image.new("RGB", (8, 8), (9 * i, 0, 0)).save(tmp_path / f"{i}.png")
    return tmp_path


def taken(images, rows, how=None, kind="json", name="theirs"):
    """A file of rows imported into a new run: its labels (prompt, image, labeller, verdict, soft) and comparisons."""
    path, run = images / f"{name}.{kind}", images / "run"
    if kind == "csv":
        path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if kind == "jsonl" else json.dumps(rows, indent=1))
    import_into_run(run, path, how or Reading())
    with closing(FeedbackStore(run)) as store:
        labels = [(row[0], row[1].rsplit("/")[-1], row[3], row[2], row[8]) for row in store.label_rows()]
        names = {image.id: image.path.name for image in store.images()}
        prompts = {image.id: image.prompt for image in store.images()}
        pairs = [(prompts[p.image], names[p.image], names[p.other], p.verdict) for p in store.preferred()]
        assert len(pairs) == len(store.comparison_rows())
    for file in run.iterdir():
        file.unlink()
    run.rmdir()
    return labels, pairs


# ------------------------------------------------------------------------------------------------ verdicts and scores
@pytest.mark.parametrize(("word", "verdict"), [
    ("1.0", "good"), ("0.0", "bad"), ("yes", "good"), ("No", "bad"), ("TRUE", "good"), ("false", "bad"),
    ("Good", "good"), ("bad", "bad"), ("skip", "skip"), ("1", "good"), ("0", "bad"),
])  # fmt: skip
def test_words_and_numbers_are_verdicts(images, word, verdict):
    rows = [("prompt", "image", "label"), ("a", "0.png", word), ("b", "1.png", "1.0")]
    assert taken(images, rows, kind="csv")[0][0] == ("a", "0.png", "theirs", verdict, None)


@pytest.mark.parametrize(("value", "verdict"), [(1.0, "good"), (0, "bad"), (True, "good"), (False, "bad")])
def test_values_of_json_are_verdicts(images, value, verdict):
    assert taken(images, [{"prompt": "a", "image": "0.png", "label": value}])[0][0][3] == verdict


@pytest.mark.parametrize("gap", ["", "nan", "None"])
def test_a_gap_in_a_column_of_labels_is_an_image_without_a_label(images, gap):
    """pandas writes the other labels of such a column as 1.0 and 0.0."""
    rows = [("prompt", "image", "label"), ("a", "0.png", "1.0"), ("a", "1.png", gap), ("a", "2.png", "0.0")]
    (images / "gap.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    assert import_into_run(images / "run", images / "gap.csv") == (2, 0)
    with closing(FeedbackStore(images / "run")) as store:
        assert len(store.images()) == 3 and sorted(store.labels().values()) == [0, 1]


def test_what_stands_for_skip_is_told(images):
    rows = [("prompt", "image", "label"), ("a", "0.png", "-1.0"), ("a", "1.png", "1.0"), ("a", "2.png", "Unsure")]
    with pytest.raises(InputError, match="line 2: label '-1.0'; accepted: .*; --skip -1$"):
        taken(images, rows, kind="csv")
    found = taken(images, rows, Reading(skip=("-1", "unsure")), "csv")[0]
    assert [row[3] for row in found] == ["skip", "good", "skip"]


def test_a_list_has_one_verdict_a_person_and_an_object_of_objects_is_named_by_image(images):
    """The shape of TextNorm's labels."""
    rows = {f"{i}.png": {"image": f"{i}.png", "caption": "six vases", "human_labels": one}
            for i, one in enumerate([[0, 1, 1], [0, 0, 0]])}  # fmt: skip
    labels, pairs = taken(images, rows)
    persons = ("theirs", "theirs, 2", "theirs, 3")
    expected = [("six vases", "0.png", who, verdict, None) for who, verdict in zip(persons, ("bad", "good", "good"))]
    expected += [("six vases", "1.png", who, "bad", None) for who in persons]
    assert labels == expected and not pairs
    for row in rows.values():
        del row["image"]  # then the object's name is its image
    assert taken(images, rows)[0] == expected
    as_table = [("caption", "image", "human_labels"), ("six vases", "0.png", '"[0, 1, 1]"')]
    assert taken(images, as_table, kind="csv")[0] == expected[:3]
    rows["1.png"]["human_labels"] = [-1, 1, 1]
    with pytest.raises(InputError, match="label -1; accepted: .*; --skip -1$"):
        taken(images, rows)
    found = taken(images, rows, Reading(skip=("-1",)))[0]
    assert [verdict for *_, verdict, _ in found[3:]] == ["skip", "good", "good"]
    as_python = [("prompt", "generations", "ranking"), ("six vases", "\"['0.png', '1.png']\"", '"[1, 2]"')]
    with pytest.raises(InputError, match=r"line 2: generations .*not JSON .*accepted: .1, 0. or .*in double quotes$"):
        taken(images, as_python, kind="csv")


@pytest.mark.parametrize("names", [("text", "file_name", "label"), ("caption", "image_path", "human_labels")])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_the_hubs_names_of_columns(images, names, kind):
    values = [("a cat", "0.png", "yes"), ("a cat", "1.png", "no")]
    rows = [names, *values] if kind == "csv" else [dict(zip(names, row)) for row in values]
    found, _ = taken(images, rows, kind=kind)
    assert [row[:2] + row[3:] for row in found] == [
        ("a cat", "0.png", "good", None),
        ("a cat", "1.png", "bad", None),
    ]


def test_other_columns_are_named_by_a_flag(images):
    rows = [{"Z": "a cat", "x": "0.png", "y": 1, "prompt": "not this one", "worker": 7}]
    columns = (("prompt", "z"), ("image", "x"), ("label", "y"), ("labeller", "worker"))
    assert taken(images, rows, Reading(columns))[0] == [("a cat", "0.png", "7", "good", None)]
    with pytest.raises(InputError, match=r"row 1: --columns image=w: no such column; found: z, x, y, prompt, worker"):
        taken(images, rows, Reading((("image", "w"),)))


def test_mean_scores_of_images_are_read_by_two_flags(images):
    """The shape of AGIQA-3K's data.csv."""
    rows = [
        ("name", "prompt", "adj1", "adj2", "style", "mos_quality", "std_quality", "mos_align", "std_align"),
        ("0.png", '"a cat, anime style"', "", "", "anime style", "3.1", "0.5", "0.409", "0.6"),
        ("1.png", "a cat", "", "", "", "1.1", "0.5", "3.871", "0.6"),
    ]
    how = Reading((("image", "name"), ("label", "mos_align")), good_from=2.5)
    found = [(prompt, image, verdict) for prompt, image, _, verdict, _ in taken(images, rows, how, "csv")[0]]
    assert found == [("a cat, anime style", "0.png", "bad"), ("a cat", "1.png", "good")]


def test_scores_become_verdicts_or_soft_labels(images):
    rows = [{"prompt": "a", "image": f"{i}.png", "label": score} for i, score in enumerate([1, 3, "3.5", 5.0, "skip"])]
    found = taken(images, rows, Reading(good_from=3.5))[0]
    assert [row[3:] for row in found] == [
        ("bad", None), ("bad", None), ("good", None), ("good", None), ("skip", None)
    ]  # fmt: skip
    found = taken(images, rows, Reading(scale=(1, 5)))[0]  # the middle is neither good nor bad
    assert [row[3:] for row in found] == [("bad", 0), ("skip", 0.5), ("good", 0.625), ("good", 1), ("skip", None)]
    found = taken(images, rows, Reading(good_from=4, scale=(1, 5)))[0]
    assert [row[3:] for row in found] == [("bad", 0), ("bad", 0.5), ("bad", 0.625), ("good", 1), ("skip", None)]
    for how, value, message in (
        (Reading(), 3, "row 1: label 3; accepted: .*; of scores: --good-from or --scale"),
        (Reading(good_from=3), "good", "row 1: label 'good'; accepted: a number$"),
        (Reading(scale=(1, 5)), 5.1, "row 1: label 5.1; accepted: a number from 1 to 5"),
        (Reading(scale=(1, 5)), float("inf"), "row 1: label inf; accepted: a number from 1 to 5"),
    ):
        with pytest.raises(InputError, match=message):
            taken(images, [{"prompt": "a", "image": "0.png", "label": value}], how)


def test_soft_labels_are_kept_and_count_with_soft_alone(images):
    path, run = images / "scores.jsonl", images / "run"
    scores = {"ann": (1, 3, 5), "bob": (2, 3, 4)}
    rows = [{"text": "a", "file_name": f"{i}.png", "label": score, "labeller": who}
            for who, given in scores.items() for i, score in enumerate(given)]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    assert import_into_run(run, path, Reading(scale=(1, 5))) == (6, 0)
    with closing(FeedbackStore(run)) as store:
        assert store.labels(soft=True) == {1: pytest.approx(0.125), 2: 0.5, 3: pytest.approx(0.875)}
        assert store.labels() == {1: 0.0, 3: 1.0}
        store.add_labels("ann", [(1, "good")])  # on the page: a verdict takes the score's place
        assert store.labels(soft=True)[1] == pytest.approx((1 + 0.25) / 2) and 1 not in store.labels()
        for kind in ("csv", "jsonl"):  # an export keeps soft labels
            export_labels(store, images / f"out.{kind}")
            import_into_run(images / kind, images / f"out.{kind}")
            with closing(FeedbackStore(images / kind)) as again:
                assert again.labels(soft=True) == store.labels(soft=True) and again.labels() == store.labels()


# --------------------------------------------------------------------------------------------------- pairs and rankings
def test_pairs_of_two_labels_become_comparisons(images):
    """The shape of Pick-a-Pic: 0.5 is a tie, and a pair that nobody labelled says nothing."""
    labels = [(1.0, 0.0, True), (0.0, 1.0, True), (0.5, 0.5, True), (0.5, 0.5, False)]
    rows = [{"caption": f"prompt {i}", "image_0": "0.png", "image_1": "1.png", "label_0": a, "label_1": b,
             "has_label": told, "user_id": 5} for i, (a, b, told) in enumerate(labels)]  # fmt: skip
    expected = [("prompt 0", "0.png", "1.png", "this"), ("prompt 1", "0.png", "1.png", "other"),
                ("prompt 2", "0.png", "1.png", "tie")]  # fmt: skip
    assert taken(images, rows) == ([], expected)
    assert taken(images, rows, kind="jsonl") == ([], expected)
    assert taken(images, [list(rows[0]), *(list(row.values()) for row in rows)], kind="csv") == ([], expected)


def test_several_people_may_judge_a_pair_and_one_only_once(images):
    pair = {"prompt": "a", "image_0": "0.png", "image_1": "1.png", "label_0": 1, "label_1": 0}
    swapped = {"prompt": "a", "image_0": "1.png", "image_1": "0.png", "label_0": 1, "label_1": 0}
    _, pairs = taken(images, [pair, swapped, pair])  # by nobody that is named: three judgements
    assert [verdict for *_, verdict in pairs] == ["this", "other", "this"]
    _, pairs = taken(images, [pair | {"user_id": 1}, swapped | {"user_id": 1}, pair | {"user_id": 2}])
    # the first one's later judgement counts
    assert pairs == [("a", "1.png", "0.png", "this"), ("a", "1.png", "0.png", "other")]
    path, run = images / "one.json", images / "again"
    for rows, count in (([pair | {"user_id": 1}], 1), ([swapped | {"user_id": 1}], 1)):
        path.write_text(json.dumps(rows))
        assert import_into_run(run, path) == (0, count)
    with closing(FeedbackStore(run)) as store:
        assert [p.verdict for p in store.preferred()] == ["other"] and store.labels() == {}


def test_a_preferred_image_of_a_list_is_better_than_the_others(images):
    """The shape of HPD v2."""
    row = {"prompt": "a", "file_path": ["0.png", "1.png"], "human_preference": [0, 1], "user_hash": "f" * 64}
    assert taken(images, [row]) == ([], [("a", "0.png", "1.png", "other")])
    row |= {"file_path": ["0.png", "1.png", "2.png"], "human_preference": [0, 1, 0]}
    assert taken(images, [row])[1] == [("a", "0.png", "1.png", "other"), ("a", "1.png", "2.png", "this")]


def test_every_two_images_of_a_ranking_are_a_comparison(images):
    """The shape of ImageReward's test.json: 1 is the best, ranks may be equal and have gaps."""
    ranks = [3, 5, 1, 2, 1]
    row = {"id": "002203-0043", "prompt": "a", "generations": [f"{i}.png" for i in range(5)], "ranking": ranks}
    _, pairs = taken(images, [row])
    assert len(pairs) == 10
    for _, first, second, verdict in pairs:
        a, b = ranks[int(first[0])], ranks[int(second[0])]
        assert verdict == ("this" if a < b else "other" if a > b else "tie")


def test_chosen_and_rejected(images):
    rows = [{"prompt": "a", "chosen": "1.png", "rejected": "0.png"}]
    assert taken(images, rows) == ([], [("a", "1.png", "0.png", "this")])


def test_verdicts_and_comparisons_may_stand_in_one_file(images):
    rows = [{"prompt": "a", "chosen": "1.png", "rejected": "0.png"}, {"prompt": "a", "image": "1.png", "label": "bad"}]
    labels, pairs = taken(images, rows)
    assert [row[3] for row in labels] == ["bad"] and len(pairs) == 1


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_comparisons_go_out_and_in(images, kind):
    path, out = images / "pairs.json", images / f"sub/out.{kind}"
    path.write_text(json.dumps([{"prompt": "a", "generations": ["0.png", "1.png", "2.png"], "ranking": [2, 1, 2]}]))
    assert import_into_run(images / "run", path) == (0, 3) and import_into_run(images / "run", path)[0] == 0
    with closing(FeedbackStore(images / "run")) as store:
        assert export_comparisons(store, out) == 3
        assert import_into_run(images / "again", out) == (0, 3)
        with closing(FeedbackStore(images / "again")) as again:
            assert again.preferred() == store.preferred()
            assert [row[5:7] for row in again.comparison_rows()] == [row[5:7] for row in store.comparison_rows()]


PAIR = {"prompt": "a", "image_0": "0.png", "image_1": "1.png", "label_0": 1, "label_1": 0}


@pytest.mark.parametrize(("row", "message"), [
    (PAIR | {"label_0": 1, "label_1": 1}, "label_0 1, label_1 1; accepted: 1 and 0, 0 and 1, 0.5 and 0.5"),
    (PAIR | {"label_1": None}, "no 'label_1'; columns needed: prompt, image_0, image_1, label_0, label_1; found: "),
    (PAIR | {"image_1": "0.png"}, "0.png is compared with itself"),
    (PAIR | {"image_1": "9.png"}, "9.png does not exist"),
    (PAIR | {"image_1": ["1.png"]}, "image_1 ['1.png']; accepted: text"),
    (PAIR | {"prompt": ""}, "no 'prompt'"),
    ({"prompt": "a", "chosen": "0.png"}, "no column 'rejected'; columns needed: prompt, chosen, rejected; found: pro"),
    # as the hub has Pick-a-Pic
    ({"caption": "a", "jpg_0": "x", "jpg_1": "y", "label_0": 1, "label_1": 0}, "no column 'image_0'; columns needed"),
    ({"prompt": "a", "image": "https://example.org/0.png", "label": 1}, "image 'https://example.org/0.png' is an addr"),
    (PAIR | {"image_1": "data:image/png;base64,"}, "is an address; accepted: a file on this machine"),
    ({"prompt": "a", "image": "0.png", "human_labels": [1, None]}, "good, bad, skip; --skip none"),
    ({"prompt": "a", "generations": ["0.png"], "ranking": [1]}, "1 images in generations, 1 numbers in ranking"),
    ({"prompt": "a", "generations": ["0.png", "1.png"], "ranking": [1]}, "2 images in generations, 1 numbers in rank"),
    ({"prompt": "a", "generations": ["0.png", "1.png"], "ranking": [1, "x"]}, "ranking [1, 'x']; accepted: a list of"),
    ({"prompt": "a", "generations": "0.png", "ranking": [1, 2]}, "generations '0.png'; accepted: a list"),
    ({"prompt": "a", "generations": ["0.png", 1], "ranking": [1, 2]}, "accepted: a list of image files"),
    ({"prompt": "a", "generations": ["0.png", "\ud83d"], "ranking": [1, 2]}, "generations holds half a character"),
    ({"prompt": "a", "file_path": ["0.png", "1.png"], "human_preference": [1, 1]}, "accepted: 1 for a preferred"),
    ({"prompt": "a", "image": "0.png", "other": "1.png", "verdict": "left"}, "'left'; accepted: this, other, tie"),
    ({"prompt": "a", "image": "0.png", "label": [1, 0], "labeller": "ann"}, "a list of labels, one a person, and"),
    ({"prompt": "a", "image": "0.png", "label": 1, "soft": 2}, "soft 2; accepted: a number from 0 to 1"),
    ({"prompt": "a", "image": "0.png"}, "no column 'label'; columns needed: prompt, image, label; found: pro"),
    ({"prompt": "a", "image": "0.png", "y": 1}, "found: prompt, image, y; one of another name: --columns label=NAME"),
])  # fmt: skip
def test_a_row_that_cannot_be_is_named_and_nothing_is_taken(images, row, message):
    good = {"prompt": "a", "image": "2.png", "label": 1}
    with pytest.raises(InputError) as error:
        taken(images, [good, row])
    assert message in str(error.value) and "theirs.json, row 2: " in str(error.value) and "\n" not in str(error.value)
    assert not (images / "run").exists()


@pytest.mark.parametrize(("flags", "message"), [
    (("--columns", "prompt"), "--columns: 'prompt'; accepted: WHAT=NAME with commas between, WHAT one of prompt"),
    (("--columns", "picture=x"), "'picture=x'; accepted: WHAT=NAME"),
    (("--columns", "image=a,image=b"), "names a column twice"),
    (("--scale", "5,1"), "--scale: '5,1'; accepted: two numbers, the lower one first"),
    (("--scale", "1"), "accepted: two numbers"),
    (("--good-from", "x"), "--good-from: 'x'; accepted: a number"),
    (("--good-from", "nan"), "accepted: a number"),
])  # fmt: skip
def test_flags_that_cannot_be_are_one_line(images, capsys, flags, message):
    code, _, err = command(label, capsys, images / "run", "--import", "x.csv", *flags)
    assert code == 2 and message in err and err.count("\n") == 1, err


def test_the_command_takes_them_all(images, capsys):
    rows = [("id", "caption", "file", "rating"), (1, "a", "0.png", -1), (2, "a", "1.png", 4), (3, "b", "1.png", 2)]
    (images / "x.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    flags = ("--columns", "image=file,label=rating", "--skip", -1, "--good-from", 4, "--scale", "1,5")
    code, out, err = command(label, capsys, images / "run", "--import", images / "x.csv", *flags)
    assert code == 0 and "3 new labels from" in out, err
    with closing(FeedbackStore(images / "run")) as store:
        assert store.labels() == {2: 1.0, 3: 0.0} and store.labels(soft=True) == {2: 0.75, 3: 0.25}
    rows = "prompt,image,label\na,0.png,-1\na,1.png,unsure\nb,1.png,0.5\n"
    (images / "z.csv").write_text(rows)
    again = (images / "again", "--import", images / "z.csv", "--skip", "unsure,-2", "--scale", "-1,1")
    assert command(label, capsys, *again)[0] == 0  # a number below 0 is no flag
    with closing(FeedbackStore(images / "again")) as store:
        assert store.labels(soft=True) == {1: 0.0, 3: 0.75}
    (images / "z.csv").write_text(rows.replace("0.5", "1"))
    assert command(label, capsys, images / "third", "--import", images / "z.csv", "--skip", "-1,unsure")[0] == 0
    (images / "y.json").write_text(json.dumps([PAIR]))
    code, out, _ = command(label, capsys, images / "run", "--import", images / "y.json")
    assert code == 0 and "0 new labels, 1 new comparison from" in out
    code, out, _ = command(label, capsys, images / "run", "--summary")
    assert "3 labels by 1 labeller on 3 of 3 images\n1 comparison of two images\n" in out
    code, out, _ = command(label, capsys, images / "run", "--export", images / "out.csv")
    assert code == 0 and f"1 comparison of two images: --compare {images / 'run'} --export ANOTHER_FILE" in out


# ------------------------------------------------------------------------------------------------------ the hub's names
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_an_export_named_metadata_is_the_hubs_imagefolder(images, kind):
    rows = [{"prompt": "a", "image": f"{i}.png", "label": i % 2} for i in range(4)]
    (images / "x.json").write_text(json.dumps(rows))
    import_into_run(images / "run", images / "x.json")
    with closing(FeedbackStore(images / "run")) as store:
        export_labels(store, images / f"metadata.{kind}")
    from minialign.data import Skipped, read_pairs

    pairs = list(read_pairs(str(images), Skipped(images / "sub" / "skipped.jsonl")))
    assert {(pair.name, pair.caption) for pair in pairs} == {(str(images / f"{i}.png"), "a") for i in range(4)}
    assert import_into_run(images / "again", images / f"metadata.{kind}") == (4, 0)


def test_comparisons_of_sets_are_not_taken_for_comparisons_of_images():
    row = {"prompt": "a star", "image": "0.png", "other": "1.png", "verdict": "this"}
    for size in ("1", 1, ""):
        assert len(list(judgements(row | {"images": size}, "here", USUAL, False))) == 1
    for size in ("4", 4, "x"):
        with pytest.raises(InputError, match="here: images"):
            list(judgements(row | {"images": size}, "here", USUAL, False))


def test_a_pair_without_a_label_may_have_empty_cells():
    row = {"prompt": "a star", "image_0": "0.png", "image_1": "1.png", "label_0": "", "label_1": ""}
    assert not list(judgements(row | {"has_label": "False"}, "here", USUAL, False))
    with pytest.raises(InputError, match="no 'label_0'"):
        list(judgements(row | {"has_label": "True"}, "here", USUAL, False))
