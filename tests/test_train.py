"""What training counts, saves and chooses by, in this process, on a few tiny drawn pictures."""
import itertools
import json
import math
import re
import sys

import pytest
import torch
from conftest import files_under
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import train
import utils
from config import Config, UserError, get_config, parse_args
from datasets import CaptionDataset, load_word_map, make_loader
from models import build_models
from train import top5_hits
from utils import load_checkpoint



@pytest.fixture
def run(tiny_flags, tmp_path, monkeypatch):
    """A function that runs train.py in this process with these flags more, into tmp_path."""
    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *tiny_flags, "--model_dir", str(tmp_path / "models"),
                                          "--log_dir", str(tmp_path / "logs"), *map(str, flags)])
        train.main()
    monkeypatch.setattr(train, "draw_attention", lambda *_: Figure())  # most of the time
    return call


def epoch_of(tiny_flags, *flags):
    """What one epoch takes. Returns: the arguments of train_one_epoch; what it changes are the models and state."""
    config = get_config(flags=parse_args("", argv=[*tiny_flags, *flags]).flags)
    word_map = load_word_map(config.data_dir)
    torch.manual_seed(0)
    encoder, decoder = build_models(config, len(word_map))
    loader = make_loader(CaptionDataset(config, "train", word_map), config, True)
    state = dict(epoch=0, batch=0, step=0, seconds=0.0, reading={}, totals=[0.0] * 6,
                 recent=torch.zeros(6, dtype=torch.float64))
    return encoder, decoder, train.make_optimizers(config, encoder, decoder), loader, config, state, None, lambda: None


def test_an_encoder_that_is_random_and_stays_so_is_warned_of(run, capsys):
    warning = r"^warning: .*--encoder_weights none.*--fine_tune_encoder true"

    def warned(*flags):
        run(*flags)
        return len(re.findall(warning, capsys.readouterr().out, re.MULTILINE))
    assert warned("--epochs", 1) == warned("--epochs", 1, "--resume") == 1
    assert warned("--resume", "--fine_tune_encoder", "true") == 0
    assert warned("--resume", "--fine_tune_encoder", "false") == 0, "it has been trained"


def test_a_grad_clip_of_0_clips_nothing(tiny_flags):
    weights = {}
    for clip in ("0", "1e30", "1e-5"):
        arguments = epoch_of(tiny_flags, "--grad_clip", clip)
        train.train_one_epoch(*arguments)
        weights[clip] = torch.cat([p.detach().flatten() for p in arguments[1].parameters()])
    assert torch.equal(weights["0"], weights["1e30"]) and not torch.equal(weights["0"], weights["1e-5"])


# ---------------------------------------------------------------------------------------------------------------------
# What is not finite is neither saved nor logged


def spoil_gradient(monkeypatch, step, name, value):
    """Let the first number of a weight's gradient be `value` at a step of a run, the first one being 1."""
    passes = []

    def hook(gradient):
        passes.append(None)
        if len(passes) == step:
            gradient = gradient.clone()
            gradient.view(-1)[0] = value
        return gradient

    def build(*args, **keywords):
        encoder, decoder = build_models(*args, **keywords)
        decoder.get_parameter(name).register_hook(hook)
        return encoder, decoder
    for module in (train, utils):
        monkeypatch.setattr(module, "build_models", build)


def read_log(folder):
    """The lines of log.jsonl, which must be JSON proper; all scalars of TensorBoard's, tag -> values."""
    run, = (folder / "logs").iterdir()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (run / "log.jsonl").open()]
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return lines, {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# The embedding of <pad> is never used, so that nothing but itself is spoilt.
@pytest.mark.parametrize("name", ["fc.bias", "embedding.weight"])
def test_a_gradient_that_is_nan_at_an_epochs_last_step_touches_no_file(name, run, tmp_path, monkeypatch):
    run("--epochs", 1)
    before = files_under(tmp_path / "models")
    spoil_gradient(monkeypatch, 3, name, math.nan)
    with pytest.raises(UserError, match=r"epoch 2, step 3,.*\.jpg.*--resume"):
        run("--resume", "--epochs", 2)
    assert files_under(tmp_path / "models") == before
    assert len(read_log(tmp_path)[0]) == 1


def test_weights_that_are_nan_are_not_saved_between_two_readings(run, tmp_path, monkeypatch):
    spoil_gradient(monkeypatch, 2, "embedding.weight", math.nan)
    with pytest.raises(UserError, match="epoch 1, step 3"):
        run("--checkpoint_minutes", 0)
    assert load_checkpoint(tmp_path / "models" / "checkpoint.pth.tar")["step"] == 1


def test_moments_and_batch_norms_count_as_the_weights_do(tiny_flags):
    encoder, decoder, *others = epoch_of(tiny_flags, "--fine_tune_encoder", "true")
    encoder.resnet[1].running_var[0] = math.inf
    with pytest.raises(UserError, match="epoch 1, step 3"):
        train.train_one_epoch(encoder, decoder, *others)
    encoder, decoder, *others = epoch_of(tiny_flags, "--grad_clip", "0")
    decoder.embedding.weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(0), 1e30))
    with pytest.raises(UserError, match="epoch 1, step 3"):  # its square is infinite, and with it the step is 0
        train.train_one_epoch(encoder, decoder, *others)
    assert all(weights.isfinite().all() for weights in decoder.parameters())


def test_a_gradient_norm_beyond_all_numbers_is_left_out(run, tmp_path, monkeypatch):
    spoil_gradient(monkeypatch, 2, "embedding.weight", 1e30)
    run("--epochs", 2, "--print_freq", 1)
    _, scalars = read_log(tmp_path)
    assert all(map(math.isfinite, itertools.chain(*scalars.values())))
    assert len(scalars["train/loss"]) == 6 and len(scalars["train/gradient_norm"]) == 5


def test_a_validation_that_is_not_finite_stops_the_run(run, tmp_path, monkeypatch):
    def build(*args, **keywords):
        encoder, decoder = build_models(*args, **keywords)
        encoder.resnet[1].running_var.fill_(-1000)  # finite, but its root is not; training goes without it
        return encoder, decoder
    monkeypatch.setattr(train, "build_models", build)
    with pytest.raises(UserError, match="valid.*epoch 1"):
        run("--fine_tune_encoder", "true")
    assert not (tmp_path / "models").exists() and not list(tmp_path.rglob("log.jsonl"))


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


def test_a_checkpoint_that_knows_only_its_best_cider_can_be_gone_on_with(run, tmp_path, monkeypatch):
    let_score_give(monkeypatch, (0.5, 0.1), (0.5, 0.2), (0.6, 0.0))
    run("--epochs", 1, "--batch_size", 12)
    path = tmp_path / "models" / "checkpoint.pth.tar"
    torch.save({**torch.load(path), "best_score": 0.5}, path)
    run("--resume", "--epochs", 3, "--batch_size", 12)
    assert [line["best"] for line in read_log(tmp_path)[0]] == [True, False, True]


# ---------------------------------------------------------------------------------------------------------------------
# Top-5


def test_top5_is_that_of_topk_where_no_scores_are_equal():
    generator = torch.Generator().manual_seed(0)
    scores = torch.stack([torch.randperm(40, generator=generator) for _ in range(200)]).float()
    targets = torch.randint(40, (200,), generator=generator)
    hits = (scores.topk(5, dim=1).indices == targets[:, None]).any(dim=1)
    assert 0 < hits.sum() < 200 and top5_hits(scores, targets).item() == hits.sum().item()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_that_say_nothing_hit_by_chance_and_those_that_are_no_numbers_never(dtype):
    targets = torch.arange(8)
    assert top5_hits(torch.ones(8, 40, dtype=dtype), targets).item() == pytest.approx(8 * 5 / 40)
    assert top5_hits(torch.full((8, 40), float("nan"), dtype=dtype), targets).item() == 0
    some = torch.arange(40.0, 0, -1).repeat(8, 1).to(dtype)
    some[3, 3] = float("nan")
    assert top5_hits(some, targets).item() == 4


# ---------------------------------------------------------------------------------------------------------------------
# Devices: Apple's mps has no float64, and copies to it that do not wait read memory that may be another's by then


class WithoutFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        assert not isinstance(result, torch.Tensor) or result.dtype != torch.float64, f"{function} gives float64"
        return result


class WithoutHaste(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert not (kwargs or {}).get("non_blocking"), f"{function} does not wait"
        return function(*args, **(kwargs or {}))


def test_a_device_without_float64_can_train(run, monkeypatch):
    assert train.sums_dtype(torch.device("mps")) == torch.float32
    assert train.sums_dtype(torch.device("cuda")) == train.sums_dtype(torch.device("cpu")) == torch.float64
    monkeypatch.setattr(train, "sums_dtype", lambda device: torch.float32)
    with WithoutFloat64(), WithoutHaste():
        run("--epochs", 1, "--print_freq", 2)


@pytest.mark.parametrize("wanted", ["auto", "float32", "bfloat16"])
def test_another_device_than_a_cpu_or_cuda_multiplies_in_float32(wanted, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert train.precision(Config(precision=wanted), torch.device("mps")) == "float32"
    expected = "bfloat16" if wanted == "bfloat16" else "float32"
    assert train.precision(Config(precision=wanted), torch.device("cpu")) == expected
