"""The figures that demo.py draws and the page that it writes with --html."""
import base64
import dataclasses
import io
import itertools
import json
import re
import resource
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import ROOT, call, files_under
from fontTools.ttLib import TTFont
from matplotlib.figure import Figure
from PIL import Image

import checkpoint as checkpoints
import demo
import eval
from checkpoint import CHECKPOINT_VERSION, save_checkpoint
from config import Config
from datasets import END, PAD, START, UNK, open_picture
from models import build_models, pixel_positions
from utils import UserError
from visualize import TEMPLATE, draw_attention, html_page, page_entry

HOSTILE = "</script><img src=x onerror=alert(1)><!--{{DATA}}"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The path of a model of random weights that writes a hostile word over and over, and never ends; it has a note."""
    config = Config(image_size=64, encoder="resnet18", encoder_weights="none", encoded_image_size=4, emb_dim=8,
                    attention_dim=8, decoder_dim=8, max_len=3, device="cpu")
    word_map = {PAD: 0, HOSTILE: 1, "小狗": 2, UNK: 3, START: 4, END: 5}
    torch.manual_seed(0)
    encoder, decoder = build_models(config, len(word_map), encoder_weights="none")
    decoder.fc.bias.data[1] = 9
    for parameter in decoder.attention.parameters():
        parameter.data *= 7  # for an attention that is not even
    path = tmp_path_factory.mktemp("hostile") / "hostile.pth.tar"
    save_checkpoint(dict(version=CHECKPOINT_VERSION, config=dataclasses.asdict(config), word_map=word_map, epoch=7,
                         encoder=encoder.state_dict(), decoder=decoder.state_dict(), progress=None, optimizers={},
                         world_size=1, note="has seen dogs\x1b[31m\nand beaches"), path)
    return path


@pytest.fixture
def run_demo(checkpoint, tmp_path, monkeypatch):
    """A function that runs demo.py on tmp_path/photos; it gives the arguments of every call of draw_attention."""
    def run(page):
        drawn = []
        monkeypatch.setattr(demo, "draw_attention", lambda *args: drawn.append(args) or Figure((1, 1)))
        flags = dict(checkpoint=checkpoint, image=tmp_path / "photos", beam_size=1, out=tmp_path / "out", html=page)
        monkeypatch.setattr("sys.argv", ["demo.py", *(f"--{name}={value}" for name, value in flags.items())])
        demo.main()
        return drawn
    (tmp_path / "photos").mkdir()
    return run


RESNET = SimpleNamespace(stride=32, offset=0)  # all that pixel_positions reads of an encoder


class Page(HTMLParser):
    """A page as a browser takes it apart: `tags` (list of name, attributes) and `data`, what its JSON holds."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.data = [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.tags[-1] == ("script", {"type": "application/json", "id": "data"}) and self.data is None:
            self.data = json.loads(data)


def test_the_page_holds_what_the_figures_show_and_takes_no_text_for_html(run_demo, tmp_path):
    """Captions and attention are those that draw_attention is given, to the 255th part of the maximum."""
    names = ["\"><img src=x>&amp;.png", "<!--.png", "<script>alert(1).png"]
    for name, size in zip(names, [(90, 30), (20, 40), (8, 8)]):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
                        ).save(tmp_path / "photos" / name)
    drawn = run_demo(tmp_path / "new" / "page.html")
    text = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    page, template = Page(text), Page(TEMPLATE.read_text(encoding="utf-8").replace("{{DATA}}", "{}"))
    assert page.tags == template.tags, "text became HTML"
    assert [picture["name"] for picture in page.data["pictures"]] == names
    assert [picture["size"] for picture in page.data["pictures"]] == [[90, 30], [20, 40], [8, 8]]
    assert "resnet18" in page.data["model"] and "epoch 7" in page.data["model"]
    assert page.data["positions"] == pixel_positions(RESNET, 64, 4).tolist()
    for (_, words, alphas, *_), picture in zip(drawn, page.data["pictures"], strict=True):
        assert picture["words"] == words == [HOSTILE] * 4
        assert float(picture["score"]) < 0 and picture["ended"] is False
        shown = np.array([list(base64.b64decode(grid)) for grid in picture["alphas"]]).reshape(-1, 4, 4)
        peaks = alphas.max(axis=(1, 2), keepdims=True)
        assert np.ptp(alphas / peaks) > 0.1, "the test needs an attention that is not uniform"
        assert np.abs(shown / 255 - alphas / peaks).max() < 0.51 / 255
    # It requests nothing from anywhere.
    policy, = (attributes["content"] for tag, attributes in page.tags
               if attributes.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == "'none'" and set(rules.values()) <= {"data:", "'unsafe-inline'"}
    for _, attributes in page.tags:
        assert all(attributes.get(name, "data:").startswith("data:") for name in ("src", "srcset", "href", "action"))
    assert not re.search(r"\w://|url\((?!data:)|@import|innerHTML|\bfetch\b|import\(", text)


def test_the_page_brings_every_character_that_it_shows(monkeypatch):
    """A machine without a Chinese font shows no empty boxes, and the same pictures give the same page."""
    caption, positions, _ = peaks(32, 2)
    caption["words"] = ["一辆", "龘龘"]
    model, names = "编码器 · epoch 7", ["假日 – 北京.jpg", "日本の한국.png"]
    # What no font has, and a name that is no UTF-8, are left as they are.
    entries = [page_entry(name, Image.new("RGB", (8, 8)), caption) for name in (*names, "\ue123 \udcff.jpg")]
    text = html_page(model, positions, entries)
    font, = re.findall(r"url\(data:font/woff;base64,([\w+/=]+)\)", text)
    assert len(font) < 60_000
    characters = TTFont(io.BytesIO(base64.b64decode(font))).getBestCmap().keys()
    shown = TEMPLATE.read_text(encoding="utf-8") + "".join([model, *names, *caption["words"]])
    assert not {character for character in shown if not character.isascii() and ord(character) not in characters}
    family, = re.findall(r"@font-face {[^}]*font-family: ([^;]+);", text)
    fonts = re.findall(r"\bfont(?:-family)?: ([^;}]*)", re.sub("@font-face {[^}]*}", "", text))
    assert fonts and all(font == "inherit" or f" {family}," in font for font in fonts)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")  # what fontTools takes for the time
    assert html_page(model, positions, entries) == text


def peaks(image_size, encoded_image_size):
    """A word for each row of the attention, with its peak in the columns from the right to the left.

    Returns:
        dict: of generate. positions: float array (s,). places: float array (s, 2), of the peaks, across and down.
    """
    positions = pixel_positions(RESNET, image_size, encoded_image_size)
    alphas = np.array([np.outer(positions == y, positions == x) for y, x in zip(positions, positions[::-1])], float)
    caption = dict(words=["词"] * len(positions), alphas=alphas + 0.01, score=-1.0, ended=True)
    return caption, positions, np.stack([positions[::-1], positions], axis=1)


@pytest.mark.parametrize("settings", [(256, 14), (64, 5), (160, 5)], ids="{0[0]} to {0[1]}".format)
def test_a_figure_shows_attention_where_it_lies(settings):
    caption, positions, places = peaks(*settings)
    figure = draw_attention(Image.new("RGB", (120, 80)), caption["words"], caption["alphas"], positions)
    _, _, *drawn = figure.axes[0].images  # the picture, and that with the regions
    assert len({tuple(picture.get_extent()) for picture in drawn}) == len(places) == len(drawn) / 2
    for gray, heat, place in zip(drawn[::2], drawn[1::2], places):
        assert gray.get_extent() == heat.get_extent()
        peak = np.unravel_index(heat.get_array().argmax(), heat.get_array().shape)
        assert (np.array(peak[::-1]) + 0.5) / heat.get_array().shape == pytest.approx(place, abs=0.01)


def test_names_beside_regions_at_the_same_place_can_be_read():
    figure = draw_attention(Image.new("RGB", (120, 80)), ["男孩", "草地", "皮球"],
                            np.full((3, 8, 8), 1 / 64), np.linspace(0, 1, 8))
    figure.draw_without_rendering()
    names = [text.get_window_extent() for text in figure.axes[0].texts[3:6]]
    assert [text.get_text() for text in figure.axes[0].texts[3:6]] == ["男孩", "草地", "皮球"]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(names, 2))


def test_words_that_say_nothing_get_no_tile_unless_asked_for():
    caption, positions, _ = peaks(256, 4)
    words = ["狗", "的", "在", "红色"]
    for every_word, tiles in ((False, ["狗", "红色"]), (True, words)):
        axis, = draw_attention(Image.new("RGB", (120, 80)), words, caption["alphas"], positions, every_word).axes
        assert len(axis.images) == 2 + 2 * len(tiles)
        # The caption, the one thing's region, the tiles.
        assert [text.get_text() for text in axis.texts] == [*words, "狗", *tiles]
        region = axis.texts[len(words)]
        assert axis.texts[0].get_color() == region.get_color() == axis.texts[len(words) + 1].get_color()
    page = page_entry("a.jpg", Image.new("RGB", (8, 8)), {**caption, "words": words})
    assert page["small"] == [False, True, True, False]


THIN = [(1, 640), (640, 1), (1, 3000), (3000, 1), (10, 1100), (1000, 10)]


@pytest.mark.parametrize("size", THIN, ids=str)
def test_of_a_thin_picture_all_can_be_seen(size):
    """It is stretched, and attention lies at the same place of it."""
    halves = Image.new("RGB", size, "red")
    halves.paste("blue", [side // 2 if side > 10 else 0 for side in size] + list(size))
    caption, positions, _ = peaks(256, 4)
    figure = draw_attention(halves, caption["words"], caption["alphas"], positions)
    assert max(figure.get_size_inches()) < 60
    for picture in figure.axes[0].images:
        left, right, bottom, top = picture.get_extent()
        assert min(right - left, abs(bottom - top)) > 0.4
    entry = page_entry("a.png", halves, caption)
    assert 3 * min(entry["size"]) >= max(entry["size"]) == 640
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["jpeg"]))).convert("RGB")).astype(int)
    assert np.abs(shown[10, 10] - (255, 0, 0)).max() < 60 and np.abs(shown[-10, -10] - (0, 0, 255)).max() < 60


MEMORY = """
import io, resource
import numpy as np
from PIL import Image
from visualize import draw_attention, page_entry

for size in (1080, 1920), (1, 640), (1, 3000):
    words, alphas = ["小狗", "草地"] * 9, np.random.default_rng(0).dirichlet(np.ones(196), 18).reshape(18, 14, 14)
    picture = Image.new("RGB", size)
    draw_attention(picture, words, alphas, np.linspace(0, 1, 14)).savefig(io.BytesIO(), format="jpg")
    page_entry("a.png", picture, dict(words=words, alphas=alphas, score=0, ended=True))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_a_thin_picture_takes_no_more_memory_than_another():
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, [2**33] * 2))
    assert done.returncode == 0, done.stderr[-2000:]
    portrait, *thin = map(int, done.stdout.split())
    assert max(thin) - portrait < 200, "MB"


@pytest.mark.parametrize("word", ["$\\foo$", "$x$", "狗\n\n狗", "\x1b[31m\0\x7f\u202e\u200b", "狗" * 500, "x" * 500],
                         ids=range(6))
def test_any_word_can_be_drawn(word):
    caption, positions, _ = peaks(256, 4)
    figure = draw_attention(Image.new("RGB", (120, 80)), [word] * 4, caption["alphas"], positions, every_word=True)
    figure.savefig(io.BytesIO(), format="jpg")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert all(text.isprintable() and len(text) < 20 for text in texts)
    assert word in texts or not word.isprintable() or len(word) >= 20
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert box.height < 60 and box.width < 60 * 16


IN_THE_PAGE = """
<script>
onload = async () => {
  const canvas = document.querySelector("canvas"), context = canvas.getContext("2d", { willReadFrequently: true });
  const peaks = [...document.querySelectorAll(".words button")].map(button => {
    rest();  // from nothing a map is there at once
    button.click();
    const green = context.getImageData(0, 0, SIDE, SIDE).data.filter((_, i) => i % 4 === 1);
    const peak = green.indexOf(Math.max(...green));
    return [(peak % SIDE + 0.5) / SIDE, (Math.floor(peak / SIDE) + 0.5) / SIDE];
  });
  await document.fonts.ready;
  document.title = JSON.stringify({ peaks, fonts: [...document.fonts].map(font => font.status) });
};
</script>
"""


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
def test_a_browser_shows_attention_where_it_lies_and_takes_the_font(tmp_path):
    caption, positions, places = peaks(256, 14)
    entry = page_entry("a.jpg", Image.new("RGB", (120, 80)), caption)
    page = html_page("model", positions, [entry]) + IN_THE_PAGE
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    flags = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
             "disable-component-update", "disable-sync", f"user-data-dir={tmp_path / 'user'}",
             "virtual-time-budget=1000", "dump-dom")
    done = subprocess.run([BROWSER, *(f"--{flag}" for flag in flags), (tmp_path / "page.html").as_uri()],
                          capture_output=True, encoding="utf-8", timeout=60)
    found = json.loads(re.search("<title>(.*)</title>", done.stdout)[1])
    assert np.array(found["peaks"]) == pytest.approx(places, abs=0.01)
    assert found["fonts"] == ["loaded"]


def test_the_page_has_small_pictures_without_exif_data(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "SECRET"
    Image.new("RGB", (1500, 1000), "red").save(tmp_path / "a.jpg", exif=exif, comment=b"SECRET")
    assert b"SECRET" in (tmp_path / "a.jpg").read_bytes()
    caption = dict(words=[], alphas=np.zeros((0, 4, 4), np.float32), score=-1.0, ended=True)
    entry = page_entry("a.jpg", open_picture(tmp_path / "a.jpg"), caption)
    (tmp_path / "page.jpg").write_bytes(base64.b64decode(entry["jpeg"]))
    assert Image.open(tmp_path / "page.jpg").size == tuple(entry["size"]) == (640, 427)
    assert b"SECRET" not in (tmp_path / "page.jpg").read_bytes()


@pytest.mark.parametrize("names", [
    ["3.jpg", "image_3.jpg"], ["cat.jpg", "image_cat.jpg"], ["cat.jpg", "cat.png", "cat.png.jpg"],
    ["cat.jpg", "cat.png", "cat.png.jpg", "image_cat.jpg", "image_cat.png"], ["Cat.jpg", "cat.JPG", "cat.jpg"],
    ["a.jpg", "out_a.jpg", "out_a.jpg.jpg", "out_out_a.jpg"],
    ["景" * 80 + ".jpg", "景" * 80 + ".jpeg", "景" * 79 + ".jpg"],
], ids=range(7))
def test_every_picture_of_a_call_has_a_figure_of_its_own(names, tmp_path):
    """Also where letters that differ in case only are the same; and no figure has the name of a picture."""
    figures = demo.figure_names([tmp_path / name for name in names])
    assert all(name.startswith("out_") and name.endswith(".jpg") for name in figures)
    assert all(len((name + ".tmp").encode()) < 256 for name in figures)
    written = {name.casefold() for name in figures}
    assert len(written) == len(names) and not written & {name.casefold() for name in names}


def test_a_figure_has_the_name_of_its_picture_where_no_other_has_it(tmp_path):
    paths = [tmp_path / name for name in ("image_3.jpg", "cat.png", "OUT_b.JPG")]
    assert demo.figure_names(paths) == ["out_3.jpg", "out_cat.jpg", "out_OUT_b.jpg"]


@pytest.mark.parametrize("out", [".", "more/out"])
def test_of_a_folder_nothing_is_left_out_without_a_word(out, checkpoint, tmp_path):
    """Nor of its subfolders. The figures of a run before, in there too, are; a picture of one's own that is named like
    them is not.
    """
    for name in ("a.jpg", "out_b.jpg", "out_a.jpg", "c.JPE"):
        Image.new("RGB", (90, 60), "red").save(tmp_path / name, "JPEG")
    for name in ("notes.txt", "d.heic", "empty.png"):
        (tmp_path / name).touch()
    (tmp_path / "more" / "and more").mkdir(parents=True)
    for folder in ("more", "more/and more"):
        shutil.copy(tmp_path / "a.jpg", tmp_path / folder)
    own = {name: content for name, content in files_under(tmp_path).items() if content is not None}
    flags = ["--checkpoint", checkpoint, "--image", tmp_path, "--out", tmp_path / out, "--beam_size", 1]
    captioned = ["a.jpg", "c.JPE", "more/a.jpg", "more/and more/a.jpg", "out_a.jpg", "out_b.jpg"]
    for figures in (0, 6):
        done = call(demo.main, *flags, check=2)
        assert done.code == 2 and "1 of 7" in done.err and "empty.png" in done.out
        lines = [line.split("\t") for line in done.out.splitlines() if "\t" in line]
        assert [line[0] for line in lines] == [str(tmp_path / name) for name in captioned]
        assert len({line[3] for line in lines}) == 6
        skipped, = (line for line in done.out.splitlines() if "left out" in line and "empty" not in line)
        assert re.findall(r"\d+", skipped.removeprefix(str(tmp_path))) == [str(figures), "2"]
        now = files_under(tmp_path)
        assert sum(content is not None for content in now.values()) == len(own) + 6
    assert all(now[name] == content for name, content in own.items()), "a picture was overwritten"


def test_where_nothing_was_trained_the_model_that_comes_along_captions(checkpoint, tmp_path, monkeypatch):
    """And says what it knows; of a model or a folder that is named and missing it is only told."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "RELEASED", checkpoint)
    monkeypatch.setattr(checkpoints, "RELEASED", checkpoint)
    Image.new("RGB", (90, 60), "red").save("my.png")
    taken = "models/BEST_checkpoint.pth.tar does not exist"
    done = call(demo.main, "--image", "my.png", "--beam_size", 1)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert sum(taken in line for line in lines) == 1 and "has seen dogs [31m and beaches" in lines
    assert (tmp_path / "images" / "out_my.jpg").exists()

    mistakes = [(demo.main, "--preset", "sample"), (demo.main, "--preset", "flickr8k_cn"), (eval.main,),
                (demo.main, "--model_dir", "models"), (demo.main, "--checkpoint", "models/BEST_checkpoint.pth.tar")]
    for main, *flags in mistakes:
        image = ["--image", "my.png"] * (main is demo.main)
        done = call(main, *flags, *image, check=2)
        assert done.code == 2 and "does not exist" in done.err, flags
        assert f"--checkpoint {checkpoint}" in done.err, flags
    done = call(demo.main, "--image", "my.png", "--encoder", "resnet34", check=2)
    assert done.code == 2 and "contradicts the checkpoint" in done.err

    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "BEST_checkpoint_.pth.tar").touch()  # the original's
    done = call(demo.main, "--image", "my.png", check=2)
    assert done.code == 2 and "import_original.py" in done.err
    shutil.copy(checkpoint, tmp_path / "models" / "BEST_checkpoint.pth.tar")
    done = call(demo.main, "--image", "my.png", "--beam_size", 1)
    assert done.code == 0 and taken not in done.out and "models/BEST_checkpoint.pth.tar: epoch 7" in done.out


def test_without_a_picture_there_are_photographs(checkpoint, tmp_path, monkeypatch):
    """The ten scenes are for the sample set's model; for others there are one's own image_*.jpg, or scikit-image's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "draw_attention", lambda *args: Figure((1, 1)))
    flags = ["--checkpoint", checkpoint, "--beam_size", 1]
    for folder, name in (("images", "image_7.jpg"), ("images/sample", "image_0.jpg")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (90, 60), "red").save(tmp_path / folder / name)
    for preset, picture in (([], "images/image_7.jpg"), (["--preset", "sample"], "images/sample/image_0.jpg")):
        done = call(demo.main, *flags, *preset)
        assert [line.split("\t")[0] for line in done.out.splitlines() if "\t" in line] == [picture]

    (tmp_path / "images" / "image_7.jpg").unlink()
    for _ in range(2):
        done = call(demo.main, *flags)
        assert done.code == 0, done.err
        captioned = {line.split("\t")[0] for line in done.out.splitlines() if "\t" in line}
        assert captioned == {f"images/image_{name}.jpg" for name in demo.PHOTOGRAPHS}
        assert all((tmp_path / "images" / f"out_{name}.jpg").exists() for name in demo.PHOTOGRAPHS)
    for picture in captioned:
        assert np.asarray(open_picture(picture)).std() > 30


@pytest.mark.parametrize("what, error", [("draw_attention", ValueError("too large")), ("page_entry", MemoryError())])
def test_a_picture_that_cannot_be_drawn_is_left_out_and_said(what, error, checkpoint, tmp_path, monkeypatch):
    for name, width in (("a.png", 90), ("b.png", 91), ("c.png", 92)):
        Image.new("RGB", (width, 60), "red").save(tmp_path / name)
    draw = getattr(demo, what)

    def fails_at_one(*args):
        if any(isinstance(arg, Image.Image) and arg.width == 91 for arg in args):
            raise error
        return draw(*args)
    monkeypatch.setattr(demo, what, fails_at_one)
    done = call(demo.main, "--checkpoint", checkpoint, "--image", tmp_path, "--out", tmp_path / "out", "--html",
                tmp_path / "page.html", "--beam_size", 1, check=2)
    assert done.code == 2 and "1 of 3" in done.err and "disk" not in done.err
    reason = str(error) or type(error).__name__
    assert [line for line in done.out.splitlines() if "b.png" in line and reason in line]
    assert [*files_under(tmp_path / "out")] == ["out_a.jpg", "out_c.jpg"]
    data = Page((tmp_path / "page.html").read_text(encoding="utf-8")).data
    assert [picture["name"] for picture in data["pictures"]] == ["a.png", "c.png"]


def test_a_figure_that_cannot_be_written_ends_the_run(checkpoint, tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (90, 60), "red").save(tmp_path / name)
    (tmp_path / "out" / "out_a.jpg").mkdir(parents=True)
    done = call(demo.main, "--checkpoint", checkpoint, "--image", tmp_path, "--out", tmp_path / "out", "--beam_size", 1,
                check=2)
    assert done.code == 2 and "out_a.jpg could not be written" in done.err
    assert [*files_under(tmp_path / "out")] == ["out_a.jpg"]


def test_a_broken_picture_is_left_out_and_said(run_demo, tmp_path):
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"not a picture")
    page = tmp_path / "page.html"
    page.write_text("the page before")
    with pytest.raises(UserError, match="1 of 1"):
        run_demo(page)
    assert page.read_text() == "the page before", "a page without any picture"
    for name in ("good.png", "good.jpg"):
        Image.new("L", (90, 30)).save(tmp_path / "photos" / name)
    with pytest.raises(UserError, match="1 of 3"):
        run_demo(page)
    data = Page(page.read_text(encoding="utf-8")).data
    assert [picture["name"] for picture in data["pictures"]] == ["good.jpg", "good.png"]
    assert [*files_under(tmp_path / "out")] == ["out_good.jpg.jpg", "out_good.png.jpg"]
    assert not list(tmp_path.glob("*.tmp"))
