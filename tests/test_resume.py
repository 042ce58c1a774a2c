"""A run that was interrupted, wherever and however often, ends as if it had not been. KILLS=30
does it more often."""
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time

import pytest
import torch.distributed as dist
from common import (KILLS, assert_near, assert_same, call, fails, files_under, flags, interrupt,
                    last_checkpoint, outcome, processes, stop_during)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import eval
import train
import utils
from utils import Meeting, UserError, meet_processes, own_part, resumes


@pytest.fixture(scope="module")
def whole(tiny_flags, tmp_path_factory):
    """The folder of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    call(train.main, *tiny_flags, *flags(folder))
    return folder


def test_a_run_killed_anywhere_ends_as_if_it_had_not_been(whole, tiny_flags, tmp_path, start):
    """Half of the signals are SIGKILL."""
    rng, killed, resume = random.Random(KILLS), 0, []
    signals = signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT
    while killed < KILLS:
        code, output = interrupt(start(*resume, *tiny_flags, *flags(tmp_path)), rng, 1, signals)
        # A run that has finished no longer catches signals while Python ends.
        is_over = code in (0, -signal.SIGTERM, -signal.SIGINT) and "Finished" in output
        assert is_over or code in (-signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGINT)
        if is_over:  # all over again
            assert_same(outcome(tmp_path), outcome(whole))
            shutil.rmtree(tmp_path / "models")
        killed += code != 0
        # A run that was killed before its first checkpoint has nothing to resume from.
        resume = ["--resume"] if (tmp_path / "models" / "checkpoint.pth.tar").exists() else []
        if not resume:
            shutil.rmtree(tmp_path / "logs")
    call(train.main, *resume, *tiny_flags, *flags(tmp_path))
    assert_same(outcome(tmp_path), outcome(whole))


def test_a_run_told_to_stop_saves_before_it_does(tiny_flags, tmp_path, start):
    """Batch systems and `timeout` send the signal to all processes, also to those that load
    batches."""
    settings = dict(checkpoint_minutes=60, epochs=200, early_stop_epochs=200, workers=2)
    run = start(*tiny_flags, *flags(tmp_path, **settings))
    run.wait_for("training and")
    time.sleep(1)
    os.killpg(run.pid, signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM
    progress = last_checkpoint(tmp_path)["progress"]
    assert progress["step"] == 6 * progress["epoch"] + progress["batch"] > 0


def test_other_batches_begin_the_epoch_again_and_say_so(tiny_flags, tmp_path, monkeypatch):
    quick = [*tiny_flags, *flags(tmp_path, checkpoint_minutes=60, epochs=1)]
    with monkeypatch.context() as patch:
        stop_during(patch, 3, signal.SIGINT)
        call(train.main, *quick, check=128 + signal.SIGINT)
    assert last_checkpoint(tmp_path)["progress"]["batch"] == 3
    assert "epoch 1 begins again" in call(train.main, "--resume", *quick, "--batch_size", 3).out
    log, = (tmp_path / "logs").glob("*/log.jsonl")
    assert [json.loads(line)["epoch"] for line in log.open()] == [1]


def test_a_run_that_is_there_is_not_begun_again(whole, tiny_flags):
    before = files_under(whole)
    fails(train.main, *tiny_flags, *flags(whole),
          parts=("checkpoint.pth.tar exists", "--resume", "--model_dir"))
    assert files_under(whole) == before


# -------------------------------------------------------------------------------------------------
# Several processes


# Without dropout, for which each process draws its own numbers.
SHARED = dict(dropout=0.0, batch_size=4, fine_tune_encoder="false")


@pytest.fixture(scope="module")
def lone(tiny_flags, tmp_path_factory):
    """The folder of a run of one process that was not interrupted."""
    folder = tmp_path_factory.mktemp("lone")
    call(train.main, *tiny_flags, *flags(folder, **SHARED))
    return folder


DEATHS = max(KILLS // 3, 1)


def torchrun():
    """What it does with --standalone --nproc_per_node=2 --max_restarts=DEATHS."""
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=DEATHS,
                          rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="tests",
                          monitor_interval=0.1, start_method="fork")
    elastic_launch(config, utils.run_script)(train.main)


@pytest.mark.paper  # which weights get rounding for a gradient depends on the model
def test_a_worker_that_dies_is_started_again_and_the_run_ends_the_same(lone, tiny_flags, tmp_path,
                                                                       start):
    """torchrun stops the other one and starts both again, which resume from the last checkpoint."""
    rng, path = random.Random(KILLS), tmp_path / "models" / "checkpoint.pth.tar"
    job = start(*tiny_flags, *flags(tmp_path, **SHARED), main=torchrun)
    job.wait_for("training and")
    for death in range(1, DEATHS + 1):
        pgrep = ["pgrep", "-P", str(job.pid)]
        workers = subprocess.run(pgrep, capture_output=True, text=True).stdout.split()
        assert len(workers) == 2
        while not path.exists():
            time.sleep(0.01)
        os.kill(int(rng.choice(workers)), signal.SIGKILL)
        job.wait_for("resuming at epoch", times=death)
    assert job.wait() == 0 and "Finished" in job.out()
    assert_near(outcome(tmp_path), outcome(lone))


@pytest.mark.paper
@pytest.mark.parametrize("number", [2, 4] if KILLS > 5 else [2])
def test_processes_share_a_run(lone, tiny_flags, tmp_path, number, start, monkeypatch):
    """They end where one does, but for rounding, and caption the same in evaluation."""
    given = [*tiny_flags, *flags(tmp_path, **SHARED)]
    runs = [start(*given, **variables) for variables in processes(number)]
    assert [run.wait() for run in runs] == [0] * number
    assert_near(outcome(tmp_path), outcome(lone))
    best = ["--checkpoint", lone / "models" / "BEST_checkpoint.pth.tar", "--beam_size", 2,
            "--batch_size", 1, "--results"]
    monkeypatch.setenv("PATH", "")  # no Java, which takes seconds to start
    runs = [start(*best, tmp_path / "many.json", main=eval.main, PATH="", **variables)
            for variables in processes(number)]
    assert [run.wait() for run in runs] == [0] * number
    call(eval.main, *best, tmp_path / "one.json")
    many, one = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("many", "one"))
    assert_same(many, one, atol=1e-4)


def start_job(job, world_size=2, late=0.0):
    """Let processes, here threads, meet as torchrun starts them, the first one so many seconds
    late. Returns their stores, by rank."""
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
    """Though the first one comes so late that the other can find the dead one's address."""
    job = dist.HashStore()
    for address in ("dead", "alive"):
        first, other = start_job(job, late=0.3 * (address == "alive"))
        assert not other.check(["address"])
        first.set("address", address)
        assert other.get("address") == address.encode()


def test_torchrun_does_not_take_over_a_run_that_is_there(tmp_path):
    """Only what the job itself began is resumed when its processes are started again."""
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


@pytest.mark.parametrize("given", [{}, dict(WORLD_SIZE="1"),
                                   dict(JOINING, WORLD_SIZE="1", MASTER_PORT="")])
def test_a_lone_process_waits_for_nobody(given, monkeypatch):
    for name in JOINING:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert meet_processes()[:2] == (0, 1)


@pytest.mark.parametrize("name, value", [
    ("RANK", ""), ("MASTER_ADDR", ""), ("MASTER_PORT", ""), ("RANK", "first"),
    ("WORLD_SIZE", "two"), ("MASTER_PORT", "-1")])
def test_processes_that_cannot_meet_say_what_is_missing(name, value, monkeypatch):
    for known, good in dict(JOINING, **{name: value}).items():
        monkeypatch.setenv(known, good)
    with pytest.raises(UserError, match=f"{name}.*torchrun"):
        meet_processes()
