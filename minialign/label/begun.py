"""A run begun from images that another tool made, so that people can label them: a folder with captions, or a file."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

from ..data import Skipped, Unusable, read_pairs
from ..engine.commands import plural
from ..engine.run import check_folder
from ..feedback import FeedbackStore, LabelFile, NewLabel, Reading, check_image, merge_into_run, new_judgements
from ..files import InputError


class _Strict(Skipped):
    """Nothing is skipped: what cannot be used is refused, and nothing is written into the folder."""

    def begin(self, source: str) -> None:
        self.source = source

    def add(self, error: Unusable, listed: bool = False) -> None:
        accepted = "; accepted: a caption for each image, in metadata.jsonl, metadata.csv or a .txt file beside it"
        raise InputError(f"{error}{accepted * error.why.endswith('has no caption')}") from error


def begin(source: Path, out: Path | None, reading: Reading) -> tuple[Path, list[Path]]:
    """The run of a source's images, begun or continued, and the folders that they lie in.

    source: a folder of images with captions, as pre-training pairs have them (`read_pairs`), or a label file with or
    without labels. out: the run's folder; None: runs/NAME of the source. The images stay where they are.
    """
    run = out or Path("runs") / (source.resolve().name if source.is_dir() else source.stem)
    check_folder(run)
    file = LabelFile(source, reading, unlabelled=True)
    rows, pairs = (folder_images(source), []) if source.is_dir() else new_judgements(run, file)
    named = [(row.prompt, row.image) for row in rows]
    named += [(row.prompt, image) for row in pairs for image in (row.image, row.other)]
    images = {(prompt, Path(os.path.realpath(run / image))) for prompt, image in named}
    if out is None and (run / "feedback.sqlite").exists():
        with closing(FeedbackStore(run)) as store:
            known = {(image.prompt, Path(os.path.realpath(image.file))) for image in store.images()}
        if known and not known & images:
            raise InputError(f"{run}: holds other images than {source}; accepted: --out RUN, another folder")
    merge_into_run(run, rows, pairs)
    print(f"{run}: a run of the {plural(len(images), 'image')} of {source}, which stay where they are")
    return run, sorted({path.parent for _, path in images})


def folder_images(folder: Path) -> list[NewLabel]:
    """The images of a folder with their captions as prompts, none with a label. InputError names what is unusable."""
    rows = []
    for pair in read_pairs(str(folder), _Strict(folder)):
        check_image(Path(pair.name), str(folder))
        rows.append(NewLabel(pair.caption, os.path.realpath(pair.name), None, "", None, None))
    return rows
