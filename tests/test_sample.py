"""The sample set: what is drawn, what is said of it, and what its boxes can tell."""
import itertools
import json
import re
import zipfile
from io import BytesIO

import numpy as np
import pytest
from common import call, error_line, files_under, script
from PIL import Image

from data import sample
from data.sample import (BACKGROUNDS, COLOURS, KINDS, attention_peak_hits, coloured_things, draw_scene, is_true,
                         named_things, write_captions)
from datasets import tokenize

LAYOUT = {
    "ai_challenger_caption_train_20170902":
        ("caption_train_images_20170902", "caption_train_annotations_20170902.json", 6),
    "ai_challenger_caption_validation_20170910":
        ("caption_validation_images_20170910", "caption_validation_annotations_20170910.json", 2),
    "ai_challenger_caption_test_a_20180103":
        ("caption_test_a_images_20180103", "caption_test_a_annotations_20180103.json", 3),
}
DRAW = ("--train", 6, "--valid", 2, "--test", 3, "--size", 48)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    script("data/sample.py", *DRAW, "--seed", 3, "--out", folder, cwd=folder, check=0)
    return folder


@pytest.fixture(scope="module")
def scenes():
    """50 scenes with their five captions. Returns: list of (dict, list of str)."""
    splits = itertools.cycle(("train", "valid", "test_a"))
    drawn = [draw_scene(1, split, index, 32)[1] for index, split in zip(range(50), splits)]
    return [(scene, write_captions(scene, np.random.default_rng(index))) for index, scene in enumerate(drawn)]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_the_layout_is_ai_challengers(drawn):
    assert set(files_under(drawn)) == {f"{root}.zip" for root in LAYOUT} | {"scenes.json"}
    scenes = json.loads((drawn / "scenes.json").read_text("utf-8"))
    names = []
    for root, (pictures, annotations, count) in LAYOUT.items():
        with zipfile.ZipFile(drawn / f"{root}.zip") as archive:
            files = [re.fullmatch(rf"{root}/{pictures}/([0-9a-f]{{40}}\.jpg)", name) for name in archive.namelist()
                     if name != f"{root}/{annotations}"]
            assert all(files) and len(files) == count == len(archive.namelist()) - 1
            listed = json.loads(archive.read(f"{root}/{annotations}").decode("utf-8"))
            with Image.open(BytesIO(archive.read(files[0].string))) as picture:
                assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (48, 48))
        if "test" in root:
            captions = {image["file_name"]: [note["caption"] for note in listed["annotations"]
                                             if note["image_id"] == image["id"]] for image in listed["images"]}
        else:
            assert all(entry.keys() == {"url", "image_id", "caption"} for entry in listed)
            captions = {entry["image_id"]: entry["caption"] for entry in listed}
        assert captions.keys() == {file[1] for file in files}
        for name, sentences in captions.items():
            assert len(sentences) == 5 and all(is_true(sentence, scenes[name]) for sentence in sentences)
        names += captions
    assert sorted(names) == sorted(scenes)


def test_the_seed_decides_every_byte(drawn, tmp_path):
    first, same, other = files_under(drawn), tmp_path / "same", tmp_path / "other"
    assert call(sample.main, *DRAW, "--seed", 3, "--out", same).code == 0
    assert files_under(same) == first
    assert call(sample.main, *DRAW, "--seed", 4, "--out", other).code == 0
    assert files_under(other).keys() == first.keys()
    assert all(first[name] != content for name, content in files_under(other).items())


@pytest.mark.parametrize("flags, named", [
    (["--size", "31"], "--size"), (["--train", "-1"], "--train"), (["--seed", "-1"], "--seed"),
    (["--valid", "few"], "--valid"), (["--tra", "5"], "--tra"), (["--colour", "red"], "--colour"), (["5"], "5"),
    (["--test"], "--test"), (["--out", "file"], "file"), (["--out", "file/below"], "file"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_arguments_end_in_one_line(flags, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    result = call(sample.main, *flags, check=2)
    assert result.code == 2 and named in error_line(result.err) and len(result.err.splitlines()) == 1
    assert files_under(tmp_path) == {"file": b""}


# ---------------------------------------------------------------------------------------------------------------------
# Scenes and sentences


def test_boxes_lie_within_the_picture_and_sides_are_clear(scenes):
    for scene, _ in scenes:
        assert scene["background"] in BACKGROUNDS and 2 <= len(scene["things"]) <= 3
        assert len({thing["thing"] for thing in scene["things"]}) == len(scene["things"])
        for thing in scene["things"]:
            x0, y0, x1, y1 = thing["box"]
            assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
            assert thing["thing"] in KINDS and thing["colour"] in COLOURS
        for one, other in itertools.combinations(scene["things"], 2):
            assert abs(sum(one["box"][::2]) - sum(other["box"][::2])) > 0.2


def test_a_thing_has_its_colour_where_its_box_is():
    for index in range(20):
        image, scene = draw_scene(2, "train", index, 128)
        pixels = np.asarray(image, int)
        for thing in scene["things"]:
            x0, y0, x1, y1 = (round(128 * edge) for edge in thing["box"])
            near = np.abs(pixels - COLOURS[thing["colour"]]).sum(axis=2) < 90
            assert near[y0:y1, x0:x1].mean() > 0.08, (index, thing)


def test_captions_name_places_and_sides(scenes):
    for scene, captions in scenes:
        place, sides = BACKGROUNDS[scene["background"]], ("左边", "右边")
        assert sum(place.on in caption or place.noun in caption for caption in captions) >= 2
        assert sum(any(side in caption for side in sides) for caption in captions) >= 2


def lies(caption, scene):
    """What the caption would be with one claim swapped, so that it is false of the scene."""
    for thing in scene["things"]:
        for form in ("{colour}的{thing}", "{thing}是{colour}的"):
            phrase = form.format(**thing)
            if phrase in caption:
                for colour in COLOURS.keys() - {thing["colour"]}:
                    yield caption.replace(phrase, form.format(thing=thing["thing"], colour=colour))
                for kind in KINDS.keys() - {thing["thing"] for thing in scene["things"]}:
                    yield caption.replace(phrase, form.format(thing=kind, colour=thing["colour"]))
    here = BACKGROUNDS[scene["background"]]
    for place in BACKGROUNDS.values():
        if place is not here:
            for mine, its in ((here.on, place.on), (here.noun, place.noun)):
                if mine in caption:
                    yield caption.replace(mine, its)
    if "左边" in caption or "右边" in caption:
        yield caption.translate(str.maketrans("左右", "右左"))


def test_a_caption_with_one_claim_swapped_is_not_true(scenes):
    told = 0
    for scene, captions in scenes:
        for caption in captions:
            for lie in lies(caption, scene):
                assert lie != caption and not is_true(lie, scene), (lie, scene)
                told += 1
    assert told > 10 * 5 * len(scenes)


@pytest.mark.parametrize("caption", ["", "。", "红色的汽车", "画里有", "<unk>"])
def test_what_is_no_sentence_is_not_true(caption, scenes):
    assert not any(is_true(caption, scene) for scene, _ in scenes)


def test_half_a_caption_is_not_true(scenes):
    assert not any(is_true(caption[:-1], scene) for scene, captions in scenes for caption in captions)


def test_jieba_leaves_things_colours_and_sides_whole(scenes):
    for _, captions in scenes:
        for caption in captions:
            words = tokenize(caption)
            for name in (*KINDS, *COLOURS, "左边", "右边"):
                assert words.count(name) == caption.count(name), (name, words)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


SCENE = {"split": "train", "background": "meadow",
         "things": [{"thing": "汽车", "colour": "红色", "box": [0, 0.5, 0.5, 1]},
                    {"thing": "气球", "colour": "蓝色", "box": [0.75, 0, 1, 0.25]}]}
POSITIONS = (np.arange(8) + 0.5) / 8
WORDS = ["一辆", "红色", "的", "汽车", "和", "气球"]


def peaks(*cells):
    """A map of 8 x 8 for each word of WORDS, with its peak at (row, column)."""
    alphas = np.full((len(WORDS), 8, 8), 0.5 / 63)
    for alpha, cell in zip(alphas, cells, strict=True):
        alpha[cell] = 0.5
    return alphas


def test_peaks_in_the_boxes_are_hits():
    alphas = peaks(*[(0, 0)] * 3, (7, 0), (0, 0), (1, 7))
    hits, total, chance = attention_peak_hits(WORDS, alphas, POSITIONS, SCENE)
    assert (hits, total) == (2, 2)
    assert chance == pytest.approx(0.25 + 4 / 64)


def test_a_peak_lies_where_its_cell_lies():
    """The same map is a hit or not by where its cells are; equal peaks lie in their middle."""
    alphas = peaks(*[(7, 3)] * 6)
    assert attention_peak_hits(WORDS, alphas, POSITIONS, SCENE)[0] == 1
    assert attention_peak_hits(WORDS, alphas, POSITIONS + 0.1, SCENE)[0] == 0
    alphas[:, 7, 5] = alphas[:, 7, 3]
    assert attention_peak_hits(WORDS, alphas, POSITIONS, SCENE)[0] == 0


def test_only_words_that_name_a_thing_of_the_scene_count():
    assert attention_peak_hits(["房子", "红色", "汽"], peaks(*[(7, 0)] * 6)[:3], POSITIONS, SCENE) == (0, 0, 0)
    assert attention_peak_hits([], np.zeros((0, 8, 8)), POSITIONS, SCENE) == (0, 0, 0)


@pytest.mark.parametrize("caption, colours", [("画里 的 气球 是 蓝色 的 ， 汽车 是 红色 的", [4, 9]),
                                              ("左边 是 红色 的 汽车 ， 右边 是 蓝色 的 气球", [2, 8]),
                                              ("红色 的 房子 ， 汽车 是", []), ("汽车 的 红色 是 气球", [])])
def test_a_colour_is_told_of_the_thing_beside_it(caption, colours):
    words = caption.split()
    found = coloured_things(words, SCENE)
    assert [place for place, _ in found] == colours
    assert [box for _, box in found] == [box for _, box in named_things(words, SCENE)][:len(found)]
    alphas = np.zeros((len(words), 8, 8))
    for place, (x0, y0, _, _) in found:
        alphas[place, int(8 * y0), int(8 * x0)] = 1
    assert attention_peak_hits(words, alphas, POSITIONS, SCENE, coloured_things)[:2] == (len(found), len(found))


def test_chance_is_what_random_peaks_hit():
    rng = np.random.default_rng(0)
    drawn = [attention_peak_hits(WORDS, rng.random((len(WORDS), 8, 8)), POSITIONS, SCENE) for _ in range(2000)]
    assert np.mean([hits for hits, _, _ in drawn]) == pytest.approx(drawn[0][2], abs=0.05)
