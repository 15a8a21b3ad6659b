"""Does each step of data.py help: bits per byte on clean held-out text of models trained on equally many tokens.

Usage: python tests/bench_helps.py [--pages=FOLDER] [--seeds=3] [-- options for train.py]

The pages are a third of those of `data.py --crawl`; with --pages also FOLDER/*.html.gz with FOLDER/ground-truth.json (of
each page "articleBody", its article as people cut it out), as a second source. Held out are the crawl's texts of modules
that have no page in it, and the articles of every third page of FOLDER, whose pages are taken out. Pages that share 13
words in a row with held-out text (the step decontaminate) are taken out of all rows.

A row is what data.py makes of the pages with its steps, then train.py, once for each seed. All rows have the same
tokenizer, which is trained on the visible text of the pages, the same held-out tokens, the same model and number of
tokens. The first row is the markup itself, the second all that a browser shows, the others begin with the step extract.
A row is compared, seed by seed, with the last one before it that helped: its step helps if the bits per byte fall for
every seed. One that does not is left out of the rows behind it, but for extract, as filters and deduplication read what
it gives. Of two sources all rows draw half of the tokens each, so that a step does not change their shares; the last row
draws by their sizes in tokens, which is what mixing is compared with.
"""
import argparse
import gzip
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bpe  # noqa: E402
import data  # noqa: E402

MODEL = ["--n_layer=1", "--n_embd=64", "--ngram=0", "--block_size=128", "--batch_size=16", "--max_iters=120",
         "--learning_rate=0.01", "--eval_interval=1000"]
LONGEST = 1500  # characters of a held-out text: evaluation takes time, too
STEPS = ["extract", "length", "gopher,repetition", "dedup"]


def call(script: str, *words: object) -> None:
    """Run a script of ours, without its output."""
    done = subprocess.run([sys.executable, ROOT / script, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} {' '.join(map(str, words))}\n{done.stdout}{done.stderr}")


def write_rows(path: Path, texts) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def make_sources(folder: Path, pages: Path | None) -> list[str]:
    """Names of sources, whose pages are written as NAME-markup.jsonl, NAME-visible.jsonl and, as the step extract gives
    them, NAME-checked/documents.jsonl; the held-out texts as held/*.txt."""
    call("data.py", f"--crawl={folder / 'crawl'}")
    crawl = [page for _, page in data.read_warc(folder / "crawl/pages.warc.gz")]
    # A third of it, of which a run reads each page about once; in blocks, for mirrored pages stand beside their originals.
    sources, held = {"docs": [page for i, page in enumerate(crawl) if i // 9 % 3 == 0]}, folder / "held"
    shutil.copytree(folder / "crawl/held", held, dirs_exist_ok=True)
    if pages:
        truth = sorted(json.loads((pages / "ground-truth.json").read_text()).items())
        for name, row in truth[::3]:
            (held / f"{name}.txt").write_text(row["articleBody"], encoding="utf-8")
        sources["news"] = [gzip.decompress((pages / f"{name}.html.gz").read_bytes())
                           for i, (name, _) in enumerate(truth) if i % 3]
    for name, found in sources.items():  # those that share words with what is held out go
        checked = folder / f"{name}-checked"
        data.write_warc(folder / "all.warc.gz", (({"WARC-Type": "resource"}, page) for page in found))
        call("data.py", f"--input={folder / 'all.warc.gz'}", f"--output={checked}", "--steps=extract,decontaminate",
             f"--eval_data={held}")
        kept = [int(row["origin"].rpartition("#")[2]) for row in map(json.loads, open(checked / "documents.jsonl"))]
        print(f"{name}: {len(found):,} pages, {len(kept):,} left behind extract and decontaminate")
        write_rows(folder / f"{name}-markup.jsonl", (data.decode(found[i]) for i in kept))
        write_rows(folder / f"{name}-visible.jsonl", (data.extract(found[i], main=False) for i in kept))
    return list(sources)


def hold_out(folder: Path) -> None:
    """Write the held-out texts as FOLDER/target/val.npy, by the tokenizer of all rows."""
    coder, target = bpe.load(folder / "tokenizer.json"), folder / "target"
    target.mkdir(exist_ok=True)
    coder.save(target / "tokenizer.json")
    texts = [path.read_bytes().decode()[:LONGEST] for path in sorted((folder / "held").glob("*.txt"))]
    ids = [part for text in texts for part in (*coder.encode(text), coder.special_tokens[bpe.END])]
    np.save(target / "val.npy", np.array(ids, coder.dtype))
    print(f"held out: {len(texts)} texts, {sum(len(text.encode()) for text in texts):,} bytes, {len(ids):,} tokens")


def tokens_of(folder: Path, name: str, steps: str) -> Path:
    """The token files that data.py makes of a source; `steps` may be "markup" or "visible"."""
    inner, output = steps in ("markup", "visible"), folder / f"{name}-{steps}".replace(",", "-")
    source = folder / (f"{name}-{steps}.jsonl" if inner else f"{name}-checked/documents.jsonl")
    rest = "tokenise" if inner else f"{steps},tokenise".removeprefix("extract,")  # which is done
    call("data.py", f"--input={source}", f"--output={output}", f"--tokenizer={folder / 'tokenizer.json'}",
         "--val_fraction=1e-9", f"--steps={rest}")
    return output


def trained(folder: Path, words: list[str], seed: int) -> tuple[float, int]:
    """(Bits per byte on the held-out text, tokens read) of a run of train.py."""
    call("train.py", *words, f"--eval_data={folder / 'target'}", f"--output={folder / 'run'}", f"--seed={seed}")
    last = json.loads((folder / "run/log.jsonl").read_text().splitlines()[-1])
    shutil.rmtree(folder / "run")
    return last["bpb"], last["tokens"]


def compare(folder: Path, names: list[str], seeds: int, model: list[str]) -> None:
    """Print a line of the table for each row."""
    steps, base, before = "", "-", []
    half = [f"--mix={','.join(['0.5'] * len(names))}"] * (len(names) > 1)
    print(f"| data | documents | tokens | epochs of {', '.join(names)} | bits per byte (seeds: {seeds}) | against | change by seed "
          "| helped |\n|---|---|---|---|---|---|---|---|", flush=True)
    for step in ["markup", "visible", *STEPS, *["by tokens"] * len(half)]:
        kept = "extract" if steps in ("markup", "visible") else steps
        now = {"by tokens": steps, "markup": step, "visible": step, "extract": step}.get(step, f"{kept},{step}")
        folders = [tokens_of(folder, name, now) for name in names]
        sizes = [json.loads((path / "manifest.json").read_text())["train"] for path in folders]
        mix = [] if step == "by tokens" else half
        words = [f"--data={','.join(map(str, folders))}", *model, *mix]
        found = [trained(folder, words, seed) for seed in range(seeds)]
        bits, read = [each for each, _ in found], found[0][1]
        changes = [new - old for new, old in zip(bits, before)]
        helped = all(change < 0 for change in changes)
        count = sum(size["tokens"] for size in sizes)
        epochs = [read / len(names) / size["tokens"] if mix else read / count for size in sizes]
        label = f"{now}, drawn by tokens" if step == "by tokens" else now
        spread = f" ± {statistics.stdev(bits):.3f}" if seeds > 1 else ""
        print(f"| {label} | {sum(size['documents'] for size in sizes):,} | {count:,} | "
              f"{', '.join(f'{each:.2f}' for each in epochs)} | {statistics.mean(bits):.3f}{spread} | {base} | "
              f"{', '.join(f'{change:+.3f}' for change in changes) or '-'} | "
              f"{('yes' if helped else 'no') if changes else '-'} |", flush=True)
        if helped:
            steps, base, before = now, label, bits


def main():
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    words = parser.parse_args(sys.argv[1:split])
    if words.pages and not (words.pages / "ground-truth.json").exists():
        sys.exit(f"--pages={words.pages} holds no ground-truth.json, the articles of its pages")
    model = MODEL + sys.argv[split + 1:]
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; train.py {' '.join(model)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = make_sources(folder, words.pages)
        texts = [row for source in sources for row in data.read_jsonl(folder / f"{source}-visible.jsonl", data.Counter())]
        bpe.train("bpe", (text for text, _ in texts), 2048, "gpt2").save(folder / "tokenizer.json")
        hold_out(folder)
        compare(folder, list(sources), words.seeds, model)


if __name__ == "__main__":
    main()
