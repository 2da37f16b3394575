"""What saved benchmarks say.

    python bench/report.py NEW.json             writes the measured part of docs/benchmarks.md
    python bench/report.py OLD.json NEW.json    prints what changed, and what of it is beyond the noise within a run

The files are made by `pytest bench/ --benchmark-json=NEW.json`. Each machine, device and dtype has a section of its
own, which takes the place of its older one; --more adds what other runs on the same machine measured. What is written
by hand stays: the tables stand between two marks, and the picture in docs/scaling.png.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from minialign.pages import figures

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- measured: python bench/report.py -->", "<!-- end of what was measured -->"
TITLE, PICTURE = "## Measured on ", "\n\n![scaling](scaling.png)"
COUNTS = {
    "flops": "FLOPs",
    "moved": "bytes moved",
    "operations": "operations",
    "peak": "peak bytes",
    "copies": "copies",
}
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16")
Works = dict[str, dict[str, Any]]


# -------------------------------------------------------------------------------------------------- reading saved runs
def load(path: Path) -> dict[str, Any]:
    """What pytest-benchmark saved; one line where it did not."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(saved["benchmarks"], list) and saved["machine_info"]["device"]
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        sys.exit(f"{path}: is not a file of `pytest bench/ --benchmark-json=FILE`")
    if saved["machine_info"]["device"] == "meta":
        sys.exit(f"{path}: was made with --device meta, which computes nothing")
    return saved


def works(entries: Iterable[dict[str, Any]]) -> Works:
    """By name what was measured beside a peer, of both entries of a pair together.

    Each has "ratios", of the peer's time to ours, one a pair; "ours" and "theirs", the median seconds; and what
    `pairs.compare` kept.
    """
    measured: Works = {}
    for info in (entry["extra_info"] for entry in entries if entry["extra_info"].get("pairs")):
        work = measured.setdefault(info["work"], {"pairs": []})
        pairs = work["pairs"] + info["pairs"]
        work |= info | {"pairs": pairs, "ratios": [info["times"] * b / a for a, b in pairs]}
        work["ours"], work["theirs"] = (statistics.median(side) for side in zip(*pairs))
    return measured


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the median by order statistics, whatever the distribution (David & Nagaraja 2003, sec. 7.1).

    Of fewer than six values it is their range, which covers the median less often: in 94 % of cases of five.
    """
    ordered, n = sorted(values), len(values)
    below = [sum(math.comb(n, i) for i in range(k + 1)) / 2**n for k in range(n // 2)]  # P(at most k of n are below)
    k = max(sum(p <= 0.025 for p in below) - 1, 0)
    return ordered[k], ordered[n - 1 - k]


def machine(info: dict[str, Any]) -> str:
    """All that makes times comparable: processor with its instruction sets, threads, device and dtype.

    A brand such as "AMD EPYC" is not enough: it names processors of several generations.
    """
    cpu = info["cpu"]
    known = [f"{key} {cpu[key]}" for key in ("family", "model", "stepping") if key in cpu]
    known += [flag for flag in INSTRUCTIONS if flag in cpu.get("flags", [])]
    name = f"{cpu.get('count')} cores of {cpu.get('brand_raw', info.get('machine'))}"
    name += f" ({', '.join(known)})" if known else ""
    name = f"{info['gpu']} beside {name}" if "gpu" in info else name
    return f"{name}, torch threads: {info['threads']}, {info['device']}, {info['dtype']}"


# --------------------------------------------------------------------------------------------------------- what changed
def changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Counts that differ, ratios and times with their intervals, and which are beyond the noise within a run."""
    before, after = works(old["benchmarks"]), works(new["benchmarks"])
    lines = []
    if (a := old["machine_info"]["versions"]) != (b := new["machine_info"]["versions"]):
        lines.append(f"versions: {a} -> {b}")
    one_machine = machine(old["machine_info"]) == machine(new["machine_info"])
    if not one_machine:
        lines.append(f"not one machine: {machine(old['machine_info'])} -> {machine(new['machine_info'])}")
    both = [work for work in before if work in after]
    lines += ["", "counts:", *_changed_counts(both, before, after, *(run["machine_info"] for run in (old, new)))]
    lines += ["", "ratios peer / minialign, medians with 95 % intervals; beyond the noise within a run if apart:"]
    lines += [_changed(work, before[work]["ratios"], after[work]["ratios"], "{:.2f}".format, 1) for work in both]
    lines += _only_in_one(before, after)
    lines += ["", "times of what has no peer, absolute and of one machine, medians with 95 % intervals of the rounds:"]
    lines += _changed_times(*(_without_peer(run) for run in (old, new))) if one_machine else ["  not one machine"]
    return "\n".join(lines).lstrip("\n")


def _only_in_one(old: Iterable[str], new: Iterable[str]) -> list[str]:
    return [f"  only in the {name}: {work}" for name, a, b in (("old", old, new), ("new", new, old))
            for work in a if work not in b]  # fmt: skip


def _without_peer(run: dict[str, Any]) -> dict[str, list[float]]:
    """The seconds of each round, by entry; none where the run was saved without them (--benchmark-autosave)."""
    entries = (entry for entry in run["benchmarks"] if not entry["extra_info"].get("pairs"))
    return {entry["fullname"]: entry["stats"].get("data", []) for entry in entries}


def _changed_times(old: dict[str, list[float]], new: dict[str, list[float]]) -> list[str]:
    lines = []
    for name in (name for name in old if name in new):
        if min(len(old[name]), len(new[name])) < 2:
            lines.append(f"  {name}: not compared, fewer than two rounds are saved")
        else:
            lines.append(_changed(name, old[name], new[name], _seconds, -1))
    return lines + _only_in_one(old, new)


def _changed_counts(
    both: Sequence[str], before: Works, after: Works, old: dict[str, Any], new: dict[str, Any]
) -> list[str]:
    """Those of minialign and of the peer, where the same operations are to be expected of the same code."""
    lines, equal = [], 0
    for side, packages in (("minialign", ("torch",)), ("peer", ("torch", "diffusers", "transformers"))):
        reasons = [f"{key} {a} -> {b}" for key in ("device", "dtype") if (a := old[key]) != (b := new[key])]
        versions = ((name, old["versions"].get(name), new["versions"].get(name)) for name in packages)
        reasons += [f"{name} {a} -> {b}" for name, a, b in versions if a != b]
        if reasons:
            lines.append(f"  those of {side} are not compared: {', '.join(reasons)}")
            continue
        for work in both:
            if "counts" in before[work] and "counts" in after[work]:
                a, b = (run[work]["counts"][side] for run in (before, after))
                changed = [key for key in COUNTS if a[key] != b[key]]
                equal += len(COUNTS) - len(changed)
                for key in changed:
                    more = f" ({b[key] / a[key] - 1:+.2%})" if a[key] else ""
                    lines.append(f"  {work}, {side}: {COUNTS[key]} {a[key]:,} -> {b[key]:,}{more}")
    return [*lines, f"  {equal} counts are equal"]


def _changed(work: str, old: Sequence[float], new: Sequence[float], shown: Callable[[float], str], sign: int) -> str:
    """The medians, as `shown` writes them; sign is 1 where larger is faster, -1 where it is slower."""
    (low, high), (new_low, new_high) = median_interval(old), median_interval(new)
    before = f"{shown(statistics.median(old))} [{shown(low)}, {shown(high)}]"
    after = f"{shown(statistics.median(new))} [{shown(new_low)}, {shown(new_high)}]"
    change = sign * ((new_low > high) - (new_high < low))
    verdict = "within the noise"
    if change:
        verdict = f"{'faster' if change > 0 else 'SLOWER'}, beyond the noise within a run"
    return f"  {work}: {before} -> {after}: {verdict}"


# ------------------------------------------------------------------------------------------------------------ the page
def section(runs: Sequence[dict[str, Any]]) -> str:
    """The section of a machine from runs that measured different things; of what several measured the last counts."""
    info, entries = runs[-1]["machine_info"], {entry["fullname"]: entry for run in runs for entry in run["benchmarks"]}
    measured, others = works(entries.values()), [entry["extra_info"] for entry in entries.values()]
    parts = [f"{TITLE}{machine(info)}", _details(info, runs[-1].get("datetime", "")[:10])]
    parts += [_ratios(measured), _memory(measured), _limits(measured), _alone(entries.values()), _notes(others)]
    sweeps = [other for other in others if "sweep" in other]
    if sweeps:
        _plot(sweeps, DOCS / "scaling.png")
        parts.append(_slopes(sweeps))
    return "\n\n".join(part for part in parts if part)


def write(text: str) -> None:
    """Put a section of a machine into the page, in the place of an older one of the same title."""
    path = DOCS / "benchmarks.md"
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    measured, after = rest.split(END)
    sections = [part.strip() for part in re.split(f"^(?={TITLE})", measured, flags=re.M) if part.strip()]
    titles = [part.splitlines()[0] for part in sections]
    title = text.splitlines()[0]
    if PICTURE in text:  # which shows this machine from now on
        sections = [part.replace(PICTURE, "") for part in sections]
    place = titles.index(title) if title in titles else len(titles)
    sections[place : place + 1] = [text]
    path.write_text(
        f"{before}{BEGIN}\n\n{chr(10).join(f'{part}{chr(10)}' for part in sections)}\n{END}{after}", "utf-8"
    )


def _details(info: dict[str, Any], date: str) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in info["versions"].items())
    return f"{date}: Python {info['python_version']}, {versions}."


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def against_goal(value: float, goal: float | None, most: bool = False) -> str:
    """A goal and whether a value meets it, where there is one."""
    if goal is None:
        return ""
    return f"{goal} {'met' if (value <= goal if most else value >= goal) else 'missed'}"


def _ratios(measured: Works) -> str:
    rows = []
    for name, work in measured.items():
        low, ratio, high = statistics.quantiles(work["ratios"], n=4)
        shown = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
        ends = "–".join(f"{value:.2f}" for value in (low, high))
        times = [_seconds(work["ours"]), _seconds(work["theirs"])]
        rows.append([name, shown, ends, str(len(work["ratios"])), against_goal(ratio, work["goal"]), *times])
    header = ["work", "peer / minialign", "quartiles", "pairs", "goal", "minialign", "peer"]
    return "### Time beside a peer\n\n" + _table(header, rows) if rows else ""


def _memory(measured: Works) -> str:
    rows = []
    for name, work in measured.items():
        if "counts" in work:
            mine, peer = (work["counts"][side]["peak"] for side in ("minialign", "peer"))
            goal = against_goal(mine / peer, work["memory_goal"], most=True)
            rows.append([name, f"{mine / peer:.2f}", goal, f"{mine / 2**20:.0f} MiB", f"{peer / 2**20:.0f} MiB"])
    header = ["work", "minialign / peer", "goal", "minialign", "peer"]
    return "### Peak memory\n\n" + _table(header, rows) if rows else ""


def _limits(measured: Works) -> str:
    """What the device's rates would need for the counted work, as a fraction of what was needed."""
    rows = []
    for name, work in measured.items():
        if "counts" in work:
            sides = [(work["counts"][side], work[key]) for side, key in (("minialign", "ours"), ("peer", "theirs"))]
            limit = work["limits"]
            fractions = [counts["flops"] / limit["flops"] / seconds for counts, seconds in sides]
            fractions += [counts["moved"] / limit["bytes"] / seconds for counts, seconds in sides]
            operations = [f"{counts['operations']:,}" for counts, _ in sides]
            rows.append([name, *(f"{fraction:.0%}" for fraction in fractions), *operations])
    header = ["work", "matmul rate: minialign", "peer", "copy rate: minialign", "peer", "operations: minialign", "peer"]
    return "### Fraction of the device's limits\n\n" + _table(header, rows) if rows else ""


def _alone(entries: Iterable[dict[str, Any]]) -> str:
    """What has no peer, and no note that tells its numbers."""
    rows = []
    for entry in entries:
        stats, info = entry["stats"], entry["extra_info"]
        if not info.get("pairs") and not info.keys() & {"sweep", "note"} and stats["rounds"] > 1:
            name = f"{entry['group']}: {entry['param']}" if entry.get("group") else entry["name"]
            quartiles = f"{_seconds(stats['q1'])}–{_seconds(stats['q3'])}"
            rows.append([name, _seconds(stats["median"]), quartiles, str(stats["rounds"])])
    header = ["work", "median", "quartiles", "rounds"]
    return "### Time of what has no peer\n\n" + _table(header, rows) if rows else ""


def _notes(measured: Iterable[dict[str, Any]]) -> str:
    return "\n".join(f"- {info['work']}: {info['note']}." for info in measured if "note" in info)


def _slope(x: list[float], y: list[float]) -> float:
    """Of the line of least squares through the logarithms: 1 is proportional growth."""
    return statistics.linear_regression([math.log(value) for value in x], [math.log(value) for value in y]).slope


def _slopes(sweeps: list[dict[str, Any]]) -> str:
    rows = []
    for s in sweeps:
        for name, y in s["lines"].items():
            ends = [f"{_seconds(value)} at {x:,}" for x, value in ((s["x"][0], y[0]), (s["x"][-1], y[-1]))]
            rows.append([s["sweep"], name, f"{_slope(s['x'], y):.2f}", *ends])
    text = "\n\nThe slope is that of the logarithms: 1 is proportional growth, 0 none."
    return "### How cost grows\n\n" + _table(["what grows", "", "slope", "from", "to"], rows) + text + PICTURE


def _plot(sweeps: list[dict[str, Any]], path: Path) -> None:
    """A panel for each sweep in the style of the other figures: lines on logarithmic axes, named at their ends."""
    from matplotlib import ticker

    figure, panels = figures.panels(len(sweeps), 1 if len(sweeps) == 1 else 2, 2.9)
    for axes, s in zip(panels, sweeps):
        lines = list(zip(s["lines"].items(), figures.COLORS, "os^Dv"))
        for (_, y), color, marker in lines:
            axes.plot(s["x"], y, marker=marker, markersize=4.5, linewidth=1.2, color=color)
        axes.margins(y=0.1)  # below the title, for the names of the lines
        axes.set(xscale="log", yscale="log", xlabel=s["unit"], ylabel="time")
        axes.set_title(s["sweep"].replace(" by ", "\nby "), fontsize=10, loc="left")
        axes.set_xticks(s["x"], [f"{x:,}" for x in s["x"]])
        decades = max(map(max, s["lines"].values())) / min(map(min, s["lines"].values())) > 30
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1,) if decades else (1, 2, 3, 5), numticks=10))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: _seconds(value)))
        axes.minorticks_off()
        figures.name_ends(axes, [(s["x"][-1], y[-1], name, color) for (name, y), color, _ in lines])
    figures.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("new", nargs="+", type=Path, metavar="FILE", help="one to write the page, two to compare")
    parser.add_argument("--more", nargs="+", type=Path, default=[], metavar="FILE", help="with one FILE: other runs")
    given = parser.parse_args(arguments)
    if len(given.new) > 2 or (given.more and len(given.new) == 2):
        parser.error("accepted: one file, with --more or without, or two files")
    runs = [load(path) for path in (*given.more, *given.new)]
    if len(given.new) == 2:
        print(changes(*runs))
        return
    for path, run in zip(given.more, runs):
        if machine(run["machine_info"]) != machine(runs[-1]["machine_info"]):
            sys.exit(f"{path}: measured on another machine than {given.new[0]}")
    write(section(runs))


if __name__ == "__main__":
    main()
