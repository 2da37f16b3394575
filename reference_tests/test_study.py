"""The study: its statistics, what its cells change, its page; and, slow, the whole of it in small."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from minialign import study
from minialign.evaluate import contrasts, student_t
from minialign.models.pretrained import InputError
from minialign.study import BASE, CELLS, SIZES, Cell, labels_of, looked_at, measured, questions
from minialign.study_page import Question, Row, table, told, with_blocks


def test_student_t_is_the_tabled_one():
    """Quantiles at 97.5 % as every table of the t distribution has them."""
    for freedom, tabled in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (10, 2.228), (30, 2.042), (120, 1.980)):
        assert student_t(freedom) == pytest.approx(tabled, abs=6e-4)
    assert student_t(2, 0.9) == pytest.approx(2.920, abs=6e-4)
    assert student_t(1, 0.5) == pytest.approx(1, abs=1e-5)  # Cauchy's quartile


def test_contrasts_are_those_of_the_linear_model():
    """y_rs = mu_r + b_s + e_rs by least squares on a design matrix, and the standard error from its covariance."""
    rng = np.random.default_rng(0)
    rows, blocks = 5, 3
    y = rng.normal(size=(rows, blocks)) + rng.normal(size=blocks) * 5
    design = np.zeros((rows * blocks, rows + blocks - 1))
    for r in range(rows):
        for s in range(blocks):
            design[r * blocks + s, r] = 1
            if s:
                design[r * blocks + s, rows + s - 1] = 1
    solution, *_ = np.linalg.lstsq(design, y.ravel(), rcond=None)
    freedom = (rows - 1) * (blocks - 1)
    variance = np.square(y.ravel() - design @ solution).sum() / freedom
    inverse = np.linalg.inv(design.T @ design)
    alone = rng.normal(size=(1, blocks)) * 100  # scatters more, and is kept out
    found = contrasts(torch.tensor(np.concatenate([y, alone])), reference=1, apart=[rows])
    assert found.pop() == pytest.approx(contrasts(torch.tensor(np.stack([y[1], alone[0]])), 0)[1])
    for r, (difference, low, high) in enumerate(found):
        which = np.eye(design.shape[1])[r] - np.eye(design.shape[1])[1]
        half = student_t(freedom) * math.sqrt(variance * which @ inverse @ which)
        assert difference == pytest.approx(which @ solution, abs=1e-9)
        if r != 1:
            assert (high - low) / 2 == pytest.approx(half)


def test_two_rows_are_the_paired_t_test():
    before, after = torch.tensor([0.40, 0.50, 0.45]).double(), torch.tensor([0.70, 0.72, 0.80]).double()
    gains = (after - before).numpy()
    half = 4.302653 * gains.std(ddof=1) / math.sqrt(3)
    difference, low, high = contrasts(torch.stack([before, after]), 0)[1]
    assert [difference, low, high] == pytest.approx([gains.mean(), gains.mean() - half, gains.mean() + half], rel=1e-5)


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

    default = study.EMBEDDED_DEFAULTS
    assert settings("beta") == {0, 0.1, 0.5, 1, 2}
    assert settings("lambda") | {default["lambda"]} == {0, 0.25, 0.5, 1}
    assert settings("temperature") | {default["temperature"]} == {0.1, 0.5, 1, 2}
    for unlabelled in (True, False):
        parts = {cell.part for cell in CELLS.values() if cell.unlabelled == unlabelled}
        assert parts == {0.05, 0.1, 0.25, 0.5, 1}
    assert {cell.flipped for cell in CELLS.values()} == {0, 0.1, 0.2, 0.3}
    assert settings("weighting") == study.WEIGHTINGS.keys() - {"reward"}
    assert SIZES["full"]["long"]["steps"] == 10 * default["steps"]


def test_parts_of_the_labels_are_nested_and_labellers_err_as_often_as_told():
    truth = {i: float(i % 3 == 0) for i in range(20_000)}
    parts = [labels_of(Cell(part=part), truth, seed=1) for part in (0.05, 0.25, 1)]
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


def test_the_table_gives_means_and_intervals_of_differences():
    rows = [BASE, Row("a", "default"), Row("b", "plain")]
    question = Question("title", rows, 1, ("aligned",), metrics=("aligned", "diversity"))
    numbers = {"base": (0.40, 0.44, 0.43), "default": (0.70, 0.74, 0.72), "plain": (0.71, 0.74, 0.73)}
    found = {
        (cell, seed): {"points": {"": {"aligned": value[seed], "diversity": None if seed and cell == "base" else 0.25}}}
        for cell, value in numbers.items()
        for seed in (0, 1, 2)
    }
    lines = table(question, rows, question.metrics, found, (0, 1, 2)).split("\n")
    assert lines[0] == "|  | aligned ↑ | diversity ↑ |"
    assert lines[3] == "| a | 72.0 % | 0.250 |"
    expected = contrasts(torch.tensor([numbers[row.cell] for row in rows]).double(), 1, [0])
    (_, low, high), (_, down, up) = expected[0], expected[2]
    assert high < 0 and down < 0 < up  # one is carried, the other is not
    assert lines[2] == f"| no fine-tuning | 42.3 % (**{100 * low:+.1f} to {100 * high:+.1f}**) | – |"
    assert lines[4] == f"| b | 72.7 % ({100 * down:+.1f} to {100 * up:+.1f}) | 0.250 |"
    assert told(0.1234, "aligned", signed=True) == "+12.3" and told(0.5, "held_out auc") == "0.500"


def test_a_cell_is_measured_on_what_it_scores_itself():
    """Held-out labels against rewards that are given, those of unseen prompts against what scores in the cell."""
    here = type("Here", (), {})()
    here.held_out = {1: 1.0, 3: 0.0}
    here.unseen = torch.tensor([[1.0, 0], [0, 1], [1, 1]]), torch.tensor([[1.0, 0]] * 3), torch.tensor([1.0, 0, 0])
    reward = torch.tensor([0.0, 0.9, 0.0, 0.2])
    by_clip = measured(CELLS["clip-raw"], here, None, reward)
    assert by_clip["held_out"]["accuracy"] == 1 and by_clip["held_out"]["auc"] == 1
    assert by_clip["unseen"]["accuracy"] == pytest.approx(2 / 3)  # cosines 1, 0, 0.71
    by_model = measured(Cell(), here, lambda image, text: torch.tensor([0.1, 0.2, 0.3]), reward)
    assert by_model["unseen"]["auc"] == 0


def test_the_words_beside_the_tables_stay(tmp_path):
    page = tmp_path / "results.md"
    page.write_text(with_blocks(page, {"a": ("A", "one"), "b": ("B", "two")}))
    written = page.read_text().replace("## B", "Words of a reader.\n\n## B, renamed")
    page.write_text(written)
    again = with_blocks(page, {"a": ("A", "three"), "b": ("B", "two")})
    assert again == written.replace("\none\n", "\nthree\n") and again.count("measured: a") == 1
    for wrong in (written.replace("<!-- end of a -->", ""), written + "<!-- measured: a -->"):
        page.write_text(wrong)
        with pytest.raises(InputError, match="end of a"):
            with_blocks(page, {"a": ("A", "one")})


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
    for seed in study.SEEDS:
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
    whole = study.fill("long", study.world(out, seed, "quick"), tmp_path / "long" / resumed.name, "quick")
    torch.set_num_threads(threads)
    stopped = json.loads((resumed / "result.json").read_text())
    for step, point in whole["points"].items():
        known = {key: value for key, value in point.items() if value is not None}  # diversity needs pairs
        assert {key: stopped["points"][step][key] for key in known} == pytest.approx(known, rel=1e-3)
    left = [path.name for path in (out / "plain" / "seed-21").iterdir()]
    assert sorted(left) == [".lock", "result.json"]  # what is large is gone

    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and finished() == late
