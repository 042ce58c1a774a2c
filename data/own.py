"""
Lays one's own pictures and sentences out exactly as AI Challenger 2017's are, for pre_process.py.

    $ python data/own.py PICTURES TABLE          # -> data/own/, and prints the next two commands

PICTURES is a folder, with subfolders or without. TABLE (CSV, TSV, JSON or JSONL, in UTF-8 or GBK)
names a picture and one sentence or several in each row; data/README.md shows its forms. Pictures
are named by their paths in the folder, or by their names alone, with or without suffix.

A tenth of the pictures becomes valid and another test_a, the same ones on every machine (--valid,
--test, --seed). left_out.txt lists what is left out; pictures.csv says which picture is which.
"""

import collections
import csv
import hashlib
import io
import itertools
import json
import re
import shlex
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where config.py is

from config import PRESETS, Config, new_parser  # noqa: E402
from data.flickr8k_cn import lay_out  # noqa: E402
from datasets import (  # noqa: E402
    PICTURE_SUFFIXES,
    BadPicture,
    largest_batch_size,
    normalise,
    open_picture,
)
from pre_process import SPLITS, is_file_name, is_of_macos  # noqa: E402
from utils import UserError, printable, run_script, write_text  # noqa: E402

# What headers call their columns, in small letters, without digits and signs
FILE_WORDS = set("file filename filepath image images imageid imagename imagefile imagepath img "
                 "name path picture photo 图 图片 图像 照片 文件 文件名 文件名称 图片名 图片名称 "
                 "图片文件 图片文件名 图像文件 照片名 名称 路径 图片路径 文件路径".split())
SENTENCE_WORDS = set("caption captions sentence sentences text description descriptions desc "
                     "comment 描述 句子 标注 说明 文字 文本 标题 图片描述 中文描述".split())
DELIMITERS = "\t,;|"
FEW_SENTENCES = 3000  # with fewer, a word of the training sentences is kept that is there only once
SHOWN = 10  # lines on the screen of what is left out
START = "models/photographs.pth.tar"  # the model that training begins from


# --------------------------------------------------------------------------------------------------
# The table


def read_table(path, folder):
    """
    Reads the table, whatever its form.

    Returns ([column's name], or None where there are none; [(row from 1, [cells])]). A cell of JSON
    is what JSON has. Raises UserError that names the row.
    """
    text = read_text(path)
    if path.suffix.lower() == ".jsonl":
        lines = [(row, line) for row, line in enumerate(text.split("\n"), 1) if line.strip()]
        entries = [(row, parse(line, f"{path}, line {row}")) for row, line in lines]
        return columns_of_json(entries, path)
    if path.suffix.lower() == ".json":
        found = parse(text, path)
        if isinstance(found, dict):
            return None, rows_of_object(found, path)
        entries = list(enumerate(found, 1)) if isinstance(found, list) else []
        return columns_of_json(entries, path)
    rows = read_cells(text, path, folder)
    first = rows[0][1]
    has_header = any(plain(cell) in FILE_WORDS | SENTENCE_WORDS for cell in first)
    return (first, rows[1:]) if has_header else (None, rows)


def read_text(path):
    """Reads a text in UTF-8, with or without byte order mark, or GBK."""
    content = path.read_bytes()
    for encoding in ("utf-8-sig", "gb18030"):
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text
    raise UserError(f"{path} is no text in UTF-8 or GBK: in Excel, save it as CSV UTF-8")


def parse(text, where):
    """JSON. Raises UserError, also for a key that is there twice: Python would keep the last."""
    def once(pairs):
        found = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"{key!r} is there twice; give its sentences as one list")
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}): correct it") from None


def columns_of_json(entries, path):
    """A table of [(row, object or list)]. Raises UserError for anything else."""
    kinds = {type(entry) for _, entry in entries}
    if kinds == {list}:
        return None, entries
    if kinds == {dict}:
        header = list(dict.fromkeys(key for _, entry in entries for key in entry))
        return header, [(row, [entry.get(key) for key in header]) for row, entry in entries]
    raise UserError(f"{path}: neither objects nor lists of a picture and its sentences; "
                    f"data/README.md shows the forms")


def rows_of_object(found, path):
    """The rows of an object picture -> sentences, or of COCO's."""
    if not {"images", "annotations"} <= found.keys():
        return list(enumerate(map(list, found.items()), 1))
    try:
        names = {image["id"]: image["file_name"] for image in found["images"]}
        return [(row, [names.get(entry["image_id"], entry["image_id"]), entry["caption"]])
                for row, entry in enumerate(found["annotations"], 1)]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not quite COCO's form ({error!r}): images need id and "
                        f"file_name, annotations image_id and caption") from None


def read_cells(text, path, folder):
    """
    The rows of a text, without blank ones. The delimiter is the one by which most lines name a
    picture.
    """
    def matches(delimiter):
        cells_of = (line.split(delimiter) for line in text.splitlines())
        return sum(any(folder.find(cell.strip(' "')) for cell in cells) for cells in cells_of)

    delimiter = max(DELIMITERS, key=matches)
    if not matches(delimiter):
        raise none_named(path, folder, text.strip().partition("\n")[0] or "nothing")
    lines, rows = io.StringIO(text, newline=""), []
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        for row, cells in enumerate(reader, 1):
            if any(cell.strip() for cell in cells):
                rows.append((row, cells))
    except csv.Error as error:
        after = f"after row {rows[-1][0]}" if rows else "row 1"
        raise UserError(f'{path}, {after}: a quote is not closed, or not doubled within quotes '
                        f'({error}): a cell that begins with one is written """so"" it goes on"'
                        ) from None
    return rows


def none_named(path, folder, first):
    """The UserError of a table that has none of the pictures. Args: first (str): its first row."""
    return UserError(f"{path}: no row names a picture of {folder.path} ({len(folder.pictures)} "
                     f"pictures, such as {folder.pictures[0]}); the first one is {first[:100]}")


def plain(name):
    """A column's name in small letters, without digits and signs."""
    return re.sub(r"[\W\d_]+", "", str(name)).casefold()


def choose_columns(header, rows, folder, path):
    """
    Which column names the picture (the one that names most), and which hold sentences.

    Returns (int, [int]), from 0. Raises UserError where there is none.
    """
    width = max((len(cells) for _, cells in rows), default=0)
    counts = [0] * width
    for _, cells in rows:
        for c, cell in enumerate(cells):
            counts[c] += bool(folder.find(cell))
    if not any(counts):
        raise none_named(path, folder, str(rows[0][1]) if rows else "nothing")
    file = counts.index(max(counts))
    others = [c for c in range(width) if c != file]
    if not others:
        raise UserError(f"{path} has pictures and no sentences: a row is a picture and its "
                        f"sentences, with one of {' '.join(map(repr, DELIMITERS))} between")
    if header is None:
        return file, others
    names = [plain(name) for name in header] + [""] * (width - len(header))
    chosen = ([c for c in others if names[c] in SENTENCE_WORDS]
              or [c for c in others if any(word in names[c] for word in SENTENCE_WORDS)]
              or [c for c in others if names[c] and names[c] not in FILE_WORDS])
    if not chosen:
        return file, others
    further = [c for c in others if not names[c] and c > max(chosen)]  # under no name
    return file, chosen + further


# --------------------------------------------------------------------------------------------------
# The pictures


class Folder:
    """The pictures under a folder, found by any of the ways in which a table may name them."""

    def __init__(self, path):
        """Args: path (Path). What this script wrote below it, at an earlier call, is not of it."""
        if not path.is_dir():
            raise UserError(f"{path} is no folder of pictures")
        self.path, self.name = path, spelling(path.resolve().name)
        written = {name for name, _, _ in SPLITS.values()}
        files = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
        files = [file for file in files if not is_of_macos(file) and not written & set(file.parts)]
        pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
        self.pictures = sorted(file.as_posix() for file in pictures)
        self.other_names = {spelling(file.name) for file in set(files).difference(pictures)}
        if not self.pictures:
            raise UserError(f"{path} has no picture, by the suffixes {' '.join(PICTURE_SUFFIXES)}")
        self.ways = [collections.defaultdict(list) for _ in range(6)]  # the strictest first
        for picture in self.pictures:
            whole, name = spelling(picture), spelling(picture).rpartition("/")[2]
            for way, key in zip(self.ways, (*forms(whole), *forms(name)), strict=True):
                way[key].append(picture)

    def find(self, cell):
        """What a cell may mean, by path or else by name alone. Returns: list of str."""
        written = written_name(cell)
        below = f"/{written}".rpartition(f"/{self.name}/")[2]  # of a path from outside the folder
        for name in (written, below):
            folded = name.casefold()
            for way, key in zip(self.ways, (name, folded, folded) * 2, strict=True):
                if key in way:
                    return way[key]
        return []


def spelling(name):
    """A name in Unicode's composed form; macOS decomposes it."""
    return unicodedata.normalize("NFC", name)


def written_name(cell):
    """What a cell says of a picture, with the slashes of this program. Returns: str."""
    return spelling(str(cell).strip().replace("\\", "/").removeprefix("./"))


def forms(name):
    """A picture's name as it is, in any case, and without its suffix."""
    return name, name.casefold(), name[:-len(PurePosixPath(name).suffix)].casefold()


def flat_names(pictures):
    """
    File names for one folder, also one that takes capitals for small letters: a picture's own name
    where no other has it, otherwise its path joined by `_`. Returns {path: str}.
    """
    def key(path):
        return spelling(PurePosixPath(path).name).casefold()

    counts, names = collections.Counter(map(key, pictures)), {}
    for path in pictures:
        if counts[key(path)] == 1 and is_file_name(PurePosixPath(path).name):
            names[path] = PurePosixPath(path).name
    taken = set(map(key, names.values()))
    for path in sorted(set(pictures) - names.keys()):
        joined = PurePosixPath(re.sub(r"[/\\]", "_", path))
        numbered = (f"{joined.stem[:50]}_{number}{joined.suffix}" for number in itertools.count(2))
        names[path] = next(name for name in itertools.chain([joined.name], numbered)
                           if is_file_name(name) and key(name) not in taken)
        taken.add(key(names[path]))
    return names


def fault_of(path):
    """Why a picture cannot be read, "" where it can."""
    try:
        open_picture(path, 32)  # small, which costs least
        return ""
    except BadPicture as error:
        return str(error).removeprefix(f"{path}: ")


# --------------------------------------------------------------------------------------------------
# Both together


def gather(rows, columns, folder):
    """
    Puts the sentences to their pictures.

    Returns ({picture: [sentences]}, [(row or None, reason, name in the table, [sentences])] of what
    is left out).
    """
    file, others = columns
    found, left_out, named = {}, [], set()  # found: {picture: {sentence: its row}}
    for row, cells in rows:
        name = cells[file] if file < len(cells) else ""
        sentences = [text for c in others if c < len(cells) for text in sentences_of(cells[c])]
        pictures = folder.find(name)
        named.update(pictures)
        if len(pictures) != 1:
            left_out.append((row, why_not(name, pictures, folder), name, sentences))
            continue
        filled = [text for text in sentences if text]
        for text in filled or [""]:
            if not isinstance(text, str) or not normalise(text):
                left_out.append((row, "empty, or no sentence", name, [text]))
                continue
            first = found.setdefault(pictures[0], {}).setdefault(text, row)
            if first != row:
                left_out.append((row, f"the same as row {first}", name, [text]))

    with ThreadPoolExecutor() as pool:
        faults = pool.map(fault_of, [folder.path / picture for picture in found])
    for picture, fault in zip(list(found), faults, strict=True):
        if fault:
            rows_of = found.pop(picture).items()
            left_out += [(row, f"unreadable: {fault}", picture, [text]) for text, row in rows_of]
    unused = [picture for picture in folder.pictures if picture not in named]
    left_out += [(None, "picture in no row", picture, []) for picture in unused]
    return {picture: list(sentences) for picture, sentences in found.items()}, left_out


def why_not(name, pictures, folder):
    """Why a row has no picture. Args: pictures (list of str): that it may mean, none or several."""
    if pictures:
        return f"may be {' or '.join(pictures)}"
    if written_name(name).rpartition("/")[2] in folder.other_names:
        return "not one of the kinds of pictures that are read: save it as JPEG or PNG"
    return "no such picture"


def sentences_of(cell):
    """The texts of a cell, or whatever else a list of JSON has. UTF-8 has no halves of an emoji."""
    parts = cell if isinstance(cell, list) else [cell]
    return [part.encode("utf-8", "ignore").decode().strip() if isinstance(part, str) else part
            for part in parts]


def share(text):
    """A number of pictures, or a part such as 10%, for argparse. Returns a function of how many."""
    match = re.fullmatch(r"([0-9]{1,9})|([0-9]{1,2}(?:\.[0-9]{1,3})?)%", text)
    if not match:
        raise ValueError(text)
    return lambda n: int(match[1]) if match[1] else round(n * float(match[2]) / 100)


def split_pictures(pictures, valid, test, seed):
    """
    Draws the splits: by the digests of seed and path, so that they are the same everywhere.

    Returns {split: [pictures]}, without test_a where `test` is 0. Raises UserError where nothing is
    left to train on.
    """
    def digest(path):
        return hashlib.sha256(f"{seed} {spelling(path)}".encode()).digest()

    order = sorted(pictures, key=digest)
    if valid + test >= len(order):
        raise UserError(f"valid takes {valid} and test {test} of {len(order)} pictures that have a "
                        f"sentence: leave some to train on, by other --valid and --test")
    splits = dict(valid=order[:valid], test_a=order[valid:valid + test], train=order[valid + test:])
    return {split: sorted(splits[split]) for split in ("train", "valid", "test_a") if splits[split]}


def column(header, number):
    """What to call a column on the screen."""
    name = header[number] if header and number < len(header) else ""
    return f"{number + 1} ({name})" if name else str(number + 1)


def write_names(path, splits, names):
    """Writes which picture is which."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(("split", "image_id", "picture"))
    for split, pictures in splits.items():
        writer.writerows((split, names[picture], picture) for picture in pictures)
    write_text(path, "\ufeff" + lines.getvalue())  # without the mark Excel takes it for GBK


def print_left_out(left_out, path):
    """Writes what is left out into a file, and the first of it on the screen."""
    lines = []
    for row, reason, name, sentences in left_out:
        where = f"row {row}" if row else "-"
        cells = [where, reason, name, *sentences]
        line = "\t".join(map(printable, cells))
        lines.append(line.encode("utf-8", "backslashreplace").decode())
    write_text(path, "".join(f"{line}\n" for line in lines))
    for line in lines[:SHOWN]:
        print("left out:", line.replace("\t", "  "))
    unused = sum(row is None for row, *_ in left_out)
    if lines:
        print(f"left out in all: {len(lines) - unused:,} rows or sentences of rows, and {unused:,} "
              f"pictures in no row; {path} lists them")


def print_commands(out, splits, captions):
    """Prints the two commands that follow, with the flags that fit."""
    counts = [len(captions[picture]) for pictures in splits.values() for picture in pictures]
    few = sum(len(captions[picture]) for picture in splits["train"]) < FEW_SENTENCES
    batch_size = min(largest_batch_size(len(splits["train"])), Config.batch_size)
    name = out.resolve().name
    print(f"Sentences per picture: {min(counts)} to {max(counts)}, "
          f"{sum(counts) / len(counts):.1f} on average. Next:")
    data = ["--preset", "own", "--captions_per_image", max(counts)]
    folders = []
    if out.as_posix() != PRESETS["own"]["data_dir"]:
        data += ["--data_dir", out.as_posix()]
        folders = ["--model_dir", f"models/{name}", "--log_dir", f"logs/{name}"]
    words = [] if few else ["--min_word_freq", Config.min_word_freq]
    pre_process = ["pre_process.py", *data, *words]
    train = ["train.py", *data, *folders, "--init", START, "--batch_size", batch_size]
    for command in (pre_process, train):
        print("python", shlex.join(map(str, command)))


def main():
    parser = new_parser("Lay one's own pictures and sentences out as AI Challenger's are.")
    parser.add_argument("pictures", type=Path, metavar="PICTURES", help="a folder")
    parser.add_argument("table", type=Path, metavar="TABLE", help="CSV, TSV, JSON or JSONL")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "own", metavar="DIR")
    for flag in ("--valid", "--test"):
        parser.add_argument(flag, type=share, default="10%", metavar="N",
                            help="a number of pictures, or a part of them such as 10%%")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    is_below = args.out.is_relative_to(Path.cwd())
    out = args.out.relative_to(Path.cwd()) if is_below else args.out  # shorter, in the commands

    folder = Folder(args.pictures)
    header, rows = read_table(args.table, folder)
    columns = choose_columns(header, rows, folder, args.table)
    captions, left_out = gather(rows, columns, folder)
    if not captions:
        row, reason, name, _ = left_out[0]
        raise UserError(f"{args.table}: nothing is left; row {row}, {name}: {reason}")
    n = len(captions)
    splits = split_pictures(captions, max(args.valid(n), 1), args.test(n), args.seed)
    names = flat_names(captions)
    sources = {names[path]: folder.path / path for path in captions}
    entries = {}
    for split, pictures in splits.items():
        entries[split] = [dict(url="", image_id=names[path], caption=captions[path])
                          for path in pictures]
    lay_out(out, sources, entries, args.table)
    write_names(out / "pictures.csv", splits, names)

    file, sentences = columns
    print(f"Pictures: column {column(header, file)}; sentences: column "
          + ", ".join(column(header, number) for number in sentences))
    for split, pictures in splits.items():
        count = sum(len(captions[path]) for path in pictures)
        print(f"{split:6} {len(pictures):6,} pictures {count:7,} sentences")
    print_left_out(left_out, out / "left_out.txt")
    print_commands(out, splits, captions)


if __name__ == "__main__":
    run_script(main)
