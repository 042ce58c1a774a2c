"""The fused time loop equals the one in models.py: interpreted on the CPU, and as it is where there is a GPU."""
import pytest
import torch
from test_models import WORD_MAP, batch, decoder, loss_of  # noqa: F401  (fixtures)

import models
import train

kernels = pytest.importorskip("kernels")


@pytest.fixture
def on_cpu(monkeypatch):
    """A function after which the fused loop is used on the CPU too, run by Triton's interpreter; without graphs."""
    if torch.cuda.is_available():
        pytest.skip("the kernels are not interpreted where there is a GPU")
    if tuple(map(int, kernels.triton.__version__.split(".")[:2])) < (3, 8):
        pytest.skip("Triton's older interpreters cannot count up to what a kernel has read, with today's NumPy")

    def use():
        monkeypatch.setattr(kernels, "are_usable", lambda grid, pool: True)
        monkeypatch.setattr(kernels.Loop, "run", lambda loop, what, T: getattr(loop, what)(T))
    return use


def loss_and_gradients(decoder, batch):  # noqa: F811
    grid, captions, lengths = batch
    leaf = grid.clone().requires_grad_()
    decoder.zero_grad()
    loss = loss_of(decoder, (leaf, captions, lengths), alpha_c=0.7)
    loss.backward()
    return loss, {"grid": leaf.grad, **{name: p.grad.clone() for name, p in decoder.named_parameters()}}


def check(found, expected, tolerance):
    for name in expected:
        # The bias of the energies moves them all alike, which softmax ignores: its gradient is 0, or rounding noise.
        scale = max(expected[name].abs().max().item(), 1e-3)
        assert (found[name] - expected[name]).abs().max().item() < tolerance * scale, name


def test_loss_and_every_gradient_equal_the_eager_loop(decoder, batch, on_cpu):  # noqa: F811
    loss, gradients = loss_and_gradients(decoder, batch)
    on_cpu()
    fused_loss, fused_gradients = loss_and_gradients(decoder, batch)
    assert fused_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    check(fused_gradients, gradients, 1e-4)


def test_a_second_loop_before_the_first_one_s_gradient(decoder, batch, on_cpu):  # noqa: F811
    grid, captions, lengths = batch
    others = grid.flip(0), captions.flip(0), lengths.flip(0)
    expected = [loss_and_gradients(decoder, part)[1]["fc.weight"] for part in (batch, others)]
    on_cpu()
    decoder.zero_grad()
    losses = [loss_of(decoder, part, alpha_c=0.7) for part in (batch, others)]
    with torch.no_grad():
        loss_of(decoder, batch)
    for loss in losses:
        loss.backward(retain_graph=True)
    assert torch.allclose(decoder.fc.weight.grad, sum(expected), atol=1e-6)
    with pytest.raises(RuntimeError, match="once"):
        losses[0].backward()


def test_captions_equal_those_of_the_eager_loop(decoder, on_cpu):  # noqa: F811
    grid = torch.randn(4, 4, 4, decoder.f_beta.out_features, generator=torch.Generator().manual_seed(5))
    expected = models.beam_search(decoder, grid, 3, 9, WORD_MAP)
    on_cpu()
    found = models.beam_search(decoder, grid, 3, 9, WORD_MAP)
    assert torch.equal(found.words, expected.words) and torch.equal(found.ended, expected.ended)
    assert torch.allclose(found.scores, expected.scores, atol=1e-4)
    assert torch.allclose(found.alphas, expected.alphas, atol=1e-5)


def test_where_triton_does_not_work_a_warning_says_so(monkeypatch):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels.run_on.cache_clear()
    assert kernels.run_on(device)
    kernels.run_on.cache_clear()
    monkeypatch.setattr(kernels, "cell", {(1,): lambda *args: 1 / 0})
    with pytest.warns(UserWarning, match="division by zero.*C compiler"):
        assert not kernels.run_on(device)
    kernels.run_on.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_repeated_steps_on_a_gpu_equal_the_eager_loop(decoder, batch, monkeypatch):  # noqa: F811
    decoder, (grid, captions, lengths) = decoder.cuda(), batch
    for generation in range(4):  # as it is, recorded, replayed
        part = grid.roll(generation, 0).cuda(), captions.roll(generation, 0).cuda(), lengths.roll(generation, 0)
        loss, gradients = loss_and_gradients(decoder, part)
        with monkeypatch.context() as patch:
            patch.setattr(models, "kernels", None)
            eager_loss, eager_gradients = loss_and_gradients(decoder, part)
        assert loss.item() == pytest.approx(eager_loss.item(), rel=1e-5)
        check(gradients, eager_gradients, 1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_frozen_encoder_as_a_graph_gives_the_same(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    encoder = models.Encoder("resnet18", "none").cuda().eval()
    fused = train.Replayed(encoder.folded())
    for size in (4, 4, 3):
        images = torch.randint(0, 256, (size, 64, 64, 3), dtype=torch.uint8, device="cuda")
        with torch.no_grad():
            expected = encoder(images)
        assert torch.allclose(fused(images), expected, atol=1e-4 * expected.abs().max().item())
