"""The benchmarks' own code: what agrees, and that validation is timed as train.py runs it."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import run
from utils import UserError

CPU = torch.device("cpu")
CONFIG = replace(run.CONFIG, encoder="resnet50", batch_size=2, workers=0)  # as wide as resnet101


@pytest.mark.parametrize("part, wrong", [("loss", 1.001), ("gradient", 1.1)])
def test_other_numbers_than_the_references_are_refused(part, wrong):
    right = dict(loss=np.float32(2), gradient=np.ones(3, np.float32))
    run.check("train_decoder", right, dict(right))
    message = "train_decoder: the product does not give what the reference gives"
    with pytest.raises(UserError, match=message):
        run.check("train_decoder", right, {**right, part: right[part] * np.float32(wrong)})


def test_other_captions_than_the_references_are_refused():
    run.check("eval_beam5", dict(captions=[[1, 2]]), dict(captions=[[1, 2]]))
    with pytest.raises(UserError, match="eval_beam5"):
        run.check("eval_beam5", dict(captions=[[1, 2]]), dict(captions=[[1, 3]]))


@pytest.mark.paper
@pytest.mark.parametrize("name, encoder", [
    ("train_decoder", "resnet50"),
    ("train_decoder_as_written", "resnet50"),
    ("train_kept_features", "resnet18"),
    ("train_frozen_fp32", "resnet18"),
])
def test_both_sides_of_training_agree(name, encoder, monkeypatch):
    monkeypatch.setattr(run, "CONFIG", replace(CONFIG, encoder=encoder))
    monkeypatch.setitem(run.SIZES, "cpu", run.Sizes(1, (2, 3), 50))
    outcomes = []
    for side in run.SIDES:
        case = run.CASES["train"][name](side, CPU)
        case.iteration()
        outcomes.append(case.outcome())
    run.check(name, *outcomes)


@pytest.mark.paper  # the weights that make it write twelve words are the paper's
def test_validation_is_timed_from_batches_to_scores(tmp_path, monkeypatch):
    scored = []
    monkeypatch.setattr(run, "score", lambda *args: scored.append((*args, run.time.sleep(0.05))))
    dataset = run.RandomDataset(tmp_path / "images", 3)
    seconds, scores = run.time_validation("kept", dataset, CONFIG, CPU)
    assert seconds > scores >= 0.05
    (captions, references, _), = scored
    assert len(captions) == len(references) == 3
    assert all(5 < len(words) < 25 for words in captions)
    fewest, most = run.SIZES["cpu"].tokens
    for human in references:
        assert len(human) == run.K
        assert all(fewest - 1 <= len(words) <= most - 1 for words in human)


def test_validation_has_pictures_of_its_own(tmp_path):
    path = tmp_path / "images"
    torch.arange(3, dtype=torch.uint8).repeat_interleave(256 * 256 * 3).numpy().tofile(path)
    training = run.RandomDataset(path, 2)
    validation = run.RandomDataset(path, 1, first=2)
    largest = [int(images.max()) for images, *_ in (training[[0, 1]], validation[[0]])]
    assert largest == [1, 2]
