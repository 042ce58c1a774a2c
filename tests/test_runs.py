"""What the surroundings do to a run: other runs, terminals and pipes that close, full disks, little memory, a user
without a home, checkpoints of somebody else."""
import os
import pty
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from common import ROOT, call, error_line, fails, flags, folders, last_checkpoint, script, start

import datasets
import eval
import runlog
import train
import utils
from checkpoint import load_checkpoint, save_checkpoint
from config import Config, get_config
from datasets import CaptionDataset, load_word_map, make_loader

LONG = dict(epochs=200, early_stop_epochs=200, checkpoint_minutes=60, lr_decay_epochs=200)


def wait_for(process, text):
    while text not in (line := process.stdout.readline()):
        assert line, f"it ended before it said {text!r}"
    return line


# ---------------------------------------------------------------------------------------------------------------------
# Other runs


def test_two_runs_of_one_folder(tiny_flags, tmp_path):
    """Also before the first checkpoint is there; what dies, however it does, keeps nothing to itself."""
    given = [*tiny_flags, *flags(tmp_path, **LONG, workers=2)]
    first = start(*given)
    wait_for(first, "training and")
    second = script("train.py", *given)
    message = error_line(second.stderr)
    assert second.returncode == 2 and f"process {first.pid} on " in message and "--model_dir" in message
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    resume = ["--resume"] if (tmp_path / "models" / "checkpoint.pth.tar").exists() else []
    third = call(train.main, *given, "--epochs", 1, *resume)
    assert "Finished" in third.out


def test_two_runs_of_one_second_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.setattr(runlog.time, "strftime", lambda format: "20261128-120000")
    config = Config(log_dir=str(tmp_path / "logs"))
    names = [runlog.new_run(config) for _ in range(3)]
    assert len(set(names)) == 3 and all((tmp_path / "logs" / name).is_dir() for name in names)
    (tmp_path / "file").touch()
    with pytest.raises(utils.UserError, match="--log_dir"):
        runlog.new_run(Config(log_dir=str(tmp_path / "file")))


def test_a_model_dir_that_cannot_be_written_is_found_before_the_first_step(tiny_flags, tmp_path):
    (tmp_path / "models").touch()
    fails(train.main, *tiny_flags, *map(str, folders(tmp_path)), parts=(str(tmp_path / "models"),))
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("flag", ["--results", "--write_submission"])
def test_results_that_cannot_be_written_are_found_before_the_captioning(flag, run, tmp_path, monkeypatch):  # noqa: F811
    run("--epochs", 1)
    (tmp_path / "file").touch()
    monkeypatch.setattr(eval, "generate", None)
    fails(eval.main, "--model_dir", tmp_path / "models", flag, tmp_path / "file" / "results.json", parts=("file",))


def test_several_processes_save_when_they_are_told_to_stop_in_validation(tiny_flags, tmp_path):
    """Each after its first of two batches, not after the last one, which may be minutes later."""
    given = [*tiny_flags, *map(str, folders(tmp_path)), "--batch_size", "2", "--epochs", "1",
             "--print_freq", "1"]
    code = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import dataclasses, train, utils\n"
            "generate = train.generate\n"
            "def slow(*args, **keywords):\n"
            "    print('in validation', flush=True)\n"
            "    time.sleep(3)\n"
            "    return generate(*args, **keywords)\n"
            "train.generate = slow\n"
            "train.for_validation = lambda config, device: dataclasses.replace(config, batch_size=1)\n"
            "utils.run_script(train.main)\n")
    (tmp_path / "slow.py").write_text(code)
    process = subprocess.Popen([sys.executable, "-u", "-m", "torch.distributed.run", "--standalone",
                                "--nproc_per_node=2", tmp_path / "slow.py", *given], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(process, "in validation")
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert output.count("in validation") <= 1  # the other process's
    assert errors.count("epoch 1: ") <= 2, "in a file a progress bar shows its beginning and its end"
    progress = last_checkpoint(tmp_path)["progress"]
    assert (progress["epoch"], progress["batch"]) == (0, 6)


# ---------------------------------------------------------------------------------------------------------------------
# Terminals, pipes, homes


def test_a_closed_terminal_saves_the_run(tiny_flags, tmp_path):
    """The kernel sends SIGHUP to all of its processes, and writing to it fails from then on."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
        command = [sys.executable, str(ROOT / "train.py"), *tiny_flags, *flags(tmp_path, **LONG, workers=2)]
        os.execv(sys.executable, command)
    shown = b""
    while b"epoch 2" not in shown:
        shown += os.read(terminal, 1000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    progress = last_checkpoint(tmp_path)["progress"]
    assert progress["step"] == 6 * progress["epoch"] + progress["batch"] > 0


def test_a_run_under_nohup_outlives_its_terminal(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train.Pause(1, lambda: None)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
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


def test_a_reader_that_has_seen_enough_needs_no_traceback():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import utils; utils.run_script(lambda: print('caption'))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.wait() == 128 + signal.SIGPIPE and not process.stderr.read()


def test_a_user_without_a_home():
    """nltk looks for one while it is imported, unless it finds a folder of all users that it may write to."""
    code = (f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); expanduser = os.path.expanduser\n"
            "os.environ.pop('HOME')\n"
            "os.path.expanduser = lambda path: os.environ.get('HOME', '~') + path[1:] if path[:1] == '~' else path\n"
            "os.access = lambda *_, **__: False\n"
            "import utils, scores\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Disks and memory


def test_logs_on_a_full_disk(small_disk, tiny_flags, tmp_path):  # noqa: F811
    """One line, and nothing that was trained is lost."""
    models = tmp_path.parent / f"{tmp_path.name}-models"
    given = [*tiny_flags, "--model_dir", str(models), "--log_dir", str(small_disk / "logs")]
    given += ["--early_stop_epochs", "99"]
    process = start(*given, "--epochs", "99", stderr=subprocess.PIPE)
    wait_for(process, "epoch 1: train")
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 2 and "the disk is full" in error_line(errors), output
    epoch = load_checkpoint(models / "checkpoint.pth.tar")["epoch"]
    filler.unlink()
    resumed = call(train.main, "--resume", *given, "--epochs", epoch + 1).out
    assert epoch >= 1 and f"resuming at epoch {epoch + 1}, batch 1" in resumed and "Finished" in resumed


def test_workers_have_room_for_their_batches(tiny, tiny_flags, tmp_path, monkeypatch, capsys):
    """4 pictures of 64 pixels and their captions take some 50 KB; two batches per worker wait, two are in use."""
    config = get_config(flags=dict(data_dir=str(tiny), image_size=64, batch_size=4, workers=2))
    dataset = CaptionDataset(config, "train", load_word_map(tiny))
    batch = 4 * sum(tensor.nbytes for tensor in dataset[[0]])
    monkeypatch.setattr(datasets.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(datasets, "SHARED_MEMORY", tmp_path)
    for room, workers in ((100, 2), (5, 1), (3, 0)):
        usage = SimpleNamespace(free=room * batch)
        monkeypatch.setattr(datasets.shutil, "disk_usage", lambda path, usage=usage: usage)
        loader = make_loader(dataset, config, training=True)
        assert len(list(loader)) == 3 and loader.num_workers == workers
        said = capsys.readouterr().out
        assert ("--shm-size" in said and f"{workers} workers instead of 2" in said) == (workers < 2)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of somebody else


def test_a_checkpoint_of_a_gpu_runs_on_a_cpu(run, tmp_path):  # noqa: F811
    run("--epochs", 1)
    saved = last_checkpoint(tmp_path)
    saved["config"]["device"] = "cuda:7"
    config = get_config(flags={}, trained=saved["config"])
    assert config.device == "auto" and utils.get_device(config).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("change, parts", [
    (dict(config=dict(log_dir="/elsewhere/logs")), ("/elsewhere/logs", "--log_dir")),
    (dict(config=dict(log_dir="logs/\x1b]0;title\x07")), ("--log_dir",)),
    (dict(progress=dict(sums=7)), ("damaged", "progress")), (dict(progress=dict(epoch="2")), ("damaged", "progress")),
    (dict(word_map={"\x1b[2J": 7}), ("word map",))])
def test_what_a_checkpoint_cannot_make_a_run_do(change, parts, run, tiny_flags, tmp_path):  # noqa: F811
    run("--epochs", 1)
    saved = last_checkpoint(tmp_path)
    for name, values in change.items():
        saved[name].update(values)
    save_checkpoint(saved, tmp_path / "models" / "checkpoint.pth.tar")
    flags = [*tiny_flags, "--model_dir", tmp_path / "models", "--resume"]
    flags += [] if "config" in change else ["--log_dir", tmp_path / "logs"]
    fails(train.main, *flags, "--epochs", 2, parts=parts)


def test_no_text_from_outside_gives_orders_to_a_terminal(run, tmp_path, capsys):  # noqa: F811
    run("--epochs", 1)
    saved = last_checkpoint(tmp_path)
    saved["command"] = "python train.py \x1b]0;title\x07\n\x9b2J"
    path = tmp_path / "models" / "checkpoint.pth.tar"
    save_checkpoint(saved, path)
    import demo
    done = call(demo.main, "--checkpoint", path, "--image", "images/sample/image_0.jpg", "--out", tmp_path / "out",
                "--device", "cpu")
    assert "title" in done.out and not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", done.out)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "\x1b[2J.jpg").write_bytes(b"")
    done = call(demo.main, "--checkpoint", path, "--image", tmp_path / "pictures", "--out", tmp_path / "out",
                "--device", "cpu", check=2)
    assert "2J.jpg" in done.out + done.err and "\x1b" not in done.out + done.err


# ---------------------------------------------------------------------------------------------------------------------
# What a run says of itself


@pytest.mark.parametrize("where, revision", [("own", "[0-9a-f]{12}"), ("changed", r"[0-9a-f]{12}\+"),
                                             ("added", r"[0-9a-f]{12}\+"), ("inside another", "unknown")])
def test_the_revision_is_that_of_this_code(where, revision, tmp_path, monkeypatch):
    def git(*command):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *command], cwd=tmp_path, check=True,
                       capture_output=True)
    folder = tmp_path / "copy" if where == "inside another" else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / "runlog.py").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    if where in ("changed", "added"):
        (folder / ("runlog.py" if where == "changed" else "own.py")).write_text("2")
    (folder / "out_0.jpg").write_bytes(b"")
    monkeypatch.setattr(runlog, "__file__", str(folder / "runlog.py"))
    assert re.fullmatch(revision, runlog.git_revision())


def test_averages_that_were_turned_off_begin_anew(run, tmp_path):  # noqa: F811
    def averages():
        states = last_checkpoint(tmp_path)["optimizers"]["decoder"]["state"].values()
        return [state["average"] for state in states if "average" in state]
    run("--epochs", 1, "--ema_decay", 0.9)
    assert averages()
    run("--epochs", 2, "--ema_decay", 0, "--resume")
    assert not averages()
