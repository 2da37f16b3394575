"""Inputs that several test modules share."""

import json
import random
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minialign import Pipeline
from minialign.engine.commands import run_command
from minialign.engine.run import FORMAT
from minialign.feedback import FeedbackStore
from minialign.prompts import SHAPES, all_prompts
from minialign.shapes.scenes import draw, sample_scene

# the main job in seconds; its numbers mean nothing
SMALL = {
    "images": 32, "labels": 24, "hidden": 32, "reward_steps": 20, "steps": 6, "batch_size": 8, "learning_rate": 1e-4,
    "warmup": 1, "pretrain_images": 8, "test_images": 24, "sampling_steps": 3, "checkpoint_every": 3,
}  # fmt: skip


def flags(settings: dict[str, Any], *names: str) -> list[str]:
    """Settings, the named ones or all, as words of a command line."""
    chosen = {key: settings[key] for key in names or settings}
    return [word for key, value in chosen.items() for word in (f"--{key.replace('_', '-')}", str(value))]


def command(main: Callable[[], None], capsys: Any, *arguments: Any) -> tuple[int, str, str]:
    """A command's exit code, output and errors."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["minialign", *map(str, arguments)])
        patch.setenv("TQDM_DISABLE", "1")
        run_command(main)
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@cache
def _own_images() -> list[tuple[str, Image.Image]]:
    """Twelve prompts, each with an image that the bundled model makes."""
    prompts = ["a red circle", "two blue stars on the sand", "a square at night"] * 4
    return list(zip(prompts, Pipeline.from_pretrained().generate(prompts, steps=2, guidance=2.0)))


def own_images(folder, good: bool = True):
    """A label file beside a few images drawn by the bundled model."""
    folder.mkdir(exist_ok=True)
    lines = []
    for i, (prompt, image) in enumerate(_own_images()):
        image.save(folder / f"{i}.png")
        label = "good" if good and i % 3 == i % 2 else "bad"
        lines.append(json.dumps({"prompt": prompt, "image": f"{i}.png", "label": label}))
    (folder / "labels.jsonl").write_text("\n".join(lines))
    return folder / "labels.jsonl"


def pretraining_pairs(folder, number=6):
    """A folder in the hub's imagefolder convention."""
    folder.mkdir()
    rows = []
    for i in range(number):
        drawn = np.random.default_rng(i).integers(0, 255, (80, 100, 3), dtype=np.uint8)
        Image.fromarray(drawn).save(folder / f"{i}.jpg")
        rows.append(json.dumps({"file_name": f"{i}.jpg", "text": f"noise number {i % 3}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def labelled_drawings(folder: Path) -> Path:
    """A run of 48 drawings of 16 prompts that show their prompt or another one; all but four have true labels."""
    (folder / "images").mkdir(parents=True)
    rng = random.Random(0)
    prompts = [prompt for prompt in all_prompts(SHAPES) if prompt.category == "color"]
    rows, verdicts = [], []
    for i in range(48):
        shown = rng.choice((prompts[i % 16], rng.choice(prompts)))
        scene = sample_scene(shown, rng)
        draw(scene, rng).save(folder / "images" / f"{i}.png")
        rows.append((prompts[i % 16].text, f"images/{i}.png", i))
        verdicts.append("good" if scene.shows(prompts[i % 16]) else "bad")
    store = FeedbackStore(folder)
    store.add_images(rows)
    store.add_labels("truth", [(image.id, verdict) for image, verdict in zip(store.images(), verdicts) if image.id > 4])
    store.close()
    (folder / "config.json").write_text(json.dumps({"minialign": "0", "format": FORMAT, "world": "shapes"}))
    return folder
