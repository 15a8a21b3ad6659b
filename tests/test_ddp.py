"""ddp.py: every collective against torch.distributed's, every form against one process, bytes against the formulas.

The processes are real, over gloo; one world of two and one of four serve all tests, as starting them takes longest.
"""
import collections
import contextlib
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from bench_ddp import ring_shares
from conftest import GLOO, ROOT, ranks
from test_model import OLDER
from torch import nn

import ddp
import train
from model import GPT, Config

EXACT = 1e-9


def in_world(task, n, tmp_path, *more):
    """Run task(*more) in n processes; returns what each gave."""
    torch.multiprocessing.set_forkserver_preload(["torch"])  # imported once, not in each process
    torch.multiprocessing.start_processes(member, (task, n, str(tmp_path), more), n, start_method="forkserver")
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(n)]


def member(rank, task, n, folder, more):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=n, timeout=ddp.datetime.timedelta(seconds=60))
    torch.save(task(*more), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------ collectives

def collectives(n):
    """(name, largest difference from torch's or from the definition, bytes sent)"""
    rank, group = dist.get_rank(), ddp.Mesh(f"dp{n}", n).group("dp")
    draw = torch.Generator().manual_seed(0)
    all_x = torch.randn(n, n, 3, 5, generator=draw)  # rank's own, in n rows
    x, found = all_x[rank], []

    def add(name, ours, right):
        found.append((name, (ours - right).abs().max().item() if right is not None else 0.0, ddp.Group.sent))
        ddp.Group.sent = 0
    ddp.Group.sent = 0
    for root in range(n):
        add("broadcast", group.broadcast(x.clone(), root), all_x[root])
        theirs = x.clone()
        dist.reduce(theirs, root)
        ours = group.reduce(x.clone(), root)
        add("reduce", ours, theirs if rank == root else ours)
        add("scatter", group.scatter(x.clone() if rank == root else None, torch.empty(3, 5), root), all_x[root][rank])
        rows = group.gather(x[0].contiguous(), root)
        assert (rows is None) == (rank != root)
        add("gather", rows if rank == root else x, all_x[:, 0] if rank == root else x)
    theirs = x.clone()
    dist.all_reduce(theirs)
    add("all_reduce", group.all_reduce(x), theirs)
    odd = torch.arange(7.0) * (rank + 1)  # no multiple of n
    add("all_reduce, odd", group.all_reduce(odd), torch.arange(7.0) * (n * (n + 1) / 2))
    own = torch.zeros_like(x)
    own[rank] = x[rank]
    add("all_gather", group.all_gather(own), torch.stack([all_x[r][r] for r in range(n)]))
    add("reduce_scatter", group.reduce_scatter(x.clone()), all_x[:, rank].sum(0))
    theirs = torch.empty(n, 3, 5)
    dist.all_to_all_single(theirs, x.clone())
    add("all_to_all", group.all_to_all(list(x[:, None]), [1] * n), theirs)
    ragged = [torch.full((r + 1, 2), float(10 * rank + r)) for r in range(n)]  # rank r gets r + 1 rows from each
    right = torch.cat([torch.full((rank + 1, 2), float(10 * r + rank)) for r in range(n)])
    add("all_to_all, ragged", group.all_to_all(ragged, [rank + 1] * n), right)
    return found


def sharded_module():
    """Any module and any optimizer: a convolution and a list of layers, one of which is not used, under SGD"""
    def build():
        torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)  # Sharder makes them alike
        return nn.ModuleDict(dict(first=nn.Conv1d(2, 3, 3), layers=nn.ModuleList(nn.Linear(3, 3) for _ in range(3)),
                                  unused=nn.Linear(2, 2)))

    def run(module, x):
        x = module["first"](x).mT
        for layer in module["layers"]:
            x = layer(x).tanh()
        return x.square().sum()
    n, rank = dist.get_world_size(), dist.get_rank()
    group = ddp.Mesh(f"dp{n}", n).group("dp")
    data = torch.randn(4, 2 * n, 2, 9, generator=torch.Generator().manual_seed(1))
    found = {}
    for stage in (0, 1, 2, 3):
        for overlap in (False, True):
            module = build()
            sharder = ddp.Sharder(module, group, stage, bucket=100.0, overlap=overlap)
            optimizer = torch.optim.SGD(sharder.pieces.values(), 0.1, momentum=0.9)
            for x in data:
                for half, last in ((x[2 * rank:2 * rank + 1], False), (x[2 * rank + 1:2 * rank + 2], True)):
                    sharder.last = last
                    sharder.begin()
                    run(module, half).backward()
                sharder.sync()
                optimizer.step()
                sharder.spread()
            sharder.begin()
            for unit in sharder.units:
                sharder.need(unit)
            found[stage, overlap] = {name: p.detach().clone() for name, p in module.named_parameters()}
    for stage in (1, 3):
        module = build()
        sharder = ddp.Sharder(module, group, stage, low=torch.bfloat16)
        before = {name: piece.detach().clone() for name, piece in sharder.pieces.items()}
        sharder.begin()
        run(module, data[0][rank:rank + 1].bfloat16()).backward()
        sharder.sync()
        torch.optim.SGD(sharder.pieces.values(), 0.1).step()
        sharder.spread()
        sharder.begin()
        for unit in sharder.units:
            sharder.need(unit)
        named = dict(module.named_parameters())
        assert {p.dtype for p in named.values()} == {torch.bfloat16} and {x.dtype for x in sharder.pieces.values()} == {torch.float64}
        moved = 0
        for unit in sharder.units:
            for name, piece in unit.pieces.items():
                begin = unit.begins[name]
                assert named[name].flatten()[begin:begin + piece.numel()].equal(piece.flatten().bfloat16())
                moved += not piece.equal(before[name])
        assert moved
    torch.manual_seed(0)
    alone = build() if rank == 0 else None
    if alone:
        optimizer = torch.optim.SGD(alone.parameters(), 0.1, momentum=0.9)
        for x in data:
            run(alone, x).backward()
            for p in alone["unused"].parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad()
        found["alone"] = {name: p.detach() for name, p in alone.named_parameters()}
    return found


def micro_batch(n):
    """(what train.py cuts a batch into where the ranks have different memory, loss, the experts' biases after it)"""
    o = train.Options(n_layer=1, n_head=2, n_embd=16, block_size=8, batch_size=4 * n, max_iters=2, ngram=0, parallel="zero2", device="cpu",
                      n_expert=4, balance_bias=0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fit_micro_batch", lambda *_: 2 + dist.get_rank())
        run = train.Run(train.recipe(o, 3000, 64, 1e10), 64, ddp.SimpleNamespace(vocab=[], special_tokens={}), {})
    source = train.Source(np.arange(3000, dtype=np.uint16) % 64, np.ones(3000))
    return run.o.micro_batch, run.train_step([source], False)[0], run.gpt.blocks[0].ffn.bias.tolist()


def tables(n):
    """(warnings of a step of a sharded model, largest difference of its gradients): tables of n-grams get tokens, which have none"""
    config = Config(vocab_size=64, block_size=8, n_layer=2, n_head=2, n_embd=16, ngram=3, ngram_rows=32, init="gpt2")
    tokens = torch.randint(64, (n, 8), generator=torch.Generator().manual_seed(0))
    rank, models = dist.get_rank(), []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(GPT(config))
    models[0](tokens).square().sum().backward()
    sharder = ddp.Sharder(models[1], ddp.Mesh(f"dp{n}", n).group("dp"), 3)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        models[1](tokens[rank:rank + 1]).square().sum().backward()
    sharder.sync()
    right = {name: p.grad.flatten() for name, p in models[0].named_parameters()}
    far = max((piece.grad.flatten() - right[name][unit.begins[name]:][:piece.numel()]).abs().max().item()
              for unit in sharder.units for name, piece in unit.pieces.items())
    return [str(one.message) for one in seen], far


def everything(n):
    return dict(collectives=collectives(n), sharded=sharded_module(), ring=ring_shares(384), micro=micro_batch(n), tables=tables(n))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """What three processes found: the odd number is the harder one"""
    return in_world(everything, 3, tmp_path_factory.mktemp("three"), 3)


def test_collectives_equal_those_of_torch(three):
    assert all(len(one["collectives"]) == 4 * 3 + 6 for one in three)
    for rank in three:
        assert [name for name, far, _ in rank["collectives"] if far > 1e-12] == []


def test_bytes_of_collectives_are_those_of_the_formulas(three):
    n, row = 3, 15 * 8
    for sent in zip(*([(name, size) for name, _, size in one["collectives"]] for one in three)):
        name, sizes = sent[0][0], [size for _, size in sent]
        if name in ("all_gather", "reduce_scatter", "all_to_all"):
            assert sizes == [(n - 1) * row] * n, name
        if name == "all_reduce":
            assert sizes == [2 * (n - 1) * row] * n
        if name in ("broadcast", "reduce"):
            assert sum(sizes) == (n - 1) * n * row  # a tree has n - 1 edges
        if name in ("scatter", "gather"):
            assert sum(sizes) == (n - 1) * row


def test_any_module_with_any_optimizer(three):
    right = three[0]["sharded"].pop("alone")
    for one in three:
        assert len(one["sharded"]) == 8
        for how, weights in one["sharded"].items():
            assert max((weights[name] - right[name]).abs().max() for name in right) < EXACT, how


def test_modules_that_get_tokens_are_fetched_without_a_warning(three):
    for warned, far in (one["tables"] for one in three):
        assert warned == [] and far < EXACT


def test_ranks_cut_a_batch_alike_and_lead_tokens_to_the_same_experts(three):
    assert any(three[0]["micro"][2])
    assert three[0]["micro"][0] == 2 and three[0]["micro"] == three[1]["micro"] == three[2]["micro"]


def test_a_rank_of_the_ring_keeps_its_share_of_the_activations(three):
    """A third and little more; an older torch keeps twice as much of the whole sequence."""
    for whole, saved, pairs, _, far in (one["ring"] for one in three):
        assert (1 / 6 if OLDER else 1 / 3) <= saved / whole < 1.1 / 3 and pairs == 384 * 385 // 2 // 3 and far < EXACT


# ------------------------------------------------------------------------------------------------- forms, by the harness

def rows_of(done):
    """{form: numbers} of the table that the harness printed"""
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(.{36}) +(\S+) +(\S+) +(-|[\d.]+) +([\d.]+) +([\d.]+)", done.stdout, re.M)
    return {name.strip(): tuple(float("nan" if x == "-" else x) for x in numbers) for name, *numbers in found}


@pytest.fixture(scope="module")
def two(run_forked, tmp_path_factory):
    return run_forked("ddp.py", "--steps=2", cwd=tmp_path_factory.mktemp("two"), each=ranks(2))[0]


def test_every_form_is_exact_on_two_ranks(two):
    rows = rows_of(two)
    assert list(ddp.forms_of(ddp.Options(), 2)) == list(rows) and len(rows) >= 16
    assert max(max(row[:2]) for row in rows.values()) < EXACT
    assert [name for name, row in rows.items() if np.isnan(row[2])] == ["torch's DDP", "torch's FSDP2"][:1 + ddp.FSDP_ON_CPU]  # which do not count
    assert max(map(len, two.stdout.splitlines())) <= 80 and "in a step of 2 micro-batches (pp: 4)" in two.stdout


def parameters():
    return sum(p.numel() for p in GPT(Config(**ddp.SHAPE)).parameters())


def test_bytes_of_forms_are_those_of_the_formulas(two):
    """KiB a rank and step in float64; the two micro-batches of a step each gather and scatter with stages 2 and 3"""
    rows = rows_of(two)
    n, P = 2, parameters()
    norm_and_totals = 8 + 16  # all-reduces of 1 and of 2 numbers between two ranks
    kib = {name: row[2] for name, row in rows.items()}
    once = P * 8 * (n - 1) / n
    near = dict(rel=0.01, abs=0.6)  # buckets are filled up to a multiple of n
    for name in ("ddp, one message a parameter, after", "ddp, one message, after", "ddp, in buckets", "zero1"):
        assert kib[name] == pytest.approx((2 * once + norm_and_totals) / 1024, **near), name
    assert kib["zero2"] == pytest.approx((3 * once + norm_and_totals) / 1024, **near)
    embedding = 64 * 32 + 32  # and the last gain: fetched once a pass forward, not again for the way back
    blocks = 8 * (P - embedding) / 2
    rest = 8 * embedding / 2
    assert kib["fsdp"] == pytest.approx((2 * 3 * blocks + (1 + 2) * rest + norm_and_totals) / 1024, rel=0.02)
    B, T, C, layers = 8, 32, 32, 4
    stream = B * T * C * 8 / 2 / 1024
    assert kib["pp, 1f1b"] == pytest.approx(B * T * C * 8 / 1024 + 64 * 32 * 8 / 1024, rel=0.02)  # and the tied matrix
    heads = 2 * 4 * 4  # of keys and values, by their width
    ring = 3 * layers * B * T / 2 * heads * 8 / 1024
    assert kib["cp"] == pytest.approx(ring + kib["ddp, one message, after"], rel=0.01)
    gains = sum(p.numel() for name, p in GPT(Config(**ddp.SHAPE)).named_parameters() if "norm" in name) * 8 / 1024
    loss = 3.5 * B * T * 8 / 1024  # the maximum is gathered, two sums go both ways: 1/2 x ... in float64
    assert kib["tp"] == pytest.approx((8 * layers + 4) * stream + 2 * gains + loss, rel=0.02)


def test_memory_of_shards(two):
    """Weights, gradients and Adam's moments in float64; the gradient of all parameters is freed between steps"""
    rows = rows_of(two)
    P = parameters() * 8 / 2**20
    mib = {name: row[3] for name, row in rows.items()}
    assert mib["ddp, one message, after"] == pytest.approx(4 * P, rel=0.1)
    assert mib["zero1"] == pytest.approx(P + 3 * P / 2, rel=0.1)
    assert mib["zero2"] == pytest.approx(P + 3 * P / 2, rel=0.1)
    assert mib["fsdp"] == pytest.approx(4 * P / 2, rel=0.1)


@pytest.mark.slow
def test_products_are_exact_on_four_ranks(tmp_path, run_ranks):
    rows = rows_of(run_ranks(4, "ddp.py", "--steps=2", "--only= x ", cwd=tmp_path))
    assert list(rows) == [name for name in ddp.FORMS if " x " in name]
    assert max(max(row[:2]) for row in rows.values()) < EXACT


def test_torch_ddp_takes_no_stage(tmp_path, run_ranks):
    rows = rows_of(run_ranks(2, "ddp.py", "--steps=1", "--mesh=torch_ddp", "--stage=3", cwd=tmp_path))
    assert max(rows["torch_ddp"][:2]) < EXACT


def test_the_harness_sees_a_wrong_collective(tmp_path, run_forked):
    wrong = tmp_path / "wrong.py"
    text = (ROOT / "ddp.py").read_text()
    right = "rows[(me - turn - 2) % n] += new"
    assert text.count(right) == 1
    wrong.write_text(text.replace(right, "rows[(me - turn - 2) % n] += 1.001 * new"))
    done, _ = run_forked("wrong.py", "--steps=2", "--mesh=dp2", cwd=tmp_path, root=tmp_path, each=ranks(2))
    assert done.returncode == 1 and "not exact" in done.stdout


# ------------------------------------------------------------------------------------------------------------- in train.py

@pytest.fixture
def tokens(tmp_path):
    import numpy as np
    folder = tmp_path / "tokens"
    folder.mkdir()
    ids = (np.cumsum(np.random.default_rng(0).integers(0, 3, 3000)) % 64).astype(np.uint16)
    np.save(folder / "train.npy", ids[:2500])
    np.save(folder / "val.npy", ids[2500:])
    return folder


@pytest.mark.parametrize("first, then", [("fsdp", "dp1,tp2"), pytest.param("pp", "torch_fsdp", marks=pytest.mark.slow)])
def test_a_run_goes_on_in_another_form(first, then, tokens, tmp_path, run_main, run_ranks):
    """Four steps in one form, then four in another and written in parts, are eight steps of one process."""
    words = ["--n_layer=2", "--n_head=4", "--n_embd=32", "--block_size=32", "--ngram=0", "--vocab_size=64", "--batch_size=8",
             "--eval_interval=4", "--schedule=constant", "--dtype=float64", f"--data={tokens}"]
    done = run_main("train.py", *words, f"--output={tmp_path / 'one'}", "--max_iters=8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words, parts = [*words, f"--output={tmp_path / 'two'}"], tmp_path / "two" / "parts"
    parts.mkdir(parents=True)
    (parts / "part-2.pt").write_text("of a run on three ranks")
    for more in (["--max_iters=4", f"--parallel={first}"], ["--max_iters=8", f"--parallel={then}", "--resume", "--parts"]):
        done = run_ranks(2, "train.py", *words, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    merge = ["ddp.py", f"--merge={parts}", f"--output={tmp_path / 'two.pt'}"]
    done = run_main(*merge, cwd=tmp_path)
    assert done.returncode == 0 and "2 parts joined" in done.stdout, done.stderr
    one, two = (torch.load(path, weights_only=True) for path in (tmp_path / "one" / "ckpt.pt", tmp_path / "two.pt"))
    assert one["step"] == two["step"] == 8
    assert one["weights"].keys() == two["weights"].keys() and one["optimizer"].keys() == two["optimizer"].keys()
    assert max((one["weights"][name] - two["weights"][name]).abs().max() for name in one["weights"]) < EXACT
    assert max((x - y).abs().max() for name, xs in one["optimizer"].items() for x, y in zip(xs, two["optimizer"][name])) < EXACT
    shutil.copy(parts / "part-0.pt", parts / "part-1.pt")
    for twice in (True, False):
        done = run_main(*merge, cwd=tmp_path)
        assert done.returncode == 1 and "1 parts are there, 2 were written" in done.stderr
        os.remove(parts / f"part-{int(twice)}.pt")
    done = run_main(*merge, cwd=tmp_path)
    assert done.returncode == 1 and "holds no part" in done.stderr


def test_parts_keep_the_bias_of_routers(tokens, tmp_path, run_main, world_of_one):
    """It is no parameter, so no rank owns a piece of it: --merge set it to 0."""
    world_of_one()
    words = [*SMALL, f"--data={tokens}", "--n_expert=4", "--balance_bias=0.01", "--parallel=ep"]
    for name, more in (("whole", []), ("cut", ["--parts"])):
        done = run_main("train.py", *words, *more, f"--output={tmp_path / name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        dist.destroy_process_group()
    done = run_main("ddp.py", f"--merge={tmp_path / 'cut/parts'}", f"--output={tmp_path / 'cut/ckpt.pt'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True)["weights"] for name in ("whole", "cut"))
    assert one["blocks.0.ffn.bias"].any() and one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("what, said", [("barrier", "another rank is gone"), ("save", "cannot write")])
def test_parts_of_a_step_take_the_place_of_the_last_together(what, said, tokens, tmp_path, run_main, world_of_one, monkeypatch):
    """Where a rank is lost or its disk full amid writing, the parts of the step before can still be joined."""
    world_of_one()
    words = ["train.py", *SMALL, f"--data={tokens}", "--parallel=zero1", "--parts", f"--output={tmp_path}"]
    done = run_main(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    dist.destroy_process_group()
    before = (tmp_path / "parts/part-0.pt").read_bytes()

    def fails(*_):
        raise RuntimeError("connection closed, or unexpected pos 64 vs 0")
    monkeypatch.setattr(*{"barrier": (dist, "barrier"), "save": (torch, "save")}[what], fails)
    done = run_main(*words, cwd=tmp_path)
    assert done.returncode == 1 and said in done.stderr
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "parts").iterdir()] == [("part-0.pt", before)]


SMALL = ["--n_layer=2", "--n_head=4", "--n_embd=32", "--block_size=32", "--ngram=0", "--vocab_size=64", "--batch_size=8", "--max_iters=4",
         "--eval_interval=2", "--dtype=float64", "--device=cpu"]


@pytest.mark.skipif(not ddp.FSDP_ON_CPU, reason="torch 2.6 has FSDP2 on GPUs alone")
def test_torch_fsdp_evaluates_beside_a_checkpoint_that_is_written(tokens, tmp_path, run_main, monkeypatch, world_of_one):
    """One process under torchrun's variables; the thread that writes must not ask FSDP2 for its parameters (as state_dict does)."""
    done = run_main("train.py", *SMALL, f"--data={tokens}", f"--output={tmp_path / 'alone'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ask = GPT.state_dict

    def state_dict(gpt, *rest, **more):
        assert threading.current_thread() is threading.main_thread()
        return ask(gpt, *rest, **more)
    monkeypatch.setattr(GPT, "state_dict", state_dict)
    world_of_one()
    done = run_main("train.py", *SMALL, f"--data={tokens}", f"--output={tmp_path / 'fsdp'}", "--parallel=torch_fsdp", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True)["weights"] for name in ("alone", "fsdp"))
    assert max((one[name] - two[name]).abs().max() for name in one) < EXACT


@pytest.mark.parametrize("own, other, said", [
    ([], ["--learning_rate=0.02"], "rank 1 was started with learning_rate=0.02, rank 0 with learning_rate=0.0"),
    ([], [], "rank 1 was started with token_files="),  # rank 1 finds other tokens under the same name
    pytest.param(["--seed=3"], ["--seed=3"], "", marks=pytest.mark.slow)])  # a copy of the same tokens
def test_ranks_with_other_options_or_data_end_in_one_line(own, other, said, tokens, tmp_path, run_forked):
    away = tmp_path / "away"
    shutil.copytree(tokens, away / "tokens")
    if "token_files" in said:
        np.save(away / "tokens" / "val.npy", np.load(away / "tokens" / "val.npy")[::-1])
    words = [*SMALL, "--data=tokens", "--output=out"]
    each = [rank | dict(words=words + more, cwd=str(cwd)) for rank, more, cwd in zip(ranks(2), (own, other), (tmp_path, away))]
    for done in run_forked("train.py", cwd=tmp_path, each=each):
        assert done.returncode == bool(said), done
        assert not said or said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_train_refuses_what_cannot_be_split(tokens, tmp_path, run_main):
    done = run_main("train.py", f"--data={tokens}", "--parallel=fsdp", f"--output={tmp_path / 'out'}", cwd=tmp_path)
    assert done.returncode == 1 and "torchrun" in done.stderr and len(done.stderr.splitlines()) == 1


def test_ranks_profile_a_batch_smaller_than_their_number(tokens, tmp_path, run_ranks):
    words = [*SMALL, "--batch_size=1", "--parallel=tp", "--profile", f"--data={tokens}", f"--output={tmp_path / 'out'}"]
    done = run_ranks(2, "train.py", *words, cwd=tmp_path)
    assert done.returncode == 0 and json.loads((tmp_path / "out/trace.json").read_text())["traceEvents"], done.stderr


# ----------------------------------------------------------------------------------------------------------- without ranks

def test_layout_holds_every_number_once():
    for sizes in ([5, 3, 8, 1], [4], [7, 7, 7, 7, 7]):
        for n in (1, 2, 3):
            for whole in (False, True):
                length, starts = ddp.layout(sizes, n, whole)
                places = [place for start, size in zip(starts, sizes) for place in range(start, start + size)]
                assert len(set(places)) == sum(sizes) and max(places) < n * length
                if whole:
                    assert all(start // length == (start + size - 1) // length for start, size in zip(starts, sizes))
                else:
                    assert length == -(-sum(sizes) // n)


def test_rules_cut_every_matrix_of_the_default_model():
    config = Config(**ddp.SHAPE)
    mesh = ddp.SimpleNamespace(size=dict.fromkeys(ddp.AXES, 2))
    for name, p in GPT(config).named_parameters():
        cuts = ddp.cuts_of(name, config, mesh)
        assert len(cuts) == (p.ndim == 2), name
        for axis, dim, sizes in cuts:
            assert sum(sizes) == p.shape[dim], name
            parts = [ddp.sliced(p, dim, sizes, 2, i) for i in range(2)]
            assert ddp.joined(parts, dim, sizes).equal(p)


@pytest.mark.parametrize("schedule", ddp.SCHEDULES)
def test_schedules(schedule):
    for stages in (1, 2, 3, 4):
        for micro in (1, 2, 4, 7):
            for stage in range(stages):
                plan = ddp.SCHEDULES[schedule](stage, stages, micro)
                assert sorted(plan) == sorted([(kind, i) for kind in "FB" for i in range(micro)])
                held = most = 0
                for kind, i in plan:
                    held += 1 if kind == "F" else -1
                    most = max(most, held)
                assert most == (micro if schedule == "gpipe" else min(micro, stages - stage))
            lines = ddp.timeline(schedule, stages, micro)
            longest = max(map(len, lines))
            assert 1 - 3 * micro / longest == pytest.approx((stages - 1) / (micro + stages - 1))


def test_every_rank_of_the_ring_has_as_much_to_do():
    for n in (2, 3, 4):
        for rank in range(n):
            group = ddp.SimpleNamespace(size=n, rank=rank)
            pairs = [pair for turn in range(n) for pair in ddp.Ring.pairs(group, turn)]
            assert sum(0.5 if causal else 1 for _, _, causal in pairs) == 2 * n  # of (2n)^2 / 2 in all


def test_the_ring_and_the_loss_sum_up_in_single_precision():
    """In bfloat16: the log of a denominator alone, of 8 bits, would double the error, and a loss sum be a multiple of 8 or more."""
    torch.manual_seed(0)
    q, k, v, grad = torch.randn(4, 1, 2, 1024, 32)
    q, k = (8 * nn.functional.normalize(x, dim=-1) for x in (q, k))
    group = ddp.SimpleNamespace(size=1, rank=0, all_gather=lambda rows: rows, all_reduce=lambda x: x)
    found = []
    for kind, attention in ((torch.float64, partial(nn.functional.scaled_dot_product_attention, is_causal=True)),
                            (torch.bfloat16, lambda *qkv: ddp.Ring.apply(*qkv, group))):
        qkv = [x.to(kind).requires_grad_() for x in (q, k, v)]
        out = attention(*qkv)
        out.backward(grad.to(kind))
        found.append([x.double() for x in (out.detach(), *(x.grad for x in qkv))])
    assert max((a - b).norm() / a.norm() for a, b in zip(*found)) < 0.013
    objective = train.Objective(GPT(Config(**ddp.SHAPE | dict(vocab_size=2048), init="gpt2")))
    rows, targets = 8 * torch.randn(256, 32), torch.randint(2048, (256,))
    _, loss = ddp.vocabulary_rows(objective.gpt, group)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(rows, targets).item() == pytest.approx(objective.rows(rows, targets).item(), rel=1e-5)


def test_an_expert_takes_no_more_than_its_capacity():
    """Of rows sorted by expert the first few of each are worked on, the others come back as 0; without a limit all are."""
    config = Config(**{**ddp.SHAPE, "balance_loss": 0.0}, n_expert=4)
    torch.manual_seed(0)
    ffn = GPT(Config(**vars(config) | dict(init="gpt2"))).blocks[0].ffn
    group = ddp.SimpleNamespace(size=1, all_to_all=lambda parts, sizes: torch.cat(list(parts)))
    x = torch.randn(12, 32, requires_grad=True)
    ends = torch.tensor([6, 8, 8, 12])  # 6, 2, 0 and 4 rows
    right = ffn.work(x, ends)
    assert torch.allclose(ddp.dispatch(ffn, group, 0.0, x, ends), right)
    few = ddp.dispatch(ffn, group, 1.0, x, ends)  # the mean is 3
    kept = [0, 1, 2, 6, 7, 8, 9, 10]
    assert torch.allclose(few[kept], right[kept], atol=1e-6) and not few[[3, 4, 5, 11]].any()
    few.sum().backward()
    assert x.grad[kept].abs().sum(1).all() and not x.grad[[3, 4, 5, 11]].any()


def test_by_torchrun(tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "ddp.py"),
                           "--mesh=dp2", "--steps=2"], cwd=tmp_path, text=True, capture_output=True, timeout=200,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 ranks, 2 steps") == 1 and re.search(r"^dp2 .* \d", done.stdout, re.M) and "not exact" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("form, n, kills, steps, how", [("zero1", 2, 8, 2400, ["--standalone"]), ("fsdp", 2, 7, 1800, ["--standalone"]),
                                                        ("dp2,tp2", 4, 5, 300, [])])
def test_after_lost_ranks_the_run_goes_on(form, n, kills, steps, how, tmp_path):
    """Ranks are killed at random moments, 20 in all: torchrun starts all again, and losses and weights are those of a calm run."""
    tokens = (torch.arange(20_000) * 7 % 64 + torch.randint(2, (20_000,), generator=torch.Generator().manual_seed(0))).clamp(max=63)
    for side in ("train", "val"):
        np.save(tmp_path / f"{side}.npy", tokens[:20_000 if side == "train" else 2_000].numpy().astype(np.uint16))
    words = [sys.executable, "-m", "torch.distributed.run", *how, f"--nproc_per_node={n}", f"--max_restarts={kills}", str(ROOT / "train.py"),
             f"--data={tmp_path}", "--n_layer=2", "--n_head=4", "--n_embd=32", "--block_size=32", f"--max_iters={steps}", "--eval_interval=25",
             "--batch_size=8", "--ngram=0", "--device=cpu", f"--parallel={form}", "--resume"]

    def start(name):
        file = open(tmp_path / f"{name}.txt", "w")  # a pipe that nobody reads would fill up
        return subprocess.Popen([*words, f"--output={tmp_path / name}"], cwd=tmp_path, stdout=file, stderr=file,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})

    def workers():
        ids = Path(f"/proc/{hit.pid}/task/{hit.pid}/children").read_text().split()
        with contextlib.suppress(OSError):  # one is just gone
            return {id for id in ids if b"train.py" in Path(f"/proc/{id}/cmdline").read_bytes()}
        return set()

    def reached():
        """Evaluations in the log"""
        return len(losses("hit")) if (tmp_path / "hit" / "log.jsonl").exists() else 0

    def losses(name):
        rows = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()[1:]]
        return [(row["step"], row["train_loss"], row["val_loss"]) for row in rows]
    calm = start("calm")
    assert calm.wait(timeout=600) == 0, (tmp_path / "calm.txt").read_text()
    hit, chance, known, where, gaps = start("hit"), random.Random(), set(), [], []
    for _ in range(kills):
        began = time.monotonic()
        while len(ids := workers()) < n or ids & known:  # those that were there before the last kill
            assert hit.poll() is None and time.monotonic() < began + 200, (tmp_path / "hit.txt").read_text()
            time.sleep(0.05)
        gaps.append(time.monotonic() - began)
        late = chance.random() < 0.7  # in training; else while Python and torch load, most likely
        while late and reached() <= max([0, *where]) and hit.poll() is None:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 5))
        assert hit.poll() is None, "the run ended before it was killed often enough"
        where.append(reached())
        known = workers()
        os.kill(int(chance.choice(sorted(known))), signal.SIGKILL)
    out = hit.wait(timeout=600), (tmp_path / "hit.txt").read_text()
    assert out[0] == 0 and out[1].count("exitcode: -9") == kills, out
    print(f"{form} on {n} ranks: {kills} kills behind evaluations {where}, at most {max(gaps[1:]):.1f} s to new processes")
    assert losses("calm") == losses("hit")
    a, b = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("calm", "hit"))
    assert a["step"] == b["step"] == steps and all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])


def test_plan():
    o = ddp.Options(gpus=64, params=7e9, tokens=1e11, block_size=4096, batch_tokens=4e6)
    row = ddp.plan_of(o, 1, 1, 1, 1)
    assert row["memory"]["weights"] == 2 * 7e9 and row["memory"]["optimizer"] == pytest.approx(12 * 7e9 / 64)
    assert row["wire"]["dp"] == pytest.approx(6 * 7e9 * 63 / 64) and row["wire"]["tp"] == row["wire"]["pp"] == row["idle"] == 0
    assert ddp.plan_of(o, 1, 1, 0, 1) is None  # 7e9 parameters in full: 126 GB
    assert ddp.plan_of(o, 16, 1, 1, 1) is None  # more than a node
    piped = ddp.plan_of(o, 1, 4, 1, 1)
    steps = 4e6 / 4096 / 16
    assert piped["idle"] == pytest.approx(3 / (steps + 3))
    assert 0 < piped["mfu"] < row["mfu"] <= ddp.REACHED
    numbers = ",".join(f"{number:g}" for number in ddp.MACHINES["h100"])
    assert ddp.plan_of(ddp.Options(**vars(o) | dict(machine=numbers)), 1, 4, 1, 1) == piped
    between = ddp.MACHINES["h100"][3]
    compute, talk = piped["mfu"] * piped["seconds"], (piped["wire"]["pp"] + piped["wire"]["dp"]) / between  # over 0.6 both
    assert piped["ratio"] == pytest.approx(compute / talk)
    assert ddp.plan_of(ddp.Options(**vars(o) | dict(gpus=1, params=1e9)), 1, 1, 0, 1)["ratio"] == float("inf")


def counted(mesh, stage, steps, layers):
    """What the planner foretells and what is: bytes sent along each axis in a step in float64, state between steps, both by name"""
    norm = "gainless" if "tp" in mesh else "rmsnorm"  # a plan leaves out the gains, whose gradients are summed over tp
    config = Config(**ddp.SHAPE | dict(n_layer=layers, n_embd=64), init="gpt2", norm=norm)
    gc.collect()
    before, sent, usual = ddp.live_bytes(), collections.Counter(), ddp.Group.start
    objective = train.Objective(GPT(config))
    roles, size = objective.gpt.roles(), sum(p.numel() for p in objective.gpt.blocks.parameters())
    split = ddp.Split(objective, ddp.Mesh(mesh, 2), ddp.Options(stage=stage), ddp.BATCH)
    own, state = split.rows(ddp.BATCH), {name: [] for name in split.pieces}

    def start(group, out, *rest):
        sent[id(group)] += 0 if out is None else out.nbytes
        return usual(group, out, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddp.Group, "start", start)
        for step in range(2):
            sent.clear()
            tokens, targets = (x[own].chunk(steps) for x in ddp.windows_of(step))
            _, count = split.backward(list(zip(tokens, targets)))
            split.sync()
            ddp.move(split.pieces, state, roles, split.norm(), count, step + 1, ddp.Options(), split.on_whole)
            split.spread()
    del tokens, targets
    gc.collect()
    axes = tuple(split.mesh.size[axis] for axis in ("dp", "tp", "pp"))
    out = len(own) // steps * config.block_size * config.n_embd
    kinds = 8, 8, 16  # float64, and no master weights
    _, wire = ddp.costs(size, layers, out, axes, stage, steps, kinds)
    memory, _ = ddp.costs(size, layers, out, axes, 2 if stage == 1 else stage, steps, kinds)  # whole gradients come and go
    found = dict(dp=sent[id(split.sharders[-1].group)], tp=sent[id(split.tp)], pp=sent[id(split.pp)])
    return wire, found, sum(memory.values()), ddp.live_bytes() - before


def counted_in_bfloat16(stage, steps=2):
    """The same with the planner's own types, in any module: parameters in bfloat16, the rest in float32"""
    gc.collect()
    before = ddp.live_bytes()
    module = nn.ModuleDict(dict(layers=nn.ModuleList(nn.Linear(64, 64, dtype=torch.float32) for _ in range(4))))
    size = sum(p.numel() for p in module.parameters())
    sharder = ddp.Sharder(module, ddp.Mesh("dp2", 2).group("dp"), stage, low=torch.bfloat16)
    optimizer = torch.optim.AdamW(sharder.pieces.values(), 0.1)
    for _ in range(2):
        sent = ddp.Group.sent
        for i in range(steps):
            sharder.last = i == steps - 1
            sharder.begin()
            x = torch.ones(1, 64, dtype=torch.bfloat16, requires_grad=True)
            for layer in module["layers"]:
                x = layer(x)
            x.sum().backward()
        sharder.sync()
        optimizer.step()
        sharder.spread()
    sent = ddp.Group.sent - sent
    del x, layer
    gc.collect()
    memory, _ = ddp.costs(size, 4, 0, (2, 1, 1), 2 if stage == 1 else stage, steps)
    _, wire = ddp.costs(size, 4, 0, (2, 1, 1), stage, steps)
    if stage == 3:  # made of the master weights when they are fetched
        memory["weights"] = 0
    return wire, dict(dp=sent, tp=0, pp=0), sum(memory.values()), ddp.live_bytes() - before


def planned():
    gc.freeze()  # what is there already is not looked through each time
    forms = [("dp2", stage, 2) for stage in range(4)] + [("tp2", 0, 2), ("pp2", 0, 4)]
    found = {form: [counted(*form, layers) for layers in (2, 4)] for form in forms}, list(map(counted_in_bfloat16, range(4)))
    gc.unfreeze()
    return found


def test_what_is_planned_is_what_is_sent_and_kept(tmp_path):
    """Bytes exactly, state within 10%. A plan has layers alone: of a model with embeddings it tells what two more layers add."""
    for forms, stack in in_world(planned, 2, tmp_path):
        for form, (small, large) in forms.items():
            for axis in ("dp", "tp"):
                assert large[1][axis] - small[1][axis] == large[0][axis] - small[0][axis], (form, axis)
            assert large[1]["pp"] == large[0]["pp"] and any(large[0].values()), form
            assert large[3] - small[3] == pytest.approx(large[2] - small[2], rel=0.1), form
        for stage, (wire, found, foretold, kept) in enumerate(stack):
            assert found == wire and kept == pytest.approx(foretold, rel=0.1), stage


def test_a_mistake_on_every_rank_ends_in_one_line(tmp_path, run_script):
    done = run_script("ddp.py", "--ranks=2", "--mesh=dp2", "--stage=7", cwd=tmp_path)
    assert done.returncode == 1 and "--stage=7: choose from 0, 1, 2, 3" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and len(GLOO.sub("", done.stdout).splitlines()) == 2, done  # the head of a table


def test_one_rank_runs_no_product():
    assert not [name for name in ddp.forms_of(ddp.Options(), 1) if " x " in name]


@pytest.mark.parametrize("words, said", [
    (["--only=nosuch"], "--only=nosuch: there are ddp, one message"),
    (["--only=x tp"], "--only=x tp: dp x tp, pp x tp, cp x tp need --ranks=4"),
    (["--mesh=foo2"], "write axes with their sizes"),
    (["--mesh=dp3"], "--mesh=dp3 is for 3 ranks, there are 2"),
])
def test_forms_that_are_none_are_refused_before_the_table(words, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        ddp.forms_of(ddp.options(ddp.Options, words), 2)


def test_the_plan_fits_a_terminal(capsys):
    ddp.plan(ddp.Options())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and sum(line.startswith("pp") for line in lines) == 8
    assert lines[5].split()[0] == "pp2,dp64,tp8" and lines[6].split() == ["8.8", "17.5", "0.8", "22.4", "281.6", "0.1", "25.8"]


@pytest.mark.parametrize("words, said", [
    (["--optimizer=lion"], "choose from adamw, muon"),
    (["--plan", "--params=1e13", "--gpus=2"], "fit on no mesh of 2 GPUs"),
    (["--plan", "--gpus=0"], "--gpus=0 must be above 0"),
    (["--show_schedule", "--mesh=pp0"], "--mesh=pp0 has no pipeline to draw"),
    (["--show_schedule", "--mesh=dp2"], "--mesh=dp2 has no pipeline to draw"),
    (["--plan", "--params=-7e9"], "--params=-7e+09 must be above 0"),
    (["--plan", "--block_size=0"], "--block_size=0 must be above 0"),
    (["--timeout=0"], "--timeout must be 1 or more"),
    (["--plan", "--machine=h1000"], "choose from a100, h100, b200, or give five numbers"),
    (["--plan", "--machine=1e15,0,1e12,1e11,8"], "or give five numbers"),
    (["--merge=nowhere"], "holds no part-*.pt"),
])
def test_mistakes_end_in_one_line(words, said, tmp_path, run_main):
    done = run_main("ddp.py", "--ranks=2", *words, cwd=tmp_path)
    assert done.returncode == 1 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_what_cannot_be_split_is_refused():
    def check(said, mesh="dp2", n=2, stage=0, optimizer="adamw", **shape):
        size = dict.fromkeys(ddp.AXES, 1) | {word[:2]: int(word[2:]) for word in mesh.split(",")}
        config = Config(**{**ddp.SHAPE, **shape})
        with pytest.raises(ValueError, match=re.escape(said)):
            ddp.check_split(config, ddp.SimpleNamespace(size=size, text=mesh), ddp.Options(stage=stage, optimizer=optimizer), 8)
    check("tp3 does not divide --n_head (8; [2, 4, 8] do)", "tp3")
    check("tp2 does not divide --vocab_size (65; [5, 13, 65] do)", "tp2", vocab_size=65)
    check("ep2 does not divide --n_expert", "ep2")
    check("--block_size=34 is no multiple of 4", "cp2", block_size=34)
    check("--block_size=33 is no multiple of 4", "cp2", block_size=33)  # which would be cut into three parts of 11
    check("--block_size=36 is no multiple of 8", "cp2,tp4", block_size=36)
    check("--optimizer=soap keeps more", "tp2", optimizer="soap")
    check("not with tp and pp", "pp2", n_expert=4)
    check("use 2 with pp and ep", "pp2", stage=3)
    check("more stages than --n_layer=4", "pp5")
    check("--batch_size=8 is no multiple of dp x ep = 3", "dp3")
    check("--recompute does not go with cp", "cp2", recompute=True)
    check("is for --mixer=attention", "tp2", mixer="mamba2")
    check("is for --attention_softcap=0.0", "cp2", attention_softcap=30.0)
    for words in ("dp2,xy1", "dp", "dp0", "dp2,dp2", ""):
        with pytest.raises(ValueError, match="from pp, dp, ep, cp, tp"):
            ddp.Mesh(words, 2)
