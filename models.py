"""Show, Attend and Tell (Xu et al. 2015, arXiv 1502.03044) with soft attention, in the paper's order.

Symbols: B pictures, K captions per picture, P pixels the attention chooses among (the paper's L), T steps, M real
tokens, D encoder dim, A attention dim, E word embedding dim, H decoder dim, V words. "Eq." and "section" refer to the
paper; parameters have the names of the PyTorch original.

This is the model that runs. fast/ holds the same model rearranged for speed and is compared with this file at every
start: where it gives other numbers, as after an edit here, this file runs as written. `--fast false` turns it off.

Departures from the original:
- The K captions of a picture are decoded side by side, so the encoder and `encoder_att` run once per picture.
- A frozen layer stays in eval mode: its batch norms must not drift.
- Generated captions never contain <pad>, <start> or <unk>, and one that does not end is returned as it stands.
Departures from the paper that the original already made: a ResNet instead of VGG; a gate beta per feature, not one
number; f_init is linear, not an MLP; words are scored by fc(dropout(h)) instead of the deep output of Eq. 7; the terms
of Eq. 14 are means, over the tokens and over captions and pixels.
"""
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from backbones import RESNETS, load_resnet, measure_offset, timm_network


class Encoder(nn.Module):
    """The annotation vectors (section 3.1.1): the feature map of a convolutional network, or of a ViT.

    For a network of one's own change `backbone` alone: it gives the network, and all that the rest depends on.

    Args:
        name (str): of a network that `backbone` knows. weights (str): imagenet, none, or the path of a state dict.
        stride (int): pixels from one annotation vector to the next; 32: of the network's last map, whatever it is.
        image_size (int): S, side of the pictures.
    """

    def __init__(self, name, weights, stride=32, image_size=256):
        super().__init__()
        self.resnet, facts = backbone(name, weights, stride, image_size)
        self.dim, self.stride, self.top, self.image_size = facts["dim"], facts["stride"], facts["top"], image_size
        if "offset" in facts:  # otherwise it is measured
            self.offset = facts["offset"]
        self.register_buffer("mean", torch.tensor(facts["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(facts["std"]).view(3, 1, 1), persistent=False)
        self.fine_tune("none")

    def forward(self, images):
        """Args: images: uint8 (B, S, S, 3), RGB. Returns: float (B, h, w, D); h = w = S / stride, rounded up."""
        x = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std  # (B, 3, S, S)
        return self.resnet(x).permute(0, 2, 3, 1)

    def fine_tune(self, layers):
        """Choose what is trained: none; top, the stages that the original fine-tunes; or all, for random weights."""
        self.layers = layers
        self.requires_grad_(True)
        for module in self.frozen():
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)

    def frozen(self):
        """The modules that are not trained, without the modules in them, which follow."""
        names, modules = zip(*self.resnet.named_modules())
        ends = [end for end, name in enumerate(names, 1) if f"{name}.".startswith(f"{self.top}.")]
        return modules[:dict(none=len(names), top=ends[-1], all=0)[self.layers]]

    def train(self, mode=True):
        super().train(mode)
        for module in self.frozen():
            module.training = False
        return self

    @functools.cached_property
    def offset(self):
        """Cell i of the map is centred on pixel stride * i + offset."""
        return measure_offset(self)


def backbone(name, weights, stride, image_size):
    """The network. Of timm's: see timm_network. Otherwise torchvision's ResNet without its last two layers; where the
    stride is 16 also without layer4, where it is 8 also without layer3.

    Returns:
        nn.Module: float (B, 3, S, S) -> (B, D, h, w); h = w = S / stride, rounded up.
        dict: dim (D); stride; mean, std (of each channel of the input, which is 0 to 255); top (the name of the last
        module that stays as it is in fine-tuning); offset (see Encoder.offset; measured where it is missing).
    Raises:
        UserError: an unknown network; weights that cannot be had, or do not fit.
    """
    if name not in RESNETS:
        return timm_network(name, weights, stride, image_size)
    resnet = load_resnet(name, weights)
    return nn.Sequential(*list(resnet.children())[:{32: 8, 16: 7, 8: 6}[stride]]), dict(
        dim=resnet.inplanes * stride // 32,  # for 32: 512 of resnet18 and 34, otherwise 2048
        stride=stride, offset=0,  # each halving centres output i on input 2i
        mean=[255 * x for x in (0.485, 0.456, 0.406)], std=[255 * x for x in (0.229, 0.224, 0.225)],
        top="4")  # conv1, bn1, relu, maxpool and layer1


class Attention(nn.Module):
    """Soft attention (section 4.2): an energy per pixel, a softmax over the pixels, their weighted mean.

    Args:
        encoder_dim (int): D. decoder_dim (int): H. attention_dim (int): A.
    """

    def __init__(self, encoder_dim, decoder_dim, attention_dim):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)

    def keys(self, a):
        """What attention needs of the pixels at every step, computed once. Args: a (B, P, D). Returns: (B, P, A)."""
        return self.encoder_att(a)

    def forward(self, a, keys, h):
        """
        Args:
            a: annotation vectors, (B, P, D). keys: of these, (B, P, A). h: the LSTM's state, (B, K, H).
        Returns:
            context z, (B, K, D); alpha, float32 (B, K, P), which sums to 1.
        """
        hidden = torch.relu(keys.unsqueeze(1) + self.decoder_att(h).unsqueeze(2))  # (B, K, P, A)
        e = self.full_att(hidden).squeeze(3)  # Eq. 4: e = f_att(a, h)
        alpha = torch.softmax(e.float(), dim=2)  # Eq. 5
        return alpha @ a, alpha  # Eq. 13: z = sum of alpha_i a_i


class DecoderWithAttention(nn.Module):
    """The LSTM that writes a word per step, looking at the picture before each (section 3.1.2).

    Args:
        attention_dim (int): A. embed_dim (int): E. decoder_dim (int): H. vocab_size (int): V. encoder_dim (int): D.
        dropout (float): on h before fc. encoded_image_size (int): side of the square of P pixels.
    """

    def __init__(self, attention_dim, embed_dim, decoder_dim, vocab_size, encoder_dim=2048, dropout=0.5,
                 encoded_image_size=14):
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

    def start(self, grid, K):
        """What is known before the first word.

        Args:
            grid: (B, h, w, D), as the encoder gives it. K (int): captions per picture.
        Returns:
            features: what `step` needs of the pictures, tensors (B, ...); h, c: (B, K, H), equal for all K.
        """
        a = F.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2), self.encoded_image_size)  # (B, D, 14, 14)
        a = a.flatten(2).transpose(1, 2)  # (B, P, D)
        mean = a.mean(dim=1)
        h, c = self.init_h(mean), self.init_c(mean)  # section 3.1.2: f_init of the mean annotation vector
        return (a, self.attention.keys(a)), *(x.unsqueeze(1).expand(-1, K, -1) for x in (h, c))

    def step(self, features, words, h, c):
        """One time step.

        Args:
            features: of `start`. words: the embedded word before, (B, K, E). h, c: (B, K, H).
        Returns:
            h, c: (B, K, H); alpha: (B, K, P).
        """
        z, alpha = self.attention(*features, h)
        z = torch.sigmoid(self.f_beta(h)) * z  # section 4.2.1: z = beta * sum of alpha_i a_i
        x = torch.cat([words, z], dim=2)  # (B, K, E + D)
        h, c = self.decode_step(x.flatten(0, 1), (h.flatten(0, 1), c.flatten(0, 1)))  # Eq. 1-3
        return h.unflatten(0, words.shape[:2]), c.unflatten(0, words.shape[:2]), alpha

    def forward(self, grid, captions, caption_lengths):
        """Teacher forcing: the input of every step is the true word before.

        Args:
            grid: (B, h, w, D), as the encoder gives it.
            captions: int64 (B, K, T + 1), <start> first. caption_lengths: int64 (B, K), on the CPU, <start> and <end>
                counted; 0 where there is no caption.
        Returns:
            scores (M, V) and targets (M,) of the M real tokens, <end> among them; alphas float32 (B, K, T, P), 0 after
            a caption's end.
        """
        B, K, T = captions[:, :, 1:].shape
        features, h, c = self.start(grid, K)
        words = self.embedding(captions[:, :, :-1])  # (B, K, T, E)
        states, alphas = [], []
        for t in range(T):
            h, c, alpha = self.step(features, words[:, :, t], h, c)
            states.append(h)
            alphas.append(alpha)
        real = (torch.arange(T) < caption_lengths.unsqueeze(2) - 1).to(grid.device)  # (B, K, T)
        states = torch.stack(states, dim=2)[real]  # (M, H)
        alphas = torch.stack(alphas, dim=2) * real.unsqueeze(3)
        return self.fc(self.dropout(states)), captions[:, :, 1:][real], alphas


class Term(NamedTuple):
    """A number that is summed over batches, reported as a mean and, unless its weight is 0, part of the loss."""

    sum: torch.Tensor  # 0-dim, over the batch
    per: str  # what it is a mean over: tokens or captions
    weight: float = 0.0


def caption_loss(scores, targets, alphas, caption_lengths, config):
    """The terms of Eq. 14. A term added here reaches the loss, the screen, the log and the checkpoint by its name.

    Args:
        scores, targets, alphas: as DecoderWithAttention.forward gives them. caption_lengths: (B, K).
        config (Config): alpha_c, lambda of Eq. 14.
    Returns:
        dict: name -> Term. The loss is the sum of weight * sum / number of what it is a mean over.
    """
    has_caption = (caption_lengths > 0).to(alphas.device)  # (B, K)
    coverage = ((1 - alphas.sum(dim=2)) ** 2).mean(dim=2)  # (B, K); over the pixels, so that P does not weigh in
    return dict(
        cross_entropy=Term(F.cross_entropy(scores, targets, reduction="sum"), "tokens", 1.0),  # -log p(y | a)
        coverage=Term((coverage * has_caption).sum(), "captions", config.alpha_c),
        top5=Term(top5_hits(scores.detach(), targets), "tokens"))


def top5_hits(scores, targets):
    """How many targets are among the five best-scored words; of equal scores each is as likely to be among them.

    Args: scores (N, V), targets int64 (N,). Returns: 0-dim float; NaN is no hit.
    """
    target = scores.gather(1, targets[:, None])
    places, equal = 5 - (scores > target).sum(dim=1), (scores == target).sum(dim=1)
    return (torch.minimum(places.clamp(min=0), equal) / equal.clamp(min=1)).sum()


def pixel_positions(encoder, image_size, encoded_image_size):
    """Where the attention's pixels lie in the picture: each at the centre of the cells that are pooled into it.

    Args:
        encoder (Encoder): its stride and offset. image_size (int): S, side of the picture.
        encoded_image_size (int): side of the square of P pixels.
    Returns:
        float array (encoded_image_size,): centres as fractions of the side, the same for rows and columns.
    """
    cells = torch.arange(-(-image_size // encoder.stride), dtype=torch.float64)
    pixels = F.adaptive_avg_pool1d(encoder.stride * cells[None] + encoder.offset, encoded_image_size)[0]
    return ((pixels + 0.5) / image_size).numpy()


def build_models(config, vocab_size, encoder_weights=None):
    """The two halves of the model.

    Args:
        config (Config). vocab_size (int): V.
        encoder_weights (str): instead of the config's; "none" where a checkpoint brings them.
    Returns:
        Encoder, DecoderWithAttention
    """
    encoder = Encoder(config.encoder, encoder_weights or config.encoder_weights, config.encoder_stride,
                      config.image_size)
    decoder = DecoderWithAttention(config.attention_dim, config.emb_dim, config.decoder_dim, vocab_size, encoder.dim,
                                   config.dropout, config.encoded_image_size)
    if config.fine_tune_encoder:
        encoder.fine_tune("all" if config.encoder_weights == "none" else "top")
    return encoder, decoder
