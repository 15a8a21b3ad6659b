"""Pictures of README's tables with a spread: for each row a dot at the median of the seeds, and a line over their range.

Usage: python tests/plot_tables.py [FOLDER]

Writes FOLDER/NAME.png (plots/ where none is given) for each table whose first column is called NAME below: what stands in
README is drawn, so make the tables first. Low is good; the dotted line is the row "default", or the first one.
"""
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"variant": "variants", "changed": "ablations", "data": "curation"}  # by the head of the first column
NUMBER = r"(\d+\.\d+)"


def tables(readme: str) -> dict[str, list[tuple[str, float, float, float]]]:
    """By name the rows (label, median, low, high) of the tables of NAMES; a row without a spread is a point.

    >>> tables("| variant | bits |\\n|---|---|\\n| `a` | 2.5 (2.4 to 2.7) |\\n| b | 2.0 ± 0.5 |\\n| c | 1.5 |")
    {'variants': [('a', 2.5, 2.4, 2.7), ('b', 2.0, 1.5, 2.5), ('c', 1.5, 1.5, 1.5)]}
    """
    found, name = {}, ""
    for line in readme.splitlines() + [""]:
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else [""]
        name = NAMES.get(cells[0], name) if line.startswith("|") else ""
        row = " | ".join(cells[1:])
        spread = re.search(rf"{NUMBER} \({NUMBER} to {NUMBER}\)", row)
        around = re.search(rf"{NUMBER} ± {NUMBER}", row)
        alone = re.search(NUMBER, row)
        if name and spread:
            middle, low, high = map(float, spread.groups())
        elif name and around:
            middle, change = map(float, around.groups())
            low, high = middle - change, middle + change
        elif name and alone:
            middle = low = high = float(alone[1])
        else:
            continue
        found.setdefault(name, []).append((cells[0].replace("`", ""), middle, low, high))
    return found


def draw(rows: list, path: Path) -> None:
    """The rows as dots with ranges, the lowest on top."""
    from matplotlib import pyplot
    usual = dict((label, middle) for label, middle, *_ in rows).get("default", rows[0][1])
    rows = sorted(rows, key=lambda row: -row[1])
    figure, axes = pyplot.subplots(figsize=(7, 0.8 + 0.24 * len(rows)))
    for place, (_, middle, low, high) in enumerate(rows):
        axes.plot([low, high], [place, place], color="tab:blue", linewidth=1.5)
        axes.plot(middle, place, "o", color="tab:blue", markersize=4)
    axes.axvline(usual, color="grey", linestyle=":")
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows], fontsize=8)
    axes.set_xlabel("bits per byte")
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)


def main():
    folder = Path(*sys.argv[1:2] or [ROOT / "plots"])
    try:
        import matplotlib
    except ImportError:
        sys.exit("plot_tables.py draws with matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    for name, rows in tables((ROOT / "README.md").read_text()).items():
        draw(rows, folder / f"{name}.png")
        print(f"{folder / name}.png: {len(rows)} rows")


if __name__ == "__main__":
    main()
