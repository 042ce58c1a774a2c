"""The one door to speed: models.py's own functions, faster, and only where they do the same.

An edited half of the model runs as written (edits.py). Otherwise `choose` looks at the very modules
that will run and tries both ways on a small random batch, in float32, with their own weights and on
their own device, whose kernels may fail: outputs and every gradient must agree.
"""
import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backbones import RESNETS
from config import Config
from fast.decoder import FastDecoder, other_parameter
from fast.edits import edits
from fast.encoder import FoldedEncoder, Replayed
from models import DecoderWithAttention, Encoder

CHECK_SIDE = 128  # pixels of the pictures that the encoder is tried with, at most
TOLERANCE = 1e-3  # of the largest value; rounding gives 1e-5, an edit that matters 1e-2
ROUGH = 0.1  # the same in bfloat16, where rounding gives 0.015 and a graph that fails more


class Models(NamedTuple):
    """What runs in the places of the two halves of a model."""

    encoder: nn.Module  # for validation, evaluation, kept features: float32; folded, no gradients
    training_encoder: nn.Module  # in training's precision
    decoder: nn.Module
    training_decoder: nn.Module  # the same, unless several processes share a batch
    report: dict[str, str]  # "encoder", "decoder" -> how each runs, and why

    def summary(self) -> str:
        return "; ".join(f"{half}: {how}" for half, how in self.report.items())


def choose(encoder: Encoder, decoder: DecoderWithAttention, config: Config,
           dtype: torch.dtype | None = None) -> Models:
    """Decide how the two halves run; weights and random numbers stay as they are.

    Takes less than a second on a GPU. `dtype` is what a frozen encoder multiplies in while the
    decoder is trained; None where nothing is trained.
    """
    if not config.fast:
        how = "as written (--fast false)"
        return Models(encoder, encoder, decoder, decoder, {"encoder": how, "decoder": how})

    device = next(decoder.parameters()).device
    encoder.to(memory_format=torch.channels_last)
    encoder.eval()
    with (torch.random.fork_rng([device] if device.type == "cuda" else []),
          torch.backends.cudnn.flags(enabled=True, allow_tf32=False)):
        torch.manual_seed(0)
        quick_encoder, training_encoder, encoder_runs = choose_encoder(encoder, config, dtype)
        cells = -(-config.image_size // encoder.stride)
        grid = torch.rand(2, cells, cells, encoder.dim, device=device)
        quick_decoder, decoder_runs = choose_decoder(decoder, grid)
    report = {"encoder": encoder_runs, "decoder": decoder_runs}
    return Models(quick_encoder, training_encoder, quick_decoder, quick_decoder, report)


def choose_encoder(encoder: Encoder, config: Config,
                   dtype: torch.dtype | None) -> tuple[nn.Module, nn.Module, str]:
    """What runs in evaluation, what runs in training, and how, in words."""
    if config.encoder not in RESNETS:
        return encoder, encoder, "as written: fast/ rearranges torchvision's ResNets only"
    if names := edits("encoder", encoder):
        return encoder, encoder, f"as written: edited ({', '.join(names)})"
    if dtype is not None and config.fine_tune_encoder:
        return encoder, encoder, "as written, as it is trained"
    try:
        return fold(encoder, min(config.image_size, CHECK_SIDE), dtype)
    except Exception as error:  # whatever a device makes of it
        return encoder, encoder, f"as written: fast/ does not run here ({type(error).__name__})"


@torch.no_grad()
def fold(encoder: Encoder, side: int,
         dtype: torch.dtype | None) -> tuple[nn.Module, nn.Module, str]:
    """As choose_encoder, of unedited code; tries random pictures of so many pixels a side."""
    images = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8).to(encoder.mean.device)
    grid = encoder(images).float()
    folded = FoldedEncoder(encoder).eval()
    is_right = is_close(folded(images), grid)

    training, tried, passes = folded, folded, 0
    if dtype not in (None, torch.float32):
        training = tried = FoldedEncoder(encoder, dtype)
        passes = 1
    if dtype is not None and images.is_cuda:
        training, tried = Replayed(training), Replayed(training)
        passes = 3  # the second is recorded, the third replayed
    for _ in range(passes):
        is_right = is_right and is_close(tried(images), grid, ROUGH * grid.abs().max())
    if not is_right:
        return encoder, encoder, "as written: fast/ gives another grid"
    return folded, training, "fast"


def choose_decoder(decoder: DecoderWithAttention, grid: Tensor) -> tuple[nn.Module, str]:
    """What runs, and how, in words; tried with a random grid (2, h, w, D)."""
    if names := edits("decoder", decoder):
        return decoder, f"as written: edited ({', '.join(names)})"
    try:
        if name := other_parameter(decoder):
            return decoder, f"as written: it has another {name}"
        other = other_outcome(decoder, grid)
    except Exception as error:  # whatever a device or its compilers make of it
        what = f"{type(error).__name__}: {str(error):.80}"
        return decoder, f"as written: fast/ does not run here ({what})"
    if other:
        return decoder, f"as written: fast/ gives another {other}"
    return FastDecoder(decoder), "fast"


def other_outcome(decoder: DecoderWithAttention, grid: Tensor) -> str | None:
    """The first outcome in which FastDecoder differs from the decoder; None where all are the same.

    Rounding may turn a relu on or off, which only gradients show: they must differ for two grids.
    """
    twin = copy.deepcopy(decoder)  # stays in the mode it is in
    fast_twin = FastDecoder(twin)
    passes = 3 if fast_twin.is_fused(grid) else 1  # the second is recorded, the third replayed
    for tried in (grid, 1 - grid):
        other = None
        for x in (tried, tried.flip(0), 2 * tried)[:passes]:
            other = other or difference(outcomes(fast_twin, twin, x), outcomes(twin, twin, x))
        if other is None or not other.startswith("gradient"):
            break
    return other


def outcomes(runs: nn.Module, owner: DecoderWithAttention,
             grid: Tensor) -> dict[str, Tensor | None]:
    """All that training and decoding make of a small batch, by name. `owner` has the parameters."""
    vocab_size = owner.fc.out_features
    lengths = torch.tensor([[6, 3, 0], [2, 5, 4]])
    generator = torch.Generator().manual_seed(0)
    captions = torch.randint(vocab_size, (2, 3, 6), generator=generator).to(grid.device)
    return {**trained(runs, owner, grid, captions, lengths), **decoded(runs, grid, captions[:, :2])}


def trained(runs: nn.Module, owner: DecoderWithAttention, grid: Tensor, captions: Tensor,
            lengths: Tensor) -> dict[str, Tensor | None]:
    grid = grid.detach().requires_grad_()
    runs.train()
    torch.manual_seed(1)  # dropout
    scores, targets, alphas = runs(grid, captions, lengths)
    loss = 0
    for x in (scores, alphas):
        loss = loss + (x * torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x)).sum()
    names, parameters = zip(*owner.named_parameters())
    gradients = torch.autograd.grad(loss, [grid, *parameters], allow_unused=True)
    found = {"score": scores, "target": targets, "alpha": alphas}
    for name, gradient in zip(["grid", *names], gradients):
        found[f"gradient of {name}"] = gradient
    return found


@torch.no_grad()
def decoded(runs: nn.Module, grid: Tensor, words: Tensor) -> dict[str, Tensor]:
    runs.eval()
    features, h, c = runs.start(grid, words.shape[1])
    found = {}
    for t in range(2):
        h, c, alpha = runs.step(features, runs.embedding(words[:, :, t]), h, c)
        found[f"alpha of decoding, step {t + 1}"] = alpha
    return {**found, "h of decoding": h, "c of decoding": c}


def difference(found: dict, expected: dict) -> str | None:
    """The name of the first outcome that is not as expected; None where all are."""
    largest = max(x.abs().max() for name, x in expected.items()
                  if name.startswith("gradient") and x is not None)
    for name, value in expected.items():
        # A gradient that is zero but for rounding, as the energies' bias has, may be any rounding.
        floor = 1e-2 * TOLERANCE * largest if name.startswith("gradient") else 0
        if value is None or found[name] is None:
            if found[name] is not value:
                return name
        elif not is_close(found[name], value, floor):
            return name
    return None


def is_close(found: Tensor, expected: Tensor, floor: Tensor | float = 0) -> bool:
    if found.shape != expected.shape:
        return False
    error = (found.float() - expected.float()).abs().max()
    return bool(error <= TOLERANCE * expected.float().abs().max() + floor)
