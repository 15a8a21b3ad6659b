"""A decoder-only language model: tokens in, logits out, and what it costs.

Every choice is a key of a dict.
Reads: a checkpoint; with --import_hf a folder of HuggingFace's (config.json,
       *.safetensors).
Writes: a checkpoint; with --export_hf such a folder.
Usage: python model.py --preset=gpt2
       python model.py --preset=llama-3-8b --accelerator=b200 --tokens=1e12
       python model.py --coord_check
       python model.py --import_hf=DIR --output=ckpt.pt
       python model.py --ckpt=ckpt.pt   (what that model costs)
       python model.py --ckpt=ckpt.pt --export_hf=DIR
References: Vaswani et al. 2017 (Transformer); Radford et al. 2019 (GPT-2);
Touvron et al. 2023 (Llama).
"""
import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import json
import logging
import math
import os
import re
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

CHECKPOINT_VERSION = 1


def require(holds: object, reason: str) -> None:
    """Raise ValueError(reason) unless `holds`."""
    if not holds:
        raise ValueError(reason)


@dataclasses.dataclass
class Config:
    vocab_size: int = 512  # number of token ids
    block_size: int = 256  # longest context in tokens
    n_layer: int = 4  # number of layers
    n_head: int = 4  # number of query heads
    n_kv_head: int = 0  # key and value heads, each shared by a group of query heads (0: n_head)
    n_embd: int = 128  # width of the residual stream
    head_dim: int = 0  # width of a head (0: n_embd / n_head)
    n_inner: int = 0  # inner width of the feed-forward, or of each expert (0: 4 n_embd; swiglu, geglu: 8/3 n_embd)
    norm: str = "rmsnorm"  # rmsnorm, layernorm, gainless
    placement: str = "pre"  # of the norms: pre, post, reordered, parallel, sandwich
    residual: str = "plain"  # plain, scaled (each block weighs the stream and the first embedding)
    position: str = "rope"  # rope, sinusoidal, learned, none; one of them and none can be tiled over the layers
    mixer: str = "attention"  # attention, window, strided, valued, latent, linear, mamba2, gdn, hyena; tiled
    window: int = 0  # tokens that a window layer sees, its own included; the stride of a strided layer
    latent: int = 0  # width of what a latent layer keeps of a token, beside one rotated key (0: 4 heads)
    ffn: str = "swiglu"  # swiglu, geglu, relu, gelu, relu2
    n_expert: int = 0  # feed-forward layers to choose from in each block (0: one, for all tokens)
    n_expert_active: int = 2  # experts that a token passes
    n_expert_shared: int = 0  # experts that every token passes, besides
    balance_loss: float = 0.01  # weight of the loss for an equal load of the experts
    balance_bias: float = 0.0  # step, a micro-batch, of a bias that leads tokens to idle experts, without a loss
    router_z: float = 0.001  # weight of the loss on large router scores
    ngram: int = 0  # longest n-gram that has an embedding of its own (0, 1: tokens alone)
    ngram_rows: int = 65536  # rows of the table of each n
    counts: int = 0  # longest n-gram whose counts, made by train.py, foretell tokens beside the network (0: none)
    counts_weight: float = 0.5  # share of the counts' probabilities in the mean of both
    softcap: float = 0.0  # logits stay between -softcap and softcap (0: no limit)
    attention_softcap: float = 0.0  # the same of attention's scores, before the softmax
    ahead: int = 0  # further tokens that heads of their own foretell in training (multi-token prediction)
    ahead_loss: float = 0.3  # weight of their losses
    end_token: int = 0  # id that ends a document, beyond which no layer looks (0: documents see each other)
    qk_norm: bool = True  # normalise queries and keys
    bias: bool = False  # biases in linear layers and LayerNorm
    qkv_bias: bool = False  # biases of queries, keys and values, also without the others
    tie_embeddings: bool = True  # one matrix for the token embedding and the head
    init: str = "zero"  # zero (matrices that write to the residual stream start at 0), gpt2, xavier, mup
    base_width: int = 128  # mup: the n_embd at which the learning rate was found
    dropout: float = 0.0  # of the embedding and of what each layer adds
    rope_base: float = 10000.0  # longest wavelength of rope, over 2 pi
    norm_eps: float = 1e-6  # added to the variance in norms
    recompute: bool = False  # keep what enters each block alone, and compute the rest again for the backward pass

    @property
    def head_width(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def inner(self) -> int:
        # two thirds of 4 n_embd, to a multiple of 8, give the gated form the parameters of the plain one (Shazeer 2020)
        gated = -(-8 * self.n_embd // 24) * 8
        default = gated if self.ffn.endswith("glu") else 4 * self.n_embd
        return self.n_inner or default

    def tiled(self, axis: str) -> list[str]:
        """The keys of the layers on this axis; all keys that are named, where the layers are fewer."""
        names = getattr(self, axis).split(",")
        return (names * self.n_layer)[:max(self.n_layer, len(names))]

    def check(self) -> None:
        """Raise ValueError, naming the option to change, where no model has this shape."""
        for axis, table in AXES.items():
            tiled = axis in ("mixer", "position")
            for key in self.tiled(axis) if tiled else [getattr(self, axis)]:
                require(key in table, f"--{axis}={key}: choose from {', '.join(table)}")
        for name, value in vars(self).items():
            if type(value) in (int, float):  # 0 is meant where it is the default, or the weight of a loss
                free = getattr(type(self), name) == 0 or name in ("balance_loss", "router_z", "ahead_loss")
                require(value > 0 or value == 0 and free, f"--{name}={value} is too small")
        require(self.dropout < 1, f"--dropout={self.dropout} must be below 1")
        require(self.counts_weight <= 1, f"--counts_weight={self.counts_weight} must be at most 1")
        require(self.head_dim or self.n_embd % self.n_head == 0,
                f"--n_embd={self.n_embd} is no multiple of --n_head={self.n_head}: set --head_dim")
        require(self.n_head % (self.n_kv_head or 1) == 0,
                f"--n_head={self.n_head}: no multiple of --n_kv_head={self.n_kv_head}")
        positions, mixers = {*self.tiled("position")}, {*self.tiled("mixer")}
        require(len(positions - {"none"}) < 2, f"--position={self.position}: only one kind, and none, go together")
        require("rope" not in positions or self.head_width % 2 == 0,
                f"--position=rope turns pairs of channels, a head of {self.head_width} is odd: set --head_dim")
        require(self.n_expert == 0 or self.n_expert_active <= self.n_expert,
                f"--n_expert_active={self.n_expert_active} is more than --n_expert={self.n_expert}")
        require(self.init != "mup" or not self.tie_embeddings, "--init=mup needs --tie_embeddings=False")
        require(self.ahead < self.block_size, f"--ahead={self.ahead} leaves nothing of --block_size={self.block_size}")
        require(self.end_token < self.vocab_size, f"--end_token={self.end_token} is not below --vocab_size")
        require(not (self.recompute and self.balance_bias), "--recompute would move the router by --balance_bias twice")
        require(not mixers.isdisjoint(("window", "strided")) == (self.window > 0),
                f"--mixer={self.mixer} --window={self.window}: a window needs both --mixer=window and --window=TOKENS")


def usual_heads(width: int, narrow: int = 64) -> int:
    """The most heads into which this width can be cut: of 64 channels or more, or up to four of `narrow` or more.

    Rotary positions turn pairs, so a head has an even number of channels.
    """
    most = max(width // 64, min(4, width // narrow))
    fitting = [heads for heads in range(1, most + 1) if width % (2 * heads) == 0]
    return max(fitting, default=1)


@dataclasses.dataclass
class Options(Config):
    preset: str = ""  # a shape by name: gpt2, gpt2-xl, llama-3-8b, qwen3-0.6b, mistral-7b
    account: bool = False  # print what the model costs, which is done anyhow
    batch_size: int = 8  # sequences of a training step, for the memory of activations
    tokens: int = 0  # tokens to train on, for the time (0: 20 a parameter)
    accelerator: str = "h100"  # what it would train on: a100, h100, b200, rtx4090
    mfu: float = 0.4  # share of the accelerator's peak that training reaches
    coord_check: bool = False  # print how far the logits move at several widths, for --init=zero and mup
    plot: str = ""  # FILE.png of --coord_check
    import_hf: str = ""  # folder of a HuggingFace model; it is written to --output
    export_hf: str = ""  # folder that the model of --ckpt is written to
    ckpt: str = ""  # checkpoint to account for, or to export (empty: out/ckpt.pt)
    output: str = "ckpt.pt"  # checkpoint to write


# ---- the operations: Plain is one formula each, to be read; Fast has the same signatures and gives the same numbers

class Plain:
    """Each operation in elementary tensor operations: a namespace of functions, of which no object is ever made."""

    def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, center: bool) -> Tensor:
        """(x - m) / sqrt(mean((x - m)^2) + eps) * weight + bias over the last dimension.

        m is the mean of x if `center` (LayerNorm, Ba et al. 2016), else 0 (RMSNorm, Zhang and Sennrich 2019).
        """
        x = x - center * x.mean(-1, keepdim=True)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cap: float = 0.0) -> Tensor:
        """softmax(q k^T / sqrt(hd)) v, each group of query heads on its key and value head (Vaswani 2017).

        q (B, H, T, hd), k and v (B, H_kv, S, hd) -> (B, H, T, hd); H is a multiple of H_kv (Ainslie et al. 2023).
        `mask`: True where a query may look, broadcast to (B, H, T, S). None: a query sees all keys up to its own, and
        T is S, or 1 for the last of S tokens. With a `cap` each score s becomes cap tanh(s / cap) (Gemma 2, 2024).
        """
        T, S = q.shape[2], k.shape[2]
        groups = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(groups, 1)  # (B, H, S, hd)
        v = v.repeat_interleave(groups, 1)
        if mask is None:
            mask = q.new_ones(T, S).tril(S - T).bool()
        scores = q @ k.mT / q.shape[3] ** 0.5  # (B, H, T, S)
        scores = cap * torch.tanh(scores / cap) if cap else scores
        scores = scores.masked_fill(~mask, float("-inf"))
        weights = (scores - scores.amax(-1, keepdim=True)).exp()  # the largest becomes 1: nothing overflows
        return weights / weights.sum(-1, keepdim=True) @ v

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn the pairs of channels (i, i + hd/2) of x (B, T, H, hd): (a, b) -> (a cos - b sin, b cos + a sin).

        cos (cos, cos) and sin (-sin, sin), both (1 or B, T, 1, hd).
        """
        return x * cos + x.roll(x.shape[3] // 2, 3) * sin


class Fast(Plain):
    """The same operations, two of them fused by torch: one pass over memory where the plain form makes several."""

    def norm(x, weight, bias, eps, center):
        if center:
            return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
        weight = None if weight is None else weight.type_as(x)  # fused only where the types are the same
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    def attention(q, k, v, mask, cap=0.0):
        if cap:  # which torch has not fused
            return Plain.attention(q, k, v, mask, cap)
        causal = mask is None and q.shape[2] > 1  # torch would let a single query see the first key alone
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)


ops = Fast  # what the layers below call; `model.ops = model.Plain` runs them as written above


def with_kernels(device: str, compiled: bool = False) -> type:
    """Fast with those kernels of kernels.py that run on the device, to be set as `ops`.

    `compiled`: without those that torch.compile would have fused with their neighbours. Attention stays torch's: on an
    H200 `flash` has 0.7 to 1.0 of its speed. What lies on another device, as fake tensors do, is left to Fast.
    """
    import kernels
    rmsnorm, rope = (kernels.use(name, device) for name in ("rmsnorm", "rope"))
    kind = torch.device(device).type

    class Kernels(Fast):
        def norm(x, weight, bias, eps, center):
            if compiled or center or weight is None or x.device.type != kind:
                return Fast.norm(x, weight, bias, eps, center)
            return rmsnorm(x, weight, None, eps)[0]

        def turn(x, cos, sin):
            if compiled or cos.shape[0] != 1 or x.device.type != kind:
                return Fast.turn(x, cos, sin)
            half = x.shape[3] // 2
            return rope(x, cos[0, :, 0, :half], sin[0, :, 0, half:])

    for name, kernel in dict(norm="rmsnorm", turn="rope").items():
        if not kernels.runs(kernel, device):
            delattr(Kernels, name)  # Fast's is faster than the kernel's twin
    return Kernels


# ---- layers with parameters; what each parameter is follows from its name, see ROLES further down

class Linear(nn.Module):
    """x (..., n_in) -> x W^T + b (..., n_out), with the weight W (n_out, n_in) and the bias b (n_out)"""

    def __init__(self, n_in, n_out, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Embedding(Linear):
    """Ids (...) -> their rows (..., n_in): a linear layer from rows to vectors, its input one-hot, is a look-up"""

    sparse = False  # True: the gradient lists the rows that were used

    def forward(self, ids):
        return F.embedding(ids, self.weight, sparse=self.sparse)


class Norm(nn.Module):
    """x at a root mean square of 1, times a gain for each channel (gain=False: none).

    With `center` the mean is taken off before, and with `bias` one is added after.
    """

    def __init__(self, width, eps, center=False, bias=False, gain=True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width)) if gain else None
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.eps, self.center = eps, center

    def forward(self, x):
        return ops.norm(x, self.weight, self.bias, self.eps, self.center)


NORMS = {
    "rmsnorm": lambda config, width: Norm(width, config.norm_eps),
    "layernorm": lambda config, width: Norm(width, config.norm_eps, center=True, bias=config.bias),
    "gainless": lambda config, width: Norm(width, config.norm_eps, gain=False),
}
GOLDEN = 0x1E3779B97F4A7C15  # an odd number without pattern: products with it differ in all their bits


def scramble(bits: Tensor):
    """Hash int64s: each bit comes to depend on all others (splitmix64's finaliser, Steele et al. 2014)."""
    for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
        bits = (bits ^ (bits >> shift & 2 ** (64 - shift) - 1)) * factor  # & takes out the sign shifted in
    return bits


class Dropout(nn.Module):
    """Zero a share p of x (B, T, C), a function of each row's key alone: no other row and no device changes it.

    `noise["keys"]` (B,) int64 holds one key a row, set before the forward pass; without it they are drawn from torch's
    generator. The mask is a hash of (key, site, place).
    """

    def __init__(self, p, noise, site):
        super().__init__()
        self.p, self.noise, self.site = p, noise, site

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        if self.noise:
            keys = self.noise["keys"]
        else:
            keys = torch.randint(0x4000000000000000, (len(x),))
        place = torch.arange(x[0].numel(), device=x.device) + (self.site << 40)
        bits = scramble(place + keys.to(x.device)[:, None] * GOLDEN)  # (B, T C)
        keep = (bits >> 20 & 0xFFFFFF) >= self.p * 0x1000000
        return x * keep.view_as(x) / (1 - self.p)


# ---- states: all that the layers look back on, and the position

class Call(NamedTuple):
    """What all layers are told about the T tokens of a call; the first dimension is B, or 1 if all rows are alike."""

    tokens: Tensor  # (B, T)
    at: Tensor  # (1 or B, T) how many tokens came before
    place: Tensor  # (1 or B, T) the same, counted from where the document starts
    turn: Callable  # what queries and keys (B, T, H, hd) pass through
    state: "State"


@dataclasses.dataclass
class State:
    """What cached decoding carries from one call of the model to the next; with no room, a pass that keeps nothing.

    The last of the layers holds the tokens themselves, where the model looks back on them.
    """

    layers: list[list[Tensor]]  # empty, or rows first; what append fills has the position as second dimension
    lengths: list[int]  # tokens taken in so far, one number a row
    start: list[int]  # what truncate may go back to: a recurrence sets it to the lengths before the last call
    room: list[int]  # tokens that a row can hold
    recurrent: bool = False  # whether a layer keeps the last call, which is to be of equal length in joined states
    exact = True  # whether append gives what is filled alone

    def places(self, T: int, device: torch.device) -> Tensor:
        """Where the next T tokens stand (1, T), ragged (B, T)"""
        first = self.lengths[:1]
        if min(self.lengths) < max(self.lengths):  # ragged
            first = self.lengths
        first = torch.tensor(first, device=device)[:, None]
        return first + torch.arange(T, device=device)

    def append(self, layer: int, at: Tensor, *new: Tensor) -> list | tuple:
        """Take in (B, T, ...) of the T tokens at `at`; return all that is filled, (B, S, ...) each."""
        S = max(self.lengths) + at.shape[1]
        kept, room = self.layers[layer], self.room[0]
        if not room:
            return new
        require(S <= room, f"the state holds {room} tokens, {S} are needed: ask new_state for more")
        if not kept:  # the first tokens
            kept += [x.new_zeros(len(x), room, *x.shape[2:]) for x in new]
        places = slice(None), slice(S - at.shape[1], S)
        if len(at) > 1:  # ragged: behind the end of each row
            places = torch.arange(len(at), device=at.device)[:, None], at
        for old, x in zip(kept, new):
            old[places] = x.type_as(old)
        return [old[:, :S] for old in kept]

    def replace(self, layer: int, *new: Tensor) -> None:
        """Keep `new` instead of what was kept: of the calls before this one nothing can be taken back."""
        if self.room[0]:
            self.layers[layer] = list(new)
            self.start, self.recurrent = self.lengths, True

    def truncate(self, lengths: list[int]) -> None:
        """Forget what lies beyond `lengths`, one a row (rejected drafts, the padding of a ragged prompt)."""
        bounds = zip(self.start, lengths, self.lengths, strict=True)
        fit = all(a <= b <= c for a, b, c in bounds)
        require(fit, f"cannot truncate {self.lengths} to {lengths}: possible down to {self.start}")
        self.lengths = list(lengths)

    def fork(self, rows: list[int]) -> "State":
        """A new state whose row i is a copy of row rows[i] (one prompt, several samples)."""
        layers = [[x[rows] for x in kept] for kept in self.layers]
        numbers: list = [[of[row] for row in rows] for of in (self.lengths, self.start, self.room)]
        return State(layers, *numbers, recurrent=self.recurrent)

    def put(self, row: int, other: "State", of: int) -> None:
        """Make a row a copy of row `of` of another state, whose last call was of as many tokens."""
        for kept, new in zip(self.layers, other.layers):
            for old, x in zip(kept, new):
                old[row] = x[of]
        for name in ("lengths", "start", "room"):
            numbers = [*getattr(self, name)]  # a list of its own
            numbers[row] = getattr(other, name)[of]
            setattr(self, name, numbers)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for kept in self.layers for x in kept)


# ---- embeddings: what a token brings with it, and where it stands

class NGrams(nn.Module):
    """Add to each token's embedding a row for each n-gram that ends there, of 2 to --ngram tokens.

    The row's number is a hash of the n-gram; each n has a table (Tito Svenstrup et al. 2017, hash embeddings).
    """

    def __init__(self, config):
        super().__init__()
        orders = range(2, config.ngram + 1)
        self.tables = nn.ModuleList(Embedding(config.n_embd, config.ngram_rows) for _ in orders)

    def forward(self, x, tokens, at, place):
        """x (B, T, C) -> (B, T, C), given all tokens so far (B, S), and where those of x stand"""
        if not self.tables:
            return x
        at = at.expand(len(tokens), -1)
        key = tokens.gather(1, at)
        for back, table in enumerate(self.tables, 1):
            before = tokens.gather(1, (at - back).clamp(min=0))
            key = scramble(key * GOLDEN + before.where(place >= back, -1))  # -1: the document began later
            x = x + table(key % len(table.weight))
        return x


class Counts(nn.Module):
    """Outside training, the mean of the network's probabilities and of those that counts of n-grams give.

    The mean is Jelinek and Mercer's (1980), the counts' share Kneser and Ney's. The arrays, which are no parameters,
    are those of data.py's NgramModel; how n-grams are numbered is explained there.
    """

    def __init__(self, config):
        super().__init__()
        self.V, self.order = config.vocab_size, config.counts
        self.weight = config.counts_weight
        arrays = dict(sizes=torch.long, pairs=torch.long, first_terms=None, backs=None)
        for name in arrays if self.order else ():
            empty = torch.zeros(0, dtype=arrays[name])
            self.register_buffer(name, empty)

    @property
    def at_work(self) -> bool:
        counted = self.order and self.sizes.numel()
        return bool(counted) and not self.training

    def fill(self, arrays: dict[str, Tensor]) -> None:
        """Take over what was counted. Raises RuntimeError or ValueError where the arrays do not fit together."""
        for name, own in [*self.named_buffers()]:
            new = arrays[name].to(own)
            setattr(self, name, new)
        for pairs, _, backs in self.levels():
            edge = len(backs) * self.V
            rise = F.pad(pairs, (1, 0), value=-1).diff()
            good = (rise > 0) & (pairs < edge)
            require(good.all(), "these are no counts of n-grams")

    def _load_from_state_dict(self, weights, prefix, *rest):
        """As torch's, but of any size, and it may be that nothing was counted yet"""
        names = [name for name, _ in self.named_buffers()]
        if f"{prefix}sizes" in weights:
            self.fill({name: weights.pop(prefix + name) for name in names})

    def levels(self):
        """Of each order the pairs, the first terms, and how much each history leaves to the order below"""
        if not self.order:
            return []
        sizes = self.sizes.tolist()
        histories = [1, *sizes[:-1]][:len(sizes)]
        pairs = self.pairs.split(sizes)
        terms = self.first_terms.split(sizes)
        backs = self.backs.split(histories)
        return [*zip(pairs, terms, backs)]

    def forward(self, x, tokens, at):
        """x (B, T, C) -> (B, T, C + order - 1): behind it the numbers of the histories that end at each token"""
        T = x.shape[1]
        found = [x]
        near = torch.arange(1 - self.order, T, device=at.device)  # the new tokens, and those before them
        near = (at[:, :1] + near).expand(len(x), -1)
        units = tokens.gather(1, near.clamp(min=0))
        history = torch.zeros_like(near)
        history[near < 0] = -1
        for pairs, _, _ in self.levels()[:-1]:
            number = self.find(pairs, history * self.V + units)
            new = number[:, -T:, None]
            found.append(new.double())  # which holds it exactly
            history = F.pad(number[:, :-1], (1, 0), value=-1)
        return torch.cat(found, -1)

    def find(self, pairs, wanted):
        """Where the wanted pairs stand among the sorted ones, -1 for those that do not"""
        place = torch.searchsorted(pairs, wanted)
        place = place.clamp(max=len(pairs) - 1)
        return place.where(pairs[place] == wanted, -1)

    def steps(self, numbers):
        """From the shortest history up: its numbers (R), what it leaves to the chances so far (R), pairs and terms"""
        histories = numbers.flatten(0, -2).long().T
        start = histories.new_zeros(histories.shape[1:])
        for history, level in zip((start, *histories), self.levels()):
            pairs, terms, backs = level
            left = backs[history.clamp(min=0)]
            left[history < 0] = 1
            yield history, left, pairs, terms

    def mixed_one(self, network, numbers, tokens):
        """What `mixed` says of one token a row (R), of which the network's probabilities are given"""
        chances = self.backs.new_full(tokens.shape, 1 / self.V)
        for history, left, pairs, terms in self.steps(numbers):
            place = self.find(pairs, history * self.V + tokens)
            term = terms[place.clamp(min=0)]
            chances = chances * left + term.where(place >= 0, 0)
        mean = network.lerp(chances.to(network), self.weight)
        return mean.log()

    def mixed(self, logits, numbers):
        """Log-probabilities (..., V) from logits and from what forward has put behind x (..., order - 1)"""
        network = logits.flatten(0, -2).softmax(-1)  # (R, V)
        chances = self.backs.new_full(network.shape, 1 / self.V)
        spots = chances.view(-1)
        row = torch.arange(len(network), device=network.device)
        for history, left, pairs, terms in self.steps(numbers):
            chances *= left[:, None]
            begin = history * self.V
            first = torch.searchsorted(pairs, begin)
            end = torch.searchsorted(pairs, begin + self.V)
            count = end - first  # of its pairs, which stand side by side
            before = count.cumsum(0) - count
            places = (first - before).repeat_interleave(count)
            places += torch.arange(len(places), device=places.device)
            words = row * self.V - begin
            words = words.repeat_interleave(count)
            words += pairs.index_select(0, places)
            spots.index_add_(0, words, terms.index_select(0, places))
        mean = network.lerp(chances.to(network), self.weight)
        return mean.log().view_as(logits)


# positions: `at` is where the tokens stand, (1, T), or (B, T) where rows have different lengths

class Position(nn.Identity):
    """No sign of the position; each of the others replaces one of the two functions."""

    def add(self, x, at):
        """What the embedding x (B, T, C) becomes"""
        return x

    def turn(self, at):
        """The function that queries and keys (B, T, H, hd) of all layers pass through"""
        return lambda x: x


def waves(at: Tensor, width: int, base: float):
    """cos and sin of at / base^(2 i / width), i a pair of channels: at (...) -> (2, ..., width / 2 rounded up)"""
    frequency = base ** (-torch.arange(0, width, 2).double() / width)
    angle = at[..., None] * frequency  # exact enough for long contexts
    return torch.stack((angle.cos(), angle.sin())).to(torch.get_default_dtype())


class Rope(Position):
    """Turn each pair of channels by an angle that grows with the position: q k^T sees distances (Su et al. 2021).

    The pairs are (i, i + hd/2).
    """

    def __init__(self, config):
        super().__init__()
        cos, sin = waves(torch.arange(config.block_size), config.head_width, config.rope_base)  # (block_size, hd / 2)
        signed = torch.cat((-sin, sin), 1)
        table = torch.stack((cos.repeat(1, 2), signed))  # (2, block_size, hd)
        self.register_buffer("table", table, persistent=False)

    def turn(self, at):
        cos, sin = self.table[:, at].unsqueeze(-2)  # (1 or B, T, 1, hd) each
        return lambda x: ops.turn(x, cos, sin)


class Sinusoidal(Position):
    """Sines and cosines of wavelengths from 2 pi to 10000 * 2 pi by turns (Vaswani et al. 2017)."""

    def add(self, x, at):
        cos, sin = waves(at.cpu(), x.shape[2], 10000.0)  # double precision, which not every device has
        wave = torch.stack((sin, cos), 3).flatten(2)
        return x + wave[..., :x.shape[2]].type_as(x)


class Learned(Position):
    """One trained vector a position (GPT-2)."""

    def __init__(self, config):
        super().__init__()
        self.table = Embedding(config.n_embd, config.block_size)

    def add(self, x, at):
        return x + self.table(at)


POSITIONS = {"rope": Rope, "sinusoidal": Sinusoidal, "learned": Learned, "none": Position}


# ---- mixers: where tokens look at each other

class Attention(nn.Module):
    """softmax(q k^T / sqrt(hd)) v over the tokens so far; groups of query heads share a key and a value head.

    `sees(far, window)` says whether a token looks at one that lies `far` back (None: at all). With `valued`, each value
    gets a trained vector of its token (value embeddings, modded-nanogpt 2024). Groups: Ainslie et al. 2023; normalised
    queries and keys keep the scores from growing (Henry et al. 2020).
    """

    def __init__(self, sees, valued, config):
        super().__init__()
        self.sees, self.window = sees, config.window
        self.width, self.cap = config.head_width, config.attention_softcap
        self.plain = not (sees or config.end_token)
        groups = config.n_kv_head or config.n_head
        self.heads = config.n_head, groups, groups  # of q, k and v
        bias = config.bias or config.qkv_bias
        self.qkv = Linear(config.n_embd, sum(self.heads) * self.width, bias)
        self.out = Linear(config.n_head * self.width, config.n_embd, config.bias)
        norm = NORMS[config.norm] if config.qk_norm else nn.Identity
        self.q_norm = norm(config, self.width)
        self.k_norm = norm(config, self.width)
        tables = range(valued)
        self.values = nn.ModuleList(Embedding(groups * self.width, config.vocab_size) for _ in tables)

    def project(self, x, call):
        """x (B, T, C) -> q (B, T, H, hd), and what the state keeps: k and v (B, T, H_kv, hd)"""
        heads = self.qkv(x).unflatten(2, (-1, self.width))
        q, k, v = heads.split(self.heads, dim=2)
        for table in self.values:
            v = v + table(call.tokens).view_as(v)
        return call.turn(self.q_norm(q)), call.turn(self.k_norm(k)), v

    def read(self, y):
        """What the heads found (B, T, H, hd), as it goes out"""
        return y

    def forward(self, x, call, layer):
        q, *new = self.project(x, call)
        kept = call.state.append(layer, call.at, *new)  # (B, S, H_kv, hd)
        mask, at, S = None, call.at, kept[0].shape[1]
        alike = len(at) == 1 and at.shape[1] in (1, S) and call.state.exact
        if not (alike and self.plain):  # else causal says it
            far = at[:, None, :, None] - torch.arange(S, device=at.device)  # how far back key s lies
            mask = (far >= 0) & (far <= call.place[:, None, :, None])  # (1 or B, 1, T, S): in the same document
            mask = mask & self.sees(far, self.window) if self.sees else mask
        # heads go to the front only here: the result keeps the layout of q, and so the last line copies nothing
        q, k, v = (part.transpose(1, 2) for part in (q, kept[0], kept[-1]))
        y = ops.attention(q, k, v, mask, self.cap)
        return self.out(self.read(y.transpose(1, 2)).flatten(2))


class LatentAttention(Attention):
    """Keys and values of all heads are linear in one latent vector a token, which alone is kept (DeepSeek-V2, 2024).

    With k = [K c, r] and v = V c, where r is one rotated key for all heads: q k = (K^T q) c + q_r r, and the weights
    that sum V c may sum c first. So queries go to the latent's side, in training too, and K and V never meet the past.
    """

    def __init__(self, config):
        super().__init__(None, False, config)
        H, hd = config.n_head, self.width
        self.latent = config.latent or 4 * hd
        self.qkv = Linear(config.n_embd, 2 * H * hd + self.latent + hd, config.bias)
        self.k = nn.ParameterDict(dict(weight=torch.empty(H, self.latent, hd)))
        self.v = nn.ParameterDict(dict(weight=torch.empty(H, hd, self.latent)))
        self.k_norm = NORMS[config.norm](config, self.latent)

    def project(self, x, call):
        H, hd = self.heads[0], self.width
        sizes = H * hd, H * hd, self.latent, hd
        q, turned, c, r = self.qkv(x).split(sizes, dim=2)
        q = self.q_norm(q.unflatten(2, (H, hd)))
        q = torch.einsum("bthd,hcd->bthc", q, self.k["weight"].type_as(q))
        turned = call.turn(turned.unflatten(2, (H, hd)))
        q = torch.cat((q, turned), 3)  # (B, T, H, latent + hd)
        c = self.k_norm(c)[:, :, None]
        r = call.turn(r[:, :, None])
        kept = torch.cat((c, r), 3)  # (B, T, 1, latent + hd)
        return q * (q.shape[3] / (2 * hd)) ** 0.5, kept  # scores are over sqrt(2 hd), the width of the keys above

    def read(self, y):
        return torch.einsum("bthc,hdc->bthd", y[..., :self.latent], self.v["weight"].type_as(y))


def scan(inputs: tuple, S: Tensor, delta: bool, chunk: int = 64) -> tuple:
    """The linear recurrence S <- exp(g) S; S <- S + u k^T; y = S q, with u = b v or, with the delta rule, b (v - S k).

    inputs q, k, v (B, H, T, hd), g (at most 0) and b (B, H, T, 1), and S (B, H, hd, hd) -> y like v, S after T tokens.
    Inside a chunk it is matrix products: with g summed up to each token, D = exp(g_i - g_j) is what is left of token j
    at token i (Dao and Gu 2024); under the delta rule each u depends on those before it, a triangular system (Yang et
    al. 2024). The cost is linear in T; chunk=1 is the loop over tokens.
    """
    out = []
    for q, k, v, g, b in zip(*(x.split(chunk, 2) for x in inputs)):
        g = g.cumsum(2)
        D = (g - g.mT).tril().exp().tril()  # the first tril: above the diagonal exp would overflow
        g = g.exp()
        u = b * v
        if delta:
            u -= b * g * (k @ S.mT)
            seen = b * D * (k @ k.mT)  # u + tril(seen, -1) u = what stands on the right
            u = torch.linalg.solve_triangular(seen, u, upper=False, unitriangular=True)
        out.append((q @ k.mT * D) @ u + g * (q @ S.mT))
        left = D[:, :, -1:].mT * u
        S = g[:, :, -1:] * S + left.mT @ k
    return torch.cat(out, 2), S


class Recurrence(nn.Module):
    """A linear recurrence in place of attention: with `forget` S decays, with `delta` it replaces, see scan.

    These are the cores of the papers below: keys of length 1 and the output normalised and gated in each head, but no
    short convolutions before, and no feature map. The position is not asked: order shows in the decay alone.
    The state has one size, whatever the length: S before the last call, and that call's inputs, as truncate may take
    a part of them back.
    """

    def __init__(self, forget, delta, config):
        super().__init__()
        self.forget, self.delta = forget, delta
        self.heads, self.width = config.n_head, config.head_width
        columns = 4 * self.width + 1 + forget  # q, k, v, gate, rates
        self.up = Linear(config.n_embd, self.heads * columns, config.bias)
        self.out = Linear(self.heads * self.width, config.n_embd, config.bias)
        self.norm = Norm(self.width, config.norm_eps)

    def forward(self, x, call, layer):
        B, T, _ = x.shape
        heads = self.up(x).view(B, T, self.heads, -1)
        heads = heads.transpose(1, 2)  # (B, H, T, 4 hd + 1 or 2)
        heads = heads.to(torch.promote_types(heads.dtype, torch.float32))  # sums want single precision at least
        none = heads.new_zeros(B, self.heads, self.width, self.width)
        S, *past = call.state.layers[layer] or [none]
        q, k, v, gate, rates = heads.split(self.width, 3)
        g = self.forget * F.logsigmoid(rates[..., -1:] + 4)  # at first half is left after about 40 tokens
        g = g - 100 * (call.place == 0)[:, None, :, None]  # a document begins: exp(-100) is left of what came before
        if past:
            was, *inputs = past
            kept = (was < call.at[:, :1])[:, None, :, None]  # what truncate took back is left out
            _, S = scan([part * kept for part in inputs], S, self.delta)
        inputs = q, F.normalize(k, dim=3), v, g, rates[..., :1].sigmoid()
        call.state.replace(layer, S, call.at.expand(B, T), *inputs)
        y, _ = scan(inputs, S, self.delta)
        y = (self.norm(y) * F.silu(gate)).type_as(x)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class Hyena(nn.Module):
    """y = q (h * (k v)): one long convolution over all tokens so far, between two gates (Poli et al. 2023).

    The filter of each channel is a small network of the distance, faded out over a length of its own, from 2 tokens to
    the block: at once the short and the long convolution of the paper. (With a longer block the same weights are other
    filters.) A whole text goes through FFTs; what a state holds (the products k v of all tokens) or documents cut
    takes the sum as it is written.
    """

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.cut = config.end_token > 0
        self.up = Linear(C, 3 * C, config.bias)
        self.out = Linear(C, C, config.bias)
        self.wave = Linear(16, 32)
        self.shape = Linear(32, C)
        lengths = 2 * (config.block_size / 2) ** torch.linspace(0, 1, C)
        self.register_buffer("lengths", lengths, persistent=False)

    def filter(self, S):
        """(S, C): what is heard of a token 0, 1, ... S-1 back; each channel's squares sum to about 1"""
        far = torch.arange(S)
        cos, sin = waves(far, 16, 10000.0)
        waved = torch.cat((cos, sin), 1).to(self.lengths)
        shape = self.shape(torch.sin(self.wave(waved)))
        far = far[:, None].to(self.lengths)
        fade = torch.exp(-far / self.lengths)
        size = (2 / self.lengths).sqrt()
        return shape * fade * size

    def forward(self, x, call, layer):
        q, k, v = self.up(x).chunk(3, dim=2)
        u, = call.state.append(layer, call.at, k * v)  # (B, S, C)
        S = u.shape[1]
        u = u.to(torch.promote_types(u.dtype, torch.float32))
        h = self.filter(S).to(u)
        if call.at.shape == (1, S) and not self.cut:
            n = 2 * S  # with room for what would come round to the front
            waves = torch.fft.rfft(u, n, 1) * torch.fft.rfft(h, n, 0)
            y = torch.fft.irfft(waves, n, 1)[:, :S]
        else:
            s = torch.arange(S, device=x.device)
            far = call.at[:, :, None] - s  # (1 or B, T, S)
            heard = (far >= 0) & (far <= call.place[:, :, None])
            h = h[far.clamp(min=0)]
            h = h * heard[..., None]  # (1 or B, T, S, C)
            y = torch.einsum("btsc,bsc->btc", h, u)
        return self.out(q * y.type_as(x))


MIXERS = {
    "attention": partial(Attention, None, False),
    "window": partial(Attention, lambda far, window: far < window, False),  # Beltagy et al. 2020
    "strided": partial(Attention, lambda far, window: (far < window) | (far % window == 0), False),  # Child et al. 2019
    "valued": partial(Attention, None, True),
    "latent": LatentAttention,
    "linear": partial(Recurrence, False, False),  # Katharopoulos et al. 2020
    "mamba2": partial(Recurrence, True, False),  # Dao and Gu 2024
    "gdn": partial(Recurrence, True, True),  # Gated DeltaNet, Yang et al. 2025
    "hyena": Hyena,
}


# ---- feed-forward layers: where each token is worked on alone

class MLP(nn.Module):
    """down(f(up x)); f takes `parts` tensors, each as wide as what it gives."""

    loss = 0.0

    def __init__(self, parts, f, config, inner=0):
        super().__init__()
        self.parts, self.f = parts, f
        self.up = Linear(config.n_embd, parts * (inner or config.inner), config.bias)
        self.down = Linear(inner or config.inner, config.n_embd, config.bias)

    def forward(self, x):
        return self.down(self.f(*self.up(x).chunk(self.parts, -1)))


@torch.library.custom_op("model::grouped", mutates_args=())
def grouped(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """A product for each group of rows; group e is those of x (N, n_in) from ends[e - 1] up to ends[e].

    With matrices y (E, n_out, n_in) rows x y_e^T (N, n_out); with rows y (N, n_out) the sums of y^T x of the groups
    (E, n_out, n_in), which is the gradient of the matrices. An operation of its own, for torch.compile and fake tensors
    cannot follow slices whose lengths are data.
    """
    cuts = ends[:-1].cpu()
    parts = x.tensor_split(cuts)
    if y.ndim == 3:
        return torch.cat([part @ matrix.mT for part, matrix in zip(parts, y)])
    return torch.stack([rows.mT @ part for part, rows in zip(parts, y.tensor_split(cuts))])


def grouped_backward(ctx: Any, grad: Tensor) -> tuple:
    """The gradients of rows and matrices, and none of ends."""
    x, weight, ends = ctx.saved_tensors
    grad = grad.contiguous()
    return grouped(grad, weight.mT, ends), grouped(x, grad, ends), None


@grouped.register_fake
def grouped_shape(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """What torch.compile takes for the result of grouped."""
    if y.ndim == 3:
        return x.new_empty(len(x), y.shape[1])
    return x.new_empty(len(ends), y.shape[1], x.shape[1])


grouped.register_autograd(grouped_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


class Experts(nn.Module):
    """Each token passes the few of --n_expert feed-forward layers that a router prefers (Shazeer et al. 2017).

    No token is dropped: they are sorted by expert, and each expert multiplies its slice. Against idle experts there is
    a loss, E sum_e (share of the tokens) (mean probability) (Fedus et al. 2021), or a bias that only the choice sees
    (Wang et al. 2024); another loss keeps the router's scores small (Zoph et al. 2022). Their sum lies in `loss`.
    """

    def __init__(self, parts, f, config):
        super().__init__()
        self.parts, self.f, self.config = parts, f, config
        self.router = Linear(config.n_embd, config.n_expert)
        up = torch.empty(config.n_expert, parts * config.inner, config.n_embd)
        down = torch.empty(config.n_expert, config.n_embd, config.inner)
        self.up = nn.ParameterDict(dict(weight=up))
        self.down = nn.ParameterDict(dict(weight=down))
        shared = config.n_expert_shared * config.inner
        self.shared = MLP(parts, f, config, shared) if shared else lambda x: 0.0
        self.register_buffer("bias", torch.zeros(config.n_expert))
        self.register_buffer("counts", torch.zeros(config.n_expert), persistent=False)  # tokens of the last call

    def forward(self, x):
        scores = self.router(x).flatten(0, 1)  # (N, E)
        share = scores.softmax(1)
        active = self.config.n_expert_active
        chosen = (share + self.bias).topk(active).indices  # (N, active)
        weight = share.gather(1, chosen)
        weight = weight / weight.sum(1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)  # of N x active passes, those of expert 0 first
        experts = torch.arange(len(self.bias), device=x.device)
        counts = (chosen.flatten()[:, None] == experts).sum(0)
        rows, ends = order // active, counts.cumsum(0)
        y = self.work(x.flatten(0, 1)[rows].type_as(scores), ends)
        y = y * weight.flatten()[order, None]
        self.loss = self.balance(scores, share, counts) if self.training else 0.0
        out = torch.zeros_like(y[:len(scores)]).index_add(0, rows, y)
        return out.view_as(x) + self.shared(x)

    def work(self, x, ends):
        """What the experts make of rows x, those of expert e from ends[e - 1] up to ends[e]"""
        up, down = (layer["weight"].type_as(x) for layer in (self.up, self.down))
        h = grouped(x, up, ends)
        return grouped(self.f(*h.chunk(self.parts, 1)).type_as(x), down, ends)  # on a GPU autocast squares in float32

    def balance(self, scores, share, counts):
        """What the router's choices cost, in nats; the bias moves."""
        load, c = counts / counts.sum(), self.config
        self.counts.copy_(counts)
        self.bias.add_((load.mean() - load).sign(), alpha=c.balance_bias)
        even = len(load) * (load * share.mean(0)).sum()  # 1 if all have the same
        return c.balance_loss * even + c.router_z * scores.logsumexp(1).square().mean()


gelu = partial(F.gelu, approximate="tanh")  # GPT-2's form
FFNS = {
    "swiglu": (2, lambda gate, up: F.silu(gate) * up),  # Shazeer 2020
    "geglu": (2, lambda gate, up: gelu(gate) * up),
    "relu": (1, F.relu),
    "gelu": (1, gelu),
    "relu2": (1, lambda x: F.relu(x).square()),  # So et al. 2021
}


# ---- blocks: how the layers and their norms hang on the residual stream

# what a layer f and its norm make of the stream x; `start` is the stream before the block
PLACEMENTS = {
    "pre": lambda x, start, norm, f: x + f(norm(x)),  # the stream runs through unchanged (Xiong et al. 2020)
    "post": lambda x, start, norm, f: norm(x + f(x)),  # the original order (Vaswani et al. 2017)
    "reordered": lambda x, start, norm, f: x + norm(f(x)),  # what is added has a known size (Olmo 2, 2024)
    "parallel": lambda x, start, norm, f: x + f(norm(start)),  # mixer and feed-forward side by side (GPT-NeoX, 2022)
    "sandwich": lambda x, start, norm, f: x + f(norm(x)),  # and what f gives has a norm of its own (Gemma 2, 2024)
}


class Scaled(nn.Module):
    """x + a x + b x0: a block weighs the stream and the embedding that it began with (modded-nanogpt, 2024)."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(2))

    def forward(self, x, x0):
        a, b = self.bias
        return x + a * x + b * x0


RESIDUALS = {"plain": lambda: lambda x, x0: x, "scaled": Scaled}


class Block(nn.Module):
    """A mixer, then a feed-forward layer, each with its norm where --placement puts it."""

    def __init__(self, config, layer, noise):
        super().__init__()
        self.place = PLACEMENTS[config.placement]
        self.residual = RESIDUALS[config.residual]()
        self.norm1 = NORMS[config.norm](config, config.n_embd)
        self.norm2 = NORMS[config.norm](config, config.n_embd)
        self.mixer = MIXERS[config.tiled("mixer")[layer]](config)
        self.ffn = (Experts if config.n_expert else MLP)(*FFNS[config.ffn], config)
        last = NORMS[config.norm] if config.placement == "sandwich" else nn.Identity
        self.last_norm1 = last(config, config.n_embd)
        self.last_norm2 = last(config, config.n_embd)
        self.drop1 = Dropout(config.dropout, noise, 2 * layer + 1)
        self.drop2 = Dropout(config.dropout, noise, 2 * layer + 2)

    def forward(self, x, x0, call, layer):
        """x, and the embedding x0 (B, T, C) -> (B, T, C)"""
        x = self.residual(x, x0)
        def mix(h):
            return self.drop1(self.last_norm1(self.mixer(h, call, layer)))

        def feed(h):
            return self.drop2(self.last_norm2(self.ffn(h)))

        mixed = self.place(x, x, self.norm1, mix)
        return self.place(mixed, x, self.norm2, feed)


# ---- what each parameter is: how it starts and how it is trained

class Role(NamedTuple):
    """A row of the table below."""

    names: str  # of its parameters: a regular expression; the first row that fits counts
    mean: float = 0.0  # at the start
    decay: bool = False  # weight decay pulls it to 0
    muon: bool = False  # Muon may update it: a matrix between hidden vectors
    rate: float = 1.0  # times the learning rate; each row of an embedding is seldom used, so it moves faster
    shrink: bool = False  # with --init=mup the learning rate falls with the width


ROLES = {
    "bias": Role(r"bias$"),
    "gain": Role(r"norm\d?\.weight$", mean=1.0),
    "table": Role(r"ngrams|values", rate=10.0),  # many rows, few of them in a step
    "embedding": Role(r"^embedding|^position", rate=10.0),
    "head": Role(r"^head", shrink=True),
    "tied": Role(r"^$"),  # token embedding and head in one: told by --tie_embeddings
    "router": Role(r"router\.weight$", shrink=True),
    "output": Role(r"(out|down)\.weight$", decay=True, muon=True, shrink=True),  # writes to the residual stream
    "matrix": Role(r"weight$", decay=True, muon=True, shrink=True),
}
# standard deviations at the start, by fan-in n, fan-out m and number of layers L; all else starts at its mean
INITS = {
    "zero": lambda n, m, L: dict(matrix=n**-0.5, embedding=0.02, tied=0.02, router=0.02),
    "gpt2": lambda n, m, L: dict.fromkeys(INITIAL, 0.02) | dict(output=0.02 / (2 * L) ** 0.5),  # Radford et al. 2019
    "xavier": lambda n, m, L: dict.fromkeys(INITIAL, (2 / (n + m)) ** 0.5),  # Glorot and Bengio 2010
    "mup": lambda n, m, L: INITS["zero"](n, m, L),  # and GPT.rates (Yang et al. 2022)
}
INITIAL = ("matrix", "output", "router", "embedding", "tied", "head")
AXES: dict = dict(norm=NORMS, placement=PLACEMENTS, residual=RESIDUALS, position=POSITIONS, mixer=MIXERS, ffn=FFNS)
AXES["init"] = INITS


class GPT(nn.Module):
    """The language model. GPT(config)(tokens (B, T)) -> logits (B, T, V)."""

    def __init__(self, config: Config):
        super().__init__()
        config.check()
        self.config = config
        self.noise = {}  # shared by all dropouts, see there
        self.embedding = Embedding(config.n_embd, config.vocab_size)
        self.ngrams = NGrams(config)
        self.counts = Counts(config)
        kinds = config.tiled("position")
        self.position = POSITIONS[max(kinds, key=lambda kind: kind != "none")](config)
        self.turned = [int(kind != "none") for kind in kinds]
        self.drop = Dropout(config.dropout, self.noise, 0)
        layers = range(config.n_layer)
        self.blocks = nn.ModuleList(Block(config, layer, self.noise) for layer in layers)
        norm = NORMS[config.norm](config, config.n_embd)
        self.norm = nn.Identity() if config.placement == "post" else norm
        self.head = Linear(config.n_embd, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        # what foretells a token further is the stream and a change of it (parallel heads, Gloeckle et al. 2024)
        self.ahead = nn.ModuleList(Linear(config.n_embd, config.n_embd) for _ in range(config.ahead))
        if config.softcap:  # Gemma 2, 2024
            self.head.register_forward_hook(lambda head, x, y: config.softcap * torch.tanh(y / config.softcap))
        self.through = partial(checkpoint, use_reentrant=False) if config.recompute else lambda f, *x: f(*x)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """Draw every parameter as its role and --init say, from torch's generator."""
        for name, role in self.roles().items():
            weight = self.get_parameter(name)
            fan_out, fan_in = weight.shape[-2:][0], weight.shape[-1]
            std = INITS[self.config.init](fan_in, fan_out, self.config.n_layer)
            weight.normal_(ROLES[role].mean, std.get(role, 0.0))

    def roles(self) -> dict[str, str]:
        """The role of each parameter by name. Raises ValueError for a name that no row of ROLES fits."""
        found = {}
        for name, _ in self.named_parameters():
            fits = [role for role, row in ROLES.items() if re.search(row.names, name)]
            require(fits, f"no row of ROLES has a name like {name}")
            found[name] = "tied" if self.config.tie_embeddings and name == "embedding.weight" else fits[0]
        return found

    def rates(self, optimizer: str = "adamw") -> dict[str, float]:
        """What each parameter's learning rate is multiplied by.

        With --init=mup a rate found at --base_width holds at any width (Yang et al. 2022): AdamW's steps of a matrix
        have entries of one size, which add up over the width n, so they shrink as 1 / n. Those of train.py's Muon have
        singular values that grow as sqrt(n), and shrink as 1 / sqrt(n).
        """
        wider = self.config.n_embd / self.config.base_width if self.config.init == "mup" else 1.0
        found = {}
        for name, role in self.roles().items():
            row = ROLES[role]
            power = 0.5 if row.muon and optimizer == "muon" else 1.0
            found[name] = row.rate / wider ** (row.shrink * power)
        return found

    def look(self, tokens: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """All tokens so far (B, S) of a model that looks back on them, and the `at` and `place` of the new ones."""
        T, device = tokens.shape[1], tokens.device
        at = state.places(T, device)  # (1, T), ragged (B, T)
        if not (self.config.end_token or self.config.ngram > 1 or self.config.counts):
            return tokens, at, at
        seen, = state.append(-1, at, tokens)
        if not self.config.end_token:
            return seen, at, at
        ended = seen[:, :-1] == self.config.end_token
        begins = F.pad(ended, (1, 0))  # (B, S)
        places = torch.arange(seen.shape[1], device=device)
        start = (begins * places).cummax(1).values  # of each token's document
        return seen, at, at - start.gather(1, at.expand(len(tokens), T))

    def hidden(self, tokens: Tensor, state: State | None = None) -> Tensor:
        """Token ids (B, T) -> the last layer's normalised output (B, T, C); `state` takes in the T tokens.

        Raises ValueError where the context would be longer than block_size.
        """
        state = state or self.new_state(1, 0)
        T, room = tokens.shape[1], self.config.block_size
        require(max(state.lengths) + T <= room, f"the context is longer than the block_size of {room} tokens: "
                "train.py --init_from with a larger --block_size and --rope_base goes on with longer ones")
        seen, at, place = self.look(tokens, state)
        turns = [lambda x: x, self.position.turn(place)]
        x = self.ngrams(self.embedding(tokens), seen, at, place)
        x = x0 = self.drop(self.position.add(x, place))
        for layer, (block, turned) in enumerate(zip(self.blocks, self.turned)):
            call = Call(tokens, at, place, turns[turned], state)
            x = self.through(block, x, x0, call, layer)
        state.lengths = [length + T for length in state.lengths]
        x = self.norm(x)
        return self.counts(x, seen, at) if self.counts.at_work else x

    def parted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What `hidden` gives (..., C), with its numbers of histories behind it -> the head's logits, the numbers."""
        x, numbers = x.tensor_split([self.config.n_embd], -1)
        kind = next(self.parameters()).dtype
        return self.head(x.to(kind)), numbers

    def logits(self, x: Tensor) -> Tensor:
        """What `hidden` gives (..., C) -> logits (..., V)."""
        if not self.counts.at_work:
            return self.head(x)
        return self.counts.mixed(*self.parted(x))

    def nats(self, x: Tensor, targets: Tensor) -> Tensor:
        """What `hidden` gives (R, C) -> -log p (R) of the targets (R), 0 for those below 0.

        Where counts are at work, they are asked for these tokens alone, while `logits` asks for all.
        """
        logits, numbers = self.parted(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nats = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
        if self.counts.at_work:
            nats = -self.counts.mixed_one((-nats).exp(), numbers, targets)
        return nats.where(targets >= 0, 0)

    def forward(self, tokens: Tensor, state: State | None = None) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V) of each next token; errors as in `hidden`."""
        return self.logits(self.hidden(tokens, state))

    def extra_loss(self) -> Tensor | float:
        """What the last forward pass in training adds to the loss, in nats a token: the balance of experts."""
        return sum(block.ffn.loss for block in self.blocks)

    def new_state(self, batch: int, capacity: int = -1) -> State:
        """An empty state for `batch` sequences of up to `capacity` tokens (-1: block_size; 0: it keeps nothing)."""
        room = self.config.block_size if capacity < 0 else capacity
        layers = [[] for _ in range(len(self.blocks) + 1)]
        return State(layers, [0] * batch, [0] * batch, [room] * batch)


# ---- resource accounting

GPT2 = "--vocab_size=50257 --block_size=1024 --norm=layernorm --position=learned --ffn=gelu --qk_norm=False --bias=True"
LLAMA = "--n_layer=32 --n_head=32 --n_kv_head=8 --n_embd=4096 --qk_norm=False --tie_embeddings=False --norm_eps=1e-5"
PRESETS = {
    "": "",
    "gpt2": f"{GPT2} --n_layer=12 --n_head=12 --n_embd=768",
    "gpt2-xl": f"{GPT2} --n_layer=48 --n_head=25 --n_embd=1600",
    "llama-3-8b": f"{LLAMA} --n_inner=14336 --vocab_size=128256 --block_size=8192 --rope_base=5e5",
    "mistral-7b": f"{LLAMA} --n_inner=14336 --vocab_size=32000 --block_size=8192 --mixer=window --window=4096",
    "qwen3-0.6b": "--n_layer=28 --n_head=16 --n_kv_head=8 --head_dim=128 --n_embd=1024 --n_inner=3072 "
                  "--vocab_size=151936 --block_size=40960 --rope_base=1e6",
}
PEAK = dict(a100=312e12, h100=989e12, b200=2250e12, rtx4090=165e12)  # FLOPs a second in dense bf16 products


def kept_of(weight: Tensor, role: str, optimizer: str) -> int:
    """Numbers that train.py keeps of a weight: Muon and SGD one for each entry, AdamW two, Adagrad one for each row.

    SOAP keeps AdamW's, and four square matrices.
    """
    size, matrix = weight.numel(), ROLES[role].muon
    if role == "table":
        return len(weight)
    if optimizer == "soap" and matrix:
        n, m = weight.shape[-2:]
        return 2 * size + 2 * size * (n * n + m * m) // (n * m)
    return size if optimizer == "sgd" or optimizer == "muon" and matrix else 2 * size


def account(config: Config, batch: int, optimizer: str = "muon") -> dict:
    """What a model costs: parameters by role, FLOPs of one sequence of block_size tokens, bytes of training in fp32.

    The model runs on fake tensors, which have shapes but no numbers. FLOPs are those of matrix products (2 a
    multiply-add), attention in full, of which causal kernels skip the masked half; a backward pass costs twice the
    forward pass. Activations are the tensors kept for the backward pass of `batch` sequences, one (T, V) for the loss
    included, and for each of --ahead. (Gradients of tables are counted in full; on one device they are sparse. FFTs are
    no products.)
    """
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # views share one
        return tensor

    fused = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: 4 * q.numel() * k[2],
        torch.ops.model.grouped: lambda x, w, *_, **__: 2 * x.numel() * w[1],
    }
    counter = FlopCounterMode(display=False, custom_mapping=fused)
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # its exceptions say enough
    with FakeTensorMode():
        model = GPT(config)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), counter:
            keep(model(torch.zeros(batch, config.block_size, dtype=torch.long)))
            x = torch.zeros(batch, config.block_size, config.n_embd)
            for layer in model.ahead:
                keep(model.head(x + layer(x)))
        state = model.new_state(1)
        model(torch.zeros(1, 1, dtype=torch.long), state)
    for tensor in (*model.parameters(), *model.buffers()):  # they are there anyhow
        kept.pop(tensor.untyped_storage()._cdata, None)
    by_role, moments = dict.fromkeys(ROLES, 0), 0
    for name, role in model.roles().items():
        weight = model.get_parameter(name)
        size = weight.numel()
        by_role[role] += size
        moments += kept_of(weight, role, optimizer)
    total = sum(by_role.values())
    widths = [of[0].shape[3] for of, block in zip(state.layers, model.blocks) if isinstance(block.mixer, Attention)]
    experts = [ffn for ffn in model.modules() if type(ffn) is Experts]
    idle = sum(layer["weight"].numel() for ffn in experts for layer in (ffn.up, ffn.down))
    idle -= idle * config.n_expert_active // max(1, config.n_expert)
    counts = {name: sum(ops.values()) for name, ops in counter.flop_counts.items()}
    flops = {part: sum(n for name, n in counts.items() if name.endswith(part)) // batch
             for part in ("mixer", "ffn", "head")}
    memory = dict(weights=4 * total, gradients=4 * total, optimizer=4 * moments,
                  activations=sum(storage.nbytes() for storage in kept.values()))
    return dict(
        parameters=total,
        active=total - idle,
        roles=by_role,
        memory=memory,
        memory_total=sum(memory.values()),
        forward_flops=counter.get_total_flops() // batch,
        masked_flops=2 * config.block_size**2 * config.n_head * sum(widths),
        flops=flops,
        cache_per_token=state.nbytes // config.block_size,
    )


def report(config: Config, batch: int, optimizer: str = "muon", blocks: tuple = ()) -> str:
    """The accounting in lines of 80 columns; for each of `blocks` also what a context of so many blocks costs."""
    a, T = account(config, batch, optimizer), config.block_size
    total, cache = a["forward_flops"], a["cache_per_token"]
    roles = ", ".join(f"{role} {n:,}" for role, n in a["roles"].items() if n)
    memory = ", ".join(f"{name} {n / 2**20:,.1f}" for name, n in a["memory"].items())
    rows = [
        f"parameters    {a['parameters']:,} ({roles}), {a['active']:,} of them in use for a token",
        f"FLOPs         {total:,} forward for {T:,} tokens, {3 * total // T:,} a token trained; "
        f"{total - a['masked_flops']:,} without the half that attention masks",
        f"memory        {a['memory_total'] / 2**20:,.1f} MiB at {batch} x {T:,} tokens ({memory})",
        f"cache         {cache:,} bytes a token, {cache * T / 2**20:,.2f} MiB a sequence",
    ]
    for length in (n * T for n in blocks):
        kept = []
        for recompute in (False, True):
            longer = dict(block_size=length, recompute=recompute, balance_bias=0.0)
            cost = account(dataclasses.replace(config, **longer), 1)
            kept.append(f"{cost['memory']['activations'] / 2**20:,.0f}")
        shares = ", ".join(f"{part} {n / cost['forward_flops']:.0%}" for part, n in cost["flops"].items())
        rows.append(f"{length:,} tokens: {shares}; activations of a sequence {kept[0]} MiB, with --recompute {kept[1]}")
    return "\n".join(textwrap.fill(row, 80, subsequent_indent=" " * 14) for row in rows)


def coord_check(widths: tuple = (64, 128, 256, 512), steps: int = 5, rate: float = 0.02, plot: str = "") -> str:
    """How far the logits move in a few steps of AdamW, by width; right is a slope of 0 (Yang et al. 2022).

    A table of root mean squares, with the slope of log(size) over log(width), for --init=zero and --init=mup.
    """
    found = {}
    lines = [f"{'moved by':14}" + "".join(f"{f'width {width}':>12}" for width in widths) + "       slope"]
    for init in ("zero", "mup"):
        sizes = []
        for width in widths:
            torch.manual_seed(0)
            words = "--n_layer=2 --block_size=32 --vocab_size=64 --ffn=relu2 --position=none --tie_embeddings=False " \
                    f"--n_embd={width} --n_head={width // 32} --init={init} --base_width={widths[0]}"
            gpt = GPT(options(Config, words.split()))
            tokens = torch.randint(64, (8, 33))
            rates, weights = gpt.rates(), gpt.named_parameters()
            groups = [dict(params=[weight], lr=rate * rates[name]) for name, weight in weights]
            adam = torch.optim.AdamW(groups, weight_decay=0.0)
            before = gpt(tokens[:, :-1]).detach()
            for _ in range(steps):
                logits = gpt(tokens[:, :-1]).flatten(0, 1)
                loss = F.cross_entropy(logits, tokens[:, 1:].flatten())
                adam.zero_grad()
                loss.backward()
                adam.step()
            moved = gpt(tokens[:, :-1]).detach() - before
            sizes.append(moved.square().mean().sqrt().item())
        x, y = (torch.tensor(values).log() for values in (widths, sizes))
        x = x - x.mean()
        slope = x @ y / (x @ x)
        lines.append(f"--init={init:7}" + "".join(f"{size:12.3f}" for size in sizes) + f"{slope:12.2f}")
        found[f"--init={init}, slope {slope:.2f}"] = sizes
    if plot:
        from matplotlib import pyplot
        figure, axes = pyplot.subplots(figsize=(6, 4))
        for label, sizes in found.items():
            axes.loglog(widths, sizes, "o-", label=label, base=2)
        axes.set_xlabel("width")
        axes.set_ylabel(f"logits moved by, after {steps} steps")
        axes.set_xticks(widths, widths)
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(plot, dpi=150)
        lines.append(f"{plot} written")
    return "\n".join(lines)


# ---- checkpoints: one plain dict, read without unpickling code

@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; when the block ends well it is flushed to disk and renamed to `path`."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_checkpoint(path: str | os.PathLike, model: GPT, **rest) -> None:
    """Write config and weights of `model` and whatever else is given, whole or not at all. Raises OSError.

    `weights` among the rest stand for the model's own, such as a copy that no longer changes.
    """
    whole = dict(version=CHECKPOINT_VERSION, config=vars(model.config)) | rest
    # FSDP2 frees gathered parameters when it is asked for the model's own, here under a step of training
    whole["weights"] = rest.get("weights") or model.state_dict()
    with replacing(path) as file:
        try:
            torch.save(whole, file)
        except RuntimeError as error:  # torch's writer turns a full disk into this
            raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


# entries of a checkpoint that are dicts, and what their values are; a model alone has the first two
CHECKPOINT_FORM: dict = dict(
    config=object,
    weights=Tensor,
    train=object,
    progress=object,
    optimizer=list,  # of tensors
    trained=Tensor,  # what align.py changed
)


def load_checkpoint(path: str | os.PathLike) -> dict:
    """Read a checkpoint's dict onto the CPU. Nothing in it is executed. Raises OSError or ValueError."""
    with open(path, "rb") as file:
        try:
            wrong = zipfile.ZipFile(file).testzip()  # torch reads without comparing the sums that it wrote
            require(not wrong, f"its entry {wrong} has another sum")
            file.seek(0)
            checkpoint = torch.load(file, "cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # truncated archives and forbidden pickles fail in many ways
            raise ValueError(f"{path} is not a checkpoint, or is damaged; nothing in it was executed") from error
    version = checkpoint.get("version") if isinstance(checkpoint, dict) else None
    good = type(version) is int and version == CHECKPOINT_VERSION  # it may be anything, also a tensor
    require(good, f"{path} is not a checkpoint of format {CHECKPOINT_VERSION}")
    for name, kind in CHECKPOINT_FORM.items():
        needed = name == "config" or name == "weights" and "pieces" not in checkpoint  # those of a part, see ddp.py
        entry = checkpoint.get(name, None if needed else {})
        fits = isinstance(entry, dict) and all(isinstance(value, kind) for value in entry.values())
        require(fits, f"{path} does not fit: its entry {name} is missing, or of another kind")
    try:
        json.dumps(checkpoint.get("tokenizer"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit: its tokenizer is none: {error}") from error
    step = checkpoint.get("progress", {}).get("step", 0)
    states = checkpoint.get("optimizer", {}).values()
    fits = type(step) is int and all(isinstance(tensor, Tensor) for tensors in states for tensor in tensors)
    require(fits, f"{path} does not fit: its step is no number, or a state of the optimizer no tensor")
    return checkpoint


def from_checkpoint(checkpoint: dict) -> GPT:
    """The model of a checkpoint's dict, with its weights. Raises ValueError where they do not fit together."""
    try:
        model = GPT(Config(**checkpoint["config"]))
        weights = checkpoint["weights"]
        if not model.config.counts:  # they can be left out
            weights = {name: weight for name, weight in weights.items() if not name.startswith("counts.")}
        model.load_state_dict(weights)
    except Exception as error:  # unknown fields, weights of other names, shapes or kinds: it fails in many ways
        reason = str(error).strip().rpartition("\n")[2]
        raise ValueError(f"checkpoint does not fit model.py: {reason}") from error
    return model


# ---- HuggingFace: a folder with config.json and tensors in safetensors files

# our parameter, GPT-2's, that of Llama and the kinds after it; # is the layer, + joins what is one matrix here
HF_TENSORS = """
    embedding       wte              embed_tokens
    position.table  wpe              -
    norm            ln_f             norm
    head            lm_head          lm_head
    norm1           h.#.ln_1         layers.#.input_layernorm
    norm2           h.#.ln_2         layers.#.post_attention_layernorm
    mixer.qkv       h.#.attn.c_attn  layers.#.self_attn.q_proj+layers.#.self_attn.k_proj+layers.#.self_attn.v_proj
    mixer.q_norm    -                layers.#.self_attn.q_norm
    mixer.k_norm    -                layers.#.self_attn.k_norm
    mixer.out       h.#.attn.c_proj  layers.#.self_attn.o_proj
    ffn.router      -                layers.#.mlp.gate
    ffn.up          h.#.mlp.c_fc     layers.#.mlp.gate_proj+layers.#.mlp.up_proj
    ffn.down        h.#.mlp.c_proj   layers.#.mlp.down_proj"""
# our option and theirs, and the kind that alone has it; those of the first five lines must be there
HF_OPTIONS = """
    vocab_size      vocab_size           vocab_size
    block_size      n_positions          max_position_embeddings
    n_layer         n_layer              num_hidden_layers
    n_head          n_head               num_attention_heads
    n_embd          n_embd               hidden_size
    n_inner         n_inner              intermediate_size
    n_kv_head       -                    num_key_value_heads
    head_dim        -                    head_dim
    window          -                    sliding_window           mistral
    n_inner         -                    moe_intermediate_size    qwen3_moe
    n_expert        -                    num_experts              qwen3_moe
    n_expert_active -                    num_experts_per_tok      qwen3_moe
    rope_base       -                    rope_theta
    norm_eps        layer_norm_epsilon   rms_norm_eps
    tie_embeddings  tie_word_embeddings  tie_word_embeddings"""
HF_KINDS = {  # what all models of a kind have, or what is meant where config.json is silent
    "gpt2": "--norm=layernorm --position=learned --ffn=gelu --qk_norm=False --bias=True --norm_eps=1e-5",
    "llama": "--qk_norm=False --tie_embeddings=False",
    "mistral": "--qk_norm=False --tie_embeddings=False",
    "qwen2": "--qk_norm=False --tie_embeddings=False --qkv_bias=True",
    "qwen3": "--tie_embeddings=False",
    "qwen3_moe": "--tie_embeddings=False",
}
# what else config.json may say: that something is off, or is done the way it is here, or what does not touch the logits
HF_KNOWN = re.compile(
    r".*=(None|False|0|0\.0|\[\]|{}|\['full_attention'(, 'full_attention')*\])"
    r"|hidden_act=silu|activation_function=gelu_new|scale_attn_weights=True|rope_type=default|norm_topk_prob=True"
    r"|decoder_sparse_step=1"
    r"|(rope_parameters|architectures|model_type|sliding_window|intermediate_size|router_aux_loss_coef"  # not in use
    r"|.*(dtype|version|_token_id|pdrop|dropout|_range|cache|path|2label"
    r"|label2id|summary_\w+|task_\w+|_ctx|return_dict|max_window_layers|pretraining_tp))=.*")
DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16)


def column(table: str, kind: str) -> dict[str, str]:
    """Our names and those of a kind, of the lines that it has."""
    rows = [row.split() for row in table.split("\n")[1:]]
    names = {row[0]: row[1 + (kind != "gpt2")] for row in rows if row[3:] in ([], [kind])}
    return {own: name for own, name in names.items() if name != "-"}


def hf_config(theirs: dict) -> Config:
    """The Config that a config.json asks for. Raises ValueError, by name, for what is missing or not computed here."""
    kind: Any = theirs.get("model_type")
    require(kind in HF_KINDS, f"config.json: model_type={kind}: choose from {', '.join(HF_KINDS)}")
    theirs = theirs | (theirs.get("rope_parameters") or {})
    if kind == "qwen3_moe":  # transformers 5 renames the first
        theirs["num_experts"] = theirs.pop("num_local_experts", theirs.get("num_experts"))
        require(theirs.get("norm_topk_prob"), "config.json: norm_topk_prob=False is not computed here")
    names = column(HF_OPTIONS, kind)
    for name in [*names.values()][:5]:
        require(name in theirs, f"config.json lacks {name}")
    for name, value in theirs.items():
        known = name in names.values() or HF_KNOWN.fullmatch(f"{name}={value}")
        require(known, f"config.json: {name}={value} is not computed here")
    given = {own: theirs[name] for own, name in names.items() if theirs.get(name) is not None}
    given["mixer"] = "window" if given.get("window") else "attention"
    config = dataclasses.replace(options(Config, HF_KINDS[kind].split()), **given)
    try:
        config.check()
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from error
    return config


def hf_views(gpt: GPT, kind: str) -> dict[str, Tensor]:
    """Every tensor of a kind by name, as a view into our weights: to be filled, or to be written."""
    c, views, names = gpt.config, {}, column(HF_TENSORS, kind)
    heads = [n * c.head_width for n in gpt.blocks[0].mixer.heads]
    named = [pair for pair in gpt.named_parameters() if not pair[0].startswith("ahead")]  # those are for training alone
    for name, weight in named:
        layer, path, own = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(\w+)", name).groups()
        stem = "" if path == "head" else "transformer." if kind == "gpt2" else "model."
        parts = names[path].replace("#", str(layer)).split("+")
        flip = kind == "gpt2" and layer and weight.ndim == 2  # GPT-2 keeps these as (n_in, n_out)
        experts = weight.detach() if weight.ndim == 3 else weight.detach()[None]
        for number, matrix in enumerate(experts):
            sizes = heads if len(parts) == 3 else len(matrix) // len(parts)
            for part, view in zip(parts, matrix.split(sizes)):
                part = part.replace("mlp", f"mlp.experts.{number}") if weight.ndim == 3 else part
                views[f"{stem}{part}.{own}"] = view.T if flip else view
    return views


def read_safetensors(path: Path, place: Callable = lambda name: None) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, one by one; what does not fit into the file is a ValueError before any is read.

    Where `place` of a name is a tensor of that kind, it is read into. The format: 8 bytes with the length of a JSON
    header, the header, raw bytes.
    """
    with open(path, "rb") as file:
        body = 8 + int.from_bytes(file.read(8), "little")
        room = path.stat().st_size - body
        require(room >= 0 and body > 8, f"{path} is no safetensors file, or is truncated")
        header = json.loads(file.read(body - 8))
        header.pop("__metadata__", None)
        for name, about in header.items():
            begin, end = about["data_offsets"]
            size = math.prod(about["shape"]) * DTYPES[about["dtype"]].itemsize
            require(0 <= begin <= end == begin + size <= room, f"{path} is truncated, or mislabelled at {name}")
        for name, about in header.items():
            tensor = torch.empty(about["shape"], dtype=DTYPES[about["dtype"]])
            like = place(name)
            fits = like is not None and like.is_contiguous()
            if fits and (like.shape, like.dtype) == (tensor.shape, tensor.dtype):
                tensor = like
            file.seek(body + about["data_offsets"][0])
            file.readinto(tensor.flatten().view(torch.uint8).numpy().data)
            yield name, tensor


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the tensors, in single precision, whole or not at all."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = dict(dtype="F32", shape=[*tensor.shape], data_offsets=[begin, end])
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.float().cpu().contiguous().numpy().data)


def import_hf(folder: str | os.PathLike) -> GPT:
    """The model of a folder, in single precision. Raises OSError, or ValueError for what is missing or unknown."""
    folder = Path(folder)
    try:
        theirs = json.loads((folder / "config.json").read_text())
        gpt = GPT(hf_config(theirs))
        stem = "transformer." if theirs["model_type"] == "gpt2" else "model."  # absent where the head is
        named = hf_views(gpt, theirs["model_type"]).items()
        views = {name.removeprefix(stem): view for name, view in named}
        index = folder / "model.safetensors.index.json"
        files = json.loads(index.read_text())["weight_map"].values() if index.exists() else ["model.safetensors"]
        constant = re.compile(r".*(\.attn\.(masked_)?bias|inv_freq)" + r"|lm_head\.weight" * gpt.config.tie_embeddings)
        for file in sorted({*files}):
            for name, tensor in read_safetensors(folder / file, lambda name: views.get(name.removeprefix(stem))):
                if not constant.fullmatch(name):
                    view = views.pop(name.removeprefix(stem), tensor[None])  # a shape that no tensor has
                    require(view.shape == tensor.shape, f"{file}: {name} {[*tensor.shape]} has no place here")
                    finite = all(map(math.isfinite, tensor.aminmax()))  # isfinite() would take a copy
                    require(finite, f"{file}: {name} has entries that are not finite")
                    view.copy_(tensor)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:  # of another form
        raise ValueError(f"{folder} is no model of HuggingFace's, or is mislabelled: {error!r:.200}") from error
    require(not views, f"{folder} lacks {', '.join(views)}")
    return gpt


def export_hf(gpt: GPT, folder: str | os.PathLike) -> str:
    """Write a folder that HuggingFace's libraries read; returns the kind. Raises ValueError where none is the same."""
    def full(c):  # without what says something of training, counts or tables alone, and with nothing left to be derived
        idle = "init base_width dropout ahead ahead_loss balance_loss router_z recompute counts_weight ngram_rows"
        derived = dict(n_kv_head=c.n_kv_head or c.n_head, head_dim=c.head_width, n_inner=c.inner)
        return vars(c) | dict.fromkeys(idle.split()) | derived | dict(rope_base=(c.position == "rope") * c.rope_base)
    own, found = full(gpt.config), []
    for kind in HF_KINDS:
        theirs = {name: own[key] or None for key, name in column(HF_OPTIONS, kind).items()}
        theirs |= dict(model_type=kind, tie_word_embeddings=own["tie_embeddings"], norm_topk_prob="moe" in kind or None)
        differ = [key for key, value in full(hf_config(theirs)).items() if own[key] != value]
        found.append((differ, theirs))
    differ, theirs = min(found, key=lambda pair: len(pair[0]))
    kind = theirs["model_type"]
    require(not differ, f"no kind of HuggingFace's models is this one; {kind} differs in {', '.join(differ)}")
    camel = "GPT2LMHeadModel" if kind == "gpt2" else kind.title().replace("_", "") + "ForCausalLM"
    theirs["architectures"] = [camel]
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "config.json").write_text(json.dumps(theirs, indent=1))
    write_safetensors(Path(folder) / "model.safetensors", hf_views(gpt, kind))
    return kind


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


def main() -> None:
    words = sys.argv[1:]
    preset = options(Options, words).preset
    require(preset in PRESETS, f"--preset={preset}: choose from {', '.join(filter(None, PRESETS))}")
    o = options(Options, PRESETS[preset].split() + words)
    require(not (o.ckpt and preset), "--ckpt has a shape of its own: give it or --preset")
    mode, *more = [f"--{name}" for name in ("coord_check", "import_hf", "export_hf") if getattr(o, name)] or [""]
    require(not more, f"{mode} and {' '.join(more)}: one at a time")
    shaped = [f"--{name}" for name in vars(Config()) if getattr(o, name) != getattr(Config, name)]
    require(not (mode and shaped), f"{mode} has a shape of its own: leave out --preset, {', '.join(shaped)}")
    require(not o.ckpt or mode in ("", "--export_hf"), f"{mode} reads no --ckpt; --import_hf writes to --output")
    require(mode == "--import_hf" or o.output == Options.output, "--output is the checkpoint of --import_hf alone")
    require(o.coord_check or not o.plot, "--plot draws what --coord_check finds: give both")
    if o.coord_check:
        require(not o.plot or importlib.util.find_spec("matplotlib"), "--plot needs matplotlib: pip install matplotlib")
        return print(coord_check(plot=o.plot))
    if o.import_hf:
        save_checkpoint(o.output, import_hf(o.import_hf))
        return print(f"{o.import_hf} -> {o.output}; next: python sample.py --ckpt={o.output} --tokenizer={o.import_hf}")
    if o.export_hf:
        ckpt = o.ckpt or "out/ckpt.pt"
        kind = export_hf(from_checkpoint(load_checkpoint(ckpt)), o.export_hf)
        return print(f"{ckpt} -> {o.export_hf}, a model of the kind {kind}")
    if o.ckpt:
        shape = vars(from_checkpoint(load_checkpoint(o.ckpt)).config)
        o = options(Options, [f"--{name}={value}" for name, value in shape.items()] + words)
    require(o.accelerator in PEAK, f"--accelerator={o.accelerator}: choose from {', '.join(PEAK)}")
    cost = account(o, 1)
    tokens = o.tokens or 20 * cost["parameters"]
    flops = 3 * cost["forward_flops"] // o.block_size * tokens
    print(report(o, o.batch_size, blocks=(1, 4, 16)))
    hours = flops / PEAK[o.accelerator] / o.mfu / 3600
    took = f"{hours:,.1f} hours" if hours >= 1 else f"{3600 * hours:,.1f} seconds"
    print(f"time          {took} on one {o.accelerator} at {o.mfu:.0%} of its peak,")
    print(f"              for {tokens:,} tokens, {flops:.3g} FLOPs")


if __name__ == "__main__":
    run(main)
