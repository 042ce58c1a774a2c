"""Captions out of a model: beam search, and samples of its own distribution.

Symbols as in models.py: B pictures, K captions or beams per picture, T steps, P pixels, H decoder dim, V words.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

from datasets import END, PAD, START, UNK, decode_caption, word_list


def generate(decoder, grid, word_map, max_len, beam_size, length_penalty=0.0, n_best=None):
    """Caption a batch of pictures.

    Args:
        decoder (DecoderWithAttention), in eval mode. grid: (B, h, w, D). word_map (dict). max_len, beam_size (int).
        length_penalty (float), n_best (int): see beam_search.
    Returns:
        list of dict: words (list of str); score (float: sum of log-probabilities, that of <end> included); log_probs
        (list of float: of each word); ended (bool); alphas (float32 array (len(words), s, s): the attention at each
        word). With n_best a list of such dicts for each picture, the best first.
    """
    found = beam_search(decoder, grid, beam_size, max_len, word_map, length_penalty, n_best or 1)
    found = Captions(*(field.cpu() for field in found))
    words_by_id = word_list(word_map)
    pictures = []
    for number, ended in enumerate(found.ended.tolist()):
        captions = []
        for ids, score, alphas, log_probs in zip(found.words[number].tolist(), found.scores[number].tolist(),
                                                 found.alphas[number].float(), found.log_probs[number]):
            if captions and score == -torch.inf:  # fewer than n_best have ended
                break
            words = decode_caption(ids, words_by_id)
            alphas = alphas[:len(words)].unflatten(1, (decoder.encoded_image_size, -1))
            captions.append(dict(words=words, score=score, log_probs=log_probs[:len(words)].tolist(), ended=ended,
                                 alphas=alphas.numpy()))
        pictures.append(captions)
    return pictures if n_best else [captions[0] for captions in pictures]


class Captions(NamedTuple):
    """What beam search found for B pictures. With n_best all but `ended` have one more dimension, (B, n_best, ...): the
    best caption first, and a score of -inf where fewer have ended."""

    words: torch.Tensor  # int64 (B, T), from the first word on; <pad> after the end
    scores: torch.Tensor  # (B,), sum of log_probs
    ended: torch.Tensor  # bool (B,): whether the caption reached <end>
    alphas: torch.Tensor  # (B, T, P), the attention at each word
    log_probs: torch.Tensor  # (B, T), of each word and of <end>


@torch.no_grad()
def beam_search(decoder, grid, beam_size, max_len, word_map, length_penalty=0.0, n_best=None):
    """The most probable captions of each picture, by beam search over all pictures at once.

    As in the original a beam that ends leaves the search, the others continue with one beam less, and the best that
    ended wins: by its sum of log-probabilities, which prefers short captions, over its length to the `length_penalty`.
    Sums only fall, so a picture is finished as soon as no active beam can become better than its best ended one (of
    n_best, the last). Of equal scores the first counts: the lower beam, then the lower word.

    Args:
        decoder (DecoderWithAttention), in eval mode. grid: (B, h, w, D). beam_size (int): 1 is greedy.
        max_len (int): there are T = max_len + 1 steps, so that so many words and <end> fit. word_map (dict).
        length_penalty (float): 0, the original's, compares sums; 1 means per token. <end> counts.
        n_best (int): captions for each picture; no more than beam_size end. None is one, without its dimension.
    Returns:
        Captions
    """
    B, K, V, T, device = len(grid), beam_size, len(word_map), max_len + 1, grid.device
    N = min(n_best or 1, K)
    never = never_generated(word_map, device)
    features, h, c = decoder.start(grid, K)
    word = torch.full((B, K), word_map[START], device=device)
    score = torch.full((B, K), -torch.inf, device=device)
    score[:, 0] = 0  # all beams begin alike, so one of them is enough
    seats = torch.full((B,), K, device=device)  # of each picture, beams that have not ended
    active = torch.arange(B, device=device)  # pictures that are not finished; b of them
    P = decoder.encoded_image_size ** 2
    # Of each beam so far, (b, K, t, ...).
    words, log_probs = word.new_empty(B, K, 0), score.new_empty(B, K, 0)
    alphas = score.new_empty(B, K, 0, P)
    # Of each picture's captions, in the order in which they end: what they are ranked by, their sums.
    ranks, sums = score.new_full((2, B, K), -torch.inf)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    out, out_alphas = word.new_full((B, K, T), word_map[PAD]), score.new_zeros(B, K, T, P)
    out_log_probs = score.new_zeros(B, K, T)

    for t in range(T):
        h, c, alpha = decoder.step(features, decoder.embedding(word), h, c)
        # Normalised over all words, as the original's scores are, also those that are never generated.
        log_p = F.log_softmax(decoder.fc(h).float(), dim=2).index_fill(2, never, -torch.inf)  # (b, K, V)
        score, index = first_largest((score.unsqueeze(2) + log_p).flatten(1), K)  # (b, K)
        log_prob = log_p.flatten(1).gather(1, index)
        rows, parent, word = torch.arange(len(h), device=device).unsqueeze(1), index // V, index % V
        h, c = h[rows, parent], c[rows, parent]
        words = torch.cat([words[rows, parent], word.unsqueeze(2)], dim=2)
        log_probs = torch.cat([log_probs[rows, parent], log_prob.unsqueeze(2)], dim=2)
        alphas = torch.cat([alphas, alpha.unsqueeze(2)], dim=2)[rows, parent]  # a word's attention is its parent's

        is_beam = torch.arange(K, device=device) < seats.unsqueeze(1)
        ends = is_beam & (word == word_map[END]) & score.isfinite()
        open_score = score.masked_fill(ends | ~is_beam, -torch.inf)
        kept, place = ends, K - seats.unsqueeze(1) + ends.cumsum(dim=1) - 1
        ended[active] |= ends.any(dim=1)
        if t == T - 1:  # of a picture where none has ended, those that have not
            kept = torch.where(ended[active].unsqueeze(1), ends, is_beam & score.isfinite())
            place = torch.where(ended[active].unsqueeze(1), place, torch.arange(K, device=device))
        which, beam = kept.nonzero(as_tuple=True)
        picture, place = active[which], place[which, beam]
        sums[picture, place] = score[which, beam]
        ranks[picture, place] = score[which, beam] / (t + 1) ** length_penalty
        out[picture, place, :t + 1] = words[which, beam]
        out_alphas[picture, place, :t + 1] = alphas[which, beam]
        out_log_probs[picture, place, :t + 1] = log_probs[which, beam]

        score, seats = open_score, seats - ends.sum(dim=1)
        # At best an open beam keeps its sum, and is T words long in the end.
        last = ranks[active].topk(N, dim=1).values[:, -1]
        searched = (score.max(dim=1).values / T ** length_penalty > last) & (seats > 0)
        if not searched.any():
            break
        if not searched.all():
            features = [x[searched] for x in features]
            active, seats, h, c, word, score, words, alphas, log_probs = (
                x[searched] for x in (active, seats, h, c, word, score, words, alphas, log_probs))
    _, best = first_largest(ranks, N)
    best = best if n_best else best.squeeze(1)
    picture = torch.arange(B, device=device)
    picture = picture.unsqueeze(1) if n_best else picture
    return Captions(out[picture, best], sums[picture, best], ended, out_alphas[picture, best],
                    out_log_probs[picture, best])


def first_largest(values, k):
    """The k largest of each row, largest first; of equal ones the first. torch.topk promises no order among equals.

    Args: values (n, m), k <= m. Returns: values (n, k), indices (n, k).
    """
    top, index = values.topk(min(k + 1, values.shape[1]), dim=1)
    if (top[:, 1:] == top[:, :-1]).any():
        top, index = values.sort(dim=1, descending=True, stable=True)
    return top[:, :k], index[:, :k]


@torch.no_grad()
def sample(decoder, grid, draws, word_map):
    """Captions whose every word is drawn from the model's own distribution.

    Args:
        decoder (DecoderWithAttention). grid: (B, h, w, D). word_map (dict).
        draws: float32 (B, K, T), uniform in [0, 1): what draws the words of K captions per picture, of T steps at most.
    Returns:
        captions int64 (B, K, T' + 1), <start> first, <pad> after <end>; caption_lengths int64 (B, K), <start> and <end>
        counted.
    """
    features, h, c = decoder.start(grid, draws.shape[1])
    never = never_generated(word_map, grid.device)
    captions = [torch.full(draws.shape[:2], word_map[START], device=grid.device)]
    active = torch.ones_like(captions[0], dtype=torch.bool)
    for draw in draws.unbind(dim=2):
        h, c, _ = decoder.step(features, decoder.embedding(captions[-1]), h, c)
        cumulative = log_policy(decoder.fc(h), never).exp().cumsum(dim=2)
        # The first word whose cumulative probability exceeds the draw; the draws are smaller than 1, the sums nearly 1.
        word = torch.searchsorted(cumulative, draw.unsqueeze(2) * cumulative[:, :, -1:], right=True).squeeze(2)
        captions.append(word.where(active, word_map[PAD]))
        active = active & (word != word_map[END])
        if not active.any():
            break
    captions = torch.stack(captions, dim=2)
    return captions, (captions != word_map[PAD]).sum(dim=2)


def log_policy(scores, never):
    """Log-probabilities of the next word in a generated caption.

    Args: scores (..., V). never: of never_generated. Returns: float32 (..., V).
    """
    return F.log_softmax(scores.float().index_fill(-1, never, -torch.inf), dim=-1)


def never_generated(word_map, device):
    """The words that no generated caption has: <pad>, <start> and <unk>. Returns: int64 (3,)."""
    return torch.tensor([word_map[PAD], word_map[START], word_map[UNK]], device=device)
