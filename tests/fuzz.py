"""Damaged and hostile files into the four scripts: each must be used rightly or refused in one line, at once.

    python tests/fuzz.py                                  # 400 files; `make fuzz` tries 20,000
    python tests/fuzz.py --kinds archive,checkpoint
    python tests/fuzz.py --seed 3 --only 1234             # one again, of the same --kinds; its folder is kept

Each file goes into the script's own main, in a process forked from one that has imported everything, with a small
stand-in for torchvision's ResNet. A finding is: more than CPU_SECONDS; death by a signal; a traceback; an exit code
other than 0 or 2, or 2 without one line `error: ...` that names a file or a flag; anything changed outside the folders
that the script was given; a temporary or a broken file left; a file that is damaged, and used all the same.
"""
import argparse
import collections
import contextlib
import copy
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

import h5py  # noqa: E402
import jieba  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from PIL import Image  # noqa: E402

import config  # noqa: E402
import datasets  # noqa: E402
import demo  # noqa: E402
import eval  # noqa: E402
import pre_process  # noqa: E402
import train  # noqa: E402
import utils  # noqa: E402

CPU_SECONDS, WAITING_SECONDS = 10, 60  # of computing; of waiting, which only a process that is stuck does so long
MEMORY = 2 * 2**30  # bytes beyond what the warm process has
SCRIPTS = {"pre_process.py": pre_process, "train.py": train, "eval.py": eval, "demo.py": demo}
TRAIN = pre_process.SPLITS["train"]
SETTINGS = dict(image_size=32, min_word_freq=1, max_len=6, encoder="resnet18", encoder_weights="none",
                encoded_image_size=2, emb_dim=6, attention_dim=5, decoder_dim=7, batch_size=3, workers=0, device="cpu")
INTEGERS = (0, 1, -1, 2**7, 2**8, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
STRINGS = ("", ".", "..", "/", "a" * 5000, "../home/file", "/etc/passwd", "a/b", "a\0b", "\ud800", "\x1b[2J", "a\nb",
           "<script>", "%s%n", "非常", "\u202e", "nan", "1", "-", "~", "CON")
ODD = (None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -2**63, 10**30, 1e308, float("nan"), float("inf"), 0.5, [], {},
       [[]], {"a": 1}, [1, 2, 3], *STRINGS)


class SmallResNet(torchvision.models.ResNet):
    """torchvision's, with a block a layer and a thirty-second of the channels."""

    def __init__(self):
        super().__init__(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
        self.fc = torch.nn.Linear(16, 10)

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        return super()._make_layer(block, planes // 32, blocks, stride, dilate)


# ---------------------------------------------------------------------------------------------------------------------
# Running a script


def call(script, flags, folder):
    """Run a script's main in a forked process, in folder/cwd. Returns: exit status as of os.wait, CPU seconds."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.setsid()
            for number, name in ((0, os.devnull), (1, folder / "stdout"), (2, folder / "stderr")):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
            os.chdir(folder / "cwd")
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY,) * 2)
            os.environ["PATH"] = ""  # neither git nor Java: a quarter of a second saved
            sys.argv = [script, *map(str, flags)]
            config.run(SCRIPTS[script].main)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    waited = 0  # counted, not timed: somebody may have stopped us both
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.005)
        waited += 0.005
        if waited > WAITING_SECONDS:
            os.killpg(pid, signal.SIGKILL)
            waited = 0
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # workers that outlived it
    return status, usage.ru_utime + usage.ru_stime


def snapshot(folder):
    """Everything below a folder. Returns: dict, path -> bytes, a link's target, or None for a folder."""
    return {path: os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
            for path in sorted(Path(folder).rglob("*"))}


def verdict(status, cpu, folder, outside, target, given, must):
    """What is wrong with a run. Returns: str, "" where nothing is."""
    output, errors = ((folder / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr"))
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return f"hangs (signal {number})" if number in (signal.SIGXCPU, signal.SIGKILL) else f"dies by signal {number}"
    code = os.WEXITSTATUS(status)
    lines = [line for line in errors.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    if cpu > CPU_SECONDS or "worker process was killed" in errors:
        return f"hangs ({cpu:.1f} s)"
    if "Traceback" in errors + output:
        return "traceback"
    if code not in (0, 2) or (code == 2) != (len(lines) == 1):
        return f"exit code {code}, {len(lines)} error lines"
    if code and (errors.splitlines()[-1] != lines[0]
                 or not any(part in lines[0] for part in ("/", "--", "named above"))):
        return "the error is not one line that names a file or a flag"
    if snapshot(folder / "home") != outside or any((folder / "cwd").iterdir()):
        return "changed something outside its folders"
    for path in folder.rglob("*"):
        if path.name.endswith(".tmp") and not path.name.endswith("_features.h5.tmp"):
            return f"left {path.name}"
        if path.is_file() and "home" not in path.parts and (path != target or path.read_bytes() != given) and \
                broken(path):
            return f"left a broken {path.name}"
    if code == 0 and must:
        return must() or ""
    return ""


def broken(path):
    """Whether a file of ours is not whole; nothing of C reads it."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".h5":
            content = path.read_bytes()
            return hasattr(datasets, "seal") and content[24:56] != datasets.digest_around(path, content[:24])
        elif path.name.endswith(".pth.tar") and zipfile.is_zipfile(path):
            return zipfile.ZipFile(path).testzip() is not None
    except Exception:
        return True
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Damage to bytes


def flip(rng, data, at):
    data[at] ^= 1 << rng.randrange(8)


def overwrite(rng, data, at):
    data[at:at + rng.randint(1, 16)] = rng.randbytes(rng.randint(1, 16))


def truncate(rng, data, at):
    del data[at:]


def drop(rng, data, at):
    del data[at:at + rng.randint(1, 600)]


def insert(rng, data, at):
    data[at:at] = rng.choice((rng.randbytes(rng.randint(1, 64)), bytes(rng.randint(1, 600)),
                              bytes(data[at:at + rng.randint(1, 600)])))


def swap(rng, data, at):
    other, size = rng.randrange(len(data)), rng.randint(1, 64)
    one, two = bytes(data[at:at + size]), bytes(data[other:other + size])
    if len(one) == len(two) == size and abs(at - other) >= size:
        data[at:at + size], data[other:other + size] = two, one


def zeros(rng, data, at):
    size = min(rng.choice((4, 16, 64, 512, 4096)), len(data) - at)
    data[at:at + size] = bytes(size)


def integer(rng, data, at):
    size, order = rng.choice((2, 4, 8)), rng.choice(("little", "big"))
    value = (rng.choice(INTEGERS) % 2 ** (8 * size)).to_bytes(size, order)
    if at + size <= len(data):
        data[at:at + size] = value


DAMAGES = (flip, flip, overwrite, truncate, drop, insert, swap, zeros, integer, integer)


def damage(rng, content, ranges=()):
    """Damage bytes, one to three times. Args: ranges: (begin, end) of what most should hit. Returns: bytes, str"""
    data, notes = bytearray(content), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not data:
            break
        begin, end = rng.choice(ranges) if ranges and rng.random() < 0.8 else (0, len(data))
        at = min(rng.randrange(begin, max(end, begin + 1)), len(data) - 1)
        how = rng.choice(DAMAGES)
        how(rng, data, at)
        notes.append(f"{how.__name__} at {at}")
    return bytes(data), ", ".join(notes)


# ---------------------------------------------------------------------------------------------------------------------
# Damage to JSON


def nodes(value, path=()):
    """Every place in a nested value. Yields: tuple of keys."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from nodes(child, (*path, key))


def spoil(rng, value, odd=ODD):
    """Change one place of a nested value. Returns: the value, str."""
    value, places = copy.deepcopy(value), list(nodes(value))
    shallow = [place for place in places if len(place) < 2]
    place = rng.choice(rng.choice((places, shallow)))
    if not place:
        value = rng.choice(odd)
        return value, f"all -> {value!r:.60}"
    parent = value
    for key in place[:-1]:
        parent = parent[key]
    how = rng.choice(("odd", "odd", "odd", "drop", "double", "key"))
    if how == "odd":
        parent[place[-1]] = rng.choice(odd)
        how = f"-> {parent[place[-1]]!r:.60}"
    elif how == "drop":
        del parent[place[-1]]
    elif isinstance(parent, list):
        parent.append(copy.deepcopy(parent[place[-1]]))
    else:
        parent[rng.choice(STRINGS) if how == "key" else f"{place[-1]} "] = parent.pop(place[-1])
    return value, f"{'/'.join(map(str, place)):.80} {how}"


def spoiled_json(rng, text):
    """A JSON text, with its bytes damaged, its values changed, or what only the text can have. Returns: bytes, str"""
    how = rng.choice(("bytes", "value", "value", "value", "text"))
    if how == "bytes":
        return damage(rng, text.encode())
    if how == "value":
        value = json.loads(text)
        note = []
        for _ in range(rng.choice((1, 1, 2))):
            value, one = spoil(rng, value)
            note.append(one)
        raw = json.dumps(value, ensure_ascii=rng.random() < 0.5)
        return raw.encode("utf-8", "surrogatepass"), "; ".join(note)
    place = rng.choice([i for i, sign in enumerate(text) if sign in "[{:,"]) + 1
    thing = rng.choice(("[" * 100_000, '{"a":' * 100_000, "9" * 5000 + ",", "1e999,", "NaN", "-Infinity", "//", ",",
                        '"\\ud800",', '"\\u0000"', "\ufeff", "0x1", "'a'", "\0", '"' + "a" * 10**6 + '",', "[[]],"))
    return (text[:place] + thing + text[place:]).encode(), f"{thing[:20]!r} at {place}"


# ---------------------------------------------------------------------------------------------------------------------
# The kinds of input. Each makes its folder and returns: script, flags, the damaged file, what was done to it, and None
# or a function that says what is wrong although the exit code is 0.


class Base:
    """The whole files that are damaged, made once by the scripts themselves."""

    def __init__(self, folder):
        self.folder = folder
        from data import sample
        sys.argv = ["sample.py", "--out", str(folder / "raw"), "--train", "6", "--valid", "2", "--test", "2", "--size",
                    "40"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            sample.main()
        for path in (folder / "raw").glob("*test*"):
            path.unlink()
        for name in ("cwd", "ready", "models", "logs"):
            (folder / name).mkdir()
        self.do("pre_process.py", "--data_dir", folder / "raw")
        for path in (folder / "raw").glob("*.zip"):
            path.unlink()
        self.tree = {path.relative_to(folder / "raw" / TRAIN[0]): content
                     for path, content in snapshot(folder / "raw" / TRAIN[0]).items() if content is not None}
        self.annotations = (folder / "raw" / TRAIN[0] / TRAIN[2]).read_text(encoding="utf-8")
        for path in (folder / "raw").iterdir():
            if path.is_file():
                shutil.copy(path, folder / "ready")
        flags = ["--data_dir", folder / "ready", "--model_dir", folder / "models", "--log_dir", folder / "logs",
                 "--cache_features", "true"]
        self.do("train.py", *flags, "--epochs", 1)
        self.do("train.py", *flags, "--epochs", 2, "--resume")
        self.checkpoint = torch.load(folder / "models/checkpoint.pth.tar", weights_only=True)
        from test_original import save, their_checkpoint
        theirs, _ = their_checkpoint()
        for form in ("legacy", "zip"):
            save(theirs, folder / f"{form}.pth.tar", form)
        words = ["", *(chr(ord("一") + number) for number in range(55)), "<unk>", "<start>", "<end>"]
        self.their_words = json.dumps({word: i for i, word in enumerate(words, 1)} | {"<pad>": 0})

    def do(self, script, *flags):
        for name in ("stdout", "stderr"):
            (self.folder / name).unlink(missing_ok=True)
        status, _ = call(script, [*settings(), *flags], self.folder)
        assert status == 0, (self.folder / "stderr").read_text()

    def ready(self, folder, *names):
        """Copy preprocessed data and the model into a case's folder."""
        for name in ("train.h5", "valid.h5", "WORDMAP.json", *names):
            shutil.copy(self.folder / "ready" / name, folder / "data")

    def raw(self, folder, *, done=False):
        """Copy the published files, and perhaps what was made of them, into a case's folder."""
        shutil.rmtree(folder / "data")
        shutil.copytree(self.folder / "raw", folder / "data",
                        ignore=None if done else shutil.ignore_patterns("*.h5", "WORDMAP.json", "pre_process.json"))


def settings():
    return [text for name, value in SETTINGS.items() for text in (f"--{name}", value)]


def in_folders(folder):
    return ["--data_dir", folder / "data", "--model_dir", folder / "models", "--log_dir", folder / "logs"]


def put(path, content):
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return path


def evaluation(folder, checkpoint, *more):
    return "eval.py", ["--checkpoint", checkpoint, "--data_dir", folder / "data", "--beam_size", 1, "--results",
                       folder / "out/results.json", *more]


def picture(rng, base, folder):
    """A picture of the training set, or one for demo.py."""
    form = rng.choice(("JPEG", "JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"))
    mode = rng.choice(("RGB", "RGB", "L", "RGBA", "P", "CMYK", "I;16", "1"))
    content = io.BytesIO()
    made = Image.effect_mandelbrot((50, 40), (-2, -1, 1, 1), 30).convert(mode if mode != "I;16" else "I;16")
    try:
        made.save(content, form, exif=bytes.fromhex("45786966000049492a000800000001001201030001000000060000000000"))
    except (OSError, ValueError, KeyError):
        form, content = "PNG", io.BytesIO()
        made.convert("RGB").save(content, form)
    whole = content.getvalue()
    content, note = damage(rng, whole, [(0, min(len(whole), 300))])
    if rng.random() < 0.5:
        base.raw(folder)
        target = put(next((folder / "data" / TRAIN[0] / TRAIN[1]).iterdir()), content)
        return "pre_process.py", [*settings(), *in_folders(folder), "--max_bad_images", rng.choice((0, 1))], target, \
            f"{form} {mode}: {note}", None
    target = put(folder / "out" / f"picture.{form.lower()}", content)
    return "demo.py", ["--checkpoint", base.folder / "models/BEST_checkpoint.pth.tar", "--image", target, "--beam_size",
                       2, "--out", folder / "out/figures", "--html", folder / "out/page.html"], target, \
        f"{form} {mode}: {note}", None


def annotations(rng, base, folder):
    base.raw(folder)
    target = folder / "data" / TRAIN[0] / TRAIN[2]
    content, note = spoiled_json(rng, target.read_text(encoding="utf-8"))
    if rng.random() < 0.2:  # COCO's form
        entries = json.loads(base.annotations)
        coco = dict(images=[dict(id=i, file_name=entry["image_id"]) for i, entry in enumerate(entries)],
                    annotations=[dict(image_id=i, caption=text) for i, entry in enumerate(entries)
                                 for text in entry["caption"]])
        content, note = spoiled_json(rng, json.dumps(coco))
        note = f"COCO: {note}"
    put(target, content)
    return "pre_process.py", [*settings(), *in_folders(folder)], target, note, None


NAMES = ("../home/file", "../../home/file", "/tmp/fuzz_must_not_be", "a/../../../home/file", "..", ".", "/", "a/b/c",
         "C:\\x", "..\\..\\home\\file", "a\0b", "a\nb", "a" * 300, "a/" * 600 + "b", "\x1b[2J", "CON", " ",
         f"{TRAIN[0]}/../x", TRAIN[2], f"{TRAIN[2]}/x", f"{TRAIN[0]}/{TRAIN[1]}", "", "__MACOSX/../../home/file", "-")


def archive(rng, base, folder):
    """The training archive: its bytes damaged, or made by somebody who means ill."""
    base.raw(folder)
    shutil.rmtree(folder / "data" / TRAIN[0])
    target, notes = folder / "data" / f"{TRAIN[0]}.zip", []
    content, members = io.BytesIO(), [(f"{TRAIN[0]}/{name}", data) for name, data in base.tree.items()]
    hostile = rng.random() < 0.6
    with zipfile.ZipFile(content, "w") as file:
        odd = rng.randrange(len(members)) if hostile else -1
        for number, (name, data) in enumerate(members):
            info = zipfile.ZipInfo(name)
            info.compress_type = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2,
                                             zipfile.ZIP_LZMA))
            if number == odd:
                how = rng.choice(("name", "name", "name", "link", "kind", "twice", "bomb", "more"))
                notes.append(f"{how} of {name}")
                if how == "name":
                    info.filename = rng.choice(NAMES) or "/"
                    notes.append(f"-> {info.filename!r:.60}")
                elif how == "link":
                    info.external_attr, data = (stat.S_IFLNK | 0o777) << 16, b"../../../home/file"
                elif how == "kind":
                    info.external_attr = rng.choice((stat.S_IFIFO, stat.S_IFBLK, stat.S_IFDIR, 0o4777, 0)) << 16 | 0x10
                elif how == "twice":
                    file.writestr(name, b"first")
                elif how == "bomb":
                    data = b"[%s]" % (b" " * rng.choice((10**6, 3 * 10**7)))  # JSON, should it be the annotations
                    info.compress_type = zipfile.ZIP_DEFLATED
                else:
                    file.writestr(rng.choice(NAMES) or "/", b"more")
            file.writestr(info, data)
    whole = bytearray(content.getvalue())
    if hostile and rng.random() < 0.5:  # what the headers say: flags, method, times, CRC, sizes, lengths of names
        starts = [i for i in range(len(whole)) if whole[i:i + 4] in (b"PK\1\2", b"PK\3\4", b"PK\5\6")]
        for _ in range(rng.choice((1, 1, 2))):
            at, size = rng.choice(starts) + rng.randrange(4, 46), rng.choice((2, 4))
            whole[at:at + size] = (rng.choice(INTEGERS) % 2 ** (8 * size)).to_bytes(size, "little")
            notes.append(f"header at {at}")
    elif not hostile:
        directory = whole.rindex(b"PK\5\6")
        whole, note = damage(rng, whole, [(0, 300), (whole.index(b"PK\1\2"), directory), (directory, len(whole))])
        notes.append(note)
    put(target, whole)

    def must():
        found = {path.relative_to(folder / "data" / TRAIN[0]): content
                 for path, content in snapshot(folder / "data" / TRAIN[0]).items() if content is not None}
        if any(path.is_symlink() for path in (folder / "data").rglob("*")):
            return "extracted a link"
        if not hostile and {**base.tree, **found} != found:
            return "extracted a damaged archive"

    return "pre_process.py", [*settings(), *in_folders(folder), "--max_bad_images", 1], target, "; ".join(notes), must


def reader(rng, base, folder):
    """A script that reads preprocessed data, and its flags."""
    script = rng.choice(("eval.py", "eval.py", "train.py"))
    if script == "eval.py":
        return evaluation(folder, base.folder / "models/BEST_checkpoint.pth.tar")
    return script, [*settings(), *in_folders(folder), "--epochs", 1]


def same_around(path, whole, begin, end):
    """A function that says whether a file has other bytes than `whole`, those between begin and end aside."""
    def must():
        one, other = bytearray(path.read_bytes()), bytearray(whole)
        for content in (one, other):
            content[begin:end] = b""
            content[USER + 20:USER + 24] = b""  # HDF5's mark of a file that is open
            content[56 if USER else 0:USER] = b""
        if one != other:
            return f"used a damaged {path.name}"
    return must


USER = getattr(datasets, "USER_BLOCK", 0)


def rewritten(rng, path):
    """Change an HDF5 file as one that HDF5 itself finds in order, and seal it. Returns: str."""
    other = path.parent.parent / "home/other.h5"
    with h5py.File(other, "w") as file:
        file["x"] = np.zeros(3)
    with h5py.File(path, "r+") as file:
        name, how = rng.choice(list(file)), rng.choice(("attribute", "attribute", "delete", "data", "link", "values"))
        note = f"{how} {name}"
        if how == "attribute":
            key = rng.choice([*file.attrs, "new"])
            value = rng.choice((0, -1, 2**31, 2**63 - 1, 1.5, float("nan"), "", "text", "é" * 100, b"\xff\xfe", [1, 2],
                                np.zeros((3, 3)), np.array(["a", "b"], object), h5py.Empty("f"), file.ref, True,
                                np.void(b"\0\1"), np.float64("inf"), ["256"], "256 "))
            note = f"attribute {key} -> {value!r:.50}"
            try:
                file.attrs[key] = value
            except (TypeError, ValueError, AttributeError):
                del file.attrs[key]
        elif how == "delete":
            del file[name]
        elif how == "link":
            del file[name]
            kind = rng.choice(("soft", "external", "group", "type"))
            file[name] = {"soft": h5py.SoftLink("/elsewhere"), "external": h5py.ExternalLink(str(other), "x"),
                          "type": np.dtype("f4")}.get(kind) or file.create_group("other")
            note += f" {kind}"
        elif how == "data":
            old = file[name]
            dtype = rng.choice((old.dtype, "f2", "i8", "u1", "O", "S5", [("a", "i4")], "bool", "c8"))
            shape = rng.choice((old.shape, (), (0,), old.shape[::-1], (2,) * old.ndim, (*old.shape, 1), (1,) * 32,
                                (old.shape[0] + 1, *old.shape[1:])))
            more = rng.choice(({}, {}, dict(chunks=True), dict(compression="gzip"), dict(maxshape=(None,) * len(shape)),
                               dict(external=[(str(other), 0, h5py.h5f.UNLIMITED)]), dict(fillvalue=7)))
            del file[name]
            note += f" {dtype} {shape} {list(more)}"
            try:
                file.create_dataset(name, shape, h5py.string_dtype() if dtype == "O" else dtype, **more)
            except (TypeError, ValueError, AttributeError):
                note += " (none)"
        else:
            data = file[name]
            place = tuple(rng.randrange(size) for size in data.shape)
            value = rng.choice(("", "a" * 10**5, "\ud800".encode("utf-8", "surrogatepass"), b"\xff", "../home/file",
                                "\x1b[2J", "/etc", "a\nb") if data.dtype == object else INTEGERS)
            note += f" {place} -> {value!r:.40}"
            if data.dtype == object:
                data[place] = value
            else:
                data[place] = np.array([value % 2**63], np.int64).astype(data.dtype)[0]
    if hasattr(datasets, "seal"):
        datasets.seal(path, *np.fromfile(path, "<u8", 3).tolist())
    return note


def split(rng, base, folder):
    """{split}.h5."""
    name = rng.choice(("valid.h5", "valid.h5", "train.h5"))
    whole = (base.folder / "ready" / name).read_bytes()
    begin = pre_process.PIXELS_BEGIN
    end = begin + (2 if name == "valid.h5" else 6) * 32 * 32 * 3
    if rng.random() < 0.3:
        base.raw(folder, done=True)
        script, flags = "pre_process.py", [*settings(), *in_folders(folder)]
    else:
        base.ready(folder)
        script, flags = reader(rng, base, folder) if name == "valid.h5" else (
            "train.py", [*settings(), *in_folders(folder), "--epochs", 1])
    target = folder / "data" / name
    if rng.random() < 0.4:
        return script, flags, target, f"{name}: {rewritten(rng, target)}", None
    content, note = damage(rng, whole, [(0, 1200), (0, begin), (end, len(whole))])
    put(target, content)
    return script, flags, target, f"{name}: {note}", same_around(target, whole, begin, end)


def features(rng, base, folder):
    """{split}_features.h5, whole or as a killed run left it."""
    name = rng.choice(("train", "valid"))
    base.ready(folder, "train_features.h5", "valid_features.h5")
    target = folder / "data" / f"{name}_features.h5"
    whole = target.read_bytes()
    with h5py.File(target) as file:
        begin = file["features"].id.get_offset()
        end = begin + file["features"].id.get_storage_size()
    if rng.random() < 0.3:
        note, must = rewritten(rng, target), None
    else:
        content, note = damage(rng, whole, [(0, len(whole)), (0, begin)])
        put(target, content)
        must = same_around(target, whole, begin, end)
    if rng.random() < 0.4:
        os.rename(target, f"{target}.tmp")
        note += ", unfinished"
    return "train.py", [*settings(), *in_folders(folder), "--epochs", 1, "--cache_features", "true"], target, \
        f"{target.name}: {note}", must


def word_map(rng, base, folder):
    """WORDMAP.json, or that of --word_map."""
    if rng.random() < 0.4:
        base.ready(folder)
        content, note = spoiled_json(rng, base.their_words)
        target = put(folder / "out/words.json", content)
        return *evaluation(folder, base.folder / "zip.pth.tar", "--word_map", target, "--image_size", 32,
                           "--max_len", 6), target, f"theirs: {note}", None
    base.raw(folder, done=True)
    target = folder / "data/WORDMAP.json"
    content, note = spoiled_json(rng, target.read_text(encoding="utf-8"))
    put(target, content)
    script, flags = rng.choice((reader(rng, base, folder),
                                ("pre_process.py", [*settings(), *in_folders(folder)])))
    if script == "pre_process.py" and rng.random() < 0.5:
        (folder / "data/valid.h5").unlink()
    return script, flags, target, note, None


def report(rng, base, folder):
    """Small files that scripts leave for each other: pre_process.json, scenes.json, log.jsonl."""
    name = rng.choice(("pre_process.json", "scenes.json", "log.jsonl"))
    if name == "log.jsonl":
        base.ready(folder)
        copy_model(base, folder)
        target = folder / "logs" / base.checkpoint["run"] / name
        content, note = damage(rng, target.read_bytes())
        put(target, content)
        return "train.py", [*in_folders(folder), "--resume", "--epochs", 3], target, f"{name}: {note}", None
    base.raw(folder, done=True)
    target = folder / "data" / name
    content, note = spoiled_json(rng, target.read_text(encoding="utf-8"))
    put(target, content)
    if name == "scenes.json":
        return *evaluation(folder, base.folder / "models/BEST_checkpoint.pth.tar"), target, f"{name}: {note}", None
    (folder / "data/valid.h5").unlink()
    return "pre_process.py", [*settings(), *in_folders(folder)], target, f"{name}: {note}", None


def copy_model(base, folder):
    shutil.copytree(base.folder / "models", folder / "models", dirs_exist_ok=True)
    shutil.copytree(base.folder / "logs", folder / "logs", dirs_exist_ok=True)


def user_of(rng, base, folder, target):
    """A script that reads a checkpoint, and its flags. Args: target (Path): in folder/models."""
    script = rng.choice(("eval.py", "demo.py", "train.py", "train.py"))
    if script == "train.py":
        return script, [*in_folders(folder), "--resume", "--epochs", 3, *rng.choice(([], ["--fine_tune_encoder",
                                                                                         "true"]))]
    if script == "eval.py":
        return evaluation(folder, target)
    picture = next((base.folder / "raw" / TRAIN[0] / TRAIN[1]).iterdir())
    return script, ["--checkpoint", target, "--image", picture, "--beam_size", 2, "--out", folder / "out"]


def members(content):
    """What torch.save put into a file. Returns: dict, name -> bytes."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return {name: file.read(name) for name in file.namelist()}


def checkpoint(rng, base, folder):
    """Our checkpoint, its bytes damaged."""
    base.ready(folder)
    copy_model(base, folder)
    target = folder / "models/checkpoint.pth.tar"
    whole = target.read_bytes()
    directory = whole.rindex(b"PK\5\6")
    content, note = damage(rng, whole, [(0, len(whole)), (0, 2000), (whole.index(b"PK\1\2"), directory),
                                        (directory, len(whole))])
    put(target, content)

    def must():  # what lies between the members may change
        with contextlib.suppress(Exception):
            if members(content) == members(whole):
                return ""
        return "used a damaged checkpoint"

    return *user_of(rng, base, folder, target), target, note, must


def odd_tensor(rng, tensor):
    """Another tensor in the place of one. Returns: tensor, str."""
    number = torch.zeros((), dtype=tensor.dtype)
    ways = {
        "nan": lambda: torch.full_like(tensor, float("nan")), "inf": lambda: torch.full_like(tensor, float("inf")),
        "huge": lambda: torch.full_like(tensor, 3e38), "shape": lambda: torch.zeros(*tensor.shape, 2),
        "empty": lambda: torch.zeros(0), "scalar": lambda: torch.zeros(()),
        "transposed": lambda: tensor.T.contiguous() if tensor.ndim == 2 else torch.zeros(3),
        "longer": lambda: torch.cat([tensor, tensor]) if tensor.ndim else torch.zeros(2),
        "gigantic": lambda: number.expand(2**40, *tensor.shape[1:]), "expanded": lambda: number.expand(tensor.shape),
        "meta": lambda: torch.empty_like(tensor, device="meta"),
        "gigantic meta": lambda: torch.empty(2**50, 3, device="meta"), "sparse": lambda: tensor.float().to_sparse(),
        "quantized": lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
        "strided": lambda: torch.as_strided(tensor, tensor.shape, [0] * tensor.ndim),
        "grad": lambda: torch.nn.Parameter(tensor.float()), "nested": lambda: torch.nested.nested_tensor([tensor]),
        "negative": lambda: torch._neg_view(tensor),
        **{str(dtype): lambda dtype=dtype: tensor.to(dtype) for dtype in (
            torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.bool, torch.uint8)},
    }
    how = rng.choice(list(ways))
    with contextlib.suppress(Exception):
        return ways[how](), how
    return torch.zeros(7), "seven zeros"


def contents(rng, base, folder):
    """Our checkpoint, whole, with contents that are not what they should be."""
    base.ready(folder)
    copy_model(base, folder)
    state, notes = copy.deepcopy(base.checkpoint), []
    for _ in range(rng.choice((1, 1, 1, 2))):
        how = rng.choice(("tensor", "config", "config", "field", "anywhere", "optimizer", "words"))
        if how == "tensor":
            part = state[rng.choice(("encoder", "decoder"))]
            if not isinstance(part, dict) or not part:
                continue
            name = rng.choice(list(part))
            if rng.random() < 0.2:
                del part[name]
            elif isinstance(part[name], torch.Tensor):
                part[name], how = odd_tensor(rng, part[name])
            notes.append(f"{name} {how}")
        elif how == "config" and isinstance(state.get("config"), dict):
            name = rng.choice([*state["config"], "another"])
            state["config"][name] = rng.choice((*ODD, 10, 1000, 10**5, 10**6, 10**9, "resnet50", "resnet152", "cuda",
                                                "meta", "imagenet", "bfloat16", 1e-30, 0.0))
            notes.append(f"config {name} -> {state['config'][name]!r:.60}")
        elif how == "field":
            name = rng.choice(list(state))
            state[name] = rng.choice(ODD)
            notes.append(f"{name} -> {state[name]!r:.60}")
        elif how == "words" and isinstance(state.get("word_map"), dict):
            state["word_map"], note = spoil(rng, state["word_map"])
            notes.append(f"words {note}")
        elif how == "optimizer" and isinstance(state.get("optimizers"), dict):
            optimizer = state["optimizers"].get("decoder")
            if not isinstance(optimizer, dict) or "state" not in optimizer or not optimizer["state"]:
                continue
            if rng.random() < 0.5 and isinstance(optimizer["state"], dict):
                number = rng.choice(list(optimizer["state"]))
                one = optimizer["state"][number]
                if isinstance(one, dict) and one:
                    name = rng.choice(list(one))
                    if isinstance(one[name], torch.Tensor):
                        one[name], note = odd_tensor(rng, one[name])
                        notes.append(f"optimizer {number} {name} {note}")
            else:
                state["optimizers"]["decoder"], note = spoil(rng, optimizer)
                notes.append(f"optimizer {note}")
        else:
            state, note = spoil(rng, state)
            notes.append(note)
            if not isinstance(state, dict):
                break
    target = folder / "models/checkpoint.pth.tar"
    target.unlink()
    try:
        torch.save(state, target)
    except Exception:
        torch.save([], target)
        notes.append("(not to be saved: a list)")
    return *user_of(rng, base, folder, target), target, "; ".join(notes), None


def original(rng, base, folder):
    """A checkpoint of the original, its bytes damaged."""
    base.ready(folder)
    form = rng.choice(("legacy", "zip"))
    whole = (base.folder / f"{form}.pth.tar").read_bytes()
    at = whole.index(b"models")
    content, note = damage(rng, whole, [(0, len(whole)), (max(at - 200, 0), at + 6000), (0, 600)])
    target, words = put(folder / "models/theirs.pth.tar", content), folder / "out/words.json"
    words.write_text(base.their_words)

    def must():
        with contextlib.suppress(Exception):
            if members(content) == members(whole):
                return ""
        return "used a damaged checkpoint"

    return *evaluation(folder, target, "--word_map", words, "--image_size", 32, "--max_len", 6), target, \
        f"{form}: {note}", must if form == "zip" else None


def resnet(rng, base, folder):
    """The state dict of --encoder_weights."""
    base.ready(folder)
    state = SmallResNet().state_dict()
    content = io.BytesIO()
    if rng.random() < 0.5:
        name = rng.choice(list(state))
        state[name], note = odd_tensor(rng, state[name])
        note = f"{name} {note}"
        if rng.random() < 0.2:
            state, note = rng.choice((*ODD, list(state), torch.zeros(3))), "something else"
        torch.save(state, content)
        content = content.getvalue()
    else:
        torch.save(state, content)
        whole = content.getvalue()
        content, note = damage(rng, whole, [(0, 3000), (0, len(whole)), (whole.index(b"PK\1\2"), len(whole))])
    target = put(folder / "out/resnet.pth", content)
    flags = [*settings(), *in_folders(folder), "--epochs", 1, "--encoder_weights", target]
    return "train.py", flags, target, note, None


def pickled(rng, base, folder):
    """A short pickle of an enemy."""
    thing = rng.choice((b"cos\nsystem\n(S'touch ../home/file'\ntR.", b"\x80\x02c__builtin__\neval\n(U\x041+1+tR.",
                        b"\x80\x02cmodels\nEncoder\n)\x81}b.", b"(" * 10**6 + b".", b"\x80\x04\x8e" + b"\xff" * 8,
                        b"\x80\x02]" + b"2" * 10**5 + b".", b"ctorch.nn\nModule\n", b"I" + b"9" * 5000 + b"\n.",
                        pickle.dumps({"encoder": 1, "decoder": 2}, 2), pickle.dumps([[]] * 100, 4), b"", b"\x80\x05."))
    base.ready(folder)
    content, note = thing, f"{thing[:30]!r}"
    if rng.random() < 0.7:
        content, more = damage(rng, (pickle.dumps(0x1950a86a20f9469cfc6c, 2) + pickle.dumps(1001, 2)
                                     + pickle.dumps({}, 2) if rng.random() < 0.5 else b"") + thing)
        note += f", {more}"
    if rng.random() < 0.5:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", rng.choice((0, 0, 8))) as file:
            file.writestr("archive/data.pkl", content)
            file.writestr("archive/version", "3\n")
        content = packed.getvalue()
    target, words = put(folder / "models/theirs.pth.tar", content), folder / "out/words.json"
    words.write_text(base.their_words)
    return *evaluation(folder, target, "--word_map", words), target, note, lambda: "used a pickle of an enemy"


KINDS = (picture, annotations, archive, split, split, features, word_map, report, checkpoint, contents, contents,
         original, resnet, pickled)


def try_one(number, seed, kinds, base, folder):
    """Make the input with this number and call its script. Returns: kind; what is wrong, or ""; what was done."""
    rng = random.Random(f"{seed} {number}")
    torch.manual_seed(number)
    kind = kinds[number % len(kinds)]
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("data", "models", "logs", "out", "home/folder", "cwd"):
        (folder / name).mkdir(parents=True)
    (folder / "home/file").write_text("not to be touched")
    (folder / "home/link").symlink_to("folder")
    script, flags, target, note, must = kind(rng, base, folder)
    outside, given = snapshot(folder / "home"), target.read_bytes() if target.exists() else None
    status, cpu = call(script, flags, folder)
    return kind.__name__, verdict(status, cpu, folder, outside, target, given, must), f"{script}: {note}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=400)
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one to try again")
    parser.add_argument("--kinds", help=", ".join(sorted({kind.__name__ for kind in KINDS})))
    args = parser.parse_args()
    kinds = tuple(kind for kind in KINDS if not args.kinds or kind.__name__ in args.kinds.split(","))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    jieba.initialize()
    small = SmallResNet()
    torchvision.models.get_model = lambda name, weights=None: SmallResNet()
    utils.RESNETS[1, small.fc.in_features] = "resnet18"
    numbers = range(args.first, args.first + args.inputs) if args.only is None else [args.only]
    work = Path(tempfile.mkdtemp(prefix="fuzz_"))
    (work / "base").mkdir()
    base = Base(work / "base")
    whole = snapshot(work / "base")
    tried, found = collections.Counter(), collections.Counter()
    for number in numbers:
        folder = work / "case"
        kind, wrong, note = try_one(number, args.seed, kinds, base, folder)
        tried[kind] += 1
        if wrong:
            found[kind] += 1
            last = ((folder / "stderr").read_text(errors="replace").strip().splitlines() or [""])[-1]
            kept = folder.rename(work / f"finding_{args.seed}_{number}")
            print(f"{number} {kind}: {wrong}: {note!r}\n    {last[:300]!r}\n    {kept}", flush=True)
        if sum(tried.values()) % 500 == 0:
            print(f"{sum(tried.values())} inputs, {sum(found.values())} findings", flush=True)
        if args.only is not None and not wrong:
            print(f"nothing wrong: {note!r}; {folder}")
    if snapshot(work / "base") != whole:
        found["base"] += 1
        print("the files that all cases share were changed")
    print(", ".join(f"{name} {count}" for name, count in sorted(tried.items())))
    print(f"{sum(found.values())} findings over {sum(tried.values())} inputs (seed {args.seed})"
          + "".join(f"; {name} {count}" for name, count in sorted(found.items())))
    if not found and args.only is None:
        shutil.rmtree(work)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
