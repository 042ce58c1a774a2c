"""Draws the sample set: picture-book scenes with five true Chinese sentences each, laid out exactly
as AI Challenger 2017's captions are, so that the whole pipeline runs on a CPU without downloads.

    python data/sample.py                        # half a minute on two cores
    python data/sample.py --train 64 --valid 8 --test 8 --out /tmp/sample       # in a second
    unzip -l data/sample/ai_challenger_caption_train_20170902.zip | tail -1     # 3201 files

The first one writes three zips (71 MB in all) and scenes.json into data/sample:
train 3,200 pictures and 16,000 sentences; valid 200 and 1,000; test_a 200 and 1,000.

scenes.json says what was drawn where, so measure_captions() can tell whether a generated sentence
is true of its picture, and whether the model looked at what it named.
"""
import hashlib
import io
import json
import multiprocessing
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from itertools import combinations, permutations
from math import cos, pi, sin
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where config.py is

from config import fail, new_parser  # noqa: E402
from utils import (  # noqa: E402
    UserError, alone, end_with_parent, one_line, replacing, run_script)
from tqdm import tqdm  # noqa: E402, after utils

SPLITS = {
    "train": ("train", "20170902"),
    "valid": ("validation", "20170910"),
    "test_a": ("test_a", "20180103"),
}
HORIZON = 0.67  # where the ground begins as backgrounds are written down
HORIZONS = (0.50, 0.72)  # as they are drawn
ZOOM = 2  # drawn this much too large and then shrunk: Pillow's own edges are jagged
INK, CREAM, STEM, WHITE = (52, 42, 56), (255, 250, 236), (84, 160, 72), (255, 255, 255)
COLOURS = {
    "红色": (218, 38, 44),
    "黄色": (253, 212, 36),
    "蓝色": (38, 92, 214),
    "绿色": (34, 150, 70),
    "紫色": (140, 58, 178),
    "橙色": (248, 128, 22),
    "白色": (250, 250, 248),
    "黑色": (38, 38, 44),
}


def mix(a, b, t):
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b))


def pick(rng, items):
    return items[rng.integers(len(items))]


class Pen:
    """Draws on an image in unit coordinates (x right, y down), `pad` pixels inside its border."""

    def __init__(self, image, stroke, pad=0, horizon=HORIZON):
        self.image = image
        self.draw = ImageDraw.Draw(image, "RGBA")
        self.stroke = stroke
        self.pad = pad
        self.horizon = horizon
        self.w, self.h = image.width - 2 * pad, image.height - 2 * pad

    def height(self, y):
        """Stretches what is above HORIZON and squeezes what is below it, or the reverse, so that it
        comes to lie at the pen's own."""
        if y < HORIZON:
            return y * self.horizon / HORIZON
        return 1 - (1 - y) * (1 - self.horizon) / (1 - HORIZON)

    def at(self, points):
        return [(x * self.w + self.pad, self.height(y) * self.h + self.pad) for x, y in points]

    def poly(self, points, fill, ink=None, rounds=0):
        for _ in range(rounds):  # Chaikin's corner cutting: a few corners become a soft outline
            p, q = np.array(points), np.roll(points, -1, axis=0)
            points = np.stack([0.75 * p + 0.25 * q, 0.25 * p + 0.75 * q], 1).reshape(-1, 2).tolist()
        self.draw.polygon(self.at(points), fill)
        if ink:
            self.line([*points, *points[:2]], ink)

    def rect(self, x0, y0, x1, y1, fill, ink=None):
        self.poly([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill, ink)

    def oval(self, x, y, rx, ry, fill, ink=None):
        corners = self.at([(x - rx, y - ry), (x + rx, y + ry)])
        self.draw.ellipse(corners, fill, ink, self.stroke if ink else 0)

    def line(self, points, fill, width=1.0):
        self.draw.line(self.at(points), fill, max(1, round(self.stroke * width)), joint="curve")

    def wash(self, points, top, bottom):
        """Fills the polygon with a vertical gradient over the polygon's own height."""
        y0, y1 = (self.height(edge(y for _, y in points)) * self.h for edge in (min, max))
        t = np.clip((np.arange(self.h) - y0) / (y1 - y0), 0, 1)[:, None, None]
        column = Image.fromarray((np.array(top) * (1 - t) + np.array(bottom) * t).astype(np.uint8))
        mask = Image.new("L", self.image.size)
        ImageDraw.Draw(mask).polygon(self.at(points), 255)
        self.image.paste(column.resize(self.image.size), (0, 0), mask)


# ---- things: in the unit square, with its colour, the dark and the light shade of it, and ink ----
def house(pen, colour, dark, light, ink):
    pen.rect(0.70, 0.08, 0.82, 0.40, dark, ink)
    pen.rect(0.11, 0.42, 0.89, 1, colour, ink)
    pen.poly([(0, 0.47), (0.5, 0), (1, 0.47)], dark, ink)
    for y in (0.17, 0.27, 0.37):
        pen.line([(0.5 - y, y + 0.02), (0.5 + y, y + 0.02)], mix(dark, ink, 0.3), 0.6)
    pen.poly([(0.41, 1), (0.41, 0.72), (0.5, 0.64), (0.59, 0.72), (0.59, 1)], (150, 100, 62), ink)
    for x in (0.26, 0.74):
        pen.rect(x - 0.08, 0.58, x + 0.08, 0.76, (255, 240, 170), ink)
        pen.line([(x, 0.58), (x, 0.76)], ink, 0.7)
        pen.line([(x - 0.08, 0.67), (x + 0.08, 0.67)], ink, 0.7)


def car(pen, colour, dark, light, ink):
    pen.poly([(0.12, 0.55), (0.24, 0), (0.74, 0), (0.88, 0.55)], colour, ink, 3)
    pen.poly([(0.28, 0.42), (0.34, 0.12), (0.48, 0.10), (0.48, 0.42)], (206, 234, 246), ink)
    pen.poly([(0.53, 0.42), (0.53, 0.10), (0.66, 0.12), (0.74, 0.42)], (206, 234, 246), ink)
    body = [(0, 0.42), (0.5, 0.38), (0.95, 0.42), (1.01, 0.60), (1, 0.86), (0, 0.86)]
    pen.poly(body, colour, ink, 2)
    pen.rect(0.06, 0.70, 0.94, 0.77, dark)
    pen.line([(0.55, 0.53), (0.62, 0.53)], ink)
    pen.oval(0.94, 0.58, 0.035, 0.06, (255, 240, 150), ink)
    for x in (0.24, 0.76):
        pen.oval(x, 0.80, 0.125, 0.20, (58, 56, 64), ink)
        pen.oval(x, 0.80, 0.06, 0.095, (214, 214, 220), ink)


def balloon(pen, colour, dark, light, ink):
    pen.line([(0.5 + 0.07 * sin(9 * t), 0.76 + 0.24 * t) for t in np.linspace(0, 1, 20)], ink)
    pen.poly([(0.5, 0.73), (0.42, 0.81), (0.58, 0.81)], dark, ink)
    turn = np.linspace(0, 2 * pi, 40)
    skin = [(0.5 + 0.5 * cos(t) * (1 - 0.2 * max(0, sin(t))), 0.385 + 0.385 * sin(t)) for t in turn]
    pen.poly(skin, colour, ink)
    pen.poly([(0.95, 0.2), (0.86, 0.52), (0.55, 0.74), (0.74, 0.5)], dark, None, 3)
    pen.poly([(0.14, 0.20), (0.40, 0.05), (0.28, 0.20), (0.16, 0.42)], light, None, 3)


def fish(pen, colour, dark, light, ink):
    pen.poly([(0.30, 0.30), (0.45, 0), (0.72, 0.02), (0.70, 0.3)], dark, ink, 2)
    pen.poly([(0.40, 0.75), (0.42, 1), (0.58, 1), (0.62, 0.72)], dark, ink, 2)
    tail = [(0.34, 0.5), (0.05, 0.05), (-0.02, 0.25), (0.07, 0.5), (-0.02, 0.78), (0.05, 0.97)]
    pen.poly(tail, dark, ink, 2)
    body = [(0.16, 0.5), (0.38, 0.12), (0.82, 0.06), (1.08, 0.5), (0.82, 0.92), (0.38, 0.88)]
    pen.poly(body, colour, ink, 3)
    pen.poly([(0.36, 0.76), (0.60, 0.70), (0.86, 0.72), (0.66, 0.86)], light, None, 3)
    for x in (0.38, 0.50, 0.62):
        scale = [(x + 0.05 * cos(t), 0.46 + 0.16 * sin(t)) for t in np.linspace(-1.4, 1.4, 9)]
        pen.line(scale, dark, 1.3)
    pen.oval(0.82, 0.40, 0.06, 0.09, CREAM, ink)
    pen.oval(0.835, 0.40, 0.028, 0.045, INK)
    pen.line([(0.98, 0.58), (0.90, 0.63), (0.86, 0.61)], ink)


def pine(pen, colour, dark, light, ink):
    pen.rect(0.43, 0.85, 0.57, 1, (128, 84, 52), ink)
    for top, low, half in ((0.42, 0.90, 0.5), (0.20, 0.64, 0.40), (0, 0.38, 0.28)):
        hem = [(0.5 + half * u, low - 0.045 * (i % 2)) for i, u in enumerate(np.linspace(1, -1, 9))]
        pen.poly([(0.5, top), *hem], colour, ink)
        right = [(0.5 + half * 0.72, low - 0.06), (0.5 + half * 0.25, low - 0.07)]
        pen.poly([(0.5, top + 0.08), *right], dark)


def flower(pen, colour, dark, light, ink):
    pen.line([(0.5, 0.45), (0.52, 0.75), (0.49, 1)], INK, 3.4)
    pen.line([(0.5, 0.45), (0.52, 0.75), (0.49, 1)], STEM, 1.8)
    for side in (-1, 1):
        leaf = [(0, 0.94), (0.16, 0.72), (0.40, 0.72), (0.2, 0.92)]
        pen.poly([(0.5 + side * x, y) for x, y in leaf], STEM, INK, 2)
    round_ = pen.w / pen.h  # petals are round in pixels, not in units
    for ring, fill, turn in ((0.31, dark, pi / 6), (0.27, colour, 0)):
        for a in np.arange(6) * pi / 3 + turn:
            x, y = 0.5 + ring * cos(a), (0.5 + ring * sin(a)) * round_
            pen.oval(x, y, 0.19, 0.19 * round_, fill, ink)
    pen.oval(0.5, 0.5 * round_, 0.15, 0.15 * round_, (166, 104, 48), ink)
    pen.oval(0.46, 0.46 * round_, 0.05, 0.05 * round_, (206, 150, 84))


def boat(pen, colour, dark, light, ink):
    pen.line([(0.47, 0), (0.47, 0.78)], ink, 1.5)
    pen.poly([(0.50, 0.03), (0.78, 0.34), (0.97, 0.70), (0.50, 0.70)], colour, ink)
    pen.poly([(0.44, 0.10), (0.22, 0.42), (0.05, 0.70), (0.44, 0.70)], light, ink)
    pen.poly([(0, 0.76), (1, 0.76), (0.86, 1), (0.15, 1)], dark, ink)
    pen.line([(0.05, 0.82), (0.95, 0.82)], CREAM)


def kite(pen, colour, dark, light, ink):
    tail = [(0.5 + 0.10 * sin(7 * t), 0.70 + 0.30 * t) for t in np.linspace(0, 1, 20)]
    pen.line(tail, ink)
    for x, y in tail[7::6]:
        for side in (-0.13, 0.13):
            pen.poly([(x, y), (x + side, y - 0.045), (x + side, y + 0.045)], colour, ink)
    top, low = (0.5, 0), (0.5, 0.74)
    left, right = (0, 0.28), (1, 0.28)
    cross = (0.5, 0.28)
    pen.poly([top, left, cross], colour)
    pen.poly([top, right, cross], dark)
    pen.poly([low, left, cross], dark)
    pen.poly([low, right, cross], colour)
    pen.poly([top, left, low, right], None, ink)
    pen.line([top, low], ink, 0.7)
    pen.line([left, right], ink, 0.7)


# ---- backgrounds: painted far to near ------------------------------------------------------------
def land(pen, rng, height, swell, top, bottom):
    x, (a, b, c) = np.linspace(0, 1, 40), rng.uniform(0, 2 * pi, 3)
    y = height + swell * (np.sin(4 * x + a) + 0.5 * np.sin(9 * x + b) + 0.2 * np.sin(17 * x + c))
    pen.wash([*zip(x, y), (1, 1), (0, 1)], top, bottom)


def disc(pen, rng, fill):
    x = pick(rng, (0.13, 0.87)) + rng.uniform(-0.04, 0.04)
    y = rng.uniform(0.1, 0.17)
    r = rng.uniform(0.055, 0.08)
    for glow in np.arange(5, 0, -1) * r / 4:
        pen.oval(x, y, r + glow, r + glow, (*mix(fill, WHITE, 0.3), 30))
    pen.oval(x, y, r, r, fill)
    face = mix(fill, (150, 80, 30), 0.6)
    for side in (-r, r):
        pen.oval(x + side * 0.35, y - r * 0.15, r * 0.1, r * 0.14, face)
        pen.oval(x + side * 0.6, y + r * 0.22, r * 0.16, r * 0.1, (250, 150, 110, 120))
    angles = np.linspace(0.3, 2.84, 9)
    pen.line([(x + r * 0.4 * cos(t), y + r * (0.1 + 0.4 * sin(t))) for t in angles], face)


def clouds(pen, rng, fill, strength):
    # One mask, so that puffs of a thin cloud do not show through one another.
    mask = Image.new("L", pen.image.size)
    puffs = ImageDraw.Draw(mask)
    for x, y, s in rng.uniform((0, 0.06, 0.6), (1, 0.32, 1.3), (rng.integers(2, 5), 3)):
        base = [(x - 0.14 * s, y - 0.025 * s), (x + 0.14 * s, y + 0.025 * s)]
        puffs.ellipse(pen.at(base), strength)
        radii = s * rng.uniform((0.025, 0.04, 0.035, 0.025), (0.035, 0.06, 0.055, 0.04))
        for k, r in enumerate(radii):
            u = x + (k - 1.5) * 0.05 * s
            puff = [(u - 0.045 * s, y - 1.5 * r), (u + 0.045 * s, y + 0.5 * r)]
            puffs.ellipse(pen.at(puff), strength)
    pen.image.paste(fill, (0, 0), mask)


def mountains(pen, rng):
    for x, y, w in rng.uniform((0, 0.28, 0.22), (1, 0.4, 0.34), (3, 3)):
        pen.poly([(x - w, 0.62), (x, y), (x + w, 0.62)], (164, 184, 212))
        snow = [(x, y), (x + w * 0.3, y + 0.1), (x + 0.02, y + 0.07), (x - w * 0.28, y + 0.1)]
        pen.poly(snow, (244, 248, 254))


def scatter(pen, rng, n, y0, y1, small, large, fill, shape=None):
    """Strews n dots, or strokes of a shape."""
    for x, y, s in rng.uniform((0, y0, small), (1, y1, large), (n, 3)):
        if shape:
            pen.line([(x + s * u, y + s * v) for u, v in shape], fill, 0.8)
        else:
            pen.oval(x, y, s, s, fill)


BIRD = [(-1, -0.5), (-0.5, -1), (0, 0), (0.5, -1), (1, -0.5)]
GRASS = [(-0.5, -1), (0, 0), (0, -1), (0, 0), (0.5, -1)]
WAVE = [(t, -0.5 * abs(sin(1.5 * t))) for t in np.linspace(-3, 3, 19)]
TWINKLE = [(-1, 0), (1, 0), (0, 0), (0, -1), (0, 1)]
STARFISH = [(cos(a) * r, sin(a) * r) for k in range(5) for a, r in ((1.26 * k, 1), (0, 0))]


# ---- what there is to see ------------------------------------------------------------------------
class Background(NamedTuple):
    on: str
    noun: str
    kinds: tuple
    hidden: tuple  # colours too close to the background's own
    layers: tuple  # function, *arguments


class Kind(NamedTuple):
    draw: Callable
    aspect: float  # width / height
    zone: str


ZONES = {  # where a thing's upper edge (sky) or lower edge may be, and how far it leans, in degrees
    "sky": (0.02, 0.30, 12),
    "ground": (0.70, 0.97, 0),
    "float": (0.54, 0.70, 4),
    "swim": (0.76, 0.97, 14),
}
KINDS = {
    "房子": Kind(house, 1.0, "ground"),
    "汽车": Kind(car, 1.5, "ground"),
    "松树": Kind(pine, 0.75, "ground"),
    "鲜花": Kind(flower, 0.68, "ground"),
    "气球": Kind(balloon, 0.68, "sky"),
    "风筝": Kind(kite, 0.75, "sky"),
    "帆船": Kind(boat, 0.95, "float"),
    "小鱼": Kind(fish, 1.35, "swim"),
}
BACKGROUNDS = {
    "meadow": Background(
        *("草地上", "草地", ("房子", "汽车", "气球", "松树", "鲜花", "风筝"), ()),
        layers=(
            (land, 0, 0, (134, 200, 244), (250, 250, 240)),
            (disc, (255, 226, 110)),
            (clouds, WHITE, 225),
            (scatter, 3, 0.06, 0.35, 0.012, 0.022, INK, BIRD),
            (land, 0.52, 0.035, (172, 212, 186), (140, 194, 150)),
            (land, 0.59, 0.025, (178, 216, 130), (150, 200, 110)),
            (land, 0.67, 0.015, (200, 230, 132), (140, 196, 96)),
            (scatter, 45, 0.70, 1, 0.015, 0.025, (104, 166, 76, 170), GRASS),
        ),
    ),
    "sea": Background(
        *("海面上", "大海", ("帆船", "小鱼", "气球", "风筝"), ("蓝色",)),
        layers=(
            (land, 0, 0, (150, 212, 246), (255, 240, 190)),
            (disc, (255, 214, 104)),
            (clouds, WHITE, 215),
            (scatter, 4, 0.06, 0.35, 0.012, 0.022, INK, BIRD),
            (land, 0.44, 0.002, (150, 212, 224), (110, 190, 212)),
            (land, 0.55, 0.007, (120, 196, 218), (80, 164, 204)),
            (land, 0.69, 0.011, (104, 184, 210), (60, 144, 194)),
            (land, 0.84, 0.015, (92, 172, 206), (54, 132, 188)),
            (scatter, 20, 0.46, 0.68, 0.008, 0.016, (*WHITE, 110), WAVE),
            (scatter, 24, 0.68, 1, 0.016, 0.028, (*WHITE, 140), WAVE),
        ),
    ),
    "beach": Background(
        *("沙滩上", "沙滩", ("帆船", "汽车", "房子", "松树", "鲜花", "气球", "风筝"), ()),
        layers=(
            (land, 0, 0, (126, 206, 244), (255, 252, 236)),
            (disc, (255, 222, 100)),
            (clouds, WHITE, 225),
            (scatter, 3, 0.06, 0.35, 0.012, 0.022, INK, BIRD),
            (land, 0.45, 0.001, (80, 176, 214), (220, 255, 236)),
            (scatter, 24, 0.47, 0.70, 0.008, 0.018, (*WHITE, 140), WAVE),
            (land, 0.720, 0.004, (255, 255, 250), (250, 240, 210)),
            (land, 0.735, 0.005, (246, 226, 178), (228, 196, 138)),
            (scatter, 60, 0.76, 1, 0.002, 0.004, (190, 150, 100, 150)),
            (scatter, 3, 0.79, 0.97, 0.014, 0.020, (224, 120, 100), STARFISH),
        ),
    ),
    "snow": Background(
        *("雪地上", "雪地", ("房子", "汽车", "松树", "气球", "风筝"), ("白色",)),
        layers=(
            (land, 0, 0, (150, 184, 220), (250, 246, 248)),
            (disc, (250, 232, 170)),
            (clouds, (240, 245, 252), 190),
            (mountains,),
            (land, 0.58, 0.025, (222, 232, 246), (206, 220, 240)),
            (land, 0.66, 0.015, (248, 251, 255), (214, 226, 244)),
            (scatter, 110, 0, 1, 0.002, 0.007, (*WHITE, 220)),
        ),
    ),
    "night": Background(
        *("夜空下", "夜晚", ("房子", "汽车", "松树", "鲜花", "气球"), ("黑色", "蓝色")),
        layers=(
            (land, 0, 0, (22, 26, 74), (120, 100, 176)),
            (scatter, 70, 0, 0.6, 0.001, 0.004, (255, 250, 214, 210)),
            (scatter, 9, 0, 0.5, 0.010, 0.020, (255, 250, 214), TWINKLE),
            (disc, (255, 244, 196)),
            (clouds, (150, 146, 200), 90),
            (land, 0.55, 0.030, (62, 68, 124), (52, 62, 110)),
            (land, 0.64, 0.015, (76, 104, 130), (46, 66, 98)),
            (scatter, 14, 0.5, 0.95, 0.003, 0.005, (240, 250, 140)),
        ),
    ),
}


# ---- sentences -----------------------------------------------------------------------------------
# Sentences are written and judged from this one table. a, b, c are things (红色的汽车), A, B, C
# their names alone and ca, cb, cc their colours; P and N are the place. The letters beside a
# template are what it claims, from left to right. One that claims nothing still names its things
# in that order when it is written, so that a captioner has an order to learn; is_true() takes
# any. Sentences about everything name a thing before its colour, and no thing has its classifier
# (一辆): were anything of it said before, nobody would have to look for the name.
TEMPLATES = (
    ("{P}的{A}是{ca}的，{B}是{cb}的", ""),
    ("{P}的{A}是{ca}的，{B}是{cb}的，{C}是{cc}的", ""),
    ("画里的{A}是{ca}的，{B}是{cb}的，背景是{N}", ""),
    ("画里的{A}是{ca}的，{B}是{cb}的，{C}是{cc}的，背景是{N}", ""),
    ("左边的{A}是{ca}的，右边的{B}是{cb}的", "ab"),
    ("{P}有{a}，它的右边是{b}", "ab"),
    ("左边是{a}，右边是{b}", "ab"),
    ("{a}在{b}的左边", "ab"),
    ("{a}在{b}的右边", "ba"),
    ("{b}的左边有{a}", "ab"),
    ("{b}的右边有{a}", "ba"),
)


def _sentences(scene):
    """Every true sentence there is: (template, places from the left of what it names, sentence)."""
    place = BACKGROUNDS[scene["background"]]
    things = sorted(scene["things"], key=lambda thing: thing["box"][0] + thing["box"][2])
    for template in TEMPLATES:
        text, claim = template
        slots = claim or [letter for letter in "abc" if f"{{{letter.upper()}}}" in text]
        for named in permutations(range(len(things)), len(slots)):
            if claim and named != tuple(sorted(named)):
                continue
            words = {"P": place.on, "N": place.noun}
            for slot, i in zip(slots, named):
                name, colour = things[i]["thing"], things[i]["colour"]
                words |= {slot.upper(): name, f"c{slot}": colour, slot: f"{colour}的{name}"}
            yield template, named, text.format(**words)


def write_captions(scene, rng):
    """Five true sentences of different build, of which two or more name everything and the place,
    and two or more tell sides."""
    options = {}
    for template, named, sentence in _sentences(scene):
        if named == tuple(sorted(named)):
            options.setdefault((template, len(named)), []).append(sentence)
    whole = [key for key in options if not key[0][1] and key[1] == len(scene["things"])]
    sides = [key for key in options if key[0][1]]
    chosen = [keys[i] for keys in (whole, sides) for i in rng.permutation(len(keys))[:2]]
    chosen.append(pick(rng, [key for key in options if key not in chosen]))
    return [pick(rng, options[chosen[i]]) for i in rng.permutation(5)]


def is_true(caption: str, scene: dict) -> bool:
    """Whether a caption is a sentence of TEMPLATES and all it claims holds in the scene; white
    space and a final 。 do not matter."""
    caption = re.sub(r"\s", "", caption).removesuffix("。")
    return any(caption == sentence for _, _, sentence in _sentences(scene))


# ---- what only the sample set can tell of a model ------------------------------------------------
def is_sample_set(data_dir: str) -> bool:
    return (Path(data_dir) / "scenes.json").exists()


def measure_captions(captions: list[dict], file_names: list[str], positions: np.ndarray,
                     data_dir: str) -> dict[str, float]:
    """Whether captions are true, and attention peaks in the boxes of what they name and colour.

    Args:
        captions: as decoding.generate gives them.
        file_names: of their pictures.
        positions: (s,), where the centres of the attention's cells lie, see pixel_positions.
    """
    scenes = read_scenes(Path(data_dir) / "scenes.json")
    pairs = [(caption, scenes[name]) for caption, name in zip(captions, file_names)
             if name in scenes]
    if not pairs:
        return {}
    true = sum(is_true("".join(caption["words"]), scene) for caption, scene in pairs)
    hits, named, chance = _sum_of_hits(pairs, positions, named_things)
    colour_hits, colours, _ = _sum_of_hits(pairs, positions, coloured_things)
    return dict(
        true_captions=true / len(pairs),
        attention_in_box=hits / max(named, 1),
        attention_in_box_by_chance=chance / max(named, 1),
        attention_in_box_colours=colour_hits / max(colours, 1))


def _sum_of_hits(pairs, positions, told):
    counts = [attention_peak_hits(caption["words"], caption["alphas"], positions, scene, told)
              for caption, scene in pairs]
    return [sum(column) for column in zip(*counts)]


def read_scenes(path: Path) -> dict[str, dict]:
    """Read scenes.json: picture's file name -> scene. Raises UserError where it is damaged."""
    try:
        scenes = json.loads(path.read_text(encoding="utf-8"))
        if not all(map(_is_scene, scenes.values())):
            raise ValueError("its scenes are not what this program draws")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)[:200]}): python data/sample.py makes "
                        f"it again") from None
    return scenes


def _is_scene(scene):
    for thing in scene["things"]:
        edges = [edge for edge in thing["box"] if type(edge) in (int, float)]
        if len(edges) != 4 or not isinstance(thing["thing"] + thing["colour"], str):
            return False
    return scene["background"] in BACKGROUNDS and len(scene["things"]) < 4


def named_things(words: list[str], scene: dict) -> list[tuple[int, list[float]]]:
    """For each word that names a thing of the scene its position among the words, and the box
    (x0, y0, x1, y1) in fractions of the picture."""
    boxes = {thing["thing"]: thing["box"] for thing in scene["things"]}
    return [(i, boxes[word]) for i, word in enumerate(words) if word in boxes]


def coloured_things(words: list[str], scene: dict) -> list[tuple[int, list[float]]]:
    """As named_things, for each colour that is told of a thing: 汽车是红色的, 红色的汽车."""
    found = []
    for i, box in named_things(words, scene):
        for link, step in (("是", 1), ("的", -1)):
            colour = i + 2 * step
            if 0 <= colour < len(words) and words[i + step] == link and words[colour] in COLOURS:
                found.append((colour, box))
    return found


def attention_peak_hits(words: list[str], alphas: np.ndarray, positions: np.ndarray, scene: dict,
                        told: Callable = named_things) -> tuple[int, int, float]:
    """Whether attention peaked on what was told: named_things or coloured_things.

    Where pooling made several cells equal, the peak is the middle of the strongest ones.

    Args:
        alphas: (len(words), s, s), the map of each word.
        positions: (s,), of rows and columns alike.
    Returns:
        of the words that tell of a thing, how many had their peak inside its box;
        how many there are;
        how many peaks of cells picked at random would have been inside, on average.
    """
    y, x = positions[:, None], positions
    hits = 0
    chance = 0.0
    found = told(words, scene)
    for i, (x0, y0, x1, y1) in found:
        inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
        chance += float(inside.mean())
        strongest = np.argwhere(alphas[i] >= alphas[i].max() * (1 - 1e-5))
        peak_y, peak_x = positions[strongest].mean(axis=0)
        hits += int(x0 <= peak_x <= x1 and y0 <= peak_y <= y1)
    return hits, len(found), chance


# ---- scenes --------------------------------------------------------------------------------------
def _cut_out(rng, kind, colour, side, largest):
    """The thing on transparent paper, cropped to its own pixels: the image's border is its box."""
    height = side * rng.uniform(max(0.26, 0.26 / kind.aspect), min(largest, largest / kind.aspect))
    width = height * kind.aspect
    stroke = max(2, side // 160)
    tilt = ZONES[kind.zone][2]
    image = Image.new("RGBA", (round(width) + 2 * stroke, round(height) + 2 * stroke))
    tone = COLOURS[colour]
    dark, light, ink = mix(tone, INK, 0.2), mix(tone, WHITE, 0.3), INK
    if colour in ("白色", "黑色"):
        dark = mix(tone, (110, 110, 130), 0.22)
    if colour == "黑色":
        light, ink = mix(tone, WHITE, 0.14), (150, 150, 160)
    kind.draw(Pen(image, stroke, stroke), tone, dark, light, ink)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    image = image.rotate(rng.uniform(-tilt, tilt), Image.Resampling.BICUBIC, expand=True)
    return image.crop(image.getbbox())


def _clash(a, b, side):
    """Whether one box hides more than a tenth of another, or left and right are in doubt."""
    overlap = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return overlap > 0.1 * smaller or abs(a[0] + a[2] - b[0] - b[2]) < 0.25 * side


def _arrange(rng, images, zones, pen):
    side = pen.w
    for _ in range(200):
        boxes = []
        for image, zone in zip(images, zones):
            lowest, highest, _ = ZONES[zone]
            x = round(rng.uniform(0.01 * side, 0.99 * side - image.width))
            y = round(pen.height(rng.uniform(lowest, highest)) * side)
            if zone != "sky":
                y -= image.height
            boxes.append((x, y, x + image.width, y + image.height))
        is_inside = all(y >= 0 for _, y, _, _ in boxes)
        if is_inside and not any(_clash(a, b, side) for a, b in combinations(boxes, 2)):
            return boxes
    return None


def _paste(pen, image, box, zone):
    x0, y0, x1, y1 = box
    rim = 2 * pen.stroke
    x, y = (x0 + x1) / 2 / pen.w, y1 / pen.h
    rx = (x1 - x0) / 2 / pen.w
    if zone == "ground":
        pen.oval(x + 0.02, y - 0.005, rx, 0.02, (30, 40, 60, 60))
    # A rim of cream paper: whatever a thing stands before, its own colour ends visibly.
    paper = ImageOps.expand(image.getchannel("A"), rim).filter(ImageFilter.GaussianBlur(rim / 2))
    pen.image.paste(CREAM, (x0 - rim, y0 - rim), paper.point(lambda a: 255 if a > 60 else 4 * a))
    pen.image.paste(image, (x0, y0), image)
    if zone in ("float", "swim"):
        for k in range(3):
            ripple = np.linspace(-1.15 + 0.2 * k, 1.15 - 0.2 * k, 24)
            points = [(x + rx * t, y - 0.008 + 0.012 * k + 0.004 * sin(9 * t + k)) for t in ripple]
            pen.line(points, (*WHITE, 190), 1.2)


def draw_scene(seed: int, split: str, index: int, size: int) -> tuple[Image.Image, dict]:
    """Draws a picture of a split, `size` pixels wide and high; the same arguments, the same one.

    Its scene is {"split", "background", "things": [{"thing", "colour", "box"}]}, with boxes
    (x0, y0, x1, y1) in fractions of the picture.
    """
    rng = np.random.default_rng([seed, list(SPLITS).index(split), index])
    side = size * ZOOM
    pen = Pen(Image.new("RGB", (side, side)), max(2, side // 160), horizon=rng.uniform(*HORIZONS))
    background = pick(rng, list(BACKGROUNDS))
    place = BACKGROUNDS[background]
    for paint, *arguments in place.layers:
        paint(pen, rng, *arguments)

    boxes = None
    visible = [colour for colour in COLOURS if colour not in place.hidden]
    while not boxes:
        names = [place.kinds[i] for i in rng.permutation(len(place.kinds))[: rng.integers(2, 4)]]
        colours = [pick(rng, visible) for _ in names]
        zones = [KINDS[name].zone for name in names]
        largest = 0.46 if len(names) == 2 else 0.40
        images = [_cut_out(rng, KINDS[name], colour, side, largest)
                  for name, colour in zip(names, colours)]
        boxes = _arrange(rng, images, zones, pen)
    pen = Pen(pen.image, pen.stroke)  # the background is stretched, things are not
    for i in sorted(range(len(names)), key=lambda i: boxes[i][3]):  # what stands lower is nearer
        _paste(pen, images[i], boxes[i], zones[i])

    things = []
    for name, colour, box in zip(names, colours, boxes):
        box = [round(edge / side, 4) for edge in box]
        things.append({"thing": name, "colour": colour, "box": box})
    image = _photograph(rng, pen.image, size)
    return image, {"split": split, "background": background, "things": things}


def _photograph(rng, image, size):
    """Shrinks the picture to its size, under uneven light and with grain."""
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BOX), np.float32)
    blots = Image.fromarray(rng.normal(0, 4, (9, 9)).astype(np.float32))
    blots = np.asarray(blots.resize((size, size), Image.Resampling.BICUBIC))
    grain = rng.standard_normal((size, size), np.float32) * 2.5
    pixels = pixels * rng.uniform(0.93, 1.05) + (blots + grain)[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


# ---- files ---------------------------------------------------------------------------------------
def _make(index, seed, split, size):
    image, scene = draw_scene(seed, split, index, size)
    rng = np.random.default_rng([seed, list(SPLITS).index(split), index, 1])
    captions = write_captions(scene, rng)
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=90)
    file_name = hashlib.sha1(f"{seed} {split} {index}".encode()).hexdigest() + ".jpg"
    return file_name, jpeg.getvalue(), scene, captions


def _write_split(pool, out, split, count, seed, size):
    name, date = SPLITS[split]
    root = f"ai_challenger_caption_{name}_{date}"
    scenes, captions = {}, {}
    with replacing(out / f"{root}.zip") as part, zipfile.ZipFile(part, "w") as archive:

        def add(path, data):
            archive.writestr(zipfile.ZipInfo(f"{root}/{path}", (2017, 9, 2, 0, 0, 0)), data)

        make = partial(_make, seed=seed, split=split, size=size)
        jobs = pool.imap(make, range(count), chunksize=4)
        for file, jpeg, scene, sentences in tqdm(jobs, split, count, unit="pic"):
            add(f"caption_{name}_images_{date}/{file}", jpeg)
            scenes[file] = scene
            captions[file] = sentences
        notes = _coco(captions) if split == "test_a" else _contest(captions)
        add(f"caption_{name}_annotations_{date}.json", json.dumps(notes, ensure_ascii=False))
    return scenes


def _contest(captions):
    return [{"url": "", "image_id": file, "caption": texts} for file, texts in captions.items()]


def _coco(captions):
    images, annotations = [], []
    for number, (file, texts) in enumerate(captions.items(), 1):
        images.append({"id": number, "file_name": file})
        for text in texts:
            annotations.append({"id": len(annotations) + 1, "image_id": number, "caption": text})
    return {"images": images, "annotations": annotations}


def main():
    parser = new_parser("Draw the sample set.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "sample", metavar="DIR")
    for option, default in dict(train=3200, valid=200, test=200, size=256, seed=0).items():
        parser.add_argument(f"--{option}", type=int, default=default, metavar="N",
                            help="default: %(default)s")
    args = parser.parse_args()
    for option, least in dict(train=0, valid=0, test=0, size=32, seed=0).items():
        if getattr(args, option) < least:
            fail(f"--{option} must be at least {least}")
    with alone(args.out / "pre_process.lock", "--out"):
        draw_set(args)


def draw_set(args):
    """Draws the three splits that the command line asks for, in place of those that are there."""
    scenes = {}
    counts = (args.train, args.valid, args.test)
    names = [f"ai_challenger_caption_{name}_{date}" for name, date in SPLITS.values()]
    if not (args.out / "scenes.json").exists():
        for path in (args.out / f"{name}{ending}" for name in names for ending in (".zip", "")):
            if path.exists():
                fail(f"{path} is there, but no scenes.json: this is not a drawn set; "
                     f"choose another --out")
    for name in names:  # what was extracted from the archives that are about to be replaced
        shutil.rmtree(args.out / name, ignore_errors=True)
    with multiprocessing.Pool(initializer=end_with_parent) as pool:
        for split, count in zip(SPLITS, counts):
            scenes |= _write_split(pool, args.out, split, count, args.seed, args.size)
    with replacing(args.out / "scenes.json") as part:
        part.write_text(json.dumps(scenes, ensure_ascii=False), "utf-8")
    for split, count in zip(SPLITS, counts):
        print(f"{split:6} {count:6,} pictures {5 * count:7,} sentences")


if __name__ == "__main__":
    run_script(main)
