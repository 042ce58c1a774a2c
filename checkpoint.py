"""Checkpoints: tensors and plain containers only, written whole or not at all, read in one way."""
import io
import os
import re
import shlex
import zipfile
from argparse import Namespace
from pathlib import Path

import torch

from config import CHECKPOINT_VERSION, DEFAULT_PRESET, Config, get_config
from datasets import check_word_map
from models import DecoderWithAttention, Encoder, build_models
from utils import UserError, get_device, one_line, printable, replacing, weights_digest

CHECKPOINT = "checkpoint.pth.tar"
BEST_CHECKPOINT = "BEST_checkpoint.pth.tar"
PREVIOUS_CHECKPOINT = "checkpoint.previous.pth.tar"
CROSS_ENTROPY_CHECKPOINT = "BEST_cross_entropy_checkpoint.pth.tar"  # where self-critical began
RELEASED = Path(__file__).parent / "models" / "photographs.pth.tar"  # comes along; models/README.md
FIELDS = {"version", "epoch", "config", "word_map", "encoder", "decoder", "optimizers",
          "world_size", "progress"}


def save_checkpoint(checkpoint: dict, path: Path, keep_previous: bool = False) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        checkpoint: tensors and plain containers only.
        keep_previous: keep the one before beside it.
    Raises:
        UserError: the disk is full or not writable; what was at `path` is untouched.
    """
    buffer = io.BytesIO()  # so that its size is known; torch.save does not say why a disk refuses
    torch.save(checkpoint, buffer)
    content = buffer.getvalue()  # Python 3.12.1 crashes over a view that a traceback keeps
    previous = path.with_name(PREVIOUS_CHECKPOINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, len(content)) as temporary:
        temporary.write_bytes(content)
        if keep_previous and path.exists():
            previous.unlink(missing_ok=True)
            try:
                os.link(path, previous)  # so there is a checkpoint at `path` throughout
            except OSError:  # a file system without links
                os.replace(path, previous)


def load_checkpoint(path: str | Path) -> dict:
    """The one way to read a checkpoint.

    Returns:
        version, epoch, config (dict), word_map (dict), encoder, decoder (state dicts; that of an
        encoder which is torchvision's or timm's unchanged may be empty), and what resuming needs:
        optimizers (dict of state dicts), world_size, progress (dict, see state.Progress; None
        where the checkpoint was imported or released).
    Raises:
        UserError: missing, damaged, not a checkpoint, of another version; gives the command that
            brings the previous checkpoint back where that is intact.
    """
    path = Path(path)
    try:
        return read_checkpoint(path)
    except UserError as error:
        raise UserError(f"{error}{way_back(path)}") from None


def read_checkpoint(path):
    if not path.is_file():
        raise UserError(f"{path} does not exist: {instead_of(path)}")
    try:
        with zipfile.ZipFile(path) as file:  # torch.load verifies no checksums
            damaged_part = file.testzip()
        if damaged_part is not None:
            raise ValueError(f"the checksum of {damaged_part} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        check_contents(checkpoint)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # torch.load raises anything on a broken file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged, or not a checkpoint of this repo ({reason[:200]}); "
                        f"one of the original is imported by models/import_original.py") from None
    return checkpoint


def check_contents(checkpoint):
    version = checkpoint["version"]
    if version != CHECKPOINT_VERSION:
        raise UserError(f"it has version {version!r:.80}, this code reads {CHECKPOINT_VERSION}")
    missing = FIELDS - checkpoint.keys()
    if missing:
        raise ValueError(f"it has no {min(missing)!r}")
    for half in ("encoder", "decoder"):
        if not all(tensor.isfinite().all() for tensor in checkpoint[half].values()):
            raise ValueError(f"the {half}'s weights are not finite")
    progress = checkpoint["progress"]
    if progress and not re.fullmatch(r"[\w-]{1,100}", progress["run"]):
        raise ValueError("its run is not the name of a folder")  # but may lead out of --log_dir
    check_word_map(checkpoint["word_map"], "it")
    get_config(trained=checkpoint["config"])


def way_back(path: Path) -> str:
    """How to resume from another checkpoint than the one at `path`, if one is intact."""
    if path.name != CHECKPOINT:
        return ""
    for other in (path.with_name(PREVIOUS_CHECKPOINT), path.with_name(BEST_CHECKPOINT)):
        try:
            epoch = read_checkpoint(other)["epoch"]
        except UserError:
            continue
        command = shlex.join(["cp", str(other), str(path)])
        return (f"; {other.name}, after epoch {epoch}, is intact: {command}, and --resume "
                f"continues from there")
    return ""


# -------------------------------------------------------------------------------------------------
# The models of a checkpoint


def load_models(checkpoint: dict, config: Config,
                source: str | Path) -> tuple[Encoder, DecoderWithAttention]:
    """The encoder and decoder of a checkpoint; `source` is its path, for messages.

    Raises:
        UserError: the weights do not fit the settings.
    """
    has_encoder = bool(checkpoint["encoder"])
    encoder_weights = "none" if has_encoder else None  # what the settings say
    try:
        encoder, decoder = build_models(config, len(checkpoint["word_map"]), encoder_weights)
        if has_encoder:
            encoder.load_state_dict(checkpoint["encoder"])
        decoder.load_state_dict(checkpoint["decoder"])
    except RuntimeError as error:
        revision = checkpoint.get("git_revision", "unknown")
        raise UserError(f"the weights in {source} are of another architecture than its settings: "
                        f"{one_line(error)[:300]}; use models.py as it was at the training "
                        f"(commit {revision}, + for changes since)") from None
    if not has_encoder and weights_digest(encoder) != checkpoint.get("encoder_digest"):
        raise UserError(f"{source} was trained with other weights of {config.encoder} than "
                        f"--encoder_weights {config.encoder_weights} gives today: take "
                        f"{BEST_CHECKPOINT} beside it, which has them")
    return encoder, decoder


def load_initial_models(
        checkpoint: dict, source: str | Path, config: Config, word_map: dict[str, int],
) -> tuple[Encoder, DecoderWithAttention, str]:
    """The models that a new run begins with, and what the user should know of them: those of a
    checkpoint, whatever words it knows. Words of both word maps keep their embedding and their row
    of `fc`, new ones are random.

    Args:
        config: with the checkpoint's architecture.
        word_map: of the new run.
    """
    encoder, trained = load_models(checkpoint, config, source)
    _, decoder = build_models(config, len(word_map), "none")

    known = checkpoint["word_map"]
    shared = [word for word in word_map if word in known]
    rows = [word_map[word] for word in shared]
    known_rows = [known[word] for word in shared]
    state = trained.state_dict()
    fresh = decoder.state_dict()
    for name in ("embedding.weight", "fc.weight", "fc.bias"):
        fresh[name][rows] = state[name][known_rows]
        state[name] = fresh[name]
    decoder.load_state_dict(state)
    note = (f"begun from {source}, epoch {checkpoint['epoch']}: {len(shared)} of {len(word_map)} "
            f"words are known to it")
    return encoder, decoder, note


def load_optimizer(optimizer: torch.optim.Adam, saved: dict, source: str | Path) -> None:
    """Load an Adam of one group from a checkpoint: its rate and each parameter's moments.

    Raises:
        UserError: they do not fit the parameters.
    """
    own = optimizer.state_dict()  # whether it is fused, and the like, is this version's choice
    group = own["param_groups"][0]
    saved_group = saved["param_groups"][0]
    shapes = [parameter.shape for parameter in optimizer.param_groups[0]["params"]]
    fits = saved_group["params"] == group["params"] and all(
        moments["exp_avg"].shape == shapes[number] for number, moments in saved["state"].items())
    if not fits:
        raise UserError(f"the optimizer's state in {source} does not fit the parameters that are "
                        f"trained now")
    group["lr"] = saved_group["lr"]
    optimizer.load_state_dict(dict(own, state=saved["state"]))


# -------------------------------------------------------------------------------------------------
# Which checkpoint


def open_checkpoint(
        args: Namespace, otherwise: Path | None = None,
) -> tuple[dict, Config, torch.device, Encoder, DecoderWithAttention]:
    """What eval.py and demo.py begin with: the checkpoint, its settings under the user's flags,
    the device, and its models in eval mode.

    Args:
        args: of parse_args; sets `checkpoint`, where that is None, to the path of find_checkpoint.
    """
    path = Path(args.checkpoint) if args.checkpoint else find_checkpoint(args, otherwise)
    args.checkpoint = path
    checkpoint = load_checkpoint(path)
    config = get_config(flags=args.flags, trained=checkpoint["config"])
    device = get_device(config)
    print(f"{path}: epoch {checkpoint['epoch']}, {config.encoder}, "
          f"{len(checkpoint['word_map'])} words, trained by "
          f"`{printable(checkpoint.get('command', 'unknown'))}`")
    if "note" in checkpoint:  # what it has seen and what it has not
        print(printable(checkpoint["note"]))
    encoder, decoder = load_models(checkpoint, config, path)
    return checkpoint, config, device, encoder.to(device).eval(), decoder.to(device).eval()


def find_checkpoint(args: Namespace, otherwise: Path | None) -> Path:
    """The preset's best checkpoint; or `otherwise`, where the user named no preset and no folder
    of models, and models/ has none of the user's own.
    """
    best = Path(get_config(args.preset, args.flags).model_dir) / BEST_CHECKPOINT
    is_named = args.preset != DEFAULT_PRESET or "model_dir" in args.flags
    if is_named or own_checkpoints(best.parent) or not (otherwise and otherwise.exists()):
        return best
    print(f"{best} does not exist, so this is the model that comes along:")
    return otherwise


def instead_of(path: Path) -> str:
    """What the user can do where there is no checkpoint at `path`."""
    ways = ["check --preset and --model_dir", "train a model with train.py, without --resume"]
    if RELEASED.exists():
        ways.append(f"take the one that comes along, --checkpoint {shlex.quote(str(RELEASED))}")
    presets = path.parent.glob(f"*/{BEST_CHECKPOINT}")
    other = min(own_checkpoints(path.parent), default=min(presets, default=Path("FILE")))
    name = shlex.quote(str(other))
    if other.name.endswith("_.pth.tar"):  # as the original names its own
        ways.append(f"or import the original's: python models/import_original.py {name} "
                    f"WORDMAP.json")
    else:
        ways.append(f"or name one to eval.py or demo.py: --checkpoint {name}")
    return "; ".join(ways)


def own_checkpoints(folder):
    return [file for file in folder.glob("*.pth.tar") if file.name != RELEASED.name]
