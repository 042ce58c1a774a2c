"""Train a captioner; by default the full AI Challenger run: frozen ResNet-101, soft attention.

    python train.py                                       # one GPU, or the CPU
    torchrun --nproc_per_node=8 train.py                  # eight GPUs; batch_size counts the pictures of all of them
    python train.py --resume                              # go on from the last checkpoint, also within an epoch
    python train.py --resume --fine_tune_encoder true     # then train the encoder too
    python train.py --cache_features true                 # run the frozen encoder once, not in every epoch

Writes models/checkpoint.pth.tar every `checkpoint_minutes`, after every epoch and when it is told to stop, keeping the
one before; models/BEST_checkpoint.pth.tar after every best epoch; and logs/RUN/ with TensorBoard's events, log.jsonl (a
line an epoch) and config.json (settings, command, versions). A run that goes on ends as if it had never been cut.

Departures from the original, and why:
- Pictures come in batches with all their captions: one pass of the encoder instead of five.
- The best checkpoint is chosen by the CIDEr of generated captions, then by their BLEU-4 and the validation loss; the
  original's BLEU-4 is of captions that were fed the true words, which says little about what the model writes itself.
- The last, incomplete batch of an epoch is left out, so that batches do not depend on the number of processes.
- One tokenization makes the word map and uses it; the original counts the words of jieba's full mode and then encodes
  those of its exact mode. Pictures lie in HDF5.
- State dicts, not pickled modules: any version of the code can read them, and reading them runs none.
"""
import itertools
import json
import math
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from config import UserError, get_config, parse_args, run
from datasets import (CaptionDataset, features_key, load_word_map, make_loader, start_features, write_features,
                      write_text)
from demo import draw_attention
from eval import generate, score, tokenize_references
from models import build_models, caption_loss, pixel_positions, to_device
from utils import (BEST_CHECKPOINT, CHECKPOINT, CHECKPOINT_VERSION, from_first_process, gather_lists, get_device,
                   git_revision, goes_on, init_distributed, keep_freed_memory, largest_of_processes, load_checkpoint,
                   load_models, load_optimizer, meet_processes, save_checkpoint, sum_over_processes)

PICTURES_SHOWN = 4  # validation pictures drawn in TensorBoard after every epoch


def main():
    args = parse_args(__doc__, {"resume": dict(action="store_true", help="go on from the last checkpoint")})
    config = get_config(args.preset, args.flags)
    path = Path(config.model_dir) / CHECKPOINT
    rank, world_size, store = meet_processes()
    checkpoint = None
    if goes_on(path, args.resume, rank, store):
        checkpoint = load_checkpoint(path)
        config = get_config(flags=args.flags, trained=checkpoint["config"])

    keep_freed_memory()
    device = get_device(config)
    init_distributed(device, rank, world_size, store)
    word_map = load_word_map(config.data_dir)
    if checkpoint and checkpoint["word_map"] != word_map:
        raise UserError(f"{path} was trained with another word map than {config.data_dir}/WORDMAP.json")
    train_set, valid_set = (CaptionDataset(config, split, word_map) for split in ("train", "valid"))
    train_loader = make_loader(train_set, config, True, rank, world_size)
    valid_loader = make_loader(valid_set, config, False, rank, world_size)
    references = tokenize_references(valid_set) if rank == 0 else None
    if not any(valid_set.raw_captions):
        raise UserError(f"{valid_set.path} has no captions to choose the best checkpoint by")

    torch.manual_seed(config.seed)
    encoder, decoder = load_models(checkpoint, config, path) if checkpoint else build_models(config, len(word_map))
    # All that a run needs to go on, besides the weights: where it is, what it has summed up since the epoch began
    # (totals) and since the last reading (recent), what it decides by, and the last entry of its log.
    state = dict(epoch=0, batch=0, step=0, totals=[0.0] * 6, recent=[0.0] * 6, seconds=0.0, best_score=[-math.inf] * 3,
                 epochs_since_improvement=0, run=from_first_process(time.strftime("%Y%m%d-%H%M%S")), reading={},
                 entry={}, batches=dict(pictures=len(train_set), batch_size=config.batch_size, seed=config.seed))
    if checkpoint:
        state.update((name, checkpoint[name]) for name in state if name != "batches")
        if config.fine_tune_encoder and not checkpoint["config"].get("fine_tune_encoder"):
            state["epochs_since_improvement"] = 0  # what stopped improving was the decoder alone
        if state["batch"] and checkpoint["batches"] != state["batches"]:
            print(f"other batches than in the run so far ({state['batches']}, not {checkpoint['batches']}): epoch "
                  f"{state['epoch'] + 1} begins again")
            state.update(batch=0, totals=[0.0] * 6, recent=[0.0] * 6, seconds=0.0)
        if checkpoint["world_size"] != world_size and rank == 0:
            print(f"{world_size} processes instead of {checkpoint['world_size']}: the same batches and sums; dropout "
                  f"draws other numbers")
    # The recent sums live on the device, so that no step waits for it; what one process has saved counts once.
    state["recent"] = torch.tensor(state["recent"], dtype=sums_dtype(device), device=device)
    if rank > 0:
        state["recent"].zero_()
    encoder, decoder = encoder.to(device), decoder.to(device)
    optimizers = make_optimizers(config, encoder, decoder)
    if checkpoint:
        resume_optimizers(optimizers, checkpoint, args.flags, path)
    if world_size > 1 and device.type == "cuda" and config.fine_tune_encoder:
        encoder = torch.nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    # What sees the pictures of training and of validation; `encoder` is what is saved.
    if config.cache_features:
        train_encoder, valid_encoder = (keep_features(dataset, encoder, config, device, rank, world_size)
                                        for dataset in (train_set, valid_set))
    elif config.fine_tune_encoder:
        train_encoder, valid_encoder = parallel(encoder, world_size), encoder
    else:
        train_encoder, valid_encoder = frozen(encoder, config, device), encoder.folded()
    train_decoder = parallel(decoder, world_size)

    folder = Path(config.log_dir) / state["run"]
    writer = start_log(folder, config, state, checkpoint, len(train_loader), valid_set) if rank == 0 else None
    if rank == 0:
        if config.encoder_weights == "none" and not config.fine_tune_encoder and not was_trained(encoder):
            print("warning: with --encoder_weights none the encoder is random, and without --fine_tune_encoder true it "
                  "stays so: give that, or begin with --encoder_weights imagenet")
        print(f"{len(train_set)} training and {len(valid_set)} validation pictures, {len(word_map)} words; "
              f"{config.encoder} ({config.encoder_weights}), {device} x {world_size}, {precision(config, device)}; "
              "rates: " + ", ".join(f"{name} {rate:g}" for name, rate in rates(optimizers).items())
              + ("" if config.fine_tune_encoder else ", encoder frozen") + f"; log: {folder}"
              + (f"; going on at epoch {state['epoch'] + 1}, batch {state['batch'] + 1}" if checkpoint else ""))

    def save(best=False):
        recent = sum_over_processes(state["recent"].clone())
        if rank > 0 or not are_finite([recent, *changing(encoder, optimizers)]):  # the next reading will stop the run
            return
        writer.flush()  # the log may be ahead of the checkpoint, but not behind
        saved = dict(version=CHECKPOINT_VERSION, config=vars(config).copy(), word_map=word_map,
                     encoder=encoder.state_dict(), decoder=decoder.state_dict(),
                     optimizers={name: optimizer.state_dict() for name, optimizer in optimizers.items()},
                     **{**state, "recent": recent.tolist()},
                     world_size=world_size, command=shlex.join(["python", *sys.argv]), git_revision=git_revision())
        if best:
            save_checkpoint(saved, path.with_name(BEST_CHECKPOINT))
        save_checkpoint(saved, path)

    pause = Pause(config.checkpoint_minutes, save)
    while state["epoch"] < config.epochs and state["epochs_since_improvement"] < config.early_stop_epochs:
        training = train_one_epoch(train_encoder, train_decoder, optimizers, train_loader, config, state, writer, pause)
        validation, captions = validate(valid_encoder, decoder, valid_loader, config, word_map, pause)
        pause()
        validation.update(from_first_process(
            score([caption["words"] for caption in captions], references) if rank == 0 else None))
        for name, value in validation.items():
            if not math.isfinite(value):
                raise UserError(f"the validation's {name} became {value} in epoch {state['epoch'] + 1}, which is not "
                                f"saved; the last checkpoint is kept: --resume with lower rates, and should that end "
                                f"here too, put {path.with_name(BEST_CHECKPOINT)} in its place")

        scores = [validation["CIDEr"], validation["BLEU-4"], -validation["loss"]]  # the next decides where one ties
        better = scores > state["best_score"]
        state["recent"].zero_()
        state.update(epoch=state["epoch"] + 1, batch=0, totals=[0.0] * 6, seconds=0.0,
                     best_score=max(scores, state["best_score"]),
                     epochs_since_improvement=0 if better else state["epochs_since_improvement"] + 1)
        state["entry"] = dict(epoch=state["epoch"], step=state["step"], train=training, valid=validation,
                              rates=rates(optimizers), best=better, reading=state["reading"],
                              epochs_since_improvement=state["epochs_since_improvement"],
                              pictures=[dict(row=caption["row"], words=caption["words"],
                                             alphas=torch.from_numpy(caption["alphas"]))
                                        for caption in captions[:PICTURES_SHOWN]])
        # Before the checkpoint is written: a rate that the user names on resuming is then the rate in force.
        if not better and state["epochs_since_improvement"] % config.lr_decay_epochs == 0:
            for group in (group for optimizer in optimizers.values() for group in optimizer.param_groups):
                group["lr"] *= config.lr_decay
        save(best=better)
        if rank == 0:  # after the checkpoint, which brings the entry: a run that is killed here can log it again
            log_entry(folder, writer, config, state["entry"], valid_set)
            print(epoch_line(state["entry"]), flush=True)
    if rank == 0:
        reason = (f"no better score for {config.early_stop_epochs} epochs"
                  if state["epoch"] < config.epochs else f"all {config.epochs} epochs done")
        print(f"Finished ({reason}); best CIDEr on valid, greedy: {state['best_score'][0]:.4f}, in "
              f"{path.with_name(BEST_CHECKPOINT)}")
        writer.close()
    if dist.is_initialized():
        dist.destroy_process_group()


class Pause:
    """Saves a run on its way: every so many minutes, and when it is asked to stop (SIGTERM, Ctrl-C), before it does.

    To be called after every batch, by all processes alike: they agree on what to do.

    Args:
        minutes (float). save (function): writes the checkpoint.
    """

    def __init__(self, minutes, save):
        self.seconds, self.save, self.since, self.signal, self.asked = 60 * minutes, save, time.monotonic(), 0, 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.remember)

    def remember(self, number, frame):
        if not self.signal:
            self.signal, self.asked = number, time.monotonic()
        elif time.monotonic() > self.asked + 10:  # Ctrl-C comes from the terminal and from torchrun, both meaning one
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __call__(self):
        due = time.monotonic() - self.since > self.seconds
        order = largest_of_processes(self.signal or -int(not due))  # a signal's number; 0: save; -1: go on
        if order < 0:
            return
        self.save()
        self.since = time.monotonic()
        if order:
            largest_of_processes(order)  # until the first one has saved, as torchrun kills all when one ends
            if not dist.is_initialized() or dist.get_rank() == 0:
                print(f"\nstopped by {signal.Signals(order).name}: go on with --resume", file=sys.stderr)
            if dist.is_initialized():
                dist.destroy_process_group()
            sys.exit(128 + order)


def train_one_epoch(encoder, decoder, optimizers, loader, config, state, writer, pause):
    """One pass over the training pictures, each with all its captions, or the rest of one.

    Losses are sums divided by the counts of the whole global batch, so they do not depend on how many processes share
    it. Nothing waits for the device but the readings every `print_freq` steps.

    Args:
        encoder, decoder (nn.Module): wrapped for distributed training where there are several processes.
        optimizers (dict). loader (DataLoader). config (Config).
        state (dict): `batch` batches of `epoch` are done; this, `step`, the sums and the last `reading` go on.
        writer (SummaryWriter or None): of the first process. pause (Pause).
    Returns:
        dict: cross_entropy (nats a token), coverage (mean of (1 - sum of alpha)^2), loss, top5 (share of tokens),
        images_per_s (over all processes).
    Raises:
        UserError: the loss or the weights are no longer finite; names epoch, step and pictures.
    """
    encoder.train()
    decoder.train()
    device = next(decoder.parameters()).device
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    loader.sampler.epoch, loader.sampler.first = state["epoch"], state["batch"]
    unread, steps, clock = [], len(loader), time.perf_counter()
    before = state["seconds"]  # at the last reading
    bar = tqdm(loader, desc=f"epoch {state['epoch'] + 1}", unit="batch", total=steps, initial=state["batch"],
               disable=writer is None)
    for images, captions, lengths, rows in bar:
        # Seeded by the step, so that dropout goes on as it would have, wherever a run was cut.
        torch.manual_seed((config.seed * 1_000_003 + state["step"]) * 1_009 + rank)
        images, captions, counts = (to_device(x, device) for x in (images, captions, counts_of(lengths)))
        with mixed_precision(config, device):
            scores, targets, alphas = decoder(encoder(images), captions, lengths)
            cross_entropy, coverage = caption_loss(scores, targets, alphas, lengths)
        n_tokens, n_captions, _ = sum_over_processes(counts.clone()).clamp(min=1)
        # The gradients of all processes are averaged, where these parts of one loss want to be summed.
        loss = world_size * (cross_entropy / n_tokens + config.alpha_c * coverage / n_captions)
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        loss.backward()

        number = state["batch"] + 1
        is_read = number % config.print_freq == 0 or number == steps
        if is_read:
            norm = torch.nn.utils.get_total_norm(p.grad for p in parameters(optimizers) if p.grad is not None)
        if config.grad_clip:
            torch.nn.utils.clip_grad_value_(parameters(optimizers), config.grad_clip)
        for optimizer in optimizers.values():
            optimizer.step()

        state["recent"] += torch.stack([cross_entropy.detach(), coverage.detach(),
                                        top5_hits(scores.detach(), targets), *counts])
        unread.append((number, rows, loss.detach()))
        now = time.perf_counter()
        state.update(batch=number, step=state["step"] + 1, seconds=state["seconds"] + now - clock)
        clock = now
        if is_read:
            check_finite(unread, changing(encoder, optimizers), state, loader.dataset)
            sums = sum_over_processes(state["recent"]).tolist()
            means = epoch_means(sums, config, state["seconds"] - before)
            state["totals"] = [total + part for total, part in zip(state["totals"], sums)]
            state["recent"].zero_()
            unread, before = [], state["seconds"]
            bar.set_postfix({name: f"{means[name]:.3g}" for name in ("loss", "top5", "images_per_s")})
            state["reading"] = {**means, **rates(optimizers)}
            if norm.isfinite():  # its square may be too large for a number though nothing else is
                state["reading"]["gradient_norm"] = norm.item()
            if writer and number < steps:  # what belongs to an epoch's last step is logged with the epoch
                log_scalars(writer, "train", state["reading"], state["step"])
        pause()
    return epoch_means(state["totals"], config, state["seconds"])


def mixed_precision(config, device):
    """autocast to bfloat16 where config.precision asks for it; weights, their updates and the loss stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(config, device) == "bfloat16")


def precision(config, device):
    """The type that training multiplies in: never bfloat16 where it would only be imitated, which is far slower.

    Args:
        config (Config). device (torch.device).
    Returns:
        str: float32 or bfloat16.
    """
    if config.precision == "float32" or (config.precision == "auto" and device.type == "cpu"):
        return "float32"
    if device.type == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_native = device.type == "cpu" and any(torch.cpu.get_capabilities().get(name)
                                                 for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bfloat16" if is_native else "float32"


def sums_dtype(device):
    """The type that sums on a device are kept in: float64, which Apple's mps lacks."""
    return torch.float32 if device.type == "mps" else torch.float64


def counts_of(lengths):
    """Real tokens, captions and pictures of a batch. Args: caption_lengths (B, K). Returns: int64 (3,)."""
    captions = (lengths > 0).sum()
    return torch.stack([lengths.sum() - captions, captions, torch.full_like(captions, len(lengths))])


def epoch_means(sums, config, seconds):
    """Sums of cross entropy, coverage, hits, tokens, captions, images -> dict of means; see train_one_epoch."""
    cross_entropy, coverage, hits, tokens, captions, images = sums
    cross_entropy, coverage = cross_entropy / max(tokens, 1), coverage / max(captions, 1)
    return dict(loss=cross_entropy + config.alpha_c * coverage, cross_entropy=cross_entropy, coverage=coverage,
                top5=hits / max(tokens, 1), images_per_s=images / seconds)


def top5_hits(scores, targets):
    """How many targets are among the five best-scored words; of equal scores, as many as a random choice would hit on
    the average. NaN is no hit. Args: scores (N, V), targets (N,). Returns: float32, 0-dim.
    """
    own = scores.gather(1, targets[:, None])
    places, equal = 5 - (scores > own).sum(dim=1), (scores == own).sum(dim=1)  # left to the equals; how many they are
    return (torch.minimum(places.clamp(min=0), equal) / equal.clamp(min=1)).sum()


def check_finite(unread, weights, state, dataset):
    """Raise UserError for the first step whose loss is not finite, or for the last one where the weights are not.

    Args:
        unread: (step, rows, loss) of each step. weights: of changing. state (dict). dataset (CaptionDataset).
    """
    faults = [(number, rows, f"the loss became {loss.item()}") for number, rows, loss in unread if not loss.isfinite()]
    if not faults and not are_finite(weights):
        faults = [(*unread[-1][:2], "the weights became NaN or infinite")]
    for number, rows, what in faults:
        names = ", ".join(dataset.image_ids[row] for row in rows.tolist())
        raise UserError(f"{what} at epoch {state['epoch'] + 1}, step {number}, with the pictures {names}; the last "
                        f"checkpoint is kept: --resume with lower rates, or look at these pictures")


def changing(encoder, optimizers):
    """All tensors that training changes: weights, Adam's moments, the statistics of batch norms. Returns: list."""
    moments = [tensor for optimizer in optimizers.values() for moments in optimizer.state.values()
               for tensor in moments.values()]
    return [*parameters(optimizers), *moments, *encoder.buffers()]


def are_finite(tensors):
    """Whether no number in any of these tensors is NaN or infinite. The device is waited for once."""
    tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
    return bool(torch.nn.utils.get_total_norm(tensors, math.inf).isfinite())


@torch.no_grad()
def validate(encoder, decoder, loader, config, word_map, pause):
    """Teacher-forced loss and top-5 accuracy, and greedy captions, of every validation picture once.

    Args:
        encoder (Encoder), decoder (DecoderWithAttention): not wrapped. loader (DataLoader). config (Config).
        word_map (dict). pause (Pause).
    Returns:
        dict: as of train_one_epoch.
        list of dict: the captions of all processes (see eval.generate), by row; alphas for the first few only.
    """
    encoder.eval()
    decoder.eval()
    device = next(decoder.parameters()).device
    totals, generated, started = [0.0] * 6, [], time.perf_counter()
    for images, captions, lengths, rows in tqdm(loader, desc="validate", unit="batch", leave=False,
                                                disable=dist.is_initialized() and dist.get_rank() > 0):
        grid = encoder(images.to(device))
        scores, targets, alphas = decoder(grid, captions.to(device), lengths)
        sums = torch.stack([*caption_loss(scores, targets, alphas, lengths), top5_hits(scores, targets),
                            *counts_of(lengths).to(device)]).tolist()
        totals = [total + part for total, part in zip(totals, sums)]
        for caption in generate(decoder, grid, rows, config, word_map, beam_size=1):
            if caption["row"] >= PICTURES_SHOWN:
                del caption["alphas"]
            generated.append(caption)
        if not dist.is_initialized():  # processes have different numbers of batches
            pause()
    totals = [sum(parts) for parts in zip(*gather_lists([totals]))]
    means = epoch_means(totals, config, time.perf_counter() - started)
    return means, sorted(gather_lists(generated), key=lambda caption: caption["row"])


# ---------------------------------------------------------------------------------------------------------------------
# Kept features


class KeptFeatures(torch.nn.Module):
    """Stands in the encoder's place where a data set gives its features instead of pictures.

    Args:
        held: fp16 (N, h, w, D) on the device, of all pictures; None where the batches bring their own.
    """

    def __init__(self, held):
        super().__init__()
        self.held = held

    def forward(self, given):
        """Args: fp16 (B, h, w, D), or where all are held rows int64 (B,). Returns: (B, h, w, D), as the encoder's."""
        kind = given.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        return (given if self.held is None else self.held[given]).to(dtype)


def keep_features(dataset, encoder, config, device, rank, world_size):
    """Let a data set give the frozen encoder's own grids from {split}_features.h5, made first where need be.

    They are worked out in float32, whatever the precision of training. All processes encode; the first one writes, in
    the order of the rows, so that a run of any number of processes goes on where another was killed. A GPU holds them
    all where they leave a quarter of its free memory for training.

    Args:
        dataset (CaptionDataset): its batches change, see there. encoder (Encoder). config (Config).
        device (torch.device). rank, world_size (int).
    Returns:
        KeptFeatures, in the encoder's place.
    Raises:
        UserError: see start_features; a value beyond fp16.
    """
    path, n = dataset.path.with_name(f"{dataset.path.stem}_features.h5"), len(dataset)
    cells = math.ceil(config.image_size / 32)
    key, shape = features_key(dataset, encoder, config), (n, cells, cells, encoder.dim)
    file, done = start_features(path, key, shape) if rank == 0 else (None, None)
    # One row at least is left to a run that goes on: writing the last one gives the file its name.
    done = from_first_process(min(done, n - 1) if file else done)
    if done < n:
        encoder = encoder.folded()  # the key is of the weights as they are: another device would fold them otherwise
        batches = iter(make_loader(Subset(dataset, range(done, n)), config, False, rank, world_size))
        with tqdm(total=n, initial=done, desc=path.stem, unit="picture", disable=rank > 0) as bar:
            while done < n:
                grids = [encode_half(encoder, images.to(device), rows, dataset)
                         for images, _, _, rows in itertools.islice(batches, 1)]  # in the end some have none left
                for grid in gather_lists(grids):
                    if rank == 0:
                        write_features(file, path, done, grid)
                    done += len(grid)
                    bar.update(len(grid))
        from_first_process(None)  # has the file named by now
    dataset.read_features(path, key, shape)
    budget = 0.75 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return KeptFeatures(dataset.hold_features(device, budget))


def encode_half(encoder, images, rows, dataset):
    """A batch's grids as an fp16 array (B, h, w, D); UserError, naming the pictures, where fp16 cannot hold them."""
    grid = encoder(images).half()
    if not grid.isfinite().all():
        names = ", ".join(dataset.image_ids[row] for row in rows.tolist())
        raise UserError(f"the encoder gives values that fp16 cannot hold (beyond 65504) for one of the pictures "
                        f"{names}: give --cache_features false")
    return grid.cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers


def make_optimizers(config, encoder, decoder):
    """Adam for the decoder and, when fine-tuning, for the encoder. Returns: dict name -> Adam."""
    optimizers = {"decoder": torch.optim.Adam(decoder.parameters(), lr=config.decoder_lr, fused=True)}
    if config.fine_tune_encoder:
        optimizers["encoder"] = torch.optim.Adam((p for p in encoder.parameters() if p.requires_grad),
                                                 lr=config.encoder_lr, fused=True)
    return optimizers


def resume_optimizers(optimizers, checkpoint, flags, path):
    """Load what the checkpoint knows of each optimizer; a rate that the user names takes its place, once.

    A command that is repeated, by torchrun or a scheduler, is not to undo the decay since.
    """
    for name, optimizer in optimizers.items():
        rate = f"{name}_lr"
        if name in checkpoint["optimizers"]:
            load_optimizer(optimizer, checkpoint["optimizers"][name], path)
        if rate not in flags:
            continue
        if flags[rate] != checkpoint["config"].get(rate):
            for group in optimizer.param_groups:
                group["lr"] = flags[rate]
        elif rates(optimizers)[rate] != flags[rate] and (not dist.is_initialized() or dist.get_rank() == 0):
            print(f"{rate} {flags[rate]:g} is what this run was given before: after its decay it stays at "
                  f"{rates(optimizers)[rate]:g}")


def rates(optimizers):
    """The rates in force. Returns: dict, decoder_lr and perhaps encoder_lr -> float."""
    return {f"{name}_lr": optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.items()}


def was_trained(encoder):
    """Whether an encoder that began with random weights has been trained: batch norms count their batches."""
    return any(count > 0 for name, count in encoder.named_buffers() if name.endswith("num_batches_tracked"))


def parameters(optimizers):
    return [p for optimizer in optimizers.values() for group in optimizer.param_groups for p in group["params"]]


def parallel(module, world_size):
    """Wrap a module so that its gradients are averaged over the processes, where that is needed."""
    return DistributedDataParallel(module) if world_size > 1 else module


def frozen(encoder, config, device):
    """The encoder as it is run while only the decoder is trained. Returns: Module of the same function."""
    encoder = encoder.folded(torch.bfloat16 if precision(config, device) == "bfloat16" else torch.float32)
    return Replayed(encoder) if device.type == "cuda" else encoder


class Replayed(torch.nn.Module):
    """A module without gradients as a CUDA graph, whose kernels are started all at once, for inputs of one shape.

    The result lasts until the next call.
    """

    def __init__(self, module):
        super().__init__()
        self.module, self.graph = module, None

    @torch.no_grad()
    def forward(self, x):
        if self.graph is None:
            self.input, self.graph = x.clone(), torch.cuda.CUDAGraph()
            self.module(x)  # what cuDNN sets up at its first call must not be recorded
            # Other threads, which copy the next batches, may go on meanwhile.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.output = self.module(self.input)
        if x.shape != self.input.shape:
            return self.module(x)
        self.input.copy_(x)
        self.graph.replay()
        return self.output


# ---------------------------------------------------------------------------------------------------------------------
# The log


def start_log(folder, config, state, checkpoint, steps, dataset):
    """Open or go on with a run's folder. What was logged after the checkpoint is dropped; what the checkpoint had
    still to log is logged.

    Args:
        folder (Path). config (Config). state (dict). checkpoint (dict or None). steps (int): of an epoch.
        dataset (CaptionDataset): of validation.
    Returns:
        SummaryWriter
    """
    folder.mkdir(parents=True, exist_ok=True)
    log, entry = folder / "log.jsonl", state["entry"]
    if not checkpoint or not log.exists():
        versions = dict(python=sys.version.split()[0], torch=torch.__version__, torchvision=torchvision.__version__)
        write_text(folder / "config.json", json.dumps(dict(
            config=vars(config), command=shlex.join(["python", *sys.argv]), git_revision=git_revision(),
            versions=versions), indent=1))
    if not checkpoint:
        return SummaryWriter(folder)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if log.exists() else []
    if state["batch"]:
        write_text(log, "".join(lines[:state["epoch"]]))  # a line an epoch
        return SummaryWriter(folder, purge_step=state["step"] + (state["batch"] < steps))
    # The checkpoint of a whole epoch is written before its log.
    write_text(log, "".join(lines[:max(state["epoch"] - 1, 0)]))
    writer = SummaryWriter(folder, purge_step=entry.get("step", 0))
    if entry:
        log_entry(folder, writer, config, entry, dataset)
    return writer


def log_entry(folder, writer, config, entry, dataset):
    """A line in log.jsonl, the epoch's scalars, and a few validation pictures with their captions and attention.

    Args:
        entry (dict): epoch, step, train, valid, rates, best, epochs_since_improvement; reading: of its last step;
        pictures: list of dict(row, words, alphas).
    """
    line = {name: value for name, value in entry.items() if name not in ("reading", "pictures")}
    with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    for group, values in dict(train=entry["reading"], valid=entry["valid"], epoch=entry["train"]).items():
        log_scalars(writer, group, values, entry["step"])
    positions = pixel_positions(config.image_size, config.encoded_image_size)
    for shown in (shown for shown in entry["pictures"] if shown["row"] < len(dataset)):
        figure = draw_attention(Image.fromarray(dataset.images[shown["row"]]), shown["words"],
                                shown["alphas"].numpy(), positions)
        writer.add_figure(f"attention/{shown['row']}", figure, entry["step"])
    writer.flush()


def log_scalars(writer, group, values, step):
    for name, value in values.items():
        writer.add_scalar(f"{group}/{name}", value, step)


def epoch_line(entry):
    """An epoch for the screen. Args: entry (dict): see log_entry. Returns: str."""
    training, validation = entry["train"], entry["valid"]
    return (f"epoch {entry['epoch']}: train loss {training['loss']:.3f}, top-5 {training['top5']:.1%}, "
            f"{training['images_per_s']:.1f} images/s; valid loss {validation['loss']:.3f}, top-5 "
            f"{validation['top5']:.1%} (teacher-forced), BLEU-4 {validation['BLEU-4']:.4f}, CIDEr "
            f"{validation['CIDEr']:.4f} (generated, greedy){'  best' if entry['best'] else ''}")


if __name__ == "__main__":
    run(main)
