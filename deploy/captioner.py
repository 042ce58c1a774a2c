"""Caption pictures with a model that deploy/export.py has exported; without PyTorch.

    pip install onnxruntime numpy pillow
    python captioner.py FOLDER PICTURE...

In Python: Captioner("exported")("my.jpg").sentence

This file needs nothing else of its repo: copy it into any program.
"""
import argparse
import contextlib
import json
import os
import struct
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import onnxruntime
from PIL import ExifTags, Image, UnidentifiedImageError

FORMAT_VERSION = 1  # of model.json
# Not EPS, whose decoder runs another program, nor formats that no photograph needs.
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
TURNS = {  # EXIF's orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Where Pillow reads that from: names in the `info` of an image.
TURN_DATA = "exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="what export.py has written")
    parser.add_argument("pictures", nargs="+", metavar="PICTURE")
    parser.add_argument("--beam_size", type=int, metavar="K", help="1 is greedy (the model's, 3)")
    args = parser.parse_args()
    if args.beam_size is not None and args.beam_size < 1:
        parser.error("--beam_size must be at least 1")
    sys.stdout.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks
    try:
        captioner = Captioner(args.folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

    has_failed = False
    for path in args.pictures:
        try:
            print(path, captioner(path, args.beam_size).sentence, sep="\t", flush=True)
        except BadPicture as error:
            print(f"error: {error}", file=sys.stderr)
            has_failed = True
    sys.exit(2 if has_failed else 0)


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
    """An exported model, which captions pictures.

    Args:
        folder: what export.py has written.
        num_threads: of the CPU; None takes a thread per core.
    Raises:
        ValueError: the folder lacks a file, or has a damaged one.
    """

    def __init__(self, folder: str | os.PathLike, num_threads: int | None = None):
        folder = Path(folder)
        self.model = read_model(folder / "model.json")
        self.positions = np.array(self.model["positions"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or 0
        # Threads that wait busily would slow down whatever else the computer does.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.encoder = open_graph(folder / "encoder.onnx", options)
        self.decoder = open_graph(folder / "decoder.onnx", options)
        self.encoder_outputs = [output.name for output in self.encoder.get_outputs()]

    def __call__(self, pictures: "Picture | list[Picture]", beam_size: int | None = None,
                 n_best: int = 1) -> Caption | list:
        """Caption a picture, or a list of pictures.

        Returns:
            A Caption; with n_best > 1 a list of so many, the best first by score over length to the
            model's length_penalty, or fewer, as at most beam_size are found. Of a list of pictures
            a list of these.
        Raises:
            BadPicture: one cannot be read; names it.
        """
        if not isinstance(pictures, list):
            return self([pictures], beam_size, n_best)[0]
        if beam_size is None:
            beam_size = self.model["beam_size"]
        if min(beam_size, n_best) < 1:
            raise ValueError(f"beam_size {beam_size} and n_best {n_best} must be at least 1")
        images = self.read(pictures)
        captions = [self.beam_search(image, beam_size, n_best) for image in images]
        return captions if n_best > 1 else [best[0] for best in captions]

    def read(self, pictures):
        images = []
        for number, picture in enumerate(pictures, 1):
            try:
                images.append(read_image(picture, self.model["image_size"]))
            except BadPicture as error:
                which = f"picture {number}: " if len(pictures) > 1 else ""
                raise BadPicture(f"{which}{error}") from error
        return images

    def beam_search(self, image: np.ndarray, beam_size: int, n_best: int) -> list[Caption]:
        """The most probable captions of a picture, uint8 (S, S, 3), the best first.

        A beam that ends leaves the search, the others continue with one beam less. Of equal scores
        the first counts: the lower beam, then the lower word.
        """
        T = self.model["max_len"] + 1  # steps, so that max_len words and <end> fit
        n_best = min(n_best, beam_size)
        outputs = self.encoder.run(None, {"images": image[None]})
        features = dict(zip(self.encoder_outputs, outputs))
        h = features.pop("h")  # (1, K, H), at first of one beam, as all begin alike
        c = features.pop("c")
        beams = [Beam(0.0, [self.model["start"]], [], [])]
        ended = []

        for _ in range(T):
            words = np.array([[beam.words[-1] for beam in beams]], np.int32)
            inputs = {"words": words, "h": h, "c": c, **features}
            log_probs, h, c, alphas = self.decoder.run(None, inputs)
            log_probs = log_probs[0]  # (K, V), over all words, as in training
            log_probs[:, self.model["never"]] = -np.inf
            scores = np.array([[beam.score] for beam in beams], np.float32) + log_probs
            parents, words = first_largest(scores, beam_size - len(ended))

            grown = []
            for parent, word in zip(parents, words):
                grown.append(beams[parent].grow(
                    int(word), float(scores[parent, word]), float(log_probs[parent, word]),
                    alphas[0, parent]))
            is_end = words == self.model["end"]
            ended += [beam for beam, ends in zip(grown, is_end) if ends]
            beams = [beam for beam, ends in zip(grown, is_end) if not ends]
            h = h[:, parents[~is_end]]
            c = c[:, parents[~is_end]]
            if not beams or self.is_decided(ended, beams[0], n_best, T):
                break
        best = sorted(ended or beams, key=self.rank, reverse=True)[:n_best]  # ties: the first
        return [self.caption(beam, ended=bool(ended)) for beam in best]

    def is_decided(self, ended, best_open, n_best, T):
        """Whether no open beam can come among the n_best any more: sums only fall, so at best the
        first one keeps its sum, and is T words long in the end."""
        if len(ended) < n_best:
            return False
        last = sorted(map(self.rank, ended), reverse=True)[n_best - 1]
        return best_open.score / T ** self.model["length_penalty"] <= last

    def rank(self, beam):
        """What captions compare by."""
        return beam.score / len(beam.log_probs) ** self.model["length_penalty"]

    def caption(self, beam, ended):
        length = len(beam.log_probs) - ended  # in words, without <end>
        words = [self.model["words"][number] for number in beam.words[1:length + 1]]
        side = self.model["encoded_image_size"]
        alphas = np.array(beam.alphas[:length], np.float32).reshape(length, side, side)
        return Caption(words, beam.score, beam.log_probs[:length], ended, alphas, self.positions)


class Beam(NamedTuple):
    score: float  # the sum of log_probs
    words: list[int]  # <start> first
    log_probs: list[float]
    alphas: list[np.ndarray]  # each (P,)

    def grow(self, word: int, score: float, log_prob: float, alpha: np.ndarray):
        return Beam(score, [*self.words, word], [*self.log_probs, log_prob],
                    [*self.alphas, alpha])


def first_largest(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns of the k largest of (K, V), largest first, without those of -inf; of
    equal ones the first."""
    flat = scores.ravel()
    k = min(k, np.isfinite(flat).sum())
    least = np.partition(flat, -k)[-k]
    candidates = np.flatnonzero(flat >= least)
    order = np.argsort(-flat[candidates], kind="stable")
    return np.divmod(candidates[order][:k], scores.shape[1])


# -------------------------------------------------------------------------------------------------
# What export.py has written


def read_model(path: Path) -> dict:
    try:
        model = json.loads(path.read_text(encoding="utf-8"))
        version = model["format_version"]
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} does not exist: name the folder that export.py wrote") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error!r:.200}): export again") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version!r:.20}, this code reads "
                         f"{FORMAT_VERSION}: take captioner.py of the same version as export.py")
    return model


def open_graph(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has an exception for each kind of damage
        raise ValueError(f"{path} cannot be opened ({error!s:.200}): export again") from None


# -------------------------------------------------------------------------------------------------
# Pixels: the same as datasets.py's, bit for bit, as other ones give other captions


class BadPicture(ValueError):
    """What is not a readable picture; the message names it and says why."""


Picture = str | os.PathLike | IO[bytes] | Image.Image | np.ndarray


def open_picture(source: Picture, image_size: int | None = None) -> Image.Image:
    """Open any picture upright and in RGB, in its own size: gray, palette, CMYK, 16 bits,
    transparent (on white), EXIF-rotated; of an animation the first frame.

    Args:
        source: an array is uint8, (H, W) or (H, W, 1, 3 or 4 channels).
        image_size: decode a JPEG straight to a square of this side, which is twice as fast where
            it is large; all else ignores it.
    Raises:
        BadPicture: missing, empty, truncated, not a picture, or more than 179 million pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with unread(source) as file:
                is_given = file is source  # which stays as it is
                return to_rgb(load_upright(file, None if is_given else image_size))
    except Exception as error:  # Pillow's decoders raise anything on a broken file
        name = source
        if not isinstance(source, str | os.PathLike):
            name = getattr(source, "filename", "") or getattr(source, "name", "")
        reason = str(error).replace(f" {source!r}", "")
        if isinstance(error, UnidentifiedImageError):  # its message names the object that was read
            reason = "cannot identify image file"
        reason = reason or type(error).__name__
        raise BadPicture(f"{name}: {reason}" if name else reason) from error


def unread(source):
    """A picture as Pillow has it before its pixels are read, to be used in a `with`."""
    if isinstance(source, Image.Image):
        return contextlib.nullcontext(source)  # its owner closes it
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8:
            raise TypeError(f"an array of {source.dtype}: give uint8, from 0 to 255; of floats "
                            f"from 0 to 1 that is (255 * array).round().astype(numpy.uint8)")
        shape = source.shape[:2] if source.shape[2:] == (1,) else source.shape
        if not source.size or len(shape) != 2 and shape[2:] not in ((3,), (4,)):
            raise ValueError(f"an array of shape {source.shape}: give (H, W), or (H, W, 1, 3 or 4)")
        return Image.fromarray(source.reshape(shape))
    if isinstance(source, str | os.PathLike):
        if Path(source).is_dir():
            raise IsADirectoryError("a folder: name the pictures in it")
        if not Path(source).is_file():  # a pipe would block
            raise FileNotFoundError("no such file")
        return opened(source)
    if not hasattr(source, "read"):
        raise TypeError("give a path, a file object, a PIL image or a uint8 array")
    return Image.open(source, formats=PICTURE_FORMATS)


@contextlib.contextmanager
def opened(path):
    # Of a path Pillow maps an uncompressed TIFF into memory, and then does not turn it upright.
    with open(path, "rb") as file, Image.open(file, formats=PICTURE_FORMATS) as picture:
        yield picture


def load_upright(file, image_size):
    drafted = None
    if image_size:
        drafted = file.draft(None, draft_size(file.size, image_size))
    file.load()
    picture = file
    if drafted:
        _, box = drafted  # exact where the reduction does not divide the side
        picture = file.resize((image_size, image_size), Image.Resampling.BILINEAR, box)
    turn = turn_of(file)
    if turn is not None:
        picture = picture.transpose(turn)
        for name in TURN_DATA:  # so that it is not turned again where it is opened as a picture
            picture.info.pop(name, None)
    return picture


def turn_of(file: Image.Image) -> Image.Transpose | None:
    """How to turn a picture upright; None where EXIF does not say it, or not properly."""
    try:
        return TURNS.get(file.getexif().get(ExifTags.Base.Orientation))
    except (SyntaxError, ValueError, struct.error):  # of damaged EXIF data
        return None


def to_rgb(picture):
    if picture.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
        gray = np.asarray(picture).clip(0, 65535)
        if gray.max() > 255:
            gray = gray // 257
        return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def draft_size(size: tuple[int, int], image_size: int) -> tuple[int, int]:
    """The size to decode a JPEG at: Pillow's draft takes the next larger of 1/2, 1/4 and 1/8, which
    cost less to decode and to resize.

    On photographs grey levels then differ from those of full size by 0.7 on average where 1/2 is
    still 1.3 times the size wanted, by 0.6 where 1/4 or 1/8 is still twice that.
    """
    width, height = size
    reach = min(size) / image_size
    reduction = max(int(reach / 2), 2 if reach >= 2.6 else 1)
    return width // reduction, height // reduction


def read_image(source: Picture, image_size: int) -> np.ndarray:
    """The one way from a picture to pixels: uint8 (image_size, image_size, 3), RGB, squeezed into
    the square whole. BadPicture: see open_picture.
    """
    square = (image_size, image_size)
    return np.array(open_picture(source, image_size).resize(square, Image.Resampling.BILINEAR))


if __name__ == "__main__":
    main()
