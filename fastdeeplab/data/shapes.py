"""Scenes of overlapping textured shapes, made on the fly: a data set that needs no download.

Colours and textures are drawn alike for every class and for the background, so that only the outline tells what a
pixel belongs to.
"""

from collections.abc import Callable, Sequence
from math import cos, dist, pi, sin

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastdeeplab.data.dataset import Pixels

CLASSES = ("background", "disc", "ring", "square", "triangle", "star")
SPLITS = {"train": 0, "val": 1}
SCENES = {"train": 4096, "val": 256}  # unless `limit` says another number
SIZE = 128
MIN_SIZE, MAX_SIZE = 8, 8192
SHAPES = (3, 5)  # how many in a scene, both included
TILT = pi / 8  # to either side of upright
RADIUS = (0.18, 0.32)  # of a shape's circumscribed circle, as a part of the scene's shorter side
CONTRAST = 0.5  # distance in RGB from 0 to 1 between a shape's first colour and the background's

Place = tuple[float, float]
Plane = NDArray[np.floating]
Inside = NDArray[np.bool_]


class Shapes:
    """A `SegmentationDataset` of ``len(self)`` scenes, each with 3 to 5 shapes of random place, size and tilt.

    A scene depends on the seed, the split, the index and the size alone, and no scene is in two splits.

    Args:
        split: ``"train"`` or ``"val"``.
        seed: an integer from 0 up; other seeds give other scenes.
        limit: how many scenes; by default 4096 for training and 256 for validation.
        size: (H, W) of the scenes in pixels, or one number for both.

    Raises:
        ValueError: an argument is not one of those above.
    """

    classes: tuple[str, ...] = CLASSES

    def __init__(
        self, split: str = "train", *, seed: int = 0, limit: int | None = None, size: int | Sequence[int] = SIZE
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be train or val for shapes, got {split!r}")
        if seed < 0:
            raise ValueError(f"seed must be an integer from 0 up, got {seed}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        height, width = (size, size) if isinstance(size, int) else size
        if not (min(height, width) >= MIN_SIZE and max(height, width) <= MAX_SIZE):
            raise ValueError(f"size must be from {MIN_SIZE} to {MAX_SIZE} pixels, got {height} x {width}")
        self.split, self.seed, self.size = split, seed, (height, width)
        self.scenes = SCENES[split] if limit is None else limit

    def __len__(self) -> int:
        return self.scenes

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.scenes:
            raise IndexError(f"there are {self.scenes} scenes, no number {index}")
        image, target = draw_scene(np.random.default_rng((self.seed, SPLITS[self.split], index)), *self.size)
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(target)

    def name(self, index: int) -> str:
        return f"shapes {self.split} scene {index} of seed {self.seed}"


def draw_scene(random: Generator, height: int, width: int) -> tuple[Pixels, Pixels]:
    """Draw an image, (H, W, 3), and its target, (H, W); later shapes cover earlier ones, and reach over the border."""
    ground = random.random(3, dtype=np.float32)
    image = _texture(random, height, width, ground)
    target = np.zeros((height, width), np.uint8)
    places: list[Place] = []
    for _ in range(random.integers(SHAPES[0], SHAPES[1], endpoint=True)):
        kind = int(random.integers(1, len(CLASSES)))
        radius = max(2.0, random.uniform(*RADIUS) * min(height, width))
        places.append(_place(random, height, width, 0.75 * radius, places))
        (y, x), angle = places[-1], random.uniform(-TILT, TILT)
        top, bottom = max(0, int(y - radius)), min(height, int(y + radius) + 2)
        left, right = max(0, int(x - radius)), min(width, int(x + radius) + 2)
        v = ((np.arange(top, bottom, dtype=np.float32) + 0.5 - y) / radius)[:, None]
        u = ((np.arange(left, right, dtype=np.float32) + 0.5 - x) / radius)[None, :]
        inside = OUTLINES[CLASSES[kind]](cos(angle) * u + sin(angle) * v, cos(angle) * v - sin(angle) * u)
        surface = _texture(random, bottom - top, right - left, _contrasting(random, ground))
        image[top:bottom, left:right][inside] = surface[inside]
        target[top:bottom, left:right][inside] = kind
    image += random.normal(0, random.uniform(0, 0.03), image.shape).astype(np.float32)
    return (image.clip(0, 1) * 255).round().astype(np.uint8), target


def _place(random: Generator, height: int, width: int, margin: float, places: Sequence[Place]) -> Place:
    """Of five random places the one that is farthest from all others, so that few shapes are hidden whole."""
    tried = [(random.uniform(margin, height - margin), random.uniform(margin, width - margin)) for _ in range(5)]
    return max(tried, key=lambda place: min((dist(place, other) for other in places), default=0))


def _contrasting(random: Generator, ground: Plane) -> Plane:
    while True:
        color = random.random(3, dtype=np.float32)
        if np.linalg.norm(color - ground) >= CONTRAST:
            return color


def _texture(random: Generator, height: int, width: int, color: Plane) -> Plane:
    """A surface of one of four patterns between a colour and a variation of it, lit from one side: (H, W, 3)."""
    other = (color + random.uniform(-0.15, 0.15, 3).astype(np.float32)).clip(0, 1)
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None, :]
    angle, wavelength = random.uniform(0, pi), random.uniform(5, 20)
    along = (cos(angle) * x + sin(angle) * y) * (2 * pi / wavelength)
    across = (cos(angle) * y - sin(angle) * x) * (2 * pi / wavelength)
    pattern = random.integers(4)
    if pattern == 0:  # plain
        amount: Plane = np.zeros((height, width), np.float32)
    elif pattern == 1:  # stripes
        amount = 0.5 + 0.5 * np.sin(along)
    elif pattern == 2:  # checks
        amount = (np.sin(along) * np.sin(across) > 0).astype(np.float32)
    else:  # blotches
        cells = (2 + height // int(wavelength), 2 + width // int(wavelength))
        grid = Image.fromarray(random.random(cells, dtype=np.float32))
        amount = np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))
    light = 1 + random.uniform(-0.25, 0.25) * (x / width - 0.5) + random.uniform(-0.25, 0.25) * (y / height - 0.5)
    surface: Plane = (color + amount[..., None] * (other - color)) * light[..., None]
    return surface


def _disc(u: Plane, v: Plane) -> Inside:
    return u * u + v * v <= 1


def _ring(u: Plane, v: Plane) -> Inside:
    distance = u * u + v * v
    return (distance >= 0.5**2) & (distance <= 1)


def _square(u: Plane, v: Plane) -> Inside:
    return np.maximum(abs(u), abs(v)) <= 0.5**0.5


def _triangle(u: Plane, v: Plane) -> Inside:
    return (v <= 0.5) & (abs(u) * 3**0.5 - v <= 1)


def _star(u: Plane, v: Plane) -> Inside:
    """Five points; between a point and a notch, which is as far out as `notch`, the edge is straight."""
    notch = 0.45
    angle = abs(np.remainder(np.arctan2(u, -v), 2 * pi / 5) - pi / 5)  # from the nearest notch, up to pi / 5 at a point
    x, y = np.hypot(u, v) * np.cos(angle), np.hypot(u, v) * np.sin(angle)
    point_x, point_y = cos(pi / 5), sin(pi / 5)
    return (x - notch) * point_y <= y * (point_x - notch)


OUTLINES: dict[str, Callable[[Plane, Plane], Inside]] = {
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
}
