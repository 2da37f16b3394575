"""Section 4 of the paper, evaluation: alignment, fidelity, diversity, best of N: python -m minialign.evaluate RUN

Compares models, the fine-tuned model of a run with its base unless others are named. They sample from the same new
noise for the same prompts, and are judged by the run's reward model, by CLIP, by people (python -m minialign.label on
the folders of RUN/compare) or, with the bundled model, by the simulated annotator.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..engine.commands import Parser, run_command
from ..engine.processes import pick_device, say
from ..engine.run import changes_result, is_run, opened
from ..engine.settings import BY_NAME, add_run_flags, given
from ..files import InputError, read_json
from ..pages.cards import comparison
from ..pages.report import write_report
from ..reward import outdated_stages
from . import compare_models, evaluate_run, write_results


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minialign.evaluate", description=(__doc__ or "").split("\n\n")[1])
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a run; the result is in its results.json and report.html")
    what = "models to compare, the first is the baseline: folders, hub ids, .safetensors files, or bundled"
    add("--models", nargs="+", metavar="MODEL", help=f"{what} (default: the run's base model and RUN/model)")
    add("--prompts", type=Path, help="file of prompts (default: the run's, and prompts that its grammar holds out)")
    reward = "a reward model's folder; only a folder here (default: RUN/reward, where there is one)"
    add("--reward", type=Path, help=reward)
    add("--reference", type=Path, help="folder of reference images for the distances (default: the run's good images)")
    add_run_flags(parser, "evaluate", without=["model", "variant", "vae"])
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    device = pick_device(args.device)
    if not args.run.is_dir() or not is_run(args.run):
        raise InputError(f"{args.run}: not a run; accepted: a run's folder")
    if args.clip is not None and args.reward is not None:
        raise InputError("--clip: the reward model of --reward names its own; accepted without --reward")
    flags = given(args, "evaluate")  # its --prompts are those of the test
    with opened(args.run) as run:
        settings = run.resolve(flags, bundled=bool(run.world))
        for note in outdated_stages(run):
            say(f"note: {note} (python -m minialign.finetune {run.folder} --redo)")
        # other settings than the run's make a comparison beside its evaluation, unless this is to be done again
        changed = {key for key, value in flags.items() if run.settings.get(key, value) != value and changes_result(key)}
        redone = args.redo and all(BY_NAME[key].stages == ("evaluate",) for key in changed)
        if args.models or args.prompts or args.reward or args.reference or (changed and not redone):
            name = compare_models(
                run, settings, device, models=args.models, prompts=args.prompts, reward=args.reward,
                reference=args.reference,
            )  # fmt: skip
        else:
            evaluate_run(run, settings, device, args.redo)
            name = ""
        write_results(run)
        results = read_json(run.folder / "results.json")
        report = write_report(run.folder)
    evaluation = results["comparisons"][name] if name else results["evaluation"]
    print(f"\n{comparison(evaluation)}\n\n{args.run / 'results.json'}, {report}")
    places = " or ".join(str(args.run / one["images"]) for one in evaluation["models"].values())
    print(f"people can label these images: python -m minialign.label FOLDER, where FOLDER is {places}")


if __name__ == "__main__":
    run_command(main)
