"""A model's captions and their cost in three places: demo.py, deploy/captioner.py and the page.

    make site MODEL=models/photographs.pth.tar
    python benchmarks/deploy.py models/photographs.pth.tar --image my_photos

Counts the captions that are others than those of demo.py, at beam 3 and at beam 1. Each place has
one thread and a process of its own, one after the other; memory is the peak of that process, in
Chromium of that of the page, and is known on Linux only. Needs Chromium and chromedriver.
"""
import functools
import http.server
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEAMS = 3, 1
THREADS = "1"
PAGE_SECONDS = 600  # for all pictures

# Keeps what the page's worker answers, with its times.
RECORD = """
window.received = [];
const Original = Worker;
window.Worker = class extends Original {
  constructor(...args) {
    super(...args);
    this.addEventListener("message", ({ data }) => received.push(data));
  }
};
"""


def main():
    # Imports stand where they are used: each place is measured with what it needs alone.
    from config import new_parser, positive
    from datasets import is_picture_name
    from utils import UserError

    parser = new_parser(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--image", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--number", type=positive, default=100, help="of its pictures (100)")
    parser.add_argument("--site", type=Path, default=ROOT / "site", metavar="FOLDER",
                        help="what make site has made of that checkpoint (site)")
    args = parser.parse_args()
    if not (args.site / "model" / "model.json").exists():
        raise UserError(f"{args.site} has no model: make site MODEL={args.checkpoint}")
    pictures = [str(path) for path in sorted(args.image.rglob("*")) if is_picture_name(path)]
    pictures = pictures[:args.number]
    if not pictures:
        raise UserError(f"{args.image} has no pictures")

    model = args.site / "model"
    places = {"demo.py": args.checkpoint, "deploy/captioner.py": model, "the page": args.site}
    found = {name: measure(name, source, pictures) for name, source in places.items()}
    print(f"{len(pictures)} pictures, one thread")
    print(table(found))


def measure(name: str, source: Path, pictures: list[str]) -> dict:
    """What one place says, in a process of its own."""
    command = [sys.executable, __file__, "--place", name, str(source)]
    environment = {**os.environ, "OMP_NUM_THREADS": THREADS}
    print(f"{name} ...", file=sys.stderr)
    done = subprocess.run(command, input=json.dumps(pictures), stdout=subprocess.PIPE, text=True,
                          env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(found: dict[str, dict]) -> str:
    """In Markdown. A first picture may take longer than the others."""
    lines = ["| | opening | first picture | each further one | greedy | memory | "
             "other captions, beam 3 | beam 1 |", "|---|" + "---|" * 7]
    expected = found["demo.py"]["sentences"]
    for name, place in found.items():
        others = [sum(a != b for a, b in zip(place["sentences"][beam], expected[beam]))
                  for beam in map(str, BEAMS)]
        beam_3, beam_1 = (statistics.median(place["seconds"][str(beam)][1:]) for beam in BEAMS)
        first = place["seconds"][str(BEAMS[0])][0]
        lines.append(f"| {name} | {place['opening']:.2f} s | {first:.3f} s | {beam_3:.3f} s | "
                     f"{beam_1:.3f} s | {place['memory']:.0f} MiB | {others[0]} | {others[1]} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# The places


def in_demo(checkpoint: str, pictures: list[str]) -> dict:
    from demo import Captioner
    return captions_of(lambda: Captioner(checkpoint, flags={"device": "cpu"}), pictures)


def in_captioner(folder: str, pictures: list[str]) -> dict:
    sys.path.insert(0, str(ROOT / "deploy"))
    from captioner import Captioner
    return captions_of(lambda: Captioner(folder, num_threads=int(THREADS)), pictures)


def captions_of(opened: Callable[[], Callable], pictures: list[str]) -> dict:
    captioner = opened()
    opening = time.perf_counter() - BEGIN
    sentences, seconds = {}, {}
    for beam in BEAMS:
        sentences[beam], seconds[beam] = [], []
        for picture in pictures:
            begin = time.perf_counter()
            sentences[beam].append(captioner(picture, beam).sentence)
            seconds[beam].append(time.perf_counter() - begin)
    return dict(opening=opening, sentences=sentences, seconds=seconds,
                memory=peak_memory("self"))


def on_page(site: str, pictures: list[str]) -> dict:
    from selenium.webdriver.common.by import By
    handler = functools.partial(Quiet, directory=site)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    browser = new_browser()
    try:
        browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": RECORD})
        begin = time.perf_counter()
        browser.get(f"http://127.0.0.1:{server.server_address[1]}/")
        answers(browser, "model", 1)
        opening = time.perf_counter() - begin

        chooser = browser.find_element(By.ID, "file")
        for number, beam in enumerate(BEAMS, 1):
            browser.execute_script(f"document.getElementById('beam').value = '{beam}'")
            chooser.send_keys("\n".join(pictures))
            captions = answers(browser, "caption", number * len(pictures))
        memory = page_memory(browser.service.process.pid)
    finally:
        browser.quit()
        server.shutdown()

    sentences, seconds = {}, {}
    for number, beam in enumerate(BEAMS):
        of_beam = captions[number * len(pictures):(number + 1) * len(pictures)]
        sentences[beam] = ["".join(answer["caption"]["words"]) for answer in of_beam]
        seconds[beam] = [answer["caption"]["seconds"] for answer in of_beam]
    return dict(opening=opening, sentences=sentences, seconds=seconds, memory=memory)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def new_browser():
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("google-chrome") or shutil.which("chromium") or ""
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    return webdriver.Chrome(options=options, service=service)


def answers(browser, kind: str, number: int) -> list[dict]:
    """So many of the worker's answers of a kind, once they are there."""
    from selenium.webdriver.support.wait import WebDriverWait

    def received(_):
        found = browser.execute_script(
            "const [kind] = arguments; return received.filter(found => found[kind] || "
            "found.failure).map(({ failure, caption }) => ({ failure, caption: caption && "
            "{ words: caption.words, seconds: caption.seconds } }))", kind)
        failures = [answer["failure"] for answer in found if answer["failure"]]
        if failures:
            raise RuntimeError(f"the page says {failures}")
        return len(found) == number and found
    return WebDriverWait(browser, PAGE_SECONDS, poll_frequency=0.2).until(received)


def peak_memory(process: int | str) -> float:
    """In MiB, as Linux knows it; otherwise nan."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return float("nan")
    line, = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def page_memory(driver: int) -> float:
    """Of the largest of the browser's processes that show a page."""
    def of_pages(process):
        found = []
        for task in Path(f"/proc/{process}/task").glob("*/children"):
            for child in task.read_text().split():
                is_page = b"--type=renderer" in Path(f"/proc/{child}/cmdline").read_bytes()
                found += [peak_memory(child)] if is_page else []
                found += of_pages(child)
        return found
    return max(of_pages(driver), default=float("nan"))


PLACES = {"demo.py": in_demo, "deploy/captioner.py": in_captioner, "the page": on_page}

if __name__ == "__main__":
    BEGIN = time.perf_counter()
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--place"]:
        _, _, name, source = sys.argv
        print(json.dumps(PLACES[name](source, json.load(sys.stdin))))
    else:
        from utils import run_script
        run_script(main)
