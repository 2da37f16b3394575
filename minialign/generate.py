"""Stage 1 of the method: a model generates images for prompts, each from a known seed: python -m minialign.generate

Generates images for prompts with any text-to-image model, and saves them in a run's folder, ready to be labelled:
images/, and feedback.sqlite with the prompt, file and seed of each. A stopped command continues with the same command.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .data.cache import pipeline_digest
from .engine.commands import Parser, run_command
from .engine.optimising import progress
from .engine.processes import barrier, is_main_process, pick_device, processes
from .engine.run import Run, digest, opened
from .engine.settings import NOISES, add_run_flags, given, of_stage
from .feedback import FeedbackStore, read_prompts
from .files import InputError, atomic
from .pipeline import Pipeline, cut_warning
from .prompts import PAPER, Grammar, recognise, split, spread
from .shapes.world import GRAMMAR, WORLD

Item = tuple[str, int]  # a prompt and the seed of its starting noise


def noise_seed(run_seed: int, i: int, *, test: bool = False) -> int:
    """The seed of a run's i-th starting noise, i below NOISES: another one in every run, for feedback and for test."""
    return 1_000_000 + NOISES * (2 * run_seed + test) + i


# ------------------------------------------------------------------------------------------------- images of a model
def sample_images(
    pipe: Pipeline, items: Sequence[Item], *, steps: int, guidance: float, batch: int = 64, title: str = "generate"
) -> Iterator[Image.Image]:
    """Generate the images of (prompt, seed) items, in order. The batch size does not change which seed an image has."""
    bar = iter(progress(range(len(items)), title))
    for start in range(0, len(items), batch):
        chunk = items[start : start + batch]
        latents = pipe.noise([seed for _, seed in chunk])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that prompts are cut: `check_sampling` has warned once
            images = pipe.generate([text for text, _ in chunk], steps=steps, guidance=guidance, latents=latents)
        for image in images:
            next(bar)
            yield image
    next(bar, None)


def sample_to_folder(
    pipe: Pipeline,
    items: Sequence[Item],
    folder: Path,
    *,
    steps: int,
    guidance: float,
    batch: int,
    title: str = "generate",
    process: tuple[int, int] = (0, 1),
    finished: Callable[[range], None] = lambda rows: None,
) -> list[Path]:
    """Generate the images of (prompt, seed) items as folder/000000.png and so on; existing batches are kept.

    A batch with a missing image is generated again, all of it, because the last bits of the results can depend on the
    batch size. process (k, n): every n-th batch from the k-th on, for process k of n. `finished` is called with the
    rows of each of these batches as soon as its images are on disk.
    """
    paths = [folder / f"{i:06d}.png" for i in range(len(items))]
    batches = [range(start, min(start + batch, len(items))) for start in range(0, len(items), batch)]
    todo = []
    for rows in batches[process[0] :: process[1]]:
        if all(paths[i].exists() for i in rows):
            finished(rows)
        else:
            todo.append(rows)
    missing = [items[i] for rows in todo for i in rows]
    images = sample_images(pipe, missing, steps=steps, guidance=guidance, batch=batch, title=title)
    for rows in todo:
        for i, image in zip(rows, images):
            with atomic(paths[i]) as temporary:
                image.save(temporary, format="PNG")
        finished(rows)
        if rows is todo[-1]:
            next(images, None)  # ends the progress bar
    return paths


def sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of sampling as keyword arguments of `sample_to_folder`."""
    batch = settings["sampling_batch_size"]
    return {"steps": settings["sampling_steps"], "guidance": settings["guidance"], "batch": batch}


# ----------------------------------------------------------------------------------------------------------- the run
def load_model(run: Run, given: Mapping[str, Any], device: torch.device, dtype: str = "float32") -> Pipeline:
    """The model of a run: the given one, else that of config.json, else the bundled one.

    InputError where the run was begun with another model.
    """
    source = run.source("model", given)
    where: dict[str, Any] = {key: value for key in ("variant", "vae") if (value := run.source(key, given)) is not None}
    pipe = Pipeline.from_pretrained(source, device=device, **where)
    own, known = digest(pipeline_digest(pipe)), run.config.get("model_digest")
    if known not in (None, own):
        begun = run.settings.get("model") or "the bundled model"
        raise InputError(
            f"--model {source}: not the same as {begun}, which {run.folder} was begun with; accepted: that one, or "
            "another folder"
        )
    run.config |= {"model_digest": own, "world": pipe.world}  # written when the first stage begins
    if dtype != "float32":
        pipe = Pipeline.from_pretrained(source, device=device, dtype=getattr(torch, dtype), **where)
    return pipe


def grammar_of(world: str) -> Grammar:
    """The grammar of a model's prompts: that of the toy data set, else the paper's."""
    return GRAMMAR if world == WORLD else PAPER


def planned(settings: Mapping[str, Any], world: str) -> list[str]:
    """The prompt of each image of a run, by its settings."""
    if settings["prompts"] is None:
        raise InputError("--prompts: needed; accepted: a file of prompts, or categories")
    if settings["prompts"] == "categories":
        prompts = [prompt.text for prompt in split(grammar_of(world), settings["seed"]).seen]
    else:
        prompts = read_prompts(Path(settings["prompts"]))
    number = settings["images_per_prompt"]
    total = len(prompts) * number if number else settings["images"]
    if total > NOISES:
        raise InputError(f"--images-per-prompt: {len(prompts)} prompts x {number} images; accepted: {NOISES} in all")
    if number:  # the images of a prompt together: people label them side by side, from the first batch on
        return [prompt for prompt in prompts for _ in range(number)]
    categories = [known[0].category if (known := recognise(prompt)) else "" for prompt in prompts]
    return spread(prompts, categories, total, random.Random(settings["seed"]))


def check_sampling(pipe: Pipeline, settings: Mapping[str, Any], prompts: Sequence[str]) -> None:
    """InputError where the schedule has fewer steps; a warning where the model would cut prompts."""
    pipe.schedule.timesteps(settings["sampling_steps"])
    cut = cut_warning(pipe.tokenizer, list(dict.fromkeys(prompts)))
    if cut and is_main_process():
        print(f"warning: {cut}", file=sys.stderr)


def generate_images(
    run: Run, settings: dict[str, Any], load: Callable[[], Pipeline], prompts: Sequence[str], redo: bool = False
) -> None:
    """Stage `generate` of a run, unless it is done: an image for each of the prompts, in the store and in images/.

    Several processes share the work. Image i starts from the run's i-th noise.
    """
    items = [(text, noise_seed(settings["seed"], i)) for i, text in enumerate(prompts)]

    def inputs() -> dict[str, str]:
        first = run.folder / "images" / "000000.png"
        if "generate" not in run.stages and first.exists():
            raise InputError(f"{first}: no image of this run; move it away first")
        return {"prompts": digest(json.dumps(prompts)), "model": run.config["model_digest"]}

    def add(rows: Sequence[int]) -> None:
        made_with = {setting.name: settings[setting.name] for setting in of_stage("generate") if not setting.free}
        store = FeedbackStore(run.folder)
        try:
            store.add_images(((items[i][0], f"images/{i:06d}.png", items[i][1]) for i in rows), made_with)
        finally:
            store.close()

    why = f"the model generates {len(items)} images for {len(set(prompts))} prompts"
    with run.stage("generate", why, settings, inputs, redo=redo, together=True) as todo:
        if todo:
            single = processes()[1] == 1  # then people can label the first images while the others are generated
            finished = add if single else lambda rows: None
            sample_to_folder(
                load(), items, run.folder / "images", **sampling(settings), process=processes(), finished=finished
            )
            barrier()
            if is_main_process() and not single:
                add(range(len(items)))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minialign.generate", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="the run's folder")
    parser.add_argument("--out", type=Path, metavar="RUN", help="another way to give the run's folder")
    add_run_flags(parser, "generate", spellings={"sampling_batch_size": ["--batch-size"]})
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    folder = args.run or args.out
    if folder is None or None not in (args.run, args.out):
        raise InputError("RUN: the run's folder is needed, once")
    device, flags = pick_device(args.device), given(args)
    if flags.get("images_per_prompt") and flags.get("images"):
        raise InputError("--images and --images-per-prompt exclude each other")
    if flags.get("prompts") not in (None, "categories"):
        read_prompts(Path(flags["prompts"]))  # so that a mistake is reported before the folder is made
    with opened(folder) as run:

        @cache
        def load() -> Pipeline:
            return load_model(run, flags, device)

        load()
        settings = run.resolve(flags, bundled=bool(run.world))
        settings |= per_prompt(run, settings, flags)
        prompts = planned(settings, run.world)
        check_sampling(load(), settings, prompts)
        generate_images(run, settings, sampler(run, settings, flags, device, load), prompts, args.redo)
    print(f"{folder}: {len(prompts)} images for {len(set(prompts))} prompts. Next: python -m minialign.label {folder}")


def sampler(
    run: Run, settings: Mapping[str, Any], flags: Mapping[str, Any], device: torch.device, load: Callable[[], Pipeline]
) -> Callable[[], Pipeline]:
    """The function that loads the run's model for sampling: `load` (float32), unless --sampling-dtype is another."""
    dtype = settings["sampling_dtype"]
    return load if dtype == "float32" else partial(load_model, run, flags, device, dtype)


def per_prompt(run: Run, settings: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The setting images_per_prompt where it differs: 3 for a file of prompts, none where --images is given."""
    if flags.get("images"):
        return {"images_per_prompt": None}
    decided = "generate" in run.stages or settings["images_per_prompt"] is not None
    if settings["prompts"] != "categories" and not decided:
        return {"images_per_prompt": 3}
    return {}


if __name__ == "__main__":
    run_command(main)
