"""Pixels, words, and batches."""
import dataclasses
import doctest
import json
import marshal
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
from unittest import mock

import h5py
import numpy as np
import pytest
import torch
from common import ROOT, files_under
from PIL import EpsImagePlugin, Image
from torch.utils.data._utils import signal_handling

import datasets
import models
from config import get_config
from datasets import (BadPicture, BatchSampler, CaptionDataset, build_word_map, decode_caption,
                      draft_size, encode_caption, kind_of, largest_batch_size, load_word_map,
                      make_loader, normalise, open_picture, read_image, short_names, tokenize,
                      word_list)
from pre_process import SPLITS
from utils import UserError, replacing, write_text

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.mark.parametrize("module", [datasets, models], ids=lambda module: module.__name__)
def test_the_examples_of_docstrings(module):
    assert doctest.testmod(module).failed == 0


# -------------------------------------------------------------------------------------------------
# Pixels


def plain(mode, colour, size=(8, 8), **save):
    return lambda path: Image.new(mode, size, colour).save(path, **save)


def palette(*colours, **save):
    """Saves a picture of mode P, filled with the first of these colours."""
    def write(path):
        picture = Image.new("P", (8, 8), 0)
        picture.putpalette([part for colour in colours for part in colour])
        picture.save(path, **save)
    return write


def sixteen_bits(value):
    return lambda path: Image.fromarray(np.full((8, 8), value, np.uint16)).save(path)


def animation(path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


PICTURES = {  # how it is saved, the colour that it must give, tolerance
    "rgb.png": (plain("RGB", (12, 34, 56)), (12, 34, 56), 0),
    "rgb.jpg": (plain("RGB", (12, 34, 56), quality=100), (12, 34, 56), 2),
    "rgb.webp": (plain("RGB", RED, lossless=True), RED, 0),
    "jpeg_named.png": (plain("RGB", (90, 90, 90), format="JPEG"), (90, 90, 90), 1),
    "tall.jpg": (plain("RGB", (90, 90, 90), (3, 20_000)), (90, 90, 90), 1),
    "gray.png": (plain("L", 77), (77, 77, 77), 0),
    "palette.png": (palette(GREEN, RED), GREEN, 0),
    "clear_palette.png": (palette(RED, GREEN, transparency=0), WHITE, 0),
    "half_clear_palette.png": (palette(RED, GREEN, transparency=bytes([128, 255])),
                               (255, 127, 127), 1),
    "clear_rgb.png": (plain("RGB", (9, 8, 7), transparency=(9, 8, 7)), WHITE, 0),
    "half_rgba.png": (plain("RGBA", (*BLUE, 128)), (127, 127, 255), 1),
    "half_la.png": (plain("LA", (0, 128)), (127, 127, 127), 1),
    "cmyk.jpg": (plain("CMYK", (0, 255, 255, 0), quality=100), RED, 3),
    "sixteen_bits.png": (sixteen_bits(128 * 257), (128, 128, 128), 1),
    "sixteen_bits_dark.png": (sixteen_bits(300), (1, 1, 1), 1),  # where clipping would give white
    "sixteen_bits.pgm": (lambda path: path.write_bytes(b"P5 4 4 65535\n" + b"\x80\x80" * 16),
                         (128, 128, 128), 1),
    "animation.gif": (animation, RED, 0),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_kind_of_picture_gives_its_colours(name, tmp_path):
    save, colour, tolerance = PICTURES[name]
    save(tmp_path / name)
    pixels = read_image(tmp_path / name, 40)
    assert pixels.dtype == np.uint8 and pixels.shape == (40, 40, 3)
    assert np.abs(pixels.astype(int) - colour).max() <= tolerance


@pytest.mark.parametrize("mode, suffix", [
    ("RGB", "png"), ("P", "png"), ("I;16", "png"), ("L", "tiff")])
@pytest.mark.parametrize("orientation, upright", [
    (1, lambda a: a), (2, np.fliplr), (3, lambda a: np.rot90(a, 2)), (4, np.flipud),
    (5, lambda a: a.swapaxes(0, 1)), (6, lambda a: np.rot90(a, -1)),
    (7, lambda a: np.rot90(a, 2).swapaxes(0, 1)), (8, np.rot90)])
def test_a_picture_is_turned_upright(mode, suffix, orientation, upright, tmp_path):
    shades = np.random.default_rng(0).integers(0, 256, (32, 24), np.uint8)
    if mode == "I;16":
        picture = Image.fromarray(shades * np.uint16(257))
    else:
        picture = Image.fromarray(shades).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / f"turned.{suffix}", exif=exif)
    expected = upright(np.stack([shades] * 3, axis=-1))
    found = open_picture(tmp_path / f"turned.{suffix}")
    assert np.array_equal(found, expected)
    assert np.array_equal(open_picture(found), expected), "what is upright was turned again"


TEXT, SHORT, SIGNED = 2, 3, 10  # EXIF's types; SIGNED is a quotient


def exif(*entries):
    """EXIF data as a camera writes it, sound or not; each entry: tag, type, count, 4 bytes."""
    packed = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4)


TURNED = (0x0112, SHORT, 1, b"\6\0")


@pytest.mark.parametrize("data, is_turned", [
    (exif(TURNED, (0x011a, SIGNED, 1, b"\x26")) + b"\xff" * 4 + bytes(4), True),  # -1 / 0
    (exif(TURNED, (0x011a, SIGNED, 1, b"\xff\xff")), True),  # its value is nowhere
    (exif((0x0112, TEXT, 2, b"6\0")), False),
    (exif((0x0112, SIGNED, 1, b"\x1a")) + bytes(8), False),
    (exif((0x0112, SHORT, 1, b"\x09\0")), False),
    (exif()[:-6], False),
    (b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", False),
    (b"Exif\0\0no such thing", False),
], ids=range(8))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_of_exif_only_the_orientation_counts_and_only_if_it_is_sound(
        data, is_turned, form, tmp_path):
    picture = Image.new("RGB", (200, 100), RED)
    picture.paste(BLUE, (100, 0, 200, 100))
    path = tmp_path / "photo.jpg"
    picture.save(path, form, exif=data)
    whole = np.asarray(open_picture(path))
    assert whole.shape == ((200, 100, 3) if is_turned else (100, 200, 3))
    for pixels in (whole, read_image(path, 32), read_image(path, 512)):  # a JPEG decoded small, not
        height, width, _ = pixels.shape
        upper_right = pixels[height // 4, 3 * width // 4].astype(int)
        assert np.abs(upper_right - (RED if is_turned else BLUE)).max() < 5


def test_a_picture_is_squeezed_into_the_square_whole(tmp_path):
    picture = Image.new("RGB", (400, 100), RED)
    picture.paste(BLUE, (200, 0, 400, 100))
    picture.save(tmp_path / "halves.png")
    pixels = read_image(tmp_path / "halves.png", 50)
    assert (pixels[:, :24] == RED).all() and (pixels[:, 26:] == BLUE).all()


def photograph(width, height):
    """A picture with the spectrum and the contrast between neighbours of a photograph."""
    rng = np.random.default_rng(0)
    rows = np.fft.fftfreq(height)[:, None] * height
    frequency = np.hypot(rows, np.fft.rfftfreq(width) * width)
    planes = []
    for _ in range(4):
        spectrum = np.fft.rfft2(rng.standard_normal((height, width)))
        planes.append(np.fft.irfft2(spectrum / np.maximum(frequency, 1) ** 1.4, (height, width)))
    pixels = np.stack([planes[0] + 0.4 * plane for plane in planes[1:]], axis=-1)
    return Image.fromarray((128 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("mode, orientation, keywords", [
    ("RGB", 1, {}), ("RGB", 1, dict(progressive=True)), ("CMYK", 1, {}), ("RGB", 6, {})], ids=str)
@pytest.mark.parametrize("size, side, reduction", [
    ((331, 240), 100, 1), ((335, 501), 128, 2), ((357, 269), 33, 4), ((607, 811), 37, 8)])
def test_a_large_jpeg_looks_the_same_decoded_small(
        mode, orientation, keywords, size, side, reduction, tmp_path):
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph(*size).convert(mode).save(path, exif=exif, quality=90, **keywords)
    assert draft_size(size, side) == (size[0] // reduction, size[1] // reduction)
    whole, pixels = open_picture(path), read_image(path, side)
    assert whole.size == (size[::-1] if orientation == 6 else size)
    expected = np.asarray(whole.resize((side, side), Image.Resampling.BILINEAR))
    assert np.abs(pixels.astype(float) - expected).mean() < 1


def noise(path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


def cut_short_and_large(path):
    photograph(800, 600).save(path)
    path.write_bytes(path.read_bytes()[:-9000])


def flipped(path):
    content = noise(path)
    path.write_bytes(content[:500] + bytes(100) + content[600:])


BROKEN = {
    "missing.jpg": lambda path: None,
    "empty.jpg": lambda path: path.write_bytes(b""),
    "folder.jpg": lambda path: path.mkdir(),
    "text.jpg": lambda path: path.write_text("<html>404 Not Found</html>"),
    "cut_short.jpg": lambda path: path.write_bytes(noise(path)[:-800]),
    "cut_short_large.jpg": cut_short_and_large,
    "cut_short.png": lambda path: path.write_bytes(noise(path)[:-800]),
    "flipped.png": flipped,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_picture_is_named(name, tmp_path):
    BROKEN[name](tmp_path / name)
    with pytest.raises(BadPicture) as error:
        read_image(tmp_path / name, 32)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / name}: ") and message.count(name) == 1
    assert "\n" not in message


@pytest.mark.parametrize("name, offset, form", [
    ("bomb.gif", lambda content: 6, "<HH"), ("bomb.bmp", lambda content: 18, "<ii"),
    ("bomb.jpg", lambda content: content.index(b"\xff\xc0") + 5, ">HH")])
def test_a_bomb_is_refused_before_it_is_decoded(name, offset, form, tmp_path):
    """A small file whose header says that it is 60,000 pixels wide and high."""
    Image.new("RGB", (8, 8), RED).save(tmp_path / name)
    content = bytearray((tmp_path / name).read_bytes())
    struct.pack_into(form, content, offset(content), 60_000, 60_000)
    (tmp_path / name).write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for open_it in (open_picture, lambda path: read_image(path, 32)):
        with pytest.raises(BadPicture, match="decompression bomb"):
            open_it(tmp_path / name)
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert taken < 100_000  # KB; decoded it is gigabytes


def test_a_picture_runs_no_program(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.jpg", "EPS")
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(BadPicture):
        read_image(tmp_path / "picture.jpg", 32)
    assert not (tmp_path / "ran").exists()


def test_training_and_demo_see_the_same_pixels(tiny):
    dataset = CaptionDataset(config_of(tiny), "train")
    given = dataset[list(range(len(dataset)))][0].numpy()
    folder = tiny / SPLITS["train"][0] / SPLITS["train"][1]
    for image_id, pixels in zip(dataset.image_ids, given, strict=True):
        assert np.array_equal(read_image(folder / image_id, 64), pixels)


@pytest.mark.parametrize("file_names, expected", [
    (["a.jpg", "b.WEBP", "c.tiff", "d", "e.v2", ".jpg"], ["a", "b", "c", "d", "e.v2", ".jpg"]),
    (["cat.jpg", "cat.png", "dog.jpg"], ["cat.jpg", "cat.png", "dog"]),
    (["cat.jpg", "cat.png", "cat.png.jpg"], ["cat.jpg", "cat.png", "cat.png.jpg"]),
    (["cat", "cat.jpg", "cat.jpg"], ["cat", "cat.jpg", "cat.jpg"]),
    (["image_3.jpg", "3.jpg", "image_4.jpg"], ["image_3.jpg", "3.jpg", "4"]),
])
def test_pictures_are_named_by_their_files(file_names, expected):
    assert short_names(file_names, prefix="image_") == expected


# -------------------------------------------------------------------------------------------------
# Words


@pytest.mark.parametrize("caption, words", [
    ("一个 男人\t在\u3000打篮球\n。", ["一个", "男人", "在", "打篮球"]),
    ("。。", []),
    ("", []),
    ("两个人，一只狗", ["两个", "人", "，", "一只", "狗"]),
    ("a man 打 NBA", ["a", "man", "打", "NBA"]),
    ("a\t\tman\r\non 。 3 CD", ["a", "man", "on", "3", "CD"]),
])
def test_tokenize(caption, words):
    assert tokenize(caption) == words


@pytest.mark.parametrize("nothing", [
    " ", "\n", "\u3000", "\0", "\x1b", "\ud83d", "\u200b", "\u200d", "\ufeff", "\u00ad", "\ufe0f",
    "\U000e0100", "\u2028\u200b "], ids=ascii)
def test_what_nobody_sees_is_no_word_and_parts_none(nothing):
    caption = "水里有3个穿着T恤的男人，在打篮球"
    assert tokenize(nothing.join(["", *caption, "。", ""])) == tokenize(caption)
    assert normalise(nothing) == normalise(f"{nothing}。{nothing}") == ""


@pytest.mark.parametrize("caption", ["一個男人騎著馬在沙灘上", "😀👍🏽", "<start><end><pad>",
                                     "1,000 % (x)", "café \ue000 ×𠀀ｶﾞ"])
def test_tokenize_keeps_every_character_that_is_seen_but_the_full_stop(caption):
    assert "".join(tokenize(caption)) == "".join(caption.split())


def test_a_cache_of_jieba_is_neither_read_nor_written(tmp_path):
    other_words = {"男": 0, "男人": 0, "男人在": 10 ** 9}, 10 ** 9
    (tmp_path / "jieba.cache").write_bytes(marshal.dumps(other_words))
    before = files_under(tmp_path)
    code = "import datasets as d; print(d.kind_of('跑步'), d.tokenize('一个男人在打篮球'))"
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          encoding="utf-8", env=environment, timeout=300)
    assert done.stdout.strip() == "noun ['一个', '男人', '在', '打篮球']", done.stderr
    assert files_under(tmp_path) == before


def test_kinds_of_words():
    kinds = {"noun": "狗 房子 草地 夜晚 词", "verb": "跑 玩耍 穿着",
             "colour or number": "红色 两个 一群", "function word": "的 在 是 ，"}
    for kind, words in kinds.items():
        assert {kind_of(word) for word in words.split()} == {kind}


def test_word_map_goes_by_frequency_then_by_code_point():
    captions = [["狗", "猫", "b"], ["狗", "a", "a"], ["猫", "狗", "一"]]
    expected = ["<pad>", "狗", "a", "猫", "b", "一", "<unk>", "<start>", "<end>"]
    word_map = build_word_map(captions, 1)
    assert word_map == {word: number for number, word in enumerate(expected)}
    assert list(word_map) == word_list(word_map) == expected
    assert list(build_word_map(reversed(captions), 1)) == expected
    special = build_word_map([["<unk>", "狗", "<pad>"]], 1)
    assert word_list(special) == ["<pad>", "狗", "<unk>", "<start>", "<end>"]


def test_words_to_ids_and_back():
    word_map = build_word_map([["一", "只", "狗"]], 1)
    words = word_list(word_map)
    start, end, unknown, dog = (word_map[word] for word in ("<start>", "<end>", "<unk>", "狗"))
    for tokens, expected, length in (
            (["狗", "猫"], [start, dog, unknown, end, 0, 0, 0], 4),
            (["狗"] * 5, [start, *[dog] * 5, end], 7),
            (["狗"] * 9, [start, *[dog] * 5, 0], 6),  # cut in mid-sentence, it does not end
            ([], [start, end, 0, 0, 0, 0, 0], 2)):
        ids, found_length = encode_caption(tokens, word_map, 5)
        assert ids.tolist() == expected and found_length == length
        known = [word if word in word_map else "<unk>" for word in tokens[:5]]
        assert decode_caption(ids, words) == decode_caption(torch.from_numpy(ids), words) == known
    assert decode_caption([dog, end, dog, end], words) == ["狗"]


SPECIAL = {"<pad>": 0, "<unk>": 1, "<start>": 2, "<end>": 3}


@pytest.mark.parametrize("content", [
    None, "", "{", "[]", "{}", b"\xff\xfe{}", json.dumps({**SPECIAL, "狗": 5}),
    json.dumps({**SPECIAL, "狗": 3}), json.dumps({**SPECIAL, "狗": "4"}),
    json.dumps({"狗": 0, "<pad>": 1, "<unk>": 2, "<start>": 3, "<end>": 4}),
    json.dumps({"<pad>": 0, "<unk>": 1, "<start>": 2}), json.dumps({**SPECIAL, "\x1b[31m": 4}),
], ids=lambda content: repr(content)[:50])
def test_a_damaged_or_missing_word_map_is_a_users_error(content, tmp_path):
    path = tmp_path / "WORDMAP.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="pre_process.py") as error:
        load_word_map(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------
# The data files


def config_of(folder, **settings):
    settings = dict(image_size=64, batch_size=4, workers=0) | settings
    return get_config(flags=dict(data_dir=str(folder), **settings))


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the tiny set's valid.h5 and word map, to be damaged."""
    for name in ("valid.h5", "WORDMAP.json"):
        shutil.copy(tiny / name, tmp_path)
    return tmp_path


def test_a_batch_holds_pictures_with_all_their_captions(tiny):
    word_map = load_word_map(tiny)
    dataset = CaptionDataset(config_of(tiny), "train", word_map)
    annotations = tiny / SPLITS["train"][0] / SPLITS["train"][2]
    entries = json.loads(annotations.read_text("utf-8"))
    assert len(dataset) == 12
    assert dataset.image_ids == [entry["image_id"] for entry in entries]
    assert dataset.raw_captions == [entry["caption"] for entry in entries]

    images, captions, lengths, rows = dataset[[7, 2, 2]]
    assert images.dtype == torch.uint8 and images.shape == (3, 64, 64, 3)
    assert captions.dtype == lengths.dtype == rows.dtype == torch.int64
    assert rows.tolist() == [7, 2, 2] and lengths.shape == (3, 5)
    assert captions.shape == (3, 5, lengths.max())
    assert torch.equal(images[1], images[2]) and not torch.equal(images[0], images[1])
    for i, row in enumerate(rows):
        for caption, length, sentence in zip(captions[i], lengths[i], entries[row]["caption"]):
            assert decode_caption(caption, word_list(word_map)) == tokenize(sentence)
            assert length == len(tokenize(sentence)) + 2
            assert caption[0] == word_map["<start>"] and caption[length - 1] == word_map["<end>"]
            assert not caption[length:].any()


def test_workers_give_the_batches_that_the_process_itself_gives(tiny):
    dataset = CaptionDataset(config_of(tiny), "train", load_word_map(tiny))
    alone = make_loader(dataset, config_of(tiny), training=True)
    helped = make_loader(dataset, config_of(tiny, workers=2), training=True)
    for epoch in (0, 1):
        alone.sampler.epoch = helped.sampler.epoch = epoch
        expected, given = list(alone), list(helped)
        assert len(given) == len(expected) == 3
        for one, other in zip(expected, given):
            assert all(map(torch.equal, one, other))
    pickled = pickle.dumps(dataset)  # as workers are started on macOS and Windows
    assert len(pickled) < 12 * 64 * 64 * 3 / 2, "it carries no pixels"
    assert all(map(torch.equal, dataset[[0, 5]], pickle.loads(pickled)[[0, 5]]))


def remake(name, change):
    """A change of a file: another data set under this name."""
    def damage(file):
        data = file[name][()]
        del file[name]
        file.create_dataset(name, **change(data))
    return damage


def fill(name, value):
    def damage(file):
        file[name][...] = value
    return damage


DAMAGE = {
    "no captions": lambda file: file.pop("captions"),
    "no attributes": lambda file: [file.attrs.pop(name) for name in list(file.attrs)],
    "floats": remake("images", lambda data: dict(data=data.astype(np.float32))),
    "chunks": remake("images", lambda data: dict(data=data, chunks=(1, 64, 64, 3))),
    "fewer pictures": remake("images", lambda data: dict(data=data[:-1])),
    "shorter captions": remake("captions", lambda data: dict(data=data[:, :, :-1])),
    "another image size": lambda file: file.attrs.update(image_size=32),
    "a newer format": lambda file: file.attrs.update(format_version=99),
    "lengths out of range": fill("caption_lengths", 99),
    "a start without an end": fill("caption_lengths", 1),
    "negative lengths": fill("caption_lengths", -1),
    "an id out of range": fill("captions", 9999),
    "negative ids": fill("captions", -1),
}


def refused(folder, *words, **settings):
    with pytest.raises(UserError) as error:
        CaptionDataset(config_of(folder, **settings), "valid", load_word_map(folder))
    for word in (folder / "valid.h5", "pre_process.py", *words):
        assert str(word) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_data_file_that_is_not_what_it_should_be(damage, folder):
    with h5py.File(folder / "valid.h5", "a") as file:
        DAMAGE[damage](file)
    refused(folder)


def linked(file, name, path, shape, dtype):
    file[name] = h5py.ExternalLink(path, name)


def softly_linked(file, name, path, shape, dtype):
    file["there"] = h5py.ExternalLink(path, "/")
    file[name] = h5py.SoftLink(f"/there/{name}")


def stored_elsewhere(file, name, path, shape, dtype):
    file.create_dataset(name, shape, dtype, external=[(path, 0, h5py.h5f.UNLIMITED)])


def virtual(file, name, path, shape, dtype):
    layout = h5py.VirtualLayout(shape, dtype)
    layout[:] = h5py.VirtualSource(path, name, shape)
    file.create_virtual_dataset(name, layout)


@pytest.mark.parametrize("make", [linked, softly_linked, stored_elsewhere, virtual])
@pytest.mark.parametrize("name", ["captions", "caption_lengths"])
def test_a_data_file_reads_no_other(make, name, folder):
    with h5py.File(folder / "valid.h5", "a") as file:
        with h5py.File(folder / "elsewhere.h5", "w") as other:
            file.copy(name, other)
        shape, dtype = file[name].shape, file[name].dtype
        del file[name]
        make(file, name, folder / "elsewhere.h5", shape, dtype)
    refused(folder, f"{name} lies in another file")


def unreadable(folder, *words, file="valid.h5"):
    """Insist on one line that says all of `words`, and nothing of making it again, which would lose
    corrections.
    """
    with pytest.raises((UserError, OSError)) as error:
        CaptionDataset(config_of(folder), "valid", load_word_map(folder))
    assert all(word in str(error.value) for word in (str(folder / file), *words))
    assert "damaged" not in str(error.value) and "--overwrite" not in str(error.value)


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_data_file_that_a_notebook_has_open(mode, folder):
    path = str(folder / "valid.h5")
    notebook = f"import h5py; file = h5py.File({path!r}, {mode!r}); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", notebook], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        if mode == "r":
            CaptionDataset(config_of(folder), "valid", load_word_map(folder))
        else:
            unreadable(folder, "open for writing", "close it")
        process.kill()


@pytest.mark.parametrize("file", ["valid.h5", "WORDMAP.json"])
def test_a_file_that_may_not_be_read(file, folder):
    if os.geteuid() == 0:  # who may read everything
        (folder / file).unlink()
        (folder / file).mkdir()
    else:
        (folder / file).chmod(0)
    unreadable(folder, file=file)


@pytest.mark.parametrize("content", [
    lambda whole: b"", lambda whole: b"not HDF5 at all" * 1000, lambda whole: bytes(len(whole)),
    *(lambda whole, share=share: whole[:int(share * len(whole))] for share in (0.01, 0.5, 0.9999))])
def test_a_data_file_that_is_not_whole_or_not_there(content, folder):
    path = folder / "valid.h5"
    path.write_bytes(content(path.read_bytes()))
    refused(folder)
    path.unlink()
    refused(folder)


def test_a_caption_corrected_with_h5py_is_used(tiny, tmp_path, monkeypatch):
    """By the lines of data/README.md."""
    (tmp_path / "data").mkdir()
    for name in ("train.h5", "WORDMAP.json"):
        shutil.copy(tiny / name, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    names = {}
    page = (ROOT / "data/README.md").read_text("utf-8")
    exec(re.search(r"```python\n(import h5py.*?)```", page, re.S)[1], names)
    row, number, text = names["row"], names["number"], names["text"]

    word_map = load_word_map(tiny)
    before = CaptionDataset(config_of(tiny), "train", word_map)
    after = CaptionDataset(config_of(tmp_path / "data"), "train", word_map)
    assert after.raw_captions[row][number] == text != before.raw_captions[row][number]
    ids, length = encode_caption(tokenize(text), word_map, 40)
    _, captions, lengths, _ = after[[row]]
    assert captions[0, number, :length].tolist() == ids[:length].tolist()
    assert lengths[0, number] == length
    after.raw_captions[row][number] = before.raw_captions[row][number]
    assert after.raw_captions == before.raw_captions
    assert torch.equal(after[[row]][0], before[[row]][0])


@pytest.mark.parametrize("settings, flag", [
    (dict(image_size=128), "--image_size 64"), (dict(max_len=20), "--max_len 40"),
    (dict(captions_per_image=3), "--captions_per_image 5")])
def test_a_data_file_of_other_settings_names_the_flag_that_fits_it(settings, flag, folder):
    refused(folder, *settings.values(), f"give {flag}, or", **settings)


def test_a_data_file_of_another_word_map(folder):
    write_text(folder / "WORDMAP.json", json.dumps(build_word_map([["狗"]], 1)))
    refused(folder, "another word map")


# -------------------------------------------------------------------------------------------------
# Who reads what


def sampler_of(n, batch_size, training=True, seed=0, rank=0, processes=1):
    with (mock.patch("datasets.rank", return_value=rank),
          mock.patch("datasets.world_size", return_value=processes)):
        return BatchSampler(n, batch_size, training, seed)


def epoch_of(n, batch_size, processes=1, epoch=0, training=True, seed=0):
    """Batches of each process in one epoch: lists (processes) of lists (steps) of lists of rows."""
    shares = []
    for rank in range(processes):
        sampler = sampler_of(n, batch_size, training, seed, rank, processes)
        sampler.epoch = epoch
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler)
    return shares


def rows_of(shares):
    return [row for share in shares for batch in share for row in batch]


def global_batches(shares):
    assert len({len(share) for share in shares}) == 1, "processes with fewer steps wait for ever"
    return [set().union(*parts) for parts in zip(*shares)]


@pytest.mark.parametrize("n, batch_size", [
    (48, 8), (50, 8), (55, 8), (9, 4), (8, 8), (7, 16), (30, 6)])
def test_training_has_the_same_global_batches_however_many_processes_share_them(n, batch_size):
    whole = global_batches(epoch_of(n, batch_size))
    size = min(batch_size, n)
    assert len(whole) == n // size and all(len(batch) == size for batch in whole)
    for processes in (1, 2, 4):
        shares = epoch_of(n, batch_size, processes)
        assert global_batches(shares) == whole
        rows = rows_of(shares)
        assert len(rows) == len(set(rows)) == n // size * size and set(rows) <= set(range(n))
        sizes = {len(batch) for share in shares for batch in share}
        assert sizes <= {size // processes, -(-size // processes)}


def test_epochs_differ_and_are_the_same_again():
    epochs = [epoch_of(100, 10, epoch=epoch) for epoch in range(5)]
    assert all(one != other for i, one in enumerate(epochs) for other in epochs[:i])
    assert epochs == [epoch_of(100, 10, epoch=epoch) for epoch in range(5)]
    assert epoch_of(100, 10, seed=1) not in (*epochs, epoch_of(100, 10, seed=1, epoch=1))
    assert rows_of(epochs[0]) != list(range(100))


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("n, batch_size", [(48, 8), (50, 8), (3, 8), (1, 1), (17, 4), (5, 1)])
def test_evaluation_goes_through_every_row_once(n, batch_size, processes):
    shares = epoch_of(n, batch_size, processes, training=False)
    rows = rows_of(shares)
    assert sorted(rows) == list(range(n))
    assert all(0 < len(batch) <= batch_size for share in shares for batch in share)
    assert processes > 1 or rows == list(range(n))


@pytest.mark.parametrize("n, batch_size", [(100, 3), (3, 100)])
def test_a_batch_too_small_for_its_processes_is_a_users_error(n, batch_size):
    with pytest.raises(UserError):
        sampler_of(n, batch_size, processes=4)


def test_small_data_have_a_batch_that_gives_enough_steps_and_leaves_out_little():
    for n in range(1, 700):
        fits = [b for b in range(1, n + 1) if n // b >= 20 and n % b <= 0.05 * n]
        assert largest_batch_size(n) == max(fits, default=1)
        has_enough_steps = len(sampler_of(n, largest_batch_size(n))) >= 20
        assert has_enough_steps == (n >= 20)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows has no such signals")
def test_a_signal_while_workers_start_reaches_them_when_they_can_handle_it(tiny, monkeypatch):
    handle = signal_handling._set_worker_signal_handlers

    def handle_and_hit():
        handle()
        os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", handle_and_hit)
    config = dataclasses.replace(config_of(tiny), workers=2, batch_size=2)
    dataset = CaptionDataset(config, "valid", load_word_map(tiny))
    batches = list(make_loader(dataset, config, training=False))
    assert [row for *_, rows in batches for row in rows.tolist()] == [0, 1, 2, 3]


# -------------------------------------------------------------------------------------------------
# Files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    """Whatever goes wrong while it is written, what was there stays, and nothing else does."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    (tmp_path / "file.tmp").write_bytes(b"left by a run that was killed")
    for error, expected in ((OSError(28, "No space left"), UserError),
                            (RuntimeError("errno = 28"), UserError),
                            (KeyboardInterrupt(), KeyboardInterrupt)):
        with pytest.raises(expected) as raised, replacing(path, 5 * 2**20) as temporary:
            assert not temporary.exists()
            temporary.write_bytes(b"half")
            raise error
        assert files_under(tmp_path) == {"file": b"old"}
        if expected is UserError:
            assert str(path) in str(raised.value) and "5.0 MiB" in str(raised.value)
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert files_under(tmp_path) == {"file": b"new"}


@pytest.mark.parametrize("name", ["folder", "missing/file", "folder/below/file"])
def test_a_small_file_that_cannot_be_written_is_a_users_error(name, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=str(tmp_path / name)):
        write_text(tmp_path / name, "狗")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]
