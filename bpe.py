"""Text <-> tokens: characters, bytes, words and byte pair encoding (BPE), trained and run in pure Python.

Reads: text files, folders of them, .jsonl with a "text" field; with no --input the Python standard library's text.
Writes: tokenizer.json, which holds all that encoding and decoding need.
Usage: python bpe.py --input=shakespeare.txt --vocab_size=1024 --output=tokenizer.json
       python bpe.py --tokenizer=tokenizer.json --show="Hello, world!"
References: Sennrich et al. 2016 (BPE for words), Radford et al. 2019 (GPT-2: bytes, and the pattern that splits first).
"""
import argparse
import codecs
import concurrent.futures
import contextlib
import dataclasses
import difflib
import heapq
import inspect
import io
import itertools
import json
import multiprocessing
import os
import signal
import sys
import sysconfig
import textwrap
import time
import tokenize
from collections import Counter
from pathlib import Path
from typing import BinaryIO, Callable, Iterable, Iterator

import numpy as np
import regex

# A pattern cuts text into pieces, and tokens never reach from one piece into the next. Its matches hold all of a text.
PATTERNS = {
    # contractions; a word, a number, other signs, each with the one space before it; white space but for that space
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # a word with the one sign before it ("_name", ".join"); up to three digits; signs with the line's end behind them
    # and the next line's indentation ("):\n    "), a line's end with the next indentation
    "code": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?|[\r\n]+[ \t]*|\s+(?!\S)|\s+",
    "char": r"(?s:.)",
}
# Where text may be cut without changing its pieces: between a sign and a space, between a letter or digit and white
# space. No piece of the patterns above holds such a place or looks across it. (?r) searches from the end.
CUT = regex.compile(r"(?r)(?:\S(?= )|[\p{L}\p{N}](?=\s))")
CHUNK = 1 << 20  # characters split at a time, which bounds memory however long the text is
CACHE = 1 << 18  # pieces whose ids are remembered while encoding
LONG = 256  # characters of a piece above which its ids are not remembered
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
            folders[:] = [inner for inner in folders if not inner.startswith(".") and not inner.endswith("-packages")]
            paths = [Path(folder, file) for file in names if input or file.endswith(".py")]
            found += [path for path in paths if path.is_file() and is_text(path)]
        files += sorted(found)
    return files


def is_text(path: Path) -> bool:
    """Whether a file has no NUL among its first bytes, as binary files and UTF-16 have."""
    with open(path, "rb") as file:
        return b"\0" not in file.read(8192)


def read_parts(files: Iterable[Path], separator: str = "", errors: dict | None = None) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether a document ends here), at most a megabyte at a time unless a line of JSON is longer.

    A file is one document, or several with `separator` between them; in a .jsonl file each line is one. Invalid UTF-8
    becomes U+FFFD and is counted in `errors` (path -> number). Newlines are never translated.
    """
    def replace(error: UnicodeDecodeError) -> tuple[str, int]:
        errors[str(path)] = errors.get(str(path), 0) + 1
        return "\ufffd", error.end

    errors = {} if errors is None else errors
    codecs.register_error("count", replace)
    for path in map(Path, files):
        if not is_text(path):
            raise ValueError(f"{path} is no text in UTF-8, but binary or UTF-16")
        with open(path, encoding="utf-8", errors="count", newline="\n") as file:
            if path.suffix == ".jsonl":
                yield from ((json_text(line, f"{path}:{i}"), True) for i, line in enumerate(file, 1))
                continue
            rest = ""
            while block := file.read(CHUNK):
                *documents, rest = (rest + block).split(separator) if separator else [rest + block]
                yield from ((document, True) for document in documents)
                # The last characters may begin a separator, so they wait for the next block.
                stay = max(0, len(rest) - max(0, len(separator) - 1))
                yield rest[:stay], False
                rest = rest[stay:]
            yield rest, True


def json_text(line: str, place: str) -> str:
    """The "text" field of a line of a .jsonl file; nothing for an empty line."""
    try:
        return "" if line.isspace() else json.loads(line)["text"] + ""
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{place}: expected a JSON object with a string "text"') from None


def read_documents(files: Iterable[Path], separator: str = "", errors: dict | None = None) -> Iterator[str]:
    """Yield whole documents, but no empty ones; arguments as of `read_parts`, which is for long documents."""
    document = ""
    for text, ends in read_parts(files, separator, errors):
        document += text
        if ends and document:
            yield document
            document = ""


def chunks(parts: Iterable[str], pattern: str) -> Iterator[str]:
    """Move the cuts in a text to where `pattern` cannot see across: each chunk is split as it is in the whole text.

    >>> list(chunks(["the c", "at in th", "e hat"], PATTERNS["gpt2"]))
    ['the', ' cat in', ' the', ' hat']

    Of a user's own pattern nothing is known, so its text is one chunk.
    """
    rest = ""  # the text behind the last cut
    for part in parts:
        for start in range(0, len(part), CHUNK):
            searched = max(0, len(rest) - 1)
            rest += part[start:start + CHUNK]
            if pattern in PATTERNS.values() and (place := CUT.search(rest, searched)):
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
        pieces = regex.findall(pattern, text)
    except regex.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from None
    if pattern not in PATTERNS.values() and "".join(map(str, pieces)) != text:
        raise ValueError(f"pattern {pattern!r} drops text or has a group (...); write (?:...), and |. at its end")
    return pieces


def any_of(names: Iterable[str]) -> str:
    """A regular expression for any of the names, the longest first, as one may begin with another."""
    return "|".join(map(regex.escape, sorted(names, key=len, reverse=True)))


def count_texts(texts: list[str], pattern: str, special_tokens: list[str]) -> Counter:
    """How often each piece occurs in some texts. Special tokens are boundaries and not counted."""
    counts = Counter()
    for text in texts:
        for ordinary in regex.split(any_of(special_tokens), text):
            counts.update(split(ordinary, pattern))
    return counts


def count_pieces(counts: Counter, texts: Iterable[str], pattern: str, special_tokens: list[str], workers: int) -> None:
    """Add to `counts` as count_texts does, on several processes if there is more than one batch of texts."""
    def batches() -> Iterator[list[str]]:
        batch, size = [], 0
        for text in texts:
            batch.append(text)
            size += len(text)
            if size > 2 * CHUNK:
                yield batch
                batch, size = [], 0
        yield batch

    stream, workers = batches(), workers or os.cpu_count()
    # Forked processes start at once, and are safe here as they only handle text. Ctrl-C is for the parent.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    ignore = signal.signal, (signal.SIGINT, signal.SIG_IGN)
    with concurrent.futures.ProcessPoolExecutor(workers, context, *ignore) as pool:
        while group := list(itertools.islice(stream, 4 * workers)):  # few batches are in memory at a time
            each = pool.map if workers > 1 and len(group) > 1 else map
            for part in each(count_texts, group, itertools.repeat(pattern), itertools.repeat(special_tokens)):
                counts.update(part)


def train_lookup(counts: Counter, size: int) -> tuple[list[bytes], list]:
    """Characters or words: the `size` most frequent pieces are the vocabulary, equal ones in alphabetical order.

    >>> train_lookup(Counter("the cat in the hat".split()), 3)
    ([b'the', b'cat', b'hat'], [])
    """
    pieces = sorted(counts, key=lambda piece: (-counts[piece], piece))
    return [piece.encode() for piece in pieces[:size]], []


def train_bpe(counts: Counter, size: int) -> tuple[list[bytes], list]:
    """Byte pair encoding: from the 256 bytes on, make the most frequent pair of neighbours a token, until `size`.

    >>> train_bpe(Counter({"the": 2, " cat": 1, " in": 1, " the": 1, " hat": 1}), 260)[1]
    [(b't', b'h'), (b'th', b'e'), (b'a', b't'), (b'i', b'n')]

    Of equally frequent pairs the greatest wins, (left, right) compared as byte strings. "aaa" has the pair (a, a)
    twice. Training ends early when no pair is left.
    """
    row, merges = PieceRow(counts, size), []
    while len(row.vocab) < size and (found := row.most_frequent()):
        left, right, places = found
        merges.append((row.vocab[left], row.vocab[right]))
        row.merge(left, right, places)
    return row.vocab, merges


class PieceRow:
    """The distinct pieces in one row of tokens, with an index from each frequent pair of neighbours to its places.

    Tokens stay at the places of their bytes: first[i] is the token that begins at byte i and last[i] the one that
    ends there, or -1, as also between two pieces. So the neighbours of a token are last[i - 1] and first[i + length].
    A pair of tokens is one number, left << 32 | right; it is negative where the piece ends after `left`.

    A pair gets all its places at once, when the newer of its tokens is made, and later only loses some. So what was
    counted is an upper bound, and is counted again when it comes to the top. And a pair below `floor` stays below: it
    is left out until no pair reaches the floor, which then falls, and all pairs are counted anew (about ten times).
    """

    def __init__(self, counts: Counter, size: int):
        pieces = [piece.encode() for piece in counts]
        spans = np.array([len(piece) + 1 for piece in pieces], np.int64)
        self.first = np.frombuffer(b"\n".join([*pieces, b""]), np.uint8).astype(np.int64)
        self.first[np.cumsum(spans) - 1] = -1
        self.last = self.first.copy()
        self.weight = np.repeat(np.array(list(counts.values()), np.int64), spans)  # how often its piece occurs
        self.vocab = [bytes([byte]) for byte in range(256)]
        self.length = np.ones(max(size, 256), np.int64)  # of each token, in bytes
        self.where, self.heap, self.floor = {}, [], 1 << 62

    def index(self, places: np.ndarray) -> None:
        """Take up the pairs that begin at some places and reach the floor, which is set if it is 0."""
        left = self.first[places]
        keys = left << 32 | self.first[places + self.length[left]]
        order = np.argsort(keys, kind="stable")[np.count_nonzero(keys < 0):]
        keys, places = keys[order], places[order]
        starts = np.flatnonzero(np.concatenate(([-1], keys[:-1])) != keys)
        totals = np.add.reduceat(self.weight[places], starts)
        ends = np.append(starts[1:], len(keys))
        self.floor = self.floor or max(1, totals.max(initial=0) // 4)
        for i in np.flatnonzero(totals >= self.floor).tolist():
            key = int(keys[starts[i]])
            self.where[key] = places[starts[i]:ends[i]]
            name = descending(self.vocab[key >> 32]) + descending(self.vocab[key & 0xFFFFFFFF])
            heapq.heappush(self.heap, (-int(totals[i]), name, key))

    def most_frequent(self) -> tuple[int, int, np.ndarray] | None:
        """The pair to merge next and its places."""
        while True:
            while self.heap and -self.heap[0][0] >= self.floor:
                negative, name, key = self.heap[0]
                left, right = divmod(key, 1 << 32)
                places = self.where[key]
                places = places[(self.first[places] == left) & (self.first[places + self.length[left]] == right)]
                total = int(self.weight[places].sum())
                if total == -negative:
                    heapq.heappop(self.heap)
                    return left, right, places
                self.where[key] = places
                heapq.heapreplace(self.heap, (-total, name, key))
            if self.floor == 1:
                return None
            self.where, self.heap, self.floor = {}, [], 0
            self.index(np.flatnonzero(self.first >= 0))

    def merge(self, left: int, right: int, places: np.ndarray) -> None:
        """Make a pair a token at its places, from left to right, and take up its pairs with its neighbours."""
        if left == right:
            places = every_other(places, self.length[left])
        new = len(self.vocab)
        self.vocab.append(self.vocab[left] + self.vocab[right])
        self.length[new] = len(self.vocab[new])
        middle = places + self.length[left]
        self.first[middle] = self.last[middle - 1] = -1
        self.first[places] = self.last[places + self.length[new] - 1] = new
        before = self.last[places - 1]
        others = (before >= 0) & (before != new)  # a neighbour that is new as well is in `places` itself
        self.index(np.concatenate((places, (places - self.length[before])[others])))


def every_other(places: np.ndarray, length: int) -> np.ndarray:
    """Of overlapping places the first, third, ...: "aaaaa" has (a, a) at 0, 1, 2, 3 and merges at 0 and 2.

    >>> every_other(np.array([0, 1, 2, 3, 7, 9, 10]), 1).tolist()
    [0, 2, 7, 9]
    """
    number = np.arange(len(places))
    begins = np.diff(places, prepend=-length - 1) != length
    return places[(number - np.maximum.accumulate(np.where(begins, number, 0))) % 2 == 0]


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
    if kind not in TRAINERS:
        raise ValueError(f"{kind!r} is no kind of tokenizer; there are {', '.join(TRAINERS)}")
    names = [UNKNOWN] * (kind not in BYTE_KINDS) + list(special_tokens)
    names += [END] * (END not in names)
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"special tokens must be different from each other and not empty, unlike {names}")
    least = len(names) + (256 if kind in BYTE_KINDS else 1)
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size} is too small: {kind} with {len(names)} special tokens needs {least}")
    pattern = PATTERNS["char"] if kind == "char" else PATTERNS.get(pattern, pattern)
    counts = Counter() if counts is None else counts
    count_pieces(counts, documents, pattern, names, workers)
    if not counts:
        raise ValueError("there is no text to train on")
    vocab, merges = TRAINERS[kind](counts, vocab_size - len(names))
    specials = {name: i for i, name in enumerate(names, len(vocab))}
    if len(vocab) + len(names) < vocab_size:
        print(f"{kind}: this text gives {len(vocab) + len(names)} tokens, not {vocab_size}", file=sys.stderr)
    return Tokenizer(kind, pattern, vocab + [name.encode() for name in names], merges, specials)


class Cache(dict):
    """piece -> ids as bytes; computes what it lacks, and begins anew when it is full."""

    def __init__(self, compute: Callable[[str], bytes]):
        self.compute = compute

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

    def __init__(self, kind: str, pattern: str, vocab: list[bytes], merges: list[tuple[bytes, bytes]],
                 special_tokens: dict[str, int]):
        self.kind, self.pattern, self.vocab, self.merges = kind, pattern, vocab, merges
        self.special_tokens = special_tokens
        self.index = {token: i for i, token in enumerate(vocab) if i not in special_tokens.values()}  # bytes -> id
        named = {i: name.encode() for name, i in special_tokens.items()}
        if dict(enumerate(vocab)) != {**{i: token for token, i in self.index.items()}, **named}:
            raise ValueError("two tokens are the same, or a special token is not in its place")
        self.byte_ids = [self.index.get(bytes([byte])) for byte in range(256)]
        self.unknown = special_tokens[UNKNOWN] if None in self.byte_ids else None
        self.lengths = [*map(len, vocab), 0]  # the last one, at -1, is that of no token
        self.ranks, self.merged, known = {}, [], {bytes([byte]) for byte in range(256)}
        for left, right in merges:
            if not {left, right} <= known or left + right in known:
                raise ValueError(f"the merge of {left!r} and {right!r} comes twice or before its parts")
            known.add(left + right)
            self.ranks[self.index[left], self.index[right]] = len(self.merged)  # pair of ids -> rank
            self.merged.append(self.index[left + right])  # rank -> id
        self.dtype = np.dtype(np.uint16 if len(vocab) <= 1 << 16 else np.uint32)
        self.cache = Cache(self._piece_ids)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return len(self.vocab)

    def encode(self, text: str, allowed_special: str | set[str] = "none") -> list[int]:
        """Ids of a text. What looks like a special token in it is ordinary text ("none"), an error ("none_raise"), or
        one id if it is allowed ("all", or a set of names); the longest is taken where one begins with another."""
        names = self.special_tokens
        if allowed_special == "none_raise" and (found := regex.search(any_of(names), text)):
            raise ValueError(f"the text holds the special token {found.group()!r}, which is not allowed here")
        none = allowed_special in ("none", "none_raise")
        allowed = () if none else names if allowed_special == "all" else allowed_special
        if wrong := set(allowed) - names.keys():
            raise ValueError(f"{sorted(wrong)} are no special tokens of this tokenizer, which has {sorted(names)}")
        ids = []
        for i, part in enumerate(regex.split(f"({any_of(allowed)})", text) if allowed else [text]):
            ids += [names[part]] if i % 2 else self.encode_ordinary(part).tolist()
        return ids

    def encode_ordinary(self, text: str) -> np.ndarray:
        """Ids of a text, special tokens in it as ordinary text: uint16, or uint32 for more than 65,536 tokens."""
        ids = bytearray()
        for chunk in chunks([text], self.pattern) if len(text) > CHUNK else [text]:
            ids += b"".join(map(self.cache.__getitem__, split(chunk, self.pattern)))
        return np.frombuffer(ids, self.dtype)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, as of `encode_ordinary`."""
        return [self.encode_ordinary(text) for text in texts]

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
        if ids and not 0 <= min(ids) <= max(ids) < len(self.vocab):
            wrong = next(i for i in ids if not 0 <= i < len(self.vocab))
            raise ValueError(f"id {wrong} is not in this vocabulary of {len(self.vocab)} tokens")
        return b"".join(map(self.vocab.__getitem__, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def to_dict(self) -> dict:
        """What `save` writes. Tokens are written as Latin-1, in which character n is byte n; merges as pairs of ids."""
        ids = [[self.index[left], self.index[right]] for left, right in self.merges]
        return {"version": VERSION, "kind": self.kind, "pattern": self.pattern, "special_tokens": self.special_tokens,
                "merges": ids, "vocab": [token.decode("latin-1") for token in self.vocab]}

    def save(self, path: str | os.PathLike) -> None:
        """Write the tokenizer as JSON, for `load`."""
        with replacing(path) as file:
            file.write(json.dumps(self.to_dict()).encode())

    def _piece_ids(self, piece: str) -> bytes:
        """Ids of one piece, as the bytes of an array."""
        data = piece.encode()
        ids = [self.index.get(data, self.unknown)]
        if self.unknown is None:
            ids = self._merge([self.byte_ids[byte] for byte in data])
        return np.array(ids, self.dtype).tobytes()

    def _merge(self, ids: list[int]) -> list[int]:
        """Merge the pair of lowest rank, of several the first one, until no pair of neighbours has a rank.

        The pairs wait in a queue, so that n bytes take about n log n steps. Tokens stay at the places of their bytes,
        as in PieceRow. A pair is one number there: rank << 32 | place.
        """
        first, last, ranks, lengths = [*ids, -1], [*ids, -1], self.ranks, self.lengths
        queue = [ranks[pair] << 32 | place for place, pair in enumerate(zip(ids, ids[1:])) if pair in ranks]
        heapq.heapify(queue)
        while queue:
            rank, place = divmod(heapq.heappop(queue), 1 << 32)
            left, new = first[place], self.merged[rank]
            middle = place + lengths[left]
            if ranks.get((left, first[middle])) == rank:  # else one of the two is part of another token by now
                first[middle] = last[middle - 1] = -1
                first[place] = last[place + lengths[new] - 1] = new
                for start in (place - lengths[last[place - 1]], place):
                    pair = first[start], first[start + lengths[first[start]]]
                    if pair in ranks:
                        heapq.heappush(queue, ranks[pair] << 32 | start)
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
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"not a tokenizer of bpe.py, or a damaged one ({type(error).__name__} {error})") from None


def load(path: str | os.PathLike) -> Tokenizer:
    """Read what `save` wrote; ValueError says what is wrong with the file."""
    try:
        return from_dict(json.loads(Path(path).read_bytes()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def main():
    o = options(Options, sys.argv[1:])
    if o.tokenizer in TRAINERS:
        began, counts, errors = time.time(), Counter(), {}
        texts = read_documents(find_files(o.input), o.separator, errors)
        specials = o.special_tokens.split(",") if o.special_tokens else []
        tokenizer = train(o.tokenizer, texts, o.vocab_size, o.pattern, specials, o.workers, counts)
        tokenizer.save(o.output)
        print(f"{o.output}: {o.tokenizer}, {tokenizer.vocab_size} tokens, trained in {time.time() - began:.1f} s")
        for path, number in errors.items():
            print(f"{path}: {number} errors in UTF-8, replaced by U+FFFD", file=sys.stderr)
        size = sum(len(piece.encode()) * number for piece, number in counts.items())
        tokens = sum(len(tokenizer.encode_ordinary(piece)) * number for piece, number in counts.items())
        print(f"{size} bytes in {tokens} tokens: {size / tokens:.3f} bytes per token")
    elif os.path.exists(o.tokenizer):
        tokenizer = load(o.tokenizer)
    else:
        raise ValueError(f"--tokenizer={o.tokenizer} is neither a kind ({', '.join(TRAINERS)}) nor a file")
    for i in tokenizer.encode(o.show, "all"):
        print(f"{i:6} {tokenizer.vocab[i]!r}")


if __name__ == "__main__":
    run(main)
