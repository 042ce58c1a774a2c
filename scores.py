"""From words to numbers: BLEU, ROUGE-L, CIDEr, METEOR, and AI Challenger's evaluator.

`score` needs no Java and is what training chooses its best checkpoint by. METEOR and AI Challenger's evaluator run the
jars that pycocoevalcap brings, by the `java` that is on the PATH, and never for longer than JAVA_SECONDS.
"""
import collections
import re
import subprocess
import tempfile
import warnings
from pathlib import Path

from nltk.translate.bleu_score import corpus_bleu
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor import meteor as meteor_module
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer

from config import UserError
from datasets import tokenize, write_text

JAVA_SECONDS = 300  # METEOR of 30,000 pictures takes a tenth of that


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
    human, generated = join_words(hypotheses, references)
    scores = {f"BLEU-{n}": float(value) for n, value in zip((1, 2, 3, 4), bleu)}
    scores["ROUGE-L"] = float(Rouge().compute_score(human, generated)[0])
    scores["CIDEr"] = float(Cider().compute_score(human, generated)[0])
    return scores


def join_words(hypotheses, references):
    """What pycocoevalcap takes. Args: as of score. Returns: two dicts, picture -> sentences: human, generated."""
    human = {i: [" ".join(words) for words in captions] for i, captions in enumerate(references) if captions}
    return human, {i: [" ".join(hypotheses[i])] for i in human}


def characters(words):
    """Words cut into characters; a run of Latin letters, or of digits, stays one. Returns: list of str."""
    return re.findall(r"[A-Za-z]+|[0-9]+|\S", " ".join(words))


# ---------------------------------------------------------------------------------------------------------------------
# What needs Java: METEOR and AI Challenger's evaluator


def run_java(*arguments, text=""):
    """What `java` answers. Args: of the command; text (str): its standard input. Returns: str.

    Raises: UserError: Java is missing, fails, or takes more than JAVA_SECONDS.
    """
    try:
        done = subprocess.run(["java", *map(str, arguments)], input=text, capture_output=True, encoding="utf-8",
                              errors="replace", timeout=JAVA_SECONDS)
    except OSError as error:
        raise UserError(f"java cannot be run ({error.strerror}): install a Java runtime, 8 or later") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"java did not finish within {JAVA_SECONDS} s: try `java -version`") from None
    if done.returncode:
        reason = (done.stderr.splitlines() or ["it does not say why"])[-1]
        raise UserError(f"java failed with exit code {done.returncode} ({reason[:200]}): try `java -version`")
    return done.stdout


def meteor(hypotheses, references):
    """METEOR 1.5 for English, normalised: the very Java of pycocoevalcap, whose dialogue with it can wait for ever.

    Normalising cuts Chinese into single characters, so this score does not depend on how words are cut.

    Args: as of score. Returns: dict: METEOR -> float; empty without references, or where Java fails, which is printed.
    """
    human, generated = join_words(hypotheses, references)
    if not human:
        return {}
    jar = Path(meteor_module.__file__).with_name(meteor_module.METEOR_JAR)
    most = max(map(len, human.values()))
    try:
        with tempfile.TemporaryDirectory() as folder:
            paths = Path(folder, "generated"), Path(folder, "human")
            write_text(paths[0], "".join(f"{caption}\n" for caption, in generated.values()))
            # Each picture must have as many references. The best one counts, so one of them again changes nothing.
            write_text(paths[1], "".join(f"{line}\n" for lines in human.values() for line in (lines * most)[:most]))
            answer = run_java("-Xmx2G", "-jar", jar, *paths, "-l", "en", "-norm", "-q", "-r", most).strip()
        if not re.fullmatch(r"\d\.\d+(E-\d+)?", answer):
            raise UserError(f"java answered {answer[:80]!r}")
        return {"METEOR": float(answer)}
    except (UserError, OSError) as error:
        print(f"no METEOR: {error}")
        return {}


def ptb_tokenize(captions):
    """Cut captions as AI Challenger's evaluator does: 。 deleted, jieba's exact mode, then Stanford's PTB tokenizer.

    That lowers the case; ASCII's marks are then dropped, but not its brackets: they come as -lrb-, the list of what to
    drop has -LRB-. The very Java of pycocoevalcap, which waits for ever and writes into its own package.

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

    It took references already cut into words. Those published with it are what jieba's exact mode makes of them, so
    here they are cut as the captions are.

    Args:
        submission (list of dict): image_id (str, without .jpg), caption (str, not cut).
        references (dict): image_id -> list of str, not cut, at least one.
    Returns:
        dict: BLEU-1 to 4, ROUGE-L, CIDEr, METEOR -> float; without METEOR where Java fails there, which is printed.
    Raises:
        UserError: what the evaluator refused: a picture missing, unknown or repeated, an empty entry; or Java fails.
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
    # Where no n-gram fits, nltk's BLEU is 0 and this one is not quite.
    bleu, _ = Bleu(4).compute_score(*join_words(hypotheses, human), verbose=0)
    return {**score(hypotheses, human), **{f"BLEU-{n}": value for n, value in enumerate(bleu, 1)},
            **meteor(hypotheses, human)}
