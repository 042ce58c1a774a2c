"""From archives and annotations to the word map and the data files, and everything that can be wrong with them."""
import collections
import json
import os
import resource
import shutil
import stat
import struct
import subprocess
import sys
import time
import warnings
import zipfile

import h5py
import jieba
import numpy as np
import pytest
from conftest import ROOT, error_line, files_under, script
from PIL import Image

import pre_process
from config import get_config, run
from datasets import CaptionDataset, decode_caption, load_word_map, tokenize, word_list
from pre_process import SPLITS

SENTENCES = ["一个男人在打篮球", "草地上有一只狗", "两个孩子在沙滩上玩耍", "一个女人骑着自行车", "桌子上放着一本书"]


# ---------------------------------------------------------------------------------------------------------------------
# A data set of one's own


def colour(name):
    """The colour of the picture of this name: far from every other's. Returns: (3,) array."""
    number = int(name[1:3])
    return np.array([number % 5 * 60, number // 5 * 60, 128])


def name_of(number):
    return f"p{number:02}.jpg"


def entry(number, captions=SENTENCES):
    return {"url": "", "image_id": name_of(number), "caption": captions}


def make_split(data_dir, split, entries, content=None):
    """A split's folder as AI Challenger publishes it: a picture for each entry, and the annotations.

    Args:
        data_dir (Path). split (str). entries (list of dict). content (bytes): of the annotations, if not the entries.
    Returns:
        Path, of its folder; Path, of its pictures.
    """
    name, images_name, annotations_name = SPLITS[split]
    pictures = data_dir / name / images_name
    pictures.mkdir(parents=True)
    for item in entries:
        Image.new("RGB", (32, 32), tuple(colour(item["image_id"]))).save(pictures / item["image_id"], quality=100)
    if content is None:
        content = json.dumps(entries).encode()
    (data_dir / name / annotations_name).write_bytes(content)
    return data_dir / name, pictures


def make_archive(folder, top=True):
    """Pack a split's folder into its zip, and remove the folder. Returns: Path, of the zip."""
    archive = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*.*")):
            file.write(path, path.relative_to(folder.parent if top else folder))
    shutil.rmtree(folder)
    return archive


@pytest.fixture
def data_dir(tmp_path):
    """Six training and two validation pictures with five captions each."""
    folder = tmp_path / "data"
    make_split(folder, "train", [entry(number) for number in range(6)])
    make_split(folder, "valid", [entry(number) for number in range(6, 8)])
    return folder


Result = collections.namedtuple("Result", "code out err")
FLAGS = ("--image_size", "32", "--min_word_freq", "1")


@pytest.fixture
def preprocess(monkeypatch, capsys):
    """The script as run() ends it, in this process. Returns: function (data_dir, *flags) -> Result."""
    jieba.initialize()

    def call(data_dir, *flags):
        monkeypatch.setattr("sys.argv", ["pre_process.py", "--data_dir", str(data_dir), *FLAGS, *map(str, flags)])
        capsys.readouterr()
        try:
            run(pre_process.main)
            code = 0
        except SystemExit as exit:
            code = exit.code
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def refused(preprocess, tmp_path):
    """Insist that a call ends in one line that says all of `words`, and leaves nothing behind.

    Returns: function (data_dir, *words, flags=()) -> str, the line.
    """
    def call(data_dir, *words, flags=()):
        before = files_under(tmp_path)
        result = preprocess(data_dir, *flags)
        assert result.code == 2, result
        line = error_line(result.err)
        for word in words:
            assert str(word) in line
        assert files_under(tmp_path) == before
        return line

    return call


def read(data_dir, split):
    """Everything in a data file. Returns: dict."""
    with h5py.File(data_dir / f"{split}.h5") as file:
        return dict(images=file["images"][:], captions=file["captions"][:], lengths=file["caption_lengths"][:],
                    image_ids=list(file["image_ids"].asstr()[:]), raw=file["raw_captions"].asstr()[:].tolist())


def report_of(data_dir, split):
    return json.loads((data_dir / "pre_process.json").read_text("utf-8"))["splits"][split]


def assert_pictures_are_their_own(data):
    assert len(data["images"]) == len(data["image_ids"]) == len(data["captions"]) == len(data["raw"])
    for image_id, pixels in zip(data["image_ids"], data["images"]):
        assert np.abs(pixels.astype(int) - colour(image_id)).max() <= 4, image_id


def no_leftovers(folder):
    return not [path for path in folder.rglob("*") if ".tmp" in path.name]


# ---------------------------------------------------------------------------------------------------------------------
# What it makes


def test_the_data_files_are_what_is_promised(tiny):
    word_map = load_word_map(tiny)
    for split, n in (("train", 12), ("valid", 4), ("test_a", 4)):
        with h5py.File(tiny / f"{split}.h5") as file:
            assert set(file) == {"images", "captions", "caption_lengths", "image_ids", "raw_captions"}
            assert file["images"].dtype == np.uint8 and file["images"].shape == (n, 64, 64, 3)
            assert file["images"].chunks is None and file["images"].compression is None
            assert file["captions"].dtype == np.int32 and file["captions"].shape == (n, 5, 42)
            assert file["caption_lengths"].dtype == np.int32 and file["caption_lengths"].shape == (n, 5)
            assert file["image_ids"].shape == (n,) and file["raw_captions"].shape == (n, 5)
            attributes = dict(file.attrs)
            captions, lengths = file["captions"][:], file["caption_lengths"][:]
            raw = file["raw_captions"].asstr()[:]
        assert attributes["image_size"] == 64 and attributes["jieba_version"] == jieba.__version__
        assert attributes["max_len"] == 40 and attributes["captions_per_image"] == 5
        assert attributes["min_word_freq"] == 1 and attributes["split"] == split
        assert attributes["format_version"] >= 1 and len(attributes["word_map_digest"]) == 64
        for ids, length, sentence in zip(captions.reshape(-1, 42), lengths.ravel(), raw.ravel()):
            words = tokenize(sentence)
            assert length == len(words) + 2
            assert ids[0] == word_map["<start>"] and ids[length - 1] == word_map["<end>"] and not ids[length:].any()
            assert ids[1:length - 1].tolist() == [word_map.get(word, word_map["<unk>"]) for word in words]
    assert no_leftovers(tiny)


def test_the_word_map_counts_the_training_captions_only(tiny):
    entries = json.loads((tiny / SPLITS["train"][0] / SPLITS["train"][2]).read_text("utf-8"))
    counts = collections.Counter(word for item in entries for text in item["caption"] for word in tokenize(text))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    assert word_list(load_word_map(tiny)) == ["<pad>", *words, "<unk>", "<start>", "<end>"]


def test_rare_words_become_unknown(data_dir, preprocess):
    shutil.rmtree(data_dir / SPLITS["train"][0])
    make_split(data_dir, "train", [entry(0, ["狗 猫 鸟", "狗 猫 鱼"]), entry(1, ["狗"])])
    assert preprocess(data_dir, "--min_word_freq", 2).code == 0
    word_map = load_word_map(data_dir)
    assert word_list(word_map) == ["<pad>", "狗", "猫", "<unk>", "<start>", "<end>"]
    data = read(data_dir, "train")
    assert decode_caption(data["captions"][0, 0], word_list(word_map)) == ["狗", "猫", "<unk>"]
    assert report_of(data_dir, "train")["unknown_word_rate"] == pytest.approx(2 / 7)


def test_a_second_run_does_nothing_and_changed_settings_need_overwrite(tiny, tiny_flags, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(tiny, folder)
    flags = ["pre_process.py", *tiny_flags, "--data_dir", folder]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    started = time.perf_counter()
    done = script(*flags, check=0)
    assert "Nothing to do" in done.stdout and time.perf_counter() - started < 30
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before

    done = script(*flags, "--image_size", 32, check=2)
    for word in (folder / "train.h5", "image_size 64", "32", "--overwrite"):
        assert str(word) in error_line(done.stderr)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before

    done = script(*flags, "--image_size", 32, "--overwrite", check=0)
    assert read(folder, "train")["images"].shape == (12, 32, 32, 3)
    assert read(folder, "valid")["captions"].tolist() == read(tiny, "valid")["captions"].tolist()
    assert no_leftovers(folder)


def test_overwrite_makes_the_same_bytes_again(data_dir, preprocess):
    assert preprocess(data_dir).code == 0
    first, changed = files_under(data_dir), (data_dir / "train.h5").stat().st_mtime_ns
    assert preprocess(data_dir, "--overwrite").code == 0
    assert files_under(data_dir) == first and (data_dir / "train.h5").stat().st_mtime_ns > changed


@pytest.mark.parametrize("flags", [("--max_len", 20), ("--captions_per_image", 4), ("--min_word_freq", 2)])
def test_every_setting_that_matters_is_compared(flags, data_dir, preprocess, refused):
    assert preprocess(data_dir).code == 0
    refused(data_dir, data_dir / "train.h5", flags[0][2:], "--overwrite", flags=flags)


def test_changed_annotations_need_overwrite(data_dir, preprocess, refused):
    assert preprocess(data_dir).code == 0
    (data_dir / SPLITS["valid"][0] / SPLITS["valid"][2]).write_text(json.dumps([entry(6)]))
    refused(data_dir, data_dir / "valid.h5", "--overwrite")
    assert preprocess(data_dir, "--overwrite").code == 0
    assert read(data_dir, "valid")["image_ids"] == [name_of(6)]


def test_no_word_map_changes_under_a_data_file_that_stays(data_dir, preprocess, refused):
    assert preprocess(data_dir).code == 0
    (data_dir / "train.h5").unlink()
    (data_dir / SPLITS["train"][0] / SPLITS["train"][2]).write_text(json.dumps([entry(0, ["别的词"])]))
    refused(data_dir, data_dir / "valid.h5", "--overwrite")
    assert preprocess(data_dir, "--overwrite").code == 0
    CaptionDataset(get_config(flags=dict(data_dir=str(data_dir), image_size=32)), "valid", load_word_map(data_dir))


def test_a_lost_data_file_is_made_again_alone(data_dir, preprocess):
    assert preprocess(data_dir).code == 0
    first = files_under(data_dir)
    (data_dir / "train.h5").unlink()
    result = preprocess(data_dir)
    assert result.code == 0 and "train.h5" in result.out and "valid.h5" not in result.out
    assert files_under(data_dir) == first


def test_a_lost_word_map_is_a_users_error(data_dir, preprocess, refused):
    assert preprocess(data_dir).code == 0
    (data_dir / "WORDMAP.json").unlink()
    refused(data_dir, data_dir / "WORDMAP.json", "--overwrite")


def test_another_split_added_later_is_made_alone(data_dir, preprocess):
    assert preprocess(data_dir).code == 0
    first = {name: (data_dir / name).stat().st_mtime_ns for name in ("train.h5", "valid.h5", "WORDMAP.json")}
    train = report_of(data_dir, "train")
    make_split(data_dir, "test_b", [entry(9)])
    result = preprocess(data_dir)
    assert result.code == 0 and "test_b.h5" in result.out and "train.h5" not in result.out
    assert {name: (data_dir / name).stat().st_mtime_ns for name in first} == first
    assert read(data_dir, "test_b")["image_ids"] == [name_of(9)]
    assert report_of(data_dir, "test_b")["pictures"] == 1 and report_of(data_dir, "train") == train


@pytest.mark.parametrize("content", ["{", "[]", '{"splits": 3}', "", '{"splits": {"train": {"\\ud800": 1}}}'])
def test_a_damaged_report_is_a_users_error(content, data_dir, preprocess, refused):
    assert preprocess(data_dir).code == 0
    (data_dir / "pre_process.json").write_text(content)
    make_split(data_dir, "test_b", [entry(9)])
    refused(data_dir, data_dir / "pre_process.json")


def test_a_run_after_one_that_was_killed(data_dir, preprocess):
    expected = data_dir.with_name("expected")
    shutil.copytree(data_dir, expected)
    assert preprocess(expected).code == 0
    make_archive(data_dir / SPLITS["train"][0])
    (data_dir / "train.h5.tmp").write_bytes(b"half a file")
    (data_dir / "WORDMAP.json.tmp").write_bytes(b"half a map")
    stale = data_dir / f"{SPLITS['train'][0]}.tmp" / "half" / "a_folder"
    stale.mkdir(parents=True)
    (stale / "old.jpg").write_bytes(b"")
    assert preprocess(data_dir).code == 0
    assert no_leftovers(data_dir)
    ours = files_under(data_dir)
    del ours[f"{SPLITS['train'][0]}.zip"]
    assert ours == files_under(expected)


def test_what_a_killed_run_left_does_not_count_against_the_disk(data_dir, preprocess, monkeypatch):
    stale = data_dir / "train.h5.tmp"
    stale.write_bytes(b"most of a disk")
    usage = shutil.disk_usage(data_dir)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0) if stale.exists() else usage)
    assert preprocess(data_dir).code == 0
    assert no_leftovers(data_dir)


def killed(paths, image_size):
    os._exit(9)


def test_a_worker_that_is_killed_is_told(data_dir, preprocess, monkeypatch):
    monkeypatch.setattr(pre_process, "read_chunk", killed)
    result = preprocess(data_dir)
    assert result.code == 2 and "killed" in error_line(result.err)
    assert not list(data_dir.glob("*.h5")) and no_leftovers(data_dir)


def test_a_data_file_that_is_damaged_is_a_users_error(data_dir, preprocess, refused):
    assert preprocess(data_dir).code == 0
    (data_dir / "train.h5").write_bytes((data_dir / "train.h5").read_bytes()[:3000])
    refused(data_dir, data_dir / "train.h5", "--overwrite")
    assert preprocess(data_dir, "--overwrite").code == 0


# ---------------------------------------------------------------------------------------------------------------------
# Archives


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_missing_archive_is_a_users_error(split, data_dir):
    shutil.rmtree(data_dir / SPLITS[split][0])
    before = files_under(data_dir)
    done = script("pre_process.py", "--data_dir", data_dir, *FLAGS, check=2)
    assert f"{data_dir / SPLITS[split][0]}.zip" in error_line(done.stderr)
    assert "data/README.md" in error_line(done.stderr)
    assert files_under(data_dir) == before


def test_no_data_at_all_is_a_users_error(tmp_path, refused):
    refused(tmp_path / "nowhere", SPLITS["train"][0], "data/sample.py")


@pytest.mark.parametrize("part", [1, 2])
def test_a_folder_without_its_parts_is_a_users_error(part, data_dir, refused):
    path = data_dir / SPLITS["train"][0] / SPLITS["train"][part]
    path.unlink() if path.is_file() else shutil.rmtree(path)
    refused(data_dir, path, f"{SPLITS['train'][0]}.zip")


@pytest.mark.parametrize("top", [True, False])
def test_an_archive_is_extracted_and_kept(top, data_dir, preprocess):
    folder = data_dir / SPLITS["train"][0]
    before = files_under(folder)
    archive = make_archive(folder, top)
    with zipfile.ZipFile(archive, "a") as file:
        for name in ("__MACOSX/x.jpg", f"{folder.name}/.DS_Store", f"{folder.name}/"):
            file.writestr(name, "")
    packed = archive.read_bytes()
    assert preprocess(data_dir).code == 0
    assert files_under(folder) == before and archive.read_bytes() == packed
    assert_pictures_are_their_own(read(data_dir, "train"))


def test_an_archive_packed_on_windows(data_dir, preprocess):
    folder = data_dir / SPLITS["train"][0]
    before = files_under(folder)
    archive = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*.*")):
            file.writestr(str(path.relative_to(folder.parent)).replace("/", "\\"), path.read_bytes())
    shutil.rmtree(folder)
    assert preprocess(data_dir).code == 0
    assert files_under(folder) == before


def test_a_folder_already_extracted_is_used_as_it_is(data_dir, preprocess):
    (data_dir / f"{SPLITS['train'][0]}.zip").write_bytes(b"not looked at")
    assert preprocess(data_dir).code == 0


def patched(archive, change):
    content = bytearray(archive.read_bytes())
    change(content)
    archive.write_bytes(content)


def with_member(name, mode=stat.S_IFREG | 0o644, content=b"harm", twice=False):
    def change(archive):
        with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(2 if twice else 1):
                member = zipfile.ZipInfo(name.replace("OUTSIDE", str(archive.parent.parent / "evil")))
                member.external_attr, member.compress_type = mode << 16, zipfile.ZIP_DEFLATED
                file.writestr(member, content)
    return change


def encrypted(content):
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.rindex(signature) + flags] |= 1


def forged(content):
    """The last member says that it unpacks to half of what it does."""
    for signature, at in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        at += content.rindex(signature)
        struct.pack_into("<I", content, at, struct.unpack_from("<I", content, at)[0] // 2)


def nameless(content):
    """The last member's name begins with the zero that ends it."""
    content[content.rindex(b"PK\1\2") + 46] = 0


def flip(content):
    content[content.index(b"\xff\xd8") + 100] ^= 255  # inside the first picture


def cut(content):
    del content[len(content) // 2:]


ARCHIVES = {
    "cut short": lambda archive: patched(archive, cut),
    "one byte short": lambda archive: patched(archive, lambda content: content.pop()),
    "empty": lambda archive: archive.write_bytes(b""),
    "a web page": lambda archive: archive.write_text("<html>404 Not Found</html>" * 1000),
    "a folder": lambda archive: archive.unlink() or archive.mkdir(),
    "bad checksum": lambda archive: patched(archive, flip),
    "encrypted": lambda archive: patched(archive, encrypted),
    "parent": with_member("../evil"),
    "parent within": with_member(f"{SPLITS['train'][0]}/a/../../../evil"),
    "parent for Windows": with_member("..\\evil"),
    "absolute": with_member("OUTSIDE"),
    "absolute with two slashes": with_member("/OUTSIDE"),
    "absolute with three slashes": with_member("//OUTSIDE"),
    "absolute for Windows": with_member("C:\\evil"),
    "a share for Windows": with_member("\\\\evil\\share\\file"),
    "symbolic link": with_member(f"{SPLITS['train'][0]}/link", stat.S_IFLNK | 0o777, b"/etc/passwd"),
    "twice": with_member(f"{SPLITS['train'][0]}/file", twice=True),
    "twice under two names": lambda archive: [with_member(name)(archive) for name in ("a/file", "a//file")],
    "a file and its folder": lambda archive: [with_member(name)(archive) for name in ("a", "a/b")],
    "a drive within, for Windows": with_member(f"{SPLITS['train'][0]}/a/C:evil"),
    "more than it declares": lambda archive: [with_member("a", content=bytes(10_000))(archive),
                                              patched(archive, forged)],
    "a file without a name": lambda archive: patched(archive, nameless),
    "a folder with content": with_member("a/"),
    "bomb": with_member(f"{SPLITS['train'][0]}/zeros", content=bytes(2**26)),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_bad_archive_is_refused_whole(kind, data_dir, refused):
    archive = make_archive(data_dir / SPLITS["train"][0])
    ARCHIVES[kind](archive)
    refused(data_dir, archive)


def test_an_archive_of_too_many_members_is_refused(data_dir, refused, monkeypatch):
    archive = make_archive(data_dir / SPLITS["train"][0])
    monkeypatch.setattr(pre_process, "MEMBERS", 6)
    refused(data_dir, archive, "7 members")


def test_an_archive_within_an_archive_is_a_file_like_any_other(data_dir, preprocess):
    folder, pictures = make_split(data_dir, "test_a", [entry(10)])
    with zipfile.ZipFile(pictures / "inner.zip", "w") as file:
        file.writestr("harm", b"")
    (folder / SPLITS["test_a"][2]).unlink()
    make_archive(folder)
    assert preprocess(data_dir).code == 0
    assert sorted(path.name for path in folder.rglob("*.*")) == ["inner.zip", name_of(10)]


def test_names_that_differ_only_in_case_are_two_files_or_refused(data_dir, preprocess):
    make_split(data_dir, "test_a", [entry(10), {**entry(11), "image_id": "P10.jpg"}])
    make_archive(data_dir / SPLITS["test_a"][0])
    if preprocess(data_dir).code == 0:
        assert sorted(read(data_dir, "test_a")["image_ids"]) == ["P10.jpg", name_of(10)]


# ---------------------------------------------------------------------------------------------------------------------
# Annotations


def changed(**keywords):
    return json.dumps([entry(0), {**entry(1), **keywords}])


ANNOTATIONS = {
    "empty": b"", "not JSON": b"{'image_id': 1}", "half": json.dumps([entry(0)])[:-9], "not UTF-8": b'["\xff\xfe"]',
    "a number": "3", "null": "null", "a string": '"p00.jpg"', "an object": "{}", "no entries": "[]",
    "deeply nested": "[" * 100_000, "deeply nested objects": '{"images":' * 100_000,
    "a huge number": "[" + "9" * 10_000 + "]", "a list of strings": '["p00.jpg"]',
    "no image_id": json.dumps([{"caption": SENTENCES}]), "no caption": json.dumps([{"image_id": name_of(0)}]),
    "a caption that is one sentence": changed(caption=SENTENCES[0]),
    "a caption that is a number": changed(caption=[1]), "a caption that is null": changed(caption=None),
    "a caption among which is null": changed(caption=[*SENTENCES, None]),
    "image_id a number": changed(image_id=17), "image_id null": changed(image_id=None),
    "image_id a list": changed(image_id=["p01.jpg"]),
    "image_id empty": changed(image_id=""), "image_id with a folder": changed(image_id="a/p01.jpg"),
    "image_id with a backslash": changed(image_id="a\\p01.jpg"), "image_id a parent": changed(image_id=".."),
    "image_id a parent's file": changed(image_id="../p01.jpg"), "image_id absolute": changed(image_id="/etc/passwd"),
    "image_id with NUL": changed(image_id="p01\0.jpg"), "image_id too long": changed(image_id="狗" * 90 + ".jpg"),
    "image_id in no encoding": changed(image_id="p\ud800.jpg"),
    "image_id repeated": changed(image_id=name_of(0)),
    "only empty captions": json.dumps([entry(0, ["", " "]), entry(1, [])]),
    "no captions anywhere": json.dumps([entry(0, []), entry(1, [])]),
    "COCO without captions": json.dumps({"images": [{"id": 1, "file_name": name_of(0)}]}),
    "COCO images an object": json.dumps({"images": {}}),
    "COCO image a string": json.dumps({"images": ["p00.jpg"]}),
    "COCO image without id": json.dumps({"images": [{"file_name": name_of(0)}]}),
    "COCO image without name": json.dumps({"images": [{"id": 1}]}),
    "COCO id repeated": json.dumps({"images": [{"id": 1, "file_name": name_of(i)} for i in range(2)]}),
    "COCO id a list": json.dumps({"images": [{"id": [1], "file_name": name_of(0)}]}),
    "COCO name with a folder": json.dumps({"images": [{"id": 1, "file_name": "../p00.jpg"}]}),
    "COCO annotations an object": json.dumps({"images": [], "annotations": {}}),
    "COCO annotation of no image": json.dumps({"images": [{"id": 1, "file_name": name_of(0)}],
                                               "annotations": [{"image_id": 2, "caption": "狗"}]}),
    "COCO annotation without caption": json.dumps({"images": [{"id": 1, "file_name": name_of(0)}],
                                                   "annotations": [{"image_id": 1}]}),
}


@pytest.mark.parametrize("kind", ANNOTATIONS)
def test_bad_annotations_are_refused(kind, data_dir, refused):
    content = ANNOTATIONS[kind]
    path = data_dir / SPLITS["train"][0] / SPLITS["train"][2]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert len(refused(data_dir, path)) < 1000


def test_annotations_that_are_a_folder(data_dir, refused):
    path = data_dir / SPLITS["valid"][0] / SPLITS["valid"][2]
    path.unlink()
    path.mkdir()
    refused(data_dir, path)


def test_annotations_saved_with_a_byte_order_mark(data_dir, preprocess):
    path = data_dir / SPLITS["train"][0] / SPLITS["train"][2]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert preprocess(data_dir).code == 0


def test_a_test_split_may_be_annotated_as_coco_is(data_dir, preprocess):
    images = [{"id": 7, "file_name": name_of(11)}, {"id": "b", "file_name": name_of(10)}]
    notes = [{"image_id": "b", "caption": "草地上有一只狗"}, {"image_id": 7, "caption": "一个男人"},
             {"image_id": "b", "caption": "一只狗"}]
    make_split(data_dir, "test_a", [entry(10), entry(11)],
               json.dumps({"info": {}, "images": images, "annotations": notes}).encode())
    assert preprocess(data_dir).code == 0
    data = read(data_dir, "test_a")
    assert data["image_ids"] == [name_of(11), name_of(10)]
    assert data["raw"] == [["一个男人", "", "", "", ""], ["草地上有一只狗", "一只狗", "", "", ""]]
    assert (data["lengths"] > 0).sum(axis=1).tolist() == [1, 2]
    assert_pictures_are_their_own(data)


@pytest.mark.parametrize("content", [None, json.dumps({"images": [{"id": i, "file_name": name_of(i)}
                                                                  for i in (10, 11)]}).encode()])
def test_a_test_split_may_have_no_captions(content, data_dir, preprocess):
    folder, pictures = make_split(data_dir, "test_b", [entry(10), entry(11)], content or b"")
    if content is None:
        (folder / SPLITS["test_b"][2]).unlink()
        (pictures / "readme.txt").write_text("not a picture, and not named as one")
        shutil.move(pictures / name_of(11), pictures / "p11.JPG")
    assert preprocess(data_dir).code == 0
    data = read(data_dir, "test_b")
    assert [name.lower() for name in data["image_ids"]] == [name_of(10), name_of(11)]
    assert not data["lengths"].any() and not data["captions"].any()
    assert_pictures_are_their_own(data)
    dataset = CaptionDataset(get_config(flags=dict(data_dir=str(data_dir), image_size=32)), "test_b",
                             load_word_map(data_dir))
    assert dataset.raw_captions == [[], []] and not dataset[[0, 1]][2].any()


def test_a_file_name_that_is_not_utf_8_is_a_users_error(data_dir, refused):
    folder, pictures = make_split(data_dir, "test_a", [entry(10)])
    (folder / SPLITS["test_a"][2]).unlink()
    shutil.copy(pictures / name_of(10), bytes(pictures) + "/照片.jpg".encode("gbk"))
    refused(data_dir, pictures)


def test_an_empty_test_split_is_a_users_error(data_dir, refused):
    folder, pictures = make_split(data_dir, "test_a", [])
    (folder / SPLITS["test_a"][2]).unlink()
    refused(data_dir, pictures)


def test_captions_of_every_kind(data_dir, preprocess):
    captions = {
        0: ["", "  ", "草地上有一只狗", "。", "\u3000"],
        1: ["a dog on the grass", "一隻狗在草地上", "狗😀👍🏽", "坏\ud800字", "断\0开"],
        2: ["狗" + "和狗" * 30],
        3: [f"第{number}句" for number in range(8)],
        4: [],
        5: ["", ""],
        6: ["  一只 狗。\n"],
    }
    shutil.rmtree(data_dir / SPLITS["train"][0])
    make_split(data_dir, "train", [entry(number, texts) for number, texts in captions.items()])
    assert preprocess(data_dir, "--max_len", 6).code == 0

    data, words = read(data_dir, "train"), word_list(load_word_map(data_dir))
    assert data["image_ids"] == [name_of(number) for number in (0, 1, 2, 3, 6)]
    assert data["raw"] == [
        ["草地上有一只狗", "", "", "", ""],
        ["a dog on the grass", "一隻狗在草地上", "狗😀👍🏽", "坏?字", "断开"],
        ["狗" + "和狗" * 30, "", "", "", ""],
        [f"第{number}句" for number in range(5)],
        ["一只 狗。", "", "", "", ""],
    ]
    assert_pictures_are_their_own(data)
    for ids, lengths, texts in zip(data["captions"], data["lengths"], data["raw"]):
        for caption, length, text in zip(ids, lengths, texts):
            assert decode_caption(caption[:length], words) == tokenize(text)[:6]
            n = len(tokenize(text))
            assert length == (0 if not text else n + 2 if n <= 6 else 7)  # one that is cut has no <end>
            assert not caption[length:].any()
    kept = [tokenize(text) for texts in data["raw"] for text in texts if text]
    report = report_of(data_dir, "train")
    assert report["bad_pictures"] == [] and report["unknown_word_rate"] == 0
    assert {name: report[name] for name in (
        "pictures", "captions", "pictures_without_caption", "empty_captions", "extra_captions", "cut_captions",
        "longest_caption", "words", "pictures_with_fewer_captions")} == dict(
            pictures=5, captions=13, pictures_without_caption=2, empty_captions=6, extra_captions=3,
            cut_captions=sum(len(text) > 6 for text in kept), longest_caption=max(map(len, kept)),
            words=sum(map(len, kept)), pictures_with_fewer_captions=3)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def spoil(pictures):
    """Four of the six training pictures, each broken in its own way."""
    (pictures / name_of(0)).unlink()
    (pictures / name_of(2)).write_bytes((pictures / name_of(2)).read_bytes()[:-200])
    (pictures / name_of(3)).write_bytes(b"")
    (pictures / name_of(5)).write_text("<html>404 Not Found</html>")


def test_unreadable_pictures_stop_it(data_dir):
    pictures = data_dir / SPLITS["train"][0] / SPLITS["train"][1]
    spoil(pictures)
    done = script("pre_process.py", "--data_dir", data_dir, *FLAGS, check=2)
    assert str(pictures / name_of(0)) in error_line(done.stderr)
    assert "--max_bad_images" in error_line(done.stderr)
    assert not list(data_dir.glob("*.h5")) and no_leftovers(data_dir)


@pytest.mark.parametrize("share, code", [(0.66, 2), (0.67, 0), (0, 2)])
def test_their_share_decides(share, code, data_dir, preprocess):
    spoil(data_dir / SPLITS["train"][0] / SPLITS["train"][1])
    assert preprocess(data_dir, "--max_bad_images", share).code == code


def test_unreadable_pictures_are_left_out_and_listed(data_dir, preprocess):
    annotations = data_dir / SPLITS["train"][0] / SPLITS["train"][2]
    annotations.write_text(json.dumps([entry(number, [f"第{number}张图"]) for number in range(6)]))
    spoil(data_dir / SPLITS["train"][0] / SPLITS["train"][1])
    result = preprocess(data_dir, "--max_bad_images", 1)
    assert result.code == 0
    data = read(data_dir, "train")
    assert data["image_ids"] == [name_of(1), name_of(4)] and data["raw"] == [["第1张图"] + [""] * 4,
                                                                            ["第4张图"] + [""] * 4]
    words = word_list(load_word_map(data_dir))
    assert ["".join(decode_caption(picture[0], words)) for picture in data["captions"]] == ["第1张图", "第4张图"]
    assert_pictures_are_their_own(data)
    report = report_of(data_dir, "train")
    assert report["pictures"] == report["captions"] == 2
    assert [bad["image_id"] for bad in report["bad_pictures"]] == [name_of(number) for number in (0, 2, 3, 5)]
    for bad in report["bad_pictures"]:
        assert bad["image_id"] in bad["reason"] and bad["image_id"] in result.err
    assert no_leftovers(data_dir)

    dataset = CaptionDataset(get_config(flags=dict(data_dir=str(data_dir), image_size=32)), "train",
                             load_word_map(data_dir))
    assert np.array_equal(dataset[[0, 1]][0], data["images"])
    assert "Nothing to do" in preprocess(data_dir).out


def test_no_readable_picture_at_all_is_a_users_error(data_dir, preprocess):
    pictures = data_dir / SPLITS["valid"][0] / SPLITS["valid"][1]
    for path in pictures.iterdir():
        path.write_bytes(b"")
    result = preprocess(data_dir, "--max_bad_images", 1)
    assert result.code == 2 and str(pictures) in error_line(result.err)
    assert not (data_dir / "valid.h5").exists() and no_leftovers(data_dir)


def test_a_picture_beside_the_listed_ones_is_not_taken(data_dir, preprocess):
    pictures = data_dir / SPLITS["train"][0] / SPLITS["train"][1]
    shutil.copy(pictures / name_of(0), pictures / name_of(20))
    assert preprocess(data_dir).code == 0
    assert read(data_dir, "train")["image_ids"] == [name_of(number) for number in range(6)]


# ---------------------------------------------------------------------------------------------------------------------
# The disk


def full(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free))


def test_an_archive_without_room_is_not_extracted(data_dir, refused, monkeypatch):
    archive = make_archive(data_dir / SPLITS["train"][0])
    full(monkeypatch, 1000)
    refused(data_dir, archive, "free", "--data_dir")


def test_a_data_file_without_room_is_not_begun(data_dir, preprocess, monkeypatch):
    full(monkeypatch, 6 * 32 * 32 * 3)
    result = preprocess(data_dir)
    assert result.code == 2 and str(data_dir / "train.h5") in error_line(result.err)
    assert "--data_dir" in error_line(result.err)
    assert not list(data_dir.glob("*.h5")) and no_leftovers(data_dir)


@pytest.mark.parametrize("side, fits", [(64, "half"), (160, "half"), (64, "pixels")])
def test_a_disk_that_fills_up_on_the_way(side, fits, data_dir):
    """HDF5 would crash at the end of the process where it held back pictures of less than 64 KB, or captions."""
    limit = 6 * side * side * 3 // 2 if fits == "half" else 4096 + 6 * side * side * 3
    done = script("pre_process.py", "--data_dir", data_dir, *FLAGS, "--image_size", side, check=2,
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert str(data_dir / "train.h5") in error_line(done.stderr) and " MiB" in error_line(done.stderr)
    assert not list(data_dir.glob("*.h5")) and no_leftovers(data_dir)


FILL_UP = """
import sys, pre_process
pre_process.need_space = lambda *arguments: None  # as if something else took the rest of the disk meanwhile
pre_process.run(pre_process.main)
"""


def test_a_disk_that_is_really_full(data_dir, small_disk):
    """What was there stays, byte for byte; the exit code is that of a user's error, and not a crash at the end."""
    with open(small_disk / "filler", "wb") as file:
        file.write(bytes(2**20 - 160_000))
    shutil.copytree(data_dir, small_disk / "data")
    before = files_under(small_disk)
    done = subprocess.run([sys.executable, "-c", FILL_UP, "--data_dir", small_disk / "data", *FLAGS, "--image_size",
                           "100"], capture_output=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 2, done
    assert str(small_disk / "data" / "train.h5") in error_line(done.stderr) and " MiB" in error_line(done.stderr)
    after = files_under(small_disk)
    del after["data/WORDMAP.json"]
    assert after == before


@pytest.mark.parametrize("name", ["WORDMAP.json", "pre_process.json", "train.h5"])
def test_a_folder_in_the_place_of_a_file(name, data_dir, preprocess):
    (data_dir / name).mkdir()
    result = preprocess(data_dir)
    assert result.code == 2 and str(data_dir / name) in error_line(result.err)
    assert no_leftovers(data_dir)
