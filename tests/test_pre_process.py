"""From archives and annotations to the word map and the data files, and everything that can be
wrong with them.
"""
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

SENTENCES = ["一个男人在打篮球", "草地上有一只狗", "两个孩子在沙滩上玩耍", "一个女人骑着自行车",
             "桌子上放着一本书"]
FLAGS = ("--image_size", "32", "--min_word_freq", "1")


# --------------------------------------------------------------------------------------------------
# A data set of one's own


def colour(name):
    """The colour of the picture of this name: far from every other's."""
    number = int(name[1:3])
    return np.array([number % 5 * 60, number // 5 * 60, 128])


def name_of(number):
    return f"p{number:02}.jpg"


def entry(number, captions=SENTENCES):
    return {"url": "", "image_id": name_of(number), "caption": captions}


def make_split(data_dir, split, entries, content=None):
    """The folder of one split as AI Challenger publishes it: a picture for each entry, and the
    annotations, which may have other `content` (str). Returns the paths of it and of its pictures.
    """
    name, images_name, annotations_name = SPLITS[split]
    pictures = data_dir / name / images_name
    pictures.mkdir(parents=True)
    for item in entries:
        picture = Image.new("RGB", (32, 32), tuple(colour(item["image_id"])))
        picture.save(pictures / item["image_id"], quality=100)
    text = json.dumps(entries) if content is None else content
    (data_dir / name / annotations_name).write_text(text)
    return data_dir / name, pictures


def annotations_of(data_dir, split):
    return data_dir / SPLITS[split][0] / SPLITS[split][2]


def make_archive(folder, name_in_zip=lambda path: path):
    """Pack the folder of one split into its zip, whose path is returned, and remove it."""
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
    """A call ends in one line that says all of `words`, and leaves everything as it was."""
    before = files_under(data_dir.parent)
    result = preprocess(data_dir, *flags)
    assert result.code == 2, result
    line = error_line(result.err)
    for word in words:
        assert str(word) in line
    assert len(line) < 1000 and files_under(data_dir.parent) == before


def read(data_dir, split):
    with h5py.File(data_dir / f"{split}.h5") as file:
        return dict(images=file["images"][:], captions=file["captions"][:],
                    lengths=file["caption_lengths"][:],
                    image_ids=list(file["image_ids"].asstr()[:]),
                    raw=file["raw_captions"].asstr()[:].tolist())


def captions_in(data):
    """Ids, length and text of each caption in a data file."""
    ids = data["captions"].reshape(-1, data["captions"].shape[2])
    return zip(ids, data["lengths"].ravel(), sum(data["raw"], []))


def load(data_dir, split):
    config = get_config(flags=dict(data_dir=str(data_dir), image_size=32))
    return CaptionDataset(config, split, load_word_map(data_dir))


def report_of(data_dir, split):
    return json.loads((data_dir / "pre_process.json").read_text("utf-8"))["splits"][split]


def assert_pictures_are_their_own(data):
    assert len({len(array) for array in data.values()}) == 1
    for image_id, pixels in zip(data["image_ids"], data["images"]):
        assert np.abs(pixels.astype(int) - colour(image_id)).max() <= 4, image_id


def no_leftovers(folder):
    return not [path for path in folder.rglob("*") if ".tmp" in path.name]


def times(data_dir, *names):
    """When these files were last written."""
    return [(data_dir / name).stat().st_mtime_ns for name in names]


# --------------------------------------------------------------------------------------------------
# What it makes


def test_the_data_files_are_what_is_promised(tiny):
    word_map = load_word_map(tiny)
    for split, n in (("train", 12), ("valid", 4), ("test_a", 4)):
        with h5py.File(tiny / f"{split}.h5") as file:
            assert {name: (array.dtype, array.shape) for name, array in file.items()} == dict(
                images=(np.uint8, (n, 64, 64, 3)), captions=(np.int32, (n, 5, 42)),
                caption_lengths=(np.int32, (n, 5)), image_ids=(object, (n,)),
                raw_captions=(object, (n, 5)))
            assert file["images"].chunks is None and file["images"].compression is None
            pixels, attributes = file["images"][:].tobytes(), dict(file.attrs)
        assert attributes.pop("images_digest") == hashlib.sha256(pixels).hexdigest()
        assert attributes.pop("jieba_version") == jieba.__version__
        assert all(attributes.pop(name) for name in ("format_version", "source", "word_map_digest"))
        assert attributes == dict(image_size=64, max_len=40, captions_per_image=5, min_word_freq=1,
                                  split=split)
        for ids, length, text in captions_in(read(tiny, split)):
            words = [word_map.get(word, word_map["<unk>"]) for word in tokenize(text)]
            assert ids[:length].tolist() == [word_map["<start>"], *words, word_map["<end>"]]
            assert not ids[length:].any()
    assert no_leftovers(tiny)


def test_the_word_map_counts_the_training_captions_and_rare_words_become_unknown(data_dir):
    entries = [entry(0, ["狗，猫，鸟", "狗，猫，鱼"]), entry(1, ["狗"])]
    annotations_of(data_dir, "train").write_text(json.dumps(entries))
    assert preprocess(data_dir, "--min_word_freq", 2).code == 0
    words = word_list(load_word_map(data_dir))
    assert words == ["<pad>", "，", "狗", "猫", "<unk>", "<start>", "<end>"]
    first = read(data_dir, "train")["captions"][0, 0]
    assert decode_caption(first, words) == ["狗", "，", "猫", "，", "<unk>"]
    assert report_of(data_dir, "train")["unknown_word_rate"] == pytest.approx(2 / 11)


def test_a_second_run_does_nothing_and_overwrite_makes_the_same_bytes(data_dir):
    assert preprocess(data_dir).code == 0
    first, changed = files_under(data_dir), times(data_dir, "train.h5")
    assert "Nothing to do" in preprocess(data_dir).out and times(data_dir, "train.h5") == changed
    assert preprocess(data_dir, "--overwrite").code == 0
    assert files_under(data_dir) == first and times(data_dir, "train.h5") > changed


def test_other_settings_or_annotations_need_overwrite(data_dir):
    assert preprocess(data_dir).code == 0
    for flags in (("--image_size", 64), ("--max_len", 20), ("--min_word_freq", 2)):
        refused(data_dir, data_dir / "train.h5", flags[0][2:], "--overwrite", flags=flags)
    annotations_of(data_dir, "valid").write_text(json.dumps([entry(6)]))
    refused(data_dir, data_dir / "valid.h5", "--overwrite")
    assert preprocess(data_dir, "--max_len", 20, "--overwrite").code == 0
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
    names = ("train.h5", "valid.h5", "WORDMAP.json")
    first, train = times(data_dir, *names), report_of(data_dir, "train")
    make_split(data_dir, "test_b", [entry(9)])
    assert preprocess(data_dir).code == 0
    assert times(data_dir, *names) == first
    assert read(data_dir, "test_b")["image_ids"] == [name_of(9)]
    assert report_of(data_dir, "test_b")["pictures"] == 1
    assert report_of(data_dir, "train") == train
    (data_dir / "test_b.h5").unlink()
    (data_dir / "pre_process.json").write_text("{")  # nothing depends on it
    assert preprocess(data_dir).code == 0 and report_of(data_dir, "test_b")["pictures"] == 1


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


def test_a_worker_that_is_killed_is_told(data_dir, monkeypatch):
    monkeypatch.setattr(pre_process, "read_picture", killed)
    result = preprocess(data_dir)
    assert result.code == 2 and "killed" in error_line(result.err)
    assert not list(data_dir.glob("*.h5")) and no_leftovers(data_dir)


def killed(path, image_size):
    os._exit(9)


def test_two_runs_do_not_share_a_folder(data_dir):
    make_archive(data_dir / SPLITS["train"][0])
    with alone(data_dir / "pre_process.lock", "--data_dir"):
        refused(data_dir, data_dir, f"process {os.getpid()}", "--data_dir")
    assert preprocess(data_dir).code == 0


def workers_of(pid):
    """The numbers of its child processes."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=60):
    """What the condition gives, once that is true; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143),
                                          (signal.SIGKILL, -signal.SIGKILL)])
def test_a_run_that_is_ended_leaves_no_process_and_no_lock(signum, code, data_dir):
    pictures = data_dir / SPLITS["train"][0] / SPLITS["train"][1]
    Image.new("RGB", (600, 600)).save(pictures / name_of(0), "PNG")
    entries = [entry(number) for number in range(2000)]
    for item in entries[1:]:
        (pictures / item["image_id"]).unlink(missing_ok=True)
        os.link(pictures / name_of(0), pictures / item["image_id"])
    annotations_of(data_dir, "train").write_text(json.dumps(entries))

    command = [sys.executable, ROOT / "pre_process.py", "--data_dir", data_dir, *FLAGS]
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with subprocess.Popen(command, **silent) as run:
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
    names = ("train.h5", "valid.h5", "WORDMAP.json")
    first = times(data_dir, *names)
    without_sources(data_dir, *gone)
    assert "Nothing to do" in preprocess(data_dir).out
    make_split(data_dir, "test_a", [entry(9)])
    assert preprocess(data_dir).code == 0
    assert times(data_dir, *names) == first
    data = load(data_dir, "test_a")
    assert data.captions.any() and data.image_ids == [name_of(9)]

    source = data_dir / SPLITS["train"][0]
    refused(data_dir, data_dir / "train.h5", "give --image_size 32", flags=("--image_size", 64))
    refused(data_dir, f"{source}.zip", flags=("--overwrite",))
    (data_dir / "train.h5").unlink()
    refused(data_dir, f"{source}.zip")


def test_nothing_is_made_again_where_a_test_split_has_lost_its_source(data_dir):
    make_split(data_dir, "test_a", [entry(9)])
    assert preprocess(data_dir).code == 0
    without_sources(data_dir, "test_a")
    refused(data_dir, SPLITS["test_a"][0], flags=("--overwrite",))


@pytest.mark.parametrize("is_there", [True, False])
def test_a_picture_of_two_splits_is_told(is_there, data_dir):
    assert "share" not in preprocess(data_dir).out
    if not is_there:
        without_sources(data_dir, "train")
    make_split(data_dir, "test_a", [entry(3), entry(9)])
    warning = f"warning: train and test_a share 1 file names, such as {name_of(3)}"
    assert warning in preprocess(data_dir).out


# --------------------------------------------------------------------------------------------------
# Archives


ROOT_OF_TRAIN = SPLITS["train"][0]


@pytest.mark.parametrize("name_in_zip", [
    lambda path: path.relative_to(ROOT_OF_TRAIN), lambda path: str(path).replace("/", "\\"),
    lambda path: Path("我的数据", path), lambda path: Path(ROOT_OF_TRAIN, path)],
    ids=["without its folder", "packed on Windows", "one folder too many", "its folder twice"])
def test_an_archive_is_extracted_and_kept(name_in_zip, data_dir):
    archive = make_archive(data_dir / ROOT_OF_TRAIN, name_in_zip)
    with zipfile.ZipFile(archive, "a") as file:
        for name in (f"__MACOSX/{SPLITS['train'][1]}/._x.jpg", f"{ROOT_OF_TRAIN}/.DS_Store"):
            file.writestr(name, "")
    packed = archive.read_bytes()
    assert "2 files of macOS" in preprocess(data_dir).out
    assert archive.read_bytes() == packed and len(read(data_dir, "train")["image_ids"]) == 6
    assert_pictures_are_their_own(read(data_dir, "train"))
    archive.write_bytes(b"not looked at")
    assert "Nothing to do" in preprocess(data_dir).out


def test_a_folder_may_have_two_folders_too_many(data_dir):
    folder = data_dir / ROOT_OF_TRAIN
    shutil.move(folder, data_dir / "moved")
    shutil.move(data_dir / "moved", folder / "AI" / ROOT_OF_TRAIN)
    (folder / "__MACOSX" / SPLITS["train"][1]).mkdir(parents=True)
    assert preprocess(data_dir).code == 0 and len(read(data_dir, "train")["image_ids"]) == 6


@pytest.mark.parametrize("encoding", ["gbk", "utf-8", "cp437"])
def test_names_in_an_archive_that_does_not_say_its_encoding(encoding, data_dir):
    """As Windows in China, macOS and old programs write them."""
    folder = data_dir / ROOT_OF_TRAIN
    name = "été.jpg" if encoding == "cp437" else "图片1.jpg"
    pictures = folder / SPLITS["train"][1]
    shutil.move(pictures / name_of(0), pictures / name)
    entries = [{"image_id": name, "caption": SENTENCES}]
    annotations_of(data_dir, "train").write_text(json.dumps(entries))
    ascii_name = "x" * len(name.encode(encoding)[:-4]) + ".jpg"
    archive = make_archive(
        folder, lambda path: path.with_name(ascii_name) if path.name == name else path)
    packed = archive.read_bytes().replace(ascii_name.encode(), name.encode(encoding))
    archive.write_bytes(packed)
    assert preprocess(data_dir).code == 0
    assert read(data_dir, "train")["image_ids"] == [name]


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_missing_archive_is_a_users_error(split, data_dir):
    without_sources(data_dir, split)
    other = "valid" if split == "train" else "train"
    make_archive(data_dir / SPLITS[other][0])  # is not extracted before
    refused(data_dir, f"{data_dir / SPLITS[split][0]}.zip", "data/README.md", "data/sample.py")


@pytest.mark.parametrize("part", [1, 2])
def test_a_folder_without_its_parts_is_a_users_error(part, data_dir):
    path = data_dir / SPLITS["train"][0] / SPLITS["train"][part]
    path.unlink() if path.is_file() else shutil.rmtree(path)
    other = SPLITS["train"][3 - part]
    refused(data_dir, path, f"has is {other}", f"{SPLITS['train'][0]}.zip")


def patched(archive, change):
    content = bytearray(archive.read_bytes())
    change(content)
    archive.write_bytes(content)


def with_member(name, mode=stat.S_IFREG | 0o644, content=b"harm", times=1):
    def change(archive):
        with zipfile.ZipFile(archive, "a") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(times):
                outside = str(archive.parent.parent / "evil")
                member = zipfile.ZipInfo(name.replace("OUTSIDE", outside))
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
    "a folder": lambda archive: archive.unlink() or archive.mkdir(),
    "bad checksum": lambda archive: patched(archive, flip),
    "parent within": with_member(f"{ROOT_OF_TRAIN}/a/../../../evil"),
    "parent for Windows": with_member("..\\evil"),
    "absolute": with_member("OUTSIDE"),
    "absolute for Windows": with_member(f"{ROOT_OF_TRAIN}/a/C:evil"),
    "symbolic link": with_member(f"{ROOT_OF_TRAIN}/link", stat.S_IFLNK | 0o777, b"/etc/passwd"),
    "twice": with_member(f"{ROOT_OF_TRAIN}/file", times=2),
    "more than it declares": lambda archive: [
        with_member("a", content=bytes(10_000))(archive), patched(archive, forged)],
    "bomb": with_member(f"{ROOT_OF_TRAIN}/zeros", content=bytes(2**26)),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_bad_archive_is_refused_whole(kind, data_dir):
    archive = make_archive(data_dir / SPLITS["train"][0])
    ARCHIVES[kind](archive)
    refused(data_dir, archive)


# --------------------------------------------------------------------------------------------------
# Annotations


def changed(**keywords):
    return json.dumps([entry(0), {**entry(1), **keywords}])


def coco(images, **keywords):
    return json.dumps({"images": images, **keywords})


COCO_IMAGE = {"id": 1, "file_name": name_of(0)}
ANNOTATIONS = {
    "not JSON": "{'image_id': 1}", "not UTF-8": b'["\xff\xfe"]', "a number": "3", "an object": "{}",
    "no entries": "[]", "a list of strings": '["p00.jpg"]',
    "no image_id": json.dumps([{"caption": SENTENCES}]),
    "a caption that is one sentence": changed(caption=SENTENCES[0]),
    "a caption among which is null": changed(caption=[*SENTENCES, None]),
    "only empty captions": json.dumps([entry(0, ["", " "]), entry(1, [])]),
    **{f"image_id {name!a}": changed(image_id=name) for name in (
        17, "", "../p01.jpg", "狗" * 90 + ".jpg", "p01\0.jpg", "p\ud800.jpg", name_of(0))},
    "COCO without captions": coco([COCO_IMAGE]), "COCO image a string": coco(["p00.jpg"]),
    "COCO id repeated": coco([COCO_IMAGE, {**COCO_IMAGE, "file_name": name_of(1)}]),
    "COCO annotation of no image": coco([COCO_IMAGE], annotations=[{"image_id": 2}]),
}


@pytest.mark.parametrize("kind", ANNOTATIONS)
def test_bad_annotations_are_refused(kind, data_dir):
    content = ANNOTATIONS[kind]
    content = content.encode() if isinstance(content, str) else content
    annotations_of(data_dir, "train").write_bytes(content)
    refused(data_dir, annotations_of(data_dir, "train"))


def test_a_test_split_may_be_annotated_as_coco_is(data_dir):
    images = [{"id": 7, "file_name": name_of(11)}, {"id": "b", "file_name": name_of(10)}]
    notes = [{"image_id": "b", "caption": "草地上有一只狗"},
             {"image_id": 7, "caption": "一个男人"}, {"image_id": "b", "caption": "一只狗"}]
    make_split(data_dir, "test_a", [entry(10), entry(11)], coco(images, annotations=notes, info={}))
    assert preprocess(data_dir).code == 0
    data = read(data_dir, "test_a")
    assert data["image_ids"] == [name_of(11), name_of(10)]
    assert data["raw"] == [["一个男人", "", "", "", ""], ["草地上有一只狗", "一只狗", "", "", ""]]
    assert (data["lengths"] > 0).sum(axis=1).tolist() == [1, 2]
    assert_pictures_are_their_own(data)


@pytest.mark.parametrize("content", [
    "", coco([{"id": i, "file_name": name_of(i)} for i in (10, 11)])])
def test_a_test_split_may_have_no_captions(content, data_dir):
    folder, pictures = make_split(data_dir, "test_b", [entry(10), entry(11)], content)
    if not content:
        annotations_of(data_dir, "test_b").unlink()
        (pictures / "readme.txt").write_text("not a picture, and not named as one")
        (pictures / f"._{name_of(10)}").write_text("macOS's, not a picture")
        with open(bytes(pictures) + b"/" + "照片.jpg".encode("gbk"), "wb"):
            pass
        shutil.move(pictures / name_of(11), pictures / "p11.JPG")
    result = preprocess(data_dir)
    assert result.code == 0 and (f"{pictures}: 3 files left out" in result.out) == (not content)
    data = read(data_dir, "test_b")
    assert [name.lower() for name in data["image_ids"]] == [name_of(10), name_of(11)]
    assert not data["lengths"].any() and not data["captions"].any()
    assert_pictures_are_their_own(data)
    assert load(data_dir, "test_b").raw_captions == [[], []]


def test_a_test_split_without_annotations_and_pictures(data_dir):
    _, pictures = make_split(data_dir, "test_a", [])
    annotations_of(data_dir, "test_a").unlink()
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
    without_sources(data_dir, "train")
    entries = [entry(number, texts) for number, texts in captions.items()]
    make_split(data_dir, "train", entries, "\ufeff" + json.dumps(entries))
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
    for ids, length, text in captions_in(data):
        n = len(tokenize(text))
        assert decode_caption(ids[:length], words) == tokenize(text)[:6]
        assert length == (0 if not text else n + 2 if n <= 6 else 7)  # one that is cut has no <end>
    kept = [tokenize(text) for texts in data["raw"] for text in texts if text]
    sizes = [len(words) for words in kept]
    assert report_of(data_dir, "train") == dict(
        pictures=5, bad_pictures=[], captions=13, pictures_without_caption=2, empty_captions=6,
        extra_captions=3, cut_captions=sum(size > 6 for size in sizes), words=sum(sizes),
        longest_caption=max(sizes), unknown_word_rate=0, pictures_with_fewer_captions=3)


# --------------------------------------------------------------------------------------------------
# Pictures


def spoil(pictures):
    """Four of the six training pictures, each broken in its own way."""
    (pictures / name_of(0)).unlink()
    (pictures / name_of(2)).write_bytes((pictures / name_of(2)).read_bytes()[:-200])
    (pictures / name_of(3)).write_bytes(b"")
    (pictures / name_of(5)).write_text("<html>404 Not Found</html>")


@pytest.mark.parametrize("share, code", [(0.66, 2), (0.67, 0), (0, 2)])
def test_more_unreadable_pictures_than_max_bad_images_stop_it(share, code, data_dir):
    pictures = data_dir / SPLITS["train"][0] / SPLITS["train"][1]
    spoil(pictures)
    result = preprocess(data_dir, "--max_bad_images", share)
    assert result.code == code and no_leftovers(data_dir)
    if code:
        line = error_line(result.err)
        assert str(pictures) in line and "--max_bad_images" in line
        assert not list(data_dir.glob("*.h5"))


def test_unreadable_pictures_are_left_out_and_listed(data_dir):
    entries = [entry(number, [f"第{number}张图"]) for number in range(6)]
    annotations_of(data_dir, "train").write_text(json.dumps(entries))
    pictures = data_dir / SPLITS["train"][0] / SPLITS["train"][1]
    spoil(pictures)
    shutil.copy(pictures / name_of(1), pictures / name_of(20))  # in no annotation, and not taken
    result = preprocess(data_dir, "--max_bad_images", 1)
    assert result.code == 0
    data, words = read(data_dir, "train"), word_list(load_word_map(data_dir))
    assert data["image_ids"] == [name_of(1), name_of(4)]
    assert [texts[0] for texts in data["raw"]] == ["第1张图", "第4张图"]
    decoded = ["".join(decode_caption(picture[0], words)) for picture in data["captions"]]
    assert decoded == ["第1张图", "第4张图"]
    assert_pictures_are_their_own(data)
    assert np.array_equal(load(data_dir, "train")[[0, 1]][0], data["images"])
    report = report_of(data_dir, "train")
    assert report["pictures"] == report["captions"] == 2
    assert [bad["image_id"] for bad in report["bad_pictures"]] == [
        name_of(number) for number in (0, 2, 3, 5)]
    for bad in report["bad_pictures"]:
        assert bad["image_id"] in bad["reason"] and bad["image_id"] in result.err
    assert "Nothing to do" in preprocess(data_dir).out


def test_no_readable_picture_at_all_is_a_users_error(data_dir):
    pictures = data_dir / SPLITS["train"][0] / SPLITS["train"][1]
    for path in pictures.iterdir():
        path.write_bytes(b"")
    result = preprocess(data_dir, "--max_bad_images", 1)
    assert str(pictures) in error_line(result.err) and no_leftovers(data_dir)


# --------------------------------------------------------------------------------------------------
# The disk


@pytest.mark.parametrize("free, named", [
    (1000, f"{ROOT_OF_TRAIN}.zip"), (6 * 32 * 32 * 3, "train.h5")])
def test_what_has_no_room_is_not_begun(free, named, data_dir, monkeypatch):
    if free == 1000:
        make_archive(data_dir / ROOT_OF_TRAIN)
    usage = shutil._ntuple_diskusage(10**9, 10**9 - free, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    line = error_line(preprocess(data_dir).err)
    assert str(data_dir / named) in line and "--data_dir" in line
    assert not list(data_dir.glob("*.h5")) and no_leftovers(data_dir)


@pytest.mark.parametrize("side, fits", [(160, "half"), (64, "pixels")])
def test_a_disk_that_fills_up_on_the_way(side, fits, data_dir):
    """HDF5 would crash at the end of the process where it held back pictures or captions."""
    limit = 6 * side * side * 3 // 2 if fits == "half" else 4096 + 6 * side * side * 3
    done = script("pre_process.py", "--data_dir", data_dir, *FLAGS, "--image_size", side, check=2,
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    line = error_line(done.stderr)
    assert str(data_dir / "train.h5") in line and " MiB" in line
    assert not list(data_dir.glob("*.h5")) and no_leftovers(data_dir)
