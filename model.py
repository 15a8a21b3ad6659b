"""A decoder-only language model: tokens in, logits out, and what it costs. Every choice is a key of a dict.

Reads: nothing (a checkpoint, through load_checkpoint).
Writes: nothing (a checkpoint, through save_checkpoint).
Usage: python model.py --preset=gpt2
       python model.py --preset=llama-3-8b --n_layer=64 --accelerator=b200 --tokens=1e12
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
    mixer: str = "attention"  # attention, window, valued, linear, mamba2, gdn; a comma list is tiled over layers
    window: int = 0  # tokens that a window layer sees, its own included
    ffn: str = "swiglu"  # swiglu, geglu, relu, gelu, relu2
    ngram: int = 0  # longest n-gram that has an embedding of its own (0, 1: tokens alone)
    ngram_rows: int = 65536  # rows of the table of each n
    softcap: float = 0.0  # logits stay between -softcap and softcap (0: no limit)
    qk_norm: bool = True  # normalise queries and keys
    bias: bool = False  # biases in linear layers and LayerNorm
    qkv_bias: bool = False  # biases of queries, keys and values, also without the others
    tie_embeddings: bool = True  # one matrix for the token embedding and the head
    init: str = "zero"  # zero (matrices that write to the residual stream start at 0), gpt2
    dropout: float = 0.0  # of the embedding and of what each layer adds
    rope_base: float = 10000.0  # longest wavelength of rope, over 2 pi
    norm_eps: float = 1e-6  # added to the variance in norms

    @property
    def head_width(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def inner(self) -> int:
        # two thirds of 4 n_embd, to a multiple of 8, give the gated form the parameters of the plain one (Shazeer 2020)
        return self.n_inner or (-(-8 * self.n_embd // 24) * 8 if self.ffn.endswith("glu") else 4 * self.n_embd)

    def check(self) -> None:
        """Raise ValueError, naming the option to change, where no model has this shape."""
        for axis, table in AXES.items():
            for key in self.mixer.split(",") if axis == "mixer" else [getattr(self, axis)]:
                require(key in table, f"--{axis}={key}: choose from {', '.join(table)}")
        for name, value in vars(self).items():
            if type(value) in (int, float):  # 0 is meant only where it is the default
                require(value > 0 or value == getattr(type(self), name) == 0, f"--{name}={value} is too small")
        require(self.dropout < 1, f"--dropout={self.dropout} must be below 1")
        require(self.head_dim or self.n_embd % self.n_head == 0,
                f"--n_embd={self.n_embd} is no multiple of --n_head={self.n_head}: set --head_dim")
        require(self.n_head % (self.n_kv_head or 1) == 0,
                f"--n_head={self.n_head}: no multiple of --n_kv_head={self.n_kv_head}")
        require(self.position != "rope" or self.head_width % 2 == 0,
                f"--position=rope turns pairs of channels, a head of {self.head_width} is odd: set --head_dim")
        require(("window" in self.mixer.split(",")) == (self.window > 0),
                f"--mixer={self.mixer} --window={self.window}: a window needs both --mixer=window and --window=TOKENS")


@dataclasses.dataclass
class Options(Config):
    preset: str = ""  # a shape by name: gpt2, gpt2-xl, llama-3-8b, qwen3-0.6b, mistral-7b
    account: bool = False  # print what the model costs, which is done anyhow
    batch_size: int = 8  # sequences of a training step, for the memory of activations
    tokens: int = 0  # tokens to train on, for the time (0: 20 a parameter)
    accelerator: str = "h100"  # what it would train on: a100, h100, b200, rtx4090
    mfu: float = 0.4  # share of the accelerator's peak that training reaches


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


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * gain over the last dimension (Zhang and Sennrich 2019)"""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)  # fused where types are the same


NORMS = {
    "rmsnorm": lambda config, width: RMSNorm(width, config.norm_eps),
    "layernorm": lambda config, width: nn.LayerNorm(width, config.norm_eps, bias=config.bias),  # Ba et al. 2016
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
        keys = self.noise["keys"] if self.noise else torch.randint(0x4000000000000000, (len(x),))
        place = torch.arange(x[0].numel(), device=x.device) + (self.site << 40)
        bits = scramble(place + keys.to(x.device)[:, None] * GOLDEN)  # (B, T C)
        keep = (bits >> 20 & 0xFFFFFF) >= self.p * 0x1000000
        return x * keep.view_as(x) / (1 - self.p)


# ---- states: all that the layers look back on, and the position

@dataclasses.dataclass
class State:
    """What cached decoding carries from one call of the model to the next; with no room, a pass that keeps nothing.

    The last of the layers is that of the n-grams: it holds the tokens themselves.
    """

    layers: list[list[Tensor]]  # empty, or rows first; what append fills has the position as second dimension
    lengths: list[int]  # tokens taken in so far, one number a row
    start: list[int]  # what truncate may go back to: a recurrence sets it to the lengths before the last call
    room: list[int]  # tokens that a row can hold

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

    def truncate(self, lengths: list[int]) -> None:
        """Forget what lies beyond `lengths`, one a row (rejected drafts, the padding of a ragged prompt)."""
        fit = all(a <= b <= c for a, b, c in zip(self.start, lengths, self.lengths, strict=True))
        require(fit, f"cannot truncate {self.lengths} to {lengths}: possible down to {self.start}")
        self.lengths = list(lengths)

    def fork(self, rows: list[int]) -> "State":
        """A new state whose row i is a copy of row rows[i] (one prompt, several samples)."""
        layers = [[x[rows] for x in kept] for kept in self.layers]
        numbers = [[of[row] for row in rows] for of in (self.lengths, self.start, self.room)]
        return State(layers, *numbers)

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
        self.tables = nn.ModuleList(Embedding(config.n_embd, config.ngram_rows) for _ in range(config.ngram - 1))

    def forward(self, x, tokens, at, state):
        """x (B, T, C) of tokens (B, T) -> (B, T, C)"""
        if not self.tables:
            return x
        tokens, = state.append(-1, at, tokens)  # all so far (B, S)
        at = at.expand(len(tokens), -1)
        key = tokens.gather(1, at)
        for back, table in enumerate(self.tables, 1):
            before = tokens.gather(1, (at - back).clamp(min=0))
            key = scramble(key * GOLDEN + before.where(at >= back, -1))  # -1: the text began later
            x = x + table(key % len(table.weight))
        return x


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

    The pairs are (i, i + hd/2): (a, b) -> (a cos - b sin, b cos + a sin).
    """

    def __init__(self, config):
        super().__init__()
        cos, sin = waves(torch.arange(config.block_size), config.head_width, config.rope_base)  # (block_size, hd / 2)
        table = torch.stack((cos.repeat(1, 2), torch.cat((-sin, sin), 1)))  # (2, block_size, hd)
        self.register_buffer("table", table, persistent=False)

    def turn(self, at):
        cos, sin = self.table[:, at].unsqueeze(-2)  # (1 or B, T, 1, hd) each
        return lambda x: x * cos + x.roll(x.shape[3] // 2, 3) * sin


class Sinusoidal(Position):
    """Sines and cosines of wavelengths from 2 pi to 10000 * 2 pi by turns (Vaswani et al. 2017)."""

    def add(self, x, at):
        cos, sin = waves(at.cpu(), x.shape[2], 10000.0)  # double precision, which not every device has
        return x + torch.stack((sin, cos), 3).flatten(2)[..., :x.shape[2]].type_as(x)


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

    With `window`, over the last --window tokens (Beltagy et al. 2020). With `valued`, each value gets a trained vector
    of its token (value embeddings, modded-nanogpt 2024). Groups: Ainslie et al. 2023; normalised queries and keys keep
    the scores from growing (Henry et al. 2020).
    """

    def __init__(self, window, valued, config):
        super().__init__()
        self.window = config.window * window
        self.width = config.head_width
        groups = config.n_kv_head or config.n_head
        self.heads = config.n_head, groups, groups  # of q, k and v
        self.qkv = Linear(config.n_embd, sum(self.heads) * self.width, config.bias or config.qkv_bias)
        self.out = Linear(config.n_head * self.width, config.n_embd, config.bias)
        norm = NORMS[config.norm] if config.qk_norm else nn.Identity
        self.q_norm = norm(config, self.width)
        self.k_norm = norm(config, self.width)
        self.values = nn.ModuleList(Embedding(groups * self.width, config.vocab_size) for _ in range(valued))

    def forward(self, x, tokens, at, turn, state, layer):
        q, k, v = self.qkv(x).unflatten(2, (-1, self.width)).split(self.heads, dim=2)  # (B, T, H or H_kv, hd)
        for table in self.values:
            v = v + table(tokens).view_as(v)
        k, v = state.append(layer, at, turn(self.k_norm(k)), v)  # (B, S, H_kv, hd)
        mask, S = None, k.shape[1]
        if len(at) > 1 or at.shape[1] not in (1, S) or self.window:  # else causal says it
            far = at[:, None, :, None] - torch.arange(S, device=at.device)  # how far back key s lies
            mask = (far >= 0) & (far < (self.window or S))  # (1 or B, 1, T, S)
        # heads go to the front only here: the result keeps the layout of q, and so the last line copies nothing
        q, k, v = (part.transpose(1, 2) for part in (turn(self.q_norm(q)), k, v))
        causal = mask is None and q.shape[2] > 1  # torch would let a single query see the first key alone
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        return self.out(y.transpose(1, 2).flatten(2))


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

    def __init__(self, forget, delta, config):
        super().__init__()
        self.forget, self.delta = forget, delta
        self.heads, self.width = config.n_head, config.head_width
        self.up = Linear(config.n_embd, self.heads * (4 * self.width + 1 + forget), config.bias)
        self.out = Linear(self.heads * self.width, config.n_embd, config.bias)
        self.norm = RMSNorm(self.width, config.norm_eps)

    def forward(self, x, tokens, at, turn, state, layer):
        B, T, _ = x.shape
        heads = self.up(x).view(B, T, self.heads, -1).transpose(1, 2)  # (B, H, T, 4 hd + 1 or 2)
        heads = heads.to(torch.promote_types(heads.dtype, torch.float32))  # sums want single precision at least
        S, *past = state.layers[layer] or [heads.new_zeros(B, self.heads, self.width, self.width)]
        q, k, v, gate, rates = heads.split(self.width, 3)
        g = self.forget * F.logsigmoid(rates[..., -1:] + 4)  # at first half is left after about 40 tokens
        if past:
            was, *inputs = past
            kept = (was < at[:, :1])[:, None, :, None]  # what truncate took back is left out
            _, S = scan([part * kept for part in inputs], S, self.delta)
        inputs = q, F.normalize(k, dim=3), v, g, rates[..., :1].sigmoid()
        state.layers[layer] = [S, at.expand(B, T), *inputs]
        state.start = state.lengths
        y = (self.norm(scan(inputs, S, self.delta)[0]) * F.silu(gate)).type_as(x)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


MIXERS = {
    "attention": partial(Attention, False, False),
    "window": partial(Attention, True, False),
    "valued": partial(Attention, False, True),
    "linear": partial(Recurrence, False, False),  # Katharopoulos et al. 2020
    "mamba2": partial(Recurrence, True, False),  # Dao and Gu 2024
    "gdn": partial(Recurrence, True, True),  # Gated DeltaNet, Yang et al. 2025
}


# ---- feed-forward layers: where each token is worked on alone

class MLP(nn.Module):
    """down(f(up x)); f takes `parts` tensors, each as wide as what it gives."""

    def __init__(self, parts, f, config):
        super().__init__()
        self.parts, self.f = parts, f
        self.up = Linear(config.n_embd, parts * config.inner, config.bias)
        self.down = Linear(config.inner, config.n_embd, config.bias)

    def forward(self, x):
        return self.down(self.f(*self.up(x).chunk(self.parts, -1)))


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
}


class Block(nn.Module):
    """A mixer, then a feed-forward layer, each with its norm where --placement puts it."""

    def __init__(self, config, layer, noise):
        super().__init__()
        mixers = config.mixer.split(",")
        self.place = PLACEMENTS[config.placement]
        self.norm1 = NORMS[config.norm](config, config.n_embd)
        self.norm2 = NORMS[config.norm](config, config.n_embd)
        self.mixer = MIXERS[mixers[layer % len(mixers)]](config)
        self.ffn = MLP(*FFNS[config.ffn], config)
        self.drop1 = Dropout(config.dropout, noise, 2 * layer + 1)
        self.drop2 = Dropout(config.dropout, noise, 2 * layer + 2)

    def forward(self, x, *past):
        """x (B, T, C) -> (B, T, C); `past` is for the mixer: tokens, at, turn, state, layer"""
        mixed = self.place(x, x, self.norm1, lambda h: self.drop1(self.mixer(h, *past)))
        return self.place(mixed, x, self.norm2, lambda h: self.drop2(self.ffn(h)))


# ---- what each parameter is: how it starts and how it is trained

class Role(NamedTuple):
    """A row of the table below."""

    names: str  # of its parameters: a regular expression; the first row that fits counts
    mean: float = 0.0  # at the start
    decay: bool = False  # weight decay pulls it to 0
    muon: bool = False  # Muon may update it: a matrix between hidden vectors
    rate: float = 1.0  # times the learning rate; each row of an embedding is seldom used, so it moves faster


ROLES = {
    "bias": Role(r"bias$"),
    "gain": Role(r"norm\d?\.weight$", mean=1.0),
    "table": Role(r"ngrams|values", rate=10.0),  # many rows, few of them in a step
    "embedding": Role(r"^embedding|^position", rate=10.0),
    "head": Role(r"^head"),
    "tied": Role(r"^$"),  # token embedding and head in one: told by --tie_embeddings
    "output": Role(r"(out|down)\.weight$", decay=True, muon=True),  # writes to the residual stream
    "matrix": Role(r"weight$", decay=True, muon=True),
}
# standard deviations at the start, by fan-in n and number of layers L; all else starts at its mean
INITS = {
    "zero": lambda n, L: dict(matrix=n**-0.5, embedding=0.02, tied=0.02),
    "gpt2": lambda n, L: dict(matrix=0.02, output=0.02 / (2 * L) ** 0.5, embedding=0.02, tied=0.02, head=0.02),
}
AXES = dict(norm=NORMS, placement=PLACEMENTS, position=POSITIONS, mixer=MIXERS, ffn=FFNS, init=INITS)


class GPT(nn.Module):
    """The language model. GPT(config)(tokens (B, T)) -> logits (B, T, V)."""

    def __init__(self, config: Config):
        super().__init__()
        config.check()
        self.config = config
        self.noise = {}  # shared by all dropouts, see there
        self.embedding = Embedding(config.n_embd, config.vocab_size)
        self.ngrams = NGrams(config)
        self.position = POSITIONS[config.position](config)
        self.drop = Dropout(config.dropout, self.noise, 0)
        self.blocks = nn.ModuleList(Block(config, layer, self.noise) for layer in range(config.n_layer))
        self.norm = nn.Identity() if config.placement == "post" else NORMS[config.norm](config, config.n_embd)
        self.head = Linear(config.n_embd, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        if config.softcap:  # Gemma 2, 2024
            self.head.register_forward_hook(lambda head, x, y: config.softcap * torch.tanh(y / config.softcap))
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """Draw every parameter as its role and --init say, from torch's generator."""
        for name, role in self.roles().items():
            weight = self.get_parameter(name)
            std = INITS[self.config.init](weight.shape[-1], self.config.n_layer)
            weight.normal_(ROLES[role].mean, std.get(role, 0.0))

    def roles(self) -> dict[str, str]:
        """The role of each parameter by name. Raises ValueError for a name that no row of ROLES fits."""
        found = {}
        for name, _ in self.named_parameters():
            fits = [role for role, row in ROLES.items() if re.search(row.names, name)]
            require(fits, f"no row of ROLES has a name like {name}")
            found[name] = "tied" if self.config.tie_embeddings and name == "embedding.weight" else fits[0]
        return found

    def hidden(self, tokens: Tensor, state: State | None = None) -> Tensor:
        """Token ids (B, T) -> the last layer's normalised output (B, T, C); `state` takes in the T tokens.

        Raises ValueError where the context would be longer than block_size.
        """
        state = state or self.new_state(1, 0)
        T, room, device = tokens.shape[1], self.config.block_size, tokens.device
        require(max(state.lengths) + T <= room, f"the context is longer than the block_size of {room} tokens")
        first = state.lengths if min(state.lengths) < max(state.lengths) else state.lengths[:1]
        at = torch.tensor(first, device=device)[:, None] + torch.arange(T, device=device)  # (1, T), ragged (B, T)
        turn = self.position.turn(at)
        x = self.ngrams(self.embedding(tokens), tokens, at, state)
        x = self.drop(self.position.add(x, at))
        for layer, block in enumerate(self.blocks):
            x = block(x, tokens, at, turn, state, layer)
        state.lengths = [length + T for length in state.lengths]
        return self.norm(x)

    def forward(self, tokens: Tensor, state: State | None = None) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V) of each next token; errors as in `hidden`."""
        return self.head(self.hidden(tokens, state))

    def new_state(self, batch: int, capacity: int = -1) -> State:
        """An empty state for `batch` sequences of up to `capacity` tokens (-1: block_size; 0: it keeps nothing)."""
        room = self.config.block_size if capacity < 0 else capacity
        return State([[] for _ in range(len(self.blocks) + 1)], [0] * batch, [0] * batch, [room] * batch)


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
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), counter:
            keep(model(torch.zeros(batch, config.block_size, dtype=torch.long)))
        state = model.new_state(1)
        model(torch.zeros(1, 1, dtype=torch.long), state)
    for tensor in (*model.parameters(), *model.buffers()):  # they are there anyhow
        kept.pop(tensor.untyped_storage()._cdata, None)
    by_role, moments = dict.fromkeys(ROLES, 0), 0
    for name, role in model.roles().items():
        size = model.get_parameter(name).numel()
        by_role[role] += size
        moments += size if optimizer == "muon" and ROLES[role].muon else 2 * size
    total = sum(by_role.values())
    flops = {part: sum(sum(ops.values()) for name, ops in counter.flop_counts.items() if name.endswith(part)) // batch
             for part in ("mixer", "ffn", "head")}
    memory = dict(weights=4 * total, gradients=4 * total, optimizer=4 * moments,
                  activations=sum(storage.nbytes() for storage in kept.values()))
    return dict(parameters=total, roles=by_role, memory=memory, memory_total=sum(memory.values()),
                forward_flops=counter.get_total_flops() // batch, flops=flops,
                cache_per_token=state.nbytes // config.block_size)


def report(config: Config, batch: int, optimizer: str = "muon") -> str:
    """The accounting as a few lines of text."""
    a, T = account(config, batch, optimizer), config.block_size
    roles = ", ".join(f"{role} {n:,}" for role, n in a["roles"].items() if n)
    memory = ", ".join(f"{name} {n / 2**20:,.1f}" for name, n in a["memory"].items())
    shares = ", ".join(f"{part} {n / a['forward_flops']:.1%}" for part, n in a["flops"].items())
    return f"""\
parameters    {a['parameters']:,} ({roles})
FLOPs         {a['forward_flops']:,} forward for {T} tokens, {3 * a['forward_flops'] // T:,} a token trained
              of which {shares}
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
        raise ValueError(f"the checkpoint does not fit this model.py: {str(error).splitlines()[-1].strip()}") from error
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
    words = sys.argv[1:]
    preset = options(Options, words).preset
    require(preset in PRESETS, f"--preset={preset}: choose from {', '.join(PRESETS)}")
    o = options(Options, PRESETS[preset].split() + words)
    require(o.accelerator in PEAK, f"--accelerator={o.accelerator}: choose from {', '.join(PEAK)}")
    cost = account(o, 1)
    tokens = o.tokens or 20 * cost["parameters"]
    flops = 3 * cost["forward_flops"] // o.block_size * tokens
    print(report(o, o.batch_size))
    print(f"time          {flops / PEAK[o.accelerator] / o.mfu / 3600:,.1f} hours on one {o.accelerator} at "
          f"{o.mfu:.0%} of its peak, for {tokens:,} tokens, {flops:.3g} FLOPs")


if __name__ == "__main__":
    run(main)
