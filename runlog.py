"""The log of a run: the lines on the screen, and a folder in log_dir with TensorBoard's events,
log.jsonl (a line per epoch) and config.json (settings, command, versions)."""
import itertools
import json
import shlex
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from utils import is_first_process, precision, world_size, write_text, writing

import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from config import Config
from datasets import largest_batch_size
from models import pixel_positions
from state import Progress, State, command_line, git_revision
from visualize import draw_attention


def leave_to_writing(failure, otherwise=threading.excepthook):
    """What the disk refuses TensorBoard's thread ends the next call of its writer: one line
    instead of two reports."""
    if not isinstance(failure.exc_value, OSError):
        otherwise(failure)


threading.excepthook = leave_to_writing


class RunLog:
    """The first process creates the folder of a new run, shows how it begins, and logs; in the
    others nothing happens. In the folder of a resumed run it drops what was logged after the
    checkpoint, and adds the epoch that was saved but not logged."""

    def __init__(self, state: State, models, train_loader: DataLoader, valid_loader: DataLoader):
        if not is_first_process():
            return
        config, progress = state.config, state.progress
        is_new = not progress.run
        if is_new:
            progress.run = new_run(config)
        self.folder = Path(config.log_dir) / progress.run
        self.folder.mkdir(parents=True, exist_ok=True)
        self.dataset = valid_loader.dataset
        self.positions = pixel_positions(state.encoder, config.image_size,
                                         config.encoded_image_size)

        print(start_line(state, train_loader, valid_loader))
        for warning in warnings_of(state, train_loader):
            print(f"warning: {warning}")
        print(models.summary(), *state.notes, sep="\n")

        self.write_settings(config, progress, models.report, is_new)
        entry = progress.entry
        is_whole_epoch = not progress.batch
        purge_step = None
        if not is_new:
            # The checkpoint of a whole epoch is written before that epoch is logged.
            logged = progress.epoch - progress.began
            purge_step = progress.step + (progress.batch < len(train_loader))
            if is_whole_epoch:
                logged = max(logged - 1, 0)
                purge_step = entry.get("step", 0)
            self.drop_epochs_after(logged)
            self.wait_for_another_second()

        self.writer = SummaryWriter(self.folder, purge_step=purge_step)
        if not is_new and entry and is_whole_epoch:
            self.epoch(entry)
        state.flush_log = self.flush

    def write_settings(self, config: Config, progress: Progress, report: dict, is_new: bool):
        """config.json is about the first start, and under `resumed` about the others."""
        versions = dict(python=sys.version.split()[0], torch=torch.__version__,
                        torchvision=torchvision.__version__)
        about = dict(config=vars(config), command=command_line(), git_revision=git_revision(),
                     versions=versions, fast=report)
        path = self.folder / "config.json"
        if not is_new and path.exists():
            with suppress(ValueError):  # broken by hand
                first = json.loads(path.read_text(encoding="utf-8"))
                again = dict(step=progress.step, **about)
                about = {**first, "resumed": [*first.get("resumed", []), again]}
        write_text(path, json.dumps(about, indent=1))

    def drop_epochs_after(self, number: int):
        path = self.folder / "log.jsonl"
        lines = []
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        write_text(path, "".join(lines[:number]))

    def wait_for_another_second(self):
        """TensorBoard reads the files of a run in the order of their names, which begin with the
        second."""
        seconds = [int(path.name.split(".")[3])
                   for path in self.folder.glob("events.out.tfevents.*")]
        wait = max(seconds, default=0) + 1 - time.time()
        time.sleep(min(max(wait, 0), 1))

    def reading(self, values: dict[str, float], step: int, group: str = "train"):
        """Log scalars; `group` is the part of their tags before the slash."""
        if is_first_process():
            with self.writing():
                for name, value in values.items():
                    self.writer.add_scalar(f"{group}/{name}", value, step)

    def epoch(self, entry: dict):
        """Log an epoch: a line in log.jsonl, its scalars, and the attention on a few validation
        pictures. The entry is that of State.finish_epoch."""
        if not is_first_process():
            return
        line = {name: value for name, value in entry.items() if name not in ("reading", "pictures")}
        with self.writing(), open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

        step = entry["step"]
        self.reading(entry["reading"], step, "train")
        self.reading(entry["valid"], step, "valid")
        self.reading(entry["train"], step, "epoch")
        for picture in entry["pictures"]:
            row = picture["row"]
            if row < len(self.dataset):  # unless the run goes on with other data
                image = Image.fromarray(self.dataset.images[row])
                figure = draw_attention(image, picture["words"], picture["alphas"].numpy(),
                                        self.positions)
                with self.writing():
                    self.writer.add_figure(f"attention/{row}", figure, step)
        self.flush()

    def flush(self):
        with self.writing():
            self.writer.flush()

    def close(self, state: State):
        if is_first_process():
            print(last_line(state))
            with self.writing():
                self.writer.close()

    def writing(self):
        return writing(self.folder, "; the checkpoints are kept: mend that, then --resume")


def new_run(config: Config) -> str:
    """Make the folder of a new run in log_dir: named by the time, and a number where that is
    taken."""
    log_dir = Path(config.log_dir)
    started = time.strftime("%Y%m%d-%H%M%S")
    others = (f"{started}-{number}" for number in itertools.count(2))
    with writing(log_dir, ": name another --log_dir"):
        log_dir.mkdir(parents=True, exist_ok=True)
        for name in itertools.chain([started], others):
            with suppress(FileExistsError):
                (log_dir / name).mkdir()
                return name


# -------------------------------------------------------------------------------------------------
# The lines on the screen


def progress_bar(loader: DataLoader, name: str, first: int = 0) -> tqdm:
    """A bar over the batches of a loader, from the `first` one on, shown by the first process."""
    return tqdm(loader, desc=name, unit="batch", total=len(loader), initial=first,
                leave=name != "validate", disable=not is_first_process())


def start_line(state: State, train_loader: DataLoader, valid_loader: DataLoader) -> str:
    """Data, model, where it runs, the rates in force, the log."""
    config, progress = state.config, state.progress
    dtype = precision_name(state)
    rates = ", ".join(f"{name} {rate:g}" for name, rate in state.rates().items())
    if not config.fine_tune_encoder:
        rates += ", encoder frozen"
    parts = [
        f"{len(train_loader.dataset)} training and {len(valid_loader.dataset)} validation "
        f"pictures, {len(state.word_map)} words",
        f"{config.encoder} ({config.encoder_weights}), {state.device} x {world_size()}, {dtype}",
        f"rates: {rates}",
        f"log: {Path(config.log_dir) / progress.run}"]
    if progress.step:
        parts.append(f"resuming at epoch {progress.epoch + 1}, batch {progress.batch + 1}")
    return "; ".join(parts)


def precision_name(state: State) -> str:
    """As --precision has it."""
    return str(precision(state.config, state.device)).removeprefix("torch.")


def warnings_of(state: State, train_loader: DataLoader) -> list[str]:
    """What is not as the user would expect."""
    config = state.config
    warnings = []
    dtype = precision_name(state)
    if config.precision not in ("auto", dtype):
        warnings.append(f"this {state.device.type} device would only imitate {config.precision}, "
                        f"so float32 is used")

    # Batch norms count the batches that they were trained on.
    is_trained = any(count > 0 for name, count in state.encoder.named_buffers()
                     if name.endswith("num_batches_tracked"))
    if config.encoder_weights == "none" and not config.fine_tune_encoder and not is_trained:
        warnings.append("with --encoder_weights none the encoder is random, and without "
                        "--fine_tune_encoder true it stays so: give that, or begin with "
                        "--encoder_weights imagenet")

    pictures = len(train_loader.dataset)
    sampler = train_loader.sampler
    fitting = max(largest_batch_size(pictures), world_size())
    if sampler.batch_size > fitting:
        warnings.append(
            f"an epoch has only {len(sampler)} steps of {sampler.batch_size} pictures and leaves "
            f"out {pictures % sampler.batch_size} of {pictures}; --batch_size {fitting} gives "
            f"{pictures // fitting} steps and leaves out {pictures % fitting}")
    return warnings


def epoch_line(entry: dict) -> str:
    """An epoch in a line. The entry is that of State.finish_epoch."""
    training, validation = entry["train"], entry["valid"]
    best = "  best" if entry["best"] else ""
    return (f"epoch {entry['epoch']}: train {losses(training)}, "
            f"{training['images_per_s']:.1f} images/s; "
            f"valid, teacher-forced, {losses(validation)}; "
            f"generated, greedy, BLEU-4 {validation['BLEU-4']:.4f}, "
            f"CIDEr {validation['CIDEr']:.4f}{best}")


def losses(means: dict[str, float]) -> str:
    """The loss and its terms, which come before images_per_s."""
    names = list(means)
    terms = names[names.index("loss") + 1:names.index("images_per_s")]
    shown = ", ".join(f"{name} {means[name]:.3f}" for name in terms)
    return f"loss {means['loss']:.3f} ({shown})"


def last_line(state: State) -> str:
    return (f"Finished ({state.finished()}); best CIDEr on valid, greedy: "
            f"{state.progress.best[0]:.4f}, in {state.best_path}\n"
            f"python demo.py --checkpoint {shlex.quote(str(state.best_path))} --image FILE "
            f"captions with it")
