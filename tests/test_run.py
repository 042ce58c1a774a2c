"""The benchmarks' own code: what is compared, what agrees, and that validation is timed as train.py runs it."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import memory, run
from utils import UserError

CPU = torch.device("cpu")
CONFIG = replace(run.CONFIG, encoder="resnet50", batch_size=2, workers=0)  # as wide as resnet101


@pytest.mark.parametrize("part, wrong", [(0, 1.001), (1, 1.1)])
def test_other_numbers_than_the_references_are_refused(part, wrong):
    right = dict(loss=2.0, gradient=np.ones(3, np.float32))
    run.check("train_decoder", right, dict(right))
    name = list(right)[part]
    with pytest.raises(UserError, match="train_decoder: the product does not give what the reference gives"):
        run.check("train_decoder", right, {**right, name: right[name] * np.float32(wrong)})


def test_other_captions_than_the_references_are_refused():
    run.check("eval_beam5", dict(captions=[[1, 2]]), dict(captions=[[1, 2]]))
    with pytest.raises(UserError, match="eval_beam5"):
        run.check("eval_beam5", dict(captions=[[1, 2]]), dict(captions=[[1, 3]]))


@pytest.mark.paper
@pytest.mark.parametrize("encoder, start, other", [("resnet50", "features", dict(as_written=True)),
                                                   ("resnet18", "pixels", dict(start="kept"))])
def test_both_sides_of_training_agree(encoder, start, other, monkeypatch):
    monkeypatch.setattr(run, "CONFIG", replace(CONFIG, encoder=encoder))
    found = []
    for side, options in (("reference", {}), ("product", {}), ("product", other)):
        step, outcome, _ = run.train_case(side, CPU, pictures=1, tokens=(2, 3), vocab_size=50,
                                          **{"start": start, **options})
        step()
        found.append(outcome())
    run.check("train_decoder", *found[:2])
    run.check("train_kept_features" if start == "pixels" else "train_decoder_as_written", found[0], found[2])


@pytest.mark.paper  # the weights that make it write twelve words are the paper's
def test_validation_is_timed_from_batches_to_scores(tmp_path, monkeypatch):
    scored, dataset = [], run.RandomDataset(tmp_path / "images", 3)
    monkeypatch.setattr(run, "score", lambda *args: scored.append((*args, run.time.sleep(0.05))))
    encoder = run.keep_random_features(dataset, CPU)
    _, decoder = run.make_models("product", CONFIG, run.V, CPU, talkative=True)
    seconds, scores = run.time_validation(encoder, decoder, dataset, CONFIG)
    assert seconds > scores >= 0.05
    (captions, references, _), = scored
    assert len(captions) == len(references) == 3 and all(5 < len(words) < 25 for words in captions)
    assert [len(human) for human in references] == [run.K] * 3
    assert all(run.TOKENS[0] - 1 <= len(words) <= run.TOKENS[1] - 1 for human in references for words in human)


def test_validation_has_pictures_of_its_own(tmp_path):
    torch.arange(3, dtype=torch.uint8).repeat_interleave(256 * 256 * 3).numpy().tofile(tmp_path / "images")
    train, valid = run.RandomDataset(tmp_path / "images", 2), run.RandomDataset(tmp_path / "images", 1, first=2)
    assert [int(images.max()) for images, *_ in (train[[0, 1]], valid[[0]])] == [1, 2]


def test_memory_counts_what_is_alive_at_once():
    with memory.Live() as live:
        x = torch.ones(1000, requires_grad=True)
        y = (x.exp() * 2).sum()  # exp keeps its result for the backward pass
        assert (live.now, live.peak) == (4 * 2001, 4 * 3001)
        y.backward()
        del y
        assert live.now == 4 * 2000  # x and its gradient
