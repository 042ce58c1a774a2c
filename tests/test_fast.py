"""fast/ gives the numbers of models.py, or steps aside. The kernels are interpreted on the CPU, and run on a GPU."""
import dataclasses
import warnings

import pytest
import torch
from common import D, WORD_MAP, loss_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

import fast
import fast.decoder
from config import Config
from fast.decoder import FastDecoder, energy
from fast.encoder import FoldedEncoder, Replayed
from decoding import beam_search
from models import Attention, DecoderWithAttention, Encoder

pytestmark = pytest.mark.paper
kernels = fast.decoder.kernels
CONFIG = Config(image_size=64, encoder="resnet18", encoder_weights="none", encoded_image_size=6)


class Tape(TorchDispatchMode):
    """A CUDA graph on the CPU: what runs is remembered with its tensors and done again on these; Python is not."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("nonzero", "_local_scalar_dense"), f"{name} waits for the GPU, which a graph cannot record"
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.done.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self.done:
            for new, old in zip(tree_leaves(function(*args, **kwargs)), tree_leaves(out)):
                if isinstance(old, torch.Tensor) and new is not old:
                    old.copy_(new)


class Launched:
    """A Triton kernel that a Tape can remember."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, programs):
        def launch(*args, **settings):
            if isinstance(tape := _get_current_dispatch_mode(), Tape):
                tape.done.append((self.kernel[programs], args, settings, None))
            with _disable_current_modes():
                self.kernel[programs](*args, **settings)
        return launch


@pytest.fixture
def taped(monkeypatch):
    """CUDA graphs, where there is no GPU as tapes."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
        monkeypatch.setattr(torch.cuda, "graph", lambda tape, **settings: tape)


@pytest.fixture
def interpreted(taped, monkeypatch):
    """A function after which the kernels are used on the CPU too, run by Triton's interpreter."""
    if kernels is None or torch.cuda.is_available():
        pytest.skip("the kernels are not interpreted where there is a GPU")
    if tuple(map(int, kernels.triton.__version__.split(".")[:2])) < (3, 8):
        pytest.skip("Triton's older interpreters cannot count up to what a kernel has read, with today's NumPy")

    def use():
        monkeypatch.setattr(kernels, "are_usable", lambda grid, pool: True)
        for name in ("attend", "attend_gradient", "keys_gradient", "cell", "cell_gradient"):
            monkeypatch.setattr(kernels, name, Launched(getattr(kernels, name)))
    return use


@pytest.fixture(params=["rearranged", "attention as written", "kernels"])
def quick(request, decoder):  # noqa: F811
    """The fixture `decoder`, as fast/ runs it."""
    if request.param == "kernels":
        request.getfixturevalue("interpreted")()
    return FastDecoder(decoder, decoder.attention if request.param == "attention as written" else None)


def loss_and_gradients(runs, owner, batch):  # noqa: F811
    grid, captions, lengths = batch
    leaf = grid.clone().requires_grad_()
    owner.zero_grad()
    loss = loss_of(runs, (leaf, captions, lengths), alpha_c=0.7)
    loss.backward()
    return loss.item(), {"grid": leaf.grad, **{name: p.grad.clone() for name, p in owner.named_parameters()}}


def assert_same(found, expected, tolerance=1e-4):
    assert found[0] == pytest.approx(expected[0], rel=tolerance / 10)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        # The bias of the energies moves them all alike, which softmax ignores: its gradient is 0, or rounding noise.
        scale = max(gradient.abs().max().item(), 1e-3)
        assert (found[1][name] - gradient).abs().max().item() < tolerance * scale, name


# ---------------------------------------------------------------------------------------------------------------------
# The same numbers


def test_loss_and_every_gradient(decoder, quick, batch):  # noqa: F811
    assert_same(loss_and_gradients(quick, decoder, batch), loss_and_gradients(decoder, decoder, batch))


@pytest.mark.parametrize("beam_size", [1, 3])
def test_captions_and_their_attention(decoder, quick, beam_size):  # noqa: F811
    grid = torch.randn(6, 4, 4, D, generator=torch.Generator().manual_seed(5))
    expected, found = (beam_search(model, grid, beam_size, 9, WORD_MAP) for model in (decoder, quick))
    assert torch.equal(found.words, expected.words) and torch.equal(found.ended, expected.ended)
    assert torch.allclose(found.scores, expected.scores, atol=1e-4)
    assert torch.allclose(found.alphas, expected.alphas, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_in_reduced_precision(decoder, quick, batch, dtype):  # noqa: F811
    """Nearly the same; what is summed over alpha stays float32."""
    expected = loss_and_gradients(decoder, decoder, batch)
    with torch.autocast("cpu", dtype):
        assert decoder(*batch)[2].dtype == quick(*batch)[2].dtype == torch.float32
        for runs in (decoder, quick):
            found = loss_and_gradients(runs, decoder, batch)
            assert found[0] == pytest.approx(expected[0], rel=2e-2) and found[0] != expected[0]
            together = [torch.cat([g.flatten() for g in side[1].values()]) for side in (expected, found)]
            assert (together[1] - together[0]).norm() < 0.1 * together[0].norm()


def test_training_keeps_no_hidden_layer_of_the_attention(decoder, batch, monkeypatch):  # noqa: F811
    """Neither the layer nor anything as large as one picture's part of it, at any step, where it is compiled."""
    monkeypatch.setattr(fast.decoder, "LARGE", 0)
    largest = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: largest.append(x.numel()) or x, lambda x: x):
        loss = loss_of(FastDecoder(decoder), batch, alpha_c=0.7)
    per_picture = 5 * 6**2 * 20
    assert max(largest) < max(per_picture, 3 * max(parameter.numel() for parameter in decoder.parameters()))
    assert loss.item() == pytest.approx(loss_of(decoder, batch, alpha_c=0.7).item(), rel=1e-5)


def test_without_a_compiler_a_warning_says_what_is_lost(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **settings: lambda *inputs: 1 / 0)
    fast.decoder.compiled.cache_clear()
    inputs = torch.randn(3, 7, 4), torch.randn(3, 5, 4), torch.randn(4)
    with pytest.warns(match="division by zero.*C.. compiler"):
        found = fast.decoder.compiled(energy)(*inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fast.decoder.compiled(energy)(*inputs), found) and torch.equal(found, energy(*inputs))
    fast.decoder.compiled.cache_clear()


def encoder_with_statistics(name, stride=32):
    torch.manual_seed(0)
    encoder = Encoder(name, "none", stride)
    for norm in (module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 2)
        norm.weight.data.uniform_(0.2, 1)
        norm.bias.data.normal_(0, 0.1)
    return encoder


@pytest.mark.parametrize("name, stride", [("resnet18", 32), ("resnet50", 32), ("resnet18", 16)])
def test_a_folded_encoder_gives_the_same_and_leaves_the_other_alone(name, stride):
    encoder = encoder_with_statistics(name, stride)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    folded = FoldedEncoder(encoder)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    expected = encoder.eval()(images)
    assert torch.allclose(folded(images), expected, atol=1e-4 * expected.abs().max().item())
    assert not any(p.requires_grad for p in folded.parameters())
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())


def test_a_second_loop_of_kernels_before_the_first_one_s_gradient(decoder, batch, interpreted):  # noqa: F811
    grid, captions, lengths = batch
    others = grid.flip(0), captions.flip(0), lengths.flip(0)
    expected = [loss_and_gradients(decoder, decoder, part)[1]["fc.weight"] for part in (batch, others)]
    interpreted()
    decoder.zero_grad()
    quick = FastDecoder(decoder)
    losses = [loss_of(quick, part, alpha_c=0.7) for part in (batch, others)]
    with torch.no_grad():
        loss_of(quick, batch)
    for loss in losses:
        loss.backward(retain_graph=True)
    assert torch.allclose(decoder.fc.weight.grad, sum(expected), atol=1e-6) and len(quick.loops) == 2
    with pytest.raises(RuntimeError, match="once"):
        losses[0].backward()


def test_where_triton_does_not_work_a_warning_says_so(monkeypatch):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels.run_on.cache_clear()
    assert kernels.run_on(device)
    kernels.run_on.cache_clear()
    monkeypatch.setattr(kernels, "cell", {(1,): lambda *args: 1 / 0})
    with pytest.warns(UserWarning, match="division by zero.*C compiler"):
        assert not kernels.run_on(device)
    kernels.run_on.cache_clear()


def test_repeated_steps(decoder, batch, request):  # noqa: F811
    """Loops of two lengths as they are, recorded and replayed, in turns."""
    if not torch.cuda.is_available():
        request.getfixturevalue("interpreted")()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoder, quick, recorded = decoder.to(device), FastDecoder(decoder), set()
    for step, T in enumerate((4, 4, 3, 4, 3, 3)):
        grid, captions, lengths = (x.roll(step, 0) for x in batch)
        part = grid.to(device), captions[:, :, :T].to(device), lengths.clamp(max=T)
        assert_same(loss_and_gradients(quick, decoder, part), loss_and_gradients(decoder, decoder, part), 1e-3)
        recorded |= {key[:2] for key, function in quick.loops[0].graphs.items() if function.graph}
    assert recorded == {(what, T - 1) for what in ("forward", "backward") for T in (3, 4)}


def test_a_frozen_encoder_as_a_graph(taped, monkeypatch):
    """Two batches are two results, though the graph has one buffer."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = Encoder("resnet18", "none").to(device).eval()
    replayed = Replayed(FoldedEncoder(encoder))
    batches = [torch.randint(0, 256, (size, 64, 64, 3), dtype=torch.uint8, device=device) for size in (4, 4, 3, 4)]
    for found, expected in [(replayed(images), encoder(images)) for images in batches]:
        assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max().item())
    assert replayed.recorded.graph


# ---------------------------------------------------------------------------------------------------------------------
# The door: whoever edits models.py gets what it says


class Tanh(Attention):
    def forward(self, a, keys, h):
        hidden = torch.tanh(keys.unsqueeze(1) + self.decoder_att(h).unsqueeze(2))
        alpha = torch.softmax(self.full_att(hidden).squeeze(3).float(), dim=2)
        return alpha @ a, alpha


class DotProduct(Attention):
    def __init__(self, encoder_dim, decoder_dim, attention_dim):
        super().__init__(encoder_dim, decoder_dim, attention_dim)
        del self.full_att

    def forward(self, a, keys, h):
        alpha = torch.softmax((self.decoder_att(h) @ keys.transpose(1, 2)).float() / keys.shape[2] ** 0.5, dim=2)
        return alpha @ a, alpha


class Normalised(DecoderWithAttention):
    """A LayerNorm in the LSTM's input."""

    def __init__(self, *dims):
        super().__init__(*dims)
        self.norm = nn.LayerNorm(self.decode_step.input_size)

    def step(self, features, words, h, c):
        z, alpha = self.attention(*features, h)
        x = self.norm(torch.cat([words, torch.sigmoid(self.f_beta(h)) * z], dim=2))
        h, c = self.decode_step(x.flatten(0, 1), (h.flatten(0, 1), c.flatten(0, 1)))
        return h.unflatten(0, words.shape[:2]), c.unflatten(0, words.shape[:2]), alpha


class Dropped(DecoderWithAttention):
    """Dropout on the initial state too, which only training shows."""

    def start(self, grid, K):
        features, h, c = super().start(grid, K)
        return features, self.dropout(h), c


class SqueezeAndExcitation(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block, self.excite = block, nn.Linear(block.bn2.num_features, block.bn2.num_features)

    def forward(self, x):
        x = self.block(x)
        return x * torch.sigmoid(self.excite(x.mean(dim=(2, 3))))[:, :, None, None]


DIMS = 20, 12, 16, len(WORD_MAP), D, 0.5, 6
ATTENTION, WRITTEN = "fast, but attention as written: models.py ", "as written: models.py "
DECODERS = {  # how the decoder is edited, and what is said of it
    "nothing": (DecoderWithAttention, None, "fast"),
    "tanh": (DecoderWithAttention, dict(attention=lambda: Tanh(D, 16, 20)), ATTENTION + "gives another score"),
    "dot product": (DecoderWithAttention, dict(attention=lambda: DotProduct(D, 16, 20)), ATTENTION + "has no attent"),
    "a scalar gate": (DecoderWithAttention, dict(f_beta=lambda: nn.Linear(16, 1)), ATTENTION + "has another f_beta"),
    "a LayerNorm": (Normalised, None, WRITTEN + "has a new norm.weight"),
    "dropout": (Dropped, None, WRITTEN + "gives another score"),
}


@pytest.mark.parametrize("on", ["cpu", "kernels", "cuda"])
@pytest.mark.parametrize("edit", DECODERS)
def test_an_edited_decoder_is_believed(edit, on, request, batch):  # noqa: F811
    """Loss and every gradient of a training step are those of models.py, and the line says what differs."""
    if on == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if on == "kernels":
        request.getfixturevalue("interpreted")()
    kind, parts, line = DECODERS[edit]
    torch.manual_seed(0)
    model = kind(*DIMS)
    for name, part in (parts or {}).items():
        setattr(model, name, part())
    grid, captions, lengths = batch
    device = torch.device("cuda" if on == "cuda" else "cpu")
    model, grid, captions = model.to(device), grid.to(device), captions.to(device)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runs, report = fast.choose_decoder(model, torch.rand(2, 4, 4, D).to(device))
    assert report.startswith(line)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    sides = []
    for side in (model, runs):
        torch.manual_seed(7)  # dropout
        side.train()
        sides.append(loss_and_gradients(side, model, (grid, captions, lengths)))
    assert_same(sides[1], sides[0], 1e-3)


@pytest.mark.parametrize("batches, line", [(1, "fast"), (2, ATTENTION + "gives another gradient of init_h.weight")])
def test_a_gradient_that_differs_on_one_batch_is_rounding(batches, line, monkeypatch):
    outcomes, wrong = fast.outcomes, []

    def flipped(runs, owner, grid):
        found = outcomes(runs, owner, grid)
        if isinstance(runs, FastDecoder) and runs.written is None and len(wrong) < batches:
            wrong.append(found["gradient of init_h.weight"].mul_(1.01))
        return found
    monkeypatch.setattr(fast, "outcomes", flipped)
    assert fast.choose_decoder(DecoderWithAttention(*DIMS), torch.rand(2, 4, 4, D))[1] == line


@pytest.mark.parametrize("fault, line", [("capture", "fast/ cannot follow models.py"), ("replay", "models.py gives")])
def test_kernels_whose_graphs_fail_are_not_used(fault, line, interpreted, monkeypatch):
    interpreted()
    monkeypatch.setattr(*{"capture": (torch.cuda, "graph", lambda tape, **settings: 1 / 0),
                          "replay": (Tape, "replay", lambda tape: None)}[fault])
    runs, report = fast.choose_decoder(DecoderWithAttention(*DIMS), torch.rand(2, 4, 4, D))
    assert report.startswith(f"fast, but attention as written: {line}") and runs.written is not None


def squeeze_and_excite(encoder):
    encoder.resnet[7][1] = SqueezeAndExcitation(encoder.resnet[7][1])


ENCODERS = {  # how the encoder is edited, and what is said of it
    "nothing": (lambda encoder: None, "fast"),
    "squeeze and excitation": (squeeze_and_excite, "as written: "),
    "normalisation": (lambda encoder: encoder.mean.add_(40), "fast"),
    "a grid that is scaled": (lambda encoder: encoder.register_forward_hook(lambda *args: 2 * args[2]),
                              "as written: models.py gives another grid"),
}


@pytest.mark.parametrize("edit", ENCODERS)
def test_an_edited_encoder_is_believed(edit):
    """The grid is that of models.py, in training and in evaluation; random numbers of the run stay as they were."""
    change, line = ENCODERS[edit]
    encoder, decoder = encoder_with_statistics("resnet18"), DecoderWithAttention(20, 12, 16, 40, 512)  # noqa: F811
    change(encoder)
    numbers = torch.random.get_rng_state()
    chosen = fast.choose(encoder, decoder, CONFIG, torch.float32)
    assert torch.equal(torch.random.get_rng_state(), numbers)
    assert chosen.report["encoder"].startswith(line), chosen.report
    images = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        expected = encoder.eval()(images)
    for runs in (chosen.encoder, chosen.training_encoder):
        assert torch.allclose(runs.train()(images), expected, atol=1e-3 * expected.abs().max().item())


def test_an_encoder_that_is_trained_runs_as_written():
    encoder, decoder = Encoder("resnet18", "none"), DecoderWithAttention(20, 12, 16, 40, 512)  # noqa: F811
    config = dataclasses.replace(CONFIG, fine_tune_encoder=True)
    assert fast.choose(encoder, decoder, config, torch.float32).training_encoder is encoder
    assert isinstance(fast.choose(encoder, decoder, config).encoder, FoldedEncoder)
