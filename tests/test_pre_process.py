"""From archives and annotations to the word map and the data files, and everything that can be wrong with them."""
import hashlib
import json
import os
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import h5py
import jieba
import numpy as np
import pytest
from common import ROOT, call, error_line, files_under, script
from PIL import Image

import pre_process
from config import get_config
from datasets import CaptionDataset, decode_caption, load_word_map, tokenize, word_list
from pre_process import SPLITS
from utils import alone

SENTENCES = ["一个男人在打篮球", "草地上有一只狗", "两个孩子在沙滩上玩耍", "一个女人骑着自行车", "桌子上放着一本书"]
FLAGS = ("--image_size", "32", "--min_word_freq", "1")


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
    """The folder of one split as AI Challenger publishes it: a picture for each entry, and the annotations.

    Args:
        data_dir (Path). split (str). entries (list of dict). content (str): of the annotations, if not the entries.
    Returns:
        Path, of its folder; Path, of its pictures.
    """
    name, images_name, annotations_name = SPLITS[split]
    pictures = data_dir / name / images_name
    pictures.mkdir(parents=True)
    for item in entries:
        Image.new("RGB", (32, 32), tuple(colour(item["image_id"]))).save(pictures / item["image_id"], quality=100)
    (data_dir / name / annotations_name).write_text(json.dumps(entries) if content is None else content)
    return data_dir / name, pictures


def annotations_of(data_dir, split):
    return data_dir / SPLITS[split][0] / SPLITS[split][2]


def make_archive(folder, name_in_zip=lambda path: path):
    """Pack the folder of one split into its zip, and remove the folder. Returns: Path, of the zip."""
    archive = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*.*")):
            file.writestr(str(name_in_zip(path.relative_to(folder.parent))), path.read_bytes())
    shutil.rmtree(folder)
    return archive


@pytest.fixture
def data_dir(tmp_path):
    """Six training and two validation pictures with five captions each."""
    folder = tmp_path / "data"
    make_split(folder, "train", [entry(number) for number in range(6)])
    make_split(folder, "valid", [entry(number) for number in range(6, 8)])
    return folder


def preprocess(data_dir, *flags):
    tokenize("狗")  # reads the dictionary once, and not in every worker process
    return call(pre_process.main, "--data_dir", data_dir, *FLAGS, *flags, check=None)


def refused(data_dir, *words, flags=()):
    """Insist that a call ends in one line that says all of `words`, and leaves everything as it was."""
    before = files_under(data_dir.parent)
    result = preprocess(data_dir, *flags)
    assert result.code == 2, result
    line = error_line(result.err)
    for word in words:
        assert str(word) in line
    assert len(line) < 1000 and files_under(data_dir.parent) == before


def read(data_dir, split):
    """Everything in a data file. Returns: dict."""
    with h5py.File(data_dir / f"{split}.h5") as file:
        return dict(images=file["images"][:], captions=file["captions"][:], lengths=file["caption_lengths"][:],
                    image_ids=list(file["image_ids"].asstr()[:]), raw=file["raw_captions"].asstr()[:].tolist())


def load(data_dir, split):
    config = get_config(flags=dict(data_dir=str(data_dir), image_size=32))
    return CaptionDataset(config, split, load_word_map(data_dir))


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
            assert {name: (data.dtype, data.shape) for name, data in file.items()} == dict(
                images=(np.uint8, (n, 64, 64, 3)), captions=(np.int32, (n, 5, 42)), caption_lengths=(np.int32, (n, 5)),
                image_ids=(object, (n,)), raw_captions=(object, (n, 5)))
            assert file["images"].chunks is None and file["images"].compression is None
            attributes = dict(file.attrs)
            assert attributes["images_digest"] == hashlib.sha256(file["images"][:].tobytes()).hexdigest()
        assert attributes.pop("format_version") >= 1 and attributes.pop("jieba_version") == jieba.__version__
        assert all(len(attributes.pop(name)) == 64 for name in ("source", "word_map_digest", "images_digest"))
        assert attributes == dict(image_size=64, max_len=40, captions_per_image=5, min_word_freq=1, split=split)
        data = read(tiny, split)
        for ids, length, text in zip(data["captions"].reshape(-1, 42), data["lengths"].ravel(), sum(data["raw"], [])):
            words = [word_map.get(word, word_map["<unk>"]) for word in tokenize(text)]
            assert length == len(words) + 2 and not ids[length:].any()
            assert ids[:length].tolist() == [word_map["<start>"], *words, word_map["<end>"]]
    assert no_leftovers(tiny)


def test_the_word_map_counts_the_training_captions_and_rare_words_become_unknown(data_dir):
    annotations_of(data_dir, "train").write_text(json.dumps([entry(0, ["狗，猫，鸟", "狗，猫，鱼"]), entry(1, ["狗"])]))
    assert preprocess(data_dir, "--min_word_freq", 2).code == 0
    words = word_list(load_word_map(data_dir))
    assert words == ["<pad>", "，", "狗", "猫", "<unk>", "<start>", "<end>"]
    assert decode_caption(read(data_dir, "train")["captions"][0, 0], words) == ["狗", "，", "猫", "，", "<unk>"]
    assert report_of(data_dir, "train")["unknown_word_rate"] == pytest.approx(2 / 11)


def test_a_second_run_does_nothing_and_overwrite_makes_the_same_bytes(data_dir):
    assert preprocess(data_dir).code == 0
    first, changed = files_under(data_dir), (data_dir / "train.h5").stat().st_mtime_ns
    result = preprocess(data_dir)
    assert "Nothing to do" in result.out and files_under(data_dir) == first
    assert (data_dir / "train.h5").stat().st_mtime_ns == changed
    assert preprocess(data_dir, "--overwrite").code == 0
    assert files_under(data_dir) == first and (data_dir / "train.h5").stat().st_mtime_ns > changed


@pytest.mark.parametrize("flags", [("--image_size", 64), ("--max_len", 20), ("--captions_per_image", 4),
                                   ("--min_word_freq", 2)])
def test_other_settings_need_overwrite(flags, data_dir):
    assert preprocess(data_dir).code == 0
    refused(data_dir, data_dir / "train.h5", flags[0][2:], "--overwrite", flags=flags)
    assert preprocess(data_dir, *flags, "--overwrite").code == 0


def test_other_annotations_need_overwrite(data_dir):
    assert preprocess(data_dir).code == 0
    annotations_of(data_dir, "valid").write_text(json.dumps([entry(6)]))
    refused(data_dir, data_dir / "valid.h5", "--overwrite")
    assert preprocess(data_dir, "--overwrite").code == 0
    assert read(data_dir, "valid")["image_ids"] == [name_of(6)]


def test_no_word_map_changes_under_a_data_file_that_stays(data_dir):
    assert preprocess(data_dir).code == 0
    (data_dir / "train.h5").unlink()
    annotations_of(data_dir, "train").write_text(json.dumps([entry(0, ["别的词"])]))
    refused(data_dir, data_dir / "valid.h5", "another word map", "--overwrite")
    assert preprocess(data_dir, "--overwrite").code == 0
    load(data_dir, "valid")


def test_a_lost_data_file_is_made_again_alone(data_dir):
    assert preprocess(data_dir).code == 0
    first = files_under(data_dir)
    (data_dir / "train.h5").write_bytes(first["train.h5"][:3000])
    refused(data_dir, data_dir / "train.h5", "--overwrite")
    (data_dir / "train.h5").unlink()
    result = preprocess(data_dir)
    assert result.code == 0 and "train.h5" in result.out and "valid.h5" not in result.out
    assert files_under(data_dir) == first
    (data_dir / "WORDMAP.json").unlink()
    refused(data_dir, data_dir / "WORDMAP.json", "--overwrite")


def test_another_split_added_later_is_made_alone(data_dir):
    assert preprocess(data_dir).code == 0
    first = {name: (data_dir / name).stat().st_mtime_ns for name in ("train.h5", "valid.h5", "WORDMAP.json")}
    train = report_of(data_dir, "train")
    make_split(data_dir, "test_b", [entry(9)])
    assert preprocess(data_dir).code == 0
    assert {name: (data_dir / name).stat().st_mtime_ns for name in first} == first
    assert read(data_dir, "test_b")["image_ids"] == [name_of(9)]
    assert report_of(data_dir, "test_b")["pictures"] == 1 and report_of(data_dir, "train") == train
    (data_dir / "test_b.h5").unlink()
    for content in ("{", "[]", '{"splits": 3}'):
        (data_dir / "pre_process.json").write_text(content)
        refused(data_dir, data_dir / "pre_process.json")


def test_a_run_after_one_that_was_killed(data_dir):
    expected = data_dir.with_name("expected")
    shutil.copytree(data_dir, expected)
    assert preprocess(expected).code == 0
    make_archive(data_dir / SPLITS["train"][0])
    (data_dir / "train.h5.tmp").write_bytes(b"most of a disk")
    (data_dir / "WORDMAP.json.tmp").write_bytes(b"half a map")
    stale = data_dir / f"{SPLITS['train'][0]}.tmp" / "half" / "a_folder"
    stale.mkdir(parents=True)
    (stale / "old.jpg").write_bytes(b"")
    assert preprocess(data_dir).code == 0
    assert no_leftovers(data_dir)
    ours = files_under(data_dir)
    del ours[f"{SPLITS['train'][0]}.zip"]
    assert ours == files_under(expected)


def test_what_a_killed_run_left_does_not_count_against_the_disk(data_dir, monkeypatch):
    stale, usage = data_dir / "train.h5.tmp", shutil.disk_usage(data_dir)
    stale.write_bytes(b"most of a disk")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0) if stale.exists() else usage)
    assert preprocess(data_dir).code == 0


def test_a_worker_that_is_killed_is_told(data_dir, monkeypatch):
    monkeypatch.setattr(pre_process, "read_chunk", killed)
    result = preprocess(data_dir)
    assert result.code == 2 and "killed" in error_line(result.err)
    assert not list(data_dir.glob("*.h5")) and no_leftovers(data_dir)


def killed(paths, image_size):
    os._exit(9)


def test_two_runs_do_not_share_a_folder(data_dir):
    make_archive(data_dir / SPLITS["train"][0])
    with alone(data_dir / "pre_process.lock", "--data_dir"):
        refused(data_dir, data_dir, f"process {os.getpid()}", "--data_dir")
    assert preprocess(data_dir).code == 0


def workers_of(pid):
    """Process numbers of its children that are alive. Returns: set of int."""
    children = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has just ended
            continue
        if int(parent) == pid and state != "Z":
            children.add(int(path.parent.name))
    return children


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=60):
    """Returns: what the condition gives, once that is true; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_run_that_is_ended_leaves_no_process_and_no_lock(signum, code, data_dir):
    pictures = data_dir / SPLITS["train"][0] / SPLITS["train"][1]
    Image.new("RGB", (600, 600)).save(pictures / name_of(0), "PNG")
    entries = [entry(number) for number in range(2000)]
    for item in entries[1:]:
        (pictures / item["image_id"]).unlink(missing_ok=True)
        os.link(pictures / name_of(0), pictures / item["image_id"])
    annotations_of(data_dir, "train").write_text(json.dumps(entries))

    command = [sys.executable, str(ROOT / "pre_process.py"), "--data_dir", str(data_dir), *FLAGS]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        wait_until((data_dir / "train.h5.tmp").exists)
        workers = wait_until(lambda: workers_of(run.pid))
        second = preprocess(data_dir)
        run.send_signal(signum)
    assert second.code == 2 and f"process {run.pid}" in error_line(second.err)
    assert run.returncode == code
    wait_until(lambda: not any(map(is_alive, workers)), seconds=20)
    assert no_leftovers(data_dir) or signum == signal.SIGKILL
    with alone(data_dir / "pre_process.lock", "--data_dir"):
        pass


def without_sources(data_dir, *splits):
    for split in splits:
        shutil.rmtree(data_dir / SPLITS[split][0])


@pytest.mark.parametrize("gone", [("train", "valid"), ("train",)])
def test_sources_are_needed_no_longer_once_their_splits_are_done(gone, data_dir):
    assert preprocess(data_dir).code == 0
    first = {name: (data_dir / name).stat().st_mtime_ns for name in ("train.h5", "valid.h5", "WORDMAP.json")}
    without_sources(data_dir, *gone)
    assert "Nothing to do" in preprocess(data_dir).out
    make_split(data_dir, "test_a", [entry(9)])
    assert preprocess(data_dir).code == 0
    assert {name: (data_dir / name).stat().st_mtime_ns for name in first} == first
    assert read(data_dir, "test_a")["captions"].any() and load(data_dir, "test_a").image_ids == [name_of(9)]

    refused(data_dir, data_dir / "train.h5", "give --image_size 32", flags=("--image_size", 64))
    refused(data_dir, f"{data_dir / SPLITS['train'][0]}.zip", flags=("--overwrite",))
    (data_dir / "train.h5").unlink()
    refused(data_dir, f"{data_dir / SPLITS['train'][0]}.zip")


def test_nothing_is_made_again_where_a_test_split_has_lost_its_source(data_dir):
    make_split(data_dir, "test_a", [entry(9)])
    assert preprocess(data_dir).code == 0
    without_sources(data_dir, "test_a")
    refused(data_dir, SPLITS["test_a"][0], flags=("--overwrite",))


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("split", ["valid", "test_a"])
def test_a_picture_of_two_splits_is_told(split, is_there, data_dir):
    assert "share" not in preprocess(data_dir).out
    if not is_there:
        without_sources(data_dir, "train")
    make_split(data_dir.with_name("other"), split, [entry(3), entry(9)])
    if split == "valid":
        without_sources(data_dir, "valid")
        (data_dir / "valid.h5").unlink()
    shutil.move(data_dir.with_name("other") / SPLITS[split][0], data_dir)
    result = preprocess(data_dir)
    assert result.code == 0 and f"warning: train and {split} share 1 file names, such as {name_of(3)}" in result.out


# ---------------------------------------------------------------------------------------------------------------------
# Archives


ROOT_OF_TRAIN = SPLITS["train"][0]


@pytest.mark.parametrize("top", ["", f"{ROOT_OF_TRAIN}/{ROOT_OF_TRAIN}", "我的数据", f"AI/{ROOT_OF_TRAIN}"])
@pytest.mark.parametrize("packed", [True, False], ids=["archive", "folder"])
def test_folders_too_many_are_seen_through(top, packed, data_dir):
    folder = data_dir / ROOT_OF_TRAIN
    shutil.move(folder, data_dir / "moved")
    target = data_dir / "new" / ("" if packed else ROOT_OF_TRAIN) / top
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(data_dir / "moved", target)
    companion = f"__MACOSX/{SPLITS['train'][1]}/._{name_of(0)}"
    if packed:
        with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as file:
            for path in sorted((data_dir / "new").rglob("*.*")):
                file.write(path, path.relative_to(data_dir / "new"))
            file.writestr(companion, "")
        shutil.rmtree(data_dir / "new")
    else:
        shutil.move(data_dir / "new" / ROOT_OF_TRAIN, folder)
        (folder / companion).parent.mkdir(parents=True)
        (folder / companion).touch()
    result = preprocess(data_dir)
    assert result.code == 0 and ("1 files of macOS" in result.out) == packed
    assert_pictures_are_their_own(read(data_dir, "train"))
    assert "Nothing to do" in preprocess(data_dir).out


@pytest.mark.parametrize("encoding", ["gbk", "utf-8", "cp437"])
def test_names_in_an_archive_that_does_not_say_its_encoding(encoding, data_dir):
    """As Windows in China, macOS and old programs write them."""
    folder, name = data_dir / ROOT_OF_TRAIN, "été.jpg" if encoding == "cp437" else "图片1.jpg"
    pictures = folder / SPLITS["train"][1]
    shutil.move(pictures / name_of(0), pictures / name)
    annotations_of(data_dir, "train").write_text(json.dumps([{"image_id": name, "caption": SENTENCES}]))
    placeholder = "x" * len(name.encode(encoding)[:-4]) + ".jpg"
    archive = make_archive(folder, lambda path: path.with_name(placeholder) if path.name == name else path)
    archive.write_bytes(archive.read_bytes().replace(placeholder.encode(), name.encode(encoding)))
    assert preprocess(data_dir).code == 0
    assert read(data_dir, "train")["image_ids"] == [name]


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_missing_archive_is_a_users_error(split, data_dir):
    shutil.rmtree(data_dir / SPLITS[split][0])
    make_archive(data_dir / SPLITS["valid" if split == "train" else "train"][0])  # is not extracted before
    refused(data_dir, f"{data_dir / SPLITS[split][0]}.zip", "data/README.md", "data/sample.py")


@pytest.mark.parametrize("part", [1, 2])
def test_a_folder_without_its_parts_is_a_users_error(part, data_dir):
    path = data_dir / SPLITS["train"][0] / SPLITS["train"][part]
    path.unlink() if path.is_file() else shutil.rmtree(path)
    other = SPLITS["train"][3 - part]
    refused(data_dir, path, f"has is {other}", f"{SPLITS['train'][0]}.zip")


@pytest.mark.parametrize("name_in_zip", [lambda path: path, lambda path: path.relative_to(path.parts[0]),
                                         lambda path: str(path).replace("/", "\\")],
                         ids=["with its folder", "without", "packed on Windows"])
def test_an_archive_is_extracted_and_kept(name_in_zip, data_dir):
    folder = data_dir / SPLITS["train"][0]
    before = files_under(folder)
    archive = make_archive(folder, name_in_zip)
    with zipfile.ZipFile(archive, "a") as file:
        for name in ("__MACOSX/x.jpg", f"{folder.name}/.DS_Store", f"{folder.name}/"):
            file.writestr(name, "")
    packed = archive.read_bytes()
    assert preprocess(data_dir).code == 0
    assert files_under(folder) == before and archive.read_bytes() == packed
    assert_pictures_are_their_own(read(data_dir, "train"))
    archive.write_bytes(b"not looked at")
    assert "Nothing to do" in preprocess(data_dir).out


def patched(archive, change):
    content = bytearray(archive.read_bytes())
    change(content)
    archive.write_bytes(content)


def with_member(name, mode=stat.S_IFREG | 0o644, content=b"harm", times=1):
    def change(archive):
        with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(times):
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


def flip(content):
    content[content.index(b"\xff\xd8") + 100] ^= 255  # inside the first picture


def cut(content):
    del content[len(content) // 2:]


def deflate64(content):
    """As Windows packs a file of more than 2 GB."""
    for signature, at in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        struct.pack_into("<H", content, content.rindex(signature) + at, 9)


@pytest.mark.parametrize("change, method", [(deflate64, "deflate64"), (encrypted, "password")])
def test_a_whole_archive_that_python_cannot_unpack_names_the_way_out(change, method, data_dir):
    archive = make_archive(data_dir / SPLITS["train"][0])
    patched(archive, change)
    refused(data_dir, archive, method, "7-Zip", f"{data_dir / SPLITS['train'][0]}/")


ARCHIVES = {
    "cut short": lambda archive: patched(archive, cut),
    "empty": lambda archive: archive.write_bytes(b""),
    "a web page": lambda archive: archive.write_text("<html>404 Not Found</html>" * 1000),
    "a folder": lambda archive: archive.unlink() or archive.mkdir(),
    "bad checksum": lambda archive: patched(archive, flip),
    "parent": with_member("../evil"),
    "parent within": with_member(f"{SPLITS['train'][0]}/a/../../../evil"),
    "parent for Windows": with_member("..\\evil"),
    "absolute": with_member("OUTSIDE"),
    "absolute with three slashes": with_member("//OUTSIDE"),
    "absolute for Windows": with_member(f"{SPLITS['train'][0]}/a/C:evil"),
    "symbolic link": with_member(f"{SPLITS['train'][0]}/link", stat.S_IFLNK | 0o777, b"/etc/passwd"),
    "twice": with_member(f"{SPLITS['train'][0]}/file", times=2),
    "a file and its folder": lambda archive: [with_member(name)(archive) for name in ("a", "a/b")],
    "more than it declares": lambda archive: [with_member("a", content=bytes(10_000))(archive),
                                              patched(archive, forged)],
    "bomb": with_member(f"{SPLITS['train'][0]}/zeros", content=bytes(2**26)),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_bad_archive_is_refused_whole(kind, data_dir):
    archive = make_archive(data_dir / SPLITS["train"][0])
    ARCHIVES[kind](archive)
    refused(data_dir, archive)


# ---------------------------------------------------------------------------------------------------------------------
# Annotations


def changed(**keywords):
    return json.dumps([entry(0), {**entry(1), **keywords}])


def coco(images, **keywords):
    return json.dumps({"images": images, **keywords})


COCO_IMAGE = {"id": 1, "file_name": name_of(0)}
ANNOTATIONS = {
    "empty": "", "not JSON": "{'image_id': 1}", "half": json.dumps([entry(0)])[:-9], "not UTF-8": b'["\xff\xfe"]',
    "a number": "3", "an object": "{}", "no entries": "[]", "a list of strings": '["p00.jpg"]',
    "no image_id": json.dumps([{"caption": SENTENCES}]), "no caption": json.dumps([{"image_id": name_of(0)}]),
    "a caption that is one sentence": changed(caption=SENTENCES[0]),
    "a caption among which is null": changed(caption=[*SENTENCES, None]),
    "image_id a number": changed(image_id=17), "image_id empty": changed(image_id=""),
    "image_id with a folder": changed(image_id="a/p01.jpg"), "image_id a parent's": changed(image_id="../p01.jpg"),
    "image_id absolute": changed(image_id="/etc/passwd"), "image_id too long": changed(image_id="狗" * 90 + ".jpg"),
    "image_id with NUL": changed(image_id="p01\0.jpg"), "image_id in no encoding": changed(image_id="p\ud800.jpg"),
    "image_id repeated": changed(image_id=name_of(0)),
    "only empty captions": json.dumps([entry(0, ["", " "]), entry(1, [])]),
    "COCO without captions": coco([COCO_IMAGE]),
    "COCO images an object": coco({}), "COCO image a string": coco(["p00.jpg"]),
    "COCO image without id": coco([{"file_name": name_of(0)}]), "COCO image without name": coco([{"id": 1}]),
    "COCO id repeated": coco([COCO_IMAGE, {**COCO_IMAGE, "file_name": name_of(1)}]),
    "COCO annotation of no image": coco([COCO_IMAGE], annotations=[{"image_id": 2, "caption": "狗"}]),
    "COCO annotation without caption": coco([COCO_IMAGE], annotations=[{"image_id": 1}]),
}


@pytest.mark.parametrize("kind", ANNOTATIONS)
def test_bad_annotations_are_refused(kind, data_dir):
    content = ANNOTATIONS[kind]
    annotations_of(data_dir, "train").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(data_dir, annotations_of(data_dir, "train"))


def test_a_test_split_may_be_annotated_as_coco_is(data_dir):
    images = [{"id": 7, "file_name": name_of(11)}, {"id": "b", "file_name": name_of(10)}]
    notes = [{"image_id": "b", "caption": "草地上有一只狗"}, {"image_id": 7, "caption": "一个男人"},
             {"image_id": "b", "caption": "一只狗"}]
    make_split(data_dir, "test_a", [entry(10), entry(11)], coco(images, annotations=notes, info={}))
    assert preprocess(data_dir).code == 0
    data = read(data_dir, "test_a")
    assert data["image_ids"] == [name_of(11), name_of(10)]
    assert data["raw"] == [["一个男人", "", "", "", ""], ["草地上有一只狗", "一只狗", "", "", ""]]
    assert (data["lengths"] > 0).sum(axis=1).tolist() == [1, 2]
    assert_pictures_are_their_own(data)


@pytest.mark.parametrize("content", ["", coco([{"id": i, "file_name": name_of(i)} for i in (10, 11)])])
def test_a_test_split_may_have_no_captions(content, data_dir):
    folder, pictures = make_split(data_dir, "test_b", [entry(10), entry(11)], content)
    if not content:
        annotations_of(data_dir, "test_b").unlink()
        (pictures / "readme.txt").write_text("not a picture, and not named as one")
        (pictures / f"._{name_of(10)}").write_text("macOS's, not a picture")
        shutil.move(pictures / name_of(11), pictures / "p11.JPG")
    result = preprocess(data_dir)
    assert result.code == 0 and (f"{pictures}: 2 files left out" in result.out) == (not content)
    data = read(data_dir, "test_b")
    assert [name.lower() for name in data["image_ids"]] == [name_of(10), name_of(11)]
    assert not data["lengths"].any() and not data["captions"].any()
    assert_pictures_are_their_own(data)
    assert load(data_dir, "test_b").raw_captions == [[], []]


@pytest.mark.parametrize("name", [None, "照片.jpg".encode("gbk")], ids=["no pictures", "not UTF-8"])
def test_a_folder_without_annotations_that_cannot_be_listed(name, data_dir):
    _, pictures = make_split(data_dir, "test_a", [])
    annotations_of(data_dir, "test_a").unlink()
    if name:
        with open(bytes(pictures) + b"/" + name, "wb"):
            pass
    refused(data_dir, pictures)


def test_captions_of_every_kind(data_dir):
    captions = {
        0: ["", "  ", "草地上有一只狗", "。", "\u3000"],
        1: ["a dog on the grass", "一隻狗在草地上", "狗😀👍🏽", "坏\ud800字", "断\0开\u200b"],
        2: ["狗" + "和狗" * 30],
        3: [f"第{number}句" for number in range(8)],
        4: [],
        5: ["", "\ufeff。\ud800"],
        6: ["  一只 狗。\n"],
    }
    shutil.rmtree(data_dir / SPLITS["train"][0])
    entries = [entry(number, texts) for number, texts in captions.items()]
    make_split(data_dir, "train", entries, "\ufeff" + json.dumps(entries))  # with a byte order mark
    assert preprocess(data_dir, "--max_len", 6).code == 0

    data, words = read(data_dir, "train"), word_list(load_word_map(data_dir))
    assert data["image_ids"] == [name_of(number) for number in (0, 1, 2, 3, 6)]
    assert data["raw"] == [
        ["草地上有一只狗", "", "", "", ""],
        ["a dog on the grass", "一隻狗在草地上", "狗😀👍🏽", "坏字", "断开\u200b"],
        ["狗" + "和狗" * 30, "", "", "", ""],
        [f"第{number}句" for number in range(5)],
        ["一只 狗。", "", "", "", ""],
    ]
    assert_pictures_are_their_own(data)
    for ids, length, text in zip(data["captions"].reshape(-1, 8), data["lengths"].ravel(), sum(data["raw"], [])):
        assert decode_caption(ids[:length], words) == tokenize(text)[:6]
        n = len(tokenize(text))
        assert length == (0 if not text else n + 2 if n <= 6 else 7)  # one that is cut has no <end>
    kept = [tokenize(text) for texts in data["raw"] for text in texts if text]
    assert report_of(data_dir, "train") == dict(
        pictures=5, bad_pictures=[], captions=13, pictures_without_caption=2, empty_captions=6, extra_captions=3,
        cut_captions=sum(len(text) > 6 for text in kept), longest_caption=max(map(len, kept)),
        words=sum(map(len, kept)), unknown_word_rate=0, pictures_with_fewer_captions=3)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def spoil(pictures):
    """Four of the six training pictures, each broken in its own way."""
    (pictures / name_of(0)).unlink()
    (pictures / name_of(2)).write_bytes((pictures / name_of(2)).read_bytes()[:-200])
    (pictures / name_of(3)).write_bytes(b"")
    (pictures / name_of(5)).write_text("<html>404 Not Found</html>")


@pytest.mark.parametrize("share, code", [(0.01, 2), (0.66, 2), (0.67, 0), (0, 2)])
def test_more_unreadable_pictures_than_max_bad_images_stop_it(share, code, data_dir):
    pictures = data_dir / SPLITS["train"][0] / SPLITS["train"][1]
    spoil(pictures)
    result = preprocess(data_dir, "--max_bad_images", share)
    assert result.code == code and no_leftovers(data_dir)
    if code:
        assert str(pictures) in error_line(result.err) and "--max_bad_images" in error_line(result.err)
        assert not list(data_dir.glob("*.h5"))


def test_unreadable_pictures_are_left_out_and_listed(data_dir):
    annotations_of(data_dir, "train").write_text(json.dumps([entry(i, [f"第{i}张图"]) for i in range(6)]))
    pictures = data_dir / SPLITS["train"][0] / SPLITS["train"][1]
    spoil(pictures)
    shutil.copy(pictures / name_of(1), pictures / name_of(20))  # in no annotation: not taken either
    result = preprocess(data_dir, "--max_bad_images", 1)
    assert result.code == 0
    data, words = read(data_dir, "train"), word_list(load_word_map(data_dir))
    assert data["image_ids"] == [name_of(1), name_of(4)]
    assert [texts[0] for texts in data["raw"]] == ["第1张图", "第4张图"]
    assert ["".join(decode_caption(picture[0], words)) for picture in data["captions"]] == ["第1张图", "第4张图"]
    assert_pictures_are_their_own(data)
    assert np.array_equal(load(data_dir, "train")[[0, 1]][0], data["images"])
    report = report_of(data_dir, "train")
    assert report["pictures"] == report["captions"] == 2
    assert [bad["image_id"] for bad in report["bad_pictures"]] == [name_of(number) for number in (0, 2, 3, 5)]
    for bad in report["bad_pictures"]:
        assert bad["image_id"] in bad["reason"] and bad["image_id"] in result.err
    assert "Nothing to do" in preprocess(data_dir).out


def test_no_readable_picture_at_all_is_a_users_error(data_dir):
    pictures = data_dir / SPLITS["valid"][0] / SPLITS["valid"][1]
    for path in pictures.iterdir():
        path.write_bytes(b"")
    result = preprocess(data_dir, "--max_bad_images", 1)
    assert result.code == 2 and str(pictures) in error_line(result.err)
    assert not (data_dir / "valid.h5").exists() and no_leftovers(data_dir)


# ---------------------------------------------------------------------------------------------------------------------
# The disk


def full(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free))


def test_an_archive_without_room_is_not_extracted(data_dir, monkeypatch):
    archive = make_archive(data_dir / SPLITS["train"][0])
    full(monkeypatch, 1000)
    refused(data_dir, archive, "free", "--data_dir")


def test_a_data_file_without_room_is_not_begun(data_dir, monkeypatch):
    full(monkeypatch, 6 * 32 * 32 * 3)
    result = preprocess(data_dir)
    assert result.code == 2 and str(data_dir / "train.h5") in error_line(result.err)
    assert "--data_dir" in error_line(result.err)
    assert not list(data_dir.glob("*.h5")) and no_leftovers(data_dir)


@pytest.mark.parametrize("side, fits", [(160, "half"), (64, "pixels")])
def test_a_disk_that_fills_up_on_the_way(side, fits, data_dir):
    """HDF5 would crash at the end of the process where it held back pictures or captions."""
    limit = 6 * side * side * 3 // 2 if fits == "half" else 4096 + 6 * side * side * 3
    done = script("pre_process.py", "--data_dir", data_dir, *FLAGS, "--image_size", side, check=2,
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert str(data_dir / "train.h5") in error_line(done.stderr) and " MiB" in error_line(done.stderr)
    assert not list(data_dir.glob("*.h5")) and no_leftovers(data_dir)
