"""The scripts end to end on a few tiny drawn pictures, and the files they pass on to each other:
checkpoints."""
import copy
import dataclasses
import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from common import BEST, ROOT, call, fails, files_under, folders
from PIL import Image

import demo
import eval
import pre_process
import scores
import train
from checkpoint import load_checkpoint, load_models, load_optimizer, save_checkpoint
from config import CHECKPOINT_VERSION, Config
from data import sample
from datasets import load_word_map
from models import build_models
from utils import UserError, get_device


@pytest.fixture
def best(trained):
    return trained / "models" / BEST


@pytest.fixture
def without_meteor(monkeypatch):
    """Which takes seconds to start."""
    monkeypatch.setattr(scores, "meteor", lambda *_: {"METEOR": 0.25})


def test_evaluation(best, tiny, tmp_path, without_meteor):
    has_java = shutil.which("java") is not None
    paths = tmp_path / "results.json", tmp_path / "submission.json"
    done = call(eval.main, "--checkpoint", best, "--split", "test_a", "--beam_size", 2,
                "--results", paths[0], "--write_submission", paths[1],
                "--official", str(has_java).lower())
    results, submission = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    assert results["protocol"]["split"] == "test_a" and results["protocol"]["beam_size"] == 2
    assert {"BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr", "METEOR", "char BLEU-1", "char CIDEr",
            "unfinished_captions", "true_captions", "attention_in_box",
            "attention_in_box_by_chance", "attention_in_box_colours"} <= results["scores"].keys()
    if has_java:  # an empty caption is rejected
        is_left_out = "official scores are left out: " in done.out
        assert ("official CIDEr" in results["scores"]) != is_left_out
    for name in ("BLEU-1", "BLEU-4", "CIDEr"):
        assert f"{results['scores'][name]:.4f}" in done.out
    captions = results["captions"]
    listed = sorted(path.name for path in tiny.glob("*test_a*/*images*/*.jpg"))
    assert sorted(entry["image_id"] for entry in captions) == listed
    assert all(len(entry["references"]) == 5 and entry["score"] < 0 for entry in captions)
    assert [(entry["image_id"] + ".jpg", entry["caption"]) for entry in submission] == [
        (entry["image_id"], entry["caption"]) for entry in captions]


def test_evaluation_of_uniform_attention_and_without_java(best, tmp_path, monkeypatch):
    """Weights of the attention set to zero make it uniform and still."""
    checkpoint = torch.load(best, weights_only=True)
    for name, weight in checkpoint["decoder"].items():
        if name.startswith("attention."):
            weight.zero_()
    torch.save(checkpoint, tmp_path / "blind.pth.tar")
    given = ["--checkpoint", tmp_path / "blind.pth.tar", "--split", "test_a", "--beam_size", 1]
    monkeypatch.setenv("PATH", str(tmp_path))
    lines = call(eval.main, *given).out.splitlines()
    results = json.loads((tmp_path / "results_test_a_beam1_blind.json").read_text("utf-8"))
    assert sum(line.startswith("METEOR is left out: ") for line in lines) == 1
    assert "METEOR" not in results["scores"]
    diagnosis, warnings = results["diagnosis"], results["warnings"]
    assert diagnosis["attention_shift"] < 0.01 and diagnosis["attention_entropy"] > 0.99
    assert len(warnings) >= 2 and all(f"warning: {text}" in lines for text in warnings)
    fails(eval.main, *given, "--official", "true", parts=("java", "install"))


def test_results_of_another_model_or_search_have_another_name():
    best = Path("models") / BEST
    assert eval.results_path(best, "valid", 3, 0) == Path("models/results_valid_beam3.json")
    models = BEST, "checkpoint.pth.tar", "checkpoint.previous.pth.tar", "my.pt"
    names = {eval.results_path(best.with_name(name), split, beam_size, length_penalty)
             for name in models for split in ("valid", "test_a") for beam_size in (1, 3)
             for length_penalty in (0.0, 0.7, 0.7000001, 1.0)}
    assert len(names) == 64 and {path.parent for path in names} == {best.parent}
    assert eval.results_path(best, "valid", 3, 1) == eval.results_path(best, "valid", 3, 1.0)


def test_scores_finds_the_pictures_that_eval_names(best, tiny, tmp_path, without_meteor):
    shutil.copy(tiny / "test_a.h5", tmp_path)
    with h5py.File(tmp_path / "test_a.h5", "a") as file:
        file["image_ids"][:] = ["cat.jpg", "cat.png", "dog.webp", "1.TIF"]
    results, path = tmp_path / "results.json", tmp_path / "submission.json"
    call(eval.main, "--checkpoint", best, "--data_dir", tmp_path, "--split", "test_a",
         "--beam_size", 1, "--results", results, "--write_submission", path)
    submission = json.loads(path.read_text(encoding="utf-8"))
    assert [entry["image_id"] for entry in submission] == ["cat.jpg", "cat.png", "dog", "1"]
    captions = json.loads(results.read_text(encoding="utf-8"))["captions"]
    for entry, result in zip(submission, captions):
        entry["caption"] = result["references"][0]  # the model has learnt nothing
    path.write_text(json.dumps(submission), encoding="utf-8")
    assert "BLEU-4 1.0000" in call(scores.main, path, results).out


def is_figure(path):
    pixels = np.asarray(Image.open(path))
    return pixels.ndim == 3 and min(pixels.shape[:2]) > 100 and pixels.std() > 10


def test_demo_of_the_ten_pictures_and_what_git_ignores(best, tmp_path):
    """What the scripts and the commands of README write is ignored; what comes along is not."""
    def git(*command):
        return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *command],
                              cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    git("init")
    git("add", "--force", ".")
    git("commit", "-m", "first")
    assert git("ls-files", "--cached", "--ignored", "--exclude-standard") == ""

    command = [sys.executable, "demo.py", "--preset", "sample", "--checkpoint", best,
               "--max_len", "12", "--html", "images/index.html"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert all(f"images/sample/image_{i}.jpg" in done.stdout for i in range(10))
    assert "missing from font" not in done.stderr, "a Chinese character is drawn as an empty box"
    figures = sorted((tmp_path / "images").glob("out_*.jpg"))
    assert [path.name for path in figures] == [f"out_{i}.jpg" for i in range(10)]
    assert all(is_figure(path) for path in figures)

    written = ["models/BEST_checkpoint.pth.tar", "models/sample/checkpoint.pth.tar",
               "models/results_valid_beam3.json", "models/submission.json", "data/WORDMAP.json",
               "data/sample/scenes.json", "logs/sample/run/log.jsonl",
               "BEST_checkpoint_.ours.pth.tar", ".venv/installed", ".pytest_cache/x",
               ".ruff_cache/x", "images/mine/out_cat.jpg", "images/cat.jpg"]
    for name in written:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert git("status", "--short", "--untracked-files=all") == ""
    (tmp_path / "images" / "gallery" / "out_cat.jpg").touch()
    status = git("status", "--short", "--untracked-files=all")
    assert status == "?? images/gallery/out_cat.jpg\n"


def test_the_ai_challenger_preset_at_its_full_size(tmp_path):
    """ResNet-101, 256 pixels, 14x14 and 512 dimensions, from archives to a figure; only the weights
    are random."""
    call(sample.main, "--out", tmp_path, "--train", 2, "--valid", 1, "--test", 1, "--size", 64)
    data = ["--data_dir", tmp_path]
    call(pre_process.main, *data, "--min_word_freq", 1)
    call(train.main, *data, *folders(tmp_path), "--encoder_weights", "none", "--epochs", 1,
         "--workers", 0)
    call(demo.main, "--model_dir", tmp_path / "models", "--image", "images/sample/image_0.jpg",
         "--beam_size", 1, "--out", tmp_path / "out")
    assert is_figure(tmp_path / "out" / "out_0.jpg")
    config = load_checkpoint(tmp_path / "models" / BEST)["config"]
    sizes = config["encoder"], config["image_size"], config["encoded_image_size"]
    assert sizes == ("resnet101", 256, 14)
    assert config["emb_dim"] == config["attention_dim"] == config["decoder_dim"] == 512


# -------------------------------------------------------------------------------------------------
# A user's mistakes: one line with the way out, exit code 2, no traceback


def test_a_missing_or_bad_checkpoint(tmp_path):
    for main, *more in ((eval.main,), (demo.main, "--image", "images/sample/image_0.jpg"),
                        (train.main, "--resume")):
        fails(main, *more, "--model_dir", tmp_path,
              parts=(tmp_path / "", "does not exist", "train.py"))
    path = tmp_path / "bad.pth.tar"
    path.write_bytes(b"garbage")
    done = call(eval.main, "--checkpoint", path, check=2)
    assert done.err.startswith(f"error: {path}") and len(done.err.splitlines()) == 1


def test_pictures_and_data_that_do_not_fit(best, tiny, tmp_path):
    fails(demo.main, "--checkpoint", best, "--image", tmp_path / "none.jpg",
          parts=("none.jpg", "--image"))
    fails(eval.main, "--checkpoint", best, "--split", "test_b",
          parts=("test_b.h5", "pre_process.py"))
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "valid"):
        shutil.copy(tiny / f"{split}.h5", data)
    words = [word for word in load_word_map(tiny) if word != "的"]
    (data / "WORDMAP.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    given = ["--data_dir", data, *folders(tmp_path)]
    fails(train.main, *given, "--image_size", 64, parts=("another word map", "pre_process.py"))
    shutil.copytree(best.parent, tmp_path / "models", dirs_exist_ok=True)
    fails(train.main, "--resume", *given, parts=("another word map",))


def test_a_loss_that_is_not_finite_names_step_and_pictures(tiny_flags, tmp_path):
    fails(train.main, *tiny_flags, *folders(tmp_path), "--decoder_lr", 1e30, "--epochs", 3,
          parts=("epoch", "step", ".jpg", "lower rates"))
    assert not list((tmp_path / "models").glob("*.tmp"))


@pytest.mark.parametrize("flags, parts", [
    (["--encoder", "resnet17"], ("--encoder", "resnet18", "resnet17")),
    (["--device", "tpu"], ("--device tpu",)),
    pytest.param(["--device", "cuda"], ("--device cuda",),
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"))])
def test_what_this_machine_or_this_code_lacks(flags, parts, tiny_flags, tmp_path):
    fails(train.main, *tiny_flags, *folders(tmp_path), *flags, parts=parts)


def resnet18():
    build_models(Config(encoder="resnet18", encoder_weights="none"), 10)
    assert "timm" not in sys.modules


def test_a_resnet_does_without_timm(start):
    assert start(main=resnet18).wait() == 0


# -------------------------------------------------------------------------------------------------
# Checkpoints that are whole, but not what they should be


def weights(number):
    """A checkpoint with 40,000 weights, all of them this number, which is its epoch too."""
    words = {"<pad>": 0, "<unk>": 1, "<start>": 2, "<end>": 3}
    return dict(version=CHECKPOINT_VERSION, epoch=number, config={}, word_map=words, optimizers={},
                encoder={"weight": torch.full((100, 400), float(number))}, world_size=1,
                decoder={"weight": torch.ones(4, 2)}, progress=dict(run="20260101-000000"))


@pytest.mark.parametrize("change, message", [
    (lambda c: c["word_map"].popitem(), "not a word map"),
    (lambda c: c.pop("decoder"), "'decoder'"), (lambda c: c.update(version=99), "version 99"),
    (lambda c: c["config"].update(colour="red"), "colour"),
    (lambda c: c["config"].update(log_dir="a\0b"), "log_dir"),
    (lambda c: c["progress"].update(run="../elsewhere"), "run"),
    (lambda c: c["progress"].update(run=".."), "run"),
    (lambda c: c["encoder"]["weight"].fill_(float("nan")), "not finite")])
def test_a_checkpoint_with_wrong_contents_is_refused(change, message, tmp_path):
    checkpoint = weights(1)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "bad.pth.tar")
    with pytest.raises(UserError, match=f"bad.pth.tar.*{message}"):
        load_checkpoint(tmp_path / "bad.pth.tar")


CONFIG = Config(encoder="test_efficientnet", emb_dim=8, attention_dim=8, decoder_dim=8)


def saved_models(words):
    encoder, decoder = build_models(CONFIG, 5, encoder_weights="none")
    return dict(encoder=encoder.state_dict(), decoder=decoder.half().state_dict(),
                word_map=range(words))


@pytest.mark.parametrize("change, words", [
    (dict(encoder="test_convnext"), 5), (dict(decoder_dim=16), 5), ({}, 6)])
def test_weights_of_another_architecture_are_refused(change, words):
    with pytest.raises(UserError, match="its file.*another architecture"):
        load_models(saved_models(words), dataclasses.replace(CONFIG, **change), "its file")


def test_the_models_of_a_checkpoint_are_copies_in_float32():
    saved = saved_models(5)
    _, found = load_models(saved, CONFIG, "its file")
    assert all(weights.dtype == torch.float32 for weights in found.parameters())
    found.fc.bias.data += 1
    assert torch.allclose(found.fc.bias - 1, saved["decoder"]["fc.bias"].float(), atol=1e-3)


@pytest.mark.parametrize("change", [
    lambda state: state["param_groups"][0]["params"].append(2),
    lambda state: state["state"][0].update(exp_avg=torch.zeros(3))])
def test_an_optimizer_that_does_not_fit_is_refused(change):
    layer = torch.nn.Linear(2, 5)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)
    layer(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    load_optimizer(torch.optim.Adam(layer.parameters(), fused=True), state, "its file")
    change(state)
    with pytest.raises(UserError, match="its file"):
        load_optimizer(torch.optim.Adam(layer.parameters(), fused=True), state, "its file")


# -------------------------------------------------------------------------------------------------
# Checkpoints that are damaged, and how they are written


class Touch:
    """What is a call of open(), in a pickle."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_damaged_or_hostile_checkpoint_is_refused(tmp_path):
    path, marker = tmp_path / "bad.pth.tar", tmp_path / "ran"
    for content in ({"hook": Touch(marker)}, [1, 2]):
        torch.save(content, path)
        with pytest.raises(UserError, match="bad.pth.tar.*import_original"):
            load_checkpoint(path)
    assert not marker.exists()


def damage(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [
    lambda path: damage(path, 80_000), lambda path: path.write_bytes(b""),
    lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-100]),
    lambda path: torch.save({**weights(2), "encoder": {"w": torch.tensor(torch.nan)}}, path)],
    ids=["flipped", "empty", "missing", "truncated", "not finite"])
def test_a_damaged_checkpoint_names_the_way_back(spoil, tmp_path):
    folder = tmp_path / "my models"
    path = folder / "checkpoint.pth.tar"
    save_checkpoint(weights(1), path.with_name(BEST))
    for number in (1, 2, 3):
        save_checkpoint(weights(number), path, keep_previous=True)
    assert load_checkpoint(path)["epoch"] == 3 and len(files_under(folder)) == 3
    for name, epoch in (("checkpoint", 2), ("checkpoint.previous", 1)):
        spoil(path)
        if name != "checkpoint":
            spoil(folder / f"{name}.pth.tar")
        follow_the_error(path)
        assert load_checkpoint(path)["epoch"] == epoch
    spoil(path)
    spoil(folder / BEST)
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert "intact" not in str(error.value)


def follow_the_error(path):
    """Run the command in the error about a damaged checkpoint."""
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value) and "--resume" in str(error.value)
    subprocess.run(str(error.value).split("intact: ")[1].split(", and")[0], shell=True, check=True)


def refuse(*_):
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("has_links", [True, False])
def test_a_checkpoint_cut_off_while_it_is_written(has_links, tmp_path, monkeypatch):
    """Wherever the writing stops, what --resume reads is whole, or the error names what is."""
    if not has_links:
        monkeypatch.setattr("os.link", refuse)
    path = tmp_path / "checkpoint.pth.tar"
    save_checkpoint(weights(1), path, keep_previous=True)
    save_checkpoint(weights(2), path, keep_previous=True)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="untouched"):
        patch.setattr("os.fsync", refuse)
        save_checkpoint(weights(3), path, keep_previous=True)
    if not path.exists():
        follow_the_error(path)
    assert load_checkpoint(path)["epoch"] == 2 and not list(tmp_path.glob("*.tmp"))


def test_a_checkpoint_on_a_full_disk(small_disk):
    path = small_disk / "models" / "checkpoint.pth.tar"
    for number in range(1, 5):  # of 160 KB
        save_checkpoint(weights(number), path, keep_previous=True)
    before = files_under(small_disk)

    def save_a_large_one():
        errors = []
        try:
            save_checkpoint(dict(weights(9), encoder={"weight": torch.zeros(200_000)}), path, True)
        except UserError as error:
            errors.append(error)  # a cycle: its traceback has this frame, which has the error
        return str(*errors)

    message = save_a_large_one()
    for part in (str(path), "the disk is full", "0.8 MiB", "untouched"):
        assert part in message
    gc.collect()  # Python 3.12.1 crashes here if the traceback holds a view of a BytesIO
    assert files_under(small_disk) == before and load_checkpoint(path)["epoch"] == 4


@pytest.mark.parametrize("name, rank, index", [
    ("cuda:1", "0", 1), ("cuda", "2", 2), ("auto", "2", 2)])
def test_a_chosen_gpu_is_the_one_that_kernels_and_graphs_run_on(name, rank, index, monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert get_device(Config(device=name)) == torch.device("cuda", index) == current[0]
