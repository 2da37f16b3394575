"""The method's section 4, the analysis: what each choice does to alignment and fidelity: python -m minialign.study

For each seed the main job is run. Then the pre-trained model is fine-tuned again on its images, labels and reward with
one design choice changed; each such training is a cell of the study. Finished cells are kept, so the same command
resumes. The bundled model is fine-tuned, and the simulated annotator labels and evaluates.

A seed is a block: its cells share images, labels, prompts of the test and starting noise, so that a cell is compared
with another within each seed. y_cs = mu_c + b_s + e_cs (Fisher 1935); the interval of mu_c - mu_0 is Student's t.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..engine.commands import Parser, in_range, run_command
from ..engine.processes import say
from ..engine.run import opened
from ..engine.settings import LAST_SEED
from ..files import InputError, read_json
from ..finetune.__main__ import main_job
from ..pages.study_page import with_blocks
from .cells import CELLS, DEFAULTS, SIZES, cell_calls, training_calls
from .filling import world
from .questions import SEEDS, page, planned, questions
from .workers import fill_all, missing, result_of


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m minialign.study", description=(__doc__ or "").split("\n\n")[1])
    add = parser.add_argument
    add("--quick", action="store_true", help="a trial of all cells in a few minutes; its numbers mean nothing")
    seeds = f"three or more (default: {' '.join(map(str, SEEDS))}; with --quick the first three)"
    add("--seeds", type=in_range(int, 0, LAST_SEED), nargs="+", help=seeds)
    only = "compute only these cells and write no page, for example as a pilot"
    add("--only", choices=CELLS, nargs="+", metavar="CELL", help=only)
    add("--out", type=Path, help="the study's folder (default: runs/study; with --quick: runs/study-quick)")
    add("--docs", type=Path, help="folder of results.md and its figures (default: docs; with --quick: OUT/docs)")
    jobs = torch.get_num_threads()
    add("--jobs", type=in_range(int, 1), default=jobs, help=f"parallel processes (default: one per core, {jobs})")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    size = "quick" if args.quick else "full"
    folder = args.out or Path("runs/study-quick" if args.quick else "runs/study")
    docs = args.docs or (folder / "docs" if args.quick else Path("docs"))
    seeds = list(dict.fromkeys(args.seeds or (SEEDS[:3] if args.quick else SEEDS)))
    if len(seeds) < 3:
        raise InputError(
            f"--seeds: {len(seeds)} seeds are too few for an interval; accepted: three or more different ones"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the study draws figures: it needs matplotlib (pip install 'minialign[report]')")
    names = ["findings", "setting", "categories", "sets", *questions()]
    with_blocks(docs / "results.md", dict.fromkeys(names, ("", "")))  # or it would be known in an hour
    say(f"planned for all cells: {planned(seeds, size)}")
    with opened(folder) as study:
        try:
            docs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--docs {docs}: cannot be used ({error.strerror}); accepted: a folder") from error
        plan = json.loads(json.dumps({"size": size, **SIZES[size], "defaults": DEFAULTS}))
        if study.config.get("study", plan) != plan:
            raise InputError(f"--out {folder}: a study of other settings was begun there; accepted: another folder")
        study.remember(study=plan)
        for seed in seeds:
            say(f"main job of seed {seed}: all stages, and the images that its cells learn from")
            with opened(folder / f"seed-{seed}") as job:
                results = main_job(job, SIZES[size]["run"] | {"seed": seed}, torch.device("cpu"))
            world(folder, seed, size)  # its pool of images, before several processes ask for it
        without = missing(folder, seeds, size)
        if left := [name for name, _ in without if name in (args.only or CELLS)]:
            filled = [(name, seed) for seed in seeds for name in CELLS if (name, seed) not in without]
            seconds = {cell: read_json(result_of(folder, *cell))["seconds"] for cell in filled}
            about = duration(left, results, seconds, size, args.jobs)
            say(f"cells: {len(left)} left, in {args.jobs} processes; about {about}")
            fill_all(folder, args.only or list(CELLS), seeds, size, args.jobs)
        if not args.only:
            page(folder, docs / "results.md", seeds, size)
            print(f"\n{docs / 'results.md'}, with its figures")


def duration(
    names: Sequence[str], results: dict[str, Any], seconds: dict[tuple[str, int], float], size: str, jobs: int
) -> str:
    """Hours that cells will take, in words, if they pass the UNet over as many images a second as those before them.

    These are the finished cells, with their seconds; before there are any, the fine-tuning of the main job.
    """
    speed, whose = training_calls(results["settings"]) / results["seconds"]["finetune"], "the main job's fine-tuning"
    if done := sum(cell_calls(name, size) for name, _ in seconds):
        speed, whose = jobs * done / sum(seconds.values()), f"{len(seconds)} finished cells"
    return f"{sum(cell_calls(name, size) for name in names) / speed / 3600:.1f} hours at the speed of {whose}"


if __name__ == "__main__":
    run_command(main)
