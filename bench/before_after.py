"""The README's picture from a finished run: python bench/before_after.py runs/shapes docs/before_after.png

The first samples of each category that the report shows, seen and unseen in turn; above before, below after, from the
same noise.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLUMNS, TILE, GAP, TEXT = 8, 128, 8, 34


def main(run: Path, out: Path) -> None:
    samples = json.loads((run / "samples.json").read_text())["samples"]
    groups: dict[tuple[str, str], list] = {}
    for sample in samples:
        groups.setdefault((sample["category"], sample["split"]), []).append(sample)
    chosen = [sample for k in range(8) for group in groups.values() for sample in group[k : k + 1]][: 2 * COLUMNS]
    rows = -(-len(chosen) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (TILE + GAP) + GAP, rows * (2 * TILE + TEXT + 2 * GAP) + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, sample in enumerate(chosen):
        x = GAP + i % COLUMNS * (TILE + GAP)
        y = GAP + i // COLUMNS * (2 * TILE + TEXT + 2 * GAP)
        for side, top in (("before", y), ("after", y + TILE + 2)):
            image = Image.open(run / sample[side]["image"]).resize((TILE, TILE), Image.Resampling.BICUBIC)
            sheet.paste(image, (x, top))
        words, lines = sample["prompt"].split(), [""]
        for word in words:
            line = f"{lines[-1]} {word}".strip()
            lines = [*lines[:-1], line] if pen.textlength(line, font) <= TILE else [*lines, word]
        pen.multiline_text((x, y + 2 * TILE + 6), "\n".join(lines), "black", font, spacing=2)
    sheet.save(out, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
