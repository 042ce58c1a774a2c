"""The second phase of training: the model's own captions, rewarded by their CIDEr-D (Rennie et al. 2017)."""
import time

import torch

from datasets import END, counts_of
from decoding import log_policy, never_generated, sample
from models import Term, caption_loss
from scores import BAD_ENDINGS, CiderD
from utils import to_device


class SelfCritical:
    """The loss of captions that the model draws itself, rewarded by their CIDEr-D (see self_critical_loss).

    Drawn and scored without dropout, as the captions that it is judged by.

    Args:
        decoder (nn.Module): draws; not wrapped. dataset (CaptionDataset): of training, whose captions give the document
        frequencies. config (Config). word_map (dict). device (torch.device). rank, world_size (int).
    """

    def __init__(self, decoder, dataset, config, word_map, device, rank=0, world_size=1):
        self.decoder, self.word_map, self.share = decoder, word_map, slice(rank, None, world_size)
        lengths = dataset.caption_lengths
        references = dataset.captions[(lengths > 0).any(dim=1), :, 1:int(lengths.max())]
        self.cider = CiderD(references.to(device), len(word_map))

    def __call__(self, encoder, decoder, images, captions, lengths, config, step):
        """
        Args:
            encoder, decoder (nn.Module): as train_one_epoch has them. images, captions, lengths: a batch; the captions
            are the references. config (Config). step (int): of the run.
        Returns:
            dict: the terms of the loss. dict: what they are means over -> its number. dict: seconds, by what took them.
        """
        grid = encoder(images)
        clock = time.perf_counter()
        draws = to_device(draws_of_step(config, step)[self.share][:len(images)], grid.device)
        samples, sample_lengths = sample(self.decoder, grid.detach(), draws, self.word_map)
        torch.clear_autocast_cache()  # of weights cast without gradients
        drawn = time.perf_counter()
        rewards = self.cider(samples[:, :, 1:], captions[:, :, 1:])
        faults = caption_faults(samples, self.word_map)
        sample_lengths = sample_lengths.cpu()  # waits for a GPU
        scored = time.perf_counter()
        scores, targets, _ = decoder(grid, samples, sample_lengths)
        terms = self_critical_loss(scores, targets, sample_lengths, rewards, self.word_map)
        terms |= {f"sample_{name}": Term(number.sum(), "captions")
                  for name, number in dict(length=sample_lengths - 1, **faults).items()}
        counts = counts_of(sample_lengths)
        if config.self_critical_xe:
            true = caption_loss(*decoder(grid, captions, lengths), lengths, config)
            terms |= {name: term._replace(per=f"true_{term.per}", weight=config.self_critical_xe * term.weight)
                      for name, term in true.items()}
            counts |= {f"true_{name}": number for name, number in counts_of(lengths).items()}
        return terms, counts, dict(sampling=drawn - clock, reward=scored - drawn)


def self_critical_loss(scores, targets, caption_lengths, rewards, word_map):
    """The policy gradient of sampled captions (Rennie et al. 2017, arXiv 1612.00563) by the terms' names.

    A sample's baseline is the mean reward of the picture's other samples (Luo 2020, arXiv 2003.09971), which leaves the
    gradient's expectation as it is and lowers its variance.

    Args:
        scores, targets: as DecoderWithAttention.forward gives them for the samples. caption_lengths: (B, K), K >= 2.
        rewards: (B, K). word_map (dict).
    Returns:
        dict: see caption_loss.
    """
    K = rewards.shape[1]
    advantages = (rewards - rewards.mean(dim=1, keepdim=True)) * K / (K - 1)  # minus the mean of the others
    steps = to_device((caption_lengths - 1).flatten(), scores.device)  # a caption's tokens
    advantages = advantages.to(scores.dtype).flatten().repeat_interleave(steps, output_size=len(targets))  # (M,)
    log_p = log_policy(scores, never_generated(word_map, scores.device)).gather(1, targets[:, None]).squeeze(1)
    return dict(
        policy_gradient=Term(-(advantages * log_p).sum(), "tokens", 1.0),
        reward=Term(rewards.sum(), "captions"),
        reward_spread=Term(rewards.std(dim=1).sum() * K, "captions"))  # between a picture's samples; K captions


def draws_of_step(config, step):
    """Random numbers for decoding.sample; those of a picture do not depend on how many processes share the batch.

    Returns: float32 (batch_size, samples, max_len + 1).
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    return torch.rand(config.batch_size, config.samples, config.max_len + 1, generator=generator)


def caption_faults(captions, word_map):
    """What often goes wrong where captions are optimised for CIDEr.

    Args:
        captions: int64 (..., T + 1), <start> first, <pad> after <end>. word_map (dict).
    Returns:
        dict: name -> bool (...): unfinished (without <end>), bad_ending (its last word is one of BAD_ENDINGS),
        repetition (it has some word twice).
    """
    words = captions[..., 1:].masked_fill(captions[..., 1:] == word_map[END], 0)
    place = torch.arange(1, words.shape[-1] + 1, device=words.device)
    last = (words * (place == (words != 0).sum(dim=-1, keepdim=True))).sum(dim=-1)
    bad = torch.tensor([word_map[word] for word in BAD_ENDINGS if word in word_map], dtype=torch.int64)
    bad = to_device(bad, words.device)
    earlier = (words.unsqueeze(-1) == words.unsqueeze(-2)).tril(-1) & (words != 0).unsqueeze(-1)
    return dict(
        unfinished=(captions != word_map[END]).all(dim=-1),
        bad_ending=torch.isin(last, bad),
        repetition=earlier.flatten(-2).any(dim=-1))
