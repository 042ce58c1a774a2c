"""The pages in a real browser: deploy/web's, which captions there, and that of demo.py --html."""
import contextlib
import functools
import http.server
import json
import shutil
import threading
from dataclasses import asdict

import numpy as np
import pytest
import torch
from common import ROOT, make_site, peaks
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from skimage import data

from checkpoint import CHECKPOINT_VERSION, save_checkpoint
from config import Config
from datasets import END, PAD, START, UNK
from demo import Captioner
from models import build_models
from visualize import html_page, page_entry

WEB = ROOT / "deploy" / "web"
BROWSER = shutil.which("google-chrome") or shutil.which("chromium")
DRIVER = shutil.which("chromedriver")
# What index.html asks for, for its worker too: a request elsewhere is an error in the console.
POLICY = ("default-src 'self'; img-src 'self' blob: data:; style-src 'self' 'unsafe-inline'; "
          "script-src 'self' 'wasm-unsafe-eval'")

pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no Chromium with chromedriver")
RUNTIME = WEB / "node_modules" / "onnxruntime-web" / "dist"
needs_runtime = pytest.mark.skipif(not RUNTIME.exists(),
                                   reason="no onnxruntime-web: make deploy/web/node_modules")


@pytest.fixture
def start_browser():
    """A function that starts a browser with these flags; in the end its console must be empty."""
    started = []

    def begin(*flags):
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage",
                     "window-size=1000,900", *flags):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(executable_path=DRIVER)
        started.append(webdriver.Chrome(options=options, service=service))
        return started[-1]
    yield begin
    for browser in started:
        browser.quit()


@contextlib.contextmanager
def served(folder):
    """Yields a folder's address, and a list of what is asked for: (method, path)."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def end_headers(self):
            self.send_header("Content-Security-Policy", POLICY)
            super().end_headers()

        def log_message(self, *_):
            asked.append((self.command, self.path.lstrip("/")))

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def site(tmp_path):
    """A copy of deploy/web without a model."""
    folder = tmp_path / "site"
    folder.mkdir()
    for path in WEB.glob("*.*"):
        shutil.copy(path, folder)
    if RUNTIME.exists():
        (folder / "runtime").symlink_to(RUNTIME)
    return folder


def random_checkpoint(path):
    """A model whose captions differ from picture to picture."""
    config = Config(image_size=64, encoder="resnet18", encoder_weights="none", encoded_image_size=4,
                    emb_dim=16, attention_dim=16, decoder_dim=16, max_len=8, length_penalty=0.7,
                    device="cpu")
    words = [PAD, *(f"词{number}" for number in range(37)), "的", UNK, START, END]
    word_map = {word: number for number, word in enumerate(words)}
    torch.manual_seed(1)
    encoder, decoder = build_models(config, len(word_map))
    for parameter in decoder.parameters():
        parameter.data.normal_(0, 0.5)
    save_checkpoint(dict(
        version=CHECKPOINT_VERSION, config=asdict(config), word_map=word_map, epoch=7,
        encoder=encoder.state_dict(), decoder=decoder.state_dict(), progress=None, optimizers={},
        world_size=1, note="<b>random</b>"), path)
    return path


def pictures(folder):
    """Of many kinds: larger and smaller than the model's, on their side, half clear. Not a JPEG so
    large that Python lets its decoder reduce it, which is no more than nearly the same here."""
    names = "cat.png", "coffee.jpg", "rocket.jpg", "small.png", "turned.png", "clear.webp"
    paths = [folder / name for name in names]
    cat = Image.fromarray(data.chelsea())
    cat.save(paths[0])
    Image.fromarray(data.coffee()).resize((220, 150)).save(paths[1])
    Image.fromarray(data.rocket()).convert("L").resize((150, 101)).save(paths[2])
    cat.resize((50, 70)).save(paths[3])
    exif = Image.Exif()
    exif[0x0112] = 6
    cat.save(paths[4], exif=exif)
    cat.putalpha(Image.linear_gradient("L").resize(cat.size))
    cat.save(paths[5], lossless=True)
    return paths


def text_of(browser, selector):
    return [found.text for found in browser.find_elements(By.CSS_SELECTOR, selector)]


def wait(browser, condition):
    return WebDriverWait(browser, 60, poll_frequency=0.05).until(lambda _: condition())


def sentences(browser, number):
    """Of so many pictures, the newest first, once they are all captioned."""
    script = "return [...document.querySelectorAll('.words')].map(found => found.textContent)"
    wait(browser, lambda: len(browser.execute_script(script)) == number
         or any(text_of(browser, "#failure:not([hidden])")))
    return browser.execute_script(script)


DROP = """
const transfer = new DataTransfer();
const [address, name, done] = arguments;
fetch(address).then(answer => answer.blob()).then(blob => {
  transfer.items.add(new File([blob], name, { type: blob.type }));
  dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, cancelable: true }));
  done();
});
"""


@needs_runtime
def test_the_page_captions_as_demo_does_and_sends_nothing(tmp_path, start_browser):
    checkpoint = random_checkpoint(tmp_path / "random.pth.tar")
    site = tmp_path / "site"
    done = make_site(site, checkpoint)
    assert not done.returncode, done.stderr
    paths = pictures(tmp_path)
    captioner = Captioner(checkpoint)
    expected = {beam: [captioner(path, beam).sentence for path in paths] for beam in (1, 3)}
    assert len({*expected[3]}) > 3, "the test needs captions that differ"
    assert expected[1] != expected[3]
    shutil.copy(paths[0], site / "dropped.jpg")
    (tmp_path / "broken.jpg").write_bytes(paths[0].read_bytes()[:300])

    browser = start_browser()
    with served(site) as (address, asked):
        browser.get(address)
        chooser = browser.find_element(By.ID, "file")
        chooser.send_keys("\n".join(map(str, paths)))
        assert sentences(browser, len(paths)) == expected[3][::-1]
        browser.execute_script("document.getElementById('beam').value = '1'")
        chooser.send_keys("\n".join(map(str, paths)))
        assert sentences(browser, 2 * len(paths))[:len(paths)] == expected[1][::-1]
        browser.execute_async_script(DROP, "dropped.jpg", "dropped.jpg")
        assert sentences(browser, 2 * len(paths) + 1)[0] == expected[1][0]
        assert "<b>random</b>" in text_of(browser, "#model")[0]

        chooser.send_keys(str(tmp_path / "broken.jpg"))
        wait(browser, lambda: any(text_of(browser, "#failure:not([hidden]) p")))
        chinese, english = text_of(browser, "#failure p")
        assert "读不了“broken.jpg”" in chinese and "Cannot read “broken.jpg”" in english

        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(
            width=375, height=700, deviceScaleFactor=1, mobile=True))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 375
        assert {method for method, _ in asked} == {"GET", "HEAD"}

        # The model is kept: a second visit asks only whether it is still the same.
        asked.clear()
        browser.refresh()
        browser.find_element(By.ID, "file").send_keys(str(paths[0]))
        assert sentences(browser, 1) == expected[3][:1]
        loaded = [path for method, path in asked if method == "GET"]
        assert "model/model.json" in loaded
        assert not [path for path in loaded if path.endswith((".onnx", ".wasm"))]
    errors = [line for line in browser.get_log("browser") if "broken" not in line["message"]]
    assert not errors


def damage(site):
    (site / "model").mkdir()
    (site / "model" / "model.json").write_text(json.dumps(dict(format_version=1)))
    for name in ("encoder", "decoder"):
        (site / "model" / f"{name}.onnx").write_bytes(b"no model")


def remove_runtime(site):
    damage(site)
    (site / "runtime").unlink(missing_ok=True)


@pytest.mark.parametrize("change, flags, parts", [
    (lambda site: None, (), ["缺少 model/model.json", "lacks model/model.json", "make site"]),
    (remove_runtime, (), ["缺少 runtime/ort", "make site"]),
    pytest.param(damage, (), ["模型打不开", "The model cannot be opened", "make site"],
                 marks=needs_runtime),
    (damage, ["js-flags=--jitless"], ["这个浏览器太旧", "This browser is too old"]),
], ids=["no model", "no runtime", "damaged", "no WebAssembly"])
def test_what_is_missing_is_said_in_both_languages(site, start_browser, change, flags, parts):
    change(site)
    browser = start_browser(*flags)
    with served(site) as (address, _):
        browser.get(address)
        wait(browser, lambda: all(text_of(browser, "#failure p")))
    said = "\n".join(text_of(browser, "#failure p"))
    assert all(part in said for part in parts), said


LIT_AT = """
const canvas = document.querySelector("canvas");
const context = canvas.getContext("2d", { willReadFrequently: true });
return [...document.querySelectorAll(".words button")].map(button => {
  // From nothing a map is there at once.
  dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
  button.click();
  const { width, height } = canvas;
  const green = context.getImageData(0, 0, width, height).data.filter((_, i) => i % 4 === 1);
  const peak = green.indexOf(Math.max(...green));
  return [(peak % width + 0.5) / width, (Math.floor(peak / width) + 0.5) / height];
});
"""


def test_the_page_of_demo_shows_attention_where_it_lies(tmp_path, start_browser):
    """Also where a word is only pointed at, or reached by keyboard; and its font is taken."""
    caption, places = peaks(256, 14)
    entry = page_entry("a.jpg", Image.new("RGB", (120, 80)), caption)
    page = tmp_path / "page.html"
    page.write_text(html_page("model", caption.positions, [entry]), encoding="utf-8")
    browser = start_browser()
    browser.get(page.as_uri())
    assert np.array(browser.execute_script(LIT_AT)) == pytest.approx(places, abs=0.01)
    fonts = "return document.fonts.ready.then(all => [...all].map(font => font.status))"
    assert browser.execute_script(fonts) == ["loaded"]

    def pressed():
        return [button.get_attribute("aria-pressed") == "true" for button in buttons].index(True)

    buttons = browser.find_elements(By.CSS_SELECTOR, ".words button")
    ActionChains(browser).send_keys("\ue00c").move_to_element(buttons[3]).perform()  # Escape
    assert pressed() == 3
    assert browser.find_element(By.CSS_SELECTOR, ".picture").get_attribute("class").endswith("lit")
    buttons[3].send_keys("\ue014")  # to the right
    assert pressed() == 4
    assert not browser.get_log("browser")
