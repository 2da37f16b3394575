"""Stage 1 of the method: a pipeline draws images for prompts, from seeds that are kept: python -m minialign.generate

Draws images of any pipeline for prompts and keeps them in a run's folder, ready to be labelled: images/ and
feedback.sqlite, which names each image's prompt, file and seed. Batches that are drawn are kept: the same command goes
on where it stopped.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .command import Parser, in_range, run_command
from .feedback import FeedbackStore, read_rows
from .models.pretrained import InputError, read_bytes
from .pipeline import Pipeline
from .prompts import PAPER, SHAPES, Grammar, split
from .runs import EMBEDDED_DEFAULTS, OWN_DEFAULTS, check_folder, locked, open_run, pick_device
from .shapes.scenes import SIZE
from .task import LAST_SEED, NOISES, noise_seed
from .training import atomic, progress


def draw(
    pipe: Pipeline, items: Sequence[tuple[str, int]], *, steps: int, guidance: float, batch: int = 64, title: str = ""
) -> Iterator[Image.Image]:
    """Images of (prompt, seed) items, in order; image and seed belong together whatever the batch size."""
    bar = iter(progress(range(len(items)), title or "draw"))
    for start in range(0, len(items), batch):
        chunk = items[start : start + batch]
        latents = pipe.noise([seed for _, seed in chunk])
        for image in pipe.generate([text for text, _ in chunk], steps=steps, guidance=guidance, latents=latents):
            next(bar)
            yield image
    next(bar, None)


def draw_to_folder(
    pipe: Pipeline,
    items: Sequence[tuple[str, int]],
    folder: Path,
    *,
    steps: int,
    guidance: float,
    batch: int,
    title: str,
    part: tuple[int, int] = (0, 1),
    finished: Callable[[range], None] = lambda rows: None,
) -> list[Path]:
    """Draw (prompt, seed) items to folder/000000.png and so on; batches that are there already are kept.

    A batch of which a part is missing is drawn again whole: arithmetic may differ in the last bit with the batch size.
    part (k, n) draws every n-th batch from the k-th on, one process's share. `finished` is called with the rows of each
    of these batches as soon as its images are on disk.
    """
    paths = [folder / f"{i:06d}.png" for i in range(len(items))]
    batches = [range(start, min(start + batch, len(items))) for start in range(0, len(items), batch)]
    todo = []
    for rows in batches[part[0] :: part[1]]:
        if all(paths[i].exists() for i in rows):
            finished(rows)
        else:
            todo.append(rows)
    missing = [items[i] for rows in todo for i in rows]
    images = draw(pipe, missing, steps=steps, guidance=guidance, batch=batch, title=title)
    for rows in todo:
        for i, image in zip(rows, images):
            with atomic(paths[i]) as temporary:
                image.save(temporary, format="PNG")
        finished(rows)
        if rows is todo[-1]:
            next(images, None)  # ends the progress bar
    return paths


def grammar_of(pipe: Pipeline) -> Grammar:
    """The words of a pipeline's categories; the embedded model and its descendants, known by their size, have own."""
    return SHAPES if pipe.image_size == (SIZE, SIZE) else PAPER


def fingerprint(pipe: Pipeline) -> str:
    """CRC-32 of the UNet's weights, in hexadecimal: with others a run is another one."""
    crc = 0
    for weight in pipe.unet.parameters():
        crc = zlib.crc32(weight.detach().float().cpu().numpy().tobytes(), crc)
    return f"{crc:08x}"


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, each once: a line each, or the column `prompt` of .csv or of JSON lines (.jsonl, .json).

    InputError names the file, the line and what is accepted.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from error
    if path.suffix.lower() in (".csv", ".jsonl", ".json"):
        found = []
        for number, row in read_rows(path, text):
            if not str(row.get("prompt") or "").strip():
                raise InputError(f"{path}, line {number}: no 'prompt'; column needed: prompt")
            found.append(str(row["prompt"]))
    else:
        found = text.split("\n")
    prompts = list(dict.fromkeys(prompt.strip() for prompt in found if prompt.strip()))
    if not prompts:
        raise InputError(f"{path}: no prompts; accepted: a prompt a line, or .csv or .jsonl with a column prompt")
    return prompts


def generate(
    pipe: Pipeline, prompts: Sequence[str], settings: dict[str, Any], folder: Path, batch: int, *, test: bool = False
) -> int:
    """Draw settings["images_per_prompt"] images of each prompt into the run `folder`; the number of images.

    `test`: from the starting noises that are kept for evaluation.
    """
    number, seed = settings["images_per_prompt"], settings["seed"]
    # the images of one prompt one after the other: people judge them side by side, from the first batch on
    places = [(text, i * number + k) for i, text in enumerate(prompts) for k in range(number)]
    items = [(text, noise_seed(seed, i, test=test)) for text, i in places]
    store = FeedbackStore(folder)

    def finished(rows: range) -> None:
        store.add_images(((items[i][0], f"images/{i:06d}.png", items[i][1]) for i in rows), settings)

    try:
        draw_to_folder(
            pipe, items, folder / "images", steps=settings["sampling_steps"], guidance=settings["guidance"],
            batch=batch, title="generate", finished=finished,
        )  # fmt: skip
    finally:
        store.close()
    return len(items)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m minialign.generate", description=__doc__.split("\n\n")[1])
    add = parser.add_argument

    def tuned(flag: str, kind: Callable[[str], Any], what: str) -> None:
        key = flag[2:].replace("-", "_")
        add(flag, type=kind, help=f"{what} (default: {EMBEDDED_DEFAULTS[key]}; with --model: {OWN_DEFAULTS[key]})")

    what = "file of prompts: a prompt a line, or .csv or .jsonl with a column prompt; categories: the paper's seen ones"
    add("--prompts", required=True, help=f"{what}, or the embedded model's own")
    add("--images-per-prompt", type=in_range(int, 1, NOISES), default=3, help="as many for each prompt (default: 3)")
    add("--out", type=Path, required=True, help="the run's folder")
    add("--model", help="folder, hub id or .safetensors file of the pipeline (default: the embedded one)")
    add("--seed", type=in_range(int, 0, LAST_SEED), default=0, help="of noise and of the seen prompts (default: 0)")
    tuned("--sampling-steps", in_range(int, 1, 1000), "steps of DDIM")
    tuned("--guidance", in_range(float, 0), "weight of classifier-free guidance")
    tuned("--batch-size", in_range(int, 1), "images drawn at once; may change when a run goes on")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the networks (default: float32)",
    )
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps ... (default: cuda where there is one, else cpu)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    defaults = EMBEDDED_DEFAULTS if args.model is None else OWN_DEFAULTS
    device = pick_device(args.device)
    prompts = read_prompts(Path(args.prompts)) if args.prompts != "categories" else []
    check_folder(args.out)
    pipe = Pipeline.from_pretrained(args.model, device=device, dtype=getattr(torch, args.dtype))
    prompts = prompts or [prompt.text for prompt in split(grammar_of(pipe), args.seed)[0]]
    if len(prompts) * args.images_per_prompt > NOISES:
        count = f"{len(prompts)} prompts x {args.images_per_prompt} images"
        raise InputError(f"--images-per-prompt: {count} are more than {NOISES}, the most of a run")
    settings = {key: getattr(args, key) for key in ("prompts", "images_per_prompt", "model", "seed", "dtype")}
    for key in ("sampling_steps", "guidance"):
        given = getattr(args, key)
        settings[key] = defaults[key] if given is None else given
    content = "\n".join(prompts).encode()  # a file that has changed makes another run
    settings["prompts_crc32"] = f"{zlib.crc32(content):08x}"
    settings["checkpoint_crc32"] = fingerprint(pipe)
    with locked(args.out):
        open_run(args.out, settings)
        total = generate(pipe, prompts, settings, args.out, args.batch_size or min(64, defaults["batch_size"]))
    print(f"{args.out}: {total} images of {len(prompts)} prompts. Next: python -m minialign.label {args.out}")


if __name__ == "__main__":
    run_command(main)
