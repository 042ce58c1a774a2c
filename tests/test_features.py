"""Kept features: the same numbers as the encoder's, never those of another encoder or of other pictures."""
import errno
import fcntl
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, tampered
from matplotlib.figure import Figure
from test_datasets import external_link, external_storage, replace, virtual

import datasets
import train
from config import UserError, get_config
from datasets import CaptionDataset, load_word_map, make_loader
from models import Encoder
from utils import load_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the tiny set as training reads it."""
    (tmp_path / "data").mkdir()
    for name in ("train.h5", "valid.h5", "WORDMAP.json"):
        shutil.copy(tiny / name, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return Encoder("resnet18", "none")


def keep(folder, encoder, split="valid", image_size=64):
    """What train.py does with a split. Returns: CaptionDataset, KeptFeatures, how many pictures were encoded."""
    config = get_config(flags=dict(data_dir=str(folder), image_size=image_size, encoder="resnet18", batch_size=4,
                                   workers=0))
    dataset, encoded = CaptionDataset(config, split, load_word_map(folder)), []
    hook = encoder.register_forward_hook(lambda module, given, grid: encoded.append(len(grid)))
    try:
        return dataset, train.keep_features(dataset, encoder, config, CPU, 0, 1), sum(encoded)
    finally:
        hook.remove()


def is_the_encoders(dataset, encoder):
    with torch.no_grad():
        grid = encoder.eval()(torch.from_numpy(np.array(dataset.images))).half().numpy()
    assert dataset.features.dtype == np.float16 and dataset.features.shape == grid.shape
    return np.allclose(dataset.features, grid, rtol=2e-3, atol=1e-4)


def rewrite(path, change):
    with tampered(path) as file:
        change(file)


# ---------------------------------------------------------------------------------------------------------------------
# The same numbers


def test_batches_begin_with_the_encoders_own_grid(folder, encoder):
    dataset, kept, encoded = keep(folder, encoder, "train")
    assert encoded == len(dataset) == 12 and is_the_encoders(dataset, encoder)
    assert sorted(path.name for path in folder.iterdir()) == ["WORDMAP.json", "train.h5", "train_features.h5",
                                                              "valid.h5"]
    plain = CaptionDataset(get_config(flags=dict(data_dir=str(folder), image_size=64)), "train", load_word_map(folder))
    given, *others = dataset[[7, 2, 2]]
    assert given.dtype == torch.float16 and np.array_equal(given, dataset.features[[7, 2, 2]])
    assert all(torch.equal(a, b) for a, b in zip(others, plain[[7, 2, 2]][1:]))
    assert kept(given).dtype == torch.float32 and torch.equal(kept(given), given.float())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert kept(given).dtype == encoder(torch.from_numpy(dataset.images[[7]])).dtype

    again, _, encoded = keep(folder, encoder, "train")
    assert encoded == 0 and np.array_equal(again.features, dataset.features)


def test_features_that_a_device_holds_are_those_of_the_file(folder, encoder, monkeypatch):
    dataset, kept, _ = keep(folder, encoder, "train")
    size = 12 * 2 * 2 * 512 * 2
    assert dataset.hold_features(CPU, size - 1) is None and dataset[[7, 2]][0].dtype == torch.float16
    expected = kept(dataset[[7, 2]][0])
    held = train.KeptFeatures(dataset.hold_features(CPU, size))
    assert dataset[[7, 2]][0].tolist() == [7, 2] and torch.equal(held(dataset[[7, 2]][0]), expected)


def test_workers_open_the_features_themselves(folder, encoder):
    plain = CaptionDataset(get_config(flags=dict(data_dir=str(folder), image_size=64)), "train", load_word_map(folder))
    dataset, _, _ = keep(folder, encoder, "train")
    batch, pickled = dataset[[0, 5]], pickle.dumps(dataset)
    assert len(pickled) < len(pickle.dumps(plain)) + 1000
    assert all(torch.equal(a, b) for a, b in zip(batch, pickle.loads(pickled)[[0, 5]]))
    config = get_config(flags=dict(batch_size=4, workers=2))
    given = torch.cat([first for first, *_ in make_loader(dataset, config, shuffle=False)])
    assert np.array_equal(given, dataset.features)


def run_training(folder, name, tiny_flags, monkeypatch, *flags):
    """Train in this process. Returns: checkpoint, log lines, how many pictures were encoded."""
    output, encoded, forward = folder.parent / name, [], Encoder.forward
    monkeypatch.setattr(sys, "argv", ["train.py", *tiny_flags, "--data_dir", str(folder), "--model_dir", str(output),
                                      "--log_dir", str(output / "logs"), "--dropout", "0", *flags])
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "forward", lambda self, images: encoded.append(len(images)) or forward(self, images))
        patch.setattr(train, "draw_attention", lambda *_: Figure())  # most of the time
        train.main()
    log = next((output / "logs").iterdir()) / "log.jsonl"
    return load_checkpoint(output / "checkpoint.pth.tar"), list(map(json.loads, log.open())), sum(encoded)


def losses(log):
    return [line[part]["loss"] for line in log for part in ("train", "valid")]


def test_training_with_kept_features_is_training_without(folder, tiny_flags, monkeypatch):
    _, plain, encoded = run_training(folder, "plain", tiny_flags, monkeypatch)
    assert encoded == 2 * 16
    first, kept, encoded = run_training(folder, "kept", tiny_flags, monkeypatch, "--cache_features", "true")
    assert encoded == 16 and losses(kept) == pytest.approx(losses(plain), rel=2e-3)
    second, _, encoded = run_training(folder, "again", tiny_flags, monkeypatch, "--cache_features", "true")
    assert encoded == 0
    assert all(torch.equal(value, second["decoder"][name]) for name, value in first["decoder"].items())
    with pytest.raises(UserError, match="cache_features false"):
        run_training(folder, "kept", ["--resume"], monkeypatch, "--fine_tune_encoder", "true")
    assert run_training(folder, "kept", ["--resume"], monkeypatch, "--fine_tune_encoder", "true", "--cache_features",
                        "false", "--epochs", "3")[2] == 16


def test_numbers_that_fp16_holds_make_no_difference_at_all(folder, tiny_flags, monkeypatch):
    monkeypatch.setattr(Encoder, "forward",
                        lambda self, images: images[:, ::32, ::32, :1].expand(-1, -1, -1, 512) / 256)
    plain, plain_log, _ = run_training(folder, "plain", tiny_flags, monkeypatch)
    kept, log, encoded = run_training(folder, "kept", tiny_flags, monkeypatch, "--cache_features", "true")
    assert encoded == 16 and losses(log) == losses(plain_log)
    assert all(torch.equal(value, kept["decoder"][name]) for name, value in plain["decoder"].items())


def test_fine_tuning_contradicts_kept_features():
    for flags in (["--fine_tune_encoder", "true"], ["--preset", "sample"]):
        with pytest.raises(UserError, match="cache_features.*fine_tune_encoder"):
            args = train.parse_args("", argv=[*flags, "--cache_features", "true"])
            get_config(args.preset, args.flags)


# ---------------------------------------------------------------------------------------------------------------------
# Never those of something else


def test_the_pictures_digest_is_of_all_their_pixels(tiny):
    for split in ("train", "valid", "test_a"):
        with h5py.File(tiny / f"{split}.h5") as file:
            assert file.attrs["images_digest"] == hashlib.sha256(file["images"][:].tobytes()).hexdigest()


@pytest.mark.parametrize("change, reason", [
    (lambda folder, encoder: encoder.resnet[7][1].bn2.running_var.mul_(2), "other encoder weights"),
    (lambda folder, encoder: rewrite(folder / "valid.h5", lambda file: (
        file["images"].write_direct(file["images"][:][::-1].copy()), file.attrs.update(images_digest="0" * 64))),
     "other pictures"),
    (lambda folder, encoder: rewrite(folder / "valid.h5", lambda file: (
        replace(file, "images", lambda file, name, data: file.create_dataset(name, data=data[:, :60, :60])),
        file.attrs.update(image_size=60))), "image_size 64, not 60"),
], ids=["weights", "pictures", "size"])
def test_features_of_another_encoder_or_of_other_pictures_are_not_used(change, reason, folder, capsys):
    encoder = Encoder("resnet18", "none")
    before, _, _ = keep(folder, encoder)
    before = before.features.copy()
    capsys.readouterr()
    change(folder, encoder)
    with h5py.File(folder / "valid.h5") as file:
        size = int(file.attrs["image_size"])
    dataset, _, encoded = keep(folder, encoder, image_size=size)
    assert encoded == 4 and is_the_encoders(dataset, encoder) and not np.allclose(before, dataset.features, rtol=0.01)
    line, = capsys.readouterr().out.splitlines()
    assert f"{folder / 'valid_features.h5'} was made with {reason}" in line
    assert keep(folder, encoder, image_size=size)[2] == 0


def test_data_of_unknown_pictures_are_refused(folder, encoder):
    rewrite(folder / "valid.h5", lambda file: file.attrs.pop("images_digest"))
    with pytest.raises(UserError, match="valid.h5.*pre_process.py --overwrite"):
        keep(folder, encoder)


DAMAGE = {
    "no features": lambda file: file.pop("features"),
    "floats": lambda file: replace(file, "features", lambda file, name, data: file.create_dataset(
        name, data=data.astype(np.float32))),
    "chunks": lambda file: replace(file, "features", lambda file, name, data: file.create_dataset(
        name, data=data, chunks=(1, 2, 2, 512))),
    "fewer pictures": lambda file: replace(file, "features", lambda file, name, data: file.create_dataset(
        name, data=data[:3])),
    "a smaller grid": lambda file: replace(file, "features", lambda file, name, data: file.create_dataset(
        name, data=data[:, :1])),
    "an external link": lambda file: external_link(file, "features"),
    "external storage": lambda file: external_storage(file, "features"),
    "a virtual data set": lambda file: virtual(file, "features"),
    "a group": lambda file: replace(file, "features", lambda file, name, data: file.create_group(name)),
    "no attributes": lambda file: [file.attrs.pop(name) for name in list(file.attrs)],
    "another version": lambda file: file.attrs.update(features_version=99),
}
COUNTS = {"rows to do": 3, "a count beyond the rows": 5}


@pytest.mark.parametrize("damage, unfinished", [
    (damage, unfinished) for damage in [*DAMAGE, *COUNTS, "flipped", "empty", "text", "half", "one byte short"]
    for unfinished in (False, True) if (damage, unfinished) != ("rows to do", True)])
def test_a_features_file_that_is_not_what_it_should_be_is_made_again(damage, unfinished, folder, encoder, capsys):
    path = folder / "valid_features.h5"
    keep(folder, encoder)
    if damage in DAMAGE:
        rewrite(path, DAMAGE[damage])
    elif damage in COUNTS:
        with tampered(path, COUNTS[damage]):
            pass
    else:
        whole = path.read_bytes()
        path.write_bytes({"empty": b"", "text": b"not HDF5" * 1000, "half": whole[:len(whole) // 2],
                          "flipped": whole[:800] + bytes([whole[800] ^ 4]) + whole[801:]}.get(damage, whole[:-1]))
    if unfinished:
        path = path.rename(f"{path}.tmp")
    dataset, _, encoded = keep(folder, encoder)
    assert encoded == 4 and is_the_encoders(dataset, encoder)
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{path} ")
    assert not list(folder.glob("*.tmp"))


# ---------------------------------------------------------------------------------------------------------------------
# Cut short


KILLED = """
import os, pathlib, sys, torch
import datasets, test_features
from models import Encoder
torch.manual_seed(0)
encoder, batches = Encoder("resnet18", "none"), []
datasets.SYNC_ROWS = 8
def hook(*_):
    batches.append(1)
    if len(batches) == 3:
        os.kill(os.getpid(), 9)
encoder.register_forward_hook(hook)
test_features.keep(pathlib.Path(sys.argv[1]), encoder, "train")
"""


def test_a_killed_run_is_gone_on_with(folder, encoder):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], cwd=ROOT, capture_output=True,
                            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    temporary = folder / "train_features.h5.tmp"
    assert not (folder / "train_features.h5").exists()
    with tampered(temporary) as file:
        assert datasets.open_sealed(temporary)[1] == 8
        done = file["features"][:8].copy()
        file["features"][0] = 7  # to be known again
    dataset, _, encoded = keep(folder, encoder, "train")
    assert encoded == 4 and not temporary.exists()
    assert (dataset.features[0] == 7).all() and np.array_equal(dataset.features[1:8], done[1:])
    dataset.features = np.concatenate([done[:1], dataset.features[1:]])
    assert is_the_encoders(dataset, encoder)


def test_what_was_killed_before_it_got_its_name_gets_it(folder, encoder):
    path = folder / "valid_features.h5"
    expected = keep(folder, encoder)[0].features.copy()
    path.rename(f"{path}.tmp")
    dataset, _, encoded = keep(folder, encoder)
    assert encoded <= 1 and np.allclose(dataset.features, expected, rtol=2e-3, atol=1e-4) and path.exists()


def test_the_old_file_stays_until_the_new_one_is_whole(folder, encoder, monkeypatch):
    path = folder / "valid_features.h5"
    keep(folder, encoder)
    old = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: pytest.fail("too early"))
        patch.setattr(train, "encode_half", lambda *_: (_ for _ in ()).throw(UserError("cut short")))
        with pytest.raises(UserError, match="cut short"):
            keep(folder, Encoder("resnet18", "none"))
    assert path.read_bytes() == old


def test_two_runs_do_not_write_one_file(folder, encoder):
    temporary = folder / "valid_features.h5.tmp"
    keep(folder, encoder)
    (folder / "valid_features.h5").rename(temporary)
    before = temporary.read_bytes()
    with open(temporary, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run"):
            keep(folder, encoder)
    assert temporary.read_bytes() == before


@pytest.mark.parametrize("value", [70_000, -70_000, float("nan")])
def test_values_that_fp16_cannot_hold_are_refused(value, folder, encoder):
    def spoil(module, given, grid):
        grid[1, 0, 0, 0] = value
    hook = encoder.register_forward_hook(spoil)
    try:
        with pytest.raises(UserError, match=r"fp16.*\.jpg.*--cache_features false"):
            keep(folder, encoder)
    finally:
        hook.remove()
    assert not (folder / "valid_features.h5").exists()


def test_without_room_nothing_is_begun(folder, encoder, monkeypatch):
    free = 4 * 2 * 2 * 512 * 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
    with pytest.raises(UserError, match="valid_features.h5.*free"):
        keep(folder, encoder)
    assert not list(folder.glob("*features*"))


def test_a_disk_that_fills_up_on_the_way(folder, encoder, monkeypatch):
    def fsync(handle):
        calls.append(handle)
        if len(calls) == 3:  # the first batch and its count are on the disk, the second is not
            raise OSError(errno.ENOSPC, "No space left on device")

    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "SYNC_ROWS", 4)
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match="train_features.h5 could not be written .the disk is full"):
            keep(folder, encoder, "train")
    assert not (folder / "train_features.h5").exists()
    dataset, _, encoded = keep(folder, encoder, "train")
    assert encoded == 8 and is_the_encoders(dataset, encoder)


def test_a_file_larger_than_files_may_be(folder, encoder):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(UserError, match="train_features.h5 could not be written .*large"):
            keep(folder, encoder, "train")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert keep(folder, encoder, "train")[2] == 12


@pytest.mark.parametrize("name", ["valid_features.h5", "valid_features.h5.tmp"])
def test_a_folder_in_the_place_of_a_file(name, folder, encoder):
    (folder / name).mkdir()
    with pytest.raises(UserError, match="valid_features.h5 could not be written"):
        keep(folder, encoder)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def test_two_processes_make_the_features_of_one(folder, encoder, tiny_flags, monkeypatch):
    flags = [*tiny_flags, "--epochs", "1", "--cache_features", "true"]
    _, one, _ = run_training(folder, "one", flags, monkeypatch)
    made = {}
    for split in ("train", "valid"):
        path = folder / f"{split}_features.h5"
        with h5py.File(path) as file:
            made[split] = file["features"][:], dict(file.attrs)
        path.unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py",
               *flags, "--dropout", "0", "--data_dir", folder, "--model_dir", folder / "two", "--log_dir",
               folder / "two" / "logs"]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for split, (features, attributes) in made.items():
        with h5py.File(folder / f"{split}_features.h5") as file:
            assert np.allclose(file["features"][:], features, rtol=2e-3, atol=1e-4) and dict(file.attrs) == attributes
    log = next((folder / "two" / "logs").iterdir()) / "log.jsonl"
    assert losses(map(json.loads, log.open())) == pytest.approx(losses(one), rel=1e-4)
