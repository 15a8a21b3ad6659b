"""sample.py against plain loops: filters by brute force, draws by chi-square, the engine against a model called anew for
every token, streams against whole texts, and the command line.
"""
import dataclasses
import io
import itertools
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
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import bpe
import data
import model
import sample
from sample import END, Engine, Request, Sampling, TextStream

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = Sampling(temperature=0)
PLAIN = Sampling(temperature=1.0, top_k=0)  # the model's own distribution


def make_model(seed=0, **config):
    """A float64 model of large random weights, whose next token depends on all tokens before it."""
    shape = dict(vocab_size=40, block_size=16, n_layer=2, n_head=2, n_embd=16, tie_embeddings=False) | config
    shape = {"mixer": "attention,window"} | shape
    gpt = model.GPT(model.Config(**shape, window=6 * ("window" in shape["mixer"] or "strided" in shape["mixer"]))).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in gpt.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.4)
    if gpt.config.counts:
        found = data.train_ngrams(torch.randint(40, (4000,), generator=generator).numpy(), 40, gpt.config.counts)
        gpt.counts.fill({name: torch.from_numpy(getattr(found, name)) for name, _ in gpt.counts.named_buffers()})
    return gpt


def plain_loop(gpt, prompt, count):
    """Greedy decoding as the help says it: no state, no batch, the older half goes when the block is full."""
    block = gpt.config.block_size
    context, output = list(prompt)[-block:], []
    for _ in range(count):
        with torch.no_grad():
            output.append(int(gpt(torch.tensor([context]))[0, -1].argmax()))
        if len(context) == block:
            context = context[block // 2 + block % 2:]
        context.append(output[-1])
    return output


def choose(logits, sampling, chance, seen):
    """One step of decoding, from logits (B, V) and a number in (0, 1] a row."""
    shaped = sample.shape(logits, sampling, seen)
    return sample.draw(shaped, chance) if sampling.temperature else shaped.argmax(-1)


def decode(gpt, requests, **how):
    """Run requests to their ends; returns their outputs."""
    engine = Engine(gpt, requests, **how)
    while engine.step():
        pass
    return [request.output for request in requests]


class Script(nn.Module):
    """A model that says one fixed text, whatever it is asked; it has what Engine needs and nothing else."""

    class Head(nn.Module):
        """What the model says, behind each number of tokens."""

        def __init__(self, tokens, vocab_size):
            super().__init__()
            self.table = nn.Parameter(1e3 * torch.eye(vocab_size)[tokens])

        def forward(self, at):
            return self.table[at[..., 0]]

    def __init__(self, tokens, prompt_length=1, vocab_size=257):
        super().__init__()
        self.config = model.Config(vocab_size=vocab_size, block_size=10**6)
        self.head, self.start = self.Head(tokens, vocab_size), prompt_length

    def logits(self, at):
        return self.head(at)

    def new_state(self, batch, capacity):
        return model.State([], [0] * batch, [0] * batch, [capacity] * batch)  # of no layer, so it counts tokens alone

    def hidden(self, tokens, state):
        at = torch.tensor(state.lengths)[:, None] + torch.arange(tokens.shape[1]) + 1 - self.start
        state.lengths = [length + tokens.shape[1] for length in state.lengths]
        return at[..., None]


@pytest.fixture(scope="module")
def byte_tokenizer():
    return bpe.train("byte", ["abc"], 257)


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.train("bpe", ["def main(argument):\n    return the model, the tokens\n\ndef model(café):\n" * 9], 300)


@pytest.fixture(scope="module")
def gpt(tokenizer):
    return make_model(vocab_size=tokenizer.vocab_size, block_size=32)


# ---------------------------------------------------------------------------------------------------------- the filters

def brute_repetition_penalty(row, penalty, seen):
    return [(x / penalty if x > 0 else x * penalty) if i in seen else x for i, x in enumerate(row)]


def brute_presence_penalty(row, penalty, seen):
    return [x - penalty * (i in seen) for i, x in enumerate(row)]


def brute_temperature(row, value, seen):
    return [(x - max(row)) / value for x in row]


def brute_top_k(row, k, seen):
    kept = sorted(row, reverse=True)[:k]
    return [x if x in kept else -math.inf for x in row]


def brute_top_p(row, p, seen):
    odds, total, kept = [math.exp(x) for x in row], 0.0, set()
    for x in sorted(row, reverse=True):
        if total < p * sum(odds):
            kept.add(x)
        total += math.exp(x)
    return [x if x in kept else -math.inf for x in row]


def brute_min_p(row, p, seen):
    odds = np.exp(row) / np.exp(row).sum()
    return [x if odd >= p * max(odds) else -math.inf for x, odd in zip(row, odds)]


OFF = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
VALUES = {"repetition_penalty": (1.3, 0.5, 4.0), "presence_penalty": (0.7, -1.5), "temperature": (0.3, 1.7, 5.0),
          "top_k": (1, 3, 17, 100), "top_p": (0.03, 0.51, 0.9, 0.9999), "min_p": (0.013, 0.31, 1.0)}


@pytest.mark.parametrize("name", OFF)
def test_a_filter_is_its_definition(name):
    brute, rng = globals()[f"brute_{name}"], random.Random(name)
    assert list(VALUES) == list(OFF) and OFF.keys() == vars(Sampling()).keys()
    for trial in range(30):
        for value in VALUES[name]:
            # every second time among few values, so that there are ties
            rows = [[rng.gauss(0, 2) if trial % 2 else rng.randint(-3, 3) / 2 for _ in range(20)] for _ in range(3)]
            seen = [rng.choices(range(20), k=rng.randint(1, 9)) for _ in rows]
            logits = torch.tensor(rows, dtype=torch.float64)
            before = logits.clone()
            want = torch.tensor([brute(row, value, ids) for row, ids in zip(rows, seen)], dtype=torch.float64)
            got = sample.shape(logits, Sampling(**OFF | {name: value}), seen)
            torch.testing.assert_close(got, want - want.amax(-1, keepdim=True))
            assert torch.equal(logits, before), "the input has changed"


def test_all_filters_together():
    rng = random.Random(3)
    for _ in range(200):
        settings = Sampling(**{name: rng.choice((*VALUES[name], OFF[name])) for name in OFF})
        row, seen = [rng.gauss(0, 2) for _ in range(20)], rng.choices(range(20), k=5)
        got = sample.shape(torch.tensor([row], dtype=torch.float64), settings, [seen]).softmax(-1)[0]
        torch.testing.assert_close(got, torch.tensor(odds_of(row, settings, seen)))


def test_filters_come_in_their_order():
    # Temperature 3 first: 0.72 0.26 0.01 becomes 0.51 0.36 0.13, so top_p=0.6 keeps two. The other way round only one.
    logits = torch.tensor([[4.0, 3.0, 0.0]])
    hot = Sampling(temperature=3.0, top_k=0, top_p=0.6)
    assert choose(logits, hot, torch.tensor([1.0]), [[]]).item() == 1
    # top_k before top_p: of 0.4 0.3 0.2 0.1 it leaves 0.57 0.43, of which the first is enough for top_p=0.5.
    four = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert choose(four, Sampling(1.0, 2, 0.5), torch.tensor([1.0]), [[]]).item() == 0
    # The penalty first: it moves token 0 below token 1, which top_k=1 then keeps.
    assert choose(logits, Sampling(top_k=1, repetition_penalty=2.0), torch.tensor([1.0]), [[0]]).item() == 1


@pytest.mark.parametrize("value", [1e-300, 1e-9, 0.0])
def test_the_smallest_temperatures_are_greedy(value):
    logits = torch.tensor([[1.0, 80.0, 79.0, -90.0]])
    for chance in (1e-12, 0.5, 1.0):
        assert choose(logits, Sampling(temperature=value), torch.tensor([chance]), [[]]).item() == 1


@pytest.mark.parametrize("field, value", [
    ("temperature", -0.1), ("temperature", math.nan), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("top_p", math.nan),
    ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0.0), ("repetition_penalty", math.nan),
    ("temperature", 101), ("temperature", math.inf), ("top_k", math.inf), ("repetition_penalty", 1e-300), ("repetition_penalty", 1e300),
    ("presence_penalty", 101), ("presence_penalty", -math.inf)])
def test_sampling_refuses(field, value):
    with pytest.raises(ValueError, match=f"--{field}="):
        Sampling(**{field: value})
    Sampling(temperature=0, top_k=0, top_p=1.0, min_p=1.0, repetition_penalty=0.5)


# ------------------------------------------------------------------------------------------------------------- the draws

def chi_square(counts, odds):
    """How far counts are from odds, in standard deviations of chi-square (Wilson and Hilferty); impossible: infinite."""
    total, possible = sum(counts.values()), [i for i, odd in enumerate(odds) if odd > 0]
    if set(counts) - set(possible):
        return math.inf
    distance = sum((counts[i] - total * odds[i]) ** 2 / (total * odds[i]) for i in possible)
    k = 2 / (9 * (len(possible) - 1))
    return ((distance / (len(possible) - 1)) ** (1 / 3) - (1 - k)) / k**0.5


def odds_of(row, sampling, seen=()):
    """The probabilities after all filters, by the brute forces above, one after the other."""
    for name, off in OFF.items():
        if getattr(sampling, name) != off:
            row = globals()[f"brute_{name}"](row, getattr(sampling, name), seen)
    odds = np.exp(np.array(row) - max(row))
    return odds / odds.sum()


@pytest.mark.parametrize("sampling", [PLAIN, Sampling(0.7, 4), Sampling(1.5, 0, 0.8), Sampling(1.0, 0, 1.0, 0.3),
                                      Sampling(0.9, 5, 0.95, 0.05, 1.4)])
def test_draws_have_the_probabilities(sampling):
    gpt, prompt = make_model(3, vocab_size=8), [1, 5, 2]
    requests = [Request(prompt, 1, sampling, seed) for seed in range(6000)]
    counts = Counter(output[0] for output in decode(gpt, requests))
    with torch.no_grad():
        row = gpt(torch.tensor([prompt]))[0, -1].tolist()
    odds = odds_of(row, sampling, prompt)
    assert chi_square(counts, odds) < 3.5
    other = dataclasses.replace(sampling, temperature=sampling.temperature * 1.3)
    assert chi_square(counts, odds_of(row, other, prompt)) > 3.5, "the test must see a wrong temperature"


def test_a_draw_never_gives_an_impossible_token():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    for chance in (2.0**-53, 0.5, 0.5 + 2.0**-24, 1 - 2.0**-24, 1.0):
        assert sample.draw(logits, torch.tensor([chance])).item() == (1 if chance <= 0.5 else 3)


def test_tokens_of_one_request_are_drawn_independently():
    # a model that says 50 : 50 at each step; pairs of neighbours must be equally frequent
    gpt = Script([0] * 1600)
    gpt.head.table.data.fill_(-math.inf)[:, :2] = 0.0
    [output] = decode(gpt, [Request([0], 1600, PLAIN)])
    assert chi_square(Counter(2 * a + b for a, b in zip(output[::2], output[1::2])), [0.25] * 4) < 3.5
    assert chi_square(Counter(2 * a + a for a in output), [0.25] * 4) > 3.5


# ------------------------------------------------------------------------------------------------------------ the engine

@pytest.mark.parametrize("mixer, position", [
    pytest.param(mixer, position, marks=pytest.mark.slow if mixer != "attention" and position in ("sinusoidal", "none") else [])
    for mixer in (*model.MIXERS, ",".join(model.MIXERS)) for position in model.POSITIONS])
def test_greedy_is_the_plain_loop(mixer, position):
    """From prompts of any length, within the block and far beyond it."""
    gpt = make_model(mixer=mixer, position=position, n_layer=max(2, len(mixer.split(","))))
    prompts = [[7], list(range(9)), list(range(16)), [i * i % 40 for i in range(30)]]
    want = [plain_loop(gpt, prompt, 20) for prompt in prompts]
    assert len(set(map(tuple, want))) >= 3 and len(set(sum(want, []))) > 6, "the model says too little"
    assert [decode(gpt, [Request(prompt, 20, GREEDY)])[0] for prompt in prompts] == want
    assert decode(gpt, [Request(prompt, 20, GREEDY) for prompt in prompts]) == want, "in one batch"


def test_counts_of_ngrams_speak_too():
    """The engine gives what the whole forward pass of a model with --counts does, in batches and behind drafts."""
    plain, gpt = make_model(), make_model(counts=3, counts_weight=0.9)
    prompts = [[7], list(range(9)), list(range(16)), [i * i % 40 for i in range(30)]]
    want = [plain_loop(gpt, prompt, 20) for prompt in prompts]
    assert want != [plain_loop(plain, prompt, 20) for prompt in prompts]
    assert decode(gpt, [Request(prompt, 20, GREEDY) for prompt in prompts]) == want
    for other in (gpt, plain):
        engine = Engine(gpt, [Request(prompt, 20, GREEDY) for prompt in prompts])
        engine.draft = sample.Draft(other, 40)
        while engine.step():
            pass
        assert engine.guessed[1] > 0


@pytest.mark.parametrize("block", [1, 2, 3])
def test_the_smallest_blocks(block):
    gpt = make_model(block_size=block)
    assert decode(gpt, [Request([3, 1, 2], 9, GREEDY)])[0] == plain_loop(gpt, [3, 1, 2], 9)


def make_requests():
    prompts = [[7], list(range(9)), [7], list(range(16)), [i * i % 40 for i in range(30)], [39, 38]]
    settings = [PLAIN, GREEDY, Sampling(0.7, 5), Sampling(1.0, 0, 0.9, repetition_penalty=1.5), PLAIN, PLAIN]
    return [Request(prompt, 5 + 8 * i, sampling, i, end=5 if i % 2 else -1)
            for i, (prompt, sampling) in enumerate(zip(prompts, settings))]


@pytest.mark.parametrize("slots", [1, 2, 4, 100])
def test_a_request_does_not_depend_on_its_neighbours(slots):
    """Prompts, lengths, settings, ends and seeds all differ; rows join and leave the batch at different times."""
    gpt, requests = make_model(1), make_requests()
    together = decode(gpt, requests, slots=slots)
    assert [decode(gpt, [request])[0] for request in make_requests()] == together
    assert decode(gpt, make_requests()[::-1], slots=slots) == together[::-1]
    assert len({len(output) for output in together}) == 6
    reasons = ["end" if output[-1] == request.end else "length" for request, output in zip(requests, together)]
    assert [request.done for request in requests] == reasons and set(reasons) == {"end", "length"}


def test_a_caller_may_end_a_request_at_any_time():
    gpt = make_model(1)
    alone = decode(gpt, [Request([3, 4, 5], 30, GREEDY)])[0]
    requests = [Request([9], 30, GREEDY), Request([3, 4, 5], 30, GREEDY), Request([1, 2], 30, GREEDY)]
    engine = Engine(gpt, requests)
    for _ in range(4):
        engine.step()
    requests[0].done = "cancelled"
    while engine.step():
        requests[2].done = requests[2].done or "cancelled"
    assert [len(request.output) for request in requests] == [4, 30, 5]
    assert requests[1].output == alone and requests[0].done == "cancelled"


def test_seeds():
    gpt = make_model()
    def of(seed, **how):
        return decode(gpt, [Request([1, 2], 12, PLAIN, seed, **how)])[0]
    assert of("1 0") == of("1 0") != of("1 1") and of(3) == of("3")
    # pinned: the random numbers of a seed never change
    assert [1 - Request([1], seed="0 0").random.random(), 1 - Request([1], seed=7).random.random()] == [
        1 - random.Random("0 0").random(), 1 - random.Random("7").random()]


class Recorder:
    """Passes calls on to a model and keeps the shapes that went in."""

    def __init__(self, gpt):
        self.gpt, self.shapes, self.capacities, self.rows = gpt, [], [], []
        self.config = gpt.config
        self.parameters, self.modules = gpt.parameters, gpt.modules

    def hidden(self, tokens, state):
        self.shapes.append(tuple(tokens.shape))
        return self.gpt.hidden(tokens, state)

    def logits(self, x):
        self.rows.append(tuple(x.shape[:-1]))
        return self.gpt.logits(x)

    def new_state(self, batch, capacity):
        self.capacities.append((batch, capacity))
        return self.gpt.new_state(batch, capacity)


def test_a_common_prompt_is_computed_once_and_the_head_sees_last_positions_only():
    gpt = make_model()
    recorder = Recorder(gpt)
    requests = [Request([4, 2, 9], 6, PLAIN, seed) for seed in range(5)] + [Request([4], 6, PLAIN, 9)]
    outputs = decode(recorder, requests)
    assert recorder.shapes == [(2, 3)] + [(6, 1)] * 5, "both prompts together"
    assert recorder.rows == [(6, 1)] * 6 and set(recorder.capacities) == {(2, 9)}
    # samples from one forked state are those of a prompt computed for each
    assert outputs == [decode(gpt, [Request(r.prompt, 6, PLAIN, r.seed)])[0] for r in requests]
    assert len(set(map(tuple, outputs))) == 6


@pytest.mark.parametrize("slots", [2, 32])
def test_a_common_beginning_is_computed_once(slots):
    """32 requests that share 1,000 tokens: those once, then the tails, however few go together."""
    gpt = make_model(block_size=1024, n_layer=1, mixer="attention")
    common = [i * i % 40 for i in range(1000)]
    requests = [Request(common + [i, i + 1, i % 7], 4, GREEDY) for i in range(32)]
    engine = Engine(gpt, requests, slots=slots)
    while engine.step():
        pass
    assert engine.past.computed == engine.spent["prefill"][0] == 1000 + 32 * 3
    assert [request.output for request in requests[::9]] == [plain_loop(gpt, common + [i, i + 1, i % 7], 4)
                                                             for i in range(0, 32, 9)]


@pytest.mark.parametrize("mixer", ["attention", "window", "gdn", "hyena"])
def test_prompts_side_by_side_are_those_of_one_alone(mixer):
    """Prompts of all lengths, some the beginning of others, some that share much, in calls of at most CHUNK tokens."""
    gpt = make_model(mixer=mixer, block_size=128)
    rng = random.Random(3)
    text = [rng.randrange(40) for _ in range(90)]
    prompts = [text[:n] for n in (1, 2, 30, 31, 60, 90)] + [text[:40] + [i] * 9 for i in range(6)]
    prompts += [[rng.randrange(40) for _ in range(rng.randrange(1, 100))] for _ in range(12)]
    recorder = Recorder(gpt)
    outputs = decode(recorder, [Request(prompt, 5, GREEDY) for prompt in prompts])
    assert outputs == [decode(gpt, [Request(prompt, 5, GREEDY)])[0] for prompt in prompts]
    assert max(rows * width for rows, width in recorder.shapes) <= 512 and len(recorder.shapes) < len(prompts) + 5


def test_the_state_is_used():
    recorder = Recorder(make_model())
    decode(recorder, [Request([4, 2, 9], 3, GREEDY)])
    assert recorder.shapes == [(1, 3), (1, 1), (1, 1)]
    recorder = Recorder(make_model(mixer="linear"))
    decode(recorder, [Request([4, 2, 9], 3, GREEDY)])
    assert recorder.shapes == [(1, 3), (1, 1), (1, 1), (1, 1)], "the last token of a prompt is a call of its own, as those that follow"
    recorder = Recorder(make_model())
    decode(recorder, [Request([4, 2, 9], 2, GREEDY), Request([5], 4, GREEDY)])
    assert recorder.shapes == [(2, 3)] + [(2, 1), (1, 1), (1, 1)], "when a row leaves, the others keep their state"
    recorder = Recorder(make_model(block_size=4))
    decode(recorder, [Request([4, 2, 9], 8, GREEDY), Request([1, 2], 3, GREEDY)])
    assert recorder.shapes[:4] == [(2, 3)] + [(2, 1), (2, 1), (1, 3)], "only the row whose block is full"


@pytest.mark.parametrize("mixer", [*model.MIXERS, ",".join(model.MIXERS)])
def test_a_row_that_is_left_is_taken_by_the_next(mixer, monkeypatch):
    """While requests wait, the state is never copied: who comes takes the row of who goes, and says what it says alone."""
    gpt = make_model(1, mixer=mixer, n_layer=len(mixer.split(",")), block_size=32)
    rng = random.Random(5)
    shapes = [([rng.randrange(40) for _ in range(rng.randint(1, 9))], rng.randint(1, 20)) for _ in range(14)]
    alone = [decode(gpt, [Request(prompt, count, GREEDY)])[0] for prompt, count in shapes]
    copies = []
    fork, join = model.State.fork, sample.join
    monkeypatch.setattr(model.State, "fork", lambda state, rows: copies.append(rows) or fork(state, rows))
    monkeypatch.setattr(sample, "join", lambda states: copies.append(len(states)) or join(states))
    right = lambda request, count: alone[shapes.index((request.prompt, request.max_new_tokens))][len(request.output):][:count]
    for how in {}, dict(draft=right):
        requests, rows = [Request(prompt, count, GREEDY) for prompt, count in shapes], []
        engine = Engine(gpt, requests, slots=4, **how)
        engine.step()
        copies.clear()
        while engine.waiting:
            engine.step()
            rows.append(len(engine.rows))
        assert [row for row in copies if row != [0]] == [] and set(rows) == {4}, "a prompt that comes alone is a row of its own"
        while going := engine.step():
            assert len(engine.rows) <= 4 * len(going) / 3, "a quarter of the rows may be empty"
        assert engine.rows == [] and engine.state is None
        assert [request.output for request in requests] == alone


@pytest.mark.parametrize("changes", [{}, dict(mixer="latent", ngram=3, ngram_rows=97), dict(mixer="strided", end_token=7, n_kv_head=1),
                                     pytest.param(dict(mixer="valued", position="learned"), marks=pytest.mark.slow),
                                     pytest.param(dict(mixer="attention", position="none", softcap=3.0), marks=pytest.mark.slow)], ids=str)
def test_recorded_steps(changes, monkeypatch, capsys):
    """A trace of one step, whose numbers and shapes are constants as in a CUDA graph, says what a step of Python says."""
    gpt = make_model(1, block_size=32, **changes)
    rng = random.Random(5)
    shapes = [([rng.randrange(40) for _ in range(rng.randint(1, 9))], rng.randint(1, 23)) for _ in range(6)]
    alone = [decode(gpt, [Request(prompt, count, GREEDY)])[0] for prompt, count in shapes]
    made, replays = [], []

    def record(self):
        self.work()
        trace = make_fx(lambda: self.work() or self.out)()
        made.append(self.fixed.seen)
        self.replay = lambda: replays.append(1) or setattr(self, "out", trace())
    monkeypatch.setattr(sample.Recorded, "record", record)
    monkeypatch.setattr(sample, "SEEN", 16)
    assert decode(gpt, [Request(prompt, count, GREEDY) for prompt, count in shapes], slots=3, graphs=True) == alone
    assert 2 < len(made) < len(replays) / 2 and min(made) == 16 < max(made)
    # texts that outgrow the block wait for another row, while the others go on
    long = [(prompt, count + 25) for prompt, count in shapes]
    alone_long = [decode(gpt, [Request(prompt, count, GREEDY)])[0] for prompt, count in long]
    many = len(replays)
    assert decode(gpt, [Request(prompt, count, GREEDY) for prompt, count in long], slots=3, graphs=True) == alone_long
    assert len(replays) > many + 40 and "going on without" not in capsys.readouterr().err
    # what cannot be recorded is done as ever
    monkeypatch.setattr(sample.Recorded, "record", lambda self: torch.zeros(2) + torch.zeros(3))
    assert decode(gpt, [Request(prompt, count, GREEDY) for prompt, count in shapes], graphs=True) == alone
    # a trace that holds on to the first step's place must be wrong
    monkeypatch.setattr(sample.Recorded, "record", record)
    monkeypatch.setattr(sample.Fixed, "places", lambda self, T, device: self.at.clone().copy_(torch.tensor(self.lengths)[:, None]))
    assert decode(gpt, [Request(*shapes[0], GREEDY)], graphs=True) != alone[:1]


def test_recurrences_are_not_recorded(monkeypatch):
    monkeypatch.setattr(sample, "Recorded", None)
    gpt = make_model(1, mixer="attention,gdn")
    assert decode(gpt, [Request([7, 3], 9, GREEDY)], graphs=True) == decode(gpt, [Request([7, 3], 9, GREEDY)])


@pytest.mark.parametrize("moment", ["before the step's decoding", "while the model computes"])
@pytest.mark.parametrize("ended", [[0], [1, 2], [0, 1, 2]])
def test_another_thread_ends_requests_in_the_middle_of_a_step(moment, ended, monkeypatch):
    gpt = make_model(1, mixer="attention,gdn", n_layer=2)
    shapes = [([7, i, 3], 6 + i) for i in range(6)]
    alone = [decode(gpt, [Request(prompt, count, GREEDY)])[0] for prompt, count in shapes]
    requests = [Request(prompt, count, GREEDY) for prompt, count in shapes]
    engine = Engine(gpt, requests, slots=3)
    engine.step()
    owner, name = (engine, "timed") if moment.startswith("before") else (gpt, "hidden")
    usual = getattr(owner, name)

    def late(*words):
        for i in ended:
            requests[i].done = requests[i].done or "cancel"
        return usual(*words)
    monkeypatch.setattr(owner, name, late)
    engine.step()
    monkeypatch.setattr(owner, name, usual)
    while engine.step():
        pass
    for i, request in enumerate(requests):
        assert request.output == (alone[i][:len(request.output)] if i in ended else alone[i])
        assert i not in ended or request.done == "cancel"


def test_engine_counts_and_times():
    requests = [Request([1, 2, 3], 7, GREEDY), Request([1, 2, 3], 7, GREEDY), Request([9, 9], 4, GREEDY)]
    engine = Engine(make_model(), requests)
    assert [len(engine.step()) for _ in range(8)] == [3, 3, 3, 3, 2, 2, 2, 0]
    assert [tokens for tokens, _ in engine.spent.values()] == [5, 3 * 3 + 2 * 3]
    assert all(seconds > 0 for _, seconds in engine.spent.values()) and "prefill 5 tokens" in engine.report()
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_requests_join_and_leave():
    """Five slots of two; later ones enter as earlier ones leave, in the order of their coming, also while it runs."""
    gpt, engine = make_model(1), Engine(make_model(1), slots=2)
    lengths = [3, 9, 2, 5, 4]
    requests = [Request([i + 1, 7], length, GREEDY) for i, length in enumerate(lengths)]
    for request in requests[:3]:
        engine.submit(request)
    sizes = [len(engine.step()) for _ in range(2)]
    requests[3].done = "cancelled"
    for request in requests[3:]:
        engine.submit(request)
    while running := engine.step():
        sizes.append(len(running))
    assert sizes == [2] * 9 and requests[3].output == [] and not engine.waiting
    for request in requests[:3] + requests[4:]:
        assert request.output == plain_loop(gpt, request.prompt, request.max_new_tokens)
    with pytest.raises(ValueError, match="room for 5"):
        Engine(gpt, [Request([1, 2], 3)]).submit(Request([1, 2, 3], 9))


@pytest.mark.parametrize("mixer", [*model.MIXERS, ",".join(model.MIXERS)])
def test_requests_wait_until_the_state_has_room(mixer):
    """The bytes of the state, counted at each step, stay below what is allowed, which is used; no text changes by it."""
    gpt = make_model(1, mixer=mixer, block_size=32, n_layer=len(mixer.split(",")))
    fixed, each = sample.row_bytes(gpt)
    state = gpt.new_state(3, 20)
    with torch.no_grad():
        gpt(torch.arange(15).view(3, 5), state)
    assert state.nbytes == 3 * (fixed + 20 * each) > 0, "what the model's own state tells"

    def requests():
        shapes = (4, 14), (14, 4), (4, 20), (4, 9), (4, 3), (4, 1), (4, 20)  # where the first two are together, room is scarce
        return [Request([i + 1, i, *range(length - 2)], count, GREEDY) for i, (length, count) in enumerate(shapes)]
    want = decode(gpt, requests())
    right = lambda request, count: want[request.prompt[0] - 1][len(request.output):][:count]
    for rows, how in (1, {}), (3, {}), (2, dict(draft=right)):
        cache = (1 + rows) * (fixed + 24 * each)  # 24 is the longest
        asked = requests()
        engine = Engine(gpt, asked, cache=cache, **how)
        most, room = [0, 0], set()
        while active := engine.step():
            states = [state for state in (engine.state, engine.past.state) if state]
            held = sum(x.nbytes for state in states for kept in state.layers for x in kept)
            assert held <= cache and engine.size(active) <= cache
            most = [max(most[0], len(active)), max(most[1], held)]
            room |= {engine.state.room[0]}
            if not fixed and engine.state.room[0] == engine.room(active):
                spare = 0 if engine.past.state else fixed + each * engine.capacity  # where no prompt came alone
                assert held == engine.size(active) - spare, "to the byte"
        assert [request.output for request in asked] == want and engine.capacity == 24
        assert most[0] == rows if not each else rows <= most[0] < 7, "they wait, but no longer than they must"
        assert not each or most[1] > 0.8 * cache and (rows > 1 or len(room) > 1)
    engine = Engine(gpt, cache=2 * (fixed + 24 * each))
    assert engine.capacity == (24 if each else 32)
    for tight, count in [(engine, 25)] * (each > 0) + [(Engine(gpt, cache=2 * fixed - 1), 2)]:
        with pytest.raises(ValueError, match=f"a request of {count} tokens, the engine has room for {tight.capacity}$"):
            tight.submit(Request([1], count - 1))


def test_log_probabilities_are_the_models_own():
    gpt = make_model(block_size=64)
    for sampling in (GREEDY, PLAIN, Sampling(0.7, 3, 0.9, 0.1, 1.5, 0.5)):
        request = Request([3, 1, 4], 20, sampling, 5, bias={7: 3.0, 8: -2.0})
        decode(gpt, [request, Request([9], 30, PLAIN)])
        with torch.no_grad():
            row = gpt(torch.tensor([request.prompt + request.output]))[0].log_softmax(-1)
        want = [row[2 + i, token].item() for i, token in enumerate(request.output)]
        np.testing.assert_allclose(request.logprobs, want, rtol=1e-4)
    assert request.logprobs != [0.0] * 20


def test_a_bias_is_added_to_the_logits():
    gpt = make_model()
    free, always, never = decode(gpt, [Request([1, 2], 9, GREEDY, bias=bias) for bias in ({}, {5: 1e3}, {})])
    assert always == [5] * 9 and free == never
    [without] = decode(gpt, [Request([1, 2], 9, GREEDY, bias={token: -1e3 for token in free})])
    assert not set(without) & set(free)


def test_only_the_tokenizers_tokens_are_produced():
    gpt = make_model()
    assert max(decode(gpt, [Request([1], 30, PLAIN)])[0]) >= 20
    assert max(decode(gpt, [Request([1], 30, PLAIN)], vocab_size=20)[0]) < 20


def test_the_penalty_sees_prompt_and_output():
    gpt, context = make_model(block_size=64), [3, 1, 4]
    for _ in range(30):
        with torch.no_grad():
            row = gpt(torch.tensor([context]))[0, -1].tolist()
        context.append(int(np.argmax(brute_repetition_penalty(row, 1.5, context))))
    assert decode(gpt, [Request([3, 1, 4], 30, Sampling(0, repetition_penalty=1.5))]) == [context[3:]]
    assert context[3:] != plain_loop(gpt, [3, 1, 4], 30)


@pytest.mark.parametrize("prompt", [[], [-1], [40], [1, 2, 99]])
def test_engine_refuses_ids(prompt):
    with pytest.raises(ValueError, match="0 to 39"):
        Engine(make_model(), [Request([1]), Request(prompt)])


@pytest.mark.parametrize("sampling", [PLAIN, GREEDY])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_model_is_said_to_be_one(sampling, value):
    gpt = make_model()
    gpt.head.weight.data[3, 3] = value
    with pytest.raises(ValueError, match="diverged"):
        decode(gpt, [Request([1], 3, sampling)])


# --------------------------------------------------------------------------------------------------------- text streams

def brute_stop(text, stops):
    """Character by character: what stands before the first stop string to be complete."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[:end - max(map(len, found))], True
    return text, False


def test_stop_strings_wherever_the_text_is_cut():
    rng, stopped_ones = random.Random(5), 0
    for _ in range(800):
        text = "".join(rng.choices("ab\n", k=rng.randint(0, 14)))
        stops = ["".join(rng.choices("ab\n", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        want, stopped = brute_stop(text, stops)
        stream, fed, out, at = TextStream(stops), "", "", 0
        while at < len(text) and not stream.stopped:
            size = rng.randint(1, 5)
            fed, at = text[:at + size], at + size
            out += stream.feed(text[at - size:at].encode(), final=at >= len(text))
            if not stream.stopped:  # it holds back what may become a stop string, and nothing else
                held = max((n for stop in stops for n in range(len(stop)) if fed.endswith(stop[:n])), default=0)
                assert out == (fed if at >= len(text) else fed[:len(fed) - held])
        assert (out, stream.stopped) == (want, stopped)
        stopped_ones += stopped
    assert 150 < stopped_ones < 650


def test_half_characters_wait():
    text = "naïve — 東京 😀 e\u0301\n"
    data = text.encode()
    rng = random.Random(1)
    for _ in range(200):
        cuts = sorted(rng.choices(range(len(data) + 1), k=rng.randint(0, 12)))
        stream = TextStream(["never"])
        pieces = [stream.feed(data[a:b]) for a, b in zip([0, *cuts], [*cuts, len(data)])] + [stream.feed(b"", True)]
        assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    for _ in range(300):  # bytes that are no UTF-8: as the whole would be decoded
        data = bytes(rng.choices([0x61, 0x80, 0xc3, 0xa9, 0xe6, 0x9d, 0xf0, 0x9f, 0xff], k=8))
        stream = TextStream()
        pieces = [stream.feed(data[i:i + 1]) for i in range(8)] + [stream.feed(b"", True)]
        assert "".join(pieces) == data.decode("utf-8", "replace")


@pytest.mark.parametrize("stops", [[""], ["a", ""], ""])
def test_text_stream_refuses(stops):
    with pytest.raises(ValueError, match="stop strings"):
        TextStream(stops)


@pytest.mark.parametrize("words, stops", [
    ("", []), ("a", ["a"]), ("a,b c", ["a", "b c"]), (r"\n\n,x", ["\n\n", "x"]),
    (r"\d", [r"\d"]), ("a\\", ["a\\"]), (",,a,", ["a"]), ("\n,é", ["\n", "é"])])
def test_the_stop_option(words, stops):
    assert sample.wishes(sample.Options(stop=words))["stop"] == stops


# --------------------------------------------------------------------------------------------------- from text to text

def test_generate_stops_streams_and_ends(byte_tokenizer):
    text = "über 東京 STOP and 😀 more"
    script = Script(list(text.encode()) + [byte_tokenizer.special_tokens[END]] * 9)
    def say(**how):
        return sample.generate(script, byte_tokenizer, ["x"], **how)
    assert say() == [text] and say(max_new_tokens=0) == [""]
    assert say(stop=["STOP", "more"]) == [text.split("STOP")[0]]
    assert say(stop=["never"], n_samples=2) == [text, text]
    assert say(max_new_tokens=7) == ["über \ufffd"], "the budget ends within a character"
    requests = sample.ask(byte_tokenizer, "x", stop=["STOP"])
    pieces = [(piece, requests[0].done) for _, piece in sample.stream(Engine(script, requests), byte_tokenizer)]
    assert pieces == [(c, "") for c in "über 東京 "] + [("", "stop")]
    assert len(requests[0].output) == len("über 東京 STOP".encode())
    requests = sample.ask(byte_tokenizer, "x")
    list(sample.stream(Engine(script, requests), byte_tokenizer))
    assert requests[0].done == "end"


def test_generate_is_each_prompt_alone(gpt, tokenizer):
    prompts = ["def ", "", "return the model, the tokens\n" * 9, "é"]
    for how in (dict(temperature=0), dict(temperature=1.0, top_k=0, seed=3), dict(seed=3, n_samples=2)):
        together = sample.generate(gpt, tokenizer, prompts, max_new_tokens=50, **how)
        alone = [sample.generate(gpt, tokenizer, [prompt], max_new_tokens=50, **how) for prompt in prompts]
        assert together == sum(alone, []) and len(set(together)) == len(together)
    assert sample.generate(gpt, tokenizer, []) == []


def test_samples_of_a_prompt(gpt, tokenizer):
    five = sample.generate(gpt, tokenizer, ["def "], n_samples=5, seed=1, max_new_tokens=20)
    assert five[:2] == sample.generate(gpt, tokenizer, ["def "], n_samples=2, seed=1, max_new_tokens=20)
    other = sample.generate(gpt, tokenizer, ["def "], n_samples=5, seed=2, max_new_tokens=20)
    assert len({*five, *other}) == 10, "no sample of another seed is among them"


def test_a_prompt_in_tokens(tokenizer):
    end = tokenizer.special_tokens[END]
    [request] = sample.ask(tokenizer, "")
    assert request.prompt == [end] and request.end == end
    [request] = sample.ask(tokenizer, f"a{END}b")
    assert end not in request.prompt and tokenizer.decode(request.prompt) == f"a{END}b"


@pytest.mark.parametrize("how, message", [
    (dict(n_samples=0), "n_samples=0"), (dict(max_new_tokens=-1), "max_new_tokens=-1"), (dict(temperature=-1), "temperature"),
    (dict(stop=[""]), "stop"), (dict(top_p=2), "top_p")])
def test_generate_refuses(gpt, tokenizer, how, message):
    with pytest.raises(ValueError, match=message):
        sample.generate(gpt, tokenizer, ["a"], **how)
    with pytest.raises(ValueError, match="no tokenizer"):
        sample.generate(gpt, None, ["a"])


@pytest.mark.parametrize("kind", ["char", "word", "byte", "bpe"])
def test_every_kind_of_tokenizer(kind):
    tokenizer = bpe.train(kind, ["the cat sat on the mat\n" * 9], 300 if kind in ("byte", "bpe") else 20)
    gpt = make_model(vocab_size=tokenizer.vocab_size)
    together = sample.generate(gpt, tokenizer, ["the ", "zebra"], max_new_tokens=40)
    alone = [sample.generate(gpt, tokenizer, [prompt], max_new_tokens=40)[0] for prompt in ("the ", "zebra")]
    assert together == alone and len(set(alone)) == 2


# ------------------------------------------------------------------------------------------------------------ checkpoints

def save(path, gpt, tokenizer=None, **rest):
    held = dict(train={}, optimizer={}, step=0, tokenizer=tokenizer.to_dict() if tokenizer else None)
    model.save_checkpoint(path, gpt.float(), **held | rest)
    return path


@pytest.fixture
def ckpt(tmp_path, tokenizer):
    return save(tmp_path / "ckpt.pt", make_model(vocab_size=tokenizer.vocab_size, block_size=32), tokenizer)


def test_load(ckpt, tmp_path, tokenizer):
    gpt, loaded = sample.load(ckpt, "cpu")
    assert not gpt.training and loaded.to_dict() == tokenizer.to_dict() and gpt.config.block_size == 32
    want = make_model(vocab_size=tokenizer.vocab_size, block_size=32).float()
    assert all(torch.equal(a, b) for a, b in zip(gpt.parameters(), want.parameters(), strict=True))
    assert sample.load(save(tmp_path / "bare.pt", make_model()))[1] is None


class Offender:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_malicious_checkpoint_is_not_executed(tmp_path, ckpt):
    mark, whole = tmp_path / "mark", model.load_checkpoint(ckpt)
    torch.save(whole | {"train": Offender(mark)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"version": 1, "train": Offender(mark)}, protocol=2))
    torch.save(whole | {"tokenizer": Offender(mark)}, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    for name in "abc":
        with pytest.raises(ValueError, match="nothing in it was executed"):
            sample.load(tmp_path / f"{name}.pt")
    assert not mark.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert mark.exists(), "the offender does nothing, so the test shows nothing"


def damage(path, tmp_path, kind, tokenizer):
    """A file that is no good checkpoint, in one of many ways."""
    whole, bad = model.load_checkpoint(path), tmp_path / "bad.pt"
    data = path.read_bytes()
    small = bpe.train("byte", ["abc"], 257).to_dict()
    files = {"empty": b"", "text": b"def main():\n", "half": data[:len(data) // 2], "zip": data[:-40]}
    dicts = {
        "list": [1, 2], "foreign": {"state_dict": whole["weights"]}, "version": whole | {"version": 99},
        "config": whole | {"config": 5}, "field": whole | {"config": whole["config"] | {"n_layers": 3}},
        "type": whole | {"config": whole["config"] | {"n_layer": "two"}}, "weights": whole | {"weights": 7},
        "shape": whole | {"config": whole["config"] | {"n_embd": 32}}, "tokenizer": whole | {"tokenizer": {"kind": "bpe"}},
        "tokenizer type": whole | {"tokenizer": "bpe"}, "vocab": whole | {"tokenizer": bpe.train("char", [bytes(range(32, 127)).decode() + "é" * 9 + "".join(map(chr, range(900, 1300)))], 400).to_dict()},
        "no tokenizer": whole | {"tokenizer": None}, "small vocab": whole | {"tokenizer": small}}
    if kind in files:
        bad.write_bytes(files[kind])
    else:
        torch.save(dicts[kind], bad)
    return bad


@pytest.fixture
def main(monkeypatch, capsys):
    """A function that runs the command line in this process: (exit code, stdout, stderr)."""
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words)])
        code = 0
        try:
            sample.run(sample.main)
        except SystemExit as error:
            code = error.code
        out, err = capsys.readouterr()
        return (code, out, err) if isinstance(code, int) else (1, out, f"{code}\n{err}")
    return call


@pytest.mark.parametrize("kind, message", [
    ("empty", "not a checkpoint"), ("text", "not a checkpoint"), ("half", "damaged"), ("zip", "damaged"),
    ("list", "not a checkpoint"), ("foreign", "not a checkpoint"), ("version", "format"), ("config", "does not fit"),
    ("field", "n_layers"), ("type", "does not fit"), ("weights", "does not fit"), ("shape", "does not fit"),
    ("tokenizer", "not a tokenizer"), ("tokenizer type", "not a tokenizer"), ("vocab", "do not belong together"),
    ("no tokenizer", "no tokenizer")])
def test_bad_checkpoints(ckpt, tmp_path, main, tokenizer, kind, message):
    code, out, err = main(f"--ckpt={damage(ckpt, tmp_path, kind, tokenizer)}", "--max_new_tokens=3")
    assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith("sample.py: ") and message in err, err


def test_a_tokenizer_for_a_checkpoint_without_one(ckpt, tmp_path, main, tokenizer):
    bare, words = damage(ckpt, tmp_path, "no tokenizer", tokenizer), ["--prompt=the", "--max_new_tokens=9"]
    tokenizer.save(tmp_path / "tokenizer.json")
    assert main(f"--ckpt={bare}", f"--tokenizer={tmp_path}", *words)[:2] == main(f"--ckpt={ckpt}", *words)[:2]
    code, _, err = main(f"--ckpt={ckpt}", f"--tokenizer={tmp_path}", *words)
    assert code == 1 and "a tokenizer of its own" in err


def test_a_vocabulary_below_the_models_is_no_mistake(ckpt, tmp_path, main, tokenizer):
    code, out, err = main(f"--ckpt={damage(ckpt, tmp_path, 'small vocab', tokenizer)}", "--prompt=é", "--temperature=2")
    assert code == 0 and out.startswith("é")


# --------------------------------------------------------------------------------------------------------- command line

@pytest.mark.parametrize("words, message", [
    (["--temperature=-1"], "--temperature=-1"), (["--top_p=0"], "--top_p=0"), (["--top_p=1.5"], "--top_p=1.5"),
    (["--top_k=-1"], "--top_k=-1"), (["--min_p=2"], "--min_p=2"), (["--repetition_penalty=0"], "--repetition_penalty=0"),
    (["--n_samples=0"], "--n_samples=0"), (["--n_samples=100000"], "must be 1 to 65,536"), (["--max_new_tokens=-1"], "--max_new_tokens=-1"),
    (["--device=tpu9"], "--device=tpu9"), (["--device=cuda:77"], "--device=cuda:77"), (["--dtype=int8"], "choose from float32, bfloat16, float16"), (["--device=meta"], "--device=meta"),
    (["--device=cpu", "--graphs"], "--graphs records CUDA graphs")])
def test_options_that_are_refused(ckpt, main, words, message):
    code, out, err = main(f"--ckpt={ckpt}", "--max_new_tokens=3", *words)
    assert (code, out, err.count("\n")) == (1, "", 1) and message in err, err


@pytest.mark.parametrize("words, message", [
    ("--bench --max_new_tokens=8", "--max_new_tokens does nothing for bench; it is for samples, "), ("--bench --top_k=3", "--top_k does nothing"),
    ("--chat --n_samples=2", "--n_samples does nothing for chat"), ("--chat --prompt=a", "--prompt does nothing"),
    ("--serve --system=Be", "--system does nothing for serve; it is for chat"), ("--serve --seed=3", "--seed does nothing"),
    ("--compare=other.json", "--compare does nothing for samples; it is for eval"), ("--output=text.txt", "--output does nothing for samples"),
    ("--eval=ppl --template=chatml", "--template does nothing"), ("--bench --serve", "--bench and --serve: one at a time")])
def test_no_mode_ignores_an_option(ckpt, main, words, message):
    code, out, err = main(f"--ckpt={ckpt}", *words.split())
    assert (code, out, err.count("\n")) == (1, "", 1) and message in err, err


def test_the_modes_of_each_option_are_modes():
    assert {*sample.FOR} < {*vars(sample.Options())} and {*" ".join(sample.FOR.values()).split()} == {"samples", *sample.MODES}


@pytest.mark.parametrize("dtype, off", [("float32", 0), ("bfloat16", 0.06), ("float16", 0.008)])
def test_numbers_of_other_types(ckpt, main, monkeypatch, dtype, off):
    """All weights and the state are of that type, and logits near those of single precision."""
    engines = []
    monkeypatch.setattr(sample, "Engine", lambda *words, **how: engines.append(Engine(*words, **how)) or engines[-1])
    code, out, err = main(f"--ckpt={ckpt}", f"--dtype={dtype}", "--prompt=one two", "--max_new_tokens=3", "--device=cpu")
    assert code == 0 and out.startswith("one two"), err
    gpt, kind = engines[0].model, getattr(torch, dtype)
    assert {weight.dtype for weight in gpt.parameters()} == {kind}
    x, state = torch.arange(8)[None], gpt.new_state(1)
    with torch.inference_mode():
        found, right = gpt(x, state).float(), sample.load(ckpt, "cpu")[0](x)
    assert {kept.dtype for layer in state.layers for kept in layer} == {kind}
    gap = (found - right).abs().max() / right.abs().max()
    assert gap == off == 0 or off / 50 < gap < off


def test_a_missing_checkpoint_says_how_to_make_one(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = main()
    assert (code, out, err.count("\n")) == (1, "", 1) and "out/ckpt.pt" in err and "`python train.py`" in err
    assert main(f"--ckpt={tmp_path}")[0] == 1


def test_samples_are_printed_in_order(ckpt, main):
    gpt, tokenizer = sample.load(ckpt, "cpu")
    # the stop strings end samples after different numbers of tokens
    texts = sample.generate(gpt, tokenizer, ["def "], n_samples=6, stop=["q", "w", "é"], seed=4, max_new_tokens=40)
    code, out, err = main(f"--ckpt={ckpt}", "--prompt=def ", "--n_samples=6", "--stop=q,w,é", "--seed=4", "--max_new_tokens=40")
    assert code == 0 and len({len(text) for text in texts}) > 3
    assert out == "\n---------------\n".join("def " + text for text in texts) + "\n"
    assert err.count("\n") == 1 and "prefill " in err and err.count("/s)") == 2


def test_the_first_sample_streams_and_the_others_wait(gpt, tokenizer, monkeypatch):
    class Terminal(io.StringIO):
        flushes = []

        def flush(self):
            self.flushes.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Terminal())
    requests = sample.ask(tokenizer, "def ", 3, 20, seed=1)
    texts = sample.complete(Engine(gpt, requests), tokenizer, requests, requests[1])
    shown = Terminal.flushes
    assert len(set(shown)) > 15 and sys.stdout.getvalue() == texts[1], "text comes piece by piece"
    assert texts == sample.generate(gpt, tokenizer, ["def "], n_samples=3, seed=1, max_new_tokens=20)
    assert all(texts[1].startswith(text) for text in shown)


def test_options_change_the_text(ckpt, main):
    words = f"--ckpt={ckpt}", "--prompt=return ", "--max_new_tokens=80", "--n_samples=2"
    plain = main(*words)
    assert main(*words)[:2] == plain[:2]
    assert main(*words, "--temperature=0")[1] == main(*words, "--temperature=0", "--seed=1")[1]
    for word in ("--seed=1", "--repetition_penalty=9", "--top_k=2", "--presence_penalty=9"):
        assert main(*words, word)[1] != plain[1], word


def test_the_default_prompt_is_a_new_line(ckpt, main):
    assert main(f"--ckpt={ckpt}", "--max_new_tokens=0")[1] == "\n\n"
    assert main(f"--ckpt={ckpt}", "--prompt=def ", "--max_new_tokens=0")[1] == "def \n"


def test_a_prompt_longer_than_the_block_is_said(ckpt, main):
    gpt, tokenizer = sample.load(ckpt, "cpu")
    prompt = "the tokens, " * 40
    code, out, err = main(f"--ckpt={ckpt}", f"--prompt={prompt}", "--temperature=0", "--max_new_tokens=9")
    last = tokenizer.encode(prompt)[-32:]
    request = Request(last, 9, GREEDY, end=tokenizer.special_tokens[END])
    decode(gpt, [request], vocab_size=tokenizer.vocab_size)
    assert code == 0 and out == prompt + tokenizer.decode([i for i in request.output if i != request.end]) + "\n"
    assert err.count("\n") == 2 and f"the prompt has {len(tokenizer.encode(prompt))} tokens" in err and "last 32" in err


def test_bench(ckpt, main):
    recorder = Recorder(make_model(block_size=24))
    lines = list(sample.bench_model(recorder, 8))
    assert recorder.shapes[:16] == [(1, 16)] + [(1, 1)] * 7 + [(1, 16)] + [(4, 1)] * 7 and len(lines) == 6
    assert [(line.split()[0], line.split()[3]) for line in lines[2:]] == [("1", "7"), ("4", "28"), ("16", "112"), ("64", "448")]
    assert max(map(len, lines)) <= 80
    code, out, err = main(f"--ckpt={ckpt}", "--bench")
    assert code == 0 and out.count("tokens/s") == 2 and len(out.splitlines()) == 6


# ----------------------------------------------------------------------------------------------------------- conversations

TALK = [dict(role="system", content="Be brief."), dict(role="user", content="Hi <|im_end|>\n<|eot_id|>"),
        dict(role="assistant", content="Hello café!"), dict(role="user", content=""), dict(role="assistant", content="x")]
SPECIAL = "<|endoftext|>,<|im_start|>,<|im_end|>,<|begin_of_text|>,<|start_header_id|>,<|end_header_id|>,<|eot_id|>"


@pytest.fixture(scope="module")
def chat_tokenizer():
    return bpe.train("bpe", ["def main(argument):\n    return the model, user: the tokens\n" * 9], 330,
                     special_tokens=SPECIAL.split(","))


def written(template, message):
    """A message as the format's authors write it."""
    role, content = message["role"], message["content"]
    return {"chatml": ("", f"<|im_start|>{role}\n", content, "<|im_end|>", "\n"),
            "llama3": ("<|begin_of_text|>", f"<|start_header_id|>{role}<|end_header_id|>\n\n", content, "<|eot_id|>", ""),
            "bare": (END, "", content, END, ""),
            "plain": ("", f"{role}: ", content, END, "\n")}[template]


@pytest.mark.parametrize("template", sample.TEMPLATES)
def test_render(template, chat_tokenizer):
    """The text is the format's; each special token is one id where the format has it and none where a user wrote it; the
    mask covers the assistant's words and their ends, nothing else."""
    ids, mask = sample.render(TALK, template, chat_tokenizer)
    parts = [written(template, message) for message in TALK]
    assert chat_tokenizer.decode(ids) == parts[0][0] + "".join("".join(part[1:]) for part in parts)
    own = "".join(part[2] + part[3] for message, part in zip(TALK, parts) if message["role"] == "assistant")
    assert len(mask) == len(ids) and set(mask) == {0, 1}
    assert chat_tokenizer.decode([i for i, m in zip(ids, mask) if m]) == own
    end = chat_tokenizer.special_tokens[parts[0][3]]
    first = parts[0][0] == parts[0][3]  # one more, before all
    assert ids.count(end) == len(TALK) + first, "one for each message, none from the text of a user"
    assert [i for i, m in zip(ids, mask) if m].count(end) == 2
    for special in set(chat_tokenizer.special_tokens.values()) & set(ids):
        assert chat_tokenizer.decode([special]) in "".join(parts[0])
    asked, quiet = sample.render(TALK[:2], template, chat_tokenizer, reply=True)
    assert ids[:len(asked)] == asked and not any(quiet) and mask[len(asked)] == 1, "a prompt is the beginning of the whole"


def test_render_is_chatml_of_transformers(chat_tokenizer):
    """The template of Qwen and others, run by jinja, on text without special tokens."""
    jinja2 = pytest.importorskip("jinja2", reason="jinja2 is not installed")
    source = ("{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    talk = [message | dict(content=message["content"].replace("<|", "<")) for message in TALK]
    want = jinja2.Template(source, keep_trailing_newline=True).render(messages=talk[:4], add_generation_prompt=True)
    assert chat_tokenizer.decode(sample.render(talk[:4], "chatml", chat_tokenizer, True)[0]) == want


@pytest.mark.parametrize("messages", [[{}], [dict(role="user")], [dict(role="<|im_end|>", content="x")],
                                      [dict(role="user", content=5)], [dict(content="x")]])
def test_render_refuses(messages, chat_tokenizer, tokenizer):
    with pytest.raises(ValueError, match="a message has"):
        sample.render(messages, "chatml", chat_tokenizer)
    with pytest.raises(ValueError, match="chatml needs the special tokens"):
        sample.render(TALK, "chatml", tokenizer)
    with pytest.raises(ValueError, match="choose from chatml, llama3, plain"):
        sample.render(TALK, "chatlm", tokenizer)


def test_chat(tmp_path, chat_tokenizer, main, monkeypatch):
    gpt = make_model(vocab_size=chat_tokenizer.vocab_size, block_size=64)
    path = save(tmp_path / "chat.pt", gpt, chat_tokenizer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nthe model <|im_end|>\n"))
    code, out, err = main(f"--ckpt={path}", "--chat", "--system=Be", "--template=chatml", "--max_new_tokens=9", "--temperature=0")
    assert code == 0 and err == ""
    talk, want = [dict(role="system", content="Be")], ""
    for line in ("Hi", "the model <|im_end|>"):
        talk.append(dict(role="user", content=line))
        ids, _ = sample.render(talk, "chatml", chat_tokenizer, True)
        request = Request(ids, 9, GREEDY, end=chat_tokenizer.special_tokens["<|im_end|>"])
        decode(sample.load(path, "cpu")[0], [request])
        talk.append(dict(role="assistant", content=chat_tokenizer.decode([i for i in request.output if i != request.end])))
        want += talk[-1]["content"] + "\n"
    assert out == want and len(want) > 9


# one process each, as a user starts it

def start(*words, **how):
    return subprocess.Popen([sys.executable, str(ROOT / "sample.py"), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **how)


def test_the_script_by_itself(ckpt, main):
    """Bytes of the prompt that are no UTF-8 are U+FFFD for the model; stdout holds the text and nothing else."""
    process = start(f"--ckpt={ckpt}", b"--prompt=caf\xe9 \xf0\x9f\x98\x80", "--max_new_tokens=20", "--seed=5")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0 and err.count(b"\n") == 1, err
    want = main(f"--ckpt={ckpt}", "--prompt=caf\ufffd 😀", "--max_new_tokens=20", "--seed=5")[1]
    assert out.decode().removeprefix("caf? 😀") == want.removeprefix("caf\ufffd 😀")


def test_ctrl_c_leaves_what_was_printed(ckpt):
    process = start(f"--ckpt={ckpt}", "--prompt=def ", "--max_new_tokens=1000000", f"--stop={END}")
    begun = process.stdout.read(200)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130 and begun.startswith(b"def ")
    assert b"Traceback" not in err and err.count(b"\n") == 1 and b"/s)" in err


def test_a_closed_pipe_is_no_error(ckpt):
    process = start(f"--ckpt={ckpt}", "--max_new_tokens=1000000", "--n_samples=3")
    process.stdout.read(20)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=100) == 0 and b"Traceback" not in err and b"Exception" not in err


# -------------------------------------------------------------------------------------------------------------- evaluation

HELLASWAG = [dict(ind=i, activity_label="Cooking [x]", ctx_a=f"A man {i} [title] stirs", ctx_b="he then",
                  endings=[f"sleeps {i}.", "eats  it all.", "[step] café.", "goes."], label=str(i % 4)) for i in range(7)]
GSM8K = [dict(question=f"What is {i} + 1,000?", answer=f"{i} + 1000 = <<x>>{i + 1000}\n#### 1,00{i}") for i in range(6)]


@pytest.fixture
def eval_data(tmp_path):
    folder = tmp_path / "data"
    (folder / "mmlu").mkdir(parents=True)
    (folder / "hellaswag_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*HELLASWAG, HELLASWAG[0]]))
    (folder / "gsm8k_test_400.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GSM8K[:4]))
    (folder / "gsm8k_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GSM8K[4:]))
    (folder / "mmlu" / "high_school_art_dev.csv").write_text('"Is it ""red""?",yes,no,both,neither,B\n')
    (folder / "mmlu" / "high_school_art_test.csv").write_text('What is red?,one,two,three,four,D\n"a\nb",1,2,3,4,A\n')
    (folder / "text.txt").write_bytes("the model returns the tokens\r\nof the café\n".encode() * 9)
    return folder


@pytest.fixture
def exam(gpt, tokenizer, eval_data):
    """An exam in float64 on texts that the block holds."""
    big = make_model(vocab_size=tokenizer.vocab_size, block_size=512)
    o = sample.Options(eval_data=str(eval_data), shots=1, max_new_tokens=9)
    return sample.Exam(Engine(big, (), tokenizer.vocab_size), tokenizer, o)


def items_of(exam, name):
    find, _, *how = sample.TASKS[name]
    return list(find(exam, *how))


def test_items_are_read_as_the_harness_reads_them(exam):
    rows = items_of(exam, "hellaswag")
    assert len(rows) == 7, "the same row twice counts once"
    assert rows[2][1] == ("Cooking : A man 2.  stirs He then".replace("  ", " "),
                          [" sleeps 2.", " eats it all.", "  café.", " goes."], 2)
    first, second = (item for _, item in items_of(exam, "mmlu"))
    assert first[0] == ("The following are multiple choice questions (with answers) about high school art.\n\n"
                        'Is it "red"?\nA. yes\nB. no\nC. both\nD. neither\nAnswer: B\n\n'
                        "What is red?\nA. one\nB. two\nC. three\nD. four\nAnswer:")
    assert first[1:] == ([" A", " B", " C", " D"], 3) and second[2] == 0 and "\n\na\nb\nA. 1" in second[0]
    key, item = items_of(exam, "gsm8k")[3]
    assert key == "gsm8k_test_400.jsonl 3" and item[0] == (
        "Question: What is 4 + 1,000?\nAnswer: 4 + 1000 = <<x>>1004\n#### 1,004\n\nQuestion: What is 3 + 1,000?\nAnswer:")
    exam.o = dataclasses.replace(exam.o, shots=0)
    assert items_of(exam, "gsm8k")[0][1][0] == "Question: What is 0 + 1,000?\nAnswer:"


def brute_logprobs(gpt, ids, end):
    """The log-probabilities of each token of `end` behind `ids`, from one whole forward pass."""
    with torch.no_grad():
        rows = gpt(torch.tensor([ids + end]))[0].float().log_softmax(-1)
    return [rows[len(ids) - 1 + i, token].item() for i, token in enumerate(end)]


def test_scores_are_those_of_whole_passes(exam):
    gpt, rng = exam.engine.model, random.Random(1)
    ids = rng.choices(range(250), k=40)
    for shared in (40, 25, 0, 39):  # what follows shares a beginning with what came before
        ids = ids[:shared] + rng.choices(range(250), k=40 - shared)
        ends = [rng.choices(range(250), k=k) for k in (1, 5, 2, 1)]
        before = exam.engine.past.computed
        for got, end in zip(exam.score(ids, ends), ends, strict=True):
            np.testing.assert_allclose(got, brute_logprobs(gpt, ids, end), rtol=1e-5)
        assert exam.engine.past.computed - before == 40 - min(shared, 39) * (before > 0)
    long = rng.choices(range(250), k=600)
    [got] = exam.score(long, [[5, 6, 7]])
    np.testing.assert_allclose(got, brute_logprobs(gpt, long[-509:], [5, 6, 7]), rtol=1e-5)


def test_choices(exam):
    """Sums and their four norms, on rows of the files and on rows whose choices differ in length and in script."""
    tokenizer, picks, rng = exam.tokenizer, {}, random.Random(2)
    odd = [("the", [" " + "".join(rng.choices(rng.choice(("abc model", "éüø東")), k=rng.randint(1, 12))) for _ in range(4)], i % 4)
           for i in range(60)]
    for item in odd + [item for _, item in items_of(exam, "hellaswag") + items_of(exam, "mmlu")]:
        context, choices, gold = item
        got, sums = exam.choice(item), []
        for text in choices:
            whole, ids = tokenizer.encode(context + text), tokenizer.encode(context)
            sums.append(sum(brute_logprobs(exam.engine.model, ids, whole[len(ids):])))
        np.testing.assert_allclose(got["answer"], sums, rtol=1e-4)
        sizes = {"acc": lambda text: 1, "acc_norm": lambda text: len(text) - 1, "acc_byte": lambda text: len(text.encode()) - 1,
                 "acc_token": lambda text: len(tokenizer.encode(context + text)) - len(tokenizer.encode(context))}
        for name, size in sizes.items():
            means = [total / size(text) for total, text in zip(sums, choices)]
            assert got[name] == [int(means.index(max(means)) == gold), 1]
            picks.setdefault(name, []).append(means.index(max(means)))
        bits, size = got["gold_bits_per_byte"]
        assert bits == pytest.approx(-sums[gold] / math.log(2), rel=1e-4) and size == len(choices[gold].encode()) - 1
    assert len(set(map(tuple, picks.values()))) == 4, "two norms choose alike, so the test does not tell them apart"


def test_perplexity_counts_every_token_once(exam, eval_data):
    ids = [exam.tokenizer.special_tokens[END], *exam.tokenizer.encode((eval_data / "text.txt").read_bytes().decode())]
    exam.engine = Engine(make_model(vocab_size=exam.tokenizer.vocab_size, block_size=32), (), 0)
    rows = items_of(exam, "ppl")
    assert sum((item[1] for _, item in rows), []) == ids[1:] and all(len(item[0]) == 16 for _, item in rows[1:])
    grades = [exam.text(item) for _, item in rows]
    want = sum(sum(brute_logprobs(exam.engine.model, item[0], item[1])) for _, item in rows)
    assert sum(grade["nats_per_token"][0] for grade in grades) == pytest.approx(-want, rel=1e-5)
    assert sum(grade["nats_per_token"][1] for grade in grades) == len(ids) - 1
    assert sum(grade["bits_per_byte"][1] for grade in grades) == (eval_data / "text.txt").stat().st_size


@pytest.mark.parametrize("text, number", [
    ("so 3 + 4 = 7\n#### 7\nand 9", "7"), ("it is $1,234.", "1234"), ("#### -5", "-5"), ("2 or 3.50 dollars", "3.50"),
    ("none", ""), ("#### none", ""), ("x #### 1,000,000", "1000000")])
def test_final_number(text, number):
    assert sample.final_number(text) == number


def test_pass_at_k_is_the_share_of_all_draws():
    for n in range(1, 7):
        for right in range(n + 1):
            for k in range(1, n + 1):
                draws = [any(i < right for i in drawn) for drawn in itertools.combinations(range(n), k)]
                assert sample.pass_at(k, right, n) == pytest.approx(sum(draws) / len(draws))


def test_gsm8k_right_and_wrong(byte_tokenizer, eval_data):
    for said, right in (("so #### 1,002\nQuestion: 7", [0, 0, 1, 0]), ("1000", [1, 0, 0, 0])):
        script = Script(list(said.encode()) + [byte_tokenizer.special_tokens[END]] * 9)
        o = sample.Options(eval_data=str(eval_data), n_samples=3, shots=0)
        for (_, item), want in zip(items_of(sample.Exam(None, byte_tokenizer, o), "gsm8k"), right):
            script.start = len(byte_tokenizer.encode(item[0]))
            grade = sample.Exam(Engine(script, (), 257), byte_tokenizer, o).solution(item)
            assert grade["pass@1"] == grade["pass@3"] == [want, 1]
            assert grade["answer"] == [said.split("Question:")[0]] * 3
    script.start = len(byte_tokenizer.encode(item[0]))
    o = sample.Options(eval_data=str(eval_data), shots=0, stop="00")
    assert sample.Exam(Engine(script, (), 257), byte_tokenizer, o).solution(item)["answer"] == ["1"], "--stop counts, too"


def test_summary():
    value, low, high = sample.summary([[1, 1]] * 30 + [[0, 1]] * 70)
    assert value == 0.3 and low == pytest.approx(0.3 - 1.96 * 0.0458, abs=0.02) and high == pytest.approx(0.39, abs=0.02)
    assert sample.summary([[6, 2], [2, 2]])[0] == 2.0
    assert sample.summary([[1, 2]] * 9) == [0.5] * 3, "no spread, no interval"


def test_scores_of_items_that_have_them():
    """A line for each metric over the items that have it; a comparison over those of both; none where there are none."""
    pair = lambda right: [right, 1]
    ours = {"a": {"item": 1, "short": pair(1)}, "b": {"item": 2, "short": pair(0), "long": pair(1)}, "c": {"item": 3, "long": pair(1)}}
    theirs = {"b": {"item": 2, "short": pair(1), "long": pair(0)}, "d": {"item": 4, "long": pair(1)}}
    assert [line.partition(" (")[0] for line in sample.summaries("t", ours)] == ["t short: 0.5000", "t long: 1.0000"]
    assert list(sample.summaries("t", ours, theirs, "x.json")) == [
        "t short: -1.0000 (-1.0000 to -1.0000) over x.json, on 1 items", "t long: +1.0000 (+1.0000 to +1.0000) over x.json, on 1 items"]
    assert list(sample.summaries("t", ours, {}, "x.json")) == list(sample.summaries("t", {})) == []


def test_the_eval_option(ckpt, main, eval_data, tmp_path, monkeypatch):
    """A line for each score; all items in one file; a second run asks the model nothing, an interrupted one the rest."""
    output = tmp_path / "eval.json"
    words = [f"--ckpt={ckpt}", "--eval=ppl,hellaswag,mmlu,gsm8k", f"--eval_data={eval_data}", f"--output={output}",
             "--max_new_tokens=5", "--n_samples=2"]
    code, out, err = main(*words)
    assert code == 0, err
    held = json.loads(output.read_text())
    names = [line.split(":")[0] for line in out.splitlines()]
    assert names == [f"ppl {m}" for m in ("bits_per_byte", "nats_per_token")] + [
        f"{task} {m}" for task in ("hellaswag", "mmlu") for m in ("gold_bits_per_byte", "acc", "acc_token", "acc_norm", "acc_byte")
    ] + ["gsm8k pass@1", "gsm8k pass@2", "gsm8k maj@2", "gsm8k best@2"]
    assert [len(held[task]) for task in ("hellaswag", "mmlu", "gsm8k")] == [7, 2, 4]
    acc = [record["acc"][0] for record in held["hellaswag"].values()]
    assert f"hellaswag acc: {sum(acc) / 7:.4f} (" in out and held["settings"]["ckpt"] == str(ckpt)
    assert held["gsm8k"]["gsm8k_test_400.jsonl 0"]["item"][0].endswith("Question: What is 0 + 1,000?\nAnswer:")

    asked = []
    for name in ("choice", "solution", "text"):
        find, grade, *how = next(task for task in sample.TASKS.values() if task[1].__name__ == name)
        for task, row in list(sample.TASKS.items()):
            if row[1] is grade:
                spy = lambda exam, item, grade=grade: asked.append(item) or grade(exam, item)
                monkeypatch.setitem(sample.TASKS, task, (row[0], spy, *row[2:]))
    assert main(*words)[:2] == (0, out) and asked == []
    del held["mmlu"], held["gsm8k"]["gsm8k_test_400.jsonl 2"]
    output.write_text(json.dumps(held))
    assert main(*words)[0] == 0 and len(asked) == 3
    code, _, err = main(*words, "--shots=2")
    assert code == 1 and "other settings" in err
    for wrong in ([], 1.5, held | dict(mmlu=None), held | dict(mmlu=[1]), held | dict(ppl={"a.txt 1": 3}), dict(found=[]),
                  held | dict(ppl={"a.txt 1": dict(nats_per_token=["3", "4"])}), held | dict(ppl={"a.txt 1": dict(bits_per_byte=[1])})):
        output.write_text(json.dumps(wrong))
        code, _, err = main(*words)
        assert code == 1 and "no file of results" in err and err.count("\n") == 1 and json.loads(output.read_text()) == wrong


def test_results_are_of_this_model_and_these_items(ckpt, main, tmp_path):
    """A model trained anew under the same name is graded anew, and so is a text that is another one under the same name;
    items that are gone do not count; files may share a name.
    """
    for name, text in (("a/x.txt", "the one"), ("b/x.txt", "and the other one")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    words = [f"--ckpt={tmp_path / 'own.pt'}", "--eval=ppl", f"--eval_data={tmp_path}", f"--output={tmp_path / 'eval.json'}"]
    shutil.copy(ckpt, tmp_path / "own.pt")
    both = main(*words)[1]
    assert {*json.loads((tmp_path / "eval.json").read_text())["ppl"]} == {"a/x.txt 1", "b/x.txt 1"}
    (tmp_path / "b/x.txt").unlink()
    one = main(*words)[1]
    assert one != both and "eval.json.old" not in one
    (tmp_path / "a/x.txt").write_text("the two")
    other = main(*words)[1]
    assert other != one and other == main(*words[:3], f"--output={tmp_path / 'new.json'}")[1]
    (tmp_path / "a/x.txt").write_text("the one")
    assert main(*words)[1] == one
    weights = torch.load(ckpt, weights_only=True)
    weights["weights"]["norm.weight"] *= 2
    torch.save(weights, tmp_path / "own.pt")
    moved, *other = main(*words)[1].splitlines()
    assert "eval.json.old" in moved and other != one.splitlines() and len(other) == 2
    assert "b/x.txt 1" in json.loads((tmp_path / "eval.json.old").read_text())["ppl"]
    for missing in ("", tmp_path / "nosuch", tmp_path / "own.pt"):
        code, _, err = main(*words[:2], f"--eval_data={missing}", words[3])
        assert code == 1 and f"--eval_data={missing} is none" in err


def test_what_an_item_needs_and_does_not_get(ckpt, main, tmp_path):
    """Less memory than a block takes cuts no context, which would be another score; nor does an answer beyond the block."""
    (tmp_path / "text.txt").write_text("the model returns the tokens, the model" * 5)
    words = f"--ckpt={ckpt}", f"--eval_data={tmp_path}", f"--output={tmp_path / 'eval.json'}"
    _, each = sample.row_bytes(sample.load(ckpt, "cpu")[0])
    code, out, err = main(*words, "--eval=ppl", f"--cache_gb={2 * 31.5 * each / 1e9}")
    assert code == 1 and "an item of 32 tokens, block or --cache_gb hold 31" in err and err.count("\n") == 1
    assert main(*words, "--eval=ppl", f"--cache_gb={2 * 32.5 * each / 1e9}")[0] == 0
    (tmp_path / "hellaswag_val.jsonl").write_text(json.dumps(HELLASWAG[0] | dict(endings=["x" * 40] * 4)))
    code, out, err = main(*words, "--eval=hellaswag")
    assert code == 1 and "--cache_gb hold 32" in err and err.count("\n") == 1
    code, out, err = main(*words, "--eval=passkey")
    assert code == 1 and "a block of 32 tokens is too short" in err and err.count("\n") == 1
    new = f"--output={tmp_path / 'new' / 'eval.json'}"
    for wrong, told in (("--eval=ppl,no", "--eval=no: choose from"), ("--compare=no.json", "no.json"), ("--shots=-1", "must not be negative"),
                        ("--eval=ppl,passkey", "is too short"), ("--eval=ppl,gsm8k", "no files for gsm8k")):
        code, out, err = main(*words[:2], "--eval=ppl", wrong, new)
        assert code == 1 and told in err and not out and not (tmp_path / "new").exists()
    assert main(*words[:2], "--eval=ppl", new)[0] == 0 and (tmp_path / "new/eval.json").exists()


def test_perplexity_of_the_smallest_block_and_of_a_diverged_model(main, tmp_path, tokenizer):
    (tmp_path / "text.txt").write_text("the model returns")
    gpt = make_model(vocab_size=tokenizer.vocab_size, block_size=2, mixer="attention")
    gpt.head.weight.data *= 1e4
    code, out, err = main(f"--ckpt={save(tmp_path / 'ckpt.pt', gpt, tokenizer)}", "--eval=ppl", f"--eval_data={tmp_path}",
                          f"--output={tmp_path / 'eval.json'}")
    assert code == 0 and out.endswith("perplexity inf\n"), err
    gpt = make_model(vocab_size=tokenizer.vocab_size, block_size=1, mixer="attention")
    code, out, err = main(f"--ckpt={save(tmp_path / 'one.pt', gpt, tokenizer)}", "--eval=ppl", f"--eval_data={tmp_path}",
                          f"--output={tmp_path / 'one.json'}")
    assert code == 1 and "an item of 2 tokens, block or --cache_gb hold 1" in err


def test_processes_share_the_items(ckpt, main, eval_data, tmp_path, monkeypatch, run_ranks):
    """Two processes go on from an interrupted file, and one of them writes and says what one process alone does."""
    def words(name):
        return [f"--ckpt={ckpt}", "--eval=ppl,hellaswag,mmlu,gsm8k", f"--eval_data={eval_data}", f"--output={tmp_path / name}",
                "--max_new_tokens=5", "--n_samples=2", "--device=cpu"]
    code, out, err = main(*words("one.json"))
    assert code == 0, err
    one = json.loads((tmp_path / "one.json").read_text())
    begun = {"settings": one["settings"], "fingerprint": one["fingerprint"], "ppl": one["ppl"], "hellaswag": dict([*one["hellaswag"].items()][:2])}
    (tmp_path / "two.json").write_text(json.dumps(begun))
    done = run_ranks(2, "sample.py", *words("two.json"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["settings"] == one["settings"] and list(two) == list(one)
    for task in ("ppl", "hellaswag", "mmlu", "gsm8k"):
        assert list(two[task]) == list(one[task])
        for key, record in one[task].items():
            for name, value in record.items():
                assert two[task][key][name] == (value if name == "item" or task == "gsm8k" else pytest.approx(value, rel=1e-4))
    for line, other in zip(out.splitlines(), done.stdout.splitlines(), strict=True):
        numbers = [[float(word) for word in re.findall(r"-?\d+\.\d+", text.partition(":")[2])] for text in (line, other)]
        assert line.partition(":")[0] == other.partition(":")[0] and numbers[0] == pytest.approx(numbers[1], abs=2e-4)
    find, grade, *how = sample.TASKS["hellaswag"]
    asked = []  # of the first of two, here where the second is a list of what it found
    monkeypatch.setitem(sample.TASKS, "hellaswag", (find, lambda exam, item: asked.append(item[0]) or grade(exam, item), *how))
    other = dict([*one["hellaswag"].items()][1::2])
    monkeypatch.setattr(sample, "gather", lambda own: [own, own if "settings" in own else other])
    assert main(*words("three.json"), "--eval=hellaswag")[0] == 0
    assert asked == [record["item"][0] for record in one["hellaswag"].values()][::2]
    assert json.loads((tmp_path / "three.json").read_text())["hellaswag"].keys() == one["hellaswag"].keys()
    monkeypatch.setenv("LOCAL_RANK", "0")
    code, _, err = main(f"--ckpt={ckpt}")
    assert code == 1 and "for --eval alone" in err and err.count("\n") == 1


@pytest.mark.parametrize("name, text, message", [
    ("hellaswag_val.jsonl", '{"ctx_a": "x"}\n', "hellaswag_val.jsonl, row 1 is damaged"),
    ("hellaswag_val.jsonl", json.dumps(HELLASWAG[0]) + "\n{", "row 2 is damaged"), ("x_test.csv", "a,b,c\n", "row 1"),
    ("x_test.csv", "q,a,b,c,d,E\n", "row 1"), ("x_test.csv", "q,a,b,c,d,\n", "row 1"), ("hellaswag_val.jsonl", "[1]\n", "row 1"), ("other.txt", "", "no files for")])
def test_bad_files_of_tasks(ckpt, main, tmp_path, name, text, message):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / name).write_text(text)
    task = "mmlu" if name.endswith("csv") else "hellaswag"
    code, out, err = main(f"--ckpt={ckpt}", f"--eval={task}", f"--eval_data={tmp_path / 'bad'}", f"--output={tmp_path / 'e.json'}")
    assert (code, out, err.count("\n")) == (1, "", 1) and message in err, err
    assert "choose from ppl" in main(f"--ckpt={ckpt}", "--eval=mmul", f"--output={tmp_path / 'e.json'}")[2]


def test_rows_may_follow_a_byte_order_mark_and_blank_lines(tmp_path):
    for name, text, want in (("a.jsonl", '{"a": 1}\n\n{}\n \r\n', [dict(a=1), {}]), ("a.csv", 'a,"b\n\nc"\n\nd,e\n\n', [["a", "b\n\nc"], ["d", "e"]])):
        for mark in (b"", b"\xef\xbb\xbf"):
            (tmp_path / name).write_bytes(mark + text.encode())
            assert sample.read_rows(lambda row: row, tmp_path / name) == want


def test_real_files(test_data, tokenizer, gpt):
    """The published files of MMLU and GSM8K are read whole: every row, its gold answer, its solved examples."""
    exam = sample.Exam(Engine(gpt), tokenizer, sample.Options(eval_data=str(test_data / "eval")))
    rows = items_of(exam, "gsm8k")
    assert len(rows) == 400 and all(sample.final_number(item[1][0]).lstrip("-").replace(".", "").isdigit() for _, item in rows)
    assert all(item[0].count("Question: ") == 6 for _, item in rows)
    rows = items_of(exam, "mmlu")
    assert {key.split()[0] for key, _ in rows} == {f"mmlu/test/{path.name}" for path in (test_data / "eval/mmlu/test").iterdir()}
    assert all(item[0].count("Answer:") == 6 and item[0].count("Answer: ") == 5 for _, item in rows)
