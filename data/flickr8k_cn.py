"""
Lays Flickr8k-CN, as its publishers give it, out exactly as AI Challenger 2017's captions are, for
pre_process.py.

    $ python data/flickr8k_cn.py FOLDER          # -> data/flickr8k_cn/, in seconds
    $ python pre_process.py --preset flickr8k_cn

FOLDER holds Flicker8k_Dataset/ with the photographs, flickr8kzhc.caption.txt with the sentences
that Chinese speakers wrote, and flickr8ktrain.txt, flickr8kval.txt and flickr8ktest.txt;
data/README.md says where they come from. They give 6,000 pictures and 30,000 captions for train,
1,000 and 5,000 each for valid and test_a.

The pictures are hard links where the disk allows them, and then take no space of their own.
"""

import collections
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
from pre_process import REQUIRED, SPLITS, is_file_name  # noqa: E402
from utils import UserError, alone, run_script  # noqa: E402

PICTURES, CAPTIONS = "Flicker8k_Dataset", "flickr8kzhc.caption.txt"
LISTS = {"train": "flickr8ktrain.txt", "valid": "flickr8kval.txt", "test_a": "flickr8ktest.txt"}


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a UTF-8 text that are not blank, with their numbers from 1."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {number}: not UTF-8; save the file as UTF-8, or get it again"
                        ) from None
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def read_captions(path: Path) -> dict[str, list[str]]:
    """Lines of the form `ID.jpg#zhc#NUMBER SENTENCE`, in any order: each picture's sentences by
    number, which may be empty.
    """
    captions = {}
    for number, line in read_lines(path):
        match = re.fullmatch(r"(\S+\.jpg)#zhc#([0-9]{1,4})(?:\s+(.*))?", line)
        if not match or not is_file_name(match[1]):
            raise UserError(f"{path}, line {number}: {line[:60]!r} is not of the form "
                            f"'ID.jpg#zhc#NUMBER SENTENCE'; correct or remove the line, or get "
                            f"the file again")
        name, position, sentence = match[1], int(match[2]), match[3] or ""
        sentences = captions.setdefault(name, {})
        if position in sentences:
            raise UserError(f"{path}, line {number}: sentence {position} of {name} is there a "
                            f"second time; remove one of the two")
        sentences[position] = sentence
    return {name: [sentences[position] for position in sorted(sentences)]
            for name, sentences in captions.items()}


def read_list(path: Path) -> list[str]:
    """The file names of one picture's id per line."""
    names = []
    for number, line in read_lines(path):
        name = line.removesuffix(".jpg") + ".jpg"
        if re.search(r"\s", name) or not is_file_name(name):
            raise UserError(f"{path}, line {number}: {line[:60]!r} is not a picture's id; correct "
                            f"or remove the line, or get the file again")
        names.append(name)
    return names


def read_source(source: Path) -> tuple[dict[str, list[dict]], list[str]]:
    """Everything but the pictures, without what has no picture or no caption.

    Returns AI Challenger's entries of each split whose list is there, and what was left out, a line
    each. Raises UserError for what is missing, malformed, or in two splits.
    """
    for path, is_there in ((source / PICTURES, Path.is_dir), (source / CAPTIONS, Path.is_file)):
        if not is_there(path):
            raise UserError(f"{path} does not exist: data/README.md says where to get it")
    splits = {split: read_list(source / name) for split, name in LISTS.items()
              if (source / name).is_file()}
    if not splits:
        raise UserError(f"{source} has none of {', '.join(LISTS.values())}: data/README.md says "
                        f"where to get them")
    for one, other in itertools.combinations(splits, 2):
        if shared := set(splits[one]) & set(splits[other]):
            raise UserError(f"{source / LISTS[one]} and {LISTS[other]} share {some(shared)}: "
                            f"remove them from one, or a model will be judged on what it was "
                            f"trained on")

    captions = read_captions(source / CAPTIONS)
    entries, left_out = {}, []
    for split, names in splits.items():
        entries[split], faults = entries_of(names, captions, source / PICTURES)
        if not entries[split]:
            raise UserError(f"{source / LISTS[split]} lists no picture that {PICTURES}/ and "
                            f"{CAPTIONS} have")
        left_out += [f"{split}: {what}: {some(which)}" for what, which in faults.items() if which]
    if unlisted := captions.keys() - set(itertools.chain(*splits.values())):
        left_out.append(f"all: captions, but in no list: {some(unlisted)}")
    return entries, left_out


def entries_of(names, captions, folder):
    """Of the pictures in a list the entries, and the names of what is left out, by the reason."""
    entries = []
    no_picture, no_caption, blank = [], [], []
    again = [name for name, times in collections.Counter(names).items() if times > 1]
    for name in dict.fromkeys(names):
        texts = captions.get(name, [])
        filled = [text for text in texts if normalise(text)]
        blank += [name] * (len(texts) - len(filled))
        if not (folder / name).is_file():
            no_picture.append(name)
        elif not filled:
            no_caption.append(name)
        else:
            entries.append({"url": "", "image_id": name, "caption": filled})
    return entries, {f"not in {PICTURES}": no_picture, "without a caption": no_caption,
                     "blank captions": blank, "listed again": again}


def some(names):
    """How many, and the first three."""
    return f"{len(names):,} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"


def lay_out(out: Path, pictures: dict[str, Path], splits: dict[str, list[dict]], source: Path
            ) -> list[str]:
    """Writes the splits that are not in `out` yet, alone there; other input is not mixed with what
    is. `source` is what messages name.

    Returns the names of the folders written. Raises UserError where a folder is there from other
    input.
    """
    todo = dict(splits)
    with alone(out / "pre_process.lock", "--out"):
        for split in LISTS:
            folder = out / SPLITS[split][0]
            if folder.exists() or folder.with_suffix(".zip").exists():
                if not is_same(folder, split, pictures, todo.pop(split, [])):
                    raise UserError(f"{folder} is there already, but not from what {source} has "
                                    f"now: remove it, or choose another --out")
        write_splits(out, pictures, todo)
    return [SPLITS[split][0] for split in todo]


def is_same(folder, split, pictures, entries):
    """Whether a split's folder, written earlier, holds these entries and pictures of these sizes.
    """
    _, images, annotations = SPLITS[split]
    names = [entry["image_id"] for entry in entries]
    try:
        written = (folder / annotations).read_text("utf-8")
        sizes = [(folder / images / name).stat().st_size for name in names]
    except (FileNotFoundError, UnicodeDecodeError):
        return False
    return (written == json.dumps(entries, ensure_ascii=False)
            and sizes == [pictures[name].stat().st_size for name in names])


def write_splits(out: Path, pictures: dict[str, Path], splits: dict[str, list[dict]]):
    """Writes entries into folders of `out` that have AI Challenger's names; each appears whole,
    once all are.
    """
    temporary = out / "splits.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        for split, entries in splits.items():
            name, images, annotations = SPLITS[split]
            (temporary / name / images).mkdir(parents=True)
            for entry in entries:
                picture = pictures[entry["image_id"]]
                target = temporary / name / images / entry["image_id"]
                try:
                    os.link(picture.resolve(), target)
                except OSError:  # another disk, or one without hard links
                    shutil.copyfile(picture, target)
            text = json.dumps(entries, ensure_ascii=False)
            (temporary / name / annotations).write_text(text, "utf-8")
        for split in splits:
            os.replace(temporary / SPLITS[split][0], out / SPLITS[split][0])
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main():
    parser = new_parser("Lay Flickr8k-CN out as AI Challenger is.")
    parser.add_argument("source", type=Path, metavar="FOLDER",
                        help="what its publishers give; see data/README.md")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "flickr8k_cn",
                        metavar="DIR")
    args = parser.parse_args()

    splits, left_out = read_source(args.source)
    names = [entry["image_id"] for entries in splits.values() for entry in entries]
    pictures = {name: args.source / PICTURES / name for name in names}
    written = lay_out(args.out, pictures, splits, args.source)

    for split, entries in splits.items():
        captions = sum(len(entry["caption"]) for entry in entries)
        print(f"{split:6} {len(entries):6,} pictures {captions:7,} captions")
    for line in left_out:
        print(f"left out: {line}")
    for split, name in LISTS.items():
        if split not in splits:
            way_out = "; pre_process.py needs train and valid: put it there and call again"
            print(f"{split}: no {args.source / name}{way_out if split in REQUIRED else ''}")
    if written:
        print(f"Wrote {', '.join(written)} into {args.out}")
    else:
        print(f"Nothing to do: {args.out} is up to date.")


if __name__ == "__main__":
    run_script(main)
