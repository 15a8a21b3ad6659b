"""Every way to split a model over processes, checked against one that is not.

Reads: nothing; --merge: a folder with the parts of a checkpoint.
Writes: tables to stdout; --merge: OUTPUT, one checkpoint.
Usage: python ddp.py
       python ddp.py --ranks=4 --mesh=dp2,tp2
       torchrun --nproc_per_node=4 ddp.py
       python ddp.py --plan --gpus=1024 --params=70e9 --tokens=1e12

All are written out here. For real runs torch's own engine does the same with
more care: `train.py --parallel=torch_ddp` or `torch_fsdp`.
References: Rajbhandari et al. 2020 (ZeRO); Narayanan et al. 2021 (Megatron-LM);
Liu et al. 2023 (ring attention).
"""
import argparse
import atexit
import contextlib
import dataclasses
import datetime
import difflib
import inspect
import logging
import math
import multiprocessing
import os
import re
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


@dataclasses.dataclass
class Options:
    ranks: int = 2  # processes to start here (under torchrun: its own)
    mesh: str = ""  # a product of splits, such as dp2,tp2: pp, dp, ep, cp, tp (empty: every form of the table)
    only: str = ""  # of the table: forms with this in their name
    stage: int = 0  # what dp shards: 0 nothing, 1 the optimizer's state, 2 gradients too, 3 parameters too
    bucket: float = 25.0  # MiB of gradients that travel together
    overlap: bool = True  # while the backward pass goes on
    schedule: str = "1f1b"  # of pp: gpipe, 1f1b
    micro: int = 4  # micro-batches of a step
    optimizer: str = "adamw"  # of hidden matrices: adamw, muon
    recompute: bool = False  # keep what enters each block alone
    capacity: float = 0.0  # of ep: passes that an expert takes, over the mean (0: all)
    steps: int = 20  # of each form
    dtype: str = "float64"  # or float32
    timeout: int = 60  # seconds after which a rank gives up waiting for another
    show_schedule: bool = False  # draw the pipeline of --mesh (or 4 stages), then stop
    bench_collectives: bool = False  # time the collectives by size, then stop
    merge: str = ""  # folder with the parts of a checkpoint, to be joined in --output
    output: str = "ckpt.pt"  # file for --merge
    plan: bool = False  # find the best mesh for --gpus, --params, --tokens, then stop
    gpus: int = 1024  # plan: how many
    params: float = 70e9  # plan: parameters of the model
    tokens: float = 1e12  # plan: of the training
    batch_tokens: float = 4e6  # plan: of a step
    block_size: int = 8192  # plan: tokens of a sequence
    machine: str = "h100"  # plan: a key of MACHINES, or its numbers: 989e12,80e9,450e9,50e9,8


def require(holds: object, reason: str) -> None:
    """Raise ValueError(reason) unless `holds`."""
    if not holds:
        raise ValueError(reason)


# ---- collectives, made of messages between two ranks

@contextlib.contextmanager
def talking() -> Iterator[None]:
    """Raise ConnectionError, which ends in one line, where a message fails: then another rank has ended or hangs."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConnectionError(f"another rank is gone or does not answer ({reason:.150})") from error


class Group:
    """Some ranks that talk to each other; `sent` counts the bytes of this one.

    All ranks of a group call the same methods in the same order. `delay` (seconds a byte) stands for a slower link.
    """

    delay = 0.0
    timeout = datetime.timedelta(minutes=10)
    sent = 0  # by this process, in all its groups

    def __init__(self, ranks: list[int], channel: dist.ProcessGroup | None = None):
        self.ranks, self.channel = ranks, channel
        self.size = len(ranks)
        self.rank = ranks.index(dist.get_rank())  # this one's place among them

    def start(
        self,
        out: Tensor | None,
        to: int,
        into: Tensor | None = None,
        source: int = 0,
    ) -> list:
        """Begin to send `out` to a rank, and to fill `into` with what another sends; what to wait for."""
        jobs = []
        if out is not None:
            other = self.ranks[to % self.size]
            jobs.append(dist.P2POp(dist.isend, out.contiguous(), other, self.channel))
            Group.sent += out.nbytes
            time.sleep(self.delay * out.nbytes)
        if into is not None:
            other = self.ranks[source % self.size]
            jobs.append(dist.P2POp(dist.irecv, into, other, self.channel))
        with talking():
            return dist.batch_isend_irecv(jobs)

    def exchange(self, *message) -> None:
        """As start, to the end."""
        jobs = self.start(*message)
        with talking():
            for job in jobs:
                job.wait()

    def tree(self, root: int) -> Iterator[tuple[bool, int]]:
        """The messages of a binomial tree from its root on: (whether this rank sends, the other rank)."""
        place, span = (self.rank - root) % self.size, 1
        while span < self.size:  # those before `span` know; each tells another
            if place < span and place + span < self.size:
                yield True, self.rank + span
            elif span <= place < 2 * span:
                yield False, self.rank - span
            span *= 2

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        """x of the root, in place, in log2(n) rounds"""
        for sends, other in self.tree(root):
            if sends:
                self.exchange(x, other)
            else:
                self.exchange(None, 0, x, other)
        return x

    def reduce(self, x: Tensor, root: int = 0) -> Tensor:
        """The sum of all x, in place at the root: the tree of broadcast, backwards"""
        for receives, other in reversed(list(self.tree(root))):
            if receives:
                new = torch.empty_like(x)
                self.exchange(None, 0, new, other)
                x += new
            else:
                self.exchange(x, other)
        return x

    def scatter(self, rows: Tensor | None, own: Tensor, root: int = 0) -> Tensor:
        """Row r of the root's `rows` (n, ...) to rank r, into `own`"""
        if self.rank != root:
            self.exchange(None, 0, own, root)
            return own
        for other in set(range(self.size)) - {root}:
            self.exchange(rows.select(0, other), other)
        return own.copy_(rows.select(0, root))

    def gather(self, own: Tensor, root: int = 0) -> Tensor | None:
        """`own` of all ranks at the root, (n, ...)"""
        if self.rank != root:
            self.exchange(own, root)
            return None
        rows = torch.stack([own] * self.size)
        for other in set(range(self.size)) - {root}:
            self.exchange(None, 0, rows[other], other)
        return rows

    def all_gather(self, rows: Tensor) -> Tensor:
        """Row r of rank r to all, in place in (n, ...): n - 1 times round the ring, each rank passes on what it got"""
        me, n = self.rank, self.size
        for turn in range(n - 1):
            known, new = rows[(me - turn) % n], rows[(me - turn - 1) % n]
            self.exchange(known, me + 1, new, me - 1)
        return rows

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        """The sum over all ranks of row r, at rank r; `rows` (n, ...) is used up: sums grow on their way round"""
        me, n = self.rank, self.size
        new = torch.empty_like(rows[0])
        for turn in range(n - 1):
            self.exchange(rows[(me - turn - 1) % n], me + 1, new, me - 1)
            rows[(me - turn - 2) % n] += new
        return rows[me]

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all x: 2 (n - 1) / n of its bytes a rank, whatever n"""
        size = x.numel()
        rows = x.new_zeros(self.size, -(-size // self.size))
        rows.flatten()[:size] = x.flatten()
        self.reduce_scatter(rows)
        self.all_gather(rows)
        return rows.flatten()[:size].view_as(x)

    def all_to_all(self, parts: list[Tensor], sizes: list[int]) -> Tensor:
        """parts[r] to each rank r; what the ranks sent, sizes[r] rows from rank r, one behind the other"""
        me, n = self.rank, self.size
        out = parts[0].new_empty(sum(sizes), *parts[0].shape[1:])
        into = out.split(sizes)
        into[me].copy_(parts[me])
        for far in range(1, n):
            there, here = parts[(me + far) % n], into[(me - far) % n]
            self.exchange(there, me + far, here, me - far)
        return out


# In a backward pass sums become copies and copies sums: each collective that a model needs has one that undoes it.

class Through(torch.autograd.Function):
    """ahead(x) in the forward pass; back(gradient) in the backward pass."""

    @staticmethod
    def forward(ctx, x, ahead, back):
        ctx.back = back
        return ahead(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.back(grad.contiguous()), None, None


def gathered(x: Tensor, group: Group, dim: int) -> Tensor:
    """The parts x of all ranks, joined along a dimension"""
    rows = x.new_empty(group.size, *x.shape)
    rows[group.rank] = x
    return torch.cat(group.all_gather(rows).unbind(), dim)


def scattered(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's part of the sum of all x, cut along a dimension"""
    return group.reduce_scatter(torch.stack(x.chunk(group.size, dim)))


def there_and_back(x: Tensor, ahead: Callable, back: Callable, group: Group, dim: int) -> Tensor:
    """One of the two above in the forward pass, the other in the backward pass"""
    return Through.apply(x, partial(ahead, group=group, dim=dim), partial(back, group=group, dim=dim))


def summed(x: Tensor, group: Group) -> Tensor:
    """The sum over the ranks, each of which then goes on with the same: so the gradient of the sum is that of each."""
    return Through.apply(x, group.all_reduce, lambda grad: grad)


AXES = ("pp", "dp", "ep", "cp", "tp")  # neighbours on the last axis talk most: they belong on one machine


class Mesh:
    """Ranks as the points of a box, such as dp2,tp2."""

    def __init__(self, text: str, world: int):
        self.text, self.size = text, dict.fromkeys(AXES, 1)
        for word in text.split(","):
            found = re.fullmatch(r"([a-z]+)([1-9]\d*)", word)
            require(found and self.size.get(found[1]) == 1,
                    f"--mesh={text}: write axes with their sizes, each once, as dp2,tp2, from {', '.join(AXES)}")
            self.size[found.group(1)] = int(found.group(2))
        shape = list(self.size.values())
        needed = math.prod(shape)
        require(needed == world, f"--mesh={text} is for {needed} ranks, there are {world}")
        self.grid = np.arange(world).reshape(shape)
        place = np.argwhere(self.grid == (dist.get_rank() if dist.is_initialized() else 0))[0]
        self.at = dict(zip(AXES, place.tolist()))  # this rank's place on each axis

    def group(self, *axes: str) -> Group:
        """The ranks that differ from this one along these axes alone; all ranks must ask in the same order."""
        places = [AXES.index(axis) for axis in axes]
        size = math.prod(self.size[axis] for axis in axes)
        rows = np.moveaxis(self.grid, places, range(-len(axes), 0))
        for ranks in rows.reshape(-1, size).tolist():
            key = (*axes, *ranks)  # two groups may talk at once only if their names differ
            if len(ranks) > 1 and key not in CHANNELS:
                CHANNELS[key] = dist.new_group(ranks, Group.timeout)
            if dist.get_rank() in ranks:
                mine = Group(ranks, CHANNELS.get(key))
        return mine


CHANNELS = {}  # process groups: they take long to make, so the same are used again


# ---- data parallel: ranks with other rows of the batch; what all would keep alike may be sharded (Rajbhandari 2020)

def layout(sizes: list[int], n: int, whole: bool) -> tuple[int, list[int]]:
    """How long n equal rows must be to hold tensors of these sizes, and where in the rows (as one) each begins.

    `whole`: none lies in two rows (the largest first, to the emptiest row); else they lie one behind the other.

    >>> layout([2, 3, 4], 2, False), layout([2, 3, 4], 2, True)
    ((5, [0, 2, 5]), (5, [8, 5, 0]))
    """
    if not whole:
        ends = np.cumsum([0, *sizes]).tolist()
        return -(-ends[-1] // n), ends[:-1]
    filled, places = [0] * n, {}
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = filled.index(min(filled))
        places[i] = row, filled[row]
        filled[row] += sizes[i]
    length = max(filled)
    starts = [row * length + start for _, (row, start) in sorted(places.items())]
    return length, starts


class Unit:
    """Parameters that travel together: they are views of one buffer (n, length), of which rank r owns row r.

    `master` is this rank's row, and `pieces` its parameters or parts of them, which an optimizer moves. Without
    sharding there is one row, which all ranks own.
    """

    def __init__(self, named: dict[str, nn.Parameter], sharder: "Sharder"):
        self.named, self.stage, self.group, low = named, sharder.stage, sharder.group, sharder.low
        n, self.row = (self.group.size, self.group.rank) if self.stage else (1, 0)
        sizes = [p.numel() for p in named.values()]
        length, starts = layout(sizes, n, sharder.whole)
        self.spans = {name: (start, named[name].shape) for name, start in zip(named, starts)}
        wide = next(iter(named.values())).new_zeros(n, length)
        for name, view in self.views(wide).items():
            view.copy_(named[name].data)
        self.group.broadcast(wide)
        self.full = wide.to(low or wide.dtype)  # without `low` it is the same
        for name, view in self.views(self.full).items():
            named[name].data = view
        own = wide[self.row]
        self.master = own.clone() if self.stage == 3 or low else own
        self.grad = torch.zeros_like(self.master)
        self.pieces, self.grads, self.begins = {}, {}, {}  # by name; where in its parameter a piece begins
        left = self.row * length
        for name, (start, shape) in self.spans.items():
            size = shape.numel()
            begin, end = np.clip((start - left, start + size - left), 0, length).tolist()
            if begin < end:
                self.begins[name] = begin + left - start
                form = shape if end - begin == size else (end - begin,)
                own = self.master[begin:end].view(form)
                self.pieces[name] = nn.Parameter(own)
                self.grads[name] = self.grad[begin:end].view(form)
        self.there = True  # the parameters of all rows
        self.sent = False  # the gradients of this step
        self.job = None  # what is under way
        self.waiting = len(named)  # gradients that are not there yet

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """The parameters, or what stands in their place, in a buffer"""
        flat, found = rows.flatten(), {}
        for name, (start, shape) in self.spans.items():
            found[name] = flat[start:start + shape.numel()].view(shape)
        return found

    def collect(self) -> None:
        """Parameters of all rows, from their owners"""
        self.full[self.row] = self.master
        if self.stage:
            self.group.all_gather(self.full)

    def free(self) -> None:
        """Give the memory of all rows back; this rank's own is kept in `master`."""
        self.full.untyped_storage().resize_(0)
        self.there, self.job = False, None

    def reduce(self, rows: Tensor) -> None:
        """Add the sum of gradients over all ranks to those of the pieces"""
        add = self.group.reduce_scatter if self.stage else self.group.all_reduce
        self.grad += add(rows).view_as(self.grad)


# One thread sends for all sharders of a process, one message after the other. So the order is the same on all ranks,
# for they all compute the same layers in the same order.
WIRE = ThreadPoolExecutor(1)


class Sharder:
    """Any module, trained by several processes on parts of a batch, with any optimizer on `pieces`.

    Each rank: loss.backward() (`last` says whether more micro-batches follow), then sync(), which leaves sums over the
    ranks in the gradients of `pieces`, the optimizer's step on them, then spread().

    stage: 0 nothing is sharded, 1 the optimizer's state, 2 gradients, 3 parameters too: these are fetched before a
    module of `module`'s lists is used, the next one's meanwhile, and freed after. Gradients travel in buckets of
    `bucket` bytes (stage 3: those of a module together), `overlap`: as soon as they are there, while the backward pass
    goes on. `whole`: no parameter is cut, for optimizers that work on matrices (their owner computes). `low`: a type
    for the parameters, such as bfloat16, in which they travel; pieces and sums of gradients keep their own. `names`:
    those of the parameters that it is for.
    """

    def __init__(
        self,
        module: nn.Module,
        group: Group,
        stage: int = 0,
        bucket: float = 25 * 2**20,
        overlap: bool = True,
        whole: bool = False,
        low: torch.dtype | None = None,
        names: set[str] | None = None,
    ):
        self.group, self.stage, self.overlap = group, stage, overlap
        self.whole, self.low = whole, low
        self.last = True  # micro-batch of a step
        self.backward = False  # is going on
        most = math.inf if stage == 3 else max(bucket, 1)
        lots, size = {}, 0  # parameters by the name of a block, or by the number of a bucket
        for name, p in reversed(list(module.named_parameters())):  # gradients come from the last layer on
            if names is None or name in names:
                block = stage == 3 and re.match(r"(.*?\.)?\d+(?=\.)", name)  # as blocks.0 of blocks.0.norm.weight
                key = block[0] if block else size // most
                lots.setdefault(key, {})[name] = p
                size += p.nbytes
        blocks = [key for key in reversed(lots) if type(key) is str]
        self.blocks = [Unit(lots.pop(key), self) for key in blocks]
        self.rest = [Unit(named, self) for named in lots.values()]
        self.units = self.blocks + self.rest
        self.pieces, self.begins = {}, {}
        for unit in self.units:
            self.pieces |= unit.pieces
            self.begins |= unit.begins
            for p in unit.named.values():
                p.register_post_accumulate_grad_hook(partial(self.arrived, unit))
        if stage == 3:
            self.hook(module, [module.get_submodule(key) for key in blocks])

    def hook(self, module: nn.Module, blocks: list[nn.Module]) -> None:
        """Fetch what a module needs before it is used in either direction, the neighbour's too; free it after."""
        units = self.blocks

        def before(i, step, *_):
            self.backward |= step < 0
            self.need(units[i])
            again = self.backward and step > 0  # computed again, for its gradient
            if 0 <= i + step < len(units) and not again:
                self.fetch(units[i + step])

        def after(i, block, given, made):
            if not self.backward:
                units[i].free()
            for y in made if type(made) is tuple else (made,):  # backward hooks warn where the input is tokens
                if y.requires_grad:
                    y.register_hook(partial(before, i, -1))

        module.register_forward_pre_hook(self.begin)
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(before, i, 1))
            block.register_forward_hook(partial(after, i))
        for unit in self.units:
            unit.free()

    def begin(self, *_) -> None:
        """Before the forward pass of the whole (of what wraps `module`, if not of that): fetch what no list holds."""
        self.backward = False
        for unit in self.rest:
            self.need(unit)

    def start(self, unit: Unit, action: Callable, *x) -> None:
        """Do what talks to other ranks beside what goes on here, or (overlap=False) now."""
        unit.job = WIRE.submit(torch.no_grad()(action), *x)
        if not self.overlap:
            unit.job.result()

    def fetch(self, unit: Unit) -> None:
        """Begin to collect parameters that are not there."""
        if not unit.there:
            unit.full.untyped_storage().resize_(unit.full.nbytes)
            unit.there = True
            self.start(unit, unit.collect)

    def need(self, unit: Unit) -> None:
        """Go on when the parameters are there."""
        self.fetch(unit)
        unit.job and unit.job.result()

    def arrived(self, unit: Unit, p: nn.Parameter) -> None:
        """A gradient is there; the last one of a unit sends them all."""
        unit.waiting -= 1
        if unit.waiting == 0:
            unit.waiting = len(unit.named)
            if self.stage > 1 or self.last and self.overlap:
                self.send(unit)

    def send(self, unit: Unit) -> None:
        """Begin to sum a unit's gradients; they, and with stage 3 the parameters, are given back."""
        rows = unit.master.new_zeros(unit.full.shape)
        for name, view in unit.views(rows).items():
            if unit.named[name].grad is not None:
                view.copy_(unit.named[name].grad)  # type: ignore[arg-type]
                unit.named[name].grad = None
        if self.stage == 3:
            unit.free()
        self.start(unit, unit.reduce, rows)
        unit.sent = True

    def sync(self) -> None:
        """After the backward pass: the gradients of `pieces` are summed over all ranks."""
        for unit in self.units:
            if not unit.sent or unit.waiting < len(unit.named):  # not yet, or a parameter had no part in it
                self.send(unit)
        for unit in self.units:
            unit.job.result()
            unit.sent, unit.waiting = False, len(unit.named)
            for name, piece in unit.pieces.items():  # again, as an optimizer may have put another there
                piece.grad = unit.grads[name]

    @torch.no_grad()
    def spread(self) -> None:
        """After the optimizer's step: parameters to all ranks, gradients to zero."""
        for unit in self.units:
            unit.grad.zero_()
            if self.stage == 3:
                unit.free()
            elif self.stage or unit.full.dtype != unit.master.dtype:
                self.start(unit, unit.collect)
        for unit in self.units:
            unit.job and unit.job.result()


class TorchSharder:
    """torch's own engine, DistributedDataParallel or (`stage` 3) FSDP2, with the names of Sharder: for real runs.

    Pieces are what FSDP2 calls local shards, of the first dimension; with DDP they are the parameters. `run` is what
    must be called in place of the objective.
    """

    def __init__(self, objective: nn.Module, group: Group, stage: int):
        from torch.distributed import fsdp
        self.group, self.stage = group, stage
        device = next(objective.parameters()).device
        if stage:
            mesh = dist.device_mesh.init_device_mesh(device.type, (group.size,))
            for part in (*objective.gpt.blocks, objective):
                fsdp.fully_shard(part, mesh=mesh)
        self.run = objective if stage else nn.parallel.DistributedDataParallel(objective)
        self.weights = dict(objective.gpt.named_parameters())
        self.pieces, self.begins = {}, {}
        for name, p in self.weights.items():
            self.pieces[name] = nn.Parameter(p.to_local()) if stage else p
            rows = -(-len(p) // group.size) * group.rank if stage else 0  # of the ranks before
            self.begins[name] = rows * p.shape[1:].numel()

    def sync(self) -> None:
        """Hand the gradients on: torch's are means over the ranks, sums are wanted."""
        for name, p in self.weights.items():
            grad = p.grad if p.grad is not None else torch.zeros_like(p)
            self.pieces[name].grad = (grad.to_local() if self.stage else grad) * self.group.size

    def spread(self) -> None:
        """FSDP fetches what has changed by itself, and DDP's ranks have all changed the same."""
        for p in self.weights.values():
            p.grad = None

    def whole(self, name: str, x: Tensor) -> Tensor:
        """Of numbers for a piece, those for the whole parameter"""
        p = self.weights[name]
        if not self.stage or x.shape != self.pieces[name].shape:
            return x
        tensor = dist.tensor.DTensor.from_local(x, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
        return tensor.full_tensor()


# ---- parts of a model: what each axis of the mesh cuts

def qkv_blocks(c: Any) -> list[int]:
    """Rows of queries, keys and values in their one matrix"""
    groups = c.n_kv_head or c.n_head
    return [heads * c.head_width for heads in (c.n_head, groups, groups)]


# axis: which parameters, along which dimension, and the sizes of the blocks there, of which each rank gets a part
CUTS = {
    "tp": (
        (r"qkv\.weight$", 0, qkv_blocks),
        (r"ffn\.up\.weight$", 0, lambda c: [c.inner] * (1 + c.ffn.endswith("glu"))),
        (r"mixer\.out\.weight$", 1, lambda c: [c.n_head * c.head_width]),
        (r"ffn\.down\.weight$", 1, lambda c: [c.inner]),
        (r"^(embedding|head)\.weight$", 0, lambda c: [c.vocab_size]),
    ),
    "ep": ((r"ffn\.(up|down)\.weight$", 0, lambda c: [c.n_expert]),),
}


def cuts_of(name: str, config: Any, mesh: Mesh | SimpleNamespace) -> list[tuple]:
    """How a parameter is cut: (axis, dimension, sizes), for each axis that has several ranks"""
    found = []
    for axis, rows in CUTS.items():
        for names, dim, sizes in rows:
            experts = axis == "tp" or config.n_expert
            if mesh.size[axis] > 1 and experts and re.search(names, name):
                found.append((axis, dim, sizes(config)))
    return found


def sliced(x: Tensor, dim: int, sizes: list[int], n: int, i: int) -> Tensor:
    """Part i of n of each block

    >>> sliced(torch.arange(8), 0, [4, 2, 2], 2, 1)
    tensor([2, 3, 5, 7])
    """
    parts = [block.chunk(n, dim)[i] for block in x.split(sizes, dim)]
    return torch.cat(parts, dim)


def joined(parts: list[Tensor], dim: int, sizes: list[int]) -> Tensor:
    """The tensor of which `parts` are all parts

    >>> joined([torch.tensor([0, 1, 4, 6]), torch.tensor([2, 3, 5, 7])], 0, [4, 2, 2])
    tensor([0, 1, 2, 3, 4, 5, 6, 7])
    """
    small = [size // len(parts) for size in sizes]
    blocks = zip(*(part.split(small, dim) for part in parts))
    return torch.cat([part for block in blocks for part in block], dim)


def piece_of(x: Tensor, cuts: list[tuple], size: dict, at: dict, begin: int, n: int) -> Tensor:
    """n numbers from `begin` on, of what the axes leave the rank `at` this place of a tensor of the whole model"""
    for axis, dim, sizes in cuts:
        x = sliced(x, dim, sizes, size[axis], at[axis])
    return x.flatten()[begin:begin + n]


def single(x: Tensor) -> Tensor:
    """x in single precision, where it has less"""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def vocabulary_rows(gpt: nn.Module, group: Group) -> tuple[Callable, Callable]:
    """Embedding and loss where each rank has some rows of the vocabulary: (ids -> vectors), (x, targets -> loss sum).

    The softmax over all of it needs three numbers a token from each rank: the highest logit, the sum of exp(logit less
    that), and the right one's logit, which is 0 at all ranks but one.
    """
    size = gpt.config.vocab_size // group.size
    first = size * group.rank

    def here(ids):
        near = ids - first
        mine = (near >= 0) & (near < size)
        return near.clamp(0, size - 1), mine

    def look_up(ids):
        near, mine = here(ids)
        rows = F.embedding(near, gpt.embedding.weight) * mine[..., None]  # the others' are 0
        return there_and_back(rows, scattered, gathered, group, 1)  # (B, T / n, C)

    def loss(x, targets):
        logits = single(gpt.head(x))  # (R, V / n)
        highest = gathered(logits.detach().amax(1)[None], group, 0).amax(0)  # (n, R) -> (R)
        logits = logits - highest[:, None]
        near, mine = here(targets)
        right = logits.gather(1, near[:, None])[:, 0] * mine
        both = torch.stack((logits.exp().sum(1), right))  # (2, R)
        total, right = summed(both, group)
        losses = total.log() - right
        return losses[targets >= 0].sum()
    return look_up, loss


def tensor_parallel(gpt: nn.Module, objective: nn.Module, group: Group) -> None:
    """Each rank has some heads, some hidden units, some of the vocabulary (Shoeybi et al. 2019).

    Between them, where all channels are needed, each has some of the tokens (sequence parallelism, Korthikanti 2022):
    a layer gathers the tokens and scatters sums, in all as much as one all-reduce.
    """
    def before(layer, x):
        return there_and_back(x[0], gathered, scattered, group, 1), *x[1:]

    def after(layer, x, y):
        return there_and_back(y, scattered, gathered, group, 1)
    look_up, objective.rows = vocabulary_rows(gpt, group)
    if type(gpt.embedding) is not Absent:  # another stage of a pipeline has it
        gpt.embedding.forward = look_up
    if type(gpt.norm) is not Absent:
        gpt.norm.register_forward_hook(lambda _, x, y: there_and_back(y, gathered, scattered, group, 1))
    for block in [block for block in gpt.blocks if type(block) is not Absent]:
        block.mixer.heads = tuple(n // group.size for n in block.mixer.heads)
        for layer in (block.mixer, block.ffn):
            layer.register_forward_pre_hook(before)
            layer.register_forward_hook(after)
    for name, p in gpt.named_parameters():
        if "norm" in name:  # which sees some of the tokens, or some of the heads
            p.register_hook(group.all_reduce)


# ---- sequence parallel: ranks with other tokens of the same rows

class Ring(torch.autograd.Function):
    """Causal attention of all tokens, of which each rank has a part; keys and values go round (Liu et al. 2023).

    Rank r of n has the parts r and 2n - 1 - r of 2n, so that all have as much to do. Of a part of queries and one of
    keys the softmax's numerator and log-denominator are enough to add the next; nothing of size T x T is kept. In half
    precision the products are taken, and messages travel; scores, softmax and sums are in single.
    """

    @staticmethod
    def pairs(group, turn):
        """(queries' half, keys' half, whether the mask is causal) after some turns of the ring"""
        last = 2 * group.size - 1
        source = (group.rank - turn) % group.size
        for i, mine in enumerate((group.rank, last - group.rank)):
            for j, theirs in enumerate((source, last - source)):
                if theirs <= mine:
                    yield i, j, mine == theirs

    @staticmethod
    def scores(q, k, causal):
        """(B, H, T, hd) and (B, H, S, hd) -> (B, H, T, S)"""
        s = single(q @ k.mT) / q.shape[3] ** 0.5
        later = torch.ones_like(s[0, 0]).triu(1).bool()
        return s.masked_fill(later, -math.inf) if causal else s

    @staticmethod
    def round(x, group, way):
        """x goes one rank on (way 1) or back (-1), and another takes its place"""
        new = torch.empty_like(x)
        group.exchange(x, group.rank + way, new, group.rank - way)
        return new

    @staticmethod
    def forward(ctx, q, k, v, group):
        """q (B, H, T / n, hd), k and v (B, H_kv, T / n, hd) -> (B, H, T / n, hd)

        With O over some of the keys and L the log of its denominator, S the scores of further ones and
        L' = log(exp L + sum exp S): O' = exp(L - L') O + exp(S - L') V.
        """
        shared = q.shape[1] // k.shape[1]  # query heads of a key head
        out, lse = single(torch.zeros_like(q)), single(q.new_full(q.shape[:3], -math.inf))
        queries, outs, lses = (x.chunk(2, 2) for x in (q, out, lse))  # halves
        kv = torch.stack((k, v))
        for turn in range(group.size):
            for i, j, causal in Ring.pairs(group, turn):
                k, v = kv.chunk(2, 3)[j].repeat_interleave(shared, 2)
                s = Ring.scores(queries[i], k, causal)
                new = torch.logaddexp(lses[i], s.logsumexp(-1))
                outs[i].mul_((lses[i] - new).exp()[..., None])
                outs[i].add_((s - new[..., None]).exp().type_as(v) @ v)
                lses[i].copy_(new)
            if turn < group.size - 1:
                kv = Ring.round(kv, group, 1)
        out = out.type_as(q)
        ctx.group, ctx.shared = group, shared
        ctx.save_for_backward(q, kv, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        """P = exp(S - L) is computed again; dS = P (dO V^T - sum dO O) / sqrt(hd) (Dao et al. 2022)."""
        q, kv, out, lse = ctx.saved_tensors
        group, dq, dkv = ctx.group, torch.zeros_like(q), torch.zeros_like(kv)
        along = (single(grad) * out).sum(-1)
        halves = list(zip(*(x.chunk(2, 2) for x in (q, grad, lse, along, dq))))
        for turn in reversed(range(group.size)):  # kv is where the last turn left it
            for i, j, causal in Ring.pairs(group, turn):
                queries, g, low, a, dqueries = halves[i]
                k, v = kv.chunk(2, 3)[j].repeat_interleave(ctx.shared, 2)
                p = (Ring.scores(queries, k, causal) - low[..., None]).exp()
                ds = p * (g @ v.mT - a[..., None]) / q.shape[3] ** 0.5
                p, ds = p.type_as(q), ds.type_as(q)
                dqueries += ds @ k
                both = torch.stack((ds.mT @ queries, p.mT @ g))  # (2, B, H, S, hd)
                dkv.chunk(2, 3)[j].add_(both.unflatten(2, (-1, ctx.shared)).sum(3))
            if turn:  # gradients travel with what they are of
                kv, dkv = Ring.round(torch.cat((kv, dkv)), group, -1).chunk(2)
        return dq, *dkv, None


def sequence_parallel(gpt: nn.Module, group: Group) -> None:
    """Attention by Ring, in place of model.ops while the model runs, and positions of the tokens that this rank has."""
    import model

    def look(tokens, state):
        at = zigzag(tokens.shape[1] * group.size, group)
        at = at[None].to(tokens.device)
        return tokens, at, at

    def attention(q, k, v, mask, cap):
        return Ring.apply(q, k, v, group)
    gpt.look, usual = look, gpt.hidden
    ring = SimpleNamespace(norm=model.Fast.norm, attention=attention, turn=model.Fast.turn)

    def hidden(*x):
        before, model.ops = model.ops, ring
        try:
            return usual(*x)
        finally:
            model.ops = before
    gpt.hidden = hidden


def zigzag(T: int, group: Group) -> Tensor:
    """Which of T tokens a rank has: a part from the beginning and one from the end, for later tokens see more."""
    parts = torch.arange(T).chunk(2 * group.size)
    return torch.cat((parts[group.rank], parts[-1 - group.rank]))


# ---- expert parallel: ranks with other experts, and other rows of the batch

def dispatch(ffn: nn.Module, group: Group, capacity: float, x: Tensor, ends: Tensor) -> Tensor:
    """What Experts.work does, by the ranks that have the experts: rows x, sorted by expert, go there and come back.

    An expert takes from each rank at most `capacity` times the mean (0: all); the outputs of the others are 0
    (Fedus et al. 2021).
    """
    counts = ends.diff(prepend=ends.new_zeros(1))
    kept = torch.arange(len(x), device=x.device)
    if capacity:
        most = math.ceil(capacity * len(x) / len(counts))
        kept = torch.cat([part[:most] for part in kept.split(counts.tolist())])
        counts = counts.clamp(max=most)
    to = counts.view(group.size, -1)  # rows to each expert of each rank
    come = group.all_to_all(list(to[:, None]), [1] * group.size)  # from each rank, to each expert here
    out = to.sum(1).tolist()
    into = come.sum(1).tolist()

    def there(x):
        return group.all_to_all(x.split(out), into)

    def back(x):
        return group.all_to_all(x.split(into), out)
    experts = torch.arange(come.shape[1], device=x.device).repeat(group.size)
    order = experts.repeat_interleave(come.flatten()).argsort(stable=True)  # by expert, no longer by rank
    rows = Through.apply(x[kept], there, back)
    ends = come.sum(0).cumsum(0)
    done = type(ffn).work(ffn, rows[order], ends)
    done = torch.zeros_like(done).index_copy(0, order, done)
    returned = Through.apply(done, back, there)
    return torch.zeros_like(x).index_copy(0, kept, returned)


# ---- pipeline: ranks with other layers, which micro-batches pass one behind the other

def gpipe(stage: int, stages: int, micro: int) -> list[tuple[str, int]]:
    """All forward passes, then all backward passes (Huang et al. 2019)."""
    order = range(micro)
    return [("F", i) for i in order] + [("B", i) for i in order]


def one_forward_one_backward(stage: int, stages: int, micro: int) -> list[tuple[str, int]]:
    """As soon as there is something to go back, by turns: no more than `stages` micro-batches are kept (2021)."""
    ahead = min(micro, stages - stage - 1)
    plan = [("F", i) for i in range(ahead)]
    for i in range(micro):
        plan += [("F", ahead + i)] if ahead + i < micro else []
        plan += [("B", i)]
    return plan


SCHEDULES = {"gpipe": gpipe, "1f1b": one_forward_one_backward}


def timeline(schedule: str, stages: int, micro: int) -> list[str]:
    """What each stage does, time from left to right: forward 0 1 2, backward aa bb cc (twice as long), idle dots.

    >>> timeline("1f1b", 2, 3)
    ['01..aa2bb.cc', '.0aa1bb2cc']
    """
    plans = [SCHEDULES[schedule](stage, stages, micro) for stage in range(stages)]
    lines, ended = [""] * stages, {}
    while any(plans):
        for stage, plan in enumerate(plans):
            while plan:
                kind, i = plan[0]
                before = stage - 1 if kind == "F" else stage + 1  # who must have done the same to the same
                if 0 <= before < stages and (kind, i, before) not in ended:
                    break
                plan.pop(0)
                idle = ended.get((kind, i, before), 0) - len(lines[stage])
                sign = str(i % 10) if kind == "F" else 2 * chr(97 + i % 26)
                lines[stage] += "." * idle + sign
                ended[kind, i, stage] = len(lines[stage])
    return lines


def show_schedule(stages: int, micro: int) -> None:
    """Draw the schedules; idle time of p stages and m micro-batches is (p - 1) / (m + p - 1) of the whole."""
    for schedule in SCHEDULES:
        lines = timeline(schedule, stages, micro)
        longest = max(map(len, lines))
        idle = 1 - 3 * micro / longest
        formula = (stages - 1) / (micro + stages - 1)
        print(f"{schedule}: {stages} stages, {micro} micro-batches; idle {idle:.1%}, by the formula {formula:.1%}")
        print(*(f"  {line.ljust(longest, '.')}" for line in lines), sep="\n")


class Absent(nn.Module):
    """Stands where another rank's layer is: passes on what comes, or what `value` holds."""

    value = None
    ffn = SimpleNamespace(loss=0.0)

    def forward(self, x, *_):
        return x if self.value is None else self.value


def stage_of(gpt: Any, group: Group) -> None:
    """Leave a model the layers of one stage; the names of its parameters stay.

    The first stage has the embedding, the last the final norm and the head; a matrix that is both, all stages have.
    """
    mine = np.array_split(np.arange(len(gpt.blocks)), group.size)[group.rank]
    for layer in {*range(len(gpt.blocks))} - {*mine.tolist()}:
        gpt.blocks[layer] = Absent()
    if group.rank < group.size - 1:
        gpt.norm, gpt.head = Absent(), Absent()
    if group.rank:
        weight, gpt.embedding = gpt.embedding.weight, Absent()
        gpt.embedding.weight = weight if gpt.config.tie_embeddings else None


# ---- the whole: a model on a mesh

def check_split(config: Any, mesh: Mesh, o: Options, batch: int) -> None:
    """Raise ValueError, naming what to change, for a model that cannot be split so."""
    size, plain = mesh.size, type(config)()
    parts = (
        ("tp", "n_head", config.n_head),
        ("tp", "n_kv_head", config.n_kv_head or config.n_head),
        ("tp", "n_inner", config.inner),
        ("tp", "vocab_size", config.vocab_size),
        ("ep", "n_expert", config.n_expert),
    )
    for axis, name, value in parts:
        n = size[axis]
        divisors = [d for d in range(2, value + 1) if value % d == 0][:8]
        require(n == 1 or value and value % n == 0,
                f"--mesh={mesh.text}: {axis}{n} does not divide --{name} ({value}; {divisors} do)")
    cp, tp = size["cp"], size["tp"]
    pieces = math.lcm(2 * cp, cp * tp) if cp > 1 else tp  # a rank of the ring has two
    require(config.block_size % pieces == 0,
            f"--mesh={mesh.text}: --block_size={config.block_size} is no multiple of {pieces}")
    require(size["pp"] <= config.n_layer, f"--mesh={mesh.text}: more stages than --n_layer={config.n_layer}")
    ways = size["dp"] * size["ep"]
    require(batch % ways == 0, f"--mesh={mesh.text}: --batch_size={batch} is no multiple of dp x ep = {ways}")
    require(o.stage in (0, 1, 2, 3), f"--stage={o.stage}: choose from 0, 1, 2, 3")
    require(o.schedule in SCHEDULES, f"--schedule={o.schedule}: choose from {', '.join(SCHEDULES)}")
    require(not config.recompute or size["cp"] == 1, "--recompute does not go with cp, which keeps little anyhow")
    require(o.stage < 3 or size["pp"] == size["ep"] == 1, "--stage=3 goes with dp, cp and tp; use 2 with pp and ep")
    require(o.optimizer != "soap" or tp == 1, "--optimizer=soap keeps more than a matrix has entries: not with tp")
    require(not config.n_expert or size["tp"] == size["pp"] == 1, "experts go with dp, cp and ep, not with tp and pp")
    if math.prod(size.values()) > size["dp"]:
        for name in "mixer position ngram ahead end_token bias qkv_bias residual dropout attention_softcap".split():
            same = getattr(config, name) in (getattr(plain, name), 1 if name == "ngram" else None)
            require(same, f"--mesh={mesh.text} is for --{name}={getattr(plain, name)}; others go with dp alone")


class Split:
    """What one rank of a mesh holds of `objective`: a module with `gpt` and `rows`, as train.py's Objective.

    A step is backward(), sync(), an optimizer's step on `pieces` (by their names in the whole model), spread().
    """

    def __init__(self, objective: Any, mesh: Mesh, o: Options, batch: int):
        gpt, config = objective.gpt, objective.gpt.config
        check_split(config, mesh, o, batch)
        self.run, self.gpt, self.config = objective, gpt, config
        self.mesh, self.o = mesh, o
        self.device = next(gpt.parameters()).device
        self.pp, self.cp, self.tp, ep = map(mesh.group, ("pp", "cp", "tp", "ep"))
        self.totals = mesh.group("pp", "dp", "ep", "cp")
        self.every = mesh.group(*AXES)
        self.cuts, self.shapes = {}, {}  # how a parameter is cut, what shape is left
        for name, p in gpt.named_parameters():
            self.cuts[name] = cuts_of(name, config, mesh)
            for axis, dim, sizes in self.cuts[name]:
                p.data = sliced(p.data, dim, sizes, mesh.size[axis], mesh.at[axis])
            self.shapes[name] = p.shape
        stage_of(gpt, self.pp)
        if self.tp.size > 1:
            tensor_parallel(gpt, objective, self.tp)
        if self.cp.size > 1:
            sequence_parallel(gpt, self.cp)
        for block in gpt.blocks if ep.size > 1 else ():
            block.ffn.work = partial(dispatch, block.ffn, ep, o.capacity)
        self.shard()

    def shard(self) -> None:
        """A sharder for each lot of parameters: experts, what all stages have, all others; or torch's for all"""
        o, mesh, config = self.o, self.mesh, self.config
        tied = {"embedding.weight"} if config.tie_embeddings and self.pp.size > 1 else set()
        experts = {name for name, cuts in self.cuts.items() if cuts and cuts[0][0] == "ep"}
        rest = self.cuts.keys() - tied - experts
        whole = o.optimizer != "adamw" or config.ngram > 1  # what works on matrices, and on rows of tables
        make = partial(Sharder, self.gpt, bucket=o.bucket * 2**20, whole=whole)
        data, few = mesh.group("dp", "ep", "cp"), mesh.group("dp", "cp")  # ranks with other tokens, equal parameters
        if o.mesh in TORCH:
            self.sharders: list = [TorchSharder(self.run, data, TORCH[o.mesh])]
            self.run = self.sharders[0].run
        else:
            self.sharders = [
                make(few, o.stage, overlap=o.overlap, names=experts),
                make(self.totals, min(o.stage, 1), overlap=False, names=tied),
                make(data, o.stage, overlap=o.overlap, names=rest),
            ]
            for sharder in self.sharders if o.stage == 3 else ():
                self.run.register_forward_pre_hook(sharder.begin)
        self.pieces, self.begins = {}, {}
        self.copies = {}  # of a piece: how many ranks have the same numbers
        for sharder in self.sharders:
            self.pieces |= sharder.pieces
            self.begins |= sharder.begins
            for name in sharder.pieces:
                self.copies[name] = 1 if sharder.stage else sharder.group.size
                self.copies[name] *= 1 if self.cuts[name] else self.tp.size

    def rows(self, batch: int) -> np.ndarray:
        """Which rows of a batch are for this rank"""
        size, at = self.mesh.size, self.mesh.at
        first = at["dp"] * size["ep"] + at["ep"]
        return np.arange(first, batch, size["dp"] * size["ep"])

    def part(self, x: Tensor) -> Tensor:
        """Which tokens of its rows (B, T) are for this rank"""
        return x[:, zigzag(x.shape[1], self.cp)] if self.cp.size > 1 else x

    def backward(self, parts: list[tuple[Tensor, Tensor]], train: bool = True) -> tuple[float, float]:
        """Gradients of micro-batches (tokens, targets) of this rank's rows; loss sum and count of the whole batch."""
        micro = len(parts)
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        parts = [tuple(map(self.part, part)) for part in parts]
        actions = SCHEDULES[self.o.schedule](self.pp.rank, self.pp.size, micro)
        first, last = self.pp.rank == 0, self.pp.rank == self.pp.size - 1
        kept, sent = {}, []  # what a backward pass needs of each micro-batch; messages under way
        for kind, i in actions if train else [action for action in actions if action[0] == "F"]:
            tokens, targets = parts[i]
            if kind == "F":
                x = None  # of the stage before
                if not first:
                    shape = len(tokens), tokens.shape[1] // self.tp.size, self.config.n_embd
                    x = torch.empty(shape, device=self.device)
                    self.pp.exchange(None, 0, x, self.pp.rank - 1)
                    self.gpt.embedding.value = x.requires_grad_(train)
                y, count = self.run(tokens, targets) if last else (self.gpt.hidden(tokens), 0)
                if last:
                    totals += torch.stack((y.detach(), count))  # type: ignore[arg-type]
                sent += [] if last else self.pp.start(y.detach(), self.pp.rank + 1)
                kept[i] = (x, y) if train else None
            else:
                x, y = kept.pop(i)
                grad = None if last else torch.empty_like(y)
                if not last:
                    self.pp.exchange(None, 0, grad, self.pp.rank + 1)
                for sharder in self.sharders:
                    sharder.last = i == micro - 1
                y.backward(grad)
                sent += [] if first else self.pp.start(x.grad, self.pp.rank - 1)
        with talking():
            for job in sent:
                job.wait()
        loss, count = self.totals.all_reduce(totals).tolist()
        return loss, count

    def sync(self) -> None:
        """Gradients of `pieces` are those of the sum over the whole batch."""
        for sharder in self.sharders:
            sharder.sync()

    def norm(self, without: tuple = ()) -> float:
        """The norm of the gradient of the whole model (without some parameters)"""
        total = torch.zeros(1, dtype=torch.float64, device=self.device)
        for name, piece in self.pieces.items():
            if name not in without:
                total += piece.grad.square().sum().double() / self.copies[name]
        return self.every.all_reduce(total).sqrt().item()

    def spread(self) -> None:
        """Parameters, changed by their owners, to all that use them"""
        for sharder in self.sharders:
            sharder.spread()

    def own(self, name: str, x: Tensor) -> Tensor:
        """Of a tensor as large as a parameter of the whole model, what belongs to this rank's piece"""
        cuts, piece = self.cuts[name], self.pieces[name]
        if not cuts and x.numel() != self.shapes[name].numel():  # one number for each row, which is never cut
            return x
        x = piece_of(x, cuts, self.mesh.size, self.mesh.at, self.begins[name], piece.numel())
        return x.view(piece.shape)

    def on_whole(self, name: str, update: Callable) -> Callable:
        """An optimizer's update of a matrix of which a rank may have a part: put together, moved, cut again"""
        if self.o.mesh == "torch_fsdp":
            whole = partial(self.sharders[0].whole, name)
        elif self.cuts[name] and self.cuts[name][0][0] == "tp":
            _, dim, sizes = self.cuts[name][0]

            def whole(x):
                return joined(gathered(x[None], self.tp, 0), dim, sizes)
        else:
            return update

        @torch.no_grad()
        def run(weight, state, *rest):
            every, states = nn.Parameter(whole(weight)), [whole(x) for x in state]
            every.grad = whole(weight.grad)
            update(every, states, *rest)
            weight.copy_(self.own(name, every))
            state[:] = [self.own(name, x) for x in states]
        return run

    def export(self, state: dict[str, list[Tensor]]) -> dict:
        """This rank's part of a checkpoint: its place, and of each piece where it begins, its numbers, and `state`"""
        pieces = {}
        for name, piece in self.pieces.items():
            tensors = [x.detach().cpu() for x in (piece, *state.get(name, []))]
            pieces[name] = self.begins[name], list(self.shapes[name]), tensors
        return dict(at=self.mesh.at, mesh=self.mesh.text, pieces=pieces)

    def save(self, folder: Path, state: dict[str, list[Tensor]], **rest) -> None:
        """Write this rank's part of a checkpoint; `python ddp.py --merge=FOLDER` joins them. Raises OSError."""
        import model
        folder.mkdir(parents=True, exist_ok=True)
        part = dict(version=model.CHECKPOINT_VERSION, world=self.every.size, config=vars(self.config))
        part["buffers"] = dict(self.gpt.named_buffers())  # alike on all ranks, as the bias of routers
        path = folder / f"part-{dist.get_rank()}.pt"
        with model.replacing(path) as file:
            try:
                torch.save(part | rest | self.export(state), file)
            except RuntimeError as error:  # torch's writer turns a full disk into this
                raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
            os.fsync(file.fileno())
            with talking():  # no part is replaced before all are on disk, for those of two steps cannot be joined
                dist.barrier()
        for old in folder.glob("part-*.pt") if dist.get_rank() == 0 else ():
            number = old.stem.removeprefix("part-")
            if number.isdigit() and int(number) >= self.every.size:  # of an earlier run on more ranks
                old.unlink()

    def whole(self, state: dict[str, list[Tensor]]) -> tuple[dict, dict]:
        """Weights and optimizer state of the whole model at rank 0; others have nothing"""
        rank, world = dist.get_rank(), dist.get_world_size()
        parts: list | None = None if rank else [None] * world
        dist.gather_object(self.export(state), parts)
        weights, states = assemble(parts, self.config, world) if parts else ({}, {})
        return self.gpt.state_dict() | weights, states  # the former for its buffers


KINDS = {  # by the name that train.py's --parallel gives
    "ddp": "--mesh=dp{n}",
    "zero1": "--mesh=dp{n} --stage=1",
    "zero2": "--mesh=dp{n} --stage=2",
    "fsdp": "--mesh=dp{n} --stage=3",
    "tp": "--mesh=tp{n}",
    "pp": "--mesh=pp{n}",
    "cp": "--mesh=cp{n}",
    "ep": "--mesh=ep{n}",
    "torch_ddp": "--mesh=torch_ddp",
    "torch_fsdp": "--mesh=torch_fsdp",
}
TORCH = {"torch_ddp": 0, "torch_fsdp": 3}  # what torch's own engines shard, as a stage
FSDP_ON_CPU = hasattr(torch.cpu.Stream, "record_event")  # not in torch 2.6


def engine(objective: nn.Module, o: Options, batch: int) -> Split:
    """The part of a model that this rank trains, on --mesh"""
    n, device = dist.get_world_size(), next(objective.parameters()).device
    fit = o.mesh != "torch_fsdp" or FSDP_ON_CPU or device.type != "cpu"
    require(fit, f"--parallel=torch_fsdp: torch {torch.__version__} has it on GPUs alone")
    return Split(objective, Mesh(f"dp{n}" if o.mesh in TORCH else o.mesh, n), o, batch)


def split_model(objective: nn.Module, kind: str, optimizer: str, batch: int) -> Split:
    """The same by a key of KINDS, or a mesh such as dp2,tp2: what train.py's --parallel asks for.

    Raises ValueError for another word, and for a model that cannot be split so.
    """
    known = kind in KINDS or re.search(r"\d", kind)
    require(known, f"--parallel={kind}: choose from {', '.join(KINDS)}, or a mesh such as dp2,tp2")
    words = KINDS.get(kind, f"--mesh={kind}").format(n=dist.get_world_size()).split()
    o = options(Options, [*words, f"--optimizer={optimizer}"])
    return engine(objective, o, batch)


def assemble(parts: list[dict], config: Any, world: int) -> tuple[dict, dict]:
    """Weights and optimizer state of the whole model from all ranks' parts. Raises ValueError where one is missing."""
    ranks = {str(part["at"]) for part in parts}
    require(len(ranks) == world, f"{len(ranks)} parts are there, {world} were written")
    size = {axis: 1 + max(part["at"][axis] for part in parts) for axis in AXES}
    found = {}
    for part in parts:
        for name, (begin, shape, tensors) in part["pieces"].items():
            cuts = cuts_of(name, config, SimpleNamespace(size=size))
            for _, dim, sizes in cuts:
                shape[dim] = sum(sizes)
            places = torch.arange(math.prod(shape)).view(shape)  # which numbers of the whole are in this piece
            places = piece_of(places, cuts, size, part["at"], begin, tensors[0].numel())
            if name not in found:
                found[name] = [x.new_empty(shape) if x.numel() == len(places) else x for x in tensors]
            for whole, x in zip(found[name], tensors):
                if x.numel() == len(places):  # else it is one number for each row, which is never cut
                    whole.view(-1)[places] = x.flatten()
    weights = {name: tensors[0] for name, tensors in found.items()}
    if config.tie_embeddings:
        weights["head.weight"] = weights["embedding.weight"]
    return weights, {name: tensors[1:] for name, tensors in found.items()}


# ---- the harness: each form against one process with the same batches

SHAPE: dict[str, Any] = dict(vocab_size=64, block_size=32, n_layer=4, n_head=8, n_kv_head=4, n_embd=32,
                             balance_loss=0.0, router_z=0.0)
BATCH = 8
MICRO = 2  # micro-batches of a step, but in a pipeline
# Each form is what a user could write; n is the number of ranks, h half of it. The first four are data parallel with
# other settings: how much travels at a time, and when.
FORMS = {
    "ddp, one message a parameter, after": "--mesh=dp{n} --bucket=1e-6 --overlap=False",
    "ddp, one message, after": "--mesh=dp{n} --bucket=1e6 --overlap=False",
    "ddp, one message a parameter": "--mesh=dp{n} --bucket=1e-6",
    "ddp, in buckets": "--mesh=dp{n} --bucket=0.05",
    "zero1": "--mesh=dp{n} --stage=1",
    "zero2": "--mesh=dp{n} --stage=2",
    "fsdp": "--mesh=dp{n} --stage=3",
    "fsdp, recompute": "--mesh=dp{n} --stage=3 --recompute",
    "fsdp, muon": "--mesh=dp{n} --stage=3 --optimizer=muon",
    "torch's DDP": "--mesh=torch_ddp",
    "torch's FSDP2": "--mesh=torch_fsdp",
    "tp": "--mesh=tp{n}",
    "tp, muon": "--mesh=tp{n} --optimizer=muon",
    "pp, gpipe": "--mesh=pp{n} --schedule=gpipe",
    "pp, 1f1b": "--mesh=pp{n}",
    "cp": "--mesh=cp{n}",
    "ep": "--mesh=ep{n}",
    "dp x tp": "--mesh=dp{h},tp2 --stage=1",
    "pp x dp": "--mesh=pp2,dp{h} --stage=2",
    "pp x tp": "--mesh=pp{h},tp2",
    "dp x cp": "--mesh=dp{h},cp2 --stage=3",
    "dp x ep": "--mesh=dp{h},ep2 --stage=1 --optimizer=muon",
    "cp x tp": "--mesh=cp{h},tp2",
}
ADAM = SimpleNamespace(beta1=0.9, beta2=0.95, momentum=0.95)


def windows_of(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets (BATCH, T) of a step: text in which a token says much about the next"""
    draw = torch.Generator().manual_seed(step)
    T, V = SHAPE["block_size"], SHAPE["vocab_size"]
    noise = torch.randint(3, (BATCH, T + 1), generator=draw)
    windows = (noise.cumsum(1) + torch.randint(V, (BATCH, 1), generator=draw)) % V
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def objective_of(o: Options) -> nn.Module:
    """A model with its loss, the same on all ranks"""
    import train
    from model import GPT, Config
    torch.manual_seed(0)
    experts = 4 * ("ep" in o.mesh)
    config = Config(**SHAPE, n_expert=experts, recompute=o.recompute, init="gpt2")
    return train.Objective(GPT(config))


def move(named: dict, state: dict, roles: dict, norm: float, count: float, t: int, o: Options, wrap: Callable) -> None:
    """A step of the optimizer on gradients of the loss sum, clipped to a norm of 1"""
    import model
    import train
    for name, weight in named.items():
        matrix = o.optimizer != "adamw" and model.ROLES[roles[name]].muon
        update = wrap(name, train.OPTIMIZERS[o.optimizer]) if matrix else train.adamw
        weight.grad /= count * max(1.0, norm / count)
        update(weight, state[name], 0.01, t, ADAM)


def alone(o: Options) -> tuple[list, dict]:
    """Losses and weights of one process"""
    objective = objective_of(o)
    named = dict(objective.gpt.named_parameters())
    state, losses, roles = {name: [] for name in named}, [], objective.gpt.roles()
    for step in range(o.steps):
        tokens, targets = windows_of(step)
        loss, count = objective(tokens, targets)
        loss.backward()
        norm = torch.stack([p.grad.square().sum() for p in named.values()]).sum().sqrt().item()
        move(named, state, roles, norm, count.item(), step + 1, o, lambda name, update: update)
        objective.zero_grad()
        losses.append(loss.item() / count.item())
    return losses, {name: p.detach() for name, p in named.items()}


def live_bytes() -> int:
    """Bytes of all tensors that this process holds"""
    import gc
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def measure(o: Options) -> dict:
    """Train a form and one process alike: how far apart they end, bytes sent a step, memory, seconds a step"""
    losses, weights = alone(o)
    before = live_bytes()
    objective = objective_of(o)
    roles = objective.gpt.roles()
    split = engine(objective, o, BATCH)
    state, own, seconds = {name: [] for name in split.pieces}, split.rows(BATCH), []
    micro = min(o.micro if "pp" in o.mesh else MICRO, len(own))
    far = 0.0
    for step in range(o.steps):  # all ranks draw the whole batch and take their rows
        began, sent = time.perf_counter(), Group.sent
        tokens, targets = (x[own] for x in windows_of(step))
        loss, count = split.backward(list(zip(tokens.chunk(micro), targets.chunk(micro))))
        split.sync()
        move(split.pieces, state, roles, split.norm(), count, step + 1, o, split.on_whole)
        split.spread()
        far = max(far, abs(loss / count - losses[step]))
        seconds.append(time.perf_counter() - began)
    sent = Group.sent - sent
    memory = live_bytes() - before
    whole, _ = split.whole(state)  # at rank 0
    apart = 0.0
    for name in weights if dist.get_rank() == 0 else ():
        apart = max(apart, (whole[name] - weights[name]).abs().max().item())
    return dict(loss=far, weights=apart, sent=sent, memory=memory, seconds=sorted(seconds)[len(seconds) // 2])


def forms_of(o: Options, n: int) -> dict[str, str]:
    """{name: options} of the forms that n ranks run.

    Raises ValueError where --only leaves none, and for a --mesh that is none or for another number of ranks.
    """
    if o.mesh:
        if o.mesh not in TORCH:
            Mesh(o.mesh, n)
        return {o.mesh: ""}
    named = {name: form.format(n=n, h=n // 2) for name, form in FORMS.items() if o.only in name}
    require(named, f"--only={o.only}: there are {'; '.join(FORMS)}")
    product = re.compile(r",[a-z]{2}[01]\b|=[a-z]{2}[01],")  # with 1, or half of it
    forms = {name: form for name, form in named.items() if not product.search(form)}
    if not FSDP_ON_CPU:
        forms.pop("torch's FSDP2", None)
    require(forms, f"--only={o.only}: {', '.join(named)} need --ranks=4")
    return forms


def harness(o: Options, words: list[str]) -> bool:
    """Print a row for each form; whether all are exact"""
    n = dist.get_world_size()
    limit = 1e-9 if o.dtype == "float64" else 1e-4
    forms = forms_of(o, n)
    fine = True
    print(f"{n} ranks, {o.steps} steps, {o.dtype}; against one process: difference of loss, of weights")
    print(f"{'form':36} {'loss':>8} {'weights':>8} {'KiB sent':>9} {'MiB':>6} {'ms':>7}")
    for name, form in forms.items():
        own = options(Options, form.split() + words)
        row = measure(own)
        exact = row["loss"] < limit and row["weights"] < (limit if o.dtype == "float64" else 1e-2)
        fine &= exact
        sent = "-" if own.mesh in TORCH else f"{row['sent'] / 1024:.1f}"  # torch's engines do not count
        print(f"{name:36} {row['loss']:8.1e} {row['weights']:8.1e} {sent:>9} "
              f"{row['memory'] / 2**20:6.2f} {1000 * row['seconds']:7.1f}{'' if exact else '  not exact'}", flush=True)
    print(f"KiB: what a rank sends in a step of {MICRO} micro-batches (pp: {o.micro}); zero2 sends\n"
          "gradients in each of them, fsdp gradients and weights")
    return fine


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


# ---- collectives against torch's, by size

def bench_collectives() -> None:
    """Time of each collective, ours and torch's, and what fits best: latency + bytes / bandwidth"""
    n, me = dist.get_world_size(), dist.get_rank()
    group = Mesh(f"dp{n}", n).group("dp")
    # name: ours, torch's, share of the bytes that a rank sends (bus bandwidth: what any link must carry)
    table = {
        "broadcast": (group.broadcast, lambda x: dist.broadcast(x, 0), 1),
        "all_reduce": (group.all_reduce, dist.all_reduce, 2 * (n - 1) / n),
        "all_gather": (lambda x: group.all_gather(x.view(n, -1)),
                       lambda x: dist.all_gather(list(x.view(n, -1)), x.view(n, -1)[me].clone()), (n - 1) / n),
        "reduce_scatter": (lambda x: group.reduce_scatter(x.view(n, -1)),
                           lambda x: dist.reduce_scatter(x.view(n, -1)[me].clone(), list(x.view(n, -1))), (n - 1) / n),
    }
    print(f"{n} ranks, gloo; microseconds; GB/s of ours, and what of it a link carries\n"
          f"{'':15} {'bytes':>10} {'ours, us':>10} {'torch, us':>10} {'GB/s':>9} {'on the bus':>12}")
    for name, (ours, theirs, share) in table.items():
        points = []
        for size in (2**10, 2**14, 2**18, 2**22):
            x = torch.zeros(size // 4 // n * n, dtype=torch.float32)
            times = []
            for call in (ours, theirs):
                took = []
                for _ in range(12):
                    dist.barrier()
                    began = time.perf_counter()
                    call(x)
                    took.append(time.perf_counter() - began)
                times.append(sorted(took)[6])
            points.append((x.nbytes, times[0]))
            speed = x.nbytes / times[0] / 1e9
            print(f"{name:15} {x.nbytes:10,} {1e6 * times[0]:10.0f} {1e6 * times[1]:10.0f} "
                  f"{speed:9.3f} {share * speed:12.3f}", flush=True)
        sizes, took = np.array(points).T
        slope, latency = np.polyfit(sizes, took, 1, w=1 / took)  # relative errors count
        print(f"{name:15} about {1e6 * latency:.0f} us + bytes / {1e-9 / max(slope, 1e-18):.2f} GB/s")


# ---- planning: what a mesh costs on a machine, before it is rented

# FLOP/s in bf16, bytes of memory, bytes a second of a GPU within its node and between nodes, GPUs of a node
MACHINES = {
    "a100": (312e12, 80e9, 300e9, 25e9, 8),
    "h100": (989e12, 80e9, 450e9, 50e9, 8),
    "b200": (2250e12, 180e9, 900e9, 50e9, 8),
}
REACHED = 0.6  # of the peak in matrix products, of the links in large messages


def machine_of(text: str) -> tuple:
    """A row of MACHINES, or such numbers in a text. Raises ValueError for what is neither."""
    given = re.fullmatch(r"[1-9][\d.e+]*(,[1-9][\d.e+]*){4}", text)
    require(text in MACHINES or given, f"--machine={text}: choose from {', '.join(MACHINES)}, or give five numbers: "
            "FLOP/s, bytes of memory, bytes a second within a node and between nodes, GPUs of a node")
    return MACHINES.get(text) or tuple(map(float, text.split(",")))


def costs(params: float, layers: int, out: float, mesh: tuple, stage: int, steps: float,
          kinds: tuple = (2, 4, 12)) -> tuple[dict, dict]:
    """Bytes that a rank keeps, by kind, and bytes that it sends in a step, by axis of the `mesh` (dp, tp, pp).

    params: of all layers. out: numbers that a layer gives on, for each of `steps` micro-batches. kinds: bytes of a
    weight or an activation, of a gradient, and of what the optimizer keeps for one parameter.
    """
    (dp, tp, pp), (low, wide, kept) = mesh, kinds
    own = params / tp / pp
    memory = dict(
        weights=low * own / (dp if stage > 2 else 1),
        gradients=wide * own / (dp if stage > 1 else 1),
        optimizer=kept * own / (dp if stage > 0 else 1),
    )
    # gradients are summed at their owners; then they are gathered, or (with shards) the weights, for each pass
    sums = wide * (steps if stage > 1 else 1)
    gathers = (wide, low, low, 2 * low * steps)[stage]
    wire = dict(
        tp=8 * low * out * (tp - 1) / tp * layers / pp * steps,  # gathers and sums, each twice a layer, both ways
        pp=min(2, pp - 1) * low * out / tp * steps,  # between two others a stage sends both ways
        dp=(sums + gathers) * own * (dp - 1) / dp,
    )
    return memory, wire


def plan_of(o: Options, tp: int, pp: int, stage: int, micro: int) -> dict | None:
    """Memory, bytes on the wire and time of a step, or None where the mesh does not fit the model or the machine.

    The model: width 128 times the layers, 12 width^2 parameters a layer. Memory: bf16 weights, fp32 gradients, 12
    bytes of master weights and AdamW's moments a parameter, and 34 bytes a token, channel and layer of activations
    (Korthikanti et al. 2022, attention not kept), for as many micro-batches of `micro` sequences as 1F1B keeps.
    """
    peak, room, inside, between, node = machine_of(o.machine)
    # the shape: N = 12 L (128 L)^2
    layers = max(1, round((o.params / 12 / 128**2) ** (1 / 3)))
    width = (o.params / 12 / layers) ** 0.5
    dp, left = divmod(o.gpus, tp * pp)
    rows = o.batch_tokens / o.block_size / max(1, dp)
    if left or tp > node or pp > layers or rows < micro or stage == 3 and pp > 1:
        return None
    steps = rows / micro
    out = micro * o.block_size * width
    memory, wire = costs(o.params, layers, out, (dp, tp, pp), stage, steps)
    memory["activations"] = 34 * out * layers / pp / tp * min(pp, steps)
    if sum(memory.values()) > 0.9 * room:
        return None
    flops = (6 * o.params + 6 * layers * width * o.block_size) * o.batch_tokens / o.gpus
    compute = flops / peak / REACHED
    idle = (pp - 1) / (steps + pp - 1)
    # gathers within a layer wait for each other, so they hold up; gradients travel beside the backward pass
    talk = wire["tp"] / inside / REACHED + wire["pp"] / between / REACHED
    beside = wire["dp"] / (inside if tp * dp <= node else between) / REACHED
    seconds = (compute + talk) / (1 - idle) + max(0.0, beside - 2 / 3 * compute)
    return dict(
        mesh=f"pp{pp},dp{dp},tp{tp}",
        stage=stage,
        micro=micro,
        memory=memory,
        wire=wire,
        ratio=compute / (talk + beside) if o.gpus > 1 else math.inf,
        idle=idle,
        seconds=seconds,
        mfu=flops / peak / seconds,
    )


def plan(o: Options) -> None:
    """Print the best meshes for a model, a machine and a number of tokens."""
    for name in ("gpus", "params", "tokens", "batch_tokens", "block_size"):
        require(getattr(o, name) > 0, f"--{name}={getattr(o, name):g} must be above 0")
    powers = [2**i for i in range(14)]
    tried = [plan_of(o, tp, pp, stage, micro)
             for tp in powers[:4] for pp in powers[:8] for stage in (0, 1, 2, 3) for micro in powers[:4]]
    found = sorted(filter(None, tried), key=lambda row: row["seconds"])
    require(found, f"{o.params:.3g} parameters in steps of {o.batch_tokens:.3g} tokens fit on no mesh of {o.gpus} GPUs")
    print(f"{o.params:.3g} parameters, {o.tokens:.3g} tokens in steps of {o.batch_tokens:.3g}, {o.gpus} x {o.machine}")
    print("below a mesh: GB that a GPU keeps and, in a step, sends along tp, pp, dp;\n"
          "ratio: computing over communicating\n"
          "mesh               stage micro   ratio   idle   s/step    MFU     days\n"
          "         weights   grads   optim   activ  sent: tp      pp      dp")
    best = {row["mesh"]: row for row in reversed(found)}
    for row in [row for row in found if row is best[row["mesh"]]][:8]:
        kept, sent = ("".join(f"{size / 1e9:8.1f}" for size in row[what].values()) for what in ("memory", "wire"))
        days = row["seconds"] * o.tokens / o.batch_tokens / 86400
        print(f"{row['mesh']:18} {row['stage']:5} {row['micro']:5} {row['ratio']:7.1f} {row['idle']:6.1%} "
              f"{row['seconds']:8.2f} {row['mfu']:6.1%} {days:8.1f}\n{'':8}{kept}  {sent}")


# ---- checkpoints in parts

def merge(folder: str, output: str) -> None:
    """Join the parts that the ranks of a run wrote. Raises ValueError where some are missing or of another run."""
    from model import GPT, Config, load_checkpoint, save_checkpoint
    paths = sorted(Path(folder).glob("part-*.pt"))
    require(paths, f"--merge={folder} holds no part-*.pt")
    parts = [load_checkpoint(path) for path in paths]
    require(all("pieces" in part for part in parts), f"--merge={folder}: whole checkpoints are there, no parts")
    runs = {str([part.get(key) for key in ("world", "mesh", "step", "train", "corpus")]) for part in parts}
    require(len(runs) == 1, f"the parts in {folder} are of different runs or steps")
    try:
        config = Config(**parts[0]["config"])
        weights, states = assemble(parts, config, parts[0]["world"])
    except (TypeError, KeyError, AttributeError, IndexError) as error:  # what is no part, though it has its keys
        raise ValueError(f"--merge={folder}: a part is damaged: {error!r:.100}") from error
    rest = {key: value for key, value in parts[0].items() if key not in ("at", "buffers", "mesh", "pieces", "world")}
    buffers = {name: x for name, x in parts[0].get("buffers", {}).items() if name in GPT(config).state_dict()}
    rest |= dict(weights=GPT(config).state_dict() | buffers | weights, optimizer=states)
    save_checkpoint(output, GPT(config), **rest)
    print(f"{len(parts)} parts joined in {output}")


# ---- processes

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


def process(rank: int, o: Options, words: list[str], port: int) -> None:
    """One process: of torchrun's, or one that was started here, where `port` is that of the store."""
    if port:  # where who started it is gone, nobody waits for it
        parent = multiprocessing.parent_process()
        threading.Thread(target=lambda: parent.join() or os._exit(1), daemon=True).start()
    torch.set_default_dtype(getattr(torch, o.dtype))
    torch.set_num_threads(1)
    Group.timeout = datetime.timedelta(seconds=o.timeout)
    own: dict = dict(store=dist.TCPStore("127.0.0.1", port), rank=rank, world_size=o.ranks) if port else {}
    dist.init_process_group("gloo", timeout=Group.timeout, **own)
    atexit.register(dist.destroy_process_group)  # a thread of gloo that frees a tensor while Python ends aborts it
    sys.stdout = open(os.devnull, "w") if dist.get_rank() else sys.stdout
    agree(**vars(o))
    if o.bench_collectives:
        bench_collectives()
    sys.exit(not (o.bench_collectives or harness(o, words)))


def main():
    words = sys.argv[1:]
    o = options(Options, words)
    require(o.dtype in ("float64", "float32"), f"--dtype={o.dtype}: choose from float64, float32")
    require(o.optimizer in ("adamw", "muon"), f"--optimizer={o.optimizer}: choose from adamw, muon")
    require(min(o.ranks, o.steps, o.micro, o.timeout) > 0, "--ranks, --steps, --micro, --timeout must be 1 or more")
    if o.plan:
        plan(o)
    elif o.show_schedule:
        stages = re.findall(r"pp([1-9]\d*)", o.mesh or "pp4")
        require(stages, f"--mesh={o.mesh} has no pipeline to draw: write pp and its stages, as pp4")
        show_schedule(int(stages[0]), o.micro)
    elif o.merge:
        merge(o.merge, o.output)
    elif "LOCAL_RANK" in os.environ:
        process(0, o, words, 0)
    else:
        forms_of(o, o.ranks)  # raises before any process is started
        logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
        usual = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process, which ends the others
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # in memory: no disk can be full
        ranks = torch.multiprocessing.spawn(process, (o, words, store.port), o.ranks, join=False, daemon=True)
        signal.signal(signal.SIGINT, usual)
        try:
            while not ranks.join():
                pass
        except torch.multiprocessing.ProcessExitedException as error:
            if error.signal_name:
                raise ValueError(f"rank {error.error_index} was ended by {error.signal_name}") from error
            sys.exit(error.exit_code)
        except torch.multiprocessing.ProcessRaisedException as error:
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error


if __name__ == "__main__":
    run(main)
