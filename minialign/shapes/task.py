"""The main job on the embedded world: prompts of the SHAPES grammar, the simulated annotator, fresh drawings."""

from __future__ import annotations

import random
from collections.abc import Sequence

from PIL import Image

from ..prompts import CATEGORIES, SHAPES, Prompt, all_prompts, contrastive, corrupt, parse, split
from ..runs import SIMULATED
from ..task import Task, TestItem, noise_seed
from .annotator import judge
from .scenes import draw, sample_scene

# Pre-training captions name the object, but say another count, color or background with this probability: what the
# paper's models get wrong too. Backgrounds are learned most easily. Without the object's name a small model draws
# in-between shapes.
CAPTION_NOISE = {"count": 0.4, "color": 0.4, "background": 0.6}


def shapes_task(images: int, labels: int, test_images: int, pretrain_images: int, seed: int) -> Task:
    """Draw `images` for the seen prompts, label `labels` of them, test on `test_images` of seen and unseen prompts.

    `seed` decides which prompts are seen, unseen and others (`split`): only seen ones get feedback, and the captions of
    the pre-training pairs are others, noisy as in the pre-training. Feedback and tests are spread evenly over the
    categories.
    """
    seen, unseen, others = split(SHAPES, seed)
    rng = random.Random(seed)
    drawn = [prompt.text for prompt in _spread(seen, images, rng)]
    test: list[TestItem] = []
    for name, prompts in (("seen", seen), ("unseen", unseen)):
        for prompt in _spread(prompts, test_images // 2, rng):
            test.append(TestItem(prompt.text, noise_seed(seed, len(test), test=True), (prompt.category, name)))

    def contrastive_texts(text: str, number: int, rng: random.Random) -> list[str]:
        return [other.text for other in contrastive(_parse(text), number, SHAPES, rng)]

    def judge_texts(pictures: Sequence[Image.Image], texts: Sequence[str]) -> list[str]:
        return judge(pictures, [_parse(text) for text in texts])

    def pretrain() -> list[tuple[str, Image.Image]]:
        rng = random.Random(seed + 1)
        pairs = []
        for caption in rng.choices(others, k=pretrain_images):
            shown = corrupt(caption, CAPTION_NOISE, SHAPES, rng)  # mistakes are as likely in either direction
            pairs.append((caption.text, draw(sample_scene(shown, rng), rng)))
        return pairs

    def reference() -> list[Image.Image]:
        rng = random.Random(seed + 2)
        return [draw(sample_scene(_parse(item.prompt), rng), rng) for item in test]

    return Task(
        contrastive_texts,
        test,
        draw=[(text, noise_seed(seed, i)) for i, text in enumerate(drawn)],
        labels=labels,
        judge=judge_texts,
        judge_name=SIMULATED,
        pretrain=pretrain,
        reference=reference,
    )


def _parse(text: str) -> Prompt:
    prompt = parse(text, SHAPES)
    if prompt is None:
        raise ValueError(f"{text!r} is not a prompt of the embedded world, such as {all_prompts(SHAPES)[-1].text!r}")
    return prompt


def _spread(prompts: list[Prompt], number: int, rng: random.Random) -> list[Prompt]:
    """`number` prompts, every category equally often and within it every prompt."""
    chosen = []
    for i, category in enumerate(CATEGORIES):
        pool = [prompt for prompt in prompts if prompt.category == category]
        share = number // len(CATEGORIES) + (i < number % len(CATEGORIES))
        rounds = [rng.sample(pool, len(pool)) for _ in range(-(-share // len(pool)))]
        chosen += [prompt for one in rounds for prompt in one][:share]
    return chosen
