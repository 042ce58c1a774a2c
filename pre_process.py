"""From AI Challenger's archives to data/WORDMAP.json and one HDF5 file per split.

    python pre_process.py                    # archives in data/ -> data/{train,valid,...}.h5
    python pre_process.py --preset sample    # the same in data/sample/, after data/sample.py
    python pre_process.py --overwrite        # again, for other settings or other annotations

jieba segments a caption into words. Those of the training captions that are not too rare become the
word map, and every caption a row of numbers: <start>, its words, <end>. A picture becomes a square
of uint8 RGB. Left out are pictures that cannot be read or have no caption, empty captions, and
those beyond captions_per_image.

At 256 pixels the training pictures of the full set take 41 GB, those of each other split 6 GB.
Splits that are done are left alone, so a second call returns at once. data/pre_process.json records
counts and unreadable pictures.
"""
import collections
import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import stat
import sys
import zipfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath, PurePosixPath

from utils import UserError, alone, end_with_parent, need_space, replacing, run_script, write_text

import h5py
import numpy as np
from tqdm import tqdm

from config import Config, get_config, parse_args
from datasets import (FORMAT_VERSION, JIEBA_VERSION, BadPicture, build_word_map, encode_caption,
                      is_picture_name, load_word_map, normalise, open_split, read_image, tokenize,
                      word_map_digest)

# split: archive or folder, its folder of pictures, its annotations
SPLITS = {
    split: (f"ai_challenger_caption_{name}_{date}", f"caption_{name}_images_{date}",
            f"caption_{name}_annotations_{date}.json")
    for split, name, date in (("train", "train", "20170902"), ("valid", "validation", "20170910"),
                              ("test_a", "test_a", "20180103"), ("test_b", "test_b", "20180103"))
}
REQUIRED = {"train", "valid"}
MANY_UNKNOWN = 0.2  # share of words outside the word map above which there is a warning
PIXELS_BEGIN = 4096  # bytes from the start of {split}.h5, after the header of an empty HDF5 file

Tokens = dict[str, list[list[str]]]  # of each picture's captions, by its file name


@dataclass
class Source:
    """The pictures of one split and their captions, as published."""
    folder: Path | None  # None where the split is done and its source is gone
    captions: dict[str, list[str]]  # of each picture, by its file name
    digest: str = ""  # sha256 of the annotations
    empty: int = 0  # captions left out, as are these:
    extra: int = 0
    no_caption: int = 0  # pictures left out


def main():
    overwrite = dict(action="store_true", help="make everything again")
    args = parse_args(__doc__, {"overwrite": overwrite})
    config = get_config(args.preset, args.flags)
    data_dir = Path(config.data_dir)
    if not data_dir.is_dir():
        raise UserError(f"{data_dir} does not exist: put the archives there (data/README.md), or "
                        f"name another --data_dir")
    # So that what is half-written, which may fill the disk, is removed as it is after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with (alone(data_dir / "pre_process.lock", "--data_dir"),
          ProcessPoolExecutor(initializer=end_with_parent) as pool):
        make_splits(pool, config, args.overwrite)


def make_splits(pool: ProcessPoolExecutor, config: Config, overwrite: bool):
    """Make the word map and the data files that are not there yet, or, to `overwrite`, all."""
    data_dir = Path(config.data_dir)
    sources = find_sources(config, overwrite)
    warn_of_shared_pictures(sources)

    done = [split for split in sources if not overwrite and (data_dir / f"{split}.h5").exists()]
    todo = [split for split in sources if split not in done]
    word_map = load_word_map(data_dir) if done else {}
    check_done(config, done, sources, word_map)
    if not todo:
        print(f"Nothing to do: {', '.join(done)} in {data_dir} are up to date (--overwrite makes "
              f"them again).")
        return

    if "train" in todo:
        tokens = tokenize_all(pool, "train", sources["train"])
        sentences = (words for picture in tokens.values() for words in picture)
        word_map = build_word_map(sentences, config.min_word_freq)
        check_done(config, done, sources, word_map)
        write_text(data_dir / "WORDMAP.json", json.dumps(word_map, ensure_ascii=False))

    report_path = data_dir / "pre_process.json"
    report = dict(vocabulary=len(word_map), jieba_version=JIEBA_VERSION,
                  splits=read_report(report_path) if done else {})
    for split in todo:
        if split != "train":
            tokens = tokenize_all(pool, split, sources[split])
        counts = write_split(pool, config, split, sources[split], tokens, word_map)
        report["splits"][split] = counts
        write_text(report_path, json.dumps(report, ensure_ascii=False, indent=1))
        print_counts(split, counts)
    print(f"Vocabulary: {len(word_map)} words (of at least {config.min_word_freq} occurrences, and "
          f"4 special tokens)\n"
          f"Wrote {data_dir}/WORDMAP.json, {', '.join(f'{split}.h5' for split in todo)}; counts "
          f"and unreadable pictures: {report_path}")


# --------------------------------------------------------------------------------------------------
# Captions into numbers, pictures into pixels


def tokenize_all(pool: ProcessPoolExecutor, split: str, source: Source) -> Tokens:
    segmented = in_all_processes(pool, tokenize_picture, list(source.captions.values()), 256)
    bar = tqdm(segmented, f"{split}: tokenize", len(source.captions), unit="picture")
    tokens = {}
    for picture, image_id in zip(bar, source.captions):
        # Interned, each word is one object: a million captions fit into memory.
        tokens[image_id] = [[sys.intern(word) for word in words] for words in picture]
    return tokens


def tokenize_picture(captions):
    return [tokenize(caption) for caption in captions]


def write_split(pool: ProcessPoolExecutor, config: Config, split: str, source: Source,
                tokens: Tokens, word_map: dict[str, int]) -> dict:
    """Pack the pictures of one split with their captions into {split}.h5, whole or not at all.

    Returns what pre_process.json says of it. Raises UserError where too many pictures are
    unreadable, or the disk has too little space.
    """
    path = Path(config.data_dir) / f"{split}.h5"
    room = room_for_captions(config, source)
    size = len(source.captions) * config.image_size**2 * 3 + room
    with replacing(path, size) as temporary:
        need_space(path.parent, size, f"for {path}")
        unreadable, digest = write_pixels(pool, config, split, source, temporary, room)
        captions = {image_id: texts for image_id, texts in source.captions.items()
                    if image_id not in unreadable}
        attributes = attributes_of(config, source, word_map)
        with h5py.File(temporary, "r+", alignment_threshold=config.image_size**2 * 3,
                       alignment_interval=PIXELS_BEGIN) as file:
            name_pixels(file, (len(captions), config.image_size, config.image_size, 3))
            counts = write_captions(file, config, captions, tokens, word_map)
            file.attrs.update(attributes, split=split, images_digest=digest)
    bad = [dict(image_id=image_id, reason=reason) for image_id, reason in unreadable.items()]
    return dict(pictures=len(captions), bad_pictures=bad,
                pictures_without_caption=source.no_caption, **counts,
                empty_captions=source.empty, extra_captions=source.extra)


def write_pixels(pool, config, split, source, path, room):
    """Write all readable pictures, one after the other.

    HDF5 crashes where the disk is full when it flushes its buffers. So the pixels are written
    without it, and after them `room` zeros, which reserve all the space that it will need.

    Returns why pictures are unreadable, by file name, and the sha256 of all pixels.
    """
    paths = [source.folder / image_id for image_id in source.captions]
    images = in_all_processes(pool, partial(read_picture, image_size=config.image_size), paths, 8)
    bar = tqdm(images, f"{split}: pictures", len(paths), unit="picture")
    unreadable = {}
    digest = hashlib.sha256()
    h5py.File(path, "w").close()
    with open(path, "r+b") as file:
        file.seek(PIXELS_BEGIN)
        for number, (image, image_id) in enumerate(zip(bar, source.captions), 1):
            if isinstance(image, np.ndarray):
                file.write(image)
                digest.update(image)
                continue
            unreadable[image_id] = image
            tqdm.write(f"unreadable picture: {image}", file=sys.stderr)
            if len(unreadable) > config.max_bad_images * len(paths):
                raise UserError(f"{len(unreadable)} of the first {number} of {len(paths)} pictures "
                                f"in {source.folder} are unreadable, the last one {image}; replace "
                                f"or remove them, or leave them out with --max_bad_images 1")
        if len(unreadable) == len(paths):
            raise UserError(f"no readable picture in {source.folder}")
        file.write(bytes(room))
    return unreadable, digest.hexdigest()


def read_picture(path, image_size):
    """The pixels, uint8 (image_size, image_size, 3), or, as str, why they cannot be read."""
    try:
        return read_image(path, image_size)
    except BadPicture as error:
        return str(error)


def name_pixels(file, shape):
    """Give the pixels that are in the file already their name, `images`."""
    where = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    where.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    where.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    images = file.create_dataset("images", shape, np.uint8, dcpl=where)
    assert images.id.get_offset() == PIXELS_BEGIN


def write_captions(file, config, captions, tokens, word_map):
    """Write ids, lengths, file names and text of the pictures in `captions`. Returns counts."""
    n, k = len(captions), config.captions_per_image
    ids = np.zeros((n, k, config.max_len + 2), np.int32)
    lengths = np.zeros((n, k), np.int32)
    raw = np.full((n, k), "", object)
    for i, image_id in enumerate(captions):
        for j, words in enumerate(tokens[image_id]):
            ids[i, j], lengths[i, j] = encode_caption(words, word_map, config.max_len)
            raw[i, j] = captions[image_id][j]
    file["captions"] = ids
    file["caption_lengths"] = lengths
    file.create_dataset("image_ids", data=list(captions), dtype=h5py.string_dtype())
    file.create_dataset("raw_captions", data=raw, dtype=h5py.string_dtype())

    sentences = [words for image_id in captions for words in tokens[image_id]]
    sizes = [len(words) for words in sentences]
    unknown = sum(word not in word_map for words in sentences for word in words)
    return dict(captions=len(sentences), words=sum(sizes),
                unknown_word_rate=unknown / max(sum(sizes), 1),
                longest_caption=max(sizes, default=0),
                cut_captions=sum(size > config.max_len for size in sizes),
                pictures_with_fewer_captions=sum(len(texts) < k for texts in captions.values()))


def room_for_captions(config, source):
    """Bytes of a data file for all but the pixels, with HDF5's overhead."""
    text = len(repr(source.captions).encode())
    numbers = config.captions_per_image * (4 * config.max_len + 100)
    return len(source.captions) * (numbers + 100) + 2 * text + 2**16


def print_counts(split, counts):
    rate = counts["unknown_word_rate"]
    print(f"{split}: {counts['pictures']} pictures, {len(counts['bad_pictures'])} unreadable, "
          f"{counts['pictures_without_caption']} without caption; {counts['captions']} captions "
          f"({counts['empty_captions']} empty and {counts['extra_captions']} extra ones left out, "
          f"{counts['cut_captions']} cut at max_len, longest {counts['longest_caption']} words); "
          f"{rate:.2%} unknown words")
    if rate > MANY_UNKNOWN:
        print(f"warning: {rate:.0%} of the words of {split} are too rare in train for the word "
              f"map; with few captions, give --min_word_freq 1")


# --------------------------------------------------------------------------------------------------
# Reading what was published


def find_sources(config: Config, overwrite: bool) -> dict[str, Source]:
    """Read each split's annotations, after extracting its archive where only that is there; of a
    split that is done and whose source is gone, only the file names.
    """
    data_dir = Path(config.data_dir)
    published, gone = [], []
    for split, (name, *_) in SPLITS.items():
        root = data_dir / name
        is_done = (data_dir / f"{split}.h5").exists()
        if root.is_dir() or root.with_suffix(".zip").exists():
            published.append(split)
        elif is_done and not overwrite:
            gone.append(split)
        elif is_done or split in REQUIRED:
            raise UserError(f"neither {root}/ nor {root}.zip exists: data/README.md says where to "
                            f"get it, and `python data/sample.py` draws a small set to try with "
                            f"--preset sample")
        else:
            print(f"{split}: no {name}.zip, left out")

    sources = {}
    for split in SPLITS:
        if split in published:
            sources[split] = read_source(*find_split(data_dir, split), config, split in REQUIRED)
        elif split in gone:
            with open_split(data_dir / f"{split}.h5", {}) as file:
                image_ids = file["image_ids"].asstr()[:]
            sources[split] = Source(None, {image_id: [] for image_id in image_ids})
    return sources


def find_split(data_dir, split):
    """The folder of a split's pictures, and its annotations: at the top, or up to two folders too
    many below it.
    """
    name, images_name, annotations_name = SPLITS[split]
    root = data_dir / name
    archive = root.with_suffix(".zip")
    if not root.is_dir():
        extract_archive(archive, root)
    found = [path.parent for depth in ("", "*/", "*/*/")
             for path in sorted(root.glob(depth + images_name))
             if "__MACOSX" not in path.parts]
    top = found[0] if found else root
    folder, annotations = top / images_name, top / annotations_name
    for path in (folder, annotations) if split in REQUIRED else (folder,):
        if not path.exists():
            others = ", ".join(sorted(path.name for path in top.iterdir())[:3]) or "nothing"
            raise UserError(f"{path} does not exist; what {top}/ has is {others}. Move there what "
                            f"belongs there, or remove {root}/ and get {archive.name} again")
    return folder, annotations


def read_source(folder: Path, annotations: Path, config: Config, is_annotated: bool) -> Source:
    """Read the annotations of one split, or, where a test split has none, list its pictures.

    Pictures without captions are left out, unless none has any and `is_annotated` is false.
    """
    if annotations.exists():
        content = annotations.read_bytes()
        entries = parse_annotations(content, annotations)
    else:
        entries = {name: [] for name in list_pictures(folder)}
        content = "\n".join(entries).encode()
    source = Source(folder, {}, hashlib.sha256(content).hexdigest())
    is_annotated = is_annotated or any(entries.values())
    for image_id, captions in entries.items():
        # HDF5 strings end at NUL, and half of a surrogate pair (a broken emoji) cannot be encoded.
        captions = [caption.replace("\0", "").encode("utf-8", "ignore").decode().strip()
                    for caption in captions]
        filled = [caption for caption in captions if normalise(caption)]
        source.empty += len(captions) - len(filled)
        source.extra += max(len(filled) - config.captions_per_image, 0)
        if filled or not is_annotated:
            source.captions[image_id] = filled[:config.captions_per_image]
        else:
            source.no_caption += 1
    if not source.captions:
        raise UserError(f"{annotations if annotations.exists() else folder} lists no pictures"
                        + (" with captions" if entries else ""))
    return source


def list_pictures(folder):
    paths = list(folder.iterdir())
    names = sorted(path.name for path in paths if is_picture_name(path)
                   and is_file_name(path.name) and not is_of_macos(path))
    if others := len(paths) - len(names):
        print(f"{folder}: {others} files left out, by their names no pictures")
    return names


def parse_annotations(content: bytes, path: Path) -> dict[str, list[str]]:
    """The captions by picture's file name, of annotations in AI Challenger's form or COCO's."""
    try:
        entries = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): correct it, or get it again"
                        ) from None
    try:
        return captions_of(entries_of_coco(entries) if isinstance(entries, dict) else entries)
    except ValueError as error:
        raise UserError(f"{path}: {error}; expected AI Challenger's list of "
                        '{"url", "image_id": "NAME.jpg", "caption": [...]} (data/README.md)'
                        ) from None


def captions_of(entries):
    if not isinstance(entries, list):
        raise ValueError("not a list")
    captions = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"entry {number} is not an object")
        name, texts = entry.get("image_id"), entry.get("caption")
        if not isinstance(name, str) or not is_file_name(name):
            raise ValueError(f"entry {number}: {name!r} is not a picture's file name")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"entry {number}, {name}: 'caption' is not a list of sentences")
        if name in captions:
            raise ValueError(f"entry {number} lists {name!r} a second time")
        captions[name] = texts
    return captions


def entries_of_coco(content):
    """COCO's object as AI Challenger's list."""
    try:
        images = content["images"]
        captions = {image["id"]: [] for image in images}
        for annotation in content.get("annotations", []):
            captions[annotation["image_id"]].append(annotation["caption"])
        if len(captions) < len(images):
            raise ValueError("two of COCO's images have one id")
        return [dict(image_id=image["file_name"], caption=captions[image["id"]])
                for image in images]
    except (KeyError, TypeError) as error:
        raise ValueError(f"neither a list nor COCO's object ({error!r})") from None


def is_file_name(name: str) -> bool:
    """Whether a file of this folder, and of no other, can have this name, in UTF-8."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return False
    return 0 < size < 256 and name not in (".", "..") and not set(name) & set("/\\\0")


def is_of_macos(path: PurePath) -> bool:
    """Whether a file is one that macOS adds: `._x.jpg` beside x.jpg is no picture."""
    return "__MACOSX" in path.parts or path.name == ".DS_Store" or path.name.startswith("._")


# --------------------------------------------------------------------------------------------------
# What makes it safe: archives of strangers, files of an earlier call, processes that die


def extract_archive(archive: Path, folder: Path):
    """Extract a zip into `folder`, whole or not at all, and nothing anywhere else.

    A top folder of the archive's own name is dropped, and macOS's own files are left out.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with open_archive(archive) as file:
            extract_members(file, archive, folder, temporary)
        temporary.mkdir(exist_ok=True)
        os.replace(temporary, folder)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{archive} could not be extracted into {folder} ({error})") from None
    except RuntimeError as error:
        raise UserError(f"{archive} is packed with a password, or with a method that cannot be "
                        f"undone here, such as deflate64 ({error}): extract it into {folder}/ with "
                        f"7-Zip") from None
    except Exception as error:  # zipfile, zlib, lzma and struct each raise their own on damage
        raise UserError(f"{archive} is damaged or not whole ({error}): get it again") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_archive(path):
    """Open a zip, whose names are, if they do not say that they are UTF-8, in UTF-8 (macOS), GBK
    (Windows in China) or, as the format has it, code page 437.
    """
    with contextlib.suppress(UnicodeDecodeError):
        file = zipfile.ZipFile(path, metadata_encoding="utf-8")
        # 图片 in GBK is valid UTF-8 too, but of letters below U+0800, where no Chinese is.
        if max("".join(file.namelist()), default="") >= "\u0800":
            return file
    with contextlib.suppress(UnicodeDecodeError):
        return zipfile.ZipFile(path, metadata_encoding="gb18030")
    return zipfile.ZipFile(path)


def extract_members(file, archive, folder, temporary):
    members, left_out = [], 0
    for member in file.infolist():
        name = PurePosixPath(member.filename.replace("\\", "/"))
        is_link = stat.S_ISLNK(member.external_attr >> 16)
        if is_link or ".." in name.parts or name.is_absolute() or ":" in member.filename:
            raise UserError(f"{archive}: member {member.filename!r} points outside its folder; "
                            f"refused. Get the archive from its publisher")
        parts = name.parts[1:] if name.parts[:1] == (folder.name,) else name.parts
        if is_of_macos(name):
            left_out += 1
        elif parts and not member.is_dir():
            members.append((temporary.joinpath(*parts), member))
    if left_out:
        print(f"{archive.name}: {left_out} files of macOS's own left out")

    size, packed = sum(member.file_size for _, member in members), archive.stat().st_size
    if size > 100 * packed + 2**20:
        raise UserError(f"{archive} would unpack to {size / 2**30:.1f} GiB from "
                        f"{packed / 2**30:.3f} GiB; refused as a decompression bomb")
    need_space(folder.parent, size, f"to extract {archive}")
    with tqdm(total=size, unit="B", unit_scale=True, desc=f"extract {archive.name}") as bar:
        for path, member in members:
            path.parent.mkdir(parents=True, exist_ok=True)
            with file.open(member) as source, open(path, "xb") as target:
                shutil.copyfileobj(source, target, 2**20)
            bar.update(member.file_size)


def warn_of_shared_pictures(sources):
    for one, other in itertools.combinations(sources, 2):
        if shared := sources[one].captions.keys() & sources[other].captions.keys():
            print(f"warning: {one} and {other} share {len(shared)} file names, such as "
                  f"{min(shared)}: where they are the same pictures, take them out of one of the "
                  f"two")


def check_done(config, done, sources, word_map):
    """Raise UserError where a split that is done was made otherwise."""
    for split in done:
        expected = attributes_of(config, sources[split], word_map)
        with open_split(Path(config.data_dir) / f"{split}.h5", expected):
            pass


def attributes_of(config, source, word_map):
    """What a data file is made from; the annotations count as long as they are there."""
    attributes = dict(format_version=FORMAT_VERSION, image_size=config.image_size,
                      captions_per_image=config.captions_per_image, max_len=config.max_len,
                      min_word_freq=config.min_word_freq, jieba_version=JIEBA_VERSION)
    if source.digest:
        attributes["source"] = source.digest
    return dict(attributes, word_map_digest=word_map_digest(word_map))


def read_report(path):
    """The counts of the splits that are done, which nothing depends on."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def in_all_processes(pool, function, items, size):
    """pool.map in chunks, only a few of them ahead of the reader, so that a slow disk does not fill
    the memory with pictures.
    """
    pending = collections.deque()
    try:
        for start in range(0, len(items), size):
            pending.append(pool.submit(map_chunk, function, items[start:start + size]))
            if len(pending) == 4 * os.cpu_count():
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process was killed, probably out of memory: close other programs "
                        "and run this again; splits that are done are kept") from None


def map_chunk(function, chunk):
    return [function(item) for item in chunk]


if __name__ == "__main__":
    run_script(main)
