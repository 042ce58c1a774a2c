"""Caption the pictures of a split by beam search and score the captions.

    python eval.py                                 # models/BEST_checkpoint.pth.tar on valid, beam 3
    torchrun --nproc_per_node=4 eval.py            # on four GPUs
    python eval.py --split test_a --beam_size 5 --results models/results.json
    python eval.py --official true                 # also AI Challenger's evaluator; needs Java
    python eval.py --preset sample --split test_a  # its boxes allow more measures

Generated captions are scored against the data set's, over jieba words and over characters.
"""
import json
import os
from argparse import Namespace
from pathlib import Path

from utils import (UserError, end_distributed, gather_lists, init_distributed, is_first_process,
                   meet_processes, run_script, write_text)

import numpy as np
import torch
from tqdm import tqdm

import fast
from checkpoint import BEST_CHECKPOINT, open_checkpoint
from config import Config, boolean, parse_args, positive
from data.sample import is_sample_set, measure_captions
from datasets import CaptionDataset, make_loader, normalise, short_names, tokenize_references
from decoding import generate
from fast.features import keep_features
from models import pixel_positions
from scores import (attention_course, diagnose, diagnose_words, official_scores, print_numbers,
                    ptb_tokenize, scores_of_both_units)

FLAGS = {
    "checkpoint": dict(metavar="FILE",
                       help="the model (models/BEST_checkpoint.pth.tar, or the preset's)"),
    "split": dict(default="valid", choices=("train", "valid", "test_a", "test_b"),
                  help="what to caption (valid)"),
    "beam_size": dict(type=positive, default=3, metavar="K", help="1 is greedy (3)"),
    "results": dict(metavar="FILE", help="where the captions go (results_SPLIT_beamK*.json "
                                         "beside the checkpoint)"),
    "write_submission": dict(metavar="FILE",
                             help="also write the captions in AI Challenger's format"),
    "official": dict(type=boolean, default=False, metavar="BOOL",
                     help="also compute the scores of AI Challenger's evaluator; needs Java "
                          "(false)"),
}


def main() -> None:
    args = parse_args(__doc__, FLAGS)
    if args.official:
        ptb_tokenize(["一个人"])  # without Java this fails before the captioning, not after
    checkpoint, config, device, encoder, decoder = open_checkpoint(args)
    word_map = checkpoint["word_map"]
    path = Path(args.results or results_path(args.checkpoint, args.split, args.beam_size,
                                             config.length_penalty))
    check_writable(path.parent, Path(args.write_submission or path).parent)
    dataset = CaptionDataset(config, args.split)  # it may have another word map than the model
    init_distributed(device, meet_processes())

    models = fast.choose(encoder, decoder, config)
    if is_first_process():
        print(models.summary())
    if config.cache_features:
        models = models._replace(encoder=keep_features(dataset, encoder, models.encoder, config))
    positions = pixel_positions(encoder, config.image_size, config.encoded_image_size)
    captions = caption_split(models, dataset, config, word_map, args.beam_size, positions, device)
    is_first = is_first_process()
    end_distributed()
    if not is_first:
        return

    results, submission = evaluate(captions, dataset, word_map, positions, config, args)
    write_text(path, json.dumps(results, ensure_ascii=False, indent=1))
    print(f"Wrote {path}")
    if args.write_submission:
        write_text(args.write_submission, json.dumps(submission, ensure_ascii=False))
        print(f"Wrote {args.write_submission}")


def results_path(checkpoint: Path, split: str, beam_size: int, length_penalty: float) -> Path:
    """Where results go by default: beside the checkpoint."""
    penalty = f"_penalty{float(length_penalty)}" if length_penalty else ""
    model = ""
    if checkpoint.name != BEST_CHECKPOINT:
        model = f"_{checkpoint.name.removesuffix('.pth.tar')}"
    return checkpoint.with_name(f"results_{split}_beam{beam_size}{penalty}{model}.json")


def check_writable(*folders: Path) -> None:
    for folder in folders:  # before hours of captioning, not after
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise UserError(f"{folder} cannot be written to: "
                            f"name another --results or --write_submission")


def caption_split(models: fast.Models, dataset: CaptionDataset, config: Config,
                  word_map: dict[str, int], beam_size: int, positions: np.ndarray,
                  device: torch.device) -> list[dict]:
    """Caption every picture of a split once; all processes get all captions, in order.

    They are as decoding.generate gives them, with `course` (see attention_course) in the place of
    alphas, of which 30,000 pictures have 350 MB; only the sample set's stay.
    """
    captions = []
    keeps_alphas = is_sample_set(config.data_dir)
    loader = make_loader(dataset, config, training=False)
    bar = tqdm(loader, f"caption {dataset.path.stem}", unit="batch", disable=not is_first_process())
    for images, _, _, rows in bar:
        grid = models.encoder(images.to(device))
        found = generate(models.decoder, grid, word_map, config.max_len, beam_size,
                         config.length_penalty)
        for row, caption in zip(rows.tolist(), found):
            course = attention_course(caption["alphas"], positions)
            if not keeps_alphas:
                del caption["alphas"]
            captions.append(dict(caption, row=row, course=course))
    return sorted(gather_lists(captions), key=lambda caption: caption["row"])


def evaluate(captions: list[dict], dataset: CaptionDataset, word_map: dict[str, int],
             positions: np.ndarray, config: Config, args: Namespace) -> tuple[dict, list[dict]]:
    """Print scores and diagnosis; returns the results to be written, and the submission."""
    # A model of the original may write the full stop, which the references lack; one of old data,
    # what nobody sees.
    hypotheses = [list(filter(normalise, caption["words"])) for caption in captions]
    references = tokenize_references(dataset)
    names = short_names(dataset.image_ids)
    submission = [dict(image_id=name, caption="".join(words))
                  for name, words in zip(names, hypotheses)]
    protocol = describe_protocol(references, config, args)
    print(", ".join(f"{name} {value}" for name, value in protocol.items()))

    scores = scores_of_both_units(hypotheses, references)
    if args.official and scores:
        scores |= scores_of_contest(submission, dataset)
    scores["unfinished_captions"] = sum(not caption["ended"] for caption in captions)
    if is_sample_set(config.data_dir):
        scores |= measure_captions(captions, dataset.image_ids, positions, config.data_dir)
    courses = [caption["course"] for caption in captions]
    diagnosis, warnings = diagnose(hypotheses, courses, word_map)
    diagnosis |= diagnose_words(hypotheses, references, training_captions(config))
    print_numbers(scores | diagnosis)
    for warning in warnings:
        print(f"warning: {warning}")

    entries = [dict(image_id=image_id, caption="".join(caption["words"]), words=caption["words"],
                    score=caption["score"], ended=caption["ended"], references=raw)
               for image_id, caption, raw in zip(dataset.image_ids, captions, dataset.raw_captions)]
    results = dict(protocol=protocol, scores=scores, diagnosis=diagnosis, warnings=warnings,
                   captions=entries)
    return results, submission


def describe_protocol(references: list[list[list[str]]], config: Config, args: Namespace) -> dict:
    """What scores must agree in to be compared."""
    protocol = dict(
        split=args.split,
        pictures=len(references),
        pictures_with_references=sum(map(bool, references)),
        references=sum(map(len, references)),
        beam_size=args.beam_size,
        length_penalty=config.length_penalty,
        captions="generated",
        tokens="jieba, exact mode, without 。, white space and invisible characters",
        char="one by one; runs of Latin letters or digits are one")
    if args.official:
        protocol["official"] = ("jieba, exact mode, without 。, then PTB, for captions and "
                                "references")
    return protocol


def scores_of_contest(submission: list[dict], dataset: CaptionDataset) -> dict[str, float]:
    """official_scores of the pictures with references; none where it rejects a caption."""
    sentences = {entry["image_id"]: captions
                 for entry, captions in zip(submission, dataset.raw_captions) if captions}
    submission = [entry for entry in submission if entry["image_id"] in sentences]
    try:
        return official_scores(submission, sentences)
    except UserError as error:
        print(f"official scores are left out: {error}")
        return {}


def training_captions(config: Config) -> set[str] | None:
    """What the model was trained on, normalised, without white space; None without train.h5."""
    if not (Path(config.data_dir) / "train.h5").exists():
        return None
    pictures = CaptionDataset(config, "train").raw_captions
    return {"".join(normalise(raw).split()) for captions in pictures for raw in captions}


if __name__ == "__main__":
    run_script(main)
