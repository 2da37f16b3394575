"""Stage 2 on as many labels as the paper's, from features that are cached: pytest bench/test_reward.py

30,000 labelled pairs of the paper's seen prompts with made-up features of ViT-L/14's width: a prompt's embedding is the
sum of its words', an image's that of the words it shows, among noise. What is timed is all that the command does once
the features are there: reading store and cache, two trainings (with and without the auxiliary loss), measuring,
drawing the diagram, writing.
"""

import hashlib
import random
import statistics
import time
from functools import partial

import pytest
import torch
from report import against_goal

from minialign import CLIP
from minialign.data.cache import clip_digest
from minialign.engine.settings import defaults
from minialign.feedback import FeedbackStore
from minialign.files import write_tensors
from minialign.models.clip import TEXT_SETTINGS, VISION_SETTINGS
from minialign.pages.cards import reward_table
from minialign.prompts import ATTRIBUTES, PAPER, exchange, recognise, split
from minialign.reward import learn, train

PAIRS, WIDTH = 30_000, 768
SETTINGS = defaults(bundled=False) | {"clip": None}


def made_up_run(folder, clip):
    """A run of PAIRS images that show their prompt, or one with other words, and their features in the cache."""
    rng, g = random.Random(0), torch.Generator().manual_seed(0)
    words = {word: torch.randn(WIDTH, generator=g) for a in ATTRIBUTES for word in PAPER.words(a)}

    def embedding(prompt):
        vectors = [words[word] for a in ATTRIBUTES if (word := getattr(prompt, a)) is not None]
        return torch.stack(vectors).sum(0) / len(vectors) ** 0.5

    (folder / "images").mkdir(parents=True)
    seen, rows, verdicts, keys, features = split(PAPER).seen, [], [], [], []
    for i in range(PAIRS):
        prompt = shown = seen[i % len(seen)]
        if rng.random() < 0.5:
            shown = exchange(prompt, rng.choice([a for a in ATTRIBUTES if getattr(prompt, a)]), PAPER, rng)
        (folder / "images" / f"{i}.png").write_text(str(i))  # never opened: what it shows is in the cache
        rows.append((prompt.text, f"images/{i}.png", i))
        verdicts.append("good" if (shown == prompt) == (rng.random() < 0.9) else "bad")  # people err
        keys.append(hashlib.sha256(str(i).encode()).digest())
        features.append(embedding(shown) + 0.7 * torch.randn(WIDTH, generator=g))
    for text in dict.fromkeys(row[0] for row in rows):  # contrastive ones are among them
        keys.append(hashlib.sha256(b"text\0" + text.encode()).digest())
        features.append(embedding(recognise(text)[0]))
    store = FeedbackStore(folder)
    store.add_images(rows)
    store.add_labels("made up", [(image.id, verdict) for image, verdict in zip(store.images(), verdicts)])
    store.close()
    tensors = {"clip": torch.tensor(list(clip_digest(clip)), dtype=torch.uint8), "features": torch.stack(features)}
    tensors["keys"] = torch.tensor([list(key) for key in keys], dtype=torch.uint8)
    write_tensors(folder / "cache" / "features.safetensors", tensors)


@pytest.mark.slow
@pytest.mark.usefixtures("host")
def test_learning_from_the_papers_number_of_labels(benchmark, tmp_path, monkeypatch):
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = {"text_config": TEXT_SETTINGS | small, "vision_config": VISION_SETTINGS | small, "projection_dim": WIDTH}
    clip = CLIP(config).eval().requires_grad_(False)
    clip.preprocessing, clip.tokenizer = {}, CLIP.from_pretrained().tokenizer
    made_up_run(tmp_path, clip)
    wholes, trainings = [], []

    def timed(call, times, *args):
        begin = time.perf_counter()
        result = call(*args)
        times.append(time.perf_counter() - begin)
        return result

    monkeypatch.setattr("minialign.reward.train", partial(timed, train, trainings))
    command = partial(timed, learn, wholes, tmp_path, clip, SETTINGS, lambda row: None)
    print(f"\n{reward_table(benchmark.pedantic(command, rounds=5))}")
    whole, *both = (statistics.median(times) for times in (wholes, trainings[::2], trainings[1::2]))
    parts = [f"{seconds:.1f} s for {SETTINGS['reward_steps']} steps" for seconds in both]
    benchmark.extra_info |= {
        "work": f"the reward command on {PAIRS:,} labels, features cached",
        "note": f"{whole:.1f} s (goal in seconds: {against_goal(whole, 60, most=True)}): "
        f"with the auxiliary loss {parts[0]}, "
        f"without it {parts[1]}, all else {whole - sum(both):.1f} s; {torch.get_num_threads()} threads",
    }
    print(benchmark.extra_info["note"])
