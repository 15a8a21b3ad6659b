"""Continue texts with a trained model: batched decoding with a cache, sampling, streaming.

Reads: a checkpoint of train.py.
Writes: nothing; text goes to stdout, one line about the speed to stderr.
Usage: python sample.py --prompt="def " --n_samples=3 --temperature=0.8
       python sample.py --ckpt=out/best.pt --bench

When a text fills the model's block, the older half of it is dropped and the rest
computed anew, alike with the cache and without; of a prompt longer than the block
the last block_size tokens count. The cache changes the speed, never the text.
References: Keskar et al. 2019 (CTRL: repetition penalty); Holtzman et al. 2020
(top-p); Nguyen et al. 2024 (min-p).
"""
import argparse
import codecs
import dataclasses
import difflib
import inspect
import math
import os
import random
import re
import statistics
import sys
import textwrap
import time
from pathlib import Path
from typing import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bpe import Tokenizer, from_dict
from model import GPT, from_checkpoint, load_checkpoint, require

END = "<|endoftext|>"
BETWEEN = "-" * 15  # the line between two samples
Seen = Sequence[list[int]]  # the tokens of each row so far


@dataclasses.dataclass(frozen=True)
class Sampling:
    temperature: float = 0.8  # above 1 more random, below 1 less; 0: always the most probable token
    top_k: int = 200  # choose among the k most probable tokens (0: all)
    top_p: float = 1.0  # choose among the most probable tokens that hold this probability together
    min_p: float = 0.0  # choose among tokens at least this probable, relative to the most probable one
    repetition_penalty: float = 1.0  # above 1: makes tokens that are in the text already less likely

    def __post_init__(self):
        require(self.temperature >= 0, f"--temperature={self.temperature} must be at least 0")
        require(self.top_k >= 0, f"--top_k={self.top_k} must be at least 0 (0: all tokens)")
        require(0 < self.top_p <= 1, f"--top_p={self.top_p} must be above 0 and at most 1")
        require(0 <= self.min_p <= 1, f"--min_p={self.min_p} must be from 0 to 1")
        require(self.repetition_penalty > 0, f"--repetition_penalty={self.repetition_penalty} must be above 0")


@dataclasses.dataclass(frozen=True)
class Options(Sampling):
    ckpt: str = "out/ckpt.pt"  # checkpoint of train.py
    prompt: str = "def "  # text to continue (empty: a new document; not given: a newline if trained on --data)
    max_new_tokens: int = 256  # length of a sample, unless it ends by itself
    n_samples: int = 1  # samples of the prompt, decoded together; the first is streamed, the others follow
    stop: str = ""  # comma list of texts that end a sample; \n, \t, \, and \\ stand for such characters
    heal: bool = True  # let the prompt's last token grow: "def " goes on as " main", the token of training
    seed: int = 0  # of the random numbers; each sample has its own sequence of them
    device: str = ""  # cpu, cuda, mps (empty: the fastest that is there)
    cache: bool = True  # keep what the model looks back on instead of computing it for every new token
    bench: bool = False  # print the speed with the cache and without, then stop


# ---- filters: logits (B, V) -> logits (B, V). None changes its input.

def repetition_penalty(logits: Tensor, penalty: float, seen: Seen) -> Tensor:
    """Divide positive logits of the tokens that a row has seen by the penalty, multiply negative ones (CTRL's form).

    >>> repetition_penalty(torch.tensor([[2.0, -2.0, 3.0]]), 2.0, [[0, 1, 1]])
    tensor([[ 1., -4.,  3.]])
    """
    logits = logits.clone()
    for row, ids in zip(logits, seen):
        row[ids] = torch.where(row[ids] > 0, row[ids] / penalty, row[ids] * penalty)
    return logits


def temperature(logits: Tensor, value: float, seen: Seen = ()) -> Tensor:
    """(logits - their maximum) / temperature: the maximum, which no probability depends on, keeps small ones finite.

    >>> temperature(torch.tensor([[1.0, 2.0, 4.0]]), 0.5)
    tensor([[-6., -4.,  0.]])
    """
    return (logits - logits.amax(-1, keepdim=True)) / max(value, 1e-30)


def top_k(logits: Tensor, k: int, seen: Seen = ()) -> Tensor:
    """Keep the k largest logits, and those equal to the smallest of them.

    >>> top_k(torch.tensor([[1.0, 4.0, 2.0, 2.0]]), 2)
    tensor([[-inf, 4., 2., 2.]])
    """
    smallest = logits.topk(min(k, logits.shape[-1])).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest, -math.inf)


def top_p(logits: Tensor, p: float, seen: Seen = ()) -> Tensor:
    """Keep the fewest tokens, the most probable first, that have probability p together, and ties of the last one.

    >>> top_p(torch.tensor([[0.2, 0.5, 0.3]]).log(), 0.7).exp()  # 0.5 is not enough, 0.5 + 0.3 is
    tensor([[0.0000, 0.5000, 0.3000]])
    """
    ordered = logits.sort(descending=True).values
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # held by the more probable ones
    smallest = ordered.masked_fill(before >= p, math.inf).amin(-1, keepdim=True)  # (B, 1)
    return logits.masked_fill(logits < smallest, -math.inf)


def min_p(logits: Tensor, p: float, seen: Seen = ()) -> Tensor:
    """Keep tokens whose probability is at least p times that of the most probable one: logit >= maximum + log p.

    >>> min_p(torch.tensor([[0.6, 0.3, 0.1]]).log(), 0.4).exp()  # at least 0.24
    tensor([[0.6000, 0.3000, 0.0000]])
    """
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -math.inf)


# field of Sampling -> (filter, the value that leaves everything as it is), in the order of their use
FILTERS = {
    "repetition_penalty": (repetition_penalty, 1),
    "temperature": (temperature, 1),
    "top_k": (top_k, 0),
    "top_p": (top_p, 1),
    "min_p": (min_p, 0),
}


def draw(logits: Tensor, chance: Tensor) -> Tensor:
    """Tokens (B,) from logits (B, V) and one number in (0, 1] a row: where the summed probabilities first reach it.

    >>> draw(torch.tensor([[0.5, 0.0, 0.5]]).log().repeat(3, 1), torch.tensor([0.5, 0.51, 1.0]))
    tensor([0, 2, 2])
    """
    total = logits.softmax(-1).cumsum(-1)
    # its last entry is 1 but for rounding; the first entry that reaches a number above 0 is of a possible token
    return torch.searchsorted(total, chance[:, None] * total[:, -1:])[:, 0]


def choose(logits: Tensor, sampling: Sampling, chance: Tensor, seen: Seen) -> Tensor:
    """The next token of each row (B,): the most probable one at temperature 0, else one that the filters leave."""
    for name, (apply, off) in FILTERS.items():
        value = getattr(sampling, name)
        if value != off:
            logits = apply(logits, value, seen)
    return draw(logits, chance) if sampling.temperature else logits.argmax(-1)


# ---- text from tokens, as they come

class TextStream:
    r"""Bytes of tokens in, text out: no half character, nothing after a stop string, nothing that may become one.

    >>> text = TextStream(["\n\n"], skip=1)
    >>> [text.feed(data) for data in (b" caf", b"\xc3", b"\xa9\n", b"a\n", b"\nb")], text.stopped
    (['caf', '', 'é', '\na', ''], True)
    """

    def __init__(self, stops: Sequence[str] = (), skip: int = 0):
        require("" not in stops, "stop strings are a list of texts that are not empty")
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.stops, self.skip = stops, skip  # skip: bytes at the start to leave out
        self.held, self.stopped = "", False

    def feed(self, data: bytes, final: bool = False) -> str:
        """Take in the bytes of the next token; return the text that is certain now, all of it if this is the last."""
        left_out = min(self.skip, len(data))
        self.skip -= left_out
        text = self.held + self.decoder.decode(data[left_out:], final)
        # the one that is complete first counts, the longest of those: where tokens begin and end changes nothing
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stops if stop in text]
        if found:
            self.stopped, self.held = True, ""
            return text[:min(found)[1]]
        begun = [n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        cut = len(text) if final else len(text) - max(begun, default=0)
        self.held = text[cut:]
        return text[:cut]


def stop_strings(words: str) -> list[str]:
    r"""The texts of a comma list in which \n, \t, \, and \\ stand for a newline, a tab, a comma and a backslash.

    >>> stop_strings(r"\n\n,a\,b,\d")
    ['\n\n', 'a,b', '\\d']
    """
    signs = {"n": "\n", "t": "\t", ",": ",", "\\": "\\"}
    parts = re.findall(r"(?:\\.|[^,])+", words, re.S)
    return [re.sub(r"\\([nt,\\])", lambda found: signs[found[1]], part) for part in parts]


# ---- the engine: requests in, one token a step for each of them

@dataclasses.dataclass(eq=False)
class Request:
    """One text in the making. Its tokens depend on nothing else that is decoded beside it."""

    prompt: list[int]
    max_new_tokens: int = 256
    sampling: Sampling = Sampling()
    seed: int | str = 0  # of its own random numbers
    end: int = -1  # the token that ends it (-1: none)
    first: Sequence[int] = ()  # its first token is one of these (empty: any)
    text: TextStream = dataclasses.field(default_factory=TextStream)

    def __post_init__(self):
        self.output = []  # new tokens
        self.context = []  # the tokens that the model sees; the engine sets them
        self.random = random.Random(str(self.seed))
        self.done = "" if self.max_new_tokens else "length"  # why it ended: end, stop, length, or what a caller writes

    def take(self, token: int, block: int) -> None:
        """Go on by one token; where the context fills the block, its older half goes first."""
        if len(self.context) == block:
            del self.context[:(block + 1) // 2]
        self.context.append(token)
        self.output.append(token)
        if token == self.end:
            self.done = "end"
        elif len(self.output) == self.max_new_tokens:
            self.done = "length"


class Engine:
    """Decodes some requests together on a model in eval mode. Each step() adds a token to all that are not done.

    The model needs config.block_size, config.vocab_size, hidden, head and new_state. `vocab_size`: only the first so
    many tokens are produced (0: all). Raises ValueError for an empty prompt and for ids that the model does not know.
    """

    def __init__(self, model: GPT, requests: Sequence[Request], cache: bool = True, vocab_size: int = 0):
        self.model = model
        self.cache = cache
        self.state = None
        self.active = list(requests)
        self.vocab_size = vocab_size or model.config.vocab_size
        self.device = next(model.head.parameters()).device
        self.spent = {"prefill": [0, 0.0], "decode": [0, 0.0]}  # prompt tokens computed, new tokens; seconds
        for request in requests:
            known = request.prompt and 0 <= min(request.prompt) <= max(request.prompt) < self.vocab_size
            require(known, f"a prompt is one token or more, each from 0 to {self.vocab_size - 1}")
            request.context = request.prompt[-model.config.block_size:]

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Add one token to every request that is not done; returns these requests, [] when all are."""
        going = [row for row, request in enumerate(self.active) if not request.done]
        if not going:
            return []
        if len(going) < len(self.active):
            self.active = [self.active[row] for row in going]
            self.state = self.state and self.state.fork(going)
        started = time.perf_counter()
        phase = "decode" if self.active[0].output else "prefill"
        # all tokens but the last are in the state; or none is: at the start, after a context was halved, uncached
        held = self.state.lengths if self.state else []
        grown = held == [len(request.context) - 1 for request in self.active]
        hidden = self.decode() if grown else self.prefill()  # (B, C)
        logits = self.model.head(hidden)[:, :self.vocab_size].float()  # (B, V)
        for request, token in zip(self.active, self.next_tokens(logits)):
            request.take(token, self.model.config.block_size)
        self.spent[phase][0] += len(self.active) if phase == "decode" else self.computed
        self.spent[phase][1] += time.perf_counter() - started
        return self.active

    def prefill(self) -> Tensor:
        """The model's output (B, C) at the last token of each context, from all tokens; equal contexts are one row.

        Shorter contexts are padded on the right, where causal layers do not look, and the state forgets the padding.
        """
        contexts = [tuple(request.context) for request in self.active]
        unique = list(dict.fromkeys(contexts))
        lengths = list(map(len, unique))
        padded = [context + (0,) * (max(lengths) - len(context)) for context in unique]
        rows = list(map(unique.index, contexts))
        if self.cache:
            needed = max(len(r.context) + r.max_new_tokens - len(r.output) for r in self.active)
            self.state = self.model.new_state(len(unique), min(needed, self.model.config.block_size))
        hidden = self.model.hidden(torch.tensor(padded, device=self.device), self.state)  # (U, T, C)
        if self.cache:
            self.state.truncate(lengths)
            self.state = self.state.fork(rows)
        self.computed = sum(lengths)
        return hidden[range(len(unique)), [length - 1 for length in lengths]][rows]

    def decode(self) -> Tensor:
        """The same (B, C), from the last token of each context and the state, which takes it in."""
        tokens = torch.tensor([request.context[-1:] for request in self.active], device=self.device)
        return self.model.hidden(tokens, self.state)[:, -1]

    def next_tokens(self, logits: Tensor) -> list[int]:
        """Choose from logits (B, V), each row as its request says."""
        finite = logits.amax(-1).isfinite().all()
        require(finite, "the model's output is not finite (NaN or infinite): its training diverged")
        for row, request in zip(logits, self.active):
            if request.first and not request.output:
                kept = row[request.first]
                row.fill_(-math.inf)[request.first] = kept
        tokens = {}
        for sampling in {request.sampling for request in self.active}:
            rows = [row for row, request in enumerate(self.active) if request.sampling == sampling]
            group = [self.active[row] for row in rows]
            chance = torch.tensor([1 - request.random.random() for request in group])  # in (0, 1]
            seen = [request.prompt + request.output for request in group]
            chosen = choose(logits[rows], sampling, chance.to(logits.device), seen)
            tokens |= zip(rows, chosen.tolist())
        return [tokens[row] for row in range(len(tokens))]

    def report(self) -> str:
        """Tokens and tokens per second so far: of the prompts, with the first new tokens, and of decoding after it."""
        return ", ".join(f"{name} {tokens:,} tokens in {seconds:.2f} s ({tokens / max(seconds, 1e-9):,.0f} tokens/s)"
                         for name, (tokens, seconds) in self.spent.items())


# ---- from text to text

def ask(tokenizer: Tokenizer | None, prompt: str, n_samples: int = 1, max_new_tokens: int = 256,
        stop: Sequence[str] = (), heal: bool = False, seed: int = 0, **sampling) -> list[Request]:
    """Requests for `n_samples` continuations of a text, which end at <|endoftext|>; an empty text begins there.

    `sampling`: fields of Sampling. `heal`: the prompt's last token is taken back, and the first new one must begin
    with its text: a prompt may end within what training always saw as one token, as "def " within " main". ValueError.
    """
    require(tokenizer, "the checkpoint has no tokenizer, so it takes and gives no text, only token ids (see Engine)")
    require(n_samples > 0, f"--n_samples={n_samples} must be at least 1")
    require(max_new_tokens >= 0, f"--max_new_tokens={max_new_tokens} must be at least 0")
    special = tokenizer.special_tokens.values()
    end = tokenizer.special_tokens[END]
    ids = tokenizer.encode(prompt) or [end]
    first, begin = [], b""
    if heal and len(ids) > 1 and ids[-1] not in special:
        begin = tokenizer.vocab[ids.pop()]
        first = [i for i, token in enumerate(tokenizer.vocab) if token.startswith(begin) and i not in special]
    settings = Sampling(**sampling)
    return [Request(ids, max_new_tokens, settings, f"{seed} {sample}", end, first, TextStream(stop, len(begin)))
            for sample in range(n_samples)]


def stream(engine: Engine, tokenizer: Tokenizer) -> Iterator[tuple[Request, str]]:
    """Decode the engine's requests; yields (request, its next piece of text) as pieces become certain.

    The last piece of a request, which may be empty, comes with `request.done` set.
    """
    for requests in iter(engine.step, []):
        for request in requests:
            data = tokenizer.decode_bytes(request.output[-1:] if request.done != "end" else [])
            piece = request.text.feed(data, final=bool(request.done))
            if request.text.stopped:
                request.done = "stop"
            if piece or request.done:
                yield request, piece


def generate(model: GPT, tokenizer: Tokenizer | None, prompts: Sequence[str], cache: bool = True,
             **how) -> list[str]:
    """Continue all prompts in one batch; `how` are arguments of `ask` (n_samples, stop, seed, temperature, ...).

    Returns the new texts without their prompts, the samples of one prompt behind each other. A text depends on its own
    prompt, the seed and its number among that prompt's samples. The model must be in eval mode. Raises ValueError.
    """
    texts = {request: "" for prompt in prompts for request in ask(tokenizer, prompt, **how)}
    if not texts:
        return []
    for request, piece in stream(Engine(model, list(texts), cache, tokenizer.vocab_size), tokenizer):
        texts[request] += piece
    return list(texts.values())


# ---- loading, the command line

def read(path: str | Path) -> dict:
    """The checkpoint's dict; nothing in it is executed. Raises OSError or ValueError."""
    require(Path(path).exists(), f"{path} does not exist; `python train.py` makes it, --ckpt=FILE names another")
    return load_checkpoint(path)


def build(checkpoint: dict, device: str = "") -> tuple[GPT, Tokenizer | None]:
    """Model and tokenizer (None: there is none) of a checkpoint. Raises ValueError where they do not fit together."""
    device = device or next((kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()), "cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device={device} is not there: {str(error).splitlines()[0]}") from error
    model = from_checkpoint(checkpoint).to(device).eval()
    tokenizer = from_dict(checkpoint["tokenizer"]) if checkpoint.get("tokenizer") else None
    fits = not tokenizer or tokenizer.vocab_size <= model.config.vocab_size
    require(fits, "the checkpoint's tokenizer has more tokens than its model: they do not belong together")
    return model, tokenizer


def load(path: str | Path = Options.ckpt, device: str = "") -> tuple[GPT, Tokenizer | None]:
    """Model, ready for sampling on `device` ("": the fastest), and tokenizer of a checkpoint. OSError, ValueError."""
    return build(read(path), device)


def print_samples(engine: Engine, tokenizer: Tokenizer, requests: list[Request], prompt: str) -> None:
    """Print prompt and sample, request after request: one as its text comes, the next when those before have ended."""
    texts = dict.fromkeys(requests, prompt)
    pieces = stream(engine, tokenizer)
    growing = {request for request in requests if not request.done}
    for shown in requests:
        print(texts[shown], end="", flush=True)
        while shown in growing:
            request, piece = next(pieces)
            texts[request] += piece
            if request.done:
                growing.remove(request)
            if request is shown:
                print(piece, end="", flush=True)
        print(f"\n{BETWEEN}" if shown is not requests[-1] else "")


def bench(model: GPT, new_tokens: int = 256, runs: int = 5) -> dict:
    """Greedy decoding of `new_tokens` that end at block_size, with the cache and without by turns, prompt included.

    Returns the median tokens per second of each, their ratio, and whether the tokens were the same.
    """
    prompt = [i % model.config.vocab_size for i in range(max(1, model.config.block_size - new_tokens))]
    speeds = {True: [], False: []}
    outputs = {}
    for cache in (True, False) * runs:
        request = Request(prompt, new_tokens, Sampling(temperature=0))
        engine = Engine(model, [request], cache)
        started = time.perf_counter()
        while engine.step():
            pass
        speeds[cache].append(new_tokens / (time.perf_counter() - started))
        outputs[cache] = request.output
    cached = statistics.median(speeds[True])
    plain = statistics.median(speeds[False])
    return dict(cached=cached, plain=plain, ratio=cached / plain, same=outputs[True] == outputs[False])


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
            return of(value) if of is str or abs(value) < float("inf") and of(value) == value else float("none")
        read.__name__ = field.type.__name__  # argparse names it where the text is not of this type
        parser.add_argument(f"--{field.name}", type=read, default=field.default, nargs="?",
                            const=field.type is bool or "", help=argparse.SUPPRESS)
        head = f"\n  --{field.name}={field.default} ".ljust(31)
        parser.epilog += head + ("\n" + " " * 30).join(textwrap.wrap(notes[field.name], 49))
    for flag, word in zip(["", *words], words):
        name = word.lstrip("-").partition("=")[0]
        if not word.startswith("--") or name not in (*notes, "help"):
            near = f"{flag}={word}" if flag[2:] in notes else f"--{difflib.get_close_matches(name, notes, 1, 0)[0]}=..."
            parser.error(f"{word!r} is no option; options are written --key=value, the nearest is {near}")
    return kind(**vars(parser.parse_args(words)))


def run(main: Callable[[], None]) -> None:
    """Call main; a mistake of the user's ends in one line and exit code 1 (`python -X dev` shows the traceback)."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        if sys.flags.dev_mode:
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def main() -> None:
    o = options(Options, sys.argv[1:])
    checkpoint = read(o.ckpt)
    model, tokenizer = build(checkpoint, o.device)
    if o.bench:
        found = bench(model)
        print("{cached:10,.0f} tokens/s with the cache\n{plain:10,.0f} without\n{ratio:10.1f} times".format(**found))
        print(f"the tokens are {'the same' if found['same'] else 'NOT the same'}")
        return
    # bytes of the command line that are no UTF-8 arrive as lone surrogates
    prompt = o.prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if prompt != o.prompt:
        print("the prompt is not UTF-8: bytes in it were replaced by U+FFFD", file=sys.stderr)
    given = any(word.startswith("--prompt") for word in sys.argv)
    if not given and (checkpoint.get("train") or {}).get("data"):  # trained on something else than Python
        prompt = "\n"
    sampling = {name: getattr(o, name) for name in FILTERS}
    requests = ask(tokenizer, prompt, o.n_samples, o.max_new_tokens, stop_strings(o.stop), o.heal, o.seed, **sampling)
    length = len(requests[0].prompt)
    block = model.config.block_size
    if length > block:
        print(f"the prompt has {length} tokens, the model sees the last {block}", file=sys.stderr)
    engine = Engine(model, requests, o.cache, tokenizer.vocab_size)
    sys.stdout.reconfigure(errors="replace")  # for a terminal that is not UTF-8
    try:
        print_samples(engine, tokenizer, requests, prompt)
    finally:
        print(engine.report(), file=sys.stderr)


if __name__ == "__main__":
    run(main)
