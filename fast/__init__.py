"""The one door to speed: models.py's own functions, faster, and only where they give the same numbers.

`choose` looks at the very modules that will run, tries both ways on a small random batch, in float32, with their own
weights and on their own device, and compares outputs and every gradient. Whoever edits models.py gets what it says.
"""
import copy
import functools
from typing import NamedTuple

import torch
from torch import nn

from backbones import RESNETS
from fast.decoder import FastDecoder, other_parameters
from fast.encoder import FoldedEncoder, Replayed

CHECK_SIDE = 128  # pixels of the pictures that the encoder is tried with, at most
TOLERANCE = 1e-3  # of the largest value; rounding gives 1e-5, an edit that matters 1e-2
ROUGH = 0.1  # the same in bfloat16, where rounding gives 0.015: a graph or a convolution that fails gives more


class Models(NamedTuple):
    """What runs in the places of the two halves of a model."""

    encoder: nn.Module  # for validation, evaluation and kept features: float32, without gradients where it is folded
    training_encoder: nn.Module  # in training's precision
    decoder: nn.Module
    training_decoder: nn.Module  # the same, unless several processes share a batch
    report: dict  # "encoder", "decoder" -> how each runs; what differs where it runs as written

    def summary(self):
        return "; ".join(f"{half}: {how}" for half, how in self.report.items())


def choose(encoder, decoder, config, dtype=None):
    """Decide how the two halves run; takes less than a second on a GPU and leaves weights and random numbers alone.

    Args:
        encoder (Encoder), decoder (DecoderWithAttention): on their device; the parameters stay theirs.
        config (Config). dtype (torch.dtype): what a frozen encoder multiplies in while the decoder is trained; None
            where nothing is trained.
    Returns:
        Models
    """
    if not config.fast:
        how = "as written (--fast false)"
        return Models(encoder, encoder, decoder, decoder,
                      dict(encoder=how, decoder=how))
    device = next(decoder.parameters()).device
    encoder.to(memory_format=torch.channels_last)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), \
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        torch.manual_seed(0)
        side, cells = min(config.image_size, CHECK_SIDE), -(-config.image_size // encoder.stride)
        images = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8).to(device)
        quick_encoder, training_encoder, encoder_runs = encoder.eval(), encoder, "as written, as it is trained"
        if config.encoder not in RESNETS:
            encoder_runs = "as written: fast/ rearranges torchvision's ResNets only"
        elif dtype is None or not config.fine_tune_encoder:
            quick_encoder, training_encoder, encoder_runs = choose_encoder(encoder, images, dtype)
        quick_decoder, decoder_runs = choose_decoder(decoder, torch.rand(2, cells, cells, encoder.dim, device=device))
    return Models(quick_encoder, training_encoder, quick_decoder, quick_decoder,
                  dict(encoder=encoder_runs, decoder=decoder_runs))


@torch.no_grad()
def choose_encoder(encoder, images, dtype):
    """Returns: the encoder or a FoldedEncoder; what runs in training, in `dtype`; str: how they run."""
    try:
        grid = encoder(images).float()
        folded = FoldedEncoder(encoder).eval()
        training = folded if dtype in (None, torch.float32) else FoldedEncoder(encoder, dtype)
        is_recorded, rough = dtype and images.is_cuda, ROUGH * grid.abs().max()
        if is_recorded:  # the second pass; the third one is replayed
            tried = map(Replayed(training), 3 * [images])
        else:
            tried = [] if training is folded else [training(images)]
        is_right = is_close(folded(images), grid) and all(is_close(x, grid, rough) for x in tried)
        what = None if is_right else "models.py gives another grid"
    except Exception as error:  # whatever an edited network leads the folding to
        what = f"fast/ cannot follow models.py ({type(error).__name__})"
    if what:
        return encoder, encoder, f"as written: {what}"
    return folded, Replayed(training) if is_recorded else training, "fast"


def choose_decoder(decoder, grid):
    """Returns: FastDecoder or the decoder; str: how it runs."""
    twin = copy.deepcopy(decoder)  # may keep averages or count its calls
    try:
        passes = 3 if FastDecoder(twin).is_fused(grid) else 1  # the second is recorded, the third replayed
        tries = [[x, x.flip(0), 2 * x][:passes] for x in (grid, 1 - grid)]
        expected = functools.cache(lambda number: [outcomes(twin, twin, x) for x in tries[number]])
        expected(0)
    except Exception as error:  # whatever an edited decoder makes of these arguments
        return decoder, f"as written: models.py cannot be called as fast/ calls it ({type(error).__name__}: {error})"
    reason = other_way(FastDecoder, twin, tries, expected)
    if not reason:
        return FastDecoder(decoder), "fast"
    if not other_way(lambda twin: FastDecoder(twin, twin.attention), twin, tries, expected):
        return FastDecoder(decoder, decoder.attention), f"fast, but attention as written: {reason}"
    return decoder, f"as written: {reason}"


def other_way(build, twin, tries, expected):
    """Why what `build` makes of a decoder does not do in its place, in words; None where it does.

    Rounding may turn a relu on or off, which only gradients show: these must differ on both of two batches.

    Args: build (function): of the decoder. twin (DecoderWithAttention). tries (list of lists): grids. expected
        (function): number of a try -> its outcomes as written, computed when they are needed.
    """
    try:
        if build is FastDecoder and (reason := other_parameters(twin)):
            return reason
        runs = build(twin)
        for number, grids in enumerate(tries):
            found = (outcomes(runs, twin, grid) for grid in grids)
            reason = next(filter(None, map(difference, found, expected(number))), None)
            if not reason or "gradient" not in reason:
                break
        return reason
    except Exception as error:  # whatever an edited decoder leads the rearranged one to
        return f"fast/ cannot follow models.py ({type(error).__name__}: {str(error):.80})"


def outcomes(runs, owner, grid):
    """All that training and decoding make of a small batch.

    Args: runs (Module): what is called. owner (DecoderWithAttention): of the parameters. grid: (B, h, w, D).
    Returns: dict, name -> tensor.
    """
    V, device = owner.fc.out_features, grid.device
    lengths = torch.tensor([[6, 3, 0], [2, 5, 4]])
    captions = torch.randint(V, (2, 3, 6), generator=torch.Generator().manual_seed(0)).to(device)
    grid = grid.detach().requires_grad_()
    runs.train()
    torch.manual_seed(1)  # dropout
    scores, targets, alphas = runs(grid, captions, lengths)
    found = dict(score=scores, target=targets, alpha=alphas)
    loss = sum((x * torch.linspace(-1, 1, x.numel(), device=device).view_as(x)).sum() for x in (scores, alphas))
    names, parameters = zip(*owner.named_parameters())
    gradients = torch.autograd.grad(loss, [grid, *parameters], allow_unused=True)
    found |= {f"gradient of {name}": x for name, x in zip(["grid", *names], gradients)}
    runs.eval()
    with torch.no_grad():
        features, h, c = runs.start(grid, 2)
        for t in range(2):
            h, c, found[f"alpha of decoding, step {t + 1}"] = runs.step(
                features, runs.embedding(captions[:, :2, t]), h, c)
    return {**found, "h of decoding": h, "c of decoding": c}


def difference(found, expected):
    """The first outcome that is not as models.py gives it, in words; None where all are."""
    largest = max(x.abs().max() for name, x in expected.items() if name.startswith("gradient") and x is not None)
    for name, value in expected.items():
        # A gradient that is zero but for rounding, such as the energies' bias has, may be any rounding.
        floor = 1e-2 * TOLERANCE * largest if name.startswith("gradient") else 0
        if (found[name] is None) != (value is None) or value is not None and not is_close(found[name], value, floor):
            return f"models.py gives another {name}"
    return None


def is_close(found, expected, floor=0):
    return found.shape == expected.shape and bool(
        (found.float() - expected.float()).abs().max() <= TOLERANCE * expected.float().abs().max() + floor)
