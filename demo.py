"""Caption pictures and draw the attention at each word.

    python demo.py --image my.jpg                         # a file or a folder -> images/out_*.jpg
    python demo.py                                        # images/image_*.jpg, or scikit-image's
    python demo.py --preset sample                        # images/sample/image_*.jpg
    python demo.py --html images/index.html               # also a page: point at a word

In Python: Captioner("models/photographs.pth.tar")("my.jpg").sentence
"""
import io
from argparse import Namespace
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from utils import UserError, printable, replacing, run_script, write_text

import numpy as np
import torch
from PIL import Image
from skimage import data

import fast
from checkpoint import RELEASED, open_checkpoint
from config import DEFAULT_PRESET, boolean, parse_args, positive
from datasets import (PICTURE_SUFFIXES, BadPicture, Picture, is_picture_name, open_picture,
                      read_image, short_names)
from decoding import generate
from models import pixel_positions
from visualize import draw_attention, html_page, page_entry

COMMENT = b"attention, drawn by demo.py"  # of its figures' files, which it then does not caption
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
        "html": dict(metavar="FILE",
                     help="also write a page that shows the attention at each word"),
    })
    examples = Path("images/sample" if args.preset == "sample" else "images")
    paths = find_pictures(args.image, examples)
    captioner = Captioner(args.checkpoint, args.preset, args.flags)
    print(captioner.models.summary())
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.html:
        Path(args.html).parent.mkdir(parents=True, exist_ok=True)

    entries = []
    for path, name in zip(paths, figure_names(paths)):
        try:
            caption = captioner(path, args.beam_size)
            picture = open_picture(path)
            figure = figure_file(picture, caption, args.every_word)
            entry = page_entry(path.name, picture, caption) if args.html else None
        except (BadPicture, MemoryError, OSError, ValueError) as error:  # not the code's fault
            reason = str(error).removeprefix(f"{path}: ") or type(error).__name__
            print(printable(f"left out: {path}: {reason}"))
            continue
        with replacing(out / name) as temporary:
            temporary.write_bytes(figure)
        entries.append(entry)
        unfinished = "" if caption.ended else "\t(unfinished)"
        print(f"{printable(path)}\t{caption.sentence}\t{caption.score:.3f}\t"
              f"-> {printable(out / name)}{unfinished}")
    if args.html and entries:
        model = f"{captioner.config.encoder} · epoch {captioner.epoch} · beam {args.beam_size}"
        write_text(args.html, html_page(model, captioner.positions, entries))
        print(f"Wrote {args.html}")
    if bad := len(paths) - len(entries):
        others = "; the others are done" if entries else ""
        raise UserError(f"{bad} of {len(paths)} pictures could not be read or drawn (see above)"
                        f"{others}")


@dataclass(frozen=True)
class Caption:
    words: list[str]
    score: float  # sum of log-probabilities, that of <end> included
    log_probs: list[float]  # of each word
    ended: bool  # whether the model wrote <end>, or was cut off
    # (len(words), s, s): the attention at each word
    alphas: np.ndarray = field(repr=False)
    # (s,): centres of its rows and columns, as fractions of the side
    positions: np.ndarray = field(repr=False)

    @property
    def sentence(self) -> str:
        return "".join(self.words)


class Captioner:
    """The model of a checkpoint, which captions pictures.

    Args:
        checkpoint_path: None takes the preset's best, or where nothing was trained the one that
            comes along.
        flags: settings that differ from the checkpoint's, as {"device": "cpu"}.
    """

    def __init__(self, checkpoint_path: str | Path | None = None, preset: str = DEFAULT_PRESET,
                 flags: dict | None = None):
        args = Namespace(checkpoint=checkpoint_path, preset=preset, flags=flags or {})
        checkpoint, config, self.device, *halves = open_checkpoint(args, otherwise=RELEASED)
        self.models = fast.choose(*halves, config)
        self.models.decoder.eval()
        self.positions = pixel_positions(halves[0], config.image_size, config.encoded_image_size)
        self.config = config
        self.epoch = checkpoint["epoch"]
        self.word_map = checkpoint["word_map"]

    @torch.no_grad()
    def __call__(self, pictures: Picture | list[Picture], beam_size: int = 3,
                 n_best: int = 1) -> Caption | list:
        """Caption a picture, or a list of pictures as one batch.

        Returns:
            A Caption; with n_best > 1 a list of so many, the best first by score over length to the
            checkpoint's length_penalty, or fewer, as at most beam_size are found. Of a list of
            pictures a list of these.
        Raises:
            BadPicture: one cannot be read; names it.
        """
        if not isinstance(pictures, list):
            return self([pictures], beam_size, n_best)[0]
        if min(beam_size, n_best) < 1:
            raise ValueError(f"beam_size {beam_size} and n_best {n_best} must be at least 1")
        if not pictures:
            return []
        images = torch.from_numpy(np.stack(self.read(pictures))).to(self.device)
        grid = self.models.encoder(images)
        found = generate(self.models.decoder, grid, self.word_map, self.config.max_len, beam_size,
                         self.config.length_penalty, n_best)
        captions = [[Caption(**one, positions=self.positions) for one in best] for best in found]
        return captions if n_best > 1 else [best[0] for best in captions]

    def read(self, pictures):
        images = []
        for number, picture in enumerate(pictures, 1):
            try:
                images.append(read_image(picture, self.config.image_size))
            except BadPicture as error:
                which = f"picture {number}: " if len(pictures) > 1 else ""
                raise BadPicture(f"{which}{error}") from error
        return images


def figure_file(picture: Picture, caption: Caption, every_word: bool = False) -> bytes:
    """A JPEG of the attention at each word. BadPicture: it cannot be read."""
    jpeg = io.BytesIO()
    figure = draw_attention(open_picture(picture), caption.words, caption.alphas,
                            caption.positions, every_word)
    figure.savefig(jpeg, format="jpg", pil_kwargs={"quality": 88, "comment": COMMENT})
    return jpeg.getvalue()


def find_pictures(image: str | None, examples: Path) -> list[Path]:
    """The files to caption: `image`, or those in it and its subfolders; where it is None
    image_*.jpg in `examples`, after scikit-image's photographs were put there where images/ has
    none.
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
        pictures = [path for path in files if is_picture_name(path) and path.is_file()]
        paths = [path for path in pictures if not is_figure(path)]
        if len(paths) < len(files):
            print(f"{image}: left out {len(pictures) - len(paths)} figures that demo.py drew, and "
                  f"{len(files) - len(pictures)} that are not files with the suffix of a picture")
    else:
        paths = [Path(image)] if Path(image).exists() else []
    if not paths:
        raise UserError(f"{image}: no such picture; --image takes a file or a folder of "
                        f"{' '.join(PICTURE_SUFFIXES)}")
    return paths


def save_photographs(folder):
    folder.mkdir(exist_ok=True)
    for name in PHOTOGRAPHS:
        photograph = Image.fromarray(getattr(data, name)())
        with replacing(folder / f"image_{name}.jpg") as temporary:
            photograph.save(temporary, "JPEG", quality=90)
    print(f"{folder}: no image_*.jpg, so scikit-image's photographs were put there")


def is_figure(path):
    with suppress(OSError), open(path, "rb") as file:  # said when it is opened as a picture
        return COMMENT in file.read(1024)
    return False


def figure_names(paths: list[Path]) -> list[str]:
    """A figure's name for each picture: image_3.jpg -> out_3.jpg, cat.png -> out_cat.jpg, but
    out_cat.png.jpg if there is a cat.jpg too. None is that of another figure or of a picture, even
    where the case of letters does not count.
    """
    taken = {path.name.casefold() for path in paths}
    names = []
    for short in short_names([path.name for path in paths], "image_"):
        name = f"out_{short[:70]}.jpg"  # file systems take 255 bytes
        number = 1
        while name.casefold() in taken:
            number += 1
            name = f"out_{number}_{short[:70]}.jpg"
        taken.add(name.casefold())
        names.append(name)
    return names


if __name__ == "__main__":
    run_script(main)
