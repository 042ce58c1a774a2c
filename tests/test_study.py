"""The study's own code: that the reference is trained as the product is, and that no model is scored like one."""
import json

import pytest
import torch
from PIL import Image

from benchmarks import study
from config import get_config, parse_args
from datasets import CaptionDataset, load_word_map, make_loader
from models import build_models, caption_loss
from train import make_optimizers, parameters


@pytest.fixture
def config(tiny_flags):
    flags = parse_args("", argv=[*map(str, tiny_flags), "--fine_tune_encoder", "true", "--dropout", "0"]).flags
    return get_config(flags=flags)


def test_the_reference_takes_the_steps_of_the_product(config):
    word_map = load_word_map(config.data_dir)
    loader = make_loader(CaptionDataset(config, "train", word_map), config, True)
    losses, gradients, grids = [], [], []
    for build in (build_models, study.build_plain):
        torch.manual_seed(0)
        encoder, decoder = (half.train() for half in build(config, len(word_map)))
        optimizers, losses_here = make_optimizers(config, encoder, decoder), []
        for images, captions, lengths, _ in loader:
            scores, targets, alphas = decoder(encoder(images), captions, lengths)
            cross_entropy, coverage = caption_loss(scores, targets, alphas, lengths)
            loss = cross_entropy / len(targets) + coverage / (lengths > 0).sum()
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            loss.backward()
            if not losses_here:
                gradients.append(torch.cat([p.grad.flatten() for p in parameters(optimizers)]))
            losses_here.append(loss.item())
            for optimizer in optimizers.values():
                optimizer.step()
        losses.append(losses_here)
        grids.append(encoder.eval()(images))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len(losses[0]) == 3
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    # Batch norms over so few numbers magnify rounding.
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[0].norm()
    assert grids[0].shape == grids[1].shape  # not trained, it is the product's: a picture is encoded once


def test_captions_that_do_not_look_are_scored(tiny_flags, tmp_path):
    study.baselines([*map(str, tiny_flags), "--results", str(tmp_path / "scores.json")])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert len(scores) == 3 and all(0 <= value < 1 for found in scores.values() for value in found.values())


def test_curves_are_drawn_of_logs(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "run").mkdir(parents=True)
        (tmp_path / name / "run" / "log.jsonl").write_text("".join(json.dumps(dict(epoch=epoch, valid={
            "CIDEr": 0.1 * epoch, "BLEU-4": 0.01 * epoch, "cross_entropy": 3 / epoch})) + "\n" for epoch in (1, 2, 3)))
    study.curves([str(tmp_path / "curves.png"), *map(str, sorted(tmp_path.glob("*/run/log.jsonl")))])
    assert Image.open(tmp_path / "curves.png").width > 500
