"""Peak memory and speed of tokenising a large text with data.py: one document, then many; or of reading web pages.

Usage: python tests/bench_data.py [--bytes=1e9]
       python tests/bench_data.py --pages=FOLDER

With --pages: F1 and seconds a page of `extract` and of trafilatura, if that is installed, in turns over the pages
FOLDER/*.html.gz with FOLDER/ground-truth.json (the multiset of 4-grams of words, macro precision and recall); and the
records a second of `read_warc`, from a file of 10,000 records of 30 kB each in its own gzip member, over `gzip` alone.

The text is the Python standard library's, repeated until it has that many bytes: first as one document without a break,
then as one document a file, <|endoftext|> between them. The tokenizer is a BPE of 8,192 tokens, trained once before.
Memory is the sum over the process and its workers of what each has in memory, a page shared by n processes counted as
1/n in each (Pss in /proc/PID/smaps_rollup, so Linux only), read ten times a second; its peak is printed.
Needs about 1.5 times --bytes on the disk of the temporary folder.
"""
import argparse
import gzip
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bpe  # noqa: E402
import data  # noqa: E402

END = "<|endoftext|>"


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid] + [one for child in children for one in family(int(child))]


def memory(pid: int) -> int:
    """Bytes in memory of a process and its descendants; shared pages are counted once."""
    total = 0
    for one in family(pid):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except OSError:  # it has ended
            pass
    return total


def measured(words: list[str]) -> tuple[int, float]:
    """Peak memory in bytes and seconds of a command."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{' '.join(words)} ended with {process.returncode}")
    return peak, time.perf_counter() - began


def write_text(path: Path, size: int, between: str) -> int:
    """Write the standard library's files again and again, up to `size` bytes; the number of files written."""
    texts = [file.read_bytes() for file in bpe.find_files("")]
    written = number = 0
    with open(path, "wb") as file:
        while written < size:
            text = texts[number % len(texts)]
            written += file.write(text) + file.write(between.encode())
            number += 1
    return number


def four_grams(text: str) -> Counter:
    words = re.findall(r"\w+", text)
    return Counter(tuple(words[i:i + 4]) for i in range(max(bool(words), len(words) - 3)))


def compare_extraction(folder: Path) -> None:
    """F1 and milliseconds a page; the extractors take turns, so that load falls on all."""
    truth = json.loads((folder / "ground-truth.json").read_text())
    pages = {name: gzip.decompress((folder / f"{name}.html.gz").read_bytes()) for name in truth}
    rivals = {"data.extract": data.extract}
    try:
        import trafilatura
        rivals["trafilatura"] = lambda page: trafilatura.extract(page, include_comments=False) or ""
    except ImportError:
        print("trafilatura is not installed")
    seconds, texts = Counter(), {}
    for _ in range(3):
        for name, page in pages.items():
            for rival, extract in rivals.items():
                began = time.perf_counter()
                texts[rival, name] = extract(page)
                seconds[rival] += time.perf_counter() - began
    for rival in rivals:
        precision = recall = 0.0
        for name in pages:
            found, wanted = four_grams(texts[rival, name]), four_grams(truth[name]["articleBody"])
            both = sum((found & wanted).values())
            precision += both / max(1, sum(found.values())) / len(pages)
            recall += both / max(1, sum(wanted.values())) / len(pages)
        f1 = 2 * precision * recall / (precision + recall)
        print(f"{rival}: F1 {f1:.4f} (precision {precision:.4f}, recall {recall:.4f}), "
              f"{1000 * seconds[rival] / 3 / len(pages):.1f} ms a page, {seconds[rival] / seconds['data.extract']:.2f}x")


def compare_warc(folder: Path, count: int = 10_000) -> None:
    """Records a second of read_warc and of gzip alone, alternating."""
    rng, words = random.Random(0), [file.read_text(errors="replace") for file in bpe.find_files("")[:200]]
    text = "".join(words)
    records = (({"WARC-Type": "conversion", "WARC-Target-URI": f"http://example.com/{i}"}, text[at:at + 30_000].encode())
               for i, at in ((i, rng.randrange(len(text) - 30_000)) for i in range(count)))
    data.write_warc(folder / "a.warc.gz", records)
    ours, alone = [], []
    for _ in range(3):
        began = time.perf_counter()
        assert sum(1 for _ in data.read_warc(folder / "a.warc.gz")) == count
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        with gzip.open(folder / "a.warc.gz") as file:
            while file.read(1 << 16):
                pass
        alone.append(time.perf_counter() - began)
    ours, alone = sorted(ours)[1], sorted(alone)[1]
    print(f"read_warc: {count / ours:,.0f} records/s, gzip alone {count / alone:,.0f}: {alone / ours:.2f} of its speed")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=float, default=1e9)
    parser.add_argument("--pages", type=Path)
    words = parser.parse_args()
    size = int(words.bytes)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}")
    if words.pages:
        compare_extraction(words.pages)
        with tempfile.TemporaryDirectory() as folder:
            compare_warc(Path(folder))
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, text = Path(folder, "tokenizer.json"), Path(folder, "text.txt")
        measured([str(ROOT / "bpe.py"), f"--output={tokenizer}"])
        for name, between, words in [("one document", "", []), ("many documents", END, [f"--separator={END}"])]:
            files = write_text(text, size, between)
            peak, seconds = measured([str(ROOT / "data.py"), f"--input={text}", f"--tokenizer={tokenizer}",
                                      f"--output={folder}/tokens", *words])
            got = text.stat().st_size
            print(f"{name} ({files if between else 1:,}), {got / 1e6:,.0f} MB of text: peak memory {peak / 1e6:,.0f} MB, "
                  f"{seconds:.0f} s, {got / 1e6 / seconds:.1f} MB/s")


if __name__ == "__main__":
    main()
