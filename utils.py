"""The ground of every script: errors a user can mend, whole files, the device, processes.

Scripts import it before anything that takes long or looks at the surroundings.
"""
import contextlib
import ctypes
import datetime
import errno
import hashlib
import itertools
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


def leave_quietly(kind, error, trace, otherwise=sys.excepthook):
    """Ctrl-C, which may come while packages are imported, needs no traceback."""
    if not issubclass(kind, KeyboardInterrupt):
        otherwise(kind, error, trace)


sys.excepthook = leave_quietly
if os.path.expanduser("~") == "~":  # a user whom the system does not know; nltk asks for a home
    os.environ["HOME"] = tempfile.gettempdir()
if not (sys.stderr and sys.stderr.isatty()):  # in a file each update is another line
    os.environ.setdefault("TQDM_MININTERVAL", "60")
    os.environ.setdefault("TQDM_MAXINTERVAL", "60")
# Threads that wait for each other busily take a step five times as long where another program needs
# the cores too; on idle cores it makes no difference. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from filelock import FileLock, Timeout  # noqa: E402

START_TIMEOUT = datetime.timedelta(minutes=10)  # for all processes of a run to come


class UserError(Exception):
    """Something the user can mend: one line that names the file and the way out; exit code 2."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main(); a user's mistake, or a file that the system refuses, becomes one line
    and exit code 2.
    """
    with contextlib.suppress(AttributeError):  # a stream of another kind, such as a notebook's
        sys.stdout.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print("error:", printable(error), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever reads, such as head, has seen enough
        discard_output(1)
        sys.exit(128 + 13)
    except torch.OutOfMemoryError as error:
        print("error: out of memory: give a smaller --batch_size or --beam_size, and train.py "
              "--resume where there is a checkpoint;", printable(error)[:300], file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {printable(error.filename)}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def discard_output(*streams: int) -> None:
    """Let what is written to these file descriptors go nowhere, as nobody is there to read it."""
    with open(os.devnull, "w") as nowhere:
        for stream in streams:
            os.dup2(nowhere.fileno(), stream)


def printable(text: object) -> str:
    """Text from outside as one line that a terminal shows, and takes no order from."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", str(text))


# -------------------------------------------------------------------------------------------------
# The disk


@contextlib.contextmanager
def replacing(path: str | Path, size: int = 0) -> Iterator[Path]:
    """The one way to write a file whole or not at all: yields a temporary name in the same folder,
    which becomes `path` once all is on the disk.

    Args:
        size: bytes that the file will take, for messages.
    Raises:
        UserError: the disk is full or not writable; what was at `path` is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    advice = ". What was there before is untouched: mend that, or name another folder"
    if size:
        advice = f"; it takes {size / 2**20:,.1f} MiB{advice}"
    try:
        with writing(path, advice):
            temporary.unlink(missing_ok=True)  # of a run that was killed; perhaps most of the disk
            yield temporary
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            if os.name == "posix":  # elsewhere a folder cannot be opened, nor needs to be
                folder = os.open(path.parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def writing(path: Path, advice: str) -> Iterator[None]:
    """Turn what a disk refuses into a UserError, which ends with the advice."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter is h5py's of a full disk
        raise UserError(f"{path} could not be written ({reason_of(error)}){advice}") from None


@contextlib.contextmanager
def alone(path: Path, flag: str) -> Iterator[None]:
    """Keep what lies beside a lock file to this process, until the block ends or the process dies.

    Args:
        path: of the lock file; its folder is made.
        flag: what names another folder, for the message.
    Raises:
        UserError: another process holds it; says which.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        holder = path.read_text(encoding="utf-8", errors="replace") or "another process"
        raise UserError(f"{path.parent} is in use by {holder}: wait for it to end, or name "
                        f"another {flag}") from None
    try:
        with contextlib.suppress(OSError):  # Windows lets nobody write to a locked file
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            path.write_text(f"process {os.getpid()} on {platform.node()} since {now}", "utf-8")
        yield
    finally:
        lock.release()


def reason_of(error: Exception) -> str:
    """What went wrong with a file, in one line; HDF5 tells a full disk in its message only."""
    if getattr(error, "errno", None) == errno.ENOSPC or f"errno = {errno.ENOSPC}" in str(error):
        return "the disk is full"
    return getattr(error, "strerror", None) or one_line(error)


def one_line(error: Exception) -> str:
    """The message of an error of others, which may have several lines or none."""
    return " ".join(str(error).split()) or type(error).__name__


def write_text(path: str | Path, text: str) -> None:
    """Write a small file whole or not at all; UserError where it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def need_space(folder: Path, size: int, purpose: str) -> None:
    """Raise UserError unless the disk of `folder` has `size` bytes free, and a twentieth more."""
    needed = 1.05 * size
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder} needs {needed / 2**30:.2f} GiB {purpose}, but its disk has "
                        f"{free / 2**30:.2f} GiB free: free some, or point --data_dir at another "
                        f"disk")


def weights_digest(module: torch.nn.Module) -> str:
    """sha256 of a module's parameters and buffers, hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------
# The device


def get_device(config) -> torch.device:
    """The device of this process, made the current one, on which kernels start and graphs are
    recorded: "cuda" is, of several GPUs, that of this process. UserError where there is none.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    own_name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        device = torch.device(own_name)
        torch.empty(0, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here ({reason})") from None
    return device


def precision(config, device: torch.device) -> torch.dtype:
    """What training multiplies in: float32, bfloat16 or float16.

    A CPU takes float32 unless told otherwise; what a device lacks becomes float32.
    """
    native = precisions(device)
    if config.precision == "auto":
        return native[-1] if device.type == "cuda" else torch.float32
    wanted = getattr(torch, config.precision)
    return wanted if wanted in native else torch.float32


def precisions(device: torch.device) -> list[torch.dtype]:
    """What a device multiplies in natively; the best for training comes last."""
    native = [torch.float32]
    has_bfloat16 = False
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (7, 0):  # before that no faster than float32
            native.append(torch.float16)
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        # Not float16: on CPUs that claim to have it training took seconds per picture.
        found = torch.cpu.get_capabilities()
        has_bfloat16 = any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    if has_bfloat16:
        native.append(torch.bfloat16)
    return native


def autocast(config, device: torch.device):
    """Multiply in bfloat16 or float16 where `precision` gives that; weights, their updates and the
    loss stay float32."""
    dtype = precision(config, device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def autocast_dtype(device: torch.device) -> torch.dtype:
    """What autocast multiplies in, float32 where it is off."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.float32


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    # CUDA copies while Python runs on; Apple's mps would read what may be freed by then.
    return tensor.to(device, non_blocking=device.type == "cuda")


def precise(device: torch.device) -> torch.dtype:
    """The type of sums on a device: float64, which Apple's mps lacks."""
    return torch.float32 if device.type == "mps" else torch.float64


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step: returning it to the system takes a CPU a third
    of a step.
    """
    with contextlib.suppress(OSError, AttributeError):  # Windows, macOS
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: no separate maps below so many bytes
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# -------------------------------------------------------------------------------------------------
# Processes


def end_with_parent() -> None:
    """The initializer of a pool: its processes end with the one that made them, however it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def wait():
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Meeting(NamedTuple):
    """The processes of a run before they are a group; afterwards rank() and world_size() say it."""

    rank: int
    world_size: int
    store: dist.PrefixStore  # of this start; torchrun keeps the job's own across restarts


def meet_processes() -> Meeting:
    """Meet the other processes where torchrun, or a scheduler that sets the same variables, started
    this one; UserError where variables are missing or some do not come in time.
    """
    names = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    given = {name: os.environ.get(name, "") for name in names}
    missing = []
    for name, value in given.items():
        is_proper = value != "" if name == "MASTER_ADDR" else value.isdecimal()
        if not is_proper:
            missing.append(name)

    size = given["WORLD_SIZE"]
    if missing and size in ("", "1"):  # some schedulers set it, and nothing else, for every job
        return Meeting(0, 1, own_part(dist.HashStore(), 0, 1))
    if missing:
        raise UserError(f"WORLD_SIZE={size} asks for several processes, which cannot meet without "
                        f"a proper {' and '.join(missing)}: start them with torchrun, or unset "
                        f"WORLD_SIZE to run one alone")
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
        return Meeting(rank, world_size, own_part(store, rank, world_size))
    except dist.DistError as error:
        place = f"{given['MASTER_ADDR']}:{given['MASTER_PORT']}"
        raise UserError(f"timed out: not all of WORLD_SIZE={size} processes came to {place} within "
                        f"{START_TIMEOUT} ({str(error)[:300]})") from None


def own_part(store: dist.Store, rank: int, world_size: int) -> dist.PrefixStore:
    """The part of a store that belongs to this start of the processes, on which they agree here.

    torchrun --max_restarts gives new processes the store of the dead ones, in which they would find
    the addresses of the dead and wait for ever. Each process counts its own starts in it, as
    torchrun's count differs between nodes. Rank 0's count names the part; it tells the others,
    under their counts, until all have read it: DistError if they have not within START_TIMEOUT.
    """
    start = store.add(f"starts of {rank}", 1)
    if rank > 0:
        start = int(store.get(f"to {rank} at its start {start}"))
        store.add(f"heard of {start}", 1)
        return dist.PrefixStore(f"start {start}", store)

    deadline = time.monotonic() + START_TIMEOUT.seconds
    while True:
        heard = store.add(f"heard of {start}", 0)
        if heard >= world_size - 1:  # one that died meanwhile counts twice
            return dist.PrefixStore(f"start {start}", store)
        if time.monotonic() > deadline:
            raise dist.DistError(f"only {heard + 1} came")
        for other in range(1, world_size):
            other_start = store.add(f"starts of {other}", 0)
            store.set(f"to {other} at its start {other_start}", str(start))
        time.sleep(0.05)


def resumes(path: Path, told: bool, meeting: Meeting) -> bool:
    """Whether a run resumes from the checkpoint at `path`, by rank 0's answer: told to by --resume,
    or restarted within the job that began it. UserError where the checkpoint is another job's.

    torchrun --max_restarts repeats the command as it was given, even a refused one, and its count
    of restarts differs between nodes. So the job's store records which run the job has begun.
    """
    store = meeting.store
    if meeting.rank == 0:
        job = store.underlying_store
        own_run = f"run in {path!r}"
        is_there = path.exists()
        if told or not is_there:
            job.set(own_run, "")
        if not job.check([own_run]):
            store.set("course", "refuse")
        elif told or is_there:
            store.set("course", "resume")
        else:
            store.set("course", "begin")
    course = store.get("course")
    if course == b"refuse":
        raise UserError(f"{path} exists: continue with --resume, or choose another --model_dir")
    return course == b"resume"


def init_distributed(device: torch.device, meeting: Meeting) -> None:
    """Form the process group of several processes."""
    if meeting.world_size > 1:
        # gloo for tensors on the CPU: agreeing on something then does not synchronise a GPU.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, **meeting._asdict())


def end_distributed() -> None:
    """End the process group, if there is one.

    Its object stays. Where DistributedDataParallel's was the last reference to it, freeing that
    waits for gloo's threads, and on PyTorch 2.11 one of these may wait for Python's lock: for ever.
    """
    if dist.is_initialized():
        ended_groups.append(dist.group.WORLD)
        dist.destroy_process_group()


ended_groups = []


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first_process() -> bool:
    return rank() == 0


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def largest_of_processes(number: int) -> int:
    if not dist.is_initialized():
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def from_first_process(value: Any) -> Any:
    """Rank 0's `value`, in every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather_lists(items: list) -> list:
    """The lists of all processes, joined in the order of their ranks."""
    if not dist.is_initialized():
        return items
    lists = [None] * world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]
