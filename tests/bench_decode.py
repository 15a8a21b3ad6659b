"""Decode 256 tokens with the cache and without, by turns in one run, on a model of random weights.

Usage: python tests/bench_decode.py [runs]

Prints the machine, the medians and their ratio. Exit code 1 if the tokens differ or the ratio is under the goal.
"""
import os
import platform
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model  # noqa: E402
import sample  # noqa: E402

GOAL = 5  # times as fast with the cache as without
SHAPE = model.Config(vocab_size=8192, block_size=512, n_layer=4, n_head=4, n_embd=256, init="gpt2")


def main(runs=5):
    torch.manual_seed(0)
    gpt = model.GPT(SHAPE).eval()
    sample.bench(gpt, 8, 1)  # the first calls are slow
    found = sample.bench(gpt, 256, runs)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, "
          f"torch {torch.__version__}")
    print(f"{sum(p.numel() for p in gpt.parameters()):,} parameters, block {SHAPE.block_size}, 256 tokens in, 256 out, "
          f"median of {runs} runs each, prompt included")
    print(f"with the cache  {found['cached']:8.1f} tokens/s\nwithout         {found['plain']:8.1f} tokens/s")
    print(f"ratio           {found['ratio']:8.1f} (goal: {GOAL}), tokens {'the same' if found['same'] else 'DIFFERENT'}")
    sys.exit(not (found["same"] and found["ratio"] >= GOAL))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
