"""A decoder-only language model: tokens in, logits out. Every layer is written out, every choice is a key of a dict.

Reads: nothing (a checkpoint, through load_checkpoint).
Writes: nothing (a checkpoint, through save_checkpoint).
Usage: python model.py --n_layer=12 --n_head=12 --n_embd=768 --vocab_size=50257 --block_size=1024
References: Vaswani et al. 2017 (Transformer); Radford et al. 2019 (GPT-2); Touvron et al. 2023 (Llama).
"""
import argparse
import contextlib
import dataclasses
import difflib
import inspect
import os
import re
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import BinaryIO, Callable, Iterator, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

CHECKPOINT_VERSION = 1


def require(holds: bool, reason: str) -> None:
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
    n_inner: int = 0  # inner width of the feed-forward (0: 4 n_embd; swiglu, geglu: 8/3 n_embd)
    norm: str = "rmsnorm"  # rmsnorm, layernorm
    placement: str = "pre"  # of the norms: pre, post, reordered, parallel
    position: str = "rope"  # rope, sinusoidal, learned, none
    mixer: str = "attention"  # attention, window, linear, mamba2, gdn; a comma list is tiled over the layers
    window: int = 0  # tokens that a window layer sees, its own included
    ffn: str = "swiglu"  # swiglu, geglu, relu, gelu, relu2
    qk_norm: bool = True  # normalise queries and keys
    bias: bool = False  # biases in linear layers and LayerNorm
    qkv_bias: bool = False  # biases of queries, keys and values, also without the others
    tie_embeddings: bool = True  # one matrix for the token embedding and the head
    init: str = "zero"  # initialisation: zero (matrices that write to the residual stream start at 0), gpt2
    dropout: float = 0.0  # of the embedding and of what each layer adds
    rope_base: float = 10000.0  # longest wavelength of rope, over 2 pi
    norm_eps: float = 1e-6  # added to the variance in norms

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def inner(self) -> int:
        # two thirds of 4 n_embd, to a multiple of 8, give the gated form the parameters of the plain one (Shazeer 2020)
        default = -(-8 * self.n_embd // 24) * 8 if self.ffn.endswith("glu") else 4 * self.n_embd
        return self.n_inner or default

    @property
    def mixers(self) -> list[str]:
        """The mixer of each layer."""
        return (self.mixer.split(",") * self.n_layer)[:self.n_layer]

    def check(self) -> None:
        """Raise ValueError, naming the option to change, where no model has this shape."""
        for axis, table in AXES.items():
            for key in self.mixer.split(",") if axis == "mixer" else [getattr(self, axis)]:
                require(key in table, f"--{axis}={key}: choose from {', '.join(table)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float):  # 0 is meant only where it is the default
                require(value > 0 or value == field.default == 0, f"--{field.name}={value} is too small")
        require(self.dropout < 1, f"--dropout={self.dropout} must be below 1")
        require(self.head_dim or self.n_embd % self.n_head == 0,
                f"--n_embd={self.n_embd} is no multiple of --n_head={self.n_head}: set --head_dim")
        require(self.n_head % self.kv_heads == 0, f"--n_head={self.n_head}: no multiple of --n_kv_head={self.kv_heads}")
        require(self.position != "rope" or self.head_width % 2 == 0,
                f"--position=rope turns pairs of channels, a head of {self.head_width} is odd: set --head_dim")
        require(("window" in self.mixers) == (self.window > 0),
                f"--mixer={self.mixer} --window={self.window}: a window needs both --mixer=window and --window=TOKENS")


@dataclasses.dataclass
class Options(Config):
    batch_size: int = 8  # sequences of a training step, for the memory of activations


# ---- the operations: Plain is one formula each, to be read; Fast has the same signatures and gives the same numbers

class Plain:
    """Each operation in elementary tensor operations: a namespace of functions, of which no object is ever made."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool) -> Tensor:
        """(x - m) / sqrt(mean((x - m)^2) + eps) * weight + bias over the last dimension.

        m is the mean of x if `center` (LayerNorm, Ba et al. 2016), else 0 (RMSNorm, Zhang and Sennrich 2019).
        """
        x = x - center * x.mean(-1, keepdim=True)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
        return y if bias is None else y + bias

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(q k^T / sqrt(hd)) v, each group of query heads on its key and value head (Vaswani 2017).

        q (B, H, T, hd), k and v (B, H_kv, S, hd) -> (B, H, T, hd); H is a multiple of H_kv (Ainslie et al. 2023).
        `mask`: True where a query may look, broadcast to (B, H, T, S). None: a query sees all keys up to its own, and
        T is S, or 1 for the last of S tokens.
        """
        T, S = q.shape[2], k.shape[2]
        groups = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(groups, 1)  # (B, H, S, hd)
        v = v.repeat_interleave(groups, 1)
        if mask is None:
            mask = q.new_ones(T, S).tril(S - T).bool()
        scores = (q @ k.mT / q.shape[3] ** 0.5).masked_fill(~mask, float("-inf"))  # (B, H, T, S)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()  # the largest becomes 1: nothing overflows
        return weights / weights.sum(-1, keepdim=True) @ v


class Fast:
    """The same operations, fused by torch: one pass over memory where the plain form makes several."""

    def norm(x, weight, bias, eps, center):
        if center:
            return F.layer_norm(x, weight.shape, weight, bias, eps)
        return F.rms_norm(x, weight.shape, weight.type_as(x), eps)  # fused only where the types are the same

    def attention(q, k, v, mask):
        causal = mask is None and q.shape[2] > 1  # torch would let a single query see the first key alone
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)


ops = Fast  # what the layers below call; `model.ops = model.Plain` runs them as written above


# ---- layers with parameters; `roles` names what each parameter is, a row of ROLES further down

class Linear(nn.Module):
    """x (..., n_in) -> x W^T + b (..., n_out), with the weight W (n_out, n_in) and the bias b (n_out)"""

    def __init__(self, n_in: int, n_out: int, bias: bool = False, role: str = "matrix"):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None
        self.roles = {"weight": role, "bias": "bias"}

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Embedding(Linear):
    """Ids (...) -> their rows (..., n_in): a linear layer from rows to vectors, its input one-hot, is a look-up"""

    def forward(self, ids):
        return F.embedding(ids, self.weight)


class Norm(nn.Module):
    """x at a root mean square of 1, times a gain for each channel; width 0 is n_embd.

    With `center` the mean is taken off before, and a bias may be added after.
    """

    roles = {"weight": "gain", "bias": "bias"}

    def __init__(self, config: Config, width: int = 0, center: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width or config.n_embd))
        self.bias = nn.Parameter(torch.empty_like(self.weight)) if center and config.bias else None
        self.eps = config.norm_eps
        self.center = center

    def forward(self, x):
        return ops.norm(x, self.weight, self.bias, self.eps, self.center)


NORMS = {"rmsnorm": Norm, "layernorm": partial(Norm, center=True)}


class Dropout(nn.Module):
    """Zero a share p of x (B, T, C), a function of each row's key alone: no other row and no device changes it.

    `noise["keys"]` (B,) int64 holds one key a row, set before the forward pass; without it they are drawn from torch's
    generator. The mask is a hash of (key, site, place): splitmix64's finaliser (Steele et al. 2014).
    """

    def __init__(self, p: float, noise: dict, site: int):
        super().__init__()
        self.p = p
        self.noise = noise
        self.site = site

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        keys = self.noise["keys"] if self.noise else torch.randint(0x4000000000000000, (len(x),))
        place = torch.arange(x[0].numel(), device=x.device) + (self.site << 40)
        bits = place + keys.to(x.device)[:, None] * 0x1E3779B97F4A7C15  # (B, T C)
        bits = (bits ^ (bits >> 30 & 0x3FFFFFFFF)) * 0x3F58476D1CE4E5B9  # & takes out the sign shifted in
        bits = (bits ^ (bits >> 27 & 0x1FFFFFFFFF)) * 0x14D049BB133111EB
        keep = (bits >> 20 & 0xFFFFFF) >= self.p * 0x1000000
        return x * keep.view_as(x) / (1 - self.p)


# ---- positions: `at` is where the tokens stand, (1, T), or (B, T) where rows have different lengths

class Position(nn.Identity):
    """No sign of the position; each of the others replaces one of the two functions."""

    def add(self, x, at):
        """What the embedding x (B, T, C) becomes"""
        return x

    def turn(self, at):
        """The function that queries and keys (B, T, H, hd) of all layers pass through"""
        return lambda x: x


def waves(length: int, width: int, base: float) -> Tensor:
    """cos and sin of position / base^(2 i / width), i a pair of channels: (2, length, width / 2 rounded up)"""
    frequency = base ** (-torch.arange(0, width, 2).double() / width)
    angle = torch.outer(torch.arange(length).double(), frequency)  # exact enough for long contexts
    return torch.stack((angle.cos(), angle.sin())).to(torch.get_default_dtype())


class Rope(Position):
    """Turn each pair of channels by an angle that grows with the position: q k^T sees distances (Su et al. 2021).

    The pairs are (i, i + hd/2): (a, b) -> (a cos - b sin, b cos + a sin).
    """

    def __init__(self, config: Config):
        super().__init__()
        cos, sin = waves(config.block_size, config.head_width, config.rope_base)
        table = torch.stack((cos.repeat(1, 2), torch.cat((-sin, sin), 1)))  # (2, block_size, hd)
        self.register_buffer("table", table, persistent=False)

    def turn(self, at):
        cos, sin = self.table[:, at].unsqueeze(-2)  # (1 or B, T, 1, hd) each
        return lambda x: x * cos + x.roll(x.shape[3] // 2, 3) * sin


class Sinusoidal(Position):
    """Sines and cosines of wavelengths from 2 pi to 10000 * 2 pi by turns (Vaswani et al. 2017)."""

    def __init__(self, config: Config):
        super().__init__()
        cos, sin = waves(config.block_size, config.n_embd, 10000.0)
        table = torch.stack((sin, cos), 2).flatten(1)  # (block_size, C, and one more if C is odd)
        self.register_buffer("table", table[:, :config.n_embd], persistent=False)

    def add(self, x, at):
        return x + self.table[at]


class Learned(Position):
    """One trained vector a position (GPT-2)."""

    def __init__(self, config: Config):
        super().__init__()
        self.table = Embedding(config.n_embd, config.block_size, role="embedding")

    def add(self, x, at):
        return x + self.table(at)


POSITIONS = {"rope": Rope, "sinusoidal": Sinusoidal, "learned": Learned, "none": Position}


# ---- states: all that the layers look back on, and the position

@dataclasses.dataclass
class State:
    """What cached decoding carries from one call of the model to the next; of a pass that keeps nothing, no layers."""

    layers: list[list[Tensor]]  # rows first; what append fills has the position as second dimension
    lengths: list[int]  # tokens taken in so far, one number a row
    start: list[int]  # what truncate may go back to: a recurrence sets it to the lengths before the last call

    def append(self, layer: int, at: Tensor, *new: Tensor) -> list | tuple:
        """Take in (B, T, ...) of the T tokens at `at`; return all that is filled, (B, S, ...) each."""
        kept = self.layers[layer]
        if not kept:
            return new
        start = max(self.lengths)
        S = start + at.shape[1]
        room = kept[0].shape[1]
        require(S <= room, f"the state holds {room} tokens, {S} are needed: ask new_state for more")
        places = slice(None), slice(start, S)
        if len(at) > 1:  # ragged: behind the end of each row
            places = torch.arange(len(at), device=at.device)[:, None], at
        for old, x in zip(kept, new):
            old[places] = x.type_as(old)
        return [old[:, :S] for old in kept]

    def truncate(self, lengths: list[int]) -> None:
        """Forget what lies beyond `lengths`, one a row (rejected drafts, the padding of a ragged prompt)."""
        fit = all(a <= b <= c for a, b, c in zip(self.start, lengths, self.lengths, strict=True))
        require(fit, f"cannot truncate {self.lengths} to {lengths}: possible down to {self.start}")
        self.lengths = list(lengths)

    def fork(self, rows: list[int]) -> "State":
        """A new state whose row i is a copy of row rows[i] (one prompt, several samples)."""
        layers = [[x[rows] for x in kept] for kept in self.layers]
        lengths = [self.lengths[row] for row in rows]
        return State(layers, lengths, [self.start[row] for row in rows])

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for kept in self.layers for x in kept)


# ---- mixers: where tokens look at each other

class Attention(nn.Module):
    """Causal attention over the last `window` tokens (0: all); groups of queries share keys and values.

    Normalised queries and keys keep the scores from growing (Henry et al. 2020).
    """

    def __init__(self, config: Config, window: int = 0):
        super().__init__()
        self.window = window
        self.width = config.head_width
        self.heads = config.n_head, config.kv_heads, config.kv_heads  # of q, k and v
        self.qkv = Linear(config.n_embd, sum(self.heads) * self.width, config.bias or config.qkv_bias)
        self.out = Linear(config.n_head * self.width, config.n_embd, config.bias, "output")
        norm = NORMS[config.norm] if config.qk_norm else nn.Identity
        self.q_norm = norm(config, self.width)
        self.k_norm = norm(config, self.width)

    def forward(self, x, at, turn, state, layer):
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, -1, self.width).split(self.heads, dim=2)  # (B, T, H or H_kv, hd)
        q = turn(self.q_norm(q))
        k, v = state.append(layer, at, turn(self.k_norm(k)), v)  # (B, S, H_kv, hd)
        mask = self.mask(at, k.shape[1])
        # heads go to the front only here: the result keeps the layout of q, and so the last line copies nothing
        y = ops.attention(*(part.transpose(1, 2) for part in (q, k, v)), mask)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))

    def mask(self, at, S):
        """True where the query at position at[b, t] sees key s: (1 or B, 1, T, S); None where causal says it."""
        rows, T = at.shape
        if rows == 1 and T in (1, S) and not self.window:
            return None
        far = at[:, None, :, None] - torch.arange(S, device=at.device)  # how far back key s lies
        return (far >= 0) & (far < (self.window or S))

    def state(self, batch, capacity):
        """Empty keys and values of `batch` sequences of up to `capacity` tokens"""
        shape = batch, capacity, self.heads[1], self.width
        return [self.qkv.weight.new_zeros(shape) for _ in "kv"]


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
        S = g[:, :, -1:] * S + (D[:, :, -1:].mT * u).mT @ k
    return torch.cat(out, 2), S


class Recurrence(nn.Module):
    """A linear recurrence in place of attention: with `forget` S decays, with `delta` it replaces, see scan.

    These are the cores of the papers below: keys of length 1 and the output normalised and gated in each head, but no
    short convolutions before, and no feature map. The position is not asked: order shows in the decay alone.
    The state has one size, whatever the length: S before the last call, and that call's inputs, as truncate may take
    a part of them back.
    """

    def __init__(self, forget: bool, delta: bool, config: Config):
        super().__init__()
        self.forget = forget
        self.delta = delta
        self.heads = config.n_head
        self.width = config.head_width
        self.up = Linear(config.n_embd, self.heads * (4 * self.width + 1 + forget), config.bias)
        self.out = Linear(self.heads * self.width, config.n_embd, config.bias, "output")
        self.norm = Norm(config, self.width)

    def forward(self, x, at, turn, state, layer):
        B, T, _ = x.shape
        S, *past = state.layers[layer] or self.state(B, 0)
        heads = self.up(x).view(B, T, self.heads, -1).transpose(1, 2).type_as(S)  # (B, H, T, 4 hd + 1 or 2)
        q, k, v, gate, rates = heads.split(self.width, 3)
        k = F.normalize(k, dim=3)
        g = self.forget * F.logsigmoid(rates[..., -1:] + 4)  # at first half is left after about 40 tokens
        if past:
            was, *inputs = past
            kept = (was < at[:, :1])[:, None, :, None]  # what truncate took back is left out
            _, S = scan([part * kept for part in inputs], S, self.delta)
        inputs = q, k, v, g, rates[..., :1].sigmoid()
        state.layers[layer] = [S, at.expand(B, T), *inputs]
        state.start = state.lengths
        y, _ = scan(inputs, S, self.delta)
        y = (self.norm(y) * F.silu(gate)).type_as(x)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))

    def state(self, batch, capacity):
        """S of no tokens, in single precision at least"""
        like = self.up.weight
        dtype = torch.promote_types(like.dtype, torch.float32)
        return [like.new_zeros(batch, self.heads, self.width, self.width, dtype=dtype)]


MIXERS = {
    "attention": Attention,
    "window": lambda config: Attention(config, config.window),  # Beltagy et al. 2020
    "linear": partial(Recurrence, False, False),  # Katharopoulos et al. 2020
    "mamba2": partial(Recurrence, True, False),  # Dao and Gu 2024
    "gdn": partial(Recurrence, True, True),  # Gated DeltaNet, Yang et al. 2025
}


# ---- feed-forward layers: where each token is worked on alone

class MLP(nn.Module):
    """down(f(up x)); f takes `parts` tensors, each as wide as what it gives."""

    def __init__(self, f: Callable, config: Config, parts=1):
        super().__init__()
        self.f = f
        self.parts = parts
        self.up = Linear(config.n_embd, parts * config.inner, config.bias)
        self.down = Linear(config.inner, config.n_embd, config.bias, "output")

    def forward(self, x):
        return self.down(self.f(*self.up(x).chunk(self.parts, -1)))


gelu = partial(F.gelu, approximate="tanh")  # GPT-2's form
FFNS = {
    "swiglu": partial(MLP, lambda gate, up: F.silu(gate) * up, parts=2),  # Shazeer 2020
    "geglu": partial(MLP, lambda gate, up: gelu(gate) * up, parts=2),
    "relu": partial(MLP, F.relu),
    "gelu": partial(MLP, gelu),
    "relu2": partial(MLP, lambda x: F.relu(x).square()),  # So et al. 2021
}


# ---- blocks: how the layers and their norms hang on the residual stream

# what a layer f and its norm make of the stream x; `start` is the stream before the block
PLACEMENTS = {
    "pre": lambda x, start, norm, f: x + f(norm(x)),  # the stream runs through unchanged (Xiong et al. 2020)
    "post": lambda x, start, norm, f: norm(x + f(x)),  # the original order (Vaswani et al. 2017)
    "reordered": lambda x, start, norm, f: x + norm(f(x)),  # what is added has a known size (Olmo 2, 2024)
    "parallel": lambda x, start, norm, f: x + f(norm(start)),  # mixer and feed-forward side by side (GPT-NeoX, 2022)
}


class Block(nn.Module):
    """A mixer, then a feed-forward layer, each with its norm where --placement puts it."""

    def __init__(self, config: Config, layer: int, noise: dict):
        super().__init__()
        self.place = PLACEMENTS[config.placement]
        self.norm1 = NORMS[config.norm](config)
        self.norm2 = NORMS[config.norm](config)
        self.mixer = MIXERS[config.mixers[layer]](config)
        self.ffn = FFNS[config.ffn](config)
        self.drop1 = Dropout(config.dropout, noise, 2 * layer + 1)
        self.drop2 = Dropout(config.dropout, noise, 2 * layer + 2)

    def forward(self, x, *past):
        """x (B, T, C) -> (B, T, C); `past` is for the mixer: at, turn, state, layer"""
        mixed = self.place(x, x, self.norm1, lambda h: self.drop1(self.mixer(h, *past)))
        return self.place(mixed, x, self.norm2, lambda h: self.drop2(self.ffn(h)))


# ---- what each parameter is: how it starts and how it is trained

class Role(NamedTuple):
    """A row of the table below; standard deviations are numbers, or functions of fan-in n and number of layers L."""

    zero: float | Callable = 0.0  # with --init=zero
    gpt2: float | Callable = 0.0  # with --init=gpt2 (Radford et al. 2019)
    mean: float = 0.0
    decay: bool = False  # weight decay pulls it to 0
    muon: bool = False  # Muon may update it: a matrix between hidden vectors
    rate: float = 1.0  # times the learning rate; each row of an embedding is seldom used, so it moves faster


ROLES = {
    "matrix": Role(lambda n, L: n**-0.5, 0.02, decay=True, muon=True),
    "output": Role(0.0, lambda n, L: 0.02 / (2 * L) ** 0.5, decay=True, muon=True),  # writes to the residual stream
    "embedding": Role(0.02, 0.02, rate=10.0),
    "tied": Role(0.02, 0.02),  # token embedding and head in one
    "head": Role(gpt2=0.02),
    "gain": Role(mean=1.0),
    "bias": Role(),
}
INITS = ("zero", "gpt2")
AXES = {
    "norm": NORMS,
    "placement": PLACEMENTS,
    "position": POSITIONS,
    "mixer": MIXERS,
    "ffn": FFNS,
    "init": INITS,
}


class GPT(nn.Module):
    """The language model. GPT(config)(tokens (B, T)) -> logits (B, T, V)."""

    def __init__(self, config: Config):
        super().__init__()
        config.check()
        self.config = config
        self.noise = {}  # shared by all dropouts, see there
        role = "tied" if config.tie_embeddings else "embedding"
        self.embedding = Embedding(config.n_embd, config.vocab_size, role=role)
        self.position = POSITIONS[config.position](config)
        self.drop = Dropout(config.dropout, self.noise, 0)
        self.blocks = nn.ModuleList(Block(config, layer, self.noise) for layer in range(config.n_layer))
        self.norm = nn.Identity() if config.placement == "post" else NORMS[config.norm](config)
        self.head = Linear(config.n_embd, config.vocab_size, role="head")
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """Draw every parameter as its role and --init say, from torch's generator."""
        for name, role in self.roles().items():
            weight = self.get_parameter(name)
            std = getattr(ROLES[role], self.config.init)
            if callable(std):
                std = std(weight.shape[-1], self.config.n_layer)
            weight.normal_(ROLES[role].mean, std)

    def roles(self) -> dict[str, str]:
        """The role of each parameter by name. A parameter whose layer does not name its role is a KeyError."""
        owners = ((name, *name.rsplit(".", 1)) for name, _ in self.named_parameters())
        return {name: self.get_submodule(path).roles[own] for name, path, own in owners}

    def hidden(self, tokens: Tensor, state: State | None = None) -> Tensor:
        """Token ids (B, T) -> the last layer's normalised output (B, T, C); `state` takes in the T tokens.

        Raises ValueError where the context would be longer than block_size.
        """
        state = state or State([[] for _ in self.blocks], [0], [0])
        T, device = tokens.shape[1], tokens.device
        require(max(state.lengths) + T <= self.config.block_size,
                f"the context is longer than the block_size of {self.config.block_size} tokens")
        first = state.lengths if min(state.lengths) < max(state.lengths) else state.lengths[:1]
        at = torch.tensor(first, device=device)[:, None] + torch.arange(T, device=device)  # (1, T), ragged (B, T)
        turn = self.position.turn(at)
        x = self.drop(self.position.add(self.embedding(tokens), at))
        for layer, block in enumerate(self.blocks):
            x = block(x, at, turn, state, layer)
        state.lengths = [length + T for length in state.lengths]
        return self.norm(x)

    def forward(self, tokens: Tensor, state: State | None = None) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V) of each next token; errors as in `hidden`."""
        return self.head(self.hidden(tokens, state))

    def new_state(self, batch: int, capacity: int = 0) -> State:
        """An empty state for `batch` sequences of up to `capacity` tokens (0: block_size)."""
        layers = [block.mixer.state(batch, capacity or self.config.block_size) for block in self.blocks]
        return State(layers, [0] * batch, [0] * batch)


# ---- resource accounting

def account(config: Config, batch: int, optimizer: str = "muon") -> dict:
    """What a model costs: parameters by role, FLOPs of one sequence of block_size tokens, bytes of training in fp32.

    The model runs on fake tensors, which have shapes but no numbers. FLOPs are those of matrix products (2 a
    multiply-add), attention in full, not its causal half; a backward pass costs twice the forward pass. Activations are
    the tensors kept for the backward pass of `batch` sequences, one (T, V) for the loss included. Muon keeps one number
    for each entry of a hidden matrix, AdamW two for each parameter.
    """
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # views share one
        return tensor

    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: 4 * q.numel() * k[2]}
    counter = FlopCounterMode(display=False, custom_mapping=fused)
    with FakeTensorMode():
        model = GPT(config)
        with saved_tensors_hooks(keep, lambda tensor: tensor), counter:
            keep(model(torch.zeros(batch, config.block_size, dtype=torch.long)))
    for tensor in (*model.parameters(), *model.buffers()):  # they are there anyhow
        kept.pop(tensor.untyped_storage()._cdata, None)
    activations = sum(storage.nbytes() for storage in kept.values())
    by_role = dict.fromkeys(ROLES, 0)
    moments = 0
    for name, role in model.roles().items():
        size = model.get_parameter(name).numel()
        by_role[role] += size
        moments += size if optimizer == "muon" and ROLES[role].muon else 2 * size
    total = sum(by_role.values())
    memory = dict(weights=4 * total, gradients=4 * total, optimizer=4 * moments, activations=activations)
    return dict(parameters=total, roles=by_role, memory=memory, memory_total=sum(memory.values()),
                forward_flops=counter.get_total_flops() // batch,
                cache_per_token=model.new_state(1).nbytes // config.block_size)


def report(config: Config, batch: int, optimizer: str = "muon") -> str:
    """The accounting as a few lines of text."""
    a, T = account(config, batch, optimizer), config.block_size
    roles = ", ".join(f"{role} {n:,}" for role, n in a["roles"].items() if n)
    memory = ", ".join(f"{name} {n / 2**20:,.1f}" for name, n in a["memory"].items())
    return f"""\
parameters    {a['parameters']:,} ({roles})
FLOPs         {a['forward_flops']:,} forward for {T} tokens, {3 * a['forward_flops'] // T:,} a token trained
memory, MiB   {a['memory_total'] / 2**20:,.1f} at {batch} x {T} tokens ({memory})
cache         {a['cache_per_token']:,} bytes a token, {a['cache_per_token'] * T / 2**20:,.2f} MiB a sequence"""


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
    """Write config and weights of `model` and whatever else is given, whole or not at all. Raises OSError."""
    rest |= dict(version=CHECKPOINT_VERSION, config=dataclasses.asdict(model.config), weights=model.state_dict())
    with replacing(path) as file:
        try:
            torch.save(rest, file)
        except RuntimeError as error:  # torch's writer turns a full disk into this
            raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


def load_checkpoint(path: str | os.PathLike) -> dict:
    """Read a checkpoint's dict onto the CPU. Nothing in it is executed. Raises OSError or ValueError."""
    with open(path, "rb") as file:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # truncated archives and forbidden pickles fail in many ways
            raise ValueError(f"{path} is not a checkpoint, or is truncated; nothing in it was executed") from error
    version = isinstance(checkpoint, dict) and checkpoint.get("version")
    require(version == CHECKPOINT_VERSION, f"{path} is not a checkpoint of format {CHECKPOINT_VERSION}")
    return checkpoint


def from_checkpoint(checkpoint: dict) -> GPT:
    """The model of a checkpoint's dict, with its weights. Raises ValueError where they do not fit together."""
    try:
        model = GPT(Config(**checkpoint["config"]))
        model.load_state_dict(checkpoint["weights"])
    except (KeyError, TypeError, RuntimeError) as error:  # an unknown field, weights of other names or shapes
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"the checkpoint does not fit this model.py: {reason}") from error
    return model


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


def main() -> None:
    o = options(Options, sys.argv[1:])
    print(report(o, o.batch_size))


if __name__ == "__main__":
    run(main)
