"""Captions out of a model: beam search, and samples of its own distribution.

Symbols as in models.py: B pictures, K captions or beams per picture, T steps, P pixels, H decoder
dim, V words; b are the pictures that are not finished yet.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets import END, PAD, START, UNK, decode_caption, word_list


def generate(decoder, grid: Tensor, word_map: dict[str, int], max_len: int, beam_size: int,
             length_penalty: float = 0.0, n_best: int | None = None) -> list:
    """Caption a batch of pictures with a decoder in eval mode; arguments as of beam_search.

    Returns:
        for each picture a dict: words (list of str); score (the sum of log-probabilities, that of
        <end> included); log_probs (of each word); ended (whether by <end>); alphas (float32 array
        (len(words), s, s), the attention at each word). With n_best a list of such dicts for each
        picture, the best first, fewer where fewer have ended.
    """
    found = beam_search(decoder, grid, beam_size, max_len, word_map, length_penalty, n_best or 1)
    found = Captions(*(field.cpu() for field in found))
    words_by_id = word_list(word_map)
    side = decoder.encoded_image_size

    pictures = []
    for picture in range(len(grid)):
        captions = []
        for place, score in enumerate(found.scores[picture].tolist()):
            if captions and score == -torch.inf:
                break
            words = decode_caption(found.words[picture, place].tolist(), words_by_id)
            log_probs = found.log_probs[picture, place, :len(words)]
            alphas = found.alphas[picture, place, :len(words)].float()
            captions.append(dict(words=words, score=score, log_probs=log_probs.tolist(),
                                 ended=bool(found.ended[picture]),
                                 alphas=alphas.unflatten(1, (side, side)).numpy()))
        pictures.append(captions if n_best else captions[0])
    return pictures


# -------------------------------------------------------------------------------------------------
# Beam search


class Captions(NamedTuple):
    """The N best captions of each picture, the best first; a score of -inf where fewer ended."""

    words: Tensor  # int64 (B, N, T), from the first word on; <pad> after the end
    scores: Tensor  # (B, N), the sum of log_probs
    log_probs: Tensor  # (B, N, T), of each word and of <end>
    alphas: Tensor  # (B, N, T, P), the attention at each word
    ended: Tensor  # bool (B,), whether a caption of this picture reached <end>


@torch.no_grad()
def beam_search(decoder, grid: Tensor, beam_size: int, max_len: int, word_map: dict[str, int],
                length_penalty: float = 0.0, n_best: int = 1) -> Captions:
    """The most probable captions of each picture, by beam search over all pictures at once.

    As in the original a beam that ends leaves the search, the others continue with one beam less,
    and the best that ended wins: by its sum of log-probabilities, which prefers short captions,
    over its number of tokens (with <end>) to the `length_penalty`. Sums only fall, so a picture is
    finished as soon as no open beam can become better than its best ended one (of n_best, the
    last). Of equal scores the first counts: the lower beam, then the lower word.

    Args:
        decoder: in eval mode.
        grid: (B, h, w, D).
        beam_size: K; 1 is greedy.
        max_len: there are T = max_len + 1 steps, so that so many words and <end> fit.
        length_penalty: 0, the original's, compares sums; 1 means per token.
        n_best: captions for each picture; no more than beam_size can end.
    """
    B, K, V, T = len(grid), beam_size, len(word_map), max_len + 1
    never = never_generated(word_map, grid.device)
    features, h, c = decoder.start(grid, K)
    beams = Beams.begin(h, c, word_map[START], decoder.encoded_image_size ** 2)
    found = Found(B, K, T, beams.alphas.shape[3], word_map[PAD], grid.device)

    for t in range(T):
        words = decoder.embedding(beams.words[:, :, -1])  # (b, K, E)
        h, c, alpha = decoder.step(features, words, beams.h, beams.c)
        # Over all words, as the original's scores are, also those that are never generated.
        log_p = F.log_softmax(decoder.fc(h).float(), dim=2)
        log_p = log_p.index_fill(2, never, -torch.inf)  # (b, K, V)

        totals = (beams.scores.unsqueeze(2) + log_p).flatten(1)
        scores, index = first_largest(totals, K)  # (b, K)
        log_prob = log_p.flatten(1).gather(1, index)
        beams = beams.grow(index // V, index % V, scores, log_prob, (h, c, alpha))

        is_seated = torch.arange(K, device=grid.device) < beams.seats.unsqueeze(1)
        is_beam = is_seated & scores.isfinite()
        ends = is_beam & (beams.words[:, :, -1] == word_map[END])
        found.add(beams, ends, length_penalty)
        if t == T - 1:
            found.add_unfinished(beams, is_beam, length_penalty)
            break

        beams = beams._replace(scores=scores.masked_fill(ends | ~is_seated, -torch.inf),
                               seats=beams.seats - ends.sum(dim=1))
        # At best an open beam keeps its sum, and is T words long in the end.
        best_open = beams.scores.max(dim=1).values / T ** length_penalty
        last = found.ranks[beams.pictures].topk(min(n_best, K), dim=1).values[:, -1]
        searched = (best_open > last) & (beams.seats > 0)  # (b,)
        if not searched.any():
            break
        if not searched.all():
            beams = Beams(*(field[searched] for field in beams))
            features = [feature[searched] for feature in features]
    return found.best(min(n_best, K))


class Beams(NamedTuple):
    """K beams of each of b pictures that are not finished."""

    pictures: Tensor  # int64 (b,), which they are
    seats: Tensor  # int64 (b,), how many of the beams have not ended
    h: Tensor  # (b, K, H)
    c: Tensor
    scores: Tensor  # (b, K), the sum of log_probs; -inf: no beam
    words: Tensor  # int64 (b, K, 1 + t), <start> first
    log_probs: Tensor  # (b, K, t)
    alphas: Tensor  # (b, K, t, P)

    @classmethod
    def begin(cls, h: Tensor, c: Tensor, start: int, P: int):
        b, K, _ = h.shape
        pictures = torch.arange(b, device=h.device)
        scores = torch.full((b, K), -torch.inf, device=h.device)
        scores[:, 0] = 0  # all beams begin alike, so one of them is enough
        words = torch.full((b, K, 1), start, device=h.device)
        return cls(pictures, torch.full_like(pictures, K), h, c, scores, words,
                   scores.new_empty(b, K, 0), scores.new_empty(b, K, 0, P))

    def grow(self, parent: Tensor, word: Tensor, scores: Tensor, log_prob: Tensor, step):
        """Each beam becomes its parent and a word, all (b, K). `step` is the h, c and alpha of the
        parents: a word's attention is its parent's."""
        h, c, alpha = step
        rows = torch.arange(len(parent), device=parent.device).unsqueeze(1)
        words = torch.cat([self.words[rows, parent], word.unsqueeze(2)], dim=2)
        log_probs = torch.cat([self.log_probs[rows, parent], log_prob.unsqueeze(2)], dim=2)
        alphas = torch.cat([self.alphas, alpha.unsqueeze(2)], dim=2)[rows, parent]
        return Beams(self.pictures, self.seats, h[rows, parent], c[rows, parent], scores, words,
                     log_probs, alphas)


class Found:
    """The captions of B pictures that have ended, at most K of each, in the order of their ends."""

    def __init__(self, B: int, K: int, T: int, P: int, pad: int, device: torch.device):
        self.ranks = torch.full((B, K), -torch.inf, device=device)  # what they compare by
        self.number = torch.zeros(B, dtype=torch.int64, device=device)  # of them
        self.ended = torch.zeros(B, dtype=torch.bool, device=device)
        self.scores = self.ranks.clone()
        self.words = torch.full((B, K, T), pad, device=device)
        self.log_probs = self.ranks.new_zeros(B, K, T)
        self.alphas = self.ranks.new_zeros(B, K, T, P)

    def add(self, beams: Beams, ends: Tensor, length_penalty: float):
        """Take the beams that end, bool (b, K)."""
        self.ended[beams.pictures] |= ends.any(dim=1)
        places = self.number[beams.pictures].unsqueeze(1) + ends.cumsum(dim=1) - 1  # (b, K)
        self.number[beams.pictures] += ends.sum(dim=1)

        row, beam = ends.nonzero(as_tuple=True)
        picture, place = beams.pictures[row], places[row, beam]
        scores = beams.scores[row, beam]
        t = beams.log_probs.shape[2]
        self.ranks[picture, place] = scores / t ** length_penalty
        self.scores[picture, place] = scores
        self.words[picture, place, :t] = beams.words[row, beam, 1:]
        self.log_probs[picture, place, :t] = beams.log_probs[row, beam]
        self.alphas[picture, place, :t] = beams.alphas[row, beam]

    def add_unfinished(self, beams: Beams, is_beam: Tensor, length_penalty: float):
        """At the last step: of the pictures without any that has ended, those that have not."""
        has_ended = self.ended.clone()
        self.add(beams, is_beam & ~has_ended[beams.pictures].unsqueeze(1), length_penalty)
        self.ended = has_ended

    def best(self, n_best: int) -> Captions:
        _, best = first_largest(self.ranks, n_best)  # (B, N)
        rows = torch.arange(len(best), device=best.device).unsqueeze(1)
        return Captions(self.words[rows, best], self.scores[rows, best],
                        self.log_probs[rows, best], self.alphas[rows, best], self.ended)


def first_largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of (n, m) and their indices, largest first; of equal ones the
    first. torch.topk promises no order among equals."""
    top, index = values.topk(min(k + 1, values.shape[1]), dim=1)
    has_equals = (top[:, 1:] == top[:, :-1]).any()
    if has_equals:
        top, index = values.sort(dim=1, descending=True, stable=True)
    return top[:, :k], index[:, :k]


# -------------------------------------------------------------------------------------------------
# The model's own distribution


@torch.no_grad()
def sample(decoder, grid: Tensor, draws: Tensor, word_map: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Captions whose every word is drawn from the model's own distribution.

    Args:
        grid: (B, h, w, D).
        draws: float32 (B, K, T), uniform in [0, 1): what draws the words of K captions per picture,
            of T steps at most.
    Returns:
        captions int64 (B, K, T' + 1), <start> first, <pad> after <end>; caption_lengths int64
        (B, K), <start> and <end> counted.
    """
    B, K, _ = draws.shape
    features, h, c = decoder.start(grid, K)
    never = never_generated(word_map, grid.device)
    words = torch.full((B, K), word_map[START], device=grid.device)
    captions = [words]
    is_open = torch.ones_like(words, dtype=torch.bool)
    for draw in draws.unbind(dim=2):
        h, c, _ = decoder.step(features, decoder.embedding(captions[-1]), h, c)
        cumulative = log_policy(decoder.fc(h), never).exp().cumsum(dim=2)  # (B, K, V)
        # The first word whose cumulative probability exceeds the draw; their sum is nearly 1.
        draw = draw.unsqueeze(2) * cumulative[:, :, -1:]
        words = torch.searchsorted(cumulative, draw, right=True).squeeze(2)
        captions.append(words.where(is_open, word_map[PAD]))
        is_open = is_open & (words != word_map[END])
        if not is_open.any():
            break
    captions = torch.stack(captions, dim=2)
    return captions, (captions != word_map[PAD]).sum(dim=2)


def log_policy(scores: Tensor, never: Tensor) -> Tensor:
    """Log-probabilities of the next word in a generated caption, float32 (..., V), by the scores
    of all words and those of never_generated."""
    return F.log_softmax(scores.float().index_fill(-1, never, -torch.inf), dim=-1)


def never_generated(word_map: dict[str, int], device: torch.device) -> Tensor:
    """The words that no generated caption has, int64 (3,): <pad>, <start> and <unk>."""
    return torch.tensor([word_map[PAD], word_map[START], word_map[UNK]], device=device)
