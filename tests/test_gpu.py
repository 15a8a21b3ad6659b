"""On a CUDA device: model.py, train.py, align.py and sample.py give what the same code gives on the CPU, where the other tests hold it exact.

The oracle of the layers is the CPU in float64; that of a run or of the engine is the same call with the other device. What torch
adds up in another order on a GPU differs by rounding, hence tolerances: those of float32 are relative to the largest entry.
"""
import copy
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_model import SINGLES, VARIANTS, make

import align
import bpe
import model
import sample
import scaling
import train
from model import GPT, Config

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
V, T = 50, 16
SHAPE = dict(vocab_size=V, block_size=T, n_layer=2, n_head=2, n_embd=32)
WORDS = ["--n_layer=2", "--n_head=2", "--n_embd=32", f"--block_size={T}", "--batch_size=8", "--max_iters=10", "--ngram=0"]


@pytest.fixture(autouse=True)
def seeded(accounts_once):
    torch.manual_seed(0)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def folder(tmp_path):
    """Tokens that can be learned: each is the one before it plus 7, or any; 16 windows and a short one for validation."""
    draw, path = np.random.default_rng(0), tmp_path / "tokens"
    path.mkdir()
    for name, n in (("train", 4000), ("val", 15 * T + 9)):
        tokens = np.arange(n) * 7 % V
        noise = draw.random(n) < 0.2
        tokens[noise] = draw.integers(V, size=noise.sum())
        np.save(path / f"{name}.npy", tokens.astype(np.uint16))
    return path


@pytest.fixture
def go(folder, tmp_path, monkeypatch, capsys):
    """Run train.py's command line here: go("name", *words, device=..., cut=step) -> its losses, records, what it printed.

    `cut` is the step at which the plug is pulled.
    """
    usual = train.Run.train_step

    def run(name, *words, device=DEVICE, dtype="float32", cut=-1):
        losses = []

        def train_step(run, *rest):
            if run.progress.step == cut:
                run.written()
                raise EOFError
            losses.append(usual(run, *rest)[0])
            return losses[-1], False
        monkeypatch.setattr(train.Run, "train_step", train_step)
        words = [f"--data={folder}", f"--output={tmp_path / name}", f"--device={device}", f"--dtype={dtype}", *WORDS, *words]
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        try:
            train.main()
        except EOFError:
            assert cut >= 0
        log = (tmp_path / name / "log.jsonl").read_text().splitlines() if "--profile" not in words else []
        records = list(map(json.loads, log))[1:]
        return SimpleNamespace(losses=losses, records=records, out=capsys.readouterr().out)
    return run


def off(a, b, least=1e-6):
    """The largest difference, relative to the largest entry of b (or to `least`)."""
    a, b = (x.detach().cpu().double() for x in (a, b))
    return ((a - b).abs().max() / b.abs().max().clamp(min=least)).item()


# ------------------------------------------------------------------------------------------------------------------- model

def loss_and_gradients(gpt, x, y):
    """In training, of all parts of the loss; dropout's keys are given."""
    gpt.noise["keys"] = torch.arange(len(x))
    objective = train.Objective(gpt.train(), 0.1)
    loss, count = objective(x, y)
    loss.backward()
    assert count.item() == (y >= 0).sum()
    gradients = {name: weight.grad for name, weight in gpt.named_parameters()}
    gpt.zero_grad(set_to_none=True)
    return {"loss": loss} | gradients


@pytest.mark.parametrize("changes", [*VARIANTS.values(), dict(dropout=0.3)], ids=[*VARIANTS, "dropout"])
def test_every_variant_forward_and_backward(changes, double):
    gpt = make(**changes)
    x, y = torch.randint(23, (3, 12)), torch.randint(-1, 23, (3, 12))
    own = copy.deepcopy(gpt)
    right = loss_and_gradients(own, x, y)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        torch.set_default_dtype(dtype)
        there = copy.deepcopy(gpt).to(DEVICE, dtype)
        found = loss_and_gradients(there, x.to(DEVICE), y.to(DEVICE))
        assert {(value.device.type, value.dtype) for value in found.values()} == {(DEVICE, dtype)}
        least = 1e-3 * max(value.abs().max() for value in [*right.values()][1:])  # some gradients are 0 but for rounding
        wrong = {name: off(found[name], right[name], least) for name in right}
        assert max(wrong.values()) < tolerance, {name: value for name, value in wrong.items() if value >= tolerance}
        buffers = dict(there.named_buffers())  # the bias of the experts
        assert max([0.0, *(off(buffers[name], value) for name, value in own.named_buffers())]) < 1e-6


@pytest.mark.parametrize("changes", SINGLES, ids=map(str, SINGLES))
def test_cached_decoding_equals_the_full_pass(changes, double):
    """In calls of several lengths, rows that are copied, and (but for recurrences) go back by different numbers of tokens."""
    gpt = make(**changes)
    x = torch.randint(23, (2, 14))
    right = gpt(x)
    with torch.inference_mode():
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
            there, ids = copy.deepcopy(gpt).to(DEVICE, dtype), x.to(DEVICE)
            state = there.new_state(2)
            parts = [there(ids[:, a:b], state) for a, b in ((0, 5), (5, 6), (6, 9), (9, 10), (10, 14))]
            assert off(torch.cat(parts, 1), right) < tolerance
            if changes.get("mixer", "attention") in ("attention", "window,attention", "window", "valued", "latent"):
                state.truncate([7, 9])
                ragged = there(torch.stack((ids[0, 7:10], ids[1, 9:12])), state)
                assert off(ragged[0], right[0, 7:10]) < tolerance and off(ragged[1], right[1, 9:12]) < tolerance
                state = state.fork([1, 0, 0])
                more = there(ids[[1, 0, 0], [12, 10, 10]][:, None], state)[:, 0]
                assert off(more, right[[1, 0, 0], [12, 10, 10]]) < tolerance


def test_attention_in_half_precision_is_near(double):
    """bfloat16 has 8 bits: long texts, GQA and windows take other kernels than float32."""
    for changes in ({}, dict(n_kv_head=2), dict(mixer="window", window=40)):
        torch.manual_seed(0)
        gpt = GPT(Config(vocab_size=64, block_size=256, n_layer=2, n_head=4, n_embd=128, init="gpt2", **changes))
        x = torch.randint(64, (2, 200))
        right = gpt(x).detach()
        there = copy.deepcopy(gpt).to(DEVICE, torch.bfloat16)
        with torch.inference_mode():
            state = there.new_state(2)
            parts = [there(x.to(DEVICE)[:, a:b], state) for a, b in ((0, 100), (100, 101), (101, 180), (180, 200))]
        assert off(torch.cat(parts, 1), right) < 0.05
        with torch.autocast(DEVICE, torch.bfloat16):
            assert off(copy.deepcopy(gpt).to(DEVICE, torch.float32)(x.to(DEVICE)), right) < 0.05


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_in_chunks(tied, monkeypatch):
    torch.manual_seed(1)
    gpt = GPT(Config(**SHAPE, init="gpt2", tie_embeddings=tied)).to(DEVICE)
    x, y = torch.randint(V, (8, T)).to(DEVICE), torch.randint(-1, V, (8, T)).to(DEVICE)
    found, widest = [], []
    gpt.head.register_forward_hook(lambda head, x, y: widest.append(len(y)))
    for logits in (2**24, 5 * V // 8):  # on a GPU 8 times as many
        monkeypatch.setattr(train, "LOGITS", logits)
        found.append(loss_and_gradients(gpt, x, y))
    assert widest[0] == 8 * T and 1 < max(widest[1:]) < 10
    assert all(off(found[1][name], value) < 1e-5 for name, value in found[0].items())


# ------------------------------------------------------------------------------------------------------------------ training

@pytest.mark.parametrize("words", [
    [], ["--ngram=3", "--ngram_rows=97"], ["--mixer=valued,gdn", "--micro_batch=3"], ["--optimizer=adamw", "--init=gpt2"], ["--optimizer=sgd"],
    ["--noise_scale", "--dropout=0.1", "--z_loss=0.001"], ["--n_expert=4", "--n_inner=32", "--balance_bias=0.001"],
], ids=str)
def test_losses_of_the_cpu(words, go):
    here, there = go("cpu", *words, device="cpu"), go("there", *words)
    assert here.losses[-1] < here.losses[0]
    assert there.losses == pytest.approx(here.losses, abs=1e-4)
    a, b = here.records[-1], there.records[-1]
    assert b["val_loss"] == pytest.approx(a["val_loss"], abs=1e-4) and b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-2)


def test_soap(go):
    """The eigenvectors of equal eigenvalues are any, so only the way down is the same."""
    here, there = (go(device, "--optimizer=soap", "--max_iters=40", device=device) for device in ("cpu", DEVICE))
    assert there.losses[-1] < there.losses[0] - 0.3
    assert there.records[-1]["val_loss"] == pytest.approx(here.records[-1]["val_loss"], abs=0.1)


@pytest.mark.parametrize("dtype", ["", "bfloat16", "float16"])
def test_half_precision_trains_alike(dtype, go, monkeypatch):
    words, seen = ["--max_iters=60", "--ngram=3", "--ngram_rows=97"], set()
    usual = train.orthogonalise
    monkeypatch.setattr(train, "orthogonalise", lambda g, dtype=None: seen.add(dtype) or usual(g, dtype))
    full, half = go("full", *words), go("half", *words, dtype=dtype)
    assert full.losses[-1] < full.losses[0] - 1
    assert np.abs(np.subtract(full.losses, half.losses)).mean() < 0.05
    assert half.losses != full.losses and seen == {None, torch.float16 if dtype == "float16" else torch.bfloat16}


@pytest.mark.parametrize("ffn", ["relu2", "swiglu"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_experts_in_half_precision(dtype, ffn, go):
    words = ["--n_expert=4", "--n_inner=32", f"--ffn={ffn}"]
    full, half = go("full", *words), go("half", *words, dtype=dtype)
    assert np.abs(np.subtract(full.losses, half.losses)).mean() < 0.05


def test_tables_get_sparse_gradients(go, monkeypatch):
    usual, seen = train.adagrad, []
    monkeypatch.setattr(train, "adagrad", lambda weight, *rest: seen.append(weight.grad.is_sparse) or usual(weight, *rest))
    go("out", "--ngram=3", "--ngram_rows=97", "--mixer=valued")
    assert len(seen) == 40 and all(seen)  # two orders and the values of two layers, ten steps


def test_compile(go):
    """Compiled, not given up; tables have dense gradients there."""
    words = ["--n_layer=1", "--ngram=2", "--ngram_rows=97", "--z_loss=0.001"]
    eager, compiled = go("eager", *words), go("compiled", *words, "--compile")
    assert "torch.compile does not work" not in compiled.out
    assert compiled.losses == pytest.approx(eager.losses, abs=1e-4)
    assert compiled.records[-1]["val_loss"] == pytest.approx(eager.records[-1]["val_loss"], abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_resume_repeats_the_losses(dtype, go):
    words = ["--ngram=3", "--ngram_rows=97", "--eval_interval=4"]
    whole = go("whole", *words, dtype=dtype)
    begun = go("cut", *words, dtype=dtype, cut=7)
    ended = go("cut", *words, "--resume", dtype=dtype)
    assert len(begun.losses) == 7 and begun.losses + ended.losses[3:] == pytest.approx(whole.losses, abs=1e-3)
    assert ended.losses == pytest.approx(whole.losses[4:], abs=1e-3)
    assert [record["step"] for record in ended.records] == [4, 8, 10]
    other = go("cut2", *words, "--seed=1", dtype=dtype)  # what the tolerance can tell apart
    assert np.abs(np.subtract(other.losses, whole.losses))[4:].mean() > 0.01


def test_a_checkpoint_opens_on_the_other_device(go, tmp_path):
    done = go("out", "--ngram=3", "--ngram_rows=97")
    path = tmp_path / "out" / "ckpt.pt"
    stored = model.load_checkpoint(path)
    tensors = [*stored["weights"].values(), *sum(stored["optimizer"].values(), [])]
    assert tensors and all(tensor.is_cpu for tensor in tensors)
    x = torch.randint(V, (3, T))
    here, there = sample.load(path, "cpu")[0], sample.load(path)[0]
    assert there.head.weight.device.type == DEVICE
    assert off(there(x.to(DEVICE)), here(x)) < 1e-5
    more = go("out", "--ngram=3", "--ngram_rows=97", "--resume", "--max_iters=14", device="cpu")  # the run goes on there
    assert len(more.losses) == 4 and max(more.losses) < max(done.losses)


@pytest.mark.parametrize("form", ["", "ddp", "zero1", "fsdp", "torch_ddp"])
def test_in_a_process_group(form, go, world_of_one):
    """A world of one process, over NCCL: every sum goes through it, that of the CPU's evaluation over gloo."""
    words = ["--ngram=3", "--ngram_rows=97"] * (not form.startswith("torch"))
    alone = go("alone", *words)
    world_of_one()
    one = go("one", *words, *[f"--parallel={form}"] * bool(form))
    assert one.losses == pytest.approx(alone.losses, abs=1e-4)
    assert one.records[-1]["val_loss"] == pytest.approx(alone.records[-1]["val_loss"], abs=1e-4)


def test_profile_sees_the_device(go):
    out = go("out", "--profile").out
    times = [float(line.split("GPU")[1].split()[0]) for line in out.splitlines() if " times, CPU" in line]
    assert len(times) > 5 and max(times) > 0


def test_memory_and_peak():
    free = train.free_memory(torch.device(DEVICE, 0))
    assert 2**28 < free <= torch.cuda.mem_get_info()[1]
    assert 1e12 < train.measured_peak(torch.device(DEVICE), torch.bfloat16) < 1e17


# ------------------------------------------------------------------------------------------------------------------ sampling

def prompts(n=6):
    draw = np.random.default_rng(0)
    return [draw.integers(V, size=size).tolist() for size in draw.integers(1, 12, size=n)]


def decoded(gpt, sampling, **how):
    """Tokens of requests of which three wait for a slot, and whose texts outgrow the block."""
    requests = [sample.Request(prompt, 10, sampling, seed) for seed, prompt in enumerate(prompts())]
    engine = sample.Engine(gpt, requests, slots=3, **how)
    while engine.step():
        pass
    return [request.output for request in requests], [request.logprobs for request in requests]


@pytest.mark.parametrize("changes", [
    {}, dict(mixer="gdn,attention"), dict(mixer="window", window=5), dict(mixer="latent", ngram=3, ngram_rows=97),
    dict(position="sinusoidal", n_kv_head=1), dict(position="learned", end_token=3),
], ids=str)
def test_the_engine_writes_the_tokens_of_the_cpu(changes):
    here = GPT(Config(**SHAPE, **changes)).eval()
    with torch.no_grad():
        for weight in here.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    there = copy.deepcopy(here).to(DEVICE)
    for sampling in (sample.Sampling(0), sample.Sampling(1.0, 20, 0.9, 0.01, 1.2, 0.1)):
        (tokens, logprobs), (found, theirs) = (decoded(gpt, sampling) for gpt in (here, there))
        assert found == tokens and all(len(row) == 10 for row in found)
        assert sum(theirs, []) == pytest.approx(sum(logprobs, []), abs=1e-3)
    assert decoded(there, sample.Sampling(0), draft=sample.look_up)[0] == decoded(here, sample.Sampling(0))[0]


@pytest.mark.parametrize("changes", [{}, dict(mixer="window", window=5), dict(mixer="latent", ngram=3, ngram_rows=97), dict(n_kv_head=1),
                                     dict(position="learned", end_token=3)], ids=str)
def test_recorded_steps(changes, monkeypatch, capsys):
    """CUDA graphs write what steps of Python write, in batches whose rows come and go, and none of these models has to do without."""
    gpt = GPT(Config(**SHAPE, **changes)).to(DEVICE).eval()
    with torch.no_grad():
        for weight in gpt.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    made = []
    record = sample.Recorded.record
    monkeypatch.setattr(sample.Recorded, "record", lambda self: made.append(1) or record(self))
    (tokens, logprobs), (found, theirs) = (decoded(gpt, sample.Sampling(0), graphs=graphs) for graphs in (False, True))
    assert found == tokens and sum(theirs, []) == pytest.approx(sum(logprobs, []), abs=1e-3)
    assert made and "going on without" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_whole_numbers(kind, monkeypatch):
    """Restored weights on the device against the weight that the codes mean."""
    monkeypatch.setattr(sample, "PACKED", {8: "none", 4: "none"})
    layer = model.Linear(64, 48)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(5, 64).bfloat16().float()
    there = sample.Quantised(copy.deepcopy(layer).to(DEVICE), int(kind[3:]))
    weight = there.restored(slice(None))
    assert off(there(x.to(DEVICE)), x @ weight.cpu().T) < 1e-5
    assert off(weight, layer.weight) < (0.01 if kind == "int8" else 0.2)
    gpt = GPT(Config(**SHAPE, init="gpt2")).to(DEVICE).eval()
    sample.quantise(gpt, kind)
    tokens, logprobs = decoded(gpt, sample.Sampling(0))
    assert all(len(row) == 10 for row in tokens) and all(map(math.isfinite, sum(logprobs, [])))


@pytest.mark.parametrize("drafted", [False, True])
def test_counts_and_drafts(drafted):
    """Counts of n-grams lie beside the network; a draft model is on its device, and no guess of it changes a token."""
    here = GPT(Config(**SHAPE, init="gpt2", counts=3)).eval()
    tokens = (np.arange(2000) * 7 + np.arange(2000) // 9) % V
    train.count_ngrams(here, [train.Source(tokens.astype(np.uint16), tokens)])
    there = copy.deepcopy(here).to(DEVICE)
    assert there.counts.at_work and {buffer.device.type for buffer in there.buffers()} == {DEVICE}
    how = dict(draft=sample.Draft(copy.deepcopy(there), V)) if drafted else {}
    (tokens, logprobs), (found, theirs) = decoded(here, sample.Sampling(0)), decoded(there, sample.Sampling(0), **how)
    assert found == tokens and sum(theirs, []) == pytest.approx(sum(logprobs, []), abs=1e-3)
    x, y = torch.randint(V, (3, T)), torch.randint(V, (3, T))
    (right, _), (loss, count) = train.Objective(here).eval()(x, y), train.Objective(there).eval()(x.to(DEVICE), y.to(DEVICE))
    assert off(loss, right) < 1e-5 and count == y.numel()


# --------------------------------------------------------------------------------------------------- alignment, scaling laws

@pytest.fixture
def base(tmp_path):
    """A checkpoint with a tokenizer, sums with good and bad answers, and a verifier."""
    letters = "".join(map(chr, range(32, 127)))
    tokenizer = bpe.train("char", [letters], 97, special_tokens=("<|endoftext|>",), workers=1)
    gpt = GPT(Config(**SHAPE | dict(vocab_size=tokenizer.vocab_size, block_size=32), init="gpt2"))
    model.save_checkpoint(tmp_path / "base.pt", gpt, tokenizer=tokenizer.to_dict())
    rows = [dict(prompt=f"{i}+{i}", response=f"{2 * i}", chosen=f"{2 * i}", rejected=f"no {i}") for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "verifier.py").write_text("def spread(text, **row):\n    return len(set(text)) / 8\n")
    return tmp_path


@pytest.mark.parametrize("words", [
    "sft", "sft --lora=2", "sft --optimizer=soap", "dpo", "simpo", "reward", "grpo --kl=0.1", "ppo --lora=2", "grpo --staleness=1 --is_cap=2",
])
def test_alignment_as_on_the_cpu(words, base, capsys):
    """What is logged of four steps, in one run and in two."""
    name, *more = words.split()
    verifier = [f"--verifier={base / 'verifier.py'}:spread"] * (name in ("grpo", "ppo"))
    last = {}

    def run(folder, device, *further):
        last[folder] = align.align([
            f"--algorithm={name}", f"--ckpt={base / 'base.pt'}", f"--data={base / 'rows.jsonl'}", f"--output={base / folder}",
            f"--device={device}", "--batch_size=4", "--group=2", "--max_new_tokens=6", "--max_iters=4", "--eval_interval=2",
            "--template=bare", "--schedule=constant", *verifier, *more, *further])[1]
    run("here", "cpu")
    run("there", DEVICE)
    run("cut", DEVICE, "--max_iters=2")
    run("cut", DEVICE, "--resume", "--max_iters=4")
    kept = {key: value for key, value in last["here"].items() if key not in ("seconds", "idle")}
    assert kept["step"] == 4 and kept["grad_norm"] > 0
    for folder in ("there", "cut"):
        assert {key: last[folder][key] for key in kept} == pytest.approx(kept, rel=0.02, abs=2e-3)
    assert sample.load(base / "there" / "ckpt.pt", "cpu")[1]


def test_a_reward_model_grades(base, capsys):
    words = [f"--data={base / 'rows.jsonl'}", f"--ckpt={base / 'base.pt'}", f"--device={DEVICE}", "--batch_size=4", "--group=2"]
    words += ["--max_new_tokens=6", "--max_iters=1", "--template=bare"]
    align.align(["--algorithm=reward", f"--output={base / 'judge'}", *words])
    _, record = align.align(["--algorithm=rloo", f"--output={base / 'out'}", f"--verifier={base / 'judge' / 'ckpt.pt'}", *words])
    assert math.isfinite(record["reward"]) and record["reward"] != 0


def test_a_study_starts_runs_on_the_device(folder, tmp_path):
    options = dict(data=str(folder), device=DEVICE) | dict(word[2:].split("=") for word in WORDS)
    study = SimpleNamespace(o=scaling.Options(), workers=2)
    assert scaling.Ledger.launch(study, options, tmp_path / "run") == ""
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert record["step"] == 10 and record["val_loss"] < math.log(V)
