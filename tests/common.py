"""What test files share beside the fixtures of conftest.py."""
import collections
import contextlib
import io
import itertools
import json
import multiprocessing.forkserver
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import runlog
import train
import utils
from checkpoint import BEST_CHECKPOINT as BEST
from checkpoint import load_checkpoint
from config import Config
from datasets import END, PAD, START, STOPPING, UNK, tokenize
from demo import Caption
from models import caption_loss, pixel_positions

ROOT = Path(__file__).resolve().parent.parent
Result = collections.namedtuple("Result", "code out err")
with contextlib.suppress(ModuleNotFoundError):  # of jieba, which a machine with a GPU may lack
    tokenize("狗")  # reads the dictionary once for all that is forked


# -------------------------------------------------------------------------------------------------
# Scripts


def call(main, *flags, check=0):
    """Run a script's main() in this process, as run() ends it. None: `check` no exit code."""
    run = sys.modules["utils"].run_script  # a test may have imported an edited copy of the code
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    with mock.patch("sys.argv", ["script", *map(str, flags)]), \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run(main)
        except SystemExit as exit:
            code = exit.code
    for number, handler in handlers.items():
        signal.signal(number, handler)
    done = Result(code, out.getvalue(), err.getvalue())
    assert check in (code, None), f"{code}\n{done.out}\n{done.err[-4000:]}"
    return done


def script(*args, check=None, cwd=ROOT, **keywords):
    """Run a script of this repo as a user does, which takes five seconds: mostly to import PyTorch.

    `args` are its path within the repo and its flags, `keywords` those of subprocess.run.
    """
    command = [sys.executable, str(ROOT / args[0]), *map(str, args[1:])]
    done = subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8", timeout=300,
                          **keywords)
    assert check in (done.returncode, None), f"{command}\n{done.stdout}\n{done.stderr[-4000:]}"
    return done


class Forked:
    """A script's main() in a process of its own, which is forked from one that has imported all
    that it needs. `folder` is where it prints to."""

    FORKS = multiprocessing.get_context("forkserver")

    def __init__(self, main, flags, folder, variables):
        self.FORKS.set_forkserver_preload(["common"])
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
        with mock.patch.dict(os.environ, PYTHONPATH=paths):
            multiprocessing.forkserver.ensure_running()
        self.folder = folder
        for name in ("out", "err"):
            (folder / name).touch()
        self.process = self.FORKS.Process(target=forked, args=(main, flags, folder, variables))
        self.process.start()
        self.pid = self.process.pid

    def wait_for(self, text, times=1):
        while self.out().count(text) < times:
            assert self.process.is_alive(), f"it ended before it said {text!r}: {self.err()}"
            time.sleep(0.02)

    def wait(self, timeout=100):
        """The exit code; what a signal ended is negative."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, "it does not end"
        return self.process.exitcode

    def out(self):
        return (self.folder / "out").read_text()

    def err(self):
        return (self.folder / "err").read_text()

    def kill(self):
        """All that there still is of it."""
        self.process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def forked(main, flags, folder, variables):
    os.setsid()
    os.chdir(ROOT)
    runlog.draw_attention = lambda *_: Figure((1, 1))  # as the fixture small_figures does
    os.environ.update(variables)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY), number)
    sys.stdout.reconfigure(line_buffering=True)
    sys.argv, code = ["script", *map(str, flags)], 0
    try:
        utils.run_script(main)
    except SystemExit as exit:
        code = exit.code
    sys.exit(code)  # here no frame of main() holds a DataLoader any more, whose workers would stay


def processes(number):
    """The environment variables of each of several processes, as torchrun would set them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number),
                 MASTER_ADDR="localhost", MASTER_PORT=str(port)) for rank in range(number)]


def error_line(stderr):
    """The one line that a user's mistake comes to: the last one, and no traceback."""
    assert "Traceback" not in stderr, stderr[-4000:]
    lines = stderr.splitlines()
    assert lines and lines[-1].startswith("error: "), stderr[-4000:]
    assert sum("error: " in line for line in lines) == 1, stderr[-4000:]
    return lines[-1]


def fails(main, *flags, parts):
    """Check that a script ends with exit code 2 and one line, which has all these parts."""
    line = error_line(call(main, *flags, check=2).err)
    assert all(str(part) in line for part in parts), line


def files_under(folder):
    """Everything below a folder but locks: relative path -> content, None for a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(Path(folder).rglob("*")) if path.suffix != ".lock"}


# -------------------------------------------------------------------------------------------------
# Runs

SMALL = dict(encoder="test_efficientnet", encoder_stride=16)  # which takes no time to train
KILLS = int(os.environ.get("KILLS", 2))
# Six steps per epoch, two readings, dropout, all layers trained, a checkpoint after every step.
SETTINGS = dict(SMALL, batch_size=2, epochs=2, print_freq=4, dropout=0.5, fine_tune_encoder="true",
                checkpoint_minutes=0, early_stop_epochs=3, lr_decay_epochs=1, ema_decay=0.9)


def folders(folder):
    return ["--model_dir", folder / "models", "--log_dir", folder / "logs"]


def flags(folder, **settings):
    settings = [f"--{name}={value}" for name, value in {**SETTINGS, **settings}.items()]
    return [*map(str, folders(folder)), *settings]


def stop_during(monkeypatch, step, number=signal.SIGTERM):
    """Send the next run a signal during its batch of this number; validation's count too."""
    caption_loss, batches = train.caption_loss, itertools.count(1)

    def loss_and_signal(*args):
        if next(batches) == step:
            signal.raise_signal(number)
        return caption_loss(*args)
    monkeypatch.setattr(train, "caption_loss", loss_and_signal)


def interrupt(process, rng, seconds, signals):
    """Send a run one of these signals, so many seconds after its beginning at most.

    Returns:
        exit code, what it printed
    """
    process.wait_for("training and")
    time.sleep(rng.uniform(0, seconds))
    with contextlib.suppress(ProcessLookupError):  # it has finished
        os.kill(process.pid, rng.choice(signals))
    return process.wait(), process.out()


def last_checkpoint(folder):
    return load_checkpoint(folder / "models" / "checkpoint.pth.tar")


def read_log(folder):
    """What a run has logged, but for speeds.

    Returns:
        list of dict: log.jsonl, which must be proper JSON.
        dict: tag of TensorBoard -> list of (step, scalar); of a picture's, (step, None).
    """
    run, = (folder / "logs").iterdir()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (run / "log.jsonl").open()]
    for line, part in itertools.product(lines, ("train", "valid")):
        assert line[part].pop("images_per_s") > 0
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0}).Reload()
    series = {tag: [(event.step, event.value) for event in events.Scalars(tag)]
              for tag in events.Tags()["scalars"] if not re.search("images_per_s|seconds_", tag)}
    for tag in events.Tags()["images"]:
        series[tag] = [(event.step, None) for event in events.Images(tag)]
    return lines, series


def outcome(folder):
    """All that two runs must agree in."""
    last, best = last_checkpoint(folder), load_checkpoint(folder / "models" / BEST)
    names = ("epoch", "batch", "step", "best", "terms", "epochs_since_improvement")
    state = {name: last["progress"][name] for name in names}
    state |= {name: last[name] for name in ("optimizers", "encoder", "decoder")}
    log, series = read_log(folder)
    return dict(state=state, log=log, series=series,
                best={name: best[name] for name in ("epoch", "encoder", "decoder")})


def assert_same(found, expected, where="", atol=0.0):
    if isinstance(expected, torch.Tensor):
        assert torch.allclose(found.double(), expected.double(), rtol=0, atol=atol), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}/{key}", atol)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, (x, y) in enumerate(zip(found, expected)):
            assert_same(x, y, f"{where}/{i}", atol)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=0, abs=atol, nan_ok=True), where
    else:
        assert found == expected, where


def assert_near(many, one, share=0.5):
    """What several processes gave against what one gave: but for rounding the same.

    Adam divides a gradient by its own size. Where that is nothing but rounding (the attention's
    hidden units that are on at every pixel, which softmax ignores) it makes whole steps of it; such
    weights are left out, and at least this share must remain.
    """
    for name in ("epoch", "batch", "step", "encoder"):
        assert_same(many["state"][name], one["state"][name], name, atol=1e-5)
    assert_same(many["log"], one["log"], "log", atol=1e-5)
    compared = 0
    weights, moments = one["state"]["decoder"], one["state"]["optimizers"]["decoder"]["state"]
    for number, (name, weight) in enumerate(weights.items()):
        real = moments[number]["exp_avg_sq"].sqrt() > 1e-6
        assert_same(many["state"]["decoder"][name][real], weight[real], name, atol=1e-5)
        compared += int(real.sum())
    assert compared > share * sum(weight.numel() for weight in weights.values())


# -------------------------------------------------------------------------------------------------
# A small decoder

B, K, T, D, A, E, H, SIDE = 3, 5, 9, 32, 24, 12, 16, 6


def make_word_map(v):
    words = [PAD, *(f"w{i}" for i in range(v - 4)), UNK, START, END]
    return {word: i for i, word in enumerate(words)}


WORD_MAP = make_word_map(40)


def loss_of(decoder, batch, alpha_c=1.0):
    grid, captions, lengths = batch
    scores, targets, alphas = decoder(grid, captions, lengths)
    terms = caption_loss(scores, targets, alphas, lengths, Config(alpha_c=alpha_c))
    counts = dict(tokens=len(targets), captions=(lengths > 0).sum())
    return sum(term.weight * term.sum / counts[term.per] for term in terms.values())


# -------------------------------------------------------------------------------------------------
# Attention

RESNET = SimpleNamespace(stride=32, offset=0)  # all that pixel_positions reads of an encoder


def peaks(image_size=256, encoded_image_size=4, word="词"):
    """A word for each row of the attention, with its peak in the columns from right to left.

    Returns: Caption; float array (s, 2): places of the peaks, across and down.
    """
    positions = pixel_positions(RESNET, image_size, encoded_image_size)
    alphas = np.array([np.outer(positions == y, positions == x) + 0.01
                       for y, x in zip(positions, positions[::-1])])
    words = [word] * len(positions)
    caption = Caption(words, -1.0, [-0.1] * len(words), True, alphas, positions)
    return caption, np.stack([positions[::-1], positions], axis=1)


def make_site(site, model):
    """`make site` by this Python, and with what is installed."""
    return subprocess.run(
        ["make", "site", f"SITE={site}", f"MODEL={model}", f"BIN={Path(sys.executable).parent}",
         "--old-file=.venv/installed", "--old-file=deploy/web/node_modules"],
        cwd=ROOT, capture_output=True, text=True, timeout=300)
