"""The README's picture from a finished run: python bench/before_after.py runs/shapes docs/before_after.png

The first sample of each category and group of prompts: nothing is chosen. Above is the base model's image, below
the fine-tuned model's from the same noise, each with its verdict. Twice as wide as a README shows it (800 pixels).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

COLUMNS, WIDTH, MARGIN, GAP, MARK = 8, 1600, 168, 12, 30
COLORS = {"good": "#17764a", "bad": "#b0412b", "skip": "#5d6269"}


def first_samples(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first sample of each of the groups that there are, then the second of each, up to the number of columns.

    Where there are more groups than columns, a category has one with feedback and one without: new combinations and new
    objects take turns.
    """
    kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for sample in samples:
        kinds.setdefault(tuple(sample["groups"]), []).append(sample)
    first, *others = dict.fromkeys(kind[-1] for kind in kinds)
    if len(kinds) > COLUMNS and others:
        categories = list(dict.fromkeys(kind[0] for kind in kinds))
        turns = {category: (first, others[i % len(others)]) for i, category in enumerate(categories)}
        kinds = {kind: some for kind, some in kinds.items() if kind[-1] in turns[kind[0]]}
    chosen = [sample for k in range(COLUMNS) for kind in kinds.values() for sample in kind[k : k + 1]][:COLUMNS]
    return sorted(chosen, key=lambda sample: list(kinds).index(tuple(sample["groups"])))


def mark(pen: ImageDraw.ImageDraw, x: int, y: int, verdict: str, font: Any) -> None:
    """A verdict as a sign and a word; the sign is drawn, since not every font has it."""
    color, line = COLORS[verdict], {"width": 4, "joint": "curve"}
    if verdict == "good":
        pen.line([(x, y + 13), (x + 7, y + 21), (x + 19, y + 5)], color, **line)
    elif verdict == "bad":
        pen.line([(x + 2, y + 5), (x + 17, y + 21)], color, **line)
        pen.line([(x + 17, y + 5), (x + 2, y + 21)], color, **line)
    else:
        pen.line([(x, y + 13), (x + 18, y + 13)], color, **line)
    pen.text((x + 27, y - 2), verdict, color, font)


def wrapped(pen: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    """A text in lines of at most a width in pixels."""
    lines = [""]
    for word in text.split():
        line = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], line] if pen.textlength(line, font) <= width else [*lines, word]
    return "\n".join(lines)


def main(run: Path, out: Path) -> None:
    evaluation = json.loads((run / "results.json").read_text(encoding="utf-8"))["evaluation"]
    models, chosen = list(evaluation["models"])[:2], first_samples(evaluation["samples"])
    tile = (WIDTH - MARGIN - COLUMNS * GAP) // COLUMNS
    font, bold = ImageFont.load_default(24), ImageFont.load_default(26)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    prompts = [wrapped(pen, sample["prompt"], font, tile) for sample in chosen]
    top = GAP + 30 * max(prompt.count("\n") + 1 for prompt in prompts) + GAP
    row = tile + MARK + 2 * GAP
    sheet = Image.new("RGB", (WIDTH, top + 2 * row), "white")
    pen = ImageDraw.Draw(sheet)
    for k, model in enumerate(models):
        pen.multiline_text((GAP, top + k * row + tile // 2 - 30), wrapped(pen, model, bold, MARGIN), "#1d2024", bold)
    for i, (sample, prompt) in enumerate(zip(chosen, prompts)):
        x = MARGIN + i * (tile + GAP)
        pen.multiline_text((x, top - GAP), prompt, "#1d2024", font, anchor="ld", spacing=4)
        for k, model in enumerate(models):
            with Image.open(run / sample["images"][model]) as image:
                sheet.paste(image.convert("RGB").resize((tile, tile), Image.Resampling.BICUBIC), (x, top + k * row))
            if sample["verdicts"].get(model) in COLORS:
                mark(pen, x, top + k * row + tile + GAP // 2, sample["verdicts"][model], font)
    sheet.save(out, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
