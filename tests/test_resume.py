"""A run that was interrupted, wherever and however often, ends as if it had not been. KILLS=30 does it more often."""
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist
from common import (KILLS, ROOT, assert_near, assert_same, call, fails, files_under, flags,
                    interrupt, outcome, start, stop_during)

import eval
import train
from checkpoint import load_checkpoint
from utils import Meeting, UserError, meet_processes, own_part, resumes

pytestmark = pytest.mark.usefixtures("small_figures")


@pytest.fixture(scope="module")
def whole(tiny_flags, tmp_path_factory):
    """The folder of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    call(train.main, *tiny_flags, *flags(folder))
    return folder


def test_a_run_killed_anywhere_ends_as_if_it_had_not_been(whole, tiny_flags, tmp_path):
    """Half of the signals are SIGKILL; most come while a checkpoint is written, as that takes most of the time."""
    rng, killed, resume = random.Random(KILLS), 0, []
    while killed < KILLS:
        code, output = interrupt(start(*resume, *tiny_flags, *flags(tmp_path)), rng, 1.5,
                                 (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT))
        # A run that has finished no longer catches signals while Python ends.
        assert code in (-signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGINT, 0) or (
            code in (-signal.SIGTERM, -signal.SIGINT) and "Finished" in output), (code, output)
        killed += code != 0
        if code == 0:  # it was done: all over again
            assert_same(outcome(tmp_path), outcome(whole))
            shutil.rmtree(tmp_path / "models")
            shutil.rmtree(tmp_path / "logs")
        # A run that was killed before its first checkpoint has nothing to resume from.
        resume = ["--resume"] if (tmp_path / "models" / "checkpoint.pth.tar").exists() else []
        if not resume:
            shutil.rmtree(tmp_path / "logs", ignore_errors=True)
    call(train.main, *resume, *tiny_flags, *flags(tmp_path))
    assert_same(outcome(tmp_path), outcome(whole))


def test_a_run_told_to_stop_saves_before_it_does(tiny_flags, tmp_path):
    """Batch systems and `timeout` send the signal to all processes, also to those that load batches."""
    process = start(*tiny_flags, *flags(tmp_path, checkpoint_minutes=60, epochs=200, early_stop_epochs=200, workers=2))
    while "training and" not in process.stdout.readline():
        pass
    time.sleep(1)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    process.stdout.close()
    progress = load_checkpoint(tmp_path / "models" / "checkpoint.pth.tar")["progress"]
    assert progress["step"] == 6 * progress["epoch"] + progress["batch"] > 0


def test_other_batches_begin_the_epoch_again_and_say_so(tiny_flags, tmp_path, monkeypatch):
    quick = [*tiny_flags, *flags(tmp_path, checkpoint_minutes=60, fine_tune_encoder="false", epochs=1)]
    with monkeypatch.context() as patch:
        stop_during(patch, 3, signal.SIGINT)
        call(train.main, *quick, check=128 + signal.SIGINT)
    assert load_checkpoint(tmp_path / "models" / "checkpoint.pth.tar")["progress"]["batch"] == 3
    assert "epoch 1 begins again" in call(train.main, "--resume", *quick, "--batch_size", 3).out
    lines = [json.loads(line) for line in next((tmp_path / "logs").iterdir()).joinpath("log.jsonl").open()]
    assert [line["epoch"] for line in lines] == [1]


def test_a_run_that_is_there_is_not_begun_again(whole, tiny_flags):
    before = files_under(whole)
    fails(train.main, *tiny_flags, *flags(whole), parts=("checkpoint.pth.tar exists", "--resume", "--model_dir"))
    assert files_under(whole) == before


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


# Without dropout, for which each process draws its own numbers.
SHARED = dict(dropout=0.0, batch_size=4, fine_tune_encoder="false")


@pytest.fixture(scope="module")
def lone(tiny_flags, tmp_path_factory):
    """The folder of a run of one process that was not interrupted."""
    folder = tmp_path_factory.mktemp("lone")
    call(train.main, *tiny_flags, *flags(folder, **SHARED))
    return folder


@pytest.mark.paper  # which weights get rounding for a gradient depends on the model
def test_a_worker_that_dies_is_started_again_and_the_run_ends_the_same(lone, tiny_flags, tmp_path):
    """torchrun stops the other one and starts both again, which resume from the last checkpoint."""
    rng, deaths, path = random.Random(KILLS), max(KILLS // 3, 1), tmp_path / "models" / "checkpoint.pth.tar"
    process = start(*tiny_flags, *flags(tmp_path, **SHARED),
                    torchrun=["--standalone", "--nproc_per_node=2", f"--max_restarts={deaths}"])
    for _ in itertools.takewhile(lambda _: not path.exists(), range(2400)):
        time.sleep(0.05)
    for _ in range(deaths):
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(rng.choice(children)), signal.SIGKILL)
        while "resuming at epoch" not in (line := process.stdout.readline()):
            assert line, "it ended before it resumed"
    assert "Finished" in process.communicate(timeout=240)[0] and process.returncode == 0
    assert_near(outcome(tmp_path), outcome(lone))


@pytest.mark.paper
@pytest.mark.skipif(KILLS < 6, reason="the one before shows it too, of two: KILLS=6")
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_a_run(lone, tiny_flags, tmp_path, processes):
    """2 and 4 processes end where one does, but for rounding, and caption the same in evaluation."""
    torchrun = ["--standalone", f"--nproc_per_node={processes}"]
    process = start(*tiny_flags, *flags(tmp_path, **SHARED), torchrun=torchrun)
    assert process.wait(timeout=240) == 0
    process.stdout.close()
    assert_near(outcome(tmp_path), outcome(lone))
    best = ["--checkpoint", str(lone / "models" / "BEST_checkpoint.pth.tar"), "--beam_size", "2", "--batch_size", "1"]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", *torchrun, "eval.py", *best, "--results",
                    tmp_path / "many.json"], cwd=ROOT, check=True, timeout=240, capture_output=True)
    call(eval.main, *best, "--results", tmp_path / "one.json")
    many, one = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("many", "one"))
    assert_same(many, one, atol=1e-4)


def start_job(job, world_size=2, late=0.0):
    """Let processes, here threads, meet as torchrun starts them. Args: late (float): seconds until the first one comes.

    Returns: list of PrefixStore, by rank.
    """
    stores = [None] * world_size

    def process(rank):
        time.sleep(late * (rank == 0))
        stores[rank] = own_part(job, rank, world_size)
    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return stores


def test_processes_that_are_started_again_do_not_meet_the_dead():
    """Though the first one comes so late that the other can find the address of the dead one in its place."""
    job = dist.HashStore()
    for address in ("dead", "alive"):
        first, other = start_job(job, late=0.3 * (address == "alive"))
        assert not other.check(["address"])
        first.set("address", address)
        assert other.get("address") == address.encode()


def test_torchrun_does_not_take_over_a_run_that_is_there(tmp_path):
    """Only what the job itself began is resumed when its processes are started again; they all hear the same."""
    path = tmp_path / "checkpoint.pth.tar"

    def heard(job, told=False):
        found = []
        for rank, store in enumerate(start_job(job)):
            try:
                found.append(resumes(path, told, Meeting(rank, 2, store)))
            except UserError:
                found.append("refused")
        assert found[0] == found[1]
        return found[0]
    mine, theirs, told = dist.HashStore(), dist.HashStore(), dist.HashStore()
    assert [heard(mine), heard(mine)] == [False, False], "killed before its first checkpoint"
    path.touch()
    assert heard(mine) and heard(mine)
    assert heard(theirs) == heard(theirs) == "refused"
    assert heard(told, told=True) and heard(told)


JOINING = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1")


@pytest.mark.parametrize("given", [{}, dict(WORLD_SIZE="1"), dict(JOINING, WORLD_SIZE="1", MASTER_PORT="")])
def test_a_lone_process_waits_for_nobody(given, monkeypatch):
    for name in JOINING:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert meet_processes()[:2] == (0, 1)


@pytest.mark.parametrize("name, value", [*((name, "") for name in JOINING if name != "WORLD_SIZE"), ("RANK", "first"),
                                         ("WORLD_SIZE", "two"), ("MASTER_PORT", "-1")])
def test_processes_that_cannot_meet_say_what_is_missing(name, value, monkeypatch):
    for known, good in dict(JOINING, **{name: value}).items():
        monkeypatch.setenv(known, good)
    with pytest.raises(UserError, match=f"{name}.*torchrun"):
        meet_processes()
