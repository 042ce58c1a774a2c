"""What tests share: the scripts as a user runs them, and one tiny data set that they have made."""
import collections
import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: the kernels then run on a CPU

import pre_process  # noqa: E402
import utils  # noqa: E402
from data import sample  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
Result = collections.namedtuple("Result", "code out err")


def call(main, *flags):
    """Run a script's main() in this process, as run() ends it. Returns: Result."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch("sys.argv", ["script", *map(str, flags)]), contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err):
        try:
            utils.run(main)
            code = 0
        except SystemExit as exit:
            code = exit.code
    return Result(code, out.getvalue(), err.getvalue())


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


def files_under(folder):
    """Everything below a folder but locks, with its content. Returns: dict, relative path -> bytes, None for a folder.
    """
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(Path(folder).rglob("*")) if path.suffix != ".lock"}


SIGNALS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}


@pytest.fixture(autouse=True)
def signals():
    """A run of train.main in this process leaves its handlers, which a process forked later would inherit: it could
    not be terminated.
    """
    for number, handler in SIGNALS.items():
        signal.signal(number, handler)
    yield
    for number, handler in SIGNALS.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a tiny sample set, drawn and preprocessed: 12 + 4 + 4 pictures of 64 pixels. Not to be written to.

    Returns:
        Path
    """
    folder = tmp_path_factory.mktemp("tiny") / "data"
    for main, *flags in ((sample.main, "--out", folder, "--train", 12, "--valid", 4, "--test", 4, "--size", 64),
                         (pre_process.main, *_tiny_flags(folder))):
        result = call(main, *flags)
        assert result.code == 0, result
    return folder


@pytest.fixture(scope="session")
def tiny_flags(tiny):
    """Flags under which every script is done with the tiny set in seconds. A test that trains adds its own
    --model_dir and --log_dir.

    Returns:
        list of str
    """
    return _tiny_flags(tiny)


def _tiny_flags(folder):
    settings = dict(data_dir=folder, image_size=64, min_word_freq=1, encoder="resnet18", encoder_weights="none",
                    encoded_image_size=4, emb_dim=16, attention_dim=16, decoder_dim=16, batch_size=4, epochs=2,
                    workers=0, device="cpu")
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]
