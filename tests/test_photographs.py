"""The study on photographs: every edit applies, a finished run is not done again, and words fall as models.py says."""
import json

import pytest
import torch
from common import call

from benchmarks import photographs
from datasets import START
from decoding import generate, log_policy, never_generated
from models import DecoderWithAttention

WORD_MAP = {word: i for i, word in enumerate(["<pad>", *"甲乙丙丁戊己", "<unk>", "<start>", "<end>"])}


@pytest.mark.paper
@pytest.mark.parametrize("row", photographs.ROWS)
def test_the_changes_of_a_row_apply(row, tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "MODELS", tmp_path)
    tree = photographs.copy_of_code(row, 0)
    compile((tree / "train.py").read_text("utf-8"), "train.py", "exec")
    for change in photographs.ROWS[row].changes:
        added = [line[1:] for line in (photographs.ROOT / "benchmarks" / "changes" / f"{change}.diff").read_text(
            "utf-8").splitlines() if line.startswith("+") and not line.startswith("+++")]
        text = "".join((tree / name).read_text("utf-8") for name in ("backbones.py", "models.py", "train.py"))
        assert all(line in text for line in added)


def test_every_change_belongs_to_a_row():
    files = {path.stem for path in (photographs.ROOT / "benchmarks" / "changes").iterdir()}
    assert files == {change for row in photographs.ROWS.values() for change in row.changes}


@pytest.mark.parametrize("cells, pixels", [(4, 4), (3, 6)])
def test_a_word_falls_as_models_says(cells, pixels):
    torch.manual_seed(0)
    decoder = DecoderWithAttention(8, 8, 8, len(WORD_MAP), 6, 0, pixels).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(3)
    grid = torch.rand(1, cells, cells, 6)
    caption, = generate(decoder, grid, WORD_MAP, 5, 1)
    found = photographs.falls(decoder, grid[0], caption, WORD_MAP, torch.Generator().manual_seed(0))
    assert len(found) == len(caption["words"]) > 1

    ids = torch.tensor([[[WORD_MAP[word] for word in (START, *caption["words"])]]])
    never = never_generated(WORD_MAP, "cpu")

    def log_p(grid):
        with torch.no_grad():
            scores, targets, _ = decoder(grid, ids, torch.tensor([[ids.shape[2]]]))
        return log_policy(scores, never).gather(1, targets[:, None]).squeeze(1)

    for t, fall in enumerate(found):
        seen = torch.from_numpy(caption["alphas"][t])
        if cells != pixels:  # two pixels to a cell and side
            seen = seen.unflatten(0, (cells, 2)).unflatten(2, (cells, 2)).sum(dim=(1, 3))
        taken = seen.flatten().topk(round(0.1 * cells ** 2)).indices
        without = grid.flatten(1, 2).clone()
        without[0, taken] = grid.flatten(1, 2)[0].mean(dim=0)
        expected = log_p(grid)[t] - log_p(without.view_as(grid))[t]
        assert fall["whole"] == pytest.approx(expected.item(), abs=1e-5)
        if t == 0:  # nothing was seen before but the mean, which stays nearly the same
            assert fall["step"] == pytest.approx(fall["whole"], abs=0.1)
    assert any(abs(fall["step"] - fall["whole"]) > 1e-4 for fall in found)


def test_the_table_has_what_was_scored(tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "MODELS", tmp_path / "models")
    monkeypatch.setattr(photographs, "LOGS", tmp_path / "logs")
    for seed, score in enumerate((0.8, 0.9)):
        folder, log = photographs.run_folder("baseline", seed), tmp_path / "logs" / f"baseline-{seed}" / "run"
        folder.mkdir(parents=True)
        log.mkdir(parents=True)
        for beam in photographs.ROWS["baseline"].beams:
            (folder / f"results_test_a_beam{beam}.json").write_text(json.dumps(dict(
                scores={"CIDEr": score, "BLEU-4": 0.25}, diagnosis=dict(distinct_captions=300, bad_endings=0.01))))
        (log / "log.jsonl").write_text("".join(
            json.dumps(dict(epoch=epoch, best=epoch < 3, valid=dict(CIDEr=0.7 + epoch / 100))) + "\n"
            for epoch in (1, 2, 3)))
    row = photographs.tabulate().splitlines()[2]
    assert row == ("| baseline | 2 | 2 ± 0 | 0.720 ± 0.000 | 0.850 ± 0.071 | 0.850 ± 0.071 | 0.850 ± 0.071 | "
                   "0.250 ± 0.000 | 300 ± 0 | 0.010 ± 0.000 | - | - |")


def test_a_study_resumes(tmp_path, monkeypatch):
    """What a row's commands are, and that a failed one is reported and tried again, a finished one is not."""
    monkeypatch.setattr(photographs, "MODELS", tmp_path)
    monkeypatch.setattr(photographs, "copy_of_code", lambda name, seed: tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test_a.h5").touch()
    script = ("import sys, pathlib\n"
              "flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
              "open('calls', 'a').write(' '.join(sys.argv) + '\\n')\n")
    (tmp_path / "train.py").write_text(script + "pathlib.Path(flags['--model_dir'], 'checkpoint.pth.tar').touch()\n"
                                       "sys.exit(pathlib.Path('calls').read_text().count('train.py') == 1)\n")
    (tmp_path / "eval.py").write_text(script + "pathlib.Path(flags['--results']).touch()\n")
    result = call(lambda: photographs.train_and_score("baseline", 1, tmp_path / "data"), check=2)
    assert result.code == 2 and "exit code 1" in result.err and "resumes" in result.err
    for _ in range(2):
        photographs.train_and_score("baseline", 1, tmp_path / "data")
    calls = (tmp_path / "calls").read_text().splitlines()
    beams = len(photographs.ROWS["baseline"].beams)
    assert [line.split()[0] for line in calls] == ["train.py"] * 2 + ["eval.py"] * beams
    assert ["--resume" in line for line in calls[:2]] == [False, True] and "--seed 1" in calls[0]
