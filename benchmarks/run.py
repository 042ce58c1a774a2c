"""Speed and memory of this repository against the naive implementation in reference.py.

    python benchmarks/run.py train                   # one group: preprocess, train, score or eval
    python benchmarks/run.py all --json bench.json   # `make bench`; twenty minutes on two cores
    python benchmarks/run.py epoch                   # an epoch of AI Challenger on a GPU
    python benchmarks/run.py gpu --out FOLDER        # all that only a GPU can show: see gpu.py
    python benchmarks/run.py scaling --plot FILE     # against batch, caption length, vocabulary

The product is what train.py and eval.py run, as fast.choose decides; in `train_decoder_as_written`
it is models.py as written. The two sides run alternately, in a process each, so that other load on
the machine hits both. The first iteration of both is compared before anything is timed: the same
loss and gradients, or the same captions. A ratio is that of two neighbouring runs; the table has
the median and range. On a GPU a run of training is the mean of ten steps. Memory is the peak of the
first iteration minus what the process held before it (weights and inputs). Sizes are AI
Challenger's: 9,000 words, captions of 10 to 21 tokens, ResNet-101 at 256 pixels, 512 dimensions.
Weights and pictures are random, which takes the same time.
"""
import ctypes
import itertools
import json
import math
import multiprocessing.util
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import h5py
import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torch.autograd import DeviceType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the scripts are

import benchmarks.absent  # noqa: E402, F401
import fast  # noqa: E402
import pre_process  # noqa: E402
import train  # noqa: E402
from benchmarks import gpu, reference  # noqa: E402
from config import Config, new_parser  # noqa: E402
from datasets import (  # noqa: E402
    END, PAD, START, UNK, CaptionDataset, decode_caption, make_loader, word_list)
from decoding import beam_search  # noqa: E402
from fast.features import KeptFeatures  # noqa: E402
from models import DecoderWithAttention, Encoder  # noqa: E402
from scores import score  # noqa: E402
from self_critical import SelfCritical, draws_of_step  # noqa: E402
from state import Start, State, mean_loss  # noqa: E402
from utils import (  # noqa: E402
    UserError, autocast, get_device, keep_freed_memory, run_script)

CONFIG = Config(encoder_weights="none", dropout=0.0)  # dropout draws other numbers on each side
K = CONFIG.captions_per_image
SIDES = "reference", "product"


class Sizes(NamedTuple):
    """Of a batch."""

    pictures: int
    tokens: tuple[int, int] = (10, 21)  # fewest and most of a caption
    vocab_size: int = 9000


SIZES = dict(cpu=Sizes(12), cuda=Sizes(CONFIG.batch_size))


# --------------------------------------------------------------------------------------------------
# Inputs and models, the same for both sides


def make_word_map(size: int) -> dict[str, int]:
    words = [PAD, *(f"w{i}" for i in range(size - 4)), UNK, START, END]
    return {word: number for number, word in enumerate(words)}


def make_images(pictures: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (pictures, 256, 256, 3), generator=generator, dtype=torch.uint8)


def make_captions(sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """Random captions (B, K, T + 1) and their lengths (B, K)."""
    generator = torch.Generator().manual_seed(1)
    fewest, most = sizes.tokens
    shape = sizes.pictures, K
    lengths = torch.randint(fewest, most + 1, shape, generator=generator) + 1
    words = sizes.vocab_size - 3
    captions = torch.randint(1, words, (*shape, most + 1), generator=generator)
    return captions, lengths


def make_features(pictures: int, device: torch.device) -> torch.Tensor:
    """Grids like a ResNet-101's: fp16 (pictures, 8, 8, 2048), not negative."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(pictures, 8, 8, 2048, generator=generator).relu().half().to(device)


def make_models(side: str, config: Config, vocab_size: int, device: torch.device,
                talkative: bool = False) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Encoder and decoder in eval mode, with the same weights on both sides.

    The product's are as written. A talkative decoder generates captions of about twelve words.
    """
    torch.manual_seed(0)
    encoder = Encoder(config.encoder, "none")
    for module in encoder.modules():
        # Random residuals would add up to values that no trained network has.
        if isinstance(module, torchvision.models.resnet.Bottleneck):
            torch.nn.init.constant_(module.bn3.weight, 0.1)
    torch.manual_seed(0)
    sizes = (config.attention_dim, config.emb_dim, config.decoder_dim, vocab_size, encoder.dim,
             config.dropout)
    decoder = DecoderWithAttention(*sizes)
    if talkative:
        make_talkative(decoder, make_word_map(vocab_size))
    if side == "reference":
        naive_encoder = reference.Encoder(config.encoder).requires_grad_(False)
        naive_decoder = reference.DecoderWithAttention(*sizes)
        naive_encoder.load_state_dict(encoder.state_dict())
        naive_decoder.load_state_dict(decoder.state_dict())
        encoder, decoder = naive_encoder, naive_decoder
    return encoder.to(device).eval(), decoder.to(device).eval()


def make_state(config: Config, vocab_size: int, device: torch.device,
               talkative: bool = False) -> State:
    """A run of train.py that begins with the models of make_models."""
    start = Start(config, {}, Path("checkpoint.pth.tar"))
    state = State(start, make_word_map(vocab_size), 0, device)
    encoder, decoder = make_models("product", config, vocab_size, device, talkative)
    state.encoder.load_state_dict(encoder.state_dict())
    state.decoder.load_state_dict(decoder.state_dict())
    if config.fine_tune_encoder:
        state.encoder.fine_tune("top")  # as with ImageNet's weights
    return state


def make_talkative(decoder: DecoderWithAttention, word_map: dict[str, int]) -> None:
    """Let random weights end a caption after about twelve words, as trained ones do.

    Left alone they end it at once or never. One unit of the LSTM counts the steps, and <end> waits
    for it; the other words become clear choices.
    """
    unit = 0
    end = word_map[END]
    lstm = decoder.decode_step
    biases = -2.5, 12.0, 12.0, 12.0  # i, f, g, o: little in, nothing forgotten, all shown
    for gate, bias in enumerate(biases):
        row = gate * lstm.hidden_size + unit
        lstm.weight_ih.data[row] = 0
        lstm.weight_hh.data[row] = 0
        lstm.bias_ih.data[row] = bias
        lstm.bias_hh.data[row] = 0
    decoder.init_c.weight.data[unit] *= 4  # the count starts differently for each picture
    decoder.embedding.weight.data *= 5
    decoder.fc.weight.data *= 40
    decoder.fc.weight.data[:, unit] = 0
    decoder.fc.weight.data[end] = 0
    decoder.fc.weight.data[end, unit] = 300
    decoder.fc.bias.data[end] = -230


def pool(grid: torch.Tensor) -> torch.Tensor:
    """The last layer of reference.Encoder: (N, 8, 8, D) -> (N, 14, 14, D)."""
    pooled = torch.nn.functional.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2), 14)
    return pooled.permute(0, 2, 3, 1)


def make_photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Noise with as much detail as a photograph: 200 KB at 1000 x 700 and quality 90."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency += 1 / max(width, height)
    channels = []
    for _ in range(3):
        spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency**1.5
        channel = np.fft.irfft2(spectrum, (height, width))
        channels.append((channel - channel.mean()) / channel.std())
    luma, red, blue = channels
    rgb = np.stack([luma + 0.3 * red, luma, luma + 0.3 * blue], axis=2)
    return Image.fromarray((128 + 55 * rgb).clip(0, 255).astype(np.uint8))


# --------------------------------------------------------------------------------------------------
# Cases


class Case(NamedTuple):
    iteration: Callable[[], object]  # what is timed
    outcome: Callable[[], dict]  # what the two sides must agree on, of the last iteration
    steps: int = 1  # iterations per timing


def train_case(side: str, device: torch.device, start: str = "features", precision: str = "float32",
               as_written: bool = False, sizes: Sizes | None = None) -> Case:
    """A training step, with clipping and Adam.

    Args:
        start: features, pixels (through the frozen encoder), or kept (pixels, but the product has
            their features).
        precision, as_written: of the product.
    """
    config = replace(CONFIG, precision=precision, fast=not as_written)
    sizes = sizes or SIZES[device.type]
    if side == "product":
        return train_product(make_state(config, sizes.vocab_size, device), start, sizes)

    given, captions, lengths = make_batch(sizes, start, device)
    encoder, decoder = make_models(side, config, sizes.vocab_size, device)
    captions = captions.flatten(0, 1)
    lengths = lengths.flatten().to(device)

    def loss_of_batch():
        if start == "features":
            grid = pool(given.float()).repeat_interleave(K, 0)
        else:  # as many pictures at a time as the product takes
            parts = given.repeat_interleave(K, 0).split(sizes.pictures)
            grid = torch.cat([encoder(part) for part in parts])
        scores, alphas = decoder(grid, captions, lengths)
        return reference.caption_loss(scores, alphas, captions, lengths, config.alpha_c)

    return reference_step(loss_of_batch, decoder.train(), config.decoder_lr, config.grad_clip)


def train_product(state: State, start: str, sizes: Sizes,
                  edit: Callable[[fast.Models], fast.Models] = lambda models: models) -> Case:
    """The product's side of train_case; `edit` may let another decoder run."""
    given, captions, lengths = make_batch(sizes, start, state.device)
    models = train.prepare(state, None, None)
    if start == "kept":
        given = models.encoder(given).half()
    if start != "pixels":
        models = models._replace(training_encoder=KeptFeatures(None))
    models = edit(models)
    models.training_encoder.train()
    models.training_decoder.train()
    objective = partial(train.cross_entropy, state.config)
    return product_step(state, models, objective, (given, captions, lengths))


def make_batch(sizes: Sizes, start: str, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Features or pictures, captions, and their lengths, which stay on the CPU."""
    captions, lengths = make_captions(sizes)
    if start == "features":
        given = make_features(sizes.pictures, device)
    else:
        given = make_images(sizes.pictures).to(device)
    return given, captions.to(device), lengths


def self_critical_case(side: str, device: torch.device) -> Case:
    """A self-critical step from given features: 5 samples per picture, their rewards, the update.

    The reference draws one caption after the other, rewarded by pycocoevalcap. Document frequencies
    are those of the batch's own captions, about 12 words long, as the samples are.
    """
    config = replace(CONFIG, self_critical=True)
    sizes = SIZES[device.type]
    word_map = make_word_map(sizes.vocab_size)
    captions, lengths = make_captions(sizes)
    features = make_features(sizes.pictures, device)

    if side == "product":
        state = make_state(config, sizes.vocab_size, device, talkative=True)
        models = train.prepare(state, None, None)._replace(training_encoder=KeptFeatures(None))
        models.training_decoder.eval()
        dataset = SimpleNamespace(captions=captions, caption_lengths=lengths)
        objective = SelfCritical(dataset, config, word_map, device)
        return product_step(state, models, objective, (features, captions.to(device), lengths))

    _, decoder = make_models(side, config, sizes.vocab_size, device, talkative=True)
    draws = draws_of_step(config, 0).to(device)

    def loss_of_batch():
        grid = pool(features.float())
        samples = []
        for i, k in itertools.product(range(sizes.pictures), range(config.samples)):
            draw = draws[i, k].tolist()
            samples.append(reference.sample(decoder, grid[i:i + 1], draw, word_map))
        rewards = reference.rewards(samples, captions[:, :, 1:].tolist())
        return reference.self_critical_loss(decoder, grid, samples, rewards, word_map)

    step = reference_step(loss_of_batch, decoder, config.self_critical_lr,
                          config.self_critical_clip)
    return step._replace(steps=1)  # which takes seconds


def product_step(state: State, models: fast.Models, objective: Callable, batch: tuple) -> Case:
    """A step as train_one_epoch takes it."""
    def step():
        with autocast(state.config, state.device):
            terms, counts = objective(models, *batch, step=0)
        loss = mean_loss(terms, counts)
        state.update(loss, needs_norm=False)
        return loss

    return training_case(step, state.decoder)


def reference_step(loss_of_batch: Callable[[], torch.Tensor], decoder: torch.nn.Module, rate: float,
                   clip: float) -> Case:
    optimizer = torch.optim.Adam(decoder.parameters(), lr=rate)

    def step():
        loss = loss_of_batch()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_value_(decoder.parameters(), clip)
        optimizer.step()
        return loss

    return training_case(step, decoder)


def training_case(step: Callable[[], torch.Tensor], decoder: torch.nn.Module) -> Case:
    """Both sides must agree on loss and clipped gradient."""
    result = {}

    def iteration():
        result["loss"] = step().detach()
        return result["loss"]

    def outcome():
        gradients = [p.grad.flatten().float().cpu() for p in decoder.parameters()]
        return dict(loss=result["loss"].item(), gradient=torch.cat(gradients).numpy())

    is_on_gpu = next(decoder.parameters()).is_cuda
    # The CPU queues the next step while a GPU works.
    return Case(iteration, outcome, steps=10 if is_on_gpu else 1)


def eval_case(side: str, device: torch.device, start: str, beam_size: int = 5,
              pictures: int = 64) -> Case:
    """Captions by beam search. `start`: features or pixels."""
    torch.backends.cudnn.allow_tf32 = False  # on both sides, whose captions must be identical
    vocab_size = SIZES[device.type].vocab_size
    word_map = make_word_map(vocab_size)
    result = []
    encoder, decoder = make_models(side, CONFIG, vocab_size, device, talkative=True)
    images = make_images(pictures).to(device)
    features = make_features(pictures, device).float()
    if side == "product":
        models = fast.choose(encoder, decoder, CONFIG)

    @torch.no_grad()
    def search_all():
        grid = features
        if start == "pixels":
            grid = torch.cat([models.encoder(part) for part in images.split(CONFIG.batch_size)])
        found = beam_search(models.decoder.eval(), grid, beam_size, CONFIG.max_len, word_map)
        result[:] = [[word for word in words if word] for words in found.words[:, 0].tolist()]

    @torch.no_grad()
    def search_one_by_one():
        result.clear()
        for i in range(pictures):
            grid = encoder(images[i:i + 1]) if start == "pixels" else pool(features[i:i + 1])
            ids, *_ = reference.beam_search(decoder, grid, beam_size, CONFIG.max_len, word_map)
            result.append(ids)

    search = search_all if side == "product" else search_one_by_one
    return Case(search, lambda: dict(captions=list(result)))


def preprocess_case(side: str, device: torch.device, pictures: int = 96) -> Case:
    """JPEGs of 1000 x 700 from the disk into HDF5: as pre_process.py does, or one after the other,
    each decoded whole."""
    folder = tempfile.TemporaryDirectory()  # until nothing below holds it any more
    root = Path(folder.name)
    rng = np.random.default_rng(0)
    names = [f"{i}.jpg" for i in range(pictures)]
    for name in names:
        make_photograph(rng, 1000, 700).save(root / name, quality=90)
    if side == "product":
        workers = ProcessPoolExecutor()
        # Python waits for them at exit, after closing (at priority 10) the queue that would tell
        # them to end.
        multiprocessing.util.Finalize(None, workers.shutdown, exitpriority=11)
        list(workers.map(str, range(64)))  # start them before anything is timed

    def write_by_workers():
        (root / "train.h5").unlink(missing_ok=True)
        config = replace(CONFIG, data_dir=folder.name)
        source = pre_process.Source(root, {name: ["w1"] for name in names})
        tokens = {name: [["w1"]] for name in names}
        pre_process.write_split(workers, config, "train", source, tokens, make_word_map(10))

    def write_one_by_one():
        with h5py.File(root / "train.h5", "w") as file:
            images = file.create_dataset("images", (pictures, 256, 256, 3), np.uint8)
            for i, name in enumerate(names):
                picture = Image.open(root / name).convert("RGB")
                images[i] = np.asarray(picture.resize((256, 256), Image.Resampling.BILINEAR))

    def outcome():
        with h5py.File(Path(folder.name) / "train.h5") as file:
            return dict(pixels=file["images"][:])

    return Case(write_by_workers if side == "product" else write_one_by_one, outcome)


def score_case(side: str, device: torch.device, pictures: int = 5000) -> Case:
    """BLEU-1 to 4, ROUGE-L and CIDEr-D of captions of 8 to 14 words with five references each,
    beside pycocoevalcap's."""
    rng = np.random.default_rng(0)
    result, references, captions = {}, [], []
    for _ in range(pictures):
        # Frequent words, and every other place mostly the picture's own word.
        words = rng.zipf(1.3, (K + 1, 14)) % SIZES["cpu"].vocab_size
        own = rng.random((K + 1, 7)) < 0.7
        words[:, ::2] = np.where(own, words[0, ::2], words[:, ::2])
        sentences = [[f"w{word}" for word in row[:rng.integers(8, 15)]] for row in words]
        captions.append(sentences[0])
        references.append(sentences[1:])
    compute = score if side == "product" else reference.score
    return Case(lambda: result.update(compute(captions, references)), lambda: dict(scores=result))


CASES = {
    "preprocess": dict(preprocess=preprocess_case),
    "train": dict(train_decoder=train_case,
                  train_decoder_as_written=partial(train_case, as_written=True),
                  train_frozen_fp32=partial(train_case, start="pixels"),
                  train_frozen_bf16=partial(train_case, start="pixels", precision="bfloat16"),
                  train_kept_features=partial(train_case, start="kept"),
                  train_self_critical=self_critical_case),
    "score": dict(score=score_case),
    "eval": dict(eval_beam5_decode=partial(eval_case, start="features"),
                 eval_beam5=partial(eval_case, start="pixels")),
}


# --------------------------------------------------------------------------------------------------
# The two sides, each in a process of its own

held = None  # in such a process: device, Case


def set_up(make: Callable[..., Case], side: str, device: str) -> None:
    global held
    device = get_device(replace(CONFIG, device=device))
    held = device, make(side, device)
    if side == "product":
        keep_freed_memory()  # as train.py does


def first_iteration() -> tuple[int | None, dict]:
    """Peak memory in bytes, above what was held before; what the sides must agree on."""
    device, case = held
    before = memory(device, reset=True)
    case.iteration()
    peak = None if before is None else memory(device) - before
    return peak, case.outcome()


def timed() -> float:
    """Seconds an iteration."""
    device, case = held
    start = time.perf_counter()
    for _ in range(case.steps):
        case.iteration()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / case.steps


def busy() -> float | None:
    """The share of an iteration's time that a GPU works; None on a CPU."""
    device, case = held
    if device.type != "cuda":
        return None
    seconds = timed()  # without the profiler, which costs time
    activities = [torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=activities) as profile:
            timed()
        # What the host does is charged with the kernels that it starts, and a range with its own.
        working = sum(event.self_device_time_total for event in profile.key_averages()
                      if event.device_type == DeviceType.CUDA and not event.is_user_annotation)
    except Exception as error:  # not every container lets a profiler in
        print(f"no profile: {error}", file=sys.stderr)
        return None
    return working / 1e6 / case.steps / seconds or None


def memory(device: torch.device, reset: bool = False) -> int | None:
    """Peak memory in bytes since the last reset; at a reset, what is held now.

    None where the system does not say.
    """
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        return torch.cuda.max_memory_allocated()
    try:
        if reset:
            # Or what setting up has freed would be used again unseen.
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except (OSError, AttributeError):  # no glibc, no /proc
        return None
    field = "VmRSS:" if reset else "VmHWM:"
    kilobytes = status.split(field)[1].split()[0]
    return int(kilobytes) * 1024


class Comparison(NamedTuple):
    seconds: list[dict[str, float]]  # of each round, by side
    peaks: dict[str, int | None]  # bytes by side
    busy: float | None  # share of the product's time that a GPU works
    agreement: str  # in what the two sides agree, and how nearly; or that they do not


def compare(name: str, make: Callable[..., Case], device: torch.device, rounds: int,
            must_agree: bool = True) -> Comparison:
    """Run the two sides of a case alternately. Raises UserError where they must agree and do not.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as naive, ProcessPoolExecutor(1, context) as product:
        pools = dict(zip(SIDES, (naive, product)))
        for begun in [pools[side].submit(set_up, make, side, str(device)) for side in SIDES]:
            begun.result()
        peaks, outcomes = {}, {}
        for side, pool_of_side in pools.items():
            peaks[side], outcomes[side] = pool_of_side.submit(first_iteration).result()
        try:
            agreement = check(name, outcomes["reference"], outcomes["product"])
        except UserError as error:
            if must_agree:
                raise
            agreement = str(error)
        warm_up = 1 if device.type == "cuda" else 0  # the second iteration records graphs
        seconds = []
        for _ in range(warm_up + rounds):
            seconds.append({side: pools[side].submit(timed).result() for side in SIDES})
        working = product.submit(busy).result()
    return Comparison(seconds[warm_up:], peaks, working, agreement)


def check(name: str, expected: dict, found: dict) -> str:
    """How nearly both sides gave the same, in words. Raises UserError where that is not as nearly
    as the arithmetic allows."""
    if "captions" in expected:
        right = found == expected
        what = "captions"
    elif "scores" in expected:
        pairs = ((found["scores"][key], value) for key, value in expected["scores"].items())
        difference = max(abs(ours - theirs) for ours, theirs in pairs)
        right = difference < 1e-6
        what = f"scores by {difference:.1e}"
    elif "pixels" in expected:
        difference = np.abs(found["pixels"].astype(np.float32) - expected["pixels"]).mean()
        right = difference < 1
        what = f"pixels: {difference:.2f} grey levels apart on average"
    else:
        loss = abs(found["loss"] / expected["loss"] - 1)
        apart = np.linalg.norm(found["gradient"] - expected["gradient"])
        gradient = apart / np.linalg.norm(expected["gradient"])
        loss_limit, gradient_limit = limits(name)
        right = loss < loss_limit and gradient < gradient_limit
        what = f"loss by {loss:.1e}, gradient by {gradient:.1e}"
    verdict = "agree" if right else "differ"
    print(f"{name}: both sides {verdict} ({what})", file=sys.stderr, flush=True)
    if not right:
        raise UserError(f"{name}: the product does not give what the reference gives: {what}")
    return f"agree ({what})"


def limits(name: str) -> tuple[float, float]:
    """The relative errors of loss and gradient that a case may have."""
    if name == "train_frozen_bf16":  # of 8 bits
        return 1e-2, 1e-1
    # A GPU's convolutions round float32 to TF32, of 11 bits.
    is_tf32 = name == "train_frozen_fp32" and torch.cuda.is_available()
    if name == "train_kept_features" or is_tf32:  # fp16 has 11 bits
        return 1e-3, 1e-2
    return 1e-5, 1e-4


# --------------------------------------------------------------------------------------------------
# Whole epochs


class RandomDataset(CaptionDataset):
    """Random pictures and captions of AI Challenger's sizes.

    Pictures repeat, but in a file of full length; those of the first `first` belong to another set.
    """

    def __init__(self, path: Path, pictures: int, first: int = 0):
        self.path = path
        self.shape = pictures, 256, 256, 3
        self.offset = first * math.prod(self.shape[1:])
        self.image_ids = range(pictures)
        sizes = SIZES["cpu"]._replace(pictures=pictures)
        self.captions, self.caption_lengths = make_captions(sizes)


def epochs(device: torch.device, pictures: int, batch_size: int, workers: int) -> None:
    """Time epochs with the frozen encoder, with kept features, and with the encoder trained too, on
    an eighth of the pictures."""
    print(f"{pictures} training pictures and a seventh for validation, batches of {batch_size}, "
          f"{workers} workers\n")
    print("| epoch | training, s | images/s | GiB | validation, s | of which scores, s |\n"
          "|---|---|---|---|---|---|", flush=True)
    kinds = {"frozen": pictures, "kept": pictures, "fine-tuned": pictures // 8}
    for kind, row in epoch_rows(kinds, device, batch_size, workers):
        print(f"| {kind} | {row['seconds']:.1f} | {row['images_per_s']:.0f} | {row['gib']:.1f} | "
              f"{row['validation_s']:.1f} | {row['scores_s']:.1f} |", flush=True)


def epoch_rows(kinds: dict[str, int], device: torch.device, batch_size: int,
               workers: int) -> Iterator[tuple[str, dict]]:
    """The times of epochs of so many pictures, by kind. One validation picture for seven of
    training.

    The pictures are in a file in TMPDIR, 47 GB of them for an epoch of AI Challenger.
    """
    most = max(kinds.values())
    total = most + math.ceil(most / 7)
    with tempfile.NamedTemporaryFile(suffix=".h5") as file:
        shape = min(total, 4096), 256, 256, 3
        some = np.random.default_rng(0).integers(0, 256, shape, np.uint8).tobytes()
        for start in range(0, total, 4096):
            file.write(some[:(total - start) * 256 * 256 * 3])
        file.flush()
        for kind, n in kinds.items():
            config = replace(CONFIG, precision="auto", batch_size=batch_size, workers=workers,
                             fine_tune_encoder=kind == "fine-tuned")
            train_set = RandomDataset(Path(file.name), n)
            valid_set = RandomDataset(Path(file.name), math.ceil(n / 7), first=most)
            seconds = time_training(kind, train_set, config, device)
            gib = (memory(device) or 0) / 2**30
            validation, scores = time_validation(kind, valid_set, config, device)
            yield kind, dict(pictures=n, seconds=seconds, images_per_s=n / seconds, gib=gib,
                             validation_s=validation, scores_s=scores)


def time_training(kind: str, dataset: CaptionDataset, config: Config,
                  device: torch.device) -> float:
    """Seconds of train_one_epoch."""
    state = make_state(config, SIZES[device.type].vocab_size, device)
    models = train.prepare(state, None, None)
    if kind == "kept":
        models = models._replace(training_encoder=keep_random_features(dataset, device))
    loader = make_loader(dataset, config, True)
    log = SimpleNamespace(reading=lambda reading, step: None)
    warm_up = max(len(loader) - 20, 0)  # the last batches
    for first in (warm_up, 0):
        state.progress.batch = first
        memory(device, reset=True)
        start = time.perf_counter()
        train.train_one_epoch(state, models, partial(train.cross_entropy, config), loader, log,
                              pause=lambda: None)
        seconds = time.perf_counter() - start
    return seconds


def time_validation(kind: str, dataset: CaptionDataset, config: Config,
                    device: torch.device) -> tuple[float, float]:
    """What train.py does after an epoch: teacher-forced loss, greedy captions, their scores.

    The weights are not those of training, whose captions for noise may be of any length.

    Returns seconds, and those of them that the scores take.
    """
    state = make_state(config, SIZES[device.type].vocab_size, device, talkative=True)
    models = train.prepare(state, None, None)
    if kind == "kept":
        models = models._replace(encoder=keep_random_features(dataset, device))
    words = word_list(state.word_map)
    references = []
    for captions, lengths in zip(dataset.captions.tolist(), dataset.caption_lengths.tolist()):
        human = [decode_caption(ids[1:n - 1], words) for ids, n in zip(captions, lengths)]
        references.append(human)
    config = train.for_validation(config, device)
    few = list(range(min(config.batch_size, len(dataset))))
    warm_up = [dataset[few]]
    for loader in (warm_up, make_loader(dataset, config, False)):
        start = time.perf_counter()
        _, captions = train.validate(state, models, loader, pause=lambda: None)
        generated = time.perf_counter()
    score([caption["words"] for caption in captions], references)
    end = time.perf_counter()
    return end - start, end - generated


def keep_random_features(dataset: CaptionDataset, device: torch.device) -> KeptFeatures:
    """Random features on the device for the data set, whose batches then begin with rows."""
    features = make_features(min(len(dataset), 1024), device)
    kept = torch.empty(len(dataset), *features.shape[1:], dtype=torch.float16, device=device)
    for part in kept.split(1024):
        part.copy_(features[:len(part)])
    dataset.begins_with = "rows"
    return KeptFeatures(kept)


# --------------------------------------------------------------------------------------------------
# Tables and curves


def summarise(name: str, found: Comparison) -> dict[str, float | None]:
    """Print a case's line of the table; what --json writes of it."""
    ratios = [seconds["reference"] / seconds["product"] for seconds in found.seconds]
    memory_ratio = None
    if found.peaks["reference"]:
        memory_ratio = found.peaks["product"] / found.peaks["reference"]
    row = dict(reference_s=statistics.median(seconds["reference"] for seconds in found.seconds),
               product_s=statistics.median(seconds["product"] for seconds in found.seconds),
               ratio=statistics.median(ratios), ratio_min=min(ratios), ratio_max=max(ratios),
               memory_ratio=memory_ratio, busy=found.busy, agreement=found.agreement)
    memory_text = "-" if memory_ratio is None else f"{memory_ratio:.2f}"
    print(f"| {name} | {row['reference_s']:.3f} | {row['product_s']:.3f} | {row['ratio']:.1f} "
          f"({row['ratio_min']:.1f}-{row['ratio_max']:.1f}) | {memory_text} |", flush=True)
    return row


def scaling(device: torch.device, rounds: int, path: Path) -> None:
    """Draw time and memory of a decoder's training step, on both sides, against batch, caption and
    vocabulary size."""
    base = SIZES[device.type]
    columns = {
        "pictures a batch": {n: base._replace(pictures=n) for n in (3, 6, 12, 24)},
        "tokens a caption": {n: base._replace(tokens=(n, n)) for n in (5, 10, 20, 40)},
        "words": {n: base._replace(vocab_size=n) for n in (3000, 9000, 18000, 36000)},
    }
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    axes = figure.subplots(2, len(columns), sharex="col")
    for (label, sizes_of), (time_axis, memory_axis) in zip(columns.items(), axes.T):
        times = {side: [] for side in SIDES}  # seconds a step
        peaks = {side: [] for side in SIDES}  # MiB
        for value, sizes in sizes_of.items():
            found = compare("scaling", partial(train_case, sizes=sizes), device, rounds)
            for side in SIDES:
                seconds = statistics.median(both[side] for both in found.seconds)
                times[side].append(seconds)
                peaks[side].append((found.peaks[side] or 0) / 2**20)
                print(f"{label} {value}, {side}: {seconds:.3f} s, {peaks[side][-1]:.0f} MiB",
                      flush=True)
        for side in SIDES:
            time_axis.plot(list(sizes_of), times[side], "o-", label=side)
            memory_axis.plot(list(sizes_of), peaks[side], "o-", label=side)
        time_axis.set(ylabel="s a step", xlim=(0, None), ylim=(0, None))
        memory_axis.set(ylabel="MiB at the peak", ylim=(0, None), xlabel=label)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(path, dpi=80)
    print(f"Wrote {path}")


def main() -> None:
    parser = new_parser(__doc__)
    groups = *CASES, "epoch", "scaling", "gpu", "all"
    parser.add_argument("group", nargs="?", default="all", choices=groups)
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each side (5)")
    parser.add_argument("--device", default=CONFIG.device)
    parser.add_argument("--pictures", type=int, default=210_000, help="of an epoch (210000)")
    parser.add_argument("--batch_size", type=int, default=CONFIG.batch_size,
                        help=f"of an epoch ({CONFIG.batch_size})")
    parser.add_argument("--workers", type=int, default=CONFIG.workers,
                        help=f"of an epoch ({CONFIG.workers})")
    parser.add_argument("--json", metavar="FILE", help="also write the table here")
    parser.add_argument("--plot", metavar="FILE", default=Path(__file__).parent / "scaling.png",
                        help="where scaling draws its curves (benchmarks/scaling.png)")
    gpu.add_flags(parser)
    args = parser.parse_args()
    if args.group == "gpu":
        return gpu.run_parts(args)
    device = get_device(replace(CONFIG, device=args.device))
    if device.type == "cuda":
        chip = torch.cuda.get_device_name(device)
    else:
        chip = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()} {chip}, "
          f"Python {platform.python_version()}, torch {torch.__version__}, "
          f"torchvision {torchvision.__version__}; {args.rounds} rounds")
    if args.group == "epoch":
        return epochs(device, args.pictures, args.batch_size, args.workers)
    if args.group == "scaling":
        return scaling(device, args.rounds, args.plot)
    print("\n| case | reference, s | product, s | speed-up (range) | "
          "memory, product / reference |\n|---|---|---|---|---|", flush=True)
    rows = {}
    for group in CASES if args.group == "all" else [args.group]:
        for name, make in CASES[group].items():
            rows[name] = summarise(name, compare(name, make, device, args.rounds))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
