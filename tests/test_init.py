"""What a run begins with: another model, whatever its words; an encoder that checkpoints need not hold."""
import json
import re

import pytest
import torch
from common import call, fails, folders, last_checkpoint, read_log

import eval
import models
import train
from checkpoint import load_checkpoint, load_initial_models, load_models
from config import get_config
from datasets import END, PAD, START, UNK
from deploy import release

BEST = "BEST_checkpoint.pth.tar"


def test_words_keep_what_was_learnt_of_them(run, tmp_path):  # noqa: F811
    """Whatever their numbers are now: what the decoder makes of them, and of a caption of them, stays the same."""
    run("--epochs", 1)
    path = tmp_path / "models" / BEST
    trained = load_checkpoint(path)
    known = [word for word in trained["word_map"] if word not in (PAD, UNK, START, END)][:9]
    word_map = {word: i for i, word in enumerate([PAD, "龙", *known[::-1], "凤", UNK, START, END])}
    config = get_config(flags={}, trained=trained["config"])
    encoder, decoder, note = load_initial_models(trained, path, config, word_map)
    old_encoder, old_decoder = load_models(trained, config, path)
    assert f"13 of {len(word_map)} words" in note
    images, lengths = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8), torch.tensor([[11], [11]])
    found = []
    with torch.no_grad():
        for numbers, *halves in ((word_map, encoder, decoder), (trained["word_map"], old_encoder, old_decoder)):
            captions = torch.tensor([[numbers[word] for word in (START, *known, END)]] * 2)[:, None]
            scores, _, alphas = halves[1].eval()(halves[0].eval()(images), captions, lengths)
            found += [scores[:, [numbers[word] for word in (*known, END, UNK)]], alphas]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_a_run_that_begins_from_another_has_its_architecture_and_its_lead(run, tiny_flags, tmp_path):  # noqa: F811
    run("--epochs", 4, "--decoder_lr", 0.01)
    first = read_log(tmp_path)[0]
    (tmp_path / "models").rename(tmp_path / "first")
    (tmp_path / "logs").rename(tmp_path / "first logs")
    kept = ("--data_dir", "--min_word_freq", "--batch_size", "--workers", "--device")
    given = [part for pair in zip(tiny_flags[::2], tiny_flags[1::2]) if pair[0] in kept for part in pair]
    begin = [*given, "--init", tmp_path / "first" / BEST, *folders(tmp_path)]
    fails(train.main, *begin, "--emb_dim", 17, parts=("--emb_dim 17", "16"))
    fails(train.main, *begin, "--encoder_weights", "imagenet", parts=("--encoder_weights", "--init"))
    fails(train.main, *given, "--init", tmp_path / "none.tar", *folders(tmp_path), parts=("none.tar",))
    printed = call(train.main, *begin, "--epochs", 1).out
    assert re.search("begun from .*words are known", printed)
    lines = read_log(tmp_path)[0]
    assert lines[0]["epoch"] == 1 and lines[0]["train"]["cross_entropy"] < first[0]["train"]["cross_entropy"] - 0.5
    begun = last_checkpoint(tmp_path)
    assert begun["config"]["emb_dim"] == 16 and begun["encoder"]


@pytest.fixture
def imagenet(monkeypatch):
    """Weights that are torchvision's for these tests. Returns: list of one number, their seed."""
    seed, load_resnet = [7], models.load_resnet

    def load(name, weights):
        with torch.random.fork_rng():
            torch.manual_seed(seed[0] if weights == "imagenet" else 0)
            return load_resnet(name, "none")
    monkeypatch.setattr(models, "load_resnet", load)
    return seed


def test_an_encoder_that_is_not_trained_is_in_the_best_checkpoint_only(imagenet, run, tmp_path):  # noqa: F811
    """And the optimizers in the last one only; a run resumes without either missing."""
    given = ["--encoder_weights", "imagenet"]
    run(*given, "--epochs", 2)
    whole = last_checkpoint(tmp_path)
    best = load_checkpoint(tmp_path / "models" / BEST)
    assert not whole["encoder"] and whole["optimizers"] and best["encoder"] and not best["optimizers"]
    assert {path.name for path in (tmp_path / "models").glob("*.tar")} == {BEST, "checkpoint.pth.tar"}
    for name in ("models", "logs"):
        (tmp_path / name).rename(tmp_path / f"{name} of one run")
    run(*given, "--epochs", 1)
    run(*given, "--epochs", 2, "--resume")
    for name, weight in whole["decoder"].items():
        assert torch.equal(weight, last_checkpoint(tmp_path)["decoder"][name])
    imagenet[0] = 8
    assert re.search(f"error: .*other weights of resnet18.*{BEST}", run(*given, "--epochs", 3, "--resume", check=2))
    imagenet[0] = 7
    run(*given, "--epochs", 3, "--resume", "--fine_tune_encoder", "true")
    assert last_checkpoint(tmp_path)["encoder"]
    imagenet[0] = 8
    run(*given, "--epochs", 4, "--resume", "--fine_tune_encoder", "false")
    assert last_checkpoint(tmp_path)["encoder"]


def test_a_best_checkpoint_in_the_last_one_s_place_is_resumed(run, tmp_path):  # noqa: F811
    run("--epochs", 1, "--ema_decay", 0.5)
    folder = tmp_path / "models"
    (folder / "checkpoint.pth.tar").write_bytes((folder / BEST).read_bytes())
    run("--epochs", 2, "--resume")
    log, = (tmp_path / "logs").glob("*/log.jsonl")
    assert [json.loads(line)["epoch"] for line in log.open()] == [1, 2]


def test_a_released_model_captions_as_the_one_that_was_trained(run, tmp_path, monkeypatch):  # noqa: F811
    """In half the bytes; it can be begun from but not resumed."""
    monkeypatch.setattr("scores.meteor", lambda *_: {})  # which takes seconds to start
    run("--epochs", 1, "--decoder_lr", 0.01, "--ema_decay", 0.9)
    path, small = tmp_path / "models" / BEST, tmp_path / "small.pth.tar"
    given = ["--checkpoint", path, "--results", tmp_path / "results.json", "--beam_size", 1]
    call(eval.main, *given)
    call(release.main, path, "--results", tmp_path / "results.json", "--note", "drawn scenes", "--out", small)
    assert small.stat().st_size < 0.51 * path.stat().st_size
    released = load_checkpoint(small)
    assert released["note"] == "drawn scenes" and released["scores"]["CIDEr"] >= 0
    assert str(tmp_path) not in json.dumps(released["config"])
    data = ["--data_dir", load_checkpoint(path)["config"]["data_dir"]]
    call(eval.main, "--checkpoint", small, "--results", tmp_path / "again.json", "--beam_size", 1, *data)
    captions, again = (json.loads((tmp_path / name).read_text())["captions"] for name in ("results.json", "again.json"))
    assert [caption["words"] for caption in captions] == [caption["words"] for caption in again]
    last = tmp_path / "models" / "checkpoint.pth.tar"
    call(release.main, last, "--results", tmp_path / "results.json", "--note", "", "--out", tmp_path / "last.tar")
    for name, weight in load_checkpoint(tmp_path / "last.tar")["decoder"].items():
        assert torch.equal(weight, released["decoder"][name]), "the first epoch is the best and the last one"
    (tmp_path / "models" / "checkpoint.pth.tar").write_bytes(small.read_bytes())
    assert "not resumed" in run("--resume", check=2)
