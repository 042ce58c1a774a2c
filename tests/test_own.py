"""One's own pictures and sentences, in every form of table, laid out as AI Challenger is, and nothing lost on the way.
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

PICTURES = ["1.jpg", "猫/1.jpg", "狗/1.JPG", "狗/二.png", "狗/大 狗/a,b.webp", "e.jpeg", "猫/Ex.jpg", "狗/Ex.bmp"]
SENTENCES = {name: [f"第{i}张图里有狗，“它”在跑{n}, 很快" for n in range(1 + i % 3)] for i, name in enumerate(PICTURES)}
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
    """What was written. Returns: dict, split -> {picture's path in the folder: its sentences}."""
    found = {}
    for split, (name, images, annotations) in SPLITS.items():
        root = folder.parent / out / name
        if root.exists():
            entries = json.loads((root / annotations).read_text("utf-8"))
            pictures = {path.name: path for path in (root / images).iterdir()}
            assert sorted(pictures) == sorted(entry["image_id"] for entry in entries)
            of = {path.read_bytes(): path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
            found[split] = {of[pictures[entry["image_id"]].read_bytes()]: entry["caption"] for entry in entries}
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
COCO = dict(images=[dict(id=i, file_name=name) for i, name in enumerate(PICTURES)],
            annotations=[dict(id=7, image_id=PICTURES.index(name), caption=text) for name, text in ROWS])
TABLES = {
    "rows.csv": delimited(ROWS),
    "header.csv": delimited([("序号", "图片名称", "中文描述1"), *((i, *row) for i, row in enumerate(ROWS))]),
    "order.csv": delimited([("caption", "split", "image_id"), *((text, "train", name) for name, text in ROWS)]),
    "wide.csv": delimited([("文件名", "描述", "", ""), *WIDE]),
    "ragged.csv": delimited((name, *texts) for name, texts in SENTENCES.items()),
    "semicolon.csv": delimited([("file", "text"), *ROWS], ";"),
    "rows.tsv": "".join(f"{name}\t{text}\n" for name, text in ROWS),
    "wide.txt": delimited([("image_name", "comment_number", "comment1", "comment2", "comment3"),
                           *((row[0], 0, *row[1:]) for row in WIDE)], "|"),
    "gbk.csv": delimited(ROWS).encode("gbk"),
    "mark.csv": b"\xef\xbb\xbf" + delimited([("图片", "句子"), *ROWS]).encode(),
    "paths.csv": delimited(("D:\\我的\\照片\\" + name.replace("/", "\\"), text) for name, text in ROWS),
    "case.csv": delimited((name[:-4] + name[-4:].swapcase(), text) for name, text in ROWS),
    "decomposed.csv": delimited((unicodedata.normalize("NFD", name), text) for name, text in ROWS),
    "object.json": json.dumps(SENTENCES),
    "challenger.json": json.dumps([dict(url="", image_id=name, caption=texts) for name, texts in SENTENCES.items()]),
    "objects.json": json.dumps([dict(编号=i, 文件=name, 句子=text) for i, (name, text) in enumerate(ROWS)]),
    "lists.json": json.dumps(ROWS),
    "coco.json": json.dumps(COCO),
    "objects.jsonl": lines_of(dict(sentence=text, path=name) for name, text in ROWS),
    "lists.jsonl": b"\xef\xbb\xbf" + lines_of([name, texts] for name, texts in SENTENCES.items()).encode(),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_form_of_table_gives_the_same_layout(name, folder):
    result = convert(folder, TABLES[name], name)
    assert result.code == 0 and "left out" not in result.out, result
    found = layout(folder)
    assert together(found) == SENTENCES
    assert [len(found[split]) for split in ("train", "valid", "test_a")] == [6, 1, 1]
    assert convert(folder, TABLES["rows.csv"], out="other").code == 0 and layout(folder, "other") == found
    assert (folder.parent / "out" / "left_out.txt").read_bytes() == b""


@pytest.mark.parametrize("written, path", [
    ("二", "狗/二.png"), ("二.PNG", "狗/二.png"), ("./狗/二", "狗/二.png"),
    ("a,b", "狗/大 狗/a,b.webp"), ("1.jpg", "1.jpg"),
    ("狗\\1.jpg", "狗/1.JPG"), (" Ex.bmp ", "狗/Ex.bmp"), ("照片/猫/1", "猫/1.jpg"), ("ex.JPG", "猫/Ex.jpg"),
    ("鱼/二.png", None), ("../二.png", None), ("", None), ("二.jpg", None)])
def test_a_picture_is_found_by_path_or_by_name_and_no_other_is(written, path, folder):
    assert own.Folder(folder).find(written) == ([path] if path else [])


@pytest.mark.parametrize("flags, numbers", [
    ([], (24, 3, 3)), (["--valid", "5", "--test", "0"], (25, 5)), (["--valid", "0", "--test", "50%"], (14, 1, 15)),
    (["--valid", "0.1%", "--test", "29"], None), (["--valid", "100%"], None), (["--test", "-1"], None)])
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
    assert sum(numbers) == len(together(found)) == 30 and all(len(texts) == 3 for texts in together(found).values())
    convert(folder, delimited(rows[::-1]), "other.csv", *flags, out="other")
    assert {s: set(p) for s, p in layout(folder, "other").items()} == {s: set(p) for s, p in found.items()}
    convert(folder, delimited(rows), "table.csv", *flags, "--seed", "1", out="seed")
    assert layout(folder, "seed") != found
    if not flags:
        assert sorted(found["valid"]) == ["0.png", "17.png", "23.png"]


def test_every_sentence_is_in_one_split_or_in_the_list_of_what_is_left_out(folder):
    (folder / "bad.jpg").write_bytes(b"no picture")
    (folder / "phone.HEIC").write_bytes(b"")
    wrong = [("Ex", "两处都有"), ("nowhere.jpg", "没有图片"), ("phone.HEIC", "别的格式"), ("bad.jpg", "坏图片"),
             ("e.jpeg", "。"), ("e.jpeg", ""), ROWS[0], *((f"{i}.gif", f"也没有{i}") for i in range(20))]
    result = convert(folder, delimited([("file", "sentence"), *ROWS, *wrong]))
    assert result.code == 0 and together(layout(folder)) == SENTENCES
    listed = [line.split("\t") for line in (folder.parent / "out" / "left_out.txt").read_text("utf-8").splitlines()]
    first = len(ROWS) + 2
    assert sorted((row, name, text) for row, _, name, text in listed) == sorted(
        (f"row {first + i}", name, text) for i, (name, text) in enumerate(wrong))
    reasons = {name: reason for _, reason, name, _ in listed}
    assert all(path in reasons["Ex"] for path in ("猫/Ex.jpg", "狗/Ex.bmp")) and "unreadable" in reasons["bad.jpg"]
    assert "JPEG" in reasons["phone.HEIC"] and "row 2" in reasons[ROWS[0][0]]
    shown = [line for line in result.out.splitlines() if line.startswith("left out: ")]
    assert len(shown) == own.SHOWN and f"left out in all: {len(wrong)} rows" in result.out

    result = convert(folder, delimited(ROWS[1:]), out="other")
    assert "left out: -  picture in no row  1.jpg\n" in result.out and "and 2 pictures in no row" in result.out
    assert "1.jpg" not in together(layout(folder, "other"))


def test_names_are_unique_and_lead_back(folder):
    more = ["a_1.jpg", "a/1.jpg", "x/a_1.jpg", "ex.JPEG", f"{'长' * 60}/{'名' * 60}/1.jpg"]
    for name in more:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (0, 9 * more.index(name), 9)).save(folder / name)
    rows = [(name, f"一句{name}") for name in PICTURES + more]
    assert convert(folder, delimited(rows)).code == 0
    assert together(layout(folder)) == {name: [text] for name, text in rows}
    table = (folder.parent / "out" / "pictures.csv").read_text("utf-8-sig")
    names = {row["picture"]: row["image_id"] for row in csv.DictReader(io.StringIO(table))}
    assert sorted(names) == sorted(PICTURES + more)
    assert len({name.casefold() for name in names.values()}) == len(names)
    assert names["狗/二.png"] == "二.png" and names["猫/1.jpg"] == "猫_1.jpg" and names["1.jpg"] == "1.jpg"


def test_it_goes_on_to_preprocessing_with_the_flags_it_prints(folder):
    """Also from a folder that holds the output of the last time, which is not taken for pictures."""
    for _ in range(2):
        result = convert(folder, TABLES["rows.csv"], out="照片/data set")
        assert result.code == 0, result
    commands = [line.split() for line in result.out.splitlines() if line.startswith("python ")]
    assert [command[1] for command in commands] == ["pre_process.py", "train.py"]
    assert all(command[2:6] == ["--preset", "own", "--captions_per_image", "3"] for command in commands)
    assert "--batch_size 1\n" in result.out and "--init models/photographs.pth.tar" in result.out
    assert "'models/data set'" in result.out and "1 to 3, 1.9 on average" in result.out
    data = folder / "data set"
    result = call(pre_process.main, "--preset", "own", "--captions_per_image", 3, "--data_dir", data)
    assert result.code == 0, result
    with h5py.File(data / "train.h5") as train, h5py.File(data / "valid.h5") as valid, \
            h5py.File(data / "test_a.h5") as test:
        texts = [text for file in (train, valid, test) for text in file["raw_captions"].asstr()[:].ravel() if text]
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
    ("t.json", '{"1.jpg": "一", "1.jpg": "二"}', ["1.jpg", "twice"]),
    ("t.json", '"1.jpg"', ["data/README.md"]),
    ("t.json", "[]", ["data/README.md"]),
    ("t.json", '{"1.jpg": {"text": "一"}}', ["row 1"]),
    ("t.json", '{"images": [{"id": 1}], "annotations": []}', ["COCO", "file_name"]),
    ("t.jsonl", '["1.jpg", "一"]\n\n["1.jpg"', ["line 3", "not valid JSON"]),
    ("t.csv", "1.jpg,一句\n", ["1 pictures", "--valid"]),
])
def test_a_table_that_will_not_do_ends_in_one_line_and_writes_nothing(name, content, words, folder):
    result = convert(folder, content, name)
    assert result.code == 2 and all(word in error_line(result.err) for word in [*words]), result
    assert len(result.err.splitlines()) == 1 and not (folder.parent / "out").exists()


def test_other_input_is_not_mixed_in(folder):
    convert(folder, TABLES["rows.csv"])
    before = files_under(folder.parent / "out")
    result = convert(folder, delimited([*ROWS, ("1.jpg", "又一句")]))
    assert result.code == 2 and "remove it" in error_line(result.err)
    assert files_under(folder.parent / "out") == before


@pytest.mark.parametrize("flags, named", [(["nowhere", "table.csv"], "nowhere"), (["照片", "no.csv"], "no.csv"),
                                          (["照片", "table.csv", "--out", "table.csv"], "table.csv"),
                                          (["照片"], "TABLE"), (["照片/猫", "table.csv", "--seed", "x"], "--seed")])
def test_bad_arguments_end_in_one_line(flags, named, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "table.csv").write_text(TABLES["rows.csv"], "utf-8")
    result = call(own.main, *flags, check=2)
    assert result.code == 2 and named in error_line(result.err)
