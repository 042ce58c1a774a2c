"""The decoder of models.py rearranged: same inputs, outputs and parameters, fewer and larger operations.

Symbols as in models.py; N captions in all, G cells of the encoder's own grid, W = A + D + 4H what h is multiplied to.

1. Pooling the grid's G cells (8 x 8 at 256 pixels) to P pixels (14 x 14) is a fixed P x G matrix and commutes with what
   is linear: `encoder_att` and the context are computed on G cells, only the energies on P pixels.
2. The words' part of the LSTM's input is computed for all steps at once, the three products with h as one.
3. A caption that has ended leaves the time loop. The weights' gradients are summed in one product after it.
4. The attention's hidden layer, (B, K, P, A), is not kept: compiled on a CPU, kernels of our own on a GPU (kernels.py).
"""
import functools
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from utils import to_device

try:
    from fast import kernels
except ModuleNotFoundError:  # Triton comes with PyTorch for Linux; elsewhere a GPU does without
    kernels = None

LARGE = 2**22  # numbers in the attention's hidden layer; from this size compiling pays


class Pixels(NamedTuple):
    """What the decoder sees of B pictures; the annotation vectors of the paper are a = pool @ grid, (B, P, D)."""

    grid: torch.Tensor  # (B, G, D)
    pool: torch.Tensor  # (P, G), every row sums to 1
    keys: torch.Tensor  # encoder_att(a), (B, P, A)


@functools.cache
def pool_matrix(height, width, size, device="cpu"):
    """Adaptive average pooling from height x width cells to size x size as a (size^2, height * width) matrix."""
    rows = F.adaptive_avg_pool1d(torch.eye(height), size).T  # (size, height)
    columns = F.adaptive_avg_pool1d(torch.eye(width), size).T
    return torch.kron(rows, columns).contiguous().to(device)


class FastDecoder(nn.Module):
    """A DecoderWithAttention's twin over the same parameters; see there for `start`, `step` and `forward`.

    Args:
        decoder (DecoderWithAttention): of the paper's parameters.
        attention (Attention): run as models.py has it; None for the one rearranged here.
    """

    def __init__(self, decoder, attention=None):
        super().__init__()
        self.decoder, self.written, self.embedding, self.fc = decoder, attention, decoder.embedding, decoder.fc
        self.embed_dim, self.encoded_image_size = decoder.embedding.embedding_dim, decoder.encoded_image_size
        self.loops = []  # of kernels.py, for the next passes

    def pool_of(self, grid):
        """The pool of Pixels. Args: grid (B, h, w, D)."""
        return pool_matrix(*grid.shape[1:3], self.encoded_image_size, grid.device)

    def look(self, grid):
        """Everything about the pictures that no step changes. Args: grid (B, h, w, D). Returns: Pixels."""
        pool, grid = self.pool_of(grid), grid.flatten(1, 2)
        if self.written is not None:
            a = pool @ grid
            return Pixels(a, None, self.written.keys(a))  # pooled already
        attention = self.decoder.attention.encoder_att
        # The rows of pool sum to 1, so the bias may be added after pooling.
        return Pixels(grid, pool, pool @ F.linear(grid, attention.weight) + attention.bias)

    def init_hidden_state(self, pixels):
        if self.written is not None:
            mean = pixels.grid.mean(dim=1)
        else:
            mean = (pixels.pool.mean(dim=0, keepdim=True) @ pixels.grid).squeeze(1)  # (B, D)
        return self.decoder.init_h(mean), self.decoder.init_c(mean)

    def word_input(self, words):
        """The embedded words' part of the LSTM's four gates. Args: words (..., E). Returns: (..., 4H)."""
        return F.linear(words, self.word_weight(), self.decoder.decode_step.bias_ih)

    def word_weight(self):
        """Returns: (4H, E)."""
        return self.decoder.decode_step.weight_ih[:, :self.embed_dim]

    def step_weights(self):
        """What is multiplied at every step: the products with h as one, and that with the context.

        Returns:
            weight (W, H) and bias (W,) of h, weight (4H, D) of the context.
        """
        cell, parts = self.decoder.decode_step, [self.decoder.f_beta]
        if self.written is None:
            parts = [self.decoder.attention.decoder_att, *parts]
        return (torch.cat([*(part.weight for part in parts), cell.weight_hh]),
                torch.cat([*(part.bias for part in parts), cell.bias_hh]), cell.weight_ih[:, self.embed_dim:])

    def attend(self, pixels, query, place, K):
        """Eq. 4, 5 and 13 for n captions.

        Args:
            pixels (Pixels): of B pictures. query: (n, A), decoder_att(h); or h, (n, H), for an attention as written.
            place: int64 (n,), which captions these are: picture * K + place among the picture's captions. K (int).
        Returns:
            context, (n, D), before its gate; alpha (n, P).
        """
        B, width = len(pixels.keys), query.shape[1]
        query = query.new_zeros(B * K, width).index_copy(0, place, query).view(B, K, width)
        if self.written is not None:
            run = compiled(self.written) if is_large(pixels.keys, K) else self.written
            context, alpha = run(pixels.grid, pixels.keys, query)
        else:
            full_att = self.decoder.attention.full_att
            with torch.autocast(query.device.type, enabled=False):
                run = compiled(energy) if is_large(pixels.keys, K) else energy
                e = run(pixels.keys, query, full_att.weight[0]).float() + full_att.bias
            alpha = F.softmax(e, dim=2)
            context = (alpha @ pixels.pool) @ pixels.grid  # (B, K, P) (P, G) (B, G, D)
        return context.flatten(0, 1)[place], alpha.flatten(0, 1)[place]

    def rows_step(self, pixels, place, K, weights, word_input, h, c):
        """One time step of n captions.

        Args:
            pixels (Pixels): of B pictures. place: int64 (n,), see `attend`. K (int).
            weights: as of step_weights; the bias may be one per caption. word_input: (n, 4H). h, c: (n, H).
        Returns:
            h, c: (n, H); alpha: (n, P); context: (n, D), after its gate.
        """
        h_weight, h_bias, context_weight = weights
        H, D = h.shape[1], self.decoder.f_beta.out_features
        query, beta, gates = torch.addmm(h_bias, h, h_weight.T).split([len(h_weight) - D - 4 * H, D, 4 * H], dim=1)
        context, alpha = self.attend(pixels, query if self.written is None else h, place, K)
        context = torch.sigmoid(beta) * context  # section 4.2.1
        gates = torch.addmm(gates + word_input, context, context_weight.T)
        i, f, g, o = gates.chunk(4, dim=1)  # Eq. 1; PyTorch's order, in which g is the input modulator
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)  # Eq. 2
        return torch.sigmoid(o) * torch.tanh(c), c, alpha, context  # Eq. 3

    def start(self, grid, K):
        pixels = self.look(grid)
        self.pool, self.weights, self.fused = pixels.pool, self.step_weights(), self.is_fused(grid)
        h, c = (x.unsqueeze(1).expand(-1, K, -1) for x in self.init_hidden_state(pixels))
        return (pixels.grid, pixels.keys), h, c

    def step(self, features, words, h, c):
        B, K = words.shape[:2]
        pixels = Pixels(features[0], self.pool, features[1])
        word_input, h, c = self.word_input(words.flatten(0, 1)), h.flatten(0, 1), c.flatten(0, 1)
        if self.fused and not torch.is_grad_enabled():
            out = kernels.empty_steps(B * K, *pixels, word_input)
            lengths = torch.ones(B * K, dtype=torch.int64, device=words.device)
            kernels.step(*pixels, self.decoder.attention.full_att.weight[0], self.weights, word_input, h, c, lengths,
                         0, out)
            h, c, alpha = out.h, out.c, out.alpha
        else:
            place = torch.arange(B * K, device=words.device)
            h, c, alpha, _ = self.rows_step(pixels, place, K, self.weights, word_input, h, c)
        return h.view(B, K, -1), c.view(B, K, -1), alpha.view(B, K, -1)

    def forward(self, grid, captions, caption_lengths):
        T, lengths = captions.shape[2] - 1, (caption_lengths - 1).clamp(min=0)
        token = (torch.arange(T) < lengths.unsqueeze(2)).flatten().nonzero().squeeze(1)  # (M,), which of the (B, K, T)
        token = to_device(token, grid.device)
        words = self.embedding(captions[:, :, :-1])
        if self.is_fused(grid):
            states, alphas = self.fused_time_loop(grid, words, lengths, token)
        else:
            states, alphas = self.time_loop(self.look(grid), words, lengths)
        return self.fc(self.decoder.dropout(states)), captions[:, :, 1:].flatten()[token], alphas

    def time_loop(self, pixels, words, lengths):
        """All steps of all captions; those that have ended drop out.

        Args:
            pixels (Pixels): of B pictures. words: (B, K, T, E), the embedded word before each. lengths: int64 (B, K),
                on the CPU: a caption's steps.
        Returns:
            h after every real step, (M, H); alphas (B, K, T, P), 0 after a caption's end.
        """
        (B, K, T, _), device = words.shape, words.device
        order = lengths.flatten().argsort(descending=True, stable=True)[:int((lengths > 0).sum())]  # the N captions
        picture = order // K
        place = picture * K + (picture.unsqueeze(1) == picture).tril(-1).sum(dim=1)
        real = torch.arange(T).unsqueeze(1) < lengths.flatten()[order]  # (T, N): the first sizes[t] at step t
        sizes, (step, caption) = real.sum(dim=1).tolist(), real.nonzero(as_tuple=True)
        token = order[caption] * T + step  # in the loop's order
        back = token.argsort()  # to the captions' order
        picture, place, token, back = (to_device(x, device) for x in (picture, place, token, back))

        h, c = (state[picture] for state in self.init_hidden_state(pixels))
        word_input = self.word_input(words.flatten(0, 2)[token])  # (M, 4H), in autocast's type where that is on
        h_weight, h_bias, context_weight = (x.to(word_input.dtype) for x in self.step_weights())
        hs, contexts, states, alphas = [], [], [], []
        biases = LateGradient.apply(h_bias.expand(len(word_input), -1), h_weight, hs).split(sizes)
        word_inputs = LateGradient.apply(word_input, context_weight, contexts).split(sizes)
        h_weight, context_weight = h_weight.detach(), context_weight.detach().contiguous()
        for n, bias, word_input in zip(sizes, biases, word_inputs):
            hs.append(h[:n].detach())
            h, c, alpha, context = self.rows_step(pixels, place[:n], K, (h_weight, bias, context_weight), word_input,
                                                  h[:n], c[:n])
            contexts.append(context.detach())
            states.append(h)
            alphas.append(alpha)
        alphas = torch.cat(alphas)
        alphas = alphas.new_zeros(B * K * T, alphas.shape[1]).index_copy(0, token, alphas)
        return torch.cat(states)[back], alphas.unflatten(0, (B, K, T))

    def fused_time_loop(self, grid, words, lengths, token):
        """The same in kernels.py, from grids (B, h, w, D) on; token is where words are."""
        B, K = words.shape[:2]
        states, alphas = kernels.TimeLoop.apply(
            self, grid, words.flatten(0, 1).transpose(0, 1), to_device(lengths.flatten(), words.device),
            torch.is_grad_enabled(), *self.looped_parameters())
        # Not by [token], whose gradient sorts.
        return states.transpose(0, 1).flatten(0, 1).index_select(0, token), alphas.transpose(0, 1).unflatten(0, (B, K))

    def looped_parameters(self):
        """All parameters but those of embedding and fc, in the order of kernels.Loop. Returns: list."""
        decoder, attention = self.decoder, self.decoder.attention
        layers = (attention.encoder_att, attention.decoder_att, attention.full_att, decoder.init_h, decoder.init_c,
                  decoder.f_beta)
        cell = decoder.decode_step
        return [*(p for layer in layers for p in (layer.weight, layer.bias)),
                cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]

    def is_fused(self, grid):
        """Whether these grids, (B, h, w, D), are left to kernels.py: on a GPU, where Triton is."""
        return self.written is None and kernels is not None and kernels.are_usable(grid, self.pool_of(grid))


def other_parameters(decoder):
    """What is not as in the paper, in words: the first parameter of another name or shape. Kernels rely on these.

    Returns: str, or None where all are.
    """
    found = {name: tuple(p.shape) for name, p in decoder.named_parameters()}
    A, D = found.get("attention.encoder_att.weight", (0, 0))
    (V, E), H = decoder.embedding.weight.shape, decoder.decode_step.hidden_size
    layers = {"attention.encoder_att": (A, D), "attention.decoder_att": (A, H), "attention.full_att": (1, A),
              "init_h": (H, D), "init_c": (H, D), "f_beta": (D, H), "fc": (V, H)}
    expected = {"embedding.weight": (V, E), "decode_step.weight_ih": (4 * H, E + D),
                "decode_step.weight_hh": (4 * H, H), "decode_step.bias_ih": (4 * H,), "decode_step.bias_hh": (4 * H,),
                **{f"{name}.weight": shape for name, shape in layers.items()},
                **{f"{name}.bias": shape[:1] for name, shape in layers.items()}}
    name = next((name for name in {**found, **expected} if found.get(name) != expected.get(name)), None)
    return name and f"models.py has {'no' if name not in found else 'another' if name in expected else 'a new'} {name}"


# ---------------------------------------------------------------------------------------------------------------------
# The attention's hidden layer


def energy(keys, query, weight):
    """Eq. 4, e = f_att(a, h) = weight . relu(keys + query). keys (B, P, A), query (B, K, A), weight (A,) -> (B, K, P).

    Compiled, neither pass writes the layer to memory: the backward pass computes it again.
    """
    return (torch.relu(keys.unsqueeze(1) + query.unsqueeze(2)) * weight).sum(dim=3)


def is_large(keys, K):
    return keys.device.type == "cpu" and keys.numel() * K >= LARGE


@functools.cache
def compiled(function):
    """torch.compile, or the function itself where that does not work, which is said once."""
    fast, broken = torch.compile(function, dynamic=True), []

    def run(*inputs):
        if not broken:
            try:
                return fast(*inputs)
            except Exception as error:  # whatever a machine without a C++ compiler leads it to
                reason = str(error).partition("\n")[0]
                warnings.warn(f"torch.compile does not work here ({reason:.200}): without it, and the C++ compiler "
                              f"that it needs, attention on a CPU takes several times as long", stacklevel=2)
                broken.append(True)
        return function(*inputs)
    return run


class LateGradient(torch.autograd.Function):
    """The gradient of a weight that every step of the time loop multiplies with, in one product after the loop.

    A step computes base[t] + inputs[t] @ weight.T with the weight detached, so the gradient of its result is that of
    base[t]. base (M, out), weight (out, in), inputs (list that the loop fills with (n, in), M rows in all) -> base.
    """

    @staticmethod
    def forward(ctx, base, weight, inputs):
        ctx.inputs = inputs
        return base.view_as(base)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, grad.T @ torch.cat(ctx.inputs).to(grad), None
