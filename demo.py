"""Caption pictures and draw the attention at each word.

    python demo.py --image my.jpg                         # a file or a folder -> images/out_*.jpg
    python demo.py                                        # images/image_*.jpg, or scikit-image's
    python demo.py --preset sample                        # images/sample/image_*.jpg
    python demo.py --html images/index.html               # also a page: point at a word to see its attention
"""
import io
import os
from contextlib import suppress
from pathlib import Path

# A picture is so little work that threads mostly wait for each other. If they do so busily, all takes
# twice as long beside another program, such as a training. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from utils import UserError, printable, replacing, run_script, write_text

import torch
from PIL import Image

import fast
from checkpoint import RELEASED, open_checkpoint
from config import boolean, parse_args, positive
from datasets import PICTURE_SUFFIXES, BadPicture, open_picture, read_image, short_names
from decoding import generate
from models import pixel_positions
from visualize import draw_attention, html_page, page_entry

COMMENT = b"attention, drawn by demo.py"  # of its figures' JPEG files, which it then does not caption
PHOTOGRAPHS = "astronaut", "camera", "chelsea", "coffee", "rocket"  # public domain or CC0: README


def main():
    args = parse_args(__doc__, {
        "checkpoint": dict(metavar="FILE",
                           help="the model (models/BEST_checkpoint.pth.tar, or the preset's; "
                           "models/photographs.pth.tar where nothing was trained)"),
        "image": dict(metavar="FILE_OR_FOLDER",
                      help="what to caption, subfolders included (images/image_*.jpg)"),
        "beam_size": dict(type=positive, default=3, metavar="K", help="1 is greedy (3)"),
        "out": dict(default="images", metavar="FOLDER", help="where the figures go (images)"),
        "every_word": dict(type=boolean, default=False, metavar="BOOL",
                           help="a tile for words such as 的 and 是 too (false)"),
        "html": dict(metavar="FILE", help="also write a page that shows the attention at each word"),
    })
    examples = Path("images/sample" if args.preset == "sample" else "images")
    paths = find_pictures(args.image, examples)
    checkpoint, config, device, encoder, decoder = open_checkpoint(args, otherwise=RELEASED)
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
            image, picture = read_image(path, config.image_size), open_picture(path)
            grid = runs.encoder(torch.from_numpy(image)[None].to(device))
            caption, = generate(runs.decoder, grid, checkpoint["word_map"], config.max_len, args.beam_size,
                                config.length_penalty)
            jpeg = io.BytesIO()
            figure = draw_attention(picture, caption["words"], caption["alphas"], positions, args.every_word)
            figure.savefig(jpeg, format="jpg", pil_kwargs={"quality": 88, "comment": COMMENT})
            entry = page_entry(path.name, picture, caption) if args.html else None
        except (BadPicture, MemoryError, OSError, ValueError) as error:  # all else is the code's fault
            bad += 1
            reason = str(error).removeprefix(f"{path}: ") or type(error).__name__
            print(printable(f"left out: {path}: {reason}"))
            continue
        with replacing(out / name) as temporary:
            temporary.write_bytes(jpeg.getbuffer())
        entries.append(entry)
        print(f"{printable(path)}\t{''.join(caption['words'])}\t{caption['score']:.3f}\t-> {printable(out / name)}"
              + ("" if caption["ended"] else "\t(unfinished)"))
    if args.html and entries:
        model = f"{config.encoder} · epoch {checkpoint['epoch']} · beam {args.beam_size}"
        write_text(args.html, html_page(model, positions, entries))
        print(f"Wrote {args.html}")
    if bad:
        raise UserError(f"{bad} of {len(paths)} pictures could not be read or drawn (see above)"
                        + ("; the others are done" if bad < len(paths) else ""))


def find_pictures(image, examples):
    """The files to caption.

    Args:
        image (str): a file, a folder with its subfolders, or None for image_*.jpg of `examples`.
        examples (Path): a folder; images/ gets scikit-image's photographs where it has none.
    Returns:
        list of Path
    Raises:
        UserError: there is none.
    """
    if image is None:
        if examples == Path("images") and not any(examples.glob("image_*.jpg")):
            save_photographs(examples)
        paths = sorted(examples.glob("image_*.jpg"), key=lambda path: (len(path.name), path.name))
        image = examples / "image_*.jpg"
    elif Path(image).is_dir():
        # Links to folders are not followed, as they may lead in a circle, but counted.
        found = Path(image).rglob("*")
        files = sorted(path for path in found if path.is_symlink() or not path.is_dir())
        pictures = [path for path in files if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()]
        paths = [path for path in pictures if not is_figure(path)]
        if len(paths) < len(files):
            print(f"{image}: left out {len(pictures) - len(paths)} figures that demo.py drew, and "
                  f"{len(files) - len(pictures)} that are not files with the suffix of a picture")
    else:
        paths = [Path(image)] if Path(image).exists() else []
    if not paths:
        raise UserError(f"{image}: no such picture; --image takes a file or a folder of {' '.join(PICTURE_SUFFIXES)}")
    return paths


def save_photographs(folder):
    """Save scikit-image's photographs as image_*.jpg. Args: folder (Path)."""
    from skimage import data  # here, as nothing else needs it

    folder.mkdir(exist_ok=True)
    for name in PHOTOGRAPHS:
        photograph = Image.fromarray(getattr(data, name)())
        with replacing(folder / f"image_{name}.jpg") as temporary:
            photograph.save(temporary, "JPEG", quality=90)
    print(f"{folder}: no image_*.jpg, so scikit-image's photographs were put there")


def is_figure(path):
    """Whether demo.py drew what is in this file."""
    with suppress(OSError), open(path, "rb") as file:  # what cannot be read is said when it is opened as a picture
        return COMMENT in file.read(1024)
    return False


def figure_names(paths):
    """A figure's name for each picture: image_3.jpg -> out_3.jpg, cat.png -> out_cat.jpg, but out_cat.png.jpg if there
    is a cat.jpg too. None is that of another figure or of a picture, even where the case of letters does not count.
    """
    taken, names = {path.name.casefold() for path in paths}, []
    for short in short_names([path.name for path in paths], "image_"):
        name, number = f"out_{short[:70]}.jpg", 1  # file systems take 255 bytes
        while name.casefold() in taken:
            number += 1
            name = f"out_{number}_{short[:70]}.jpg"
        taken.add(name.casefold())
        names.append(name)
    return names


if __name__ == "__main__":
    run_script(main)
