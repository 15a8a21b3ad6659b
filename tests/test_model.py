"""model.py against torch's own layers, models written in another way, published counts, and invariants over all its keys.

Everything runs in float64 unless a test says otherwise, so that what is equal on paper is equal to 1e-9 here.
"""
import dataclasses
import functools
import itertools
import json
import math
import os
import pickle
import re
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import model
from model import GPT, Config

OLDER = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)  # whose attention on the CPU is fused less often
TINY = dict(vocab_size=23, block_size=16, n_layer=2, n_head=4, n_embd=16)
GPT2 = dict(norm="layernorm", position="learned", ffn="gelu", qk_norm=False, init="gpt2", norm_eps=1e-5)
WINDOW = dict(mixer="window", window=4)
HYBRID = dict(mixer="window,attention", window=4)
RECURRENT = ("linear", "mamba2", "gdn")


@pytest.fixture(autouse=True)
def double():
    """float64, a fixed seed and one thread (tiny tensors only wait for a second one) in every test."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)


@pytest.fixture
def single(double):
    """float32, the dtype of training."""
    torch.set_default_dtype(torch.float32)


def make(**changes):
    """A tiny model whose every parameter is far from zero, so that nothing is hidden by an initialisation."""
    gpt = GPT(Config(**{**TINY, **changes}))
    with torch.no_grad():
        for weight in gpt.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    if gpt.config.counts:
        count(gpt)
    return gpt.eval()


def count(gpt):
    """Fill a model's counts of n-grams from a short text; returns what counted them."""
    text = torch.randint(gpt.config.vocab_size, (150,)) * torch.randint(2, (150,))
    found = data.train_ngrams(text.numpy(), gpt.config.vocab_size, gpt.config.counts)
    gpt.counts.fill({name: torch.from_numpy(getattr(found, name)) for name, _ in gpt.counts.named_buffers()})
    return found


def tiled(config):
    """The mixer of each layer."""
    names = config.mixer.split(",")
    return [names[layer % len(names)] for layer in range(config.n_layer)]


def fresh(gpt):
    """The state of a pass that has no past and keeps nothing."""
    return gpt.new_state(1, 0)


def call_of(gpt, ids, state=None):
    """What the layers are told in a call for these ids."""
    state = state or fresh(gpt)
    _, at, place = gpt.look(ids, state)
    return model.Call(ids, at, place, gpt.position.turn(place), state)


def tokens(batch=3, T=12, vocab=23):
    return torch.randint(vocab, (batch, T))


def loss_of(gpt, x):
    return F.cross_entropy(gpt(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


def close(a, b, tolerance=1e-9):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= tolerance, (a - b).abs().max()


# every key of every axis alone, then the pairs that interact
SINGLES = [{}, *({axis: key} for axis, table in model.AXES.items() for key in list(table)[1:]
                  if key not in ("window", "strided", "mup"))]
SINGLES += [WINDOW, dict(mixer="strided", window=3), dict(init="mup", tie_embeddings=False, base_width=8), dict(ngram=4, ngram_rows=97), dict(counts=4), dict(softcap=2.0), dict(n_kv_head=1), dict(n_expert=5, n_inner=8), dict(n_inner=20), dict(bias=True), dict(qk_norm=False), dict(tie_embeddings=False),
            dict(qkv_bias=True), GPT2, dict(GPT2, bias=True), dict(n_layer=5, **HYBRID)]
PAIRS = [dict(position=position, n_kv_head=2, head_dim=6, **HYBRID) for position in model.POSITIONS]
PAIRS += [dict(position=position, qk_norm=False, **WINDOW) for position in model.POSITIONS]
PAIRS += [dict(mixer=f"{mixer},attention", head_dim=6, placement=placement, bias=True, norm="layernorm")
          for mixer, placement in zip(RECURRENT, ("post", "reordered", "parallel"))]
PAIRS += [dict(norm=norm, placement=placement, bias=True) for norm in model.NORMS for placement in model.PLACEMENTS]
PAIRS += [dict(ffn=ffn, bias=True, placement="post", position="learned") for ffn in model.FFNS]
PAIRS += [dict(counts=1, softcap=2.0), dict(counts=3, counts_weight=0.9, ngram=3, ngram_rows=97, mixer="gdn,window", window=3, end_token=3)]
PAIRS += [dict(mixer="valued,window", window=3, ngram=3, ngram_rows=97, softcap=30.0, n_kv_head=2, tie_embeddings=False),
          dict(mixer="valued", n_kv_head=1, head_dim=6, bias=True, norm="layernorm", position="none"),
          dict(mixer="gdn", ngram=2, ngram_rows=97, placement="parallel")]
PAIRS += [dict(placement="sandwich", norm="gainless", residual="scaled", ngram=2, ngram_rows=97, mixer="strided,valued", window=2),
          dict(residual="scaled", placement="parallel", position="learned")]
PAIRS += [dict(position=f"{position},none", n_layer=3, mixer="attention,gdn") for position in ("rope", "learned")]
PAIRS += [dict(end_token=3, mixer=mixer, n_kv_head=2, position=position, ngram=ngram, ngram_rows=97)
          for mixer, position, ngram in (("attention", "rope", 0), ("valued,linear", "learned", 3), ("gdn,mamba2", "sinusoidal", 2))]
PAIRS += [dict(end_token=5, mixer="window,strided", window=3, residual="scaled"), dict(mixer="latent,window", window=3, latent=6, bias=True),
          dict(mixer="latent", position="none", qk_norm=False, norm="layernorm", end_token=2), dict(recompute=True, mixer="mamba2,latent")]
PAIRS += [dict(n_expert=3, n_expert_active=1, n_expert_shared=2, ffn="gelu", n_inner=8, balance_bias=0.01, balance_loss=0.0, placement="post"),
          dict(n_expert=4, n_expert_active=4, n_inner=4, mixer="gdn", placement="parallel")]
PAIRS += [dict(attention_softcap=1.5, mixer="latent,attention", n_kv_head=2, end_token=3), dict(attention_softcap=0.7, **WINDOW)]
VARIANTS = {",".join(f"{k}={v}" for k, v in changes.items()) or "default": changes for changes in SINGLES + PAIRS}
some = {name: changes for name, changes in VARIANTS.items() if changes in SINGLES + PAIRS[::3]}
some_variants = pytest.mark.parametrize("changes", some.values(), ids=some.keys())
every_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())


# ------------------------------------------------------------------------------- each operation: plain, fast, torch's own

def results(function, inputs):
    """Output and gradients of `function` under a fixed upstream gradient."""
    inputs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    y = function(*inputs)
    y.backward(torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y))
    return [y.detach(), *(x.grad for x in inputs if x.requires_grad)]


def agree(functions, inputs, tolerance=1e-11):
    first, *others = [results(function, inputs) for function in functions]
    for other in others:
        for a, b in zip(first, other, strict=True):
            close(a, b, tolerance)


def with_weights(module, *names):
    """module(x) as a function of x and its parameters."""
    return lambda x, *weights: torch.func.functional_call(module, dict(zip(names, weights)), x)


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias):
    inputs = [torch.randn(2, 5, 7), torch.randn(3, 7)] + [torch.randn(3)] * bias
    agree([with_weights(kind(7, 3, bias=bias), "weight", "bias") for kind in (model.Linear, nn.Linear)], inputs)


def test_embedding():
    inputs = [torch.tensor([[0, 4, 4], [1, 2, 0]]), torch.randn(6, 5)]
    agree([with_weights(module, "weight") for module in (model.Embedding(5, 6), nn.Embedding(6, 5))], inputs)


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rms_norm(eps):
    own = [lambda x, w, ops=ops: ops.norm(x, w, None, eps, False) for ops in (model.Plain, model.Fast)]
    agree([*own, with_weights(nn.RMSNorm(6, eps=eps), "weight"), with_weights(model.NORMS["rmsnorm"](Config(norm_eps=eps), 6), "weight")],
          [torch.randn(2, 3, 6) + 1, torch.randn(6)])
    own = [lambda x, ops=ops: ops.norm(x, None, None, eps, False) for ops in (model.Plain, model.Fast)]
    agree([*own, nn.RMSNorm(6, eps=eps, elementwise_affine=False), model.NORMS["gainless"](Config(norm_eps=eps), 6)], [torch.randn(2, 3, 6) + 1])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_layer_norm(bias, eps):
    inputs = [torch.randn(2, 3, 6) + 1, torch.randn(6)] + [torch.randn(6)] * bias
    own = [lambda x, w, b=None, ops=ops: ops.norm(x, w, b, eps, True) for ops in (model.Plain, model.Fast)]
    norm = model.NORMS["layernorm"](Config(norm_eps=eps, bias=bias), 6)
    assert [name for name, _ in norm.named_parameters()] == ["weight", "bias"][:1 + bias]
    agree([*own, with_weights(nn.LayerNorm(6, eps=eps, bias=bias), "weight", "bias"), with_weights(norm, "weight", "bias")], inputs)


def test_softmax_of_huge_scores():
    q, v = torch.tensor([[[[1e4, 0.0]]]]), torch.randn(1, 1, 4, 2)
    k = torch.tensor([[[[1e4, 1.0], [1e4, 2.0], [-1e4, 0.0], [0.0, 0.0]]]])
    for ops in (model.Plain, model.Fast):
        close(ops.attention(q, k, v, None), v[:, :, :2].mean(2, keepdim=True))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("T,S,masked", [(5, 5, None), (1, 5, None), (1, 1, None), (5, 5, "rows"), (2, 5, "shared"), (1, 5, "shared")])
def test_attention_as_an_operation(kv_heads, T, S, masked):
    q, k, v = torch.randn(2, 4, T, 6), torch.randn(2, kv_heads, S, 6), torch.randn(2, kv_heads, S, 6)
    mask = {None: None, "rows": torch.rand(2, 1, T, S) < 0.5, "shared": torch.rand(T, S) < 0.5}[masked]
    if masked:
        mask[..., 0] = True  # a query that sees nothing has no softmax

    def sees(b, t, s):
        return s <= t + S - T if mask is None else bool(mask.expand(2, 1, T, S)[b, 0, t, s])

    agree([lambda q, k, v, ops=ops: ops.attention(q, k, v, mask) for ops in (model.Plain, model.Fast)]
          + [lambda q, k, v: attention_by_loops(q, k, v, sees)], [q, k, v])


@some_variants
def test_plain_model_equals_fast_model(changes, monkeypatch):
    gpt, x = make(**changes), tokens(T=9)
    names = [name for name, _ in gpt.named_parameters()]

    def logits(*weights):
        return torch.func.functional_call(gpt, dict(zip(names, weights)), x)

    fast = results(logits, gpt.parameters())
    monkeypatch.setattr(model, "ops", model.Plain)
    for a, b in zip(fast, results(logits, gpt.parameters()), strict=True):
        close(a, b)


@pytest.mark.parametrize("T,S,masked", [(5, 5, False), (1, 5, False), (2, 5, True)])
def test_soft_capped_attention(T, S, masked):
    q, k, v = torch.randn(2, 4, T, 6), torch.randn(2, 2, S, 6), torch.randn(2, 2, S, 6)
    seen = torch.ones(T, S).tril(S - T).bool()
    seen[1:, :2] = seen[1:, :2] & (not masked)

    def theirs(q, k, v):
        scores = torch.einsum("bgrtd,bgsd->bgrts", q.unflatten(1, (2, 2)), k) / math.sqrt(6)
        capped = 0.8 * torch.tanh(scores / 0.8)
        chances = F.softmax(torch.where(seen, capped, -torch.inf), -1)
        return torch.einsum("bgrts,bgsd->bgrtd", chances, v).flatten(1, 2)

    own = [lambda q, k, v, ops=ops: ops.attention(q, k, v, seen if masked else None, 0.8) for ops in (model.Plain, model.Fast)]
    agree([*own, theirs], [q, k, v])


def attention_by_loops(q, k, v, sees):
    """One query at a time: sees(b, t, s) says whether the query t of row b looks at key s."""
    B, H, T, hd = q.shape
    rows = []
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        group = h // (H // k.shape[1])
        seen = [s for s in range(k.shape[2]) if sees(b, t, s)]
        scores = torch.stack([q[b, h, t] @ k[b, group, s] for s in seen]) / math.sqrt(hd)
        weights = scores.exp() / scores.exp().sum()
        rows.append(sum(w * v[b, group, s] for w, s in zip(weights, seen)))
    return torch.stack(rows).view(B, H, T, hd)


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("mixer", ["attention", "window", "strided", "valued"])
@pytest.mark.parametrize("past", [0, 3])
def test_attention(n_kv_head, mixer, past):
    """A layer of attention as loops over queries, in a call that has no past and in one that has."""
    gpt = make(n_layer=1, n_kv_head=n_kv_head, mixer=mixer, window=2 * (mixer in ("window", "strided")), position="none", qk_norm=False)
    layer, x, ids = gpt.blocks[0].mixer, torch.randn(2, 7, 16), tokens(2, 7)
    q, k, v = layer.qkv(x).view(2, 7, -1, 4).transpose(1, 2).split((4, n_kv_head, n_kv_head), 1)
    if mixer == "valued":
        v = v + layer.values[0].weight[ids].view(2, 7, n_kv_head, 4).transpose(1, 2)
    y = attention_by_loops(q, k, v, lambda b, t, s: 0 <= t - s < (2 if mixer == "window" else 7) and (mixer != "strided" or t - s in (0, 1, 2, 4, 6)))
    expected = y.transpose(1, 2).reshape(2, 7, 16) @ layer.out.weight.T
    state, parts = gpt.new_state(2, 7) if past else fresh(gpt), []
    for ids_, x_ in zip(ids.split(past or 7, 1), x.split(past or 7, 1)):
        parts.append(layer(x_, call_of(gpt, ids_, state), 0))
        state.lengths = [state.lengths[0] + x_.shape[1]] * len(state.lengths)
    close(torch.cat(parts, 1), expected)


def test_gradients_by_finite_differences():
    gpt = make(n_layer=1, n_kv_head=2, **WINDOW)
    gpt.requires_grad_(False)
    x = torch.randn(1, 6, 16, requires_grad=True)
    ids, block = tokens(1, 6), gpt.blocks[0]
    assert torch.autograd.gradcheck(lambda x: block(x, x, call_of(gpt, ids), 0), [x])


# -------------------------------------------------------------------------------- whole models, written in another way

class TorchGPT2(nn.Module):
    """GPT-2 out of torch.nn's modules."""

    def __init__(self, c, bias):
        super().__init__()
        self.c = c
        self.wte, self.wpe = nn.Embedding(c.vocab_size, c.n_embd), nn.Embedding(c.block_size, c.n_embd)
        self.layers = nn.ModuleList(nn.ModuleDict(dict(
            ln1=nn.LayerNorm(c.n_embd, bias=bias), attn=nn.Linear(c.n_embd, 3 * c.n_embd, bias=bias),
            proj=nn.Linear(c.n_embd, c.n_embd, bias=bias), ln2=nn.LayerNorm(c.n_embd, bias=bias),
            fc=nn.Linear(c.n_embd, 4 * c.n_embd, bias=bias), fc2=nn.Linear(4 * c.n_embd, c.n_embd, bias=bias),
            gelu=nn.GELU("tanh"))) for _ in range(c.n_layer))
        self.ln = nn.LayerNorm(c.n_embd, bias=bias)

    def forward(self, ids):
        B, T = ids.shape
        x = self.wte(ids) + self.wpe.weight[:T]
        for layer in self.layers:
            q, k, v = layer.attn(layer.ln1(x)).view(B, T, 3, self.c.n_head, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + layer.proj(y.transpose(1, 2).flatten(2))
            x = x + layer.fc2(layer.gelu(layer.fc(layer.ln2(x))))
        return self.ln(x) @ self.wte.weight.T


@pytest.mark.parametrize("bias", [False, True])
def test_gpt2_equals_torch_modules(bias):
    ours = make(**GPT2, bias=bias)
    theirs = TorchGPT2(ours.config, bias)
    name = {"embedding": "wte", "position.table": "wpe", "norm": "ln"}
    inside = {"norm1": "ln1", "norm2": "ln2", "mixer.qkv": "attn", "mixer.out": "proj", "ffn.up": "fc", "ffn.down": "fc2"}
    name |= {f"blocks.{i}.{a}": f"layers.{i}.{b}" for i in range(2) for a, b in inside.items()}
    pairs = {own: f"{name[own.rsplit('.', 1)[0]]}.{own.rsplit('.', 1)[1]}" for own, _ in ours.named_parameters()}
    theirs.load_state_dict({theirs_: ours.get_parameter(own).detach() for own, theirs_ in pairs.items()})
    x = tokens(T=16)
    close(ours(x), theirs(x))
    loss_of(ours, x).backward()
    loss_of(theirs, x).backward()
    for own, other in pairs.items():
        close(ours.get_parameter(own).grad, theirs.get_parameter(other).grad)


def default_by_hand(gpt, ids):
    """The default model (rope, RMSNorm before, QK-norm, SwiGLU) with rope as a product of complex numbers."""
    c, T = gpt.config, ids.shape[1]
    p = dict(gpt.named_parameters())
    hd = c.n_embd // c.n_head

    def rms(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    def turned(x):  # (B, T, H, hd)
        speed = torch.tensor([c.rope_base ** (-2 * i / hd) for i in range(hd // 2)])
        turn = torch.polar(torch.ones(T, hd // 2), torch.arange(T)[:, None] * speed)[:, None]
        z = torch.complex(x[..., :hd // 2], x[..., hd // 2:]) * turn
        return torch.cat((z.real, z.imag), -1)

    x = p["embedding.weight"][ids]
    for i in range(c.n_layer):
        w = {name.removeprefix(f"blocks.{i}."): weight for name, weight in p.items()}
        kv = c.n_kv_head or c.n_head
        q, k, v = (rms(x, w["norm1.weight"]) @ w["mixer.qkv.weight"].T).unflatten(-1, (-1, hd)).split((c.n_head, kv, kv), 2)
        q, k = turned(rms(q, w["mixer.q_norm.weight"])), turned(rms(k, w["mixer.k_norm.weight"]))
        k, v = (t.repeat_interleave(c.n_head // kv, 2) for t in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / hd**0.5 + torch.full((T, T), -torch.inf).triu(1)
        x = x + torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2) @ w["mixer.out.weight"].T
        gate, up = (rms(x, w["norm2.weight"]) @ w["ffn.up.weight"].T).chunk(2, -1)
        x = x + (gate * torch.sigmoid(gate) * up) @ w["ffn.down.weight"].T
    return rms(x, p["norm.weight"]) @ p["embedding.weight"].T


@pytest.mark.parametrize("changes", [{}, dict(n_kv_head=2), dict(n_kv_head=1, rope_base=100.0)])
def test_default_model_equals_formulas(changes):
    gpt, x = make(**changes), tokens(T=16)
    close(gpt(x), default_by_hand(gpt, x))


@pytest.mark.parametrize("placement", model.PLACEMENTS)
def test_placements_by_hand(placement):
    gpt, x = make(placement=placement, n_layer=1, position="none", ffn="gelu"), tokens()
    block, h = gpt.blocks[0], gpt.embedding.weight[x]

    def mix(h):
        return block.mixer(h, call_of(gpt, x), 0)

    if placement == "pre":
        h = h + mix(block.norm1(h))
        h = h + block.ffn(block.norm2(h))
    elif placement == "post":
        h = block.norm1(h + mix(h))
        h = block.norm2(h + block.ffn(h))
    elif placement == "sandwich":
        h = h + block.last_norm1(mix(block.norm1(h)))
        h = h + block.last_norm2(block.ffn(block.norm2(h)))
    elif placement == "reordered":
        h = h + block.norm1(mix(h))
        h = h + block.norm2(block.ffn(h))
    else:
        h = h + mix(block.norm1(h)) + block.ffn(block.norm2(h))
    if placement == "post":  # no norm after the last block
        assert not list(gpt.norm.parameters())
    else:
        h = gpt.norm(h)
    close(gpt(x), h @ gpt.head.weight.T)


@pytest.mark.parametrize("key,f", [
    ("relu", lambda x: x.clamp(min=0)), ("relu2", lambda x: x.clamp(min=0) ** 2),
    ("gelu", lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    ("swiglu", lambda x: x[..., :24] / (1 + torch.exp(-x[..., :24])) * x[..., 24:]),
    ("geglu", lambda x: F.gelu(x[..., :24], approximate="tanh") * x[..., 24:])])
def test_feed_forward(key, f):
    gpt, x = make(ffn=key, n_inner=24, bias=True), torch.randn(2, 3, 16)
    ffn = gpt.blocks[0].ffn
    close(ffn(x), f(x @ ffn.up.weight.T + ffn.up.bias) @ ffn.down.weight.T + ffn.down.bias)


def experts_by_loops(layer, x, active, f):
    """One token and one expert at a time; also the share of the tokens and the mean probability of each expert."""
    flat, E = x.flatten(0, 1), len(layer.router.weight)
    shares = (flat @ layer.router.weight.T).softmax(1)
    y, load = [], torch.zeros(E)
    for token, share in zip(flat, shares):
        best = sorted(range(E), key=lambda e: -float(share[e] + layer.bias[e]))[:active]
        load[best] += 1
        out = sum(share[e] * (layer.down["weight"][e] @ f(layer.up["weight"][e] @ token)) for e in best) / sum(share[e] for e in best)
        y.append(out + layer.shared(token))
    return torch.stack(y).view_as(x), load / load.sum(), shares.mean(0)


@pytest.mark.parametrize("E,active,shared", [(4, 2, 0), (5, 1, 1), (3, 3, 2), (8, 2, 0)])
def test_experts_by_loops(E, active, shared):
    gpt = make(n_expert=E, n_expert_active=active, n_expert_shared=shared, ffn="relu2", n_inner=8, balance_loss=0.3, router_z=0.2)
    layer, x = gpt.blocks[0].ffn.train(), torch.randn(2, 7, 16)
    layer.bias.copy_(0.1 * torch.randn(E))
    y, load, mean = experts_by_loops(layer, x, active, lambda h: h.clamp(min=0) ** 2)
    close(layer(x), y)
    z = (x @ layer.router.weight.T).exp().sum(-1).log().pow(2).mean()
    close(layer.loss, 0.3 * E * (load * mean).sum() + 0.2 * z)
    close(layer.counts / layer.counts.sum(), load)
    assert layer.counts.sum() == 14 * active
    layer.eval()(x)
    assert layer.loss == 0


def test_grouped_products():
    x, weight, ends = torch.randn(9, 4), torch.randn(4, 3, 4), torch.tensor([2, 2, 7, 9])
    parts = [x[:2] @ weight[0].T, x[2:7] @ weight[2].T, x[7:] @ weight[3].T]
    close(model.grouped(x, weight, ends), torch.cat(parts))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: model.grouped(x, weight, ends), [x, weight])


@pytest.mark.parametrize("changes", [dict(balance_loss=0.1), dict(balance_loss=0.0, balance_bias=0.02), dict(balance_loss=0.0)])
def test_balance(changes, single):
    """Tokens that at first all choose one expert: both remedies spread them, and without one they stay."""
    torch.manual_seed(0)
    gpt = GPT(Config(**{**TINY, "n_layer": 1}, n_expert=4, n_expert_active=1, n_inner=8, router_z=0.0, **changes))
    layer = gpt.blocks[0].ffn
    x = torch.randn(1, 256, 16) + 1
    with torch.no_grad():
        layer.router.weight[0] += 0.05
    optimizer = torch.optim.SGD([layer.router.weight], lr=0.1)
    loads = []
    for _ in range(100):
        layer(x)
        loads.append(layer.counts / layer.counts.sum())
        if changes["balance_loss"]:
            optimizer.zero_grad()
            layer.loss.backward()
            optimizer.step()
    busiest = sum(loads[-20:]).max() / 20
    assert busiest < 0.4 if changes["balance_loss"] or "balance_bias" in changes else busiest > 0.6
    assert gpt.extra_loss() == layer.loss


def test_gated_width_gives_the_parameters_of_the_plain_form():
    for n_embd in (64, 128, 768, 4096):
        gated, plain = Config(n_embd=n_embd), Config(n_embd=n_embd, ffn="relu")
        assert gated.inner % 8 == 0 and abs(3 * gated.inner / (2 * plain.inner) - 1) < 0.1
    assert [Config(n_embd=n).inner for n in (64, 128, 768)] == [176, 344, 2048]  # 8/3 n_embd, up to a multiple of 8
    assert Config(n_inner=77).inner == Config(n_inner=77, ffn="relu").inner == 77


# ----------------------------------------------------------------------------------------------------------- positions

def test_rope_scores_depend_on_distance_only():
    gpt = make(block_size=40)
    q, k = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4)

    def score(i, j):
        return (gpt.position.turn(torch.tensor([i]))(q) * gpt.position.turn(torch.tensor([j]))(k)).sum()

    for distance in (0, 1, 7):
        for j in (0, 5, 30):
            close(score(j + distance, j), score(distance, 0))
    assert abs(score(3, 0) - score(4, 0)) > 1e-3
    close(score(0, 0), (q * k).sum())  # position 0 turns nothing


def test_rope_keeps_lengths_and_knows_rows():
    turn, x = make().position.turn, torch.randn(2, 4, 3, 4)  # (B, T, H, hd)
    at = torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8]])
    y = turn(at)(x)
    close(y.norm(dim=-1), turn(at[1])(x).norm(dim=-1))
    for row in range(2):
        close(y[row:row + 1], turn(at[row])(x[row:row + 1]))


def test_rope_is_exact_at_far_positions(single):
    gpt = GPT(Config(block_size=20001, n_embd=8, n_head=1, n_layer=1))
    cos, sin = gpt.position.table[:, 20000]
    for i in range(4):
        angle = 20000 * 10000.0 ** (-2 * i / 8)
        assert abs(cos[i] - math.cos(angle)) < 1e-6 and abs(sin[i + 4] - math.sin(angle)) < 1e-6
    assert cos.dtype == torch.float32


def test_a_larger_base_of_rope_reaches_further(single):
    """Beyond the block that it was trained with, a model loses less with slower rotations; then few steps teach it the rest."""
    def batch(n, T):
        return torch.randint(23, (n, 6)).repeat(1, T // 6 + 1)[:, :T + 1]

    def losses(gpt, x):
        return F.cross_entropy(gpt(x[:, :-1]).transpose(1, 2), x[:, 1:], reduction="none").mean(0)

    def learn(gpt, steps, T):
        adam = torch.optim.Adam(gpt.parameters(), lr=1e-2, fused=True)
        for _ in range(steps):
            adam.zero_grad()
            losses(gpt, batch(24, T))[5:].mean().backward()
            adam.step()

    gpt = GPT(Config(vocab_size=23, block_size=16, n_layer=1, n_head=4, n_embd=32))
    learn(gpt, 100, 16)
    x, beyond = batch(64, 64), {}
    for base in (1e4, 1e6):
        config = vars(gpt.config) | dict(block_size=64, rope_base=base)
        longer = model.from_checkpoint(dict(config=config, weights=gpt.state_dict()))
        with torch.no_grad():
            found = losses(longer, x)
        assert found[6:16].mean() < 0.05
        beyond[base] = found[16:].mean()
    assert beyond[1e6] < beyond[1e4] - 0.1 and beyond[1e4] > 1
    learn(longer, 15, 64)
    assert losses(longer, x)[16:].mean() < 0.5


@pytest.mark.parametrize("n_embd", [16, 12])
def test_sinusoidal_formula(n_embd):
    gpt = GPT(Config(**{**TINY, "n_embd": n_embd}, position="sinusoidal"))
    added = gpt.position.add(torch.zeros(1, 16, n_embd), torch.arange(16)[None])[0]
    for t in range(16):
        for i in range(0, n_embd, 2):
            angle = t / 10000 ** (i / n_embd)
            assert abs(added[t, i] - math.sin(angle)) < 1e-12 and abs(added[t, i + 1] - math.cos(angle)) < 1e-12


def test_sinusoidal_of_odd_width():
    gpt = make(position="sinusoidal", n_embd=15, head_dim=4)
    added = gpt.position.add(torch.zeros(1, 16, 15), torch.arange(16)[None])[0]
    assert abs(added[3, 14] - math.sin(3 / 10000 ** (14 / 15))) < 1e-12


def hashed(gram, rows):
    """The documented hash of an n-gram, in Python's integers: the last token, then those before it."""
    key = gram[-1] % 2**64
    for token in gram[-2::-1]:
        key = (key * 0x1E3779B97F4A7C15 + token) % 2**64
        key = (key ^ (key >> 30)) * 0x3F58476D1CE4E5B9 % 2**64
        key = (key ^ (key >> 27)) * 0x14D049BB133111EB % 2**64
    return (key - 2**64 * (key >> 63)) % rows  # torch's int64 is signed


def test_ngrams_by_hand():
    gpt, x = make(ngram=4, ngram_rows=97), tokens(3, 12)
    assert [table.weight.shape for table in gpt.ngrams.tables] == [(97, 16)] * 3
    rows = x.tolist()
    for sparse in (False, True):
        for table in gpt.ngrams.tables:
            table.sparse = sparse
        added = gpt.ngrams(torch.zeros(3, 12, 16), *gpt.look(x, fresh(gpt)))
        for b, t in itertools.product(range(3), range(12)):
            grams = [([-1] * 3 + rows[b])[t + 4 - n:t + 4] for n in (2, 3, 4)]
            close(added[b, t], sum(table.weight[hashed(gram, 97)] for table, gram in zip(gpt.ngrams.tables, grams)))


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, dict(counts=1), dict(counts=3, counts_weight=0.9), dict(counts=2, softcap=2.0)], ids=str)
def test_nats_of_targets_alone(changes):
    """Those of the targets among those of all tokens; some histories and pairs were counted, some never met."""
    gpt = make(**changes).eval()
    x, targets = gpt.hidden(tokens(3, 12)).flatten(0, 1), torch.randint(-1, 23, (36,))
    right = -gpt.logits(x).log_softmax(-1)[range(36), targets.clamp(min=0)]
    assert (targets < 0).any()
    close(gpt.nats(x, targets), right * (targets >= 0))
    if changes:
        (*_, (_, _, pairs, _)) = gpt.counts.steps(gpt.parted(x)[1])
        history = gpt.parted(x)[1][:, -1].long() if changes["counts"] > 1 else torch.zeros(36, dtype=torch.long)
        met = gpt.counts.find(pairs, history * 23 + targets.clamp(min=0)) >= 0
        assert met.any() and not met.all()


def test_counts_by_hand(tmp_path):
    """The mean of the network's softmax and of what data.py says of each token that could follow; the network alone in training."""
    gpt, x = make(counts=4, counts_weight=0.3), tokens(3, 12)
    found = count(gpt)
    x[:, 6:] *= torch.randint(2, (3, 6))  # some of it is like the counted text
    alone = gpt.head(gpt.train().hidden(x))
    close(gpt(x), alone)
    wanted = torch.zeros(3, 12, 23)
    for b, t, word in itertools.product(range(3), range(12), range(23)):
        wanted[b, t, word] = 2.0 ** -found.bits(torch.cat((x[b, :t + 1], torch.tensor([word]))).numpy())[-1]
    close(gpt.eval()(x), (0.7 * alone.softmax(2) + 0.3 * wanted).log())
    close(gpt(x).exp().sum(2), torch.ones(3, 12))
    assert len({round(p, 9) for p in wanted[0, -1].tolist()}) > 3
    # in a file, and without them
    model.save_checkpoint(tmp_path / "c.pt", gpt)
    checkpoint = model.load_checkpoint(tmp_path / "c.pt")
    close(model.from_checkpoint(checkpoint).eval()(x), gpt(x))
    close(model.from_checkpoint(checkpoint | dict(config=checkpoint["config"] | dict(counts=0))).eval()(x), alone)
    for name, value in (("pairs", torch.zeros(3)), ("sizes", torch.tensor([1, 2, 3])), ("backs", torch.zeros(0)), ("sizes", torch.tensor([-1]))):
        weights = checkpoint["weights"] | {f"counts.{name}": value}
        with pytest.raises(ValueError, match="checkpoint does not fit model.py: .*split"):
            model.from_checkpoint(checkpoint | dict(weights=weights))
    for place, value in ((0, -5), (3, 0), (-1, 2**40)):
        pairs = checkpoint["weights"]["counts.pairs"].clone()
        pairs[place] = value
        with pytest.raises(ValueError, match="these are no counts of n-grams"):
            model.from_checkpoint(checkpoint | dict(weights=checkpoint["weights"] | {"counts.pairs": pairs}))


def test_ngrams_seldom_meet_in_a_row():
    """All pairs of 200 tokens in 2^20 rows: about as many different rows as random numbers would take."""
    gpt = GPT(Config(vocab_size=200, block_size=2, n_layer=1, n_embd=4, n_head=1, head_dim=2, ngram=2, ngram_rows=2**20))
    pairs = torch.cartesian_prod(torch.arange(200), torch.arange(200))
    with torch.no_grad():
        gpt.ngrams.tables[0].weight.copy_(torch.arange(2**20)[:, None].expand(-1, 4))
    taken = gpt.ngrams(torch.zeros(40000, 2, 4), *gpt.look(pairs, fresh(gpt)))[:, 1, 0].unique()
    assert abs(len(taken) - 2**20 * (1 - math.exp(-40000 / 2**20))) < 200


def test_sparse_and_dense_gradients_of_tables_are_equal():
    grads = []
    for sparse in (False, True):
        torch.manual_seed(0)
        gpt, x = make(ngram=3, ngram_rows=50, mixer="valued"), tokens()
        for module in (*gpt.ngrams.tables, gpt.blocks[0].mixer.values[0]):
            module.sparse = sparse
        loss_of(gpt, x).backward()
        assert {weight.grad.is_sparse for name, weight in gpt.named_parameters() if "ngrams" in name} == {sparse}
        grads.append({name: weight.grad.to_dense() for name, weight in gpt.named_parameters()})
    for name in grads[0]:
        close(grads[0][name], grads[1][name])


def test_tables_start_at_zero_and_leave_the_model_as_it_is():
    torch.manual_seed(4)
    plain = GPT(Config(**TINY))
    gpt, x = GPT(Config(**TINY, ngram=4, mixer="valued")), tokens()
    own = gpt.state_dict()
    gpt.load_state_dict(own | plain.state_dict())
    close(gpt(x), plain(x))


def test_softcap():
    capped, x = make(softcap=2.0), tokens()
    plain = make()
    plain.load_state_dict(capped.state_dict())
    close(capped(x), 2 * torch.tanh(plain(x) / 2))
    close(capped.head(capped.hidden(x)), capped(x))
    assert plain(x).abs().max() > 3 and capped(x).abs().max() < 2


def test_soft_cap_of_scores():
    """A wide cap changes nothing, a narrow one does; at 0 every token would weigh alike."""
    for changes in ({}, dict(mixer="latent"), WINDOW):
        plain, x = make(**changes), tokens()
        for cap, low, high in ((1e6, 0, 1e-9), (1.0, 1e-3, 100)):
            capped = make(attention_softcap=cap, **changes)
            capped.load_state_dict(plain.state_dict())
            assert low <= (capped(x) - plain(x)).abs().max() <= high


def test_order_matters_except_without_position():
    x = tokens(1, 8)
    swapped = x[:, [1, 0, *range(2, 8)]]
    assert x[0, 0] != x[0, 1]
    for position in model.POSITIONS:
        gpt = make(position=position, n_layer=1)  # one layer of attention alone sees a set, with no position
        same = (gpt(x)[:, -1] - gpt(swapped)[:, -1]).abs().max() < 1e-9
        assert same == (position == "none"), position


# ---------------------------------------------------------------------------------------- invariants over all variants

@every_variant
def test_causal(changes):
    gpt, x = make(**changes), tokens(2, 12)
    before = gpt(x)
    for t in (0, 5, 11):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % 23
        difference = (gpt(changed) - before).abs().amax((0, 2))  # (T,)
        rounds = gpt.config.n_expert > 0 or "hyena" in gpt.config.mixer  # experts: other groupings; FFTs mix all times
        assert (difference[:t] <= 1e-12 * rounds).all() if t else True
        assert difference[t] > 1e-6
        if t < 11:
            assert difference[t + 1] > 1e-9  # the next token looks back


def sees(gpt, T=14):
    """sees[s][t]: whether a change of token s changes the output at t."""
    x = tokens(1, T)
    before, table = gpt(x), []
    for s in range(T):
        changed = x.clone()
        changed[:, s] = (changed[:, s] + 1) % 23
        table.append(((gpt(changed) - before).abs().amax((0, 2)) > 0).tolist())
    return table


@pytest.mark.parametrize("position", model.POSITIONS)
@pytest.mark.parametrize("n_layer,window", [(1, 1), (1, 3), (2, 3), (3, 2)])
def test_window_limits_sight(position, n_layer, window):
    gpt = make(n_layer=n_layer, mixer="window", window=window, position=position)
    reach = n_layer * (window - 1)
    assert sees(gpt) == [[s <= t <= s + reach for t in range(14)] for s in range(14)]


def test_window_twins():
    full = make()
    assert sees(full) == [[s <= t for t in range(14)] for s in range(14)]
    wide = make(mixer="window", window=16)
    wide.load_state_dict(full.state_dict())
    x = tokens(T=16)
    close(wide(x), full(x))
    assert [bool(block.mixer.sees) for block in make(n_layer=5, **HYBRID).blocks] == [True, False, True, False, True]


@every_variant
@torch.no_grad()
def test_cached_decoding_equals_full_forward(changes):
    gpt, x = make(**changes), tokens(3, 14)
    full = gpt(x)
    for chunks in ([1] * 14, [14], [5, 1, 1, 3, 4], [1, 13]):
        state = gpt.new_state(3, 14)
        parts = [gpt(part, state) for part in x.split(chunks, 1)]
        close(torch.cat(parts, 1), full)
        assert state.lengths == [14] * 3


@every_variant
@torch.no_grad()
def test_ragged_decoding(changes):
    """A padded prompt is cut to each row's length; then rows of different lengths go on together."""
    gpt, x = make(**changes), tokens(4, 16)
    lengths = [7, 3, 7, 1]
    padded = x[:, :7].clone()
    for row, n in enumerate(lengths):
        padded[row, n:] = 22
    state = gpt.new_state(4)
    first = gpt(padded, state)
    state.truncate(lengths)
    assert state.lengths == lengths
    full = gpt(x)
    for row, n in enumerate(lengths):
        close(first[row, :n], full[row, :n])
    for T in (1, 2, 1, 3):
        part = torch.stack([x[row, n:n + T] for row, n in enumerate(lengths)])
        out = gpt(part, state)
        for row, n in enumerate(lengths):
            close(out[row], full[row, n:n + T])
        lengths = [n + T for n in lengths]


@some_variants
@torch.no_grad()
def test_truncate_then_go_on(changes):
    """Rejected drafts leave nothing behind."""
    gpt, x = make(**changes), tokens(2, 12)
    state = gpt.new_state(2, 12)
    gpt(x[:, :6], state)
    gpt(torch.full((2, 4), 7), state)
    state.truncate([6, 6])
    close(gpt(x[:, 6:], state), gpt(x)[:, 6:])
    if any(mixer in RECURRENT for mixer in tiled(gpt.config)):  # the sums of what went before cannot be taken apart
        with pytest.raises(ValueError, match=r"cannot truncate \[12, 12\] to \[6, 5\]: possible down to \[6, 6\]"):
            state.truncate([6, 5])
        state.truncate([6, 6])
    else:
        state.truncate([0, 0])
    close(gpt(x[:, state.lengths[0]:], state), gpt(x)[:, -6:] if state.start[0] else gpt(x))


@some_variants
@torch.no_grad()
def test_fork(changes):
    gpt, x = make(**changes), tokens(3, 12)
    state = gpt.new_state(3, 12)
    gpt(x[:, :7], state)
    state.truncate([7, 4, 7])
    rows = [2, 1, 1, 0]
    forked = state.fork(rows)
    assert forked.lengths == [7, 4, 4, 7]
    assert forked.nbytes * 3 == state.nbytes * 4
    gpt(torch.full((4, 2), 7), forked)  # the copy goes its own way
    assert state.lengths == [7, 4, 7] and forked.lengths == [9, 6, 6, 9]
    forked.truncate([7, 4, 4, 7])
    starts = [7, 4, 4, 7]
    full = gpt(x)
    for which, ids in ((forked, rows), (state, [0, 1, 2])):
        at = [starts[rows.index(row)] for row in ids]
        part = torch.stack([x[row, n:n + 5] for row, n in zip(ids, at)])
        out = gpt(part, which)
        for i, (row, n) in enumerate(zip(ids, at)):
            close(out[i], full[row, n:n + 5])


@pytest.mark.parametrize("changes", [dict(mixer=mixer, position=position) for mixer in model.MIXERS for position in ("rope", "learned")]
                         + [dict(ngram=4, ngram_rows=97, position="sinusoidal"), dict(mixer="latent,gdn,strided", n_layer=3, n_kv_head=2)],
                         ids=lambda changes: ",".join(map(str, changes.values())))
@torch.no_grad()
def test_documents_do_not_see_each_other(changes):
    """A row of several documents gives each of them what it has alone; without --end_token it does not (the twin)."""
    if {"window", "strided"} & {*changes.get("mixer", "").split(",")}:
        changes = dict(changes, window=3)
    gpt = make(block_size=24, end_token=7, **changes)
    documents = [[1, 2, 3, 4, 7], [7], [5, 5, 5, 6, 8, 9, 7], [1, 2, 3, 4, 5, 6, 7], [2, 2, 7]]
    x = torch.tensor([sum(documents, []), sum(documents[::-1], [])])
    alone = {i: gpt(torch.tensor([document])) for i, document in enumerate(documents)}
    expected = torch.cat([torch.cat([alone[i] for i in order], 1) for order in (range(5), range(4, -1, -1))])
    close(gpt(x), expected)
    state = gpt.new_state(2)
    close(torch.cat([gpt(part, state) for part in x.split([4, 3, 1, 8, 1, 6], 1)], 1), expected)
    lengths = [3, 9]  # rows of different lengths go on together
    padded = x[:, :9].clone()
    padded[0, 3:] = 7
    state = gpt.new_state(2)
    gpt(padded, state)
    state.truncate(lengths)
    for _ in range(6):
        out = gpt(torch.stack([x[row, n:n + 2] for row, n in enumerate(lengths)]), state)
        for row, n in enumerate(lengths):
            close(out[row], expected[row, n:n + 2])
        lengths = [n + 2 for n in lengths]
    open_ = make(block_size=24, **changes)
    open_.load_state_dict(gpt.state_dict())
    assert (open_(x) - expected)[:, 8:].abs().max() > 1e-3


def expanded_latent(layer, x, turn):
    """Latent attention with keys and values of every head written out, as DeepSeek-V2's paper has it."""
    B, T, _ = x.shape
    H, hd = layer.heads[0], layer.width
    q, q_turned, c, r = layer.qkv(x).split((H * hd, H * hd, layer.latent, hd), 2)
    c = layer.k_norm(c)
    k = torch.einsum("btc,hcd->bthd", c, layer.k["weight"])
    v = torch.einsum("btc,hdc->bthd", c, layer.v["weight"])
    k = torch.cat((k, turn(r.view(B, T, 1, hd)).expand(B, T, H, hd)), 3)
    q = torch.cat((layer.q_norm(q.view(B, T, H, hd)), turn(q_turned.view(B, T, H, hd))), 3)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(2 * hd)
    scores = (layer.cap * torch.tanh(scores / layer.cap) if layer.cap else scores) + torch.full((T, T), -torch.inf).triu(1)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2) @ layer.out.weight.T


@pytest.mark.parametrize("latent,norm,cap", [(6, "rmsnorm", 0.0), (0, "layernorm", 0.0), (6, "rmsnorm", 0.9)])
def test_latent_attention_in_the_expanded_form(latent, norm, cap):
    changes = dict(latent=latent, norm=norm, attention_softcap=cap)
    gpt, ids, x = make(mixer="latent", n_layer=1, **changes), tokens(2, 9), torch.randn(2, 9, 16)
    layer, call = gpt.blocks[0].mixer, call_of(make(mixer="latent", n_layer=1), ids)
    close(layer(x, call, 0), expanded_latent(layer, x, call.turn))


def test_latent_attention_keeps_the_latent_alone():
    gpt = make(mixer="latent", latent=6, n_layer=3)
    state = gpt.new_state(2, 10)
    gpt(tokens(2, 4), state)
    assert state.nbytes == 2 * 10 * 3 * (6 + 4) * 8


def test_positions_by_layer():
    gpt, x = make(position="rope,none", n_layer=2), tokens()
    assert gpt.turned == [True, False]
    twin = make(position="rope", n_layer=2)
    twin.load_state_dict(gpt.state_dict())
    assert (twin(x) - gpt(x)).abs().max() > 1e-3
    gpt.turned = [True, True]
    close(twin(x), gpt(x))


@pytest.mark.parametrize("changes", [dict(dropout=0.2), dict(mixer="gdn,latent", residual="scaled"), dict(n_expert=4, placement="post")])
def test_recomputing_changes_nothing_but_memory(changes, single):
    x, grads = tokens(4, 16), []
    for recompute in (False, True):
        torch.manual_seed(0)
        gpt = GPT(Config(**{**TINY, **changes}, recompute=recompute, init="gpt2"))
        gpt.noise["keys"] = torch.arange(4)
        (loss_of(gpt, x) + gpt.extra_loss()).backward()
        grads.append([weight.grad for weight in gpt.parameters()])
    for a, b in zip(*grads):
        close(a, b, 1e-6)
    plain, less = (Config(n_layer=2, block_size=128, recompute=recompute, **changes) for recompute in (False, True))
    kept, counted = (model.account(config, 2)["memory"]["activations"] for config in (plain, less))
    assert counted < 0.4 * kept
    torch.manual_seed(0)
    assert abs(kept_bytes(GPT(less), tokens(2, 128)) - counted) <= 64


def train(gpt, steps, x, learning_rate=1e-2):
    adam = torch.optim.Adam(gpt.parameters(), lr=learning_rate, fused=True)
    losses = []
    for _ in range(steps):
        loss = loss_of(gpt, x)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return losses


@every_variant
def test_gradients_reach_every_parameter_and_the_loss_falls(changes):
    gpt = GPT(Config(**{**TINY, **changes}))
    x = tokens(4, 12)
    losses = train(gpt, 20, x, 3e-2)
    if gpt.config.init == "zero" and not gpt.config.tie_embeddings:
        assert abs(losses[0] - math.log(23)) < 1e-12  # a zero head knows nothing
    assert abs(losses[0] - math.log(23)) < (1.5 if gpt.config.placement == "post" else 0.3)
    assert losses[-1] < 0.5 * losses[0]
    gpt.zero_grad()
    loss_of(gpt, x).backward()
    for name, weight in gpt.named_parameters():
        if name.endswith("k_norm.bias") or name.endswith("qkv.bias"):
            continue  # without rope, what all keys share does not change a softmax
        if name.startswith("ngrams") or "values" in name:
            assert weight.grad.abs().amax() > 0, name
            continue  # rows of a table: those that were used
        moved = weight.grad if not name.startswith("position.table") else weight.grad[:11]  # positions that were seen
        assert moved is not None and moved.abs().amax() > 0, name
        if weight.ndim > 1 and not name.startswith(("embedding", "head", "position")):
            assert (moved.abs().amax(1) > 0).all() or gpt.config.ffn in ("relu", "relu2"), f"a row of {name} never moves"


def test_recall_needs_sight(single):
    """Repeat the token of 6 steps ago: full attention learns it, a window that ends before it cannot."""
    test = torch.randint(23, (64, 6)).repeat(1, 3)[:, :16]

    def accuracy(**changes):
        torch.manual_seed(1)
        gpt = GPT(Config(**{**TINY, "n_embd": 32, "n_layer": 1, **changes}))
        adam = torch.optim.Adam(gpt.parameters(), lr=1e-2, fused=True)
        for _ in range(100):
            x = torch.randint(23, (24, 6)).repeat(1, 3)[:, :16]
            loss = F.cross_entropy(gpt(x[:, :-1])[:, 5:].flatten(0, 1), x[:, 6:].flatten())
            adam.zero_grad()
            loss.backward()
            adam.step()
        with torch.no_grad():
            return (gpt(test[:, :-1])[:, 5:].argmax(-1) == test[:, 6:]).double().mean().item()

    assert accuracy() > 0.9
    assert accuracy(mixer="window", window=6) > 0.9  # the token to repeat is the last that it sees
    assert accuracy(mixer="window", window=5) < 0.3


def recall_by_key(mixer, keys, writes, steps=200, **changes):
    """Accuracy of one layer that reads `writes` pairs (key, value), then a key, and answers its last value of 8."""
    torch.manual_seed(1)
    gpt = GPT(Config(vocab_size=72, block_size=16, n_layer=1, n_head=4, n_embd=32, mixer=mixer, **changes))
    adam = torch.optim.Adam(gpt.parameters(), lr=1e-2, fused=True)

    def batch(n):
        key, value = torch.randint(keys, (n, writes)), torch.randint(8, (n, writes))
        asked = key[:, torch.randint(writes, (1,))]
        last = writes - 1 - (key == asked).flip(1).double().argmax(1, keepdim=True)
        return torch.cat((key * 8 + value, 64 + asked), 1), value.gather(1, last)[:, 0]

    for _ in range(steps):
        x, y = batch(64)
        loss = F.cross_entropy(gpt(x)[:, -1], y)
        adam.zero_grad()
        loss.backward()
        adam.step()
    x, y = batch(256)
    with torch.no_grad():
        return (gpt(x)[:, -1].argmax(-1) == y).double().mean().item()


@pytest.mark.parametrize("mixer,changes,learns", [
    ("attention", {}, True), ("mamba2", {}, True), ("gdn", {}, True),
    pytest.param("hyena", {}, True, marks=pytest.mark.slow),
    pytest.param("linear", {}, False, marks=pytest.mark.slow),  # a sum of all written under a key does not know the last
    ("attention", dict(position="none"), False), pytest.param("window", dict(window=2), False, marks=pytest.mark.slow)])
def test_recall_of_the_last_value_of_a_key(mixer, changes, learns, single):
    accuracy = recall_by_key(mixer, 3, 10, **changes)
    assert accuracy > 0.8 if learns else accuracy < 0.5


def test_linear_attention_recalls_what_is_written_once(single):
    assert recall_by_key("linear", 8, 3) > 0.8


# --------------------------------------------------------------------------------------------------------- recurrences

def scan_inputs(B=2, H=3, T=150, hd=5, forget=True):
    q, k, v = torch.randn(3, B, H, T, hd).unbind()
    g = -0.2 * torch.rand(B, H, T, 1) * forget
    return q, F.normalize(k, dim=3), v, g, torch.rand(B, H, T, 1), torch.randn(B, H, hd, hd)


def by_loop(q, k, v, g, b, S, delta):
    """The recurrence as its formula says, one token, one head and one row at a time."""
    ys = torch.zeros_like(v)
    ends = torch.zeros_like(S)
    for i, h in itertools.product(*map(range, S.shape[:2])):
        M = S[i, h]
        for t in range(q.shape[2]):
            M = math.exp(g[i, h, t]) * M
            new = b[i, h, t] * (v[i, h, t] - (M @ k[i, h, t] if delta else 0))
            M = M + torch.outer(new, k[i, h, t])
            ys[i, h, t] = M @ q[i, h, t]
        ends[i, h] = M
    return ys, ends


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("forget", [False, True])
@pytest.mark.parametrize("T", [1, 63, 64, 65, 150])
def test_scan_equals_the_loop(delta, forget, T):
    *inputs, S = scan_inputs(T=T, forget=forget)
    y, end = by_loop(*inputs, S, delta)
    for chunk in (1, 7, 64, 1000):
        ours, last = model.scan(inputs, S, delta, chunk)
        close(ours, y)
        close(last, end)
    state, parts = S, []  # in two calls, the state between them
    for part in ([x[:, :, :40] for x in inputs], [x[:, :, 40:] for x in inputs])[: 1 + (T > 40)]:
        out, state = model.scan(part, state, delta)
        parts.append(out)
    close(torch.cat(parts, 2), y)
    close(state, end)


@pytest.mark.parametrize("delta", [False, True])
def test_scan_gradients(delta):
    *inputs, S = [x.requires_grad_() for x in scan_inputs(B=1, H=1, T=5, hd=2)]
    assert torch.autograd.gradcheck(lambda *x: model.scan(x[:-1], x[-1], delta, 3), [*inputs, S])
    *inputs, S = [x.detach().requires_grad_() for x in scan_inputs(B=1, H=2, T=40)]
    grads = [torch.autograd.grad(sum(y.square().sum() for y in model.scan(inputs, S, delta, chunk)), [*inputs, S])
             for chunk in (1, 16)]
    for a, b in zip(*grads):
        close(a, b)


@pytest.mark.parametrize("delta", [False, True])
def test_scan_does_not_overflow(delta, single):
    """Decays far below what exp can hold, and gradients through the part above the diagonal."""
    q, k, v, g, b, S = scan_inputs(T=128)
    g = (g - 30).requires_grad_()
    y, end = model.scan((q, k, v, g, b), S, delta)
    y.square().sum().backward()
    assert y.isfinite().all() and end.isfinite().all() and g.grad.isfinite().all()
    close(y, b * v * (q * k).sum(3, keepdim=True), 1e-5)  # all but the token itself is forgotten


@torch.no_grad()
def test_hyena_by_loops(past=5):
    """Both forms of the convolution are sum over s of h(t - s) k(s) v(s), times q(t), with h written out here."""
    gpt, ids, x = make(mixer="hyena", n_layer=1), tokens(2, 9), torch.randn(2, 9, 16)
    layer = gpt.blocks[0].mixer
    q, k, v = (x @ layer.up.weight.T).chunk(3, 2)
    y = torch.zeros(2, 9, 16)
    for c in range(16):
        length = 2 * (gpt.config.block_size / 2) ** (c / 15)
        for far in range(9):
            angles = [far / 10000 ** (2 * i / 16) for i in range(8)]
            waved = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)])
            shape = (layer.shape.weight[c] * torch.sin(layer.wave.weight @ waved)).sum()
            h = shape * math.exp(-far / length) * (2 / length) ** 0.5
            y[:, far:, c] += h * (k * v)[:, :9 - far, c]
    expected = (q * y) @ layer.out.weight.T
    close(layer(x, call_of(gpt, ids), 0), expected, 1e-6)  # the lengths are in single precision
    state, parts = gpt.new_state(2), []
    for i, j in ((0, past), (past, 9)):
        call = call_of(gpt, ids[:, i:j], state)
        parts.append(layer(x[:, i:j], call, 0))
        state.lengths = [j, j]
    close(torch.cat(parts, 1), layer(x, call_of(gpt, ids), 0))


def test_heads_that_look_further_ahead(single):
    """Their accounting, their absence from logits, and their gradients (the loss itself: tests/test_train.py)."""
    plain, more = (Config(**{**TINY, "ahead": n}) for n in (0, 2))
    gpt, x = GPT(more), tokens(2, 9)
    without = GPT(plain)
    without.load_state_dict({name: w for name, w in gpt.state_dict().items() if "ahead" not in name})
    close(without(x), gpt(x))
    a, b = (model.account(config, 2) for config in (plain, more))
    width, T = more.n_embd, more.block_size
    assert b["parameters"] - a["parameters"] == 2 * width * width
    assert b["forward_flops"] - a["forward_flops"] == 2 * 2 * T * (width * width + width * more.vocab_size)
    assert b["memory"]["activations"] > a["memory"]["activations"] + 2 * 2 * T * more.vocab_size * 4
    assert {gpt.roles()[name] for name in gpt.roles() if "ahead" in name} == {"matrix"}


@pytest.mark.parametrize("mixer", RECURRENT)
def test_recurrences_cost_is_linear_in_length(mixer, single):
    def flops(T, mixer=mixer):
        config = Config(vocab_size=8, n_layer=1, block_size=T, n_embd=32, mixer=mixer)
        return model.account(config, 1)["forward_flops"]
    assert flops(256) == 2 * flops(128) == 4 * flops(64)
    assert flops(256, "attention") > 2.2 * flops(128, "attention")  # the twin


def test_state_of_a_recurrence_has_one_size():
    for mixer in RECURRENT:
        gpt = make(mixer=mixer, block_size=64)
        state = gpt.new_state(1)
        gpt(tokens(1, 20), state)
        sizes = []
        for _ in range(3):
            gpt(tokens(1, 1), state)
            sizes.append(state.nbytes)
        short = gpt.new_state(1, 10)
        gpt(tokens(1, 1), short)
        assert set(sizes) == {short.nbytes}


def test_delta_rule_replaces_what_a_key_held():
    """Two values under one key: the sum keeps both, the delta rule at rate 1 the last."""
    k = F.normalize(torch.randn(1, 1, 1, 4), dim=3).expand(1, 1, 3, 4)
    v = torch.randn(1, 1, 3, 4)
    g, b, S = torch.zeros(1, 1, 3, 1), torch.ones(1, 1, 3, 1), torch.zeros(1, 1, 4, 4)
    close(model.scan((k, k, v, g, b), S, True)[0], v)
    close(model.scan((k, k, v, g, b), S, False)[0], v.cumsum(2))


# ------------------------------------------------------------------------------------------------------------- dropout

def splitmix(key, site, place):
    """The documented hash in Python's integers."""
    bits = (place + (site << 40) + key * 0x1E3779B97F4A7C15) % 2**64
    bits = (bits ^ (bits >> 30)) * 0x3F58476D1CE4E5B9 % 2**64
    bits = (bits ^ (bits >> 27)) * 0x14D049BB133111EB % 2**64
    return bits >> 20 & 0xFFFFFF


def test_dropout_is_the_hash():
    keys = [0, 1, 5, 6, 7, 2**62 - 1, 123456789123456789]
    assert any(key * 0x1E3779B97F4A7C15 >> 63 & 1 for key in keys)  # a product that torch sees as negative
    drop = model.Dropout(0.3, {"keys": torch.tensor(keys)}, 5)
    y = drop(torch.ones(7, 3, 7))
    for row, key in enumerate(keys):
        expected = [(splitmix(key, 5, place) >= 0.3 * 2**24) / 0.7 for place in range(21)]
        close(y[row].flatten(), torch.tensor(expected))


def test_dropout_mask_depends_on_key_site_and_place_alone():
    noise = {"keys": torch.tensor([11, 12, 13])}
    drop, x = model.Dropout(0.5, noise, 3), torch.randn(3, 5, 8)
    y = drop(x)
    close(y, drop(x))  # again the same
    noise["keys"] = torch.tensor([13, 11])  # another batch, another order
    close(drop(x[[2, 0]]), y[[2, 0]])
    ones = torch.ones(2, 40, 8)
    masks = []
    for key, site in ((11, 3), (12, 3), (11, 4), (12, 4), (2**61, 3)):
        masks.append(model.Dropout(0.5, {"keys": torch.tensor([key])}, site)(ones[:1]).flatten() > 0)
    for a, b in itertools.combinations(masks, 2):
        assert 0.4 < (a == b).double().mean() < 0.6  # independent


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_share_and_expectation(p):
    drop = model.Dropout(p, {"keys": torch.arange(64) * 7 + 2**50}, 1)
    y = drop(torch.ones(64, 50, 40))
    n = y.numel()
    assert abs((y == 0).double().mean() - p) < 4 * math.sqrt(p * (1 - p) / n)
    close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - p)))
    assert abs(y.mean() - 1) < 4 * math.sqrt(p / (1 - p) / n)
    for dim in (0, 1, 2):  # no row, place or channel is favoured
        shares = (y == 0).double().mean([d for d in range(3) if d != dim])
        assert (shares - p).abs().max() < 5.5 * math.sqrt(p * (1 - p) / (n / len(shares)))


def test_dropout_in_the_model():
    x = tokens(4, 10)
    gpt, plain = make(dropout=0.2), make()
    plain.load_state_dict(gpt.state_dict())
    close(gpt.eval()(x), plain(x))  # identity in evaluation
    gpt.train()
    gpt.noise["keys"] = torch.tensor([1, 2, 3, 4])
    y = gpt(x)
    assert (y - plain(x)).abs().max() > 0.01
    gpt.noise["keys"] = torch.tensor([4, 2])
    close(gpt(x[[3, 1]]), y[[3, 1]])
    drops = [drop for drop in gpt.modules() if isinstance(drop, model.Dropout)]
    assert len({drop.site for drop in drops}) == len(drops) == 1 + 2 * 2
    for alone in drops:  # each is in use
        for drop in drops:
            drop.p = 0.2 * (drop is alone)
        assert (gpt(x[:2]) - plain(x[:2])).abs().max() > 0.01
    for drop in drops:
        drop.p = 0.2
    gpt.noise.clear()  # drawn from torch's generator
    torch.manual_seed(5)
    a, b = gpt(x), gpt(x)
    torch.manual_seed(5)
    close(gpt(x), a)
    assert (a - b).abs().max() > 0.01
    assert abs((model.Dropout(0.2, gpt.noise, 0)(torch.ones(8, 50, 50)) == 0).double().mean() - 0.2) < 0.02


def test_dropout_gradient():
    drop, x = model.Dropout(0.5, {"keys": torch.tensor([9])}, 0), torch.randn(1, 4, 4, requires_grad=True)
    y = drop(x)
    y.sum().backward()
    close(x.grad, (y.detach() != 0).double() * 2)


# ------------------------------------------------------------------------------------------------ roles and their numbers

def test_initial_standard_deviations():
    for init, tied in itertools.product(model.INITS, (True, False)):
        if init == "mup" and tied:
            continue
        c = Config(n_layer=3, n_embd=192, vocab_size=1000, init=init, tie_embeddings=tied, bias=True, norm="layernorm", position="learned")
        gpt = GPT(c)
        small = dict.fromkeys(("matrix", "output", "embedding", "tied", "head"), 0.02)
        expected = {"zero": dict(matrix=192**-0.5, embedding=0.02, tied=0.02), "mup": dict(matrix=192**-0.5, embedding=0.02),
                    "gpt2": small | dict(output=0.02 / math.sqrt(6)), "xavier": small}[init]
        assert (gpt.head.weight is gpt.embedding.weight) == tied
        for name, role in gpt.roles().items():
            weight = gpt.get_parameter(name)
            mean, std = (1 if role == "gain" else 0), expected.get(role, 0)
            if init == "xavier" and std:
                std = math.sqrt(2 / sum(weight.shape))
            if std == 0:
                assert (weight == mean).all(), name
            else:
                assert abs(weight.std() / std - 1) < 0.03 and abs(weight.mean()) < 4 * std / math.sqrt(weight.numel()), name


@pytest.mark.parametrize("optimizer,matrix", [("adamw", 1 / 4), ("muon", 1 / 2)])
def test_rates(optimizer, matrix):
    gpt = make(n_embd=32, init="mup", base_width=8, tie_embeddings=False, ngram=2, ngram_rows=5, n_expert=2)
    expected = dict(matrix=matrix, output=matrix, head=1 / 4, router=1 / 4, embedding=10, table=10, gain=1, bias=1)
    assert gpt.rates(optimizer) == {name: expected[role] for name, role in gpt.roles().items()}
    plain = make(n_embd=32, tie_embeddings=False)
    assert plain.rates(optimizer) == {name: model.ROLES[role].rate for name, role in plain.roles().items()}


def test_coordinate_check(single):
    """With muP the logits move alike at all widths, without it they move more the wider the model is."""
    head, *rows = model.coord_check((64, 128, 256)).splitlines()
    slopes = {row.split()[0]: float(row.split()[-1]) for row in rows}
    assert slopes["--init=zero"] > 0.6 and abs(slopes["--init=mup"]) < 0.2, slopes


def test_coordinate_check_is_drawn(single, tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setenv("MPLBACKEND", "agg")
    figures, subplots = [], pyplot.subplots
    monkeypatch.setattr(pyplot, "subplots", lambda **how: figures.append(subplots(**how)) or figures[-1])
    _, *rows, last = model.coord_check((32, 64), 1, plot=tmp_path / "coords.png").splitlines()
    assert last == f"{tmp_path / 'coords.png'} written" and (tmp_path / "coords.png").read_bytes()[1:4] == b"PNG"
    for row, line in zip(rows, figures[0][1].lines, strict=True):
        assert line.get_label().startswith(row.split()[0]) and [*line.get_xdata()] == [32, 64]
        assert [f"{y:.3f}" for y in line.get_ydata()] == row.split()[1:-1]


def test_pictures_that_cannot_be_drawn(run_main, tmp_path, monkeypatch):
    done = run_main("model.py", "--plot=x.png", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.endswith("--plot draws what --coord_check finds: give both\n")
    done = run_main("model.py", "--ckpt=x.pt", "--preset=gpt2", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.endswith("--ckpt has a shape of its own: give it or --preset\n")
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    done = run_main("model.py", "--coord_check", "--plot=x.png", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "--plot needs matplotlib: pip install matplotlib" in done.stderr


@pytest.mark.parametrize("words, said", [
    ("--coord_check --n_layer=8", "--coord_check has a shape of its own: leave out --preset, --n_layer"),
    ("--export_hf=hf --preset=gpt2", "--export_hf has a shape of its own"), ("--import_hf=hf --export_hf=other", "--import_hf and --export_hf: one at a time"),
    ("--import_hf=hf --ckpt=a.pt", "--import_hf reads no --ckpt"), ("--preset=gpt2 --output=a.pt", "--output is the checkpoint of --import_hf alone")])
def test_no_mode_ignores_an_option(run_main, tmp_path, words, said):
    done = run_main("model.py", *words.split(), cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith(f"model.py: {said}"), done.stderr


def test_scaled_residual():
    gpt, x = make(residual="scaled", n_layer=1), tokens()
    plain = make(n_layer=1)
    plain.load_state_dict({name: weight for name, weight in gpt.state_dict().items() if "residual" not in name})
    a, b = gpt.blocks[0].residual.bias
    with torch.no_grad():
        plain.embedding.weight *= 1 + a + b  # in the first block the stream is the embedding
        plain.head.weight = nn.Parameter(gpt.head.weight)
    close(gpt(x), plain(x))


def test_same_seed_same_weights():
    torch.manual_seed(3)
    a = GPT(Config(**TINY))
    torch.manual_seed(3)
    b = GPT(Config(**TINY))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.embedding.weight, GPT(Config(**TINY)).embedding.weight)


@every_variant
def test_roles_cover_every_parameter(changes):
    gpt = make(**changes)
    roles = gpt.roles()
    assert roles.keys() == dict(gpt.named_parameters()).keys()
    kinds = {model.Embedding: "embedding", model.Linear: "matrix", model.Norm: "gain", nn.ParameterDict: "matrix", model.Scaled: "bias"}
    kinds |= {type(norm(gpt.config, 4)): "gain" for norm in model.NORMS.values()}  # also of a class of its own
    special = {"embedding.weight": "tied" if gpt.config.tie_embeddings else "embedding", "head.weight": "head"}
    for name, role in roles.items():
        path, _, own = name.rpartition(".")
        kind = special.get(name, kinds[type(gpt.get_submodule(path))])
        if path.endswith("router"):
            kind = "router"
        if path.startswith("ngrams") or "values" in path:
            kind = "table"
        if path.endswith((".out", ".down")):
            kind = "output"
        assert role == ("bias" if own == "bias" else kind), name


def test_roles_table():
    assert {role for role, row in model.ROLES.items() if row.decay} == {"matrix", "output"}
    assert {role for role, row in model.ROLES.items() if row.muon} == {"matrix", "output"}


# ----------------------------------------------------------------------------------------------------------- accounting

LLAMA = dict(qk_norm=False, tie_embeddings=False, block_size=8)
PUBLISHED = {
    "gpt2, no biases": (dict(GPT2, n_layer=12, n_head=12, n_embd=768, vocab_size=50257, block_size=1024), 124_337_664),
    "gpt2": (dict(GPT2, n_layer=12, n_head=12, n_embd=768, vocab_size=50257, block_size=1024, bias=True), 124_439_808),
    "gpt2-medium": (dict(GPT2, n_layer=24, n_head=16, n_embd=1024, vocab_size=50257, block_size=1024, bias=True), 354_823_168),
    "gpt2-xl": (dict(GPT2, n_layer=48, n_head=25, n_embd=1600, vocab_size=50257, block_size=1024, bias=True), 1_557_611_200),
    "llama-2-7b": (dict(LLAMA, n_layer=32, n_head=32, n_embd=4096, n_inner=11008, vocab_size=32000), 6_738_415_616),
    "mistral-7b": (dict(LLAMA, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, n_inner=14336, vocab_size=32000), 7_241_732_096),
    "llama-3-8b": (dict(LLAMA, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, n_inner=14336, vocab_size=128256), 8_030_261_248),
    "qwen3-0.6b": (dict(n_layer=28, n_head=16, n_kv_head=8, head_dim=128, n_embd=1024, n_inner=3072, vocab_size=151936,
                        block_size=8), 596_049_920),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name, single):
    changes, count = PUBLISHED[name]
    a = model.account(Config(**changes), 1) if changes["n_layer"] == 12 else {}
    with torch.device("meta"):
        gpt = GPT(Config(**changes))
    assert sum(weight.numel() for weight in gpt.parameters()) == count
    if a:
        assert a["parameters"] == sum(a["roles"].values()) == count
        assert a["forward_flops"] == 291_648_307_200


@functools.cache
def account_of(name):
    """What a variant at TINY size costs with AdamW, in single precision: the tests below share it."""
    return model.account(Config(**{**TINY, **VARIANTS[name]}), 3, optimizer="adamw")


@pytest.mark.parametrize("name", some)
def test_accounting_of_parameters_flops_and_bytes(name, single):
    config = Config(**{**TINY, **VARIANTS[name]})
    gpt, x = GPT(config), tokens(3, 16)
    a = account_of(name)
    sizes = {name: weight.numel() for name, weight in gpt.named_parameters()}
    assert a["parameters"] == sum(sizes.values())
    assert a["roles"] == {role: sum(n for name, n in sizes.items() if gpt.roles()[name] == role) for role in model.ROLES}
    experts = 0
    # FLOPs: the formula, and torch's counter on a real pass with attention as matrix products
    linear = {name: m for name, m in gpt.named_modules() if type(m) is model.Linear}
    filters = [name for name in linear if name.endswith(("wave", "shape"))]  # once a batch, not a row
    once = 2 * 16 * sum(linear[name].weight.numel() for name in filters) // 3
    matrices = sum(m.weight.numel() for name, m in linear.items() if name not in filters)
    heads = config.n_head * (config.head_dim or config.n_embd // config.n_head)
    hd = config.head_width
    mixing = {"attention": 4 * 16 * 16, "linear": 4 * 16 * (16 + hd), "gdn": 6 * 16 * (16 + hd)}  # a channel: one chunk
    latent = config.latent or 4 * hd  # a head: queries to the latent's side, scores and sums over it, and back
    mixing["latent"] = 2 * 16 * latent * 2 + 4 * 16 * 16 * (latent + hd) / hd
    mixing |= {"hyena": 0, "window": mixing["attention"], "valued": mixing["attention"], "mamba2": mixing["linear"], "strided": mixing["attention"]}
    # bytes: of what a step of torch's AdamW really holds
    adam = torch.optim.AdamW(gpt.parameters())
    loss_of(gpt, x).backward()
    adam.step()
    moments = sum(t.nbytes for row in adam.state.values() for t in row.values() if t.ndim)
    assert a["memory"]["weights"] == sum(weight.nbytes for weight in gpt.parameters())
    assert a["memory"]["gradients"] == sum(weight.grad.nbytes for weight in gpt.parameters())
    tables = [weight for name, weight in gpt.named_parameters() if gpt.roles()[name] == "table"]
    moments -= sum(2 * weight.nbytes - 4 * len(weight) for weight in tables)  # Adagrad keeps one number a row of these
    assert a["memory"]["optimizer"] == moments
    muon = 4 * sum(model.kept_of(gpt.get_parameter(own), role, "muon") for own, role in gpt.roles().items())
    assert name not in list(some)[::9] or muon == model.account(config, 3)["memory"]["optimizer"]
    assert moments - muon == 4 * sum(n for name, n in sizes.items() if name.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight", ".k.weight", ".v.weight", "wave.weight", "shape.weight")))
    assert a["memory_total"] == sum(a["memory"].values())
    # of a token: keys and values or a latent, the token itself where it is looked at; of a sequence: S, and the last call
    sums = [mixer for mixer in tiled(config) if mixer in RECURRENT]
    constant = sum(4 * (heads * hd + config.n_head * (3 * hd + 2)) + 8 for mixer in sums)
    token = 8 * bool(config.ngram > 1 or config.counts or config.end_token)
    for mixer in tiled(config):
        token += 4 * (latent + hd if mixer == "latent" else config.n_embd if mixer == "hyena" else 0 if mixer in RECURRENT else 2 * (config.n_kv_head or config.n_head) * hd)
    state = gpt.new_state(2, 5)
    gpt(x[:2, :1], state)
    assert state.nbytes == 2 * constant + 10 * token
    assert a["cache_per_token"] == (constant + 16 * token) // 16
    share = {"mixer": once + sum(mixing[mixer] * heads for mixer in tiled(config)), "ffn": 0, "head": 0}
    for name, module in gpt.named_modules():
        if type(module) is model.Experts:
            work = config.n_expert_active * (module.up["weight"][0].numel() + module.down["weight"][0].numel())
            share["ffn"] += 2 * 16 * work
            experts += 2 * 16 * work
        if type(module) is model.Linear and name not in filters:
            share[next(part for part in share if part in name)] += 2 * 16 * module.weight.numel()
    assert a["forward_flops"] == 2 * 16 * matrices + once + experts + sum(mixing[mixer] * heads for mixer in tiled(config))
    count = {torch.ops.model.grouped: lambda x, w, *_, **__: 2 * x.numel() * w[1]}
    with FlopCounterMode(display=False, custom_mapping=count) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        gpt(x)
    assert a["forward_flops"] == counter.get_total_flops() // 3
    assert a["flops"] == share
    if "latent" not in config.mixer:  # whose products are not all of attention
        attended = [mixer for mixer in tiled(config) if mixer in ("attention", "window", "strided", "valued")]
        assert a["masked_flops"] == len(attended) * mixing["attention"] * heads // 2


def kept_bytes(gpt, x):
    """Bytes of the distinct storages that a real forward pass on this machine saves, the logits included."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no address is given twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        keep(gpt(x))
    for tensor in (*gpt.parameters(), *gpt.buffers()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


def test_accounting_by_context(single):
    """The line says what account says of each length, and of recomputing; the mixers' share grows."""
    config = Config(**TINY, n_expert=2, balance_bias=0.1)
    costs = [model.account(dataclasses.replace(config, block_size=n), 1) for n in (16, 64, 256)]
    shares = [cost["flops"]["mixer"] / cost["forward_flops"] for cost in costs]
    text = " ".join(model.report(config, 1, blocks=(1, 4, 16)).split())
    for n, share, cost in zip((16, 64, 256), shares, costs):
        frugal = model.account(dataclasses.replace(config, block_size=n, balance_bias=0.0, recompute=True), 1)
        kept, less = (f"{a['memory']['activations'] / 2**20:,.0f}" for a in (cost, frugal))
        assert f"{n} tokens: mixer {share:.0%}, " in text
        assert f"activations of a sequence {kept} MiB, with --recompute {less}" in text
    assert shares == sorted(shares) and shares[0] < shares[2] - 0.1


@pytest.mark.parametrize("name", some)
def test_activation_memory_equals_saved_tensors(name, single):
    config = Config(**{**TINY, **VARIANTS[name]})
    measured = kept_bytes(GPT(config), tokens(3, 16))
    counted = account_of(name)["memory"]["activations"]
    masks = sum(4 * 16 * 16 for mixer in tiled(config) if mixer in ("window", "strided"))  # fp32, shared by rows and heads
    if 0 < config.n_kv_head < config.n_head and OLDER:
        pytest.skip("older torch keeps keys and values of grouped queries once a query head")
    assert counted <= measured <= counted + masks


def test_activation_memory_with_dropout(single):
    config = Config(n_layer=2, dropout=0.1)
    counted = model.account(config, 2)["memory"]["activations"]
    assert counted == kept_bytes(GPT(config), tokens(2, 256))
    assert counted > model.account(Config(n_layer=2), 2)["memory"]["activations"]


def test_an_unknown_preset_is_told_the_known_ones(run_main, tmp_path):
    done = run_main("model.py", "--preset=nope", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr == \
        "model.py: --preset=nope: choose from gpt2, gpt2-xl, llama-3-8b, mistral-7b, qwen3-0.6b\n"


@pytest.mark.parametrize("preset,count", [("gpt2", 124_439_808), ("gpt2-xl", 1_557_611_200), ("llama-3-8b", 8_030_261_248),
                                          ("mistral-7b", 7_241_732_096), ("qwen3-0.6b", 596_049_920)])
def test_presets_have_the_published_counts(preset, count, single):
    with torch.device("meta"):
        gpt = GPT(model.options(Config, model.PRESETS[preset].split()))
    assert sum(weight.numel() for weight in gpt.parameters()) == count
    assert set(model.PRESETS) == {"", "gpt2", "gpt2-xl", "llama-3-8b", "mistral-7b", "qwen3-0.6b"}


def test_report(single):
    text = model.report(Config(**PUBLISHED["gpt2"][0]), 8)
    for part in ("124,439,808", "291,648,307,200", "8 x 1,024 tokens", "73,728 bytes a token", "72.00 MiB"):
        assert part in text
    assert "head" not in text.partition("FLOPs")[0]  # tied: no such parameters
    assert max(map(len, text.splitlines())) <= 80


# -------------------------------------------------------------------------------------------------------- extension test

class ToyNorm(nn.Module):
    def __init__(self, config, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x):
        return x / (1 + x.abs().mean(-1, keepdim=True)) * self.weight


class ToyPosition(model.Position):
    def add(self, x, at):
        return x + at[..., None] / 16


class ToyMixer(nn.Module):
    """The normalised mean over all tokens before."""

    def __init__(self, config):
        super().__init__()
        self.norm = ToyNorm(config, config.n_embd)
        self.out = model.Linear(config.n_embd, config.n_embd)

    def forward(self, x, call, layer):
        total = (call.state.layers[layer] or [0])[0] + x.cumsum(1)
        call.state.replace(layer, total[:, -1:])
        return self.out(self.norm(total / (call.at[..., None] + 1)))


TOYS = {"norm": ToyNorm, "position": ToyPosition, "placement": lambda x, start, norm, f: x + torch.tanh(norm(f(x))), "mixer": ToyMixer,
        "ffn": (1, torch.sin)}


@pytest.mark.parametrize("axis", TOYS)
def test_a_key_added_from_outside(axis, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=f"--{axis}=toy: choose from"):
        make(**{axis: "toy"})
    monkeypatch.setitem(model.AXES[axis], "toy", TOYS[axis])
    gpt, x = GPT(Config(**{**TINY, axis: "toy"})), tokens()
    losses = train(gpt, 3, x)
    assert losses[2] < losses[0]
    assert gpt.roles().keys() == dict(gpt.named_parameters()).keys()
    model.save_checkpoint(tmp_path / "toy.pt", gpt, step=3)
    again = model.from_checkpoint(model.load_checkpoint(tmp_path / "toy.pt"))
    close(again(x), gpt(x))
    with torch.no_grad():
        state = again.new_state(3)
        close(torch.cat([again(part, state) for part in x.split([5, 1, 6], 1)], 1), gpt(x))
    assert model.account(gpt.config, 2)["parameters"] == sum(weight.numel() for weight in gpt.parameters())


def test_a_parameter_without_a_role_is_refused(monkeypatch):
    class Roleless(ToyNorm):
        def __init__(self, config, width):
            super().__init__(config, width)
            self.extra = nn.Parameter(torch.empty(width))
    monkeypatch.setitem(model.NORMS, "toy", Roleless)
    with pytest.raises(ValueError, match="no row of ROLES has a name like blocks.0.norm1.extra"):
        make(norm="toy")
    monkeypatch.setitem(model.ROLES, "extra", model.Role("extra", mean=2.0))  # the twin
    assert (GPT(Config(**TINY, norm="toy")).norm.extra == 2).all()


# ---------------------------------------------------------------------------------------------------------- checkpoints

@some_variants
def test_checkpoint_round_trip(changes, tmp_path):
    gpt, x = make(**changes), tokens()
    model.save_checkpoint(tmp_path / "a.pt", gpt, step=7, tokenizer={"kind": "char"})
    checkpoint = model.load_checkpoint(tmp_path / "a.pt")
    assert checkpoint["step"] == 7 and checkpoint["tokenizer"] == {"kind": "char"}
    assert checkpoint["config"] == dataclasses.asdict(gpt.config)
    again = model.from_checkpoint(checkpoint)
    assert again.config == gpt.config and torch.equal(again.eval()(x), gpt(x))
    assert os.listdir(tmp_path) == ["a.pt"]


def test_checkpoint_holds_a_tied_matrix_once(tmp_path):
    gpt = GPT(Config(vocab_size=10000, n_layer=1))
    model.save_checkpoint(tmp_path / "a.pt", gpt)
    assert (tmp_path / "a.pt").stat().st_size < 1.05 * sum(weight.nbytes for weight in gpt.parameters())


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "ckpt.pt"
    model.save_checkpoint(path, GPT(Config(**TINY)), step=1)
    return path


def test_truncated_checkpoint_is_refused(saved, tmp_path):
    content, cut = saved.read_bytes(), tmp_path / "cut.pt"
    sizes = sorted({0, 1, 2, 10, 100, len(content) - 1, *range(0, len(content), len(content) // 40)})
    for size in sizes:
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError, match="cut.pt is not a checkpoint, or is damaged"):
            model.load_checkpoint(cut)
    weight = model.load_checkpoint(saved)["weights"]["embedding.weight"].numpy().tobytes()
    middle = content.index(weight) + len(weight) // 2
    cut.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:])  # a bit of a weight
    with pytest.raises(ValueError, match="cut.pt is not a checkpoint, or is damaged"):
        model.load_checkpoint(cut)
    cut.write_bytes(content)
    assert model.load_checkpoint(cut)["step"] == 1


def test_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pt"):
        model.load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(OSError):
        model.load_checkpoint(tmp_path)


@pytest.mark.parametrize("foreign", [[1, 2], {"a": 1}, {"version": 99, "config": {}, "weights": {}}, torch.zeros(3), "text", 1])
def test_foreign_file_is_refused(foreign, tmp_path):
    torch.save(foreign, tmp_path / "f.pt")
    with pytest.raises(ValueError, match="f.pt is not a checkpoint of format 1"):
        model.load_checkpoint(tmp_path / "f.pt")


@pytest.mark.parametrize("option", ["n_expert", "n_embd"])
def test_a_size_beyond_any_storage_ends_in_one_line(option, tmp_path, run_main):
    done = run_main("model.py", f"--{option}={2**31}", cwd=tmp_path)
    assert done.returncode == 1 and re.fullmatch(r"model.py: Storage size .* overflowed .*\n", done.stderr), done.stderr


def test_a_tokenizer_of_tensors_is_refused(tmp_path):
    checkpoint = dict(version=1, config={}, weights={}, tokenizer=dict(vocab=[torch.zeros(1)]))
    torch.save(checkpoint, tmp_path / "f.pt")
    with pytest.raises(ValueError, match="f.pt does not fit: its tokenizer"):
        model.load_checkpoint(tmp_path / "f.pt")


@pytest.mark.parametrize("content", [b"hello", b"PK\x03\x04" + b"\0" * 100, bytes(range(256)) * 8, pickle.dumps(object, 2)])
def test_what_torch_cannot_read_is_refused(content, tmp_path):
    (tmp_path / "f.pt").write_bytes(content)
    with pytest.raises(ValueError, match="f.pt"):
        model.load_checkpoint(tmp_path / "f.pt")


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("legacy", [False, True])
def test_malicious_checkpoint_is_not_executed(saved, tmp_path, legacy):
    bad, trace = tmp_path / "evil.pt", tmp_path / "trace"
    checkpoint = {**model.load_checkpoint(saved), "train": Evil(trace)}
    torch.save(checkpoint, bad, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="nothing in it was executed"):
        model.load_checkpoint(bad)
    assert not trace.exists()
    torch.load(bad, weights_only=False)["train"].close()  # the twin: a trusting reader runs it
    assert trace.exists()


@pytest.mark.parametrize("change,message", [
    (lambda c: c["config"].update(n_future=3), "n_future"),
    (lambda c: c["config"].update(n_embd=32), "size mismatch"),
    (lambda c: c["config"].update(n_embd="32"), "does not fit"),
    (lambda c: c["config"].update(n_layer=3), "blocks.2"),
    (lambda c: c["config"].update(norm="other"), "--norm=other: choose from rmsnorm, layernorm"),
    (lambda c: c["weights"].pop("norm.weight"), "norm.weight"),
    (lambda c: c["weights"].update(extra=torch.zeros(1)), "extra"),
    (lambda c: c["weights"].update({"norm.weight": torch.zeros(3)}), "norm.weight"),
    (lambda c: c.pop("config"), "config"), (lambda c: c.pop("weights"), "weights"), (lambda c: c.update(config=3), "does not fit")])
def test_checkpoint_that_does_not_fit(saved, change, message):
    checkpoint = model.load_checkpoint(saved)
    model.from_checkpoint(checkpoint)
    change(checkpoint)
    with pytest.raises(ValueError, match=message) as caught:
        model.from_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits are of Unix")
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    import resource
    path = tmp_path / "ckpt.pt"
    small, large = (GPT(Config(n_layer=1, n_embd=n, n_head=1, vocab_size=64)) for n in (8, 256))
    model.save_checkpoint(path, small, step=1)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, usual[1]))
        with pytest.raises(OSError):
            model.save_checkpoint(path, large, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert model.load_checkpoint(path)["step"] == 1
    assert os.listdir(tmp_path) == ["ckpt.pt"]
    model.save_checkpoint(path, large, step=2)  # the twin: with room it is replaced
    assert model.load_checkpoint(path)["step"] == 2


def test_replacing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        with model.replacing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    with open(path, "rb") as reader:
        with model.replacing(path) as file:
            file.write(b"new")
            assert path.read_bytes() == b"old"  # until the block ends
        assert reader.read() == b"old"  # renamed over, not written over: no moment with half a file
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


# -------------------------------------------------------------------------------------------------------- HuggingFace

SMALL = dict(vocab_size=61, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=24)
FAMILIES = {
    "gpt2": ("GPT2", dict(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=24)),
    "llama": ("Llama", dict(SMALL, num_key_value_heads=2, rope_parameters=dict(rope_theta=500.0, rope_type="default"))),
    "smollm": ("Llama", dict(SMALL, num_key_value_heads=1, tie_word_embeddings=True, rms_norm_eps=1e-5)),
    "mistral": ("Mistral", dict(SMALL, num_key_value_heads=2, head_dim=16, sliding_window=5)),
    "mistral-full": ("Mistral", dict(SMALL, num_key_value_heads=4, sliding_window=None)),
    "qwen2.5": ("Qwen2", dict(SMALL, num_key_value_heads=2)),
    "qwen3": ("Qwen3", dict(SMALL, num_key_value_heads=2, head_dim=12, tie_word_embeddings=True)),
    "qwen3-moe": ("Qwen3Moe", dict(SMALL, num_key_value_heads=2, head_dim=12, moe_intermediate_size=20, num_experts=5, num_experts_per_tok=2,
                                   norm_topk_prob=True)),
}


def hf_model(family):
    """A random model of transformers', none of its parameters at 0 or 1."""
    transformers = pytest.importorskip("transformers")
    kind, changes = FAMILIES[family]
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**changes, attn_implementation="eager")
    theirs = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return theirs


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_import_and_export_of(family, single, tmp_path):
    """Their folder gives their logits and their greedy text here; our folder gives the same in transformers."""
    theirs = hf_model(family)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB" if family == "llama" else "1GB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == (family == "llama")
    gpt = model.import_hf(tmp_path / "theirs").eval()
    x = tokens(3, 24, 61)
    expected = theirs(x).logits
    assert expected.abs().max() > 1
    close(gpt(x), expected, 1e-4)
    text = theirs.generate(x[:1, :4], max_new_tokens=18, do_sample=False, eos_token_id=None, pad_token_id=0)
    ours, state = x[:1, :4], gpt.new_state(1)
    logits = gpt(ours, state)
    for _ in range(18):
        ours = torch.cat((ours, logits[:, -1:].argmax(-1)), 1)
        logits = gpt(ours[:, -1:], state)
    assert ours.tolist() == text.tolist()
    model.save_checkpoint(tmp_path / "a.pt", gpt)
    again = model.from_checkpoint(model.load_checkpoint(tmp_path / "a.pt")).eval()
    kind = model.export_hf(again, tmp_path / "ours")
    assert kind == theirs.config.model_type or family == "mistral-full" and kind == "llama"
    back = type(theirs) if kind == theirs.config.model_type else __import__("transformers").AutoModelForCausalLM
    close(back.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()(x).logits, expected, 1e-4)
    assert sorted(os.listdir(tmp_path / "ours")) == ["config.json", "model.safetensors"]


def test_safetensors_are_those_of_the_library(tmp_path, single):
    library = pytest.importorskip("safetensors.torch")
    tensors = {"a": torch.randn(3, 4), "b.c": torch.randn(5).bfloat16(), "half": torch.randn(2, 2).half(), "none": torch.zeros(0, 4)}
    library.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    ours = dict(model.read_safetensors(tmp_path / "a.safetensors"))
    assert ours.keys() == tensors.keys()
    assert all(torch.equal(ours[name], tensors[name]) and ours[name].dtype == tensors[name].dtype for name in tensors)
    turned = {"t": torch.randn(3, 4).T, "b": tensors["b.c"]}
    model.write_safetensors(tmp_path / "b.safetensors", turned)
    theirs = library.load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(theirs[name], turned[name].float()) for name in turned) and theirs.keys() == turned.keys()


@pytest.fixture
def hf_folder(tmp_path, single):
    """A folder as our own export writes it: no library is needed."""
    model.export_hf(make(qk_norm=False, tie_embeddings=False), tmp_path / "hf")
    return tmp_path / "hf"


def rewrite(folder, **changes):
    """Change config.json; a value of None takes the key out."""
    theirs = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in theirs.items() if value is not None}))


@pytest.mark.parametrize("changes,message", [
    (dict(num_hidden_layers=None), "config.json lacks num_hidden_layers"), (dict(hidden_size=None, vocab_size=None), "config.json lacks "),
    (dict(model_type="gemma"), "config.json: model_type=gemma: choose from gpt2, llama, mistral, qwen2, qwen3"),
    (dict(model_type=None), "model_type=None: choose from"), (dict(hidden_act="gelu"), "config.json: hidden_act=gelu is not computed here"),
    (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "config.json: rope_scaling="),
    (dict(rope_parameters=dict(rope_theta=1e4, rope_type="yarn")), "config.json: rope_type=yarn is not computed here"),
    (dict(attention_bias=True), "attention_bias=True is not computed here"), (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    (dict(quantization_config=dict(bits=4)), "quantization_config"), (dict(num_local_experts=8), "num_local_experts=8"),
    (dict(num_hidden_layers=3), "lacks layers.2."), (dict(num_hidden_layers=1), "layers.1."), (dict(intermediate_size=40), "has no place here"),
    (dict(num_hidden_layers="two"), "mislabelled"), (dict(num_attention_heads=3, num_key_value_heads=3, head_dim=None), "config.json: --n_embd=16 is no multiple of --n_head=3")])
def test_config_that_asks_for_what_is_not_there(hf_folder, changes, message):
    model.import_hf(hf_folder)
    rewrite(hf_folder, torch_dtype="float32", bos_token_id=5, attention_dropout=0.1, use_cache=True)  # the twin: known, and silent
    model.import_hf(hf_folder)
    rewrite(hf_folder, **changes)
    with pytest.raises(ValueError) as caught:
        model.import_hf(hf_folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_config_of_experts_that_is_not_computed_here(tmp_path, single):
    model.export_hf(make(n_expert=3), tmp_path)
    model.import_hf(tmp_path)  # the twin
    for changes, message in ((dict(norm_topk_prob=False), "norm_topk_prob=False"), (dict(norm_topk_prob=None), "norm_topk_prob=False"),
                             (dict(decoder_sparse_step=2, norm_topk_prob=True), "decoder_sparse_step=2"),
                             (dict(decoder_sparse_step=1, mlp_only_layers=[0]), "mlp_only_layers=[0]"),
                             (dict(mlp_only_layers=[], num_experts=4), "model.layers.0.mlp.gate.weight [3, 16] has no place here")):
        rewrite(tmp_path, **changes)
        with pytest.raises(ValueError) as caught:
            model.import_hf(tmp_path)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def relabel(change):
    """A function that lets `change` edit the header of a safetensors file, whose bytes stay."""
    def edit(content):
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8:8 + length])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length:]
    return edit


def first(header):
    return next(about for about in header.values() if "shape" in about)


@pytest.mark.parametrize("damage,message", [
    (lambda content: b"", "truncated"), (lambda content: content[:5], "truncated"), (lambda content: content[:100], "truncated"),
    (lambda content: content[:-1], "truncated, or mislabelled at"), (lambda content: content[:len(content) // 2], "truncated, or mislabelled at"),
    (lambda content: b"\xff" * 8 + content[8:], "truncated"), (lambda content: (4).to_bytes(8, "little") + b"nope", "Expecting value"),
    (lambda content: (2).to_bytes(8, "little") + b"[]", "mislabelled"), (lambda content: (2).to_bytes(8, "little") + b"{}", "lacks"),
    (relabel(lambda header: first(header).update(shape=[1, 2])), "mislabelled at"),
    (relabel(lambda header: first(header).update(data_offsets=[-8, 0])), "mislabelled at"),
    (relabel(lambda header: first(header).update(data_offsets=[8, 0])), "mislabelled at"),
    (relabel(lambda header: first(header).update(dtype="I9")), "mislabelled: KeyError('I9')"),
    (relabel(lambda header: first(header).pop("shape")), "mislabelled: KeyError('shape')"),
    (relabel(lambda header: header.update(extra=header.pop("lm_head.weight"))), "extra [23, 16] has no place here"),
    (relabel(lambda header: header.pop("lm_head.weight")), "lacks lm_head.weight")])
def test_damaged_safetensors(hf_folder, damage, message):
    path = hf_folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(damage(content))
    with pytest.raises(ValueError) as caught:
        model.import_hf(hf_folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    path.write_bytes(relabel(lambda header: None)(content))  # the twin
    model.import_hf(hf_folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, single, bad):
    gpt = make(qk_norm=False)
    gpt.blocks[1].ffn.up.weight.data[3, 4] = bad
    model.export_hf(gpt, tmp_path)
    with pytest.raises(ValueError, match="layers.1.mlp.gate_proj.weight has entries that are not finite"):
        model.import_hf(tmp_path)


def test_missing_files(hf_folder):
    (hf_folder / "model.safetensors").rename(hf_folder / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        model.import_hf(hf_folder)
    (hf_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "other.safetensors"}}))
    model.import_hf(hf_folder)
    with pytest.raises(FileNotFoundError, match="config.json"):
        model.import_hf(hf_folder.parent)


@pytest.mark.parametrize("changes,named", [
    (dict(GPT2), "bias"), (dict(ngram=3), "ngram"), (dict(counts=3), "counts"), (dict(mixer="gdn"), "mixer"), (dict(placement="post"), "placement"),
    (dict(softcap=3.0), "softcap"), (dict(attention_softcap=3.0), "attention_softcap"), (dict(ffn="relu2"), "ffn"),
    (dict(n_expert=4, n_expert_shared=1), "n_expert_shared"), (dict(n_expert=4, balance_bias=0.1), "balance_bias"), (dict(GPT2, bias=True, n_kv_head=2), "n_kv_head"), (dict(bias=True), "bias"),
    (dict(HYBRID), "mixer")])
def test_export_of_what_no_family_computes(tmp_path, changes, named):
    with pytest.raises(ValueError, match=f"no kind of HuggingFace's models is this one; .* differs in .*{named}"):
        model.export_hf(make(**changes), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_export_leaves_heads_of_training_out(tmp_path, single):
    gpt = make(ahead=2, ahead_loss=0.1, init="mup", tie_embeddings=False, base_width=8, ngram_rows=131072)  # rows of no table
    tokens = torch.randint(gpt.config.vocab_size, (1, 8))
    assert model.export_hf(gpt, tmp_path) == "qwen3" and torch.equal(model.import_hf(tmp_path)(tokens), gpt(tokens))


def test_import_and_export_by_command(tmp_path, run_main, single):
    model.export_hf(make(), tmp_path / "hf")
    done = run_main("model.py", "--import_hf=hf", "--output=a.pt", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "a.pt" in done.stdout
    done = run_main("model.py", "--ckpt=a.pt", "--export_hf=again", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "of the kind qwen3" in done.stdout
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "hf" / "model.safetensors").read_bytes()
    done = run_main("model.py", "--import_hf=none", "--output=b.pt", cwd=tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "none" in done.stderr


# -------------------------------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("changes,message", [
    (dict(n_embd=10, n_head=4), "--n_embd=10 is no multiple of --n_head=4: set --head_dim"),
    (dict(n_head=4, n_kv_head=3), "--n_head=4: no multiple of --n_kv_head=3"),
    (dict(n_head=4, n_kv_head=8), "--n_head=4: no multiple of --n_kv_head=8"),
    (dict(head_dim=3), "--position=rope turns pairs of channels, a head of 3 is odd: set --head_dim"),
    (dict(mixer="window"), "a window needs both --mixer=window and --window=TOKENS"),
    (dict(window=5), "a window needs both --mixer=window and --window=TOKENS"),
    (dict(dropout=1.0), "--dropout=1.0 must be below 1"),
    *((dict([(name, 0)]), f"--{name}=0 is too small") for name in
      ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "rope_base", "norm_eps")),
    *((dict([(name, -1)]), f"--{name}=-1 is too small") for name in
      ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_kv_head", "head_dim", "n_inner", "window", "dropout",
       "rope_base", "norm_eps")),
    (dict(dropout=float("nan")), "--dropout=nan is too small"),
    (dict(n_expert=2, n_expert_active=3), "--n_expert_active=3 is more than --n_expert=2"),
    (dict(n_expert_active=0), "--n_expert_active=0 is too small"), (dict(balance_loss=-0.1), "--balance_loss=-0.1 is too small"),
    (dict(norm="no"), "--norm=no: choose from rmsnorm, layernorm, gainless"),
    (dict(placement="no"), "--placement=no: choose from pre, post, reordered, parallel, sandwich"),
    (dict(position="no"), "--position=no: choose from rope, sinusoidal, learned, none"),
    (dict(ffn="no"), "--ffn=no: choose from swiglu, geglu, relu, gelu, relu2"),
    (dict(init="no"), "--init=no: choose from zero, gpt2, xavier, mup"),
    (dict(ahead=16, block_size=16), "--ahead=16 leaves nothing of --block_size=16"),
    (dict(init="mup"), "--init=mup needs --tie_embeddings=False"), (dict(mixer="strided"), "a window needs both"),
    (dict(mixer="no"), "--mixer=no: choose from attention, window"),
    (dict(mixer="attention,attention,no"), "--mixer=no: choose from attention, window"),
    (dict(mixer=""), "--mixer=: choose from attention, window"),
    (dict(norm="rmsnorm,layernorm"), "--norm=rmsnorm,layernorm: choose from"),
])
def test_refused(changes, message):
    make()
    with pytest.raises(ValueError) as caught:
        make(**changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [dict(n_embd=10, n_head=4, head_dim=2), dict(head_dim=3, position="none"), dict(n_kv_head=4)])
def test_not_refused(changes):
    gpt, x = make(**changes), tokens()
    close(gpt(x, gpt.new_state(3)), gpt(x))


def test_context_beyond_the_block():
    gpt = make()
    with pytest.raises(ValueError, match="longer than the block_size of 16 tokens"):
        gpt(tokens(1, 17))
    with torch.no_grad():
        state = gpt.new_state(1, 40)
        gpt(tokens(1, 16), state)
        with pytest.raises(ValueError, match="longer than the block_size of 16 tokens"):
            gpt(tokens(1, 1), state)
        assert state.lengths == [16]
        short = gpt.new_state(2, 5)
        gpt(tokens(2, 5), short)
        with pytest.raises(ValueError, match="the state holds 5 tokens, 6 are needed"):
            gpt(tokens(2, 1), short)


def test_truncate_refuses():
    state = make().new_state(2)
    gpt = make()
    with torch.no_grad():
        gpt(tokens(2, 5), state)
    for lengths in ([6, 5], [-1, 5]):
        with pytest.raises(ValueError, match="cannot truncate"):
            state.truncate(lengths)
    with pytest.raises(ValueError):
        state.truncate([5])
    assert state.lengths == [5, 5]


# -------------------------------------------------------------------------------------------- dtypes, compilation, command

@some_variants
def test_bfloat16_autocast(changes, single):
    gpt, x = make(**changes), tokens(2, 16)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")  # "cannot dispatch to fused implementation"
        exact = gpt(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = gpt(x)
            state = gpt.new_state(2)
            cached = torch.cat([gpt(part, state) for part in x.split([9, 1, 6], 1)], 1)
        whole = gpt.bfloat16()(x)
    assert rough.dtype == cached.dtype == whole.dtype == torch.bfloat16
    scale = exact.abs().max()
    for y in (rough, cached, whole):
        most = (y.float() - exact).abs().max() / scale
        assert 0 < most < (0.15 if OLDER else 0.1) or gpt.config.n_expert  # a token may change its expert
        assert (y.float() - exact).abs().mean() / scale < 0.01


def test_cache_may_be_filled_with_gradients_on():
    gpt, x = make(), tokens()
    close(gpt(x, gpt.new_state(3)), gpt(x))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, dict(GPT2, bias=True), dict(HYBRID, n_kv_head=2, dropout=0.2), dict(placement="post", position="sinusoidal"),
                                     dict(mixer="linear,mamba2"), dict(mixer="gdn,attention"), dict(mixer="hyena"), dict(n_expert=4, n_expert_shared=1),
                                     dict(mixer="latent,strided", window=3, end_token=4, ngram=3, ngram_rows=97, residual="scaled"),
                                     dict(recompute=True, softcap=9.0, placement="sandwich"), dict(attention_softcap=2.0, **HYBRID),
                                     dict(mixer="valued", ngram=3, ngram_rows=97, softcap=9.0)])
def test_compiled_model_is_the_same(changes):
    gpt, x = make(**changes).train(), tokens()
    gpt.noise["keys"] = torch.arange(3)
    torch._dynamo.reset()  # else the models before this one count as recompilations
    compiled = torch.compile(gpt, fullgraph=True)
    try:
        y = compiled(x)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        pytest.skip(f"no C++ compiler: {error}")
    close(y, gpt(x))
    names = dict(gpt.named_parameters())
    ours = torch.autograd.grad(gpt(x).square().sum(), names.values())
    theirs = torch.autograd.grad(compiled(x).square().sum(), names.values())
    for a, b in zip(ours, theirs):
        close(a, b, 1e-6)
    gpt.noise["keys"] = torch.arange(3) + 5  # new keys are seen, not baked in
    close(compiled(x), gpt(x))


def test_command_line(tmp_path, run_main, single):
    done = run_main("model.py", "--account", "--preset=gpt2", "--bias=False", "--tokens=1e9", "--accelerator=a100", "--mfu=0.5", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert "124,337,664" in done.stdout and "291,648,307,200" in done.stdout
    flops = 3 * 291_648_307_200 // 1024 * 10**9
    assert f"{flops / 312e12 / 0.5 / 3600:,.1f} hours on one a100 at 50%" in done.stdout and f"{flops:.3g} FLOPs" in done.stdout
    model.save_checkpoint(tmp_path / "own.pt", GPT(Config(n_layer=3, n_embd=48, n_head=3, vocab_size=100, block_size=32)))
    own = run_main("model.py", "--ckpt=own.pt", "--tokens=1", cwd=tmp_path)
    same = run_main("model.py", "--n_layer=3", "--n_embd=48", "--n_head=3", "--vocab_size=100", "--block_size=32", "--tokens=1", cwd=tmp_path)
    assert own.returncode == 0 and own.stdout == same.stdout and " seconds on one h100" in own.stdout
    (tmp_path / "own.pt").unlink()
    done = run_main("model.py", "--n_head=3", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "") and len(done.stderr.splitlines()) == 1
    assert "model.py: --n_embd=128 is no multiple of --n_head=3" in done.stderr
    assert os.listdir(tmp_path) == []
    for word, message, code in [
            ("--preset=gpt3", ": --preset=gpt3: choose from ", 1), ("--accelerator=abacus", "choose from a100", 1),
            ("--n_layr=2", "--n_layer=...", 2), ("--batch_size=0", "--batch_size=0 is too small", 1),
            ("--ngram=-1", "--ngram=-1 is too small", 1)]:
        done = run_main("model.py", word, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (code, "") and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_experts_whose_activation_is_in_single_precision():
    """As a square is on a GPU under autocast: backward, where there is no autocast, has one type."""
    config = Config(vocab_size=23, block_size=16, n_layer=1, n_head=2, n_embd=16, ffn="relu2", n_expert=4, n_inner=16)
    gpt = GPT(config)
    gpt.blocks[0].ffn.f = lambda h: F.relu(h).float().square()
    with torch.autocast("cpu", torch.bfloat16):
        loss = gpt(torch.randint(23, (2, 12))).float().logsumexp(-1).sum()
    loss.backward()
    assert gpt.blocks[0].ffn.down["weight"].grad.isfinite().all()
