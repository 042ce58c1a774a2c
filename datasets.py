"""From files to tensors: pixels, words, the word map, batches of pictures with all their captions.

Preprocessing, training, evaluation and demo share read_image and tokenize: the same file gives the
same pixels everywhere, the same sentence the same words.
"""
import collections
import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import struct
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import IO

import h5py
import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, Sampler

from config import Config
from utils import UserError, one_line, rank, reason_of, to_device, world_size

with warnings.catch_warnings():  # jieba's own use of setuptools is deprecated
    warnings.simplefilter("ignore")
    import jieba

FORMAT_VERSION = 2
JIEBA_VERSION = jieba.__version__  # other versions may segment otherwise
SETTINGS = ("image_size", "captions_per_image", "max_len", "min_word_freq")  # of a data file
PAD, UNK, START, END = "<pad>", "<unk>", "<start>", "<end>"
# Not EPS, whose decoder runs another program, nor formats that no photograph needs.
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif",
                    ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
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
MIN_STEPS = 20  # of an epoch; its whole batches then leave out fewer than one picture in 20
SHARED_MEMORY = Path("/dev/shm")  # where workers put batches, on Linux

# jieba's cache in the temporary folder may be another version's or another user's. Without such a
# folder, jieba builds its dictionary anew, as quickly, and logs that it could not keep it.
jieba.dt.tmp_dir = jieba.__file__
jieba.setLogLevel(logging.CRITICAL)


# -------------------------------------------------------------------------------------------------
# Pixels


class BadPicture(UserError):
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


def is_picture_name(path: PurePath) -> bool:
    """Whether a file is one of the pictures that are read, by its suffix."""
    return path.suffix.lower() in PICTURE_SUFFIXES


def short_names(file_names: list[str], prefix: str = "") -> list[str]:
    """What the pictures of a folder are called: by file name, without suffix (and without the
    prefix) where no other picture can be meant.

    No two get one name: cat.jpg becomes cat, but stays cat.jpg beside a cat.png or a cat.
    """
    short_of = {}
    for file_name in file_names:
        stem, suffix = os.path.splitext(file_name)
        short = stem if suffix.lower() in PICTURE_SUFFIXES else file_name
        short_of[file_name] = short.removeprefix(prefix)
    counts = collections.Counter()
    for file_name, short in short_of.items():
        counts.update({file_name, short})

    names = []
    for file_name in file_names:
        short = short_of[file_name]
        names.append(short if counts[short] == 1 else file_name)
    return names


# -------------------------------------------------------------------------------------------------
# Words


def tokenize(caption: str) -> list[str]:
    """Segment a sentence, normalised, into words."""
    return segment(normalise(caption))


def segment(text: str) -> list[str]:
    """jieba's exact mode, without white space."""
    return [word for word in jieba.cut(text) if not word.isspace()]


def normalise(caption: str) -> str:
    """A caption as it is segmented and compared; it is empty if nothing is left.

    Left out are the full stop, as by AI Challenger's evaluator (<end> marks the end of a sentence),
    white space as by unsegmented, and what nobody sees: NUL, halves of an emoji, zero-width spaces
    and joiners, soft hyphens, byte order marks, variation selectors.
    """
    caption = re.sub("[。\ufe00-\ufe0f\U000e0100-\U000e01ef]", "", caption)
    invisible = ("Cc", "Cf", "Cs")  # Unicode's categories: controls, format, surrogates
    seen = [character for character in caption
            if character.isspace() or unicodedata.category(character) not in invisible]
    return unsegmented("".join(seen))


def unsegmented(caption: str) -> str:
    """A caption without white space, except between two Latin words or numbers."""
    return re.sub("(?<=[^!-~À-ɏ]) | (?=[^!-~À-ɏ])", "", " ".join(caption.split()))


@functools.cache
def kind_of(word: str) -> str:
    """noun, verb, colour or number, function word, or other: by jieba's tag of the word alone."""
    from jieba import posseg  # takes half a second, and only figures need it

    if word.endswith("色") or word in tuple("红黄蓝绿黑白灰棕橙紫粉"):
        return "colour or number"
    if word in ("是", "有") or word.endswith("里"):  # verbs without anything to look at; 画里, 水里
        return "function word"
    tag = posseg.lcut(word)[-1].flag
    kinds = {"noun": "nsjt", "verb": "v", "colour or number": "mq", "function word": "upcdrfykwx"}
    for kind, tags in kinds.items():
        if tag[0] in tags:
            return kind
    return "other"


def build_word_map(token_lists: Iterable[list[str]], min_word_freq: int) -> dict[str, int]:
    """Number the words that occur often enough by falling frequency, then by code point: the same
    text gives the same map everywhere.

    >>> build_word_map([["一", "只", "狗"], ["狗", "和", "猫"], ["猫"]], min_word_freq=2)
    {'<pad>': 0, '狗': 1, '猫': 2, '<unk>': 3, '<start>': 4, '<end>': 5}
    """
    counts = collections.Counter(word for tokens in token_lists for word in tokens)
    for special in (PAD, UNK, START, END):
        counts.pop(special, None)
    frequent = [word for word, count in counts.items() if count >= min_word_freq]
    frequent.sort(key=lambda word: (-counts[word], word))
    words = [PAD, *frequent, UNK, START, END]
    return {word: number for number, word in enumerate(words)}


def word_map_digest(word_map: dict[str, int]) -> str:
    """sha256 of the word map, hexadecimal."""
    return hashlib.sha256(json.dumps(word_map, sort_keys=True).encode()).hexdigest()


def check_word_map(word_map: object, source: str | Path) -> dict[str, int]:
    """Raise UserError, naming `source`, unless words have the numbers 0 .. V-1, <pad> the 0."""
    try:
        # Control characters give orders to a terminal, halves of an emoji cannot be written.
        unprintable = re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "".join(word_map))
        is_sound = (unprintable is None and word_map[PAD] == 0
                    and {UNK, START, END} <= word_map.keys()
                    and sorted(word_map.values()) == list(range(len(word_map))))
    except (TypeError, KeyError, AttributeError):
        is_sound = False
    if not is_sound:
        raise UserError(f"{source} holds what is not a word map (word -> number, with <pad> 0, "
                        f"<unk>, <start> and <end>); pre_process.py --overwrite writes "
                        f"WORDMAP.json anew")
    return word_map


def load_word_map(data_dir: str | Path) -> dict[str, int]:
    """Read data_dir/WORDMAP.json. UserError where it is missing or damaged; OSError where it cannot
    be read, which making it again would not mend.
    """
    path = Path(data_dir) / "WORDMAP.json"
    try:
        word_map = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name the data by --data_dir (or, where no "
                        f"--checkpoint is named, by --preset), or run "
                        f"pre_process.py (--overwrite if only this file was lost)") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): pre_process.py --overwrite writes it anew"
                        ) from None
    return check_word_map(word_map, path)


def encode_caption(tokens: list[str], word_map: dict[str, int],
                   max_len: int) -> tuple[np.ndarray, int]:
    """Turn words into ids, int32 (max_len + 2,), with their number without <pad>: <start>, at most
    max_len words, <end> unless words were cut, <pad>.

    >>> word_map = {"<pad>": 0, "狗": 1, "<unk>": 2, "<start>": 3, "<end>": 4}
    >>> encode_caption(["狗", "跑"], word_map, max_len=4)
    (array([3, 1, 2, 4, 0, 0], dtype=int32), 4)
    >>> encode_caption(["狗", "跑"], word_map, max_len=1)
    (array([3, 1, 0], dtype=int32), 2)
    """
    words = [word_map.get(word, word_map[UNK]) for word in tokens[:max_len]]
    ids = [word_map[START], *words]
    if len(tokens) <= max_len:  # the model must not learn to stop in mid-sentence
        ids.append(word_map[END])
    row = np.zeros(max_len + 2, np.int32)
    row[:len(ids)] = ids
    return row, len(ids)


def decode_caption(ids: Iterable[int], words: list[str]) -> list[str]:
    """Turn ids into words (of word_list), up to <end>, without <pad> and <start>."""
    tokens = [words[int(number)] for number in ids]
    if END in tokens:
        tokens = tokens[:tokens.index(END)]
    return [token for token in tokens if token not in (PAD, START)]


def word_list(word_map: dict[str, int]) -> list[str]:
    """The words of a word map by id."""
    return sorted(word_map, key=word_map.get)


# -------------------------------------------------------------------------------------------------
# The data files


class CaptionDataset(Dataset):
    """One split as pre_process.py wrote it: N pictures, each with up to K captions.

    `dataset[rows]` (list of int, B of them) gives a batch: images uint8 (B, S, S, 3); captions
    int64 (B, K, L), cut to the longest of the batch; caption_lengths int64 (B, K), <start> and
    <end> counted, 0 where a picture has fewer captions; rows int64 (B,). After use_features it
    begins with features, fp16 (B, h, w, D), instead of images, after hold_features with the rows.

    Training reads the ids, `captions`; scores compare with the text, `raw_captions`. Whoever
    corrects a caption in the file with h5py corrects both, with the `caption_lengths`;
    encode_caption gives ids and length.

    Args:
        word_map: that the ids must be of; None where only the text is used.
    Raises:
        UserError: missing, damaged, of other settings or of another word map.
    """

    begins_with = "images"

    def __init__(self, config: Config, split: str, word_map: dict[str, int] | None = None):
        self.path = Path(config.data_dir) / f"{split}.h5"
        expected = dict(format_version=FORMAT_VERSION, image_size=config.image_size,
                        captions_per_image=config.captions_per_image, max_len=config.max_len)
        if word_map:
            expected["word_map_digest"] = word_map_digest(word_map)
        with open_split(self.path, expected) as file:
            self.images_digest = file.attrs["images_digest"]
            self.captions = torch.from_numpy(file["captions"][:].astype(np.int64))
            self.caption_lengths = torch.from_numpy(file["caption_lengths"][:].astype(np.int64))
            self.image_ids = file["image_ids"].asstr()[:].tolist()
            texts = file["raw_captions"].asstr()[:].tolist()
            self.shape = file["images"].shape
            self.offset = file["images"].id.get_offset()
        self.raw_captions = [[text for text in row if text] for row in texts]
        if word_map and not 0 <= self.captions.min() <= self.captions.max() < len(word_map):
            raise UserError(f"{self.path} has word ids outside the word map: run pre_process.py "
                            f"--overwrite")

    @functools.cached_property
    def images(self) -> np.ndarray:
        # A memory map needs no lock and no handle, which workers would inherit.
        return np.memmap(self.path, np.uint8, "r", self.offset, self.shape)

    @functools.cached_property
    def features(self) -> np.ndarray:
        array = np.load(self.features_path, mmap_mode="r")
        if self.features_path.stat().st_ino != self.features_file:
            raise UserError(f"{self.features_path} was replaced by another run: start this one "
                            f"again")
        return array

    def __getstate__(self):
        # Spawned workers open the files themselves: a memory map is pickled with all its content.
        opened = ("images", "features")
        return {name: value for name, value in self.__dict__.items() if name not in opened}

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, rows):
        lengths = self.caption_lengths[rows]
        longest = max(int(lengths.max()), 2)
        captions = self.captions[rows][:, :, :longest]
        numbers = torch.tensor(rows)
        if self.begins_with == "rows":
            return numbers, captions, lengths, numbers
        arrays = getattr(self, self.begins_with)
        return torch.from_numpy(arrays[rows]), captions, lengths, numbers

    def use_features(self, path: Path) -> None:
        """Let batches begin with kept features, of a .npy file, fp16 (N, h, w, D)."""
        if not path.exists():
            raise UserError(f"{path}, which the first process has just written, is not there: "
                            f"--data_dir must be on a disk that all machines of the run share")
        self.features_path = path
        self.features_file = path.stat().st_ino
        self.begins_with = "features"

    def hold_features(self, device: torch.device, budget: int) -> torch.Tensor | None:
        """Copy the kept features, fp16 (N, h, w, D), to a device; batches then begin with the rows
        to look up there. None, with nothing changed, where they take more bytes than the budget.
        """
        if self.features.nbytes > budget:
            return None
        held = torch.empty(self.features.shape, dtype=torch.float16, device=device)
        for start in range(0, len(self), 1024):
            part = slice(start, start + 1024)
            held[part] = torch.from_numpy(np.array(self.features[part]))
        self.begins_with = "rows"
        return held


@contextlib.contextmanager
def open_split(path: Path, expected: dict[str, object]) -> Iterator[h5py.File]:
    """Open a {split}.h5 for reading and check it: the attributes that it must have, and its arrays.

    UserError: missing, not readable, truncated, made with other settings, or not of pre_process.py.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: name the data by --data_dir (or, where no "
                        f"--checkpoint is named, by --preset), or run "
                        f"pre_process.py, which makes those splits whose archives are there")
    try:
        with h5py.File(path) as file:
            check_attributes(file, path, expected)
            check_arrays(file)
            yield file
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError) as error:
        if "unable to lock file" in str(error):
            raise UserError(f"{path} is open for writing in another program, such as a notebook: "
                            f"close it there (on a network disk without locks, set "
                            f"HDF5_USE_FILE_LOCKING=FALSE)") from None
        if getattr(error, "errno", None):  # the system's reason, not what HDF5 finds in the file
            raise UserError(f"{path} cannot be read ({reason_of(error)})") from None
        raise UserError(f"{path} is damaged, or not a file of pre_process.py ({one_line(error)}): "
                        f"run pre_process.py --overwrite") from None


def check_attributes(file, path, expected):
    for name, value in expected.items():
        found = str(file.attrs.get(name))
        if found == str(value):
            continue
        what = f"{name} {found}, not {value}"
        if name == "word_map_digest":
            what = "another word map"
        if name == "source":
            what = "other annotations"
        flag = f"give --{name} {found}, or " if name in SETTINGS else ""
        raise UserError(f"{path} was made with {what}: {flag}point --data_dir at the data of this "
                        f"run, or run pre_process.py --overwrite with its settings")


def check_arrays(file):
    for name in ("images", "captions", "caption_lengths", "image_ids", "raw_captions"):
        is_own = isinstance(file.get(name, getlink=True), h5py.HardLink)
        if not is_own or file[name].is_virtual or file[name].external:
            raise ValueError(f"{name} lies in another file")

    n = len(file["images"])
    side, k, max_len = (int(file.attrs[x]) for x in ("image_size", "captions_per_image", "max_len"))
    arrays = {
        "images": (np.uint8, (n, side, side, 3)),
        "captions": (np.int32, (n, k, max_len + 2)),
        "caption_lengths": (np.int32, (n, k)),
        "image_ids": (object, (n,)),
        "raw_captions": (object, (n, k)),
    }
    for name, (dtype, shape) in arrays.items():
        if file[name].dtype != dtype or file[name].shape != shape:
            raise ValueError(f"{name} is {file[name].dtype} {file[name].shape}, "
                             f"not {dtype.__name__} {shape}")
    if file["images"].id.get_offset() is None:
        raise ValueError("the pixels are in chunks")
    lengths = file["caption_lengths"][:]
    if lengths.min() < 0 or lengths.max() > max_len + 2 or (lengths == 1).any():
        raise ValueError("a caption's length is out of range")


def tokenize_references(dataset: CaptionDataset) -> list[list[list[str]]]:
    """The words of each human caption of each picture."""
    references = []
    for captions in dataset.raw_captions:
        tokens = [tokenize(caption) for caption in captions]
        references.append([words for words in tokens if words])
    return references


# -------------------------------------------------------------------------------------------------
# Batches


def counts_of(lengths: torch.Tensor,
              device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Tokens, captions and images of a batch, by its caption_lengths (B, K): int64, 0-dim."""
    captions = (lengths > 0).sum()
    tokens = lengths.sum() - captions  # <start> is given, not predicted
    numbers = torch.stack([tokens, captions, torch.tensor(len(lengths))])
    return dict(zip(("tokens", "captions", "images"), to_device(numbers, torch.device(device))))


def largest_batch_size(n: int) -> int:
    """Of `n` training pictures, the largest batch that gives an epoch MIN_STEPS steps."""
    return max(n // MIN_STEPS, 1)


class BatchSampler(Sampler):
    """Row numbers of one epoch in global batches, of which each process takes its share.

    Training shuffles by (seed, epoch) and drops the last, incomplete batch, so that the global
    batches do not depend on the number of processes; a resumed epoch skips its `first` batches.
    Evaluation reads every row once, in order.

    Args:
        n: rows.
        batch_size: pictures in a global batch.
    """

    def __init__(self, n: int, batch_size: int, training: bool, seed: int = 0):
        self.n = n
        self.batch_size = min(batch_size, n)
        self.training = training
        self.seed = seed
        self.rank = rank()
        self.world_size = world_size()
        self.epoch = 0
        self.first = 0
        if training and self.batch_size < self.world_size:
            raise UserError(f"a batch of {self.batch_size} pictures cannot be shared by "
                            f"{self.world_size} processes")

    def starts(self) -> range:
        """Where this process's batches begin."""
        if self.training:
            return range(0, self.n - self.batch_size + 1, self.batch_size)
        return range(self.rank * self.batch_size, self.n, self.world_size * self.batch_size)

    def __len__(self):
        return len(self.starts())

    def rounds(self) -> int:
        """How many batches a process has at most; in evaluation some have one less."""
        if self.training:
            return len(self)
        return math.ceil(self.n / (self.world_size * self.batch_size))

    def share(self) -> int:
        """Pictures in a process's batch, at most."""
        return math.ceil(self.batch_size / self.world_size) if self.training else self.batch_size

    def __iter__(self):
        if self.training:
            generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
            order = torch.randperm(self.n, generator=generator)
            for start in self.starts()[self.first:]:
                batch = order[start:start + self.batch_size]
                yield batch[self.rank::self.world_size].tolist()
        else:
            for start in self.starts():
                yield list(range(start, min(start + self.batch_size, self.n)))


def make_loader(dataset: CaptionDataset, config: Config, training: bool) -> DataLoader:
    """Batches of one split, read by `config.workers` processes, at most one per CPU core.

    They are what CaptionDataset gives; `sampler.epoch` chooses the permutation, `sampler.first` the
    batch to begin with.
    """
    workers = min(config.workers, os.cpu_count())
    sampler = BatchSampler(len(dataset), config.batch_size, training, config.seed)
    return Loader(dataset, sampler=sampler, batch_size=None, num_workers=workers,
                  pin_memory=config.device != "cpu" and torch.cuda.is_available(),
                  persistent_workers=workers > 0, worker_init_fn=leave_signals)


STOPPING = {signal.SIGINT, signal.SIGTERM}
if hasattr(signal, "SIGHUP"):  # a terminal that is closed; Windows has none
    STOPPING.add(signal.SIGHUP)


class Loader(DataLoader):
    """A DataLoader whose workers get no signal before leave_signals: one that dies of it would end
    the run unsaved.

    It has no more workers than the shared memory holds batches for; a worker that finds no room
    there dies or hangs.
    """

    is_sized = False

    def __iter__(self):
        if self.num_workers and not self.is_sized:
            self.num_workers = workers_that_fit(self)
            self.is_sized = True
        if not hasattr(signal, "pthread_sigmask"):  # Windows
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # which workers inherit
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def workers_that_fit(loader: DataLoader) -> int:
    """How many of its workers find room for their batches in /dev/shm, 64 MB in a container of
    Docker's; prints a warning where these are fewer.
    """
    if not SHARED_MEMORY.is_dir():  # macOS, Windows
        return loader.num_workers
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    picture = sum(tensor.nbytes for tensor in loader.dataset[[0]])
    batch = picture * loader.sampler.share()
    free = shutil.disk_usage(SHARED_MEMORY).free
    # Of each worker two batches wait, and two more are in use.
    room = free // (batch * processes) - 2
    fit = max(room // loader.prefetch_factor, 0)
    if fit >= loader.num_workers:
        return loader.num_workers
    print(f"warning: {SHARED_MEMORY} has {free / 2**20:.0f} MiB free, batches of "
          f"{batch / 2**20:.1f} MiB: {fit} workers instead of {loader.num_workers}; in Docker give "
          f"--shm-size=8g")
    return fit


def leave_signals(worker: int) -> None:
    """Let workers ignore Ctrl-C, a closed terminal and the first SIGTERM, which come to all
    processes: the main process decides. A second SIGTERM ends a worker that hangs.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
