"""Decode 256 tokens with the state and by calling the model anew for each, by turns in one run, on random weights.

Usage: python tests/bench_decode.py [runs]
       python tests/bench_decode.py CKPT DRAFT VAL.npy [runs]

Prints the machine, the medians and their ratio. Exit code 1 if the tokens differ or the ratio is under the goal.
With a checkpoint: the same without a draft, with lookup and with the draft, on prompts from held-out tokens, greedy and at
temperature 0.8; and what int8 and int4 weights cost in bits per byte on these tokens. The clock is the processor's where
there is one thread.
"""
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model  # noqa: E402
import sample  # noqa: E402

GOAL = 5  # times as fast with the state as without
SHAPE = model.Config(vocab_size=8192, block_size=512, n_layer=4, n_head=4, n_embd=256, init="gpt2")
PROMPT = list(range(256))
CLOCK = time.process_time if torch.get_num_threads() == 1 else time.perf_counter


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
        context.append(int(gpt.logits(gpt.hidden(torch.tensor([context]))[0, -1]).argmax()))
    return context[len(PROMPT):]


def texts_of(gpt, prompts, temperature, draft=lambda request, count: []):
    """One after the other; their tokens, tokens a second of decoding, share of right guesses."""
    outputs, made, right, tokens, seconds = [], 0, 0, 0, 0.0
    for number, prompt in enumerate(prompts):
        request = sample.Request(prompt, 64, sample.Sampling(temperature), number)
        engine = sample.Engine(gpt, [request], draft=draft)
        engine.step()
        started = CLOCK()
        while engine.step():
            pass
        seconds += CLOCK() - started
        tokens += len(request.output) - 1
        made, right = made + engine.guessed[0], right + engine.guessed[1]
        outputs.append(request.output)
    return outputs, tokens / seconds, right / max(made, 1)


@torch.inference_mode()
def bits_per_byte(gpt, tokenizer, ids):
    """Over blocks that do not overlap."""
    nats, size, block = 0.0, 0, gpt.config.block_size
    for start in range(0, 40 * block, block):
        part = torch.tensor(ids[start:start + block + 1])
        nats += torch.nn.functional.cross_entropy(gpt(part[None, :-1])[0], part[1:], reduction="sum").item()
        size += len(tokenizer.decode_bytes(part[1:].tolist()))
    return nats / math.log(2) / size


def drafts(ckpt, draft, tokens, runs=3):
    gpt, tokenizer = sample.load(ckpt, "cpu")
    ids = np.load(tokens)[:40000].astype(int).tolist()
    prompts = [ids[at:at + 96] for at in range(1000, 21000, 5000)]
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, {sum(p.numel() for p in gpt.parameters()):,} parameters")
    engine = sample.Engine(gpt, (), tokenizer.vocab_size)
    ways = {"none": lambda request, count: [], "lookup": sample.look_up, "draft": sample.load_draft(draft, engine)}
    for temperature in (0.0, 0.8):
        speeds, found = {way: [] for way in ways}, {}
        for way in [*ways] * (runs + 1):
            found[way] = texts_of(gpt, prompts, temperature, ways[way])
            speeds[way].append(found[way][1])
        plain = statistics.median(speeds["none"][1:])
        for way in ways:
            speed = statistics.median(speeds[way][1:])
            same = sum(a == b for a, b in zip(found[way][0], found["none"][0]))
            print(f"temperature {temperature}, {way:6} {speed:7.1f} tokens/s, ratio {speed / plain:.2f}, "
                  f"{found[way][2]:.0%} of guesses right, {same} of {len(prompts)} texts the same")
    before = bits_per_byte(gpt, tokenizer, ids)
    for kind in ("int8", "int4"):
        small, _ = sample.load(ckpt, "cpu")
        line = sample.quantise(small, kind)
        loss = bits_per_byte(small, tokenizer, ids)
        print(f"{line}: {before:.4f} to {loss:.4f} bits per byte ({loss / before - 1:+.2%})")


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
    if "--help" in sys.argv:
        sys.exit(print(__doc__))
    if len(sys.argv) > 3:
        drafts(*sys.argv[1:4], *map(int, sys.argv[4:]))
    else:
        main(*map(int, sys.argv[1:]))
