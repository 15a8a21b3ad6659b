"""Decode 256 tokens with the state and by calling the model anew for each, by turns in one run, on random weights.

Usage: python tests/bench_decode.py [runs]

Prints the machine, the medians and their ratio. Exit code 1 if the tokens differ or the ratio is under the goal.
"""
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model  # noqa: E402
import sample  # noqa: E402

GOAL = 5  # times as fast with the state as without
SHAPE = model.Config(vocab_size=8192, block_size=512, n_layer=4, n_head=4, n_embd=256, init="gpt2")
PROMPT = list(range(256))


def with_state(gpt, count):
    request = sample.Request(PROMPT, count, sample.Sampling(temperature=0))
    engine = sample.Engine(gpt, [request])
    while engine.step():
        pass
    return request.output


@torch.inference_mode()
def without(gpt, count):
    context = list(PROMPT)
    for _ in range(count):
        context.append(int(gpt.head(gpt.hidden(torch.tensor([context]))[0, -1]).argmax()))
    return context[len(PROMPT):]


def main(runs=5):
    torch.manual_seed(0)
    gpt = model.GPT(SHAPE).eval()
    speeds, outputs = {with_state: [], without: []}, {}
    with_state(gpt, 8), without(gpt, 8)  # the first calls are slow
    for decode in (with_state, without) * runs:
        started = time.perf_counter()
        outputs[decode] = decode(gpt, 256)
        speeds[decode].append(256 / (time.perf_counter() - started))
    cached, plain = (statistics.median(speeds[decode]) for decode in (with_state, without))
    same = outputs[with_state] == outputs[without]
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, "
          f"torch {torch.__version__}")
    print(f"{sum(p.numel() for p in gpt.parameters()):,} parameters, block {SHAPE.block_size}, 256 tokens in, 256 out, "
          f"median of {runs} runs each, prompt included")
    print(f"with the state  {cached:8.1f} tokens/s\nwithout         {plain:8.1f} tokens/s")
    print(f"ratio           {cached / plain:8.1f} (goal: {GOAL}), tokens {'the same' if same else 'DIFFERENT'}")
    sys.exit(not (same and cached / plain >= GOAL))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
