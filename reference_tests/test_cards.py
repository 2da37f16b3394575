"""Tables of text, cards and the PNG figures, of made-up numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_up import MODELS, results
from PIL import Image

from minialign.pages import cards, figures


def line(text: str, start: str) -> str:
    """The only line that starts so, with single spaces."""
    (found,) = [one for one in text.splitlines() if one.strip().startswith(start)]
    return " ".join(found.split())


def test_the_summary_is_of_the_judge_that_counts():
    text = cards.summary(results())
    assert line(text, "overall") == "overall 640 48.1 % (44-52) 76.2 % (72-80) +28.1 (+23.1 to +33.1)"
    assert line(text, "new objects") == "new objects 640 35.2 % (31-39) 61.1 % (57-65) +25.9 (+20.9 to +30.9)"
    assert line(text, "fine-tuned over base") == "fine-tuned over base: +28.1 points, significant at 5 %"
    assert line(text, "Frechet") == "Frechet distance (lower is better) 3.410 4.090"
    assert line(text, "readable") == "readable images 95.7 % 94.3 % -1.4 (-3.1 to +0.3)"
    assert "mean reward" not in text and "best of N" not in text and max(map(len, text.splitlines())) <= 92


def test_a_comparison_says_what_every_judge_says():
    evaluation = results()["evaluation"]
    evaluation["models"]["third"] = {}
    evaluation["judged"]["people"] = {"third": {"overall": {"value": 0.5, "n": 6, "ci95": None}}}
    tuned = evaluation["judged"]["people"]["fine-tuned"] = {"overall": {"value": 0.25, "n": 8, "ci95": [0.1, 0.6]}}
    tuned["overall"] |= {"gain": -0.25, "gain_ci95": None}
    text = cards.comparison(evaluation)
    people = text[text.index("images judged good by people") :]
    assert line(people, "overall") == "overall 8 - 25.0 % (10-60) -25.0 (n/a: one prompt) 50.0 %"
    assert "  fine-tuned over base: -25.0 points, no interval: n/a, one prompt" in people
    assert "  fine-tuned over base: +0.001, no significant difference" in text
    assert line(text, "N = 4") == "N = 4 70.0 % 87.0 % -"
    assert line(text, "diversity").endswith("0.312 0.268 -0.044 (-0.061 to -0.027) -")
    head, value = (next(one for one in text.splitlines() if word in one) for word in ("(95", "Frechet"))
    columns = [head.index(name) + len(name) for name in (*MODELS, "third")]
    assert [value[: columns[0]].split()[-1], value[: columns[1]].split()[-1]] == ["3.410", "4.090"]  # under the names
    assert len(value) == columns[2] and value.endswith(" -")


@pytest.mark.parametrize(
    "ends, said", [([-0.1, 0.2], "no significant difference"), ([0.0, 0.2], "no significant difference"),
                   ([0.01, 0.2], "significant at 5 %"), ([-0.2, -0.01], "significant at 5 %")]
)  # fmt: skip
def test_what_an_interval_says(ends, said):
    assert cards.significance(ends) == said


def test_the_model_card():
    values = results()
    card = cards.model_card(values)
    assert card.startswith("---\nlicense: other") and "base_model" not in card and "| steps | 300 |" in card
    assert "on 640 images of each model" in card and cards.summary(values) in card
    values["settings"] |= {"model": "someone/a-model"}
    assert "\nbase_model: someone/a-model\n" in cards.model_card(values)


def test_the_reward_models_table_and_card():
    reward = results()["reward"]
    text = cards.reward_table(reward)
    known, new = text[: text.index("\nnew prompts:")], text[text.index("\nnew prompts:") :]
    assert line(known, "known prompts") == (
        "known prompts: 192 held-out labels of 151 prompts; always predicting bad is right for 52.1 %"
    )
    assert line(known, "with the auxiliary loss").endswith("86.8 % 0.918 0.031 0.112 74.4 %")
    assert line(new, "with the auxiliary loss").endswith("83.4 % 0.884 0.031 0.112 74.4 %")
    assert line(new, "raw CLIP score").endswith("0.822 0.031 0.112 74.4 %")
    few = reward["held_out"] | {"known prompts": {"labels": 1, "prompts": 1, "good_fraction": 1.0, "comparisons": 1}}
    told = cards.reward_table(reward | {"labels": 1, "comparisons": 1, "held_out": few})
    assert "\nknown prompts: 1 held-out label of 1 prompt; " in told and "; 1 held-out comparison\n" in told
    assert told.startswith("1 label, ") and "; 1 comparison.\n" in told
    card = cards.reward_card(reward)
    assert text in card and "minialign's bundled CLIP" in card and "| lambda | 0.5 |" in card
    assert "nothing was measured" in cards.reward_table(reward | {"held_out": {}, "measured": {}})


def test_figures_are_as_wide_as_a_readme_at_twice_the_resolution(tmp_path: Path):
    pytest.importorskip("matplotlib")
    values = results()
    measured = values["reward"]["measured"]
    figures.plot_calibration(tmp_path / "calibration.png", measured | {"given": {"new prompts": {}}})
    curves = values["evaluation"]["best_of_n"]["reward"]["simulated annotator"]
    curves["runs/$^{$/model"] = curves.pop("fine-tuned")  # no formula
    figures.plot_best_of(tmp_path / "best.png", values["evaluation"]["best_of_n"])
    for name in ("calibration", "best"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width == 1600 and image.convert("L").getextrema() == (0, 255)
    one = {"base": {"value": [0.4], "ci95": [[0.3, 0.5]]}}
    for nothing in ({}, {"reward": {"people": one}}):
        figures.plot_best_of(tmp_path / "none.png", nothing)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.png", "calibration.png"]


def test_groups_stand_in_one_order():
    assert cards.in_order(["seen", "count", "new objects", "overall", "color", "seen"]) == [
        "overall", "count", "color", "seen", "new objects"
    ]  # fmt: skip
    evaluation = results()["evaluation"]
    for groups in evaluation["judged"]["simulated annotator"].values():
        groups["count"] = groups.pop("count")  # the last one there
    text = cards.comparison(evaluation)
    assert text.index("  count") < text.index("  color") < text.index("  seen")


def test_names_beside_lines_do_not_overlap():
    assert figures.spread([0.1, 0.5, 0.9], 0.1) == [0.1, 0.5, 0.9]
    assert figures.spread([0.1, 0.1, 0.15], 0.1) == pytest.approx([0.1, 0.2, 0.3])
    assert figures.spread([0.5, 0.95, 0.99, 0.99], 0.1) == pytest.approx([0.5, 0.8, 0.9, 1.0])
    assert figures.spread([]) == []
