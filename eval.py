"""Caption a split by beam search and score the captions.

    python eval.py                                        # models/BEST_checkpoint.pth.tar on valid, beam 3
    python eval.py --split test_a --beam_size 5 --results results.json
    python eval.py --checkpoint BEST_checkpoint_.pth.tar --word_map WORDMAP.json    # a model of the original
    python eval.py --preset sample --split test_a         # with the two measures that the sample set's boxes allow

Scores are those of generated captions, over jieba words, against the data set's own captions.
"""
import json
import warnings
from pathlib import Path

import torch
from nltk.translate.bleu_score import corpus_bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from tqdm import tqdm

from config import parse_args, run
from data.sample import attention_peak_hits, is_true
from datasets import CaptionDataset, decode_caption, load_word_map, make_loader, tokenize, word_list, write_text
from models import beam_search, pixel_positions
from utils import open_checkpoint


def main():
    args = parse_args(__doc__, {
        "checkpoint": dict(metavar="FILE", help="the model (models/BEST_checkpoint.pth.tar, or the preset's)"),
        "word_map": dict(metavar="FILE", help="the WORDMAP.json of a checkpoint of the original, which carries none"),
        "split": dict(default="valid", choices=("train", "valid", "test_a", "test_b"), help="what to caption (valid)"),
        "beam_size": dict(type=positive, default=3, metavar="K", help="1 is greedy (3)"),
        "results": dict(metavar="FILE", help="where the captions go (results_SPLIT_beamK.json beside the checkpoint)"),
        "write_submission": dict(metavar="FILE", help="also write the captions in AI Challenger's format"),
    })
    checkpoint, config, device, encoder, decoder = open_checkpoint(args)
    # A model of the original has another word map than the data; of these only pictures and raw captions count here.
    data_words = load_word_map(config.data_dir) if args.word_map else checkpoint["word_map"]
    dataset = CaptionDataset(config, args.split, data_words)
    loader = make_loader(dataset, config, shuffle=False)
    scenes_path = Path(config.data_dir) / "scenes.json"
    scenes = json.loads(scenes_path.read_text(encoding="utf-8")) if scenes_path.exists() else {}
    positions = pixel_positions(config.image_size, config.encoded_image_size)
    captions, measures = [], []  # of each caption: whether it is true; words that attention hit, words, hits by chance
    for images, _, _, rows in tqdm(loader, desc=f"caption {args.split}", unit="batch"):
        batch = generate(decoder, encode(encoder, images.to(device)), rows, config, checkpoint["word_map"],
                         args.beam_size)
        for caption in batch:
            alphas = caption.pop("alphas")
            scene = scenes.get(dataset.image_ids[caption["row"]])
            if scene:
                measures.append((is_true("".join(caption["words"]), scene),
                                 *attention_peak_hits(caption["words"], alphas, positions, scene)))
        captions += batch

    references = tokenize_references(dataset)
    protocol = dict(split=args.split, pictures=len(dataset), pictures_with_references=sum(map(bool, references)),
                    beam_size=args.beam_size, tokens="jieba, exact mode, without 。", captions="generated")
    print(", ".join(f"{name} {value}" for name, value in protocol.items()))
    # A model of the original may write the full stop, which the references lack.
    scores = score([[word for word in caption["words"] if word != "。"] for caption in captions], references)
    scores["unfinished_captions"] = sum(not caption["ended"] for caption in captions)
    if measures:
        true, hits, named, chance = (sum(column) for column in zip(*measures))
        scores.update(true_captions=true / len(measures), attention_in_box=hits / max(named, 1),
                      attention_in_box_by_chance=chance / max(named, 1))
    for name, value in scores.items():
        print(f"{name:>24} {value:.4f}" if isinstance(value, float) else f"{name:>24} {value}")

    entries = [dict(image_id=image_id, caption="".join(caption["words"]), words=caption["words"],
                    score=caption["score"], ended=caption["ended"], references=raw)
               for image_id, caption, raw in zip(dataset.image_ids, captions, dataset.raw_captions)]
    path = Path(args.results or Path(config.model_dir) / f"results_{args.split}_beam{args.beam_size}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(dict(protocol=protocol, scores=scores, captions=entries), ensure_ascii=False, indent=1))
    print(f"Wrote {path}")
    if args.write_submission:
        submission = [dict(image_id=Path(entry["image_id"]).stem, caption=entry["caption"]) for entry in entries]
        write_text(args.write_submission, json.dumps(submission, ensure_ascii=False))
        print(f"Wrote {args.write_submission}")


def positive(text):
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(text)
    return int(text)


@torch.no_grad()
def encode(encoder, images):
    """The encoder's grid without gradients. Args: images uint8 (B, S, S, 3). Returns: float (B, h, w, D)."""
    return encoder(images)


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


def score(hypotheses, references):
    """BLEU-1 to 4 (nltk, corpus level, closest reference length), ROUGE-L and CIDEr-D (pycocoevalcap).

    Args:
        hypotheses (list of lists of str): one a picture.
        references (list of lists of lists of str): those of each picture; pictures without any are left out.
    Returns:
        dict: name -> float; empty where no picture has references.
    """
    pairs = [(hypothesis, human) for hypothesis, human in zip(hypotheses, references) if human]
    if not pairs:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk warns where no 4-gram fits; the score of 0 says so too
        bleu = corpus_bleu([human for _, human in pairs], [hypothesis for hypothesis, _ in pairs],
                           weights=[(1 / n,) * n for n in (1, 2, 3, 4)])
    generated = {i: [" ".join(hypothesis)] for i, (hypothesis, _) in enumerate(pairs)}
    human = {i: [" ".join(words) for words in human] for i, (_, human) in enumerate(pairs)}
    scores = {f"BLEU-{n}": float(value) for n, value in zip((1, 2, 3, 4), bleu)}
    scores["ROUGE-L"] = float(Rouge().compute_score(human, generated)[0])
    scores["CIDEr"] = float(Cider().compute_score(human, generated)[0])
    return scores


if __name__ == "__main__":
    run(main)
