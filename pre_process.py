"""From AI Challenger's archives to data/WORDMAP.json and one HDF5 file per split.

    python pre_process.py                     # the archives in data/ -> data/{train,valid,test_a,test_b}.h5
    python pre_process.py --preset sample     # the same for data/sample/, after `python data/sample.py`
    python pre_process.py --overwrite         # do it again, for other settings or other annotations

At 256 pixels the training pictures of the full set take 41 GB, those of each other split 6 GB. Splits that are done are
left alone, so a second call returns at once. data/pre_process.json records counts and unreadable pictures.
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
from functools import partial
from pathlib import Path, PurePosixPath

from utils import UserError, alone, end_with_parent, need_space, replacing, run_script, write_text

import h5py
import numpy as np
from tqdm import tqdm

from config import get_config, parse_args
from datasets import (FORMAT_VERSION, JIEBA_VERSION, PICTURE_SUFFIXES, BadPicture, build_word_map, encode_caption,
                      load_word_map, normalise, open_split, read_image, tokenize, word_map_digest)

# split: archive or folder, its folder of pictures, its annotations
SPLITS = {
    "train": ("ai_challenger_caption_train_20170902", "caption_train_images_20170902",
              "caption_train_annotations_20170902.json"),
    "valid": ("ai_challenger_caption_validation_20170910", "caption_validation_images_20170910",
              "caption_validation_annotations_20170910.json"),
    "test_a": ("ai_challenger_caption_test_a_20180103", "caption_test_a_images_20180103",
               "caption_test_a_annotations_20180103.json"),
    "test_b": ("ai_challenger_caption_test_b_20180103", "caption_test_b_images_20180103",
               "caption_test_b_annotations_20180103.json"),
}
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
MANY_UNKNOWN = 0.2  # share of words outside the word map above which there is a warning
PIXELS_BEGIN = 4096  # bytes from the start of {split}.h5, after the header of an empty HDF5 file


def main():
    args = parse_args(__doc__, {"overwrite": dict(action="store_true", help="make everything again")})
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


def make_splits(pool, config, overwrite):
    """Make the word map and the data files that are not there yet, or, to `overwrite`, all."""
    data_dir = Path(config.data_dir)
    sources = find_sources(config, overwrite)
    for one, other in itertools.combinations(sources, 2):
        if shared := set(sources[one]["image_ids"]) & set(sources[other]["image_ids"]):
            print(f"warning: {one} and {other} share {len(shared)} file names, such as "
                  f"{min(shared)}: where they are the same pictures, take them out of one of the two")

    settings = dict(format_version=FORMAT_VERSION, image_size=config.image_size,
                    captions_per_image=config.captions_per_image, max_len=config.max_len,
                    min_word_freq=config.min_word_freq, jieba_version=JIEBA_VERSION)
    expected = {split: settings | source["attributes"] for split, source in sources.items()}
    done = [split for split in sources if not overwrite and (data_dir / f"{split}.h5").exists()]
    word_map = load_word_map(data_dir) if done else None
    check_done(config, done, expected, word_map)
    if len(done) == len(sources):
        print(f"Nothing to do: {', '.join(done)} in {data_dir} are up to date (--overwrite makes them again).")
        return

    if "train" not in done:
        tokens = tokenize_all(pool, sources["train"]["captions"], "train")
        word_map = build_word_map((words for captions in tokens for words in captions), config.min_word_freq)
        check_done(config, done, expected, word_map)
        write_text(data_dir / "WORDMAP.json", json.dumps(word_map, ensure_ascii=False))
    report_path = data_dir / "pre_process.json"
    report = dict(vocabulary=len(word_map), jieba_version=JIEBA_VERSION,
                  splits=read_report(report_path) if done else {})
    for split, source in sources.items():
        if split not in done:
            if split != "train":
                tokens = tokenize_all(pool, source["captions"], split)
            counts = write_split(pool, config, split, source, tokens, word_map, expected[split])
            report["splits"][split] = counts
            write_text(report_path, json.dumps(report, ensure_ascii=False, indent=1))
            print_counts(split, counts)
    print(f"Vocabulary: {len(word_map)} words (of at least {config.min_word_freq} occurrences, and 4 special tokens)\n"
          f"Wrote {data_dir}/WORDMAP.json, {', '.join(f'{split}.h5' for split in sources if split not in done)}; "
          f"counts and unreadable pictures: {report_path}")


# ---------------------------------------------------------------------------------------------------------------------
# Reading what was published


def find_sources(config, overwrite):
    """Find each split's folder, extracting its archive where only that is there, and read its annotations.

    Returns:
        dict: split -> dict of read_source; of one that is done and has neither, image_ids and no attributes.
    Raises:
        UserError: train or valid missing, an incomplete folder, a bad archive or annotations.
    """
    sources, data_dir = {}, Path(config.data_dir)
    missing = [split for split, (name, *_) in SPLITS.items()
               if not (data_dir / name).is_dir() and not (data_dir / f"{name}.zip").exists()]
    done = [split for split in missing if (data_dir / f"{split}.h5").exists()]
    for split in missing:
        root = data_dir / SPLITS[split][0]
        if split in done and not overwrite:
            continue
        if split in ("train", "valid", *done):
            raise UserError(f"neither {root}/ nor {root}.zip exists: data/README.md says where to get it, and "
                            f"`python data/sample.py` draws a small set to try with --preset sample")
        print(f"{split}: no {root.name}.zip, left out")
    for split, (name, images_name, annotations_name) in SPLITS.items():
        if split in done:
            with open_split(data_dir / f"{split}.h5", {}) as file:
                image_ids = file["image_ids"].asstr()[:].tolist()
            sources[split] = dict(image_ids=image_ids, attributes={})
        if split in missing:
            continue
        root, archive, is_required = data_dir / name, data_dir / f"{name}.zip", split in ("train", "valid")
        if not root.is_dir():
            extract_archive(archive, root)
        top = find_top(root, images_name)
        folder, annotations = top / images_name, top / annotations_name
        for path in (folder, annotations) if is_required else (folder,):
            if not path.exists():
                found = ", ".join(sorted(path.name for path in top.iterdir())[:3]) or "nothing"
                raise UserError(f"{path} does not exist; what {top}/ has is {found}. Move there what "
                                f"belongs there, or remove {root}/ and get {archive.name} again")
        sources[split] = read_source(folder, annotations, config, is_required)
    return sources


def find_top(root, images_name):
    """Where the pictures' folder is: `root`, or up to two folders below, where there are too many.

    Returns: Path; `root` where it is nowhere.
    """
    for depth in ("", "*/", "*/*/"):
        for path in sorted(root.glob(depth + images_name)):
            if "__MACOSX" not in path.parts:
                return path.parent
    return root


def extract_archive(archive, folder):
    """Extract a zip into `folder`, whole or not at all, and nothing anywhere else.

    A top folder of the archive's own name is dropped. Links, names that lead outside and decompression bombs are
    refused; macOS's own files are left out.

    Args:
        archive (Path), folder (Path)
    Raises:
        UserError: names the archive and what is wrong with it.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with open_archive(archive) as file:
            members = []
            for member in file.infolist():
                name = PurePosixPath(member.filename.replace("\\", "/"))
                if stat.S_ISLNK(member.external_attr >> 16) or ".." in name.parts or name.is_absolute() \
                        or ":" in member.filename:
                    raise UserError(f"{archive}: member {member.filename!r} points outside its folder; refused. "
                                    f"Get the archive from its publisher")
                is_encrypted = member.flag_bits & 1
                if is_encrypted or member.compress_type not in METHODS:
                    method = zipfile.compressor_names.get(member.compress_type, "an unknown method")
                    raise UserError(f"{archive} is packed with "
                                    f"{'a password' if is_encrypted else method}, which cannot be "
                                    f"undone here: extract it into {folder}/ with 7-Zip")
                parts = name.parts[1:] if name.parts[:1] == (folder.name,) else name.parts
                if parts and not member.is_dir() and not is_of_macos(name):
                    members.append((temporary.joinpath(*parts), member))
            if left_out := sum(is_of_macos(PurePosixPath(name)) for name in file.namelist()):
                print(f"{archive.name}: {left_out} files of macOS's own left out")
            size = sum(member.file_size for _, member in members)
            if size > 100 * archive.stat().st_size + 2**20:
                raise UserError(f"{archive} would unpack to {size / 2**30:.1f} GiB from "
                                f"{archive.stat().st_size / 2**30:.3f} GiB; refused as a decompression bomb")
            need_space(folder.parent, size, f"to extract {archive}")
            with tqdm(total=size, unit="B", unit_scale=True, desc=f"extract {archive.name}") as bar:
                for path, member in members:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with file.open(member) as source, open(path, "xb") as target:
                        shutil.copyfileobj(source, target, 2**20)
                    bar.update(member.file_size)
        temporary.mkdir(exist_ok=True)
        os.replace(temporary, folder)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{archive} could not be extracted into {folder} ({error})") from None
    except Exception as error:  # zipfile, zlib, lzma and struct each raise their own on a damaged archive
        raise UserError(f"{archive} is damaged or not whole ({error}): get it again") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_of_macos(path):
    """Whether a file (PurePath) is one that macOS adds: `._x.jpg` beside x.jpg is no picture."""
    return "__MACOSX" in path.parts or path.name == ".DS_Store" or path.name.startswith("._")


def open_archive(path):
    """Open a zip. Names that do not say that they are UTF-8 are in UTF-8 (macOS), in GBK (Windows
    in China) or, as the format has it, in code page 437. Returns: ZipFile.
    """
    with contextlib.suppress(UnicodeDecodeError):
        file = zipfile.ZipFile(path, metadata_encoding="utf-8")
        # 图片 in GBK is valid UTF-8 too, but of letters below U+0800, where no Chinese is.
        if max("".join(file.namelist()), default="") >= "\u0800":
            return file
    with contextlib.suppress(UnicodeDecodeError):
        return zipfile.ZipFile(path, metadata_encoding="gb18030")
    return zipfile.ZipFile(path)


def read_source(folder, annotations, config, is_annotated):
    """Read the annotations of one split: AI Challenger's list, COCO's object, or (a test split) none at all.

    Empty captions and those beyond captions_per_image are left out, and so are pictures without captions, unless no
    picture of a test split has any.

    Args:
        folder (Path): of pictures. annotations (Path). config (Config). is_annotated (bool): there must be captions.
    Returns:
        dict: folder (Path); image_ids (list of str): file names; captions (list of lists of str): per picture; empty,
        extra (int): captions left out; no_caption (int): pictures left out; attributes (dict): source, its sha256.
    Raises:
        UserError: names the file, the entry and what is wrong with it.
    """
    if annotations.exists():
        content = annotations.read_bytes()
        entries = parse_annotations(content, annotations)
    else:
        paths = list(folder.iterdir())
        names = sorted(path.name for path in paths
                       if path.suffix.lower() in PICTURE_SUFFIXES and not is_of_macos(path))
        if len(paths) > len(names):
            others = len(paths) - len(names)
            print(f"{folder}: {others} files left out, by their names no pictures")
        entries = {name: [] for name in names}
        for name in names:
            if not is_file_name(name):
                raise UserError(f"{folder}: the name of {name!r} is not UTF-8; rename or remove it")
        content = "\n".join(names).encode()
    source = dict(folder=folder, image_ids=[], captions=[], empty=0, extra=0, no_caption=0,
                  attributes=dict(source=hashlib.sha256(content).hexdigest()))
    is_annotated = is_annotated or any(entries.values())
    for image_id, captions in entries.items():
        # HDF5 strings end at NUL, and half of a surrogate pair (a broken emoji) cannot be encoded.
        captions = [caption.replace("\0", "").encode("utf-8", "ignore").decode().strip() for caption in captions]
        filled = [caption for caption in captions if normalise(caption)]
        source["empty"] += len(captions) - len(filled)
        source["extra"] += max(len(filled) - config.captions_per_image, 0)
        if filled or not is_annotated:
            source["image_ids"].append(image_id)
            source["captions"].append(filled[:config.captions_per_image])
        else:
            source["no_caption"] += 1
    if not source["image_ids"]:
        raise UserError(f"{annotations if annotations.exists() else folder} lists no pictures"
                        + (" with captions" if entries else ""))
    return source


def parse_annotations(content, path):
    """Check the JSON of an annotation file, in AI Challenger's form or COCO's.

    Args:
        content (bytes): of the file. path (Path): for messages.
    Returns:
        dict: picture's file name -> list of str, in the file's order.
    Raises:
        UserError: not JSON, not of either form, a name with a folder in it, a picture listed twice.
    """
    def check(condition, what):
        if not condition:
            raise UserError(f"{path}: {what}; expected AI Challenger's list of "
                            '{"url", "image_id": "NAME.jpg", "caption": [...]} (data/README.md)')

    try:
        entries = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): correct it, or get it again") from None
    if isinstance(entries, dict):  # COCO's, turned into AI Challenger's
        images, annotations = entries.get("images"), entries.get("annotations", [])
        check(isinstance(images, list) and isinstance(annotations, list), "neither a list nor COCO's object of lists")
        captions = {}
        for number, image in enumerate(images):
            check(isinstance(image, dict) and isinstance(image.get("id"), (int, str)), f"images[{number}] lacks 'id'")
            check(image["id"] not in captions, f"images[{number}] repeats id {image['id']!r}")
            captions[image["id"]] = []
        for number, annotation in enumerate(annotations):
            check(isinstance(annotation, dict) and isinstance(annotation.get("image_id"), (int, str))
                  and annotation["image_id"] in captions, f"annotations[{number}] names no picture of 'images'")
            captions[annotation["image_id"]].append(annotation.get("caption"))
        entries = [dict(image_id=image.get("file_name"), caption=captions[image["id"]]) for image in images]
    check(isinstance(entries, list), "not a list")
    found = {}
    for number, entry in enumerate(entries):
        check(isinstance(entry, dict), f"entry {number} is not an object")
        name, captions = entry.get("image_id"), entry.get("caption")
        check(isinstance(name, str) and is_file_name(name), f"entry {number}: {name!r} is not a picture's file name")
        check(isinstance(captions, list) and all(isinstance(text, str) for text in captions),
              f"entry {number}, {name}: 'caption' is not a list of sentences")
        check(name not in found, f"entry {number} lists {name!r} a second time")
        found[name] = captions
    return found


def is_file_name(name):
    """Whether a file of this folder, and of no other, can have this name, in UTF-8."""
    try:
        return 0 < len(name.encode()) < 256 and name not in (".", "..") and not set(name) & set("/\\\0")
    except UnicodeEncodeError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Writing what is trained from


def check_done(config, done, expected, word_map):
    """Raise UserError where a split that is done was made otherwise: only --overwrite replaces it.

    Args: config (Config). done (list of str). expected (dict): split -> attributes. word_map (dict).
    """
    for split in done:
        wanted = dict(expected[split], word_map_digest=word_map_digest(word_map))
        with open_split(Path(config.data_dir) / f"{split}.h5", wanted):
            pass


def read_report(path):
    """What pre_process.json says of the splits that are done. Returns: dict, split -> dict of counts."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["splits"])
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error!r}): remove it, or make everything again with --overwrite"
                        ) from None


def tokenize_all(pool, captions, split):
    """Tokenize each picture's captions, in all processes of the pool. Returns: list of lists of lists of str."""
    chunks = [captions[i:i + 256] for i in range(0, len(captions), 256)]
    tokens = []
    with tqdm(total=len(captions), desc=f"{split}: tokenize", unit="picture") as bar:
        for chunk in ordered_map(pool, tokenize_chunk, chunks):
            # Interned, each word is one object: a million captions fit into memory.
            tokens += [[[sys.intern(word) for word in words] for words in picture] for picture in chunk]
            bar.update(len(chunk))
    return tokens


def tokenize_chunk(chunk):
    return [[tokenize(caption) for caption in captions] for captions in chunk]


def write_split(pool, config, split, source, tokens, word_map, attributes):
    """Decode, resize and pack the pictures of one split with their captions into {split}.h5.

    Args:
        pool (ProcessPoolExecutor). config (Config). split (str). source (dict): of read_source.
        tokens (list of lists of lists of str): of each picture's captions. word_map (dict).
        attributes (dict): what check_done compares.
    Returns:
        dict: counts, and the unreadable pictures with their reasons.
    Raises:
        UserError: too many unreadable pictures, or not enough disk space.
    """
    path = Path(config.data_dir) / f"{split}.h5"
    side, n, k = config.image_size, len(source["image_ids"]), config.captions_per_image
    text = sum(len(text.encode()) for texts in [source["image_ids"], *source["captions"]] for text in texts)
    room = n * (k * (4 * config.max_len + 100) + 100) + 2 * text + 2**16  # for all but the pixels, with HDF5's overhead
    size = n * side * side * 3 + room

    bad, good, digest = [], [], hashlib.sha256()
    paths = [source["folder"] / image_id for image_id in source["image_ids"]]
    chunks = [paths[i:i + 8] for i in range(0, n, 8)]
    with replacing(path, size) as temporary:
        need_space(path.parent, size, f"for {path}")
        # HDF5 crashes where the disk is full when it flushes its buffers. So the pixels are written without it, and
        # after them zeros that reserve all the space it will need.
        h5py.File(temporary, "w").close()
        with open(temporary, "r+b") as file:
            file.seek(PIXELS_BEGIN)
            images = itertools.chain.from_iterable(ordered_map(pool, partial(read_chunk, image_size=side), chunks))
            for i, image in enumerate(tqdm(images, f"{split}: pictures", n, unit="picture")):
                if isinstance(image, str):
                    bad.append({"image_id": source["image_ids"][i], "reason": image})
                    tqdm.write(f"unreadable picture: {image}", file=sys.stderr)
                    if len(bad) > config.max_bad_images * n:
                        raise UserError(f"{len(bad)} of the first {i + 1} of {n} pictures in {source['folder']} are "
                                        f"unreadable, the last one {image}; replace or remove them, or leave them "
                                        f"out with --max_bad_images 1")
                else:
                    file.write(image)
                    digest.update(image)
                    good.append(i)
            if not good:
                raise UserError(f"no readable picture in {source['folder']}")
            file.write(bytes(room))
        where = h5py.h5p.create(h5py.h5p.DATASET_CREATE)  # at PIXELS_BEGIN, and nothing is written there
        where.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        where.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        with h5py.File(temporary, "r+", alignment_threshold=side * side * 3, alignment_interval=PIXELS_BEGIN) as file:
            images = file.create_dataset("images", (len(good), side, side, 3), np.uint8, dcpl=where)
            assert images.id.get_offset() == PIXELS_BEGIN
            counts = write_captions(file, config, [source["image_ids"][i] for i in good],
                                    [source["captions"][i] for i in good], [tokens[i] for i in good], word_map)
            file.attrs.update(attributes, split=split, word_map_digest=word_map_digest(word_map),
                              images_digest=digest.hexdigest())
    return dict(pictures=len(good), bad_pictures=bad, pictures_without_caption=source["no_caption"], **counts,
                empty_captions=source["empty"], extra_captions=source["extra"])


def write_captions(file, config, image_ids, captions, tokens, word_map):
    """Write ids, lengths, file names and text. Returns: dict of counts."""
    n, k = len(image_ids), config.captions_per_image
    ids = np.zeros((n, k, config.max_len + 2), np.int32)
    lengths = np.zeros((n, k), np.int32)
    raw = np.full((n, k), "", object)
    for i in range(n):
        for j, words in enumerate(tokens[i]):
            ids[i, j], lengths[i, j] = encode_caption(words, word_map, config.max_len)
            raw[i, j] = captions[i][j]
    file["captions"], file["caption_lengths"] = ids, lengths
    file.create_dataset("image_ids", data=image_ids, dtype=h5py.string_dtype())
    file.create_dataset("raw_captions", data=raw, dtype=h5py.string_dtype())
    words = [len(words) for picture in tokens for words in picture]
    unknown = sum(word not in word_map for picture in tokens for words in picture for word in words)
    return dict(captions=len(words), words=sum(words), unknown_word_rate=unknown / max(sum(words), 1),
                longest_caption=max(words, default=0), cut_captions=sum(length > config.max_len for length in words),
                pictures_with_fewer_captions=sum(len(picture) < k for picture in captions))


def read_chunk(paths, image_size):
    """read_image of each. Returns: list of uint8 (image_size, image_size, 3), or str: why one is unreadable."""
    images = []
    for path in paths:
        try:
            images.append(read_image(path, image_size))
        except BadPicture as error:
            images.append(str(error))
    return images


def ordered_map(pool, function, items):
    """pool.map only a few items ahead of its reader, so that a slow disk does not fill the memory with pictures."""
    pending, window = collections.deque(), 4 * os.cpu_count()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= window:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process was killed, probably out of memory: close other programs and run this again; "
                        "splits that are done are kept") from None


def print_counts(split, counts):
    rate = counts["unknown_word_rate"]
    print(f"{split}: {counts['pictures']} pictures, {len(counts['bad_pictures'])} unreadable, "
          f"{counts['pictures_without_caption']} without caption; {counts['captions']} captions "
          f"({counts['empty_captions']} empty and {counts['extra_captions']} extra ones left out, "
          f"{counts['cut_captions']} cut at max_len, longest {counts['longest_caption']} words); "
          f"{rate:.2%} unknown words")
    if rate > MANY_UNKNOWN:
        print(f"warning: {rate:.0%} of the words of {split} are too rare in train for the word map; with few captions, "
              f"give --min_word_freq 1")


if __name__ == "__main__":
    run_script(main)
