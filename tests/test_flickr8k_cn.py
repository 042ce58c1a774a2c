"""Flickr8k-CN as its publishers give it, and everything that can be wrong with it, laid out as AI Challenger is."""
import collections
import errno
import json
import os
import re
import shutil
import subprocess
import sys

import h5py
import pytest
from conftest import ROOT, error_line, files_under, script
from PIL import Image

from config import get_config, run
from data import flickr8k_cn
from data.flickr8k_cn import CAPTIONS, LISTS, PICTURES
from pre_process import SPLITS

IDS = {"train": ["11_a", "22_b", "33_c", "44_d"], "valid": ["55_e", "66_f"], "test_a": ["77_g", "88_h"]}
SENTENCES = ["一只小狗在海边。", "两只小狗在草地上玩耍。", "小狗在跑", "一条狗跳起来接球。", "狗和球。"]


def sentence(name, number):
    return f"{SENTENCES[number]}{name[:2]}"


@pytest.fixture
def source(tmp_path):
    """What is published, tiny: eight pictures; sentence 0 of all, then sentence 1 of all, as in the real file."""
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


Result = collections.namedtuple("Result", "code out err")


@pytest.fixture
def convert(monkeypatch, capsys, tmp_path):
    """The script as run() ends it, in this process. Returns: function (source, *flags) -> Result."""
    def call(source, *flags):
        flags = flags or ("--out", tmp_path / "out")
        monkeypatch.setattr("sys.argv", ["flickr8k_cn.py", str(source), *map(str, flags)])
        capsys.readouterr()
        try:
            run(flickr8k_cn.main)
            code = 0
        except SystemExit as exit:
            code = exit.code
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def refused(convert, source, tmp_path):
    """Insist that a call ends in one line that says all of `words`, and changes nothing. Returns: function (*words)."""
    def call(*words):
        before = files_under(tmp_path)
        result = convert(source)
        assert result.code == 2, result
        line = error_line(result.err)
        assert len(result.err.splitlines()) == 1 and all(str(word) in line for word in words), line
        assert files_under(tmp_path) == before

    return call


def annotations(out, split):
    return json.loads((out / SPLITS[split][0] / SPLITS[split][2]).read_text("utf-8"))


def edit(path, *changes):
    """Replace each (old, new), once."""
    text = path.read_text("utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text, "utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def test_the_layout_is_ai_challengers_and_pictures_are_links(convert, source, tmp_path):
    result = convert(source)
    assert result.code == 0 and "left out" not in result.out and result.err == ""
    assert "train       4 pictures      20 captions\n" in result.out and "test_a      2 pictures" in result.out
    for split, ids in IDS.items():
        name, images, _ = SPLITS[split]
        assert annotations(tmp_path / "out", split) == [
            {"url": "", "image_id": f"{i}.jpg", "caption": [sentence(i, n) for n in range(5)]} for i in ids]
        assert {path.name for path in (tmp_path / "out" / name / images).iterdir()} == {f"{i}.jpg" for i in ids}
        for i in ids:
            assert (tmp_path / "out" / name / images / f"{i}.jpg").samefile(source / PICTURES / f"{i}.jpg")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {SPLITS[split][0] for split in IDS}


def test_pictures_are_copied_where_links_are_refused(convert, source, tmp_path, monkeypatch):
    convert(source)
    linked = files_under(tmp_path / "out")

    def link(*args, **keywords):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    assert convert(source, "--out", tmp_path / "copied").code == 0
    assert files_under(tmp_path / "copied") == linked
    assert not any(path.samefile(source / PICTURES / path.name) for path in (tmp_path / "copied").rglob("*.jpg"))


def test_a_picture_that_is_itself_a_link(convert, source, tmp_path):
    picture = source / PICTURES / "11_a.jpg"
    content = picture.read_bytes()
    picture.rename(source / "elsewhere.jpg")
    picture.symlink_to("../elsewhere.jpg")
    assert convert(source).code == 0
    assert (tmp_path / "out" / SPLITS["train"][0] / SPLITS["train"][1] / "11_a.jpg").read_bytes() == content


def test_pre_process_takes_it(source, tmp_path):
    out = tmp_path / "out"
    script("data/flickr8k_cn.py", source, "--out", out, cwd=tmp_path, check=0)
    script("pre_process.py", "--preset", "flickr8k_cn", "--data_dir", out, "--image_size", 32, check=0)
    for split, ids in IDS.items():
        with h5py.File(out / f"{split}.h5") as file:
            assert list(file["image_ids"].asstr()) == [f"{i}.jpg" for i in ids]
            assert file["raw_captions"].asstr()[0].tolist() == [sentence(ids[0], n) for n in range(5)]


def test_the_preset_keeps_to_its_own_folders_and_trains_from_either_start():
    config = get_config("flickr8k_cn")
    assert all(getattr(config, f"{name}_dir").endswith("/flickr8k_cn") for name in ("data", "model", "log"))
    assert config.encoder_weights == "imagenet" and not config.fine_tune_encoder
    assert get_config("flickr8k_cn", {"encoder_weights": "none", "fine_tune_encoder": True}).fine_tune_encoder


def test_carriage_returns_byte_order_marks_and_names_for_ids_change_nothing(convert, source, tmp_path):
    convert(source)
    for name in (CAPTIONS, *LISTS.values()):
        content = (source / name).read_bytes()
        (source / name).write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n") + b"\r\n")
    edit(source / LISTS["train"], ("22_b", "22_b.jpg"))
    result = convert(source)
    assert result.code == 0 and "Nothing to do" in result.out


# ---------------------------------------------------------------------------------------------------------------------
# Once more


def test_a_second_run_has_nothing_to_do(convert, source, tmp_path):
    convert(source)
    before = [(path, path.stat().st_mtime_ns) for path in sorted((tmp_path / "out").rglob("*"))]
    result = convert(source)
    assert result.code == 0 and "Nothing to do" in result.out and "train       4 pictures" in result.out
    assert [(path, path.stat().st_mtime_ns) for path in sorted((tmp_path / "out").rglob("*"))] == before


@pytest.mark.parametrize("split", IDS)
def test_a_missing_list_is_named_and_can_follow(convert, source, tmp_path, split):
    (source / LISTS[split]).rename(tmp_path / "later")
    result = convert(source)
    assert result.code == 0 and f"{split}: no {source / LISTS[split]}" in result.out
    assert ("pre_process.py needs" in result.out) == (split != "test_a")
    assert f"in no list: 2 ({IDS['test_a'][0]}.jpg, {IDS['test_a'][1]}.jpg)" in result.out or split != "test_a"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {SPLITS[s][0] for s in IDS if s != split}
    (tmp_path / "later").rename(source / LISTS[split])
    result = convert(source)
    assert result.code == 0 and f"Wrote {SPLITS[split][0]} into" in result.out
    assert len(annotations(tmp_path / "out", split)) == len(IDS[split])


def test_other_input_is_not_mixed_in(convert, refused, source, tmp_path):
    convert(source)
    edit(source / CAPTIONS, (sentence("55_e", 3), "别的句子"))
    refused(SPLITS["valid"][0], "remove it", "--out")
    shutil.rmtree(tmp_path / "out" / SPLITS["valid"][0])
    assert convert(source).code == 0
    assert "别的句子" in annotations(tmp_path / "out", "valid")[0]["caption"]
    (source / LISTS["test_a"]).unlink()
    refused(SPLITS["test_a"][0])


def test_other_pictures_are_not_mixed_in(convert, refused, source, tmp_path):
    convert(source)
    (source / PICTURES / "22_b.jpg").unlink()
    Image.new("RGB", (90, 90), (0, 200, 0)).save(source / PICTURES / "22_b.jpg")
    refused(SPLITS["train"][0])
    shutil.rmtree(tmp_path / "out" / SPLITS["train"][0])
    assert convert(source).code == 0
    (tmp_path / "out" / SPLITS["valid"][0] / SPLITS["valid"][1] / "55_e.jpg").unlink()
    refused(SPLITS["valid"][0])


def test_archives_of_ai_challenger_are_not_shadowed(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{SPLITS['train'][0]}.zip").write_bytes(b"")
    refused(SPLITS["train"][0])


@pytest.mark.parametrize("end, code", [(KeyboardInterrupt(), 130),
                                       (OSError(errno.ENOSPC, "No space left on device", "somewhere"), 2)])
def test_an_interrupted_run_leaves_nothing(convert, source, tmp_path, monkeypatch, end, code):
    links, make_link = [], os.link

    def link(*args):
        if len(links) == 2:
            raise end
        links.append(make_link(*args))

    def copyfile(*args):
        raise end

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", link)
        patch.setattr(shutil, "copyfile", copyfile)
        assert convert(source).code == code
    assert len(links) == 2
    assert files_under(tmp_path / "out") == {}
    assert convert(source).code == 0 and len(annotations(tmp_path / "out", "train")) == 4


def test_a_killed_run_leaves_nothing_half_and_the_next_one_clears_up(convert, source, tmp_path):
    child = os.fork()
    if not child:
        os.link = lambda *args: os._exit(9)
        convert(source)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert files_under(tmp_path / "out") and not any((tmp_path / "out" / SPLITS[split][0]).exists() for split in IDS)
    assert convert(source).code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {SPLITS[split][0] for split in IDS}


# ---------------------------------------------------------------------------------------------------------------------
# Broken input


@pytest.mark.parametrize("name", [PICTURES, CAPTIONS])
def test_what_must_be_there(refused, source, name):
    (source / name).rename(source / "moved")
    refused(source / name, "data/README.md")


def test_no_source_and_no_lists(refused, source):
    for name in LISTS.values():
        (source / name).unlink()
    refused(source, *LISTS.values(), "data/README.md")
    shutil.rmtree(source)
    refused(source)


def test_what_is_left_out_is_counted_and_named(convert, source, tmp_path):
    (source / PICTURES / "11_a.jpg").unlink()
    (source / LISTS["train"]).write_text("".join(f"{i}\n" for i in ["22_b", *IDS["train"], "99_i", "98_i", "97_i"]))
    lines = (source / CAPTIONS).read_text("utf-8").replace(f"#zhc#1 {sentence('33_c', 1)}", "#zhc#1 。")
    lines = lines.replace(f"#zhc#4 {sentence('33_c', 4)}", "#zhc#4")
    lines = "".join(line for line in lines.splitlines(True) if not line.startswith("44_d"))
    (source / CAPTIONS).write_text(lines, "utf-8")
    result = convert(source)
    assert result.code == 0
    assert "train       2 pictures       8 captions\n" in result.out
    for line in (f"not in {PICTURES}: 4 (11_a.jpg, 97_i.jpg, 98_i.jpg, ...)", "without a caption: 1 (44_d.jpg)",
                 "listed again: 1 (22_b.jpg)", "blank captions: 2 (33_c.jpg, 33_c.jpg)"):
        assert f"left out: train: {line}\n" in result.out
    kept = {entry["image_id"]: entry["caption"] for entry in annotations(tmp_path / "out", "train")}
    assert kept == {"22_b.jpg": [sentence("22_b", n) for n in range(5)],
                    "33_c.jpg": [sentence("33_c", n) for n in (0, 2, 3)]}


def test_a_split_without_any_picture(refused, source):
    (source / LISTS["valid"]).write_text("90_x\n91_x\n")
    refused(source / LISTS["valid"], PICTURES, CAPTIONS)


@pytest.mark.parametrize("one, other", [("train", "valid"), ("train", "test_a"), ("valid", "test_a")])
def test_a_picture_in_two_splits(refused, source, one, other):
    with open(source / LISTS[other], "a") as file:
        file.write(f"{IDS[one][1]}\n")
    refused(LISTS[one], LISTS[other], f"{IDS[one][1]}.jpg")


@pytest.mark.parametrize("line", [
    "<!DOCTYPE html>", "11_a.jpg 一只狗", "11_a.jpg#zhc#x 一只狗", "11_a.jpg#enc#9 a dog", "11_a#zhc#9 一只狗",
    "../11_a.jpg#zhc#9 一只狗", "a\\b.jpg#zhc#9 一只狗", "11_a.jpg#zhc#0 又一句", "11_a.jpg#zhc#9一只狗",
    f"11_a.jpg#zhc#{'9' * 5000} 一只狗"])
def test_wrong_lines_among_the_captions(refused, source, line):
    with open(source / CAPTIONS, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    refused(source / CAPTIONS, "line 42")


@pytest.mark.parametrize("line", ["<a href=x>", "../11_a", "/etc/passwd", "a\\b", "x" * 300, "11_a\0", "11_a 22_b"])
def test_wrong_lines_in_a_list(refused, source, line):
    with open(source / LISTS["valid"], "a") as file:
        file.write(f"\n{line}\n")
    refused(source / LISTS["valid"], "line 4")


@pytest.mark.parametrize("name", [CAPTIONS, LISTS["train"]])
def test_another_encoding(refused, source, name):
    lines = (source / name).read_bytes().split(b"\n")
    lines[2] += "狗".encode("gbk")
    (source / name).write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    refused(source / name, "line 3", "UTF-8")


@pytest.mark.parametrize("flags, named", [([], "FOLDER"), (["a", "b"], "b"), (["a", "--ou", "b"], "--ou"),
                                          (["--out"], "--out"), (["a", "--overwrite"], "--overwrite")])
def test_bad_arguments_end_in_one_line(convert, monkeypatch, capsys, flags, named):
    monkeypatch.setattr("sys.argv", ["flickr8k_cn.py", *flags])
    with pytest.raises(SystemExit) as exit:
        run(flickr8k_cn.main)
    assert exit.value.code == 2 and named in error_line(capsys.readouterr().err)


def test_a_file_where_the_folder_should_be(convert, source, tmp_path):
    (tmp_path / "file").write_text("")
    result = convert(source, "--out", tmp_path / "file" / "below")
    assert result.code == 2 and "file" in error_line(result.err)


# ---------------------------------------------------------------------------------------------------------------------
# One's own captions


def test_the_example_of_ones_own_captions_runs(tmp_path):
    """data/README.md's own commands, from a folder that has this repository's scripts and pictures."""
    block = next(block for block in re.findall(r"```bash\n(.*?)```", (ROOT / "data/README.md").read_text("utf-8"), re.S)
                 if "annotations" in block)
    (tmp_path / "images").symlink_to(ROOT / "images")
    (tmp_path / "pre_process.py").symlink_to(ROOT / "pre_process.py")
    done = subprocess.run(["bash", "-ec", f'python() {{ "{sys.executable}" "$@"; }}\n{block}'], cwd=tmp_path,
                          capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    for split, count in (("train", 2), ("valid", 1)):
        with h5py.File(tmp_path / "data/mine" / f"{split}.h5") as file:
            assert len(file["images"]) == 1 and (file["caption_lengths"][0] > 0).sum() == count
