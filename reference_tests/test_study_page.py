"""The study's page: its tables and verdicts, its figures of made-up numbers, and the words that stay beside them."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
from made_up import results
from PIL import Image

from minialign.evaluate.sets import NOISY
from minialign.files import InputError
from minialign.measures import Contrast, contrasts, holm, student_t
from minialign.pages.study_page import (
    Finding,
    Question,
    Row,
    categories_block,
    findings_block,
    formatted,
    judged_findings,
    own_intervals,
    table,
    title,
    verdict,
    with_blocks,
)
from minialign.study.cells import CELLS
from minialign.study.questions import MATCHES, RATED, page, questions

SEEDS = (0, 1, 2)


def test_the_table_gives_means_and_intervals_of_differences_corrected_for_their_number():
    rows = [Row("no fine-tuning", "base", apart=True), Row("a", "default"), Row("b", "plain"), Row("c", "scored")]
    question = Question("title", rows, 1, ("aligned", "fidelity", "diversity"), ())
    numbers = {
        "base": (0.40, 0.44, 0.43), "default": (0.70, 0.74, 0.72), "plain": (0.71, 0.74, 0.73),
        "scored": (0.68, 0.73, 0.70),
    }  # fmt: skip
    found = {
        (cell, seed): {
            "aligned": value[seed], "fidelity": 10 * value[seed], "fidelity images": 512,
            "diversity": None if seed and cell == "base" else 0.25,
        }
        for cell, value in numbers.items()
        for seed in SEEDS
    }  # fmt: skip
    lines = table(question, found, SEEDS).split("\n")
    assert lines[0] == "|  | aligned ↑ | Fréchet distance ↓ (512 images) | diversity ↑ |"
    assert lines[3] == "| a | 72.0 % | 7.20 | 0.250 |"
    ours = contrasts(torch.tensor([numbers[row.cell] for row in rows]).double(), 1, [0])
    corrected = holm([ours[i].p for i in (0, 2, 3)] * 2)
    assert ours[3].p < 0.05 <= corrected[2] and corrected[0] < 0.05  # one alone is carried by all six
    for i, name, mean in ((0, "no fine-tuning", 42.3), (2, "b", 72.7), (3, "c", 70.3)):
        span = f"{100 * ours[i].low:+.1f} to {100 * ours[i].high:+.1f}"
        assert lines[2 + i].startswith(f"| {name} | {mean} % ({f'**{span}**' if i == 0 else span}) | "), lines[2 + i]
    assert lines[2].endswith("| – |") and lines[4].endswith(" 0.250 |")
    half = 100 * (ours[2].high - ours[2].low) / 2
    assert (
        lines[-1].startswith("Corrected for 6 comparisons (Holm). Half-width")
        and f"alignment: {half:.1f} points" in lines[-1]
    )

    for seed in SEEDS:  # a row without a number takes none from the other rows
        del found["scored", seed]["aligned"]
    found["default", 1]["fidelity"] = None  # the reference's: there is nothing to compare with
    lines = table(question, found, SEEDS).split("\n")
    two = contrasts(torch.tensor([numbers[row.cell] for row in rows[:3]]).double(), 1, [0])
    assert f"({100 * two[2].low:+.1f} to {100 * two[2].high:+.1f})" in lines[4]
    assert lines[5] == "| c | – | 7.03 | 0.250 |" and "nan" not in "\n".join(lines)
    assert lines[2].split(" | ")[2] == "4.23" and lines[3].split(" | ")[2] == "–"
    half = 100 * (two[2].high - two[2].low) / 2
    assert lines[-1].startswith("Corrected for 2 comparisons (Holm). Half-width") and f"{half:.1f} points" in lines[-1]
    for seed in SEEDS:
        del found["plain", seed]["aligned"]
    lines = table(question, found, SEEDS).split("\n")
    alone = contrasts(torch.tensor([numbers[row.cell] for row in rows[:2]]).double(), 1)[0]
    assert f"{100 * alone.low:+.1f} to {100 * alone.high:+.1f}" in lines[2]  # with a row apart alone: the paired t test
    assert lines[-1] == "Corrected for 1 comparisons (Holm)."
    assert formatted(0.1234, "aligned, seen", signed=True) == "+12.3" and formatted(0.5, "auc, seen") == "0.500"
    assert title("aligned, new objects") == "aligned, new objects ↑" and title("calls") == "UNet passes"
    assert formatted(15360.0, "calls") == "15,360"


def test_the_verdict_is_by_the_rule():
    up, down, no_loss = (Finding("Fig. 1", "claim", ("a", "aligned"), ("b", "aligned"), sign) for sign in (1, -1, 0))
    clear, unclear = Contrast(0.1, 0.05, 0.15, 0.001), Contrast(0.02, -0.03, 0.07, 0.3)
    assert (verdict(up, clear, 0.01), verdict(down, clear, 0.01)) == ("reproduces", "does not")
    assert verdict(up, clear, 0.06) == verdict(down, unclear, 0.3) == "cannot be told"  # corrected, it is not clear
    assert verdict(no_loss, unclear, 1) == verdict(no_loss, Contrast(0.3, 0.2, 0.4, 0.01), 1) == "reproduces"
    assert verdict(no_loss, Contrast(-0.1, -0.14, -0.06, 0.01), 1) == "does not"  # a loss of more than five points
    assert verdict(no_loss, Contrast(-0.04, -0.08, 0.0, 0.05), 1) == "cannot be told"
    assert verdict(up, Contrast(math.nan, math.nan, math.nan, 1), 1) == "cannot be told"


def test_findings_are_differences_within_seeds():
    numbers = {"a": (0.5, 0.7, 0.6), "b": (0.4, 0.62, 0.49), "c": (0.41, 0.60, 0.50)}
    found = {(name, seed): {"aligned": value[seed]} for name, value in numbers.items() for seed in SEEDS}
    asked = [Finding("Fig. 1", "up", ("a", "aligned"), ("b", "aligned"), 1),
             Finding("Fig. 2", "down", ("a", "aligned"), ("c", "aligned"), -1),
             Finding("Fig. 3", "same", ("c", "aligned"), ("b", "aligned"), 0)]  # fmt: skip
    asked += [Finding("Fig. 4", "unknown", ("a", "aligned"), ("b", "fidelity"), 1)]
    judged, number = judged_findings(asked, found, SEEDS)
    for (finding, means, one, _), (cell, other) in zip(judged, (("a", "b"), ("a", "c"), ("c", "b"))):
        expected = contrasts(torch.tensor([numbers[other], numbers[cell]]).double(), 0)[1]  # the paired t test
        assert one == pytest.approx(expected), finding
        assert means == pytest.approx((sum(numbers[cell]) / 3, sum(numbers[other]) / 3))
    assert [said for *_, said in judged] == ["reproduces", "does not", "reproduces", "cannot be told"]
    text = findings_block(asked, found, SEEDS)
    first = judged[0].ours
    span = f"({100 * first.low:+.1f} to {100 * first.high:+.1f})"
    assert f"| Fig. 1 | up | 60.0 %, 50.3 % | +9.7 points {span} | reproduces |" in text
    assert number == 2 and text.endswith("Corrected for 2 comparisons (Holm).") and "nan" not in text


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
    text = categories_block(jobs)
    (_, low, high, _) = contrasts(torch.tensor([[0.481] * 3, [0.70, 0.73, 0.76]]).double(), 0)[1]
    assert f"| aligned, overall | 48.1 % | 73.0 % | +24.9 ({100 * low:+.1f} to {100 * high:+.1f}) |" in text
    assert "| aligned, new objects | 35.2 % | 61.1 % | +25.9 (+25.9 to +25.9) |" in text
    assert "| Fréchet distance ↓ (fresh drawings of the prompts) | 3.41 | 4.09 | +0.68 (+0.68 to +0.68) |" in text
    assert "| saturation | 0.401 | 0.424 | +0.023 (+0.023 to +0.023) |" in text and "| brightness | 0.655 |" in text
    assert "| reward ↑ | 0.412 | 0.683 |" in text and "readable" not in text
    jobs[2]["evaluation"]["reference"] = "fresh drawings of the prompts, fewer"
    assert "Fréchet" not in categories_block(jobs)  # of unequal numbers of images


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


def made_up_study(folder: Path, groups: list[str]) -> None:
    """What a study leaves, with made-up numbers."""
    rng = random.Random(0)
    whole = ("aligned", "readable", "fidelity", "diversity", "reward")
    of_groups = [f"{one}, {group}" for one in ("aligned", "reward", "pairs", "auc", "ece") for group in groups]
    sets = [
        f"{match.key}; {what}; {rater}" for match in MATCHES for what in ("alignment", "fidelity") for rater in RATED
    ]
    for name in CELLS:
        middle = {metric: 0.3 + 0.4 * rng.random() for metric in (*whole, *of_groups)}
        for seed in SEEDS:
            found = {metric: value + rng.gauss(0, 0.02) for metric, value in middle.items()}
            found |= {"fidelity images": 512, "calls": 15360, "seconds": 60.0}
            if name == "sets":
                found = {"set prompts": 96, "distinct prompts": 90 - seed, "seconds": 60.0}
                for one, group in itertools.product(sets, ("", *(f", {group}" for group in groups))):
                    found |= {
                        f"{one}; won{group}": 0.4 + 0.02 * (seed - 1) + (0.1 if group else 0),
                        f"{one}; tied{group}": 0.3,
                        f"{one}; lost{group}": 0.2,
                        f"{one}; n{group}": 96,
                    }
            if name == "scored" and seed == 0:  # of too few readable images
                found["fidelity"] = None
            if name == "lambda-2-temperature-2":
                found = {metric: value for metric, value in found.items() if metric[:3] in ("pai", "auc", "ece", "sec")}
            path = folder / name / f"seed-{seed}" / "result.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(found))
    for seed in SEEDS:
        (folder / f"seed-{seed}").mkdir()
        (folder / f"seed-{seed}" / "results.json").write_text(json.dumps(results()))
    (folder / "config.json").write_text(json.dumps({"versions": {"torch": "2.99.1"}, "threads": 2}))


def test_the_page_has_every_question_and_figures_as_wide_as_a_readme_at_twice_the_resolution(tmp_path: Path):
    pytest.importorskip("matplotlib")
    made_up_study(tmp_path / "study", ["seen", "new combinations", "new objects"])
    page(tmp_path / "study", tmp_path / "results.md", SEEDS, "full")
    text = (tmp_path / "results.md").read_text()
    for name in ("categories", "sets", *questions()):
        with Image.open(tmp_path / f"study-{name}.png") as image:
            assert image.width == 1600, name
        assert f"](study-{name}.png)" in text and f"<!-- end of {name} -->" in text
    assert text.index("<!-- measured: findings -->") < text.index("<!-- measured: setting -->")  # at the top
    assert "training on half of the images of each prompt is worse; prompts: new objects" in text
    match = "| fine-tuned against the base model | fidelity |"
    half = 100 * student_t(2) * 0.02 / math.sqrt(3)
    won = f"40.0 % ({40 - half:.1f} % to {40 + half:.1f} %)"
    assert (
        f"{match} the annotator alone | all | {won} | 30.0 % (30.0 % to 30.0 %) | 20.0 % (20.0 % to 20.0 %) | 10"
        in text
    )
    assert f"{match} {RATED[NOISY]} | new objects | 50.0 % (" in text and "At least 88 of the 96 prompts" in text
    assert "| alignment of sets of four: 50 % won, 3 % lost | won 40.0 %, lost 20.0 % | +20.0 points (" in text
    assert "nan" not in text
    assert "aligned, new combinations ↑" in text and "(goal: 4)" in text and "million passes of the UNet" in text
