"""What test files share beside the fixtures of conftest.py."""
import collections
import contextlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from checkpoint import load_checkpoint
from config import Config, get_config, parse_args
from datasets import END, PAD, START, UNK, CaptionDataset, load_word_map, make_loader
from models import build_models, caption_loss

ROOT = Path(__file__).resolve().parent.parent
Result = collections.namedtuple("Result", "code out err")


def call(main, *flags, check=0):
    """Run a script's main() in this process, as run() ends it. Insists on this exit code, unless it is None."""
    import utils  # today's: a test may have imported an edited copy of the code
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with mock.patch("sys.argv", ["script", *map(str, flags)]), contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err):
        try:
            utils.run_script(main)
        except SystemExit as exit:
            code = exit.code
    for number, handler in handlers.items():
        signal.signal(number, handler)
    done = Result(code, out.getvalue(), err.getvalue())
    assert check in (code, None), f"{code}\n{done.out}\n{done.err[-4000:]}"
    return done


def script(*args, check=None, cwd=ROOT, **keywords):
    """Run a script of this repo as a user does; takes about four seconds, `call` does not.

    Args:
        args: the script's path within the repo, then its flags. check (int): the exit code to insist on.
        cwd (Path). keywords: of subprocess.run.
    Returns:
        CompletedProcess: returncode, stdout and stderr (str).
    """
    command = [sys.executable, str(ROOT / args[0]), *map(str, args[1:])]
    done = subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8", timeout=300, **keywords)
    if check is not None:
        assert done.returncode == check, f"{command} gave {done.returncode}\n{done.stdout}\n{done.stderr[-4000:]}"
    return done


def error_line(stderr):
    """The one line that a user's mistake comes to: the last one; fails where there is none, or a traceback."""
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
    """Everything below a folder but locks, with its content. Returns: dict, relative path -> bytes, None for a folder.
    """
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(Path(folder).rglob("*")) if path.suffix != ".lock"}


def folders(folder):
    return ["--model_dir", folder / "models", "--log_dir", folder / "logs"]


# -------------------------------------------------------------------------------------------------
# Runs


KILLS = int(os.environ.get("KILLS", 2))
# Six steps per epoch, two readings, dropout, all layers trained, and a checkpoint after every step.
SETTINGS = dict(batch_size=2, epochs=2, print_freq=4, dropout=0.5, fine_tune_encoder="true", checkpoint_minutes=0,
                early_stop_epochs=3, lr_decay_epochs=1, ema_decay=0.9)


def flags(folder, **settings):
    settings = [f"--{name}={value}" for name, value in {**SETTINGS, **settings}.items()]
    return [*map(str, folders(folder)), *settings]


def start(*args, torchrun=(), stderr=subprocess.DEVNULL):
    command = [sys.executable, "-u", *(["-m", "torch.distributed.run", *torchrun] if torchrun else []),
               str(ROOT / "train.py"), *args]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True,
                            start_new_session=True)


def stop_during(monkeypatch, step, number=signal.SIGTERM):
    """Let the next run get a signal while it works on its batch of this number, validation's batches included."""
    caption_loss, batches = train.caption_loss, itertools.count(1)

    def loss_and_signal(*args):
        if next(batches) == step:
            signal.raise_signal(number)
        return caption_loss(*args)
    monkeypatch.setattr(train, "caption_loss", loss_and_signal)


def interrupt(process, rng, seconds, signals):
    """Send a run one of these signals, so many seconds after its beginning at most. Returns: exit code, output."""
    while "training and" not in (line := process.stdout.readline()):
        assert line, "it ended before it began"
    time.sleep(rng.uniform(0, seconds))
    process.send_signal(rng.choice(signals))
    code = process.wait(timeout=60)
    return code, process.communicate()[0]


def last_checkpoint(folder):
    return load_checkpoint(folder / "models" / "checkpoint.pth.tar")


def read_log(folder):
    """The lines of log.jsonl, which must be proper JSON, without speeds; TensorBoard's scalars by tag, likewise."""
    run, = (folder / "logs").iterdir()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (run / "log.jsonl").open()]
    for line, part in itertools.product(lines, ("train", "valid")):
        assert line[part].pop("images_per_s") > 0
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return lines, {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
                   if not tag.endswith("images_per_s")}


def without_speed(values):
    return {name: value for name, value in values.items() if name != "images_per_s"}


def outcome(folder):
    """All that two runs must agree in. Returns: tensors by name, log lines, scalars by tag as (step, value)."""
    checkpoint = load_checkpoint(folder / "models" / "checkpoint.pth.tar")
    best = load_checkpoint(folder / "models" / "BEST_checkpoint.pth.tar")
    run, = (folder / "logs").iterdir()
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for line in log:
        line.update(train=without_speed(line["train"]), valid=without_speed(line["valid"]))
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)]
               for tag in events.Tags()["scalars"] if not re.search("images_per_s|seconds_", tag)}
    pictures = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    progress = {name: checkpoint["progress"][name] for name in ("epoch", "batch", "step", "best", "terms",
                                                                "epochs_since_improvement")}
    state = dict(progress, **{name: checkpoint[name] for name in ("optimizers", "encoder", "decoder")})
    return dict(state=state, best={name: best[name] for name in ("epoch", "encoder", "decoder")}, log=log,
                scalars=scalars, pictures=pictures)


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

    Adam divides a gradient by its own size. Where that is nothing but rounding (the attention's hidden units that are
    on at every pixel, which softmax ignores) it makes whole steps of it; such weights are left out, and at least this
    share must remain.
    """
    for name in ("epoch", "batch", "step", "encoder"):
        assert_same(many["state"][name], one["state"][name], name, atol=1e-5)
    assert_same(many["log"], one["log"], "log", atol=1e-5)
    compared = 0
    for number, (name, weight) in enumerate(one["state"]["decoder"].items()):
        real = one["state"]["optimizers"]["decoder"]["state"][number]["exp_avg_sq"].sqrt() > 1e-6
        assert torch.allclose(many["state"]["decoder"][name][real], weight[real], rtol=0, atol=1e-5), name
        compared += int(real.sum())
    assert compared > share * sum(weight.numel() for weight in one["state"]["decoder"].values())


def epoch_of(tiny_flags, *flags):
    """The arguments of train_one_epoch; it changes the models and the progress."""
    config = get_config(flags=parse_args("", argv=[*tiny_flags, *flags]).flags)
    word_map = load_word_map(config.data_dir)
    torch.manual_seed(0)
    encoder, decoder = build_models(config, len(word_map))
    loader = make_loader(CaptionDataset(config, "train", word_map), config, True)
    optimizers = train.make_optimizers(config, encoder, decoder)
    return (encoder, decoder, train.teacher_forced, optimizers, torch.amp.GradScaler("cpu", enabled=False),
            train.Averages(optimizers, config.ema_decay), loader, config,
            train.Progress(run="run", batches={}), train.Sums({}, torch.device("cpu"), 0), None, lambda: None)


# -------------------------------------------------------------------------------------------------
# A small decoder


B, K, T, D, A, E, H, SIDE = 3, 5, 9, 32, 24, 12, 16, 6


def make_word_map(v):
    return {word: i for i, word in enumerate([PAD, *(f"w{i}" for i in range(v - 4)), UNK, START, END])}


WORD_MAP = make_word_map(40)


def loss_of(decoder, batch, alpha_c=1.0):
    grid, captions, lengths = batch
    scores, targets, alphas = decoder(grid, captions, lengths)
    terms = caption_loss(scores, targets, alphas, lengths, Config(alpha_c=alpha_c))
    counts = dict(tokens=len(targets), captions=(lengths > 0).sum())
    return sum(term.weight * term.sum / counts[term.per] for term in terms.values())
