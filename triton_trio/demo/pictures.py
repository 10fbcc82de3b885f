"""The demo's picture: a landscape made of a few formulas, and how it gets damaged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Floats = npt.NDArray[np.float32]

HEIGHT, WIDTH = 128, 192
SHORE = 88  #: the row where the lake begins


def _ridge(rng: np.random.Generator, base: float, height: float, roughness: int) -> npt.NDArray[np.float64]:
    """The outline of a mountain range: a sum of waves, one row for each column."""
    x = np.linspace(0.0, 1.0, WIDTH)
    waves = sum(np.sin(2 * np.pi * (x * k + rng.random())) / k**1.2 for k in range(1, roughness))
    return np.asarray(base - height * waves)


def landscape(seed: int = 7) -> Floats:
    """RGB in 0..1, shape ``[128, 192, 3]``: evening sky, sun, three ranges of mountains, their reflection in a lake."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH].astype(float)
    t = (rows / SHORE)[..., None].clip(0, 1)
    picture = (1 - t) * np.array([0.24, 0.36, 0.62]) + t * np.array([0.99, 0.74, 0.52])
    distance = np.hypot(rows - 46, columns - 128)
    glow = np.exp(-((distance / 26) ** 2))[..., None]
    picture = picture * (1 - 0.75 * glow) + np.array([1.0, 0.86, 0.55]) * 0.75 * glow
    picture = np.where((distance < 11)[..., None], np.array([1.0, 0.95, 0.78]), picture)
    for base, height, roughness, colour in (
        (58.0, 7.0, 9, (0.52, 0.50, 0.64)),
        (70.0, 6.0, 14, (0.33, 0.37, 0.52)),
        (82.0, 4.0, 22, (0.15, 0.24, 0.28)),
    ):
        outline = _ridge(rng, base, height, roughness)
        depth = (rows - outline[None, :]).clip(0, 40)[..., None]
        shade = np.array(colour) * (1.0 - 0.006 * depth) + 0.004 * depth * np.array([0.9, 0.7, 0.6])
        picture = np.where((rows > outline[None, :])[..., None], shade, picture)
    for column in rng.integers(0, WIDTH, 46):  # firs along the shore
        tall, left = int(rng.integers(6, 15)), int(column)
        for up in range(tall):
            half = (tall - up) // 3
            picture[SHORE - 1 - up, max(0, left - half) : left + half + 1] = (0.07, 0.14, 0.13)
    mirrored = picture[SHORE - 1 :: -1][: HEIGHT - SHORE]
    ripple = (2.2 * np.sin(rows[SHORE:] * 1.3 + columns[SHORE:] * 0.05)).round().astype(int)
    source = (columns[SHORE:].astype(int) + ripple).clip(0, WIDTH - 1)
    water = np.take_along_axis(mirrored, source[..., None].repeat(3, -1), axis=1)
    picture[SHORE:] = 0.72 * water + 0.28 * np.array([0.16, 0.28, 0.42])
    return picture.clip(0, 1).astype(np.float32)


def damage(seed: int = 3) -> Floats:
    """A mask, shape ``[128, 192]``, 1 where the picture is lost: writing and scratches."""
    rng = np.random.default_rng(seed)
    sheet = Image.new("L", (WIDTH, HEIGHT))
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(26)
    pen.text((12, 14), "cancel me", fill=255, font=font)
    pen.text((84, 88), "if you can", fill=255, font=ImageFont.load_default(20))
    x = np.linspace(0, WIDTH, 40)
    for _ in range(5):
        y = rng.uniform(10, HEIGHT - 10) + np.cumsum(rng.normal(0, 2.2, x.size))
        pen.line([*zip(x.tolist(), y.tolist(), strict=True)], fill=255, width=int(rng.integers(1, 4)))
    return (np.asarray(sheet) > 96).astype(np.float32)


def damaged(picture: Floats, mask: Floats) -> Floats:
    """The picture with a glaring colour where it is lost."""
    return np.where(mask[..., None] > 0.5, np.array([0.93, 0.1, 0.35], np.float32), picture).astype(np.float32)


def write_png(path: Path, *pictures: Floats, scale: int = 2) -> None:
    """Write pictures side by side, enlarged."""
    panels: Sequence[Image.Image] = [
        Image.fromarray((panel.clip(0, 1) * 255).astype(np.uint8)).convert("RGB") for panel in pictures
    ]
    gap = 4
    sheet = Image.new("RGB", (len(panels) * (WIDTH + gap) - gap, HEIGHT), "white")
    for index, panel in enumerate(panels):
        sheet.paste(panel, (index * (WIDTH + gap), 0))
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.LANCZOS).save(path)
