"""The benchmarks' own code: that validation is timed as train.py does it, on pictures of its own."""
import torch

from benchmarks import run
from config import Config


def test_validation_is_timed_from_batches_to_scores(tmp_path, monkeypatch):
    scored, dataset = [], run.RandomDataset(tmp_path / "images", 3)
    monkeypatch.setattr(run, "score", lambda *args: scored.append((*args, run.time.sleep(0.05))))
    encoder = run.hold_features(dataset, torch.device("cpu"))
    seconds, scores = run.time_validation(encoder, dataset, Config(batch_size=2, workers=0), torch.device("cpu"))
    assert seconds > scores >= 0.05
    (captions, references, _), = scored
    assert len(captions) == len(references) == 3 and all(5 < len(words) < 25 for words in captions)
    assert [len(human) for human in references] == [run.K] * 3
    assert all(run.TOKENS[0] - 1 <= len(words) <= run.TOKENS[1] - 1 for human in references for words in human)


def test_validation_has_pictures_of_its_own(tmp_path):
    torch.arange(3, dtype=torch.uint8).repeat_interleave(256 * 256 * 3).numpy().tofile(tmp_path / "images")
    train, valid = run.RandomDataset(tmp_path / "images", 2), run.RandomDataset(tmp_path / "images", 1, first=2)
    assert [int(images.max()) for images, *_ in (train[[0, 1]], valid[[0]])] == [1, 2]
