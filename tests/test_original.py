"""Checkpoints of the original, which are pickled modules: imported without running their code."""
import builtins
import dataclasses
import importlib.util
import itertools
import json
import os
import pickle
import shutil
from collections import OrderedDict

import pytest
import torch
import torchvision
from common import ROOT, assert_same, call, fails
from torch import nn
from torch.nn.backends.thnn import _get_thnn_function_backend

import eval
import models
import pre_process
import scores
import train
from checkpoint import load_checkpoint, load_models
from config import Config
from datasets import END, PAD, START, UNK, load_word_map
from utils import UserError

spec = importlib.util.spec_from_file_location("import_original",
                                              ROOT / "models/import_original.py")
import_original = importlib.util.module_from_spec(spec)
spec.loader.exec_module(import_original)

CONFIG = Config(encoder="resnet18", encoder_weights="none", emb_dim=24, attention_dim=16,
                decoder_dim=32)
FORMS = ("legacy", "zip")


class Call:
    """What unpickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def theirs(name, module, **more):
    """A module of the original's class models.NAME, with the children of ours and some more."""
    made = type(name, (nn.Module,), {"__module__": "models"})()
    for child, part in {**dict(module.named_children()), **more}.items():
        made.add_module(child, part)
    made._backend = Call(_get_thnn_function_backend)  # as every module of PyTorch 0.4 has
    return made


def their_checkpoint(change=lambda encoder, decoder: None):
    """A model with random weights in the original's classes, and the same as our state dicts.

    `change` is called with the original's encoder and decoder before the state dicts are taken.
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
    checkpoint = {"epoch": 7, "epochs_since_improvement": 0, "bleu-4": 0.2, "encoder": encoder,
                  "decoder": decoder, "encoder_optimizer": None, "decoder_optimizer": optimizer}
    return checkpoint, {"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}


def small_checkpoint():
    """One that is enough to be refused: a module of the original's with one layer in it."""
    return {"encoder": theirs("Encoder", nn.Sequential(nn.Linear(2, 2)))}


def save(checkpoint, path, form):
    """torch.save as PyTorch 0.4 did it (legacy) or as today's does (zip)."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        parts = [value for value in checkpoint.values() if isinstance(value, nn.Module)]
        for module in itertools.chain(*(part.modules() for part in parts)):
            if type(module).__module__ == "models":  # the original's, which exists only meanwhile
                monkeypatch.setattr(models, type(module).__name__, type(module))
            if form == "legacy" and isinstance(module, nn.BatchNorm2d):
                monkeypatch.delitem(module._buffers, "num_batches_tracked")
        if form == "legacy":
            monkeypatch.setattr(nn.Parameter, "__reduce_ex__",
                                lambda self, _: (nn.Parameter, (self.data, True)))
        torch.save(checkpoint, path, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.fixture(scope="module")
def word_map(tmp_path_factory):
    """The path of a WORDMAP.json with the 60 words of their_checkpoint."""
    words = ["", *(chr(ord("一") + number) for number in range(55))]  # jieba's full mode gives ""
    numbers = {word: number for number, word in enumerate([*words, UNK, START, END], start=1)}
    path = tmp_path_factory.mktemp("original") / "WORDMAP.json"
    path.write_text(json.dumps(numbers | {PAD: 0}))
    return path


def refused(path, *parts, word_map="WORDMAP.json"):
    """The import of this file is refused in one line with all these parts."""
    fails(import_original.main, path, word_map, parts=(path, *parts))
    assert not list(path.parent.glob("*.ours.pth.tar"))


@pytest.mark.parametrize("form, parallel", [("legacy", False), ("zip", True)])
def test_the_originals_weights_are_imported_exactly(word_map, tmp_path, form, parallel):
    checkpoint, states = their_checkpoint()
    if parallel:
        for half in ("encoder", "decoder"):
            checkpoint[half] = nn.DataParallel(checkpoint[half])
    call(import_original.main, save(checkpoint, tmp_path / "BEST_.pth.tar", form), word_map)
    found = load_checkpoint(tmp_path / "BEST_.ours.pth.tar")
    config = Config(**found["config"])
    assert dataclasses.replace(config, encoder_weights="none") == CONFIG
    assert found["epoch"] == 7 and found["word_map"] == load_word_map(word_map.parent)
    for module, expected in zip(load_models(found, config, "it"), states.values()):
        assert_same(dict(module.state_dict()), dict(expected))


def test_every_resnet_is_known_by_its_blocks():
    names = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
    with torch.device("meta"):
        resnets = {name: torchvision.models.get_model(name, weights=None) for name in names}
    assert import_original.RESNETS == {(len(resnet.layer3), resnet.fc.in_features): name
                                       for name, resnet in resnets.items()}


def test_evaluation_takes_it_and_training_does_not(word_map, tiny, tmp_path, monkeypatch):
    """Scores need only pictures and raw captions, so data with another word map serve."""
    monkeypatch.setattr(scores, "meteor", lambda *_: {})  # which takes seconds to start
    theirs = save(their_checkpoint()[0], tmp_path / "theirs", "zip")
    path, data, results = (tmp_path / name for name in ("checkpoint.pth.tar", "data", "results"))
    call(import_original.main, theirs, word_map, "--out", path)
    quick = ["--data_dir", data, "--max_len", 5, "--device", "cpu", "--workers", 0]
    shutil.copytree(tiny, data)
    call(pre_process.main, "--overwrite", *quick)
    assert load_word_map(data) != load_word_map(word_map.parent)
    call(eval.main, "--checkpoint", path, "--split", "test_a", "--beam_size", 1,
         "--results", results, *quick)
    found = json.loads(results.read_text(encoding="utf-8"))
    assert found["scores"].keys() >= {"BLEU-4", "CIDEr"} and len(found["captions"]) == 4
    fails(train.main, "--resume", "--model_dir", tmp_path, parts=(path, "--init", "not resumed"))


def test_the_word_map_must_fit(word_map, tmp_path):
    path = save(their_checkpoint()[0], tmp_path / "theirs.pth.tar", "zip")
    other = tmp_path / "OTHER.json"
    larger = {**json.loads(word_map.read_text()), "多": 60}
    for text, *parts in ((json.dumps(larger), "61 words", "60"), ("{", "cannot be read"),
                         (json.dumps({"一": 1}), "not a word map")):
        other.write_text(text)
        fails(import_original.main, path, other, parts=(other, *parts))
    nowhere = tmp_path / "nowhere"
    fails(import_original.main, path, nowhere, parts=(nowhere, "cannot be read"))
    fails(import_original.main, nowhere, word_map, parts=(nowhere, "No such file"))


# --------------------------------------------------------------------------------------------------
# Hostile and broken files


@pytest.mark.parametrize("form, function, inside", [
    ("legacy", os.system, False), ("zip", builtins.exec, True), ("legacy", builtins.getattr, True),
    ("zip", torch.hub.load, False)])
def test_what_asks_for_more_is_refused_by_name_and_never_runs(tmp_path, form, function, inside):
    marker = tmp_path / "ran"
    command = f"touch {marker}" if function is os.system else f"open({str(marker)!r}, 'w')"
    harm = Call(function, command)
    checkpoint = small_checkpoint()
    if inside:
        getattr(checkpoint["encoder"], "0").hook = harm
    else:
        checkpoint["encoder"] = harm
    module = function.__module__.removeprefix("builtins")  # __builtin__ in the pickle
    refused(save(checkpoint, tmp_path / "bad.pth.tar", form), f"{module}.{function.__name__}")
    assert not marker.exists()


def test_a_pickle_cannot_set_anything_of_a_real_class(tmp_path):
    forward = nn.Module.forward
    for state in ({"forward": 1}, (None, {"forward": 1})):
        content = b"\x80\x02ctorch.nn\nModule\n" + pickle.dumps(state, 2)[2:-1] + b"b."
        (tmp_path / "bad").write_bytes(content)
        refused(tmp_path / "bad")
    assert nn.Module.forward is forward


@pytest.mark.parametrize("form", FORMS)
def test_truncated_files(tmp_path, form):
    whole = save(small_checkpoint(), tmp_path / "whole.pth.tar", form).read_bytes()
    for size in (*range(0, len(whole) - 8, 97), len(whole) - 1):
        (tmp_path / "cut.pth.tar").write_bytes(whole[:size])
        with pytest.raises(UserError) as caught:
            import_original.load_original(tmp_path / "cut.pth.tar", tmp_path / "WORDMAP.json")
        assert "decoder" not in str(caught.value)  # which is all that the whole file lacks


@pytest.mark.parametrize("change, reason", [
    (lambda encoder, decoder: setattr(decoder, "fc", nn.Linear(32, 59)), "fc.weight"),
    (lambda encoder, decoder: setattr(decoder, "extra", nn.Linear(1, 1)), "extra.weight"),
    (lambda encoder, decoder: encoder.resnet[6].append(nn.Linear(1, 1)), "damaged"),
    (lambda encoder, decoder: delattr(decoder, "embedding"), "embedding.weight"),
])
def test_modules_that_do_not_fit(word_map, tmp_path, change, reason):
    checkpoint, _ = their_checkpoint(change)
    refused(save(checkpoint, tmp_path / "odd.pth.tar", "zip"), reason, word_map=word_map)


def test_a_few_bytes_that_stand_for_many_modules(tmp_path):
    part = nn.Linear(1, 1)
    for _ in range(60):
        part = nn.Sequential(part, part)
    refused(save({"encoder": part}, tmp_path / "many.pth.tar", "zip"), "_modules")


@pytest.mark.parametrize("size, stride, offset, reason", [
    ((10**6, 10**6), (0, 0), 0, "larger than its storage"), ((3,), (2,), 0, "out of bounds"),
    ((2,), (-1,), 3, "Negative"), (("2",), (1,), 0, "TypeError")])
def test_tensors_beyond_their_storage(tmp_path, size, stride, offset, reason):
    checkpoint = small_checkpoint()
    storage = torch.storage.TypedStorage(wrap_storage=torch.zeros(4).untyped_storage(),
                                         dtype=torch.float32, _internal=True)
    checkpoint["encoder"]._buffers["extra"] = Call(
        torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())
    for form in FORMS:
        refused(save(checkpoint, tmp_path / "odd.pth.tar", form), reason)
