"""Checkpoints, distributed processes, and which code this is."""
import contextlib
import ctypes
import dataclasses
import datetime
import io
import json
import math
import os
import pickle
import re
import shlex
import subprocess
import time
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist

from config import Config, UserError, get_config, replacing
from datasets import check_word_map
from models import build_models

CHECKPOINT_VERSION = 2
CHECKPOINT, BEST_CHECKPOINT = "checkpoint.pth.tar", "BEST_checkpoint.pth.tar"
PREVIOUS_CHECKPOINT = "checkpoint.previous.pth.tar"
START_TIMEOUT = datetime.timedelta(minutes=10)  # for all processes of a run to come


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
    content = content.getvalue()  # no copy; over a view that an error's traceback keeps Python 3.12.1 crashes
    previous = path.with_name(PREVIOUS_CHECKPOINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, len(content)) as temporary:
        temporary.write_bytes(content)
        if path.name == CHECKPOINT and path.exists():
            previous.unlink(missing_ok=True)
            try:
                os.link(path, previous)  # a second name, so that there is a checkpoint at `path` throughout
            except OSError:  # a file system without links
                os.replace(path, previous)


def load_checkpoint(path, word_map_path=None):
    """The one way to read a checkpoint: tensors and plain containers only, whose parts agree with each other.

    Args:
        path (str or Path)
        word_map_path (str or Path): the word map of a checkpoint of the original, which carries none.
    Returns:
        dict: encoder, decoder (state dicts), config (dict), word_map (dict), epoch (int), ...: see train.py.
    Raises:
        UserError: missing, damaged, of another kind or version, or its word map and weights disagree; names the way
            back where there is one.
    """
    path = Path(path)
    try:
        checkpoint = read_checkpoint(path, word_map_path)
    except UserError as error:
        raise UserError(f"{error}{way_back(path)}") from None
    if word_map_path and read_word_map(word_map_path) != checkpoint["word_map"]:
        raise UserError(f"{path} carries its own word map, and {word_map_path} is another: leave --word_map out")
    return checkpoint


def read_checkpoint(path, word_map_path):
    """What load_checkpoint gives, but of a checkpoint of ours its word map may be another than that file."""
    if not path.is_file():
        other = min(path.parent.glob("*.pth.tar"), default=Path("FILE"))
        words = " --word_map WORDMAP.json" if other.name.endswith("_.pth.tar") else ""  # as the original names its own
        raise UserError(f"{path} does not exist: train a model with train.py, or name one to eval.py or demo.py: "
                        f"--checkpoint {shlex.quote(str(other))}{words}")
    try:
        with zipfile.ZipFile(path) as file:  # torch.load compares no checksums: a flipped bit is another weight to it
            check_members(file, path)
            if (part := file.testzip()) is not None:
                raise ValueError(f"the checksum of {part} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a broken file leads it to
        return load_original(path, word_map_path, (str(error).splitlines() or [type(error).__name__])[0])
    if isinstance(checkpoint, dict) and type(checkpoint.get("best_score")) is float:  # by CIDEr alone: a tie loses
        checkpoint["best_score"] = [checkpoint["best_score"], math.inf, math.inf]
    for name, is_right in FIELDS.items():
        if not isinstance(checkpoint, dict) or name not in checkpoint or not is_right(checkpoint[name]):
            raise UserError(f"{path} is not a checkpoint of this repo: it has no proper {name!r}")
    if checkpoint["version"] != CHECKPOINT_VERSION:
        raise UserError(f"{path} has version {checkpoint['version']}; this code reads {CHECKPOINT_VERSION}")
    try:
        get_config(trained=checkpoint["config"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    check_word_map(checkpoint["word_map"], path)
    rows = len(torch.atleast_1d(checkpoint["decoder"].get("embedding.weight", torch.empty(0))))
    if rows != len(checkpoint["word_map"]):
        raise UserError(f"{path} contradicts itself: {len(checkpoint['word_map'])} words in its word map, {rows} in "
                        f"its decoder")
    return checkpoint


def is_count(value):
    return type(value) is int and 0 <= value < 2**53


def is_state_dict(value):
    """Whether all are plain, finite tensors, none larger than what the file holds of it: a few bytes can claim any."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and type(tensor) is torch.Tensor and tensor.layout is torch.strided
        and tensor.device.type == "cpu" and not tensor.is_quantized and not tensor.is_nested and not tensor.is_neg()
        and tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes() and bool(tensor.isfinite().all())
        for name, tensor in value.items())


def is_list_of(n):
    """A function that says whether a value is a list of n floats, none of them NaN."""
    return lambda value: isinstance(value, list) and len(value) == n and all(
        type(number) is float and not math.isnan(number) for number in value)


def are_numbers(value):
    return isinstance(value, dict) and all(isinstance(name, str) and type(number) in (int, float)
                                           for name, number in value.items())


def is_entry(value):
    """Whether this can be logged by train.log_entry; before the first epoch's end it is empty."""
    return isinstance(value, dict) and (not value or (
        all(are_numbers(value.get(name)) for name in ("train", "valid", "rates", "reading"))
        and is_count(value.get("epoch")) and is_count(value.get("step")) and isinstance(value.get("pictures"), list)
        and all(isinstance(shown, dict) and is_count(shown.get("row")) and isinstance(shown.get("words"), list)
                and all(isinstance(word, str) for word in shown["words"])
                and isinstance(shown.get("alphas"), torch.Tensor) and shown["alphas"].ndim == 3
                and len(shown["alphas"]) == len(shown["words"]) for shown in value["pictures"])))


# What a checkpoint must have, and what it must be.
FIELDS = dict(
    version=is_count, config=lambda value: isinstance(value, dict), word_map=lambda value: isinstance(value, dict),
    encoder=is_state_dict, decoder=is_state_dict, optimizers=lambda value: isinstance(value, dict), epoch=is_count,
    step=is_count, best_score=is_list_of(3), epochs_since_improvement=is_count, batch=is_count, world_size=is_count,
    totals=is_list_of(6), recent=is_list_of(6),
    seconds=lambda value: type(value) is float and 0 <= value < 1e9, reading=are_numbers, batches=are_numbers,
    entry=is_entry,
    run=lambda value: isinstance(value, str) and re.fullmatch(r"[\w-]{1,100}", value))  # a folder of --log_dir


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


def load_models(checkpoint, config, source):
    """The encoder and decoder of a checkpoint.

    Args:
        checkpoint (dict): of load_checkpoint. config (Config). source: its path, for messages.
    Returns:
        Encoder, DecoderWithAttention
    Raises:
        UserError: the weights do not fit the settings; found before these take any memory.
    """
    states = checkpoint["encoder"], checkpoint["decoder"]
    try:
        with torch.device("meta"):
            models = build_models(config, len(checkpoint["word_map"]), encoder_weights="none")
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:  # a size beyond 64 bits
        raise UserError(f"{source} has settings that no model can have ({str(error)[:200]})") from None
    for module, state in zip(models, states):
        for name, weights in module.state_dict().items():
            found = state[name].shape if name in state else None
            if weights.ndim and found != weights.shape:  # some have no counts of batches
                raise UserError(f"the weights in {source} are of another architecture than its settings say: {name} "
                                f"is {found and [*found]}, not {[*weights.shape]}")
    models = build_models(config, len(checkpoint["word_map"]), encoder_weights="none")
    for module, state in zip(models, states):
        try:
            module.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise UserError(f"the weights in {source} are of another architecture than its settings say: "
                            f"{' '.join(str(error).split())[:300]}") from None
    return models


def load_optimizer(optimizer, saved, source):
    """Load what a checkpoint holds of an Adam: its rate and, of each parameter, the moments.

    Args:
        optimizer (Adam): of one group. saved: its state dict, if it is one. source: the checkpoint's path.
    Raises:
        UserError: it is none, or does not fit the parameters.
    """
    own = optimizer.state_dict()
    parameters = optimizer.param_groups[0]["params"]
    try:
        rate, state = saved["param_groups"][0]["lr"], saved["state"]
        fits = type(rate) in (int, float) and 0 <= rate < math.inf and all(
            is_state_dict(moments) and {name: (tensor.shape, tensor.dtype) for name, tensor in moments.items()} == dict(
                step=((), torch.float32), **dict.fromkeys(("exp_avg", "exp_avg_sq"), (parameters[number].shape,
                                                                                      torch.float32)))
            for number, moments in state.items())
    except (TypeError, KeyError, IndexError, AttributeError):
        fits = False
    if not fits:
        raise UserError(f"what {source} holds of an optimizer does not fit its weights")
    own["param_groups"][0]["lr"] = rate
    optimizer.load_state_dict(dict(own, state=state))


def open_checkpoint(args):
    """What eval.py and demo.py begin with: the checkpoint, its settings under the user's flags, and its models.

    Args:
        args (Namespace): of parse_args; `checkpoint` is a path, or None for the preset's best one; `word_map` is the
            path of the word map where the checkpoint is one of the original.
    Returns:
        dict, Config, torch.device, Encoder (folded), DecoderWithAttention, both in eval mode
    """
    path = args.checkpoint or Path(get_config(args.preset, args.flags).model_dir) / BEST_CHECKPOINT
    checkpoint = load_checkpoint(path, args.word_map)
    config = get_config(flags=args.flags, trained=checkpoint["config"])
    device = get_device(config)
    print(f"{path}: epoch {checkpoint['epoch']}, {config.encoder}, {len(checkpoint['word_map'])} words, trained by "
          f"`{checkpoint.get('command', 'unknown')}`")
    encoder, decoder = load_models(checkpoint, config, path)
    return checkpoint, config, device, encoder.folded().to(device), decoder.to(device).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of the original: whole modules, pickled by PyTorch 0.4, of which only the tensors are read

# torch.load(weights_only=True) cannot read them, whatever it is told to allow: before 1.6 PyTorch stored a module's
# class with its source, which it refuses. These are the names such a pickle may use; none of them is ever looked up.
ORIGINAL_NAMES = re.compile(
    r"models\.\w+|(torchvision\.models|torch\.nn|torch\.optim)\.[\w.]+|torch\._utils\._rebuild_(tensor|parameter)\w*|"
    r"torch\.(cuda\.)?(Float|Double|Half|Long)Storage|torch\.device|collections\.(OrderedDict|defaultdict)|"
    r"(__builtin__|builtins)\.(dict|set)")
STORAGE_DTYPES = dict(FloatStorage=torch.float32, DoubleStorage=torch.float64, HalfStorage=torch.float16,
                      LongStorage=torch.int64)
RESNETS = {(2, 512): "resnet18", (6, 512): "resnet34", (6, 2048): "resnet50", (23, 2048): "resnet101",
           (36, 2048): "resnet152"}  # blocks of layer3, D


class StandIn(dict):
    """What every class and function in such a pickle becomes: it keeps what it is given, and does nothing."""

    __hash__ = object.__hash__  # an optimizer's state has parameters as keys

    def __init__(self, *args):
        self.args = args


class OriginalUnpickler(pickle._Unpickler):  # in Python: in the one in C ten bytes of a hostile file fill the memory
    """An unpickler that can call nothing but stand-ins; a storage becomes its key.

    Attributes: storages (dict), key -> dtype and length of each storage met.
    """

    def __init__(self, file):
        super().__init__(file)
        self.storages = {}

    def find_class(self, module, name):
        if not ORIGINAL_NAMES.fullmatch(f"{module}.{name}"):
            raise pickle.UnpicklingError(f"it asks for {f'{module}.{name}'!r}, which no such checkpoint needs")
        return type(name, (StandIn,), {})  # a new one each time, since a pickle can set its attributes

    def persistent_load(self, pid):
        if pid[0] == "module":
            return pid[1]  # the class; its source file and its source follow
        _, kind, key, _, length, *view = pid
        if any(view):
            raise pickle.UnpicklingError(f"storage {key!r} is part of another one")
        self.storages[key] = STORAGE_DTYPES[kind.__name__], length
        return key


def load_original(path, word_map_path, reason):
    """A checkpoint of the original, or of the tutorial it derives from, as if this repo had saved it, without what
    resuming needs. The parameters have the same names; the settings follow from their shapes.

    Args:
        path (Path). word_map_path (str or Path): the WORDMAP.json of its training; None where the user named none.
        reason (str): why it is not a checkpoint of this repo.
    Returns:
        dict: as load_checkpoint gives it.
    Raises:
        UserError: no such checkpoint, or damaged; no word map, or one of another size.
    """
    try:
        parts, storages = unpickle_original(path)
        encoder, decoder = ({name.removeprefix("module."): tensor  # the prefix is DataParallel's
                             for name, tensor in module_state(parts[half], storages).items()}
                            for half in ("encoder", "decoder"))
        attention_dim, encoder_dim = decoder["attention.encoder_att.weight"].shape
        blocks = len({name.split(".")[2] for name in encoder if name.startswith("resnet.6.")})
        config = Config(encoder=RESNETS[blocks, encoder_dim], attention_dim=attention_dim,
                        decoder_dim=decoder["decode_step.weight_hh"].shape[1],
                        emb_dim=decoder["decode_step.weight_ih"].shape[1] - encoder_dim)
        rows, epoch = len(decoder["embedding.weight"]), int(parts["epoch"])
    except Exception as error:  # a broken pickle raises whatever it stumbles over
        raise UserError(f"{path} is not a checkpoint of this repo ({reason[:200]}) or of the original "
                        f"({type(error).__name__}: {' '.join(str(error).split())[:300]}), or is damaged") from None
    if not word_map_path:
        raise UserError(f"{path} is a checkpoint of the original, which carries no word map: eval.py and demo.py read "
                        f"it with --word_map FILE, the WORDMAP.json that it was trained with")
    word_map = read_word_map(word_map_path)
    if len(word_map) != rows:
        raise UserError(f"{word_map_path} has {len(word_map)} words, but {path} was trained with {rows}: it needs the "
                        f"very WORDMAP.json of its training")
    return dict(version=CHECKPOINT_VERSION, config=dataclasses.asdict(config), word_map=word_map, encoder=encoder,
                decoder=decoder, epoch=epoch, command="train.py of the original")


def read_word_map(path):
    """Read the file that --word_map names. Returns: dict word -> id. Raises: UserError where it is not a word map."""
    try:
        return check_word_map(json.loads(Path(path).read_text(encoding="utf-8")), path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--word_map {path} cannot be read ({error})") from None


def unpickle_original(path):
    """Read a file of torch.save, in the format of today (zip) or of before PyTorch 1.6.

    Args:
        path (Path)
    Returns:
        dict of stand-ins, as it was saved; dict of its storages, key -> dtype and bytes.
    Raises:
        Exception: of any kind, where the file is broken.
    """
    with open(path, "rb") as file:
        if zipfile.is_zipfile(file):
            archive = zipfile.ZipFile(file)
            check_members(archive, path)
            folder, = (name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl"))
            unpickler = OriginalUnpickler(archive.open(f"{folder}data.pkl"))
            parts = unpickler.load()
            content = {key: archive.read(f"{folder}data/{key}") for key in unpickler.storages}
        else:
            file.seek(0)
            unpickler = OriginalUnpickler(file)
            _, _, _, parts, keys = (unpickler.load() for _ in range(5))  # first a magic number, version, byte order
            content = {}
            for key in keys:
                dtype, length = unpickler.storages[key]
                if int.from_bytes(file.read(8), "little") != length:
                    raise ValueError(f"storage {key!r} is not of {length} numbers")
                content[key] = file.read(length * dtype.itemsize)
    return parts, {key: (dtype, bytearray(content[key])) for key, (dtype, _) in unpickler.storages.items()}


def check_members(archive, path):
    """Raise ValueError where reading all of a file of torch.save would take more memory, or time, than its size says.

    Args: archive (ZipFile). path (Path): of the file.
    """
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("compressed")  # never by torch.save
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("parts lie upon each other")


def module_state(module, storages):
    """The state dict of a module. Args: module (StandIn). storages: of unpickle_original. Returns: name -> tensor."""
    parts, state = vars(module), {}
    for name, value in [*parts["_parameters"].items(), *parts["_buffers"].items()]:
        if value is not None:
            tensor = value.args[0] if isinstance(value.args[0], StandIn) else value  # what a parameter holds
            key, offset, size, stride = tensor.args[:4]
            dtype, content = storages[key]
            if math.prod(size) * dtype.itemsize > len(content):
                raise ValueError(f"{name!r} is larger than its storage")
            state[name] = torch.frombuffer(content, dtype=dtype).as_strided(size, stride, offset)
    for child, part in parts.pop("_modules").items():  # a part of two modules could stand for 2**100 of them
        state.update({f"{child}.{name}": tensor for name, tensor in module_state(part, storages).items()})
    return state


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def get_device(config):
    """The device of this process, made the current one, on which kernels start and graphs are recorded.

    "cuda" is, of several GPUs, that of this process; "auto" the same, or the CPU where there is none.

    Raises:
        UserError: a device that this machine lacks.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.empty(0, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here ({str(error).splitlines()[0]})") from None
    return device


def keep_freed_memory():
    """Let glibc keep freed memory for the next step; giving it back and getting it again costs a CPU a third of one."""
    with contextlib.suppress(OSError, AttributeError):  # Windows, macOS
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: no separate maps below so many bytes
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def meet_processes():
    """Meet the other processes where torchrun, or what sets the same variables, started this one.

    Returns:
        rank (int), world_size (int)
        PrefixStore: see own_part; it lies in that of the job, which torchrun keeps while it starts processes again.
    Raises:
        UserError: the variables speak of others, but not of how to meet them; some did not come in time.
    """
    given = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    missing = [name for name, value in given.items() if not (value if name == "MASTER_ADDR" else value.isdecimal())]
    if missing and given["WORLD_SIZE"] in ("", "1"):  # some schedulers set it, and nothing else, for every job
        return 0, 1, own_part(dist.HashStore(), 0, 1)
    if missing:
        raise UserError(f"WORLD_SIZE={given['WORLD_SIZE']} asks for several processes, which cannot meet without a "
                        f"proper {' and '.join(missing)}: start them with torchrun, or unset WORLD_SIZE to run one "
                        f"alone")
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
        return rank, world_size, own_part(store, rank, world_size)
    except dist.DistError as error:
        raise UserError(f"the {given['WORLD_SIZE']} processes that WORLD_SIZE, MASTER_ADDR and MASTER_PORT speak "
                        f"of have not met within {START_TIMEOUT} ({str(error)[:300]})") from None


def own_part(store, rank, world_size):
    """The part of a store that belongs to the processes started now, which all of them agree on here.

    torchrun --max_restarts gives new processes the store of the dead ones, whose addresses they would find there and
    wait for without end. Each process counts its own starts in it (the count that torchrun gives differs from node to
    node). The first one's count names the part; it goes on telling it to the others under theirs until all have heard.

    Args:
        store (Store). rank, world_size (int).
    Returns:
        PrefixStore
    Raises:
        DistError: some did not come within START_TIMEOUT.
    """
    start, deadline = store.add(f"starts of {rank}", 1), time.monotonic() + START_TIMEOUT.seconds
    if rank > 0:
        start = int(store.get(f"to {rank} at its start {start}"))
        store.add(f"heard of {start}", 1)
    while rank == 0 and (heard := store.add(f"heard of {start}", 0)) < world_size - 1:
        if time.monotonic() > deadline:
            raise dist.DistError(f"only {heard + 1} came")
        for other in range(1, world_size):
            store.set(f"to {other} at its start {store.add(f'starts of {other}', 0)}", str(start))
        time.sleep(0.05)
    return dist.PrefixStore(f"start {start}", store)


def goes_on(path, told, rank, store):
    """Whether a run goes on from the checkpoint at `path`: told to, or started again in the job that began it.

    torchrun --max_restarts repeats the command as it was given, a refused one too. Its count of restarts tells neither
    from the other, and is not raised where it was another node's process that died; the job's store remembers.

    Args:
        path (Path). told (bool): --resume was given. rank (int), store (PrefixStore): of meet_processes.
    Returns:
        bool: the first process's answer, in all of them.
    Raises:
        UserError: there is a checkpoint that is none of this job's business.
    """
    if rank == 0:
        job, own, is_there = store.underlying_store, f"run in {path!r}", path.exists()
        if told or not is_there:
            job.set(own, "")
        store.set("course", ("go on" if told or is_there else "begin") if job.check([own]) else "refuse")
    course = store.get("course")
    if course == b"refuse":
        raise UserError(f"{path} exists: go on with --resume, or choose another --model_dir")
    return course == b"go on"


def init_distributed(device, rank, world_size, store):
    """Let the processes that have met work together. Args: device (torch.device), and what meet_processes gave."""
    if world_size > 1:
        # gloo for what lies in the processes' own memory: to agree on something then stops no GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world_size)


def sum_over_processes(tensor):
    """The sum of a tensor over all processes, in place. Returns: the tensor."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def largest_of_processes(number):
    """The largest of all processes' numbers (int), in every process."""
    if not dist.is_initialized():
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


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
