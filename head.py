"""Every way to split a model over processes, written out, and checked against the model that is not split.

Reads: nothing; --merge: a folder with the parts of a checkpoint.
Writes: tables to stdout; --merge: OUTPUT, one checkpoint.
Usage: python ddp.py
       python ddp.py --ranks=4 --mesh=dp2,tp2
       torchrun --nproc_per_node=4 ddp.py
       python ddp.py --plan --gpus=1024 --params=70e9 --tokens=1e12

For real runs torch's own engine does the same with more care: `train.py --parallel=torch_ddp` or `torch_fsdp`.
References: Rajbhandari et al. 2020 (ZeRO); Narayanan et al. 2021 (Megatron-LM); Liu et al. 2023 (ring attention).
"""
import argparse
import contextlib
import dataclasses
import datetime
import difflib
import hashlib
import inspect
import math
import os
import re
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import model
from model import GPT, Config, load_checkpoint, replacing, require


@dataclasses.dataclass
class Options:
    ranks: int = 2  # processes to start here (under torchrun: its own)
    mesh: str = ""  # a product of splits, such as dp2,tp2: pp, dp, ep, cp, tp (empty: every form of the table)
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
    machine: str = "h100"  # plan: a key of MACHINES


# ---- collectives, made of messages between two ranks

class Group:
    """Some ranks that talk to each other; `sent` counts the bytes of this one.

    All ranks of a group call the same methods in the same order. `delay` (seconds a byte) stands for a slower link.
    """

    delay = 0.0
    timeout = datetime.timedelta(minutes=10)
    sent = 0  # by this process, in all its groups

    def __init__(self, ranks: list[int], channel: dist.ProcessGroup | None = None):
        self.ranks, self.size, self.rank, self.channel = ranks, len(ranks), ranks.index(dist.get_rank()), channel

    def start(self, out: Tensor | None, to: int, into: Tensor | None = None, source: int = 0) -> list:
        """Begin to send `out` to a rank, and to fill `into` with what another sends; what to wait for."""
        jobs = []
        if out is not None:
            jobs.append(dist.P2POp(dist.isend, out.contiguous(), self.ranks[to % self.size], self.channel))
            Group.sent += out.nbytes
            time.sleep(self.delay * out.nbytes)
        if into is not None:
            jobs.append(dist.P2POp(dist.irecv, into, self.ranks[source % self.size], self.channel))
        return dist.batch_isend_irecv(jobs)

    def exchange(self, *message) -> None:
        """As start, to the end."""
        for job in self.start(*message):
            job.wait()

    def tree(self, root: int) -> Iterator[tuple[bool, int]]:
        """The messages of a binomial tree from its root on: (whether this rank sends, the other rank)."""
        place = (self.rank - root) % self.size
        for span in (1 << i for i in range(self.size.bit_length())):
            if place < span and place + span < self.size:
                yield True, self.rank + span
            elif span <= place < 2 * span:
                yield False, self.rank - span

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        """x of the root, in place, in log2(n) rounds"""
        for sends, other in self.tree(root):
            self.exchange(*(x, other) if sends else (None, 0, x, other))
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
            self.exchange(rows[other], other)
        return own.copy_(rows[root])

    def gather(self, own: Tensor, root: int = 0) -> Tensor | None:
        """`own` of all ranks at the root, (n, ...)"""
        if self.rank != root:
            return self.exchange(own, root)
        rows = torch.stack([own] * self.size)
        for other in set(range(self.size)) - {root}:
            self.exchange(None, 0, rows[other], other)
        return rows

    def all_gather(self, rows: Tensor) -> Tensor:
        """Row r of rank r to all, in place in (n, ...): n - 1 times round the ring, each rank passes on what it got"""
        me = self.rank
        for turn in range(self.size - 1):
            self.exchange(rows[(me - turn) % self.size], me + 1, rows[(me - turn - 1) % self.size], me - 1)
        return rows

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        """The sum over all ranks of row r, at rank r; `rows` (n, ...) is used up: sums grow on their way round"""
        me, new = self.rank, torch.empty_like(rows[0])
        for turn in range(self.size - 1):
            self.exchange(rows[(me - turn - 1) % self.size], me + 1, new, me - 1)
            rows[(me - turn - 2) % self.size] += new
        return rows[me]

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all x: 2 (n - 1) / n of its bytes a rank, whatever n"""
        rows = F.pad(x.flatten(), (0, -x.numel() % self.size)).view(self.size, -1).clone()
        if self.size > 1:
            self.reduce_scatter(rows)
            self.all_gather(rows)
        return rows.flatten()[:x.numel()].view_as(x)

    def all_to_all(self, parts: list[Tensor], sizes: list[int]) -> Tensor:
        """parts[r] to each rank r; what the ranks sent, sizes[r] rows from rank r, one behind the other"""
        out = parts[0].new_empty(sum(sizes), *parts[0].shape[1:])
        into = out.split(sizes)
        into[self.rank].copy_(parts[self.rank])
        for far in range(1, self.size):
            self.exchange(parts[(self.rank + far) % self.size], self.rank + far,
                          into[(self.rank - far) % self.size], self.rank - far)
        return out


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


# what the forward pass gathers, the backward pass scatters, and the other way round
def gather_grad(x: Tensor, group: Group, dim: int) -> Tensor:
    return Through.apply(x, lambda x: gathered(x, group, dim), lambda grad: scattered(grad, group, dim))


def scatter_grad(x: Tensor, group: Group, dim: int) -> Tensor:
    return Through.apply(x, lambda x: scattered(x, group, dim), lambda grad: gathered(grad, group, dim))


def summed(x: Tensor, group: Group) -> Tensor:
    """The sum over the ranks, each of which then goes on with the same: so the gradient of the sum is that of each."""
    return Through.apply(x, group.all_reduce, lambda grad: grad)


AXES = ("pp", "dp", "ep", "cp", "tp")  # neighbours on the last axis talk most: they belong on one machine


class Mesh:
    """Ranks as the points of a box, such as dp2,tp2."""

    def __init__(self, text: str, world: int):
        found = dict(re.findall(r"([a-z]+)(\d+)", text))
        require(re.fullmatch(r"[a-z]+[1-9]\d*(,[a-z]+[1-9]\d*)*", text) and found.keys() <= {*AXES},
                f"--mesh={text}: write axes with their sizes, such as dp2,tp2, from {', '.join(AXES)}")
        self.size = {axis: int(found.get(axis, 1)) for axis in AXES}
        shape = list(self.size.values())
        require(math.prod(shape) == world, f"--mesh={text} is for {math.prod(shape)} ranks, there are {world}")
        self.text = text
        self.grid = np.arange(world).reshape(shape)
        self.at = dict(zip(AXES, map(int, np.argwhere(self.grid == dist.get_rank())[0])))

    def group(self, *axes: str, ends: bool = False) -> Group | None:
        """The ranks that differ from this one along these axes alone (ends: of them the first and the last).

        None: this rank is between the ends. All ranks must ask for the same groups in the same order.
        """
        places = [AXES.index(axis) for axis in axes]
        rows = np.moveaxis(self.grid, places, range(-len(axes), 0)).reshape(-1, *[self.grid.shape[i] for i in places])
        mine = None
        for row in rows.reshape(len(rows), -1).tolist():
            ranks = sorted({row[0], row[-1]}) if ends else row
            key = (*axes, ends, *ranks)  # two groups may talk at once only if their names differ
            if len(ranks) > 1 and key not in CHANNELS:
                CHANNELS[key] = dist.new_group(ranks, Group.timeout)
            if dist.get_rank() in ranks:
                mine = Group(ranks, CHANNELS.get(key))
        return mine


CHANNELS = {}


