"""Caption pictures and draw where the model looked, word by word.

    python demo.py                                        # images/image_*.jpg -> images/out_*.jpg
    python demo.py --preset sample
    python demo.py --image my_photos --out my_captions    # a file or a folder
    python demo.py --html images/index.html               # also one page: point at a word, see its attention
    python demo.py --checkpoint BEST_checkpoint_.pth.tar --word_map WORDMAP.json    # a model of the original
"""
import base64
import io
import itertools
import json
from pathlib import Path

import mplfonts
import numpy as np
import torch
from fontTools import subset
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from config import UserError, parse_args, replacing, run
from datasets import PICTURE_SUFFIXES, BadPicture, open_picture, read_image, write_text
from eval import generate, positive
from models import pixel_positions
from utils import open_checkpoint

FONT = FontProperties(fname=str(Path(mplfonts.__file__).parent / "fonts" / "NotoSansCJKsc-Regular.otf"))
TILES_A_ROW = 6
HEAT_SIDE = 128  # pixels of a heat map, which is stretched over the picture
TEMPLATE = Path(__file__).parent / "images" / "template.html"


def main():
    args = parse_args(__doc__, {
        "checkpoint": dict(metavar="FILE", help="the model (models/BEST_checkpoint.pth.tar, or the preset's)"),
        "word_map": dict(metavar="FILE", help="the WORDMAP.json of a checkpoint of the original, which carries none"),
        "image": dict(metavar="FILE_OR_FOLDER", help="what to caption (images/image_*.jpg)"),
        "beam_size": dict(type=positive, default=3, metavar="K", help="1 is greedy (3)"),
        "out": dict(default="images", metavar="FOLDER", help="where the figures go (images)"),
        "html": dict(metavar="FILE", help="also a page of all pictures that shows the attention at each word"),
    })
    paths = find_pictures(args.image)
    checkpoint, config, device, encoder, decoder = open_checkpoint(args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.html:
        Path(args.html).parent.mkdir(parents=True, exist_ok=True)

    positions = pixel_positions(config.image_size, config.encoded_image_size)
    bad, entries = 0, []
    for path, name in zip(paths, figure_names(paths)):
        try:
            image = read_image(path, config.image_size)
        except BadPicture as error:
            bad += 1
            print(f"unreadable picture: {error}")
            continue
        grid = encoder(torch.from_numpy(image)[None].to(device))
        caption, = generate(decoder, grid, torch.tensor([0]), config, checkpoint["word_map"], args.beam_size)
        picture = open_picture(path)
        figure = draw_attention(picture, caption["words"], caption["alphas"], positions)
        with replacing(out / name) as temporary:
            figure.savefig(temporary, format="jpg", pil_kwargs={"quality": 88})
        if args.html:
            entries.append(page_entry(path.name, picture, caption))
        print(f"{path}\t{''.join(caption['words'])}\t{caption['score']:.3f}\t-> {out / name}"
              + ("" if caption["ended"] else "\t(never ended)"))
    if entries:
        model = f"{config.encoder} · epoch {checkpoint['epoch']} · beam {args.beam_size}"
        write_text(args.html, html_page(model, positions, entries))
        print(f"Wrote {args.html}")
    if bad:
        raise UserError(f"{bad} of {len(paths)} pictures could not be read (named above); the others are done")


def find_pictures(image):
    """The files to caption. Args: image (str): a file, a folder, or None for images/image_*.jpg. Returns: list of Path.

    Raises:
        UserError: nothing there.
    """
    if image is None:
        paths = sorted(Path("images").glob("image_*.jpg"), key=lambda path: (len(path.name), path.name))
        image = "images/image_*.jpg"
    elif Path(image).is_dir():
        paths = sorted(path for path in Path(image).iterdir() if path.suffix.lower() in PICTURE_SUFFIXES
                       and path.is_file() and not path.name.startswith("out_"))
    else:
        paths = [Path(image)]
    if not paths or not paths[0].exists():
        raise UserError(f"{image}: no picture there; --image takes a file or a folder of {' '.join(PICTURE_SUFFIXES)}")
    return paths


def figure_names(paths):
    """The figures' names: image_3.jpg -> out_3.jpg, cat.png -> out_cat.jpg, or out_cat.png.jpg beside a cat.jpg."""
    stems = [path.stem for path in paths]
    return [f"out_{(path.stem if stems.count(path.stem) == 1 else path.name).removeprefix('image_')}.jpg"
            for path in paths]


def draw_attention(picture, words, alphas, positions):
    """The picture, then for each word the picture with the attention of that word laid over it.

    Args:
        picture (PIL.Image): RGB. words (list of str). alphas (float array (len(words), s, s)).
        positions (float array (s,)): of pixel_positions.
    Returns:
        matplotlib.figure.Figure
    """
    picture = picture.copy()
    picture.thumbnail((384, 384))
    pixels = np.asarray(picture)
    gray = np.asarray(picture.convert("L"))
    weights = heat_weights(positions)
    columns = min(TILES_A_ROW, len(words) + 1)
    rows = -(-(len(words) + 1) // columns)
    width, height = 1.9 * columns, (1.9 * picture.height / picture.width + 0.35) * rows + 0.5
    figure = Figure(figsize=(width, height), dpi=110)
    figure.suptitle("".join(words) or "（空）", fontproperties=FONT, fontsize=15)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, word, alpha in itertools.zip_longest(axes, ["原图", *words], [None, *alphas]):
        axis.set_axis_off()
        if word is None:
            continue
        axis.set_title(word, fontproperties=FONT, fontsize=13, pad=3)
        if alpha is None:
            axis.imshow(pixels)
        else:
            extent = (0, picture.width, picture.height, 0)
            axis.imshow(gray, cmap="gray", vmin=0, vmax=255, extent=extent)
            axis.imshow(weights @ alpha @ weights.T, cmap="jet", alpha=0.5, extent=extent)
    figure.tight_layout(pad=0.4)
    return figure


def heat_weights(positions):
    """What makes a smooth heat map of the whole picture out of an attention map: weights @ alpha @ weights.T.

    Args:
        positions (float array (s,)): of pixel_positions.
    Returns:
        float array (HEAT_SIDE, s): how much of each of the attention's rows (or columns, they are alike) a row of the
        heat map takes, 1 in all; rows at the same place share alike.
    """
    # A Gaussian over steps from place to place: over distances a peak would lean towards the wider of its two steps.
    places, number, equals = np.unique(positions, return_inverse=True, return_counts=True)
    rows = np.interp((np.arange(HEAT_SIDE) + 0.5) / HEAT_SIDE, places, np.arange(len(places)))
    near = np.exp(-0.5 * ((rows[:, None] - number) / 0.65) ** 2) / equals[number]
    return near / near.sum(axis=1, keepdims=True)


def page_entry(name, picture, caption):
    """What the page holds of one picture.

    Args:
        name (str): of its file. picture (PIL.Image): RGB. caption (dict): of generate.
    Returns:
        dict, fit for JSON: name, words, score (str), ended; size (width, height in pixels) and jpeg (base64) of the
        picture, 640 pixels at the most; alphas (list of base64, one a word): s * s bytes, row by row, in proportion to
        the attention, the strongest 255.
    """
    picture = picture.copy()
    picture.thumbnail((640, 640))
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=80, comment=b"")  # pixels only: what is passed on need not say where and when
    alphas = [np.rint(255 * alpha / alpha.max()).astype(np.uint8).tobytes() for alpha in caption["alphas"]]
    return dict(name=name, words=caption["words"], score=f"{caption['score']:.3f}", ended=caption["ended"],
                size=picture.size, jpeg=base64.b64encode(jpeg.getvalue()).decode(),
                alphas=[base64.b64encode(alpha).decode() for alpha in alphas])


def html_page(model, positions, entries):
    """A page that needs nothing else: images/template.html with its data and its font.

    Args:
        model (str): which one it was, to be shown. positions (float array (s,)): of pixel_positions.
        entries (list): of page_entry.
    Returns:
        str
    """
    weights = heat_weights(positions).round(4)
    data = dict(model=model, positions=positions.tolist(), weights=weights.tolist(), pictures=entries)
    template = TEMPLATE.read_text(encoding="utf-8")
    font = base64.b64encode(font_subset(template + json.dumps(data, ensure_ascii=False))).decode()
    # Without a "<" nothing in a file's name or a caption can end the script element that the data stand in.
    data = json.dumps(data).replace("<", "\\u003c")
    return template.replace("{{FONT}}", font).replace("{{DATA}}", data)  # in this order: a caption may say {{FONT}}


def font_subset(text):
    """FONT with no more than a text's characters, about 20 KB.

    Args:
        text (str): what FONT lacks of it is left out.
    Returns:
        bytes: a WOFF, the same for the same characters.
    """
    options, woff = subset.Options(flavor="woff", layout_features=[]), io.BytesIO()
    with subset.load_font(FONT.get_file(), options, dontLoadGlyphNames=True) as font:
        subsetter = subset.Subsetter(options)
        subsetter.populate(unicodes=map(ord, text))
        subsetter.subset(font)
        subset.save_font(font, woff, options)
    return woff.getvalue()


if __name__ == "__main__":
    run(main)
