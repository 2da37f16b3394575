"""Labels that do not come from the label page: by the simulated annotator of the toy data set, or from a file."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from ..data import open_image
from ..engine.optimising import generator, progress
from ..engine.run import Run, digest, label_digest
from ..feedback import SIMULATED, USUAL, FeedbackStore, LabelFile, new_judgements
from ..files import InputError, read_bytes
from ..shapes.world import WORLD, annotate, knows


def annotate_run(run: Run, settings: dict[str, Any], redo: bool = False) -> None:
    """Stage `label` of a run, unless it is done: the simulated annotator labels a random subset of the images."""

    def inputs() -> dict[str, str]:
        store = FeedbackStore(run.folder)
        try:
            content = store.content()
        finally:
            store.close()
        if run.world != WORLD or not knows([prompt for prompt, _ in content]):
            raise InputError(f"{run.folder}: the simulated annotator can label only images of the bundled model")
        return {"images": digest(json.dumps(content))}

    why = f"the {SIMULATED} labels {settings['labels']} images good or bad"
    with run.stage("label", why, settings, inputs, redo=redo) as todo:
        if todo:
            annotate_images(run.folder, settings["labels"], settings["seed"])


def annotate_images(folder: Path, number: int, seed: int) -> None:
    """Save the simulated annotator's labels of `number` random images of a run, or of all where there are fewer.

    An image that it cannot read is labelled bad: it does not show what its prompt asks for. Without a label it would
    keep a high reward where CLIP sees the right background, and fine-tuning would repeat it.
    """
    store = FeedbackStore(folder)
    try:
        images = store.images()
        order = torch.randperm(len(images), generator=generator(seed, 4))
        chosen = [images[i] for i in sorted(order[:number].tolist())]
        bar = progress(chosen, "label")
        said = (annotate([open_image(image.path)], [image.prompt])[0] for image in bar)
        labels = ["good" if verdict == "good" else "bad" for verdict in said]
        store.add_labels(SIMULATED, zip([image.id for image in chosen], labels))
    finally:
        store.close()


def import_run(run: Run, file: LabelFile, redo: bool = False) -> None:
    """Stage `label` of a run, unless it is done: the labels and comparisons of a label file, and its images."""

    def inputs() -> dict[str, str]:
        as_read = {} if file.reading == USUAL else {"reading of the label file": digest(json.dumps(file.reading))}
        return {"label file": digest(read_bytes(file.path))} | as_read

    with run.stage("label", f"the labels of {file.path}", {}, inputs, redo=redo) as todo:
        if todo:
            with closing(FeedbackStore(run.folder)) as store:
                only_simulated = set(store.labellers()) <= {SIMULATED} and not store.comparison_rows()
                store.merge(*new_judgements(run.folder, file))
                if only_simulated:  # then all labels can be made again, so that --redo may remove them
                    run.stages["label"]["imported"] = label_digest(store)
