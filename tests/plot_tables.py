"""Pictures of tables: for each row a dot at the number, or the median of the seeds, and a line over their range.

Usage: python tests/plot_tables.py                             README's tables of variants, ablations, curation, into plots/
       python tests/bench_recipe.py optimizers > table.md
       python tests/plot_tables.py table.md [--column=seconds]  what any of the benchmarks printed, as table.png

Of each table the first column whose head holds --column ("bits", or else "loss", "right", "speed") is drawn over the
first; a row without a number there is left out. The dotted line is the row "default", or the first one.
"""
import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"variant": "variants", "changed": "ablations", "data": "curation"}  # of README's, by the head of the first column
COLUMNS = ("bits", "loss", "right", "speed")
NUMBER = r"(-?\d[\d,]*\.?\d*)"


def spread(cell: str) -> tuple[float, float, float] | None:
    """Middle, lowest and highest of a cell; where all seeds are listed their median and range.

    >>> spread("2.5 (2.4 to 2.7)"), spread("2.0 ± 0.5"), spread("1,050"), spread("3, 1, 2"), spread("-")
    ((2.5, 2.4, 2.7), (2.0, 1.5, 2.5), (1050.0, 1050.0, 1050.0), (2.0, 1.0, 3.0), None)
    """
    if found := re.match(rf"{NUMBER}%? \({NUMBER}%? to {NUMBER}", cell):
        return tuple(float(x.replace(",", "")) for x in found.groups())
    if found := re.match(rf"{NUMBER} ± {NUMBER}", cell):
        middle, change = (float(x.replace(",", "")) for x in found.groups())
        return middle, middle - change, middle + change
    numbers = sorted(float(x.strip("%× ").replace(",", "")) for x in cell.split(", ") if re.fullmatch(NUMBER + "[%×]?", x.strip()))
    return (numbers[len(numbers) // 2], numbers[0], numbers[-1]) if numbers else None


def tables(text: str, column: str = "") -> list[tuple[str, str, list[tuple[str, float, float, float]]]]:
    """Of each table with such a column: heads of the first and of that column, and rows (label, middle, low, high).

    >>> tables("| variant | MB | bits |\\n|---|---|---|\\n| `a` | 1 | 2.5 (2.4 to 2.7) |\\n| b | 2 | - |")
    [('variant', 'bits', [('a', 2.5, 2.4, 2.7)])]
    """
    found = []
    for block in re.findall(r"(?m)(?:^\|.*\n?)+", text):
        head, _, *lines = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in [*block.splitlines(), "|"])
        place = next((i for name in ([column] if column else COLUMNS) for i, cell in enumerate(head) if name in cell and i), 0)
        rows = [(line[0].replace("`", ""), *of) for line in lines if len(line) > place and (of := spread(line[place]))]
        if place and rows:
            found.append((head[0], head[place], rows))
    return found


def draw(label: str, rows: list, path: Path) -> None:
    """The rows as dots with ranges, the lowest on top."""
    from matplotlib import pyplot
    usual = dict((name, middle) for name, middle, *_ in rows).get("default", rows[0][1])
    rows = sorted(rows, key=lambda row: -row[1])
    figure, axes = pyplot.subplots(figsize=(7, 0.8 + 0.24 * len(rows)))
    for place, (_, middle, low, high) in enumerate(rows):
        axes.plot([low, high], [place, place], color="tab:blue", linewidth=1.5)
        axes.plot(middle, place, "o", color="tab:blue", markersize=4)
    axes.axvline(usual, color="grey", linestyle=":")
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=8)
    axes.set_xlabel(label.partition(":")[0])
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)
    print(f"{path}: {len(rows)} rows")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--column", default="", help="a word of its head")
    parser.add_argument("--output", type=Path, default=ROOT / "plots", help="folder of README's pictures")
    o = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        sys.exit("plot_tables.py draws with matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    if not o.files:
        for first, label, rows in tables((ROOT / "README.md").read_text()):
            if first in NAMES:
                draw(label, rows, o.output / f"{NAMES[first]}.png")
    for file in o.files:
        found = tables(file.read_text(), o.column)
        if not found:
            sys.exit(f"{file} holds no table with a column of numbers under {o.column or ', '.join(COLUMNS)}")
        for i, (_, label, rows) in enumerate(found):
            draw(label, rows, file.with_name(f"{file.stem}{f'-{i + 1}' if i else ''}.png"))


if __name__ == "__main__":
    main()
