"""deploy/export.py, and deploy/captioner.py, which captions without PyTorch and this repo."""
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from unittest import mock
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from common import ROOT, call, fails, files_under, make_site
from PIL import Image

import demo
from checkpoint import CHECKPOINT_VERSION, load_checkpoint, save_checkpoint
from config import Config
from datasets import END, PAD, START, UNK, BadPicture, read_image
from decoding import first_largest
from deploy import captioner, export
from models import build_models

WORDS = [PAD, *"一二三四五六七八九", UNK, START, END]
PICTURES = list(np.random.default_rng(0).integers(0, 256, (5, 40, 70, 3), dtype=np.uint8))
PICTURES += [PICTURES[0] // 4, PICTURES[1] // 8, 255 - PICTURES[2] // 16]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of random weights that would like to write <unk>, and ends some of its captions."""
    config = Config(image_size=64, encoder="resnet18", encoder_weights="none", encoder_stride=16,
                    encoded_image_size=6, emb_dim=12, attention_dim=16, decoder_dim=20, max_len=6,
                    length_penalty=0.7, device="cpu")
    word_map = {word: number for number, word in enumerate(WORDS)}
    torch.manual_seed(0)
    encoder, decoder = build_models(config, len(WORDS))
    for parameter in decoder.parameters():
        parameter.data *= 4  # so that pictures and words before make a difference
    decoder.fc.bias.data[word_map[UNK]] = 3
    path = tmp_path_factory.mktemp("checkpoint") / "random.pth.tar"
    save_checkpoint(dict(
        version=CHECKPOINT_VERSION, config=dataclasses.asdict(config), word_map=word_map, epoch=7,
        encoder=encoder.state_dict(), decoder=decoder.state_dict(), progress=None, optimizers={},
        world_size=1, note="for research"), path)
    return path


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """The folder of an export. Not to be written to."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    done = call(export.main, checkpoint, "--out", folder)
    assert done.out.count("0 of 4 captions differ") == 2
    return folder


@pytest.fixture
def quick_export(exported, monkeypatch):
    """Lets export.py take the graphs of `exported`, whatever the checkpoint."""
    def copy(encoder, decoder, image_size, folder):
        for name in ("encoder.onnx", "decoder.onnx"):
            shutil.copy(exported / name, folder)
    monkeypatch.setattr(export, "export", copy)


@pytest.fixture(scope="module")
def other_checkpoint(checkpoint, tmp_path_factory):
    """One that writes other words."""
    other = load_checkpoint(checkpoint)
    other["decoder"]["fc.bias"] += torch.arange(len(WORDS))
    path = tmp_path_factory.mktemp("checkpoint") / "other.pth.tar"
    save_checkpoint(other, path)
    return path


def assert_same(found, expected):
    assert found.words == expected.words and found.ended == expected.ended
    assert found.sentence == expected.sentence
    assert found.score == pytest.approx(expected.score, abs=1e-4)
    assert found.log_probs == pytest.approx(expected.log_probs, abs=1e-4)
    assert found.alphas.shape == expected.alphas.shape
    assert found.alphas == pytest.approx(expected.alphas, abs=1e-4)
    assert np.array_equal(found.positions, expected.positions)


# -------------------------------------------------------------------------------------------------
# Captions


def test_captions_are_those_of_demo(checkpoint, exported):
    """At any beam, of one picture or several, also several captions of each."""
    with_torch = demo.Captioner(checkpoint)
    without = captioner.Captioner(exported, num_threads=1)
    sentences, endings = set(), set()
    for beam_size, n_best in ((1, 1), (3, 1), (4, 3)):
        for found, expected in zip(without(PICTURES, beam_size, n_best),
                                   with_torch(PICTURES, beam_size, n_best), strict=True):
            if n_best == 1:
                found, expected = [found], [expected]
            for one, other in zip(found, expected, strict=True):
                assert_same(one, other)
                sentences.add(one.sentence)
                endings.add(one.ended)
    assert len(sentences) > 5 and endings == {True, False}, "a model that shows little"
    assert_same(without(PICTURES[0]), without(PICTURES, 3)[0])
    assert without([]) == []


@pytest.mark.parametrize("k", [1, 3, 6])
def test_of_equal_scores_the_first_count(k):
    for seed in range(20):
        scores = np.random.default_rng(seed).integers(-4, 0, (3, 5)).astype(np.float32)
        scores[:, [0, 3]] = -np.inf
        rows, columns = captioner.first_largest(scores, k)
        _, expected = first_largest(torch.from_numpy(scores.reshape(1, -1)), k)
        assert (5 * rows + columns).tolist() == expected[0].tolist()


def test_it_needs_neither_pytorch_nor_this_repo(checkpoint, exported, tmp_path):
    """Copied elsewhere it captions files; what is no picture is said, and the rest is done."""
    shutil.copy(ROOT / "deploy" / "captioner.py", tmp_path)
    Image.fromarray(PICTURES[1]).save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_text("no picture")
    code = """if True:
        import sys
        for name in ("torch", "torchvision", "datasets", "utils", "onnx", "h5py"):
            sys.modules[name] = None  # which cannot be imported
        import captioner
        captioner.main()
    """
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code, exported, "b.jpg", "a.png"], cwd=tmp_path,
                          env=variables, capture_output=True, encoding="utf-8", timeout=100)
    caption = demo.Captioner(checkpoint)(PICTURES[1])
    assert done.stdout == f"a.png\t{caption.sentence}\n"
    assert done.stderr.startswith("error: b.jpg: ") and done.stderr.count("\n") == 1
    assert done.returncode == 2


def test_a_damaged_export_is_named(exported, tmp_path):
    def refuses(folder, *parts):
        with pytest.raises(ValueError) as error:
            captioner.Captioner(folder)
        assert all(part in str(error.value) for part in parts)

    refuses(tmp_path / "none", "model.json does not exist")
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    (folder / "decoder.onnx").write_bytes((exported / "decoder.onnx").read_bytes()[:1000])
    refuses(folder, "decoder.onnx cannot be opened")
    model = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    (folder / "model.json").write_text(json.dumps(dict(model, format_version=99)))
    refuses(folder, "format version 99")
    (folder / "model.json").write_text("{")
    refuses(folder, "model.json is damaged")


# -------------------------------------------------------------------------------------------------
# Pixels


def encoded(picture, format, **keywords):
    file = io.BytesIO()
    picture.save(file, format, **keywords)
    return file.getvalue()


def files():
    """Pictures of every kind, as the bytes of their files."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (30, 20, 3), dtype=np.uint8))
    photograph = noise.resize((500, 700), Image.Resampling.BICUBIC)
    alpha = Image.fromarray(rng.integers(0, 256, (700, 500), dtype=np.uint8))
    clear = photograph.copy()
    clear.putalpha(alpha)
    deep = Image.fromarray(rng.integers(0, 65536, (90, 120), dtype=np.uint16))
    yield "jpeg, small", encoded(photograph.resize((70, 90)), "JPEG")
    for size in (160, 161, 300, 700):
        yield f"jpeg, {size}", encoded(photograph.resize((size, size + 33)), "JPEG")
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"jpeg, turned {orientation}", encoded(photograph, "JPEG", exif=exif)
    damaged = b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01"
    yield "jpeg, damaged exif", encoded(photograph, "JPEG", exif=damaged)
    yield "jpeg, CMYK", encoded(photograph.convert("CMYK"), "JPEG")
    yield "jpeg, gray", encoded(photograph.convert("L"), "JPEG")
    yield "png, alpha", encoded(clear, "PNG")
    yield "png, gray and alpha", encoded(clear.convert("LA"), "PNG")
    yield "png, palette", encoded(photograph.quantize(9), "PNG", transparency=3)
    yield "png, 16 bits", encoded(deep, "PNG")
    yield "png, one bit", encoded(alpha.convert("1"), "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    yield "tiff, turned", encoded(photograph, "TIFF", exif=exif)
    yield "webp", encoded(clear, "WEBP")
    yield "gif", encoded(photograph.quantize(9), "GIF", save_all=True, append_images=[alpha])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in files()])
def test_pixels_are_those_of_datasets(content, tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(content)
    assert np.array_equal(captioner.read_image(path, 64), read_image(path, 64))
    found = captioner.read_image(io.BytesIO(content), 64)
    assert np.array_equal(found, read_image(io.BytesIO(content), 64))
    with Image.open(io.BytesIO(content)) as picture:
        assert np.array_equal(captioner.read_image(picture, 64), read_image(picture, 64))


@pytest.mark.parametrize("source", [
    np.zeros((4, 4), np.float32), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4), np.uint8),
    "nowhere.jpg", ".", 7], ids=str)
def test_what_is_no_picture_is_refused_as_by_datasets(source):
    with pytest.raises(BadPicture) as expected:
        read_image(source, 64)
    with pytest.raises(captioner.BadPicture) as error:
        captioner.read_image(source, 64)
    assert str(error.value) == str(expected.value)


# -------------------------------------------------------------------------------------------------
# export.py


@pytest.mark.parametrize("numbers_are_compared", [True, False])
def test_graphs_of_another_model_are_refused(quick_export, other_checkpoint, tmp_path, monkeypatch,
                                             numbers_are_compared):
    reason = "other log-probabilities"
    if not numbers_are_compared:
        equal = {"features": 0.0, "log-probabilities": 0.0, "attention": 0.0}
        monkeypatch.setattr(export, "largest_differences", lambda *_: equal)
        reason = "another caption"
    fails(export.main, other_checkpoint, "--out", tmp_path / "model", parts=[reason])
    assert not files_under(tmp_path)


def test_half_is_half_as_large_and_nearly_the_same(quick_export, checkpoint, exported, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, picture in enumerate(PICTURES[:2]):
        Image.fromarray(picture).save(pictures / f"{number}.png")
    folder = tmp_path / "model"
    done = call(export.main, checkpoint, "--out", folder, "--half", "--image", pictures)
    assert done.out.count(" of 2 captions differ") == 2
    sizes = [(place / "encoder.onnx").stat().st_size for place in (folder, exported)]
    assert sizes[0] < 0.51 * sizes[1]
    half, full = captioner.Captioner(folder), captioner.Captioner(exported)
    assert half.model == dict(full.model, weights="float16")
    features = [one.encoder.run(None, {"images": np.stack([one.read(PICTURES)[0]])})[0]
                for one in (half, full)]
    assert 0 < np.abs(features[0] - features[1]).max() < 0.01 * np.abs(features[1]).max()


def test_an_export_that_is_stopped_leaves_nothing(quick_export, checkpoint, tmp_path, monkeypatch):
    for error, code in ((OSError(28, "no space"), 2), (KeyboardInterrupt(), 130)):
        monkeypatch.setattr(export, "facts_of", mock.Mock(side_effect=error))
        done = call(export.main, checkpoint, "--out", tmp_path / "model", check=code)
        assert not files_under(tmp_path)
        assert ("could not be written (the disk is full)" in done.err) == (code == 2)


def test_an_export_has_its_own_files_only(quick_export, checkpoint, tmp_path):
    """A run that was killed leaves a temporary folder; what is already there stays."""
    folder, temporary = tmp_path / "model", tmp_path / "model.tmp"
    temporary.mkdir()
    (temporary / "of-a-killed-run").touch()
    call(export.main, checkpoint, "--out", folder)
    before = files_under(tmp_path)
    assert before.keys() == {"model", *(f"model/{name}" for name in (
        "decoder.onnx", "encoder.onnx", "model.json"))}
    fails(export.main, checkpoint, "--out", folder, parts=["exists", "--out"])
    fails(export.main, tmp_path / "no.pth.tar", "--out", tmp_path / "other",
          parts=["no.pth.tar is not a file: name a checkpoint"])
    assert files_under(tmp_path) == before


def test_make_site_keeps_what_is_there(tmp_path):
    site, damaged = tmp_path / "site", tmp_path / "damaged.pth.tar"
    (site / "model").mkdir(parents=True)
    (site / "model" / "mine").write_text("mine")
    damaged.write_bytes(b"no checkpoint")
    before = files_under(tmp_path)

    done = make_site(site, tmp_path / "no.pth.tar")
    assert done.returncode and "no.pth.tar is not a file" in done.stdout
    done = make_site(site, damaged)
    assert done.returncode and "has another page" in done.stdout
    assert files_under(tmp_path) == before

    (site / ".model").write_text("another one")  # as a site of ours
    done = make_site(site, damaged)
    assert done.returncode and "damaged.pth.tar is damaged" in done.stderr
    assert (site / "model" / "mine").exists()


# -------------------------------------------------------------------------------------------------
# docs/deploy.md


def test_the_server_of_the_docs_answers(exported, monkeypatch):
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8")
             for name in ("deploy.md", "deploy.en.md")]
    blocks = [re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
              for page in pages]
    code, translated = (next(block for block in found if "http.server" in block)
                        for found in blocks)
    assert code == translated
    servers = []
    serve = ThreadingHTTPServer.serve_forever
    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever",
                        lambda server: servers.append(server))
    monkeypatch.syspath_prepend(ROOT / "deploy")
    code = code.replace("exported", exported.name).replace("8000", "0")
    exec(code, {"__file__": str(exported.parent / "server.py")})

    server, = servers
    threading.Thread(target=serve, args=(server,), daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/"
        assert "看图说话" in urlopen(address, timeout=20).read().decode()
        file = io.BytesIO()
        Image.fromarray(PICTURES[0]).save(file, "PNG")
        sentence = urlopen(address, data=file.getvalue(), timeout=20).read().decode()
        assert sentence == captioner.Captioner(exported)(PICTURES[0]).sentence
        for content in (b"no picture", b""):
            with pytest.raises(HTTPError) as error:
                urlopen(address, data=content, timeout=20)
            assert error.value.code == 400 and error.value.read() == b"cannot identify image file"
    finally:
        server.shutdown()
        server.server_close()
