# ruff: noqa
"""What fine-tuning without any reward does to readability: probe.py MODE RATE STEPS [IMAGES] [WORK FOLDER]

MODE: base (measure alone, guidance 1 and 3), own (the model's own images, all alike) or drawings (with noisy captions). The
model is the bundled one, or the newest state of a work folder.
"""

import collections, random, sys, time
from pathlib import Path
import torch
from torch import nn
from measure import assemble, calibrate
from minialign.engine.optimising import generator, learning_rate
from minialign.finetune.loop import step_loss
from minialign.pipeline import Pipeline
from minialign.prompts import SHAPES, parse, spread
from minialign.shapes import annotator, world

torch.set_grad_enabled(True)  # measure.py turns it off
mode, rate, steps = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
number, rows = int(sys.argv[4]) if len(sys.argv) > 4 else 640, 32
torch.set_num_threads(2)
if len(sys.argv) > 5:
    with torch.no_grad():
        calibrate(pipe := assemble(Path(sys.argv[5]))[0])
else:
    pipe = Pipeline.from_pretrained(annotator.STATISTICS.parent)
seen, held_out = world.prompts(21)
spreads = lambda texts, n: spread(texts, [parse(t, SHAPES).category for t in texts], n, random.Random(1))


@torch.no_grad()
def make(texts, seed, guidance=3.0):
    parts = range(0, len(texts), 40)
    return [i for k in parts for i in pipe.generate(texts[k : k + 40], steps=10, guidance=guidance, seed=seed + k)]


def fault(image):
    found = annotator.segment(image)
    if found is None:
        return "empty or not clean"
    shapes = {annotator._shape(region.numbers) for region in found[1]}
    return "no shape" if None in shapes else "several shapes" if len(shapes) > 1 else "too many"


def measure(tag, guidance=3.0):
    texts = spreads(seen, 120) + spreads(held_out, 120)
    faults, seen_as = collections.Counter(), collections.defaultdict(list)
    for text, image in zip(texts, make(texts, 5000, guidance)):
        prompt, scene = parse(text, SHAPES), annotator.read(image)
        for key in ("all", prompt.category):
            seen_as[key].append((scene is not None, scene is not None and scene.shows(prompt)))
        if scene is None:
            faults[fault(image)] += 1
    table = {k: "%.3f/%.3f" % tuple(sum(x) / len(v) for x in zip(*v)) for k, v in seen_as.items()}
    print(tag, "guidance", guidance, "readable/aligned", table, dict(faults), flush=True)


if mode == "base":
    measure("base", 1.0), measure("base")
    sys.exit()
if mode == "drawings":
    texts, images = zip(*world.pretraining_pairs(number, 21))
else:
    texts = spreads(seen, number)
    images = make(texts, 100)
with torch.no_grad():
    latents = pipe.encode_images(list(images))[0]
    known = [*sorted(set(texts)), ""]
    context, row = pipe.text_encoder(pipe.tokenizer(known)), torch.tensor([known.index(t) for t in texts])
unet = pipe.unet.requires_grad_(True)
optimizer = torch.optim.AdamW(unet.parameters(), rate, weight_decay=1e-2)
for step in range(steps):
    g = generator(5, 3, step)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps, rate, 20, "cosine")
    chosen = torch.randint(len(latents), (rows,), generator=g)
    words = row[chosen].clone()
    words[torch.rand(rows, generator=g) < 0.1] = len(known) - 1
    t, noise = torch.randint(0, 1000, (rows,), generator=g), torch.randn(latents[chosen].shape, generator=g)
    loss = step_loss(unet, pipe.schedule, latents[chosen], noise, t, [context[words]], torch.ones(rows))[0]
    loss.backward()
    nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
unet.requires_grad_(False)
measure(f"{mode} {rate} {steps}")
