"""Caption pictures and draw where the model looked, word by word.

    python demo.py                                        # images/image_*.jpg -> images/out_*.jpg
    python demo.py --preset sample
    python demo.py --image my_photos --out my_captions    # a file or a folder
"""
import itertools
from pathlib import Path

import mplfonts
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from skimage.transform import pyramid_expand

from config import UserError, parse_args, replacing, run
from datasets import PICTURE_SUFFIXES, BadPicture, open_picture, read_image
from eval import encode, generate, positive
from models import pixel_positions
from utils import open_checkpoint

FONT = FontProperties(fname=str(Path(mplfonts.__file__).parent / "fonts" / "NotoSansCJKsc-Regular.otf"))
TILES_A_ROW = 6


def main():
    args = parse_args(__doc__, {
        "checkpoint": dict(metavar="FILE", help="the model (models/BEST_checkpoint.pth.tar, or the preset's)"),
        "image": dict(metavar="FILE_OR_FOLDER", help="what to caption (images/image_*.jpg)"),
        "beam_size": dict(type=positive, default=3, metavar="K", help="1 is greedy (3)"),
        "out": dict(default="images", metavar="FOLDER", help="where the figures go (images)"),
    })
    paths = find_pictures(args.image)
    checkpoint, config, device, encoder, decoder = open_checkpoint(args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    positions = pixel_positions(config.image_size, config.encoded_image_size)
    bad = 0
    for path, name in zip(paths, figure_names(paths)):
        try:
            image = read_image(path, config.image_size)
        except BadPicture as error:
            bad += 1
            print(f"unreadable picture: {error}")
            continue
        grid = encode(encoder, torch.from_numpy(image)[None].to(device))
        caption, = generate(decoder, grid, torch.tensor([0]), config, checkpoint["word_map"], args.beam_size)
        save_figure(draw_attention(open_picture(path), caption["words"], caption["alphas"], positions), out / name)
        print(f"{path}\t{''.join(caption['words'])}\t{caption['score']:.3f}\t-> {out / name}"
              + ("" if caption["ended"] else "\t(never ended)"))
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
    pitch = positions[1] - positions[0] if len(positions) > 1 else 1.0
    first, last = positions[0] - 1.5 * pitch, positions[-1] + 1.5 * pitch  # the edges of the map below
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
            axis.imshow(gray, cmap="gray", vmin=0, vmax=255)
            # A rim, since the outer pixels' centres lie inside the picture; what of it lies outside is not shown.
            smooth = pyramid_expand(np.pad(alpha, 1, mode="edge"), upscale=16, sigma=8)
            axis.imshow(smooth, cmap="jet", alpha=0.5, extent=(first * picture.width, last * picture.width,
                                                               last * picture.height, first * picture.height))
            axis.set(xlim=(0, picture.width), ylim=(picture.height, 0))
    figure.tight_layout(pad=0.4)
    return figure


def save_figure(figure, path):
    """Write a figure as JPEG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="jpg", pil_kwargs={"quality": 88})


if __name__ == "__main__":
    run(main)
