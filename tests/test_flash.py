"""FlashAttention of kernels.py: the twin against an oracle written differently, the tiled form against the twin, and the
kernels against the twin in float64, with the error of torch's own call in the same precision as the yardstick."""
import math
import os
import random

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before kernels.py decorates anything
pytest.importorskip("triton")
import kernels  # noqa: E402
from kernels import flash, flash_backward, flash_tiled, flash_twin  # noqa: E402

HALF, FULL = (torch.bfloat16, torch.float16), torch.float32


@pytest.fixture(autouse=True)
def on_the_gpu():
    """Tensors are made where the kernels run."""
    with torch.device("cuda" if CUDA else "cpu"):
        yield


def tiles(monkeypatch, forward, dq=None, dkdv=None):
    """Let the kernels take these tiles: M, N, warps, loads in flight."""
    rows = forward, dq or forward, dkdv or forward
    monkeypatch.setattr(kernels, "FLASH", ((256, 2, 0, *rows), (256, 4, 0, *rows)))


def make(seed, B, H, group, T, S, hd, layout="bhtd"):
    """Doubles q, k, v, dout, dlse; layout "bthd": views whose heads lie inside, as a model's projections give them."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    shapes = (B, H * group, T, hd), (B, H, S, hd), (B, H, S, hd), (B, H * group, T, hd)
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    if layout == "bthd":
        made = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in made]
    return *made, torch.randn(B, H * group, T, generator=generator, dtype=torch.float64)


def firsts(kind, B, T, S, rng):
    """The first key each query sees, in the numbering of the keys (query t stands at key t + S - T)."""
    at = torch.arange(T) + S - T
    starts = torch.zeros(B, T, dtype=torch.int64)
    for b in range(B):
        for cut in sorted(rng.sample(range(T), min(T, 3))):
            starts[b, cut:] = max(0, cut + S - T)
    window = (at - rng.randint(0, T) + 1).clamp(min=0).expand(B, T)
    chosen = {"none": None, "window": window, "documents": starts, "both": torch.maximum(window, starts)}[kind]
    return None if chosen is None else chosen.int().contiguous()


def oracle(q, k, v, causal, first):
    """One query at a time, over the list of keys that it sees."""
    B, H, T, hd = q.shape
    S, group = k.shape[2], H // k.shape[1]
    out, lse = torch.zeros_like(q), torch.full((B, H, T), -math.inf, dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = range(0 if first is None else int(first[b, t]), min(S, t + S - T + 1) if causal else S)
                if len(seen):
                    scores = k[b, h // group, list(seen)] @ q[b, h, t] / math.sqrt(hd)
                    out[b, h, t] = scores.softmax(0) @ v[b, h // group, list(seen)]
                    lse[b, h, t] = math.log(sum(map(math.exp, scores.tolist())))
    return out, lse


def gradients(function, q, k, v, dout, dlse):
    """(out, lse), (dq, dk, dv) by autograd; where nothing is seen, lse has no gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out, lse = function(*leaves)
    total = (out * dout).sum()
    if lse is not None:
        total = total + (lse.masked_fill(lse == -math.inf, 0) * dlse).sum()
    return (out.detach(), lse), torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)


def library(q, k, v, causal, first):
    group, T, S = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    mask = kernels.may_see(torch.arange(T), torch.arange(S), S - T, causal, first)[:, :, 0]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), None


def far(a, b):
    """Largest difference, equal infinities counting as none."""
    return torch.where(a == b, 0, (a.double() - b.double()).abs()).max().item() if a.numel() else 0.0


def check_kernels(monkeypatch, seed, B, H, group, T, S, hd, causal, kind, dtype, layout="bhtd", tile=16):
    tiles(monkeypatch, (tile, tile, 4, 1))
    first = firsts(kind, B, T, S, random.Random(seed))
    given = [x.to(dtype) for x in make(seed, B, H, group, T, S, hd, layout)]
    exact = [x.double() for x in given]
    (out, lse), grads = gradients(lambda *x: flash_twin(*x, causal, first), *exact)
    q, k, v, dout, dlse = given
    got_out, got_lse = flash(q, k, v, causal, first)
    assert got_out.dtype == dtype and got_out.stride() == q.stride() and got_lse.dtype == torch.float32
    got = flash_backward(dout, dlse.float(), q, k, v, got_out, got_lse, causal, first)
    assert all(x.dtype == dtype and x.shape == y.shape for x, y in zip(got, (q, k, v)))
    floor = (4 if dtype == FULL else 1) * torch.finfo(dtype).eps
    scale = max([1.0] + [x.abs().max().item() for x in (out, *grads) if x.numel()])
  # lse is no output of the library's: its own rounding in float32 is the measure, and so are dq, dk with its gradient
    assert far(got_lse, lse) <= 1e-5
    (lib_out, _), lib = gradients(lambda *x: library(*x, causal, first), *given)
    (_, _), bare = gradients(lambda *x: (flash_twin(*x, causal, first)[0], None), *exact)
    bare_got = flash_backward(dout, None, q, k, v, got_out, got_lse, causal, first)
    for ours, theirs, truth in zip((got_out, *bare_got), (lib_out, *lib), (out, *bare)):
        assert far(ours, truth) <= 2 * far(theirs.nan_to_num(), truth) + floor * scale
    for ours, truth in zip(got, grads):
        assert far(ours, truth) <= 8 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("kind", ("none", "window", "documents", "both"))
def test_twin_and_tiled_in_doubles(causal, kind):
    for seed, (T, S) in enumerate(((1, 1), (13, 13), (7, 19), (1, 9), (3, 50), (0, 4))):
        B, H, group, hd = 2, 2, 1 + seed % 3, (1, 5, 16)[seed % 3]
        q, k, v, dout, dlse = make(seed, B, H, group, T, S, hd, ("bhtd", "bthd")[seed % 2])
        first = firsts(kind, B, T, S, random.Random(seed))
        (out, lse), grads = gradients(lambda *x: flash_twin(*x, causal, first), q, k, v, dout, dlse)
        true_out, true_lse = oracle(q, k, v, causal, first)
        assert far(out, true_out) < 1e-12 and far(lse, true_lse) < 1e-12
        for block in (3, 128):
            tiled, tiled_lse = flash_tiled(q, k, v, causal, first, block)
            assert far(tiled, out) < 1e-12 and far(tiled_lse, lse) < 1e-12


def test_types_of_twin_and_tiled():
    q, k, v, dout, _ = (x.bfloat16() for x in make(0, 1, 2, 1, 5, 5, 8))
    for function in (flash_twin, flash_tiled):
        out, lse = function(q, k, v)
        assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32


SHAPES = [  # B, H_kv, group, T, S, hd, causal, kind, type, layout
    (1, 1, 1, 1, 1, 1, True, "none", FULL, "bhtd"), (0, 1, 1, 5, 5, 16, True, "window", FULL, "bhtd"),
    (1, 1, 1, 0, 5, 16, True, "none", FULL, "bhtd"), (1, 1, 1, 5, 0, 16, False, "none", FULL, "bhtd"),
    (1, 1, 2, 37, 37, 17, True, "none", FULL, "bthd"), (1, 1, 1, 37, 53, 16, True, "both", FULL, "bhtd"),
    (1, 1, 1, 31, 31, 64, False, "none", torch.bfloat16, "bthd"),
    (2, 1, 1, 17, 33, 80, True, "documents", HALF[1], "bhtd"),
    (1, 1, 1, 16, 16, 256, True, "none", torch.bfloat16, "bhtd"), (1, 1, 1, 11, 5, 16, False, "none", FULL, "bhtd"),
    (1, 1, 1, 48, 48, 16, True, "window", torch.bfloat16, "bhtd"), (1, 2, 1, 1, 19, 8, True, "none", FULL, "bthd")]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels(monkeypatch, shape):
    *sizes, layout = shape
    check_kernels(monkeypatch, 1, *sizes, layout)


@pytest.mark.parametrize("seed", [pytest.param(s, marks=pytest.mark.slow if s > 7 else []) for s in range(60)])
def test_kernels_sweep(monkeypatch, seed):
    rng = random.Random(1000 + seed)
    T = rng.choice((1, 2, 3, 7, 13, 16, 17, 23, 31, 32, 37))
    S = T + rng.choice((0, 0, 1, 5, 16, 20))
    sizes = rng.choice((1, 1, 2)), rng.choice((1, 1, 2)), rng.choice((1, 1, 2)), T, S
    hd = rng.choice((1, 3, 8, 16, 17, 24, 64, 80, 128))
    check_kernels(monkeypatch, seed, *sizes, hd, rng.random() < 0.7,
                  rng.choice(("none", "window", "documents", "both")), rng.choice((FULL, *HALF)),
                  rng.choice(("bhtd", "bthd")), tile=rng.choice((16, 16, 32)))


def test_unequal_tiles(monkeypatch):
    """The bounds of the loops with tiles of queries larger and smaller than those of keys."""
    q, k, v, dout, _ = (x.float() for x in make(5, 1, 1, 1, 35, 40, 8))
    for causal, kind in ((True, "both"), (False, "window")):
        first = firsts(kind, 1, 35, 40, random.Random(3))
        (out, lse), grads = gradients(lambda *x: (flash_twin(*x, causal, first)[0], None), q, k, v, dout, None)
        for sizes in ((16, 32, 4, 1), (32, 16, 4, 1)):
            tiles(monkeypatch, sizes)
            got, stats = flash(q, k, v, causal, first)
            assert far(got, out) < 3e-6
            back = flash_backward(dout, None, q, k, v, got, stats, causal, first)
            assert all(far(x, y) < 1e-5 for x, y in zip(back, grads))


@pytest.mark.parametrize("hd,dtype", ((64, torch.bfloat16), (128, torch.bfloat16), (256, torch.bfloat16), (64, FULL)))
def test_own_tiles(hd, dtype):
    """The tile sizes of the file itself, ragged at the end."""
    q, k, v, dout, _ = (x.to(dtype) for x in make(7, 1, 1, 1, 70, 75, hd))
    exact = [x.double() for x in (q, k, v, dout)]
    (out, _), grads = gradients(lambda *x: (flash_twin(*x)[0], None), *exact, None)
    got, stats = flash(q, k, v, True, None)
    back = flash_backward(dout, None, q, k, v, got, stats, True, None)
    error = 0.05 if dtype in HALF else 1e-5
    assert far(got, out) < error and all(far(x, y) < error for x, y in zip(back, grads))


def test_nothing_seen_gives_zeros(monkeypatch):
    """first beyond the diagonal: out 0, lse -inf, no gradient; neighbours unharmed."""
    tiles(monkeypatch, (16, 16, 4, 1))
    q, k, v, dout, dlse = (x.float() for x in make(2, 1, 1, 1, 20, 20, 16))
    first = torch.tensor([[0] * 8 + [18] * 12]).int()  # queries 8 .. 17 see nothing
    (out, lse), grads = gradients(lambda *x: flash_twin(*x, True, first), q, k, v, dout, dlse)
    got, got_lse = flash(q, k, v, True, first)
    assert not got[0, 0, 8:18].any() and (got_lse[0, 0, 8:18] == -math.inf).all()
    assert far(got, out) < 3e-6 and far(got_lse, lse) < 3e-6
    back = flash_backward(dout, dlse, q, k, v, got, got_lse, True, first)
    assert all(far(x, y) < 1e-5 for x, y in zip(back, grads)) and not back[0][0, 0, 8:18].any()


def test_strange_strides(monkeypatch):
    """A last stride other than 1 is copied; slices of one fused projection are read in place."""
    tiles(monkeypatch, (16, 16, 4, 1))
    fused = torch.randn(1, 9, 3, 2, 8)
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))  # (1, 2, 9, 8)
    out, lse = flash(q, k, v, True, None)
    assert far(out, flash_twin(q, k, v)[0]) < 3e-6
    _, grads = gradients(lambda *x: (flash_twin(*x)[0], None), q, k, v, torch.ones(()), None)
    back = flash_backward(torch.ones(()).expand_as(out), None, q, k, v, out, lse, True, None)
    assert all(far(x, y) < 1e-5 for x, y in zip(back, grads))
    turned = q.transpose(2, 3).contiguous().transpose(2, 3)
    assert far(flash(turned, k, v, True, None)[0], out) < 1e-6


def test_not_a_number_spreads_to_its_row_only(monkeypatch):
    tiles(monkeypatch, (16, 16, 4, 1))
    q, k, v, _, _ = (x.float() for x in make(3, 1, 1, 1, 20, 20, 16))
    q[0, 0, 5, 3] = math.nan
    out, lse = flash(q, k, v, True, None)
    assert out[0, 0, 5].isnan().all() and lse[0, 0, 5].isnan() and out.isnan().sum() == 16


def test_offsets_beyond_32_bits(monkeypatch):
    """A head that starts beyond 2^31 elements, by a stride over untouched memory."""
    tiles(monkeypatch, (16, 16, 4, 1))
    far_away = torch.empty(2**31 + 2**12, dtype=torch.bfloat16)  # 4 GiB of addresses, hardly any memory
    q = far_away.as_strided((1, 2, 5, 8), (0, 2**31 + 64, 8, 1))
    q.copy_(torch.randn(1, 2, 5, 8))
    out, _ = flash(q, q, q, True, None)
    assert far(out, flash_twin(q.clone(), q.clone(), q.clone())[0]) < 0.02


def test_what_is_refused():
    x = torch.randn(1, 4, 8, 16)
    for inputs, message in (
        ((x, x[:, :3], x[:, :3], True, None), "do not fit"),
        ((x, x, x[..., :8], True, None), "do not fit"),
        ((x, x.half(), x, True, None), "differ in type"),
        ((x, x[:, :, :5], x[:, :, :5], True, None), "8 queries for 5 keys"),
        ((torch.randn(1, 1, 2, 257),) * 3 + (True, None), "at most 256"),
        ((x, x, x, True, torch.zeros(1, 5, dtype=torch.int32)), "one key for each query"),
        ((x.double(),) * 3 + (True, None), "no kernel for torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.KERNELS["flash"](*inputs)


def test_a_window_and_documents_are_one_tensor():
    """first says what Plain's mask says, for windows, documents and both."""
    torch.manual_seed(0)
    q = torch.randn(2, 2, 12, 8, dtype=torch.float64)
    at = torch.arange(12)
    start = torch.tensor([[0] * 5 + [5] * 7, [0] * 9 + [9] * 3])
    first = torch.maximum(start, at - 3)  # a window of four
    mask = (at[:, None] >= at) & (at[:, None] - at < 4) & (at >= start[..., None])
    theirs = F.scaled_dot_product_attention(q, q, q, mask[:, None])
    torch.testing.assert_close(flash_twin(q, q, q, True, first.int())[0], theirs)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation gives"""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.nbytes)
        return found


def test_memory_of_the_tiled_form_is_linear_in_the_length():
    largest = {}
    for function in (flash_tiled, flash_twin):
        for T in (256, 512, 1024):
            x = torch.randn(1, 1, T, 64)
            with Largest() as mode:
                function(x, x, x)
            largest[function, T] = mode.bytes
    assert largest[flash_tiled, 1024] == 4 * largest[flash_tiled, 256] == 1024 * 64 * 4
    assert largest[flash_twin, 1024] == 16 * largest[flash_twin, 256]  # the whole matrix of scores
