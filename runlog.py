"""The log of a run, a folder in log_dir: TensorBoard events, log.jsonl (a line per epoch) and config.json."""
import itertools
import json
import shlex
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from utils import write_text, writing
from visualize import draw_attention

KEPT = "; the checkpoints are kept: mend that, then --resume"


def leave_to_writing(failure, otherwise=threading.excepthook):
    """What the disk refuses TensorBoard's thread ends the next call of its writer: one line instead of two reports."""
    if not isinstance(failure.exc_value, OSError):
        otherwise(failure)


threading.excepthook = leave_to_writing


def new_run(config):
    """Make the folder of a new run in log_dir: named by the time, and a number where that is taken. Returns: str."""
    log_dir, started = Path(config.log_dir), time.strftime("%Y%m%d-%H%M%S")
    with writing(log_dir, ": name another --log_dir"):
        log_dir.mkdir(parents=True, exist_ok=True)
        for name in itertools.chain([started], (f"{started}-{number}" for number in itertools.count(2))):
            with suppress(FileExistsError):
                (log_dir / name).mkdir()
                return name


class RunLog:
    """Creates the folder; in that of a resumed run it drops what was logged after the checkpoint, and adds the epoch
    that was saved but not logged. config.json is about the first start, and under `resumed` about the others.

    Args:
        config (Config). progress (Progress): of train.py. report (dict): of fast.Chosen.
        checkpoint (dict or None): what the run resumes from. steps (int): per epoch.
        dataset (CaptionDataset): of validation. positions: of models.pixel_positions.
    """

    def __init__(self, config, progress, report, checkpoint, steps, dataset, positions):
        self.folder, self.dataset, self.positions = Path(config.log_dir) / progress.run, dataset, positions
        self.folder.mkdir(parents=True, exist_ok=True)
        log, entry, purge_step = self.folder / "log.jsonl", progress.entry, None
        versions = dict(python=sys.version.split()[0], torch=torch.__version__, torchvision=torchvision.__version__)
        about = dict(config=vars(config), command=command_line(), git_revision=git_revision(), versions=versions,
                     fast=report)
        settings = self.folder / "config.json"
        if checkpoint and settings.exists():
            with suppress(ValueError):  # broken by hand
                first = json.loads(settings.read_text(encoding="utf-8"))
                about = {**first, "resumed": [*first.get("resumed", []), dict(step=progress.step, **about)]}
        write_text(settings, json.dumps(about, indent=1))
        if checkpoint:
            logged, purge_step = progress.epoch - progress.began, progress.step + (progress.batch < steps)
            if not progress.batch:  # the checkpoint of a whole epoch is written before the epoch is logged
                logged, purge_step = max(logged - 1, 0), entry.get("step", 0)
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if log.exists() else []
            write_text(log, "".join(lines[:logged]))
            # TensorBoard reads the files of a run in the order of their names, which begin with the second.
            last = max((int(path.name.split(".")[3]) for path in self.folder.glob("events.out.tfevents.*")), default=0)
            time.sleep(min(max(last + 1 - time.time(), 0), 1))
        self.writer = SummaryWriter(self.folder, purge_step=purge_step)
        if checkpoint and entry and not progress.batch:
            self.epoch(entry)

    def reading(self, values, step, group="train"):
        """Log scalars. Args: values (dict): name -> float. step (int). group (str): the part of a tag before the /."""
        with writing(self.folder, KEPT):
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def epoch(self, entry):
        """Log an epoch: a line in log.jsonl, its scalars, and the attention on a few validation pictures.

        Args:
            entry (dict): epoch, step, train, valid, rates, best, epochs_since_improvement; reading: of its last step;
            pictures: list of dict(row, words, alphas).
        """
        line = {name: value for name, value in entry.items() if name not in ("reading", "pictures")}
        with writing(self.folder / "log.jsonl", KEPT), open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for group, values in dict(train=entry["reading"], valid=entry["valid"], epoch=entry["train"]).items():
            self.reading(values, entry["step"], group)
        for shown in (shown for shown in entry["pictures"] if shown["row"] < len(self.dataset)):
            figure = draw_attention(Image.fromarray(self.dataset.images[shown["row"]]), shown["words"],
                                    shown["alphas"].numpy(), self.positions)
            with writing(self.folder, KEPT):
                self.writer.add_figure(f"attention/{shown['row']}", figure, entry["step"])
        self.flush()

    def flush(self):
        with writing(self.folder, KEPT):
            self.writer.flush()

    def close(self):
        with writing(self.folder, KEPT):
            self.writer.close()


def command_line():
    return shlex.join(["python", *sys.argv])


def git_revision():
    """The commit of this code, with "+" if a Python file was changed or added since; "unknown" where the code has no
    repository of its own, which a copy inside another one has not.

    Returns: str.
    """
    folder = Path(__file__).resolve().parent

    def git(*command):
        return subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True,
                              check=True, timeout=10).stdout.strip()
    try:
        if not Path(git("rev-parse", "--show-toplevel")).samefile(folder):
            return "unknown"
        is_changed = bool(git("status", "--porcelain", "--", ":(glob)*.py", ":(glob)*/*.py"))
        return git("rev-parse", "--short=12", "HEAD") + "+" * is_changed
    except (OSError, subprocess.SubprocessError):
        return "unknown"
