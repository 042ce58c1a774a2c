"""The study on photographs: every edit applies, a finished run is not done again, and words fall as
models.py says."""
import json
import shutil
import subprocess

import pytest
import torch
from common import call

from benchmarks import photographs
from config import get_config, parse_args
from datasets import START
from decoding import generate, log_policy, never_generated
from models import DecoderWithAttention

WORDS = ["<pad>", *"甲乙丙丁戊己", "<unk>", "<start>", "<end>"]
WORD_MAP = {word: i for i, word in enumerate(WORDS)}


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The folder of the runs."""
    monkeypatch.setattr(photographs, "MODELS", tmp_path / "models")
    monkeypatch.setattr(photographs, "LOGS", tmp_path / "logs")
    return photographs.MODELS


@pytest.mark.paper
def test_every_change_applies_alone():
    for path in photographs.CHANGES.glob("*.diff"):
        subprocess.run(["git", "apply", "--check", path], cwd=photographs.ROOT, check=True)


@pytest.mark.paper
def test_the_changes_of_a_row_apply_together(models):
    tree = photographs.copy_of_code("self-critical", 0)
    text = "".join((tree / name).read_text("utf-8") for name in ("models.py", "train.py"))
    compile((tree / "train.py").read_text("utf-8"), "train.py", "exec")
    for change in photographs.ROWS["self-critical"].changes:
        diff = (photographs.CHANGES / f"{change}.diff").read_text("utf-8")
        for line in diff.splitlines():
            if line.startswith("+") and not line.startswith("+++"):
                assert line[1:] in text


def test_every_change_belongs_to_a_row():
    files = {path.stem for path in photographs.CHANGES.iterdir()}
    assert files == {change for row in photographs.ROWS.values() for change in row.changes}


def test_the_flags_of_every_run_are_settings(models):
    runs = [{**photographs.RECIPE, **row.flags} for row in photographs.ROWS.values()]
    runs += [dict(preset="own", **flags) for flags in photographs.starts().values()]
    for flags in runs:
        args = parse_args("", dict(init={}), photographs.as_arguments(flags))
        get_config(args.preset, args.flags)


@pytest.mark.parametrize("cells, pixels", [(4, 4), (3, 6)])
def test_a_word_falls_as_models_says(cells, pixels):
    torch.manual_seed(0)
    decoder = DecoderWithAttention(8, 8, 8, len(WORD_MAP), 6, 0, pixels).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(3)
    grid = torch.rand(1, cells, cells, 6)
    caption, = generate(decoder, grid, WORD_MAP, 5, 1)
    generator = torch.Generator().manual_seed(0)
    found = photographs.falls(decoder, grid[0], caption, WORD_MAP, generator)
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


def test_the_table_has_what_was_scored(models):
    for seed, score in enumerate((0.8, 0.9)):
        folder = photographs.run_folder("baseline", seed)
        log = photographs.LOGS / f"baseline-{seed}" / "run"
        folder.mkdir(parents=True)
        log.mkdir(parents=True)
        results = dict(scores={"CIDEr": score, "BLEU-4": 0.25},
                       diagnosis=dict(distinct_captions=300, bad_endings=0.01))
        for beam in photographs.ROWS["baseline"].beams:
            (folder / f"results_test_a_beam{beam}.json").write_text(json.dumps(results))
        entries = [dict(epoch=epoch, best=epoch < 3, valid=dict(CIDEr=0.7 + epoch / 100))
                   for epoch in (1, 2, 3)]
        (log / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    row = photographs.tabulate().splitlines()[2]
    assert row == ("| baseline | 2 | 2 ± 0 | 0.720 ± 0.000 | 0.850 ± 0.071 | 0.850 ± 0.071 | "
                   "0.850 ± 0.071 | 0.250 ± 0.000 | 300 ± 0 | 0.010 ± 0.000 | - | - |")


SCRIPT = """
import json, pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open('calls', 'a') as calls:
    calls.write(' '.join(sys.argv) + '\\n')
"""
TRAIN = SCRIPT + """
pathlib.Path(flags['--model_dir'], 'checkpoint.pth.tar').touch()
sys.exit(pathlib.Path('calls').read_text().count('train.py') == 1)
"""
EVAL = SCRIPT + """
scores = {'CIDEr': 0.5, 'BLEU-4': 0.25}
pathlib.Path(flags['--results']).write_text(json.dumps(dict(scores=scores)))
"""


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Scripts that write down how they are called; the first call of train.py fails."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test_a.h5").touch()
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "eval.py").write_text(EVAL)
    monkeypatch.setattr(photographs, "ROOT", tmp_path)
    monkeypatch.setattr(photographs, "copy_of_code", lambda name, seed: tmp_path)
    return tmp_path


def test_a_study_resumes(models, tree):
    """A failed run is reported and tried again, a finished one is not."""
    beams = photographs.ROWS["baseline"].beams
    result = call(lambda: photographs.train_and_score("baseline", 1, tree / "data"), check=2)
    assert "exit code 1" in result.err and "resumes" in result.err
    for _ in range(2):
        photographs.train_and_score("baseline", 1, tree / "data")
    calls = (tree / "calls").read_text().splitlines()
    scripts = [line.split()[0] for line in calls]
    assert scripts == ["train.py"] * 2 + ["eval.py"] * len(beams)
    assert ["--resume" in line for line in calls[:2]] == [False, True]
    assert "--seed 1" in calls[0]


def test_few_pictures_are_drawn_trained_and_tabulated(models, tree, monkeypatch):
    names = [f"{i}.jpg" for i in range(1000)]
    entries = dict(train=[], valid=[dict(image_id=name) for name in names])
    monkeypatch.setattr(photographs.flickr8k_cn, "read_source", lambda source: (entries, []))
    monkeypatch.setattr(photographs, "DATA", tree / "data")
    monkeypatch.setattr(photographs, "WEIGHTS", tree / "eval.py")  # is there
    written = {}

    def write_data(folder, source, splits, size, preset):
        assert preset == "own"
        ids = {split: [entry["image_id"] for entry in part] for split, part in splits.items()}
        written[folder.name] = ids
        folder.mkdir()
        (folder / "WORDMAP.json").touch()

    monkeypatch.setattr(photographs, "write_data", write_data)
    flags = "folder", "--draws", "2"
    assert "--rows small" in call(lambda: photographs.few(flags), check=2).err
    initial = photographs.starts()["--init row small"]["init"]
    initial.parent.mkdir(parents=True)
    shutil.copy(tree / "eval.py", initial)
    assert "exit code 1" in call(lambda: photographs.few(flags), check=2).err
    call(lambda: photographs.few(flags))
    call(lambda: photographs.few(flags))

    calls = (tree / "calls").read_text().splitlines()
    assert [line.split()[0] for line in calls] == ["train.py"] + ["train.py", "eval.py"] * 6
    assert set(written) == {"few-0-128", "few-0-260", "few-1-128", "few-1-260"}
    assert written["few-0-128"] == written["few-0-260"] != written["few-1-260"]
    for splits in written.values():
        assert {split: len(ids) for split, ids in splits.items()} == photographs.FEW
        assert len({name for ids in splits.values() for name in ids}) == 860
    table = (models / "few.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {name}" for name in
                                                            photographs.starts()]
    assert "| 0.500 ± 0.000 | 0.250 ± 0.000 | 0." in table[2]
