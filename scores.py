"""Scores of captions: BLEU, ROUGE-L, CIDEr, METEOR, AI Challenger's evaluator; a model's diagnosis.

    python scores.py CAPTIONS.json REFERENCES.json                    # anyone's captions
    python scores.py CAPTIONS.json REFERENCES.json --official true    # needs Java

What Python computes, by which training chooses its best checkpoint; what needs the `java` on the
PATH, which runs the jars of pycocoevalcap; what ails a collapsed model; and the command line.
"""
import collections
import importlib.metadata
import itertools
import json
import math
import re
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

from utils import UserError, one_line, precise, run_script

import numpy as np
import torch
import torch.nn.functional as F
from nltk.translate.bleu_score import corpus_bleu
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.meteor import meteor as meteor_module
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer
from torch import Tensor

from config import boolean, new_parser
from datasets import END, PAD, START, UNK, normalise, segment, short_names, tokenize, unsegmented

Words = list[str]  # a caption
References = list[list[Words]]  # the human captions of each picture

JAVA_SECONDS = 300  # METEOR of 30,000 pictures takes a tenth of that
# Thresholds for a warning. Two random pictures hardly ever deserve the same caption, while a model
# with ten captions used equally often gives it to one pair in ten, however many pictures there are.
SAME_CAPTION = 0.1
ENOUGH_PICTURES = 20  # fewer prove nothing
STILL = 0.01  # of the picture's side: a seventh of one of 14 cells
UNIFORM = 0.99  # of the entropy of a uniform map: as if spread evenly over 186 of 196 pixels
BAD_ENDINGS = "的", "在", "着", "和", "一个"  # words that end no Chinese sentence


# ---- In Python: BLEU, ROUGE-L, CIDEr-D -----------------------------------------------------------


def score(hypotheses: list[Words], references: References) -> dict[str, float]:
    """BLEU-1 to 4 (nltk, corpus level, closest reference length), ROUGE-L (pycocoevalcap), CIDEr-D.

    Pictures without references are ignored; where none has any, there are no scores.
    """
    pairs = [(words, human) for words, human in zip(hypotheses, references) if human]
    if not pairs:
        return {}
    hypotheses, references = zip(*pairs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk warns if no 4-gram matches; so does the score of 0
        weights = [(1 / n,) * n for n in (1, 2, 3, 4)]
        bleu = corpus_bleu(references, hypotheses, weights=weights)
    # Where no n-gram matches nltk takes the least float for its precision.
    scores = {f"BLEU-{n}": float(value) if value > 1e-9 else 0.0 for n, value in enumerate(bleu, 1)}
    rouge, _ = Rouge().compute_score(*join_words(hypotheses, references))
    scores["ROUGE-L"] = float(rouge)
    scores["CIDEr"] = cider(hypotheses, references).mean().item()
    return scores


def join_words(hypotheses: list[Words], references: References) -> tuple[dict, dict]:
    """What pycocoevalcap takes: picture -> sentences, human and generated."""
    rows = [row for row, captions in enumerate(references) if captions]
    human = {row: [" ".join(words) for words in references[row]] for row in rows}
    return human, {row: [" ".join(hypotheses[row])] for row in rows}


class TfIdf(NamedTuple):
    """Captions (..., T) for n = 1 to 4: an entry at every word that ends an n-gram."""

    ngrams: Tensor  # int64 (4, ..., T), numbers; 0 where none ends
    tf: Tensor  # int64 (4, ..., T), how often the caption has it, and how many entries
    idf: Tensor  # (4, ..., T)
    norm: Tensor  # (4, ...)
    length: Tensor  # (...), in bigrams, as pycocoevalcap counts


class CiderD:
    """CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726; n-grams up to 4, sigma 6) of captions of ids.

    Equal to pycocoevalcap's. Whether <end> is a word is decided by whether the captions contain it.

    Args:
        references: int64 (N, R, T) on the device that computes, words from 1 on, 0 after a caption
            and where there is none: the pictures that document frequencies are counted in.
        vocab_size: ids are less than this; up to 55,000 no two n-grams can be taken for each other.
    """

    def __init__(self, references: Tensor, vocab_size: int):
        self.vocab_size = vocab_size
        distinct = []
        for part in references.split(10_000):  # bounds the memory
            ngrams = self.ngrams(part).movedim(0, 1).flatten(1).sort(dim=1).values  # (n, 4RT)
            is_first = F.pad(ngrams[:, 1:] != ngrams[:, :-1], (1, 0), value=True)
            distinct.append(ngrams[is_first])  # of each picture
        known, frequencies = torch.cat(distinct).unique(return_counts=True)
        self.largest_idf = math.log(max(len(references), 1))  # of what one picture has, or none
        is_kept = (frequencies > 1) | (known == 0)  # every picture has 0, so its idf is 0
        self.known = known[is_kept]
        frequencies = frequencies[is_kept].to(precise(known.device))
        self.known_idf = self.largest_idf - frequencies.log()

    def ngrams(self, captions: Tensor) -> Tensor:
        """The n-grams that end at each word, as numbers: int64 (..., T) -> (4, ..., T)."""
        found = [captions]
        for _ in range(3):
            shorter = F.pad(found[-1], (1, 0))[..., :-1]  # the one that ends at the word before
            longer = shorter * self.vocab_size + captions
            found.append(torch.where((shorter != 0) & (captions != 0), longer, 0))
        return torch.stack(found)

    def idf(self, ngrams: Tensor) -> Tensor:
        """log N / max(1, pictures that have it), for each n-gram; 0 where there is none."""
        place = torch.searchsorted(self.known, ngrams).clamp(max=len(self.known) - 1)
        return torch.where(self.known[place] == ngrams, self.known_idf[place], self.largest_idf)

    def tf_idf(self, captions: Tensor) -> TfIdf:
        ngrams = self.ngrams(captions)
        idf = self.idf(ngrams)
        tf = (ngrams.unsqueeze(-1) == ngrams.unsqueeze(-2)).sum(dim=-1)
        norm = (tf * idf ** 2).sum(dim=-1).sqrt()
        length = (ngrams[1] != 0).sum(dim=-1)
        return TfIdf(ngrams, tf, idf, norm, length)

    def __call__(self, candidates: Tensor, references: Tensor,
                 counts: Tensor | None = None) -> Tensor:
        """The mean over a picture's references, float64 (B, C), 0 to 10; mps has only float32.

        Args:
            candidates: int64 (B, C, T).
            references: int64 (B, R, T), of the same pictures.
            counts: (B,), references per picture; None: those that have a word.
        """
        if counts is None:
            counts = (references != 0).any(dim=2).sum(dim=1)
        candidates, references = self.tf_idf(candidates), self.tf_idf(references)

        # What a candidate says more often than the reference counts as often as that says it.
        in_candidate = candidates.ngrams[:, :, :, None, :, None]
        in_reference = references.ngrams[:, :, None, :, None, :]
        reference_tf = (in_candidate == in_reference).sum(dim=5)  # (4, B, C, R, T)
        clipped_tf = torch.minimum(candidates.tf.unsqueeze(3), reference_tf)
        weight = (candidates.idf ** 2 / candidates.tf).unsqueeze(3)  # of each entry
        dot = (clipped_tf * reference_tf * weight).sum(dim=4)
        norms = candidates.norm.unsqueeze(3) * references.norm.unsqueeze(2)
        cosine = torch.where(norms > 0, dot / norms, 0).mean(dim=0)  # (B, C, R)

        difference = candidates.length.unsqueeze(2) - references.length.unsqueeze(1)
        length_penalty = torch.exp(-difference.to(cosine.dtype) ** 2 / (2 * 6.0 ** 2))
        similarity = (cosine * length_penalty).sum(dim=2)
        return 10 * similarity / counts.clamp(min=1).unsqueeze(1)


def cider(hypotheses: list[Words], references: References) -> Tensor:
    """CIDEr-D of each caption, (pictures,); every picture must have a reference."""
    ids = collections.defaultdict(itertools.count(1).__next__)
    counts = torch.tensor([len(captions) for captions in references])
    most = int(counts.max())
    padded = [words for captions in references
              for words in captions + [[]] * (most - len(captions))]
    human = numbered(padded, ids).unflatten(0, (-1, most))
    generated = numbered(hypotheses, ids).unsqueeze(1)
    cider_d = CiderD(human, len(ids) + 1)
    found = []
    for candidates, captions, n in zip(generated.split(500), human.split(500), counts.split(500)):
        found.append(cider_d(trimmed(candidates), trimmed(captions), n))
    return torch.cat(found).squeeze(1)


def numbered(captions: list[Words], ids: dict[str, int]) -> Tensor:
    """Captions of words as int64 (captions, longest), 0 after the end."""
    lengths = torch.tensor([len(words) for words in captions])
    found = torch.zeros(len(captions), max(int(lengths.max()), 1), dtype=torch.int64)
    is_word = torch.arange(found.shape[1]) < lengths.unsqueeze(1)
    flat = [ids[word] for words in captions for word in words]
    found[is_word] = torch.tensor(flat, dtype=torch.int64)
    return found


def trimmed(captions: Tensor) -> Tensor:
    """Captions (B, K, T) without what comes after the end of the longest."""
    longest = int((captions != 0).sum(dim=2).max())
    return captions[:, :, :max(longest, 1)]


def characters(words: Words) -> list[str]:
    """Split words into characters; a run of Latin letters, or of digits, counts as one."""
    return re.findall(r"[A-Za-z]+|[0-9]+|\S", " ".join(words))


# ---- With Java: METEOR, AI Challenger's evaluator ------------------------------------------------


def run_java(*arguments: object, text: str = "") -> str:
    try:
        done = subprocess.run(["java", *map(str, arguments)], input=text, capture_output=True,
                              encoding="utf-8", errors="replace", timeout=JAVA_SECONDS)
    except OSError as error:
        raise UserError(f"java cannot be run ({error.strerror}): "
                        f"install a Java runtime, 8 or later") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"java timed out after {JAVA_SECONDS} s: try `java -version`") from None
    if done.returncode:
        reason = (done.stderr.splitlines() or ["no error message"])[-1]
        raise UserError(f"java failed with exit code {done.returncode} ({reason[:200]}): "
                        f"try `java -version`")
    return done.stdout


def meteor(hypotheses: list[Words], references: References) -> dict[str, float]:
    """METEOR 1.5 for English, normalised; pycocoevalcap's own wrapper of its jar can hang.

    Normalising splits Chinese into single characters, so this score does not depend on the
    segmentation. Without references there is none, nor if Java fails, which is printed.
    """
    human, generated = join_words(hypotheses, references)
    if not human:
        return {}
    jar = Path(meteor_module.__file__).with_name(meteor_module.METEOR_JAR)
    # It wants an equal number of references. As the best match counts, they may be repeated.
    most = max(map(len, human.values()))
    human_lines = itertools.chain(*((captions * most)[:most] for captions in human.values()))
    generated_lines = itertools.chain(*generated.values())
    try:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder, "generated"), Path(folder, "human")]
            for path, lines in zip(paths, (generated_lines, human_lines)):
                path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            printed = run_java("-Xmx2G", "-jar", jar, *paths,
                               "-l", "en", "-norm", "-q", "-r", most).strip()
        if not re.fullmatch(r"\d\.\d+(E-\d+)?", printed):
            raise UserError(f"java printed {printed[:80]!r}")
        return {"METEOR": float(printed)}
    except (UserError, OSError) as error:
        print(f"METEOR is left out: {error}")
        return {}


def scores_of_both_units(hypotheses: list[Words], references: References) -> dict[str, float]:
    """Scores over words and, as `char BLEU-4` and so on, over characters; METEOR."""
    if sum(map(bool, references)) == 1:
        print("CIDEr of a single picture is 0: it weighs words by how few of the pictures have "
              "them")
    by_character = score([characters(words) for words in hypotheses],
                         [list(map(characters, captions)) for captions in references])
    scores = score(hypotheses, references) | meteor(hypotheses, references)
    return scores | {f"char {name}": value for name, value in by_character.items()}


def ptb_tokenize(captions: list[str]) -> list[Words]:
    """Segment as AI Challenger's evaluator does: without 。, jieba's exact mode, Stanford's PTB.

    Brackets stay, as -lrb-: the list of tokens to drop has -LRB-. The wrapper in pycocoevalcap has
    no timeout and writes into its own package.
    """
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    text = "\n".join(" ".join(segment(caption.replace("。", ""))) for caption in captions)
    lines = run_java("-cp", jar, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines",
                     "-lowerCase", "-encoding", "UTF-8", text=text).split("\n")
    if len(lines) != len(captions):
        raise UserError(f"java gave {len(lines)} lines for {len(captions)} captions, "
                        f"the first {lines[0][:80]!r}")
    dropped = ptbtokenizer.PUNCTUATIONS
    return [[word for word in line.rstrip().split(" ") if word not in dropped] for line in lines]


def official_scores(submission: list[dict], sentences: dict[str, list[str]]) -> dict[str, float]:
    """`official BLEU-4` and so on, as AI Challenger 2017's evaluator gives them
    (AIChallenger/AI_Challenger_2017, Evaluation/caption_eval).

    It expected segmented references; those published with it are segmented by jieba, as here.
    Raises UserError: see check_submission; or Java fails.
    """
    check_submission(submission, sentences)
    hypotheses = ptb_tokenize([entry["caption"] for entry in submission])
    captions = [sentences[entry["image_id"]] for entry in submission]
    tokenized = iter(ptb_tokenize(list(itertools.chain(*captions))))  # Java starts once for all
    references = [[next(tokenized) for _ in human] for human in captions]
    scores = score(hypotheses, references) | meteor(hypotheses, references)
    # If no n-gram matches, nltk's BLEU is 0 and this one almost 0.
    bleu, _ = Bleu(4).compute_score(*join_words(hypotheses, references), verbose=0)
    scores |= {f"BLEU-{n}": value for n, value in enumerate(bleu, 1)}
    return {f"official {name}": value for name, value in scores.items()}


def check_submission(submission: list[dict], sentences: dict[str, list[str]]) -> None:
    """Raise UserError for what AI Challenger's evaluator rejected."""
    for entry in submission:
        texts = [entry["image_id"], entry["caption"]]
        if not all(isinstance(text, str) and normalise(text) for text in texts):
            raise UserError(f"the submission has an entry without image_id or caption: {entry}")
    counts = collections.Counter(entry["image_id"] for entry in submission)
    faults = dict(
        missing=sentences.keys() - counts.keys(),
        unknown=counts.keys() - sentences.keys(),
        repeated=[image_id for image_id, count in counts.items() if count > 1])
    for fault, image_ids in faults.items():
        if image_ids:
            raise UserError(f"the submission has {len(image_ids)} {fault} pictures, "
                            f"such as {min(image_ids)}")


# ---- A collapsed model: one caption for every picture, or attention that stays put ---------------


def attention_course(alphas: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far attention moves from word to word, and how spread out it is.

    Args:
        alphas: (n, s, s), the map of each word.
        positions: (s,), see pixel_positions.
    Returns:
        (n - 1,): distance that the centre of mass moves, as a fraction of the picture's side.
        (n,): see attention_entropy.
    """
    centres = np.stack([alphas.sum(axis=2) @ positions, alphas.sum(axis=1) @ positions], axis=1)
    return np.linalg.norm(np.diff(centres, axis=0), axis=1), attention_entropy(alphas)


def attention_entropy(alphas: np.ndarray) -> np.ndarray:
    """The entropy of maps (n, s, s) as a fraction of that of a uniform one: (n,), 0 to 1."""
    pixels = alphas.shape[1] * alphas.shape[2]
    entropy = -(alphas * np.log(np.maximum(alphas, 1e-30))).sum(axis=(1, 2))
    return entropy / np.log(max(pixels, 2))


def diagnose(hypotheses: list[Words], courses: list[tuple[np.ndarray, np.ndarray]],
             word_map: dict[str, int]) -> tuple[dict[str, float], list[str]]:
    """Whether captions differ from picture to picture, and attention from word to word.

    Takes the pictures' attention_course; gives numbers, see docs/evaluation.md, and warnings.
    """
    n = len(hypotheses)
    counts = collections.Counter(map(tuple, hypotheses))
    same_pairs = sum(count * (count - 1) for count in counts.values())
    same = same_pairs / max(n * (n - 1), 1)
    shifts, entropies = (np.concatenate(parts) for parts in zip(*courses))
    shift = float(shifts.sum() / max(len(shifts), 1))
    entropy = float(entropies.sum() / max(len(entropies), 1))
    vocabulary = word_map.keys() - {PAD, UNK, START, END}
    used = vocabulary & set().union(*hypotheses)
    numbers = dict(
        distinct_captions=len(counts),
        same_caption_twice=same,
        mean_length=sum(map(len, hypotheses)) / n,
        vocabulary_used=len(used) / max(len(vocabulary), 1),
        attention_shift=shift,
        attention_entropy=entropy)
    warned = []
    if same > SAME_CAPTION and n >= ENOUGH_PICTURES:
        warned.append(f"many pictures get the same caption: {len(counts)} distinct captions of "
                      f"{n}, and two random pictures have the same one with probability {same:.2f}")
    if shift < STILL and len(shifts):
        warned.append(f"attention hardly moves: by {shift:.4f} of the picture's side "
                      f"from word to word")
    if entropy > UNIFORM:
        warned.append(f"attention is nearly uniform: its entropy is {entropy:.4f} of the maximum")
    return numbers, warned


def diagnose_words(hypotheses: list[Words], references: References,
                   seen: set[str] | None) -> dict[str, float]:
    """What the words of generated captions have that people's have not.

    `seen`: the training captions, normalised, without white space; None where not at hand.
    """
    n = len(hypotheses)
    numbers = dict(
        bad_endings=sum(words[-1] in BAD_ENDINGS for words in hypotheses if words) / n,
        repeated_words=sum(len(set(words)) < len(words) for words in hypotheses) / n)
    lengths = [len(words) for captions in references for words in captions]
    if lengths:
        mean_length = sum(map(len, hypotheses)) / n
        numbers["length_ratio"] = mean_length / (sum(lengths) / len(lengths))
    if seen is not None:
        numbers["copied_captions"] = sum("".join(words) in seen for words in hypotheses) / n
    return numbers


# ---- The command line: anyone's captions against anyone's references -----------------------------


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument(
        "captions", help="a submission of AI Challenger or COCO, or results of eval.py (JSON)")
    parser.add_argument(
        "references", help="annotations of AI Challenger or COCO, or results of eval.py (JSON)")
    parser.add_argument(
        "--official", type=boolean, default=False, metavar="BOOL",
        help="also compute the scores of AI Challenger's evaluator; needs Java (false)")
    args = parser.parse_args()

    sentences, names_by_id = read_references(args.references)
    submission = read_submission(args.captions, list(sentences), names_by_id)
    check_submission(submission, sentences)
    hypotheses = [entry.get("words") or tokenize(entry["caption"]) for entry in submission]
    references = [list(map(tokenize, sentences[entry["image_id"]])) for entry in submission]
    scores = scores_of_both_units(hypotheses, references)
    if args.official:
        scores |= official_scores(submission, sentences)
    print_numbers(scores | diagnose_words(hypotheses, references, seen=None))
    print(signature(submission, sentences, scores))


def print_numbers(numbers: dict[str, float]) -> None:
    for name, value in numbers.items():
        print(f"{name:>26} {value:.4f}" if isinstance(value, float) else f"{name:>26} {value}")


def read_json(path: str) -> object:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({one_line(error)})") from None


def read_references(path: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Read AI Challenger's annotations, COCO's (as its evaluator takes them), or eval.py's results:
    file name -> sentences, not segmented, and COCO's id -> file name.
    """
    content = read_json(path)
    names_by_id = {}
    sentences = collections.defaultdict(list)
    try:
        if isinstance(content, list):
            entries = [(entry["image_id"], entry["caption"]) for entry in content]
        elif "annotations" in content:
            names_by_id = {str(image["id"]): str(image["file_name"]) for image in content["images"]}
            entries = [(names_by_id[str(annotation["image_id"])], annotation["caption"])
                       for annotation in content["annotations"]]
        else:
            entries = [(entry["image_id"], entry["references"]) for entry in content["captions"]]
        for name, captions in entries:
            if isinstance(captions, str):
                captions = [captions]
            if not isinstance(captions, list):
                raise TypeError(f"the caption of {name} is neither a sentence nor a list of "
                                f"sentences")
            sentences[str(name)] += [unsegmented(text) for text in captions if normalise(text)]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has no references as AI Challenger, COCO or eval.py write them "
                        f"({type(error).__name__}: {error})") from None
    sentences = {name: captions for name, captions in sentences.items() if captions}
    if not sentences:
        raise UserError(f"{path} has no references")
    return sentences, {number: name for number, name in names_by_id.items() if name in sentences}


def read_submission(path: str, pictures: list[str], names_by_id: dict[str, str]) -> list[dict]:
    """Read a submission for AI Challenger or COCO, or eval.py's results, which bring their words.

    image_id becomes what the references call the picture, see read_references.
    """
    content = read_json(path)
    is_ours = isinstance(content, dict)
    entries = content.get("captions") if is_ours else content
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path} is not a list of image_id and caption, nor the results of eval.py")
    given = [entry.get("image_id", "") for entry in entries]
    submission = []
    for image_id, entry in zip(find_pictures(given, pictures, names_by_id), entries):
        read = dict(image_id=image_id, caption=entry.get("caption"))
        if is_ours and "words" in entry:
            read["words"] = list(filter(None, map(normalise, entry["words"])))
        submission.append(read)
    return submission


def find_pictures(image_ids: list[str | int], pictures: list[str],
                  names_by_id: dict[str, str]) -> list[str]:
    """The pictures that are meant: all by file name, with or without suffix, or all by COCO's id.

    A number may be one picture's name and another's id. Where both ways fit, strings are names and
    numbers are ids. What is unknown either way stays as it is.
    """
    given = list(map(str, image_ids))
    known = dict(zip(short_names(pictures), pictures)) | dict(zip(pictures, pictures))
    by_name = [known.get(name) or known.get(short)
               for name, short in zip(given, short_names(given))]
    by_id = [names_by_id.get(name) for name in given]

    both = list(zip(by_name, by_id))
    only_by_name = any(one and not other for one, other in both)
    only_by_id = any(other and not one for one, other in both)
    differ = any(one and other and one != other for one, other in both)
    are_numbers = [isinstance(name, int) for name in image_ids]
    are_mixed = any(are_numbers) and not all(are_numbers)
    if only_by_name and only_by_id or differ and are_mixed:
        raise UserError("the submission names some pictures by file name and others by COCO's id: "
                        "use one of the two")
    are_ids = only_by_id or all(are_numbers) and not only_by_name
    found = by_id if are_ids else by_name
    return [picture or name for picture, name in zip(found, given)]


def signature(submission: list[dict], sentences: dict[str, list[str]],
              scores: dict[str, float]) -> str:
    """All that the scores depend on besides the captions, in a line to be quoted with them."""
    version = importlib.metadata.version
    counts = [len(sentences[entry["image_id"]]) for entry in submission]
    are_ours = all("words" in entry for entry in submission)
    captions = "as the model wrote them" if are_ours else "segmented anew"
    parts = dict(
        pictures=len(submission),
        references=f"{min(counts)} to {max(counts)} per picture",
        tokens=f"jieba {version('jieba')} exact mode, without 。, white space and invisible "
               f"characters, no PTB, captions {captions}",
        BLEU=f"nltk {version('nltk')}, closest reference length",
        CIDEr="CIDEr-D, sigma 6, without <end>, document frequencies of these references",
        ROUGE=f"pycocoevalcap {version('pycocoevalcap')}, beta 1.2")
    if "METEOR" in scores:
        parts["METEOR"] = "1.5, en, norm"
    if "official CIDEr" in scores:
        parts["official"] = "captions and references without 。, jieba exact, then PTB 3.4.1"
    return " | ".join(f"{name}: {value}" for name, value in parts.items())


if __name__ == "__main__":
    run_script(main)
