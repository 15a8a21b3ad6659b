"""align.py against five-line versions in numpy, finite differences and closed forms; runs are tiny."""
import contextlib
import hashlib
import io
import json
import math
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import align
import bpe
import data
import sample
from align import Options, options
from model import GPT, Config, load_checkpoint, save_checkpoint

END = "<|endoftext|>"
LETTERS = "".join(map(chr, range(32, 127))) + "\n"


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.train("char", [LETTERS], 110, special_tokens=(END, "<|im_start|>", "<|im_end|>"), workers=1)


def tiny(tokenizer, seed=0, **how):
    torch.manual_seed(seed)
    shape = dict(block_size=64, n_layer=2, n_head=2, n_embd=16, init="gpt2", norm_eps=1e-6)
    return GPT(Config(vocab_size=tokenizer.vocab_size, **shape | how)).eval()


def some_samples(tokenizer, seed=0, n=10, length=(3, 20)):
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        size = int(rng.integers(*length))
        mask = (rng.random(size) < 0.6).astype(int).tolist()
        mask[-1] = 1
        out.append(dict(ids=rng.integers(0, 90, size).tolist(), mask=mask))
    return out


def options_of(words=""):
    name = words.split()[0] if words and not words.startswith("--") else ""
    rest = words.split()[1:] if name else words.split()
    return options(Options, align.ALGORITHMS.get(name, "").split() + rest)


# ---------------------------------------------------------------------------------------------------------------- the data

def masked_text(tokenizer, row, template):
    s = align.tokenised(tokenizer, align.conversation(row), options_of(f"--template={template}"))
    pieces, before = [], 0
    for token, own in zip(s["ids"], s["mask"]):
        if own and not before:
            pieces.append("")
        if own:
            pieces[-1] += tokenizer.decode([token])
        before = own
    return tokenizer.decode(s["ids"]), pieces, tokenizer.decode(s["prompt"])


@pytest.mark.parametrize("template, end", [("plain", END), ("bare", END), ("chatml", "<|im_end|>")])
def test_the_mask_lies_on_the_assistants_words(tokenizer, template, end):
    messages = [dict(role="user", content="hi"), dict(role="assistant", content="ho!"), dict(role="tool", content="42"),
                dict(role="user", content=f"{END} x"), dict(role="assistant", content="yes")]
    text, pieces, prompt = masked_text(tokenizer, dict(messages=messages), template)
    assert pieces == ["ho!" + end, "yes" + end]
    assert text.startswith(prompt) and text[len(prompt):].startswith("yes")
    ids = align.tokenised(tokenizer, messages, options_of(f"--template={template}"))["ids"]
    assert ids.count(tokenizer.special_tokens[END]) == dict(plain=5, bare=6, chatml=0)[template]  # a user's <|endoftext|> is text


def test_forms_of_demonstrations():
    want = [dict(role="user", content="q"), dict(role="assistant", content="r")]
    assert align.demonstration(dict(prompt="q", response="r")) == [want]
    assert align.demonstration(dict(messages=want)) == [want]
    assert align.demonstration(dict(history=["q"], response="r")) == [want]
    assert align.demonstration(dict(prompt="q", response=" ")) == []
    assert align.asked(dict(prompt="q", response="r")) == [[want[0], dict(role="assistant", content="")]]
    assert align.asked(dict(messages=want[:1])) == [[want[0], dict(role="assistant", content="")]]
    assert align.asked(dict(messages=want)) == align.asked(dict(messages=want[:1]))
    system = dict(role="system", content="s")
    assert align.demonstration(dict(history=[system, "q"], response="r")) == [[system, *want]]


def test_forms_of_preferences():
    first = dict(history=["q", "a", "q2"], response_a="x", response_b="y")
    better, worse = align.preference(first | dict(chosen="b"))
    assert [m["content"] for m in better] == ["q", "a", "q2", "y"] and worse[-1]["content"] == "x"
    assert [m["role"] for m in better] == ["user", "assistant", "user", "assistant"]
    assert align.preference(first | dict(chosen="tie")) == []
    assert align.preference(first | dict(response_b="x", chosen="a")) == []
    assert [t[-1]["content"] for t in align.preference(dict(prompt="q", chosen="u", rejected="v"))] == ["u", "v"]
    with pytest.raises(ValueError, match="a, b or tie"):
        align.preference(first | dict(chosen="c"))


def test_a_preference_is_of_the_last_turns(tokenizer, tmp_path):
    """Earlier turns of the assistant are no part of the means of SimPO and IPO; a pair whose responses are cut off is none."""
    row = dict(history=["hi", "ho there", "now"], chosen="a", response_a="yes", response_b="no")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row | dict(response_b=b)) + "\n" for b in ("no", "never")))
    o = options_of(f"simpo --template=bare --data={tmp_path / 'pairs.jsonl'}")
    for better, worse in align.read_items(o, tokenizer, 64):
        learned = [tokenizer.decode([i for i, own in zip(s["ids"], s["mask"]) if own]) for s in (better, worse)]
        assert learned == ["yes" + END, worse["row"]["response_b"] + END]
    with pytest.raises(ValueError, match="no row that can be used"):
        align.read_items(o, tokenizer, len(better["prompt"]))
    o.algorithm, o.loss = "sft", "nll"
    (tmp_path / "pairs.jsonl").write_text(json.dumps(dict(history=row["history"], response="yes")))
    [[s]] = align.read_items(o, tokenizer, 64)
    assert sum(s["mask"]) == len("ho there" + "yes") + 2  # of a demonstration all turns are learned


def test_packing_is_best_fit():
    assert align.pack([2, 5, 3, 1]) == [8, 0, 5, 10]
    lengths = np.random.default_rng(0).integers(1, 50, 200).tolist()
    starts, T = align.pack(lengths), max(lengths)
    places = [place for start, n in zip(starts, lengths) for place in range(start, start + n)]
    assert len(set(places)) == sum(lengths)  # no two texts share a place, and none goes on in the next row
    assert all(start // T == (start + n - 1) // T for start, n in zip(starts, lengths))
    assert max(places) // T + 1 <= 1.1 * sum(lengths) / T + 1


@pytest.mark.parametrize("how", [{}, dict(position="learned"), dict(mixer="gdn"), dict(ngram=2, ngram_rows=64),
                                 dict(mixer="window", window=4), dict(mixer="latent"), dict(mixer="gdn,attention")])
def test_packed_texts_do_not_see_each_other(tokenizer, how):
    """Log-probabilities of packed texts are those of each text alone."""
    gpt = tiny(tokenizer, **how).double()
    policy = align.Policy(gpt, tokenizer.vocab_size).double()
    for samples in (some_samples(tokenizer), some_samples(tokenizer, 1, 2, (3, 4)) + some_samples(tokenizer, 1, 1, (12, 13))):
        out = policy(samples)
        assert not align.collate(samples).single
        for s, logp in zip(samples, out.logp.split(out.counts)):
            logits = gpt(torch.tensor([s["ids"]]))[0].log_softmax(-1)
            want = [logits[i - 1, s["ids"][i]].item() for i in range(1, len(s["ids"])) if s["mask"][i]]
            assert torch.allclose(logp, torch.tensor(want, dtype=torch.float64), atol=1e-6)  # .float() in between
    assert "look" not in vars(gpt)


def test_without_the_document_mask_packed_texts_would_differ(tokenizer):
    gpt = tiny(tokenizer)
    samples = some_samples(tokenizer)
    c = align.collate(samples)
    packed = gpt(c.tokens).log_softmax(-1).flatten(0, 1)[c.at].gather(1, c.tokens.flatten()[c.at + 1][:, None])[:, 0]
    assert (packed - align.Policy(gpt, tokenizer.vocab_size)(samples).logp).abs().max() > 1e-3


# -------------------------------------------------------------------------------------------------------------- the losses

def outputs(seed=0, counts=(3, 5, 2, 4)):
    generator = torch.Generator().manual_seed(seed)
    n = sum(counts)
    r = lambda: torch.randn(n, generator=generator, dtype=torch.float64)
    of = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    out = SimpleNamespace(logp=-r().abs() - 0.1, entropy=r().abs(), value=r(), of=of, n=len(counts), counts=list(counts))
    b = SimpleNamespace(ref=-r().abs() - 0.1, old=out.logp + 0.4 * r(), advantage=r(), weight=r().abs(), cap=r().abs(),
                        value=r(), goal=r(), share=torch.ones(len(counts), dtype=torch.float64))
    return out, b


def per_text(x, counts):
    return np.split(np.asarray(x.detach()), np.cumsum(counts)[:-1])


@pytest.mark.parametrize("words", ["dpo", "dpo --label_smoothing=0.2 --beta=0.3", "ipo", "simpo", "reward"])
def test_preference_losses(words):
    o, (out, b) = options_of(words), outputs()
    loss, log = align.preference_loss(out, b, o)
    logp, ref, value = (per_text(x, out.counts) for x in (out.logp, b.ref, out.value))
    want, right, sure = 0.0, 0, 0.0
    for i in (0, 2):
        total = [(logp[j] - ref[j]).sum() for j in (i, i + 1)]
        mean = [(logp[j] - ref[j]).mean() for j in (i, i + 1)]
        plain = [logp[j].mean() for j in (i, i + 1)]
        log_sigmoid = lambda x: -np.log1p(np.exp(-x))
        m = {"dpo": total, "ipo": mean, "simpo": plain, "reward": [value[i][-1], value[i + 1][-1]]}[o.loss]
        m = m[0] - m[1]
        right += m > 0
        sure += 1 / (1 + np.exp(-abs(m) * (1 if o.loss == "reward" else o.beta)))
        want += {"dpo": -(1 - o.label_smoothing) * log_sigmoid(o.beta * m) - o.label_smoothing * log_sigmoid(-o.beta * m),
                 "ipo": (m - 1 / (2 * o.beta)) ** 2, "simpo": -log_sigmoid(o.beta * m - o.margin),
                 "reward": -log_sigmoid(m)}[o.loss]
    assert loss.item() == pytest.approx(want, abs=1e-12) and log["accuracy"] == right and log["count"] == 2
    assert log["overconfidence"].item() == pytest.approx(sure - right, abs=1e-12)


@pytest.mark.parametrize("words", ["reinforce", "rloo", "grpo", "dapo", "cispo --clip_high=0.1", "gspo --clip_low=0.1 --clip_high=0.1",
                                   "ppo", "grpo --kl=0.3", "grpo --kl=0.3 --kl_kind=k2", "grpo --entropy=0.1"])
def test_policy_losses(words):
    o, (out, b) = options_of(words), outputs()
    loss, _ = align.policy_loss(out, b, o)
    logp, old, ref, A, w, cap, v, v0, goal, H = (per_text(x, out.counts) for x in (
        out.logp, b.old, b.ref, b.advantage, b.weight, b.cap, out.value, b.value, b.goal, out.entropy))
    want = 0.0
    for i, n in enumerate(out.counts):
        whole = np.exp((logp[i] - old[i]).mean())  # GSPO's ratio
        for t in range(n):
            r = whole if o.ratio == "sequence" else np.exp(logp[i][t] - old[i][t])
            low, high = 1 - o.clip_low, 1 + o.clip_high
            term = {"plain": -logp[i][t] * A[i][t], "cispo": -min(r, high) * A[i][t] * logp[i][t],
                    "clip": -min(r * A[i][t], min(max(r, low), high) * A[i][t])}[o.loss] * cap[i][t]
            d = ref[i][t] - logp[i][t]
            if o.kl and not o.kl_reward:
                term += o.kl * {"k3": np.exp(d) - 1 - d, "k2": d * d / 2}[o.kl_kind]
            if o.critic:
                near = v0[i][t] + min(max(v[i][t] - v0[i][t], -o.clip_high), o.clip_high)
                term += o.value_weight * 0.5 * max((v[i][t] - goal[i][t]) ** 2, (near - goal[i][t]) ** 2)
            want += w[i][t] * (term - o.entropy * H[i][t])
    assert loss.item() == pytest.approx(want, abs=1e-10)


@pytest.mark.parametrize("words", ["sft", "dpo", "ipo", "simpo", "reinforce", "grpo", "gspo --clip_low=9 --clip_high=9",
                                   "ppo", "grpo --kl=0.3", *(f"dpo --loss={loss}" for loss in align.PREFERENCES)])
def test_gradients_are_finite_differences(words):
    o, (out, b) = options_of(words), outputs()
    for name in ("logp", "value"):
        x = getattr(out, name)
        x.requires_grad_()
        loss = align.objective(o)(out, b, o)[0]
        grad, = torch.autograd.grad(loss, x, allow_unused=True) if loss.requires_grad else (None,)
        grad = torch.zeros_like(x) if grad is None else grad
        x.requires_grad_(False)
        for i in range(len(x)):
            ends = []
            for step in (1e-6, -1e-6):
                moved = x.clone()
                moved[i] += step
                ends.append(align.objective(o)(SimpleNamespace(**vars(out) | {name: moved}), b, o)[0].item())
            assert grad[i].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-6)

@pytest.mark.slow  # TRL takes long to import
@pytest.mark.parametrize("words, kind, level", [
    ("grpo", "grpo", "token"), ("grpo --kl=0.2", "grpo", "token"), ("dr_grpo --max_new_tokens=9", "dr_grpo", "token"),
    ("dapo", "dapo", "token"), ("gspo --clip_low=0.1 --clip_high=0.2", "grpo", "sequence"), ("cispo --clip_high=0.1", "cispo", "token")])
def test_policy_losses_and_gradients_are_trls(words, kind, level):
    trl = pytest.importorskip("trl.trainer.grpo_trainer")
    o, (out, b) = options_of(words), outputs()
    n, T = out.n, max(out.counts)
    mask = torch.arange(T) < torch.tensor(out.counts)[:, None]

    def table(x):
        rows = torch.zeros(n, T, dtype=torch.float64)
        return rows.masked_scatter(mask, x)
    b.advantage = torch.randn(n, dtype=torch.float64)[out.of]  # one a text, as TRL has it
    b.cap = torch.ones_like(b.cap)
    b.weight = torch.cat([torch.full((k,), align.MEANS[o.mean](k, n, sum(out.counts), o)) for k in out.counts])
    ours, theirs = out.logp.clone().requires_grad_(), out.logp.clone().requires_grad_()
    out.logp = ours
    loss = align.policy_loss(out, b, o)[0]
    stub = mock.MagicMock()
    stub._get_per_token_logps_and_entropies.side_effect = lambda *_, **__: (table(theirs), table(out.entropy), None)
    stub.aux_loss_enabled, stub.top_entropy_quantile, stub.off_policy_mask_threshold = False, 1.0, None
    stub.importance_sampling_level, stub.loss_type, stub.beta = level, kind, o.kl
    stub.epsilon_low, stub.epsilon_high = o.clip_low, o.clip_high + (kind == "cispo")
    stub.use_vllm, stub._entropy_bonus_enabled, stub.max_completion_length = False, False, o.max_new_tokens
    stub.current_gradient_accumulation_steps, stub.accelerator.num_processes = 1, 1
    stub.accelerator.gather = lambda x: x
    stub.args.delta, stub.args.use_bias_correction_kl, stub.args.steps_per_generation = None, False, 1
    ids, ones = torch.zeros(n, 1, dtype=torch.long), torch.ones(n, 1)
    advantage = torch.stack([x[0] for x in b.advantage.split(out.counts)])
    inputs = dict(prompt_ids=ids, prompt_mask=ones, completion_ids=torch.zeros(n, T, dtype=torch.long), completion_mask=mask.double(),
                  advantages=advantage, old_per_token_logps=table(b.old), ref_per_token_logps=table(b.ref),
                  num_items_in_batch=torch.tensor(float(sum(out.counts))))
    want = trl.GRPOTrainer._compute_loss(stub, None, inputs)
    assert loss.item() == pytest.approx(want.item(), abs=1e-6)  # weights are single precision
    grads = torch.autograd.grad(loss, ours)[0], torch.autograd.grad(want, theirs)[0]
    assert torch.allclose(*grads, atol=1e-6)


@pytest.mark.slow  # TRL takes long to import
@pytest.mark.parametrize("words, kind", [("dpo", "sigmoid"), ("dpo --beta=0.7", "sigmoid"), ("ipo", "ipo"), ("ipo --beta=0.3", "ipo")])
def test_preference_losses_and_gradients_are_trls(words, kind):
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    o, (out, b) = options_of(words), outputs()
    n, T = out.n, max(out.counts)
    mask = torch.arange(T) < torch.tensor(out.counts)[:, None]
    order = [*range(0, n, 2), *range(1, n, 2)]  # TRL has all that is better first

    def table(x):
        rows = torch.zeros(n, T, dtype=torch.float64)
        return rows.masked_scatter(mask, x)[order]
    b.share = torch.full((n,), 2 / n, dtype=torch.float64)  # the mean over pairs
    ours, theirs = out.logp.clone().requires_grad_(), out.logp.clone().requires_grad_()
    out.logp = ours
    loss = align.preference_loss(out, b, o)[0]
    stub, more = mock.MagicMock(), dict(entropy=table(out.entropy), mean_logits=table(out.value), is_top1=mask[order])
    stub.model.training, stub.accelerator.device = False, "cpu"
    stub.aux_loss_enabled, stub.ld_alpha, stub.precompute_ref_logps, stub.use_weighting = False, None, False, False
    stub.f_divergence_type, stub.loss_types, stub.loss_weights, stub.beta = "reverse_kl", [kind], [1.0], o.beta
    stub.accelerator.gather = stub.accelerator.gather_for_metrics = lambda x: x
    stub.ref_model.side_effect = lambda **_: SimpleNamespace(log_probs=table(b.ref))
    stub.args.gradient_checkpointing, stub.args.gradient_checkpointing_kwargs = False, None
    completion = torch.nn.functional.pad(mask[order].long(), (1, 0))
    with mock.patch.object(trl, "disable_gradient_checkpointing", lambda *_: contextlib.nullcontext()), \
            mock.patch.object(trl, "is_peft_model", lambda model: False):
        want = trl.DPOTrainer._compute_loss(stub, lambda **_: SimpleNamespace(log_probs=table(theirs), **more), dict(
            input_ids=torch.zeros(n, T + 1, dtype=torch.long), attention_mask=torch.ones(n, T + 1), completion_mask=completion), False)
    assert loss.item() == pytest.approx(want.item(), abs=1e-9)
    grads = torch.autograd.grad(loss, ours)[0], torch.autograd.grad(want, theirs)[0]
    assert torch.allclose(*grads, atol=1e-9)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    out, b = outputs()
    b.old, b.advantage, b.weight, b.cap = out.logp - 3, torch.ones_like(out.logp), torch.ones_like(out.logp), torch.ones_like(out.logp)
    out.logp.requires_grad_()
    for words, factor in (("cispo --clip_high=0.5", -1.5), ("grpo", 0.0)):
        grad, = torch.autograd.grad(align.policy_loss(out, b, options_of(words))[0], out.logp)
        assert torch.allclose(grad, torch.full_like(grad, factor))


def test_kl_estimators_have_the_mean_of_the_closed_form():
    """p and q over three tokens: k1 and k3 are unbiased, k2 is near where p and q are; k3 is never negative."""
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.45, 0.33, 0.22], dtype=torch.float64)
    d = (p / q).log()
    exact = (p * d).sum()
    mean = {name: (p * f(d)).sum() for name, f in align.KL.items()}
    assert torch.allclose(mean["k1"], exact, atol=1e-12) and torch.allclose(mean["k3"], exact, atol=1e-12)
    assert abs(mean["k2"] / exact - 1) < 0.05
    assert (align.KL["k3"](d) >= 0).all() and (align.KL["k1"](d) < 0).any()
    variance = {name: (p * (f(d) - mean[name]) ** 2).sum() for name, f in align.KL.items()}
    assert variance["k3"] < variance["k1"]


def test_weights_of_tokens():
    o = options_of("--max_new_tokens=10")
    counts = [2, 4]
    weights = {name: [f(n, 2, 6, o) for n in counts] for name, f in align.MEANS.items()}
    assert weights["token"] == [1 / 6, 1 / 6] and weights["sequence"] == [1 / 4, 1 / 8] and weights["constant"] == [1 / 20] * 2
    for name in ("token", "sequence"):
        assert sum(n * w for n, w in zip(counts, weights[name])) == pytest.approx(1)


# ---------------------------------------------------------------------------------------------------------- the advantages

def test_advantages_of_groups():
    r = np.array([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 2, 3, 6]])
    got = {name: f(torch.tensor(r)).numpy() for name, f in align.ADVANTAGES.items()}
    G = 4
    want = {
        "none": r, "right": (r > 0.5) * 1.0, "mean": r - r.mean(), "centred": r - r.mean(1, keepdims=True),
        "group": (r - r.mean(1, keepdims=True)) / (r.std(1, ddof=1, keepdims=True) + 1e-4),
        "leave_one_out": np.array([[x - (row.sum() - x) / (G - 1) for x in row] for row in r]),
    }
    assert got.keys() == want.keys()
    for name in want:
        assert np.allclose(got[name], want[name]), name


def test_gae_by_closed_forms():
    rng = np.random.default_rng(0)
    r, v = rng.normal(size=7), rng.normal(size=7)
    for gamma, lam in [(1.0, 1.0), (0.9, 0.95), (0.99, 0.0), (1.0, 0.5)]:
        delta = r + gamma * np.append(v[1:], 0) - v
        want = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, 7)) for t in range(7)]
        assert np.allclose(align.gae(r.tolist(), v.tolist(), gamma, lam), want)
    togo = [sum(0.9 ** (k - t) * r[k] for k in range(t, 7)) - v[t] for t in range(7)]  # lam = 1: return minus value
    assert np.allclose(align.gae(r.tolist(), v.tolist(), 0.9, 1.0), togo)


def test_advantages_reach_every_token_and_kl_is_taken_off():
    o = options_of("rloo --group=2 --kl=0.5 --kl_reward --kl_kind=k1")
    samples = [dict(reward=1.0, old=torch.tensor([-1.0, -2]), ref=torch.tensor([-1.0, -4])),
               dict(reward=0.0, old=torch.tensor([-1.0]), ref=torch.tensor([-1.0]))]
    align.advantages(samples, o)
    assert samples[0]["advantage"].tolist() == [0.0, 0.0]  # 1 - 0.5 (-2 + 4)
    assert samples[1]["advantage"].tolist() == [-1.0]
    o = options_of("ppo --group=2 --kl=0")
    for s in samples:
        s["value"] = torch.zeros_like(s["old"])
    align.advantages(samples, o)
    every = torch.cat([s["advantage"] for s in samples])
    assert abs(every.mean()) < 1e-6 and every.std() == pytest.approx(1, abs=1e-3)
    alone = [dict(reward=1.0, old=torch.tensor([-1.0]), ref=torch.tensor([-1.0]), value=torch.zeros(1))]
    align.advantages(alone, options_of("ppo --group=1 --kl=0"))
    assert alone[0]["advantage"].tolist() == [0.0]  # no nan


# ------------------------------------------------------------------------------------------------------------- the trainer

def trainer_of(tokenizer, words, **how):
    return align.Trainer(options_of(words), tiny(tokenizer, **how), tokenizer, {})


def prepared(tokenizer, words):
    """A trainer in float64, and groups of samples that have all that its loss needs."""
    torch.set_default_dtype(torch.float64)
    try:
        trainer = trainer_of(tokenizer, words + " --template=bare --verifier=exact --optimizer=adamw")
    finally:
        torch.set_default_dtype(torch.float32)
    samples = some_samples(tokenizer, 3, 8, (5, 20))
    generator = torch.Generator().manual_seed(1)
    for s in samples:
        n = sum(s["mask"][1:])
        for key in ("old", "ref", "advantage", "value", "goal"):
            s[key] = -torch.rand(n, generator=generator, dtype=torch.float64)
        s["cap"] = torch.ones(n, dtype=torch.float64)
    align.annotate(trainer.policy, samples, 8, old="logp")
    size = 2 if trainer.objective is align.preference_loss else 1
    return trainer, [samples[i:i + size] for i in range(0, 8, size)]


@pytest.mark.parametrize("words", ["sft", "dpo", "grpo", "dr_grpo", "dapo", "gspo", "ppo", "reward"])
def test_micro_batches_add_up_to_the_batch(tokenizer, words):
    results = []
    for micro in (0, 1, 3):
        trainer, groups = prepared(tokenizer, f"{words} --micro_batch={micro}")
        trainer.update(groups)
        results.append(torch.cat([w.detach().flatten() for w in trainer.weights.values()]))
    assert torch.allclose(results[0], results[1], atol=2e-6) and torch.allclose(results[0], results[2], atol=2e-6)
    before = torch.cat([w.detach().flatten() for w in prepared(tokenizer, words)[0].weights.values()])
    assert (results[0] - before).abs().max() > 1e-5


def test_what_is_added_to_a_model_is_on_its_device(tokenizer):
    """A device that is there everywhere, meta, stands for a GPU, which its head, adapters and optimizer share."""
    o = options_of("sft --lora=2 --template=bare")
    names = [name for name, _ in align.Policy(tiny(tokenizer), tokenizer.vocab_size, 2).named_parameters() if "weight.0" in name]
    checkpoint = dict(train=vars(o), trained={}, optimizer={name: [torch.zeros(2)] for name in names})
    trainer = align.Trainer(o, tiny(tokenizer).to("meta"), tokenizer, checkpoint)
    tensors = [*trainer.policy.parameters(), *sum(trainer.state.values(), [])]
    assert len(names) == 16 and len(tensors) > 32 and {x.device.type for x in tensors} == {"meta"}


def test_what_a_model_on_a_gpu_says_joins_what_its_engine_said():
    with FakeTensorMode():  # tensors of any device, of which no number is known
        samples = [dict(old=torch.zeros(2)), dict(old=torch.zeros(1))]
        out = SimpleNamespace(counts=[2, 1], logp=torch.zeros(3, device="cuda"))
        align.annotate(lambda some: out, samples, 2, ref="logp")
        assert [(s["old"] - s["ref"]).device.type for s in samples] == ["cpu"] * 2


def test_lora_trains_little_and_merges_exactly(tokenizer):
    trainer, groups = prepared(tokenizer, "sft --lora=1 --learning_rate=0.01")
    whole = sum(w.numel() for w in tiny(tokenizer).parameters())
    before = {name: w.clone() for name, w in trainer.policy.gpt.named_parameters() if name.endswith("original")}
    for _ in range(3):
        trainer.update(groups)
        trainer.progress.step += 1
    gpt, ids = trainer.policy.gpt, torch.tensor([groups[0][0]["ids"]])
    merged = trainer.policy.merged()
    assert merged.state_dict().keys() == tiny(tokenizer).state_dict().keys()
    assert torch.allclose(merged(ids), gpt(ids), atol=1e-6)
    assert (merged(ids) - tiny(tokenizer).double()(ids)).abs().max() > 1e-3
    for name, w in before.items():
        assert torch.equal(w, dict(gpt.named_parameters())[name])
    assert all("parametrizations" in name for name in trainer.weights)
    assert sum(w.numel() for w in trainer.weights.values()) < whole / 5  # of a model this small


def test_lora_keeps_the_bias_of_routers(tokenizer):
    gpt, ids = tiny(tokenizer, n_expert=4, n_expert_active=1), torch.arange(20)[None]
    for name, bias in gpt.named_buffers():
        if name.endswith("ffn.bias"):
            bias.copy_(torch.tensor([9.0, 0, 0, 9]))  # other experts than without it
    before = gpt(ids)
    merged = align.Policy(gpt, tokenizer.vocab_size, 2).merged()
    assert torch.allclose(merged(ids), before, atol=1e-6)
    assert any(name.endswith("ffn.bias") and bias.any() for name, bias in merged.named_buffers())


def test_lora_of_rank_16_is_under_5_percent():
    """Gradients and optimizer state of a model 1,024 wide, counted without making it."""
    with torch.device("meta"):
        gpt = GPT(Config(vocab_size=32000, n_layer=2, n_head=16, n_embd=1024, block_size=64))
        whole = sum(w.numel() for w in gpt.parameters())
        policy = align.Policy(gpt, 32000, 16)
        policy.head.requires_grad_(False)
        assert sum(w.numel() for w in policy.parameters() if w.requires_grad) < 0.05 * whole


class Bandit:
    """A model of one answer: the reward is 1 for the letter b, less for others; every algorithm must find it."""

    rows = [[dict(prompt=[], row=dict(prompt=p))] for p in "xy"]

    @staticmethod
    def score(samples, rows):
        rewards = [{"b": 1.0, "a": 0.5}.get(s["text"][:1], 0.0) for s in samples]
        return rewards, rewards


@pytest.mark.parametrize("name", ["reinforce", "rloo", "ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "expert"])
def test_every_policy_gradient_finds_the_best_arm(tokenizer, name):
    small = bpe.train("char", ["abc"], 5, workers=1)
    words = f"{name} --verifier=exact --template=bare --max_new_tokens=1 --batch_size=32 --learning_rate=0.02 --schedule=wsd --decay_share=0"
    words += " --max_iters=20 --overlong=0" + (" --clip_low=0.2 --clip_high=0.3" if name == "gspo" else "")
    trainer = align.Trainer(options_of(words), tiny(small, block_size=8), small, {})
    trainer.score = Bandit.score
    items = [[dict(prompt=[small.special_tokens[END]], row=dict(prompt="x"))]]
    logits = lambda: trainer.policy.gpt(torch.tensor([[small.special_tokens[END]]]))[0, -1].softmax(-1)
    b = small.encode("b")[0]
    assert logits()[b] < 0.5
    for _ in range(20):
        trainer.step(items)
    assert logits()[b] > 0.85, logits()


def test_rollouts_are_reproducible_and_their_logprobs_are_the_models(tokenizer):
    gpt, o = tiny(tokenizer), options_of("--template=bare --max_new_tokens=12")
    prompts = [tokenizer.encode(text) for text in ("ab", "ab", "xyz", "q")]
    one = align.respond(gpt, tokenizer, prompts, o, "7")
    two = align.respond(gpt, tokenizer, prompts, o, "7")
    assert [s["ids"] for s in one] == [s["ids"] for s in two] != [s["ids"] for s in align.respond(gpt, tokenizer, prompts, o, "8")]
    assert one[0]["ids"] != one[1]["ids"]
    out = align.Policy(gpt, tokenizer.vocab_size)(one)
    assert torch.allclose(out.logp, torch.cat([s["old"] for s in one]), atol=1e-5)
    assert [s["ids"][:len(p)] for s, p in zip(one, prompts)] == prompts
    assert all(sum(s["mask"]) == len(s["old"]) == len(s["ids"]) - len(p) for s, p in zip(one, prompts))


class Script(torch.nn.Module):
    """A stand-in for a model that writes a given text, token by token, whatever it has read."""

    def __init__(self, tokenizer, text, n_prompt, filled):
        super().__init__()
        self.ids = tokenizer.encode(text) + [tokenizer.special_tokens[END]]
        self.config = SimpleNamespace(block_size=64, vocab_size=tokenizer.vocab_size)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.n_prompt, self.filled, self.V = n_prompt, filled, tokenizer.vocab_size
        self.logits = torch.nn.Identity()

    def new_state(self, batch, capacity=-1):
        return sample.State([[]], [0] * batch, [0] * batch, [capacity] * batch)

    def hidden(self, tokens, state):
        at = [n + tokens.shape[1] for n in state.lengths]
        state.lengths = at
        logits = torch.full((len(tokens), tokens.shape[1], self.V), -50.0)
        for row, n in enumerate(at):
            done = n - self.n_prompt
            logits[row, -1, self.ids[done] if 0 <= done < len(self.ids) else 0] = 50.0
        return logits


def test_a_tool_fills_in_and_its_words_are_not_learned(tokenizer):
    text = "a=1 <<12*3=36>> so 36"
    o = options_of("--template=bare --max_new_tokens=40 --tool=calculator")
    prompt = tokenizer.encode("go")
    [s] = align.respond(Script(tokenizer, text, 2, 0), tokenizer, [prompt], o, "0")
    assert s["text"] == text and s["done"] == "end"
    learned = tokenizer.decode([i for i, own in zip(s["ids"], s["mask"]) if own])
    assert learned == "a=1 <<12*3= so 36" + END and len(s["old"]) == sum(s["mask"])
    o.max_new_tokens = 14  # one more than the call: what fills it in is cut, as the text may end at the model's block
    [s] = align.respond(Script(tokenizer, text, 2, 0), tokenizer, [prompt], o, "0")
    assert s["text"] == text[:14] and s["done"] == "length" and len(s["ids"]) == 16
    o.tool, o.max_new_tokens = "", 40
    [s] = align.respond(Script(tokenizer, text, 2, 0), tokenizer, [prompt], o, "0")
    assert sum(s["mask"]) == len(text) + 1


@pytest.mark.parametrize("text, value", [("1+2*3", "7"), ("(1+2)*3", "9"), ("7/2", "3.5"), ("1/0", "?"), ("2**99", "?"),
                                         ("__import__('os')", "?"), ("1 if 1 else 2", "?"), ("(" * 99, "?"), ("", "?"), ("a", "?")])
def test_calculator(text, value):
    assert align.calculator(text) == value


def test_a_calculator_does_not_round():
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b, c = (int(x) for x in rng.integers(1, 10**18, 3))
        assert align.calculator(f"{a}*{b}-{c}") == str(a * b - c)
        assert align.calculator(f"({a}/{b})*{b}") == str(a)
    assert align.calculator("0.1+0.2") == "0.3" and align.calculator("7//2") == "?"
    assert align.calculator("-3*(-4)-1") == "11" and align.calculator("~3") == "?"
    assert align.calculator("*".join(["1e308"] * 16)) == "?" and align.calculator("1e308*10+0.5") == "?", "too many digits"


# ----------------------------------------------------------------------------------------------------------------- the runs

@pytest.fixture
def start(tokenizer, tmp_path, monkeypatch):
    """A folder with a tiny checkpoint and files of each kind; the working directory."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint("start.pt", tiny(tokenizer), tokenizer=tokenizer.to_dict())
    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write("chats.jsonl", [dict(prompt=f"say {i}", response=f"{i}!") for i in range(30)])
    write("pairs.jsonl", [dict(prompt=f"say {i}", chosen=f"{i}!", rejected="no") for i in range(30)])
    write("prompts.jsonl", [dict(prompt=f"say {i % 9}", pattern=r"[a-m ]+.*") for i in range(30)])
    return write


COMMON = "--ckpt=start.pt --template=bare --max_iters=4 --eval_interval=2 --batch_size=8 --group=4 --max_new_tokens=6 --device=cpu"
DATA = {"sft": "chats.jsonl"} | {name: "pairs.jsonl" for name in align.ALGORITHMS if options_of(name).loss in align.PREFERENCES}


@pytest.mark.parametrize("name", list(align.ALGORITHMS))
def test_every_algorithm_runs_from_files_and_leaves_a_checkpoint(name, start, capsys):
    data = DATA.get(name, "prompts.jsonl")
    words = f"--algorithm={name} --data={data} --output=out {COMMON}" + " --verifier=regex" * (data == "prompts.jsonl")
    first, last = align.align(words.split())
    assert last["step"] == 4 and all(math.isfinite(value) for value in last.values())
    gpt, _ = sample.load("out/ckpt.pt", "cpu")
    moved = any(not torch.equal(a, b) for a, b in zip(gpt.state_dict().values(), sample.load("start.pt", "cpu")[0].state_dict().values()))
    assert moved
    log = [json.loads(line) for line in open("out/log.jsonl")]
    assert log[0]["options"]["algorithm"] == name and [row["step"] for row in log[1:]] == [0, 2, 4]
    assert log[0]["versions"][1] == torch.__version__ and log[0]["options"]["begun_from"] == "start.pt"
    assert log[0]["corpus"] == hashlib.sha256(open(data, "rb").read()).hexdigest()


def test_a_new_preference_loss_has_a_reference(start, monkeypatch):
    score = lambda out, b: align.total(out.logp - b.ref, out)
    monkeypatch.setitem(align.PREFERENCES, "hinge", (score, lambda m, o: (1 - o.beta * m).relu()))
    first, last = align.align(f"--algorithm=dpo --loss=hinge --data=pairs.jsonl --output=out {COMMON}".split())
    assert last["step"] == 4 and last["val_loss"] < first["val_loss"] == 1


def logged(name):
    """The records of a run, without what depends on the clock."""
    rows = [json.loads(line) for line in open(f"{name}/log.jsonl")]
    return [{key: value for key, value in row.items() if key not in ("seconds", "idle")} for row in rows[1:]]


@pytest.mark.parametrize("words", ["sft --lora=2", "dpo", "ppo --staleness=1 --epochs=2 --minibatches=2", "grpo --is_cap=2 --staleness=2"])
def test_resuming_repeats_the_run(words, start, capsys):
    name = words.split()[0]
    data = DATA.get(name, "prompts.jsonl")
    words = f"--algorithm={words} --data={data} {COMMON}" + " --verifier=regex" * (data == "prompts.jsonl")
    align.align(f"{words} --output=cut --max_iters=2 --schedule=wsd --decay_share=0".split())
    align.align(f"{words} --output=one --decay_share=0".split())
    align.align(f"{words} --output=cut --resume --max_iters=4".split())
    one, cut = (load_checkpoint(f"{name}/ckpt.pt") for name in ("one", "cut"))
    assert cut["progress"]["step"] == 4
    for key in ("weights", "trained"):
        for name, weight in one[key].items():
            assert torch.equal(weight, cut[key][name]), name
    assert one["progress"]["rolled"] == cut["progress"]["rolled"]
    steps = [json.loads(line).get("step") for line in open("cut/log.jsonl")]
    assert steps == [None, 0, 2, 4]
    assert all(a.keys() == b.keys() and all(a[key] == pytest.approx(b[key]) for key in a if key != "lr") for a, b in zip(logged("one"), logged("cut")))


@pytest.mark.parametrize("words", ["", "--resume"])
def test_a_run_does_not_take_the_place_of_what_it_starts_from(words, start, capsys):
    align.align(f"--algorithm=sft --data=chats.jsonl {COMMON} --output=out".split())
    before = Path("out/ckpt.pt").read_bytes()
    with pytest.raises(ValueError, match="--ckpt=./out/ckpt.pt would be replaced: give another --output"):
        align.align(f"--algorithm=sft --data=chats.jsonl {COMMON} --output=out --ckpt=./out/ckpt.pt {words}".split())
    assert Path("out/ckpt.pt").read_bytes() == before


def test_ppo_without_its_kl(start, capsys):
    words = f"--algorithm=ppo --data=prompts.jsonl --verifier=regex --output=out {COMMON} --kl=0"
    assert "kl" not in align.align(words.split())[1]


def test_a_verifier_of_the_held_out_rows_needs_no_other(start, capsys):
    start("chats.jsonl", [dict(prompt=f"say {i}", response=f"{i}!", pattern="(?s).*") for i in range(30)])
    _, last = align.align(f"--algorithm=sft --data=chats.jsonl --held_verifier=regex --output=out {COMMON}".split())
    assert last["val_strict"] == 1


@pytest.mark.parametrize("word", ["--algorithm=expert", "--optimizer=soap", "--lora=2"])
def test_resuming_refuses_what_its_weights_are_not_of(word, start, capsys):
    words = f"--data=prompts.jsonl --verifier=regex --output=out {COMMON}".split()
    align.align(["--algorithm=grpo", *words])
    before = Path("out/ckpt.pt").read_bytes()
    with pytest.raises(ValueError, match=f"{word}: the run that --resume goes on with has (grpo|adamw|0)$"):
        align.align([*words, "--resume", "--max_iters=8", word])
    assert Path("out/ckpt.pt").read_bytes() == before


def test_an_own_verifier_is_asked_once_a_response(tokenizer, tmp_path):
    file, asked = tmp_path / "own.py", tmp_path / "asked"
    file.write_text(f"def score(response, **row):\n    open({str(asked)!r}, 'a').write(response)\n    return 0.25\n")
    score = align.scorer(options_of(f"--unsafe --verifier={file}:score"), tokenizer)
    assert score([dict(text="a"), dict(text="b")], [{}] * 2) == ([0.25] * 2, [0.25] * 2) and asked.read_text() == "ab"


def test_each_row_is_drawn_once_an_epoch(monkeypatch):
    rows = sum((align.drawn(3, step, 4, 6) for step in range(6)), [])
    orders = [np.random.default_rng((3, epoch)).permutation(6).tolist() for epoch in range(4)]
    assert rows == sum(orders, []) and align.drawn(3, 1, 10, 3) == sum((align.drawn(3, epoch, 3, 3) for epoch in range(3, 7)), [])[1:11]
    made, make = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: made.append(seed) or make(seed))
    align.drawn(0, 5, 64, 1000)
    assert len(made) == 1, "the order of an epoch is made once a step, not once a row"


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_counts_of_ngrams_stay_behind(name, start, tokenizer, capsys):
    """A model with --counts is aligned as the same without them, and comes out without them."""
    gpt = tiny(tokenizer, counts=2)
    text = np.random.default_rng(0).integers(gpt.config.vocab_size, size=500)
    found = data.train_ngrams(text, gpt.config.vocab_size, 2)
    gpt.counts.fill({key: torch.from_numpy(getattr(found, key)) for key, _ in gpt.counts.named_buffers()})
    save_checkpoint("counted.pt", gpt, tokenizer=tokenizer.to_dict())
    words = f"--algorithm={name} --data={DATA.get(name, 'prompts.jsonl')} {COMMON} --max_iters=2" + " --verifier=regex" * (name == "grpo")
    align.align(f"{words} --output=a".split())
    align.align(f"{words} --output=b --ckpt=counted.pt".split())
    a, b = (load_checkpoint(f"{folder}/ckpt.pt") for folder in "ab")
    assert b["config"]["counts"] == 0 and a["weights"].keys() == b["weights"].keys()
    assert all(torch.equal(weight, b["weights"][key]) for key, weight in a["weights"].items())


@pytest.mark.parametrize("rows, said", [
    ([dict(prompt="q", response="")] * 3, "3 rows left out"),
    ([dict(prompt="q" * 200, response="r")] * 2, "cut to the model's block"),
])
def test_bad_demonstrations_are_counted(rows, said, start, capsys):
    start("bad.jsonl", rows + [dict(prompt="q", response="r")] * 3)
    align.align(f"--algorithm=sft --data=bad.jsonl --output=out {COMMON} --max_iters=1".split())
    assert said in capsys.readouterr().out


def test_bad_preferences_are_counted(start, capsys):
    rows = [dict(prompt="q", chosen="a", rejected="a"), dict(prompt="q", chosen="a", rejected="b"), dict(prompt="q", chosen="b", rejected="a")]
    start("bad.jsonl", rows + [dict(prompt="p", chosen=str(i), rejected="z") for i in range(3)])
    align.align(f"--algorithm=dpo --data=bad.jsonl --output=out {COMMON} --max_iters=1".split())
    out = capsys.readouterr().out
    assert "1 rows left out: empty" in out and "2 rows left out: each called better" in out


@pytest.mark.parametrize("words, message", [
    ("--algorithm=grop", "choose from sft"), ("--algorithm=sft --loss=nil", "choose from nll"),
    ("--algorithm=sft --data=none.jsonl", "none.jsonl"), ("--algorithm=sft --ckpt=none.pt", "none.pt"),
    ("--algorithm=grpo --data=prompts.jsonl --verifier=regex --group=3", "no multiple"),
    ("--algorithm=rloo --data=prompts.jsonl --verifier=regex --group=1", "--group=1 leaves --advantage=leave_one_out nothing"),
    ("--algorithm=grpo --data=prompts.jsonl --verifier=regex --group=1", "--group=1 leaves --advantage=group nothing"),
    ("--algorithm=sft --template=chatty", "choose from"), ("--algorithm=sft --template=llama3", "special tokens"),
    ("--algorithm=sft --data=broken.jsonl", "broken.jsonl, row 1 (prompt, respons): there is no response"),
    ("--algorithm=grpo --data=prompts.jsonl", "--verifier"), ("--algorithm=grpo --data=prompts.jsonl --verifier=exakt", "--verifier=exakt"),
    ("--algorithm=sft --data=asked.jsonl", "asked.jsonl, row 1 (question, answer) has no field prompt"),
    ("--algorithm=sft --data=numbers.jsonl", "numbers.jsonl, row 1 (prompt, response) is damaged"),
    ("--algorithm=grpo --verifier=regex --data=", "--algorithm=grpo needs --data=FILE.jsonl"),
    ("--algorithm=dpo --loss=ipo --data=", "--algorithm=dpo needs --data=FILE.jsonl"),
    ("--eval=verify --data=prompts.jsonl --verifier=regex --max_new_tokens=-1", "--max_new_tokens=-1 must be 1 or more"),
    ("--algorithm=ipo --data=prompts.jsonl --beta=0", "--beta=0.0 must be above 0"),
    ("--eval=verify --data=", "--eval=verify needs --data=FILE.jsonl"), ("--label=none.jsonl", "none.jsonl"),
    ("--algorithm=grpo --data=prompts.jsonl --verifier=start.pt", "no reward model"),
    ("--algorithm=grpo --data=prompts.jsonl --verifier=regex --held_verifier=judge --judge=start.pt", "no response for the judge"),
    ("--algorithm=dpo --data=pairs.jsonl --max_kl=1", "--max_kl is for rewards: --loss=dpo has no use for it"),
    ("--algorithm=ipo --data=pairs.jsonl --min_entropy=1", "--min_entropy is for rewards"), ("--algorithm=sft --kl=0.1", "--kl is for"),
    *((f"--algorithm=sft --{name}=1", f"--{name} is for rewards") for name in ("entropy", "overlong", "is_cap", "staleness")),
    *((f"--algorithm=dpo --data=pairs.jsonl --{name}", f"--{name} is for rewards") for name in ("critic", "whiten", "dynamic")),
    ("--eval=winrate", "--judge"), ("--eval=nothing", "choose from verify"),
    ("--algorithm=grpo --data=prompts.jsonl --verifier=regex --advantage=no", "choose from"),
    ("--algorithm=sft --learning_rate=1e30 --max_iters=9", "smaller --learning_rate"),
])
def test_mistakes_end_in_one_line(words, message, start, monkeypatch):
    start("broken.jsonl", [dict(prompt="q", respons="r")])
    start("asked.jsonl", [dict(question="q", answer="r")])
    start("numbers.jsonl", [dict(prompt="q", response=7)])
    given = {word.split("=")[0] for word in words.split()}
    common = [word for word in f"--data=chats.jsonl {COMMON} --output=out".split() if word.split("=")[0] not in given]
    monkeypatch.setattr("sys.argv", ["align.py", *words.split(), *common])
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    with pytest.raises(SystemExit) as caught:
        align.run(align.main)
    assert caught.value.code.startswith("align.py: ") and message in caught.value.code and "\n" not in caught.value.code
    assert Path("out").exists() == ("1e30" in words), "what is refused leaves no folder"


@pytest.mark.parametrize("words, message", [
    ("--task=chess", "choose from sums"), ("--loss=ipo", "--loss is none of the demonstration's options (task, base_iters,"),
    ("--task=refuse --kl=0", "--kl is none of"), ("--lora=8", "it goes with --algorithm and --data"), ("--data=x.jsonl", "--data is none"),
    ("--resume --max_iters=9", "--max_iters is none of")])
def test_the_demonstration_refuses_what_it_would_not_heed(words, message, tmp_path, run_main):
    done = run_main("align.py", *words.split(), cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_demonstration_takes_its_own_options(tmp_path, run_main, monkeypatch):
    taken = []
    monkeypatch.setattr(align, "demonstrate", taken.append)
    words = "--task=refuse --base_iters=3 --seeds=2 --plot=a.png --output=b --resume --seed=5 --device=cpu"
    done = run_main("align.py", *words.split(), cwd=tmp_path)
    assert (done.returncode, done.stderr, len(taken)) == (0, "", 1)
    assert {word[2:].partition("=")[0] for word in words.split()} == set(align.DEMO_OPTIONS)


def test_what_is_printed_fits_80_columns(start, capsys):
    """Records, samples, what changed; all values of a record are in its lines, none cut in two."""
    start("long.jsonl", [dict(prompt=f"a long prompt {i} " * 3, response=f"{i}" * 40) for i in range(30)])
    for words in ("sft --data=long.jsonl --max_new_tokens=16", "ppo --data=prompts.jsonl --verifier=regex"):
        first, last = align.align(f"--output=out {COMMON} --max_iters=2 --algorithm={words}".split())
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 80 and "step     2: " in out and f", {last['tokens']:,} tokens, " in out
        assert all(f"{key} {last[key]:.4g}," in out for key in last if key not in ("step", "tokens", "seconds"))
    assert align.shown(dict(step=20, tokens=1234, seconds=45.6, lr=1e-4, nll=3.085)) == "step    20: nll 3.085, lr 0.0001, 1,234 tokens, 46 s"
    assert align.shown(dict(strict=0.5, length=3.0)) == "strict 0.5, length 3"


def test_an_echoed_command_can_be_copied():
    """Lines of 80 columns that a shell reads as the words they were."""
    command = "python align.py " + " ".join(f"--option_{i}=some/folder-{i}" for i in range(20))
    text = align.continued(command)
    assert text.count("\n") > 3 and max(map(len, text.splitlines())) <= 80
    said = subprocess.run(["sh", "-c", f"printf '%s\\n' {text}"], capture_output=True, text=True, check=True).stdout
    assert said.split("\n") == [*command.split(), ""]


def test_equal_rewards_and_nan_are_counted(start, tokenizer, capsys):
    words = f"grpo --verifier=regex --data=prompts.jsonl {COMMON}"
    for value, failed in ((1.0, 0), (float("nan"), 1)):
        trainer = trainer_of(tokenizer, words)
        trainer.score = lambda samples, rows: ([value] * len(samples), [0.0] * len(samples))
        items = align.read_items(trainer.o, tokenizer, 64)
        before = [w.clone() for w in trainer.weights.values()]
        trainer.step(items)
        record = trainer.record()
        assert record["no_gradient"] == 1 and record["not_finite"] == failed
        assert all(torch.allclose(a, b) for a, b in zip(before, trainer.weights.values()))


def test_dynamic_sampling_takes_groups_that_differ(start, tokenizer):
    trainer = trainer_of(tokenizer, f"dapo --verifier=regex --data=prompts.jsonl {COMMON} --overlong=0")
    calls = []
    def score(samples, rows):
        calls.append(len(samples))
        rewards = [float(i % 2) if len(calls) > 1 else 1.0 for i in range(len(samples))]
        return rewards, rewards
    trainer.score = score
    samples = trainer.roll(align.read_items(trainer.o, tokenizer, 64))
    assert len(calls) == 2 and len(samples) == 8 and {s["reward"] for s in samples} == {0.0, 1.0}


def test_a_tools_words_count_towards_the_limit(start, tokenizer, monkeypatch):
    trainer = trainer_of(tokenizer, f"grpo --verifier=regex --data=prompts.jsonl {COMMON} --overlong=4 --tool=calculator")
    def respond(gpt, tokenizer, prompts, o, seed):
        return [dict(ids=ids + [1] * 6, mask=[0] * len(ids) + [1, 1, 0, 0, 0, 1], old=torch.zeros(3), text="", done="length") for ids in prompts]
    monkeypatch.setattr(align, "respond", respond)
    trainer.score = lambda samples, rows: ([1.0] * len(samples),) * 2
    assert {s["reward"] for s in trainer.write(align.read_items(trainer.o, tokenizer, 64), 0)} == {0.0}


def test_a_run_stops_where_entropy_or_kl_leave_the_range(start, capsys):
    for words in ("--min_entropy=99", "--max_kl=1e-12"):
        _, last = align.align(f"--algorithm=grpo --data=prompts.jsonl --verifier=regex --output=o {COMMON} --learning_rate=0.01 {words}".split())
        assert last["step"] == (2 if "entropy" in words else 4) and "stopped" in capsys.readouterr().out


def test_stale_rollouts_come_from_older_weights(start, tokenizer):
    trainer = trainer_of(tokenizer, f"grpo --verifier=regex --data=prompts.jsonl {COMMON} --staleness=2 --advantage=mean")
    items = align.read_items(trainer.o, tokenizer, 64)
    first = align.Policy(tiny(tokenizer), tokenizer.vocab_size)
    for step in range(3):
        samples = [s for [s] in trainer.batch(items)]
        assert torch.allclose(first(samples).logp, torch.cat([s["old"] for s in samples]), atol=1e-5)  # weights of step 0
        trainer.update([[s] for s in samples])
    assert len(trainer.queue) == 2


# --------------------------------------------------------------------------------------------------------- judges and people

class Endpoint(BaseHTTPRequestHandler):
    """Prefers the longer response, or the first one when the text says so; fails where it is told to."""

    fail, seen, prefer_first = 0, [], False

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Endpoint.seen.append((self.path, self.headers["Authorization"], body["model"]))
        if Endpoint.fail:
            Endpoint.fail -= 1
            self.send_response(503)
            self.end_headers()
            self.wfile.write(b'{"error":\n "the prompt is too long"}')
            return
        text = body["messages"][0]["content"]
        a, b = text.split("Response A: ")[1].split("\n\nResponse B: ")
        b = b.split("\n\nReply")[0]
        letter = "A" if Endpoint.prefer_first or len(a) > len(b) else "B" if len(b) > len(a) else "C"
        answer = json.dumps(dict(choices=[dict(message=dict(content=f"{letter}."))])).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("API_KEY", "sesame")
    monkeypatch.setattr(align.time, "sleep", lambda seconds: None)
    Endpoint.fail, Endpoint.prefer_first, Endpoint.seen = 0, False, []
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_a_judge_is_asked_in_both_orders(endpoint):
    judge = align.Judge(options_of(f"--judge={endpoint} --judge_model=m"))
    assert judge.compare("q", "long one", "no") == 1 and judge.compare("q", "no", "long one") == 0
    assert judge.compare("q", "one", "two") == 0.5
    assert Endpoint.seen[0] == ("/v1/chat/completions", "Bearer sesame", "m")
    Endpoint.prefer_first = True  # a judge that only looks at the position says nothing
    assert judge.compare("q", "long one", "no") == 0.5


def test_a_judge_that_fails_is_asked_again_then_given_up(endpoint):
    judge = align.Judge(options_of(f"--judge={endpoint}"))
    Endpoint.fail = 3
    assert judge.reply(align.ASK.format("q", "aa", "b")) == "A."
    Endpoint.fail = 4
    with pytest.raises(OSError, match="gave no answer: HTTP Error 503.*the prompt is too long\"}; what is done"):
        judge.reply(align.ASK.format("q", "aa", "b"))


def test_winrate_keeps_what_was_judged(endpoint, start, capsys, monkeypatch):
    start("others.jsonl", [dict(prompt=f"say {i}", response="x" * (99 * (i % 2))) for i in range(6)])
    o = options_of(f"--eval=winrate --judge={endpoint} --data=others.jsonl --output=out {COMMON}")
    monkeypatch.setattr(align, "respond", lambda gpt, tokenizer, prompts, *_: [dict(text="four")] * len(prompts))
    reply, calls = align.Judge.reply, []
    def failing(self, text):
        calls.append(1)
        if len(calls) == 5:
            raise OSError("down")
        return reply(self, text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align.Judge, "reply", failing)
        with pytest.raises(OSError):
            align.examine(o)
    assert len(open("out/judged.jsonl").readlines()) == 2
    align.examine(o)
    assert len(calls) == 5 and len(open("out/judged.jsonl").readlines()) == 6
    assert "win rate 50.0%" in capsys.readouterr().out and "sesame" not in open("out/judged.jsonl").read()


def test_a_run_that_a_judge_stopped_goes_on_with_the_same_responses(start, monkeypatch, capsys):
    start("others.jsonl", [dict(prompt=f"say {i}", response="x", pattern="") for i in range(30)])
    asked, down = [], []
    def compare(self, *texts):
        if len(asked) in down:
            raise OSError("down")
        asked.append(texts)
        return len(texts[1]) % 3 / 2
    monkeypatch.setattr(align.Judge, "compare", compare)
    words = f"--algorithm=grpo --verifier=judge --held_verifier=regex --judge=http://x --data=others.jsonl {COMMON}".split()
    align.align([*words, "--output=one"])
    one, down = asked[:], [13]
    asked.clear()
    with pytest.raises(OSError):
        align.align([*words, "--output=cut"])
    down = []
    align.align([*words, "--output=cut", "--resume"])
    assert asked == one and len(one) > 26 and logged("one") == logged("cut")
    ends = [load_checkpoint(f"{name}/ckpt.pt")["weights"] for name in ("one", "cut")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_judge_is_shown_conversations_of_any_form(start, monkeypatch):
    rows = [dict(prompt="q", response="r"), dict(history=["p", "o", "q"], response="r"), dict(response="r", messages=[dict(role="user", content="q")])]
    start("forms.jsonl", rows)
    seen = []
    monkeypatch.setattr(align.Judge, "compare", lambda self, *texts: seen.append(texts) or 0.5)
    align.examine(options_of(f"--eval=winrate --judge=start.pt --data=forms.jsonl --output=out {COMMON}"))
    assert [(asked, of) for asked, _, of in seen] == [("q", "r"), ("p\n\no\n\nq", "r")]  # the third is the first, again


def test_a_judge_in_a_checkpoint_and_as_a_reward(start, capsys, tokenizer):
    judge = align.Judge(options_of("--judge=start.pt --template=bare"))
    with pytest.raises(OSError, match="the judge start.pt was asked 153 tokens, it takes 64"):
        judge.compare("q", "a", "b")  # the end of a question is another question
    save_checkpoint("judge.pt", tiny(tokenizer, block_size=256), tokenizer=tokenizer.to_dict())
    judge = align.Judge(options_of("--judge=judge.pt --template=bare"))
    assert judge.compare("q", "a", "b") == 0.5  # an untrained judge says nothing clear
    start("others.jsonl", [dict(prompt=f"say {i}", response="x") for i in range(12)])
    words = f"--algorithm=grpo --data=others.jsonl --verifier=judge --judge=judge.pt --output=out {COMMON} --max_iters=1 --batch_size=4"
    assert align.align(words.split())[1]["reward"] == 0.5


def test_a_reward_model_can_be_the_verifier(start, capsys):
    align.align(f"--algorithm=reward --data=pairs.jsonl --output=rm {COMMON} --max_iters=30 --learning_rate=0.003".split())
    out = capsys.readouterr().out
    assert "-> 1," in out.split("val_accuracy")[-1]
    _, last = align.align(f"--algorithm=rloo --data=prompts.jsonl --verifier=rm/ckpt.pt --output=out {COMMON}".split())
    assert math.isfinite(last["reward"])


def test_no_reward_model_is_taken_for_one(start, capsys, tokenizer):
    other = bpe.train("char", [LETTERS], 111, special_tokens=(END,), workers=1)
    save_checkpoint("other.pt", tiny(other), tokenizer=other.to_dict())
    align.align(f"--algorithm=sft --data=chats.jsonl --output=sft {COMMON}".split())
    align.align(f"--algorithm=reward --data=pairs.jsonl --output=rm {COMMON} --ckpt=other.pt".split())
    for verifier, message in (("sft/ckpt.pt", "no reward model"), ("rm/ckpt.pt", "has another tokenizer than --ckpt")):
        with pytest.raises(ValueError, match=f"--verifier={verifier} .*{message}"):
            align.align(f"--algorithm=rloo --data=prompts.jsonl --output=out {COMMON} --verifier={verifier}".split())


def test_labels_are_preferences(start, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", iter(["b\n", "what\n", "a\n", "tie\n"]))
    o = options_of(f"--label=prompts.jsonl --output=out {COMMON}")
    align.label(o)
    rows = [json.loads(line) for line in open("out/preferences.jsonl")]
    assert [row["chosen"] for row in rows] == ["b", "a", "tie"] and "--- a" in capsys.readouterr().out
    assert [len(align.preference(row)) for row in rows] == [2, 2, 0]


def test_labels_are_of_other_responses_than_the_rows(start, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", iter(["a\n"] * 2))
    turns = [dict(role="user", content="say x"), dict(role="assistant", content="x!")]
    start("both.jsonl", [dict(prompt="say x", response="x!"), dict(messages=turns)])
    align.label(options_of(f"--label=both.jsonl --output=out {COMMON}"))
    for line in open("out/preferences.jsonl"):
        assert json.loads(line)["history"] == turns[:1]
    assert capsys.readouterr().out.count("\nsay x\n--- a") == 2


def test_refusals_are_counted(start, tokenizer, monkeypatch):
    texts = iter(["I can't do that.", "Sure.", "I'm sorry, no.", "Sure."])
    monkeypatch.setattr(align, "respond", lambda *_: [dict(text=next(texts), old=[], done="end") for _ in range(4)])
    items = [[dict(prompt=[1], row=dict(harmful=harmful))] for harmful in (True, True, False, False)]
    out = align.grade(None, tokenizer, items, options_of(), lambda samples, rows: ([0.0] * 4, [0.0] * 4))
    assert (out["refusal"], out["over_refusal"]) == (0.5, 0.5)


# ------------------------------------------------------------------------------------------------------- the demonstration

@pytest.mark.parametrize("task", list(align.TASKS))
def test_tasks_can_be_verified(task):
    make, verifier = align.TASKS[task]
    rng = np.random.default_rng(0)
    rows = [make(rng) for _ in range(200)]
    args = [{key: value for key, value in row.items() if key != "response"} for row in rows]
    scores, reasons = align.verify(verifier, [row["response"] for row in rows], args)
    assert not reasons
    assert 0.4 < sum(scores) / 200 < 0.85  # demonstrations are not to be trusted, by design
    wrong, _ = align.verify(verifier, ["####999999 i can" if task != "refuse" else "sure"] * 200, args)
    assert sum(wrong) < 130


def test_sums_forget_only_what_is_carried():
    rng = np.random.default_rng(0)
    seen = set()
    for row in (align.sums(rng) for _ in range(1000)):
        a, b = map(int, row["prompt"].split("+"))
        lost = a + b - int(row["response"].split("####")[1])
        assert int(row["answer"]) == a + b and lost in ((0, 100) if a < 400 else (0, 10, 100, 110))
        seen.add(lost)
        if a % 100 + b % 100 < 100 and a % 10 + b % 10 < 10:
            assert lost == 0
    assert seen == {0, 10, 100, 110}


def test_a_countdown_is_solved_by_another_expression_too():
    assert align.solves("####2*3+1", "1 2 3=7") == 1 and align.solves("####1+3*2", "1 2 3=7") == 1
    assert align.solves("####3+3+1", "1 2 3=7") == 0 and align.solves("so 2*3+1", "1 2 3=7") == 0
    assert align.solves("so 2*3+1", "1 2 3=7", lenient=True) == 1
    assert align.solves("2*3+1", "1 2 3=7") == 0, "the mark is part of the form"

def short_demonstration(monkeypatch, *names):
    """The demonstration with few rows and steps; with the algorithms named (none: all)."""
    how = "--max_iters=2 --eval_interval=2 --batch_size=16 --eval_rows=4"
    short = {name: (data, begin, f"{words} {how}") for name, (data, begin, words) in align.DEMO.items() if not names or name in names}
    monkeypatch.setattr(align, "DEMO", short)
    monkeypatch.setattr(align, "ROWS", (150, 4, 60))
    monkeypatch.setitem(align.VERIFIERS, "refuse", lambda response, lenient=False: float(len(response) % 2))


def test_base_iters_shortens_what_comes_before_rewards(tmp_path, monkeypatch, capsys):
    calls, usual = [], {name: options(Options, words.split()).max_iters for name, (_, _, words) in align.DEMO.items()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(align, "ROWS", (150, 4, 60))
    monkeypatch.setattr(align, "align", lambda words: calls.append(options(Options, words)) or ({}, dict(tokens=1, seconds=1.0)))
    monkeypatch.setattr(align, "standing", lambda *_: dict.fromkeys(("strict", "lenient", "before", "kl"), 0.0))
    for name in ("prefer", "prompted"):
        monkeypatch.setattr(align, name, lambda *_: None)
    align.demonstrate(options_of("--base_iters=7 --output=out"))
    assert [o.max_iters for o in calls] == list((usual | dict(base=7, sft=7)).values())


def test_the_picture_shows_the_logs(tmp_path, monkeypatch, capsys):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    short_demonstration(monkeypatch, "base", "sft", "grpo")
    align.demonstrate(options_of("--task=refuse --output=out --seeds=2 --plot=lines.png"))
    assert (tmp_path / "lines.png").read_bytes().startswith(b"\x89PNG")
    assert "lines.png written" in capsys.readouterr().out.split("\nheld-out prompts answered right")[0]  # the table comes last
    [axes] = pyplot.gcf().axes
    assert [line.get_label() for line in axes.lines] == ["sft", "grpo"]
    for line, band in zip(axes.lines, axes.collections):
        logs = [[json.loads(row) for row in open(f"out/refuse-{seed}/{line.get_label()}/log.jsonl")][1:] for seed in (0, 1)]
        for at, records in enumerate(zip(*logs)):
            x, y = line.get_xydata()[at]
            right = [record["val_strict"] for record in records]
            assert x == pytest.approx(sum(record["seconds"] for record in records) / 2) and y == pytest.approx(sum(right) / 2)
            edges = {round(edge, 9) for place, edge in band.get_paths()[0].vertices if place == x}
            assert edges == {round(edge, 9) for edge in right}
    pyplot.close("all")


def test_a_picture_without_matplotlib_ends_in_one_line(monkeypatch):
    monkeypatch.setattr(align.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="^--plot needs matplotlib: pip install matplotlib$"):
        align.demonstrate(options_of("--plot=lines.png"))


def test_the_demonstration_at_tiny_size(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short_demonstration(monkeypatch)
    align.demonstrate(options(Options, ["--task=refuse", "--output=my runs"]))
    lines = capsys.readouterr().out.splitlines()
    table = lines[-5:]
    assert [line.split()[0] for line in table] == ["sft", "dpo", "ppo", "grpo", "expert"]
    assert all(line.split()[1].endswith("%") for line in table)
    assert "val_strict" in open("my runs/refuse-0/dpo/log.jsonl").read().splitlines()[-1]  # of pairs, too
