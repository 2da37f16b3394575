"""What the study asks: which cells are compared, and the page of tables and figures that answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..engine.run import Run
from ..evaluate import test_items
from ..files import read_json
from ..finetune import WEIGHTINGS
from ..pages.study_page import (
    Question,
    Results,
    Row,
    block,
    categories_block,
    plot,
    plot_categories,
    plot_strips,
    plot_trade_off,
    write_page,
)
from .cells import (
    BEST_OF,
    BEST_OF_TUNED,
    BETAS,
    CELLS,
    DEFAULTS,
    LAMBDAS,
    LONGER,
    SIZES,
    TEMPERATURES,
    cell_settings,
    looked_at,
)
from .filling import STRIP

SEEDS = [21, 22, 23]  # no setting was chosen on these
BASE = Row("no fine-tuning", "base", apart=True)


def questions(size: str) -> dict[str, Question]:
    """All but the first, which the main jobs answer."""
    return {
        "beta": of_beta(),
        "reward": of_reward(),
        "feedback": of_feedback(),
        "noise": of_noise(),
        "neighbours": of_neighbours(),
        "overoptimisation": of_steps(size),
    }


def changed(key: str, value: float) -> str:
    """The cell with a value of a setting."""
    return "default" if value == DEFAULTS[key] else f"{key}-{value:g}"


def of_beta() -> Question:
    betas = sorted([DEFAULTS["beta"], *BETAS])
    return Question(
        "The weight of the pre-training term",
        [BASE, *(Row(f"beta {beta:g}", changed("beta", beta), x=beta) for beta in betas)],
        1 + betas.index(DEFAULTS["beta"]),
        ("fidelity", "diversity"),
        axis="beta, the weight of the pre-training term",
    )


def of_reward() -> Question:
    rows = [BASE, Row("CLIP score as it is", "clip-raw"), Row("CLIP score, fitted to the labels", "clip-fitted")]
    for weight in LAMBDAS:
        rows.append(Row(f"lambda {weight:g}" + " (squared error alone)" * (weight == 0), changed("lambda", weight)))
    return Question(
        "The reward",
        [*rows, *(Row(f"T {t:g}", f"temperature-{t:g}") for t in TEMPERATURES)],
        len(rows) - len(LAMBDAS) + LAMBDAS.index(DEFAULTS["lambda"]),
        ("held_out auc", "unseen auc", "aligned", "fidelity"),
        rewards=True,
    )


def of_feedback() -> Question:
    rows = [BASE]
    for alone, series in enumerate(("all images scored by the reward", "labelled images alone")):
        for n in (5, 10, 25, 50, 100):
            name = "default" if n == 100 and not alone else f"labels-{n}" + "-alone" * alone
            rows.append(Row(f"{n} % of the labels" + ", these images alone" * alone, name, x=n, series=series))
    return Question(
        "How much feedback",
        rows,
        [row.cell for row in rows].index("default"),
        ("aligned", "fidelity", "held_out auc"),
        axis="labels, % of the main job's",
        rewards=True,
    )


def of_noise() -> Question:
    flipped = [(n, f"flipped-{n}" if n else "default") for n in (0, 10, 20, 30)]
    return Question(
        "Wrong labels",
        [
            BASE,
            *(Row(f"{n} % flipped", name, x=n, series="one labeller") for n, name in flipped),
            Row("30 % flipped, majority of three", "flipped-30-majority", x=30, series="majority of three"),
        ],
        1,
        ("aligned", "fidelity", "held_out auc"),
        axis="labels flipped, %",
        rewards=True,
    )


def of_neighbours() -> Question:
    return Question(
        "Reward-weighted likelihood and its neighbours",
        [
            BASE,
            Row("weight r (the method)", "default"),
            Row("1: all images alike", "plain"),
            Row("1 - r (a control: must hurt)", "inverted", apart=True),
            Row(f"good ones alone: 1 where r > {WEIGHTINGS['threshold'].tau:g}", "threshold"),
            Row(f"exponential: exp((r - 1) / {WEIGHTINGS['exponential'].tau:g})", "exponential"),
            *(Row(f"best of {n} by r, nothing fine-tuned", "best-of", str(n), apart=True) for n in BEST_OF),
            Row(f"best of {BEST_OF_TUNED} by r, fine-tuned by r", "best-of-tuned", str(BEST_OF_TUNED)),
            Row(f"r, {LONGER} times the steps", "longer"),
        ],
        1,
        ("aligned", "fidelity", "diversity"),
    )


def of_steps(size: str) -> Question:
    looks = looked_at(size)
    return Question(
        "Ten times the steps",
        [Row(f"{n:,} steps", "long", str(n), x=n, apart=n == 0) for n in looks],
        looks.index(looks[-1] // 10),
        ("aligned", "mean_reward", "gap", "fidelity", "diversity"),
        axis="fine-tuning steps",
        metrics=("aligned", "mean_reward", "gap", "readable", "fidelity", "cmmd", "asked", "diversity"),
    )


# ------------------------------------------------------------------------------------------------------------ the page
def page(folder: Path, path: Path, seeds: Sequence[int], size: str) -> None:
    """Write what all cells and main jobs found to the page `path` and its figures."""
    found = {
        (name, seed): read_json(folder / name / f"seed-{seed}" / "result.json") for name in CELLS for seed in seeds
    }
    jobs = [read_json(folder / f"seed-{seed}" / "results.json") for seed in seeds]
    asked = questions(size)
    blocks = {"setting": ("How it was measured", setting(folder, found, jobs, seeds, size))}
    blocks["categories"] = ("Before and after, by category", categories_block(jobs))
    blocks |= {name: (question.title, block(name, question, found, seeds)) for name, question in asked.items()}
    blocks["strips"] = ("The same prompts and noise along the long run", "![The long run](study-strips.png)")
    test = test_items(Run(folder / f"seed-{seeds[0]}"), cell_settings(seeds[0], size))
    strips = {f"{n:,} steps": folder / "long" / f"seed-{seeds[0]}" / f"step-{n}.png" for n in looked_at(size)}
    figures = {name: partial(plot, question=question, found=found, seeds=seeds) for name, question in asked.items()}
    figures["beta"] = partial(plot_trade_off, question=asked["beta"], found=found, seeds=seeds)
    figures["categories"] = partial(plot_categories, jobs=jobs)
    prompts = [item.prompt for item in test[:: len(test) // STRIP][:STRIP]]
    figures["strips"] = partial(plot_strips, strips=strips, prompts=prompts)
    write_page(path, blocks, figures)


def setting(folder: Path, found: Results, jobs: Sequence[dict[str, Any]], seeds: Sequence[int], size: str) -> str:
    """The command, and what it did, in Markdown."""
    cell, long, config = SIZES[size]["cell"], SIZES[size]["long"], read_json(folder / "config.json")
    flags = " --quick" * (size == "quick") + f" --seeds {' '.join(map(str, seeds))}" * (list(seeds) != SEEDS)
    main_jobs, cells = sum(job["seconds"]["total"] for job in jobs), sum(one["seconds"] for one in found.values())
    return (
        f"    python -m minialign.study{flags}\n\n"
        f"{len(seeds)} seeds ({', '.join(map(str, seeds))}), {len(found)} cells, with torch "
        f"{config['versions']['torch']}: {main_jobs / 60:.0f} minutes on {config['threads']} cores for the main jobs, "
        f"and {cells / 60:.0f} minutes of one core for the cells. A main job for each seed, as `python -m "
        "minialign.finetune --seed N` runs it, then each cell from its images, labels and reward: "
        f"{cell['steps']} steps of {cell['batch_size']} images, judged on {cell['test_images']} images of the test; "
        f"and the long run {long['steps']:,} steps of {long['batch_size']} at a constant learning rate, of which a "
        f"moving average of the weights is judged (decay {long['ema']}). Fréchet distance and CMMD are of "
        f"{SIZES[size]['distances']} readable images of the test and as many drawings of what these show, the distance "
        f"to what was asked of all {cell['test_images']} and as many drawings of their prompts."
    )
