"""Peak memory and speed of tokenising a large text with data.py: one document, then many; or of reading web pages.

Usage: python tests/bench_data.py [--bytes=1e9]
       python tests/bench_data.py --pages=FOLDER
       python tests/bench_data.py --dedup=FOLDER
       python tests/bench_data.py --lines=1e9 --rate=1e-4
       python tests/bench_data.py --pipeline=FOLDER [--datatrove=PYTHON]

With --pages: F1 and seconds a page of `extract` and of trafilatura, if that is installed, in turns over the pages
FOLDER/*.html.gz with FOLDER/ground-truth.json (the multiset of 4-grams of words, macro precision and recall); and the
records a second of `read_warc`, from a file of 10,000 records of 30 kB each in its own gzip member, over `gzip` alone.

With --dedup: seconds of MinHash and LSH over the texts in FOLDER/debian_copyright.tar.gz, by data.py (with the exact
similarity of each pair), by datasketch and by rensa (which give candidates), in turns, and recall and precision against
FOLDER/debian_copyright_pairs.json. With --lines: peak memory of the step `lines` over so many bytes of generated text in
which a fifth of the lines are repeated, and the share of the new lines that was taken for seen. With --pipeline: MB of
HTML a second through a whole pipeline over the pages of FOLDER in a WARC file, each page several times with other words
in it, with one worker and with two, and the peak memory at two sizes; beside it datatrove, with extraction by trafilatura,
a filter by length, masks of personal data and its four stages of MinHash, if a PYTHON has datatrove[processing,io], python-magic
and faust-cchardet (it wants another trafilatura than --pages).

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
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bpe  # noqa: E402
import data  # noqa: E402

END = "<|endoftext|>"
DATATROVE = """
import os, sys
sys.stderr = open(os.devnull, "w")  # pages of statistics
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.formatters import PIIFormatter
from datatrove.pipeline.readers import JsonlReader, WarcReader
from datatrove.pipeline.writers import JsonlWriter

source, name, out = sys.argv[1:]
stages = [
    [WarcReader(source, glob_pattern=name), Trafilatura(), LambdaFilter(lambda document: len(document.text) > 200), PIIFormatter(),
     JsonlWriter(f"{out}/texts")],
    [JsonlReader(f"{out}/texts"), MinhashDedupSignature(f"{out}/signatures")],
    [MinhashDedupBuckets(f"{out}/signatures", f"{out}/buckets")],
    [MinhashDedupCluster(f"{out}/buckets", f"{out}/removed")],
    [JsonlReader(f"{out}/texts"), MinhashDedupFilter(f"{out}/removed"), JsonlWriter(f"{out}/documents")],
]
for stage in stages:
    LocalPipelineExecutor(stage, tasks=14 if type(stage[0]) is MinhashDedupBuckets else 1, workers=1, logging_dir=f"{out}/logs/{stages.index(stage)}").run()
"""


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


def measured(words: list[str], python: str = sys.executable) -> tuple[int, float]:
    """Peak memory in bytes and seconds of a command."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen([python, *words], stdout=subprocess.DEVNULL)
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


def compare_minhash(folder: Path) -> None:
    """MB and documents a second of three implementations, alternating; processor time."""
    with tarfile.open(folder / "debian_copyright.tar.gz") as tar:
        files = [member for member in tar if member.isfile()]
        texts = {Path(member.name).stem: tar.extractfile(member).read().decode("utf-8", "replace") for member in files}
    names, size = list(texts), sum(len(text.encode()) for text in texts.values())

    def shingles(text: str) -> set[str]:
        words = text.split()
        return {" ".join(words[i:i + 5]) for i in range(max(1, len(words) - 4))}

    def ours() -> set:
        return {frozenset((names[i], names[j])) for i, j, _ in data.minhash_pairs(texts.values(), 0.8)}

    def by_datasketch() -> set:
        from datasketch import MinHash, MinHashLSH
        sketches = MinHash.bulk(([gram.encode() for gram in shingles(text)] for text in texts.values()), num_perm=128)
        index = MinHashLSH(threshold=0.8, num_perm=128)
        for name, sketch in zip(names, sketches):
            index.insert(name, sketch)
        return {frozenset((name, other)) for name, sketch in zip(names, sketches) for other in index.query(sketch)}

    def by_rensa() -> set:
        from rensa import RMinHash, RMinHashLSH
        index, sketches = RMinHashLSH(threshold=0.8, num_perm=128, num_bands=16), []
        for number, text in enumerate(texts.values()):
            sketches.append(RMinHash(num_perm=128, seed=0))
            sketches[-1].update(list(shingles(text)))
            index.insert(number, sketches[-1])
        return {frozenset((names[i], names[j])) for i, sketch in enumerate(sketches) for j in index.query(sketch)}

    pairs = json.loads((folder / "debian_copyright_pairs.json").read_text())
    truth = {frozenset(pair[:2]) for pair in pairs if pair[2] >= 0.8}
    seconds, found = {}, {}
    for _ in range(5):
        for rival in (ours, by_datasketch, by_rensa):
            try:
                began = time.process_time()
                found[rival] = {pair for pair in rival() if len(pair) == 2}
                seconds.setdefault(rival, []).append(time.process_time() - began)
            except ImportError as error:
                print(error)
    for rival, times in seconds.items():
        middle, good = statistics.median(times), len(found[rival] & truth)
        print(f"{rival.__name__}: {middle:.2f} s, {size / 1e6 / middle:.1f} MB/s, {len(texts) / middle:,.0f} documents/s, "
              f"recall {good / len(truth):.4f}, precision {good / len(found[rival]):.4f}")


def deduplicate_lines(size: int, folder: Path, rate: float) -> None:
    """Peak memory of the step `lines`, and its false positives, over generated text."""
    rng, written, fresh, lines = random.Random(0), 0, 0, 0
    words = [f"word{i}" for i in range(1000)]
    with open(folder / "lines.txt", "w") as file:
        while written < size:
            block = []
            for _ in range(50):
                repeated = fresh and rng.random() < 0.2
                number = rng.randrange(fresh) if repeated else fresh
                fresh += not repeated
                block.append(f"line {number} says " + " ".join(words[(number * 7 + k * k * 31) % 1000] for k in range(9)))
            lines += len(block)
            written += file.write("\n".join(block) + "\n\n")
    peak, seconds = measured([str(ROOT / "data.py"), f"--input={folder}/lines.txt", f"--output={folder}/out", "--steps=lines",
                              "--separator=\n\n", f"--false_positives={rate}", "--workers=1"])
    with open(folder / "out/documents.jsonl") as file:
        kept = sum(1 + text.count("\n") for text in (json.loads(row)["text"] for row in file))
    print(f"lines of {written / 1e6:,.0f} MB ({lines:,} lines, {fresh:,} different), rate {rate}: peak memory {peak / 1e6:.0f} MB, "
          f"{seconds:.0f} s, {written / 1e6 / seconds:.1f} MB/s; {fresh - kept:,} new lines taken for seen: {(fresh - kept) / fresh:.2e}")


def run_pipeline(pages: Path, folder: Path, datatrove: str) -> None:
    """MB of HTML a second with one worker and with two, and of datatrove, in turns, and peak memory at two sizes."""
    texts = [gzip.decompress(path.read_bytes()) for path in sorted(pages.glob("*.html.gz"))]
    names = [str(number) for number in range(1000)]

    def records(times: int):
        for number in range(times * len(texts)):  # letters in other places, so that copies differ
            page = texts[number % len(texts)].replace(b" the ", f" the {names[number // len(texts)]} ".encode())
            url = f"http://site{number % 97}.org/{number}"
            yield {"WARC-Type": "response", "WARC-Target-URI": url, "WARC-Record-ID": f"<urn:{number}>", "WARC-Date": "2026-01-01T00:00:00Z",
                   "WARC-Identified-Payload-Type": "text/html", "Content-Type": "text/html"}, page

    steps = "--steps=extract,length,pii,urls,exact,lines,dedup"
    times, sizes = {}, {}
    for times_over in (4, 16):
        data.write_warc(folder / f"{times_over}.warc.gz", records(times_over))
        sizes[times_over] = times_over * sum(map(len, texts))
    def ours(workers, times_over):
        return [str(ROOT / "data.py"), f"--input={folder}/{times_over}.warc.gz", f"--output={folder}/out", steps, f"--workers={workers}"]
    commands = {("1 worker", 16): ours(1, 16), ("2 workers", 16): ours(2, 16)}
    if datatrove:
        commands |= {("1 worker", 4): ours(1, 4), ("datatrove, 1 worker", 4): ["-c", DATATROVE, str(folder), "4.warc.gz", f"{folder}/out"]}
    for _ in range(3):
        for name, command in commands.items():
            subprocess.run(["rm", "-rf", f"{folder}/out"], check=True)
            before = os.times()
            _, seconds = measured(command, datatrove if command[0] == "-c" else sys.executable)
            after = os.times()
            used = after.children_user + after.children_system - before.children_user - before.children_system
            times.setdefault(name, []).append((seconds, used))
    for (name, times_over), rows in times.items():
        seconds, used = statistics.median(row[0] for row in rows), statistics.median(row[1] for row in rows)
        size = sizes[times_over] / 1e6
        print(f"{name}, {size:.0f} MB of HTML: {seconds:.1f} s, {size / seconds:.2f} MB/s; "
              f"processor time {used:.1f} s, {size / used:.2f} MB/s a core")
    for times_over in sizes:
        words = [str(ROOT / "data.py"), f"--input={folder}/{times_over}.warc.gz", f"--output={folder}/{times_over}", steps, "--workers=2"]
        peak, _ = measured(words)
        print(f"{sizes[times_over] / 1e6:.0f} MB of HTML, 2 workers: peak memory {peak / 1e6:.0f} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=float, default=1e9)
    for name in ("pages", "dedup", "pipeline"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--datatrove", default="", help="a Python that has it")
    parser.add_argument("--lines", type=float, default=0)
    parser.add_argument("--rate", type=float, default=1e-4)
    words = parser.parse_args()
    size = int(words.bytes)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}")
    if words.pages:
        compare_extraction(words.pages)
        with tempfile.TemporaryDirectory() as folder:
            compare_warc(Path(folder))
        return
    if words.dedup:
        return compare_minhash(words.dedup)
    if words.lines or words.pipeline:
        with tempfile.TemporaryDirectory() as folder:
            if words.pipeline:
                return run_pipeline(words.pipeline, Path(folder), words.datatrove)
            return deduplicate_lines(int(words.lines), Path(folder), words.rate)
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
