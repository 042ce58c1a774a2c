"""Flickr8k-CN as its publishers give it, and everything that can be wrong with it, laid out as AI
Challenger's is.
"""
import errno
import json
import os
import shutil

import h5py
import pytest
from common import call, error_line, files_under, script
from PIL import Image

import pre_process
from data import flickr8k_cn
from data.flickr8k_cn import CAPTIONS, LISTS, PICTURES
from pre_process import SPLITS

IDS = {"train": ["11_a", "22_b", "33_c", "44_d"], "valid": ["55_e", "66_f"],
       "test_a": ["77_g", "88_h"]}
SENTENCES = ["一只小狗在海边。", "两只小狗在草地上玩耍。", "小狗在跑", "一条狗跳起来接球。",
             "狗和球。"]


def sentence(name, number):
    return f"{SENTENCES[number]}{name[:2]}"


@pytest.fixture
def source(tmp_path):
    """What is published, tiny: sentence 0 of all pictures, then sentence 1, as in the real file."""
    folder = tmp_path / "source"
    (folder / PICTURES).mkdir(parents=True)
    names = sorted(name for names in IDS.values() for name in names)
    for i, name in enumerate(names):
        Image.new("RGB", (40, 30), (30 * i, 0, 0)).save(folder / PICTURES / f"{name}.jpg")
    lines = [f"{name}.jpg#zhc#{n} {sentence(name, n)}\n" for n in range(5) for name in names]
    (folder / CAPTIONS).write_text("".join(lines), "utf-8")
    for split, name in LISTS.items():
        (folder / name).write_text("".join(f"{i}\n" for i in IDS[split]))
    return folder


def convert(source):
    return call(flickr8k_cn.main, source, "--out", source.parent / "out", check=None)


def refused(source, *words):
    """A call ends in one line that says all of `words`, and changes nothing."""
    before = files_under(source.parent)
    result = convert(source)
    assert result.code == 2, result
    line = error_line(result.err)
    assert len(result.err.splitlines()) == 1 and all(str(word) in line for word in words), line
    assert files_under(source.parent) == before


def folder_of(source, split):
    return source.parent / "out" / SPLITS[split][0]


def annotations(source, split):
    return json.loads((folder_of(source, split) / SPLITS[split][2]).read_text("utf-8"))


def written(source):
    return {path.name for path in (source.parent / "out").iterdir() if path.suffix != ".lock"}


def edit(path, old, new):
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), "utf-8")


# --------------------------------------------------------------------------------------------------
# What is written


def test_the_layout_is_ai_challengers_and_pictures_are_links(source):
    out = source.parent / "out"
    done = script("data/flickr8k_cn.py", source, "--out", out, cwd=source.parent, check=0)
    assert "left out" not in done.stdout and done.stderr == ""
    assert "train       4 pictures      20 captions\n" in done.stdout
    for split, ids in IDS.items():
        assert annotations(source, split) == [
            {"url": "", "image_id": f"{i}.jpg", "caption": [sentence(i, n) for n in range(5)]}
            for i in ids]
        pictures = sorted((folder_of(source, split) / SPLITS[split][1]).iterdir())
        assert [path.name for path in pictures] == [f"{i}.jpg" for i in ids]
        assert all(path.samefile(source / PICTURES / path.name) for path in pictures)
    assert written(source) == {SPLITS[split][0] for split in IDS}

    call(pre_process.main, "--data_dir", out, "--image_size", 32)
    for split, ids in IDS.items():
        with h5py.File(out / f"{split}.h5") as file:
            assert list(file["image_ids"].asstr()) == [f"{i}.jpg" for i in ids]
            raw = file["raw_captions"].asstr()[0].tolist()
            assert raw == [sentence(ids[0], n) for n in range(5)]


def test_pictures_are_copied_where_links_are_refused(source, monkeypatch):
    picture = source / PICTURES / "11_a.jpg"
    picture.rename(source / "elsewhere.jpg")
    picture.symlink_to("../elsewhere.jpg")
    assert convert(source).code == 0
    linked = files_under(source.parent / "out")
    copy = next(folder_of(source, "train").rglob("11_a.jpg"))
    assert copy.read_bytes() == picture.read_bytes()

    def link(*args, **keywords):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    shutil.rmtree(source.parent / "out")
    monkeypatch.setattr(os, "link", link)
    assert convert(source).code == 0 and files_under(source.parent / "out") == linked
    copies = (source.parent / "out").rglob("*.jpg")
    assert not any(path.samefile(source / PICTURES / path.name) for path in copies)


def test_carriage_returns_byte_order_marks_and_names_for_ids_change_nothing(source):
    convert(source)
    folder = folder_of(source, "train")
    before = folder.stat().st_mtime_ns
    for name in (CAPTIONS, *LISTS.values()):
        content = (source / name).read_bytes()
        content = b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n") + b"\r\n"
        (source / name).write_bytes(content)
    edit(source / LISTS["train"], "22_b", "22_b.jpg")
    result = convert(source)
    assert "Nothing to do" in result.out and "train       4 pictures" in result.out
    assert folder.stat().st_mtime_ns == before


# --------------------------------------------------------------------------------------------------
# Once more


@pytest.mark.parametrize("split", ["valid", "test_a"])
def test_a_missing_list_is_named_and_can_follow(source, split):
    later = (source / LISTS[split]).rename(source / "later")
    result = convert(source)
    assert result.code == 0 and f"{split}: no {source / LISTS[split]}" in result.out
    assert ("pre_process.py needs" in result.out) == (split == "valid")
    assert f"in no list: 2 ({IDS[split][0]}.jpg, {IDS[split][1]}.jpg)" in result.out
    assert written(source) == {SPLITS[s][0] for s in IDS if s != split}
    later.rename(source / LISTS[split])
    assert f"Wrote {SPLITS[split][0]} into" in convert(source).out
    assert len(annotations(source, split)) == len(IDS[split])


def replace_picture(path):
    path.unlink()  # which is linked
    path.write_bytes(b"another one")


@pytest.mark.parametrize("split, change", [
    ("valid", lambda source: edit(source / CAPTIONS, sentence("55_e", 3), "别的句子")),
    ("test_a", lambda source: (source / LISTS["test_a"]).unlink()),
    ("train", lambda source: replace_picture(source / PICTURES / "22_b.jpg")),
    ("valid", lambda source: next(folder_of(source, "valid").rglob("55_e.jpg")).unlink()),
], ids=["captions", "list", "picture", "missing picture"])
def test_other_input_is_not_mixed_in(split, change, source):
    convert(source)
    change(source)
    refused(source, SPLITS[split][0], "remove it", "--out")
    shutil.rmtree(folder_of(source, split))
    assert convert(source).code == 0


def test_archives_of_ai_challenger_are_not_shadowed(source):
    (source.parent / "out").mkdir()
    folder_of(source, "train").with_suffix(".zip").write_bytes(b"")
    refused(source, SPLITS["train"][0])


def test_a_killed_run_leaves_nothing_half_and_the_next_one_clears_up(source):
    child = os.fork()
    if not child:
        os.link = lambda *args: os._exit(9)
        convert(source)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert written(source) and not any(folder_of(source, split).exists() for split in IDS)
    assert convert(source).code == 0
    assert written(source) == {SPLITS[split][0] for split in IDS}


# --------------------------------------------------------------------------------------------------
# Broken input


@pytest.mark.parametrize("names", [[PICTURES], [CAPTIONS], [*LISTS.values()]])
def test_what_must_be_there(source, names):
    for name in names:
        (source / name).rename(source / f"moved {name}")
    refused(source, *names, "data/README.md")


def test_what_is_left_out_is_counted_and_named(source):
    (source / PICTURES / "11_a.jpg").unlink()
    listed = ["22_b", *IDS["train"], "99_i", "98_i", "97_i"]
    (source / LISTS["train"]).write_text("".join(f"{i}\n" for i in listed))
    lines = (source / CAPTIONS).read_text("utf-8")
    lines = lines.replace(f"#zhc#1 {sentence('33_c', 1)}", "#zhc#1 。")
    lines = lines.replace(f"#zhc#4 {sentence('33_c', 4)}", "#zhc#4").splitlines(True)
    kept = "".join(line for line in lines if not line.startswith("44_d"))
    (source / CAPTIONS).write_text(kept, "utf-8")
    result = convert(source)
    assert "train       2 pictures       8 captions\n" in result.out
    for line in (f"not in {PICTURES}: 4 (11_a.jpg, 97_i.jpg, 98_i.jpg, ...)",
                 "without a caption: 1 (44_d.jpg)", "listed again: 1 (22_b.jpg)",
                 "blank captions: 2 (33_c.jpg, 33_c.jpg)"):
        assert f"left out: train: {line}\n" in result.out
    kept = {entry["image_id"]: entry["caption"] for entry in annotations(source, "train")}
    assert kept == {"22_b.jpg": [sentence("22_b", n) for n in range(5)],
                    "33_c.jpg": [sentence("33_c", n) for n in (0, 2, 3)]}
    (source / LISTS["valid"]).write_text("90_x\n91_x\n")
    refused(source, source / LISTS["valid"], PICTURES, CAPTIONS)


def test_a_picture_in_two_splits(source):
    with open(source / LISTS["test_a"], "a") as file:
        file.write("22_b\n")
    refused(source, LISTS["train"], LISTS["test_a"], "22_b.jpg")


@pytest.mark.parametrize("name, line", [
    *((CAPTIONS, line) for line in (
        "<!DOCTYPE html>", "11_a.jpg#zhc#x 一只狗", "11_a.jpg#enc#9 a dog", "11_a#zhc#9 一只狗",
        "../11_a.jpg#zhc#9 一只狗", "11_a.jpg#zhc#0 又一句", "11_a.jpg#zhc#9一只狗")),
    *((LISTS["valid"], line) for line in ("<a href=x>", "../11_a", "a\\b", "x" * 300))])
def test_a_wrong_line_is_named(source, name, line):
    number = len((source / name).read_text("utf-8").splitlines()) + 2
    with open(source / name, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    refused(source, source / name, f"line {number}")


@pytest.mark.parametrize("name", [CAPTIONS, LISTS["train"]])
def test_another_encoding(source, name):
    lines = (source / name).read_bytes().split(b"\n")
    lines[2] += "狗".encode("gbk")
    (source / name).write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    refused(source, source / name, "line 3", "UTF-8")
