"""Show, Attend and Tell (Xu et al. 2015, arXiv 1502.03044) with soft attention, in the paper's order.

Symbols: B pictures, K captions a picture, N captions in all, G cells of the ResNet's own grid, P pixels the attention
chooses among, T steps, M real tokens, D encoder dim, A attention dim, E word embedding dim, H decoder dim, V words.
"Eq." and "section" refer to the paper; the parameters have the names of the PyTorch original.

On a GPU the time loop is that of kernels.py, with the same numbers; here it can be read.

Departures from the original, and why:
- The encoder gives the grid of the ResNet itself (8x8 at 256 pixels). Pooling it to 14x14 is a fixed P x G matrix, and
  commutes with whatever is linear: so only the energies are worked out on P pixels, the rest on G. Same numbers.
- `encoder_att` of the pixels and the words' part of the LSTM's input do not depend on the state: once, not every step.
- The K captions of a picture share its pixels. A caption that has ended leaves the time loop.
- The hidden layer of the attention, (B, K, P, A), is not kept: it is made again in the backward pass.
- The words are scored, and the weights' gradients summed, for all real tokens together, outside the time loop.
- A frozen layer stays in eval mode: its batch norms must not drift.
- Generated captions never contain <pad>, <start> or <unk>, and one that never ends is given as far as it goes.
Departures from the paper that the original already made: a ResNet instead of VGG, a gate beta for every feature
instead of one number, the words scored from the state alone, fc(dropout(h)), not by the deep output of Eq. 7, and the
last term of Eq. 14 as a mean over the pixels.
"""
import copy
import functools
import math
import warnings
from typing import NamedTuple
from urllib.error import URLError

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.fusion import fuse_conv_bn_eval

from config import UserError
from datasets import END, PAD, START, UNK

try:
    import kernels
except ModuleNotFoundError:  # Triton comes with PyTorch for Linux; a GPU does without
    kernels = None

LARGE = 2**22  # numbers in the attention's hidden layer from which on compiling it pays

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Encoder(nn.Module):
    """The annotation vectors a (section 3.1.1): a ResNet without its last two layers.

    Args:
        name (str): resnet18, resnet34, resnet50, resnet101 or resnet152.
        weights (str): imagenet, none, or the path of a state dict of torchvision's ResNet.
    Raises:
        UserError: the weights cannot be had, or do not fit.
    """

    def __init__(self, name, weights):
        super().__init__()
        resnet = load_resnet(name, weights)
        self.dim = resnet.fc.in_features  # D: 512 for resnet18 and 34, otherwise 2048
        self.resnet = nn.Sequential(*list(resnet.children())[:-2]).to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255, persistent=False)
        self.fine_tune("none")

    def forward(self, images):
        """
        Args:
            images: uint8 (B, S, S, 3), RGB, as read_image gives them.
        Returns:
            float (B, S/32, S/32, D), rounded up.
        """
        x = images.permute(0, 3, 1, 2)  # (B, 3, S, S), channels last in memory, as the convolutions like it
        x = ((x.float() - self.mean) / self.std).to(next(self.resnet.parameters()).dtype)
        return self.resnet(x).permute(0, 2, 3, 1)

    def fine_tune(self, layers):
        """Choose what is trained.

        Args:
            layers (str): none; top (layer2 to layer4, which the original fine-tunes); or all (for random weights).
        """
        self.frozen = {"none": 8, "top": 5, "all": 0}[layers]  # how many of conv1, bn1, relu, maxpool, layer1 ... 4
        for number, layer in enumerate(self.resnet):
            layer.requires_grad_(number >= self.frozen)

    def train(self, mode=True):
        super().train(mode)
        for layer in self.resnet[:self.frozen]:
            layer.eval()
        return self

    def folded(self, dtype=torch.float32):
        """The same function for an encoder that is not trained, faster: batch norms folded into the convolutions.

        Args:
            dtype (torch.dtype): float32; or bfloat16, which gives a grid of that type.
        Returns:
            Encoder, in eval mode; its state dict has other names. The numbers are the same up to rounding.
        """
        encoder = copy.deepcopy(self).eval()
        fold_batch_norms(encoder.resnet)
        conv1, _, _, maxpool, *layers = encoder.resnet
        blocks = [fused(block) for layer in layers for block in layer]
        encoder.resnet = nn.Sequential(FusedBlock([conv1]), maxpool, *blocks)
        encoder.resnet.requires_grad_(False).to(dtype, memory_format=torch.channels_last)
        return encoder


def fold_batch_norms(module):
    """Let each convolution do the work of the batch norm after it, which in eval mode is linear too. In place."""
    previous = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, previous, fuse_conv_bn_eval(getattr(module, previous), child))
            setattr(module, name, nn.Identity())
        else:
            fold_batch_norms(child)
        previous = name


class FusedBlock(nn.Module):
    """Convolutions in a row, each with its relu; the input, or `shortcut` of it, is added before the last relu.

    On NVIDIA's GPUs from Ampere on a convolution, the addition and the relu are one kernel of cuDNN's.

    Args:
        convolutions (list of Conv2d). shortcut (Module or None: nothing is added).
    """

    def __init__(self, convolutions, shortcut=None):
        super().__init__()
        self.convolutions, self.shortcut = nn.ModuleList(convolutions), shortcut

    def forward(self, x):
        added = None if self.shortcut is None else self.shortcut(x)
        for convolution in self.convolutions[:-1]:
            x = convolve(convolution, x)
        return convolve(self.convolutions[-1], x, added)


def fused(block):
    """torchvision's BasicBlock or Bottleneck, its batch norms folded, as a FusedBlock."""
    convolutions = [module for name, module in block.named_children() if name.startswith("conv")]
    return FusedBlock(convolutions, nn.Identity() if block.downsample is None else block.downsample)


def convolve(convolution, x, added=None):
    """relu(convolution(x) + added). Args: convolution (Conv2d). x: (N, C, h, w). added: of the result's shape."""
    if not (x.is_cuda and torch.version.cuda and torch.cuda.get_device_capability(x.device) >= (8, 0)):
        x = convolution(x)
        return (x if added is None else x.add_(added)).relu_()
    arguments = convolution.bias, convolution.stride, convolution.padding, convolution.dilation, convolution.groups
    if added is None:
        return torch.cudnn_convolution_relu(x, convolution.weight, *arguments)
    return torch.cudnn_convolution_add_relu(x, convolution.weight, added, 1.0, *arguments)


def load_resnet(name, weights):
    """torchvision's ResNet with ImageNet weights (V1, the original's), random ones, or those of a file."""
    if weights == "none":
        return torchvision.models.get_model(name, weights=None)
    if weights == "imagenet":
        imagenet = torchvision.models.get_model_weights(name).IMAGENET1K_V1
        try:
            return torchvision.models.get_model(name, weights=imagenet)
        except (URLError, OSError, RuntimeError) as error:
            raise UserError(f"the ImageNet weights of {name} cannot be downloaded ({error}): fetch {imagenet.url} "
                            f"elsewhere and put it into {torch.hub.get_dir()}/checkpoints/, or name a state dict with "
                            f"--encoder_weights PATH, or train from random weights with --encoder_weights none"
                            ) from None
    resnet = torchvision.models.get_model(name, weights=None)
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        state = {"fc.weight": resnet.fc.weight, "fc.bias": resnet.fc.bias, **state}
        resnet.load_state_dict(state)
        if not all(tensor.isfinite().all() for tensor in resnet.state_dict().values()):
            raise ValueError("some of its numbers are not finite")
    except Exception as error:  # torch.load raises whatever a broken file leads it to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--encoder_weights {weights} is not a state dict of torchvision's {name} ({reason})") from None
    return resnet


class Attention(nn.Module):
    """Soft attention (section 4.2): an energy for every pixel, a softmax over the pixels, their weighted mean.

    Args:
        encoder_dim (int): D. decoder_dim (int): H. attention_dim (int): A.
    """

    def __init__(self, encoder_dim, decoder_dim, attention_dim):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)

    def forward(self, pixels, query, captions):
        """
        Args:
            pixels (Pixels): of B pictures.
            query: decoder_att(h) of n captions, (n, A).
            captions (Open): which these are.
        Returns:
            context z, (n, D), Eq. 13 before its gate; alpha (n, P), which sums to 1.
        """
        places, A = len(pixels.keys) * captions.K, query.shape[1]
        query = query.new_zeros(places, A).index_copy(0, captions.place, query).view(-1, captions.K, A)
        energy = Energy.apply(pixels.keys, query, self.full_att.weight[0])  # Eq. 4
        alpha = F.softmax(energy + self.full_att.bias, dim=2)  # Eq. 5
        context = (alpha @ pixels.pool) @ pixels.grid  # (B, K, P) (P, G) (B, G, D): Eq. 13, sum of alpha times a
        return context.flatten(0, 1)[captions.place], alpha.flatten(0, 1)[captions.place]


class Energy(torch.autograd.Function):
    """Eq. 4, e = f_att(a, h) = weight . relu(key of a + query of h), without holding its hidden layer (B, K, P, A).

    The backward pass makes the layer again. keys (B, P, A), query (B, K, A), weight (A,) -> energy (B, K, P).
    """

    @staticmethod
    def forward(ctx, keys, query, weight):
        ctx.save_for_backward(keys, query, weight)
        return without_hidden_layer(energy, keys, query, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return without_hidden_layer(energy_gradient, *ctx.saved_tensors, grad)


def energy(keys, query, weight):
    hidden = torch.relu(keys.unsqueeze(1) + query.unsqueeze(2))
    return (hidden * weight).sum(dim=3)


def energy_gradient(keys, query, weight, grad):
    before = keys.unsqueeze(1) + query.unsqueeze(2)
    grad = grad.unsqueeze(3)
    on_hidden = torch.where(before > 0, grad, 0)
    return ((on_hidden.sum(dim=1) * weight).to(keys), (on_hidden.sum(dim=2) * weight).to(query),
            (grad * torch.relu(before)).sum(dim=(0, 1, 2)).to(weight))


compiled = {}  # of the two above, or what stands in for it


def without_hidden_layer(function, keys, query, *others):
    """Run energy or its gradient; a large one on a CPU compiled, so that the hidden layer stays in the registers."""
    with torch.autocast(keys.device.type, enabled=False):
        if keys.device.type != "cpu" or keys.numel() * query.shape[1] < LARGE:
            return function(keys, query, *others)
        if function not in compiled:
            compiled[function] = torch.compile(function, dynamic=True)
        try:
            return compiled[function](keys, query, *others)
        except Exception as error:  # whatever a machine without a C++ compiler leads it to
            reason = str(error).partition("\n")[0]
            warnings.warn(f"torch.compile does not work here ({reason:.200}): without it, and the C++ compiler that it "
                          f"needs, attention on a CPU takes several times as long", stacklevel=2)
            compiled[function] = function
            return function(keys, query, *others)


class Pixels(NamedTuple):
    """What the decoder sees of B pictures; the annotation vectors of the paper are a = pool @ grid, (B, P, D)."""

    grid: torch.Tensor  # (B, G, D)
    pool: torch.Tensor  # (P, G), every row sums to 1
    keys: torch.Tensor  # encoder_att(a), (B, P, A)


class Open(NamedTuple):
    """Which captions go on at a step."""

    place: torch.Tensor  # int64 (n,): picture * K + place among the picture's captions
    K: int


@functools.cache
def pool_matrix(height, width, size, device="cpu"):
    """Adaptive average pooling from height x width cells to size x size as a (size^2, height * width) matrix."""
    rows = F.adaptive_avg_pool1d(torch.eye(height), size).T  # (size, height)
    columns = F.adaptive_avg_pool1d(torch.eye(width), size).T
    return torch.kron(rows, columns).contiguous().to(device)


def pixel_positions(image_size, encoded_image_size):
    """Where the attention's pixels lie in the picture.

    A ResNet halves the picture five times, each time with output i centred on input 2i. So cell i of its grid is
    centred on pixel 32 i: half a cell further up and left than a map stretched over the whole picture would show it.
    A pixel of the attention lies in the middle of the cells that pooling makes it of, and these are not evenly spaced.

    Args:
        image_size (int): S, side of the picture. encoded_image_size (int): side of the square of P pixels.
    Returns:
        float array (encoded_image_size,): centres as fractions of the side, the same for rows and columns, ascending;
        pixels made of the same cells lie at the same place.
    """
    cells = torch.arange(math.ceil(image_size / 32), dtype=torch.float64)
    in_cells = F.adaptive_avg_pool1d(cells[None], encoded_image_size)[0].numpy()
    return (32 * in_cells + 0.5) / image_size


class DecoderWithAttention(nn.Module):
    """The LSTM that writes a word a step, looking at the picture before each (section 3.1.2).

    Args:
        attention_dim (int): A. embed_dim (int): E. decoder_dim (int): H. vocab_size (int): V. encoder_dim (int): D.
        dropout (float): on h before fc. encoded_image_size (int): side of the square of P pixels.
    """

    def __init__(self, attention_dim, embed_dim, decoder_dim, vocab_size, encoder_dim=2048, dropout=0.5,
                 encoded_image_size=14):
        super().__init__()
        self.embed_dim, self.encoded_image_size = embed_dim, encoded_image_size
        self.attention = Attention(encoder_dim, decoder_dim, attention_dim)
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.decode_step = nn.LSTMCell(embed_dim + encoder_dim, decoder_dim)
        self.init_h = nn.Linear(encoder_dim, decoder_dim)
        self.init_c = nn.Linear(encoder_dim, decoder_dim)
        self.f_beta = nn.Linear(decoder_dim, encoder_dim)
        self.fc = nn.Linear(decoder_dim, vocab_size)
        self.embedding.weight.data.uniform_(-0.1, 0.1)
        self.fc.weight.data.uniform_(-0.1, 0.1)
        self.fc.bias.data.zero_()

    def look(self, grid):
        """Everything about the pictures that no step changes. Args: grid (B, h, w, D). Returns: Pixels."""
        pool = pool_matrix(*grid.shape[1:3], self.encoded_image_size, grid.device)
        grid = grid.flatten(1, 2)
        attention = self.attention.encoder_att
        # The rows of pool sum to 1, so the bias may be added after pooling.
        return Pixels(grid, pool, pool @ F.linear(grid, attention.weight) + attention.bias)

    def init_hidden_state(self, pixels):
        """h_0 and c_0 from the mean annotation vector (section 3.1.2). Returns: two of (B, H)."""
        mean = (pixels.pool.mean(dim=0, keepdim=True) @ pixels.grid).squeeze(1)  # (B, D)
        return self.init_h(mean), self.init_c(mean)

    def word_input(self, words):
        """The embedded words' part of the LSTM's four gates. Args: words (...) int. Returns: (..., 4H)."""
        return F.linear(self.embedding(words), self.decode_step.weight_ih[:, :self.embed_dim],
                        self.decode_step.bias_ih)

    def step_weights(self):
        """What is multiplied at every step: the three products with h as one, and that with the context.

        Returns:
            weight (A + D + 4H, H) and bias (A + D + 4H,) of h, weight (4H, D) of the context.
        """
        parts = self.attention.decoder_att, self.f_beta
        return (torch.cat([*(part.weight for part in parts), self.decode_step.weight_hh]),
                torch.cat([*(part.bias for part in parts), self.decode_step.bias_hh]),
                self.decode_step.weight_ih[:, self.embed_dim:])

    def step(self, pixels, captions, weights, word_input, h, c):
        """One time step of n captions.

        Args:
            pixels (Pixels): of B pictures. captions (Open): which captions of theirs.
            weights: as of step_weights; the bias may be one for each caption. word_input: (n, 4H). h, c: (n, H).
        Returns:
            h, c: (n, H); alpha: (n, P); context: (n, D), after its gate.
        """
        if is_fused(pixels) and not torch.is_grad_enabled():
            out, lengths = kernels.empty_steps(len(h), *pixels, word_input), captions.place.new_ones(len(h))
            kernels.step(*pixels, self.attention.full_att.weight[0], weights, word_input, h, c, lengths, 0, out)
            return out.h, out.c, out.alpha, out.context
        h_weight, h_bias, context_weight = weights
        a_dim, d_dim = self.attention.decoder_att.out_features, self.f_beta.out_features
        query, beta, gates = torch.addmm(h_bias, h, h_weight.T).split([a_dim, d_dim, 4 * h.shape[1]], dim=1)
        context, alpha = self.attention(pixels, query, captions)
        context = torch.sigmoid(beta) * context  # section 4.2.1: z = beta * sum of alpha a, beta = sigmoid(f_beta(h))
        gates = torch.addmm(gates + word_input, context, context_weight.T)
        i, f, g, o = gates.chunk(4, dim=1)  # Eq. 1; PyTorch's order, in which g is the input modulator
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)  # Eq. 2
        h = torch.sigmoid(o) * torch.tanh(c)  # Eq. 3
        return h, c, alpha, context

    def forward(self, grid, captions, caption_lengths):
        """Teacher forcing: at every step the true word before goes in.

        Args:
            grid: (B, h, w, D), as the encoder gives it.
            captions: int64 (B, K, T + 1), <start> first. caption_lengths: int64 (B, K), on the CPU, as the loop's sizes
                are taken from it; 0 where there is no caption.
        Returns:
            scores (M, V) and targets (M,) of the M real tokens, <end> among them; alphas (B, K, T, P), 0 after a
            caption's end.
        """
        T, lengths = captions.shape[2] - 1, (caption_lengths - 1).clamp(min=0)
        token = (torch.arange(T) < lengths.unsqueeze(2)).flatten().nonzero().squeeze(1)  # (M,), which of the (B, K, T)
        token = to_device(token, grid.device)
        pixels = self.look(grid)
        if is_fused(pixels):
            states, alphas = self.fused_time_loop(pixels, captions[:, :, :-1], lengths, token)
        else:
            states, alphas = self.time_loop(pixels, captions[:, :, :-1], lengths)
        return self.fc(self.dropout(states)), captions[:, :, 1:].flatten()[token], alphas

    def time_loop(self, pixels, words, lengths):
        """All steps of all captions; those that have ended drop out.

        Args:
            pixels (Pixels): of B pictures. words: int64 (B, K, T), the true word before each. lengths: int64 (B, K), on
                the CPU: a caption's steps.
        Returns:
            h after every real step, (M, H); alphas (B, K, T, P), 0 after a caption's end.
        """
        (B, K, T), device = words.shape, words.device
        order = lengths.flatten().argsort(descending=True, stable=True)[:int((lengths > 0).sum())]  # the N captions
        picture = order // K
        place = picture * K + (picture.unsqueeze(1) == picture).tril(-1).sum(dim=1)
        real = torch.arange(T).unsqueeze(1) < lengths.flatten()[order]  # (T, N): the first sizes[t] are open at step t
        sizes, (step, caption) = real.sum(dim=1).tolist(), real.nonzero(as_tuple=True)
        token = order[caption] * T + step  # in the loop's order
        back = token.argsort()  # to the captions' order
        picture, place, token, back = (to_device(x, device) for x in (picture, place, token, back))

        h, c = (state[picture] for state in self.init_hidden_state(pixels))
        word_input = self.word_input(words.flatten()[token])  # (M, 4H), in autocast's type where that is on
        h_weight, h_bias, context_weight = (x.to(word_input.dtype) for x in self.step_weights())
        hs, contexts, states, alphas = [], [], [], []
        biases = LateGradient.apply(h_bias.expand(len(word_input), -1), h_weight, hs).split(sizes)
        word_inputs = LateGradient.apply(word_input, context_weight, contexts).split(sizes)
        h_weight, context_weight = h_weight.detach(), context_weight.detach().contiguous()
        for n, bias, word_input in zip(sizes, biases, word_inputs):
            hs.append(h[:n].detach())
            h, c, alpha, context = self.step(pixels, Open(place[:n], K), (h_weight, bias, context_weight),
                                             word_input, h[:n], c[:n])
            contexts.append(context.detach())
            states.append(h)
            alphas.append(alpha)
        alphas = torch.cat(alphas)
        alphas = alphas.new_zeros(B * K * T, alphas.shape[1]).index_copy(0, token, alphas)
        return torch.cat(states)[back], alphas.unflatten(0, (B, K, T))

    def fused_time_loop(self, pixels, words, lengths, token):
        """The same in kernels.py; token is where words are."""
        B, K, T = words.shape
        h, c = (state.repeat_interleave(K, dim=0) for state in self.init_hidden_state(pixels))
        word_input = self.word_input(words.flatten(0, 1).T)  # (T, N, 4H)
        full_att = self.attention.full_att
        states, alphas = kernels.TimeLoop.apply(
            *pixels, full_att.weight[0], full_att.bias, h, c, word_input, *self.step_weights(),
            to_device(lengths.flatten(), words.device), torch.is_grad_enabled())
        return states.transpose(0, 1).flatten(0, 1)[token], alphas.transpose(0, 1).unflatten(0, (B, K))


def to_device(tensor, device):
    """A tensor on a device. CUDA copies it while Python goes on; Apple's mps would read what may be freed by then."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def is_fused(pixels):
    """Whether the time loop is left to kernels.py: on a GPU, where Triton is."""
    return kernels is not None and kernels.are_usable(pixels.grid, pixels.pool)


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


def caption_loss(scores, targets, alphas, caption_lengths):
    """Both terms of Eq. 14, as sums, so that the parts of a batch can be added up exactly.

    Args:
        scores, targets, alphas: as DecoderWithAttention.forward gives them. caption_lengths: (B, K).
    Returns:
        cross entropy, summed over the real tokens; (1 - sum over time of alpha)^2, averaged over the pixels (so that
        its weight does not depend on their number) and summed over the real captions.
    """
    coverage = ((1 - alphas.sum(dim=2)) ** 2).mean(dim=2)  # (B, K)
    return F.cross_entropy(scores, targets, reduction="sum"), (coverage * (caption_lengths > 0).to(coverage)).sum()


class Captions(NamedTuple):
    """What beam search found for B pictures."""

    words: torch.Tensor  # int64 (B, T), from the first word on; <pad> after the end
    scores: torch.Tensor  # (B,), sum of the words' log-probabilities
    ended: torch.Tensor  # bool (B,): whether the caption reached <end>
    alphas: torch.Tensor  # (B, T, P), the attention at each word


@torch.no_grad()
def beam_search(decoder, grid, beam_size, max_len, word_map):
    """The most probable caption of each picture, by beam search over all pictures at once.

    As in the original a beam that ends leaves the search, the others go on with one beam less, and the best that
    ended wins by its plain sum of log-probabilities. Scores only fall, so a picture is finished as soon as no open
    beam is better than its best ended one. Of equal scores the first counts: the lower beam, then the lower word.

    Args:
        decoder (DecoderWithAttention), in eval mode. grid: (B, h, w, D). beam_size (int): 1 is greedy.
        max_len (int): there are T = max_len + 1 steps, so that so many words and <end> fit. word_map (dict).
    Returns:
        Captions
    """
    B, K, V, T = len(grid), beam_size, len(word_map), max_len + 1
    pixels, weights = decoder.look(grid), decoder.step_weights()
    h, c = (state.unsqueeze(1).expand(-1, K, -1) for state in decoder.init_hidden_state(pixels))  # (B, K, H)
    never = torch.tensor([word_map[PAD], word_map[START], word_map[UNK]], device=grid.device)
    word = torch.full((B, K), word_map[START], device=grid.device)
    score = grid.new_full((B, K), -torch.inf)
    score[:, 0] = 0  # all beams begin alike, so one of them is enough
    seats = torch.full((B,), K, device=grid.device)  # beams that have not ended
    todo = torch.arange(B, device=grid.device)  # pictures not finished

    words, parents = (torch.zeros(B, T, K, dtype=torch.long, device=grid.device) for _ in range(2))
    alphas = grid.new_zeros(B, T, K, pixels.pool.shape[0])
    # Of each picture: the best beam's score, whether it ended, at which step and as which of the K.
    best = score.new_full((B,), -torch.inf)
    ended = torch.zeros(B, dtype=torch.bool, device=grid.device)
    last, beam = torch.zeros_like(todo), torch.zeros_like(todo)

    for t in range(T):
        beams = Open(torch.arange(len(todo) * K, device=grid.device), K)
        h, c, alpha, _ = decoder.step(pixels, beams, weights, decoder.word_input(word.flatten()), h.flatten(0, 1),
                                      c.flatten(0, 1))
        h, c, alpha = (x.unflatten(0, (-1, K)) for x in (h, c, alpha))
        log_p = F.log_softmax(decoder.fc(h), dim=2).index_fill_(2, never, -torch.inf)  # (b, K, V)
        score, index = first_largest((score.unsqueeze(2) + log_p).flatten(1), K)  # (b, K)
        parent, word = index // V, index % V
        words[todo, t], parents[todo, t], alphas[todo, t] = word, parent, alpha

        taken = torch.arange(K, device=grid.device) < seats.unsqueeze(1)
        ends = taken & (word == word_map[END]) & score.isfinite()
        seats = seats - ends.sum(dim=1)
        top, which = score.masked_fill(~ends, -torch.inf).max(dim=1)
        better = top > best[todo]
        now = todo[better]
        best[now], ended[now], last[now], beam[now] = top[better], True, t, which[better]

        score = score.masked_fill(ends | ~taken, -torch.inf)
        top, which = score.max(dim=1)
        open_ = (top > best[todo]) & (seats > 0)
        if t == T - 1:
            unfinished = open_ & ~ended[todo]
            now = todo[unfinished]
            best[now], last[now], beam[now] = top[unfinished], t, which[unfinished]
        elif not open_.all():
            todo, seats = todo[open_], seats[open_]
            pixels = Pixels(pixels.grid[open_], pixels.pool, pixels.keys[open_])
            h, c, word, score, parent = h[open_], c[open_], word[open_], score[open_], parent[open_]
        if not len(todo):
            break
        parent = parent.unsqueeze(2).expand_as(h)
        h, c = h.gather(1, parent), c.gather(1, parent)

    # Back from each winner's last word to its first. The attention of a word was worked out by its parent beam.
    rows = torch.arange(B, device=grid.device)
    out = torch.full((B, T), word_map[PAD], device=grid.device)
    out_alphas = grid.new_zeros(B, T, pixels.pool.shape[0])
    for t in reversed(range(T)):
        on = t <= last
        out[on, t] = words[rows[on], t, beam[on]]
        beam = torch.where(on, parents[rows, t, beam], beam)
        out_alphas[on, t] = alphas[rows[on], t, beam[on]]
    return Captions(out, best, ended, out_alphas)


def first_largest(values, k):
    """The k largest of each row, largest first; of equal ones the first. torch.topk promises no order among equals.

    Args:
        values: (n, m), k <= m.
    Returns:
        values (n, k), indices (n, k).
    """
    top, index = values.topk(min(k + 1, values.shape[1]), dim=1)
    if (top[:, 1:] == top[:, :-1]).any():
        top, index = values.sort(dim=1, descending=True, stable=True)
    return top[:, :k], index[:, :k]


def build_models(config, vocab_size, encoder_weights=None):
    """The two halves of the model.

    Args:
        config (Config). vocab_size (int): V.
        encoder_weights (str): instead of the config's; "none" where a checkpoint brings them.
    Returns:
        Encoder, DecoderWithAttention
    """
    weights = encoder_weights or config.encoder_weights
    encoder = Encoder(config.encoder, weights)
    decoder = DecoderWithAttention(config.attention_dim, config.emb_dim, config.decoder_dim, vocab_size, encoder.dim,
                                   config.dropout, config.encoded_image_size)
    if config.fine_tune_encoder:
        encoder.fine_tune("all" if config.encoder_weights == "none" else "top")
    return encoder, decoder
