"""What training logs, saves, counts and chooses by, in this process, on a few tiny drawn pictures."""
import itertools
import json
import math
import re
import signal

import pytest
import torch
from common import call, epoch_of, files_under, folders, last_checkpoint, read_log, stop_during
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import train
import utils
from checkpoint import load_checkpoint
from config import Config
from datasets import load_word_map
from models import Term, build_models, top5_hits
from runlog import RunLog
from utils import UserError, precision


def put_aside(folder):
    """Rename what a run has left, so that another can begin there."""
    for name in ("models", "logs"):
        (folder / name).rename(folder / f"{name} of the first run")


# ---------------------------------------------------------------------------------------------------------------------
# What is saved and logged


def test_what_a_run_leaves_behind(tiny, tiny_flags, tmp_path):
    printed = call(train.main, *tiny_flags, *folders(tmp_path), "--print_freq", 2)
    assert not list(tmp_path.rglob("*.tmp"))
    for name in ("checkpoint.pth.tar", "BEST_checkpoint.pth.tar"):
        saved = torch.load(tmp_path / "models" / name, weights_only=True)
        assert saved["word_map"] == load_word_map(tiny) and saved["config"]["encoder"] == "resnet18"
        assert len(saved["decoder"]["embedding.weight"]) == len(saved["word_map"])
    assert last_checkpoint(tmp_path)["epoch"] == 2
    lines, scalars = read_log(tmp_path)
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 3), (2, 6)]
    measured = {"loss", *last_checkpoint(tmp_path)["progress"]["terms"]}  # a term that is added is among them
    assert measured >= {"loss", "cross_entropy", "coverage", "top5"}
    for line in lines:
        assert line["train"].keys() == measured and line["valid"].keys() >= measured | {"BLEU-4", "CIDEr"}
        assert all(math.isfinite(value) for part in ("train", "valid", "rates") for value in line[part].values())
    for tags, length in (([*measured, "gradient_norm", "decoder_lr"], 4), (measured, 2)):
        assert all(len(scalars[f"{'train' if length == 4 else 'epoch'}/{tag}"]) == length for tag in tags)
    assert scalars["valid/CIDEr"] == pytest.approx([line["valid"]["CIDEr"] for line in lines])
    folder, = (tmp_path / "logs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert all(events.Images(tag)[0].width > 200 for tag in events.Tags()["images"]) and events.Tags()["images"]
    about = json.loads((folder / "config.json").read_text())
    assert {"config", "command", "git_revision", "versions"} <= about.keys()
    assert about["fast"].keys() == {"encoder", "decoder"}
    assert all(f"{half}: {how}" in "".join(printed.out.splitlines()[:4]) for half, how in about["fast"].items())


def test_models_py_as_written_trains_the_same(run, tmp_path):
    assert "as written (--fast false)" in run("--fast", "false", "--epochs", 1)
    written = read_log(tmp_path)[0]
    put_aside(tmp_path)
    run("--epochs", 1)
    for part in ("train", "valid"):
        assert read_log(tmp_path)[0][0][part] == pytest.approx(written[0][part], rel=1e-3)


def test_a_term_that_is_added_to_the_loss_shows_everywhere_by_its_name(run, tmp_path, monkeypatch):
    """Also where the run is resumed within an epoch that began without it."""
    caption_loss = train.caption_loss
    with monkeypatch.context() as patch:
        stop_during(patch, 2)
        run("--epochs", 2, "--print_freq", 3, check=128 + signal.SIGTERM)
    assert last_checkpoint(tmp_path)["progress"]["batch"] == 2

    def loss_with_entropy(scores, targets, alphas, *others):
        entropy = -(alphas * alphas.clamp(min=1e-30).log()).sum()
        return {**caption_loss(scores, targets, alphas, *others), "entropy": Term(entropy, "tokens", 0.5)}
    monkeypatch.setattr(train, "caption_loss", loss_with_entropy)
    assert "entropy" in run("--resume", "--epochs", 2, "--print_freq", 3)
    (_, line), scalars = read_log(tmp_path)
    for part in (line["train"], line["valid"]):
        assert 2 < part["entropy"] < math.log(16) + 1e-3
        assert part["loss"] == pytest.approx(part["cross_entropy"] + part["coverage"] + 0.5 * part["entropy"])
    assert len(scalars["train/entropy"]) == len(scalars["valid/entropy"]) == len(scalars["epoch/entropy"]) == 2
    assert {"entropy"} < last_checkpoint(tmp_path)["progress"]["terms"].keys()


def test_tensorboard_reads_the_files_of_a_resumed_run_in_order(tmp_path):
    """It sorts them by name: the second, then the number of the process."""
    for resumed_from in (None, dict(version=3)):
        RunLog(Config(log_dir=str(tmp_path)), train.Progress(run="run", batches={}, batch=1), {}, resumed_from, 3, None,
               None).close()
    assert len({path.name.split(".")[3] for path in tmp_path.glob("run/events.*")}) == 2


# ---------------------------------------------------------------------------------------------------------------------
# The rates, and what is trained


def test_an_encoder_that_is_random_and_stays_so_is_warned_of(run):
    def warned(*flags):
        return len(re.findall("^warning: .*--encoder_weights none.*--fine_tune_encoder true", run(*flags), re.M))
    one_step = ["--batch_size", 12]
    assert warned("--epochs", 1, *one_step) == warned("--epochs", 1, "--resume") == 1
    assert warned("--resume", "--fine_tune_encoder", "true", *one_step) == 0
    assert warned("--resume", "--fine_tune_encoder", "false", *one_step) == 0, "it has been trained"


def test_an_epoch_of_few_steps_is_warned_of(run, tmp_path):
    """And one that leaves out many of the pictures; not where no batch size would be better."""
    printed = run("--epochs", 1, "--batch_size", 5)
    assert re.search("^warning: .* 2 steps of 5 pictures and leaves out 2 of 12; --batch_size 1 gives 12 steps and "
                     "leaves out 0$", printed, re.M)
    assert "warning: an epoch" not in run("--epochs", 2, "--batch_size", 1, "--resume")


def test_rates_fall_and_fine_tuning_can_begin_later(run, tmp_path, monkeypatch):
    let_score_give(monkeypatch, (0.5, 0), (0.4, 0), (0.4, 0), (0.4, 0))
    decay = ["--batch_size", 12, "--lr_decay_epochs", 1, "--early_stop_epochs", 2]
    run(*decay, "--epochs", 9)
    rates = [line["rates"] for line in read_log(tmp_path)[0]]
    assert rates == [dict(decoder_lr=4e-4), dict(decoder_lr=4e-4), dict(decoder_lr=0.8 * 4e-4)]
    before = last_checkpoint(tmp_path)
    printed = run(*decay, "--epochs", 9, "--resume")
    assert "nothing to train" in printed and "no better score for 2 epochs" in printed
    printed = run(*decay, "--epochs", 4, "--resume", "--fine_tune_encoder", "true", "--encoder_lr", 0.01)
    assert "rates: decoder_lr 0.000256, encoder_lr 0.01;" in printed and "all 4 epochs done" in printed
    about = json.loads(next((tmp_path / "logs").glob("*/config.json")).read_text())
    assert [start["config"]["fine_tune_encoder"] for start in (about, *about["resumed"])] == [False, False, True]
    name = "resnet.7.0.conv1.weight"
    assert not torch.equal(before["encoder"][name], last_checkpoint(tmp_path)["encoder"][name])


@pytest.mark.parametrize("given, in_force", [(None, 2.5e-4), (1e-3, 2.5e-4), (5e-4, 5e-4), (2.5e-4, 2.5e-4)])
def test_a_rate_on_the_command_line_counts_once(given, in_force):
    """A restart repeats the command, and so does a requeued job: the decay since then is not undone, as a line says."""
    weight = [torch.nn.Parameter(torch.zeros(2))]
    stopped = train.Progress(run="run", batches={}, epochs_since_improvement=20)
    saved = dict(optimizers=dict(decoder=torch.optim.Adam(weight, lr=2.5e-4).state_dict()), world_size=1,
                 config=dict(decoder_lr=1e-3), progress=vars(stopped))
    optimizers = dict(decoder=torch.optim.Adam(weight, lr=given or 1e-3))
    progress = train.Progress(run="new", batches={})
    notes = train.resume(progress, optimizers, saved, Config(), dict(decoder_lr=given) if given else {},
                         "checkpoint.pth.tar", 1)
    assert train.rates(optimizers) == dict(decoder_lr=in_force)
    assert sum("decay has made it 0.00025" in note for note in notes) == (given == 1e-3)
    assert any("nothing to train" in note for note in notes) == (given != 5e-4), "another rate begins a new wait"


@pytest.mark.parametrize("epoch, waited, why", [(5, 0, "all 4 epochs"), (4, 20, "for 20 epochs"), (4, 0, None)])
def test_the_second_phase_counts_its_own_epochs(epoch, waited, why):
    progress = train.Progress(run="run", batches={}, epoch=epoch, began=1, epochs_since_improvement=waited)
    assert (why or "None") in str(train.finished(Config(epochs=4), progress))


def test_a_grad_clip_of_0_clips_nothing(tiny_flags):
    weights = {}
    for clip in ("0", "1e30", "1e-5"):
        arguments = epoch_of(tiny_flags, "--grad_clip", clip)
        train.train_one_epoch(*arguments)
        weights[clip] = torch.cat([p.detach().flatten() for p in arguments[1].parameters()])
    assert torch.equal(weights["0"], weights["1e30"]) and not torch.equal(weights["0"], weights["1e-5"])


# ---------------------------------------------------------------------------------------------------------------------
# What is not finite is neither saved nor logged


def change_models(monkeypatch, change):
    """Let train.py work with models that were changed. Args: change (function): of encoder and decoder."""
    def build(*args, **keywords):
        encoder, decoder = build_models(*args, **keywords)
        change(encoder, decoder)
        return encoder, decoder
    for module in (train, checkpoint):
        monkeypatch.setattr(module, "build_models", build)


def spoil_gradient(monkeypatch, step, name):
    """Let the first number of a weight's gradient be NaN at a step of a run, the first one being 1."""
    number = itertools.count(1)

    def hook(gradient):
        if next(number) == step:
            gradient = gradient.clone()
            gradient.view(-1)[0] = math.nan
        return gradient
    change_models(monkeypatch, lambda _, decoder: decoder.get_parameter(name).register_hook(hook))


def test_a_gradient_that_is_nan_at_an_epochs_last_step_touches_no_file(run, tmp_path, monkeypatch):
    """That of the embedding of <pad>, which is never used, so that nothing but itself is spoilt."""
    run("--epochs", 1, "--fast", "false")
    before = files_under(tmp_path / "models")
    spoil_gradient(monkeypatch, 3, "embedding.weight")
    assert re.search(r"epoch 2, step 3,.*\.jpg.*--resume", run("--resume", "--epochs", 2, check=2))
    assert files_under(tmp_path / "models") == before and len(read_log(tmp_path)[0]) == 1


def test_weights_that_are_nan_are_not_saved_between_two_readings(run, tmp_path, monkeypatch):
    spoil_gradient(monkeypatch, 2, "embedding.weight")
    assert "epoch 1, step 3" in run("--checkpoint_minutes", 0, "--fast", "false", check=2)
    assert last_checkpoint(tmp_path)["progress"]["step"] == 1


def test_moments_and_batch_norms_count_as_the_weights_do(tiny_flags):
    encoder, decoder, *others = epoch_of(tiny_flags, "--fine_tune_encoder", "true")
    encoder.resnet[1].running_var[0] = math.inf
    with pytest.raises(UserError, match="epoch 1, step 3"):
        train.train_one_epoch(encoder, decoder, *others)
    encoder, decoder, *others = epoch_of(tiny_flags, "--grad_clip", "0")
    decoder.embedding.weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(0), 1e30))
    with pytest.raises(UserError, match="epoch 1, step 3"):  # its square is infinite, so Adam's step is 0
        train.train_one_epoch(encoder, decoder, *others)


def test_a_validation_that_is_not_finite_stops_the_run(run, tmp_path, monkeypatch):
    """The variance is finite, but its root is not; training goes without it."""
    change_models(monkeypatch, lambda encoder, _: encoder.resnet[1].running_var.fill_(-1000))
    assert re.search("valid.*epoch 1", run("--fine_tune_encoder", "true", check=2))
    assert not list((tmp_path / "models").glob("*.tar")) and not list(tmp_path.rglob("log.jsonl"))


# ---------------------------------------------------------------------------------------------------------------------
# Which epoch is the best


def let_score_give(monkeypatch, *scores):
    """Let the captions of the next epochs have these CIDEr and BLEU-4; the validation loss falls, as training works."""
    scores = iter(scores)
    monkeypatch.setattr(train, "score", lambda *_: dict(zip(("CIDEr", "BLEU-4"), next(scores))))


def test_where_cider_ties_bleu_decides_and_then_the_loss(run, tmp_path, monkeypatch):
    let_score_give(monkeypatch, (0.5, 0.1), (0.5, 0.2), (0.5, 0.2), (0.4, 0.9), (0.6, 0.0))
    run("--epochs", 5, "--batch_size", 12)
    log, _ = read_log(tmp_path)
    losses = [line["valid"]["loss"] for line in log]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 5
    assert [line["best"] for line in log] == [True, True, True, False, True]
    assert load_checkpoint(tmp_path / "models" / "BEST_checkpoint.pth.tar")["epoch"] == 5


# ---------------------------------------------------------------------------------------------------------------------
# Top-5


def test_equal_scores_count_as_a_random_choice_among_them():
    """The mean over all orders in which six words can stand, where of equals the first ones are taken."""
    scores = torch.tensor(list(itertools.product((0.0, 1.0, 2.0), repeat=6)))
    orders = torch.tensor(list(itertools.permutations(range(6))))
    ranked = scores[:, orders].argsort(dim=2, descending=True, stable=True)[:, :, :5]  # (729, 720, 5)
    taken = orders.expand(len(scores), -1, -1).gather(2, ranked)
    for target in range(6):
        expected = (taken == target).any(dim=2).float().mean(dim=1)
        found = [top5_hits(row[None], torch.tensor([target])).item() for row in scores]
        assert found == pytest.approx(expected.tolist(), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Devices: Apple's mps has no float64, and asynchronous copies to it read memory that may have been reused


class WithoutFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        assert not isinstance(result, torch.Tensor) or result.dtype != torch.float64, f"{function} gives float64"
        return result


class WithoutAsynchronousCopies(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert not (kwargs or {}).get("non_blocking"), f"{function} does not wait"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("device, given, batch", [
    ("cpu", 32, 32), ("cuda", 32, 128), ("cuda", 8, 32), ("cuda", 256, 256)])
def test_a_gpu_validates_larger_batches(device, given, batch):
    assert train.for_validation(Config(batch_size=given), torch.device(device)).batch_size == batch


def test_a_device_without_float64_can_train(run, monkeypatch):
    class Float32Sums(train.Sums):
        def __init__(self, *_):
            self.names, self.dtype, self.values = [], torch.float32, torch.zeros(0)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", lambda values, dtype, device: dtype)
        assert train.Sums({"loss": 1.0}, torch.device("mps"), 0).values == torch.float32
    monkeypatch.setattr(train, "Sums", Float32Sums)
    monkeypatch.setattr(train, "pixel_positions", lambda *_: None)  # which are the CPU's, as the scores are
    monkeypatch.setattr(train, "score", lambda *_: {"CIDEr": 0.0, "BLEU-4": 0.0})
    with WithoutFloat64(), WithoutAsynchronousCopies():
        run("--epochs", 1, "--print_freq", 2)


@pytest.mark.parametrize("device, has, best", [
    ("cpu", dict(avx512_bf16=True), dict(bfloat16="bfloat16")), ("mps", {}, {}),
    ("cuda", (9, 0, True), dict(auto="bfloat16", bfloat16="bfloat16", float16="float16")),
    ("cuda", (7, 5, False), dict(auto="float16", float16="float16")), ("cuda", (6, 1, False), {}),
], ids=["Zen 4", "Apple", "H100", "T4", "GTX 1080"])
def test_a_device_gets_the_best_precision_that_it_has(device, has, best, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: has[:2])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has[2])
    for wanted in ("auto", "float32", "bfloat16", "float16"):
        found = precision(Config(precision=wanted), torch.device(device))
        assert found == getattr(torch, best.get(wanted, "float32"))


def test_a_precision_that_a_device_lacks_is_said(run, monkeypatch):
    monkeypatch.setattr(utils, "precisions", lambda device: [torch.float32])
    assert re.search("warning: .*bfloat16.*float32", run("--epochs", 1, "--precision", "bfloat16"))


@pytest.fixture
def run_float16(run, monkeypatch):
    """As `run`, in float16, on a CPU that only imitates it."""
    monkeypatch.setattr(utils, "precisions", lambda device: [torch.float32, torch.float16])
    return lambda *flags, **keywords: run("--precision", "float16", *flags, **keywords)


def test_float16_trains_as_float32_does(run_float16, run, tmp_path):
    run_float16("--epochs", 1, "--fine_tune_encoder", "true")
    (_, scalars), log = read_log(tmp_path), read_log(tmp_path)[0][0]
    assert log["train"]["skipped_steps"] == 0 and scalars["train/loss_scale"] == [2.0 ** 16]
    put_aside(tmp_path)
    run("--epochs", 1, "--fine_tune_encoder", "true")
    for part in ("train", "valid"):
        assert log[part]["loss"] == pytest.approx(read_log(tmp_path)[0][0][part]["loss"], rel=5e-3)


def test_a_step_that_overflows_float16_is_skipped_and_a_resumed_run_is_exact(run_float16, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        spoil_gradient(patch, 2, "fc.weight")
        run_float16("--epochs", 2, "--fast", "false")
    whole, log = last_checkpoint(tmp_path), read_log(tmp_path)[0]
    assert log[0]["train"]["skipped_steps"] == pytest.approx(1 / 3) and log[1]["train"]["skipped_steps"] == 0
    assert whole["progress"]["scaler"]["scale"] == 2.0 ** 15 and math.isfinite(log[0]["train"]["loss"])
    put_aside(tmp_path)
    with monkeypatch.context() as patch:
        spoil_gradient(patch, 2, "fc.weight")
        stop_during(patch, 2)
        run_float16("--epochs", 2, "--fast", "false", check=128 + signal.SIGTERM)
    assert last_checkpoint(tmp_path)["progress"]["scaler"]["scale"] == 2.0 ** 15
    run_float16("--epochs", 2, "--fast", "false", "--resume")
    resumed = last_checkpoint(tmp_path)
    assert resumed["progress"]["scaler"] == whole["progress"]["scaler"]
    for half in ("encoder", "decoder"):
        assert all(torch.equal(weight, resumed[half][name]) for name, weight in whole[half].items())


def test_a_loss_that_float16_never_holds_ends_the_run(run_float16, tmp_path, monkeypatch):
    change_models(monkeypatch, lambda _, decoder: decoder.fc.bias.register_hook(lambda gradient: gradient * math.inf))
    printed = run_float16("--epochs", 9, "--fast", "false", check=2)
    assert re.search("float16.*epoch 6, step 3.*--precision float32", printed)  # 17 steps halve 2^16 to less than 1


def test_memory_that_runs_out_is_one_line():
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more")
    assert re.fullmatch("error: out of memory.*--batch_size.*2.00 GiB and more\n", call(main, check=2).err)


def test_averages_of_the_weights():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizers = dict(layer=torch.optim.Adam(layer.parameters(), lr=0.1))
    averages, expected, trained = train.Averages(optimizers, 0.9), None, None
    for step in range(30):
        optimizers["layer"].zero_grad()
        layer(torch.randn(4, 3)).square().sum().backward()
        optimizers["layer"].step()
        averages.update(step)
        trained = layer.weight.detach().clone()
        decay = min(0.9, (1 + step) / (10 + step))
        expected = trained if expected is None else decay * expected + (1 - decay) * trained
    with averages.in_place(True):
        assert torch.allclose(layer.weight, expected) and not torch.allclose(layer.weight, trained)
        with averages.in_place(False):  # a checkpoint in the middle of a validation
            assert torch.equal(layer.weight, trained)
        assert torch.allclose(layer.weight, expected)
    assert torch.equal(layer.weight, trained)
    assert torch.allclose(optimizers["layer"].state_dict()["state"][0]["average"], expected), "a checkpoint has them"


def test_the_best_checkpoint_has_the_averages_and_the_last_one_has_both(run, tmp_path):
    run("--epochs", 1, "--ema_decay", 0.5, "--fine_tune_encoder", "false")
    best, last = (torch.load(tmp_path / "models" / f"{name}.pth.tar", weights_only=True)
                  for name in ("BEST_checkpoint", "checkpoint"))
    averages = last["optimizers"]["decoder"]["state"]
    for number, (name, weight) in enumerate(best["decoder"].items()):
        assert torch.equal(weight, averages[number]["average"])
        assert number > 0 or not torch.equal(weight, last["decoder"][name])
