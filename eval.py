"""Caption a split by beam search and score the captions.

    python eval.py                                        # models/BEST_checkpoint.pth.tar on valid, beam 3
    torchrun --nproc_per_node=4 eval.py                   # on four GPUs
    python eval.py --split test_a --beam_size 5 --results results.json
    python eval.py --official true                        # also as AI Challenger's evaluator scores; needs Java
    python eval.py --checkpoint BEST_checkpoint_.pth.tar --word_map WORDMAP.json    # a model of the original
    python eval.py --preset sample --split test_a         # with the two measures that the sample set's boxes allow

Scores are those of generated captions against the data set's own captions, over jieba words and over characters.
"""
import collections
import json
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from config import UserError, boolean, parse_args, run
from data.sample import attention_peak_hits, is_true, read_scenes
from datasets import (END, PAD, START, UNK, CaptionDataset, decode_caption, load_word_map, make_loader, tokenize,
                      word_list, write_text)
from models import beam_search, pixel_positions
from scores import characters, meteor, official_scores, ptb_tokenize, score
from utils import gather_lists, init_distributed, meet_processes, open_checkpoint

# Where the diagnosis warns. In a random pair of pictures hardly two deserve the same caption, and with ten captions in
# equal use one pair in ten would have it, however many pictures there are. Few pictures prove nothing.
SAME_CAPTION, ENOUGH_PICTURES = 0.1, 20
STILL = 0.01  # of the picture's side: a seventh of one of 14 cells
UNIFORM = 0.99  # of the entropy of a uniform map: as if spread evenly over 186 of 196 pixels


def main():
    args = parse_args(__doc__, {
        "checkpoint": dict(metavar="FILE", help="the model (models/BEST_checkpoint.pth.tar, or the preset's)"),
        "word_map": dict(metavar="FILE", help="the WORDMAP.json of a checkpoint of the original, which carries none"),
        "split": dict(default="valid", choices=("train", "valid", "test_a", "test_b"), help="what to caption (valid)"),
        "beam_size": dict(type=positive, default=3, metavar="K", help="1 is greedy (3)"),
        "results": dict(metavar="FILE", help="where the captions go (results_SPLIT_beamK.json beside the checkpoint)"),
        "write_submission": dict(metavar="FILE", help="also write the captions in AI Challenger's format"),
        "official": dict(type=boolean, default=False, metavar="BOOL",
                         help="also score as AI Challenger's evaluator does; needs Java (false)"),
    })
    if args.official:
        ptb_tokenize(["一个人"])  # where Java is missing, that is said before the captioning, not after
    checkpoint, config, device, encoder, decoder = open_checkpoint(args)
    # A model of the original has another word map than the data; of these only pictures and raw captions count here.
    data_words = load_word_map(config.data_dir) if args.word_map else checkpoint["word_map"]
    dataset = CaptionDataset(config, args.split, data_words)
    rank, world_size, store = meet_processes()
    init_distributed(device, rank, world_size, store)
    loader = make_loader(dataset, config, False, rank, world_size)
    scenes_path = Path(config.data_dir) / "scenes.json"
    scenes = read_scenes(scenes_path) if scenes_path.exists() else {}
    positions = pixel_positions(config.image_size, config.encoded_image_size)
    captions = []
    for images, _, _, rows in tqdm(loader, desc=f"caption {args.split}", unit="batch", disable=rank > 0):
        batch = generate(decoder, encoder(images.to(device)), rows, config, checkpoint["word_map"], args.beam_size)
        for caption in batch:
            alphas = caption.pop("alphas")
            caption["course"] = attention_course(alphas, positions)
            scene = scenes.get(dataset.image_ids[caption["row"]])
            if scene:  # whether it is true; words that attention hit, words, hits by chance
                caption["measures"] = (is_true("".join(caption["words"]), scene),
                                       *attention_peak_hits(caption["words"], alphas, positions, scene))
        captions += batch
    captions = sorted(gather_lists(captions), key=lambda caption: caption["row"])
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank > 0:
        return

    # A model of the original may write the full stop, which the references lack.
    words = [[word for word in caption["words"] if word != "。"] for caption in captions]
    references = tokenize_references(dataset)
    submission = [dict(image_id=Path(image_id).stem, caption="".join(cut))
                  for image_id, cut in zip(dataset.image_ids, words)]
    protocol = dict(split=args.split, pictures=len(dataset), pictures_with_references=sum(map(bool, references)),
                    references=sum(map(len, references)), beam_size=args.beam_size, captions="generated",
                    tokens="jieba, exact mode, without 。", char="one by one, but Latin letters and digits in runs")
    if args.official:
        protocol["official"] = "jieba, exact mode, without 。, then PTB, for captions and references"
    print(", ".join(f"{name} {value}" for name, value in protocol.items()))
    by_character = score([characters(cut) for cut in words], [[*map(characters, human)] for human in references])
    scores = {**score(words, references), **meteor(words, references),
              **{f"char {name}": value for name, value in by_character.items()}}
    if args.official and scores:
        human = {entry["image_id"]: raw for entry, raw in zip(submission, dataset.raw_captions) if raw}
        try:
            official = official_scores([entry for entry in submission if entry["image_id"] in human], human)
            scores.update({f"official {name}": value for name, value in official.items()})
        except UserError as error:
            print(f"no official scores: {error}")
    scores["unfinished_captions"] = sum(not caption["ended"] for caption in captions)
    measures = [caption["measures"] for caption in captions if "measures" in caption]
    if measures:
        true, hits, named, chance = (sum(column) for column in zip(*measures))
        scores.update(true_captions=true / len(measures), attention_in_box=hits / max(named, 1),
                      attention_in_box_by_chance=chance / max(named, 1))
    diagnosis, faults = diagnose(words, [caption["course"] for caption in captions], checkpoint["word_map"])
    for name, value in {**scores, **diagnosis}.items():
        print(f"{name:>26} {value:.4f}" if isinstance(value, float) else f"{name:>26} {value}")
    for fault in faults:
        print(f"warning: {fault}")

    entries = [dict(image_id=image_id, caption="".join(caption["words"]), words=caption["words"],
                    score=caption["score"], ended=caption["ended"], references=raw)
               for image_id, caption, raw in zip(dataset.image_ids, captions, dataset.raw_captions)]
    path = Path(args.results or Path(config.model_dir) / f"results_{args.split}_beam{args.beam_size}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(dict(protocol=protocol, scores=scores, diagnosis=diagnosis, warnings=faults,
                                     captions=entries), ensure_ascii=False, indent=1))
    print(f"Wrote {path}")
    if args.write_submission:
        write_text(args.write_submission, json.dumps(submission, ensure_ascii=False))
        print(f"Wrote {args.write_submission}")


def positive(text):
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(text)
    return int(text)


def generate(decoder, grid, rows, config, word_map, beam_size):
    """Caption a batch.

    Args:
        decoder (DecoderWithAttention), in eval mode. grid: (B, h, w, D). rows: int64 (B,), of the dataset.
        config (Config). word_map (dict). beam_size (int).
    Returns:
        list of dict: row (int), words (list of str), score (float: sum of log-probabilities), ended (bool),
        alphas (float array (len(words), s, s): the attention at each word).
    """
    words_by_id = word_list(word_map)
    found = beam_search(decoder, grid, beam_size, config.max_len, word_map)
    side = config.encoded_image_size
    captions = []
    for row, ids, value, ended, alphas in zip(rows.tolist(), found.words.tolist(), found.scores.tolist(),
                                              found.ended.tolist(), found.alphas.float().cpu()):
        words = decode_caption(ids, words_by_id)
        captions.append(dict(row=row, words=words, score=value, ended=ended,
                             alphas=alphas[:len(words)].view(-1, side, side).numpy()))
    return captions


def tokenize_references(dataset):
    """The human captions of each picture as words. Returns: list (pictures) of lists (captions) of lists of str."""
    return [[tokenize(caption) for caption in captions] for captions in dataset.raw_captions]


def attention_course(alphas, positions):
    """How far attention moves from word to word, and how spread out it is.

    Args:
        alphas: float array (n, s, s), the map of each word. positions: (s,), see pixel_positions.
    Returns:
        float array (n - 1,): way of the centre of mass, as a fraction of the picture's side.
        float array (n,): entropy as a fraction of that of a uniform map; 0 to 1.
    """
    centres = np.stack([alphas.sum(axis=2) @ positions, alphas.sum(axis=1) @ positions], axis=1)
    entropy = -(alphas * np.log(np.maximum(alphas, 1e-30))).sum(axis=(1, 2)) / np.log(max(len(positions) ** 2, 2))
    return np.linalg.norm(np.diff(centres, axis=0), axis=1), entropy


def diagnose(hypotheses, courses, word_map):
    """Whether the captions differ from picture to picture, and attention from word to word.

    Args:
        hypotheses (list of lists of str): one a picture. courses (list): attention_course of each. word_map (dict).
    Returns:
        dict: distinct_captions (int), same_caption_twice (probability that two pictures drawn at random share theirs),
        mean_length (words), vocabulary_used (share of the words known), attention_shift and attention_entropy (means of
        attention_course over all words). list of str: what is wrong, in plain words.
    """
    n, counts = len(hypotheses), collections.Counter(map(tuple, hypotheses))
    known = word_map.keys() - {PAD, UNK, START, END}
    shifts, entropies = (np.concatenate(parts) for parts in zip(*courses))
    same = sum(count * (count - 1) for count in counts.values()) / max(n * (n - 1), 1)
    shift, entropy = shifts.sum() / max(len(shifts), 1), entropies.sum() / max(len(entropies), 1)
    faults = []
    if same > SAME_CAPTION and n >= ENOUGH_PICTURES:
        faults.append(f"the model says the same of many pictures: {len(counts)} distinct captions of {n}, and two "
                      f"pictures drawn at random share theirs with probability {same:.2f}")
    if shift < STILL and len(shifts):
        faults.append(f"attention stays where it is: it moves by {shift:.4f} of the picture's side from word to word")
    if entropy > UNIFORM:
        faults.append(f"attention looks everywhere alike: its entropy is {entropy:.4f} of the greatest possible")
    return dict(distinct_captions=len(counts), same_caption_twice=same, mean_length=sum(map(len, hypotheses)) / n,
                vocabulary_used=len(known & set().union(*hypotheses)) / max(len(known), 1),
                attention_shift=float(shift), attention_entropy=float(entropy)), faults


if __name__ == "__main__":
    run(main)
