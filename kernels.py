"""Triton kernels beside their plain twins: the least data moved, and how near.

Reads: nothing.
Writes: tables to stdout; --plot: a picture.
Usage: python kernels.py
       python kernels.py --only=rmsnorm,flash
       python kernels.py --roofline --shape=8,1024,768,12
       python kernels.py --compile_report

A naive operation reads and writes memory once a step, a fused one once. NAME
launches the kernel, NAME_kernel is its Triton code, NAME_backward gives the
gradients, NAME_twin is plain torch of the same signature: kernels.use("NAME")
gives the kernel where it runs, else the twin.

Why the benchmark does what it does: the first calls compile and warm up, so
they do not count; a GPU works on after a call returns, so events on the device
tell the time; what lies in the cache is not read from memory, so the cache is
flushed before each call, by a read: what was written would have to leave it
while the call runs; clocks and neighbours drift, so the rivals take turns,
and medians are compared.
References: Dao 2023 (FlashAttention-2); Milakov and Gimelshein 2018 (online
softmax); Williams et al. 2009 (roofline).
"""

import argparse
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import itertools
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

if __name__ == "__main__":  # Triton reads this when it is imported; an interpreted kernel cannot be compiled
    if {"--compile_report", "--compile_report=true"} & {word.lower() for word in sys.argv}:
        os.environ.pop("TRITON_INTERPRET", None)
    elif "--device=cpu" in sys.argv or not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
try:
    import triton
    import triton.language as tl
except ImportError:  # then the twins do all the work
    triton, tl = None, SimpleNamespace(constexpr=None)

jit = triton.jit if triton else lambda function: function
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclasses.dataclass
class Options:
    only: str = ""  # kernels, comma list (empty: all of them)
    roofline: bool = False  # place kernels and a model's layers under the measured roof
    shape: str = "8,1024,768,12"  # of the roofline's model: batch, length, width, heads
    plot: str = ""  # picture of the roofline to write
    compile_report: bool = False  # compile all kernels for three generations of cards; needs no GPU
    device: str = ""  # cpu, cuda (empty: the best there is)
    dtype: str = ""  # bfloat16, float16, float32 (empty: bfloat16 on cuda, else float32)
    seconds: float = 0.5  # time to spend on each row of the table
    seed: int = 1  # of the numbers that kernels are tried on


def require(holds: object, reason: str) -> None:
    """Raise ValueError(reason) unless `holds`."""
    if not holds:
        raise ValueError(reason)


# ---- element by element: one read, one write; the function is a parameter of the kernel
# A program takes a block of numbers that lie side by side: its threads then fetch whole lines of memory, not single
# words. The function works on registers, and its cost is hidden behind the loads: a GPU of today can do some hundred
# operations on a number in the time that it takes to read it. So what counts is how often memory is gone through,
# once here, and once for each operation of the twin.


@jit
def plus(a, b):
    """a + b, of registers"""
    return a + b


@jit
def gelu_of(x, _):
    """x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), which is GELU's form with tanh: sigmoid(2 u) = (1
    + tanh u) / 2.
    """
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 2 sqrt(2 / pi)


@jit
def gelu_slope(dy, x, _):
    """dx = dy (s + x s (1 - s) u'), with s and u as above: the derivative by the product and the chain rule."""
    s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    dx = s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    return dy * dx, dy


@jit
def swiglu_of(gate, up):
    """silu(gate) up, where silu(g) = g sigmoid(g)."""
    return gate * tl.sigmoid(gate) * up


@jit
def swiglu_slope(dy, gate, up):
    """dgate = dy up s (1 + gate (1 - s)), dup = dy silu(gate), with s = sigmoid(gate)."""
    s = tl.sigmoid(gate)
    return dy * up * s * (1 + gate * (1 - s)), dy * gate * s


@jit
def read(at, here, other):
    """What lies at the pointers where the mask says so, else `other`: kernels work in float32 on any type."""
    return tl.load(at, here, other).to(tl.float32)


@jit
def map_kernel(y, a, b, da, db, n, stride, f: tl.constexpr, BLOCK: tl.constexpr):
    """y = f(a, b), or f(a, a) without b, in rows of n numbers; where da is given, its slopes: da, db = f(y, a, b).

    Rows lie n apart in y, and `stride` apart in a and b, which may be halves of wider rows, and in da and db. A program
    takes BLOCK numbers of one row. Offsets of rows have 64 bits, for a tensor may hold more than 2^31 numbers.
    """
    row = tl.program_id(0) // tl.cdiv(n, BLOCK)
    at = tl.program_id(0) % tl.cdiv(n, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    far = row.to(tl.int64) * stride + at
    y += row.to(tl.int64) * n + at
    u = read(a + far, at < n, 0.0)
    v = u if b is None else read(b + far, at < n, 0.0)
    if da is None:
        tl.store(y, f(u, v), at < n)
    else:
        du, dv = f(read(y, at < n, 0.0), u, v)
        tl.store(da + far, du, at < n)
        if db is not None:
            tl.store(db + far, dv, at < n)


def launch_map(f: Any, y: Tensor, a: Tensor, b: Tensor | None = None, *slopes: Tensor | None) -> Tensor:
    """y = f(a, b), or of y, which is dy then, the slopes da and db; all of one shape. Returns y.

    Contiguous tensors are one long row. Else the rows of a and its like (their last dimension) may
    lie apart, as the two halves of wider rows do, and y's lie side by side.
    """
    if y.numel():
        one = a.is_contiguous()
        n, stride = (a.numel(), a.numel()) if one else (a.shape[-1], a.stride(-2))
        da, db = slopes or (None, None)
        grid = (y.numel() // n * triton.cdiv(n, MAP["BLOCK"]),)
        map_kernel[grid](y, a, b, da, db, n, stride, f, **MAP)
    return y


def add(x: Tensor, z: Tensor) -> Tensor:
    """x + z, both of one shape and type: 3 numbers move for one operation, so no kernel is further
    from the compute limit.
    """
    require(
        x.shape == z.shape and x.dtype == z.dtype,
        f"add: {list(x.shape)} and {list(z.shape)} differ in shape or type",
    )
    return launch_map(plus, torch.empty_like(x), x, z)


def add_twin(x: Tensor, z: Tensor) -> Tensor:
    """x + z"""
    return x + z


def gelu(x: Tensor) -> Tensor:
    """GELU(x) in one pass: x is read once, y written once, where the plain form makes eight passes."""
    return launch_map(gelu_of, torch.empty_like(x), x)


def gelu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """dx from dy and x; what lies between is computed again, which is cheaper than to store and read it."""
    dx, dy = torch.empty_like(x), dy.contiguous()
    launch_map(gelu_slope, dy, x, None, dx, None)
    return dx


def gelu_twin(x: Tensor) -> Tensor:
    """x Phi(x), about (Hendrycks and Gimpel 2016, the form with tanh)."""
    return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


def swiglu(x: Tensor) -> Tensor:
    """x (..., 2 F) -> (..., F): both halves are read where they lie, no copy is made of them."""
    require(x.shape[-1] % 2 == 0, f"swiglu: {x.shape[-1]} channels have no two halves")
    gate, up = x.chunk(2, -1)
    return launch_map(swiglu_of, gate.new_empty(gate.shape), gate, up)


def swiglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """dx (..., 2 F) from dy (..., F) and x: both halves are written in place, so no concatenation follows."""
    dx = torch.empty_like(x)
    dy, gate, up = dy.contiguous(), *x.chunk(2, -1)
    launch_map(swiglu_slope, dy, gate, up, *dx.chunk(2, -1))
    return dx


def swiglu_twin(x: Tensor) -> Tensor:
    """x (..., 2 F) = gate and up -> silu(gate) * up (..., F) (Shazeer 2020)."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


# ---- row by row: a program holds some whole rows in registers, so that each number is read once
# A sum over a row needs all of the row before anything can be written. The plain forms read the row again for what
# follows the sum; here it has never left the registers. Sums are in float32, whatever the type of the input.


def tile(n: int) -> dict:
    """What a program holds of rows of n numbers, and how many warps work on it.

    ROWS short rows make one program, so that it has enough to do; a long row is a program of its
    own. BLOCK is a power of two, as Triton wants; what lies beyond n is masked.
    """
    block = triton.next_power_of_2(max(n, 1))
    rows = max(TILE // block, 1)
    return dict(ROWS=rows, BLOCK=block, num_warps=min(max(rows * block // WARP, 4), 32))


def launch_rows(kernel: Any, most: int, y: Tensor, *tensors: Tensor | None, rest: tuple = ()) -> Tensor:
    """Start a kernel for the rows (last dimensions) of the first tensor, in blocks of at most
    `most`; returns this one.
    """
    if y.numel():
        n = y.shape[-1]
        rows = y.numel() // n
        sizes = tile(min(n, most))
        grid = (triton.cdiv(rows, sizes["ROWS"]),)
        kernel[grid](y, *tensors, rows, n, *rest, **sizes)
    return y


@jit
def own_rows(ROWS: tl.constexpr):
    """The rows of this program, (ROWS, 1); their offsets have 64 bits"""
    return (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]


@jit
def softmax_kernel(y, x, R, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y = exp(x - max) / sum exp(x - max) of ROWS rows of n numbers.

    Where a row fits into BLOCK, each number is read once and written once. A longer row is read twice: the first time
    online, with a sum that is rescaled whenever a larger number turns up; the second read mostly finds the cache.
    """
    row = own_rows(ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    x += row * n
    y += row * n
    if BLOCK >= n:
        here = (row < R) & (col < n)
        v = read(x + col, here, -float("inf"))
        v = tl.where(row < R, v, 0.0)  # beyond the last row -inf - -inf is no number
        v = tl.exp(v - tl.max(v, 1)[:, None])
        tl.store(y + col, v / tl.sum(v, 1)[:, None], here)
    else:
        top = tl.full([ROWS, 1], -float("inf"), tl.float32)
        total = tl.zeros([ROWS, 1], tl.float32)
        for at in range(0, n, BLOCK):
            v = read(x + at + col, (row < R) & (at + col < n), -float("inf"))
            new = tl.maximum(top, tl.max(v, 1)[:, None])
            base = tl.where(new == -float("inf"), 0.0, new)  # -inf - -inf is no number
            total = total * tl.exp(top - base) + tl.sum(tl.exp(v - base), 1)[:, None]
            top = new
        for at in range(0, n, BLOCK):
            here = (row < R) & (at + col < n)
            v = read(x + at + col, here, 0.0)
            tl.store(y + at + col, tl.exp(v - top) / total, here)


@jit
def softmax_slope_kernel(dx, dy, y, R, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """dx = y (dy - sum of dy y over the row); the input itself is not needed, so it need not be kept."""
    row = own_rows(ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    dx += row * n
    dy += row * n
    y += row * n
    if BLOCK >= n:
        here = (row < R) & (col < n)
        p = read(y + col, here, 0.0)
        g = read(dy + col, here, 0.0)
        tl.store(dx + col, p * (g - tl.sum(p * g, 1)[:, None]), here)
    else:
        total = tl.zeros([ROWS, 1], tl.float32)
        for at in range(0, n, BLOCK):
            here = (row < R) & (at + col < n)
            both = read(y + at + col, here, 0.0) * read(dy + at + col, here, 0.0)
            total += tl.sum(both, 1)[:, None]
        for at in range(0, n, BLOCK):
            here = (row < R) & (at + col < n)
            p = read(y + at + col, here, 0.0)
            tl.store(dx + at + col, p * (read(dy + at + col, here, 0.0) - total), here)


def softmax(x: Tensor) -> Tensor:
    """softmax over the last dimension, of rows of any length."""
    return launch_rows(softmax_kernel, WHOLE, torch.empty_like(x), x)


def softmax_backward(dy: Tensor, y: Tensor) -> Tensor:
    """dx from dy and the result y."""
    return launch_rows(softmax_slope_kernel, WHOLE, torch.empty_like(y), dy.contiguous(), y)


def softmax_twin(x: Tensor) -> Tensor:
    """exp(x) / sum exp(x) over the last dimension; the largest is taken off first, so that nothing overflows."""
    e = (x - x.amax(-1, keepdim=True)).exp() if x.shape[-1] else x
    return e / e.sum(-1, keepdim=True)


@jit
def rmsnorm_kernel(
    y, total, x, residual, weight, R, n, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """total = x + residual, y = total / sqrt(mean(total^2) + eps) * weight, in one pass over ROWS rows.

    The norm is that of the total as it is stored, in the type of x: so the backward pass can start from it.
    """
    row = own_rows(ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    at = row * n + col
    here = (row < R) & (col < n)
    v = read(x + at, here, 0.0)
    if residual is not None:
        v += read(residual + at, here, 0.0)
        v = v.to(total.dtype.element_ty)
        tl.store(total + at, v, here)
        v = v.to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, 1) / n + eps)[:, None]
    tl.store(y + at, v * scale * read(weight + col, col < n, 0.0), here)


@jit
def rmsnorm_slope_kernel(
    dx,
    parts,
    dy,
    dtotal,
    v,
    weight,
    R,
    n,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx = s (w dy - v s^2 mean(w dy v)) + dtotal, with s = 1 / sqrt(mean(v^2) + eps), which is computed again.

    The gain's gradient is a sum over all rows, dw = sum of dy v s. It is taken in two stages: each program walks over
    rows that lie a whole grid apart, and writes the sum of its own into a row of `parts`; these few rows come after.
    The next rows are on their way while it works on some: so few programs would else wait for memory.
    """
    col = tl.arange(0, BLOCK)[None, :]
    w = read(weight + col, col < n, 0.0)
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    step = tl.num_programs(0) * ROWS
    for start in tl.range(tl.program_id(0) * ROWS, R, step, num_stages=STAGES):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        at = row * n + col
        here = (row < R) & (col < n)
        u = read(v + at, here, 0.0)
        g = read(dy + at, here, 0.0)
        scale = tl.rsqrt(tl.sum(u * u, 1) / n + eps)[:, None]
        mean = tl.sum(w * g * u, 1)[:, None] / n
        du = scale * (w * g - u * scale * scale * mean)
        if dtotal is not None:
            du += read(dtotal + at, here, 0.0)
        tl.store(dx + at, du, here)
        dw += g * u * scale
    tl.store(parts + tl.program_id(0) * n + col, tl.sum(dw, 0)[None, :], col < n)


def rmsnorm(
    x: Tensor, weight: Tensor, residual: Optional[Tensor] = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(y, total) of rmsnorm_twin in one pass: x and residual are read once, total and y written once.

    A row must fit into a program: at most 65536 channels.
    """
    n = x.shape[-1]
    require(
        weight.shape == (n,), f"rmsnorm: a weight of shape {list(weight.shape)} for {n} channels"
    )
    require(
        residual is None or residual.shape == x.shape and residual.dtype == x.dtype,
        "rmsnorm: the residual has not the shape and type of x",
    )
    require(n <= 65536, f"rmsnorm: a row of {n} channels, at most 65536 fit into a program")
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    tensors = torch.empty_like(x), total, x, residual, weight
    return launch_rows(rmsnorm_kernel, n, *tensors, rest=(eps,)), total


def rmsnorm_backward(
    dy: Tensor,
    dtotal: Optional[Tensor],
    x: Optional[Tensor],
    weight: Tensor,
    total: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(dx, dw); the residual's gradient is dx too, for x and residual only meet in their sum.

    x is None where there was a residual: their sum, the total, is what was kept.
    """
    v, n = total if x is None else x, dy.shape[-1]
    dx, parts = torch.empty_like(v), weight.new_zeros(0, n)
    if v.numel():
        rows, sizes = v.numel() // n, tile(n)
        programs = min(triton.cdiv(rows, sizes["ROWS"]), PROGRAMS)
        parts = weight.new_empty(programs, n, dtype=torch.float32)
        dtotal = None if x is not None or dtotal is None else dtotal.contiguous()
        fetched = 2 * 3 * sizes["ROWS"] * sizes["BLOCK"] * v.element_size()  # bytes, of rows to come
        rmsnorm_slope_kernel[programs,](
            dx,
            parts,
            dy.contiguous(),
            dtotal,
            v,
            weight,
            rows,
            n,
            eps,
            STAGES=3 if fetched <= 512 * room(v.device) else 1,  # two programs share the memory
            **sizes,
        )
    return dx, parts.sum(0).to(weight.dtype)  # the second stage


def rmsnorm_twin(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, eps: float = 1e-6
) -> tuple:
    """total = x + residual; y = total / sqrt(mean(total^2) + eps) * weight (Zhang and Sennrich 2019).

    x and residual (..., C), weight (C) -> y, total; without a residual the total is empty.
    """
    total = x if residual is None else x + residual
    exact = total.double() if total.dtype == torch.float64 else total.float()
    y = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps) * weight
    return y.to(x.dtype), x.new_empty(0) if residual is None else total


@jit
def rope_kernel(y, x, cos, sin, N, H, half, stride, sign, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """The H heads of one token, 2 * half channels each: (a, b) -> (a cos - b sin, b cos + a sin).

    Tokens lie `stride` apart in x, which may be a slice of queries, keys and values, and side by side in y. The token's
    angles are row r mod N of the tables, so that all texts of a batch can share them. sign = -1 turns back.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    c = read(cos + row % N * half + col, col < half, 0.0)
    s = read(sin + row % N * half + col, col < half, 0.0) * sign
    here = (head < H) & (col < half)
    at = head * 2 * half + col
    a = read(x + row * stride + at, here, 0.0)
    b = read(x + row * stride + at + half, here, 0.0)
    y += row * H * 2 * half + at
    tl.store(y, a * c - b * s, here)
    tl.store(y + half, b * c + a * s, here)


def turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """rope_kernel for each token; sign -1 turns back. Slices of queries, keys and values are read
    where they lie.
    """
    B, T, H, width = x.shape
    require(
        cos.shape == sin.shape == (len(cos), width // 2)
        and len(cos) in (T, B * T)
        and width % 2 == 0,
        f"rope: cos and sin of shape {list(cos.shape)} for x of {list(x.shape)}",
    )
    if x.stride()[2:] != (width, 1) or x.stride(0) != T * x.stride(1):
        x = x.contiguous()
    y = x.new_empty(x.shape)
    if x.numel():
        heads, half = triton.next_power_of_2(H), triton.next_power_of_2(width // 2)
        warps = min(max(heads * half // 512, 1), 16)
        rope_kernel[B * T,](
            y,
            x,
            cos.contiguous(),
            sin.contiguous(),
            cos.shape[0],
            H,
            width // 2,
            x.stride(1),
            sign,
            heads,
            half,
            num_warps=warps,
        )
    return y


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of channels of x (B, T, H, hd), see rope_twin."""
    return turn(x, cos, sin, 1.0)


def rope_backward(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A turn has the opposite turn as its transpose: dx is dy, turned back."""
    return turn(dy, cos, sin, -1.0)  # back by the same angle


def rope_twin(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channels (i, i + hd/2) of x (B, T, H, hd) by angles, cos and sin (T or B T, hd/2) (Su et al. 2021)."""
    cos, sin = (part.view(-1, x.shape[1], 1, part.shape[1]) for part in (cos, sin))
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


# ---- the output layer with cross-entropy: the logits of some rows at a time, which become their own gradients


@jit
def cross_entropy_kernel(losses, logits, targets, n, BLOCK: tl.constexpr):
    """The loss log sum exp(logits) - logits[target] of a row; then its logits become softmax(logits) - onehot(target).

    Rows with a target below 0 count for nothing: loss and gradient are 0. A target beyond the row gives NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    logits += row * n
    # this one is read before any logit is overwritten
    own = read(logits + target, (target >= 0) & (target < n), float("nan"))
    top = tl.full([], -float("inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    for start in range(0, n, BLOCK):
        col = start + tl.arange(0, BLOCK)
        v = read(logits + col, col < n, -float("inf"))
        new = tl.maximum(top, tl.max(v, 0))
        base = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(v - base), 0)
        top = new
    tl.store(losses + row, tl.where(target >= 0, top + tl.log(total) - own, 0.0))
    counts = (target >= 0).to(tl.float32)
    for start in range(0, n, BLOCK):
        col = start + tl.arange(0, BLOCK)
        v = read(logits + col, col < n, 0.0)
        tl.store(logits + col, (tl.exp(v - top) / total - (col == target)) * counts, col < n)


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dw) of the output layer and its cross-entropy; the whole logits (R, V) never stand in memory.

    For some rows at a time: their logits, one matrix product; the kernel, which gives the losses
    and turns the logits into their own gradients; and two products more, of the gradients with W
    and with x. All that is left of the rows is dx and their share of dw, which is summed in
    float32. The backward pass only scales both (after Liger, Hsu et al. 2024).
    """
    (R, C), V = x.shape, weight.shape[0]
    require(
        weight.shape == (V, C) and targets.shape == (R,) and x.dtype == weight.dtype,
        f"cross_entropy: x {list(x.shape)}, weight {list(weight.shape)} and targets {list(targets.shape)} do not fit",
    )
    losses = x.new_zeros(R, dtype=torch.float32)
    dx, dw = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
    rows = max(LOGITS // V, 1)
    logits = x.new_empty(min(rows, R), V)
    for start in range(0, R, rows):
        part = slice(start, start + rows)
        some = logits[: len(x[part])]
        torch.mm(x[part], weight.mT, out=some)
        cross_entropy_kernel[len(some),](losses[part], some, targets[part], V, **CROSS_ENTROPY)
        torch.mm(some, weight, out=dx[part])
        add_product(dw, some.mT, x[part])
    logits = some = None  # their memory is free before dw is rounded into another tensor
    return losses.sum(dtype=torch.float64).float(), dx, dw.to(weight.dtype)


@functools.cache
def adds_halves(kind: torch.dtype, device: torch.device) -> bool:
    """Whether torch adds a product of this type to a sum in float32: found by one try, for older
    versions know no out_dtype.
    """
    one = torch.ones(16, 16, dtype=kind, device=device)
    total = one.float()
    try:
        torch.addmm(total, one, one, out_dtype=torch.float32, out=total)
    except (TypeError, RuntimeError):
        return False
    return True


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b in float32. Where torch cannot for halves, their product is rounded before it is added."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif adds_halves(a.dtype, a.device):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


def cross_entropy_backward(dloss: Tensor, dx: Tensor, dw: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the loss times those found on the way forward."""
    return dx * dloss.to(dx.dtype), dw * dloss.to(dw.dtype)


def cross_entropy_twin(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log softmax(x W^T)[target] over the rows of x (R, C), weight (V, C); targets below 0 do not count."""
    logits = F.linear(x, weight)
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(exact, targets.clamp(min=-1), ignore_index=-1, reduction="sum")


# ---- AdamW: one launch for all tensors of a model
# The addresses of the tensors come as numbers, in a table on the device.


@jit
def tensor_at(row, column: tl.constexpr, kind: tl.constexpr):
    """The tensor of this type whose address, a multiple of 16, stands in this column of a row of the table"""
    return tl.multiple_of(tl.load(row + column).to(tl.pointer_type(kind)), 16)


@jit
def adamw_kernel(
    table,
    owner,
    starts,
    rate,
    keep,
    new1,
    new2,
    eps,
    fix1,
    fix2,
    kind: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of one tensor: AdamW's step, see adamw_twin; keep = 1 - rate decay, new = 1 - beta,
    fix = 1 - beta^step.

    table (tensors, 5) has the addresses of weight, gradient, m and v, and the length; owner and
    starts say for each program which tensor it works on and where it starts.
    """
    row = table + tl.load(owner + tl.program_id(0)) * 5
    at = tl.multiple_of(tl.load(starts + tl.program_id(0)), BLOCK) + tl.arange(0, BLOCK)
    here = at < tl.load(row + 4)
    weight, grad = tensor_at(row, 0, kind) + at, tensor_at(row, 1, kind) + at
    first, second = tensor_at(row, 2, tl.float32) + at, tensor_at(row, 3, tl.float32) + at
    g, m, v = tl.load(grad, here).to(tl.float32), tl.load(first, here), tl.load(second, here)
    m += (g - m) * new1
    v += (g * g - v) * new2
    move = (m / fix1) / (tl.sqrt_rn(v / fix2) + eps)
    tl.store(weight, tl.load(weight, here).to(tl.float32) * keep - rate * move, here)
    tl.store(first, m, here)
    tl.store(second, v, here)


@functools.lru_cache(8)
def blocks(lengths: tuple, device: torch.device, block: int) -> tuple[Tensor, Tensor]:
    """For each program of adamw_kernel its tensor and where in it to start, of tensors of these lengths"""
    counts = torch.tensor([-(-length // block) for length in lengths])
    owner = torch.arange(len(lengths)).repeat_interleave(counts)
    starts = torch.cat([torch.arange(count) * block for count in counts])
    return owner.to(device), starts.to(device)


def adamw(
    params: List[Tensor],
    grads: List[Tensor],
    first: List[Tensor],
    second: List[Tensor],
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    step: int,
) -> None:
    """One launch for all tensors of a type, all in place: parameters, and first and second moments in float32.

    A model has hundreds of tensors, most of them small: launched one by one they would take as long
    to launch as to update. 7 numbers move for each parameter: 4 are read, 3 written.
    """
    sets = [*zip(params, grads, first, second, strict=True)]
    for tensors in sets:
        (w, g, m, v), shapes = tensors, {t.shape for t in tensors}
        kinds = w.dtype == g.dtype and m.dtype == v.dtype == torch.float32
        lie = all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors)
        require(
            len(shapes) == 1 and kinds and lie,
            "adamw: wanted tensors of one shape, contiguous, at addresses that are multiples of 16; "
            "gradients of the type of their parameters, moments in float32",
        )
    for name, kind in HALF.items():  # Triton's types have the same names
        group = [tensors for tensors in sets if tensors[0].dtype == kind and tensors[0].numel()]
        if group:
            rows = [[*(t.data_ptr() for t in tensors), tensors[0].numel()] for tensors in group]
            device = group[0][0].device
            owner, starts = blocks(tuple(row[4] for row in rows), device, ADAMW["BLOCK"])
            table = torch.tensor(rows).to(device, non_blocking=True)  # gradients may lie elsewhere each time
            # what is close to 1 or 0 is worked out here in double precision
            adamw_kernel[len(owner),](
                table,
                owner,
                starts,
                rate,
                1 - rate * decay,
                1 - beta1,
                1 - beta2,
                eps,
                1 - beta1**step,
                1 - beta2**step,
                getattr(tl, name),
                **ADAMW,
            )


def adamw_twin(
    params: List[Tensor],
    grads: List[Tensor],
    first: List[Tensor],
    second: List[Tensor],
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    step: int,
) -> None:
    """m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, w = w - rate (decay w + M / (sqrt(V) + eps)), in place.

    M = m / (1 - b1^step) and V = v / (1 - b2^step), step from 1; m and v are float32 (Loshchilov and Hutter 2019).
    """
    for w, g, m, v in zip(params, grads, first, second):
        g = g.to(m.dtype)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).add_(g * g, alpha=1 - beta2)
        move = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
        w.copy_(w.to(m.dtype) * (1 - rate * decay) - rate * move)


# ---- matrix products: tiles of the result, each a loop over tiles of the factors, on tensor cores
# A number of a product is a row times a column. Computed one by one, each row would be read once for every column. A
# tile of M x N results reads M rows and N columns for M N results: the larger the tile, the fewer bytes for an
# operation, until the registers are full. Loads of the next tiles are in flight while one is multiplied (stages).

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1") if triton else None


@jit
def dot(a, b, start):
    """start + a b in float32.

    In single precision the sum of a tile is taken apart and then added: the error grows with the terms of a sum.
    """
    if INTERPRETED:  # which would multiply the bits of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    if a.dtype == tl.float32:
        # a plain sum would be folded into the product
        start = tl.fma(tl.dot(a, b, input_precision="ieee"), 1.0, start)
    else:
        start = tl.dot(a, b, start)
    return start


@jit
def unchanged(x, _):
    """No activation"""
    return x


@jit
def matmul_kernel(
    y,
    x,
    w,
    bias,
    scale,
    M,
    N,
    K,
    xm,
    xk,
    wn,
    wk,
    f: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y (M, N) = f(x w^T * scale + bias): x (M, K) and w (N, K) of any strides, bias and scale (N) or None.

    A program makes a tile (BM, BN) of y from BM rows of x and BN rows of w, BK columns at a time.
    Programs that run at the same time should share what they read: eight rows of tiles are gone
    through together, column by column, so that their rows of x and each tile of w are found in the
    cache.
    """
    group = 8 * tl.cdiv(N, BN)  # eight rows of tiles at a time, which share tiles of w in the cache
    top = tl.program_id(0) // group * 8
    high = tl.minimum(tl.cdiv(M, BM) - top, 8)
    m = ((top + tl.program_id(0) % group % high) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    n = (tl.program_id(0) % group // high * BN + tl.arange(0, BN)).to(tl.int64)[None, :]
    k = tl.arange(0, BK)
    left = x + m * xm + k[None, :] * xk  # (BM, BK)
    right = w + n * wn + k[:, None] * wk  # (BK, BN)
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        a = tl.load(left, (m < M) & (k[None, :] < K - start), 0.0)
        b = tl.load(right, (n < N) & (k[:, None] < K - start), 0.0)
        total = dot(a, b.to(a.dtype), total)
        left += BK * xk
        right += BK * wk
    if scale is not None:
        total *= tl.load(scale + n, n < N).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + n, n < N).to(tl.float32)
    tl.store(y + m * N + n, f(total, total), (m < M) & (n < N))


def product(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    f: Any = unchanged,
) -> Tensor:
    """f(x w^T * scale + bias) of x (..., K), w (N, K) -> (..., N)"""
    M, (N, K) = math.prod(x.shape[:-1]), w.shape
    rows = x.reshape(M, K)
    y = x.new_empty(*x.shape[:-1], N)
    sizes = TILES["few" if M <= 16 else "many", x.element_size()]
    if y.numel():
        grid = (triton.cdiv(M, sizes["BM"]) * triton.cdiv(N, sizes["BN"]),)
        matmul_kernel[grid](
            y, rows, w, bias, scale, M, N, K, *rows.stride(), *w.stride(), f, **sizes
        )
    return y


def matmul(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none") -> Tensor:
    """activation(x W^T + b), with bias and activation applied before a tile of the result leaves the registers."""
    require(
        activation in ACTIVATIONS,
        f"matmul: no activation {activation!r}: there are {', '.join(ACTIVATIONS)}",
    )
    fit = weight.shape == (len(bias), x.shape[-1]) and bias.dim() == 1
    require(
        fit,
        f"matmul: x {list(x.shape)}, weight {list(weight.shape)} and bias {list(bias.shape)} do not fit",
    )
    require(
        x.dtype == weight.dtype, f"matmul: x and weight differ in type, {x.dtype} and {weight.dtype}"
    )
    return product(x, weight, bias, None, ACTIVATIONS[activation][0])


def matmul_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dw, db): dz = dy activation'(z), with z computed again; dx = dz W, dw = dz^T x, db = sum of dz.

    The kernel takes any strides, so that no factor is transposed in memory.
    """
    rows = x.reshape(-1, x.shape[-1])
    dz = dy.reshape(-1, dy.shape[-1]).contiguous()
    if activation == "gelu":  # its input is computed again rather than kept
        dz = gelu_backward(dz, product(rows, weight, bias))
    dx = product(dz, weight.mT).view(x.shape)
    return dx, product(dz.mT, rows.mT), dz.float().sum(0).to(bias.dtype)


def matmul_twin(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none") -> Tensor:
    """activation(x W^T + b): x (..., K), weight (N, K), bias (N) -> (..., N); activation: none, gelu"""
    return ACTIVATIONS[activation][1](x @ weight.mT + bias)


def int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x (W scale)^T: W is read as bytes, and scaled behind the sum. Decoding reads all weights for
    one token, so half the bytes of bfloat16 are half the time.
    """
    fit = weight.shape == (len(scale), x.shape[-1]) and weight.dtype == torch.int8
    require(
        fit,
        f"int8: x {list(x.shape)}, weight {list(weight.shape)} {weight.dtype}: wanted int8, a scale for each row",
    )
    return product(x, weight, None, scale)


def int8_twin(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x (W scale)^T for decoding: x (..., K) few rows, weight (N, K) int8, a scale for each of its rows (N)"""
    return x @ (weight.to(scale.dtype) * scale[:, None]).to(x.dtype).mT


# ---- FlashAttention-2 (Dao 2023): the scores of a tile at a time, which never reach memory
# q (B, H, T, hd); k, v (B, H_kv, S, hd), H a multiple of H_kv: query head h reads key head h // (H / H_kv).
# Query t sees the keys first[b, t] .. t + S - T (causal) or .. S - 1. `first` (B, T) int32, non-decreasing, says all
# there is to say about windows (t - w + 1, at least 0), packed documents (where t's document starts) and both (the
# larger of the two): tiles of keys before it are not even read.


def may_see(rows: Tensor, keys: Tensor, shift: int, causal: bool, first: Tensor | None) -> Tensor:
    """Which of the queries rows (M) see which keys (N): bool (B or 1, 1, 1, M, N)"""
    seen = (keys <= rows[:, None] + shift)[None] if causal else (keys >= 0).expand(1, len(rows), -1)
    if first is not None:
        seen = seen & (keys >= first[:, rows, None])
    return seen[:, None, None]


def by_group(heads: int, *tensors: Tensor) -> list[Tensor]:
    """In the type of the sums, the heads of a group on an axis: (B, H, ...) -> (B, heads, H / heads, ...)"""
    kind = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return [x.to(kind).unflatten(1, (heads, x.shape[1] // heads)) for x in tensors]


def tile_scores(
    q: Tensor, k: Tensor, rows: slice, keys: slice, causal: bool, first: Tensor | None
) -> Tensor:
    """Scaled scores of the slice `rows` of q and the slice `keys` of k: (..., M, N).

    Those of keys that a query does not see are -inf: their weights will be exp(-inf) = 0.
    """
    T, S = q.shape[3], k.shape[3]
    scores = q[..., rows, :] @ k[..., keys, :].mT / q.shape[-1] ** 0.5
    places = torch.arange(T, device=q.device)[rows], torch.arange(S, device=q.device)[keys]
    return scores.masked_fill(~may_see(*places, S - T, causal, first), -math.inf)


def flash_twin(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = True, first: Tensor | None = None
) -> tuple:
    """Attention with the whole matrix of scores -> out (B, H, T, hd), and their log-sum-exp (B, H, T) in float32.

    A query that sees no key gives 0 and -inf.
    """
    qs, ks, vs = by_group(k.shape[1], q, k, v)
    scores = tile_scores(qs, ks, slice(None), slice(None), causal, first)  # (B, H_kv, group, T, S)
    lse = scores.logsumexp(-1)
    chances = (scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    out = torch.empty_like(lying(q))  # lies in memory as q does: heads before or behind tokens
    out.copy_((chances @ vs).flatten(1, 2))
    return out, lse.flatten(1, 2)


def flash_tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    first: Optional[Tensor] = None,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """flash_twin by the loops of the kernel, to be read: memory is linear in T and S.

    Each tile of queries walks over the tiles of keys and keeps, for each query, the largest score so far, the sum of
    exp(score - largest), and the same sum of values; where a larger score turns up, both sums shrink.
    """
    T, S = q.shape[2], k.shape[2]
    qs, ks, vs = by_group(k.shape[1], q, k, v)
    out, lse = torch.zeros_like(qs), torch.zeros_like(qs[..., 0])
    for m in range(0, T, block):
        rows = slice(m, m + block)
        sums = torch.zeros_like(qs[..., rows, :])
        peak, total = torch.full_like(sums[..., 0], -math.inf), torch.zeros_like(sums[..., 0])
        begin = 0 if first is None else min(first[:, m].tolist(), default=0)
        end = min(S, m + block + S - T) if causal else S
        for n in range(begin, end, block):
            scores = tile_scores(qs, ks, rows, slice(n, n + block), causal, first)
            higher = torch.maximum(peak, scores.amax(-1))
            # nothing seen yet: exp(-inf - 0) is 0, and no NaN
            base = higher.masked_fill(higher == -math.inf, 0)
            weights, shrink = (scores - base[..., None]).exp(), (peak - base).exp()
            sums = sums * shrink[..., None] + weights @ vs[..., n : n + block, :]
            total = total * shrink + weights.sum(-1)
            peak = higher
        out[..., rows, :] = sums / total.masked_fill(total == 0, 1)[..., None]
        lse[..., rows] = peak + total.log()
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


# The kernels. A program owns a tile of one head; HD is the head size, WIDTH the power of two around it. A matrix comes
# as a tuple: its address and three strides. Scores are in base 2, as the machine's exponential is: log2(e) goes into
# the scale. Each walk goes over its tiles twice: first over those that are seen whole, without any mask (there the
# time goes), then over those that the diagonal, `first` or the end cuts; the order is free, for sums are rescaled.
# Offsets to a head and a tile have 64 bits.
LOG2E = tl.constexpr(math.log2(math.e)) if triton else None


@jit
def pointers(X, batch, head, start, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers (ROWS, WIDTH) to X[batch, head, start:start + ROWS]"""
    base = (
        X[0] + batch.to(tl.int64) * X[1] + head.to(tl.int64) * X[2] + tl.cast(start, tl.int64) * X[3]
    )
    return base + tl.arange(0, ROWS)[:, None] * X[3] + tl.arange(0, WIDTH)[None, :]


@jit
def fetch(
    X,
    batch,
    head,
    start,
    length,
    CUT: tl.constexpr,
    HD: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """X[batch, head, start:start + ROWS] (ROWS, WIDTH), zeros beyond column HD and, if CUT, beyond
    row `length`.

    Without a mask loads are wider, and can be in flight while the tensor cores work.
    """
    at = pointers(X, batch, head, start, ROWS, WIDTH)
    if CUT or HD < WIDTH:
        inside = (start + tl.arange(0, ROWS)[:, None] < length) & (tl.arange(0, WIDTH)[None, :] < HD)
        part = tl.load(at, inside, 0.0)
    else:
        part = tl.load(at)
    return part


@jit
def put(
    X, part, batch, head, start, length, HD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """X[batch, head, start:start + ROWS] = part, but for what lies beyond row `length` and column HD."""
    inside = (start + tl.arange(0, ROWS)[:, None] < length) & (tl.arange(0, WIDTH)[None, :] < HD)
    tl.store(pointers(X, batch, head, start, ROWS, WIDTH), part.to(X[0].dtype.element_ty), inside)


@jit
def numbers(at, rows, T, CUT: tl.constexpr):
    """One number for each row, zeros beyond row T"""
    if CUT:
        found = tl.load(at + rows, rows < T, 0.0)
    else:
        found = tl.load(at + rows)
    return found


@jit
def sees(rows, keys, first, T, S, CAUSAL: tl.constexpr):
    """Which rows see which keys, (M, 1) and (1, N), or (1, M) and (N, 1)"""
    seen = keys < S
    if CAUSAL:
        seen &= keys <= rows + (S - T)
    if first is not None:
        seen &= keys >= tl.load(first + rows, rows < T, 0)
    return seen


@jit
def key_bounds(first, m, T, S, CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """The tiles of keys that queries from m see: from `low` cut by `first`, from `whole` uncut,
    from `cut` to `end` cut.

    Query m sees the keys first[m] .. m + S - T (causal), and its tile those from the first query's
    first key to the last query's last; whole are the tiles that every query of the tile sees.
    """
    end, cut = S, S // N * N
    if CAUSAL:
        end = tl.maximum(tl.minimum(S, m + M + S - T), 0)
        cut = tl.minimum(S, tl.maximum(m + 1 + S - T, 0)) // N * N
    low, whole = 0, 0
    if first is not None:
        low = tl.minimum(tl.load(first + m), end) // N * N
        whole = tl.cdiv(tl.load(first + tl.minimum(m + M, T) - 1), N) * N
        whole = tl.minimum(whole, tl.cdiv(end, N) * N)
        cut = tl.maximum(whole, cut)
    return low, whole, cut, end


@jit
def query_bounds(last, n, T, S, CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """The tiles of queries that see keys from n, likewise: cut by the diagonal, uncut, cut by
    `last` or the end.

    Key n is seen by queries from n + T - S on (causal), and by none from last[n] on.
    """
    end, cut = T, T // M * M
    if last is not None:
        end = tl.load(last + tl.minimum(n + N, S) - 1)
        cut = tl.load(last + n) // M * M
    low, whole = 0, 0
    if CAUSAL:
        low = tl.minimum(tl.maximum(n + T - S, 0), end) // M * M
        whole = tl.cdiv(tl.maximum(n + N - 1 + T - S, 0), M) * M
        whole = tl.minimum(whole, tl.cdiv(end, M) * M)
        cut = tl.maximum(whole, cut)
    return low, whole, cut, end


@jit
def count(bounds, CUT: tl.constexpr, N: tl.constexpr):
    """How many tiles are uncut, or cut"""
    found = (bounds[2] - bounds[1]) // N
    if CUT:
        found = tl.cdiv(bounds[3] - bounds[2], N) + (bounds[1] - bounds[0]) // N
    return tl.maximum(found, 0)


@jit
def start_of(i, bounds, CUT: tl.constexpr, N: tl.constexpr):
    """Where the i-th of these tiles starts; of the cut ones, those before the uncut come first"""
    start = bounds[1] + i * N
    if CUT:
        start = bounds[0] + i * N
        start += tl.where(start < bounds[1], 0, bounds[2] - bounds[1])
    return start


@jit
def flash_kernel(
    Q,
    K,
    V,
    Out,
    lse,
    first,
    H,
    group,
    T,
    S,
    scale,
    CAUSAL: tl.constexpr,
    HD: tl.constexpr,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """out and lse of a tile of M queries: a walk over the tiles of N keys that they see.

    For each query the largest score so far, the sum of exp(score - largest) and the same sum of
    values stay in registers. A score is computed, used and forgotten: memory sees q, k, v and out,
    and no (T, S) matrix.
    """
    batch, head = tl.program_id(0) // H, tl.program_id(0) % H
    m = (tl.num_programs(1) - 1 - tl.program_id(1)) * M  # rows with the most keys start first
    if first is not None:
        first += batch.to(tl.int64) * T
    q = fetch(Q, batch, head, m, T, True, HD, M, WIDTH)
    rows = m + tl.arange(0, M)
    sums = tl.zeros((M, WIDTH), tl.float32)
    peak, total = tl.full((M,), -float("inf"), tl.float32), tl.zeros((M,), tl.float32)
    bounds = key_bounds(first, m, T, S, CAUSAL, M, N)
    for CUT in tl.static_range(2):
        for i in tl.range(0, count(bounds, CUT, N)):
            n = start_of(i, bounds, CUT, N)
            k = fetch(K, batch, head // group, n, S, CUT, HD, N, WIDTH)
            scores = dot(q, k.T, tl.zeros((M, N), tl.float32))
            if CUT:
                seen = sees(rows[:, None], n + tl.arange(0, N)[None, :], first, T, S, CAUSAL)
                scores = tl.where(seen, scores, -float("inf"))
            higher = tl.maximum(peak, tl.max(scores, 1) * (scale * LOG2E))
            base = higher
            if CUT:
                # nothing seen yet: exp2(-inf - 0) is 0
                base = tl.where(higher == -float("inf"), 0.0, higher)
            weights = tl.exp2(scores * (scale * LOG2E) - base[:, None])
            shrink = tl.exp2(peak - base)
            total = total * shrink + tl.sum(weights, 1)
            v = fetch(V, batch, head // group, n, S, CUT, HD, N, WIDTH)
            sums = dot(weights.to(v.dtype), v, sums * shrink[:, None])
            peak = higher
    total = tl.where(total == 0, 1.0, total)  # no key seen: 0 / 1, and a peak of -inf
    put(Out, sums / total[:, None], batch, head, m, T, HD, M, WIDTH)
    tl.store(
        lse + tl.program_id(0).to(tl.int64) * T + rows, (peak + tl.log2(total)) / LOG2E, rows < T
    )


@jit
def flash_dq_kernel(
    Q,
    K,
    V,
    DOut,
    Out,
    DQ,
    lse,
    dlse,
    delta,
    first,
    H,
    group,
    T,
    S,
    scale,
    CAUSAL: tl.constexpr,
    HD: tl.constexpr,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """dq of a tile of queries: dscore = p (dp - delta), with p = exp(score - lse) and dp = dout v^T.

    The scores are computed again, for they were not kept; the log-sum-exp was, and so no maximum is needed. delta is
    the sum of dout out over a row, less dlse; it is stored for flash_dkdv_kernel.
    """
    batch, head = tl.program_id(0) // H, tl.program_id(0) % H
    m = (tl.num_programs(1) - 1 - tl.program_id(1)) * M
    rows = m + tl.arange(0, M)
    row = tl.program_id(0).to(tl.int64) * T + rows  # where lse, dlse and delta (B, H, T) lie
    if first is not None:
        first += batch.to(tl.int64) * T
    out = fetch(Out, batch, head, m, T, True, HD, M, WIDTH)
    dout = fetch(DOut, batch, head, m, T, True, HD, M, WIDTH)
    less = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if dlse is not None:
        less -= tl.load(dlse + row, rows < T, 0.0)
    tl.store(delta + row, less, rows < T)
    level = tl.load(lse + row, rows < T, 0.0) * LOG2E
    q = fetch(Q, batch, head, m, T, True, HD, M, WIDTH)
    dq = tl.zeros((M, WIDTH), tl.float32)
    bounds = key_bounds(first, m, T, S, CAUSAL, M, N)
    for CUT in tl.static_range(2):
        for i in tl.range(0, count(bounds, CUT, N)):
            n = start_of(i, bounds, CUT, N)
            k = fetch(K, batch, head // group, n, S, CUT, HD, N, WIDTH)
            v = fetch(V, batch, head // group, n, S, CUT, HD, N, WIDTH)
            none = tl.zeros((M, N), tl.float32)
            chances = tl.exp2(dot(q, k.T, none) * (scale * LOG2E) - level[:, None])
            if CUT:
                seen = sees(rows[:, None], n + tl.arange(0, N)[None, :], first, T, S, CAUSAL)
                chances = tl.where(seen, chances, 0.0)
            dscores = chances * (dot(dout, v.T, none) - less[:, None])
            dq = dot(dscores.to(k.dtype), k, dq)
    put(DQ, dq * scale, batch, head, m, T, HD, M, WIDTH)


@jit
def flash_dkdv_kernel(
    Q,
    K,
    V,
    DOut,
    DK,
    DV,
    lse,
    delta,
    first,
    last,
    H,
    group,
    T,
    S,
    scale,
    CAUSAL: tl.constexpr,
    HD: tl.constexpr,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """dk = dscore^T q and dv = p^T dout of a tile of keys: a walk over the tiles of queries that see them.

    The query heads of a group are summed here, so that no two programs add to one place. last (B, S): how many
    queries have their first key at or before key s; the walk of key s ends there.
    """
    batch, head = tl.program_id(0) // H, tl.program_id(0) % H
    n = tl.program_id(1) * N  # early keys have the most queries
    keys = n + tl.arange(0, N)
    if first is not None:
        first += batch.to(tl.int64) * T
        last += batch.to(tl.int64) * S
    k = fetch(K, batch, head, n, S, True, HD, N, WIDTH)
    v = fetch(V, batch, head, n, S, True, HD, N, WIDTH)
    dk = tl.zeros((N, WIDTH), tl.float32)
    dv = tl.zeros((N, WIDTH), tl.float32)
    bounds = query_bounds(last, n, T, S, CAUSAL, M, N)
    for member in range(group):
        row = (tl.program_id(0).to(tl.int64) * group + member) * T
        for CUT in tl.static_range(2):
            for i in tl.range(0, count(bounds, CUT, M), num_stages=1 if CUT else None):
                m = start_of(i, bounds, CUT, M)
                rows = m + tl.arange(0, M)
                # Transposed, (N, M): as they come out of one product they go into the next. Products start at what is
                # to be taken off, which would else hold registers of its own.
                none = tl.zeros((N, M), tl.float32)
                q = fetch(Q, batch, head * group + member, m, T, CUT, HD, M, WIDTH)
                level = numbers(lse + row, rows, T, CUT) / scale
                chances = tl.exp2(dot(k, q.T, none - level[None, :]) * (scale * LOG2E))
                if CUT:
                    seen = sees(rows[None, :], keys[:, None], first, T, S, CAUSAL)
                    chances = tl.where(seen, chances, 0.0)
                dout = fetch(DOut, batch, head * group + member, m, T, CUT, HD, M, WIDTH)
                dv = dot(chances.to(dout.dtype), dout, dv)
                less = numbers(delta + row, rows, T, CUT)
                dscores = chances * dot(v, dout.T, none - less[None, :])
                dk = dot(dscores.to(q.dtype), q, dk)
    put(DK, dk * scale, batch, head, n, S, HD, N, WIDTH)
    put(DV, dv, batch, head, n, S, HD, N, WIDTH)


def flash_launch(
    kernel: Any, place: int, q: Tensor, k: Tensor, tensors: list, causal: bool
) -> None:
    """A program for each tile and each head, of keys where `place` is 2, else of queries; place: of
    its tile in a row of FLASH.
    """
    (B, H, T, hd), (groups, S) = q.shape, k.shape[1:3]
    row = next(
        row
        for row in FLASH
        if hd <= row[0] and q.element_size() == row[1] and room(q.device) >= row[2]
    )
    M, N, warps, stages = row[3 + place]
    heads, tiles = (groups, triton.cdiv(S, N)) if place == 2 else (H, triton.cdiv(T, M))
    matrices = [(x, *x.stride()[:3]) if x is not None and x.dim() == 4 else x for x in tensors]
    width = max(16, triton.next_power_of_2(hd))
    if B * heads * tiles:
        kernel[B * heads, tiles](
            *matrices,
            heads,
            H // groups,
            T,
            S,
            hd**-0.5,
            causal,
            hd,
            width,
            M,
            N,
            num_warps=warps,
            num_stages=stages,
        )


def lying(x: Tensor) -> Tensor:
    """x as it lies in memory; a copy where its last stride is not 1"""
    return x if x.stride(-1) == 1 else x.contiguous()


def flash(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = True, first: Optional[Tensor] = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of flash_twin: out in q's memory layout, q, k and v where they lie if their last stride is 1."""
    (B, H, T, hd), S = q.shape, k.shape[2]
    require(
        k.shape == v.shape == (B, k.shape[1], S, hd) and H % max(k.shape[1], 1) == 0,
        f"flash: q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit",
    )
    require(
        q.dtype == k.dtype == v.dtype,
        f"flash: q, k and v differ in type, {q.dtype}, {k.dtype} and {v.dtype}",
    )
    require(hd <= 256, f"flash: heads of {hd} channels, at most 256 fit into a program")
    require(
        not causal or S >= T,
        f"flash: {T} queries for {S} keys; the last query stands at the last key",
    )
    require(
        first is None or first.shape == (B, T),
        f"flash: first of another shape than {[B, T]}, one key for each query",
    )
    q, k, v = map(lying, (q, k, v))
    first = None if first is None else first.contiguous()
    out, lse = torch.empty_like(q), q.new_empty(B, H, T, dtype=torch.float32)
    flash_launch(flash_kernel, 0, q, k, [q, k, v, out, lse, first], causal)
    return out, lse


def flash_backward(
    dout: Tensor,
    dlse: Optional[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    first: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) by two kernels, one over tiles of queries, one over tiles of keys.

    Each computes the scores again, seven products instead of five; in return no program adds to
    what another wrote, and every run gives the same bits.
    """
    dout, q, k, v, out = map(lying, (dout, q, k, v, out))
    dq, dk, dv, delta = *(torch.empty_like(x) for x in (q, k, v)), torch.empty_like(lse)
    last, dlse = None, None if dlse is None else dlse.contiguous()
    if first is not None:
        first = first.contiguous()
        keys = torch.arange(k.shape[2], dtype=first.dtype, device=q.device).repeat(len(first), 1)
        last = torch.searchsorted(first, keys, right=True, out_int32=True)
    tensors = [q, k, v, dout, out, dq, lse, dlse, delta, first]
    flash_launch(flash_dq_kernel, 1, q, k, tensors, causal)
    tensors = [q, k, v, dout, dk, dv, lse, delta, first, last]
    flash_launch(flash_dkdv_kernel, 2, q, k, tensors, causal)
    return dq, dk, dv


# sizes that were fastest on an H200: numbers that a program works on, its warps, loads in flight
MAP = dict(BLOCK=1024, num_warps=4)
ADAMW = dict(BLOCK=512, num_warps=4)
CROSS_ENTROPY = dict(BLOCK=4096, num_warps=4)
TILE, WARP = 4096, 512  # numbers of the rows of a program, and of each of its warps
WHOLE = 32768  # the longest row that softmax holds at once
PROGRAMS = 264  # at most, for sums over rows: two on each multiprocessor of a large card
LOGITS = 2**29  # so many logits at most stand in memory at a time
ACTIVATIONS = {"none": (unchanged, lambda x: x), "gelu": (gelu_of, gelu_twin)}
TILES = {  # rows of x, bytes of a number: the tile of the result and of the sum
    ("few", 2): dict(BM=16, BN=128, BK=256, num_warps=4, num_stages=3),
    ("few", 4): dict(BM=16, BN=32, BK=32, num_warps=4, num_stages=4),
    ("many", 2): dict(BM=128, BN=256, BK=64, num_warps=8, num_stages=3),
    ("many", 4): dict(BM=64, BN=64, BK=16, num_warps=8, num_stages=3),
}
# The first row that fits is taken. Larger tiles of keys are read fewer times, and hold more registers and shared
# memory; what is fastest where was measured (H200), or is what spills nothing (for cards with less shared memory).
FLASH = (  # head size up to, bytes of a number, KiB of shared memory from; M, N, warps, stages of forward, dq, dkdv
    (64, 2, 227, (128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    (128, 2, 227, (128, 128, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3)),
    (64, 2, 0, (64, 64, 4, 3), (128, 64, 8, 2), (32, 128, 8, 2)),
    (128, 2, 0, (128, 32, 8, 3), (64, 64, 8, 2), (32, 64, 8, 2)),
    (256, 2, 0, (128, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2)),
    (64, 4, 0, (64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    (128, 4, 0, (32, 16, 8, 2), (32, 16, 8, 2), (16, 16, 8, 2)),
    (256, 4, 0, (16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
)
ROOM = [227]  # KiB of shared memory where tensors are on no GPU, as while compiling ahead


def room(device: torch.device) -> int:
    """KiB of shared memory that a program may take"""
    if device.type != "cuda":
        return ROOM[0]
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin // 1024


# ---- the table: an entry makes the custom op with its gradient, a row of the benchmark and a test
# A custom op is what torch.compile takes as a whole: it asks the twin for the shapes of results, and does not look
# inside. What the backward pass wants is told by the names of its parameters: those of inputs and outputs are kept,
# dNAME is the gradient of the output NAME. So a new kernel is a launcher, a twin, and a row of the table.


@dataclasses.dataclass
class Kernel:
    """kernel(*inputs) -> what the twin gives; known to autograd and torch.compile. Raises ValueError for bad inputs."""

    run: Callable  # launches the Triton code
    twin: Callable
    example: Callable  # (sizes, dtype, device) -> inputs
    flops: Callable  # (*inputs) -> floating-point operations of a plain forward pass
    sizes: tuple  # for the interpreter, a laptop, a GPU
    outputs: str = "y"  # names of what `run` returns
    hidden: str = ""  # all but the first are for the backward pass alone: names of inputs that they look like
    backward: Callable | None = None  # its parameters are named as inputs, outputs, and d + an output's name
    gradients: dict = dataclasses.field(default_factory=dict)  # input -> its place in what `backward` returns
    like: str = ""  # names of parameters of `backward` that its results look like
    replaced: dict = dataclasses.field(default_factory=dict)  # input -> output that is kept instead, unless empty
    mutates: tuple = ()  # names of inputs that change in place
    strided: bool = False  # takes inputs as they lie in memory
    layout: Callable = Tensor.contiguous  # of an input or the like: the tensor whose memory layout its gradient has
    passes: tuple = (1, 2)  # work of the forward and of the backward pass, in plain forward passes
    library: Callable | None = None  # the best call that torch has for it

    def __post_init__(self):
        """Make the custom ops: one for `run`, one for `backward`, tied together for autograd."""
        self.name = self.run.__name__
        self.op = torch.library.custom_op(
            f"kernels::{self.name}", self.run, mutates_args=self.mutates
        )
        self.inputs = [*inspect.signature(self.run).parameters]
        self.op.register_fake(self.fake)
        if self.backward:
            self.back = torch.library.custom_op(
                f"kernels::{self.backward.__name__}", self.backward, mutates_args=()
            )
            self.needs = [*inspect.signature(self.backward).parameters]
            self.back.register_fake(self.fake_backward)
            self.op.register_autograd(self.give, setup_context=self.keep)

    def fake(self, *inputs):
        """Tensors of the right shapes, for torch.compile"""
        found = self.twin(*inputs)
        values = dict(zip(self.inputs, inputs))
        hidden = [torch.empty_like(values[name]) for name in self.hidden.split()]
        return (found, *hidden) if hidden else found

    def fake_backward(self, *inputs):
        """Gradients of the right shapes and layout, for torch.compile"""
        values = dict(zip(self.needs, inputs))
        found = [torch.empty_like(self.layout(values[name])) for name in self.like.split()]
        return tuple(found) if len(found) > 1 else found[0]

    def values(self, inputs, output):
        """What the backward pass may ask for, by name: inputs and outputs. An input whose place an
        output has taken is None.
        """
        values = dict(zip(self.inputs, inputs)) | dict(zip(self.outputs.split(), flat([output])))
        gone = [name for name, output in self.replaced.items() if values[output].numel()]
        return values | dict.fromkeys(gone)

    def keep(self, ctx, inputs, output):
        """Save for the backward pass what its parameters name."""
        values = self.values(inputs, output)
        asked = [values.get(name) for name in self.needs]
        ctx.rest = [None if isinstance(value, Tensor) else value for value in asked]
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in asked))

    def give(self, ctx, *grads):
        """The gradients of all inputs from those of the outputs."""
        slopes = {f"d{name}": grad for name, grad in zip(self.outputs.split(), grads)}
        kept = [
            rest if saved is None else saved for saved, rest in zip(ctx.saved_tensors, ctx.rest)
        ]
        found = flat([self.back(*(slopes.get(name, value) for name, value in zip(self.needs, kept)))])
        return tuple(
            found[self.gradients[name]] if wanted and name in self.gradients else None
            for name, wanted in zip(self.inputs, ctx.needs_input_grad)
        )

    def __call__(self, *inputs, **named):
        """Check types and devices, and launch."""
        tensors = flat([*inputs, *named.values()])
        kinds, places = {t.dtype for t in tensors}, {t.device for t in tensors}
        require(
            len(places) <= 1, f"{self.name}: tensors on {' and '.join(sorted(map(str, places)))}"
        )
        numbers = all(t.is_floating_point() for t in tensors[:1])  # whole ones only come after those, as targets do
        require(
            numbers and kinds <= {*HALF.values(), torch.int8, torch.int32, torch.int64},
            f"{self.name}: no kernel for {', '.join(sorted(map(str, kinds)))}",
        )
        runs = INTERPRETED.value or all(place.type == "cuda" for place in places)
        require(runs, f"{self.name}: a kernel runs on a GPU; on a CPU its twin does the work")
        if not self.strided and not self.mutates:
            inputs = [whole(value) for value in inputs]
            named = {name: whole(value) for name, value in named.items()}
        found = self.op(*inputs, **named)
        return found[0] if self.hidden else found


def whole(value: Any) -> Any:
    """A tensor is made contiguous, what is none stays as it is."""
    return value.contiguous() if isinstance(value, Tensor) else value


def flat(values: tuple | list) -> list[Tensor]:
    """The tensors among the values and in lists among them"""
    return [
        t
        for value in values
        for t in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(t, Tensor)
    ]


def randn(*sizes: int, like: tuple) -> Tensor:
    """Standard normal numbers of a type on a device: like = (dtype, device)"""
    return torch.randn(*sizes, dtype=torch.float32, device=like[1]).to(like[0])


def rows_inputs(sizes: tuple, *like) -> tuple:
    """Inputs of softmax, gelu and swiglu from (rows, columns)"""
    return (randn(*sizes, like=like),)


def add_inputs(sizes: tuple, *like) -> tuple:
    """Inputs of add from (numbers,)"""
    return randn(*sizes, like=like), randn(*sizes, like=like)


def rmsnorm_inputs(sizes: tuple, *like) -> tuple:
    """Inputs of rmsnorm from (rows, channels)"""
    return randn(*sizes, like=like), randn(sizes[1], like=like), randn(*sizes, like=like), 1e-6


def matmul_inputs(sizes: tuple, *like) -> tuple:
    """Inputs of matmul from (M, N, K), so that results are about 1"""
    M, N, K = sizes
    return randn(M, K, like=like), randn(N, K, like=like) / K**0.5, randn(N, like=like), "gelu"


def rope_inputs(sizes: tuple, *like) -> tuple:
    """Inputs of rope from (batch, length, heads, channels of a head)"""
    B, T, H, width = sizes
    rate = 10000 ** (torch.arange(0, width, 2, device=like[1]) / width)
    angle = torch.arange(T, device=like[1])[:, None] / rate
    return randn(*sizes, like=like), angle.cos().to(like[0]), angle.sin().to(like[0])


def cross_entropy_inputs(sizes: tuple, *like) -> tuple:
    """Inputs of cross_entropy from (rows, channels, vocabulary); some targets do not count"""
    R, C, V = sizes
    targets = torch.randint(-1, V, (R,), device=like[1])
    return randn(R, C, like=like), randn(V, C, like=like) / C**0.5, targets


def adamw_inputs(sizes: tuple, *like) -> tuple:
    """Inputs of adamw from (tensors, numbers of each), and a small tensor beside them"""
    shapes = [(sizes[1],)] * sizes[0] + [(3, 5)]
    params, grads, first, second = ([randn(*shape, like=like) for shape in shapes] for _ in range(4))
    first = [t.float() * 0.1 for t in first]
    second = [t.float().square() for t in second]
    return params, grads, first, second, 0.01, 0.9, 0.95, 1e-8, 0.1, 3


def int8_inputs(sizes: tuple, *like) -> tuple:
    """Inputs of int8 from (M, N, K)"""
    M, N, K = sizes
    weight = torch.randint(-127, 128, (N, K), dtype=torch.int8, device=like[1])
    return randn(M, K, like=like), weight, (randn(N, like=like).abs() + 0.1) / (127 * K**0.5)


def flash_inputs(sizes: tuple, *like) -> tuple:
    """Inputs of flash from (batch, heads, heads of keys, length, channels of a head)"""
    B, H, groups, T, width = sizes
    return (*(randn(B, n, T, width, like=like) for n in (H, groups, groups)), True, None)


def fused_adamw(params: list, grads: list, first: list, second: list, *numbers: Any) -> None:
    """torch's fused AdamW, with the signature of adamw"""
    if params[0].dtype != first[0].dtype:  # torch's wants one type
        return adamw_twin(params, grads, first, second, *numbers)
    words = dict(zip(("lr", "beta1", "beta2", "eps", "weight_decay"), numbers))
    steps = [torch.full((), float(numbers[-1]), device=params[0].device) for _ in params]
    torch._fused_adamw_(
        params, grads, first, second, [], steps, **words, amsgrad=False, maximize=False
    )


def library_rmsnorm(x: Tensor, weight: Tensor, residual: Tensor, eps: float) -> tuple:
    """torch's fused norm, behind a sum of its own"""
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, first: None) -> Tensor:
    """torch's best attention for these inputs, without the log-sum-exp"""
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )


KERNELS = {kernel.name: kernel for kernel in (
    Kernel(add, add_twin, add_inputs, lambda x, z: x.numel(),
           ((999,), (2**22,), (2**28,)),
           library=torch.add),
    Kernel(gelu, gelu_twin, rows_inputs, lambda x: 8 * x.numel(),
           ((7, 133), (2**22,), (2**27,)),
           backward=gelu_backward, gradients=dict(x=0), like="x",
           library=functools.partial(F.gelu, approximate="tanh")),
    Kernel(softmax, softmax_twin, rows_inputs, lambda x: 5 * x.numel(),
           ((5, 97), (1024, 4096), (16384, 16384)),
           backward=softmax_backward, gradients=dict(x=0), like="y",
           library=functools.partial(torch.softmax, dim=-1)),
    Kernel(rmsnorm, rmsnorm_twin, rmsnorm_inputs, lambda x, *_: 5 * x.numel(),
           ((5, 97), (4096, 768), (32768, 4096)),
           outputs="y total",
           backward=rmsnorm_backward, gradients=dict(x=0, residual=0, weight=1), like="dy weight",
           replaced=dict(x="total"),
           library=library_rmsnorm),
    Kernel(swiglu, swiglu_twin, rows_inputs, lambda x: 3 * x.numel(),
           ((5, 194), (4096, 4096), (32768, 16384)),
           backward=swiglu_backward, gradients=dict(x=0), like="x"),
    Kernel(rope, rope_twin, rope_inputs, lambda x, *_: 3 * x.numel(),
           ((2, 5, 3, 12), (8, 512, 12, 64), (8, 4096, 32, 128)),
           backward=rope_backward, gradients=dict(x=0), like="dy",
           strided=True),
    Kernel(cross_entropy, cross_entropy_twin, cross_entropy_inputs, lambda x, w, _: 2 * x.numel() * len(w),
           ((13, 16, 301), (1024, 256, 8192), (16384, 2048, 131072)),
           outputs="loss dx dw", hidden="x weight", passes=(3, 0),  # gradients are made with the loss
           backward=cross_entropy_backward, gradients=dict(x=0, weight=1), like="dx dw"),
    Kernel(adamw, adamw_twin, adamw_inputs, lambda params, *_: 12 * sum(p.numel() for p in params),
           ((3, 97), (12, 2**18), (64, 2**22)),
           outputs="", mutates=("params", "first", "second"),
           library=fused_adamw),
    Kernel(matmul, matmul_twin, matmul_inputs, lambda x, w, *_: 2 * x.numel() * len(w),
           ((33, 17, 65), (512, 512, 512), (8192, 8192, 8192)),
           backward=matmul_backward, gradients=dict(x=0, weight=1, bias=2), like="x weight bias",
           strided=True,
           library=lambda x, w, b, _: F.gelu(F.linear(x, w, b), approximate="tanh")),
    Kernel(int8, int8_twin, int8_inputs, lambda x, w, _: 2 * x.numel() * len(w),
           ((3, 17, 65), (1, 2048, 2048), (1, 28672, 8192)),
           strided=True),
    Kernel(flash, flash_twin, flash_inputs, lambda q, k, *_: 2 * q.numel() * k.shape[2],
           ((1, 4, 2, 33, 16), (2, 12, 12, 512, 64), (2, 16, 16, 8192, 128)),
           outputs="out lse", passes=(1, 2.5),  # scores are computed again
           backward=flash_backward, gradients=dict(q=0, k=1, v=2), like="q k v",
           strided=True, layout=lying, library=attention),
)} if triton else {}


@functools.cache
def runs(name: str, device: str = "") -> bool:
    """Whether the kernel `name` runs on the device (empty: the best there is), found by one try and said once.

    Never on a CPU, for an interpreter is no fast path. Raises ValueError for a name that is not in the table.
    """
    require(f"{name}_twin" in globals(), f"no kernel {name!r}: there are {', '.join(KERNELS)}")
    device = torch.device(device) if device else pick_device("")
    if device.type == "cpu":
        return False
    try:
        require(name in KERNELS, "triton is not installed")
        kernel = KERNELS[name]
        results(kernel, kernel, kernel.example(kernel.sizes[0], torch.float32, device))
        torch.accelerator.synchronize()
    except Exception as error:  # no C compiler, a card too old, an older torch: many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(
            f"kernels: {name} does not run here, the plain form does the work: {reason}",
            file=sys.stderr,
        )
        return False
    return True


def use(name: str, device: str = "") -> Callable:
    """The kernel `name` if it runs on the device, else, and always on a CPU, its plain twin.

    Both take the same inputs and give the same outputs. Raises ValueError for a name that is not in the table.
    """
    return KERNELS[name] if runs(name, device) else globals()[f"{name}_twin"]


# ---- is it right? against the twin in float64; the yardstick is the error of the library's call on the same inputs


def copied(value: object, kind: torch.dtype | None = None) -> object:
    """A copy of an input, a tensor or a list of them, in another type if it has numbers"""
    if isinstance(value, list):
        return [copied(part, kind) for part in value]
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().to(kind if kind and value.is_floating_point() else value.dtype)


def attempt(
    kernel: Kernel, function: Callable, inputs: tuple, kind: torch.dtype | None = None
) -> tuple[list, Callable]:
    """What function(*inputs) gives, or the inputs it changed, and backward(count): the gradients of
    the first `count` of these.

    The inputs are copied, in the type `kind` if given, so that all forms start from the same
    numbers. The slopes are waves, for ones would hide errors that add up to nothing.
    """
    values = dict(zip(kernel.inputs, (copied(value, kind) for value in inputs)))
    leaves = [values[name].requires_grad_() for name in kernel.gradients]
    found = function(*values.values())
    found = flat([values[name] for name in kernel.mutates] or [found])
    waves = [
        torch.arange(y.numel(), device=y.device).float().mul(0.7).cos().view_as(y).to(y.dtype)
        for y in found[: len(found) if leaves else 0]
    ]
    return found, lambda count: torch.autograd.grad(
        found[:count], leaves, waves[:count], retain_graph=True
    )


def results(
    kernel: Kernel,
    function: Callable,
    inputs: tuple,
    kind: torch.dtype | None = None,
    count: int | None = None,
) -> list:
    """The first `count` of what function(*inputs) gives (None: all), and their gradients, see `attempt`"""
    found, backward = attempt(kernel, function, inputs, kind)
    return [*(y.detach() for y in found[:count]), *(backward(count) if kernel.backward else ())]


def distances(
    kernel: Kernel, inputs: tuple, exact: bool = True
) -> list[tuple[float, float, float]]:
    """For each result: |a - b| / |b| of the kernel, of the library, and the spacing of its type.

    b is the twin's in float64, or if not `exact`, the library's.
    """
    theirs = results(kernel, kernel.library or kernel.twin, inputs)
    shown = len(theirs) - len(kernel.gradients)
    true = results(kernel, kernel.twin, inputs, torch.float64, shown) if exact else theirs
    found = []
    for mine, other, truth in zip(results(kernel, kernel, inputs, None, shown), theirs, true):
        truth = truth.double()
        far, usual = (
            (part.double() - truth).norm().item() / (truth.norm().item() or 1.0)
            for part in (mine, other)
        )
        found.append((math.inf if math.isnan(far) else far, usual, torch.finfo(mine.dtype).eps))
    return found


def errors(
    kernel: Kernel, sizes: tuple, kind: torch.dtype, device: torch.device, draws: int = 5
) -> tuple[float, float]:
    """The kernel's root mean square error as a multiple of the library's, of its worst result, and this error itself.

    It is taken over some draws, and an error below a quarter of the spacing counts as that: any one may have luck.
    """
    rounds = [distances(kernel, kernel.example(sizes, kind, device)) for _ in range(draws)]
    found = []
    for parts in zip(*rounds):
        far, usual, eps = (math.hypot(*column) / math.sqrt(draws) for column in zip(*parts))
        found.append((far / max(usual, eps / 4), far))
    return max(found)


# ---- is it fast? times beside the limits of this machine, which are measured too


def clock(call: Callable, device: torch.device) -> Callable:
    """Run `call` and return a function that tells the seconds it took.

    A GPU is told by events of its own, and is not waited for: that would leave it idle before the
    next call.
    """
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        took = time.perf_counter() - began
        return lambda: took
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    call()
    ended.record()
    return lambda: began.elapsed_time(ended) / 1000


def bench(
    calls: dict[str, Callable], seconds: float, device: torch.device
) -> dict[str, tuple[float, float]]:
    """Median seconds of each call and its spread, quartile to quartile, over the median.

    The calls take turns, with the cache flushed before each, until the seconds are over, and at
    least five times. The first round does not count. On a GPU the flush takes so long that the next
    call is launched behind it: what is timed is the device's work, not the launch. To be copied
    into other benchmarks, with `clock`.
    """
    cuda = device.type == "cuda"
    # more than the last cache holds; on a GPU read so often that a call is launched before the device is through
    other = torch.zeros(2**30 if cuda else 2**24, device=device)
    times, until = {name: [] for name in calls}, math.inf
    while time.perf_counter() < until or len(min(times.values(), key=len)) < 5:
        marks = {}
        for name, call in calls.items():
            for _ in range(4 if cuda else 1):
                other.amax()
            marks[name] = clock(call, device)
        if cuda:
            torch.cuda.synchronize()
        if until == math.inf:  # the first round compiles and warms up
            until = time.perf_counter() + seconds
            continue
        for name, mark in marks.items():
            times[name].append(mark())
    quartiles = {name: statistics.quantiles(found, n=4) for name, found in times.items()}
    return {name: (middle, (high - low) / middle) for name, (low, middle, high) in quartiles.items()}


def limits(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """What this machine reaches: bytes a second of a large copy, FLOP a second of a large matrix product.

    A data sheet's figures are reached by nobody; percentages of these can reach 100.
    """
    n, side = (2**30, 8192) if device.type == "cuda" else (2**27, 1024)
    a, x = torch.ones(n, dtype=torch.int8, device=device), randn(side, side, like=(dtype, device))
    b = torch.empty_like(a)
    times = bench({"copy": lambda: b.copy_(a), "product": lambda: x @ x}, 0.5, device)
    return 2 * n / times["copy"][0], 2 * side**3 / times["product"][0]


def least_bytes(kernel: Kernel, inputs: tuple) -> tuple[int, int]:
    """What a forward and a backward pass must move: each input read once, each result written once.

    For the backward pass: the gradients of the results, what was kept, and the gradients of the
    inputs. What is for the backward pass alone counts in both.
    """
    size = lambda values: sum(t.numel() * t.element_size() for t in flat(values))  # noqa: E731
    named = dict(zip(kernel.inputs, inputs))
    found = flat([named[name] for name in kernel.mutates] or [kernel.twin(*inputs)])
    # by place, for one gradient may be that of two inputs
    leaves = {place: named[name] for name, place in kernel.gradients.items()}
    values = kernel.values(inputs, tuple(found))
    kept = [values.get(name) for name in getattr(kernel, "needs", ())]
    hidden = size([named[name] for name in kernel.hidden.split()])
    return size(inputs) + size(found) + hidden, size(found) + size(kept) + hidden + size([*leaves.values()])


def peak(call: Callable, device: torch.device) -> float:
    """Megabytes that a call takes beyond what stood in memory before; nan where torch does not
    count them (CPU).
    """
    if device.type != "cuda":
        return math.nan
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def rivals(kernel: Kernel, inputs: tuple, device: torch.device) -> dict[str, Callable]:
    """The forms that are timed, by name.

    The kernel, where it is no interpreter's, the plain twin, the twin compiled by torch where that
    works, and torch's own call where there is one. The first of them is what the others are
    compared with.
    """
    torch._dynamo.reset()
    calls: dict = {"kernel": kernel} if device.type == "cuda" else {}
    calls["eager"] = kernel.twin
    compiled = torch.compile(kernel.twin, dynamic=False)
    try:
        found, backward = attempt(kernel, compiled, inputs)
        if kernel.backward:
            backward(len(found))
        calls["compiled"] = compiled
    except Exception as error:  # no C++ compiler, a full disk: many kinds
        print(f"  torch.compile does not work here ({type(error).__name__}): no times of it")
    return calls | ({"library": kernel.library} if kernel.library else {})


def passes(
    kernel: Kernel, inputs: tuple, calls: dict[str, Callable]
) -> dict[str, tuple[dict, int, float]]:
    """Forward and backward of each call on the same inputs: (calls, bytes that must move, FLOPs) by name.

    The backward pass of each form runs from a forward pass of its own, again and again. FLOPs are
    those of the first form; a plain backward pass has twice the products of the forward pass.
    """
    moved, work = least_bytes(kernel, inputs), kernel.flops(*inputs)
    factors = kernel.passes if "kernel" in calls else (1, 2)
    forward = {
        name: functools.partial(torch.no_grad()(call), *inputs) for name, call in calls.items()
    }
    found = {"forward": (forward, moved[0], factors[0] * work)}
    if kernel.backward:
        tries = {name: attempt(kernel, call, inputs) for name, call in calls.items()}
        shown = min(len(results) for results, _ in tries.values())  # the library may give fewer
        backward = {name: functools.partial(call, shown) for name, (_, call) in tries.items()}
        found["backward"] = (backward, moved[1], factors[1] * work)
    return found


HEAD = """
MB: memory that a call takes beside its inputs, and that of plain torch; last,
how many times as fast as plain torch, as that compiled, as the library's call
                 us   +-   GB/s    % TFLOP/s    %    MB plain plain  comp   lib
"""[1:-1]


def show_times(
    kernel: Kernel, sizes: tuple, dtype: torch.dtype, device: torch.device, o: Options, top: tuple
) -> list[tuple]:
    """Print times of all forms of a kernel; returns points of the roofline: (name, FLOP per byte,
    FLOP a second).

    At this size results are compared with the library's, in the same type: float64 would not fit.
    """
    inputs, points = kernel.example(sizes, dtype, device), []
    head = f"{kernel.name} {' x '.join(map(str, sizes))}"
    if device.type == "cuda":
        far = max(far / eps for far, _, eps in distances(kernel, inputs, exact=False))
        head += f", {far:.1f} spacings of {str(dtype)[6:]} from {'the library' if kernel.library else 'the twin'}"
        require(far <= 8, f"{head}: it is wrong at this size")
    print(head)
    for name, (calls, moved, work) in passes(kernel, inputs, rivals(kernel, inputs, device)).items():
        times = bench(calls, o.seconds, device)
        ours = next(iter(times))
        took, spread = times[ours]
        versus = [
            times[rival][0] / took if rival in times else math.nan
            for rival in ("eager", "compiled", "library")
        ]
        memory = [peak(calls[form], device) for form in (ours, "eager")]
        cells = "".join(f"{size:6.0f}" for size in memory)
        cells += "".join(f"{ratio:6.2f}" for ratio in versus)
        print(
            f" {name:8} {took * 1e6:9.1f} {spread:4.0%} {moved / took / 1e9:6.4g} {moved / took / top[0]:4.0%} "
            f"{work / took / 1e12:7.3g} {work / took / top[1]:4.0%}{cells.replace('nan', '  -')}",
            flush=True,
        )
        points.append((f"{kernel.name} {name} {'x'.join(map(str, sizes))}", work / moved, work / took))
    return points


# ---- roofline: a call can be no faster than its bytes over the bandwidth, or its FLOPs over the compute limit


def layers(
    shape: str, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[functools.partial, int, float]]:
    """The matrix products and attention of a Transformer of this shape, for prefill and for a step of decoding.

    Returns (call, bytes, FLOPs) by name. Prefill takes all tokens of all texts at once, decoding
    one token of each: the same weights are read for T times fewer FLOPs.
    """
    require(
        re.fullmatch(r"[1-9]\d*(,[1-9]\d*){3}", shape),
        f"--shape={shape}: wanted batch,length,width,heads",
    )
    B, T, C, H = (int(part) for part in shape.split(","))
    require(C % H == 0, f"--shape={shape}: the width is no multiple of the heads")
    found, width, like = {}, torch.finfo(dtype).bits // 8, (dtype, device)
    weights = dict(qkv=(3 * C, C), out=(C, C), up=(4 * C, C), down=(C, 4 * C))
    for phase, rows, queries in (("prefill", B * T, T), ("decode", B, 1)):
        for name, (n, m) in weights.items():
            x, w = randn(rows, m, like=like), randn(n, m, like=like)
            moved = width * (rows * m + n * m + rows * n)
            found[f"{phase} {name}"] = functools.partial(F.linear, x, w), moved, 2.0 * rows * n * m
        q, k, v = (randn(B, H, length, C // H, like=like) for length in (queries, T, T))
        causal = queries > 1
        call = functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal)
        work = 4.0 * B * queries * T * C / (1 + causal)
        found[f"{phase} attention"] = call, width * 2 * B * (queries + T) * C, work
    return found


def roofline(points: list[tuple], top: tuple, plot: str) -> None:
    """Print where each point (name, FLOP per byte, FLOP a second) lies under the roof; with `plot`, draw it.

    The roof: a call with few FLOPs for each byte waits for memory, one with many for the arithmetic
    units; what can be reached is the smaller of intensity times bandwidth and the compute limit
    (Williams et al. 2009).
    """
    print(
        f"\nthe roof bends at {top[1] / top[0]:.1f} FLOP per byte\n"
        f"{'TFLOP/s':39} FLOP/byte bound by     roof  reached"
    )
    points = [point for point in points if point[1]]  # a pass may only move bytes
    for name, intensity, reached in points:
        roof = min(intensity * top[0], top[1])
        bound = "memory" if roof < top[1] else "compute"
        print(
            f"{name:39} {intensity:9.2f} {bound:8} {roof / 1e12:8.3f} {reached / 1e12:8.3f} {reached / roof:4.0%}"
        )
    if plot:
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
        bend = top[1] / top[0]
        low = min(point[1] for point in points) / 2
        high = max(bend, *(point[1] for point in points)) * 2
        axes.loglog([low, bend, high], [low * top[0], top[1], top[1]], color="black")
        colors: dict = {}
        for name, *point in points:
            group, back = name.split()[0], " backward" in name
            label = None if group in colors else group
            color = colors.setdefault(group, pyplot.cm.tab20.colors[len(colors) % 20])
            axes.loglog(*point, "v" if back else "o", color=color, label=label)
        figure.legend(loc="outside right center", title="triangle: backward")
        axes.set(
            xlabel="FLOP per byte",
            ylabel="FLOP a second",
            title="measured points under the measured roof",
        )
        figure.savefig(plot, dpi=150)
        print(f"{plot} written")


# ---- compiling ahead: what the compiler makes of each launch, for cards that need not be here
# Registers and shared memory say how many programs a multiprocessor holds at a time: while one waits for memory, the
# others work. A program that wants more registers than there are spills them to memory, and one that wants more shared
# memory than a card has cannot run at all.

CARDS = {80: 163, 90: 227, 100: 227}  # KiB of shared memory of a program
SPILLED = 128  # bytes a thread: the fastest tiles of flash's backward pass spill some; those that spill none are slower
TENSOR = ("mma.sync", "wgmma", "tcgen05")  # the instructions of tensor cores since then


def launches(kernel: Kernel, sizes: tuple, dtype: torch.dtype, card: int) -> list[tuple]:
    """(name, compiled code) of all Triton launches of a forward and a backward pass, for a card of
    compute capability card / 10.

    The launchers run on tensors without memory, and Triton's own launch finds this card and stops
    when it has compiled: so what is compiled is what would run, tile sizes and all.
    """
    found, runtime = [], triton.runtime.jit
    usual, driver = runtime.JITFunction.run, runtime.driver

    def compiled(self, *args, grid, warmup, **words):
        """Stands in for Triton's launch"""
        found.append((self.__name__, usual(self, *args, grid=grid, warmup=True, **words)))

    runtime.JITFunction.run = compiled
    runtime.driver = SimpleNamespace(
        active=SimpleNamespace(
            get_current_device=lambda: card,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: triton.backends.compiler.GPUTarget("cuda", card, 32),
        )
    )
    try:
        inputs = kernel.example(sizes, dtype, torch.device("meta"))
        values = kernel.values(inputs, kernel.run(*inputs))
        if kernel.backward:
            values |= {f"d{name}": values[name] for name in kernel.outputs.split()}
            kernel.backward(*(values[name] for name in kernel.needs))
    finally:
        runtime.JITFunction.run, runtime.driver = usual, driver
    return found


def resources(made: Any, card: int) -> tuple[int, int, int, float, str]:
    """What a compiled launch takes of a multiprocessor.

    Returns registers of a thread, bytes a thread spills to memory for want of them, bytes of shared
    memory, the share of a multiprocessor's threads that can be there at once, and the tensor
    instructions in the code (- where none is asked).
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(made.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run(
            [tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True
        ).stdout
    found = (re.findall(rf"{name}:(\d+)", text)[0] for name in ("REG", "STACK", "LOCAL"))
    registers, stack, local = map(int, found)
    threads, shared = 32 * made.metadata.num_warps, made.metadata.shared
    blocks = min(
        65536 // (max(registers, 16) * threads),
        CARDS[card] * 1024 // max(shared, 1024),
        2048 // threads,
        32,
    )
    tensor = "-"
    if "tt.dot" in made.asm["ttir"]:
        tensor = " ".join(name for name in TENSOR if name in made.asm["ptx"]) or "none"
    return registers, stack + local, shared, blocks * threads / 2048, tensor


def compile_report(
    names: list[str], kinds: list[torch.dtype], cards: Sequence[int] = tuple(CARDS)
) -> list[str]:
    """Print registers, spilled bytes, shared memory and occupancy of all launches; returns those
    that are wrong.

    Wrong is what spills more than SPILLED bytes, wants more shared memory than the card has, or
    multiplies halves without tensor cores. A launch that only differs in numbers that the compiler
    does not see counts once.
    """
    print(
        f"{'':20} {'':8} {'card':>4} {'registers':>9} {'spilled':>7} {'shared':>7} {'occupancy':>9}  tensor cores"
    )
    wrong, seen = [], set()
    for name, kind, card in itertools.product(names, kinds, cards):
        ROOM[0] = CARDS[card]
        for sizes in KERNELS[name].sizes[1:]:
            for function, made in launches(KERNELS[name], sizes, kind, card):
                if (kind, made.hash) in seen:
                    continue
                seen.add((kind, made.hash))
                registers, spilled, shared, occupancy, tensor = resources(made, card)
                title = f"{function:20} {str(kind)[6:]:8} {card:4}"
                print(
                    f"{title} {registers:9} {spilled:7} {shared:7} {occupancy:9.0%}  {tensor}",
                    flush=True,
                )
                slow = kind != torch.float32 and tensor == "none"
                if spilled > SPILLED or shared > CARDS[card] * 1024 or slow:
                    wrong.append(title)
    return wrong


def check_all(names: list[str], device: torch.device) -> list[str]:
    """Print each kernel's error beside the library's in all types; returns the names of those that are wrong.

    A kernel is wrong whose error is more than twice that of the library's call, see `errors`.
    """
    wrong = []
    how = (
        "on the device"
        if device.type == "cuda"
        else "in the interpreter (which cannot round bfloat16)"
    )
    print(
        f"error against float64, as a multiple of the best library call's in the same\ntype, {how}"
    )
    for name in names:
        cells = []
        for kind in HALF.values() if device.type == "cuda" else (torch.float16, torch.float32):
            ratio, size = errors(KERNELS[name], KERNELS[name].sizes[0], kind, device)
            cells.append(f"{str(kind)[6:]} {ratio:5.2f} ({size:.0e})")
            wrong += [f"{name} in {kind}"] if not ratio <= 2 else []
        print(f"  {name:14} {'   '.join(cells)}", flush=True)
    return wrong


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


def main() -> None:
    o = options(Options, sys.argv[1:])
    require(
        triton is not None,
        "no Triton here: pip install triton (other files use the plain twins without it)",
    )
    names = o.only.split(",") if o.only else list(KERNELS)
    for name in names:
        require(name in KERNELS, f"--only={name}: there are {', '.join(KERNELS)}")
    require(not o.dtype or o.dtype in HALF, f"--dtype={o.dtype}: there are {', '.join(HALF)}")
    require(o.seconds > 0, f"--seconds={o.seconds}: wanted some")
    require(o.roofline or not o.plot, "--plot draws what --roofline finds: give both")
    drawn = not o.plot or importlib.util.find_spec("matplotlib")
    require(drawn, "--plot needs matplotlib: pip install matplotlib")
    if o.compile_report:
        hint = "unset TRITON_INTERPRET, for interpreted kernels cannot be compiled"
        require(not INTERPRETED.value, f"--compile_report: {hint}")
        wrong = compile_report(
            names, [HALF[o.dtype]] if o.dtype else [torch.bfloat16, torch.float32]
        )
        require(
            not wrong,
            f"{len(wrong)} launches spill, do not fit, or miss the tensor cores: {', '.join(wrong)}",
        )
        return
    torch.manual_seed(o.seed)
    device = pick_device(o.device)
    require(
        device.type in ("cpu", "cuda"),
        f"--device={o.device}: kernels run on cuda, their twins on cpu too",
    )
    cuda = device.type == "cuda"
    dtype = HALF[o.dtype or ("bfloat16" if cuda else "float32")]
    places = layers(o.shape, dtype, device) if o.roofline else {}
    cores = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if cuda else cores
    print(f"{machine}, torch {torch.__version__}, triton {triton.__version__}")
    wrong = check_all(names, device)
    top = limits(device, dtype)
    print(
        f"\nmeasured limits: {top[0] / 1e9:.0f} GB/s (copy), {top[1] / 1e12:.2f} TFLOP/s (product), {str(dtype)[6:]}"
    )
    points = []
    for name, (call, moved, work) in places.items():
        took = bench({name: call}, o.seconds / 5, device)[name][0]
        points.append((name, work / moved, work / took))
    if not cuda:
        print("times are of the plain twins: an interpreted kernel's time says nothing")
    print(HEAD)
    for name in names:
        for sizes in KERNELS[name].sizes[1 : 3 if cuda else 2]:
            try:
                points += show_times(KERNELS[name], sizes, dtype, device, o, top)
            except torch.OutOfMemoryError:
                print(f"{name} {' x '.join(map(str, sizes))} needs more memory than the device has")
    if o.roofline:
        roofline(points, top, o.plot)
    require(not wrong, f"wrong: {', '.join(wrong)}")


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


if __name__ == "__main__":
    run(main)
