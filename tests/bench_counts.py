"""Counts of n-grams, a network, and both: bits per byte of the held-out documents of a run of train.py on its own text.

Usage: python tests/bench_counts.py [out] [--orders=3,4,6]

OUT is the folder of a run without --counts that has made its own token files. The counts are Kneser-Ney's over all of train.npy; the
network has seen the part that its steps read. Both together: weight x p(network) + (1 - weight) x p(counts), token by token (Jelinek
and Mercer 1980). The weight is fitted on the first half of val.npy, and all figures are of the second half.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import sample  # noqa: E402


@torch.no_grad()
def network_bits(gpt: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """-log2 p of each token but the first, from windows side by side as in train.py's evaluation: (N - 1)."""
    T, found = gpt.config.block_size, []
    for start in range(0, len(tokens) - 1, T):
        window = torch.from_numpy(tokens[start:start + T + 1].astype(np.int64))
        found.append(torch.nn.functional.cross_entropy(gpt(window[None, :-1])[0], window[1:], reduction="none"))
    return torch.cat(found).double().numpy() / np.log(2)


def mixed(weight: float, network: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """-log2 of the mean of both probabilities."""
    return -np.log2(weight * 2**-network + (1 - weight) * 2**-counts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", default="out")
    parser.add_argument("--orders", default="3,4,6")
    o = parser.parse_args()
    folder = Path(o.out)
    train, val = np.load(folder / "train.npy"), np.load(folder / "val.npy")
    gpt, tokenizer = sample.load(folder / "ckpt.pt", "cpu")
    if gpt.config.counts:
        sys.exit(f"{folder} is a run with --counts: its probabilities are not the network's alone")
    lengths = np.array([len(word) for word in tokenizer.vocab] + [0] * (gpt.config.vocab_size - len(tokenizer.vocab)))
    lengths[[*tokenizer.special_tokens.values()]] = 0
    half = len(val) // 2
    size = lengths[val[1:][half:]].sum()
    network = network_bits(gpt, val)
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    print(f"| expert | n-grams kept | seconds | alone | with the network | its weight |\n|---|---|---|---|---|---|\n"
          f"| network, {last['tokens'] / len(train):.2f} epochs | - | {last['seconds']:.0f} | {network[half:].sum() / size:.3f} | - | - |")
    for order in map(int, o.orders.split(",")):
        began = time.perf_counter()
        model = data.train_ngrams(train, gpt.config.vocab_size, order)
        counts, seconds = model.bits(val)[1:], time.perf_counter() - began
        weights = np.linspace(0, 1, 101)[1:-1]
        weight = min(weights, key=lambda one: mixed(one, network[:half], counts[:half]).sum())
        print(f"| counts up to {order} tokens | {model.sizes.sum():,} | {seconds:.0f} | {counts[half:].sum() / size:.3f} "
              f"| {mixed(weight, network[half:], counts[half:]).sum() / size:.3f} | {weight:.2f} |", flush=True)


if __name__ == "__main__":
    main()
