"""What training logs, saves, counts and chooses by, in this process, on a few drawn pictures."""
import itertools
import json
import math
import re
import shutil
import signal

import pytest
import torch
from common import BEST, call, last_checkpoint, read_log, stop_during
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import state
import train
import utils
import visualize
from checkpoint import load_checkpoint
from config import Config
from datasets import load_word_map
from models import Term, build_models, top5_hits
from utils import precision

SMALL = "--encoder", "test_efficientnet", "--encoder_stride", 16  # which takes no time to train
QUICK = *SMALL, "--batch_size", 12  # one step an epoch


def put_aside(folder):
    """Rename what a run has left, so that another can begin there."""
    for name in ("models", "logs"):
        (folder / name).rename(folder / f"{name} of the first run")


# -------------------------------------------------------------------------------------------------
# What is saved and logged


def test_what_a_run_leaves_behind(run, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("runlog.draw_attention", visualize.draw_attention)
    printed = run("--print_freq", 2)
    assert not list(tmp_path.rglob("*.tmp"))
    for name in ("checkpoint.pth.tar", BEST):
        saved = torch.load(tmp_path / "models" / name, weights_only=True)
        assert saved["word_map"] == load_word_map(tiny)
        assert saved["config"]["encoder"] == "resnet18"
        assert len(saved["decoder"]["embedding.weight"]) == len(saved["word_map"])
    last = last_checkpoint(tmp_path)
    assert last["epoch"] == 2
    lines, series = read_log(tmp_path)
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 3), (2, 6)]
    measured = {"loss", *last["progress"]["terms"]}  # a term that is added is among them
    assert measured >= {"loss", "cross_entropy", "coverage", "top5"}
    for line in lines:
        assert line["train"].keys() == measured
        assert line["valid"].keys() >= measured | {"BLEU-4", "CIDEr"}
        for part in ("train", "valid", "rates"):
            assert all(math.isfinite(value) for value in line[part].values())
    for tag in (*measured, "gradient_norm", "decoder_lr"):
        assert len(series[f"train/{tag}"]) == 4
    assert all(len(series[f"epoch/{tag}"]) == 2 for tag in measured)
    scores = [line["valid"]["CIDEr"] for line in lines]
    assert [value for _, value in series["valid/CIDEr"]] == pytest.approx(scores)
    folder, = (tmp_path / "logs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    pictures = [events.Images(tag)[0] for tag in events.Tags()["images"]]
    assert pictures and all(picture.width > 200 for picture in pictures)
    about = json.loads((folder / "config.json").read_text())
    assert {"config", "command", "git_revision", "versions"} <= about.keys()
    assert about["fast"].keys() == {"encoder", "decoder"}
    begins = "".join(printed.splitlines()[:4])
    assert all(f"{half}: {how}" in begins for half, how in about["fast"].items())


def test_models_py_as_written_trains_the_same(run, tmp_path):
    assert "as written (--fast false)" in run("--fast", "false", "--epochs", 1)
    written = read_log(tmp_path)[0]
    put_aside(tmp_path)
    run("--epochs", 1)
    for part in ("train", "valid"):
        assert read_log(tmp_path)[0][0][part] == pytest.approx(written[0][part], rel=1e-3)


def test_a_term_that_is_added_to_the_loss_is_logged(run, tmp_path, monkeypatch):
    """Also where the run is resumed within an epoch that began without it."""
    caption_loss = train.caption_loss
    given = [*SMALL, "--epochs", 2, "--print_freq", 3]
    with monkeypatch.context() as patch:
        stop_during(patch, 2)
        run(*given, check=128 + signal.SIGTERM)
    assert last_checkpoint(tmp_path)["progress"]["batch"] == 2

    def loss_with_entropy(scores, targets, alphas, *others):
        entropy = -(alphas * alphas.clamp(min=1e-30).log()).sum()
        terms = caption_loss(scores, targets, alphas, *others)
        return {**terms, "entropy": Term(entropy, "tokens", 0.5)}
    monkeypatch.setattr(train, "caption_loss", loss_with_entropy)
    assert "entropy" in run(*given, "--resume")
    lines, series = read_log(tmp_path)
    for line in (lines[1]["train"], lines[1]["valid"]):
        others = line["cross_entropy"] + line["coverage"]
        assert line["loss"] == pytest.approx(others + 0.5 * line["entropy"])
    assert all(len(series[f"{part}/entropy"]) == 2 for part in ("train", "valid", "epoch"))


def test_tensorboard_reads_the_files_of_a_resumed_run_in_order(run, tmp_path):
    """It sorts them by name: the second, then the number of the process."""
    run("--epochs", 1, *QUICK)
    run("--epochs", 2, *QUICK, "--resume")
    assert len({path.name.split(".")[3] for path in tmp_path.glob("logs/*/events.*")}) == 2


# -------------------------------------------------------------------------------------------------
# The rates, and what is trained


def test_an_encoder_that_is_random_and_stays_so_is_warned_of(run):
    warning = "^warning: .*--encoder_weights none.*--fine_tune_encoder true"

    def is_warned(*flags):
        return bool(re.search(warning, run(*flags, *QUICK), re.MULTILINE))
    assert is_warned("--epochs", 1) and is_warned("--epochs", 1, "--resume")
    assert not is_warned("--resume", "--fine_tune_encoder", "true")
    assert not is_warned("--resume", "--fine_tune_encoder", "false"), "it has been trained"


def test_an_epoch_of_few_steps_is_warned_of(run):
    """And one that leaves out many of the pictures; not where no batch size would be better."""
    warning = ("^warning: .* 2 steps of 5 pictures and leaves out 2 of 12; --batch_size 1 gives 12 "
               "steps and leaves out 0$")
    assert re.search(warning, run(*SMALL, "--epochs", 1, "--batch_size", 5), re.MULTILINE)
    assert "warning: an epoch" not in run(*SMALL, "--epochs", 2, "--batch_size", 1, "--resume")


def test_rates_fall_and_fine_tuning_can_begin_later(run, tmp_path, monkeypatch):
    """A restart repeats the command, and so does a requeued job: a rate that was given does not
    undo the decay since then, but another one does, and begins a new wait."""
    let_score_give(monkeypatch, (0.5, 0), (0.4, 0), (0.4, 0), (0.4, 0), (0.4, 0))
    decay = [*QUICK, "--lr_decay_epochs", 1, "--early_stop_epochs", 2, "--decoder_lr"]
    run(*decay, 1e-3, "--epochs", 9)
    rates = [line["rates"]["decoder_lr"] for line in read_log(tmp_path)[0]]
    assert rates == pytest.approx([1e-3, 1e-3, 0.8e-3])
    before = last_checkpoint(tmp_path)
    printed = run(*decay, 1e-3, "--epochs", 9, "--resume")
    assert "decay has made it 0.00064" in printed
    assert "nothing to train" in printed and "no better score for 2 epochs" in printed
    printed = run(*decay, 5e-4, "--epochs", 4, "--resume")
    assert "rates: decoder_lr 0.0005, encoder frozen;" in printed and "all 4 epochs done" in printed
    printed = run(*QUICK, "--epochs", 5, "--resume", "--fine_tune_encoder", "true",
                  "--encoder_lr", 0.01)
    assert "rates: decoder_lr 0.0004, encoder_lr 0.01;" in printed and "all 5 epochs" in printed
    about = json.loads(next((tmp_path / "logs").glob("*/config.json")).read_text())
    starts = [start["config"]["fine_tune_encoder"] for start in (about, *about["resumed"])]
    assert starts == [False, False, False, True]
    after = last_checkpoint(tmp_path)["encoder"]
    assert any(not torch.equal(weight, after[name]) for name, weight in before["encoder"].items())


def test_a_grad_clip_of_0_clips_nothing(run, tmp_path):
    weights = []
    for clip in (0, 1e30, 1e-9):
        run("--epochs", 1, *QUICK, "--grad_clip", clip)
        weights.append(last_checkpoint(tmp_path)["decoder"]["fc.weight"])
        shutil.rmtree(tmp_path / "models")
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# -------------------------------------------------------------------------------------------------
# What is not finite is neither saved nor logged


def change_models(monkeypatch, change):
    """Let `change` of encoder and decoder be part of their making."""
    def build(*args, **keywords):
        encoder, decoder = build_models(*args, **keywords)
        change(encoder, decoder)
        return encoder, decoder
    for module in (state, checkpoint):
        monkeypatch.setattr(module, "build_models", build)


def spoil_gradient(monkeypatch, step, name, value=math.nan):
    """Give the first number of a weight's gradient this value at a step of a run, from 1 on."""
    number = itertools.count(1)

    def hook(gradient):
        if next(number) == step:
            gradient = gradient.clone()
            gradient.view(-1)[0] = value
        return gradient
    change_models(monkeypatch, lambda _, decoder: decoder.get_parameter(name).register_hook(hook))


@pytest.mark.parametrize("step, value, flags", [
    (2, math.nan, ()), (3, math.nan, ()), (2, 1e30, ("--grad_clip", 0))])
def test_weights_that_are_nan_are_not_saved_between_two_readings(step, value, flags, run, tmp_path,
                                                                 monkeypatch):
    """That of the embedding of <pad> alone, which is never used, or the square of its gradient,
    which is infinite, so that Adam's step is 0."""
    spoil_gradient(monkeypatch, step, "embedding.weight", value)
    printed = run(*SMALL, "--checkpoint_minutes", 0, "--fast", "false", *flags, check=2)
    assert re.search(r"epoch 1, step 3,.*\.jpg.*--resume", printed)
    assert last_checkpoint(tmp_path)["progress"]["step"] == step - 1
    assert not list(tmp_path.rglob("log.jsonl"))


@pytest.mark.parametrize("variance, where", [
    (math.inf, "epoch 1, step 3"), (-1000, "valid.*epoch 1")])
def test_the_statistics_of_batch_norms_count_as_well(variance, where, run, tmp_path, monkeypatch):
    """The root of a negative one is not finite; training goes without it, but not validation."""
    change_models(monkeypatch, lambda encoder, _: encoder.resnet[1].running_var.fill_(variance))
    assert re.search(where, run("--fine_tune_encoder", "true", "--fast", "false", check=2))
    assert not list((tmp_path / "models").glob("*.tar")) and not list(tmp_path.rglob("log.jsonl"))


# -------------------------------------------------------------------------------------------------
# Which epoch is the best


def let_score_give(monkeypatch, *scores):
    """Let the captions of the next epochs have these CIDEr and BLEU-4."""
    scores = iter(scores)
    monkeypatch.setattr(train, "score", lambda *_: dict(zip(("CIDEr", "BLEU-4"), next(scores))))


def test_where_cider_ties_bleu_decides_and_then_the_loss(run, tmp_path, monkeypatch):
    let_score_give(monkeypatch, (0.5, 0.1), (0.5, 0.2), (0.5, 0.2), (0.4, 0.9), (0.6, 0.0))
    run("--epochs", 5, *QUICK)
    log, _ = read_log(tmp_path)
    losses = [line["valid"]["loss"] for line in log]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 5, "training works"
    assert [line["best"] for line in log] == [True, True, True, False, True]
    assert load_checkpoint(tmp_path / "models" / BEST)["epoch"] == 5


def test_equal_scores_count_as_a_random_choice_among_them():
    """The mean over all orders in which six words can stand, where of equals the first ones are
    taken."""
    scores = torch.tensor(list(itertools.product((0.0, 1.0, 2.0), repeat=6)))
    orders = torch.tensor(list(itertools.permutations(range(6))))
    ranked = scores[:, orders].argsort(dim=2, descending=True, stable=True)[:, :, :5]
    taken = orders.expand(len(scores), -1, -1).gather(2, ranked)  # (729, 720, 5)
    for target in range(6):
        expected = (taken == target).any(dim=2).float().mean(dim=1)
        found = [top5_hits(row[None], torch.tensor([target])).item() for row in scores]
        assert found == pytest.approx(expected.tolist(), abs=1e-5)


# -------------------------------------------------------------------------------------------------
# Devices: Apple's mps has no float64, and asynchronous copies to it read memory that may have been
# reused


class WithoutFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        is_float64 = isinstance(result, torch.Tensor) and result.dtype == torch.float64
        assert not is_float64, f"{function} gives float64"
        return result


class WithoutAsynchronousCopies(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert not (kwargs or {}).get("non_blocking"), f"{function} does not wait"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("device, given, batch", [
    ("cpu", 32, 32), ("cuda", 32, 128), ("cuda", 8, 32), ("cuda", 256, 256)])
def test_a_gpu_validates_larger_batches(device, given, batch):
    config = train.for_validation(Config(batch_size=given), torch.device(device))
    assert config.batch_size == batch


def test_a_device_without_float64_can_train(run, monkeypatch):
    assert utils.precise(torch.device("mps")) == torch.float32
    monkeypatch.setattr(state, "precise", lambda device: torch.float32)
    monkeypatch.setattr("runlog.pixel_positions", lambda *_: None)  # the CPU's, as scores are
    monkeypatch.setattr(train, "score", lambda *_: {"CIDEr": 0.0, "BLEU-4": 0.0})
    with WithoutFloat64(), WithoutAsynchronousCopies():
        run("--epochs", 1, "--print_freq", 2)


@pytest.mark.parametrize("device, has, best", [
    ("cpu", dict(avx512_bf16=True), dict(bfloat16="bfloat16")), ("mps", {}, {}),
    ("cuda", (9, 0, True), dict(auto="bfloat16", bfloat16="bfloat16", float16="float16")),
    ("cuda", (7, 5, False), dict(auto="float16", float16="float16")),
    ("cuda", (6, 1, False), {})], ids=["Zen 4", "Apple", "H100", "T4", "GTX 1080"])
def test_a_device_gets_the_best_precision_that_it_has(device, has, best, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: has[:2])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has[2])
    for wanted in ("auto", "float32", "bfloat16", "float16"):
        found = precision(Config(precision=wanted), torch.device(device))
        assert found == getattr(torch, best.get(wanted, "float32"))


def test_a_precision_that_a_device_lacks_is_said(run, monkeypatch):
    monkeypatch.setattr(utils, "precisions", lambda device: [torch.float32])
    printed = run("--epochs", 1, *QUICK, "--precision", "bfloat16")
    assert re.search("warning: .*bfloat16.*float32", printed)


@pytest.fixture
def run_float16(run, monkeypatch):
    """As `run`, in float16, on a CPU that only imitates it."""
    monkeypatch.setattr(utils, "precisions", lambda device: [torch.float32, torch.float16])
    return lambda *flags, **keywords: run("--precision", "float16", *flags, **keywords)


def test_float16_trains_as_float32_does(run_float16, run, tmp_path):
    run_float16(*SMALL, "--epochs", 1, "--fine_tune_encoder", "true")
    (line,), series = read_log(tmp_path)
    assert line["train"]["skipped_steps"] == 0 and series["train/loss_scale"] == [(3, 2.0 ** 16)]
    put_aside(tmp_path)
    run(*SMALL, "--epochs", 1, "--fine_tune_encoder", "true")
    (expected,), _ = read_log(tmp_path)
    for part in ("train", "valid"):
        assert line[part]["loss"] == pytest.approx(expected[part]["loss"], rel=5e-3)


def test_a_step_that_overflows_float16_is_skipped_and_a_resumed_run_is_exact(run_float16, tmp_path,
                                                                             monkeypatch):
    with monkeypatch.context() as patch:
        spoil_gradient(patch, 2, "fc.weight")
        run_float16(*SMALL, "--epochs", 2, "--fast", "false")
    whole, (first, second) = last_checkpoint(tmp_path), read_log(tmp_path)[0]
    assert first["train"]["skipped_steps"] == pytest.approx(1 / 3)
    assert second["train"]["skipped_steps"] == 0 and math.isfinite(first["train"]["loss"])
    assert whole["progress"]["scaler"]["scale"] == 2.0 ** 15
    put_aside(tmp_path)
    with monkeypatch.context() as patch:
        spoil_gradient(patch, 2, "fc.weight")
        stop_during(patch, 2)
        run_float16(*SMALL, "--epochs", 2, "--fast", "false", check=128 + signal.SIGTERM)
    assert last_checkpoint(tmp_path)["progress"]["scaler"]["scale"] == 2.0 ** 15
    run_float16(*SMALL, "--epochs", 2, "--fast", "false", "--resume")
    resumed = last_checkpoint(tmp_path)
    assert resumed["progress"]["scaler"] == whole["progress"]["scaler"]
    for name, weight in whole["decoder"].items():
        assert torch.equal(weight, resumed["decoder"][name])


def test_a_loss_that_float16_never_holds_ends_the_run(run_float16, monkeypatch):
    def spoil(encoder, decoder):
        decoder.fc.bias.register_hook(lambda gradient: gradient * math.inf)
    change_models(monkeypatch, spoil)
    printed = run_float16(*SMALL, "--epochs", 9, "--fast", "false", check=2)
    assert re.search("float16.*epoch 6, step 3.*--precision float32", printed), "2^16 / 2^17 < 1"


def test_memory_that_runs_out_is_one_line():
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more")
    printed = call(main, check=2).err
    assert re.fullmatch("error: out of memory.*--batch_size.*2.00 GiB and more\n", printed)


def test_averages_of_the_weights_are_in_the_best_checkpoint_and_the_last_one_has_both(
        run, tmp_path, monkeypatch):
    """Their decay is (1 + step) / (10 + step), but at most --ema_decay; turned off and on again
    they begin anew."""
    let_score_give(monkeypatch, *((score, 0) for score in range(1, 9)))
    name, expected = "fc.weight", None

    def average():
        weights = last_checkpoint(tmp_path)["optimizers"]["decoder"]["state"].values()
        return [weight["average"] for weight in weights if "average" in weight]
    for step, decay in enumerate((0, 2 / 11, 0.2)):
        run("--epochs", step + 1, *QUICK, "--ema_decay", 0.2, *["--resume"] * (step > 0))
        trained = last_checkpoint(tmp_path)["decoder"][name]
        expected = trained if step == 0 else decay * expected + (1 - decay) * trained
        best = load_checkpoint(tmp_path / "models" / BEST)["decoder"][name]
        assert torch.allclose(best, expected) and any(torch.equal(best, x) for x in average())
    assert not torch.allclose(best, trained)
    with monkeypatch.context() as patch:
        stop_during(patch, 2)  # in validation, while the averages are in the weights' place
        run("--epochs", 4, *QUICK, "--ema_decay", 0.2, "--resume", check=128 + signal.SIGTERM)
    stopped = last_checkpoint(tmp_path)
    run("--epochs", 4, *QUICK, "--ema_decay", 0.2, "--resume")
    assert torch.equal(stopped["decoder"][name], last_checkpoint(tmp_path)["decoder"][name])
    assert stopped["progress"]["batch"] == 1
    run("--epochs", 5, *QUICK, "--ema_decay", 0, "--resume")
    assert not average()
