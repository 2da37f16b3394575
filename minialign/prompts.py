"""Stage 1 of the method: the prompts people judge, and the contrastive prompts of the reward's auxiliary loss.

The prompts of Lee et al. 2023, section 3.1, name a number of objects, their color, the background, or all three. A
`Grammar` holds the words. A `Prompt` is one sentence together with its words, so that contrastive prompts (another
count, color, background or object) are found by comparing words (`contrastive_prompts`). SHAPES has the words of the
toy data set, PAPER those of prompts like the paper's.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

CATEGORIES = ("count", "color", "background", "combination")
ATTRIBUTES = ("count", "color", "object", "background")
PLURALS = {"wolf": "wolves", "box": "boxes", "cross": "crosses"}  # of objects that do not add an s


@dataclass(frozen=True)
class Grammar:
    """The words of a prompt; `backgrounds` are whole phrases such as "in the snow", `counts` start at one.

    `colored`: color prompts say "a green colored dog" in place of "a green dog". `combinations`: how many combination
    prompts are in use, drawn at random once and for all; None is all of them. `held_out`: objects without feedback.
    """

    counts: tuple[str, ...]
    colors: tuple[str, ...]
    objects: tuple[str, ...]
    backgrounds: tuple[str, ...]
    colored: bool = False
    combinations: int | None = None
    held_out: tuple[str, ...] = ()

    def words(self, attribute: str) -> tuple[str, ...]:
        """All words of one of ATTRIBUTES."""
        words: tuple[str, ...] = getattr(self, attribute + "s")
        return words


@dataclass(frozen=True)
class Prompt:
    """What a sentence asks for; None where it leaves a thing open. Without a count it speaks of one object ("a")."""

    category: str
    object: str
    count: str | None = None
    color: str | None = None
    background: str | None = None
    colored: bool = False  # says "green colored" for "green"

    @property
    def text(self) -> str:
        color = f"{self.color} colored" if self.colored else self.color
        words = [self.count or "a", color, self.object, self.background]
        if self.count not in (None, "one"):
            words[2] = PLURALS.get(self.object, self.object + "s")
        if words[0] == "a" and (self.color or self.object)[0] in "aeiou":
            words[0] = "an"
        return " ".join(word for word in words if word)


SHAPES = Grammar(
    counts=("one", "two", "three", "four"),
    colors=("red", "blue", "yellow", "purple"),
    objects=("circle", "square", "triangle", "star", "heart", "cross"),
    backgrounds=("at night", "on the grass", "in the snow", "on the sand"),
    held_out=("heart", "cross"),
)
# The templates and numbers of Lee et al. 2023: 25 objects with a count from one to six, one of nine colors, one of
# eight backgrounds, or all three; about 2,700 prompts; five objects without feedback. Which words it has is not known
# to us in full, nor which objects the five are: these are ours. So is the random choice of combinations, whose number
# gives `split` about 2,700 seen prompts.
PAPER = Grammar(
    counts=("one", "two", "three", "four", "five", "six"),
    colors=("red", "yellow", "green", "blue", "black", "pink", "purple", "white", "brown"),
    objects=(
        "dog", "cat", "bird", "tiger", "lion", "rabbit", "wolf", "bear", "horse", "car", "airplane", "bicycle", "chair",
        "clock", "cup", "vase", "plate", "box", "backpack", "cake", "donut", "apple", "orange", "rose", "tree",
    ),
    backgrounds=(
        "in the forest", "in the city", "on the moon", "in the field", "in the sea", "on the table", "in the desert",
        "in San Francisco",
    ),
    colored=True,
    combinations=4800,
    held_out=("rabbit", "airplane", "clock", "cake", "rose"),
)  # fmt: skip
GRAMMARS = (SHAPES, PAPER)  # that `recognise` knows


def all_prompts(grammar: Grammar) -> list[Prompt]:
    """Every prompt of the grammar, category by category, in a fixed order; of combinations also those not in use."""
    colored = grammar.colored
    prompts = [Prompt("count", thing, count=n) for n in grammar.counts for thing in grammar.objects]
    prompts += [Prompt("color", thing, color=c, colored=colored) for c in grammar.colors for thing in grammar.objects]
    prompts += [Prompt("background", thing, background=b) for b in grammar.backgrounds for thing in grammar.objects]
    prompts += [
        Prompt("combination", thing, count=n, color=c, background=b)
        for n in grammar.counts
        for c in grammar.colors
        for thing in grammar.objects
        for b in grammar.backgrounds
    ]
    return prompts


class Split(NamedTuple):
    """Every prompt in use, in one of four sets, see `split`."""

    seen: list[Prompt]
    new_combinations: list[Prompt]
    new_objects: list[Prompt]
    others: list[Prompt]


def split(grammar: Grammar, seed: int = 0) -> Split:
    """The prompts in use by what they are for; `seed` deals them out, whatever their category.

    Feedback is on `seen` prompts alone. Tests are on these, on `new_combinations`, whose words all are in seen prompts,
    and on `new_objects`, whose object is in none (Lee et al. 2023, section 4, tests these). Captions of pre-training
    pairs are the `others`. Of the prompts of an object with feedback 5/8 are seen, 1/4 new combinations and 1/8 others.
    Of those of a held-out object 1/8 are others too: pairs keep what pre-training taught, and that was of all objects.
    """
    rng = random.Random(seed)
    result = Split([], [], [], [])
    for category in CATEGORIES:
        prompts = [p for p in all_prompts(grammar) if p.category == category]
        if category == "combination" and grammar.combinations is not None:
            prompts = random.Random(0).sample(prompts, grammar.combinations)  # whatever the seed
        known = [prompt for prompt in prompts if prompt.object not in grammar.held_out]
        new = [prompt for prompt in prompts if prompt.object in grammar.held_out]
        rng.shuffle(known)
        rng.shuffle(new)
        quarter, eighth = len(known) // 4, len(known) // 8
        result.new_combinations.extend(known[:quarter])
        result.others.extend(known[quarter : quarter + eighth])
        result.seen.extend(known[quarter + eighth :])
        result.others.extend(new[: len(new) // 8])
        result.new_objects.extend(new[len(new) // 8 :])
    return result


def exchange(prompt: Prompt, attribute: str, grammar: Grammar, rng: random.Random) -> Prompt:
    """The same prompt with another word for `attribute`, which the prompt must fix."""
    others = [word for word in grammar.words(attribute) if word != getattr(prompt, attribute)]
    changed: dict[str, Any] = {attribute: rng.choice(others)}
    return replace(prompt, **changed)


def corrupt(prompt: Prompt, noise: Mapping[str, float], grammar: Grammar, rng: random.Random) -> Prompt:
    """A caption with mistakes: the word for each attribute is exchanged for another with probability `noise` of it."""
    for attribute, probability in noise.items():
        if getattr(prompt, attribute) is not None and rng.random() < probability:
            prompt = exchange(prompt, attribute, grammar, rng)
    return prompt


def parse(text: str, grammar: Grammar) -> Prompt | None:
    """The grammar's prompt whose text this is, or None for any other sentence."""
    return _index(grammar).get(text)


def recognise(text: str) -> tuple[Prompt, Grammar] | None:
    """The prompt of one of GRAMMARS whose text this is, and that grammar; None for any other sentence."""
    parsed = ((parse(text, grammar), grammar) for grammar in GRAMMARS)
    return next(((prompt, grammar) for prompt, grammar in parsed if prompt is not None), None)


def contrastive_prompts(text: str, number: int, others: Sequence[str], rng: random.Random) -> list[str]:
    """At most `number` of the prompts `others` with other semantics than `text`, for the prompt classification loss.

    Of a prompt of a grammar those that contradict it, with another count, color, background or object (Lee et al. 2023,
    section 3.2); what one of them leaves open does not. Any other two sentences are taken to differ.
    """
    known = recognise(text)
    different = [other for other in dict.fromkeys(others) if known is None or _differs(other, *known)]
    return rng.sample(different, min(number, len(different)))


def _differs(text: str, prompt: Prompt, grammar: Grammar) -> bool:
    parsed = parse(text, grammar)
    if parsed is None:
        return True
    words = [(getattr(parsed, attribute), getattr(prompt, attribute)) for attribute in ATTRIBUTES]
    return any(None not in both and both[0] != both[1] for both in words)


def spread(prompts: Sequence[str], categories: Sequence[str], number: int, rng: random.Random) -> list[str]:
    """`number` prompts, every category equally often and within it every prompt, in random order.

    categories[i] is the category of prompts[i]; "" is that of sentences of no grammar.
    """
    present = [category for category in (*CATEGORIES, "") if category in categories]
    chosen: list[str] = []
    for i, category in enumerate(present):
        pool = [prompt for prompt, its in zip(prompts, categories) if its == category]
        quota = number // len(present) + (i < number % len(present))
        rounds = [rng.sample(pool, len(pool)) for _ in range(-(-quota // len(pool)))]
        chosen += [prompt for one in rounds for prompt in one][:quota]
    return chosen


@cache
def _index(grammar: Grammar) -> dict[str, Prompt]:
    return {prompt.text: prompt for prompt in all_prompts(grammar)}
