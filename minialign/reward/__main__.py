"""Stage 2 of the method: learn the reward model r(x,z) from the labels of a run: python -m minialign.reward RUN

Trains the reward model on the labels in RUN, with and without the auxiliary loss, and measures both beside the raw CLIP
score on labels that it did not learn from: images of known prompts, and images of held-out prompts. The
model with the auxiliary loss is kept in RUN/reward, with its rewards of all images of the run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..engine.commands import Parser, run_command
from ..engine.processes import pick_device
from ..engine.run import is_run, opened
from ..engine.settings import add_run_flags, given
from ..files import InputError
from ..pages.cards import curve_table, reward_table
from . import REWARDS, check_terms, learn_from_run, read_measured, read_terms
from .export import check_place, export_rewards


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minialign.reward", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run with labels")
    written = "write each image's reward and weight for other trainers: a table (.csv, .tsv, .jsonl), or a folder"
    parser.add_argument("--export", type=Path, metavar="FILE", help=written)
    parser.add_argument("--curve", action="store_true", help="measure how the reward model improves with more labels")
    add_run_flags(parser, "reward")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    device = pick_device(args.device)
    if not is_run(args.run):
        raise InputError(f"{args.run}: not a run; accepted: a run of generate, or label --import FILE")
    if args.export is not None:
        check_place(args.export)  # a mistake is reported before all work
    with opened(args.run) as run:
        flags = given(args)
        settings = run.resolve(flags, bundled=bool(run.world))
        check_terms(read_terms(settings["reward"], args.run), named="reward" in flags)
        learn_from_run(run, settings, device, args.redo, args.curve)
        exported = args.export and export_rewards(run.folder, args.export, run.folder / REWARDS)
    measured = read_measured(args.run / "reward")
    print(f"\n{reward_table(measured)}\n")
    if args.curve:
        print(f"{curve_table(measured['curve'])}\n")
    print(f"{args.export}: {exported}" if exported else args.run / "reward")


if __name__ == "__main__":
    run_command(main)
