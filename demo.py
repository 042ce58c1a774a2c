"""Caption pictures and draw the attention at each word.

    python demo.py                                        # images/image_*.jpg -> images/out_*.jpg
    python demo.py --preset sample
    python demo.py --image my_photos --out my_captions    # a file or a folder
    python demo.py --html images/index.html               # also a page: point at a word to see its attention
"""
from pathlib import Path

from utils import UserError, replacing, run, write_text

import torch

import fast
from checkpoint import open_checkpoint
from config import boolean, parse_args, positive
from datasets import PICTURE_SUFFIXES, BadPicture, open_picture, read_image
from models import generate, pixel_positions
from visualize import draw_attention, html_page, page_entry


def main():
    args = parse_args(__doc__, {
        "checkpoint": dict(metavar="FILE", help="the model (models/BEST_checkpoint.pth.tar, or the preset's)"),
        "image": dict(metavar="FILE_OR_FOLDER", help="what to caption (images/image_*.jpg)"),
        "beam_size": dict(type=positive, default=3, metavar="K", help="1 is greedy (3)"),
        "out": dict(default="images", metavar="FOLDER", help="where the figures go (images)"),
        "every_word": dict(type=boolean, default=False, metavar="BOOL",
                           help="a tile for words such as 的 and 是 too (false)"),
        "html": dict(metavar="FILE", help="also write a page that shows the attention at each word"),
    })
    paths = find_pictures(args.image)
    checkpoint, config, device, encoder, decoder = open_checkpoint(args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.html:
        Path(args.html).parent.mkdir(parents=True, exist_ok=True)

    positions = pixel_positions(encoder, config.image_size, config.encoded_image_size)
    runs = fast.choose(encoder, decoder, config)
    print(runs.summary())
    bad, entries = 0, []
    for path, name in zip(paths, figure_names(paths)):
        try:
            image = read_image(path, config.image_size)
        except BadPicture as error:
            bad += 1
            print(f"unreadable picture: {error}")
            continue
        grid = runs.encoder(torch.from_numpy(image)[None].to(device))
        caption, = generate(runs.decoder, grid, checkpoint["word_map"], config.max_len, args.beam_size,
                            config.length_penalty)
        picture = open_picture(path)
        figure = draw_attention(picture, caption["words"], caption["alphas"], positions, args.every_word)
        with replacing(out / name) as temporary:
            figure.savefig(temporary, format="jpg", pil_kwargs={"quality": 88})
        if args.html:
            entries.append(page_entry(path.name, picture, caption))
        print(f"{path}\t{''.join(caption['words'])}\t{caption['score']:.3f}\t-> {out / name}"
              + ("" if caption["ended"] else "\t(unfinished)"))
    if entries:
        model = f"{config.encoder} · epoch {checkpoint['epoch']} · beam {args.beam_size}"
        write_text(args.html, html_page(model, positions, entries))
        print(f"Wrote {args.html}")
    if bad:
        raise UserError(f"{bad} of {len(paths)} pictures could not be read (see above)"
                        + ("; the others are done" if bad < len(paths) else ""))


def find_pictures(image):
    """The files to caption. Args: image (str): a file, a folder, or None for images/image_*.jpg. Returns: list of Path.

    Raises: UserError: there is none.
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
        raise UserError(f"{image}: no such picture; --image takes a file or a folder of {' '.join(PICTURE_SUFFIXES)}")
    return paths


def figure_names(paths):
    """File names: image_3.jpg -> out_3.jpg, cat.png -> out_cat.jpg, but out_cat.png.jpg if there is a cat.jpg too."""
    stems = [path.stem for path in paths]
    return [f"out_{(path.stem if stems.count(path.stem) == 1 else path.name).removeprefix('image_')}.jpg"
            for path in paths]


if __name__ == "__main__":
    run(main)
