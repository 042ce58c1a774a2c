"""Train a captioner; by default the full AI Challenger run: frozen ResNet-101, soft attention.

    python train.py                                       # one GPU, or the CPU
    torchrun --nproc_per_node=8 train.py                  # eight GPUs; batch_size counts the pictures of all of them
    python train.py --resume                              # from the last checkpoint, also within an epoch
    python train.py --preset own --init models/photographs.pth.tar      # a few pictures of one's own
    python train.py --resume --fine_tune_encoder true     # then train the encoder too
    python train.py --cache_features true                 # run the frozen encoder once, not in every epoch
    python train.py --resume --self_critical true         # then optimise CIDEr-D itself, from the best checkpoint

Writes models/checkpoint.pth.tar, all that a run needs to go on, every `checkpoint_minutes`, after every epoch and when
it is told to stop; models/BEST_checkpoint.pth.tar, the model alone, after every best epoch; and logs/RUN/ with
TensorBoard's events, log.jsonl (a line per epoch) and config.json (settings, command, versions). A resumed run ends as
if it had never been interrupted.

Departures from the original, and why:
- Pictures come in batches with all their captions: one pass of the encoder instead of five.
- The best checkpoint is chosen by the CIDEr of generated captions, then by their BLEU-4 and the validation loss; the
  original's BLEU-4 is of captions that were fed the true words, which says little about what the model writes itself.
- The last, incomplete batch of an epoch is left out, so that batches do not depend on the number of processes; a set
  of fewer pictures than a batch is one batch.
- One tokenization makes the word map and uses it; the original counts the words of jieba's full mode and then encodes
  those of its exact mode. Pictures are in HDF5.
- State dicts, not pickled modules: any version of the code can read them, and reading them runs none.
"""
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from utils import (UserError, alone, discard_output, from_first_process, gather_lists, get_device, init_distributed,
                   is_first_process, keep_freed_memory, largest_of_processes, meet_processes, precise, precision,
                   resumes, run, sum_over_processes, to_device, weights_digest)

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import fast
from checkpoint import (BEST_CHECKPOINT, CHECKPOINT, CROSS_ENTROPY_CHECKPOINT, load_checkpoint,
                        load_initial_models, load_models, load_optimizer, save_checkpoint)
from config import CHECKPOINT_VERSION, get_config, parse_args
from datasets import (STOPPING, CaptionDataset, counts_of, largest_batch_size, load_word_map, make_loader,
                      tokenize_references)
from fast.features import keep_features
from decoding import generate
from models import Term, build_models, caption_loss, pixel_positions
from runlog import RunLog, command_line, git_revision, new_run
from scores import score
from self_critical import SelfCritical

PICTURES_SHOWN = 4  # validation pictures drawn in TensorBoard after every epoch


@dataclass
class Progress:
    """Where a run is, besides its weights; a checkpoint saves all of it.

    A "reading" happens every `print_freq` batches: only then is the device waited for, and sums are fetched, checked
    for NaN, shown and logged.
    """

    run: str  # its folder in log_dir; self-critical training has another
    batches: dict  # what an epoch's batches depend on
    epoch: int = 0  # whole epochs done
    began: int = 0  # epochs done when this phase of the run began
    batch: int = 0  # batches done of the next one
    own_encoder: bool = False  # whether its weights are not, or not any more, those of torchvision or timm
    step: int = 0  # batches done in all
    sums: dict = field(default_factory=dict)  # of this epoch, by name, up to the last reading
    recent: dict = field(default_factory=dict)  # since the last reading; see Sums
    terms: dict = field(default_factory=dict)  # of the loss, name -> (per, weight)
    scaler: dict = field(default_factory=dict)  # of float16; see GradScaler
    seconds: float = 0.0  # of this epoch
    best: list = field(default_factory=lambda: [-math.inf] * 3)  # CIDEr, BLEU-4, minus the validation loss
    epochs_since_improvement: int = 0
    reading: dict = field(default_factory=dict)  # the last one
    entry: dict = field(default_factory=dict)  # of the last epoch, for the log


def main():
    args = parse_args(__doc__, {
        "resume": dict(action="store_true", help="continue from the last checkpoint"),
        "init": dict(metavar="CHECKPOINT", help="begin a new run from the model of this one, whatever its words"),
    })
    rank, world_size, store = meet_processes()
    model_dir = Path(get_config(args.preset, args.flags).model_dir)
    with alone(model_dir / "train.lock", "--model_dir") if rank == 0 else nullcontext():
        train(args, rank, world_size, store)


def train(args, rank, world_size, store):
    """A run, or the rest of one. Args: args (Namespace): of parse_args; rank, world_size, store: of meet_processes."""
    config, checkpoint, path, initial = settings(args, rank, store)
    begins = config.self_critical and not checkpoint["config"].get("self_critical")  # the second phase
    keep_freed_memory()
    device = get_device(config)
    init_distributed(device, rank, world_size, store)
    word_map, train_loader, valid_loader = load_data(config, checkpoint, path, device, rank, world_size)
    references = tokenize_references(valid_loader.dataset) if rank == 0 else None

    torch.manual_seed(config.seed)
    notes = []
    if checkpoint:
        encoder, decoder = load_models(checkpoint, config, path)
    elif initial:
        encoder, decoder, note = load_initial_models(initial, args.init, config, word_map)
        notes = [note]
    else:
        encoder, decoder = build_models(config, len(word_map))
    encoder, decoder = encoder.to(device), decoder.to(device)
    optimizers = make_optimizers(config, encoder, decoder)
    batches = dict(pictures=len(train_loader.dataset), batch_size=config.batch_size, seed=config.seed)
    continues = checkpoint and not begins
    progress = Progress(run=checkpoint["progress"]["run"] if continues else
                        from_first_process(new_run(config) if rank == 0 else None), batches=batches)
    if begins:
        notes = begin_self_critical(progress, checkpoint, path, rank)
    elif checkpoint:
        notes = resume(progress, optimizers, checkpoint, config, args.flags, path, world_size)
    if initial or config.fine_tune_encoder or config.encoder_weights != "imagenet":
        progress.own_encoder = True
    recent, averages = Sums(progress.recent, device, rank), Averages(optimizers, config.ema_decay)
    scaler = make_scaler(config, device)
    if progress.scaler:
        scaler.load_state_dict(progress.scaler)
    runs = prepare(encoder, decoder, config, device, (train_loader.dataset, valid_loader.dataset), rank, world_size)
    train_decoder, objective = parallel(runs.decoder, world_size), teacher_forced
    if config.self_critical:
        objective = SelfCritical(runs.decoder, train_loader.dataset, config, word_map, device, rank, world_size)
    log = None
    if rank == 0:
        print(start_line(config, encoder, optimizers, device, world_size, len(word_map), progress, train_loader,
                         valid_loader), runs.summary(), *notes, sep="\n")
        log = RunLog(config, progress, runs.report, checkpoint if continues else None, len(train_loader),
                     valid_loader.dataset, pixel_positions(encoder, config.image_size, config.encoded_image_size))

    # Weights that torchvision or timm gives again need no place in every checkpoint.
    left_out = {} if progress.own_encoder else dict(encoder={}, encoder_digest=weights_digest(encoder))

    def save(best=False):
        progress.recent, progress.scaler = recent.of_all_processes(), scaler.state_dict()
        if rank > 0 or not are_finite([*changing(encoder, optimizers), torch.tensor([*progress.recent.values()])]):
            return  # the next reading will stop the run
        saved = checkpoint_of(config, word_map, encoder, decoder, optimizers, progress, world_size)
        try:
            log.flush()  # the log may be ahead of the checkpoint, but not behind, unless its disk is full
        finally:
            if best:  # the model alone
                with averages.in_place(True):
                    save_checkpoint({**saved, "optimizers": {}}, path.with_name(BEST_CHECKPOINT))
            with averages.in_place(False):  # a validation, with the averages in place, may be interrupted
                save_checkpoint({**saved, **left_out}, path, config.keep_previous)

    if begins:
        save()  # from here on this checkpoint alone decides what is resumed; the best one is soon another's
    pause = Pause(config.checkpoint_minutes, save)
    while not finished(config, progress):
        training = train_one_epoch(runs.training_encoder, train_decoder, objective, optimizers, scaler, averages,
                                   train_loader, config, progress, recent, log, pause)
        with averages.in_place(True):
            validation, captions = validate(runs.encoder, runs.decoder, valid_loader, config, word_map, pause)
        pause()
        words = [caption["words"] for caption in captions]
        validation.update(from_first_process(score(words, references) if rank == 0 else None),
                          distinct_captions=len(set(map(tuple, words))))
        best = finish_epoch(progress, recent, training, validation, captions, optimizers, config, path)
        save(best)
        if log:  # after the checkpoint, which holds the entry: a run that is killed here can log it again
            log.epoch(progress.entry)
            print(epoch_line(progress.entry), flush=True)
    if log:
        print(last_line(config, progress, path))
        log.close()
    if dist.is_initialized():
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Before the first step


def settings(args, rank, store):
    """The run's settings, and what it continues from or begins with.

    Returns: Config; checkpoint (dict) that it continues from, or None; Path of it; that of --init (dict), or None.
    """
    config = get_config(args.preset, args.flags)
    path = Path(config.model_dir) / CHECKPOINT
    if not resumes(path, args.resume, rank, store):
        initial = None
        if args.init:
            if "encoder_weights" in args.flags:
                raise UserError("--encoder_weights is what --init takes from its checkpoint: omit one of the two")
            initial = load_checkpoint(args.init)
            config = get_config(args.preset, args.flags, initial=initial["config"])
        if config.self_critical:
            raise UserError("--self_critical true continues from a model trained by cross entropy: train one, then "
                            "give the same command with --resume --self_critical true")
        return config, None, path, initial
    checkpoint = load_checkpoint(path)
    if checkpoint["progress"] is None:
        raise UserError(f"{path} is a model without its training: it can be evaluated, shown and begun from (--init), "
                        f"but not resumed")
    was, now = (given.get("self_critical", False) for given in (checkpoint["config"], args.flags))
    if was and args.flags.get("self_critical") is False:
        raise UserError(f"{path} is of self-critical training, which cannot return to cross entropy: see "
                        f"{path.with_name(CROSS_ENTROPY_CHECKPOINT)}")
    if now and not was:
        checkpoint = load_checkpoint(path.with_name(BEST_CHECKPOINT))
    trained = get_config(flags=args.flags, trained=checkpoint["config"])
    if "log_dir" not in args.flags and not Path(trained.log_dir).resolve().is_relative_to(Path.cwd()):
        raise UserError(f"{path} was trained with --log_dir {trained.log_dir}, which is not in this folder: give the "
                        f"flag to log there again, or elsewhere")  # a checkpoint alone must not say where to write
    return trained, checkpoint, path, None


def load_data(config, checkpoint, path, device, rank, world_size):
    """Returns: word map (dict), DataLoader of the training pictures, DataLoader of the validation pictures."""
    word_map = load_word_map(config.data_dir)
    if checkpoint and checkpoint["word_map"] != word_map:
        raise UserError(f"{path} was trained with another word map than {config.data_dir}/WORDMAP.json: point "
                        f"--data_dir at the data of that run, or train anew with another --model_dir")
    train_set, valid_set = (CaptionDataset(config, split, word_map) for split in ("train", "valid"))
    if not any(valid_set.raw_captions):
        raise UserError(f"{valid_set.path} has no captions to choose the best checkpoint by")
    return (word_map, make_loader(train_set, config, True, rank, world_size),
            make_loader(valid_set, for_validation(config, device), False, rank, world_size))


def for_validation(config, device):
    """The settings with larger batches on a GPU, which waits for the host in greedy search: a step starts as many small
    kernels whatever the batch. Without gradients four times as many pictures take about as much memory.

    Returns: Config.
    """
    batch_size = max(config.batch_size, min(4 * config.batch_size, 128)) if device.type == "cuda" else config.batch_size
    return replace(config, batch_size=batch_size)


def make_optimizers(config, encoder, decoder):
    """Adam for the decoder and, when fine-tuning, for the encoder. Returns: dict name -> Adam."""
    trained = {"decoder": decoder, "encoder": encoder} if config.fine_tune_encoder else {"decoder": decoder}
    return {name: torch.optim.Adam((p for p in half.parameters() if p.requires_grad),
                                   lr=getattr(config, rate_field(config, name)), fused=True)
            for name, half in trained.items()}


def make_scaler(config, device):
    """What scales the loss, so that small gradients do not vanish in float16, and skips the steps that overflow it
    (Micikevicius et al. 2018, arXiv 1710.03740). Returns: GradScaler, disabled in other precisions."""
    return torch.amp.GradScaler(device.type, enabled=precision(config, device) == torch.float16)


def rate_field(config, name):
    """The field of Config that an optimizer's rate begins with."""
    return "self_critical_lr" if config.self_critical else f"{name}_lr"


def begin_self_critical(progress, checkpoint, path, rank):
    """Begin the second phase: the progress of a checkpoint of the first, under a new run, with a best score of its own:
    that of the first phase is the luckiest of many epochs.

    Returns: list of str: what the user should know.
    """
    saved, kept = checkpoint["progress"], path.with_name(CROSS_ENTROPY_CHECKPOINT)
    progress.epoch = progress.began = saved["epoch"]
    progress.step = saved["step"]
    progress.own_encoder = saved.get("own_encoder", True)
    if rank == 0:
        save_checkpoint(checkpoint, kept)  # the phase overwrites the other two
    return [f"self-critical training begins from {path.with_name(BEST_CHECKPOINT)}: epoch {progress.epoch}, CIDEr on "
            f"valid, greedy, {saved['best'][0]:.4f}; kept as {kept}"]


def resume(progress, optimizers, checkpoint, config, flags, path, world_size):
    """Bring progress and optimizers to where a checkpoint was.

    A rate among the flags takes the place of the optimizer's where it is another than the run was given before: a job
    that is started again with the same command keeps what decay has made of it.

    Returns: list of str: what the user should know.
    """
    saved, batches, notes = checkpoint["progress"], progress.batches, []
    for expected in fields(Progress):
        kinds = (float, int) if expected.type is float else expected.type
        if not isinstance(saved.get(expected.name, getattr(progress, expected.name)), kinds):
            raise UserError(f"{path} is damaged: its progress has no proper {expected.name}")
    vars(progress).update({"own_encoder": True, **saved}, batches=batches)
    if config.fine_tune_encoder and not checkpoint["config"].get("fine_tune_encoder"):
        progress.epochs_since_improvement = 0  # what stopped improving was the decoder alone
    if progress.batch and saved["batches"] != batches:
        notes.append(f"other batches than in the run so far ({batches}, not {saved['batches']}): epoch "
                     f"{progress.epoch + 1} begins again")
        progress.batch, progress.sums, progress.recent, progress.seconds = 0, {}, {}, 0.0
    if checkpoint["world_size"] != world_size:
        notes.append(f"{world_size} processes instead of {checkpoint['world_size']}: the same batches and sums; "
                     f"dropout draws other numbers")
    for name, optimizer in optimizers.items():
        if name in checkpoint["optimizers"]:
            load_optimizer(optimizer, checkpoint["optimizers"][name], path)
        rate, flag = optimizer.param_groups[0]["lr"], rate_field(config, name)
        given = flags.get(flag)
        if given not in (None, rate) and given == checkpoint["config"].get(flag):
            notes.append(f"{flag} {given:g} is what this run was given before: decay has made it {rate:g}, and it "
                         f"stays so")
        elif given is not None:
            optimizer.param_groups[0]["lr"] = given
            if given != rate:
                progress.epochs_since_improvement = 0  # what stopped improving was at the other rate
    if why := finished(config, progress):
        notes.append(f"nothing to train: {why}; to continue, --resume with a larger --epochs or --early_stop_epochs, "
                     f"another rate, or --fine_tune_encoder true")
    return notes


def prepare(encoder, decoder, config, device, sets, rank, world_size):
    """Choose how the two halves run in training and in validation. Returns: fast.Chosen."""
    if world_size > 1 and device.type == "cuda" and config.fine_tune_encoder:
        from timm.layers import convert_sync_batchnorm  # PyTorch's drops the activation that is part of timm's norms

        encoder = convert_sync_batchnorm(encoder)
    runs = fast.choose(encoder, decoder, config, precision(config, device))
    if config.cache_features:
        training, validation = (keep_features(dataset, encoder, runs.encoder, config, rank, world_size)
                                for dataset in sets)
        return runs._replace(training_encoder=training, encoder=validation)
    return runs._replace(training_encoder=parallel(encoder, world_size)) if config.fine_tune_encoder else runs


def parallel(module, world_size):
    """Wrap a module so that its gradients are averaged over the processes, where that is needed."""
    return DistributedDataParallel(module) if world_size > 1 else module


def start_line(config, encoder, optimizers, device, world_size, words, progress, train_loader, valid_loader):
    """Data, model, where it runs, the rates in force, the log. Returns: str; more lines where something of that is
    not what the user would expect."""
    dtype = str(precision(config, device)).removeprefix("torch.")
    line = (f"{len(train_loader.dataset)} training and {len(valid_loader.dataset)} validation pictures, {words} words; "
            f"{config.encoder} ({config.encoder_weights}), {device} x {world_size}, "
            f"{dtype}; rates: "
            + ", ".join(f"{name} {rate:g}" for name, rate in rates(optimizers).items())
            + ("" if config.fine_tune_encoder else ", encoder frozen")
            + f"; log: {Path(config.log_dir) / progress.run}"
            + (f"; resuming at epoch {progress.epoch + 1}, batch {progress.batch + 1}" if progress.step else ""))
    if config.precision not in ("auto", dtype):
        line += f"\nwarning: this {device.type} device would only imitate {config.precision}, so float32 is used"
    # Batch norms count the batches that they were trained on.
    is_random = not any(count > 0 for name, count in encoder.named_buffers() if name.endswith("num_batches_tracked"))
    if config.encoder_weights == "none" and not config.fine_tune_encoder and is_random:
        line += ("\nwarning: with --encoder_weights none the encoder is random, and without --fine_tune_encoder true "
                 "it stays so: give that, or begin with --encoder_weights imagenet")
    pictures, sampler = len(train_loader.dataset), train_loader.sampler
    fitting = max(largest_batch_size(pictures), world_size)
    if sampler.batch_size > fitting:
        line += (f"\nwarning: an epoch has only {len(sampler)} steps of {sampler.batch_size} pictures "
                 f"and leaves out {pictures % sampler.batch_size} of {pictures}; --batch_size {fitting} "
                 f"gives {pictures // fitting} steps and leaves out {pictures % fitting}")
    return line


def checkpoint_of(config, word_map, encoder, decoder, optimizers, progress, world_size):
    """All that resuming, evaluation and demo need. Returns: dict of tensors and plain containers."""
    return dict(version=CHECKPOINT_VERSION, epoch=progress.epoch, config=vars(config).copy(), word_map=word_map,
                encoder=encoder.state_dict(), decoder=decoder.state_dict(),
                optimizers={name: optimizer.state_dict() for name, optimizer in optimizers.items()},
                progress=vars(progress).copy(), world_size=world_size, command=command_line(),
                git_revision=git_revision())


class Pause:
    """Saves a run on its way: every so many minutes, and when it is asked to stop (SIGTERM, Ctrl-C), before it does.

    To be called after every batch, by all processes alike: they agree on what to do.

    Args:
        minutes (float). save (function): writes the checkpoint.
    """

    def __init__(self, minutes, save):
        self.seconds, self.save, self.since, self.signal, self.asked = 60 * minutes, save, time.monotonic(), 0, 0.0
        for number in STOPPING:
            is_of_terminal = number not in (signal.SIGTERM, signal.SIGINT)
            if not is_of_terminal or signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self.remember)

    def remember(self, number, frame):
        if not self.signal:
            self.signal, self.asked = number, time.monotonic()
            if number not in (signal.SIGTERM, signal.SIGINT):  # the terminal is closed: what is written to it fails
                discard_output(1, 2)
            if is_first_process():
                os.write(2, b"\nsaving after this step\n")  # print may be what the signal interrupts
        elif time.monotonic() > self.asked + 10:  # Ctrl-C comes from the terminal and from torchrun, both meaning one
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __call__(self):
        due = time.monotonic() - self.since > self.seconds
        order = largest_of_processes(self.signal or -int(not due))  # a signal; or 0, save; or -1, train on
        if order < 0:
            return
        self.save()
        self.since = time.monotonic()
        if order:
            largest_of_processes(order)  # until the first one has saved, as torchrun kills all when one ends
            if is_first_process():
                print(f"\nstopped by {signal.Signals(order).name}: continue with --resume", file=sys.stderr)
            if dist.is_initialized():
                dist.destroy_process_group()
            sys.exit(128 + order)


# ---------------------------------------------------------------------------------------------------------------------
# An epoch


class Sums:
    """What training adds up by name, on the device, so that no step waits for it.

    Args: saved (dict): name -> float, of all processes. device (torch.device). rank (int): only the first one's count.
    """

    def __init__(self, saved, device, rank):
        self.names = list(saved)
        self.dtype = precise(device)
        self.values = torch.tensor([saved[name] * (rank == 0) for name in saved], dtype=self.dtype, device=device)

    def add(self, numbers):
        """Args: numbers (dict): name -> 0-dim tensor. Other names than so far begin new sums."""
        values = torch.stack([value.to(self.dtype) for value in numbers.values()])
        self.values = self.values + values if self.names == list(numbers) else values
        self.names = list(numbers)

    def of_all_processes(self):
        return dict(zip(self.names, sum_over_processes(self.values.clone()).tolist()))

    def clear(self):
        self.values.zero_()


def teacher_forced(encoder, decoder, images, captions, lengths, config, step):
    """The loss of the true captions. Returns: see SelfCritical."""
    terms = caption_loss(*decoder(encoder(images), captions, lengths), lengths, config)
    return terms, counts_of(lengths), {}


class Averages:
    """Exponential moving averages of the trained weights (Polyak and Juditsky 1992), kept in the optimizers' states.

    Args: optimizers (dict). decay (float): per step; in the first ones (1 + step) / (10 + step), as TensorFlow's
    ExponentialMovingAverage has it; 0: there are none.
    """

    def __init__(self, optimizers, decay):
        self.optimizers, self.decay, self.are_in_place = optimizers, decay, False
        for state in (state for optimizer in optimizers.values() for state in optimizer.state.values()):
            if not decay:
                state.pop("average", None)  # should there be a decay again later, they begin anew

    def pairs(self):
        """Returns: list of weights, list of their averages."""
        states = [item for optimizer in self.optimizers.values() for item in optimizer.state.items()]
        for weight, state in states:  # after Adam's first step, which takes a state that is not empty for its own
            state.setdefault("average", weight.detach().clone())
        return [weight.detach() for weight, _ in states], [state["average"] for _, state in states]

    def update(self, step):
        """Args: step (int): those done before."""
        if self.decay:
            weights, averages = self.pairs()
            get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))(averages, weights, None)

    @contextmanager
    def in_place(self, wanted):
        """Whether the averages stand in the weights' place, and these in theirs. Numbers move, not tensors, which
        graphs and the like have recorded. Args: wanted (bool)."""
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


def train_one_epoch(encoder, decoder, objective, optimizers, scaler, averages, loader, config, progress, recent, log,
                    pause):
    """One pass over the training pictures, each with all its captions, or the rest of one.

    Losses are sums divided by the counts of the whole global batch, so they do not depend on how many processes share
    it. Nothing waits for the device but the readings every `print_freq` steps.

    Args:
        encoder, decoder (nn.Module): wrapped for distributed training where there are several processes.
        objective (function): teacher_forced, or a SelfCritical. optimizers (dict). scaler (GradScaler): of
        float16, otherwise disabled. averages (Averages). loader (DataLoader). config (Config). progress (Progress).
        recent (Sums). log (RunLog or None): of the first process. pause (Pause).
    Returns:
        dict: see `means`.
    Raises:
        UserError: the loss or the weights are no longer finite; names epoch, step and pictures.
    """
    encoder.train()
    decoder.train(not config.self_critical)
    device = next(decoder.parameters()).device
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    loader.sampler.epoch, loader.sampler.first = progress.epoch, progress.batch
    unread, seconds, steps, clock = [], {}, len(loader), time.perf_counter()
    before = progress.seconds  # at the last reading
    bar = tqdm(loader, desc=f"epoch {progress.epoch + 1}", unit="batch", total=steps, initial=progress.batch,
               disable=log is None)
    for images, captions, lengths, rows in bar:
        # Seeded by the step, so that dropout draws the same numbers wherever a run was interrupted.
        torch.manual_seed((config.seed * 1_000_003 + progress.step) * 1_009 + rank)
        images, captions = to_device(images, device), to_device(captions, device)
        with mixed_precision(config, device):
            terms, counts, spent = objective(encoder, decoder, images, captions, lengths, config, progress.step)
        numbers = to_device(torch.stack([*counts.values()]), device)
        total = dict(zip(counts, sum_over_processes(numbers.clone()).clamp(min=1)))
        # DistributedDataParallel averages the gradients of the processes, but these are parts of one sum.
        loss = world_size * sum(term.weight * term.sum / total[term.per] for term in terms.values() if term.weight)
        number = progress.batch + 1
        is_read = number % config.print_freq == 0 or number == steps
        norm = update(loss, optimizers, scaler, config, is_read)
        averages.update(progress.step)
        if scaler.is_enabled():
            terms = with_skipped_steps(terms, norm, counts["images"])
        recent.add({name: term.sum.detach() for name, term in terms.items()} | dict(zip(counts, numbers)))
        unread.append((number, rows, loss.detach()))
        seconds = {name: seconds.get(name, 0.0) + value for name, value in spent.items()}
        now = time.perf_counter()
        progress.batch, progress.step, progress.seconds = number, progress.step + 1, progress.seconds + now - clock
        progress.terms = {name: (term.per, term.weight) for name, term in terms.items()}
        clock = now
        if is_read:
            check_finite(unread, changing(encoder, optimizers), scaler, progress, loader.dataset)
            sums = recent.of_all_processes()
            recent.clear()
            read = means(sums, progress.terms, progress.seconds - before)
            if progress.sums and progress.sums.keys() != sums.keys():  # resumed with another term: means of the rest
                progress.sums, progress.seconds = {}, progress.seconds - before
            progress.sums = {name: progress.sums.get(name, 0.0) + value for name, value in sums.items()}
            progress.reading = {**read, **rates(optimizers)}
            if seconds:
                seconds["update"] = progress.seconds - before - sum(seconds.values())
                progress.reading |= {f"seconds_{name}": value / len(unread) for name, value in seconds.items()}
            unread, seconds, before = [], {}, progress.seconds
            bar.set_postfix({name: f"{value:.3g}" for name, value in read.items()}, refresh=False)
            if scaler.is_enabled():
                progress.reading["loss_scale"] = scaler.get_scale()
            if norm.isfinite():  # its square may be too large for a number though nothing else is
                progress.reading["gradient_norm"] = norm.item()
            if log and number < steps:  # an epoch's last reading is logged with the epoch
                log.reading(progress.reading, progress.step)
        pause()
    return means(progress.sums, progress.terms, progress.seconds)


def update(loss, optimizers, scaler, config, is_read):
    """One step against the gradient of the loss, clipped.

    Args: loss: 0-dim. optimizers (dict). scaler (GradScaler). config (Config). is_read (bool): whether the norm is.
    Returns: norm of the gradient before clipping, 0-dim; None where neither a reading nor float16 needs it.
    """
    for optimizer in optimizers.values():
        optimizer.zero_grad()
    scaler.scale(loss).backward()
    for optimizer in optimizers.values():
        scaler.unscale_(optimizer)
    norm = None
    if is_read or scaler.is_enabled():
        norm = torch.nn.utils.get_total_norm(p.grad for p in parameters(optimizers) if p.grad is not None)
    if clip := config.self_critical_clip if config.self_critical else config.grad_clip:
        torch.nn.utils.clip_grad_value_(parameters(optimizers), clip)
    for optimizer in optimizers.values():
        scaler.step(optimizer)
    scaler.update()
    return norm


@torch.no_grad()
def validate(encoder, decoder, loader, config, word_map, pause):
    """Teacher-forced loss and top-5 accuracy, and greedy captions, of every validation picture once.

    Args:
        encoder, decoder (nn.Module): not wrapped. loader (DataLoader). config (Config). word_map (dict). pause (Pause).
    Returns:
        dict: see `means`.
        list of dict: the captions of all processes (see models.generate), by row; alphas for the first few only.
    """
    encoder.eval()
    decoder.eval()
    device = next(decoder.parameters()).device
    sums, generated, started, kinds = {}, [], time.perf_counter(), {}
    for images, captions, lengths, rows in tqdm(loader, desc="validate", unit="batch", leave=False,
                                                disable=not is_first_process()):
        grid = encoder(images.to(device))
        scores, targets, alphas = decoder(grid, captions.to(device), lengths)
        terms = caption_loss(scores, targets, alphas, lengths, config)
        kinds = {name: (term.per, term.weight) for name, term in terms.items()}
        numbers = {name: term.sum for name, term in terms.items()} | counts_of(lengths)
        sums = {name: sums.get(name, 0.0) + value.item() for name, value in numbers.items()}
        for row, caption in zip(rows.tolist(), generate(decoder, grid, word_map, config.max_len, beam_size=1)):
            if row >= PICTURES_SHOWN:
                del caption["alphas"]
            generated.append({"row": row, **caption})
        pause()
    if dist.is_initialized() and len(loader) < loader.sampler.rounds():
        pause()  # all together: other processes have a batch more
    parts = [part for part in gather_lists([(sums, kinds)]) if part[0]]
    sums = {name: sum(part[name] for part, _ in parts) for name in parts[0][0]}
    found = means(sums, parts[0][1], time.perf_counter() - started)
    return found, sorted(gather_lists(generated), key=lambda caption: caption["row"])


def means(sums, terms, seconds):
    """Means of sums.

    Args:
        sums (dict): name -> float, of each term and of counts_of. terms (dict): name -> (per, weight). seconds (float).
    Returns:
        dict: loss; then each term by its name (cross_entropy in nats per token; coverage, the mean of
        (1 - sum of alpha)^2; top5, a share of tokens); then images_per_s (over all processes).
    """
    found = {name: sums[name] / max(sums[per], 1) for name, (per, _) in terms.items()}
    loss = sum(weight * found[name] for name, (_, weight) in terms.items())
    return dict(loss=loss, **found, images_per_s=sums["images"] / seconds)


def mixed_precision(config, device):
    """autocast to bfloat16 or float16 where `precision` gives that; weights, their updates and the loss stay float32.
    """
    dtype = precision(config, device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def with_skipped_steps(terms, norm, images):
    """The terms, finite, and the share of steps that float16 skips, as their gradient overflowed.

    Args: terms (dict): name -> Term. norm: of the gradient, 0-dim. images: of the batch, 0-dim. Returns: dict.
    """
    terms = {name: term._replace(sum=term.sum.detach().nan_to_num(0, 0, 0)) for name, term in terms.items()}
    return terms | dict(skipped_steps=Term((~norm.isfinite()) * images, "images"))


def finish_epoch(progress, recent, training, validation, captions, optimizers, config, path):
    """Decide what an epoch's scores decide: whether it is the best, and whether the rates fall.

    Returns: bool: the best so far, by CIDEr, of equal ones by BLEU-4, then by the validation loss.
    Raises: UserError: a score that is not finite.
    """
    for name, value in validation.items():
        if not math.isfinite(value):
            raise UserError(f"the validation's {name} became {value} in epoch {progress.epoch + 1}, which is not "
                            f"saved; the last checkpoint is kept: --resume with lower rates, and should that end here "
                            f"too, put {path.with_name(BEST_CHECKPOINT)} in its place")
    found = [validation["CIDEr"], validation["BLEU-4"], -validation["loss"]]
    better = found > progress.best
    progress.best = max(found, progress.best)
    progress.epochs_since_improvement = 0 if better else progress.epochs_since_improvement + 1
    progress.epoch, progress.batch, progress.sums, progress.seconds = progress.epoch + 1, 0, {}, 0.0
    recent.clear()
    progress.entry = dict(
        epoch=progress.epoch, step=progress.step, train=training, valid=validation, rates=rates(optimizers),
        best=better, epochs_since_improvement=progress.epochs_since_improvement, reading=progress.reading,
        pictures=[dict(row=caption["row"], words=caption["words"], alphas=torch.from_numpy(caption["alphas"]))
                  for caption in captions[:PICTURES_SHOWN]])
    # Before the checkpoint is written: a rate that the user names on resuming is then the rate in force.
    if not better and progress.epochs_since_improvement % config.lr_decay_epochs == 0:
        for group in (group for optimizer in optimizers.values() for group in optimizer.param_groups):
            group["lr"] *= config.lr_decay
    return better


def epoch_line(entry):
    """An epoch for the screen. Args: entry (dict): see finish_epoch. Returns: str."""
    training, validation = entry["train"], entry["valid"]
    train, valid = (f"loss {found['loss']:.3f} ("
                    + ", ".join(f"{name} {found[name]:.3f}" for name in [*found][1:[*found].index("images_per_s")])
                    + ")" for found in (training, validation))
    return (f"epoch {entry['epoch']}: train {train}, {training['images_per_s']:.1f} images/s; valid, teacher-forced, "
            f"{valid}; generated, greedy, BLEU-4 {validation['BLEU-4']:.4f}, CIDEr {validation['CIDEr']:.4f}"
            f"{'  best' if entry['best'] else ''}")


def finished(config, progress):
    """Why a run, or its second phase, is over. Returns: str; None where it is not."""
    if progress.epoch - progress.began >= config.epochs:
        return f"all {config.epochs} epochs done"
    if progress.epochs_since_improvement >= config.early_stop_epochs:
        return f"no better score for {progress.epochs_since_improvement} epochs"


def last_line(config, progress, path):
    return (f"Finished ({finished(config, progress)}); best CIDEr on valid, greedy: {progress.best[0]:.4f}, in "
            f"{path.with_name(BEST_CHECKPOINT)}")


# ---------------------------------------------------------------------------------------------------------------------
# What must stay finite, and the rates


def check_finite(unread, weights, scaler, progress, dataset):
    """Raise UserError for the first step whose loss is not finite, or for the last one where the weights are not.

    Args:
        unread: (step, rows, loss) of each step. weights: of `changing`. scaler (GradScaler): skips steps that are not
        finite. progress (Progress). dataset (CaptionDataset).
    """
    if scaler.is_enabled() and scaler.get_scale() < 1:
        raise UserError(f"float16 cannot hold loss and gradient at epoch {progress.epoch + 1}, step {unread[-1][0]}, "
                        f"however they are scaled; the last checkpoint is kept: --resume --precision float32")
    faults = [] if scaler.is_enabled() else [
        (number, rows, f"the loss became {loss.item()}") for number, rows, loss in unread if not loss.isfinite()]
    if not faults and not are_finite(weights):
        faults = [(*unread[-1][:2], "the weights became NaN or infinite")]
    for number, rows, what in faults:
        names = ", ".join(dataset.image_ids[row] for row in rows.tolist())
        raise UserError(f"{what} at epoch {progress.epoch + 1}, step {number}, with the pictures {names}; the last "
                        f"checkpoint is kept: --resume with lower rates, or look at these pictures")


def changing(encoder, optimizers):
    """All tensors that training changes: weights, Adam's moments, the statistics of batch norms. Returns: list."""
    moments = [tensor for optimizer in optimizers.values() for moments in optimizer.state.values()
               for tensor in moments.values()]
    return [*parameters(optimizers), *moments, *encoder.buffers()]


def are_finite(tensors):
    """Whether no number in any of these tensors is NaN or infinite. The device is waited for once."""
    tensors = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return bool(torch.nn.utils.get_total_norm(tensors, math.inf).isfinite())


def parameters(optimizers):
    return [p for optimizer in optimizers.values() for group in optimizer.param_groups for p in group["params"]]


def rates(optimizers):
    """The rates in force. Returns: dict, decoder_lr and perhaps encoder_lr -> float."""
    return {f"{name}_lr": optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.items()}


if __name__ == "__main__":
    run(main)
