"""The second phase of training: the model's own captions, rewarded by their CIDEr-D (Rennie et al.
2017, arXiv 1612.00563)."""
import torch

from config import Config
from datasets import END, CaptionDataset, counts_of
from decoding import log_policy, never_generated, sample
from models import Term, caption_loss
from scores import BAD_ENDINGS, CiderD
from utils import rank, to_device, world_size


class SelfCritical:
    """The loss of captions that the model draws itself, rewarded by their CIDEr-D.

    Drawn and scored without dropout, as the captions that it is judged by. The captions of the
    training pictures are the references, and give the document frequencies.
    """

    def __init__(self, dataset: CaptionDataset, config: Config, word_map: dict[str, int],
                 device: torch.device):
        self.config = config
        self.word_map = word_map
        lengths = dataset.caption_lengths
        has_captions = (lengths > 0).any(dim=1)
        references = dataset.captions[has_captions, :, 1:int(lengths.max())]
        self.cider = CiderD(references.to(device), len(word_map))

    def __call__(self, models, images: torch.Tensor, captions: torch.Tensor,
                 lengths: torch.Tensor, step: int):
        """As train.cross_entropy: the terms of the loss, and the counts that they are means over.
        `step` chooses the samples."""
        grid = models.training_encoder(images)
        draws = draws_of_step(self.config, step)[rank()::world_size()][:len(images)]
        draws = to_device(draws, grid.device)
        samples, sample_lengths = sample(models.decoder, grid.detach(), draws, self.word_map)
        torch.clear_autocast_cache()  # of weights cast without gradients

        rewards = self.cider(samples[:, :, 1:], captions[:, :, 1:])
        faults = caption_faults(samples, self.word_map)
        sample_lengths = sample_lengths.cpu()  # waits for a GPU
        scores, targets, _ = models.training_decoder(grid, samples, sample_lengths)

        terms = self_critical_loss(scores, targets, sample_lengths, rewards, self.word_map)
        counts = counts_of(sample_lengths, grid.device)
        for name, number in dict(length=sample_lengths - 1, **faults).items():
            terms[f"sample_{name}"] = Term(number.sum(), "captions")

        weight = self.config.self_critical_xe
        if weight:
            scores, targets, alphas = models.training_decoder(grid, captions, lengths)
            true_terms = caption_loss(scores, targets, alphas, lengths, self.config)
            for name, term in true_terms.items():
                terms[name] = term._replace(per=f"true_{term.per}", weight=weight * term.weight)
            for name, number in counts_of(lengths, grid.device).items():
                counts[f"true_{name}"] = number
        return terms, counts


def self_critical_loss(scores: torch.Tensor, targets: torch.Tensor, caption_lengths: torch.Tensor,
                       rewards: torch.Tensor, word_map: dict[str, int]) -> dict[str, Term]:
    """The policy gradient of sampled captions, by the terms' names, as models.caption_loss.

    A sample's baseline is the mean reward of the picture's other samples (Luo 2020, arXiv
    2003.09971), which leaves the gradient's expectation as it is and lowers its variance.

    Args:
        scores, targets: as DecoderWithAttention.forward gives them for the samples.
        caption_lengths: (B, K), K >= 2.
        rewards: (B, K).
    """
    K = rewards.shape[1]
    mean = rewards.mean(dim=1, keepdim=True)
    advantages = (rewards - mean) * K / (K - 1)  # = reward - mean of the other samples
    tokens = to_device((caption_lengths - 1).flatten(), scores.device)
    advantages = advantages.to(scores.dtype).flatten()
    advantages = advantages.repeat_interleave(tokens, output_size=len(targets))  # (M,)

    never = never_generated(word_map, scores.device)
    log_p = log_policy(scores, never).gather(1, targets[:, None]).squeeze(1)
    spread = rewards.std(dim=1)  # between the samples of a picture
    return dict(
        policy_gradient=Term(-(advantages * log_p).sum(), "tokens", 1.0),
        reward=Term(rewards.sum(), "captions"),
        reward_spread=Term(spread.sum() * K, "captions"))


def draws_of_step(config: Config, step: int) -> torch.Tensor:
    """Random numbers for decoding.sample, float32 (batch_size, samples, max_len + 1); those of a
    picture do not depend on how many processes share the batch."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    return torch.rand(config.batch_size, config.samples, config.max_len + 1, generator=generator)


def caption_faults(captions: torch.Tensor, word_map: dict[str, int]) -> dict[str, torch.Tensor]:
    """What often goes wrong where captions are optimised for CIDEr.

    Args:
        captions: int64 (..., T + 1), <start> first, <pad> after <end>.
    Returns:
        bool (...) by name: unfinished (without <end>), bad_ending (its last word is one of
        BAD_ENDINGS), repetition (it has some word twice).
    """
    is_end = captions[..., 1:] == word_map[END]
    words = captions[..., 1:].masked_fill(is_end, 0)  # <pad> is 0
    is_word = words != 0
    place = torch.arange(1, words.shape[-1] + 1, device=words.device)
    is_last = place == is_word.sum(dim=-1, keepdim=True)
    last = (words * is_last).sum(dim=-1)
    bad = torch.tensor([word_map[word] for word in BAD_ENDINGS if word in word_map],
                       dtype=torch.int64)
    is_earlier = (words.unsqueeze(-1) == words.unsqueeze(-2)).tril(-1)
    return dict(
        unfinished=~is_end.any(dim=-1),
        bad_ending=torch.isin(last, to_device(bad, words.device)),
        repetition=(is_earlier & is_word.unsqueeze(-1)).flatten(-2).any(dim=-1))
