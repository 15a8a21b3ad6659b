"""Peak memory and speed of tokenising a large text with data.py: one document, then many.

Usage: python tests/bench_data.py [--bytes=1e9]

The text is the Python standard library's, repeated until it has that many bytes: first as one document without a break,
then as one document a file, <|endoftext|> between them. The tokenizer is a BPE of 8,192 tokens, trained once before.
Memory is the sum over the process and its workers of what each has in memory, a page shared by n processes counted as
1/n in each (Pss in /proc/PID/smaps_rollup, so Linux only), read ten times a second; its peak is printed.
Needs about 1.5 times --bytes on the disk of the temporary folder.
"""
import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bpe  # noqa: E402

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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=float, default=1e9)
    size = int(parser.parse_args().bytes)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}")
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
