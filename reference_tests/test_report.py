"""report.html from small made-up runs: what it says, what it leaves out, and that it stands alone."""

from __future__ import annotations

import json
import random
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minialign.report import write_report

HOSTILE = "a \"red\" <script>alert(1)</script> & 'blue' star"
VOID = {"meta", "img", "br", "path", "use", "line", "rect"}
KEYS = ("overall", "count", "color", "background", "combination", "seen", "unseen")


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


def results() -> dict[str, Any]:
    before = dict(zip(KEYS, (0.481, 0.532, 0.613, 0.584, 0.195, 0.496, 0.467)))
    after = dict(zip(KEYS, (0.762, 0.793, 0.884, 0.855, 0.516, 0.787, 0.738)))
    span = {
        side: {k: [v - 0.04, v + 0.04] for k, v in part.items()}
        for side, part in (("before", before), ("after", after))
    }
    span["gain"] = {k: [after[k] - before[k] - 0.05, after[k] - before[k] + 0.05] for k in KEYS}
    return {
        "alignment": {"before": before, "after": after, "ci95": span},
        "judge": "simulated annotator",
        "readable": {"before": 0.957, "after": 0.943},
        "fidelity": {"before": 3.41, "after": 4.09},
        "diversity": {"before": 0.312, "after": 0.268},
        "reward": {
            "accuracy": 0.867, "auc": 0.918, "clip_score_auc": 0.831, "labels": 1536, "held_out": 384,
            "good_fraction": 0.486, "calibration": [{"predicted": 0.1, "observed": 0.12, "count": 211},
                                                    {"predicted": 0.9, "observed": 0.88, "count": 173}],
        },
        "seconds": {"generate": 61.2, "label": 1.9, "reward": 14.8, "finetune": 112.3, "evaluate": 34, "total": 224.8},
        "settings": {"model": None, "seed": 3, "steps": 300, "beta": 0.1, "batch_size": 64, "note": HOSTILE},
        "counts": {"images": 3072, "labels": 1536, "evaluated": 480},
    }  # fmt: skip


def write_run(folder: Path, values: dict[str, Any], size: int = 64) -> Path:
    """A run folder with `values` as its results, two samples and short training curves."""
    rng = random.Random(0)
    (folder / "samples").mkdir(parents=True)
    samples = []
    for i, (prompt, category, split) in enumerate([(HOSTILE, "color", "unseen"), ("two stars", "count", "seen")]):
        sample: dict[str, Any] = {"prompt": prompt, "category": category, "split": split, "seed": i}
        for side, verdict in (("before", "bad"), ("after", ("good", "skip")[i])):
            sample[side] = {"image": f"samples/{side}-{i:03d}.png", "verdict": verdict}
            color = tuple(rng.randrange(256) for _ in range(3))
            Image.new("RGB", (size, size), color).save(folder / sample[side]["image"])
        samples.append(sample)
    lines = [{"stage": "reward", "step": i, "loss": 1.0, "mse": rng.random(), "classification": 1.2} for i in range(40)]
    lines += [{"stage": "finetune", "step": i, "loss": rng.random(), "model_loss": 0.2} for i in range(40)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"stage": "finet')
    (folder / "samples.json").write_text(json.dumps({"samples": samples}))
    (folder / "results.json").write_text(json.dumps(values))
    (folder / "config.json").write_text(json.dumps({"settings": values["settings"], "versions": {"torch": "2.99.1"}}))
    return folder


def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*(name for name in sys.modules if name.split(".")[0] == "matplotlib"), "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("charts", [True, False])
def test_says_every_headline_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, charts: bool) -> None:
    if charts:
        pytest.importorskip("matplotlib")
    else:
        without_matplotlib(monkeypatch)
    path = write_report(write_run(tmp_path / "run", results()))
    assert path == tmp_path / "run" / "report.html"
    page = path.read_text(encoding="utf-8")
    parsed = parse(page)
    values = results()["alignment"]
    numbers = [f"{100 * values[side][key]:.1f}%" for side in ("before", "after") for key in KEYS]
    numbers += ["+28.1", "+23.1 to +33.1", "3 min 45 s", "1 min 52 s", "1.9 s", "2.99.1"]
    numbers += [
        "3.41",
        "4.09",
        "0.312",
        "0.268",
        "95.7%",
        "94.3%",
        "0.918",
        "0.831",
        "86.7%",
        "48.6%",
        "1,536",
        "3,072",
    ]
    numbers += ["480", "384", "211", "173"]
    assert [number for number in numbers if number not in page] == []
    for words in ("simulated annotator", "lower is better", "unseen prompt", "✓ good", "✗ bad", "– skip"):
        assert words in page
    command = f"python -m minialign.finetune --out {tmp_path / 'run'} --seed 3 --steps 300 --beta 0.1 --batch-size 64<"
    assert command in page.replace("</span> ", " ").replace("<span>", "")
    assert [tag for tag, _ in parsed.seen].count("svg") == (6 if charts else 0)
    assert ("brings them" in page) != charts
    assert [tag for tag, _ in parsed.seen].count("img") == 4


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
    assert (
        "@import" not in page and "url(h" not in page and "//" not in re.sub(r"https://arxiv|base64,[^\"]*", "", page)
    )
    assert [path.name for path in (tmp_path / "run").glob(".*")] == []  # nothing half-written stays behind


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run", results())).read_text(encoding="utf-8")
    assert "<script" not in page
    escaped = "a &quot;red&quot; &lt;script&gt;alert(1)&lt;/script&gt; &amp; &#x27;blue&#x27; star"
    assert page.count(escaped) == 4  # its prompt, two alternative texts, and the setting
    alts = [attributes["alt"] for tag, attributes in parse(page).seen if tag == "img"]
    assert f"before: {HOSTILE}" in alts


def test_missing_parts_are_left_out(tmp_path: Path) -> None:
    """A run on one's own images: no categories, no fidelity, judged by the reward model."""
    values = results()
    values |= {
        "judge": "reward model",
        "fidelity": {"before": None, "after": None},
        "diversity": None,
        "readable": None,
    }
    for part in (values["alignment"]["before"], values["alignment"]["after"]):
        for key in KEYS[1:]:
            del part[key]
    values["alignment"]["ci95"]["gain"] = {"overall": [-0.02, 0.05]}
    values["reward"] = {"accuracy": 0.7, "auc": float("nan"), "clip_score_auc": None, "calibration": None}
    run = write_run(tmp_path / "run", values)
    samples = json.loads((run / "samples.json").read_text())
    samples["samples"][0] |= {"category": None, "split": None, "after": {"image": "samples/lost.png", "verdict": None}}
    (run / "samples.json").write_text(json.dumps(samples))
    page = write_report(run).read_text(encoding="utf-8")
    parse(page)
    for absent in ("simulated", "Fréchet", "Diversity", "Readable", "AUC", "nan", "None", "combination", "Calibration"):
        assert absent not in page
    for present in ("reward model", "no independent test", "no change is certain", "70.0%", "no image"):
        assert present in page


def test_almost_nothing(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    parse(page)
    assert "Before and after" not in page and "Training" not in page and "2302.12192" in page


def test_the_same_run_gives_the_same_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", results())
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_many_pairs_are_folded(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", results())
    samples = json.loads((run / "samples.json").read_text())["samples"]
    (run / "samples.json").write_text(json.dumps({"samples": samples * 8}))
    page = write_report(run).read_text(encoding="utf-8")
    assert [tag for tag, _ in parse(page).seen].count("img") == 32 and page.count("<summary>2 more</summary>") == 2


def test_a_fall_is_called_a_fall(tmp_path: Path) -> None:
    values = results()
    values["alignment"]["after"]["overall"] = 0.3
    values["alignment"]["ci95"]["gain"]["overall"] = [-0.24, -0.12]
    page = write_report(write_run(tmp_path / "run", values)).read_text(encoding="utf-8")
    assert "−18.1 points" in page and "alignment fell" in page
