"""Kept features: the same numbers as the encoder's, never those of another encoder or of other pictures."""
import contextlib
import errno
import json
import os
import pickle
import shutil
import signal
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.distributed as dist
from matplotlib.figure import Figure

import eval
import fast.features
import runlog
import scores
import train
from checkpoint import load_checkpoint
from config import get_config
from common import call
from datasets import CaptionDataset, load_word_map, make_loader
from fast.features import KeptFeatures, encode, keep_features
from models import Encoder
from utils import UserError, alone


class Small(torch.nn.Module):
    """An encoder that takes no time. `pictures` counts what it has encoded."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight, self.pictures = torch.nn.Parameter(torch.linspace(weight, 2 * weight, 8)), 0

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


def keep(folder, encoder, split="train", image_size=64):
    """What train.py does with a split. Returns: CaptionDataset, KeptFeatures, how many pictures were encoded for it."""
    config = get_config(flags=dict(data_dir=str(folder), image_size=image_size, encoder="resnet18", batch_size=4))
    dataset, before = CaptionDataset(config, split, load_word_map(folder)), getattr(encoder, "pictures", 0)
    kept = keep_features(dataset, encoder, encoder, config)
    return dataset, kept, getattr(encoder, "pictures", 0) - before - 1  # the first one is always looked at


def is_the_encoders(features, encoder, folder, split="train"):
    with h5py.File(folder / f"{split}.h5") as file, torch.no_grad():
        grid = encoder.eval()(torch.from_numpy(file["images"][:])).half().numpy()
    return features.dtype == np.float16 and features.shape == grid.shape and np.allclose(features, grid, rtol=2e-3)


def names(folder):
    return {path.name for path in folder.iterdir() if "features" in path.name and path.suffix != ".lock"}


# ---------------------------------------------------------------------------------------------------------------------
# The same numbers


def test_batches_begin_with_the_encoders_own_grid(folder):
    encoder = Small()
    dataset, kept, encoded = keep(folder, encoder)
    assert encoded == 12 and is_the_encoders(np.load(folder / "train_features.npy"), encoder, folder)
    assert names(folder) == {"train_features.npy", "train_features.json"}
    plain = CaptionDataset(get_config(flags=dict(data_dir=str(folder), image_size=64)), "train")
    given, *others = dataset[[7, 2, 2]]
    assert given.dtype == torch.float16 and np.array_equal(given, dataset.features[[7, 2, 2]])
    assert all(torch.equal(a, b) for a, b in zip(others, plain[[7, 2, 2]][1:]))
    assert kept(given).dtype == torch.float32 and torch.equal(kept(given), given.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert kept(given).dtype == torch.bfloat16
    loader = make_loader(dataset, get_config(flags=dict(batch_size=4, workers=2)), False)
    assert np.array_equal(torch.cat([first for first, *_ in loader]), dataset.features)
    assert len(pickle.dumps(dataset)) < len(pickle.dumps(plain)) + 1000, "workers open the features themselves"

    again, _, encoded = keep(folder, encoder)
    assert encoded == 0 and np.array_equal(again.features, dataset.features)
    size = again.features.nbytes
    assert again.hold_features(torch.device("cpu"), size - 1) is None and torch.equal(again[[7, 2, 2]][0], given)
    held = KeptFeatures(again.hold_features(torch.device("cpu"), size))
    assert again[[7, 2]][0].tolist() == [7, 2] and torch.equal(held(again[[7, 2, 2]][0]), kept(given))


def run_training(folder, name, tiny_flags, monkeypatch, *flags):
    """Train in this process. Returns: decoder's weights, losses, how many pictures were encoded."""
    output, encoded, forward = folder.parent / name, [], torch.nn.Module.__call__
    monkeypatch.setattr(sys, "argv", ["train.py", *tiny_flags, "--data_dir", str(folder), "--model_dir", str(output),
                                      "--log_dir", str(output / "logs"), "--dropout", "0", "--fast", "false", *flags])
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "__call__", lambda self, images: encoded.append(len(images)) or forward(self, images))
        patch.setattr(runlog, "draw_attention", lambda *_: Figure())  # most of the time
        train.main()
    log = next((output / "logs").iterdir()) / "log.jsonl"
    return (load_checkpoint(output / "checkpoint.pth.tar")["decoder"],
            [line[part]["loss"] for line in map(json.loads, log.open()) for part in ("train", "valid")], sum(encoded))


def test_training_with_kept_features_is_training_without(folder, tiny_flags, monkeypatch):
    _, plain, encoded = run_training(folder, "plain", tiny_flags, monkeypatch)
    assert encoded == 2 * 16
    first, losses, encoded = run_training(folder, "kept", tiny_flags, monkeypatch, "--cache_features", "true")
    assert encoded == 16 + 2 and losses == pytest.approx(plain, rel=2e-3)
    second, _, encoded = run_training(folder, "again", tiny_flags, monkeypatch, "--cache_features", "true")
    assert encoded == 2 and all(torch.equal(value, second[name]) for name, value in first.items())
    with pytest.raises(UserError, match="cache_features false"):
        run_training(folder, "kept", ["--resume"], monkeypatch, "--fine_tune_encoder", "true")
    _, _, encoded = run_training(folder, "kept", ["--resume"], monkeypatch, "--fine_tune_encoder", "true",
                                 "--cache_features", "false", "--epochs", "3")
    assert encoded == 16


def test_evaluation_reads_kept_features(folder, tiny_flags, monkeypatch):
    run_training(folder, "kept", tiny_flags, monkeypatch, "--cache_features", "true", "--epochs", "1")
    best, result, encoded = folder.parent / "kept" / "BEST_checkpoint.pth.tar", folder.parent / "results.json", []
    monkeypatch.setattr(fast.features, "encode", lambda *given: encoded.append(len(given[2])) or encode(*given))
    monkeypatch.setattr(scores, "meteor", lambda *_: {})  # which takes seconds to start

    def evaluate(*flags):
        encoded.clear()
        done = call(eval.main, "--checkpoint", best, "--beam_size", 1, "--results", result, *flags)
        assert done.code == 0, done.err
        return sum(encoded), [caption["words"] for caption in json.loads(result.read_text())["captions"]]

    count, captions = evaluate()
    assert count == 1, "the first picture is always looked at"
    (folder / "valid_features.npy").unlink()
    assert evaluate() == (5, captions) and evaluate("--cache_features", "false") == (0, captions)


# ---------------------------------------------------------------------------------------------------------------------
# Never those of something else


def other_pictures(folder, encoder):
    with h5py.File(folder / "valid.h5", "a") as file:
        file["images"][:] = file["images"][:][::-1]
        file.attrs["images_digest"] = "0" * 64


def other_code(folder, encoder):
    encoder.forward = lambda images: 1.05 * Encoder.forward(encoder, images)


@pytest.mark.parametrize("change, reason", [
    (lambda folder, encoder: encoder.resnet[7][1].bn2.running_var.mul_(2), "this run's encoder weights"),
    (lambda folder, encoder: encoder.mean.add_(1), "this run's encoder weights"),
    (lambda folder, encoder: encoder.std.mul_(1.02), "this run's encoder weights"),
    (other_code, "what this encoder gives"), (other_pictures, "this run's pictures"),
], ids=["weights", "mean", "std", "forward", "pictures"])
def test_features_of_another_encoder_or_of_other_pictures_are_not_used(change, reason, folder, capsys):
    torch.manual_seed(0)
    encoder = Encoder("resnet18", "none")
    before = np.array(keep(folder, encoder, "valid")[0].features)
    with torch.no_grad():
        change(folder, encoder)
    capsys.readouterr()
    dataset, _, _ = keep(folder, encoder, "valid")
    assert is_the_encoders(dataset.features, encoder, folder, "valid") and not np.array_equal(before, dataset.features)
    line, = capsys.readouterr().out.splitlines()
    assert f"{folder / 'valid_features.npy'} does not " in line and reason in line


def test_features_replaced_by_another_run_are_not_read(folder):
    """A worker process that is spawned opens them by their name, perhaps hours after the run began."""
    spawned = pickle.loads(pickle.dumps(keep(folder, Small())[0]))
    keep(folder, Small(weight=2))
    with pytest.raises(UserError, match="train_features.npy was replaced"):
        spawned[[0]]


def write_header(array, header):
    """A .npy file with this header and no content."""
    array.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())


def write_npz(array):
    with open(array, "wb") as file:
        np.savez(file, np.zeros(3))


DAMAGE = {
    "another format": lambda array, key: write_npz(array),
    "objects": lambda array, key: np.save(array, np.array([{}]), allow_pickle=True),
    "a header that does not end": lambda array, key: write_header(array, "{'descr'"),
    "a shape beyond all bounds": lambda array, key: write_header(
        array, f"{{'descr': '<f2', 'fortran_order': False, 'shape': ({10**24},)}}\n"),
    "no key": lambda array, key: key.unlink(), "no array": lambda array, key: array.unlink(),
    "a key that is not JSON": lambda array, key: key.write_text("{"),
    "an empty key": lambda array, key: key.write_text("{}"),
    "empty": lambda array, key: array.write_bytes(b""),
    "cut short": lambda array, key: array.write_bytes(array.read_bytes()[:-1]),
    "zeros": lambda array, key: np.save(str(array), np.zeros_like(np.load(array))),
    "floats": lambda array, key: np.save(array, np.load(array).astype(np.float32)),
    "fewer pictures": lambda array, key: np.save(array, np.load(array)[:3]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_features_that_are_not_what_they_should_be_are_computed_anew(damage, folder):
    keep(folder, Small())
    array, key = folder / "train_features.npy", folder / "train_features.json"
    DAMAGE[damage](array, key)
    encoder = Small()
    dataset, _, encoded = keep(folder, encoder)
    assert encoded == 12 and is_the_encoders(dataset.features, encoder, folder)
    assert names(folder) == {"train_features.npy", "train_features.json"}


@pytest.mark.parametrize("value", [70_000, float("nan")])
def test_values_that_fp16_cannot_hold_are_refused(value, folder, monkeypatch):
    monkeypatch.setattr(Small, "forward", lambda self, images: torch.full((len(images), 1, 1, 8), value))
    with pytest.raises(UserError, match=r"fp16.*\.jpg.*--cache_features false"):
        keep(folder, Small())
    assert not names(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Cut short


def forked(function):
    """Run a function in another process. Returns: its exit code; what a signal ended is negative."""
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
    """What is under the final names belongs together at every moment, and the next run leaves nothing else."""
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
        with pytest.raises(UserError, match="train_features.* could not be written .the disk is full"):
            keep(folder, encoder)
    dataset, _, encoded = keep(folder, encoder)
    assert encoded == 12 and is_the_encoders(dataset.features, encoder, folder)


def test_without_room_nothing_is_computed(folder, monkeypatch):
    free = 12 * 2 * 2 * 8 * 2
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
        with pytest.raises(UserError, match="train_features.npy.*free"):
            keep(folder, Small())
    assert keep(folder, Small())[2] == 12


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, several runs


def test_two_runs_do_not_write_one_file(folder):
    encoder = Small()
    with alone(folder / "train_features.lock", "--data_dir"), pytest.raises(UserError, match="--data_dir"):
        keep(folder, encoder)
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
