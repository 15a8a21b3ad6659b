"""What grows smoothly with compute, and what seems to jump: models of growing budgets on the same held-out windows.

Usage: python tests/bench_emergence.py [--data=FOLDER] [--budgets=3e10,1e11,3e11,1e12,3e12] [--plot=emergence.png]

Each budget is a run of `train.py --flops=...` on the token files of FOLDER (none: the default corpus). A model then reads 64 tokens of
4,000 windows of val.npy and has to write the next 1, 2, 4 and 8 of them, greedily. All of them right is the score of a test with one
answer; the bits per byte of the same tokens need no threshold (Schaeffer et al. 2023).
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sample  # noqa: E402

READS, WRITES = 64, (1, 2, 4, 8)


@torch.no_grad()
def scores(ckpt: Path, tokens: np.ndarray) -> list[float]:
    """Bits per byte of the last tokens of each window, and the share of windows whose first 1, 2, 4, 8 of them are all right."""
    gpt, tokenizer = sample.load(ckpt, "cpu")
    starts = np.linspace(0, len(tokens) - READS - WRITES[-1], 4000).astype(int)
    windows = torch.tensor(np.stack([tokens[i:i + READS + WRITES[-1]] for i in starts]).astype(np.int64))
    nats, right = 0.0, []
    for part in windows.split(100):
        logits, goal = gpt(part)[:, READS - 1:-1], part[:, READS:]
        nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), goal.flatten(), reduction="sum").item()
        right.append((logits.argmax(2) == goal).cumprod(1).bool())  # greedy text is right as long as each token before was
    lengths = np.array([len(tokenizer.vocab[i]) if i < len(tokenizer.vocab) else 0 for i in range(gpt.config.vocab_size)])
    lengths[[*tokenizer.special_tokens.values()]] = 0
    found = torch.cat(right).double().mean(0)
    return [nats / np.log(2) / lengths[windows[:, READS:]].sum(), *(found[k - 1].item() for k in WRITES)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="")
    parser.add_argument("--budgets", default="3e10,1e11,3e11,1e12,3e12")
    parser.add_argument("--plot", default="")
    o = parser.parse_args()
    table = []
    with tempfile.TemporaryDirectory() as folder:
        data = o.data or f"{folder}/data"
        if not o.data:
            subprocess.run([sys.executable, ROOT / "data.py", f"--output={data}", "--vocab_size=2048", "--pattern=code"], check=True)
        print("| FLOPs | parameters in products | bits per byte | " + " | ".join(f"{k} right" for k in WRITES) + " |\n|" + "---|" * (3 + len(WRITES)))
        for budget in o.budgets.split(","):
            run = Path(folder) / budget
            subprocess.run([sys.executable, ROOT / "train.py", f"--data={data}", f"--flops={budget}", "--ngram=0", f"--output={run}", "--sample_tokens=0"],
                           check=True, stdout=subprocess.DEVNULL)
            last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
            row = scores(run / "ckpt.pt", np.load(f"{data}/val.npy", mmap_mode="r"))
            table.append((last["flops"], *row))
            print(f"| {last['flops']:.2e} | {last['flops'] / 6 / last['tokens']:,.0f} | {row[0]:.3f} | " + " | ".join(f"{x:.1%}" for x in row[1:]) + " |", flush=True)
    if o.plot:
        import matplotlib
        matplotlib.use("agg")
        from matplotlib import pyplot
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
        flops, bits, *rest = map(np.array, zip(*table))
        left.plot(flops, bits, "o-")
        left.set(xscale="log", xlabel="training FLOPs", ylabel="bits per byte")
        for k, share in zip(WRITES, rest):
            if not share[-1]:  # the last model has no window right, so there is nothing to compare with
                print(f"no line for {k} tokens: the last model has no window right")
                continue
            right.plot(flops, share / share[-1], "o-", label=f"the next {k}" if k > 1 else "the next token")
        right.set(xscale="log", xlabel="training FLOPs", ylabel="share of windows, of the last model's")
        right.legend()
        for axis in (left, right):
            axis.grid(alpha=0.3)
        figure.savefig(o.plot, dpi=120)
        print(f"{os.path.basename(o.plot)} written")


if __name__ == "__main__":
    main()
