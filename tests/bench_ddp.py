"""What ddp.py hides and saves: communication behind the backward pass, and activations by ring attention.

Usage: OMP_NUM_THREADS=1 python tests/bench_ddp.py overlap [--ranks=2] [--share=0.5] [--steps=5] [--real]
       OMP_NUM_THREADS=1 python tests/bench_ddp.py ring [--ranks=4] [--tokens=16384]
       OMP_NUM_THREADS=1 python tests/bench_ddp.py memory [--ranks=2] (on Linux)

overlap  steps of each form by turns, medians of the slower rank. The link is throttled by Group.delay, so that all gradients
         take `share` of a step without communication. Hidden is 1 - (step - step without) / (the same form, after the
         backward pass - step without); a step without communication is that of a group of one. Layers sleep, 20 ms forward
         and 40 ms backward, as a CPU does while an accelerator works, so that other programs change little; with --real
         a model of 8 layers is computed.
ring     bytes saved for the backward pass (by hooks, each storage once) in one process and at each rank; the pairs of queries
         and keys that each rank multiplies; how far the loss is from that of one process.
memory   peak of what a process has in memory over three steps of AdamW, beyond what it had before the model was made: our forms
         and torch's, each in processes of its own; of 25 million parameters, of which four times is what none can do without
         (weights, gradients, two moments).
"""
import argparse
import math
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ddp
import train
from model import GPT, Config

MEMORY = {  # what trains, its stage and more
    "ddp, 25 MiB buckets": (ddp.Sharder, 0),
    "ddp, one message": (ddp.Sharder, 0, math.inf, False),
    "torch_ddp": (ddp.TorchSharder, 0),
    "fsdp": (ddp.Sharder, 3),
    "torch_fsdp": (ddp.TorchSharder, 3),
}
FORMS = {  # stage, gradients that travel together as a share of all
    "one message a parameter": (0, 0.0),
    "in buckets": (0, 1 / 8),
    "fsdp": (3, 1.0),
}


def slowest(seconds):
    """The largest of all ranks' numbers"""
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def asleep(seconds, x):
    time.sleep(seconds)
    return x


class Sleeping(torch.nn.Module):
    """Layers that take time and no processor"""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(16))

    def forward(self, x, _):
        for layer in self.layers:
            x = ddp.Through.apply(layer(x), lambda x: asleep(0.02, x.clone()), lambda grad: asleep(0.04, grad))
        return x.sum(), None


def overlap(args):
    n, rank = dist.get_world_size(), dist.get_rank()
    every, alone = ddp.Mesh(f"dp{n}", n).group("dp"), ddp.Group([rank])
    config = Config(vocab_size=256, block_size=128, n_layer=8, n_head=4, n_embd=128, init="gpt2")
    windows = torch.randint(256, (2, 4, 128), generator=torch.Generator().manual_seed(rank))
    windows = windows if args.real else torch.ones(2, 1, 64, requires_grad=True)

    def form(group, stage, bucket, overlap):
        torch.manual_seed(0)
        objective = train.Objective(GPT(config)) if args.real else Sleeping()
        size = sum(p.nbytes for p in objective.parameters())
        sharder = ddp.Sharder(objective, group, stage, bucket * size, overlap)

        def step():
            dist.barrier()
            began, sent = time.perf_counter(), ddp.Group.sent
            sharder.begin()
            objective(*windows)[0].backward()
            sharder.sync()
            sharder.spread()
            return slowest(time.perf_counter() - began), ddp.Group.sent - sent
        return step
    steps = {}
    for name, how in FORMS.items():
        steps |= {(name, "none"): form(alone, *how, False), (name, "after"): form(every, *how, False), (name, "beside"): form(every, *how, True)}
    for step in steps.values():
        step()
    first = "one message a parameter"
    compute = statistics.median(steps[first, "none"]()[0] for _ in range(5))
    ddp.Group.delay = args.share * compute / steps[first, "after"]()[1]
    took = {key: [] for key in steps}
    for _ in range(args.steps):
        for key, step in steps.items():
            took[key].append(step()[0])
    took = {key: 1000 * statistics.median(values) for key, values in took.items()}
    print(f"{n} ranks, {1e-6 / ddp.Group.delay:.1f} MB/s, load {os.getloadavg()[0]:.1f}; ms of a step without communication, with it after, "
          "beside the backward pass; share hidden")
    for name in FORMS:
        none, after, beside = (took[name, how] for how in ("none", "after", "beside"))
        print(f"{name:24} {none:8.1f} {after:8.1f} {beside:8.1f} {1 - (beside - none) / (after - none):7.0%}")


def saved_bytes(forward, module):
    """What `forward` gives, and bytes of the tensors that autograd keeps for its backward pass, weights left out"""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward()
    for tensor in module.parameters():
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return out, sum(kept.values())


def ring_shares(T, alone=True):
    """(bytes saved in one process or None, bytes saved here, query-key pairs here, seconds here, difference of the losses)"""
    n = dist.get_world_size()
    config = Config(vocab_size=64, block_size=T, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, init="gpt2")
    windows = torch.randint(64, (2, 1, T), generator=torch.Generator().manual_seed(0))

    def model():
        torch.manual_seed(0)
        return train.Objective(GPT(config))
    whole, loss = None, torch.zeros(())
    if alone:
        one = model()
        (loss, _), whole = saved_bytes(lambda: one(*windows), one)
        del one
    objective = model()
    split = ddp.Split(objective, ddp.Mesh(f"cp{n}", n), ddp.Options(), 1)
    dist.barrier()
    began = time.process_time()
    (mine, _), saved = saved_bytes(lambda: objective(*map(split.part, windows)), objective)
    mine.backward()
    seconds = time.process_time() - began
    half = T // (2 * n)
    pairs = sum(half * (half + 1) // 2 if causal else half**2 for turn in range(n) for *_, causal in ddp.Ring.pairs(split.cp, turn))
    total = mine.detach().double()
    dist.all_reduce(total)
    return whole, saved, pairs, seconds, abs(total - loss.detach()).item() / T


def ring(args):
    n = dist.get_world_size()
    found = ring_shares(args.tokens, alone=dist.get_rank() == 0)
    rows = [None] * n
    dist.all_gather_object(rows, found)
    whole = rows[0][0]
    print(f"{n} ranks, {args.tokens:,} tokens; one process keeps {whole / 2**20:.2f} MiB; loss differs by {rows[0][4]:.1e} nats a token")
    for rank, (_, saved, pairs, seconds, _) in enumerate(rows):
        print(f"rank {rank}: {saved / 2**20:.2f} MiB, {saved / whole:.3f} of it; {pairs:,} pairs, "
              f"{pairs * 2 / args.tokens / (args.tokens + 1):.4f} of all; {seconds:.1f} s of processor time")
    print(f"most pairs over fewest: {max(row[2] for row in rows) / min(row[2] for row in rows):.4f}")


def peak_bytes(form):
    """Bytes of this process at their peak while it trains in a form, less those before; bytes of the parameters; the last loss"""
    def status(name):
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    n, rank = dist.get_world_size(), dist.get_rank()
    config = Config(vocab_size=256, block_size=64, n_layer=8, n_head=8, n_embd=512, init="gpt2")
    windows = torch.randint(256, (2, 1, 64), generator=torch.Generator().manual_seed(rank))
    kind, stage, *more = MEMORY[form]
    group = ddp.Mesh(f"dp{n}", n).group("dp")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    torch.manual_seed(0)
    objective = train.Objective(GPT(config))
    size = sum(p.nbytes for p in objective.parameters())
    sharder = kind(objective, group, stage, *more)
    run = getattr(sharder, "run", objective)
    optimizer = torch.optim.AdamW(sharder.pieces.values(), foreach=False)
    for _ in range(3):
        loss = run(*windows)[0]
        loss.backward()
        sharder.sync()
        optimizer.step()
        sharder.spread()
    return status("VmHWM") - before, size, loss.item()


def memory(args):
    rows = [None] * dist.get_world_size()
    dist.all_gather_object(rows, peak_bytes(args.form))
    peak, size, loss = max(row[0] for row in rows), rows[0][1], sum(row[2] for row in rows)
    print(f"{args.form:32} {peak / 2**20:8.0f} MiB, {peak / size:5.2f} times the parameters; loss after three steps {loss:.4f}", flush=True)


def process(rank, args, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=args.ranks)
    sys.stdout = open(os.devnull, "w") if rank else sys.stdout
    dict(overlap=overlap, ring=ring, memory=memory)[args.what](args)
    dist.barrier()
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overlap", "ring", "memory"))
    parser.add_argument("--ranks", type=int, default=0)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--tokens", type=int, default=16384)
    args = parser.parse_args()
    args.ranks = args.ranks or dict(overlap=2, ring=4, memory=2)[args.what]
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back to the system, so that it is not counted
    for form in MEMORY if args.what == "memory" else [""]:
        args.form = form
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(process, (args, folder), args.ranks)


if __name__ == "__main__":
    main()
