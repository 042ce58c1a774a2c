"""Kept features: the encoder's own numbers, never those of another encoder or other pictures."""
import contextlib
import errno
import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.distributed as dist
from common import BEST, SMALL, call, fails, folders, last_checkpoint, read_log

import eval
import fast.features
import scores
import train
from config import get_config
from datasets import CaptionDataset, load_word_map, make_loader
from fast.features import KeptFeatures, encode, keep_features
from models import Encoder
from utils import UserError, alone


class Small(torch.nn.Module):
    """An encoder that takes no time. `pictures` counts what it has encoded."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(weight, 2 * weight, 8))
        self.pictures = 0

    def forward(self, images):
        self.pictures += len(images)
        return images[:, ::32, ::32, :1].float() / 256 * self.weight


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the tiny set as training reads it: 12 and 4 pictures, 3 batches and one."""
    (tmp_path / "data").mkdir()
    for name in ("train.h5", "valid.h5", "WORDMAP.json"):
        shutil.copy(tiny / name, tmp_path / "data")
    return tmp_path / "data"


def keep(folder, encoder, split="train"):
    """What train.py does with a split.

    Returns:
        CaptionDataset, KeptFeatures, how many pictures were encoded for it
    """
    config = get_config(flags=dict(data_dir=str(folder), image_size=64, encoder="resnet18",
                                   batch_size=4))
    dataset = CaptionDataset(config, split, load_word_map(folder))
    before = getattr(encoder, "pictures", 0) + 1  # the first one is always looked at
    kept = keep_features(dataset, encoder, encoder, config)
    return dataset, kept, getattr(encoder, "pictures", 0) - before


def is_the_encoders(features, encoder, folder, split="train"):
    with h5py.File(folder / f"{split}.h5") as file, torch.no_grad():
        grid = encoder.eval()(torch.from_numpy(file["images"][:])).half().numpy()
    is_alike = features.dtype == np.float16 and features.shape == grid.shape
    return is_alike and np.allclose(features, grid, rtol=2e-3)


def names(folder):
    return {path.name for path in folder.iterdir()
            if "features" in path.name and path.suffix != ".lock"}


# -------------------------------------------------------------------------------------------------
# The same numbers


def test_batches_begin_with_the_encoders_own_grid(folder):
    encoder, rows = Small(), [7, 2, 2]
    dataset, kept, encoded = keep(folder, encoder)
    assert encoded == 12
    assert is_the_encoders(np.load(folder / "train_features.npy"), encoder, folder)
    assert names(folder) == {"train_features.npy", "train_features.json"}
    config = get_config(flags=dict(data_dir=str(folder), image_size=64, batch_size=4, workers=2))
    plain = CaptionDataset(config, "train")
    given, *others = dataset[rows]
    assert given.dtype == torch.float16 and np.array_equal(given, dataset.features[rows])
    assert all(torch.equal(a, b) for a, b in zip(others, plain[rows][1:]))
    assert kept(given).dtype == torch.float32 and torch.equal(kept(given), given.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert kept(given).dtype == torch.bfloat16
    loader = make_loader(dataset, config, False)
    assert np.array_equal(torch.cat([first for first, *_ in loader]), dataset.features)
    size = len(pickle.dumps(dataset))
    assert size < len(pickle.dumps(plain)) + 1000, "workers open the features themselves"

    again, _, encoded = keep(folder, encoder)
    assert encoded == 0 and np.array_equal(again.features, dataset.features)
    size, cpu = again.features.nbytes, torch.device("cpu")
    assert again.hold_features(cpu, size - 1) is None and torch.equal(again[rows][0], given)
    held = KeptFeatures(again.hold_features(cpu, size))
    assert again[rows][0].tolist() == rows and torch.equal(held(again[rows][0]), kept(given))


@pytest.fixture
def run(folder, tmp_path, tiny_flags, monkeypatch):
    """A function that trains in a folder of this name.

    Returns:
        decoder's weights, losses, how many pictures were encoded
    """
    encoded, forward = [], torch.nn.Module.__call__

    def count(self, images):
        encoded.append(len(images))
        return forward(self, images)

    def train_it(name, *flags):
        encoded.clear()
        small = [f"--{key}={value}" for key, value in SMALL.items()]
        with monkeypatch.context() as patch:
            patch.setattr(Encoder, "__call__", count)
            call(train.main, *tiny_flags, *small, "--data_dir", folder, *folders(tmp_path / name),
                 "--dropout", 0, "--fast", "false", *flags)
        losses = [line[part]["loss"] for line in read_log(tmp_path / name)[0]
                  for part in ("train", "valid")]
        return last_checkpoint(tmp_path / name)["decoder"], losses, sum(encoded)
    return train_it


def test_training_with_kept_features_is_training_without(run, tmp_path):
    keeps = "--cache_features", "true"
    _, plain, encoded = run("plain")
    assert encoded == 2 * 16
    first, losses, encoded = run("kept", *keeps)
    assert encoded == 16 + 2 and losses == pytest.approx(plain, rel=2e-3)
    second, _, encoded = run("again", *keeps)
    assert encoded == 2 and all(torch.equal(value, second[name]) for name, value in first.items())
    tunes = "--resume", "--fine_tune_encoder", "true"
    fails(train.main, *folders(tmp_path / "kept"), *tunes, parts=("cache_features false",))
    _, _, encoded = run("kept", *tunes, "--cache_features", "false", "--epochs", 3)
    assert encoded == 16


def test_evaluation_reads_kept_features(run, folder, tmp_path, monkeypatch):
    run("kept", "--cache_features", "true", "--epochs", 1)
    result, encoded = tmp_path / "results.json", []

    def count(*given):
        encoded.append(len(given[2]))
        return encode(*given)
    monkeypatch.setattr(fast.features, "encode", count)
    monkeypatch.setattr(scores, "meteor", lambda *_: {})  # which takes seconds to start

    def evaluate(*flags):
        encoded.clear()
        call(eval.main, "--checkpoint", tmp_path / "kept" / "models" / BEST, "--beam_size", 1,
             "--results", result, *flags)
        captions = json.loads(result.read_text())["captions"]
        return sum(encoded), [caption["words"] for caption in captions]

    count, captions = evaluate()
    assert count == 1, "the first picture is always looked at"
    (folder / "valid_features.npy").unlink()
    assert evaluate() == (5, captions)
    assert evaluate("--cache_features", "false") == (0, captions)


# -------------------------------------------------------------------------------------------------
# Never those of something else


def other_pictures(folder, encoder):
    with h5py.File(folder / "valid.h5", "a") as file:
        file["images"][:] = file["images"][:][::-1]
        file.attrs["images_digest"] = "0" * 64


def other_code(folder, encoder):
    encoder.forward = lambda images: 1.05 * Encoder.forward(encoder, images)


@pytest.mark.parametrize("change, reason", [
    (lambda _, encoder: encoder.resnet[7][1].bn2.running_var.mul_(2), "this run's encoder weights"),
    (lambda _, encoder: encoder.mean.add_(1), "this run's encoder weights"),
    (other_code, "what this encoder gives"), (other_pictures, "this run's pictures"),
], ids=["weights", "mean", "forward", "pictures"])
def test_features_of_another_encoder_or_of_other_pictures_are_not_used(change, reason, folder,
                                                                       capsys):
    torch.manual_seed(0)
    encoder = Encoder("resnet18", "none")
    before = np.array(keep(folder, encoder, "valid")[0].features)
    with torch.no_grad():
        change(folder, encoder)
    capsys.readouterr()
    dataset, _, _ = keep(folder, encoder, "valid")
    assert is_the_encoders(dataset.features, encoder, folder, "valid")
    assert not np.array_equal(before, dataset.features)
    line, = capsys.readouterr().out.splitlines()
    assert f"{folder / 'valid_features.npy'} does not " in line and reason in line


def test_features_replaced_by_another_run_are_not_read(folder):
    """A worker process that is spawned opens them by their name, hours after the run began."""
    spawned = pickle.loads(pickle.dumps(keep(folder, Small())[0]))
    keep(folder, Small(weight=2))
    with pytest.raises(UserError, match="train_features.npy was replaced"):
        spawned[[0]]


@pytest.mark.parametrize("damage", [
    lambda array, key: array.write_bytes(b"\x93NUMPY\x01\x00\x08\x00{'descr'"),
    lambda array, key: np.save(array, np.array([{}]), allow_pickle=True),
    lambda array, key: key.unlink(), lambda array, key: array.unlink(),
    lambda array, key: key.write_text("{"), lambda array, key: key.write_text("{}"),
    lambda array, key: array.write_bytes(array.read_bytes()[:-1]),
    lambda array, key: np.save(array, np.zeros_like(np.load(array))),
    lambda array, key: np.save(array, np.load(array).astype(np.float32)),
    lambda array, key: np.save(array, np.load(array)[:3]),
], ids=["no header", "objects", "no key", "no array", "a key that is not JSON", "an empty key",
        "cut short", "zeros", "floats", "fewer pictures"])
def test_features_that_are_not_what_they_should_be_are_computed_anew(damage, folder):
    keep(folder, Small())
    array, key = folder / "train_features.npy", folder / "train_features.json"
    damage(array, key)
    encoder = Small()
    dataset, _, encoded = keep(folder, encoder)
    assert encoded == 12 and is_the_encoders(dataset.features, encoder, folder)
    assert names(folder) == {array.name, key.name}


@pytest.mark.parametrize("value", [70_000, float("nan")])
def test_values_that_fp16_cannot_hold_are_refused(value, folder, monkeypatch):
    def forward(self, images):
        return torch.full((len(images), 1, 1, 8), value)
    monkeypatch.setattr(Small, "forward", forward)
    with pytest.raises(UserError, match=r"fp16.*\.jpg.*--cache_features false"):
        keep(folder, Small())
    assert not names(folder)


# -------------------------------------------------------------------------------------------------
# Cut short


def forked(function):
    """Run a function in another process. Returns its exit code; what a signal ended is negative."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            function()
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(moment, monkeypatch):
    """Kill this process just before its change number `moment` of the disk."""
    left = iter(range(moment))

    def dangerous(function):
        def call(*args, **keywords):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **keywords)
        return call

    for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (Path, "write_text"),
                        (fast.features, "encode")):
        monkeypatch.setattr(owner, name, dangerous(getattr(owner, name)))


def test_a_run_killed_at_any_moment_leaves_whole_features_or_none(folder, monkeypatch):
    """What is under the final names belongs together at every moment, and the next run leaves
    nothing else."""
    array, key = folder / "train_features.npy", folder / "train_features.json"
    old, new = Small(weight=2), Small()
    keep(folder, old)
    whole = [path.read_bytes() for path in (array, key)]
    for moment in range(100):
        array.write_bytes(whole[0])
        key.write_bytes(whole[1])
        code = forked(lambda moment=moment: (killed_at(moment, monkeypatch), keep(folder, new)))
        is_old = key.exists() and key.read_bytes() == whole[1]
        assert is_the_encoders(np.load(array), old if is_old else new, folder) or not key.exists()
        dataset, _, _ = keep(folder, new)
        assert is_the_encoders(dataset.features, new, folder), moment
        assert names(folder) == {array.name, key.name}
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0 and moment > 5


@pytest.mark.parametrize("moment", range(1, 4))
def test_a_disk_that_fills_up_on_the_way(moment, folder, monkeypatch):
    def fsync(handle):
        calls.append(handle)
        if len(calls) == moment:
            raise OSError(errno.ENOSPC, "No space left on device")

    calls, encoder = [], Small()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        full = "train_features.* could not be written .the disk is full"
        with pytest.raises(UserError, match=full):
            keep(folder, encoder)
    dataset, _, encoded = keep(folder, encoder)
    assert encoded == 12 and is_the_encoders(dataset.features, encoder, folder)


def test_without_room_nothing_is_computed(folder, monkeypatch):
    free = 12 * 2 * 2 * 8 * 2
    with monkeypatch.context() as patch:
        usage = shutil._ntuple_diskusage(10**9, 10**9 - free, free)
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match="train_features.npy.*free"):
            keep(folder, Small())
    assert keep(folder, Small())[2] == 12


# -------------------------------------------------------------------------------------------------
# Several processes, several runs


def test_two_runs_do_not_write_one_file(folder):
    with alone(folder / "train_features.lock", "--data_dir"), \
            pytest.raises(UserError, match="--data_dir"):
        keep(folder, Small())
    assert not (folder / "train_features.npy").exists()


def test_two_processes_make_the_features_of_one(folder):
    def process(rank):
        dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
        dataset, _, encoded = keep(folder, encoder)
        assert encoded == (8, 4)[rank] and is_the_encoders(dataset.features, encoder, folder)

    encoder, child = Small(), os.fork()
    if not child:
        os._exit(forked(lambda: process(1)))
    assert forked(lambda: process(0)) == 0 and os.waitpid(child, 0)[1] == 0
    assert is_the_encoders(keep(folder, encoder)[0].features, encoder, folder)
