"""The clips and prompts of the video model, drawn as they are needed: one coloured shape that moves, turns or grows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FRAMES = 12
COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 215, 50),
    "green": (50, 170, 70),
    "blue": (50, 90, 220),
    "purple": (140, 70, 190),
    "pink": (245, 130, 180),
    "cyan": (60, 200, 220),
}
BACKGROUNDS = {"white": (245, 245, 245), "gray": (128, 128, 128), "black": (15, 15, 15)}


@dataclass(frozen=True)
class Motion:
    """What happens from the first frame to the last.

    Attributes:
        across: movement to the right and down, in halves of the frame's side.
        turn: clockwise, in radians.
        growth: size at the end divided by that at the start.
    """

    across: tuple[float, float] = (0.0, 0.0)
    turn: float = 0.0
    growth: float = 1.0


MOTIONS = {
    "moving right": Motion((1.1, 0.0)),
    "moving left": Motion((-1.1, 0.0)),
    "moving down": Motion((0.0, 1.1)),
    "moving up": Motion((0.0, -1.1)),
    "turning clockwise": Motion(turn=0.5 * math.pi),
    "turning counterclockwise": Motion(turn=-0.5 * math.pi),
    "growing": Motion(growth=2.6),
    "shrinking": Motion(growth=1 / 2.6),
}


def circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.9


def ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.7).abs() - 0.25


def square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.78


def triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(y - 0.6, 0.866 * x.abs() - 0.5 * y - 0.5)


def cross(x: Tensor, y: Tensor) -> Tensor:
    near, far = torch.minimum(x.abs(), y.abs()), torch.maximum(x.abs(), y.abs())
    return torch.maximum(near - 0.3, far - 0.95)


def star(x: Tensor, y: Tensor) -> Tensor:
    radius, step = torch.hypot(x, y), 2 * math.pi / 5
    angle = torch.remainder(torch.atan2(x, -y) + step / 2, step) - step / 2  # from the nearest tip
    across, along = radius * angle.sin().abs(), radius * angle.cos()
    # The edge from the tip, one unit out, to the notch between two tips.
    notch_across, notch_along = 0.45 * math.sin(step / 2), 0.45 * math.cos(step / 2)
    length = math.hypot(notch_across, 1 - notch_along)
    return (across * (1 - notch_along) + (along - 1) * notch_across) / length


def heart(x: Tensor, y: Tensor) -> Tensor:
    across, up = x.abs(), 0.15 - y
    lobe = torch.hypot(across - 0.45, up - 0.25) - 0.5
    point = torch.maximum((across * 0.71 - up * 0.71) - 0.675, up - 0.3)
    inside_point = torch.maximum(point, across - 0.95)
    return torch.minimum(lobe, inside_point)


# Signed distances, roughly, negative inside, of shapes of about unit radius; y points down.
SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": circle,
    "ring": ring,
    "square": square,
    "triangle": triangle,
    "cross": cross,
    "star": star,
    "heart": heart,
}
ROUND = ("circle", "ring")  # shapes whose turning cannot be seen


def prompts() -> list[tuple[str, str, str, str]]:
    """All shapes, motions, colours and backgrounds that make a prompt."""
    return [
        (shape, motion, colour, background)
        for shape in SHAPES
        for motion in MOTIONS
        if not (motion.startswith("turning") and shape in ROUND)
        for colour in COLOURS
        for background in BACKGROUNDS
    ]


def sentence(shape: str, motion: str, colour: str, background: str) -> str:
    return f"{colour} {shape} {motion} on a {background} background"


def render(kinds: list[tuple[str, str, str, str]], side: int) -> Tensor:
    """Draws a clip for each prompt, with random places, sizes and angles.

    Returns:
        float32 (clips, 3, FRAMES, side, side) in [-1, 1].
    """
    count = len(kinds)
    motions = [MOTIONS[motion] for _, motion, _, _ in kinds]
    across, turn, growth = (
        torch.tensor([getattr(motion, name) for motion in motions]) for name in ("across", "turn", "growth")
    )
    phase = torch.linspace(-0.5, 0.5, FRAMES)[None]
    size = (0.36 + 0.14 * torch.rand(count, 1)) * growth[:, None] ** phase
    free = torch.where(across != 0, 0.08, 0.3) * (growth == 1)[:, None] + 0.05
    centre = (2 * torch.rand(count, 2) - 1) * free  # of the path
    speed = across * (0.85 + 0.3 * torch.rand(count, 1))
    place = centre[:, None] + speed[:, None] * phase[..., None]  # (clips, FRAMES, 2)
    angle = 0.3 * (2 * torch.rand(count, 1) - 1) * (turn != 0)[:, None] + turn[:, None] * (phase + 0.5)
    grid = (torch.arange(side) + 0.5) * 2 / side - 1
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    x, y = (axis - place[..., i, None, None] for i, axis in enumerate((x, y)))
    cos, sin = angle.cos()[..., None, None], angle.sin()[..., None, None]
    x, y = (cos * x + sin * y) / size[..., None, None], (cos * y - sin * x) / size[..., None, None]
    distance = torch.empty_like(x)
    for name, shape in SHAPES.items():
        own = torch.tensor([kind[0] == name for kind in kinds])
        distance[own] = shape(x[own], y[own])
    cover = (0.5 - distance * size[..., None, None] * side / 2).clamp(0, 1)[:, None]  # of a pixel
    colour, ground = (
        torch.tensor([table[kind[i]] for kind in kinds]).view(count, 3, 1, 1, 1) / 127.5 - 1
        for table, i in ((COLOURS, 2), (BACKGROUNDS, 3))
    )
    return torch.lerp(ground, colour, cover)
