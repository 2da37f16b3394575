"""report.html from small made-up runs: what it says, what it leaves out, and that it stands alone."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from functools import partial
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up import GROUPS, HOSTILE, MODELS, results, write_run

from minialign.engine.settings import add_flags, given
from minialign.pages import figures
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


def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*(name for name in sys.modules if name.split(".")[0] == "matplotlib"), "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables in place of charts, which take most of the time."""
    monkeypatch.setattr(figures, "svg", lambda *what: "")


@pytest.mark.parametrize("charts", [True, False])
def test_says_every_headline_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, charts: bool) -> None:
    if charts:
        pytest.importorskip("matplotlib")
    else:
        without_matplotlib(monkeypatch)
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


def test_hostile_text_is_escaped(tmp_path: Path, tables: None) -> None:
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
    assert HOSTILE in shlex.split(unescape(re.findall("<pre>(python.*?)</pre>", page, re.DOTALL)[0]))


OTHERS = {"seed": 7, "lambda": 0.25, "temperature": 1.5, "soft": True, "lora": 4, "weighting": "threshold", "tau": 0.3,
          "model": "hub/a model", "clip": "hub/clip", "dtype": "bfloat16", "compile": True}  # fmt: skip


@pytest.mark.parametrize(
    "settings, named",
    [({}, {}), (OTHERS | {"steps": 2000, "guidance": 7.5}, OTHERS), ({"guidance": 3.0, "steps": 400}, {})],
)
def test_the_command_gives_the_settings_back(
    tmp_path: Path, tables: None, settings: dict[str, Any], named: dict[str, Any]
) -> None:
    """Read by a shell and by the parser of the main job, it says what differs from the defaults, and no more."""
    values = results() | {"settings": settings}
    page = write_report(write_run(tmp_path / "run", values)).read_text(encoding="utf-8")
    command = unescape(re.findall("<pre>(python.*?)</pre>", page, re.DOTALL)[0])
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "minialign.finetune", str(tmp_path / "run")]
    parser = argparse.ArgumentParser()
    add_flags(parser, "generate", "label", "reward", "finetune", "evaluate")
    assert given(parser.parse_args(words[4:])) == named
    assert ("--feedback FILE" in page) == ("model" in named)


def test_missing_parts_are_left_out(tmp_path: Path, tables: None) -> None:
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


def test_almost_nothing(tmp_path: Path, tables: None) -> None:
    (tmp_path / "results.json").write_text("{}")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    parse(page)
    assert "Before and after" not in page and "Training" not in page and "2302.12192" in page
    assert "Use the model" not in page  # there is none


def test_the_same_run_gives_the_same_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", results())
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_many_pairs_are_folded(tmp_path: Path, tables: None) -> None:
    values = results()
    run = write_run(tmp_path / "run", values)
    values["evaluation"]["samples"] *= 8
    page = page_of(write_run(run, values))
    assert [tag for tag, _ in parse(page).seen].count("img") == 32 and page.count("<summary>2 more</summary>") == 2


def test_folded_parts_and_legends_are_printed(tmp_path: Path, tables: None) -> None:
    """Legends are borders, which are printed without backgrounds; print is light, and opens what is folded."""
    page = write_report(write_run(tmp_path / "run", results())).read_text(encoding="utf-8")
    style = page[page.index("<style>") : page.index("</style>")]
    dark, light = style.index("prefers-color-scheme:dark"), style.index("@media print{:root{color-scheme:light")
    assert dark < light and "details::details-content{content-visibility:visible" in style
    assert (
        "background" not in re.findall(r"\.key[^{]*{[^}]*}", style)[1]
        and "border:" in re.findall(r"\.key:before{[^}]*}", style)[0]
    )


def test_a_fall_is_called_a_fall(tmp_path: Path, tables: None) -> None:
    values = results()
    entry = values["evaluation"]["judged"]["simulated annotator"]["fine-tuned"]["overall"]
    entry |= {"value": 0.3, "gain": -0.181, "gain_ci95": [-0.24, -0.12]}
    page = page_of(write_run(tmp_path / "run", values))
    assert "<strong>−18.1 points</strong> (95 % interval −24.0 to −12.0: significant at 5 %)" in page


def test_few_images_and_a_single_prompt_are_called_so(tmp_path: Path, tables: None) -> None:
    values = results()
    for model in MODELS:
        entry = values["evaluation"]["judged"]["simulated annotator"][model]["overall"]
        entry |= {"n": 4, "ci95": None} | ({"gain_ci95": None} if "gain" in entry else {})
    page = page_of(write_run(tmp_path / "run", values))
    assert "4 of each model judged" in page and "Only 4 images of each model were judged" in page
    assert "(95 % interval n/a: one prompt)" in page
    assert "Only" not in page_of(write_run(tmp_path / "more", results()))


def test_further_groups_stand_after_the_categories(tmp_path: Path, tables: None) -> None:
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


def test_further_comparisons_have_a_column_for_every_model_and_gain(tmp_path: Path, tables: None) -> None:
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
    assert [len(row) for row in rows] == [6] * 5
    assert rows[0][4:] == [("50.0 %", "40.0 to 60.0"), ("+1.9", "−1.0 to +4.0<br>no significant difference")]
    assert [cell for cell, _ in rows[1]] == ["Fréchet distance", "3.410", "4.090", "+0.680", "–", "–"]


def test_calibration_has_bins_with_enough_images() -> None:
    """Neighbours are put together, and their means are those of all their images; bins of equal mass stay."""
    bins = [{"predicted": p, "observed": o, "count": n} for p, o, n in ((0.1, 0.0, 4), (0.3, 0.5, 12), (0.9, 1.0, 3))]
    mean = {"predicted": (0.4 + 3.6 + 2.7) / 19, "observed": 9 / 19, "count": 19}
    assert figures.enough(bins) == [pytest.approx(mean)]
    bins[2]["count"] = 184
    assert figures.enough(bins) == [
        pytest.approx({"predicted": 0.25, "observed": 0.375, "count": 16}), pytest.approx(bins[2])
    ]  # fmt: skip
    equal = [{"predicted": i / 10, "observed": i / 10, "count": 19 + i % 2} for i in range(10)]
    assert figures.enough(equal) == [pytest.approx(one) for one in equal]
    assert figures.enough([]) == [] and figures.enough(equal[:1]) == [pytest.approx(equal[0])]


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
