"""What train.py's loop costs, and whether its memory is the predicted one, at the shape of the default run.

Usage: python tests/bench_loop.py [--blocks=9] [--steps=10]

loop    speed of Run.train_step over that of a bare forward, backward and update on one batch in memory, by turns: blocks
        of steps of each, the median of their processor times (which other programs on the cores change less than wall
        time). The goal is 0.97.
pause   share of its time that training stands still for checkpoints, one in each block.
memory  bytes of weights, gradients, optimizer and of the tensors saved for the backward pass (counted by hooks, each
        storage once), over those that --account predicts.
"""
import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
import train


def saved_bytes(run, sources):
    """Bytes of the tensors that autograd keeps between a forward and a backward pass of a whole batch."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    rows = np.arange(run.o.batch_size)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = run.loss(*run.windows(sources, 0 * rows, rows))
    for tensor in (*run.gpt.parameters(), *run.gpt.buffers()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    loss.backward()
    run.gpt.zero_grad(set_to_none=True)
    return sum(kept.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    V = 2048
    tokens = np.random.default_rng(0).integers(V, size=5_000_000).astype(np.uint16)
    sources = [train.Source(tokens, np.broadcast_to(np.True_, tokens.shape))]
    with tempfile.TemporaryDirectory() as folder:
        o = train.recipe(train.Options(device="cpu", output=folder), len(tokens), V, 1e11)
        o.ngram = 0  # gradients of tables are sparse, which the prediction counts in full
        run = train.Run(o, V, SimpleNamespace(vocab=[], special_tokens={}, to_dict=dict), {})
        run.corpus = ""
        windows = [torch.from_numpy(tokens[:o.batch_size * o.block_size].astype(np.int64).reshape(o.batch_size, -1))] * 2

        def bare():
            loss, count = run.objective(*windows)
            loss.backward()
            run.update(count.item())

        times = {"bare": [], "loop": []}
        for block in range(args.blocks):
            for name, step in (("bare", bare), ("loop", lambda: run.train_step(sources, False))):
                began = time.process_time()
                for _ in range(args.steps):
                    step()
                times[name].append(time.process_time() - began)
            run.save("ckpt.pt")
        run.written()
        cost = model.account(run.gpt.config, o.batch_size, o.optimizer)
        saved = saved_bytes(run, sources)
        state = sum(tensor.nbytes for tensors in run.state.values() for tensor in tensors)
        weights = sum(weight.nbytes for weight in run.gpt.parameters())
        found, predicted = saved + state + 2 * weights, cost["memory_total"]
    ratio = statistics.median(bare / loop for bare, loop in zip(times["bare"], times["loop"]))
    each = {name: 1e3 * statistics.median(values) / args.steps for name, values in times.items()}
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    print(f"loop    {ratio:.3f} of the bare step's speed ({each['loop']:.1f} and {each['bare']:.1f} ms of processor time)")
    print(f"pause   {run.paused / run.progress.seconds:.3%} of training time, {args.blocks} checkpoints of {args.steps} steps each")
    print(f"memory  {found / predicted:.3f} of the prediction ({found / 2**20:.1f} and {predicted / 2**20:.1f} MiB)")


if __name__ == "__main__":
    main()
