"""Controls of a finished main job: python bench/controls.py runs/shapes

Fine-tunes the embedded model again on the run's own images with other weights in place of the reward: r itself,
1 for every image, and 1 - r, which must hurt; then judges each on the run's test items. Prints a Markdown table with
what the loss's optimum predicts where the prompts of the pre-training pairs are others: p(x|z) proportional to
p_0(x|z) r(x,z), so that the aligned part of the model's images grows to their part of all weight.
"""

from __future__ import annotations

import argparse
import json
import shutil
from functools import partial
from pathlib import Path

import torch

from minialign import CLIP, Pipeline, RewardModel
from minialign.data import ImageFiles
from minialign.evaluate import judge_both
from minialign.feedback import FeedbackStore
from minialign.finetune import finetune_pipeline
from minialign.models.pretrained import read_weights
from minialign.shapes.task import shapes_task
from minialign.training import write_tensors

CONTROLS = {
    "r (the method)": lambda r: r,
    "1 (plain fine-tuning)": torch.ones_like,
    "1 - r (must hurt)": lambda r: 1 - r,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("run", type=Path, help="folder of a finished run on the embedded world")
    run = parser.parse_args().run
    settings = json.loads((run / "config.json").read_text())["settings"]
    task = shapes_task(*(settings[key] for key in ("images", "labels", "test_images", "pretrain_images", "seed")))
    images = FeedbackStore(run).images()
    pictures = ImageFiles([image.path for image in images])
    prompts = [image.prompt for image in images]
    scored = read_weights(run / "cache" / "reward.safetensors")
    reward = scored["reward"]
    verdicts = task.judge(pictures, prompts)
    aligned = torch.tensor([verdict == "good" for verdict in verdicts])
    clip, judge = CLIP.from_pretrained(), RewardModel.from_pretrained(run / "reward")
    sampling = {"steps": settings["sampling_steps"], "guidance": settings["guidance"], "batch": settings["batch_size"]}
    print("| weight of a model image | predicted | gain overall, 95 % interval | on seen prompts | Fréchet distance |")
    print("| --- | --- | --- | --- | --- |")
    for name, change in CONTROLS.items():
        weight = change(reward)
        predicted = weight[aligned].sum() / weight.sum()
        folder = run / "controls" / name.split(" (")[0].replace(" ", "")
        shutil.rmtree(folder, ignore_errors=True)  # or its checkpoints would be gone on with
        write_tensors(folder / "cache" / "reward.safetensors", scored | {"reward": weight})
        pipe = Pipeline.from_pretrained()
        how = settings | {"weighting": "reward"}
        finetune_pipeline(pipe, task, pictures, prompts, how, folder, lambda row: None, run / "cache")
        judged = judge_both(
            Pipeline.from_pretrained,
            partial(Pipeline.from_pretrained, folder / "model"),
            task,
            clip,
            judge,
            sampling,
            folder,
        )  # fmt: skip
        row = [name, f"{predicted:.1%}"]
        for group in ("overall", "seen"):
            before, after = (judged["alignment"][side][group] for side in ("before", "after"))
            low, high = judged["alignment"]["ci95"]["gain"][group]
            change = f"{100 * (after - before):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
            row.append(f"{before:.1%} → {after:.1%}: {change}")
        row.append(f"{judged['fidelity']['before']:.2f} → {judged['fidelity']['after']:.2f}")
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
