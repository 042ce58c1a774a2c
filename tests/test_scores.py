"""Scores over words, over characters, and AI Challenger's; what a broken Java costs; how a bad model is noticed."""
import json
import shutil
import sys
import time

import numpy as np
import pytest
from common import call, error_line

import scores
from datasets import tokenize
from scores import (attention_course, characters, diagnose, diagnose_words, meteor, official_scores, ptb_tokenize,
                    score)
from utils import UserError

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")

# Made up, with marks, Latin letters, a repeated line and different numbers of references.
REFERENCES = {
    "a": ["一个穿着红色T恤的男人在草地上踢足球。", "绿色的草地上有一个男人（穿着红色上衣）在踢球",
          "草地上有1个踢足球的男人"],
    "b": ["两个女人坐在海边的椅子上,看着大海", "海边的沙滩上坐着两个戴帽子的女人。"],
    "c": ["一只黑色的狗在雪地里奔跑", "一只黑色的狗在雪地里奔跑", "雪地里有一只奔跑的狗。", "A dog在雪地里"],
    "d": ["房间里有一个(穿着西装)的男人在讲话。"]}
SUBMISSION = [dict(image_id=name, caption=caption) for name, caption in (
    ("c", "一只黑色的狗在草地上奔跑。"), ("a", " 草地上有一个穿着红色t恤的男人在踢足球。"),
    ("d", "一个穿着西装的男人在讲话"), ("b", "两个戴帽子的女人坐在海边的沙滩上！"))]


def test_scores_over_characters_do_not_depend_on_the_segmentation():
    assert characters(["一个", "T恤", "CD机", "2000", "年", "（", "iphone6", "é"]) == [
        "一", "个", "T", "恤", "CD", "机", "2000", "年", "（", "iphone", "6", "é"]
    human = [[["一个", "男人", "在", "踢足球"], ["男人", "踢球"]], [["两个", "女人", "坐在", "海边"]]]
    one, other = [["男人", "踢足球"], ["女人", "在", "海边"]], [["男", "人踢", "足球"], ["女人在", "海", "边"]]
    assert score(one, human) != score(other, human)
    human = [[characters(words) for words in captions] for captions in human]
    assert score(list(map(characters, one)), human) == score(list(map(characters, other)), human)


@pytest.mark.skipif(sys.platform == "win32", reason="the broken java is a script")
@pytest.mark.parametrize("code, reason", [
    (None, "install"), ("import time; time.sleep(60)", "timed out after 0.3 s"),
    ("import sys; sys.exit('line one\\nno such virtual machine')", "exit code 1 (no such virtual machine)"),
    ("print('0.5 is\\nmy\\nscore')", "java"), ("import os; os.kill(os.getpid(), 9)", "exit code -9")],
    ids=["none", "hangs", "fails", "babbles", "is killed"])
def test_a_broken_java_costs_meteor_only(code, reason, tmp_path, monkeypatch, capsys):
    if code:
        java = tmp_path / "java"
        java.write_text(f"#!{sys.executable} -IS\n{code}\n")
        java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(scores, "JAVA_SECONDS", 0.3 if reason.startswith("timed out") else 60)
    started = time.monotonic()
    assert meteor([["一个", "人"]], [[["一个", "男人"]]]) == {}
    printed, = capsys.readouterr().out.splitlines()
    assert printed.startswith("METEOR is left out: ") and reason in printed
    with pytest.raises(UserError) as error:
        ptb_tokenize(["一个人"])
    assert reason in str(error.value) and "\n" not in str(error.value)
    assert time.monotonic() - started < 30


def test_without_references_there_is_nothing_to_score(capsys):
    assert score([["一个"]], [[]]) == meteor([["一个"]], [[]]) == {}
    assert not capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# With Java. The expected values were made by pycocoevalcap 1.2: PTBTokenizer, then Bleu, Meteor, Rouge and Cider, of
# the captions stripped, without 。 and segmented by jieba's exact mode.


@needs_java
def test_tokenization_of_the_official_evaluator():
    expected = {
        "一个穿着红色衣服的人。": "一个 穿着 红色 衣服 的 人",
        "你好，世界！真的吗？": "你好 ， 世界 ！ 真的 吗 ？",
        "(一个人)[两个]{三个}": "-lrb- 一个 人 -rrb- -lsb- 两个 -rsb- -lcb- 三个 -rcb-",
        "（一个人）【二】《书》「引」": "（ 一个 人 ） 二 书 引",
        "一个人,两个人.三个人;四个人:五个人!六个人?": "一个 人 两个 人 三个 人 四个 人 五个 人 六个 人",
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
    expected = {"BLEU-1": 0.797508257, "BLEU-2": 0.715925793, "BLEU-3": 0.625276449, "BLEU-4": 0.501233737,
                "METEOR": 0.492436919, "ROUGE-L": 0.684514999, "CIDEr": 3.185582254}
    assert official_scores(SUBMISSION, REFERENCES) == pytest.approx(expected, abs=5e-7)


# ---------------------------------------------------------------------------------------------------------------------
# Anyone's captions


def formats(kind):
    """The same captions and references, as several programs write them. Returns: captions, references (for JSON)."""
    ids = {name: 1000 + i for i, name in enumerate(REFERENCES)}
    annotations = [dict(id=i, image_id=ids[name], caption=" ".join(tokenize(text)))
                   for i, (name, text) in enumerate((name, text) for name in REFERENCES for text in REFERENCES[name])]
    coco = dict(images=[dict(id=number, file_name=f"{name}.jpg") for name, number in ids.items()],
                annotations=annotations)
    if kind == "contest":  # file_name has no suffix; every picture is there once per caption
        return SUBMISSION, dict(images=[dict(id=ids[name], file_name=name) for name in ids for _ in "12"],
                                annotations=annotations)
    if kind == "coco":
        return [dict(image_id=ids[entry["image_id"]], caption=entry["caption"]) for entry in SUBMISSION], coco
    if kind == "annotations":
        return SUBMISSION, [dict(url="", image_id=f"{name}.jpg", caption=[*texts, ""])
                            for name, texts in REFERENCES.items()]
    results = dict(captions=[dict(image_id=f"{entry['image_id']}.jpg", caption=entry["caption"],
                                  words=tokenize(entry["caption"]), references=REFERENCES[entry["image_id"]])
                             for entry in SUBMISSION])
    return results, results


def run_scores(folder, captions, references, *flags):
    for name, content in (("captions", captions), ("references", references)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return call(scores.main, folder / "captions.json", folder / "references.json", *flags, check=None)


@pytest.mark.parametrize("kind", ["contest", "coco", "annotations", "results"])
def test_anyones_captions_are_scored(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no Java
    result = run_scores(tmp_path, *formats(kind))
    assert result.code == 0, result
    printed = dict(line.rsplit(maxsplit=1) for line in result.out.splitlines() if line.startswith(" "))
    expected = score([tokenize(entry["caption"]) for entry in SUBMISSION],
                     [[*map(tokenize, REFERENCES[entry["image_id"]])] for entry in SUBMISSION])
    assert {name.strip(): float(value) for name, value in printed.items()}.items() >= {
        name: round(value, 4) for name, value in expected.items()}.items()
    signature = result.out.splitlines()[-1]
    assert "pictures: 4 | references: 1 to 4 per picture | tokens: jieba" in signature
    assert ("as the model wrote them" in signature) == (kind == "results")


@pytest.mark.parametrize("change, message", [
    (lambda captions, references: captions.pop(), "1 missing pictures, such as b"),
    (lambda captions, references: captions.append(captions[0]), "1 repeated pictures, such as c"),
    (lambda captions, references: captions.append(dict(image_id=3, caption="人")), "1 unknown pictures, such as 3"),
    (lambda captions, references: captions[0].update(caption=""), "without image_id or caption"),
    (lambda captions, references: captions.append("人"), "is not a list of image_id and caption"),
    (lambda captions, references: references.pop("images"), "has no references as AI Challenger, COCO or eval.py"),
    (lambda captions, references: references["annotations"].clear(), "references.json has no references"),
])
def test_what_cannot_be_scored_is_refused(change, message, tmp_path):
    captions, references = json.loads(json.dumps(formats("coco")))
    captions = [dict(image_id=entry["image_id"], caption=entry["caption"]) for entry in SUBMISSION]
    change(captions, references)
    result = run_scores(tmp_path, captions, references)
    assert result.code == 2 and message in error_line(result.err) and not result.out


SENTENCES = ["一个男人在草地上跑步", "两只小狗在沙滩上玩耍", "水里有三个穿着红色T恤的女人"]


def coco_of(file_names, first_id=0):
    """References in COCO's format: SENTENCES, whose ids count from first_id."""
    return dict(images=[dict(id=first_id + i, file_name=name) for i, name in enumerate(file_names)],
                annotations=[dict(image_id=first_id + i, caption=SENTENCES[i]) for i in range(len(file_names))])


def listed(file_names, strewn_with=""):
    return [dict(image_id=name, caption=[strewn_with.join(text)]) for name, text in zip(file_names, SENTENCES)]


@pytest.mark.parametrize("image_ids, references", [
    (["a", "b", "c"], listed(["a.webp", "b.TIF", "c.bmp"])), (["a.jpg", "b.bmp", "c.v2"], listed(["a", "b", "c.v2"])),
    (["cat.jpg", "cat.png", "cat.png.jpg"], listed(["cat.jpg", "cat.png", "cat.png.jpg"])),
    ([3, 1, 2], listed([3, 1, 2])),
    (["2.jpg", "3.jpg", "1.jpg"], coco_of(["2.jpg", "3.jpg", "1.jpg"], 1)),
    (["2", "3", "1"], coco_of(["2.jpg", "3.jpg", "1.jpg"], 1)), ([1, 2, 3], coco_of(["2.jpg", "3.jpg", "1.jpg"], 1)),
    *((image_ids, coco_of(["1.jpg", "2.jpg", "3.jpg"])) for image_ids in (
        ["1.jpg", "2.jpg", "3.jpg"], ["1", "2", "3"], [1, 2, 3], ["0", "1", "2"], [0, 1, 2])),
])
def test_a_caption_is_scored_against_its_own_picture(image_ids, references, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no Java
    captions = [dict(image_id=image_id, caption=text) for image_id, text in zip(image_ids, SENTENCES)]
    result = run_scores(tmp_path, captions[::-1], references)
    assert "BLEU-4 1.0000" in result.out, result


@pytest.mark.parametrize("image_ids, file_names, message", [
    (["0", "3"], ["1.jpg", "2.jpg", "3.jpg"], "by file name and others by COCO's id"),
    ([0, "b.jpg"], ["a.jpg", "b.jpg"], "by file name and others by COCO's id"),
    ([1, "0"], ["1.jpg", "0.jpg"], "by file name and others by COCO's id"),
    (["cat"], ["cat.jpg", "cat.png"], "missing pictures"), (["a.jpg", "a.png"], ["a.jpg", "b.jpg"], "missing pictures"),
    (["a", "a.jpg"], ["a.jpg"], "1 repeated pictures, such as a.jpg"),
])
def test_a_picture_is_never_taken_for_another(image_ids, file_names, message, tmp_path):
    captions = [dict(image_id=image_id, caption="人") for image_id in image_ids]
    result = run_scores(tmp_path, captions, coco_of(file_names))
    assert result.code == 2 and message in error_line(result.err) and not result.out


@pytest.mark.parametrize("nothing", [" ", "\u200b", "\ud83d", "\ufeff\t"], ids=ascii)
def test_equal_sentences_score_alike_whatever_nobody_sees_in_them(nothing, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no Java
    plain = [dict(image_id=name, caption=text) for name, text in zip("abc", SENTENCES[1:] + SENTENCES[:1])]
    strewn = [dict(entry, caption=nothing.join(entry["caption"] + "。")) for entry in plain]
    expected = run_scores(tmp_path, plain, listed("abc"))
    assert expected.code == 0 and "without 。, white space and invisible characters" in expected.out
    for captions, references in ((strewn, listed("abc")), (plain, listed("abc", nothing))):
        assert run_scores(tmp_path, captions, references) == expected


@pytest.mark.parametrize("text", [" ", "。", "\u200b", "\ud83d", " 。\ufeff"], ids=ascii)
def test_a_caption_of_nothing_is_refused_as_an_empty_one_is(text, tmp_path):
    captions = [dict(image_id="a", caption="人"), dict(image_id="b", caption=text)]
    result = run_scores(tmp_path, captions, listed("ab"))
    assert result.code == 2 and "without image_id or caption" in error_line(result.err)
    result = run_scores(tmp_path, captions[:1], [dict(image_id="a", caption=text)])
    assert result.code == 2 and "references.json has no references" in error_line(result.err)


@pytest.mark.parametrize("captions", [{"zh": "人"}, [{"zh": "人"}], ["人", None], None, 3, [["人"]]], ids=str)
def test_references_that_are_no_sentences_are_refused(captions, tmp_path):
    for references in ([dict(image_id="a.jpg", caption=captions)], dict(captions=[dict(
            image_id="a.jpg", references=captions)])):
        result = run_scores(tmp_path, [dict(image_id="a", caption="人")], references)
        assert result.code == 2 and "references.json has no references as" in error_line(result.err)


@pytest.mark.parametrize("n", [1, 2])
def test_why_cider_is_0_where_it_must_be(n, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no Java
    captions = [dict(image_id=name, caption=text) for name, text in zip("abc"[:n], SENTENCES)]
    result = run_scores(tmp_path, captions, listed("abc"[:n]))
    assert result.code == 0 and result.out.count("CIDEr of a single picture is 0") == (n == 1)
    assert ("CIDEr 0.0000" in result.out) == (n == 1)


def test_a_file_that_is_not_json(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff{")
    for paths in ((tmp_path / "x.json",) * 2, (tmp_path / "none.json",) * 2):
        result = call(scores.main, *paths, check=2)
        assert result.code == 2 and "cannot be read as JSON" in error_line(result.err)


def test_the_official_scores_of_anyones_captions(tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "meteor", lambda *_: {})  # which takes seconds to start
    monkeypatch.setattr(scores, "ptb_tokenize", lambda captions: [caption.split() for caption in captions])
    result = run_scores(tmp_path, *formats("contest"), "--official", "true")
    expected = official_scores(SUBMISSION, REFERENCES)
    assert f"official CIDEr {expected['CIDEr']:.4f}" in result.out and "PTB" in result.out.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Checks for a collapsed model


POSITIONS = (np.arange(14) + 0.5) / 14


def peak(row, column, height=0.9):
    """A map of 14 x 14 with `height` of its attention in one cell and the rest evenly everywhere."""
    alpha = np.full((14, 14), (1 - height) / 196, np.float32)
    alpha[row, column] += height
    return alpha


def test_attention_course():
    shift, entropy = attention_course(np.stack([peak(0, 0, 1), peak(0, 13, 1), peak(7, 13, 1)]), POSITIONS)
    assert shift == pytest.approx([13 / 14, 7 / 14], abs=1e-6) and entropy == pytest.approx([0] * 3, abs=1e-6)
    shift, entropy = attention_course(np.stack([peak(0, 0, 0), peak(0, 13, 0)]), POSITIONS)
    assert shift == pytest.approx([0], abs=1e-6) and entropy == pytest.approx([1, 1], abs=1e-6)
    assert [len(part) for part in attention_course(np.empty((0, 14, 14)), POSITIONS)] == [0, 0]


def diagnosis(captions, alphas=None):
    """Numbers and warnings of captions generated with attention that moves, or with the maps given."""
    alphas = np.stack([peak(3, 3), peak(9, 4), peak(5, 10)] if alphas is None else alphas)
    word_map = {word: i for i, word in enumerate(["<pad>", *"甲乙丙丁", "<unk>", "<start>", "<end>"])}
    return diagnose(captions, [attention_course(alphas, POSITIONS)] * len(captions), word_map)


SAME = [["甲", "乙", "丙"]]
DIFFERENT = [[a, b, c] for a in "甲乙丙" for b in "甲乙丙" for c in "甲乙丙"]


@pytest.mark.parametrize("captions", [SAME * 100, SAME * 40 + DIFFERENT * 3, DIFFERENT[:7] * 15])
def test_captions_that_collapse_are_noticed(captions):
    numbers, (warning,) = diagnosis(captions)
    assert f"same caption: {numbers['distinct_captions']} distinct captions of {len(captions)}" in warning


@pytest.mark.parametrize("captions", [DIFFERENT, DIFFERENT * 1000, DIFFERENT * 2 + SAME * 5, SAME * 4, SAME])
def test_captions_that_differ_or_are_few_are_not(captions):
    assert diagnosis(captions)[1] == []


def test_numbers_of_the_diagnosis():
    numbers, _ = diagnosis([["甲", "乙"], ["甲", "乙"], ["甲"], ["甲", "<unk>", "乙"]])
    assert numbers["distinct_captions"] == 3 and numbers["mean_length"] == 2
    assert numbers["same_caption_twice"] == pytest.approx(1 / 6) and numbers["vocabulary_used"] == 2 / 4
    numbers, _ = diagnose([[]] * 30, [attention_course(np.empty((0, 14, 14)), POSITIONS)] * 30, {"<pad>": 0})
    assert numbers["mean_length"] == numbers["attention_shift"] == 0, "of empty captions"


def test_diagnosis_of_words():
    captions = [["一个", "人"], ["草地", "上", "的"], ["狗", "和", "狗"], []]
    references = [[["一个", "男人"]], [["草地"], ["草地", "上", "的"]], [], []]
    found = diagnose_words(captions, references, {"一个人", "狗和狗", "狗"})
    assert found == dict(bad_endings=1 / 4, repeated_words=1 / 4, length_ratio=2 / 2, copied_captions=2 / 4)
    assert diagnose_words(captions, [[]] * 4, None).keys() == {"bad_endings", "repeated_words"}


def test_attention_that_hardly_moves_or_is_uniform_is_noticed():
    assert [text.split(":")[0] for text in diagnosis(DIFFERENT, [peak(3, 3)] * 3)[1]] == ["attention hardly moves"]
    assert [text.split(":")[0] for text in diagnosis(DIFFERENT, [peak(3, i, 0.02) for i in range(3)])[1]] == [
        "attention hardly moves", "attention is nearly uniform"]
