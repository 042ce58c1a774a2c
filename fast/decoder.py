"""The decoder of models.py rearranged: same numbers and parameters, fewer and larger operations.

Symbols as in models.py; N captions in all, n of them at a step, G cells of the encoder's own grid,
W = A + D + 4H what h is multiplied to.

1. Pooling G cells (8 x 8 at 256 pixels) to P pixels (14 x 14) is a fixed P x G matrix and commutes
   with what is linear: `encoder_att` and the context are computed on cells, the energies on pixels.
2. The words' part of the LSTM's input is one product for all steps; three products with h are one.
3. A caption that has ended leaves the time loop. Gradients of weights are one product after it.
4. The attention's hidden layer, (B, K, P, A), is not kept: compiled on a CPU, kernels.py on a GPU.
"""
import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models import DecoderWithAttention
from utils import to_device

try:
    from fast import kernels
except ModuleNotFoundError:  # Triton comes with PyTorch for Linux; elsewhere a GPU does without
    kernels = None

LARGE = 2**22  # numbers in the attention's hidden layer; from this size compiling pays


class Pixels(NamedTuple):
    """What the decoder sees of B pictures; the paper's annotation vectors are pool @ grid."""

    grid: Tensor  # (B, G, D)
    pool: Tensor  # (P, G), every row sums to 1
    keys: Tensor  # encoder_att of the annotation vectors, (B, P, A)


class Order(NamedTuple):
    """The time loop's order of captions, longest first, and of their M tokens, step by step."""

    captions: Tensor  # (N,), of all (B, K)
    tokens: Tensor  # (M,), of all (B, K, T)
    sizes: list[int]  # how many captions are left at each step


@functools.cache
def pool_matrix(height: int, width: int, size: int, device: torch.device | str = "cpu") -> Tensor:
    """Adaptive average pooling to size x size as a matrix (size^2, height * width)."""
    rows = F.adaptive_avg_pool1d(torch.eye(height), size).T  # (size, height)
    columns = F.adaptive_avg_pool1d(torch.eye(width), size).T
    return torch.kron(rows, columns).contiguous().to(device)


class FastDecoder(nn.Module):
    """A DecoderWithAttention's twin over the same parameters; see there for the methods."""

    def __init__(self, decoder: DecoderWithAttention):
        super().__init__()
        self.decoder = decoder
        self.embedding, self.fc = decoder.embedding, decoder.fc
        self.encoded_image_size = decoder.encoded_image_size
        self.loops = []  # of kernels.py, for the next passes

    def pool_of(self, grid: Tensor) -> Tensor:
        """The pool of Pixels for a grid (B, h, w, D)."""
        return pool_matrix(*grid.shape[1:3], self.encoded_image_size, grid.device)

    def is_fused(self, grid: Tensor) -> bool:
        """Whether these grids, (B, h, w, D), are left to kernels.py: on a GPU, where Triton is."""
        return kernels is not None and kernels.are_usable(grid, self.pool_of(grid))

    def look(self, grid: Tensor) -> Pixels:
        """Everything about the pictures that no step changes, of their grid (B, h, w, D)."""
        pool, grid = self.pool_of(grid), grid.flatten(1, 2)
        attention = self.decoder.attention.encoder_att
        # The rows of pool sum to 1, so the bias may be added after pooling.
        return Pixels(grid, pool, pool @ F.linear(grid, attention.weight) + attention.bias)

    def init_hidden_state(self, pixels: Pixels) -> tuple[Tensor, Tensor]:
        """h and c, (B, H), before the first word."""
        mean = (pixels.pool.mean(dim=0, keepdim=True) @ pixels.grid).squeeze(1)  # (B, D)
        return self.decoder.init_h(mean), self.decoder.init_c(mean)

    def word_weight(self) -> Tensor:
        """The columns of the LSTM's weight that embedded words are multiplied with, (4H, E)."""
        return self.decoder.decode_step.weight_ih[:, :self.embedding.embedding_dim]

    def word_input(self, words: Tensor) -> Tensor:
        """What embedded words add to the LSTM's gates: (..., E) -> (..., 4H)."""
        return F.linear(words, self.word_weight(), self.decoder.decode_step.bias_ih)

    def step_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """What every step multiplies: h with (W, H), plus a bias (W,); the context with (4H, D)."""
        query, gate = self.decoder.attention.decoder_att, self.decoder.f_beta
        cell = self.decoder.decode_step
        return (torch.cat([query.weight, gate.weight, cell.weight_hh]),
                torch.cat([query.bias, gate.bias, cell.bias_hh]),
                cell.weight_ih[:, self.embedding.embedding_dim:])

    def attend(self, query: Tensor, pixels: Pixels, captions: Tensor, K: int):
        """Eq. 4, 5 and 13: decoder_att(h) of n captions, (n, A), which are these of all (B, K).

        Returns the context, (n, D), before its gate, and alpha, (n, P).
        """
        B, _, A = pixels.keys.shape
        query = query.new_zeros(B * K, A).index_copy(0, captions, query).view(B, K, A)
        full_att = self.decoder.attention.full_att
        is_large = query.device.type == "cpu" and pixels.keys.numel() * K >= LARGE
        run = compiled(energy) if is_large else energy
        with torch.autocast(query.device.type, enabled=False):
            e = run(pixels.keys, query, full_att.weight[0]).float() + full_att.bias
        alpha = F.softmax(e, dim=2)
        context = (alpha @ pixels.pool) @ pixels.grid  # (B, K, P) (P, G) (B, G, D)
        return context.flatten(0, 1)[captions], alpha.flatten(0, 1)[captions]

    def rows_step(self, attend: Callable, weights: tuple, word_input: Tensor, h: Tensor, c: Tensor):
        """One time step of n captions; attend is of their queries.

        Of step_weights the bias may be one per caption; word_input is (n, 4H). Returns h, c, alpha
        and the context, (n, D), after its gate.
        """
        h_weight, h_bias, context_weight = weights
        A, D = self.decoder.attention.decoder_att.out_features, self.decoder.f_beta.out_features
        at_once = torch.addmm(h_bias, h, h_weight.T)  # (n, W)
        query, beta, gates = at_once.split([A, D, len(h_weight) - A - D], dim=1)
        context, alpha = attend(query)
        context = torch.sigmoid(beta) * context  # section 4.2.1
        gates = torch.addmm(gates + word_input, context, context_weight.T)
        i, f, g, o = gates.chunk(4, dim=1)  # Eq. 1; PyTorch's order: g is the input modulator
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)  # Eq. 2
        h = torch.sigmoid(o) * torch.tanh(c)  # Eq. 3
        return h, c, alpha, context

    def start(self, grid: Tensor, K: int):
        pixels = self.look(grid)
        self.pool, self.weights, self.fused = pixels.pool, self.step_weights(), self.is_fused(grid)
        h, c = (x.unsqueeze(1).expand(-1, K, -1) for x in self.init_hidden_state(pixels))
        return (pixels.grid, pixels.keys), h, c

    def step(self, features, words: Tensor, h: Tensor, c: Tensor):
        B, K = words.shape[:2]
        grid, keys = features
        pixels = Pixels(grid, self.pool, keys)
        word_input = self.word_input(words.flatten(0, 1))
        h, c = h.flatten(0, 1), c.flatten(0, 1)
        if self.fused and not torch.is_grad_enabled():
            out = kernels.empty_steps(B * K, pixels, word_input)
            lengths = torch.ones(B * K, dtype=torch.int64, device=words.device)
            weights = self.decoder.attention.full_att.weight[0], *self.weights
            kernels.step(pixels, weights, word_input, (h, c), lengths, 0, out)
            h, c, alpha = out.h, out.c, out.alpha
        else:
            captions = torch.arange(B * K, device=words.device)
            attend = functools.partial(self.attend, pixels=pixels, captions=captions, K=K)
            h, c, alpha, _ = self.rows_step(attend, self.weights, word_input, h, c)
        return h.view(B, K, -1), c.view(B, K, -1), alpha.view(B, K, -1)

    def forward(self, grid: Tensor, captions: Tensor, caption_lengths: Tensor):
        words = self.embedding(captions[:, :, :-1])  # (B, K, T, E)
        lengths = (caption_lengths - 1).clamp(min=0)
        is_real = torch.arange(words.shape[2]) < lengths.unsqueeze(2)  # (B, K, T)
        tokens = to_device(is_real.flatten().nonzero().squeeze(1), grid.device)  # (M,)
        if self.is_fused(grid):
            states, alphas = self.fused_time_loop(grid, words, lengths, tokens)
        else:
            states, alphas = self.time_loop(grid, words, lengths)
        targets = captions[:, :, 1:].flatten()[tokens]
        return self.fc(self.decoder.dropout(states)), targets, alphas

    def time_loop(self, grid: Tensor, words: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """All steps of all captions; those that have ended drop out.

        Words, (B, K, T, E), are embedded; lengths, (B, K), on the CPU, are the captions' steps.
        Returns h after every real step, (M, H), and alphas, (B, K, T, P), 0 after a caption's end.
        """
        B, K, T, _ = words.shape
        pixels, order = self.look(grid), loop_order(lengths, T, grid.device)
        h, c = (state[order.captions // K] for state in self.init_hidden_state(pixels))
        of_h, of_context = self.late_products(words.flatten(0, 2)[order.tokens], order.sizes)
        states, alphas = [], []
        for t, n in enumerate(order.sizes):
            h, c = h[:n], c[:n]
            of_h.inputs.append(h.detach())
            attend = functools.partial(self.attend, pixels=pixels, captions=order.captions[:n], K=K)
            h, c, alpha, context = self.rows_step(
                attend, (of_h.weight, of_h.bases[t], of_context.weight), of_context.bases[t], h, c)
            of_context.inputs.append(context.detach())
            states.append(h)
            alphas.append(alpha)
        alphas = torch.cat(alphas)
        alphas = alphas.new_zeros(B * K * T, alphas.shape[1]).index_copy(0, order.tokens, alphas)
        return torch.cat(states)[order.tokens.argsort()], alphas.unflatten(0, (B, K, T))

    def late_products(self, words: Tensor, sizes: list[int]):
        """The products with h and with the context; words, (M, E), are in the loop's order."""
        word_input = self.word_input(words)  # in autocast's type where that is on
        h_weight, h_bias, context_weight = (x.to(word_input.dtype) for x in self.step_weights())
        return (LateProduct(h_bias.expand(len(words), -1), h_weight, sizes),
                LateProduct(word_input, context_weight, sizes))

    def fused_time_loop(self, grid: Tensor, words: Tensor, lengths: Tensor, tokens: Tensor):
        """As time_loop, in kernels.py; tokens, (M,), are the real ones of all (B, K, T)."""
        B, K = words.shape[:2]
        by_step = words.flatten(0, 1).transpose(0, 1)  # (T, B K, E)
        lengths = to_device(lengths.flatten(), words.device)
        states, alphas = kernels.TimeLoop.apply(
            self, grid, by_step, lengths, torch.is_grad_enabled(), *self.looped_parameters())
        # Not by [tokens], whose gradient sorts.
        states = states.transpose(0, 1).flatten(0, 1).index_select(0, tokens)
        return states, alphas.transpose(0, 1).unflatten(0, (B, K))

    def looped_parameters(self) -> list[nn.Parameter]:
        """All parameters but those of embedding and fc, in the order of kernels.Loop."""
        decoder, attention, cell = self.decoder, self.decoder.attention, self.decoder.decode_step
        layers = (attention.encoder_att, attention.decoder_att, attention.full_att, decoder.init_h,
                  decoder.init_c, decoder.f_beta)
        parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
        return [*parameters, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]


def loop_order(lengths: Tensor, T: int, device: torch.device) -> Order:
    lengths = lengths.flatten()
    captions = lengths.argsort(descending=True, stable=True)[:int((lengths > 0).sum())]
    is_real = torch.arange(T).unsqueeze(1) < lengths[captions]  # (T, N), the first sizes[t] of each
    step, row = is_real.nonzero(as_tuple=True)
    tokens = captions[row] * T + step
    sizes = is_real.sum(dim=1).tolist()
    return Order(to_device(captions, device), to_device(tokens, device), sizes)


def other_parameter(decoder: DecoderWithAttention) -> str | None:
    """The first parameter of another name or shape than in models.py: the kernels rely on these."""
    A, D = decoder.attention.encoder_att.weight.shape
    V, E = decoder.embedding.weight.shape
    with torch.device("meta"):
        written = DecoderWithAttention(A, E, decoder.decode_step.hidden_size, V, D)
    found = {name: p.shape for name, p in decoder.named_parameters()}
    expected = {name: p.shape for name, p in written.named_parameters()}
    for name in {**found, **expected}:
        if found.get(name) != expected.get(name):
            return name
    return None


# -------------------------------------------------------------------------------------------------
# The attention's hidden layer


def energy(keys: Tensor, query: Tensor, weight: Tensor) -> Tensor:
    """Eq. 4, weight . relu(keys + query): (B, P, A), (B, K, A), (A,) -> (B, K, P).

    Compiled, neither pass writes the layer to memory: the backward pass computes it again.
    """
    return (torch.relu(keys.unsqueeze(1) + query.unsqueeze(2)) * weight).sum(dim=3)


@functools.cache
def compiled(function: Callable) -> Callable:
    """torch.compile, or the function itself where that does not work, which is said once."""
    current = torch.compile(function, dynamic=True)

    def run(*inputs):
        nonlocal current
        try:
            return current(*inputs)
        except Exception as error:  # whatever a machine without a C++ compiler leads it to
            if current is function:
                raise
            reason = str(error).partition("\n")[0]
            warnings.warn(f"torch.compile does not work here ({reason:.200}): without it, and the "
                          f"C++ compiler that it needs, attention on a CPU takes several times as "
                          f"long", stacklevel=2)
            current = function
            return function(*inputs)

    return run


class LateProduct:
    """What every step of the time loop adds to its part of `bases`: inputs @ weight.T.

    The weight is detached; its gradient is one product after the loop, which fills `inputs`.
    """

    def __init__(self, bases: Tensor, weight: Tensor, sizes: list[int]):
        self.inputs = []
        self.bases = LateGradient.apply(bases, weight, self.inputs).split(sizes)
        self.weight = weight.detach().contiguous()


class LateGradient(torch.autograd.Function):
    """Hands base, (M, out), on; gives the weight, (out, in), its gradient by M inputs in a list."""

    @staticmethod
    def forward(ctx, base, weight, inputs):
        ctx.inputs = inputs
        return base.view_as(base)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, grad.T @ torch.cat(ctx.inputs).to(grad), None
