"""What the benchmarks measure with, against numbers counted by hand, and what is made of them and of a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from made_up import HOSTILE, results, sample_pairs, write_run
from PIL import Image

sys.path.append(str(Path(__file__).parent.parent / "bench"))
import before_after
import report
from pairs import compare_memory, operations, peak_memory


def test_peak_memory():
    x = torch.zeros(1000)  # 4,000 bytes that were there before

    def call():
        y = x + 1
        y.mul_(2)  # in place
        z = torch.cat([y, y])  # 12,000 with y
        del y
        return z.view(2, 1000)[0] + 1  # 8,000 + 4,000

    assert peak_memory(call) == 12_000
    assert peak_memory(lambda: x.add_(1)) == 0
    w = torch.zeros(1000, requires_grad=True)
    w.grad = torch.zeros(1000)
    # the graph keeps exp's result; the backward pass adds a cosine and their product; two scalars
    assert peak_memory(lambda: w.exp().sin().sum().backward()) == 12_008
    found = {}
    compare_memory(found, lambda: x + 1, call, goal=0.5)
    assert found["memory_ratio"] == pytest.approx(1 / 3)


def test_operations():
    a, b = torch.randn(4, 5, requires_grad=True), torch.randn(5, 6)
    assert operations(lambda: a @ b) == 2 * 4 * 5 * 6
    q = torch.randn(2, 3, 16, 8, requires_grad=True)
    forward = 2 * 2 * 2 * 3 * 16 * 16 * 8  # two products
    assert operations(lambda: F.scaled_dot_product_attention(q, q, q)) == forward
    with_backward = operations(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    assert with_backward == forward + forward * 5 // 2


def test_report(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pair = {"work": "this", "goal": 2, "ratio": 2.5, "quartiles": [2.4, 2.6], "ours": 0.01, "theirs": 0.025}
    pair |= {"memory": 2**20, "memory_theirs": 2**21, "memory_ratio": 0.5, "memory_goal": 0.4}
    sweep = {"sweep": "that", "unit": "images", "x": [1, 10], "lines": {"minialign": [0.1, 1.0]}}
    entries = [{"fullname": str(i), "extra_info": info} for i, info in enumerate((pair, sweep))]
    saved = {
        "machine_info": {"python_version": "3", "versions": {"torch": "2"}, "threads": 2, "cpu": {}},
        "benchmarks": entries,
    }
    (tmp_path / "a.json").write_text(json.dumps(saved))
    (tmp_path / "benchmarks.md").write_text(f"by hand\n{report.BEGIN}\nold\n{report.END}\nmore\n")
    monkeypatch.setattr(report, "DOCS", tmp_path)
    for _ in range(2):  # a second time takes the first one's place
        report.main([tmp_path / "a.json"])
        text = (tmp_path / "benchmarks.md").read_text()
        assert text.startswith("by hand\n") and text.endswith("\nmore\n") and "old" not in text
        assert text.count("| this | 2.50 | 2.40–2.60 | 2 met | 10 ms | 25 ms |") == 1
        assert text.count("| this | 0.50 | 0.4 missed | 1 MiB | 2 MiB |") == 1
        assert text.count("| that | minialign | 1.00 | 100 ms at 1 | 1 s at 10 |") == 1
    assert (tmp_path / "scaling.png").stat().st_size > 1000


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
