"""The four scripts end to end, as a user calls them, on a few tiny drawn pictures; every output is looked into."""
import copy
import dataclasses
import gc
import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import NOT_BEGUN, error_line, files_under, script
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from config import Config, UserError, get_config, parse_args
from datasets import CaptionDataset, load_word_map, make_loader
from utils import (CHECKPOINT_VERSION, get_device, load_checkpoint, load_optimizer, open_checkpoint,
                   save_checkpoint)

@pytest.fixture(scope="session")
def trained(tiny, tiny_flags, tmp_path_factory):
    """A model after two epochs: its folder, with models/ and logs/."""
    folder = tmp_path_factory.mktemp("trained")
    result = script("train.py", *tiny_flags, "--model_dir", folder / "models", "--log_dir", folder / "logs",
                    "--epochs", 2)
    assert result.returncode == 0, result.stderr
    return folder


def run_folder(folder):
    return next((folder / "logs").iterdir())


def same_tensors(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return a == b


def test_training_writes_whole_checkpoints(trained, tiny):
    for name in ("checkpoint.pth.tar", "BEST_checkpoint.pth.tar"):
        checkpoint = torch.load(trained / "models" / name, weights_only=True)
        assert checkpoint["word_map"] == load_word_map(tiny)
        assert checkpoint["config"]["encoder"] == "resnet18"
        assert len(checkpoint["decoder"]["embedding.weight"]) == len(checkpoint["word_map"])
    assert checkpoint["epoch"] <= 2 and load_checkpoint(trained / "models" / "checkpoint.pth.tar")["epoch"] == 2
    assert not list((trained / "models").glob("*.tmp"))


def test_training_logs_everything(trained):
    folder = run_folder(trained)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[1]["step"] == 2 * lines[0]["step"]
    for line in lines:
        assert {"loss", "top5", "BLEU-4", "CIDEr"} <= line["valid"].keys()
        assert all(np.isfinite(value) for part in ("train", "valid", "rates") for value in line[part].values())
    assert {"config", "command", "git_revision", "versions"} <= json.loads((folder / "config.json").read_text()).keys()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"train/loss", "train/top5", "train/images_per_s", "train/gradient_norm", "train/decoder_lr",
            "valid/loss", "valid/top5", "valid/BLEU-4", "valid/CIDEr", "epoch/loss"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("valid/CIDEr")] == [line["step"] for line in lines]
    assert events.Tags()["images"] and all(image.width > 200 for image in events.Images(events.Tags()["images"][0]))


def test_resumed_equals_uninterrupted(trained, tiny_flags, tmp_path):
    """One epoch, then --resume for the second, is bit for bit the run of two epochs."""
    folders = ["--model_dir", tmp_path / "models", "--log_dir", tmp_path / "logs"]
    assert script("train.py", *tiny_flags, *folders, "--epochs", 1).returncode == 0
    refused = script("train.py", *tiny_flags, *folders, "--epochs", 2)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    result = script("train.py", "--resume", *folders, "--epochs", 2)
    assert result.returncode == 0, result.stderr
    one, two = (load_checkpoint(folder / "models" / "checkpoint.pth.tar") for folder in (trained, tmp_path))
    for part in ("encoder", "decoder", "optimizers", "best_score", "epochs_since_improvement", "step"):
        assert same_tensors(one[part], two[part]), part
    logs = [[json.loads(line)["valid"]["loss"] for line in (run_folder(folder) / "log.jsonl").read_text().splitlines()]
            for folder in (trained, tmp_path)]
    assert logs[0] == logs[1]


def test_a_new_rate_takes_effect_on_resume_and_a_new_architecture_is_refused(trained, tmp_path):
    shutil.copytree(trained / "models", tmp_path / "models")
    folders = ["--model_dir", tmp_path / "models", "--log_dir", tmp_path / "logs"]
    result = script("train.py", "--resume", *folders, "--epochs", 3, "--decoder_lr", 0.00321)
    assert result.returncode == 0 and "decoder_lr 0.00321" in result.stdout
    refused = script("train.py", "--resume", *folders, "--emb_dim", 24)
    assert refused.returncode == 2 and refused.stderr.startswith("error: --emb_dim 24 contradicts")
    finished = script("train.py", "--resume", *folders)
    assert finished.returncode == 0 and "Finished (all 3 epochs done)" in finished.stdout


def test_the_rates_fall_without_a_better_score(tiny_flags, tmp_path):
    """With a rate of 0 nothing changes, so the first epoch stays the best; a named rate is then the rate in force."""
    folders = ["--model_dir", tmp_path / "models", "--log_dir", tmp_path / "logs"]
    script("train.py", *tiny_flags, *folders, "--decoder_lr", 0, "--encoder_lr", 0, "--fine_tune_encoder", "false",
           "--lr_decay_epochs", 1, check=0)
    result = script("train.py", "--resume", *folders, "--decoder_lr", 0.004, "--epochs", 3, check=0)
    assert "decoder_lr 0.004" in result.stdout
    log = run_folder(tmp_path) / "log.jsonl"
    assert json.loads(log.read_text().splitlines()[2])["rates"]["decoder_lr"] == 0.004
    checkpoint = load_checkpoint(tmp_path / "models" / "checkpoint.pth.tar")
    expected = 0.004 * (0.8 if checkpoint["epochs_since_improvement"] else 1)
    assert checkpoint["optimizers"]["decoder"]["param_groups"][0]["lr"] == pytest.approx(expected)


def test_fine_tuning_can_be_turned_on_later(trained, tmp_path):
    shutil.copytree(trained / "models", tmp_path / "models")
    before = load_checkpoint(tmp_path / "models" / "checkpoint.pth.tar")
    result = script("train.py", "--resume", "--model_dir", tmp_path / "models", "--log_dir", tmp_path / "logs",
                    "--epochs", 3, "--fine_tune_encoder", "true", "--encoder_lr", 0.01)
    assert result.returncode == 0 and "encoder_lr 0.01" in result.stdout, result.stderr
    after = load_checkpoint(tmp_path / "models" / "checkpoint.pth.tar")
    assert not torch.equal(before["encoder"]["resnet.7.0.conv1.weight"], after["encoder"]["resnet.7.0.conv1.weight"])


def test_evaluation(trained, tiny, tmp_path):
    result = script("eval.py", "--checkpoint", trained / "models" / "BEST_checkpoint.pth.tar", "--split", "test_a",
                    "--beam_size", 2, "--results", tmp_path / "results.json", "--write_submission",
                    tmp_path / "submission.json", "--official", "true" if shutil.which("java") else "false")
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["protocol"]["split"] == "test_a" and results["protocol"]["beam_size"] == 2
    assert {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr", "char BLEU-1", "char BLEU-4", "char CIDEr",
            "unfinished_captions", "true_captions", "attention_in_box", "attention_in_box_by_chance"
            } <= results["scores"].keys()
    if shutil.which("java"):  # an empty caption is refused
        assert ("official CIDEr" in results["scores"]) != ("no official scores: " in result.stdout)
    for name in ("BLEU-1", "BLEU-4", "CIDEr"):
        assert f"{results['scores'][name]:.4f}" in result.stdout
    listed = sorted(path.name for path in tiny.glob("*test_a*/*images*/*.jpg"))
    assert sorted(entry["image_id"] for entry in results["captions"]) == listed
    for entry in results["captions"]:
        assert len(entry["references"]) == 5 and entry["score"] < 0 and isinstance(entry["caption"], str)
    submission = json.loads((tmp_path / "submission.json").read_text(encoding="utf-8"))
    assert [(entry["image_id"] + ".jpg", entry["caption"]) for entry in submission] == [
        (entry["image_id"], entry["caption"]) for entry in results["captions"]]


def test_evaluation_of_an_attention_that_looks_nowhere_and_without_java(trained, tmp_path):
    """Weights of the attention set to zero make it uniform and still; an empty PATH has no Java on it."""
    checkpoint = torch.load(trained / "models" / "BEST_checkpoint.pth.tar", weights_only=True)
    checkpoint["decoder"]["attention.full_att.weight"].zero_()
    torch.save(checkpoint, tmp_path / "blind.pth.tar")
    flags = ["--checkpoint", tmp_path / "blind.pth.tar", "--split", "test_a", "--beam_size", 1]
    environment = {**os.environ, "PATH": str(tmp_path)}
    result = script("eval.py", *flags, check=0, env=environment, cwd=tmp_path)
    lines = result.stdout.splitlines()
    assert sum(line.startswith("no METEOR: ") for line in lines) == 1
    results = json.loads((trained / "models" / "results_test_a_beam1.json").read_text(encoding="utf-8"))
    assert "METEOR" not in results["scores"] and 0 <= results["scores"]["char BLEU-4"] <= 1
    assert results["diagnosis"]["attention_shift"] < 0.01 and results["diagnosis"]["attention_entropy"] > 0.99
    assert len(results["warnings"]) == 2 and all(f"warning: {text}" in lines for text in results["warnings"])
    fails(script("eval.py", *flags, "--official", "true", env=environment, cwd=tmp_path), "java", "install")
    fails(script("eval.py", *flags, "--official", "yes"), "--official", "true or false")


def is_figure(path):
    pixels = np.asarray(Image.open(path))
    return pixels.ndim == 3 and min(pixels.shape[:2]) > 100 and pixels.std() > 10


def test_demo_of_the_ten_pictures(trained, tmp_path):
    checkpoint = trained / "models" / "BEST_checkpoint.pth.tar"
    result = script("demo.py", "--checkpoint", checkpoint, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"out_{i}.jpg" for i in range(10)]
    assert all(is_figure(path) for path in tmp_path.iterdir())
    assert all(f"images/image_{i}.jpg" in result.stdout for i in range(10))
    assert "missing from font" not in result.stderr, "a Chinese character was drawn as an empty box"


def test_demo_of_a_folder_goes_on_past_a_broken_picture(trained, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("L", (90, 30), 128).save(folder / "a.png")
    Image.new("RGB", (20, 40), "red").save(folder / "a.jpg")
    (folder / "b.jpg").write_bytes(b"not a picture")
    result = script("demo.py", "--checkpoint", trained / "models" / "BEST_checkpoint.pth.tar", "--image", folder,
                    "--out", tmp_path / "out")
    assert result.returncode == 2 and "b.jpg" in result.stdout and result.stderr.count("\n") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["out_a.jpg.jpg", "out_a.png.jpg"]
    assert all(is_figure(path) for path in (tmp_path / "out").iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# A user's mistakes: one line that says what to do, exit code 2, no traceback


def fails(result, *parts):
    line = error_line(result.stderr)
    assert result.returncode == 2 and all(str(part) in line for part in parts), line


@pytest.mark.parametrize("name", ["eval.py", "demo.py", "train.py"])
def test_no_checkpoint(name, tmp_path, tiny_flags):
    flags = ["--resume"] if name == "train.py" else []
    fails(script(name, *flags, "--model_dir", tmp_path), tmp_path / "", "does not exist", "train.py")


@pytest.mark.parametrize("change, message", [
    (lambda c: c["word_map"].popitem(), "not a word map"),
    (lambda c: c["word_map"].update(extra=len(c["word_map"])), "contradicts itself"),
    (lambda c: c["decoder"].update({"embedding.weight": torch.zeros(())}), "contradicts itself"),
    (lambda c: c.pop("decoder"), "not a checkpoint of this repo"),
    (lambda c: c.pop("optimizers"), "not a checkpoint of this repo"),
    (lambda c: c.update(run="../elsewhere"), "no proper 'run'"),
    (lambda c: c.update(run=""), "no proper 'run'"),
    (lambda c: c.update(run=".."), "no proper 'run'"),
    (lambda c: c.update(epoch=-1), "no proper 'epoch'"),
    (lambda c: c.update(step=2**70), "no proper 'step'"),
    (lambda c: c.update(epoch=True), "no proper 'epoch'"),
    (lambda c: c.update(seconds=1e308), "no proper 'seconds'"),
    (lambda c: c.update(best_score=float("nan")), "no proper 'best_score'"),
    (lambda c: c.update(best_score=[0.5, 0.1]), "no proper 'best_score'"),
    (lambda c: c.update(best_score=[0.5, float("nan"), -3.0]), "no proper 'best_score'"),
    (lambda c: c.update(totals=[float("nan")] * 6), "no proper 'totals'"),
    (lambda c: c["decoder"].update({"fc.bias": "text"}), "no proper 'decoder'"),
    (lambda c: c["decoder"]["fc.bias"].fill_(float("nan")), "no proper 'decoder'"),
    (lambda c: c["decoder"].update({"fc.weight": torch.zeros(1).expand(2**40, 2**20)}), "no proper 'decoder'"),
    (lambda c: c["decoder"].update({"fc.weight": torch.empty(2**40, 4, device="meta")}), "no proper 'decoder'"),
    (lambda c: c["decoder"].update({"fc.weight": torch.nested.nested_tensor([torch.ones(2)])}), "'decoder'"),
    (lambda c: c["encoder"].update({"resnet.0.weight": c["encoder"]["resnet.0.weight"].to_sparse()}), "'encoder'"),
    (lambda c: c["config"].update(decoder_dim=10**6), "another architecture"),
    (lambda c: c["config"].update(emb_dim=2**60), "settings that no model can have"),
    (lambda c: c["config"].update(log_dir="a\0b"), "log_dir"),
    (lambda c: c["config"].update(data_dir="\ud800"), "data_dir"),
    (lambda c: c["word_map"].update({"\ud800": c["word_map"].popitem()[1]}), "word map"),
    (lambda c: c.update(version=99), "version 99"),
    (lambda c: c["config"].update(encoder="resnet34"), "another architecture"),
    (lambda c: c["config"].update(decoder_dim=8), "another architecture"),
    (lambda c: c["config"].update(colour="red"), "colour"),
    (lambda c: c["config"].update(dropout="much"), "dropout"),
])
def test_a_checkpoint_that_does_not_fit_is_refused(trained, tmp_path, change, message):
    checkpoint = torch.load(trained / "models" / "BEST_checkpoint.pth.tar", weights_only=True)
    change(checkpoint)
    path = tmp_path / "bad.pth.tar"
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=message):
        open_checkpoint(parse_args("", {"checkpoint": {}, "word_map": {}}, ["--checkpoint", str(path)]))


@pytest.mark.parametrize("change", [
    lambda state: state.update(param_groups="text"), lambda state: state.pop("state"),
    lambda state: state["param_groups"][0].update(lr=float("nan")),
    lambda state: state["param_groups"][0].update(lr="fast"), lambda state: state["state"].update({99: {}}),
    lambda state: state["state"][0].pop("exp_avg"), lambda state: state["state"][0].update(exp_avg=torch.zeros(3)),
    lambda state: state["state"][0].update(exp_avg_sq=torch._neg_view(state["state"][0]["exp_avg_sq"])),
    lambda state: state["state"][0].update(step="one"), lambda state: state["state"].update({-1: state["state"][0]}),
])
def test_an_optimizer_that_does_not_fit_is_refused(change):
    weights = torch.nn.Linear(2, 5)
    optimizer = torch.optim.Adam(weights.parameters(), lr=0.1, fused=True)
    weights(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    load_optimizer(torch.optim.Adam(weights.parameters(), fused=True), state, "its file")
    change(state)
    with pytest.raises(UserError, match="its file"):
        load_optimizer(torch.optim.Adam(weights.parameters(), fused=True), state, "its file")


@pytest.mark.parametrize("content", ["empty", "garbage", "truncated", "pickle", "list"])
def test_a_damaged_or_hostile_checkpoint_is_refused(trained, tmp_path, content):
    path = tmp_path / "bad.pth.tar"
    whole = (trained / "models" / "BEST_checkpoint.pth.tar").read_bytes()
    path.write_bytes({"garbage": b"garbage", "truncated": whole[:100_000]}.get(content, b""))
    if content in ("pickle", "list"):
        torch.save({"hook": print} if content == "pickle" else [1, 2], path)
    with pytest.raises(UserError, match="bad.pth.tar"):
        load_checkpoint(path)


def weights(number):
    """What a checkpoint must have, with 40,000 weights of its own. Returns: dict."""
    words = {"<pad>": 0, "<unk>": 1, "<start>": 2, "<end>": 3}
    tensor = torch.full((100, 400), float(number))
    return {**NOT_BEGUN, "version": CHECKPOINT_VERSION, "config": {}, "word_map": words, "encoder": {"weight": tensor},
            "decoder": {"embedding.weight": torch.zeros(4, 2)}, "epoch": number}


def damage(path, at):
    content = bytearray(path.read_bytes())
    content[at if at >= 0 else len(content) + at] ^= 4
    path.write_bytes(content)


def test_the_checkpoint_before_is_kept(tmp_path):
    path = tmp_path / "checkpoint.pth.tar"
    for number in (1, 2, 3):
        save_checkpoint(weights(number), path)
        save_checkpoint(weights(number), tmp_path / "BEST_checkpoint.pth.tar")
    assert load_checkpoint(path)["epoch"] == 3
    assert load_checkpoint(tmp_path / "checkpoint.previous.pth.tar")["epoch"] == 2
    assert len(files_under(tmp_path)) == 3


@pytest.mark.parametrize("links", [True, False])
def test_a_checkpoint_cut_off_while_it_is_written(links, tmp_path, monkeypatch):
    """Wherever the writing stops, what --resume reads is whole, or the error names what is."""
    if not links:
        monkeypatch.setattr("os.link", lambda *names: raise_(OSError("no links here")))
    path = tmp_path / "checkpoint.pth.tar"
    save_checkpoint(weights(1), path)
    save_checkpoint(weights(2), path)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="untouched"):
        patch.setattr("os.fsync", lambda number: raise_(OSError(5, "Input/output error")))
        save_checkpoint(weights(3), path)
    if not path.exists():
        follow_the_error(path)
    assert load_checkpoint(path)["epoch"] == 2 and not list(tmp_path.glob("*.tmp"))


def raise_(error):
    raise error


def follow_the_error(path):
    """Do what the error about a damaged checkpoint says."""
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value) and "--resume" in str(error.value)
    command = str(error.value).split("whole: ")[1].split(", and")[0]
    subprocess.run(command, shell=True, check=True)


@pytest.mark.parametrize("position", range(0, 100, 7))
def test_a_flipped_bit_is_not_taken_for_a_weight(position, tmp_path):
    """A bit of padding may be flipped; any other is found."""
    path = tmp_path / "BEST_checkpoint.pth.tar"
    save_checkpoint(weights(1), path)
    damage(path, path.stat().st_size * position // 100)
    try:
        assert same_tensors(load_checkpoint(path), weights(1))
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert not 10 < position < 95  # where the weights lie


@pytest.mark.parametrize("spoil", [lambda path: damage(path, 80_000), lambda path: path.write_bytes(b""),
                                   lambda path: path.write_bytes(path.read_bytes()[:-100]), lambda path: path.unlink(),
                                   lambda path: torch.save({**weights(2), "encoder": {"w": torch.tensor(torch.nan)}},
                                                           path),
                                   lambda path: torch.save({**weights(2), "config": {"colour": "red"}}, path)],
                         ids=["flipped", "empty", "cut", "missing", "not finite", "of other settings"])
def test_a_damaged_checkpoint_names_the_way_back(spoil, tmp_path):
    folder = tmp_path / "my models"
    path = folder / "checkpoint.pth.tar"
    for number in (1, 2):
        save_checkpoint(weights(number), path)
    spoil(path)
    follow_the_error(path)
    assert load_checkpoint(path)["epoch"] == 1
    save_checkpoint(weights(2), path)
    for name in files_under(folder):
        spoil(folder / name)
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert "previous" not in str(error.value)


def test_a_checkpoint_on_a_full_disk(small_disk):
    path = small_disk / "models" / "checkpoint.pth.tar"
    for number in range(1, 5):  # of 160 KB
        save_checkpoint(weights(number), path)
    before = files_under(small_disk)
    large = dict(weights(9), encoder={"weight": torch.zeros(200_000)})
    with pytest.raises(UserError) as error:
        save_checkpoint(large, path)
    for part in (str(path), "No space left on device", "0.8 MiB", "untouched"):
        assert part in str(error.value)
    assert files_under(small_disk) == before
    assert load_checkpoint(path)["epoch"] == 4


def test_the_error_of_a_full_disk_can_be_collected(small_disk):
    """Python 3.12.1 crashes where a traceback that it collects holds a view of a BytesIO."""
    def refused():
        errors = []
        try:
            save_checkpoint(dict(weights(1), encoder={"weight": torch.zeros(500_000)}), small_disk / "file")
        except UserError as error:
            errors.append(error)  # a cycle: its traceback has this frame, which has the error
        return len(errors)

    assert refused() == 1
    gc.collect()


def test_a_bad_checkpoint_as_the_scripts_tell_it(trained, tmp_path):
    path = tmp_path / "bad.pth.tar"
    path.write_bytes(b"garbage")
    for name in ("demo.py", "eval.py"):
        fails(script(name, "--checkpoint", path), path)


def test_another_word_map_or_other_data(trained, tiny, tmp_path):
    checkpoint = trained / "models" / "BEST_checkpoint.pth.tar"
    fails(script("eval.py", "--checkpoint", checkpoint, "--split", "test_b"), "test_b.h5", "pre_process.py")
    shutil.copytree(tiny, tmp_path / "data")
    word_map = load_word_map(tiny)
    words = [*list(word_map)[:-4], *list(word_map)[-3:]]
    (tmp_path / "data" / "WORDMAP.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    fails(script("train.py", "--data_dir", tmp_path / "data", "--model_dir", tmp_path / "models", "--image_size", 64,
                 "--encoder_weights", "none"), "another word map", "pre_process.py")
    shutil.copytree(trained / "models", tmp_path / "models")
    fails(script("train.py", "--resume", "--data_dir", tmp_path / "data", "--model_dir", tmp_path / "models",
                 "--log_dir", tmp_path / "logs"), "another word map")


def test_no_picture_to_caption(trained, tmp_path):
    checkpoint = trained / "models" / "BEST_checkpoint.pth.tar"
    fails(script("demo.py", "--checkpoint", checkpoint, "--image", tmp_path / "none.jpg"), "none.jpg", "--image")


def test_a_loss_that_is_not_finite_names_step_and_pictures(tiny, tiny_flags, tmp_path):
    result = script("train.py", *tiny_flags, "--model_dir", tmp_path / "models", "--log_dir", tmp_path / "logs",
                    "--decoder_lr", 1e30, "--epochs", 3)
    fails(result, "epoch", "step", ".jpg", "lower rates")
    assert not list((tmp_path / "models").glob("*.tmp"))


def test_without_a_gpu_asking_for_one_is_a_clear_error(tiny_flags, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    fails(script("train.py", *tiny_flags, "--device", "cuda", "--model_dir", tmp_path), "--device cuda")


# ---------------------------------------------------------------------------------------------------------------------
# The real run


def test_the_ai_challenger_preset_at_its_full_size(tiny, tmp_path):
    """ResNet-101, 256 pixels, 14x14 and 512 dimensions, through all four scripts; only the weights are random."""
    for archive in tiny.glob("*.zip"):
        shutil.copy(archive, tmp_path)
    folders = ["--data_dir", tmp_path, "--model_dir", tmp_path / "models", "--log_dir", tmp_path / "logs"]
    script("pre_process.py", *folders, "--min_word_freq", 1, check=0)
    script("train.py", *folders, "--encoder_weights", "none", "--epochs", 1, "--batch_size", 4, check=0)
    flags = ["--model_dir", tmp_path / "models"]
    script("eval.py", *flags, "--split", "test_a", check=0)
    results = json.loads((tmp_path / "models" / "results_test_a_beam3.json").read_text(encoding="utf-8"))
    assert len(results["captions"]) == 4
    script("demo.py", *flags, "--image", "images/image_0.jpg", "--out", tmp_path / "out", check=0)
    assert is_figure(tmp_path / "out" / "out_0.jpg")
    config = load_checkpoint(tmp_path / "models" / "BEST_checkpoint.pth.tar")["config"]
    assert (config["encoder"], config["image_size"], config["encoded_image_size"]) == ("resnet101", 256, 14)
    assert config["emb_dim"] == config["attention_dim"] == config["decoder_dim"] == 512


# ---------------------------------------------------------------------------------------------------------------------
# Devices


@pytest.mark.parametrize("name, local_rank, index", [("cuda:1", None, 1), ("cuda", None, 0), ("cuda", "2", 2),
                                                     ("auto", "2", 2)])
def test_a_gpu_that_is_chosen_is_the_one_that_kernels_and_graphs_run_on(name, local_rank, index, monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    device = get_device(Config(device=name))
    assert device == torch.device("cuda", index) and current == [device]


def test_a_run_on_the_cpu_leaves_gpus_alone(tiny_flags, monkeypatch):
    config = get_config(flags=parse_args("", argv=tiny_flags).flags)
    dataset = CaptionDataset(config, "train", load_word_map(config.data_dir))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not make_loader(dataset, config, True).pin_memory
    assert make_loader(dataset, dataclasses.replace(config, device="auto"), True).pin_memory
