"""fast/ gives the numbers of models.py, or steps aside. Without a GPU kernels are interpreted."""
import ast
import dataclasses
import inspect
import textwrap
import warnings

import pytest
import torch
from common import D, WORD_MAP, loss_of
from torch import nn
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fast
import fast.decoder
from config import Config
from decoding import beam_search
from fast import renew
from fast.decoder import FastDecoder, energy
from fast.edits import digests, executed
from fast.encoder import FoldedEncoder, Replayed
from fast.written_for import WRITTEN_FOR
from models import Attention, DecoderWithAttention, Encoder

pytestmark = pytest.mark.paper
kernels = fast.decoder.kernels
CONFIG = Config(image_size=64, encoder="resnet18", encoder_weights="none", encoded_image_size=6)


class Tape(TorchDispatchMode):
    """A CUDA graph on the CPU: what runs is remembered with its tensors and done again on these."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("nonzero", "_local_scalar_dense"), f"{name} waits: no graph records it"
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
            if isinstance(tape := _python_dispatch._get_current_dispatch_mode(), Tape):
                tape.done.append((self.kernel[programs], args, settings, None))
            with _python_dispatch._disable_current_modes():
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
        pytest.skip("Triton's older interpreters cannot count up to what a kernel has read")

    def use():
        monkeypatch.setattr(kernels, "are_usable", lambda grid, pool: True)
        for name in ("attend", "attend_gradient", "keys_gradient", "cell", "cell_gradient"):
            monkeypatch.setattr(kernels, name, Launched(getattr(kernels, name)))
    return use


@pytest.fixture
def batch(batch):
    """Of four steps at most: the interpreter takes its time."""
    grid, captions, lengths = batch
    return grid, captions[:, :, :5], lengths.clamp(max=5)


@pytest.fixture(params=["rearranged", "kernels"])
def quick(request, decoder):
    """The fixture `decoder`, as fast/ runs it."""
    if request.param == "kernels":
        request.getfixturevalue("interpreted")()
    return FastDecoder(decoder)


def loss_and_gradients(runs, owner, batch):
    grid, captions, lengths = batch
    leaf = grid.clone().requires_grad_()
    owner.zero_grad()
    loss = loss_of(runs, (leaf, captions, lengths), alpha_c=0.7)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in owner.named_parameters()}
    return loss.item(), {"grid": leaf.grad, **gradients}


def assert_same(found, expected, tolerance=1e-4):
    assert found[0] == pytest.approx(expected[0], rel=tolerance / 10)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        # The bias of the energies moves them all alike: its gradient is 0, or rounding noise.
        scale = max(gradient.abs().max().item(), 1e-3)
        assert (found[1][name] - gradient).abs().max().item() < tolerance * scale, name


# -------------------------------------------------------------------------------------------------
# The same numbers


def test_loss_and_every_gradient(decoder, quick, batch):
    expected = loss_and_gradients(decoder, decoder, batch)
    assert_same(loss_and_gradients(quick, decoder, batch), expected)


def test_captions_and_their_attention(decoder, quick):
    grid = torch.randn(6, 4, 4, D, generator=torch.Generator().manual_seed(5))
    expected, found = (beam_search(model, grid, 3, 9, WORD_MAP) for model in (decoder, quick))
    assert torch.equal(found.words, expected.words) and torch.equal(found.ended, expected.ended)
    assert torch.allclose(found.scores, expected.scores, atol=1e-4)
    assert torch.allclose(found.alphas, expected.alphas, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_in_reduced_precision(decoder, quick, batch, dtype):
    """Nearly the same; what is summed over alpha stays float32."""
    expected = loss_and_gradients(decoder, decoder, batch)
    with torch.autocast("cpu", dtype):
        assert decoder(*batch)[2].dtype == quick(*batch)[2].dtype == torch.float32
        for runs in (decoder, quick):
            found = loss_and_gradients(runs, decoder, batch)
            assert found[0] == pytest.approx(expected[0], rel=2e-2) and found[0] != expected[0]
            exact, rough = (torch.cat([g.flatten() for g in side[1].values()])
                            for side in (expected, found))
            assert (rough - exact).norm() < 0.1 * exact.norm()


def test_training_keeps_no_hidden_layer_of_the_attention(decoder, batch, monkeypatch):
    """Neither the layer nor anything as large as one picture's part of it, where it is compiled."""
    monkeypatch.setattr(fast.decoder, "LARGE", 0)
    largest = []
    with torch.autograd.graph.saved_tensors_hooks(
            lambda x: largest.append(x.numel()) or x, lambda x: x):
        loss = loss_of(FastDecoder(decoder), batch, alpha_c=0.7)
    per_picture = 5 * 6**2 * 20
    assert max(largest) < max(per_picture, 3 * max(p.numel() for p in decoder.parameters()))
    assert loss.item() == pytest.approx(loss_of(decoder, batch, alpha_c=0.7).item(), rel=1e-5)


def test_without_a_compiler_a_warning_says_what_is_lost(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **settings: lambda *inputs: 1 / 0)
    fast.decoder.compiled.cache_clear()
    inputs = torch.randn(3, 7, 4), torch.randn(3, 5, 4), torch.randn(4)
    with pytest.warns(match="division by zero.*C.. compiler"):
        found = fast.decoder.compiled(energy)(*inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fast.decoder.compiled(energy)(*inputs), found)
        assert torch.equal(found, energy(*inputs))
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


def test_a_second_loop_of_kernels_before_the_first_one_s_gradient(decoder, batch, interpreted):
    grid, captions, lengths = batch
    others = grid.flip(0), captions.flip(0), lengths.flip(0)
    expected = sum(loss_and_gradients(decoder, decoder, part)[1]["fc.weight"]
                   for part in (batch, others))
    interpreted()
    decoder.zero_grad()
    quick = FastDecoder(decoder)
    losses = [loss_of(quick, part, alpha_c=0.7) for part in (batch, others)]
    with torch.no_grad():
        loss_of(quick, batch)
    for loss in losses:
        loss.backward(retain_graph=True)
    assert torch.allclose(decoder.fc.weight.grad, expected, atol=1e-6) and len(quick.loops) == 2
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


def test_repeated_steps(decoder, batch, request):
    """Loops of two lengths as they are, recorded and replayed, in turns."""
    if not torch.cuda.is_available():
        request.getfixturevalue("interpreted")()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoder, quick, recorded = decoder.to(device), FastDecoder(decoder), set()
    for step, T in enumerate((4, 4, 3, 4, 3, 3)):
        grid, captions, lengths = (x.roll(step, 0) for x in batch)
        part = grid.to(device), captions[:, :, :T].to(device), lengths.clamp(max=T)
        expected = loss_and_gradients(decoder, decoder, part)
        assert_same(loss_and_gradients(quick, decoder, part), expected, 1e-3)
        recorded |= {key[:2] for key, function in quick.loops[0].graphs.items() if function.graph}
    assert recorded == {(what, T - 1) for what in ("forward", "backward") for T in (3, 4)}


def test_a_frozen_encoder_as_a_graph(taped, monkeypatch):
    """Two batches are two results, though the graph has one buffer."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = Encoder("resnet18", "none").to(device).eval()
    replayed = Replayed(FoldedEncoder(encoder))
    batches = [torch.randint(0, 256, (size, 64, 64, 3), dtype=torch.uint8, device=device)
               for size in (4, 4, 3, 4)]
    for found, expected in [(replayed(images), encoder(images)) for images in batches]:
        assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max().item())
    assert replayed.recorded.graph


# -------------------------------------------------------------------------------------------------
# The door: whoever edits models.py gets what it says


DIMS = 20, 12, 16, len(WORD_MAP), D, 0.5, 6
GRID = torch.rand(2, 4, 4, D, generator=torch.Generator().manual_seed(0))


def test_fast_is_written_for_this_code():
    """Where this fails after an edit that fast/ follows: python -m fast.renew."""
    assert digests("encoder", Encoder("resnet18", "none")) == WRITTEN_FOR["encoder"]
    assert digests("decoder", DecoderWithAttention(*DIMS)) == WRITTEN_FOR["decoder"]


@pytest.mark.parametrize("on", ["cpu", "kernels", "cuda"])
def test_an_unedited_decoder_runs_fast(on, request, batch):
    """Loss and every gradient of a training step, with dropout, are those of models.py."""
    if on == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if on == "kernels":
        request.getfixturevalue("interpreted")()
    device = torch.device("cuda" if on == "cuda" else "cpu")
    torch.manual_seed(0)
    model = DecoderWithAttention(*DIMS).to(device)
    grid, captions, lengths = batch
    grid, captions = grid.to(device), captions.to(device)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quick, how = fast.choose_decoder(model, GRID.to(device))
    assert how == "fast" and isinstance(quick, FastDecoder)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    sides = []
    for side in (model, quick):
        torch.manual_seed(7)  # dropout
        side.train()
        sides.append(loss_and_gradients(side, model, (grid, captions, lengths)))
    assert_same(sides[1], sides[0], 1e-3)


class Scheduled(DecoderWithAttention):
    """Scheduled sampling, whose share rises from 0: until then no number shows it."""

    share = 0.0

    def step(self, features, words, h, c):
        if self.share > 0:
            words = words.flip(0)
        return super().step(features, words, h, c)


class Tanh(Attention):
    def forward(self, a, keys, h):
        hidden = torch.tanh(keys.unsqueeze(1) + self.decoder_att(h).unsqueeze(2))
        alpha = torch.softmax(self.full_att(hidden).squeeze(3).float(), dim=2)
        return alpha @ a, alpha


def typed(*dims):
    """A decoder of a class whose code is in no file."""
    namespace = {"DecoderWithAttention": DecoderWithAttention, "__name__": "typed"}
    exec("class Typed(DecoderWithAttention): pass", namespace)
    return namespace["Typed"](*dims)


DECODERS = {  # of what class, what else is edited, and what is said of it
    "scheduled sampling": (Scheduled, {}, "edited (test_fast.Scheduled)"),
    "another attention": (DecoderWithAttention, {"attention": lambda: Tanh(D, 16, 20)},
                          "edited (test_fast.Tanh)"),
    "a method of its own": (DecoderWithAttention, {"step": lambda: print},
                            "edited (a hook or method of one module)"),
    "typed": (typed, {}, "edited (typed.Typed)"),
    "a scalar gate": (DecoderWithAttention, {"f_beta": lambda: nn.Linear(16, 1)},
                      "it has another f_beta.weight"),
    "no dropout": (DecoderWithAttention, {"dropout": lambda: nn.Dropout(0.9)}, None),
}


@pytest.mark.parametrize("edit", DECODERS)
def test_an_edited_decoder_runs_as_written(edit):
    kind, parts, line = DECODERS[edit]
    model = kind(*DIMS)
    for name, part in parts.items():
        setattr(model, name, part())
    quick, how = fast.choose_decoder(model, GRID)
    if line is None:
        assert how == "fast"
    else:
        assert quick is model and how == f"as written: {line}"


def test_a_method_put_into_a_class_is_an_edit(monkeypatch):
    written = DecoderWithAttention.step
    monkeypatch.setattr(DecoderWithAttention, "step", lambda *given: written(*given))
    model = DecoderWithAttention(*DIMS)
    line = "as written: edited (models.DecoderWithAttention)"
    assert fast.choose_decoder(model, GRID) == (model, line)


def test_only_what_is_executed_counts():
    source = textwrap.dedent(inspect.getsource(Scheduled))
    same = source.replace("self, features,", "self, features: tuple[int],  # why\n").replace(
        "share = 0.0", "share: float = 0.0").replace("until then", "by then")
    assert same != source and executed(ast.parse(same)) == executed(ast.parse(source))
    for edit in (("0.0", "0.1"), (">", ">="), ("h, c)", "c, h)"), ("(DecoderWithAttention)", "")):
        assert executed(ast.parse(source.replace(*edit))) != executed(ast.parse(source)), edit


@pytest.mark.parametrize("code", [0, 1])
def test_code_is_renewed_only_where_tests_pass(code, tmp_path, monkeypatch):
    path = tmp_path / "written_for.py"
    path.write_text("before")
    monkeypatch.setattr(renew, "PATH", path)
    monkeypatch.setattr(renew.subprocess, "call", lambda *given, **how: code)
    if code:
        with pytest.raises(SystemExit):
            renew.main()
        assert path.read_text() == "before"
    else:
        renew.main()
        assert path.read_text() == (renew.ROOT / "fast" / "written_for.py").read_text()


@pytest.mark.parametrize("grids, line", [
    (1, "fast"), (2, "as written: fast/ gives another gradient of init_h.weight")])
def test_a_gradient_that_differs_on_one_grid_is_rounding(grids, line, monkeypatch):
    outcomes, wrong = fast.outcomes, []

    def flipped(runs, owner, grid):
        found = outcomes(runs, owner, grid)
        if isinstance(runs, FastDecoder) and len(wrong) < grids:
            wrong.append(found["gradient of init_h.weight"].mul_(1.01))
        return found
    monkeypatch.setattr(fast, "outcomes", flipped)
    assert fast.choose_decoder(DecoderWithAttention(*DIMS), GRID)[1] == line


@pytest.mark.parametrize("fault, line", [
    ("capture", "does not run here"), ("replay", "gives another")])
def test_kernels_whose_graphs_fail_are_not_used(fault, line, interpreted, monkeypatch):
    interpreted()
    if fault == "capture":
        monkeypatch.setattr(torch.cuda, "graph", lambda tape, **settings: 1 / 0)
    else:
        monkeypatch.setattr(Tape, "replay", lambda tape: None)
    model = DecoderWithAttention(*DIMS)
    runs, how = fast.choose_decoder(model, GRID)
    assert runs is model and how.startswith(f"as written: fast/ {line}")


class SqueezeAndExcitation(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block, self.excite = block, nn.Linear(block.bn2.num_features, block.bn2.num_features)

    def forward(self, x):
        x = self.block(x)
        return x * torch.sigmoid(self.excite(x.mean(dim=(2, 3))))[:, :, None, None]


def squeeze_and_excite(encoder):
    encoder.resnet[7][1] = SqueezeAndExcitation(encoder.resnet[7][1])


def without_a_relu(encoder):
    encoder.resnet[7][1].relu = nn.Identity()


ENCODERS = {  # how the encoder is edited, and what is said of it
    "normalisation": (lambda encoder: encoder.mean.add_(40), "fast"),
    "a new module": (squeeze_and_excite, "as written: edited (test_fast.SqueezeAndExcitation)"),
    "another module": (without_a_relu, "as written: fast/ gives another grid"),
    "a hook": (lambda encoder: encoder.register_forward_hook(lambda *args: 2 * args[2]),
               "as written: edited (a hook or method of one module)"),
}


@pytest.mark.parametrize("edit", ENCODERS)
def test_an_edited_encoder_is_believed(edit):
    """The grid is that of models.py, in training and evaluation; the run's random numbers stay."""
    change, line = ENCODERS[edit]
    encoder = encoder_with_statistics("resnet18")
    decoder = DecoderWithAttention(20, 12, 16, 40, 512)
    change(encoder)
    numbers = torch.random.get_rng_state()
    models = fast.choose(encoder, decoder, CONFIG, torch.float32)
    assert torch.equal(torch.random.get_rng_state(), numbers)
    assert models.summary() == f"encoder: {line}; decoder: fast"
    images = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        expected = encoder.eval()(images)
    for runs in (models.encoder, models.training_encoder):
        error = (runs.train()(images) - expected).abs().max()
        assert error <= 1e-3 * expected.abs().max()


def test_a_function_that_builds_the_encoder_is_part_of_it(monkeypatch):
    monkeypatch.setattr("models.backbone", lambda *given: None)
    encoder = Encoder.__new__(Encoder)
    nn.Module.__init__(encoder)
    assert fast.choose_encoder(encoder, CONFIG, None)[2] == "as written: edited (models.backbone)"


def test_an_encoder_that_is_trained_runs_as_written():
    encoder, decoder = Encoder("resnet18", "none"), DecoderWithAttention(20, 12, 16, 40, 512)
    config = dataclasses.replace(CONFIG, fine_tune_encoder=True)
    assert fast.choose(encoder, decoder, config, torch.float32).training_encoder is encoder
    assert isinstance(fast.choose(encoder, decoder, config).encoder, FoldedEncoder)
