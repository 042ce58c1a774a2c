"""Checkpoints, distributed processes, and which code this is."""
import io
import os
import shlex
import subprocess
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist

from config import UserError, get_config, replacing
from datasets import check_word_map
from models import build_models

CHECKPOINT_VERSION = 1
CHECKPOINT, BEST_CHECKPOINT = "checkpoint.pth.tar", "BEST_checkpoint.pth.tar"
PREVIOUS_CHECKPOINT = "checkpoint.previous.pth.tar"


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(checkpoint, path):
    """Write a checkpoint whole or not at all; of checkpoint.pth.tar the one before is kept beside it.

    Args:
        checkpoint (dict): tensors and plain containers only. path (Path).
    Raises:
        UserError: the disk is full or not writable; what was at `path` is untouched.
    """
    content = io.BytesIO()  # so that its size is known, and since torch.save does not say why a disk refuses
    torch.save(checkpoint, content)
    previous = path.with_name(PREVIOUS_CHECKPOINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, len(content.getbuffer())) as temporary:
        temporary.write_bytes(content.getbuffer())
        if path.name == CHECKPOINT and path.exists():
            previous.unlink(missing_ok=True)
            try:
                os.link(path, previous)  # a second name, so that there is a checkpoint at `path` throughout
            except OSError:  # a file system without links
                os.replace(path, previous)


def load_checkpoint(path):
    """The one way to read a checkpoint: tensors and plain containers only, whose parts agree with each other.

    Args:
        path (str or Path)
    Returns:
        dict: encoder, decoder (state dicts), config (dict), word_map (dict), epoch (int), ...: see train.py.
    Raises:
        UserError: missing, damaged, of another kind or version, or its word map and weights disagree.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: train a model with train.py, or name one with --checkpoint"
                        f"{way_back(path)}")
    try:
        with zipfile.ZipFile(path) as file:  # torch.load compares no checksums: a flipped bit is another weight to it
            if (part := file.testzip()) is not None:
                raise ValueError(f"the checksum of {part} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a broken file leads it to
        raise UserError(f"{path} is not a checkpoint of this repo, or is damaged "
                        f"({(str(error).splitlines() or [type(error).__name__])[0]}){way_back(path)}") from None
    parts = dict(version=int, config=dict, word_map=dict, encoder=dict, decoder=dict, optimizers=dict, epoch=int,
                 step=int, best_score=float, epochs_since_improvement=int, run=str)
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(name), kind)
                                                   for name, kind in parts.items()):
        raise UserError(f"{path} is not a checkpoint of this repo: it lacks one of {', '.join(parts)}")
    if checkpoint["version"] != CHECKPOINT_VERSION:
        raise UserError(f"{path} has version {checkpoint['version']}; this code reads {CHECKPOINT_VERSION}")
    if Path(checkpoint["run"]).name != checkpoint["run"]:
        raise UserError(f"{path} names a log folder outside --log_dir: {checkpoint['run']!r}")
    check_word_map(checkpoint["word_map"], path)
    rows = getattr(checkpoint["decoder"].get("embedding.weight"), "shape", [None])[0]
    if rows != len(checkpoint["word_map"]):
        raise UserError(f"{path} contradicts itself: {len(checkpoint['word_map'])} words in its word map, {rows} in "
                        f"its decoder")
    return checkpoint


def way_back(path):
    """How to go on from the checkpoint before the one at `path`. Returns: str, "" where there is none that is whole."""
    previous = path.with_name(PREVIOUS_CHECKPOINT)
    if path.name != CHECKPOINT or not previous.exists():
        return ""
    try:
        epoch = load_checkpoint(previous)["epoch"]
    except UserError:
        return ""
    return (f"; the one before it, after epoch {epoch}, is whole: "
            f"mv {shlex.quote(str(previous))} {shlex.quote(str(path))}, and --resume goes on from there")


def load_models(checkpoint, config, device, source):
    """The trained encoder and decoder of a checkpoint, in eval mode.

    Args:
        checkpoint (dict): of load_checkpoint. config (Config). device (torch.device). source: its path, for messages.
    Returns:
        Encoder, DecoderWithAttention
    Raises:
        UserError: the weights do not fit the architecture.
    """
    encoder, decoder = build_models(config, len(checkpoint["word_map"]), encoder_weights="none")
    load_state(encoder, checkpoint["encoder"], source)
    load_state(decoder, checkpoint["decoder"], source)
    return encoder.to(device).eval(), decoder.to(device).eval()


def load_state(module, state, source):
    """module.load_state_dict(state), strictly; what does not fit is a UserError that names `source`."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the weights in {source} are of another architecture than its settings say: {reason[:300]}"
                        ) from None


def open_checkpoint(args):
    """What eval.py and demo.py begin with: the checkpoint, its settings under the user's flags, and its models.

    Args:
        args (Namespace): of parse_args; `checkpoint` is a path, or None for the preset's best one.
    Returns:
        dict, Config, torch.device, Encoder, DecoderWithAttention
    """
    path = args.checkpoint or Path(get_config(args.preset, args.flags).model_dir) / BEST_CHECKPOINT
    checkpoint = load_checkpoint(path)
    config = get_config(flags=args.flags, trained=checkpoint["config"])
    device = get_device(config)
    print(f"{path}: epoch {checkpoint['epoch']}, {config.encoder}, {len(checkpoint['word_map'])} words, trained by "
          f"`{checkpoint.get('command', 'unknown')}`")
    return checkpoint, config, device, *load_models(checkpoint, config, device, path)


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def get_device(config):
    """The device of this process: the config's, or with "auto" this process's GPU where there is one.

    Raises:
        UserError: a device that this machine lacks.
    """
    name = config.device
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here ({str(error).splitlines()[0]})") from None
    return device


def init_distributed(device):
    """Join the other processes where torchrun started this one. Returns: rank (int), world_size (int)."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def sum_over_processes(tensor):
    """The sum of a tensor over all processes, in place. Returns: the tensor."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def from_first_process(value):
    """The first process's `value`, in every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather_lists(items):
    """The lists of all processes, joined in the order of their ranks. Returns: list."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


# ---------------------------------------------------------------------------------------------------------------------
# Records


def git_revision():
    """The commit of this code, with "+" where it was changed since; "unknown" outside a checkout. Returns: str."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
