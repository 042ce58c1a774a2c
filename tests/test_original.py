"""Checkpoints of the original, which are pickled modules: read without running any, refused where they ask for more."""
import builtins
import json
import os
import pickle
import shlex
import shutil
import zipfile
from collections import OrderedDict
from dataclasses import asdict

import pytest
import torch
import torchvision
from conftest import NOT_BEGUN, error_line, script
from torch import nn
from torch.nn.backends.thnn import _get_thnn_function_backend

import models
from config import ENCODERS, Config, UserError, parse_args
from datasets import END, PAD, START, UNK, read_image
from eval import generate
from utils import CHECKPOINT_VERSION, RESNETS, OriginalUnpickler, load_checkpoint, open_checkpoint

CONFIG = Config(encoder="resnet18", encoder_weights="none", emb_dim=24, attention_dim=16, decoder_dim=32)
FORMS = ("legacy", "zip")


class Call:
    """What unpickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def theirs(name, module, **more):
    """A module of the original's class models.NAME, with the children of ours and those that it has beside them."""
    made = type(name, (nn.Module,), {"__module__": "models"})()
    for child, part in {**dict(module.named_children()), **more}.items():
        made.add_module(child, part)
    made._backend = Call(_get_thnn_function_backend)  # as every module of PyTorch 0.4 has
    return made


def their_checkpoint(change=lambda encoder, decoder: None):
    """Our model with fixed random weights, in the original's classes, and as state dicts in our names.

    Args:
        change (function): of the original's encoder and decoder, called before the state dicts are taken.
    Returns:
        dict of modules, dict of state dicts.
    """
    torch.manual_seed(1)
    encoder, decoder = models.build_models(CONFIG, 60)
    for weights in decoder.parameters():
        nn.init.normal_(weights, std=0.4)
    attention = theirs("Attention", decoder.attention, relu=nn.ReLU(), softmax=nn.Softmax(dim=1))
    encoder = theirs("Encoder", encoder, adaptive_pool=nn.AdaptiveAvgPool2d(14))
    decoder = theirs("DecoderWithAttention", decoder, attention=attention, sigmoid=nn.Sigmoid())
    change(encoder, decoder)
    optimizer = torch.optim.Adam(decoder.parameters())
    sum(weights.sum() for weights in decoder.parameters()).backward()
    optimizer.step()
    return ({"epoch": 7, "epochs_since_improvement": 0, "bleu-4": 0.2, "encoder": encoder, "decoder": decoder,
             "encoder_optimizer": None, "decoder_optimizer": optimizer},
            {"encoder": encoder.state_dict(), "decoder": decoder.state_dict()})


def small_checkpoint():
    """One that is enough to be refused: a module of the original's with one layer in it."""
    return {"encoder": theirs("Encoder", nn.Sequential(nn.Linear(2, 2)))}


def save(checkpoint, path, form):
    """torch.save as PyTorch 0.4 did it (legacy) or as today's does; the original's classes exist only meanwhile."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        modules = [part for value in checkpoint.values() if isinstance(value, nn.Module) for part in value.modules()]
        for module in modules:
            if type(module).__module__ == "models":
                monkeypatch.setattr(models, type(module).__name__, type(module))
        if form == "legacy":
            monkeypatch.setattr(nn.Parameter, "__reduce_ex__", lambda self, _: (nn.Parameter, (self.data, True)))
            for module in modules:
                if isinstance(module, nn.BatchNorm2d):
                    monkeypatch.delitem(module._buffers, "num_batches_tracked")
        torch.save(checkpoint, path, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """legacy.pth.tar and zip.pth.tar of the original, own.pth.tar of this repo with the same weights, WORDMAP.json."""
    folder = tmp_path_factory.mktemp("original")
    checkpoint, states = their_checkpoint()
    for form in FORMS:
        save(checkpoint, folder / f"{form}.pth.tar", form)
    words = ["", *(chr(ord("一") + number) for number in range(55))]  # jieba's full mode gives "" for punctuation
    word_map = {word: number for number, word in enumerate([*words, UNK, START, END], start=1)} | {PAD: 0}
    (folder / "WORDMAP.json").write_text(json.dumps(word_map))
    torch.save(dict(states, version=CHECKPOINT_VERSION, config=asdict(CONFIG), word_map=word_map, **NOT_BEGUN),
               folder / "own.pth.tar")
    return folder


def opened(path, *flags):
    return open_checkpoint(parse_args("", {"checkpoint": {}, "word_map": {}}, ["--checkpoint", str(path), *flags]))


def refused(path, *parts, word_map="WORDMAP.json"):
    """open_checkpoint refuses this file, in one line that holds all parts."""
    with pytest.raises(UserError) as caught:
        opened(path, *(["--word_map", str(word_map)] if word_map else []))
    line = str(caught.value)
    assert all(str(part) in line for part in (path, *parts)) and "\n" not in line, line


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("parallel", [False, True])
def test_the_originals_weights_are_read_exactly(folder, tmp_path, form, parallel):
    path = folder / f"{form}.pth.tar"
    if parallel:
        checkpoint, _ = their_checkpoint()
        checkpoint = {name: nn.DataParallel(part) if isinstance(part, nn.Module) else part
                      for name, part in checkpoint.items()}
        path = save(checkpoint, tmp_path / "parallel.pth.tar", form)
    _, config, _, *ours = opened(path, "--word_map", str(folder / "WORDMAP.json"), "--device", "cpu")
    _, expected_config, _, *expected = opened(folder / "own.pth.tar", "--device", "cpu")
    for name in ("encoder", "emb_dim", "attention_dim", "decoder_dim", "image_size", "encoded_image_size", "dropout"):
        assert getattr(config, name) == getattr(expected_config, name), name
    for module, other in zip(ours, expected):
        state, other = module.state_dict(), other.state_dict()
        assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def test_every_resnet_is_known_by_its_blocks():
    with torch.device("meta"):
        resnets = {name: torchvision.models.get_model(name, weights=None) for name in ENCODERS}
    assert RESNETS == {(len(resnet.layer3), resnet.fc.in_features): name for name, resnet in resnets.items()}


def test_demo_and_evaluation_caption_as_with_our_own_checkpoint(folder, tiny, tmp_path):
    """The scores need only pictures and raw captions, so data with another word map serve."""
    pictures = sorted(next(tiny.glob("*test_a*/*images*/")).iterdir())
    quick, data = ["--max_len", "5", "--device", "cpu"], tmp_path / "data"
    checkpoint, config, _, encoder, decoder = opened(folder / "own.pth.tar", *quick)
    images = torch.stack([torch.from_numpy(read_image(picture, config.image_size)) for picture in pictures])
    captions = generate(decoder, encoder(images), torch.arange(4), config, checkpoint["word_map"], 3)
    expected = {picture.name: "".join(caption["words"]) for picture, caption in zip(pictures, captions)}
    assert len(set(expected.values())) > 1, "captions that tell the pictures apart"

    demo = script("demo.py", "--checkpoint", folder / "legacy.pth.tar", "--word_map", folder / "WORDMAP.json",
                  "--image", pictures[0].parent, "--out", tmp_path, *quick, check=0)
    for picture in pictures:
        assert f"{picture.name}\t{expected[picture.name]}\t" in demo.stdout

    shutil.copytree(tiny, data)
    script("pre_process.py", "--overwrite", "--data_dir", data, *quick, check=0)
    script("eval.py", "--checkpoint", folder / "zip.pth.tar", "--word_map", folder / "WORDMAP.json", "--workers", 0,
           "--data_dir", data, "--split", "test_a", "--results", tmp_path / "results.json", *quick, check=0)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {entry["image_id"]: entry["caption"] for entry in results["captions"]} == expected
    assert results["scores"].keys() >= {"BLEU-4", "CIDEr"} and results["captions"][0]["references"]


# ---------------------------------------------------------------------------------------------------------------------
# The word map


def test_the_word_map_is_asked_for_and_must_fit(folder, tmp_path):
    path = folder / "zip.pth.tar"
    refused(path, "--word_map", word_map=None)
    with pytest.raises(UserError, match="--word_map"):
        load_checkpoint(path)  # as train.py --resume does
    word_map = json.loads((folder / "WORDMAP.json").read_text())
    other = tmp_path / "OTHER.json"
    other.write_text(json.dumps({**word_map, "多": len(word_map)}))
    refused(path, other, "61 words", "60", word_map=other)
    for text, reason in (("{", "cannot be read"), (json.dumps({"一": 1}), "not a word map")):
        other.write_text(text)
        with pytest.raises(UserError, match=f"OTHER.json.*{reason}"):
            opened(path, "--word_map", str(other))
    with pytest.raises(UserError, match="nowhere.json cannot be read"):
        opened(path, "--word_map", str(tmp_path / "nowhere.json"))


def test_a_missing_checkpoint_names_the_one_beside_it(folder, tmp_path):
    """As with the original's recipe, where BEST_checkpoint_.pth.tar is put into models/ and demo.py called bare."""
    models = tmp_path / "the models"
    with pytest.raises(UserError, match="does not exist") as caught:
        load_checkpoint(models / "BEST_checkpoint.pth.tar")
    assert "pth.tar" not in str(caught.value).split("does not exist")[1]
    models.mkdir()
    for source, name, more in (("own", "checkpoint.pth.tar", []),
                               ("zip", "BEST_checkpoint_.pth.tar", ["--word_map", "WORDMAP.json"])):
        shutil.copy(folder / f"{source}.pth.tar", models / name)
        with pytest.raises(UserError, match="does not exist") as caught:
            load_checkpoint(models / "BEST_checkpoint.pth.tar")
        flags = shlex.split(str(caught.value)[str(caught.value).index("--checkpoint"):])
        assert flags == ["--checkpoint", str(models / name), *more] and "\n" not in str(caught.value)


def test_our_own_checkpoint_takes_no_other_word_map(folder, tmp_path):
    word_map = json.loads((folder / "WORDMAP.json").read_text())
    assert opened(folder / "own.pth.tar", "--word_map", str(folder / "WORDMAP.json"))[0]["word_map"] == word_map
    first, second, *_ = word_map
    other = tmp_path / "OTHER.json"
    other.write_text(json.dumps({**word_map, first: word_map[second], second: word_map[first]}))
    refused(folder / "own.pth.tar", other, "leave --word_map out", word_map=other)


# ---------------------------------------------------------------------------------------------------------------------
# Hostile and broken files


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("function, inside", [(os.system, False), (builtins.exec, False), (builtins.eval, True),
                                              (builtins.getattr, True), (torch.hub.load, False)])
def test_what_asks_for_more_is_refused_by_name_and_never_runs(folder, tmp_path, form, function, inside):
    marker = tmp_path / "ran"
    command = f"touch {marker}" if function is os.system else f"open({str(marker)!r}, 'w')"
    checkpoint = small_checkpoint()
    if inside:
        getattr(checkpoint["encoder"], "0").hook = Call(function, command)
    else:
        checkpoint["encoder"] = Call(function, command)
    path = save(checkpoint, tmp_path / "hostile.pth.tar", form)
    module = function.__module__.removeprefix("builtins")  # __builtin__ in the pickle
    refused(path, f"{module}.{function.__name__}", word_map=folder / "WORDMAP.json")
    assert not marker.exists()


def test_the_scripts_refuse_it_in_one_line(folder, tmp_path):
    marker = tmp_path / "ran"
    path = save({"encoder": Call(os.system, f"touch {marker}")}, tmp_path / "hostile.pth.tar", "legacy")
    done = script("demo.py", "--checkpoint", path, "--word_map", folder / "WORDMAP.json", check=2)
    assert f"{os.system.__module__}.system" in error_line(done.stderr) and not marker.exists()


@pytest.mark.parametrize("state", [{"forward": 1}, (None, {"forward": 1})])
def test_a_pickle_cannot_set_anything_of_a_real_class(tmp_path, state):
    path = tmp_path / "hostile.pth.tar"
    path.write_bytes(b"\x80\x02ctorch.nn\nModule\n" + pickle.dumps(state, 2)[2:-1] + b"b.")
    forward = nn.Module.forward
    refused(path)
    assert nn.Module.forward is forward


@pytest.mark.parametrize("form", FORMS)
def test_truncated_files(tmp_path, form):
    whole = save(small_checkpoint(), tmp_path / "whole.pth.tar", form).read_bytes()
    for size in (*range(0, len(whole) - 8, 40), len(whole) - 1):
        (tmp_path / "cut.pth.tar").write_bytes(whole[:size])
        with pytest.raises(UserError) as caught:
            load_checkpoint(tmp_path / "cut.pth.tar")
        assert "decoder" not in str(caught.value)  # which is all that the whole file lacks


@pytest.mark.parametrize("change, reason", [
    (lambda encoder, decoder: setattr(decoder, "fc", nn.Linear(32, 59)), "another architecture"),
    (lambda encoder, decoder: setattr(decoder, "extra", nn.Linear(1, 1)), "another architecture"),
    (lambda encoder, decoder: encoder.resnet[6].append(nn.Linear(1, 1)), "damaged"),
    (lambda encoder, decoder: delattr(decoder, "embedding"), "embedding.weight"),
])
def test_modules_that_do_not_fit(folder, tmp_path, change, reason):
    checkpoint, _ = their_checkpoint(change)
    refused(save(checkpoint, tmp_path / "odd.pth.tar", "zip"), reason, word_map=folder / "WORDMAP.json")


@pytest.mark.parametrize("form", FORMS)
def test_a_few_bytes_that_stand_for_many_modules(tmp_path, form):
    part = nn.Linear(1, 1)
    for _ in range(60):
        part = nn.Sequential(part, part)
    refused(save({"encoder": part}, tmp_path / "many.pth.tar", form), "_modules")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size, stride, offset, reason", [
    ((10**6, 10**6), (0, 0), 0, "larger than its storage"), ((3,), (2,), 0, "out of bounds"),
    ((2,), (1,), 3, "out of bounds"), ((2,), (-1,), 3, "Negative"), (("2",), (1,), 0, "TypeError")])
def test_tensors_beyond_their_storage(tmp_path, form, size, stride, offset, reason):
    checkpoint = small_checkpoint()
    storage = torch.storage.TypedStorage(wrap_storage=torch.zeros(4).untyped_storage(), dtype=torch.float32,
                                         _internal=True)
    checkpoint["encoder"]._buffers["extra"] = Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride,
                                                   False, OrderedDict())
    refused(save(checkpoint, tmp_path / "odd.pth.tar", form), reason)


def test_storages_whose_sizes_lie(tmp_path):
    legacy, whole = (save(small_checkpoint(), tmp_path / f"{form}.pth.tar", form) for form in FORMS)
    with open(legacy, "r+b") as file:
        unpickler = OriginalUnpickler(file)
        for _ in range(5):
            unpickler.load()
        file.seek(file.tell())  # where the first storage tells its length
        file.write((2**40).to_bytes(8, "little"))
    refused(legacy, "storage")
    for compression, size, reason in ((zipfile.ZIP_STORED, -4, "storage"), (zipfile.ZIP_DEFLATED, None, "compressed")):
        with zipfile.ZipFile(whole) as old, zipfile.ZipFile(tmp_path / "lie.pth.tar", "w", compression) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name)[:size if "/data/" in name else None])
        refused(tmp_path / "lie.pth.tar", reason)
