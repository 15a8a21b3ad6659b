"""sample.py against plain loops: filters by brute force, draws by chi-square, the engine against a model called anew for
every token, streams against whole texts, and the command line.
"""
import dataclasses
import io
import math
import os
import pickle
import random
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

import bpe
import model
import sample
from conftest import ROOT
from sample import END, Engine, Request, Sampling, TextStream

GREEDY = Sampling(temperature=0)
PLAIN = Sampling(temperature=1.0, top_k=0)  # the model's own distribution


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors are slower on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(seed=0, **config):
    """A float64 model of large random weights, whose next token depends on all tokens before it."""
    shape = dict(vocab_size=40, block_size=16, n_layer=2, n_head=2, n_embd=16, tie_embeddings=False) | config
    shape = {"mixer": "attention,window"} | shape
    gpt = model.GPT(model.Config(**shape, window=6 * ("window" in shape["mixer"]))).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in gpt.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.4)
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


def decode(gpt, requests, cache=True, **how):
    """Run requests to their ends; returns their outputs."""
    engine = Engine(gpt, requests, cache, **how)
    while engine.step():
        pass
    return [request.output for request in requests]


class Script(nn.Module):
    """A model that says one fixed text, whatever it is asked; it has what Engine needs and nothing else."""

    class Head(nn.Module):
        def __init__(self, tokens, vocab_size):
            super().__init__()
            self.table = nn.Parameter(1e3 * torch.eye(vocab_size)[tokens])

        def forward(self, at):
            return self.table[at.long()[:, 0]]

    def __init__(self, tokens, prompt_length=1, vocab_size=257):
        super().__init__()
        self.config = model.Config(vocab_size=vocab_size, block_size=10**6)
        self.head, self.start = self.Head(tokens, vocab_size), prompt_length

    def hidden(self, tokens, state):
        return (torch.arange(tokens.shape[1]) + 1 - self.start).expand(len(tokens), -1)[..., None]


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


VALUES = {"repetition_penalty": (1.3, 0.5, 4.0), "temperature": (0.3, 1.7, 5.0), "top_k": (1, 3, 17, 100),
          "top_p": (0.03, 0.51, 0.9, 0.9999), "min_p": (0.013, 0.31, 1.0)}


@pytest.mark.parametrize("name", sample.FILTERS)
def test_a_filter_is_its_definition(name):
    apply, brute, rng = sample.FILTERS[name][0], globals()[f"brute_{name}"], random.Random(name)
    assert VALUES.keys() == sample.FILTERS.keys()
    for trial in range(30):
        for value in VALUES[name]:
            # every second time among few values, so that there are ties
            rows = [[rng.gauss(0, 2) if trial % 2 else rng.randint(-3, 3) / 2 for _ in range(20)] for _ in range(3)]
            seen = [rng.choices(range(20), k=rng.randint(1, 9)) for _ in rows]
            logits = torch.tensor(rows, dtype=torch.float64)
            before = logits.clone()
            want = [brute(row, value, ids) for row, ids in zip(rows, seen)]
            torch.testing.assert_close(apply(logits, value, seen), torch.tensor(want, dtype=torch.float64))
            assert torch.equal(logits, before), "the input has changed"


def test_off_values_change_nothing():
    logits = torch.randn(2, 9, dtype=torch.float64)
    for name, (apply, off) in sample.FILTERS.items():
        if name not in ("top_k", "min_p"):  # 0 has no meaning there, choose() leaves the filter out
            torch.testing.assert_close(apply(logits, off, [[1], [2]]).softmax(-1), logits.softmax(-1))
    neutral = Sampling(**{name: off for name, (_, off) in sample.FILTERS.items()})
    chance = torch.tensor([0.5, 0.9])
    assert torch.equal(sample.choose(logits, neutral, chance, [[1], [2]]), sample.draw(logits, chance))


def test_filters_come_in_the_order_of_the_table():
    # Temperature 3 first: 0.72 0.26 0.01 becomes 0.51 0.36 0.13, so top_p=0.6 keeps two. The other way round only one.
    logits = torch.tensor([[4.0, 3.0, 0.0]])
    hot = Sampling(temperature=3.0, top_k=0, top_p=0.6)
    assert sample.choose(logits, hot, torch.tensor([1.0]), [[]]).item() == 1
    # top_k before top_p: of 0.4 0.3 0.2 0.1 it leaves 0.57 0.43, of which the first is enough for top_p=0.5.
    four = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert sample.choose(four, Sampling(1.0, 2, 0.5), torch.tensor([1.0]), [[]]).item() == 0
    # The penalty first: it moves token 0 below token 1, which top_k=1 then keeps.
    assert sample.choose(logits, Sampling(top_k=1, repetition_penalty=2.0), torch.tensor([1.0]), [[0]]).item() == 1


@pytest.mark.parametrize("value", [1e-300, 1e-9, 0.0])
def test_the_smallest_temperatures_are_greedy(value):
    logits = torch.tensor([[1.0, 80.0, 79.0, -90.0]])
    for chance in (1e-12, 0.5, 1.0):
        assert sample.choose(logits, Sampling(temperature=value), torch.tensor([chance]), [[]]).item() == 1


@pytest.mark.parametrize("field, value", [
    ("temperature", -0.1), ("temperature", math.nan), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("top_p", math.nan),
    ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0.0), ("repetition_penalty", math.nan)])
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
    """The probabilities after all filters, by the brute forces above."""
    for name, (_, off) in sample.FILTERS.items():
        if getattr(sampling, name) != off:
            row = globals()[f"brute_{name}"](row, getattr(sampling, name), seen)
    odds = np.exp(row)
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
    [output] = decode(gpt, [Request([0], 1600, PLAIN)], cache=False)
    assert chi_square(Counter(2 * a + b for a, b in zip(output[::2], output[1::2])), [0.25] * 4) < 3.5
    assert chi_square(Counter(2 * a + a for a in output), [0.25] * 4) > 3.5


# ------------------------------------------------------------------------------------------------------------ the engine

@pytest.mark.parametrize("position", model.POSITIONS)
@pytest.mark.parametrize("mixer", [*model.MIXERS, ",".join(model.MIXERS)])
def test_greedy_is_the_plain_loop(mixer, position):
    """With the cache and without, from prompts of any length, within the block and far beyond it."""
    gpt = make_model(mixer=mixer, position=position)
    prompts = [[7], list(range(9)), list(range(16)), [i * i % 40 for i in range(30)]]
    want = [plain_loop(gpt, prompt, 30) for prompt in prompts]
    assert len(set(map(tuple, want))) > 2 and len(set(sum(want, []))) > 6, "the model says too little"
    for cache in (True, False):
        assert [decode(gpt, [Request(prompt, 30, GREEDY)], cache)[0] for prompt in prompts] == want
        assert decode(gpt, [Request(prompt, 30, GREEDY) for prompt in prompts], cache) == want, "in one batch"


@pytest.mark.parametrize("block", [1, 2, 3])
def test_the_smallest_blocks(block):
    gpt = make_model(block_size=block)
    for cache in (True, False):
        assert decode(gpt, [Request([3, 1, 2], 9, GREEDY)], cache)[0] == plain_loop(gpt, [3, 1, 2], 9)


def make_requests():
    prompts = [[7], list(range(9)), [7], list(range(16)), [i * i % 40 for i in range(30)], [39, 38]]
    settings = [PLAIN, GREEDY, Sampling(0.7, 5), Sampling(1.0, 0, 0.9, repetition_penalty=1.5), PLAIN, PLAIN]
    return [Request(prompt, 5 + 8 * i, sampling, i, end=5 if i % 2 else -1)
            for i, (prompt, sampling) in enumerate(zip(prompts, settings))]


@pytest.mark.parametrize("cache", [True, False])
def test_a_request_does_not_depend_on_its_neighbours(cache):
    """Prompts, lengths, settings, ends and seeds all differ; rows leave the batch at different times."""
    gpt, requests = make_model(1), make_requests()
    together = decode(gpt, requests, cache)
    assert [decode(gpt, [request], cache)[0] for request in make_requests()] == together
    assert decode(gpt, make_requests()[::-1], cache) == together[::-1]
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
        self.config, self.head = gpt.config, self
        self.parameters = gpt.parameters

    def hidden(self, tokens, state):
        self.shapes.append(tuple(tokens.shape))
        return self.gpt.hidden(tokens, state)

    def __call__(self, x):
        self.rows.append(tuple(x.shape[:-1]))
        return self.gpt.head(x)

    def new_state(self, batch, capacity):
        self.capacities.append((batch, capacity))
        return self.gpt.new_state(batch, capacity)


def test_a_common_prompt_is_computed_once_and_the_head_sees_last_positions_only():
    gpt = make_model()
    recorder = Recorder(gpt)
    requests = [Request([4, 2, 9], 6, PLAIN, seed) for seed in range(5)] + [Request([4], 6, PLAIN, 9)]
    outputs = decode(recorder, requests)
    assert recorder.shapes == [(2, 3)] + [(6, 1)] * 5
    assert recorder.rows == [(6,)] * 6 and recorder.capacities == [(2, 9)]
    # samples from one forked state are those of a prompt computed for each
    assert outputs == [decode(gpt, [Request(r.prompt, 6, PLAIN, r.seed)])[0] for r in requests]
    assert len(set(map(tuple, outputs))) == 6


def test_the_cache_is_used_and_left_out():
    for cache, shapes in ((True, [(1, 3), (1, 1), (1, 1)]), (False, [(1, 3), (1, 4), (1, 5)])):
        recorder = Recorder(make_model())
        decode(recorder, [Request([4, 2, 9], 3, GREEDY)], cache)
        assert recorder.shapes == shapes
    recorder = Recorder(make_model())
    decode(recorder, [Request([4, 2, 9], 2, GREEDY), Request([5], 4, GREEDY)])
    assert recorder.shapes == [(2, 3), (2, 1), (1, 1), (1, 1)], "when a row leaves, the others keep their state"
    recorder = Recorder(make_model(block_size=4))
    decode(recorder, [Request([4, 2, 9], 8, GREEDY)])
    assert recorder.shapes == [(1, 3), (1, 1), (1, 3), (1, 1), (1, 3), (1, 1), (1, 3), (1, 1)] and recorder.capacities[0] == (1, 4)


def test_engine_counts_and_times():
    requests = [Request([1, 2, 3], 7, GREEDY), Request([1, 2, 3], 7, GREEDY), Request([9, 9], 4, GREEDY)]
    for cache in (True, False):
        engine = Engine(make_model(), [dataclasses.replace(request) for request in requests], cache)
        assert [len(engine.step()) for _ in range(8)] == [3, 3, 3, 3, 2, 2, 2, 0]
        assert [tokens for tokens, _ in engine.spent.values()] == [5, 3 * 3 + 2 * 3]
        assert all(seconds > 0 for _, seconds in engine.spent.values()) and "prefill 5 tokens" in engine.report()
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_only_the_tokenizers_tokens_are_produced():
    gpt = make_model()
    assert max(decode(gpt, [Request([1], 30, PLAIN)])[0]) >= 20
    assert max(decode(gpt, [Request([1], 30, PLAIN)], vocab_size=20)[0]) < 20


def test_the_first_token_may_be_limited():
    gpt, free = make_model(), decode(make_model(), [Request([1, 2], 5, GREEDY)])[0]
    for first in ([3, 30], [free[0], 3]):
        with torch.no_grad():
            row = gpt(torch.tensor([[1, 2]]))[0, -1]
        best = max(first, key=lambda i: row[i])
        output, other = decode(gpt, [Request([1, 2], 5, GREEDY, first=first), Request([1, 2], 5, GREEDY)])
        assert output == [best] + plain_loop(gpt, [1, 2, best], 4) and other == free


def test_the_penalty_sees_prompt_and_output():
    gpt, context = make_model(block_size=64), [3, 1, 4]
    for _ in range(30):
        with torch.no_grad():
            row = gpt(torch.tensor([context]))[0, -1].tolist()
        context.append(int(np.argmax(brute_repetition_penalty(row, 1.5, context))))
    for cache in (True, False):
        assert decode(gpt, [Request([3, 1, 4], 30, Sampling(0, repetition_penalty=1.5))], cache) == [context[3:]]
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


def test_skipped_bytes():
    for size in (1, 2, 3, 9):
        stream, data = TextStream(["bc"], skip=4), "abc éabcd".encode()
        assert "".join(stream.feed(data[i:i + size]) for i in range(0, len(data), size)).startswith("éa")
        assert stream.stopped


@pytest.mark.parametrize("stops", [[""], ["a", ""], ""])
def test_text_stream_refuses(stops):
    with pytest.raises(ValueError, match="stop strings"):
        TextStream(stops)


@pytest.mark.parametrize("words, stops", [
    ("", []), ("a", ["a"]), ("a,b c", ["a", "b c"]), (r"\n\n,\t", ["\n\n", "\t"]), (r"a\,b,c", ["a,b", "c"]),
    (r"\\n", [r"\n"]), (r"\\,a", ["\\", "a"]), (r"\d", [r"\d"]), ("a\\", ["a\\"]), (",,a,", ["a"]), ("\n,é", ["\n", "é"])])
def test_the_stop_option(words, stops):
    assert sample.stop_strings(words) == stops


# --------------------------------------------------------------------------------------------------- from text to text

def test_generate_stops_streams_and_ends(byte_tokenizer):
    text = "über 東京 STOP and 😀 more"
    script = Script(list(text.encode()) + [byte_tokenizer.special_tokens[END]] * 9)
    def say(**how):
        return sample.generate(script, byte_tokenizer, ["x"], cache=False, **how)
    assert say() == [text] and say(max_new_tokens=0) == [""]
    assert say(stop=["STOP", "more"]) == [text.split("STOP")[0]]
    assert say(stop=["never"], n_samples=2) == [text, text]
    assert say(max_new_tokens=7) == ["über \ufffd"], "the budget ends within a character"
    requests = sample.ask(byte_tokenizer, "x", stop=["STOP"])
    pieces = [(piece, requests[0].done) for _, piece in sample.stream(Engine(script, requests, False), byte_tokenizer)]
    assert pieces == [(c, "") for c in "über 東京 "] + [("", "stop")]
    assert len(requests[0].output) == len("über 東京 STOP".encode())
    requests = sample.ask(byte_tokenizer, "x")
    list(sample.stream(Engine(script, requests, False), byte_tokenizer))
    assert requests[0].done == "end"


def test_generate_is_each_prompt_alone(gpt, tokenizer):
    prompts = ["def ", "", "return the model, the tokens\n" * 9, "é"]
    for how in (dict(temperature=0), dict(temperature=1.0, top_k=0, seed=3), dict(seed=3, heal=True, n_samples=2)):
        together = sample.generate(gpt, tokenizer, prompts, max_new_tokens=50, **how)
        alone = [sample.generate(gpt, tokenizer, [prompt], max_new_tokens=50, **how) for prompt in prompts]
        assert together == sum(alone, []) and len(set(together)) == len(together)
        assert together == sample.generate(gpt, tokenizer, prompts, cache=False, max_new_tokens=50, **how)
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


def test_the_last_token_may_grow(gpt, tokenizer):
    """Healing: "def " and then " main" are one text; without it the space is a token of its own."""
    assert [tokenizer.vocab[i] for i in tokenizer.encode("def ")] == [b"def", b" "]
    [request] = sample.ask(tokenizer, "def ", heal=True)
    assert request.prompt == tokenizer.encode("def")
    assert {tokenizer.vocab[i] for i in request.first} >= {b" ", b" main", b" model"}
    assert all(tokenizer.vocab[i].startswith(b" ") for i in request.first)
    for prompt in ("def ", "return the mo", "café"):
        requests = sample.ask(tokenizer, prompt, n_samples=9, heal=True, max_new_tokens=9, temperature=1.0)
        texts = dict.fromkeys(requests, prompt)
        for request, piece in sample.stream(Engine(gpt, requests, vocab_size=tokenizer.vocab_size), tokenizer):
            texts[request] += piece
        for request, text in texts.items():
            assert text == tokenizer.decode(request.prompt + [i for i in request.output if i != request.end])
    # a special token, unknown text and a prompt of one token stay as they are; no special token grows out of "<|"
    assert sample.ask(tokenizer, "", heal=True)[0].first == [] == sample.ask(tokenizer, "d", heal=True)[0].first
    end = tokenizer.special_tokens[END]
    assert not any(end in sample.ask(tokenizer, f"a{END[:i]}", heal=True)[0].first for i in range(len(END) + 1))
    words = bpe.train("word", ["the cat"], 20)
    [request] = sample.ask(words, "the dog", heal=True)
    assert request.prompt == words.encode("the dog") and request.first == []


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
    a, b = (sample.generate(gpt, tokenizer, ["the ", "zebra"], cache, heal=True, max_new_tokens=40) for cache in (True, False))
    assert a == b and len(set(a)) == 2


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
    ("empty", "not a checkpoint"), ("text", "not a checkpoint"), ("half", "truncated"), ("zip", "truncated"),
    ("list", "not a checkpoint"), ("foreign", "not a checkpoint"), ("version", "format"), ("config", "does not fit"),
    ("field", "n_layers"), ("type", "does not fit"), ("weights", "does not fit"), ("shape", "does not fit"),
    ("tokenizer", "not a tokenizer"), ("tokenizer type", "not a tokenizer"), ("vocab", "do not belong together"),
    ("no tokenizer", "no tokenizer")])
def test_bad_checkpoints(ckpt, tmp_path, main, tokenizer, kind, message):
    code, out, err = main(f"--ckpt={damage(ckpt, tmp_path, kind, tokenizer)}", "--max_new_tokens=3")
    assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith("sample.py: ") and message in err, err


def test_a_vocabulary_below_the_models_is_no_mistake(ckpt, tmp_path, main, tokenizer):
    code, out, err = main(f"--ckpt={damage(ckpt, tmp_path, 'small vocab', tokenizer)}", "--prompt=é", "--temperature=2")
    assert code == 0 and out.startswith("é")


# --------------------------------------------------------------------------------------------------------- command line

@pytest.mark.parametrize("words, message", [
    (["--temperature=-1"], "--temperature=-1"), (["--top_p=0"], "--top_p=0"), (["--top_p=1.5"], "--top_p=1.5"),
    (["--top_k=-1"], "--top_k=-1"), (["--min_p=2"], "--min_p=2"), (["--repetition_penalty=0"], "--repetition_penalty=0"),
    (["--n_samples=0"], "--n_samples=0"), (["--max_new_tokens=-1"], "--max_new_tokens=-1"),
    (["--device=tpu9"], "--device=tpu9"), (["--device=cuda:77"], "--device=cuda:77"), (["--device=meta"], "--device=meta")])
def test_options_that_are_refused(ckpt, main, words, message):
    code, out, err = main(f"--ckpt={ckpt}", "--max_new_tokens=3", *words)
    assert (code, out, err.count("\n")) == (1, "", 1) and message in err, err


def test_a_missing_checkpoint_says_how_to_make_one(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = main()
    assert (code, out, err.count("\n")) == (1, "", 1) and "out/ckpt.pt" in err and "`python train.py`" in err
    assert main(f"--ckpt={tmp_path}")[0] == 1


def test_samples_are_printed_in_order(ckpt, main):
    gpt, tokenizer = sample.load(ckpt, "cpu")
    # the stop strings end samples after different numbers of tokens
    texts = sample.generate(gpt, tokenizer, ["def "], n_samples=6, stop=["q", "w", "é"], seed=4, max_new_tokens=40, heal=True)
    code, out, err = main(f"--ckpt={ckpt}", "--n_samples=6", "--stop=q,w,é", "--seed=4", "--max_new_tokens=40")
    assert code == 0 and len({len(text) for text in texts}) > 3
    assert out == f"\n{sample.BETWEEN}\n".join("def " + text for text in texts) + "\n"
    assert err.count("\n") == 1 and "prefill 1 tokens" in err and err.count("tokens/s") == 2


def test_the_first_sample_streams_and_the_others_wait(gpt, tokenizer, monkeypatch):
    class Terminal(io.StringIO):
        flushes = []

        def flush(self):
            self.flushes.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Terminal())
    requests = sample.ask(tokenizer, "def ", 3, 20, seed=1)
    sample.print_samples(Engine(gpt, requests), tokenizer, requests, "def ")
    shown = Terminal.flushes
    assert shown[0] == "def " and len(set(shown)) > 15, "text comes piece by piece"
    texts = sample.generate(gpt, tokenizer, ["def "], n_samples=3, seed=1, max_new_tokens=20)
    whole = f"\n{sample.BETWEEN}\n".join("def " + text for text in texts) + "\n"
    assert sys.stdout.getvalue() == whole and all(whole.startswith(text) for text in shown)


def test_cache_off_prints_the_same(ckpt, main):
    words = f"--ckpt={ckpt}", "--prompt=return ", "--max_new_tokens=80", "--n_samples=2"
    assert main(*words)[:2] == main(*words, "--cache=False")[:2]
    assert main(*words)[1] != main(*words, "--seed=1")[1]
    assert main(*words, "--temperature=0")[1] == main(*words, "--temperature=0", "--seed=1")[1]
    assert main(*words, "--repetition_penalty=9")[1] != main(*words)[1] != main(*words, "--top_k=2")[1]


def test_the_default_prompt_suits_the_checkpoint(tmp_path, tokenizer, main):
    gpt = make_model(vocab_size=tokenizer.vocab_size)
    ours = save(tmp_path / "a.pt", gpt, tokenizer, train={"data": ""})
    theirs = save(tmp_path / "b.pt", gpt, tokenizer, train={"data": "poems.txt"})
    short = ["--max_new_tokens=0"]
    assert main(f"--ckpt={ours}", *short)[1] == "def \n" and main(f"--ckpt={theirs}", *short)[1] == "\n\n"
    assert main(f"--ckpt={theirs}", "--prompt=def ", *short)[1] == "def \n"
    code, out, _ = main(f"--ckpt={ours}", "--prompt=", "--max_new_tokens=9", "--temperature=0")
    assert out == sample.generate(*sample.load(ours, "cpu"), [""], max_new_tokens=9, temperature=0)[0] + "\n"


def test_a_prompt_longer_than_the_block_is_said(ckpt, main):
    gpt, tokenizer = sample.load(ckpt, "cpu")
    prompt = "the tokens, " * 40
    code, out, err = main(f"--ckpt={ckpt}", f"--prompt={prompt}", "--temperature=0", "--max_new_tokens=9", "--heal=False")
    last = tokenizer.encode(prompt)[-32:]
    request = Request(last, 9, GREEDY, end=tokenizer.special_tokens[END])
    decode(gpt, [request], vocab_size=tokenizer.vocab_size)
    assert code == 0 and out == prompt + tokenizer.decode([i for i in request.output if i != request.end]) + "\n"
    assert err.count("\n") == 2 and f"the prompt has {len(tokenizer.encode(prompt))} tokens" in err and "last 32" in err


def test_bench(ckpt, main, monkeypatch):
    recorder = Recorder(make_model(block_size=24))
    found = sample.bench(recorder, 8, 1)
    assert recorder.shapes == [(1, 16)] + [(1, 1)] * 7 + [(1, n) for n in range(16, 24)]
    assert found["same"] and found["ratio"] == pytest.approx(found["cached"] / found["plain"])
    monkeypatch.setattr(sample.bench, "__defaults__", (8, 1))
    code, out, err = main(f"--ckpt={ckpt}", "--bench")
    assert code == 0 and out.count("tokens/s") == 1 and "the same" in out and "NOT" not in out
    monkeypatch.setattr(Request, "take", lambda self, token, block, take=Request.take: take(self, random.randrange(9), block))
    assert not sample.bench(make_model(), 8, 1)["same"], "the comparison must see other tokens"


# one process each, as a user starts it

def start(*words, **how):
    return subprocess.Popen([sys.executable, str(ROOT / "sample.py"), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **how)


def test_the_script_by_itself(ckpt, main):
    """Bytes of the prompt that are no UTF-8 are replaced and said; stdout holds the text and nothing else."""
    process = start(f"--ckpt={ckpt}", b"--prompt=caf\xe9 \xf0\x9f\x98\x80", "--max_new_tokens=20", "--seed=5")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0 and b"U+FFFD" in err and err.count(b"\n") == 2, err
    assert out.decode() == main(f"--ckpt={ckpt}", "--prompt=caf\ufffd 😀", "--max_new_tokens=20", "--seed=5")[1]


def test_ctrl_c_leaves_what_was_printed(ckpt):
    process = start(f"--ckpt={ckpt}", "--max_new_tokens=1000000", f"--stop={END}")
    begun = process.stdout.read(200)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130 and begun.startswith(b"def ")
    assert b"Traceback" not in err and err.count(b"\n") == 1 and b"tokens/s" in err


def test_a_closed_pipe_is_no_error(ckpt):
    process = start(f"--ckpt={ckpt}", "--max_new_tokens=1000000", "--n_samples=3")
    process.stdout.read(20)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=100) == 0 and b"Traceback" not in err and b"Exception" not in err
