"""A run that was cut, anywhere and however often, ends as if it had not been: KILLS=30 pytest tests/test_resume.py"""
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, files_under, script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from config import UserError
from utils import load_checkpoint, meet_processes

KILLS = int(os.environ.get("KILLS", 2))
# Six steps an epoch, two readings, dropout, all layers trained, and a checkpoint after every step.
SETTINGS = dict(batch_size=2, epochs=2, print_freq=4, dropout=0.5, fine_tune_encoder="true", checkpoint_minutes=0,
                early_stop_epochs=3, lr_decay_epochs=1)


def flags(folder, **settings):
    settings = {**SETTINGS, "model_dir": folder / "models", "log_dir": folder / "logs", **settings}
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def start(*args, torchrun=(), stderr=subprocess.DEVNULL):
    command = [sys.executable, "-u", *(["-m", "torch.distributed.run", *torchrun] if torchrun else []),
               str(ROOT / "train.py"), *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True,
                            start_new_session=True)


@pytest.fixture(scope="module")
def whole(tiny_flags, tmp_path_factory):
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    script("train.py", *tiny_flags, *flags(folder), check=0)
    return folder


def without_speed(values):
    return {name: value for name, value in values.items() if name != "images_per_s"}


def outcome(folder):
    """All that two runs must agree in. Returns: tensors by name, log lines, scalars by tag as (step, value)."""
    checkpoint = load_checkpoint(folder / "models" / "checkpoint.pth.tar")
    best = load_checkpoint(folder / "models" / "BEST_checkpoint.pth.tar")
    run, = (folder / "logs").iterdir()
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for line in log:
        line.update(train=without_speed(line["train"]), valid=without_speed(line["valid"]))
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)]
               for tag in events.Tags()["scalars"] if not tag.endswith("images_per_s")}
    pictures = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    state = {name: checkpoint[name] for name in ("epoch", "batch", "step", "best_score", "epochs_since_improvement",
                                                 "optimizers", "encoder", "decoder")}
    return dict(state=state, best={name: best[name] for name in ("epoch", "encoder", "decoder")}, log=log,
                scalars=scalars, pictures=pictures)


def assert_same(found, expected, where="", atol=0.0):
    if isinstance(expected, torch.Tensor):
        assert torch.allclose(found.double(), expected.double(), rtol=0, atol=atol), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}/{key}", atol)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, (x, y) in enumerate(zip(found, expected)):
            assert_same(x, y, f"{where}/{i}", atol)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=0, abs=atol, nan_ok=True), where
    else:
        assert found == expected, where


def test_a_run_killed_anywhere_ends_as_if_it_had_not_been(whole, tiny_flags, tmp_path):
    """Half of the kills by SIGKILL, most of them while a checkpoint is written, as that is most of what it does."""
    rng, killed, resume = random.Random(KILLS), 0, []
    while killed < KILLS:
        process = start(*resume, *tiny_flags, *flags(tmp_path))
        while "training and" not in (line := process.stdout.readline()):
            assert line, "it ended before it began"
        time.sleep(rng.uniform(0, 1.5))
        process.send_signal(rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)))
        code = process.wait(timeout=60)
        output = process.communicate()[0]
        # A run that has finished no longer catches signals while Python ends.
        assert code in (-signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGINT, 0) or (
            code in (-signal.SIGTERM, -signal.SIGINT) and "Finished" in output), (code, output)
        killed += code != 0
        if code == 0:  # it was done: all over again
            assert_same(outcome(tmp_path), outcome(whole))
            shutil.rmtree(tmp_path / "models")
            shutil.rmtree(tmp_path / "logs")
        # A run that was killed before its first checkpoint has nothing to go on from, and says so.
        resume = ["--resume"] if (tmp_path / "models" / "checkpoint.pth.tar").exists() else []
        if not resume:
            shutil.rmtree(tmp_path / "logs", ignore_errors=True)
    script("train.py", *resume, *tiny_flags, *flags(tmp_path), check=0)
    assert_same(outcome(tmp_path), outcome(whole))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_told_to_stop_saves_before_it_does(tiny_flags, tmp_path, workers):
    """Without a checkpoint on the way; so the one that is there is that of the signal.

    Batch systems and `timeout` send it to all processes, those that read batches too.
    """
    number = signal.SIGTERM
    process = start(*tiny_flags, *flags(tmp_path, checkpoint_minutes=60, epochs=200, early_stop_epochs=200,
                                        workers=workers))
    while "training and" not in process.stdout.readline():
        pass
    time.sleep(1)
    os.killpg(process.pid, number)
    assert process.wait(timeout=60) == 128 + number
    process.stdout.close()
    checkpoint = load_checkpoint(tmp_path / "models" / "checkpoint.pth.tar")
    assert checkpoint["step"] == 6 * checkpoint["epoch"] + checkpoint["batch"] > 0


def test_other_batches_begin_the_epoch_again_and_say_so(tiny_flags, tmp_path):
    process = start(*tiny_flags, *flags(tmp_path))
    path = tmp_path / "models" / "checkpoint.pth.tar"
    for _ in itertools.takewhile(lambda _: not path.exists(), range(600)):
        time.sleep(0.05)
    process.kill()
    process.wait()
    process.stdout.close()
    before = load_checkpoint(path)
    assert before["batch"] > 0
    result = script("train.py", "--resume", *tiny_flags, *flags(tmp_path, batch_size=3), check=0)
    assert f"epoch {before['epoch'] + 1} begins again" in result.stdout
    lines = [json.loads(line) for line in next((tmp_path / "logs").iterdir()).joinpath("log.jsonl").open()]
    assert [line["epoch"] for line in lines] == [1, 2]


def assert_near(many, one):
    """What several processes gave against what one gave: but for rounding the same.

    Adam divides a gradient by its own size. Where that is nothing but rounding (the attention's hidden units that are
    on at every pixel, which softmax ignores) it makes whole steps of it; such weights are left out.
    """
    for name in ("epoch", "batch", "step", "encoder"):
        assert_same(many["state"][name], one["state"][name], name, atol=1e-5)
    assert_same(many["log"], one["log"], "log", atol=1e-5)
    compared = 0
    for number, (name, weight) in enumerate(one["state"]["decoder"].items()):
        real = one["state"]["optimizers"]["decoder"]["state"][number]["exp_avg_sq"].sqrt() > 1e-6
        assert torch.allclose(many["state"]["decoder"][name][real], weight[real], rtol=0, atol=1e-5), name
        compared += int(real.sum())
    assert compared > 0.5 * sum(weight.numel() for weight in one["state"]["decoder"].values())


# What several processes can do as one does: without dropout, which each draws for itself.
SHARED = dict(dropout=0.0, batch_size=4, fine_tune_encoder="false", epochs=4, early_stop_epochs=4)


@pytest.fixture(scope="module")
def lone(tiny_flags, tmp_path_factory):
    """The folder of a run of one process that nobody disturbed."""
    folder = tmp_path_factory.mktemp("lone")
    script("train.py", *tiny_flags, *flags(folder, **SHARED), check=0)
    return folder


@pytest.mark.skipif(KILLS < 30, reason="the next but one shows it too, of two: KILLS=30")
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_a_run(lone, tiny_flags, tmp_path, processes):
    """2 and 4 processes end where one does, but for rounding."""
    process = start(*tiny_flags, *flags(tmp_path, **SHARED),
                    torchrun=["--standalone", f"--nproc_per_node={processes}"])
    assert process.wait(timeout=240) == 0
    process.stdout.close()
    assert_near(outcome(tmp_path), outcome(lone))


STARTED_AGAIN = """
import os, signal, sys, time, torch
sys.path.insert(0, sys.argv[1])
from utils import gather_lists, init_distributed, meet_processes
first, again = os.environ["RANK"] == "0", os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"
time.sleep(2 * (first and again))
rank, world_size, store = meet_processes()
init_distributed(torch.device("cpu"), rank, world_size, store)
assert gather_lists([rank]) == [0, 1]
if not again:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_that_are_started_again_do_not_wait_for_the_dead(tmp_path):
    """Though the first one comes so late that the other can find the address of the dead one in its place."""
    path = tmp_path / "started_again.py"
    path.write_text(STARTED_AGAIN)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                    "--max_restarts=1", str(path), str(ROOT)], check=True, timeout=200, capture_output=True)


def signal_a_worker(process, number, folder, rng=random):
    """Send a signal to one of what torchrun has started, once there is a checkpoint."""
    path = folder / "models" / "checkpoint.pth.tar"
    for _ in itertools.takewhile(lambda _: not path.exists(), range(2400)):
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(rng.choice(children)), number)


def test_a_worker_that_dies_is_started_again_and_the_run_ends_the_same(lone, tiny_flags, tmp_path):
    """torchrun takes the other one down, starts both anew, and they go on from the last checkpoint."""
    rng, deaths = random.Random(KILLS), max(KILLS // 3, 1)
    process = start(*tiny_flags, *flags(tmp_path, **SHARED),
                    torchrun=["--standalone", "--nproc_per_node=2", f"--max_restarts={deaths}"])
    for _ in range(deaths):
        signal_a_worker(process, signal.SIGKILL, tmp_path, rng)
        while "going on at epoch" not in (line := process.stdout.readline()):
            assert line, "it ended before it went on"
    assert "Finished" in process.communicate(timeout=240)[0] and process.returncode == 0
    assert_near(outcome(tmp_path), outcome(lone))


@pytest.mark.skipif(KILLS < 30, reason="takes a minute: KILLS=30")
def test_a_node_whose_own_worker_lives_goes_on_too(lone, tiny_flags, tmp_path):
    """Its torchrun counts no restart when it is another node's worker that dies."""
    with socket.create_server(("localhost", 0)) as free:
        endpoint = f"localhost:{free.getsockname()[1]}"
    nodes = [start(*tiny_flags, *flags(tmp_path, **SHARED), torchrun=[
        "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}",
        "--local_addr=localhost", f"--max_restarts={restarts}"]) for restarts in (0, 1)]
    signal_a_worker(nodes[0], signal.SIGSTOP, tmp_path)  # or it would die of its loss, and be counted
    signal_a_worker(nodes[1], signal.SIGKILL, tmp_path)
    printed = "".join(node.communicate(timeout=240)[0] for node in nodes)
    assert "going on at epoch" in printed and [node.returncode for node in nodes] == [0, 0]
    assert_near(outcome(tmp_path), outcome(lone))


@pytest.mark.parametrize("given, in_force", [(None, 2.5e-4), (1e-3, 2.5e-4), (5e-4, 5e-4), (2.5e-4, 2.5e-4)])
def test_a_rate_on_the_command_line_counts_once(given, in_force, capsys):
    """A restart repeats the command, and so does a requeued job: what has decayed since is not undone, and said."""
    weight = [torch.nn.Parameter(torch.zeros(2))]
    decayed = torch.optim.Adam(weight, lr=2.5e-4).state_dict()
    optimizers = dict(decoder=torch.optim.Adam(weight, lr=given or 1e-3))
    train.resume_optimizers(optimizers, dict(optimizers=dict(decoder=decayed), config=dict(decoder_lr=1e-3)),
                            dict(decoder_lr=given) if given else {}, "checkpoint.pth.tar")
    assert train.rates(optimizers) == dict(decoder_lr=in_force)
    assert ("stays at 0.00025" in capsys.readouterr().out) == (given == 1e-3)


def test_torchrun_does_not_take_over_a_run_that_is_there(whole, tiny_flags, tmp_path):
    """Starting the command again makes no --resume of it."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    process = start(*tiny_flags, *flags(tmp_path, epochs=3, decoder_lr=0.5), stderr=subprocess.PIPE,
                    torchrun=["--standalone", "--nproc_per_node=1", "--max_restarts=1"])
    errors = process.communicate(timeout=240)[1]
    assert process.returncode and errors.count("exists: go on with --resume") == 2, errors[-4000:]
    assert files_under(tmp_path) == files_under(whole)


def test_a_run_that_is_there_is_not_begun_again(whole, tiny_flags, monkeypatch):
    before = files_under(whole)
    monkeypatch.setattr(sys, "argv", ["train.py", *tiny_flags, *flags(whole)])
    with pytest.raises(UserError, match="--resume"):
        train.main()
    assert files_under(whole) == before


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
