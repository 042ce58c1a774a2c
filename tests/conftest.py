"""Fixtures: one tiny data set, runs on it, and a small decoder."""
import itertools
import os
import shutil
import subprocess

import pytest
import torch
from matplotlib.figure import Figure

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: kernels run on a CPU

import pre_process  # noqa: E402
import train  # noqa: E402
from common import WORD_MAP, A, B, D, E, Forked, H, K, SIDE, T, call, folders  # noqa: E402
from data import sample  # noqa: E402
from datasets import END, PAD, START  # noqa: E402
from models import DecoderWithAttention  # noqa: E402


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of 12 + 4 + 4 drawn pictures of 64 pixels, preprocessed. Not to be written to."""
    folder = tmp_path_factory.mktemp("tiny") / "data"
    call(sample.main, "--out", folder, "--train", 12, "--valid", 4, "--test", 4, "--size", 64)
    call(pre_process.main, *_tiny_flags(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_flags(tiny):
    """Flags (str) under which every script is done with the tiny set in seconds. A test that trains
    adds its own --model_dir and --log_dir."""
    return _tiny_flags(tiny)


def _tiny_flags(folder):
    settings = dict(data_dir=folder, image_size=64, min_word_freq=1, encoder="resnet18",
                    encoder_weights="none", encoded_image_size=4, emb_dim=16, attention_dim=16,
                    decoder_dim=16, batch_size=4, epochs=2, workers=0, device="cpu")
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="session", autouse=True)
def small_figures():
    """Figures take most of the time of a tiny run, and hardly a test looks at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runlog.draw_attention", lambda *_: Figure((1, 1)))
        yield


@pytest.fixture(scope="session")
def trained(tiny_flags, tmp_path_factory):
    """The folder of a run of one step, whose model has learnt nothing. Not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    call(train.main, *tiny_flags, *folders(folder), "--epochs", 1, "--batch_size", 12)
    return folder


@pytest.fixture
def run(tiny_flags, tmp_path):
    """A function that runs train.py with more flags, into tmp_path, and returns what it printed."""
    def call_train(*flags, check=0):
        done = call(train.main, *tiny_flags, *folders(tmp_path), *flags, check=check)
        return done.out + done.err
    return call_train


@pytest.fixture
def start(tmp_path_factory):
    """A function that starts train.py with these flags, and environment variables, as Forked."""
    started = []

    def begin(*flags, main=train.main, **variables):
        started.append(Forked(main, flags, tmp_path_factory.mktemp("printed"), variables))
        return started[-1]
    yield begin
    for process in started:
        process.kill()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one MiB; skipped where this process may not mount one."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1M", "none", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    model = DecoderWithAttention(A, E, H, len(WORD_MAP), D, dropout=0.0, encoded_image_size=SIDE)
    for parameter in model.parameters():  # with the initial ones all words are equally likely
        parameter.data.normal_(0, 0.4)
    # Captions of many lengths: at some states the end is near certain, at most it is unlikely.
    model.fc.weight.data[WORD_MAP[END]] *= 6
    model.fc.bias.data[WORD_MAP[END]] -= 3
    return model.eval()


@pytest.fixture
def batch():
    """Pictures with five, three and no captions, of all lengths from <start> <end> on."""
    generator = torch.Generator().manual_seed(1)
    grid = torch.randn(B, 4, 4, D, generator=generator)
    captions = torch.randint(1, 37, (B, K, T + 1), generator=generator)
    lengths = torch.randint(3, T + 2, (B, K), generator=generator)
    lengths[0, 0], lengths[0, 1], lengths[1, 3:], lengths[2] = 2, T + 1, 0, 0
    captions[:, :, 0] = WORD_MAP[START]
    for i, j in itertools.product(range(B), range(K)):
        if lengths[i, j]:
            captions[i, j, lengths[i, j] - 1:] = WORD_MAP[PAD]
            captions[i, j, lengths[i, j] - 1] = WORD_MAP[END]
        else:
            captions[i, j] = WORD_MAP[PAD]
    return grid, captions, lengths
