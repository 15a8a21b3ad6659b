"""kernels.py against its plain twins in float64, torch's own calls, and real compilation for three cards."""
import copy
import inspect
import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before kernels.py decorates anything
pytest.importorskip("triton")
import kernels  # noqa: E402
from kernels import KERNELS, results  # noqa: E402

ROOT = Path(kernels.__file__).parent
DEVICE = torch.device("cuda" if CUDA else "cpu")
# The interpreter cuts bfloat16 off instead of rounding it, and multiplies its bits: float16 stands for it there.
KINDS = (torch.bfloat16, torch.float16, torch.float32) if CUDA else (torch.float16, torch.float32)


def dice(seed):
    """A function that draws a number: 1, a prime, or one between low and high"""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        primes = [p for p in (2, 3, 5, 7, 13, 31, 67, 127) if low <= p <= high]
        choice = int(torch.randint(3, (), generator=generator))
        if choice == 0 and primes:
            return primes[int(torch.randint(len(primes), (), generator=generator))]
        return int(torch.randint(low, high + 1, (), generator=generator))

    return draw


SHAPES = {  # name -> sizes of its example, of numbers drawn by d
    "add": lambda d: (d(1, 3000),),
    "gelu": lambda d: (d(1, 40), d(1, 130)),
    "softmax": lambda d: (d(1, 20), d(1, 300)),
    "rmsnorm": lambda d: (d(1, 20), d(1, 200)),
    "swiglu": lambda d: (d(1, 20), 2 * d(1, 200)),
    "rope": lambda d: (d(1, 2), d(1, 6), d(1, 5), 2 * d(1, 20)),
    "cross_entropy": lambda d: (d(1, 12), d(1, 16), d(2, 300)),
    "adamw": lambda d: (d(1, 4), d(1, 3000)),
    "matmul": lambda d: (d(1, 40), d(1, 70), d(1, 70)),
    "int8": lambda d: (d(1, 20), d(1, 70), d(1, 70)),
    "flash": lambda d: (d(1, 2), 2, d(1, 2), d(1, 50), d(1, 20)),
}
EMPTY = {"add": (0,), "gelu": (0, 7), "softmax": (0, 7), "rmsnorm": (0, 7), "swiglu": (0, 8), "rope": (0, 3, 2, 8),
         "cross_entropy": (0, 4, 9), "adamw": (2, 0), "matmul": (0, 5, 7), "int8": (0, 5, 7), "flash": (0, 2, 1, 5, 8)}


def test_every_kernel_has_shapes():
    assert set(SHAPES) == set(EMPTY) == set(KERNELS)


def sweep(name, count, seed):
    """Sums of squares of the kernel's and the library's relative errors over `count` shapes of each type, by result"""
    kernel, draw, ours, theirs = KERNELS[name], dice(seed), {}, {}
    torch.manual_seed(seed)
    for kind in KINDS:
        for _ in range(count):
            sizes = SHAPES[name](draw)
            inputs = kernel.example(sizes, kind, DEVICE)
            for part, (far, usual, eps) in enumerate(kernels.distances(kernel, inputs)):
                assert far <= max(2 * usual, 8 * eps), (name, kind, sizes, part, far, usual)  # one shape may have luck
                ours[kind, part] = ours.get((kind, part), 0) + far**2
                theirs[kind, part] = theirs.get((kind, part), 0) + usual**2 + (eps / 8) ** 2
    return ours, theirs


@pytest.mark.parametrize("count", (15, pytest.param(60, marks=pytest.mark.slow)))
@pytest.mark.parametrize("name", list(KERNELS))
def test_error_is_the_library_s_over_many_shapes(name, count):
    ours, theirs = sweep(name, count if name != "flash" else count // 2, count)  # test_flash.py has sweeps of its own
    for part in ours:
        assert math.sqrt(ours[part] / theirs[part]) <= 2, (name, part, math.sqrt(ours[part] / theirs[part]))


@pytest.mark.parametrize("name", list(KERNELS))
def test_empty_batches(name):
    kernel = KERNELS[name]
    inputs = kernel.example(EMPTY[name], torch.float32, DEVICE)
    for mine, other in zip(results(kernel, kernel, inputs), results(kernel, kernel.twin, inputs)):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


# ---- the twins themselves, against torch

def example(name, sizes, kind=torch.float64):
    torch.manual_seed(3)
    return KERNELS[name].example(sizes, kind, torch.device("cpu"))


def test_twins_are_what_torch_computes():
    x, z = example("add", (50,))
    close = torch.testing.assert_close
    close(kernels.add_twin(x, z), x + z)
    x, = example("gelu", (5, 9))
    close(kernels.gelu_twin(x), F.gelu(x, approximate="tanh"))
    close(kernels.softmax_twin(x), torch.softmax(x, -1))
    x, weight, residual, eps = example("rmsnorm", (5, 9))
    close(kernels.rmsnorm_twin(x, weight, None, eps)[0], F.rms_norm(x, (9,), weight, eps))
    y, total = kernels.rmsnorm_twin(x, weight, residual, eps)
    close(total, x + residual)
    close(y, F.rms_norm(x + residual, (9,), weight, eps))
    x, weight, bias, activation = example("matmul", (5, 4, 3))
    close(kernels.matmul_twin(x, weight, bias, "gelu"), F.gelu(F.linear(x, weight, bias), approximate="tanh"))
    close(kernels.matmul_twin(x, weight, bias, "none"), F.linear(x, weight, bias))


def test_cross_entropy_twin_by_hand():
    x, weight, targets = example("cross_entropy", (6, 4, 11))
    targets[0] = -1
    p = torch.softmax(x @ weight.T, -1)
    by_hand = -sum(p[row, target].log() for row, target in enumerate(targets.tolist()) if target >= 0)
    torch.testing.assert_close(kernels.cross_entropy_twin(x, weight, targets), by_hand)


def test_rope_twin_turns_by_the_angle():
    x, cos, sin = example("rope", (1, 4, 2, 6))
    y = kernels.rope_twin(x, cos, sin)
    as_complex = torch.complex(x[..., :3], x[..., 3:]) * torch.complex(cos, sin)[None, :, None]
    torch.testing.assert_close(torch.cat((as_complex.real, as_complex.imag), -1), y)


def test_rope_takes_slices_and_rows_of_their_own():
    torch.manual_seed(0)
    heads = torch.randn(2, 5, 9, 8, device=DEVICE)
    angle = torch.rand(10, 4, device=DEVICE)
    q = heads[:, :, 2:5]  # as a slice of queries, keys and values
    mine = kernels.KERNELS["rope"](q, angle.cos(), angle.sin())  # one row for each of the 2 x 5 tokens
    torch.testing.assert_close(mine, kernels.rope_twin(q, angle.cos(), angle.sin()))
    turned = heads.transpose(1, 2)  # no slice of rows: copied
    mine = kernels.KERNELS["rope"](turned, angle[:9].cos(), angle[:9].sin())
    torch.testing.assert_close(mine, kernels.rope_twin(turned, angle[:9].cos(), angle[:9].sin()))


def test_adamw_twin_is_torch_s():
    torch.manual_seed(1)
    weight = nn.Parameter(torch.randn(7, 5, dtype=torch.float64))
    mine, state = weight.detach().clone(), [torch.zeros(7, 5, dtype=torch.float64) for _ in range(2)]
    optimizer = torch.optim.AdamW([weight], lr=0.03, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.2)
    for step in range(1, 6):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        kernels.adamw_twin([mine], [weight.grad], [state[0]], [state[1]], 0.03, 0.8, 0.9, 1e-8, 0.2, step)
        torch.testing.assert_close(mine, weight.detach())


def test_adamw_over_steps_and_types():
    torch.manual_seed(1)
    params = [torch.randn(300, device=DEVICE), torch.randn(7, 11, device=DEVICE, dtype=torch.float16)]
    theirs = [p.double() for p in params]
    mine = [[torch.zeros_like(p, dtype=torch.float32) for p in params] for _ in range(2)]
    exact = [[torch.zeros_like(p) for p in theirs] for _ in range(2)]
    for step in range(1, 5):
        grads = [torch.randn_like(p) for p in params]
        KERNELS["adamw"](params, grads, *mine, 0.01, 0.9, 0.95, 1e-8, 0.1, step)
        kernels.adamw_twin(theirs, [g.double() for g in grads], *exact, 0.01, 0.9, 0.95, 1e-8, 0.1, step)
    torch.testing.assert_close(params[0].double(), theirs[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(params[1].double(), theirs[1], rtol=4e-3, atol=4e-3)


# ---- autograd and torch.compile

def asking(kernel, inputs):
    """Copies of the inputs, of which those with gradients ask for them"""
    copies = [kernels.copied(value) for value in inputs]
    return tuple(value.requires_grad_() if name in kernel.gradients else value for name, value in zip(kernel.inputs, copies))


@pytest.mark.parametrize("name", list(KERNELS))
def test_custom_op_is_sound_and_compiles_whole(name):
    kernel = KERNELS[name]
    torch.manual_seed(0)
    inputs = kernel.example(SHAPES[name](lambda low, high: min(low + 4, high)), torch.float32, DEVICE)
    torch.library.opcheck(kernel.op, asking(kernel, inputs))
    torch._dynamo.reset()
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    for mine, other in zip(results(kernel, compiled, inputs), results(kernel, kernel, inputs)):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", [name for name in KERNELS if KERNELS[name].strided])
def test_results_lie_in_memory_where_torch_compile_is_told(name):
    """Its code addresses them by these strides, also where inputs and slopes are views."""
    kernel = KERNELS[name]
    torch.manual_seed(0)
    inputs = kernel.example(SHAPES[name](lambda low, high: min(low + 4, high)), torch.float32, DEVICE)

    def turned(value):  # the last two dimensions the other way round in memory
        matrix = isinstance(value, torch.Tensor) and value.dim() > 1
        return value.transpose(-1, -2).contiguous().transpose(-1, -2) if matrix else value

    inputs = tuple(map(turned, inputs))
    made = [(kernel.run(*inputs), kernel.fake(*inputs))]
    if kernel.backward:
        values = kernel.values(inputs, made[0][0])
        values |= {f"d{output}": turned(values[output]) for output in kernel.outputs.split()}
        needed = [values[need] for need in kernel.needs]
        made.append((kernel.backward(*needed), kernel.fake_backward(*needed)))
    for mine, told in made:
        assert [(y.shape, y.stride(), y.dtype) for y in kernels.flat([mine])] == [(y.shape, y.stride(), y.dtype) for y in kernels.flat([told])]


@pytest.mark.parametrize("compiled", (False, pytest.param(True, marks=pytest.mark.slow)))  # each kernel is compiled by itself, too
def test_a_model_trains_on_kernels_as_without(compiled, monkeypatch):
    import model
    import train
    monkeypatch.setattr(kernels, "runs", lambda name, device="": True)
    monkeypatch.setattr(model, "ops", model.Fast)
    torch.manual_seed(0)
    config = model.Config(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=64, ffn="swiglu", ngram=0)
    gpt, tokens, found = model.GPT(config).to(DEVICE), torch.randint(64, (2, 32), device=DEVICE), []
    for fused in (None, KERNELS["cross_entropy"]):
        objective = train.Objective(gpt)
        objective.fused = fused
        if fused:
            model.ops = model.with_kernels(DEVICE, compiled)
        torch._dynamo.reset()
        loss, count = (torch.compile(objective, fullgraph=True) if compiled and fused else objective)(tokens, tokens)
        found.append((loss, *torch.autograd.grad(loss, list(gpt.parameters()))))
    for plain, mine in zip(*found):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)


def test_train_with_kernels_makes_the_same_steps(monkeypatch, tmp_path):
    import model
    import train
    monkeypatch.setattr(kernels, "runs", lambda name, device="": True)
    monkeypatch.setattr(model, "ops", model.Fast)
    monkeypatch.setattr(train, "show_sample", lambda *_: None)
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question. " * 12)
    losses = []
    for words in ([], ["--kernels"]):
        folder = tmp_path / f"run{len(words)}"
        monkeypatch.setattr(sys, "argv", ["train.py", f"--data={tmp_path / 'a.txt'}", "--tokenizer=char", "--n_layer=1", "--n_head=2",
                                          "--n_embd=16", "--block_size=16", "--batch_size=2", "--max_iters=3", "--ngram=0", f"--device={DEVICE}",
                                          "--dtype=float32", "--optimizer=adamw", "--sample_tokens=0", f"--output={folder}", *words])
        train.main()
        losses.append(json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["val_loss"])
    assert abs(losses[0] - losses[1]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype, optimizer", [("float32", "adamw"), ("float32", "muon"), ("bfloat16" if CUDA else "float16", "adamw")])
def test_loss_curves_are_equal_within_noise(dtype, optimizer, monkeypatch):
    """Forty steps with kernels, without, and (the noise) without and in smaller micro-batches: sums in another order, all else equal.

    The offender learns by twice the rate.
    """
    import numpy as np

    import model
    import train
    usual, text = kernels.use, np.frombuffer((ROOT / "kernels.py").read_bytes(), np.uint8)
    monkeypatch.setattr(kernels, "runs", lambda name, device="": True)

    def curve(**changes):
        monkeypatch.setattr(kernels, "use", (lambda name, device="": KERNELS[name]) if "kernels" in changes else usual)
        monkeypatch.setattr(model, "ops", model.Fast)
        shape = dict(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=256, ngram=0)
        budget = dict(batch_size=4, max_iters=300, learning_rate=0.01)
        o = train.Options(**shape, **budget | changes, dtype=dtype, optimizer=optimizer, device=str(DEVICE))
        run = train.Run(train.recipe(o, len(text), 256, 1e15), 256, SimpleNamespace(vocab=[], special_tokens={}, to_dict=dict), {})
        sources = [train.Source(text, np.broadcast_to(np.True_, text.shape))]
        return np.array([run.train_step(sources, False)[0] for _ in range(40)])

    plain, mine, cut, wrong = curve(), curve(kernels=True), curve(micro_batch=2), curve(learning_rate=0.02)
    apart, noise, offender = (abs(losses - plain).mean() for losses in (mine, cut, wrong))
    print(f"{dtype}, {optimizer}: from {plain[0]:.3f} to {plain[-1]:.3f} nats; apart {apart:.1e}, noise {noise:.1e}, offender {offender:.1e}")
    assert plain[-1] < plain[0] - 1 and apart <= 4 * noise < offender


def test_rmsnorm_without_residual_and_with_unused_total():
    torch.manual_seed(0)
    x, weight = torch.randn(4, 9, device=DEVICE), torch.randn(9, device=DEVICE)
    kernel, found = KERNELS["rmsnorm"], []
    for function in (kernel, kernels.rmsnorm_twin):
        leaf = x.clone().requires_grad_()
        y, total = function(leaf, weight, None, 1e-6)
        assert total.numel() == 0
        found.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
    torch.testing.assert_close(*found)


def test_cross_entropy_in_chunks_never_holds_all_logits(monkeypatch):
    torch.manual_seed(0)
    kernel = KERNELS["cross_entropy"]
    inputs = kernel.example((29, 8, 50), torch.float32, DEVICE)
    whole = results(kernel, kernel, inputs)
    monkeypatch.setattr(kernels, "LOGITS", 250)  # five rows
    seen, usual = [], kernels.cross_entropy_kernel

    class Spy:
        def __getitem__(self, grid):
            seen.append(grid[0])
            return usual[grid]

    monkeypatch.setattr(kernels, "cross_entropy_kernel", Spy())
    for mine, other in zip(results(kernel, kernel, inputs), whole):
        torch.testing.assert_close(mine, other)
    assert seen == [5, 5, 5, 5, 5, 4]


def torch_adds_halves(knows, calls):
    """torch.addmm of a version that adds products of halves to a sum in float32 (torch 2.8 on a GPU), or does not know how"""
    usual = torch.addmm

    def addmm(total, a, b, out_dtype=None, out=None):
        calls.append(out_dtype)
        if out_dtype is None:
            return usual(total, a, b, out=out)
        if not knows:
            raise TypeError("addmm() got an unexpected keyword argument 'out_dtype'")
        return usual(total, a.to(out_dtype), b.to(out_dtype), out=out)

    return addmm


@pytest.mark.parametrize("knows", (False, True))
def test_cross_entropy_sums_chunks_of_halves_in_float32(knows, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "addmm", torch_adds_halves(knows, calls))
    monkeypatch.setattr(kernels, "LOGITS", 250)  # five rows
    kernels.adds_halves.cache_clear()
    assert kernels.errors(KERNELS["cross_entropy"], (20, 8, 50), torch.float16, DEVICE)[0] <= 2
    # one try, then five draws of four parts
    assert calls == [torch.float32] * (1 + 5 * 4 if knows else 1)
    kernels.adds_halves.cache_clear()


def test_a_product_of_halves_is_added_where_torch_cannot_in_one_call(monkeypatch):
    monkeypatch.setattr(torch, "addmm", torch_adds_halves(False, []))
    kernels.adds_halves.cache_clear()
    for kind in (torch.float16, torch.bfloat16):
        torch.manual_seed(0)
        total, a, b = torch.rand(7, 5, device=DEVICE), torch.randn(7, 13, device=DEVICE).to(kind), torch.randn(13, 5, device=DEVICE).to(kind)
        true = total.double() + a.double() @ b.double()
        kernels.add_product(total, a, b)
        assert total.dtype == torch.float32 and (total - true).abs().max() < torch.finfo(kind).eps * true.abs().max()
    kernels.adds_halves.cache_clear()


def test_a_target_beyond_the_vocabulary_is_no_number():
    x = torch.randn(3, 4, device=DEVICE)
    loss = KERNELS["cross_entropy"](x, x, torch.tensor([0, 3, -1], device=DEVICE))
    assert not loss.isfinite()  # a read out of bounds is none of a kernel's answers


def test_gradient_scale_reaches_cross_entropy():
    inputs = KERNELS["cross_entropy"].example((9, 8, 50), torch.float32, DEVICE)
    x = inputs[0].requires_grad_()
    loss = KERNELS["cross_entropy"](x, *inputs[1:])
    once, = torch.autograd.grad(loss, x, retain_graph=True)
    thrice, = torch.autograd.grad(3 * loss, x)
    torch.testing.assert_close(thrice, 3 * once)


def test_a_kernel_takes_what_its_twin_takes():
    """By place, by name, and with the same defaults: what runs on a CPU runs on a GPU."""
    for name, kernel in KERNELS.items():
        mine, other = (inspect.signature(function).parameters.values() for function in (kernel.run, kernel.twin))
        assert [(p.name, p.default) for p in mine] == [(p.name, p.default) for p in other], name
    torch.manual_seed(0)
    x, bias = torch.randn(4, 8, device=DEVICE), torch.randn(4, device=DEVICE)
    q, last = x.view(1, 2, 2, 8), torch.ones(1, 2, dtype=torch.int32, device=DEVICE)
    for name, inputs, words in (("rmsnorm", (x, x[0]), {}), ("rmsnorm", (x, x[0]), dict(eps=0.1)), ("rmsnorm", (x,), dict(weight=x.view(-1)[::4])),
                                ("matmul", (x, x, bias), {}), ("matmul", (x,), dict(bias=bias, weight=x, activation="gelu")),
                                ("flash", (q, q, q), dict(causal=False)), ("flash", (q, q, q), dict(first=last)), ("softmax", (), dict(x=x.mT))):
        found = []
        for function in (KERNELS[name], KERNELS[name].twin):
            leaf = x.clone().requires_grad_()
            given = [leaf.view_as(value) if value is x or value is q else value for value in inputs]
            y = kernels.flat([function(*given, **words)])[0]
            found.append((y.detach(), *(torch.autograd.grad(y.square().sum(), leaf) if inputs else ())))
        torch.testing.assert_close(*found)


# ---- bad input

def test_what_is_refused():
    x = torch.randn(4, 8, device=DEVICE)
    cases = [
        ("add", (x, torch.empty(4, 8, device="meta")), "tensors on "),
        ("gelu", (x.double(),), "no kernel for torch.float64"),
        ("gelu", (torch.arange(5, device=DEVICE),), "no kernel for torch.int64"),
        ("add", (torch.arange(5, device=DEVICE),) * 2, "no kernel for torch.int64"),
        ("int8", (x.to(torch.int8), x.to(torch.int8), x[:, 0]), "no kernel for torch"),
        ("add", (x, x[:2]), "shape"),
        ("rmsnorm", (x, x[0, :5], None, 1e-6), "weight"),
        ("rmsnorm", (x, x[0], x[:2], 1e-6), "residual"),
        ("swiglu", (x[:, :7],), "halves"),
        ("rope", (x.view(1, 4, 1, 8), x, x), "cos"),
        ("cross_entropy", (x, x[:, :5], torch.zeros(4, dtype=torch.int64, device=DEVICE)), "x "),
        ("matmul", (x, x[:, :5], x[:, 0], "gelu"), "x "),
        ("matmul", (x, x, x[:, 0], "tanh"), "activation"),
        ("matmul", (x, x.half(), x[:, 0], "none"), "type"),
        ("int8", (x, x, x[:, 0]), "int8"),
        ("adamw", ([x.mT], [x.mT], [x.mT], [x.mT], 0.1, 0.9, 0.9, 1e-8, 0.0, 1), "contiguous"),
        ("adamw", ([x[0, 1:]], [x[0, 1:]], [x[0, 1:]], [x[0, 1:]], 0.1, 0.9, 0.9, 1e-8, 0.0, 1), "multiples of 16"),
        ("adamw", ([x], [x[:2]], [x], [x], 0.1, 0.9, 0.9, 1e-8, 0.0, 1), "shape"),
        ("adamw", ([x], [x.half()], [x], [x], 0.1, 0.9, 0.9, 1e-8, 0.0, 1), "type of their parameters"),
        ("adamw", ([x], [x], [x.half()], [x], 0.1, 0.9, 0.9, 1e-8, 0.0, 1), "type of their parameters"),
        ("rmsnorm", (torch.empty(1, 2**17, device=DEVICE), torch.empty(2**17, device=DEVICE), None, 1e-6), "65536"),
    ]
    for name, inputs, message in cases:
        with pytest.raises(ValueError, match=message):
            KERNELS[name](*inputs)
            pytest.fail(f"{name} took {message}")


def test_a_kernel_is_none_for_a_cpu(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", kernels.tl.constexpr(False))
    with pytest.raises(ValueError, match="add: a kernel runs on a GPU; on a CPU its twin does the work"):
        KERNELS["add"](torch.ones(3), torch.ones(3))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_goes_through_as_in_torch(bad):
    torch.manual_seed(0)
    for name in ("gelu", "softmax", "rmsnorm", "swiglu", "matmul"):
        kernel = KERNELS[name]
        inputs = kernel.example(kernel.sizes[0], torch.float32, DEVICE)
        inputs[0][1, 3] = bad
        if name == "softmax":
            inputs[0][2] = bad  # a whole row
        mine, other = kernel(*inputs), kernel.twin(*inputs)
        mine, other = (y[0] if isinstance(y, tuple) else y for y in (mine, other))
        assert torch.equal(mine.isfinite(), other.isfinite()), name
        torch.testing.assert_close(mine[mine.isfinite()], other[mine.isfinite()], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(CUDA, reason="the interpreter warns, a GPU does not")
def test_rows_beyond_the_last_hold_numbers():
    x = torch.randn(5, 20)  # a program has more rows than that
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        torch.testing.assert_close(kernels.softmax(x), torch.softmax(x, -1))


def test_rows_longer_than_a_program_go_online(monkeypatch):
    monkeypatch.setattr(kernels, "WHOLE", 32)
    kernel = KERNELS["softmax"]
    x = torch.randn(3, 101, device=DEVICE)
    x[1, :64] = -math.inf  # whole blocks without a number come first
    for mine, other in zip(results(kernel, kernel, (x,)), results(kernel, kernel.twin, (x,))):
        torch.testing.assert_close(mine, other)


@pytest.mark.skipif(CUDA, reason="a GPU has no memory that is only promised; see the next test")
def test_offsets_beyond_32_bits():
    """Rows that lie more than 2^31 numbers apart: the memory between them is never touched."""
    apart = 2**31 + 16
    wide = torch.empty(apart + 64, dtype=torch.int8)  # virtual: two pages of it are written
    weight = wide.as_strided((2, 33), (apart, 1))
    weight.copy_(torch.randint(-127, 128, (2, 33)))
    x, scale = torch.randn(3, 33), torch.rand(2)
    torch.testing.assert_close(KERNELS["int8"](x, weight, scale), kernels.int8_twin(x, weight, scale), rtol=1e-4, atol=1e-4)
    wide = torch.empty(apart + 64, dtype=torch.float16)
    halves = wide.as_strided((2, 32), (apart, 1))
    halves.copy_(torch.randn(2, 32))
    gate, up = halves.chunk(2, -1)
    mine = kernels.launch_map(kernels.swiglu_of, gate.new_empty(2, 16), gate, up)
    torch.testing.assert_close(mine, kernels.swiglu_twin(halves), rtol=2e-3, atol=1e-4)


@pytest.mark.gpu
def test_tensors_of_more_than_2_31_numbers():
    for name in ("gelu", "softmax", "add", "rmsnorm"):
        kernel = KERNELS[name]
        rows = 2**31 // 4096 + 7
        sizes = (rows * 4096,) if name == "add" else (rows, 4096)
        inputs = kernel.example(sizes, torch.float16, DEVICE)
        mine = kernel(*inputs)
        ends = [value[-4096:] if name == "add" else value[-3:] if isinstance(value, torch.Tensor) and value.dim() > 1 else value
                for value in inputs]
        other = kernel.twin(*ends)
        mine, other = (y[0] if isinstance(y, tuple) else y for y in (mine, other))
        torch.testing.assert_close(mine[-len(other):], other, rtol=2e-3, atol=2e-3)
        del mine, inputs
        torch.cuda.empty_cache()


# ---- use: the kernel after one try, else the twin

def test_use_gives_twins_on_a_cpu():
    for name in KERNELS:
        assert kernels.use(name, "cpu") is getattr(kernels, f"{name}_twin")
    with pytest.raises(ValueError, match="no kernel 'rmsnrom': there are add, gelu"):
        kernels.use("rmsnrom")


def test_use_falls_back_and_says_so_once(monkeypatch, capsys):
    kernels.runs.cache_clear()
    monkeypatch.setattr(KERNELS["gelu"], "op", None)  # as if it could not run
    monkeypatch.setattr(kernels.torch.accelerator, "synchronize", lambda: None)
    device = "cuda" if CUDA else "meta"
    assert kernels.use("gelu", device) is kernels.gelu_twin
    assert kernels.use("gelu", device) is kernels.gelu_twin
    assert capsys.readouterr().err.count("gelu does not run here") == 1
    kernels.runs.cache_clear()


def test_a_model_keeps_its_own_forms_where_no_kernel_runs(monkeypatch):
    """Not the plain twins, which would be slower than what was there."""
    import model
    assert all(getattr(model.with_kernels("cpu"), name) is getattr(model.Fast, name) for name in ("attention", "norm", "turn"))
    monkeypatch.setattr(kernels, "runs", lambda name, device="": name == "rope")
    mixed = model.with_kernels("cuda")
    assert mixed.attention is model.Fast.attention and mixed.norm is model.Fast.norm and mixed.turn is not model.Fast.turn


def test_costs_are_counted_beside_kernels(monkeypatch):
    """Fake tensors lie on the CPU, where a GPU's kernels cannot run; train.py counts after it has chosen them."""
    import model
    config = model.Config(n_layer=1, n_head=1, n_embd=16, block_size=8, vocab_size=16, ngram=0)
    usual = model.account(config, 1)
    monkeypatch.setattr(kernels, "runs", lambda name, device="": True)
    monkeypatch.setattr(kernels, "use", lambda name, device="": lambda *_: pytest.fail(f"{name} on the CPU"))
    monkeypatch.setattr(model, "ops", model.with_kernels("cuda"))
    assert model.account(config, 1) == usual
    with pytest.raises(pytest.fail.Exception, match="on the CPU"):
        monkeypatch.setattr(model, "ops", model.with_kernels("cpu"))
        model.account(config, 1)


@pytest.mark.gpu
def test_use_gives_kernels_on_a_gpu():
    for name in KERNELS:
        assert kernels.use(name) is KERNELS[name]


def test_a_new_kernel_is_one_entry():
    def twice(x: torch.Tensor) -> torch.Tensor:
        return kernels.launch_map(kernels.plus, torch.empty_like(x), x, x)

    def twice_backward(dy: torch.Tensor) -> torch.Tensor:
        return kernels.launch_map(kernels.plus, torch.empty_like(dy), dy.contiguous(), dy.contiguous())

    kernel = kernels.Kernel(twice, lambda x: 2 * x, lambda sizes, *like: (kernels.randn(*sizes, like=like),),
                            lambda x: x.numel(), ((5, 7),) * 3, backward=twice_backward, gradients=dict(x=0), like="dy")
    inputs = kernel.example((5, 7), torch.float32, DEVICE)
    assert kernels.errors(kernel, (5, 7), torch.float32, DEVICE)[0] <= 2
    torch.library.opcheck(kernel.op, asking(kernel, inputs))


def test_errors_sees_a_wrong_kernel():
    wrong = copy.copy(KERNELS["gelu"])
    wrong.op = F.gelu  # the exact form, which differs in the fourth digit
    inputs = wrong.example((50, 70), torch.float32, DEVICE)
    assert kernels.errors(wrong, (50, 70), torch.float32, DEVICE)[0] > 2
    far, usual, eps = kernels.distances(wrong, inputs, exact=False)[0]
    assert far > 8 * eps and usual == 0  # the library's own results are what it is compared with
    wrong.op = lambda x: x * math.nan
    assert kernels.errors(wrong, (5, 7), torch.float32, DEVICE)[0] == kernels.distances(wrong, inputs, exact=False)[0][0] == math.inf


# ---- the benchmark's parts

def test_least_bytes_by_hand():
    half = 2
    for name, sizes, forward, backward in (
        ("add", (100,), 300 * half, 100 * half),
        ("gelu", (10, 10), 200 * half, 300 * half),  # dy, x, dx
        ("softmax", (10, 10), 200 * half, 300 * half),  # dy, y, dx
        ("swiglu", (10, 20), 300 * half, 500 * half),  # dy, x, dx
        ("int8", (1, 10, 20), (20 + 10 + 10) * half + 200, 10 * half),
    ):
        inputs = KERNELS[name].example(sizes, torch.float16, DEVICE)
        assert kernels.least_bytes(KERNELS[name], inputs) == (forward, backward), name
    inputs = KERNELS["rmsnorm"].example((10, 10), torch.float16, DEVICE)  # x, residual, y, total; dy, dtotal, total, dx
    assert kernels.least_bytes(KERNELS["rmsnorm"], inputs) == ((400 + 10) * half, (400 + 20) * half)
    inputs = KERNELS["cross_entropy"].example((10, 20, 30), torch.float32, DEVICE)
    x, weight, targets, loss = 4 * 10 * 20, 4 * 20 * 30, inputs[2].nbytes, 4  # and dx and dw, which are kept on the way forward
    least = 2 * x + 2 * weight + targets + loss, 2 * x + 2 * weight + loss
    assert kernels.least_bytes(KERNELS["cross_entropy"], inputs) == least
    inputs = KERNELS["adamw"].example((2, 100), torch.float32, DEVICE)
    assert kernels.least_bytes(KERNELS["adamw"], inputs)[0] == 7 * 4 * 215  # reads four, writes three


def test_bench_takes_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b", "c")}
    times = kernels.bench(calls, 0.01, torch.device("cpu"))
    assert len(order) >= 18 and order == ["a", "b", "c"] * (len(order) // 3)
    assert all(middle >= 0 and spread >= 0 for middle, spread in times.values())


def test_layers_of_the_roofline():
    found = kernels.layers("2,16,32,4", torch.float32, torch.device("cpu"))
    work = sum(flops for name, (_, _, flops) in found.items() if name.startswith("prefill") and "attention" not in name)
    assert work == 2 * 12 * 32 * 32 * 2 * 16  # two FLOPs for each of 12 C^2 weights and each token
    assert found["prefill attention"][2] == 2 * 2 * 16 * 16 * 32  # 4 B T^2 C, half of it causal
    assert found["decode attention"][2] == 4 * 2 * 16 * 32
    assert found["decode qkv"][1] == 4 * (2 * 32 + 96 * 32 + 2 * 96)
    for call, _, _ in found.values():
        call()
    with pytest.raises(ValueError, match="no multiple of the heads"):
        kernels.layers("2,16,32,5", torch.float32, torch.device("cpu"))


def test_roofline_says_what_binds(capsys, tmp_path):
    points = [("thin", 0.5, 4e9), ("thick", 100.0, 5e11)]
    kernels.roofline(points, (1e10, 1e12), "")
    thin, thick = capsys.readouterr().out.splitlines()[-2:]
    assert "memory" in thin and "80%" in thin  # of 0.5 x 1e10
    assert "compute" in thick and "50%" in thick
    if pytest.importorskip("matplotlib"):
        kernels.roofline(points, (1e10, 1e12), str(tmp_path / "roof.png"))
        assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")


# ---- the script

def script(*words, **env):
    rest = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, ROOT / "kernels.py", *words], capture_output=True, text=True, env=rest | env)


@pytest.mark.parametrize("off", ["1", pytest.param("0", marks=pytest.mark.slow)])
def test_script_checks_and_measures(off):
    """Short where the twin stays uncompiled: Inductor takes 15 s to compile it for a CPU."""
    done = script("--only=gelu", "--seconds=0.01", TORCH_COMPILE_DISABLE=off)
    assert done.returncode == 0, done.stderr
    assert "gelu" in done.stdout and "forward" in done.stdout and "backward" in done.stdout
    if not CUDA:
        assert "an interpreted kernel's time says nothing" in done.stdout


def test_script_ends_with_an_error_where_a_kernel_is_wrong(tmp_path):
    text = (ROOT / "kernels.py").read_text()
    right = "return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))"
    assert text.count(right) == 1
    (tmp_path / "kernels.py").write_text(text.replace(right, "return x * tl.sigmoid(1.5957691216057308 * x)"))
    code = ("import kernels, sys; kernels.show_times = lambda *_: []; sys.argv = ['kernels.py', '--only=gelu', '--seconds=0.01']; "
            "kernels.run(kernels.main)")  # times are no matter here
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "wrong: gelu in" in done.stderr


@pytest.mark.parametrize("words, message", [
    (["--only=flesh"], "--only=flesh: there are add, gelu"),
    (["--roofline", "--shape=1,2,3,4"], "no multiple of the heads"),
    (["--roofline", "--shape=1,2"], "--shape=1,2"),
    (["--only=add", "--plot=roof.png"], "--plot draws what --roofline finds"),
    (["--dtype=float64"], "--dtype=float64: there are bfloat16, float16, float32"),
    (["--device=mps"], "--device=mps"),
    (["--device=quantum"], "--device=quantum"),
    (["--seconds=-1"], "--seconds"),
])
def test_mistakes(words, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kernels.py", *words])
    with pytest.raises(ValueError, match=re.escape(message)):
        kernels.main()


def test_a_mistake_ends_in_one_line(run_main, tmp_path):
    done = run_main("kernels.py", "--only=flesh", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("kernels.py: --only=flesh") and done.stderr.count("\n") == 1


def test_without_a_compiler(run_main, tmp_path, monkeypatch):
    def broken(*_):
        raise NotImplementedError("no compiler\nand a long story")
    monkeypatch.setattr(torch, "compile", lambda twin, **_: broken)
    done = run_main("kernels.py", "--only=add", "--seconds=0.001", f"--device={DEVICE}", cwd=tmp_path)
    assert done.returncode == 0 and "torch.compile does not work here (NotImplementedError)" in done.stdout, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith(" forward"))
    assert max(map(len, kernels.HEAD.splitlines())) <= 80
    assert row.split()[-2] == "-", row  # as many times as fast as plain torch, as that compiled, as the library


def test_a_size_that_does_not_fit_is_told_and_the_rest_go_on(run_main, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(kernels, "limits", lambda *_: (1e9, 1e9))
    monkeypatch.setattr(kernels, "check_all", lambda *_: [])
    monkeypatch.setattr(KERNELS["add"], "twin", full)
    done = run_main("kernels.py", "--only=add,gelu", "--seconds=0.001", f"--device={DEVICE}", cwd=tmp_path)
    sizes = [f"add {size[0]} needs more memory than the device has" for size in KERNELS["add"].sizes[1 : 3 if CUDA else 2]]
    assert done.returncode == 0 and done.stderr == ""
    assert [line for line in done.stdout.splitlines() if line.endswith("has")] == sizes
    assert "\n backward" in done.stdout.partition("gelu")[2]


def test_without_triton(tmp_path):
    """Twins only, one line: as on a machine where triton cannot be installed."""
    (tmp_path / "triton.py").write_text("raise ImportError('not here')")
    code = "import kernels, sys, torch; print(kernels.use('gelu')(torch.ones(1)).item()); sys.argv = ['kernels.py']; kernels.run(kernels.main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1 and done.stdout.startswith("0.841"), done.stderr
    assert "no Triton here" in done.stderr and len(done.stderr.splitlines()) == 1


# ---- compiled for real, without a card

REPORTS = {  # name -> code that prints
    "hopper": "jit = kernels.triton.runtime.jit\nusual = jit.JITFunction.run, jit.driver\n"
              "assert not kernels.compile_report([*kernels.KERNELS], [torch.bfloat16], [90])\n"
              "assert (jit.JITFunction.run, jit.driver) == usual",
    "heads": "kernels.KERNELS['flash'].sizes = (0, (1, 2, 1, 64, 80), (1, 1, 1, 64, 256))\nkernels.SPILLED = 600\n"
             "assert not kernels.compile_report(['flash'], [torch.bfloat16], [80])",
    "too large": "kernels.TILES['few', 2] = dict(BM=16, BN=128, BK=512, num_warps=4, num_stages=5)\n"
                 "print('WRONG', kernels.compile_report(['int8'], [torch.bfloat16], [80]))"}


def report(name):
    """What the code of this name printed, in a process where kernels are not interpreted."""
    rest = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    code = f"import kernels\nfrom kernels import torch\n{REPORTS[name]}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=rest)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compiles_for_a_hopper_card():
    lines = [line.split() for line in report("hopper").splitlines()[1:]]
    found = {line[0]: line[-1] for line in lines}
    assert found["flash_kernel"] == found["flash_dq_kernel"] == found["flash_dkdv_kernel"] == "wgmma"
    assert found["softmax_kernel"] == "-" and {line[2] for line in lines} == {"90"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ("bfloat16", "float16", "float32"))
def test_compiles_for_three_cards(dtype):
    done = script("--compile_report", f"--dtype={dtype}")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()[1:]]
    assert {line[2] for line in lines} == {"80", "90", "100"}
    if dtype != "float32":
        assert all(any(word in line for line in lines) for word in ("mma.sync", "wgmma", "tcgen05"))


def test_compile_report_needs_no_gpu_and_no_interpreter():
    done = script("--compile_report", "--only=add", "--dtype=float32", TRITON_INTERPRET="1")
    lines = [line.split() for line in done.stdout.splitlines()[1:]]
    assert done.returncode == 0 and [line[:3] for line in lines] == [["map_kernel", "float32", card] for card in ("80", "90", "100")]


def test_compile_report_says_that_it_cannot_compile_what_is_interpreted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--compile_report"])
    monkeypatch.setattr(kernels, "INTERPRETED", kernels.tl.constexpr(True))
    with pytest.raises(ValueError, match="--compile_report: unset TRITON_INTERPRET"):
        kernels.main()


def test_compile_report_sees_what_does_not_fit():
    assert "matmul_kernel" in report("too large").split("WRONG")[1]


def test_head_sizes_up_to_256_compile_for_an_older_card():
    assert len(report("heads").splitlines()) == 7
