"""Text from a trained model, and what the model knows.

Batched decoding, conversations, a server, evaluation.
Reads: a checkpoint of train.py; for --eval the public files of HellaSwag, MMLU
       and GSM8K, and plain text.
Writes: text to stdout, one line about the speed to stderr; --eval: each item,
        answer and score to --output.
Usage: python sample.py --prompt="import " --n_samples=3 --temperature=0.8
       python sample.py --chat --system="Answer briefly." --quantize=int8
       python sample.py --serve --port=8000
       python sample.py --eval=ppl,hellaswag,mmlu,gsm8k --eval_data=DIR
       torchrun --nproc_per_node=2 sample.py --eval=mmlu --eval_data=DIR

When a text fills the model's block, the older half of it is dropped and the
rest computed anew; of a prompt longer than the block the last block_size tokens
count.
References: Keskar et al. 2019 (CTRL: repetition penalty); Holtzman et al. 2020
(top-p); Nguyen et al. 2024 (min-p).
"""
import argparse
import atexit
import codecs
import collections
import contextlib
import copy
import csv
import dataclasses
import difflib
import hashlib
import hmac
import http.server
import inspect
import json
import math
import os
import random
import re
import select
import signal
import socket
import sys
import textwrap
import threading
import time
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bpe import Tokenizer, from_dict
from bpe import load as read_tokenizer
from model import GPT, Embedding, Linear, State, from_checkpoint, load_checkpoint, replacing, require, save_checkpoint
from model import ROLES as WEIGHTS

END = "<|endoftext|>"
CHUNK = 512  # tokens of prompts that are computed together
SPARE = 16  # tokens that are rather computed again than in a call of their own
DTYPES = ("float32", "bfloat16", "float16")
SEEN = 256  # places of a state that a recorded step sees, or a multiple of it
GUESSES = 4  # tokens that a draft may guess ahead


# of the fields below: far beyond these, logits are infinite, and one request would end the step of all
BOUNDS = {
    "temperature": (0, 100),
    "top_k": (0, 2**63),
    "top_p": (1e-9, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-100, 100),
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    temperature: float = 0.8  # above 1 more random, below 1 less; 0: always the most probable token
    top_k: int = 200  # choose among the k most probable tokens (0: all)
    top_p: float = 1.0  # choose among the most probable tokens that hold this probability together
    min_p: float = 0.0  # choose among tokens at least this probable, relative to the most probable one
    repetition_penalty: float = 1.0  # above 1: makes tokens that are in the text already less likely
    presence_penalty: float = 0.0  # taken off the logits of tokens that are in the text already

    def __post_init__(self):
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            require(low <= value <= high, f"--{name}={value} must be from {low} to {high}")


@dataclasses.dataclass(frozen=True)
class Options(Sampling):
    ckpt: str = "out/ckpt.pt"  # checkpoint of train.py
    tokenizer: str = ""  # file or folder of a tokenizer, for a checkpoint without one, as model.py --import_hf writes
    prompt: str = ""  # text to continue (empty: it begins a new line)
    max_new_tokens: int = 256  # length of a sample, unless it ends by itself
    n_samples: int = 1  # samples of the prompt, decoded together; the first is streamed, the others follow
    stop: str = ""  # comma list of texts that end a sample; \n stands for a newline
    seed: int = 0  # of the random numbers; each sample has its own sequence of them
    device: str = ""  # cpu, cuda, mps (empty: the fastest that is there)
    dtype: str = "float32"  # of weights and arithmetic: float32, bfloat16, float16
    quantize: str = ""  # whole numbers as weights: int8, int4 (empty: as they are)
    prune: str = ""  # leave out a share of each matrix, as 0.5, or layers, as layers:2; --output=FILE.pt is the rest
    draft: str = ""  # guess ahead, for speed and not for another text: lookup (in the text so far), or a checkpoint
    cache_gb: float = 0.0  # memory for what the texts in the making keep; who does not fit in waits (0: no limit)
    chat: bool = False  # a conversation: lines of stdin are answered
    system: str = ""  # chat: what the model is told first
    template: str = "plain"  # of conversations: plain, bare, chatml, llama3
    serve: bool = False  # answer over HTTP: OpenAI's API, and a page at /; API_KEY in the environment asks for a key
    host: str = "127.0.0.1"  # serve: the address to listen at (0.0.0.0: all of this machine)
    port: int = 8000  # serve: the port to listen at (0: a free one)
    eval: str = ""  # grade the model: comma list of ppl, hellaswag, mmlu, gsm8k, passkey
    eval_data: str = ""  # folder with the files of these tasks
    shots: int = 5  # solved examples before each question, where there is a file of them
    output: str = "eval.json"  # every question, answer and score of --eval; what it holds already is not done again
    swap: bool = False  # eval: the control, each question stands before the answers of another one
    compare: str = ""  # eval: another --output; prints how far this model is above that one, item by item
    graphs: bool = False  # record steps of decoding as CUDA graphs (on a GPU; not where a layer is a recurrence)
    bench: bool = False  # print the speed of decoding by the number of samples, then stop
    profile: bool = False  # print where the time of a step of decoding goes, then stop


MODES = ("prune", "bench", "serve", "profile", "eval", "chat")  # one at a time; without them `samples` are printed
FOR = {  # the modes that an option is for; one that is not here is for all, or is no trouble
    "prompt": "samples profile",
    "n_samples": "samples profile eval",
    "seed": "samples profile eval chat",
    **dict.fromkeys(("max_new_tokens", "stop", *vars(Sampling())), "samples profile eval chat serve"),
    **dict.fromkeys(("dtype", "quantize", "draft", "graphs"), "samples profile eval chat serve bench"),
    "cache_gb": "samples profile eval chat serve",
    "system": "chat",
    "template": "chat serve",
    **dict.fromkeys(("host", "port"), "serve"),
    **dict.fromkeys(("eval_data", "shots", "swap", "compare"), "eval"),
    "output": "eval prune",
}


# ---- sampling

def shape(logits: Tensor, s: Sampling, seen: Iterable[list[int]]) -> Tensor:
    """Logits (B, V) of the distribution to draw from; `seen` (CTRL's penalty, and presence) are the tokens of each row.

    The three cuts are conditions on the row in descending order: its rank, what the more probable ones hold together,
    its share of the most probable one. Tokens that are equal to the last one kept stay, too.

    >>> shape(torch.tensor([[2.0, -2.0, 3.0]]), Sampling(1.0, 0, repetition_penalty=2.0), [[0, 1, 1]])
    tensor([[-2., -7.,  0.]])
    >>> shape(torch.tensor([[1.0, 4.0, 2.0, 2.0]]), Sampling(0.5, top_k=2), [[]])
    tensor([[-inf,  0., -4., -4.]])
    >>> shape(torch.tensor([[0.2, 0.5, 0.3]]).log(), Sampling(1.0, 0, top_p=0.7), [[]]).softmax(-1)
    tensor([[0.0000, 0.6250, 0.3750]])
    >>> shape(torch.tensor([[0.6, 0.3, 0.1]]).log(), Sampling(1.0, 0, min_p=0.4), [[]]).softmax(-1)
    tensor([[0.6667, 0.3333, 0.0000]])
    """
    logits = logits.clone()
    for row, ids in zip(logits, seen) if s.repetition_penalty != 1 or s.presence_penalty else ():
        factor = torch.where(row[ids] > 0, 1 / s.repetition_penalty, s.repetition_penalty)
        row[ids] = row[ids] * factor - s.presence_penalty
    if not s.temperature:
        return logits  # no cut moves the most probable token
    # the maximum, which no probability depends on, keeps quotients finite
    logits = (logits - logits.amax(-1, keepdim=True)) / max(s.temperature, 1e-30)
    if not s.top_k and s.top_p == 1 and not s.min_p:
        return logits
    ordered = logits.topk(min(s.top_k or logits.shape[1], logits.shape[1])).values  # (B, K), descending
    odds = ordered.softmax(-1)
    keep = (odds.cumsum(-1) - odds < s.top_p) & (odds >= s.min_p * odds[:, :1])
    smallest = ordered.masked_fill(~keep, math.inf).amin(-1, keepdim=True)  # (B, 1)
    return logits.masked_fill(logits < smallest, -math.inf)


def draw(logits: Tensor, chance: Tensor) -> Tensor:
    """Tokens (B,) from logits (B, V) and one number in (0, 1] a row: where the summed probabilities first reach it.

    >>> draw(torch.tensor([[0.5, 0.0, 0.5]]).log().repeat(3, 1), torch.tensor([0.5, 0.51, 1.0]))
    tensor([0, 2, 2])
    """
    total = logits.softmax(-1).cumsum(-1)
    # its last entry is 1 but for rounding; the first entry that reaches a number above 0 is of a possible token
    return torch.searchsorted(total, chance[:, None] * total[:, -1:])[:, 0]


# ---- text from tokens, as they come

class TextStream:
    r"""Bytes of tokens in, text out: no half character, nothing after a stop string, nothing that may become one.

    >>> text = TextStream(["\n\n"])
    >>> [text.feed(data) for data in (b"caf", b"\xc3", b"\xa9\n", b"a\n", b"\nb")], text.stopped
    (['caf', '', 'é', '\na', ''], True)
    """

    def __init__(self, stops: Sequence[str] = ()):
        require("" not in stops, "stop strings are a list of texts that are not empty")
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.stops = stops
        self.held = ""  # what may become a stop string
        self.stopped = False

    def feed(self, data: bytes, final: bool = False) -> str:
        """Take in the bytes of the next token; return the text that is certain now, all of it if this is the last."""
        text = self.held + self.decoder.decode(data, final)
        # the one that is complete first counts, the longest of those: where tokens begin and end changes nothing
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stops if stop in text]
        if found:
            self.stopped, self.held = True, ""
            return text[:min(found)[1]]
        begun = [n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        cut = len(text) if final else len(text) - max(begun, default=0)
        self.held = text[cut:]
        return text[:cut]


# ---- the engine: requests in, one token a step for each of them

@dataclasses.dataclass(eq=False)
class Request:
    """One text in the making. Its tokens depend on nothing else that is decoded beside it."""

    prompt: list[int]
    max_new_tokens: int = 256
    sampling: Sampling = Sampling()
    seed: int | str = 0  # of its own random numbers
    end: int = -1  # the token that ends it (-1: none)
    text: TextStream = dataclasses.field(default_factory=TextStream)
    bias: dict[int, float] = dataclasses.field(default_factory=dict)  # added to the logits of these tokens

    def __post_init__(self):
        self.output = []  # new tokens
        self.logprobs = []  # theirs, in the model's own distribution
        self.context = []  # the tokens that the model sees; the engine sets them
        self.held = 0  # so many of them are in the engine's state
        self.fed = 0  # so many tokens of the output are in the text
        self.hope = GUESSES  # so many tokens are worth guessing
        self.random = random.Random(str(self.seed))
        self.done = "" if self.max_new_tokens else "length"  # why it ended: end, stop, length, or what a caller writes
        self.said = "", 0, self.done  # text, tokens, why it ended: one value, as another thread may read it

    def take(self, token: int, logprob: float, block: int) -> None:
        """Go on by one token; where the context fills the block, its older half goes first."""
        if len(self.context) == block:
            del self.context[:(block + 1) // 2]
            self.held = 0
        self.context.append(token)
        self.output.append(token)
        self.logprobs.append(logprob)
        if token == self.end:
            self.done = "end"
        elif len(self.output) == self.max_new_tokens:
            self.done = "length"


def pick(logits: Tensor, requests: Sequence[Request]) -> list[tuple[int, float]]:
    """Choose from logits (B, V), each row as its request says: tokens, and their log-probabilities in the logits."""
    total = logits.logsumexp(-1)
    require(total.isfinite().all(), "the model's output is not finite (NaN or infinite): its training diverged")
    shaped = logits.clone() if any(request.bias for request in requests) else logits
    groups, chosen = collections.defaultdict(list), {}
    for row, request in enumerate(requests):
        groups[request.sampling].append(row)
        for token, extra in request.bias.items():
            shaped[row, token] += extra
    for sampling, rows in groups.items():
        group = [requests[row] for row in rows]
        chance = torch.tensor([1 - request.random.random() for request in group])  # in (0, 1]
        own = shape(shaped[rows], sampling, (request.prompt + request.output for request in group))
        ids = draw(own, chance.to(own.device)) if sampling.temperature else own.argmax(-1)
        chosen |= zip(rows, ids.tolist())
    tokens = [chosen[row] for row in range(len(requests))]
    return list(zip(tokens, (logits[range(len(tokens)), tokens] - total).tolist()))


class Past:
    """What a model has taken in of one text. Given another text, it goes on from the beginning that both share."""

    def __init__(self, model: GPT, capacity: int):
        self.model = model
        self.capacity = capacity
        self.tokens = []
        self.state: Any = None
        self.computed = 0  # tokens that went through the model

    def take_in(self, tokens: list[int], asked: int = 1) -> Any:
        """The model's output (1, 1, C) at the last of some tokens, at most `capacity` of them, if it is `asked` for."""
        known = len(os.path.commonprefix([self.tokens, tokens[:len(tokens) - asked]]))
        try:
            require(known, "nothing is known")
            self.state.truncate([known])  # what a recurrence keeps does not go back: ValueError, too
        except ValueError:
            known, self.state = 0, self.model.new_state(1, self.capacity)
        self.computed += len(tokens) - known
        self.tokens = tokens[:]
        for start in range(known, len(tokens), CHUNK):  # of a long prompt not all is in the works at once
            hidden = run_on(self.model, [tokens[start:start + CHUNK]], self.state)
        return hidden[:, -1:] if asked else None


def run_on(model: GPT, rows: list, state: State) -> Tensor:
    """The model's output (B, T, C) for the next tokens of each row, lists of ids, padded on the right with 0.

    Causal layers do not look there; where the state is used again it must forget the padding.
    """
    T = max(map(len, rows))
    padded = [row + [0] * (T - len(row)) for row in rows]
    return model.hidden(torch.tensor(padded, device=next(model.parameters()).device), state)


def side_by_side(contexts: Iterable[tuple]) -> Iterator[tuple[list[tuple], int]]:
    """Contexts that are computed together, of which a call sees CHUNK tokens at most, and how many all begin with.

    >>> list(side_by_side([(1, 2), (1, 3, 4), (*range(900),), (*range(899),)]))[1]
    ([(1, 2), (1, 3, 4)], 1)
    """
    batch, common = [], 0
    for context in sorted(contexts):
        if batch:
            shared, near = (len(os.path.commonprefix([other, context])) for other in (batch[0], batch[-1]))
            longest = max(map(len, [*batch, context])) - shared
            if max(common, near) - shared > SPARE or (len(batch) + 1) * longest > CHUNK:
                yield batch, common
                batch = []
            common = shared if batch else 0
        batch.append(context)
    yield batch, common


def join(states: list[State]) -> State:
    """One state with the rows of several, which are given up layer by layer, so that not all is there twice."""
    layers = []
    for kept in zip(*(state.layers for state in states)):
        layers.append([torch.cat(parts) for parts in zip(*kept)])
        for parts in kept:
            parts.clear()
    numbers: list = [sum((getattr(state, name) for state in states), []) for name in ("lengths", "start", "room")]
    return State(layers, *numbers, recurrent=states[0].recurrent)


def resized(state: State, room: int) -> State:
    """A state with room for so many tokens in each row; where that is another number, both are 8 or more.

    Then a layer whose second dimension is the old room holds positions: the last call of a recurrence was shorter.
    """
    old, layers = state.room[0], []
    if room == old:
        return state
    for kept in state.layers:
        if all(x.shape[1] == old for x in kept):
            kept = [F.pad(x, (0, 0) * (x.ndim - 2) + (0, room - old)) for x in kept]
        layers.append(kept)
    return State(layers, state.lengths, state.start, [room] * len(state.room), state.recurrent)


@torch.inference_mode()
def row_bytes(model: GPT) -> tuple[int, int]:
    """Bytes that a row of the state takes at most in decoding, and more for each token that it has room for."""
    sizes = []
    for room in (8, 9):
        state = model.new_state(1, room)
        call = [0] * min(1 + GUESSES, model.config.block_size)  # which a recurrence keeps
        run_on(model, [call], state)
        sizes.append(state.nbytes)
    each = sizes[1] - sizes[0]
    return sizes[0] - 8 * each, each


class Fixed(State):
    """A state whose work can be recorded: what a call reads and writes stays where it is.

    Each row sees its first `seen` places, those behind its end too, which a mask hides.
    """

    exact = False

    def __init__(self, state: State, seen: int):
        super().__init__(state.layers, state.lengths, state.start, state.room)
        rows, device = len(state.lengths), state.layers[0][0].device
        self.rows = torch.arange(rows, device=device)[:, None]
        self.at = torch.zeros_like(self.rows)
        self.seen = seen

    def places(self, T, device):
        return self.at

    def append(self, layer, at, *new):
        kept = self.layers[layer]
        for old, x in zip(kept, new):
            old[self.rows, at] = x.type_as(old)
        return [old[:, :self.seen] for old in kept]


class Recorded:
    """A step of one token a row as a CUDA graph: its hundreds of launches take the time of one.

    It is recorded for one state and as many places as it sees then; with another it is made anew. Without a GPU the
    same work is done at each call.
    """

    def __init__(self, engine: "Engine", seen: int):
        self.engine, self.state = engine, engine.state
        self.fixed = Fixed(self.state, seen)
        self.tokens = torch.zeros_like(self.fixed.at)
        self.replay = None

    def work(self) -> None:
        self.fixed.lengths = self.state.lengths
        hidden = self.engine.model.hidden(self.tokens, self.fixed)
        self.out = self.engine.logits(hidden)

    def record(self) -> None:
        """Do this step, and record its work. Raises RuntimeError where that waits for the CPU."""
        self.work()  # for what libraries set up once; replay writes to the same places
        self.replay = self.work
        if self.tokens.is_cuda:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.work()
            self.replay = graph.replay

    def __call__(self, rows: list) -> Tensor:
        """The logits (B, 1, V) behind the next token of each row, until the next call writes there."""
        self.tokens.copy_(torch.tensor([row or [0] for row in rows]))  # [] of a row that waits for another
        self.fixed.at.copy_(torch.tensor(self.state.lengths)[:, None])
        if not self.replay:
            self.record()
        self.replay()
        self.state.lengths = [length + 1 for length in self.state.lengths]
        return self.out


# attention without cuDNN's: with it a step took 56 ms on an H200, for it plans anew for each length, without it 6
UNPLANNED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Engine:
    """Decodes requests together on a model in eval mode. Each step() adds a token to all that are going.

    Requests join and leave between steps: those beyond `slots` wait, and those for which the state has no room in
    `cache` bytes, that of the last prompt included (while they join and leave, what is copied is there twice). With
    requests given, the state has room for the longest of them, else for block_size tokens. The model needs
    config.block_size, config.vocab_size, parameters, hidden, logits and new_state. `vocab_size`: only the first so many
    tokens are produced (0: all). `draft`: a function (request, count) -> up to so many tokens that may come next. The
    tokens of a request do not depend on it: each is chosen from the model's own logits with the request's own random
    number, and a guess saves a step where it is that very token (Leviathan et al. 2023 accept more of a sampled text,
    but not the same text).
    """

    def __init__(self, model: GPT, requests: Sequence[Request] = (), vocab_size: int = 0, slots: int = 256,
                 draft: Callable = lambda request, count: [], cache: float = math.inf, graphs: bool = False):
        self.model = model
        self.graphs = graphs
        self.slots = slots
        self.draft = draft
        self.cache = cache
        self.guessed = [0, 0]  # tokens that the draft has guessed; those that were right
        self.vocab_size = vocab_size or model.config.vocab_size
        self.block = model.config.block_size
        needed = [len(request.prompt) + request.max_new_tokens for request in requests]
        self.capacity = min(self.block, max(needed, default=self.block))
        fixed, each = self.row = (0, 0) if cache == math.inf else row_bytes(model)
        spare = cache / 2 - fixed  # half is for the last prompt, and half holds one request at least
        if each * self.capacity > spare:
            self.capacity = max(0, int(spare / max(each, 1)))
        self.spent = {"prefill": [0, 0.0], "decode": [0, 0.0]}  # prompt tokens computed, later tokens; seconds
        self.clear()
        self.submit(*requests)

    def clear(self) -> None:
        """Forget all requests, and what memory they hold."""
        self.past = Past(self.model, self.capacity)
        self.state: Any = None
        self.recorded: Recorded | None = None
        self.rows = []  # whose each row of the state is; where the request is done, the row waits for another
        self.waiting = collections.deque()

    @property
    def active(self) -> list[Request]:
        """The requests that are going on."""
        return [request for request in self.rows if not request.done]

    def submit(self, *requests: Request) -> None:
        """Queue requests. Raises ValueError for an empty prompt, unknown ids, more tokens than the state has room."""
        for request in requests:
            ids = request.prompt
            known = ids and 0 <= min(ids) <= max(ids) < self.vocab_size
            require(known, f"a prompt is one token or more, each from 0 to {self.vocab_size - 1}")
            needed = min(self.block, len(ids) + request.max_new_tokens)
            require(needed <= self.capacity, f"a request of {needed} tokens, the engine has room for {self.capacity}")
            request.context = ids[-self.block:]
            self.waiting.append(request)

    def room(self, group: list[Request]) -> int:
        """Tokens that a row of the state needs room for where these requests are together."""
        if self.cache == math.inf:
            return self.capacity
        longest = max(len(request.prompt) + request.max_new_tokens for request in group)
        return min(self.capacity, max(longest, 8))

    def size(self, group: list[Request]) -> int:
        """Bytes of the state of these requests together, and of the last prompt's."""
        fixed, each = self.row
        return fixed + each * self.capacity + len(group) * (fixed + each * self.room(group))

    @torch.inference_mode()
    @sdpa_kernel(UNPLANNED)
    def step(self) -> list[Request]:
        """Go on with every request that is not done and has a slot; returns these requests, [] when there are none."""
        for row, request in enumerate(self.rows):
            if not request.held and not request.done:  # its block was full
                self.waiting.appendleft(request)
                self.rows[row] = Request([], 0)
        rows = [row for row, request in enumerate(self.rows) if not request.done]  # asked once: a thread may end one
        going, joining = [self.rows[row] for row in rows], []
        while self.waiting and len(going) + len(joining) < self.slots:
            together = [*going, *joining, self.waiting[0]]
            if not together[-1].done and self.size(together) > self.cache:
                break
            request = self.waiting.popleft()
            joining += [] if request.done else [request]
        empty = len(self.rows) - len(going) - len(joining)
        if not going or empty > (len(self.rows) / 4 if self.cache == math.inf else 0):  # else a copy costs more
            self.rows, self.state = going[:], self.state.fork(rows) if rows else None
            self.recorded = None  # which holds on to the old state
            rows = [*range(len(going))]
        self.timed("decode", rows, 0 if joining else GUESSES)  # states that are joined want calls of one length
        self.timed("prefill", joining)
        return going + joining

    def timed(self, phase: str, group: list, *how):
        """Call a method of this name, and count what it says to have done, and its seconds."""
        started = time.perf_counter()
        if group:
            self.spent[phase][0] += getattr(self, phase)(group, *how)
            self.spent[phase][1] += time.perf_counter() - started

    def prefill(self, group: list[Request]) -> int:
        """Take in whole contexts, equal ones once, and add a first token; returns how many tokens were computed."""
        before, room = self.past.computed, self.room(self.active + group)
        states = [resized(self.state, room)] if self.rows else []
        empty = [row for row, request in enumerate(self.rows) if request.done]
        for contexts, common in side_by_side({tuple(request.context) for request in group}):
            state, hidden = self.take_in(contexts, common, room)
            joining = [request for request in group if tuple(request.context) in contexts]
            rows = [contexts.index(tuple(request.context)) for request in joining]
            logits = self.logits(hidden[rows])
            self.extend(joining, logits[:, 0])
            places, empty = empty[:len(rows)], empty[len(rows):]
            for place, row, request in zip(places, rows, joining):
                states[0].put(place, state, row)
                self.rows[place] = request
            rest = rows[len(places):]
            if rest:
                states.append(state if rest == [*range(len(contexts))] else state.fork(rest))
                self.rows += joining[len(places):]
        self.state = join(states) if states[1:] else states[0]
        return self.past.computed - before

    def take_in(self, contexts: list[tuple], common: int, room: int) -> tuple[State, Tensor]:
        """A state of contexts that begin with `common` equal tokens, and the model's output (B, 1, C) at the last ones.

        Where a recurrence keeps the last call, the last tokens are one of their own, as those of decoding are.
        """
        rows, past = len(contexts), self.past
        if rows == 1:
            ids = [*contexts[0]]
            hidden = past.take_in(ids)
            if past.state.recurrent:
                hidden = past.take_in(ids)  # the last token again
            return resized(past.state, room).fork([0]), hidden
        common = min(common, *(len(context) - 1 for context in contexts))
        state, shared = self.model.new_state(rows, room), [*contexts[0][:common]]
        if common > SPARE:
            if past.tokens != shared:
                past.take_in(shared[:-1])
            past.take_in(shared, 0)
            state = resized(past.state, room).fork([0] * rows)
        tails = [[*context[n:]] for n, context in zip(state.lengths, contexts)]
        hidden = run_on(self.model, tails, state)[range(rows), [len(tail) - 1 for tail in tails]]
        past.computed += sum(map(len, tails))
        state.truncate([len(context) - state.recurrent for context in contexts])
        if state.recurrent:
            hidden = run_on(self.model, [[context[-1]] for context in contexts], state)[:, 0]
        return state, hidden[:, None]

    def decode(self, going: list[int], ahead: int) -> int:
        """Take in the last token of these rows and up to `ahead` guesses each; returns how many tokens that gave."""
        before = [0] * len(self.rows)  # a row that waits for another starts anew each time
        for row in going:
            before[row] = self.state.lengths[row]
        self.state.lengths = before
        ahead = min(ahead, self.state.room[0] - 1 - max(before))
        guesses = [[] for _ in self.rows]
        for row in going:
            request = self.rows[row]
            left = request.max_new_tokens - len(request.output) - 1
            count = min(ahead, left, request.hope)
            guesses[row] = self.draft(request, count) if count else []
        tokens = [request.context[-1:] + guess for request, guess in zip(self.rows, guesses)]
        logits = self.run(tokens)  # (B, T, V)
        right, asked = [0] * len(tokens), len(going)
        for t in range(logits.shape[1]):
            self.extend([self.rows[row] for row in going], logits[going, t])
            going = [row for row in going if guesses[row][t:t + 1] == self.rows[row].output[-1:]
                     and self.rows[row].held and not self.rows[row].done]
            for row in going:
                right[row] += 1
            if not going:
                break
        if any(guesses):
            for request, guess, n in zip(self.rows, guesses, right):
                request.hope = min(n + 1, GUESSES) if guess else request.hope
                self.guessed[0] += len(guess)
                self.guessed[1] += n
            self.state.truncate([length + 1 + n for length, n in zip(before, right)])
        return asked + sum(right)

    def run(self, tokens: list) -> Tensor:
        """The logits (B, T, V) behind the next tokens of each row; with `graphs` one token each is a recorded step."""
        state = self.state
        if self.graphs and not state.recurrent and max(map(len, tokens)) == 1:
            seen = min(state.room[0], max(state.lengths) // SEEN * SEEN + SEEN)
            try:
                last = self.recorded
                if not last or last.state is not state or last.fixed.seen != seen:
                    self.recorded = Recorded(self, seen)
                return self.recorded(tokens)
            except RuntimeError as error:
                print(f"--graphs: {str(error).splitlines()[0]}; going on without", file=sys.stderr)
                self.graphs, self.recorded = False, None
        return self.logits(run_on(self.model, tokens, state))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (B, T, C) -> (B, T, V)"""
        return self.model.logits(hidden)[..., :self.vocab_size].float()

    def extend(self, group: list[Request], logits: Tensor):
        """Add a token to each request from logits (B, V), those behind its last one."""
        for request, (token, logprob) in zip(group, pick(logits, group)):
            request.held = len(request.context)
            request.take(token, logprob, self.block)

    def report(self) -> str:
        """Tokens and tokens per second so far: of the prompts, with the first new tokens, and of decoding after it."""
        parts = [f"{name} {tokens:,} tokens in {seconds:.2f} s ({tokens / max(seconds, 1e-9):,.0f}/s)"
                 for name, (tokens, seconds) in self.spent.items()]
        made, right = self.guessed
        return ", ".join(parts + [f"{right / max(made, 1):.0%} of {made:,} guesses right"] * (made > 0))


# ---- faster decoding: guesses that cost less than a step, weights that take fewer bytes

def look_up(request: Request, count: int) -> list[int]:
    """What followed the last tokens where they stood before (Saxena 2023, prompt lookup).

    >>> look_up(Request([1, 2, 3, 4, 5, 9, 2, 3]), 2)
    [4, 5]
    """
    text = request.prompt + request.output
    for n in (3, 2):
        tail = text[-n:]
        for at in range(len(text) - n - 1, -1, -1):
            if text[at:at + n] == tail:
                return text[at + n:at + n + count]
    return []


class Draft:
    """What look_up finds, which costs nothing, and else the most probable tokens of a smaller model.

    A recurrence goes back one call at most, so a draft of recurrent layers begins anew behind each wrong guess.
    """

    def __init__(self, model: GPT, vocab_size: int):
        self.model = model
        self.vocab_size = vocab_size
        self.pasts = weakref.WeakKeyDictionary()  # of each request that is there

    def __call__(self, request: Request, count: int) -> list[int]:
        past = self.pasts.setdefault(request, Past(self.model, self.model.config.block_size))
        guesses = look_up(request, count)
        for _ in range(0 if guesses else count):
            hidden = past.take_in(request.context + guesses)
            logits = self.model.logits(hidden)[0, 0, :self.vocab_size]
            guesses.append(int(logits.argmax()))
        return guesses


def load_draft(name: str, engine: Engine) -> Callable:
    """The draft of this name for an engine: `lookup`, or a checkpoint. Raises OSError or ValueError."""
    if name == "lookup":
        return look_up
    draft, tokenizer = load(name, next(engine.model.parameters()).device)
    fits = tokenizer and tokenizer.vocab_size == engine.vocab_size and draft.config.block_size >= engine.block
    require(fits, f"--draft={name} needs the tokenizer of --ckpt, and a block_size of {engine.block} or more")
    return Draft(draft, engine.vocab_size)


def by_columns(model: GPT) -> None:
    """Lay out matrices that are higher than wide by columns: CPUs then multiply them faster with a single vector."""
    for layer in model.modules():
        if type(layer) is Linear and layer.weight.shape[0] > layer.weight.shape[1]:
            layer.weight.data = layer.weight.data.T.contiguous().T


PACKED = {8: "_weight_int8pack_mm", 4: "_weight_int4pack_mm_for_cpu"}  # torch's products on CPUs, by bits


class Quantised(nn.Module):
    """A linear layer with weights of few bits: code * scale, one scale for each group of a row, rounded to nearest.

    The entry that is farthest from 0 in its group gets the lowest code, -128 or -8 (as in llama.cpp's Q4_0). int8 has a
    group a row, int4 groups of 32. Torch's packed products on CPUs take activations in bfloat16; where they are
    missing, and for many rows, the weight is restored a block at a time.
    """

    block = 4096  # rows of the weight

    def __init__(self, layer: Linear, bits: int):
        super().__init__()
        n_out, n_in = layer.weight.shape
        size = 32 if bits == 4 else n_in
        groups = layer.weight.detach().float().view(n_out, -1, size)
        extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
        scale = (extreme / -2 ** (bits - 1)).bfloat16().float()
        codes = (groups / scale).nan_to_num().round()  # 0 / 0: 0
        codes = codes.clamp(-2 ** (bits - 1), 2 ** (bits - 1) - 1).view(n_out, n_in)
        scale = scale[:, :, 0]
        self.few, self.size = 64, size  # so many rows of x at most take the packed product
        if layer.weight.device.type != "cpu" or not hasattr(torch.ops.aten, PACKED[bits]) or n_in % 32:
            self.few = 0  # the packed products read 32 entries at a time
        elif bits == 4:
            self.few = sys.maxsize
            codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1)
            scale = torch.stack((scale.T, torch.zeros_like(scale.T)), 2)  # (groups, n_out, 2): w = (code - 8) scale + 0
        codes = codes if codes.dtype == torch.uint8 else codes.to(torch.int8)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale.bfloat16().contiguous(), requires_grad=False)
        self.bias = layer.bias
        self._forward_hooks = layer._forward_hooks  # a limit of the logits

    def restored(self, rows: slice | Tensor) -> Tensor:
        """These rows of the weight, (..., n_in); not of packed int4."""
        codes = self.codes[rows].float().unflatten(-1, (-1, self.size))
        return (codes * self.scale[rows].float()[..., None]).flatten(-2)

    def forward(self, x):
        rows = x.flatten(0, -2).bfloat16()  # (N, n_in)
        if len(rows) > self.few:
            parts = []
            for start in range(0, len(self.codes), self.block):
                weight = self.restored(slice(start, start + self.block))
                parts.append(F.linear(rows.float(), weight))
            y = torch.cat(parts, 1)
            y = y.bfloat16() if self.few else y  # as few rows are: a text must not depend on how many are beside it
        elif self.codes.dtype == torch.int8:
            y = torch._weight_int8pack_mm(rows, self.codes, self.scale[:, 0])
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, self.size, self.scale)
        y = y.type_as(x).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def quantise(model: GPT, kind: str) -> str:
    """Replace the matrices of the layers by whole numbers (the head by int8 in any case); tells what that saves.

    Matrices of experts, embeddings that are not the head, and n-gram tables keep their type.
    """
    require(kind in ("int8", "int4"), f"--quantize={kind}: choose from int8, int4")
    before = sum(weight.nbytes for weight in model.parameters())
    for name, layer in [*model.named_modules()]:
        if type(layer) is Linear and not name.endswith("router"):
            n_out, n_in = layer.weight.shape
            fits = kind == "int4" and name != "head" and n_in % 32 == n_out % 16 == 0
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, Quantised(layer, 4 if fits else 8))
    if model.config.tie_embeddings:
        dtype = model.embedding.weight.dtype  # of --dtype, which the norms have, too
        del model.embedding.weight
        model.embedding.forward = lambda ids: model.head.restored(ids).to(dtype)
    after = sum(weight.nbytes for weight in model.parameters())
    return f"{kind}: {before / 1e6:,.1f} MB of weights now take {after / 1e6:,.1f} MB"


# ---- smaller models: what matters least is left out

@torch.no_grad()
def smallest(model: GPT, share: float) -> None:
    """A share of each hidden matrix, the numbers nearest to 0, becomes 0 (Han et al. 2015)."""
    require(0 < share < 1, f"--prune={share}: a share is above 0 and below 1")
    for name, role in model.roles().items():
        if WEIGHTS[role].muon:
            flat = model.get_parameter(name).view(-1)
            flat[flat.abs().argsort()[:int(share * len(flat))]] = 0


def without(model: GPT, layer: int) -> GPT:
    """A copy with all but one layer; those above it move down."""
    model = copy.deepcopy(model)
    config, left = model.config, [i for i in range(model.config.n_layer) if i != layer]
    for axis in ("mixer", "position"):  # these may differ from layer to layer
        keys = [config.tiled(axis)[i] for i in [*left, layer]]  # with the last, a kind that is gone is still named
        setattr(config, axis, ",".join(keys if len({*keys}) > 1 else keys[:1]))
    config.n_layer = len(left)
    del model.blocks[layer], model.turned[layer]
    return model


@torch.inference_mode()
def least_layers(model: GPT, count: int) -> GPT:
    """All but `count` layers. One by one, that goes without which the model's own text costs least."""
    layers, length = model.config.n_layer, min(model.config.block_size - 1, CHUNK)
    require(0 < count < layers, f"--prune=layers:{count}: the model has {layers}, of which one must stay")
    requests = [Request([0], length, Sampling(1.0, 0), seed) for seed in range(16)]
    for _ in iter(Engine(model, requests).step, []):
        pass
    tokens = torch.tensor([request.prompt + request.output for request in requests])

    def loss(model):
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    for n in range(layers, layers - count, -1):
        model = min((without(model, layer) for layer in range(n)), key=loss)
    return model


def pruned(checkpoint: dict, how: str) -> dict:
    """A checkpoint's dict without what --prune names. Raises ValueError."""
    found = re.fullmatch(r"layers:(\d+)|(0?\.\d+)", how)
    require(found, f"--prune={how}: write a share such as 0.5, or layers:N")
    model, (count, share) = from_checkpoint(checkpoint).eval(), found.groups()
    if count:
        model = least_layers(model, int(count))
    else:
        smallest(model, float(share))
        checkpoint = checkpoint | dict(pruned=True)
    return checkpoint | dict(config=vars(model.config), weights=model.state_dict())


# ---- from text to text

SAMPLES = 1 << 16  # of one prompt; all of them are requests before the first one is decoded

def ask(tokenizer: Tokenizer | None, prompt: str | list, n_samples: int = 1, max_new_tokens: int = 256,
        stop: Sequence[str] = (), seed: int = 0, end: str = END, bias: dict | None = None,
        **sampling) -> list[Request]:
    """Requests for `n_samples` continuations of a text (or of ids), which end at the special token `end`.

    An empty text begins at <|endoftext|>. `sampling`: fields of Sampling; `bias`: see Request. Raises ValueError.
    """
    require(tokenizer, "the checkpoint has no tokenizer: give --tokenizer=FILE, or token ids (see Engine)")
    require(0 < n_samples <= SAMPLES, f"--n_samples={n_samples} must be 1 to {SAMPLES:,}")
    require(max_new_tokens >= 0, f"--max_new_tokens={max_new_tokens} must be at least 0")
    ids = (tokenizer.encode(prompt) if isinstance(prompt, str) else prompt) or [tokenizer.special_tokens[END]]
    settings = Sampling(**sampling)
    last = tokenizer.special_tokens.get(end, -1)
    return [Request(ids, max_new_tokens, settings, f"{seed} {sample}", last, TextStream(stop), bias or {})
            for sample in range(n_samples)]


def stream(engine: Engine, tokenizer: Tokenizer) -> Iterator[tuple[Request, str]]:
    """Decode the engine's requests; yields (request, its next piece of text) as pieces become certain.

    The last piece of a request, which may be empty, comes with `request.done` set.
    """
    for requests in iter(engine.step, []):
        for request in requests:
            piece = ""
            while request.fed < len(request.output):  # more than one where a draft was right
                token = request.output[request.fed]
                request.fed += 1
                final = bool(request.done) and request.fed == len(request.output)
                piece += request.text.feed(tokenizer.decode_bytes([token] if token != request.end else []), final)
                if request.text.stopped:
                    request.done = "stop"
                    del request.output[request.fed:], request.logprobs[request.fed:]
            if piece or request.done:
                request.said = request.said[0] + piece, request.fed, request.done
                yield request, piece


def complete(engine: Engine, tokenizer: Tokenizer, requests: list, shown: Request | None = None) -> list[str]:
    """The texts of requests that the engine has, when all are done; that of `shown` is printed as it comes."""
    for request, piece in stream(engine, tokenizer):
        if request is shown:
            print(piece, end="", flush=True)
    return [request.said[0] for request in requests]


def generate(model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], **how) -> list[str]:
    """Continue all prompts in one batch; `how` are arguments of `ask` (n_samples, stop, seed, temperature, ...).

    Returns the new texts without their prompts, the samples of one prompt behind each other. A text depends on its own
    prompt, the seed and its number among that prompt's samples. The model must be in eval mode. Raises ValueError.
    """
    requests = [request for prompt in prompts for request in ask(tokenizer, prompt, **how)]
    return complete(Engine(model, requests, tokenizer.vocab_size), tokenizer, requests)


# ---- conversations: what stands before and behind each message; the assistant's end is where its reply ends

TEMPLATES = {  # what stands before a conversation, before a message, behind it (one special token), between messages
    "chatml": ("", "<|im_start|>{}\n", "<|im_end|>", "\n"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", ""),
    "plain": ("", "{}: ", END, "\n"),
    "bare": (END, "", END, ""),  # who speaks is told by turns
}
ROLES = ("system", "user", "assistant", "tool")


def render(messages: list[dict], template: str, tokenizer: Tokenizer, reply: bool = False) -> tuple:
    """A conversation as token ids, and a mask: 1 exactly on the tokens of the assistant's messages and their ends.

    `messages`: dicts with `role` (one of ROLES) and `content`, in which special tokens are ordinary text. `template`:
    a key of TEMPLATES. `reply`: end with the head of an assistant's message that is still to be written. Raises
    ValueError, also where the tokenizer lacks a special token of the template: as text, a user could write it, too.
    """
    require(template in TEMPLATES, f"--template={template}: choose from {', '.join(TEMPLATES)}")
    before, head, end, after = TEMPLATES[template]
    lacking = set(re.findall(r"<\|\w+\|>", before + head + end)) - tokenizer.special_tokens.keys()
    require(not lacking, f"--template={template} needs the special tokens {', '.join(sorted(lacking))}")
    pieces: list = [(before, "all", 0)]
    for message in messages:
        role, content = message.get("role"), message.get("content")
        require(role in ROLES and isinstance(content, str), f"a message has a role of {ROLES} and a text as content")
        own = int(role == "assistant")
        pieces += [(head.format(role), "all", 0), (content, "none", own)]
        pieces += [(end, "all", own), (after, "all", 0)]
    if reply:
        pieces.append((head.format("assistant"), "all", 0))
    ids, mask = [], []
    for text, special, own in pieces:
        new = tokenizer.encode(text, special)
        ids += new
        mask += [own] * len(new)
    return ids, mask


def chat(engine: Engine, tokenizer: Tokenizer, o: "Options") -> None:
    """Answer each line of stdin; the last block_size tokens of the conversation count."""
    messages = [dict(role="system", content=o.system)] if o.system else []
    for line in sys.stdin:
        messages.append(dict(role="user", content=line.strip()))
        ids, _ = render(messages, o.template, tokenizer, reply=True)
        request = ask(tokenizer, ids, end=TEMPLATES[o.template][2], **wishes(o))[0]
        engine.submit(request)
        [answer] = complete(engine, tokenizer, [request], request)
        messages.append(dict(role="assistant", content=answer))
        print()


# ---- evaluation: a row of a public file -> (context, what may follow it, which of these is right)

def hellaswag(row: dict) -> tuple:
    """Zellers et al. 2019 (jsonl); marks in brackets are taken out as in lm-evaluation-harness."""
    texts = []
    for text in (f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}", *row["endings"]):
        text = text.strip().replace(" [title]", ". ")
        texts.append(re.sub(r"\[.*?\]", "", text).replace("  ", " "))
    return texts[0], [" " + text for text in texts[1:]], int(row["label"])


def mmlu(row: list[str]) -> tuple:
    """Hendrycks et al. 2021 (csv): question, four answers, the letter of the right one."""
    question, a, b, c, d, letter = row
    context = f"{question.strip()}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"
    return context, [" A", " B", " C", " D"], list("ABCD").index(letter)


def gsm8k(row: dict) -> tuple:
    """Cobbe et al. 2021 (jsonl): one right text, of which the number at its end counts."""
    return f"Question: {row['question']}\nAnswer:", [" " + row["answer"]], 0


def read_rows(read: Callable, path: Path) -> list[tuple]:
    """What `read` makes of the rows of a csv or jsonl file. ValueError names a row that it cannot read."""
    items = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            read_csv = path.suffix == ".csv"  # in which an empty line may lie within a cell
            for row in filter(None, csv.reader(file)) if read_csv else map(json.loads, filter(str.strip, file)):
                items.append(read(row))
        except Exception as error:  # of any kind, as a row may hold anything
            raise ValueError(f"{path}, row {len(items) + 1} is damaged: {error!r:.200}") from error
    return items


def final_number(text: str) -> str:
    """The number behind ####, or else the last one, without commas ("": there is none)."""
    marked = text.partition("####")[2]
    numbers = re.findall(r"-?\d[\d,.]*", marked or text) or [""]
    return numbers[0 if marked else -1].replace(",", "").rstrip(".")


def pass_at(k: int, right: int, n: int) -> float:
    """The probability that of k texts drawn from n, `right` of them right, one is right (Chen et al. 2021, unbiased).

    >>> pass_at(1, 1, 4), pass_at(2, 1, 4), pass_at(4, 0, 4)
    (0.25, 0.5, 0.0)
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def summary(pairs: list, others: Sequence = ()) -> list[float]:
    """Sum of the numerators over sum of the denominators, and where 95% of it lie when the items are drawn anew.

    `others`: another list of the same items, whose ratio is taken off, draw by draw (a paired bootstrap, Koehn 2004).
    """
    rows = torch.randint(len(pairs), (1000, len(pairs)), generator=torch.Generator().manual_seed(0))
    rows = torch.cat((torch.arange(len(pairs))[None], rows))  # the items as they are come first
    ratios = 0.0
    for sign, of in ((1, pairs), (-1, others or [[0, 1]] * len(pairs))):
        top, bottom = torch.tensor(of, dtype=torch.float64)[rows].sum(1).T  # (1001,) each
        ratios = ratios + sign * top / bottom
    value, *drawn = ratios.tolist()
    drawn.sort()
    return [value, drawn[25], drawn[974]]


def read_results(path: str | os.PathLike) -> dict:
    """A file that --eval or data.py's step decontaminate wrote. Raises OSError or ValueError."""
    try:
        results = json.loads(Path(path).read_bytes())
        results.get("found", {}).keys()
        for name in TASKS.keys() & results.keys():
            for record in results[name].values():
                require(isinstance(record.get("item", []), list), "an item is no list")
                scores = [record[metric] for metric in record.keys() - {"item", "answer"}]
                [top + bottom + 0.0 for top, bottom in scores]  # raises where they are no pairs of numbers
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no file of results: {error}") from error
    return results


def checkpoint_hash(ckpt: str | os.PathLike) -> str:
    """Of what is in a checkpoint, wherever it lies: a hash of the sums of its entries."""
    with zipfile.ZipFile(ckpt) as file:
        sums = [entry.CRC for entry in file.infolist()]
    return hashlib.sha256(str(sums).encode()).hexdigest()[:16]


def summaries(name: str, records: dict, others: dict | None = None, over: str = "") -> Iterator[str]:
    """A line for each score; with `others`, of the file `over`, how far it is above theirs on the items of both."""
    theirs, sign = (records, "") if others is None else (others, "+")
    for metric in dict.fromkeys(metric for record in records.values() for metric in record):
        keys = [key for key, record in records.items() if metric in record and metric in theirs.get(key, {})]
        if keys and metric not in ("item", "answer"):
            own, other = ([of[key][metric] for key in keys] for of in (records, theirs))
            value, low, high = summary(own, other if sign else ())
            line = f"{name} {metric}: {value:{sign}.4f} ({low:{sign}.4f} to {high:{sign}.4f})"
            if metric == "nats_per_token" and not sign:
                line += f", perplexity {torch.tensor(value, dtype=torch.float64).exp():,.1f}"  # inf of a diverged model
            yield line + f" over {over}, on {len(keys)} items" * bool(sign)


def gather(own: dict) -> list[dict]:
    """What each process of torchrun has here, by rank; [own] without torchrun."""
    every = [own]
    if dist.is_initialized():
        every *= dist.get_world_size()
        dist.all_gather_object(every, own)
    return every


@dataclasses.dataclass
class Exam:
    """Grades items: an answer, and scores as [numerator, denominator], over which sums are taken."""

    engine: Engine
    tokenizer: Tokenizer
    o: Options

    @torch.inference_mode()
    def score(self, context: list, ends: list) -> list[list[float]]:
        """The log-probability of each token of each continuation; what contexts share with the last one is not redone.

        Where context and continuation are longer than the block, the context's first tokens are left out.
        """
        past = self.engine.past
        B = len(ends)
        longest = max(map(len, ends))
        context = context[-max(1, self.engine.block - longest):]
        needed = len(context) + longest
        require(needed <= past.capacity, f"an item of {needed} tokens, block or --cache_gb hold {past.capacity}")
        first = past.take_in(context)  # (1, 1, C)
        rest = run_on(past.model, ends, past.state.fork([0] * B))[:, :-1]  # (B, T - 1, C)
        hidden = torch.cat((first.expand(B, -1, -1), rest), 1)  # (B, T, C)
        T = hidden.shape[1]
        targets = torch.tensor([end + [-1] * (T - len(end)) for end in ends], device=hidden.device)
        logprobs = -past.model.nats(hidden.flatten(0, 1), targets.flatten()).view(B, T)
        return [row[:len(end)].tolist() for row, end in zip(logprobs, ends)]

    def text(self, item: tuple) -> dict:
        """How well are the second tokens predicted behind the first?"""
        context, end = item
        nats = -sum(self.score(context, [end])[0])
        size = len(self.tokenizer.decode_bytes(end))
        return dict(bits_per_byte=[nats / math.log(2), size], nats_per_token=[nats, len(end)])

    def choice(self, item: tuple) -> dict:
        """Is the right continuation the most probable one: in sum, by token, by character (acc_norm), by byte?"""
        context, choices, gold = item
        ids = self.tokenizer.encode(context)
        ends = [self.tokenizer.encode(context + text)[len(ids):] for text in choices]
        sums = torch.tensor(list(map(sum, self.score(ids, ends))))
        # the space that a choice begins with is not counted, as in lm-evaluation-harness
        sizes = {
            "acc": [1] * len(ends),
            "acc_token": list(map(len, ends)),
            "acc_norm": [len(text) - 1 for text in choices],
            "acc_byte": [len(text.encode()) - 1 for text in choices],
        }
        bits = -sums[gold].item() / math.log(2)
        scores = {"answer": sums.tolist(), "gold_bits_per_byte": [bits, sizes["acc_byte"][gold]]}
        for name, size in sizes.items():
            best = (sums / torch.tensor(size)).argmax()
            scores[name] = [int(best == gold), 1]
        return scores

    def solution(self, item: tuple) -> dict:
        """Is the number at the end of one text, or of any of all, the right one?"""
        context, [right], _ = item
        how = wishes(self.o)
        how["stop"].append("Question:")
        requests = ask(self.tokenizer, context, **how)
        self.engine.submit(*requests)
        texts = complete(self.engine, self.tokenizer, requests)
        gold, *answers = map(final_number, [right, *texts])
        scores: dict = {"answer": texts}
        n = len(answers)
        for k in {1, n}:
            scores[f"pass@{k}"] = [pass_at(k, answers.count(gold), n), 1]
        if n > 1:  # one answer of n: the most frequent (Wang et al. 2022), that of the text with the likeliest tokens
            counts = collections.Counter(filter(None, answers))
            vote = max(counts, key=counts.__getitem__, default="")
            mean = [sum(request.logprobs) / max(1, len(request.logprobs)) for request in requests]
            best = mean.index(max(mean))
            scores[f"maj@{n}"] = [int(vote == gold), 1]
            scores[f"best@{n}"] = [int(answers[best] == gold), 1]
        return scores

    def found(self, item: tuple) -> dict:
        """Is the key what the model says next, greedily? One metric for each length."""
        context, key, length = item
        ids = self.tokenizer.encode(context)
        request = Request(ids, len(self.tokenizer.encode(context + key)) - len(ids), Sampling(0))
        self.engine.submit(request)
        [text] = complete(self.engine, self.tokenizer, [request])
        return {"answer": text, f"found_in_{length}": [int(text == key), 1]}

    def passkeys(self) -> Iterator[tuple]:
        """A key somewhere in much that is idle, by length in tokens up to the block (Mohtashami and Jaggi 2023)."""
        idle = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
        begin, question = "There is a pass key hidden in this text. ", "What is the pass key? The pass key is"
        size = len(self.tokenizer.encode(idle))
        for part in (8, 4, 2, 1):
            length = self.engine.block // part
            for number in range(20):
                key = f" {random.Random(number).randrange(10000, 100000)}"
                told = f"The pass key is{key}. Remember it. "
                room = length - len(self.tokenizer.encode(begin + told + question + key)) - 1
                texts = [idle] * (room // size)
                texts.insert(len(texts) * number // 19, told)
                if room >= 0:
                    yield f"{length} {number}", (begin + "".join(texts) + question, key, length)

    def windows(self) -> Iterator[tuple]:
        """Items of half a block behind half a block, of each *.txt, with their names."""
        stride, folder = max(1, self.engine.block // 2), Path(self.o.eval_data)
        for path in sorted(folder.rglob("*.txt")):
            text = path.read_bytes().decode("utf-8", "replace")
            ids = [self.tokenizer.special_tokens[END], *self.tokenizer.encode(text)]
            for start in range(1, len(ids), stride):
                before = ids[max(0, start - stride):start]
                yield f"{path.relative_to(folder)} {start}", (before, ids[start:start + stride])

    def items(self, read: Callable, files: str, solved: str, first: str) -> Iterator[tuple]:
        """Items (context behind solved examples, choices, gold) with their names; the same twice counts once."""
        folder, seen = Path(self.o.eval_data), set()
        for path in sorted(folder.rglob(files)):
            subject = path.stem.removesuffix("_test")
            begin = first.format(subject.replace("_", " "))
            for other in folder.rglob(solved.format(subject)):
                for context, choices, gold in read_rows(read, other)[:self.o.shots]:
                    begin += f"{context}{choices[gold]}\n\n"
            rows = read_rows(read, path)
            for number, (context, *rest) in enumerate(rows):
                if self.o.swap:
                    context = rows[number - len(rows) // 2][0]
                twin = f"{context}{rest}"
                if twin not in seen:
                    yield f"{path.relative_to(folder)} {number}", (begin + context, *rest)
                seen.add(twin)

    def run(self) -> Iterator[str]:
        """Grade all tasks; yields a line for each score.

        o.output holds every item, answer and score. It is written as it grows; an item that it holds is not graded
        again, but for those of another model under the same name. Under torchrun each process grades its share, and the
        first one writes.
        """
        output, ckpt = Path(self.o.output), checkpoint_hash(self.o.ckpt)
        settings = dict(ckpt=self.o.ckpt, shots=self.o.shots, **wishes(self.o))
        own = {name: vars(self.o)[name] for name in ("dtype", "quantize", "swap")}
        settings |= {name: value for name, value in own.items() if value != getattr(Options, name)}
        begin = dict(settings=settings, fingerprint=ckpt)
        ranks = gather(read_results(output) if output.exists() else begin)
        held, rank = ranks[0], dist.get_rank() if dist.is_initialized() else 0
        require(held.get("settings") == settings, f"{output} has results of other settings: name another --output")
        if held.get("fingerprint") != ckpt:
            held = begin
            yield f"{output} was of another {self.o.ckpt}: it is now {output}.old"
            if rank == 0:
                os.replace(output, f"{output}.old")
        require(self.o.shots >= 0, f"--shots={self.o.shots} must not be negative")
        compared, sets = read_results(self.o.compare) if self.o.compare else {}, {}
        short = f"a block of {self.engine.block} tokens is too short"
        for name in self.o.eval.split(","):  # all of them before one is graded, which may take hours
            require(name in TASKS, f"--eval={name}: choose from {', '.join(TASKS)}")
            told = name == "passkey" or self.o.eval_data and Path(self.o.eval_data).is_dir()
            require(told, f"--eval={name} needs a folder of items: --eval_data={self.o.eval_data} is none")
            find, _, *how = TASKS[name]
            sets[name] = {key: [*item] for key, item in find(self, *how)}
            require(sets[name], f"--eval_data={self.o.eval_data} has no files for {name}, or {short}")
        output.parent.mkdir(parents=True, exist_ok=True)
        for name, items in sets.items():
            grade, records = TASKS[name][1], held.setdefault(name, {})
            # of a file that was changed, or of another one of this name, an item is not the one that was graded
            todo = {key: item for key, item in items.items() if records.get(key, {}).get("item") != item}
            size = 100 * len(ranks)
            for start in range(0, len(todo), size):
                keys = [*todo][start:start + size]
                graded = {key: dict(item=todo[key]) | grade(self, todo[key]) for key in keys[rank::len(ranks)]}
                found = {key: record for part in gather(graded) for key, record in part.items()}
                records |= {key: found[key] for key in keys}
                if rank == 0:
                    with replacing(output) as file:
                        file.write(json.dumps(held).encode())
            records = {key: records[key] for key in items}  # there may be some of files that are gone
            yield from summaries(name, records)
            yield from self.leaks(name, records)
            if self.o.compare:
                others = compared.get(name, {})
                # what stands before may differ (--swap, --shots), what is graded may not: windows begin at tokens
                same = {key: record for key, record in records.items()
                        if key in others and others[key].get("item", [])[1:] == record["item"][1:]}
                yield from summaries(name, same, others, self.o.compare)
                if not same:
                    yield f"{name}: {self.o.compare} has none of these items"

    def leaks(self, name: str, records: dict) -> Iterator[str]:
        """A line where a report of data.py, in or beside --eval_data or beside --ckpt, has items of dropped texts."""
        files = {Path(key.rpartition(" ")[0]).name for key in records}
        data = Path(self.o.eval_data or ".")
        for folder in dict.fromkeys((data, data.parent, Path(self.o.ckpt).parent)):  # each once
            path = folder / "contamination.json"
            found = read_results(path).get("found", {}) if path.exists() else {}
            count = sum(passage.rsplit(" ", 2)[0] in files for passage in found)
            if count:
                yield f"{name}: note that documents with {count} of its passages were dropped, says {path}"


# items, grade; reader, files, files of solved examples ({}: the first name without its ending), what comes before them
TASKS: dict = {
    "ppl": (Exam.windows, Exam.text),
    "passkey": (Exam.passkeys, Exam.found),
    "hellaswag": (Exam.items, Exam.choice, hellaswag, "*hellaswag*val*.jsonl", "*hellaswag*train*.jsonl", ""),
    "mmlu": (Exam.items, Exam.choice, mmlu, "*_test.csv", "{}_dev.csv",
             "The following are multiple choice questions (with answers) about {}.\n\n"),
    "gsm8k": (Exam.items, Exam.solution, gsm8k, "*gsm8k*test*.jsonl", "*gsm8k*train*.jsonl", ""),
}


# ---- the server: a thread for each connection asks and waits, one thread decodes

BODY = 1 << 20  # bytes of a request
SILENT = 256  # connections that have sent no request; one more closes the oldest of them
QUEUE = 512  # texts in the making and waiting; a request for more is refused
SILENCE, PATIENCE = 20, 600  # seconds: for a client to send or to read, for a reply to be complete
PAUSE = 0.04  # seconds; what is decoded meanwhile travels together, so that the decoding thread seldom waits for others
OURS = r"(localhost|[\d.]+|\[[\da-f:.]+\])(:\d+)?"  # an address is ours; a name may be anyone's (DNS rebinding)
MUTE = argparse.Namespace(special_tokens={}, vocab_size=0, decode_bytes=lambda ids: b"")  # where there is no tokenizer
KINDS = {  # types of what a request may say; what else it says is ignored
    "prompt": (str, list),
    "messages": (list,),
    "stop": (str, list),
    "logit_bias": (dict,),
    "stream": (bool,),
    "logprobs": (int, bool),
    **dict.fromkeys(("n", "max_tokens", "max_completion_tokens", "seed"), (int,)),
    **{name: (int, type(value)) for name, value in vars(Sampling()).items()},
}


class Refusal(ValueError):
    """A reply that is an error: HTTP status, message, `param` or `code` of OpenAI's form."""


def insist(holds: object, status: int, message: str, **more) -> None:
    """Raise Refusal unless `holds`."""
    if not holds:
        raise Refusal(status, message, more)


class Server(http.server.ThreadingHTTPServer):
    """Listens at o.host and o.port, and decodes; serve_forever() answers."""

    request_queue_size = 128

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, o: "Options"):
        self.o, self.name = o, Path(o.ckpt).resolve().parent.name
        self.engine = engine
        self.tokenizer = tokenizer or MUTE
        self.key = os.environ.get("API_KEY", "")
        self.silent = {}  # connections that have sent no request, the oldest first
        self.statuses = collections.Counter()
        self.failures = 0  # of decoding
        self.lock, self.wake = threading.Lock(), threading.Event()
        super().__init__((o.host, o.port), Handler)
        threading.Thread(target=self.decode, daemon=True).start()

    def decode(self):
        """Step the engine while it has requests, for ever."""
        while self.wake.wait():
            self.wake.clear()  # before it looks: a request that comes later sets it again
            try:
                for _ in stream(self.engine, self.tokenizer):
                    pass  # what came is in each request's `said`
            except Exception as error:  # of any kind, as too little memory: what is going fails, not what comes next
                with self.lock:
                    self.failures += 1
                    self.engine.clear()
                print(f"decoding failed: {error}", file=sys.stderr)


class Handler(http.server.BaseHTTPRequestHandler):
    """One request. With HTTP/1.0 the connection ends with the reply, and nothing that was not read stays in it."""

    server_version, sys_version = "sample.py", ""
    disable_nagle_algorithm = True
    timeout = SILENCE
    streaming = False  # whether events are being sent

    def handle(self):
        """Read a request, then do_GET. Silent clients in any number keep nobody out: the oldest makes room."""
        silent = self.server.silent
        silent[self.connection] = None
        with contextlib.suppress(OSError):
            while len(silent) > SILENT:
                oldest = [*silent][0]
                silent.pop(oldest, None)
                oldest.shutdown(socket.SHUT_RDWR)  # its thread reads the end of the input
        with contextlib.suppress(OSError):  # the client left, or is too slow
            super().handle()
        silent.pop(self.connection, None)

    def do_GET(self):
        """Answer, by either method, as the row of ROUTES says, or with an error."""
        self.server.silent.pop(self.connection, None)
        try:
            self.check()
            route = f"{self.command} {self.path.partition('?')[0]}"
            insist(route in ROUTES, 404, f"there is no {route}, but {', '.join(ROUTES)}")
            ROUTES[route](self)
        except ValueError as error:
            self.refuse(error)

    do_POST = do_GET

    def check(self):
        """Is it meant for us? A page of anyone's can make a browser send requests here."""
        host, key = self.headers.get("Host", ""), self.server.key
        ours = re.fullmatch(OURS, host) or host.partition(":")[0] == self.server.o.host
        insist(ours, 403, f"the Host is {host!r}: ask for localhost, for an address, or for --host")
        origin = self.headers.get("Origin", f"http://{host}")
        insist(origin.partition("://")[2] == host, 403, f"pages of {origin} may not ask here")
        given = self.headers.get("Authorization", "").encode("latin-1")
        known = not key or hmac.compare_digest(given, f"Bearer {key}".encode())
        insist(known or not self.path.startswith("/v1/"), 401, "a key is needed: Authorization: Bearer KEY")

    def reply(self, content: object, kind: str = "application/json", status: int = 200):
        """Send a text as it is, and anything else as JSON; of events, which are to follow, this is the head."""
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        with self.server.lock:
            self.server.statuses[status] += 1
        self.send_response(status)
        headers = {"Content-Type": kind, "X-Content-Type-Options": "nosniff"}
        headers |= {"Content-Length": str(len(data))} if data else {"Cache-Control": "no-store"}
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, error: ValueError):
        """Send an error in OpenAI's form."""
        status, message, more = error.args if isinstance(error, Refusal) else (400, str(error).lstrip("-"), {})
        kind = "invalid_request_error" if status < 429 else "server_error"
        content = dict(error=dict(message=message, type=kind, param=None, code=None) | more)
        if self.streaming:
            return self.event(content)
        self.reply(content, status=status)

    def send_error(self, code, message=None, explain=None):
        """What the base class finds: a request that is no HTTP"""
        self.refuse(Refusal(code, message or self.responses[code][0], {}))

    def log_message(self, *words):
        """Nothing is logged; see /metrics."""

    def event(self, content: dict):
        self.wfile.write(b"data: %s\n\n" % json.dumps(content).encode())

    def models(self):
        self.reply(dict(object="list", data=[dict(id=self.server.name, object="model", created=0, owned_by="")]))

    def metrics(self):
        """Counts and seconds since the start, for Prometheus."""
        engine = self.server.engine
        values = dict(active=len(engine.active), waiting=len(engine.waiting))
        values |= {f'replies_total{{status="{status}"}}': n for status, n in [*self.server.statuses.items()]}
        for phase, (tokens, seconds) in engine.spent.items():
            values |= {f"{phase}_tokens_total": tokens, f"{phase}_seconds_total": seconds}
        self.reply("".join(f"sample_{name} {value}\n" for name, value in values.items()), "text/plain; version=0.0.4")

    def parameters(self) -> dict:
        """What a request says; null is as nothing."""
        insist(self.headers.get_content_type() == "application/json", 415, "Content-Type must be application/json")
        size = self.headers.get("Content-Length", "")
        insist(size.isdecimal(), 411, "Content-Length is missing")
        data = self.rfile.read(min(int(size), 16 * BODY))  # much, too: most clients read no reply before they sent all
        insist(len(data) <= BODY, 413, f"a request may have {BODY} bytes")
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Refusal(400, f"the request is no JSON: {error}", {}) from error
        insist(isinstance(body, dict), 400, "the request is no JSON object")
        body = {name: body[name] for name in KINDS if body.get(name) is not None}
        for name, value in body.items():
            kinds = " or ".join(kind.__name__ for kind in KINDS[name])
            insist(type(value) in KINDS[name], 400, f"{name} must be {kinds}", param=name)
        return body

    def prompts(self, body: dict, chat: bool) -> list[list[int]]:
        """The prompts of a request as token ids."""
        server, name = self.server, "messages" if chat else "prompt"
        given: Any = body.get(name)
        insist(given, 400, f"{name} is missing, or empty", param=name)
        given = [given] if chat or isinstance(given, str) or type(given[0]) is int else given
        insist(len(given) * body.get("n", 1) <= QUEUE, 400, f"at most {QUEUE} texts can be asked for", param=name)
        silent = server.tokenizer is MUTE and (chat or any(isinstance(one, str) for one in given))
        insist(not silent, 400, "the checkpoint has no tokenizer: a prompt is token ids, and there are no messages")
        with server.lock:  # the tokenizer's cache is not for several threads
            if chat:
                insist(all(type(one) is dict for one in given[0]), 400, "a message is an object", param=name)
                given = [render(given[0], server.o.template, server.tokenizer, reply=True)[0]]
            ids = [server.tokenizer.encode(one) if isinstance(one, str) else one for one in given]
        good = all(type(one) is list and {*map(type, one)} == {int} for one in ids)
        insist(good, 400, "prompt must be a text, token ids, or a list of such", param=name)
        longest, block = max(map(len, ids)), server.engine.block
        insist(longest <= block, 400, f"the prompt has {longest} tokens, the model takes {block}",
               code="context_length_exceeded")
        return ids

    def requests(self, body: dict, chat: bool) -> list[Request]:
        """The requests to the engine; what is left open is as the options of the command line say."""
        o, vocab_size = self.server.o, self.server.engine.vocab_size
        how = wishes(o) | {name: body[name] for name in vars(Sampling()) if name in body}
        stops: Any = body.get("stop", how["stop"])
        stops = [stops] if isinstance(stops, str) else stops
        good = len(stops) <= 64 and all(type(stop) is str and 0 < len(stop) <= 64 for stop in stops)
        insist(good, 400, "stop must be up to 64 texts of 1 to 64 characters", param="stop")
        bias = body.get("logit_bias", {})
        good = all(token.isdecimal() and int(token) < vocab_size and type(extra) in (int, float) and abs(extra) <= 100
                   for token, extra in bias.items())
        insist(good and len(bias) <= 300, 400, f"logit_bias takes up to 300 tokens from 0 to {vocab_size - 1}, "
               "and for each a number from -100 to 100", param="logit_bias")
        how |= dict(stop=stops, bias={int(token): extra for token, extra in bias.items()})
        how |= dict(n_samples=body.get("n", 1), seed=body.get("seed", random.getrandbits(32)))
        how |= dict(max_new_tokens=body.get("max_completion_tokens", body.get("max_tokens", o.max_new_tokens)))
        insist(how["max_new_tokens"] >= 0, 400, "max_tokens must be at least 0", param="max_tokens")
        how |= dict(end=TEMPLATES[o.template][2] if chat else END)
        return [request for ids in self.prompts(body, chat) for request in ask(self.server.tokenizer, ids, **how)]

    def choice(self, request: Request, said: tuple, sent: tuple, body: dict, chat: bool) -> dict:
        """What a request said beyond what was sent, in the API's form."""
        (text, count, done), (before, first, _) = said, sent
        text, last = text[len(before):], count - (done == "end")
        ids, chances = request.output[first:last], request.logprobs[first:last]
        out = dict(finish_reason={"": None, "length": "length"}.get(done, "stop"), token_ids=ids, logprobs=None)
        if body.get("logprobs", False) is not False:
            rows = []
            for token, chance in zip(ids, chances):
                data = self.server.tokenizer.decode_bytes([token])
                rows.append(dict(token=data.decode("utf-8", "replace"), bytes=[*data], logprob=chance, top_logprobs=[]))
            # of texts, and of chats
            out["logprobs"] = dict(tokens=[row["token"] for row in rows], token_logprobs=chances, content=rows)
        if not chat:
            return out | dict(text=text)
        role = {} if first else dict(role="assistant")
        return out | {"delta" if body.get("stream") else "message": role | dict(content=text)}

    def complete(self, chat: bool = False):
        """Reply with texts, whole or as events. However it ends, its requests leave the engine."""
        server, body, until = self.server, self.parameters(), time.monotonic() + PATIENCE
        requests, streaming = self.requests(body, chat), body.get("stream", False)
        kind = "chat.completion" + ".chunk" * streaming if chat else "text_completion"
        head = dict(id=f"cmpl-{random.getrandbits(64):x}", object=kind, created=int(time.time()), model=server.name)
        try:
            with server.lock:
                failures, going = server.failures, len(server.engine.active) + len(server.engine.waiting)
                insist(going + len(requests) <= QUEUE, 429, f"{going} texts are in the making, try again later")
                server.engine.submit(*requests)
            server.wake.set()
            if streaming:
                self.reply("", "text/event-stream")
                self.streaming = True
            done, sent = False, [("", 0, "")] * len(requests)
            while not done:
                time.sleep(PAUSE)
                insist(failures == server.failures, 500, "decoding failed: see what the server printed")
                insist(time.monotonic() < until, 503, f"this takes more than {PATIENCE} s")
                readable, _, _ = select.select([self.connection], [], [], 0)
                if readable and not self.connection.recv(1, socket.MSG_PEEK):
                    raise ConnectionAbortedError("the client left")
                said = [request.said for request in requests]
                done = all(why for _, _, why in said)
                choices = []
                for index, (now, before) in enumerate(zip(said, sent)):
                    if now != before and (done or streaming):
                        choices.append(dict(index=index) | self.choice(requests[index], now, before, body, chat))
                if streaming and choices:
                    self.event(head | dict(choices=choices))
                    sent = said
        finally:
            for request in requests:
                request.done = request.done or "cancel"
        if streaming:
            return self.wfile.write(b"data: [DONE]\n\n")
        asked = sum(len(request.prompt) for request in requests[::body.get("n", 1)])
        made = sum(len(request.output) for request in requests)
        usage = dict(prompt_tokens=asked, completion_tokens=made, total_tokens=asked + made)
        self.reply(head | dict(choices=choices, usage=usage))


ROUTES = {
    "GET /": lambda handler: handler.reply(PAGE, "text/html; charset=utf-8"),
    "GET /metrics": Handler.metrics,
    "GET /v1/models": Handler.models,
    "POST /v1/completions": Handler.complete,
    "POST /v1/chat/completions": lambda handler: handler.complete(chat=True),
}
PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>sample.py</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'unsafe-inline'; connect-src 'self'">
<style>
:root { color-scheme: light dark; --soft: color-mix(in srgb, CanvasText 9%, Canvas) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; height: 100dvh; margin: auto }
body, header, form { display: flex; flex-wrap: wrap; gap: .5rem 1rem } body { flex-flow: column }
header, form { padding: .7rem; align-items: center }
main { flex: 1; overflow-y: auto; padding: 0 .7rem }
article { white-space: pre-wrap; overflow-wrap: anywhere; margin: .6rem 0; padding: .5rem .8rem; border-radius: .8rem }
.user { background: var(--soft); margin-left: 15% } .error { border: 1px solid #d33 } #length, #heat { width: 5rem }
button, select, input, textarea { font: inherit; padding: .2rem .6rem; border-radius: .5rem } textarea { flex: 1 }
</style>
<header><select id="mode" aria-label="mode"><option value="chat">chat<option value="text">continue a text</select>
<label>temperature <input id="heat" type="number" min="0" max="2" step=".1" value="0.8"></label>
<label>tokens <input id="length" type="number" min="1" value="256"></label><button id="fresh">New chat</button></header>
<main id="log" aria-live="polite"></main>
<form id="form"><textarea id="text" rows="3" placeholder="Enter sends, Shift+Enter begins a line" autofocus></textarea>
<button id="send">Send</button></form>
<script>
const at = id => document.getElementById(id)
let messages = [], running = null, key = ""
function add(className, textContent) {
  at("log").append(Object.assign(document.createElement("article"), {className, textContent}))
  return at("log").lastChild
}
async function* ask(path, body) {
  const headers = {"Content-Type": "application/json", Authorization: "Bearer " + key}
  const response = await fetch(path, {method: "POST", headers, signal: running.signal, body: JSON.stringify(body)})
  if (!response.ok) {
    const {error} = await response.json()
    if (error.code == "context_length_exceeded" && body.messages?.length > 2) body.messages.splice(0, 2)
    else if (response.status != 401 || !(key = prompt("API key"))) throw error
    return yield* ask(path, body)
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
  for (let part, rest = ""; !(part = await reader.read()).done;) {
    const lines = (rest + part.value).split("\n")
    rest = lines.pop()
    yield* lines.filter(line => line.startsWith("data: {")).map(line => JSON.parse(line.slice(6)))
  }
}
at("form").onsubmit = async event => {
  event.preventDefault()
  const text = at("text").value, chat = at("mode").value == "chat", mine = messages
  if (running || !text.trim()) return running?.abort()
  running = new AbortController()
  at("send").textContent = "Stop"
  at("text").value = ""
  if (chat) add("user", text), mine.push({role: "user", content: text})
  const article = add("assistant", chat ? "" : text), what = chat ? {messages: mine} : {prompt: text}
  const body = {...what, stream: true, temperature: +at("heat").value, max_tokens: +at("length").value}
  try {
    for await (const {error, choices} of ask(chat ? "/v1/chat/completions" : "/v1/completions", body)) {
      if (error) throw error
      article.append(chat ? choices[0].delta.content : choices[0].text)
    }
  } catch (error) {
    if (error.name != "AbortError") add("error", error.message)
  }
  if (chat) mine.push({role: "assistant", content: article.textContent})
  at("send").textContent = "Send"
  running = null
}
at("text").onkeydown = event => {
  if (event.key != "Enter" || event.shiftKey || event.isComposing) return
  event.preventDefault()
  if (!running) at("form").requestSubmit()
}
new MutationObserver(() => at("log").scrollTop = 1e9).observe(at("log"), {childList: true, subtree: true})
at("fresh").onclick = () => [running?.abort(), messages = [], at("log").replaceChildren()]
</script>
"""


def serve(engine: Engine, tokenizer: Tokenizer | None, o: "Options") -> None:
    """Answer over HTTP until Ctrl-C or SIGTERM, which end the process in one line."""
    require(0 <= o.port < 1 << 16, f"--port={o.port} must be from 0 to {(1 << 16) - 1}")
    if tokenizer:
        render([], o.template, tokenizer)  # what it refuses is refused now
    try:
        server = Server(engine, tokenizer, o)
    except OSError as error:
        where = f"--host={o.host} --port={o.port}"
        raise ValueError(f"{where} cannot be listened at: {error}; --port=0 takes a free port") from error
    print(f"http://{o.host}:{server.server_port}/ has a page; below /v1 is OpenAI's API; Ctrl-C ends", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    print(f"ended: {server.engine.report()}", file=sys.stderr, flush=True)
    os._exit(0)  # at once, while a thread is decoding, too


# ---- loading, the command line

def load(path: str | os.PathLike = "out/ckpt.pt", device: str | torch.device = "",
         tokenizer_path: str = "") -> tuple[GPT, Tokenizer | None]:
    """Model, ready for sampling on `device` ("": the fastest that is there), and tokenizer (None: there is none).

    A checkpoint without a tokenizer takes that of `tokenizer_path`. Nothing in the checkpoint is executed. Raises
    OSError, and ValueError where the two do not fit together.
    """
    require(Path(path).exists(), f"{path} does not exist; `python train.py` makes it, --ckpt=FILE names another")
    checkpoint = load_checkpoint(path)
    if tokenizer_path:
        require(not checkpoint.get("tokenizer"), f"{path} has a tokenizer of its own: leave --tokenizer out")
        checkpoint["tokenizer"] = read_tokenizer(tokenizer_path).to_dict()
    device = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device={device} is not there: {str(error).splitlines()[0]}") from error
    model = from_checkpoint(checkpoint).to(device).eval()
    tokenizer = from_dict(checkpoint["tokenizer"]) if checkpoint.get("tokenizer") else None
    fits = not tokenizer or tokenizer.vocab_size <= model.config.vocab_size
    require(fits, "the tokenizer has more tokens than the model: they do not belong together")
    return model, tokenizer


def wishes(o: "Options") -> dict:
    """The options that are arguments of `ask`."""
    names = ["n_samples", "max_new_tokens", "seed", *vars(Sampling())]
    stops = o.stop.replace(r"\n", "\n").split(",")
    return {name: getattr(o, name) for name in names} | dict(stop=[stop for stop in stops if stop])


def weight_bytes(model: GPT) -> int:
    """Bytes of the weights that a step of decoding reads: all but tables in which it looks up a row."""
    parts = [part for part in model.modules() if not isinstance(part, Embedding)]
    weights = {weight for part in parts for weight in part.parameters(recurse=False)}
    return sum(weight.nbytes for weight in weights)


def copy_bandwidth(device: torch.device, clock: Callable = time.perf_counter) -> float:
    """Bytes a second that a copy of 256 MiB reads and writes, the best of five."""
    source, seconds = torch.zeros(1 << 26, device=device), []
    target = torch.zeros_like(source)
    for _ in range(5):
        started = clock()
        target.copy_(source)[-1].item()  # waits for a GPU
        seconds.append(clock() - started)
    return 2 * source.nbytes / min(seconds)


def bench_model(model: GPT, new_tokens: int = 64, **how) -> Iterator[str]:
    """Greedy decoding of 1 to 64 texts together, each as long as the block: a row of speeds each; `how`: see Engine.

    Read is the share of a copy's bandwidth at which decoding gets what it must read, weights and state.
    """
    bandwidth, weights = copy_bandwidth(next(model.parameters()).device), weight_bytes(model)
    yield f"a step reads {weights / 1e6:,.1f} MB of weights; a copy moves {bandwidth / 1e9:.1f} GB/s"
    yield "texts  prefill, tokens/s  decoding, tokens/s  tokens  first after   read"
    prompt = [0] * max(1, model.config.block_size - new_tokens)
    for batch in (1, 4, 16, 64):
        requests = [Request(prompt, new_tokens, Sampling(0)) for _ in range(batch)]
        engine = Engine(model, requests, **how)
        started = time.perf_counter()
        engine.step()
        first = time.perf_counter() - started
        steps = state = 0
        while engine.step():
            steps += 1
            state = engine.state.nbytes
        speeds = [tokens / max(seconds, 1e-9) for tokens, seconds in engine.spent.values()]
        made, took = engine.spent["decode"]
        read = (weights + state) * steps / max(took, 1e-9)
        yield (f"{batch:5} {speeds[0]:18,.0f} {speeds[1]:19,.0f} {made:7,} {first:10.2f} s "
               f"{read / bandwidth:6.0%}")


def profile_steps(engine: Engine, requests: list[Request], steps: int = 32) -> Iterator[str]:
    """Where the time of decoding goes: a line for each kind of layer, and one for all of it."""
    engine.submit(*requests)
    engine.step()
    for name, part in engine.model.named_modules():
        kind = re.search(r"^[^.]*\.?\d*\.?(embedding|ngrams|mixer|ffn|norm|head)\d*$", name)
        if kind:
            part.forward = torch.profiler.record_function(f"forward {kind[1]}")(part.forward)
    with torch.profiler.profile() as profiler, torch.profiler.record_function("all"):
        for _ in range(steps):
            engine.step()
    for row in sorted(profiler.key_averages(), key=lambda row: -row.cpu_time_total):
        if re.match("(forward|all)( |$)", row.key):
            cpu, gpu = row.cpu_time_total / 1e3, row.device_time_total / 1e3
            on_gpu = f", GPU {gpu:9.1f} ms" * torch.cuda.is_available()
            yield f"{row.key:18} {row.count:3} times, CPU {cpu:9.1f} ms{on_gpu}"


def options(kind: type, words: list[str]):
    """Fill the dataclass `kind` from --key=value words; a field's trailing comment is its help. A bad word exits 2."""
    source = "".join(map(inspect.getsource, kind.__mro__[-2::-1]))
    notes = dict(re.findall(r"^    (\w+): .*  # (.+)", source, re.MULTILINE))
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__, usage="%(prog)s [--key=value ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
    parser.add_argument("--help", action="help", help=argparse.SUPPRESS)
    parser.epilog = "options:"
    parser.error = lambda message: sys.exit(print(f"{parser.prog}: {message}", file=sys.stderr) or 2)
    for field in dataclasses.fields(kind):
        def read(text, of=field.type):
            value = ("false", "true").index(text.lower()) if of is bool else float(text) if of is int else of(text)
            most = float("inf" if of is float else 2**63)
            return of(value) if of is str or abs(value) < most and of(value) == value else float("none")
        read.__name__ = field.type.__name__  # argparse names it where the text is not of this type
        alone: dict = dict(nargs="?", const=True) if field.type is bool else {}
        parser.add_argument(f"--{field.name}", type=read, default=field.default, help=argparse.SUPPRESS, **alone)
        shown = f"{field.default:g}" if field.type is float else field.default
        head = f"\n  --{field.name}={shown} ".ljust(31)
        parser.epilog += head + ("\n" + " " * 30).join(textwrap.wrap(notes[field.name], 49))
    for flag, word in zip(["", *words], words):
        name = word.lstrip("-").partition("=")[0]
        if not word.startswith("--") or name not in (*notes, "help"):
            near = f"{flag}={word}" if flag[2:] in notes else f"--{difflib.get_close_matches(name, notes, 1, 0)[0]}=..."
            parser.error(f"{word!r} is no option; options are written --key=value, the nearest is {near}")
    return kind(**vars(parser.parse_args(words)))


def run(main: Callable[[], None]) -> None:
    """Call main; a mistake of the user's ends in one line and exit code 1 (`python -X dev` shows the traceback)."""
    def check(event, args):
        if event == "open" and Path(str(args[0])).is_fifo():
            raise ValueError(f"{args[0]} is a pipe, which may wait for ever: give a file")
    sys.addaudithook(check)
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError, MemoryError, RuntimeError, ModuleNotFoundError) as error:
        scarce = re.search("memory|new thread|unavailable|Storage size|bad_alloc", str(error))
        if sys.flags.dev_mode or isinstance(error, RuntimeError) and not scarce:
            raise
        if not getattr(error, "filename", "-"):  # stdout's disk is full, or its reader left, as in `| head`
            sys.stdout = sys.stderr  # for Python flushes it at the end
        sys.exit(0 if isinstance(error, BrokenPipeError) else f"{Path(sys.argv[0]).name}: {str(error) or 'no memory'}")


def check_mode(o: Options) -> None:
    """Raise ValueError for two modes, or for an option that would do nothing in this one."""
    mode, *more = [name for name in MODES if getattr(o, name)] or ["samples"]
    require(not more, f"--{mode} and --{' --'.join(more)}: one at a time")
    for name, modes in FOR.items():
        idle = mode not in modes.split() and getattr(o, name) != getattr(Options, name)
        require(not idle, f"--{name} does nothing for {mode}; it is for {modes.replace(' ', ', ')}")


def main() -> None:
    o = options(Options, sys.argv[1:])
    check_mode(o)
    if o.prune:
        require(o.output.endswith(".pt"), f"--output={o.output}: what --prune leaves is written to a FILE.pt")
        require(Path(o.output).resolve() != Path(o.ckpt).resolve(), "--output would take the place of --ckpt")
        checkpoint = pruned(load_checkpoint(o.ckpt), o.prune)
        rest = {name: value for name, value in checkpoint.items() if name not in ("optimizer", "progress")}
        save_checkpoint(o.output, from_checkpoint(rest), **rest)
        return print(f"next: python train.py --init_from={o.output}, which goes on with what is left")
    if "LOCAL_RANK" in os.environ:  # torchrun
        require(o.eval, "torchrun starts several processes, which is for --eval alone")
        if torch.cuda.is_available() and o.device != "cpu":  # where there may be more ranks than GPUs
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("gloo")
        atexit.register(dist.destroy_process_group)  # a thread of gloo that frees a tensor while Python ends aborts it
        sys.stdout = open(os.devnull, "w") if dist.get_rank() else sys.stdout  # one of them prints
    tokenizer: Any  # where it is None, `ask` refuses text
    model, tokenizer = load(o.ckpt, o.device, o.tokenizer)
    require(not o.graphs or model.head.weight.is_cuda, "--graphs records CUDA graphs, which need a GPU of NVIDIA's")
    require(o.dtype in DTYPES, f"--dtype={o.dtype}: choose from {', '.join(DTYPES)}")
    model.to(getattr(torch, o.dtype))
    if o.quantize:
        print(quantise(model, o.quantize), file=sys.stderr)
    elif not o.draft and model.head.weight.is_cpu:  # a draft's guesses make several vectors of one
        by_columns(model)
    engine = Engine(model, (), (tokenizer or MUTE).vocab_size, cache=o.cache_gb * 1e9 or math.inf, graphs=o.graphs)
    if o.draft:
        engine.draft = load_draft(o.draft, engine)
    if o.bench:
        return print(*bench_model(model, draft=engine.draft, graphs=o.graphs), sep="\n")
    if o.serve:
        return serve(engine, tokenizer, o)
    prompt = o.prompt or "\n"
    requests = ask(tokenizer, prompt, **wishes(o))
    if o.profile:
        return print(*profile_steps(engine, requests), sep="\n")
    if o.eval:
        return print(*Exam(engine, tokenizer, o).run(), sep="\n")
    sys.stdout.reconfigure(errors="replace")  # for a terminal that is not UTF-8
    if o.chat:
        return chat(engine, tokenizer, o)
    engine.submit(*requests)
    length = len(requests[0].prompt)
    if length > engine.block:
        print(f"the prompt has {length} tokens, the model sees the last {engine.block}: "
              "train.py --init_from, --block_size, --rope_base make it see more", file=sys.stderr)
    try:
        print(prompt, end="", flush=True)
        for text in complete(engine, tokenizer, requests, requests[0])[1:]:
            print(f"\n---------------\n{prompt}{text}", end="")
        print()
    finally:
        print(engine.report(), file=sys.stderr)


if __name__ == "__main__":
    run(main)
