"""The drawings of the toy data set: one to four objects of one shape and color on one of four backgrounds.

A drawing is 64 x 64 pixels, anti-aliased (drawn four times as large, then averaged); objects never overlap and never
touch the frame. `draw` is the truth that the simulated annotator (annotator.py) is measured against.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from ..prompts import SHAPES, Prompt

SIZE = 64  # pixels
SUPERSAMPLE = 4
COLORS = {"red": (222, 44, 44), "blue": (44, 92, 236), "yellow": (252, 214, 28), "purple": (150, 48, 190)}
BACKGROUNDS = {
    "at night": (24, 26, 54),
    "on the grass": (104, 164, 84),
    "in the snow": (236, 242, 248),
    "on the sand": (222, 186, 146),
}
RADII = {1: (12.0, 17.0), 2: (10.5, 14.0), 3: (10.0, 12.5), 4: (9.5, 11.5)}  # circumscribed circle, pixels, by count


@dataclass(frozen=True)
class Scene:
    """What a drawing shows: count in 1..4, and a word of the SHAPES grammar for each other attribute.

    The color may also be "other", which is read in a model's images and never drawn.
    """

    count: int
    color: str
    object: str
    background: str

    def shows(self, prompt: Prompt) -> bool:
        """Whether a drawing of this scene is aligned with the prompt; "a" asks for exactly one object."""
        count = SHAPES.counts.index(prompt.count) + 1 if prompt.count else 1
        return (
            self.count == count
            and self.object == prompt.object
            and prompt.color in (None, self.color)
            and prompt.background in (None, self.background)
        )

    def prompt(self, category: str) -> Prompt:
        """The true caption of one category; color and background captions speak of one object only."""
        if category in ("color", "background") and self.count != 1:
            raise ValueError(f"a {category} caption needs a scene of one object, not {self.count}")
        count = SHAPES.counts[self.count - 1] if category in ("count", "combination") else None
        color = self.color if category in ("color", "combination") else None
        background = self.background if category in ("background", "combination") else None
        return Prompt(category, self.object, count, color, background)


def sample_scene(prompt: Prompt | None, rng: random.Random) -> Scene:
    """A scene that shows the prompt, everything it leaves open drawn uniformly; with None, any scene."""
    if prompt is None:
        count, color, thing, background = rng.choice(SHAPES.counts), None, None, None
    else:
        count, color, thing, background = prompt.count or "one", prompt.color, prompt.object, prompt.background
    return Scene(
        count=SHAPES.counts.index(count) + 1,
        color=color or rng.choice(SHAPES.colors),
        object=thing or rng.choice(SHAPES.objects),
        background=background or rng.choice(SHAPES.backgrounds),
    )


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """A drawing of the scene, (SIZE, SIZE) RGB: places, sizes, tilt and shades are drawn from `rng`."""
    shade = rng.uniform(-8, 8)
    background = _shade(BACKGROUNDS[scene.background], shade)
    color = _shade(COLORS[scene.color], rng.uniform(-10, 10))
    large = Image.new("RGB", (SIZE * SUPERSAMPLE, SIZE * SUPERSAMPLE), background)
    pen = ImageDraw.Draw(large)
    for x, y, radius in _places(scene.count, rng):
        outline = _outline(scene.object, x, y, radius, rng.uniform(-0.15, 0.15))
        pen.polygon([(SUPERSAMPLE * px, SUPERSAMPLE * py) for px, py in outline], fill=color)
    return large.resize((SIZE, SIZE), Image.Resampling.BOX)


def _shade(color: tuple[int, int, int], amount: float) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, round(channel + amount))) for channel in color)
    return red, green, blue


def _places(count: int, rng: random.Random) -> list[tuple[float, float, float]]:
    """Centers and radii of `count` circles inside the frame that stay eight pixels apart: what one latent covers."""
    while True:  # starting over after a crowded beginning keeps the places uniform
        placed: list[tuple[float, float, float]] = []
        for _ in range(60):
            radius = rng.uniform(*RADII[count])
            x, y = (rng.uniform(radius + 1, SIZE - 1 - radius) for _ in range(2))
            if all(math.hypot(x - u, y - v) > radius + other + 8 for u, v, other in placed):
                placed.append((x, y, radius))
            if len(placed) == count:
                return placed


def _outline(shape: str, x: float, y: float, radius: float, tilt: float) -> list[tuple[float, float]]:
    """The corners of a shape inside the circle (x, y, radius)."""
    corners = [(radius * r, angle + tilt) for r, angle in CORNERS[shape]]
    return [(x + r * math.sin(angle), y - r * math.cos(angle)) for r, angle in corners]


def _heart() -> list[tuple[float, float]]:
    """The curve of Weisstein, "Heart Curve", MathWorld, scaled to its smallest enclosing circle."""
    corners = []
    for k in range(72):
        t = 2 * math.pi * k / 72
        u, v = 16 * math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        corners.append((math.hypot(u, v + 0.1) / 16.95, math.atan2(u, v + 0.1)))
    return corners


def _cross(half: float = 0.26, arm: float = 0.96) -> list[tuple[float, float]]:
    """Two bars of width 2 * half whose arms end at `arm` from the center."""
    tip, corner = math.atan(half / arm), (math.sqrt(2) * half, math.pi / 4)
    quarter = [(math.hypot(half, arm), -tip), (math.hypot(half, arm), tip), corner]
    return [(radius, angle + turn * math.pi / 2) for turn in range(4) for radius, angle in quarter]


# of each shape the corners, as radius (at most 1, of the circle around it) and angle clockwise from the top
CORNERS = {
    "circle": [(0.88, 2 * math.pi * k / 48) for k in range(48)],
    "square": [(1.0, math.pi * (2 * k + 1) / 4) for k in range(4)],
    "triangle": [(1.0, 2 * math.pi * k / 3) for k in range(3)],
    "star": [(1.0 if k % 2 == 0 else 0.45, 2 * math.pi * k / 10) for k in range(10)],
    "heart": _heart(),
    "cross": _cross(),
}
