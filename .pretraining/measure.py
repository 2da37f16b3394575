# ruff: noqa
"""What a checkpoint of the embedded world is worth: measure.py CHECKPOINT [IMAGES]

CHECKPOINT: a folder in the diffusers layout, or a work folder of minialign.shapes.pretrain, of which the newest parts are
taken (finished stages, else the newest checkpoint's averages). Without a UNet only reconstructions are measured.
"""

import json, math, random, sys, tempfile
from collections import defaultdict
from pathlib import Path
import numpy as np, torch
from minialign.diffusion import NoiseSchedule
from minialign.engine.checkpoints import checkpoints
from minialign.files import read_weights
from minialign.measures import frechet_distance
from minialign.models.clip import CLIP, TextEncoder
from minialign.models.reward import embed_images
from minialign.models.unet import UNet
from minialign.models.vae import VAE
from minialign.pipeline import Pipeline
from minialign.prompts import SHAPES, all_prompts, spread, split
from minialign.shapes import annotator, pretrain as P
from minialign.shapes.scenes import draw, sample_scene
from minialign.shapes.world import shown

torch.set_num_threads(1)
torch.set_grad_enabled(False)


def newest(folder, ema):
    """Name -> tensor of a stage: its final weights, else those of its newest checkpoint."""
    if (folder / "final.safetensors").exists():
        return {k: v.float() for k, v in read_weights(folder / "final.safetensors").items()}, "final"
    places = checkpoints(folder)
    if not places:
        return None, None
    found = {}
    for part in places[-1].glob("*.safetensors"):
        found |= read_weights(part)
    prefix = "ema." if ema and any(k.startswith("ema.") for k in found) else "model."
    return {k[len(prefix) :]: v for k, v in found.items() if k.startswith(prefix)}, places[-1].name


def assemble(out):
    vae, clip, unet = VAE(P.VAE_CONFIG), CLIP(P.clip_config(P.make_tokenizer())), UNet(P.UNET_CONFIG)
    weights, step = newest(out / "vae", False)
    vae.load_state_dict(weights)
    if step == "final":
        vae.quant_conv.bias[P.CHANNELS :] += 2 * math.log(P.POSTERIOR)
    told = [f"vae {step}"]
    weights, step = newest(out / "decoder", False)
    if weights:
        torch.nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}).load_state_dict(weights)
        told.append(f"decoder {step}")
    packed, latents = Path(__file__).with_name("state.json"), out / "latents.safetensors"
    factor = read_weights(latents)["factor"].item() if latents.exists() else json.loads(packed.read_text())["factor"]
    vae.scaling_factor = vae.config["scaling_factor"] = factor
    weights, step = newest(out / "clip", False)
    if weights:
        clip.load_state_dict(weights)
        told.append(f"clip {step}")
    clip.tokenizer, clip.preprocessing = P.make_tokenizer(), P.PREPROCESSOR_CONFIG
    text = TextEncoder(clip.config["text_config"]).eval()
    text.text_model.load_state_dict(clip.text_model.state_dict())
    for stage in ("noisy", "unet"):
        weights, step = newest(out / stage, True)
        if weights:
            unet.load_state_dict(weights)
            told.append(f"{stage} {step}")
            break
    print("parts:", ", ".join(told))
    pipe = Pipeline(unet.eval(), vae.eval(), text, P.make_tokenizer(), NoiseSchedule.from_config(P.SCHEDULER_CONFIG))
    return pipe, clip.eval(), bool(weights)


def psnr(pipe, drawings):
    a = torch.from_numpy(np.stack([np.asarray(i) for i in drawings])).float()
    z = pipe.encode_images(drawings)[0]
    images = [i for part in z.split(50) for i in pipe.decode(part)]
    b = torch.from_numpy(np.stack([np.asarray(i) for i in images])).float()
    mse = (a - b).square().flatten(1).mean(1)
    return images, (10 * torch.log10(255**2 / mse)).mean().item(), 10 * math.log10(255**2 / mse.mean().item()), z


def calibrate(pipe):
    """The annotator's statistics, of drawings and their reconstructions by this VAE."""
    r = random.Random(2)
    own = [sample_scene(None, r) for _ in range(400)]
    mine = [draw(s, r) for s in own]
    table = annotator.calibrate(mine + psnr(pipe, mine)[0], own * 2)
    annotator.STATISTICS = Path(tempfile.mkdtemp()) / "annotator.json"
    annotator.STATISTICS.write_text(json.dumps(table))


def main():
    folder, number = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 480
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else 10
    if (folder / "model_index.json").exists():
        pipe, clip, has = Pipeline.from_pretrained(folder), CLIP.from_pretrained(folder / "clip"), True
        annotator.STATISTICS = folder / "annotator.json"
    else:
        pipe, clip, has = assemble(folder)
    rng = random.Random(987_654)
    scenes = [sample_scene(None, rng) for _ in range(240)]
    drawings = [draw(s, rng) for s in scenes]
    images, mean_db, all_db, z = psnr(pipe, drawings)
    print(
        f"reconstructions: {mean_db:.2f} dB (mean over images), {all_db:.2f} dB (of the mean error), latents std {z.std():.2f}"
    )
    if not (folder / "model_index.json").exists():
        calibrate(pipe)
    for name, pictures in (("drawings", drawings), ("reconstructions", images)):
        right = defaultdict(list)
        for s, i in zip(scenes, pictures):
            right[s.object].append(annotator.read(i) == s)
        print(
            f"annotator right on {name}:",
            {k: round(float(np.mean(v)), 3) for k, v in right.items()},
            round(float(np.mean([x for v in right.values() for x in v])), 3),
        )
    prompts = [p for p in all_prompts(SHAPES) if p.category == "combination"]
    texts = torch.nn.functional.normalize(clip.encode_text(clip.tokenizer([p.text for p in prompts])), dim=1)
    best = (torch.nn.functional.normalize(clip.encode_image(clip.preprocess(drawings)), dim=1) @ texts.T).argmax(1)
    said = [sample_scene(prompts[i], random.Random(0)) for i in best.tolist()]
    print(
        "CLIP right:",
        {
            a: round(float(np.mean([getattr(x, a) == getattr(y, a) for x, y in zip(said, scenes)])), 3)
            for a in ("count", "color", "object", "background")
        },
    )
    if not has:
        return
    held = ("heart", "cross")
    parts = split(SHAPES, 21)
    whole = [*parts.seen, *parts.new_combinations] if hasattr(parts, "seen") else [*parts[0], *parts[1]]
    groups = {
        "known objects": [p for p in whole + [*parts[-1]] if p.object not in held],
        "new objects": [p for p in all_prompts(SHAPES) if p.object in held],
    }
    rng = random.Random(5)
    asked = [
        (g, t)
        for g, ps in groups.items()
        for t in spread([p.text for p in ps], [p.category for p in ps], number // 2, rng)
    ]
    made = [
        i
        for k in range(0, len(asked), 40)
        for i in pipe.generate(
            [t for _, t in asked[k : k + 40]],
            steps=steps,
            guidance=float(sys.argv[4]) if len(sys.argv) > 4 else 3.0,
            seed=1000 + k,
        )
    ]
    index = {p.text: p for p in all_prompts(SHAPES)}
    rows = defaultdict(list)
    words = defaultdict(list)
    for (g, t), i in zip(asked, made):
        p, s = index[t], annotator.read(i)
        for key in ("all", g, p.category):
            rows[key].append((s is not None, s is not None and s.shows(p)))
        if s is not None:
            words["object"].append(s.object == p.object)
            for a in ("count", "color", "background"):
                if getattr(p, a):
                    w = SHAPES.counts[s.count - 1] if a == "count" else getattr(s, a)
                    words[a].append(w == getattr(p, a))
            if not p.count:
                words["one where a"].append(s.count == 1)
    for key, v in rows.items():
        print(
            f"{key:15} n {len(v):4} readable {np.mean([a for a, _ in v]):.3f} aligned {np.mean([b for _, b in v]):.3f}"
        )
    print("words right where readable:", {k: round(float(np.mean(v)), 3) for k, v in words.items()})
    again = shown(made, 0)
    pairs = [(a, b) for a, b in zip(made, again) if b is not None]
    a, b = (embed_images(clip, list(x)) for x in zip(*pairs))
    other = embed_images(clip, [i for i in shown([b for _, b in pairs], 9)])
    print(
        f"Frechet to what is shown {frechet_distance(a, b):.3f}, floor {frechet_distance(b, other):.3f}, n {len(pairs)}"
    )
    sheet = __import__("PIL.Image").Image.new("RGB", (64 * 12, 64 * 6))
    for k, i in enumerate(made[:36] + made[number // 2 : number // 2 + 36]):
        sheet.paste(i, (64 * (k % 12), 64 * (k // 12)))
    sheet.resize((64 * 24, 64 * 12)).save("sheet.png")


if __name__ == "__main__":
    main()
