"""Time to a validation loss on a small text, on the CPU: nanoGPT's published recipe beside train.py, by turns in one run.

Usage: python tests/bench_train.py shakespeare.txt [--pairs=3] [--iters=2000] [-- more words for train.py]

A  nanoGPT's recipe for tiny Shakespeare on a CPU, in its own loop below: 2,000 steps, then the loss over the whole
   last tenth of the text. On tiny Shakespeare it lands at 1.90 +- 0.02; if not, a line says so. --iters: a quick try.
B  python train.py --data=FILE --tokenizer=char --output=TMP, a process of its own with the same default of threads.
   Counted are the seconds in its log at the first evaluation with a loss at or below A's; inf where it gets to none.

Both count seconds of training alone: no start, no tokenising, no evaluation. CUDA is hidden from train.py; where torch
has another accelerator, add `-- --device=cpu`. A's seed changes with the pair, B's is train.py's default.
Reference: Karpathy 2022, github.com/karpathy/nanoGPT (README, "I only have a macbook"; the figures, not the code).
"""
import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

LAYERS, HEADS, WIDTH, BLOCK, BATCH = 4, 4, 128, 64, 12
PEAK, FLOOR = 1e-3, 1e-4  # learning rate after warm-up and at the end
LANDS, SLACK = 1.90, 0.02  # A's loss on tiny Shakespeare
GOAL, PLAIN_GOAL = 1 / 30, 1 / 10  # of A's time; without tables of n-grams


class Block(nn.Module):
    """A layer of GPT-2: x (B, T, C) -> (B, T, C)"""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv, self.mix = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)
        for residual in (self.mix, self.down):
            residual.std = 0.02 / math.sqrt(2 * LAYERS)

    def forward(self, x):
        heads = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1))  # (B, T, 3, H, hd)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, H, T, hd)
        x = x + self.mix(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Peer(nn.Module):
    """GPT-2 with tied embeddings: tokens (B, T) -> logits (B, T, V)"""

    def __init__(self, vocab_size):
        super().__init__()
        self.token, self.position = nn.Embedding(vocab_size, WIDTH), nn.Embedding(BLOCK, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=getattr(module, "std", 0.02))

    def forward(self, tokens):
        x = self.token(tokens) + self.position.weight[:tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.token.weight)


def rate(step, iters):
    """Up in a line over the first twentieth (100 of 2,000 steps), then half a cosine down."""
    warmup = iters // 20
    if step < warmup:
        return PEAK * (step + 1) / (warmup + 1)
    return FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * (step - warmup) / (iters - warmup))) / 2


def train_peer(tokens, iters):
    """The recipe on tokens (N): (model, seconds)."""
    peer = Peer(int(tokens.max()) + 1)
    matrices = [weight for weight in peer.parameters() if weight.dim() == 2]  # embeddings are among them
    gains = [weight for weight in peer.parameters() if weight.dim() < 2]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=gains, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.99))
    train = tokens[:len(tokens) * 9 // 10]
    began = time.perf_counter()
    for step in range(iters):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, iters)
        starts = torch.randint(len(train) - BLOCK, (BATCH, 1))
        windows = train[starts + torch.arange(BLOCK + 1)]  # (B, T + 1)
        F.cross_entropy(peer(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return peer, time.perf_counter() - began


@torch.no_grad()
def loss_over(peer, val):
    """Nats per token over all of val (N) but its first token, in windows that do not overlap; the last may be short."""
    total, whole = 0.0, (len(val) - 1) // BLOCK * BLOCK
    batches = list(zip(val[:whole].view(-1, BLOCK).split(128), val[1:whole + 1].view(-1, BLOCK).split(128)))
    if whole < len(val) - 1:
        batches.append((val[None, whole:-1], val[None, whole + 1:]))
    for tokens, targets in batches:
        total += F.cross_entropy(peer(tokens).flatten(0, 1), targets.flatten(), reduction="sum").item()
    return total / (len(val) - 1)


def run_train(file, more):
    """Run train.py on the file: the evaluations in its log."""
    script = Path(__file__).resolve().parent.parent / "train.py"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(script), f"--data={file}", "--tokenizer=char", f"--output={folder}", *more]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
        if done.returncode:
            sys.exit(f"bench_train.py: train.py ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [record for record in records if "val_loss" in record]  # the first line is about the run


def machine():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (f"{(models or [platform.processor() or platform.machine()])[0]}, {os.cpu_count()} cores, "
            f"{torch.get_num_threads()} threads{load}, torch {torch.__version__}")


def main():
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default="")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--iters", type=int, default=2000)
    args, more = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1:]
    if not Path(args.file).is_file() or min(args.pairs, args.iters) < 1:
        sys.exit(f"bench_train.py: needs a text file (given: {args.file!r}), --pairs and --iters of 1 or more")
    text = Path(args.file).read_bytes().decode("utf-8", errors="replace")
    tokens = torch.from_numpy(np.unique(list(text), return_inverse=True)[1])  # characters, numbered in their order
    print(f"{machine()}\n{len(text):,} characters, {int(tokens.max()) + 1} kinds; A: {args.iters} steps; "
          f"B: train.py --tokenizer=char{''.join(' ' + word for word in more)}\n")
    print("| pair | A seconds | A loss | B seconds to A's loss | B / A | B seconds in all | B loss at the end |\n"
          "|---|---|---|---|---|---|---|", flush=True)
    row, rows = "| {} | {:.1f} | {:.4f} | {:.1f} | {:.3f} | {:.1f} | {:.4f} |", []
    for pair in range(args.pairs):
        torch.manual_seed(1337 + pair)
        peer, seconds = train_peer(tokens, args.iters)
        loss = loss_over(peer, tokens[len(tokens) * 9 // 10:])
        log = run_train(args.file, more)
        reached = next((record["seconds"] for record in log if record["val_loss"] <= loss), math.inf)
        rows.append((seconds, loss, reached, reached / seconds, log[-1]["seconds"], log[-1]["val_loss"]))
        print(row.format(pair + 1, *rows[-1]), flush=True)
    print(row.format("median", *map(statistics.median, zip(*rows))))
    print(f"\ngoal for B / A: at most {PLAIN_GOAL if '--ngram=0' in more else GOAL:.3f}")
    off = [f"{loss:.4f}" for _, loss, *_ in rows if abs(loss - LANDS) > SLACK]
    if off:
        print(f"warning: A's loss {', '.join(off)} is not {LANDS:.2f} +- {SLACK}: another text, --iters, or a mistake in A")


if __name__ == "__main__":
    main()
