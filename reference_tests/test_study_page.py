"""The study's page: its tables, its figures of made-up numbers, and the words that stay beside them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from made_up import results
from PIL import Image

from minialign.files import InputError
from minialign.measures import contrasts
from minialign.pages import study_page
from minialign.pages.study_page import Question, Row, categories_block, formatted, own_intervals, table, with_blocks

SEEDS = (0, 1, 2)


def test_the_table_gives_means_and_intervals_of_differences():
    rows = [Row("no fine-tuning", "base", apart=True), Row("a", "default"), Row("b", "plain")]
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
    (_, low, high, _), (_, down, up, _) = expected[0], expected[2]
    assert high < 0 and down < 0 < up  # one is carried, the other is not
    assert lines[2] == f"| no fine-tuning | 42.3 % (**{100 * low:+.1f} to {100 * high:+.1f}**) | – |"
    assert lines[4] == f"| b | 72.7 % ({100 * down:+.1f} to {100 * up:+.1f}) | 0.250 |"
    assert formatted(0.1234, "aligned", signed=True) == "+12.3" and formatted(0.5, "held_out auc") == "0.500"


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


def test_the_main_jobs_stand_in_one_table():
    jobs = [results() for _ in SEEDS]
    for k, job in enumerate(jobs):
        job["settings"]["seed"] = k
        job["evaluation"]["judged"]["simulated annotator"]["fine-tuned"]["overall"]["value"] = 0.70 + 0.03 * k
    jobs[0]["evaluation"]["readable"]["base"] = None
    jobs[1]["evaluation"]["judged"]["simulated annotator"]["fine-tuned"]["seen"]["gain_ci95"] = None
    text = categories_block(jobs)
    (_, low, high, _) = contrasts(torch.tensor([[0.481] * 3, [0.70, 0.73, 0.76]]).double(), 0)[1]
    assert f"| aligned, overall | 48.1 % | 73.0 % | +24.9 ({100 * low:+.1f} to {100 * high:+.1f}) |" in text
    assert "| aligned, new objects | 35.2 % | 61.1 % | +25.9 (+25.9 to +25.9) |" in text
    assert "| Fréchet distance ↓ | 3.41 | 4.09 | +0.68 (+0.68 to +0.68) |" in text
    assert "| mean reward ↑ | 0.412 | 0.683 |" in text and "readable" not in text
    one = "| 2 | 48.1 % → 76.0 %: +28.1 (+23.1 to +33.1) | 49.6 % → 78.7 %: +29.1 (+24.1 to +34.1) | "
    assert one in text and "| 0.918 | 0.884 | 0.822 |" in text
    assert "78.7 %: +29.1 (– to –)" in text


def test_own_intervals_are_students_and_stay_within_reach():
    """Of rows with one variance as a textbook has it for two groups of three; of a row apart by itself."""
    values = torch.tensor([[0.4, 0.5, 0.6], [0.7, 0.8, 0.9], [0.90, 0.99, 0.99], [math.nan] * 3]).double()
    half = 2.776445 * 0.1 / math.sqrt(3)  # t(4), and the variance of either row is 0.01
    found = own_intervals(values, "fidelity", [2])
    assert found[:2] == [pytest.approx((0.5 - half, 0.5 + half)), pytest.approx((0.8 - half, 0.8 + half))]
    apart = 4.302653 * values[2].std() / math.sqrt(3)
    assert found[2] == pytest.approx((0.96 - float(apart), 0.96 + float(apart)), abs=1e-6)
    assert all(map(math.isnan, found[3]))
    assert own_intervals(values, "aligned", [2])[2][1] == 1  # no fraction is above it


def test_figures_are_as_wide_as_a_readme_at_twice_the_resolution(tmp_path: Path):
    pytest.importorskip("matplotlib")
    metrics = [metric for metric in study_page.METRICS if metric not in study_page.OF_REWARD]
    cells = {name: 0.3 + 0.05 * i for i, name in enumerate(("base", "a", "b", "c"))}
    found = {
        (name, seed): {
            "points": {"": {metric: value + 0.02 * seed for metric in metrics}},
            "held_out": {"auc": value},
        }
        for name, value in cells.items()
        for seed in SEEDS
    }
    found["base", 1]["points"][""]["diversity"] = None
    base, *others = [
        Row(name, name, x=None if name == "base" else i, apart=name == "base") for i, name in enumerate(cells)
    ]
    rows = [base, *others]
    over = Question("", rows, 1, ("aligned", "fidelity", "held_out auc"), axis="labels, %")
    by_row = Question("", rows, 1, ("aligned", "diversity", "held_out auc"))
    study_page.plot(tmp_path / "over.png", over, found, SEEDS)
    study_page.plot(tmp_path / "rows.png", by_row, found, SEEDS)
    study_page.plot_trade_off(tmp_path / "trade.png", Question("", rows, 1, ("fidelity", "diversity")), found, SEEDS)
    study_page.plot_categories(tmp_path / "categories.png", [results() for _ in SEEDS])
    for name in ("over", "rows", "trade", "categories"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width == 1600, name
