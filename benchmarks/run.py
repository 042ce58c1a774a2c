"""How fast this repository is, against the plain implementation in reference.py: same numbers, less time and memory.

    python benchmarks/run.py train                        # one group: preprocess, train, eval or scaling
    python benchmarks/run.py all --json results.json      # `make bench`; about twenty minutes on two cores
    python benchmarks/run.py epoch                        # AI Challenger's epoch, on a GPU: training and validation
    python benchmarks/run.py scaling --plot scaling.png   # time and memory against batch, caption length, vocabulary

Each case runs the two sides in processes of their own, in turns, so that what else the machine does befalls both. A
first turn each is not counted; in it both must give the same loss and gradients, or the same captions. On a GPU a turn
of training is ten steps, the time given their mean. A ratio is that of two neighbouring turns; given are the median and
the range of the ratios. Memory is the peak of the first turn above what the side held before it (weights and input).
The sizes are AI Challenger's: 9,000 words, captions of 10 to 21 tokens, ResNet-101 at 256 pixels, 512 dimensions, with
random weights and pictures, which take the same time.

Two floors say how much faster it could be at all: the product's multiplications and additions over the rate of a large
matrix product, and the bytes that its products and convolutions read and write, each once, over the rate of a copy.
"""
import argparse
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the scripts are

import pre_process  # noqa: E402
from benchmarks import reference  # noqa: E402
from config import Config, UserError, run  # noqa: E402
from datasets import END, PAD, START, UNK, CaptionDataset, decode_caption, make_loader, word_list  # noqa: E402
from models import DecoderWithAttention, Encoder, beam_search, caption_loss, kernels  # noqa: E402
from scores import score  # noqa: E402
from train import (KeptFeatures, Replayed, frozen, make_optimizers, mixed_precision, parameters,  # noqa: E402
                   train_one_epoch, validate)
from utils import get_device, keep_freed_memory  # noqa: E402

CONFIG = Config(encoder_weights="none", dropout=0.0)  # dropout draws other numbers on each side
PICTURES, K, TOKENS, V = dict(cpu=12, cuda=CONFIG.batch_size), 5, (10, 21), 9000


# ---------------------------------------------------------------------------------------------------------------------
# What both sides work on


def make_word_map(size):
    return {word: number for number, word in enumerate([PAD, *(f"w{i}" for i in range(size - 4)), UNK, START, END])}


def make_batch(pictures, tokens, vocab_size, device, images=True):
    """Random captions with so many (lowest, highest) tokens, and pictures. Returns: images, captions, lengths (CPU)."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(tokens[0], tokens[1] + 1, (pictures, K), generator=generator) + 1
    captions = torch.randint(1, vocab_size - 3, (pictures, K, tokens[1] + 1), generator=generator)
    size = (pictures if images else 0, 256, 256, 3)
    images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    return images.to(device), captions.to(device), lengths


def make_features(pictures, device):
    """Grids like a ResNet-101's: fp16 (pictures, 8, 8, 2048), not negative."""
    return torch.randn(pictures, 8, 8, 2048, generator=torch.Generator().manual_seed(2)).relu().half().to(device)


def make_decoder(vocab_size, side, word_map=None):
    """The same decoder for both sides; one that writes captions of about twelve words where a word map is given."""
    torch.manual_seed(0)
    dims = CONFIG.attention_dim, CONFIG.emb_dim, CONFIG.decoder_dim, vocab_size, 2048, 0.0
    decoder = DecoderWithAttention(*dims)
    if word_map:
        make_talkative(decoder, word_map)
    if side == "product":
        return decoder
    plain = reference.DecoderWithAttention(*dims)
    plain.load_state_dict(decoder.state_dict())
    return plain


def make_encoder(side):
    """The same ResNet-101 for both sides."""
    torch.manual_seed(0)
    encoder = Encoder(CONFIG.encoder, "none")
    for module in encoder.modules():  # random residuals would add up to numbers that no trained network has
        if isinstance(module, torchvision.models.resnet.Bottleneck):
            torch.nn.init.constant_(module.bn3.weight, 0.1)
    if side == "product":
        return encoder
    plain = reference.Encoder(CONFIG.encoder, CONFIG.encoded_image_size)
    plain.load_state_dict(encoder.state_dict())
    return plain.eval().requires_grad_(False)


def pool(grid):
    """The last layer of reference.Encoder alone: (N, 8, 8, D) -> (N, 14, 14, D)."""
    return torch.nn.functional.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2), 14).permute(0, 2, 3, 1)


def make_talkative(decoder, word_map):
    """Let random weights write captions of about twelve words, as trained ones do; otherwise they end at once or never.

    One unit of the LSTM counts the steps, and <end> waits for it; the other words become clear choices.
    """
    unit, end, lstm, fc = 0, word_map[END], decoder.decode_step, decoder.fc
    for gate, bias in enumerate((-2.5, 12.0, 12.0, 12.0)):  # i, f, g, o: little in, nothing forgotten, all shown
        row = gate * CONFIG.decoder_dim + unit
        for parameter, value in ((lstm.weight_ih, 0), (lstm.weight_hh, 0), (lstm.bias_ih, bias), (lstm.bias_hh, 0)):
            parameter.data[row] = value
    decoder.init_c.weight.data[unit] *= 4  # pictures begin to count at numbers of their own
    decoder.embedding.weight.data *= 5
    fc.weight.data *= 40
    fc.weight.data[:, unit], fc.weight.data[end] = 0, 0
    fc.weight.data[end, unit], fc.bias.data[end] = 300, -230


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
# Cases: each gives a function that does one turn, and one that says, after the first, what both sides must agree in


def train_case(side, device, encoder="none", precision="float32", pictures=None, tokens=TOKENS, vocab_size=V):
    """A training step, with clipping and Adam, from images or from their features on.

    Args:
        side (str): reference or product. device (torch.device). precision (str): of the product.
        encoder (str): none (both have the features), frozen (both run it), or kept (the product has the features).
    """
    config = Config(encoder_weights="none", dropout=0.0, precision=precision)
    pictures = pictures or PICTURES[device.type]
    images, captions, lengths = make_batch(pictures, tokens, vocab_size, device)
    decoder = make_decoder(vocab_size, side).to(device).train()
    model = make_encoder(side).to(device) if encoder != "none" else None
    if model and side == "product":
        model = frozen(model, config, device)
    features = make_features(pictures, device) if encoder == "none" else None
    result = {}
    if side == "reference":
        optimizers = {"decoder": torch.optim.Adam(decoder.parameters(), lr=config.decoder_lr)}
        captions, lengths = captions.flatten(0, 1), lengths.flatten().to(device)

        def loss_of_batch():
            if model:  # as many pictures at a time as the product takes
                grid = torch.cat([model(part) for part in images.repeat_interleave(K, 0).split(pictures)])
            else:
                grid = pool(features.float()).repeat_interleave(K, 0)
            scores, alphas = decoder(grid, captions, lengths)
            return reference.caption_loss(scores, alphas, captions, lengths, config.alpha_c)
    else:
        optimizers = make_optimizers(config, model, decoder)
        n_tokens, n_captions = (lengths - 1).sum(), lengths.numel()
        if encoder == "kept":
            features = model(images).half()

        def loss_of_batch():
            with mixed_precision(config, device):
                grid = model(images) if features is None else features.float()
                scores, targets, alphas = decoder(grid, captions, lengths)
                cross_entropy, coverage = caption_loss(scores, targets, alphas, lengths)
            return cross_entropy / n_tokens + config.alpha_c * coverage / n_captions

    def turn():
        loss = loss_of_batch()
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_value_(parameters(optimizers), config.grad_clip)
        for optimizer in optimizers.values():
            optimizer.step()
        result["loss"] = loss.detach()

    turn.steps = 10 if device.type == "cuda" else 1  # a GPU works on one while the kernels of the next are started

    def agreed():
        return dict(loss=result["loss"].item(),
                    gradient=torch.cat([p.grad.flatten().float().cpu() for p in decoder.parameters()]).numpy())
    return turn, agreed


def eval_case(side, device, encoder, beam_size=5, pictures=64):
    """Captions of 64 pictures by beam search, from images or from their features on."""
    torch.backends.cudnn.allow_tf32 = False  # for both sides, whose captions shall be equal to the last
    word_map = make_word_map(V)
    decoder = make_decoder(V, side, word_map).to(device).eval()
    model = make_encoder(side).to(device) if encoder else None
    if model and side == "product":
        model = model.folded()
    images, features = make_batch(pictures, TOKENS, V, device)[0], make_features(pictures, device).float()
    max_len, result = CONFIG.max_len, []

    def turn():
        result.clear()
        with torch.no_grad():
            if side == "product":
                grid = torch.cat([model(part) for part in images.split(CONFIG.batch_size)]) if model else features
                found = beam_search(decoder, grid, beam_size, max_len, word_map)
                result.extend([word for word in words if word] for words in found.words.tolist())
            else:
                for i in range(pictures):
                    grid = model(images[i:i + 1]) if model else pool(features[i:i + 1])
                    result.append(reference.beam_search(decoder, grid, beam_size, max_len, word_map)[0])

    return turn, lambda: dict(captions=list(result))


def preprocess_case(side, device, pictures=96, size=(1000, 700)):
    """Photograph-sized JPEGs from the disk into HDF5: in one process and decoded whole, or as pre_process.py does."""
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    rng = np.random.default_rng(0)
    for i in range(pictures):
        make_photograph(rng, size).save(root / f"{i}.jpg", quality=90)
    names, config = [f"{i}.jpg" for i in range(pictures)], Config(data_dir=folder.name)
    word_map = make_word_map(10)
    source = dict(folder=root, image_ids=names, captions=[["w1"]] * pictures, empty=0, extra=0, no_caption=0)
    path = root / "train.h5"
    workers = ProcessPoolExecutor() if side == "product" else None
    if workers:
        list(workers.map(str, range(64)))  # started before the clock is

    def turn():
        path.unlink(missing_ok=True)
        if side == "product":
            pre_process.write_split(workers, config, "train", source, [[["w1"]]] * pictures, word_map, {})
        else:
            with h5py.File(path, "w") as file:
                images = file.create_dataset("images", (pictures, 256, 256, 3), np.uint8)
                for i, name in enumerate(names):
                    picture = Image.open(root / name).convert("RGB")
                    images[i] = np.asarray(picture.resize((256, 256), Image.Resampling.BILINEAR))

    def agreed():
        with h5py.File(path) as file:
            return dict(pixels=file["images"][:])
    agreed.folder = folder  # which lasts as long as this
    return turn, agreed


CASES = {
    "preprocess": dict(preprocess=preprocess_case),
    "train": dict(train_decoder=train_case,
                  train_frozen_fp32=partial(train_case, encoder="frozen"),
                  train_frozen_bf16=partial(train_case, encoder="frozen", precision="bfloat16"),
                  train_kept_features=partial(train_case, encoder="kept")),
    "eval": dict(eval_beam5_decode=partial(eval_case, encoder=False), eval_beam5=partial(eval_case, encoder=True)),
}


# ---------------------------------------------------------------------------------------------------------------------
# Turns


def serve(connection, make, side, device):
    """A side's process: a turn whenever asked. Sends (seconds, bytes of memory or None); at last what was agreed.

    What goes wrong is sent in the place of the answer, and ends the benchmark.
    """
    try:
        answer(connection, make, side, get_device(Config(device=device)))
    except Exception:
        connection.send(traceback.format_exc())
    finally:
        for process in multiprocessing.active_children():  # a pool's, which would be waited for
            process.kill()
        os._exit(0)


def answer(connection, make, side, device):
    if side == "product":
        keep_freed_memory()  # as train.py does
    turn, agreed = make(side, device)
    memory_of_first, result = None, None
    for order in iter(connection.recv, "stop"):
        if order == "count":  # operations and bytes of one turn
            Replayed.forward = lambda self, x: self.module(x)  # a graph's cannot be counted
            if kernels is not None:
                kernels.Loop.run = lambda self, what, T: getattr(self, what)(T)
            with FlopCounterMode(display=False) as flops, CountBytes() as traffic:
                turn()
            connection.send((flops.get_total_flops(), traffic.total))
            continue
        held = memory(device, reset=True)
        steps = 1 if result is None else getattr(turn, "steps", 1)
        start = time.perf_counter()
        for _ in range(steps):
            turn()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / steps
        if result is None:
            memory_of_first = memory(device) - held if held is not None else None
            result = agreed()
        connection.send((seconds, memory_of_first))
    connection.send(result)


def memory(device, reset=False):
    """Bytes held at the most since the last reset; at a reset, bytes held now. None where the system does not say."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        return torch.cuda.max_memory_allocated()
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.split("VmRSS:" if reset else "VmHWM:")[1].split()[0]) * 1024


class CountBytes(TorchDispatchMode):
    """What matrix products and convolutions read and write, each tensor once an operation."""

    total = 0
    counted = ("mm", "addmm", "bmm", "addmv", "mv", "convolution", "convolution_backward")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__.rstrip("_") in self.counted:
            for x in (*args, *(out if isinstance(out, tuple) else (out,))):
                self.total += x.numel() * x.element_size() if isinstance(x, torch.Tensor) else 0
        return out


def compare(name, make, device, rounds, sides=("reference", "product")):
    """Run both sides of a case in turns.

    Returns:
        dict: seconds (side -> list), memory (side -> bytes or None), operations, bytes (of the product).
    Raises:
        UserError: they do not agree.
    """
    context = multiprocessing.get_context("spawn")
    processes, ends = [], {}
    for side in sides:
        ends[side], other = context.Pipe()
        processes.append(context.Process(target=serve, args=(other, make, side, str(device)), daemon=False))
        processes[-1].start()
        other.close()
    seconds, held = {side: [] for side in sides}, {}
    try:
        not_counted = 2 if device.type == "cuda" else 1  # the second records graphs
        for number in range(rounds + not_counted):
            for side in sides:
                taken, held[side] = ask(ends[side], "turn")
                if number >= not_counted:
                    seconds[side].append(taken)
        operations, traffic = 0, 0
        if name != "preprocess":
            operations, traffic = ask(ends["product"], "count")
        results = {side: ask(ends[side], "stop") for side in sides}
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    if len(sides) == 2:
        check(name, *results.values())
    return dict(seconds=seconds, memory=held, operations=operations, bytes=traffic)


def ask(connection, order):
    """A side's answer to an order. Raises: RuntimeError: what went wrong there."""
    connection.send(order)
    answer = connection.recv()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer


def check(name, expected, found):
    """Raise UserError unless both sides gave the same: exactly, or as nearly as the arithmetic allows."""
    if "captions" in expected:
        right, what = found == expected, "captions"
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
    """Random pictures and captions in AI Challenger's sizes; pictures repeat, but lie in a file of full length.

    Args:
        path (Path): of the file. pictures (int). first (int): how many of another set lie before them.
    """

    def __init__(self, path, pictures, first=0):
        self.path, self.shape = path, (pictures, 256, 256, 3)
        self.offset = first * math.prod(self.shape[1:])
        self.image_ids = range(pictures)
        _, captions, lengths = make_batch(pictures, TOKENS, V, "cpu", images=False)
        self.captions, self.caption_lengths = captions, lengths


def epoch(device, pictures, batch_size, workers):
    """Time train_one_epoch and time_validation: with the frozen encoder, with kept features, and with the encoder
    trained too, on an eighth of the pictures. To seven of training there is one of validation.

    The pictures lie in a file in TMPDIR meanwhile, 47 GB of them.
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
            config = Config(encoder_weights="none", precision="auto", batch_size=batch_size, workers=workers,
                            fine_tune_encoder=kind == "fine-tuned")
            n = pictures if kind != "fine-tuned" else pictures // 8
            dataset, valid_set = RandomDataset(path, n), RandomDataset(path, math.ceil(n / 7), first=pictures)
            encoder, decoder = (model.to(device) for model in (make_encoder("product"), make_decoder(V, "product")))
            encoder.fine_tune("top" if kind == "fine-tuned" else "none")
            optimizers = make_optimizers(config, encoder, decoder)
            if kind == "kept":
                encoder = hold_features(dataset, device)
            elif kind == "frozen":
                encoder = frozen(encoder, config, device)
            loader = make_loader(dataset, config, True)
            for first in (max(len(loader) - 20, 0), 0):  # the last batches alone to begin with, for what is set up then
                state = dict(epoch=0, batch=first, step=0, seconds=0.0, reading={}, totals=[0.0] * 6,
                             recent=torch.zeros(6, dtype=torch.float64, device=device))
                memory(device, reset=True)
                with Usage() as usage:
                    start = time.perf_counter()
                    train_one_epoch(encoder, decoder, optimizers, loader, config, state, None, lambda: None)
                    seconds = time.perf_counter() - start
            row = f"| {kind} | {seconds:.1f} | {n / seconds:.0f} | {usage.mean:.0f}% | {memory(device) / 2**30:.1f} |"
            # Initial weights are validated: what a model has learnt to say of noise may be of any length.
            encoder = hold_features(valid_set, device) if kind == "kept" else make_encoder("product").to(device)
            validation, scores = time_validation(encoder.folded() if kind == "frozen" else encoder, valid_set, config,
                                                 device)
            print(f"{row} {validation:.1f} | {scores:.1f} |", flush=True)
            encoder = decoder = optimizers = loader = None


def hold_features(dataset, device):
    """Let a data set's batches begin with rows. Returns: KeptFeatures, which holds random ones on the device."""
    features = make_features(min(len(dataset), 1024), device)
    held = torch.empty(len(dataset), *features.shape[1:], dtype=torch.float16, device=device)
    for part in held.split(1024):
        part.copy_(features[:len(part)])
    dataset.begins_with = "rows"
    return KeptFeatures(held)


def time_validation(encoder, dataset, config, device):
    """What train.py does after an epoch: teacher-forced loss, greedy captions of 10 to 20 words, their scores.

    Args:
        encoder (Module). dataset (CaptionDataset). config (Config). device (torch.device).
    Returns:
        float: seconds; float: those of them that the scores take.
    """
    word_map = make_word_map(V)
    words, decoder = word_list(word_map), make_decoder(V, "product", word_map).to(device)
    references = [[decode_caption(ids[1:n - 1], words) for ids, n in zip(*picture)]
                  for picture in zip(dataset.captions.tolist(), dataset.caption_lengths.tolist())]
    few = [dataset[list(range(min(config.batch_size, len(dataset))))]]  # to begin with, for what is set up then
    for loader in (few, make_loader(dataset, config, False)):
        start = time.perf_counter()
        _, captions = validate(encoder, decoder, loader, config, word_map, lambda: None)
        generated = time.perf_counter()
    score([caption["words"] for caption in captions], references)
    return time.perf_counter() - start, time.perf_counter() - generated


class Usage:
    """The share of time in which the GPU worked, in %, as nvidia-smi says; nan without it."""

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
    """The machine's own pace. Returns: dict: float32, bfloat16 (operations/s of a large product), copy (bytes/s)."""
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


def summarise(found, rates, precision):
    """One line of the table. Returns: dict: what --json writes, and the floors in s."""
    reference_s, product_s = (found["seconds"][side] for side in ("reference", "product"))
    ratios = [r / p for r, p in zip(reference_s, product_s)]
    held = found["memory"]
    return dict(reference_s=statistics.median(reference_s), product_s=statistics.median(product_s),
                ratio=statistics.median(ratios), ratio_min=min(ratios), ratio_max=max(ratios),
                memory_ratio=held["product"] / held["reference"] if held["reference"] else None,
                floor_operations_s=found["operations"] / rates[precision],
                floor_bytes_s=found["bytes"] / rates["copy"])


def print_row(name, row):
    floor = max(row["floor_operations_s"], row["floor_bytes_s"])
    held = "-" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}"
    print(f"| {name} | {row['reference_s']:.3f} | {row['product_s']:.3f} | {row['ratio']:.1f} "
          f"({row['ratio_min']:.1f}-{row['ratio_max']:.1f}) | {held} | "
          + (f"{row['floor_operations_s']:.2g} | {row['floor_bytes_s']:.2g} | {floor / row['product_s']:.0%} |"
             if floor else "- | - | - |"), flush=True)


def scaling(device, rounds, path):
    """Draw time and memory of a training step of the decoder against its three sizes, both sides."""
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
            for side, (times, held) in curves.items():
                times.append(statistics.median(found["seconds"][side]))
                held.append((found["memory"][side] or 0) / 2**20)
            print(f"| {label} {value} | " + " | ".join(f"{side} {times[-1]:.3f} s, {held[-1]:.0f} MiB"
                                                        for side, (times, held) in curves.items()) + " |", flush=True)
        for side, (times, held) in curves.items():
            growth = [f"{y[-1] / y[0]:.1f}" if y[0] else "-" for y in (times, held)]
            print(f"  {label} x {values[-1] / values[0]:.0f}: {side} time x {growth[0]}, memory x {growth[1]}")
            for row, (y, what) in enumerate(((times, "s a step"), (held, "MiB at the peak"))):
                axes[row, column].plot(values, y, "o-", label=side)
                axes[row, column].set(ylabel=what, ylim=(0, None), xlim=(0, None), **({"xlabel": label} if row else {}))
                axes[row, column].grid(alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(path, dpi=80)
    print(f"Wrote {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("group", nargs="?", default="all", choices=(*CASES, "epoch", "scaling", "all"))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side that count (5)")
    parser.add_argument("--device", default=CONFIG.device)
    parser.add_argument("--pictures", type=int, default=210_000, help="of an epoch (210000)")
    parser.add_argument("--batch_size", type=int, default=CONFIG.batch_size, help=f"of an epoch ({CONFIG.batch_size})")
    parser.add_argument("--workers", type=int, default=CONFIG.workers, help=f"of an epoch ({CONFIG.workers})")
    parser.add_argument("--json", metavar="FILE", help="also write the table here")
    parser.add_argument("--plot", metavar="FILE", default=Path(__file__).parent / "scaling.png",
                        help="where scaling draws its curves (benchmarks/scaling.png)")
    args = parser.parse_args()
    device = get_device(Config(device=args.device))
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else \
        f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()} {chip}, Python {platform.python_version()}, torch "
          f"{torch.__version__}, torchvision {torchvision.__version__}; {args.rounds} rounds")
    if args.group == "epoch":
        return epoch(device, args.pictures, args.batch_size, args.workers)
    if args.group == "scaling":
        return scaling(device, args.rounds, args.plot)
    rates = measure_rates(device)
    print(", ".join(f"{name} {rate / 1e9:.0f} G{'B' if name == 'copy' else 'FLOP'}/s" for name, rate in rates.items()))
    print("\n| case | reference, s | product, s | times as fast (range) | memory, product / reference | operations' "
          "floor, s | bytes' floor, s | of the floor |\n|---|---|---|---|---|---|---|---|", flush=True)
    rows = {}
    for group in CASES if args.group == "all" else [args.group]:
        for name, make in CASES[group].items():
            precision = "bfloat16" if name.endswith("bf16") or (device.type == "cuda" and group == "train") \
                else "float32"
            found = compare(name, make, device, args.rounds)
            rows[name] = summarise(found, rates, precision)
            print_row(name, rows[name])
    if args.json:
        keys = ("reference_s", "product_s", "ratio", "ratio_min", "ratio_max", "memory_ratio")
        Path(args.json).write_text(json.dumps({name: {key: row[key] for key in keys} for name, row in rows.items()},
                                              indent=1), encoding="utf-8")


if __name__ == "__main__":
    run(main)
