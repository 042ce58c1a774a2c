"""From AI Challenger's archives to data/WORDMAP.json and one HDF5 file a split.

    python pre_process.py                     # the archives in data/ -> data/{train,valid,test_a,test_b}.h5
    python pre_process.py --preset sample     # the same for data/sample/, after `python data/sample.py`
    python pre_process.py --overwrite         # do it again, for other settings or other annotations

The full set takes 41 GB for the training pictures at 256 pixels and 6 GB for each other split. What is already done
is left alone, so a second call returns at once. data/pre_process.json records what was found.
"""
import collections
import hashlib
import io
import itertools
import json
import os
import shutil
import stat
import sys
import zipfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path, PurePosixPath

import h5py
import numpy as np
from tqdm import tqdm

from config import UserError, get_config, parse_args, replacing, run
from datasets import (FORMAT_VERSION, JIEBA_VERSION, PICTURE_SUFFIXES, USER_BLOCK, BadPicture, build_word_map,
                      check_attributes, encode_caption, load_word_map, need_space, open_split, read_image, seal,
                      tokenize, word_map_digest, write_text)

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
MEMBERS = 1_000_000  # an archive may have; the largest that was published has 210,002
PIXELS_BEGIN = 4096  # bytes from the start of {split}.h5: behind what an empty HDF5 file takes


def main():
    args = parse_args(__doc__, {"overwrite": dict(action="store_true", help="make everything again")})
    config = get_config(args.preset, args.flags)
    data_dir = Path(config.data_dir)
    sources = find_sources(config)

    expected = {split: dict(format_version=FORMAT_VERSION, source=source["digest"], image_size=config.image_size,
                            captions_per_image=config.captions_per_image, max_len=config.max_len,
                            min_word_freq=config.min_word_freq, jieba_version=JIEBA_VERSION)
                for split, source in sources.items()}
    done = [] if args.overwrite else [split for split in sources if is_done(config, split, expected[split])]
    if len(done) == len(sources):
        print(f"Nothing to do: {', '.join(done)} in {data_dir} are up to date (--overwrite makes them again).")
        return

    with ProcessPoolExecutor() as pool:
        tokens = tokenize_all(pool, sources["train"]["captions"], "train") if "train" not in done else None
        if tokens is None:
            word_map = load_word_map(data_dir)
        else:
            word_map = build_word_map((words for captions in tokens for words in captions), config.min_word_freq)
            for split in done:
                with open_split(data_dir / f"{split}.h5") as file:
                    check_attributes(Path(file.filename), dict(file.attrs),
                                     {"word_map_digest": word_map_digest(word_map)})
            write_text(data_dir / "WORDMAP.json", json.dumps(word_map, ensure_ascii=False))
        report_path = data_dir / "pre_process.json"
        report = dict(vocabulary=len(word_map), jieba_version=JIEBA_VERSION,
                      splits=read_report(report_path, done))
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


def find_sources(config):
    """Find each split's folder, extracting its archive where only that is there, and read its annotations.

    Returns:
        dict: split -> dict(folder (Path): of pictures; image_ids (list of str): file names; captions (list of lists of
        str): of each picture; empty, extra (int): captions left out; no_caption (int): pictures left out; digest
        (str): sha256 of the source).
    Raises:
        UserError: train or valid missing, a folder that lacks its parts, bad archives or annotations.
    """
    sources, data_dir = {}, Path(config.data_dir)
    missing = [split for split, (name, *_) in SPLITS.items()
               if not (data_dir / name).is_dir() and not (data_dir / f"{name}.zip").exists()]
    for split in missing:
        if split in ("train", "valid"):
            root = data_dir / SPLITS[split][0]
            raise UserError(f"neither {root}/ nor {root}.zip exists: data/README.md says where to get it and "
                            f"`python data/sample.py` draws a small set to try with --preset sample")
        print(f"{split}: no {SPLITS[split][0]}.zip, left out")
    for split, (name, images_name, annotations_name) in SPLITS.items():
        if split in missing:
            continue
        root, archive = data_dir / name, data_dir / f"{name}.zip"
        if not root.is_dir():
            extract_archive(archive, root)
        folder, annotations = root / images_name, root / annotations_name
        if not folder.is_dir():
            raise UserError(f"{folder}/ does not exist: {root}/ is incomplete; remove it and extract {archive} again")
        if not annotations.exists() and split in ("train", "valid"):
            raise UserError(f"{annotations} does not exist: {root}/ is incomplete; remove it and extract {archive} "
                            f"again")
        sources[split] = read_source(folder, annotations, config, split in ("train", "valid"))
    return sources


def extract_archive(archive, folder):
    """Extract a zip into `folder`, whole or not at all, and nothing anywhere else.

    A top folder of the archive's own name is dropped. Absolute names, `..`, links, encrypted or repeated members, more
    than MEMBERS of them, and contents out of proportion to the archive are refused.

    Args:
        archive (Path), folder (Path)
    Raises:
        UserError: naming the archive and the member.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as file:
            members = {}
            if len(file.infolist()) > MEMBERS:
                raise UserError(f"{archive} has {len(file.infolist())} members, more than {MEMBERS}; refused")
            for member in file.infolist():
                name = PurePosixPath(member.filename.replace("\\", "/"))
                parts = name.parts
                if stat.S_ISLNK(member.external_attr >> 16) or ".." in parts or name.is_absolute() \
                        or ":" in member.filename or "\0" in member.filename:
                    raise UserError(f"{archive}: member {member.filename!r} points outside its folder; refused. "
                                    f"Get the archive from its publisher")
                parts = parts[1:] if parts[:1] == (folder.name,) else parts
                if not parts or member.is_dir():
                    if member.file_size:  # a damaged name
                        raise ValueError(f"{member.filename!r} cannot be a file's name")
                    continue
                if parts[0] == "__MACOSX" or parts[-1] == ".DS_Store":
                    continue
                if parts in members or member.flag_bits & 1:
                    raise UserError(f"{archive}: member {member.filename!r} is "
                                    f"{'there twice' if parts in members else 'encrypted'}; refused")
                members[parts] = member
            size = sum(member.file_size for member in members.values())
            if size > 100 * archive.stat().st_size + 2**20:
                raise UserError(f"{archive} would unpack to {size / 2**30:.1f} GiB from "
                                f"{archive.stat().st_size / 2**30:.3f} GiB; refused as a decompression bomb")
            need_space(folder.parent, size, f"to extract {archive}")
            with tqdm(total=size, unit="B", unit_scale=True, desc=f"extract {archive.name}") as bar:
                for parts, member in members.items():
                    path = temporary.joinpath(*parts)
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


def read_source(folder, annotations, config, annotated):
    """Read one split's annotations: AI Challenger's list, COCO's object, or (a test split) none at all.

    Captions without a word are left out, and those beyond captions_per_image. A picture of an annotated split without
    any caption is left out too.

    Args:
        folder (Path): of pictures. annotations (Path). config (Config). annotated (bool): there must be captions.
    Returns:
        dict: see find_sources.
    Raises:
        UserError: naming the file, the entry and what is wrong with it.
    """
    if annotations.exists():
        content = annotations.read_bytes()
        entries = parse_annotations(content, annotations)
    else:
        names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
        for name in names:
            if not is_file_name(name):
                raise UserError(f"{folder}: the name of {name!r} is not UTF-8; rename or remove it")
        content = "\n".join(names).encode()
        entries = {name: [] for name in names}
    source = dict(folder=folder, image_ids=[], captions=[], empty=0, extra=0, no_caption=0,
                  digest=hashlib.sha256(content).hexdigest())
    annotated = annotated or any(entries.values())
    for image_id, captions in entries.items():
        # HDF5 strings end at NUL, and a lone surrogate is not text in any encoding.
        captions = [caption.replace("\0", "").encode("utf-8", "replace").decode().strip() for caption in captions]
        filled = [caption for caption in captions if caption.replace("。", "").strip()]
        source["empty"] += len(captions) - len(filled)
        source["extra"] += max(len(filled) - config.captions_per_image, 0)
        if annotated and not filled:
            source["no_caption"] += 1
            continue
        source["image_ids"].append(image_id)
        source["captions"].append(filled[:config.captions_per_image])
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
        data = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): get it again") from None
    if isinstance(data, dict):
        check(isinstance(data.get("images"), list), "neither a list nor a COCO object with 'images'")
        check(isinstance(data.get("annotations", []), list), "'annotations' is not a list")
        names = {}
        for number, image in enumerate(data["images"]):
            check(isinstance(image, dict) and isinstance(image.get("file_name"), str)
                  and isinstance(image.get("id"), (int, str)), f"images[{number}] lacks 'id' or 'file_name'")
            check(image["id"] not in names, f"images[{number}] repeats id {image['id']!r}")
            names[image["id"]] = image["file_name"]
        pairs = [(name, []) for name in names.values()]
        captions = {key: pair[1] for key, pair in zip(names, pairs)}
        for number, annotation in enumerate(data.get("annotations", [])):
            check(isinstance(annotation, dict) and isinstance(annotation.get("image_id"), (int, str))
                  and annotation["image_id"] in captions, f"annotations[{number}] names no picture of 'images'")
            check(isinstance(annotation.get("caption"), str), f"annotations[{number}] lacks 'caption'")
            captions[annotation["image_id"]].append(annotation["caption"])
    else:
        check(isinstance(data, list), "not a list")
        pairs = []
        for number, entry in enumerate(data):
            check(isinstance(entry, dict), f"entry {number} is not an object")
            for key in ("image_id", "caption"):
                check(key in entry, f"entry {number} lacks the key {key!r}")
            check(isinstance(entry["caption"], list) and all(isinstance(text, str) for text in entry["caption"]),
                  f"entry {number}: 'caption' is not a list of sentences")
            pairs.append((entry["image_id"], entry["caption"]))
    entries = {}
    for number, (name, captions) in enumerate(pairs):
        check(isinstance(name, str) and is_file_name(name), f"entry {number}: {name!r} is not a picture's file name")
        check(name not in entries, f"entry {number} lists {name!r} a second time")
        entries[name] = captions
    return entries


def is_file_name(name):
    """Whether a file of this folder, and of no other, can have this name, in UTF-8."""
    try:
        return 0 < len(name.encode()) < 256 and name not in (".", "..") and not set(name) & set("/\\\0")
    except UnicodeEncodeError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Writing what is trained from


def is_done(config, split, expected):
    """Whether {split}.h5 is there and was made by the same settings from the same source.

    Raises:
        UserError: it is there, but was made otherwise: nothing is overwritten without --overwrite.
    """
    path = Path(config.data_dir) / f"{split}.h5"
    if not path.exists():
        return False
    with open_split(path) as file:
        check_attributes(path, dict(file.attrs), expected)
        check_attributes(path, dict(file.attrs), {"word_map_digest": word_map_digest(load_word_map(config.data_dir))})
    return True


def read_report(path, done):
    """What pre_process.json says of the splits, where some are done already. Returns: dict, split -> dict of counts."""
    if not done or not path.exists():
        return {}
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))["splits"]
        json.dumps(splits, ensure_ascii=False).encode()  # halves of characters could not be written again
        return {split: dict(counts) for split, counts in splits.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error!r}): remove it, or make all again with --overwrite") from None


def tokenize_all(pool, captions, split):
    """Tokenize each picture's captions, in all processes of the pool. Returns: list of lists of lists of str."""
    chunks = [captions[i:i + 256] for i in range(0, len(captions), 256)]
    tokens = []
    with tqdm(total=len(captions), desc=f"{split}: tokenize", unit="picture") as bar:
        for chunk in ordered_map(pool, tokenize_chunk, chunks):
            # A word is one object however often it occurs: a million captions fit into memory.
            tokens += [[[sys.intern(word) for word in words] for words in picture] for picture in chunk]
            bar.update(len(chunk))
    return tokens


def tokenize_chunk(chunk):
    return [[tokenize(caption) for caption in captions] for captions in chunk]


def write_split(pool, config, split, source, tokens, word_map, attributes):
    """Decode, resize and pack the pictures of one split with their captions into {split}.h5.

    Args:
        pool (ProcessPoolExecutor). config (Config). split (str). source (dict): see find_sources.
        tokens (list of lists of lists of str): of each picture's captions. word_map (dict).
        attributes (dict): what is_done compares.
    Returns:
        dict: counts, and the unreadable pictures with the reason.
    Raises:
        UserError: more than max_bad_images unreadable, or not enough disk.
    """
    path = Path(config.data_dir) / f"{split}.h5"
    side, n, k = config.image_size, len(source["image_ids"]), config.captions_per_image
    text = sum(len(text.encode()) for texts in [source["image_ids"], *source["captions"]] for text in texts)
    room = n * (k * (4 * config.max_len + 100) + 100) + 2 * text + 2**16  # all but the pixels; HDF5 wastes some
    size = n * side * side * 3 + room

    bad, good, digest = [], [], hashlib.sha256()
    paths = [source["folder"] / image_id for image_id in source["image_ids"]]
    chunks = [paths[i:i + 8] for i in range(0, n, 8)]
    with replacing(path, size) as temporary:
        need_space(path.parent, size, f"for {path}")
        # HDF5 crashes where it cannot write what it holds back. So it begins in memory, the pixels are written without
        # it, and after them zeros, which give it all the disk that it will need.
        empty = io.BytesIO()
        h5py.File(empty, "w", userblock_size=USER_BLOCK).close()
        with open(temporary, "wb") as file:
            file.write(empty.getvalue().ljust(PIXELS_BEGIN, b"\0"))
            images = itertools.chain.from_iterable(ordered_map(pool, partial(read_chunk, image_size=side), chunks))
            for i, image in enumerate(tqdm(images, f"{split}: pictures", n, unit="picture")):
                if isinstance(image, str):
                    bad.append({"image_id": source["image_ids"][i], "reason": image})
                    tqdm.write(f"unreadable picture: {image}", file=sys.stderr)
                    if len(bad) > config.max_bad_images * n:
                        raise UserError(f"{len(bad)} of the first {i + 1} of {n} pictures in {source['folder']} are "
                                        f"unreadable, the last one {image}; mend or remove them, or go on without "
                                        f"them: --max_bad_images 1")
                else:
                    file.write(image)
                    digest.update(image)
                    good.append(i)
            if not good:
                raise UserError(f"no readable picture in {source['folder']}")
            file.write(bytes(room))
        where = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        where.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        where.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        with h5py.File(temporary, "r+", alignment_threshold=side * side * 3, alignment_interval=PIXELS_BEGIN) as file:
            images = file.create_dataset("images", (len(good), side, side, 3), np.uint8, dcpl=where)
            assert images.id.get_offset() == PIXELS_BEGIN
            counts = write_captions(file, config, [source["image_ids"][i] for i in good],
                                    [source["captions"][i] for i in good], [tokens[i] for i in good], word_map)
            file.attrs.update(attributes, split=split, word_map_digest=word_map_digest(word_map),
                              images_digest=digest.hexdigest())
        seal(temporary, PIXELS_BEGIN, PIXELS_BEGIN + len(good) * side * side * 3, len(good))
    return dict(pictures=len(good), bad_pictures=bad, pictures_without_caption=source["no_caption"], **counts,
                empty_captions=source["empty"], extra_captions=source["extra"])


def write_captions(file, config, image_ids, captions, tokens, word_map):
    """Write ids, lengths, names and raw text. Returns: dict of counts."""
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
    words_a_caption = collections.Counter(len(words) for picture in tokens for words in picture)
    total = sum(length * count for length, count in words_a_caption.items())
    unknown = sum(word not in word_map for picture in tokens for words in picture for word in words)
    return dict(captions=sum(words_a_caption.values()), words=total,
                unknown_word_rate=unknown / max(total, 1), longest_caption=max(words_a_caption, default=0),
                cut_captions=sum(count for length, count in words_a_caption.items() if length > config.max_len),
                pictures_with_fewer_captions=sum(len(picture) < k for picture in captions))


def read_chunk(paths, image_size):
    """read_image of each. Returns: list of uint8 (image_size, image_size, 3), or of str: why it is unreadable."""
    images = []
    for path in paths:
        try:
            images.append(read_image(path, image_size))
        except BadPicture as error:
            images.append(str(error))
    return images


def ordered_map(pool, function, items):
    """pool.map that is only a few items ahead of its reader: pictures come faster than a slow disk takes them."""
    pending, window = collections.deque(), 4 * os.cpu_count()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= window:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process was killed, probably for want of memory: close other programs and call "
                        "again; what is done is kept") from None


def print_counts(split, counts):
    print(f"{split}: {counts['pictures']} pictures, {len(counts['bad_pictures'])} unreadable, "
          f"{counts['pictures_without_caption']} without caption; {counts['captions']} captions "
          f"({counts['empty_captions']} empty and {counts['extra_captions']} extra ones left out, "
          f"{counts['cut_captions']} cut at max_len, longest {counts['longest_caption']} words); "
          f"{counts['unknown_word_rate']:.2%} unknown words")


if __name__ == "__main__":
    run(main)
