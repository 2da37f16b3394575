"""A run begun from images that another tool made, so that people can label them: a folder with captions, or a file."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

from ..data import Skipped, Unusable, read_pairs
from ..engine.run import check_folder
from ..feedback import FeedbackStore, NewLabel, Reading, check_image, import_into_run, merge_into_run, read_judgements
from ..files import InputError
from .book import number


class _Strict(Skipped):
    """Nothing is skipped: what cannot be used is refused, and nothing is written into the folder."""

    def begin(self, source: str) -> None:
        self.source = source

    def add(self, error: Unusable, listed: bool = False) -> None:
        raise error


def begin(source: Path, out: Path | None, how: Reading) -> tuple[Path, list[Path]]:
    """The run of a source's images, begun or continued, and the folders that they lie in.

    source: a folder of images with captions, as pre-training pairs have them (`read_pairs`), or a label file with or
    without labels. out: the run's folder; None: runs/NAME of the source. The images stay where they are.
    """
    run = out or Path("runs") / (source.resolve().name if source.is_dir() else source.stem)
    check_folder(run)
    if source.is_dir():
        rows = folder_images(source)
        images = {(row.prompt, Path(row.image)) for row in rows}
    else:
        labels, compared = read_judgements(source, how, unlabelled=True)
        images = {(row.prompt, row.image) for row in labels}
        images |= {(row.prompt, path) for row in compared for path in (row.image, row.other)}
    if (run / "feedback.sqlite").exists():
        with closing(FeedbackStore(run)) as store:
            known = {(image.prompt, Path(os.path.realpath(image.file))) for image in store.images()}
        if out is None and known and not known & images:
            raise InputError(f"{run}: holds other images than {source}; accepted: --out RUN, another folder")
    merge_into_run(run, rows) if source.is_dir() else import_into_run(run, source, how, unlabelled=True)
    print(f"{run}: a run of the {number(len(images), 'image')} of {source}, which stay where they are")
    return run, sorted({path.parent for _, path in images})


def folder_images(folder: Path) -> list[NewLabel]:
    """The images of a folder with their captions as prompts, none with a label. InputError names what is unusable."""
    rows = []
    for pair in read_pairs(str(folder), _Strict(folder)):
        check_image(Path(pair.name), str(folder))
        rows.append(NewLabel(pair.caption, os.path.realpath(pair.name), None, "", None, None))
    return rows
