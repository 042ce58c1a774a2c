"""Train a captioner; by default the full AI Challenger run: frozen ResNet-101, soft attention.

    python train.py                                      # one GPU, or the CPU
    torchrun --nproc_per_node=8 train.py                 # eight GPUs, which share each batch
    python train.py --resume                             # from the last checkpoint, mid-epoch too
    python train.py --preset own --init models/photographs.pth.tar     # pictures of one's own
    python train.py --resume --fine_tune_encoder true    # then train the encoder too
    python train.py --cache_features true                # run the frozen encoder only once
    python train.py --resume --self_critical true        # then optimise CIDEr-D itself

Writes models/checkpoint.pth.tar, all that a run needs to go on, every `checkpoint_minutes`, after
every epoch and when it is told to stop; models/BEST_checkpoint.pth.tar, the model alone, after
every best epoch; and logs/RUN/ with TensorBoard's events, log.jsonl (a line per epoch) and
config.json (settings, command, versions). A resumed run ends as if it had never been interrupted.

Departures from the original, and why:
- Pictures come in batches with all their captions: one pass of the encoder instead of five.
- The best checkpoint is chosen by the CIDEr of generated captions, then by their BLEU-4 and the
  validation loss; the original's BLEU-4 is of captions that were fed the true words, which says
  little about what the model writes itself.
- The last, incomplete batch of an epoch is left out, so that batches do not depend on the number
  of processes; a set of fewer pictures than a batch is one batch.
- One tokenization makes the word map and uses it; the original counts the words of jieba's full
  mode and then encodes those of its exact mode. Pictures are in HDF5.
- State dicts, not pickled modules: any version of the code can read them, reading them runs none.
"""
import collections
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from utils import (UserError, alone, autocast, end_distributed, from_first_process,
                   gather_lists, get_device, init_distributed, is_first_process,
                   keep_freed_memory, meet_processes, precision, run_script, to_device,
                   world_size)

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import fast
from config import Config, get_config, parse_args
from datasets import (CaptionDataset, counts_of, load_word_map, make_loader,
                      tokenize_references)
from decoding import generate
from fast.features import keep_features
from models import caption_loss
from runlog import RunLog, epoch_line, progress_bar
from scores import score
from self_critical import SelfCritical
from state import (PICTURES_SHOWN, Pause, Start, State, kinds_of, mean_loss, means, settings,
                   with_skipped_steps)


def main():
    args = parse_args(__doc__, {
        "resume": dict(action="store_true", help="continue from the last checkpoint"),
        "init": dict(metavar="CHECKPOINT",
                     help="begin a new run from the model of this one, whatever its words"),
    })
    meeting = meet_processes()
    model_dir = Path(get_config(args.preset, args.flags).model_dir)
    with alone(model_dir / "train.lock", "--model_dir") if meeting.rank == 0 else nullcontext():
        start = settings(args, meeting)
        device = get_device(start.config)
        init_distributed(device, meeting)
        train(start, device)
        end_distributed()


def train(start: Start, device: torch.device):
    """A run, or the rest of one."""
    keep_freed_memory()
    config = start.config
    word_map, train_loader, valid_loader = load_data(start, device)
    state = State(start, word_map, len(train_loader.dataset), device)
    models = prepare(state, train_loader.dataset, valid_loader.dataset)
    objective = partial(cross_entropy, config)
    if config.self_critical:
        objective = SelfCritical(train_loader.dataset, config, word_map, device)
    pause = Pause(config.checkpoint_minutes, state.save)  # before the screen says that it trains
    log = RunLog(state, models, train_loader, valid_loader)
    if start.begins_second_phase:
        state.save()  # from here on this checkpoint decides what is resumed, not the best one
    references = tokenize_references(valid_loader.dataset) if is_first_process() else None

    while not state.finished():
        training = train_one_epoch(state, models, objective, train_loader, log, pause)
        with state.averages.in_place(True):
            validation, captions = validate(state, models, valid_loader, pause)
        pause()
        validation |= score_captions(captions, references)
        is_best = state.finish_epoch(training, validation, captions)
        state.save(is_best)
        # After the checkpoint, which holds the entry: a run that is killed here can log it again.
        log.epoch(state.progress.entry)
        if is_first_process():
            print(epoch_line(state.progress.entry), flush=True)
    log.close(state)


# -------------------------------------------------------------------------------------------------
# Before the first step


def load_data(start: Start, device: torch.device) -> tuple[dict, DataLoader, DataLoader]:
    """The word map, the training pictures and the validation pictures."""
    config = start.config
    word_map = load_word_map(config.data_dir)
    if start.checkpoint and start.checkpoint["word_map"] != word_map:
        raise UserError(f"{start.path} was trained with another word map than "
                        f"{config.data_dir}/WORDMAP.json: point --data_dir at the data of that "
                        f"run, or train anew with another --model_dir")

    train_set = CaptionDataset(config, "train", word_map)
    valid_set = CaptionDataset(config, "valid", word_map)
    if not any(valid_set.raw_captions):
        raise UserError(f"{valid_set.path} has no captions to choose the best checkpoint by")
    train_loader = make_loader(train_set, config, True)
    valid_loader = make_loader(valid_set, for_validation(config, device), False)
    return word_map, train_loader, valid_loader


def for_validation(config: Config, device: torch.device) -> Config:
    """Larger batches on a GPU, which waits for the host in greedy search: a step starts as many
    small kernels whatever the batch. Without gradients four times as many pictures take about as
    much memory."""
    batch_size = config.batch_size
    if device.type == "cuda":
        batch_size = max(batch_size, min(4 * batch_size, 128))
    return replace(config, batch_size=batch_size)


def prepare(state: State, train_set: CaptionDataset, valid_set: CaptionDataset) -> fast.Models:
    """Choose how the two halves run in training and in validation."""
    config, encoder = state.config, state.encoder
    is_shared = world_size() > 1
    if is_shared and state.device.type == "cuda" and config.fine_tune_encoder:
        # PyTorch's own conversion drops the activation that is part of timm's norms.
        from timm.layers import convert_sync_batchnorm

        encoder = convert_sync_batchnorm(encoder)

    models = fast.choose(encoder, state.decoder, config, precision(config, state.device))
    if config.cache_features:
        models = models._replace(
            training_encoder=keep_features(train_set, encoder, models.encoder, config),
            encoder=keep_features(valid_set, encoder, models.encoder, config))
    if is_shared and config.fine_tune_encoder:
        models = models._replace(training_encoder=DistributedDataParallel(encoder))
    if is_shared:
        models = models._replace(training_decoder=DistributedDataParallel(models.decoder))
    return models


# -------------------------------------------------------------------------------------------------
# An epoch


def train_one_epoch(state: State, models: fast.Models, objective, loader: DataLoader, log: RunLog,
                    pause: Pause) -> dict[str, float]:
    """One pass over the training pictures, each with all its captions, or the rest of one.

    Nothing waits for the device but the readings every `print_freq` steps. Returns the epoch's
    means, see state.means.

    Raises:
        UserError: the loss or the weights are no longer finite; names epoch, step and pictures.
    """
    config, progress, meter = state.config, state.progress, state.meter
    models.training_encoder.train()
    models.training_decoder.train(not config.self_critical)  # its samples have no dropout
    loader.sampler.epoch, loader.sampler.first = progress.epoch, progress.batch
    meter.start()

    bar = progress_bar(loader, f"epoch {progress.epoch + 1}", progress.batch)
    for images, captions, lengths, rows in bar:
        images = to_device(images, state.device)
        captions = to_device(captions, state.device)
        state.seed_step()
        with autocast(config, state.device):
            terms, counts = objective(models, images, captions, lengths, progress.step)
        loss = mean_loss(terms, counts)

        progress.batch += 1
        is_last = progress.batch == len(loader)
        is_read = is_last or progress.batch % config.print_freq == 0
        norm = state.update(loss, is_read)
        if state.scaler.is_enabled():
            terms = with_skipped_steps(terms, norm, counts["images"])
        meter.add(terms, counts, loss, rows)

        if is_read:
            reading = state.read(norm, loader.dataset)
            bar.set_postfix(loss=reading["loss"], images_per_s=reading["images_per_s"],
                            refresh=False)
            if not is_last:  # which is logged with the epoch
                log.reading(reading, progress.step)
        pause()
    return meter.means()


def cross_entropy(config: Config, models: fast.Models, images: torch.Tensor,
                  captions: torch.Tensor, lengths: torch.Tensor, step: int):
    """The loss of the true captions. Returns its terms, and the counts that they are means over.
    """
    grid = models.training_encoder(images)
    scores, targets, alphas = models.training_decoder(grid, captions, lengths)
    terms = caption_loss(scores, targets, alphas, lengths, config)
    return terms, counts_of(lengths, grid.device)


@torch.no_grad()
def validate(state: State, models: fast.Models, loader: DataLoader, pause: Pause):
    """Teacher-forced loss and greedy captions of every validation picture once.

    Returns:
        dict: the means, see state.means.
        list of dict: the captions of all processes (see decoding.generate) with their row, in its
        order; alphas for the first few only.
    """
    config, device = state.config, state.device
    models.encoder.eval()
    models.decoder.eval()
    sums = collections.Counter()
    generated = []
    started = time.perf_counter()
    for images, captions, lengths, rows in progress_bar(loader, "validate"):
        grid = models.encoder(images.to(device))
        scores, targets, alphas = models.decoder(grid, captions.to(device), lengths)
        terms = caption_loss(scores, targets, alphas, lengths, config)
        sums.update({name: term.sum.item() for name, term in terms.items()})
        sums.update({name: count.item() for name, count in counts_of(lengths).items()})
        found = generate(models.decoder, grid, state.word_map, config.max_len, beam_size=1)
        generated += with_rows(found, rows)
        pause()
    if world_size() > 1 and len(loader) < loader.sampler.rounds():
        pause()  # all together: other processes have a batch more

    total = collections.Counter()
    for part in gather_lists([sums]):
        total.update(part)
    kinds = from_first_process(kinds_of(terms) if is_first_process() else None)
    generated = sorted(gather_lists(generated), key=lambda caption: caption["row"])
    return means(total, kinds, time.perf_counter() - started), generated


def with_rows(captions: list[dict], rows: torch.Tensor) -> list[dict]:
    """Captions with the rows of their pictures, and without the alphas that are not shown."""
    for caption, row in zip(captions, rows.tolist()):
        caption["row"] = row
        if row >= PICTURES_SHOWN:
            del caption["alphas"]
    return captions


def score_captions(captions: list[dict], references: list | None) -> dict[str, float]:
    """The scores of generated captions, computed by the first process, which has the references."""
    words = [caption["words"] for caption in captions]
    scores = from_first_process(score(words, references) if is_first_process() else None)
    return scores | dict(distinct_captions=len(set(map(tuple, words))))


if __name__ == "__main__":
    run_script(main)
