"""What every test shares: the scripts as a user runs them, and one tiny data set that they have made."""
import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: the kernels can then be run on a CPU

from datasets import seal  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def script(*args, check=None, cwd=ROOT, **keywords):
    """Run a script of this repo as a user does.

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
    """Everything below a folder, with its content. Returns: dict, relative path -> bytes, or None for a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(Path(folder).rglob("*"))}


@contextlib.contextmanager
def tampered(path, done=None):
    """Open an HDF5 file of ours for changes, and seal it again, as somebody does who means them.

    Args: path (Path). done (int): how many rows the seal is to count; None for as many as before.
    """
    begin, end, before = np.fromfile(path, "<u8", 3).tolist()
    with h5py.File(path, "a") as file:
        yield file
        data = file.get("images", file.get("features"))
        if isinstance(data, h5py.Dataset) and data.id.get_offset():
            begin, end = data.id.get_offset(), data.id.get_offset() + data.id.get_storage_size()
    seal(path, begin, end, before if done is None else done)


# What a checkpoint needs besides weights, settings and word map; of a run that has not begun.
NOT_BEGUN = dict(epoch=0, batch=0, step=0, totals=[0.0] * 6, recent=[0.0] * 6, seconds=0.0,
                 best_score=[0.0] * 3, epochs_since_improvement=0, run="run", reading={}, entry={}, batches={},
                 world_size=1, optimizers={})


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one MiB; skipped where this process may not mount one.

    Returns:
        Path
    """
    folder = tmp_path / "small_disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1M", "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a tiny sample set, drawn and preprocessed: 12 + 4 + 4 pictures of 64 pixels. Not to be written to.

    Returns:
        Path
    """
    folder = tmp_path_factory.mktemp("tiny") / "data"
    script("data/sample.py", "--out", folder, "--train", 12, "--valid", 4, "--test", 4, "--size", 64, check=0)
    script("pre_process.py", *_tiny_flags(folder), check=0)
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
