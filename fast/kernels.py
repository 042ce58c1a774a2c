"""The time loop of models.DecoderWithAttention for GPUs, fused: the same numbers.

PyTorch launches some twenty kernels per step and forty for its gradient, most of them too small for a GPU, and writes
the attention's hidden layer, (B, K, P, A), to memory. Here a step is two matrix products and two kernels of our own:
`attend`, which computes the hidden layer of one caption tile by tile in registers (Eq. 4, 5, 13), and `cell` (Eq. 1-3).
The gradients that all steps add to, of weights, keys and grids, are summed after the loop. Matrix products are in
autocast's dtype; everything else is computed in float32. All captions run through all steps, as zeros after their end,
so that loops of one length launch the same kernels every time: in training these are captured as a CUDA graph.

Symbols as in models.py; N = B K captions, W = A + D + 4H the columns h is multiplied to: query, beta, gates.
"""
import functools
import warnings
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from fast.graphs import Recorded
from utils import autocast_dtype


def are_usable(grid, pool):
    """Whether the kernels can run: on a GPU, where a caption's attention fits into registers."""
    return grid.is_cuda and max(pool.shape) <= 1024 and run_on(grid.device)


@functools.cache
def run_on(device):
    """Whether Triton can compile and start a kernel here. Args: device (torch.device)."""
    row = torch.zeros(1, 16, device=device)
    try:
        cell[(1,)](row, row, row, row.long(), 0, row.clone(), row.clone(), row.clone(), 0, 4, 4)
    except Exception as error:  # whatever the compilers that it calls do
        reason = str(error).partition("\n")[0]
        warnings.warn(f"Triton does not work here ({reason:.200}): without kernels.py, which needs it and a C "
                      f"compiler, training on a GPU takes several times as long", stacklevel=2)
        return False
    return True


class Steps(NamedTuple):
    """The outputs of time steps, one row per caption and step."""

    pre: torch.Tensor  # (n, W): query, beta before its sigmoid, h's part of the gates
    alpha: torch.Tensor  # float32 (n, P)
    cells: torch.Tensor  # float32 (n, G): alpha @ pool
    context: torch.Tensor  # (n, D), after its gate
    gates: torch.Tensor  # float32 (n, 4H): i, f, g, o
    h: torch.Tensor  # (n, H)
    c: torch.Tensor  # float32 (n, H)


def empty_steps(n, grid, pool, keys, like):
    """Buffers of n rows, in the dtype of `like`, which is (..., 4H)."""
    (P, G), D, A, H = pool.shape, grid.shape[2], keys.shape[2], like.shape[-1] // 4
    exact = torch.float32
    return Steps(*(torch.empty(n, width, dtype=dtype, device=like.device) for width, dtype in (
        (A + D + 4 * H, like.dtype), (P, exact), (G, exact), (D, like.dtype), (4 * H, exact), (H, like.dtype),
        (H, exact))))


def step(grid, pool, keys, energy_weight, weights, word_input, h, c, lengths, t, out):
    """One time step of all K captions of each picture: fast.decoder.FastDecoder.rows_step.

    Args:
        grid, pool, keys: see fast.decoder.Pixels. energy_weight: full_att's, (A,). weights: see step_weights.
            word_input: (N, 4H). h, c: (N, H). pool, energy_weight and c are float32, all else of one dtype.
        lengths: int64 (N,); a caption of no more than t (int) steps has ended, and gives zeros.
        out (Steps): its N rows are filled.
    """
    h_weight, h_bias, context_weight = weights
    (B, P, A), (G, D), (N, H) = keys.shape, grid.shape[1:], h.shape
    PP, GG = triton.next_power_of_2(P), triton.next_power_of_2(G)
    torch.addmm(h_bias, h, h_weight.T, out=out.pre)
    attend[(N,)](out.pre, grid, pool, keys, energy_weight, lengths, t, out.alpha, out.cells, out.context, N // B, A, D,
                 H, P, G, PP, GG, max(4096 // PP, 4), max(4096 // GG, 4), max(8192 // GG, 16), num_warps=4)
    gates = torch.addmm(word_input, out.context, context_weight.T)
    cell[(N,)](out.pre, gates, c, lengths, t, out.gates, out.h, out.c, A + D, H, triton.next_power_of_2(H))


class Loop:
    """All that lies between grids with embedded words and the states, at most T steps, and its gradient, in buffers.

    FastDecoder's own functions give what the loop over `step` reads. For each length that recurs, both passes are a
    CUDA graph: the host starts about half as many operations as with graphs of the loop alone (benchmarks/memory.py).

    Args:
        decoder (FastDecoder). grid: (B, h, w, D). words: (T, N, E). dtype: of the matrix products. is_trained (bool):
        there will be a backward pass.
    """

    def __init__(self, decoder, grid, words, dtype, is_trained):
        (self.T, N, _), self.decoder, self.dtype = words.shape, decoder, dtype
        empty, exact = functools.partial(torch.empty, device=grid.device, dtype=dtype), torch.float32
        self.grid, self.words, self.pool = empty(grid.shape), empty(words.shape), decoder.pool_of(grid)
        self.lengths = empty(N, dtype=torch.int64)
        self.graphs = {}
        self.memory = torch.cuda.graph_pool_handle() if grid.is_cuda else None  # of all graphs, which run in turns
        (B, _, _, D), P = grid.shape, len(self.pool)
        A, H = decoder.decoder.attention.encoder_att.out_features, decoder.decoder.decode_step.hidden_size
        W = A + D + 4 * H
        shapes = (B, P, A), (A,), (N, H), (N, H), (self.T, N, 4 * H), (W, H), (W,), (4 * H, D)
        types = dtype, exact, dtype, exact, dtype, dtype, dtype, dtype
        self.read = [empty(shape, dtype=kind) for shape, kind in zip(shapes, types)]  # of around_steps
        self.steps = empty_steps(self.T * N, self.grid.flatten(1, 2), self.pool, self.read[0], self.read[4])
        if is_trained:
            self.grad_pre, self.grad_energy = torch.empty_like(self.steps.pre), torch.empty_like(self.steps.alpha)
            self.grad_h, self.grad_alpha = torch.empty_like(self.steps.h), torch.empty_like(self.steps.alpha)
            self.grad_cells = torch.empty_like(self.steps.cells)
            self.later_h, self.later_c = (torch.empty_like(x) for x in self.read[2:4])  # what later steps hand back
            self.grad_words, self.grad_grid = torch.empty_like(self.words), None  # the latter made by the first call
            self.grads = [torch.empty_like(p, dtype=exact) for p in decoder.looped_parameters()]

    def around_steps(self, T):
        """What the steps read. Returns: keys, energy_weight, h, c, word_input, and the three step_weights."""
        decoder, device = self.decoder, self.grid.device.type
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False):
            pixels = decoder.look(self.grid)
            h, c = (x.repeat_interleave(len(self.lengths) // len(x), 0) for x in decoder.init_hidden_state(pixels))
            word_input = decoder.word_input(self.words[:T])
        energy_weight = decoder.decoder.attention.full_att.weight[0]
        return pixels.keys, energy_weight, h, c, word_input, *decoder.step_weights()

    def rows(self, t, buffers):
        """The rows of step t."""
        N = len(self.lengths)
        return [x[t * N:(t + 1) * N] for x in buffers]

    def forward(self, T):
        for mine, x in zip(self.read, self.around_steps(T)):
            mine[:len(x)].copy_(x)
        keys, energy_weight, h, c, word_input, *weights = self.read
        for t in range(T):
            out = Steps(*self.rows(t, self.steps))
            step(self.grid.flatten(1, 2), self.pool, keys, energy_weight, weights, word_input[t], h, c, self.lengths, t,
                 out)
            h, c = out.h, out.c

    def backward(self, T, to_grid):
        """Args: to_grid (bool): the grid is trained too."""
        grid, pool, lengths = self.grid.flatten(1, 2), self.pool, self.lengths
        keys, energy_weight, _, c, _, h_weight, _, context_weight = self.read
        (B, P, A), (G, D), (N, H) = keys.shape, grid.shape[1:], c.shape
        PP, GG = triton.next_power_of_2(P), triton.next_power_of_2(G)
        self.later_h.zero_()
        self.later_c.zero_()
        for t in reversed(range(T)):
            pre, alpha, _, context, gates, _, c_now = self.rows(t, self.steps)
            grad_pre, grad_h, grad_alpha, grad_energy, grad_cells = self.rows(t, (
                self.grad_pre, self.grad_h, self.grad_alpha, self.grad_energy, self.grad_cells))
            c_before = self.rows(t - 1, [self.steps.c])[0] if t else c
            cell_gradient[(N,)](grad_h, self.later_h, self.later_c, gates, c_now, c_before, lengths, t, grad_pre, A + D,
                                H, triton.next_power_of_2(H))
            grad_context = grad_pre[:, A + D:] @ context_weight
            attend_gradient[(N,)](grad_context, grad_alpha, pre, grid, pool, keys, energy_weight, lengths, t, alpha,
                                  context, grad_pre, grad_energy, grad_cells, N // B, A, D, H, P, G, PP, GG,
                                  max(16384 // PP, 4), max(8192 // GG, 16), max(4096 // PP, 4), num_warps=4)
            torch.mm(grad_pre, h_weight, out=self.later_h)
        self.around_steps_backward(T, to_grid)

    def around_steps_backward(self, T, to_grid):
        """The gradients of parameters, words and grid: what all steps add to, in one product each."""
        grid, keys, energy_weight, h, _, _, _, _, context_weight = self.grid.flatten(1, 2), *self.read
        (B, P, A), D, (N, H) = keys.shape, grid.shape[2], h.shape
        parts, rows = triton.cdiv(P, KEYS), slice(T * N)
        grad_keys = torch.empty_like(keys, dtype=torch.float32)
        grad_energy_weight = grad_keys.new_empty(B, parts, A)
        keys_gradient[(B, parts, triton.cdiv(A, KEYS))](
            self.grad_energy, self.steps.pre, keys, energy_weight, self.lengths, grad_keys, grad_energy_weight, N,
            N // B, A, A + D + 4 * H, P, KEYS)
        grad_pre, h_before = self.grad_pre[rows], torch.cat([h, self.steps.h[:(T - 1) * N]])
        grad_gates, words = grad_pre[:, A + D:], self.words[:T].flatten(0, 1)
        of_h, of_bias = grad_pre.T @ h_before, grad_pre.sum(dim=0, dtype=torch.float32)
        of_input = torch.cat([grad_gates.T @ words, grad_gates.T @ self.steps.context[rows]], dim=1)
        on_cells = self.pool.T.to(self.dtype) @ grad_keys.to(self.dtype)  # (B, G, A)
        of_keys = on_cells.flatten(0, 1).T @ grid.flatten(0, 1)
        mean = (self.pool.mean(dim=0, keepdim=True).to(self.dtype) @ grid).squeeze(1)
        grad_h, grad_c = (x.view(B, -1, H).sum(dim=1).to(self.dtype) for x in (self.later_h, self.later_c))
        found = (of_keys, grad_keys.sum(dim=(0, 1)), of_h[:A], of_bias[:A], grad_energy_weight.sum(dim=(0, 1)),
                 of_bias.new_zeros(1),  # a softmax ignores the bias of the energies
                 grad_h.T @ mean, grad_h.sum(dim=0), grad_c.T @ mean, grad_c.sum(dim=0),
                 of_h[A:A + D], of_bias[A:A + D], of_input, of_h[A + D:], of_bias[A + D:], of_bias[A + D:])
        for mine, x in zip(self.grads, found):
            mine.copy_(x.view_as(mine))
        torch.mm(grad_gates, self.decoder.word_weight().to(self.dtype), out=self.grad_words[:T].view(T * N, -1))
        if to_grid:  # of each picture, the sum over its captions and their steps
            if self.grad_grid is None:
                self.grad_grid = torch.empty(self.grid.shape, device=grid.device)
            ungated = grad_gates @ context_weight * torch.sigmoid(self.steps.pre[rows, A:A + D])
            cells, ungated = (x.view(T, B, N // B, -1).transpose(0, 1).flatten(1, 2)
                              for x in (self.steps.cells[rows], ungated))
            decoder = self.decoder.decoder
            on_mean = grad_h.float() @ decoder.init_h.weight + grad_c.float() @ decoder.init_c.weight  # (B, D)
            self.grad_grid.flatten(1, 2).copy_(
                cells.to(ungated).transpose(1, 2) @ ungated
                + on_cells @ decoder.attention.encoder_att.weight.to(self.dtype)
                + self.pool.mean(dim=0)[:, None] * on_mean[:, None])

    def run(self, what, T, *given):
        """Args: what (str): forward or backward. T (int): steps. given: of that."""
        recorded = self.graphs.setdefault((what, T, *given), Recorded(self.memory))
        recorded(functools.partial(getattr(self, what), T, *given))


def take_loop(decoder, grid, words, dtype):
    """A loop whose buffers fit these inputs, of those that have done their backward pass. Args: see Loop."""
    needed = grid.shape, words.shape[1:], dtype, grid.device
    for place, loop in enumerate(decoder.loops):
        if (loop.grid.shape, loop.words.shape[1:], loop.dtype, loop.grid.device) == needed and loop.T >= len(words):
            return decoder.loops.pop(place)
    decoder.loops.clear()  # first: memory may not hold one more
    return Loop(decoder, grid, words, dtype, is_trained=True)


class TimeLoop(torch.autograd.Function):
    """models.DecoderWithAttention.forward up to the states, and its gradient by backpropagation through time.

    Args:
        decoder (FastDecoder). grid: (B, h, w, D). words: (T, N, E), embedded. lengths: int64 (N,), the steps of each
        caption. is_trained (bool): a backward pass will follow, and the next loop is likely to have the same shapes.
        parameters: the decoder's looped_parameters.
    Returns:
        h after every step, (T, N, H); alpha, float32 (T, N, P), 0 after a caption's end.
    """

    @staticmethod
    def forward(ctx, decoder, grid, words, lengths, is_trained, *parameters):
        T, N, _ = words.shape
        dtype = autocast_dtype(grid.device)
        loop = take_loop(decoder, grid, words, dtype) if is_trained else Loop(decoder, grid, words, dtype, False)
        for mine, x in ((loop.grid, grid), (loop.words[:T], words), (loop.lengths, lengths)):
            mine.copy_(x)
        loop.run("forward", T)
        ctx.loop, ctx.T = loop, T
        return tuple(x[:T * N].view(T, N, -1).clone() for x in (loop.steps.h, loop.steps.alpha))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h, grad_alpha):
        loop, T, ctx.loop = ctx.loop, ctx.T, None
        if loop is None:
            raise RuntimeError("the backward pass of a fused time loop can run once")
        for mine, x in ((loop.grad_h, grad_h), (loop.grad_alpha, grad_alpha)):
            mine[:T * len(loop.lengths)].view_as(x).copy_(x)
        loop.run("backward", T, ctx.needs_input_grad[1])
        grad_grid = loop.grad_grid.clone() if ctx.needs_input_grad[1] else None
        grads = torch.cat([x.flatten() for x in loop.grads]).split([x.numel() for x in loop.grads])
        loop.decoder.loops.insert(0, loop)  # of two passes in a step each finds its own again
        return (None, grad_grid, loop.grad_words[:T].to(torch.float32, copy=True), None, None,
                *(x.view_as(mine) for x, mine in zip(grads, loop.grads)))


# ---------------------------------------------------------------------------------------------------------------------
# Kernels; Triton's program is CUDA's thread block. PP and GG are powers of two that hold P and G; PART_A to PART_G are
# the sizes of tiles along A, P, D and G, the fastest of those tried on an H100.

KEYS = 64  # pixels, and units of the attention, in a program of keys_gradient


@triton.jit(do_not_specialize=("t",))
def attend(pre, grid, pool, keys, energy_weight, lengths, t, alpha, cells, context, K: tl.constexpr, A: tl.constexpr,
           D: tl.constexpr, H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, PP: tl.constexpr, GG: tl.constexpr,
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
        query = tl.load(pre + a, a < A, 0).to(tl.float32)
        weight = tl.load(energy_weight + a, a < A, 0)
        key = tl.load(keys + b * P * A + p[:, None] * A + a, (p[:, None] < P) & (a < A), 0).to(tl.float32)
        hidden += tl.maximum(key + query, 0) * weight
    energy = tl.where(p < P, tl.sum(hidden, axis=1), -float("inf"))  # Eq. 4
    weights = tl.exp(energy - tl.max(energy, axis=0))
    weights /= tl.sum(weights, axis=0)  # Eq. 5
    tl.store(alpha + n * P + p, weights, p < P)
    tl.debug_barrier()  # other threads read below what one has stored

    by_pool = tl.zeros([PART_P, GG], tl.float32)
    for start in range(0, P, PART_P):
        q = start + tl.arange(0, PART_P)
        part = tl.load(alpha + n * P + q, q < P, 0)
        by_pool += part[:, None] * tl.load(pool + q[:, None] * G + g, (q[:, None] < P) & (g < G), 0)
    on_cells = tl.sum(by_pool, axis=0)
    tl.store(cells + n * G + g, on_cells, g < G)
    for start in range(0, D, PART_D):
        d = start + tl.arange(0, PART_D)
        beta = tl.sigmoid(tl.load(pre + A + d, d < D, 0).to(tl.float32))
        value = tl.load(grid + b * G * D + g[:, None] * D + d, (g[:, None] < G) & (d < D), 0).to(tl.float32)
        tl.store(context + n * D + d, beta * tl.sum(on_cells[:, None] * value, axis=0), d < D)  # Eq. 13, section 4.2.1


@triton.jit(do_not_specialize=("t",))
def attend_gradient(grad_context, grad_alpha, pre, grid, pool, keys, energy_weight, lengths, t, alpha, context,
                    grad_pre, grad_energy, grad_cells, K: tl.constexpr, A: tl.constexpr, D: tl.constexpr,
                    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, PP: tl.constexpr, GG: tl.constexpr,
                    PART_A: tl.constexpr, PART_D: tl.constexpr, PART_G: tl.constexpr):
    """One program per caption: the gradients of context and alpha -> those of query, beta and energies."""
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
        grad = tl.load(grad_context + n * D + d, d < D, 0).to(tl.float32)
        beta = tl.sigmoid(tl.load(pre + A + d, d < D, 0).to(tl.float32))
        value = tl.load(context + n * D + d, d < D, 0).to(tl.float32)
        tl.store(grad_pre + A + d, grad * value * (1 - beta), d < D)
        cell_values = tl.load(grid + b * G * D + g[:, None] * D + d, (g[:, None] < G) & (d < D), 0).to(tl.float32)
        on_cells += cell_values * (grad * beta)
    tl.store(grad_cells + n * G + g, tl.sum(on_cells, axis=1), g < G)
    tl.debug_barrier()

    by_pool = tl.zeros([PP, PART_G], tl.float32)
    for start in range(0, G, PART_G):
        k = start + tl.arange(0, PART_G)
        part = tl.load(grad_cells + n * G + k, k < G, 0)
        by_pool += tl.load(pool + p[:, None] * G + k, (p[:, None] < P) & (k < G), 0) * part
    grad = tl.load(grad_alpha + n * P + p, p < P, 0) + tl.sum(by_pool, axis=1)
    weights = tl.load(alpha + n * P + p, p < P, 0)
    grad = weights * (grad - tl.sum(weights * grad, axis=0))
    tl.store(grad_energy + n * P + p, grad, p < P)
    for start in range(0, A, PART_A):
        a = start + tl.arange(0, PART_A)
        query = tl.load(pre + a, a < A, 0).to(tl.float32)
        weight = tl.load(energy_weight + a, a < A, 0)
        key = tl.load(keys + b * P * A + p[:, None] * A + a, (p[:, None] < P) & (a < A), 0).to(tl.float32)
        on_query = tl.sum(tl.where(key + query > 0, grad[:, None], 0), axis=0)
        tl.store(grad_pre + a, on_query * weight, a < A)


@triton.jit
def keys_gradient(grad_energy, pre, keys, energy_weight, lengths, grad_keys, grad_energy_weight, N, K: tl.constexpr,
                  A: tl.constexpr, W: tl.constexpr, P: tl.constexpr, KEYS: tl.constexpr):
    """One program per picture and tile of KEYS x KEYS keys: sums over the steps of the picture's captions."""
    b, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p, a = part * KEYS + tl.arange(0, KEYS), tl.program_id(2) * KEYS + tl.arange(0, KEYS)
    inside = (p[:, None] < P) & (a < A)
    key = tl.load(keys + b * P * A + p[:, None] * A + a, inside, 0).to(tl.float32)
    on_keys, on_weight = tl.zeros([KEYS, KEYS], tl.float32), tl.zeros([KEYS, KEYS], tl.float32)
    for k in range(K):
        for t in range(tl.load(lengths + b * K + k)):
            row = b * K + k + t * N
            grad = tl.load(grad_energy + row * P + p, p < P, 0)[:, None]
            total = key + tl.load(pre + row * W + a, a < A, 0).to(tl.float32)
            on_keys += tl.where(total > 0, grad, 0)
            on_weight += grad * tl.maximum(total, 0)
    tl.store(grad_keys + b * P * A + p[:, None] * A + a, on_keys * tl.load(energy_weight + a, a < A, 0), inside)
    tl.store(grad_energy_weight + (b * tl.num_programs(1) + part) * A + a, tl.sum(on_weight, axis=0), a < A)


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit(do_not_specialize=("t",))
def cell(pre, word_gates, c_before, lengths, t, gates, h, c, SKIPPED: tl.constexpr, H: tl.constexpr, HH: tl.constexpr):
    """One program per caption: Eq. 1-3. HH: a power of two that holds H."""
    n, unit = tl.program_id(0).to(tl.int64), tl.arange(0, HH)
    inside = unit < H
    is_open = tl.load(lengths + n) > t
    pre += n * (SKIPPED + 4 * H) + SKIPPED + unit
    word_gates += n * 4 * H + unit
    gates += n * 4 * H + unit
    i = tl.sigmoid(tl.load(pre, inside, 0).to(tl.float32) + tl.load(word_gates, inside, 0).to(tl.float32))
    f = tl.sigmoid(tl.load(pre + H, inside, 0).to(tl.float32) + tl.load(word_gates + H, inside, 0).to(tl.float32))
    g = tanh(tl.load(pre + 2 * H, inside, 0).to(tl.float32) + tl.load(word_gates + 2 * H, inside, 0).to(tl.float32))
    o = tl.sigmoid(tl.load(pre + 3 * H, inside, 0).to(tl.float32)
                   + tl.load(word_gates + 3 * H, inside, 0).to(tl.float32))  # Eq. 1
    state = f * tl.load(c_before + n * H + unit, inside, 0) + i * g  # Eq. 2
    tl.store(gates, i, inside)
    tl.store(gates + H, f, inside)
    tl.store(gates + 2 * H, g, inside)
    tl.store(gates + 3 * H, o, inside)
    tl.store(c + n * H + unit, tl.where(is_open, state, 0), inside)
    tl.store(h + n * H + unit, tl.where(is_open, o * tanh(state), 0), inside)  # Eq. 3


@triton.jit(do_not_specialize=("t",))
def cell_gradient(grad_h, later_h, later_c, gates, c, c_before, lengths, t, grad_pre, SKIPPED: tl.constexpr,
                  H: tl.constexpr, HH: tl.constexpr):
    """One program per caption: the gradient of h -> that of the gates before their nonlinearity, and later_c."""
    n, unit = tl.program_id(0).to(tl.int64), tl.arange(0, HH)
    place, inside = n * H + unit, (unit < H) & (tl.load(lengths + n) > t)  # where a caption has ended all is 0
    gates += n * 4 * H + unit
    grad_pre += n * (SKIPPED + 4 * H) + SKIPPED + unit
    i, f = tl.load(gates, inside, 0), tl.load(gates + H, inside, 0)
    g, o = tl.load(gates + 2 * H, inside, 0), tl.load(gates + 3 * H, inside, 0)
    state = tanh(tl.load(c + place, inside, 0))
    grad = tl.load(grad_h + place, inside, 0).to(tl.float32) + tl.load(later_h + place, inside, 0).to(tl.float32)
    grad_c = tl.load(later_c + place, inside, 0) + grad * o * (1 - state * state)
    tl.store(grad_pre, grad_c * g * i * (1 - i), unit < H)
    tl.store(grad_pre + H, grad_c * tl.load(c_before + place, inside, 0) * f * (1 - f), unit < H)
    tl.store(grad_pre + 2 * H, grad_c * i * (1 - g * g), unit < H)
    tl.store(grad_pre + 3 * H, grad * state * o * (1 - o), unit < H)
    tl.store(later_c + place, grad_c * f, unit < H)
