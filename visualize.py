"""Attention drawn over a picture: a figure with the things' regions and a tile per word, and an
HTML page where one points at a word."""
import base64
import io
import itertools
import json
from pathlib import Path

import mplfonts
import numpy as np
from fontTools import subset
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve
from matplotlib.patheffects import withStroke
from PIL import Image
from skimage import filters, measure, transform  # each is loaded when it is first used

from datasets import kind_of

FONT = Path(mplfonts.__file__).parent / "fonts" / "NotoSansCJKsc-Regular.otf"
TEXT = dict(font=FONT, va="center", parse_math=False)  # a word between dollar signs is no formula
TILES_PER_ROW = 6
TILE, GAP = 1.9, 0.03  # inches: a tile's width, and around it
WORD_HEIGHT, CAPTION_HEIGHT = 0.3, 0.5  # inches: above a tile, above all
CAPTION_EM, LABEL_EM = 0.22, 0.18  # inches: a character of the caption, of a name beside its region
PANEL = TILE * TILES_PER_ROW / 2  # the width of the picture, and of that with the regions
COLOURS = ("#e6194b", "#3cb44b", "#ffb000", "#4363d8",  # of things, in turn
           "#f58231", "#911eb4", "#00a6a6", "#f032e6")
REGION = 0.5  # of the heat's maximum: where a thing's region ends
EVERYWHERE = 0.7  # share of the picture from which on a region does not say where the thing is
LONGEST_SIDE, LONGEST_SHAPE = 640, 3  # of a picture as shown: pixels; longer side by shorter
LONGEST_WORD = 16  # characters, in a figure
HEAT_SIDE = 128  # pixels per side of a heat map, which is stretched over the picture
SMOOTHING = 0.65  # standard deviation, in steps from pixel to pixel of the attention
ROOT = Path(__file__).parent
TEMPLATE = ROOT / "images" / "template.html"
SHARED = {"{{STYLE}}": "attention.css", "{{SCRIPT}}": "attention.js"}  # with deploy/web's page


def draw_attention(picture: Image.Image, words: list[str], alphas: np.ndarray,
                   positions: np.ndarray, every_word: bool = False) -> Figure:
    """A figure of the picture, beside it where attention lay at the words that name things, unless
    nearly everywhere, and below it the attention at each word that says something, from 0 to its
    maximum.

    Args:
        picture: RGB.
        alphas: (len(words), s, s).
        positions: (s,), of pixel_positions.
        every_word: a tile for 的 and 是 too.
    """
    picture = bounded(picture)
    weights = heat_weights(positions)
    heats = [weights @ alpha @ weights.T for alpha in alphas]
    kinds = [kind_of(word) for word in words]
    words = ["".join(filter(str.isprintable, word))[:LONGEST_WORD] for word in words]
    colours = colours_of_things(kinds, heats)
    looks = list(zip(words, heats, colours))
    tiles = [look for look, kind in zip(looks, kinds) if every_word or kind != "function word"]

    shape = picture.height / picture.width
    rows = -(-len(tiles) // TILES_PER_ROW)
    height = CAPTION_HEIGHT + PANEL * shape + rows * (WORD_HEIGHT + TILE * shape)
    figure = Figure(figsize=(2 * PANEL, height), dpi=110)
    axis = figure.add_axes((0, 0, 1, 1))  # one for all, as another takes longer than a tile
    write_caption(axis, words, colours, kinds)
    axis.imshow(picture, extent=inside(0, CAPTION_HEIGHT, PANEL, PANEL * shape))
    panel = inside(PANEL, CAPTION_HEIGHT, PANEL, PANEL * shape)
    axis.imshow(picture, extent=panel)
    draw_regions(axis, looks, panel)
    draw_tiles(axis, tiles, picture.convert("L"), shape)
    axis.set(xlim=(0, 2 * PANEL), ylim=(height, 0), aspect="auto")  # inches, downwards
    axis.set_axis_off()
    return figure


def bounded(picture: Image.Image) -> Image.Image:
    """A copy to be shown, however large or thin the picture is: a very thin one is stretched, and
    attention, which is of the whole picture, with it.
    """
    copy = picture.copy()
    copy.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    shortest = -(-max(copy.size) // LONGEST_SHAPE)
    return copy.resize((max(copy.width, shortest), max(copy.height, shortest)))


def heat_weights(positions: np.ndarray) -> np.ndarray:
    """Smooths attention maps to heat maps of the whole picture: weights @ alpha @ weights.T.

    Args:
        positions: (s,), of pixel_positions.
    Returns:
        (HEAT_SIDE, s): the weight of each attention row (or column) in each row (or column) of the
        heat map; they sum to 1, and attention rows at the same position weigh the same.
    """
    places, cells, counts = np.unique(positions, return_inverse=True, return_counts=True)
    cell = np.arange(len(places))
    # Each place by itself, smoothed and then interpolated by splines, in steps from place to place:
    # in distances a peak would shift towards the wider of its two steps.
    smooth = filters.gaussian(np.eye(len(places)), sigma=(SMOOTHING, 0), mode="constant")
    steps = np.interp((np.arange(HEAT_SIDE) + 0.5) / HEAT_SIDE, places, cell)
    coordinates = np.meshgrid(steps, cell, indexing="ij")
    weights = transform.warp(smooth, np.array(coordinates), order=3, mode="edge")
    weights /= weights.sum(axis=1, keepdims=True)
    return (weights / counts)[:, cells]


def colours_of_things(kinds, heats):
    """A colour for each noun whose attention is not nearly everywhere, None for other words."""
    turn = itertools.cycle(COLOURS)
    shares = [(heat > REGION * heat.max()).mean() for heat in heats]
    return [next(turn) if kind == "noun" and share < EVERYWHERE else None
            for kind, share in zip(kinds, shares)]


def inside(left, top, width, height):
    """The extent of a picture that leaves a gap around it: left, right, bottom, top."""
    return left + GAP, left + width - GAP, top + height - GAP, top + GAP


def write_caption(axis, words, colours, kinds):
    """Words side by side, things in their colours, those that say nothing by themselves in gray."""
    length = ems("".join(words))
    em = min(CAPTION_EM, 2 * PANEL / max(length, 1))
    left = PANEL - em * length / 2
    for word, colour, kind in zip(words, colours, kinds):
        plain = "#888888" if kind == "function word" else "black"
        axis.text(left, CAPTION_HEIGHT / 2, word, **TEXT, size=72 * em, color=colour or plain)
        left += em * ems(word)
    if not words:
        axis.text(PANEL, CAPTION_HEIGHT / 2, "（空）", **TEXT, size=72 * em, ha="center")


def ems(word):
    """How wide a word is in FONT, about, in Chinese characters."""
    return sum(1 if ord(character) > 0x2e7f else 0.6 for character in word)


def draw_regions(axis, looks, panel):
    """Tint and outline where attention lay at each thing, and write its name at the maximum."""
    left, right, bottom, top = panel
    scale = np.array([right - left, bottom - top]) / HEAT_SIDE
    names = []
    for word, heat, colour in looks:
        if not colour:
            continue
        # Zeros around it close the outlines at the picture's edge.
        contours = measure.find_contours(np.pad(heat, 1), REGION * heat.max())
        curves = [Curve((left, top) + scale * (contour[:, ::-1] - 0.5)) for contour in contours]
        axis.add_patch(PathPatch(Curve.make_compound_path(*curves), linewidth=2, edgecolor=colour,
                                 facecolor=(colour, 0.25)))
        row, column = np.unravel_index(heat.argmax(), heat.shape)
        x, y = (left, top) + scale * (column + 0.5, row + 0.5)
        write_name(axis, word, colour, x, y, names)


def write_name(axis, word, colour, x, y, names):
    """Write a thing's name at (x, y), but inside the right panel, and below the names before it."""
    half = LABEL_EM * ems(word) / 2
    x = min(max(x, PANEL + GAP + half), 2 * PANEL - GAP - half)
    y = max(y, CAPTION_HEIGHT + LABEL_EM)
    while any(abs(x - other_x) < half + other_half and abs(y - other_y) < 1.2 * LABEL_EM
              for other_x, other_y, other_half in names):
        y += LABEL_EM / 4
    names.append((x, y, half))
    axis.text(x, y, word, **TEXT, size=72 * LABEL_EM, ha="center", color=colour,
              path_effects=[withStroke(linewidth=3, foreground="white")])


def draw_tiles(axis, tiles, gray, shape):
    """Each word over its heat, in rows below the panels."""
    gray.thumbnail((256, 256))
    for number, (word, heat, colour) in enumerate(tiles):
        row, column = divmod(number, TILES_PER_ROW)
        left = column * TILE
        top = CAPTION_HEIGHT + PANEL * shape + row * (WORD_HEIGHT + TILE * shape)
        axis.text(left + TILE / 2, top + WORD_HEIGHT / 2, word, **TEXT, size=13, ha="center",
                  color=colour or "black")
        tile = inside(left, top + WORD_HEIGHT, TILE, TILE * shape)
        axis.imshow(gray, cmap="gray", vmin=0, vmax=255, extent=tile)
        axis.imshow(heat, cmap="jet", alpha=0.5, vmin=0, extent=tile)


def page_entry(name: str, picture: Image.Image, caption) -> dict:
    """The page's data of one picture, for JSON.

    Args:
        name: of its file.
        picture: RGB.
        caption: a Caption of demo.py.
    Returns:
        name, words, small (per word: whether it says nothing by itself), score (str), ended; size
        (width, height in pixels) and jpeg (base64) of the picture, at most 640 pixels per side;
        alphas (base64, one per word): s * s bytes, row by row, proportional to the attention, the
        maximum 255.
    """
    picture = bounded(picture)
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=80, comment=b"")  # without EXIF data, such as place and time
    alphas = [np.rint(255 * alpha / alpha.max()).astype(np.uint8) for alpha in caption.alphas]
    small = [kind_of(word) == "function word" for word in caption.words]
    return dict(name=name, words=caption.words, small=small, score=f"{caption.score:.3f}",
                ended=caption.ended, size=picture.size, jpeg=base64_text(jpeg.getvalue()),
                alphas=[base64_text(alpha.tobytes()) for alpha in alphas])


def base64_text(content):
    return base64.b64encode(content).decode()


def html_page(model: str, positions: np.ndarray, entries: list[dict]) -> str:
    """A self-contained page: images/template.html with what deploy/web shares, data and font.

    Args:
        model: its description, shown on the page.
        positions: (s,), of pixel_positions.
        entries: of page_entry.
    """
    weights = heat_weights(positions).round(4)
    data = dict(model=model, positions=positions.tolist(), weights=weights.tolist(),
                pictures=entries)
    template = TEMPLATE.read_text(encoding="utf-8")
    for place, name in SHARED.items():
        text = (ROOT / "deploy" / "web" / name).read_text(encoding="utf-8")
        template = template.replace(place, text)
    font = base64_text(font_subset(template + json.dumps(data, ensure_ascii=False)))
    # Without "<" no file name or caption can end the script element that holds the data.
    data = json.dumps(data).replace("<", "\\u003c")
    # In this order, as a caption may contain {{FONT}}.
    return template.replace("{{FONT}}", font).replace("{{DATA}}", data)


def font_subset(text: str) -> bytes:
    """FONT reduced to the characters of a text, about 20 KB: a WOFF file, the same for the same."""
    options = subset.Options(flavor="woff", layout_features=[])
    woff = io.BytesIO()
    with subset.load_font(FONT, options, dontLoadGlyphNames=True) as font:
        subsetter = subset.Subsetter(options)
        subsetter.populate(unicodes=map(ord, text))
        subsetter.subset(font)
        subset.save_font(font, woff, options)
    return woff.getvalue()
