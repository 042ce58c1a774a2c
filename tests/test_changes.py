"""Every diff of docs/changing.md applies, takes effect, and says what the page says."""
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from common import ROOT, call
from matplotlib.figure import Figure

from config import Config
from utils import precision

pytestmark = pytest.mark.paper  # the diffs are of the unedited file
PAGE = (ROOT / "docs" / "changing.md").read_text(encoding="utf-8")
CHANGES = (  # in the page's order
    "dot product", "heads", "two layers", "own words", "backbone", "entropy")
PICTURE = "images/sample/image_0.jpg"


def blocks(kind, page=PAGE):
    return re.findall(rf"^```{kind}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


DIFFS = dict(zip(CHANGES, blocks("diff"), strict=True))
LINES = dict(zip(CHANGES, map(str.rstrip, blocks("text")), strict=True))  # what fast/ says of each


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """A function that applies a diff to a copy of the code, where the test continues."""
    own = {"fast", "data", *(path.stem for path in ROOT.glob("*.py"))}

    def forget():
        """Let the next import of this repo's modules read their files again."""
        names = [name for name in sys.modules if name.partition(".")[0] in own]
        return {name: sys.modules.pop(name) for name in names}

    def apply(change):
        tree = tmp_path / "tree"
        command = ["git", "ls-files", "*.py", "images/template.html", "deploy/web/*", PICTURE]
        for name in subprocess.check_output(command, cwd=ROOT, text=True).split():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
        env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)}
        subprocess.run(["git", "apply"], cwd=tree, input=DIFFS[change], encoding="utf-8", env=env,
                       check=True)
        monkeypatch.syspath_prepend(tree)
        monkeypatch.chdir(tree)
        return tree

    unedited = forget()
    yield apply
    forget()
    sys.modules.update(unedited)


def training(*flags):
    """Train in the current folder. Returns the line of fast/, the checkpoint, log.jsonl."""
    train = importlib.import_module("train")
    with mock.patch("runlog.draw_attention", lambda *_: Figure()):  # most of the time
        out = call(train.main, *flags, "--model_dir", "m", "--log_dir", "l").out
    line = next(line for line in out.splitlines() if line.startswith("encoder: "))
    checkpoint = torch.load("m/checkpoint.pth.tar", weights_only=True)
    folder = Path("l") / checkpoint["progress"]["run"]
    report = json.loads((folder / "config.json").read_text())["fast"]
    assert "; ".join(f"{half}: {how}" for half, how in report.items()) == line
    log = (folder / "log.jsonl").read_text().splitlines()
    return line, checkpoint, [json.loads(line) for line in log]


TUNED = "--fine_tune_encoder", "true", "--epochs"  # as in the sample set's preset


@pytest.fixture(scope="module")
def unedited(tiny_flags, tmp_path_factory):
    """The checkpoint and the log of an epoch of the code as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("unedited"))
        line, checkpoint, log = training(*tiny_flags, *TUNED, 1)
    assert line == LINES["entropy"]
    return checkpoint, log[0]["train"]


def test_both_languages_show_the_same_code():
    english = (ROOT / "docs" / "changing.en.md").read_text(encoding="utf-8")
    assert blocks("diff", english) == blocks("diff") and blocks("text", english) == blocks("text")
    for kind in ("bash", "python"):  # whose comments are translated
        assert [re.sub(" *#.*", "", code) for code in blocks(kind, english)] == [
            re.sub(" *#.*", "", code) for code in blocks(kind)]


@pytest.mark.parametrize("change", ["dot product", "heads"])
def test_another_attention(change, edited, unedited, tiny_flags):
    edited(change)
    line, checkpoint, log = training(*tiny_flags, *TUNED, 1)
    assert line == LINES[change]
    gone = unedited[0]["decoder"].keys() - checkpoint["decoder"].keys()
    assert gone == {"attention.full_att.weight", "attention.full_att.bias"}
    assert log[0]["train"]["cross_entropy"] != unedited[1]["cross_entropy"]
    for picture in checkpoint["progress"]["entry"]["pictures"]:
        alphas = picture["alphas"]
        assert alphas.shape == (len(picture["words"]), 4, 4)
        assert torch.allclose(alphas.sum(dim=(1, 2)), torch.ones(len(alphas)))

    torch.save(unedited[0], "older.pth.tar")
    demo = importlib.import_module("demo")
    done = call(demo.main, "--checkpoint", "older.pth.tar", "--image", PICTURE, check=2)
    message = "are of another architecture than its settings"
    assert message in done.err and message in PAGE


@pytest.mark.parametrize("change", ["two layers", "own words"])
def test_another_decoder(change, edited, tiny_flags):
    edited(change)
    line, checkpoint, log = training(*tiny_flags, *TUNED, 1)
    assert line == LINES[change]
    if change == "two layers":
        assert "upper_step.weight_hh" in checkpoint["decoder"]
    else:
        share = log[0]["train"]["own_words"]
        assert share == pytest.approx(0.25 * 1 / 2000, rel=0.1), "the mean of steps 0, 1 and 2"
    demo = importlib.import_module("demo")
    call(demo.main, "--checkpoint", "m/BEST_checkpoint.pth.tar", "--image", PICTURE)


def test_another_backbone(edited, tiny_flags):
    tree = edited("backbone")
    line, checkpoint, log = training(*tiny_flags, *TUNED, 2, "--encoder", "own")
    assert line == LINES["backbone"] and log[1]["train"]["loss"] < log[0]["train"]["loss"]
    assert checkpoint["decoder"]["f_beta.weight"].shape == (512, 16)

    models = importlib.import_module("models")
    encoder = models.Encoder("own", "none").eval()
    before = encoder.resnet[0][0].weight.clone()
    encoder.load_state_dict(checkpoint["encoder"])
    assert not torch.equal(encoder.resnet[0][0].weight, before)
    assert encoder(torch.zeros(1, 256, 256, 3, dtype=torch.uint8)).shape == (1, 8, 8, 512)
    encoder.fine_tune("top")
    trained = [all(p.requires_grad for p in stage.parameters()) for stage in encoder.resnet]
    assert trained == [False, False, True, True, True]
    assert encoder.offset == 0, "padded on both sides alike"
    demo = importlib.import_module("demo")
    out = call(demo.main, "--checkpoint", "m/BEST_checkpoint.pth.tar", "--image", PICTURE,
               "--out", "drawn", "--html", "drawn/index.html").out
    assert LINES["backbone"] in out.splitlines() and (tree / "drawn" / "out_0.jpg").exists()


@pytest.mark.parametrize("wanted, epochs", [("float32", 2), ("bfloat16", 1)])
def test_another_term_of_the_loss(wanted, epochs, edited, unedited, tiny_flags):
    if precision(Config(precision=wanted), torch.device("cpu")) != getattr(torch, wanted):
        pytest.skip("this CPU has no bfloat16")
    edited("entropy")
    line, _, log = training(*tiny_flags, "--precision", wanted, *TUNED, epochs)
    assert line == LINES["entropy"]
    for found in (found[group] for found in log for group in ("train", "valid")):
        assert 0 < found["entropy"] <= math.log(16) + 1e-4
        loss = found["cross_entropy"] + found["coverage"] + 0.01 * found["entropy"]
        assert found["loss"] == pytest.approx(loss)
    assert len({line["train"]["entropy"] for line in log}) == epochs
    assert "entropy" not in unedited[1]
