"""Scores of captions: BLEU, ROUGE-L, CIDEr, METEOR, AI Challenger's evaluator; and checks for a collapsed model.

    python scores.py CAPTIONS.json REFERENCES.json                    # anyone's captions against anyone's references
    python scores.py CAPTIONS.json REFERENCES.json --official true    # as AI Challenger's evaluator too; needs Java

`score` needs no Java; training chooses its best checkpoint by it. METEOR and AI Challenger's evaluator run the jars of
pycocoevalcap with the `java` on the PATH, for at most JAVA_SECONDS.
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

from utils import UserError, precise, run_script, write_text

import numpy as np
import torch
import torch.nn.functional as F
from nltk.translate.bleu_score import corpus_bleu
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.meteor import meteor as meteor_module
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer

from config import boolean, new_parser
from datasets import END, PAD, START, UNK, normalise, segment, short_names, tokenize, unsegmented

JAVA_SECONDS = 300  # METEOR of 30,000 pictures takes a tenth of that
# Thresholds for a warning. Two random pictures hardly ever deserve the same caption, while a model with ten captions
# used equally often gives it to one pair in ten, however many pictures there are. Few pictures prove nothing.
SAME_CAPTION, ENOUGH_PICTURES = 0.1, 20
STILL = 0.01  # of the picture's side: a seventh of one of 14 cells
UNIFORM = 0.99  # of the entropy of a uniform map: as if spread evenly over 186 of 196 pixels
BAD_ENDINGS = "的", "在", "着", "和", "一个"  # words that end no Chinese sentence


def score(hypotheses, references):
    """BLEU-1 to 4 (nltk, corpus level, closest reference length), ROUGE-L (pycocoevalcap) and CIDEr-D (CiderD).

    Args:
        hypotheses (list of lists of str): one per picture.
        references (list of lists of lists of str): of each picture; pictures without any are ignored.
    Returns:
        dict: name -> float; empty if no picture has references.
    """
    pairs = [(hypothesis, human) for hypothesis, human in zip(hypotheses, references) if human]
    if not pairs:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk warns if no 4-gram matches; so does the score of 0
        bleu = corpus_bleu([human for _, human in pairs], [hypothesis for hypothesis, _ in pairs],
                           weights=[(1 / n,) * n for n in (1, 2, 3, 4)])
    human, generated = join_words(hypotheses, references)
    # Where no n-gram matches nltk takes the least float for its precision; the score is then 0.
    scores = {f"BLEU-{n}": float(value) * (value > 1e-9) for n, value in zip((1, 2, 3, 4), bleu)}
    scores["ROUGE-L"] = float(Rouge().compute_score(human, generated)[0])
    scores["CIDEr"] = cider(*zip(*pairs)).mean().item()
    return scores


def join_words(hypotheses, references):
    """The input of pycocoevalcap. Args: see score. Returns: two dicts, picture -> sentences: human, generated."""
    human = {i: [" ".join(words) for words in captions] for i, captions in enumerate(references) if captions}
    return human, {i: [" ".join(hypotheses[i])] for i in human}


class CiderD:
    """CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726, section 4; n-grams up to 4, sigma 6) of captions of word ids.

    Equal to pycocoevalcap's. Whether <end> is a word is decided by whether the captions contain it.

    Args:
        references: int64 (N, R, T) on the device that computes, words from 1 on, 0 after a caption and where there is
            none: the pictures that document frequencies are counted in, each with up to R captions.
        vocab_size (int): ids are less than this; up to 55,000 no two n-grams can be taken for each other.
    """

    def __init__(self, references, vocab_size):
        self.vocab_size, distinct = vocab_size, []
        for part in references.split(10_000):  # bounds the memory
            grams = self.ngrams(part).movedim(0, 1).flatten(1).sort(dim=1).values  # (n, 4RT)
            is_first = F.pad(grams[:, 1:] != grams[:, :-1], (1, 0), value=True)
            distinct.append(grams[is_first])  # of each picture
        known, counts = torch.cat(distinct).unique(return_counts=True)
        self.largest_idf = math.log(max(len(references), 1))  # of what one picture has, or none
        is_kept = (counts > 1) | (known == 0)  # every picture has 0, so its idf is 0
        self.known, counts = known[is_kept], counts[is_kept]
        self.known_idf = self.largest_idf - counts.to(precise(counts.device)).log()

    def ngrams(self, words):
        """The n-grams as numbers. Args: int64 (..., T). Returns: int64 (4, ..., T): that of each n which ends at each
        word; 0 where there is none."""
        found = [words]
        for _ in range(3):
            before = F.pad(found[-1], (1, 0))[..., :-1]
            found.append(torch.where((before != 0) & (words != 0), before * self.vocab_size + words, 0))
        return torch.stack(found)

    def idf(self, grams):
        """Inverse document frequency, log N / max(1, pictures that have it). Returns: as grams; 0 where there is none.
        """
        place = torch.searchsorted(self.known, grams).clamp(max=len(self.known) - 1)
        return torch.where(self.known[place] == grams, self.known_idf[place], self.largest_idf)

    def __call__(self, candidates, references, counts=None):
        """
        Args:
            candidates: int64 (B, C, T). references: int64 (B, R, T), of the same pictures; ids as above.
            counts: (B,), references per picture; those that have a word where None.
        Returns:
            float64 (B, C), from 0 to 10; float32 on a device without float64.
        """
        c, r = self.ngrams(candidates), self.ngrams(references)  # (4, B, C, T), (4, B, R, T)
        c_idf, r_idf = self.idf(c), self.idf(r)
        c_count, r_count = ((x.unsqueeze(4) == x.unsqueeze(3)).sum(dim=4) for x in (c, r))  # in the caption itself
        c_norm, r_norm = ((count * idf ** 2).sum(dim=3).sqrt() for count, idf in ((c_count, c_idf), (r_count, r_idf)))
        in_r = (c[:, :, :, None, :, None] == r[:, :, None, :, None, :]).sum(dim=5)  # (4, B, C, R, T)
        # Summed over positions, so each n-gram comes c_count times.
        weight = (c_idf ** 2 / c_count).unsqueeze(3)
        dot = (torch.minimum(c_count.unsqueeze(3), in_r) * in_r * weight).sum(dim=4)  # (4, B, C, R)
        norms = c_norm.unsqueeze(3) * r_norm.unsqueeze(2)
        cosine = torch.where(norms > 0, dot / norms, 0)
        lengths = [(x[1] != 0).sum(dim=2) for x in (c, r)]  # pycocoevalcap measures length in bigrams
        apart = lengths[0].unsqueeze(2) - lengths[1].unsqueeze(1)  # (B, C, R)
        similarity = cosine.mean(dim=0) * torch.exp(-apart.to(cosine.dtype) ** 2 / (2 * 6.0 ** 2))
        if counts is None:
            counts = (references != 0).any(dim=2).sum(dim=1)
        return 10 * similarity.sum(dim=2) / counts.clamp(min=1).unsqueeze(1)


def cider(hypotheses, references):
    """CIDEr-D of each caption, with the document frequencies of all references. Args: see score; at least one reference
    per picture. Returns: float64 (pictures,)."""
    numbers = collections.defaultdict(itertools.count(1).__next__)
    R = max(map(len, references))
    human = numbered([captions[k] if k < len(captions) else () for captions in references for k in range(R)], numbers)
    human, generated = human.unflatten(0, (-1, R)), numbered(hypotheses, numbers).unsqueeze(1)
    scorer, counts = CiderD(human, len(numbers) + 1), torch.tensor([*map(len, references)])
    parts = (x.split(500) for x in (generated, human, counts))
    return torch.cat([scorer(c[:, :, :longest(c)], r[:, :, :longest(r)], n) for c, r, n in zip(*parts)]).squeeze(1)


def numbered(captions, numbers):
    """Captions (list of lists of str) as int64 (captions, longest), 0 after the end. numbers (dict): word -> id."""
    lengths = torch.tensor([*map(len, captions)])
    ids = torch.zeros(len(captions), max(int(lengths.max()), 1), dtype=torch.int64)
    ids[torch.arange(ids.shape[1]) < lengths.unsqueeze(1)] = torch.tensor(
        [numbers[word] for words in captions for word in words], dtype=torch.int64)
    return ids


def longest(ids):
    return max(int((ids != 0).sum(dim=-1).max()), 1)


def characters(words):
    """Split words into characters; a run of Latin letters, or of digits, counts as one. Returns: list of str."""
    return re.findall(r"[A-Za-z]+|[0-9]+|\S", " ".join(words))


# ---------------------------------------------------------------------------------------------------------------------
# With Java: METEOR and AI Challenger's evaluator


def run_java(*arguments, text=""):
    """Run `java`. Args: of its command line; text (str): its standard input. Returns: str, its standard output.

    Raises: UserError: Java is missing, fails, or timed out.
    """
    try:
        done = subprocess.run(["java", *map(str, arguments)], input=text, capture_output=True, encoding="utf-8",
                              errors="replace", timeout=JAVA_SECONDS)
    except OSError as error:
        raise UserError(f"java cannot be run ({error.strerror}): install a Java runtime, 8 or later") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"java timed out after {JAVA_SECONDS} s: try `java -version`") from None
    if done.returncode:
        reason = (done.stderr.splitlines() or ["no error message"])[-1]
        raise UserError(f"java failed with exit code {done.returncode} ({reason[:200]}): try `java -version`")
    return done.stdout


def meteor(hypotheses, references):
    """METEOR 1.5 for English, normalised, with the jar of pycocoevalcap; its own wrapper of it can hang.

    Normalising splits Chinese into single characters, so this score does not depend on the segmentation.

    Args: see score. Returns: dict: METEOR -> float; empty without references, or if Java fails, which is printed.
    """
    human, generated = join_words(hypotheses, references)
    if not human:
        return {}
    jar = Path(meteor_module.__file__).with_name(meteor_module.METEOR_JAR)
    most = max(map(len, human.values()))  # references per picture, of which METEOR wants an equal number
    try:
        with tempfile.TemporaryDirectory() as folder:
            paths = Path(folder, "generated"), Path(folder, "human")
            write_text(paths[0], "".join(f"{caption}\n" for caption, in generated.values()))
            # The best match counts, so a repeated reference changes nothing.
            write_text(paths[1], "".join(f"{line}\n" for lines in human.values() for line in (lines * most)[:most]))
            printed = run_java("-Xmx2G", "-jar", jar, *paths, "-l", "en", "-norm", "-q", "-r", most).strip()
        if not re.fullmatch(r"\d\.\d+(E-\d+)?", printed):
            raise UserError(f"java printed {printed[:80]!r}")
        return {"METEOR": float(printed)}
    except (UserError, OSError) as error:
        print(f"METEOR is left out: {error}")
        return {}


def scores_of_both_units(hypotheses, references):
    """Over words and, as `char BLEU-4` and so on, over characters, and METEOR. Args and returns: see score."""
    if sum(map(bool, references)) == 1:
        print("CIDEr of a single picture is 0: it weighs words by how few of the pictures have them")
    by_character = score([*map(characters, hypotheses)], [[*map(characters, human)] for human in references])
    return {**score(hypotheses, references), **meteor(hypotheses, references),
            **{f"char {name}": value for name, value in by_character.items()}}


def ptb_tokenize(captions):
    """Segment captions as AI Challenger's evaluator does: without 。, jieba's exact mode, Stanford's PTB tokenizer.

    That makes letters lower case and drops ASCII punctuation, except brackets: they come as -lrb-, while the list of
    tokens to drop has -LRB-. The wrapper in pycocoevalcap has no timeout and writes into its own package.

    Args: captions (list of str). Returns: list of lists of str. Raises: UserError: Java is missing or fails.
    """
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    text = "\n".join(" ".join(segment(caption.replace("。", ""))) for caption in captions)
    lines = run_java("-cp", jar, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding",
                     "UTF-8", text=text).split("\n")
    if len(lines) != len(captions):
        raise UserError(f"java gave {len(lines)} lines for {len(captions)} captions, the first {lines[0][:80]!r}")
    return [[word for word in line.rstrip().split(" ") if word not in ptbtokenizer.PUNCTUATIONS] for line in lines]


def official_scores(submission, references):
    """The scores of AI Challenger 2017's evaluator (AIChallenger/AI_Challenger_2017, Evaluation/caption_eval).

    It expected segmented references; those published with it are segmented by jieba's exact mode, as here.

    Args:
        submission (list of dict): image_id (str, without .jpg), caption (str, not segmented).
        references (dict): image_id -> list of str, not segmented, at least one.
    Returns:
        dict: BLEU-1 to 4, ROUGE-L, CIDEr, METEOR -> float; without METEOR if Java fails there, which is printed.
    Raises:
        UserError: what the evaluator rejected: a picture missing, unknown or repeated, an empty entry; or Java fails.
    """
    check_submission(submission, references)
    hypotheses = ptb_tokenize([entry["caption"] for entry in submission])
    own = [references[entry["image_id"]] for entry in submission]
    tokens = iter(ptb_tokenize([caption for captions in own for caption in captions]))
    human = [[next(tokens) for _ in captions] for captions in own]
    # If no n-gram matches, nltk's BLEU is 0 and this one almost 0.
    bleu, _ = Bleu(4).compute_score(*join_words(hypotheses, human), verbose=0)
    return {**score(hypotheses, human), **{f"BLEU-{n}": value for n, value in enumerate(bleu, 1)},
            **meteor(hypotheses, human)}


def check_submission(submission, references):
    """Refuse what AI Challenger's evaluator refused. Args and Raises: see official_scores."""
    for entry in submission:
        texts = [entry.get("image_id"), entry.get("caption")] if isinstance(entry, dict) else [None]
        if not all(isinstance(text, str) and normalise(text) for text in texts):
            raise UserError(f"the submission has an entry without image_id or caption: {entry}")
    counts = collections.Counter(entry["image_id"] for entry in submission)
    for fault, ids in (("missing", references.keys() - counts.keys()), ("unknown", counts.keys() - references.keys()),
                       ("repeated", [image_id for image_id, count in counts.items() if count > 1])):
        if ids:
            raise UserError(f"the submission has {len(ids)} {fault} pictures, such as {min(ids)}")


# ---------------------------------------------------------------------------------------------------------------------
# Checks for a collapsed model: the usual failure is the same caption for every picture, or attention that stays put


def attention_course(alphas, positions):
    """How far attention moves from word to word, and how spread out it is.

    Args:
        alphas: float array (n, s, s), the map of each word. positions: (s,), see pixel_positions.
    Returns:
        float array (n - 1,): distance that the centre of mass moves, as a fraction of the picture's side.
        float array (n,): entropy as a fraction of that of a uniform map; 0 to 1.
    """
    centres = np.stack([alphas.sum(axis=2) @ positions, alphas.sum(axis=1) @ positions], axis=1)
    return np.linalg.norm(np.diff(centres, axis=0), axis=1), attention_entropy(alphas)


def attention_entropy(alphas):
    """Args: alphas: float array (n, s, s). Returns: float array (n,): entropy as a fraction of a uniform map's."""
    pixels = alphas.shape[1] * alphas.shape[2]
    return -(alphas * np.log(np.maximum(alphas, 1e-30))).sum(axis=(1, 2)) / np.log(max(pixels, 2))


def diagnose(hypotheses, courses, word_map):
    """Whether the captions differ from picture to picture, and attention from word to word.

    Args:
        hypotheses (list of lists of str): one per picture. courses (list): attention_course of each. word_map (dict).
    Returns:
        dict: distinct_captions (int), same_caption_twice (probability that two random pictures have the same caption),
        mean_length (words), vocabulary_used (share of the word map), attention_shift and attention_entropy (means of
        attention_course over all words). list of str: warnings.
    """
    n, counts = len(hypotheses), collections.Counter(map(tuple, hypotheses))
    known = word_map.keys() - {PAD, UNK, START, END}
    shifts, entropies = (np.concatenate(parts) for parts in zip(*courses))
    same = sum(count * (count - 1) for count in counts.values()) / max(n * (n - 1), 1)
    shift, entropy = shifts.sum() / max(len(shifts), 1), entropies.sum() / max(len(entropies), 1)
    warned = []
    if same > SAME_CAPTION and n >= ENOUGH_PICTURES:
        warned.append(f"many pictures get the same caption: {len(counts)} distinct captions of {n}, and two random "
                      f"pictures have the same one with probability {same:.2f}")
    if shift < STILL and len(shifts):
        warned.append(f"attention hardly moves: by {shift:.4f} of the picture's side from word to word")
    if entropy > UNIFORM:
        warned.append(f"attention is nearly uniform: its entropy is {entropy:.4f} of the maximum")
    return dict(distinct_captions=len(counts), same_caption_twice=same, mean_length=sum(map(len, hypotheses)) / n,
                vocabulary_used=len(known & set().union(*hypotheses)) / max(len(known), 1),
                attention_shift=float(shift), attention_entropy=float(entropy)), warned


def diagnose_words(hypotheses, references, seen):
    """What the words of generated captions have that people's have not.

    Args:
        hypotheses (list of lists of str): one per picture. references: see score.
        seen (set of str): training captions, normalised, without white space; None where they are not at hand.
    Returns:
        dict: bad_endings (share of the captions that end with one of BAD_ENDINGS), repeated_words (share that have some
        word twice), length_ratio (words per caption over those per reference), copied_captions (share that some
        training caption equals; not without `seen`).
    """
    n, human = len(hypotheses), [words for captions in references for words in captions]
    found = dict(bad_endings=sum(words[-1:] in [[ending] for ending in BAD_ENDINGS] for words in hypotheses) / n,
                 repeated_words=sum(len(set(words)) < len(words) for words in hypotheses) / n)
    if human:
        found["length_ratio"] = (sum(map(len, hypotheses)) / n) / (sum(map(len, human)) / len(human))
    if seen is not None:
        found["copied_captions"] = sum("".join(words) in seen for words in hypotheses) / n
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Anyone's captions


def main():
    parser = new_parser(__doc__)
    parser.add_argument("captions", help="a submission of AI Challenger or COCO, or results of eval.py (JSON)")
    parser.add_argument("references", help="annotations of AI Challenger or COCO, or results of eval.py (JSON)")
    parser.add_argument("--official", type=boolean, default=False, metavar="BOOL",
                        help="also compute the scores of AI Challenger's evaluator; needs Java (false)")
    args = parser.parse_args()
    human, ids = read_references(args.references)
    submission = read_submission(args.captions, [*human], ids)
    check_submission(submission, human)
    hypotheses = [entry.get("words") or tokenize(entry["caption"]) for entry in submission]
    references = [[tokenize(caption) for caption in human[entry["image_id"]]] for entry in submission]
    scores = scores_of_both_units(hypotheses, references)
    if args.official:
        scores |= {f"official {name}": value for name, value in official_scores(submission, human).items()}
    for name, value in {**scores, **diagnose_words(hypotheses, references, None)}.items():
        print(f"{name:>26} {value:.4f}")
    print(signature(submission, human, scores))


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({' '.join(str(error).split())})") from None


def read_references(path):
    """Human captions: AI Challenger's annotations, COCO's (as its evaluator and the contest's take), eval.py's results.

    Returns:
        dict: picture's file name -> list of str, not segmented (white space between words is removed).
        dict: COCO's id (str) -> picture's file name.
    Raises:
        UserError: not such a file; no captions.
    """
    content, human, ids = read_json(path), collections.defaultdict(list), {}
    try:
        if isinstance(content, dict) and "annotations" in content:
            ids = {str(image["id"]): str(image["file_name"]) for image in content["images"]}
            entries = [(ids[str(entry["image_id"])], entry["caption"]) for entry in content["annotations"]]
        elif isinstance(content, dict):
            entries = [(str(entry["image_id"]), entry["references"]) for entry in content["captions"]]
        else:
            entries = [(str(entry["image_id"]), entry["caption"]) for entry in content]
        for name, captions in entries:
            captions = [captions] if isinstance(captions, str) else captions
            if not isinstance(captions, list):
                raise TypeError(f"the caption of {name} is neither a sentence nor a list of sentences")
            human[name] += map(unsegmented, filter(normalise, captions))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has no references as AI Challenger, COCO or eval.py write them "
                        f"({type(error).__name__}: {error})") from None
    human = {name: captions for name, captions in human.items() if captions}
    if not human:
        raise UserError(f"{path} has no references")
    return human, {number: name for number, name in ids.items() if name in human}


def read_submission(path, file_names, ids):
    """Generated captions: a list of image_id and caption, as AI Challenger and COCO take it, or eval.py's results.

    Args: path. file_names (list of str), ids (dict): of the references, see read_references.
    Returns: list of dict: image_id (str: file name), caption (str, not segmented), and words where the file has them.
    Raises: UserError: not such a file; pictures named in two ways.
    """
    content = read_json(path)
    entries = content.get("captions") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path} is not a list of image_id and caption, nor the results of eval.py")
    pictures = find_pictures([entry.get("image_id", "") for entry in entries], file_names, ids)
    found = []
    for picture, entry in zip(pictures, entries):
        found.append(dict(image_id=picture, caption=entry.get("caption")))
        if isinstance(content, dict) and "words" in entry:
            found[-1]["words"] = list(filter(None, map(normalise, entry["words"])))
    return found


def find_pictures(image_ids, file_names, ids):
    """The pictures that a submission names: all by file name, with or without suffix, or all by COCO's id.

    A number may be one picture's name and another's id. Where both ways fit, strings are names and numbers are ids.

    Args: image_ids (list of str or int). file_names (list of str), ids (dict): see read_submission.
    Returns: list of str: file names; what is unknown as it is. Raises: UserError: neither way fits all that is known.
    """
    given = [*map(str, image_ids)]
    known = dict(zip(short_names(file_names), file_names)) | {name: name for name in file_names}
    by_name = [known.get(name) or known.get(short) for name, short in zip(given, short_names(given))]
    by_id = [ids.get(number) for number in given]
    are_numbers = {isinstance(image_id, int) for image_id in image_ids}
    ways = [by_id, by_name] if are_numbers == {True} else [by_name, by_id]
    doubtful = len(are_numbers) == 2 and any(one and other and one != other for one, other in zip(*ways))
    for way, other_way in (ways, ways[::-1]):
        if not doubtful and all(one or not other for one, other in zip(way, other_way)):
            return [picture or name for picture, name in zip(way, given)]
    raise UserError("the submission names some pictures by file name and others by COCO's id: use one of the two")


def signature(submission, human, scores):
    """All that the scores depend on besides the captions, in a line to be quoted with them. Returns: str."""
    version, counts = importlib.metadata.version, [len(human[entry["image_id"]]) for entry in submission]
    own = sum("words" in entry for entry in submission)
    parts = dict(
        pictures=len(submission), references=f"{min(counts)} to {max(counts)} per picture",
        tokens=f"jieba {version('jieba')} exact mode, without 。, white space and invisible characters, "
               "no PTB, captions "
               + ("as the model wrote them" if own == len(submission) else "segmented anew"),
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
