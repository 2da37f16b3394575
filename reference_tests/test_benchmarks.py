"""How pairs are timed, and what is made of what the benchmarks measure, and of a run."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from made_up import HOSTILE, results, sample_pairs, write_run
from PIL import Image

sys.path.append(str(Path(__file__).parent.parent / "bench"))
import before_after
import pairs
import report

BENCH = Path(__file__).parent.parent / "bench"


def entry(name, **more):
    return {"fullname": name, "name": name, "group": None, "extra_info": {}, "stats": {"rounds": 1}} | more


def pair(seconds, work="this"):
    """The two entries of a pair, each with as many rounds: (ours, theirs) in seconds."""
    info = {"work": work, "goal": 2, "times": 1.0, "pairs": seconds}
    ours = {"flops": 600, "moved": 4000, "operations": 7, "peak": 2**20, "copies": 0}
    theirs = ours | {"flops": 1200, "moved": 8000, "operations": 9, "peak": 2**21}
    counted = {"counts": {"minialign": ours, "peer": theirs}, "memory_goal": 0.4}
    counted["limits"] = {"flops": 120_000, "bytes": 4_000_000}
    return [entry(f"{work}[minialign]", extra_info=info | counted), entry(f"{work}[peer]", extra_info=dict(info))]


def write_saved(path, entries, **more):
    info = {"python_version": "3", "versions": {"torch": "2"}, "threads": 2, "device": "cpu", "dtype": "float32"}
    info |= {"cpu": {"count": 2, "brand_raw": "a CPU"}} | more
    path.write_text(json.dumps({"machine_info": info, "datetime": "2026-01-02T03", "benchmarks": entries}))


def test_the_lines_of_the_picture_are_named_and_times_have_units(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(report.figures, "save", lambda figure, path: drawn.append(figure))
    lines = {"minialign": [0.0001, 1.0], "diffusers": [0.0002, 2.0]}
    report._plot([{"sweep": "a step by images", "unit": "images", "x": [1, 10], "lines": lines}], tmp_path / "x.png")
    (axes,) = drawn[0].axes
    drawn[0].canvas.draw()
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert {"0.1 ms", "1 ms", "100 ms", "1 s"} <= set(shown) and axes.get_legend() is None
    assert {text.get_text(): text.get_color() for text in axes.texts} == dict(zip(lines, report.figures.COLORS))
    assert axes.get_title(loc="left") == "a step\nby images"


def test_report_makes_the_page(tmp_path, monkeypatch):
    """A section a machine: a second run on one takes the first one's place, another machine's stays."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "DOCS", tmp_path)
    page = tmp_path / "benchmarks.md"
    page.write_text(
        f"by hand\n{report.BEGIN}\n\n{report.TITLE}a GPU, bfloat16\n\nkept{report.PICTURE}\n\n{report.END}\nmore\n"
    )
    sweep = {"sweep": "that", "unit": "images", "x": [1, 10], "lines": {"minialign": [0.1, 1.0]}}
    alone = {"group": "import", "param": "torch", "stats": {"rounds": 5, "median": 2.0, "q1": 1.9, "q3": 2.1}}
    note = entry("noted", extra_info={"work": "a job", "note": "took long"})
    write_saved(tmp_path / "old.json", [entry("swept", extra_info=sweep), entry("x", **alone), note])
    for seconds in (0.02, 0.025):
        write_saved(tmp_path / "new.json", pair([(0.01, seconds)] * 5))
        report.main([str(tmp_path / "new.json"), "--more", str(tmp_path / "old.json")])
    text = page.read_text()
    assert (
        text.startswith("by hand\n") and text.endswith("\nmore\n") and "## Measured on a GPU, bfloat16\n\nkept" in text
    )
    assert text.count("## Measured on 2 cores of a CPU, torch threads: 2, cpu, float32\n") == 1
    assert text.count(report.PICTURE) == 1
    for row in (
        "| this | 2.50 | 2.50–2.50 | 10 | 2 met | 10 ms | 25 ms |",
        "| this | 0.50 | 0.4 missed | 1 MiB | 2 MiB |",
        "| this | 50% | 40% | 10% | 8% | 7 | 9 |",
        "| import: torch | 2 s | 1.9 s–2.1 s | 5 |",
        "| that | minialign | 1.00 | 100 ms at 1 | 1 s at 10 |",
        "- a job: took long.",
    ):
        assert text.count(row) == 1, row
    assert (tmp_path / "scaling.png").stat().st_size > 1000


def test_report_says_what_changed(tmp_path, capsys):
    """Counts exactly; a ratio where the intervals of the medians are apart."""
    steady = [(1.0, 2.0 + 0.01 * i) for i in range(5)]
    faster, noisy = [(a, 1.2 * b) for a, b in steady], [(1.0, b) for b in (1.5, 1.8, 2.1, 2.4, 2.7)]
    for name, scale, third, flops in (("old", steady, steady, 600), ("new", faster, noisy, 700)):
        entries = [*pair(steady, "same"), *pair(scale, "scaled"), *pair(third, "noisy"), *pair(steady, f"only {name}")]
        entries[2]["extra_info"]["counts"]["minialign"]["flops"] = flops
        entries[2]["extra_info"]["counts"]["peer"]["copies"] = 3 * (name == "new")
        write_saved(tmp_path / f"{name}.json", entries)
    report.main([str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    there = capsys.readouterr().out
    expected = "  scaled, minialign: FLOPs 600 -> 700 (+16.67%)\n  scaled, peer: copies 0 -> 3\n  28 counts are equal\n"
    assert expected in there
    assert "  same: 2.02 [2.00, 2.04] -> 2.02 [2.00, 2.04]: within the noise\n" in there
    assert "  scaled: 2.02 [2.00, 2.04] -> 2.42 [2.40, 2.45]: faster, beyond the noise within a run\n" in there
    assert "  noisy: 2.02 [2.00, 2.04] -> 2.10 [1.50, 2.70]: within the noise\n" in there
    assert "only in the old: only old\n" in there and "only in the new: only new\n" in there
    report.main([str(tmp_path / "new.json"), str(tmp_path / "old.json")])
    assert "-> 2.02 [2.00, 2.04]: SLOWER, beyond the noise within a run\n" in capsys.readouterr().out


def test_report_says_which_absolute_times_changed(tmp_path, capsys):
    """Of entries without a peer, by name and on one machine alone; one round says nothing."""

    def save(name, *scales, only):
        data = {f"entry {i}": [scale * (1 + 0.01 * k) for k in range(5)] for i, scale in enumerate(scales)}
        data |= {"a job": [scales[0]], "never saved": None, only: [1.0] * 5}
        stats = {key: {"rounds": 5} | ({"data": value} if value else {}) for key, value in data.items()}
        write_saved(tmp_path / f"{name}.json", [entry(key, stats=value) for key, value in stats.items()])

    save("old", 1, 0.1, 2, only="gone")
    save("new", 1, 0.2, 1.5, only="added")
    report.main([str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    told = capsys.readouterr().out.split("times of what has no peer, absolute and of one machine")[1].splitlines()[1:]
    assert told == [
        "  entry 0: 1.02 s [1 s, 1.04 s] -> 1.02 s [1 s, 1.04 s]: within the noise",
        "  entry 1: 102 ms [100 ms, 104 ms] -> 204 ms [200 ms, 208 ms]: SLOWER, beyond the noise within a run",
        "  entry 2: 2.04 s [2 s, 2.08 s] -> 1.53 s [1.5 s, 1.56 s]: faster, beyond the noise within a run",
        "  a job: not compared, fewer than two rounds are saved",
        "  never saved: not compared, fewer than two rounds are saved",
        "  only in the old: gone",
        "  only in the new: added",
    ]
    write_saved(tmp_path / "new.json", json.loads((tmp_path / "new.json").read_text())["benchmarks"], threads=1)
    report.main([str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    assert capsys.readouterr().out.endswith("of the rounds:\n  not one machine\n")


@pytest.mark.parametrize(
    ("more", "minialign", "peer"),
    [
        ({"dtype": "bfloat16"}, "dtype float32 -> bfloat16", "dtype float32 -> bfloat16"),
        ({"device": "cuda"}, "device cpu -> cuda", "device cpu -> cuda"),
        ({"versions": {"torch": "3"}}, "torch 2 -> 3", "torch 2 -> 3"),
        ({"versions": {"torch": "2", "diffusers": "1"}}, None, "diffusers None -> 1"),
    ],
)
def test_counts_of_another_arithmetic_are_not_compared(tmp_path, capsys, more, minialign, peer):
    entries = pair([(1.0, 2.0)] * 5)
    write_saved(tmp_path / "old.json", entries)
    entries[0]["extra_info"]["counts"]["minialign"]["flops"] = 700
    write_saved(tmp_path / "new.json", entries, **more)
    report.main([str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    said = capsys.readouterr().out
    for side, reason in (("minialign", minialign), ("peer", peer)):
        assert (f"  those of {side} are not compared: {reason}\n" in said) == (reason is not None)
    assert ("FLOPs" in said) == (minialign is None)


@pytest.mark.parametrize("content", [None, "no JSON", "[]", '{"benchmarks": []}'])
def test_report_names_a_file_that_is_none(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=r"a\.json: is not a file of `pytest bench/ --benchmark-json=FILE`$"):
        report.main([str(path)])


def test_what_computes_nothing_is_not_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "DOCS", tmp_path)
    write_saved(tmp_path / "a.json", [], device="meta")
    with pytest.raises(SystemExit, match=r"a\.json: was made with --device meta, which computes nothing$"):
        report.main([str(tmp_path / "a.json")])


def test_processors_of_one_brand_are_two_machines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "DOCS", tmp_path)
    cpu = {"count": 2, "brand_raw": "a CPU", "family": 6, "model": 143, "stepping": 8, "flags": ["avx512f", "sse"]}
    others = [{"cpu": cpu | {key: 1}} for key in ("count", "family", "model", "stepping")]
    others += [{"cpu": cpu | {"flags": ["avx512f", "amx_bf16"]}}, {"threads": 1}, {"device": "cuda", "gpu": "a GPU"}]
    write_saved(tmp_path / "old.json", pair([(1.0, 2.0)] * 5), cpu=cpu)
    for more in others:
        write_saved(tmp_path / "new.json", pair([(1.0, 2.0)] * 5), **{"cpu": cpu} | more)
        report.main([str(tmp_path / "old.json"), str(tmp_path / "new.json")])
        told = "not one machine: 2 cores of a CPU (family 6, model 143, stepping 8, avx512f), "
        assert told in capsys.readouterr().out
        with pytest.raises(SystemExit, match="old.json: measured on another machine than"):
            report.main([str(tmp_path / "new.json"), "--more", str(tmp_path / "old.json")])


def test_the_interval_of_a_median_covers_it():
    """In 95 % of samples of ten at least, and of five in 94 %, of a skewed distribution with median log 2."""
    g = torch.Generator().manual_seed(0)
    for number, least in ((5, 0.9375), (10, 0.95), (41, 0.95)):
        samples = -torch.rand(1000, number, generator=g).log()
        ends = torch.tensor([report.median_interval(sample) for sample in samples.tolist()])
        covered = ((ends[:, 0] < math.log(2)) & (ends[:, 1] > math.log(2))).float().mean().item()
        assert least - 0.02 < covered < least + 0.04
    assert report.median_interval(range(10)) == (1, 8)


class Benchmark:
    """What `pairs.compare` uses of pytest-benchmark's fixture."""

    def __init__(self):
        self.extra_info, self.stats = {}, None

    def pedantic(self, call, setup, rounds):
        data = []
        for _ in range(rounds):
            setup()
            call()
            data.append(float(len(data)))
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=data))


@pytest.mark.parametrize("side", ["minialign", "peer"])
def test_a_pair_is_timed_in_turn(side):
    told, ticks, x = [], iter(range(0, 1000, 10)), torch.zeros(8)
    ours, theirs = (lambda: told.append("ours") or x + 1), (lambda: told.append("theirs") or x + 2 - 1)
    benchmark = Benchmark()
    found = pairs.compare(benchmark, side, lambda: next(ticks), dict, "work", ours, theirs, rounds=5, goal=2)
    turn = ["theirs", "ours"] if side == "minialign" else ["ours", "theirs"]
    assert told == ["ours", "theirs", *turn * 5, *(["ours", "theirs"] if side == "minialign" else [])]
    assert found is benchmark.extra_info and benchmark.group == "work"
    assert found["pairs"] == [[i, 10] if side == "minialign" else [10, i] for i in range(5)]
    if side == "minialign":
        assert [found["counts"][name]["operations"] for name in ("minialign", "peer")] == [1, 2]


def test_what_is_not_the_same_work_is_not_compared():
    with pytest.raises(AssertionError):
        pairs.compare(Benchmark(), "peer", float, dict, "work", lambda: torch.zeros(2), lambda: torch.ones(2))


def test_the_clock_of_a_gpu_waits_for_it(monkeypatch):
    """On a stand-in for CUDA's events: each is recorded, waited for, and the time since the last one is added."""
    log, times = [], iter([5.0, 7.5, 7.75])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = next(times)
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, later):
            return 1000 * (later.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = pairs.clock_of(torch.device("cuda"))
    assert [clock(), clock(), clock()] == [0.0, 2.5, 2.75] and log == ["record", "wait"] * 3
    assert pairs.clock_of(torch.device("cpu")) is time.perf_counter


@pytest.mark.parametrize("device", ["mps", "xpu", "no device"])
def test_a_device_whose_clock_is_not_known_is_refused(device):
    spec = importlib.util.spec_from_file_location("conftest_of_bench", BENCH / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    with pytest.raises(pytest.UsageError, match=f"^--device {device}: accepted: cpu, cuda, cuda:N, meta$"):
        conftest.pytest_configure(SimpleNamespace(getoption=lambda name: device))


def test_the_main_job_alone_has_a_single_round():
    """All other entries have at least five, which are needed to tell a change from noise."""
    rounds = []
    for path in sorted(BENCH.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "pedantic":
                given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords
                         if keyword.arg == "rounds"}  # fmt: skip
                rounds.append((path.name, given.get("rounds", 1)))
    assert len(rounds) >= 10
    assert [entry for entry in rounds if entry[1] < 5] == [("test_jobs.py", 1)]


@pytest.mark.slow
def test_the_benchmarks_run_on_any_device():
    """On the meta device, which has no content but refuses tensors of two devices; what needs content is skipped."""
    pytest.importorskip("diffusers")
    command = [sys.executable, "-m", "pytest", "bench/", "--device", "meta", "--benchmark-disable", "-q"]
    command += ["-m", "slow or not slow"]
    done = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=BENCH.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(re.match(r"(\d+) passed", done.stdout.splitlines()[-1])[1]) >= 22, done.stdout


@pytest.mark.slow
def test_saved_runs_are_kept_and_compared(tmp_path):
    """pytest-benchmark's own commands, on the cheapest file."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(BENCH / "test_tricks.py"),
        "-q",
        "-k",
        "norm",
        "-p",
        "no:cacheprovider",
    ]
    command.append(f"--benchmark-storage={tmp_path}")

    def run(*more):
        return subprocess.run([*command, *more], cwd=BENCH.parent, capture_output=True, text=True)

    first = run("--benchmark-autosave")
    assert first.returncode == 0 and "test_norm_silu_conv[peer]" in first.stdout
    (path,) = tmp_path.rglob("*.json")
    saved = json.loads(path.read_text())
    assert [entry["stats"]["rounds"] for entry in saved["benchmarks"]] == [15, 15]
    assert {entry["group"] for entry in saved["benchmarks"]} == {work := saved["benchmarks"][0]["extra_info"]["work"]}
    assert len(report.works(saved["benchmarks"])[work]["ratios"]) == 30
    for entry in saved["benchmarks"]:
        entry["stats"]["median"] /= 100  # so that this run is slower
    path.write_text(json.dumps(saved))
    second = run("--benchmark-compare", "--benchmark-compare-fail=median:10%")
    assert second.returncode != 0 and "Performance has regressed" in second.stdout + second.stderr


def test_before_after_has_every_kind_without_feedback_where_columns_are_few():
    categories, sides = ("count", "color", "background", "combination"), ("seen", "new combinations", "new objects")
    samples = [{"groups": [one, side], "seed": k} for side in sides for one in categories for k in range(2)]
    chosen = before_after.first_samples(samples)
    assert all(sample["seed"] == 0 for sample in chosen) and len(chosen) == 8
    assert [tuple(sample["groups"]) for sample in chosen] == [
        *((one, "seen") for one in categories), ("count", "new combinations"), ("background", "new combinations"),
        ("color", "new objects"), ("combination", "new objects"),
    ]  # fmt: skip


def test_before_after_shows_the_first_sample_of_each_kind_of_prompt(tmp_path):
    """Nothing is chosen: images stand in columns by kind of prompt, the base model's above, verdicts below them."""
    values = results()
    kinds = [["count", "seen"], ["count", "new objects"], ["color", "seen"]]
    pairs = [(f"prompt {i} {HOSTILE}", kinds[i % 3]) for i in range(30)]
    samples = values["evaluation"]["samples"] = sample_pairs(tmp_path / "run", pairs)
    samples[1]["verdicts"]["base"] = None  # nobody said
    run = write_run(tmp_path / "run", values)
    chosen = before_after.first_samples(samples)
    assert [int(sample["seed"]) for sample in chosen] == [0, 3, 6, 1, 4, 7, 2, 5]
    before_after.main(run, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        sheet = image.convert("RGB")
    assert sheet.width == 1600
    tile, verdicts = (1600 - before_after.MARGIN) // 8, []
    for i, sample in enumerate(chosen):
        x = before_after.MARGIN + i * tile + tile // 2
        column = [sheet.getpixel((x, y)) for y in range(sheet.height)]
        for model in ("base", "fine-tuned"):
            color = Image.open(run / sample["images"][model]).getpixel((0, 0))
            assert column.count(color) == tile - before_after.GAP
            below = sheet.height - column[::-1].index(color)
            colors = sheet.crop((x - tile // 2, below, x + tile // 2, min(below + 40, sheet.height))).getcolors(10_000)
            verdicts.append({f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b) in colors} & set(before_after.COLORS.values()))
    told = [sample["verdicts"][model] for sample in chosen for model in ("base", "fine-tuned")]
    assert verdicts == [{before_after.COLORS[verdict]} if verdict else set() for verdict in told]
