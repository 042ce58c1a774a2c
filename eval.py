"""Caption the pictures of a split by beam search and score the captions.

    python eval.py                                        # models/BEST_checkpoint.pth.tar on valid, beam 3
    torchrun --nproc_per_node=4 eval.py                   # on four GPUs
    python eval.py --split test_a --beam_size 5 --results models/results.json
    python eval.py --official true                        # also the scores of AI Challenger's evaluator; needs Java
    python eval.py --preset sample --split test_a         # the sample set has boxes, which allow two more measures

Generated captions are scored against the data set's captions, over jieba words and over characters.
"""
import json
import os
from pathlib import Path

from utils import UserError, gather_lists, init_distributed, is_first_process, meet_processes, run_script, write_text

import torch.distributed as dist
from tqdm import tqdm

import fast
from checkpoint import open_checkpoint
from config import boolean, parse_args, positive
from data.sample import attention_peak_hits, coloured_things, is_true, read_scenes
from datasets import CaptionDataset, make_loader, normalise, short_names, tokenize_references
from fast.features import keep_features
from decoding import generate
from models import pixel_positions
from scores import attention_course, diagnose, diagnose_words, official_scores, ptb_tokenize, scores_of_both_units


def main():
    args = parse_args(__doc__, {
        "checkpoint": dict(metavar="FILE", help="the model (models/BEST_checkpoint.pth.tar, or the preset's)"),
        "split": dict(default="valid", choices=("train", "valid", "test_a", "test_b"), help="what to caption (valid)"),
        "beam_size": dict(type=positive, default=3, metavar="K", help="1 is greedy (3)"),
        "results": dict(metavar="FILE", help="where the captions go (results_SPLIT_beamK*.json beside the checkpoint)"),
        "write_submission": dict(metavar="FILE", help="also write the captions in AI Challenger's format"),
        "official": dict(type=boolean, default=False, metavar="BOOL",
                         help="also compute the scores of AI Challenger's evaluator; needs Java (false)"),
    })
    if args.official:
        ptb_tokenize(["一个人"])  # without Java this fails before the captioning, not after
    checkpoint, config, device, encoder, decoder = open_checkpoint(args)
    path = Path(args.results or results_path(args.checkpoint, args.split, args.beam_size, config.length_penalty))
    for folder in {path.parent, Path(args.write_submission or path).parent}:  # before hours of captioning, not after
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise UserError(f"{folder} cannot be written to: name another --results or --write_submission")
    dataset = CaptionDataset(config, args.split)  # only pictures and raw captions: it may have another word map
    meeting = meet_processes()
    rank, world_size = meeting.rank, meeting.world_size
    init_distributed(device, meeting)
    loader = make_loader(dataset, config, training=False)
    runs = fast.choose(encoder, decoder, config)
    if rank == 0:
        print(runs.summary())
    if config.cache_features:
        runs = runs._replace(encoder=keep_features(dataset, encoder, runs.encoder, config, rank, world_size))
    positions = pixel_positions(encoder, config.image_size, config.encoded_image_size)
    captions = caption_split(runs, loader, config, checkpoint["word_map"], args.beam_size, positions, device)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank > 0:
        return

    # A model of the original may write the full stop, which the references lack; one of old data, what nobody sees.
    hypotheses = [list(filter(normalise, caption["words"])) for caption in captions]
    references = tokenize_references(dataset)
    submission = [dict(image_id=name, caption="".join(words))
                  for name, words in zip(short_names(dataset.image_ids), hypotheses)]
    protocol = dict(split=args.split, pictures=len(dataset), pictures_with_references=sum(map(bool, references)),
                    references=sum(map(len, references)), beam_size=args.beam_size,
                    length_penalty=config.length_penalty, captions="generated",
                    tokens="jieba, exact mode, without 。, white space and invisible characters",
                    char="one by one; runs of Latin letters or digits are one")
    if args.official:
        protocol["official"] = "jieba, exact mode, without 。, then PTB, for captions and references"
    print(", ".join(f"{name} {value}" for name, value in protocol.items()))
    scores = score_captions(captions, hypotheses, references, submission, dataset, args.official)
    diagnosis, warnings = diagnose(hypotheses, [caption["course"] for caption in captions], checkpoint["word_map"])
    diagnosis |= diagnose_words(hypotheses, references, training_captions(config))
    for name, value in {**scores, **diagnosis}.items():
        print(f"{name:>26} {value:.4f}" if isinstance(value, float) else f"{name:>26} {value}")
    for warning in warnings:
        print(f"warning: {warning}")

    entries = [dict(image_id=image_id, caption="".join(caption["words"]), words=caption["words"],
                    score=caption["score"], ended=caption["ended"], references=raw)
               for image_id, caption, raw in zip(dataset.image_ids, captions, dataset.raw_captions)]
    write_text(path, json.dumps(dict(protocol=protocol, scores=scores, diagnosis=diagnosis, warnings=warnings,
                                     captions=entries), ensure_ascii=False, indent=1))
    print(f"Wrote {path}")
    if args.write_submission:
        write_text(args.write_submission, json.dumps(submission, ensure_ascii=False))
        print(f"Wrote {args.write_submission}")


def caption_split(runs, loader, config, word_map, beam_size, positions, device):
    """Caption every picture of a split once.

    Args:
        runs (fast.Models). loader (DataLoader): in order. config (Config). word_map (dict). beam_size (int).
        positions: of pixel_positions. device (torch.device).
    Returns:
        list of dict: of all processes, by row; as decoding.generate gives them, with row and, in the place of alphas,
        course (see attention_course) and, on the sample set, measures: whether the caption is true; words that
        attention hit, words that name a thing, hits expected by chance; of words that tell its colour those that
        attention hit, and all.
    """
    dataset, captions = loader.dataset, []
    scenes_path = Path(config.data_dir) / "scenes.json"
    scenes = read_scenes(scenes_path) if scenes_path.exists() else {}
    for images, _, _, rows in tqdm(loader, desc=f"caption {dataset.path.stem}", unit="batch",
                                   disable=not is_first_process()):
        grid = runs.encoder(images.to(device))
        found = generate(runs.decoder, grid, word_map, config.max_len, beam_size, config.length_penalty)
        for row, caption in zip(rows.tolist(), found):
            alphas = caption.pop("alphas")
            captions.append(dict(row=row, course=attention_course(alphas, positions), **caption))
            if scene := scenes.get(dataset.image_ids[row]):
                given = caption["words"], alphas, positions, scene
                captions[-1]["measures"] = (is_true("".join(caption["words"]), scene), *attention_peak_hits(*given),
                                            *attention_peak_hits(*given, coloured_things)[:2])
    return sorted(gather_lists(captions), key=lambda caption: caption["row"])


def results_path(checkpoint, split, beam_size, length_penalty):
    """Where results go by default: beside the checkpoint (Path). Returns: Path."""
    penalty = f"_penalty{float(length_penalty)}" if length_penalty else ""
    model = "" if checkpoint.name == "BEST_checkpoint.pth.tar" else f"_{checkpoint.name.removesuffix('.pth.tar')}"
    return checkpoint.with_name(f"results_{split}_beam{beam_size}{penalty}{model}.json")


def training_captions(config):
    """The captions that the model was trained on, normalised, without white space. Returns: set; None without the file.
    """
    if not (Path(config.data_dir) / "train.h5").exists():
        return None
    return {"".join(normalise(raw).split()) for captions in CaptionDataset(config, "train").raw_captions
            for raw in captions}


def score_captions(captions, hypotheses, references, submission, dataset, is_official):
    """All scores of a split's captions, over words, over characters, and as the contest's evaluator gives them.

    Args:
        captions (list of dict): of caption_split. hypotheses, references: see scores.score. submission (list of dict):
        see scores.official_scores. dataset (CaptionDataset). is_official (bool).
    Returns:
        dict: name -> number.
    """
    scores = scores_of_both_units(hypotheses, references)
    if is_official and scores:
        human = {entry["image_id"]: raw for entry, raw in zip(submission, dataset.raw_captions) if raw}
        try:
            official = official_scores([entry for entry in submission if entry["image_id"] in human], human)
            scores.update({f"official {name}": value for name, value in official.items()})
        except UserError as error:
            print(f"official scores are left out: {error}")
    scores["unfinished_captions"] = sum(not caption["ended"] for caption in captions)
    measures = [caption["measures"] for caption in captions if "measures" in caption]
    if measures:
        true, hits, named, chance, colour_hits, colours = (sum(column) for column in zip(*measures))
        scores.update(true_captions=true / len(measures), attention_in_box=hits / max(named, 1),
                      attention_in_box_by_chance=chance / max(named, 1),
                      attention_in_box_colours=colour_hits / max(colours, 1))
    return scores


if __name__ == "__main__":
    run_script(main)
