"""
Lays Flickr8k-CN, as its publishers give it, out exactly as AI Challenger 2017's captions are, for pre_process.py.

    $ python data/flickr8k_cn.py FOLDER          # -> data/flickr8k_cn/, in seconds
    $ python pre_process.py --preset flickr8k_cn

FOLDER holds Flicker8k_Dataset/ with the photographs, flickr8kzhc.caption.txt with the sentences that Chinese speakers
wrote, and flickr8ktrain.txt, flickr8kval.txt and flickr8ktest.txt; data/README.md says where they come from. They give
6,000 pictures and 30,000 captions for train, 1,000 and 5,000 each for valid and test_a.

The pictures are hard links where the disk allows them, and then take no space of their own.
"""

import itertools
import json
import os
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where config.py is

from config import new_parser  # noqa: E402
from datasets import normalise  # noqa: E402
from pre_process import SPLITS, is_file_name  # noqa: E402
from utils import UserError, alone, run_script  # noqa: E402

PICTURES, CAPTIONS = "Flicker8k_Dataset", "flickr8kzhc.caption.txt"
LISTS = {"train": "flickr8ktrain.txt", "valid": "flickr8kval.txt", "test_a": "flickr8ktest.txt"}


def read_lines(path):
    """
    Reads a text file, with or without byte order mark or carriage returns.

    Returns [(line number from 1, line without white space around it)] of the lines that are not blank. Raises
    UserError where the file is not UTF-8.
    """
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {number}: not UTF-8; save the file as UTF-8, or get it again") from None
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def read_captions(path):
    """
    Reads lines of the form `ID.jpg#zhc#NUMBER SENTENCE`, in any order.

    Returns {picture's file name: [str, by NUMBER]}; a sentence may be empty. Raises UserError that names the line.
    """
    captions = {}
    for number, line in read_lines(path):
        match = re.fullmatch(r"(\S+\.jpg)#zhc#([0-9]{1,4})(?:\s+(.*))?", line)
        if not match or not is_file_name(match[1]):
            raise UserError(f"{path}, line {number}: {line[:60]!r} is not of the form 'ID.jpg#zhc#NUMBER SENTENCE'; "
                            f"correct or remove the line, or get the file again")
        sentences = captions.setdefault(match[1], {})
        if int(match[2]) in sentences:
            raise UserError(f"{path}, line {number}: sentence {match[2]} of {match[1]} is there a second time; remove "
                            f"one of the two")
        sentences[int(match[2])] = match[3] or ""
    return {name: [text for _, text in sorted(sentences.items())] for name, sentences in captions.items()}


def read_list(path):
    """
    Reads one picture's id per line.

    Returns ([file name, each once], [file names listed again]). Raises UserError that names the line.
    """
    names, again = {}, []
    for number, line in read_lines(path):
        name = line.removesuffix(".jpg") + ".jpg"
        if re.search(r"\s", name) or not is_file_name(name):
            raise UserError(f"{path}, line {number}: {line[:60]!r} is not a picture's id; correct or remove the line, "
                            f"or get the file again")
        if name in names:
            again.append(name)
        names[name] = None
    return list(names), again


def read_source(source):
    """
    Reads everything but the pictures, and leaves out what has no picture or no caption.

    Returns ({split: [{"url", "image_id", "caption"}]}, [what was left out, a line each]), for the splits whose lists
    are there. Raises UserError for what is missing, malformed, or in two splits.
    """
    for name, is_there in ((PICTURES, Path.is_dir), (CAPTIONS, Path.is_file)):
        if not is_there(source / name):
            raise UserError(f"{source / name} does not exist: data/README.md says where to get it")
    splits = {split: read_list(source / name) for split, name in LISTS.items() if (source / name).is_file()}
    if not splits:
        raise UserError(f"{source} has none of {', '.join(LISTS.values())}: data/README.md says where to get them")
    for one, other in itertools.combinations(splits, 2):
        shared = set(splits[one][0]) & set(splits[other][0])
        if shared:
            raise UserError(f"{source / LISTS[one]} and {LISTS[other]} share {some(shared)}: remove them from one, or "
                            f"a model will be judged on what it was trained on")

    captions, entries, left_out = read_captions(source / CAPTIONS), {}, []
    for split, (names, again) in splits.items():
        entries[split], no_picture, no_caption, blank = [], [], [], []
        for name in names:
            texts = captions.get(name, [])
            filled = [text for text in texts if normalise(text)]
            blank += [name] * (len(texts) - len(filled))
            if not (source / PICTURES / name).is_file():
                no_picture.append(name)
            elif not filled:
                no_caption.append(name)
            else:
                entries[split].append({"url": "", "image_id": name, "caption": filled})
        if not entries[split]:
            raise UserError(f"{source / LISTS[split]} lists no picture that {PICTURES}/ and {CAPTIONS} have")
        left_out += [f"{split}: {what}: {some(which)}" for what, which in (
            (f"not in {PICTURES}", no_picture), ("without a caption", no_caption), ("blank captions", blank),
            ("listed again", again)) if which]
    unlisted = captions.keys() - {name for names, _ in splits.values() for name in names}
    left_out += [f"all: captions, but in no list: {some(unlisted)}"] if unlisted else []
    return entries, left_out


def some(names):
    """How many, and the first three."""
    return f"{len(names):,} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"


def is_same(folder, split, pictures, entries):
    """Whether a split's folder, written earlier, holds these entries and pictures of these sizes (bytes)."""
    _, images, annotations = SPLITS[split]
    try:
        return (folder / annotations).read_text("utf-8") == json.dumps(entries, ensure_ascii=False) and all(
            (folder / images / entry["image_id"]).stat().st_size == pictures[entry["image_id"]].stat().st_size
            for entry in entries)
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def write_splits(out, pictures, splits):
    """
    Writes {split: entries} into folders of `out` that have AI Challenger's names; each appears whole, once all are.
    """
    temporary = out / "splits.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        for split, entries in splits.items():
            name, images, annotations = SPLITS[split]
            (temporary / name / images).mkdir(parents=True)
            for entry in entries:
                picture, target = pictures[entry["image_id"]], temporary / name / images / entry["image_id"]
                try:
                    os.link(picture.resolve(), target)
                except OSError:  # another disk, or one without hard links
                    shutil.copyfile(picture, target)
            (temporary / name / annotations).write_text(json.dumps(entries, ensure_ascii=False), "utf-8")
        for split in splits:
            os.replace(temporary / SPLITS[split][0], out / SPLITS[split][0])
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def lay_out(out, pictures, splits, source):
    """
    Writes the splits that are not in `out` yet, alone there; other input is not mixed with what is.

    `pictures` is {image_id: Path}, `splits` {split: entries}, and `source` (Path) what messages name.
    Returns the names of the folders written. Raises UserError where a folder is there from other
    input.
    """
    todo = dict(splits)
    with alone(out / "pre_process.lock", "--out"):
        for split in LISTS:
            folder = out / SPLITS[split][0]
            if folder.exists() or folder.with_name(f"{folder.name}.zip").exists():
                if not is_same(folder, split, pictures, todo.pop(split, None) or []):
                    raise UserError(f"{folder} is there already, but not from what {source} has now: remove it, "
                                    f"or choose another --out")
        write_splits(out, pictures, todo)
    return [SPLITS[split][0] for split in todo]


def main():
    parser = new_parser("Lay Flickr8k-CN out as AI Challenger is.")
    parser.add_argument("source", type=Path, metavar="FOLDER", help="what its publishers give; see data/README.md")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "flickr8k_cn", metavar="DIR")
    args = parser.parse_args()

    splits, left_out = read_source(args.source)
    names = [entry["image_id"] for entries in splits.values() for entry in entries]
    pictures = {name: args.source / PICTURES / name for name in names}
    written = lay_out(args.out, pictures, splits, args.source)

    for split, entries in splits.items():
        print(f"{split:6} {len(entries):6,} pictures {sum(len(entry['caption']) for entry in entries):7,} captions")
    for line in left_out:
        print(f"left out: {line}")
    for split, name in LISTS.items():
        if split not in splits:
            print(f"{split}: no {args.source / name}" + (
                "" if split == "test_a" else "; pre_process.py needs train and valid: put it there and call again"))
    if written:
        print(f"Wrote {', '.join(written)} into {args.out}")
    else:
        print(f"Nothing to do: {args.out} is up to date.")


if __name__ == "__main__":
    run_script(main)
