"""All that only a GPU can show, in one call and in the order of its value.

    python benchmarks/gpu.py --out FOLDER --minutes 12
    python benchmarks/gpu.py --out FOLDER --minutes 9 --parts form memory two_processes
    python benchmarks/gpu.py --out FOLDER --minutes 5 --device cpu    # a rehearsal: tiny sizes
    python benchmarks/gpu.py wheels         # what to bring to a host without network
    python benchmarks/tables.py FOLDER      # the tables of README.md

`python benchmarks/run.py gpu` is the same. Each part of PARTS runs in a process of its own and has
a share of the time that is left. It writes FOLDER/PART.json anew after every measurement, and what
it prints to FOLDER/PART.log, so whatever is cut short leaves all that was measured before. A
package that is not installed is named, and the rest goes on; see absent.py.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import absent  # noqa: E402

# What each is of is in gpu_parts.py; the numbers are seconds of twelve minutes, or shares of fewer.
PARTS = dict(tests=60, steps=165, self_critical=40, precisions=35, epoch=70, beam=75, memory=85,
             two_processes=50, form=140)
# What parts may lack: 30 MB. Not mplfonts (85 MB), as no part draws a figure.
WHEELS = "jieba nltk regex joblib click fonttools filelock pycocoevalcap"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path("logs/gpu"),
                        help="where `gpu` writes (logs/gpu)")
    parser.add_argument("--minutes", type=float, default=12, help="of all parts of `gpu` (12)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"of `gpu`: {', '.join(PARTS)} (all)")


def run_parts(args: argparse.Namespace) -> None:
    """Ends the program with exit code 1 where a part has failed or was cut short."""
    args.out.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    if args.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if absent.NOT_INSTALLED:
        print(f"not installed: {', '.join(absent.NOT_INSTALLED)}")
    deadline = time.monotonic() + 60 * args.minutes
    parts = [name for name in PARTS if name in args.parts]
    unfinished = []
    for place, name in enumerate(parts):
        left = max(deadline - time.monotonic(), 1)
        share = left * PARTS[name] / sum(PARTS[part] for part in parts[place:])
        if args.device == "cpu":  # where parts mostly import, and take other shares
            share = min(2 * share, left)
        result = run_part(name, args.out, share, environment)
        print(f"{name}: {result['state']}, {result['seconds']:.0f} s, "
              f"{len(result['rows'])} rows", flush=True)
        if result["state"] != "whole":
            unfinished.append(name)
    if unfinished:
        sys.exit(f"error: not whole: {', '.join(unfinished)}")


def run_part(name: str, folder: Path, seconds: float, environment: dict[str, str]) -> dict:
    """What its JSON holds in the end."""
    path = folder / f"{name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "part", name, str(folder.resolve())]
    start = time.monotonic()
    with open(path.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log,
                                   start_new_session=True)
        try:
            code = process.wait(seconds)
            state = "whole" if code == 0 else f"failed: exit code {code}, see {name}.log"
        except subprocess.TimeoutExpired:
            state = f"cut short after {seconds:.0f} s"
        finally:
            end_group(process)
    result = dict(part=name, rows={})
    if path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
    result |= dict(state=state, seconds=time.monotonic() - start)
    write_json(path, result)
    return result


def end_group(process: subprocess.Popen) -> None:
    """The part, and what it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def write_json(path: Path, content: dict) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, path)


def print_wheels() -> None:
    """As commands. jieba comes as source alone, which needs no network once it is a wheel."""
    print(f"""# With Python {sys.version_info.major}.{sys.version_info.minor}, as over there:
pip wheel --no-deps --wheel-dir wheels {WHEELS}
zip -qd wheels/pycocoevalcap*.whl '*.jar' '*.gz'    # 104 MB of METEOR and SPICE, which no part runs
# There, from the folder that came along:
pip install --no-deps --no-index --find-links wheels {WHEELS}""")


def main() -> None:
    if sys.argv[1:2] == ["wheels"]:
        return print_wheels()
    if sys.argv[1:2] == ["part"]:
        from benchmarks import gpu_parts  # which imports all the rest

        return gpu_parts.run_part(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    add_flags(parser)
    run_parts(parser.parse_args())


if __name__ == "__main__":
    main()
