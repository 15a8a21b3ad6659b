"""Text <-> tokens: characters, bytes, words and byte pair encoding (BPE), trained and run in pure Python.

Reads: text files, .jsonl files (field "text"), gzipped ones (.gz), folders; the standard library's text by default.
Writes: tokenizer.json, which holds all that encoding and decoding need.
Usage: python bpe.py --input=shakespeare.txt --vocab_size=1024 --output=tokenizer.json
       python bpe.py --tokenizer=tokenizer.json --show="Hello, world!"
References: Sennrich et al. 2016 (BPE for words), Radford et al. 2019 (GPT-2: bytes, and the pattern that splits first).
"""
import argparse
import codecs
import contextlib
import dataclasses
import difflib
import gc
import gzip
import inspect
import io
import itertools
import json
import multiprocessing
import os
import re
import sys
import sysconfig
import textwrap
import tokenize
from collections import Counter, defaultdict
from heapq import heappop, heappush
from pathlib import Path
from typing import BinaryIO, Callable, Iterable, Iterator

import numpy as np
import regex

# A pattern cuts text into pieces, and tokens never reach from one piece into the next. Its matches hold all of a text.
PATTERNS = {
    # a word with the one space before it; contractions; other signs, numbers, with that space; white space without it
    # (the most frequent come first, which is quicker than OpenAI's order and gives the same pieces)
    "gpt2": r" ?[\p{L}]+|'(?:[sdmt]|ll|ve|re)| ?[^\s\p{L}\p{N}]+| ?[\p{N}]+|[\s]+(?![^\s])|[\s]+",
    # a word with the one sign before it ("_name", ".join"); up to three digits; signs with the line's end behind them
    # and the next line's indentation ("):\n    "), a line's end with the next indentation
    "code": r"[^\r\n\p{L}\p{N}]?[\p{L}]+|[\p{N}]{1,3}| ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?|[\r\n]+[ \t]*"
            r"|[\s]+(?![^\s])|[\s]+",
    # OpenAI's for GPT-4 (cl100k): as "code" without the indentation; contractions, in capitals too
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?[\p{L}]+|[\p{N}]{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|[\s]+\Z|[\s]*[\r\n]|[\s]+(?![^\s])|[\s]+",
    # OpenAI's for GPT-4o: a word begins anew at a capital after small letters, and holds its contraction
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'(?:[sdmt]|ll|ve|re))?"
             r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'(?:[sdmt]|ll|ve|re))?"
             r"|[\p{N}]{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|[\s]*[\r\n]+|[\s]+(?![^\s])|[\s]+",
    "char": r"(?s:.)",
    "bytes": r"(?s:.+)",  # nothing is cut
}
# The same for ASCII text, in the notation of the module `re`, which takes half the time. Only of these patterns it is
# known where text may be cut. (ASCII has no letters of other kinds, and no marks.)
RANGES = {r"\p{L}": "A-Za-z", r"\p{Lu}": "A-Z", r"\p{Ll}": "a-z", r"\p{N}": "0-9", r"\s": r"\t-\r "}
ASCII = {pattern: re.compile(re.sub(r"\\p\{\w+\}|\\s", lambda match: RANGES.get(match[0], ""), pattern))
         for pattern in PATTERNS.values() if pattern != PATTERNS["bytes"]}
# Where text may be cut without changing its pieces: between a sign and a space, between a letter or digit and white
# space. No piece of the patterns above holds such a place or looks across it. (?r) searches from the end.
CUT = regex.compile(r"(?r)(?:\S(?= )|[\p{L}\p{N}](?=\s))")
CHUNK = 1 << 14  # characters read and split at a time: bounds memory, and most are ASCII though the text is not
BLOCK = 1 << 20  # characters of text that are worth a process
CACHE = 1 << 18  # pieces whose ids are remembered while encoding
END, UNKNOWN = "<|endoftext|>", "<|unk|>"


@dataclasses.dataclass
class Options:
    input: str = ""  # text files and folders, comma list; "": the Python standard library's text
    tokenizer: str = "bpe"  # what to train: bpe, char, byte or word; or a tokenizer file to load
    vocab_size: int = 8192  # number of tokens, special ones included
    pattern: str = "gpt2"  # how text is split first: gpt2, code, gpt4, o200k, bytes (not at all), or your own regex
    special_tokens: str = "<|endoftext|>"  # comma list of tokens that ordinary text never gives
    separator: str = ""  # text that stands between the documents of a file
    output: str = "tokenizer.json"  # file for the trained tokenizer
    show: str = ""  # text whose tokens are printed
    workers: int = 0  # processes that count; 0: one for each core


def options(kind: type, words: list[str]):
    """Fill the dataclass `kind` from --key=value words; a field's trailing comment is its help. A bad word exits 2."""
    source = io.StringIO("".join(map(inspect.getsource, kind.__mro__[-2::-1])))
    notes = {t.line.split(":")[0].strip(): t.string[1:].strip() for t in tokenize.generate_tokens(source.readline)
             if t.type == tokenize.COMMENT}
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__, usage="%(prog)s [--key=value ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
    parser.add_argument("--help", action="help", help=argparse.SUPPRESS)
    parser.epilog = "options:"
    parser.error = lambda message: sys.exit(print(f"{parser.prog}: {message}", file=sys.stderr) or 2)
    for name, of, default in [(field.name, field.type, field.default) for field in dataclasses.fields(kind)]:
        def read(text, of=of):
            value = ("false", "true").index(text.lower()) if of is bool else float(text) if of is int else of(text)
            return of(value) if of is str or abs(value) < float("inf") and of(value) == value else float("none")
        read.__name__ = of.__name__  # argparse names it where the text is not of this type
        parser.add_argument(f"--{name}", type=read, default=default, nargs="?", const=of is bool or "",
                            help=argparse.SUPPRESS)
        parser.epilog += f"\n  --{name}={default} ".ljust(31) + ("\n" + " " * 30).join(textwrap.wrap(notes[name], 49))
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


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; when the block ends well it is flushed to disk and renamed to `path`."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def find_files(input: str) -> list[Path]:
    """Files of a comma list of files and folders, sorted by path; "" is the standard library's *.py of this Python.

    A folder gives all files below it that are text, but none of hidden folders and of site-packages.
    """
    files = []
    for name in input.split(",") if input else [sysconfig.get_path("stdlib")]:
        found = [] if os.path.isdir(name) else [Path(name)]
        for folder, folders, names in os.walk(name):
            folders[:] = [inner for inner in folders if not regex.search(r"^\.|-packages$", inner)]
            paths = [Path(folder, file) for file in names if input or file.endswith(".py")]
            found += filter(is_text, filter(Path.is_file, paths))
        files += sorted(found)
    return files


@contextlib.contextmanager
def blaming(what: str) -> Iterator[None]:
    """An error in the content of a file becomes a ValueError that begins with `what`, which names the file."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
        raise ValueError(f"{what}: {error}") from None


def opened(path: Path, mode: str = "rb", **how):
    """Open a file for reading, through gzip if its name ends in .gz."""
    return (gzip.open if path.suffix == ".gz" else open)(path, mode, **how)


def is_text(path: Path) -> bool:
    """Whether a file has no NUL among its first bytes, as binary files and UTF-16 have."""
    with opened(path) as file:
        return b"\0" not in file.read(8192)


def read_parts(files: Iterable[Path], separator: str, errors: dict) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether a document ends here), at most CHUNK characters of a document at a time.

    A file is one document, or several with `separator` between them if it is not ""; of a .jsonl file each line is
    one, its field "text". Invalid UTF-8 becomes U+FFFD and is counted in `errors` (path -> number). Newlines are never
    translated.
    """
    def replace(error):
        errors[str(path)] = errors.get(str(path), 0) + 1
        return "\ufffd", error.end

    codecs.register_error("count", replace)
    for path in files:
        if not is_text(path):
            raise ValueError(f"{path} is no text in UTF-8, but binary or UTF-16")
        with blaming(f"{path} is damaged"), opened(path, "rt", encoding="utf-8", errors="count", newline="\n") as file:
            if ".jsonl" in path.suffixes:
                yield from ((json.loads(line)["text"] + "", True) for line in file)
                continue
            rest = ""
            while block := file.read(CHUNK):
                *documents, rest = (rest + block).split(separator) if separator else [rest + block]
                for document in documents:
                    yield document, True
                # The last characters may begin a separator, so they wait for the next block.
                stay = max(0, len(rest) + 1 - len(separator or "."))
                yield rest[:stay], False
                rest = rest[stay:]
            yield rest, True


def chunks(parts: Iterable[str], pattern: str, least: int = 1, end: str = "") -> Iterator[str]:
    """Move the cuts in a text to where `pattern` cannot see across: each chunk is split as it is in the whole text.

    >>> list(chunks(["the c", "at in th", "e hat"], PATTERNS["gpt2"]))
    ['the', ' cat in', ' the', ' hat']

    A chunk has `least` characters or more. Of a user's own pattern nothing is known, so its text is one chunk, or is
    cut behind an `end`.
    """
    rest = ""  # the text behind the last cut
    cut = CUT if pattern in ASCII else regex.compile("(?r)" + (regex.escape(end) or "(?!)"))
    for part in parts:
        for start in range(0, len(part), CHUNK):
            searched = max(0, len(rest) - 20)  # a place to cut is shorter
            rest += part[start:start + CHUNK]
            if len(rest) >= least and (place := cut.search(rest, searched)):
                yield rest[:place.end()]
                rest = rest[place.end():]
    yield from filter(None, [rest])


def split(text: str, pattern: str) -> list[str]:
    """The pieces of a text; ValueError if a pattern of the user's own drops some of it, or takes too long.

    Surrogate pairs are joined, and lone surrogates, which have no UTF-8, replaced by U+FFFD.


    >>> split("Hello world's  end", PATTERNS["gpt2"])
    ['Hello', ' world', "'s", ' ', ' end']
    """
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if pattern in ASCII and text.isascii():
        return ASCII[pattern].findall(text)
    try:
        # seconds; asking the clock takes three times as long as the matches, so it is for patterns of the user's own
        pieces = regex.findall(pattern, text, timeout=None if pattern in ASCII else 10 + len(text) / 1e5)
    except (regex.error, TimeoutError) as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression, or takes too long: {error}") from None
    if "".join(map(str, pieces)) != text:
        raise ValueError(f"pattern {pattern!r} drops text or has a group (...); write (?:...), and |. at its end")
    return pieces


def any_of(names: Iterable[str]) -> str:
    """A regular expression for any of the names, the longest first, as one may begin with another."""
    return "|".join(map(regex.escape, sorted(names, key=len, reverse=True)))


def answer(pipe: object, work: Callable, *given) -> None:
    """A process: send work(*given), or the exception that it raised."""
    try:
        pipe.send(work(*given))
    except BaseException as error:  # Ctrl-C, too: the parent has it as well, and ends its processes
        pipe.send(error)


def parallel(work: Callable, jobs: Iterable, workers: int, *given) -> Iterator:
    """work(job, *given) for each job, in order, each in a process of its own, `workers` at a time.

    Raises what the work raises, and ChildProcessError if a process is killed. (A pool of multiprocessing would hang.)
    """
    jobs, running = iter(jobs), []
    try:
        while workers > 1:
            for job in itertools.islice(jobs, workers - len(running)):
                here, there = multiprocessing.Pipe()
                running.append((here, multiprocessing.Process(target=answer, args=(there, work, job, *given))))
                running[-1][1].start()
                there.close()  # so that the pipe ends when the process dies
            if not running:
                return
            result = running[0][0].recv()
            running.pop(0)[1].join()
            if isinstance(result, BaseException):
                raise result
            yield result
        yield from (work(job, *given) for job in jobs)
    except EOFError:
        raise ChildProcessError("a process was killed, perhaps for want of memory: try --workers=1") from None
    finally:
        for _, process in running:
            process.kill()
            process.join()


def count_text(text: str, pattern: str, special_tokens: list) -> Counter:
    """How often each piece occurs in a text. Special tokens are boundaries and not counted."""
    parts = regex.split(any_of(special_tokens), text)
    pieces = (split(chunk, pattern) for part in parts for chunk in chunks([part], pattern))
    return Counter(itertools.chain.from_iterable(pieces))


def train_lookup(counts: Counter, size: int) -> tuple:
    """Characters or words: the `size` most frequent pieces are the vocabulary, equal ones in alphabetical order.

    >>> train_lookup(Counter("the cat in the hat".split()), 3)
    ([b'the', b'cat', b'hat'], [])
    """
    pieces = sorted(counts, key=lambda piece: (-counts[piece], piece))
    return list(map(str.encode, pieces[:size])), []


# Tokens stand at the places of their bytes: first[i] is the token that begins at i, last[i] the one that ends there,
# both -1 between two pieces; inside a token first is -1, and last is not asked. So the neighbours of a token are
# last[i - 1] and first[i + length]. A pair gets all its places when the newer of its tokens is made, and later only
# loses some. So what the heap says of it may be too cheap, and the pair on top is priced again before it is merged.
def merge_row(pieces: Iterable[bytes], byte_ids: list, vocab: list, price: Callable, make: Callable) -> list[int]:
    """Merge pairs of neighbours, the cheapest first: BPE in training and in encoding.

    price(pair, places) orders the pairs (left, right), and may rise as places are lost; None: never merged. make(pair)
    gives the id of the token that it becomes, in `vocab`; None: it is enough. Returns `first`.
    """
    first, heap, found = [], [], defaultdict(list)
    for piece in pieces:
        first += [byte_ids[byte] for byte in piece] + [-1]
    last = first.copy()
    for place, pair in enumerate(zip(first, first[1:])):
        found[pair].append(place)
    while True:
        for pair, places in found.items():
            if places and min(pair) >= 0 and (cost := price(pair, places)) is not None:
                heappush(heap, (cost, pair, places))
        if not heap:
            return first
        cost, pair, places = heappop(heap)
        left, right = pair
        middle = len(vocab[left])
        places = [place for place in places if first[place] == left and first[place + middle] == right]
        if not places or price(pair, places) > cost:
            found = {pair: places}
            continue
        if (new := make(pair)) is None:
            return first
        before, after = defaultdict(list), defaultdict(list)  # neighbour -> places of the new token
        end = len(vocab[new])
        for place in places:
            if first[place] == left:  # not so any more in the middle of "aaa"
                first[place + middle] = -1
                first[place] = last[place + end - 1] = new
                before[last[place - 1]].append(place)
                after[first[place + end]].append(place)
        found = {(other, new): [place - len(vocab[other]) for place in before[other]] for other in before}
        found |= {(new, other): after[other] for other in after}


# Of equally frequent pairs the greatest wins, (left, right) compared as byte strings. "aaa" has the pair (a, a) twice.
def train_bpe(counts: Counter, size: int) -> tuple:
    """Byte pair encoding: from the 256 bytes on, make the most frequent pair of neighbours a token, until `size`.

    >>> train_bpe(Counter({"the": 2, " cat": 1, " in": 1, " the": 1, " hat": 1}), 260)[1]
    [(b't', b'h'), (b'th', b'e'), (b'a', b't'), (b'i', b'n')]
    """
    vocab, merges = [bytes([byte]) for byte in range(256)], []
    names, pieces = list(map(descending, vocab)), list(map(str.encode, counts))
    weight = [count for piece, count in zip(pieces, counts.values()) for _ in range(len(piece) + 1)]

    def price(pair, places):
        return -sum(map(weight.__getitem__, places)), names[pair[0]] + names[pair[1]]

    def make(pair):
        if len(vocab) < size:
            merges.append((vocab[pair[0]], vocab[pair[1]]))
            vocab.append(b"".join(merges[-1]))
            names.append(descending(vocab[-1]))
            return len(vocab) - 1

    merge_row(pieces, range(256), vocab, price, make)
    return vocab, merges


def descending(token: bytes) -> str:
    """A text that sorts the other way round, as heapq finds the smallest: a greater token has a smaller text.

    >>> descending(b"a") > descending(b"ab") > descending(b"b")
    True
    """
    return token.translate(bytes(range(255, -1, -1))).decode("latin-1") + "\u0100"


# What a kind of tokenizer learns from counted pieces: (counts, size without special tokens) -> (vocabulary, merges).
TRAINERS = {"bpe": train_bpe, "char": train_lookup, "word": train_lookup,
            "byte": lambda counts, size: train_bpe(counts, 256)}
BYTE_KINDS = ("bpe", "byte")  # they can write any text; the others need <|unk|>


def train(kind: str, documents: Iterable[str], vocab_size: int, pattern: str = "gpt2",
          special_tokens: list | tuple = (END,), workers: int = 0, counts: Counter | None = None) -> "Tokenizer":
    """Train a tokenizer of a kind of TRAINERS; the same for any number of `workers` (0: one for each core).

    `vocab_size` counts the special tokens, which get the last ids. <|endoftext|> is added where it is missing, and
    <|unk|> for char and word. `pattern` is a name of PATTERNS or a regular expression; char has its own. A Counter
    given as `counts` is filled with the pieces of the documents.
    """
    if kind not in TRAINERS:
        raise ValueError(f"there is no tokenizer {kind!r}; kinds are {', '.join(TRAINERS)}")
    names = [UNKNOWN] * (kind not in BYTE_KINDS) + [*special_tokens] + [END] * (END not in special_tokens)
    if len(set(names)) < len(names) or any(name.split() != [name] for name in names):
        raise ValueError(f"special tokens must be different, not empty and without white space, unlike {names}")
    if vocab_size < (least := len(names) + (256 if kind in BYTE_KINDS else 1)):
        raise ValueError(f"vocab_size={vocab_size} is too small: {kind} with {len(names)} special tokens needs {least}")
    pattern = PATTERNS["char"] if kind == "char" else PATTERNS.get(pattern, pattern)
    counts = Counter() if counts is None else counts
    gc.disable()  # it would look through millions of lists again and again, without a cycle among them
    texts = chunks((text + END for text in documents), pattern, BLOCK, END)
    for part in parallel(count_text, texts, workers or os.cpu_count(), pattern, names):
        counts.update(part)
    if not counts:
        raise ValueError("there is no text to train on")
    vocab, merges = TRAINERS[kind](counts, vocab_size - len(names))
    gc.enable()
    specials = {name: i for i, name in enumerate(names, len(vocab))}
    if kind == "bpe" and len(vocab) + len(names) < vocab_size:
        print(f"stopped at {len(vocab) + len(names)} tokens: no pair is left to merge in this text", file=sys.stderr)
    return Tokenizer(kind, pattern, vocab + list(map(str.encode, names)), merges, specials)


class Tokenizer:
    """Text to ids and back; characters, bytes, words and BPE fill the same columns.

    kind: a key of TRAINERS; pattern: regular expression that cuts text into pieces; vocab: id -> bytes; merges: pairs
    of byte strings, in the order of the ids they make; special_tokens: name -> id. A piece that is a token is encoded
    as this token. Of any other a vocabulary with all 256 bytes merges the bytes; without them it is <|unk|>, which
    decodes to its name.

    >>> for kind, vocab_size in [("char", 9), ("byte", 257), ("word", 5), ("bpe", 260)]:
    ...     tokenizer = train(kind, ["low low lower"], vocab_size)
    ...     [tokenizer.vocab[i].decode() for i in tokenizer.encode("low lows")]
    ['l', 'o', 'w', ' ', 'l', 'o', 'w', '<|unk|>']
    ['l', 'o', 'w', ' ', 'l', 'o', 'w', 's']
    ['low', '<|unk|>']
    ['low', ' low', 's']
    """

    def __init__(self, kind: str, pattern: str, vocab: list, merges: list, special_tokens: dict):
        self.kind, self.pattern, self.vocab, self.merges = kind, pattern, vocab, merges
        self.special_tokens, self.vocab_size = special_tokens, len(vocab)
        self.index = index = {token: i for i, token in enumerate(vocab) if i not in special_tokens.values()}
        right = [vocab[i] for i in special_tokens.values()] == list(map(str.encode, special_tokens))
        if not right or len(index) + len(special_tokens) != len(vocab):
            raise ValueError("two tokens are the same, or a special token is not in its place")
        self.byte_ids = [index.get(bytes([byte])) for byte in range(256)]
        self.unknown = special_tokens[UNKNOWN] if None in self.byte_ids else None
        self.pairs = {(index[left], index[right]): index[left + right] for left, right in merges}
        made = list(self.pairs.values())
        whole = self.unknown is not None or len(set(made)) == len(merges) == len(index) - 256
        if not whole or made != sorted(made) or any(max(pair) > new for pair, new in self.pairs.items()):
            raise ValueError("a merge is missing, comes twice, or comes before its parts")
        self.dtype = np.dtype(np.uint16 if len(vocab) <= 1 << 16 else np.uint32)
        self.cache = {}  # piece -> ids as bytes

    def encode(self, text: str, allowed_special: str | set = "none") -> list[int]:
        """Ids of a text. What looks like a special token in it is ordinary text ("none"), an error ("none_raise"), or
        one id if it is allowed ("all", or a set of names); the longest is taken where one begins with another."""
        names, ids = self.special_tokens, []
        if allowed_special == "none_raise" and regex.search(any_of(names), text):
            raise ValueError("the text holds a special token, which is not allowed here")
        allowed = names if allowed_special == "all" else () if isinstance(allowed_special, str) else allowed_special
        found = any_of(names.keys() & allowed)
        for i, part in enumerate(regex.split(f"({found})", text) if found else [text]):
            ids += [names[part]] if i % 2 else self.encode_ordinary(part).tolist()
        return ids

    def encode_ordinary(self, text: str) -> np.ndarray:
        """Ids of a text, special tokens in it as ordinary text: uint16, or uint32 for more than 65,536 tokens."""
        ids = bytearray()
        for chunk in chunks([text], self.pattern):
            self.cache = self.cache if len(self.cache) < CACHE else {}
            pieces = split(chunk, self.pattern)
            for piece in set(pieces).difference(self.cache):
                self.cache[piece] = np.array(self._ids(piece.encode()), self.dtype).tobytes()
            ids += b"".join(map(self.cache.__getitem__, pieces))
        return np.frombuffer(ids, self.dtype)

    def encode_batch(self, texts: list[str], workers: int = 0) -> list[np.ndarray]:
        """Ids of each text, as of `encode_ordinary`; much text on several processes (0: one for each core)."""
        workers = min(workers or os.cpu_count(), 1 + sum(map(len, texts)) // BLOCK)
        if workers == 1:
            return list(map(self.encode_ordinary, texts))
        out, shares = list(texts), [texts[i::workers] for i in range(workers)]
        for i, ids in enumerate(parallel(self.encode_batch, shares, workers, 1)):
            out[i::workers] = ids
        return out

    def encode_iterable(self, parts: Iterable[str]) -> Iterator[int]:
        """Ids of a text that comes in parts: lazily, and those of the whole text, wherever it was cut.

        Memory follows the longest stretch without a place to cut (see `chunks`); with a pattern of the user's own it
        follows the whole text.
        """
        for chunk in chunks(parts, self.pattern):
            yield from self.encode_ordinary(chunk).tolist()

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of tokens; ValueError names an id that is not in the vocabulary."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if wrong := [i for i in set(ids) if not 0 <= i < self.vocab_size]:
            raise ValueError(f"id {wrong[0]} is not in this vocabulary of {self.vocab_size} tokens")
        return b"".join(map(self.vocab.__getitem__, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def to_dict(self) -> dict:
        """What `save` writes. Tokens are written as Latin-1, in which character n is byte n; merges as pairs of ids."""
        return {"version": 1, "kind": self.kind, "pattern": self.pattern, "special_tokens": self.special_tokens,
                "merges": list(map(list, self.pairs)), "vocab": [token.decode("latin-1") for token in self.vocab]}

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as JSON, for `load`."""
        with replacing(path) as file:
            file.write(json.dumps(self.to_dict()).encode())

    def _ids(self, data):
        """Ids of one piece: a token's own, <|unk|>, or what merging leaves of the bytes.

        Merged is the pair that makes the lowest id, of several the first one, until no pair makes any: in this order
        training made them. For a long piece `merge_row` does that without looking at all pairs each time.
        """
        if data in self.index or self.unknown is not None:
            return [self.index.get(data, self.unknown)]
        get, never = self.pairs.get, self.vocab_size
        if len(data) > 64:
            row = merge_row([data], self.byte_ids, self.vocab, lambda pair, places: get(pair), get)
            return [token for token in row if token >= 0]
        ids = [self.byte_ids[byte] for byte in data]
        while made := [get(pair, never) for pair in zip(ids, ids[1:])]:
            if (new := min(made)) == never:
                break
            i = made.index(new)
            ids[i:i + 2] = [new]
        return ids


def from_dict(data: dict, source: object = "this") -> Tokenizer:
    """The tokenizer that `to_dict` wrote; ValueError, which names the source, if the data are not whole."""
    with blaming(f"{source} is not a tokenizer of bpe.py, or a damaged one"):
        if data["version"] != 1:
            raise ValueError(f"version {data['version']!r} of the format; this program reads 1")
        vocab = [token.encode("latin-1") for token in data["vocab"]]
        merges = [(vocab[left], vocab[right]) for left, right in data["merges"]]
        split("", data["pattern"])
        return Tokenizer(data["kind"], data["pattern"], vocab, merges, data["special_tokens"])


def load(path: str | Path) -> Tokenizer:
    """Read what `save` wrote; ValueError says what is wrong with the file."""
    with blaming(f"{path} is not a tokenizer of bpe.py, or a damaged one"):
        data = json.loads(Path(path).read_bytes())
    return from_dict(data, path)


def main():
    o = options(Options, sys.argv[1:])
    if o.tokenizer not in TRAINERS:
        tokenizer = load(o.tokenizer)
    else:
        os.stat(Path(o.output).parent)  # a missing folder is told before the work
        counts, errors = Counter(), {}
        parts = read_parts(find_files(o.input), o.separator, errors)
        # Joined by special tokens, which are boundaries, documents of any length can be cut to chunks.
        texts = chunks((text + END * ends for text, ends in parts), PATTERNS.get(o.pattern, o.pattern), BLOCK, END)
        tokenizer = train(o.tokenizer, texts, o.vocab_size, o.pattern, o.special_tokens.split(","), o.workers, counts)
        tokenizer.save(o.output)
        if errors:
            print(f"{sum(errors.values())} errors in UTF-8, replaced by U+FFFD: {', '.join(errors)}", file=sys.stderr)
        size = sum(len(piece.encode()) * number for piece, number in counts.items())
        tokens = sum(len(tokenizer.encode_ordinary(piece)) * number for piece, number in counts.items())
        print(f"{o.output}: {size} bytes in {tokens} tokens: {size / tokens:.3f} bytes per token")
    for i in tokenizer.encode(o.show, "all"):
        print(f"{i:6} {tokenizer.vocab[i]!r}")


if __name__ == "__main__":
    run(main)
