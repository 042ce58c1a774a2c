"""Speed and memory of this repository against the naive implementation in reference.py, at equal results.

    python benchmarks/run.py train                        # one group: preprocess, train, score, eval or scaling
    python benchmarks/run.py all --json logs/bench.json   # `make bench`; about twenty minutes on two cores
    python benchmarks/run.py epoch                        # an epoch of AI Challenger on a GPU: training and validation
    python benchmarks/run.py scaling --plot scaling.png   # time and memory against batch, caption length, vocabulary

The product is what train.py and eval.py run, as fast.choose decides; in `train_decoder_as_written` it is models.py as
written. In each case the two sides run alternately, in a process each, so that other load on the machine hits both.
The first iteration of both is compared before anything is timed: the same loss and gradients, or the same captions.
A ratio is that of two neighbouring runs; the table has the median and range. On a GPU a run of training is the mean of
ten steps. Memory is the peak of the first iteration minus what the process held before it (weights and inputs). Sizes
are AI Challenger's: 9,000 words, captions of 10 to 21 tokens, ResNet-101 at 256 pixels, 512 dimensions. Weights and
pictures are random, which takes the same time.

Two lower bounds show how much faster it could get at all: the product's floating-point operations over the rate of a
large matrix product, and the bytes that its products and convolutions read and write, each once, over that of a copy.
"""
import ctypes
import itertools
import json
import math
import multiprocessing.util
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the scripts are

import fast  # noqa: E402
import pre_process  # noqa: E402
import train  # noqa: E402
from benchmarks import reference  # noqa: E402
from config import Config, new_parser  # noqa: E402
from datasets import END, PAD, START, UNK, CaptionDataset, decode_caption, make_loader, word_list  # noqa: E402
from fast.features import KeptFeatures  # noqa: E402
from fast.graphs import Recorded  # noqa: E402
from decoding import beam_search  # noqa: E402
from models import DecoderWithAttention, Encoder, caption_loss  # noqa: E402
from scores import score  # noqa: E402
from self_critical import SelfCritical, draws_of_step  # noqa: E402
from train import (Averages, Progress, Sums, counts_of, make_optimizers, make_scaler, mixed_precision, parameters,  # noqa: E402
                   prepare, teacher_forced, train_one_epoch, validate)
from utils import UserError, get_device, keep_freed_memory, run_script  # noqa: E402

CONFIG = Config(encoder_weights="none", dropout=0.0)  # dropout draws other numbers on each side
PICTURES, K, TOKENS, V = dict(cpu=12, cuda=CONFIG.batch_size), CONFIG.captions_per_image, (10, 21), 9000


# ---------------------------------------------------------------------------------------------------------------------
# Inputs and models, the same for both sides


def make_word_map(size):
    return {word: number for number, word in enumerate([PAD, *(f"w{i}" for i in range(size - 4)), UNK, START, END])}


def make_batch(pictures, tokens, vocab_size, device, images=True):
    """Random pictures, with captions of (fewest, most) tokens. Returns: images, captions, lengths (on the CPU)."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(tokens[0], tokens[1] + 1, (pictures, K), generator=generator) + 1
    captions = torch.randint(1, vocab_size - 3, (pictures, K, tokens[1] + 1), generator=generator)
    size = (pictures if images else 0, 256, 256, 3)
    images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    return images.to(device), captions.to(device), lengths


def make_features(pictures, device):
    """Grids like a ResNet-101's: fp16 (pictures, 8, 8, 2048), not negative."""
    return torch.randn(pictures, 8, 8, 2048, generator=torch.Generator().manual_seed(2)).relu().half().to(device)


def make_models(side, config, vocab_size, device, talkative=False):
    """Encoder and decoder in eval mode, with the same weights on both sides.

    Args: side (str): reference or product (as written; prepare and fast.choose take it from there). talkative (bool):
        the decoder generates captions of about twelve words.
    """
    torch.manual_seed(0)
    encoder = Encoder(config.encoder, "none")
    for module in encoder.modules():  # random residuals would add up to values that no trained network has
        if isinstance(module, torchvision.models.resnet.Bottleneck):
            torch.nn.init.constant_(module.bn3.weight, 0.1)
    torch.manual_seed(0)
    sizes = config.attention_dim, config.emb_dim, config.decoder_dim, vocab_size, encoder.dim, config.dropout
    decoder = DecoderWithAttention(*sizes)
    if talkative:
        make_talkative(decoder, make_word_map(vocab_size))
    if side == "reference":
        states = encoder.state_dict(), decoder.state_dict()
        encoder = reference.Encoder(config.encoder).requires_grad_(False)
        decoder = reference.DecoderWithAttention(*sizes)
        encoder.load_state_dict(states[0])
        decoder.load_state_dict(states[1])
    return encoder.to(device).eval(), decoder.to(device).eval()


def make_talkative(decoder, word_map):
    """Random weights end a caption at once or never; let these end it after about twelve words, as trained ones do.

    One unit of the LSTM counts the steps, and <end> waits for it; the other words become clear choices.
    """
    unit, end, lstm, fc = 0, word_map[END], decoder.decode_step, decoder.fc
    for gate, bias in enumerate((-2.5, 12.0, 12.0, 12.0)):  # i, f, g, o: little in, nothing forgotten, all shown
        row = gate * lstm.hidden_size + unit
        for parameter, value in ((lstm.weight_ih, 0), (lstm.weight_hh, 0), (lstm.bias_ih, bias), (lstm.bias_hh, 0)):
            parameter.data[row] = value
    decoder.init_c.weight.data[unit] *= 4  # the count starts differently for each picture
    decoder.embedding.weight.data *= 5
    fc.weight.data *= 40
    fc.weight.data[:, unit], fc.weight.data[end] = 0, 0
    fc.weight.data[end, unit], fc.bias.data[end] = 300, -230


def pool(grid):
    """The last layer of reference.Encoder: (N, 8, 8, D) -> (N, 14, 14, D)."""
    return torch.nn.functional.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2), 14).permute(0, 2, 3, 1)


def make_photograph(rng, size):
    """Noise with as much detail as a photograph: 200 KB at 1000 x 700 and quality 90. Returns: PIL.Image."""
    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)) + 1 / max(size)
    channels = [np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency**1.5, (height, width))
                for _ in range(3)]
    luma, *chroma = ((x - x.mean()) / x.std() for x in channels)
    rgb = np.stack([luma + 0.3 * chroma[0], luma, luma + 0.3 * chroma[1]], axis=2)
    return Image.fromarray((128 + 55 * rgb).clip(0, 255).astype(np.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# Cases: each returns the function that is timed, one that returns what the sides must agree on, and steps per timing


def train_case(side, device, start="features", precision="float32", as_written=False, pictures=None, tokens=TOKENS,
               vocab_size=V):
    """A training step, with clipping and Adam.

    Args:
        side (str): reference or product. device (torch.device).
        start (str): features, pixels (through the frozen encoder), or kept (pixels, but the product has the features).
        precision (str), as_written (bool): of the product.
    """
    config = replace(CONFIG, precision=precision, fast=not as_written)
    pictures = pictures or PICTURES[device.type]
    images, captions, lengths = make_batch(pictures, tokens, vocab_size, device)
    encoder, decoder = make_models(side, config, vocab_size, device)
    features = make_features(pictures, device) if start == "features" else None
    if side == "reference":
        optimizers = {"decoder": torch.optim.Adam(decoder.parameters(), lr=config.decoder_lr)}
        captions, lengths = captions.flatten(0, 1), lengths.flatten().to(device)

        def loss_of_batch():
            if start == "features":
                grid = pool(features.float()).repeat_interleave(K, 0)
            else:  # as many pictures at a time as the product takes
                grid = torch.cat([encoder(part) for part in images.repeat_interleave(K, 0).split(pictures)])
            scores, alphas = decoder(grid, captions, lengths)
            return reference.caption_loss(scores, alphas, captions, lengths, config.alpha_c)
    else:
        optimizers = make_optimizers(config, encoder, decoder)
        runs = prepare(encoder, decoder, config, device, (), 0, 1)
        if start == "kept":
            features = runs.encoder(images).half()
        given, encoder = (images, runs.training_encoder) if features is None else (features, KeptFeatures(None))
        totals = {name: number.to(device) for name, number in counts_of(lengths).items()}

        def loss_of_batch():
            with mixed_precision(config, device):
                terms = caption_loss(*runs.decoder(encoder(given), captions, lengths), lengths, config)
            return sum(term.weight * term.sum / totals[term.per] for term in terms.values() if term.weight)

        runs.decoder.train()
    decoder.train()
    return training_step(loss_of_batch, decoder, optimizers, config.grad_clip, device)


def training_step(loss_of_batch, decoder, optimizers, clip, device):
    """A case of a loss: backward, clipping by value, Adam. Both sides must agree on loss and gradient."""
    result = {}

    def step():
        loss = loss_of_batch()
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_value_(parameters(optimizers), clip)
        for optimizer in optimizers.values():
            optimizer.step()
        result["loss"] = loss.detach()

    def outcome():
        return dict(loss=result["loss"].item(),
                    gradient=torch.cat([p.grad.flatten().float().cpu() for p in decoder.parameters()]).numpy())
    return step, outcome, 10 if device.type == "cuda" else 1  # the CPU queues the next step while the GPU works


def self_critical_case(side, device):
    """A self-critical step from given features: 5 samples per picture, their rewards, the update.

    The reference draws one caption after the other, rewarded by pycocoevalcap. Document frequencies are those of the
    batch's own captions, about 12 words long, as the samples are.
    """
    config, word_map, pictures = replace(CONFIG, self_critical=True), make_word_map(V), PICTURES[device.type]
    _, captions, lengths = make_batch(pictures, TOKENS, V, device)
    encoder, decoder = make_models(side, config, V, device, talkative=True)
    features = make_features(pictures, device)
    if side == "reference":
        optimizers = {"decoder": torch.optim.Adam(decoder.parameters(), lr=config.self_critical_lr)}
        draws = draws_of_step(config, 0).to(device)[:pictures]

        def loss_of_batch():
            grid, samples = pool(features.float()), []
            for i, k in itertools.product(range(pictures), range(config.samples)):
                samples.append(reference.sample(decoder, grid[i:i + 1], draws[i, k].tolist(), word_map))
            rewards = reference.rewards(samples, captions[:, :, 1:].tolist())
            return reference.self_critical_loss(decoder, grid, samples, rewards, word_map)
    else:
        optimizers = make_optimizers(config, encoder, decoder)
        runs = prepare(encoder, decoder, config, device, (), 0, 1)
        dataset = SimpleNamespace(captions=captions.cpu(), caption_lengths=lengths)
        objective = SelfCritical(runs.decoder, dataset, config, word_map, device)

        def loss_of_batch():
            terms, counts, _ = objective(KeptFeatures(None), runs.decoder.eval(), features, captions, None, config, 0)
            return terms["policy_gradient"].sum / counts["tokens"]

    return training_step(loss_of_batch, decoder, optimizers, config.self_critical_clip, device)


def eval_case(side, device, start, beam_size=5, pictures=64):
    """Captions of 64 pictures by beam search. Args: start (str): features or pixels."""
    torch.backends.cudnn.allow_tf32 = False  # on both sides, whose captions must be identical
    word_map, result = make_word_map(V), []
    encoder, decoder = make_models(side, CONFIG, V, device, talkative=True)
    images, features = make_batch(pictures, TOKENS, V, device)[0], make_features(pictures, device).float()
    if side == "product":
        runs = fast.choose(encoder, decoder, CONFIG)

    @torch.no_grad()
    def search():
        result.clear()
        if side == "product":
            grid = features
            if start == "pixels":
                grid = torch.cat([runs.encoder(part) for part in images.split(CONFIG.batch_size)])
            found = beam_search(runs.decoder.eval(), grid, beam_size, CONFIG.max_len, word_map)
            result.extend([word for word in words if word] for words in found.words[:, 0].tolist())
        else:
            for i in range(pictures):
                grid = encoder(images[i:i + 1]) if start == "pixels" else pool(features[i:i + 1])
                result.append(reference.beam_search(decoder, grid, beam_size, CONFIG.max_len, word_map)[0])

    return search, lambda: dict(captions=list(result)), 1


def preprocess_case(side, device, pictures=96, size=(1000, 700)):
    """Photograph-sized JPEGs from the disk into HDF5: in one process and decoded whole, or as pre_process.py does."""
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    rng = np.random.default_rng(0)
    names, path = [f"{i}.jpg" for i in range(pictures)], root / "train.h5"
    for name in names:
        make_photograph(rng, size).save(root / name, quality=90)
    source = dict(folder=root, image_ids=names, captions=[["w1"]] * pictures, empty=0, extra=0, no_caption=0)
    workers = ProcessPoolExecutor() if side == "product" else None
    if workers:
        # Python waits for them at exit, after closing (at priority 10) the queue that would tell them to end.
        multiprocessing.util.Finalize(None, workers.shutdown, exitpriority=11)
        list(workers.map(str, range(64)))  # start them before anything is timed

    def write():
        path.unlink(missing_ok=True)
        if workers:
            pre_process.write_split(workers, replace(CONFIG, data_dir=folder.name), "train", source,
                                    [[["w1"]]] * pictures, make_word_map(10), {})
        else:
            with h5py.File(path, "w") as file:
                images = file.create_dataset("images", (pictures, 256, 256, 3), np.uint8)
                for i, name in enumerate(names):
                    picture = Image.open(root / name).convert("RGB")
                    images[i] = np.asarray(picture.resize((256, 256), Image.Resampling.BILINEAR))

    def outcome():
        with h5py.File(path) as file:
            return dict(pixels=file["images"][:])
    return write, outcome, 1


def score_case(side, device, pictures=5000):
    """BLEU-1 to 4, ROUGE-L and CIDEr-D of captions of 8 to 14 words with five references each, beside pycocoevalcap's.
    """
    rng, result = np.random.default_rng(0), {}
    references, captions = [], []
    for _ in range(pictures):  # of frequent words many, and of its own words some, as in a picture's captions
        words = rng.zipf(1.3, (K + 1, 14)) % V
        words[:, ::2] = np.where(rng.random((K + 1, 7)) < 0.7, words[0, ::2], words[:, ::2])
        captions_of = [[f"w{word}" for word in row[:rng.integers(8, 15)]] for row in words]
        captions.append(captions_of[0])
        references.append(captions_of[1:])

    def compute():
        result.update(score(captions, references) if side == "product" else reference.score(captions, references))

    return compute, lambda: dict(scores=result), 1


CASES = {
    "preprocess": dict(preprocess=preprocess_case),
    "train": dict(train_decoder=train_case,
                  train_decoder_as_written=partial(train_case, as_written=True),
                  train_frozen_fp32=partial(train_case, start="pixels"),
                  train_frozen_bf16=partial(train_case, start="pixels", precision="bfloat16"),
                  train_kept_features=partial(train_case, start="kept"),
                  train_self_critical=self_critical_case),
    "score": dict(score=score_case),
    "eval": dict(eval_beam5_decode=partial(eval_case, start="features"), eval_beam5=partial(eval_case, start="pixels")),
}
TITLES = dict(train_decoder_as_written="models.py as written")


# ---------------------------------------------------------------------------------------------------------------------
# The two sides, each in a process of its own

case = None  # in such a process: device, and what the case returned


def set_up(make, side, device):
    global case
    device = get_device(replace(CONFIG, device=device))
    case = device, *make(side, device)
    if side == "product":
        keep_freed_memory()  # as train.py does


def first_iteration():
    """Returns: int: peak memory in bytes, above what was held before, or None; dict: what the sides must agree on."""
    device, iteration, outcome, _ = case
    before = memory(device, reset=True)
    iteration()
    return None if before is None else memory(device) - before, outcome()


def timed():
    """Returns: float: s an iteration."""
    device, iteration, _, steps = case
    start = time.perf_counter()
    for _ in range(steps):
        iteration()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def counted():
    """Returns: int: floating-point operations of an iteration; int: bytes."""
    Recorded.__call__ = lambda self, function: function()  # inside a CUDA graph nothing can be counted
    with FlopCounterMode(display=False) as operations, CountBytes() as traffic:
        case[1]()
    return operations.get_total_flops(), traffic.total


def memory(device, reset=False):
    """Peak memory in bytes since the last reset; at a reset, what is held now. None where the system does not say."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        return torch.cuda.max_memory_allocated()
    try:
        if reset:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # or what setting up has freed would be used again unseen
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except (OSError, AttributeError):  # no glibc, no /proc
        return None
    return int(status.split("VmRSS:" if reset else "VmHWM:")[1].split()[0]) * 1024


class CountBytes(TorchDispatchMode):
    """Bytes that matrix products and convolutions read and write, each tensor once an operation."""

    total = 0
    counted = ("mm", "addmm", "bmm", "addmv", "mv", "convolution", "convolution_backward")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__.rstrip("_") in self.counted:
            for x in (*args, *(out if isinstance(out, tuple) else (out,))):
                self.total += x.numel() * x.element_size() if isinstance(x, torch.Tensor) else 0
        return out


def compare(name, make, device, rounds):
    """Run the two sides of a case alternately.

    Returns:
        dict: seconds (side -> list), memory (side -> bytes or None), operations, bytes (of the product).
    Raises:
        UserError: they do not agree.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as reference_side, ProcessPoolExecutor(1, context) as product_side:
        sides = dict(reference=reference_side, product=product_side)

        def ask(side, function, *args):
            return sides[side].submit(function, *args).result()

        for side in sides:
            ask(side, set_up, make, side, str(device))
        first = {side: ask(side, first_iteration) for side in sides}
        check(name, *(outcome for _, outcome in first.values()))
        warm_up = 1 if device.type == "cuda" else 0  # the second iteration records graphs
        seconds = [{side: ask(side, timed) for side in sides} for _ in range(warm_up + rounds)][warm_up:]
        has_products = make not in (preprocess_case, score_case)
        operations, traffic = ask("product", counted) if has_products else (0, 0)
    return dict(seconds={side: [both[side] for both in seconds] for side in sides},
                memory={side: peak for side, (peak, _) in first.items()}, operations=operations, bytes=traffic)


def check(name, expected, found):
    """Raise UserError unless both sides gave the same: exactly, or as nearly as the arithmetic allows."""
    if "captions" in expected:
        right, what = found == expected, "captions"
    elif "scores" in expected:
        difference = max(abs(found["scores"][name] - value) for name, value in expected["scores"].items())
        right, what = difference < 1e-6, f"scores by {difference:.1e}"
    elif "pixels" in expected:
        difference = np.abs(found["pixels"].astype(np.float32) - expected["pixels"]).mean()
        right, what = difference < 1, f"pixels: {difference:.2f} grey levels apart on average"
    else:
        loss = abs(found["loss"] / expected["loss"] - 1)
        gradient = np.linalg.norm(found["gradient"] - expected["gradient"]) / np.linalg.norm(expected["gradient"])
        # bfloat16 has 8 bits, and kept features are fp16 of 11.
        rough = {"train_frozen_bf16": (1e-2, 1e-1), "train_kept_features": (1e-3, 1e-2)}
        if torch.cuda.is_available():  # whose convolutions round float32 to TF32, of 11 bits
            rough["train_frozen_fp32"] = rough["train_kept_features"]
        limits = rough.get(name, (1e-5, 1e-4))
        right = loss < limits[0] and gradient < limits[1]
        what = f"loss by {loss:.1e}, gradient by {gradient:.1e}"
    print(f"{name}: both sides {'agree' if right else 'differ'} ({what})", file=sys.stderr, flush=True)
    if not right:
        raise UserError(f"{name}: the product does not give what the reference gives: {what}")


# ---------------------------------------------------------------------------------------------------------------------
# Whole epochs


class RandomDataset(CaptionDataset):
    """Random pictures and captions of AI Challenger's sizes; pictures repeat, but in a file of full length.

    Args:
        path (Path): of the file. pictures (int). first (int): pictures of another set that precede them.
    """

    def __init__(self, path, pictures, first=0):
        self.path, self.shape = path, (pictures, 256, 256, 3)
        self.offset = first * math.prod(self.shape[1:])
        self.image_ids = range(pictures)
        _, self.captions, self.caption_lengths = make_batch(pictures, TOKENS, V, "cpu", images=False)


def epochs(device, pictures, batch_size, workers):
    """Time epochs with the frozen encoder, with kept features, and with the encoder trained too, on an eighth of the
    pictures. One validation picture for seven of training.

    The pictures are in a file in TMPDIR, 47 GB of them.
    """
    valid_pictures = math.ceil(pictures / 7)
    print(f"{pictures} training and {valid_pictures} validation pictures, batches of {batch_size}, {workers} workers\n")
    print("| epoch | training, s | images/s | device busy | GiB | validation, s | of which scores, s |\n"
          "|---|---|---|---|---|---|---|", flush=True)
    with tempfile.NamedTemporaryFile(suffix=".h5") as file:
        path, total = Path(file.name), pictures + valid_pictures
        some = np.random.default_rng(0).integers(0, 256, (min(total, 4096), 256, 256, 3), np.uint8).tobytes()
        for start in range(0, total, 4096):
            file.write(some[:(total - start) * 256 * 256 * 3])
        file.flush()
        for kind in ("frozen", "kept", "fine-tuned"):
            config = replace(CONFIG, precision="auto", batch_size=batch_size, workers=workers,
                             fine_tune_encoder=kind == "fine-tuned")
            n = pictures if kind != "fine-tuned" else pictures // 8
            dataset, valid_set = RandomDataset(path, n), RandomDataset(path, math.ceil(n / 7), first=pictures)
            seconds, busy = time_training(kind, dataset, config, device)
            row = f"| {kind} | {seconds:.1f} | {n / seconds:.0f} | {busy:.0f}% | {memory(device) / 2**30:.1f} |"
            # Initial weights are validated: the captions of trained ones for noise may be of any length.
            runs = prepare(*make_models("product", config, V, device, talkative=True), config, device, (), 0, 1)
            encoder = keep_random_features(valid_set, device) if kind == "kept" else runs.encoder
            validation, scores = time_validation(encoder, runs.decoder, valid_set, train.for_validation(config, device))
            print(f"{row} {validation:.1f} | {scores:.1f} |", flush=True)


def time_training(kind, dataset, config, device):
    """Returns: float: s of train_one_epoch; float: share of it in which the GPU was busy, in %."""
    encoder, decoder = make_models("product", config, V, device)
    encoder.fine_tune("top" if config.fine_tune_encoder else "none")
    optimizers, scaler = make_optimizers(config, encoder, decoder), make_scaler(config, device)
    runs = prepare(encoder, decoder, config, device, (), 0, 1)
    encoder = keep_random_features(dataset, device) if kind == "kept" else runs.training_encoder
    loader = make_loader(dataset, config, True)
    for first in (max(len(loader) - 20, 0), 0):  # the last batches as a warm-up
        progress = Progress(run="", batches={}, batch=first)
        memory(device, reset=True)
        with Usage() as usage:
            start = time.perf_counter()
            train_one_epoch(encoder, runs.decoder, teacher_forced, optimizers, scaler, Averages(optimizers, 0), loader,
                            config, progress, Sums({}, device, 0), None, lambda: None)
            seconds = time.perf_counter() - start
    return seconds, usage.mean


def time_validation(encoder, decoder, dataset, config):
    """What train.py does after an epoch: teacher-forced loss, greedy captions of 10 to 20 words, their scores.

    Args:
        encoder, decoder (Module): the latter talkative. dataset (CaptionDataset). config (Config).
    Returns:
        float: seconds; float: those of them that the scores take.
    """
    word_map = make_word_map(V)
    words = word_list(word_map)
    references = [[decode_caption(ids[1:n - 1], words) for ids, n in zip(*picture)]
                  for picture in zip(dataset.captions.tolist(), dataset.caption_lengths.tolist())]
    few = [dataset[list(range(min(config.batch_size, len(dataset))))]]  # as a warm-up
    for loader in (few, make_loader(dataset, config, False)):
        start = time.perf_counter()
        _, captions = validate(encoder, decoder, loader, config, word_map, lambda: None)
        generated = time.perf_counter()
    score([caption["words"] for caption in captions], references)
    return time.perf_counter() - start, time.perf_counter() - generated


def keep_random_features(dataset, device):
    """Let the batches of a data set begin with rows. Returns: KeptFeatures, which holds random ones on the device."""
    features = make_features(min(len(dataset), 1024), device)
    held = torch.empty(len(dataset), *features.shape[1:], dtype=torch.float16, device=device)
    for part in held.split(1024):
        part.copy_(features[:len(part)])
    dataset.begins_with = "rows"
    return KeptFeatures(held)


class Usage:
    """The share of time in which the GPU was busy, in %, by nvidia-smi; nan without it."""

    def __enter__(self):
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
        self.process = None
        if shutil.which(command[0]):
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *error):
        if self.process:
            self.process.terminate()
        values = [int(line) for line in self.process.communicate()[0].split() if line.isdigit()] if self.process else []
        self.mean = sum(values) / len(values) if values else math.nan


# ---------------------------------------------------------------------------------------------------------------------
# Tables and curves


def measure_rates(device):
    """What the machine can do. Returns: dict: float32, bfloat16 (FLOP/s of a large product), copy (bytes/s)."""
    def best(function, work):
        times = []
        for _ in range(6):
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return work / min(times[1:])

    n = 2048 if device.type == "cpu" else 8192
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rates[str(dtype).split(".")[1]] = best(partial(torch.mm, a, b, out=torch.empty_like(a)), 2 * n**3)
    a = torch.ones(2**27, device=device)
    b = torch.empty_like(a).fill_(0)
    return rates | {"copy": best(partial(b.copy_, a), 2 * a.nbytes)}


def summarise(name, found, rates, precision):
    """Print a case's line of the table. Returns: dict: what --json writes of it."""
    reference_s, product_s = (found["seconds"][side] for side in ("reference", "product"))
    ratios, peaks = [r / p for r, p in zip(reference_s, product_s)], found["memory"]
    row = dict(reference_s=statistics.median(reference_s), product_s=statistics.median(product_s),
               ratio=statistics.median(ratios), ratio_min=min(ratios), ratio_max=max(ratios),
               memory_ratio=peaks["product"] / peaks["reference"] if peaks["reference"] else None)
    bounds = found["operations"] / rates[precision], found["bytes"] / rates["copy"]
    print(f"| {TITLES.get(name, name)} | {row['reference_s']:.3f} | {row['product_s']:.3f} | {row['ratio']:.1f} "
          f"({row['ratio_min']:.1f}-{row['ratio_max']:.1f}) | "
          + ("- | " if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f} | ")
          + (f"{bounds[0]:.2g} | {bounds[1]:.2g} | {max(bounds) / row['product_s']:.0%} |" if any(bounds) else
             "- | - | - |"), flush=True)
    return row


def scaling(device, rounds, path):
    """Draw time and memory of a decoder's training step, on both sides, against batch, caption and vocabulary size."""
    from matplotlib.figure import Figure

    axes_of = {"pictures a batch": ("pictures", (3, 6, 12, 24), lambda x: x),
               "tokens a caption": ("tokens", (5, 10, 20, 40), lambda x: (x, x)),
               "words": ("vocab_size", (3000, 9000, 18000, 36000), lambda x: x)}
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    axes = figure.subplots(2, len(axes_of), sharex="col")
    for column, (label, (argument, values, convert)) in enumerate(axes_of.items()):
        curves = {side: ([], []) for side in ("reference", "product")}
        for value in values:
            found = compare("scaling", partial(train_case, **{argument: convert(value)}), device, rounds)
            for side, (times, peaks) in curves.items():
                times.append(statistics.median(found["seconds"][side]))
                peaks.append((found["memory"][side] or 0) / 2**20)
            print(f"| {label} {value} | " + " | ".join(f"{side} {times[-1]:.3f} s, {peaks[-1]:.0f} MiB"
                                                        for side, (times, peaks) in curves.items()) + " |", flush=True)
        for side, (times, peaks) in curves.items():
            growth = [f"{y[-1] / y[0]:.1f}" if y[0] else "-" for y in (times, peaks)]
            print(f"  {label} x {values[-1] / values[0]:.0f}: {side} time x {growth[0]}, memory x {growth[1]}")
            for row, (y, what) in enumerate(((times, "s a step"), (peaks, "MiB at the peak"))):
                axes[row, column].plot(values, y, "o-", label=side)
                axes[row, column].set(ylabel=what, ylim=(0, None), xlim=(0, None), **({"xlabel": label} if row else {}))
                axes[row, column].grid(alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(path, dpi=80)
    print(f"Wrote {path}")


def main():
    parser = new_parser(__doc__)
    parser.add_argument("group", nargs="?", default="all", choices=(*CASES, "epoch", "scaling", "all"))
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each side (5)")
    parser.add_argument("--device", default=CONFIG.device)
    parser.add_argument("--pictures", type=int, default=210_000, help="of an epoch (210000)")
    parser.add_argument("--batch_size", type=int, default=CONFIG.batch_size, help=f"of an epoch ({CONFIG.batch_size})")
    parser.add_argument("--workers", type=int, default=CONFIG.workers, help=f"of an epoch ({CONFIG.workers})")
    parser.add_argument("--json", metavar="FILE", help="also write the table here")
    parser.add_argument("--plot", metavar="FILE", default=Path(__file__).parent / "scaling.png",
                        help="where scaling draws its curves (benchmarks/scaling.png)")
    args = parser.parse_args()
    device = get_device(replace(CONFIG, device=args.device))
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else \
        f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()} {chip}, Python {platform.python_version()}, torch "
          f"{torch.__version__}, torchvision {torchvision.__version__}; {args.rounds} rounds")
    if args.group == "epoch":
        return epochs(device, args.pictures, args.batch_size, args.workers)
    if args.group == "scaling":
        return scaling(device, args.rounds, args.plot)
    rates = measure_rates(device)
    print(", ".join(f"{name} {rate / 1e9:.0f} G{'B' if name == 'copy' else 'FLOP'}/s" for name, rate in rates.items()))
    print("\n| case | reference, s | product, s | speed-up (range) | memory, product / reference | compute bound, s | "
          "bandwidth bound, s | of the bound |\n|---|---|---|---|---|---|---|---|", flush=True)
    rows = {}
    for group in CASES if args.group == "all" else [args.group]:
        for name, make in CASES[group].items():
            is_half = name.endswith("bf16") or (device.type == "cuda" and group == "train")
            rows[name] = summarise(name, compare(name, make, device, args.rounds), rates,
                                   "bfloat16" if is_half else "float32")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
