"""What a training step takes on a GPU, frozen and fine-tuned: memory, hence the batch that fits, and the host's work.

    python benchmarks/memory.py                           # on a GPU measured, otherwise counted; a minute on two cores

Sizes are those of run.py: ResNet-101 at 256 pixels, 9,000 words, 5 captions of 10 to 21 tokens per picture, 512
dimensions. Memory grows linearly with the batch, so two small ones tell the rest.

Without a GPU the step of the GPU, with kernels that compute nothing, runs on the CPU, and the bytes of all tensors that
are alive at the same time are counted. What that leaves out: what cuDNN takes for its convolutions, and gaps between
tensors. What is alive inside the frozen encoder is added, as its CUDA graph never gives it back. The operations that
the host starts are counted too, a graph as one: what of them takes longer than the GPU's work leaves it idle.
"""
import gc
import sys
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the scripts are

from benchmarks.run import CONFIG, TOKENS, V, make_batch, make_models  # noqa: E402
from config import new_parser  # noqa: E402
from fast.decoder import FastDecoder, kernels  # noqa: E402
from fast.encoder import FoldedEncoder, Replayed  # noqa: E402
from fast.graphs import Recorded  # noqa: E402
from train import make_optimizers, make_scaler, teacher_forced, update  # noqa: E402
from utils import UserError, get_device, precisions, run_script  # noqa: E402

CARDS = 8, 16, 24, 80  # GiB
CONTEXT = 0.75  # GiB that CUDA, cuDNN and cuBLAS take before the first tensor; a screen takes more
BATCHES = dict(cpu=(4, 8), cuda=(16, 32))


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--device", default=CONFIG.device)
    args = parser.parse_args()
    if kernels is None:
        raise UserError("this counts what the Triton kernels take, and Triton is not installed: it comes with PyTorch "
                        "for Linux")
    device = get_device(replace(CONFIG, device=args.device))
    if device.type not in BATCHES:
        raise UserError(f"--device {args.device}: cuda measures, cpu counts")
    half = "bfloat16" if device.type == "cpu" or torch.bfloat16 in precisions(device) else "float16"
    how = f"measured on {torch.cuda.get_device_name()}" if device.type == "cuda" else "counted, not measured"
    print(f"{how}, torch {torch.__version__}\n\n| training | MiB | MiB per picture | of these in the encoder's graph | "
          + " | ".join(f"{card} GiB" for card in CARDS) + " | started by the host |\n|---" + "|---" * (4 + len(CARDS))
          + "|")
    for kind in ("frozen", "fine-tuned"):
        for precision in (half, "float32"):
            few, more = BATCHES[device.type]
            (low, *_), (high, inside, started) = (
                step_takes(kind == "fine-tuned", precision, batch, device) for batch in (few, more))
            each = (high - low) / (more - few)
            fixed = low - few * each
            fits = [int(((card - CONTEXT) * 2**30 - fixed) / each) for card in CARDS]
            print(f"| {kind}, {precision} | {fixed / 2**20:.0f} | {each / 2**20:.1f} | {inside / more / 2**20:.1f} | "
                  + " | ".join(f"{batch:,}" for batch in fits) + f" | {started or '-'} |", flush=True)


def step_takes(is_trained, precision, pictures, device):
    """What training takes after a few steps.

    Args: is_trained (bool): the encoder too. precision (str). pictures (int): of a batch. device (torch.device).
    Returns: int: bytes, at most at any time; int: of these what the encoder's graph holds; int: operations that the
        host starts in a step. The last two are 0 where they are not known.
    """
    gc.collect()  # of the last call
    config = replace(CONFIG, precision=precision, fine_tune_encoder=is_trained)
    is_counted, inside = device.type == "cpu", 0
    if not is_counted:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with counting() if is_counted else nullcontext() as live:
        images, captions, lengths = make_batch(pictures, TOKENS, V, device)
        encoder, decoder = make_models("product", config, V, device)
        if is_trained:
            encoder.fine_tune("top")
            runs = encoder.train()
        else:
            runs = Replayed(FoldedEncoder(encoder, getattr(torch, precision)))
            if is_counted:
                live.peak = 0
                runs.module(images)
                inside = live.peak - live.now
        fast_decoder = FastDecoder(decoder).train()
        optimizers, scaler = make_optimizers(config, encoder, decoder), make_scaler(config, device)
        for step in range(3):  # Adam's moments exist after the first, graphs are recorded in the second
            if is_counted:
                live.started = 0
            # Not by train.mixed_precision: a CPU counts what it would only imitate.
            with torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32"):
                terms, counts, _ = teacher_forced(runs, fast_decoder, images, captions, lengths, config, step)
            loss = sum(term.weight * term.sum / counts[term.per] for term in terms.values() if term.weight)
            update(loss, optimizers, scaler, config, False)
            del terms, loss  # before the next step makes its own
    return (live.peak + inside, inside, live.started) if is_counted else (torch.cuda.max_memory_reserved(), 0, 0)


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive: `now`, and `peak`, the most at any time; and `started`, the
    operations outside of graphs that compute or copy."""

    idle = ("empty", "new_empty", "_unsafe_view", "_record_function", "detach")  # how names begin that do neither

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.sizes, self.started = 0, 0, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.started += not (function.is_view or function.overloadpacket.__name__.startswith(self.idle))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata)
        return out

    def freed(self, number):
        self.now -= self.sizes.pop(number)

    def record(self, function):
        """In the place of a graph."""
        before = self.started
        function()
        self.started = before + 1


@contextmanager
def counting():
    """Let the step of a GPU run on the CPU, its kernels without effect. Yields: Live."""
    names = "attend", "attend_gradient", "keys_gradient", "cell", "cell_gradient"
    without = {name: mock.MagicMock() for name in names}
    live = Live()
    with mock.patch.multiple(kernels, are_usable=lambda grid, pool: True, **without), \
            mock.patch.object(Recorded, "__call__", lambda self, function: live.record(function)), live:
        yield live


if __name__ == "__main__":
    run_script(main)
