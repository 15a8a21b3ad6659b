"""What the filters of data.py reach and cost, beside fastText where it is installed.

Usage: python tests/bench_filters.py --data=FOLDER [--tokens=FOLDER] [--more=languages.json] [--folds=10]
       [--only=language,classifier,...]

FOLDER is the folder of real files that tests take from TEST_DATA. Prints, one line each:
language    Accuracy at 100 characters on the texts of web/lang that are held out (a tenth by their hash, all tenths in turn;
            --folds=5 for fifths), ours and fastText trained on the same texts, and bytes of our file. Texts that stand
            under several codes are not translated: they are left out on both sides. --more adds training texts,
            {code: [texts]}.
classifier  AUC and processor time in training of two tasks, ours and fastText with its own settings and with word pairs.
            "blocks": blocks of web/aeb_dev's pages, of at least 20 characters, that lie in the article or do not; every
            fourth page is held out. "code": the standard library's own modules or its tests, in pieces of 2,000
            characters; every fifth file is held out.
ngrams      Bits per byte of the held-out documents of --tokens, a folder that data.py wrote, by 3-grams to 7-grams.
speed       MB/s of each filter and mask on the main content of web/aeb_dev's pages.
"""
import argparse
import contextlib
import glob
import gzip
import hashlib
import json
import random
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

try:
    import fasttext
except ImportError:
    fasttext = None


def clock(function, *given, **more):
    """(seconds of processor time, what the function gives)"""
    began = time.process_time()
    out = function(*given, **more)
    return time.process_time() - began, out


def train_fasttext(rows, **how):
    """A fastText classifier of (text, label) rows, on one thread. Version 0.9.3 now and then says NaN: then again."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.writelines(f"__label__{label} {' '.join(text.split())}\n" for text, label in rows)
        file.flush()
        for _ in range(20):
            with contextlib.suppress(RuntimeError):
                return fasttext.train_supervised(file.name, thread=1, verbose=0, **how)
    raise RuntimeError("fastText came to no number in 20 attempts")


def ask_fasttext(model, text):
    """{label: probability}; asked below the wrapper, which numpy 2 breaks."""
    return {label.removeprefix("__label__"): chance for chance, label in model.f.predict(" ".join(text.split()) + "\n", -1, 0.0, "strict")}


def fold_of(text, folds):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % folds


def bench_language(folder, more, folds):
    languages = json.loads((folder / "web/lang/debconf.json").read_bytes())
    codes = Counter(text for texts in languages.values() for text in set(texts))
    languages = {code: [text for text in texts if codes[text] == 1] for code, texts in languages.items()}
    extra = json.loads(Path(more).read_bytes()) if more else {}
    right, total, size, seconds = Counter(), 0, 0, Counter()
    wrong = Counter()
    for fold in range(folds):
        kept = {code: [text for text in texts if fold_of(text, folds) != fold] for code, texts in languages.items() if texts}
        kept = {code: texts + extra.get(code, []) for code, texts in kept.items()}
        seconds["ours"], model = clock(data.train_language, kept)
        rivals = {}
        if fasttext:
            rows = [(text, code) for code, texts in kept.items() for text in texts]
            rivals = {"fastText": train_fasttext(rows, minn=2, maxn=4, epoch=25, lr=0.5, dim=16, bucket=100_000)}
        with tempfile.TemporaryDirectory() as scratch:
            path = f"{scratch}/{fold}.npz"
            data.save_arrays(path, model)
            size = max(size, Path(path).stat().st_size)
            for code, texts in languages.items():
                for text in texts:
                    for at in range(0, len(text) - 99, 100) if fold_of(text, folds) == fold else ():
                        window = text[at:at + 100]
                        found = data.detect_language(window, path)[0]
                        wrong[code, found] += found != code
                        right["ours"] += found == code
                        total += 1
                        for name, rival in rivals.items():
                            chances = ask_fasttext(rival, window)
                            right[name] += max(chances, key=chances.get) == code
    for name, count in right.items():
        print(f"language: {name} {count / total:.4f} of {total} windows right")
    print(f"language: file {size:,} bytes at most, {len(model.labels)} languages, training {seconds['ours']:.1f} s;",
          "most often wrong:", *(f"{a}->{b} {n}" for (a, b), n in wrong.most_common(5) if n), flush=True)


def blocks_of_pages(folder):
    """(text, 1 if it lies in the article else 0, whether the page is held out)"""
    truth = json.loads((folder / "web/aeb_dev/ground-truth.json").read_bytes())
    for number, path in enumerate(sorted((folder / "web/aeb_dev").glob("*.html.gz"))):
        article = " ".join(truth[path.name.removesuffix(".html.gz")]["articleBody"].split())
        _, blocks = data.parse_html(data.decode(gzip.decompress(path.read_bytes())))
        for _, text, _ in blocks:
            text = " ".join(text.split())
            if len(text) >= 20:
                yield text, int(text in article), number % 4 == 0


def pieces_of_code(_):
    """The same of the standard library: 1 for a module, 0 for a test."""
    files = sorted(glob.glob(sysconfig.get_path("stdlib") + "/**/*.py", recursive=True))
    files = [path for path in files if "site-packages" not in path and "encodings" not in path]
    random.Random(0).shuffle(files)
    for number, path in enumerate(files):
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        for at in range(0, len(text), 2000):
            yield text[at:at + 2000], int("/test" not in path), number % 5 == 0


def auc(scores, labels):
    """The probability that a text of label 1 scores higher than one of label 0; equal scores count as half."""
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    positive = np.array(labels) == 1
    n, m = positive.sum(), (~positive).sum()
    return (ranks[positive].sum() - n * (n + 1) / 2) / (n * m)


def bench_classifier(folder):
    for task, read in (("blocks", blocks_of_pages), ("code", pieces_of_code)):
        rows = list(read(folder))
        kept, held = [row[:2] for row in rows if not row[2]], [row[:2] for row in rows if row[2]]
        labels = [label for _, label in held]
        size = sum(len(text.encode()) for text, _ in kept)
        print(f"classifier: {task}: {len(kept):,} training texts of {size / 1e6:.1f} MB, {len(held):,} held out, "
              f"{np.mean(labels):.0%} of them positive", flush=True)
        kinds = [[text for text, label in kept if label == kind] for kind in (1, 0)]
        seconds, model = clock(data.train_classifier, *kinds)
        score = auc([model.probabilities(text)[1] for text, _ in held], labels)
        print(f"classifier: {task}: ours AUC {score:.4f}, training {seconds:.1f} s", flush=True)
        for how in [{}, {"wordNgrams": 2}, {"wordNgrams": 2, "epoch": 25}] if fasttext else []:
            # The same tokens as ours: words and marks, lower case.
            spaced = [(" ".join(data.TOKEN.findall(text.lower())), label) for text, label in kept]
            seconds, rival = clock(train_fasttext, spaced, **how)
            scores = [ask_fasttext(rival, " ".join(data.TOKEN.findall(text.lower()))).get("1", 0.0) for text, _ in held]
            print(f"classifier: {task}: fastText {how} AUC {auc(scores, labels):.4f}, training {seconds:.1f} s", flush=True)


def bench_ngrams(tokens):
    for order in range(3, 8):
        seconds, bits = clock(data.ngram_bits_per_byte, tokens, order)
        print(f"ngrams: order {order}: {bits:.4f} bits per byte, {seconds:.1f} s", flush=True)
    data.xz_bits_per_byte(tokens)


def bench_speed(folder):
    texts = [data.extract(gzip.decompress(path.read_bytes())) for path in sorted((folder / "web/aeb_dev").glob("*.html.gz"))]
    size = sum(len(text.encode()) for text in texts)
    for name in [*dict.fromkeys(row[0] for row in data.RULES), *data.MASKS]:
        work = data.FILTERS.get(name) or data.MASKS[name]
        seconds = min(clock(lambda: [work(text) for text in texts])[0] for _ in range(3))
        kept = sum(work(text)[0] is True for text in texts) if name in data.FILTERS else None
        print(f"speed: {name} {size / seconds / 1e6:.1f} MB/s" + f", keeps {kept} of {len(texts)}" * (kept is not None), flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokens", default="")
    parser.add_argument("--more", default="")
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--only", default="language,classifier,ngrams,speed")
    o = parser.parse_args()
    folder, parts = Path(o.data), o.only.split(",")
    if "language" in parts:
        bench_language(folder, o.more, o.folds)
    if "classifier" in parts:
        bench_classifier(folder)
    if "ngrams" in parts and o.tokens:
        bench_ngrams(o.tokens)
    if "speed" in parts:
        bench_speed(folder)


if __name__ == "__main__":
    main()
