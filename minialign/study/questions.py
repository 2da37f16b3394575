"""What the study asks: the paper's findings, which cells are compared, and the page that answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..evaluate.sets import NOISY, RATERS, WRONG
from ..feedback import SIMULATED
from ..files import read_json
from ..finetune import WEIGHTINGS
from ..pages.study_page import (
    Finding,
    Match,
    Question,
    Results,
    Row,
    block,
    categories_block,
    findings_block,
    plot,
    plot_categories,
    plot_sets,
    plot_trade_off,
    sets_block,
    write_page,
)
from .cells import BETAS, CELLS, DEFAULTS, POOL, SET, SIZES, cell_calls, job_calls

SEEDS = [31, 32, 33, 34, 35, 36]  # no setting was chosen on these, and nothing was reported of them before
BASE = Row("no fine-tuning", "base", apart=True)
IMAGES = ("aligned", "aligned, *", "readable", "fidelity", "diversity", "reward")
REWARD = ("pairs, *", "auc, *", "ece, *")
BEST = f"best {SET} of {POOL}"
MATCHES = (
    Match("fine-tuned against the base model", "tuned against random", "50 to 3 %", "10 to 15 %"),
    Match(f"{BEST} by r against {SET} at random, base model", f"{BEST} against random", "46 % won", "no cost"),
    Match(f"fine-tuned against the base model's {BEST}", f"tuned against {BEST}", "20 to 10 %", "3 to 20 %"),
)
RATED = {NOISY: f"{NOISY}, each wrong on {WRONG:.0%} of the images", SIMULATED: "the annotator alone"}


# ------------------------------------------------------------------------------------------------- the paper's findings
def findings(groups: Sequence[str]) -> list[Finding]:
    """What Lee et al. 2023 found, as differences of two numbers of the study; `groups` of prompts, seen ones first."""
    asked = []
    for group in groups:
        pairs = f"pairs, {group}"
        asked += [
            Finding("Fig. 3a", f"r predicts the preferred image of a pair better than CLIP; prompts: {group}",
                    ("default", pairs), ("clip", pairs), 1),
            Finding("Fig. 3a", f"the auxiliary loss helps; prompts: {group}",
                    ("temperature-2", pairs), ("lambda-0", pairs), 1),  # the paper's T
            Finding("Fig. 3b", f"training on half of the images of each prompt is worse; prompts: {group}",
                    ("labels-50", pairs), ("default", pairs), -1),
        ]  # fmt: skip

    def of_sets(source: str, claim: str, match: str, kind: str, expected: int) -> Finding:
        won, lost = (("sets", f"{match}; {kind}; {NOISY}; {outcome}") for outcome in ("won", "lost"))
        return Finding(source, claim, won, lost, expected)

    tuned, best, tuned_or_best = (match.key for match in MATCHES)
    asked += [
        of_sets("Fig. 4", "alignment of sets of four: 50 % won, 3 % lost", tuned, "alignment", 1),
        of_sets("Fig. 4", "fidelity of sets of four: 10 % won, 15 % lost", tuned, "fidelity", -1),
        of_table_3("FID 26.59 on labelled images alone, 13.97 before", "labelled", "base", "fidelity", 1),
        of_table_3("FID 21.02 with scored images, 26.59 without", "scored", "labelled", "fidelity", -1),
        of_table_3("FID 16.76 with pre-training pairs, 21.02 without", "pairs-half", "scored", "fidelity", -1),
        of_table_3("FID 16.76 with all three, 13.97 before", "pairs-half", "base", "fidelity", 1),
        of_table_3("reward 0.69 on labelled images alone, 0.43 before", "labelled", "base", "reward, seen", 1),
        of_table_3("reward 0.79 with scored images, 0.69 without", "scored", "labelled", "reward, seen", 1),
        of_table_3(
            "pre-training pairs cost no reward: 0.79 with, 0.79 without", "pairs-half", "scored", "reward, seen", 0
        ),
        of_sets("Fig. 6", f"{BEST} by r, alignment: 46 % won", best, "alignment", 1),
        of_sets("Fig. 6", f"{BEST} by r costs no fidelity", best, "fidelity", 0),
        of_sets("Fig. 6", f"fine-tuned against {BEST}, alignment: 20 % won, 10 % lost", tuned_or_best, "alignment", 1),
        of_sets("Fig. 6", f"fine-tuned against {BEST}, fidelity: 3 % won, 20 % lost", tuned_or_best, "fidelity", -1),
    ]
    return asked


def of_table_3(claim: str, cell: str, other: str, metric: str, expected: int) -> Finding:
    return Finding("Table 3", claim, (cell, metric), (other, metric), expected)


# ------------------------------------------------------------------------------------------------------- the questions
def questions() -> dict[str, Question]:
    """All but those of the main jobs and of sets; the paper's come first."""
    beta, lengths, percents = DEFAULTS["beta"], {"steps-quarter": 0.25, "default": 1, "steps-4": 4}, (10, 50, 100)
    noisy = [Row(f"beta {b:g}", "default" if b == beta else f"beta-{b:g}", b, "noisy") for b in (beta, *BETAS)]
    clean = [Row(f"beta {b:g}, clean captions", f"clean-{b:g}", b, "clean") for b in BETAS]
    tau = {name: weighting.tau for name, weighting in WEIGHTINGS.items()}
    return {
        "reward": Question(
            "The reward model",
            [Row("CLIP score", "clip", apart=True), Row("without the auxiliary loss (lambda 0)", "lambda-0"),
             Row("the reward model", "default"), Row("half of the labelled images of each prompt", "labels-50")],
            2, REWARD, ("pairs, *",),
        ),
        "ablation": Question(
            "Images used for fine-tuning",
            [BASE, Row("labelled images alone", "labelled"), Row("+ images scored by r", "scored"),
             Row("+ pre-training pairs, half of each step", "pairs-half")],
            3, (*IMAGES, "reward, seen"), ("fidelity",),
        ),
        "beta": Question(
            "The weight of the pre-training term, and its captions",
            [BASE, Row("beta 0", "scored", 0, "noisy"), *noisy, *clean],
            2, IMAGES, ("aligned", "fidelity"), "beta; captions of the pre-training pairs",
        ),
        "knob": Question(
            "lambda and T as one setting",
            [Row("lambda 0", "lambda-0", 0), Row("lambda 0.5, T 2 (the paper's)", "temperature-2", 0.25),
             Row("lambda 0.5, T 0.5 (default)", "default", 1),
             Row("lambda 2, T 2", "lambda-2-temperature-2", 1, "lambda 2, T 2"),
             Row("lambda 0.5, T 0.125", "temperature-0.125", 4)],
            2, (*REWARD, "aligned"), ("pairs, *",), "lambda / T",
        ),
        "feedback": Question(
            "Number of labels",
            [Row(f"{n} % of the labels", "default" if n == 100 else f"labels-{n}", n) for n in percents],
            2, ("pairs, *", "ece, *", "aligned", "aligned, *", "fidelity"), ("aligned", "pairs, *"), "labels, %",
        ),
        "noise": Question(
            "Wrong labels",
            [Row("true labels", "default"), Row("30 % flipped, majority of three", "flipped-30-majority"),
             Row("30 % flipped", "flipped-30")],
            0, ("pairs, *", "ece, *", "aligned", "aligned, *", "fidelity"), ("aligned",),
        ),
        "weights": Question(
            "Weights of the images",
            [BASE, Row("r, sampled in proportion (default)", "default"),
             Row("r, uniform samples (the paper)", "uniform"),
             Row(f"1 where r > {tau['threshold']:g}, else 0", "threshold"),
             Row(f"exp((r - 1) / {tau['exponential']:g})", "exponential"), Row("1: all images alike", "plain")],
            1, ("aligned", "aligned, *", "fidelity", "diversity", "calls"), ("aligned",),
        ),
        "steps": Question(
            "Number of fine-tuning steps",
            [BASE, *(Row(f"{x:g} times the steps", name, x) for name, x in lengths.items())],
            2, ("aligned", "aligned, *", "readable", "fidelity", "diversity", "reward", "calls"),
            ("aligned", "fidelity"), "steps, times those of other cells",
        ),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the page
def page(folder: Path, path: Path, seeds: Sequence[int], size: str) -> None:
    """Write what all cells and main jobs found to the page `path` and its figures."""
    results = {
        (name, seed): read_json(folder / name / f"seed-{seed}" / "result.json") for name in CELLS for seed in seeds
    }
    jobs = [read_json(folder / f"seed-{seed}" / "results.json") for seed in seeds]
    groups = [key.partition(", ")[2] for key in results["default", seeds[0]] if key.startswith("pairs, ")]
    asked = {name: question.expanded(groups) for name, question in questions().items()}
    blocks = {"findings": ("The paper's findings, and ours", findings_block(findings(groups), results, seeds))}
    blocks["setting"] = ("How it was measured", setting(folder, results, jobs, seeds, size))
    blocks["categories"] = ("Before and after, by category", categories_block(jobs))
    blocks["sets"] = (
        "Sets of images, won by two thirds of the raters",
        sets_block(MATCHES, RATED, groups, results, seeds),
    )
    blocks |= {name: (question.title, block(name, question, results, seeds)) for name, question in asked.items()}
    figures = {name: partial(plot, question=question, results=results, seeds=seeds) for name, question in asked.items()}
    figures["ablation"] = partial(plot_trade_off, question=asked["ablation"], results=results, seeds=seeds)
    figures["categories"] = partial(plot_categories, jobs=jobs)
    figures["sets"] = partial(plot_sets, matches=MATCHES, rater=NOISY, results=results, seeds=seeds)
    write_page(path, blocks, figures)


def setting(folder: Path, results: Results, jobs: Sequence[dict[str, Any]], seeds: Sequence[int], size: str) -> str:
    """The command, and what it did, in Markdown."""
    cell, config = SIZES[size]["cell"], read_json(folder / "config.json")
    default = SEEDS[:3] if size == "quick" else SEEDS
    flags = " --quick" * (size == "quick") + f" --seeds {' '.join(map(str, seeds))}" * (list(seeds) != default)
    main_jobs, cells = sum(job["seconds"]["total"] for job in jobs), sum(one["seconds"] for one in results.values())
    return (
        f"    python -m minialign.study{flags}\n\n"
        f"{len(seeds)} seeds ({', '.join(map(str, seeds))}), {len(results)} cells, with torch "
        f"{config['versions']['torch']}: {main_jobs / 60:.0f} minutes on {config['threads']} cores for the main jobs, "
        f"and {cells / 60:.0f} minutes of one core for the cells; {planned(seeds, size)}. A main job for each seed, as "
        "`python -m minialign.finetune --seed N` runs it, then each cell from its images, labels and reward: "
        f"{cell['steps']} steps of {cell['batch_size']} rows, a moving average of the weights (decay {cell['ema']:g}), "
        f"judged on {cell['test_images']} images of the test. Fréchet distances are of {SIZES[size]['distances']} "
        "readable images and as many drawings of what these show. Rewards are measured on "
        f"{POOL} images of each of {SIZES[size]['set_prompts']} prompts, sets are {SET} images of these prompts, "
        f"compared by {RATERS} raters."
    )


def planned(seeds: Sequence[int], size: str) -> str:
    """The cost of the grid, in words."""
    jobs, cells = job_calls(size) * len(seeds), sum(cell_calls(name, size) for name in CELLS) * len(seeds)
    return f"{jobs / 1e6:.2f} + {cells / 1e6:.2f} million passes of the UNet over one image"
