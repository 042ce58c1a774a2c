"""From files to tensors: pixels, words, the word map, and batches of pictures with all their captions.

Preprocessing, training, evaluation and demo share read_image and tokenize: the same file gives the same pixels
everywhere, the same sentence the same words.
"""
import collections
import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import struct
import unicodedata
import warnings
from pathlib import Path
from typing import IO

import h5py
import numpy as np
import torch
from PIL import ExifTags, Image
from torch.utils.data import DataLoader, Dataset, Sampler

from config import Config
from utils import UserError, rank, reason_of, to_device, world_size

with warnings.catch_warnings():  # jieba's own use of setuptools is deprecated
    warnings.simplefilter("ignore")
    import jieba

FORMAT_VERSION = 2
JIEBA_VERSION = jieba.__version__  # other versions may segment otherwise
SETTINGS = ("image_size", "captions_per_image", "max_len", "min_word_freq")  # of a data file
PAD, UNK, START, END = "<pad>", "<unk>", "<start>", "<end>"
# Not EPS, whose decoder runs another program, nor formats that no photograph needs.
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MIN_STEPS = 20  # of an epoch; its whole batches then leave out fewer than one picture in 20
SHARED_MEMORY = Path("/dev/shm")  # where workers put batches, on Linux
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
                    ".pbm", ".pnm")
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,  # EXIF's orientation; 1 is upright
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
         7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}

# jieba's cache in the temporary folder may be another version's or another user's. Where there is no
# such folder, jieba builds its dictionary anew, as quickly, and logs that it could not keep it.
jieba.dt.tmp_dir = jieba.__file__
jieba.setLogLevel(logging.CRITICAL)


# ---------------------------------------------------------------------------------------------------------------------
# Pixels


class BadPicture(UserError):
    """What is not a readable picture; the message names it and says why."""


Picture = str | os.PathLike | IO[bytes] | Image.Image | np.ndarray


def open_picture(source: Picture, image_size: int | None = None) -> Image.Image:
    """Open any picture upright and in RGB: gray, palette, CMYK, 16 or 32 bits, transparent (on white),
    EXIF-rotated; of an animation the first frame.

    Args:
        source: an array is uint8, (H, W) or (H, W, 1, 3 or 4 channels).
        image_size: decode a JPEG straight to a square of this side, twice as fast where it is large;
            all else ignores it and keeps its own size.
    Raises:
        BadPicture: missing, empty, truncated, not a picture, or more than 179 million pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with unread(source) as file:
                drafted = None
                if image_size and file is not source:  # an image that was given stays as it is
                    drafted = file.draft(None, draft_size(file.size, image_size))
                file.load()
                turn = turn_of(file)
                picture = file
                if drafted:  # the box is exact where the reduction does not divide the side
                    picture = file.resize((image_size, image_size), Image.Resampling.BILINEAR, drafted[1])
                if turn is not None:
                    picture = picture.transpose(turn)
            if picture.mode.startswith(("I", "F")):
                has_full_scale = picture.mode.startswith("I;16") or file.format == "PPM" and picture.mode == "I"
                return eight_bits(picture, has_full_scale).convert("RGB")
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
            return picture.convert("RGB")
    except Exception as error:  # Pillow's decoders raise anything on a broken file
        name = source
        if not isinstance(source, str | os.PathLike):
            name = getattr(source, "filename", "") or getattr(source, "name", type(source).__name__)
        reason = str(error).replace(f" {str(source)!r}", "").replace(f" {source!r}", "")
        if isinstance(error, FileNotFoundError):
            reason = "no such file"
        raise BadPicture(f"{name}: {reason or type(error).__name__}") from error


def unread(source):
    """A picture as Pillow has it before its pixels are read, to be used in a `with`."""
    if isinstance(source, Image.Image):
        return contextlib.nullcontext(source)  # its owner closes it
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8:
            raise TypeError(f"an array of {source.dtype}: give uint8, from 0 to 255; of floats from 0 to 1 "
                            f"that is (255 * array).round().astype(numpy.uint8)")
        shape = source.shape[:2] if source.shape[2:] == (1,) else source.shape
        if not source.size or len(shape) != 2 and shape[2:] not in ((3,), (4,)):
            raise ValueError(f"an array of shape {source.shape}: give (H, W), or (H, W, 1, 3 or 4)")
        return Image.fromarray(source.reshape(shape))
    if isinstance(source, str | os.PathLike):
        if not Path(source).is_file():  # a folder; a pipe would block
            raise FileNotFoundError
    elif not hasattr(source, "read"):
        raise TypeError("give a path, a file object, a PIL image or a uint8 array")
    return Image.open(source, formats=PICTURE_FORMATS)


def turn_of(file):
    """How to turn a picture file upright: Image.Transpose, or None where EXIF does not say it, or not properly."""
    try:
        return TURNS.get(file.getexif().get(ExifTags.Base.Orientation))
    except (SyntaxError, ValueError, struct.error):  # of damaged EXIF data, whose picture may be sound
        return None


def eight_bits(picture, has_full_scale):
    """Scale a gray picture of 16 or 32 bits to 8, where Pillow clips.

    Args:
        picture (PIL.Image): of mode I;16, I or F. has_full_scale (bool): it goes from 0 to 65,535. Others are taken to
            go from 0 to 1 or to 255 if they lie within, or else from their lowest number to their highest.
    Returns:
        PIL.Image: mode L.
    """
    gray = np.nan_to_num(np.asarray(picture, np.float32), posinf=0, neginf=0)
    low, high = gray.min(), gray.max()
    if has_full_scale:
        low, high = 0, 65535
    elif 0 <= low and high <= 255:
        low, high = 0, 1 if high <= 1 else 255
    shades = 255 * (gray - low) / ((high - low) or 1)
    return Image.fromarray(shades.clip(0, 255).astype(np.uint8))


def draft_size(size, image_size):
    """The size to decode a JPEG at: 1/2, 1/4 or 1/8 of its own costs less to decode and to resize.

    Measured on photographs against decoding at full size, grey levels differ by less than 1 on average: by 0.7 where
    1/2 is still 1.3 times the size wanted, by 0.6 where 1/4 or 1/8 is still twice that.

    Args:
        size (tuple): width and height, pixels. image_size (int): side of the square wanted, pixels.
    Returns:
        tuple: width and height for Pillow's draft, which takes the next larger of the three.
    """
    reach = min(size) / image_size
    reduction = max(int(reach / 2), 2 if reach >= 2.6 else 1)
    return size[0] // reduction, size[1] // reduction


def read_image(source: Picture, image_size: int) -> np.ndarray:
    """The one way from a picture to pixels: uint8 (image_size, image_size, 3), RGB, squeezed into the
    square whole. Raises: BadPicture: see open_picture.
    """
    square = (image_size, image_size)
    return np.array(open_picture(source, image_size).resize(square, Image.Resampling.BILINEAR))


def short_names(file_names, prefix=""):
    """What pictures are called: by file name, without suffix where no other picture can be meant.

    No two get one name: cat.jpg becomes cat, but stays cat.jpg beside a cat.png or a cat.

    Args: file_names (list of str): of one folder. prefix (str): left out as the suffix is.
    Returns: list of str
    """
    names = []  # of each picture, in full and short
    for file_name in file_names:
        stem, suffix = os.path.splitext(file_name)
        short = stem if suffix.lower() in PICTURE_SUFFIXES else file_name
        names.append((file_name, short.removeprefix(prefix)))
    counts = collections.Counter(name for both in set(names) for name in set(both))
    return [short if counts[short] == 1 else file_name for file_name, short in names]


# ---------------------------------------------------------------------------------------------------------------------
# Words


def tokenize(caption):
    """Segment a sentence, normalised, into words. Args: caption (str). Returns: list of str."""
    return segment(normalise(caption))


def segment(text):
    """jieba's exact mode, without white space. Args: text (str). Returns: list of str."""
    return [word for word in jieba.cut(text) if not word.isspace()]


def normalise(caption):
    """A caption as it is segmented and compared; it is empty if nothing is left.

    Left out are the full stop, as by AI Challenger's evaluator (<end> marks the end of a sentence),
    white space as by unsegmented, and what nobody sees: NUL, halves of an emoji, zero-width spaces
    and joiners, soft hyphens, byte order marks, variation selectors.

    Args: caption (str). Returns: str.
    """
    caption = re.sub("[。\ufe00-\ufe0f\U000e0100-\U000e01ef]", "", caption)
    invisible = ("Cc", "Cf", "Cs")  # Unicode's categories: controls, format, surrogates
    return unsegmented("".join(character for character in caption if character.isspace()
                               or unicodedata.category(character) not in invisible))


def unsegmented(caption):
    """A caption without white space, except between two Latin words or numbers. Returns: str."""
    return re.sub("(?<=[^!-~À-ɏ]) | (?=[^!-~À-ɏ])", "", " ".join(caption.split()))


@functools.cache
def kind_of(word):
    """noun, verb, colour or number, function word, or other: by jieba's tag of the word alone."""
    from jieba import posseg  # takes half a second, and only figures need it
    if word.endswith("色") or word in [*"红黄蓝绿黑白灰棕橙紫粉"]:
        return "colour or number"
    if word in ("是", "有") or word.endswith("里"):  # verbs without anything to look at; 画里, 水里
        return "function word"
    tag = posseg.lcut(word)[-1].flag
    kinds = {"noun": "nsjt", "verb": "v", "colour or number": "mq", "function word": "upcdrfykwx"}
    return next((kind for kind, tags in kinds.items() if tag[0] in tags), "other")


def build_word_map(token_lists, min_word_freq):
    """Number the words by falling frequency, then by code point: the same text gives the same map everywhere.

    Args:
        token_lists (iterable of list of str): the training captions.
        min_word_freq (int): a word must occur at least this often.
    Returns:
        dict: word -> id; <pad> is 0, the words follow from 1, then <unk>, <start>, <end>.
    """
    counts = collections.Counter(word for tokens in token_lists for word in tokens)
    words = sorted((word for word, count in counts.items() if count >= min_word_freq and word not in
                    (PAD, UNK, START, END)), key=lambda word: (-counts[word], word))
    return {word: number for number, word in enumerate([PAD, *words, UNK, START, END])}


def word_map_digest(word_map):
    """sha256 of the word map, hexadecimal."""
    return hashlib.sha256(json.dumps(word_map, sort_keys=True).encode()).hexdigest()


def check_word_map(word_map, source):
    """Raise UserError, naming `source`, unless this is a dict of words to 0 .. V-1 with the four special tokens."""
    if not (isinstance(word_map, dict) and all(isinstance(word, str) for word in word_map)
            # Lone surrogates cannot be written; control characters give orders to a terminal.
            and not re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "".join(word_map))
            and all(type(number) is int for number in word_map.values())
            and sorted(word_map.values()) == list(range(len(word_map)))
            and word_map.get(PAD) == 0 and {UNK, START, END} <= word_map.keys()):
        raise UserError(f"{source} holds what is not a word map (word -> number, with <pad> 0, <unk>, <start> and "
                        f"<end>); pre_process.py --overwrite writes WORDMAP.json anew")
    return word_map


def load_word_map(data_dir):
    """Read data_dir/WORDMAP.json. Returns: dict word -> id. Raises: UserError where it is missing or damaged;
    OSError where it cannot be read, which making it again would not mend.
    """
    path = Path(data_dir) / "WORDMAP.json"
    try:
        word_map = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name the data by --preset or --data_dir, or run pre_process.py "
                        f"(--overwrite if only this file was lost)") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): pre_process.py --overwrite writes it anew") from None
    return check_word_map(word_map, path)


def encode_caption(tokens, word_map, max_len):
    """Turn words into ids.

    Args:
        tokens (list of str). word_map (dict): word -> id. max_len (int): further words are cut.
    Returns:
        int32 array (max_len + 2,): <start>, the words, <end> unless words were cut, then <pad>.
        int: its length without <pad>.
    """
    ids = [word_map[START], *(word_map.get(word, word_map[UNK]) for word in tokens[:max_len])]
    if len(tokens) <= max_len:  # the model must not learn to stop in mid-sentence
        ids.append(word_map[END])
    row = np.zeros(max_len + 2, np.int32)
    row[:len(ids)] = ids
    return row, len(ids)


def decode_caption(ids, words):
    """Turn ids into words, up to <end>, without <pad> and <start>.

    Args:
        ids (iterable of int). words (list of str): of word_list.
    Returns:
        list of str
    """
    tokens = [words[int(number)] for number in ids]
    if END in tokens:
        tokens = tokens[:tokens.index(END)]
    return [token for token in tokens if token not in (PAD, START)]


def word_list(word_map):
    """The words of a word map by id. Returns: list of str."""
    return sorted(word_map, key=word_map.get)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


class CaptionDataset(Dataset):
    """One split as pre_process.py wrote it: N pictures, each with up to K captions.

    `dataset[rows]` (list of int, B of them) gives a batch: images uint8 (B, S, S, 3); captions int64 (B, K, L), cut to
    the longest of the batch; caption_lengths int64 (B, K), <start> and <end> counted, 0 where a picture has fewer
    captions; rows int64 (B,). After use_features it begins with features, fp16 (B, h, w, D), instead of images, and
    after hold_features with the rows.

    Training reads the ids, `captions`; scores compare with the text, `raw_captions`. Whoever corrects a caption in the
    file with h5py corrects both, with the `caption_lengths`; encode_caption gives ids and length.

    Args:
        config (Config). split (str). word_map (dict): that the ids must be of; None where only the text is used.
    Attributes: image_ids (list of str), raw_captions (list of lists of str, per picture), images_digest (str: sha256
    of all pixels, as pre_process.py computed it).
    Raises:
        UserError: missing, damaged, of other settings or of another word map.
    """

    begins_with = "images"

    def __init__(self, config, split, word_map=None):
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
            self.raw_captions = [[text for text in row if text] for row in file["raw_captions"].asstr()[:].tolist()]
            self.shape, self.offset = file["images"].shape, file["images"].id.get_offset()
        if word_map and len(self) and not 0 <= self.captions.min() <= self.captions.max() < len(word_map):
            raise UserError(f"{self.path} has word ids outside the word map: run pre_process.py --overwrite")

    @functools.cached_property
    def images(self):
        # A memory map needs no lock and no handle, which workers would inherit; the data set is contiguous.
        return np.memmap(self.path, np.uint8, "r", self.offset, self.shape)

    @functools.cached_property
    def features(self):
        array = np.load(self.features_path, mmap_mode="r")
        if self.features_path.stat().st_ino != self.features_file:
            raise UserError(f"{self.features_path} was replaced by another run: start this one again")
        return array

    def __getstate__(self):
        # Spawned workers open the files themselves: a memory map is pickled with all its content.
        return {name: value for name, value in self.__dict__.items() if name not in ("images", "features")}

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, rows):
        lengths = self.caption_lengths[rows]
        longest = max(int(lengths.max()), 2)
        numbers = torch.tensor(rows)
        first = numbers if self.begins_with == "rows" else torch.from_numpy(getattr(self, self.begins_with)[rows])
        return first, self.captions[rows][:, :, :longest], lengths, numbers

    def use_features(self, path):
        """Let batches begin with kept features. Args: path (Path): of a .npy file, fp16 (N, h, w, D)."""
        if not path.exists():
            raise UserError(f"{path}, which the first process has just written, is not there: --data_dir must be on a "
                            f"disk that all machines of the run share")
        self.features_path, self.features_file, self.begins_with = path, path.stat().st_ino, "features"

    def hold_features(self, device, budget):
        """Copy the kept features to a device that has room; batches then begin with the rows to look up there.

        Args:
            device (torch.device). budget (int): bytes that the features may take.
        Returns:
            fp16 (N, h, w, D) on the device; None, with nothing changed, where they exceed the budget.
        """
        if self.features.nbytes > budget:
            return None
        held = torch.empty(self.features.shape, dtype=torch.float16, device=device)
        for start in range(0, len(self), 1024):
            held[start:start + 1024] = torch.from_numpy(np.array(self.features[start:start + 1024]))
        self.begins_with = "rows"
        return held


@contextlib.contextmanager
def open_split(path, expected):
    """Open a {split}.h5 and check it: attributes; names, types and shapes of the data sets; caption lengths.

    Args:
        path (Path). expected (dict): attributes that it must have.
    Yields:
        h5py.File, to be read only.
    Raises:
        UserError: missing, not readable, truncated, made with other settings, or not a file of pre_process.py.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: name the data by --preset or --data_dir, or run pre_process.py, which "
                        f"makes those splits whose archives are there")
    try:
        with h5py.File(path) as file:
            for name, value in expected.items():
                found = " ".join(str(file.attrs.get(name)).split())
                if found != str(value):
                    what = {"word_map_digest": "another word map", "source": "other annotations"}.get(
                        name, f"{name} {found}, not {value}")
                    is_setting = name in SETTINGS and found.isdecimal()
                    flag = f"give --{name} {found}, or " if is_setting else ""
                    raise UserError(f"{path} was made with {what}: {flag}point --data_dir at the data "
                                    f"of this run, or run pre_process.py --overwrite with its settings")
            for name in ("images", "captions", "caption_lengths", "image_ids", "raw_captions"):
                is_link = not isinstance(file.get(name, getlink=True), h5py.HardLink)
                if is_link or file[name].is_virtual or file[name].external:
                    raise ValueError(f"{name} lies in another file")
            side, k, max_len = (int(file.attrs[name]) for name in ("image_size", "captions_per_image", "max_len"))
            images, lengths, n = file["images"], file["caption_lengths"][:], len(file["images"])
            for name, kind, *shape in (("images", np.uint8, n, side, side, 3), ("image_ids", object, n),
                                       ("captions", np.int32, n, k, max_len + 2), ("raw_captions", object, n, k),
                                       ("caption_lengths", np.int32, n, k)):
                if file[name].dtype != kind or file[name].shape != tuple(shape):
                    raise ValueError(f"{name} is {file[name].dtype} {file[name].shape}, not {kind.__name__} {shape}")
            if n and (lengths.min() < 0 or lengths.max() > max_len + 2 or (lengths == 1).any()):
                raise ValueError("a caption's length is out of range")
            offset = images.id.get_offset()  # None where they are in chunks
            if offset is None or offset + images.nbytes > path.stat().st_size:
                raise ValueError("the pixels are not in one piece")
            yield file
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError) as error:
        if "unable to lock file" in str(error):
            raise UserError(f"{path} is open for writing in another program, such as a notebook: close "
                            f"it there (on a network disk without locks, set "
                            f"HDF5_USE_FILE_LOCKING=FALSE)") from None
        if getattr(error, "errno", None):  # the system's reason, not what HDF5 finds in the file
            raise UserError(f"{path} cannot be read ({reason_of(error)})") from None
        raise UserError(f"{path} is damaged, or not a file of pre_process.py ({' '.join(str(error).split())}): run "
                        f"pre_process.py --overwrite") from None


def tokenize_references(dataset):
    """The human captions of each picture as words. Returns: list (pictures) of lists (captions) of lists of str."""
    return [list(filter(None, map(tokenize, captions))) for captions in dataset.raw_captions]


def counts_of(lengths: torch.Tensor, device="cpu") -> dict[str, torch.Tensor]:
    """How many tokens, captions and images a batch has, by caption_lengths (B, K): int64, 0-dim."""
    captions = (lengths > 0).sum()
    tokens = lengths.sum() - captions  # <start> is given, not predicted
    numbers = torch.stack([tokens, captions, torch.tensor(len(lengths))])
    return dict(zip(("tokens", "captions", "images"), to_device(numbers, torch.device(device))))


class BatchSampler(Sampler):
    """Row numbers of one epoch in global batches, of which each process takes its share.

    Training shuffles by (seed, epoch) and drops the last, incomplete batch, so that the global batches do not depend on
    the number of processes; a resumed epoch skips its `first` batches. Evaluation reads every row once, in order.

    Args:
        n: rows.
        batch_size: pictures in a global batch.
    """

    def __init__(self, n: int, batch_size: int, training: bool, seed: int = 0):
        self.n = n
        self.batch_size = max(min(batch_size, n), 1)
        self.training = training
        self.seed = seed
        self.rank = rank()
        self.world_size = world_size()
        self.epoch = 0
        self.first = 0
        if training and self.batch_size < self.world_size:
            raise UserError(f"a batch of {self.batch_size} pictures cannot be shared by "
                            f"{self.world_size} processes")

    def starts(self):
        """Where this process's batches begin. Returns: range."""
        if self.training:
            return range(0, self.n - self.batch_size + 1, self.batch_size)
        return range(self.rank * self.batch_size, self.n, self.world_size * self.batch_size)

    def __len__(self):
        return len(self.starts())

    def rounds(self):
        """How many batches a process has at most; in evaluation some have one less. Returns: int."""
        return len(self) if self.training else -(-self.n // (self.world_size * self.batch_size))

    def share(self):
        """Pictures in a process's batch, at most. Returns: int."""
        return -(-self.batch_size // self.world_size) if self.training else self.batch_size

    def __iter__(self):
        if self.training:
            order = torch.randperm(self.n, generator=torch.Generator().manual_seed(self.seed * 100_003 + self.epoch))
            for start in self.starts()[self.first:]:
                yield order[start:start + self.batch_size][self.rank::self.world_size].tolist()
        else:
            for start in self.starts():
                yield list(range(start, min(start + self.batch_size, self.n)))


def largest_batch_size(n):
    """Of `n` training pictures, the largest batch that gives an epoch MIN_STEPS steps. Returns: int, at least 1."""
    return max(n // MIN_STEPS, 1)


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
    """A DataLoader whose workers get no signal before leave_signals: one that dies of it would end the run unsaved.

    It has no more workers than the shared memory holds batches for; a worker that finds no room there dies or hangs.
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


def workers_that_fit(loader):
    """How many workers of a DataLoader find room for their batches in /dev/shm, 64 MB in a container of Docker's.

    Returns: int, at most the loader's own; a warning is printed where it is less.
    """
    if not SHARED_MEMORY.is_dir():  # macOS, Windows
        return loader.num_workers
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    batch = sum(tensor.nbytes for tensor in loader.dataset[[0]]) * loader.sampler.share()
    # Of each worker two batches wait, and two more are in use.
    free = shutil.disk_usage(SHARED_MEMORY).free
    fit = max((free // (batch * processes) - 2) // loader.prefetch_factor, 0)
    if fit < loader.num_workers:
        print(f"warning: {SHARED_MEMORY} has {free / 2**20:.0f} MiB free, batches of {batch / 2**20:.1f} MiB: {fit} "
              f"workers instead of {loader.num_workers}; in Docker give --shm-size=8g")
    return min(fit, loader.num_workers)


def leave_signals(worker):
    """Let workers ignore Ctrl-C, a closed terminal and the first SIGTERM, which come to all processes: the main process
    decides. A second SIGTERM ends a worker that hangs."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
