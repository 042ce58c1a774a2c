"""The study's own code: the reference is trained as the product is, and captions of no model are scored like its."""
import json

import pytest
import torch
from PIL import Image

import checkpoint
import train
from benchmarks import study
from config import get_config, parse_args
from datasets import CaptionDataset, load_word_map, make_loader
from models import build_models, caption_loss


@pytest.fixture
def flags(tiny_flags):
    return [*tiny_flags, "--fine_tune_encoder", "true", "--dropout", "0"]


@pytest.mark.paper
def test_the_reference_takes_the_steps_of_the_product(flags):
    config = get_config(flags=parse_args("", argv=flags).flags)
    word_map = load_word_map(config.data_dir)
    loader = make_loader(CaptionDataset(config, "train", word_map), config, True)
    losses, gradients, grids = [], [], []
    for build in (build_models, study.build_plain):
        torch.manual_seed(0)
        encoder, decoder = (half.train() for half in build(config, len(word_map)))
        optimizers = train.make_optimizers(config, encoder, decoder)
        for images, captions, lengths, _ in loader:
            terms = caption_loss(*decoder(encoder(images), captions, lengths), lengths, config)
            totals = train.counts_of(lengths)
            loss = sum(term.weight * term.sum / totals[term.per] for term in terms.values())
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            gradients.append(torch.cat([p.grad.flatten() for p in train.parameters(optimizers)]))
            for optimizer in optimizers.values():
                optimizer.step()
        grids.append(encoder.eval()(images))
    ours, plain = losses[:len(loader)], losses[len(loader):]
    assert ours == pytest.approx(plain, rel=1e-3) and len(ours) == 3
    assert ours[0] == pytest.approx(plain[0], rel=1e-6)
    # Batch norms over so few numbers magnify rounding.
    assert (gradients[0] - gradients[3]).norm() < 0.05 * gradients[0].norm()
    assert grids[0].shape == grids[1].shape  # not in training it is models.py's: one encoding per picture


@pytest.mark.paper
def test_the_reference_is_trained_and_resumed_as_it_is_written(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["study.py"])
    monkeypatch.setattr(train, "Pause", lambda minutes, save: lambda: None)  # leaves the signals of pytest alone
    monkeypatch.setattr(train, "PICTURES_SHOWN", 0)  # drawing takes most of such a run
    for module in (train, checkpoint):
        monkeypatch.setattr(module, "build_models", None)  # restored after the test
    for more in ([], ["--resume"]):
        study.train_reference([*flags, "--model_dir", str(tmp_path), "--log_dir", str(tmp_path / "logs"),
                               "--epochs", "1", *more])
        output = capsys.readouterr().out
        assert "decoder: as written" in output and "Finished (all 1 epochs done)" in output


def test_captions_that_do_not_look_are_scored(tiny_flags, tmp_path):
    study.baselines([*map(str, tiny_flags), "--results", str(tmp_path / "scores.json")])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert len(scores) == 3 and all(0 <= value < 1 for found in scores.values() for value in found.values())


def test_curves_are_drawn_of_logs(tmp_path):
    widths = []
    for means in ({}, dict(reward=0.5)):  # of the first phase, then of self-critical training too
        name = f"run {len(widths)}"
        (tmp_path / name / "run").mkdir(parents=True)
        (tmp_path / name / "run" / "log.jsonl").write_text("".join(json.dumps(dict(epoch=epoch, train=means, valid={
            "CIDEr": 0.1 * epoch, "BLEU-4": 0.01 * epoch, "cross_entropy": 3 / epoch})) + "\n" for epoch in (1, 2, 3)))
        study.curves([str(tmp_path / "curves.png"), *map(str, sorted(tmp_path.glob("*/run/log.jsonl")))])
        widths.append(Image.open(tmp_path / "curves.png").width)
    assert 500 < widths[0] < widths[1]
