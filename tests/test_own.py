"""One's own pictures and sentences, in every form of table, laid out as AI Challenger's are, and
nothing lost on the way.
"""
import csv
import io
import json
import unicodedata

import h5py
import pytest
from common import call, error_line, files_under
from PIL import Image

import pre_process
from data import own
from pre_process import SPLITS

PICTURES = ["1.jpg", "猫/1.jpg", "狗/1.JPG", "狗/二.png", "狗/大 狗/a,b.webp", "e.jpeg",
            "猫/Ex.jpg", "狗/Ex.bmp"]
SENTENCES = {name: [f"第{i}张图里有狗，“它”在跑{n}, 很快" for n in range(1 + i % 3)]
             for i, name in enumerate(PICTURES)}
ROWS = [(name, text) for name, texts in SENTENCES.items() for text in texts]


@pytest.fixture
def folder(tmp_path):
    """Eight tiny pictures in subfolders, some of the same name."""
    for i, name in enumerate(PICTURES):
        path = tmp_path / "照片" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 16), (30 * i, 0, 0)).save(path)
    return tmp_path / "照片"


def convert(folder, content, name="table.csv", *flags, out="out"):
    """Result of own.py on a table of this content (str or bytes)."""
    table = folder.parent / name
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    return call(own.main, folder, table, "--out", folder.parent / out, *flags, check=None)


def layout(folder, out="out"):
    """What was written: of each split, by the picture's path in the folder, its sentences."""
    found = {}
    paths = {path.read_bytes(): path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    for split, (name, images, annotations) in SPLITS.items():
        root = folder.parent / out / name
        if root.exists():
            entries = json.loads((root / annotations).read_text("utf-8"))
            pictures = {path.name: path.read_bytes() for path in (root / images).iterdir()}
            assert sorted(pictures) == sorted(entry["image_id"] for entry in entries)
            found[split] = {paths[pictures[entry["image_id"]]]: entry["caption"]
                            for entry in entries}
    return found


def together(found):
    return {path: texts for pictures in found.values() for path, texts in pictures.items()}


def delimited(rows, delimiter=","):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    return text.getvalue()


def lines_of(objects):
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n\n" for entry in objects)


WIDE = [(name, *texts, *[""] * (3 - len(texts))) for name, texts in SENTENCES.items()]
CHALLENGER = [dict(url="", image_id=name, caption=texts) for name, texts in SENTENCES.items()]
DECOMPOSED = ((unicodedata.normalize("NFD", name), text) for name, text in ROWS)
TABLES = {
    "rows.csv": delimited(ROWS),
    "header.csv": delimited([("序号", "图片名称", "中文描述1"),
                             *((i, *row) for i, row in enumerate(ROWS))]),
    "order.csv": delimited([("caption", "split", "image_id"),
                            *((text, "train", name) for name, text in ROWS)]),
    "wide.csv": delimited([("文件名", "描述", "", ""), *WIDE]),
    "rows.tsv": "".join(f"{name}\t{text}\n" for name, text in ROWS),
    "gbk.csv": delimited(ROWS).encode("gbk"),
    "mark.csv": b"\xef\xbb\xbf" + delimited([("图片", "句子"), *ROWS]).encode(),
    "paths.csv": delimited(("D:\\照片\\" + name.replace("/", "\\"), text) for name, text in ROWS),
    "decomposed.csv": delimited(DECOMPOSED),
    "challenger.json": json.dumps(CHALLENGER),
    "objects.json": json.dumps([dict(编号=i, 文件=name, 句子=text)
                                for i, (name, text) in enumerate(ROWS)]),
    "lists.json": json.dumps(ROWS),
    "objects.jsonl": lines_of(dict(sentence=text, path=name) for name, text in ROWS),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_form_of_table_gives_the_same_layout(name, folder):
    result = convert(folder, TABLES[name], name)
    assert result.code == 0 and "left out" not in result.out, result
    assert together(layout(folder)) == SENTENCES
    assert [len(pictures) for pictures in layout(folder).values()] == [6, 1, 1]
    assert (folder.parent / "out" / "left_out.txt").read_bytes() == b""


@pytest.mark.parametrize("written, path", [
    ("二", "狗/二.png"), ("二.PNG", "狗/二.png"), ("./狗/二", "狗/二.png"),
    ("a,b", "狗/大 狗/a,b.webp"), ("1.jpg", "1.jpg"),
    ("狗\\1.jpg", "狗/1.JPG"), (" Ex.bmp ", "狗/Ex.bmp"), ("照片/猫/1", "猫/1.jpg"),
    ("鱼/二.png", None), ("../二.png", None), ("", None), ("二.jpg", None)])
def test_a_picture_is_found_by_path_or_by_name_and_no_other_is(written, path, folder):
    assert own.Folder(folder).find(written) == ([path] if path else [])


@pytest.mark.parametrize("flags, numbers", [
    ([], (24, 3, 3)), (["--valid", "5", "--test", "0"], (25, 5)),
    (["--valid", "0", "--test", "50%"], (14, 1, 15)),
    (["--valid", "1%", "--test", "29"], None), (["--valid", "100%"], None),
    (["--test", "-1"], None)])
def test_splits_are_by_picture_and_the_same_everywhere(flags, numbers, folder):
    names = [f"{i}.png" for i in range(30)]
    for i, name in enumerate(names):
        Image.new("RGB", (8, 8), (8 * i, 1, 0)).save(folder / name)
    rows = [(name, f"第{n}句，关于{name}") for n in range(3) for name in names]
    result = convert(folder, delimited(rows), "table.csv", *flags)
    if numbers is None:
        assert result.code == 2 and error_line(result.err) and not (folder.parent / "out").exists()
        return
    found = layout(folder)
    assert [len(pictures) for pictures in found.values()] == list(numbers)
    assert len(together(found)) == 30 and all(len(texts) == 3 for texts in together(found).values())
    convert(folder, delimited(rows[::-1]), "other.csv", *flags, out="other")
    other = layout(folder, "other")
    assert all(found[split].keys() == other[split].keys() for split in found)
    convert(folder, delimited(rows), "table.csv", *flags, "--seed", "1", out="seed")
    assert layout(folder, "seed") != found
    if not flags:
        assert sorted(found["valid"]) == ["0.png", "17.png", "23.png"]


def test_every_sentence_is_in_one_split_or_in_the_list_of_what_is_left_out(folder):
    (folder / "bad.jpg").write_bytes(b"no picture")
    (folder / "phone.HEIC").write_bytes(b"")
    wrong = [("Ex", "两处都有"), ("nowhere.jpg", "没有图片"), ("phone.HEIC", "别的格式"),
             ("bad.jpg", "坏图片"), ("e.jpeg", "。"), ("e.jpeg", ""), ROWS[0],
             *((f"{i}.gif", f"也没有{i}") for i in range(20))]
    result = convert(folder, delimited([("file", "sentence"), *ROWS, *wrong]))
    assert result.code == 0 and together(layout(folder)) == SENTENCES
    text = (folder.parent / "out" / "left_out.txt").read_text("utf-8")
    listed = [line.split("\t") for line in text.splitlines()]
    first = len(ROWS) + 2
    assert sorted((row, name, text) for row, _, name, text in listed) == sorted(
        (f"row {row}", name, text) for row, (name, text) in enumerate(wrong, first))
    reasons = {name: reason for _, reason, name, _ in listed}
    assert all(path in reasons["Ex"] for path in ("猫/Ex.jpg", "狗/Ex.bmp"))
    assert "unreadable" in reasons["bad.jpg"] and "JPEG" in reasons["phone.HEIC"]
    assert "row 2" in reasons[ROWS[0][0]]
    shown = [line for line in result.out.splitlines() if line.startswith("left out: ")]
    assert len(shown) == own.SHOWN and f"left out in all: {len(wrong)} rows" in result.out

    result = convert(folder, delimited(ROWS[1:]), out="other")
    assert "left out: -  picture in no row  1.jpg\n" in result.out
    assert "and 2 pictures in no row" in result.out
    assert "1.jpg" not in together(layout(folder, "other"))


@pytest.mark.parametrize("chosen, numbered", [(PICTURES, True), (PICTURES[3:], False)])
def test_names_are_unique_and_lead_back(chosen, numbered, folder):
    assert convert(folder, delimited((name, f"一句{name}") for name in chosen)).code == 0
    table = (folder.parent / "out" / "pictures.csv").read_text("utf-8-sig")
    names = {row["picture"]: row["image_id"] for row in csv.DictReader(io.StringIO(table))}
    assert sorted(names) == sorted(chosen)
    assert together(layout(folder)) == {name: [f"一句{name}"] for name in chosen}
    assert len({name.casefold() for name in names.values()}) == len(names)
    for path, name in names.items():
        own_name = path.rpartition("/")[2]
        assert name.partition("_")[2] == own_name if numbered else name == own_name


def test_it_goes_on_to_preprocessing_with_the_flags_it_prints(folder):
    """Also from a folder with the output of the last time, which is not taken for pictures."""
    for _ in range(2):
        result = convert(folder, TABLES["rows.csv"], out="照片/data set")
        assert result.code == 0, result
    commands = [line.split() for line in result.out.splitlines() if line.startswith("python ")]
    assert [command[1] for command in commands] == ["pre_process.py", "train.py"]
    for command in commands:
        assert command[2:6] == ["--preset", "own", "--captions_per_image", "3"]
    for part in ("--batch_size 1\n", "--init models/photographs.pth.tar", "'models/data set'",
                 "1 to 3, 1.9 on average"):
        assert part in result.out
    data = folder / "data set"
    call(pre_process.main, "--preset", "own", "--captions_per_image", 3, "--data_dir", data)
    texts = []
    for split in ("train", "valid", "test_a"):
        with h5py.File(data / f"{split}.h5") as file:
            texts += [text for text in file["raw_captions"].asstr()[:].ravel() if text]
    assert sorted(texts) == sorted(text for _, text in ROWS)


@pytest.mark.parametrize("name, content, words", [
    ("t.csv", "", ["no row names a picture", "nothing"]),
    ("t.csv", "别处/无.jpg,\"一句\"\n", ["no row names a picture", "无.jpg"]),
    ("t.csv", "1.jpg\n", ["no sentences"]),
    ("t.csv", "1.jpg,。\n", ["row 1", "1.jpg"]),
    ("t.csv", "e.jpeg,一句\n1.jpg,\"一句\n猫/1.jpg,一句\n", ["after row 1", "quote"]),
    ("t.csv", b"PK\3\4\0\0\xff\xff1.jpg", ["CSV UTF-8"]),
    ("t.csv", "1.jpg,一句\n".encode("utf-16"), ["CSV UTF-8"]),
    ("t.json", "{", ["not valid JSON"]),
    ("t.json", '{"1.jpg": "一"}', ["data/README.md"]),
    ("t.json", '["1.jpg"]', ["data/README.md"]),
    ("t.json", "[]", ["no row names a picture", "nothing"]),
    ("t.json", '[["1.jpg", {"text": "一"}]]', ["row 1"]),
    ("t.jsonl", '["1.jpg", "一"]\n\n["1.jpg"', ["line 3", "not valid JSON"]),
    ("t.csv", "1.jpg,一句\n", ["1 pictures", "--valid"]),
])
def test_a_table_that_will_not_do_ends_in_one_line(name, content, words, folder):
    result = convert(folder, content, name)
    assert result.code == 2 and all(word in error_line(result.err) for word in words), result
    assert len(result.err.splitlines()) == 1 and not (folder.parent / "out").exists()


def test_other_input_is_not_mixed_in(folder):
    convert(folder, TABLES["rows.csv"])
    before = files_under(folder.parent / "out")
    result = convert(folder, delimited([*ROWS, ("1.jpg", "又一句")]))
    assert result.code == 2 and "remove it" in error_line(result.err)
    assert files_under(folder.parent / "out") == before


@pytest.mark.parametrize("flags, named", [
    (["nowhere", "table.csv"], "nowhere"), (["照片", "no.csv"], "no.csv"), (["照片"], "TABLE"),
    (["照片", "table.csv", "--out", "table.csv"], "table.csv")])
def test_bad_arguments_end_in_one_line(flags, named, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "table.csv").write_text(TABLES["rows.csv"], "utf-8")
    result = call(own.main, *flags, check=2)
    assert result.code == 2 and named in error_line(result.err)
