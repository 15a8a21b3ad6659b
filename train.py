"""Train a language model: text or tokens in, a checkpoint out. With no options: on the Python standard library's text.

Reads: text files, folders, jsonl; or a folder with train.npy and val.npy (and tokenizer.json).
Writes: OUTPUT/ckpt.pt (last), best.pt, log.jsonl, tokenizer.json; train.npy and val.npy where the data was text.
Usage: python train.py
       python train.py --data=shakespeare.txt --tokenizer=char
       torchrun --nproc_per_node=2 train.py --data=tokens --output=run
References: Loshchilov and Hutter 2019 (AdamW); Jordan et al. 2024 (Muon); Hu et al. 2024 (WSD schedule).
"""
import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import model
from model import GPT, ROLES, Config, replacing, require


@dataclasses.dataclass
class Options(Config):
    vocab_size: int = 0  # token ids of a tokenizer that is trained here (0: 2048)
    block_size: int = 0  # context in tokens (0: chosen by recipe, as below)
    n_layer: int = 0  # number of layers (0: recipe)
    n_head: int = 0  # number of query heads (0: one for each 64 channels)
    n_embd: int = 0  # width of the residual stream (0: recipe)
    ffn: str = "relu2"  # relu2, swiglu, relu, gelu
    tie_embeddings: bool = False  # one matrix for the token embedding and the head
    data: str = ""  # text files, folders, jsonl (a comma list), or a folder of token files; empty: standard library
    tokenizer: str = "bpe"  # bpe, char, byte, word, or a tokenizer file
    pattern: str = ""  # how bpe cuts text before merging (empty: gpt2; code for the default data)
    separator: str = ""  # text between the documents of a file, such as <|endoftext|>
    output: str = "out"  # folder of the run
    resume: bool = False  # go on from OUTPUT/ckpt.pt, with its options where none are given
    max_iters: int = 0  # training steps (0: recipe)
    batch_size: int = 0  # sequences of a step, over all ranks and micro-batches (0: recipe)
    micro_batch: int = 0  # sequences that a rank runs at a time (0: as many as fit in memory)
    optimizer: str = "muon"  # of hidden matrices: muon, adamw; all else has adamw
    learning_rate: float = 0.01  # at its peak
    weight_decay: float = 0.1  # of matrices; a step shrinks them by learning rate x weight decay
    beta1: float = 0.9  # AdamW's memory of the gradient
    beta2: float = 0.95  # AdamW's memory of the squared gradient
    momentum: float = 0.95  # Muon's memory of the gradient
    grad_clip: float = 1.0  # largest norm of the gradient (0: any)
    schedule: str = "wsd"  # of the learning rate: wsd, cosine
    warmup_iters: int = 0  # steps in which the learning rate rises
    decay_share: float = 0.6  # share of the steps in which wsd falls
    eval_interval: int = 0  # steps between evaluations, a checkpoint before each (0: recipe)
    eval_tokens: int = 2**20  # validation tokens that are used, at most
    seed: int = 0  # of weights, data order and dropout
    device: str = ""  # cpu, cuda, mps (empty: the best there is)
    dtype: str = ""  # float32, bfloat16 (autocast), float64 (empty: bfloat16 on cuda, else float32)
    compile: bool = False  # use torch.compile where it works


# ---- data: what step s trains on is a pure function of (seed, s)

def open_tokens(path: Path) -> np.ndarray:
    """Map a token file into memory. Raises OSError, or ValueError where it holds something else."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        good = tokens.ndim == 1 and tokens.dtype in (np.uint16, np.uint32) and len(tokens) > 1
    except (ValueError, EOFError, AttributeError) as error:
        raise ValueError(f"{path} is not a .npy file of tokens, or is truncated") from error
    require(good, f"{path} holds {tokens.dtype} {tokens.shape}; token files are 1-D uint16 or uint32, 2 tokens or more")
    return tokens


def batch_starts(seed: int, step: int, batch: int, n_tokens: int, T: int) -> np.ndarray:
    """Where the `batch` windows of T + 1 tokens of a step start: drawn at random, all places alike."""
    return np.random.default_rng((seed, step)).integers(n_tokens - T, size=batch)


def read_windows(tokens: np.ndarray, starts: np.ndarray, T: int, vocab_size: int) -> Tensor:
    """The T + 1 tokens from each start, (B, T + 1) int64; -1 beyond the end. Raises ValueError for an id too large."""
    windows = np.full((len(starts), T + 1), -1)
    for row, start in zip(windows, starts):
        part = tokens[start:start + T + 1]
        row[:len(part)] = part
    require(windows.max() < vocab_size, f"the tokens hold id {windows.max()}, the vocabulary has {vocab_size}")
    return torch.from_numpy(windows)


# ---- loss: model and loss are one module, so that compiling or sharding wraps both

class Objective(nn.Module):
    """(tokens (B, T), targets (B, T)) -> (loss sum in nats, count); targets of -1 do not count.

    In training the sum holds what the layers add, such as the balance of experts.
    """

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt = gpt

    def forward(self, tokens, targets):
        logits = self.gpt(tokens).flatten(0, 1)  # (B T, V)
        loss = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")
        count = (targets >= 0).sum()
        return loss + count * self.gpt.extra_loss(), count


# ---- optimizers: (weight, list of state tensors, learning rate, step t from 1, options) change a weight in place

@torch.no_grad()
def adamw(weight: Tensor, state: list, rate: float, t: int, o: Options) -> None:
    """Move by the mean gradient over the root of the mean squared gradient (Kingma and Ba 2015).

    m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,  w = w - rate M / (sqrt(V) + 1e-8),
    where M = m / (1 - b1^t) and V = v / (1 - b2^t) make up for the start at zero.
    """
    if not state:  # at the first step
        state += weight.new_zeros(2, *weight.shape)
    m, v = state
    m.lerp_(weight.grad, 1 - o.beta1)
    v.lerp_(weight.grad.square(), 1 - o.beta2)
    root = (v / (1 - o.beta2**t)).sqrt_().add_(1e-8)
    weight.addcdiv_(m, root, value=-rate / (1 - o.beta1**t))


# five odd polynomials a x + b x^3 + c x^5 that together send (0, 1] close to 1 (Amsel et al. 2025, Polar Express)
POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalise(g: Tensor) -> Tensor:
    """U V^T, about, of each matrix U S V^T in g (..., n, m): all singular values near 1, by matrix products alone."""
    if g.shape[-2] > g.shape[-1]:
        return orthogonalise(g.mT).mT
    x = g / (1.02 * g.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value is above the norm
    for a, b, c in POLAR:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x


@torch.no_grad()
def muon(weight: Tensor, state: list, rate: float, t: int, o: Options) -> None:
    """Move by the orthogonalised momentum (Jordan et al. 2024), in steps of AdamW's size (Liu et al. 2025)."""
    if not state:
        state += [torch.zeros_like(weight)]
    m = state[0].lerp_(weight.grad, 1 - o.momentum)
    ahead = weight.grad.lerp(m, o.momentum)  # Nesterov's momentum
    size = 0.2 * max(weight.shape) ** 0.5  # U V^T has entries of 1 / sqrt(max(shape)), AdamW's steps of about 0.2
    weight.sub_(orthogonalise(ahead), alpha=rate * size)


@torch.no_grad()
def adagrad(weight: Tensor, state: list, rate: float, t: int, o: Options) -> None:
    """Move each row by its gradient over the root of the sum of its mean squared gradients (Duchi et al. 2011).

    It is for tables of which a step uses few rows: where the gradient is sparse, no other row is touched.
    """
    if not state:
        state += [weight.new_zeros(len(weight), 1)]
    grad = weight.grad.coalesce() if weight.grad.is_sparse else weight.grad.to_sparse(1)
    rows, values = grad.indices()[0], grad.values()  # (R), (R, C)
    state[0].index_add_(0, rows, values.square().mean(1, keepdim=True))
    roots = state[0][rows].sqrt() + 1e-8
    weight.index_add_(0, rows, values / roots, alpha=-rate)


OPTIMIZERS = {"muon": muon, "adamw": adamw}  # of hidden matrices


# ---- schedules: the learning rate as a share of its peak, a pure function of the step

def wsd(step: int, o: Options) -> float:
    """Stable, then down in a line over the last decay_share of the steps (Hu et al. 2024)."""
    return min(1.0, (o.max_iters - step) / max(1.0, o.decay_share * o.max_iters))


def cosine(step: int, o: Options) -> float:
    """Half a cosine from the end of the warm-up to the last step (Loshchilov and Hutter 2017)."""
    return 0.5 + 0.5 * math.cos(math.pi * max(0, step - o.warmup_iters) / max(1, o.max_iters - o.warmup_iters))


SCHEDULES = {"wsd": wsd, "cosine": cosine}


def rate(step: int, o: Options) -> float:
    """The learning rate of a step."""
    warm = min(1.0, (step + 1) / (o.warmup_iters + 1))
    return o.learning_rate * warm * SCHEDULES[o.schedule](step, o)


# ---- ranks: under torchrun each process takes its share of a batch and of the validation windows

def ranks() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(tensors: list[Tensor]):
    """Replace each tensor by its sum over all ranks."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor)


# ---- before the first step: shape, device, memory

def recipe(o: Options, n_tokens: int) -> Options:
    """Fill what was left at 0, for a few minutes on two cores: a small text gets a small model."""
    chosen = dict(block_size=128, n_layer=2, n_embd=64, batch_size=8, max_iters=1200, eval_interval=50)
    if n_tokens > 4_000_000:
        chosen |= dict(block_size=256, n_embd=128, max_iters=800, eval_interval=160)
    o = dataclasses.replace(o, **{name: getattr(o, name) or value for name, value in chosen.items()})
    o.n_head = o.n_head or math.gcd(o.n_embd, o.n_embd // 64 or 1)
    return o


def refuse(o: Options, n_tokens: int):
    """Raise ValueError where an option cannot be followed."""
    tables = dict(optimizer=OPTIMIZERS, schedule=SCHEDULES, dtype=("", "float32", "bfloat16", "float64"))
    for name, table in tables.items():
        require(getattr(o, name) in table, f"--{name}={getattr(o, name)}: choose from {', '.join(table)}")
    least = dict(batch_size=ranks()[1], max_iters=1, eval_interval=1, eval_tokens=2, seed=0, micro_batch=0,
                 warmup_iters=0, learning_rate=0, weight_decay=0, grad_clip=0)
    for name, value in least.items():
        require(getattr(o, name) >= value, f"--{name}={getattr(o, name)} must be at least {value}")
    require(max(o.beta1, o.beta2, o.momentum) < 1, "--beta1, --beta2 and --momentum must be below 1")
    require(n_tokens > o.block_size, f"{n_tokens} training tokens are too few for --block_size={o.block_size}")


def pick_device(name: str) -> torch.device:
    """The device of this name, or the best there is. Raises ValueError where it cannot be used."""
    try:
        return torch.zeros(1, device=name or torch.accelerator.current_accelerator() or "cpu").device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device={name} cannot be used: {str(error).splitlines()[0]}") from error


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had on a GPU or a Linux machine; elsewhere infinite."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(FileNotFoundError):
        return 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    return math.inf


def fit_micro_batch(o: Options, cost: dict, rows: int, free: float) -> int:
    """How many of `rows` sequences to run at a time, in `free` bytes, when one costs `cost` (model.account).

    Raises ValueError where not even one fits, or not as many as were asked for.
    """
    each = cost["memory"]["activations"]  # a sequence's; the rest is there once
    rest = cost["memory_total"] - each
    most = max(1, (free - rest) / each)
    micro = int(min(rows, o.micro_batch or most))
    need = rest + micro * each
    require(need <= free, f"training needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free; use a smaller "
            f"{'--micro_batch' if micro > 1 else '--n_embd, --n_layer or --block_size'}")
    return micro


def prepare_tokens(o: Options) -> Path:
    """The folder of the token files; data.py makes them from text, on rank 0 while the others wait."""
    if o.data and (Path(o.data) / "train.npy").exists():
        return Path(o.data)
    if ranks()[0] == 0:
        import data
        pattern = o.pattern or ("gpt2" if o.data else "code")
        data.prepare(o.data, o.tokenizer, o.output, o.vocab_size or 2048, pattern, o.separator)
    if dist.is_initialized():
        dist.barrier()
    return Path(o.output)


# ---- the run

class Run:
    """A training run: all that a checkpoint holds, and what a step does to it."""

    def __init__(self, o, vocab_size, tokenizer, checkpoint):
        self.device, (rank, world) = pick_device(o.device), ranks()
        fields = {name: getattr(o, name) for name in Config.__annotations__}
        config = Config(**fields | dict(vocab_size=vocab_size))
        self.rows = np.arange(rank, o.batch_size, world)  # this rank's, of each batch
        cost = model.account(config, 1, o.optimizer)
        micro = fit_micro_batch(o, cost, len(self.rows), free_memory(self.device))
        self.o = dataclasses.replace(o, micro_batch=micro)  # kept: a resumed run must cut, and round, alike
        torch.manual_seed(o.seed)
        self.gpt = GPT(config)
        if checkpoint:
            same = checkpoint["config"] == vars(config) and checkpoint["train"]["optimizer"] == o.optimizer
            require(same, "the checkpoint has another shape, vocabulary or optimizer; resume with its own")
            self.gpt = model.from_checkpoint(checkpoint)
        self.gpt.to(self.device)
        self.flops = 3 * cost["forward_flops"] // o.block_size  # of a token
        start = dict(step=0, seconds=0.0, loss=0.0, count=0)
        start |= dict(grad_norm=0.0, best=math.inf)
        self.progress = SimpleNamespace(**checkpoint.get("progress", start))
        self.roles, self.rates = self.gpt.roles(), self.gpt.rates(o.optimizer)
        self.weights = dict(self.gpt.named_parameters())
        tables = [name for name, role in self.roles.items() if role == "table"]  # of which a step uses few rows
        for name in tables:
            self.gpt.get_submodule(name.rpartition(".")[0]).sparse = world == 1 and not o.compile
        self.state = {name: [] for name in self.weights}
        for name, tensors in checkpoint.get("optimizer", {}).items():
            self.state[name] = [tensor.to(self.device) for tensor in tensors]
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.bytes_of = np.array([len(token) for token in tokenizer.vocab] or [0] * vocab_size)
        self.bytes_of[list(tokenizer.special_tokens.values())] = 0
        half = o.dtype == "bfloat16" or self.device.type == "cuda" and not o.dtype
        self.precision = torch.autocast(self.device.type, torch.bfloat16, enabled=half)
        self.objective = Objective(self.gpt)
        if o.compile:
            self.compile()

    def compile(self):
        """Put the objective under torch.compile; where that fails on a first window, say so and go on without."""
        usual, self.objective = self.objective, torch.compile(self.objective)
        try:
            self.loss(np.zeros(2, np.uint16), [0])[0].backward()
        except Exception as error:  # no C++ compiler, a device it does not know: many kinds
            print(f"torch.compile does not work here ({type(error).__name__}); going on without")
            self.objective = usual
        self.gpt.zero_grad(set_to_none=True)

    def loss(self, tokens, starts):
        """Loss sum and count of the windows of `tokens` at `starts`, in which each token predicts the next."""
        windows = read_windows(tokens, starts, self.o.block_size, self.vocab_size).to(self.device)
        with self.precision:
            return self.objective(windows[:, :-1].clamp(min=0), windows[:, 1:])

    def train_step(self, tokens, stop):
        """One step: (mean loss, whether any rank was told to stop). Raises ValueError for a loss that is not finite.

        Micro-batches and ranks add up gradients of loss *sums*; dividing by the count of all of them gives the
        gradient of the mean over the whole batch, however it was cut.
        """
        o, p, began = self.o, self.progress, time.perf_counter()
        starts = batch_starts(o.seed, p.step, o.batch_size, len(tokens), o.block_size)
        totals = torch.zeros(3, device=self.device)  # loss sum, count, told to stop
        for rows in np.split(self.rows, range(o.micro_batch, len(self.rows), o.micro_batch)):
            keys = (o.seed % 2**20 << 40) + p.step * o.batch_size + rows
            self.gpt.noise["keys"] = torch.from_numpy(keys)
            loss, count = self.loss(tokens, starts[rows])
            loss.backward()
            totals += torch.stack((loss.detach(), count, torch.full_like(count, stop)))
        sum_over_ranks([weight.grad for weight in self.weights.values()] + [totals])
        loss, count, stop = totals.tolist()
        require(math.isfinite(loss), f"the loss is {loss} at step {p.step}; try a smaller --learning_rate")
        self.update(count)
        p.step, p.loss, p.count = p.step + 1, p.loss + loss, p.count + count
        p.seconds += time.perf_counter() - began
        return loss / count, stop > 0

    @torch.no_grad()
    def update(self, count):
        """Change each weight once by its gradient over `count`: hidden matrices by --optimizer, all else by AdamW."""
        o, p = self.o, self.progress
        speed = rate(p.step, o)
        for weight in self.weights.values():
            weight.grad /= count
        dense = [weight for weight in self.weights.values() if not weight.grad.is_sparse]
        p.grad_norm = nn.utils.clip_grad_norm_(dense, o.grad_clip or math.inf).item()
        for name, weight in self.weights.items():
            role = ROLES[self.roles[name]]
            if role.decay:
                weight.mul_(1 - speed * o.weight_decay)
            other = adagrad if self.roles[name] == "table" else adamw
            step = OPTIMIZERS[o.optimizer] if role.muon else other
            step(weight, self.state[name], speed * self.rates[name], p.step + 1, o)
            weight.grad = None

    @torch.no_grad()
    def evaluate(self, val):
        """A record of the log. The loss is over all of `val` but its first token, in windows that do not overlap."""
        o, p = self.o, self.progress
        rank, world = ranks()
        starts = np.arange(0, len(val) - 1, o.block_size)
        total = torch.zeros(1, dtype=torch.float64)  # on the CPU, for not every device has float64
        self.gpt.eval()
        for i in range(16 * rank, len(starts), 16 * world):
            total += self.loss(val, starts[i:i + 16])[0].cpu()
        self.gpt.train()
        sum_over_ranks([total])
        nats, n_bytes = total.item(), int(self.bytes_of[val[1:]].sum())
        tokens = p.step * o.batch_size * o.block_size
        return dict(
            step=p.step, tokens=tokens, flops=tokens * self.flops, seconds=round(p.seconds, 3),
            train_loss=p.loss / max(1, p.count),
            val_loss=nats / (len(val) - 1),
            bpb=nats / math.log(2) / n_bytes if n_bytes else None,
            lr=rate(p.step - 1, o), grad_norm=p.grad_norm, tokens_per_s=round(tokens / p.seconds),
        )

    def save(self, name):
        """Write a checkpoint of this name, on rank 0."""
        if ranks()[0] == 0:
            model.save_checkpoint(
                Path(self.o.output) / name, self.gpt, step=self.progress.step, progress=vars(self.progress),
                train=vars(self.o), optimizer=self.state, tokenizer=self.tokenizer.to_dict(), source=source())


# ---- the files of a run

def source() -> dict[str, str]:
    """The text of the files that make a run; a checkpoint keeps it to be looked at, never executed."""
    return {name: (Path(__file__).parent / name).read_text() for name in ("train.py", "model.py")}


def begin(o: Options, step: int, tokens: np.ndarray):
    """Begin log.jsonl with a record about the run; a resumed run keeps the records before `step` and redoes the rest.

    A run from step 0 first moves an earlier run's checkpoints and log to OUTPUT/previous; token files stay.
    """
    folder, log = Path(o.output), Path(o.output) / "log.jsonl"
    if not step and log.exists():
        (folder / "previous").mkdir(exist_ok=True)
        for path in filter(Path.exists, (folder / "ckpt.pt", folder / "best.pt", log)):
            os.replace(path, folder / "previous" / path.name)
        print(f"the earlier run in {folder} moved to {folder / 'previous'} (--resume would have gone on with it)")
    about = dict(options=vars(o), command=sys.argv, versions=[sys.version, torch.__version__], source=source(),
                 corpus=hashlib.sha256(tokens[:2**25]).hexdigest())  # of that many tokens
    lines = log.read_text().splitlines() if log.exists() else [json.dumps(about)]
    with replacing(log) as file:
        for line in filter(lambda line: line.endswith("}"), lines):  # the last one may have been cut short
            file.write(f"{line}\n".encode() if json.loads(line).get("step", -1) < step else b"")


def train_loop(training: Run, tokens: np.ndarray, val: np.ndarray):
    """Train up to max_iters; at each interval a checkpoint, then an evaluation and its record.

    Ctrl-C lets the step end, writes a checkpoint and raises KeyboardInterrupt.
    """
    o, p, wishes = training.o, training.progress, []
    signal.signal(signal.SIGINT, lambda *_: wishes.append(True))
    while True:
        last = p.step >= o.max_iters
        if p.step and p.step % o.eval_interval == 0 or last:
            training.save("ckpt.pt")
            record = training.evaluate(val)
            bits = f", {record['bpb']:.4f} bits a byte" if record["bpb"] else ""
            nats = f"train {record['train_loss']:.4f}, validation {record['val_loss']:.4f} nats"
            print(f"step {p.step:5d}: {nats}{bits}, {record['seconds']:.0f} s")
            if record["val_loss"] < p.best:
                p.best = record["val_loss"]
                training.save("best.pt")
            p.loss, p.count = 0.0, 0
            if ranks()[0] == 0:
                if last and not o.data:
                    import data
                    record |= data.xz_bits_per_byte(o.output)
                with open(Path(o.output) / "log.jsonl", "a") as file:
                    file.write(json.dumps(record) + "\n")
        if last:
            return
        loss, stop = training.train_step(tokens, bool(wishes))
        if sys.stdout.isatty():
            print(f"step {p.step} of {o.max_iters}: loss {loss:.4f}, "
                  f"{o.batch_size * o.block_size * p.step / p.seconds:,.0f} tokens/s, "
                  f"{p.seconds / p.step * (o.max_iters - p.step):.0f} s left   ", end="\r", flush=True)
        if stop:
            training.save("ckpt.pt")
            print(f"\nstopped after step {p.step}; {o.output}/ckpt.pt is saved, --resume goes on from it")
            raise KeyboardInterrupt


def options(kind: type, words: list[str]):
    """Fill the dataclass `kind` from --key=value words; a field's trailing comment is its help. A bad word exits 2."""
    source = "".join(map(inspect.getsource, kind.__mro__[-2::-1]))
    notes = dict(re.findall(r"^    (\w+): .*  # (.+)", source, re.MULTILINE))
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__, usage="%(prog)s [--key=value ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
    parser.add_argument("--help", action="help", help=argparse.SUPPRESS)
    parser.epilog = "options:"
    parser.error = lambda message: sys.exit(print(f"{parser.prog}: {message}", file=sys.stderr) or 2)
    for field in dataclasses.fields(kind):
        def read(text, of=field.type):
            value = ("false", "true").index(text.lower()) if of is bool else float(text) if of is int else of(text)
            return of(value) if of is str or abs(value) < float("inf") and of(value) == value else float("none")
        read.__name__ = field.type.__name__  # argparse names it where the text is not of this type
        parser.add_argument(f"--{field.name}", type=read, default=field.default, nargs="?",
                            const=field.type is bool or "", help=argparse.SUPPRESS)
        head = f"\n  --{field.name}={field.default} ".ljust(31)
        parser.epilog += head + ("\n" + " " * 30).join(textwrap.wrap(notes[field.name], 49))
    for flag, word in zip(["", *words], words):
        name = word.lstrip("-").partition("=")[0]
        if not word.startswith("--") or name not in (*notes, "help"):
            near = f"{flag}={word}" if flag[2:] in notes else f"--{difflib.get_close_matches(name, notes, 1, 0)[0]}=..."
            parser.error(f"{word!r} is no option; options are written --key=value, the nearest is {near}")
    return kind(**vars(parser.parse_args(words)))


def run(main: Callable[[], None]) -> None:
    """Call main; a mistake of the user's ends in one line and exit code 1 (`python -X dev` shows the traceback)."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        if sys.flags.dev_mode:
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def main():
    o, checkpoint = options(Options, sys.argv[1:]), {}
    if "LOCAL_RANK" in os.environ:  # torchrun
        torch.cuda.is_available() and torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if pick_device(o.device).type == "cuda" else "gloo")
        sys.stdout = open(os.devnull, "w") if ranks()[0] else sys.stdout  # one of them prints
    with contextlib.suppress(OSError, TypeError, AttributeError):  # glibc only
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: keep freed memory, for new pages cost more than
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the arithmetic on them
    ckpt = Path(o.output) / "ckpt.pt"
    ckpt.parent.mkdir(parents=True, exist_ok=True)
    if o.resume and ckpt.exists():
        checkpoint = model.load_checkpoint(ckpt)
        require("progress" in checkpoint, f"{ckpt} is a checkpoint of weights alone; there is no run to resume")
        stored = checkpoint["train"]
        del stored["output"]  # the folder may have moved
        o = options(Options, [f"--{key}={stored[key]}" for key in stored] + sys.argv[1:])
    elif o.resume:
        print(f"nothing to resume in {o.output}: starting at step 0")
    torch.set_default_dtype(torch.float64 if o.dtype == "float64" else torch.float32)
    folder = prepare_tokens(o)
    tokens, val = open_tokens(folder / "train.npy"), open_tokens(folder / "val.npy")
    tokenizer = SimpleNamespace(vocab=[], special_tokens={}, to_dict=dict)
    with contextlib.suppress(ImportError, FileNotFoundError):  # no bpe.py, no tokenizer.json
        import bpe
        tokenizer = bpe.load(folder / "tokenizer.json")
    vocab_size = len(tokenizer.vocab) or o.vocab_size or 1 + int(max(tokens.max(), val.max()))
    o = recipe(o, len(tokens))
    refuse(o, len(tokens))
    training = Run(o, vocab_size, tokenizer, checkpoint)
    print(f"{folder}: {len(tokens):,} training tokens, {len(val):,} for validation, of {vocab_size:,} kinds")
    print(model.report(training.gpt.config, training.o.micro_batch, o.optimizer))
    if ranks()[0] == 0:
        begin(training.o, training.progress.step, tokens)
    train_loop(training, tokens, val[:o.eval_tokens])
    sampler = Path(__file__).parent / "sample.py"
    if tokenizer.vocab and sampler.exists() and ranks()[0] == 0:
        subprocess.run([sys.executable, sampler, f"--ckpt={ckpt}", "--max_new_tokens=200"])
        print(f"next: python sample.py --ckpt={ckpt} --prompt='def '")
    if dist.is_initialized():
        dist.barrier()  # else a thread of gloo may free its last tensor while Python ends, which aborts the process
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
