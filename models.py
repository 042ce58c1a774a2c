"""Show, Attend and Tell (Xu et al. 2015, arXiv 1502.03044), soft attention, in the paper's order.

Symbols: B pictures, K captions per picture, P pixels the attention chooses among (the paper's L),
T steps, M real tokens, D encoder dim, A attention dim, E word embedding dim, H decoder dim, V
words. "Eq." and "section" refer to the paper; parameters have the names of the PyTorch original.

This is the model that runs. fast/ holds the same model rearranged for speed, and steps back where
this file was edited or gives other numbers. `--fast false` turns it off.

Departures from the original:
- The K captions of a picture are decoded side by side, so the encoder and `encoder_att` run once
  per picture.
- A frozen layer stays in eval mode: its batch norms must not drift.
- Generated captions never contain <pad>, <start> or <unk>, and one that does not end is returned
  as it stands.
Departures from the paper that the original already made: a ResNet instead of VGG; a gate beta per
feature, not one number; f_init is linear, not an MLP; words are scored by fc(dropout(h)) instead of
the deep output of Eq. 7; the terms of Eq. 14 are means, over the tokens and over captions and
pixels.
"""
import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import RESNETS, load_resnet, measure_offset, timm_network
from config import Config


class Encoder(nn.Module):
    """The annotation vectors (section 3.1.1): the feature map of a convolutional network or a ViT.

    For a network of one's own change `backbone` alone: it gives the network, and all that the rest
    depends on. `name`, `weights`, `stride` and `image_size` are Config's encoder, encoder_weights,
    encoder_stride and image_size.
    """

    def __init__(self, name: str, weights: str, stride: int = 32, image_size: int = 256):
        super().__init__()
        self.resnet, facts = backbone(name, weights, stride, image_size)
        self.dim = facts["dim"]
        self.stride = facts["stride"]
        self.top = facts["top"]
        self.image_size = image_size
        if "offset" in facts:  # otherwise it is measured
            self.offset = facts["offset"]
        mean = torch.tensor(facts["mean"]).view(3, 1, 1)
        std = torch.tensor(facts["std"]).view(3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.fine_tune("none")

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, S, S, 3), RGB -> grid, float (B, h, w, D); h = w = S / stride, rounded up."""
        x = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std  # (B, 3, S, S)
        return self.resnet(x).permute(0, 2, 3, 1)

    def fine_tune(self, layers: str):
        """Choose what is trained: none; top, the stages that the original fine-tunes; or all, for
        random weights."""
        self.layers = layers
        self.requires_grad_(True)
        for module in self.frozen():
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)

    def frozen(self) -> tuple[nn.Module, ...]:
        """The modules that are not trained, without the modules in them, which follow."""
        names, modules = zip(*self.resnet.named_modules())
        if self.layers == "all":
            return ()
        if self.layers == "none":
            return modules
        in_top = [number for number, name in enumerate(names)
                  if f"{name}.".startswith(f"{self.top}.")]
        return modules[:in_top[-1] + 1]

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.frozen():
            module.training = False
        return self

    @functools.cached_property
    def offset(self) -> float:
        """Cell i of the map is centred on pixel stride * i + offset."""
        return measure_offset(self)


def backbone(name: str, weights: str, stride: int, image_size: int) -> tuple[nn.Module, dict]:
    """The encoder's network: of timm's see timm_network, otherwise torchvision's ResNet without its
    last two layers; where the stride is 16 also without layer4, where it is 8 without layer3.

    Returns:
        nn.Module: float (B, 3, S, S) -> (B, D, h, w); h = w = S / stride, rounded up.
        dict: dim (D); stride; mean, std (of each channel of the input, which is 0 to 255); top (the
        name of the last module that stays as it is in fine-tuning); offset (see Encoder.offset;
        measured where it is missing).
    Raises:
        UserError: an unknown network; weights that cannot be had, or do not fit.
    """
    if name not in RESNETS:
        return timm_network(name, weights, stride, image_size)
    resnet = load_resnet(name, weights)
    kept = {32: 8, 16: 7, 8: 6}  # conv1, bn1, relu, maxpool, layer1 to layer4
    layers = list(resnet.children())[:kept[stride]]
    return nn.Sequential(*layers), dict(
        dim=resnet.inplanes * stride // 32,  # for 32: 512 of resnet18 and 34, otherwise 2048
        stride=stride,
        offset=0,  # each halving centres output i on input 2i
        mean=[255 * x for x in (0.485, 0.456, 0.406)],
        std=[255 * x for x in (0.229, 0.224, 0.225)],
        top="4")  # layer1


class Attention(nn.Module):
    """Soft attention (section 4.2): an energy per pixel, a softmax over the pixels, their weighted
    mean."""

    def __init__(self, encoder_dim: int, decoder_dim: int, attention_dim: int):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)

    def keys(self, a: Tensor) -> Tensor:
        """What attention needs of the pixels at every step, computed once: (B, P, D) -> (B, P, A).
        """
        return self.encoder_att(a)

    def forward(self, a: Tensor, keys: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            a: annotation vectors, (B, P, D). keys: of these, (B, P, A).
            h: the LSTM's state, (B, K, H).
        Returns:
            context z, (B, K, D); alpha, float32 (B, K, P), which sums to 1.
        """
        hidden = torch.relu(keys.unsqueeze(1) + self.decoder_att(h).unsqueeze(2))  # (B, K, P, A)
        e = self.full_att(hidden).squeeze(3)  # Eq. 4: e = f_att(a, h)
        alpha = torch.softmax(e.float(), dim=2)  # Eq. 5
        return alpha @ a, alpha  # Eq. 13: z = sum of alpha_i a_i


class DecoderWithAttention(nn.Module):
    """The LSTM that writes a word per step, looking at the picture before each (section 3.1.2).

    The attention chooses among `encoded_image_size` x `encoded_image_size` pixels.
    """

    def __init__(self, attention_dim: int, embed_dim: int, decoder_dim: int, vocab_size: int,
                 encoder_dim: int = 2048, dropout: float = 0.5, encoded_image_size: int = 14):
        super().__init__()
        self.encoded_image_size = encoded_image_size
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

    def start(self, grid: Tensor, K: int):
        """What is known before the first word.

        Args:
            grid: (B, h, w, D), as the encoder gives it.
            K: captions per picture.
        Returns:
            features: what `step` needs of the pictures, tensors (B, ...).
            h, c: (B, K, H), equal for all K.
        """
        a = F.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2), self.encoded_image_size)
        a = a.flatten(2).transpose(1, 2)  # (B, P, D)
        mean = a.mean(dim=1)
        h = self.init_h(mean)  # section 3.1.2: f_init of the mean annotation vector
        c = self.init_c(mean)
        h = h.unsqueeze(1).expand(-1, K, -1)
        c = c.unsqueeze(1).expand(-1, K, -1)
        return (a, self.attention.keys(a)), h, c

    def step(self, features, words: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One time step.

        Args:
            features: of `start`.
            words: the embedded word before, (B, K, E).
            h, c: (B, K, H).
        Returns:
            h, c: (B, K, H); alpha: (B, K, P).
        """
        z, alpha = self.attention(*features, h)
        beta = torch.sigmoid(self.f_beta(h))  # section 4.2.1: z = beta * sum of alpha_i a_i
        x = torch.cat([words, beta * z], dim=2)  # (B, K, E + D)
        state = h.flatten(0, 1), c.flatten(0, 1)
        h, c = self.decode_step(x.flatten(0, 1), state)  # Eq. 1-3
        return h.unflatten(0, words.shape[:2]), c.unflatten(0, words.shape[:2]), alpha

    def forward(self, grid: Tensor, captions: Tensor, caption_lengths: Tensor):
        """Teacher forcing: the input of every step is the true word before.

        Args:
            grid: (B, h, w, D), as the encoder gives it.
            captions: int64 (B, K, T + 1), <start> first.
            caption_lengths: int64 (B, K), on the CPU, <start> and <end> counted; 0 where there is
                no caption.
        Returns:
            scores (M, V) and targets (M,) of the M real tokens, <end> among them; alphas float32
            (B, K, T, P), 0 after a caption's end.
        """
        B, K, T = captions[:, :, 1:].shape
        features, h, c = self.start(grid, K)
        words = self.embedding(captions[:, :, :-1])  # (B, K, T, E)
        states, alphas = [], []
        for t in range(T):
            h, c, alpha = self.step(features, words[:, :, t], h, c)
            states.append(h)
            alphas.append(alpha)

        is_real = torch.arange(T) < caption_lengths.unsqueeze(2) - 1
        is_real = is_real.to(grid.device)  # (B, K, T)
        states = torch.stack(states, dim=2)[is_real]  # (M, H)
        targets = captions[:, :, 1:][is_real]  # (M,)
        alphas = torch.stack(alphas, dim=2) * is_real.unsqueeze(3)
        return self.fc(self.dropout(states)), targets, alphas


class Term(NamedTuple):
    """A number that is summed over batches, reported as a mean and, unless its weight is 0, part of
    the loss."""

    sum: Tensor  # 0-dim, over the batch
    per: str  # what it is a mean over: tokens or captions
    weight: float = 0.0


def caption_loss(scores: Tensor, targets: Tensor, alphas: Tensor, caption_lengths: Tensor,
                 config: Config) -> dict[str, Term]:
    """The terms of Eq. 14; the loss is the sum of weight * sum / number of what it is a mean over.
    A term added here reaches the loss, the screen, the log and the checkpoint by its name.

    scores, targets and alphas are as DecoderWithAttention.forward gives them, caption_lengths is
    (B, K); config.alpha_c is lambda of Eq. 14.
    """
    cross_entropy = F.cross_entropy(scores, targets, reduction="sum")  # -log p(y | a)
    has_caption = (caption_lengths > 0).to(alphas.device)  # (B, K)
    # The mean over the pixels, so that their number does not weigh in.
    coverage = ((1 - alphas.sum(dim=2)) ** 2).mean(dim=2)  # (B, K)
    return dict(
        cross_entropy=Term(cross_entropy, "tokens", 1.0),
        coverage=Term((coverage * has_caption).sum(), "captions", config.alpha_c),
        top5=Term(top5_hits(scores.detach(), targets), "tokens"))


def top5_hits(scores: Tensor, targets: Tensor) -> Tensor:
    """How many targets (N,) are among the five best-scored words of scores (N, V); of equal scores
    each is as likely to be among them. NaN is no hit.

    >>> scores = torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    >>> top5_hits(scores, torch.tensor([4, 4]))  # the fifth, and one of six equal ones
    tensor(1.8333)
    """
    target = scores.gather(1, targets[:, None])
    places = 5 - (scores > target).sum(dim=1)
    equal = (scores == target).sum(dim=1)
    return (torch.minimum(places.clamp(min=0), equal) / equal.clamp(min=1)).sum()


def pixel_positions(encoder: Encoder, image_size: int, encoded_image_size: int) -> np.ndarray:
    """Where the attention's pixels lie in the picture, each at the centre of the cells that are
    pooled into it: (encoded_image_size,), fractions of the side, the same for rows and columns."""
    cells = torch.arange(-(-image_size // encoder.stride), dtype=torch.float64)
    centres = encoder.stride * cells + encoder.offset
    pixels = F.adaptive_avg_pool1d(centres[None], encoded_image_size)[0]
    return ((pixels + 0.5) / image_size).numpy()


def build_models(config: Config, vocab_size: int, encoder_weights: str | None = None
                 ) -> tuple[Encoder, DecoderWithAttention]:
    """The two halves of the model. `encoder_weights` takes the place of the config's; "none" where
    a checkpoint brings them."""
    encoder = Encoder(config.encoder, encoder_weights or config.encoder_weights,
                      config.encoder_stride, config.image_size)
    decoder = DecoderWithAttention(config.attention_dim, config.emb_dim, config.decoder_dim,
                                   vocab_size, encoder.dim, config.dropout,
                                   config.encoded_image_size)
    if config.fine_tune_encoder:
        encoder.fine_tune("all" if config.encoder_weights == "none" else "top")
    return encoder, decoder
