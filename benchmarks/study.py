"""What the model learns, next to what it must be compared with: reference.py trained alike, and captions of no model.

    python benchmarks/study.py reference --preset flickr8k_cn --fine_tune_encoder true   # takes all flags of train.py
    python benchmarks/study.py baselines --preset flickr8k_cn --results logs/baselines.json
    python benchmarks/study.py curves curves.png logs/*/*/log.jsonl

`reference` is train.py with the training step of reference.py, in float32: the same initial weights, batches, losses,
updates, learning rates and dropout (with other masks), validation, and checkpoints that eval.py and demo.py read. The
images/s of an epoch are those of its training steps. `baselines` scores captions that ignore the picture, as eval.py
does. `curves` plots validation scores (greedy) of several runs; each is named by the folder that holds its log.
"""
import collections
import json
import random
import statistics
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the scripts are

import checkpoint  # noqa: E402
import train  # noqa: E402
from benchmarks import reference  # noqa: E402
from config import get_config, new_parser, parse_args  # noqa: E402
from datasets import CaptionDataset, load_word_map, tokenize_references  # noqa: E402
from models import build_models  # noqa: E402
from scores import score  # noqa: E402
from utils import UserError, run_script, subcommand, write_text  # noqa: E402

DRAWS = 5  # of random captions
CANDIDATES, PICTURES = 50, 500  # the single best caption is sought among the most frequent, on so many pictures


def main():
    subcommand("study.py", reference=train_reference, baselines=baselines, curves=curves)


def train_reference(argv):
    sys.argv = [f"{sys.argv[0]} reference", "--precision", "float32", "--fast", "false", *argv]
    train.build_models = checkpoint.build_models = build_plain
    train.main()


def build_plain(config, vocab_size, encoder_weights=None):
    """As models.build_models, with the same modules and initial weights, but reference.py runs them in training."""
    if not config.fine_tune_encoder:
        raise UserError("the reference is trained with its encoder: give --fine_tune_encoder true")
    encoder, decoder = build_models(config, vocab_size, encoder_weights)
    plain_encoder = reference.Encoder(config.encoder, config.encoded_image_size)
    plain_encoder.resnet = encoder.resnet
    plain_decoder = reference.DecoderWithAttention(config.attention_dim, config.emb_dim, config.decoder_dim,
                                                   vocab_size, encoder.dim, config.dropout)
    for plain, ours in ((plain_decoder, decoder), (plain_decoder.attention, decoder.attention)):
        for name, child in ours.named_children():
            if name != "attention":
                setattr(plain, name, child)
    written_encoder, written_decoder = encoder.forward, decoder.forward

    def encode(images):
        if not encoder.training:
            return written_encoder(images)
        return plain_encoder(images.repeat_interleave(config.captions_per_image, 0))

    def decode(grid, captions, caption_lengths):
        if not decoder.training:
            return written_decoder(grid, captions, caption_lengths)
        examples, lengths = captions.flatten(0, 1), caption_lengths.flatten()
        scores, alphas = plain_decoder(grid, examples, lengths.to(grid.device))
        real = torch.arange(scores.shape[1]) < (lengths - 1).unsqueeze(1)
        return scores[real], examples[:, 1:scores.shape[1] + 1][real], alphas.unflatten(0, captions.shape[:2])

    encoder.forward, decoder.forward = encode, decode
    return encoder, decoder


def baselines(argv):
    """Score training captions on the validation pictures: random ones, and the same one for every picture."""
    args = parse_args(__doc__, {"results": dict(metavar="FILE", help="where the scores go")}, argv)
    config = get_config(args.preset, args.flags)
    word_map = load_word_map(config.data_dir)
    seen, human = (tokenize_references(CaptionDataset(config, split, word_map)) for split in ("train", "valid"))
    captions = [caption for picture in seen for caption in picture]
    rng = random.Random(config.seed)
    draws = [score([rng.choice(captions) for _ in human], human) for _ in range(DRAWS)]
    found = {f"a random training caption, mean of {DRAWS} draws": {
        name: statistics.mean(draw[name] for draw in draws) for name in draws[0]}}

    frequent = [list(words) for words, _ in collections.Counter(map(tuple, captions)).most_common(CANDIDATES)]
    sample = rng.sample(seen, min(PICTURES, len(seen)))
    best = max(frequent, key=lambda words: score([words] * len(sample), sample)["CIDEr"])
    for what, words in (("the most frequent training caption", frequent[0]),
                        (f"of the {CANDIDATES} most frequent the best by CIDEr of {PICTURES} training pictures", best)):
        found[f"{what}: {''.join(words)}"] = score([words] * len(human), human)
    for what, scores in found.items():
        print(f"{what}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    if args.results:
        write_text(args.results, json.dumps(found, ensure_ascii=False, indent=1))


def curves(argv):
    """The curve of logs/NAME/RUN/log.jsonl is labelled NAME."""
    parser = new_parser(__doc__)
    parser.add_argument("plot", metavar="FILE", help="the plot to write")
    parser.add_argument("logs", metavar="LOG", nargs="+", type=Path, help="log.jsonl of a run")
    args = parser.parse_args(argv)
    if missing := [path for path in args.logs if not path.exists()]:
        raise UserError(f"{missing[0]} does not exist: train.py writes it")
    logs = {path: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in args.logs}
    shown = [("valid", "CIDEr"), ("valid", "BLEU-4"), ("valid", "cross_entropy")]
    if any("reward" in line["train"] for lines in logs.values() for line in lines):  # of self-critical training
        shown.append(("train", "reward"))
    figure = Figure(figsize=(1 + 4 * len(shown), 4.2), layout="constrained")
    axes = figure.subplots(1, len(shown))
    for number, (path, lines) in enumerate(logs.items()):
        for axis, (part, name) in zip(axes, shown):
            points = [(line["epoch"], line[part][name]) for line in lines if name in line[part]]
            axis.plot(*zip(*points) if points else ((), ()), "o--" if number >= 10 else "o-", markersize=3,
                      label=path.parents[1].name)
            axis.set(xlabel="epoch", title=f"{dict(valid='validation', train='training')[part]}: {name}")
            axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(args.plot, dpi=100)
    print(f"Wrote {args.plot}")


if __name__ == "__main__":
    run_script(main)
