"""Speed of bpe.py beside its peers, on the default corpus, alternating in one run: python tests/bench_bpe.py

Training: 10,000 merges, files read before, start-up of the processes included; both sides use the cores they are given.
Encoding: one process, the whole corpus document by document, the vocabulary just trained, a fresh tokenizer each time,
in turns of 100 documents; it and decoding are measured in processor time, which other programs disturb less.
Run it under `taskset -c 0,1` for two cores. Arguments: number of rounds (3), number of merges (10000), share of files (1).
"""
import os
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
os.environ.setdefault("RAYON_NUM_THREADS", str(CORES))
os.environ["TOKENIZERS_PARALLELISM"] = "true"

import tiktoken
import tokenizers

import bpe


def read():
    documents, held = [], ""
    for text, ends in bpe.read_parts(bpe.find_files(""), "", {}):
        held += text
        if ends:
            documents.append(held)
            held = ""
    return documents


def ours_train(documents, size):
    return bpe.train("bpe", documents, size, workers=CORES)


def theirs_train(documents, size):
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.pre_tokenizer = byte_level(add_prefix_space=False)  # its pattern is GPT-2's
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size - 1, show_progress=False, initial_alphabet=byte_level.alphabet())
    peer.train_from_iterator(documents, trainer)
    return peer


def timed(call, clock=time.process_time):
    began = clock()
    out = call()
    return clock() - began, out


def row(what, ours, theirs, unit):
    a, b = statistics.median(ours), statistics.median(theirs)
    print(f"| {what} | {a:.2f} {unit} ({min(ours):.2f} to {max(ours):.2f}) | {b:.2f} {unit} ({min(theirs):.2f} to {max(theirs):.2f}) "
          f"| {a / b:.2f} |", flush=True)


def main():
    rounds, merges, share = (kind(word) for kind, word in zip((int, int, float), [*sys.argv[1:], *"3 10000 1".split()[len(sys.argv) - 1:]]))
    documents = read()
    documents = documents[::round(1 / share)]
    size, bytes_ = 257 + merges, sum(len(text.encode()) for text in documents)
    print(f"{len(documents)} documents, {bytes_ / 1e6:.1f} MB; {CORES} cores of {platform.processor() or platform.machine()}, Python "
          f"{platform.python_version()}, tokenizers {tokenizers.__version__}, tiktoken {tiktoken.__version__}; load {os.getloadavg()[0]:.1f}")
    print(f"| median of {rounds} alternating runs | bpe.py | peer | ours / peer |\n|---|---|---|---|")
    ours, theirs = [], []
    for _ in range(rounds):
        seconds, tokenizer = timed(lambda: ours_train(documents, size), time.perf_counter)
        ours.append(seconds)
        theirs.append(timed(lambda: theirs_train(documents, size), time.perf_counter)[0])
    row(f"training, {merges} merges: tokenizers", ours, theirs, "s")

    ranks = {token: i for i, token in enumerate(tokenizer.vocab[:-1])}
    ours, theirs, lists = [], [], []
    for _ in range(rounds):
        arrays, plain = bpe.from_dict(tokenizer.to_dict()), bpe.from_dict(tokenizer.to_dict())
        peer = tiktoken.Encoding("ours", pat_str=tokenizer.pattern, mergeable_ranks=ranks, special_tokens={})
        seconds, a = [0.0, 0.0, 0.0], []
        for start in range(0, len(documents), 100):  # the three take turns every 100 documents
            some = documents[start:start + 100]
            outs = []
            for i, encode in enumerate([arrays.encode_ordinary, plain.encode, peer.encode_ordinary]):
                one, out = timed(lambda: [encode(text) for text in some])
                seconds[i] += one
                outs.append(out)
            assert [ids.tolist() for ids in outs[0]] == outs[1] == outs[2], "the ids differ"
            a += outs[0]
        for speeds, one in zip((ours, lists, theirs), seconds):
            speeds.append(bytes_ / 1e6 / one)
    row("encoding to arrays: tiktoken", ours, theirs, "MB/s")
    row("encoding to lists: tiktoken", lists, theirs, "MB/s")
    ours, theirs, ids = [], [], [x.tolist() for x in a]
    for _ in range(rounds):
        ours.append(bytes_ / 1e6 / timed(lambda: [tokenizer.decode(x) for x in a])[0])
        theirs.append(bytes_ / 1e6 / timed(lambda: [peer.decode(x) for x in ids])[0])
    row("decoding: tiktoken", ours, theirs, "MB/s")


if __name__ == "__main__":
    main()
