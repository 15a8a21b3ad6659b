"""Speed of bpe.py beside its peers, on the default corpus, alternating in one run: python tests/bench_bpe.py

Both sides use all the cores they are given, and start-up of processes is included; the files are read before. The
tokenizer is loaded freshly for each encoding; tiktoken has GPT-2's pattern as it publishes it. One column is wall time, the
other processor time of all processes, which other programs on the machine disturb less. The ids are compared.
Run it under `taskset -c 0,1` for two cores. Arguments: number of rounds (3), share of files (1).

    python tests/bench_bpe.py memory FILE

trains 32,000 tokens on a quarter of a text, then on all of it, and prints the peak memory of all processes, seconds, and how
many distinct pieces there are.
"""
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
os.environ.setdefault("RAYON_NUM_THREADS", str(CORES))
os.environ["TOKENIZERS_PARALLELISM"] = "true"

import tiktoken
import tokenizers

import bpe

PUBLISHED = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
DIGITS = r"\p{L}+|\p{N}|[^\p{L}\p{N}]"  # a pattern of the user's own


def read():
    documents, held = [], ""
    for text, ends in bpe.read_parts(bpe.find_files(""), "", {}):
        held += text
        if ends:
            documents.append(held)
            held = ""
    return documents


def theirs_train(documents, size):
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.pre_tokenizer = byte_level(add_prefix_space=False)  # its pattern is GPT-2's
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size - 1, show_progress=False, initial_alphabet=byte_level.alphabet())
    peer.train_from_iterator(documents, trainer)
    return peer


def timed(call):
    """(wall seconds, processor seconds of this process and its children, what the call gave)"""
    began, before = time.perf_counter(), sum(os.times()[:4])
    out = call()
    return time.perf_counter() - began, sum(os.times()[:4]) - before, out


def compare(what, rounds, ours, theirs, same=lambda a, b: None):
    """Alternate the two calls; print medians and their ratio, for wall and for processor time."""
    times = []
    for _ in range(rounds):
        a, b = timed(ours), timed(theirs)
        same(a[2], b[2])
        times.append((*a[:2], *b[:2]))
    wall, cpu, their_wall, their_cpu = map(statistics.median, zip(*times))
    print(f"| {what} | {wall:.2f} s | {their_wall:.2f} s | {wall / their_wall:.2f} | {cpu:.2f} s | {their_cpu:.2f} s | {cpu / their_cpu:.2f} |", flush=True)


def equal(ours, theirs):
    assert [list(ids) for ids in ours] == theirs, "the ids differ"


def memory(path):
    """Peak memory and time of training on a part and on the whole of a text."""
    from bench_data import measured
    for share in (0.25, 1):
        with tempfile.TemporaryDirectory() as folder, open(path, "rb") as text:
            part, size = Path(folder, "part.txt"), int(share * os.path.getsize(path))
            with open(part, "wb") as file:
                for start in range(0, size, 1 << 20):
                    file.write(text.read(min(1 << 20, size - start)))
            words = ["bpe.py", f"--input={part}", "--vocab_size=32000", f"--output={folder}/tokenizer.json"]
            peak, seconds = measured(words)
            counts, seen = Counter(), bpe.Pieces()
            for chunk in bpe.chunks((text for text, _ in bpe.read_parts([part], "", {})), bpe.PATTERNS["gpt2"], bpe.BLOCK):
                counts.update(bpe.count_pieces(chunk, bpe.PATTERNS["gpt2"], [bpe.END], 0, seen))
        print(f"{size / 1e6:,.0f} MB, {len(counts):,} distinct pieces: peak memory {peak / 1e6:,.0f} MB, {seconds:.0f} s", flush=True)


def main():
    if sys.argv[1:2] == ["memory"]:
        return memory(sys.argv[2])
    rounds, share = (kind(word) for kind, word in zip((int, float), [*sys.argv[1:], *"3 1".split()[len(sys.argv) - 1:]]))
    documents = read()[::round(1 / share)]
    print(f"{len(documents)} documents, {sum(len(text.encode()) for text in documents) / 1e6:.1f} MB; {CORES} cores of "
          f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, tokenizers {tokenizers.__version__}, "
          f"tiktoken {tiktoken.__version__}; load {os.getloadavg()[0]:.1f}")
    print(f"| median of {rounds} alternating runs | bpe.py | peer | ours / peer | processor time | of the peer | ours / peer |")
    print("|---|---|---|---|---|---|---|")
    for size in (10_257, 32_257):
        compare(f"training {size - 257} merges: tokenizers", rounds, lambda: bpe.train("bpe", documents, size, workers=CORES),
                lambda: theirs_train(documents, size))
    tokenizer = bpe.train("bpe", documents, 32_257, workers=CORES)
    state, ranks = tokenizer.to_dict(), {token: i for i, token in enumerate(tokenizer.vocab[:-1])}

    def peer(pattern=PUBLISHED):
        return tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def fresh(**change):
        return bpe.from_dict(state | change).encode_batch(documents, CORES)
    compare("encoding to arrays: tiktoken", rounds, fresh, lambda: peer().encode_ordinary_batch(documents, num_threads=CORES), equal)
    compare("encoding to lists: tiktoken", rounds, lambda: [ids.tolist() for ids in fresh()],
            lambda: peer().encode_ordinary_batch(documents, num_threads=CORES))
    compare("encoding to arrays, GPT-4's pattern: tiktoken", rounds, lambda: fresh(pattern=bpe.PATTERNS["gpt4"]),
            lambda: peer(CL100K).encode_ordinary_batch(documents, num_threads=CORES), equal)
    compare("encoding to arrays, a pattern of one's own: tiktoken", 1, lambda: fresh(pattern=DIGITS),
            lambda: peer(DIGITS).encode_ordinary_batch(documents, num_threads=CORES), equal)
    ids = fresh()
    lists = [x.tolist() for x in ids]
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = {byte: letter for letter, byte in zip(map(chr, range(256, 324)), bpe.HIDDEN)}
    names = {token: "".join(letters.get(byte, chr(byte)) for byte in token) for token in tokenizer.vocab}
    other = tokenizers.Tokenizer(tokenizers.models.BPE({names[token]: i for token, i in ranks.items()}, [(names[a], names[b]) for a, b in tokenizer.merges]))
    other.pre_tokenizer = byte_level
    compare("encoding to arrays: tokenizers", 1, fresh, lambda: [encoding.ids for encoding in other.encode_batch(documents)], equal)
    compare("decoding arrays to text: tiktoken", rounds, lambda: [tokenizer.decode(x) for x in ids],
            lambda: list(map(peer().decode, lists)))
    text = ("The quick brown fox jumps over the lazy dog, and then it sleeps for 12 hours in the warm sun. " * 2)[:100]
    cold, warm = bpe.from_dict(state), min(timed(lambda: [tokenizer.encode(text) for _ in range(1000)])[0] for _ in range(5))
    print(f"one text of 100 characters: {timed(lambda: cold.encode(text))[0] * 1e6:.0f} microseconds cold, {warm * 1e3:.0f} warm")
    for name, long in [("a", "a" * 10 ** 6), ("space", " " * 10 ** 6), ("letters", "etaoinshrdlu" * 83333)]:
        print(f"1 MB of {name} without a place to cut: {timed(lambda: tokenizer.encode(long))[1]:.2f} s of processor time")


if __name__ == "__main__":
    if "--help" in sys.argv:
        sys.exit(print(__doc__))
    main()
