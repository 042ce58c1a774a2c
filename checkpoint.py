"""Checkpoints: tensors and plain containers only, written whole or not at all, and one way to read them."""
import io
import os
import re
import shlex
import zipfile
from pathlib import Path

import torch

from config import CHECKPOINT_VERSION, DEFAULT_PRESET, get_config
from datasets import check_word_map
from models import build_models
from utils import UserError, check_members, get_device, printable, replacing, weights_digest

CHECKPOINT, BEST_CHECKPOINT = "checkpoint.pth.tar", "BEST_checkpoint.pth.tar"
PREVIOUS_CHECKPOINT = "checkpoint.previous.pth.tar"
RELEASED = Path(__file__).parent / "models" / "photographs.pth.tar"  # comes along; models/README.md
CROSS_ENTROPY_CHECKPOINT = "BEST_cross_entropy_checkpoint.pth.tar"  # what self-critical training began from
FIELDS = {"version", "epoch", "config", "word_map", "encoder", "decoder", "optimizers", "world_size", "progress"}


def save_checkpoint(checkpoint, path, keep_previous=False):
    """Write a checkpoint whole or not at all.

    Args:
        checkpoint (dict): tensors and plain containers only. path (Path). keep_previous (bool): keep the one before
            beside it.
    Raises:
        UserError: the disk is full or not writable; what was at `path` is untouched.
    """
    content = io.BytesIO()  # so that its size is known, and since torch.save does not say why a disk refuses
    torch.save(checkpoint, content)
    content = content.getvalue()  # no copy; Python 3.12.1 crashes over a view that an error's traceback keeps
    previous = path.with_name(PREVIOUS_CHECKPOINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, len(content)) as temporary:
        temporary.write_bytes(content)
        if keep_previous and path.exists():
            previous.unlink(missing_ok=True)
            try:
                os.link(path, previous)  # a second name, so that there is a checkpoint at `path` throughout
            except OSError:  # a file system without links
                os.replace(path, previous)


def load_checkpoint(path):
    """The one way to read a checkpoint.

    Args:
        path (str or Path)
    Returns:
        dict: version, epoch, config (dict), word_map (dict), encoder, decoder (state dicts; that of an encoder which
        is torchvision's or timm's unchanged may be empty), and what resuming needs: optimizers (dict of state dicts),
        world_size (int), progress (dict: see train.Progress; None where the checkpoint was imported or released).
    Raises:
        UserError: missing, damaged, not a checkpoint, of another version; gives the command that brings the previous
        checkpoint back where that is intact.
    """
    path = Path(path)
    try:
        return read_checkpoint(path)
    except UserError as error:
        raise UserError(f"{error}{way_back(path)}") from None


def read_checkpoint(path):
    if not path.is_file():
        presets = path.parent.glob(f"*/{BEST_CHECKPOINT}")
        other = min(own_checkpoints(path.parent), default=min(presets, default=Path("FILE")))
        found = f"name one to eval.py or demo.py: --checkpoint {shlex.quote(str(other))}"
        if other.name.endswith("_.pth.tar"):  # as the original names its own
            found = f"import the original's: python models/import_original.py {shlex.quote(str(other))} WORDMAP.json"
        released = f"take the one that comes along, --checkpoint {shlex.quote(str(RELEASED))}; "
        raise UserError(f"{path} does not exist: check --preset and --model_dir; train a model with train.py, without "
                        f"--resume; {released if RELEASED.exists() else ''}or {found}")
    try:
        with zipfile.ZipFile(path) as file:  # torch.load verifies no checksums: a flipped bit would be another weight
            check_members(file, path)
            if (part := file.testzip()) is not None:
                raise ValueError(f"the checksum of {part} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["version"] != CHECKPOINT_VERSION:
            raise UserError(f"it has version {checkpoint['version']!r:.80}, this code reads {CHECKPOINT_VERSION}")
        if FIELDS - checkpoint.keys():
            raise ValueError(f"it has no {min(FIELDS - checkpoint.keys())!r}")
        for half in ("encoder", "decoder"):
            if not all(map(is_plain, checkpoint[half].values())):
                raise ValueError(f"the {half}'s weights are not finite, or not all in the file")
        if checkpoint["progress"] and not re.fullmatch(r"[\w-]{1,100}", checkpoint["progress"]["run"]):
            raise ValueError("its run is not the name of a folder")  # a path could lead out of --log_dir
        check_word_map(checkpoint["word_map"], "it")
        get_config(trained=checkpoint["config"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # torch.load raises anything on a broken file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged, or not a checkpoint of this repo ({reason[:200]}); one of the original is "
                        f"imported by models/import_original.py") from None
    return checkpoint


def own_checkpoints(folder):
    """The checkpoints in a folder (Path) but the one that comes along. Returns: list of Path."""
    return [file for file in folder.glob("*.pth.tar") if file.name != RELEASED.name]


def is_plain(tensor):
    """Whether this is a plain tensor of finite numbers, all stored in the file: an expanded one can claim any size."""
    return (type(tensor) is torch.Tensor and tensor.layout is torch.strided and tensor.device.type == "cpu"
            and tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes() and bool(tensor.isfinite().all()))


def way_back(path):
    """How to resume from another checkpoint than the one at `path`. Returns: str, "" if there is no intact one."""
    if path.name != CHECKPOINT:
        return ""
    for other in (path.with_name(PREVIOUS_CHECKPOINT), path.with_name(BEST_CHECKPOINT)):
        try:
            epoch = read_checkpoint(other)["epoch"]
        except UserError:
            continue
        return (f"; {other.name}, after epoch {epoch}, is intact: "
                f"cp {shlex.quote(str(other))} {shlex.quote(str(path))}, and --resume continues from there")
    return ""


def load_models(checkpoint, config, source):
    """The encoder and decoder of a checkpoint.

    Args:
        checkpoint (dict): of load_checkpoint. config (Config). source: its path, for messages.
    Returns:
        Encoder, DecoderWithAttention
    Raises:
        UserError: the weights do not fit the settings; found before any memory is allocated for them.
    """
    halves = [half for half in ("encoder", "decoder") if checkpoint[half]]
    try:
        for device in ("meta", "cpu"):  # tensors on the meta device have a size, but no memory
            is_pretrained = device == "cpu" and "encoder" not in halves
            with torch.device(device):
                models = build_models(config, len(checkpoint["word_map"]), None if is_pretrained else "none")
            for module, half in zip(models, ("encoder", "decoder")):
                if half in halves:
                    # A plain dict, as the metadata of a state dict would remember `assign` for the next time.
                    module.load_state_dict(dict(checkpoint[half]), assign=device == "meta")
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"the weights in {source} are of another architecture than its settings: "
                        f"{' '.join(str(error).split())[:300]}; use models.py as it was at the training (commit "
                        f"{checkpoint.get('git_revision', 'unknown')}, + for changes since)") from None
    if is_pretrained and weights_digest(models[0]) != checkpoint.get("encoder_digest"):
        raise UserError(f"{source} was trained with other weights of {config.encoder} than --encoder_weights "
                        f"{config.encoder_weights} gives today: take {BEST_CHECKPOINT} beside it, which has them")
    return models


def load_initial_models(checkpoint, source, config, word_map):
    """The models that a new run begins with: those of a checkpoint, whatever words it knows. Words of both word maps
    keep their embedding and their row of `fc`, new ones are random.

    Args:
        checkpoint (dict): of load_checkpoint. source: its path, for messages. config (Config): with its architecture.
        word_map (dict): of the new run.
    Returns:
        Encoder, DecoderWithAttention; str: what the user should know.
    Raises:
        UserError: see load_models.
    """
    known = checkpoint["word_map"]
    encoder, trained = load_models(checkpoint, config, source)
    _, decoder = build_models(config, len(word_map), "none")
    shared = [word for word in word_map if word in known]
    rows, known_rows = ([numbers[word] for word in shared] for numbers in (word_map, known))
    state, fresh = trained.state_dict(), decoder.state_dict()
    for name in ("embedding.weight", "fc.weight", "fc.bias"):
        fresh[name][rows] = state[name][known_rows]
        state[name] = fresh[name]
    decoder.load_state_dict(state)
    note = (f"begun from {source}, epoch {checkpoint['epoch']}: {len(shared)} of {len(word_map)} words are known to "
            f"it")
    return encoder, decoder, note


def load_optimizer(optimizer, saved, source):
    """Load the state of an Adam from a checkpoint: its rate and each parameter's moments.

    Args:
        optimizer (Adam): of one group. saved (dict): its state dict. source: the checkpoint's path.
    Raises:
        UserError: it does not fit the parameters.
    """
    own = optimizer.state_dict()  # whether it is fused, and the like, is this version's choice
    group, parameters = own["param_groups"][0], optimizer.param_groups[0]["params"]
    try:
        group["lr"] = saved["param_groups"][0]["lr"]
        fits = saved["param_groups"][0]["params"] == group["params"] and all(
            is_plain(x) and x.shape in ((), parameters[number].shape)
            for number, moments in saved["state"].items() for x in moments.values())
    except (TypeError, KeyError, IndexError, AttributeError):
        fits = False
    if not fits:
        raise UserError(f"the optimizer's state in {source} does not fit the parameters that are trained now")
    optimizer.load_state_dict(dict(own, state=saved["state"]))


def open_checkpoint(args, otherwise=None):
    """What eval.py and demo.py begin with: the checkpoint, its settings under the user's flags, and its models.

    Args:
        args (Namespace): of parse_args; `checkpoint` is a path, or None for the preset's best one.
        otherwise (Path): taken where the user named no checkpoint, preset or folder of models, and
        models/ has none of the user's own.
    Returns:
        dict, Config, torch.device, Encoder, DecoderWithAttention, both in eval mode
    """
    if not args.checkpoint:
        args.checkpoint = Path(get_config(args.preset, args.flags).model_dir) / BEST_CHECKPOINT
        is_named = args.preset != DEFAULT_PRESET or "model_dir" in args.flags
        has_own = own_checkpoints(args.checkpoint.parent)
        if otherwise and otherwise.exists() and not is_named and not has_own:
            print(f"{args.checkpoint} does not exist, so this is the model that comes along:")
            args.checkpoint = otherwise
    args.checkpoint = path = Path(args.checkpoint)
    checkpoint = load_checkpoint(path)
    config = get_config(flags=args.flags, trained=checkpoint["config"])
    device = get_device(config)
    print(f"{path}: epoch {checkpoint['epoch']}, {config.encoder}, {len(checkpoint['word_map'])} words, trained by "
          f"`{printable(checkpoint.get('command', 'unknown'))}`")
    if "note" in checkpoint:  # what it has seen and what it has not
        print(printable(checkpoint["note"]))
    encoder, decoder = load_models(checkpoint, config, path)
    return checkpoint, config, device, encoder.to(device).eval(), decoder.to(device).eval()
