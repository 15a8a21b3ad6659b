"""Web pages and text become tokens: extracted, held out by document, encoded.

Reads:  --input: text files, .jsonl files (field "text" or "messages"), these
        packed (.gz), folders; without it the text of Python's standard library.
        With --steps=extract,... also .html, .pdf, .warc, .warc.wet, packed too
        (.gz, .bz2, .xz, .zst); other steps take pages with their markup.
Writes: --output, a folder: train.npy and val.npy (1-D, uint16 or uint32; every
        document ends with <|endoftext|>), tokenizer.json, manifest.json; with
        other steps documents.jsonl, removed.jsonl, contamination.json; with
        --mix mix.json and the logs of its runs
Usage:  python data.py --input=stories.txt --separator="<|endoftext|>"
        python data.py --input=crawl.warc.gz --steps=extract,length,tokenise
        python data.py --input=sharegpt.jsonl --steps=chat,exact --output=chats
        python data.py --mix=a,b,c --eval_data=target --output=mix
        python data.py --train_language=languages.json
        (also --train_classifier, --train_ngrams)

The input may be larger than memory: each pass (extract, split, train the
tokenizer, encode) streams it. A second run with the same input and options
reuses the files. Documents are held out by a hash of their content, so that
equal ones are never on both sides; of fewer than 20 documents the last tenth
of the text.
"""
import argparse
import array
import bz2
import codecs
import contextlib
import csv
import dataclasses
import difflib
import gzip
import hashlib
import heapq
import html
import http.client
import importlib
import inspect
import ipaddress
import itertools
import json
import lzma
import math
import os
import pkgutil
import pydoc
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
import urllib.request
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache, partial, partialmethod
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import numpy as np

import bpe

PIECE = 1 << 20  # characters of the longest piece of a document
PAGES = re.compile(r"\.(html?|pdf|warc|warc\.wet)(\.(gz|bz2|xz|zst))?$", re.I)  # the files that the step extract is for
JOB = 1 << 22  # characters that a process encodes, bytes of documents in a part: bounds memory
HEADER = 128  # bytes before the tokens of a token file
FEW = 20  # fewer documents than this are too few to hold out whole ones
FREE = {"input", "output", "workers", "shard", "merge", "report", "look"}  # options that change no file


@dataclasses.dataclass
class Options:
    input: str = ""  # files and folders, a comma list; empty: the text of the standard library
    output: str = "data"  # folder for the token files; of --train_...: a file .npz
    tokenizer: str = "bpe"  # a file, or a kind to train on the training part: bpe, char, byte, word
    vocab_size: int = 8192  # tokens of a tokenizer that is trained here
    pattern: str = "gpt2"  # how a tokenizer that is trained here cuts text before merging
    separator: str = ""  # text between the documents of a file, such as <|endoftext|>; empty: a file is a document
    val_fraction: float = 0.02  # share of the documents that is held out for validation
    workers: int = 0  # processes; 0: one per core
    seed: int = 0  # another seed holds out other documents
    shuffle: bool = False  # token files have their documents in an order drawn by the seed, else in that of the input
    steps: str = "tokenise"  # in this order, such as extract,length,pii,dedup,tokenise (a wrong name lists all)
    language: str = ""  # codes that the step language keeps, such as en,de; empty: all
    quality: str = "quality.npz"  # classifier of the step quality
    min_quality: float = 0.5  # probability of the positive kind that the step quality asks for
    harmful: str = "harmful.npz"  # classifier of the step harmful, its positive kind being harmful text
    max_harmful: float = 0.5  # probability of that kind that the step harmful lets pass
    ngrams: str = "ngrams.npz"  # model of the step perplexity
    max_bits: float = 4.0  # bits a byte that the step perplexity lets pass
    train_language: str = ""  # train language.npz on FILE.json {code: [texts]} or a folder of code.txt
    train_classifier: bool = False  # train quality.npz on --positive and --negative
    positive: str = ""  # files and folders of the texts to keep
    negative: str = ""  # files and folders of the texts to tell from them
    train_ngrams: str = ""  # train ngrams.npz on text; for a folder of token files: their bits per byte
    shard: str = ""  # i/n: do every n-th part of the input, one machine of n on one folder; then --merge
    merge: bool = False  # go on behind what the shards have done
    threshold: float = 0.8  # dedup: Jaccard similarity of the word 5-grams from which documents are copies
    false_positives: float = 1e-6  # urls, exact, lines: share of the new that is taken for seen
    eval_data: str = ""  # decontaminate: files and folders of evaluation sets (jsonl, json, csv, txt), a comma list
    mix: str = ""  # folders of token files: write OUTPUT/mix.json, shares of them for train.py --mix
    temperature: float = 0.0  # mix: shares by tokens^(1/temperature); 0: learnt from runs of train.py
    runs: int = 32  # mix: so many, on random mixtures
    train: str = ""  # mix: options of these runs, such as "--n_layer=1 --max_iters=100"
    max_document_bytes: int = 100000000  # longer documents are dropped
    report: str = ""  # write a page about what each step removed, such as report.html
    crawl: str = ""  # write a small crawl and conversations into this folder, from the standard library, and stop
    look: int = 0  # print so many random documents, as they were and what became of them


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


# --- reading ---------------------------------------------------------------------------------------------------------


@lru_cache
def tell_once(message: str) -> None:
    """One line on stderr, once in a process."""
    print(message, file=sys.stderr)


def show_live(text: str) -> None:
    """One live line on a terminal; nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r{text:<79.79}\r", end="", file=sys.stderr, flush=True)


def read_jsonl(path: Path, counts: Counter) -> Iterator[tuple[str, bool]]:
    """The field "text" of each line of a file, as (text, True); lines that have none are counted in "bad_lines"."""
    with bpe.opened(path) as file:
        for line in file:
            text = line.decode("utf-8-sig", "replace")
            counts["utf8_errors"] += text.count("\ufffd") - line.count("\ufffd".encode())
            try:
                yield bpe.well_formed(json.loads(text)["text"]), True
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                counts["bad_lines"] += not line.isspace()


@dataclasses.dataclass
class Corpus:
    """The documents of some files, read anew at each pass. Of document i the first training[i] characters are for
    training, the others for validation."""
    files: list[Path]
    separator: str  # between the documents of a file
    training: np.ndarray = None  # (documents,) int64; only of few documents one has both parts
    counts: Counter = dataclasses.field(default_factory=Counter)  # of the latest pass: utf8_errors, bad_lines

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """All documents in pieces (text, whether the document ends here), empty documents left out.

        A piece ends where no pattern looks across, so that it encodes as the whole does; only where a text has no such
        place for long is it cut anywhere.
        """
        self.counts, errors = Counter(), {}
        for path in self.files:
            plain = ".jsonl" not in path.suffixes
            parts = bpe.read_parts([path], self.separator, errors) if plain else read_jsonl(path, self.counts)
            rest, begun = "", False
            for text, ends in parts:
                rest += text
                place = bpe.CUT.search(rest) if len(rest) > PIECE else None
                end = place.end() if place else len(rest)
                if ends and (rest or begun):
                    yield rest, True
                    rest, begun = "", False
                elif place or end > 4 * PIECE:
                    yield rest[:end], False
                    rest, begun = rest[end:], True
        self.counts["utf8_errors"] += sum(errors.values())

    def split(self, val_fraction: float, seed: int) -> None:
        """Decide what is for validation."""
        salt = hashlib.sha256(f"{seed}\n".encode())
        hashes, sizes, digest, size = array.array("I"), array.array("q"), salt.copy(), 0
        for text, ends in self.pieces():
            digest.update(text.encode())
            size += len(text)
            if ends:
                hashes.append(int.from_bytes(digest.digest()[:4], "big"))
                sizes.append(size)
                digest, size = salt.copy(), 0
        if not hashes:
            bad, names = self.counts["bad_lines"], ", ".join(map(str, self.files[:3]))
            raise ValueError(f"the input ({names}) holds no document, or the steps keep none; {bad} lines have no text")
        shares, sizes = np.array(hashes) / 2**32, np.array(sizes)
        if len(sizes) < FEW:
            print(f"fewer than {FEW} documents ({len(sizes)}): the last tenth of the text is for validation")
            starts = np.cumsum(sizes) - sizes
            self.training = np.clip(sizes.sum() * 9 // 10 - starts, 0, sizes)
        else:
            # Of a few dozen documents none may lie below the fraction: then the lowest is held out.
            self.training = np.where(shares <= max(val_fraction, shares.min()), 0, sizes)
        if not 0 < self.training.sum() < sizes.sum():
            raise ValueError("training or validation is empty: a short text, all documents equal, or --val_fraction")

    def sided(self) -> Iterator[tuple[int, str, bool]]:
        """As `pieces`, each with its side (1 for validation); a document that has both parts counts as two."""
        document, at = 0, 0  # at: characters of the document that came before
        for text, ends in self.pieces():
            if document == len(self.training):
                raise ValueError("the input changed while it was read: run again")
            inside = int(self.training[document]) - at
            at = 0 if ends else at + len(text)
            document += ends
            if 0 < inside < len(text) + (not ends):
                yield 0, text[:inside], True
                inside, text = 0, text[inside:]
            if text or ends:
                yield int(inside <= 0), text, ends


# --- WARC: web archives (ISO 28500) ----------------------------------------------------------------------------------

RECORD = re.compile(rb"\s*WARC/[\d.]+ *\r?\n((?:(?!WARC/)[^\n]+\n)*?)\r?\n")
LENGTH = re.compile(rb"^content-length:[ \t]*(\d{1,15})\s*$", re.I | re.M)
FIELD = re.compile(r"^([^:\s]+):[ \t]*(.*?)\s*$", re.M)
CODED = re.compile(rb"(?im)^(?:transfer-encoding: *(chunked)|content-encoding: *(gzip|deflate)|content-length:).*\n")
CHUNK = re.compile(rb"\s*([\da-f]{1,8})\b.*\n", re.I)
NO_PAGE = re.compile(r"(?im)^content-type:[ \t]*((?:image|audio|video|font)/|text/css|\S*(?:javascript|json|font))")
PLAIN = re.compile(r"(?im)^content-type:[ \t]*text/plain")
PACKED = re.compile(rb"\x1f\x8b\x08|BZh[1-9]1AY&SY|\xfd7zXZ\0|\x28\xb5\x2f\xfd")  # how gzip, bz2, xz and zstd begin
HEAD = 1 << 16  # bytes of the longest header of a record; as many of a file are read at a time


@lru_cache
def unpackers() -> tuple[dict, tuple]:
    """{the first byte of a packed file: what unpacks it}, and the errors of a damaged one; zstd since Python 3.14."""
    kinds = {b"\x1f": partial(zlib.decompressobj, 31), b"B": bz2.BZ2Decompressor, b"\xfd": lzma.LZMADecompressor}
    errors = [zlib.error, lzma.LZMAError, OSError, EOFError]
    with contextlib.suppress(ImportError):
        zstd = importlib.import_module("compression.zstd")
        kinds[b"\x28"] = zstd.ZstdDecompressor
        errors.append(zstd.ZstdError)
    return kinds, tuple(errors)


def read_blocks(path: str | Path) -> Iterator[bytes | None]:
    """The bytes of a file in blocks, unpacked; None at a damaged place, behind which the next member follows."""
    kinds, errors = unpackers()
    with open(path, "rb") as file:
        begin = PACKED.match(file.peek(10))
        begin_unpacking = begin and kinds.get(begin[0][:1])
        if begin and not begin_unpacking:
            tell_once(f"{path} is packed with zstd, which needs Python 3.14: unpack it first")
            yield None
            return
        unpacker = begin_unpacking and begin_unpacking()
        while rest := file.read(HEAD):
            if not unpacker:
                yield rest
            # zlib gives back what it has not read yet, the others keep it and are asked again.
            while unpacker and (rest or not unpacker.eof and not getattr(unpacker, "needs_input", True)):
                try:
                    unpacker = begin_unpacking() if unpacker.eof else unpacker
                    yield unpacker.decompress(rest, 16 * HEAD)
                    rest = getattr(unpacker, "unconsumed_tail", b"") or unpacker.unused_data
                except errors:
                    yield None
                    unpacker, begin = begin_unpacking(), PACKED.search(rest, 1)
                    rest = rest[begin.start():] if begin else b""
        if unpacker and not unpacker.eof:  # the file was cut
            yield None


def http_body(block: bytes, most: int) -> tuple[str, bytes]:
    """The header of an HTTP message, without how it was sent, and its body: chunks joined, gzip unpacked."""
    head, gap, body = block.partition(b"\r\n\r\n")
    codes, chunks, at = b" ".join(map(b"".join, CODED.findall(head + gap))).lower(), [], 0
    while b"chunked" in codes and (size := CHUNK.match(body, at)):
        at = size.end() + int(size[1], 16)
        chunks.append(body[size.end():at])
    body = b"".join(chunks) or body  # some archives hold the joined body under the old header
    with contextlib.suppress(zlib.error):
        body = zlib.decompressobj(47).decompress(body, most) if codes.strip(b" chunked") else body
    return CODED.sub(b"", head + gap[:2]).decode("latin-1"), body


def read_warc(path: str | Path, counts: Counter | None = None, most: int = 1 << 28) -> Iterator[tuple[dict, bytes]]:
    """Yield (headers, payload) of each record of a WARC file, plain or gzip, in bounded memory.

    Of an HTTP message the header is headers["http"], and the payload is the body as it was before it was sent. Damaged
    records, and those longer than `most` bytes, are skipped and counted in counts["broken"].
    """
    held = bytearray()
    counts = Counter() if counts is None else counts
    for block in read_blocks(path):
        counts["broken"] += block is None
        held = held[:0] if block is None else held
        held += block or b""
        while True:
            head = RECORD.match(bytes(held[:HEAD]))
            size = head and LENGTH.search(head[1])
            end = head.end() + int(size[1]) if size else most + 1
            if end <= most and len(held) < end:
                break  # more is to come
            # An end of line follows a record. If not, its length is wrong: a record that begins within it is not lost.
            sound = end <= most and not held[end:end + 2].strip()
            at = -1 if sound else held.find(b"\nWARC/", head.end() if head else 1)
            if end > most and at < 0 and len(held) < HEAD:
                break
            if end > most or 0 < at < end:
                counts["broken"] += 1
                del held[:at if at > 0 else len(held)]
                continue
            headers = dict(FIELD.findall(head.group(1).decode("utf-8", "replace")))
            payload = bytes(held[head.end():end])
            del held[:end]
            if headers.get("Content-Type", "").startswith("application/http"):
                headers["http"], payload = http_body(payload, most)
            yield headers, payload
    counts["broken"] += bool(held.strip())


def write_warc(path: str | Path, records: Iterable[tuple[dict, bytes]]) -> None:
    """Write records as `read_warc` yields them; each as a gzip member of its own if the name ends in .gz."""
    with bpe.replacing(path) as file:
        for headers, payload in records:
            block = headers["http"].encode("latin-1") + b"\r\n" + payload if "http" in headers else payload
            fields = {**headers, "Content-Length": len(block)}
            lines = [f"{name}: {fields[name]}\r\n" for name in fields if name != "http" and "Digest" not in name]
            record = f"WARC/1.0\r\n{''.join(lines)}\r\n".encode() + block + b"\r\n\r\n"
            file.write(gzip.compress(record, mtime=0) if str(path).endswith(".gz") else record)


# --- HTML to text ----------------------------------------------------------------------------------------------------

# Character sets that an HTTP header or a <meta> may name. Others are not tried: some of Python's codecs take quadratic
# time, or are none of text.
CHARSET = re.compile(rb"(?i)charset=[\s\"']*(utf-?8|(?:iso-8859-|windows-|cp)\d+|koi8-\w|gb\w+|big5|euc-\w+|shift_jis)")
WIDER = {"iso-8859-1": "cp1252", "iso-8859-9": "cp1254", "gb2312": "gb18030", "euc-kr": "cp949",
         "shift_jis": "cp932", "windows-31": "cp932"}  # as browsers do; the last is Windows-31J
# One alternative matches at each "<" and takes all it has read, to the end of the text if need be: linear time.
# Python's html.parser needs quadratic time for "<!--<!--...", and 15 times as long for usual pages.
TAG = re.compile(r"""<!--.*?(?:-->|\Z) | <!\[CDATA\[.*?(?:\]\]>|\Z) | <[!?][^>]*(?:>|\Z)
    | <(script|style|noscript|template|svg|iframe|object|canvas|textarea|select|button|title|video|audio)\b
        .*?(?:</\1\b[^>]*(?:>|\Z)|\Z)
    | <(/?)([a-z][^\s/>]*)((?:[^>=]+|=+\s*(?:"[^"]*(?:"|\Z)|'[^']*(?:'|\Z))?)*)(?:>|\Z)""", re.S | re.I | re.X)
BLOCKS = set("""address article aside blockquote body br center dd details dialog div dl dt fieldset figcaption figure
    footer form h1 h2 h3 h4 h5 h6 header hr html li main menu nav ol option p pre section summary table tbody td tfoot
    th thead tr ul""".split())  # a new line begins where they begin and end
VOID = set("area base br col embed hr img input link meta param source track wbr".split())  # they hold nothing
# A tag that ends the elements in which it stands, as long as they are of these.
ENDS = dict(li="li", td="td th", th="td th", tr="tr td th", dt="dd", dd="dt")
# Kinds of blocks, with what stands before the text in Markdown.
KINDS = {f"h{n}": "#" * n + " " for n in range(1, 7)} | {"li": "- ", "blockquote": "> ", "td": "", "th": "", "pre": ""}
BOXES = set("div article main body td".split())  # elements that may hold the whole main content
WHOLE = 0.8  # share of the page's text that a cell of a layout must have for that
ALWAYS = set("html body main article".split())  # elements whose class is not looked at
# Words in name, class, id and role of elements that hold no main content: what designers call them, of no one site.
NOISE = set("""address aside dialog figcaption form ad ads advert advertisement also author bio breadcrumb
    breadcrumbs byline caption comment comments copyright credit credits disclaimer follow footer hidden hide menu
    meta modal more most nav navbar navigation newsletter pagination popular popup print promo related recommended
    reply respond search share sharing sidebar social sponsored subscribe tags teaser trending widget""".split())
ATTRIBUTE = re.compile(r"""\b(?:class|id|role)\s*=\s*("[^"]*"|'[^']*'|[^\s>]+)""", re.I)
WORD = re.compile("[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
HIDDEN = re.compile(r"\bhidden\b|display:\s*none", re.I)
CELLS = ("td", "th")
CELL = 200  # characters of a cell above which a table is there for the layout
NEAR = 0.75  # how much of a block's score reaches the next outer element
MOST = 0.5  # an element with more than this share of a page's text is no side matter, whatever it is called
LINKS = 0.4  # a block with more than this share of links is a menu


# Character sets, each with letters that are frequent beyond ASCII in a language written in it.
ALPHABETS = """cp1252 äöüÄÖß cp1252 éèêàâçùûîïôœ cp1252 áéíóúñ¿¡ cp1252 ãõçáéíóúâêà cp1252 åäöøæ cp1252 àèéìòù
    cp1252 àèéíïòóúüç· cp1252 áðéíóúýþæö cp1250 ąćęłńóśźż cp1250 áčďéěíňóřšťúůýžľôä cp1250 áéíóöőúüű cp1250 ăâîşţ
    cp1250 čćžšđ cp1254 çğıöşüİâ cp1251 оеаинтсрвлкмдп koi8-r оеаинтсрвлкмдп cp1253 αοιετσνηυρπκμλςάέίό
    cp1255 יוהלאמרשתבנחקדםעפ cp1256 ايلمنورتبةعدسفهكق cp874 านรกเงมยลวดทสอ
    gb18030 的一是不在了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说种面而方后多定行学法所
    big5 的一是不在了有和人這中大為上個國我以要他時來用們生到作地於出就分對成會可主發年動同工也能下過子說種面而方後多定行學法所
    cp932 のにはをたがでてとしれさいなるもこらン euc-jp のにはをたがでてとしれさいなるもこらン
    cp949 이다는의을에가지고하은한로기사를도서""".split()


def guess_charset(raw: bytes) -> str:
    """The character set in which the letters beyond ASCII are those of a language, most of all: else cp1252."""
    best = 0.1, "cp1252"
    for name, letters in zip(ALPHABETS[::2], ALPHABETS[1::2]):
        with contextlib.suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder(name)().decode(raw[:HEAD])  # may end within a character
            foreign = [letter for letter in text if letter > "\x7f" and letter not in "“”„‘’–—…«»、。，"]
            share = sum(map(letters.__contains__, foreign)) / max(1, len(foreign))
            best = (share, name) if share > best[0] else best
    return best[1]


def pdf_text(raw: bytes, seconds: float = 60, most: int = 1 << 26) -> str:
    """The text of a PDF file by poppler's pdftotext: what comes in that time, of that many bytes.

    It reads its standard input, so that no name of a file is taken for an option. If it is missing, one line says so.
    """
    if not shutil.which("pdftotext"):
        tell_once("PDF files give no text: pdftotext is not installed (it is part of poppler)")
        return ""
    command = ["pdftotext", "-enc", "UTF-8", "-", "-"]
    with tempfile.TemporaryFile() as file:
        file.write(raw)
        file.seek(0)
        with subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            timer = threading.Timer(seconds, process.kill)
            timer.start()
            text = process.stdout.read(most)
            timer.cancel()
            process.kill()
    return text.decode("utf-8", "replace").replace("\f", "\n\n")


def decode(raw: bytes, header: str = "") -> str:
    """Text of bytes in the character set that a byte order mark, their form, an HTTP header, a <meta> or letters tell.

    A PDF file gives the text that it shows.
    """
    if raw.startswith(b"%PDF-"):
        return pdf_text(raw)
    with contextlib.suppress(UnicodeDecodeError):
        return raw.decode("utf-8-sig")  # other character sets almost never happen to be UTF-8
    told = CHARSET.search(header.encode() + raw[:4096])
    name = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else told[1].decode().lower() if told else ""
    text = raw.decode("utf-8", "replace")
    if not name and 10 * text.count("\ufffd") < sum(letter > "\x7f" for letter in text):
        return text  # UTF-8 with few errors
    name = name or guess_charset(raw)
    with contextlib.suppress(LookupError):
        return raw.decode(WIDER.get(name, name), "replace")
    return raw.decode(guess_charset(raw), "replace")  # one that does not exist was told


@dataclasses.dataclass(eq=False, slots=True)
class Element:
    """An element of a page; sums are over all that lies in it."""
    name: str
    parent: "Element | None"  # of the outermost one: None
    noise: bool = False  # whether it holds no main content
    block: "Element | None" = None  # the nearest list item, cell, heading, ...: itself or what it is in
    table: "Element | None" = None  # the nearest table; of what lies in none: None
    box: "Element | None" = None  # the nearest element of BLOCKS: itself or what it is in
    prose: float = 0.0  # characters outside of links
    score: float = 0.0  # the same of main content, less characters in links, weighted by nearness
    main: bool = False  # whether it lies in the main content


def is_noise(name: str, attributes: str) -> bool:
    """Whether an element looks as if it held none of the main content."""
    words = {word.lower() for value in [name, *ATTRIBUTE.findall(attributes)] for word in WORD.findall(value)}
    return name not in ALWAYS and (not NOISE.isdisjoint(words) or bool(HIDDEN.search(attributes)))


def parse_html(page: str) -> tuple[list[Element], list[tuple[Element, str, int]]]:
    """All elements of a page, and its visible text as (innermost element, text, characters of it in links).

    Markup may be of any form: an end that nothing begins is ignored, an element ends with what it is in.
    """
    element = Element("", None)
    element.block = element.box = element
    elements, blocks, words = [element], [], []
    at, linked, link = 0, 0, False
    for tag in itertools.chain(TAG.finditer(page), [None]):
        words.append(page[at:tag.start() if tag else None])
        linked += link and len(words[-1])
        at = tag.end() if tag else at
        end, name, attributes = tag.group(2, 3, 4) if tag else ("/", "html", "")
        name, kind = (name or "").lower(), element.block.name
        if (name, kind) == ("br", "pre"):
            words.append("\n")  # a blank line of code, where two of them stand
        elif name in BLOCKS:
            text = html.unescape("".join(words))
            text = text if kind == "pre" else " ".join(text.split())
            blank = text and kind == "pre" != element.name in BLOCKS  # a blank line of code in an element of its own
            if text.strip() or blank or element.name in CELLS:  # empty cells count, too
                blocks.append((element, text, min(linked, len(text))))
            words, linked = [], 0
        link = not end if name == "a" else link
        words += ["`"] * (name == "code" and kind != "pre")
        outer = element
        for _ in range(100 if end else 0):  # the nearest element of this name ends, if it is not far out
            if outer.name == name:
                element = outer.parent
                break
            outer = outer.parent or outer
        if name and not end and name not in VOID:
            while element.name in ENDS.get(name, "").split() or element.name == "p" and name in BLOCKS:
                element = element.parent
            element = Element(name, element, is_noise(name, attributes), element.block, element.table)
            element.block = element if name in KINDS else element.block
            element.table = element if name == "table" else element.table
            element.box = element if name in BLOCKS else element.parent.box
            elements.append(element)
    return elements, blocks


def to_markdown(blocks: Iterable[tuple[Element, str, int]], most: float) -> str:
    """The text of blocks as Markdown, without those of which more than the share `most` is links.

    Rows of a table and lines of code, of an item or of a heading stay together. Cells with long text are of a table for
    layout, which is no table.
    """
    out, before, last = [], "", None

    def unit(block):
        element = block[0].block
        return element.parent if element.name in CELLS else block if element.name in ("", "blockquote") else element

    for _, group in itertools.groupby(blocks, unit):
        cells, lines, linked = {}, [], 0
        for element, text, links in group:
            cells[element.block] = f"{cells.get(element.block, '')} {text}".strip()
            lines += [text] * bool(text)
            linked += links
        kind = element.block.name
        if lines and kind in CELLS and len(cells) > 1 and max(map(len, cells.values())) <= CELL:
            kind = element.block.table or "row"
            row = " | ".join(cell.replace("|", r"\|") for cell in cells.values())
            lines = [f"| {row} |"] + ["|" + "---|" * len(cells)] * (before != kind)
        elif not "".join(lines).strip() or linked > most * sum(map(len, lines)):
            continue
        elif kind == "pre":
            lines = [line.strip("\n") for line in lines]
            fence = max(["```", *(f"{run}`" for run in re.findall("^ *(```+)", "\n".join(lines), re.M))])
            lines = [fence, *lines, fence]
        else:
            between = "\n  " if kind == "li" else " " if kind.startswith("h") else "\n"
            lines = [KINDS.get(kind, "") + between.join(lines)]
        tight = element.box is last or kind == before and kind in ("li", element.block.table or "row")
        out += ["\n" * (2 - tight), "\n".join(lines)]
        before, last = kind, element.box
    return "".join(out[1:])


def extract(page: bytes | str, main: bool = True) -> str:
    """The main content of an HTML page as Markdown; main=False: all visible text.

    It is what lies in the element with the highest score, except parts that look like menus, comments, advertisements
    and so on, and blocks that are links for the most part. A block of text gives its characters outside of links, less
    those in links, to the element that it stands in, and NEAR of that to the next outer one, and so on: paragraphs that
    stand side by side beat the same ones in a box each (after Readability's idea).
    """
    elements, blocks = parse_html(page if isinstance(page, str) else decode(page))
    for element, text, links in blocks:
        element.prose += max(0, len(text) - 2 * links)
    for element in elements[:0:-1]:  # from the inner ones to the outer ones
        element.parent.prose += element.prose
    for element in elements[1:]:
        element.noise = element.parent.noise or element.noise and element.prose <= MOST * elements[0].prose
    for element, text, links in blocks:
        element.score += (not element.noise) * (len(text) - 2 * links)
    for element in elements[:0:-1]:
        element.parent.score += NEAR * element.score
    best = max((element for element in elements if not element.noise), key=lambda element: element.score)
    while best.parent and (best.name not in BOXES or best.name == "td" and best.prose < WHOLE * elements[0].prose):
        best = best.parent  # one long paragraph or section is a part, and so is a cell of many with much text
    best.main = True
    for element in elements[1:]:
        element.main |= element.parent.main and not element.noise
    return to_markdown([block for block in blocks if block[0].main], LINKS) if main else to_markdown(blocks, 1)


# --- filters: rules --------------------------------------------------------------------------------------------------

ODD = np.uint64(0x9E3779B97F4A7C15)  # multiplied by it, any number spreads over 64 bits
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
LEGAL = re.compile("javascript|terms of use|privacy policy|cookie policy|uses? (of )?cookies", re.I)


def ngram_keys(units: np.ndarray, n: int) -> np.ndarray:
    """A 64-bit key of each n-gram of units (uint64, shape (N,)), in their order: shape (N - n + 1,), or (0,)."""
    keys = np.zeros(max(0, units.size - n + 1), np.uint64)
    for i in range(n):
        keys = (keys + units[i:i + keys.size] + np.uint64(1)) * ODD
        keys ^= keys >> np.uint64(32)
    return keys


class Document:
    """A text and its statistics, each of which takes one argument of the table below.

    Words are what white space separates: languages that are written without it need other rules.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = text.split()
        self.lines = [line for line in map(str.strip, text.split("\n")) if line]
        self.paragraphs = [part for part in text.split("\n\n") if part.strip()]

    @cached_property
    def ends(self) -> np.ndarray:
        """Where each word ends, in characters of words; 0 before them."""
        return np.cumsum([0, *map(len, self.words)])

    @cached_property
    def keys(self) -> np.ndarray:
        """A key of each word, good in this process."""
        return np.array([*map(hash, self.words)], np.int64).view(np.uint64)

    def found_per_word(self, pattern: str) -> float:
        """How often a pattern occurs, in any case, over the number of words."""
        return len(re.findall(pattern, self.text, re.I)) / max(1, len(self.words))

    def count(self, part: str) -> int:
        return len(getattr(self, part))

    def word_length(self, _: str) -> float:
        return self.ends[-1] / max(1, len(self.words))

    def share(self, part: str, pattern: str) -> float:
        """The share of the words or lines in which a pattern occurs."""
        units, search = getattr(self, part), re.compile(pattern).search
        return sum(map(bool, map(search, units))) / max(1, len(units))

    words_with = partialmethod(share, "words")
    lines_with = partialmethod(share, "lines")

    def stop_words(self, _: str) -> int:
        """How many different ones of Gopher's English stop words occur."""
        return len(STOP_WORDS.intersection(self.text.lower().split()))

    def sentences(self, _: str) -> int:
        """Ends of sentences in the lines that C4 keeps: five words, a final mark, nothing legal or technical."""
        good = [line for line in self.lines if line.endswith((".", "!", "?", '"')) and not line.endswith("...")]
        good = [line for line in good if len(line.split()) >= 5 and not LEGAL.search(line)]
        return sum(len(re.findall(r"[.!?]['\")\]]?(?=\s|\Z)", line)) for line in good)

    def repeated(self, part: str, weigh: Callable[[str], int] = bool) -> float:
        """The share of the lines or paragraphs that stood before in the text."""
        units = getattr(self, part)
        total, first = (sum(map(weigh, some)) for some in (units, set(units)))
        return (total - first) / max(1, total)

    repeated_characters = partialmethod(repeated, weigh=len)  # the share of the characters that lie in such ones

    def top_gram(self, n: str) -> float:
        """The share of the characters of words in the most frequent n-gram of words; 0 if each occurs once."""
        keys = ngram_keys(self.keys, int(n))
        _, first, counts = np.unique(keys, return_index=True, return_counts=True)
        sizes = counts * (self.ends[first + int(n)] - self.ends[first])
        most = counts.max(initial=2)
        return sizes[counts == most].max(initial=0) / max(1, self.ends[-1])

    def repeated_grams(self, n: str) -> float:
        """The share of the characters of words in n-grams of words that stood before; none counts twice."""
        keys = ngram_keys(self.keys, int(n))
        if not keys.size:
            return 0.0
        again = np.ones(keys.size, bool)  # where a repeated n-gram begins
        again[np.unique(keys, return_index=True)[1]] = False
        inside = np.convolve(again, np.ones(int(n), int)) > 0  # one per word
        return np.diff(self.ends)[inside].sum() / self.ends[-1]


# Filter, rule, statistic, its argument, and the bounds between which it must lie. Sources: Rae et al. 2021 (Gopher),
# appendix A1 and table A1; Raffel et al. 2020 (C4), as rules for a whole page, its list of bad words being the filter
# "harmful" here; Penedo et al. 2024 (FineWeb), section 3.6; long: Fu et al. 2024, 4,000 tokens.
TABLE = r"""
    length      characters                      count                 text                    200    1000000
    long        characters                      count                 text                    16000  inf
    gopher      words                           count                 words                   50     100000
    gopher      mean_word_length                word_length           -                       3      10
    gopher      hashes                          found_per_word        \#                      0      0.1
    gopher      ellipses                        found_per_word        \.\.\.|…                0      0.1
    gopher      bullets                         lines_with            ^[-*•●‣◦]               0      0.9
    gopher      lines_with_ellipsis             lines_with            (\.\.\.|…)$             0      0.3
    gopher      alphabetic_words                words_with            [^\W\d_]                0.8    1
    gopher      stop_words                      stop_words            -                       2      8
    repetition  repeated_lines                  repeated              lines                   0      0.3
    repetition  repeated_paragraphs             repeated              paragraphs              0      0.3
    repetition  repeated_line_characters        repeated_characters   lines                   0      0.2
    repetition  repeated_paragraph_characters   repeated_characters   paragraphs              0      0.2
    repetition  top_2gram                       top_gram              2                       0      0.2
    repetition  top_3gram                       top_gram              3                       0      0.18
    repetition  top_4gram                       top_gram              4                       0      0.16
    repetition  repeated_5grams                 repeated_grams        5                       0      0.15
    repetition  repeated_6grams                 repeated_grams        6                       0      0.14
    repetition  repeated_7grams                 repeated_grams        7                       0      0.13
    repetition  repeated_8grams                 repeated_grams        8                       0      0.12
    repetition  repeated_9grams                 repeated_grams        9                       0      0.11
    repetition  repeated_10grams                repeated_grams        10                      0      0.1
    c4          sentences                       sentences             -                       3      inf
    c4          curly_brackets                  found_per_word        \{                      0      0
    c4          lorem_ipsum                     found_per_word        lorem\sipsum            0      0
    fineweb     final_marks                     lines_with            [.!?"'”’…。！？」]$      0.12   1
    fineweb     repeated_line_characters        repeated_characters   lines                   0      0.1
    fineweb     short_lines                     lines_with            ^.{0,29}$               0      0.67"""
RULES = [line.split() for line in TABLE.strip().splitlines()]


def obey(name: str, text: str) -> tuple[bool, str]:
    """(Whether the text keeps all rules of the filter `name`, the first that it breaks or "")."""
    document = Document(text)
    for group, rule, statistic, argument, low, high in RULES:
        if group == name and not float(low) <= getattr(document, statistic)(argument) <= float(high):
            return False, rule
    return True, ""


# --- personal data ---------------------------------------------------------------------------------------------------


def luhn(number: str) -> bool:
    """Whether the check digit of a card number is right, and its first digit one that cards have (ISO/IEC 7812)."""
    digits = [int(digit) for digit in number if digit.isdecimal()][::-1]
    total = sum(digits[::2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2])
    return 2 <= digits[-1] <= 6 and total % 10 == 0


def is_public(address: str) -> bool:
    """Whether an IP address belongs to somebody: not to a local network, to a test or to documentation."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address).is_global
    return False


def is_phone(number: str) -> bool:
    """Whether digits in groups are written as telephone numbers are, and not as dates, amounts or ZIP codes are."""
    sizes, gaps = [*map(len, re.findall(r"\d+", number))], set(re.findall("[ .-]", number))
    american = sizes[-3:] == [3, 3, 4] and number[0] in "123456789" and sum(sizes) <= 11
    national = number[0] == "0" and len(gaps) == 1 and sum(sizes) >= 9
    national &= not re.fullmatch(r"0\.\d+|\d{5}-\d{4}", number)  # a share, a ZIP code as in "Boston, MA 02110-1301"
    return 8 <= sum(sizes) <= 15 and (number[0] in "+(" or american or national)


# (pattern, what a match must pass). Each begins where nothing of its kind stands before and repeats a bounded number of
# times, so that the time is linear in any text. Keys come first: their letters may look like something else. (?a:...)
# is ASCII alone: Chinese, Japanese and Korean set no space between these and their own letters.
PERSONAL = {
    "key": (r"""-----BEGIN[ ][A-Z ]{0,20}PRIVATE[ ]KEY-----(?:[^-]|-(?!----)){0,9999}(?:-----END[A-Z ]{0,30}-----)?
        | (?a:(?<![\w-])
        (?:(?:AKIA|ASIA)[A-Z\d]{16} | gh[pousr]_[A-Za-z\d]{36,255} | github_pat_\w{22,255} | AIza[\w-]{35}
        | (?:sk|rk|pk)[-_](?=[A-Za-z_-]{0,254}\d)[\w-]{20,255} | xox[abeprs]-[\w-]{10,255} | hf_[A-Za-z]{34}
        | glpat-[\w-]{20,64} | eyJ[\w-]{10,2000}\.[\w-]{10,4000}\.[\w-]{10,2000})(?![\w-]))""", bool),
    "email": (r"(?a:(?<![\wÀ-ž.+%-])[\wÀ-ž.+%-]{1,64}@(?:[\wÀ-ž-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\wÀ-ž]))", bool),
    "card": (r"(?a:(?<![\w.-])(?:\d{4}([ -])\d{4}\1\d{4}\1\d{4}|\d{4}[ -]\d{6}[ -]\d{5}|\d{13,19})(?![\w-]))", luhn),
    "ip": (r"""(?a:(?<![\w.:])(?:(?:\d{1,3}\.){3}\d{1,3}|(?i:[\da-f]{0,4}:){2,7}[\da-fA-F]{0,4}(?!:))
        (?!\w|\.\d))""", is_public),
    "phone": (r"""(?<!\d)(?a:(?<![\w.+-]))(?:\+\d{1,3}[ .-]?)?(?:\(\d{1,5}\)[ .-]?)?
        \d{1,12}(?:[ .-]\d{2,8}){0,5}(?!(?a:[\w-])|[.,]?\d)""", is_phone),
}


def mask(kind: str, text: str) -> tuple[str, int]:
    """(The text with <KIND> in place of each of these data, how many there were)."""
    pattern, good = PERSONAL[kind]
    found = []

    def replace(match: re.Match) -> str:
        found.append(bool(good(match[0])))
        return f"<{kind.upper()}>" if found[-1] else match[0]

    return re.sub(pattern, replace, text, flags=re.X), sum(found)


MASKS = {kind: partial(mask, kind) for kind in PERSONAL}


# --- filters: models of text -----------------------------------------------------------------------------------------

SEEN = 1 << 14  # characters of a text that a model looks at
TOKEN = re.compile(r"\w+|[^\w\s]")
NO_LETTERS = re.compile(r"[\s\d!-/:-@\[-`{-~]+")


def save_arrays(path: str | Path, model: object) -> None:
    """Write the fields of a dataclass to an .npz file: arrays only, nothing to execute."""
    with bpe.replacing(path) as file:
        np.savez_compressed(file, **vars(model))


@lru_cache
def load_arrays(path: str, kind: type) -> Any:
    """Read what save_arrays wrote of a dataclass `kind`. Raises ValueError for another file, OSError for none."""
    with bpe.blaming(f"{path} holds no model of the kind {kind.__name__}"), open(path, "rb") as file:
        try:
            fields = np.load(file, allow_pickle=False)
            return kind(**{name: array[()] for name, array in fields.items()})
        except (zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(error) from None


@lru_cache(1 << 20)
def word_key(word: str) -> int:
    """A number for each word, the same in all processes."""
    return zlib.crc32(word.encode("utf-8", "replace"))


@dataclasses.dataclass
class Classifier:
    """Weights of hashed n-grams: their sum over those of a text, over n ** power, plus an offset, is a label's score.

    With characters as units, digits and ASCII punctuation count as spaces.
    """
    labels: np.ndarray  # names, of shape (labels,)
    unit: str  # what n-grams are made of: characters or words
    orders: int  # n-grams of 1 to so many units
    power: float
    weights: np.ndarray  # int8, of shape (buckets, labels); buckets are a power of two
    step: float  # what a weight of 1 stands for
    offset: float = 0.0  # of the last label

    def features(self, text: str) -> np.ndarray:
        """The bucket of each n-gram of a text."""
        if self.unit == "words":
            units = np.array([*map(word_key, TOKEN.findall(text.lower()))], np.uint64)
        else:
            letters = NO_LETTERS.sub(" ", f" {text.lower()} ")
            units = np.frombuffer(letters.encode("utf-32-le", "replace"), np.uint32).astype(np.uint64)
        keys = np.concatenate([ngram_keys(units, n) for n in range(1, self.orders + 1)])
        bits = len(self.weights).bit_length() - 1
        return (keys >> np.uint64(64 - bits)).astype(np.int32)

    def probabilities(self, text: str) -> np.ndarray:
        """The probability of each label, of shape (labels,), from the first SEEN characters of a text."""
        found = self.features(text[:SEEN])
        scores = self.weights[found].sum(0, dtype=np.int64) * self.step
        scores /= max(1, found.size) ** self.power
        scores[-1] += self.offset
        odds = np.exp(scores - scores.max())
        return odds / odds.sum()

    def set_weights(self, weights: np.ndarray, levels: int = 127) -> None:
        """Round weights to multiples of a step; the largest is so many steps."""
        self.step = float(np.abs(weights).max()) / levels or 1.0
        self.weights = np.round(weights / self.step).astype(np.int8)


def train_language(languages: dict[str, list[str]]) -> Classifier:
    """Naive Bayes over n-grams of 1 to 4 characters of {code: texts}.

    Counts are damped (a word of the topic is frequent in any language) and discounted in favour of what all languages
    have in common. A text that stands under several codes is not translated, and left out.
    """
    codes = Counter(text for texts in languages.values() for text in set(texts))
    known = {}
    for code in sorted(languages):
        text = " ".join(text for text in languages[code] if codes[text] == 1)
        known |= {code: text} if text.strip() else {}
    if len(known) < 2:
        raise ValueError("texts of two languages at least are needed, which do not stand under several of them")
    counts = np.zeros((1 << 16, len(known)))
    model = Classifier(np.array([*known]), "characters", 4, 0.0, counts, 1.0)
    for label, text in enumerate(known.values()):
        for start in range(0, len(text), PIECE):
            found = model.features(text[start:start + PIECE])
            counts[:, label] += np.bincount(found, minlength=len(counts))
    counts **= 0.6
    discount, total = 0.3, counts.sum(0)
    common = (counts / total).mean(1, keepdims=True) + 1e-9
    share = np.maximum(0, counts - discount) / total  # p = share + unseen * common
    unseen = discount * np.minimum(1, counts).sum(0) / total
    # log(p / common); n-grams overlap, so that each tells about a fourth of what it would alone
    model.set_weights(np.log(share / common + unseen) / model.orders, 31)  # the file is smaller than with more
    return model


def train_classifier(positive: Iterable[str], negative: Iterable[str], seed: int = 0) -> Classifier:
    """Logistic regression on 1-grams and 2-grams of words (as in fastText, Joulin et al. 2017) by Adagrad.

    The label "positive" is the second one. Raises ValueError if one kind has no text.
    """
    weights = np.zeros(1 << 18, np.float32)
    squares = np.full_like(weights, 1e-8)
    square = 1e-8  # of the offset
    model = Classifier(np.array(["negative", "positive"]), "words", 2, 0.5, weights, 1.0)
    texts = []
    for label, kind in enumerate((negative, positive)):
        rows = (model.features(text[:SEEN]) for text in kind)
        texts += [(found, label) for found in rows if found.size]
    if len({label for _, label in texts}) < 2:
        raise ValueError("texts of both kinds are needed, positive and negative")
    random = np.random.default_rng(seed)
    groups = []
    for _ in range(3):
        groups += np.array_split(random.permutation(len(texts)), 1 + len(texts) // 64)
    for batch in groups:
        parts, labels = zip(*(texts[i] for i in batch))
        found, sizes = np.concatenate(parts), np.array([*map(len, parts)])
        starts = np.cumsum(sizes) - sizes
        scores = np.add.reduceat(weights[found], starts) / np.sqrt(sizes) + model.offset
        errors = 1 / (1 + np.exp(-scores)) - labels
        slopes = np.repeat((errors / np.sqrt(sizes)).astype(np.float32), sizes)  # one per n-gram
        np.add.at(squares, found, slopes ** 2)
        np.subtract.at(weights, found, 0.2 * slopes / np.sqrt(squares[found]))
        slope = float(errors.mean())
        square += slope ** 2
        model.offset -= 0.2 * slope / square ** 0.5
    model.set_weights(np.stack([0 * weights, weights], 1))
    return model


def detect_language(text: str, path: str = "") -> tuple[str, float]:
    """(Code of the language, its probability) by language.npz beside this file, or `path`; ("", 0.0) without a letter.

    Where there is no such file, scripts are told apart: (name of the script, its share of the letters).
    """
    path = path or str(Path(__file__).with_name("language.npz"))
    letters = [letter for letter in text[:SEEN] if letter.isalpha()]
    if not letters:
        return "", 0.0
    if os.path.exists(path):
        model = load_arrays(path, Classifier)
        chances = model.probabilities(text)
        return str(model.labels[chances.argmax()]), float(chances.max())
    tell_once(f"there is no {path} (see --train_language): only scripts are told apart")
    scripts = Counter(unicodedata.name(letter, "?").split()[0].lower() for letter in letters)
    name, count = scripts.most_common(1)[0]
    return name, count / len(letters)


@dataclasses.dataclass
class NgramModel:
    """Interpolated Kneser-Ney with three discounts (Chen and Goodman 1998), over units 0 .. vocab_size - 1.

    p(w | h) = (c(hw) - D(c)) / c(h) + back(h) p(w | h without its first unit), and in the end 1 / vocab_size. c counts
    occurrences at the highest order, below it the different units that stand before. N-grams are numbered order by
    order; hw is the pair (number of h within its order) * vocab_size + w, and each order's pairs are sorted, so that
    those of one history stand together. With each pair are the first term and, for the order above, back(hw).
    """
    vocab_size: int
    sizes: np.ndarray  # numbers of n-grams, from order 1 on: the next three arrays hold one order after the other
    pairs: np.ndarray
    first_terms: np.ndarray
    backs: np.ndarray  # begins with that of the empty history, the last order has none

    def bits(self, units: np.ndarray) -> np.ndarray:
        """-log2 p of each unit after those before it, of shape (N,)."""
        chances = np.full(units.size, 1 / self.vocab_size)
        backs = np.full(units.size, self.backs[0])
        history = np.zeros(units.size, np.int64)  # number of what stands before each unit, -1 where it was never seen
        for start, end in itertools.pairwise([0, *np.cumsum(self.sizes)]):
            wanted = history * self.vocab_size + units
            place = np.searchsorted(self.pairs[start:end], wanted).clip(max=end - start - 1)
            found = self.pairs[start + place] == wanted
            seen = np.where(found, self.first_terms[start + place], 0)
            chances = chances * backs + seen
            if end < len(self.pairs):
                history = np.append(-1, np.where(found, place, -1))[:units.size]
                backs = np.where(history < 0, 1, self.backs[1 + start + history])
        return -np.log2(chances)


def train_ngrams(units: np.ndarray, vocab_size: int, order: int) -> NgramModel:
    """Count the n-grams of units (integers, shape (N,)). 10 million and order 6 take 15 seconds and 1.5 GB."""
    if not 1 <= order <= units.size:
        raise ValueError(f"{units.size:,} units are too few for {order}-grams")
    units = units.astype(np.int64)
    levels = []
    places = np.zeros(units.size + 1, np.int64)
    for n in range(order):  # the number of each unit's history, with the unit
        pairs, first, places = np.unique(places[:-1] * vocab_size + units[n:], True, True)
        levels.append((pairs, first, places))
    rows = []
    counts = np.bincount(places)
    for n in range(order - 1, -1, -1):
        pairs, first, _ = levels[n]
        # How much an n-gram seen c = 1, 2, 3 or more times is worth less than c, from how many are seen so often.
        few = np.maximum(1.0, np.bincount(np.minimum(counts, 5), minlength=6)[1:5])
        ratio = few[0] / (few[0] + 2 * few[1])
        less = [c - (c + 1) * ratio * few[c] / few[c - 1] for c in (1, 2, 3)]
        discounts = np.clip(less, 0.1, [0.95, 1.9, 2.85])[np.minimum(counts, 3) - 1]
        history = pairs // vocab_size
        shorter = len(levels[n - 1][0]) if n else 1
        total = np.bincount(history, counts, shorter)
        back = np.bincount(history, discounts, shorter)
        back = np.where(total, back / np.maximum(1, total), 1)
        rows.insert(0, (pairs, (counts - discounts) / total[history], back))
        if n:
            counts = np.bincount(levels[n - 1][2][first + 1], minlength=shorter)
            counts = np.maximum(1, counts)  # the text begins with it
    sizes = np.array([len(pairs) for pairs, *_ in rows])
    return NgramModel(vocab_size, sizes, *map(np.concatenate, zip(*rows)))


def read_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """The array of a token file. Raises OSError, or ValueError where it holds something else."""
    try:
        tokens = np.load(path, allow_pickle=False)
        whole = tokens.ndim == 1 and tokens.dtype.kind == "u" and len(tokens) > 1 and tokens.max() < vocab_size
    except OSError:
        raise
    except Exception as error:  # a damaged head fails in many ways
        raise ValueError(f"{path} is not a .npy file of tokens, or is damaged") from error
    if not whole:
        raise ValueError(f"{path} is not one list of tokens below {vocab_size:,}")
    return tokens


def ngram_bits_per_byte(folder: str | Path, order: int = 6) -> float:
    """Bits per byte of the held-out documents of a folder of token files, by the n-grams of its training tokens."""
    folder = Path(folder)
    coder = bpe.load(folder / "tokenizer.json")
    train, val = (read_tokens(folder / name, coder.vocab_size) for name in ("train.npy", "val.npy"))
    if coder.unknown is not None and coder.unknown in val:
        raise ValueError(f"{folder}/val.npy has {bpe.UNKNOWN}, of which nobody knows what text it hides")
    with bpe.blaming(f"{folder} holds no whole manifest.json"):
        size = json.loads((folder / "manifest.json").read_bytes())["val"]["bytes"]
    model = train_ngrams(train, coder.vocab_size, order)
    return float(model.bits(val).sum() / size)


# --- filters: all of them --------------------------------------------------------------------------------------------


def speaks(codes: str, text: str) -> tuple[bool, str]:
    """(Whether a text is in one of the languages of a comma list, "" being any; the code of its own)."""
    code, _ = detect_language(text)
    return not codes or code in codes.split(","), code or "no letters"


def rated(path: str, low: float, high: float, text: str) -> tuple[bool, float]:
    """(Whether the second label's probability, by the classifier in a file, lies between two bounds; that)."""
    chance = float(load_arrays(path, Classifier).probabilities(text)[1])
    return low <= chance <= high, chance


def surprise(path: str, most: float, text: str) -> tuple[bool, float]:
    """(Whether the n-gram model of bytes in a file needs at most so many bits a byte for a text; that)."""
    units = np.frombuffer(text[:SEEN].encode("utf-8", "replace"), np.uint8)
    bits = float(load_arrays(path, NgramModel).bits(units).sum() / max(1, units.size))
    return bits <= most, bits


def filters(o: Options) -> dict[str, Callable]:
    """{name: a function text -> (whether to keep it, the rule that it breaks or what was measured)}, by some options.

    Files of models are read when a first text comes, so that a filter can be sent to any process.
    """
    rules: dict = {group: partial(obey, group) for group, *_ in RULES}
    return rules | {"language": partial(speaks, o.language),
                    "quality": partial(rated, o.quality, o.min_quality, 1.0),
                    "harmful": partial(rated, o.harmful, 0.0, o.max_harmful),
                    "perplexity": partial(surprise, o.ngrams, o.max_bits)}


FILTERS = filters(Options())


def read_languages(path: Path) -> dict[str, list[str]]:
    """{code: texts} from a JSON file of that form, or from a folder with files code.txt, a text on each line."""
    if path.is_dir():
        return {file.stem: decode(file.read_bytes()).splitlines() for file in path.glob("*.txt")}
    raw = path.read_bytes()
    with bpe.blaming(f"{path} has not the form {{code: [texts]}}"):
        languages = json.loads(raw)
        return {code: [text + "" for text in texts + []] for code, texts in languages.items()}


def train_filter(o: Options) -> None:
    """Do what one of the options --train_... asks for: the model is written to --output, if that ends in .npz."""
    def texts(input: str) -> Iterator[str]:
        files = bpe.find_files(input)
        return (text for text, _ in Corpus(files, o.separator).pieces())

    if o.train_language:
        model, name = train_language(read_languages(Path(o.train_language))), "language.npz"
    elif o.train_classifier:
        if not o.positive or not o.negative:
            raise ValueError("--train_classifier needs --positive and --negative, files of texts of two kinds")
        with bpe.blaming(f"--positive={o.positive} --negative={o.negative}"):
            model, name = train_classifier(texts(o.positive), texts(o.negative), o.seed), "quality.npz"
    elif Path(o.train_ngrams, "train.npy").exists():
        print(f"{ngram_bits_per_byte(o.train_ngrams):.4f} bits a byte of the held-out documents by 6-grams of tokens")
        return
    else:
        units = np.frombuffer("\n".join(texts(o.train_ngrams)).encode("utf-8", "replace"), np.uint8)
        model, name = train_ngrams(units, 256, 6), "ngrams.npz"
    name = o.output if o.output.endswith(".npz") else name
    save_arrays(name, model)
    print(f"{name}: {os.path.getsize(name):,} bytes")


# --- rewriting by a language model -----------------------------------------------------------------------------------

# The four styles of WRAP (Maini et al. 2024), in other words than theirs.
STYLES = {
    "easy": "Tell the following text again for a small child: short sentences, the simplest words, no fact left out.",
    "medium": "Write the following text again as a good encyclopedia would: clear, whole sentences, no fact left out.",
    "hard": "Write the following text again for experts, as concisely and with as learned words as they would use.",
    "qa": "Turn the following text into questions and their answers, each on a line: `Question: ...`, `Answer: ...`.",
}


def ask_server(url: str, body: bytes, tries: int, wait: float) -> str:
    """What a model says to a request (JSON) to an OpenAI-compatible server; the key is the variable API_KEY.

    Where the server is busy (status 429), in trouble (500 and above) or away, it is asked again after `wait` seconds,
    twice that, and so on. Raises ConnectionError in one line after so many tries, or at once for another status.
    """
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    if os.environ.get("API_KEY"):  # goes to no server to which this one redirects
        request.add_unredirected_header("Authorization", f"Bearer {os.environ['API_KEY']}")
    for trial in range(tries):
        time.sleep(wait * 2 ** (trial - 1) if trial else 0)
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.loads(answer.read(1 << 26))["choices"][0]["message"]["content"] + ""
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            problem = f"{type(error).__name__}: {error}"
            if getattr(error, "code", 500) < 500 and error.code != 429:
                break
    raise ConnectionError(f"{url} gave no answer ({problem})")


def rewrite(texts: Iterable[str], style: str, url: str, model: str = "", cache: str | Path = "rewritten",
            workers: int = 8, tries: int = 6, wait: float = 1.0) -> list[str]:
    """Each text in one of the STYLES, by the server at url (such as http://localhost:8000/v1/chat/completions).

    Answers lie in the folder `cache` under a hash of all that was asked, so that nothing is asked for twice. `workers`
    requests run at a time. Raises ConnectionError as ask_server does; what was answered until then stays.
    """
    def one(text: str) -> str:
        messages = [{"role": "system", "content": STYLES[style]}, {"role": "user", "content": text}]
        body = json.dumps({"model": model, "messages": messages}).encode()
        place = Path(cache, hashlib.sha256(url.encode() + b"\n" + body).hexdigest() + ".txt")
        if not place.exists():
            answer = ask_server(url, body, tries, wait)
            with bpe.replacing(place) as file:
                file.write(answer.encode("utf-8", "replace"))
        return place.read_bytes().decode()

    if style not in STYLES:
        raise ValueError(f"the style {style} is none of {', '.join(STYLES)}")
    Path(cache).mkdir(parents=True, exist_ok=True)
    texts = list(texts)
    different = list(dict.fromkeys(texts))
    with ThreadPoolExecutor(workers) as pool:
        answers = dict(zip(different, pool.map(one, different)))
    return [answers[text] for text in texts]


# --- steps -----------------------------------------------------------------------------------------------------------


def encode(batch: list[tuple], tokenizer: bpe.Tokenizer) -> list[tuple[np.ndarray, int]]:
    """[(side, text, ends)] -> for train and for val (ids, bytes of text)."""
    end = np.full(1, tokenizer.special_tokens[bpe.END], tokenizer.dtype)
    ids, size = [[end[:0]], [end[:0]]], [0, 0]
    rows = tokenizer.encode_batch([text for _, text, _ in batch], 1)
    for (side, text, ends), row in zip(batch, rows):
        ids[side] += [row, end[:ends]]
        size[side] += len(text.encode())
    return list(zip(map(np.concatenate, ids), size))


def batches(items: Iterable, size: Callable[[Any], int], least: int) -> Iterator[list]:
    """Items in lists of which each, but the last, has a size of at least `least`; the last may be empty."""
    batch, held = [], 0
    for item in items:
        batch.append(item)
        held += size(item)
        if held >= least:
            yield batch
            batch, held = [], 0
    yield batch


def write_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    """The first HEADER bytes of a .npy file of one axis; numpy pads them so that any length fits."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": (length,)})


def tokenise(corpus: Corpus, tokenizer: bpe.Tokenizer, files: list[BinaryIO], workers: int) -> dict[str, Counter]:
    """Write train.npy and val.npy into `files`; for each the numbers of documents, bytes (of text) and tokens."""
    dtype = tokenizer.dtype.newbyteorder("<")
    counts, end = {"train": Counter(), "val": Counter()}, tokenizer.special_tokens[bpe.END]
    for file in files:
        write_header(file, dtype, 0)
    jobs = batches(corpus.sided(), lambda piece: len(piece[1]) + 1, JOB)
    with contextlib.closing(bpe.parallel(encode, jobs, workers, tokenizer)) as answers:
        for answer in answers:
            for file, count, (ids, size) in zip(files, counts.values(), answer):
                if ids.max(initial=0) >= tokenizer.vocab_size:
                    raise ValueError(f"the tokenizer gave id {ids.max()}, its vocabulary has {tokenizer.vocab_size}")
                file.write(ids.astype(dtype).tobytes())
                count.update(documents=int((ids == end).sum()), bytes=size, tokens=ids.size)  # adds
    for file, count in zip(files, counts.values()):
        write_header(file, dtype, count["tokens"])
    return counts


def shuffle(source: BinaryIO, file: BinaryIO, coder: bpe.Tokenizer, seed: int) -> None:
    """Copy a token file with its documents in an order drawn by a seed. Memory holds 16 bytes a document."""
    source.seek(0)
    file.write(source.read(HEADER))
    ends: Any = [[HEADER]]
    while (ids := np.fromfile(source, coder.dtype, PIECE)).size:
        places = np.flatnonzero(ids == coder.special_tokens[bpe.END])
        ends.append(source.tell() - ids.nbytes + (places + 1) * ids.itemsize)
    ends = np.concatenate(ends)
    for i in np.random.default_rng(seed).permutation(len(ends) - 1):
        for at in range(ends[i], ends[i + 1], PIECE):
            source.seek(at)
            file.write(source.read(min(PIECE, ends[i + 1] - at)))


# --- keys of documents: duplicates and evaluation sets ---------------------------------------------------------------
# A document has keys of 64 bits: of its URL, its text, its lines, or its n-grams of words. What has a key that was seen
# before, in an earlier document or in an evaluation set, is dropped. Near copies share many n-grams.

PERMUTATIONS = 128  # of a MinHash signature
GRAM = 5  # words of the n-grams by which near copies are found
LEAKED = (8, 13)  # words of the shortest item of an evaluation set that is looked for; of the n-grams of longer ones
LONGEST = 1 << 17  # bytes that are hashed at a time
RANDOM = np.random.default_rng(0)
LETTER = RANDOM.integers(0, 1 << 64, 256, np.uint64)
FACTOR, SHIFT = RANDOM.integers(0, 1 << 32, (2, PERMUTATIONS, 1), np.uint32)
BASE = 0x9E3779B97F4A7C15
POWER = np.cumprod(np.full(LONGEST, BASE, np.uint64))
INVERSE = np.cumprod(np.full(LONGEST, pow(BASE, -1, 1 << 64), np.uint64))
SPACELESS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")  # no spaces between words
TRACKING = re.compile("(utm_|fbclid=|gclid=|msclkid=|mc_[ce]id=|phpsessid=|sessionid=)", re.I)
ROWS = 1 << 24  # keys that are sorted at a time
BLOCK = 1 << 16  # keys that are looked up at a time


def grams(text: str, n: int) -> np.ndarray:
    """A key for each n words in a row (for the whole text if it has fewer); words are what white space parts.

    With sums[i] = sum of LETTER[byte j] r^j over j < i, the difference at two places, over r^start, is a hash of the
    bytes between them (Karp and Rabin 1987).
    """
    words = (text if text.isascii() else SPACELESS.sub(r" \g<0> ", text)).split() or [""]
    n, keys = min(n, len(words)), []
    for at in range(0, len(words) - n + 1, 1024):
        part = words[at:at + 1023 + n]
        if sum(map(len, part)) + len(part) > LONGEST // 4:  # characters, of up to 4 bytes
            part = [word[:30] for word in part]
        letters = np.frombuffer(" ".join(part).encode(), np.uint8)
        sums = np.zeros(len(letters) + 1, np.uint64)
        np.cumsum(LETTER[letters] * POWER[:len(letters)], out=sums[1:])
        spaces = np.flatnonzero(letters == ord(" "))
        starts = np.append(0, spaces + 1)[:len(part) - n + 1]
        ends = np.append(spaces, len(letters))[n - 1:]
        keys.append((sums[ends] - sums[starts]) * INVERSE[starts])
    return ngram_keys(np.concatenate(keys), 1)


def digests(texts: Iterable[str]) -> np.ndarray:
    """A key for each text, however long."""
    raw = [hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(raw), "<u8")


def signature(shingles: np.ndarray) -> np.ndarray:
    """The least of a set of keys under each of the permutations, (PERMUTATIONS,) uint32 (Broder 1997)."""
    keys = (shingles >> np.uint64(32)).astype(np.uint32)
    least = np.full(PERMUTATIONS, 0xFFFFFFFF, np.uint32)
    for at in range(0, len(keys), 512):  # (128, 512) stays in the cache
        values = (FACTOR | np.uint32(1)) * keys[at:at + 512]  # times an odd number: one to one modulo 2^32
        values += SHIFT
        np.minimum(least, values.min(1), out=least)
    return least


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands b, rows r): the most rows with which 99.5% of the pairs at the threshold share a band.

    Two documents of Jaccard similarity s share one with probability 1 - (1 - s^r)^b (Leskovec et al. 2014, chapter 3).
    """
    missed = {r: (1 - threshold**r) ** (PERMUTATIONS // r) for r in range(1, 33)}
    r = max([r for r in missed if missed[r] <= 0.005], default=1)
    return PERMUTATIONS // r, r


def near_keys(text: str, threshold: float) -> np.ndarray:
    """The bands of a document's signature, as one key each, and behind them its different 5-grams, sorted."""
    shingles = np.unique(grams(text, GRAM))
    b, r = bands_for(threshold)
    rows = signature(shingles)[:b * r].reshape(b, r)
    return np.concatenate([ngram_keys((rows * POWER[:r]).sum(1), 1), shingles])


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Size of the intersection over size of the union of two sets, each sorted."""
    both = np.sort(np.concatenate([a, b]), kind="stable")  # merges the two in linear time
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(both) - shared)


def sharing(bands: np.ndarray) -> Iterator[np.ndarray]:
    """Groups of two or more documents, ascending, that have a band in common; bands is (b, documents).

    It may lie on disk: ROWS keys at a time, those of a band with the same remainder, are sorted in memory.
    """
    passes = 1 + bands.shape[1] // ROWS
    for band, remainder in itertools.product(bands, range(passes)):
        blocks = range(0, max(1, len(band)), ROWS)
        parts = [at + np.flatnonzero(band[at:at + ROWS] % passes == remainder) for at in blocks]
        index = np.concatenate(parts)
        if len(index) < 2:
            continue
        order = np.argsort(band[index], kind="stable")
        keys, index = band[index][order], index[order]
        same = keys[1:] == keys[:-1]
        found = np.append(same, False) | np.append(False, same)
        cuts = np.flatnonzero(np.diff(keys[found])) + 1
        yield from np.split(index[found], cuts) if found.any() else []


def minhash_pairs(texts: Iterable[str], threshold: float = 0.8) -> list[tuple[int, int, float]]:
    """All pairs (i, j, similarity) of texts whose word 5-grams have a Jaccard similarity of at least the threshold.

    MinHash and LSH find at least 99% of them; the similarity is exact, so no pair is wrong.
    """
    keys = [near_keys(text, threshold) for text in texts]
    b = bands_for(threshold)[0]
    bands = np.array([key[:b] for key in keys]).reshape(-1, b)
    pairs = set()
    for group in sharing(bands.T):
        pairs.update(itertools.combinations(group.tolist(), 2))
    scored = [(i, j, jaccard(keys[i][b:], keys[j][b:])) for i, j in sorted(pairs)]
    return [pair for pair in scored if pair[2] >= threshold]


def find_copies(
    keys: np.ndarray,
    starts: np.ndarray,
    threshold: float,
    scratch: Path,
) -> list[list[int]]:
    """Clusters of near copies, the one to keep first: that with the most different 5-grams, of equal ones the earliest.

    Document i has keys[starts[i]:starts[i + 1]]. A cluster is what verified pairs connect. Keys and the file `scratch`
    stay on disk; memory holds some 30 bytes a document.
    """
    b, count = bands_for(threshold)[0], len(starts) - 1
    bands = np.lib.format.open_memmap(scratch, "w+", "<u8", (b, count))
    for at in range(0, count, 1 << 12):  # the bands of a document come together, now the documents of a band do
        some = starts[at:min(at + (1 << 12), count)]
        bands[:, at:at + len(some)] = keys[some + np.arange(b)[:, None]]
    parent = np.arange(count)

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return int(i)

    def shingles(i: int) -> np.ndarray:
        return keys[starts[i] + b:starts[i + 1]]

    for group in sharing(bands):
        members = {}  # root -> documents of this group; one is compared until a document of a root is near
        for i in group.tolist():
            for other in {*members} - {root(i)}:
                if any(jaccard(shingles(i), shingles(j)) >= threshold for j in members[other]):
                    members.setdefault(root(i), []).extend(members.pop(other))
                    parent[other] = root(i)
            members.setdefault(root(i), []).append(i)
    clusters = {}
    for i in np.flatnonzero(parent != np.arange(count)).tolist():
        clusters.setdefault(root(i), [root(i)]).append(i)
    sizes = np.diff(starts)
    return [sorted(cluster, key=lambda i: (-sizes[i], i)) for cluster in clusters.values()]


class Bloom:
    """A set of keys in -log2(rate) / ln 2 bits each; a new one is taken for known with probability `rate` at most, as
    long as no more than `count` are in it (Bloom 1970)."""

    def __init__(self, count: int, rate: float):
        self.size = 64 + math.ceil(-count * math.log(rate) / math.log(2) ** 2)  # bits
        self.probes = max(1, round(-math.log2(rate)))
        self.bits = np.zeros(self.size // 8 + 1, np.uint8)

    def places(self, keys: np.ndarray, probe: int) -> tuple[np.ndarray, np.ndarray]:
        """Byte and bit of the keys for one of the probes: hash1 + probe hash2 (Kirsch and Mitzenmacher 2006)."""
        steps = ngram_keys(keys, 1) | np.uint64(1)
        place = (keys + np.uint64(probe) * steps) % np.uint64(self.size)
        return place // 8, np.uint8(1) << (place % 8).astype(np.uint8)

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Put keys in; for each whether it was known, or stands earlier among them."""
        known = np.ones(len(keys), bool)
        known[np.unique(keys, return_index=True)[1]] = False
        left = np.flatnonzero(~known)
        for probe in range(self.probes):  # half of the new ones are out after each probe
            byte, bit = self.places(keys[left], probe)
            left = left[self.bits[byte] & bit > 0]
        known[left] = True
        for probe in range(self.probes):
            np.bitwise_or.at(self.bits, *self.places(keys[~known], probe))
        return known


def normal_url(url: str) -> str:
    """A URL without what does not change the page: scheme, www, port, case of the host, fragment, marks of trackers."""
    try:
        parts = urlsplit(url.strip())
        port = f":{parts.port}" * (parts.port not in (None, 80, 443))
    except ValueError:  # as http://[
        return url
    query = "&".join(sorted(word for word in parts.query.split("&") if not TRACKING.match(word)))
    host = (parts.hostname or "").removeprefix("www.")
    return f"{host}{port}{parts.path.rstrip('/')}?{query}".rstrip("?")


def letters_of(text: str) -> str:
    """Letters and digits alone, in small letters: what is compared with evaluation sets. Any script gets spaces."""
    return " ".join(re.findall(r"\w+", SPACELESS.sub(r" \g<0> ", text.lower())))


def strings_in(value: Any) -> Iterator[str]:
    """The strings of a value of JSON, from the first to the last, however deep they lie."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings_in(part)


def read_evaluation(path: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of each field of a file of an evaluation set: rows of jsonl, of csv as MMLU has them, strings of
    json, paragraphs."""
    csv.field_size_limit(1 << 30)  # else a long field, or one that no quote closes, is an error
    with bpe.opened(path, "rt", encoding="utf-8-sig", errors="replace", newline="") as file:
        if ".jsonl" in path.suffixes:
            rows = (json.loads(line) for line in file if line.strip())
        elif ".csv" in path.suffixes:
            rows = ({"question": row[:1], "answer": row[1:]} for row in csv.reader(file))
        elif ".json" in path.suffixes:  # an array, an object or lines: each string that is no name of a field
            strings = re.findall(r'("(?:[^"\\]|\\.)*")(\s*:)?', file.read())
            rows = ({"text": json.loads(string, strict=False)} for string, colon in strings if not colon)
        else:
            rows = ({"text": text} for text in file.read().split("\n\n"))
        for number, row in enumerate(rows):
            for field, value in row.items():
                yield from ((f"{path.name} {number} {field}", text) for text in strings_in(value))


def set_of(name: str) -> str:
    """The file of an item that read_evaluation named; there may be spaces in it."""
    return re.split(r" \d+ ", name)[0]


@lru_cache(1)
def evaluation_keys(eval_data: str) -> tuple[dict[int, np.ndarray], list[tuple[str, str]]]:
    """({n: (keys, sorted, and the item of each)}, (name, text) of each item).

    An item of LEAKED[1] words or more has its n-grams of that many words, a shorter one its first LEAKED[0] words;
    still shorter ones would be found everywhere (Brown et al. 2020, appendix C).
    """
    items = []
    tables: dict = {n: [np.zeros((2, 0), np.uint64)] for n in LEAKED}
    for path in bpe.find_files(eval_data):
        with bpe.blaming(f"--eval_data: {path} is damaged"):
            items += [(name, letters_of(text)) for name, text in read_evaluation(path)]
    for i, (_, text) in enumerate(items):
        n = max([n for n in LEAKED if n <= len(text.split())], default=0)
        if n:
            keys = grams(text, n)[:None if n == LEAKED[1] else 1]
            tables[n].append(np.stack([keys, np.full_like(keys, i)]))
    for n, rows in tables.items():
        table = np.concatenate(rows, 1)
        tables[n] = table[:, np.argsort(table[0])]
    return tables, items


# --- mixing: in which shares train.py draws from several sources -----------------------------------------------------

GUESSES = 1 << 14  # random mixtures that a fit is asked about
BEST = 100  # of them, whose mean is the answer


def shares_by_size(sizes: list[int], temperature: float) -> np.ndarray:
    """Shares like tokens ** (1 / temperature): at 1 those of the tokens, at infinity all alike."""
    powers = (np.array(sizes) / max(sizes)) ** (1 / temperature)  # which stay finite at any temperature
    return powers / powers.sum()


def with_products(shares: np.ndarray) -> np.ndarray:
    """Mixtures (N, k) and the products of two of their shares: (N, k (k + 1) / 2), linear in which is a quadratic."""
    i, j = np.triu_indices(shares.shape[1], 1)
    return np.hstack([shares, shares[:, i] * shares[:, j]])


def learn_shares(run: Callable[[list], float], sizes: list[int], count: int, seed: int) -> dict:
    """Shares with the least loss, from `count` calls of run(shares) -> loss (RegMix, Liu et al. 2024).

    Least squares fit the log of the loss by a quadratic of the shares, where RegMix has boosted trees. "low" and "high"
    bound the shares in 90% of the fits to runs drawn anew from these (bootstrap); "loss" is what the fit predicts. The
    first two runs are shares by size and all alike.
    """
    random, k = np.random.default_rng(seed), len(sizes)
    least = 1 + k * (k + 1) // 2
    if count < least:
        raise ValueError(f"--runs={count} are too few for {k} sources: {least} at least")
    plain = [shares_by_size(sizes, temperature) for temperature in (1, np.inf)]
    shares = np.round([*plain, *random.dirichlet(np.ones(k), count - 2)], 6)
    losses = np.log([run(row.tolist()) for row in shares])
    terms, guesses = with_products(shares), random.dirichlet(np.ones(k), GUESSES)
    products = with_products(guesses)

    def best(rows: np.ndarray) -> tuple[np.ndarray, float]:
        fit = np.linalg.lstsq(terms[rows], losses[rows], rcond=None)[0]
        found = guesses[np.argpartition(products @ fit, BEST)[:BEST]].mean(0)
        return found, float(np.exp(with_products(found[None]) @ fit)[0])

    found, loss = best(np.arange(count))
    samples = [best(rows)[0] for rows in random.integers(count, size=(200, count))]
    low, high = np.quantile(samples, [0.05, 0.95], 0)
    return dict(shares=found, low=low, high=high, loss=loss)


def loss_of_shares(o: Options, sizes: list[int], shares: list[float]) -> float:
    """Loss at the end of a run of train.py with some shares. Its log stays in OUTPUT: no run is done twice."""
    mix = ",".join(map(str, shares))
    words = [f"--data={o.mix}", f"--mix={mix}", f"--eval_data={o.eval_data}", *o.train.split()]
    held = [fingerprint(Path(folder, "val.npy"))["sha256"] for folder in (o.eval_data or o.mix).split(",")]
    log = Path(o.output, hashlib.sha256(f"{sizes} {held} {words}".encode()).hexdigest()[:16] + ".jsonl")
    if not log.exists():
        with tempfile.TemporaryDirectory(dir=o.output) as run:
            command: list = [sys.executable, Path(__file__).with_name("train.py"), *words, f"--output={run}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(done.stderr.strip())
            os.replace(Path(run, "log.jsonl"), log)
    with bpe.blaming(f"{log} is damaged"):
        loss = json.loads(log.read_text().splitlines()[-1])["val_loss"]
    print(f"--mix={mix} ends at {loss:.4f}", flush=True)
    return loss


def mix_sources(o: Options) -> None:
    """Write OUTPUT/mix.json, shares for the folders of --mix, and print them."""
    folders = [str(Path(folder)) for folder in o.mix.split(",")]  # as train.py names them: without a final /
    path = Path(o.output, "mix.json")
    if len({*folders}) < 2 or o.temperature < 0:
        raise ValueError("--mix takes two folders of token files or more, --temperature a number from 0 on")
    with bpe.blaming(f"{o.mix}: not each folder holds a whole train.npy"):
        sizes = [len(np.load(Path(folder, "train.npy"), mmap_mode="r")) for folder in folders]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which ends the run that goes on, too
    with claimed(path.parent, o):
        if o.temperature:
            found = dict(shares=shares_by_size(sizes, o.temperature))
        else:
            found = learn_shares(partial(loss_of_shares, o, sizes), sizes, o.runs, o.seed)
        for key in {"shares", "low", "high"} & found.keys():
            found[key] = dict(zip(folders, np.round(found[key], 4).tolist()))
        with bpe.replacing(path) as file:
            file.write(json.dumps(found, indent=1).encode())
    for folder, size in zip(folders, sizes):
        span = f"  (90%: {found['low'][folder]:.3f} to {found['high'][folder]:.3f})" if "low" in found else ""
        print(f"{folder}: {size:,} tokens, share {found['shares'][folder]:.3f}{span}")
    if "loss" in found:
        print(f"predicted loss {found['loss']:.4f}")
    print(f"next: python train.py --data={o.mix} --mix={path}")


# --- the pipeline ----------------------------------------------------------------------------------------------------
# Documents are records, dicts with "text" (or "messages"), "origin", "url" and what steps add. Steps that look at one
# document run together in one pass, in parallel; behind them the keys of all documents are compared: that is a stage.
# Each part of the input has its files on disk for each stage, so that a run which was killed goes on behind them.

PART = 1 << 26  # bytes of files in a group, of which a shard takes every n-th
GLANCE = 2000  # characters that are kept of what is dropped
FIRST = 4  # examples for each reason in the report


def append_files(file: BinaryIO, paths: Iterable[Path]) -> None:
    """Write the content of files behind one another."""
    for path in paths:
        with open(path, "rb") as source:
            shutil.copyfileobj(source, file)


def places(record: dict) -> list[tuple[dict, str]]:
    """Where the text of a record stands, as (dict, key): in "text", or in each of its messages."""
    return [(record, "text")] if "text" in record else [(message, "content") for message in record["messages"]]


def text_of(record: dict) -> str:
    """All text of a record."""
    return "\n\n".join(holder[key] for holder, key in places(record))


def cut_at(between: bytes, blocks: Iterable[bytes | None], most: int) -> Iterator[bytes | None]:
    """What stands between separators (if that is b"": the whole), without what is blank; None for a damaged place.

    Of what is longer than `most` bytes only these are given.
    """
    held, searched, given = bytearray(), 0, False  # given: only the rest of a long one is held
    for block in itertools.chain(blocks, [between]):
        if block is None:
            yield None
        held += block or b""
        while between and (end := held.find(between, searched)) >= 0:
            if not given and (end > most or held[:end].strip()):
                yield bytes(held[:min(end, most)])
            del held[:end + len(between)]
            searched, given = 0, False
        searched = max(0, len(held) + 1 - len(between or b"."))
        if searched > most:
            if not given:
                yield bytes(held[:most])
            del held[:searched]
            searched, given = 0, True
    if held.strip() and not given:
        yield bytes(held)


def lines_of(record: dict) -> list[str]:
    """All lines of a record."""
    return [line for holder, key in places(record) for line in holder[key].split("\n")]


# Layouts of conversations: the fields of a row, in their order, with who speaks ("turns": a list of who says what; "?":
# the field may be missing). The first layout that fits counts: OpenAI's, ShareGPT's, Alpaca's, pairs.
LAYOUTS = """tools?:system system?:system messages:turns
    tools?:system system?:system conversations:turns
    system?:system instruction:user input?:user output:assistant
    system?:system prompt:user completion:assistant
    system?:system prompt:user response:assistant
    system?:system question:user answer:assistant"""
SPEAKERS = """system:system developer:system user:user human:user prompter:user assistant:assistant gpt:assistant
    model:assistant function_call:assistant tool:tool function:tool observation:tool"""
ROLES = dict(pair.split(":") for pair in SPEAKERS.split())


def turn_text(turn: dict) -> str:
    """What a turn says: its text, and behind it its calls of tools as Hermes models write them."""
    said = turn.get("content", turn.get("value")) or ""
    parts = [said] if isinstance(said, str) else [part["text"] for part in said]
    for call in turn.get("tool_calls") or []:
        call = call.get("function", call)
        given = call["arguments"]
        given = json.loads(given) if isinstance(given, str) else given
        call = dict(name=call["name"], arguments=given)
        parts.append(f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>")
    return "\n".join(filter(None, parts))


def to_messages(row: dict) -> list[dict]:
    """Messages of a row of jsonl in one of the LAYOUTS, as align.py reads them; [] if it holds no conversation.

    Turns of a user, or of the system, that follow one another become one. The fields of the layout leave the row: a
    second copy of the text would keep what later steps mask.
    """
    layouts = [dict(field.split(":") for field in layout.split()) for layout in LAYOUTS.splitlines()]
    fitting = (fields for fields in layouts if all(name in row or name[-1] == "?" for name in fields))
    turns, messages = [], []
    for name, role in next(fitting, {}).items():
        value = row.pop(name.rstrip("?"), None) or []
        if name == "tools?" and value and not isinstance(value, str):
            value = json.dumps(value, ensure_ascii=False)
        turns += [dict(role=role, content=value)] if isinstance(value, str) else value
    for turn in turns:
        role, text = ROLES.get(turn.get("role") or turn.get("from")), turn_text(turn)
        if role == "system" and not text.strip():
            continue
        if not role or not text.strip():
            return []
        if messages and role == messages[-1]["role"] and role in ("user", "system"):
            messages[-1]["content"] += f"\n\n{text}"
        else:
            messages.append(dict(role=role, content=text))
    return messages if messages and messages[-1]["role"] == "assistant" else []


def read_raw(files: Iterable[Path], o: Options) -> Iterator[dict]:
    """What files hold, as records with "raw" (bytes; None for a damaged place), "origin", "kind" (page, text or row of
    jsonl) and "headers" (of a record of a WARC file)."""
    for path in files:
        kind = "page" if PAGES.search(path.name) else "row" if ".jsonl" in path.suffixes else "text"
        between = {"row": b"\n", "text": o.separator.encode()}.get(kind, b"")
        broken = Counter()
        if ".warc" in path.suffixes:
            found = read_warc(path, broken, o.max_document_bytes)
        else:
            found = (({}, raw) for raw in cut_at(between, read_blocks(path), o.max_document_bytes))
        for number, (headers, raw) in enumerate(itertools.chain(found, [({}, b"")])):
            about = {"origin": f"{path}#{number}", "kind": kind, "headers": headers}
            yield from (about | {"raw": None} for _ in range(broken.pop("broken", 0)))
            if raw != b"" or headers:  # not the end
                yield about | {"raw": raw}


def read_record(record: dict, o: Options, counts: Counter) -> str:
    """What was read becomes text; the fields of a row of jsonl stay."""
    raw, kind, headers = record.pop("raw"), record.pop("kind"), record.pop("headers")
    if raw is None:
        return "damaged"
    if headers.get("WARC-Type") not in (None, "response", "resource", "conversion"):
        return "record of another type"
    if failed := re.match(r"HTTP/\S+ ([013-9]\d\d)", headers.get("http", "")):
        return f"HTTP status {failed[1]}"
    if NO_PAGE.search(headers.get("http", "")):  # wget saves the styles and scripts of a page, too
        return "no page, by its content type"
    if len(raw) >= o.max_document_bytes:
        return "longer than --max_document_bytes"
    if b"\0" in raw[:1024] and not raw.startswith((b"\xff\xfe", b"\xfe\xff", b"%PDF-")):
        return "binary"
    if kind != "row" and "chat" in o.steps.split(","):
        return "no row of .jsonl"
    if kind != "row":
        record["text"] = decode(raw, headers.get("http", ""))
        record["url"] = headers.get("WARC-Target-URI", "")
        plain = headers.get("WARC-Type") == "conversion" or raw.startswith(b"%PDF-")  # a "<" in it is no tag
        if kind == "page" and not plain and not PLAIN.search(headers.get("http", "")):
            record["markup"] = True
        return ""
    try:  # a row
        record |= json.loads(raw.decode("utf-8-sig", "replace"))
        if "chat" in o.steps.split(","):
            record["messages"] = to_messages(record)
            record.pop("text", "")
            if not record["messages"]:
                return "no conversation"
        for holder, key in places(record):  # JSON can spell half of a surrogate pair
            holder[key] = bpe.well_formed(holder[key])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "no JSON with a text or messages"
    return ""


def extract_page(record: dict, o: Options, counts: Counter) -> str:
    """A page becomes its main content; other documents stay."""
    if record.pop("markup", False) and "<" in record["text"][:1024]:
        record["text"] = extract(record["text"])
    return "" if text_of(record).strip() else "no text"


def mask_all(record: dict, o: Options, counts: Counter) -> str:
    """Masks take the place of what is private."""
    for name, mask in MASKS.items():
        for holder, key in places(record):
            holder[key], count = mask(holder[key])
            counts[f"pii/masked/{name}"] += count
    return ""


def decontaminate(record: dict, o: Options, counts: Counter) -> str:
    """Drop a document that shares LEAKED[1] words in a row with an evaluation set, or holds a shorter item of it."""
    tables, items = evaluation_keys(o.eval_data)
    text, hits = letters_of(text_of(record)), set()
    for n, (keys, owners) in tables.items():
        found = grams(text, n)
        left, right = np.searchsorted(keys, found), np.searchsorted(keys, found, "right")
        for i in np.flatnonzero(right > left):
            same = owners[left[i]:right[i]].tolist()
            hits.update(item for item in same if n == LEAKED[1] or f" {items[item][1]} " in f" {text} ")
    names = [items[hit][0] for hit in sorted(hits)]
    counts.update(f"decontaminate/found/{name}" for name in names)
    return f"found in {set_of(names[0])}" if names else ""


# Steps that look at one document: they change the record in place, and give the reason why it is dropped, or "".
STEPS = {
    "read": read_record, "extract": extract_page, "pii": mask_all, "decontaminate": decontaminate,
}
# Steps that compare all documents: the keys of one.
KEYS = {
    "urls": lambda record, o: digests([normal_url(str(record["url"]))] if record.get("url") else []),
    "exact": lambda record, o: digests([" ".join(text_of(record).split())]),
    "lines": lambda record, o: digests([" ".join(line.split()) for line in lines_of(record)]),
    "dedup": lambda record, o: near_keys(text_of(record), o.threshold),
}


def drop_seen(name: str, record: dict, flags: np.ndarray) -> str:
    """Drop what was seen before, as the flags of a document's keys say: lines, or the whole."""
    if name != "lines":
        return {"dedup": "near copy"}.get(name, "seen before") * bool(flags.any())
    new = False
    for holder, key in places(record):
        lines = holder[key].split("\n")
        fresh = [line for line, seen in zip(lines, flags) if not seen or not line.strip()]
        text = "\n".join(fresh).strip("\n")
        holder[key] = text if text.strip() or key == "text" else holder[key]  # no turn of a conversation gets empty
        new |= bool(text.strip())
        flags = flags[len(lines):]
    return "" if new else "all lines seen before"


def drop_filtered(name: str, record: dict, o: Options) -> str:
    """Ask a filter; what it measured becomes a field of the record."""
    keep, value = (FILTERS | filters(o))[name](text_of(record))
    record |= {name: value} if value not in ("", None) else {}
    return "" if keep else value if isinstance(value, str) else "out of bounds"


def stages(steps: str) -> list[tuple[str, list[str], str]]:
    """The steps as passes: (whose keys decide first, steps on one document, whose keys are taken at the end)."""
    out, before, local = [], "read", []
    for name in steps.split(","):
        if name in KEYS:
            out.append((before, local, name))
            before, local = name, []
        elif name not in ("chat", "tokenise"):
            local.append(name)
    return [*out, (before, local, "")]


def do_document(
    record: dict,
    flags: np.ndarray,
    steps: list[str],
    o: Options,
    counts: Counter,
) -> dict | None:
    """A document goes through steps, in place; if it is dropped: where, why and the beginning of what it was.

    Whatever it does to a step, it is counted: counts has STEP/in, STEP/kept, STEP/dropped/REASON, STEP/bytes_kept, ...
    """
    for step in steps:
        began, text = time.process_time(), "" if step == "read" else text_of(record)
        counts[f"{step}/in"] += 1
        try:
            if step in KEYS:
                reason = drop_seen(step, record, flags)
            else:
                reason = STEPS[step](record, o, counts) if step in STEPS else drop_filtered(step, record, o)
        except OSError:  # not the document's
            raise
        except Exception as error:  # of a filter that was not made for such a text
            reason = f"error: {type(error).__name__}"
        counts[f"{step}/seconds"] += time.process_time() - began
        if reason:
            counts[f"{step}/dropped/{reason}"] += 1
            return {"step": step, "reason": reason, "origin": record["origin"], "text": text[:GLANCE]}
        counts.update({f"{step}/kept": 1, f"{step}/bytes_kept": len(text_of(record).encode())})
    return None


def shard_of(o: Options) -> tuple[int, int]:
    """(i, n) of --shard=i/n; (0, 1) without."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", o.shard or "0/1")
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"--shard={o.shard}: write i/n, such as 0/4, with i from 0 to n - 1")
    return int(found[1]), int(found[2])


class Pipeline:
    """The stages of a run over some files, in a folder of its own, which holds for each stage and part what was kept
    (jsonl), what was not (removed), keys, the number of keys of each document (sizes), and last the counts (json)."""

    def __init__(self, files: list[Path], o: Options, folder: Path, workers: int):
        self.o, self.folder, self.workers = o, folder, workers
        self.stages, self.parts = stages(o.steps), []
        groups = batches(files, lambda path: path.stat().st_size, PART)  # of many small files
        self.groups = [*filter(None, groups)]

    def path(self, number: int, part: str, kind: str = "json") -> Path:
        """The file of a stage and part; if there is one of counts, the part is done."""
        return self.folder / f"{number}-{part}.{kind}"

    def raw_jobs(self) -> Iterator[tuple]:
        """The input in parts for the first stage, without groups of files that are done or of other shards."""
        index, count = shard_of(self.o)
        for group in range(index, len(self.groups), count):
            if self.path(0, f"{group:05}", "end").exists():
                continue
            records = read_raw(self.groups[group], self.o)
            parts = batches(records, lambda record: len(record["raw"] or b"") + 100, JOB)
            for number, batch in enumerate(parts):
                yield f"{group:05}.{number:07}", batch, np.zeros(0, bool)

    def part_jobs(self, number: int) -> Iterator[tuple]:
        """The parts, of which the stage before has written what it kept, with the flags of its keys."""
        flags, used = np.load(self.folder / f"{number - 1}.flags.npy", mmap_mode="r"), 0
        for part in self.parts:
            size = np.fromfile(self.path(number - 1, part, "sizes"), np.int64).sum()
            yield part, [], np.array(flags[used:used + size])
            used += size

    def do_part(self, job: tuple, number: int) -> str:
        """A stage's steps on a part of the documents: its files are written, that of the counts as the last."""
        part, records, flags = job
        counts, sizes = Counter(), np.zeros(len(records), int)
        files = {kind: bytearray() for kind in ("jsonl", "removed", "keys", "sizes")}
        first, local, last = self.stages[number]
        if number:
            records = map(json.loads, self.path(number - 1, part, "jsonl").read_bytes().splitlines())
            sizes = np.fromfile(self.path(number - 1, part, "sizes"), np.int64)
        for record, flag in zip(records, np.split(flags, np.cumsum(sizes))):
            row = do_document(record, flag, [first, *local], self.o, counts)
            if row:
                files["removed"] += json.dumps(row).encode() + b"\n"
                continue
            if last:
                began = time.process_time()
                keys = KEYS[last](record, self.o)
                files["keys"] += keys.tobytes()
                files["sizes"] += np.int64(len(keys)).tobytes()
                counts[f"{last}/seconds"] += time.process_time() - began
            else:
                domain = re.split("[/?]", normal_url(str(record.get("url") or "")))[0]
                for kind, name in (("language", record.get("language")), ("domain", domain)):
                    counts[f"{kind}/documents/{name or 'unknown'}"] += 1
            files["jsonl"] += json.dumps(record, default=str).encode() + b"\n"
        for kind, content in files.items():
            self.path(number, part, kind).write_bytes(content)
        with bpe.replacing(self.path(number, part)) as file:
            file.write(json.dumps(counts).encode())
        return part

    def do_stage(self, number: int) -> None:
        """All parts of a stage that are not done yet. If a process is killed, they begin again, but only once."""
        for again in (True, False):
            jobs = self.part_jobs(number) if number else self.raw_jobs()
            jobs = (job for job in jobs if not self.path(number, job[0]).exists())
            try:
                done = bpe.parallel(self.do_part, jobs, self.workers, number)
                for parts, _ in enumerate(done, 1):
                    show_live(self.progress(number, parts))
                return show_live("")
            except ChildProcessError:
                if not again:
                    raise
                print("a process was killed, perhaps for want of memory: its part begins again", file=sys.stderr)

    def progress(self, number: int, parts: int) -> str:
        """The live line of a stage: which of the steps it does, and how far it is.

        A stage ends where a step needs the keys of all documents.
        """
        first, local, last = self.stages[number]
        keys = [f"keys of {last}"] * bool(last)
        steps = ", ".join([first, *local, *keys])
        return f"pass {number + 1} of {len(self.stages)}, part {parts:,}: {steps}"

    def find_seen(self, number: int, name: str) -> None:
        """Write for each key of a stage whether it was seen before (of near copies: the first key of each)."""
        done, began, counts = self.folder / f"{number}.json", time.process_time(), Counter()
        if done.exists():
            return
        sizes = [np.fromfile(self.path(number, part, "sizes"), np.int64) for part in self.parts]
        starts = np.append(0, np.cumsum(np.concatenate(sizes)))
        with open(self.folder / "keys", "wb") as file:
            append_files(file, [self.path(number, part, "keys") for part in self.parts])
            file.write(bytes(8))  # an empty file cannot be mapped
        keys = np.memmap(self.folder / "keys", "<u8", "r")
        flags = np.lib.format.open_memmap(self.folder / f"{number}.flags.npy", "w+", bool, keys.shape)
        if name == "dedup":
            for cluster in find_copies(keys, starts, self.o.threshold, self.folder / "bands"):
                flags[starts[cluster[1:]]] = True
                counts[f"dedup/clusters/{len(cluster)} documents"] += 1
        else:
            bloom = Bloom(len(keys), self.o.false_positives)
            for at in range(0, len(keys), BLOCK):  # read, as what is mapped would stay in memory
                block = np.fromfile(self.folder / "keys", "<u8", BLOCK, offset=8 * at)
                flags[at:at + len(block)] = bloom.add(block)
        flags.flush()
        counts[f"{name}/seconds"] = time.process_time() - began
        with bpe.replacing(done) as file:
            file.write(json.dumps(counts).encode())

    def run(self) -> Counter:
        """All steps but tokenise, with --shard those of the first stage; the counts."""
        index, count = shard_of(self.o)
        self.folder.mkdir(exist_ok=True)
        if not self.o.merge:
            self.do_stage(0)
            for group in range(index, len(self.groups), count):
                self.path(0, f"{group:05}", "end").touch()
        for group, files in enumerate(self.groups):
            if count == 1 and not self.path(0, f"{group:05}", "end").exists():
                raise ValueError(f"--merge: no shard has done {files[0]} yet")
        self.parts = sorted(path.stem[2:] for path in self.folder.glob("0-*.json"))
        for number, (_, _, name) in enumerate(self.stages):
            if count == 1 and name:
                self.find_seen(number, name)
                self.do_stage(number + 1)
        counts = Counter()
        for path in sorted(self.folder.glob("*.json")):
            counts.update(json.loads(path.read_bytes()))
        return counts

    def kept(self) -> list[Path]:
        """The files of the documents that all stages keep."""
        return [self.path(len(self.stages) - 1, part, "jsonl") for part in self.parts]

    def write(self, counts: Counter, create: Callable[[str], BinaryIO]) -> None:
        """Write what was kept as documents.jsonl, the beginnings of what was not as removed.jsonl, and leaks."""
        append_files(create("documents.jsonl"), self.kept())
        pairs = itertools.product(range(len(self.stages)), self.parts)
        append_files(create("removed.jsonl"), [self.path(number, part, "removed") for number, part in pairs])
        if "decontaminate" in self.o.steps:
            _, items = evaluation_keys(self.o.eval_data)
            found = {name: counts[f"decontaminate/found/{name}"] for name, _ in items}
            short = [set_of(name) for name, text in items if len(text.split()) < LEAKED[0]]
            report = dict(found=+Counter(found), too_short=Counter(short))  # those above 0
            create("contamination.json").write(json.dumps(report, indent=1).encode())


# --- looking at it


def nested(counts: Counter) -> dict[str, dict]:
    """{"step/in": n, "step/dropped/REASON": n, ...} as {step: {"in": n, "dropped": {reason: n}, ...}}."""
    out = {}
    for name, value in counts.items():
        step, what, *reason = name.split("/", 2)
        row = out.setdefault(step, {})
        row = row.setdefault(what, {}) if reason else row
        row[reason[0] if reason else what] = round(value, 3)
    return out


def table(steps: str, counts: dict[str, dict]) -> list[str]:
    """What each step got, kept and dropped, and why, in lines of up to 80 characters."""
    lines = ["step              documents          kept   share     MB kept   seconds"]
    for name in ["read", *steps.split(",")]:
        row: dict = Counter(counts.get(name, {}))
        if row["in"]:
            lines.append(f"{name:14}{row['in']:13,}{row['kept']:14,}{row['kept'] / row['in']:8.1%}"
                         f"{row['bytes_kept'] / 1e6:12,.1f}{row['seconds']:10,.1f}")
        for what in ("dropped", "masked"):
            for reason, count in Counter(row[what] or {}).most_common():
                lines.append(f"  {what + ': ' + reason:55.55}{count:12,}")
    return lines


PAGE = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>What the steps removed</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>body{font:15px sans-serif;max-width:60em;margin:2em auto}
pre{white-space:pre-wrap;background:#f4f4f4;padding:8px}</style>"""


def write_report(o: Options, manifest: dict) -> None:
    """A page about what each step removed, with examples: no script, nothing from outside, all text escaped."""
    examples, steps = {}, manifest.get("steps", {})
    out = [PAGE, "<h1>What the steps removed</h1>"]

    def add(tag: str, text: object) -> None:
        out.append(f"<{tag}>{html.escape(str(text))}</{tag}>")

    add("pre", "\n".join(table(o.steps, steps)))
    for side in ("train", "val") if "train" in manifest else ():
        row = manifest[side]
        add("p", f"{side}.npy: {row['documents']:,} documents, {row['tokens']:,} tokens")
    with contextlib.suppress(FileNotFoundError), open(Path(o.output) / "removed.jsonl") as removed:
        for row in map(json.loads, removed):
            texts = examples.setdefault(f"{row['step']}: {row['reason']}", [])
            texts += [f"{row['origin']}\n\n{row['text']}".strip()] * (len(texts) < FIRST)
    for step, row in steps.items():
        for what in ("documents", "dropped", "masked", "clusters", "found"):
            counts = Counter(row.get(what, {})).most_common(30)
            if counts:
                add("h2", f"{step}: {what}")
                add("pre", "\n".join(f"{count:12,}  {name}" for name, count in counts))
            for name, _ in counts:
                for text in examples.get(f"{step}: {name}", []):
                    add("h3", name)
                    add("pre", text)
    with bpe.replacing(o.report) as file:
        file.write("\n".join(out).encode("utf-8", "replace"))


def look(files: list[Path], o: Options) -> None:
    """Print random documents as they were read, and behind the steps that look at one document."""
    names = ["read", *o.steps.split(",")]
    steps = [name for name in names if name in STEPS or name in FILTERS]
    drawn = heapq.nsmallest(o.look, read_raw(files, o), lambda record: digests([f"{o.seed} {record['origin']}"])[0])
    for record in drawn:
        before, origin = decode((record["raw"] or b"")[:GLANCE]), record["origin"]
        row = do_document(record, np.zeros(0, bool), steps, o, Counter())
        after = f"dropped by {row['step']}: {row['reason']}" if row else text_of(record)[:GLANCE]
        for title, text in ((origin, before), ("becomes", after)):
            shown = f"--- {title} ".ljust(80, "-") + f"\n{text}"
            print("".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in shown))


# --- a crawl to begin with: the standard library's documentation as the web would have it ----------------------------

# Importing these does something, or opens windows.
NOT_IMPORTED = {"antigravity", "this", "idlelib", "lib2to3", "test", "tkinter", "turtle", "turtledemo"}
FRAME = """<!DOCTYPE html>
<html><head><meta charset="utf-8"><title>{title}</title><script>var visits = 1 < 2;</script></head><body>
<nav><a href="/">Home</a> <a href="/shop">Shop</a> <a href="/login">Sign in</a> <a href="/help">Help</a></nav>
<div class="cookies">We use cookies to improve your visit. <a href="#">Accept all</a> <a href="#">Settings</a></div>
<main>{content}</main><aside><h3>You may also like</h3><a href="/1">Ten tips</a> <a href="/2">Our prices</a></aside>
<footer>Write to webmaster@pages.example or call +1 212 555 0100. <a href="/terms">Terms</a></footer></body></html>
"""


def documented_modules() -> Iterator[ModuleType]:
    """The standard library's modules that can be imported here, and those one level below."""
    names = [name for name in sorted(sys.stdlib_module_names - NOT_IMPORTED) if not name.startswith("_")]
    for name in names:
        with contextlib.suppress(Exception, SystemExit), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is deprecated
            module = importlib.import_module(name)
            below = pkgutil.iter_modules(getattr(module, "__path__", ()))
            names += [f"{name}.{each.name}" for each in below if "." not in name and not each.name.startswith("_")]
            yield module


def documentation(module: ModuleType) -> Iterator[tuple[str, str]]:
    """(name, what is written about it) of a module's own functions and classes."""
    for name, thing in inspect.getmembers(module, lambda thing: inspect.isroutine(thing) or inspect.isclass(thing)):
        if getattr(thing, "__module__", "") == module.__name__ and not name.startswith("_"):
            yield f"{module.__name__}.{name}", inspect.getdoc(thing) or ""


def questions(module: ModuleType) -> Iterator[dict]:
    """A conversation for each of a module's functions and classes whose documentation begins with a sentence."""
    for name, text in documentation(module):
        first = " ".join(text.split("\n\n")[0].split())
        if re.fullmatch(r"[A-Z][^.]{20,160}\.", first):
            yield dict(prompt=f"What does {name} do?", response=first)


def write_crawl(folder: Path) -> None:
    """Write FOLDER/pages.warc.gz and chats.jsonl, and held/*.txt, of modules that are not in the other two.

    The pages are those that pydoc renders, in the middle of what a web site puts around a text. Some stand there twice,
    as on a mirror with another frame; some say nothing: what the steps of a pipeline are for.
    """
    (folder / "held").mkdir(parents=True, exist_ok=True)
    pages, chats = [], []
    for i, module in enumerate(documented_modules()):
        name = module.__name__
        if i % 20 == 3:
            with bpe.replacing(folder / "held" / f"{name}.txt") as file:
                text = "\n\n".join([module.__doc__ or "", *(text for _, text in documentation(module))])
                file.write(text.encode(errors="replace"))
            continue
        content = pydoc.html.docmodule(module)
        pages.append((f"https://docs.example/{name}.html", FRAME.format(title=name, content=content)))
        if i % 7 == 0:
            again = FRAME.format(title=f"{name} (mirror)", content=f"<p>Mirrored page.</p>{content}")
            offer = FRAME.format(title="Sale", content="<p>Buy now! Best price!</p>" * 9)
            pages += [(f"https://mirror.example/{name}", again), (f"https://shop.example/{i}", offer)]
        chats += questions(module)
    head = {"WARC-Type": "response", "Content-Type": "application/http; msgtype=response"}
    head["http"] = "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n"
    write_warc(folder / "pages.warc.gz", (
        ({**head, "WARC-Target-URI": url}, page.encode(errors="replace")) for url, page in pages
    ))
    with bpe.replacing(folder / "chats.jsonl") as file:
        file.writelines(json.dumps(chat).encode() + b"\n" for chat in chats)
    print(f"{folder}/pages.warc.gz: {len(pages):,} pages; {folder}/chats.jsonl: {len(chats):,} questions with answers\n"
          f"next: python data.py --input={folder}/pages.warc.gz --steps={','.join(PATH)} --eval_data={folder}/held "
          "--vocab_size=2048 --val_fraction=0.05 --report=report.html")


PATH = ("extract", "length", "pii", "dedup", "decontaminate", "tokenise")  # steps of the README's path


# --- the whole -------------------------------------------------------------------------------------------------------


def fingerprint(path: str | Path) -> dict:
    """Path, bytes and hash of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(PIECE):
            digest.update(block)
        return {"path": str(path), "bytes": file.tell(), "sha256": digest.hexdigest()}


def earlier(folder: Path, wanted: dict) -> dict:
    """The manifest of an earlier run, if that began from the same (`wanted`) and its files are whole; else {}."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        whole = manifest == manifest | wanted
        for name, size in manifest["files"].items():
            whole &= (folder / name).stat().st_size == size
        return manifest if whole else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


# Options that would be ignored without one of these steps, or at all where token files are made.
OPTIONS_OF = dict(language="language", quality="quality", min_quality="quality", harmful="harmful", ngrams="perplexity",
                  max_harmful="harmful", max_bits="perplexity", threshold="dedup", false_positives="urls exact lines",
                  positive="--train_classifier", negative="--train_classifier", train="--mix", temperature="--mix")


def check_options(o: Options) -> None:
    """Raise ValueError for options that cannot work and steps that are none or in a wrong order, before the work."""
    names = o.steps.split(",")
    known = ["extract", "chat", *FILTERS, "pii", *KEYS, "decontaminate", "tokenise"]
    misplaced = {"extract", "chat"}.intersection(names[1:]) or "tokenise" in names[:-1]
    if misplaced or {"chat", "tokenise"} <= {*names} or not {*names} <= {*known} or len({*names}) < len(names):
        order = "extract or chat first, tokenise last and not of chats, none twice"
        raise ValueError(f"--steps={o.steps}: choose from {','.join(known)}; {order}")
    if o.shard and o.merge or names == ["tokenise"] and (o.shard or o.merge):
        raise ValueError("--shard and --merge are for steps before tokenise, --merge without --shard, after all")
    if ("decontaminate" in names) != bool(o.eval_data):
        raise ValueError("the step decontaminate and --eval_data, the evaluation sets, need each other")
    for option, steps in OPTIONS_OF.items():
        if getattr(o, option) != getattr(Options, option) and not {*steps.split()} & {*names}:
            raise ValueError(f"--{option} does nothing here: it is for {' or '.join(steps.split())}")
    for name in ("val_fraction", "false_positives", "threshold"):
        if not 0 < getattr(o, name) <= 1:
            raise ValueError(f"--{name} must lie between 0 and 1")
    if min(o.workers, o.seed) < 0:
        raise ValueError("--workers and --seed must not be negative")
    if o.tokenizer not in bpe.TRAINERS and not os.path.exists(o.tokenizer):
        raise ValueError(f"--tokenizer={o.tokenizer} is neither a file nor a kind ({', '.join(bpe.TRAINERS)})")
    for name in {*FILTERS}.intersection(names):  # opens its model
        drop_filtered(name, {"text": "a text"}, o)


@contextlib.contextmanager
def claimed(folder: Path, o: Options) -> Iterator[None]:
    """Make a folder and keep other runs out of it, but those of other shards. Raises ValueError if one is in it.

    Its file is not train.py's .lock: a process that closes a file loses all its locks on that file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index, count = shard_of(o)
    try:
        with open(folder / ".data.lock", "w") as lock:
            with contextlib.suppress(ImportError):  # not on Windows
                import fcntl
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, count > 1, index)  # a shard locks one byte, else all
            try:
                yield
            finally:
                if count == 1:
                    os.unlink(lock.name)
    except BlockingIOError:
        raise ValueError(f"another run of data.py works in {folder}") from None
    except OSError as error:
        if error.errno and not error.filename:  # a full disk
            raise OSError(error.errno, error.strerror, str(folder)) from None
        raise


def input_files(o: Options) -> list[Path]:
    """The files of --input; of a folder text alone if nothing but tokenise is done with it, else all that it shows.

    An output folder that lies in an input folder is no input.
    """
    files = []
    for name in o.input.split(",") if o.steps != "tokenise" and o.input else []:
        shown = [path for path in Path(name).rglob("*") if not re.search(r"(^|/)\.", path.relative_to(name).as_posix())]
        bpe.tell_links(shown)
        files += sorted(filter(Path.is_file, shown)) if os.path.isdir(name) else [Path(name)]
    folder = Path(o.output).resolve()
    files = files or bpe.find_files(o.input)
    return [path for path in files if folder not in Path(os.path.realpath(path)).parents]


def tell_markup(files: list[Path], o: Options) -> None:
    """Print a line where there are pages and no step that takes their markup out."""
    pages = [path for path in files if PAGES.search(path.name)]
    first = o.steps.split(",")[0]
    if pages and first not in ("extract", "chat"):
        more = f" and {len(pages) - 1:,} more" * (len(pages) > 1)
        step = f"data.py --steps=extract,{o.steps}"
        print(f"{pages[0]}{more}: the markup stays; {step} takes it out")


def encode_all(corpus: Corpus, o: Options, coder: bpe.Tokenizer | None, create: Callable, workers: int) -> dict:
    """Hold documents out, train the tokenizer unless one is given, write token files; what the manifest says of it."""
    corpus.split(o.val_fraction, o.seed)
    texts = (text for side, text, _ in corpus.sided() if side == 0)
    coder = coder or bpe.train(o.tokenizer, texts, o.vocab_size, o.pattern, workers=workers)
    if bpe.END not in coder.special_tokens:
        raise ValueError(f"--tokenizer={o.tokenizer} has no {bpe.END}, which ends each document")
    began = time.monotonic()
    files = [create("train.npy"), create("val.npy")]
    if o.shuffle:
        with tempfile.TemporaryFile(dir=o.output) as train, tempfile.TemporaryFile(dir=o.output) as val:
            counts = tokenise(corpus, coder, [train, val], workers)
            shuffle(train, files[0], coder, o.seed)
            shuffle(val, files[1], coder, o.seed)
    else:
        counts = tokenise(corpus, coder, files, workers)
    tokens = sum(count["tokens"] for count in counts.values())
    create("tokenizer.json").write(json.dumps(coder.to_dict()).encode())
    return {**counts, "utf8_errors": corpus.counts["utf8_errors"], "bad_lines": corpus.counts["bad_lines"],
            "tokens_per_s": round(tokens / (time.monotonic() - began))}


def prepare(input: str, tokenizer: str, output: str, vocab_size: int, pattern: str = "gpt2", separator: str = "",
            **more: Any) -> dict:
    """Make train.npy, val.npy, tokenizer.json and manifest.json in the folder `output`; the manifest is returned.

    The arguments are the fields of Options. Files of an earlier run with the same input, options and code are reused.
    With steps before tokenise, the parts of a run that ended early are, too. Raises ValueError or OSError, with the old
    files untouched.
    """
    began, folder = time.monotonic(), Path(output)
    o = Options(input, output, tokenizer or "bpe", vocab_size, pattern, separator, **more)
    check_options(o)
    files = input_files(o)
    inputs = [fingerprint(path) for path in files]
    size = sum(file["bytes"] for file in inputs)
    if not size:
        raise ValueError(f"--input={input} holds no text; what lies in --output={output} is left out")
    options = {name: value for name, value in vars(o).items() if name not in FREE}
    beside = [value for value in options.values() if os.path.isfile(str(value))]
    beside += Path(__file__).parent.glob("language.npz")
    for name in filter(None, [o.eval_data, o.tokenizer * os.path.isdir(o.tokenizer)]):
        beside += bpe.find_files(name)
    code = [fingerprint(path)["sha256"] for path in (__file__, bpe.__file__, *beside)]
    wanted = {"options": options, "code": code, "inputs": inputs}
    if manifest := earlier(folder, wanted):
        print(f"{folder}: the files of an earlier run with the same input and options are reused")
        return manifest
    tell_markup(files, o)
    workers = min(o.workers or os.cpu_count(), 1 + size // JOB)
    manifest, written = {}, {}
    with claimed(folder, o):
        coder = None if o.tokenizer in bpe.TRAINERS else bpe.load(o.tokenizer)  # a bad file is told before the work
        if "decontaminate" in o.steps:
            evaluation_keys(o.eval_data)  # so is a bad set, which would drop all documents
        with contextlib.ExitStack() as stack:  # at its end all files take their places

            def create(name: str) -> BinaryIO:
                written[name] = stack.enter_context(bpe.replacing(folder / name))
                return written[name]

            if o.steps != "tokenise":
                work = folder / f"parts-{hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]}"
                pipeline = Pipeline(files, o, work, workers)
                counts = pipeline.run()
                manifest["steps"] = nested(counts)
                print("\n".join(table(o.steps, manifest["steps"])))
                if o.shard:
                    return manifest
                pipeline.write(counts, create)
                files = pipeline.kept()
            if "tokenise" in o.steps:
                manifest |= encode_all(Corpus(files, o.separator), o, coder, create, workers)
            sizes = {name: file.seek(0, os.SEEK_END) for name, file in written.items()}
            (folder / "manifest.json").unlink(missing_ok=True)  # the old one must not vouch for new files
        manifest = {**wanted, **manifest, "seconds": round(time.monotonic() - began, 3), "files": sizes}
        manifest["inputs"] = manifest.pop("inputs")  # many lines, so last
        with bpe.replacing(folder / "manifest.json") as file:
            file.write(json.dumps(manifest, indent=1).encode())
        for path in folder.glob("parts-" + "[0-9a-f]" * 16):  # not what somebody else calls so
            shutil.rmtree(path)
    return manifest


def xz_bits_per_byte(folder: str) -> dict[str, float]:
    """What `xz -9` makes of the held-out documents, in bits per byte: each alone, concatenated, after the training text

    Printed, and returned as xz_bpb, xz_concat_bpb, xz_after_bpb: the baseline of a language model trained on `folder`.
    """
    coder = bpe.load(Path(folder) / "tokenizer.json")

    def documents(side: str) -> list[bytes]:
        tokens, end = np.load(Path(folder) / f"{side}.npy"), coder.special_tokens[bpe.END]
        parts = np.split(tokens, np.flatnonzero(tokens == end) + 1)
        return [coder.decode_bytes(part[part != end].tolist()) for part in parts]

    text, apart = b"".join(documents("train")), documents("val")
    held_out = b"".join(apart)
    with ThreadPoolExecutor(2) as pool:  # lzma works without the interpreter's lock
        tasks = [text + held_out, text, held_out, *apart]
        after, before, together, *alone = pool.map(lambda data: len(lzma.compress(data, preset=9)), tasks)
    sizes = dict(xz_bpb=sum(alone), xz_concat_bpb=together, xz_after_bpb=after - before)
    bits = {name: 8 * size / len(held_out) for name, size in sizes.items()}
    print(f"xz -9 of the same documents: {bits['xz_bpb']:.4f} bits a byte file by file,\n"
          f"  {bits['xz_concat_bpb']:.4f} concatenated, {bits['xz_after_bpb']:.4f} after the training text")
    return bits


def main() -> None:
    o = options(Options, sys.argv[1:])
    if o.crawl:
        return write_crawl(Path(o.crawl))
    if o.mix:
        return mix_sources(o)
    if o.train_language or o.train_classifier or o.train_ngrams:
        return train_filter(o)
    if not o.shard and not o.merge and o.steps != "tokenise":  # under torchrun, or of an array job
        for index, count in (("RANK", "WORLD_SIZE"), ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")):
            shards = int(os.environ.get(count, 1))
            if shards > 1 and index in os.environ:
                o.shard = f"{int(os.environ[index]) % shards}/{shards}"  # an array of n jobs may count from 1
    manifest = prepare(**dataclasses.asdict(o))
    if o.shard:
        print("this shard is done; when all are: the same command with --merge in place of --shard")
        return
    if o.report:
        write_report(o, manifest)
        print(f"{o.report}: a page to read before trusting the data")
    if o.look:
        look(input_files(o), o)
    if "train" not in manifest:
        documents = f"{o.output}/documents.jsonl"
        then = f"align.py --algorithm=sft --data={documents}"
        if "chat" not in o.steps.split(","):  # the output folder itself is no input
            then = f"data.py --input={documents} --output={o.output}/tokens"
        if Path(o.output, "train.npy").exists():
            print(f"{o.output}/train.npy is of an earlier run, with other steps")
        print(f"{manifest['seconds']:.1f} s in all\nnext: python {then}")
        return
    for side in ("train", "val"):
        count = manifest[side]
        print(f"{side}.npy: {count['documents']:,} documents, {count['bytes']:,} bytes, "
              f"{count['tokens']:,} tokens, {count['bytes'] / count['tokens']:.3f} bytes per token")
    for name, what in (("utf8_errors", "places that were not UTF-8 became U+FFFD"),
                       ("bad_lines", "lines were left out: no JSON object with a text")):
        if manifest[name]:
            print(f"{manifest[name]:,} {what}")
    print(f"{manifest['seconds']:.1f} s in all; encoded at {manifest['tokens_per_s']:,} tokens/s")
    print(f"next: python train.py --data={o.output}")


if __name__ == "__main__":
    run(main)
