"""Quality against cost: one model whole, quantised, pruned, recovered by training, and a smaller one taught by it.

Usage: OMP_NUM_THREADS=1 python tests/bench_compress.py FOLDER [--output=compress] [--iters=600] [--recover=60] [--students=250]

FOLDER has token files and their tokenizer, such as `out` after `python train.py`. The model has 4 layers of width 128, students
have 1 of width 64; none has n-gram tables. All train on batches of 8 x 128 tokens: the model for `iters` steps, students for
`students` steps with two seeds, recoveries for `recover` steps at a tenth of the learning rate. Bits per byte are of the first
65,536 tokens of val.npy. Bytes are those of the weights; where a share is 0, of the others alone, without what says where
they are. A run that is there is not done again.
"""
import argparse
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sample


@torch.inference_mode()
def bits_per_byte(model, tokenizer, tokens):
    """In windows of a block that do not overlap; the first token of each is read alone"""
    T, nats, n_bytes = model.config.block_size, 0.0, 0
    size = torch.tensor([len(token) for token in tokenizer.vocab])
    size[[*tokenizer.special_tokens.values()]] = 0
    for rows in tokens[:(len(tokens) - 1) // T * T].view(-1, T).split(16):
        nats += F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
        n_bytes += size[rows[:, 1:]].sum().item()
    return nats / math.log(2) / n_bytes


def weights_of(model):
    return sum(weight.element_size() * (weight != 0).sum().item() if weight.is_floating_point() else weight.nbytes for weight in model.parameters())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=Path("compress"))
    parser.add_argument("--iters", type=int, default=600)
    parser.add_argument("--recover", type=int, default=60)
    parser.add_argument("--students", type=int, default=250)
    args = parser.parse_args()
    args.output.mkdir(exist_ok=True)
    tokens = torch.from_numpy(np.load(args.folder / "val.npy")[:2**16].astype(np.int64))

    def train(name, *words):
        ckpt = args.output / name / "ckpt.pt"
        if not (ckpt.parent / "done").exists():
            print(f"training {name}", file=sys.stderr)
            subprocess.run([sys.executable, ROOT / "train.py", f"--data={args.folder}", f"--output={ckpt.parent}", "--batch_size=8", "--device=cpu",
                            "--block_size=128", "--ngram=0", "--eval_interval=10000", "--eval_tokens=16384", "--sample_tokens=0", *words], check=True, stdout=subprocess.DEVNULL)
            (ckpt.parent / "done").touch()
        return ckpt

    def prune(how):
        ckpt = args.output / f"{how.replace(':', '')}.pt"
        if not ckpt.exists():
            subprocess.run([sys.executable, ROOT / "sample.py", f"--ckpt={full}", f"--prune={how}", f"--output={ckpt}"], check=True)
        return ckpt

    def row(name, command, *ckpts, quantize=""):
        found, size = [], 0
        for ckpt in ckpts:
            model, tokenizer = sample.load(str(ckpt), "cpu")
            if quantize:
                sample.quantise(model, quantize)
            found.append(bits_per_byte(model, tokenizer, tokens))
            size = weights_of(model)
        print(f"| {name} | `{command}` | {size / 1e6:.2f} | {', '.join(f'{value:.3f}' for value in found)} |", flush=True)

    print("| model | made by | MB | bits per byte |\n|---|---|---|---|")
    full = train("full", "--n_layer=4", "--n_embd=128", f"--max_iters={args.iters}")
    row("whole", "train.py", full)
    for kind in ("int8", "int4"):
        row(kind, f"sample.py --quantize={kind}", full, quantize=kind)
    more = ["--learning_rate=0.001", f"--max_iters={args.recover}"]
    row(f"whole, {args.recover} steps more", "train.py --init_from", train("more", f"--init_from={full}", *more))
    for how in ("0.5", "layers:1"):
        row(f"{how} pruned", f"sample.py --prune={how}", prune(how))
        again = train(f"again-{how.replace(':', '')}", f"--init_from={prune(how)}", *more)
        row(f"the same, {args.recover} steps more", "train.py --init_from", again)
    for weight, name in ((0, "student"), (0.5, "student with a teacher")):
        taught = [f"--teacher={full}", f"--teacher_weight={weight}"] * (weight > 0)
        runs = [train(f"student-{weight}-{seed}", "--n_layer=1", "--n_embd=64", f"--max_iters={args.students}", f"--seed={seed}", *taught)
                for seed in (0, 1)]
        row(name, f"train.py --teacher --teacher_weight={weight}" if taught else "train.py", *runs)
    print(f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
