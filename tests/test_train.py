"""train.py against torch's optimizers, brute force in float64, and itself: interrupted, killed, cut into micro-batches, on ranks.

Most tests run in this process on token files of a few thousand random ids. `launch` is the command line without a new
interpreter; `make` is a Run without a command line, in float64 unless a test says otherwise.
"""
import copy
import dataclasses
import hashlib
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.nn import functional as F

import bpe
import data
import model
import train

V, T = 50, 16
SHAPE = dict(n_layer=1, n_embd=16, block_size=T, batch_size=4, ngram=0, device="cpu")
WORDS = [f"--{name}={value}" for name, value in SHAPE.items()]
NO_TOKENIZER = SimpleNamespace(vocab=[], special_tokens={}, to_dict=dict)
KEYS = ["step", "tokens", "flops", "seconds", "train_loss", "val_loss", "bpb", "lr", "grad_norm", "tokens_per_s"]
TIMES = ("seconds", "tokens_per_s", "pace")


@pytest.fixture(autouse=True)
def small_runs(monkeypatch, accounts_once):
    """One thread, and nothing measured."""
    monkeypatch.setattr(train, "measured_peak", lambda device, dtype: 1e10)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # no test here pulls the plug
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    torch.set_num_threads(1)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)


def random_ids(count, seed=0):
    return np.random.default_rng(seed).integers(V, size=count).astype(np.uint16)


def source(tokens, mask=None):
    return train.Source(tokens, np.ones(len(tokens), bool) if mask is None else mask)


@pytest.fixture
def folder(tmp_path):
    """A folder of ready tokens; the last window of val.npy is not full."""
    path = tmp_path / "tokens"
    path.mkdir()
    np.save(path / "train.npy", random_ids(3000))
    np.save(path / "val.npy", random_ids(333, seed=1))
    return path


@pytest.fixture
def launch(monkeypatch, capsys, folder, tmp_path):
    """Run train.py's command line here: launch("--max_iters=3") -> code, out, message (what a shell would see on stderr)."""
    def go(*words, data=folder, output=tmp_path / "out", shape=WORDS):
        words = [f"--data={data}", f"--output={output}", *shape, *map(str, words)]
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        code = 0
        try:
            train.run(train.main)
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return SimpleNamespace(code=1, out=out, message=code) if isinstance(code, str) else SimpleNamespace(code=code, out=out, message=err)
    return go


def filled(**changes):
    """The options of a tiny run, as recipe leaves them."""
    return train.recipe(train.Options(**{**SHAPE, "vocab_size": V, **changes}), 3000, V, 1e10)


def make(checkpoint=(), tokenizer=NO_TOKENIZER, **changes):
    o = filled(**changes)
    return train.Run(o, o.vocab_size, tokenizer, dict(checkpoint))


def shaken(run):
    """A run whose every weight is far from zero, so that no gradient vanishes."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in run.gpt.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return run


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def timeless(record):
    return {key: value for key, value in record.items() if key not in TIMES}


def assert_same_run(one, other):
    """Two folders hold the same run, bit for bit but for the clock."""
    for name in ("ckpt.pt", "best.pt"):
        a, b = model.load_checkpoint(one / name), model.load_checkpoint(other / name)
        assert a["step"] == b["step"] and a["weights"].keys() == b["weights"].keys() and a["optimizer"].keys() == b["optimizer"].keys()
        assert [key for key in a["weights"] if not torch.equal(a["weights"][key], b["weights"][key])] == []
        for key, state in a["optimizer"].items():
            assert state and len(state) == len(b["optimizer"][key])
            assert all(torch.equal(x, y) for x, y in zip(state, b["optimizer"][key])), key
        assert timeless(a["progress"]) == timeless(b["progress"])
    logs = [list(map(timeless, read_log(path)[1:])) for path in (one, other)]
    assert logs[0] == logs[1]


# ----------------------------------------------------------------------------------------------------------- optimizers

def reference_groups(gpt, o):
    """Parameter groups for torch.optim.AdamW, found by name and shape: matrices inside blocks decay, nothing else."""
    groups = {"matrix": [], "embedding": [], "rest": []}
    for name, weight in gpt.named_parameters():
        kind = "matrix" if weight.ndim == 2 and name.startswith("blocks") else name.split(".")[0]
        groups[kind if kind in groups else "rest"].append(weight)
    return [dict(params=groups["matrix"], weight_decay=o.weight_decay), dict(params=groups["rest"], weight_decay=0),
            dict(params=groups["embedding"], weight_decay=0, times=1 if o.tie_embeddings else 10)]


@pytest.mark.parametrize("changes", [
    dict(grad_clip=0.0), dict(grad_clip=0.05, bias=True), dict(grad_clip=1.0, tie_embeddings=True, warmup_iters=5)])
def test_a_run_with_adamw_is_torch_adamw(changes, double):
    """40 steps: same losses, gradient norms and weights as torch.optim.AdamW with parameter groups on the same batches."""
    run = shaken(make(optimizer="adamw", max_iters=40, weight_decay=0.3, beta1=0.8, beta2=0.99, schedule="cosine", **changes))
    o, tokens = run.o, random_ids(3000)
    gpt = copy.deepcopy(run.gpt)
    optimizer = torch.optim.AdamW(reference_groups(gpt, o), lr=1.0, betas=(0.8, 0.99), eps=1e-8)
    for step in range(40):
        _, starts = train.batch_starts(o.seed, step, 4, [len(tokens)], T)
        x = torch.from_numpy(np.stack([tokens[start:start + T + 1] for start in starts]).astype(np.int64))
        expected = F.cross_entropy(gpt(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        expected.backward()
        norm = nn.utils.clip_grad_norm_(gpt.parameters(), o.grad_clip or 1e9)
        done = (step - o.warmup_iters) / (40 - o.warmup_iters)
        warm = min(1, (step + 1) / (o.warmup_iters + 1))
        for group in optimizer.param_groups:
            assert group["params"]
            group["lr"] = o.learning_rate * group.get("times", 1) * warm * (1 + math.cos(math.pi * max(0, done))) / 2
        optimizer.step()
        loss, stopped = run.train_step([source(tokens)], False)
        assert loss == pytest.approx(expected.item(), rel=1e-10) and not stopped
        assert run.progress.grad_norm == pytest.approx(norm.item(), rel=1e-9)
    theirs = dict(gpt.named_parameters())
    moved = 0
    for name, weight in run.gpt.named_parameters():
        assert (weight - theirs[name]).abs().max() < 1e-9, name
        moved += weight.numel()
    assert moved == sum(weight.numel() for weight in gpt.parameters())


def test_adamw_first_steps_by_hand():
    """With b1 = 0.5, b2 = 0.75 and gradients 2, then 0: by fractions, not by torch."""
    o = filled(beta1=0.5, beta2=0.75)
    weight, state = nn.Parameter(torch.tensor([1.0], dtype=torch.float64)), []
    weight.grad = torch.full_like(weight, 2)
    train.adamw(weight, state, 0.1, 1, o)  # M = 2, V = 4: a step of the rate
    assert weight.item() == pytest.approx(0.9, abs=1e-8)
    weight.grad = torch.zeros_like(weight)
    train.adamw(weight, state, 0.1, 2, o)  # m = 1/2, M = 2/3; v = 3/4, V = 12/7
    assert weight.item() == pytest.approx(0.9 - 0.1 * (2 / 3) / math.sqrt(12 / 7), abs=1e-8)


def test_adagrad_by_hand_sparse_and_dense():
    """Rows against the formula in numpy; a sparse gradient, with a row twice, moves what a dense one moves."""
    o, rng = filled(), np.random.default_rng(0)
    rows = [np.array([1, 3, 3]), np.array([3, 0, 4])]
    grads = [rng.normal(size=(3, 4)) for _ in rows]
    weights, states, sums, expected = [nn.Parameter(torch.ones(6, 4, dtype=torch.float64)) for _ in range(2)], [[], []], np.zeros(6), np.ones((6, 4))
    for t, (row, grad) in enumerate(zip(rows, grads), 1):
        dense = np.zeros((6, 4))
        np.add.at(dense, row, grad)
        sums += (dense**2).mean(1)
        expected -= 0.1 * dense / (np.sqrt(sums)[:, None] + 1e-8)
        weights[0].grad = torch.sparse_coo_tensor(torch.from_numpy(row)[None], torch.from_numpy(grad), (6, 4), check_invariants=True)
        weights[1].grad = torch.from_numpy(dense)
        for weight, state in zip(weights, states):
            train.adagrad(weight, state, 0.1, t, o)
    assert all(np.allclose(weight.detach(), expected, atol=1e-12) for weight in weights)
    assert (weights[0][[2, 5]] == 1).all() and states[0][0].shape == (6, 1)


def test_tables_of_ngrams_are_trained_sparsely():
    run = make(ngram=3, ngram_rows=500, max_iters=3)
    before = {name: weight.detach().clone() for name, weight in run.weights.items()}
    tokens = np.random.default_rng(1).integers(16, size=400).astype(np.uint16)
    for _ in range(2):  # in the first one the head is zero, and no gradient comes through it
        run.train_step([source(tokens)], False)
    tables = [name for name, role in run.roles.items() if role == "table"]
    assert len(tables) == 2
    for name in tables:
        moved = (run.weights[name] != before[name]).any(1).sum().item()
        assert 0 < moved < 500 and run.state[name][0].shape == (500, 1) and (run.state[name][0] > 0).sum() == moved


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_sparse_tables_learn_what_dense_ones_do(double, micro_batch):
    """Tables that are summed have one gradient tensor between them: each must be divided by the count once."""
    runs = [shaken(make(ngram=4, ngram_rows=50, mixer="valued", max_iters=3, micro_batch=micro_batch)) for _ in range(2)]
    for name, module in runs[1].gpt.named_modules():
        if isinstance(module, model.Embedding):
            module.sparse = False
    tokens = np.random.default_rng(1).integers(16, size=400).astype(np.uint16)
    for run in runs:
        start = {name: weight.detach().clone() for name, weight in run.weights.items()}
        for _ in range(3):
            run.train_step([source(tokens)], False)
        steps = [(weight - start[name]).abs().max() for name, weight in run.weights.items() if run.roles[name] == "table"]
        assert len(steps) == 4 and min(steps) > 0.05  # Adagrad's first step of a row is the rate, 0.1 in root mean square
    for name, weight in runs[0].weights.items():
        assert torch.allclose(weight, runs[1].weights[name], atol=1e-9), name


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16), (3, 2, 20, 8), (1, 9), (9, 1)])
def test_orthogonalise_against_svd(shape, double):
    """g = U S V^T, singular values over three decades -> U f(S) V^T, f(S) near 1: the directions stay."""
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    s = torch.logspace(0, -2.5, u.shape[-1])
    for scale in (1e-3, 1.0, 1e4):
        x = train.orthogonalise(scale * u * s @ vt)
        inside = u.mT @ x @ vt.mT  # diagonal, if the directions stay
        values = inside.diagonal(dim1=-2, dim2=-1)
        assert x.shape == torch.Size(shape)
        assert (inside - torch.diag_embed(values)).abs().max() < 1e-9 and (u @ inside @ vt - x).abs().max() < 1e-9
        assert 0.85 < values.min() and values.max() < 1.15, values


def test_orthogonalise_keeps_zero():
    assert torch.equal(train.orthogonalise(torch.zeros(4, 6)), torch.zeros(4, 6))


@pytest.mark.parametrize("shape", [(64, 64), (16, 200), (200, 16)])
def test_muon_formula_and_step_size(shape, double):
    """Three steps against the formula with an SVD in it; the step has the root mean square of AdamW's, 0.2 x rate."""
    o, rate = filled(momentum=0.9), 0.03
    torch.manual_seed(0)
    weight, state, m = nn.Parameter(torch.randn(shape)), [], torch.zeros(shape)
    for t in (1, 2, 3):
        before, g = weight.detach().clone(), torch.randn(shape)
        weight.grad = g.clone()
        train.muon(weight, state, rate, t, o)
        m = 0.9 * m + 0.1 * g
        u, s, vt = torch.linalg.svd(0.1 * g + 0.9 * m, full_matrices=False)
        x = s / (1.02 * s.norm() + 1e-7)
        for a, b, c in train.POLAR:
            x = a * x + b * x**3 + c * x**5
        expected = before - rate * 0.2 * max(shape) ** 0.5 * (u * x @ vt)
        assert (weight - expected).abs().max() < 1e-9
        assert (weight - before).square().mean().sqrt().item() == pytest.approx(0.2 * rate, rel=0.07)
    assert len(state) == 1 and torch.allclose(state[0], m)


@pytest.mark.parametrize("changes", [dict(optimizer="muon"), dict(optimizer="soap"), dict(optimizer="muon", n_expert=3, n_inner=20)], ids=str)
def test_stacks_move_as_single_matrices(changes, double, monkeypatch):
    """What a GPU moves as stacks, of four layers' matrices three and one, against a matrix at a time; a run may go on elsewhere."""
    alone, other = (shaken(make(n_layer=4, learning_rate=0.02, weight_decay=0.1, max_iters=12, **changes)) for _ in range(2))
    usual, shapes, tokens = train.OPTIMIZERS[changes["optimizer"]], [], source(random_ids(3000))
    monkeypatch.setitem(train.OPTIMIZERS, changes["optimizer"], lambda weight, *rest: shapes.append(weight.shape) or usual(weight, *rest))
    matrices = [weight for name, weight in alone.weights.items() if model.ROLES[alone.roles[name]].muon]
    monkeypatch.setattr(train, "STACK", 2 * max(weight.numel() for weight in matrices))
    for stacks in (True, False, True):
        other.stacks = stacks
        for step in range(4):
            alone.train_step([tokens], False)
            shapes.clear()
            other.train_step([tokens], False)
        assert (len(shapes) < len(matrices)) == stacks
    for name, weight in alone.weights.items():
        assert (weight - other.weights[name]).abs().max() < 1e-9, name
        assert [x.shape for x in alone.state[name]] == [x.shape for x in other.state[name]]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torch_sgd(momentum, double):
    """All of a model: what is neither a hidden matrix nor a table has SGD, too."""
    run = shaken(make(optimizer="sgd", momentum=momentum, learning_rate=0.02, weight_decay=0.0, grad_clip=0.0, max_iters=20))
    gpt, tokens = copy.deepcopy(run.gpt), random_ids(3000)
    groups = [dict(params=[weight], times=rate) for weight, rate in zip(gpt.parameters(), run.rates.values())]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=momentum)
    for step in range(20):
        _, starts = train.batch_starts(0, step, 4, [3000], T)
        x = torch.from_numpy(np.stack([tokens[at:at + T + 1] for at in starts]).astype(np.int64))
        F.cross_entropy(gpt(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
        for group in optimizer.param_groups:
            group["lr"] = train.rate(step, run.o) * group["times"]
        optimizer.step()
        optimizer.zero_grad()
        run.train_step([source(tokens)], False)
    assert all((weight - run.weights[name]).abs().max() < 1e-9 for name, weight in gpt.named_parameters())


def soap_by_hand(gradients, rate, o):
    """SOAP's total step in numpy: means, bases by `eigh` at first, then QR every tenth step.

    Of the directions in which the first gradient is 0 any base will do: torch's is taken.
    """
    total, m, v = 0, 0, 0
    for t, g in enumerate(gradients, 1):
        if t == 1:
            a, b = g @ g.T, g.T @ g
            G = torch.from_numpy(g)
            p, q = (torch.linalg.eigh(x).eigenvectors.numpy() for x in (G @ G.mT, G.mT @ G))
        m = o.beta1 * m + (1 - o.beta1) * g
        v = o.beta2 * v + (1 - o.beta2) * (p.T @ g @ q) ** 2
        rotated = (p.T @ m @ q / (1 - o.beta1**t)) / (np.sqrt(v / (1 - o.beta2**t)) + 1e-8)
        total = total - rate * p @ rotated @ q.T
        a, b = o.beta2 * a + (1 - o.beta2) * g @ g.T, o.beta2 * b + (1 - o.beta2) * g.T @ g
        if t % 10 == 0:
            p, q = np.linalg.qr(a @ p)[0], np.linalg.qr(b @ q)[0]
    return total


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5), (1, 7)])
def test_soap_by_hand_and_in_other_coordinates(shape, double):
    """25 steps against numpy; and in turned coordinates U G W the weight moves by U step W, as the bases turn along."""
    o = filled(beta1=0.8, beta2=0.9)
    torch.manual_seed(4)
    gradients = torch.randn(25, *shape) + torch.randn(shape)
    u, w = (torch.linalg.qr(torch.randn(n, n)).Q for n in shape)

    def moved(gradients):
        weight, state = nn.Parameter(torch.zeros(shape)), []
        for t, weight.grad in enumerate(gradients, 1):
            train.soap(weight, state, 0.01, t, o)
        assert [tuple(part.shape) for part in state[2:]] == 2 * [(shape[0],) * 2, (shape[1],) * 2]
        return weight.detach()
    found = moved(gradients)
    assert np.abs(found.numpy() - soap_by_hand(gradients.numpy(), 0.01, o)).max() < 1e-7
    if shape[0] == shape[1]:  # else bases of what is 0 in the first gradient matter
        assert (u @ found @ w - moved(u @ gradients @ w)).abs().max() < 1e-6
        adamw, state = nn.Parameter(torch.zeros(shape)), []
        for t, adamw.grad in enumerate(u @ gradients @ w, 1):
            train.adamw(adamw, state, 0.01, t, o)
        assert (u @ found @ w - adamw).abs().max() > 1e-3  # AdamW has coordinates of its own


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("tie", [False, True])
def test_each_parameter_is_updated_once_by_its_role(optimizer, tie, monkeypatch):
    calls = []

    def recorder(name, inner):
        def step(weight, state, rate, t, o):
            calls.append((id(weight), name, t, rate))
            inner(weight, state, rate, t, o)
        return step

    monkeypatch.setitem(train.OPTIMIZERS, "muon", recorder("muon", train.muon))
    monkeypatch.setattr(train, "adamw", recorder("adamw", train.adamw))
    monkeypatch.setitem(train.OPTIMIZERS, "adamw", train.adamw)
    run = shaken(make(optimizer=optimizer, tie_embeddings=tie, bias=True, position="learned", n_layer=2))
    before = {name: weight.detach().clone() for name, weight in run.gpt.named_parameters()}
    run.train_step([source(random_ids(3000))], False)
    names = {id(weight): name for name, weight in run.gpt.named_parameters()}
    assert sorted(call[0] for call in calls) == sorted(names)  # each once
    for weight, kind, t, rate in calls:
        name, speed = names[weight], run.o.learning_rate
        hidden = name.startswith("blocks") and run.gpt.get_parameter(name).ndim == 2
        assert kind == ("muon" if hidden and optimizer == "muon" else "adamw") and t == 1, name
        fast = name == "position.table.weight" or name == "embedding.weight" and not tie
        assert rate == pytest.approx(10 * speed if fast else speed), name
        assert not torch.equal(run.gpt.get_parameter(name), before[name]), name
    assert all(weight.grad is None for weight in run.gpt.parameters())


def test_an_update_by_role(double):
    """Muon's matrices shrink by rate x decay before the step; a gradient above grad_clip is scaled to it, then divided no more."""
    run = shaken(make(weight_decay=0.5, grad_clip=0.25, learning_rate=0.02))
    torch.manual_seed(2)
    gradients = {name: torch.randn_like(weight) for name, weight in run.weights.items()}
    before = {name: weight.detach().clone() for name, weight in run.weights.items()}
    for name, weight in run.weights.items():
        weight.grad = 3 * gradients[name]
    run.update(3.0)
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
    assert run.progress.grad_norm == pytest.approx(norm)  # before clipping
    for name, weight in run.weights.items():
        g = gradients[name] * 0.25 / norm
        if name.startswith("blocks") and weight.ndim == 2:
            start, toy = before[name] * (1 - 0.02 * 0.5), train.muon
        else:
            start, toy = before[name], train.adamw
        expected = nn.Parameter(start.clone())
        expected.grad = g
        toy(expected, [], 0.02 * (10 if name == "embedding.weight" else 1), 1, run.o)
        assert (weight - expected).abs().max() < 1e-4 * 0.02, name  # torch's clipping adds 1e-6 to the norm


# ----------------------------------------------------------------------------------------------------------------- loss

class Fixed(nn.Module):
    """A model that answers with given logits."""

    ahead = ()

    def __init__(self, logits):
        super().__init__()
        self.counts = SimpleNamespace(at_work=False)
        self.given, self.logits = nn.Parameter(logits), nn.Identity()
        self.config = model.Config(vocab_size=logits.shape[-1])

    def extra_loss(self):
        return 0.0

    def hidden(self, tokens):
        return self.given


def brute_loss(logits, targets):
    """Sum of -log softmax over targets that are not -1, in Python's floats."""
    total, count = 0.0, 0
    for row, target in zip(logits.flatten(0, 1).tolist(), targets.flatten().tolist()):
        if target != -1:
            top = max(row)
            total += top + math.log(math.fsum(math.exp(x - top) for x in row)) - row[target]
            count += 1
    return total, count


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_objective(scale, dtype, tolerance):
    torch.manual_seed(0)
    logits, targets = scale * torch.randn(3, 5, 11, dtype=dtype), torch.randint(11, (3, 5))
    targets[0, 2] = targets[2, 4] = targets[2, 3] = -1
    objective = train.Objective(Fixed(logits))
    total, count = objective(torch.zeros(3, 5, dtype=torch.long), targets)
    expected, n = brute_loss(logits, targets)
    assert count.item() == n == 12 and total.item() == pytest.approx(expected, rel=tolerance)
    assert total.item() == pytest.approx(12 * F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1).item(), rel=tolerance)
    total.backward()
    gradient = objective.gpt.given.grad
    assert gradient.isfinite().all() and not gradient[0, 2].any() and not gradient[2, 3:].any()
    gradient[0, 2] = gradient[2, 3:] = 0
    one = (F.softmax(logits.detach(), -1) - F.one_hot(targets.clamp(min=0), 11)) * (targets >= 0)[..., None]
    assert (gradient - one).abs().max() < 1e-6


@pytest.mark.parametrize("words", [dict(), dict(softcap=5.0), dict(tie_embeddings=True, bias=True)])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_chunks_of_the_output_layer(words, z_loss, double, monkeypatch):
    """Loss and every gradient are those of the whole logits, which are never there: the largest tensor is a chunk."""
    run, biggest = shaken(make(n_layer=2, **words)), []
    x, targets = torch.randint(V, (3, T)), torch.randint(-1, V, (3, T))
    found = []
    for logits in (2**24, 7 * V - 1, 1):  # of all, 7, one row
        monkeypatch.setattr(train, "LOGITS", logits)
        hook = run.gpt.head.register_forward_hook(lambda head, x, y: biggest.append(y.numel() // V))
        objective = train.Objective(run.gpt, z_loss)
        loss, count = objective(x, targets)
        (0.5 * loss).backward()
        found.append((loss.item(), count.item(), {name: weight.grad for name, weight in run.weights.items()}))
        run.gpt.zero_grad(set_to_none=True)
        hook.remove()
        with torch.no_grad():
            assert objective(x, targets)[0].item() == pytest.approx(loss.item(), rel=1e-12)
    assert biggest == [48] + 6 * [7] + [6] + 48 * [1]
    for loss, count, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-12) and count == found[0][1] == (targets >= 0).sum()
        assert all((gradients[name] - g).abs().max() < 1e-12 for name, g in found[0][2].items())
    # z-loss by hand, and in training alone
    logits = run.gpt.head(run.gpt.hidden(x)).detach()
    extra = sum(float(row.exp().sum().log()) ** 2 for row, target in zip(logits.flatten(0, 1), targets.flatten()) if target >= 0)
    plain = train.Objective(run.gpt)(x, targets)[0].item()
    assert found[0][0] - plain == pytest.approx(z_loss * extra, rel=1e-9, abs=1e-9)
    assert train.Objective(run.gpt, z_loss).eval()(x, targets)[0].item() == pytest.approx(plain, rel=1e-12)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_teacher(weight, double, monkeypatch):
    """The sum is p log(p / q) and torch's cross_entropy by their weights, also in chunks, in which neither model's logits are whole."""
    run, teacher, biggest = shaken(make(n_layer=2, dropout=0.0)), shaken(make(n_layer=1, n_embd=8)).gpt.eval().requires_grad_(False), []
    x, targets = torch.randint(V, (3, T)), torch.randint(-1, V, (3, T))
    logits, right = run.gpt(x)[targets >= 0], teacher(x)[targets >= 0]
    own = F.cross_entropy(logits, targets[targets >= 0], reduction="sum")
    p, q = right.softmax(-1), logits.softmax(-1)
    whole = (1 - weight) * own + weight * (p * (p / q).log()).sum()
    whole.backward()
    expected = {name: p.grad for name, p in run.weights.items()}
    hooks = [gpt.head.register_forward_hook(lambda head, x, y: biggest.append(y.numel() // V)) for gpt in (run.gpt, teacher)]
    for logits in (2**24, 7 * V - 1):
        monkeypatch.setattr(train, "LOGITS", logits)
        run.gpt.zero_grad(set_to_none=True)
        objective = train.Objective(run.gpt, 0.0, (teacher, weight))
        loss, count = objective(x, targets)
        loss.backward()
        assert count == (targets >= 0).sum() and loss.item() == pytest.approx(whole.item(), rel=1e-12)
        assert all((p.grad - expected[name]).abs().max() < 1e-12 for name, p in run.weights.items())
    assert biggest == 2 * [48] + 2 * 12 * [4]  # 48 rows: half of the 7 are for each model
    for hook in hooks:
        hook.remove()
    assert len({*objective.parameters()} & {*teacher.parameters()}) == 0
    assert objective.eval()(x, targets)[0].item() == pytest.approx(own.item(), rel=1e-12)  # the teacher is for training alone


def test_a_copy_of_the_teacher_has_nothing_to_learn(launch, tmp_path):
    assert launch("--max_iters=3", output=tmp_path / "t").code == 0
    ckpt = tmp_path / "t" / "ckpt.pt"
    words = [f"--teacher={ckpt}", "--max_iters=2", "--eval_interval=1", "--optimizer=adamw"]
    done = launch(*words, f"--init_from={ckpt}", "--teacher_weight=1")
    assert done.code == 0, done.message
    one, two = read_log(tmp_path / "out")[1:]
    assert abs(one["train_loss"]) < 1e-6 and one["val_loss"] > 1  # of the tokens, as ever
    assert launch(*words, output=tmp_path / "other").code == 0
    assert read_log(tmp_path / "other")[1]["train_loss"] > 1
    refused(launch(*words, output=tmp_path / "t"), "--teacher", "give another --output")  # a resumed run would learn from itself
    refused(launch(*words, "--teacher_weight=1.5"), "--teacher_weight=1.5 must be from 0 to 1")
    refused(launch(*words, f"--block_size={2 * T}"), f"takes {T} tokens")
    checkpoint = torch.load(ckpt, weights_only=True)
    def resize(by):  # as most models of HuggingFace's have rows for more tokens than their tokenizer
        wide = {name: nn.functional.pad(x, (0, 0, 0, by)) if len(x) == V and x.ndim == 2 else x for name, x in checkpoint["weights"].items()}
        torch.save(checkpoint | dict(config=checkpoint["config"] | dict(vocab_size=V + by), weights=wide, tokenizer=None), ckpt)
    torch.save(checkpoint, tmp_path / "t.pt")
    resize(5)
    done = launch(*words, f"--init_from={tmp_path / 't.pt'}", "--teacher_weight=1", output=tmp_path / "padded")
    assert done.code == 0, done.message
    assert abs(read_log(tmp_path / "padded")[1]["train_loss"]) < 1e-6  # what it says of tokens that there are not is left out
    resize(-1)
    refused(launch(*words), f"knows {V - 1} tokens, the model {V}")
    torch.save(checkpoint | dict(tokenizer=dict(kind="char")), ckpt)
    refused(launch(*words), "has another tokenizer than the tokens")


def test_a_teacher_without_a_tokenizer(launch, folder, tmp_path):
    """As model.py --import_hf writes it: its ids are taken to be those of the tokens, as with --init_from."""
    bpe.train("byte", ["abc"], 257).save(folder / "tokenizer.json")
    assert launch("--max_iters=2", output=tmp_path / "t").code == 0
    ckpt = tmp_path / "t" / "ckpt.pt"
    torch.save(torch.load(ckpt, weights_only=True) | dict(tokenizer=None), ckpt)
    done = launch(f"--teacher={ckpt}", "--max_iters=2")
    assert done.code == 0, done.message


@pytest.mark.parametrize("wide, without", [(V, 3), (3000, 4)])
def test_memory_of_a_teacher(wide, without, tmp_path, monkeypatch):
    """A micro-batch leaves room for what a backward pass keeps more with a teacher than without, and for its last layer."""
    run, kept = shaken(make(vocab_size=wide)), [{}, {}]
    teacher = model.GPT(dataclasses.replace(run.gpt.config, n_layer=2, n_embd=48, n_head=1)).requires_grad_(False)
    model.save_checkpoint(tmp_path / "t.pt", teacher)
    x = torch.randint(wide, (4, T))
    for found, taught in zip(kept, ((), (teacher, 0.5))):
        def keep(tensor, found=found):
            found[tensor.untyped_storage().data_ptr()] = tensor  # which lives on, so that no other gets its place
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            train.Objective(run.gpt, 0.0, taught)(x, x)
    less, more = (sum(tensor.untyped_storage().nbytes() for tensor in found.values()) for found in kept)
    cost = model.account(run.gpt.config, 1)
    own = cost["memory"]["activations"]
    each = own + (more - less) / 4 + T * 48 * 4
    for factor, fits in ((0.98, 2), (1.02, 3)):
        free = cost["memory_total"] - own + factor * 3 * each
        monkeypatch.setattr(train, "free_memory", lambda device: free)
        assert make(vocab_size=wide, teacher=str(tmp_path / "t.pt")).o.micro_batch == fits
    assert make(vocab_size=wide).o.micro_batch == without


def test_what_was_pruned_stays_0(launch, tmp_path):
    """Through training, a checkpoint and --resume, where the checkpoint says that it was pruned; else all may move."""
    assert launch("--max_iters=3", output=tmp_path / "t").code == 0
    checkpoint = torch.load(tmp_path / "t" / "ckpt.pt", weights_only=True)
    name, matrix = "blocks.0.ffn.up.weight", checkpoint["weights"]["blocks.0.ffn.up.weight"]
    matrix[:, ::2] = 0
    for pruned, gone in ((True, matrix.shape[1] // 2), (False, 0)):
        torch.save(checkpoint | dict(pruned=pruned), tmp_path / "p.pt")
        assert launch("--max_iters=2", f"--init_from={tmp_path / 'p.pt'}", output=tmp_path / f"out{pruned}").code == 0
        assert launch("--max_iters=4", "--resume", output=tmp_path / f"out{pruned}").code == 0
        found = torch.load(tmp_path / f"out{pruned}" / "ckpt.pt", weights_only=True)
        assert found["step"] == 4 and (found["weights"][name] == 0).all(0).sum() == gone and not torch.equal(found["weights"][name], matrix)


def test_a_checkpoint_of_before_an_option_was_there_goes_on(launch, tmp_path):
    assert launch("--max_iters=2", "--eval_interval=2").code == 0
    ckpt = tmp_path / "out" / "ckpt.pt"
    checkpoint = torch.load(ckpt, weights_only=True)
    for options in (checkpoint["config"], checkpoint["train"]):
        del options["softcap"]
    torch.save(checkpoint, ckpt)
    assert launch("--max_iters=3", f"--init_from={ckpt}", output=tmp_path / "new").code == 0
    assert launch("--max_iters=3", "--resume").code == 0 and torch.load(ckpt, weights_only=True)["step"] == 3


def test_a_checkpoint_with_an_option_that_is_gone_goes_on(launch, tmp_path):
    assert launch("--max_iters=2").code == 0
    ckpt = tmp_path / "out" / "ckpt.pt"
    checkpoint = torch.load(ckpt, weights_only=True)
    checkpoint["train"]["teacher_temperature"] = 1.0
    torch.save(checkpoint, ckpt)
    assert launch("--max_iters=3", "--resume", shape=[]).code == 0 and torch.load(ckpt, weights_only=True)["step"] == 3


def test_evaluations_leave_out_what_training_adds():
    """z-loss is no part of a validation loss."""
    tokens = [source((np.arange(300) * 7 % V).astype(np.uint16))]
    runs = [shaken(make(n_layer=1, z_loss=z_loss)) for z_loss in (0.0, 1.0)]
    for run in runs:
        run.progress.seconds = 1.0
    assert runs[0].evaluate(tokens)["val_loss"] == runs[1].evaluate(tokens)["val_loss"]


def test_tokens_of_each_expert_are_in_the_log(launch, tmp_path, monkeypatch):
    """Of a step's last micro-batch, a list a layer: what the router's own scores choose; a resumed run has them, too."""
    words = ["--n_expert=3", "--n_expert_active=2", "--n_layer=2", "--max_iters=4", "--eval_interval=2", "--micro_batch=3"]
    seen, usual = [], model.Experts.forward

    def forward(ffn, x):
        if ffn.training and type(x) is torch.Tensor:  # not the accounting's
            best = ffn.router(x).flatten(0, 1).argsort(1, descending=True)[:, :2]
            seen.append(np.bincount(best.flatten().numpy(), minlength=3).tolist())
        return usual(ffn, x)
    monkeypatch.setattr(model.Experts, "forward", forward)
    assert launch(*words).code == 0
    two, four = read_log(tmp_path / "out")[1:]
    assert len(seen) == 4 * 2 * 2  # steps, micro-batches of 3 and 1 rows, layers
    assert list(two) == [*KEYS, "expert_tokens"] and (two["expert_tokens"], four["expert_tokens"]) == (seen[6:8], seen[14:])
    assert sum(map(sum, four["expert_tokens"])) == 2 * 2 * T  # layers, experts of a token, tokens of a row
    checkpoint = model.load_checkpoint(tmp_path / "out/ckpt.pt")
    assert launch("--resume", shape=[]).code == 0 and read_log(tmp_path / "out")[-1]["expert_tokens"] == seen[14:16]
    assert checkpoint["progress"]["expert_tokens"] == seen[14:16] and len(seen) == 16  # nothing was trained again


def test_heads_further_ahead(double):
    """What each of them loses on the token after the next, by hand; in evaluation they are silent."""
    run = shaken(make(n_layer=1, ahead=2, ahead_loss=0.25))
    gpt, x, targets = run.gpt, torch.randint(V, (3, T)), torch.randint(-1, V, (3, T))
    objective = train.Objective(gpt)
    x_last, expected = gpt.hidden(x).detach(), objective.eval()(x, targets)[0].item()
    assert expected == pytest.approx(brute_loss(gpt(x).detach(), targets)[0], rel=1e-9)
    for further in (1, 2):
        logits = gpt.head(x_last + gpt.ahead[further - 1](x_last)).detach()
        shifted = torch.full_like(targets, -1)
        shifted[:, :-further] = targets[:, further:]
        expected += 0.25 * brute_loss(logits, shifted)[0]
    loss, count = objective.train()(x, targets)
    assert loss.item() == pytest.approx(expected, rel=1e-9) and count == (targets >= 0).sum()
    loss.backward()
    assert all(layer.weight.grad.abs().max() > 1e-3 for layer in gpt.ahead)


# ------------------------------------------------------------------------------------------------------------ schedules

def test_wsd():
    o = filled(schedule="wsd", max_iters=100, decay_share=0.4, learning_rate=2.0, warmup_iters=9)
    assert [train.wsd(step, o) for step in (0, 30, 60, 80, 99, 100)] == pytest.approx([1, 1, 1, 0.5, 1 / 40, 0])
    assert [train.rate(step, o) for step in (0, 4, 9, 60, 80, 100)] == pytest.approx([0.2, 1, 2, 2, 1, 0])
    o.decay_share = 0.0
    assert {train.wsd(step, o) for step in range(100)} == {1.0}


def test_cosine():
    o = filled(schedule="cosine", max_iters=110, warmup_iters=10, learning_rate=3.0)
    quarter = (1 + math.sqrt(0.5)) / 2
    steps = (10, 35, 60, 85, 110)
    assert [train.SCHEDULES["cosine"](step, o) for step in steps] == pytest.approx([1, quarter, 0.5, 1 - quarter, 0])
    assert [train.rate(step, o) for step in (0, 5, *steps)] == pytest.approx(
        [3 / 11, 18 / 11, 3, 3 * quarter, 1.5, 3 - 3 * quarter, 0])


@pytest.mark.parametrize("schedule", [name for name in train.SCHEDULES if name != "constant"])
def test_schedules_are_pure_rise_then_fall(schedule):
    o = filled(schedule=schedule, max_iters=57, warmup_iters=7)
    frozen = dataclasses.asdict(o)
    rates = [train.rate(step, o) for step in range(57)]
    order = list(range(57))
    random.Random(0).shuffle(order)
    assert all(train.rate(step, o) == rates[step] for step in order) and dataclasses.asdict(o) == frozen
    assert max(rates) == o.learning_rate and all(0 < rate <= o.learning_rate for rate in rates)
    assert rates[:8] == sorted(rates[:8]) and rates[7:] == sorted(rates[7:], reverse=True) and rates[56] < 0.1 * max(rates)


def test_linear_and_constant():
    o = filled(schedule="linear", max_iters=110, warmup_iters=10, learning_rate=3.0)
    assert [train.rate(step, o) for step in (0, 10, 35, 60, 110)] == pytest.approx([3 / 11, 3, 2.25, 1.5, 0])
    o.schedule = "constant"
    assert [train.rate(step, o) for step in (0, 10, 35, 109)] == pytest.approx([3 / 11, 3, 3, 3])


def test_wsd_falls_from_a_step():
    o = filled(max_iters=100, decay_from=80, learning_rate=2.0)
    assert [train.rate(step, o) for step in (0, 79, 80, 90, 99)] == pytest.approx([2, 2, 2, 1, 0.1])


# ----------------------------------------------------------------------------------------------------------------- data

@pytest.mark.parametrize("n, t, batch", [(1000, 16, 7), (33, 16, 3), (17, 16, 2), (40, 1, 5), (31, 16, 8)])
def test_windows_lie_inside_the_tokens_and_reach_all(n, t, batch):
    starts = np.concatenate([train.batch_starts(3, step, batch, [n], t)[1] for step in range(20 * n // batch)])
    assert len(starts) == 20 * n // batch * batch
    assert set(starts) == set(range(n - t)) or n == 1000 and set(starts) > set(range(0, n - t, 983)) and len(set(starts)) > 970
    assert starts.min() == 0 and starts.max() + t + 1 == n


def test_data_order_is_pure():
    """A step's windows follow from seed and step; no other step, seed, process or generator has a say."""
    steps = {step: list(train.batch_starts(5, step, 6, [700], 16)[1]) for step in range(40)}
    np.random.seed(1)
    torch.manual_seed(1)
    for step in (39, 0, 20, 3, 39):
        assert list(train.batch_starts(5, step, 6, [700], 16)[1]) == steps[step]
    assert len({tuple(starts) for starts in steps.values()}) == 40
    assert not {tuple(train.batch_starts(6, step, 6, [700], 16)[1]) for step in range(40)} & {tuple(starts) for starts in steps.values()}


def test_read_windows():
    tokens = np.arange(20, dtype=np.uint16)
    inputs, targets = train.read_windows([source(tokens)], [0, 0, 0], [0, 5, 16], 6, 20)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.tolist() == [[*range(6)], [*range(5, 11)], [16, 17, 18, 19, 0, 0]]
    assert targets.tolist() == [[*range(1, 7)], [*range(6, 12)], [17, 18, 19, -1, -1, -1]]
    with pytest.raises(ValueError, match="id 19, the vocabulary has 19"):
        train.read_windows([source(tokens)], [0, 0], [0, 13], 6, 19)
    big = source(np.array([0, 70_000, 1], dtype=np.uint32))
    assert train.read_windows([big], [0], [0], 2, 70_001)[1].tolist() == [[70_000, 1]]
    masked = source(tokens, np.arange(20) % 3)  # a target is hidden, the input stays
    inputs, targets = train.read_windows([big, masked], [1], [2], 5, 70_001)
    assert inputs.tolist() == [[2, 3, 4, 5, 6]] and targets.tolist() == [[-1, 4, 5, -1, 7]]


def test_sources_are_mixed_by_their_shares():
    """Each source is drawn as often as --mix says, by its size without it; places inside it are all alike."""
    sizes, T = [100, 1000, 40], 20
    for mix, expected in (([0.5, 0.2, 0.3], [0.5, 0.2, 0.3]), ([2, 0, 2], [0.5, 0, 0.5]), ([], np.array(sizes) / 1140)):
        which, starts = np.concatenate([train.batch_starts(1, step, 50, sizes, T, mix) for step in range(200)], axis=1)
        counts = np.bincount(which, minlength=3) / 10_000
        assert np.abs(counts - expected).max() < 0.02  # four standard deviations
        for i, size in enumerate(sizes):
            places = starts[which == i]
            assert not len(places) or 0 <= places.min() and places.max() < size - T
            assert i != 2 or set(places) == set(range(20))
    again = train.batch_starts(1, 7, 50, sizes, T, [0.5, 0.2, 0.3])
    assert np.array_equal(again, train.batch_starts(1, 7, 50, sizes, T, [0.5, 0.2, 0.3]))


# --------------------------------------------------------------------------------------------- micro-batches, evaluation

def gradients(run, tokens, monkeypatch):
    """(mean loss, {name: the gradient that update sees, over the count}) of a step."""
    seen = {}

    def update(count):
        seen.update({name: weight.grad / count for name, weight in run.weights.items()})
    monkeypatch.setattr(run, "update", update)
    loss, _ = run.train_step([source(tokens)], False)
    return loss, seen


@pytest.mark.parametrize("micro", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_micro_batches_give_the_gradient_of_one_large_batch(micro, dropout, monkeypatch, double):
    tokens, found = random_ids(3000), []
    for size in (8, micro):
        run = shaken(make(batch_size=8, micro_batch=size, dropout=dropout, n_layer=2))
        assert run.o.micro_batch == size
        run.progress.step = 5
        found.append(gradients(run, tokens, monkeypatch))
    (loss, whole), (cut_loss, cut) = found
    assert cut_loss == pytest.approx(loss, rel=1e-12)
    for name, gradient in whole.items():
        assert gradient.abs().max() > 1e-6
        assert (gradient - cut[name]).abs().max() < 1e-12, name


def test_the_gradient_is_that_of_the_mean_over_the_batch(monkeypatch, double):
    tokens = random_ids(3000)
    run = shaken(make(batch_size=6, micro_batch=4))
    gpt = copy.deepcopy(run.gpt)
    loss, found = gradients(run, tokens, monkeypatch)
    x = torch.from_numpy(np.stack([tokens[s:s + T + 1] for s in train.batch_starts(0, 0, 6, [3000], T)[1]]).astype(np.int64))
    expected = F.cross_entropy(gpt(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert all((weight.grad - found[name]).abs().max() < 1e-12 for name, weight in gpt.named_parameters())


def test_dropout_changes_with_step_and_seed_and_with_nothing_else(monkeypatch, double):
    """The same window, taken at another step or with another seed, has other masks."""
    tokens = np.tile(random_ids(T), 100)  # every start gives the same loss but for dropout and a turn
    monkeypatch.setattr(train, "batch_starts", lambda seed, step, batch, *_: np.zeros((2, batch), int))

    def loss(step, **changes):
        run = shaken(make(dropout=0.3, **changes))
        torch.manual_seed(random.randrange(1000))  # the generator's state does not matter
        run.progress.step = step
        return gradients(run, tokens, monkeypatch)[0]
    assert loss(0) == loss(0)
    assert len({loss(0), loss(1), loss(2), loss(0, seed=1), loss(1, seed=1)}) == 5
    rows = [loss(step, batch_size=1) for step in range(4)]
    assert len(set(rows)) == 4 and loss(0) == pytest.approx(sum(rows) / 4, rel=1e-12)  # a row's key: seed, and its place in the run


def brute_evaluation(gpt, val):
    """Nats over all of val but its first token, one window at a time."""
    total = 0.0
    for start in range(0, len(val) - 1, T):
        window = torch.from_numpy(val[start:start + T + 1].astype(np.int64))
        log_p = torch.log_softmax(gpt(window[None, :-1])[0], -1)
        total -= log_p[torch.arange(len(window) - 1), window[1:]].sum().item()
    return total


@pytest.mark.parametrize("length", [2, 16, 17, 18, 256, 257, 258, 333, 600])
def test_evaluation_is_exact(length, double):
    run, val = shaken(make(dropout=0.5, schedule="cosine", z_loss=0.1, ahead=1)), random_ids(length, seed=1)
    vars(run.progress).update(step=3, tokens=3 * 4 * T, seconds=2.0, loss=12.0, count=8)
    record = run.evaluate([source(val)])
    assert run.gpt.training and run.objective.training
    expected = brute_evaluation(run.gpt.eval(), val)
    assert record["val_loss"] == pytest.approx(expected / (length - 1), rel=1e-12)
    assert list(record) == KEYS and record["bpb"] is None
    assert (record["step"], record["tokens"], record["tokens_per_s"], record["train_loss"]) == (3, 3 * 4 * T, 96, 1.5)
    assert record["flops"] == 3 * 4 * 3 * model.account(run.gpt.config, 1)["forward_flops"]
    assert record["lr"] == train.rate(2, run.o) != train.rate(3, run.o)
    assert all(weight.grad is None for weight in run.gpt.parameters())


def test_bits_per_byte_counts_raw_bytes(double):
    """Tokens that are no UTF-8 on their own count their bytes, special tokens none, the first token of all is not predicted."""
    tokenizer = bpe.train("bpe", ["naïve café 東京 😀 naïve café"] * 3, 264)
    texts = ["東京 naïve", "😀 café, élan ☃", "ß"]
    end = tokenizer.special_tokens["<|endoftext|>"]
    val = np.array(sum((tokenizer.encode(text) + [end] for text in texts), []), dtype=np.uint16)
    broken = [token for token in map(tokenizer.vocab.__getitem__, val) if "\ufffd" in token.decode("utf-8", "replace")]
    assert len(broken) > 10
    run = shaken(make(tokenizer=tokenizer, vocab_size=264))
    vars(run.progress).update(step=1, seconds=1.0)
    n_bytes = sum(len(text.encode()) for text in texts) - len(tokenizer.vocab[val[0]])
    expected = brute_evaluation(run.gpt.eval(), val) / math.log(2) / n_bytes
    assert run.evaluate([source(val)])["bpb"] == pytest.approx(expected, rel=1e-12)


def test_eval_tokens_limits_the_evaluation(launch, tmp_path, folder):
    assert launch("--max_iters=1", "--eval_tokens=50", "--dtype=float64").code == 0
    gpt = model.from_checkpoint(model.load_checkpoint(tmp_path / "out/ckpt.pt")).eval()
    expected = brute_evaluation(gpt, np.load(folder / "val.npy")[:50]) / 49
    assert read_log(tmp_path / "out")[-1]["val_loss"] == pytest.approx(expected, rel=1e-12)


# ----------------------------------------------------------------------------------------------------------------- resume

RESUME = ["--max_iters=12", "--eval_interval=5", "--dropout=0.1", "--warmup_iters=3"]


def at_step(monkeypatch, step, action):
    """Call action() in the middle of the training step that begins at `step`, once."""
    usual, left = train.Run.train_step, [True]

    def train_step(run, *rest):
        if run.progress.step == step and left:
            left.clear()
            action()
        return usual(run, *rest)
    monkeypatch.setattr(train.Run, "train_step", train_step)


@pytest.mark.parametrize("step", [0, 3, 4, 8, 10])
def test_stopped_by_ctrl_c_and_resumed_is_bit_identical(step, launch, tmp_path, monkeypatch):
    assert launch(*RESUME, output=tmp_path / "whole").code == 0
    at_step(monkeypatch, step, lambda: signal.raise_signal(signal.SIGINT))
    stopped = launch(*RESUME)
    checkpoint = model.load_checkpoint(tmp_path / "out/ckpt.pt")
    assert stopped.code == 130 and stopped.message == ""
    assert checkpoint["step"] == step + 2  # the step in which it was pressed, and one that was told
    assert stopped.out.splitlines()[-1] == f"stopped after step {step + 2}; {tmp_path / 'out'}/ckpt.pt is saved, --resume goes on from it"
    resumed = launch("--resume", shape=[])  # the checkpoint knows the options
    assert resumed.code == 0, resumed.message
    assert_same_run(tmp_path / "whole", tmp_path / "out")
    assert [record["step"] for record in read_log(tmp_path / "out")[1:]] == [5, 10, 12]
    twin = model.load_checkpoint(tmp_path / "out/ckpt.pt")["weights"]
    assert step == 10 or any(not torch.equal(twin[name], weight) for name, weight in checkpoint["weights"].items())


@pytest.mark.parametrize("step", [2, 5, 7, 11])
@pytest.mark.parametrize("words", [[], ["--optimizer=adamw", "--schedule=cosine", "--seed=3", "--batch_size=6", "--micro_batch=4"], ["--counts=3"]])
def test_killed_and_resumed_is_bit_identical(step, words, launch, tmp_path, monkeypatch):
    """What dies without a farewell goes on from its last checkpoint, or from nothing; the log has each record once."""
    class Killed(BaseException):
        """Nothing catches it."""

    def die():
        raise Killed
    assert launch(*RESUME, *words, output=tmp_path / "whole").code == 0
    at_step(monkeypatch, step, die)
    with pytest.raises(Killed):
        launch(*RESUME, *words)
    resumed = launch(*RESUME, *words, "--resume")
    assert resumed.code == 0, resumed.message
    assert (f"nothing to resume in {tmp_path / 'out'}" in resumed.out) == (step < 5)
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_another_seed_is_another_run(launch, tmp_path):
    """The twin of the tests above: what differs is seen."""
    assert launch(*RESUME, output=tmp_path / "a").code == launch(*RESUME, "--seed=1", output=tmp_path / "b").code == 0
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_branch_decays_from_a_stable_checkpoint(launch, tmp_path):
    """--resume --ckpt=A/ckpt.pt --output=B is, step by step, the run that had the branch's schedule from the start."""
    stable = [*RESUME, "--schedule=constant", "--max_iters=10"]
    assert launch(*stable, output=tmp_path / "a").code == 0
    kept = (tmp_path / "a/ckpt.pt").read_bytes()
    branch = ["--schedule=wsd", "--decay_from=10", "--max_iters=16"]
    done = launch("--resume", f"--ckpt={tmp_path / 'a/ckpt.pt'}", *branch, output=tmp_path / "b", shape=[])
    assert done.code == 0, done.message
    assert launch(*RESUME, *branch, output=tmp_path / "whole").code == 0
    a, b = (model.load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "b"))
    assert all(torch.equal(weight, b["weights"][name]) for name, weight in a["weights"].items())
    logs = [list(map(timeless, read_log(tmp_path / name)[1:])) for name in ("whole", "b")]
    assert logs[0] == logs[1] and [record["step"] for record in logs[1]] == [5, 10, 15, 16]
    best = min(record["val_loss"] for record in logs[1][1:])  # of the branch's own
    assert model.load_checkpoint(tmp_path / "b/best.pt")["progress"]["best"] == best
    assert [record["lr"] for record in read_log(tmp_path / "b")[2:]] == pytest.approx([0.01, 0.01 * 2 / 6, 0.01 / 6])
    assert (tmp_path / "a/ckpt.pt").read_bytes() == kept and not (tmp_path / "b/previous").exists()
    refused(launch("--resume", f"--ckpt={tmp_path / 'none.pt'}", output=tmp_path / "c"), "none.pt")
    refused(launch("--decay_from=12", "--max_iters=12", output=tmp_path / "c"), "--decay_from=12", "--max_iters=12")
    refused(launch("--resume", f"--ckpt={tmp_path / 'a/best.pt'}", output=tmp_path / "a"), "an --output of its own")
    assert (tmp_path / "a/ckpt.pt").read_bytes() == kept


def test_a_branch_from_the_run_before(launch, tmp_path):
    """Its log begins with the records of the run that was set aside, not with those of the one that it sets aside now."""
    assert launch("--max_iters=4", "--eval_interval=2").code == launch("--max_iters=3", "--eval_interval=1").code == 0
    records = read_log(tmp_path / "out/previous")
    done = launch("--resume", f"--ckpt={tmp_path / 'out/previous/ckpt.pt'}", "--max_iters=5", shape=[])
    assert done.code == 0, done.message
    assert read_log(tmp_path / "out")[:2] == records[:2] and [record["step"] for record in read_log(tmp_path / "out")[1:]] == [2, 4, 5]


def test_a_branch_of_tokens_beside_those_of_an_earlier_text(launch, corpus, folder, tmp_path):
    """OUTPUT/train.npy of a run on text stays when another trains there on a folder: it is not what a branch of this one reads."""
    assert launch("--max_iters=2", "--tokenizer=byte", data=corpus).code == launch("--max_iters=2").code == 0
    assert (tmp_path / "out/train.npy").exists()
    words = ["--resume", f"--ckpt={tmp_path / 'out/ckpt.pt'}", f"--output={tmp_path / 'b'}", "--max_iters=3"]
    own, _ = train.take_up(train.options(train.Options, words), words)
    assert own.data == str(folder)


def test_a_stage_with_a_longer_context_and_another_mixture(launch, folder, tmp_path):
    """Mid-training: a branch on other sources, whose positions reach further."""
    other = tmp_path / "other"
    other.mkdir()
    np.save(other / "train.npy", (np.arange(2000) % 3).astype(np.uint16))
    np.save(other / "val.npy", (np.arange(200) % 3).astype(np.uint16))
    assert launch(*RESUME).code == 0
    stage = [f"--data={folder},{other}", "--mix=0.1,0.9", "--block_size=32", "--rope_base=3e4", "--max_iters=40"]
    done = launch("--resume", f"--ckpt={tmp_path / 'out/ckpt.pt'}", *stage, data="", output=tmp_path / "b", shape=[])
    assert done.code == 0, done.message
    last = read_log(tmp_path / "b")[-1]
    config = model.load_checkpoint(tmp_path / "b/ckpt.pt")["config"]
    assert last["tokens"] == 12 * 4 * 16 + 28 * 4 * 32 and (config["block_size"], config["rope_base"]) == (32, 3e4)
    assert last["train_loss"] < 2.0  # nine tenths of it count to three


@pytest.mark.parametrize("words, parts", [
    (["--mix=0.5"], ["--mix=0.5", "2 numbers"]), (["--mix=1,2,3"], ["2 numbers"]), (["--mix=a,b"], ["--mix=a,b"]),
    (["--mix=none.json"], ["none.json"]), (["--mix=0,0"], ["--mix=0,0"]), (["--mix=1,-1"], ["--mix=1,-1"]), (["--mix=nan,1"], ["--mix=nan,1"])])
def test_mixtures_that_do_not_fit(words, parts, launch, folder, tmp_path):
    refused(launch(*words, data=f"{folder},{folder}"), *parts)
    assert not (tmp_path / "out/log.jsonl").exists()


@pytest.mark.parametrize("text", ["[1, 2]", "{}", "{", '{"shares": [0.5, 0.5]}', '{"shares": {"elsewhere": 1}}'])
def test_a_file_of_shares_that_does_not_fit(text, launch, folder, tmp_path):
    (tmp_path / "mix.json").write_text(text)
    refused(launch(f"--mix={tmp_path / 'mix.json'}", data=f"{folder},{folder}"), "mix.json: it takes 2 numbers", "for the folders")


def test_shares_from_a_file_go_by_the_names_of_folders(tmp_path):
    (tmp_path / "mix.json").write_text(json.dumps({"shares": {"b": 0.2, "a/c": 0.8, "unused": 1}}))
    for names, expected in ((["a/c", "b"], [0.8, 0.2]), (["b", "a/c"], [0.2, 0.8])):
        assert train.shares(str(tmp_path / "mix.json"), list(map(Path, names))) == expected
    with pytest.raises(ValueError, match="mix.json of many, for the folders b"):  # of one there is nothing to mix
        train.shares(str(tmp_path / "mix.json"), [Path("b")])


def test_counts_beside_the_network(launch, folder, tmp_path, monkeypatch):
    """Training is as without them, validation is of the mean with data.py's counts of the training tokens, of any number of folders."""
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    np.save(other / "train.npy", random_ids(500, seed=2) // 9)
    words = ["--max_iters=3", "--ngram=0", f"--data={folder},{other}"]
    assert launch(*words, output=tmp_path / "plain").code == 0
    done = launch(*words, "--counts=3", "--counts_weight=0.4")
    assert done.code == 0 and re.search(r"^[\d,]+ n-grams counted in \d+ s$", done.out, re.M), done.message
    (plain, both), last = (model.load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("plain", "out")), read_log(tmp_path / "out")[-1]
    assert all(torch.equal(weight, both["weights"][name]) for name, weight in plain["weights"].items())
    assert last["train_loss"] == read_log(tmp_path / "plain")[-1]["train_loss"] and last["val_loss"] != read_log(tmp_path / "plain")[-1]["val_loss"]
    counts = data.train_ngrams(np.concatenate([np.load(folder / "train.npy"), np.load(other / "train.npy")]), V, 3)
    network, val, nats = model.from_checkpoint(plain).eval(), np.load(folder / "val.npy"), []
    for start in range(0, len(val) - 1, T):
        window = val[start:start + T + 1]
        with torch.no_grad():
            chances = network(torch.from_numpy(window[None, :-1].astype(np.int64)))[0].softmax(1)
        mean = 0.6 * chances[range(len(window) - 1), window[1:].astype(int)].double().numpy() + 0.4 * 2 ** -counts.bits(window)[1:]
        nats += [-np.log(mean)] * 2  # both folders have the same val.npy
    assert last["val_loss"] == pytest.approx(np.concatenate(nats).mean(), rel=1e-5)
    # a new run from these weights counts its own text, or does not; a plain model can have counts, too
    for name, words, size in (("out", [], 3), ("out", ["--counts=0"], None), ("plain", ["--counts=2"], 2)):
        assert launch("--max_iters=2", f"--init_from={tmp_path / name / 'ckpt.pt'}", *words, f"--data={other}", output=tmp_path / "on").code == 0
        weights = model.load_checkpoint(tmp_path / "on" / "ckpt.pt")["weights"]
        assert ("counts.pairs" in weights) == (size is not None)
        if size:
            own = data.train_ngrams(np.load(other / "train.npy"), V, size)
            assert np.array_equal(weights["counts.pairs"].numpy(), own.pairs) and len(own.sizes) == size
    refused(launch("--resume", "--counts=2"), "another shape")
    # the counts know the training text by heart: they are no part of a teacher
    for name in ("plain", "out"):
        assert launch("--max_iters=2", "--ngram=0", f"--teacher={tmp_path / name / 'ckpt.pt'}", output=tmp_path / f"of {name}").code == 0
    assert read_log(tmp_path / "of plain")[-1]["train_loss"] == read_log(tmp_path / "of out")[-1]["train_loss"]
    refused(launch("--counts=3", "--compile", output=tmp_path / "c"), "--counts does not go with --compile")
    refused(launch("--counts=-1", output=tmp_path / "c"), "--counts=-1 is too small")
    refused(launch("--counts=3", "--counts_weight=1.5", output=tmp_path / "c"), "--counts_weight=1.5 must be at most 1")
    refused(launch("--counts=5000", "--max_iters=3", output=tmp_path / "c"), "too few for 5000-grams")
    monkeypatch.setattr(train, "free_memory", lambda device: 2**20 if device.type == "cpu" else 0)
    refused(launch("--counts=300", "--micro_batch=1", output=tmp_path / "c"), "GiB, 0.0 are free")


def test_validation_on_another_folder(launch, folder, tmp_path):
    """--eval_data: its val.npy alone counts; other tokenizers and missing files are refused."""
    other = tmp_path / "other"
    other.mkdir()
    assert launch("--max_iters=3").code == 0
    before = read_log(tmp_path / "out")[-1]
    np.save(other / "val.npy", np.load(folder / "val.npy")[:50])
    assert launch("--max_iters=3", f"--eval_data={other}", output=tmp_path / "b").code == 0
    after = read_log(tmp_path / "b")[-1]
    assert after["train_loss"] == before["train_loss"] and after["val_loss"] != before["val_loss"]
    np.save(other / "val.npy", np.load(folder / "val.npy"))
    assert launch("--max_iters=3", f"--eval_data={other}", output=tmp_path / "c").code == 0
    assert read_log(tmp_path / "c")[-1]["val_loss"] == before["val_loss"]
    assert launch(f"--eval_data={other},{folder},{other}", "--max_iters=3", "--eval_tokens=2", output=tmp_path / "d").code == 0
    assert read_log(tmp_path / "d")[-1]["val_loss"] > 1  # something of each, be it ever so little
    checkpoint = model.load_checkpoint(tmp_path / "out/ckpt.pt")
    checkpoint["progress"]["best"] = 0.0  # on easier tokens, which says nothing of these
    torch.save(checkpoint, tmp_path / "out/ckpt.pt")
    assert launch("--resume", "--max_iters=4", f"--eval_data={other}").code == 0
    assert model.load_checkpoint(tmp_path / "out/best.pt")["train"]["eval_data"] == str(other)
    refused(launch(f"--eval_data={tmp_path / 'none'}"), "none")
    for path, text in ((folder, "abc"), (other, "abd")):
        bpe.train("char", [text * 9], 50).save(path / "tokenizer.json")
    refused(launch(f"--eval_data={other}"), "different tokenizers", str(other))


def test_sources_of_different_tokenizers(launch, folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for side in ("train", "val"):
        np.save(other / f"{side}.npy", np.load(folder / f"{side}.npy"))
    for path, text in ((folder, "abc"), (other, "abd")):
        bpe.train("char", [text * 9], 50).save(path / "tokenizer.json")
    refused(launch(data=f"{folder},{other}"), "different tokenizers", str(other))
    refused(launch("--mix=1,1", data=f"{folder},{tmp_path / 'nowhere'}"), "--mix", "token files")


def test_masked_targets_are_not_learned(launch, folder, tmp_path):
    """train_mask.npy leaves targets out: a model that may learn only even ids keeps guessing at the odd ones."""
    tokens = (np.arange(3000) % 10).astype(np.uint16)
    for side in ("train", "val"):
        np.save(folder / f"{side}.npy", tokens)
    np.save(folder / "train_mask.npy", tokens % 2 == 0)
    losses = {}
    for name, mask in (("even", tokens % 2 == 0), ("odd", tokens % 2 == 1)):
        np.save(folder / "val_mask.npy", mask)
        assert launch("--max_iters=80", output=tmp_path / name).code == 0
        losses[name] = read_log(tmp_path / name)[-1]["val_loss"]
    assert losses["even"] < 0.1 and losses["odd"] > 2
    np.save(folder / "val_mask.npy", mask[1:])
    refused(launch(output=tmp_path / "c"), "val_mask.npy", "one length")


def test_init_from_begins_a_new_run_with_old_weights(launch, folder, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train.subprocess, "run", lambda *_, **__: None)
    text = ["--separator=<|endoftext|>", "--max_iters=3", "--n_layer=1", "--n_embd=16", "--block_size=16", "--position=none",
            "--ngram_rows=99"]
    assert launch("--vocab_size=300", *text, data=corpus, output=tmp_path / "a", shape=[]).code == 0
    base = model.load_checkpoint(tmp_path / "a/ckpt.pt")
    init = f"--init_from={tmp_path / 'a/ckpt.pt'}"
    done = launch(init, "--max_iters=2", "--learning_rate=1e-30", "--optimizer=adamw", data=corpus, output=tmp_path / "b", shape=[])
    assert done.code == 0, done.message
    new = model.load_checkpoint(tmp_path / "b/ckpt.pt")
    assert new["config"] == base["config"] and new["tokenizer"] == base["tokenizer"] and new["step"] == 2
    assert all((weight - new["weights"][name]).abs().max() < 1e-20 for name, weight in base["weights"].items())
    os.rename(tmp_path / "b", tmp_path / "moved")
    assert launch("--resume", "--max_iters=3", data=corpus, output=tmp_path / "moved", shape=[]).code == 0
    os.rename(tmp_path / "moved", tmp_path / "b")
    np.save(tmp_path / "b/train.npy", np.load(tmp_path / "b/train.npy"))  # ready tokens do as well
    assert launch(init, "--max_iters=1", data=tmp_path / "b", output=tmp_path / "c", shape=[]).code == 0
    bpe.train("char", ["abc"], 50).save(folder / "tokenizer.json")
    refused(launch(init, output=tmp_path / "d", shape=[]), "another tokenizer")
    refused(launch(init, "--resume", output=tmp_path / "d"), "--init_from", "--resume")
    torch.save(base | dict(tokenizer=None), tmp_path / "mute.pt")  # as model.py --import_hf writes
    init = f"--init_from={tmp_path / 'mute.pt'}"
    refused(launch(init, *text, data=corpus, output=tmp_path / "e", shape=[]), "--tokenizer=FILE")
    words = [init, f"--tokenizer={tmp_path / 'a/tokenizer.json'}", "--max_iters=1"]
    assert launch(*words, data=corpus, output=tmp_path / "e", shape=[]).code == 0
    assert model.load_checkpoint(tmp_path / "e/ckpt.pt")["tokenizer"] == base["tokenizer"]


def test_tokens_that_were_replaced(launch, folder, tmp_path):
    """A resumed run wants the tokens that it began with; a branch may have others."""
    assert launch(*RESUME).code == 0
    np.save(folder / "train.npy", random_ids(3000, seed=9))
    refused(launch("--resume", "--max_iters=14", shape=[]), "not those that the run began with")
    assert launch("--resume", f"--ckpt={tmp_path / 'out/ckpt.pt'}", "--max_iters=14", output=tmp_path / "b", shape=[]).code == 0


@pytest.mark.slow
def test_two_runs_in_one_folder(folder, tmp_path, run_script):
    """The second is refused while the first lives, and leaves it alone."""
    process = start(folder, tmp_path / "out", *WORDS, *LONG, "--max_iters=3000")
    try:
        second = run_script("train.py", f"--data={folder}", "--output=out", cwd=tmp_path)
        assert (second.returncode, second.stdout) == (1, "") and "another run is training in out" in second.stderr
        assert second.stderr.count("\n") == 1 and process.poll() is None
    finally:
        process.terminate()  # SIGTERM saves, as Ctrl-C does
        text, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "") and "stopped after step" in text
    assert not (tmp_path / "out/previous").exists()


def test_the_clock_ends_a_run(launch, tmp_path, monkeypatch):
    """--minutes=1 with steps of 2, then 4 seconds: it ends within a step of 60, at the end of its schedule."""
    now = [0.0]
    usual = train.Run.update

    def update(run, count):
        now[0] += 2 if run.progress.step < 10 else 4
        usual(run, count)
    monkeypatch.setattr(train.Run, "update", update)
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    assert launch("--minutes=1", "--eval_interval=7").code == 0
    records = read_log(tmp_path / "out")[1:]
    assert records[-1]["seconds"] == 60 and records[-1]["step"] == 20
    assert [record["step"] for record in records] == [7, 14, 20]
    assert records[-1]["lr"] < 0.2 * records[0]["lr"]


@pytest.mark.parametrize("budget", [dict(flops=1e11), dict(tokens=3_000_000), dict(minutes=5.0)])
def test_the_dial(budget):
    """A larger budget buys a larger model and more tokens; FLOPs and tokens are met to a step."""
    def plan(factor, **changes):
        o = train.Options(**{name: type(value)(factor * value) for name, value in budget.items()}, **changes)
        o = train.recipe(o, 10_000_000, V, 1e10)
        tokens = o.max_iters * o.batch_size * o.block_size
        return o, tokens, tokens / o.block_size * train.run_flops(o, V)
    plans = [plan(factor) for factor in (1, 3, 10, 30, 100)]
    for (o, tokens, flops), (larger, more, cost) in zip(plans, plans[1:]):
        assert larger.n_embd >= o.n_embd and larger.batch_size >= o.batch_size and more > tokens and cost > 2 * flops
        assert larger.learning_rate < o.learning_rate and larger.n_embd % larger.n_head == 0
    for factor, (o, tokens, flops) in zip((1, 3, 10, 30, 100), plans):
        wanted = factor * budget.get("flops", budget.get("tokens", 300 * train.USE * 1e10))
        assert (tokens if "tokens" in budget else flops) == pytest.approx(wanted, rel=0.02)
    assert plans[-1][0].n_layer >= plans[0][0].n_layer and plans[-1][0].n_embd > plans[0][0].n_embd
    o, _, flops = plan(10, n_embd=64, n_layer=1)  # what is given stays, the budget too
    assert (o.n_embd, o.n_layer) == (64, 1)
    assert "tokens" in budget or flops == pytest.approx(plans[2][2], rel=0.02)


def test_the_dial_reads_a_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scaling").mkdir()
    rows = [dict(C=C, options=dict(n_embd=width, n_layer=3, block_size=64)) for C, width in ((1e10, 32), (1e11, 48), (1e12, 80))]
    (tmp_path / "scaling/recipe.json").write_text(json.dumps(rows))
    shapes = [train.recipe(train.Options(flops=C), 10**7, V, 1e10) for C in (1.0, 4e10, 9e11, 1e15)]
    assert [(o.n_embd, o.n_layer, o.block_size) for o in shapes] == [(width, 3, 64) for width in (32, 48, 80, 80)]
    assert train.recipe(train.Options(), 10**7, V, 1e10).n_embd != 32  # without a budget it is not asked
    rows = [dict(C=1e12, options=dict(n_embd=256, n_layer=4, block_size=64, batch_size=5, learning_rate=0.003, ngram=3, max_iters=7))]
    (tmp_path / "scaling/recipe.json").write_text(json.dumps(rows))
    o = train.recipe(train.Options(flops=1e12), 10**7, V, 1e10)
    assert (o.batch_size, o.learning_rate, o.ngram, o.n_embd) == (5, 0.003, 3, 256) and o.max_iters != 7
    assert o.max_iters * o.batch_size * train.run_flops(o, V) == pytest.approx(1e12, rel=0.05)
    for damaged in ("", "[]", "{", '[{"C": 1e12}]', '[{"C": "x"}]', '[{"C": 1, "options": {"n_embd": "wide"}}]', "\udcff"):
        (tmp_path / "scaling/recipe.json").write_text(damaged, errors="surrogateescape")
        with pytest.raises(ValueError, match=r"scaling/recipe.json is damaged; remove it"):
            train.recipe(train.Options(flops=1e12), 10**7, V, 1e10)


def test_the_dial_goes_with_shared_heads():
    """The run whose FLOPs a budget is compared with has one head, whatever --n_kv_head says."""
    o = train.recipe(train.Options(flops=1e12, n_head=4, n_kv_head=2), 10**7, V, 1e10)
    assert (o.n_head, o.n_kv_head) == (4, 2) and o.n_embd % 4 == 0


def test_one_budget(launch):
    for words in (["--minutes=1", "--flops=1e9"], ["--minutes=-1"], ["--flops=-1e9"], ["--tokens=-5"]):
        refused(launch(*words), "--minutes, --flops, --tokens")


def test_the_noise_scale_of_known_noise(monkeypatch, double):
    """Gradients G + noise of known size, as parts and whole batches have them: S / |G|^2 is found."""
    run, rng = make(noise_scale=True, batch_size=8), np.random.default_rng(0)
    assert run.o.micro_batch == 4
    G, sigma, few, many = rng.normal(size=50), 3.0, 64, 128
    for _ in range(3000):
        parts = [G + sigma / few**0.5 * rng.normal(size=50) for _ in range(2)]
        run.progress.grad_norm = float(np.linalg.norm(sum(parts) / 2))
        run.compare(float(parts[0] @ parts[0]), few, many)
    assert run.progress.noise[0] / run.progress.noise[1] == pytest.approx(50 * sigma**2 / (G @ G), rel=0.2)
    # and what a step hands over is the squared norm of its first micro-batch's mean gradient
    seen = []
    monkeypatch.setattr(run, "compare", lambda *args: seen.append(args))
    run, tokens = shaken(run), random_ids(3000)
    gpt = copy.deepcopy(run.gpt)
    run.train_step([source(tokens)], False)
    _, starts = train.batch_starts(0, 0, 8, [3000], T)
    x = torch.from_numpy(np.stack([tokens[at:at + T + 1] for at in starts[:4]]).astype(np.int64))
    F.cross_entropy(gpt(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
    expected = sum(weight.grad.square().sum().item() for weight in gpt.parameters())
    assert seen == [(pytest.approx(expected, rel=1e-9), 4 * T, 8 * T)]


def test_the_noise_scale_without_targets(launch, folder, monkeypatch):
    """A part of a batch with no target says nothing about noise; where no step says anything, that is what is printed."""
    run, tokens = make(noise_scale=True), random_ids(3000)
    run.train_step([source(tokens, np.zeros(3000, bool))], False)
    assert run.progress.noise == [0, 0]
    run.train_step([source(tokens)], False)
    assert np.isfinite(run.progress.noise).all() and run.progress.noise[0]
    np.save(folder / "train_mask.npy", np.zeros(3000, bool))
    assert "not measurable yet" in launch("--noise_scale", "--max_iters=2").out


def test_float16_leaves_out_steps_that_overflow(launch, tmp_path):
    """The scale halves until gradients are finite, and the loss falls; without a scale to halve the run stops."""
    run = shaken(make(dtype="float16", noise_scale=True))
    before = {name: weight.detach().clone() for name, weight in run.weights.items()}
    run.progress.scale = 2.0**40
    run.train_step([source(random_ids(3000))], False)
    assert run.progress.scale == 2.0**39 and run.progress.step == 1 and run.progress.noise == [0, 0]
    assert all(torch.equal(weight, before[name]) for name, weight in run.weights.items())
    run.progress.scale = 1.0
    run.train_step([source(random_ids(3000))], False)
    assert run.progress.scale > 1 and not any(torch.equal(weight, before[name]) for name, weight in run.weights.items())
    for dtype in ("float16", "float32"):
        assert launch("--max_iters=30", f"--dtype={dtype}", output=tmp_path / dtype).code == 0
    half, full = (read_log(tmp_path / dtype)[-1]["val_loss"] for dtype in ("float16", "float32"))
    assert half == pytest.approx(full, abs=0.02)


def test_profile(launch, tmp_path):
    """Each layer kind once forward and once backward a layer; no part is longer than the whole; nothing is trained."""
    done = launch("--profile", "--n_layer=3", "--ngram=2")
    assert done.code == 0, done.message
    rows = {match[1]: (int(match[2]), float(match[3])) for match in
            (re.match(r"(\w+(?: \w+)?) +(\d+) times, CPU +([\d.]+) ms", line) for line in done.out.splitlines()) if match}
    counts = {"all": 1, "forward mixer": 3, "backward mixer": 3, "forward ffn": 3, "backward ffn": 3, "forward norm": 7,
              "backward norm": 7, "forward head": 1, "backward head": 1, "forward embedding": 1, "forward ngrams": 1, "update": 1}
    assert {name: count for name, (count, _) in rows.items()} == counts
    assert sum(ms for name, (_, ms) in rows.items() if name != "all") < rows["all"][1]
    assert len(json.loads((tmp_path / "out/trace.json").read_text())["traceEvents"]) > 100
    assert not (tmp_path / "out/log.jsonl").exists()


def test_bits_a_byte_are_unknown_where_unk_hides_text(launch, tmp_path):
    words, wanted = "the cat sat on a mat " * 300, "the cat sat on a rug " * 20
    for name, text in (("known", words), ("hidden", words + wanted)):
        (tmp_path / name).write_text(text)
        done = launch("--tokenizer=word", "--max_iters=1", data=tmp_path / name, output=tmp_path / f"{name}.out")
        bits, hidden = read_log(tmp_path / f"{name}.out")[-1]["bpb"], name == "hidden"
        assert (bits is None) == hidden == ("bits a byte unknown, as <|unk|> is" in done.out)
    row = launch("--leaderboard", "--minutes=1e-6", "--tokenizer=word", data=tmp_path / "hidden")
    assert row.code == 0 and "| nan |" in row.out


def test_leaderboard_row(launch, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train.subprocess, "run", lambda *_, **__: None)
    refused(launch("--leaderboard", "--minutes=0.01"), "--leaderboard", "tokenizer")
    done = launch("--leaderboard", "--minutes=0.01", "--tokenizer=byte", data=corpus)
    assert done.code == 0, done.message
    row, last = done.out.splitlines()[-2], read_log(tmp_path / "out")[-1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    code = hashlib.sha256("".join((ROOT / name).read_text() for name in ("train.py", "model.py")).encode()).hexdigest()[:12]
    assert cells[:4] == [f"{last['bpb']:.4f}", f"{last['seconds'] / 60:.1f}", f"{last['flops']:.3g}", code]
    assert cells[5].startswith("`") and "--minutes=0.01" in cells[5]


@pytest.mark.parametrize("end", ["--max_iters=40", "--tokens=2560"])
def test_leaderboard_goes_on_to_another_end(end, launch, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train.subprocess, "run", lambda *_, **__: None)
    assert launch("--leaderboard", "--minutes=1e-6", "--tokenizer=char", data=corpus).code == 0
    resumed = launch("--resume", end, shape=[], data=corpus)
    assert resumed.code == 0, resumed.message
    assert read_log(tmp_path / "out")[-1]["step"] == 40


def test_samples_at_each_evaluation(launch, corpus, tmp_path, monkeypatch):
    """They are asked of the checkpoint of that step."""
    calls = []
    monkeypatch.setattr(train.subprocess, "run", lambda words, **_: calls.append(
        (words[2:], model.load_checkpoint(tmp_path / "out/ckpt.pt")["step"])))
    assert launch("--max_iters=5", "--eval_interval=2", "--sample_tokens=9", "--tokenizer=char", data=corpus).code == 0
    words = [f"--ckpt={tmp_path}/out/ckpt.pt", "--max_new_tokens=9"]
    assert calls == [(words, 2), (words, 4), (words, 5)]
    assert launch("--max_iters=5", "--resume", "--sample_tokens=-1", data=corpus).code == 0
    assert calls[3:] == [([words[0], "--max_new_tokens=200"], 5)]  # what the default is: at the end alone
    assert launch("--max_iters=5", "--resume", "--sample_tokens=0", "--tokenizer=char", data=corpus).code == 0
    assert not calls[4:]


def test_samples_under_torchrun(world_of_one, launch, corpus, monkeypatch):
    """sample.py, which refuses to be one of torchrun's processes, is not taken for one."""
    world_of_one()
    ask, answers = train.subprocess.run, []
    monkeypatch.setattr(train.subprocess, "run", lambda *x, **more: answers.append(ask(*x, capture_output=True, text=True, **more)))
    assert launch("--max_iters=2", "--sample_tokens=5", "--tokenizer=char", data=corpus).code == 0
    assert [answer.returncode for answer in answers] == [0]


def test_resume_of_a_finished_run_and_longer(launch, tmp_path):
    assert launch(*RESUME).code == 0
    before = read_log(tmp_path / "out")
    assert launch("--resume", shape=[]).code == 0
    assert list(map(timeless, read_log(tmp_path / "out"))) == list(map(timeless, before))
    assert launch("--resume", "--max_iters=17", shape=[]).code == 0
    assert [record["step"] for record in read_log(tmp_path / "out")[1:]] == [5, 10, 15, 17]  # 12 was no multiple of 5
    assert not (tmp_path / "out/previous").exists()


@pytest.mark.parametrize("first, then, steps", [
    ("--tokens=640", "--tokens=1280", 20), ("--tokens=640", "--max_iters=15", 15), ("--max_iters=10", "--tokens=1280", 20),
    ("--minutes=0.25", "--minutes=0.5", 30), ("--minutes=0.25", "--max_iters=40", 40), ("--minutes=0.25", "--tokens=1280", 20)])
def test_resume_with_another_end(first, then, steps, launch, tmp_path, monkeypatch):
    """A finished run goes on to the budget or the step that is given now, of whatever kind the first was; a step takes 1 s."""
    now = [0.0]
    usual = train.Run.update

    def update(run, count):
        now[0] += 1
        usual(run, count)
    monkeypatch.setattr(train.Run, "update", update)
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    assert launch(first).code == 0
    early = model.load_checkpoint(tmp_path / "out/ckpt.pt")["step"]
    assert launch("--resume", shape=[]).code == 0
    assert model.load_checkpoint(tmp_path / "out/ckpt.pt")["step"] == early == 10 + 5 * ("minutes" in first)
    assert launch("--resume", then, shape=[]).code == 0
    assert model.load_checkpoint(tmp_path / "out/ckpt.pt")["step"] == steps == read_log(tmp_path / "out")[-1]["step"]


@pytest.mark.parametrize("optimizer", ["muon", "soap"])
def test_resume_in_another_precision(optimizer, launch, tmp_path):
    """What the optimizer keeps takes the type of the weights, up and down."""
    assert launch(f"--optimizer={optimizer}", "--max_iters=2").code == 0
    for step, dtype in ((4, "float64"), (6, "float32")):
        resumed = launch("--resume", f"--max_iters={step}", f"--dtype={dtype}", shape=[])
        assert resumed.code == 0, resumed.message
        states = model.load_checkpoint(tmp_path / "out/ckpt.pt")["optimizer"].values()
        assert {tensor.dtype for tensors in states for tensor in tensors} == {getattr(torch, dtype)}


def test_ckpt_without_resume(launch, tmp_path):
    """It would train another model from the start; the run that is there stays."""
    assert launch("--max_iters=2").code == 0
    refused(launch("--max_iters=4", f"--ckpt={tmp_path}/out/ckpt.pt"), "--ckpt", "--resume")
    assert not (tmp_path / "out/previous").exists()


def test_the_clock_and_a_step_are_two_ends(launch):
    for word in ("--minutes=1", "--leaderboard"):
        refused(launch(word, "--max_iters=3"), word[:9], "--max_iters")


def test_resume_to_an_earlier_end_stops(launch, tmp_path, monkeypatch):
    """A run that has passed max_iters ends, with one line or at once: it does not train on."""
    assert launch(*RESUME).code == 0

    def forbidden(*_):
        raise RuntimeError("it trains on")
    monkeypatch.setattr(train.Run, "train_step", forbidden)
    ended = launch("--resume", "--max_iters=6", shape=[])
    assert ended.code in (0, 1) and ended.message.count("\n") == 0


def test_resume_with_half_a_line_in_the_log(launch, tmp_path, monkeypatch):
    """A line that was being written when the machine stopped is dropped."""
    assert launch(*RESUME, output=tmp_path / "whole").code == 0
    at_step(monkeypatch, 7, lambda: signal.raise_signal(signal.SIGINT))
    assert launch(*RESUME).code == 130
    with open(tmp_path / "out/log.jsonl", "a") as file:
        file.write('{"step": 9, "tokens": 1')
    resumed = launch("--resume", shape=[])
    assert resumed.code == 0, resumed.message
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_resume_of_a_folder_that_was_moved(launch, tmp_path, monkeypatch):
    """The folder given now counts, not the one in the checkpoint; without --output that is `out`."""
    assert launch(*RESUME, output=tmp_path / "a").code == 0
    os.rename(tmp_path / "a", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--max_iters=14"])
    train.main()
    assert model.load_checkpoint(tmp_path / "out/ckpt.pt")["step"] == 14 and not (tmp_path / "a").exists()


def test_text_is_not_tokenised_again_on_resume(launch, corpus, monkeypatch, tmp_path):
    """Resume, and a second run, reuse the token files of the first; the sample is left out here."""
    monkeypatch.setattr(train.subprocess, "run", lambda *_, **__: None)
    words = ["--max_iters=2", "--tokenizer=char", "--separator=<|endoftext|>"]
    first = launch(*words, data=corpus)
    assert first.code == 0, first.message
    written = (tmp_path / "out/train.npy").stat().st_mtime_ns
    for others in (["--resume", "--max_iters=3"], words):
        again = launch(*others, data=corpus)
        assert again.code == 0, again.message
        assert (tmp_path / "out/train.npy").stat().st_mtime_ns == written and "reus" in again.out
    assert model.load_checkpoint(tmp_path / "out/ckpt.pt")["tokenizer"]["kind"] == "char"
    assert 0 < read_log(tmp_path / "out")[-1]["bpb"] < 10


@pytest.mark.parametrize("tokens", ["ready", "text"])
def test_resume_remembers_the_vocabulary(tokens, launch, corpus, folder, tmp_path, monkeypatch):
    """--vocab_size need not be given again: not for tokens without a tokenizer, nor for one that was trained here."""
    monkeypatch.setattr(train.subprocess, "run", lambda *_, **__: None)
    words = ["--vocab_size=300", "--separator=<|endoftext|>", "--max_iters=2"]
    data = dict(ready=folder, text=corpus)[tokens]
    first = launch(*words, data=data)
    assert first.code == 0, first.message
    made = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.npy")}
    again = launch("--resume", "--max_iters=3", shape=[], data=data)
    assert again.code == 0, again.message
    checkpoint = model.load_checkpoint(tmp_path / "out/ckpt.pt")
    assert checkpoint["step"] == 3 and checkpoint["config"]["vocab_size"] == 300
    assert {name: (tmp_path / "out" / name).read_bytes() for name in made} == made and len(made) == 2 * (tokens == "text")


LONG = ["--max_iters=300", "--eval_interval=40", "--dropout=0.1", "--eval_tokens=100"]


def start(folder, output, *words):
    """train.py in a process of its own, returned as soon as it has written a checkpoint of its own."""
    before = (output / "ckpt.pt").stat().st_mtime_ns if (output / "ckpt.pt").exists() else 0
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), f"--data={folder}", f"--output={output}", *words],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    limit = time.monotonic() + 60
    while time.monotonic() < limit and process.poll() is None:
        if (output / "ckpt.pt").exists() and (output / "ckpt.pt").stat().st_mtime_ns > before:
            return process
        time.sleep(0.002)
    process.kill()
    raise AssertionError(process.communicate())


@pytest.mark.skipif(sys.platform == "win32", reason="signals are of Unix")
def test_signals_from_outside(folder, tmp_path, launch):
    """Ctrl-C, then kill -9 at a random moment, then the rest: the run is that of one that nobody touched."""
    out = tmp_path / "out"
    process = start(folder, out, *WORDS, *LONG)
    process.send_signal(signal.SIGINT)
    text, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    step = model.load_checkpoint(out / "ckpt.pt")["step"]
    assert text.splitlines()[-1] == f"stopped after step {step}; {out}/ckpt.pt is saved, --resume goes on from it"
    process = start(folder, out, "--resume")
    wait = random.random() / 4
    time.sleep(wait)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL, "it was over before it was killed"
    assert 40 <= step < model.load_checkpoint(out / "ckpt.pt")["step"] < 300
    resumed = launch("--resume", shape=[])
    assert resumed.code == 0, resumed.message
    assert launch(*LONG, output=tmp_path / "whole").code == 0
    print("killed after", wait)
    assert_same_run(tmp_path / "whole", out)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are of Unix")
def test_twenty_kills(folder, tmp_path, launch):
    """kill -9 at 20 random moments, also while a checkpoint is written: the run is that of one that nobody touched."""
    out, steps = tmp_path / "out", []
    words = [f"--data={folder}", f"--output={out}", *WORDS, "--max_iters=100000", "--eval_interval=2",
             "--eval_tokens=100", "--dropout=0.1", "--schedule=constant"]
    while len(steps) < 20:
        process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words, "--resume"], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        before = (out / "ckpt.pt").stat().st_mtime_ns if (out / "ckpt.pt").exists() else 0
        while process.poll() is None and ((out / "ckpt.pt").stat().st_mtime_ns if (out / "ckpt.pt").exists() else 0) == before:
            time.sleep(0.002)
        time.sleep(random.random() / 2)
        process.kill()
        assert process.wait(60) == -signal.SIGKILL, process.stderr.read()
        steps.append(model.load_checkpoint(out / "ckpt.pt")["step"])
    assert steps == sorted(steps) and len(set(steps)) > 15
    end = f"--max_iters={steps[-1] + 5}"
    assert launch("--resume", end, shape=[]).code == 0
    assert launch(*words[2:], end, output=tmp_path / "whole", shape=[]).code == 0
    assert_same_run(tmp_path / "whole", out)


# ------------------------------------------------------------------------------------------------------------------ ranks

def test_ranks_share_the_bias_of_experts(monkeypatch, double):
    """Each moves it by the tokens that it saw; after a step all have the mean. The other rank, a pretended one, has 3 everywhere."""
    alone, run = (make(n_expert=3, balance_bias=0.5) for _ in range(2))
    alone.train_step([source(random_ids(3000))], False)
    own, bias = (one.gpt.blocks[0].ffn.bias for one in (alone, run))
    assert own.abs().max() == 0.5
    monkeypatch.setattr(train, "sum_over_ranks", lambda tensors: [x.add_(1.5) for x in tensors if x is bias])
    monkeypatch.setattr(train, "ranks", lambda: (0, 2))
    run.train_step([source(random_ids(3000))], False)
    assert torch.equal(bias, own / 2 + 1.5)


def torchrun(n, name, *words, cwd):
    """As run_ranks, by torch's launcher."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", str(ROOT / name), *words],
                          cwd=cwd, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("launcher, words, tolerance", [
    (torchrun, ["--optimizer=adamw", "--batch_size=5", "--micro_batch=2", "--ngram=3", "--ngram_rows=50"], 1e-9),
    (None, ["--optimizer=muon"], 1e-6)])
def test_two_ranks_are_one_process(launcher, words, tolerance, folder, tmp_path, launch, run_ranks):
    words = [*WORDS, "--dtype=float64", "--dropout=0.2", "--max_iters=6", "--eval_interval=2", *words]
    two = (launcher or run_ranks)(2, "train.py", f"--data={folder}", f"--output={tmp_path / 'two'}", *words, cwd=tmp_path)
    alone = launch(*words)
    assert two.returncode == alone.code == 0, two.stderr

    def shown(text):
        return [line.split(" nats")[0] for line in text.splitlines() if line.startswith("step")]
    assert shown(two.stdout) == shown(alone.out) and len(shown(two.stdout)) == 3  # printed once, by rank 0
    assert len(two.stdout.splitlines()) == len(alone.out.splitlines())
    logs = [[{**timeless(record), "bpb": 0} for record in read_log(tmp_path / name)[1:]] for name in ("out", "two")]
    assert len(logs[0]) == len(logs[1]) == 3
    for one, two in zip(*logs):
        assert two == pytest.approx(one, rel=tolerance)
    one, two = (model.load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("out", "two"))
    assert one["weights"].keys() == two["weights"].keys() and two["train"]["batch_size"] == one["train"]["batch_size"]
    assert max((weight - two["weights"][name]).abs().max() for name, weight in one["weights"].items()) < tolerance


# ------------------------------------------------------------------------------------------------------------ ten losses

LOSSES = [3.912022, 3.906165, 3.854870, 3.766227, 3.683857, 3.864734, 3.676775, 3.634444, 3.507766, 3.601591]


def test_ten_losses():
    """The default model and optimizer at a tiny size, in float32. Who changes the mathematics changes these numbers."""
    i = np.arange(4000)
    tokens = ((i * i // 7 + i // 3) % V).astype(np.uint16)
    run = train.Run(train.recipe(train.Options(vocab_size=V, n_layer=2, n_embd=32, block_size=32, batch_size=4, max_iters=10, ngram=0, device="cpu"),
                                 len(tokens), V, 1e10), V, NO_TOKENIZER, {})
    losses = [run.train_step([source(tokens)], False)[0] for _ in range(10)]
    renewed = f"LOSSES = [{', '.join(f'{loss:.6f}' for loss in losses)}]"
    assert losses == pytest.approx(LOSSES, rel=1e-4), f"to renew them, write into this file:\n{renewed}"


# ---------------------------------------------------------------------------------------------------- checkpoints, the log

def test_checkpoint(launch, tmp_path):
    assert launch("--max_iters=3").code == 0
    checkpoint = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    assert {"version", "config", "train", "weights", "optimizer", "step", "tokenizer", "source"} <= checkpoint.keys()
    gpt = model.GPT(model.Config(**checkpoint["config"]))
    assert checkpoint["weights"].keys() == gpt.state_dict().keys() and checkpoint["step"] == 3
    assert checkpoint["optimizer"].keys() == dict(gpt.named_parameters()).keys()
    assert {name: len(state) for name, state in checkpoint["optimizer"].items()} == {
        name: 1 if name.startswith("blocks") and weight.ndim == 2 else 2 for name, weight in gpt.named_parameters()}
    assert checkpoint["source"] == {name: (ROOT / name).read_text(encoding="utf-8") for name in ("train.py", "model.py")}
    assert checkpoint["train"].keys() == {field.name for field in dataclasses.fields(train.Options)}
    assert checkpoint["train"]["micro_batch"] == 4 and checkpoint["train"]["max_iters"] == 3
    assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == ["best.pt", "ckpt.pt", "log.jsonl"]


def test_log(launch, tmp_path, folder, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "sesame-7831")
    assert launch("--max_iters=7", "--eval_interval=3").code == 0
    first, *records = read_log(tmp_path / "out")
    assert set(first) == {"options", "command", "versions", "corpus", "source"}
    checkpoint = model.load_checkpoint(tmp_path / "out/ckpt.pt")
    assert first["options"] == checkpoint["train"] and first["command"] == sys.argv and first["source"] == checkpoint["source"]
    assert {str(torch.__version__), sys.version} <= set(first["versions"])
    assert first["corpus"] == hashlib.sha256(b"uint16 3000 " + np.load(folder / "train.npy").tobytes()).hexdigest() == checkpoint["corpus"]
    assert [list(record) for record in records] == [KEYS] * 3 and [record["step"] for record in records] == [3, 6, 7]
    assert [record["tokens"] for record in records] == [step * 4 * T for step in (3, 6, 7)]
    assert "sesame-7831" not in (tmp_path / "out/log.jsonl").read_text() + (tmp_path / "out/ckpt.pt").read_bytes().decode("latin-1")


def test_train_loss_is_the_mean_since_the_last_evaluation(launch, tmp_path, monkeypatch):
    losses, usual = [], train.Run.train_step

    def train_step(run, *rest):
        losses.append(usual(run, *rest)[0])
        return losses[-1], False
    monkeypatch.setattr(train.Run, "train_step", train_step)
    assert launch("--max_iters=7", "--eval_interval=3").code == 0
    means = [sum(part) / len(part) for part in (losses[:3], losses[3:6], losses[6:])]
    assert [record["train_loss"] for record in read_log(tmp_path / "out")[1:]] == pytest.approx(means, rel=1e-5)


def test_the_clock_stops_during_evaluation(launch, tmp_path, monkeypatch):
    clock, usual = [0.0], train.Run.evaluate

    def tick():
        clock[0] += 1
        return clock[0]

    def evaluate(run, val):
        clock[0] += 1000
        return usual(run, val)
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=tick))
    monkeypatch.setattr(train.Run, "evaluate", evaluate)
    assert launch("--max_iters=4", "--eval_interval=2").code == 0
    assert [(record["seconds"], record["tokens_per_s"]) for record in read_log(tmp_path / "out")[1:]] == [(2, 64), (4, 64)]


def test_a_checkpoint_is_written_before_each_evaluation(launch, tmp_path, monkeypatch):
    def evaluate(*_):
        raise ZeroDivisionError
    monkeypatch.setattr(train.Run, "evaluate", evaluate)
    with pytest.raises(ZeroDivisionError):
        launch("--max_iters=5", "--eval_interval=3")
    for _ in range(1000):  # a thread writes it
        if (tmp_path / "out/ckpt.pt").exists():
            break
        time.sleep(0.01)
    assert model.load_checkpoint(tmp_path / "out/ckpt.pt")["step"] == 3


def test_best_is_kept(launch, tmp_path, monkeypatch):
    scores, usual = iter([3.0, 1.0, 2.0, 0.5, 0.7]), train.Run.evaluate
    monkeypatch.setattr(train.Run, "evaluate", lambda run, val: usual(run, val) | dict(val_loss=next(scores)))
    best = []
    monkeypatch.setattr(train.Run, "save", lambda run, name, save=train.Run.save: (save(run, name), best.append((name, run.progress.step))))
    assert launch("--max_iters=5", "--eval_interval=1").code == 0
    assert [step for name, step in best if name == "best.pt"] == [1, 2, 4]
    assert [step for name, step in best if name == "ckpt.pt"] == [1, 2, 3, 4, 5]
    assert [model.load_checkpoint(tmp_path / "out" / name)["step"] for name in ("best.pt", "ckpt.pt")] == [4, 5]


def test_the_last_step_is_always_evaluated(launch, tmp_path):
    for interval, steps in ((2, [2, 4, 5]), (5, [5]), (9, [5])):
        assert launch("--max_iters=5", f"--eval_interval={interval}").code == 0
        assert [record["step"] for record in read_log(tmp_path / "out")[1:]] == steps


def test_a_second_run_moves_the_first(launch, tmp_path):
    assert "previous" not in launch("--max_iters=2").out
    old = {name: (tmp_path / "out" / name).read_bytes() for name in ("ckpt.pt", "best.pt", "log.jsonl")}
    second = launch("--max_iters=3", "--eval_interval=1")
    assert second.code == 0
    assert [line for line in second.out.splitlines() if str(tmp_path / "out/previous") in line] and "--resume" in second.out
    assert {name: (tmp_path / "out/previous" / name).read_bytes() for name in old} == old
    assert model.load_checkpoint(tmp_path / "out/ckpt.pt")["step"] == 3 and len(read_log(tmp_path / "out")) == 4


def test_what_is_refused_moves_nothing(launch, tmp_path):
    assert launch("--max_iters=2").code == 0
    old = (tmp_path / "out/ckpt.pt").read_bytes()
    for words in (["--optimizer=adam"], ["--n_head=3"], ["--block_size=9999"]):
        assert launch(*words).code == 1
    assert (tmp_path / "out/ckpt.pt").read_bytes() == old and not (tmp_path / "out/previous").exists()


def test_a_full_disk_leaves_the_old_checkpoint(launch, tmp_path, monkeypatch):
    usual, count = torch.save, []

    def save(content, file):
        count.append(1)
        if len(count) > 2:  # ckpt.pt and best.pt of the first evaluation went well
            file.write(b"half of it")
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
        usual(content, file)
    monkeypatch.setattr(torch, "save", save)
    failed = launch("--max_iters=6", "--eval_interval=3")
    assert failed.code == 1 and "cannot write" in failed.message and "\n" not in failed.message and "ckpt.pt" in failed.message
    monkeypatch.undo()
    assert model.load_checkpoint(tmp_path / "out/ckpt.pt")["step"] == 3
    assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == ["best.pt", "ckpt.pt", "log.jsonl"]


class Wrapper(nn.Module):
    """What torch.compile returns: a module that holds the other one under a name of its own."""

    def __init__(self, inner):
        super().__init__()
        self._orig_mod, self.calls = inner, 0

    def forward(self, *args):
        self.calls += 1
        return self._orig_mod(*args)


def test_a_wrapper_leaves_no_trace(launch, tmp_path, monkeypatch):
    """Neither in the keys of the checkpoint nor, by the trial before the first step, in its numbers."""
    made = []
    assert launch(*RESUME, "--init=gpt2", output=tmp_path / "plain").code == 0
    monkeypatch.setattr(torch, "compile", lambda inner, **_: made.append(Wrapper(inner)) or made[-1])
    assert launch(*RESUME, "--init=gpt2", "--compile").code == 0 and made[0].calls > 12
    assert_same_run(tmp_path / "plain", tmp_path / "out")


def test_where_compiling_fails_the_run_goes_on(launch, tmp_path, monkeypatch):
    def broken(*_):
        raise NotImplementedError("no compiler\nand a long story")
    monkeypatch.setattr(torch, "compile", lambda inner, **_: broken)
    said = launch(*RESUME, "--compile")
    assert said.code == 0 and [line for line in said.out.splitlines() if "torch.compile" in line and "NotImplementedError" in line]
    assert launch(*RESUME, output=tmp_path / "plain").code == 0
    assert_same_run(tmp_path / "plain", tmp_path / "out")


@pytest.mark.slow
def test_compile(launch, tmp_path):
    """Compiled for good: the same losses to rounding, and keys without a prefix."""
    for name, words in (("plain", []), ("compiled", ["--compile"])):
        done = launch(*RESUME, *words, output=tmp_path / name)
        assert done.code == 0 and "going on without" not in done.out
    logs = [[record["val_loss"] for record in read_log(tmp_path / name)[1:]] for name in ("plain", "compiled")]
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)
    one, two = (model.load_checkpoint(tmp_path / name / "ckpt.pt")["weights"] for name in ("plain", "compiled"))
    assert one.keys() == two.keys()


def test_bfloat16_stays_near_float32(launch, tmp_path):
    for dtype in ("float32", "bfloat16", "float64"):
        assert launch(*RESUME, f"--dtype={dtype}", output=tmp_path / dtype).code == 0
    full, half, exact = ([record["val_loss"] for record in read_log(tmp_path / d)[1:]] for d in ("float32", "bfloat16", "float64"))
    assert half == pytest.approx(full, rel=0.01) and half != full and full == pytest.approx(exact, rel=1e-3) and full != exact
    dtypes = {d: {w.dtype for w in model.load_checkpoint(tmp_path / d / "ckpt.pt")["weights"].values()} for d in ("bfloat16", "float64")}
    assert dtypes == {"bfloat16": {torch.float32}, "float64": {torch.float64}}


def test_the_loss_falls(launch, folder, tmp_path):
    """A text in which each id follows from the last: the default recipe learns it."""
    np.save(folder / "train.npy", (np.arange(3000) * 7 % V).astype(np.uint16))
    np.save(folder / "val.npy", (np.arange(300) * 7 % V).astype(np.uint16))
    for optimizer in train.OPTIMIZERS:
        rate = 0.3 if optimizer == "sgd" else 0.01
        words = [f"--optimizer={optimizer}", f"--learning_rate={rate}", "--max_iters=60"]
        assert launch(*words, output=tmp_path / optimizer).code == 0
        records = read_log(tmp_path / optimizer)[1:]
        assert records[-1]["val_loss"] < 0.3, (optimizer, records[-1])  # who guesses has 3.9


# ------------------------------------------------------------------------------------------------------------ recipe, memory

def test_recipe_fills_only_what_is_zero():
    small, large = (train.recipe(train.Options(), n, V, 1e10) for n in (1_000_000, 30_000_000))
    for o in (small, large):
        assert all(getattr(o, name) > 0 for name in ("block_size", "n_layer", "n_head", "n_embd", "max_iters", "batch_size",
                                                     "learning_rate", "eval_interval"))
        assert o.n_embd % o.n_head == 0
    assert large.max_iters * large.batch_size > small.max_iters * small.batch_size and (small.ngram, large.ngram) == (5, 3)
    assert [train.recipe(train.Options(n_embd=width), 1000, V, 1e10).ngram for width in (32, 128, 256)] == [5, 5, 0]
    assert train.recipe(train.Options(ngram=0), 1000, V, 1e10).ngram == 0
    tables = [(-1, 1_000_000), (0, 1_000_000), (0, 30_000_000)]
    assert [train.recipe(train.Options(ngram=n, flops=1e12), size, V, 1e10).n_layer for n, size in tables] == [1, 2, 1]
    given = dict(block_size=17, n_layer=3, n_embd=60, n_head=5, max_iters=7, batch_size=9, learning_rate=0.5, eval_interval=2)
    o = train.recipe(train.Options(**given), 1_000_000, V, 1e10)
    assert {name: getattr(o, name) for name in given} == given
    for width, heads in ((7, 1), (8, 1), (40, 1), (48, 2), (64, 2), (80, 2), (100, 2), (96, 4), (208, 4), (320, 5), (368, 4), (768, 12), (1104, 12)):
        assert train.recipe(train.Options(n_embd=width), 1000, V, 1e10).n_head == heads and (heads == 1 or width % (2 * heads) == 0)


@pytest.mark.parametrize("changes", [{}, dict(optimizer="adamw"), dict(optimizer="sgd"), dict(optimizer="soap", n_expert=2),
                                     dict(n_layer=2, bias=True, tie_embeddings=True, position="learned")])
def test_predicted_memory_is_that_of_the_tensors(changes, monkeypatch):
    run = make(**changes)
    memory = model.account(run.gpt.config, 4, run.o.optimizer)["memory"]
    usual, found = run.update, []
    monkeypatch.setattr(run, "update", lambda count: (found.append(sum(w.grad.nbytes for w in run.weights.values())), usual(count)))
    run.train_step([source(random_ids(3000))], False)
    assert found == [memory["gradients"]]
    assert sum(weight.nbytes for weight in run.gpt.parameters()) == memory["weights"]
    assert sum(tensor.nbytes for state in run.state.values() for tensor in state) == memory["optimizer"]


def test_micro_batch_is_what_fits():
    config = make(batch_size=8, position="none").gpt.config  # the table of rope is there once for all rows
    need = {n: model.account(config, n)["memory_total"] for n in range(1, 9)}
    def fit(free, micro=0, rows=8):
        return train.fit_micro_batch(filled(batch_size=8, micro_batch=micro), model.account(config, 1), rows, free)
    assert fit(need[8]) == 8 and fit(math.inf) == 8 and fit(math.inf, rows=3) == 3 and fit(math.inf, micro=5) == 5
    assert fit(math.inf, micro=20) == 8
    assert [fit(need[n] - 1) for n in range(2, 9)] == [1, 2, 3, 4, 5, 6, 7] and fit(need[5] - 1, rows=5) == 4
    with pytest.raises(ValueError, match="--n_embd, --n_layer or --block_size"):
        fit(need[1] - 1)
    with pytest.raises(ValueError, match="--micro_batch"):
        fit(need[4] - 1, micro=4)


def test_memory_is_known_before_the_first_step(launch, monkeypatch, tmp_path):
    need = model.account(make().gpt.config, 1)["memory_total"]
    monkeypatch.setattr(train, "free_memory", lambda device: need - 1)
    refused(launch("--max_iters=2"), "GiB", "--n_embd")
    refused(launch("--max_iters=2", "--micro_batch=2"), "--micro_batch")
    assert not (tmp_path / "out/log.jsonl").exists()
    monkeypatch.setattr(train, "free_memory", lambda device: need)
    assert launch("--max_iters=2").code == 0
    assert model.load_checkpoint(tmp_path / "out/ckpt.pt")["train"]["micro_batch"] == 1  # chosen, and kept for a resume


def test_free_memory_of_this_machine():
    found = train.free_memory(torch.device("cpu"))
    assert found > 2**20 and (found == math.inf or found < 2**50)


# -------------------------------------------------------------------------------------------------------------- bad input

def refused(done, *words):
    """One line on stderr, exit code 1, that holds each of `words`."""
    assert done.code == 1 and "\n" not in done.message and done.message.startswith("train.py: "), done
    assert [word for word in words if word not in done.message] == [], done.message


@pytest.mark.parametrize("words, parts", [
    (["--optimizer=adam"], ["--optimizer=adam", "muon, adamw"]),
    (["--schedule=lines"], ["--schedule=lines", "wsd, cosine, linear, constant"]),
    (["--dtype=int8"], ["--dtype=int8", "float32, float64, bfloat16, float16"]),
    (["--norm=other"], ["--norm=other", "rmsnorm, layernorm"]),
    (["--n_head=3"], ["--n_embd=16", "--n_head=3"]),
    (["--block_size=3000"], ["3000", "--block_size=3000"]),
    (["--max_iters=-1"], ["--max_iters=-1"]), (["--noise_scale", "--batch_size=1"], ["--batch_size=1 must be at least 2"]), (["--batch_size=-2"], ["--batch_size=-2"]),
    (["--learning_rate=-0.1"], ["--learning_rate=-0.1"]), (["--eval_interval=-3"], ["--eval_interval=-3"]),
    *(([word], [word]) for word in ("--eval_tokens=0", "--eval_tokens=1", "--micro_batch=-1", "--warmup_iters=-1", "--seed=-1",
                                    "--weight_decay=-0.1", "--grad_clip=-1.0")),
    *(([word], ["--beta1, --beta2 and --momentum"]) for word in ("--beta1=1", "--beta2=1", "--momentum=1.5")),
    (["--device=nothing"], ["--device=nothing"]), (["--vocab_size=20", "--max_iters=2"], ["the vocabulary has 20"])])
def test_options_that_cannot_be_followed(words, parts, launch, tmp_path):
    refused(launch("--max_iters=2", *words), *parts)
    assert not (tmp_path / "out/ckpt.pt").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_one(launch):
    refused(launch("--device=cuda"), "--device=cuda")


def test_a_large_seed(launch):
    """Dates and hashes are seeds, too."""
    for seed in (20240601, 2**31 - 1):
        done = launch("--max_iters=2", "--dropout=0.1", f"--seed={seed}")
        assert done.code == 0, done.message


@pytest.mark.parametrize("words, part", [(["--max_iter=3"], "--max_iters="), (["--max_iters=many"], "int"), (["stray"], "stray")])
def test_unknown_options_exit_2(words, part, launch, tmp_path):
    done = launch(*words)
    assert (done.code, done.out, done.message.count("\n")) == (2, "", 1) and part in done.message
    assert not (tmp_path / "out").exists()


def npz(path):
    with open(path, "wb") as file:
        np.savez(file, a=random_ids(3000))


@pytest.mark.parametrize("name", ["train.npy", "val.npy"])
@pytest.mark.parametrize("content, part", ids=lambda value: str(value)[:12].encode("ascii", "replace").decode(), argvalues=[
    (np.zeros(3000, np.int64), "int64"), (np.zeros(3000, np.float32), "float32"), (np.zeros(3000, np.uint8), "uint8"),
    (np.zeros(3000, ">u2"), ">u2"), (np.zeros((30, 100), np.uint16), "1-D"), (np.array([1], np.uint16), "2 tokens or more"),
    (np.zeros(0, np.uint16), ""), (np.array(3, np.uint16), ""), (np.array([{}] * 3000), "not a .npy file of tokens"),
    (b"", "not a .npy file of tokens"), (b"some text\n" * 400, "not a .npy file of tokens"),
    (pickle.dumps([1, 2]), "not a .npy file of tokens"), ("truncated", "not a .npy file of tokens"), (npz, "not a .npy file of tokens"), (None, "No such file")])
def test_token_files_that_are_none(name, content, part, launch, folder):
    path = folder / name
    if content is None:
        path.unlink()
        if name == "train.npy":  # then the folder is one of texts, and has none
            return refused(launch("--max_iters=2"), str(folder))
    elif content is npz:
        npz(path)
    elif isinstance(content, str):
        path.write_bytes(path.read_bytes()[:-3])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    refused(launch("--max_iters=2"), str(path), part)


@pytest.mark.parametrize("count, good", [(T, False), (T + 1, True)])
def test_the_shortest_training_tokens(count, good, launch, folder):
    np.save(folder / "train.npy", random_ids(count))
    done = launch("--max_iters=2")
    if good:
        assert done.code == 0, done.message
    else:
        refused(done, "too few", "--block_size=16")


def test_tokens_of_another_tokenizer(launch, folder, monkeypatch):
    """tokenizer.json has fewer ids than the tokens; a tokenizer.json that is none."""
    monkeypatch.setattr(train.subprocess, "run", lambda *_, **__: None)
    bpe.train("char", ["abc"], 300).save(folder / "tokenizer.json")
    refused(launch("--max_iters=3"), "the tokens hold id", "the vocabulary has 5")
    bpe.train("char", [bytes(range(33, 120)).decode()], 300).save(folder / "tokenizer.json")  # the twin: one with enough
    assert launch("--max_iters=3").code == 0
    (folder / "tokenizer.json").write_text("{}")
    refused(launch("--max_iters=3"), "tokenizer.json")


def test_missing_and_empty_data(launch, tmp_path):
    refused(launch("--max_iters=2", data=tmp_path / "nowhere.txt"), "nowhere.txt")
    (tmp_path / "empty.txt").write_bytes(b"")
    refused(launch("--max_iters=2", data=tmp_path / "empty.txt"))
    (tmp_path / "short.txt").write_bytes(b"abc")
    refused(launch("--max_iters=2", "--tokenizer=char", data=tmp_path / "short.txt", output=tmp_path / "short"))


def test_output_that_is_a_file(launch, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(launch("--max_iters=2", output=tmp_path / "file"), "file")
    refused(launch("--max_iters=2", output=tmp_path / "file/below"), "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_loss_that_is_not_finite(launch, tmp_path):
    refused(launch("--max_iters=50", "--learning_rate=1e9", "--eval_interval=50"), " is not finite at step ", "--learning_rate")
    assert not (tmp_path / "out/ckpt.pt").exists()


@pytest.mark.parametrize("words", [["--n_embd=32"], ["--n_layer=2"], ["--optimizer=adamw"], ["--n_head=2"],
                                   ["--ffn=gelu"], ["--tie_embeddings"]])
def test_resume_with_another_shape(words, launch, tmp_path):
    assert launch("--max_iters=2").code == 0
    old = (tmp_path / "out/ckpt.pt").read_bytes()
    refused(launch("--resume", "--max_iters=4", *words), "the checkpoint")
    assert (tmp_path / "out/ckpt.pt").read_bytes() == old


def test_what_training_alone_asks_for_may_change(launch, tmp_path):
    """What says nothing about the weights, such as dropout, may be another in a new run, and in one that goes on."""
    assert launch("--max_iters=2", "--n_expert=2", "--ahead=1").code == 0
    words = ["--dropout=0.2", "--balance_loss=0.1", "--router_z=0", "--ahead_loss=0.1"]
    for way in ("--resume", f"--init_from={tmp_path / 'out/ckpt.pt'}"):
        done = launch(way, "--max_iters=4", *words, shape=[])
        assert done.code == 0, done.message
        config = model.load_checkpoint(tmp_path / "out/ckpt.pt")["config"]
        assert [config[name] for name in ("dropout", "balance_loss", "router_z", "ahead_loss")] == [0.2, 0.1, 0, 0.1]


def test_resume_with_tokens_of_another_vocabulary(launch, tmp_path, folder, monkeypatch):
    assert launch("--max_iters=2").code == 0
    bpe.train("char", ["abc" * 30], 300).save(folder / "tokenizer.json")
    refused(launch("--resume", "--max_iters=4", shape=[]), "the checkpoint")


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_resume_from_a_malicious_checkpoint(launch, tmp_path):
    assert launch("--max_iters=2").code == 0
    path, trace = tmp_path / "out/ckpt.pt", tmp_path / "trace"
    torch.save({**model.load_checkpoint(path), "train": Evil(trace)}, path)
    evil = path.read_bytes()
    refused(launch("--resume", shape=[]), "ckpt.pt", "nothing in it was executed")
    assert not trace.exists() and path.read_bytes() == evil
    torch.load(path, weights_only=False)["train"].close()  # the twin: a trusting reader runs it
    assert trace.exists()


@pytest.mark.parametrize("content", ["text", "foreign", "truncated", "weights only"])
def test_resume_from_what_is_no_checkpoint_of_a_run(content, launch, tmp_path):
    assert launch("--max_iters=2").code == 0
    path = tmp_path / "out/ckpt.pt"
    checkpoint = model.load_checkpoint(path)
    if content == "text":
        path.write_text("hello")
    elif content == "foreign":
        torch.save({"model": torch.zeros(3)}, path)
    elif content == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:  # what model.save_checkpoint writes where nobody trained
        torch.save({key: checkpoint[key] for key in ("version", "config", "weights")}, path)
    refused(launch("--resume", shape=[]), "checkpoint")


# --------------------------------------------------------------------------------------------------------------- extension

def sign_descent(weight, state, rate, t, o):
    """A toy optimizer: one line and one entry are all that a change costs."""
    weight.data -= rate * weight.grad.sign()
    state[:] = [torch.full_like(weight, t)]


class Halved(nn.Module):
    """A toy norm."""

    roles = {"weight": "gain"}

    def __init__(self, config, width=0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width or config.n_embd))

    def forward(self, x):
        return x / 2 * self.weight


def test_entries_from_outside(launch, tmp_path, monkeypatch):
    """A toy optimizer, schedule and norm train by their options, are saved, loaded, resumed."""
    monkeypatch.setitem(train.OPTIMIZERS, "sign", sign_descent)
    monkeypatch.setitem(train.SCHEDULES, "stairs", lambda step, o: 0.5 ** step)
    monkeypatch.setitem(model.NORMS, "halved", Halved)
    words = ["--optimizer=sign", "--schedule=stairs", "--norm=halved", "--max_iters=3", "--eval_interval=1", "--learning_rate=0.01"]
    done = launch(*words)
    assert done.code == 0, done.message
    assert [record["lr"] for record in read_log(tmp_path / "out")[1:]] == pytest.approx([0.01, 0.005, 0.0025])
    checkpoint = model.load_checkpoint(tmp_path / "out/ckpt.pt")
    assert checkpoint["optimizer"]["blocks.0.ffn.up.weight"][0].unique().tolist() == [3]
    gpt = model.from_checkpoint(checkpoint)
    assert isinstance(gpt.norm, Halved) and gpt(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, V)
    assert launch("--resume", "--max_iters=5", shape=[]).code == 0
    assert model.load_checkpoint(tmp_path / "out/ckpt.pt")["step"] == 5
    refused(launch("--optimizer=signs"), "muon, adamw, soap, sgd, sign")


def test_the_default_is_the_first_entry():
    assert list(train.OPTIMIZERS)[0] == train.Options.optimizer and list(train.SCHEDULES)[0] == train.Options.schedule


@pytest.mark.parametrize("name", ("compile", "kernels", "noise_scale", "z_loss", "dropout", "teacher"))
def test_what_does_not_go_with_parallel(name, monkeypatch):
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train, "ranks", lambda: (0, 2))
    o = train.Options(parallel="fsdp", weight_decay=0.0, learning_rate=0.01, batch_size=2, max_iters=9, eval_interval=3, **{name: 0.1 if name in ("z_loss", "dropout") else True})
    with pytest.raises(ValueError, match=f"--{name} does not go with --parallel"):
        train.refuse(o, [])


def test_a_shape_that_cannot_be_is_refused_before_tokens_are_made(launch, corpus, tmp_path):
    for word, message in (("--n_layer=-3", "--n_layer=-3 is too small"), ("--mixer=attn", "--mixer=attn: choose from")):
        refused(launch(word, data=corpus), message)
    assert not (tmp_path / "out/train.npy").exists()


def test_parts_are_of_split_models(launch):
    refused(launch("--max_iters=2", "--parts"), "--parts is for --parallel")


def test_parts_of_a_stopped_run(world_of_one, launch, tmp_path, monkeypatch):
    """There is no ckpt.pt from which --resume could go on."""
    world_of_one()
    at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGINT))
    stopped = launch("--max_iters=9", "--ngram=0", "--parallel=zero1", "--parts")
    assert stopped.code == 130, stopped.message
    assert stopped.out.splitlines()[-1].endswith(f"{tmp_path / 'out'}/parts is saved for ddp.py --merge; joined, --resume goes on from it")
    assert not (tmp_path / "out/ckpt.pt").exists()


@pytest.mark.parametrize("merged", (True, False))
def test_resume_does_not_go_behind_parts(merged, launch, tmp_path):
    """What --parts has written since the last merge was trained anew from there, or from step 0, and overwritten."""
    ckpt, part = tmp_path / "out" / "ckpt.pt", tmp_path / "out" / "parts" / "part-0.pt"
    assert launch("--max_iters=2").code == 0
    part.parent.mkdir()
    part.touch()
    os.utime(part, (time.time() + 9,) * 2)
    if not merged:
        ckpt.rename(tmp_path / "else.pt")
    refused(launch("--max_iters=3", "--resume"), f"--merge={part.parent} --output={ckpt}")
    if merged:
        os.utime(ckpt, (time.time() + 99,) * 2)
        assert launch("--max_iters=3", "--resume").code == 0
    else:
        assert launch("--max_iters=3", "--resume", f"--ckpt={tmp_path / 'else.pt'}").code == 0


@pytest.mark.parametrize("size", (1, 3, 8))
def test_patches_of_bytes(size, launch, corpus, tmp_path, monkeypatch):
    """The model of tests/patches.py: each byte sees all before it and none after; train.py trains and measures it as its own."""
    import patches
    monkeypatch.setattr(patches.Patches, "size", size)
    config = model.Config(vocab_size=257, n_layer=2, n_embd=32, n_head=2, block_size=32, init="gpt2")
    torch.manual_seed(0)
    gpt, tokens = patches.Patches(config), torch.randint(257, (2, 19))
    before = gpt(tokens)
    for t in range(19):
        other = tokens.clone()
        other[:, t] = (other[:, t] + 1) % 257
        changed = (gpt(other) != before).any(2)
        assert not changed[:, :t].any() and changed[:, t:].all()
    for module in (model, train):
        monkeypatch.setattr(module, "GPT", patches.Patches)
    done = launch("--max_iters=2", "--eval_interval=1", "--tokenizer=byte", data=corpus)
    assert done.code == 0, done.message
    first, *_, last = read_log(tmp_path / "out")[1:]
    assert last["val_loss"] < first["val_loss"] < math.log(257) and last["bpb"] > 0


def test_ranks_on_a_cpu_take_no_gpu(world_of_one, monkeypatch):
    """There may be fewer of these than ranks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: pytest.fail(f"GPU {number} was asked for"))
    world_of_one()
    train.join_ranks(train.Options(device="cpu"))
    assert train.ranks() == (0, 1)
