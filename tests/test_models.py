"""models.py holds what the paper promises, and finds the captions that a full search finds."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from common import A, D, E, H, SIDE, T, WORD_MAP, loss_of, make_word_map

from backbones import load_resnet
from benchmarks import reference
from config import UserError
from datasets import END, PAD, START, UNK
from decoding import Captions, beam_search, first_largest, never_generated
from models import DecoderWithAttention, Encoder, pixel_positions


def best_of_search(*args):
    """Only the best caption of each picture."""
    found = beam_search(*args)
    return Captions(*(field[:, 0] for field in found[:4]), found.ended)


def plain(decoder, word_map=WORD_MAP):
    """The plain implementation with the same weights."""
    model = reference.DecoderWithAttention(A, E, H, len(word_map), D, dropout=0.0)
    model.load_state_dict(decoder.state_dict())
    return model.eval()


class OnePicture:
    """A decoder as reference.beam_search calls it: whatever it is, the search is compared."""

    def __init__(self, decoder):
        self.decoder = decoder
        self.fc = decoder.fc

    def start(self, grid):
        self.features, h, c = self.decoder.start(grid, 1)
        return grid, h[:, 0], c[:, 0]

    def step(self, _, words, h, c):
        words = self.decoder.embedding(words)
        found = self.decoder.step(self.features, words[:, None], h[:, None], c[:, None])
        return (x[:, 0] for x in found)


def pooled(grid, side=SIDE):
    return F.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)


def plain_loss(model, batch, alpha_c=1.0):
    """The same captions as separate examples, each with a copy of its picture."""
    grid, captions, lengths = batch
    image, caption = lengths.nonzero(as_tuple=True)
    captions, lengths = captions[image, caption], lengths[image, caption]
    scores, alphas = model(pooled(grid)[image], captions, lengths)
    return reference.caption_loss(scores, alphas, captions, lengths, alpha_c)


@pytest.mark.paper
def test_loss_and_every_gradient_equal_the_plain_implementation(decoder, batch):
    grid, captions, lengths = batch
    losses, gradients = [], []
    for model, loss_function in ((decoder, loss_of), (plain(decoder), plain_loss)):
        leaf = grid.clone().requires_grad_()
        loss = loss_function(model, (leaf, captions, lengths), alpha_c=0.7)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        gradients[-1]["grid"] = leaf.grad
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[1].items():
        # The bias of the energies moves them all alike, which softmax ignores: its gradient is
        # rounding noise.
        scale = max(expected.abs().max().item(), 1e-3)
        assert (gradients[0][name] - expected).abs().max().item() < 1e-4 * scale, name


def test_alphas_sum_to_one_while_the_caption_lasts_and_leave_no_pixel_out(decoder, batch):
    grid, captions, lengths = batch
    alphas = decoder(grid, captions, lengths)[2]
    real = torch.arange(T) < (lengths - 1).unsqueeze(2)
    assert torch.allclose(alphas.sum(dim=3), real.float(), atol=1e-5)
    assert (alphas[real] > 0).all()
    first = alphas[0, 1]
    assert not torch.allclose(first[0], first[1], atol=1e-3), "attention must move"


def test_attention_depends_on_every_pixel(decoder):
    grid = torch.randn(1, 2, 2, D)
    words = torch.tensor([[[WORD_MAP[START], 5, WORD_MAP[END]]]])
    lengths = torch.tensor([[3]])
    scores = decoder(grid, words, lengths)[0]
    for cell in range(4):
        changed = grid.clone()
        changed.view(4, D)[cell] += 1
        assert not torch.allclose(scores, decoder(changed, words, lengths)[0], atol=1e-4)


def test_loss_of_a_batch_is_the_token_weighted_mean_of_its_captions(decoder, batch):
    grid, captions, lengths = batch
    together = loss_of(decoder, batch, 0.0)
    total = 0
    for i, j in lengths.nonzero().tolist():
        n = lengths[i, j].item() - 1
        one = grid[i:i + 1], captions[i:i + 1, j:j + 1, :n + 1], lengths[i:i + 1, j:j + 1]
        total += n * loss_of(decoder, one, 0.0)
    tokens = (lengths - 1).clamp(min=0).sum()
    assert together.item() == pytest.approx((total / tokens).item(), rel=1e-5)


def test_padding_and_missing_captions_change_nothing(decoder, batch):
    grid, captions, lengths = batch
    longer = F.pad(captions, (0, 4))
    longer[lengths == 0] = 7
    found = loss_of(decoder, (grid, longer, lengths))
    assert found.item() == pytest.approx(loss_of(decoder, batch).item(), rel=1e-6)


@pytest.mark.paper
@pytest.mark.parametrize("beam_size, length_penalty", [
    (1, 0), (2, 0), (3, 0), (20, 0), (1, 1), (3, 1), (5, 0.7)])
def test_beam_search_equals_one_picture_at_a_time(decoder, beam_size, length_penalty):
    grid = torch.randn(10, 4, 4, D, generator=torch.Generator().manual_seed(2))
    found = best_of_search(decoder, grid, beam_size, 8, WORD_MAP, length_penalty)
    model = OnePicture(decoder)
    lengths = set()
    for i in range(len(grid)):
        ids, score, ended, alphas = reference.beam_search(
            model, grid[i:i + 1], beam_size, 8, WORD_MAP, length_penalty)
        assert found.words[i, :len(ids)].tolist() == ids
        assert (found.words[i, len(ids):] == WORD_MAP[PAD]).all()
        assert found.scores[i].item() == pytest.approx(score, rel=1e-4)
        assert found.ended[i].item() == ended
        assert torch.allclose(found.alphas[i, :len(ids)], alphas, atol=1e-5)
        lengths.add(len(ids))
    assert len(lengths) > 1, "pictures must finish at different steps for this to show anything"


def test_beam_one_is_greedy(decoder):
    grid = torch.randn(5, 4, 4, D, generator=torch.Generator().manual_seed(3))
    found = best_of_search(decoder, grid, 1, 8, WORD_MAP)
    never = never_generated(WORD_MAP, grid.device)
    features, h, c = decoder.start(grid, 1)
    word = torch.full((5, 1), WORD_MAP[START])
    is_open = torch.ones(5, dtype=torch.bool)
    for searched in found.words.unbind(dim=1):
        h, c, _ = decoder.step(features, decoder.embedding(word), h, c)
        word = decoder.fc(h).index_fill(2, never, -torch.inf).argmax(dim=2)
        assert torch.equal(searched[is_open], word[is_open, 0])
        is_open &= word[:, 0] != WORD_MAP[END]


@pytest.mark.parametrize("length_penalty", [0, 0.5, 1])
def test_wide_beam_equals_brute_force(length_penalty):
    """Over four words and at most four of them in a row, the best of all captions that end."""
    torch.manual_seed(4)
    word_map = make_word_map(8)
    max_len = 4
    decoder = DecoderWithAttention(A, E, H, len(word_map), D, 0.0, SIDE)
    for parameter in decoder.parameters():
        parameter.data.normal_(0, 0.5)
    grid = torch.randn(2, 3, 3, D)
    beam_size = 4 ** (max_len + 1)
    found = best_of_search(decoder.eval(), grid, beam_size, max_len, word_map, length_penalty)
    every = []
    for n in range(max_len + 1):
        every += itertools.product(range(1, 5), repeat=n)
    captions = torch.zeros(1, len(every), max_len + 2, dtype=torch.long)
    for row, words in zip(captions[0], every):
        row[:len(words) + 2] = torch.tensor([word_map[START], *words, word_map[END]])
    lengths = torch.tensor([[len(words) + 2 for words in every]])
    for i in range(len(grid)):
        scores, targets, _ = decoder(grid[i:i + 1], captions, lengths)
        log_p = F.log_softmax(scores, dim=1).gather(1, targets[:, None]).squeeze(1)
        totals = [part.sum().item() for part in log_p.split((lengths[0] - 1).tolist())]
        ranks = [total / (len(words) + 1) ** length_penalty
                 for total, words in zip(totals, every)]
        best = max(range(len(every)), key=ranks.__getitem__)
        assert found.words[i, :len(every[best]) + 1].tolist() == [*every[best], word_map[END]]
        assert found.scores[i].item() == pytest.approx(totals[best], rel=1e-4)


def test_a_caption_that_never_ends_is_given_as_far_as_it_goes(decoder):
    decoder.fc.bias.data[WORD_MAP[END]] = -1e4
    grid = torch.randn(2, 4, 4, D)
    found = best_of_search(decoder, grid, 3, 6, WORD_MAP)
    assert not found.ended.any() and found.scores.isfinite().all()
    for i in range(2):
        ids, score, ended, _ = reference.beam_search(
            OnePicture(decoder), grid[i:i + 1], 3, 6, WORD_MAP)
        assert found.words[i].tolist() == ids and len(ids) == 7 and not ended
        assert found.scores[i].item() == pytest.approx(score, rel=1e-4)


def test_special_words_are_never_generated(decoder):
    for word in (PAD, START, UNK):
        decoder.fc.bias.data[WORD_MAP[word]] = 1e4
    found = best_of_search(decoder, torch.randn(4, 4, 4, D), 3, 8, WORD_MAP)
    for words, end in zip(found.words.tolist(), found.ended.tolist()):
        caption = words[:words.index(WORD_MAP[END])] if end else words
        assert not {WORD_MAP[PAD], WORD_MAP[START], WORD_MAP[UNK]} & set(caption)


def test_equal_scores_go_to_the_first(decoder):
    """With no weights at all every word is equally likely, so every choice is a tie."""
    for parameter in decoder.parameters():
        parameter.data.zero_()
    grid = torch.randn(2, 4, 4, D)
    for beam_size in (1, 3):
        found = best_of_search(decoder, grid, beam_size, 3, WORD_MAP)
        ids = reference.beam_search(OnePicture(decoder), grid[:1], beam_size, 3, WORD_MAP)[0]
        assert found.words[0, :len(ids)].tolist() == ids
    values = torch.tensor([[1.0, 3, 3, 2, 3], [0, 0, 0, 0, 0]])
    top, index = first_largest(values, 2)
    assert index.tolist() == [[1, 2], [0, 1]] and top.tolist() == [[3, 3], [0, 0]]


# -------------------------------------------------------------------------------------------------
# Encoder


@pytest.mark.paper
@pytest.mark.parametrize("name, stride, dim", [
    ("resnet18", 32, 512), ("resnet34", 32, 512), ("resnet50", 32, 2048), ("resnet18", 16, 256),
    ("resnet50", 8, 512)])
def test_encoder_equals_the_plain_one(name, stride, dim):
    torch.manual_seed(0)
    encoder = Encoder(name, "none", stride).eval()
    plain_encoder = reference.Encoder(name, 14).eval()
    plain_encoder.resnet = plain_encoder.resnet[:len(encoder.resnet)]
    plain_encoder.load_state_dict(encoder.state_dict())
    images = torch.randint(0, 256, (2, 96, 96, 3), dtype=torch.uint8)
    with torch.no_grad():
        grid = encoder(images)
        assert grid.shape == (2, 96 // stride, 96 // stride, dim) and encoder.dim == dim
        expected = plain_encoder(images)
        assert (pooled(grid, 14) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("stride, side, pixel", [
    (32, 16, 8), (32, 28, 13), (32, 28, 15), (16, 32, 15), (8, 14, 7)])
def test_a_pixel_looks_where_pixel_positions_says(stride, side, pixel):
    """With all weights alike, what a pixel depends on is spread evenly around its centre."""
    encoder = Encoder("resnet18", "none", stride).eval()
    for name, parameter in encoder.named_parameters():
        if name.endswith("weight") and parameter.ndim == 4:
            parameter.data.fill_(1 / parameter[0].numel())
    size = 512
    image = torch.rand(1, 3, size, size, requires_grad=True)
    F.adaptive_avg_pool2d(encoder.resnet(image), side)[0, :, pixel, side // 2].sum().backward()
    weight = image.grad.sum(dim=(0, 1))
    centres = (torch.arange(size) + 0.5) / size
    positions = pixel_positions(encoder, size, side)
    for axis, place in ((1, pixel), (0, side // 2)):
        found = ((weight.sum(dim=axis) * centres).sum() / weight.sum()).item()
        assert found == pytest.approx(positions[place], abs=1 / size)


def test_a_frozen_encoder_does_not_change_in_training():
    encoder = Encoder("resnet18", "none").train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    grid = encoder(torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8))
    assert not grid.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("layers, frozen", [("top", ("0.", "1.", "4.")), ("all", ("none",))])
def test_fine_tuning_trains_what_it_says(layers, frozen):
    encoder = Encoder("resnet18", "none")
    encoder.fine_tune(layers)
    encoder.train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder(torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)).sum().backward()
    for name, parameter in encoder.resnet.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen)
    for name, value in encoder.resnet.state_dict().items():
        if name.endswith("running_mean"):
            assert torch.equal(value, before[f"resnet.{name}"]) == name.startswith(frozen)


def test_encoder_weights_of_a_file(tmp_path):
    resnet = load_resnet("resnet18", "none")
    headless = resnet.state_dict()
    ten_classes = {"fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}
    for state in (headless, {**headless, **ten_classes},
                  {f"module.{name}": tensor for name, tensor in headless.items()}):
        torch.save(state, tmp_path / "weights.pth")
        encoder = Encoder("resnet18", str(tmp_path / "weights.pth"))
        assert torch.equal(encoder.resnet[0].weight, resnet.conv1.weight)
        assert torch.equal(encoder.resnet[7][1].conv2.weight, resnet.layer4[1].conv2.weight)
    (tmp_path / "broken.pth").write_bytes(b"not weights")
    for name, path in (("resnet34", "weights.pth"), ("resnet18", "broken.pth"),
                       ("resnet18", "missing.pth")):
        with pytest.raises(UserError, match=path):
            Encoder(name, str(tmp_path / path))


def test_no_network_for_the_imagenet_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(UserError, match="--encoder_weights none") as raised:
        Encoder("resnet18", "imagenet")
    assert str(tmp_path) in str(raised.value) and "resnet18" in str(raised.value)


@pytest.mark.paper
def test_the_parameters_have_the_original_s_names():
    names = set(dict(DecoderWithAttention(A, E, H, 10, D).named_parameters()))
    layers = ["attention.encoder_att", "attention.decoder_att", "attention.full_att", "init_h",
              "init_c", "f_beta", "fc"]
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    expected |= {f"decode_step.{kind}_{part}"
                 for kind in ("weight", "bias") for part in ("ih", "hh")}
    assert names == expected | {"embedding.weight"}
