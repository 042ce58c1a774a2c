"""Pixels, words, and batches."""
import json
import pickle
import resource
import shutil
import struct
import time
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import files_under, tampered
from PIL import EpsImagePlugin, Image

import demo
from config import UserError, get_config, replacing
from datasets import (BadPicture, BatchSampler, CaptionDataset, build_word_map, check_word_map, decode_caption,
                      draft_size, encode_caption, load_word_map, make_loader, open_picture, read_image, tokenize,
                      word_list, word_map_digest, write_text)
from pre_process import SPLITS

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Pixels


def palette(colours, size=(8, 8)):
    """A picture of mode P, filled with the first of its colours."""
    picture = Image.new("P", size, 0)
    picture.putpalette([part for colour in colours for part in colour])
    return picture


def cmyk(path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path, quality=100)


def sixteen_bits(path):
    Image.fromarray(np.full((8, 8), 32896, np.uint16)).save(path)  # 128 x 257: the middle of 16 bits


def sixteen_bit_ramp(path):
    Image.fromarray(np.full((8, 8), 300, np.uint16)).save(path)  # nearly black, where clipping would give white


def animation(path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


PICTURES = {
    "rgb.png": (lambda path: Image.new("RGB", (8, 8), (12, 34, 56)).save(path), (12, 34, 56), 0),
    "rgb.jpg": (lambda path: Image.new("RGB", (8, 8), (12, 34, 56)).save(path, quality=100), (12, 34, 56), 2),
    "rgb.webp": (lambda path: Image.new("RGB", (8, 8), RED).save(path, lossless=True), RED, 0),
    "rgb.bmp": (lambda path: Image.new("RGB", (8, 8), BLUE).save(path), BLUE, 0),
    "rgb.ppm": (lambda path: Image.new("RGB", (8, 8), GREEN).save(path), GREEN, 0),
    "jpeg_named.png": (lambda path: Image.new("RGB", (8, 8), (90, 90, 90)).save(path, "JPEG"), (90, 90, 90), 1),
    "gray.png": (lambda path: Image.new("L", (8, 8), 77).save(path), (77, 77, 77), 0),
    "gray.jpg": (lambda path: Image.new("L", (8, 8), 77).save(path, quality=100), (77, 77, 77), 1),
    "bits.png": (lambda path: Image.new("1", (8, 8), 1).save(path), WHITE, 0),
    "palette.png": (lambda path: palette([GREEN, RED]).save(path), GREEN, 0),
    "palette.gif": (lambda path: palette([BLUE, RED]).save(path), BLUE, 0),
    "clear_palette.png": (lambda path: palette([RED, GREEN]).save(path, transparency=0), WHITE, 0),
    "half_clear_palette.png": (lambda path: palette([RED, GREEN]).save(path, transparency=bytes([128, 255])),
                               (255, 127, 127), 1),
    "other_colour_clear.png": (lambda path: palette([RED, GREEN]).save(path, transparency=1), RED, 0),
    "clear.gif": (lambda path: palette([RED, GREEN]).save(path, transparency=0), WHITE, 0),
    "clear_rgb.png": (lambda path: Image.new("RGB", (8, 8), (9, 8, 7)).save(path, transparency=(9, 8, 7)), WHITE, 0),
    "clear_gray.png": (lambda path: Image.new("L", (8, 8), 9).save(path, transparency=9), WHITE, 0),
    "rgba.png": (lambda path: Image.new("RGBA", (8, 8), (*RED, 0)).save(path), WHITE, 0),
    "half_rgba.png": (lambda path: Image.new("RGBA", (8, 8), (*BLUE, 128)).save(path), (127, 127, 255), 1),
    "full_rgba.png": (lambda path: Image.new("RGBA", (8, 8), (*BLUE, 255)).save(path), BLUE, 0),
    "half_la.png": (lambda path: Image.new("LA", (8, 8), (0, 128)).save(path), (127, 127, 127), 1),
    "cmyk.jpg": (cmyk, RED, 3),
    "cmyk.tif": (lambda path: Image.new("CMYK", (8, 8), (255, 255, 0, 0)).save(path), BLUE, 0),
    "sixteen_bits.png": (sixteen_bits, (128, 128, 128), 1),
    "sixteen_bits.tif": (sixteen_bits, (128, 128, 128), 1),
    "sixteen_bits_dark.png": (sixteen_bit_ramp, (1, 1, 1), 1),
    "sixteen_bits.pgm": (lambda path: path.write_bytes(b"P5 4 4 65535\n" + b"\x80\x80" * 16), (128, 128, 128), 1),
    "animation.gif": (animation, RED, 0),
    "one_pixel.png": (lambda path: Image.new("RGB", (1, 1), (5, 150, 250)).save(path), (5, 150, 250), 0),
    "wide.png": (lambda path: Image.new("RGB", (20_000, 3), (5, 150, 250)).save(path), (5, 150, 250), 0),
    "tall.jpg": (lambda path: Image.new("RGB", (3, 20_000), (90, 90, 90)).save(path), (90, 90, 90), 1),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_kind_of_picture_gives_its_colours(name, tmp_path):
    save, colour, tolerance = PICTURES[name]
    save(tmp_path / name)
    pixels = read_image(tmp_path / name, 40)
    assert pixels.dtype == np.uint8 and pixels.shape == (40, 40, 3)
    assert np.abs(pixels.astype(int) - colour).max() <= tolerance


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "I;16"])
@pytest.mark.parametrize("orientation, upright", [
    (1, lambda a: a), (2, np.fliplr), (3, lambda a: np.rot90(a, 2)), (4, np.flipud),
    (5, lambda a: a.swapaxes(0, 1)), (6, lambda a: np.rot90(a, -1)), (7, lambda a: np.rot90(a, 2).swapaxes(0, 1)),
    (8, np.rot90)])
def test_a_picture_is_turned_upright(mode, orientation, upright, tmp_path):
    shades = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    picture = Image.fromarray(shades * np.uint16(257) if mode == "I;16" else shades)
    picture = picture if mode == "I;16" else picture.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png", 32), upright(np.stack([shades] * 3, axis=-1)))


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
                                  b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_a_photograph_with_broken_exif_is_still_a_photograph(exif, tmp_path):
    Image.new("RGB", (8, 8), RED).save(tmp_path / "photo.jpg", exif=exif)
    assert np.abs(read_image(tmp_path / "photo.jpg", 32).astype(int) - RED).max() <= 2


def test_a_picture_is_squeezed_into_the_square_whole(tmp_path):
    picture = Image.new("RGB", (400, 100), RED)
    picture.paste(BLUE, (200, 0, 400, 100))
    picture.save(tmp_path / "halves.png")
    pixels = read_image(tmp_path / "halves.png", 50)
    assert (pixels[:, :24] == RED).all() and (pixels[:, 26:] == BLUE).all()


def photograph(width, height, seed=0):
    """A picture with the spectrum and the contrast between neighbours of a photograph. Returns: PIL.Image, RGB."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    planes = [np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / np.maximum(frequency, 1) ** 1.4,
                            (height, width)) for _ in range(4)]
    pixels = np.stack([planes[0] + 0.4 * plane for plane in planes[1:]], axis=-1)
    return Image.fromarray((128 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8))


def whole_then_resized(path, side):
    return np.asarray(open_picture(path).resize((side, side), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("mode, keywords", [
    ("RGB", {}), ("RGB", dict(progressive=True)), ("L", {}), ("CMYK", {}),
    *(("RGB", dict(orientation=turn)) for turn in range(2, 9))], ids=str)
@pytest.mark.parametrize("size, side, reduction", [
    ((331, 240), 100, 1), ((335, 501), 128, 2), ((357, 269), 33, 4), ((607, 811), 37, 8)])
def test_a_large_jpeg_looks_the_same_decoded_small(mode, keywords, size, side, reduction, tmp_path):
    keywords, exif = dict(keywords), Image.Exif()
    exif[0x0112] = keywords.pop("orientation", 1)
    photograph(*size).convert(mode).save(tmp_path / "photo.jpg", exif=exif, quality=90, **keywords)
    assert draft_size(size, side) == (size[0] // reduction, size[1] // reduction)
    pixels, expected = read_image(tmp_path / "photo.jpg", side), whole_then_resized(tmp_path / "photo.jpg", side)
    assert pixels.shape == (side, side, 3)
    assert np.abs(pixels.astype(float) - expected).mean() < 1


@pytest.mark.parametrize("name", ["photo.png", "photo.webp", "photo.bmp", "photo.gif", "photo.tif", "photo.ppm"])
def test_other_formats_are_decoded_whole(name, tmp_path):
    photograph(500, 333).save(tmp_path / name)
    assert np.array_equal(read_image(tmp_path / name, 40), whole_then_resized(tmp_path / name, 40))


def test_a_picture_for_drawing_keeps_its_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("LA", (30, 20)).save(tmp_path / "turned.png", exif=exif)
    picture = open_picture(tmp_path / "turned.png")
    assert (picture.mode, picture.size) == ("RGB", (20, 30))


def png(width, height, *chunks):
    """A black PNG of one bit a pixel, as its header says it."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(b"IDAT", data) for data in chunks) + chunk(b"IEND", b"")


def noise(path, **keywords):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(path, **keywords)
    return path.read_bytes()


BROKEN = {
    "missing.jpg": lambda path: None,
    "empty.jpg": lambda path: path.write_bytes(b""),
    "folder.jpg": lambda path: path.mkdir(),
    "text.jpg": lambda path: path.write_text("<html>404 Not Found</html>"),
    "zeros.jpg": lambda path: path.write_bytes(bytes(5000)),
    "cut_short.jpg": lambda path: path.write_bytes(noise(path)[:-800]),
    "cut_short_large.jpg": lambda path: (photograph(800, 600).save(path), path.write_bytes(path.read_bytes()[:-9000])),
    "cut_short.png": lambda path: path.write_bytes(noise(path)[:-800]),
    "cut_short.gif": lambda path: path.write_bytes(noise(path)[:-800]),
    "header_only.jpg": lambda path: path.write_bytes(noise(path)[:30]),
    "flipped.png": lambda path: path.write_bytes(noise(path)[:500] + bytes(100) + noise(path)[600:]),
    "bomb_by_header.png": lambda path: path.write_bytes(png(2**31 - 1, 2**31 - 1, b"")),
    # Whole and sound, 50 KB on disk: only its size speaks against it.
    "bomb.png": lambda path: path.write_bytes(png(20_000, 20_000, zlib.compress(bytes(20_000 * 2_501)))),
    "figure.eps": lambda path: Image.new("RGB", (8, 8)).save(path),
    "eps_named.jpg": lambda path: Image.new("RGB", (8, 8)).save(path, "EPS"),
    "pdf_named.jpg": lambda path: path.write_bytes(b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_picture_is_named(name, tmp_path):
    BROKEN[name](tmp_path / name)
    for path in (tmp_path / name, str(tmp_path / name)):
        with pytest.raises(BadPicture) as error:
            read_image(path, 32)
        message = str(error.value)
        assert message.startswith(f"{path}: ") and len(message) > len(f"{path}: ") and "\n" not in message
        assert message.count(str(path)) == 1


def patched_size(picture, name, offset, form):
    """Say in a small picture's header that it is 60,000 pixels wide and high."""
    def save(path):
        picture.save(path)
        content = bytearray(path.read_bytes())
        struct.pack_into(form, content, offset(content), 60_000, 60_000)
        path.write_bytes(content)
    return name, save


@pytest.mark.parametrize("name, save", [
    ("huge.png", lambda path: path.write_bytes(png(60_000, 60_000, zlib.compress(bytes(60_000 * 7_501), 1)))),
    patched_size(palette([RED]), "huge.gif", lambda content: 6, "<HH"),
    patched_size(Image.new("RGB", (8, 8)), "huge.bmp", lambda content: 18, "<ii"),
    patched_size(Image.new("RGB", (8, 8)), "huge.jpg", lambda content: content.index(b"\xff\xc0") + 5, ">HH"),
    ("huge.ppm", lambda path: path.write_bytes(b"P6 60000 60000 255\n" + bytes(1000))),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_bomb_is_refused_before_it_is_decoded(name, save, tmp_path):
    save(tmp_path / name)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for open_it in (open_picture, lambda path: read_image(path, 32)):
        with pytest.raises(BadPicture, match="decompression bomb"):
            open_it(tmp_path / name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB; decoded it is gigabytes
    assert time.perf_counter() - started < 5


def test_a_picture_runs_no_program(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.jpg", "EPS")
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(BadPicture):
        read_image(tmp_path / "picture.jpg", 32)
    assert not (tmp_path / "ran").exists()


def test_training_evaluation_and_demo_see_the_same_pixels(tiny):
    word_map = load_word_map(tiny)
    for split in ("train", "valid", "test_a"):
        dataset = CaptionDataset(config_of(tiny), split, word_map)
        folder = tiny / SPLITS[split][0] / SPLITS[split][1]
        with h5py.File(tiny / f"{split}.h5") as file:
            stored = file["images"][:]
        given = dataset[list(range(len(dataset)))][0].numpy()
        for row, image_id in enumerate(dataset.image_ids):
            assert np.array_equal(stored[row], given[row])
            assert np.array_equal(demo.read_image(folder / image_id, 64), given[row])
    assert stored.std() > 10


# ---------------------------------------------------------------------------------------------------------------------
# Words


@pytest.mark.parametrize("caption, words", [
    ("一个男人在打篮球", ["一个", "男人", "在", "打篮球"]),
    ("一个 男人\t在\u3000打篮球\n。", ["一个", "男人", "在", "打篮球"]),
    ("。。", []),
    ("", []),
    ("两个人，一只狗", ["两个", "人", "，", "一只", "狗"]),
    ("a man 打 NBA", ["a", "man", "打", "NBA"]),
])
def test_tokenize(caption, words):
    assert tokenize(caption) == words


@pytest.mark.parametrize("caption", ["一個男人騎著馬在沙灘上", "😀👍🏽", "\ufeff\u200b", "<start><end><pad>",
                                     "1,000 % (x)"])
def test_tokenize_keeps_every_character_but_space_and_full_stop(caption):
    assert "".join(tokenize(caption)) == "".join(caption.split())


def test_word_map_goes_by_frequency_then_by_code_point():
    captions = [["狗", "猫", "b"], ["狗", "a", "a"], ["猫", "狗", "一"]]
    expected = ["<pad>", "狗", "a", "猫", "b", "一", "<unk>", "<start>", "<end>"]
    word_map = build_word_map(captions, 1)
    assert word_map == {word: number for number, word in enumerate(expected)}
    assert list(word_map) == word_list(word_map) == expected
    assert list(build_word_map(reversed(captions), 1)) == expected
    assert word_list(build_word_map(captions, 2)) == ["<pad>", "狗", "a", "猫", "<unk>", "<start>", "<end>"]
    assert word_list(build_word_map([], 1)) == ["<pad>", "<unk>", "<start>", "<end>"]


def test_a_word_that_looks_special_is_not_counted_twice():
    assert word_list(build_word_map([["<unk>", "狗", "<pad>"]], 1)) == ["<pad>", "狗", "<unk>", "<start>", "<end>"]


def test_the_word_map_digest_tells_maps_apart():
    word_map = build_word_map([["狗", "猫"]], 1)
    assert word_map_digest(word_map) == word_map_digest(dict(reversed(word_map.items())))
    assert word_map_digest(word_map) != word_map_digest(build_word_map([["狗", "狼"]], 1))


def test_words_to_ids_and_back():
    word_map = build_word_map([["一", "只", "狗"]], 1)
    words, (start, end, unknown) = word_list(word_map), (word_map[word] for word in ("<start>", "<end>", "<unk>"))
    ids, length = encode_caption(["一", "只", "猫"], word_map, 5)
    assert ids.tolist() == [start, word_map["一"], word_map["只"], unknown, end, 0, 0] and length == 5
    assert decode_caption(ids, words) == ["一", "只", "<unk>"]
    assert decode_caption(torch.from_numpy(ids), words) == ["一", "只", "<unk>"]

    ids, length = encode_caption(["狗"] * 9, word_map, 5)
    assert ids.tolist() == [start, *[word_map["狗"]] * 5, 0] and length == 6, "cut in mid-sentence, it does not end"
    assert decode_caption(ids, words) == ["狗"] * 5
    ids, length = encode_caption(["狗"] * 5, word_map, 5)
    assert ids.tolist() == [start, *[word_map["狗"]] * 5, end] and length == 7

    ids, length = encode_caption([], word_map, 5)
    assert ids.tolist() == [start, end, 0, 0, 0, 0, 0] and length == 2
    assert decode_caption(ids, words) == decode_caption([], words) == []


def test_what_follows_the_end_is_not_decoded():
    word_map = build_word_map([["狗"]], 1)
    ids = [word_map[word] for word in ("狗", "<end>", "狗", "<end>")]
    assert decode_caption(ids, word_list(word_map)) == ["狗"]
    assert decode_caption(ids[:1], word_list(word_map)) == ["狗"]


SPECIAL = {"<pad>": 0, "<unk>": 1, "<start>": 2, "<end>": 3}


@pytest.mark.parametrize("content", [
    "", "{", "[]", "null", "{}", "\"word\"", "[" * 100_000, b"\xff\xfe{}", b"",
    json.dumps({**SPECIAL, "狗": 5}), json.dumps({**SPECIAL, "狗": 3}), json.dumps({**SPECIAL, "狗": -1}),
    json.dumps({**SPECIAL, "狗": "4"}), json.dumps({**SPECIAL, "狗": 4.0}), json.dumps({**SPECIAL, "<unk>": True}),
    json.dumps({"狗": 0, "<pad>": 1, "<unk>": 2, "<start>": 3, "<end>": 4}),
    json.dumps({"<pad>": 0, "<unk>": 1, "<start>": 2}),
], ids=lambda content: repr(content)[:50])
def test_a_damaged_word_map_is_a_users_error(content, tmp_path):
    path = tmp_path / "WORDMAP.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="pre_process.py") as error:
        load_word_map(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_word_map_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="WORDMAP.json.*pre_process.py"):
        load_word_map(tmp_path)
    (tmp_path / "WORDMAP.json").mkdir()
    with pytest.raises(UserError, match="WORDMAP.json.*pre_process.py"):
        load_word_map(tmp_path)


def test_a_good_word_map_is_given_back():
    assert check_word_map(SPECIAL, "a file") == SPECIAL


# ---------------------------------------------------------------------------------------------------------------------
# The data files


def config_of(folder, **settings):
    return get_config(flags=dict(data_dir=str(folder), image_size=64, batch_size=4, workers=0, **settings))


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the tiny set's valid.h5 and word map, to be damaged."""
    for name in ("valid.h5", "WORDMAP.json"):
        shutil.copy(tiny / name, tmp_path)
    return tmp_path


def test_a_batch_holds_pictures_with_all_their_captions(tiny):
    word_map = load_word_map(tiny)
    dataset = CaptionDataset(config_of(tiny), "train", word_map)
    assert len(dataset) == 12
    entries = json.loads((tiny / SPLITS["train"][0] / SPLITS["train"][2]).read_text("utf-8"))
    assert dataset.image_ids == [entry["image_id"] for entry in entries]
    assert dataset.raw_captions == [entry["caption"] for entry in entries]

    images, captions, lengths, rows = dataset[[7, 2, 2]]
    assert images.dtype == torch.uint8 and images.shape == (3, 64, 64, 3)
    assert captions.dtype == lengths.dtype == rows.dtype == torch.int64
    assert rows.tolist() == [7, 2, 2] and lengths.shape == (3, 5)
    assert captions.shape == (3, 5, lengths.max())
    assert torch.equal(images[1], images[2]) and not torch.equal(images[0], images[1])
    for row, picture, picture_lengths in zip(rows, captions, lengths):
        for caption, length, sentence in zip(picture, picture_lengths, entries[row]["caption"]):
            assert decode_caption(caption, word_list(word_map)) == tokenize(sentence)
            assert length == len(tokenize(sentence)) + 2
            assert caption[0] == word_map["<start>"] and caption[length - 1] == word_map["<end>"]
            assert not caption[length:].any()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_give_the_batches_that_the_process_itself_gives(tiny, context):
    dataset = CaptionDataset(config_of(tiny), "train", load_word_map(tiny))
    dataset[[0]]  # open, as after a first use
    alone = make_loader(dataset, config_of(tiny), shuffle=True)
    helped = make_loader(dataset, get_config(flags=dict(vars(config_of(tiny)), workers=2)), shuffle=True)
    helped.multiprocessing_context = context
    for epoch in (0, 1):
        alone.sampler.epoch = helped.sampler.epoch = epoch
        expected, given = list(alone), list(helped)
        assert len(given) == len(expected) == 3
        assert all(torch.equal(a, b) for one, other in zip(expected, given) for a, b in zip(one, other))


def test_pickling_carries_no_pixels(tiny):
    dataset = CaptionDataset(config_of(tiny), "train", load_word_map(tiny))
    batch = dataset[[0, 5]]
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 12 * 64 * 64 * 3 / 2
    assert all(torch.equal(a, b) for a, b in zip(batch, pickle.loads(pickled)[[0, 5]]))


def test_a_batch_may_be_written_to_without_touching_the_file(folder):
    dataset = CaptionDataset(config_of(folder), "valid", load_word_map(folder))
    before = (folder / "valid.h5").read_bytes()
    for part in dataset[[0]]:
        part.fill_(1)
    assert (folder / "valid.h5").read_bytes() == before
    assert dataset[[0]][0].ne(1).any() and dataset[[0]][1].ne(1).any()


def replace(file, name, make):
    data, attributes = file[name][()], dict(file[name].attrs)
    del file[name]
    make(file, name, data)
    file[name].attrs.update(attributes)


def external_link(file, name):
    with h5py.File(Path(file.filename).with_name("other.h5"), "w") as other:
        other[name] = file[name][()]
    del file[name]
    file[name] = h5py.ExternalLink("other.h5", name)


def external_storage(file, name):
    data, other = file[name][()], Path(file.filename).with_name("other")
    data.tofile(other)
    del file[name]
    file.create_dataset(name, data.shape, data.dtype, external=[(str(other), 0, h5py.h5f.UNLIMITED)])


def virtual(file, name):
    layout = h5py.VirtualLayout(file[name].shape, file[name].dtype)
    layout[:] = h5py.VirtualSource("valid.h5", "elsewhere", file[name].shape)
    del file[name]
    file.create_virtual_dataset(name, layout)


def soft_link(file, name):
    file.move(name, "elsewhere")
    file[name] = h5py.SoftLink("/elsewhere")


def claims_too_much(file):
    """Lengths and texts of a million captions a picture, of which nothing is in the file."""
    for name, dtype, more in (("captions", np.int32, (42,)), ("caption_lengths", np.int32, ()),
                              ("raw_captions", h5py.string_dtype(), ())):
        del file[name]
        file.create_dataset(name, (len(file["images"]), 10**6, *more), dtype)


def more_rows_than_bytes(file):
    """A million pictures, allocated as HDF5 does it, and then cut out of the file."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    for name, shape, dtype in (("images", (64, 64, 3), np.uint8), ("captions", (5, 42), np.int32),
                               ("caption_lengths", (5,), np.int32), ("image_ids", (), h5py.string_dtype()),
                               ("raw_captions", (5,), h5py.string_dtype())):
        del file[name]
        file.create_dataset(name, (10**6, *shape), dtype, dcpl=properties if dtype is np.uint8 else None)


def a_word_too_many(file):
    file["captions"][0, 0, 1] = len(load_word_map(Path(file.filename).parent))


def text_in_no_encoding(file):
    replace(file, "raw_captions", lambda file, name, data: file.create_dataset(
        name, data=np.full(data.shape, b"\xff\xfe", object), dtype=h5py.string_dtype()))


DAMAGE = {
    "no images": lambda file: file.pop("images"),
    "no captions": lambda file: file.pop("captions"),
    "no lengths": lambda file: file.pop("caption_lengths"),
    "no names": lambda file: file.pop("image_ids"),
    "no raw captions": lambda file: file.pop("raw_captions"),
    "no attributes": lambda file: [file.attrs.pop(name) for name in list(file.attrs)],
    "floats": lambda file: replace(file, "images", lambda file, name, data: file.create_dataset(
        name, data=data.astype(np.float32))),
    "wide ids": lambda file: replace(file, "captions", lambda file, name, data: file.create_dataset(
        name, data=data.astype(np.int64))),
    "numbers for names": lambda file: replace(file, "image_ids", lambda file, name, data: file.create_dataset(
        name, data=np.arange(len(data)))),
    "chunks": lambda file: replace(file, "images", lambda file, name, data: file.create_dataset(
        name, data=data, chunks=(1, 64, 64, 3))),
    "fewer pictures": lambda file: replace(file, "images", lambda file, name, data: file.create_dataset(
        name, data=data[:-1])),
    "smaller pictures": lambda file: replace(file, "images", lambda file, name, data: file.create_dataset(
        name, data=data[:, :32])),
    "shorter captions": lambda file: replace(file, "captions", lambda file, name, data: file.create_dataset(
        name, data=data[:, :, :-1])),
    "fewer lengths": lambda file: replace(file, "caption_lengths", lambda file, name, data: file.create_dataset(
        name, data=data[:, :-1])),
    "a group for a data set": lambda file: replace(file, "captions", lambda file, name, data: file.create_group(name)),
    "a number for a data set": lambda file: replace(file, "images", lambda file, name, data: file.create_dataset(
        name, data=np.uint8(3))),
    "an external link": lambda file: external_link(file, "captions"),
    "a soft link": lambda file: soft_link(file, "captions"),
    "a soft link to pixels": lambda file: soft_link(file, "images"),
    "a filter": lambda file: replace(file, "captions", lambda file, name, data: file.create_dataset(
        name, data=data, compression="gzip")),
    "captions that are not there": claims_too_much,
    "pictures that are not there": more_rows_than_bytes,
    "external storage": lambda file: external_storage(file, "captions"),
    "a virtual data set": lambda file: virtual(file, "captions"),
    "another image size": lambda file: file.attrs.update(image_size=32),
    "a list for an image size": lambda file: file.attrs.update(image_size=[64, 64]),
    "a table for a format": lambda file: file.attrs.update(format_version=np.zeros((3, 3))),
    "a newer format": lambda file: file.attrs.update(format_version=99),
    "another word map": lambda file: file.attrs.update(word_map_digest="0" * 64),
    "lengths out of range": lambda file: file["caption_lengths"].write_direct(np.full((4, 5), 99, np.int32)),
    "a start without an end": lambda file: file["caption_lengths"].write_direct(np.full((4, 5), 1, np.int32)),
    "an infinite image size": lambda file: file.attrs.update(image_size=np.inf),
    "negative lengths": lambda file: file["caption_lengths"].write_direct(np.full((4, 5), -1, np.int32)),
    "ids out of range": lambda file: file["captions"].write_direct(np.full((4, 5, 42), 9999, np.int32)),
    "an id just out of range": a_word_too_many,
    "negative ids": lambda file: file["captions"].write_direct(np.full((4, 5, 42), -1, np.int32)),
    "text in no encoding": text_in_no_encoding,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_data_file_that_is_not_what_it_should_be(damage, folder):
    with tampered(folder / "valid.h5") as file:
        DAMAGE[damage](file)
    refused(folder, config_of(folder))


@pytest.mark.parametrize("at", [0, 8, 16, 24, 55, 512, 600, 1400, 4095, -1, -700])
def test_a_flipped_bit_outside_the_pixels_is_seen_before_hdf5_reads_it(at, folder, monkeypatch):
    content = bytearray((folder / "valid.h5").read_bytes())
    content[at] ^= 4
    (folder / "valid.h5").write_bytes(content)
    monkeypatch.setattr(h5py, "File", None)
    refused(folder, config_of(folder), "damaged")


@pytest.mark.parametrize("content", [
    lambda whole: b"", lambda whole: b"not HDF5 at all" * 1000, lambda whole: whole[:len(whole) // 2],
    lambda whole: whole[:-1], lambda whole: whole[:512], lambda whole: bytes(len(whole)),
], ids=["empty", "text", "half", "one byte short", "header only", "zeros"])
def test_a_data_file_that_is_not_whole(content, folder):
    (folder / "valid.h5").write_bytes(content((folder / "valid.h5").read_bytes()))
    refused(folder, config_of(folder))


def test_a_data_file_that_is_not_there(folder):
    (folder / "valid.h5").unlink()
    refused(folder, config_of(folder))
    (folder / "valid.h5").mkdir()
    refused(folder, config_of(folder))


@pytest.mark.parametrize("settings", [dict(image_size=128), dict(max_len=20), dict(captions_per_image=3)])
def test_a_data_file_of_other_settings(settings, folder):
    refused(folder, get_config(flags=dict(vars(config_of(folder)), **settings)), *map(str, settings.values()))


def test_a_data_file_of_another_word_map(folder):
    with pytest.raises(UserError, match="word map.*pre_process.py") as error:
        CaptionDataset(config_of(folder), "valid", build_word_map([["狗"]], 1))
    assert str(folder / "valid.h5") in str(error.value)


def refused(folder, config, *words):
    with pytest.raises(UserError) as error:
        CaptionDataset(config, "valid", load_word_map(folder))
    for word in (str(folder / "valid.h5"), "pre_process.py", *words):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_split_without_pictures_cannot_be_loaded(folder):
    with tampered(folder / "valid.h5") as file:
        for name in ("images", "captions", "caption_lengths", "image_ids", "raw_captions"):
            replace(file, name, lambda file, name, data: file.create_dataset(
                name, data=data[:0], dtype=h5py.string_dtype() if data.dtype == object else data.dtype))
    dataset = CaptionDataset(config_of(folder), "valid", load_word_map(folder))
    with pytest.raises(UserError, match="valid.h5"):
        make_loader(dataset, config_of(folder), shuffle=False)


# ---------------------------------------------------------------------------------------------------------------------
# Who reads what


def epoch_of(n, batch_size, processes, epoch=0, shuffle=True, seed=0):
    """Batches of each process in one epoch. Returns: list (processes) of lists (steps) of lists of rows."""
    shares = []
    for rank in range(processes):
        sampler = BatchSampler(n, batch_size, shuffle, seed, rank, processes)
        sampler.epoch = epoch
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler)
    return shares


def global_batches(shares):
    assert len({len(share) for share in shares}) == 1, "processes that take unequal numbers of steps wait for ever"
    return [set().union(*parts) for parts in zip(*shares)]


@pytest.mark.parametrize("n, batch_size", [(48, 8), (50, 8), (55, 8), (9, 4), (8, 8), (7, 16), (30, 6)])
def test_training_has_the_same_global_batches_however_many_processes_share_them(n, batch_size):
    whole = global_batches(epoch_of(n, batch_size, 1))
    size = min(batch_size, n)
    assert len(whole) == n // size and all(len(batch) == size for batch in whole)
    for processes in (1, 2, 4):
        shares = epoch_of(n, batch_size, processes)
        assert global_batches(shares) == whole
        rows = [row for share in shares for batch in share for row in batch]
        assert len(rows) == len(set(rows)) == n // size * size and set(rows) <= set(range(n))
        assert all(len(batch) in (size // processes, -(-size // processes)) for share in shares for batch in share)


def test_epochs_differ_and_are_the_same_again():
    epochs = [epoch_of(100, 10, 1, epoch) for epoch in range(5)]
    assert all(one != other for i, one in enumerate(epochs) for other in epochs[:i])
    assert epochs == [epoch_of(100, 10, 1, epoch) for epoch in range(5)]
    assert epoch_of(100, 10, 1, seed=1) != epochs[0] != epoch_of(100, 10, 1, seed=1, epoch=1)
    assert epochs[0] != [[list(range(start, start + 10)) for start in range(0, 100, 10)]]


def test_over_the_epochs_every_row_is_seen():
    seen = [row for epoch in range(40) for share in epoch_of(13, 5, 1, epoch) for batch in share for row in batch]
    counts = [seen.count(row) for row in range(13)]
    assert min(counts) > 20 and max(counts) <= 40


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("n, batch_size", [(48, 8), (50, 8), (3, 8), (1, 1), (17, 4), (5, 1)])
def test_evaluation_goes_through_every_row_once(n, batch_size, processes):
    shares = epoch_of(n, batch_size, processes, shuffle=False)
    rows = [row for share in shares for batch in share for row in batch]
    assert sorted(rows) == list(range(n))
    assert all(0 < len(batch) <= batch_size for share in shares for batch in share)
    assert shares == epoch_of(n, batch_size, processes, epoch=1, shuffle=False)


def test_evaluation_in_one_process_goes_in_order():
    assert sum(epoch_of(10, 4, 1, shuffle=False)[0], []) == list(range(10))


@pytest.mark.parametrize("n, batch_size, processes", [(100, 3, 4), (3, 100, 4)])
def test_a_batch_too_small_for_its_processes_is_a_users_error(n, batch_size, processes):
    with pytest.raises(UserError):
        BatchSampler(n, batch_size, True, 0, 0, processes)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_a_small_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.json"
    write_text(path, "狗")
    write_text(path, "猫")
    assert path.read_text("utf-8") == "猫"
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "狗" * 100 + "\ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"] and path.read_text("utf-8") == "猫"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    """Whatever goes wrong while it is written, what was there stays, and nothing else does."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    (tmp_path / "file.tmp").write_bytes(b"left by a run that was killed")
    for error, expected in ((OSError(28, "No space left"), UserError), (RuntimeError("errno = 28"), UserError),
                            (UserError("of its own"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)):
        with pytest.raises(expected) as raised, replacing(path, 5 * 2**20) as temporary:
            assert not temporary.exists()
            temporary.write_bytes(b"half")
            raise error
        assert files_under(tmp_path) == {"file": b"old"}
        if expected is UserError and raised.value is not error:
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
