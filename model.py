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
import io
import math
import os
import sys
import textwrap
import tokenize
from functools import partial
from pathlib import Path
from typing import BinaryIO, Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHECKPOINT_VERSION = 1


@dataclasses.dataclass
class Config:
    vocab_size: int = 512  # number of token ids
    block_size: int = 256  # longest context in tokens
    n_layer: int = 4  # number of layers
    n_head: int = 4  # number of query heads
    n_kv_head: int = 0  # key and value heads, each shared by a group of query heads (0: n_head)
    n_embd: int = 128  # width of the residual stream
    head_dim: int = 0  # width of a head (0: n_embd / n_head)
    n_inner: int = 0  # inner width of the feed-forward (0: 4 n_embd; swiglu: 8/3 n_embd)
    norm: str = "rmsnorm"  # rmsnorm, layernorm
    placement: str = "pre"  # of the norms: pre, post
    position: str = "rope"  # rope, sinusoidal, learned, none
    mixer: str = "attention"  # attention, window; a comma list is tiled over the layers
    window: int = 0  # tokens that a window layer sees, its own included
    ffn: str = "swiglu"  # swiglu, relu, gelu, relu2
    qk_norm: bool = True  # normalise queries and keys
    bias: bool = False  # biases in linear layers and LayerNorm
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
        return self.n_inner or (-(-8 * self.n_embd // 24) * 8 if self.ffn == "swiglu" else 4 * self.n_embd)

    @property
    def mixers(self) -> list[str]:
        """The mixer of each layer; --window alone turns every attention layer into a window layer."""
        keys = self.mixer.split(",")
        if self.window and "window" not in keys:
            keys = ["window" if key == "attention" else key for key in keys]
        return [keys[i % len(keys)] for i in range(self.n_layer)]

    def check(self) -> None:
        """Raise ValueError, naming the option to change, where no model has this shape."""
        for axis, table in AXES.items():
            for key in self.mixers if axis == "mixer" else [getattr(self, axis)]:
                if key not in table:
                    raise ValueError(f"--{axis}={key}: choose from {', '.join(table)}")
        sizes = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
        small = [name for name in sizes if getattr(self, name) < 1]
        small += [name for name in ("n_kv_head", "head_dim", "n_inner", "window") if getattr(self, name) < 0]
        if small:
            raise ValueError(f"--{small[0]}={getattr(self, small[0])} is too small")
        heads = f"--n_embd={self.n_embd}, --n_head={self.n_head}"
        refused = {
            f"{heads}: not a multiple (or set --head_dim)": self.n_embd % self.n_head and not self.head_dim,
            f"--n_head={self.n_head} must be a multiple of --n_kv_head={self.kv_heads}": self.n_head % self.kv_heads,
            f"{heads}: rope turns pairs, a head must be even": self.position == "rope" and self.head_width % 2,
            "--mixer=window needs --window=TOKENS": "window" in self.mixers and not self.window,
            f"--dropout={self.dropout} must be at least 0 and below 1": not 0 <= self.dropout < 1,
        }
        for reason, holds in refused.items():
            if holds:
                raise ValueError(reason)


@dataclasses.dataclass
class Options(Config):
    vocab_size: int = 50257  # number of token ids
    batch_size: int = 8  # sequences of a training step, for the memory of activations


# ---- the operations, plain: one formula each, to be read; and their fast twins, same signatures, the same numbers

class Plain:
    """Each operation in elementary tensor operations."""

    @staticmethod
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., n_in), weight (n_out, n_in), bias (n_out) -> (..., n_out)"""
        return x @ weight.T if bias is None else x @ weight.T + bias

    @staticmethod
    def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
        """tokens (...) of ids, weight (V, C) -> (..., C)"""
        return weight[tokens]

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019)"""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    @staticmethod
    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (Ba et al. 2016)"""
        x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
        return x if bias is None else x + bias

    @staticmethod
    def softmax(x: Tensor) -> Tensor:
        """exp(x) / sum(exp(x)) over the last dimension; the largest is subtracted first, so that nothing overflows"""
        x = (x - x.amax(-1, keepdim=True)).exp()
        return x / x.sum(-1, keepdim=True)

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(q k^T / sqrt(hd)) v, each group of query heads on its key and value head (Vaswani 2017, Ainslie 2023).

        q (B, H, T, hd), k and v (B, H_kv, S, hd) -> (B, H, T, hd). `mask`: True where a query may look, broadcast to
        (B, H, T, S); None: causal, the last query sees all S keys.
        """
        T, S = q.shape[-2], k.shape[-2]
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)  # (B, H, S, hd)
        if mask is None:
            mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, T, S)
        return Plain.softmax(scores.masked_fill(~mask, float("-inf"))) @ v


class Fast(Plain):
    """The same operations, fused by torch: one pass over memory where the plain form makes several."""

    linear = staticmethod(F.linear)

    @staticmethod
    def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(tokens, weight)

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        T, S = q.shape[-2], k.shape[-2]
        if mask is None and 1 < T < S:  # is_causal aligns at the first key, ours at the last
            mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        causal, groups = mask is None and T > 1, q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=groups)


class Counting(Fast):
    """For accounting on the meta device: counts FLOPs, and keeps for the backward pass what a fused attention keeps."""

    flops = 0

    @classmethod
    def linear(cls, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        cls.flops += 2 * x[..., 0].numel() * weight.numel()
        return Plain.linear(x, weight, bias)

    @classmethod
    def attention(cls, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        cls.flops += 4 * q.numel() * k.shape[-2]  # q k^T and its product with v, the masked half included
        return FusedAttention.apply(q, k, v)


class FusedAttention(torch.autograd.Function):
    """The shapes of FlashAttention (Dao et al. 2022): no T x S scores are kept, only the sums of the softmax."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)
        ctx.save_for_backward(q, k, v, y, y[..., 0].contiguous())
        return y


ops = Fast  # the layers below call this one; `model.ops = model.Plain` runs them as written above


# ---- layers with parameters: `roles` names what each parameter is; `flops` and `saved` count one sequence of T tokens

class Linear(nn.Module):
    def __init__(self, n_in: int, n_out: int, bias: bool = False, role: str = "matrix"):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None
        self.roles = {"weight": role, "bias": "bias"}

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    roles = {"weight": "embedding"}

    def __init__(self, n_rows: int, n_embd: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_rows, n_embd))

    def forward(self, tokens: Tensor) -> Tensor:
        return ops.embedding(tokens, self.weight)


class RMSNorm(nn.Module):
    roles = {"weight": "gain"}

    def __init__(self, width: int, config: Config):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width)), config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class LayerNorm(RMSNorm):
    roles = {"weight": "gain", "bias": "bias"}

    def __init__(self, width: int, config: Config):
        super().__init__(width, config)
        self.bias = nn.Parameter(torch.empty(width)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


class Dropout(nn.Module):
    """Zero a share p of x (B, T, C), a function of each row's key alone: no other row and no device changes it.

    `noise["keys"]` (B,) int64 holds one key a row, set before the forward pass; without it they are drawn from torch's
    generator. The mask is a hash of (key, site, place): splitmix64's finaliser (Steele et al. 2014).
    """

    def __init__(self, p: float, noise: dict, site: int):
        super().__init__()
        self.p, self.noise, self.site = p, noise, site

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keys = self.noise["keys"] if self.noise else torch.randint(2**62, (len(x),))
        place = torch.arange(x[0].numel(), device=x.device) + (self.site << 40)
        bits = place + keys.to(x.device)[:, None] * 0x1E3779B97F4A7C15  # (B, T C)
        for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
            bits = (bits ^ (bits >> shift & (1 << 64 - shift) - 1)) * factor  # the mask makes a shift without sign
        keep = (bits >> 20 & 0xFFFFFF) >= self.p * 2**24
        return x * keep.view_as(x) / (1 - self.p)


# ---- positions: what is added to the embedding, and what turns queries and keys; both are forward(x, at)

class Nowhere(nn.Module):
    """No sign of the position (x unchanged)."""

    def __init__(self, config: Config):
        super().__init__()

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        return x


def angles(length: int, width: int, base: float) -> Tensor:
    """position * base^(-2 i / width) for each pair of channels i: (length, width / 2 rounded up)"""
    wave = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.outer(torch.arange(length, dtype=torch.float64), wave).to(torch.get_default_dtype())


class Rope(nn.Module):
    """Turn each pair of channels by an angle that grows with the position: q k^T sees distances (Su et al. 2021)."""

    def __init__(self, config: Config):
        super().__init__()
        angle = angles(config.block_size, config.head_width, config.rope_base)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        cos, sin = self.cos[at].unsqueeze(-3), self.sin[at].unsqueeze(-3)  # (1, T, hd/2) or, ragged, (B, 1, T, hd/2)
        a, b = x.chunk(2, -1)  # x (B, H, T, hd)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).type_as(x)


class Learned(nn.Module):
    """One trained vector a position (GPT-2)."""

    roles = {"weight": "embedding"}

    def __init__(self, config: Config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.block_size, config.n_embd))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        return x + ops.embedding(at, self.weight)


class Sinusoidal(nn.Module):
    """Sines and cosines of wavelengths from 2 pi to 10000 * 2 pi (Vaswani et al. 2017)."""

    def __init__(self, config: Config):
        super().__init__()
        angle = angles(config.block_size, config.n_embd, 10000.0)
        table = torch.stack((angle.sin(), angle.cos()), -1).flatten(1)  # sine and cosine by turns
        self.register_buffer("table", table[:, :config.n_embd], persistent=False)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        return x + self.table[at]


# key -> (added to the embedding, applied to the heads of queries and keys)
POSITIONS = {
    "rope": (Nowhere, Rope),
    "sinusoidal": (Sinusoidal, Nowhere),
    "learned": (Learned, Nowhere),
    "none": (Nowhere, Nowhere),
}


# ---- states: all that a mixer looks back on, its position too

class Fresh:
    """The state of a forward pass that has no past: the tokens see each other, nothing is kept."""

    def positions(self, T: int, device: torch.device) -> Tensor:
        return torch.arange(T, device=device)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v


class KVCache:
    """The keys and values of one attention layer: two tensors (B, H_kv, capacity, hd), filled to `lengths[row]`."""

    def __init__(self, k: Tensor, v: Tensor, lengths: list[int]):
        self.k, self.v, self.lengths = k, v, lengths

    @property
    def ragged(self) -> bool:
        return min(self.lengths) != max(self.lengths)

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def positions(self, T: int, device: torch.device) -> Tensor:
        """The positions of the next T tokens: (T,), or (B, T) where rows have different lengths."""
        if self.ragged:
            return torch.tensor(self.lengths, device=device)[:, None] + torch.arange(T, device=device)
        return torch.arange(self.lengths[0], self.lengths[0] + T, device=device)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take in k and v (B, H_kv, T, hd) of the next T tokens; return all that is filled, (B, H_kv, S, hd) each."""
        T, at = k.shape[2], self.positions(k.shape[2], k.device)
        longest = max(self.lengths) + T
        if longest > self.k.shape[2]:
            raise ValueError(f"the state holds {self.k.shape[2]} tokens, {longest} are needed")
        if self.ragged:
            rows = torch.arange(len(k), device=k.device)[:, None]
            self.k[rows, :, at], self.v[rows, :, at] = k.transpose(1, 2), v.transpose(1, 2)
        else:
            self.k[:, :, longest - T:longest], self.v[:, :, longest - T:longest] = k, v
        self.lengths = [length + T for length in self.lengths]
        return self.k[:, :, :longest], self.v[:, :, :longest]

    def truncate(self, lengths: list[int]) -> None:
        """Forget what lies beyond `lengths`, one a row (rejected drafts, the padding of a ragged prompt)."""
        if any(new > old for new, old in zip(lengths, self.lengths, strict=True)):
            raise ValueError(f"cannot truncate {self.lengths} to {lengths}")
        self.lengths = list(lengths)

    def fork(self, rows: list[int]) -> "KVCache":
        """A new state whose row i is a copy of row rows[i] (one prompt, several samples)."""
        return KVCache(self.k[rows], self.v[rows], [self.lengths[row] for row in rows])


class State(list):
    """The states of all layers: what cached decoding carries from one call of the model to the next."""

    @property
    def lengths(self) -> list[int]:
        return self[0].lengths

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self)

    def truncate(self, lengths: list[int]) -> None:
        for layer in self:
            layer.truncate(lengths)

    def fork(self, rows: list[int]) -> "State":
        return State(layer.fork(rows) for layer in self)


# ---- mixers: forward(x, state), where tokens look at each other

class Attention(nn.Module):
    """Causal attention over all tokens before; queries in groups share keys and values (Ainslie et al. 2023)."""

    window = 0

    def __init__(self, config: Config, rotate: nn.Module):
        super().__init__()
        self.heads, self.kv_heads, self.width = config.n_head, config.kv_heads, config.head_width
        self.qkv = Linear(config.n_embd, (self.heads + 2 * self.kv_heads) * self.width, config.bias)
        self.out = Linear(self.heads * self.width, config.n_embd, config.bias, "output")
        # normalised queries and keys keep the scores from growing (Henry et al. 2020)
        norm = NORMS[config.norm] if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm, self.rotate = norm(self.width, config), norm(self.width, config), rotate

    def forward(self, x: Tensor, state: Fresh | KVCache) -> Tensor:
        B, T, _ = x.shape
        at = state.positions(T, x.device)
        qkv = self.qkv(x).view(B, T, -1, self.width).transpose(1, 2)  # (B, H + 2 H_kv, T, hd)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), 1)
        q, k = self.rotate(self.q_norm(q), at), self.rotate(self.k_norm(k), at)
        k, v = state.append(k, v)  # (B, H_kv, S, hd)
        y = ops.attention(q, k, v, self.mask(at, k.shape[2]))  # (B, H, T, hd)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))

    def mask(self, at: Tensor, S: int) -> Tensor | None:
        """True where the query at position at[..., t] sees key s: (T, S), ragged (B, 1, T, S); None: plainly causal."""
        if at.ndim == 1 and not self.window:
            return None
        far = at[..., None] - torch.arange(S, device=at.device)  # (..., T, S): how far back key s lies
        seen = (far >= 0) & (far < (self.window or S))
        return seen if at.ndim == 1 else seen[:, None]

    def state(self, batch: int, capacity: int) -> KVCache:
        like = self.qkv.weight
        k, v = (like.new_zeros(batch, self.kv_heads, capacity, self.width) for _ in "kv")
        return KVCache(k, v, [0] * batch)


class Window(Attention):
    """Attention that sees the last `window` tokens only (Beltagy et al. 2020)."""

    def __init__(self, config: Config, rotate: nn.Module):
        super().__init__(config, rotate)
        self.window = config.window


MIXERS = {"attention": Attention, "window": Window}


# ---- feed-forward layers: where each token is worked on alone

class MLP(nn.Module):
    """down(activation(up x))"""

    def __init__(self, activation: Callable[[Tensor], Tensor], config: Config, parts: int = 1):
        super().__init__()
        self.activation = activation
        self.up = Linear(config.n_embd, parts * config.inner, config.bias)
        self.down = Linear(config.inner, config.n_embd, config.bias, "output")

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class GatedMLP(MLP):
    """down(activation(gate x) * up x) (Shazeer 2020); gate and up are one matrix."""

    def __init__(self, activation: Callable[[Tensor], Tensor], config: Config):
        super().__init__(activation, config, parts=2)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(self.activation(gate) * up)


FFNS = {
    "swiglu": partial(GatedMLP, F.silu),
    "relu": partial(MLP, F.relu),
    "gelu": partial(MLP, partial(F.gelu, approximate="tanh")),  # GPT-2's form
    "relu2": partial(MLP, lambda x: F.relu(x).square()),  # So et al. 2021
}


# ---- blocks and the model

class PreNorm(nn.Module):
    """x + f(norm(x)): the residual stream runs through unchanged (Xiong et al. 2020)."""

    final_norm = True

    def __init__(self, config: Config, mixer: str, rotate: nn.Module, noise: dict, layer: int):
        super().__init__()
        self.norm1, self.norm2 = (NORMS[config.norm](config.n_embd, config) for _ in range(2))
        self.mixer, self.ffn = MIXERS[mixer](config, rotate), FFNS[config.ffn](config)
        self.drop1, self.drop2 = (Dropout(config.dropout, noise, 2 * layer + i) for i in (1, 2))

    def forward(self, x: Tensor, state: Fresh | KVCache) -> Tensor:
        x = x + self.drop1(self.mixer(self.norm1(x), state))
        return x + self.drop2(self.ffn(self.norm2(x)))


class PostNorm(PreNorm):
    """norm(x + f(x)): the original order (Vaswani et al. 2017)."""

    final_norm = False

    def forward(self, x: Tensor, state: Fresh | KVCache) -> Tensor:
        x = self.norm1(x + self.drop1(self.mixer(x, state)))
        return self.norm2(x + self.drop2(self.ffn(x)))


PLACEMENTS = {"pre": PreNorm, "post": PostNorm}


@dataclasses.dataclass(frozen=True)
class Role:
    """What a parameter is: how it starts (standard deviation from fan-in and depth, by --init) and how it is trained."""
    zero: Callable[[int, int], float]
    gpt2: Callable[[int, int], float]
    mean: float = 0.0
    decay: bool = False  # weight decay pulls it to 0
    muon: bool = False  # Muon may update it: a matrix between hidden vectors


ROLES = {
    "matrix": Role(lambda n, L: n**-0.5, lambda n, L: 0.02, decay=True, muon=True),
    "output": Role(lambda n, L: 0.0, lambda n, L: 0.02 / (2 * L) ** 0.5, decay=True, muon=True),  # writes to the stream
    "embedding": Role(lambda n, L: 0.02, lambda n, L: 0.02),
    "head": Role(lambda n, L: 0.0, lambda n, L: 0.02),
    "gain": Role(lambda n, L: 0.0, lambda n, L: 0.0, mean=1.0),
    "bias": Role(lambda n, L: 0.0, lambda n, L: 0.0),
}
INITS = ("zero", "gpt2")
AXES = {"norm": NORMS, "placement": PLACEMENTS, "position": POSITIONS, "mixer": MIXERS, "ffn": FFNS, "init": INITS}


class GPT(nn.Module):
    """The language model. GPT(config)(tokens (B, T)) -> logits (B, T, V)."""

    def __init__(self, config: Config):
        super().__init__()
        config.check()
        self.config, self.noise = config, {}
        place, rotate = (make(config) for make in POSITIONS[config.position])
        self.embedding, self.place = Embedding(config.vocab_size, config.n_embd), place
        self.drop = Dropout(config.dropout, self.noise, 0)
        block = PLACEMENTS[config.placement]
        self.blocks = nn.ModuleList(block(config, key, rotate, self.noise, i) for i, key in enumerate(config.mixers))
        self.norm = NORMS[config.norm](config.n_embd, config) if block.final_norm else nn.Identity()
        self.head = Linear(config.n_embd, config.vocab_size, role="head")
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw every parameter as its role and --init say, from torch's generator."""
        for name, role in self.roles().items():
            weight, role = self.get_parameter(name), ROLES[role]
            std = getattr(role, self.config.init)(weight.shape[-1], self.config.n_layer)
            weight.normal_(0, std).add_(role.mean) if std else weight.fill_(role.mean)

    def roles(self) -> dict[str, str]:
        """The role of each parameter by name. A parameter whose layer does not name its role is a KeyError."""
        owners = ((name, *name.rsplit(".", 1)) for name, _ in self.named_parameters())
        return {name: self.get_submodule(path).roles[own] for name, path, own in owners}

    def hidden(self, tokens: Tensor, state: State | None = None) -> Tensor:
        """Token ids (B, T) -> the last layer's normalised output (B, T, C); `state` takes in the T tokens."""
        layers = state or [Fresh()] * len(self.blocks)
        at = layers[0].positions(tokens.shape[1], tokens.device)
        x = self.drop(self.place(self.embedding(tokens), at))
        for block, layer in zip(self.blocks, layers):
            x = block(x, layer)
        return self.norm(x)

    def forward(self, tokens: Tensor, state: State | None = None) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V) of each next token. Raises ValueError beyond block_size."""
        if tokens.shape[1] > self.config.block_size:
            raise ValueError(f"{tokens.shape[1]} tokens are more than the block_size of {self.config.block_size}")
        return self.head(self.hidden(tokens, state))

    def new_state(self, batch: int, capacity: int = 0) -> State:
        """An empty state for `batch` sequences of up to `capacity` tokens (0: block_size)."""
        return State(block.mixer.state(batch, capacity or self.config.block_size) for block in self.blocks)


# ---- resource accounting

def account(config: Config, batch: int, optimizer: str = "muon") -> dict:
    """What a model costs: parameters by role, FLOPs of one sequence of block_size tokens, bytes of training in fp32.

    The model runs on the meta device, where tensors have shapes but no numbers. FLOPs are those of matrix products
    (2 a multiply-add), attention in full, not its causal half; a backward pass costs twice the forward pass.
    Activations are the tensors kept for the backward pass of `batch` sequences, one (T, V) for the loss included.
    Muon keeps one number for each entry of a hidden matrix, AdamW two for each parameter.
    """
    global ops
    kept, fast, Counting.flops = {}, ops, 0

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # views share one
        return tensor

    with torch.device("meta"):
        model, tokens = GPT(config), torch.zeros(batch, config.block_size, dtype=torch.long)
    try:
        ops = Counting
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(tokens)
    finally:
        ops = fast
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    activations = logits.nbytes + sum(storage.nbytes() for key, storage in kept.items() if key not in own)
    sizes, roles = {name: weight.numel() for name, weight in model.named_parameters()}, model.roles()
    by_role = {role: sum(n for name, n in sizes.items() if roles[name] == role) for role in ROLES}
    total = sum(sizes.values())
    moments = sum(n * (1 if optimizer == "muon" and ROLES[role].muon else 2) for role, n in by_role.items())
    memory = dict(weights=4 * total, gradients=4 * total, optimizer=4 * moments, activations=activations)
    return dict(parameters=total, roles=by_role, forward_flops=Counting.flops // batch, memory=memory,
                memory_total=sum(memory.values()), cache_per_token=model.new_state(1, 1).nbytes)


def report(config: Config, batch: int, optimizer: str = "muon") -> str:
    """The accounting as a few lines of text."""
    a, T = account(config, batch, optimizer), config.block_size
    roles = ", ".join(f"{role} {n:,}" for role, n in a["roles"].items() if n)
    memory = ", ".join(f"{name} {n / 2**20:,.1f}" for name, n in a["memory"].items())
    return "\n".join((
        f"parameters    {a['parameters']:,} ({roles})",
        f"FLOPs         {a['forward_flops']:,} forward for {T} tokens, {3 * a['forward_flops'] // T:,} a token trained",
        f"memory, MiB   {a['memory_total'] / 2**20:,.1f} at {batch} x {T} tokens ({memory})",
        f"cache         {a['cache_per_token']:,} bytes a token, {a['cache_per_token'] * T / 2**20:,.2f} MiB a sequence"))


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
    checkpoint = dict(version=CHECKPOINT_VERSION, config=dataclasses.asdict(model.config), weights=model.state_dict())
    with replacing(path) as file:
        try:
            torch.save(checkpoint | rest, file)
        except RuntimeError as error:  # torch's writer turns a full disk into this
            raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


def load_checkpoint(path: str | os.PathLike) -> dict:
    """Read a checkpoint's dict onto the CPU. Nothing in it is executed. Raises OSError or ValueError."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # truncated archives and forbidden pickles fail in many ways
        raise ValueError(f"{path} is not a checkpoint of train.py, or is truncated; it was not executed") from error
    if not isinstance(checkpoint, dict) or not {"version", "config", "weights"} <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint of train.py: it lacks version, config or weights")
    if checkpoint["version"] != CHECKPOINT_VERSION:
        raise ValueError(f"{path} has format {checkpoint['version']}, this model.py reads {CHECKPOINT_VERSION}")
    return checkpoint


def from_checkpoint(checkpoint: dict) -> GPT:
    """The model of a checkpoint's dict, with its weights. Raises ValueError where they do not fit together."""
    unknown = checkpoint["config"].keys() - {field.name for field in dataclasses.fields(Config)}
    if unknown:
        raise ValueError(f"the checkpoint's config has fields unknown here: {', '.join(sorted(unknown))}")
    model = GPT(Config(**checkpoint["config"]))
    try:
        model.load_state_dict(checkpoint["weights"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"the checkpoint's weights do not fit its config: {reason}") from error
    return model


def options(kind: type, words: list[str]):
    """Fill the dataclass `kind` from --key=value words; a field's trailing comment is its help. A bad word exits 2."""
    source = io.StringIO("".join(map(inspect.getsource, kind.__mro__[-2::-1])))
    notes = {t.line.split(":")[0].strip(): t.string[1:].strip() for t in tokenize.generate_tokens(source.readline)
             if t.type == tokenize.COMMENT}
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__, usage="%(prog)s [--key=value ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
    parser.add_argument("--help", action="help", help=argparse.SUPPRESS)
    parser.epilog = "options:"
    parser.error = lambda message: sys.exit(print(f"{parser.prog}: {message}", file=sys.stderr) or 2)
    for name, of, default in [(field.name, field.type, field.default) for field in dataclasses.fields(kind)]:
        def read(text, of=of):
            value = ("false", "true").index(text.lower()) if of is bool else float(text) if of is int else of(text)
            return of(value) if of is str or abs(value) < float("inf") and of(value) == value else float("none")
        read.__name__ = of.__name__  # argparse names it where the text is not of this type
        parser.add_argument(f"--{name}", type=read, default=default, nargs="?", const=of is bool or "",
                            help=argparse.SUPPRESS)
        parser.epilog += f"\n  --{name}={default} ".ljust(31) + ("\n" + " " * 30).join(textwrap.wrap(notes[name], 49))
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
    config = Config(**{field.name: getattr(o, field.name) for field in dataclasses.fields(Config)})
    print(report(config, o.batch_size))


if __name__ == "__main__":
    run(main)
