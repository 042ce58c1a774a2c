"""Attention drawn over a picture: a figure with the things' regions and a tile per word, and an HTML page where one
points at a word."""
import base64
import io
import json
from pathlib import Path

import mplfonts
import numpy as np
from fontTools import subset
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patheffects import withStroke

from datasets import kind_of

FONT = FontProperties(fname=str(Path(mplfonts.__file__).parent / "fonts" / "NotoSansCJKsc-Regular.otf"))
TEXT = dict(font=FONT, va="center", parse_math=False)  # a word between dollar signs is no formula
TILES_PER_ROW = 6
TILE, GAP, WORD_HEIGHT, CAPTION_HEIGHT = 1.9, 0.03, 0.3, 0.5  # inches: a tile's width, around it, above it, above all
CAPTION_EM, LABEL_EM = 0.22, 0.18  # inches: a character of the caption, of a name beside its region
PANEL = TILE * TILES_PER_ROW / 2  # the width of the picture, and of that with the regions
COLOURS = "#e6194b", "#3cb44b", "#ffb000", "#4363d8", "#f58231", "#911eb4", "#00a6a6", "#f032e6"  # of things, in turn
REGION = 0.5  # of the heat's maximum: where a thing's region ends
EVERYWHERE = 0.7  # share of the picture from which on a region says nothing about where the thing is
LONGEST_SIDE, LONGEST_SHAPE = 640, 3  # of a picture as shown: pixels; the longer side by the shorter
LONGEST_WORD = 16  # characters, in a figure
HEAT_SIDE = 128  # pixels per side of a heat map, which is stretched over the picture
TEMPLATE = Path(__file__).parent / "images" / "template.html"


def draw_attention(picture, words, alphas, positions, every_word=False):
    """A figure of the picture, beside it where attention lay at the words that name things, unless nearly everywhere,
    and below it the attention at each word that says something, from 0 to its maximum.

    Args:
        picture (PIL.Image): RGB. words (list of str). alphas (float array (len(words), s, s)).
        positions (float array (s,)): of pixel_positions. every_word (bool): a tile for 的 and 是 too.
    Returns:
        matplotlib.figure.Figure
    """
    picture = bounded(picture)
    weights, shape = heat_weights(positions), picture.height / picture.width
    heats = [weights @ alpha @ weights.T for alpha in alphas]
    kinds = [*map(kind_of, words)]
    words = ["".join(filter(str.isprintable, word))[:LONGEST_WORD] for word in words]
    colours = iter(COLOURS * len(words))
    colours = [next(colours) if kind == "noun" and (heat > REGION * heat.max()).mean() < EVERYWHERE else None
               for kind, heat in zip(kinds, heats)]
    tiles = [number for number, kind in enumerate(kinds) if every_word or kind != "function word"]
    tile_height = TILE * shape + WORD_HEIGHT
    width, tiles_top = 2 * PANEL, CAPTION_HEIGHT + PANEL * shape
    height = tiles_top + -(-len(tiles) // TILES_PER_ROW) * tile_height
    figure = Figure(figsize=(width, height), dpi=110)
    axis = figure.add_axes((0, 0, 1, 1))  # one for all, as creating one takes longer than drawing a tile
    write_caption(axis, words, colours, kinds, width / 2)
    for left in (0, PANEL):
        axis.imshow(picture, extent=(left + GAP, left + PANEL - GAP, tiles_top - GAP, CAPTION_HEIGHT + GAP))
    labels = []
    for word, heat, colour in zip(words, heats, colours):
        if colour:
            x, y = outline(axis, heat, colour, PANEL + GAP, CAPTION_HEIGHT + GAP, PANEL - 2 * GAP,
                           PANEL * shape - 2 * GAP)
            label(axis, word, colour, x, y, labels)

    gray = picture.convert("L")
    gray.thumbnail((256, 256))
    for place, number in enumerate(tiles):
        left, top = place % TILES_PER_ROW * TILE, tiles_top + place // TILES_PER_ROW * tile_height
        axis.text(left + TILE / 2, top + WORD_HEIGHT / 2, words[number], **TEXT, size=13, ha="center",
                  color=colours[number] or "black")
        extent = (left + GAP, left + TILE - GAP, top + tile_height - GAP, top + WORD_HEIGHT + GAP)
        axis.imshow(gray, cmap="gray", vmin=0, vmax=255, extent=extent)
        axis.imshow(heats[number], cmap="jet", alpha=0.5, vmin=0, extent=extent)
    axis.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    axis.set_axis_off()
    return figure


def bounded(picture):
    """A copy to be shown, however large or thin the picture is: a very thin one is stretched, and attention, which is
    of the whole picture, with it. Returns: PIL.Image."""
    copy = picture.copy()
    copy.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    shortest = -(-max(copy.size) // LONGEST_SHAPE)
    return copy.resize((max(copy.width, shortest), max(copy.height, shortest)))


def write_caption(axis, words, colours, kinds, middle):
    """Write the words side by side, things in their colours, words that say nothing by themselves in gray."""
    em = min(CAPTION_EM, 2 * middle / max(ems("".join(words)), 1))
    widths = [em * ems(word) for word in words]
    size, left = 72 * em, middle - sum(widths) / 2
    for word, colour, kind, wide in zip(words, colours, kinds, widths):
        axis.text(left, CAPTION_HEIGHT / 2, word, **TEXT, size=size,
                  color=colour or ("#888888" if kind == "function word" else "black"))
        left += wide
    if not words:
        axis.text(middle, CAPTION_HEIGHT / 2, "（空）", **TEXT, size=size, ha="center")


def ems(word):
    """How wide a word is in FONT, about, in Chinese characters."""
    return sum(1 if ord(character) > 0x2e7f else 0.6 for character in word)


def outline(axis, heat, colour, left, top, width, height):
    """Tint and outline where a heat map (HEAT_SIDE, HEAT_SIDE) is above REGION of its maximum. Returns: float, float:
    where the maximum lies."""
    steps = (np.arange(HEAT_SIDE) + 0.5) / HEAT_SIDE
    x, y, bound = left + width * steps, top + height * steps, REGION * heat.max()
    axis.contourf(x, y, heat, levels=[bound, heat.max() * 1.001], colors=[colour], alpha=0.25)
    axis.contour(x, y, heat, levels=[bound], colors=[colour], linewidths=2)
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    return x[column], y[row]


def label(axis, word, colour, x, y, labels):
    """Write a thing's name at (x, y), but inside the right panel, and below the names that are there already.

    Args: labels (list): of these; grows.
    """
    half = LABEL_EM * ems(word) / 2
    x, y = min(max(x, PANEL + GAP + half), 2 * PANEL - GAP - half), max(y, CAPTION_HEIGHT + LABEL_EM)
    while any(abs(x - other_x) < half + other_half and abs(y - other_y) < 1.2 * LABEL_EM
              for other_x, other_y, other_half in labels):
        y += LABEL_EM / 4
    labels.append((x, y, half))
    axis.text(x, y, word, **TEXT, size=72 * LABEL_EM, ha="center", color=colour,
              path_effects=[withStroke(linewidth=3, foreground="white")])


def heat_weights(positions):
    """Interpolates attention maps to smooth heat maps of the whole picture: weights @ alpha @ weights.T.

    Args:
        positions (float array (s,)): of pixel_positions.
    Returns:
        float array (HEAT_SIDE, s): the weight of each attention row (or column) in each row (or column) of the heat
        map; they sum to 1, and attention rows at the same position weigh the same.
    """
    # Gaussian in steps between positions, as in distances a peak would shift towards the wider of its two steps.
    places, number, equals = np.unique(positions, return_inverse=True, return_counts=True)
    rows = np.interp((np.arange(HEAT_SIDE) + 0.5) / HEAT_SIDE, places, np.arange(len(places)))
    near = np.exp(-0.5 * ((rows[:, None] - number) / 0.65) ** 2) / equals[number]
    return near / near.sum(axis=1, keepdims=True)


def page_entry(name, picture, caption):
    """The page's data of one picture.

    Args:
        name (str): of its file. picture (PIL.Image): RGB. caption (dict): of decoding.generate.
    Returns:
        dict for JSON: name, words, small (per word: whether it says nothing by itself), score (str), ended; size
        (width, height in pixels) and jpeg (base64) of the picture, at most 640 pixels per side; alphas (list of base64,
        one per word): s * s bytes, row by row, proportional to the attention, the maximum 255.
    """
    picture = bounded(picture)
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=80, comment=b"")  # without EXIF data, such as place and time
    alphas = [np.rint(255 * alpha / alpha.max()).astype(np.uint8).tobytes() for alpha in caption["alphas"]]
    small = [kind_of(word) == "function word" for word in caption["words"]]
    return dict(name=name, words=caption["words"], small=small, score=f"{caption['score']:.3f}", ended=caption["ended"],
                size=picture.size, jpeg=base64.b64encode(jpeg.getvalue()).decode(),
                alphas=[base64.b64encode(alpha).decode() for alpha in alphas])


def html_page(model, positions, entries):
    """A self-contained page: images/template.html with data and font.

    Args:
        model (str): its description, shown on the page. positions (float array (s,)): of pixel_positions.
        entries (list): of page_entry.
    Returns:
        str
    """
    weights = heat_weights(positions).round(4)
    data = dict(model=model, positions=positions.tolist(), weights=weights.tolist(), pictures=entries)
    template = TEMPLATE.read_text(encoding="utf-8")
    font = base64.b64encode(font_subset(template + json.dumps(data, ensure_ascii=False))).decode()
    # Without "<" no file name or caption can end the script element that holds the data.
    data = json.dumps(data).replace("<", "\\u003c")
    return template.replace("{{FONT}}", font).replace("{{DATA}}", data)  # in this order: a caption may contain {{FONT}}


def font_subset(text):
    """FONT reduced to the characters of a text, about 20 KB.

    Args:
        text (str): characters that FONT lacks are left out.
    Returns:
        bytes: a WOFF file, the same for the same characters.
    """
    options, woff = subset.Options(flavor="woff", layout_features=[]), io.BytesIO()
    with subset.load_font(FONT.get_file(), options, dontLoadGlyphNames=True) as font:
        subsetter = subset.Subsetter(options)
        subsetter.populate(unicodes=map(ord, text))
        subsetter.subset(font)
        subset.save_font(font, woff, options)
    return woff.getvalue()
