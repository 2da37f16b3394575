"""Stage 1 of the method: a pipeline draws images for prompts, from seeds that are kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from .pipeline import Pipeline
from .training import atomic, progress


def draw(
    pipe: Pipeline, items: Sequence[tuple[str, int]], *, steps: int, guidance: float, batch: int = 64, title: str = ""
) -> Iterator[Image.Image]:
    """Images of (prompt, seed) items, in order; image and seed belong together whatever the batch size."""
    bar = iter(progress(range(len(items)), title or "draw"))
    for start in range(0, len(items), batch):
        chunk = items[start : start + batch]
        latents = pipe.noise([seed for _, seed in chunk])
        for image in pipe.generate([text for text, _ in chunk], steps=steps, guidance=guidance, latents=latents):
            next(bar)
            yield image
    next(bar, None)


def draw_to_folder(
    pipe: Pipeline,
    items: Sequence[tuple[str, int]],
    folder: Path,
    *,
    steps: int,
    guidance: float,
    batch: int,
    title: str,
) -> list[Path]:
    """Draw (prompt, seed) items to folder/000000.png and so on; batches that are there already are kept.

    A batch of which a part is missing is drawn again whole: arithmetic may differ in the last bit with the batch size.
    """
    paths = [folder / f"{i:06d}.png" for i in range(len(items))]
    batches = [range(start, min(start + batch, len(items))) for start in range(0, len(items), batch)]
    missing = [i for rows in batches if not all(paths[i].exists() for i in rows) for i in rows]
    images = draw(pipe, [items[i] for i in missing], steps=steps, guidance=guidance, batch=batch, title=title)
    for i, image in zip(missing, images):
        with atomic(paths[i]) as temporary:
            image.save(temporary, format="PNG")
    return paths
