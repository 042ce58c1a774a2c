"""What a run remembers, and how it takes a step: all that a checkpoint holds is one State."""
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from utils import (Meeting, UserError, discard_output, end_distributed, is_first_process,
                   largest_of_processes, precise, precision, rank, resumes, sum_over_processes,
                   weights_digest, world_size)

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from checkpoint import (BEST_CHECKPOINT, CHECKPOINT, CROSS_ENTROPY_CHECKPOINT, load_checkpoint,
                        load_initial_models, load_models, load_optimizer, save_checkpoint)
from config import CHECKPOINT_VERSION, RETIRED, Config, get_config
from datasets import STOPPING
from models import Term, build_models

PICTURES_SHOWN = 4  # validation pictures drawn in TensorBoard after every epoch


# -------------------------------------------------------------------------------------------------
# Where a run begins


class Start(NamedTuple):
    """The settings of a run, and what it continues from or begins with."""

    config: Config
    flags: dict  # what the user gave
    path: Path  # of checkpoint.pth.tar
    checkpoint: dict | None = None  # that it continues from
    initial: dict | None = None  # whose model it begins with
    initial_path: str = ""
    begins_second_phase: bool = False


def settings(args, meeting: Meeting) -> Start:
    """Read the command line (of parse_args) against the checkpoint that is there.

    Raises:
        UserError: a checkpoint that is there is not to be resumed, or cannot be as the user asks.
    """
    config = get_config(args.preset, args.flags)
    path = Path(config.model_dir) / CHECKPOINT

    if resumes(path, args.resume, meeting):
        return resumed_settings(args.flags, path)

    if config.self_critical:
        raise UserError("--self_critical true continues from a model trained by cross entropy: "
                        "train one, then give the same command with --resume --self_critical true")
    if not args.init:
        return Start(config, args.flags, path)

    if "encoder_weights" in args.flags:
        raise UserError("--encoder_weights is what --init takes from its checkpoint: omit one of "
                        "the two")
    initial = load_checkpoint(args.init)
    config = get_config(args.preset, args.flags, initial=initial["config"])
    return Start(config, args.flags, path, initial=initial, initial_path=args.init)


def resumed_settings(flags: dict, path: Path) -> Start:
    """The second phase begins from the best checkpoint of the first; all else from the last."""
    checkpoint = load_checkpoint(path)
    if checkpoint["progress"] is None:
        raise UserError(f"{path} is a model without its training: it can be evaluated, shown and "
                        f"begun from (--init), but not resumed")

    was_self_critical = checkpoint["config"].get("self_critical", False)
    if was_self_critical and flags.get("self_critical") is False:
        raise UserError(f"{path} is of self-critical training, which cannot return to cross "
                        f"entropy: see {path.with_name(CROSS_ENTROPY_CHECKPOINT)}")
    begins_second_phase = flags.get("self_critical", False) and not was_self_critical
    if begins_second_phase:
        checkpoint = load_checkpoint(path.with_name(BEST_CHECKPOINT))

    config = get_config(flags=flags, trained=checkpoint["config"])
    is_here = Path(config.log_dir).resolve().is_relative_to(Path.cwd())
    if not is_here and "log_dir" not in flags:  # a checkpoint alone must not say where to write
        raise UserError(f"{path} was trained with --log_dir {config.log_dir}, which is not in this "
                        f"folder: give the flag to log there again, or elsewhere")
    return Start(config, flags, path, checkpoint, begins_second_phase=begins_second_phase)


# -------------------------------------------------------------------------------------------------
# What a run remembers


@dataclass
class Progress:
    """Where a run is, besides its weights; a checkpoint saves all of it.

    A "reading" happens every `print_freq` batches: only then is the device waited for, and sums
    are fetched, checked for NaN, shown and logged.
    """

    batches: dict  # what an epoch's batches depend on
    run: str = ""  # its folder in log_dir; self-critical training has another
    epoch: int = 0  # whole epochs done
    began: int = 0  # epochs done when this phase of the run began
    batch: int = 0  # batches done of the next one
    own_encoder: bool = False  # whether its weights are no longer those of torchvision or timm
    step: int = 0  # batches done in all
    sums: dict = field(default_factory=dict)  # of this epoch, by name, up to the last reading
    recent: dict = field(default_factory=dict)  # since the last reading
    terms: dict = field(default_factory=dict)  # of the loss, name -> (per, weight)
    scaler: dict = field(default_factory=dict)  # of float16; see GradScaler
    seconds: float = 0.0  # of this epoch
    best: list = field(default_factory=lambda: [-math.inf] * 3)  # CIDEr, BLEU-4, minus the loss
    epochs_since_improvement: int = 0
    reading: dict = field(default_factory=dict)  # the last one
    entry: dict = field(default_factory=dict)  # of the last epoch, for the log


class State:
    """A run: its settings, progress, the models as written, optimizers, averages and sums.

    `notes` is what the user should know about its beginning. `word_map` and the number of
    `training_pictures` are of the data that it trains on now.
    """

    def __init__(self, start: Start, word_map: dict, training_pictures: int,
                 device: torch.device):
        config = start.config
        self.config = config
        self.word_map = word_map
        self.device = device
        self.path = start.path
        self.best_path = start.path.with_name(BEST_CHECKPOINT)
        self.notes = []
        self.flush_log = lambda: None  # RunLog's, in the process that logs

        torch.manual_seed(config.seed)
        encoder, decoder = self.begin_models(start)
        self.encoder = encoder.to(device)
        self.decoder = decoder.to(device)
        self.optimizers = make_optimizers(config, self.encoder, self.decoder)
        # Scales the loss, so that small gradients do not vanish in float16, and skips the steps
        # that overflow it (Micikevicius et al. 2018, arXiv 1710.03740).
        is_float16 = precision(config, device) == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=is_float16)

        batches = dict(pictures=training_pictures, batch_size=config.batch_size, seed=config.seed)
        self.progress = Progress(batches)
        if start.begins_second_phase:
            self.begin_second_phase(start.checkpoint)
        elif start.checkpoint:
            self.resume(start.checkpoint, start.flags)
        if start.initial or config.fine_tune_encoder or config.encoder_weights != "imagenet":
            self.progress.own_encoder = True

        self.averages = Averages(self.optimizers, config.ema_decay)
        self.meter = Meter(self.progress, device)
        # Weights that torchvision or timm gives again need no place in every checkpoint.
        self.left_out = {}
        if not self.progress.own_encoder:
            self.left_out = dict(encoder={}, encoder_digest=weights_digest(self.encoder))
        # What the model that this one began with has seen, and its licence.
        self.note = (start.initial or start.checkpoint or {}).get("note")
        if start.initial and self.note:
            self.note = f"Begun from {start.initial_path}, of which is said: {self.note}"

    def begin_models(self, start: Start):
        if start.checkpoint:
            return load_models(start.checkpoint, self.config, self.path)
        if start.initial:
            encoder, decoder, note = load_initial_models(start.initial, start.initial_path,
                                                         self.config, self.word_map)
            self.notes.append(note)
            return encoder, decoder
        return build_models(self.config, len(self.word_map))

    def begin_second_phase(self, checkpoint: dict):
        """Continue the count of epochs and steps of the best checkpoint, in a run of its own with
        a best score of its own: that of the first phase is the luckiest of many epochs."""
        saved = checkpoint["progress"]
        self.progress.epoch = self.progress.began = saved["epoch"]
        self.progress.step = saved["step"]
        self.progress.own_encoder = saved.get("own_encoder", True)

        kept = self.path.with_name(CROSS_ENTROPY_CHECKPOINT)
        if is_first_process():
            save_checkpoint(checkpoint, kept)  # the phase overwrites the other two
        self.notes.append(
            f"self-critical training begins from {self.best_path}: epoch "
            f"{saved['epoch']}, CIDEr on valid, greedy, {saved['best'][0]:.4f}; kept as {kept}")

    def resume(self, checkpoint: dict, flags: dict):
        """Bring progress and optimizers to where a checkpoint was."""
        batches = self.progress.batches
        saved = checkpoint["progress"]
        try:
            progress = Progress(**{"own_encoder": True, **saved})
        except TypeError as error:
            raise UserError(f"{self.path} is damaged: its progress ({error})") from None
        self.progress = progress
        if progress.scaler:
            self.scaler.load_state_dict(progress.scaler)

        begins_fine_tuning = (self.config.fine_tune_encoder
                              and not checkpoint["config"].get("fine_tune_encoder"))
        if begins_fine_tuning:
            progress.epochs_since_improvement = 0  # what stopped improving was the decoder alone

        if progress.batch and progress.batches != batches:
            self.notes.append(f"other batches than in the run so far ({batches}, not "
                              f"{progress.batches}): epoch {progress.epoch + 1} begins again")
            progress.batch, progress.seconds = 0, 0.0
            progress.sums, progress.recent = {}, {}
        progress.batches = batches

        if checkpoint["world_size"] != world_size():
            self.notes.append(f"{world_size()} processes instead of {checkpoint['world_size']}: "
                              f"the same batches and sums; dropout draws other numbers")
        for name in RETIRED:
            if checkpoint["config"].get(name):
                self.notes.append(f"--{name} is a change of benchmarks/changes now: this run goes "
                                  f"on without it")

        self.resume_optimizers(checkpoint, flags)
        if why := self.finished():
            self.notes.append(f"nothing to train: {why}; to continue, --resume with a larger "
                              f"--epochs or --early_stop_epochs, another rate, or "
                              f"--fine_tune_encoder true")

    def resume_optimizers(self, checkpoint: dict, flags: dict):
        """Load the optimizers. A rate among the flags takes effect where it is another than the
        run was given before: a job that is started again with the same command keeps what decay
        has made of it."""
        for name, optimizer in self.optimizers.items():
            if name in checkpoint["optimizers"]:
                load_optimizer(optimizer, checkpoint["optimizers"][name], self.path)

            flag = rate_field(self.config, name)
            given = flags.get(flag)
            group = optimizer.param_groups[0]
            rate = group["lr"]
            if given is None or given == rate:
                continue
            if given == checkpoint["config"].get(flag):
                self.notes.append(f"{flag} {given:g} is what this run was given before: decay has "
                                  f"made it {rate:g}, and it stays so")
            else:
                group["lr"] = given
                self.progress.epochs_since_improvement = 0  # it stopped at the other rate

    # ---------------------------------------------------------------------------------------------
    # A step

    def seed_step(self):
        """Let dropout draw the same numbers wherever a run was interrupted."""
        seed = self.config.seed * 1_000_003 + self.progress.step
        torch.manual_seed(seed * 1_009 + rank())

    def update(self, loss: torch.Tensor, needs_norm: bool) -> torch.Tensor | None:
        """One step against the gradient of the loss. Returns the gradient's norm before clipping;
        None where neither the caller nor float16 needs it."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)

        weights = parameters(self.optimizers)
        norm = None
        if needs_norm or self.scaler.is_enabled():
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        is_second_phase = self.config.self_critical
        clip = self.config.self_critical_clip if is_second_phase else self.config.grad_clip
        if clip:
            torch.nn.utils.clip_grad_value_(weights, clip)

        for optimizer in self.optimizers.values():
            self.scaler.step(optimizer)
        self.scaler.update()
        self.averages.update(self.progress.step)
        self.progress.step += 1
        return norm

    def read(self, norm: torch.Tensor, dataset) -> dict[str, float]:
        """A reading: the means since the last one, the rates in force, the gradient's norm.

        Raises:
            UserError: loss or weights are no longer finite; names epoch, step and pictures.
        """
        self.check_finite(dataset)
        reading = self.meter.read() | self.rates()
        if self.scaler.is_enabled():
            reading["loss_scale"] = self.scaler.get_scale()
        if norm.isfinite():  # its square may be too large for a number though nothing else is
            reading["gradient_norm"] = norm.item()
        self.progress.reading = reading
        return reading

    def check_finite(self, dataset):
        """Name the first step whose loss is not finite, or the last where the weights are not."""
        steps = self.meter.steps
        epoch = self.progress.epoch + 1
        fault = None
        if self.scaler.is_enabled():  # skips steps that are not finite
            if self.scaler.get_scale() < 1:
                raise UserError(f"float16 cannot hold loss and gradient at epoch {epoch}, step "
                                f"{steps[-1][0]}, however they are scaled; the last checkpoint is "
                                f"kept: --resume --precision float32")
        else:
            for batch, rows, loss in steps:
                if not loss.isfinite():
                    fault = batch, rows, f"the loss became {loss.item()}"
                    break
        if fault is None and not are_finite(self.changing()):
            batch, rows, _ = steps[-1]
            fault = batch, rows, "the weights became NaN or infinite"

        if fault:
            batch, rows, what = fault
            names = ", ".join(dataset.image_ids[row] for row in rows.tolist())
            raise UserError(f"{what} at epoch {epoch}, step {batch}, with the pictures {names}; "
                            f"the last checkpoint is kept: --resume with lower rates, or look at "
                            f"these pictures")

    def changing(self) -> list[torch.Tensor]:
        """All that training changes: weights, Adam's moments, the statistics of batch norms."""
        moments = []
        for optimizer in self.optimizers.values():
            for state in optimizer.state.values():
                moments.extend(state.values())
        return [*parameters(self.optimizers), *moments, *self.encoder.buffers()]

    def rates(self) -> dict[str, float]:
        """The rates in force: decoder_lr and, where it is trained, encoder_lr."""
        return {f"{name}_lr": optimizer.param_groups[0]["lr"]
                for name, optimizer in self.optimizers.items()}

    # ---------------------------------------------------------------------------------------------
    # An epoch

    def finish_epoch(self, training: dict, validation: dict, captions: list[dict]) -> bool:
        """Decide what an epoch's scores decide: whether it is the best so far, by CIDEr, of equal
        ones by BLEU-4, then by the validation loss; and whether the rates fall.

        Raises:
            UserError: a score that is not finite.
        """
        config, progress = self.config, self.progress
        for name, value in validation.items():
            if not math.isfinite(value):
                raise UserError(
                    f"the validation's {name} became {value} in epoch {progress.epoch + 1}, which "
                    f"is not saved; the last checkpoint is kept: --resume with lower rates, and "
                    f"should that end here too, put {self.best_path} in its "
                    f"place")

        found = [validation["CIDEr"], validation["BLEU-4"], -validation["loss"]]
        is_best = found > progress.best
        progress.best = max(found, progress.best)
        progress.epochs_since_improvement += 1
        if is_best:
            progress.epochs_since_improvement = 0

        progress.epoch += 1
        progress.batch, progress.seconds = 0, 0.0
        progress.sums = {}
        self.meter.clear()
        pictures = [dict(row=caption["row"], words=caption["words"],
                         alphas=torch.from_numpy(caption["alphas"]))
                    for caption in captions[:PICTURES_SHOWN]]
        progress.entry = dict(
            epoch=progress.epoch, step=progress.step, train=training, valid=validation,
            rates=self.rates(), best=is_best,
            epochs_since_improvement=progress.epochs_since_improvement,
            reading=progress.reading, pictures=pictures)

        # Before the checkpoint is written: a rate that is named on resuming is the one in force.
        if not is_best and progress.epochs_since_improvement % config.lr_decay_epochs == 0:
            for optimizer in self.optimizers.values():
                optimizer.param_groups[0]["lr"] *= config.lr_decay
        return is_best

    def finished(self) -> str | None:
        """Why the run, or its second phase, is over."""
        if self.progress.epoch - self.progress.began >= self.config.epochs:
            return f"all {self.config.epochs} epochs done"
        if self.progress.epochs_since_improvement >= self.config.early_stop_epochs:
            return f"no better score for {self.progress.epochs_since_improvement} epochs"
        return None

    # ---------------------------------------------------------------------------------------------
    # The checkpoint

    def save(self, is_best: bool = False):
        """Write the checkpoint and, after a best epoch, the model alone. Called by all processes;
        the first one writes. Numbers that are not finite are not saved: the next reading stops
        the run."""
        progress = self.progress
        progress.recent = self.meter.of_all_processes()
        progress.scaler = self.scaler.state_dict()
        if not is_first_process():
            return
        sums = torch.tensor([*progress.recent.values()])
        if not are_finite([*self.changing(), sums]):
            return

        checkpoint = self.checkpoint()
        try:
            # The log may be ahead of the checkpoint, but not behind, unless its disk is full.
            self.flush_log()
        finally:
            if is_best:
                with self.averages.in_place(True):
                    save_checkpoint({**checkpoint, "optimizers": {}}, self.best_path)
            with self.averages.in_place(False):  # a validation may be interrupted
                save_checkpoint({**checkpoint, **self.left_out}, self.path,
                                self.config.keep_previous)

    def checkpoint(self) -> dict:
        """All that resuming, evaluation and demo need: tensors and plain containers."""
        note = dict(note=self.note) if self.note else {}
        return dict(
            **note,
            version=CHECKPOINT_VERSION,
            epoch=self.progress.epoch,
            config=vars(self.config).copy(),
            word_map=self.word_map,
            encoder=self.encoder.state_dict(),
            decoder=self.decoder.state_dict(),
            optimizers={name: optimizer.state_dict()
                        for name, optimizer in self.optimizers.items()},
            progress=vars(self.progress).copy(),
            world_size=world_size(),
            command=command_line(),
            git_revision=git_revision())


def command_line() -> str:
    return shlex.join(["python", *sys.argv])


def git_revision() -> str:
    """The commit of this code, with "+" if a Python file was changed or added since; "unknown"
    where the code has no repository of its own, which a copy inside another one has not."""
    folder = Path(__file__).resolve().parent

    def git(*command):
        done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True,
                              check=True, timeout=10)
        return done.stdout.strip()

    try:
        if not Path(git("rev-parse", "--show-toplevel")).samefile(folder):
            return "unknown"
        revision = git("rev-parse", "--short=12", "HEAD")
        changes = git("status", "--porcelain", "--", ":(glob)*.py", ":(glob)*/*.py")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{revision}+" if changes else revision


def make_optimizers(config: Config, encoder, decoder) -> dict[str, torch.optim.Adam]:
    """Adam for the decoder and, when fine-tuning, for the encoder."""
    trained = {"decoder": decoder}
    if config.fine_tune_encoder:
        trained["encoder"] = encoder

    optimizers = {}
    for name, half in trained.items():
        weights = [weight for weight in half.parameters() if weight.requires_grad]
        rate = getattr(config, rate_field(config, name))
        optimizers[name] = torch.optim.Adam(weights, lr=rate, fused=True)
    return optimizers


def rate_field(config: Config, name: str) -> str:
    """The field of Config that an optimizer's rate begins with."""
    return "self_critical_lr" if config.self_critical else f"{name}_lr"


def parameters(optimizers: dict) -> list[torch.nn.Parameter]:
    """What is trained."""
    return [weight for optimizer in optimizers.values()
            for group in optimizer.param_groups for weight in group["params"]]


def are_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether no number in any of them is NaN or infinite. The device is waited for once."""
    tensors = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return bool(torch.nn.utils.get_total_norm(tensors, math.inf).isfinite())


class Averages:
    """Exponential moving averages of the trained weights (Polyak and Juditsky 1992), kept in the
    optimizers' states.

    `decay` is per step; in the first ones it is (1 + step) / (10 + step), as TensorFlow's
    ExponentialMovingAverage has it; 0: there are none.
    """

    def __init__(self, optimizers: dict, decay: float):
        self.optimizers = optimizers
        self.decay = decay
        self.are_in_place = False
        if not decay:  # should there be one again later, they begin anew
            for optimizer in optimizers.values():
                for state in optimizer.state.values():
                    state.pop("average", None)

    def pairs(self):
        """The weights, and their averages."""
        weights, averages = [], []
        for optimizer in self.optimizers.values():
            for weight, state in optimizer.state.items():
                # After Adam's first step, which takes a state that is not empty for its own.
                state.setdefault("average", weight.detach().clone())
                weights.append(weight.detach())
                averages.append(state["average"])
        return weights, averages

    def update(self, step: int):
        """Take the weights of one more step in; `step` counts those before."""
        if self.decay:
            weights, averages = self.pairs()
            decay = min(self.decay, (1 + step) / (10 + step))
            get_ema_multi_avg_fn(decay)(averages, weights, None)

    @contextmanager
    def in_place(self, wanted: bool):
        """Whether the averages stand in the weights' place, and these in theirs. Numbers move,
        not tensors, which graphs and the like have recorded."""
        changes = self.decay and wanted != self.are_in_place
        if changes:
            self.exchange()
        try:
            yield
        finally:
            if changes:
                self.exchange()

    def exchange(self):
        for weight, average in zip(*self.pairs()):
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)
        self.are_in_place = not self.are_in_place


# -------------------------------------------------------------------------------------------------
# Sums and means


class Meter:
    """The sums of an epoch: on the device, so that no step waits for it, fetched at a reading."""

    def __init__(self, progress: Progress, device: torch.device):
        self.progress = progress
        self.dtype = precise(device)
        self.names = list(progress.recent)
        self.sums = torch.tensor([*progress.recent.values()], dtype=self.dtype, device=device)
        if not is_first_process():  # what was saved is of all processes
            self.sums.zero_()
        self.steps = []  # since the last reading: number of the batch, rows, loss
        self.start()

    def start(self):
        """Let the clock run: while an epoch trains, not while it is validated."""
        self.clock = time.perf_counter()
        self.seconds_read = self.progress.seconds

    def add(self, terms: dict[str, Term], counts: dict[str, torch.Tensor], loss: torch.Tensor,
            rows: torch.Tensor):
        """A step: what its loss consists of, and what that is a mean over."""
        progress = self.progress
        numbers = {name: term.sum.detach() for name, term in terms.items()} | counts
        values = torch.stack([value.to(self.dtype) for value in numbers.values()])
        if self.names == list(numbers):
            values = values + self.sums
        self.names, self.sums = list(numbers), values

        self.steps.append((progress.batch, rows, loss.detach()))
        progress.terms = kinds_of(terms)
        now = time.perf_counter()
        progress.seconds += now - self.clock
        self.clock = now

    def of_all_processes(self) -> dict[str, float]:
        return dict(zip(self.names, sum_over_processes(self.sums.clone()).tolist()))

    def read(self) -> dict[str, float]:
        """The means since the last reading, which begin anew."""
        progress = self.progress
        sums = self.of_all_processes()
        seconds = progress.seconds - self.seconds_read
        found = means(sums, progress.terms, seconds)

        if progress.sums and progress.sums.keys() != sums.keys():  # resumed with another term
            progress.sums = {}
            progress.seconds = seconds
        for name, value in sums.items():
            progress.sums[name] = progress.sums.get(name, 0.0) + value
        self.seconds_read = progress.seconds
        self.clear()
        return found

    def clear(self):
        self.sums = torch.zeros_like(self.sums)
        self.steps = []

    def means(self) -> dict[str, float]:
        """The means of the epoch up to the last reading."""
        return means(self.progress.sums, self.progress.terms, self.progress.seconds)


def means(sums: dict[str, float], terms: dict[str, tuple], seconds: float) -> dict[str, float]:
    """The loss, then each of its terms by its name, then images_per_s over all processes.

    `sums` has each term's and each count's, `terms` says what each is a mean over and its weight.
    cross_entropy is in nats per token, coverage the mean of (1 - sum of alpha)^2, top5 a share of
    the tokens.
    """
    found = {name: sums[name] / max(sums[per], 1) for name, (per, _) in terms.items()}
    loss = sum(weight * found[name] for name, (_, weight) in terms.items())
    return dict(loss=loss, **found, images_per_s=sums["images"] / seconds)


def kinds_of(terms: dict[str, Term]) -> dict[str, tuple[str, float]]:
    """What each term is a mean over, and its weight in the loss."""
    return {name: (term.per, term.weight) for name, term in terms.items()}


def mean_loss(terms: dict[str, Term], counts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of the global batch: sums divided by its counts, which do not depend on the number
    of processes. DistributedDataParallel averages the gradients of the processes, but these are
    parts of one sum."""
    totals = sum_over_processes(torch.stack([*counts.values()])).clamp(min=1)
    total = dict(zip(counts, totals))
    parts = [term.weight * term.sum / total[term.per] for term in terms.values() if term.weight]
    return world_size() * sum(parts)


def with_skipped_steps(terms: dict[str, Term], norm: torch.Tensor,
                       images: torch.Tensor) -> dict[str, Term]:
    """The terms, finite, and the share of steps that float16 skips, as their gradient overflowed.
    """
    finite = {name: term._replace(sum=term.sum.detach().nan_to_num(0, 0, 0))
              for name, term in terms.items()}
    return finite | dict(skipped_steps=Term((~norm.isfinite()) * images, "images"))


# -------------------------------------------------------------------------------------------------
# Saving on the way


class Pause:
    """Saves a run on its way: every so many minutes, and before it stops when it is asked to
    (SIGTERM, Ctrl-C, a closed terminal). To be called after every batch, by all processes alike:
    they agree on what to do."""

    TRAIN_ON, SAVE = -1, 0  # what a process may want; otherwise the number of a signal
    REQUESTS = signal.SIGTERM, signal.SIGINT  # what else stops a run is a terminal that is closed

    def __init__(self, minutes: float, save):
        self.seconds = 60 * minutes
        self.save = save
        self.since = time.monotonic()
        self.signal = None
        self.asked = 0.0
        for number in STOPPING:
            is_ignored = signal.getsignal(number) == signal.SIG_IGN  # as nohup does with SIGHUP
            if number in self.REQUESTS or not is_ignored:
                signal.signal(number, self.remember)

    def remember(self, number, frame):
        if self.signal is None:
            self.signal = number
            self.asked = time.monotonic()
            if number not in self.REQUESTS:
                discard_output(1, 2)  # what is written to a closed terminal fails
            if is_first_process():
                os.write(2, b"\nsaving after this step\n")  # print may be what is interrupted
        elif time.monotonic() > self.asked + 10:
            # Not at once: Ctrl-C comes from the terminal and from torchrun, both meaning one.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __call__(self):
        wanted = self.TRAIN_ON
        if time.monotonic() - self.since > self.seconds:
            wanted = self.SAVE
        if self.signal is not None:
            wanted = self.signal

        order = largest_of_processes(wanted)
        if order == self.TRAIN_ON:
            return
        self.save()
        self.since = time.monotonic()
        if order == self.SAVE:
            return

        largest_of_processes(order)  # until the first has saved: torchrun kills all when one ends
        if is_first_process():
            print(f"\nstopped by {signal.Signals(order).name}: continue with --resume",
                  file=sys.stderr)
        end_distributed()
        sys.exit(128 + order)
