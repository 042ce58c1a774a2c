"""What the surroundings do to a run: other runs, terminals and pipes that close, full disks, little
memory, a user without a home, checkpoints of somebody else."""
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from common import (ROOT, call, error_line, fails, flags, folders, last_checkpoint, processes,
                    stop_during)

import datasets
import demo
import eval
import runlog
import state
import train
import utils
from checkpoint import save_checkpoint
from config import Config, get_config
from datasets import CaptionDataset, load_word_map, make_loader

LONG = dict(epochs=200, early_stop_epochs=200, checkpoint_minutes=60, lr_decay_epochs=200)


# -------------------------------------------------------------------------------------------------
# Other runs


def test_two_runs_of_one_folder(tiny_flags, tmp_path, start):
    """Also before there is a checkpoint; what dies, however it does, keeps nothing to itself."""
    given = [*tiny_flags, *flags(tmp_path, **LONG, workers=2)]
    first = start(*given)
    first.wait_for("training and")
    fails(train.main, *given, parts=(f"process {first.pid} on ", "--model_dir"))
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert "Finished" in call(train.main, *given, "--epochs", 1).out


def test_two_runs_of_one_second_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.setattr(runlog.time, "strftime", lambda format: "20261128-120000")
    names = [runlog.new_run(Config(log_dir=str(tmp_path / "logs"))) for _ in range(3)]
    assert len({*names}) == 3 and all((tmp_path / "logs" / name).is_dir() for name in names)
    (tmp_path / "file").touch()
    with pytest.raises(utils.UserError, match="--log_dir"):
        runlog.new_run(Config(log_dir=str(tmp_path / "file")))


def test_folders_that_cannot_be_written_are_found_before_the_work(trained, tiny_flags, tmp_path,
                                                                   monkeypatch):
    (tmp_path / "models").touch()
    fails(train.main, *tiny_flags, *folders(tmp_path), parts=(tmp_path / "models",))
    assert not (tmp_path / "logs").exists()
    monkeypatch.setattr(eval, "generate", None)
    for flag in ("--results", "--write_submission"):
        fails(eval.main, "--model_dir", trained / "models", flag, tmp_path / "models" / "x.json",
              parts=(tmp_path / "models",))


def slow_validation():
    """train.py, where validation has two batches for two processes, and takes its time."""
    generate = train.generate

    def slow(*args, **keywords):
        print("in validation")
        time.sleep(2)
        return generate(*args, **keywords)
    train.generate = slow
    train.for_validation = lambda config, device: dataclasses.replace(config, batch_size=1)
    train.main()


def test_several_processes_save_when_they_are_told_to_stop_in_validation(tiny_flags, tmp_path,
                                                                         start):
    """Each after its first of two batches, not after the last one, which may be minutes later."""
    given = [*tiny_flags, *folders(tmp_path), "--batch_size", 2, "--epochs", 1, "--print_freq", 1]
    runs = [start(*given, main=slow_validation, **variables) for variables in processes(2)]
    for run in runs:
        run.wait_for("in validation")
        os.kill(run.pid, signal.SIGTERM)
    for run in runs:
        assert run.wait() == 128 + signal.SIGTERM and run.out().count("in validation") == 1
    bars = runs[0].err().count("epoch 1: ")
    assert bars <= 2, "in a file a progress bar shows its beginning and its end"
    progress = last_checkpoint(tmp_path)["progress"]
    assert (progress["epoch"], progress["batch"]) == (0, 6)


# -------------------------------------------------------------------------------------------------
# Terminals, pipes, homes


def in_a_terminal():
    terminal = os.open(os.environ["TERMINAL"], os.O_RDWR)  # the first one is the session's own
    for number in range(3):
        os.dup2(terminal, number)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    train.main()


def test_a_closed_terminal_saves_the_run(tiny_flags, tmp_path, start):
    """The kernel sends SIGHUP to all of its processes, and writing to it fails from then on."""
    ours, theirs = os.openpty()
    given = flags(tmp_path, **LONG, workers=1, batch_size=12)
    run = start(*tiny_flags, *given, main=in_a_terminal, TERMINAL=os.ttyname(theirs))
    shown = b""
    while b"epoch 2" not in shown:
        shown += os.read(ours, 1000)
    os.close(theirs)
    os.close(ours)
    assert run.wait() == 128 + signal.SIGHUP
    progress = last_checkpoint(tmp_path)["progress"]
    assert progress["step"] == progress["epoch"] + progress["batch"] > 0


def test_a_run_under_nohup_outlives_its_terminal(run, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop_during(monkeypatch, 1, signal.SIGHUP)
        assert "Finished" in run("--epochs", 1, "--batch_size", 12)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["train", "eval", "demo", "pre_process", "scores"])
def test_ctrl_c_while_packages_are_imported_needs_no_traceback(name):
    """In the place of Ctrl-C, PyTorch raises what Python makes of it."""
    code = ("import sys, runpy\n"
            "class Slow:\n"
            "    def find_spec(self, name, *rest):\n"
            "        if name == 'torch':\n"
            "            raise KeyboardInterrupt\n"
            "sys.meta_path.insert(0, Slow())\n"
            f"runpy.run_path({str(ROOT / name)!r} + '.py', run_name='__main__')\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and not done.stderr


def to_a_closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    print("caption")


def test_a_reader_that_has_seen_enough_needs_no_traceback(start):
    process = start(main=to_a_closed_pipe)
    assert process.wait() == 128 + signal.SIGPIPE and not process.err()


def test_a_user_without_a_home():
    """nltk looks for one while it is imported, unless all users have a folder that it may write
    to."""
    code = (f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "os.environ.pop('HOME')\n"
            "os.path.expanduser = lambda path: path.replace('~', os.environ.get('HOME', '~'))\n"
            "os.access = lambda *_, **__: False\n"
            "import utils, scores\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------------------
# Disks and memory


def test_logs_on_a_full_disk(small_disk, tiny_flags, tmp_path, start):
    """One line, and nothing that was trained is lost."""
    models = tmp_path.parent / f"{tmp_path.name}-models"
    given = [*tiny_flags, *flags(tmp_path, **LONG), "--model_dir", models]
    process = start(*given)
    process.wait_for("epoch 1: train")
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    assert process.wait() == 2 and "the disk is full" in error_line(process.err())
    filler.unlink()
    epoch = torch.load(models / "checkpoint.pth.tar", weights_only=True)["epoch"]
    resumed = call(train.main, "--resume", *given, "--epochs", epoch + 1).out
    assert epoch >= 1 and f"resuming at epoch {epoch + 1}, batch 1" in resumed
    assert "Finished" in resumed


def test_workers_have_room_for_their_batches(tiny, tmp_path, monkeypatch, capsys):
    """4 pictures of 64 pixels and their captions take some 50 KB; two batches per worker wait, two
    are in use."""
    config = get_config(flags=dict(data_dir=str(tiny), image_size=64, batch_size=4, workers=2))
    dataset = CaptionDataset(config, "train", load_word_map(tiny))
    batch = 4 * sum(tensor.nbytes for tensor in dataset[[0]])
    monkeypatch.setattr(datasets.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(datasets, "SHARED_MEMORY", tmp_path)
    for room, workers in ((100, 2), (5, 1), (3, 0)):
        usage = SimpleNamespace(free=room * batch)
        monkeypatch.setattr(datasets.shutil, "disk_usage", lambda path, usage=usage: usage)
        loader = make_loader(dataset, config, True)
        assert len(list(loader)) == 3 and loader.num_workers == workers
        said = capsys.readouterr().out
        assert ("--shm-size" in said and f"{workers} workers instead of 2" in said) == (workers < 2)


# -------------------------------------------------------------------------------------------------
# Checkpoints of somebody else


def test_a_checkpoint_of_a_gpu_runs_on_a_cpu():
    config = get_config(flags={}, trained=vars(Config(device="cuda:7")))
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert config.device == "auto" and utils.get_device(config).type == expected


@pytest.mark.parametrize("change, parts", [
    (dict(config=dict(log_dir="/elsewhere/logs")), ("/elsewhere/logs", "--log_dir")),
    (dict(config=dict(log_dir="logs/\x1b]0;title\x07")), ("--log_dir",)),
    (dict(progress=dict(colour=7)), ("damaged", "progress")),
    (dict(word_map={"\x1b[2J": 7}), ("word map",))])
def test_what_a_checkpoint_cannot_make_a_run_do(change, parts, trained, tiny_flags, tmp_path):
    saved = last_checkpoint(trained)
    for name, values in change.items():
        saved[name].update(values)
    save_checkpoint(saved, tmp_path / "models" / "checkpoint.pth.tar")
    given = [*tiny_flags, "--model_dir", tmp_path / "models", "--resume"]
    if "config" not in change:
        given += ["--log_dir", tmp_path / "logs"]
    fails(train.main, *given, "--epochs", 2, parts=parts)


def test_no_text_from_outside_gives_orders_to_a_terminal(trained, tmp_path):
    saved = last_checkpoint(trained)
    saved["command"] = "python train.py \x1b]0;title\x07\n\x9b2J"
    path, pictures = tmp_path / "model.pth.tar", tmp_path / "pictures"
    save_checkpoint(saved, path)
    given = ["--checkpoint", path, "--out", tmp_path / "out", "--device", "cpu", "--image"]
    done = call(demo.main, *given, "images/sample/image_0.jpg")
    assert "title" in done.out and not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", done.out)
    pictures.mkdir()
    (pictures / "\x1b[2J.jpg").write_bytes(b"")
    done = call(demo.main, *given, pictures, check=2)
    assert "2J.jpg" in done.out + done.err and "\x1b" not in done.out + done.err


# -------------------------------------------------------------------------------------------------
# What a run says of itself


@pytest.mark.parametrize("where, revision", [
    ("own", "[0-9a-f]{12}"), ("changed", r"[0-9a-f]{12}\+"), ("added", r"[0-9a-f]{12}\+"),
    ("inside another", "unknown")])
def test_the_revision_is_that_of_this_code(where, revision, tmp_path, monkeypatch):
    def git(*command):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *command],
                       cwd=tmp_path, check=True, capture_output=True)
    folder = tmp_path / "copy" if where == "inside another" else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / "state.py").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    if where in ("changed", "added"):
        (folder / ("state.py" if where == "changed" else "own.py")).write_text("2")
    (folder / "out_0.jpg").write_bytes(b"")
    monkeypatch.setattr(state, "__file__", str(folder / "state.py"))
    assert re.fullmatch(revision, state.git_revision())
