"""What a run of the main job is about: which images are judged, by whom, and on what the result is tested.

`finetune.py` runs the method on any `Task`. The embedded world's is in shapes/task.py; `own_task` is made of a file of
labels that people gave.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from .feedback import count_votes, read_feedback


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


LAST_SEED = 20_000  # of a run: beyond, noise seeds would not fit the 32 bits that a CPU generator uses of them


def noise_seed(run_seed: int, i: int, *, test: bool = False) -> int:
    """The seed of a run's i-th starting noise; no two runs share one, nor feedback and test (i below 100,000)."""
    return 1_000_000 + 200_000 * run_seed + 100_000 * test + i


def own_task(feedback: Path, test_images: int, seed: int) -> Task:
    """A task from a label file (see `read_feedback`); contrastive prompts are the file's other prompts.

    With nobody to judge new images, the reward model judges them, and the images labelled good are the reference.
    """
    rows = read_feedback(feedback)
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
