"""The measured part of docs/benchmarks.md from saved runs: python bench/report.py bench.json [more.json ...]

Made by `pytest bench/ --benchmark-json=bench.json`. Where a benchmark is in several files the last one counts. What is
written by hand stays; the tables go between the two marks, the picture to docs/scaling.png.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from minialign.pages import figures

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- measured: python bench/report.py -->", "<!-- end of what was measured -->"


def main(paths: list[Path]) -> None:
    found: dict[str, dict[str, Any]] = {}
    machine: dict[str, Any] = {}
    for path in paths:
        saved = json.loads(path.read_text(encoding="utf-8"))
        here = saved["machine_info"]
        if machine and _machine(here) != _machine(machine):
            sys.exit(f"{path}: measured on another machine, or with other versions, than the file before")
        machine = here
        found |= {entry["fullname"]: entry["extra_info"] for entry in saved["benchmarks"]}
    sweeps = [info for info in found.values() if "sweep" in info]
    pairs = [info for info in found.values() if "ratio" in info]
    parts = [_machine(machine), _ratios(pairs), _memory(pairs), _rates(pairs), _notes(list(found.values()))]
    if sweeps:
        _plot(sweeps, DOCS / "scaling.png")
        parts.append(_slopes(sweeps))
    path = DOCS / "benchmarks.md"
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    body = "\n\n".join(part for part in parts if part)
    path.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def _machine(machine: dict[str, Any]) -> str:
    cpu = machine.get("cpu", {})
    versions = [f"{name} {number}" for name, number in machine["versions"].items()]
    flags = set(cpu.get("flags", []))
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return (
        f"Machine: {cpu.get('count')} cores of {cpu.get('brand_raw', machine.get('machine'))} ({', '.join(known)}), "
        f"{machine['threads']} torch threads; Python {machine['python_version']}, {', '.join(versions)}."
    )


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _goal(value: float, goal: float | None, most: bool = False) -> str:
    if goal is None:
        return ""
    return f"{goal} {'met' if (value <= goal if most else value >= goal) else 'missed'}"


def _ratios(pairs: list[dict[str, Any]]) -> str:
    rows = []
    for p in pairs:
        spread = "–".join(f"{value:.2f}" for value in p.get("quartiles", []))
        ratio = f"{p['ratio']:.2f}" if p["ratio"] < 10 else f"{p['ratio']:.0f}"
        times = [_seconds(p["ours"]), _seconds(p["theirs"])]
        rows.append([p["work"], ratio, spread, _goal(p["ratio"], p["goal"]), *times])
    header = ["work", "peer / minialign", "quartiles", "goal", "minialign", "peer"]
    return "### Time\n\n" + _table(header, rows) if rows else ""


def _memory(pairs: list[dict[str, Any]]) -> str:
    rows = [
        [
            p["work"],
            f"{p['memory_ratio']:.2f}",
            _goal(p["memory_ratio"], p["memory_goal"], most=True),
            f"{p['memory'] / 2**20:.0f} MiB",
            f"{p['memory_theirs'] / 2**20:.0f} MiB",
        ]
        for p in pairs
        if "memory_ratio" in p
    ]
    header = ["work", "minialign / peer", "goal", "minialign", "peer"]
    return "### Peak memory\n\n" + _table(header, rows) if rows else ""


def _rates(pairs: list[dict[str, Any]]) -> str:
    rows = [[p["work"], *(f"{rate:.0%}" for rate in p["of_matmul_rate"])] for p in pairs if "of_matmul_rate" in p]
    return "### Part of the matmul rate\n\n" + _table(["work", "minialign", "peer"], rows) if rows else ""


def _notes(found: list[dict[str, Any]]) -> str:
    return "\n".join(f"- {info['work']}: {info['note']}." for info in found if "note" in info)


def _slope(x: list[float], y: list[float]) -> float:
    """Of the line of least squares through the logarithms: 1 is proportional growth."""
    a, b = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    return sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b)) / sum((p - mean_a) ** 2 for p in a)


def _slopes(sweeps: list[dict[str, Any]]) -> str:
    rows = []
    for s in sweeps:
        for name, y in s["lines"].items():
            ends = [f"{_seconds(value)} at {x:,}" for x, value in ((s["x"][0], y[0]), (s["x"][-1], y[-1]))]
            rows.append([s["sweep"], name, f"{_slope(s['x'], y):.2f}", *ends])
    text = "The slope is that of the logarithms: 1 is proportional growth, 0 none.\n\n![scaling](scaling.png)"
    return "### How cost grows\n\n" + _table(["what grows", "", "slope", "from", "to"], rows) + "\n\n" + text


def _plot(sweeps: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import ticker

    figure, panels = figures.panels(len(sweeps), 1 if len(sweeps) == 1 else 2, 2.9)
    for axes, s in zip(panels, sweeps):
        lines = list(zip(s["lines"].items(), figures.COLORS, "os^Dv"))
        for (_, y), color, marker in lines:
            axes.plot(s["x"], y, marker=marker, markersize=4.5, linewidth=1.2, color=color)
        axes.set(xscale="log", yscale="log", xlabel=s["unit"], ylabel="seconds")
        axes.set_title(s["sweep"], fontsize=10, loc="left")
        axes.set_xticks(s["x"], [f"{x:,}" for x in s["x"]])
        decades = max(map(max, s["lines"].values())) / min(map(min, s["lines"].values())) > 30
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1,) if decades else (1, 2, 3, 5), numticks=10))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
        figures.name_ends(axes, [(s["x"][-1], y[-1], name, color) for (name, y), color, _ in lines])
    figures.save(figure, path)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main([Path(argument) for argument in sys.argv[1:]])
