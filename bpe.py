"""Text <-> tokens: characters, bytes, words and byte pair encoding (BPE), trained and run in pure Python.

Reads: text files and folders of them; with no --input the Python standard library's text.
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
import inspect
import json
import os
import re
import signal
import sys
import sysconfig
import textwrap
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from heapq import heappop, heappush
from itertools import islice, repeat
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
    "char": r"(?s:.)",
}
# The same for ASCII text, in the notation of the module `re`, which takes half the time.
ASCII = {pattern: re.compile(pattern.replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", "0-9").replace(r"\s", r"\t-\r "))
         for pattern in PATTERNS.values()}
# Where text may be cut without changing its pieces: between a sign and a space, between a letter or digit and white
# space. No piece of the patterns above holds such a place or looks across it. (?r) searches from the end.
CUT = regex.compile(r"(?r)(?:\S(?= )|[\p{L}\p{N}](?=\s))")
CHUNK = 1 << 12  # characters read and split at a time: bounds memory, and most are ASCII though the text is not
CACHE = 1 << 18  # pieces whose ids are remembered while encoding
LONG = 256  # characters of a piece above which its ids are not remembered; bytes above which merging takes a queue
END, UNKNOWN = "<|endoftext|>", "<|unk|>"
VERSION = 1  # of the tokenizer file


@dataclasses.dataclass
class Options:
    input: str = ""  # text files and folders, comma list; "": the Python standard library's text
    tokenizer: str = "bpe"  # what to train: bpe, char, byte or word; or a tokenizer file to load
    vocab_size: int = 8192  # number of tokens, special ones included
    pattern: str = "gpt2"  # how text is split first: gpt2, code, or a regular expression of your own
    special_tokens: str = "<|endoftext|>"  # comma list of tokens that ordinary text never gives
    separator: str = ""  # text that stands between the documents of a file
    output: str = "tokenizer.json"  # file for the trained tokenizer
    show: str = ""  # text whose tokens are printed
    workers: int = 0  # processes that count; 0: one for each core


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


def is_text(path: Path) -> bool:
    """Whether a file has no NUL among its first bytes, as binary files and UTF-16 have."""
    with open(path, "rb") as file:
        return b"\0" not in file.read(8192)


def read_parts(files: Iterable[Path], separator: str, errors: dict) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether a document ends here), at most CHUNK characters of a document at a time.

    A file is one document, or several with `separator` between them if it is not "".
    Invalid UTF-8 becomes U+FFFD and is counted in `errors` (path -> number). Newlines are never translated.
    """
    def replace(error):
        errors[str(path)] = errors.get(str(path), 0) + 1
        return "\ufffd", error.end

    codecs.register_error("count", replace)
    for path in files:
        if not is_text(path):
            raise ValueError(f"{path} is no text in UTF-8, but binary or UTF-16")
        with open(path, encoding="utf-8", errors="count", newline="\n") as file:
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


def chunks(parts: Iterable[str], pattern: str, least: int = 1) -> Iterator[str]:
    """Move the cuts in a text to where `pattern` cannot see across: each chunk is split as it is in the whole text.

    >>> list(chunks(["the c", "at in th", "e hat"], PATTERNS["gpt2"]))
    ['the', ' cat in', ' the', ' hat']

    A chunk has `least` characters or more. Of a user's own pattern nothing is known, so its text is one chunk.
    """
    rest = ""  # the text behind the last cut
    for part in parts:
        for start in range(0, len(part), CHUNK):
            searched = max(0, len(rest) - 1)
            rest += part[start:start + CHUNK]
            if len(rest) >= least and pattern in ASCII and (place := CUT.search(rest, searched)):
                yield rest[:place.end()]
                rest = rest[place.end():]
    yield rest


def well_formed(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates, which have no UTF-8, replaced by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def split(text: str, pattern: str) -> list[str]:
    """The pieces of a text, made well-formed; ValueError if a pattern of the user's own drops some of it.

    >>> split("Hello world's  end", PATTERNS["gpt2"])
    ['Hello', ' world', "'s", ' ', ' end']
    """
    text = well_formed(text)
    try:
        find = ASCII[pattern] if pattern in ASCII and text.isascii() else regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from None
    pieces = find.findall(text)
    if pattern not in ASCII and "".join(map(str, pieces)) != text:
        raise ValueError(f"pattern {pattern!r} drops text or has a group (...); write (?:...), and |. at its end")
    return pieces


def any_of(names: Iterable[str]) -> str:
    """A regular expression for any of the names, the longest first, as one may begin with another."""
    return "|".join(map(regex.escape, sorted(names, key=len, reverse=True)))


def count_text(text: str, pattern: str, special_tokens: list) -> Counter:
    """How often each piece occurs in a text. Special tokens are boundaries and not counted."""
    counts = Counter()
    for ordinary in regex.split(any_of(special_tokens), text):
        counts.update(split(ordinary, pattern))
    return counts


def count_pieces(counts: Counter, texts: Iterable[str], pattern: str, special_tokens: list, workers: int) -> None:
    """Add the pieces of all texts to `counts`, on several processes if there is much; few texts are in memory."""
    if pattern in ASCII:  # then short texts are joined, as long ones are quicker to count
        texts = chunks((text + END for text in texts), pattern, 256 * CHUNK)
    stream, workers = iter(texts), workers or os.cpu_count()
    ignore = signal.signal, (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    with ProcessPoolExecutor(workers, None, *ignore) as pool:  # starts no process before its first job
        while group := list(islice(stream, 4 * workers)):
            each = pool.map if min(workers, len(group)) > 1 else map
            for part in each(count_text, group, repeat(pattern), repeat(special_tokens)):
                counts.update(part)


def train_lookup(counts: Counter, size: int) -> tuple:
    """Characters or words: the `size` most frequent pieces are the vocabulary, equal ones in alphabetical order.

    >>> train_lookup(Counter("the cat in the hat".split()), 3)
    ([b'the', b'cat', b'hat'], [])
    """
    pieces = sorted(counts, key=lambda piece: (-counts[piece], piece))
    return list(map(str.encode, pieces[:size])), []


# In train_bpe the distinct pieces stand in one row, tokens at the places of their bytes: first[i] is the token that
# begins at i, last[i] the one that ends there, both -1 between two pieces; inside a token first is -1, and last is not
# asked. So the neighbours of a token are last[i - 1] and first[i + length]. A pair is one number, left << 32 | right,
# which is negative where there is no right.
# A pair gets all its places when the newer of its tokens is made, and later only loses some. So what is on the heap is
# an upper bound, and the pair on top is counted again before it is merged; and a pair below `floor` stays below, so it
# is left out until no other is left. Then the floor falls and all pairs are counted anew, about ten times in all.
# Of equally frequent pairs the greatest wins, (left, right) compared as byte strings. "aaa" has the pair (a, a) twice.
def train_bpe(counts: Counter, size: int) -> tuple:
    """Byte pair encoding: from the 256 bytes on, make the most frequent pair of neighbours a token, until `size`.

    >>> train_bpe(Counter({"the": 2, " cat": 1, " in": 1, " the": 1, " hat": 1}), 260)[1]
    [(b't', b'h'), (b'th', b'e'), (b'a', b't'), (b'i', b'n')]
    """
    pieces = list(map(str.encode, counts))
    spans = np.array([len(piece) + 1 for piece in pieces])
    first = np.frombuffer(b"\n".join([*pieces, b""]), np.uint8).astype(np.int64)
    first[np.cumsum(spans) - 1] = -1
    last = first.copy()
    weight = np.repeat(np.fromiter(counts.values(), np.int64), spans)  # how often the piece occurs
    vocab, merges = [bytes([byte]) for byte in range(256)], []
    length = np.ones(size, np.int64)
    where, heap, floor = {}, [], 2  # pair -> places; (-times, name, pair)

    def index(places):  # take up the pairs that begin at some places and reach the floor
        nonlocal floor
        left = first[places]
        keys = left << 32 | first[places + length[left]]
        order = np.argsort(keys, kind="stable")[np.count_nonzero(keys < 0):]
        keys, places = keys[order], places[order]
        starts = np.flatnonzero(np.concatenate(([-1], keys[:-1])) != keys)
        ends = np.append(starts[1:], len(keys))
        times = np.add.reduceat(weight[places], starts)
        floor = floor or max(1, times.max(initial=0) // 4)
        for i in np.flatnonzero(times >= floor).tolist():
            key = int(keys[starts[i]])
            where[key] = places[starts[i]:ends[i]]
            name = descending(vocab[key >> 32]) + descending(vocab[key & 0xFFFFFFFF])
            heappush(heap, (-int(times[i]), name, key))

    while len(vocab) < size:
        if not heap or -heap[0][0] < floor:
            if floor == 1:
                break
            where, heap, floor = {}, [], 0
            index(np.flatnonzero(first >= 0))
            continue
        negative, name, key = heappop(heap)
        left, right = divmod(key, 1 << 32)
        places = where[key]
        places = places[(first[places] == left) & (first[places + length[left]] == right)]
        if (times := int(weight[places].sum())) < -negative:
            where[key] = places
            heappush(heap, (-times, name, key))
            continue
        places = every_other(places, length[left])
        new, middle = len(vocab), places + length[left]
        merges.append((vocab[left], vocab[right]))
        vocab.append(b"".join(merges[-1]))
        length[new] = len(vocab[new])
        first[middle] = -1
        first[places] = last[places + length[new] - 1] = new
        before = last[places - 1]
        others = (before >= 0) & (before != new)  # where a new token stands before, that one's pair is this
        index(np.concatenate((places, (places - length[before])[others])))
    return vocab, merges


def every_other(places: np.ndarray, length: int) -> np.ndarray:
    """The places at which a pair is merged, not two that overlap, which are `length` apart: "aaaaa" has (a, a) at
    0, 1, 2, 3 and merges at 0 and 2. Only a pair of a token with itself can overlap.

    >>> every_other(np.array([0, 1, 2, 3, 7, 9, 10]), 1).tolist()
    [0, 2, 7, 9]
    """
    kept = [-1 - length]
    for place in places.tolist():
        if place > kept[-1] + length:
            kept.append(place)
    return np.array(kept[1:])


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
          special_tokens: Iterable[str] = (END,), workers: int = 0, counts: Counter | None = None) -> "Tokenizer":
    """Train a tokenizer of a kind of TRAINERS; the same for any number of `workers` (0: one for each core).

    `vocab_size` counts the special tokens, which get the last ids. <|endoftext|> is added where it is missing, and
    <|unk|> for char and word. `pattern` is a name of PATTERNS or a regular expression; char has its own. A Counter
    given as `counts` is filled with the pieces of the documents.
    """
    names = [UNKNOWN] * (kind not in BYTE_KINDS) + list(special_tokens)
    names += [END] * (END not in names)
    if len(set(names)) < len(names) or any(name.split() != [name] for name in names):
        raise ValueError(f"special tokens must be different, not empty and without white space, unlike {names}")
    if vocab_size < (least := len(names) + (256 if kind in BYTE_KINDS else 1)):
        raise ValueError(f"vocab_size={vocab_size} is too small: {kind} with {len(names)} special tokens needs {least}")
    pattern = PATTERNS["char"] if kind == "char" else PATTERNS.get(pattern, pattern)
    counts = Counter() if counts is None else counts
    count_pieces(counts, documents, pattern, names, workers)
    if not counts:
        raise ValueError("there is no text to train on")
    vocab, merges = TRAINERS[kind](counts, vocab_size - len(names))
    specials = {name: i for i, name in enumerate(names, len(vocab))}
    if kind == "bpe" and len(vocab) + len(names) < vocab_size:
        print(f"stopped at {len(vocab) + len(names)} tokens: no pair is left to merge in this text", file=sys.stderr)
    return Tokenizer(kind, pattern, vocab + list(map(str.encode, names)), merges, specials)


class Cache(dict):
    """piece -> ids as bytes; computes what it lacks (with `compute`), and begins anew when it is full."""

    def __missing__(self, piece: str) -> bytes:
        ids = self.compute(piece)
        if len(self) >= CACHE:
            self.clear()
        if len(piece) <= LONG:
            self[piece] = ids
        return ids


class Tokenizer:
    """Text to ids and back; characters, bytes, words and BPE fill the same columns.

    kind: a key of TRAINERS; pattern: regular expression that cuts text into pieces; vocab: id -> bytes; merges: pairs
    of byte strings by rank; special_tokens: name -> id. A vocabulary with all 256 bytes merges the bytes of a piece;
    any other looks the whole piece up, and where it is unknown gives <|unk|>, which decodes to its name.

    >>> for kind, vocab_size in [("char", 9), ("byte", 257), ("word", 5), ("bpe", 260)]:
    ...     tokenizer = train(kind, ["low low lower"], vocab_size)
    ...     [tokenizer.vocab[i].decode() for i in tokenizer.encode("low lows")]
    ['l', 'o', 'w', ' ', 'l', 'o', 'w', '<|unk|>']
    ['l', 'o', 'w', ' ', 'l', 'o', 'w', 's']
    ['low', '<|unk|>']
    ['low', ' low', 's']
    """

    def __init__(self, kind: str, pattern: str, vocab: list, merges: list, special_tokens: dict):
        self.kind, self.pattern = kind, pattern
        self.vocab, self.merges = vocab, merges
        self.special_tokens = special_tokens
        self.vocab_size = len(vocab)
        self.index = index = {token: i for i, token in enumerate(vocab) if i not in special_tokens.values()}
        right = [vocab[i] for i in special_tokens.values()] == list(map(str.encode, special_tokens))
        if not right or len(index) + len(special_tokens) != self.vocab_size:
            raise ValueError("two tokens are the same, or a special token is not in its place")
        self.byte_ids = [index.get(bytes([byte])) for byte in range(256)]
        self.unknown = special_tokens[UNKNOWN] if None in self.byte_ids else None
        self.known = frozenset(range(self.vocab_size))
        self.lengths = [*map(len, vocab), 0]  # the last one, at -1, is that of no token
        self.ranks = {(index[left], index[right]): rank for rank, (left, right) in enumerate(merges)}
        self.merged = [index[left + right] for left, right in merges]  # rank -> id
        if self.unknown is None and not len(set(self.merged)) == len(merges) == len(index) - 256:
            raise ValueError("a merge is missing or comes twice")
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self.cache = Cache()
        self.cache.compute = self._piece_ids

    def encode(self, text: str, allowed_special: str | set = "none") -> list[int]:
        """Ids of a text. What looks like a special token in it is ordinary text ("none"), an error ("none_raise"), or
        one id if it is allowed ("all", or a set of names); the longest is taken where one begins with another."""
        names = self.special_tokens
        if allowed_special == "none_raise" and regex.search(any_of(names), text):
            raise ValueError("the text holds a special token, which is not allowed here")
        allowed = {"none": (), "none_raise": (), "all": names}.get(str(allowed_special), allowed_special)
        ids = []
        found = any_of(names.keys() & allowed)
        for i, part in enumerate(regex.split(f"({found})", text) if found else [text]):
            ids += [names[part]] if i % 2 else self.encode_ordinary(part).tolist()
        return ids

    def encode_ordinary(self, text: str) -> np.ndarray:
        """Ids of a text, special tokens in it as ordinary text: uint16, or uint32 for more than 65,536 tokens."""
        ids = bytearray()
        for chunk in chunks([text], self.pattern):
            ids += b"".join(map(self.cache.__getitem__, split(chunk, self.pattern)))
        return np.frombuffer(ids, self.dtype)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, as of `encode_ordinary`."""
        return list(map(self.encode_ordinary, texts))

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
        if wrong := set(ids) - self.known:
            raise ValueError(f"id {min(wrong)} is not in this vocabulary of {self.vocab_size} tokens")
        return b"".join(map(self.vocab.__getitem__, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def to_dict(self) -> dict:
        """What `save` writes. Tokens are written as Latin-1, in which character n is byte n; merges as pairs of ids."""
        return {"version": VERSION, "kind": self.kind, "pattern": self.pattern, "special_tokens": self.special_tokens,
                "merges": list(map(list, self.ranks)), "vocab": [token.decode("latin-1") for token in self.vocab]}

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as JSON, for `load`."""
        with replacing(path) as file:
            file.write(json.dumps(self.to_dict()).encode())

    def _piece_ids(self, piece):
        """Ids of one piece, as the bytes of an array."""
        data = piece.encode()
        ids = [self.index.get(data, self.unknown)]
        if self.unknown is None:
            merge = self._merge if len(data) <= LONG else self._merge_long
            ids = merge([self.byte_ids[byte] for byte in data])
        return np.array(ids, self.dtype).tobytes()

    def _merge(self, ids):
        """Merge the pair of lowest rank, of several the first one, until no pair of neighbours has a rank."""
        get, never = self.ranks.get, len(self.merged)
        ranks = list(map(get, zip(ids, ids[1:]), repeat(never)))
        while ranks and (rank := min(ranks)) < never:
            i = ranks.index(rank)
            ids[i:i + 2] = [self.merged[rank]]
            del ranks[i]
            if i:
                ranks[i - 1] = get((ids[i - 1], ids[i]), never)
            if i < len(ranks):
                ranks[i] = get((ids[i], ids[i + 1]), never)
        return ids

    def _merge_long(self, ids):
        """The same in about n log n steps for n bytes, as the pairs wait in a queue: rank << 32 | place.

        Tokens stay at the places of their bytes, as in train_bpe.
        """
        first, last, ranks, lengths = [*ids, -1], [*ids, -1], self.ranks, self.lengths
        queue = sorted(ranks[pair] << 32 | place for place, pair in enumerate(zip(ids, ids[1:])) if pair in ranks)
        while queue:
            rank, place = divmod(heappop(queue), 1 << 32)
            left = first[place]
            new = self.merged[rank]
            middle = place + lengths[left]
            if ranks.get((left, first[middle])) == rank:  # else one of the two is part of another token by now
                first[middle] = -1
                first[place] = last[place + lengths[new] - 1] = new
                for start in (place - lengths[last[place - 1]], place):
                    pair = first[start], first[start + lengths[first[start]]]
                    if pair in ranks:
                        heappush(queue, ranks[pair] << 32 | start)
        return [token for token in first if token >= 0]


def from_dict(data: dict) -> Tokenizer:
    """The tokenizer that `to_dict` wrote; ValueError if the data are not whole."""
    try:
        if data["version"] != VERSION:
            raise ValueError(f"version {data['version']!r} of the format; this program reads {VERSION}")
        vocab = [token.encode("latin-1") for token in data["vocab"]]
        merges = [(vocab[left], vocab[right]) for left, right in data["merges"]]
        split("", data["pattern"])
        return Tokenizer(data["kind"], data["pattern"], vocab, merges, data["special_tokens"])
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"not a tokenizer of bpe.py, or a damaged one ({type(error).__name__} {error})") from None


def load(path: str | Path) -> Tokenizer:
    """Read what `save` wrote; ValueError says what is wrong with the file."""
    try:
        return from_dict(json.loads(Path(path).read_bytes()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def main():
    o = options(Options, sys.argv[1:])
    if o.tokenizer not in TRAINERS:
        tokenizer = load(o.tokenizer)
    else:
        began, counts, errors = time.time(), Counter(), {}
        parts = read_parts(find_files(o.input), o.separator, errors)
        # Joined by special tokens, which are boundaries, documents of any length can be cut to chunks.
        texts = chunks((text + END * ends for text, ends in parts), PATTERNS.get(o.pattern, o.pattern))
        tokenizer = train(o.tokenizer, texts, o.vocab_size, o.pattern, o.special_tokens.split(","), o.workers,
                          counts)
        tokenizer.save(o.output)
        if errors:
            print(f"{sum(errors.values())} errors in UTF-8, replaced by U+FFFD: {', '.join(errors)}", file=sys.stderr)
        print(f"{o.output}: {o.tokenizer}, {tokenizer.vocab_size} tokens, trained in {time.time() - began:.1f} s")
        size = sum(len(piece.encode()) * number for piece, number in counts.items())
        tokens = sum(len(tokenizer.encode_ordinary(piece)) * number for piece, number in counts.items())
        print(f"{size} bytes in {tokens} tokens: {size / tokens:.3f} bytes per token")
    for i in tokenizer.encode(o.show, "all"):
        print(f"{i:6} {tokenizer.vocab[i]!r}")


if __name__ == "__main__":
    run(main)
