"""Stage 3 of the method, and the main job of all stages on one folder: python -m minialign.finetune

The main job calls the stages in turn: images, labels, the reward model, fine-tuning of the UNet by reward-weighted
likelihood plus a pre-training term, evaluation. It continues from what RUN holds, whoever made it. With no argument it
runs on the bundled model and its simulated annotator, and needs no network.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from ..data import check_source
from ..engine.commands import Parser, run_command
from ..engine.processes import gathered, is_main_process, pick_device, process_group, say
from ..engine.run import DIGEST, Run, opened
from ..engine.settings import STAGES, add_run_flags, defaults, given
from ..evaluate import evaluate_run, images_per_prompt, test_items, write_results
from ..feedback import USUAL, FeedbackStore, LabelFile, add_reading_flags, given_reading
from ..files import InputError, atomic
from ..generate import check_sampling, generate_images, load_model, per_prompt, planned, sampler
from ..label.annotated import annotate_run, import_run
from ..models.clip import CLIP
from ..pages.cards import model_card, summary
from ..pages.report import write_report
from ..pipeline import Pipeline
from ..reward import LEARNED, check_terms, learn_from_run, read_terms
from ..shapes.world import WORLD, knows
from .batches import split_rows
from .trainer import finetune_run, stored_images

RECIPES = ("paper",)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minialign.finetune", description=(__doc__ or "").split("\n\n")[1])
    add = parser.add_argument
    own = "runs/shapes; with --model or --feedback: runs/own"
    add("run", type=Path, nargs="?", metavar="RUN", help=f"the run's folder (default: {own})")
    add("--out", type=Path, metavar="RUN", help="another way to give the run's folder")
    add("--fresh", action="store_true", help="start over: remove what an earlier run left in the folder")
    add(
        "--feedback",
        type=Path,
        metavar="FILE",
        help="label file to import: CSV or JSON with prompt, image, label, or with pairs or rankings of images",
    )
    add("--recipe", choices=RECIPES, help="paper: the settings of Lee et al. 2023, unless a flag gives another value")
    add("--cache", type=Path, help="folder of latents and text contexts that runs may share (default: RUN/cache)")
    add_reading_flags(parser)
    add_run_flags(parser, *STAGES)
    return parser.parse_args(arguments)


def main_job(
    run: Run, flags: dict[str, Any], device: torch.device, *, recipe: str | None = None,
    feedback: LabelFile | None = None, redo: bool = False, cache_folder: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """All stages of a run, each unless it is done; the content of results.json."""

    @cache
    def load() -> Pipeline:
        return load_model(run, flags, device)

    load()
    settings = run.resolve(flags, bundled=bool(run.world), recipe=recipe)
    check_settings(settings, flags)
    if flags.get("prompts") is not None:
        planned(settings | per_prompt(run, settings, flags), run.world)  # a mistake is reported before it is remembered
    check_sampling(load(), settings, stored_prompts(run.folder))
    check_terms(read_terms(settings["reward"], run.folder), named="reward" in flags)
    run.intend(run.given(flags, recipe))
    sample = sampler(run, settings, flags, device, load)
    collect(run, settings, flags, sample, feedback, redo)
    learn_from_run(run, settings, device, redo)
    items = test_items(run, settings)
    load.cache_clear()  # its memory is for fine-tuning, which changes what it loads
    validated = [(item.prompt, item.seed) for item in items]
    finetune_run(run, settings, partial(load_model, run, flags, device), validated, redo, cache_folder)
    evaluate_run(run, settings, device, redo, named=True)
    return write_results(run) if is_main_process() else {}


def check_settings(settings: dict[str, Any], flags: dict[str, Any]) -> None:
    """InputError for what would fail in a later stage only."""
    images_per_prompt(settings)
    beta = settings["beta"]
    split_rows(settings["batch_size"], settings["pretrain_fraction"], beta, settings["accumulate"])
    if settings["weighting"] == "reward" and "tau" in flags:
        raise InputError("--tau: --weighting reward has none; accepted with threshold and exponential")
    if settings["pretrain"] is not None:
        check_source(settings["pretrain"])


def collect(
    run: Run, settings: dict[str, Any], flags: dict[str, Any], load: Any, feedback: LabelFile | None, redo: bool
) -> None:
    """Stage 1: images and labels, imported from a file, made by others before, or by the model and the annotator."""
    if feedback is not None:
        import_run(run, feedback, redo)
        return
    learned = any(term.what == LEARNED for term in read_terms(settings["reward"], run.folder))
    images, labels = gathered(count_feedback(run.folder) if is_main_process() else (0, 0))[0]
    if "generate" in run.stages or not images:
        if run.world != WORLD and not images:
            raise InputError(
                f"{run.folder}: no images and labels; accepted: --feedback FILE, or a run of generate and label"
            )
        finished = "seconds" in run.stages.get("generate", {})
        if finished and not redo and not {"prompts", "images", "images_per_prompt"} & flags.keys():
            check_again(run, "generate", settings)
        else:
            settings |= per_prompt(run, settings, flags)
            generate_images(run, settings, load, planned(settings, run.world), redo)
    else:
        check_world(run, flags)
        say(f"generate: the run already has {images} images")
    if "label file" in run.stages.get("label", {}).get("made_from", {}):
        check_again(run, "label", {})
    elif "label" in run.stages or (learned and not labels and run.world == WORLD):
        annotate_run(run, settings, redo)
    elif labels:
        say(f"label: the run already has {labels} labels and comparisons")
    elif not learned:
        say("label: no labels; the reward of --reward needs none")
    else:
        raise InputError(f"{run.folder}: no labels; collect them with python -m minialign.label {run.folder}")


def check_world(run: Run, flags: dict[str, Any]) -> None:
    """InputError where images of unknown origin would be taken for the bundled model's own."""
    named = flags.get("model") or run.settings.get("model") or "generate" in run.stages
    if not named and not knows(stored_prompts(run.folder)):
        raise InputError(
            f"--model: needed for {run.folder}, whose prompts are not the bundled model's; accepted: the model that "
            "made the images"
        )


def check_again(run: Run, name: str, settings: dict[str, Any]) -> None:
    """A stage whose input is not given again: its settings count. InputError where it is unfinished or out of date."""
    inputs = {key: value for key, value in run.stages[name]["made_from"].items() if str(value).startswith(DIGEST)}
    with run.stage(name, "", settings, lambda: inputs) as todo:
        if todo:
            raise InputError(f"{run.folder}: stage {name} is not finished; accepted: the same command with --feedback")


def stored_prompts(folder: Path) -> list[str]:
    """The prompts of the images that a run has."""
    return stored_images(folder)[1] if (folder / "feedback.sqlite").is_file() else []


def count_feedback(folder: Path) -> tuple[int, int]:
    """The numbers of images in a run, and of labelled images and comparisons."""
    if not (folder / "feedback.sqlite").is_file():
        return 0, 0
    store = FeedbackStore(folder, read_only=True)
    try:
        return len(store.images()), len(store.labels()) + len(store.preferred())
    finally:
        store.close()


def check_feedback(feedback: LabelFile, flags: dict[str, Any]) -> None:
    """InputError for a label file that cannot be used, or whose images nobody's model made."""
    path = feedback.path
    if path.is_dir():
        raise InputError(f"--feedback {path}: a folder; to continue a run: python -m minialign.finetune {path}")
    prompts = [row.prompt for rows in feedback.judgements for row in rows]
    if flags.get("model") is None and not knows(prompts):
        raise InputError(
            f"--model: needed with --feedback {path}, whose prompts are not the bundled model's; accepted: the "
            "model that made the images"
        )


def check_sources(folder: Path, flags: dict[str, Any], fresh: bool) -> None:
    """InputError if the run would overwrite the model that it reads.

    Also if --fresh would remove a run whose model cannot be loaded afterwards.
    """
    for key in ("model", "vae", "clip"):
        source = flags.get(key)
        if source is not None and Path(source).exists() and Path(source).resolve().is_relative_to(folder.resolve()):
            raise InputError(f"--{key} {source}: lies in {folder}, which this run writes; use another folder")
    if fresh and "model" not in flags and (folder / "config.json").exists():
        before = remembered(folder)
        if before is not None:
            raise InputError(f"--fresh: {folder} was begun with --model {before}; name it again, or another folder")
    if fresh:  # what cannot be loaded is reported before anything is removed
        where = {key: flags[key] for key in ("variant", "vae") if key in flags}
        pipe = Pipeline.from_pretrained(flags.get("model"), **where)
        CLIP.from_pretrained(flags.get("clip", defaults(bool(pipe.world))["clip"]))


def remembered(folder: Path) -> str | None:
    """The model that a run was begun with, None where none is named or config.json is damaged."""
    with suppress(InputError):
        return Run(folder).settings.get("model")
    return None


def main() -> None:
    args = parse_arguments()
    flags = given(args)
    if None not in (args.run, args.out):
        raise InputError("RUN and --out are the same thing; accepted: one of them")
    own = flags.get("model") is not None or args.feedback is not None
    folder = args.run or args.out or Path("runs/own" if own else "runs/shapes")
    reading = given_reading(args)
    feedback = None if args.feedback is None else LabelFile(args.feedback, reading)
    if feedback is None and reading != USUAL:
        raise InputError("--columns, --skip, --good-from, --scale: say how --feedback FILE is read, and need it")
    check_sources(folder, flags, args.fresh)
    with process_group(pick_device(args.device)) as device:
        if feedback is not None and is_main_process():
            check_feedback(feedback, flags)
        with opened(folder, args.fresh) as run:
            results = main_job(
                run, flags, device, recipe=args.recipe, feedback=feedback, redo=args.redo, cache_folder=args.cache
            )  # fmt: skip
            if not is_main_process():
                return
            card = folder / "model" / "README.md"
            if not card.exists():  # or what its maker has filled in would be lost
                with atomic(card) as temporary:
                    temporary.write_text(model_card(results), encoding="utf-8")
            report = write_report(folder)
        print(f"\n{summary(results)}\n\n{results['seconds']['total']:.0f} s in all stages. Report: {report}")


if __name__ == "__main__":
    run_command(main)
