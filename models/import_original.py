"""Convert a checkpoint of the original, or of the tutorial it derives from, to one of this repo.

    python models/import_original.py BEST_checkpoint_.pth.tar WORDMAP.json       # writes BEST_checkpoint_.ours.pth.tar
    python demo.py --checkpoint BEST_checkpoint_.ours.pth.tar                    # eval.py takes it too

Such a file holds pickled modules of PyTorch 0.4. Only their tensors are read, and no code of the pickle is run. It
contains no word map, so the WORDMAP.json of its training is needed. Its training cannot be resumed.
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

# torch.load(weights_only=True) cannot read them, whatever is allowed: before 1.6 PyTorch stored a module's class with
# its source, which it rejects. These are the names that such a pickle may use; none of them is ever looked up.
ORIGINAL_NAMES = re.compile(
    r"models\.\w+|(torchvision\.models|torch\.nn|torch\.optim)\.[\w.]+|torch\._utils\._rebuild_(tensor|parameter)\w*|"
    r"torch\.(cuda\.)?(Float|Double|Half|Long)Storage|torch\.device|collections\.(OrderedDict|defaultdict)|"
    r"(__builtin__|builtins)\.(dict|set)")
STORAGE_DTYPES = dict(FloatStorage=torch.float32, DoubleStorage=torch.float64, HalfStorage=torch.float16,
                      LongStorage=torch.int64)
RESNETS = {(2, 512): "resnet18", (6, 512): "resnet34", (6, 2048): "resnet50", (23, 2048): "resnet101",
           (36, 2048): "resnet152"}  # blocks of layer3, D


class StandIn(dict):
    """Takes the place of every class and function of the pickle: keeps its arguments and does nothing."""

    __hash__ = object.__hash__  # an optimizer's state has parameters as keys

    def __init__(self, *args):
        self.args = args


class OriginalUnpickler(pickle._Unpickler):  # in Python, as the one in C can be made to fill the memory by ten bytes
    """An unpickler that can only call stand-ins; a storage becomes its key.

    Attributes: storages (dict): key -> dtype and length of each storage.
    """

    def __init__(self, file):
        super().__init__(file)
        self.storages = {}

    def find_class(self, module, name):
        if not ORIGINAL_NAMES.fullmatch(f"{module}.{name}"):
            raise pickle.UnpicklingError(f"it uses {f'{module}.{name}'!r}, which no such checkpoint needs")
        return type(name, (StandIn,), {})  # a new one each time, as a pickle can set its attributes

    def persistent_load(self, pid):
        if pid[0] == "module":
            return pid[1]  # the class, before its source file and its source
        _, kind, key, _, length, *view = pid
        if any(view):
            raise pickle.UnpicklingError(f"storage {key!r} is part of another one")
        self.storages[key] = STORAGE_DTYPES[kind.__name__], length
        return key


def main():
    parser = new_parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="of the original")
    parser.add_argument("word_map", type=Path, help="the WORDMAP.json of its training")
    parser.add_argument("--out", type=Path, help="where to write (beside the original, NAME.ours.pth.tar)")
    args = parser.parse_args()
    checkpoint = load_original(args.checkpoint, args.word_map)
    try:
        models = build_models(Config(**checkpoint["config"]), len(checkpoint["word_map"]), encoder_weights="none")
        for module, half in zip(models, ("encoder", "decoder")):
            module.load_state_dict(checkpoint[half])
    except RuntimeError as error:
        raise UserError(f"the weights in {args.checkpoint} are of another architecture than they should be: "
                        f"{' '.join(str(error).split())[:300]}") from None
    out = args.out or args.checkpoint.with_name(f"{args.checkpoint.name.removesuffix('.pth.tar')}.ours.pth.tar")
    with replacing(out) as temporary:
        torch.save(checkpoint, temporary)
    print(f"Wrote {out}: epoch {checkpoint['epoch']}, {checkpoint['config']['encoder']}, "
          f"{len(checkpoint['word_map'])} words")


def load_original(path, word_map_path):
    """A checkpoint of the original in this repo's format, without what resuming needs.

    The parameters have the same names here; the settings follow from their shapes.

    Args:
        path (Path). word_map_path (Path): the WORDMAP.json of its training.
    Returns:
        dict: as checkpoint.load_checkpoint gives it.
    Raises:
        UserError: missing, damaged, not a checkpoint of the original; a word map of another size.
    """
    try:
        parts, storages = unpickle_original(path)
        encoder, decoder = ({name.removeprefix("module."): tensor  # DataParallel's prefix
                             for name, tensor in module_state(parts[half], storages).items()}
                            for half in ("encoder", "decoder"))
        attention_dim, encoder_dim = decoder["attention.encoder_att.weight"].shape
        blocks = len({name.split(".")[2] for name in encoder if name.startswith("resnet.6.")})
        config = Config(encoder=RESNETS[blocks, encoder_dim], attention_dim=attention_dim,
                        decoder_dim=decoder["decode_step.weight_hh"].shape[1],
                        emb_dim=decoder["decode_step.weight_ih"].shape[1] - encoder_dim)
        rows, epoch = len(decoder["embedding.weight"]), int(parts["epoch"])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except Exception as error:  # a broken pickle raises anything
        raise UserError(f"{path} is not a checkpoint of the original, or is damaged ({type(error).__name__}: "
                        f"{' '.join(str(error).split())[:300]})") from None
    word_map = read_word_map(word_map_path)
    if len(word_map) != rows:
        raise UserError(f"{word_map_path} has {len(word_map)} words, but {path} was trained with {rows}: it needs the "
                        f"WORDMAP.json of its training")
    return dict(version=CHECKPOINT_VERSION, config=dataclasses.asdict(config), word_map=word_map, encoder=encoder,
                decoder=decoder, epoch=epoch, command="train.py of the original", progress=None, optimizers={},
                world_size=1)


def read_word_map(path):
    """Read a WORDMAP.json. Returns: dict word -> id. Raises: UserError where it is not a word map."""
    try:
        return check_word_map(json.loads(Path(path).read_text(encoding="utf-8")), path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None


def unpickle_original(path):
    """Read a file of torch.save in today's format (zip) or that of PyTorch before 1.6.

    Args:
        path (Path)
    Returns:
        dict of stand-ins, as it was saved; dict of its storages: key -> dtype and bytes.
    Raises:
        Exception: any, if the file is broken.
    """
    with open(path, "rb") as file:
        if zipfile.is_zipfile(file):
            archive = zipfile.ZipFile(file)
            folder, = (name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl"))
            unpickler = OriginalUnpickler(archive.open(f"{folder}data.pkl"))
            parts = unpickler.load()
            content = {key: archive.read(f"{folder}data/{key}") for key in unpickler.storages}
        else:
            file.seek(0)
            unpickler = OriginalUnpickler(file)
            _, _, _, parts, keys = (unpickler.load() for _ in range(5))  # magic number, version, byte order first
            content = {}
            for key in keys:
                dtype, length = unpickler.storages[key]
                if int.from_bytes(file.read(8), "little") != length:
                    raise ValueError(f"storage {key!r} is not of {length} numbers")
                content[key] = file.read(length * dtype.itemsize)
    return parts, {key: (dtype, bytearray(content[key])) for key, (dtype, _) in unpickler.storages.items()}


def module_state(module, storages):
    """The state dict of a module. Args: module (StandIn). storages: of unpickle_original. Returns: name -> tensor."""
    parts, state = vars(module), {}
    for name, value in [*parts["_parameters"].items(), *parts["_buffers"].items()]:
        if value is not None:
            tensor = value.args[0] if isinstance(value.args[0], StandIn) else value  # the data of a parameter
            key, offset, size, stride = tensor.args[:4]
            dtype, content = storages[key]
            if math.prod(size) * dtype.itemsize > len(content):
                raise ValueError(f"{name!r} is larger than its storage")
            state[name] = torch.frombuffer(content, dtype=dtype).as_strided(size, stride, offset)
    for child, part in parts.pop("_modules").items():  # popped, as modules shared by modules could stand for 2**100
        state.update({f"{child}.{name}": tensor for name, tensor in module_state(part, storages).items()})
    return state


if __name__ == "__main__":
    run_script(main)
