"""Text <-> tokens: characters, bytes, words and byte pair encoding (BPE).

Reads: text files, .jsonl files (field "text"), gzipped ones (.gz), folders; the
       standard library's text by default. Tokenizers: its own, tokenizer.json
       of Hugging Face, .tiktoken files, folders with vocab.json and merges.txt.
Writes: tokenizer.json, which holds all that encoding and decoding need.
Usage: python bpe.py --input=shakespeare.txt --vocab_size=1024
       python bpe.py --tokenizer=tokenizer.json --show="Hello, world!"
       python bpe.py --input=shakespeare.txt --compare=char,1024,tokenizer.json

It is trained and run in Python and numpy.
References: Sennrich et al. 2016 (BPE for words), Radford et al. 2019 (GPT-2:
bytes, and the pattern that splits first).
"""
import argparse
import base64
import codecs
import contextlib
import dataclasses
import difflib
import functools
import gzip
import inspect
import itertools
import json
import multiprocessing
import os
import queue
import re
import signal
import sys
import sysconfig
import textwrap
import threading
import time
import traceback
import unicodedata
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import BinaryIO

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
# Where text may be cut without changing its pieces: between a sign and a space, between a letter or digit and white
# space. No piece of the patterns above, but the last, holds such a place or looks across it; of others nothing is
# known. (?r) searches from the end.
CUT = regex.compile(r"(?r)(?:\S(?= )|[\p{L}\p{N}](?=\s))")
CUTTABLE = {*PATTERNS.values()} - {PATTERNS["bytes"]}
CONTRACTION = re.compile("'(?:[sdmt]|ll|ve|re)")
CHUNK = 1 << 14  # characters read at a time
BLOCK = 1 << 21  # characters that are split at a time, and are worth sending to a process
LONG, MANY = 64, 100  # bytes of a piece, and number of pieces, for which numpy is quicker than a loop, too
SHORT = 1000  # characters below which a loop is quicker than numpy
CACHE = 1 << 18  # pieces that are remembered
SLOTS = 18  # bits of the number of a slot in a table of pieces
HASH = 0x9E3779B97F4A7C15  # an odd number whose products spread over 64 bits (Knuth 1973, 6.4)
LOWEST = np.array([2 ** (8 * min(size, 8)) - 1 for size in range(17)], np.uint64)  # of 8 bytes, the lowest `size`
LOW = 0xFFFFFFFF  # of a pair of ids as one number, the right one
END, UNKNOWN = "<|endoftext|>", "<|unk|>"


@dataclasses.dataclass
class Options:
    input: str = ""  # text files and folders, comma list; "": the Python standard library's text
    tokenizer: str = "bpe"  # what to train: bpe, char, byte or word; or a tokenizer file to load
    vocab_size: int = 8192  # number of tokens, special ones included
    pattern: str = "gpt2"  # how text is split first: gpt2, code, gpt4, o200k, bytes (not at all), or your own regex
    special_tokens: str = "<|endoftext|>"  # comma list of tokens that ordinary text never gives
    separator: str = ""  # text that stands between the documents of a file
    min_count: int = 1  # pieces that occur less often are left out of training
    max_chunk_bytes: int = 0  # longer pieces are left out of training (0: none)
    output: str = "tokenizer.json"  # file for the trained tokenizer
    show: str = ""  # text whose tokens are printed
    trace: int = 0  # number of merges that are printed in training
    dump: str = ""  # file for the list of all tokens
    compare: str = ""  # comma list of tokenizers (files, kinds, vocabulary sizes to train) to compare on the input
    workers: int = 0  # processes; 0: one for each core


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


def tell_links(paths: Iterable[Path]) -> None:
    """One line on stderr where a path is a link to a folder: what lies below is not read, for links may be circles."""
    if links := sorted(path for path in paths if path.is_symlink() and path.is_dir()):
        more = f" and {len(links) - 1:,} more" * (len(links) > 1)
        print(f"{links[0]}{more}: a link to a folder is not followed; name it beside its folder", file=sys.stderr)


def find_files(input: str) -> list[Path]:
    """Files of a comma list of files and folders, sorted by path; "" is the standard library's *.py of this Python.

    A folder gives all files below it that are text, but none of hidden folders and of site-packages.
    """
    files, inner = [], []
    for name in input.split(",") if input else [sysconfig.get_path("stdlib")]:
        found = [] if os.path.isdir(name) else [Path(name)]
        for folder, folders, names in os.walk(name):
            folders[:] = [below for below in folders if not regex.search(r"^\.|-packages$", below)]
            inner += [Path(folder, below) for below in folders]
            paths = [Path(folder, file) for file in names if input or file.endswith(".py")]
            found += filter(is_text, filter(Path.is_file, paths))
        files += sorted(found)
    tell_links(inner)
    return files


@contextlib.contextmanager
def blaming(what: str) -> Iterator[None]:
    """An error in the content of a file becomes a ValueError that begins with `what`, which names the file."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, EOFError,
            gzip.zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{what}: {error!s:.300}") from None


def opened(path: Path, mode: str = "rb", **how):
    """Open a file for reading, through gzip if its name ends in .gz."""
    return (gzip.open if path.suffix == ".gz" else open)(path, mode, **how)


def is_text(path: Path) -> bool:
    """Whether a file has no NUL among its first bytes, as binary files and UTF-16 have."""
    with blaming(f"{path} is damaged"), opened(path) as file:
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
                rows = (json.loads(line.removeprefix("\ufeff")) for line in file if line.strip())
                yield from ((well_formed(row["text"]), True) for row in rows)
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
    cut = CUT if pattern in CUTTABLE else regex.compile("(?r)" + (regex.escape(end) or "(?!)"))
    for part in parts:
        for start in range(0, len(part), CHUNK):
            searched = max(0, len(rest) - 20)  # a place to cut is shorter
            rest += part[start:start + CHUNK]
            if len(rest) >= least and (place := cut.search(rest, searched)):
                yield rest[:place.end()]
                rest = rest[place.end():]
    yield from filter(None, [rest])


def any_of(names: Iterable[str]) -> str:
    """A regular expression for any of the names, the longest first, as one may begin with another."""
    return "|".join(map(regex.escape, sorted(names, key=len, reverse=True)))


# ---- many processes

def end_with(parent: multiprocessing.process.BaseProcess) -> None:
    """Wait for the end of the parent, then end this process."""
    parent.join()
    os._exit(1)


def do_jobs(pipe: Connection, work: Callable, *given) -> None:
    """A process: it does what comes through its pipe until it or its parent is killed. Ctrl-C is left to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while True:
            job = pipe.recv()
            try:
                answer = work(job, *given), None, ""
            except Exception as error:
                answer = None, error, traceback.format_exc()
            pipe.send(answer)


def parallel(work: Callable, jobs: Iterable, workers: int, *given) -> Generator:
    """work(job, *given) for each job, in order, on `workers` processes, which keep what `given` learns.

    Few jobs are taken ahead. Raises what the work raises, and ChildProcessError if a process is killed. Each has a pipe
    of its own: Python's pool, with one for all, waits for ever when a process is killed amid its answer.
    """
    if workers < 2:
        yield from (work(job, *given) for job in jobs)
        return
    processes, idle, waiting = [], queue.SimpleQueue(), deque()  # type: ignore[var-annotated]

    def ask(job):
        """A thread: it sends the job to a process that has none, and waits for the answer."""
        pipe = idle.get()
        try:
            pipe.send(job)
            answer, error, trace = pipe.recv()
        except (EOFError, OSError):
            raise ChildProcessError("a process was killed, perhaps for want of memory: try --workers=1") from None
        finally:
            idle.put(pipe)
        if trace:
            raise error from RuntimeError(f"in a process of parallel:\n{trace}")
        return answer

    jobs = iter(jobs)
    first = [*itertools.islice(jobs, workers)]
    try:
        for _ in first:  # all processes before the first thread, which they must not copy
            ours, its = multiprocessing.Pipe()
            process = multiprocessing.Process(target=do_jobs, args=(its, work, *given), daemon=True)
            process.start()
            processes.append(process)
            its.close()  # else the end of the process would not be the end of its pipe
            idle.put(ours)
        with ThreadPoolExecutor(workers) as threads:
            for job in itertools.chain(first, jobs):
                waiting.append(threads.submit(ask, job))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            yield from (future.result() for future in waiting)
    finally:
        for process in processes:
            process.kill()
            process.join()


def in_groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of up to BLOCK characters; a longer text is alone."""
    group, size = [], 0
    for text in texts:
        if group and size + len(text) > BLOCK:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    yield from filter(None, [group])


# ---- pieces: `split` is the definition, `piece_ends` and `Pieces` do the same for much text in arrays

def well_formed(text: str, form: str = "") -> str:
    """The text with surrogate pairs joined and lone surrogates, which have no UTF-8, replaced by U+FFFD.

    `form` is a Unicode normal form to bring it into, such as NFC, or "".
    """
    if text.isascii():
        return text
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return unicodedata.normalize(form, text) if form else text  # type: ignore[arg-type]


@functools.lru_cache
def repeated(pattern: str) -> regex.Pattern:
    """A pattern as often as it matches in a row; its last group is empty and stands behind each match."""
    return regex.compile("(?:(?:" + pattern + ")())*+")


def cut(text: str, pattern: str) -> list[int]:
    """Where the pieces of a text end: captures of a group in one match, which is quicker than many, and timed in whole.

    ValueError if the pattern is a user's own and leaves some of the text, or takes too long.
    """
    try:
        found = repeated(pattern).match(text, timeout=10 + len(text) / 1e5)
    except (regex.error, TimeoutError) as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression, or takes too long: {error}") from None
    if found.end() < len(text):
        raise ValueError(f"pattern {pattern!r} drops text; write |(?s:.) at its end")
    return found.ends(found.re.groups)


def split(text: str, pattern: str) -> list[str]:
    """The pieces of a well-formed text.

    >>> split("Hello world's  end", PATTERNS["gpt2"])
    ['Hello', ' world', "'s", ' ', ' end']
    """
    ends = cut(text, pattern)
    return [text[start:end] for start, end in zip([0, *ends], ends)]


@functools.cache
def kinds() -> np.ndarray:
    """The kind of each character: 1 white space, 2 letter, 3 number, 0 other. Behind plane 3 all are other."""
    kind = np.zeros(0x40000, np.uint8)
    signs = "".join(map(chr, range(0x40000)))
    for number, runs in enumerate((r"\s+", r"\p{L}+", r"\p{N}+"), 1):
        for run in regex.finditer(runs, signs):
            kind[run.start():run.end()] = number
    return kind


def piece_ends(text: str, pattern: str) -> np.ndarray:
    """Where the pieces end in the UTF-8 of a text; by comparing each character with the one before if it is GPT-2's.

    >>> piece_ends("Hello wörld's  end", PATTERNS["gpt2"]).tolist()
    [5, 12, 14, 15, 19]
    """
    coding, unit = ("ascii", "u1") if text.isascii() else ("utf-32-le", "u4")
    codes = np.frombuffer(text.encode(coding), unit)
    if pattern == PATTERNS["gpt2"] and len(text) >= SHORT:
        kind = kinds().take(codes, mode="clip")
        begins = np.ones(len(codes) + 1, bool)
        begins[1:-1] = kind[1:] != kind[:-1]
        # Of white space before something else the last character stands apart, and joins what follows if it is a space.
        white = kind == 1
        last = np.flatnonzero(white[:-1] & ~white[1:])
        begins[last] = True
        begins[last[codes[last] == ord(" ")] + 1] = False
        quotes = (codes == ord("'")) & begins[:-1]
        for quote in np.flatnonzero(quotes).tolist():
            if found := CONTRACTION.match(text, quote):
                begins[quote + 1] = False
                begins[found.end()] = True
        ends = np.flatnonzero(begins)[1:]
    else:
        ends = np.array(cut(text, pattern), np.int64)
    if text.isascii():
        return ends
    sizes = np.ones(len(codes), np.int64)  # of each character in UTF-8
    for least in (0x80, 0x800, 0x10000):
        sizes += codes >= least
    return np.cumsum(sizes)[ends - 1]


class Pieces:
    """Distinct pieces of text in UTF-8, numbered in the order in which they come.

    A piece of up to 15 bytes is two numbers: `head`, its first 8 bytes, and `tail`, the others with the length above
    them. A hash of both is a slot of three arrays, where numpy finds what is known; the dictionary `number` finds the
    rest. The first piece keeps a slot, so frequent ones, which come early, have theirs.
    """

    def __init__(self):
        self.forget()

    def forget(self) -> None:
        """Begin anew: to be called between texts when it is `full`, which bounds memory."""
        self.number = {}  # piece -> its number
        self.head, self.tail, self.found = np.zeros((3, 1 << SLOTS), np.uint64)
        self.full = False

    def numbers(self, texts: list[str], pattern: str) -> tuple[np.ndarray, list[int]]:
        """The number of each piece of well-formed texts in order, and how many pieces each text has."""
        ends = [piece_ends(text, pattern) for text in texts]
        data = "".join(texts).encode()
        counts = list(map(len, ends))
        offsets = np.cumsum([0, *(end.max(initial=0) for end in ends)])[:-1]
        ends = np.concatenate(ends) + offsets.repeat(counts)
        starts = np.append(0, ends)[:-1]
        at = np.ndarray(len(data) + 9, "<u8", data + bytes(16), 0, (1,))  # the 8 bytes from each place on
        which = np.empty(len(ends), np.int64)
        for begin in range(0, len(ends), CHUNK):  # what is learnt serves the next ones
            span = slice(begin, begin + CHUNK)
            which[span] = self._look_up(data, at, starts[span], ends[span])
        self.full = len(self.number) > CACHE or (ends - starts).max(initial=0) > 1024
        return which, counts

    def _look_up(self, data, at, starts, ends):
        size = np.minimum(ends - starts, 16)
        head = at[starts] & LOWEST[size]
        tail = size.astype(np.uint64) << 56
        long = np.flatnonzero(size > 8)
        tail[long] |= at[starts[long] + 8] & LOWEST[size[long] - 8]
        slot = ((head ^ tail * HASH) * HASH >> 64 - SLOTS).astype(np.int64)
        found = self.found[slot].astype(np.int64)
        other = (self.head[slot] != head) | (self.tail[slot] != tail)
        missing = np.flatnonzero(other)
        number = self.number
        bounds = zip(starts[missing].tolist(), ends[missing].tolist())
        found[missing] = [number.setdefault(data[start:end], len(number)) for start, end in bounds]
        empty = self.tail[slot] == 0
        free = np.flatnonzero(other & empty & (size < 16))
        for column, values in (self.head, head), (self.tail, tail), (self.found, found):
            column[slot[free]] = values[free]
        return found


def stretches(flat: np.ndarray, sizes: np.ndarray, which: np.ndarray) -> np.ndarray:
    """`flat` is cut into stretches of the given sizes; join those of the numbers in `which`.

    >>> stretches(np.array([10, 20, 21, 30]), np.array([1, 2, 1]), np.array([1, 0, 1])).tolist()
    [20, 21, 10, 20, 21]
    """
    ends, lengths = np.cumsum(sizes), sizes[which]
    shift = ends[which] - np.cumsum(lengths)
    return flat[np.arange(lengths.sum()) + shift.repeat(lengths)]


# ---- training: from counted pieces to a vocabulary

def count_pieces(text: str, pattern: str, special_tokens: list, longest: int, seen: Pieces) -> Counter:
    """How often each piece occurs in a text, those of more than `longest` bytes all as b"" (0: any may be longer).

    Special tokens are boundaries and not counted.
    """
    texts = regex.split(any_of(special_tokens), well_formed(text))
    if seen.full:
        seen.forget()
    which, _ = seen.numbers(texts, pattern)
    counts = Counter()
    for piece, times in zip(seen.number, np.bincount(which).tolist()):
        if times:
            counts[b"" if 0 < longest < len(piece) else piece] += times
    return counts


def train_lookup(counts: Counter, size: int) -> tuple:
    """Characters or words: the `size` most frequent pieces are the vocabulary, equal ones in alphabetical order.

    >>> train_lookup(Counter(b"the cat in the hat".split()), 3)
    ([b'the', b'cat', b'hat'], [])
    """
    return sorted(counts, key=lambda piece: (-counts[piece], piece))[:size], []


# Tokens stand at the places of their bytes: first[i] is the token that begins at i, last[i] the one that ends there,
# both -1 between two pieces; inside a token first is -1, and last is not asked. So the neighbours of a token are
# last[i - 1] and first[i + length]. A pair is one number, left << 32 | right.
def pairs_at(places: np.ndarray, first: np.ndarray, length: np.ndarray) -> tuple:
    """The distinct pairs of neighbours that begin at some places, the places in their order, where each pair starts."""
    left = first[places]
    pairs = left << 32 | first[places + length[left]]
    order = pairs.argsort()[np.count_nonzero(pairs < 0):]  # without those that have no right
    pairs, places = pairs[order], places[order]
    starts = np.flatnonzero(np.append(-1, pairs)[:-1] != pairs)
    return pairs[starts].tolist(), places, starts


def every_other(places: np.ndarray, size: int) -> np.ndarray:
    """Of places that are `size` apart, and so overlap as pairs of one token do, the first, third and so on.

    >>> every_other(np.array([0, 1, 2, 3, 7, 9, 10]), 1).tolist()
    [0, 2, 7, 9]
    """
    order = np.arange(len(places))
    gaps = places[1:] - places[:-1]
    alone = np.append(True, gaps != size)[:len(places)]
    return places[(order - np.maximum.accumulate(order * alone)) % 2 == 0]


# A pair gets all its places when the newer of its tokens is made, and later only loses some. So what the queue says of
# it may be too cheap, and a pair that lost places is priced again before it is merged. Pairs dearer than `limit` wait
# outside: when no cheaper one is left, the limit rises and all pairs are looked up anew, about ten times in all.
# Of equally cheap pairs those that share no token with another one are merged in one step, the greatest names first. A
# pair with a new token costs as much only if a pair of the same cost shares a token with the one that made it.
def merge_row(pieces: list[bytes], byte_ids: Sequence[int], length: np.ndarray,
              price: Callable, name: Callable, make: Callable) -> np.ndarray:
    """Merge pairs of neighbours in all pieces, the cheapest first: BPE in training and in encoding. Returns `first`.

    price(pairs, places, starts), of what `pairs_at` gives, is a negative cost for each pair, or 0 if it is never
    merged. Of equally cheap pairs the one with the greatest name(pair) comes first. make(pair, cost) gives the id of
    the token that it becomes, of length[id] bytes; None: it is enough.
    """
    data = np.frombuffer(b"\0".join([*pieces, b""]), np.uint8)
    first = np.array(byte_ids)[data]
    first[np.cumsum([len(piece) + 1 for piece in pieces]) - 1] = -1
    last = first.copy()
    places = np.flatnonzero(first >= 0)
    queue = defaultdict(list)  # cost -> [(name, pair, places)]
    ready, limit = [], 0  # those of the lowest cost
    while True:
        pairs, places, starts = pairs_at(places, first, length)
        costs = price(pairs, places, starts)
        limit = limit or min(-1, costs.min(initial=0) // 4)
        ends = np.append(starts[1:], len(places))
        for i in np.flatnonzero(costs <= limit).tolist():
            pair, found = pairs[i], places[starts[i]:ends[i]]
            queue[int(costs[i])].append((name(pair), pair, found))
        merged = []
        while (ready or queue) and not merged:
            if not ready:
                lowest, lefts, rights = min(queue), set(), set()
            if lowest in queue:
                lefts.update(pair >> 32 for _, pair, _ in queue[lowest])
                rights.update(pair & LOW for _, pair, _ in queue[lowest])
                ready = sorted(ready + queue.pop(lowest))
            alone = True
            while ready and alone:
                label, pair, places = ready.pop()
                left, right = pair >> 32, pair & LOW
                there = (first[places] == left) & (first[places + length[left]] == right)
                places = places[there]
                if not there.all() and (cost := int(price([pair], places, [0]).sum())) > lowest:
                    if cost <= limit:
                        queue[cost].append((label, pair, places))
                    continue
                if left == right:
                    places = every_other(np.sort(places), length[left])
                if (new := make(pair, lowest)) is None:
                    return first
                if not merged:
                    oldest = new
                first[places + length[left]] = -1
                first[places] = last[places + length[new] - 1] = new
                merged.append(places)
                alone = left not in rights and right not in lefts
        if merged:
            places = np.concatenate(merged)
            before = last[places - 1]
            older = (before >= 0) & (before < oldest)  # the others are among the places already
            places = np.concatenate((places, (places - length[before])[older]))
        elif limit == -1:
            return first
        else:
            limit, places = 0, np.flatnonzero(first >= 0)


def train_bpe(counts: Counter, size: int, trace: bool = False) -> tuple:
    """Byte pair encoding: from the 256 bytes on, make the most frequent pair of neighbours a token, until `size`.

    Of equally frequent pairs the greatest wins, (left, right) compared as byte strings. "aaa" has (a, a) twice.

    >>> train_bpe(Counter({b"the": 2, b" cat": 1, b" in": 1, b" the": 1, b" hat": 1}), 260)[1]
    [(b't', b'h'), (b'th', b'e'), (b'a', b't'), (b'i', b'n')]
    """
    vocab, merges = [bytes([byte]) for byte in range(256)], []
    sizes = [len(piece) + 1 for piece in counts]
    weight = np.fromiter(counts.values(), np.int64).repeat(sizes)
    length = np.ones(max(size, 256), np.int64)

    def price(pairs, places, starts):
        return -np.add.reduceat(weight[places], starts) if len(places) else weight[places]

    def name(pair):
        return vocab[pair >> 32], vocab[pair & LOW]

    def make(pair, cost):
        if len(vocab) < size:
            merges.append(name(pair))
            vocab.append(b"".join(merges[-1]))
            length[len(vocab) - 1] = len(vocab[-1])
            if trace:
                print(f"{len(vocab) - 1:6} {merges[-1][0]!r} + {merges[-1][1]!r}, {-cost:,} times")
            return len(vocab) - 1

    merge_row(list(counts), range(256), length, price, name, make)
    return vocab, merges


# What a kind of tokenizer learns from counted pieces: (counts, size without special tokens) -> (vocabulary, merges).
TRAINERS = {"bpe": train_bpe, "char": train_lookup, "word": train_lookup,
            "byte": lambda counts, size: train_bpe(counts, 256)}
BYTE_KINDS = ("bpe", "byte")  # they can write any text; the others need <|unk|>


def train(
    kind: str,
    documents: Iterable[str],
    vocab_size: int,
    pattern: str = "gpt2",
    special_tokens: list | tuple = (END,),
    workers: int = 0,
    counts: Counter | None = None,
    min_count: int = 1,
    max_chunk_bytes: int = 0,
) -> "Tokenizer":
    """Train a tokenizer of a kind of TRAINERS; the same for any number of `workers` (0: one for each core).

    `vocab_size` counts the special tokens, which get the last ids. <|endoftext|> is added where it is missing, and
    <|unk|> for char and word. `pattern` is a name of PATTERNS or a regular expression; char has its own. A Counter
    given as `counts` is filled with the pieces of the documents, except those that are rarer than `min_count` or longer
    than `max_chunk_bytes`.
    """
    if kind not in TRAINERS:
        raise ValueError(f"there is no tokenizer {kind!r}; kinds are {', '.join(TRAINERS)}")
    names = [UNKNOWN] * (kind not in BYTE_KINDS) + [*special_tokens]
    names += [END] * (END not in special_tokens)
    if len(set(names)) < len(names) or any(name.split() != [name] for name in names):
        raise ValueError(f"special tokens must be different, not empty and without white space, unlike {names}")
    if vocab_size < (least := len(names) + (256 if kind in BYTE_KINDS else 1)):
        raise ValueError(f"vocab_size={vocab_size} is too small: {kind} with {len(names)} special tokens needs {least}")
    pattern = PATTERNS.get("char" if kind == "char" else pattern, pattern)
    counts = Counter() if counts is None else counts
    texts = chunks((text + END for text in documents), pattern, BLOCK, END)
    given = pattern, names, max_chunk_bytes, Pieces()
    for part in parallel(count_pieces, texts, workers or os.cpu_count() or 1, *given):
        counts.update(part)
    left_out = [piece for piece, number in counts.items() if not piece or number < min_count]
    if left_out:
        print(f"left out of training: {len(left_out):,} of {len(counts):,} distinct pieces", file=sys.stderr)
    for piece in left_out:
        del counts[piece]
    if not counts:
        raise ValueError("there is no text to train on, or all of it is left out")
    vocab, merges = TRAINERS[kind](counts, vocab_size - len(names))
    specials = {name: i for i, name in enumerate(names, len(vocab))}
    if kind == "bpe" and len(vocab) + len(names) < vocab_size:
        print(f"stopped at {len(vocab) + len(names)} tokens: no pair is left to merge in this text", file=sys.stderr)
    return Tokenizer(kind, pattern, vocab + list(map(str.encode, names)), merges, specials)


# ---- the tokenizer

class Tokenizer:
    """Text to ids and back; characters, bytes, words and BPE fill the same columns.

    kind: a key of TRAINERS; pattern: regular expression that cuts text into pieces; vocab: id -> bytes; merges: pairs
    of byte strings, in the order of the ids they make; special_tokens: name -> id; form: a Unicode normal form that
    text is brought into first, for tokenizers of others that do so. A piece that is a token is encoded
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

    def __init__(
        self,
        kind: str,
        pattern: str,
        vocab: list,
        merges: list,
        special_tokens: dict,
        form: str = "",
    ):
        self.kind = kind
        self.pattern = pattern
        self.form = form
        self.vocab = vocab
        self.vocab_size = len(vocab)
        self.merges = merges
        self.special_tokens = special_tokens
        special_ids = special_tokens.values()
        self.index = index = {token: i for i, token in enumerate(vocab) if i not in special_ids}
        right = [vocab[i] for i in special_ids] == list(map(str.encode, special_tokens))
        if not right or len(index) + len(special_tokens) != len(vocab):
            raise ValueError("two tokens are the same, or a special token is not in its place")
        self.byte_ids = [index.get(bytes([byte])) for byte in range(256)]
        self.unknown = special_tokens[UNKNOWN] if None in self.byte_ids else None
        self.pairs = {(index[left], index[right]): index[left + right] for left, right in merges}
        made = list(self.pairs.values())
        whole = len(self.pairs) == len(merges) and len(set(made)) == len(index) - 256
        ordered = made == sorted(made) and all(max(pair) < new for pair, new in self.pairs.items())
        if not ordered or not whole and self.unknown is None:
            raise ValueError("a merge is missing, comes twice, or comes before its parts")
        keys = {left << 32 | right: new for (left, right), new in self.pairs.items()}
        self.sorted_pairs = np.array([*sorted(keys), 1 << 62])  # the last one is none
        self.made = np.array([*map(keys.get, sorted(keys)), 0])
        self.dtype = np.dtype(np.uint16 if len(vocab) <= 1 << 16 else np.uint32)
        self.length = np.array(list(map(len, vocab)))
        self.flat = np.frombuffer(b"".join(vocab), np.uint8)
        self.cache = {}  # piece -> ids, of short texts
        self._forget()

    def encode(self, text: str, allowed_special: str | set = "none") -> list[int]:
        """Ids of a text. What looks like a special token in it is ordinary text ("none"), an error ("none_raise"), or
        one id if it is allowed ("all", or a set of names); the longest is taken where one begins with another."""
        names, ids = self.special_tokens, []
        if allowed_special == "none_raise" and regex.search(any_of(names), text):
            raise ValueError("the text holds a special token, which is not allowed here")
        allowed = names if allowed_special == "all" else () if isinstance(allowed_special, str) else allowed_special
        found = any_of(names.keys() & allowed)
        for i, part in enumerate(regex.split(f"({found})", text) if found else [text]):
            if i % 2:
                ids.append(names[part])
            else:
                ids += self._encode_short(part) if len(part) < SHORT else self.encode_ordinary(part).tolist()
        return ids

    def _encode_short(self, text):
        """The simple way, and what `encode_together` must equal: cut into pieces, look each up or merge its bytes."""
        ids = []
        if len(self.cache) > CACHE:
            self.cache.clear()
        for piece in split(well_formed(text, self.form), self.pattern):
            if piece not in self.cache:
                self.cache[piece] = self._ids(piece.encode())
            ids += self.cache[piece]
        return ids

    def encode_ordinary(self, text: str) -> np.ndarray:
        """Ids of a text, special tokens in it as ordinary text: uint16, or uint32 for more than 65,536 tokens."""
        if len(text) < SHORT:
            return np.array(self._encode_short(text), self.dtype)
        blocks = chunks([text], self.pattern, BLOCK)
        return np.concatenate([self.encode_together([block])[0] for block in blocks])

    def _forget(self):
        self.seen = Pieces()  # of much text
        self.ids = np.empty(0, self.dtype)  # those of the first piece, of the second, ...
        self.sizes = np.empty(0, np.int64)  # how many each has

    def encode_together(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, as of `encode_ordinary`; each distinct piece of them all is looked up once."""
        if self.seen.full:
            self._forget()
        texts = [well_formed(text, self.form) for text in texts]
        which, counts = self.seen.numbers(texts, self.pattern)
        new = self.ids_of(list(itertools.islice(self.seen.number, len(self.sizes), None)))
        ids = np.frombuffer(b"".join(new), self.dtype)
        sizes = np.array(list(map(len, new)), np.int64)
        self.ids = np.append(self.ids, ids)
        self.sizes = np.append(self.sizes, sizes // ids.itemsize)
        ids = stretches(self.ids, self.sizes, which)
        ends = np.append(0, np.cumsum(self.sizes[which]))
        return np.split(ids, ends[np.cumsum(counts)[:-1]])

    def encode_batch(self, texts: Iterable[str], workers: int = 0) -> list[np.ndarray]:
        """Ids of each text, as of `encode_ordinary`; much text on several processes (0: one for each core)."""
        groups = list(in_groups(texts))
        workers = min(workers or os.cpu_count() or 1, len(groups))
        return list(itertools.chain.from_iterable(parallel(self.encode_group, groups, workers)))

    def encode_group(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text of a list of `in_groups`."""
        if len(texts) > 1:
            return self.encode_together(texts)
        return [self.encode_ordinary(texts[0])]

    def encode_file(self, path: str | Path, workers: int = 0) -> Iterator[np.ndarray]:
        """Ids of a text file, some at a time; memory holds a few blocks of text, and not the file."""
        texts = (text for text, _ in read_parts([Path(path)], "", {}))
        blocks = chunks(texts, self.pattern, BLOCK)
        yield from parallel(self.encode_ordinary, blocks, workers or os.cpu_count() or 1)

    def encode_iterable(self, parts: Iterable[str]) -> Iterator[int]:
        """Ids of a text that comes in parts: lazily, and those of the whole text, wherever it was cut.

        Memory follows the longest stretch without a place to cut (see `chunks`); with a pattern of the user's own it
        follows the whole text.
        """
        for chunk in chunks(parts, self.pattern):
            yield from self.encode_ordinary(chunk).tolist()

    def ids_of(self, pieces: list[bytes]) -> list[bytes]:
        """The ids of distinct pieces, each as the bytes of an array."""
        merged = [piece for piece in pieces if len(piece) <= LONG and piece not in self.index]
        known = {}
        if len(merged) > MANY and self.unknown is None:
            known = dict(zip(merged, self._merge_together(merged)))
        return [known.get(piece) or array(self.dtype.char, self._ids(piece)).tobytes() for piece in pieces]

    def _ids(self, data):
        """Ids of one piece: a token's own, <|unk|>, or what merging leaves of the bytes.

        Merged is the pair that makes the lowest id, of several the first one, until no pair makes any: in this order
        training made them. For a long piece `merge_row` does that without looking at all pairs each time.
        """
        if data in self.index or self.unknown is not None:
            return [self.index.get(data, self.unknown)]
        get, never = self.pairs.get, self.vocab_size
        if len(data) > LONG:
            def make(pair, cost):
                return cost + never
            row = merge_row([data], self.byte_ids, self.length, self._costs, int, make)
            return row[row >= 0].tolist()
        ids = [self.byte_ids[byte] for byte in data]
        while made := [get(pair, never) for pair in zip(ids, ids[1:])]:
            if (new := min(made)) == never:
                break
            i = made.index(new)
            ids[i:i + 2] = [new]
        return ids

    def _merge_together(self, pieces):
        """The same for many short pieces, as bytes of arrays: in each round every piece merges its cheapest pair."""
        data = np.frombuffer(b"".join(pieces), np.uint8)
        ids = np.array(self.byte_ids)[data]
        piece = np.arange(len(pieces)).repeat(list(map(len, pieces)))
        done, never = [], self.vocab_size
        cost = np.full(len(ids), never)  # of each id with the next one of its piece
        changed = np.arange(len(ids))
        while len(ids):
            changed = changed[piece[changed] == np.append(piece, -1)[changed + 1]]
            cost[changed] = self._costs(ids[changed] << 32 | ids[changed + 1]) + never
            starts = np.flatnonzero(np.append(True, piece[1:] != piece[:-1]))
            sizes = np.diff(np.append(starts, len(ids)))
            lowest = np.minimum.reduceat(cost, starts).repeat(sizes)
            more = lowest < never
            done.append((ids[~more], piece[~more]))
            places = every_other(np.flatnonzero((cost == lowest) & more), 1)
            ids[places] = cost[places]
            cost[places] = never
            more[places + 1] = False
            changed = (np.cumsum(more) - 1)[places]
            changed = np.concatenate((changed, changed[changed > 0] - 1))
            ids, piece, cost = ids[more], piece[more], cost[more]
        ids, piece = map(np.concatenate, zip(*done))
        ids = ids[piece.argsort(kind="stable")].astype(self.dtype)
        ends = np.cumsum(np.bincount(piece))
        return [part.tobytes() for part in np.split(ids, ends[:-1])]

    def _costs(self, pairs, *_):
        """Of each pair, as merge_row has them, the id that it makes, less the size of the vocabulary"""
        at = np.searchsorted(self.sorted_pairs, pairs)
        known = self.sorted_pairs[at] == pairs
        return np.where(known, self.made[at] - self.vocab_size, 0)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of tokens; ValueError names an id that is not in the vocabulary."""
        ids = ids if isinstance(ids, Sized) else list(ids)
        if len(ids) < MANY and all(0 <= i < self.vocab_size for i in ids):
            return b"".join([self.vocab[i] for i in ids])
        ids = np.asarray(ids)
        if len(wrong := ids[(ids < 0) | (ids >= self.vocab_size)]):
            raise ValueError(f"id {wrong[0]} is not in this vocabulary of {self.vocab_size} tokens")
        starts = range(0, len(ids), CHUNK)
        parts = (stretches(self.flat, self.length, ids[start:start + CHUNK]) for start in starts)
        return b"".join(map(np.ndarray.tobytes, parts))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def to_dict(self) -> dict:
        """What `save` writes. Tokens are written as Latin-1, in which character n is byte n; merges as pairs of ids."""
        out = {"version": 1, "kind": self.kind, "pattern": self.pattern, "special_tokens": self.special_tokens}
        out["merges"] = list(map(list, self.pairs))
        out["vocab"] = [token.decode("latin-1") for token in self.vocab]
        return out | ({"form": self.form} if self.form else {})

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as JSON, for `load`; to a path in .tiktoken its ranks, as tiktoken reads them."""
        content = json.dumps(self.to_dict()).encode()
        if Path(path).suffix == ".tiktoken":
            if self.unknown is not None:
                raise ValueError(f"{path}: a .tiktoken file holds byte-level tokens alone, not those of {self.kind}")
            lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in self.index.items())
            content = b"".join(lines)
            with contextlib.suppress(ValueError):  # special tokens stand in front: `load` refuses it by itself
                again = from_ranks(content)
                if (again.pattern, again.special_tokens) != (self.pattern, self.special_tokens):
                    print(f"{path} holds ranks alone: bpe.py reads it with another pattern or other special tokens",
                          file=sys.stderr)
        with replacing(path) as file:
            file.write(content)


# ---- reading tokenizers: each reader gives what the class asks for

# GPT-2 writes a byte as a letter: itself where that is a visible sign, else the next one from U+0100 on.
HIDDEN = [*range(33), *range(127, 161), 173]
LETTERS = {256 + i: byte for i, byte in enumerate(HIDDEN)}


def from_dict(data: dict, source: object = "this") -> Tokenizer:
    """The tokenizer that `to_dict` wrote; ValueError, which names the source, if the data are not whole."""
    with blaming(f"{source} is not a tokenizer of bpe.py, or a damaged one"):
        if data["version"] != 1:
            raise ValueError(f"version {data['version']!r} of the format; this program reads 1")
        vocab = [token.encode("latin-1") for token in data["vocab"]]
        merges = [(vocab[left], vocab[right]) for left, right in data["merges"]]
        split("Aé1 .\nx\t 's_\n", data["pattern"])  # drops nothing
        specials, form = data["special_tokens"], data.get("form", "")
        return Tokenizer(data["kind"], data["pattern"], vocab, merges, specials, form)


def from_letters(ids: dict, merges: Iterable, specials: dict, pattern: str, form: str = "") -> Tokenizer:
    """A byte-level tokenizer of others: ids of tokens, and merges, both written in GPT-2's letters."""
    def read(token):
        return token.translate(LETTERS).encode("latin-1")

    tokens = {i: name.encode() for name, i in specials.items()}
    tokens |= {i: read(token) for token, i in ids.items() if i not in tokens}
    vocab = [tokens[i] for i in range(len(tokens))]
    # Llama 3 lists each way to cut a token in two; those with a newer part are never met.
    pairs = [(read(left), read(right)) for left, right in merges
             if max(ids[left], ids[right]) < ids[left + right]]
    return Tokenizer("bpe", pattern, vocab, pairs, specials, form)


def from_hugging_face(data: dict) -> Tokenizer:
    """The tokenizer of a tokenizer.json of the library `tokenizers`; ValueError names what is not byte-level BPE."""
    model, steps = data["model"], data["pre_tokenizer"] or {"type": "no pre_tokenizer"}
    steps = steps.get("pretokenizers", [steps])
    split, byte_level = [{}, *steps][-2:]
    cuts = [step["type"] for step in steps] + ["use_regex"] * byte_level.get("use_regex", True)
    usual = cuts in (["ByteLevel", "use_regex"], ["ByteLevel"], ["Split", "ByteLevel"])  # text is cut once
    lacking = [] if usual else cuts
    lacking += [name for name in ("byte_fallback", "dropout", "end_of_word_suffix") if model.get(name)]
    lacking += [name for name in ("lstrip", "rstrip", "single_word") if any(t.get(name) for t in data["added_tokens"])]
    way = split.get("behavior", "Isolated"), split.get("invert", False)  # both keep all of the text, match by match
    lacking += [f"behavior={way[0]}"] * (way not in (("Isolated", False), ("Removed", True)))
    form = (data.get("normalizer") or {"type": ""})["type"]
    lacking += [name for name in (form, model["type"]) if name not in ("", "NFC", "BPE")]
    if lacking or byte_level.get("add_prefix_space"):
        raise ValueError(f"it is more than byte-level BPE: {', '.join(lacking) or 'add_prefix_space'}")
    pattern = split["pattern"]["Regex"] if split else PATTERNS["gpt2" if "use_regex" in cuts else "bytes"]
    specials = {token["content"]: token["id"] for token in data["added_tokens"]}
    merges = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    return from_letters(model["vocab"], merges, specials, pattern, form)


def from_ranks(lines: bytes) -> Tokenizer:
    """The tokenizer of a .tiktoken file, which holds tokens and their ranks alone.

    The pattern follows from their number, <|endoftext|> gets the first free id, and a token's merge joins the two parts
    that the merges before it make of its bytes.
    """
    rows = map(bytes.split, lines.splitlines())
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
    size = len(ranks)

    def halves(token):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            made = [ranks.get(left + right, size) for left, right in zip(parts, parts[1:])]
            i = made.index(min(made))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        return tuple(parts)

    merges = [halves(token) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    free = min({*range(size + 1)}.difference(ranks.values()))
    ranks[END.encode()] = free
    if max(ranks.values()) >= len(ranks):
        raise ValueError("several ids are missing: special tokens, of which it has no names, stood before others")
    pattern = "gpt2" if size < 60_000 else "gpt4" if size < 150_000 else "o200k"
    return Tokenizer("bpe", PATTERNS[pattern], sorted(ranks, key=ranks.__getitem__), merges, {END: free})


def load(path: str | Path) -> Tokenizer:
    """Read what `save` wrote, a tokenizer.json of Hugging Face, a .tiktoken file, or a folder with tokenizer.json, or
    with vocab.json and merges.txt alone.

    ValueError says what is wrong with the file.
    """
    path = Path(path)
    with blaming(f"{path} is not a tokenizer that bpe.py can read, or a damaged one"):
        if path.suffix == ".tiktoken":
            return from_ranks(path.read_bytes())
        if (path / "merges.txt").exists() and not (path / "tokenizer.json").exists():  # which also has the pattern
            ids = json.loads((path / "vocab.json").read_bytes())
            lines = (path / "merges.txt").read_text("utf-8").split("\n")
            merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
            made = {"".join(merge) for merge in merges}
            specials = {token: i for token, i in ids.items() if len(token) > 1 and token not in made}
            return from_letters(ids, merges, specials, PATTERNS["gpt2"])
        data = json.loads((path / "tokenizer.json" if path.is_dir() else path).read_bytes())
        return from_hugging_face(data) if "model" in data else from_dict(data)


# ---- seeing

def visible(token: bytes) -> str:
    """A token for the eye: spaces as dots, control characters and bytes that are not UTF-8 with a backslash."""
    return repr(token.decode("utf-8", "backslashreplace"))[1:-1].replace(" ", "\u00b7")


def show(tokenizer: Tokenizer, text: str) -> None:
    """Print each token of a text, with its id, and a bar behind the last one of each piece.

    On a terminal the tokens are coloured in turn; a file or a pipe gets no codes of colours. Without all bytes each
    token is a piece, and <|unk|> does not tell how long it is.
    """
    ends = piece_ends(well_formed(text, tokenizer.form), tokenizer.pattern).tolist()
    at, coloured = 0, sys.stdout.isatty()
    for number, i in enumerate(tokenizer.encode(text, "all")):
        token = tokenizer.vocab[i]
        at += len(token)
        shown = visible(token)
        if coloured:
            shown = f"\x1b[3{1 + number % 6}m{shown}\x1b[0m"
        print(f"{i:7} {shown}{' |' * (at in ends or tokenizer.unknown is not None)}")


def compare(o: Options) -> None:
    """Print for each of some tokenizers what it makes of the input, and what its embedding costs."""
    parts = read_parts(find_files(o.input), o.separator, {})
    text = "".join(part for part, _ in parts)
    size = len(text.encode())
    if not size:
        raise ValueError(f"there is no text in --input={o.input} to compare tokenizers on")
    words = len(regex.findall(r"\w+", text))
    print(f"{size:,} bytes, {words:,} words; unk: bytes that it hides\n"
          "embed: parameters of the embedding at width 768; s: of encoding\n"
          "tokenizer       tokens   embed byte/token token/word unused   unk     s longest")
    for name in o.compare.split(","):
        kind = "bpe" if name.isdigit() else name
        wanted = int(name) if name.isdigit() else o.vocab_size
        if kind in TRAINERS:
            tokenizer = train(kind, [text], wanted, o.pattern, workers=o.workers)
        else:
            tokenizer = load(name)
        began = time.perf_counter()
        ids = tokenizer.encode_ordinary(text)
        seconds = time.perf_counter() - began
        known = ids if tokenizer.unknown is None else ids[ids != tokenizer.unknown]
        hidden = size - tokenizer.length[known].sum()
        longest = sorted(tokenizer.index, key=len)[-1]
        print(f"{name[-14:]:14}{tokenizer.vocab_size:8,}{tokenizer.vocab_size * 768 / 1e6:7.1f}M"
              f"{size / len(ids):11.3f}{len(ids) / max(1, words):11.3f}"
              f"{1 - len(np.unique(ids)) / tokenizer.vocab_size:7.1%}"
              f"{hidden / size:6.1%}{seconds:6.2f} {visible(longest)[:8]}")


def train_on_files(o: Options) -> Tokenizer:
    """Train as the options say, save, and print the compression ratio."""
    os.stat(Path(o.output).parent)  # a missing folder is told before the work
    counts, errors = Counter(), {}
    parts = read_parts(find_files(o.input), o.separator, errors)
    # Joined by special tokens, which are boundaries, documents of any length can be cut to chunks.
    pattern = PATTERNS.get(o.pattern, o.pattern)
    texts = chunks((text + END * ends for text, ends in parts), pattern, BLOCK, END)
    specials = o.special_tokens.split(",")
    tokenizer = train(
        o.tokenizer,
        texts,
        o.vocab_size,
        o.pattern,
        specials,
        o.workers,
        counts,
        o.min_count, o.max_chunk_bytes)
    tokenizer.save(o.output)
    train_bpe(counts, 256 + min(o.trace, len(tokenizer.merges)), trace=True)  # the first ones once more
    if errors:
        print(f"{sum(errors.values())} errors in UTF-8, replaced by U+FFFD: {', '.join(errors)}", file=sys.stderr)
    size = sum(len(piece) * number for piece, number in counts.items())
    known = zip(tokenizer.ids_of(list(counts)), counts.values())
    tokens = sum(len(ids) * number for ids, number in known) // tokenizer.dtype.itemsize
    print(f"{o.output}: {size:,} bytes in {tokens:,} tokens: {size / tokens:.3f} bytes per token")
    return tokenizer


def main():
    o = options(Options, sys.argv[1:])
    if o.compare:
        return compare(o)
    tokenizer = train_on_files(o) if o.tokenizer in TRAINERS else load(o.tokenizer)
    used = "tokenizer", "show", "dump", "workers"
    idle = [name for name, value in vars(o).items() if name not in used and value != getattr(Options, name)]
    if idle and o.tokenizer not in TRAINERS:
        raise ValueError(f"--{idle[0]} is of training, and --tokenizer={o.tokenizer} is trained already; "
                         f"--input=TEXT --compare={o.tokenizer} tells what it makes of a text")
    show(tokenizer, o.show)
    if o.dump:
        with replacing(o.dump) as file:
            file.writelines(f"{i}\t{visible(token)}\n".encode() for i, token in enumerate(tokenizer.vocab))


if __name__ == "__main__":
    run(main)
