"""Self-critical training: samples, rewards, the policy gradient, and the second phase of a run."""
import itertools
import random
import shutil
import signal
import sys

import pytest
import torch
from common import (BEST, KILLS, assert_near, assert_same, call, fails, flags, interrupt,
                    last_checkpoint, outcome, processes, read_log)
from pycocoevalcap.cider.cider import Cider

import self_critical
import state
import train
from checkpoint import CHECKPOINT, CROSS_ENTROPY_CHECKPOINT, load_checkpoint, save_checkpoint
from config import get_config, parse_args
from datasets import END, PAD, START, UNK, CaptionDataset, load_word_map, make_loader
from fast import Models
from fast.decoder import FastDecoder
from decoding import log_policy, never_generated, sample
from models import DecoderWithAttention, build_models
from scores import CiderD, cider, numbered
from self_critical import caption_faults, self_critical_loss

CPU = torch.device("cpu")
WORD_MAP = {word: number for number, word in enumerate([PAD, "a", "b", "c", UNK, START, END])}
NEVER = never_generated(WORD_MAP, CPU)


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return DecoderWithAttention(8, 8, 8, len(WORD_MAP), encoder_dim=8, encoded_image_size=3).eval()


# -------------------------------------------------------------------------------------------------
# The reward


def captions_of(rng, number):
    lengths = 0, 1, 2, 3, 5, 8, 12
    return [[f"w{min(int(rng.expovariate(0.05)), 300)}" for _ in range(rng.choice(lengths))]
            for _ in range(number)]


def pycocoevalcap_cider(hypotheses, references):
    true, found = ({i: [" ".join(words) for words in captions] for i, captions in enumerate(all_of)}
                   for all_of in (references, [[words] for words in hypotheses]))
    return torch.from_numpy(Cider().compute_score(true, found)[1])


def test_cider_is_that_of_pycocoevalcap():
    rng = random.Random(0)
    references = [captions_of(rng, rng.choice((1, 3, 5))) for _ in range(1200)]
    hypotheses = [rng.choice(human)[:4] + caption
                  for human, caption in zip(references, captions_of(rng, 1200))]
    assert cider(hypotheses, references).max() > 1
    for given in ((hypotheses, references), ([["a"]], [[["a", "b"]]]),
                  ([["a"], ["c"]], [[["a", "b"]], [["c"]]])):  # no n-gram in two pictures
        assert torch.allclose(cider(*given), pycocoevalcap_cider(*given), rtol=0, atol=1e-9)


def test_rewards_are_those_of_pycocoevalcap_with_end_as_a_word():
    """Five samples per picture, document frequencies of all references."""
    rng = random.Random(1)
    numbers = {word: i for i, word in enumerate([f"w{i}" for i in range(301)] + [END], 1)}
    references = [[caption + [END] for caption in captions_of(rng, 5)] for _ in range(200)]
    samples = [[rng.choice(human)[:3] + caption + [END] * rng.randint(0, 1)
                for caption in captions_of(rng, 5)] for human in references]
    human, drawn = (numbered(sum(captions, []), numbers).unflatten(0, (-1, 5))
                    for captions in (references, samples))
    reward = CiderD(human, 400)
    found = torch.cat([reward(drawn[rows:rows + 8], human[rows:rows + 8])
                       for rows in range(0, 200, 8)])
    for k in range(5):
        expected = pycocoevalcap_cider([captions[k] for captions in samples], references)
        assert torch.allclose(found[:, k], expected, rtol=0, atol=1e-9)


def test_faults_of_captions():
    words = [PAD, "狗", "的", "草地", UNK, START, END]
    word_map = {word: number for number, word in enumerate(words)}
    captions = [["狗", "的", END], ["狗", "草地"], ["狗", "草地", "狗", END], [END],
                ["的", "狗", END]]
    ids = torch.tensor([[word_map[word] for word in [START, *caption, PAD, PAD, PAD][:5]]
                        for caption in captions])
    faults = {name: found.nonzero().tolist()
              for name, found in caption_faults(ids, word_map).items()}
    assert faults == dict(unfinished=[[1]], bad_ending=[[0]], repetition=[[2]])


# -------------------------------------------------------------------------------------------------
# Samples, and the gradient


@pytest.mark.parametrize("as_fast", [False, pytest.param(True, marks=pytest.mark.paper)])
def test_samples_are_drawn_from_what_the_decoder_gives(as_fast, decoder):
    """Every draw lies in its word's interval of the distribution that teacher forcing gives for the
    same caption."""
    runs = FastDecoder(decoder) if as_fast else decoder
    grid, draws = torch.rand(40, 2, 2, 8), torch.rand(40, 4, 7)
    captions, lengths = sample(runs, grid, draws, WORD_MAP)
    assert captions.shape[2] == lengths.max() <= 8 and (captions[:, :, 0] == WORD_MAP[START]).all()
    words = captions[:, :, 1:]
    assert not (words == WORD_MAP[START]).any() and not (words == WORD_MAP[UNK]).any()
    after_end = (words == WORD_MAP[END]).cumsum(dim=2) - (words == WORD_MAP[END]).long()
    assert torch.equal(words == WORD_MAP[PAD], after_end > 0)
    with torch.no_grad():
        scores, targets, _ = runs(grid, captions, lengths)
    upper = log_policy(scores, NEVER).exp().cumsum(dim=1)
    interval = torch.cat([torch.zeros(len(upper), 1), upper], dim=1)
    drawn = draws[:, :, :words.shape[2]][torch.arange(words.shape[2]) < lengths.unsqueeze(2) - 1]
    low, high = (interval.gather(1, targets[:, None] + i).squeeze(1) for i in (0, 1))
    assert ((low - 1e-5 <= drawn) & (drawn <= high + 1e-5)).all()


def reward_of(captions):
    """Any reward will do: one that tells all captions apart."""
    return (captions * torch.tensor([1.0, -0.7, 0.3])[:captions.shape[-1]]).sum(dim=-1).cos() + 1


def gradient_of(loss, decoder):
    gradients = torch.autograd.grad(loss, [*decoder.parameters()], retain_graph=True,
                                    allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def log_p_of(decoder, grid, ids, lengths):
    scores, targets, _ = decoder(grid, ids, lengths)
    return scores, targets, log_policy(scores, NEVER).gather(1, targets[:, None]).squeeze(1)


def test_the_gradient_s_expectation_is_that_of_the_expected_reward(decoder):
    """Against all 40 captions of at most three steps over four words; the baseline lowers the
    variance."""
    for parameter in decoder.parameters():
        parameter.data *= 3  # away from uniform
    grid, words = torch.rand(1, 2, 2, 8), [WORD_MAP[word] for word in ("a", "b", "c")]
    captions = [[*some, WORD_MAP[END]] for T in range(3)
                for some in itertools.product(words, repeat=T)]
    captions += itertools.product(words, repeat=3)
    ids = torch.zeros(1, len(captions), 4, dtype=torch.int64)
    for k, caption in enumerate(captions):
        ids[0, k, :len(caption) + 1] = torch.tensor([WORD_MAP[START], *caption])
    lengths = (ids != 0).sum(dim=2)
    _, _, log_p = log_p_of(decoder, grid, ids, lengths)
    p = torch.stack([part.sum().exp() for part in log_p.split((lengths - 1)[0].tolist())])
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    expected = gradient_of(-(p * reward_of(ids[0, :, 1:])).sum(), decoder)

    B, K, estimates, without = 200, 5, [], []
    grid = grid.expand(B, -1, -1, -1)
    torch.manual_seed(1)
    for _ in range(60):
        drawn, lengths = sample(decoder, grid, torch.rand(B, K, 3), WORD_MAP)
        scores, targets, log_p = log_p_of(decoder, grid, drawn, lengths)
        rewards = reward_of(drawn[:, :, 1:])
        terms = self_critical_loss(scores, targets, lengths, rewards, WORD_MAP)
        estimates.append(gradient_of(terms["policy_gradient"].sum / (B * K), decoder))
        rewards = rewards.flatten().repeat_interleave((lengths - 1).flatten())
        without.append(gradient_of(-(log_p * rewards).sum() / (B * K), decoder))
    estimates, without = torch.stack(estimates), torch.stack(without)
    error = estimates.std(dim=0) / 60 ** 0.5
    apart = ((estimates.mean(dim=0) - expected) / (error + 1e-6)).abs()
    assert apart.max() < 5 and apart.square().mean() < 1.5
    assert expected.norm() > 20 * error.norm() / len(error) ** 0.5
    assert estimates.var(dim=0).sum() < 0.5 * without.var(dim=0).sum()


def test_no_parameter_loses_its_gradient_to_the_samples_in_bfloat16(tiny_flags):
    """autocast keeps casts of the weights; those made while sampling have no gradient."""
    given = [*tiny_flags, "--self_critical", "true", "--fine_tune_encoder", "true"]
    config = get_config(flags=parse_args("", argv=given).flags)
    word_map = load_word_map(config.data_dir)
    dataset = CaptionDataset(config, "train", word_map)
    images, captions, lengths, _ = next(iter(make_loader(dataset, config, True)))
    missing = []
    for is_bfloat16 in (False, True):
        encoder, decoder = build_models(config, len(word_map))
        models = Models(encoder, encoder, decoder, decoder.eval(), {})
        objective = self_critical.SelfCritical(dataset, config, word_map, CPU)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bfloat16):
            terms, _ = objective(models, images, captions, lengths, 0)
        terms["policy_gradient"].sum.backward()
        missing.append([name for half in (encoder, decoder) for name, p in half.named_parameters()
                        if p.grad is None])
    assert missing[0] == missing[1]


# -------------------------------------------------------------------------------------------------
# The second phase of a run


@pytest.fixture(scope="module")
def first(tiny_flags, tmp_path_factory):
    """The folder of a finished run of the first phase."""
    folder = tmp_path_factory.mktemp("first")
    call(train.main, *tiny_flags, *flags(folder, dropout=0.0, batch_size=4, epochs=1))
    return folder


def begin_from(first, folder):
    """A copy of its checkpoints."""
    (folder / "models").mkdir(exist_ok=True)
    for name in (CHECKPOINT, BEST):
        shutil.copy(first / "models" / name, folder / "models")


def second_flags(tiny_flags, folder, **settings):
    settings = dict(batch_size=4, self_critical_lr=1e-3, self_critical_xe=0.5) | settings
    return ["--resume", "--self_critical", "true", *tiny_flags, *flags(folder, **settings)]


@pytest.fixture(scope="module")
def second(first, tiny_flags, tmp_path_factory):
    """The folder of a run of the second phase that was not interrupted, and what it printed."""
    folder = tmp_path_factory.mktemp("second")
    begin_from(first, folder)
    return folder, call(train.main, *second_flags(tiny_flags, folder)).out


def test_the_second_phase_begins_from_the_best_checkpoint_and_says_so(first, second):
    folder, printed = second
    best = load_checkpoint(first / "models" / BEST)
    assert f"begins from {folder / 'models' / BEST}: epoch {best['epoch']}" in printed
    assert "decoder_lr 0.001, encoder_lr 0.001" in printed
    kept = load_checkpoint(folder / "models" / CROSS_ENTROPY_CHECKPOINT)
    assert_same(kept["decoder"], best["decoder"])
    last = last_checkpoint(folder)
    assert last["progress"]["began"] == best["epoch"] and last["epoch"] == best["epoch"] + 2
    lines, series = read_log(folder)
    assert [line["epoch"] for line in lines] == [best["epoch"] + 1, best["epoch"] + 2]
    best_of_phase = max(line["valid"]["CIDEr"] for line in lines)
    assert last["progress"]["best"][0] == best_of_phase
    for training, validation in ((line["train"], line["valid"]) for line in lines):
        assert training.keys() >= {"sample_length", "sample_unfinished", "sample_bad_ending",
                                   "sample_repetition"}
        others = training["policy_gradient"] + 0.5 * training["coverage"]
        assert training["loss"] == pytest.approx(others + 0.5 * training["cross_entropy"])
        assert training["reward"] > 0 and training["reward_spread"] > 0
        assert validation.keys() >= {"cross_entropy", "CIDEr", "distinct_captions"}
    assert series.keys() >= {"train/reward", "train/gradient_norm", "valid/distinct_captions"}


def test_the_second_phase_resumes_in_mid_epoch(first, second, tiny_flags, tmp_path, monkeypatch):
    begin_from(first, tmp_path)
    loss, steps = self_critical.self_critical_loss, itertools.count(1)

    def loss_and_signal(*args):
        if next(steps) in (2, 4):
            signal.raise_signal(signal.SIGTERM)
        return loss(*args)
    monkeypatch.setattr(self_critical, "self_critical_loss", loss_and_signal)
    for code in (128 + signal.SIGTERM, 128 + signal.SIGTERM, 0):
        call(train.main, *second_flags(tiny_flags, tmp_path), check=code)
    assert_same(outcome(tmp_path), outcome(second[0]))


def test_the_second_phase_killed_anywhere_ends_as_if_it_had_not_been(first, second, tiny_flags,
                                                                     tmp_path, start):
    begin_from(first, tmp_path)
    given, rng, killed = second_flags(tiny_flags, tmp_path), random.Random(KILLS), 0
    while killed < KILLS:
        code, _ = interrupt(start(*given), rng, 1.5, (signal.SIGKILL, signal.SIGTERM))
        killed += code != 0
        has_begun = last_checkpoint(tmp_path)["config"]["self_critical"]
        if not has_begun or code == 0:  # all over again
            shutil.rmtree(tmp_path / "models")
            shutil.rmtree(tmp_path / "logs", ignore_errors=True)
            begin_from(first, tmp_path)
    call(train.main, *given)
    assert_same(outcome(tmp_path), outcome(second[0]))


def test_the_second_phase_killed_after_its_first_best_checkpoint(first, second, tiny_flags,
                                                                 tmp_path, monkeypatch):
    """Which has the averages in the weights' place, and is not what the phase began from."""
    begin_from(first, tmp_path)
    given = second_flags(tiny_flags, tmp_path, checkpoint_minutes=60)

    def save_and_die(saved, path, *rest):
        save_checkpoint(saved, path, *rest)
        if path.name == BEST:
            sys.exit(9)
    with monkeypatch.context() as patch:
        patch.setattr(state, "save_checkpoint", save_and_die)
        call(train.main, *given, check=9)
    call(train.main, *given)
    assert_same(outcome(tmp_path), outcome(second[0]))


@pytest.mark.paper  # which weights get rounding for a gradient depends on the model
def test_two_processes_share_the_second_phase(first, tiny_flags, tmp_path, start):
    given = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        begin_from(first, tmp_path / name)
        given.append(second_flags(tiny_flags, tmp_path / name, dropout=0.0, checkpoint_minutes=60,
                                  fine_tune_encoder="false", self_critical_lr=2e-4))
    call(train.main, *given[0])
    runs = [start(*given[1], **variables) for variables in processes(2)]
    assert [run.wait() for run in runs] == [0, 0]
    one, two = (outcome(tmp_path / name) for name in ("one", "two"))
    assert_near(two, one, share=0.2)  # many words are not among the samples


def test_what_the_second_phase_refuses(first, second, tiny_flags, tmp_path):
    fails(train.main, *tiny_flags, *flags(tmp_path), "--self_critical", "true",
          parts=("--resume", "cross entropy"))
    fails(train.main, "--resume", *tiny_flags, *flags(second[0]), "--self_critical", "false",
          parts=(CROSS_ENTROPY_CHECKPOINT, "cross entropy"))
    begin_from(first, tmp_path)
    (tmp_path / "models" / BEST).unlink()
    fails(train.main, *second_flags(tiny_flags, tmp_path), parts=(BEST, "does not exist"))
