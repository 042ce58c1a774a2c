"""The naive implementation: the paper's equations, one example per caption, nothing shared and nothing rearranged.

Every caption encodes its picture again, all of the attention is computed at every time step, and beam search takes one
picture at a time. models.py must equal it in loss, gradients and captions, and speed is measured against it. Parameters
have the same names, so one state dict serves both.
"""
import torch
import torch.nn.functional as F
import torchvision
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from torch import nn

from datasets import END, PAD, START, UNK
from scores import join_words


class Encoder(nn.Module):
    """A ResNet without its last two layers, pooled to 14x14; images uint8 (N, S, S, 3) -> (N, 14, 14, D)."""

    def __init__(self, name, encoded_image_size=14):
        super().__init__()
        self.resnet = nn.Sequential(*list(torchvision.models.get_model(name, weights=None).children())[:-2])
        self.adaptive_pool = nn.AdaptiveAvgPool2d(encoded_image_size)

    def forward(self, images):
        x = torchvision.transforms.functional.normalize(images.permute(0, 3, 1, 2).float() / 255,
                                                        (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        return self.adaptive_pool(self.resnet(x)).permute(0, 2, 3, 1)


class Attention(nn.Module):
    """Section 4.2; a (N, P, D), h (N, H) -> context (N, D), alpha (N, P)."""

    def __init__(self, encoder_dim, decoder_dim, attention_dim):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)

    def forward(self, a, h):
        e = self.full_att(torch.relu(self.encoder_att(a) + self.decoder_att(h).unsqueeze(1))).squeeze(2)  # Eq. 4
        alpha = torch.softmax(e, dim=1)  # Eq. 5
        return (alpha.unsqueeze(2) * a).sum(dim=1), alpha  # Eq. 13


class DecoderWithAttention(nn.Module):
    """Sections 3.1.2 and 4.2.1; one example per caption."""

    def __init__(self, attention_dim, embed_dim, decoder_dim, vocab_size, encoder_dim=2048, dropout=0.5):
        super().__init__()
        self.attention = Attention(encoder_dim, decoder_dim, attention_dim)
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.decode_step = nn.LSTMCell(embed_dim + encoder_dim, decoder_dim)
        self.init_h = nn.Linear(encoder_dim, decoder_dim)
        self.init_c = nn.Linear(encoder_dim, decoder_dim)
        self.f_beta = nn.Linear(decoder_dim, encoder_dim)
        self.fc = nn.Linear(decoder_dim, vocab_size)

    def start(self, encoder_out):
        """encoder_out (N, s, s, D) -> a (N, P, D), h (N, H), c (N, H)."""
        a = encoder_out.flatten(1, 2)
        return a, self.init_h(a.mean(dim=1)), self.init_c(a.mean(dim=1))

    def step(self, a, words, h, c):
        """One time step: words int (N,) -> h, c (N, H), alpha (N, P)."""
        context, alpha = self.attention(a, h)
        context = torch.sigmoid(self.f_beta(h)) * context
        h, c = self.decode_step(torch.cat([self.embedding(words), context], dim=1), (h, c))
        return h, c, alpha

    def forward(self, encoder_out, captions, lengths):
        """Teacher forcing of N captions, sorted by length, so that those that have ended drop out of later steps.

        encoder_out (N, s, s, D), captions int64 (N, L), lengths int64 (N,) with <start> and <end> ->
        scores (N, T, V), alphas (N, T, P), both 0 after a caption's end.
        """
        lengths, order = (lengths - 1).sort(descending=True)
        a, h, c = self.start(encoder_out[order])
        captions, T = captions[order], int(lengths[0])
        scores = a.new_zeros(len(a), T, self.fc.out_features)
        alphas = a.new_zeros(len(a), T, a.shape[1])
        for t in range(T):
            n = int((lengths > t).sum())
            h, c, alpha = self.step(a[:n], captions[:n, t], h[:n], c[:n])
            scores[:n, t] = self.fc(self.dropout(h))
            alphas[:n, t] = alpha
        back = order.argsort()
        return scores[back], alphas[back]


def caption_loss(scores, alphas, captions, lengths, alpha_c):
    """Eq. 14: mean cross entropy of the real tokens + alpha_c * mean of (1 - sum over time of alpha)^2."""
    real = torch.arange(scores.shape[1]) < (lengths - 1).unsqueeze(1).cpu()
    targets = captions[:, 1:scores.shape[1] + 1]
    cross_entropy = F.cross_entropy(scores[real], targets[real])
    return cross_entropy + alpha_c * ((1 - alphas.sum(dim=1)) ** 2).mean()


@torch.no_grad()
def beam_search(decoder, encoder_out, beam_size, max_len, word_map, length_penalty=0.0):
    """The best caption of one picture: encoder_out (1, s, s, D) -> ids, score, ended, alphas (len(ids), P)."""
    a, h, c = decoder.start(encoder_out)
    beams = [([], 0.0, h, c, [])]  # ids, score, state, alphas
    finished = []
    for _ in range(max_len + 1):
        candidates = []
        for ids, score, h, c, alphas in beams:
            word = torch.tensor([ids[-1] if ids else word_map[START]], device=a.device)
            h, c, alpha = decoder.step(a, word, h, c)
            log_p = torch.log_softmax(decoder.fc(h), dim=1)[0]
            log_p[[word_map[PAD], word_map[START], word_map[UNK]]] = -torch.inf
            total = score + log_p
            best, words = total.sort(descending=True, stable=True)
            candidates += [(ids + [int(word)], value, h, c, alphas + [alpha[0]])
                           for value, word in zip(best[:beam_size], words[:beam_size]) if value > -torch.inf]
        # sorted() keeps the order of equals: the lower beam first, and within it the lower word.
        chosen = sorted(candidates, key=lambda beam: -beam[1])[:beam_size - len(finished)]
        finished += [beam for beam in chosen if beam[0][-1] == word_map[END]]
        beams = [beam for beam in chosen if beam[0][-1] != word_map[END]]
        if not beams:
            break
    ids, score, _, _, alphas = max(finished or beams, key=lambda beam: beam[1] / len(beam[0]) ** length_penalty)
    return ids, float(score), bool(finished), torch.stack(alphas)


@torch.no_grad()
def sample(decoder, encoder_out, draws, word_map):
    """A caption drawn word by word: encoder_out (1, s, s, D), draws a number in [0, 1) per step -> ids."""
    a, h, c = decoder.start(encoder_out)
    ids = []
    for draw in draws:
        word = torch.tensor([ids[-1] if ids else word_map[START]], device=a.device)
        h, c, _ = decoder.step(a, word, h, c)
        p = policy(decoder.fc(h), word_map).exp()[0].cumsum(dim=0)
        ids.append(int(torch.searchsorted(p, draw * p[-1], right=True)))
        if ids[-1] == word_map[END]:
            break
    return ids


def policy(scores, word_map):
    """Log-probabilities of the words of a caption. (N, V) -> (N, V)."""
    scores = scores.clone()
    scores[:, [word_map[PAD], word_map[START], word_map[UNK]]] = -torch.inf
    return torch.log_softmax(scores, dim=1)


def rewards(samples, references):
    """pycocoevalcap's CIDEr-D of the K samples of each picture; lists of ids, 0 is no word -> (pictures, K)."""
    human = {i: [" ".join(str(word) for word in ids if word) for ids in captions]
             for i, captions in enumerate(references)}
    K = len(samples) // len(human)
    return torch.stack([torch.from_numpy(Cider().compute_score(human, {
        i: [" ".join(map(str, samples[K * i + k]))] for i in human})[1]) for k in range(K)], dim=1)


def score(hypotheses, references):
    """pycocoevalcap's scores. Args: lists of words; lists of lists of words. Returns: dict: name -> float."""
    human, generated = join_words(hypotheses, references)
    bleu, _ = Bleu(4).compute_score(human, generated, verbose=0)
    return {**{f"BLEU-{n}": value for n, value in enumerate(bleu, 1)},
            "ROUGE-L": Rouge().compute_score(human, generated)[0], "CIDEr": Cider().compute_score(human, generated)[0]}


def self_critical_loss(decoder, encoder_out, samples, rewards, word_map):
    """- sum of log p times advantage over the tokens / their number; the baseline is the mean of the other samples."""
    K, loss = rewards.shape[1], 0.0
    for n, ids in enumerate(samples):
        i, k = divmod(n, K)
        others = [rewards[i, j].item() for j in range(K) if j != k]
        captions = torch.tensor([[word_map[START], *ids]], device=encoder_out.device)
        scores, _ = decoder(encoder_out[i:i + 1], captions, torch.tensor([len(ids) + 1]))
        log_p = policy(scores[0], word_map).gather(1, captions[:, 1:].T).sum()
        loss = loss - (rewards[i, k].item() - sum(others) / len(others)) * log_p
    return loss / sum(map(len, samples))
