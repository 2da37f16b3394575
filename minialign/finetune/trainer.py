"""Stage 3 of a run: encode its images and prompts once, fine-tune the UNet, write the fine-tuned model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..data import ImageFiles, Pair, Skipped, image_pairs, source_digest
from ..data.cache import Cache, Entries, encode_pairs, encode_texts
from ..engine.processes import barrier, gather_weights, gathered, is_main_process, processes
from ..engine.run import Run, digest, file_digest
from ..feedback import FeedbackStore
from ..files import InputError, atomic, read_weights
from ..generate import sample_images
from ..models.lora import add_lora, load_lora, merge_lora, save_lora
from ..pipeline import Pipeline
from ..reward import REWARDS
from ..shapes.world import WORLD, pretraining_pairs
from .batches import Latents, TrainingData
from .loop import FineTuning, finetune
from .weights import WEIGHTINGS

SHOWN = 8  # images of a validation grid
Validation = Callable[[Pipeline], Callable[[int], None]]


def finetune_run(
    run: Run,
    settings: dict[str, Any],
    load: Callable[[], Pipeline],
    validated: Sequence[tuple[str, int]],
    redo: bool = False,
    cache: Path | None = None,
) -> None:
    """Stage 3 of a run, unless it is done: RUN/model, and adapters in RUN/lora.safetensors.

    load: the run's model. validated: (prompt, seed) of the images that --validate-every shows. cache: the folder of
    latents and contexts, in the run unless given.
    """

    def inputs() -> dict[str, str]:
        made_from = {"rewards": file_digest(run.folder / REWARDS), "model": run.config["model_digest"]}
        if settings["pretrain"] is not None:
            made_from["pre-training pairs"] = digest(source_digest(settings["pretrain"], settings["seed"]))
        return made_from

    def validation(pipe: Pipeline) -> Callable[[int], None]:
        return lambda step: show(pipe, validated, settings, run.folder / "validation" / f"step-{step}.png")

    why = "the UNet learns the model's own images again, those with a higher reward more often"
    with run.stage("finetune", why, settings, inputs, redo=redo, together=True) as todo:
        if todo:
            paths, prompts = gathered(stored_images(run.folder) if is_main_process() else ([], []))[0]
            pretrain: str | Sequence[Pair] | None = settings["pretrain"]
            if run.world == WORLD and pretrain is None:
                captions, drawings = zip(*pretraining_pairs(settings["pretrain_images"], settings["seed"]))
                pretrain = image_pairs(drawings, captions)
            identity = gathered(digest(json.dumps(run.stages["finetune"]["made_from"])) if is_main_process() else "")[0]
            finetune_pipeline(
                load, image_pairs(ImageFiles(paths), prompts), model_weights(run.folder, settings), pretrain, settings,
                run.folder, cache or run.folder / "cache", run.log("finetune"), validation, identity,
            )  # fmt: skip


def stored_images(folder: Path) -> tuple[list[Path], list[str]]:
    """The files and the prompts of all images of a run."""
    store = FeedbackStore(folder, read_only=True)
    try:
        images = store.images()
    finally:
        store.close()
    return [image.path for image in images], [image.prompt for image in images]


def model_weights(folder: Path, settings: dict[str, Any]) -> Tensor:
    """The weight (N,) of each image of a run: `--weighting` of its reward. InputError where none weighs anything."""
    weighting = WEIGHTINGS[settings["weighting"]]
    weight = weighting.weight(read_weights(folder / REWARDS)["reward"], settings["tau"] or weighting.tau)
    if not weight.any() or not weight.isfinite().all():
        tau = "" if settings["tau"] is None else f" --tau {settings['tau']}"
        raise InputError(
            f"--weighting {settings['weighting']}{tau}: no image weighs anything; accepted: another --weighting, --tau "
            "or --reward"
        )
    return weight


def finetune_pipeline(
    load: Callable[[], Pipeline],
    images: Sequence[Pair],
    weight: Tensor,
    pretrain: str | Sequence[Pair] | None,
    settings: dict[str, Any],
    folder: Path,
    cache: Path,
    log: Callable[[dict[str, Any]], None],
    validation: Validation,
    identity: str = "",
) -> None:
    """Fine-tune a model on its own images (N) with their weights (N,), and write `folder`/model.

    pretrain: pre-training pairs, or a source of them (`read_pairs`); None: the model's own images, all weighing one,
    hold it in place. validation: makes what is called every `validate_every` steps. identity: stands for the model and
    the images, so that no checkpoint of another training is continued.
    """
    pipe = load()
    data = encode(pipe, images, weight, pretrain, settings, folder, cache)
    dtype = getattr(torch, settings["dtype"])
    pipe.unet.requires_grad_(True)
    if settings["lora"]:
        pipe.unet.to(dtype)  # what is frozen may be as short as the arithmetic
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings["seed"])  # the same adapters in all processes
            for p in add_lora(pipe.unet, settings["lora"]):
                p.data = p.data.float()
    pipe.unet.checkpointing = settings["gradient_checkpointing"]
    if settings["compile"]:
        pipe.unet.compile()
    names = {field.name for field in fields(FineTuning)} & settings.keys()
    fine_tuning = FineTuning(**{name: settings[name] for name in names} | {"dtype": dtype, "identity": identity})
    finetune(pipe.unet, pipe.schedule, data, folder / "checkpoints", fine_tuning, log=log, validate=validation(pipe))
    gather_weights(pipe.unet)
    if is_main_process():
        if settings["lora"]:  # merged into the weights as they were stored
            save_lora(pipe.unet, folder / "lora.safetensors")
            pipe = load()
            load_lora(pipe.unet, folder / "lora.safetensors")
            merge_lora(pipe.unet)
        pipe.card = ""  # the base model's; this model's is written after its evaluation
        card = folder / "model" / "README.md"
        with atomic(folder / "model", replace_folder="model_index.json") as temporary:
            pipe.save_pretrained(temporary)
            if card.is_file():  # what its maker has filled in
                (temporary / card.name).write_bytes(card.read_bytes())


def encode(
    pipe: Pipeline,
    images: Sequence[Pair],
    weight: Tensor,
    pretrain: str | Sequence[Pair] | None,
    settings: dict[str, Any],
    folder: Path,
    cache: Path,
) -> TrainingData:
    """Latents of all images and contexts of all their prompts, computed once and kept in the folder `cache`."""
    process = processes()
    kept = torch.float32 if settings["dtype"] == "float32" else torch.float16
    options: dict[str, Any] = {"batch": settings["sampling_batch_size"], "dtype": kept, "process": process}
    sources = [encode_pairs(pipe, images, cache, **options)]
    if isinstance(pretrain, str):
        skipped = Skipped(folder / "skipped.jsonl", process)
        sources.append(encode_pairs(pipe, pretrain, cache, **options, skipped=skipped, seed=settings["seed"]))
    elif pretrain is not None:
        sources.append(encode_pairs(pipe, pretrain, cache, **options))
    barrier()
    encoded = Cache(cache)
    sources = [entries.kept(encoded) for entries in sources]
    texts = list(dict.fromkeys(text for entries in sources for text in entries.captions))
    keys = encode_texts(pipe, texts, cache, **options)
    barrier()
    row = {text: i for i, text in enumerate(texts)}

    def latents(entries: Entries) -> Latents:
        rows = torch.tensor([row[text] for text in entries.captions])
        mean, std = (encoded.rows(name, entries.keys) for name in ("mean", "std"))
        return Latents(mean, std, rows, entries.names)

    model, pairs = latents(sources[0]), latents(sources[-1])
    return TrainingData(Cache(cache).context(keys), model, weight, pairs)


def show(pipe: Pipeline, items: Sequence[tuple[str, int]], settings: dict[str, Any], path: Path) -> None:
    """Sample the first (prompt, seed) items with the UNet as it is into one image; all processes call it."""
    sampling = {"steps": settings["sampling_steps"], "guidance": settings["guidance"]}
    items = items[:SHOWN]
    images = list(sample_images(pipe, items, **sampling, batch=len(items), title="validate"))
    if is_main_process():
        with atomic(path) as temporary:
            grid(images, columns=4).save(temporary, format="PNG")


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images of one size, side by side in rows."""
    width, height = images[0].size
    sheet = Image.new("RGB", (min(columns, len(images)) * width, -(-len(images) // columns) * height))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet
