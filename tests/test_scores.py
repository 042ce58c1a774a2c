"""Scores over words, characters, and AI Challenger's; a broken Java; how a bad model is noticed."""
import json
import shutil
import sys
import time

import numpy as np
import pytest
from common import call, error_line

import scores
from datasets import tokenize
from scores import (attention_course, characters, diagnose, diagnose_words, meteor,
                    official_scores, ptb_tokenize, score)
from utils import UserError

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")

# Made up, with marks, Latin letters, a repeated line and different numbers of references.
REFERENCES = {
    "a": ["一个穿着红色T恤的男人在草地上踢足球。",
          "绿色的草地上有一个男人（穿着红色上衣）在踢球",
          "草地上有1个踢足球的男人"],
    "b": ["两个女人坐在海边的椅子上,看着大海", "海边的沙滩上坐着两个戴帽子的女人。"],
    "c": ["一只黑色的狗在雪地里奔跑", "一只黑色的狗在雪地里奔跑",
          "雪地里有一只奔跑的狗。", "A dog在雪地里"],
    "d": ["房间里有一个(穿着西装)的男人在讲话。"]}
SUBMISSION = [
    dict(image_id="c", caption="一只黑色的狗在草地上奔跑。"),
    dict(image_id="a", caption=" 草地上有一个穿着红色t恤的男人在踢足球。"),
    dict(image_id="d", caption="一个穿着西装的男人在讲话"),
    dict(image_id="b", caption="两个戴帽子的女人坐在海边的沙滩上！")]
SENTENCES = ["一个男人在草地上跑步", "两只小狗在沙滩上玩耍", "水里有三个穿着红色T恤的女人"]


def test_scores_over_characters_do_not_depend_on_the_segmentation():
    words = ["一个", "T恤", "CD机", "2000", "年", "（", "iphone6", "é"]
    assert characters(words) == [
        "一", "个", "T", "恤", "CD", "机", "2000", "年", "（", "iphone", "6", "é"]
    human = [[["一个", "男人", "在", "踢足球"], ["男人", "踢球"]],
             [["两个", "女人", "坐在", "海边"]]]
    one = [["男人", "踢足球"], ["女人", "在", "海边"]]
    other = [["男", "人踢", "足球"], ["女人在", "海", "边"]]
    assert score(one, human) != score(other, human)
    human = [[characters(words) for words in captions] for captions in human]
    assert score([*map(characters, one)], human) == score([*map(characters, other)], human)


def test_without_references_there_is_nothing_to_score(capsys):
    assert score([["一个"]], [[]]) == meteor([["一个"]], [[]]) == {}
    assert not capsys.readouterr().out


# ---- Java ----------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="the broken java is a script")
@pytest.mark.parametrize("code, reason", [
    (None, "install"),
    ("import time; time.sleep(60)", "timed out after 0.3 s"),
    ("import sys; sys.exit('line one\\nno such machine')", "exit code 1 (no such machine)"),
    ("print('0.5 is\\nmy\\nscore')", "java"),
], ids=["none", "hangs", "fails", "babbles"])
def test_a_broken_java_costs_meteor_only(code, reason, tmp_path, monkeypatch, capsys):
    if code:
        java = tmp_path / "java"
        java.write_text(f"#!{sys.executable} -IS\n{code}\n")
        java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(scores, "JAVA_SECONDS", 0.3 if "timed out" in reason else 60)
    started = time.monotonic()
    assert meteor([["一个", "人"]], [[["一个", "男人"]]]) == {}
    printed, = capsys.readouterr().out.splitlines()
    assert printed.startswith("METEOR is left out: ") and reason in printed
    with pytest.raises(UserError) as error:
        ptb_tokenize(["一个人"])
    assert reason in str(error.value) and "\n" not in str(error.value)
    assert time.monotonic() - started < 30


@needs_java
def test_tokenization_of_the_official_evaluator():
    """The expected words are those of pycocoevalcap 1.2's PTBTokenizer, given jieba's."""
    expected = {
        "你好，世界！真的吗？": "你好 ， 世界 ！ 真的 吗 ？",
        "(一个人)[两个]{三个}": "-lrb- 一个 人 -rrb- -lsb- 两个 -rsb- -lcb- 三个 -rcb-",
        "（一个人）【二】《书》「引」": "（ 一个 人 ） 二 书 引",
        "一个人,两个人.三个人;四个人!六个人?": "一个 人 两个 人 三个 人 四个 人 六个 人",
        "“引”‘单’\"x\"'y'`z`": "引 单 x y z",
        "a-b -- c…d...e——f～g、h": "a b c d e f ～ g 、 h",
        "T恤和CD机 iPhone6": "t恤 和 cd机 iphone6",
        "a\u2028b\x0bc\r\nd\u3000e": "a b c d e",  # one caption, whatever its line separators
        "。": "",
        "一个 男 人。": "一个 男 人",  # as it is: nothing else is left out or joined
        "最后": "最后",
    }
    assert dict(zip(expected, map(" ".join, ptb_tokenize(list(expected))))) == expected


@needs_java
def test_the_official_scores_are_those_of_the_official_pipeline():
    """pycocoevalcap 1.2: PTBTokenizer, then Bleu, Meteor, Rouge and Cider."""
    expected = {"BLEU-1": 0.797508257, "BLEU-2": 0.715925793, "BLEU-3": 0.625276449,
                "BLEU-4": 0.501233737, "METEOR": 0.492436919, "ROUGE-L": 0.684514999,
                "CIDEr": 3.185582254}
    expected = {f"official {name}": value for name, value in expected.items()}
    assert official_scores(SUBMISSION, REFERENCES) == pytest.approx(expected, abs=5e-7)


# ---- Anyone's captions ---------------------------------------------------------------------------


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """Calls scores.py with captions and references (for JSON), without Java."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def run(captions, references, *flags, check=0):
        paths = tmp_path / "captions.json", tmp_path / "references.json"
        for path, content in zip(paths, (captions, references)):
            path.write_text(json.dumps(content), encoding="utf-8")
        return call(scores.main, *paths, *flags, check=check)
    return run


@pytest.fixture
def refused(scored):
    def run(captions, references, message):
        done = scored(captions, references, check=2)
        assert message in error_line(done.err) and not done.out
    return run


def listed(file_names, strewn_with=""):
    """SENTENCES as annotations of AI Challenger."""
    return [dict(image_id=name, caption=[strewn_with.join(text)])
            for name, text in zip(file_names, SENTENCES)]


def coco_of(captions):
    """Captions by file name in COCO's format; the pictures' ids count from 0."""
    return dict(images=[dict(id=i, file_name=name) for i, name in enumerate(captions)],
                annotations=[dict(image_id=i, caption=text)
                             for i, texts in enumerate(captions.values()) for text in texts])


def coco_named(*file_names):
    return coco_of({name: [text] for name, text in zip(file_names, SENTENCES)})


def written_by(program):
    """SUBMISSION and REFERENCES in the program's format."""
    if program == "contest":  # file_name has no suffix; every picture is there once per caption
        coco = coco_of({name: [" ".join(tokenize(text)) for text in texts]
                        for name, texts in REFERENCES.items()})
        return SUBMISSION, dict(coco, images=coco["images"] * 2)
    if program == "coco":
        return ([dict(entry, image_id="abcd".index(entry["image_id"])) for entry in SUBMISSION],
                coco_of({f"{name}.jpg": texts for name, texts in REFERENCES.items()}))
    if program == "annotations":
        return SUBMISSION, [dict(url="", image_id=f"{name}.jpg", caption=[*texts, ""])
                            for name, texts in REFERENCES.items()]
    results = dict(captions=[dict(image_id=f"{entry['image_id']}.jpg", caption=entry["caption"],
                                  words=tokenize(entry["caption"]),
                                  references=REFERENCES[entry["image_id"]])
                             for entry in SUBMISSION])
    return results, results


@pytest.mark.parametrize("program", ["contest", "coco", "annotations", "eval.py"])
def test_anyones_captions_are_scored(program, scored):
    *lines, signature = scored(*written_by(program)).out.splitlines()
    printed = dict(line.strip().rsplit(maxsplit=1) for line in lines if line.startswith(" "))
    expected = score([tokenize(entry["caption"]) for entry in SUBMISSION],
                     [[*map(tokenize, REFERENCES[entry["image_id"]])] for entry in SUBMISSION])
    assert printed.items() >= {name: f"{value:.4f}" for name, value in expected.items()}.items()
    assert "pictures: 4 | references: 1 to 4 per picture | tokens: jieba" in signature
    assert ("as the model wrote them" in signature) == (program == "eval.py")


def test_the_official_scores_of_anyones_captions(scored, monkeypatch):
    monkeypatch.setattr(scores, "ptb_tokenize", lambda captions: list(map(str.split, captions)))
    done = scored(*written_by("contest"), "--official", "true")
    expected = official_scores(SUBMISSION, REFERENCES)
    assert f"official CIDEr {expected['official CIDEr']:.4f}" in done.out
    assert "PTB" in done.out.splitlines()[-1]


@pytest.mark.parametrize("image_ids, references", [
    (["a", "b", "c"], listed(["a.webp", "b.TIF", "c.bmp"])),
    (["a.jpg", "b.bmp", "c.v2"], listed(["a", "b", "c.v2"])),
    (["cat.jpg", "cat.png", "cat.png.jpg"], listed(["cat.jpg", "cat.png", "cat.png.jpg"])),
    ([3, 1, 2], listed([3, 1, 2])),
    # The ids of these three are 0, 1, 2: some numbers are one picture's name and another's id.
    (["1.jpg", "2.jpg", "0.jpg"], coco_named("1.jpg", "2.jpg", "0.jpg")),
    (["1", "2", "0"], coco_named("1.jpg", "2.jpg", "0.jpg")),
    ([0, 1, 2], coco_named("1.jpg", "2.jpg", "0.jpg")),
    ([1, 2, 3], coco_named("1.jpg", "2.jpg", "3.jpg")),
    (["0", "1", "2"], coco_named("1.jpg", "2.jpg", "3.jpg")),
], ids=str)
def test_a_caption_is_scored_against_its_own_picture(image_ids, references, scored):
    captions = [dict(image_id=name, caption=text) for name, text in zip(image_ids, SENTENCES)]
    assert "BLEU-4 1.0000" in scored(captions[::-1], references).out


COCO = coco_named("1.jpg", "2.jpg", "3.jpg")


@pytest.mark.parametrize("image_ids, references, message", [
    (["1", "2"], COCO, "1 missing pictures, such as 3.jpg"),
    (["1", "2", "3", "1.jpg"], COCO, "1 repeated pictures, such as 1.jpg"),
    (["1", "2", "3", "4"], COCO, "1 unknown pictures, such as 4"),
    (["0", "3"], COCO, "by file name and others by COCO's id"),
    ([0, "2.jpg"], COCO, "by file name and others by COCO's id"),
    ([1, "0"], coco_named("1.jpg", "0.jpg"), "by file name and others by COCO's id"),
    (["cat"], coco_named("cat.jpg", "cat.png"), "missing pictures"),
    (["a.jpg", "a.png"], coco_named("a.jpg", "b.jpg"), "missing pictures"),
    (["1"], dict(COCO, images=[]), "has no references as AI Challenger, COCO or eval.py"),
    (["1"], dict(COCO, annotations=[]), "references.json has no references"),
])
def test_a_picture_is_never_taken_for_another(image_ids, references, message, refused):
    refused([dict(image_id=image_id, caption="人") for image_id in image_ids], references, message)


def test_captions_that_are_no_list_of_captions_are_refused(refused):
    refused([dict(image_id="1", caption="人"), "人"], COCO, "is not a list of image_id and caption")


@pytest.mark.parametrize("nothing", [" ", "\u200b", "\ud83d", "\ufeff\t"], ids=ascii)
def test_equal_sentences_score_alike_whatever_nobody_sees_in_them(nothing, scored):
    plain = [dict(image_id=name, caption=text)
             for name, text in zip("abc", SENTENCES[1:] + SENTENCES[:1])]
    strewn = [dict(entry, caption=nothing.join(entry["caption"] + "。")) for entry in plain]
    expected = scored(plain, listed("abc"))
    assert scored(strewn, listed("abc")) == scored(plain, listed("abc", nothing)) == expected


@pytest.mark.parametrize("text", ["", " ", "。", "\u200b", "\ud83d", " 。\ufeff"], ids=ascii)
def test_a_caption_of_nothing_is_refused(text, refused):
    captions = [dict(image_id="a", caption="人"), dict(image_id="b", caption=text)]
    refused(captions, listed("ab"), "without image_id or caption")
    references = [dict(image_id="a", caption=text)]
    refused(captions[:1], references, "references.json has no references")


@pytest.mark.parametrize("captions", [
    {"zh": "人"}, [{"zh": "人"}], ["人", None], None, 3, [["人"]]], ids=str)
def test_references_that_are_no_sentences_are_refused(captions, refused):
    for references in ([dict(image_id="a.jpg", caption=captions)],
                       dict(captions=[dict(image_id="a.jpg", references=captions)])):
        submission = [dict(image_id="a", caption="人")]
        refused(submission, references, "references.json has no references as")


def test_why_cider_is_0_where_it_must_be(scored):
    captions = [dict(image_id=name, caption=text) for name, text in zip("ab", SENTENCES)]
    for n in (1, 2):
        printed = scored(captions[:n], listed("ab"[:n])).out
        assert ("CIDEr of a single picture is 0" in printed) == (n == 1)
        assert ("CIDEr 0.0000" in printed) == (n == 1)


def test_a_file_that_is_not_json(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff{")
    for path in (tmp_path / "x.json", tmp_path / "none.json"):
        done = call(scores.main, path, path, check=2)
        assert "cannot be read as JSON" in error_line(done.err)


# ---- A collapsed model ---------------------------------------------------------------------------


POSITIONS = (np.arange(14) + 0.5) / 14
SAME = [["甲", "乙", "丙"]]
DIFFERENT = [[a, b, c] for a in "甲乙丙" for b in "甲乙丙" for c in "甲乙丙"]


def peak(row, column, height=0.9):
    """A map with `height` of its attention in one cell and the rest evenly everywhere."""
    alpha = np.full((14, 14), (1 - height) / 196, np.float32)
    alpha[row, column] += height
    return alpha


def test_attention_course():
    shift, entropy = attention_course(np.stack([peak(0, 0, 1), peak(0, 13, 1), peak(7, 13, 1)]),
                                      POSITIONS)
    assert shift == pytest.approx([13 / 14, 7 / 14], abs=1e-6)
    assert entropy == pytest.approx([0] * 3, abs=1e-6)
    shift, entropy = attention_course(np.stack([peak(0, 0, 0), peak(0, 13, 0)]), POSITIONS)
    assert shift == pytest.approx([0], abs=1e-6) and entropy == pytest.approx([1, 1], abs=1e-6)


MOVING = [peak(3, 3), peak(9, 4), peak(5, 10)]


def diagnosis(captions, alphas):
    words = ["<pad>", *"甲乙丙丁", "<unk>", "<start>", "<end>"]
    course = attention_course(np.reshape(alphas, (-1, 14, 14)), POSITIONS)
    return diagnose(captions, [course] * len(captions), {word: i for i, word in enumerate(words)})


@pytest.mark.parametrize("captions, are_noticed", [
    (SAME * 100, True), (SAME * 40 + DIFFERENT * 3, True), (DIFFERENT[:7] * 15, True),
    (DIFFERENT, False), (DIFFERENT * 1000, False), (DIFFERENT * 2 + SAME * 5, False),
    (SAME * 4, False), (SAME, False),
])
def test_captions_that_collapse_are_noticed(captions, are_noticed):
    numbers, warnings = diagnosis(captions, MOVING)
    assert len(warnings) == are_noticed
    said = f"same caption: {numbers['distinct_captions']} distinct captions of {len(captions)}"
    assert all(said in warning for warning in warnings)


def test_numbers_of_the_diagnosis():
    numbers, _ = diagnosis([["甲", "乙"], ["甲", "乙"], ["甲"], ["甲", "<unk>", "乙"]], MOVING)
    assert numbers["distinct_captions"] == 3 and numbers["mean_length"] == 2
    assert numbers["same_caption_twice"] == pytest.approx(1 / 6)
    assert numbers["vocabulary_used"] == 2 / 4
    numbers, _ = diagnosis([[]] * 30, [])
    assert numbers["mean_length"] == numbers["attention_shift"] == 0, "of empty captions"

    captions = [["一个", "人"], ["草地", "上", "的"], ["狗", "和", "狗"], []]
    references = [[["一个", "男人"]], [["草地"], ["草地", "上", "的"]], [], []]
    assert diagnose_words(captions, references, {"一个人", "狗和狗", "狗"}) == dict(
        bad_endings=1 / 4, repeated_words=1 / 4, length_ratio=2 / 2, copied_captions=2 / 4)
    assert diagnose_words(captions, [[]] * 4, None).keys() == {"bad_endings", "repeated_words"}
