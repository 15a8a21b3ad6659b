"""Train a language model: text or tokens in, a checkpoint out.

With no options it trains on the text of Python's standard library.
Reads: text files, folders, jsonl; or folders with train.npy and val.npy
       (tokenizer.json, and a *_mask.npy each).
Writes: OUTPUT/ckpt.pt (last), best.pt, log.jsonl, tokenizer.json; train.npy and
        val.npy where the data was text.
Usage: python train.py
       python train.py --data=shakespeare.txt --tokenizer=char --minutes=2
       torchrun --nproc_per_node=2 train.py --data=tokens --output=run

A budget, as --minutes, --flops or --tokens, chooses shape, batch, learning rate
and steps. Minutes are those of the log's seconds: of training alone, without
tokenising and evaluations.
References: Loshchilov and Hutter 2019 (AdamW); Jordan et al. 2024 (Muon); Hu et
al. 2024 (WSD schedule).
"""
import argparse
import atexit
import contextlib
import ctypes
import dataclasses
import difflib
import hashlib
import importlib.util
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
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
    ffn: str = "relu2"  # relu2, swiglu, geglu, relu, gelu
    ngram: int = -1  # longest n-gram that has an embedding of its own (0: none, -1: recipe)
    ngram_rows: int = 131072  # rows of the table of each n
    tie_embeddings: bool = False  # one matrix for the token embedding and the head
    data: str = ""  # text files, folders, jsonl (a comma list), or a folder of token files; empty: standard library
    mix: str = ""  # shares of several folders of token files, such as --data=a,b --mix=0.7,0.3; or a mix.json
    eval_data: str = ""  # folders of token files whose val.npy is for validation (empty: those of --data)
    tokenizer: str = "bpe"  # bpe, char, byte, word, or a tokenizer file
    pattern: str = ""  # how bpe cuts text before merging (empty: gpt2; code for the default data)
    separator: str = ""  # text between the documents of a file, such as <|endoftext|>
    output: str = "out"  # folder of the run
    resume: bool = False  # go on from a checkpoint, with its options where none are given
    ckpt: str = ""  # what to resume (empty: OUTPUT/ckpt.pt); that of another run begins a branch
    init_from: str = ""  # a checkpoint whose weights and shape a new run begins with
    minutes: float = 0.0  # budget of time: the schedule follows the clock (0: max_iters)
    flops: float = 0.0  # budget of compute
    tokens: int = 0  # budget of training tokens
    max_iters: int = 0  # training steps (0: recipe)
    batch_size: int = 0  # sequences of a step, over all ranks and micro-batches (0: recipe)
    micro_batch: int = 0  # sequences that a rank runs at a time (0: as many as fit in memory)
    optimizer: str = "muon"  # of hidden matrices: muon, adamw, soap, with adamw for all else; sgd: of all but tables
    learning_rate: float = 0.0  # at its peak (0: recipe)
    weight_decay: float = -1.0  # of matrices; a step shrinks them by learning rate x weight decay (-1: recipe)
    beta1: float = 0.9  # AdamW's memory of the gradient
    beta2: float = 0.95  # AdamW's memory of the squared gradient
    momentum: float = 0.95  # Muon's and SGD's memory of the gradient
    grad_clip: float = 1.0  # largest norm of the gradient (0: any)
    z_loss: float = 0.0  # weight of the squared log of the softmax's denominator in the loss
    teacher: str = ""  # a checkpoint of the same tokenizer, whose probabilities are learned beside the tokens
    teacher_weight: float = 0.5  # share of its part in the loss
    schedule: str = "wsd"  # of the learning rate: wsd, cosine, linear, constant
    warmup_iters: int = 0  # steps in which the learning rate rises
    decay_share: float = 0.6  # share of the steps in which wsd falls
    decay_from: int = 0  # step from which wsd falls (0: by decay_share)
    eval_interval: int = 0  # steps between evaluations, a checkpoint before each (0: recipe)
    eval_tokens: int = 2**20  # validation tokens that are used, at most
    seed: int = 0  # of weights, data order and dropout
    device: str = ""  # cpu, cuda, mps (empty: the best there is)
    dtype: str = ""  # float32, float64, or autocast to bfloat16, float16 (empty: bfloat16 on cuda, else float32)
    compile: bool = False  # use torch.compile where it works
    kernels: bool = False  # use the Triton kernels of kernels.py where they run
    parallel: str = ""  # split by ddp.py: ddp, zero1, zero2, fsdp, tp, pp, cp, ep, or a mesh such as dp2,tp2
    parts: bool = False  # with --parallel: each rank writes its part of ckpt.pt to OUTPUT/parts, for ddp.py --merge
    noise_scale: bool = False  # measure the critical batch size; needs two micro-batches or ranks
    sample_tokens: int = -1  # tokens that the model writes at each evaluation (-1: 200 at the end alone)
    profile: bool = False  # print where the time of a step goes, write OUTPUT/trace.json, then stop
    leaderboard: bool = False  # the default data for 2 minutes (or --minutes): prints a row for a table of results


# ---- data: what step s trains on is a pure function of (seed, s)

def open_tokens(path: Path, kinds: tuple = ("uint16", "uint32")) -> np.ndarray:
    """Map a token file into memory. Raises OSError, or ValueError where it holds something else."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        good = tokens.ndim == 1 and tokens.dtype in map(np.dtype, kinds) and len(tokens) > 1
    except OSError:
        raise
    except Exception as error:  # a damaged head fails in many ways
        raise ValueError(f"{path} is not a .npy file of tokens, or is truncated") from error
    wanted = f"1-D {' or '.join(kinds)}, 2 tokens or more"
    require(good, f"{path} holds {tokens.dtype} {tokens.shape}; token files are {wanted}")
    return tokens


class Source(NamedTuple):
    """The tokens of one folder, and which of them a model shall learn to predict."""

    tokens: np.ndarray  # (n,)
    mask: np.ndarray  # (n,), 0 where it is no target


def open_source(folder: Path, side: str) -> Source:
    """Map folder/SIDE.npy, and SIDE_mask.npy where there is one. Raises OSError or ValueError."""
    tokens, path = open_tokens(folder / f"{side}.npy"), folder / f"{side}_mask.npy"
    mask = np.broadcast_to(np.True_, tokens.shape)  # of one byte
    if path.exists():
        mask = open_tokens(path, ("bool", "uint8", "int8", "int32", "int64"))
    require(mask.shape == tokens.shape, f"{path} and {side}.npy must have one length")
    return Source(tokens, mask)


def batch_starts(seed: int, step: int, batch: int, sizes: list, T: int, mix: list | tuple = ()) -> tuple:
    """Which source, and where in it, the `batch` windows of T + 1 tokens of a step start: two arrays (batch,).

    Sources of `sizes` tokens are drawn with the probabilities `mix` (none: by size), places in them all alike.
    """
    draw = np.random.default_rng((seed, step))
    which = np.zeros(batch, int)
    if len(sizes) > 1:
        weights = np.array(mix or sizes)
        which = draw.choice(len(sizes), batch, p=weights / weights.sum())
    return which, draw.integers(np.array(sizes)[which] - T)


def read_windows(sources: list, which: np.ndarray, starts: np.ndarray, T: int, vocab_size: int) -> tuple:
    """T tokens from each start, and the tokens after each of them, -1 where that is no target: int64 (B, T) each.

    Raises ValueError for an id too large.
    """
    windows, targets = np.full((2, len(starts), T + 1), -1)
    for row, target, i, start in zip(windows, targets, which, starts):
        tokens, mask = (part[start:start + T + 1] for part in sources[i])
        row[:len(tokens)] = tokens
        target[:len(tokens)] = np.where(mask, row[:len(tokens)], -1)
    most = windows.max()
    require(most < vocab_size, f"the tokens hold id {most}, the vocabulary has {vocab_size}")
    return torch.from_numpy(windows[:, :-1].clip(0)), torch.from_numpy(targets[:, 1:])


# ---- loss: model and loss are one module, so that compiling or sharding wraps both

LOGITS = 2**24  # numbers: above this (on a GPU, 8 times this) the output layer works on some rows at a time


class InChunks(torch.autograd.Function):
    """Sum of f(x[i:j], *(y[i:j] for y in others)) over chunks of rows, of which one alone is in memory.

    The gradients for x and for the parameters of f are taken with each chunk's loss, and kept instead of its logits.
    """

    @staticmethod
    def forward(ctx, f, rows, x, others, *parameters):
        total, parts, sums = 0.0, [], [torch.zeros_like(weight) for weight in parameters]
        for part, *rest in zip(*(y.split(rows) for y in (x, *others))):
            part = part.detach().requires_grad_()
            with torch.enable_grad():
                loss = f(part, *rest)
            grad, *grads = torch.autograd.grad(loss, (part, *parameters))
            total += loss.detach()
            parts.append(grad)
            for one, new in zip(sums, grads):
                one += new
        ctx.save_for_backward(torch.cat(parts), *sums)
        return total

    @staticmethod
    def backward(ctx, scale):
        x, *sums = [scale * grad for grad in ctx.saved_tensors]
        return None, None, x, None, *sums


class Objective(nn.Module):
    """(tokens (B, T), targets (B, T)) -> (loss sum in nats, count); targets of -1 do not count.

    In training the sum holds what the layers add, such as the balance of experts, what the heads of --ahead lose, and
    `z_loss` times the square of log sum exp(logits), which keeps logits from drifting (Chowdhery et al. 2022).
    `teacher`: (another model, weight of the divergence from it); in a tuple, it is no part of this module.
    """

    fused = None  # output layer and cross-entropy in one, with --kernels

    def __init__(self, gpt: GPT, z_loss: float = 0.0, teacher: tuple = ()):
        super().__init__()
        self.gpt, self.z_loss, self.teacher = gpt, z_loss, teacher

    def rows(self, x, targets, theirs=None):
        """The loss of rows x (R, C) of the last layer; `theirs` is the teacher's.

        Distillation adds KL(teacher || student) of each row (Hinton et al. 2015).
        """
        if self.gpt.counts.at_work:
            return self.gpt.nats(x, targets).sum()
        logits = self.gpt.logits(x)  # (R, V)
        loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
        if theirs is not None:
            teacher, weight = self.teacher
            right = teacher.head(theirs)[:, :logits.shape[1]].log_softmax(-1)  # its vocabulary may be padded
            own = logits.log_softmax(-1)
            gaps = F.kl_div(own, right, log_target=True, reduction="none").sum(-1)
            loss = (1 - weight) * loss + weight * (gaps * (targets >= 0)).sum()
        if self.z_loss and self.training:
            squares = logits.logsumexp(-1).square()
            loss = loss + self.z_loss * (squares * (targets >= 0)).sum()
        return loss

    def total(self, x, *others):
        """The loss of all rows x (B, T, C), with targets and the teacher's; where they are many, of some at a time."""
        x, *others = (y.flatten(0, 1) for y in (x, *others))
        rows = (8 if x.is_cuda else 1) * LOGITS // self.gpt.config.vocab_size // len(others) + 1
        if self.fused and self.training and not (self.z_loss or self.gpt.config.softcap or self.teacher):
            kind = x.device.type
            half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            return self.fused(x.to(half), self.gpt.head.weight.to(half), *others)
        if torch.compiler.is_compiling():  # which would compile each chunk anew, and fuses the whole
            return self.rows(x, *others)
        if len(x) > rows and self.training:
            head = self.gpt.head.parameters()
            return InChunks.apply(self.rows, rows, x, others, *head)
        return sum(map(self.rows, *(y.split(rows) for y in (x, *others))))

    def forward(self, tokens, targets):
        x, theirs = self.gpt.hidden(tokens), []
        if self.teacher and self.training:
            with torch.no_grad():
                theirs = [self.teacher[0].hidden(tokens)]
        loss, count = self.total(x, targets, *theirs), (targets >= 0).sum()
        for further, layer in enumerate(self.gpt.ahead if self.training else (), 1):
            told = (x + layer(x))[:, :-further]
            loss = loss + self.gpt.config.ahead_loss * self.total(told, targets[:, further:])
        return loss + count * self.gpt.extra_loss(), count


# ---- optimizers: (weight, list of state tensors, learning rate, step t from 1, options) change a weight in place
# A hidden matrix (n, m) may come alone or, on a GPU, with others of its shape as a stack (k, n, m).

@torch.no_grad()
def adamw(weight: Tensor, state: list, rate: float, t: int, o: Options | SimpleNamespace) -> None:
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


def orthogonalise(g: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """U V^T, about, of each matrix U S V^T in g (..., n, m): all singular values near 1, by matrix products alone.

    They are taken in `dtype` (None: that of g).
    """
    if g.shape[-2] > g.shape[-1]:
        return orthogonalise(g.mT, dtype).mT
    x = g / (1.02 * g.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value is above the norm
    x = x.to(dtype or x.dtype)
    for a, b, c in POLAR:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x


@torch.no_grad()
def muon(weight: Tensor, state: list, rate: float, t: int, o: Options) -> None:
    """Move by the orthogonalised momentum (Jordan et al. 2024), in steps of AdamW's size (Liu et al. 2025).

    Its products are in the type of autocast, which GPUs multiply faster than single precision.
    """
    if not state:
        state += [torch.zeros_like(weight)]
    m = state[0].lerp_(weight.grad, 1 - o.momentum)
    ahead = weight.grad.lerp(m, o.momentum)  # Nesterov's momentum
    size = 0.2 * max(weight.shape[-2:]) ** 0.5  # U V^T has entries of 1 / sqrt(max(shape)), AdamW's steps of about 0.2
    weight.sub_(orthogonalise(ahead, precision(o, weight.device)), alpha=rate * size)


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


@torch.no_grad()
def soap(weight: Tensor, state: list, rate: float, t: int, o: Options) -> None:
    """AdamW in the eigenbases of the running means A of G G^T and of G^T G (Vyas et al. 2024).

    Every tenth step the bases Q move on by a round of subspace iteration, A Q = Q' R, instead of a decomposition.
    """
    grad = weight.grad
    squares = [grad @ grad.mT, grad.mT @ grad]
    if not state:
        state += grad.new_zeros(2, *grad.shape)
        state += squares
        state += [torch.linalg.eigh(square).eigenvectors for square in squares]
    m, v, *means, left, right = state
    m.lerp_(grad, 1 - o.beta1)
    v.lerp_((left.mT @ grad @ right).square(), 1 - o.beta2)
    root = (v / (1 - o.beta2**t)).sqrt_().add_(1e-8)
    step = left.mT @ m @ right / root
    weight.sub_(left @ step @ right.mT, alpha=rate / (1 - o.beta1**t))
    for square, mean, basis in zip(squares, means, (left, right)):
        mean.lerp_(square, 1 - o.beta2)
        if t % 10 == 0:
            basis.copy_(torch.linalg.qr(mean @ basis).Q)


@torch.no_grad()
def sgd(weight: Tensor, state: list, rate: float, t: int, o: Options) -> None:
    """Move by the sum of gradients that fade by `momentum` a step (Polyak 1964)."""
    if not state:
        state += [torch.zeros_like(weight)]
    weight.sub_(state[0].mul_(o.momentum).add_(weight.grad), alpha=rate)


OPTIMIZERS = {"muon": muon, "adamw": adamw, "soap": soap, "sgd": sgd}  # of hidden matrices
STACK = 2**25  # numbers of the matrices that a GPU changes at a time
REST = {"sgd": sgd}  # of all else, where that is not adamw


# ---- schedules: the learning rate as a share of its peak, a pure function of the step

def wsd(step: int, o: Options) -> float:
    """Stable, then down in a line, from decay_from or over the last decay_share of the steps (Hu et al. 2024)."""
    length = o.max_iters - o.decay_from if o.decay_from else o.decay_share * o.max_iters
    return min(1.0, (o.max_iters - step) / max(1.0, length))


def passed(step: int, o: Options) -> float:
    """How much of the way from the end of the warm-up to the last step lies behind a step."""
    return max(0, step - o.warmup_iters) / max(1, o.max_iters - o.warmup_iters)


SCHEDULES = {
    "wsd": wsd,
    "cosine": lambda step, o: 0.5 + 0.5 * math.cos(math.pi * passed(step, o)),  # Loshchilov and Hutter 2017
    "linear": lambda step, o: 1 - passed(step, o),
    "constant": lambda step, o: 1.0,
}


def rate(step: int, o: Any) -> float:
    """The learning rate of a step."""
    warm = min(1.0, (step + 1) / (o.warmup_iters + 1))
    return o.learning_rate * warm * SCHEDULES[o.schedule](step, o)


# ---- ranks: under torchrun each process takes its share of a batch and of the validation windows

def ranks() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_ranks(o: Options):
    """Meet torchrun's other processes; after a restart under new keys, as the old ones hold addresses of the lost."""
    if torch.cuda.is_available() and o.device != "cpu":  # where there may be more ranks than GPUs
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world = next(rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    both = "cpu:gloo,cuda:nccl"  # evaluations are summed on the CPU, in double precision
    backend = both if pick_device(o.device).type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    atexit.register(dist.destroy_process_group)  # a thread of gloo that frees a tensor while Python ends aborts it


def agree(**own) -> None:
    """Raise ValueError, on all ranks alike, unless all were started with the same.

    Else they would wait for messages that never come, or train two models.
    """
    every = [own]
    if dist.is_initialized():
        every *= dist.get_world_size()
        dist.all_gather_object(every, own)
    for rank, other in enumerate(every):
        for name, value in other.items():
            first = every[0].get(name)
            require(value == first, f"rank {rank} was started with {name}={value}, rank 0 with {name}={first}")


def sum_over_ranks(tensors: list[Tensor]):
    """Replace each tensor by its sum over all ranks."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor)


# ---- before the first step: shape, device, memory

DTYPES = {
    "": None,
    "float32": None,
    "float64": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
USE = 0.3  # share of the measured peak that a run of --minutes is expected to reach, before it is timed


def precision(o: Options, device: torch.device) -> torch.dtype | None:
    """What autocast computes in; None: all is in the default type."""
    name = getattr(o, "dtype", "")  # align.py has no such option
    return torch.bfloat16 if device.type == "cuda" and not name else DTYPES.get(name)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second that this device reaches in a large matrix product: the best of some."""
    n, best = 4096 if device.type == "cuda" else 1024, math.inf
    x = torch.ones(n, n, device=device, dtype=dtype)
    for _ in range(6):
        began = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def shape_of(o: Options, vocab_size: int) -> Config:
    """The model's own options."""
    fields = {name: getattr(o, name) for name in Config.__annotations__}
    return Config(**fields | dict(vocab_size=vocab_size))


def run_flops(o: Options, vocab_size: int) -> int:
    """FLOPs of a training step of a sequence: a backward pass costs two forward passes."""
    cost = model.account(shape_of(o, vocab_size), 1, o.optimizer)
    return 3 * cost["forward_flops"]


# without a budget: a few minutes on two cores; from 4 million tokens on, of words, most likely, of which three say much
SHAPE = dict(block_size=128, n_layer=1, n_embd=64)
SMALL = SimpleNamespace(**SHAPE, batch_size=8, max_iters=1200, eval_interval=50, ngram=5)
LARGE = SimpleNamespace(**SHAPE, batch_size=16, max_iters=1600, eval_interval=320, ngram=3)


def recipe(o: Options, n_tokens: int, vocab_size: int, peak: float) -> Options:
    """Fill what was left at its default: a run of SMALL or LARGE, whose FLOPs a budget of C FLOPs scales by f.

    Parameters and tokens grow alike, as f^0.5 (Hoffmann et al. 2022); depth grows with the width, the batch with
    tokens^0.38 (Bergsma et al. 2025), weight decay falls with the width squared. Tables of n-grams would be larger than
    a wide model. A study of scaling.py, where there is one, chooses all but heads and steps.
    """
    budgets = [budget for budget in (o.minutes, o.flops, o.tokens) if budget]
    require(len(budgets) < 2 and min([1, *budgets]) > 0, "--minutes, --flops, --tokens: give one of them, above 0")
    base = LARGE if n_tokens > 4_000_000 else SMALL
    f, study = 1.0, Path("scaling/recipe.json")
    if budgets:
        plain = dataclasses.replace(o, **vars(base) | dict(ngram=0, n_head=1, n_kv_head=0))
        rows = base.max_iters * base.batch_size
        cost = rows * run_flops(plain, vocab_size)
        by_tokens = cost * (o.tokens / rows / base.block_size) ** 2
        C = o.flops or 60 * o.minutes * peak * USE or by_tokens
        f = C / cost
    least = 2 if budgets and base is SMALL and not o.ngram else 1  # one layer of characters ends higher
    n_layer = max(least, round(f ** (1 / 6)))
    area = base.n_embd**2 * f**0.5 / n_layer  # of a matrix, so that parameters grow smoothly
    n_embd = max(32, 16 * round(area**0.5 / 16))
    chosen = vars(base) | dict(
        n_layer=n_layer,
        n_embd=n_embd,
        ngram=base.ngram if (o.n_embd or n_embd) <= 128 else 0,
        batch_size=max(1, round(base.batch_size * f**0.19)),
        learning_rate=0.01 * f**-0.1,
        weight_decay=0.1 * (base.n_embd / n_embd) ** 2,
    )
    if budgets and study.exists():
        try:
            found = json.loads(study.read_text())
            best = min(found, key=lambda row: abs(math.log(row["C"] / C)))["options"]
            chosen |= {name: type(value)(best[name]) for name, value in chosen.items() if name in best}
        except Exception as error:  # as it may hold anything
            raise ValueError(f"{study} is damaged; remove it, or run scaling.py again: {error!r:.100}") from error
        print(f"shape, batch and learning rate as {study} says")
    left = {name: value for name, value in chosen.items() if getattr(o, name) == getattr(Options, name)}
    new = dataclasses.replace(o, **left)
    new.n_head = o.n_head or model.usual_heads(new.n_embd, narrow=24)  # small models gain by some heads
    if budgets:
        rows = o.tokens / new.block_size or C / run_flops(new, vocab_size)
        steps = max(1, round(rows / new.batch_size))
        new.max_iters = o.max_iters or steps
        new.eval_interval = o.eval_interval or steps // 5 + 1
    return new


def refuse(o: Options, sources: list[Source]):
    """Raise ValueError where an option cannot be followed."""
    tables: dict = dict(optimizer=OPTIMIZERS, schedule=SCHEDULES, dtype=DTYPES)
    for name, table in tables.items():
        require(getattr(o, name) in table, f"--{name}={getattr(o, name)}: choose from {', '.join(table)}")
    # a row for each rank; --noise_scale compares a part of a batch with the whole
    rows = max(1 if o.parallel else ranks()[1], 1 + o.noise_scale)
    least = dict(batch_size=rows, max_iters=1, eval_interval=1, eval_tokens=2)
    for name in ("seed", "micro_batch", "warmup_iters", "learning_rate", "weight_decay", "grad_clip", "z_loss",
                 "decay_from", *least):
        value = getattr(o, name)
        require(value >= least.get(name, 0), f"--{name}={value} must be at least {least.get(name, 0)}")
    require(max(o.beta1, o.beta2, o.momentum) < 1, "--beta1, --beta2 and --momentum must be below 1")
    require(o.decay_from < o.max_iters, f"--decay_from={o.decay_from} is not before --max_iters={o.max_iters}")
    require(not (o.counts and o.compile), "--counts does not go with --compile")
    require(o.parallel or not o.parts, "--parts is for --parallel")
    require(o.resume or not o.ckpt, "--ckpt is for --resume; --init_from begins a new run with a checkpoint's weights")
    if o.parallel:
        require(dist.is_initialized(), "--parallel needs processes: torchrun --nproc_per_node=2 train.py ...")
        for name in ("compile", "kernels", "noise_scale", "z_loss", "dropout", "teacher", "counts"):
            require(not getattr(o, name), f"--{name} does not go with --parallel")
        require(o.dtype != "float16", "--dtype=float16 does not go with --parallel; bfloat16 does")
    for tokens, _ in sources:
        reason = f"{len(tokens)} training tokens are too few for --block_size={o.block_size}"
        require(len(tokens) > o.block_size, reason)


def shares(mix: str, folders: list[Path]) -> list[float]:
    """The numbers of --mix for some folders (empty: none), or those that a file from data.py --mix has for them.

    Raises ValueError where they do not fit, OSError for a file that is not there.
    """
    weights, n = [-1.0], len(folders)
    with contextlib.suppress(ValueError, LookupError, TypeError):
        if mix.endswith(".json") and n > 1:
            learnt = json.loads(Path(mix).read_bytes())["shares"]
            weights = [float(learnt[str(folder)]) for folder in folders]
        else:
            weights = [float(word) for word in mix.split(",")] if mix else []
    good = not weights or len(weights) == n and min(weights) >= 0 and 0 < sum(weights) < math.inf
    names = ", ".join(map(str, folders))
    require(good, f"--mix={mix}: it takes {n} numbers from 0 on, or a mix.json of many, for the folders {names}")
    return weights


def pick_device(name: str) -> torch.device:
    """The device of this name, or the best there is. Raises ValueError where it cannot be used."""
    try:
        best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        device = torch.zeros(1, device=name or best).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the one on which Triton launches, and of which figures are printed
        return device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device={name} cannot be used: {str(error).splitlines()[0]}") from error


def keep_freed_memory():
    """Tell glibc, where it is, to return no memory to the system: new pages cost more than the arithmetic on them."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had on a GPU or a Linux machine; elsewhere infinite."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(FileNotFoundError):
        return 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    return math.inf


def fit_micro_batch(o: Options, cost: dict, rows: int, free: float, teacher: tuple = ()) -> int:
    """How many of `rows` sequences to run at a time, in `free` bytes, when one costs `cost` (model.account).

    A teacher that is in memory already costs its last layer, and of the logits two more. Raises ValueError where not
    even one sequence fits, or not as many as were asked for.
    """
    each = cost["memory"]["activations"]  # a sequence's; the rest is there once
    rest = cost["memory_total"] - each
    if teacher:
        theirs = teacher[0].config
        each += 4 * o.block_size * (theirs.n_embd + 2 * theirs.vocab_size)
    most = max(1, (free - rest) / each)
    micro = int(min(rows, o.micro_batch or most))
    need = rest + micro * each
    require(need <= free, f"training needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free; use a smaller "
            f"{'--micro_batch' if micro > 1 else '--n_embd, --n_layer or --block_size'}")
    return micro


def prepare_tokens(o: Options) -> list[Path]:
    """The folders of the token files; data.py makes them from text, on rank 0 while the others wait."""
    folders = [Path(word) for word in o.data.split(",")]
    if o.data and all((folder / "train.npy").exists() for folder in folders):
        return folders
    require(not o.mix, "--mix needs a list of folders with token files in --data; data.py makes them")
    fresh = o.init_from and not o.resume and o.tokenizer in ("bpe", "char", "word")  # whose ids mean something else
    require(not fresh, f"text for {o.init_from} needs its own tokenizer: give --tokenizer=FILE")
    if ranks()[0] == 0:
        import data
        pattern = o.pattern or ("gpt2" if o.data else "code")
        data.prepare(o.data, o.tokenizer, o.output, o.vocab_size or 2048, pattern, o.separator)
    if dist.is_initialized():
        dist.barrier()
    return [Path(o.output)]


def open_tokenizer(folders: list[Path]):
    """The tokenizer of the token files, without a vocabulary where there is none. Raises ValueError if they differ."""
    tokenizer = SimpleNamespace(vocab=[], special_tokens={}, to_dict=dict)
    if not importlib.util.find_spec("bpe"):
        print("bpe.py is not here: the checkpoint will have no tokenizer, and the loss no bits a byte")
    with contextlib.suppress(ImportError, FileNotFoundError):  # no bpe.py, no tokenizer.json
        import bpe
        tokenizer = bpe.load(folders[0] / "tokenizer.json")
        for folder in folders[1:]:
            same = bpe.load(folder / "tokenizer.json").to_dict() == tokenizer.to_dict()
            require(same, f"{folder} and {folders[0]} hold tokens of different tokenizers")
    return tokenizer


def count_ngrams(gpt: GPT, sources: list[Source]) -> None:
    """Fill the model's counts of n-grams, where --counts asks for them and no checkpoint brought them.

    Raises ValueError where the text is too short for them, or too large for the memory.
    """
    n_tokens, order = sum(len(source.tokens) for source in sources), gpt.config.counts
    if not order or gpt.counts.sizes.numel():
        return
    import data
    need = 25 * order * n_tokens  # bytes, as measured
    free = free_memory(torch.device("cpu"))
    require(need < free, f"counting {n_tokens:,} tokens takes {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free")
    began = time.perf_counter()
    found = data.train_ngrams(np.concatenate([source.tokens for source in sources]), gpt.config.vocab_size, order)
    names = [name for name, _ in gpt.counts.named_buffers()]
    gpt.counts.fill({name: torch.from_numpy(getattr(found, name)) for name in names})
    print(f"{found.sizes.sum():,} n-grams counted in {time.perf_counter() - began:.0f} s")


def open_teacher(o: Options, config: Config, tokenizer: Any, device: torch.device) -> tuple:
    """What Objective takes of --teacher; nothing where there is none. Raises OSError or ValueError."""
    if not o.teacher:
        return ()
    own = [Path(o.output, name).resolve() for name in ("ckpt.pt", "best.pt")]
    require(Path(o.teacher).resolve() not in own, f"--teacher={o.teacher} would be replaced: give another --output")
    require(0 <= o.teacher_weight <= 1, f"--teacher_weight={o.teacher_weight} must be from 0 to 1")
    checkpoint = model.load_checkpoint(o.teacher)
    checkpoint["config"]["counts"] = 0  # which know the training text by heart
    teacher = model.from_checkpoint(checkpoint).to(device).eval().requires_grad_(False)
    same = (checkpoint.get("tokenizer") or tokenizer.to_dict()) == tokenizer.to_dict()  # none: of model.py --import_hf
    require(same, f"--teacher={o.teacher} has another tokenizer than the tokens")
    ids = teacher.config.vocab_size
    require(ids >= config.vocab_size, f"--teacher={o.teacher} knows {ids} tokens, the model {config.vocab_size}")
    room = teacher.config.block_size
    require(room >= config.block_size, f"--teacher={o.teacher} takes {room} tokens, --block_size={config.block_size}")
    return teacher, o.teacher_weight


def corpus_hash(sources: list[Source]) -> str:
    """A hash of the type, the length and the beginning of each token file."""
    digest = hashlib.sha256()
    for tokens, _ in sources:
        digest.update(f"{tokens.dtype} {len(tokens)} ".encode() + tokens[:2**20].tobytes())
    return digest.hexdigest()


# ---- the run

# options of a model with which its weights mean the same: a run may go on with others
FREE = "block_size rope_base dropout recompute balance_loss balance_bias router_z ahead_loss counts_weight".split()


def whole_model(run: "Run") -> SimpleNamespace:
    """What a run has in the place of ddp.py's Split, which explains the calls, where each rank has the whole model."""
    return SimpleNamespace(
        pieces=dict(run.gpt.named_parameters()),
        rows=lambda batch: np.arange(ranks()[0], batch, ranks()[1]),
        backward=run.backward,
        sync=lambda: sum_over_ranks([weight.grad for weight in run.weights.values()]),
        norm=lambda without: nn.utils.get_total_norm([weight.grad for weight in run.clipped]).item(),
        spread=lambda: None,
        own=lambda name, tensor: tensor,
        on_whole=lambda name, update: update,
        whole=lambda state: (run.gpt.state_dict(), state),
    )


class Run:
    """A training run: all that a checkpoint holds, and what a step does to it.

    `checkpoint` is that of the run to go on with, or of a model to begin with, or empty.
    """

    adamw = None  # for many weights in one launch, with --kernels

    def __init__(self, o, vocab_size, tokenizer, checkpoint):
        self.device, (_, world) = pick_device(o.device), ranks()
        config = shape_of(o, vocab_size)
        teacher = open_teacher(o, config, tokenizer, self.device)
        cost = model.account(config, 1, o.optimizer)
        most = -(-o.batch_size // (2 * world if o.noise_scale else world))
        micro = fit_micro_batch(o, cost, most, free_memory(self.device), teacher)
        if o.parallel:  # a rank with less memory: all cut alike, for each part is a message
            dist.all_reduce(least := torch.tensor(micro), dist.ReduceOp.MIN)
            micro = least.item()
        self.o = dataclasses.replace(o, micro_batch=micro)  # kept: a resumed run must cut, and round, alike
        torch.manual_seed(o.seed)
        self.gpt = GPT(config)
        if checkpoint:
            shape = vars(Config()) | checkpoint["config"] | {name: getattr(o, name) for name in FREE}
            trained = checkpoint["train"]["optimizer"] if "progress" in checkpoint else o.optimizer
            same = shape == vars(config) and trained == o.optimizer
            require(same, "the checkpoint has another shape, vocabulary or optimizer; resume with its own")
            self.gpt = model.from_checkpoint({**checkpoint, "config": vars(config)})
        self.gpt.to(self.device)
        self.flops = 3 * cost["forward_flops"] // o.block_size  # of a token
        start = dict(step=0, tokens=0, seconds=0.0, loss=0.0, count=0, best=math.inf, grad_norm=0.0)
        start |= dict(pace=0.0, scale=1.0, noise=[0.0, 0.0], expert_tokens=[])
        self.progress = SimpleNamespace(**start | checkpoint.get("progress", {}))
        if o.ckpt or checkpoint.get("train", {}).get("eval_data", "") != o.eval_data:  # each has its own best
            self.progress.best = math.inf
        self.roles, self.rates = self.gpt.roles(), self.gpt.rates(o.optimizer)
        self.objective = Objective(self.gpt, o.z_loss, teacher)
        if o.kernels:
            self.use_kernels()
        half = precision(o, self.device)
        self.precision = torch.autocast(self.device.type, half or torch.bfloat16, enabled=half is not None)
        self.split = whole_model(self)
        if o.parallel:
            import ddp
            self.split = ddp.split_model(self.objective, o.parallel, o.optimizer, o.batch_size)
            self.split.backward = self.precision(self.split.backward)
        self.weights, rows = self.split.pieces, self.split.rows(o.batch_size)
        self.parts = np.split(rows, range(micro, len(rows), micro))  # rows of each batch, for one micro-batch each
        # tables, of which a step uses few rows
        self.tables = [name for name, role in self.roles.items() if role == "table"]
        self.clipped = [weight for name, weight in self.weights.items() if name not in self.tables]
        sparse = self.device.type == "cpu" or self.device.type == "cuda" and not dist.is_initialized()  # not with NCCL
        for name in self.tables:
            layer = self.gpt.get_submodule(name.rpartition(".")[0])
            layer.sparse = sparse and not (o.compile or o.parallel)
        # of a share that sample.py --prune has set to 0, which it stays
        self.masks = {name: weight.detach() != 0 for name, weight in self.weights.items()
                      if checkpoint.get("pruned") and ROLES[self.roles[name]].muon}
        self.state = {name: [] for name in self.weights}
        for name, tensors in checkpoint.get("optimizer", {}).items():
            if name in self.state:
                self.state[name] = [self.split.own(name, old).to(self.weights[name], copy=True) for old in tensors]
        self.stacks = self.device.type == "cuda" and not o.parallel  # matrices of one shape move as one
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.bytes_of = np.array([len(token) for token in tokenizer.vocab] or [0] * vocab_size)
        self.bytes_of[list(tokenizer.special_tokens.values())] = 0
        self.writer, self.writing, self.paused = ThreadPoolExecutor(1), None, 0.0
        if o.compile:
            self.compile()

    def use_kernels(self):
        """Take those of kernels.py that run here instead of what this file and model.py have."""
        import kernels
        device = str(self.device)
        model.ops = model.with_kernels(device, self.o.compile)
        found = {name: kernels.use(name, device) for name in ("cross_entropy", "adamw") if kernels.runs(name, device)}
        self.objective.fused, self.adamw = found.get("cross_entropy"), found.get("adamw")
        if self.device.type == "cpu":
            print("--kernels: they need a GPU; on a CPU the usual forms do the work")

    def compile(self):
        """Put the objective under torch.compile; where that fails on a first window, say so and go on without."""
        usual, self.objective = self.objective, torch.compile(self.objective)
        try:
            rows = np.zeros(self.o.micro_batch, int)  # the shape of training, so that it is compiled once
            loss, _ = self.loss(*self.windows([Source(np.zeros(2, np.uint16), np.ones(2))], rows, rows))
            loss.backward()
        except Exception as error:  # no C++ compiler, a device it does not know: many kinds
            print(f"torch.compile does not work here ({type(error).__name__}); going on without")
            self.objective = usual
        self.gpt.zero_grad(set_to_none=True)

    def windows(self, sources, which, starts):
        """Tokens and targets of the windows at `starts` of the sources `which`: each token predicts the next."""
        windows = read_windows(sources, which, starts, self.o.block_size, self.vocab_size)
        if self.device.type == "cuda":
            windows = [part.pin_memory() for part in windows]  # so that the copy does not hold up the CPU
        return [part.to(self.device, non_blocking=True) for part in windows]

    def loss(self, tokens, targets):
        """Loss sum and count of some windows."""
        with self.precision:
            return self.objective(tokens, targets)

    def backward(self, parts, train=True):
        """Gradients of micro-batches (tokens, targets) of this rank's rows; loss sum and count of all ranks'."""
        o, p = self.o, self.progress
        totals = torch.zeros(3, device=self.device)  # loss sum, count, |gradient of a part|^2
        for rows, windows in zip(self.parts, parts):
            keys = (o.seed % 2**20 << 40) + p.step * o.batch_size + rows
            self.gpt.noise["keys"] = torch.from_numpy(keys)
            loss, count = self.loss(*windows)
            totals[:2] += torch.stack((loss.detach(), count))
            if train:
                (loss * p.scale).backward()
            if train and o.noise_scale and not totals[2]:
                totals[2] = (self.split.norm(self.tables) / (count * p.scale)).square()
        totals = totals.cpu().double()  # which not every device has
        sum_over_ranks([totals])
        loss, count, part = totals.tolist()
        self.part = part / ranks()[1]
        return loss, count

    def train_step(self, sources, stop, mix=()):
        """One step: (mean loss, whether any rank was told to stop). Raises ValueError for a loss that is not finite.

        Micro-batches and ranks add up gradients of loss *sums*; dividing by the count of all of them gives the
        gradient of the mean over the whole batch, however it was cut.
        """
        o, p, began = self.o, self.progress, time.perf_counter()
        sizes = [len(source.tokens) for source in sources]
        which, starts = batch_starts(o.seed, p.step, o.batch_size, sizes, o.block_size, mix)
        windows = [self.windows(sources, which[rows], starts[rows]) for rows in self.parts]
        loss, count = self.split.backward(windows)
        self.split.sync()
        require(math.isfinite(loss), f"the loss is not finite at step {p.step}; try a smaller --learning_rate")
        count = max(1.0, count)  # a batch may have no target
        with torch.profiler.record_function("update"):
            self.update(count)
        if o.noise_scale and math.isfinite(self.part + p.grad_norm):  # float16 may overflow, a part be without targets
            self.compare(self.part, o.micro_batch * o.block_size, o.batch_size * o.block_size)
        experts = [part for part in self.gpt.modules() if type(part) is model.Experts]
        for part in experts if o.balance_bias else ():  # each rank has moved its own by the tokens that it saw
            sum_over_ranks([part.bias.div_(ranks()[1])])
        p.expert_tokens = [part.counts.long().tolist() for part in experts]
        p.step += 1
        p.loss += loss
        p.count += count
        p.tokens += o.batch_size * o.block_size
        # one process alone does not wait for its device: the next step is launched while weights still change
        told = torch.tensor([time.perf_counter() - began, stop], device=self.device if dist.is_initialized() else "cpu")
        sum_over_ranks([told])
        took, stop = told.tolist()
        took /= ranks()[1]
        p.seconds += took
        p.pace = 0.9 * p.pace + 0.1 * took if p.pace else took
        return loss / count, stop > 0

    def compare(self, part, few, many):
        """Take in what |gradient|^2 of `few` tokens and of `many` say about the noise (McCandlish et al. 2018).

        A mean over B tokens has E|g_B|^2 = |G|^2 + S / B; S / |G|^2 is the batch at which noise and signal are equal.
        """
        p = self.progress
        whole = p.grad_norm**2
        noise = (part - whole) / (1 / few - 1 / many)
        signal = (many * whole - few * part) / (many - few)
        p.noise = [0.98 * old + 0.02 * new for old, new in zip(p.noise, (noise, signal))]

    @torch.no_grad()
    def update(self, count):
        """Change each weight once by its gradient over `count`: hidden matrices by --optimizer, all else by AdamW.

        With float16 the loss is multiplied by a scale, so that gradients neither vanish nor overflow; a step with an
        overflow is left out, and the scale halved (Micikevicius et al. 2018).
        """
        o, p = self.o, self.progress
        speed = rate(p.step, o)
        if self.clipped:
            torch._foreach_div_([weight.grad for weight in self.clipped], count * p.scale)
        for name in self.weights.keys() & self.tables:  # not in place: those of summed tables share numbers
            self.weights[name].grad = self.weights[name].grad / (count * p.scale)
        p.grad_norm = self.split.norm(self.tables)
        nn.utils.clip_grads_with_norm_(self.clipped, o.grad_clip or math.inf, torch.tensor(p.grad_norm))
        fine = math.isfinite(p.grad_norm)
        require(fine or o.dtype == "float16" and p.scale > 2**-24,
                f"the gradient is not finite at step {p.step}; try a smaller --learning_rate")
        if o.dtype == "float16":
            p.scale *= 2 ** (1 / 256) if fine else 0.5
        together = {}  # (function, rate, decay, what else is alike) -> names
        for name, weight in self.weights.items() if fine else ():
            role = ROLES[self.roles[name]]
            other = adagrad if self.roles[name] == "table" else REST.get(o.optimizer, adamw)
            step = OPTIMIZERS[o.optimizer] if role.muon else other
            alike = name
            if step is adamw and self.adamw and weight.numel() % 4 == 0:  # at addresses that are multiples of 16
                alike = ""
            elif role.muon and step is not adamw:
                step = self.split.on_whole(name, step)
                alike = weight.shape if self.stacks else name
            key = step, self.rates[name], role.decay, alike
            together.setdefault(key, []).append(name)
        for (step, factor, decays, alike), names in together.items():
            move = self.move if alike else self.adamw_of
            decay = o.weight_decay / factor if decays else 0.0
            move(names, step, speed * factor, decay)
        for name, mask in self.masks.items():
            self.weights[name].mul_(mask)
        self.gpt.zero_grad(set_to_none=True)
        self.split.spread()

    @torch.no_grad()
    def move(self, names, step, rate, decay):
        """Change weights by an optimizer's step: one, or several of one shape, of which a GPU takes some as one stack.

        For it would be idle between the small products of each.
        """
        most = STACK // self.weights[names[0]].numel() + 1
        for some in (names[i:i + most] for i in range(0, len(names), most)):
            weights = [self.weights[name] for name in some]
            weight, state = weights[0], self.state[some[0]]
            if weights[1:]:
                weight = torch.stack(weights)
                weight.grad = torch.stack([weight.grad for weight in weights])
                states = [self.state[name] for name in some]
                state = [torch.stack(parts) for parts in zip(*states)]
            if decay:
                weight.mul_(1 - rate * decay)
            step(weight, state, rate, self.progress.step + 1, self.o)
            if weights[1:]:
                torch._foreach_copy_(weights, [*weight])
                for name, *parts in zip(some, *state):
                    self.state[name] = parts

    @torch.no_grad()
    def adamw_of(self, names, _, rate, decay):
        """What `adamw` does, for many weights in one launch."""
        o, weights = self.o, [self.weights[name] for name in names]
        for name in names:
            self.state[name] = self.state[name] or [*self.weights[name].new_zeros(2, *self.weights[name].shape)]
        first, second = zip(*(self.state[name] for name in names))
        grads = [weight.grad.contiguous() for weight in weights]
        self.adamw(weights, grads, [*first], [*second], rate, o.beta1, o.beta2, 1e-8, decay, self.progress.step + 1)

    @torch.no_grad()
    def evaluate(self, sources):
        """A record of the log. The loss is over all targets of `sources`, in windows that do not overlap."""
        o, p, (_, world) = self.o, self.progress, ranks()
        totals, n_bytes = np.zeros(2), 0
        unknown = self.tokenizer.special_tokens.get("<|unk|>", -1)  # how many bytes it stands for nobody knows
        self.objective.eval()
        for source in sources:
            starts = np.arange(0, len(source.tokens) - 1, o.block_size)
            for batch in np.split(starts, range(16 * world, len(starts), 16 * world)):
                # all ranks take part: the last batch is filled up with the last token, after which is no target
                batch = np.pad(batch, (0, -len(batch) % world), constant_values=len(source.tokens) - 1)
                own = batch[self.split.rows(len(batch))]
                totals += self.split.backward([self.windows([source], 0 * own, own)], train=False)
            targets = source.tokens[1:][source.mask[1:] > 0]
            n_bytes += math.nan if unknown in targets else self.bytes_of[targets].sum()
        self.objective.train()
        nats, count = totals.tolist()
        measured = p.noise[0] / p.noise[1] if p.noise[1] else -1.0
        further = dict(noise_scale=measured) if o.noise_scale else {}
        if p.expert_tokens:
            further["expert_tokens"] = p.expert_tokens
        return dict(
            step=p.step,
            tokens=p.tokens,
            flops=p.tokens * self.flops,
            seconds=round(p.seconds, 3),
            train_loss=p.loss / max(1, p.count),
            val_loss=nats / max(1.0, count),
            bpb=nats / math.log(2) / n_bytes if n_bytes > 0 else None,
            lr=rate(p.step - 1, o),
            grad_norm=p.grad_norm,
            tokens_per_s=round(p.tokens / p.seconds),
            **further,
        )

    def save(self, name):
        """Write a checkpoint of this name, on rank 0, in a thread: training waits for a copy in memory alone."""
        began, p, o = time.perf_counter(), self.progress, self.o
        rest = dict(
            step=p.step,
            progress=dict(vars(p)),
            train=dict(vars(o)),
            corpus=self.corpus,
            pruned=bool(self.masks),
            tokenizer=self.tokenizer.to_dict(),
            source=source_texts(),
        )
        if o.parts:
            return self.split.save(Path(o.output) / "parts", self.state, **rest) if name == "ckpt.pt" else None
        weights, states = self.split.whole(self.state)
        if ranks()[0]:
            return
        self.written()

        def copied(tensor):
            return tensor.to("cpu", copy=True)
        rest |= dict(
            weights={name: copied(tensor) for name, tensor in weights.items()},
            optimizer={name: list(map(copied, tensors)) for name, tensors in states.items()},
        )
        path = Path(self.o.output) / name
        self.writing = self.writer.submit(model.save_checkpoint, path, self.gpt, **rest)
        self.paused += time.perf_counter() - began

    def written(self):
        """Wait until the last checkpoint is on disk. Raises OSError where it could not be written."""
        if self.writing:
            self.writing.result()


# ---- the files of a run

def source_texts() -> dict[str, str]:
    """The text of the files that make a run; a checkpoint keeps it to be looked at, never executed."""
    return {name: (Path(__file__).parent / name).read_text() for name in ("train.py", "model.py")}


def claim(folder: Path):
    """Keep other runs out of a folder while this process lives. Raises ValueError where one is in it."""
    lock = open(folder / ".lock", "w")
    with contextlib.suppress(ImportError):  # not on Windows
        import fcntl
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another run is training in {folder}") from error
    return lock


def set_aside(folder: Path):
    """Move an earlier run's checkpoints and log to FOLDER/previous."""
    previous = folder / "previous"
    gone = ", in place of the one before" * (previous / "log.jsonl").exists()
    previous.mkdir(exist_ok=True)
    for name in ("ckpt.pt", "best.pt", "adapters.pt", "log.jsonl"):
        if (folder / name).exists():
            os.replace(folder / name, previous / name)
    print(f"the earlier run in {folder} moved to {previous}{gone}")
    print("(--resume would have gone on with it)")


def begin(o: Options | SimpleNamespace, step: int, corpus: str):
    """Begin log.jsonl with a record about the run; a resumed run keeps the records before `step` and redoes the rest.

    A run from step 0 first moves an earlier run's checkpoints and log to OUTPUT/previous; token files stay. A branch
    begins with the records of the run that it leaves.
    """
    folder, log = Path(o.output), Path(o.output) / "log.jsonl"
    versions = [sys.version, torch.__version__]
    about = dict(options=vars(o), command=sys.argv, versions=versions, source=source_texts(), corpus=corpus)
    old = Path(o.ckpt).parent / "log.jsonl" if o.ckpt else log
    lines = old.read_bytes().splitlines() if step and old.exists() else [json.dumps(about).encode()]
    if log.exists() and (not step or o.ckpt):  # and `old` may be the log that this one takes the place of
        set_aside(folder)
    with replacing(log) as file:
        for line in filter(lambda line: line.endswith(b"}"), lines):  # the last one may have been cut short
            found = re.match(rb'{"step": (\d+)', line)  # a damaged line stays
            file.write(line + b"\n" if not found or int(found[1]) < step else b"")


# ---- what can be seen of a run

def profile(module: nn.Module, action: Callable[[], None], path: str | os.PathLike) -> str:
    """Run action() under torch.profiler; a table of the time in the layers of `module` by kind. The trace goes to path.

    A layer's kind is the last part of its name. Its time is that of the CPU, and of the GPU where there is one.
    """
    marks, hooks = [], []

    def enter(label):
        return lambda *_: marks.append(torch.profiler.record_function(label).__enter__())

    def leave(*_):
        marks.pop().__exit__(None, None, None)

    for name, part in module.named_modules():
        kind = re.search(r"^[^.]*\.?\d*\.?(embedding|ngrams|mixer|ffn|norm|head)\d*$", name)
        if kind:
            hooks += [part.register_forward_pre_hook(enter(f"forward {kind[1]}")), part.register_forward_hook(leave)]
        if kind and kind[1] not in ("embedding", "ngrams"):  # whose input, ids, has no gradient
            hooks += [part.register_full_backward_pre_hook(enter(f"backward {kind[1]}"))]
            hooks += [part.register_full_backward_hook(leave)]
    with torch.profiler.profile() as profiler, torch.profiler.record_function("all"):
        action()
    for hook in hooks:
        hook.remove()
    if ranks()[0] == 0:  # several would lose the file
        profiler.export_chrome_trace(str(path))
    lines = [f"every operation: {path}, for chrome://tracing or ui.perfetto.dev"]
    for row in sorted(profiler.key_averages(), key=lambda row: row.cpu_time_total):
        if re.match("(forward|backward|update|all)( |$)", row.key):
            cpu, gpu = row.cpu_time_total / 1e3, row.device_time_total / 1e3
            on_gpu = f", GPU {gpu:9.1f} ms" * torch.cuda.is_available()
            lines.append(f"{row.key:18} {row.count:3} times, CPU {cpu:9.1f} ms{on_gpu}")
    return "\n".join(lines[::-1])


def show_sample(ckpt: Path, tokens: int):
    """Print what the model of a checkpoint writes, by sample.py where it is."""
    sampler = Path(__file__).parent / "sample.py"
    if tokens and sampler.exists() and ckpt.exists() and ranks()[0] == 0:
        sys.stdout.flush()
        env = dict(os.environ)
        env.pop("LOCAL_RANK", None)  # it is none of torchrun's
        words = [sys.executable, sampler, f"--ckpt={ckpt}", f"--max_new_tokens={tokens}"]
        subprocess.run(words, env=env)


def table_row(record: dict, words: list[str]) -> str:
    """A run as a row of a table of results."""
    code = hashlib.sha256("".join(source_texts().values()).encode()).hexdigest()[:12]
    minutes, date = record["seconds"] / 60, time.strftime("%Y-%m-%d")
    bits = record["bpb"] or math.nan
    return f"| {bits:.4f} | {minutes:.1f} | {record['flops']:.3g} | {code} | {date} | `{' '.join(words)}` |"


def train_loop(training: Run, sources: list, val: list, mix: list, peak: float) -> dict:
    """Train up to max_iters; at each interval a checkpoint, then an evaluation and its record. Returns the last one.

    Ctrl-C and SIGTERM let the step end, write a checkpoint and raise KeyboardInterrupt.
    """
    o, p, wishes = training.o, training.progress, []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: wishes.append(True))
    ckpt = Path(o.output) / "ckpt.pt"
    while True:
        if o.minutes and p.pace:  # the step at which they will be over
            left = max(0.0, 60 * o.minutes - p.seconds)
            o.max_iters = p.step + round(left / p.pace)
        last = p.step >= o.max_iters
        if p.step and p.step % o.eval_interval == 0 or last:
            training.save("ckpt.pt")
            record = training.evaluate(val)
            hidden = ", bits a byte unknown, as <|unk|> is" * ("<|unk|>" in training.tokenizer.special_tokens)
            bits = ", {bpb:.4f} bits a byte" if record["bpb"] else hidden
            noise = ", noise scale {noise_scale:,.0f} tokens" if o.noise_scale else ""
            if record.get("noise_scale", 1) < 0:
                noise = ", noise scale not measurable yet"  # the estimate of |G|^2 is below 0
            losses = "step {step:5d}: train {train_loss:.4f}, validation {val_loss:.4f} nats"
            print((losses + bits + ", {seconds:.0f} s" + noise).format(**record))
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
            if o.sample_tokens > 0 and training.tokenizer.vocab:
                training.written()
                show_sample(ckpt, o.sample_tokens)
        if last:
            training.written()
            return record
        loss, stop = training.train_step(sources, bool(wishes), mix)
        if sys.stdout.isatty():
            speed = o.batch_size * o.block_size / p.pace  # tokens a second
            print(f"step {p.step} of {o.max_iters}: loss {loss:.4f}, {speed:,.0f} tokens/s, "
                  f"MFU {speed * training.flops / peak:.0%}, {p.pace * (o.max_iters - p.step):.0f} s left   ",
                  end="\r", flush=True)
        if stop:
            training.save("ckpt.pt")
            training.written()
            saved = "ckpt.pt is saved,"
            if o.parts:
                saved = "parts is saved for ddp.py --merge; joined,"
            print(f"\nstopped after step {p.step}; {o.output}/{saved} --resume goes on from it")
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
            most = float("inf" if of is float else 2**63)
            return of(value) if of is str or abs(value) < most and of(value) == value else float("none")
        read.__name__ = field.type.__name__  # argparse names it where the text is not of this type
        alone: dict = dict(nargs="?", const=True) if field.type is bool else {}
        parser.add_argument(f"--{field.name}", type=read, default=field.default, help=argparse.SUPPRESS, **alone)
        shown = f"{field.default:g}" if field.type is float else field.default
        head = f"\n  --{field.name}={shown} ".ljust(31)
        parser.epilog += head + ("\n" + " " * 30).join(textwrap.wrap(notes[field.name], 49))
    for flag, word in zip(["", *words], words):
        name = word.lstrip("-").partition("=")[0]
        if not word.startswith("--") or name not in (*notes, "help"):
            near = f"{flag}={word}" if flag[2:] in notes else f"--{difflib.get_close_matches(name, notes, 1, 0)[0]}=..."
            parser.error(f"{word!r} is no option; options are written --key=value, the nearest is {near}")
    return kind(**vars(parser.parse_args(words)))


def run(main: Callable[[], None]) -> None:
    """Call main; a mistake of the user's ends in one line and exit code 1 (`python -X dev` shows the traceback)."""
    def check(event, args):
        if event == "open" and Path(str(args[0])).is_fifo():
            raise ValueError(f"{args[0]} is a pipe, which may wait for ever: give a file")
    sys.addaudithook(check)
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError, MemoryError, RuntimeError, ModuleNotFoundError) as error:
        scarce = re.search("memory|new thread|unavailable|Storage size|bad_alloc", str(error))
        if sys.flags.dev_mode or isinstance(error, RuntimeError) and not scarce:
            raise
        if not getattr(error, "filename", "-"):  # stdout's disk is full, or its reader left, as in `| head`
            sys.stdout = sys.stderr  # for Python flushes it at the end
        sys.exit(0 if isinstance(error, BrokenPipeError) else f"{Path(sys.argv[0]).name}: {str(error) or 'no memory'}")


def take_up(o: Options, words: list[str]) -> tuple[Options, dict]:
    """The checkpoint of --resume or --init_from, and the options with its own where `words` give none."""
    tokenizer = Path(o.output) / "init-tokenizer.json"  # of --init_from, for text, which data.py is to encode with it
    if o.init_from:
        require(not o.resume, "--init_from begins a new run, --resume goes on with one: give one of them")
        checkpoint = model.load_checkpoint(o.init_from)
        stored = {name: value for name, value in checkpoint["config"].items() if name != "vocab_size"}
        for name in ("progress", "optimizer", "corpus"):
            checkpoint.pop(name, None)
        for name in [name for name in checkpoint["weights"] if name.startswith("counts.")]:
            del checkpoint["weights"][name]  # of another text, or the same: it is counted anew
        if checkpoint.get("tokenizer"):
            stored["tokenizer"] = tokenizer
            if ranks()[0] == 0:
                with replacing(tokenizer) as file:
                    file.write(json.dumps(checkpoint["tokenizer"]).encode())
    else:
        ckpt = Path(o.ckpt or f"{o.output}/ckpt.pt")
        part = ckpt.parent / "parts" / "part-0.pt"  # of --parts, from which no run goes on
        newer = part.exists() and not (ckpt.exists() and ckpt.stat().st_mtime >= part.stat().st_mtime)
        require(o.ckpt or not newer, f"{part.parent} is newer than {ckpt}; delete it, or join it by "
                f"python ddp.py --merge={part.parent} --output={ckpt}")
        if not ckpt.exists() and not o.ckpt:
            print(f"nothing to resume in {o.output}: starting at step 0")
            return o, {}
        away = not o.ckpt or ckpt.resolve().parent != Path(o.output).resolve()
        require(away, "--ckpt begins a branch, which needs an --output of its own; without it --resume goes on")
        checkpoint = model.load_checkpoint(ckpt)
        require("progress" in checkpoint, f"{ckpt} is a checkpoint of weights alone; there is no run to resume")
        stored = checkpoint["train"]
        if stored.get("init_from") and tokenizer.exists():
            stored["tokenizer"] = tokenizer
        given = stored.get("data", "")
        folders = map(Path, given.split(","))
        tokens = given and all((folder / "train.npy").exists() for folder in folders)
        if o.ckpt and not tokens and (ckpt.parent / "train.npy").exists():
            stored["data"] = str(ckpt.parent)
    fresh, ends = ["output", "ckpt"], ["minutes", "flops", "tokens", "max_iters"]  # the folder may have moved
    if any(getattr(o, name) for name in ends):  # a new end is in place of the old, of whatever kind
        fresh += ends
    # what this version does not know is left out
    known = [f"--{key}={value}" for key, value in stored.items() if key not in fresh and hasattr(Options, key)]
    own = options(Options, known + words)
    if o.init_from:
        checkpoint["config"]["counts"] = own.counts
    return own, checkpoint


def main():
    words = sys.argv[1:]
    o, checkpoint = options(Options, words), {}
    if "LOCAL_RANK" in os.environ:  # torchrun
        join_ranks(o)
        sys.stdout = open(os.devnull, "w") if ranks()[0] else sys.stdout  # one of them prints
    keep_freed_memory()
    timed = o.minutes or o.leaderboard
    require(not (timed and o.max_iters), "--minutes and --leaderboard end by the clock: leave out --max_iters")
    ckpt = Path(o.output) / "ckpt.pt"
    ckpt.parent.mkdir(parents=True, exist_ok=True)
    _lock = claim(ckpt.parent) if ranks()[0] == 0 else None
    if o.resume or o.init_from:
        o, checkpoint = take_up(o, words)
    agree(step=checkpoint.get("step", 0), **vars(o))
    o.minutes = o.minutes or 2.0 * (o.leaderboard and "progress" not in checkpoint)  # a resumed one has its end
    torch.set_default_dtype(torch.float64 if o.dtype == "float64" else torch.float32)
    plan = recipe(dataclasses.replace(o, minutes=0, flops=0, tokens=0), 1, o.vocab_size or 2048, 1.0)
    shape_of(plan, 2**31).check()  # before the work of tokenising
    folders = prepare_tokens(o)
    held = [Path(word) for word in o.eval_data.split(",")] if o.eval_data else folders
    sources = [open_source(folder, "train") for folder in folders]
    val = [open_source(folder, "val") for folder in held]
    agree(token_files=corpus_hash(sources + val)[:12])
    tokenizer = open_tokenizer([*folders, *held])
    own = len(tokenizer.vocab) or o.vocab_size or 1 + max(int(source.tokens.max()) for source in sources + val)
    require(tokenizer.vocab or not o.leaderboard, "--leaderboard needs a tokenizer, for it counts bits a byte")
    theirs = checkpoint.get("tokenizer") or tokenizer.to_dict()
    require(tokenizer.to_dict() in ({}, theirs), "the checkpoint has another tokenizer than the tokens")
    vocab_size = checkpoint["config"]["vocab_size"] if o.init_from else own
    device = pick_device(o.device)
    dtype = precision(o, device) or torch.get_default_dtype()
    peak = torch.tensor([measured_peak(device, dtype)], device=device)
    sum_over_ranks([peak])
    n_tokens = sum(len(source.tokens) for source in sources)
    mix = shares(o.mix, folders)
    o.mix = ",".join(map(str, mix))  # of a file the numbers, for it may change until the run is resumed
    o = recipe(o, n_tokens, vocab_size, peak.item())
    refuse(o, sources)
    training = Run(o, vocab_size, tokenizer, checkpoint)
    count_ngrams(training.gpt, sources)
    training.corpus = corpus_hash(sources)
    same = o.ckpt or checkpoint.get("corpus", training.corpus) == training.corpus
    require(same, "the token files are not those that the run began with; --ckpt=... begins a branch on others")
    held = sum(len(source.tokens) for source in val)
    names = ", ".join(map(str, folders))
    print(f"{names}: {n_tokens:,} training tokens, {held:,} for validation, of {vocab_size:,} kinds")
    print(model.report(training.gpt.config, training.o.micro_batch, o.optimizer))
    if training.progress.step:
        print(f"going on from step {training.progress.step:,}")
    reads = o.max_iters * o.batch_size * o.block_size
    print(f"{o.max_iters:,} steps of {o.batch_size} x {o.block_size} tokens: {reads:,}, {reads / n_tokens:.2f} epochs")
    if o.profile:
        training.train_step(sources, False, mix)  # the first is not like the others
        print(profile(training.gpt, lambda: training.train_step(sources, False, mix), ckpt.parent / "trace.json"))
        return
    if ranks()[0] == 0:
        begin(training.o, training.progress.step, training.corpus)
    limit = max(2, o.eval_tokens // len(val))
    val = [Source(tokens[:limit], mask[:limit]) for tokens, mask in val]
    record = train_loop(training, sources, val, mix, peak.item())
    print(f"checkpoints held training up for {training.paused / training.progress.seconds:.2%} of its time")
    if o.leaderboard:
        print(table_row(record, words))
    if o.parts:
        print(f"next: python ddp.py --merge={ckpt.parent / 'parts'} --output={ckpt}")
    elif tokenizer.vocab:
        show_sample(ckpt, 200 if o.sample_tokens < 0 else 0)
        print(f"next: python sample.py --ckpt={ckpt} --prompt='{'The' if o.data else 'def'}'")


if __name__ == "__main__":
    run(main)
