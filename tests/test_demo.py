"""The figures that demo.py draws and the page that it writes with --html."""
import base64
import dataclasses
import io
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import files_under
from fontTools.ttLib import TTFont
from matplotlib.figure import Figure
from PIL import Image

import demo
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
    """The path of a model of random weights that writes a hostile word over and over, and never ends."""
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
                         world_size=1), path)
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
