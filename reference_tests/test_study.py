"""The study: what its cells change and what is measured of them; and, slow, the whole of it in small."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from minialign.engine.run import Run
from minialign.evaluate import Judged
from minialign.evaluate import TestItem as Item
from minialign.files import InputError
from minialign.finetune import WEIGHTINGS
from minialign.measures import frechet_distance
from minialign.models.clip import CLIP
from minialign.models.reward import embed_images, embed_texts
from minialign.pages.study_page import METRICS
from minialign.reward.labels import Labelled, Split, contrastive_table
from minialign.shapes.world import drawings, prompts
from minialign.study import __main__ as study
from minialign.study.cells import CELLS, DEFAULTS, SIZES, Cell, looked_at
from minialign.study.filling import fill, labels_of, measured, point, relabelled, world
from minialign.study.questions import SEEDS, questions


@pytest.mark.parametrize("size", SIZES)
def test_every_question_has_its_cells_and_no_cell_is_without_a_question(size):
    asked = questions(size)
    rows = [row for question in asked.values() for row in question.rows]
    points = {
        name: list(map(str, looked_at(size))) if cell.long else [str(n) if n > 1 else "" for n in cell.best_of or (1,)]
        for name, cell in CELLS.items()
    }
    assert all(row.point in points[row.cell] for row in rows)
    assert {row.cell for row in rows} == set(CELLS)
    for question in asked.values():
        assert CELLS[question.rows[question.reference].cell] in (Cell(), CELLS["long"])
    looks = SIZES[size]["looks"]
    assert looks[0] == 0 and all(step % looks[1] == 0 for step in looks)  # or it would not be looked at


def test_the_grid_is_the_papers_questions():
    def settings(key):
        return {cell.settings[key] for cell in CELLS.values() if key in cell.settings}

    assert settings("beta") == {0, 0.1, 0.5, 1, 2}
    assert settings("lambda") | {DEFAULTS["lambda"]} == {0, 0.25, 0.5, 1}
    assert settings("temperature") | {DEFAULTS["temperature"]} == {0.1, 0.5, 1, 2}
    for unlabelled in (True, False):
        fractions = {cell.fraction for cell in CELLS.values() if cell.unlabelled == unlabelled}
        assert fractions == {0.05, 0.1, 0.25, 0.5, 1}
    assert {cell.flipped for cell in CELLS.values()} == {0, 0.1, 0.2, 0.3}
    assert settings("weighting") == WEIGHTINGS.keys() - {"reward"}
    assert SIZES["full"]["long"]["steps"] == 10 * DEFAULTS["steps"]


def test_parts_of_the_labels_are_nested_and_labellers_err_as_often_as_told():
    truth = {i: float(i % 3 == 0) for i in range(20_000)}
    parts = [labels_of(Cell(fraction=part), truth, seed=1) for part in (0.05, 0.25, 1)]
    assert [len(part) for part in parts] == [1000, 5000, 20_000]
    assert parts[0].items() <= parts[1].items() <= parts[2].items() and parts[2] == truth
    wrong = []
    for cell in (Cell(flipped=0.2), Cell(flipped=0.3), Cell(flipped=0.3, labellers=3)):
        labels = labels_of(cell, truth, seed=1)
        wrong.append({i for i in truth if labels[i] != truth[i]})
    assert wrong[0] < wrong[1]
    expected = (0.2, 0.3, 0.3**2 * (3 - 2 * 0.3))  # of three, two or all err
    for found, chance in zip(wrong, expected):
        assert len(found) / len(truth) == pytest.approx(chance, abs=4 * math.sqrt(chance / len(truth)))


def labelled(texts: list[str], split: Split, labels: list[float], clip: CLIP) -> Any:
    """What a main job leaves of images of prompts, one each: a drawing of each, and labels of all of them."""
    among = [texts[i] for i in split.learn]
    table, columns = contrastive_table(texts, among, {text: text for text in texts}, seed=0)
    images = embed_images(clip, drawings(texts, seed=0))
    tokens = {i: (i,) for i in range(len(texts))}
    data = Labelled(images, embed_texts(clip, table), columns, dict(enumerate(labels)), split, tokens)
    return SimpleNamespace(data=data, prompts=texts, clip=clip)


def test_a_cells_reward_contrasts_with_the_prompts_of_its_own_labels_alone(tmp_path):
    """A prompt that nobody judged would be met as a wrong answer alone."""
    texts = prompts(0)[0][:60]
    split = Split(list(range(10, 60)), list(range(5, 10)), list(range(5)))
    here = labelled(texts, split, [float(i % 2) for i in range(60)], CLIP.from_pretrained())
    here.folder = tmp_path
    data = relabelled(Cell(fraction=0.5, flipped=0.3), here, seed=0)
    assert len(data.split.learn) == 25
    assert (data.split.known, data.split.new) == (split.known, split.new)
    assert all(data.labels[i] == here.data.labels[i] for i in (*split.known, *split.new))
    own = data.columns[:, 0]
    assert torch.equal(data.texts[own], here.data.texts[here.data.columns[:, 0]])
    met = {int(row) for row in data.columns[data.split.learn].flatten() if row >= 0}
    assert met == {int(own[i]) for i in data.split.learn}
    changed = [i for i in data.split.learn if data.labels[i] != here.data.labels[i]]
    assert 0 < len(changed) < 15


def test_a_cell_is_measured_by_what_scores_in_it():
    """On held-out labels of known prompts, and on labels of unseen ones."""
    here: Any = SimpleNamespace()
    image, text = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.2, 1]]), torch.tensor([[1.0, 0]] * 4)
    split = Split([0, 2], [1, 3], [])
    here.data = Labelled(image, text, torch.arange(4)[:, None], {0: 1.0, 1: 1.0, 2: 0.0, 3: 0.0}, split, {})
    here.text = text
    here.unseen = torch.tensor([[1.0, 0], [0, 1], [1, 1]]), torch.tensor([[1.0, 0]] * 3), torch.tensor([1.0, 0, 0])
    raw, fitted = CELLS["clip-raw"].score, CELLS["clip-fitted"].score
    assert raw and fitted
    by_clip = measured(lambda image, text: raw(here.data, image, text), here)
    assert by_clip["held_out"]["accuracy"] == 1 and by_clip["held_out"]["auc"] == 1
    assert by_clip["unseen"]["accuracy"] == pytest.approx(2 / 3)  # cosines 1, 0, 0.71
    wrong = measured(lambda image, text: torch.tensor([0.1, 0.2, 0.3])[: len(image)], here)
    assert wrong["unseen"]["auc"] == 0 and wrong["held_out"]["auc"] == 0
    middle = fitted(here.data, torch.tensor([[1, 3**0.5]]), text[:1])  # of the cosines of labels that are not held out
    assert middle == pytest.approx(0.5, abs=1e-3) and fitted(here.data, image[3:], text[:1]) < 0.1


def test_fidelity_is_the_distance_to_what_images_show_and_not_to_what_was_asked(tmp_path):
    """Of as many images whatever can be read; those that cannot count as not readable, and in the other distance."""
    clip, asked = CLIP.from_pretrained(), ["a red circle", "two stars"] * 8
    made = drawings([*prompts(0)[0][:13], *asked[13:]], seed=1)
    pictures = [Image.new("RGB", (64, 64), "white") if i in (2, 7) else image for i, image in enumerate(made)]
    paths = [tmp_path / f"{i}.png" for i in range(16)]
    for path, picture in zip(paths, pictures):
        picture.save(path)
    items = [Item(text, i, ("seen",) if i % 2 else ("new combinations",)) for i, text in enumerate(asked)]
    verdicts = ["skip" if i in (2, 7) else "good" if i > 12 else "bad" for i in range(16)]
    features, reference = embed_images(clip, pictures), embed_images(clip, drawings(asked, seed=0))
    side = Judged("", "", tmp_path, paths, features, {"reward": [0.25] * 16}, list(verdicts), None)
    here: Any = SimpleNamespace(settings={"seed": 0}, items=items, clip=clip, asked=reference, distances=14)
    found = point(here, side, range(16))
    assert found["readable"] == 14 / 16 and found["aligned"] == 3 / 16 and found["unseen"] == 1 / 8
    assert found["asked"] == frechet_distance(features, reference) and found["asked_images"] == 16
    assert found["fidelity_images"] == 14 and 0 < found["fidelity"] < 0.5 * found["asked"]
    assert found["mean_reward"] == 0.25 and found["gap"] == 0.25 - 3 / 16
    assert METRICS.keys() >= found.keys() - {"fidelity_images", "asked_images"}
    some = point(SimpleNamespace(**(vars(here) | {"distances": 15})), side, range(16))
    assert some["fidelity"] is None and some["cmmd"] is None and some["asked"] == found["asked"]


def test_a_study_of_other_settings_is_not_continued(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    Run(tmp_path).remember(study={"size": "full"})
    monkeypatch.setattr(sys, "argv", ["study", "--quick", "--out", str(tmp_path)])
    with pytest.raises(InputError, match="a study of other settings"):
        study.main()


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--seeds", "21", "22", "21", "--out", "{new}"], "--seeds: 2 seeds"),
        (["--out", "{file}"], "not a folder"),
        (["--out", "{strange}"], "not a run's"),
        (["--out", "{new}", "--docs", "{file}"], "--docs .*file: cannot be used"),
    ],
)
def test_mistakes_are_told_before_anything_is_begun(arguments, complaint, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "thesis.tex").write_text("")
    places = {name: str(tmp_path / name) for name in ("file", "strange", "new")}
    monkeypatch.setattr(sys, "argv", ["study", *(argument.format(**places) for argument in arguments)])
    with pytest.raises(InputError, match=complaint):
        study.main()
    assert not list(tmp_path.rglob("config.json"))


@pytest.mark.slow
def test_the_command_quick(tmp_path):
    """All of the study in small: ended amid its long cells, gone on with, and begun a third time with all done."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "study"
    command = [sys.executable, "-m", "minialign.study", "--quick", "--out", str(out)]

    def finished():
        return {path: path.stat().st_mtime_ns for path in out.glob("*/seed-*/result.json")}

    def looked():
        return [path for path in out.glob("long/*/points.json") if len(json.loads(path.read_text())) > 2]

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True) as process:
        os.set_blocking(process.stdout.fileno(), False)
        until = time.time() + 600
        while not looked() and process.poll() is None and time.time() < until:
            process.stdout.read()  # or the pipe is full
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    early, resumed = finished(), looked()[0].parent
    assert resumed / "result.json" not in early

    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    late = finished()
    assert len(late) == len(CELLS) * 3 and early.items() <= late.items()
    page = (out / "docs" / "results.md").read_text()
    for name in questions("quick"):
        assert f"study-{name}.png" in page and (out / "docs" / f"study-{name}.png").stat().st_size > 10_000
    assert len(list((out / "docs").glob("*.png"))) == page.count("](study-") == len(questions("quick")) + 2

    found = dict.fromkeys(CELLS, "")
    for seed in SEEDS:
        result = {name: json.loads((out / name / f"seed-{seed}" / "result.json").read_text()) for name in CELLS}
        base, best = result["base"]["points"][""], result["best-of"]["points"]
        rewards = [base["mean_reward"], *(best[n]["mean_reward"] for n in ("2", "4"))]
        assert rewards == sorted(rewards)  # the reward chooses
        start = result["long"]["points"]["0"]
        assert start["aligned"] == base["aligned"] and start["fidelity"] == pytest.approx(base["fidelity"], rel=1e-3)
        for name, one in result.items():
            found[name] += json.dumps([one["points"], one.get("held_out")])
    assert len(set(found.values())) == len(CELLS)  # no choice is ignored
    seed = int(resumed.name.removeprefix("seed-"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = fill("long", world(out, seed, "quick"), tmp_path / "long" / resumed.name, "quick")
    torch.set_num_threads(threads)
    stopped = json.loads((resumed / "result.json").read_text())
    for step, numbers in whole["points"].items():
        known = {key: value for key, value in numbers.items() if value is not None}  # diversity needs pairs
        assert {key: stopped["points"][step][key] for key in known} == pytest.approx(known, rel=1e-3)
    left = [path.name for path in (out / "plain" / "seed-21").iterdir()]
    assert sorted(left) == [".lock", "result.json"]  # what is large is gone

    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and finished() == late
