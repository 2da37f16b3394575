"""The prompt grammar: sentences, categories, held-out combinations, contrastive prompts and noisy captions."""

import random
from collections import Counter

from minialign.prompts import ATTRIBUTES, CATEGORIES, SHAPES, Prompt, all_prompts, contrastive, corrupt, parse, split


def test_sentences_and_their_parse():
    assert Prompt("count", "circle", count="two").text == "two circles"
    assert Prompt("count", "star", count="one").text == "one star"
    assert Prompt("color", "apple", color="red").text == "a red apple"
    assert Prompt("background", "owl", background="at night").text == "an owl at night"
    assert Prompt("combination", "dog", "three", "blue", "in the city").text == "three blue dogs in the city"
    texts = [prompt.text for prompt in all_prompts(SHAPES)]
    assert len(texts) == len(set(texts)) == 16 * 3 + 256
    assert all(parse(prompt.text, SHAPES) == prompt for prompt in all_prompts(SHAPES))
    assert parse("a green circle", SHAPES) is None


def test_unseen_prompts_are_new_combinations_of_seen_words():
    seen, unseen, others = split(SHAPES)
    assert Counter([*seen, *unseen, *others]) == Counter(all_prompts(SHAPES))
    shares = [Counter(prompt.category for prompt in prompts) for prompts in (unseen, others)]
    assert shares[0] == {"count": 4, "color": 4, "background": 4, "combination": 64}
    assert shares[1] == {"count": 2, "color": 2, "background": 2, "combination": 32}
    for attribute in ATTRIBUTES:
        assert {getattr(p, attribute) for p in unseen} <= {getattr(p, attribute) for p in seen}
    assert split(SHAPES) == (seen, unseen, others) and split(SHAPES, seed=1) != (seen, unseen, others)


def test_contrastive_prompts_differ_in_what_the_prompt_says():
    rng = random.Random(0)
    for prompt in all_prompts(SHAPES):
        others = contrastive(prompt, 7, SHAPES, rng)
        assert len(set(others)) == 7 and prompt not in others
        assert {other.category for other in others} == {prompt.category}
    few = contrastive(Prompt("count", "circle", count="two"), 99, SHAPES, rng)
    assert len(few) == 15


def test_noisy_captions_are_wrong_as_often_as_asked():
    rng = random.Random(0)
    prompt = Prompt("combination", "circle", "two", "red", "at night")
    wrong = Counter()
    for _ in range(4000):
        noisy = corrupt(prompt, dict.fromkeys(ATTRIBUTES, 0.3), SHAPES, rng)
        wrong.update(a for a in ATTRIBUTES if getattr(noisy, a) != getattr(prompt, a))
    assert all(abs(wrong[a] / 4000 - 0.3) < 0.03 for a in ATTRIBUTES)
    assert corrupt(prompt, {}, SHAPES, rng) == prompt and CATEGORIES[-1] == prompt.category
