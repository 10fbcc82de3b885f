"""The demo's picture: a landscape made of a few formulas, and how it gets damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Floats = npt.NDArray[np.float32]

HEIGHT, WIDTH = 128, 192
#: The landscape is painted this many times larger and then averaged, so that its edges are smooth.
FINE = 4


def landscape(seed: int = 7) -> Floats:
    """RGB in 0..1, shape ``[128, 192, 3]``: evening sky, sun, three ranges of mountains, firs, their reflection in a lake."""
    rng = np.random.default_rng(seed)
    height, width, shore = HEIGHT * FINE, WIDTH * FINE, 88 * FINE
    rows, columns = np.mgrid[0:height, 0:width].astype(float) / FINE
    # Sky, from blue down to orange, with a sun and its glow.
    t = (rows / 88)[..., None].clip(0, 1)
    picture = (1 - t) * _rgb(0.24, 0.36, 0.62) + t * _rgb(0.99, 0.74, 0.52)
    distance = np.hypot(rows - 44, columns - 132)
    glow = 0.75 * np.exp(-((distance / 26) ** 2))[..., None]
    picture = picture * (1 - glow) + _rgb(1.0, 0.86, 0.55) * glow
    picture = np.where((distance < 11)[..., None], _rgb(1.0, 0.95, 0.78), picture)
    # Mountains, the far ones paler; mist in the valleys.
    for base, tall, waves, colour in (
        (58.0, 7.0, 9, _rgb(0.52, 0.50, 0.64)),
        (70.0, 6.0, 14, _rgb(0.33, 0.37, 0.52)),
        (82.0, 4.0, 22, _rgb(0.15, 0.24, 0.28)),
    ):
        x = columns[0] / WIDTH
        outline = base - tall * sum(np.sin(2 * np.pi * (x * k + rng.random())) / k**1.2 for k in range(1, waves))
        depth = (rows - outline)[..., None]
        shade = colour + (_rgb(0.7, 0.6, 0.6) - colour) * 0.008 * depth.clip(0, 30)
        picture = np.where(depth > 0, shade, picture)
    for _ in range(46):
        tall, middle = rng.uniform(6, 15), rng.uniform(0, WIDTH)
        tip = 88 - tall
        branches = 0.2 * (rows - tip) + 0.9 * ((rows - tip) % 2.6) / 2.6
        fir = (rows > tip) & (rows < 88) & (np.abs(columns - middle) < branches)
        picture = np.where(fir[..., None], _rgb(0.07, 0.14, 0.13), picture)
    # The lake: the same upside down, moved sideways by ripples that grow towards us.
    mirrored = picture[shore - 1 :: -1][: height - shore]
    ripple = (0.5 + (rows[shore:] - 88) / 20) * np.sin((rows[shore:] - 88) ** 0.8 * 2.4 + columns[shore:] * 0.04)
    source = ((columns[shore:] + ripple) * FINE).astype(int).clip(0, width - 1)
    water = np.take_along_axis(mirrored, source[..., None].repeat(3, -1), axis=1)
    picture[shore:] = 0.72 * water + 0.28 * _rgb(0.16, 0.28, 0.42)
    averaged: Floats = picture.reshape(HEIGHT, FINE, WIDTH, FINE, 3).mean((1, 3)).astype(np.float32)
    return averaged.clip(0, 1)


def damage(seed: int = 3) -> Floats:
    """A mask, shape ``[128, 192]``, 1 where the picture is lost: writing, a stain, and scratches that ``seed`` moves."""
    rng = np.random.default_rng(seed)
    sheet = Image.new("L", (WIDTH, HEIGHT))
    pen = ImageDraw.Draw(sheet)
    pen.text((10, 10), "cancel me", fill=255, font=ImageFont.load_default(24))
    pen.text((92, 96), "if you can", fill=255, font=ImageFont.load_default(20))
    pen.ellipse((30, 98, 56, 114), fill=255)
    for top in (4, 50, 66, 120):
        x = np.arange(0, WIDTH + 8, 8)
        y = top + rng.uniform(-3, 3) + np.cumsum(rng.normal(0, 1.4, x.size))
        pen.line([*zip(x.tolist(), y.tolist(), strict=True)], fill=255, width=int(rng.integers(1, 3)))
    return (np.asarray(sheet) > 96).astype(np.float32)


def damaged(picture: Floats, mask: Floats) -> Floats:
    """The picture with a glaring colour where it is lost."""
    return np.where(mask[..., None] > 0.5, _rgb(0.93, 0.1, 0.35), picture).astype(np.float32)


def write_png(path: Path, *pictures: npt.NDArray[Any], scale: int = 2) -> None:
    """Write pictures (``[128, 192]`` or ``[128, 192, 3]``) side by side, enlarged."""
    gap = 4
    sheet = Image.new("RGB", (len(pictures) * (WIDTH + gap) - gap, HEIGHT), "white")
    for index, picture in enumerate(pictures):
        panel = Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8)).convert("RGB")
        sheet.paste(panel, (index * (WIDTH + gap), 0))
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.BICUBIC).save(path)


def _rgb(red: float, green: float, blue: float) -> npt.NDArray[np.float64]:
    return np.array([red, green, blue])
