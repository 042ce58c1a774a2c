"""From files to tensors: pixels, tokens, the word map, and batches of pictures with all their captions.

Each of the first two has one function, which preprocessing, training, evaluation and demo share: read_image and
tokenize. The same picture file is the same array everywhere, and the same sentence the same words.
"""
import collections
import errno
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import warnings
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler

from config import UserError, replacing

with warnings.catch_warnings():  # jieba warns of its own use of setuptools, which is no business of its user
    warnings.simplefilter("ignore")
    import jieba

FORMAT_VERSION = 2
FEATURES_VERSION = 2  # to be raised too when Encoder gives other numbers for the same weights
USER_BLOCK = 512  # the smallest that HDF5 knows
SYNC_ROWS = 2048  # kept features that a killed run may lose; seldom enough not to make the disk wait
JIEBA_VERSION = jieba.__version__  # another version may cut words otherwise
PAD, UNK, START, END = "<pad>", "<unk>", "<start>", "<end>"
# Decoders that run other programs (EPS) or that no photograph needs stay closed.
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
ORIENTATION = ExifTags.Base.Orientation
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")

jieba.setLogLevel(logging.WARNING)


# ---------------------------------------------------------------------------------------------------------------------
# Pixels


class BadPicture(Exception):
    """A file that is not a readable picture; the message names it and says why."""


def open_picture(path, image_size=None):
    """Open any picture upright and in RGB: gray, palette, CMYK, 16-bit, transparent (on white), EXIF-rotated.

    Args:
        path (str or Path)
        image_size (int): make a JPEG a square of this side while it is decoded, which is twice as fast where it is
            large; nothing to other formats.
    Returns:
        PIL.Image: mode RGB, the file's own size (the first frame of an animation).
    Raises:
        BadPicture: missing, empty, truncated, not a picture, or more than 179 million pixels.
    """
    try:
        if not Path(path).is_file():  # a folder, or a pipe that would be waited for
            raise FileNotFoundError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=PICTURE_FORMATS) as file:
                if image_size and (drafted := file.draft(None, draft_size(file.size, image_size))):
                    exif = Image.Exif()  # of the orientation alone: a broken one is got over by the file, not by a copy
                    exif[ORIENTATION] = file.getexif().get(ORIENTATION, 1)
                    # The box is exact where a side does not divide by the reduction.
                    file = file.resize((image_size, image_size), Image.Resampling.BILINEAR, drafted[1])
                    file.info["exif"] = exif.tobytes()
                picture = ImageOps.exif_transpose(file)
                picture.load()
            if picture.mode.startswith("I"):  # Pillow clips 16 bits to 8 where it should scale
                return Image.fromarray((np.asarray(picture) / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
            return picture.convert("RGB")
    except Exception as error:  # on a broken file Pillow's decoders raise whatever they stumble over
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error).replace(f" {str(path)!r}", "")
        raise BadPicture(f"{path}: {reason or type(error).__name__}") from error


def draft_size(size, image_size):
    """The size to decode a JPEG at: half of its own, a quarter or an eighth cost less to decode and to resize.

    Against decoding it whole, grey levels differ by less than 1 on the average, as measured on photographs: by 0.7
    where a half is 1.3 times as large as what is wanted, by 0.6 where a quarter or an eighth is twice as large.

    Args:
        size (tuple): width and height, pixels. image_size (int): side of the square that is wanted, pixels.
    Returns:
        tuple: width and height, for Pillow's draft, which takes the next larger of those three.
    """
    reach = min(size) / image_size
    reduction = max(int(reach / 2), 2 if reach >= 2.6 else 1)
    return size[0] // reduction, size[1] // reduction


def read_image(path, image_size):
    """The one way from a picture file to pixels, for training, evaluation and demo alike.

    Args:
        path (str or Path)
        image_size (int): side of the square, pixels; the picture is resized without regard to its aspect.
    Returns:
        uint8 array (image_size, image_size, 3), RGB.
    Raises:
        BadPicture: see open_picture.
    """
    return np.array(open_picture(path, image_size).resize((image_size, image_size), Image.Resampling.BILINEAR))


# ---------------------------------------------------------------------------------------------------------------------
# Words


def tokenize(caption):
    """Cut a sentence into words: jieba's exact mode, without white space and without the full stop 。

    The full stop is left out as AI Challenger's evaluator does; the end of a sentence is the token <end>.

    Args:
        caption (str)
    Returns:
        list of str
    """
    return [word for word in jieba.cut(caption.replace("。", "")) if not word.isspace()]


def build_word_map(token_lists, min_word_freq):
    """Number the words by falling frequency, then by code point; the same text gives the same map everywhere.

    Args:
        token_lists (iterable of list of str): the training captions.
        min_word_freq (int): a word must occur at least so often.
    Returns:
        dict: word -> id; <pad> is 0, the words follow from 1, then <unk>, <start>, <end>.
    """
    counts = collections.Counter(word for tokens in token_lists for word in tokens)
    words = sorted((word for word, count in counts.items() if count >= min_word_freq and word not in
                    (PAD, UNK, START, END)), key=lambda word: (-counts[word], word))
    return {word: number for number, word in enumerate([PAD, *words, UNK, START, END])}


def word_map_digest(word_map):
    """sha256 of the word map, hexadecimal: what data files and checkpoints are compared by."""
    return hashlib.sha256(json.dumps(word_map, sort_keys=True).encode()).hexdigest()


def check_word_map(word_map, source):
    """Raise UserError, naming `source`, unless this is a dict of words to 0 .. V-1 with the four special tokens."""
    if not (isinstance(word_map, dict) and all(isinstance(word, str) for word in word_map)
            and not re.search("[\ud800-\udfff]", "".join(word_map))  # halves of characters, which no file can hold
            and all(type(number) is int for number in word_map.values())
            and sorted(word_map.values()) == list(range(len(word_map)))
            and word_map.get(PAD) == 0 and {UNK, START, END} <= word_map.keys()):
        raise UserError(f"{source} holds what is not a word map: word -> number, with <pad> 0, <unk>, <start> and "
                        f"<end> (pre_process.py --overwrite makes WORDMAP.json again)")
    return word_map


def load_word_map(data_dir):
    """Read data_dir/WORDMAP.json. Returns: dict word -> id. Raises: UserError where it is missing or damaged."""
    path = Path(data_dir) / "WORDMAP.json"
    try:
        word_map = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run pre_process.py (--overwrite if only this file was lost)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): python pre_process.py --overwrite makes it again") from None
    return check_word_map(word_map, path)


def encode_caption(tokens, word_map, max_len):
    """Turn words into ids.

    Args:
        tokens (list of str): at most `max_len` of them are used.
        word_map (dict): word -> id.
        max_len (int)
    Returns:
        int32 array (max_len + 2,): <start>, the words, <end> where none was left out, then <pad>.
        int: how many of these are real, <start> and <end> counted.
    """
    ids = [word_map[START], *(word_map.get(word, word_map[UNK]) for word in tokens[:max_len])]
    if len(tokens) <= max_len:  # to stop in mid-sentence is not to be learnt
        ids.append(word_map[END])
    row = np.zeros(max_len + 2, np.int32)
    row[:len(ids)] = ids
    return row, len(ids)


def decode_caption(ids, words):
    """Turn ids into words, up to <end>, without the special tokens; <unk> stays.

    Args:
        ids (iterable of int)
        words (list of str): the word map's words by id, as word_list gives them.
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
    the batch's longest; caption_lengths int64 (B, K), <start> and <end> counted, 0 where a picture has fewer captions;
    rows int64 (B,). After read_features the images' place is taken by the features, fp16 (B, h, w, D), and after
    hold_features by the rows.

    Attributes: image_ids (list of str), raw_captions (list of lists of str, one for each picture), images_digest (str
    or None: sha256 of all pixels, as pre_process.py wrote it).
    """

    begins_with = "images"

    def __init__(self, config, split, word_map):
        self.path = Path(config.data_dir) / f"{split}.h5"
        expected = dict(format_version=FORMAT_VERSION, word_map_digest=word_map_digest(word_map),
                        image_size=config.image_size, captions_per_image=config.captions_per_image,
                        max_len=config.max_len)
        with open_split(self.path) as file:
            check_attributes(self.path, dict(file.attrs), expected)
            try:
                self.images_digest = file.attrs.get("images_digest")
                self.captions = torch.from_numpy(file["captions"][:].astype(np.int64))
                self.caption_lengths = torch.from_numpy(file["caption_lengths"][:].astype(np.int64))
                self.image_ids = list(file["image_ids"].asstr()[:])
                self.raw_captions = [[text for text in row if text] for row in file["raw_captions"].asstr()[:]]
                self.shape, self.offset = file["images"].shape, file["images"].id.get_offset()
            except (OSError, ValueError) as error:
                raise damaged(self.path, error) from None
        if len(self.captions) and not (0 <= self.captions.min() and self.captions.max() < len(word_map)):
            raise UserError(f"{self.path} has word ids outside the word map: run pre_process.py --overwrite")

    @functools.cached_property
    def images(self):
        # The data set is contiguous, so a map of the file reads a whole batch without a lock or a handle to inherit.
        return np.memmap(self.path, np.uint8, "r", self.offset, self.shape)

    @functools.cached_property
    def features(self):
        return np.memmap(*self.features_map)

    def __getstate__(self):
        # A worker that is spawned opens the files itself; a pickled map would carry all its numbers.
        return {name: value for name, value in self.__dict__.items() if name not in ("images", "features")}

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, rows):
        lengths = self.caption_lengths[rows]
        longest = max(int(lengths.max()), 2)
        numbers = torch.tensor(rows)
        first = numbers if self.begins_with == "rows" else torch.from_numpy(getattr(self, self.begins_with)[rows])
        return first, self.captions[rows][:, :, :longest], lengths, numbers

    def read_features(self, path, key, shape):
        """Let batches begin with kept features. Args: see open_features. Raises: UserError: it cannot be used."""
        try:
            with open_features(path, key, shape)[0] as file:
                self.features_map = path, np.float16, "r", file["features"].id.get_offset(), shape
        except ValueError as error:
            raise UserError(f"{path} {error}: the first process has just found it whole, so --data_dir must be on a "
                            f"disk that all machines of the run share") from None
        self.begins_with = "features"

    def hold_features(self, device, budget):
        """Copy the kept features to a device that has room, and let batches begin with rows to look up there.

        Args:
            device (torch.device). budget (int): bytes that the features may take.
        Returns:
            fp16 (N, h, w, D) on the device; None, and nothing is changed, where they are larger than the budget.
        """
        if self.features.nbytes > budget:
            return None
        held = torch.empty(self.features.shape, dtype=torch.float16, device=device)
        for start in range(0, len(self), 1024):
            held[start:start + 1024] = torch.from_numpy(np.array(self.features[start:start + 1024]))
        self.begins_with = "rows"
        return held


def open_split(path):
    """Open a {split}.h5 and check that it is one: names, types, shapes, contiguous and in this very file.

    Args:
        path (Path)
    Returns:
        h5py.File, open for reading.
    Raises:
        UserError: missing, damaged, or something else.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: run pre_process.py first")
    try:
        file, _ = open_sealed(path)
    except OSError as error:
        raise damaged(path, error) from None
    try:
        for name, kind, ndim in (("images", np.uint8, 4), ("captions", np.int32, 3), ("caption_lengths", np.int32, 2),
                                 ("image_ids", object, 1), ("raw_captions", object, 2)):
            data = own_data(file, name, kind)
            if not (data.ndim == ndim and len(data) == len(file["images"])
                    and (kind is not object or h5py.check_string_dtype(data.dtype))):
                raise ValueError(f"has no proper {name!r}")
            # A few bytes can claim any shape; what lies plainly in the file cannot be larger than it.
            taken = data.id.get_storage_size()
            if data.chunks or taken < data.size or (taken and data.id.get_offset() + taken > path.stat().st_size):
                raise ValueError(f"{name!r} is not contiguous, or longer than the file")
        images, captions = file["images"], file["captions"]
        side, longest = int(file.attrs["image_size"]), int(file.attrs["max_len"])
        if images.shape[1:] != (side, side, 3) or captions.shape[2] != longest + 2 or \
                not captions.shape[:2] == file["caption_lengths"].shape == file["raw_captions"].shape:
            raise ValueError("shapes do not fit each other")
        lengths = file["caption_lengths"][:]
        if len(lengths) and (lengths.min() < 0 or lengths.max() > captions.shape[2] or (lengths == 1).any()):
            raise ValueError("caption lengths out of range")
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, OverflowError) as error:
        file.close()
        raise damaged(path, error) from None
    return file


def seal(path, begin, end, done):
    """Write what open_sealed compares into HDF5's user block, the bytes at the start that HDF5 leaves to its user.

    Args:
        path (Path): of a whole HDF5 file with a user block. begin, end (int): where in it the numbers lie that are too
            many to be read each time. done (int): rows of these.
    """
    counts = np.array([begin, end, done], "<u8").tobytes()
    content = counts + digest_around(path, counts)
    with open(path, "r+b") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def open_sealed(path, mode="r"):
    """Open a file that `seal` was called on, once nothing of it is seen to be damaged but, perhaps, those numbers.

    HDF5 itself is not to be trusted with a damaged file: some it reads for ever, on some the process dies.

    Args:
        path (Path). mode (str): "r" or "r+".
    Returns:
        h5py.File; int: rows done.
    Raises:
        OSError: missing, damaged, or something else. BlockingIOError: another process is writing it.
    """
    with open(path, "rb") as file:
        head = file.read(USER_BLOCK)
    if len(head) < USER_BLOCK or head[24:56] != digest_around(path, head[:24]):
        raise OSError("its checksum is wrong")
    return h5py.File(path, mode), int.from_bytes(head[16:24], "little")


def digest_around(path, counts):
    """sha256 of a file without its user block and the numbers of it that `seal` names in `counts`. Returns: bytes."""
    begin, end, _ = np.frombuffer(counts, "<u8").tolist()
    data, digest = np.memmap(path, np.uint8, "r"), hashlib.sha256(counts)
    digest.update(data[USER_BLOCK:USER_BLOCK + 20])
    digest.update(data[USER_BLOCK + 24:begin])  # between them HDF5 notes that the file is open, or was when it died
    digest.update(data[end:])
    return digest.digest()


def own_data(file, name, kind):
    """A data set that lies in this very file. Returns: h5py.Dataset. Raises: ValueError: none, or of another dtype."""
    data = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not (isinstance(data, h5py.Dataset) and data.dtype == kind and not data.external and not data.is_virtual):
        raise ValueError(f"has no proper {name!r}")
    return data


def damaged(path, error):
    """The UserError for a {split}.h5 that cannot be used; HDF5's own messages run over several lines."""
    return UserError(f"{path} is damaged, or not a file of pre_process.py ({' '.join(str(error).split())}): run "
                     f"pre_process.py --overwrite")


def check_attributes(path, attributes, expected):
    """Raise UserError, naming the file and both values, where an attribute is not as expected."""
    if what := difference(attributes, expected):
        raise UserError(f"{path} was made with {what}: run pre_process.py --overwrite with the settings of this "
                        f"run, or point --data_dir at the data that belongs to it")


def difference(attributes, expected):
    """The first attribute that is not as expected, in words that follow "made with"; None where all are."""
    for name, value in expected.items():
        found = " ".join(str(attributes.get(name)).split())
        if found != str(value):
            return {"word_map_digest": "another word map", "source": "other annotations",
                    "encoder_digest": "other encoder weights", "images_digest": "other pictures"}.get(
                name, f"{name} {found}, not {value}")


class BatchSampler(Sampler):
    """Row numbers of one epoch in global batches, of which each process takes its share.

    Training shuffles by (seed, epoch) and leaves out the last, incomplete batch; so the global batches do not depend
    on the number of processes; `first` batches of an epoch that is gone on with are left out. Evaluation goes through
    all rows once, in order, none twice.

    Args:
        n (int): rows. batch_size (int): pictures in a global batch. shuffle (bool): training.
        seed, rank, world_size (int).
    """

    def __init__(self, n, batch_size, shuffle, seed=0, rank=0, world_size=1):
        self.n, self.batch_size, self.shuffle, self.seed = n, max(min(batch_size, n), 1), shuffle, seed
        self.rank, self.world_size, self.epoch, self.first = rank, world_size, 0, 0
        if shuffle and self.batch_size < world_size:
            raise UserError(f"a batch of {self.batch_size} pictures cannot be shared by {world_size} processes")

    def starts(self):
        """Where this process's batches begin. Returns: range."""
        if self.shuffle:
            return range(0, self.n - self.batch_size + 1, self.batch_size)
        return range(self.rank * self.batch_size, self.n, self.world_size * self.batch_size)

    def __len__(self):
        return len(self.starts())

    def __iter__(self):
        if self.shuffle:
            order = torch.randperm(self.n, generator=torch.Generator().manual_seed(self.seed * 100_003 + self.epoch))
            for start in self.starts()[self.first:]:
                yield order[start:start + self.batch_size][self.rank::self.world_size].tolist()
        else:
            for start in self.starts():
                yield list(range(start, min(start + self.batch_size, self.n)))


def make_loader(dataset, config, shuffle, rank=0, world_size=1):
    """Batches of a split, read by `config.workers` processes.

    Args:
        dataset (CaptionDataset), config (Config), shuffle (bool): training; rank, world_size (int).
    Returns:
        DataLoader of what CaptionDataset gives; its `sampler.epoch` chooses the permutation, `sampler.first` the batch
        to begin with.
    Raises:
        UserError: an empty split.
    """
    if not len(dataset):
        raise UserError(f"{dataset.path} holds no pictures")
    sampler = BatchSampler(len(dataset), config.batch_size, shuffle, config.seed, rank, world_size)
    return DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=config.workers,
                      pin_memory=config.device != "cpu" and torch.cuda.is_available(),
                      persistent_workers=config.workers > 0, worker_init_fn=leave_signals)


def leave_signals(worker):
    """Ctrl-C reaches all processes of a terminal, a batch system's SIGTERM all of a job; in those that read batches
    they mean nothing, the main one decides. A second SIGTERM is its own, for one that hangs.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


# ---------------------------------------------------------------------------------------------------------------------
# Kept features of a frozen encoder


def features_key(dataset, encoder, config):
    """What kept features depend on; a file of which any of it differs is not used.

    The pictures' digest is the one that pre_process.py took of all pixels while it packed them: as good as reading
    them all again, free, and the same after a run that changed the captions only.

    Args:
        dataset (CaptionDataset), encoder (Encoder), config (Config)
    Returns:
        dict: name -> str or int, the file's attributes.
    Raises:
        UserError: the pictures' digest is not known.
    """
    if dataset.images_digest is None:
        raise UserError(f"{dataset.path} says no digest of its pictures, by which --cache_features true knows them "
                        f"again: run pre_process.py --overwrite, or give --cache_features false")
    digest = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.cpu().numpy().tobytes())
    return dict(features_version=FEATURES_VERSION, encoder=config.encoder, encoder_digest=digest.hexdigest(),
                image_size=config.image_size, images_digest=dataset.images_digest)


def open_features(path, key, shape, mode="r"):
    """Open kept features and check them: fp16, contiguous, in this very file, of this key; all rows, if to be read.

    Args:
        path (Path). key (dict): of features_key. shape (tuple): (N, h, w, D). mode (str): "r", or "r+" to go on.
    Returns:
        h5py.File, which keeps other processes from writing; int: how many rows are worked out.
    Raises:
        ValueError: what is wrong, in words that follow the path. BlockingIOError: another process is writing it.
    """
    try:
        file, done = open_sealed(path, mode)
    except BlockingIOError:
        raise
    except OSError as error:
        raise ValueError(f"cannot be read ({' '.join(str(error).split())})") from None
    try:
        if what := difference(file.attrs, key):
            raise ValueError(f"was made with {what}")
        data = own_data(file, "features", np.float16)
        offset = data.id.get_offset()  # None where chunked
        if data.shape != shape or offset is None or offset + data.nbytes > path.stat().st_size:
            raise ValueError("has no proper 'features'")
        if not (done == shape[0] if mode == "r" else 0 <= done <= shape[0]):
            raise ValueError(f"holds {done} of {shape[0]} pictures")
    except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
        file.close()
        raise ValueError(str(error) if type(error) is ValueError else f"is damaged ({error})") from None
    return file, done


def start_features(path, key, shape):
    """Begin the file of kept features under a temporary name, or go on with what a killed run left of it.

    What lies at `path` with another key stays there until the new file is whole.

    Args:
        path (Path), key (dict), shape (tuple): see open_features.
    Returns:
        h5py.File to be given to write_features, or None where `path` is whole and of this key; int: rows done.
    Raises:
        UserError: not enough disk, not writable, or another run at work on it.
    """
    temporary, file, done = path.with_name(f"{path.name}.tmp"), None, 0
    try:
        if path.exists():
            try:
                open_features(path, key, shape)[0].close()
                return None, shape[0]
            except ValueError as error:
                print(f"{path} {error}: working out new features")
        if temporary.exists():
            try:
                file, done = open_features(temporary, key, shape, "r+")
            except ValueError as error:
                print(f"{temporary} {error}: beginning again")
                temporary.unlink()
        size = 2 * math.prod(shape)
        need_space(path.parent, size * (1 - done / shape[0]), f"for {path}")
        if file is None:
            with open(temporary, "xb") as raw:  # where a file so large cannot be, HDF5 would take the process with it
                raw.truncate(size)
            # The data set gets its place at once and is not written.
            places = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            places.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            places.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            with h5py.File(temporary, "w", userblock_size=USER_BLOCK) as file:
                file.attrs.update(key)
                begin = file.create_dataset("features", shape, np.float16, dcpl=places).id.get_offset()
            seal(temporary, begin, begin + size, 0)
            file, done = open_features(temporary, key, shape, "r+")
        return file, done
    except BlockingIOError:
        raise UserError(f"{temporary}: another run is writing these features; start again when it has") from None
    except (OSError, RuntimeError) as error:
        raise not_written(path, error) from None


def write_features(file, path, start, grid):
    """Write rows; those that are safely on the disk are counted as done, and when all are, the file gets its name.

    They go straight into their place in the file: HDF5 itself does not survive a disk that fills up.

    Args:
        file (h5py.File): of start_features. path (Path): its final name. start (int). grid: fp16 array (B, h, w, D).
    Raises:
        UserError: the disk is full, or the like; what is done is kept for the next run.
    """
    features, temporary = file["features"], file.filename
    begin, stop = features.id.get_offset(), start + len(grid)
    try:
        with open(temporary, "r+b") as raw:
            raw.seek(begin + start * grid[0].nbytes)
            raw.write(grid.tobytes())
            if start // SYNC_ROWS < stop // SYNC_ROWS or stop == len(features):
                raw.flush()
                os.fsync(raw.fileno())  # before the count, which must not outlive the rows
                seal(temporary, begin, begin + features.nbytes, stop)
        if stop == len(features):
            file.close()
            os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{not_written(path, error)}: what is done is kept, so start again when this is mended"
                        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# The disk


def need_space(folder, size, purpose):
    """Raise UserError unless the disk of `folder` has `size` bytes free, and a twentieth more."""
    free = shutil.disk_usage(folder).free
    if free < 1.05 * size:
        raise UserError(f"{folder} needs {1.05 * size / 2**30:.2f} GiB {purpose}, but its disk has "
                        f"{free / 2**30:.2f} GiB free: free some, or point --data_dir at another disk")


def not_written(path, error):
    """The UserError for a file that could not be written; HDF5 tells a full disk in its message only."""
    full = getattr(error, "errno", None) == errno.ENOSPC or f"errno = {errno.ENOSPC}" in str(error)
    return UserError(f"{path} could not be written ({'the disk is full' if full else ' '.join(str(error).split())})")


def write_text(path, text):
    """Write a small file whole or not at all. Raises: UserError where it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
