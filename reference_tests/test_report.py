"""report.html from small made-up runs: what it says, what it leaves out, and that it stands alone."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from functools import partial
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import command
from made_up import GROUPS, HOSTILE, MODELS, of_picture, results, write_run

from minialign.engine.settings import add_flags, given
from minialign.measures import wilson_interval
from minialign.pages import figures, normal
from minialign.pages.report import write_report

VOID = {"meta", "img", "br", "path", "use", "line", "rect"}


class Balance(HTMLParser):
    """Checks that every tag is closed in order, and collects attributes and ids."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.errors: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"</{tag}> at {self.getpos()}")


def parse(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.errors == [] and parser.open == []
    ids = [attributes["id"] for _, attributes in parser.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    return parser


def page_of(run: Path) -> str:
    """The report of a run, with single plain spaces."""
    return " ".join(write_report(run).read_text(encoding="utf-8").replace("&nbsp;", " ").split())


def command_of(page: str) -> str:
    """The command that the page shows, without the tags that keep flags whole at the end of a line."""
    return unescape(re.sub("</?span>", "", re.findall("<pre>(python.*?)</pre>", page, re.DOTALL)[0]))


@pytest.fixture(autouse=True)
def no_band(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's band is of other runs than the ones here."""
    monkeypatch.setattr(normal, "FILE", tmp_path / "normal.json")


@pytest.mark.parametrize("charts", [True, False])
def test_says_every_headline_number(tmp_path: Path, request: pytest.FixtureRequest, charts: bool) -> None:
    if charts:
        pytest.importorskip("matplotlib")
    else:
        request.getfixturevalue("without_matplotlib")
    run = write_run(tmp_path / "run", results())
    page = page_of(run)
    parsed = parse(page)
    said = results()["evaluation"]["judged"]["simulated annotator"]
    numbers = [f"{100 * said[model][group]['value']:.1f} %" for model in MODELS for group in GROUPS]
    numbers += [
        "+28.1 points",
        "+23.1 to +33.1",
        "640 of each model judged",
        "+0.271",
        "3.410",
        "4.090",
        "0.312",
        "0.268",
        "95.7 %",
        "0.424",
        "+0.023",
        "+0.013 to +0.033",
        "−0.044",
        "−0.061 to −0.027",
        "−1.4",
        "−3.1 to +0.3",
    ]
    numbers += ["0.918", "0.884", "0.831", "86.8 %", "48.6 %", "1,280", "2,560", "192", "217", "151"]
    numbers += ["3 min 45 s", "1 min 52 s", "1.9 s", "2.99.1"]
    assert [number for number in numbers if number not in page] == []
    words = ("simulated annotator", "significant at 5 %", "no significant difference", "lower is better", "new objects")
    words += (
        "<i>new combination</i>",
        "✓ good",
        "✗ bad",
        "– skip",
        "Calibration on new prompts",
        "flat denoising loss is normal",
    )
    assert [word for word in words if word not in page] == []
    assert page.count("one number for all images, so it has no interval") == 2  # of the two distances
    assert [tag for tag, _ in parsed.seen].count("svg") == (10 if charts else 0)
    assert ("adds them" in page) != charts
    assert [tag for tag, _ in parsed.seen].count("img") == 4
    assert page.index(">known prompts</th><th>new prompts</th>") < page.index("<td>AUC<")
    for line in (
        "from minialign import Pipeline",
        f"Pipeline.from_pretrained(&quot;{run / 'model'}&quot;)",
        'href="model/"',
    ):
        assert line in page


def test_stands_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = write_report(write_run(tmp_path / "run", results(), size=400)).read_text(encoding="utf-8")
    assert re.findall(r"https?:[^\"'\s<]*", page) == ["https://arxiv.org/abs/2302.12192"]
    for tag, attributes in parse(page).seen:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert str(attributes["src"]).startswith("data:image/jpeg;base64,") and attributes["width"] == "256"
        if "href" in attributes and tag != "a":
            assert str(attributes["href"]).startswith("#")
    rest = re.sub(r"https://arxiv|base64,[^\"]*", "", page)
    assert "@import" not in page and "url(h" not in page and "//" not in rest
    assert [path.name for path in (tmp_path / "run").glob(".*")] == []  # nothing half-written stays behind


def test_hostile_text_is_escaped(tmp_path: Path, without_matplotlib: None) -> None:
    values = results()
    values["comparisons"] = {HOSTILE: values["evaluation"] | {"reference": HOSTILE}}
    values["evaluation"]["judged"][HOSTILE] = values["evaluation"]["judged"]["simulated annotator"]
    run = write_run(tmp_path / "run", values)
    values["evaluation"]["samples"][0]["groups"].append(HOSTILE)
    values["settings"]["prompts"] = HOSTILE
    page = write_report(write_run(run, values)).read_text(encoding="utf-8")
    parsed = parse(page)
    assert not any(tag == "script" for tag, _ in parsed.seen) and "<script" not in page
    escaped = "a &quot;red&quot; &lt;script&gt;alert(1)&lt;/script&gt; &amp; &#x27;blue&#x27; star"
    # a prompt with two alternative texts and its group; two settings; in each table of all measures the judge, in the
    # other one the reference; the comparison's name
    assert page.count(escaped) == 4 + 2 + 2 + 1 + 1
    alts = [attributes["alt"] for tag, attributes in parsed.seen if tag == "img"]
    assert f"base: {HOSTILE}" in alts
    assert HOSTILE in shlex.split(command_of(page))


OTHERS = {"seed": 7, "lambda": 0.25, "temperature": 1.5, "soft": True, "lora": 4, "weighting": "threshold", "tau": 0.3,
          "model": "hub/a model", "clip": "hub/clip", "dtype": "bfloat16", "compile": True}  # fmt: skip


@pytest.mark.parametrize(
    "settings, named",
    [({}, {}), (OTHERS | {"steps": 2000, "guidance": 7.5}, OTHERS), ({"guidance": 2.0, "steps": 300}, {})],
)
def test_the_command_gives_the_settings_back(
    tmp_path: Path, without_matplotlib: None, settings: dict[str, Any], named: dict[str, Any]
) -> None:
    """Read by a shell and by the parser of the main job, it says what differs from the defaults, and no more."""
    values = results() | {"settings": settings}
    page = write_report(write_run(tmp_path / "run", values)).read_text(encoding="utf-8")
    words = shlex.split(command_of(page))
    assert words[:4] == ["python", "-m", "minialign.finetune", str(tmp_path / "run")]
    parser = argparse.ArgumentParser()
    add_flags(parser, "generate", "label", "reward", "finetune", "evaluate")
    assert given(parser.parse_args(words[4:])) == named
    assert ("--feedback FILE" in page) == ("model" in named)


def test_missing_parts_are_left_out(tmp_path: Path, without_matplotlib: None) -> None:
    """A run on one's own images: no categories, no distances, judged by the reward model."""
    values = results()
    entry = {"value": 0.43, "n": 64, "ci95": [0.4, 0.46]}
    tuned = {"value": 0.45, "n": 64, "ci95": [0.42, 0.48], "gain": 0.02, "gain_ci95": [-0.02, 0.05]}
    values["evaluation"] |= {
        "judge": "reward",
        "judged": {"reward": {"base": {"overall": entry}, "fine-tuned": {"overall": tuned}}},
        "reference": None,
        "best_of_n": {},
        **{key: dict.fromkeys(MODELS) for key in ("frechet", "cmmd", "readable")},
    }
    del values["evaluation"]["diversity"]
    one = {"accuracy": 0.7, "auc": float("nan"), "calibration": None}
    values["reward"] = {"held_out": {}, "measured": {"auxiliary": {"known prompts": one}}}
    run = write_run(tmp_path / "run", values)
    sample = values["evaluation"]["samples"][0]
    sample |= {"groups": [], "verdicts": {}}
    sample["images"]["fine-tuned"] = "compare/lost.png"
    page = page_of(write_run(run, values))
    parse(page)
    for absent in ("simulated", "Fréchet", "CMMD", "Diversity", "Readable", "AUC", "nan", "None", "combination"):
        assert absent not in page
    assert "Calibration" not in page and "new prompts</th>" not in page
    for present in ("0.430", "0.450", "not an independent test", "no significant difference", "70.0 %", "no image"):
        assert present in page
    assert "points" not in page  # of a score


def test_a_reward_model_without_the_auxiliary_loss_is_shown_too(tmp_path: Path, without_matplotlib: None) -> None:
    """Of --lambda 0."""
    values = results()
    del values["reward"]["measured"]["auxiliary"]
    page = page_of(write_run(tmp_path / "run", values))
    assert (
        "<td>AUC<small>chance that a good image scores above a bad one; 0.5 is guessing</small></td><td>0.923" in page
    )
    assert "<td>AUC, raw CLIP score<" in page and "AUC, squared error alone" not in page and "Calibration on" in page


def test_a_run_of_comparisons_alone_is_called_so(tmp_path: Path, without_matplotlib: None) -> None:
    values = results()
    values["counts"]["labels"] = 0
    values["reward"] |= {"labels": 0, "good_fraction": None, "comparisons": 1234, "held_out": {}, "measured": {}}
    page = page_of(write_run(tmp_path / "run", values))
    assert "<h1>A text-to-image model, fine-tuned on 1,234 comparisons</h1>" in page
    assert "A reward model learned from comparisons of images and scored 2,560 images" in page


def test_almost_nothing(tmp_path: Path, without_matplotlib: None) -> None:
    (tmp_path / "results.json").write_text("{}")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    parse(page)
    assert "Before and after" not in page and "Training" not in page and "2302.12192" in page
    assert "Use the model" not in page  # there is none


def test_how_many_labels_are_enough_is_shown_where_it_was_measured(tmp_path: Path, without_matplotlib: None) -> None:
    values = results()
    ends = [[0.71, 0.81], [0.78, 0.86], None]
    several = {"value": [0.76, 0.82, 0.85], "ci95": ends}
    curve = {"labels": [256, 512, 1024], "splits": 5, "held_out_prompts": 0.2} | dict.fromkeys(
        ("auc", "accuracy"), several
    )
    curve |= {"pairs": {"value": [None, 0.8, 0.9], "ci95": [None] * 3}, "gain": {"value": 0.03, "ci95": [0.01, 0.05]}}
    values["reward"]["curve"] = curve
    page = page_of(write_run(tmp_path / "run", values))
    parse(page)
    assert "mean of 5 random splits" in page and "from 512 to 1,024, changed the AUC by +0.030" in page
    rows = re.findall("<td>([^<]*)<", page[page.index("pairs ranked right") : page.index("<td>AUC<")])
    assert rows[:4] == ["256", "0.760", "76.0 %", "–"] and rows[8:12] == ["1,024", "0.850", "85.0 %", "90.0 %"]
    assert "How many labels" not in page_of(write_run(tmp_path / "other", results()))


def test_the_chart_of_labels_has_a_point_for_each_number() -> None:
    pytest.importorskip("matplotlib")
    curve = {"labels": [64, 128, 256], "auc": {"value": [None, 0.7, 0.8], "ci95": [None, [0.6, 0.8], None]}}
    chart = figures.svg("labels", partial(figures.by_labels, curve), (4, 3))
    assert ">128</text>" in chart and ">256</text>" in chart and ">64</text>" not in chart


@pytest.mark.parametrize("seconds, told", [(59.4, "59.4 s"), (59.7, "1 min 0 s"), (2999.7, "50 min 0 s")])
def test_no_minute_has_60_seconds(tmp_path: Path, without_matplotlib: None, seconds: float, told: str) -> None:
    assert f"{told} in all" in page_of(
        write_run(tmp_path / "run", results() | {"seconds": {"total": seconds, "label": 1}})
    )


def test_the_same_run_gives_the_same_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", results())
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_many_pairs_are_folded(tmp_path: Path, without_matplotlib: None) -> None:
    values = results()
    run = write_run(tmp_path / "run", values)
    values["evaluation"]["samples"] *= 8
    page = page_of(write_run(run, values))
    assert [tag for tag, _ in parse(page).seen].count("img") == 32 and page.count("<summary>2 more</summary>") == 2


def test_folded_parts_and_legends_are_printed(tmp_path: Path, without_matplotlib: None) -> None:
    """Legends are borders, which are printed without backgrounds; print is light, and opens what is folded."""
    page = write_report(write_run(tmp_path / "run", results())).read_text(encoding="utf-8")
    style = page[page.index("<style>") : page.index("</style>")]
    dark, light = style.index("prefers-color-scheme:dark"), style.index("@media print{:root{color-scheme:light")
    assert dark < light and "details::details-content{content-visibility:visible" in style
    assert (
        "background" not in re.findall(r"\.key[^{]*{[^}]*}", style)[1]
        and "border:" in re.findall(r"\.key:before{[^}]*}", style)[0]
    )


def test_a_fall_is_called_a_fall(tmp_path: Path, without_matplotlib: None) -> None:
    values = results()
    entry = values["evaluation"]["judged"]["simulated annotator"]["fine-tuned"]["overall"]
    entry |= {"value": 0.3, "gain": -0.181, "gain_ci95": [-0.24, -0.12]}
    page = page_of(write_run(tmp_path / "run", values))
    assert "<strong>−18.1 points</strong> (95 % interval −24.0 to −12.0: significant at 5 %)" in page


def test_few_images_and_a_single_prompt_are_called_so(tmp_path: Path, without_matplotlib: None) -> None:
    values = results()
    for model in MODELS:
        entry = values["evaluation"]["judged"]["simulated annotator"][model]["overall"]
        entry |= {"n": 4, "ci95": None} | ({"gain_ci95": None} if "gain" in entry else {})
    page = page_of(write_run(tmp_path / "run", values))
    assert "4 of each model judged" in page and "Only 4 images of each model were judged" in page
    assert "(95 % interval n/a: one prompt)" in page
    assert "Only" not in page_of(write_run(tmp_path / "more", results()))


def test_further_groups_stand_after_the_categories(tmp_path: Path, without_matplotlib: None) -> None:
    values = results()
    for groups in values["evaluation"]["judged"]["simulated annotator"].values():
        order = ["unseen", *reversed(GROUPS)]
        entries = {"unseen": groups["seen"]} | groups
        groups.clear()
        groups.update({name: entries[name] for name in order})
    page = page_of(write_run(tmp_path / "run", values))
    told = re.findall(r"<td>([\w ]+)<small>640 images", page)
    assert told == [
        "overall",
        "count",
        "color",
        "background",
        "combination",
        "unseen",
        "new objects",
        "new combinations",
        "seen",
    ]


def test_further_comparisons_have_a_column_for_every_model_and_gain(tmp_path: Path, without_matplotlib: None) -> None:
    values = results()
    third = {"overall": {"value": 0.5, "n": 640, "ci95": [0.4, 0.6], "gain": 0.019, "gain_ci95": [-0.01, 0.04]}}
    one = dict(values["evaluation"], models={"base": {}, "fine-tuned": {}, "runs/other/model": {}})
    one["judged"] = {"simulated annotator": {**one["judged"]["simulated annotator"], "runs/other/model": third}}
    values["comparisons"] = {"1a2b3c4d": one}
    page = page_of(write_run(tmp_path / "run", values))
    part = page[page.index("Further comparisons") : page.index("Where the time went")]
    assert "<h3>base and fine-tuned and runs/other/model <small>1a2b3c4d</small></h3>" in part
    heads = ["", "base", "fine-tuned", "over base", "runs/other/model", "over base"]
    assert re.findall("<th>(.*?)</th>", part) == heads
    rows = [re.findall("<td>(.*?)<small>(.*?)</small>", row) for row in re.findall("<tr>(<td>.*?)</tr>", part)]
    assert [len(row) for row in rows] == [6] * 7
    assert rows[0][4:] == [("50.0 %", "40.0 to 60.0"), ("+1.9", "−1.0 to +4.0<br>no significant difference")]
    assert [cell for cell, _ in rows[1]] == ["Fréchet distance", "3.410", "4.090", "+0.680", "–", "–"]


def test_sets_of_images_have_a_table(tmp_path: Path, without_matplotlib: None) -> None:
    values = results()
    assert "Sets of" not in page_of(write_run(tmp_path / "none", values))
    compared = {
        kind: {rater: {"fine-tuned": {"overall": {"won": won, "tied": 0.75 - won, "lost": 0.25, "n": 96}}}}
        for kind, rater, won in (("alignment", "nine noisy copies", 0.5), ("fidelity", "people & co", 0.125))
    }
    values["evaluation"]["sets"] = {"size": 4, "compared": compared}
    page = page_of(write_run(tmp_path / "sets", values))
    part = page[page.index("Sets of 4 images of a prompt") : page.index("The reward model</h2>")]
    assert "two thirds of the raters prefer the fine-tuned model’s set to the base model’s" in part
    assert re.findall("<th>(.*?)</th>", part) == ["", "won", "tied", "lost", "pairs of sets"]
    rows = [re.findall("<td>(.*?)<small>(.*?)</small>", row) for row in re.findall("<tr>(<td>.*?)</tr>", part)]
    ends = [f"{100 * a:.1f} to {100 * b:.1f}" for a, b in (wilson_interval(n, 96) for n in (48, 24, 12))]
    won, quarter, eighth = zip(("50.0 %", "25.0 %", "12.5 %"), ends)
    assert rows[0] == [("Alignment", "by nine noisy copies"), won, quarter, quarter, ("96", "")]
    assert rows[1][:2] == [("Fidelity", "by people &amp; co"), eighth] and rows[1][3] == quarter
    values["comparisons"] = {"1a2b3c4d": dict(values["evaluation"], models={"base": {}, "fine-tuned": {}, "c": {}})}
    page = page_of(write_run(tmp_path / "more", values))
    assert "<small>fine-tuned, by nine noisy copies</small>" in page[page.index("Further comparisons") :]


def test_a_calibration_chart_of_few_images_says_so() -> None:
    pytest.importorskip("matplotlib")
    few = [{"predicted": 0.2, "observed": 0.0, "count": 3}, {"predicted": 0.9, "observed": 1.0, "count": 4}]
    assert "too few images: 7" in figures.svg("few", partial(figures.reliability, few), (4, 4))
    few[0]["count"] = 6
    assert "too few" not in figures.svg("enough", partial(figures.reliability, few), (4, 4))


def test_hostile_text_is_escaped_in_charts() -> None:
    pytest.importorskip("matplotlib")
    name = "$^{ <b>&$"
    rows = [(name, [0.1, 0.2], [None, [0.1, 0.3]])]
    assert "$^{ &lt;b&gt;&amp;$" in figures.svg(HOSTILE, partial(figures.bars, rows, True), (3, 1))
    assert HOSTILE not in figures.svg(HOSTILE, partial(figures.bars, rows, True), (3, 1))


def test_the_running_mean_has_one_window() -> None:
    points = np.stack([np.arange(40) * 10, np.random.default_rng(0).normal(size=40)], 1)
    assert [figures.window(n) for n in (1, 9, 10, 25, 40, 1000)] == [1, 1, 5, 5, 8, 200]
    smooth = figures.running_mean(points, 8)
    assert smooth.shape == (33, 2)
    for i in range(33):
        assert smooth[i] == pytest.approx(points[i : i + 8].mean(0))


# ----------------------------------------------------------------------------------------- the band of normal runs
def seed_of(folder: Path, seed: int, **changed: Any) -> Path:
    """A run of a seed; all that changes in it does so a little differently from other seeds."""
    values = results()
    values["settings"] |= {"seed": seed} | changed
    evaluation = values["evaluation"]
    evaluation["diversity"]["fine-tuned"] -= seed / 1000
    evaluation["picture"] = {name: of_picture(0.4, 0.02 + seed / 1000) for name in ("saturation", "brightness")}
    for judge in ("simulated annotator", "reward"):
        evaluation["judged"][judge]["fine-tuned"]["overall"]["gain"] += seed / 1000
    return write_run(folder / f"seed {seed}", values)


@pytest.fixture
def band(tmp_path: Path, capsys: Any) -> list[Path]:
    """Three runs whose band is the package's."""
    runs = [seed_of(tmp_path, seed) for seed in (1, 2, 3)]
    code, out, err = command(normal.main, capsys, *runs, "--out", normal.FILE)
    assert code == 0 and "of 3 runs" in out, err
    return runs


def test_the_band_holds_what_the_seeds_logged(band: list[Path]) -> None:
    found = json.loads(normal.FILE.read_text())
    assert found["seeds"] == [1, 2, 3] and found["model_digest"] == "digest:shapes"
    assert found["settings"] == {"batch_size": 64, "beta": 0.1, "model": None, "steps": 300}
    assert found["changes"]["diversity"] == pytest.approx([-0.045, -0.046, -0.047])
    assert found["changes"]["saturation"] == pytest.approx([0.021, 0.022, 0.023])
    assert list(found["curves"]) == list(normal.CURVES) and set(found["changes"]) <= set(normal.CHANGES)
    rows = []
    for run in band:
        lines = (run / "metrics.jsonl").read_text().splitlines()[:-1]
        rows += [row for row in map(json.loads, lines) if row["stage"] == "finetune"]
    for i in range(5):  # of 400 steps
        logged = [row["gradient_norm"] for row in rows if 80 * i < row["step"] <= 80 * i + 80]
        ends = [found["curves"]["finetune gradient_norm"][end][i] for end in ("low", "high")]
        assert len(logged) == 24 and ends == pytest.approx([min(logged), max(logged)], rel=2e-3)
        assert ends[0] <= min(logged) and ends[1] >= max(logged)


def test_a_band_is_of_finished_runs_that_differ_in_their_seed_alone(tmp_path: Path, capsys: Any) -> None:
    one, two, other = seed_of(tmp_path, 1), seed_of(tmp_path, 2), seed_of(tmp_path, 4, steps=200)
    (tmp_path / "empty").mkdir()
    for runs, message in (
        ([one], "runs of seeds 1; accepted: two runs or more, each with its own"),
        ([one, two, one], "runs of seeds 1, 2, 1; accepted"),
        ([one, other], "seed 4: has another model or other settings than"),
        ([one, tmp_path / "empty"], "empty: no finished run; accepted: a folder of python -m minialign.finetune"),
    ):
        code, _, err = command(normal.main, capsys, *runs, "--out", tmp_path / "band.json")
        assert code == 2 and message in err and err.count("\n") == 1 and not (tmp_path / "band.json").exists()


def test_beside_changes_are_those_of_other_runs(tmp_path: Path, without_matplotlib: None, band: list[Path]) -> None:
    for run in (*band, seed_of(tmp_path, 4)):  # whose means are of 8 values, within the range of 24
        page = page_of(run)
        assert "This run lies inside all of them" in page
        outside = "Outside them: images judged good by the simulated annotator, mean reward, diversity, saturation"
        assert (outside in page) == (run not in band) == ("All lie between them." not in page)
        for cell in ("+28.2 to +28.4", "+0.272 to +0.274", "−0.047 to −0.045", "+0.021 to +0.023"):
            assert f"<td>{cell}<small>" in page
        assert "default runs</th>" in page
        assert "Warning" not in page and "default runs of the bundled model (seeds 1, 2, 3)" in page


def test_where_a_run_leaves_the_band_is_said(tmp_path: Path, without_matplotlib: None, band: list[Path]) -> None:
    run = seed_of(tmp_path, 4)
    lines = (run / "metrics.jsonl").read_text().splitlines()[:-1]
    with open(run / "metrics.jsonl", "a") as file:  # a step that is logged again counts as it is logged last
        for row in map(json.loads, lines):
            if row["stage"] == "finetune" and 160 < row["step"] <= 320:
                file.write("\n" + json.dumps(row | {"gradient_norm": 9.0}))
    values = json.loads((run / "results.json").read_text())
    values["evaluation"]["diversity"]["fine-tuned"] = 0.1
    (run / "results.json").write_text(json.dumps(values))
    page = page_of(run)
    assert "The mean of this run leaves them: Fine-tuning: gradient norm (above from step 160 to 320)." in page
    assert "diversity" in page[page.index("Outside them") :].partition(".")[0]


@pytest.mark.parametrize("model", [None, "someone/model"])
def test_images_that_change_twice_as_much_as_those_of_any_seed_are_warned_of(
    tmp_path: Path, without_matplotlib: None, band: list[Path], model: str | None
) -> None:
    """Of another model too, which is compared in nothing else."""
    run = seed_of(tmp_path, 4, model=model)
    values = json.loads((run / "results.json").read_text())
    values["evaluation"]["picture"].pop("brightness")
    for gain, half, warned in ((0.047, 0.2, True), (-0.047, 0.02, True), (0.045, 0.02, False), (-0.045, 0.02, False)):
        values["evaluation"]["picture"]["saturation"] = of_picture(0.4, gain, half)
        (run / "results.json").write_text(json.dumps(values))
        page = page_of(run)
        assert ("</strong>: the images changed more than twice as much as in any of 3 default runs" in page) == warned
        assert (f"saturation {gain:+.3f} (+0.021 to +0.023)".replace("-", "−") in page) == warned
        assert ("Look at the images" in page) == warned
    assert ("No bands of normal curves are drawn" in page) == bool(model) == ("This run has another model" in page)
    assert ("Beside this run’s changes" in page) == ("default runs</th>" in page) != bool(model)
    del values["evaluation"]["judged"]  # what nobody judged is compared too
    (run / "results.json").write_text(json.dumps(values))
    assert ("Outside them: diversity, saturation. With so few" in page_of(run)) != bool(model)


def test_other_settings_have_no_band(tmp_path: Path, without_matplotlib: None, band: list[Path]) -> None:
    page = page_of(seed_of(tmp_path, 4, steps=200, lora=8))
    assert "This run has other settings (--steps, --lora)" in page and "Beside this" not in page
    assert "inside" in page_of(seed_of(tmp_path, 5, lora=0, keep=9))  # a default that is named; what changes nothing


def test_the_band_is_drawn_behind_the_curve() -> None:
    pytest.importorskip("matplotlib")
    points = np.stack([np.arange(1, 21) * 10, np.linspace(0, 1, 20)], 1)
    band = {"steps": 200, "low": [0.0] * 10, "high": [1.0] * 10}
    charts = [figures.svg("a", partial(figures.curve, points, 5, one), (4, 2)) for one in (None, band)]
    assert [f"opacity: {figures.BAND}" in chart for chart in charts] == [False, True]
