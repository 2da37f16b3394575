"""What a run of the main job is about: which images are judged, by whom, and on what the result is tested.

`finetune.py` runs the method on any `Task`. The embedded world's is in shapes/task.py; `own_task` is made of a file of
labels that people gave.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from .feedback import FeedbackStore, count_votes, read_feedback
from .models.pretrained import InputError
from .training import gathered, leading


@dataclass(frozen=True)
class TestItem:
    """One image of the evaluation: drawn from `seed` before and after; `groups` such as ("count", "seen")."""

    prompt: str
    seed: int
    groups: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """Everything the main job needs besides a pipeline and a CLIP model."""

    contrastive: Callable[[str, int, random.Random], list[str]]  # prompts with other semantics than one
    test: list[TestItem]
    draw: list[tuple[str, int]] = field(default_factory=list)  # (prompt, seed) to draw for feedback
    given: list[tuple[str, Path, str]] = field(default_factory=list)  # or (prompt, image, verdict) that are there
    labels: int = 0  # how many of the drawn images are labelled
    judge: Callable[[Sequence[Image.Image], Sequence[str]], list[str]] | None = None  # labeller of drawn images
    judge_name: str = "reward model"  # who judges alignment in the evaluation
    pretrain: Callable[[], list[tuple[str, Image.Image]]] | None = None  # captioned images like the pre-training data
    reference: Callable[[], list[Image.Image]] | None = None  # what good images look like, for the Frechet distance


NOISES = 100_000  # starting noises of a run for feedback, and as many for tests
LAST_SEED = 20_000  # of a run: beyond, noise seeds would not fit the 32 bits that a CPU generator uses of them


def noise_seed(run_seed: int, i: int, *, test: bool = False) -> int:
    """The seed of a run's i-th starting noise; no two runs share one, nor feedback and test (i below NOISES)."""
    return 1_000_000 + NOISES * (2 * run_seed + test) + i


def own_task(feedback: Path, test_images: int, seed: int) -> Task:
    """A task from a label file (see `read_feedback`) or a run's store; contrastive prompts are the other prompts there.

    A store's unlabelled images are taken too, to be scored. With nobody to judge new images, the reward model judges
    them, and the images labelled good are the reference.
    """
    read = stored_feedback if feedback.is_dir() else read_feedback
    rows = gathered(read(feedback) if leading() else [])[0]  # one process opens the database and the images
    prompts = list(dict.fromkeys(prompt for prompt, _, _ in rows))
    good = [path for (_, path), vote in count_votes(rows).items() if vote > 0]

    def contrastive(prompt: str, number: int, rng: random.Random) -> list[str]:
        others = [other for other in prompts if other != prompt]
        return rng.sample(others, min(number, len(others)))

    def reference() -> list[Image.Image]:
        return [Image.open(path).convert("RGB") for path in good]

    order = random.Random(seed).sample(prompts, len(prompts))
    test = [TestItem(order[i % len(order)], noise_seed(seed, i, test=True), ("seen",)) for i in range(test_images)]
    return Task(contrastive, test, given=rows, reference=reference)


def stored_feedback(folder: Path) -> list[tuple[str, Path, str]]:
    """(prompt, image file, verdict) rows of a run's feedback store: what most labellers say, skip where none does."""
    if not (folder / "feedback.sqlite").is_file():
        raise InputError(f"{folder}: has no feedback.sqlite; accepted: a run's folder, or a label file")
    store = FeedbackStore(folder)
    try:
        labels, images = store.labels(), store.images()
    finally:
        store.close()
    missing = [image.path for image in images if not image.path.is_file()]
    if missing:
        raise InputError(f"{folder}: {missing[0]} is not there any more, nor are {len(missing) - 1} other images")
    if not any(labels.values()):
        raise InputError(f"{folder}: none of its {len(images)} images is labelled good; at least one is needed")
    words = {1.0: "good", 0.0: "bad", None: "skip"}
    return [(image.prompt, image.path.resolve(), words[labels.get(image.id)]) for image in images]


def next_round(task: Task, number: int, seed: int) -> Task:
    """The task again for round `number` (from 2): as many images of the same prompts, from noise not met before."""
    prompts = [text for text, _ in task.draw] or [text for text, _ in dict.fromkeys(row[:2] for row in task.given)]
    if number * len(prompts) > NOISES:
        raise InputError(f"--rounds: {number} rounds of {len(prompts)} images; accepted: {NOISES} images in all")
    fresh = [(text, noise_seed(seed, (number - 1) * len(prompts) + i)) for i, text in enumerate(prompts)]
    return replace(task, draw=fresh, given=[])
