"""What a run begins with: another model, whatever its words; an encoder that checkpoints need not
hold."""
import json
import re

import pytest
import torch
from common import BEST, call, fails, folders, last_checkpoint, read_log

import eval
import models
import train
from checkpoint import load_checkpoint, load_initial_models, load_models
from config import get_config
from datasets import END, PAD, START, UNK
from deploy import release


def put_aside(folder, name):
    for kind in ("models", "logs"):
        (folder / kind).rename(folder / f"{name} {kind}")


def test_words_keep_what_was_learnt_of_them(trained):
    """Whatever their numbers are now: what the decoder makes of them, and of a caption of them,
    stays the same."""
    path = trained / "models" / BEST
    old = load_checkpoint(path)
    known = [word for word in old["word_map"] if word not in (PAD, UNK, START, END)][:9]
    words = [PAD, "龙", *known[::-1], "凤", UNK, START, END]
    word_map = {word: i for i, word in enumerate(words)}
    config = get_config(flags={}, trained=old["config"])
    *begun, note = load_initial_models(old, path, config, word_map)
    assert f"13 of {len(word_map)} words" in note
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    lengths = torch.tensor([[11], [11]])
    found = []
    for numbers, (encoder, decoder) in ((word_map, begun),
                                        (old["word_map"], load_models(old, config, path))):
        captions = torch.tensor([[numbers[word] for word in (START, *known, END)]] * 2)[:, None]
        with torch.no_grad():
            scores, _, alphas = decoder.eval()(encoder.eval()(images), captions, lengths)
        found += [scores[:, [numbers[word] for word in (*known, END, UNK)]], alphas]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_a_run_that_begins_from_another_has_its_architecture_and_its_lead(run, tiny_flags,
                                                                           tmp_path):
    run("--epochs", 4, "--decoder_lr", 0.01)
    first = read_log(tmp_path)[0]
    put_aside(tmp_path, "first")
    kept = ("--data_dir", "--min_word_freq", "--batch_size", "--workers", "--device")
    pairs = zip(tiny_flags[::2], tiny_flags[1::2])
    given = [part for pair in pairs if pair[0] in kept for part in pair] + folders(tmp_path)
    begin = [*given, "--init", tmp_path / "first models" / BEST]
    fails(train.main, *begin, "--emb_dim", 17, parts=("--emb_dim 17", "16"))
    fails(train.main, *begin, "--encoder_weights", "imagenet",
          parts=("--encoder_weights", "--init"))
    fails(train.main, *given, "--init", tmp_path / "none.tar", parts=("none.tar",))
    printed = call(train.main, *begin, "--epochs", 1).out
    assert re.search("begun from .*words are known", printed)
    line, = read_log(tmp_path)[0]
    loss = line["train"]["cross_entropy"]
    assert line["epoch"] == 1 and loss < first[0]["train"]["cross_entropy"] - 0.5
    begun = last_checkpoint(tmp_path)
    assert begun["config"]["emb_dim"] == 16 and begun["encoder"]


@pytest.fixture
def imagenet(monkeypatch):
    """Weights that are torchvision's for these tests, as a list of one number, their seed."""
    seed, load_resnet = [7], models.load_resnet

    def load(name, weights):
        with torch.random.fork_rng():
            torch.manual_seed(seed[0] if weights == "imagenet" else 0)
            return load_resnet(name, "none")
    monkeypatch.setattr(models, "load_resnet", load)
    return seed


def test_an_encoder_that_is_not_trained_is_in_the_best_checkpoint_only(imagenet, run, tmp_path):
    """And the optimizers in the last one only; a run resumes without either missing."""
    given = ["--encoder_weights", "imagenet", "--batch_size", 12, "--epochs"]
    run(*given, 2)
    whole = last_checkpoint(tmp_path)
    best = load_checkpoint(tmp_path / "models" / BEST)
    assert not whole["encoder"] and whole["optimizers"]
    assert best["encoder"] and not best["optimizers"]
    names = {path.name for path in (tmp_path / "models").glob("*.tar")}
    assert names == {BEST, "checkpoint.pth.tar"}
    put_aside(tmp_path, "whole")
    run(*given, 1)
    run(*given, 2, "--resume")
    for name, weight in whole["decoder"].items():
        assert torch.equal(weight, last_checkpoint(tmp_path)["decoder"][name])
    imagenet[0] = 8
    printed = run(*given, 3, "--resume", check=2)
    assert re.search(f"error: .*other weights of resnet18.*{BEST}", printed)
    imagenet[0] = 7
    run(*given, 3, "--resume", "--fine_tune_encoder", "true")
    assert last_checkpoint(tmp_path)["encoder"]
    imagenet[0] = 8
    run(*given, 4, "--resume", "--fine_tune_encoder", "false")
    assert last_checkpoint(tmp_path)["encoder"]


def test_a_best_checkpoint_in_the_last_one_s_place_is_resumed(run, tmp_path):
    run("--epochs", 1, "--ema_decay", 0.5, "--batch_size", 12)
    folder = tmp_path / "models"
    (folder / BEST).replace(folder / "checkpoint.pth.tar")
    run("--epochs", 2, "--resume")
    assert [line["epoch"] for line in read_log(tmp_path)[0]] == [1, 2]


def test_a_released_model_captions_as_the_one_that_was_trained(run, tmp_path, monkeypatch):
    """In half the bytes; it can be begun from but not resumed."""
    monkeypatch.setattr("scores.meteor", lambda *_: {})  # which takes seconds to start
    run("--epochs", 1, "--decoder_lr", 0.01, "--ema_decay", 0.9)
    path, last = tmp_path / "models" / BEST, tmp_path / "models" / "checkpoint.pth.tar"
    results, again = tmp_path / "results.json", tmp_path / "again.json"
    small, other = tmp_path / "small.pth.tar", tmp_path / "other.pth.tar"
    call(eval.main, "--checkpoint", path, "--results", results, "--beam_size", 1)
    call(release.main, path, "--results", results, "--note", "drawn scenes", "--out", small)
    assert small.stat().st_size < 0.51 * path.stat().st_size
    released = load_checkpoint(small)
    assert released["note"] == "drawn scenes" and released["scores"]["CIDEr"] >= 0
    assert str(tmp_path) not in json.dumps(released["config"])
    data = load_checkpoint(path)["config"]["data_dir"]
    call(eval.main, "--checkpoint", small, "--results", again, "--beam_size", 1,
         "--data_dir", data)
    words = [[caption["words"] for caption in json.loads(file.read_text())["captions"]]
             for file in (results, again)]
    assert words[0] == words[1]
    call(release.main, last, "--results", results, "--note", "", "--out", other)
    for name, weight in load_checkpoint(other)["decoder"].items():
        assert torch.equal(weight, released["decoder"][name]), "the first epoch is the best one"
    small.replace(last)
    assert "not resumed" in run("--resume", check=2)
