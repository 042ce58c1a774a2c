"""The naive implementation: the paper's equations, one example per caption, nothing shared.

Every caption encodes its picture again, all of the attention is computed at every time step, and
beam search takes one picture at a time. models.py must equal it in loss, gradients and captions,
and speed is measured against it. Parameters have the same names, so one state dict serves both.

Symbols as in models.py: N captions, T steps, P pixels, D encoder dim, H decoder dim, V words.
"""
import torch
import torch.nn.functional as F
import torchvision
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from torch import Tensor, nn

from datasets import END, PAD, START, UNK
from scores import join_words


class Encoder(nn.Module):
    """A ResNet without its last two layers, pooled: uint8 (N, S, S, 3) -> (N, s, s, D)."""

    def __init__(self, name: str, encoded_image_size: int = 14):
        super().__init__()
        layers = torchvision.models.get_model(name, weights=None).children()
        self.resnet = nn.Sequential(*list(layers)[:-2])
        self.adaptive_pool = nn.AdaptiveAvgPool2d(encoded_image_size)

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).float() / 255
        x = torchvision.transforms.functional.normalize(
            x, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        return self.adaptive_pool(self.resnet(x)).permute(0, 2, 3, 1)


class Attention(nn.Module):
    """Section 4.2; a (N, P, D), h (N, H) -> context (N, D), alpha (N, P)."""

    def __init__(self, encoder_dim: int, decoder_dim: int, attention_dim: int):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)

    def forward(self, a: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.encoder_att(a) + self.decoder_att(h).unsqueeze(1))
        e = self.full_att(hidden).squeeze(2)  # Eq. 4
        alpha = torch.softmax(e, dim=1)  # Eq. 5
        context = (alpha.unsqueeze(2) * a).sum(dim=1)  # Eq. 13
        return context, alpha


class DecoderWithAttention(nn.Module):
    """Sections 3.1.2 and 4.2.1; one example per caption."""

    def __init__(self, attention_dim: int, embed_dim: int, decoder_dim: int, vocab_size: int,
                 encoder_dim: int = 2048, dropout: float = 0.5):
        super().__init__()
        self.attention = Attention(encoder_dim, decoder_dim, attention_dim)
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.decode_step = nn.LSTMCell(embed_dim + encoder_dim, decoder_dim)
        self.init_h = nn.Linear(encoder_dim, decoder_dim)
        self.init_c = nn.Linear(encoder_dim, decoder_dim)
        self.f_beta = nn.Linear(decoder_dim, encoder_dim)
        self.fc = nn.Linear(decoder_dim, vocab_size)

    def start(self, encoder_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """encoder_out (N, s, s, D) -> a (N, P, D), h (N, H), c (N, H)."""
        a = encoder_out.flatten(1, 2)
        mean = a.mean(dim=1)
        return a, self.init_h(mean), self.init_c(mean)

    def step(self, a: Tensor, words: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One time step: words int (N,) -> h, c (N, H), alpha (N, P)."""
        context, alpha = self.attention(a, h)
        context = torch.sigmoid(self.f_beta(h)) * context
        x = torch.cat([self.embedding(words), context], dim=1)
        h, c = self.decode_step(x, (h, c))
        return h, c, alpha

    def forward(self, encoder_out: Tensor, captions: Tensor,
                lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher forcing of N captions, sorted by length, so that those that have ended drop out
        of later steps.

        encoder_out (N, s, s, D), captions int64 (N, L), lengths int64 (N,) with <start> and <end>
        -> scores (N, T, V), alphas (N, T, P), both 0 after a caption's end.
        """
        steps, order = (lengths - 1).sort(descending=True)
        a, h, c = self.start(encoder_out[order])
        captions = captions[order]
        T = int(steps[0])
        scores = a.new_zeros(len(a), T, self.fc.out_features)
        alphas = a.new_zeros(len(a), T, a.shape[1])
        for t in range(T):
            n = int((steps > t).sum())
            h, c, alpha = self.step(a[:n], captions[:n, t], h[:n], c[:n])
            scores[:n, t] = self.fc(self.dropout(h))
            alphas[:n, t] = alpha
        back = order.argsort()
        return scores[back], alphas[back]


def caption_loss(scores: Tensor, alphas: Tensor, captions: Tensor, lengths: Tensor,
                 alpha_c: float) -> Tensor:
    """Eq. 14: mean cross entropy of the real tokens + alpha_c * mean of (1 - sum of alpha)^2."""
    T = scores.shape[1]
    real = torch.arange(T) < (lengths - 1).unsqueeze(1).cpu()
    targets = captions[:, 1:T + 1]
    cross_entropy = F.cross_entropy(scores[real], targets[real])
    return cross_entropy + alpha_c * ((1 - alphas.sum(dim=1)) ** 2).mean()


@torch.no_grad()
def beam_search(decoder: DecoderWithAttention, encoder_out: Tensor, beam_size: int, max_len: int,
                word_map: dict[str, int], length_penalty: float = 0.0):
    """The best caption of one picture.

    encoder_out (1, s, s, D) -> ids, score, ended, alphas (len(ids), P).
    """
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
            totals, words = (score + log_p).sort(descending=True, stable=True)
            for total, word in zip(totals[:beam_size], words[:beam_size]):
                if total > -torch.inf:
                    candidates.append((ids + [int(word)], total, h, c, alphas + [alpha[0]]))
        # sorted() keeps the order of equals: the lower beam first, and within it the lower word.
        candidates = sorted(candidates, key=lambda beam: -beam[1])
        beams_left = beam_size - len(finished)
        beams = []
        for beam in candidates[:beams_left]:
            has_ended = beam[0][-1] == word_map[END]
            (finished if has_ended else beams).append(beam)
        if not beams:
            break
    best = max(finished or beams, key=lambda beam: beam[1] / len(beam[0]) ** length_penalty)
    ids, score, _, _, alphas = best
    return ids, float(score), bool(finished), torch.stack(alphas)


@torch.no_grad()
def sample(decoder: DecoderWithAttention, encoder_out: Tensor, draws: list[float],
           word_map: dict[str, int]) -> list[int]:
    """The ids of a caption drawn word by word, by a number in [0, 1) per step.

    encoder_out (1, s, s, D).
    """
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


def policy(scores: Tensor, word_map: dict[str, int]) -> Tensor:
    """Log-probabilities of the words of a caption. (N, V) -> (N, V)."""
    scores = scores.clone()
    scores[:, [word_map[PAD], word_map[START], word_map[UNK]]] = -torch.inf
    return torch.log_softmax(scores, dim=1)


def rewards(samples: list[list[int]], references: list[list[list[int]]]) -> Tensor:
    """pycocoevalcap's CIDEr-D of the K samples of each picture, (pictures, K).

    Captions are ids; 0 is no word.
    """
    human = {}
    for i, captions in enumerate(references):
        human[i] = [" ".join(str(word) for word in ids if word) for ids in captions]
    K = len(samples) // len(human)
    columns = []
    for k in range(K):
        generated = {i: [" ".join(map(str, samples[K * i + k]))] for i in human}
        _, scores = Cider().compute_score(human, generated)
        columns.append(torch.from_numpy(scores))
    return torch.stack(columns, dim=1)


def score(hypotheses: list[list[str]], references: list[list[list[str]]]) -> dict[str, float]:
    """pycocoevalcap's scores."""
    human, generated = join_words(hypotheses, references)
    bleu, _ = Bleu(4).compute_score(human, generated, verbose=0)
    found = {f"BLEU-{n}": value for n, value in enumerate(bleu, 1)}
    found["ROUGE-L"], _ = Rouge().compute_score(human, generated)
    found["CIDEr"], _ = Cider().compute_score(human, generated)
    return found


def self_critical_loss(decoder: DecoderWithAttention, encoder_out: Tensor,
                       samples: list[list[int]], rewards: Tensor,
                       word_map: dict[str, int]) -> Tensor:
    """- sum of log p times advantage over the tokens / their number; the baseline is the mean of
    the other samples."""
    K = rewards.shape[1]
    loss = 0.0
    for n, ids in enumerate(samples):
        i, k = divmod(n, K)
        others = [rewards[i, j].item() for j in range(K) if j != k]
        advantage = rewards[i, k].item() - sum(others) / len(others)
        captions = torch.tensor([[word_map[START], *ids]], device=encoder_out.device)
        scores, _ = decoder(encoder_out[i:i + 1], captions, torch.tensor([len(ids) + 1]))
        log_p = policy(scores[0], word_map).gather(1, captions[:, 1:].T).sum()
        loss = loss - advantage * log_p
    return loss / sum(map(len, samples))
