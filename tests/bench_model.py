"""model.py against nanoGPT's model (in other words), its recurrences against their loop, and all variants trained alike.

Usage: python tests/bench_model.py --speed
       python tests/bench_model.py --variants=FOLDER --iters=300 --seeds=3   (the token files of a run of train.py;
            --part=1/2: half of the rows; --only=NAME,NAME: those that begin so)
       python tests/bench_model.py --speeds
       python tests/bench_model.py --decode      (what is kept of a token, and a step of decoding behind 2,000 of them)
       python tests/bench_model.py --crossing    (from which length on a recurrence is cheaper than attention)
       python tests/bench_model.py --import      (memory of the command that imports a file of 500 MB; Linux)
       python tests/bench_model.py --variants=FOLDER --question=depth   (or length, schedule)
The two sides of a ratio take turns; what is printed is the median over the turns. Seconds are of one thread.
"""
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model  # noqa: E402
from model import GPT, Config  # noqa: E402

SHAPE = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257)


class Layer(nn.Module):
    """A layer of GPT-2, as nanoGPT computes it: LayerNorm, attention, LayerNorm, GELU, each added to the stream."""

    def __init__(self, n_head, n_embd):
        super().__init__()
        self.n_head = n_head
        self.ln1, self.ln2 = (nn.LayerNorm(n_embd, bias=False) for _ in "12")
        self.qkv, self.proj = nn.Linear(n_embd, 3 * n_embd, bias=False), nn.Linear(n_embd, n_embd, bias=False)
        self.fc, self.fc2 = nn.Linear(n_embd, 4 * n_embd, bias=False), nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.qkv(self.ln1(x)).split(C, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.fc2(F.gelu(self.fc(self.ln2(x))))


class NanoGPT(nn.Module):
    """Token and position embeddings, layers, a last norm, and the tied head."""

    def __init__(self, n_layer, n_head, n_embd, block_size, vocab_size):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.layers = nn.Sequential(*(Layer(n_head, n_embd) for _ in range(n_layer)))
        self.ln = nn.LayerNorm(n_embd, bias=False)

    def forward(self, ids):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        return F.linear(self.ln(self.layers(x)), self.wte.weight)


def seconds(run):
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def in_turns(runs, turns):
    """Median seconds of each of `runs`, which take turns; the first turn warms up."""
    for run in runs:
        run()
    return [median(column) for column in zip(*([seconds(run) for run in runs] for _ in range(turns)))]


def step(gpt, ids):
    def run():
        gpt.zero_grad()
        F.cross_entropy(gpt(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    return run


def speed():
    ids = torch.randint(50257, (1, 1025))
    same = dict(norm="layernorm", position="learned", ffn="gelu", qk_norm=False, init="gpt2")
    peer, ours, modern = NanoGPT(**SHAPE), GPT(Config(**SHAPE, **same)), GPT(Config(**SHAPE))
    sizes = [sum(weight.numel() for weight in gpt.parameters()) for gpt in (peer, ours, modern)]
    a, b, c = in_turns([step(gpt, ids) for gpt in (peer, ours, modern)], 7)
    print(f"forward + backward of 1 x 1024 tokens: nanoGPT's model {a:.2f} s, the same shape {a / b:.2f} x its speed, "
          f"the modern shape {a / c:.2f} x ({', '.join(f'{size:,}' for size in sizes)} parameters)")
    for delta in (False, True):
        inputs = [torch.randn(1, 4, 2048, 32) for _ in "qkv"]
        inputs = (inputs[0], F.normalize(inputs[1], dim=3), inputs[2], -torch.rand(1, 4, 2048, 1), torch.rand(1, 4, 2048, 1))
        S = torch.zeros(1, 4, 32, 32)
        loop, chunked = in_turns([lambda chunk=chunk: model.scan(inputs, S, delta, chunk) for chunk in (1, 64)], 5)
        times = []
        for T in (2048, 4096, 8192, 16384):
            longer = [x.repeat(1, 1, T // 2048, 1) for x in inputs]
            times += in_turns([lambda: model.scan(longer, S, delta)], 5)
        growth = ", ".join(f"{t / times[0]:.1f}" for t in times)
        print(f"{'delta rule' if delta else 'linear'} at T = 2048: chunks {loop / chunked:.0f} x as fast as the loop; "
              f"at 2048, 4096, 8192, 16384 tokens {growth} times the time")


VARIANTS = {
    "default": "", "n-gram tables": "--ngram=4 --ngram_rows=16384", "value embeddings": "--mixer=attention,valued",
    "scaled residuals": "--residual=scaled", "soft-cap": "--softcap=15", "a token further ahead": "--ahead=1",
    "soft-cap of scores": "--attention_softcap=5",
    "window of 64": "--mixer=window --window=64", "window, then full": "--mixer=window,attention --window=64",
    "strided": "--mixer=strided --window=16", "one key head": "--n_kv_head=1", "latent": "--mixer=latent --latent=64",
    "linear attention": "--mixer=linear", "Mamba-2": "--mixer=mamba2", "Gated DeltaNet": "--mixer=gdn", "Hyena": "--mixer=hyena",
    "hybrid": "--mixer=gdn,attention",
    "no position": "--position=none", "learned positions": "--position=learned", "sinusoidal": "--position=sinusoidal",
    "LayerNorm": "--norm=layernorm", "norm without gain": "--norm=gainless", "without QK-norm": "--qk_norm=False",
    "post-norm": "--placement=post", "reordered norm": "--placement=reordered", "parallel": "--placement=parallel",
    "sandwich": "--placement=sandwich",
    "SwiGLU": "--ffn=swiglu", "GEGLU": "--ffn=geglu", "GELU": "--ffn=gelu", "ReLU": "--ffn=relu",
    "8 experts, 2 active": "--n_expert=8 --n_expert_active=2 --n_inner=128", "tied": "--tie_embeddings=True", "GPT-2's start": "--init=gpt2",
}
QUESTIONS = {  # what README's list of experiments asks in one shape
    "depth": {f"{placement}-norm, {depth} layers": f"--placement={placement} --n_layer={depth} --n_embd=32 --n_head=1 --init=gpt2"
              for placement in ("pre", "post") for depth in (2, 8, 16)},
    "length": {f"{name}, {length} tokens": f"{words} --block_size={length} --batch_size={2048 // length}" for length in (128, 512, 2048)
               for name, words in (("full", ""), ("window of 64", "--mixer=window --window=64"), ("hybrid", "--mixer=gdn,attention"))},
    "schedule": {f"{schedule} {rate}": f"--schedule={schedule} --learning_rate={rate}" for schedule in ("wsd", "cosine", "linear", "constant")
                 for rate in (0.01, 0.02)},
}


SHAPE_OF_VARIANTS = ["--ngram=0", "--n_layer=2", "--n_head=2", "--n_embd=64", "--block_size=128", "--batch_size=8"]


def speeds(rounds=11):
    """Tokens a second of processor time, forward and backward, of each variant, and over those of the default, which takes turns with it."""
    import train

    def rate(objective):
        began = time.process_time()
        for _ in range(3):
            tokens = torch.randint(2048, (8, 129))
            objective(tokens[:, :-1], tokens[:, 1:])[0].backward()
            objective.zero_grad(set_to_none=True)
        return 3 * 8 * 128 / (time.process_time() - began)

    steps = {}
    for name, words in VARIANTS.items():
        o = train.options(train.Options, [*SHAPE_OF_VARIANTS, "--vocab_size=2048", *words.split()])
        gpt = GPT(Config(**{field.name: getattr(o, field.name) for field in dataclasses.fields(Config)}))
        for part, role in gpt.roles().items():
            if role == "table":
                gpt.get_submodule(part.rpartition(".")[0]).sparse = True
        steps[name] = train.Objective(gpt)
        turns = [(rate(steps[name]), rate(steps["default"])) for _ in range(rounds + 1)][1:]  # the first is to warm up
        print(f"| {name} | {median(own for own, _ in turns):,.0f} | {median(own / usual for own, usual in turns):.2f} |", flush=True)


def variants(data, rows, iters, seeds, part):
    """Train each variant on the same tokens for the same steps and print a row of a table: medians, and the range of bits a byte."""
    shape = [f"--data={data}", *SHAPE_OF_VARIANTS, f"--max_iters={iters}", f"--eval_interval={iters}", "--eval_tokens=65536", "--device=cpu", "--sample_tokens=0"]
    print("| variant | options | parameters | bits per byte | tokens/s | cache, bytes a token |\n|---|---|---|---|---|---|")
    number, parts = map(int, part.split("/"))
    for name, words in list(rows.items())[number - 1::parts]:
        found = []
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, ROOT / "train.py", *shape, *words.split(), f"--seed={seed}", f"--output={folder}"]
                done = subprocess.run(command, text=True, capture_output=True, cwd=folder)
                assert done.returncode == 0, done.stderr
                found.append(json.loads((Path(folder) / "log.jsonl").read_text().splitlines()[-1]))
                config = model.load_checkpoint(Path(folder) / "ckpt.pt")["config"]
        cost, bits = model.account(Config(**config), 1), [one["bpb"] for one in found]
        spread = f" ({min(bits):.3f} to {max(bits):.3f})" if seeds > 1 else ""
        print(f"| {name} | `{words or '-'}` | {cost['parameters']:,} | {median(bits):.3f}{spread} | "
              f"{median(one['tokens_per_s'] for one in found):,.0f} | {cost['cache_per_token']:,} |", flush=True)


@torch.inference_mode()
def decode(texts=8, length=2000):
    """Rows: bytes that are kept of a token, by the accounting and in the state, and tokens a second behind `length` tokens."""
    kinds = {"a key for each of 8 heads": {}, "2 keys": dict(n_kv_head=2), "1 key": dict(n_kv_head=1),
             "a latent vector of 128": dict(mixer="latent", latent=128)}
    rows, steps = [], []
    for kind, changes in kinds.items():
        gpt = GPT(Config(n_layer=4, n_head=8, n_embd=512, block_size=2048, vocab_size=2048, **changes)).eval()
        state = gpt.new_state(texts, length + 1)
        for start in range(0, length, 200):
            gpt.hidden(torch.randint(2048, (texts, 200)), state)

        def step(gpt=gpt, state=state):
            gpt.logits(gpt.hidden(torch.zeros(texts, 1, dtype=torch.long), state))
            state.truncate([length] * texts)
        steps.append(step)
        cost = model.account(gpt.config, texts)
        rows.append((kind, cost["parameters"], cost["cache_per_token"], state.nbytes / (texts * (length + 1))))
    print("| attention | parameters | bytes a token, accounted | in the state | tokens/s |\n|---|---|---|---|---|")
    for (kind, parameters, *sizes), took in zip(rows, in_turns(steps, 15)):
        print(f"| {kind} | {parameters:,} | {' | '.join(f'{size:,.0f}' for size in sizes)} | {texts / took:,.0f} |")


def crossing(lengths=(64, 128, 256, 512, 1024, 2048, 4096)):
    """Rows: FLOPs of a layer's mixer a token by the accounting, and microseconds of its forward and backward pass a token."""
    print("| tokens | attention, FLOPs a token | Gated DeltaNet | attention, µs a token | Gated DeltaNet |\n|---|---|---|---|---|")
    for length in lengths:
        gpts = [GPT(Config(n_layer=1, n_head=4, n_embd=128, block_size=length, vocab_size=256, mixer=mixer)) for mixer in ("attention", "gdn")]
        flops = [model.account(gpt.config, 1)["flops"]["mixer"] / length for gpt in gpts]
        x = torch.randn(max(1, 2048 // length), length, 128, requires_grad=True)
        runs = []
        for gpt in gpts:
            calls = []
            gpt.blocks[0].mixer.register_forward_pre_hook(lambda _, inputs, calls=calls: calls.append(inputs[1:]))
            with torch.no_grad():
                gpt(torch.zeros(x.shape[:2], dtype=torch.long))
            runs.append(lambda mixer=gpt.blocks[0].mixer, call=calls[0]: mixer(x, *call).sum().backward())
        times = [took / x.shape[:2].numel() * 1e6 for took in in_turns(runs, 9)]
        print(f"| {length:,} | {' | '.join(f'{n:,.0f}' for n in flops)} | {' | '.join(f'{t:.2f}' for t in times)} |", flush=True)


def imported():
    """Peak memory of `python model.py --import_hf` on a file of GPT-2's shape, over that of `python model.py --help`."""
    def peak(*words):
        code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
        end = "import atexit; atexit.register(lambda: print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0], file=sys.stderr))"
        done = subprocess.run([sys.executable, "-c", f"import sys; {end}; {code}", ROOT / "model.py", *words], text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        return int(done.stderr.split()[-1]) / 1024
    with tempfile.TemporaryDirectory() as folder:
        model.export_hf(GPT(model.options(Config, model.PRESETS["gpt2"].split())), folder)
        size = (Path(folder) / "model.safetensors").stat().st_size / 2**20
        base, most = peak("--help"), peak(f"--import_hf={folder}", f"--output={folder}/ckpt.pt")
    print(f"a file of {size:.0f} MiB: {most:.0f} MiB at most, of which Python and torch {base:.0f}; {(most - base) / size:.2f} of the file")


if __name__ == "__main__":
    if "--help" in sys.argv:
        sys.exit(print(__doc__))
    torch.set_num_threads(1)
    options = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[1:])
    if "variants" in options:
        rows = {**QUESTIONS, "": VARIANTS}[options.get("question", "")]
        rows = {name: words for name, words in rows.items() if name.startswith(tuple(options.get("only", "").split(",")))}
        variants(Path(options["variants"]).resolve(), rows, int(options.get("iters", 300)), int(options.get("seeds", 1)),
                 options.get("part", "1/1"))
    elif "speeds" in options:
        speeds()
    elif "decode" in options:
        decode()
    elif "crossing" in options:
        crossing()
    elif "import" in options:
        imported()
    else:
        speed()
