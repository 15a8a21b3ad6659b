"""Text <-> tokens: characters, bytes, words and byte pair encoding (BPE), trained and run in pure Python.

Reads: text files, folders of them, .jsonl with a "text" field (with no --input, the Python standard library's text).
Writes: tokenizer.json, which holds all that encoding and decoding need.
Usage: python bpe.py --input=shakespeare.txt --vocab_size=1024 --output=tokenizer.json
       python bpe.py --tokenizer=tokenizer.json --show="Hello, world!"
References: Sennrich et al. 2016 (BPE for words), Radford et al. 2019 (GPT-2: bytes, and the pattern that splits first).
"""
import argparse
import array
import codecs
import contextlib
import dataclasses
import difflib
import functools
import heapq
import inspect
import io
import itertools
import json
import multiprocessing
import os
import sys
import sysconfig
import textwrap
import time
import tokenize
from collections import Counter, defaultdict
from pathlib import Path
from typing import BinaryIO, Callable, Iterable, Iterator

import numpy as np
import regex

# A pattern cuts text into pieces; tokens never cross from one piece into the next. Every character must lie in a piece.
PATTERNS = {
    # contractions; a word, a number, a run of other signs, each with the one space before it; white space, of which
    # the last character is left to the word that follows
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "code": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "char": r"(?s:.)",
}
# Where a text may be cut without changing its pieces: behind what is no white space and before a space, or between a
# letter or digit and white space. No piece of the patterns above holds such a place, none looks across it. `(?r)`
# searches backwards.
CUT = regex.compile(r"(?r)(?:[\p{L}\p{N}](?=\s)|\S(?= ))")
CHUNK = 1 << 20  # characters that are split at a time: bounds the memory of encoding, however long the text
CACHE_PIECES = 1 << 18  # pieces whose ids are remembered while encoding
LONG = 256  # characters above which a piece is not remembered, bytes above which merging visits ranks in order
VERSION = 1  # of the tokenizer file
END, UNKNOWN = "<|endoftext|>", "<|unk|>"


@dataclasses.dataclass
class Options:
    input: str = ""  # text files and folders, comma list; "" is the Python standard library's text
    tokenizer: str = "bpe"  # what to train: bpe, char, byte or word; or the tokenizer file to load
    vocab_size: int = 8192  # number of tokens, special ones included
    pattern: str = "gpt2"  # how text is split before merging: gpt2, code, or a regular expression of your own
    special_tokens: str = "<|endoftext|>"  # comma list of tokens that ordinary text never produces
    separator: str = ""  # text that stands between two documents of a file
    output: str = "tokenizer.json"  # file that a trained tokenizer is written to
    show: str = ""  # a text whose tokens are printed
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


# ---------------------------------------------------------------------------------------------------------------------
# Reading text


def find_files(input: str) -> list[Path]:
    """Text files of a comma list of files and folders, sorted within a folder; "" is the default corpus.

    A folder gives all files below it except hidden ones, binary ones and ones that cannot be read (their number is
    said on stderr). The default corpus is the Python standard library of this installation: every .py file.
    """
    if not input:
        root = Path(sysconfig.get_path("stdlib"))
        paths = sorted(root.rglob("*.py"), key=Path.as_posix)
        return [path for path in paths if not {"site-packages", "dist-packages"} & set(path.parts)]
    files = []
    for name in input.split(","):
        path = Path(name)
        if not path.exists():
            raise ValueError(f"{name!r} does not exist; --input takes files and folders, separated by commas")
        found = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")) if path.is_dir() else []
        text = [p for p in found if is_text(p)]
        if len(text) < len(found):
            print(f"{name}: left out {len(found) - len(text)} files that are binary or unreadable", file=sys.stderr)
        files += text if path.is_dir() else [path]
    return files


def is_text(path: Path) -> bool:
    """Whether the file can be read and its first 8 KB hold no NUL byte, which UTF-8 text has no use for."""
    try:
        with open(path, "rb") as file:
            return b"\0" not in file.read(8192)
    except OSError:
        return False


def read_parts(files: Iterable[Path], separator: str = "", errors: dict | None = None) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether a document ends here), a megabyte of a document at most at a time: memory stays bounded.

    A file is one document, or several with `separator` between them; each line of a .jsonl file is one. Invalid UTF-8
    becomes U+FFFD and is counted in `errors` (path -> number). Newlines stay as they are.
    """
    def replace(error: UnicodeDecodeError) -> tuple[str, int]:
        faults[str(path)] = faults.get(str(path), 0) + 1
        return "\ufffd", error.end

    faults = {} if errors is None else errors
    codecs.register_error("counted", replace)
    for path in map(Path, files):
        if not is_text(path):
            raise ValueError(f"{path}: cannot be read as UTF-8 text (unreadable, binary, or UTF-16)")
        with open(path, encoding="utf-8", errors="counted", newline="\n") as file:
            if path.suffix == ".jsonl":
                yield from ((json_text(line, f"{path}:{number}"), True) for number, line in enumerate(file, 1))
                continue
            rest = ""
            while block := file.read(CHUNK):
                *documents, rest = (rest + block).split(separator) if separator else [rest + block]
                yield from ((document, True) for document in documents)
                # the last characters may be the first ones of a separator: they wait for the next block
                stay = max(0, len(rest) - max(0, len(separator) - 1))
                yield rest[:stay], False
                rest = rest[stay:]
            yield rest, True


def json_text(line: str, place: str) -> str:
    """The "text" field of one line of a .jsonl file."""
    try:
        return "" if line.isspace() else str(json.loads(line)["text"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{place}: expected a JSON object with a "text" field') from None


def read_documents(files: Iterable[Path], separator: str = "", errors: dict | None = None) -> Iterator[str]:
    """Yield whole documents, empty ones left out; arguments as `read_parts`, which long documents should use."""
    held = []
    for text, ends in read_parts(files, separator, errors):
        held.append(text)
        if ends and (document := "".join(held)):
            yield document
        held = [] if ends else held


def chunks(parts: Iterable[str], pattern: str) -> Iterator[str]:
    """Cut a stream of text where `pattern` cannot see across: the chunks have the pieces of the whole text.

    >>> list(chunks(["the c", "at in th", "e hat"], PATTERNS["gpt2"]))
    ['the', ' cat in', ' the', ' hat']

    A pattern of the user's own is not cut, as nothing is known of it: its whole text is held in memory.
    """
    held, before = [], ""
    for part in parts:
        for start in range(0, len(part), CHUNK):
            block = part[start:start + CHUNK]
            place = CUT.search(before + block) if pattern in PATTERNS.values() else None
            if place:
                cut = place.end() - len(before)
                yield "".join(held) + block[:cut]
                held, block = [], block[cut:]
            held.append(block)
            before = part[start:start + CHUNK][-1:]
    yield "".join(held)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def well_formed(text: str) -> str:
    """Join surrogate pairs and replace lone surrogates, which UTF-8 cannot hold, by U+FFFD; other text stays itself."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def split(text: str, pattern: str) -> list[str]:
    """The pieces of a text; ValueError if they do not hold all of it.

    >>> split("Hello world's  end", PATTERNS["gpt2"])
    ['Hello', ' world', "'s", ' ', ' end']
    """
    text = well_formed(text)
    pieces = regex.compile(pattern).findall(text)
    if pattern not in PATTERNS.values() and "".join(pieces) != text:
        raise ValueError(f"pattern {pattern!r} drops text: its matches, joined, must give all of it (end it with |.)")
    return pieces


def any_of(names: Iterable[str]) -> str:
    """A regular expression for the names, the longest first, as one may begin with another."""
    return "|".join(regex.escape(name) for name in sorted(names, key=len, reverse=True))


def count_batch(batch: list[str], pattern: str, special_tokens: tuple[str, ...]) -> Counter:
    """Number of times that each piece occurs in some documents; special tokens are boundaries and not counted."""
    counts = Counter()
    for document in batch:
        for text in regex.split(any_of(special_tokens), document):
            counts.update(split(text, pattern))
    return counts


def count_pieces(documents: Iterable[str], pattern: str, special_tokens=(END,), workers: int = 0) -> Counter:
    """Count the pieces of all documents, over `workers` processes (0: all cores) where there is enough to do."""
    def batches():
        batch, size = [], 0
        for document in documents:
            batch.append(document)
            size += len(document)
            if size > 4 * CHUNK:
                yield batch
                batch, size = [], 0
        yield batch

    counts, stream, workers = Counter(), batches(), workers or os.cpu_count()
    job = functools.partial(count_batch, pattern=pattern, special_tokens=tuple(special_tokens))
    with contextlib.ExitStack() as stack:
        each, group = map, list(itertools.islice(stream, 2 * workers))
        if workers > 1 and len(group) > 1:
            # fork is quickest and safe here, as the children touch nothing but text; elsewhere the system's way
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
            each = stack.enter_context(context.Pool(workers)).imap_unordered
        while group:
            for part in each(job, group):
                counts.update(part)
            group = list(itertools.islice(stream, 2 * workers))
    return counts


def train_lookup(counts: Counter, size: int) -> tuple[list[bytes], list]:
    """Characters or words: the `size` most frequent pieces are the vocabulary, ties in the order of the alphabet.

    >>> train_lookup(Counter("the cat in the hat".split()), 3)
    ([b'the', b'cat', b'hat'], [])
    """
    pieces = sorted(counts, key=lambda piece: (-counts[piece], piece))
    return [piece.encode() for piece in pieces[:size]], []


def train_bytes(counts: Counter, size: int) -> tuple[list[bytes], list]:
    """Bytes: BPE without a merge."""
    return train_bpe(counts, 256)


def train_bpe(counts: Counter, size: int) -> tuple[list[bytes], list]:
    """Byte pair encoding: start from 256 bytes, then merge the most frequent pair of neighbours until `size` tokens.

    >>> train_bpe(Counter({"the": 2, " cat": 1, " in": 1, " the": 1, " hat": 1}), 260)[1]
    [(b't', b'h'), (b'th', b'e'), (b'a', b't'), (b'i', b'n')]

    Of equally frequent pairs the greater one wins, (left, right) compared as byte strings. Stops early when no pair is
    left. Pairs are counted as they overlap: "aaa" holds (a, a) twice.
    """
    corpus, merges = PieceRow(counts), []
    while len(corpus.vocab) < size and (pairs := corpus.best(size - len(corpus.vocab))):
        merges += [(corpus.vocab[left], corpus.vocab[right]) for left, right in pairs]
        corpus.merge(pairs)
    return corpus.vocab, merges


class PieceRow:
    """The distinct pieces as one row of tokens, and where each frequent pair of neighbours stands in it.

    Tokens stay at the places of their bytes: first[i] is the token that begins at byte i, last[i] the one that ends
    there, -1 where none does and between two pieces. So a token's neighbours are found without links: last[i - 1] and
    first[i + length]. A pair of tokens is one number, left * 2**32 + right.

    Only pairs that occur at least `floor` times are counted and indexed. A pair never becomes more frequent once its
    tokens exist, so those below cannot be the next merge; when none is left above, the floor falls and all pairs are
    counted anew, about ten times in all.
    """

    def __init__(self, counts: Counter):
        pieces = [piece.encode() for piece in counts]
        sizes = np.fromiter(map(len, pieces), np.int64, len(pieces)) + 1
        row = np.frombuffer(b"\n".join(pieces) + b"\n", np.uint8).astype(np.int64)
        row[np.cumsum(sizes) - 1] = -1
        self.first, self.last = row, row.copy()
        self.weight = np.repeat(np.fromiter(counts.values(), np.int64, len(pieces)), sizes)  # of its piece, per byte
        self.vocab = [bytes([byte]) for byte in range(256)]
        self.length = np.ones(256, np.int64)  # bytes of each token
        self.names = [descending(token) for token in self.vocab]
        self.count, self.where, self.heap, self.floor = {}, {}, [], 1 << 62

    def lower_floor(self) -> None:
        """Count all pairs of neighbours anew; index those that reach a lower floor than before."""
        starts = np.flatnonzero(self.first >= 0)
        tokens = self.first[starts]
        near = np.flatnonzero(starts[1:] == starts[:-1] + self.length[tokens[:-1]])  # elsewhere a piece ends
        pairs = self.group(tokens[near] << 32 | tokens[near + 1], starts[near])
        self.floor = max(1, min(self.floor - 1, pairs[1].max(initial=0) // 4))
        self.count, self.where, self.heap = {}, {}, []
        self.index(*pairs)

    def group(self, keys: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Sort places by their pair: the different pairs, the total weight of each, where it begins, the places."""
        order = np.argsort(keys, kind="stable")
        keys, places = keys[order], places[order]
        begins = np.flatnonzero(np.diff(keys, prepend=-1))
        return keys[begins], np.add.reduceat(self.weight[places], begins), begins, places

    def index(self, keys: np.ndarray, totals: np.ndarray, begins: np.ndarray, places: np.ndarray) -> None:
        """Take up the pairs that reach the floor."""
        ends = np.append(begins[1:], len(places))
        for i in np.flatnonzero(totals >= self.floor).tolist():
            key, total = int(keys[i]), int(totals[i])
            self.count[key], self.where[key] = total, places[begins[i]:ends[i]].copy()
            heapq.heappush(self.heap, (-total, self.names[key >> 32], self.names[key & 0xFFFFFFFF], key))

    def best(self, limit: int) -> list[tuple[int, int]]:
        """The next merges, as many as are certain before the first of them is made; [] if no pair is left."""
        while not (batch := self.take(limit)) and self.floor > 1:
            self.lower_floor()
        return [divmod(key, 1 << 32) for _, _, _, key in batch]

    def take(self, limit: int) -> list[tuple]:
        """The most frequent pairs, down to one that overlaps with another, (a, b) with (b, c), or with itself, (a, a).

        So far no merge changes another's count. Nor does one make a pair that would come before another of the batch:
        where x stands before (a, b), the new pair (x, ab) is at most as frequent as (x, a), which overlaps with (a, b)
        and so comes after the batch. But on a tie the names decide, and (x, ab) may have the greater one: pairs as
        frequent as the first one left out go back, all but the very first.
        """
        batch, lefts, rights, heap = [], set(), set(), self.heap
        while heap and len(batch) < limit:
            negative, *names, key = heap[0]
            total, left, right = self.count[key], key >> 32, key & 0xFFFFFFFF
            if total < self.floor:
                heapq.heappop(heap)
            elif total < -negative:  # merges took some since it was put on the heap
                heapq.heapreplace(heap, (-total, *names, key))
            elif left in rights or right in lefts:
                break
            else:
                batch.append(heapq.heappop(heap))
                lefts.add(left)
                rights.add(right)
                if left == right:
                    break
        while len(batch) > 1 and heap and batch[-1][0] == heap[0][0]:
            heapq.heappush(heap, batch.pop())
        return batch

    def merge(self, pairs: list[tuple[int, int]]) -> None:
        """Merge some pairs everywhere, from left to right, and bring the counts of the pairs beside them up to date."""
        first, last, base, found = self.first, self.last, len(self.vocab), []
        for left, right in pairs:
            places = self.where.pop(left << 32 | right)
            del self.count[left << 32 | right]
            places = places[(first[places] == left) & (first[places + self.length[left]] == right)]
            found.append(every_other(places, self.length[left]) if left == right else places)
            self.vocab.append(self.vocab[left] + self.vocab[right])
            self.names.append(descending(self.vocab[-1]))
        self.length = np.append(self.length, list(map(len, self.vocab[base:])))
        which = np.repeat(np.arange(len(pairs)), list(map(len, found)))
        left, right = np.array(pairs).T[:, which]
        at, new = np.concatenate(found), base + which
        middle, end = at + self.length[left], at + self.length[new]
        before, after = last[at - 1], first[end]
        first[middle] = last[middle - 1] = -1
        first[at] = last[end - 1] = new
        # Where two merges meet, (a, b)(a, b), the pair between them is counted once, by the second one.
        begun, ended = before >= 0, (after >= 0) & (first[end] < base)
        gone = np.concatenate([(before << 32 | left)[begun], (right << 32 | after)[ended]])
        come = np.concatenate([(last[at - 1] << 32 | new)[begun], (new << 32 | after)[ended]])
        keys, totals, _, _ = self.group(gone, np.concatenate([at[begun], at[ended]]))
        for key, total in zip(keys.tolist(), totals.tolist()):
            if key in self.count:
                self.count[key] -= total
        self.index(*self.group(come, np.concatenate([(at - self.length[last[at - 1]])[begun], at[ended]])))


def every_other(places: np.ndarray, length: int) -> np.ndarray:
    """Of overlapping places the first, third, ...: "aaaaa" has (a, a) at 0, 1, 2, 3 and merges at 0 and 2.

    >>> every_other(np.array([0, 1, 2, 3, 7, 9, 10]), 1).tolist()
    [0, 2, 7, 9]
    """
    number = np.arange(len(places))
    begins = np.diff(places, prepend=-length - 1) != length
    return places[(number - np.maximum.accumulate(np.where(begins, number, 0))) % 2 == 0]


def descending(token: bytes) -> str:
    """A text that sorts the other way round: a greater token gives a smaller text, for a heap whose top is smallest.

    >>> descending(b"a") > descending(b"ab") > descending(b"b")
    True
    """
    return token.translate(bytes(range(255, -1, -1))).decode("latin-1") + "\u0100"


# What each kind of tokenizer learns from the counts of the pieces: (counts, size) -> (vocabulary, merges).
TRAINERS = {"bpe": train_bpe, "char": train_lookup, "byte": train_bytes, "word": train_lookup}
BYTE_KINDS = ("bpe", "byte")  # these can write any text; the others need <|unk|>


def checked(kind: str, vocab_size: int, pattern: str, special_tokens: Iterable[str]) -> tuple[str, list[str]]:
    """The pattern and the special tokens that a training uses; ValueError if its options make no sense."""
    if kind not in TRAINERS:
        raise ValueError(f"no tokenizer is called {kind!r}; there are {', '.join(TRAINERS)}")
    names = [UNKNOWN] * (kind not in BYTE_KINDS) + list(special_tokens)
    names += [END] * (END not in names)
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"special tokens must be different from each other and not empty, not {names}")
    least = len(names) + (256 if kind in BYTE_KINDS else 1)
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size} is too small: {kind} with {len(names)} special tokens has {least}")
    pattern = PATTERNS["char"] if kind == "char" else PATTERNS.get(pattern, pattern)
    split("", pattern)
    return pattern, names


def fit(kind: str, counts: Counter, vocab_size: int, pattern: str, special_tokens: list[str]) -> "Tokenizer":
    """Train on pieces that were counted with this pattern and these special tokens, as `checked` gave them."""
    if not counts:
        raise ValueError("there is no text to train on")
    vocab, merges = TRAINERS[kind](counts, vocab_size - len(special_tokens))
    if len(vocab) + len(special_tokens) < vocab_size and kind != "byte":
        print(f"stopped early at {len(vocab) + len(special_tokens)} of {vocab_size} tokens: the text has no more pairs or pieces", file=sys.stderr)
    specials = {name: len(vocab) + i for i, name in enumerate(special_tokens)}
    return Tokenizer(kind, pattern, vocab + [name.encode() for name in special_tokens], merges, specials)


def train(kind: str, documents: Iterable[str], vocab_size: int, pattern: str = "gpt2",
          special_tokens: Iterable[str] = (END,), workers: int = 0) -> "Tokenizer":
    """Train a tokenizer of a kind of TRAINERS on documents.

    `vocab_size` counts the special tokens, which get the last ids; <|endoftext|> is added where it is missing, and
    <|unk|> for char and word. `pattern` is a name of PATTERNS or a regular expression; char has its own. The result
    does not depend on `workers` (0: all cores).
    """
    pattern, special_tokens = checked(kind, vocab_size, pattern, special_tokens)
    return fit(kind, count_pieces(documents, pattern, special_tokens, workers), vocab_size, pattern, special_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Encoding and decoding


class Cache(dict):
    """piece -> ids as packed bytes; computes what is missing, and starts anew when it is full."""

    def __init__(self, compute: Callable[[str], bytes]):
        self.compute = compute

    def __missing__(self, piece: str) -> bytes:
        ids = self.compute(piece)
        if len(self) >= CACHE_PIECES:
            self.clear()
        if len(piece) <= LONG:
            self[piece] = ids
        return ids


class Tokenizer:
    """Text to ids and back. Characters, bytes, words and BPE are four fillings of the same columns.

    kind: the name of its trainer; pattern: the regular expression that cuts text into pieces;
    vocab: id -> bytes; merges: pairs of byte strings in order of rank; special_tokens: name -> id.
    With <|unk|> among the special tokens a piece is looked up whole (char, word), else its bytes are merged.
    """

    def __init__(self, kind: str, pattern: str, vocab: list[bytes], merges: list[tuple[bytes, bytes]],
                 special_tokens: dict[str, int]):
        self.kind, self.pattern, self.vocab, self.merges = kind, pattern, vocab, merges
        self.special_tokens = special_tokens
        self.dtype = np.dtype(np.uint16 if len(vocab) <= 1 << 16 else np.uint32)
        specials = set(special_tokens.values())
        index = {token: i for i, token in enumerate(vocab) if i not in specials}  # bytes -> id
        if len(index) + len(special_tokens) < len(vocab) or any(
                not 0 <= i < len(vocab) or vocab[i] != name.encode() for name, i in special_tokens.items()):
            raise ValueError("two tokens are the same, or a special token is not in its place")
        self.index, self.unknown = index, special_tokens.get(UNKNOWN)
        self.byte_ids = [index.get(bytes([byte])) for byte in range(256)]
        self.looks_up = None in self.byte_ids
        self.ranks, self.merged = {}, []  # pair of ids -> rank -> id of the new token
        known = {bytes([byte]) for byte in range(256)}
        for left, right in merges:
            if not {left, right} <= known or left + right in known or left + right not in index:
                raise ValueError(f"merge {left!r} {right!r} is there twice, or its parts are not there before it")
            known.add(left + right)
            self.ranks[index[left], index[right]] = len(self.merged)
            self.merged.append(index[left + right])
        self.cache = Cache(self._pack)

    @property
    def vocab_size(self) -> int:
        return len(self.vocab)

    def __reduce__(self):
        return from_dict, (self.to_dict(),)

    def encode(self, text: str, allowed_special: str | set[str] = "none") -> list[int]:
        """Ids of a text. Special tokens in it are ordinary text ("none"), an error ("none_raise"), or, if they are
        in the set of allowed ones ("all": every one), single ids; the longest first where one begins with another."""
        names = self.special_tokens
        if allowed_special == "none_raise" and (found := regex.search(any_of(names), text)):
            raise ValueError(f"the text holds the special token {found.group()!r}; allow it with allowed_special")
        allowed = {"none": (), "none_raise": (), "all": names}.get(allowed_special) if isinstance(allowed_special, str) else allowed_special
        if not allowed:
            return self.encode_ordinary(text).tolist()
        ids = []
        for i, part in enumerate(regex.split(f"({any_of(allowed)})", text)):
            ids += self.encode_ordinary(part).tolist() if i % 2 == 0 else [names[part]]
        return ids

    def encode_ordinary(self, text: str) -> np.ndarray:
        """Ids of a text, special tokens in it as ordinary text: uint16, or uint32 for more than 65,536 tokens."""
        ids = bytearray()
        for chunk in [text] if len(text) <= CHUNK else chunks([text], self.pattern):
            ids += b"".join(map(self.cache.__getitem__, split(chunk, self.pattern)))
        return np.frombuffer(ids, self.dtype)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, as `encode_ordinary`."""
        return [self.encode_ordinary(text) for text in texts]

    def encode_iterable(self, parts: Iterable[str]) -> Iterator[int]:
        """Ids of a text that comes in parts: lazily, and the same as of the whole, wherever it was cut.

        Memory follows the longest stretch without a place to cut (see `chunks`), or the whole text for a pattern of
        the user's own.
        """
        for chunk in chunks(parts, self.pattern):
            yield from self.encode_ordinary(chunk).tolist()

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens; ValueError names an id that is none of the vocabulary's."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(f"id {wrong} is not in the vocabulary of {self.vocab_size} tokens")
        return b"".join(map(self.vocab.__getitem__, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens; bytes that are no UTF-8, as of half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def to_dict(self) -> dict:
        """What save() writes. Byte strings are written as Latin-1, where character n is byte n, so none is lost."""
        data = {"version": VERSION, "kind": self.kind, "pattern": self.pattern, "special_tokens": self.special_tokens,
                "merges": [[left.decode("latin-1"), right.decode("latin-1")] for left, right in self.merges]}
        if self.vocab != implied_vocab(self.merges, self.special_tokens):
            data["vocab"] = [token.decode("latin-1") for token in self.vocab]
        return data

    def save(self, path: str | os.PathLike) -> None:
        """Write the tokenizer to a JSON file; `load` reads it."""
        with replacing(path) as file:
            file.write(json.dumps(self.to_dict(), indent=0).encode())

    def _pack(self, piece: str) -> bytes:
        """Ids of one piece, as the bytes of an array."""
        data = piece.encode()
        if self.looks_up:
            ids = [self.index.get(data, self.unknown)]
        else:
            ids = [self.byte_ids[byte] for byte in data]
            ids = self._merge(ids) if len(ids) <= LONG else self._merge_long(ids)
        return array.array("H" if self.dtype.itemsize == 2 else "I", ids).tobytes()

    def _merge(self, ids: list[int]) -> list[int]:
        """Merge the pair of lowest rank, everywhere from left to right, until no pair is in the merges."""
        never = len(self.merges)
        while len(ids) > 1:
            rank = min(map(self.ranks.get, zip(ids, ids[1:]), itertools.repeat(never)))
            if rank == never:
                break
            out = []
            for token in ids:
                if out and self.ranks.get((out[-1], token)) == rank:
                    out[-1] = self.merged[rank]
                else:
                    out.append(token)
            ids = out
        return ids

    def _merge_long(self, ids: list[int]) -> list[int]:
        """The same for a long piece, in time about linear: visit the ranks in order, and only where they stand.

        This is exact because a merge makes pairs with the new token only, and these have higher ranks. Tokens stay at
        the places of their bytes, as in PieceRow.
        """
        first, last, size = [*ids, -1], [*ids, -1], len(ids)
        places = defaultdict(list)  # rank -> where a pair of this rank stood when it came up
        for place, pair in enumerate(zip(ids, ids[1:])):
            if pair in self.ranks:
                places[self.ranks[pair]].append(place)
        queue = sorted(places)
        while queue:
            rank = heapq.heappop(queue)
            new = self.merged[rank]
            for place in sorted(places.pop(rank)):
                left = first[place]
                middle = place + len(self.vocab[left])
                if left < 0 or self.ranks.get((left, first[middle])) != rank:
                    continue  # an earlier merge took one of the two
                end = place + len(self.vocab[new])
                first[middle] = last[middle - 1] = -1
                first[place] = last[end - 1] = new
                before = last[place - 1]
                pairs = (place - len(self.vocab[before]), (before, new)), (place, (new, first[end]))
                for start, pair in pairs:
                    if (following := self.ranks.get(pair)) is not None:
                        if following not in places:
                            heapq.heappush(queue, following)
                        places[following].append(start)
        return [token for token in first if token >= 0]


def implied_vocab(merges: list[tuple[bytes, bytes]], special_tokens: dict[str, int]) -> list[bytes]:
    """The vocabulary of a byte pair encoding that was trained here: bytes, merges, special tokens."""
    names = sorted(special_tokens, key=special_tokens.get)
    return [bytes([i]) for i in range(256)] + [left + right for left, right in merges] + [n.encode() for n in names]


def from_dict(data: dict) -> Tokenizer:
    """The tokenizer of which `to_dict` made this; ValueError if it is not whole."""
    try:
        if data["version"] != VERSION:
            raise ValueError(f"its format version is {data['version']}, this program reads {VERSION}")
        specials = data["special_tokens"]
        merges = [(left.encode("latin-1"), right.encode("latin-1")) for left, right in data["merges"]]
        vocab = [token.encode("latin-1") for token in data["vocab"]] if "vocab" in data else implied_vocab(merges, specials)
        split("", data["pattern"])
        return Tokenizer(data["kind"], data["pattern"], vocab, merges, specials)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a tokenizer of this program, or a damaged one ({error!r})") from None


def load(path: str | os.PathLike) -> Tokenizer:
    """Read a tokenizer that `save` wrote; ValueError says what is wrong with the file."""
    try:
        return from_dict(json.loads(Path(path).read_bytes()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def main():
    o = options(Options, sys.argv[1:])
    started = time.time()
    if o.tokenizer in TRAINERS:
        pattern, specials = checked(o.tokenizer, o.vocab_size, o.pattern, o.special_tokens.split(","))
        files, errors = find_files(o.input), {}
        counts = count_pieces(read_documents(files, o.separator, errors), pattern, specials, o.workers)
        tokenizer = fit(o.tokenizer, counts, o.vocab_size, pattern, specials)
        tokenizer.save(o.output)
        print(f"trained in {time.time() - started:.1f} s; saved {o.output}")
    else:
        tokenizer = load(o.tokenizer)
    print(f"{tokenizer.kind}: {tokenizer.vocab_size} tokens")
    for i in tokenizer.encode(o.show, allowed_special="all"):
        print(f"{i:6} {tokenizer.vocab[i]!r}")


if __name__ == "__main__":
    run(main)
