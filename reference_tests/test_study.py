"""The study: what its cells change and what is measured of them; and, slow, the whole of it in small."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from minialign.engine.optimising import Terminated
from minialign.engine.run import Run
from minialign.evaluate import Judged
from minialign.evaluate import TestItem as Item
from minialign.feedback import SIMULATED
from minialign.files import InputError
from minialign.finetune import WEIGHTINGS
from minialign.measures import frechet_distance
from minialign.models.clip import CLIP
from minialign.models.reward import RewardModel, embed_images, embed_texts
from minialign.pages.study_page import METRICS
from minialign.pipeline import Pipeline
from minialign.reward.labels import Labelled, Split, contrastive_table
from minialign.shapes.world import drawings, prompts
from minialign.study import __main__ as study
from minialign.study import workers
from minialign.study.cells import (
    CELLS,
    DEFAULTS,
    POOL,
    SET,
    SIZES,
    Cell,
    cell_calls,
    cell_settings,
    clip_score,
    job_calls,
)
from minialign.study.filling import evaluated, labels_of, measured, point, relabelled, sets
from minialign.study.questions import SEEDS, findings, planned, questions


def metrics_of(question: Any) -> set[str]:
    return {metric for metric in (*question.metrics, *question.panels)}


def test_every_question_has_its_cells_and_no_cell_is_without_a_question():
    asked = questions()
    of_questions = {row.cell for question in asked.values() for row in question.rows}
    found = findings(["seen", "new objects"])
    of_findings = {cell for finding in found for cell, _ in (finding.one, finding.other)}
    assert of_questions | of_findings == set(CELLS) and 20 <= len(CELLS) <= 30
    for name, question in asked.items():
        reference = "pairs-half" if name == "ablation" else "default"
        assert question.rows[question.reference].cell == reference and CELLS["default"] == Cell()
        for row in question.rows:  # what a cell does not measure is asked of it nowhere
            asked_of = metrics_of(question) - {"aligned"} if CELLS[row.cell].kind == "reward" else set()
            assert all(metric.partition(",")[0] in ("pairs", "auc", "ece") for metric in asked_of)
    assert asked["beta"].expanded(["a", "b"]).metrics[:3] == ["aligned", "aligned, a", "aligned, b"]
    assert {metric.partition(",")[0] for question in asked.values() for metric in metrics_of(question)} == set(METRICS)


def test_the_grid_is_the_papers_questions_and_ours():
    def settings(key):
        return {cell.settings[key] for cell in CELLS.values() if key in cell.settings}

    base, alone, scored, all_three = (CELLS[row.cell] for row in questions()["ablation"].rows)
    assert base.kind == "base" and not alone.unlabelled and scored.unlabelled and all_three.unlabelled
    assert alone.settings == scored.settings == {"beta": 0} and DEFAULTS["beta"] > 0
    assert all_three == Cell({"beta": 1, "pretrain_fraction": 0.5})  # half of each batch, as in the paper
    compared = [(finding.one[0], finding.other[0]) for finding in findings(["seen"]) if "0.79 with" in finding.claim]
    compared += [(one.one[0], one.other[0]) for one in findings(["seen"]) if "FID 16.76" in one.claim]
    assert compared == [("scored", "labelled"), *[("pairs-half", "scored")] * 2, ("pairs-half", "base")]
    helps = [one for one in findings(["seen"]) if "auxiliary" in one.claim]
    assert [(one.one[0], one.other[0]) for one in helps] == [("temperature-2", "lambda-0")]  # T 2 as in the paper
    assert [row.cell for row in questions()["reward"].rows if row.apart] == ["clip"]  # its logits alone are fitted
    noisy, clean = ({cell.settings["beta"] for cell in CELLS.values() if cell.clean == one and "beta" in cell.settings}
                    for one in (False, True))  # fmt: skip
    assert clean == noisy - {0}
    for row in questions()["knob"].rows:  # rows of one lambda / T beside rows of others
        both = DEFAULTS | CELLS[row.cell].settings
        assert row.x == both["lambda"] / both["temperature"]
    assert settings("weighting") == WEIGHTINGS.keys() - {"reward"} and settings("image_sampling") == {"uniform"}
    assert {cell.fraction for cell in CELLS.values()} == {0.1, 0.5, 1}
    assert (SIZES["full"]["cell"]["test_images"], len(SEEDS), SET, POOL) == (640, 6, 4, 16)
    assert not set(SEEDS) & {21, 22, 23}  # of which results were reported before
    lengths = {name: cell_settings(name, 0, "full") for name in ("steps-quarter", "default", "steps-4")}
    assert len({one["warmup"] / one["steps"] for one in lengths.values()}) == 1
    assert cell_settings("steps-quarter", 0, "quick")["warmup"] == 1
    sources = {finding.source for finding in findings(["seen"])}
    assert sources == {"Fig. 3a", "Fig. 3b", "Fig. 4", "Table 3", "Fig. 6"}


def test_the_cost_of_a_cell_by_hand():
    full = SIZES["full"]["cell"]
    trained, tested = full["steps"] * full["batch_size"] * 3, full["test_images"] * DEFAULTS["sampling_steps"] * 2
    assert cell_calls("default", "full") == trained + tested and cell_calls("base", "full") == tested
    assert cell_calls("steps-4", "full") == 4 * trained + tested
    assert cell_calls("lambda-2-temperature-2", "full") == 0
    assert cell_calls("sets", "full") == 96 * 4 * DEFAULTS["sampling_steps"] * 2
    assert all(cell_calls(row.cell, "full") == cell_calls("default", "full")
               for row in questions()["weights"].rows if row.cell != "base")  # equal compute  # fmt: skip
    assert job_calls("full") > cell_calls("default", "full") and "million passes" in planned(SEEDS, "full")


def test_the_time_left_is_by_the_speed_of_finished_cells():
    job = {"settings": {"steps": 10, "batch_size": 12}, "seconds": {"finetune": 0.36}}  # 1,000 passes a second
    calls = cell_calls("default", "full")
    first = study.duration(["default"], job, {("lambda-2-temperature-2", 1): 5.0}, "full", 2)
    assert first == f"{calls / 1000 / 3600:.1f} hours at the speed of the main job's fine-tuning"
    later = study.duration(["default"] * 4, job, {("default", 1): 7000.0, ("plain", 1): 7400.0}, "full", 2)
    assert later == "4.0 hours at the speed of 2 finished cells"  # of two hours each, in two processes


def test_parts_of_the_labels_are_nested_and_of_each_prompt_and_labellers_err_as_often_as_told():
    truth, prompts = {i: float(i % 3 == 0) for i in range(20_000)}, [f"prompt {i % 1000}" for i in range(20_000)]
    parts = [labels_of(Cell(fraction=part), truth, prompts, seed=1) for part in (0.1, 0.5, 1)]
    assert [len(part) for part in parts] == [2000, 10_000, 20_000]
    assert parts[0].items() <= parts[1].items() <= parts[2].items() and parts[2] == truth
    of_prompts = Counter(prompts[i] for i in parts[1])
    assert len(of_prompts) == 1000 and set(of_prompts.values()) <= {9, 10, 11}  # half of the images a prompt
    wrong = []
    for cell in (Cell(flipped=0.2), Cell(flipped=0.3), Cell(flipped=0.3, labellers=3)):
        labels = labels_of(cell, truth, prompts, seed=1)
        wrong.append({i for i in truth if labels[i] != truth[i]})
    assert wrong[0] < wrong[1]
    expected = (0.2, 0.3, 0.3**2 * (3 - 2 * 0.3))  # of three, two or all err
    both = 0.3 * (1 - 0.7**2)  # the one labeller is the first of three: with one more the majority errs, too
    for found, chance in zip((*wrong, wrong[1] & wrong[2]), (*expected, both)):
        assert len(found) / len(truth) == pytest.approx(chance, abs=4 * math.sqrt(chance / len(truth)))


def labelled(texts: list[str], split: Split, labels: list[float], clip: CLIP) -> Any:
    """What a main job leaves of images of prompts, one each: a drawing of each, and labels of all of them."""
    among = [texts[i] for i in split.learn]
    table, columns = contrastive_table(texts, among, {text: text for text in texts}, seed=0)
    images = embed_images(clip, drawings(texts, seed=0))
    tokens = {i: (i,) for i in range(len(texts))}
    data = Labelled(images, embed_texts(clip, table), columns, dict(enumerate(labels)), split, tokens)
    return SimpleNamespace(data=data, prompts=texts, clip=clip, seed=0)


def test_a_cells_reward_contrasts_with_the_prompts_of_its_own_labels_alone(tmp_path):
    """A prompt that nobody judged would be met as a wrong answer alone."""
    texts = prompts(0)[0][:60]
    split = Split(list(range(10, 60)), list(range(5, 10)), list(range(5)))
    here = labelled(texts, split, [float(i % 2) for i in range(60)], CLIP.from_pretrained())
    here.folder = tmp_path
    data = relabelled(Cell(fraction=0.5, flipped=0.3), here)
    assert len(data.split.learn) == 25
    assert (data.split.known, data.split.new) == (split.known, split.new)
    assert all(data.labels[i] == here.data.labels[i] for i in (*split.known, *split.new))
    own = data.columns[:, 0]
    assert torch.equal(data.texts[own], here.data.texts[here.data.columns[:, 0]])
    met = {int(row) for row in data.columns[data.split.learn].flatten() if row >= 0}
    assert met == {int(own[i]) for i in data.split.learn}
    changed = [i for i in data.split.learn if data.labels[i] != here.data.labels[i]]
    assert 0 < len(changed) < 15


def test_a_reward_is_measured_by_what_scores_in_a_cell_on_pairs_of_each_group(tmp_path):
    clip = CLIP.from_pretrained()
    texts = ["a red circle"] * 3 + ["two stars"] * 3
    items = [Item(text, i, ("color", "seen") if i < 3 else ("count", "new objects")) for i, text in enumerate(texts)]
    verdicts = ["good", "bad", "skip", "good", "bad", "bad"]
    pool = Judged("", "", tmp_path, [], torch.arange(6.0)[:, None], {}, list(verdicts), None)
    here: Any = SimpleNamespace(folder=tmp_path, clip=clip, pool_items=items, pool=pool)
    found = measured(lambda image, text: torch.tensor([0.9, 0.8, 0.0, 0.4, 0.4, 0.6])[image[:, 0].long()], here)
    assert found["pairs, seen"] == 1 and found["pairs, new objects"] == 0.25  # a tie and a mistake
    assert found["ece, seen"] == pytest.approx(abs((0.9 + 0.8) / 2 - 0.5))  # two images are one bin
    assert set(found) == {f"{one}, {group}" for one in ("pairs", "auc", "ece") for group in ("seen", "new objects")}


def test_a_prompt_that_the_pool_has_twice_counts_as_two_and_a_group_that_nobody_can_read_as_none(tmp_path, monkeypatch):
    monkeypatch.setattr("minialign.study.filling.POOL", 2)
    items = [Item("a red circle", i, ("seen",)) for i in range(4)] + [Item("two stars", 4, ("new objects",))] * 2
    pool = Judged("", "", tmp_path, [], torch.arange(6.0)[:, None], {}, ["good", "bad"] * 2 + ["skip"] * 2, None)
    here: Any = SimpleNamespace(folder=tmp_path, clip=CLIP.from_pretrained(), pool_items=items, pool=pool)
    found = measured(lambda image, text: torch.tensor([0.4, 0.3, 0.2, 0.1, 0, 0])[image[:, 0].long()], here)
    assert found["pairs, seen"] == 1  # of all four pairs of these prompts it would be 3/4
    assert set(found) == {"pairs, seen", "auc, seen", "ece, seen"}


def test_the_clip_score_is_fitted_to_the_labels():
    image, text = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.2, 1]]), torch.tensor([[1.0, 0]] * 4)
    data = Labelled(image, text, torch.arange(4)[:, None], {0: 1.0, 1: 1.0, 2: 0.0, 3: 0.0}, Split([0, 2], [], []), {})
    middle = clip_score(data, torch.tensor([[1, 3**0.5]]), text[:1])  # of the cosines of labels that are not held out
    assert middle == pytest.approx(0.5, abs=1e-3) and clip_score(data, image[3:], text[:1]) < 0.1


def test_a_point_is_of_all_images_by_group_and_its_fidelity_of_as_many_whatever_can_be_read(tmp_path, monkeypatch):
    clip, asked = CLIP.from_pretrained(), ["a red circle", "two stars"] * 8
    made = drawings([*prompts(0)[0][:13], *asked[13:]], seed=1)
    pictures = [Image.new("RGB", (64, 64), "white") if i in (2, 7) else image for i, image in enumerate(made)]
    paths = [tmp_path / f"{i}.png" for i in range(16)]
    for path, picture in zip(paths, pictures):
        picture.save(path)
    items = [Item(text, i, ("color", "seen") if i % 2 else ("new objects",)) for i, text in enumerate(asked)]
    verdicts = ["skip" if i in (2, 7) else "good" if i > 12 else "bad" for i in range(16)]
    features = embed_images(clip, pictures)
    side = Judged("", "", tmp_path, paths, features, {"reward": [0.25] * 8 + [0.75] * 8}, list(verdicts), None)
    here: Any = SimpleNamespace(seed=0, size="tiny", items=items, clip=clip)
    monkeypatch.setitem(SIZES, "tiny", {"distances": 14})
    found = point(here, side)
    assert found["readable"] == 14 / 16 and found["aligned"] == 3 / 16 and found["reward"] == 0.5
    assert found["aligned, new objects"] == 1 / 8 and found["aligned, seen"] == 2 / 8 and "aligned, color" not in found
    assert found["fidelity images"] == 14
    assert 0 < found["fidelity"] < 0.5 * frechet_distance(features, embed_images(clip, drawings(asked, seed=0)))
    assert METRICS.keys() >= {metric.partition(",")[0] for metric in found} - {"fidelity images"}
    monkeypatch.setitem(SIZES, "tiny", {"distances": 15})
    assert point(here, side)["fidelity"] is None


def test_sets_are_of_the_same_images_by_group_and_clean_by_one_rule(tmp_path, monkeypatch):
    """Two prompts, POOL images of each: of the first the reward's best are good, of the second the random ones."""
    items = [Item(text, i, (group,)) for text, group in (("a", "seen"), ("b", "new objects")) for i in range(POOL)]
    paths = [tmp_path / f"{i}.png" for i in range(2 * POOL)]
    good = [float(i >= POOL - SET) for i in range(POOL)] + [float(i < SET) for i in range(POOL)]
    values = {SIMULATED: good, "reward": [i % POOL / POOL for i in range(2 * POOL)]}
    pool = Judged("", "", tmp_path, paths, torch.zeros(2 * POOL, 1), values, [], None)
    asked = []

    def evaluate_model(run, name, source, load, items, *how):  # the fine-tuned model: all good, and none of them clean
        assert [item.prompt for item in items] == ["a"] * SET + ["b"] * SET
        return Judged("", "", tmp_path, [tmp_path / f"tuned {item.prompt}{i}.png" for i, item in enumerate(items)],
                      torch.ones(2 * SET, 1), {SIMULATED: [1.0] * 2 * SET}, [], None)  # fmt: skip

    def clean(paths, features, *how):
        asked.append(paths)
        assert features.flatten().tolist() == [float(path.name[0] == "t") for path in paths]
        return [float(path.name[0] != "t") for path in paths]

    monkeypatch.setattr("minialign.study.filling.evaluate_model", evaluate_model)
    monkeypatch.setattr("minialign.study.filling.clean", clean)
    here: Any = SimpleNamespace(
        seed=0, folder=tmp_path, pool_items=items, pool=pool, settings={}, clip=None, reward=None
    )
    found = sets(here, tmp_path)
    assert found["set prompts"] == found["distinct prompts"] == 2
    assert [len(set(one)) for one in asked] == [6 * SET]  # each image once, all by one threshold

    def outcome(match, what, group=""):
        return [found[f"{match}; {what}; {SIMULATED}; {end}{group}"] for end in ("won", "tied", "lost", "n")]

    best = f"best {SET} of {POOL}"
    assert outcome(f"{best} against random", "alignment") == [0.5, 0, 0.5, 2]
    assert outcome(f"{best} against random", "alignment", ", seen") == [1, 0, 0, 1]
    assert outcome(f"{best} against random", "alignment", ", new objects") == [0, 0, 1, 1]
    assert outcome("tuned against random", "alignment") == [0.5, 0.5, 0, 2]
    assert outcome(f"tuned against {best}", "fidelity") == [0, 0, 1, 2]


@pytest.fixture
def made(monkeypatch):
    """Cells that take no time: the names of those that were filled; "scored" has an error in it."""
    names = []

    def fill(name, here, folder):
        names.append(name)
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "compare").mkdir()
        if name == "scored":
            raise ValueError("no image weighs anything\nand more")
        return {"aligned": 0.5, "readable": 0.25, "fidelity": None}

    monkeypatch.setattr(workers, "fill", fill)
    monkeypatch.setattr(workers, "world", lambda *how: None)
    return names


def test_a_cell_of_other_settings_is_filled_again_and_keeps_its_images_alone(tmp_path, made, monkeypatch, capsys):
    workers.fill_one(tmp_path, "uniform", 1, [1], "full")
    path = tmp_path / "uniform" / "seed-1"
    (own,) = (place for place in path.iterdir() if place.is_dir())
    assert [place.name for place in own.iterdir()] == ["compare"]
    assert (
        "uniform, seed 1: no Fréchet distance: 25.0% of its images can be read, fewer than 384"
        in capsys.readouterr().out
    )
    workers.fill_one(tmp_path, "uniform", 1, [1], "full")
    assert made == ["uniform"] and ("uniform", 1) not in workers.missing(tmp_path, [1], "full")
    monkeypatch.setitem(CELLS, "uniform", Cell({"image_sampling": "uniform", "steps": 7}))
    assert ("uniform", 1) in workers.missing(tmp_path, [1], "full")
    capsys.readouterr()
    workers.fill_one(tmp_path, "uniform", 1, [1], "full")
    assert "uniform, seed 1: its result is of other settings, and is computed again" in capsys.readouterr().out
    assert made == ["uniform"] * 2 and not own.exists() and len(list(path.glob("*/compare"))) == 1
    assert ("uniform", 1) not in workers.missing(tmp_path, [1], "full")


def test_a_cell_that_fails_does_not_end_the_others(tmp_path, made, monkeypatch, capsys):
    workers.work(tmp_path, ["default", "scored", "plain"], [1], "full", 1)
    assert sorted(made) == ["default", "plain", "scored"]  # once each
    assert "scored, seed 1: failed (no image weighs anything)" in capsys.readouterr().out
    assert "ValueError" in workers.error_of(tmp_path, "scored", 1).read_text()

    class Process:  # of the command: the cells are filled in this one
        def __init__(self, target):
            self.target, self.exitcode, self.pid = target, 0, None

        def start(self):
            with pytest.raises(SystemExit, match="0"):
                self.target()

        def join(self):
            pass

    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda kind: SimpleNamespace(Process=Process))
    with pytest.raises(InputError, match="1 cells failed: scored of seed 1; .*error.txt says why"):
        workers.fill_all(tmp_path, ["default", "scored"], [1], "full", 1)
    assert made.count("scored") == 2  # it was tried again

    def ended(*how):
        raise Terminated("SIGTERM at step 3, which is saved")

    monkeypatch.setattr(workers, "fill", ended)
    with pytest.raises(Terminated):
        workers.work(tmp_path, ["uniform"], [1], "full", 1)
    assert not workers.error_of(tmp_path, "uniform", 1).exists()


def test_images_that_are_kept_are_measured_again_without_fine_tuning(tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", {"distances": 6, "run": {}, "cell": {"sampling_steps": 2}})
    texts, loads = prompts(0)[0][:8], []
    items = [Item(text, i, ("seen",)) for i, text in enumerate(texts)]
    settings = cell_settings("default", 0, "tiny")
    clip = CLIP.from_pretrained()
    reward = RewardModel({"width": embed_texts(clip, texts).shape[1], "hidden": 8})
    here: Any = SimpleNamespace(seed=0, size="tiny", items=items, clip=clip, reward=reward, settings=settings)

    def load():
        loads.append(1)
        return Pipeline.from_pretrained()

    first = evaluated(load, here, tmp_path)
    shutil.rmtree(tmp_path / "cache")  # as the cell leaves it
    assert evaluated(load, here, tmp_path) == first and len(loads) == 1
    next(tmp_path.glob("compare/*/images/*.png")).unlink()  # ended before all were there
    assert evaluated(load, here, tmp_path) == first and len(loads) == 2


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
    """All of the study in small: ended amid its cells, gone on with, and begun a third time with all done."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "study"
    command = [sys.executable, "-m", "minialign.study", "--quick", "--out", str(out)]

    def finished():
        return {path: path.stat().st_mtime_ns for path in out.glob("*/seed-*/result.json")}

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True) as process:
        os.set_blocking(process.stdout.fileno(), False)
        until = time.time() + 900
        while len(finished()) < 3 and process.poll() is None and time.time() < until:
            process.stdout.read()  # or the pipe is full
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    early = finished()
    assert len(early) >= 3

    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert "planned for all cells" in done.stdout and "hours at the speed of" in done.stdout
    late = finished()
    assert len(late) == len(CELLS) * 3 and early.items() <= late.items()
    page = (out / "docs" / "results.md").read_text()
    names = ["categories", "sets", *questions()]
    for name in names:
        assert f"](study-{name}.png)" in page and (out / "docs" / f"study-{name}.png").stat().st_size > 10_000
    assert len(list((out / "docs").glob("*.png"))) == page.count("](study-") == len(names)
    assert page.count("| reproduces |") + page.count("| does not |") + page.count("| cannot be told |") >= 17

    found = dict.fromkeys(CELLS, "")
    for seed in SEEDS[:3]:
        result = {name: json.loads((out / name / f"seed-{seed}" / "result.json").read_text()) for name in CELLS}
        for name, one in result.items():
            found[name] += json.dumps(
                {key: value for key, value in one.items() if key not in ("seconds", "calls", "cell")}
            )
        outcome = [
            result["sets"][f"tuned against random; alignment; {SIMULATED}; {end}"] for end in ("won", "tied", "lost")
        ]
        assert sum(outcome) == pytest.approx(1)
    assert len(set(found.values())) == len(CELLS)  # no choice is ignored
    plain = out / "plain" / f"seed-{SEEDS[0]}"
    (own,) = (path for path in plain.iterdir() if path.is_dir())
    assert sorted(path.name for path in plain.iterdir()) == sorted([".lock", own.name, "result.json"])
    assert [path.name for path in own.iterdir()] == ["compare"]  # what is large is gone

    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and finished() == late
