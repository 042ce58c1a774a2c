"""Networks of timm as encoder: any of them trains, resumes and is read again; where its cells look;
its weights."""
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from common import BEST, ROOT, call, fails, folders, last_checkpoint
from torch import nn

import demo
import eval
import train
from checkpoint import load_models
from config import Config
from fast import Models
from models import Encoder, build_models, pixel_positions
from utils import UserError


@pytest.mark.parametrize("name, flags", [
    ("test_convnext", ()), ("test_vit", ("--cache_features", "true"))])
def test_every_script(name, flags, tiny, tiny_flags, tmp_path, monkeypatch):
    shutil.copytree(tiny, tmp_path / "data", ignore=shutil.ignore_patterns("ai_challenger*"))
    monkeypatch.setattr("scores.meteor", lambda *_: {})  # which takes seconds to start
    given = [*tiny_flags, *folders(tmp_path), "--data_dir", tmp_path / "data", "--encoder", name]
    for more in (("--epochs", 1), ("--epochs", 2, "--resume")):
        printed = call(train.main, *given, *flags, *more).out
        assert "encoder: as written: fast/ rearranges torchvision's ResNets only" in printed
    dim = last_checkpoint(tmp_path)["decoder"]["init_h.weight"].shape[1]
    if flags:
        features = np.load(tmp_path / "data" / "train_features.npy")
        assert features.shape == (12, 4, 4, dim)
    best = "--checkpoint", tmp_path / "models" / BEST
    call(eval.main, *best, "--results", tmp_path / "r.json", "--beam_size", 1)
    call(demo.main, *best, "--image", ROOT / "images/sample/image_0.jpg", "--out", tmp_path)
    assert (tmp_path / "out_0.jpg").exists()


@pytest.mark.parametrize("name, stride, image_size, shape", [
    ("test_efficientnet", 8, 64, (8, 8, 32)), ("test_convnext", 32, 64, (2, 2, 64)),
    ("test_vit", 32, 96, (6, 6, 64)), ("test_vit_relpos", 16, 160, (10, 10, 96))])
def test_a_checkpoint_gives_the_same_grid(name, stride, image_size, shape):
    """To the last bit, buffers included that a checkpoint does not have."""
    config = Config(encoder=name, encoder_weights="none", encoder_stride=stride,
                    image_size=image_size, decoder_dim=8, emb_dim=8, attention_dim=8)
    encoder, decoder = build_models(config, 10)
    checkpoint = dict(word_map=range(10), encoder=encoder.state_dict(),
                      decoder=decoder.state_dict())
    read, _ = load_models(checkpoint, config, "a file")
    images = torch.randint(0, 256, (2, image_size, image_size, 3), dtype=torch.uint8)
    with torch.no_grad():
        grid = encoder.eval()(images)
        assert torch.equal(read.eval()(images), grid)
    assert grid.shape[1:] == shape and shape[2] == encoder.dim
    assert not torch.allclose(grid[0], grid[1], rtol=1e-3)


def test_the_map_is_the_one_that_the_network_pools():
    encoder = Encoder("test_vit", "none", image_size=160).eval()
    image = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        tokens = encoder.resnet.net.forward_features(image)[0, 1:]  # without the class's
        assert torch.equal(encoder.resnet(image)[0, :, 2, 3], tokens[2 * 10 + 3])
        encoder = Encoder("test_efficientnet", "none").eval()
        net = timm.create_model("test_efficientnet").eval()
        net.load_state_dict(encoder.resnet.net.state_dict(), strict=False)
        pooled = net.forward_head(net.forward_features(image), pre_logits=True)
        assert torch.equal(encoder.resnet(image).mean(dim=(2, 3)), pooled)


@pytest.mark.parametrize("name, image_size, expected", [
    ("tf_efficientnet_lite2", 260, 3), ("tf_efficientnet_lite2", 256, 31),
    ("convnext_atto", 256, 15.5), ("mobilenetv3_small_050", 256, 0)])
def test_a_cell_looks_where_its_position_says(name, image_size, expected):
    """With all weights alike, what a cell depends on is spread evenly around its centre."""
    encoder = Encoder(name, "none", image_size=image_size).eval()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    random = torch.get_rng_state()
    assert encoder.offset == expected
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    for key, module in [*encoder.named_modules()]:
        if isinstance(module, nn.LayerNorm):
            encoder.set_submodule(key, nn.Identity())
    for parameter in encoder.parameters():
        if parameter.ndim > 1:
            parameter.data.fill_(1 / parameter[0].numel())
    part = image_size % 32  # so that padding is the same
    image = (1e-6 * torch.rand(1, 3, 32 + part, 1024 + part)).requires_grad_()
    encoder.resnet(image)[0, :, 0, 16].sum().backward()
    seen, columns = image.grad.sum(dim=(0, 1, 2)), torch.arange(1024 + part)
    centre = ((seen * columns).sum() / seen.sum()).item()
    assert centre == pytest.approx(16 * 32 + expected, abs=0.2)


def test_a_token_looks_at_its_patch():
    encoder = Encoder("vit_tiny_patch16_224", "none", image_size=224).eval()
    assert encoder.offset == 7.5
    image = torch.rand(1, 3, 224, 224, requires_grad=True)
    encoder.resnet(image)[0, :, 5, 9].pow(2).sum().backward()
    seen = image.grad.pow(2).sum(dim=(0, 1)).unflatten(0, (14, 16)).unflatten(2, (14, 16))
    assert seen.sum(dim=(1, 3)).argmax() == 5 * 14 + 9
    assert np.allclose(224 * pixel_positions(encoder, 224, 14), 16 * np.arange(14) + 8)


@pytest.mark.parametrize("name, first, last", [
    ("test_efficientnet", "conv_stem", "blocks.1"), ("resnet10t", "conv1.0", "layer1"),
    ("mobilenetv3_small_050", "conv_stem", "blocks.0"), ("test_vit", "cls_token", "blocks.0"),
    ("vit_tiny_patch16_224", "pos_embed", "blocks.2")])
def test_fine_tuning_begins_after_a_quarter(name, first, last):
    encoder = Encoder(name, "none", image_size=224)
    encoder.fine_tune("top")
    encoder.train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder(torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)).square().sum().backward()
    is_frozen = {key.removeprefix("resnet.net."): not weight.requires_grad
                 for key, weight in encoder.named_parameters()}
    for weight in encoder.parameters():
        assert (weight.grad is None) != weight.requires_grad, "what is not used is dropped"
    names = [key for key, frozen in is_frozen.items() if frozen]
    assert any(key.startswith(first) for key in names) and names[-1].startswith(f"{last}.")
    assert names == [*is_frozen][:len(names)] and len(names) < len(is_frozen)
    stages = [key.rpartition(".")[0] for key in names]
    for key, value in encoder.state_dict().items():
        if key.endswith("running_mean"):
            layer = key.removeprefix("resnet.net.").rpartition(".")[0]
            assert torch.equal(value, before[key]) == (layer in stages), key


def test_batch_norms_of_several_gpus_keep_their_activation(monkeypatch):
    config = Config(encoder="test_efficientnet", encoder_weights="none", fine_tune_encoder=True)
    encoder, decoder = build_models(config, 10)
    state = SimpleNamespace(config=config, encoder=encoder, decoder=decoder,
                            device=torch.device("cuda"))
    monkeypatch.setattr(train, "world_size", lambda: 2)
    monkeypatch.setattr(train, "precision", lambda *_: torch.float32)  # which would ask the GPU
    monkeypatch.setattr(train, "DistributedDataParallel", lambda module: module)
    monkeypatch.setattr(train.fast, "choose", lambda encoder, decoder, *_: Models(
        encoder, encoder, decoder, decoder, {}))
    images = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        grid = encoder.eval()(images)
        shared = train.prepare(state, None, None).training_encoder
        assert any(isinstance(module, nn.SyncBatchNorm) for module in shared.modules())
        assert torch.equal(shared.eval()(images), grid)


def test_weights_of_a_file(tmp_path):
    from safetensors.torch import save_file

    state = timm.create_model("test_vit", img_size=64).state_dict()
    headless = {name: value for name, value in state.items() if not name.startswith("head.")}
    other_head = {"head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)}
    torch.save(state, tmp_path / "weights.pth")
    torch.save({f"module.{name}": value for name, value in headless.items()},
               tmp_path / "parallel.pth")
    torch.save({**headless, **other_head}, tmp_path / "ten.pt")
    save_file(state, tmp_path / "hub.safetensors")
    for file, image_size in (("weights.pth", 64), ("parallel.pth", 64), ("ten.pt", 64),
                             ("hub.safetensors", 64), ("weights.pth", 96)):
        net = Encoder("test_vit", str(tmp_path / file), image_size=image_size).resnet.net
        assert torch.equal(net.blocks[-1].mlp.fc2.weight, state["blocks.5.mlp.fc2.weight"]), file
        is_interpolated = not torch.equal(net.pos_embed, state["pos_embed"])
        assert is_interpolated == (image_size != 64)
    torch.save({**headless, "blocks.6.norm1.weight": state["norm.bias"]}, tmp_path / "deeper.pth")
    (tmp_path / "broken.pth").write_bytes(b"not weights")
    for name, path in (("test_vit", "deeper.pth"), ("test_vit", "broken.pth"),
                       ("test_vit", "missing.safetensors"), ("test_convnext", "weights.pth")):
        with pytest.raises(UserError, match=path):
            Encoder(name, str(tmp_path / path), image_size=64)


def test_no_connection_to_the_hub(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    with pytest.raises(UserError) as raised:
        Encoder("test_convnext", "imagenet")
    for part in ("HF_ENDPOINT", "model.safetensors", "timm/test_convnext",
                 "--encoder_weights PATH", "unreachable"):
        assert part in str(raised.value)


@pytest.mark.parametrize("flags, part", [
    (("--encoder", "convnext_tinyy"), "did you mean convnext_tiny"),
    (("--encoder", "test_vit.no_such_tag"), "no_such_tag"),
    (("--encoder", "pit_ti_224"), "take another network"),
    (("--encoder", "test_vit", "--encoder_stride", 8), "[16]"),
    (("--encoder", "vit_small_patch14_dinov2"), "multiple")])
def test_what_no_network_can_do(flags, part, tiny_flags, tmp_path):
    fails(train.main, *tiny_flags, *flags, *folders(tmp_path), parts=(part,))
