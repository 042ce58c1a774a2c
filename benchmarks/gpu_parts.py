"""The parts of gpu.py, in its order, each run in a process of its own; without a GPU in tiny sizes.

A part is a function of its Report, which writes every row as soon as it is known. A row that fails
says why, and the next one is measured all the same.
"""
import ast
import gc
import inspect
import itertools
import multiprocessing
import os
import platform
import shutil
import socket
import statistics
import tempfile
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # as tests/conftest.py, before anything imports Triton

import torchvision  # noqa: E402

from benchmarks.absent import NOT_INSTALLED  # noqa: E402
import fast  # noqa: E402
import scores  # noqa: E402
import train  # noqa: E402
from benchmarks import run  # noqa: E402
from benchmarks.gpu import ROOT, write_json  # noqa: E402
from fast.decoder import FastDecoder, Pixels, energy, pool_matrix  # noqa: E402
from models import Attention, DecoderWithAttention  # noqa: E402
from state import State  # noqa: E402
from utils import get_device, init_distributed, meet_processes, one_line, precision  # noqa: E402

BATCHES = (32, 128) if HAS_GPU else (2,)
LIMITS = (8, 16, 24, 80)  # GiB
if not HAS_GPU:
    run.CONFIG = replace(run.CONFIG, encoder="resnet50", batch_size=2, workers=0)
    run.SIZES["cpu"] = run.Sizes(2, (3, 4), 60)


class Report:
    """What FOLDER/PART.json holds."""

    def __init__(self, part: str, folder: Path):
        self.path = folder / f"{part}.json"
        chip = torch.cuda.get_device_name() if HAS_GPU else platform.processor() or "CPU"
        self.content = dict(
            part=part, state="running", date=time.strftime("%Y-%m-%d"), chip=chip,
            is_rehearsal=not HAS_GPU, python=platform.python_version(), torch=torch.__version__,
            torchvision=torchvision.__version__, not_installed=NOT_INSTALLED, notes=[], rows={})
        self.write()

    def write(self) -> None:
        write_json(self.path, self.content)

    def add(self, name: str, row: dict) -> None:
        print(name, row, flush=True)
        self.content["rows"][name] = row
        self.write()

    def note(self, text: str) -> None:
        print(text, flush=True)
        self.content["notes"].append(text)
        self.write()

    def measure(self, name: str, function: Callable[..., dict], *args, **keywords) -> None:
        try:
            self.add(name, function(*args, **keywords))
        except Exception as error:  # whatever a device or a missing package makes of it
            self.add(name, dict(error=f"{type(error).__name__}: {one_line(error)[:300]}"))

    def needs_gpu(self) -> bool:
        if not HAS_GPU:
            self.note("needs a GPU")
        return not HAS_GPU


def run_part(part: str, folder: str) -> None:
    report = Report(part, Path(folder))
    # Nothing is started on it here, which would take memory from the parts' own processes.
    device = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
    globals()[part](report, device)


def in_process(function: Callable, *args):
    """Its result in a fresh process, which begins without compiled code or memory in use; in this
    one where nothing is measured."""
    if not HAS_GPU:
        return function(*args)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


def compared(report: Report, name: str, row: str, make: Callable, device: torch.device,
             rounds: int) -> None:
    """Measured even where the sides do not agree, which the row then says."""
    def both_sides():
        found = run.compare(name, make, device, rounds, must_agree=False)
        return run.summarise(row, found)

    report.measure(row, both_sides)


# --------------------------------------------------------------------------------------------------
# Tests, and the cases of run.py


def tests(report: Report, device: torch.device) -> None:
    """The tests of fast/, of which some need a GPU."""
    class Recorder:
        def pytest_runtest_logreport(self, report):
            if report.when == "call" or report.outcome != "passed":
                counts = outcomes.setdefault(report.outcome, dict(tests=0))
                counts["tests"] += 1
                if report.outcome == "failed":
                    counts.setdefault("names", []).append(report.nodeid.split("::", 1)[1])
                write()

    outcomes, write = report.content["rows"], report.write
    few = [] if HAS_GPU else ["-k", "frozen_encoder or unedited or triton_does"]
    os.chdir(ROOT)
    code = pytest.main(["-v", "--tb=short", "-p", "no:cacheprovider", "tests/test_fast.py", *few],
                       plugins=[Recorder()])
    report.note(f"pytest ended with {int(code)}")


def steps(report: Report, device: torch.device) -> None:
    names = ["train_decoder", "train_frozen_bf16", "train_kept_features"]
    for pictures in BATCHES:
        sizes = run.SIZES[device.type]._replace(pictures=pictures)
        for name in names if HAS_GPU else names[:1]:
            make = partial(case, run.CASES["train"][name], sizes=sizes)
            compared(report, name, f"{name}, {pictures}", make, device, 2 if HAS_GPU else 1)


def case(make: Callable[..., run.Case], side: str, device: torch.device, **keywords) -> run.Case:
    """As make; a process that is asked for it has imported this module, and with it tiny sizes."""
    return make(side, device, **keywords)


def self_critical(report: Report, device: torch.device) -> None:
    if "pycocoevalcap" not in NOT_INSTALLED:
        make = partial(case, run.self_critical_case)
        compared(report, "train_self_critical", "train_self_critical", make, device, 1)
        return
    report.note("pycocoevalcap is not installed: without the reference, whose reward it is")
    report.measure("train_self_critical", in_process, one_side, run.self_critical_case, device)


def one_side(make: Callable[..., run.Case], device: torch.device) -> dict[str, float]:
    run.set_up(make, "product", str(device))
    run.first_iteration()
    seconds = [run.timed() for _ in range(3)]
    return dict(product_s=statistics.median(seconds[1:]), busy=run.busy())


def beam(report: Report, device: torch.device) -> None:
    if HAS_GPU:
        names, pictures = list(run.CASES["eval"]), 64
    else:
        names, pictures = ["eval_beam5_decode"], 1
    for name in names:
        make = partial(case, run.CASES["eval"][name], pictures=pictures)
        compared(report, name, name, make, device, 1)


# --------------------------------------------------------------------------------------------------
# Precisions, epochs


def precisions(report: Report, device: torch.device) -> None:
    """The losses of the same steps from the same weights, on one batch that is learnt by heart."""
    for name in ("float32", "bfloat16", "float16"):
        report.measure(name, losses, name, device, 200 if HAS_GPU else 10)


def losses(name: str, device: torch.device, steps: int) -> dict:
    config = replace(run.CONFIG, precision=name)
    used = str(precision(config, device)).removeprefix("torch.")
    if used != name:
        return dict(error=f"this device trains in {used} instead")
    sizes = run.SIZES[device.type]
    state = run.make_state(config, sizes.vocab_size, device)
    step = run.train_product(state, "features", sizes)
    start = time.perf_counter()
    found = torch.stack([step.iteration() for _ in range(steps)]).tolist()
    return dict(losses=found, seconds=time.perf_counter() - start)


def epoch(report: Report, device: torch.device) -> None:
    """An eighth of AI Challenger's 210,000 pictures, and what a whole epoch would take."""
    if {"nltk", "pycocoevalcap"} & set(NOT_INSTALLED):
        run.score = lambda *captions: scores.cider(*captions)
        report.note("nltk or pycocoevalcap is not installed: scores are CIDEr-D alone")
    memory_disk = Path("/dev/shm")
    if HAS_GPU and memory_disk.exists() and shutil.disk_usage(memory_disk).free > 20 * 2**30:
        tempfile.tempdir = str(memory_disk)  # the pictures are 6 GB
    share = 8 if HAS_GPU else 10_000
    batch_size, workers = (128, min(8, os.cpu_count())) if HAS_GPU else (2, 0)
    kinds = dict.fromkeys(("kept", "frozen"), 210_000 // share)
    report.note(f"1/{share} of an epoch, batches of {batch_size}, {workers} workers; random "
                f"pictures in {tempfile.gettempdir()}")
    for kind, row in run.epoch_rows(kinds, device, batch_size, workers):
        row["whole_epoch_s"] = share * row["seconds"]
        row["whole_validation_s"] = share * row["validation_s"]
        report.add(kind, row)


# --------------------------------------------------------------------------------------------------
# The largest batch


def memory(report: Report, device: torch.device) -> None:
    """The largest batch under a cap of PyTorch's memory, which imitates smaller GPUs."""
    if report.needs_gpu():
        return
    for name, kind in itertools.product(("bfloat16", "float32"), ("frozen", "fine-tuned")):
        config = replace(run.CONFIG, precision=name, fine_tune_encoder=kind == "fine-tuned")
        report.measure(f"{kind}, {name}", in_process, largest_batches, config, device)


def largest_batches(config, device: torch.device) -> dict[str, int]:
    state = run.make_state(config, run.SIZES["cuda"].vocab_size, device)
    few, some = [peak(state, pictures) for pictures in (16, 48)]
    of_picture = (some - few) / 32
    free, total = torch.cuda.mem_get_info(device)
    context = total - free - torch.cuda.memory_reserved()  # CUDA's own, and other processes'
    found = dict(bytes_of_picture=of_picture, context_bytes=context)
    for limit in LIMITS:
        allowed = limit * 2**30 - context
        if allowed > free:
            found[f"{limit} GiB"] = None
            continue
        pictures = int((allowed - few) / of_picture) + 16
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        for _ in range(6):
            try:
                peak(state, pictures)
                break
            except RuntimeError as error:  # also what a graph makes of too little memory
                print(f"{limit} GiB, {pictures} pictures: {one_line(error)[:200]}", flush=True)
                pictures = int(0.94 * pictures)
        else:
            pictures = None
        found[f"{limit} GiB"] = pictures
    return found


def peak(state: State, pictures: int) -> int:
    """Bytes that PyTorch holds in three steps, of which the second records the graphs."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    sizes = run.SIZES["cuda"]._replace(pictures=pictures)
    step = run.train_product(state, "pixels", sizes)
    for _ in range(3):
        step.iteration()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved()


# --------------------------------------------------------------------------------------------------
# Two processes on one GPU


def two_processes(report: Report, device: torch.device) -> None:
    """Five steps of which each process takes half a batch: the losses must be those of one."""
    backends = ["as train.py", "gloo"] if HAS_GPU else ["as train.py"]
    report.measure("one process", shared_steps, 1, "as train.py", device)
    for backend in backends:  # NCCL may refuse two processes on one GPU
        report.measure(f"two processes, {backend}", shared_steps, 2, backend, device)
    rows = report.content["rows"]
    expected = rows["one process"].get("losses")
    for row in rows.values():
        if expected and "losses" in row:
            pairs = zip(row["losses"], expected)
            row["largest_difference"] = max(abs(found / loss - 1) for found, loss in pairs)
    report.write()


def shared_steps(number: int, backend: str, device: torch.device) -> dict:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=share, args=(rank, number, port, backend, device, queue))
                 for rank in range(number)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 60
    while queue.empty() and time.monotonic() < deadline:
        time.sleep(0.1)
    found = dict(error="no answer within a minute") if queue.empty() else queue.get()
    for process in processes:
        process.join(3)
        process.kill()
    return found


def share(rank: int, number: int, port: int, backend: str, device: torch.device, queue) -> None:
    """Put the losses of all processes into the queue, or why there are none."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(number),
                       MASTER_ADDR="localhost", MASTER_PORT=str(port))
    try:
        get_device(run.CONFIG)  # makes it the current one
        meeting = meet_processes()
        if backend == "gloo":
            dist.init_process_group("gloo", **meeting._asdict())
        else:
            init_distributed(device, meeting)
        config = replace(run.CONFIG, precision="auto")
        given, captions, lengths = run.make_batch(run.SIZES[device.type], "features", device)
        state = run.make_state(config, run.SIZES[device.type].vocab_size, device)
        models = train.prepare(state, None, None)
        models = models._replace(training_encoder=run.KeptFeatures(None))
        models.training_decoder.train()
        part = (given[rank::number], captions[rank::number], lengths[rank::number])
        objective = partial(train.cross_entropy, config)
        step = run.product_step(state, models, objective, part)
        found = [step.iteration() for _ in range(3)]  # records the graphs
        found[-1].item()
        start = time.perf_counter()
        found += [step.iteration() for _ in range(5)]
        found[-1].item()
        seconds = (time.perf_counter() - start) / 5
        total = torch.stack(found) / number  # see state.mean_loss
        if number > 1:
            dist.all_reduce(total)
        if rank == 0:
            queue.put(dict(losses=total.tolist(), step_s=seconds, decoder=models.report["decoder"],
                           backend=dist.get_backend() if number > 1 else "none"))
    except Exception as error:  # of PyTorch, NCCL or CUDA
        queue.put(dict(error=f"{type(error).__name__}: {one_line(error)[:300]}"))


# --------------------------------------------------------------------------------------------------
# The question of the form: what do the kernels give over compiled PyTorch?


class RearrangedLoop(nn.Module):
    """FastDecoder's time loop for torch.compile: all captions run through all steps, one function a
    step, whose shapes never change."""

    def __init__(self, quick: FastDecoder):
        super().__init__()
        self.quick = quick
        backend = "inductor" if HAS_GPU else "aot_eager"  # which needs no compiler
        self.one_step = torch.compile(self.step, dynamic=False, backend=backend)

    def step(self, pixels, weights, energy_weight, energy_bias, word_input, h, c):
        B, K = len(pixels.grid), len(h) // len(pixels.grid)

        def attend(query):
            e = energy(pixels.keys, query.view(B, K, -1), energy_weight).float() + energy_bias
            alpha = torch.softmax(e, dim=2)
            context = (alpha @ pixels.pool) @ pixels.grid
            return context.flatten(0, 1), alpha.flatten(0, 1)

        h, c, alpha, _ = self.quick.rows_step(attend, weights, word_input, h, c)
        return h, c, alpha

    def forward(self, grid: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Grid (B, h, w, D), embedded words (B, K, T, E) -> states (B, K, T, H), alphas."""
        quick, (B, K, T, _) = self.quick, words.shape
        pixels = Pixels(*quick.look(grid))
        h, c = (x.repeat_interleave(K, 0) for x in quick.init_hidden_state(pixels))
        weights, full_att = quick.step_weights(), quick.decoder.attention.full_att
        word_input = quick.word_input(words).flatten(0, 1)  # (N, T, 4H)
        states, alphas = [], []
        for t in range(T):
            h, c, alpha = self.one_step(pixels, weights, full_att.weight[0], full_att.bias,
                                        word_input[:, t], h, c)
            states.append(h)
            alphas.append(alpha)
        states, alphas = torch.stack(states, dim=1), torch.stack(alphas, dim=1)
        return states.unflatten(0, (B, K)), alphas.unflatten(0, (B, K))


class RearrangedDecoder(nn.Module):
    """A decoder whose time loop is compiled, or compiled and a CUDA graph."""

    def __init__(self, decoder: DecoderWithAttention, is_graph: bool):
        super().__init__()
        self.decoder = decoder
        self.loop = RearrangedLoop(FastDecoder(decoder))
        self.is_graph, self.graph = is_graph, None

    def forward(self, grid: Tensor, captions: Tensor, caption_lengths: Tensor):
        """As DecoderWithAttention.forward."""
        words = self.decoder.embedding(captions[:, :, :-1])
        if self.is_graph and self.graph is None:
            self.graph = self.recorded(grid, words)
        states, alphas = (self.graph or self.loop)(grid, words)
        T = words.shape[2]
        is_real = (torch.arange(T) < caption_lengths.unsqueeze(2) - 1).to(grid.device)
        targets = captions[:, :, 1:][is_real]
        scores = self.decoder.fc(self.decoder.dropout(states[is_real]))
        return scores, targets, alphas * is_real.unsqueeze(3)

    def recorded(self, grid: Tensor, words: Tensor) -> Callable:
        """The loop's two passes as CUDA graphs, for these shapes."""
        inputs = torch.empty_like(grid).copy_(grid), words.detach().clone().requires_grad_()
        dtype = torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", dtype, torch.is_autocast_enabled("cuda"), cache_enabled=False):
            return torch.cuda.make_graphed_callables(self.loop, inputs, allow_unused_input=True)


FORMS = {
    "models.py as written": dict(fast=False),
    "kernels and graphs": {},
    "one rearranged step, torch.compile": dict(is_graph=False),
    "that in one CUDA graph": dict(is_graph=True),
}


def form(report: Report, device: torch.device) -> None:
    """The decoder's training step from given features, in training's own precision."""
    code = lines_of_code()
    report.note("lines of the kernels are all of fast/decoder.py, kernels.py and graphs.py, which "
                "decode and serve CPUs too; the others train only")
    for name, how in FORMS.items():
        if how.get("is_graph") and not HAS_GPU:
            report.add(name, dict(error="needs a GPU", lines=code[name]))
            continue
        report.measure(name, in_process, time_form, how, device)
        report.content["rows"][name]["lines"] = code[name]
    rows = report.content["rows"]
    for pictures in BATCHES:
        check_form(report, rows, pictures)
    report.write()


def time_form(how: dict, device: torch.device) -> dict:
    with tempfile.TemporaryDirectory() as cache:  # nothing is compiled yet
        os.environ |= dict(TORCHINDUCTOR_CACHE_DIR=f"{cache}/inductor", TRITON_CACHE_DIR=cache)
        row = {}
        config = replace(run.CONFIG, precision="auto", fast=how.get("fast", True))
        edit = partial(with_form, how) if "is_graph" in how else lambda models: models
        for pictures in BATCHES:
            sizes = run.SIZES[device.type]._replace(pictures=pictures)
            begin = time.perf_counter()
            state = run.make_state(config, sizes.vocab_size, device)
            step = run.train_product(state, "features", sizes, edit)
            step.iteration()
            first = step.outcome()
            step.iteration()
            step.iteration()
            step.outcome()  # waits for the device
            start_up = time.perf_counter() - begin
            run.held = device, step
            seconds = min(run.timed() for _ in range(3))
            row[f"{pictures} pictures"] = dict(
                ms=1000 * seconds, start_s=start_up, loss=first["loss"],
                gradient_norm=float((first["gradient"] ** 2).sum() ** 0.5), busy=run.busy())
        return row


def with_form(how: dict, models: fast.Models) -> fast.Models:
    decoder = getattr(models.decoder, "decoder", models.decoder)
    return models._replace(training_decoder=RearrangedDecoder(decoder, **how))


def check_form(report: Report, rows: dict, pictures: int) -> None:
    """Say whether all forms agree, and whether the kernels could go."""
    key = f"{pictures} pictures"
    times = {name: row[key] for name, row in rows.items() if key in row}
    if "models.py as written" not in times:
        return
    expected = times["models.py as written"]
    for name, found in times.items():
        for what in ("loss", "gradient_norm"):
            apart = abs(found[what] / expected[what] - 1)
            if apart > (1e-2 if what == "loss" else 1e-1):
                report.note(f"{name}, {key}: another {what}, by {apart:.1e}")
    _, kernels, _, graph = FORMS
    if graph in times and kernels in times:
        ratio = times[graph]["ms"] / times[kernels]["ms"]
        could = "could go one day" if ratio <= 1.5 else "stay"
        report.note(f"{key}: compiled and in a graph takes {ratio:.2f} times what the kernels "
                    f"take: they {could} (1.5)")


def lines_of_code() -> dict[str, int]:
    """What each form needs beside the model, which all need."""
    methods = ("look", "pool_of", "init_hidden_state", "word_weight", "word_input", "step_weights",
               "rows_step")
    rearranged = [pool_matrix, Pixels, energy, RearrangedLoop, RearrangedDecoder]
    rearranged += [getattr(FastDecoder, name) for name in methods]
    graph = statements(inspect.getsource(RearrangedDecoder.recorded))
    compiled = sum(statements(inspect.getsource(part)) for part in rearranged)
    files = ("decoder.py", "kernels.py", "graphs.py")
    today = sum(statements((ROOT / "fast" / name).read_text(encoding="utf-8")) for name in files)
    model = sum(statements(inspect.getsource(part)) for part in (Attention, DecoderWithAttention))
    print(f"the model itself: {model} lines")
    return dict(zip(FORMS, (0, today, compiled - graph, compiled)))


def statements(source: str) -> int:
    """Lines of code without docstrings, comments and blank lines."""
    tree = ast.parse(textwrap.dedent(source))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(body[0].value, ast.Constant):
                body[0] = ast.Pass()
    return len(ast.unparse(ast.fix_missing_locations(tree)).replace("\n\n", "\n").splitlines())
