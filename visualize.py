"""Attention drawn over a picture: a figure with one tile per word, and an HTML page where one points at a word."""
import base64
import io
import json
from pathlib import Path

import mplfonts
import numpy as np
from fontTools import subset
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

FONT = FontProperties(fname=str(Path(mplfonts.__file__).parent / "fonts" / "NotoSansCJKsc-Regular.otf"))
TILES_PER_ROW = 6
TILE, GAP, WORD_HEIGHT, CAPTION_HEIGHT = 1.9, 0.03, 0.3, 0.45  # inches: a tile's width, around it, above it, above all
HEAT_SIDE = 128  # pixels per side of a heat map, which is stretched over the picture
TEMPLATE = Path(__file__).parent / "images" / "template.html"


def draw_attention(picture, words, alphas, positions):
    """A figure of the picture, then for each word the picture with the attention at that word over it.

    Args:
        picture (PIL.Image): RGB. words (list of str). alphas (float array (len(words), s, s)).
        positions (float array (s,)): of pixel_positions.
    Returns:
        matplotlib.figure.Figure
    """
    picture = picture.copy()
    picture.thumbnail((384, 384))
    gray, weights, columns = picture.convert("L"), heat_weights(positions), min(TILES_PER_ROW, len(words) + 1)
    tile_height = TILE * picture.height / picture.width + WORD_HEIGHT
    width, height = columns * TILE, CAPTION_HEIGHT + -(-(len(words) + 1) // columns) * tile_height
    figure = Figure(figsize=(width, height), dpi=110)
    axis = figure.add_axes((0, 0, 1, 1))  # one for all tiles, as creating one takes longer than drawing a tile
    axis.text(width / 2, CAPTION_HEIGHT / 2, "".join(words) or "（空）", font=FONT, size=15, ha="center", va="center")
    for number, (word, alpha) in enumerate(zip(["原图", *words], [None, *alphas])):
        left, top = number % columns * TILE, CAPTION_HEIGHT + number // columns * tile_height
        axis.text(left + TILE / 2, top + WORD_HEIGHT / 2, word, font=FONT, size=13, ha="center", va="center")
        extent = (left + GAP, left + TILE - GAP, top + tile_height - GAP, top + WORD_HEIGHT + GAP)
        if alpha is None:
            axis.imshow(picture, extent=extent)
        else:
            axis.imshow(gray, cmap="gray", vmin=0, vmax=255, extent=extent)
            axis.imshow(weights @ alpha @ weights.T, cmap="jet", alpha=0.5, extent=extent)
    axis.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    axis.set_axis_off()
    return figure


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
        name (str): of its file. picture (PIL.Image): RGB. caption (dict): of models.generate.
    Returns:
        dict for JSON: name, words, score (str), ended; size (width, height in pixels) and jpeg (base64) of the picture,
        at most 640 pixels per side; alphas (list of base64, one per word): s * s bytes, row by row, proportional to
        the attention, the maximum 255.
    """
    picture = picture.copy()
    picture.thumbnail((640, 640))
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=80, comment=b"")  # without EXIF data, such as place and time
    alphas = [np.rint(255 * alpha / alpha.max()).astype(np.uint8).tobytes() for alpha in caption["alphas"]]
    return dict(name=name, words=caption["words"], score=f"{caption['score']:.3f}", ended=caption["ended"],
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
