"""The time loop of models.DecoderWithAttention for GPUs, fused: same numbers as there, where every step is spelled out.

PyTorch starts some twenty kernels for a step and forty for its gradient, most of them too small for a GPU, and writes
the attention's hidden layer, (B, K, P, A), to memory. Here a step is two matrix products and two kernels of our own:
`attend`, in which a program makes the hidden layer of one caption piece by piece in registers (Eq. 4 to 13), and `cell`
(Eq. 1 to 3). What all steps add to, the gradients of weights, keys and grids, is summed after the loop. Matrix products
are in the type of the words' input, bfloat16 under autocast; everything else is worked out in float32.

Symbols as in models.py; M real tokens in the loop's order, W = A + D + 4H what h is multiplied to: query, beta, gates.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable


def are_usable(grid, pool):
    """Whether the kernels can do it: on a GPU, where a caption's attention fits into registers."""
    return grid.is_cuda and max(pool.shape) <= 1024


class Steps(NamedTuple):
    """What steps of captions work out, a row each."""

    pre: torch.Tensor  # (n, W): query, beta before its sigmoid, h's part of the gates
    alpha: torch.Tensor  # float32 (n, P)
    cells: torch.Tensor  # float32 (n, G): alpha @ pool
    context: torch.Tensor  # (n, D), after its gate
    gates: torch.Tensor  # float32 (n, 4H): i, f, g, o
    h: torch.Tensor  # (n, H)
    c: torch.Tensor  # float32 (n, H)


def empty_steps(n, grid, pool, keys, like):
    """Room for n rows, in the type of `like`, which is (..., 4H)."""
    (P, G), D, A, H = pool.shape, grid.shape[2], keys.shape[2], like.shape[1] // 4
    exact = torch.float32
    return Steps(*(torch.empty(n, width, dtype=dtype, device=like.device) for width, dtype in (
        (A + D + 4 * H, like.dtype), (P, exact), (G, exact), (D, like.dtype), (4 * H, exact), (H, like.dtype),
        (H, exact))))


def step(grid, pool, keys, energy_weight, picture, weights, word_input, h, c, steps, start=0, c_start=0):
    """models.DecoderWithAttention.step of n captions.

    Args:
        grid, pool, keys: as of models.Pixels. energy_weight: full_att's, (A,). picture: int64, the first n are whose
            captions they are. weights: as of step_weights. word_input: (n, 4H). h: (n, H). c: (..., H), from row
            c_start on. pool, energy_weight and c are float32, all else of one type, to multiply in.
        steps (Steps): n rows from `start` on are filled.
    """
    h_weight, h_bias, context_weight = weights
    (P, G), A, D, (n, H) = pool.shape, keys.shape[2], grid.shape[2], h.shape
    torch.addmm(h_bias, h, h_weight.T, out=steps.pre[start:start + n])
    attend[(n,)](steps.pre, grid, pool, keys, energy_weight, picture, steps.alpha, steps.cells, steps.context, start,
                 A, D, H, P, G, *tile_sizes(P, G, 16), num_warps=4)
    gates = torch.addmm(word_input, steps.context[start:start + n], context_weight.T)
    cell[(n,)](steps.pre, gates, c, steps.gates, steps.h, steps.c, start, c_start, A + D, H,
               triton.next_power_of_2(H))


class TimeLoop(torch.autograd.Function):
    """The loop of models.DecoderWithAttention.forward and its gradient, back through time.

    grid (B, G, D), pool (P, G), keys (B, P, A), energy_weight (A,) and its bias (1,), which a softmax ignores, h and c
    (N, H) before the loop, word_input (M, 4H), h_weight (W, H), h_bias (W,), context_weight (4H, D); sizes (list of T
    int, falling): how many captions are open; longest (int): the most tokens of a picture; int64 picture (N,): whose
    the captions are; tokens (M,): the tokens picture by picture; ends (B,): where in these each picture's end
    -> h after every step, (M, H), and alpha, float32 (M, P).
    """

    @staticmethod
    def forward(ctx, grid, pool, keys, energy_weight, energy_bias, h, c, word_input, h_weight, h_bias, context_weight,
                sizes, longest, picture, tokens, ends):
        grid, keys, h, *weights = (x.to(word_input.dtype).contiguous()
                                   for x in (grid, keys, h, h_weight, h_bias, context_weight))
        energy_weight, c = energy_weight.float(), c.float()
        pixels = grid, pool.float(), keys
        steps = empty_steps(len(word_input), *pixels, word_input)
        start, h_before, c_before, c_start = 0, h, c, 0
        for n in sizes:
            step(*pixels, energy_weight, picture, weights, word_input[start:start + n], h_before[:n], c_before, steps,
                 start, c_start)
            h_before, c_before, c_start = steps.h[start:start + n], steps.c, start
            start += n
        ctx.sizes, ctx.longest = sizes, longest
        ctx.save_for_backward(*pixels, energy_weight, *weights, h, c, picture, tokens, ends, *steps)
        return steps.h, steps.alpha

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h, grad_alpha):
        (grid, pool, keys, energy_weight, h_weight, h_bias, context_weight, h, c, picture, tokens, ends,
         *steps) = ctx.saved_tensors
        steps, sizes = Steps(*steps), ctx.sizes
        (B, P, A), (G, D), (M, H) = keys.shape, grid.shape[1:], steps.h.shape
        grad_h, grad_alpha = grad_h.contiguous(), grad_alpha.contiguous()
        grad_pre, grad_energy, grad_cells = (torch.empty_like(x) for x in (steps.pre, steps.alpha, steps.cells))
        # Of the context before its gate; only a grid that is trained needs it.
        grad_raw = torch.empty_like(steps.context) if ctx.needs_input_grad[0] else None
        later_h, later_c = torch.zeros_like(h), torch.zeros_like(c)  # what the steps after this one hand back
        start = M
        for t in reversed(range(len(sizes))):
            n, start = sizes[t], start - sizes[t]
            c_before = (steps.c, start - sizes[t - 1]) if t else (c, 0)
            cell_gradient[(n,)](grad_h, later_h, later_c, steps.gates, steps.c, *c_before, grad_pre, start, A + D, H,
                                triton.next_power_of_2(H))
            grad_now = grad_pre[start:start + n]
            grad_context = grad_now[:, A + D:] @ context_weight
            attend_gradient[(n,)](
                grad_context, grad_alpha, steps.pre, grid, pool, keys, energy_weight, picture, steps.alpha,
                steps.context, grad_pre, grad_energy, grad_cells, grad_context if grad_raw is None else grad_raw, start,
                grad_raw is not None, A, D, H, P, G, *tile_sizes(P, G, 64), num_warps=4)
            torch.mm(grad_now, h_weight, out=later_h[:n])

        parts = triton.cdiv(P, KEYS)
        grad_keys = torch.empty_like(keys, dtype=torch.float32)
        grad_energy_weight = grad_keys.new_empty(B, parts, A)
        keys_gradient[(B, parts, triton.cdiv(A, KEYS))](grad_energy, steps.pre, keys, energy_weight, tokens, ends,
                                                        grad_keys, grad_energy_weight, A, A + D + 4 * H, P, KEYS)
        grad_grid = None
        if grad_raw is not None:  # of each picture, the sum over its tokens of cells times grad_raw
            counts = torch.diff(ends, prepend=ends.new_zeros(1))
            of = torch.repeat_interleave(counts, output_size=M)
            place = of, torch.arange(M, device=of.device) - (ends - counts)[of]
            cells, raw = (x.new_zeros(B, ctx.longest, x.shape[1]).index_put_(place, x[tokens])
                          for x in (steps.cells.to(grid.dtype), grad_raw))
            grad_grid = cells.transpose(1, 2) @ raw
        grad_gates = grad_pre[:, A + D:]
        h_before = torch.cat([h[:sizes[0]], *(x[:n] for x, n in zip(steps.h.split(sizes), sizes[1:]))])
        return (grad_grid, None, grad_keys, grad_energy_weight.sum(dim=(0, 1)), grad_keys.new_zeros(1), later_h,
                later_c, grad_gates, grad_pre.T @ h_before, grad_pre.sum(dim=0, dtype=torch.float32),
                grad_gates.T @ steps.context, *[None] * 5)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels

KEYS = 64  # pixels, and units of the attention, in a program of keys_gradient


def tile_sizes(P, G, part_a):
    """The powers of two that hold P and G, and how many of A, P, D and G a program takes at a time.

    part_a: of A where P is 196. These sizes were the fastest of those tried on an H100.
    """
    PP, GG = triton.next_power_of_2(P), triton.next_power_of_2(G)
    return PP, GG, max(256 * part_a // PP, 4), max(4096 // GG, 4), max(8192 // GG, 16), max(4096 // PP, 4)


@triton.jit(do_not_specialize=("start",))
def attend(pre, grid, pool, keys, energy_weight, picture, alpha, cells, context, start, A: tl.constexpr,
           D: tl.constexpr, H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, PP: tl.constexpr,
           GG: tl.constexpr, PART_A: tl.constexpr, PART_P: tl.constexpr, PART_D: tl.constexpr, PART_G: tl.constexpr):
    """A program a caption: pre -> alpha, cells, context."""
    b, n = tl.load(picture + tl.program_id(0)), start + tl.program_id(0).to(tl.int64)
    pre += n * (A + D + 4 * H)
    p, g = tl.arange(0, PP), tl.arange(0, GG)

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
    tl.debug_barrier()  # what one thread has written others read

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


@triton.jit(do_not_specialize=("start",))
def attend_gradient(grad_context, grad_alpha, pre, grid, pool, keys, energy_weight, picture, alpha, context, grad_pre,
                    grad_energy, grad_cells, grad_raw, start, IS_TRAINED: tl.constexpr, A: tl.constexpr,
                    D: tl.constexpr, H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, PP: tl.constexpr,
                    GG: tl.constexpr, PART_A: tl.constexpr, PART_P: tl.constexpr, PART_D: tl.constexpr,
                    PART_G: tl.constexpr):
    """A program a caption: the gradients of context and alpha -> of query, beta, energies, and the raw context."""
    m, b = tl.program_id(0).to(tl.int64), tl.load(picture + tl.program_id(0))
    n = start + m
    pre += n * (A + D + 4 * H)
    grad_pre += n * (A + D + 4 * H)
    p, g = tl.arange(0, PP), tl.arange(0, GG)

    on_cells = tl.zeros([GG, PART_D], tl.float32)
    for start in range(0, D, PART_D):
        d = start + tl.arange(0, PART_D)
        grad = tl.load(grad_context + m * D + d, d < D, 0).to(tl.float32)
        beta = tl.sigmoid(tl.load(pre + A + d, d < D, 0).to(tl.float32))
        value = tl.load(context + n * D + d, d < D, 0).to(tl.float32)
        tl.store(grad_pre + A + d, grad * value * (1 - beta), d < D)
        if IS_TRAINED:
            tl.store(grad_raw + n * D + d, grad * beta, d < D)
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
def keys_gradient(grad_energy, pre, keys, energy_weight, tokens, ends, grad_keys, grad_energy_weight, A: tl.constexpr,
                  W: tl.constexpr, P: tl.constexpr, KEYS: tl.constexpr):
    """A program a picture and KEYS x KEYS of its keys: sums over the picture's tokens."""
    b, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p, a = part * KEYS + tl.arange(0, KEYS), tl.program_id(2) * KEYS + tl.arange(0, KEYS)
    inside = (p[:, None] < P) & (a < A)
    key = tl.load(keys + b * P * A + p[:, None] * A + a, inside, 0).to(tl.float32)
    on_keys, on_weight = tl.zeros([KEYS, KEYS], tl.float32), tl.zeros([KEYS, KEYS], tl.float32)
    for token in range(tl.load(ends + b - 1, b > 0, 0), tl.load(ends + b)):
        m = tl.load(tokens + token)
        grad = tl.load(grad_energy + m * P + p, p < P, 0)[:, None]
        sum = key + tl.load(pre + m * W + a, a < A, 0).to(tl.float32)
        on_keys += tl.where(sum > 0, grad, 0)
        on_weight += grad * tl.maximum(sum, 0)
    tl.store(grad_keys + b * P * A + p[:, None] * A + a, on_keys * tl.load(energy_weight + a, a < A, 0), inside)
    tl.store(grad_energy_weight + (b * tl.num_programs(1) + part) * A + a, tl.sum(on_weight, axis=0), a < A)


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit(do_not_specialize=("start", "c_start"))
def cell(pre, word_gates, c_before, gates, h, c, start, c_start, SKIPPED: tl.constexpr, H: tl.constexpr,
         HH: tl.constexpr):
    """A program a caption: Eq. 1 to 3. HH: a power of two that holds H."""
    row, unit = tl.program_id(0).to(tl.int64), tl.arange(0, HH)
    n, inside = start + row, unit < H
    pre += n * (SKIPPED + 4 * H) + SKIPPED + unit
    word_gates += row * 4 * H + unit
    gates += n * 4 * H + unit
    i = tl.sigmoid(tl.load(pre, inside, 0).to(tl.float32) + tl.load(word_gates, inside, 0).to(tl.float32))
    f = tl.sigmoid(tl.load(pre + H, inside, 0).to(tl.float32) + tl.load(word_gates + H, inside, 0).to(tl.float32))
    g = tanh(tl.load(pre + 2 * H, inside, 0).to(tl.float32) + tl.load(word_gates + 2 * H, inside, 0).to(tl.float32))
    o = tl.sigmoid(tl.load(pre + 3 * H, inside, 0).to(tl.float32)
                   + tl.load(word_gates + 3 * H, inside, 0).to(tl.float32))  # Eq. 1
    state = f * tl.load(c_before + (c_start + row) * H + unit, inside, 0) + i * g  # Eq. 2
    tl.store(gates, i, inside)
    tl.store(gates + H, f, inside)
    tl.store(gates + 2 * H, g, inside)
    tl.store(gates + 3 * H, o, inside)
    tl.store(c + n * H + unit, state, inside)
    tl.store(h + n * H + unit, o * tanh(state), inside)  # Eq. 3


@triton.jit(do_not_specialize=("start", "c_start"))
def cell_gradient(grad_h, later_h, later_c, gates, c, c_before, c_start, grad_pre, start, SKIPPED: tl.constexpr,
                  H: tl.constexpr, HH: tl.constexpr):
    """A program a caption: the gradient of h -> of the gates before their nonlinearity, and later_c."""
    row, unit = tl.program_id(0).to(tl.int64), tl.arange(0, HH)
    n, inside = start + row, unit < H
    gates += n * 4 * H + unit
    grad_pre += n * (SKIPPED + 4 * H) + SKIPPED + unit
    i, f = tl.load(gates, inside, 0), tl.load(gates + H, inside, 0)
    g, o = tl.load(gates + 2 * H, inside, 0), tl.load(gates + 3 * H, inside, 0)
    state = tanh(tl.load(c + n * H + unit, inside, 0))
    grad = (tl.load(grad_h + n * H + unit, inside, 0).to(tl.float32)
            + tl.load(later_h + row * H + unit, inside, 0).to(tl.float32))
    grad_c = tl.load(later_c + row * H + unit, inside, 0) + grad * o * (1 - state * state)
    tl.store(grad_pre, grad_c * g * i * (1 - i), inside)
    tl.store(grad_pre + H, grad_c * tl.load(c_before + (c_start + row) * H + unit, inside, 0) * f * (1 - f), inside)
    tl.store(grad_pre + 2 * H, grad_c * i * (1 - g * g), inside)
    tl.store(grad_pre + 3 * H, grad * state * o * (1 - o), inside)
    tl.store(later_c + row * H + unit, grad_c * f, inside)
