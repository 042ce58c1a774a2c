"""The time loop of models.DecoderWithAttention for GPUs, fused: the same numbers.

PyTorch launches some twenty kernels per step and forty for its gradient, most of them too small for
a GPU, and writes the attention's hidden layer, (B, K, P, A), to memory. Here a step is two matrix
products and two kernels of our own: `attend`, which computes the hidden layer of one caption tile
by tile in registers (Eq. 4, 5, 13), and `cell` (Eq. 1-3). The gradients that all steps add to are
summed after the loop. Matrix products are in autocast's dtype, all else is in float32. All captions
run through all steps, as zeros after their end, so that loops of one length launch the same kernels
every time: in training these are captured as a CUDA graph.

Symbols as in models.py; N = B K captions; h is multiplied to query, beta and gates, which are
W = A + D + 4H.
"""
import functools
import warnings
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast.graphs import Recorded
from utils import autocast_dtype


def are_usable(grid: Tensor, pool: Tensor) -> bool:
    """Whether the kernels can run: on a GPU, where a caption's attention fits into registers."""
    return grid.is_cuda and max(pool.shape) <= 1024 and run_on(grid.device)


@functools.cache
def run_on(device: torch.device) -> bool:
    """Whether Triton can compile and start a kernel here."""
    row = torch.zeros(1, 16, device=device)
    try:
        cell[(1,)](row, row, row, row.long(), 0, row.clone(), row.clone(), row.clone(), 0, 4, 4)
    except Exception as error:  # whatever the compilers that it calls do
        reason = str(error).partition("\n")[0]
        warnings.warn(f"Triton does not work here ({reason:.200}): without kernels.py, which needs "
                      f"it and a C compiler, training on a GPU takes several times as long",
                      stacklevel=2)
        return False
    return True


class Steps(NamedTuple):
    """The outputs of time steps, one row per caption and step."""

    pre: Tensor  # (n, W): query, beta before its sigmoid, h's part of the gates
    alpha: Tensor  # float32 (n, P)
    cells: Tensor  # float32 (n, G): alpha @ pool
    context: Tensor  # (n, D), after its gate
    gates: Tensor  # float32 (n, 4H): i, f, g, o
    h: Tensor  # (n, H)
    c: Tensor  # float32 (n, H)


class Inputs(NamedTuple):
    """What the steps read; in the dtype of matrix products but for energy_weight and c."""

    keys: Tensor  # (B, P, A)
    energy_weight: Tensor  # float32 (A,), full_att's
    h_weight: Tensor  # (W, H); with the next two FastDecoder.step_weights
    h_bias: Tensor  # (W,)
    context_weight: Tensor  # (4H, D)
    word_input: Tensor  # (T N, 4H)
    h: Tensor  # (N, H)
    c: Tensor  # float32 (N, H)


class Gradients(NamedTuple):
    """Those of h and alpha, which are given, and of what they lead to; rows as of Steps."""

    h: Tensor
    alpha: Tensor
    pre: Tensor
    energy: Tensor  # float32 (n, P), before the softmax
    cells: Tensor


def empty_steps(n, pixels, like):
    """Buffers of n rows, in the dtype of `like`, which is (..., 4H)."""
    grid, pool, keys = pixels
    (P, G), D, A, H = pool.shape, grid.shape[2], keys.shape[2], like.shape[-1] // 4
    empty = functools.partial(torch.empty, device=like.device, dtype=like.dtype)
    exact = functools.partial(empty, dtype=torch.float32)
    return Steps(pre=empty(n, A + D + 4 * H), alpha=exact(n, P), cells=exact(n, G),
                 context=empty(n, D), gates=exact(n, 4 * H), h=empty(n, H), c=exact(n, H))


def step(pixels, weights, word_input, state, lengths, t, out):
    """One time step of all captions, as FastDecoder.rows_step; fills the N rows of out (Steps).

    Pixels, weights, word_input and state, h and c, are as in Inputs; the pool is float32. A caption
    of no more than t steps, by lengths, int64 (N,), has ended, and gives zeros.
    """
    grid, pool, keys = pixels
    energy_weight, h_weight, h_bias, context_weight = weights
    h, c = state
    (P, A), (G, D), (N, H) = keys.shape[1:], grid.shape[1:], h.shape
    PP, GG = triton.next_power_of_2(P), triton.next_power_of_2(G)
    torch.addmm(h_bias, h, h_weight.T, out=out.pre)
    attend[(N,)](out.pre, grid, pool, keys, energy_weight, lengths, t, out.alpha, out.cells,
                 out.context, N // len(grid), A, D, H, P, G, PP, GG, max(4096 // PP, 4),
                 max(4096 // GG, 4), max(8192 // GG, 16), num_warps=4)
    gates = torch.addmm(word_input, out.context, context_weight.T)
    cell[(N,)](out.pre, gates, c, lengths, t, out.gates, out.h, out.c, A + D, H,
               triton.next_power_of_2(H))


class Loop:
    """All between grids with words and the states, at most T steps, and its gradient, in buffers.

    FastDecoder's own functions give what the loop over `step` reads, so that for each length that
    recurs all of both passes is a CUDA graph, not the loop alone. The grid is (B, h, w, D), words,
    (T, N, E), are embedded, dtype is that of matrix products.
    """

    def __init__(self, decoder, grid, words, dtype, is_trained):
        self.T, N, _ = words.shape
        self.decoder, self.dtype = decoder, dtype
        empty = functools.partial(torch.empty, device=grid.device, dtype=dtype)
        exact = functools.partial(empty, dtype=torch.float32)
        self.grid, self.words = empty(grid.shape), empty(words.shape)
        self.pool = decoder.pool_of(grid)
        self.lengths = empty(N, dtype=torch.int64)
        self.graphs = {}
        # Of all graphs, as they run in turns.
        self.memory = torch.cuda.graph_pool_handle() if grid.is_cuda else None

        B, D, P = len(grid), grid.shape[3], len(self.pool)
        A = decoder.decoder.attention.encoder_att.out_features
        H = decoder.decoder.decode_step.hidden_size
        W = A + D + 4 * H
        self.inputs = Inputs(
            keys=empty(B, P, A), energy_weight=exact(A), h_weight=empty(W, H), h_bias=empty(W),
            context_weight=empty(4 * H, D), word_input=empty(self.T * N, 4 * H), h=empty(N, H),
            c=exact(N, H))
        self.steps = empty_steps(self.T * N, self.pixels(), self.inputs.word_input)
        if is_trained:
            like, steps = torch.empty_like, self.steps
            self.grads = Gradients(h=like(steps.h), alpha=like(steps.alpha), pre=like(steps.pre),
                                   energy=like(steps.alpha), cells=like(steps.cells))
            self.later_h, self.later_c = empty(N, H), exact(N, H)  # what later steps hand back
            self.grad_words = like(self.words)
            self.grad_grid = None  # made by the first call that needs it
            self.grad_parameters = [exact(p.shape) for p in decoder.looped_parameters()]

    def pixels(self):
        return self.grid.flatten(1, 2), self.pool, self.inputs.keys

    def around_steps(self, T):
        decoder, device = self.decoder, self.grid.device.type
        is_mixed = self.dtype != torch.float32
        with torch.autocast(device, self.dtype, enabled=is_mixed, cache_enabled=False):
            pixels = decoder.look(self.grid)
            h, c = decoder.init_hidden_state(pixels)
            word_input = decoder.word_input(self.words[:T]).flatten(0, 1)
        K = len(self.lengths) // len(h)
        energy_weight = decoder.decoder.attention.full_att.weight[0]
        return Inputs(pixels.keys, energy_weight, *decoder.step_weights(), word_input,
                      h.repeat_interleave(K, 0), c.repeat_interleave(K, 0))

    def rows(self, t, buffers):
        """The rows of step t."""
        N = len(self.lengths)
        return type(buffers)(*(x[t * N:(t + 1) * N] for x in buffers))

    def forward(self, T):
        for mine, x in zip(self.inputs, self.around_steps(T)):
            mine[:len(x)].copy_(x)
        _, *weights, word_input, h, c = self.inputs
        word_input = word_input.view(self.T, len(h), -1)
        for t in range(T):
            out = self.rows(t, self.steps)
            step(self.pixels(), weights, word_input[t], (h, c), self.lengths, t, out)
            h, c = out.h, out.c

    def backward(self, T, to_grid):
        """to_grid: the grid is trained too."""
        self.later_h.zero_()
        self.later_c.zero_()
        for t in reversed(range(T)):
            c_before = self.rows(t - 1, self.steps).c if t else self.inputs.c
            self.step_backward(t, c_before, self.rows(t, self.steps), self.rows(t, self.grads))
        self.around_steps_backward(T, to_grid)

    def step_backward(self, t, c_before, out, grads):
        grid, pool, keys = self.pixels()
        (B, P, A), (G, D), (N, H) = keys.shape, grid.shape[1:], c_before.shape
        PP, GG = triton.next_power_of_2(P), triton.next_power_of_2(G)
        cell_gradient[(N,)](grads.h, self.later_h, self.later_c, out.gates, out.c, c_before,
                            self.lengths, t, grads.pre, A + D, H, triton.next_power_of_2(H))
        grad_context = grads.pre[:, A + D:] @ self.inputs.context_weight
        attend_gradient[(N,)](grad_context, grads.alpha, out.pre, grid, pool, keys,
                              self.inputs.energy_weight, self.lengths, t, out.alpha, out.context,
                              grads.pre, grads.energy, grads.cells, N // B, A, D, H, P, G, PP, GG,
                              max(16384 // PP, 4), max(8192 // GG, 16), max(4096 // PP, 4),
                              num_warps=4)
        torch.mm(grads.pre, self.inputs.h_weight, out=self.later_h)

    def around_steps_backward(self, T, to_grid):
        """What all steps add to, in one product each: of parameters, words and grid."""
        B, D, N = len(self.grid), self.grid.shape[3], len(self.lengths)
        A = self.inputs.keys.shape[2]
        grid = self.grid.flatten(1, 2)
        mean = (self.pool.mean(dim=0, keepdim=True).to(self.dtype) @ grid).squeeze(1)
        grad_keys, grad_energy_weight = self.keys_backward()
        on_cells = self.pool.T.to(self.dtype) @ grad_keys.to(self.dtype)  # (B, G, A)
        grad_h = self.later_h.unflatten(0, (B, -1)).sum(dim=1).to(self.dtype)
        grad_c = self.later_c.unflatten(0, (B, -1)).sum(dim=1).to(self.dtype)
        of_h, of_bias, of_input = self.weights_backward(T)
        found = (
            on_cells.flatten(0, 1).T @ grid.flatten(0, 1), grad_keys.sum(dim=(0, 1)),
            of_h[:A], of_bias[:A],
            grad_energy_weight, of_bias.new_zeros(1),  # a softmax ignores the bias of the energies
            grad_h.T @ mean, grad_h.sum(dim=0),
            grad_c.T @ mean, grad_c.sum(dim=0),
            of_h[A:A + D], of_bias[A:A + D],
            of_input, of_h[A + D:], of_bias[A + D:], of_bias[A + D:])
        for mine, x in zip(self.grad_parameters, found):  # in the order of looped_parameters
            mine.copy_(x.view_as(mine))
        torch.mm(self.grads.pre[:T * N, A + D:], self.decoder.word_weight().to(self.dtype),
                 out=self.grad_words[:T].view(T * N, -1))
        if to_grid:
            self.grid_backward(T, on_cells, grad_h.float(), grad_c.float())

    def keys_backward(self):
        """The gradients of keys, (B, P, A), and of energy_weight, (A,)."""
        keys, energy_weight = self.inputs.keys, self.inputs.energy_weight
        (B, P, A), N = keys.shape, len(self.lengths)
        parts = triton.cdiv(P, KEYS)
        grad_keys = torch.empty_like(keys, dtype=torch.float32)
        of_parts = grad_keys.new_empty(B, parts, A)
        keys_gradient[(B, parts, triton.cdiv(A, KEYS))](
            self.grads.energy, self.steps.pre, keys, energy_weight, self.lengths, grad_keys,
            of_parts, N, N // B, A, self.steps.pre.shape[1], P, KEYS)
        return grad_keys, of_parts.sum(dim=(0, 1))

    def weights_backward(self, T):
        """The gradients of h_weight, h_bias and the LSTM's weight_ih."""
        N, H = self.inputs.h.shape
        grad_pre = self.grads.pre[:T * N]
        grad_gates = grad_pre[:, -4 * H:]
        h_before = torch.cat([self.inputs.h, self.steps.h[:(T - 1) * N]])
        of_words = grad_gates.T @ self.words[:T].flatten(0, 1)
        of_context = grad_gates.T @ self.steps.context[:T * N]
        of_bias = grad_pre.sum(dim=0, dtype=torch.float32)
        return grad_pre.T @ h_before, of_bias, torch.cat([of_words, of_context], dim=1)

    def grid_backward(self, T, on_cells, grad_h, grad_c):
        """Of each picture, the sum over its captions and their steps."""
        (B, _, A), D, N = self.inputs.keys.shape, self.grid.shape[3], len(self.lengths)
        rows = slice(T * N)
        if self.grad_grid is None:
            self.grad_grid = torch.empty(self.grid.shape, device=self.grid.device)
        beta = torch.sigmoid(self.steps.pre[rows, A:A + D])
        ungated = self.grads.pre[rows, A + D:] @ self.inputs.context_weight * beta
        cells, ungated = (x.view(T, B, N // B, -1).transpose(0, 1).flatten(1, 2)
                          for x in (self.steps.cells[rows], ungated))
        decoder = self.decoder.decoder
        on_mean = grad_h @ decoder.init_h.weight + grad_c @ decoder.init_c.weight  # (B, D)
        self.grad_grid.flatten(1, 2).copy_(
            cells.to(ungated).transpose(1, 2) @ ungated
            + on_cells @ decoder.attention.encoder_att.weight.to(self.dtype)
            + self.pool.mean(dim=0)[:, None] * on_mean[:, None])

    def run(self, what, T, *given):
        """Forward or backward (what), of T steps, recorded and replayed."""
        recorded = self.graphs.setdefault((what, T, *given), Recorded(self.memory))
        recorded(functools.partial(getattr(self, what), T, *given))


def take_loop(decoder, grid, words, dtype):
    """A loop whose buffers fit these inputs, of those that have done their backward pass."""
    needed = grid.shape, words.shape[1:], dtype, grid.device
    for place, loop in enumerate(decoder.loops):
        has = loop.grid.shape, loop.words.shape[1:], loop.dtype, loop.grid.device
        if has == needed and loop.T >= len(words):
            return decoder.loops.pop(place)
    decoder.loops.clear()  # first: memory may not hold one more
    return Loop(decoder, grid, words, dtype, is_trained=True)


class TimeLoop(torch.autograd.Function):
    """DecoderWithAttention.forward up to the states; its gradient by backpropagation through time.

    The grid is (B, h, w, D); words, (T, N, E), are embedded; lengths, (N,), are the captions'
    steps. is_trained: a backward pass will follow, and the next loop is likely to have the same
    shapes. The parameters are looped_parameters. Returns h after every step, (T, N, H), and alpha,
    float32 (T, N, P), 0 after a caption's end.
    """

    @staticmethod
    def forward(ctx, decoder, grid, words, lengths, is_trained, *parameters):
        T, N, _ = words.shape
        dtype = autocast_dtype(grid.device)
        if is_trained:
            loop = take_loop(decoder, grid, words, dtype)
        else:
            loop = Loop(decoder, grid, words, dtype, is_trained=False)
        loop.grid.copy_(grid)
        loop.words[:T].copy_(words)
        loop.lengths.copy_(lengths)
        loop.run("forward", T)
        ctx.loop, ctx.T = loop, T
        return tuple(x[:T * N].view(T, N, -1).clone() for x in (loop.steps.h, loop.steps.alpha))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h, grad_alpha):
        loop, T, ctx.loop = ctx.loop, ctx.T, None
        if loop is None:
            raise RuntimeError("the backward pass of a fused time loop can run once")
        to_grid = ctx.needs_input_grad[1]
        for mine, x in ((loop.grads.h, grad_h), (loop.grads.alpha, grad_alpha)):
            mine[:T * len(loop.lengths)].view_as(x).copy_(x)
        loop.run("backward", T, to_grid)
        grad_grid = loop.grad_grid.clone() if to_grid else None
        grad_words = loop.grad_words[:T].to(torch.float32, copy=True)
        # Copied in one launch.
        grads = torch.cat([x.flatten() for x in loop.grad_parameters])
        grads = grads.split([x.numel() for x in loop.grad_parameters])
        grads = [x.view_as(mine) for x, mine in zip(grads, loop.grad_parameters)]
        loop.decoder.loops.insert(0, loop)  # of two passes in a step each finds its own again
        return None, grad_grid, grad_words, None, None, *grads


# -------------------------------------------------------------------------------------------------
# Kernels; Triton's program is CUDA's thread block. PP and GG are powers of two that hold P and G.
# PART_A to PART_G are sizes of tiles along A, P, D and G, the fastest of those tried on an H100.

KEYS = 64  # pixels, and units of the attention, in a program of keys_gradient


@triton.jit
def load(pointer, inside):
    return tl.load(pointer, inside, 0).to(tl.float32)


@triton.jit(do_not_specialize=("t",))
def attend(pre, grid, pool, keys, energy_weight, lengths, t, alpha, cells, context,
           K: tl.constexpr, A: tl.constexpr, D: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
           G: tl.constexpr, PP: tl.constexpr, GG: tl.constexpr,
           PART_A: tl.constexpr, PART_P: tl.constexpr, PART_D: tl.constexpr):
    """One program per caption: pre -> alpha, cells, context."""
    n = tl.program_id(0).to(tl.int64)
    b = n // K
    pre += n * (A + D + 4 * H)
    p, g = tl.arange(0, PP), tl.arange(0, GG)
    if tl.load(lengths + n) <= t:
        tl.store(alpha + n * P + p, tl.zeros([PP], tl.float32), p < P)
        tl.store(cells + n * G + g, tl.zeros([GG], tl.float32), g < G)
        for start in range(0, D, PART_D):
            d = start + tl.arange(0, PART_D)
            tl.store(context + n * D + d, tl.zeros([PART_D], tl.float32), d < D)
        return

    hidden = tl.zeros([PP, PART_A], tl.float32)
    for start in range(0, A, PART_A):
        a = start + tl.arange(0, PART_A)
        query = load(pre + a, a < A)
        weight = load(energy_weight + a, a < A)
        key = load(keys + b * P * A + p[:, None] * A + a, (p[:, None] < P) & (a < A))
        hidden += tl.maximum(key + query, 0) * weight
    energy = tl.where(p < P, tl.sum(hidden, axis=1), -float("inf"))  # Eq. 4
    weights = tl.exp(energy - tl.max(energy, axis=0))
    weights /= tl.sum(weights, axis=0)  # Eq. 5
    tl.store(alpha + n * P + p, weights, p < P)
    tl.debug_barrier()  # other threads read below what one has stored

    by_pool = tl.zeros([PART_P, GG], tl.float32)
    for start in range(0, P, PART_P):
        q = start + tl.arange(0, PART_P)
        part = load(alpha + n * P + q, q < P)
        by_pool += part[:, None] * load(pool + q[:, None] * G + g, (q[:, None] < P) & (g < G))
    on_cells = tl.sum(by_pool, axis=0)
    tl.store(cells + n * G + g, on_cells, g < G)
    for start in range(0, D, PART_D):
        d = start + tl.arange(0, PART_D)
        beta = tl.sigmoid(load(pre + A + d, d < D))
        value = load(grid + b * G * D + g[:, None] * D + d, (g[:, None] < G) & (d < D))
        value = tl.sum(on_cells[:, None] * value, axis=0)  # Eq. 13
        tl.store(context + n * D + d, beta * value, d < D)  # section 4.2.1


@triton.jit(do_not_specialize=("t",))
def attend_gradient(grad_context, grad_alpha, pre, grid, pool, keys, energy_weight, lengths, t,
                    alpha, context, grad_pre, grad_energy, grad_cells,
                    K: tl.constexpr, A: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
                    P: tl.constexpr, G: tl.constexpr, PP: tl.constexpr, GG: tl.constexpr,
                    PART_A: tl.constexpr, PART_D: tl.constexpr, PART_G: tl.constexpr):
    """One program per caption: gradients of context, alpha -> those of query, beta, energies."""
    n = tl.program_id(0).to(tl.int64)
    b = n // K
    pre += n * (A + D + 4 * H)
    grad_pre += n * (A + D + 4 * H)
    p, g = tl.arange(0, PP), tl.arange(0, GG)
    if tl.load(lengths + n) <= t:
        tl.store(grad_energy + n * P + p, tl.zeros([PP], tl.float32), p < P)
        for start in range(0, D, PART_D):
            d = start + tl.arange(0, PART_D)
            tl.store(grad_pre + A + d, tl.zeros([PART_D], tl.float32), d < D)
        for start in range(0, A, PART_A):
            a = start + tl.arange(0, PART_A)
            tl.store(grad_pre + a, tl.zeros([PART_A], tl.float32), a < A)
        return

    on_cells = tl.zeros([GG, PART_D], tl.float32)
    for start in range(0, D, PART_D):
        d = start + tl.arange(0, PART_D)
        grad = load(grad_context + n * D + d, d < D)
        beta = tl.sigmoid(load(pre + A + d, d < D))
        value = load(context + n * D + d, d < D)
        tl.store(grad_pre + A + d, grad * value * (1 - beta), d < D)
        cell_values = load(grid + b * G * D + g[:, None] * D + d, (g[:, None] < G) & (d < D))
        on_cells += cell_values * (grad * beta)
    tl.store(grad_cells + n * G + g, tl.sum(on_cells, axis=1), g < G)
    tl.debug_barrier()

    by_pool = tl.zeros([PP, PART_G], tl.float32)
    for start in range(0, G, PART_G):
        k = start + tl.arange(0, PART_G)
        part = load(grad_cells + n * G + k, k < G)
        by_pool += load(pool + p[:, None] * G + k, (p[:, None] < P) & (k < G)) * part
    grad = load(grad_alpha + n * P + p, p < P) + tl.sum(by_pool, axis=1)
    weights = load(alpha + n * P + p, p < P)
    grad = weights * (grad - tl.sum(weights * grad, axis=0))
    tl.store(grad_energy + n * P + p, grad, p < P)
    for start in range(0, A, PART_A):
        a = start + tl.arange(0, PART_A)
        query = load(pre + a, a < A)
        weight = load(energy_weight + a, a < A)
        key = load(keys + b * P * A + p[:, None] * A + a, (p[:, None] < P) & (a < A))
        on_query = tl.sum(tl.where(key + query > 0, grad[:, None], 0), axis=0)
        tl.store(grad_pre + a, on_query * weight, a < A)


@triton.jit
def keys_gradient(grad_energy, pre, keys, energy_weight, lengths, grad_keys, grad_energy_weight, N,
                  K: tl.constexpr, A: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
                  KEYS: tl.constexpr):
    """One program per picture and KEYS x KEYS keys: sums over the steps of its captions."""
    b, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p, a = part * KEYS + tl.arange(0, KEYS), tl.program_id(2) * KEYS + tl.arange(0, KEYS)
    inside = (p[:, None] < P) & (a < A)
    key = load(keys + b * P * A + p[:, None] * A + a, inside)
    on_keys, on_weight = tl.zeros([KEYS, KEYS], tl.float32), tl.zeros([KEYS, KEYS], tl.float32)
    for k in range(K):
        for t in range(tl.load(lengths + b * K + k)):
            row = b * K + k + t * N
            grad = load(grad_energy + row * P + p, p < P)[:, None]
            total = key + load(pre + row * W + a, a < A)
            on_keys += tl.where(total > 0, grad, 0)
            on_weight += grad * tl.maximum(total, 0)
    on_keys *= load(energy_weight + a, a < A)
    tl.store(grad_keys + b * P * A + p[:, None] * A + a, on_keys, inside)
    of_part = grad_energy_weight + (b * tl.num_programs(1) + part) * A
    tl.store(of_part + a, tl.sum(on_weight, axis=0), a < A)


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit(do_not_specialize=("t",))
def cell(pre, word_gates, c_before, lengths, t, gates, h, c,
         SKIPPED: tl.constexpr, H: tl.constexpr, HH: tl.constexpr):
    """One program per caption: Eq. 1-3. HH: a power of two that holds H."""
    n, unit = tl.program_id(0).to(tl.int64), tl.arange(0, HH)
    inside = unit < H
    is_open = tl.load(lengths + n) > t
    pre += n * (SKIPPED + 4 * H) + SKIPPED + unit
    word_gates += n * 4 * H + unit
    gates += n * 4 * H + unit
    i = tl.sigmoid(load(pre, inside) + load(word_gates, inside))  # Eq. 1
    f = tl.sigmoid(load(pre + H, inside) + load(word_gates + H, inside))
    g = tanh(load(pre + 2 * H, inside) + load(word_gates + 2 * H, inside))
    o = tl.sigmoid(load(pre + 3 * H, inside) + load(word_gates + 3 * H, inside))
    state = f * load(c_before + n * H + unit, inside) + i * g  # Eq. 2
    tl.store(gates, i, inside)
    tl.store(gates + H, f, inside)
    tl.store(gates + 2 * H, g, inside)
    tl.store(gates + 3 * H, o, inside)
    tl.store(c + n * H + unit, tl.where(is_open, state, 0), inside)
    tl.store(h + n * H + unit, tl.where(is_open, o * tanh(state), 0), inside)  # Eq. 3


@triton.jit(do_not_specialize=("t",))
def cell_gradient(grad_h, later_h, later_c, gates, c, c_before, lengths, t, grad_pre,
                  SKIPPED: tl.constexpr, H: tl.constexpr, HH: tl.constexpr):
    """One program per caption: the gradient of h -> those of the gates' input, and later_c."""
    n, unit = tl.program_id(0).to(tl.int64), tl.arange(0, HH)
    place = n * H + unit
    inside = (unit < H) & (tl.load(lengths + n) > t)  # where a caption has ended all is 0
    gates += n * 4 * H + unit
    grad_pre += n * (SKIPPED + 4 * H) + SKIPPED + unit
    i, f = load(gates, inside), load(gates + H, inside)
    g, o = load(gates + 2 * H, inside), load(gates + 3 * H, inside)
    state = tanh(load(c + place, inside))
    grad = load(grad_h + place, inside) + load(later_h + place, inside)
    grad_c = load(later_c + place, inside) + grad * o * (1 - state * state)
    tl.store(grad_pre, grad_c * g * i * (1 - i), unit < H)
    tl.store(grad_pre + H, grad_c * load(c_before + place, inside) * f * (1 - f), unit < H)
    tl.store(grad_pre + 2 * H, grad_c * i * (1 - g * g), unit < H)
    tl.store(grad_pre + 3 * H, grad * state * o * (1 - o), unit < H)
    tl.store(later_c + place, grad_c * f, unit < H)
