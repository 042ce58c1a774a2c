"""Scores of captions: BLEU, ROUGE-L, CIDEr, METEOR, AI Challenger's evaluator; and checks for a collapsed model.

`score` needs no Java; training chooses its best checkpoint by it. METEOR and AI Challenger's evaluator run the jars of
pycocoevalcap with the `java` on the PATH, for at most JAVA_SECONDS.
"""
import collections
import re
import subprocess
import tempfile
import warnings
from pathlib import Path

import numpy as np
from nltk.translate.bleu_score import corpus_bleu
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor import meteor as meteor_module
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer

from datasets import END, PAD, START, UNK, tokenize
from utils import UserError, write_text

JAVA_SECONDS = 300  # METEOR of 30,000 pictures takes a tenth of that
# Thresholds for a warning. Two random pictures hardly ever deserve the same caption, while a model with ten captions
# used equally often gives it to one pair in ten, however many pictures there are. Few pictures prove nothing.
SAME_CAPTION, ENOUGH_PICTURES = 0.1, 20
STILL = 0.01  # of the picture's side: a seventh of one of 14 cells
UNIFORM = 0.99  # of the entropy of a uniform map: as if spread evenly over 186 of 196 pixels


def score(hypotheses, references):
    """BLEU-1 to 4 (nltk, corpus level, closest reference length), ROUGE-L and CIDEr-D (pycocoevalcap).

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
    scores = {f"BLEU-{n}": float(value) for n, value in zip((1, 2, 3, 4), bleu)}
    scores["ROUGE-L"] = float(Rouge().compute_score(human, generated)[0])
    scores["CIDEr"] = float(Cider().compute_score(human, generated)[0])
    return scores


def join_words(hypotheses, references):
    """The input of pycocoevalcap. Args: see score. Returns: two dicts, picture -> sentences: human, generated."""
    human = {i: [" ".join(words) for words in captions] for i, captions in enumerate(references) if captions}
    return human, {i: [" ".join(hypotheses[i])] for i in human}


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


def ptb_tokenize(captions):
    """Segment captions as AI Challenger's evaluator does: without 。, jieba's exact mode, Stanford's PTB tokenizer.

    That makes letters lower case and drops ASCII punctuation, except brackets: they come as -lrb-, while the list of
    tokens to drop has -LRB-. The wrapper in pycocoevalcap has no timeout and writes into its own package.

    Args: captions (list of str). Returns: list of lists of str. Raises: UserError: Java is missing or fails.
    """
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    lines = run_java("-cp", jar, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding",
                     "UTF-8", text="\n".join(" ".join(tokenize(caption)) for caption in captions)).split("\n")
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
    for entry in submission:
        texts = [entry.get("image_id"), entry.get("caption")] if isinstance(entry, dict) else [None]
        if not all(isinstance(text, str) and text for text in texts):
            raise UserError(f"the submission has an entry without image_id or caption: {entry}")
    counts = collections.Counter(entry["image_id"] for entry in submission)
    for fault, ids in (("missing", references.keys() - counts.keys()), ("unknown", counts.keys() - references.keys()),
                       ("repeated", [image_id for image_id, count in counts.items() if count > 1])):
        if ids:
            raise UserError(f"the submission has {len(ids)} {fault} pictures, such as {min(ids)}")
    hypotheses = ptb_tokenize([entry["caption"] for entry in submission])
    tokens = iter(ptb_tokenize([caption for image_id in counts for caption in references[image_id]]))
    human = [[next(tokens) for _ in references[image_id]] for image_id in counts]
    # If no n-gram matches, nltk's BLEU is 0 and this one almost 0.
    bleu, _ = Bleu(4).compute_score(*join_words(hypotheses, human), verbose=0)
    return {**score(hypotheses, human), **{f"BLEU-{n}": value for n, value in enumerate(bleu, 1)},
            **meteor(hypotheses, human)}


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
    entropy = -(alphas * np.log(np.maximum(alphas, 1e-30))).sum(axis=(1, 2)) / np.log(max(len(positions) ** 2, 2))
    return np.linalg.norm(np.diff(centres, axis=0), axis=1), entropy


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
