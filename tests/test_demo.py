"""demo.py: its Captioner, the figures that it draws, and the page that it writes with --html."""
import base64
import dataclasses
import io
import itertools
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from common import RESNET, ROOT, WORD_MAP, D, call, error_line, files_under, peaks
from fontTools.ttLib import TTFont
from matplotlib.figure import Figure
from PIL import Image

import checkpoint as checkpoints
import demo
import eval
from checkpoint import CHECKPOINT_VERSION, RELEASED, save_checkpoint
from config import Config
from datasets import END, PAD, START, UNK, open_picture
from decoding import generate
from demo import Captioner
from models import build_models, pixel_positions
from utils import UserError
from visualize import TEMPLATE, draw_attention, heat_weights, html_page, page_entry

HOSTILE = "</script><img src=x onerror=alert(1)><!--{{DATA}}"
PICTURE = Image.new("RGB", (120, 80))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of random weights that writes a hostile word over and over, and never ends."""
    config = Config(image_size=64, encoder="resnet18", encoder_weights="none", encoded_image_size=4,
                    emb_dim=8, attention_dim=8, decoder_dim=8, max_len=3, device="cpu")
    word_map = {PAD: 0, HOSTILE: 1, "小狗": 2, UNK: 3, START: 4, END: 5}
    torch.manual_seed(0)
    encoder, decoder = build_models(config, len(word_map), encoder_weights="none")
    decoder.fc.bias.data[1] = 9
    for parameter in decoder.attention.parameters():
        parameter.data *= 7  # for an attention that is not even
    path = tmp_path_factory.mktemp("hostile") / "hostile.pth.tar"
    save_checkpoint(dict(
        version=CHECKPOINT_VERSION, config=dataclasses.asdict(config), word_map=word_map, epoch=7,
        encoder=encoder.state_dict(), decoder=decoder.state_dict(), progress=None, optimizers={},
        world_size=1, note="has seen dogs\x1b[31m\nand beaches"), path)
    return path


@pytest.fixture
def run_demo(checkpoint, tmp_path):
    """A function that captions the pictures of tmp_path / "photos", or of another folder."""
    def run(*flags, image=tmp_path / "photos", check=0):
        return call(demo.main, "--checkpoint", checkpoint, "--image", image, "--beam_size", 1,
                    "--out", tmp_path / "out", *flags, check=check)
    (tmp_path / "photos").mkdir()
    return run


@pytest.fixture
def drawn(monkeypatch):
    """What draw_attention is given; it draws nothing."""
    calls = []
    monkeypatch.setattr(demo, "draw_attention", lambda *args: calls.append(args) or Figure((1, 1)))
    return calls


def captioned(done):
    """What stands in the first column of demo.py's lines."""
    return [line.split("\t")[0] for line in done.out.splitlines() if "\t" in line]


def draw(caption, picture=PICTURE, **keywords):
    """The one axis of the figure."""
    figure = draw_attention(picture, caption.words, caption.alphas, caption.positions, **keywords)
    axis, = figure.axes
    return axis


# -------------------------------------------------------------------------------------------------
# Captioner


@pytest.fixture(scope="module")
def captioner(checkpoint):
    return Captioner(checkpoint)


def is_same(found, expected):
    return (found.sentence == expected.sentence
            and np.allclose(found.alphas, expected.alphas, atol=1e-5)
            and found.score == pytest.approx(expected.score, abs=1e-4))


def test_a_picture_may_be_given_in_any_form(captioner, tmp_path):
    """By itself or in a list, which is one batch; a JPEG is turned upright in all of them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"  # too small to be decoded at a fraction of its size
    open_picture(ROOT / "images/sample/image_3.jpg").resize((90, 60)).save(path, exif=exif)
    expected = captioner(path)
    pixels = np.asarray(open_picture(path))
    gray = pixels[..., 0]
    assert pixels.shape == (90, 60, 3) and not is_same(captioner(gray), expected)
    assert not captioner.models.encoder.training and not captioner.models.decoder.training
    opaque = np.dstack([pixels, np.full_like(gray, 255)])
    with open(path, "rb") as file, Image.open(path) as image:
        sources = [str(path), file, io.BytesIO(path.read_bytes()), image, pixels, opaque]
        assert all(is_same(captioner(source), expected) for source in sources)
        assert all(is_same(caption, expected) for caption in captioner(sources))
        assert image.size == (90, 60), "the image of the caller was changed"
    assert is_same(captioner(gray), captioner(np.dstack([gray] * 3)))
    assert is_same(captioner(gray), captioner(gray[..., None]))
    clear = np.dstack([pixels, np.zeros_like(gray)])
    assert is_same(captioner(clear), captioner(np.full_like(pixels, 255))), "clear is white"
    assert captioner([]) == []


def test_the_best_of_several_captions_is_the_one_that_is_given_alone():
    captioner = Captioner(RELEASED, flags={"device": "cpu"})
    paths = sorted((ROOT / "images/sample").glob("*.jpg"))[:2]
    for beam_size in (1, 3):
        alone, several = captioner(paths, beam_size), captioner(paths, beam_size, n_best=3)
        for caption, best in zip(alone, several, strict=True):
            assert is_same(best[0], caption) and 1 <= len(best) <= beam_size
            assert len({one.sentence for one in best}) == len(best)
            for one in best:
                assert len(one.words) == len(one.log_probs) == len(one.alphas)
                assert one.alphas.shape[1:] == 2 * one.positions.shape
                assert one.alphas.sum(axis=(1, 2)) == pytest.approx(1, abs=1e-5)
                assert one.ended and one.score < sum(one.log_probs) < 0, "<end> costs too"


@pytest.mark.parametrize("length_penalty", [0, 1])
def test_several_captions_are_ranked_and_each_has_its_own_words(decoder, length_penalty):
    grid = torch.randn(10, 4, 4, D, generator=torch.Generator().manual_seed(2))
    lists = generate(decoder, grid, WORD_MAP, 8, 5, length_penalty, n_best=4)
    alone = generate(decoder, grid, WORD_MAP, 8, 5, length_penalty)
    assert max(map(len, lists)) == 4
    for number, captions in enumerate(lists):
        assert captions[0]["words"] == alone[number]["words"]
        ranks = [one["score"] / (len(one["words"]) + 1) ** length_penalty for one in captions]
        assert ranks == sorted(ranks, reverse=True)
        for one in captions:
            ids = [WORD_MAP[word] for word in (START, *one["words"], END)]
            true = torch.tensor([[ids]]), torch.tensor([[len(ids)]])
            scores, targets, _ = decoder(grid[number:number + 1], *true)
            *log_probs, end = scores.log_softmax(dim=1).gather(1, targets[:, None])[:, 0].tolist()
            assert one["log_probs"] == pytest.approx(log_probs, abs=1e-4)
            assert one["score"] == pytest.approx(sum(log_probs) + one["ended"] * end, abs=1e-3)


def test_what_is_no_picture_is_refused_by_name(captioner, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"not a picture")
    good = np.zeros((8, 8, 3), np.uint8)
    refused = [(tmp_path / "bad.jpg", "bad.jpg"), ("no.jpg", "no.jpg: no such file"),
               (tmp_path, "a folder: name the pictures in it"),
               (io.BytesIO(b"nothing"), "cannot identify"),
               (good / 255, "array of float64: give uint8"), (good[..., :2], "(8, 8, 2)"),
               (good[:0], "(0, 8, 3)"), (7, "give a path")]
    for source, part in refused:
        with pytest.raises(UserError, match=re.escape(part)):
            captioner(source)
        with pytest.raises(UserError, match=f"picture 2: .*{re.escape(part)}"):
            captioner([good, source])
    for numbers in ((0, 1), (3, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            captioner(good, *numbers)


# -------------------------------------------------------------------------------------------------
# Figures


@pytest.mark.parametrize("side, cells", [(256, 14), (64, 5), (160, 5), (260, 9)])
def test_a_figure_shows_attention_where_it_lies(side, cells):
    caption, places = peaks(side, cells)
    _, _, *tiles = draw(caption).images  # the picture, and that with the regions
    assert len({tuple(tile.get_extent()) for tile in tiles}) == len(places) == len(tiles) / 2
    for gray, heat, place in zip(tiles[::2], tiles[1::2], places):
        assert gray.get_extent() == heat.get_extent()
        heat = heat.get_array()
        peak = np.unravel_index(heat.argmax(), heat.shape)
        assert (np.array(peak[::-1]) + 0.5) / heat.shape == pytest.approx(place, abs=0.01)
    weights = heat_weights(caption.positions)
    assert weights.min() >= 0 and weights.sum(axis=1) == pytest.approx(1)


def test_a_region_is_where_attention_is_above_half_of_its_maximum():
    """It is closed, also at the picture's edge; a word that looks everywhere has none."""
    alphas = np.full((2, 8, 8), 1e-3)
    alphas[0, 7, 4] = 1
    axis, = draw_attention(PICTURE, ["小狗", "草地"], alphas, (np.arange(8) + 0.5) / 8).axes
    region, = (patch.get_path() for patch in axis.patches)
    left, right, bottom, top = axis.images[1].get_extent()
    heat = axis.images[3].get_array()
    at = (np.arange(len(heat)) + 0.5) / len(heat)
    x, y = np.meshgrid(left + (right - left) * at, top + (bottom - top) * at)
    is_inside = region.contains_points(np.stack([x.ravel(), y.ravel()], axis=1))
    assert (is_inside.reshape(heat.shape) == (heat > heat.max() / 2)).mean() > 0.995
    assert (region.vertices[0] == region.vertices[-1]).all()


def test_names_beside_regions_at_the_same_place_can_be_read():
    words = ["男孩", "草地", "皮球"]
    figure = draw_attention(PICTURE, words, np.full((3, 8, 8), 1 / 64), np.linspace(0, 1, 8))
    figure.draw_without_rendering()
    names = figure.axes[0].texts[3:6]
    assert [name.get_text() for name in names] == words
    boxes = [name.get_window_extent() for name in names]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_words_that_say_nothing_get_no_tile_unless_asked_for():
    words = ["狗", "的", "在", "红色"]
    caption = dataclasses.replace(peaks()[0], words=words)
    for every_word, tiles in ((False, ["狗", "红色"]), (True, words)):
        axis = draw(caption, every_word=every_word)
        assert len(axis.images) == 2 + 2 * len(tiles)
        # The caption, the one thing's region, the tiles.
        assert [text.get_text() for text in axis.texts] == [*words, "狗", *tiles]
        assert len({axis.texts[number].get_color() for number in (0, 4, 5)}) == 1
    assert page_entry("a.jpg", PICTURE, caption)["small"] == [False, True, True, False]


@pytest.mark.parametrize("size", [(1, 640), (3000, 1), (10, 1100), (1000, 10)], ids=str)
def test_of_a_thin_picture_all_can_be_seen_in_the_memory_that_others_take(size):
    """It is stretched, and attention lies at the same place of it."""
    halves = Image.new("RGB", size, "red")
    halves.paste("blue", [side // 2 if side > 10 else 0 for side in size] + list(size))
    caption, _ = peaks()
    axis, portrait = draw(caption, halves), draw(caption, Image.new("RGB", (360, 640)))
    assert axis.figure.bbox.size.prod() < 2 * portrait.figure.bbox.size.prod()
    for picture in axis.images:
        left, right, bottom, top = picture.get_extent()
        assert min(right - left, abs(bottom - top)) > 0.4
        assert picture.get_array().size <= 3 * 640 * 640
    entry = page_entry("a.png", halves, caption)
    assert 3 * min(entry["size"]) >= max(entry["size"]) == 640
    shown = np.asarray(jpeg_of(entry).convert("RGB")).astype(int)
    assert np.abs(shown[10, 10] - (255, 0, 0)).max() < 60
    assert np.abs(shown[-10, -10] - (0, 0, 255)).max() < 60


WORDS = ["$\\foo$", "狗\n\n狗", "\x1b[31m\0\x7f\u202e\u200b", "狗" * 500, "x" * 500]


@pytest.mark.parametrize("word", WORDS, ids=range(5))
def test_any_word_can_be_drawn(word):
    axis = draw(peaks(word=word)[0], every_word=True)
    axis.figure.savefig(io.BytesIO(), format="jpg")
    texts = [text.get_text() for text in axis.texts]
    assert all(text.isprintable() and len(text) < 20 for text in texts)
    assert word in texts or not word.isprintable() or len(word) >= 20
    for text in axis.texts:
        box = text.get_window_extent()
        assert box.height < 60 and box.width < 60 * 16


# -------------------------------------------------------------------------------------------------
# The page


class Page(HTMLParser):
    """A page as a browser takes it apart: `tags` (name, attributes) and the `data` of its JSON."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.data = [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        is_json = self.tags and self.tags[-1][1].get("id") == "data"
        if is_json and self.data is None:
            self.data = json.loads(data)


def jpeg_of(entry):
    return Image.open(io.BytesIO(base64.b64decode(entry["jpeg"])))


def test_the_page_holds_what_the_figures_show_and_takes_no_text_for_html(run_demo, drawn, tmp_path):
    """Captions, attention to the 255th part of the maximum, small pictures without EXIF data."""
    exif = Image.Exif()
    exif[0x010E] = "SECRET"
    sizes = {"\"><img src=x>&amp;.jpg": (90, 30), "<!--.jpg": (1500, 1000),
             "<script>alert(1).jpg": (8, 8)}
    for name, size in sizes.items():
        noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / name, exif=exif, comment=b"SECRET")
    path = tmp_path / "new" / "page.html"
    run_demo("--html", path)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    template = Page(TEMPLATE.read_text(encoding="utf-8").replace("{{DATA}}", "{}"))
    assert page.tags == template.tags, "text became HTML"
    assert [picture["name"] for picture in page.data["pictures"]] == [*sizes]
    assert [picture["size"] for picture in page.data["pictures"]] == [[90, 30], [640, 427], [8, 8]]
    assert "resnet18" in page.data["model"] and "epoch 7" in page.data["model"]
    assert page.data["positions"] == pixel_positions(RESNET, 64, 4).tolist()
    for (_, words, alphas, *_), picture in zip(drawn, page.data["pictures"], strict=True):
        assert picture["words"] == words == [HOSTILE] * 4
        assert float(picture["score"]) < 0 and picture["ended"] is False
        shown = [list(base64.b64decode(grid)) for grid in picture["alphas"]]
        maxima = alphas.max(axis=(1, 2), keepdims=True)
        assert np.ptp(alphas / maxima) > 0.1, "the test needs an attention that is not uniform"
        assert np.abs(np.reshape(shown, (-1, 4, 4)) / 255 - alphas / maxima).max() < 0.51 / 255
        assert list(jpeg_of(picture).size) == picture["size"]
        assert b"SECRET" not in base64.b64decode(picture["jpeg"])
    # It requests nothing from anywhere.
    policy, = (attributes["content"] for _, attributes in page.tags
               if attributes.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == "'none'"
    assert {*rules.values()} <= {"data:", "'unsafe-inline'"}
    links = [attributes.get(name, "data:") for _, attributes in page.tags
             for name in ("src", "srcset", "href", "action")]
    assert all(link.startswith("data:") for link in links)
    assert not re.search(r"\w://|url\((?!data:)|@import|innerHTML|\bfetch\b|import\(", text)


def test_the_page_brings_every_character_that_it_shows(monkeypatch):
    """Without a Chinese font no empty boxes are shown; the same pictures give the same page."""
    caption = dataclasses.replace(peaks(32, 2)[0], words=["一辆", "龘龘"])
    model, names = "编码器 · epoch 7", ["假日 – 北京.jpg", "日本の한국.png"]
    # What no font has, and a name that is no UTF-8, are left as they are.
    entries = [page_entry(name, PICTURE, caption) for name in (*names, "\ue123 \udcff.jpg")]
    text = html_page(model, caption.positions, entries)
    font, = re.findall(r"url\(data:font/woff;base64,([\w+/=]+)\)", text)
    assert len(font) < 60_000
    characters = TTFont(io.BytesIO(base64.b64decode(font))).getBestCmap().keys()
    shown = text + "".join([model, *names, *caption.words])  # the data are ASCII in the page
    assert {ord(character) for character in shown if not character.isascii()} <= characters
    family, = re.findall(r"@font-face {[^}]*font-family: ([^;]+);", text)
    fonts = re.findall(r"\bfont(?:-family)?: ([^;}]*)", re.sub("@font-face {[^}]*}", "", text))
    assert fonts and all(font == "inherit" or f" {family}," in font for font in fonts)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")  # what fontTools takes for the time
    assert html_page(model, caption.positions, entries) == text


# -------------------------------------------------------------------------------------------------
# Which pictures, which model, which names


@pytest.mark.parametrize("names", [
    ["3.jpg", "image_3.jpg", "cat.jpg", "cat.png", "cat.png.jpg", "image_cat.jpg", "image_cat.png"],
    ["Cat.jpg", "cat.JPG", "cat.jpg"],
    ["a.jpg", "out_a.jpg", "out_a.jpg.jpg", "out_out_a.jpg"],
    ["景" * 80 + ".jpg", "景" * 80 + ".jpeg", "景" * 79 + ".jpg"]], ids=range(4))
def test_every_picture_of_a_call_has_a_figure_of_its_own(names, tmp_path):
    """Also where letters that differ in case only are the same; no figure has a picture's name."""
    figures = demo.figure_names([tmp_path / name for name in names])
    assert all(name.startswith("out_") and name.endswith(".jpg") for name in figures)
    assert all(len((name + ".tmp").encode()) < 256 for name in figures)
    written = {name.casefold() for name in figures}
    assert len(written) == len(names) and not written & {name.casefold() for name in names}
    plain = [tmp_path / name for name in ("image_3.jpg", "cat.png", "OUT_b.JPG")]
    assert demo.figure_names(plain) == ["out_3.jpg", "out_cat.jpg", "out_OUT_b.jpg"]


def test_of_a_folder_nothing_is_left_out_without_a_word(run_demo, drawn, tmp_path):
    """Nor of its subfolders. The figures of a run before, in there too, are; a picture of one's own
    that is named like them is not."""
    for name in ("a.jpg", "out_b.jpg", "out_a.jpg", "c.JPE"):
        Image.new("RGB", (90, 60), "red").save(tmp_path / name, "JPEG")
    for name in ("notes.txt", "d.heic", "empty.png"):
        (tmp_path / name).touch()
    (tmp_path / "more" / "and more").mkdir(parents=True)
    for folder in ("more", "more/and more"):
        shutil.copy(tmp_path / "a.jpg", tmp_path / folder)
    own = {name: content for name, content in files_under(tmp_path).items() if content is not None}
    names = ["a.jpg", "c.JPE", "more/a.jpg", "more/and more/a.jpg", "out_a.jpg", "out_b.jpg"]
    for figures in (0, 6):
        done = run_demo("--out", tmp_path, image=tmp_path, check=2)
        assert "1 of 7" in done.err and "empty.png" in done.out
        assert captioned(done) == [str(tmp_path / name) for name in names]
        skipped, = (line for line in done.out.splitlines()
                    if "left out" in line and "empty" not in line)
        assert re.findall(r"\d+", skipped.removeprefix(str(tmp_path))) == [str(figures), "2"]
        now = files_under(tmp_path)
        assert sum(content is not None for content in now.values()) == len(own) + 6
    assert all(now[name] == content for name, content in own.items()), "a picture was overwritten"


def test_where_nothing_was_trained_the_model_that_comes_along_captions(checkpoint, tmp_path,
                                                                       monkeypatch):
    """And says what it knows; of a model or a folder that is named and missing it is only told."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "RELEASED", checkpoint)
    monkeypatch.setattr(checkpoints, "RELEASED", checkpoint)
    Image.new("RGB", (90, 60), "red").save("my.png")
    my = "--image", "my.png", "--beam_size", 1
    taken = "models/BEST_checkpoint.pth.tar does not exist"
    lines = call(demo.main, *my).out.splitlines()
    assert sum(taken in line for line in lines) == 1 and "has seen dogs [31m and beaches" in lines
    assert (tmp_path / "images" / "out_my.jpg").exists()

    best = "models/BEST_checkpoint.pth.tar"
    for main, *flags in [(demo.main, *my, "--preset", "sample"), (eval.main,),
                         (demo.main, *my, "--checkpoint", best),
                         (demo.main, *my, "--model_dir", "models")]:
        line = error_line(call(main, *flags, check=2).err)
        assert "does not exist" in line and f"--checkpoint {checkpoint}" in line, flags
    line = error_line(call(demo.main, *my, "--encoder", "resnet34", check=2).err)
    assert "contradicts the checkpoint" in line

    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "BEST_checkpoint_.pth.tar").touch()  # the original's
    assert "import_original.py" in error_line(call(demo.main, *my, check=2).err)
    shutil.copy(checkpoint, best)
    done = call(demo.main, *my)
    assert taken not in done.out and f"{best}: epoch 7" in done.out


def test_without_a_picture_there_are_photographs(checkpoint, drawn, tmp_path, monkeypatch):
    """The ten scenes are for the sample set's model; for others there are one's own image_*.jpg, or
    scikit-image's."""
    monkeypatch.chdir(tmp_path)
    flags = ["--checkpoint", checkpoint, "--beam_size", 1]
    for name in ("images/image_7.jpg", "images/sample/image_0.jpg"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (90, 60), "red").save(tmp_path / name)
    assert captioned(call(demo.main, *flags)) == ["images/image_7.jpg"]
    assert captioned(call(demo.main, *flags, "--preset", "sample")) == ["images/sample/image_0.jpg"]

    (tmp_path / "images" / "image_7.jpg").unlink()
    found = captioned(call(demo.main, *flags))
    assert {*found} == {f"images/image_{name}.jpg" for name in demo.PHOTOGRAPHS}
    assert all((tmp_path / f"images/out_{name}.jpg").exists() for name in demo.PHOTOGRAPHS)
    for picture in found:
        assert np.asarray(open_picture(picture)).std() > 30


def test_a_picture_that_cannot_be_drawn_is_left_out_and_said(run_demo, tmp_path, monkeypatch):
    """Or not be read. Where none can, there is no page either."""
    page, photos = tmp_path / "page.html", tmp_path / "photos"
    page.write_text("the page before")
    (photos / "bad.png").write_bytes(b"not a picture")
    assert "1 of 1" in run_demo("--html", page, check=2).err
    assert page.read_text() == "the page before"

    def fails_at(name, width, error):
        do = getattr(demo, name)

        def fail(*args):
            if any(isinstance(arg, Image.Image) and arg.width == width for arg in args):
                raise error
            return do(*args)
        monkeypatch.setattr(demo, name, fail)
    fails_at("draw_attention", 91, ValueError("too large"))
    fails_at("page_entry", 92, MemoryError())
    for width in (90, 91, 92, 93):
        Image.new("L", (width, 60)).save(photos / f"{width}.png")
    done = run_demo("--html", page, check=2)
    assert "3 of 5" in done.err and "disk" not in done.err
    for name, reason in [("91", "too large"), ("92", "MemoryError"), ("bad", "identify")]:
        assert re.search(f"left out: .*{name}.png: .*{reason}", done.out)
    assert [*files_under(tmp_path / "out")] == ["out_90.jpg", "out_93.jpg"]
    entries = Page(page.read_text(encoding="utf-8")).data["pictures"]
    assert [entry["name"] for entry in entries] == ["90.png", "93.png"]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_figure_that_cannot_be_written_ends_the_run(run_demo, tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (90, 60), "red").save(tmp_path / "photos" / name)
    (tmp_path / "out" / "out_a.jpg").mkdir(parents=True)
    assert "out_a.jpg could not be written" in run_demo(check=2).err
    assert [*files_under(tmp_path / "out")] == ["out_a.jpg"]
