"""The ground of every script: errors a user can mend, files written whole or not at all, the device, processes.

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
import zipfile
from pathlib import Path
from typing import NamedTuple


def leave_quietly(kind, error, trace, otherwise=sys.excepthook):
    """Ctrl-C, which may come while packages are imported, needs no traceback; whatever else is shown as before."""
    if not issubclass(kind, KeyboardInterrupt):
        otherwise(kind, error, trace)


sys.excepthook = leave_quietly
if os.path.expanduser("~") == "~":  # a user whom the system does not know; nltk asks for a home
    os.environ["HOME"] = tempfile.gettempdir()
if not (sys.stderr and sys.stderr.isatty()):  # in a file every refreshment of a progress bar is one more line
    os.environ.setdefault("TQDM_MININTERVAL", "60")
    os.environ.setdefault("TQDM_MAXINTERVAL", "60")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from filelock import FileLock, Timeout  # noqa: E402

START_TIMEOUT = datetime.timedelta(minutes=10)  # for all processes of a run to come


class UserError(Exception):
    """Something the user can mend: shown as one line that names the file and the way out; exit code 2."""


def run(main):
    """Run a script's main(); a user's mistake, or a file that the system refuses, becomes one line and exit code 2."""
    with contextlib.suppress(AttributeError):  # a stream of another kind, such as a notebook's
        sys.stdout.reconfigure(errors="backslashreplace")  # names and words that the terminal's encoding lacks
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
        print("error: out of memory: give a smaller --batch_size or --beam_size, and train.py --resume where there is "
              "a checkpoint;", printable(error)[:300], file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {printable(error.filename)}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def discard_output(*streams):
    """Let what is written to these file descriptors go nowhere, as nobody is there to read it."""
    with open(os.devnull, "w") as nowhere:
        for stream in streams:
            os.dup2(nowhere.fileno(), stream)


def printable(text):
    """Text from outside as one line that a terminal shows, and takes no order from. Returns: str."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", str(text))


def subcommand(script, **commands):
    """Call what the first argument names with the rest of the command line. Raises: UserError: it names none."""
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name not in commands:
        raise UserError(f"{script} takes one of {', '.join(commands)}, then its flags")
    commands[name](sys.argv[2:])


# ---------------------------------------------------------------------------------------------------------------------
# The disk


@contextlib.contextmanager
def replacing(path, size=0):
    """The one way to write a file whole or not at all: a temporary name that becomes `path` once all is on the disk.

    Args:
        path (str or Path). size (int): bytes that the file will take, for messages.
    Yields:
        Path: where to write, in the same folder.
    Raises:
        UserError: the disk is full or not writable; what was at `path` is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    needs = f"; it takes {size / 2**20:,.1f} MiB" if size else ""
    try:
        with writing(path, f"{needs}. What was there before is untouched: mend that, or name another folder"):
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
def writing(path, advice):
    """Turn what a disk refuses into a UserError. Args: path (Path): what is written. advice (str): the way out."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter is what h5py makes of a disk that is full
        raise UserError(f"{path} could not be written ({reason_of(error)}){advice}") from None


@contextlib.contextmanager
def alone(path, flag):
    """Keep what lies beside a lock file to this process, until the block ends or the process dies, however it does.

    Args: path (Path): of the lock file; its folder is made. flag (str): that names another folder, for the message.
    Raises: UserError: another process holds it; says which.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        holder = path.read_text(encoding="utf-8", errors="replace") or "another process"
        raise UserError(f"{path.parent} is in use by {holder}: wait for it to end, or name another {flag}") from None
    try:
        with contextlib.suppress(OSError):  # Windows lets nobody write to a locked file
            path.write_text(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}",
                            encoding="utf-8")
        yield
    finally:
        lock.release()


def reason_of(error):
    """What went wrong with a file, in one line; HDF5 tells a full disk in its message only."""
    if getattr(error, "errno", None) == errno.ENOSPC or f"errno = {errno.ENOSPC}" in str(error):
        return "the disk is full"
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def write_text(path, text):
    """Write a small file whole or not at all. Raises: UserError where it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def need_space(folder, size, purpose):
    """Raise UserError unless the disk of `folder` has `size` bytes free, and a twentieth more."""
    free = shutil.disk_usage(folder).free
    if free < 1.05 * size:
        raise UserError(f"{folder} needs {1.05 * size / 2**30:.2f} GiB {purpose}, but its disk has "
                        f"{free / 2**30:.2f} GiB free: free some, or point --data_dir at another disk")


def weights_digest(module):
    """sha256 of a module's parameters and buffers, hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def check_members(archive, path):
    """Raise ValueError if reading a file of torch.save would take more memory or time than its size suggests.

    Args: archive (ZipFile). path (Path): of the file.
    """
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("compressed")  # never by torch.save
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its parts overlap")


def is_path(text):
    """Whether the system can be asked for a file of this name."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# The device


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


def precision(config, device):
    """The type that training multiplies in, see `precisions`; on a GPU without bfloat16 float16 where it is `auto`.

    Args:
        config (Config). device (torch.device).
    Returns:
        torch.dtype: float32, bfloat16 or float16.
    """
    has = precisions(device)
    if config.precision == "auto":
        return has[-1] if device.type == "cuda" else torch.float32
    wanted = getattr(torch, config.precision)
    return wanted if wanted in has else torch.float32


def precisions(device):
    """What a device multiplies in natively, not imitated, which is far slower. Returns: list of torch.dtype, the best
    one for training last."""
    if device.type == "cuda":
        has_float16 = torch.cuda.get_device_capability(device) >= (7, 0)  # before that no faster than float32
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return [torch.float32, *[torch.float16] * has_float16, *[torch.bfloat16] * has_bfloat16]
    # Not float16: on CPUs that claim to have it training took seconds per picture.
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    has_bfloat16 = any(map(has.get, ("avx512_bf16", "amx_bf16", "bf16")))
    return [torch.float32, torch.bfloat16] if has_bfloat16 else [torch.float32]


def autocast_dtype(device):
    """What autocast multiplies in, float32 where it is off. Args: device (torch.device). Returns: torch.dtype."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


def to_device(tensor, device):
    """A tensor on a device. CUDA copies while Python runs on; Apple's mps would read what may be freed by then."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def precise(device):
    """The dtype of sums on a device: float64, which Apple's mps lacks."""
    return torch.float32 if device.type == "mps" else torch.float64


def keep_freed_memory():
    """Let glibc keep freed memory for the next step: returning it to the system takes a CPU a third of a step."""
    with contextlib.suppress(OSError, AttributeError):  # Windows, macOS
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: no separate maps below so many bytes
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def end_with_parent():
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
    store: dist.PrefixStore  # of this start, within the job's own, which torchrun keeps across restarts


def meet_processes() -> Meeting:
    """Meet the other processes where torchrun, or a scheduler that sets the same variables, started this one.

    Raises:
        UserError: the environment variables are incomplete; some processes did not come in time.
    """
    given = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    missing = [name for name, value in given.items() if not (value if name == "MASTER_ADDR" else value.isdecimal())]
    if missing and given["WORLD_SIZE"] in ("", "1"):  # some schedulers set it, and nothing else, for every job
        return Meeting(0, 1, own_part(dist.HashStore(), 0, 1))
    if missing:
        raise UserError(f"WORLD_SIZE={given['WORLD_SIZE']} asks for several processes, which cannot meet without a "
                        f"proper {' and '.join(missing)}: start them with torchrun, or unset WORLD_SIZE to run one "
                        f"alone")
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
        return Meeting(rank, world_size, own_part(store, rank, world_size))
    except dist.DistError as error:
        raise UserError(f"timed out: not all of WORLD_SIZE={given['WORLD_SIZE']} processes came to "
                        f"{given['MASTER_ADDR']}:{given['MASTER_PORT']} within {START_TIMEOUT} ({str(error)[:300]})"
                        ) from None


def own_part(store, rank, world_size):
    """The part of a store that belongs to this start of the processes; all of them agree on it here.

    torchrun --max_restarts gives new processes the store of the dead ones, in which they would find the addresses of
    the dead and wait for ever. Each process counts its own starts in it (torchrun's own count differs between nodes).
    Rank 0's count names the part; it tells the others, under their counts, until all have read it.

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


def resumes(path: Path, told: bool, meeting: Meeting) -> bool:
    """Whether a run resumes from the checkpoint at `path`: told to, or restarted within the job that began it.

    torchrun --max_restarts repeats the command as it was given, even a refused one, and its count of restarts is not
    raised on a node whose own process survived. So the job's store records which run the job has begun.

    All processes get rank 0's answer.

    Args:
        told: --resume was given.
    Raises:
        UserError: there is a checkpoint that this job has not written.
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


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first_process() -> bool:
    return rank() == 0


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
    """Rank 0's `value`, in every process."""
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
