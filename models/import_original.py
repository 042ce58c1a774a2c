"""Convert a checkpoint of the original, or of the tutorial it derives from, to one of this repo.

    python models/import_original.py BEST_checkpoint_.pth.tar WORDMAP.json
    python demo.py --checkpoint BEST_checkpoint_.ours.pth.tar    # which it wrote; eval.py takes it

Such a file holds pickled modules of PyTorch 0.4. Only their tensors are read, and no code of the
pickle is run. It contains no word map, so the WORDMAP.json of its training is needed. Its training
cannot be resumed.
"""
import dataclasses
import json
import math
import pickle
import re
import sys
import zipfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the scripts are

from config import CHECKPOINT_VERSION, Config, new_parser  # noqa: E402
from datasets import check_word_map  # noqa: E402
from models import build_models  # noqa: E402
from utils import UserError, replacing, run_script  # noqa: E402

# torch.load(weights_only=True) rejects them: before 1.6 PyTorch stored a module's class with its
# source. These are the names that such a pickle may use; none of them is ever looked up.
ORIGINAL_NAMES = re.compile(
    r"models\.\w+|torchvision\.models\.[\w.]+|torch\.(nn|optim|_utils)\.[\w.]+|"
    r"torch\.(cuda\.)?\w+Storage|torch\.device|collections\.\w+|(__builtin__|builtins)\.(dict|set)")
RESNETS = {(2, 512): "resnet18", (6, 512): "resnet34", (6, 2048): "resnet50",
           (23, 2048): "resnet101", (36, 2048): "resnet152"}  # blocks of layer3, D


class StandIn(dict):
    """Takes the place of a class of the pickle: keeps its attributes and does nothing."""

    __hash__ = object.__hash__  # an optimizer's state has parameters as keys

    def __init__(self, *args):
        pass


def rebuild_tensor(storage, offset, size, stride, *_):
    if math.prod(size) > len(storage):  # a stride of 0 would make it of any size
        raise ValueError("a tensor is larger than its storage")
    return storage.as_strided(size, stride, offset)


def rebuild_parameter(tensor, *_):
    return tensor


REBUILT = dict(_rebuild_tensor=rebuild_tensor, _rebuild_tensor_v2=rebuild_tensor,
               _rebuild_parameter=rebuild_parameter, Parameter=rebuild_parameter,
               FloatStorage=torch.float32, DoubleStorage=torch.float64,
               HalfStorage=torch.float16, LongStorage=torch.int64)


class OriginalUnpickler(pickle._Unpickler):  # ten bytes can make the one in C fill the memory
    """Can only call what is above. `storages` are still to be filled after it."""

    def __init__(self, file):
        super().__init__(file)
        self.storages = {}

    def find_class(self, module, name):
        if not ORIGINAL_NAMES.fullmatch(f"{module}.{name}"):
            raise ValueError(f"it uses '{module}.{name}', which no such checkpoint needs")
        if name in REBUILT:
            return REBUILT[name]
        return type(name, (StandIn,), {})  # a new one each time, as a pickle can set its attributes

    def persistent_load(self, pid):
        if pid[0] == "module":
            return pid[1]  # the class, before its source file and its source
        _, dtype, key, _, length, *view = pid
        if any(view):
            raise ValueError("a storage is part of another one")
        if key not in self.storages:
            self.storages[key] = torch.empty(length, dtype=dtype)
        return self.storages[key]


def main():
    parser = new_parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="of the original")
    parser.add_argument("word_map", type=Path, help="the WORDMAP.json of its training")
    parser.add_argument("--out", type=Path,
                        help="where to write (beside the original, NAME.ours.pth.tar)")
    args = parser.parse_args()
    checkpoint = load_original(args.checkpoint, args.word_map)
    name = args.checkpoint.name.removesuffix(".pth.tar")
    out = args.out or args.checkpoint.with_name(f"{name}.ours.pth.tar")
    with replacing(out) as temporary:
        torch.save(checkpoint, temporary)
    print(f"Wrote {out}: epoch {checkpoint['epoch']}, {checkpoint['config']['encoder']}, "
          f"{len(checkpoint['word_map'])} words")


def load_original(path: Path, word_map_path: Path) -> dict:
    """A checkpoint of the original in this repo's format, without what resuming needs.

    The parameters have the same names here; the settings follow from their shapes.
    """
    try:
        parts = unpickle_original(path)
        weights = {half: state_dict_of(parts[half]) for half in ("encoder", "decoder")}
        config = config_of(**weights)
        rows = len(weights["decoder"]["embedding.weight"])
        models = build_models(config, rows, encoder_weights="none")
        for module, half in zip(models, weights):
            module.load_state_dict(weights[half])
        epoch = int(parts["epoch"])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except Exception as error:  # a broken pickle raises anything
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} is not a checkpoint of the original, or is damaged "
                        f"({type(error).__name__}: {reason})") from None
    try:
        word_map = check_word_map(json.loads(word_map_path.read_text("utf-8")), word_map_path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{word_map_path} cannot be read ({error})") from None
    if len(word_map) != rows:
        raise UserError(f"{word_map_path} has {len(word_map)} words, but {path} was trained with "
                        f"{rows}: it needs the WORDMAP.json of its training")
    return dict(version=CHECKPOINT_VERSION, config=dataclasses.asdict(config), word_map=word_map,
                **weights, epoch=epoch, command="train.py of the original", progress=None,
                optimizers={}, world_size=1)


def unpickle_original(path):
    """Read a file of torch.save in today's format (zip) or that of PyTorch before 1.6."""
    with open(path, "rb") as file:
        if zipfile.is_zipfile(file):
            archive = zipfile.ZipFile(file)
            folder, = (name.removesuffix("data.pkl") for name in archive.namelist()
                       if name.endswith("/data.pkl"))
            unpickler = OriginalUnpickler(archive.open(f"{folder}data.pkl"))
            parts = unpickler.load()
            for key, storage in unpickler.storages.items():
                fill(storage, archive.open(f"{folder}data/{key}"))
            return parts
        file.seek(0)
        unpickler = OriginalUnpickler(file)
        for _ in "magic number", "version", "byte order":
            unpickler.load()
        parts = unpickler.load()
        for key in unpickler.load():
            file.seek(8, 1)  # its length
            fill(unpickler.storages[key], file)
        return parts


def fill(storage, file):
    if file.readinto(storage.view(torch.uint8).numpy()) < storage.nbytes:
        raise EOFError("a storage is not whole")


def state_dict_of(module):
    parts = vars(module)
    tensors = [*parts["_parameters"].items(), *parts["_buffers"].items()]
    state = {name: tensor for name, tensor in tensors if tensor is not None}
    # Popped, as modules shared by modules could stand for 2**100 of them.
    for child, part in parts.pop("_modules").items():
        for name, tensor in state_dict_of(part).items():
            state[f"{child}.{name}".removeprefix("module.")] = tensor  # DataParallel's prefix
    return state


def config_of(encoder, decoder):
    attention_dim, encoder_dim = decoder["attention.encoder_att.weight"].shape
    blocks = len({name.split(".")[2] for name in encoder if name.startswith("resnet.6.")})
    return Config(encoder=RESNETS[blocks, encoder_dim], attention_dim=attention_dim,
                  decoder_dim=decoder["decode_step.weight_hh"].shape[1],
                  emb_dim=decoder["decode_step.weight_ih"].shape[1] - encoder_dim)


if __name__ == "__main__":
    run_script(main)
