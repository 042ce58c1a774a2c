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
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where config.py is

from config import PRESETS, Config, new_parser  # noqa: E402
from data.flickr8k_cn import lay_out  # noqa: E402
from datasets import (PICTURE_SUFFIXES, BadPicture, is_picture_name,  # noqa: E402
                      largest_batch_size)
from datasets import normalise, open_picture  # noqa: E402
from pre_process import SPLITS, is_of_macos  # noqa: E402
from utils import UserError, printable, run_script, write_text  # noqa: E402

# What headers call columns of sentences
SENTENCE_WORDS = ("caption", "sentence", "text", "description", "comment",
                  "描述", "句子", "标注", "说明", "文字", "文本", "标题")
FEW_SENTENCES = 3000  # with fewer, a word of the training sentences is kept that is there only once
SHOWN = 10  # lines on the screen of what is left out
OUT = PRESETS["own"]["data_dir"]
START = "models/photographs.pth.tar"  # the model that training begins from


def main():
    parser = new_parser("Lay one's own pictures and sentences out as AI Challenger's are.")
    parser.add_argument("pictures", type=Path, metavar="PICTURES", help="a folder")
    parser.add_argument("table", type=Path, metavar="TABLE", help="CSV, TSV, JSON or JSONL")
    parser.add_argument("--out", type=Path, default=Path(OUT), metavar="DIR")
    for flag in ("--valid", "--test"):
        parser.add_argument(flag, type=share, default="10%", metavar="N",
                            help="a number of pictures, or a part of them such as 10%%")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    folder = Folder(args.pictures)
    captions, left_out = gather(read_table(args.table, folder), folder)
    if not captions:
        row, reason, name, _ = left_out[0]
        raise UserError(f"{args.table}: nothing is left; row {row}, {name}: {reason}")
    n = len(captions)
    splits = split_pictures(captions, max(args.valid(n), 1), args.test(n), args.seed)
    write_layout(args.out, args.table, folder, splits, captions)

    for split, pictures in splits.items():
        count = sum(len(captions[picture]) for picture in pictures)
        print(f"{split:6} {len(pictures):6,} pictures {count:7,} sentences")
    write_left_out(args.out / "left_out.txt", left_out)
    print_commands(args.out, splits, captions)


def share(text: str) -> Callable[[int], int]:
    """A number of pictures, or a part such as 10%, for argparse: a function of how many."""
    if not re.fullmatch("[0-9]{1,9}%?", text):
        raise ValueError(text)
    number = int(text.removesuffix("%"))
    return lambda n: round(n * number / 100) if text.endswith("%") else number


# --------------------------------------------------------------------------------------------------
# The pictures


class Folder:
    """The pictures under a folder, as paths in it, and what a table may call them."""

    def __init__(self, path: Path):
        if not path.is_dir():
            raise UserError(f"{path} is no folder of pictures")
        self.path = path
        written = {name for name, _, _ in SPLITS.values()}  # by this script, at an earlier call
        files = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
        files = [file for file in files if not is_of_macos(file) and not written & set(file.parts)]
        self.pictures = sorted(file.as_posix() for file in files if is_picture_name(file))
        self.file_names = {spelling(file.name) for file in files}
        if not self.pictures:
            raise UserError(f"{path} has no picture, by the suffixes {' '.join(PICTURE_SUFFIXES)}")
        self.ways = [collections.defaultdict(list) for _ in range(4)]  # the strictest first
        for picture in self.pictures:
            whole = PurePosixPath(spelling(picture))
            forms = whole, whole.with_suffix(""), whole.name, whole.stem
            for way, form in zip(self.ways, forms, strict=True):
                way[str(form)].append(picture)

    def find(self, cell) -> list[str]:
        """What a cell may mean: by path or else by name alone, with suffix or else without."""
        written = spelling(str(cell).strip().replace("\\", "/").removeprefix("./"))
        outside = f"/{spelling(self.path.resolve().name)}/"  # of a path from outside the folder
        for name in (written, f"/{written}".rpartition(outside)[2]):
            for way in self.ways:
                if name in way:
                    return way[name]
        return []

    def why_not(self, cell) -> str:
        """Why a cell means no picture."""
        if pictures := self.find(cell):
            return f"may be {' or '.join(pictures)}"
        if spelling(re.split(r"[/\\]", str(cell).strip())[-1]) in self.file_names:
            return "not one of the kinds of pictures that are read: save it as JPEG or PNG"
        return "no such picture"


def spelling(name):
    """A name in small letters and in Unicode's composed form; macOS decomposes it."""
    return unicodedata.normalize("NFC", name).casefold()


def flat_names(pictures: Iterable[str]) -> dict[str, str]:
    """File names for one folder, in small letters too: the pictures' own, numbered where any two
    are the same.
    """
    names = {path: PurePosixPath(path).name.replace("\\", "_") for path in pictures}
    if len(set(map(spelling, names.values()))) < len(names):
        names = {path: f"{number}_{name}" for number, (path, name) in enumerate(names.items(), 1)}
    return names


def fault_of(path: Path) -> str:
    """Why a picture cannot be read, "" where it can."""
    try:
        open_picture(path, 32)  # small, which costs least
        return ""
    except BadPicture as error:
        return str(error).removeprefix(f"{path}: ")


# --------------------------------------------------------------------------------------------------
# The table


def read_table(path: Path, folder: Folder) -> list[tuple[int, object, list]]:
    """The rows of a table: number from 1, name of a picture, sentences. JSON may have anything in
    the place of either.
    """
    header, table = header_and_rows(path, folder)
    # Of each column the cells, "" where a row ends before it.
    columns = list(itertools.zip_longest(*(cells for _, cells in table), fillvalue=""))
    counts = [sum(bool(folder.find(cell)) for cell in cells) for cells in columns]
    if not any(counts):
        first = str(table[0][1])[:100] if table else "nothing"
        raise UserError(f"{path}: no row names a picture of {folder.path} ({len(folder.pictures)} "
                        f"pictures, such as {folder.pictures[0]}); the first one is {first}")
    file = counts.index(max(counts))
    names = [*map(str, header), *[""] * len(columns)][:len(columns)]
    sentences = sentence_columns(names, file)
    if not sentences:
        raise UserError(f"{path} has pictures and no sentences: a row is a picture and its "
                        f"sentences, with a comma or a tab between")
    called = [f"{number} ({name})" if name else str(number) for number, name in enumerate(names, 1)]
    print(f"Pictures: column {called[file]}; sentences: column "
          + ", ".join(called[column] for column in sentences))

    texts = zip(*(columns[column] for column in sentences), strict=True)
    return [(row, name, listed(cells))
            for (row, _), name, cells in zip(table, columns[file], texts, strict=True)]


def listed(cells):
    """The sentences in the cells of a row, each of which may be a list, or empty."""
    lists = [cell if isinstance(cell, list) else [cell] for cell in cells]
    return [text for texts in lists for text in texts if text]


def header_and_rows(path, folder):
    table = read_rows(path)
    kinds = {type(cells) for _, cells in table}
    if kinds == {dict}:
        header = list(dict.fromkeys(key for _, entry in table for key in entry))
        return header, [(row, [entry.get(key) for key in header]) for row, entry in table]
    if kinds - {list}:
        raise UserError(f"{path}: neither objects nor lists of a picture and its sentences; "
                        f"data/README.md shows the forms")
    if table and is_header(table[0][1], folder):
        return table[0][1], table[1:]
    return [], table


def sentence_columns(names, file):
    """Which columns hold sentences: by their names, and those without one that follow; or all."""
    others = [column for column in range(len(names)) if column != file]
    chosen = [column for column in others if is_of_sentences(names[column])]
    if not chosen:
        return others
    return chosen + [column for column in others if not names[column] and column > max(chosen)]


def is_of_sentences(column):
    return any(word in column.lower() for word in SENTENCE_WORDS)


def is_header(cells, folder):
    names = [str(cell).lower() for cell in cells]
    has_picture = any(folder.find(name) or name.endswith(PICTURE_SUFFIXES) for name in names)
    return not has_picture and any(map(is_of_sentences, names))


def read_rows(path):
    """What a table has in each row: a list of cells, or whatever JSON has there."""
    text = read_text(path)
    if path.suffix.lower() == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        return [(row, parse(line, f"{path}, line {row}")) for row, line in lines if line.strip()]
    if path.suffix.lower() == ".json":
        found = parse(text, path)
        if not isinstance(found, list):
            raise UserError(f"{path}: not a list of rows; data/README.md shows the forms")
        return list(enumerate(found, 1))
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    lines, rows = io.StringIO(text, newline=""), []
    try:
        for cells in csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True):
            rows.append(cells)
    except csv.Error as error:
        raise UserError(f'{path}, after row {len(rows)}: a quote is not closed, or not doubled '
                        f'within quotes ({error}): a cell that begins with one is written '
                        f'"""so"" it goes on"') from None
    return [(row, cells) for row, cells in enumerate(rows, 1) if any(map(str.strip, cells))]


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
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}): correct it") from None


# --------------------------------------------------------------------------------------------------
# Both together


def gather(rows: list, folder: Folder) -> tuple[dict[str, list[str]], list[tuple]]:
    """Puts the sentences to their pictures. Returns them by picture; and what is left out: row or
    None, reason, name in the table, sentences.
    """
    found, left_out, named = {}, [], set()  # found: {picture: {sentence: its row}}
    for row, name, sentences in rows:
        pictures = folder.find(name)
        named.update(pictures)
        if len(pictures) != 1:
            left_out.append((row, folder.why_not(name), name, sentences))
            continue
        rows_of = found.setdefault(pictures[0], {})
        for text in sentences or [""]:
            sentence = clean(text)
            if not normalise(sentence):
                left_out.append((row, "empty, or no sentence", name, [text]))
            elif sentence in rows_of:
                left_out.append((row, f"the same as row {rows_of[sentence]}", name, [text]))
            else:
                rows_of[sentence] = row

    with ThreadPoolExecutor() as pool:
        faults = list(pool.map(fault_of, [folder.path / picture for picture in found]))
    captions = {}
    for (picture, rows_of), fault in zip(found.items(), faults, strict=True):
        if fault:
            left_out += [(row, f"unreadable: {fault}", picture, [text])
                         for text, row in rows_of.items()]
        elif rows_of:
            captions[picture] = list(rows_of)
    unused = [picture for picture in folder.pictures if picture not in named]
    left_out += [(None, "picture in no row", picture, []) for picture in unused]
    return captions, left_out


def clean(text):
    """A sentence as UTF-8 can have it, without halves of an emoji; "" for what is no text."""
    return text.encode("utf-8", "ignore").decode().strip() if isinstance(text, str) else ""


def split_pictures(pictures: Iterable[str], valid: int, test: int, seed: int
                   ) -> dict[str, list[str]]:
    """Draws the splits, by the digests of seed and path, so that they are the same everywhere."""
    def digest(path):
        return hashlib.sha256(f"{seed} {unicodedata.normalize('NFC', path)}".encode()).digest()

    order = sorted(pictures, key=digest)
    if valid + test >= len(order):
        raise UserError(f"valid takes {valid} and test {test} of {len(order)} pictures that have a "
                        f"sentence: leave some to train on, by other --valid and --test")
    splits = dict(train=order[valid + test:], valid=order[:valid], test_a=order[valid:valid + test])
    return {split: sorted(names) for split, names in splits.items() if names}


# --------------------------------------------------------------------------------------------------
# What is written and printed


def write_layout(out, table, folder, splits, captions):
    names = flat_names(captions)
    sources = {names[path]: folder.path / path for path in captions}
    entries = {}
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(("split", "image_id", "picture"))
    for split, pictures in splits.items():
        entries[split] = [dict(url="", image_id=names[path], caption=captions[path])
                          for path in pictures]
        writer.writerows((split, names[path], path) for path in pictures)
    lay_out(out, sources, entries, table)
    # Without the byte order mark Excel takes it for GBK.
    write_text(out / "pictures.csv", "\ufeff" + lines.getvalue())


def write_left_out(path, left_out):
    """Writes what is left out into a file, and the first of it on the screen."""
    lines = []
    for row, reason, name, sentences in left_out:
        cells = [f"row {row}" if row else "-", reason, name, *sentences]
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
    counts = [len(sentences) for sentences in captions.values()]
    print(f"Sentences per picture: {min(counts)} to {max(counts)}, "
          f"{sum(counts) / len(counts):.1f} on average. Next:")
    data = ["--preset", "own", "--captions_per_image", max(counts)]
    folders = []
    if out.as_posix() != OUT:
        name = out.resolve().name
        data += ["--data_dir", out.as_posix()]
        folders = ["--model_dir", f"models/{name}", "--log_dir", f"logs/{name}"]
    has_many = sum(len(captions[path]) for path in splits["train"]) >= FEW_SENTENCES
    words = ["--min_word_freq", Config.min_word_freq] if has_many else []
    batch_size = min(largest_batch_size(len(splits["train"])), Config.batch_size)
    for command in (["pre_process.py", *data, *words],
                    ["train.py", *data, *folders, "--init", START, "--batch_size", batch_size]):
        print("python", shlex.join(map(str, command)))


if __name__ == "__main__":
    run_script(main)
