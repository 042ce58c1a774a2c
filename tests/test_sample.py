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
from data.sample import (BACKGROUNDS, COLOURS, KINDS, attention_peak_hits, coloured_things,
                         draw_scene, is_true, measure_captions, named_things, write_captions)
from datasets import tokenize

FILES = {
    "ai_challenger_caption_train_20170902": 6,
    "ai_challenger_caption_validation_20170910": 2,
    "ai_challenger_caption_test_a_20180103": 3,
}
DRAW = ("--train", 6, "--valid", 2, "--test", 3, "--size", 48)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    script("data/sample.py", *DRAW, "--seed", 3, "--out", folder, cwd=folder, check=0)
    return folder


@pytest.fixture(scope="module")
def scenes():
    """50 scenes, each with its five captions."""
    splits = itertools.cycle(("train", "valid", "test_a"))
    drawn = [draw_scene(1, split, index, 32)[1] for index, split in zip(range(50), splits)]
    return [(scene, write_captions(scene, np.random.default_rng(i)))
            for i, scene in enumerate(drawn)]


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", FILES)
def test_the_layout_is_ai_challengers(root, drawn):
    assert set(files_under(drawn)) == {f"{root}.zip" for root in FILES} | {"scenes.json"}
    *_, split, date = re.fullmatch("(.*?)caption_(.*)_(.*)", root).groups()
    annotations = f"{root}/caption_{split}_annotations_{date}.json"
    with zipfile.ZipFile(drawn / f"{root}.zip") as archive:
        listed = json.loads(archive.read(annotations).decode("utf-8"))
        pictures = sorted(set(archive.namelist()) - {annotations})
        with Image.open(BytesIO(archive.read(pictures[0]))) as picture:
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (48, 48))
    if "test" in root:
        captions = {image["file_name"]: [note["caption"] for note in listed["annotations"]
                                         if note["image_id"] == image["id"]]
                    for image in listed["images"]}
    else:
        assert all(entry.keys() == {"url", "image_id", "caption"} for entry in listed)
        captions = {entry["image_id"]: entry["caption"] for entry in listed}
    folder = f"{root}/caption_{split}_images_{date}"
    assert pictures == sorted(f"{folder}/{name}" for name in captions)
    assert len(pictures) == FILES[root]
    scenes = json.loads((drawn / "scenes.json").read_text("utf-8"))
    for name, sentences in captions.items():
        assert re.fullmatch(r"[0-9a-f]{40}\.jpg", name)
        assert len(sentences) == 5 and all(is_true(text, scenes[name]) for text in sentences)


def test_the_seed_decides_every_byte(drawn, tmp_path):
    first, same, other = files_under(drawn), tmp_path / "same", tmp_path / "other"
    call(sample.main, *DRAW, "--seed", 3, "--out", same)
    assert files_under(same) == first
    call(sample.main, *DRAW, "--seed", 4, "--out", other)
    assert files_under(other).keys() == first.keys()
    assert all(first[name] != content for name, content in files_under(other).items())


@pytest.mark.parametrize("flags", [
    "--size 31", "--train -1", "--valid few", "--tra 5", "--test", "--out file"])
def test_bad_arguments_end_in_one_line(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    line = error_line(call(sample.main, *flags.split(), check=2).err)
    assert flags.split()[0] in line or "file" in line
    assert files_under(tmp_path) == {"file": b""}


# ---- scenes and sentences ------------------------------------------------------------------------


def test_boxes_lie_within_the_picture_and_sides_are_clear(scenes):
    for scene, _ in scenes:
        things = scene["things"]
        assert 2 <= len({thing["thing"] for thing in things}) == len(things) <= 3
        for thing in things:
            x0, y0, x1, y1 = thing["box"]
            assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
        for one, other in itertools.combinations(things, 2):
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
        place = BACKGROUNDS[scene["background"]]
        assert sum(place.on in text or place.noun in text for text in captions) >= 2
        assert sum("左边" in text or "右边" in text for text in captions) >= 2


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
        for mine, its in ((here.on, place.on), (here.noun, place.noun)):
            if mine in caption and mine != its:
                yield caption.replace(mine, its)
    if "左边" in caption or "右边" in caption:
        yield caption.translate(str.maketrans("左右", "右左"))


def test_a_caption_with_one_claim_swapped_or_cut_off_is_not_true(scenes):
    told = 0
    for scene, captions in scenes:
        for caption in captions:
            assert is_true(caption, scene) and not is_true(caption[:-1], scene)
            for lie in lies(caption, scene):
                assert not is_true(lie, scene), (lie, scene)
                told += 1
    assert told > 10 * 5 * len(scenes)
    for text in ("", "。", "红色的汽车", "<unk>"):
        assert not any(is_true(text, scene) for scene, _ in scenes)


def test_jieba_leaves_things_colours_and_sides_whole(scenes):
    for caption in itertools.chain(*(captions for _, captions in scenes)):
        words = tokenize(caption)
        for name in (*KINDS, *COLOURS, "左边", "右边"):
            assert words.count(name) == caption.count(name), (name, words)


# ---- attention -----------------------------------------------------------------------------------


SCENE = {"split": "train", "background": "meadow",
         "things": [{"thing": "汽车", "colour": "红色", "box": [0, 0.5, 0.5, 1]},
                    {"thing": "气球", "colour": "蓝色", "box": [0.75, 0, 1, 0.25]}]}
POSITIONS = (np.arange(8) + 0.5) / 8
WORDS = ["一辆", "红色", "的", "汽车", "和", "气球"]


def peaks(*cells):
    """A map of 8 x 8 for each word, with its peak at (row, column)."""
    alphas = np.full((len(cells), 8, 8), 0.5 / 63)
    for alpha, cell in zip(alphas, cells):
        alpha[cell] = 0.5
    return alphas


def test_peaks_in_the_boxes_are_hits(tmp_path):
    alphas = peaks((0, 0), (0, 0), (0, 0), (7, 0), (0, 0), (1, 7))
    assert attention_peak_hits(WORDS, alphas, POSITIONS, SCENE) == (2, 2, 0.25 + 4 / 64)
    words = ["房子", "红色", "汽"]  # none names a thing of the scene
    assert attention_peak_hits(words, alphas, POSITIONS, SCENE) == (0, 0, 0)
    assert attention_peak_hits([], np.zeros((0, 8, 8)), POSITIONS, SCENE) == (0, 0, 0)

    (tmp_path / "scenes.json").write_text(json.dumps({"a": SCENE, "b": SCENE}))
    true = [*"左边是", "红色", "的", "汽车", *"，右边是", "蓝色", "的", "气球"]
    captions = [dict(words=WORDS, alphas=alphas), dict(words=true, alphas=peaks(*[(7, 0)] * 13))]
    assert measure_captions(captions, ["a", "b"], POSITIONS, str(tmp_path)) == dict(
        true_captions=1 / 2, attention_in_box=3 / 4, attention_in_box_by_chance=(0.25 + 4 / 64) / 2,
        attention_in_box_colours=1 / 3)
    assert measure_captions(captions, ["c", "d"], POSITIONS, str(tmp_path)) == {}


def test_a_peak_lies_where_its_cell_lies():
    """The same map is a hit or not by where its cells are; equal peaks lie in their middle."""
    alphas = peaks(*[(7, 3)] * 6)
    assert attention_peak_hits(WORDS, alphas, POSITIONS, SCENE)[0] == 1
    assert attention_peak_hits(WORDS, alphas, POSITIONS + 0.1, SCENE)[0] == 0
    alphas[:, 7, 5] = alphas[:, 7, 3]
    assert attention_peak_hits(WORDS, alphas, POSITIONS, SCENE)[0] == 0


@pytest.mark.parametrize("caption, colours", [
    ("画里 的 气球 是 蓝色 的 ， 汽车 是 红色 的", [4, 9]),
    ("左边 是 红色 的 汽车 ， 右边 是 蓝色 的 气球", [2, 8]),
    ("红色 的 房子 ， 汽车 是", []), ("汽车 的 红色 是 气球", [])])
def test_a_colour_is_told_of_the_thing_beside_it(caption, colours):
    words = caption.split()
    found = coloured_things(words, SCENE)
    assert [place for place, _ in found] == colours
    assert [box for _, box in found] == [box for _, box in named_things(words, SCENE)][:len(found)]
