"""README.md's tables of one GPU, out of what gpu.py has measured.

    python benchmarks/tables.py FOLDER >> notes.md

Where README.md has the same row already, its figure stands beside the new one, as "before". A part
that is not there, was cut short or failed is named below the tables.
"""
import argparse
import json
from pathlib import Path

README = Path(__file__).with_name("README.md")
EPOCHS = {"frozen": "frozen ResNet-101, bfloat16", "kept": "from kept features, in GPU memory"}


def old_figures(text: str, heading: str) -> dict[tuple[str, str], str]:
    """The cells of all tables below a heading, by their row's first cell and their column."""
    found = {}
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    columns = []
    for line in section.splitlines():
        if not line.startswith("|"):
            columns = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not columns:
            columns = cells
            continue
        for column, cell in zip(columns[1:], cells[1:]):
            found.setdefault((cells[0], column), cell)
    return found


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def comparisons(parts: dict, old: dict) -> str:
    rows = []
    for part in ("steps", "self_critical", "beam"):
        for name, row in parts.get(part, {}).get("rows", {}).items():
            if "error" in row:
                rows.append([name, row["error"], *["-"] * 6])
                continue
            ratio = "-"
            if "ratio" in row:
                ratio = f"{row['ratio']:.1f} ({row['ratio_min']:.1f}-{row['ratio_max']:.1f})"
            case = name.removesuffix(", 32")
            rows.append([name, number(row.get("reference_s")), number(row["product_s"]), ratio,
                         number(row.get("memory_ratio"), 2), percent(row["busy"]),
                         old.get((case, "product, s"), "-"),
                         old.get((case, "times as fast (range)"), "-")])
    return table(["case, pictures", "reference, s", "product, s", "times as fast (range)",
                  "memory, product / reference", "device busy", "before: product, s",
                  "before: times as fast"], rows)


def epochs(parts: dict, old: dict) -> str:
    rows = []
    for kind, row in parts.get("epoch", {}).get("rows", {}).items():
        name = EPOCHS[kind]
        rows.append([name, number(row["whole_epoch_s"], 1), number(row["images_per_s"], 0),
                     number(row["whole_validation_s"], 1), number(row["pictures"], 0),
                     old.get((name, "training, s"), "-"), old.get((name, "images/s"), "-")])
    return table(["epoch", "training, s, extrapolated", "images/s", "validation, s, extrapolated",
                  "of so many pictures", "before: training, s", "before: images/s"], rows)


def forms(parts: dict, old: dict) -> str:
    """The old figures are of the last row that README has of the kernels."""
    of_form = parts.get("form", {}).get("rows", {})
    sizes = sorted({key for row in of_form.values() for key in row if key.endswith("pictures")},
                   key=lambda key: int(key.split()[0]))
    before = {"kernels and graphs": "the loop and its gradient as CUDA graphs"}
    rows = []
    for name, row in of_form.items():
        cells = [name]
        for size in sizes:
            found = row.get(size, {})
            cells += [number(found.get("ms"), 1), percent(found.get("busy")),
                      old.get((before.get(name), size), "-")]
        first = row.get(sizes[0], {}) if sizes else {}
        rows.append([*cells, number(first.get("start_s"), 1), str(row.get("lines", "-")),
                     row.get("error", "")])
    columns = ["decoder step"]
    for size in sizes:
        columns += [f"ms, {size}", "device busy", f"before: ms, {size}"]
    return table([*columns, "start-up, s", "lines of code", ""], rows)


def largest(parts: dict, old: dict) -> str:
    limits = ["8 GiB", "16 GiB", "24 GiB", "80 GiB"]
    rows = []
    for name, row in parts.get("memory", {}).get("rows", {}).items():
        cells = [name]
        for limit in limits:
            cells += [number(row.get(limit), 0), old.get((name, limit), "-")]
        rows.append(cells)
    return table(["training", *(text for limit in limits for text in (limit, "counted before"))],
                 rows)


def precisions(parts: dict) -> str:
    rows = []
    for name, row in parts.get("precisions", {}).get("rows", {}).items():
        losses = row.get("losses")
        if losses is None:
            rows.append([name, row["error"], *["-"] * 5])
            continue
        places = [place * (len(losses) - 1) // 4 for place in range(5)]
        cells = [f"{losses[place]:.4f}" for place in places]
        rows.append([name, *cells, number(row["seconds"], 1)])
    return table(["loss at", "the first step", "a quarter", "half", "three quarters", "the last",
                  "s"], rows)


def several(parts: dict) -> str:
    rows = []
    for name, row in parts.get("two_processes", {}).get("rows", {}).items():
        rows.append([name, row.get("backend", row.get("error", "-")), number(row.get("step_s"), 4),
                     f"{row.get('largest_difference', float('nan')):.1e}"])
    return table(["processes", "backend", "s a step", "losses differ by"], rows)


def tests(parts: dict) -> str:
    rows = parts.get("tests", {}).get("rows", {})
    return table(["tests/test_fast.py", "tests", ""], [
        [outcome, str(row["tests"]), ", ".join(row.get("names", []))]
        for outcome, row in rows.items()])


def remarks(parts: dict) -> str:
    lines = []
    for name, part in parts.items():
        lines.append(f"- {name}: {part['state']}, {part.get('seconds', 0):.0f} s")
        lines += [f"  - {note}" for note in part.get("notes", [])]
        for row, found in part["rows"].items():
            if "agreement" in found:
                lines.append(f"  - {row}: {found['agreement']}")
    return "\n".join(lines)


def tables(folder: Path) -> str:
    parts = {}
    for path in sorted(folder.glob("*.json")):
        part = json.loads(path.read_text(encoding="utf-8"))
        parts[part["part"]] = part
    machine = next((part for part in parts.values() if "chip" in part), {})
    keys = ("date", "chip", "python", "torch", "torchvision")
    about = ", ".join(f"{key} {machine.get(key, 'unknown')}" for key in keys)
    if machine.get("is_rehearsal"):
        about = f"**A rehearsal on a CPU: tiny sizes, figures that mean nothing.** {about}"
    if machine.get("not_installed"):
        about += f"; not installed: {', '.join(machine['not_installed'])}"

    text = README.read_text(encoding="utf-8")
    old = old_figures(text, "One H100")
    memory = old_figures(text, "The batch that fits a GPU's memory")
    sections = {"Against reference.py": comparisons(parts, old), "Epochs": epochs(parts, old),
                "The form": forms(parts, old), "The largest batch": largest(parts, memory),
                "Precisions": precisions(parts), "Two processes on one GPU": several(parts),
                "Tests": tests(parts), "Remarks": remarks(parts)}
    return "\n\n".join([about, *(f"### {title}\n\n{body}" for title, body in sections.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of gpu.py's --out")
    folder = parser.parse_args().folder
    if not any(folder.glob("*.json")):
        parser.error(f"{folder} holds nothing that benchmarks/gpu.py has written")
    print(tables(folder))


if __name__ == "__main__":
    main()
