"""Training and decoding of a model of GPT-2's size on a GPU, beside nanoGPT's form and transformers' generate.

Usage: python tests/bench_gpu.py --seconds=120
       python tests/bench_gpu.py --tiny --device=cpu   (whether it runs at all)
       python tests/bench_gpu.py --only="Muon, compiled"   (builds what is named so, then stops: torch keeps what it compiled)
       python tests/bench_gpu.py --only=decoding

Training: 32 x 1024 random tokens a step, low ids more often than high ones, autocast to bfloat16, by train.py's own train_step, which
reads the windows, runs forward and backward, clips and updates. nanoGPT's form is bench_model.py's, its step has the same parts with
torch's fused AdamW and no chunks of the loss. All that could be built take turns of several steps; the table has the median over the
turns, and the loss of the last step: ours begin with the same weights and see the same windows, so that those of one shape and optimizer
differ by rounding alone. MFU: 6 x parameters + 12 x layers x
width x context FLOPs a token (attention in full, as nanoGPT counts), over what a large bfloat16 product reaches here. Memory is the peak
of a turn without the weights of the others.
Decoding: random weights in bfloat16, the most probable token each time; seconds from the prompts to the last token.
A part that fails says so in a line; parts for which no time is left are left out.
"""
import contextlib
import gc
import math
import signal
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from bench_model import NanoGPT  # noqa: E402

import model  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from model import GPT, Config, export_hf  # noqa: E402

FULL = dict(shape=dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304), batch=32, steps=8, n=8192, text=128, many=32)
TINY = dict(shape=dict(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=512), batch=4, steps=2, n=256, text=16, many=4)
MODERN = dict(ffn="swiglu", tie_embeddings=True, ngram=0)
GPT2 = dict(norm="layernorm", position="learned", ffn="gelu", qk_norm=False, init="gpt2", tie_embeddings=True, ngram=0)
RESERVE = 18  # seconds for the turns, whatever has been built until then
began = time.perf_counter()


class Late(BaseException):
    """The seconds are over."""


def left(o):
    return o.seconds - (time.perf_counter() - began)


@contextlib.contextmanager
def part(o, name, needs):
    """Say what fails and go on; `with part(...) as go` has go = False where too few seconds are left."""
    there = left(o) > needs
    print(f"{time.perf_counter() - began:5.0f} s  {name}{'' if there else ' is left out'}", flush=True)
    try:
        yield there
    except (Exception, Late) as error:
        if isinstance(error, Late):
            print(f"{name}: the seconds are over", flush=True)
        else:
            print(f"{name} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)


def wait(o):
    if o.cuda:
        torch.cuda.synchronize()


def seconds(o, run, times=1):
    wait(o)
    start = time.perf_counter()
    for _ in range(times):
        run()
    wait(o)
    return (time.perf_counter() - start) / times


def product(o):
    """FLOPs a second of a large matrix product of random numbers in bfloat16: the median of five times four."""
    a, b = (torch.randn(o.n, o.n, device=o.device, dtype=torch.bfloat16) for _ in "ab")
    seconds(o, lambda: a @ b, 3)
    return 2 * o.n**3 / statistics.median(seconds(o, lambda: a @ b, 4) for _ in range(5))


# ---- training

def ours(o, words, **changes):
    """(a step by train.py, the weights and states that it holds)"""
    model.ops = model.Fast
    options = train.Options(**o.shape, **words, batch_size=o.batch, max_iters=1000, device=o.device, dtype="bfloat16", **changes)
    options = train.recipe(options, len(o.tokens), o.shape["vocab_size"], 1e15)
    run = train.Run(options, o.shape["vocab_size"], SimpleNamespace(vocab=[], special_tokens={}, to_dict=dict), {})
    sources = [train.Source(o.tokens, np.broadcast_to(np.True_, o.tokens.shape))]
    print(f"         {run.o.micro_batch} sequences at a time, {sum(w.numel() for w in run.gpt.parameters()):,} parameters", flush=True)
    compiled = type(run.objective).__name__ == "OptimizedModule"
    if changes.get("compile") and not compiled:
        raise RuntimeError("train.py went on without torch.compile")
    ops, model.ops = model.ops, model.Fast

    def step():
        model.ops = ops  # a side with --kernels has its own
        loss, _ = run.train_step(sources, False)
        model.ops = model.Fast
        return loss
    return SimpleNamespace(step=step, gpt=run.gpt, flops=run.flops,
                           held=lambda: [*run.gpt.parameters(), *sum(run.state.values(), [])])


def nano(o, compiled):
    """The same for nanoGPT's form: one pass over the batch, fused AdamW."""
    gpt = NanoGPT(**o.shape).to(o.device)
    for weight in gpt.parameters():
        nn.init.normal_(weight, std=0.02) if weight.ndim > 1 else None
    forward = torch.compile(gpt) if compiled else gpt
    adam = torch.optim.AdamW(gpt.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    T = o.shape["block_size"]

    def step():
        starts = np.random.randint(len(o.tokens) - T, size=o.batch)
        rows = torch.from_numpy(np.stack([o.tokens[start:start + T + 1].astype(np.int64) for start in starts]))
        rows = (rows.pin_memory() if o.cuda else rows).to(o.device, non_blocking=True)
        with torch.autocast(o.device, torch.bfloat16):
            loss = F.cross_entropy(forward(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        return loss.item()
    return SimpleNamespace(step=step, gpt=gpt, held=lambda: [*gpt.parameters(), *(x for s in adam.state.values() for x in s.values())])


def training(o):
    """Rows of the table: name, tokens a second, milliseconds, MFU, peak memory, turns, loss of the last step."""
    builders = {
        "nanoGPT's form, fused AdamW": lambda: nano(o, False),
        "nanoGPT's form, fused AdamW, compiled": lambda: nano(o, True),
        "AdamW, nanoGPT's shape": lambda: ours(o, GPT2, optimizer="adamw"),
        "AdamW, nanoGPT's shape, compiled": lambda: ours(o, GPT2, optimizer="adamw", compile=True),
        "AdamW, nanoGPT's shape, compiled, kernels": lambda: ours(o, GPT2, optimizer="adamw", kernels=True, compile=True),
        "Muon": lambda: ours(o, MODERN),
        "Muon, kernels": lambda: ours(o, MODERN, kernels=True),
        "Muon, compiled": lambda: ours(o, MODERN, compile=True),
        "Muon, compiled, kernels": lambda: ours(o, MODERN, kernels=True, compile=True),
    }
    sides, turns, peaks, losses = {}, {}, {}, {}
    for name, build in builders.items():
        if o.only not in name:
            continue
        with part(o, name, RESERVE + (12 if "compiled" in name and not o.tiny else 4)) as go:
            if go:
                gc.collect()
                if o.cuda:
                    torch.cuda.empty_cache()
                side = build()
                took = seconds(o, side.step), seconds(o, side.step)  # shapes are compiled, states made
                print(f"         first step {took[0]:.1f} s, second {took[1]:.3f} s", flush=True)
                sides[name], turns[name] = side, []
    if o.only:
        return []
    signal.setitimer(signal.ITIMER_REAL, max(10.0, left(o)))
    with part(o, "turns", -math.inf):
        for _ in range(5):
            for name, side in sides.items():
                before = torch.cuda.memory_allocated() if o.cuda else 0
                if o.cuda:
                    torch.cuda.reset_peak_memory_stats()
                turns[name].append(seconds(o, side.step, o.steps))
                peak = torch.cuda.max_memory_allocated() - before if o.cuda else 0
                peaks[name] = peak + sum(x.nbytes for x in side.held())
            if left(o) < 2 + 1.3 * sum(times[-1] for times in turns.values()) * o.steps:
                break
        losses |= {name: side.step() for name, side in sides.items()}
    rows, layers, width, T = [], o.shape["n_layer"], o.shape["n_embd"], o.shape["block_size"]
    for name, times in turns.items():
        if times:
            size = sum(weight.numel() for path, weight in sides[name].gpt.named_parameters() if not path.startswith(("wpe", "position")))
            speed = o.batch * T / statistics.median(times)
            mfu = speed * (6 * size + 12 * layers * width * T) / o.peak
            rows.append((name, f"{speed:,.0f}", f"{1e3 * statistics.median(times):.1f}", f"{mfu:.1%}", f"{peaks[name] / 2**30:.1f}", len(times), f"{losses.get(name, math.nan):.4f}"))
    return rows


# ---- decoding

def peer(o, gpt, prompts):
    """(tokens of transformers' generate, seconds), on the exported weights."""
    with tempfile.TemporaryDirectory() as folder:
        kind = export_hf(gpt.float(), folder)
        gpt.bfloat16()
        import transformers
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(o.device).eval()
    ids = torch.tensor(prompts, device=o.device)
    how = dict(do_sample=False, pad_token_id=0, eos_token_id=None, attention_mask=torch.ones_like(ids))

    def generate(n, rows):
        return theirs.generate(ids[rows], **{**how, "attention_mask": how["attention_mask"][rows]}, max_new_tokens=n, min_new_tokens=n)
    results = []
    for rows in (slice(0, 1), slice(None)):
        generate(8, rows)
        found = []
        took = seconds(o, lambda: found.append(generate(o.text, rows)))
        results.append((f"transformers {transformers.__version__} ({kind}), generate", found[0][:, o.text:].tolist(), took))
    return results


def engine(o, gpt, prompts, graphs=False):
    """The same of sample.Engine, and what it says of its two phases."""
    results = []
    for few in (prompts[:1], prompts):
        for n in (8, o.text):
            requests = [sample.Request(prompt, n, sample.Sampling(0)) for prompt in few]
            ours = sample.Engine(gpt, requests, graphs=graphs)
            took = seconds(o, lambda: list(iter(ours.step, [])))
        tokens, spent = ours.spent["decode"]
        each = spent / (tokens / len(few))  # seconds of a step
        fixed, place = sample.row_bytes(gpt)
        state = len(few) * (fixed + 2 * o.text * place)
        print(f"         {len(few)} at a time: {ours.report()}; {1e3 * each:.2f} ms a step, "
              f"weights at {sample.weight_bytes(gpt) / each / 1e9:,.0f} GB/s, with all of the state {(sample.weight_bytes(gpt) + state) / each / 1e9:,.0f}", flush=True)
        results.append((f"sample.Engine{', graphs' * graphs}", [request.output for request in requests], took))
    return results


def decoding(o):
    """Rows of the table: name, texts, tokens a second from the prompts to the end."""
    torch.manual_seed(0)
    gpt = GPT(Config(**o.shape, init="gpt2")).to(o.device, torch.bfloat16).eval()
    prompts = np.random.default_rng(0).integers(o.shape["vocab_size"], size=(o.many, o.text)).tolist()
    rows, tokens = [], {}
    for name, run in (("decoding by sample.Engine", engine), ("the same with CUDA graphs", partial(engine, graphs=True)),
                      ("decoding by transformers", peer)):
        with part(o, name, 10) as go:
            for who, found, took in run(o, gpt, prompts) if go else ():
                rows.append((who, len(found), f"{len(found) * o.text / took:,.0f}", f"{took:.2f}"))
                tokens.setdefault(who, []).extend(found)
    first = tokens.get("sample.Engine", [])
    for who in [*tokens][1:]:
        same = [sum(a == b for a, b in zip(*pair)) / o.text for pair in zip(first, tokens[who])]
        print(f"         greedy tokens that sample.Engine and {who} write at the same place: {statistics.mean(same):.0%} (bfloat16: a near tie ends it)")
    with part(o, "bandwidth", 1):
        print(f"         a copy moves {sample.copy_bandwidth(torch.device(o.device)) / 1e9:,.0f} GB/s, a step reads "
              f"{sample.weight_bytes(gpt) / 1e6:,.0f} MB of weights", flush=True)
    return rows


def table(heads, rows):
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def main():
    words = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[1:])
    tiny = "tiny" in words
    device = words.get("device", "cuda")
    o = SimpleNamespace(**(TINY if tiny else FULL), tiny=tiny, device=device, cuda=device == "cuda", only=words.get("only", ""), seconds=float(words.get("seconds", 120)))

    def late(*_):
        raise Late
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, o.seconds - RESERVE))
    o.tokens = (o.shape["vocab_size"] * np.random.default_rng(0).random(4_000_000) ** 4).astype(np.uint16)
    o.peak, decoded, trained = math.nan, [], []
    if o.cuda:
        about = torch.cuda.get_device_properties(0)
        print(f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {about.multi_processor_count} multiprocessors, torch {torch.__version__}, "
              f"CUDA {torch.version.cuda}, Python {sys.version.split()[0]}")
    with part(o, "a large product", 0):
        o.peak = product(o)
    print(f"         {o.n} x {o.n} x {o.n} in bfloat16: {o.peak / 1e12:,.3f} TFLOP/s", flush=True)
    with part(o, "decoding", 10) as go:
        decoded = decoding(o) if go and o.only in ("", "decoding") else []
    gc.collect()
    with part(o, "training", 10) as go:
        trained = training(o) if go else []
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(f"\ndecoding: prompts of {o.text} tokens, {o.text} new ones each, bfloat16")
    table(("", "texts", "new tokens/s", "seconds"), decoded)
    print(f"\ntraining: {o.shape}, {o.batch} x {o.shape['block_size']} tokens a step, bfloat16")
    table(("", "tokens/s", "ms a step", "MFU", "GiB", "turns", "loss"), trained)
    print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    if "--help" in sys.argv:
        sys.exit(print(__doc__))
    main()
