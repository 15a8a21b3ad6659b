"""Web pages and text become tokens: the main content is extracted, documents are held out and encoded.

Reads:  --input: text files, folders, .jsonl files (field "text"), with --steps=extract,tokenise also .html and WARC
        files; without it the text of Python's standard library
Writes: --output, a folder: train.npy and val.npy (1-D, uint16 or uint32; every document ends with <|endoftext|>),
        tokenizer.json, manifest.json, and documents.jsonl if pages were extracted
Usage:  python data.py --input=stories.txt --separator="<|endoftext|>"
        python data.py --input=crawl.warc.gz --steps=extract,tokenise
        python data.py --train_language=languages.json  (also --train_classifier, --train_ngrams)

The input may be larger than memory: each pass (extract, split, train the tokenizer,
encode) streams it. A second run with the same input and options reuses the
files. Documents are held out by a hash of their content, so that equal ones
are never on both sides; of fewer than 20 documents the last tenth of the text.
"""
import argparse
import array
import bz2
import codecs
import contextlib
import dataclasses
import difflib
import gzip
import hashlib
import html
import http.client
import importlib
import inspect
import ipaddress
import itertools
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
import urllib.request
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import BinaryIO, Callable, Iterable, Iterator

import numpy as np

import bpe

FORMAT = 1  # of the manifest; counts up when files of the same manifest would become different
PIECE = 1 << 20  # characters of the longest piece of a document
STEPS = ("tokenise", "extract,tokenise")
PAGES = re.compile(r"\.(html?|pdf|warc|warc\.wet)(\.(gz|bz2|xz|zst))?$", re.I)  # the files that the step extract is for
JOB = 1 << 22  # characters that a process encodes: bounds memory
FEW = 20  # fewer documents than this are too few to hold out whole ones


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
    steps: str = "tokenise"  # or extract,tokenise: web pages give their main content first
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
    with open(path, "rb") as file:
        for line in file:
            text = line.decode("utf-8", "replace")
            counts["utf8_errors"] += text.count("\ufffd") - line.count("\ufffd".encode())
            try:
                text = json.loads(text)["text"].encode("utf-16-le", "surrogatepass")
                yield text.decode("utf-16-le", "replace"), True  # JSON can spell half of a surrogate pair
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                counts["bad_lines"] += not line.isspace()


@dataclasses.dataclass
class Corpus:
    """The documents of some files, read anew at each pass.

    held[i] is 1 where document i is for validation. Where `border` (in characters from the beginning) lies inside a
    document, this document counts as two.
    """
    files: list[Path]
    separator: str  # between the documents of a file
    size: int  # bytes of all files
    characters: int = 0  # of all documents
    held: bytes = b""
    border: int = 0
    counts: Counter = dataclasses.field(default_factory=Counter)  # of the latest pass: utf8_errors, bad_lines

    def pieces(self, label: str) -> Iterator[tuple[str, bool]]:
        """All documents in pieces (text, whether the document ends here), empty documents left out.

        A piece ends where no pattern looks across, so that it encodes as the whole does; only where a text has no such
        place for long is it cut anywhere. `label` stands in the live line.
        """
        self.counts, errors, at, due = Counter(), {}, 0, 0.0
        for path in self.files:
            plain = path.suffix != ".jsonl"
            parts = bpe.read_parts([path], self.separator, errors) if plain else read_jsonl(path, self.counts)
            rest, begun = "", False
            for text, ends in parts:
                at += len(text)
                rest += text
                place = bpe.CUT.search(rest) if len(rest) > PIECE else None
                end = place.end() if place else len(rest)
                if ends and (rest or begun):
                    yield rest, True
                    rest, begun = "", False
                elif place or end > 4 * PIECE:
                    yield rest[:end], False
                    rest, begun = rest[end:], True
                if time.monotonic() > due:
                    show_live(f"{label} {at / (self.characters or self.size):.0%}")
                    due = time.monotonic() + 0.2
        self.counts["utf8_errors"] += sum(errors.values())
        show_live("")

    def split(self, val_fraction: float, seed: int) -> None:
        """Decide which documents are for validation."""
        salt = hashlib.sha256(f"{seed}\n".encode())
        hashes, starts, digest = array.array("I"), [0], salt.copy()
        for text, ends in self.pieces("reading"):
            digest.update(text.encode())
            self.characters += len(text)
            if ends:
                hashes.append(int.from_bytes(digest.digest()[:4], "big"))
                digest = salt.copy()
                starts += [self.characters] * (len(hashes) < FEW)
        if not hashes:
            raise ValueError(f"the input holds no document ({self.counts['bad_lines']} lines are not JSON with a text)")
        if len(hashes) < FEW:
            print(f"{len(hashes)} documents are fewer than {FEW}: the last tenth of the text is for validation")
            self.border = self.characters * 9 // 10
            self.held = bytes(start >= self.border for start in sorted({*starts[:-1], self.border}))
        else:
            share = np.array(hashes) / 2 ** 32
            # Of a few dozen documents none may lie below the fraction: then the lowest is held out.
            self.held = (share <= max(val_fraction, share.min())).tobytes()
        if len(set(self.held)) < 2:
            raise ValueError("nothing can be held out for validation: the text is too short or all documents are equal")

    def sided(self, label: str) -> Iterator[tuple[int, str, bool]]:
        """As `pieces`, each with the side of its document: (1 for validation, text, whether the document ends here)."""
        document, at = 0, 0
        changed = ValueError("the input changed while it was read: run again")
        for text, ends in self.pieces(label):
            if document == len(self.held):
                raise changed
            inside = self.border - at
            at += len(text)
            if 0 < inside < len(text) + (not ends):
                yield self.held[document], text[:inside], True
                text = text[inside:]
                document += 1
            if text or ends:
                yield self.held[document], text, ends
            document += ends
        if (document, at) != (len(self.held), self.characters):
            raise changed


# --- WARC: web archives (ISO 28500) ----------------------------------------------------------------------------------

RECORD = re.compile(rb"\s*WARC/[\d.]+ *\r?\n((?:(?!WARC/)[^\n]+\n)*?)\r?\n")
LENGTH = re.compile(rb"^content-length:[ \t]*(\d{1,15})\s*$", re.I | re.M)
FIELD = re.compile(r"^([^:\s]+):[ \t]*(.*?)\s*$", re.M)
CODED = re.compile(rb"(?im)^(?:transfer-encoding: *(chunked)|content-encoding: *(gzip|deflate)|content-length:).*\n")
CHUNK = re.compile(rb"\s*([\da-f]{1,8})\b.*\n", re.I)
PACKED = re.compile(rb"\x1f\x8b\x08|BZh[1-9]1AY&SY|\xfd7zXZ\0|\x28\xb5\x2f\xfd")  # how gzip, bz2, xz and zstd begin
HEAD = 1 << 16  # bytes of the longest header of a record; as many of a file are read at a time


@lru_cache
def unpackers() -> tuple[dict[bytes, Callable], tuple[type, ...]]:
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
    held, counts = bytearray(), Counter() if counts is None else counts
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
            headers, payload = dict(FIELD.findall(head[1].decode("utf-8", "replace"))), bytes(held[head.end():end])
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
WIDER = {"iso-8859-1": "cp1252", "us-ascii": "cp1252", "gb2312": "gb18030", "shift_jis": "cp932"}  # as browsers do
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
# A tag that ends the element in which it stands, if that is one of these.
ENDS = {"li": ["li"], "td": ["td", "th"], "th": ["td", "th"], "tr": ["tr", "td", "th"], "dt": ["dd"], "dd": ["dt"]}
# Kinds of blocks, with what stands before the text in Markdown.
KINDS = {f"h{n}": "#" * n + " " for n in range(1, 7)} | {"li": "- ", "blockquote": "> ", "td": "", "th": "", "pre": ""}
BOXES = set("div article main body td".split())  # elements that may hold the whole main content
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
    best = (0.1, "cp1252")
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
    return raw.decode("cp1252", "replace")


@dataclasses.dataclass(eq=False, slots=True)
class Element:
    """An element of a page; sums are over all that lies in it."""
    name: str
    parent: "Element"  # of the outermost one: None
    noise: bool = False  # whether it holds no main content
    block: "Element" = None  # the nearest list item, cell, heading, ...: itself or what it is in
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
    element.block = element
    elements, blocks, words = [element], [], []
    at, linked, link = 0, 0, False
    for tag in itertools.chain(TAG.finditer(page), [None]):
        words.append(page[at:tag.start() if tag else None])
        linked += link and len(words[-1])
        at = tag.end() if tag else at
        end, name, attributes = tag.group(2, 3, 4) if tag else ("/", "html", "")
        name, kind = (name or "").lower(), element.block.name
        if name in BLOCKS:
            text = html.unescape("".join(words))
            text = text if kind == "pre" else " ".join(text.split())
            if text.strip() or element.name in CELLS:  # empty cells count, too
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
            if element.name in ENDS.get(name, ()) or element.name == "p" and name in BLOCKS:
                element = element.parent
            element = Element(name, element, is_noise(name, attributes), element.block)
            element.block = element if name in KINDS else element.block
            elements.append(element)
    return elements, blocks


def to_markdown(blocks: Iterable[tuple[Element, str, int]], most: float) -> str:
    """The text of blocks as Markdown, without those of which more than the share `most` is links.

    Rows of a table and lines of code stay together. Cells with long text are of a table for layout, which is no table.
    """
    out, before, last = [], "", None

    def unit(block):
        element = block[0].block
        return element.parent if element.name in CELLS else element if element.name == "pre" else block

    for _, group in itertools.groupby(blocks, unit):
        cells, lines, linked = {}, [], 0
        for element, text, links in group:
            cells[element.block] = f"{cells.get(element.block, '')} {text}".strip()
            lines += [text] * bool(text)
            linked += links
        kind = element.block.name
        if lines and kind in CELLS and len(cells) > 1 and max(map(len, cells.values())) <= CELL:
            lines = [f"| {' | '.join(cells.values())} |"] + ["|" + "---|" * len(cells)] * (before != "row")
            kind = "row"
        elif not lines or linked > most * sum(map(len, lines)):
            continue
        elif kind == "pre":
            lines = ["```", *(line.strip("\n") for line in lines), "```"]
        else:
            lines[0] = KINDS.get(kind, "") + lines[0]
        tight = element is last or kind == before and kind in ("li", "row")
        out += ["\n" * (2 - tight), "\n".join(lines)]
        before, last = kind, element
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
    while best.parent and best.name not in BOXES:
        best = best.parent  # one long paragraph or section is a part
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

    def found(self, pattern: str) -> int:
        """How often a pattern occurs, in any case."""
        return len(re.findall(pattern, self.text, re.I))

    def found_per_word(self, pattern: str) -> float:
        return self.found(pattern) / max(1, len(self.words))

    def count(self, part: str) -> int:
        return len(getattr(self, part))

    def word_length(self, _: str) -> float:
        return self.ends[-1] / max(1, len(self.words))

    def words_with(self, pattern: str) -> float:
        return sum(map(bool, map(re.compile(pattern).search, self.words))) / max(1, len(self.words))

    def lines_with(self, pattern: str) -> float:
        return sum(map(bool, map(re.compile(pattern).search, self.lines))) / max(1, len(self.lines))

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

    def repeated_characters(self, part: str) -> float:
        """The share of the characters that lie in such lines or paragraphs."""
        return self.repeated(part, len)

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
# "harmful" here; Penedo et al. 2024 (FineWeb), section 3.6.
TABLE = r"""
    length      characters                      count                 text                    200    1000000
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
    c4          curly_brackets                  found                 \{                      0      0
    c4          lorem_ipsum                     found                 lorem\sipsum            0      0
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
    return digits[-1] in (2, 3, 4, 5, 6) and sum(sum(divmod(d << i % 2, 10)) for i, d in enumerate(digits)) % 10 == 0


def is_public(address: str) -> bool:
    """Whether an IP address belongs to somebody: not to a local network, to a test or to documentation."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address).is_global
    return False


def is_phone(number: str) -> bool:
    """Whether digits in groups are written as telephone numbers are, and not as dates or amounts are."""
    sizes, gaps = [*map(len, re.findall(r"\d+", number))], set(re.findall("[ .-]", number))
    american = sizes[-3:] == [3, 3, 4] and number[0] in "123456789" and sum(sizes) <= 11
    national = number[0] == "0" and len(gaps) == 1 and sum(sizes) >= 9
    return 8 <= sum(sizes) <= 15 and (number[0] in "+(" or american or national)


# (pattern, what a match must pass). Each begins where nothing of its kind stands before and repeats a bounded number of
# times, so that the time is linear in any text. Keys come first: their letters may look like something else.
PERSONAL = {
    "key": (r"""-----BEGIN[ ][A-Z ]{0,20}PRIVATE[ ]KEY-----(?:[^-]|-(?!----)){0,9999}(?:-----END[A-Z ]{0,30}-----)?
        | (?<![\w-])(?:(?:AKIA|ASIA)[A-Z\d]{16} | gh[pousr]_[A-Za-z\d]{36,255} | github_pat_\w{22,255} | AIza[\w-]{35}
        | (?:sk|rk|pk)[-_][\w-]{20,255} | xox[abeprs]-[\w-]{10,255} | hf_[A-Za-z]{34} | glpat-[\w-]{20,64}
        | eyJ[\w-]{10,2000}\.[\w-]{10,4000}\.[\w-]{10,2000})(?![\w-])""", bool),
    "email": (r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}(?!\w)", bool),
    "card": (r"(?<![\w.-])(?:\d{4}([ -])\d{4}\1\d{4}\1\d{4}|\d{4}[ -]\d{6}[ -]\d{5}|\d{13,19})(?![\w-])", luhn),
    "ip": (r"(?<![\w.:])(?:(?:\d{1,3}\.){3}\d{1,3}|(?:[\da-fA-F]{0,4}:){2,7}[\da-fA-F]{0,4})(?![\w:]|\.\d)", is_public),
    "phone": (r"""(?<![\w.+-])(?:\+\d{1,3}[ .-]?)?(?:\(\d{1,5}\)[ .-]?)?
        \d{1,12}(?:[ .-]\d{2,8}){0,5}(?![\w-]|[.,]\d)""", is_phone),
}


def mask(kind: str, text: str) -> tuple[str, int]:
    """(The text with <KIND> in place of each of these data, how many there were)."""
    pattern, good = PERSONAL[kind]
    count = 0

    def replace(match: re.Match) -> str:
        nonlocal count
        real = good(match[0])
        count += bool(real)
        return f"<{kind.upper()}>" if real else match[0]

    return re.sub(pattern, replace, text, flags=re.X), count


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
def load_arrays(path: str, kind: type) -> object:
    """Read what save_arrays wrote of a dataclass `kind`. Raises ValueError for another file, OSError for none."""
    with bpe.blaming(f"{path} holds no model of the kind {kind.__name__}"), open(path, "rb") as file:
        try:
            return kind(**{name: array[()] for name, array in np.load(file, allow_pickle=False).items()})
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
    known = {code: " ".join(text for text in languages[code] if codes[text] == 1) for code in sorted(languages)}
    known = {code: text for code, text in known.items() if text.strip()}
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
    weights, squares = np.zeros(1 << 18, np.float32), np.full(1 << 18, 1e-8, np.float32)
    square = 1e-8  # of the offset
    model = Classifier(np.array(["negative", "positive"]), "words", 2, 0.5, weights, 1.0)
    texts = [(model.features(text[:SEEN]), label) for label, kind in enumerate((negative, positive)) for text in kind]
    texts = [(found, label) for found, label in texts if found.size]
    if len({label for _, label in texts}) < 2:
        raise ValueError("texts of both kinds are needed, positive and negative")
    random = np.random.default_rng(seed)
    orders = [random.permutation(len(texts)) for _ in range(3)]
    for batch in itertools.chain(*(np.array_split(order, 1 + len(texts) // 64) for order in orders)):
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
    occurrences at the highest order, below it the different units that stand before. Of each order, from 1 on, there
    are the 64-bit keys of its n-grams, sorted; with each the first term and, for the order above, back(h).
    """
    vocab_size: int
    sizes: np.ndarray  # numbers of n-grams: the next three arrays hold one order after the other
    keys: np.ndarray
    first_terms: np.ndarray
    backs: np.ndarray  # begins with that of the empty history, the last order has none

    def bits(self, units: np.ndarray) -> np.ndarray:
        """-log2 p of each unit after those before it, of shape (N,)."""
        chances = np.full(units.size, 1 / self.vocab_size)
        backs = np.full(units.size + 1, self.backs[0])  # of the history of each unit, and one behind the last
        ends = np.cumsum(self.sizes)
        for n, (start, end) in enumerate(zip(ends - self.sizes, ends), 1):
            wanted = ngram_keys(units.astype(np.uint64), n)
            place = start + np.searchsorted(self.keys[start:end], wanted)
            place = np.minimum(place, end - 1)
            found = self.keys[place] == wanted
            chances[n - 1:] *= backs[:-1]
            chances[n - 1:] += np.where(found, self.first_terms[place], 0)
            if end < len(self.keys):
                backs = np.where(found, self.backs[1 + place], 1)
        return -np.log2(chances)


def train_ngrams(units: np.ndarray, vocab_size: int, order: int) -> NgramModel:
    """Count the n-grams of units (integers, shape (N,)). 10 million and order 6 take half a minute and 3 GB."""
    if not 1 <= order <= units.size:
        raise ValueError(f"{units.size:,} units are too few for {order}-grams")
    units = units.astype(np.uint64)
    keys, first, places = np.unique(ngram_keys(units, order), True, True)
    counts, rows = np.bincount(places), []
    for n in range(order, 0, -1):
        # How much an n-gram seen c = 1, 2, 3 or more times is worth less than c, from how many are seen so often.
        few = np.maximum(1.0, np.bincount(np.minimum(counts, 5), minlength=6)[1:5])
        ratio = few[0] / (few[0] + 2 * few[1])
        less = [c - (c + 1) * ratio * few[c] / few[c - 1] for c in (1, 2, 3)]
        discounts = np.clip(less, 0.1, [0.95, 1.9, 2.85])[np.minimum(counts, 3) - 1]
        shorter, starts, places = np.unique(ngram_keys(units, n - 1), True, True)
        history = places[first]
        total = np.bincount(history, counts, shorter.size)
        back = np.bincount(history, discounts, shorter.size) / np.maximum(1, total)
        rows.insert(0, (keys, (counts - discounts) / total[history], np.where(total, back, 1)))
        counts = np.bincount(places[first + 1], minlength=shorter.size)
        counts = np.maximum(1, counts)  # the text begins with it
        keys, first = shorter, starts
    return NgramModel(vocab_size, np.array([len(row[0]) for row in rows]), *map(np.concatenate, zip(*rows)))


def ngram_bits_per_byte(folder: str | Path, order: int = 6) -> float:
    """Bits per byte of the held-out documents of a folder of token files, by the n-grams of its training tokens."""
    folder = Path(folder)
    with bpe.blaming(f"{folder} holds no whole token files"):
        train, val = np.load(folder / "train.npy"), np.load(folder / "val.npy")
        size = json.loads((folder / "manifest.json").read_bytes())["val"]["bytes"]
    model = train_ngrams(train, bpe.load(folder / "tokenizer.json").vocab_size, order)
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


def filters(o: Options) -> dict[str, Callable[[str], tuple[bool, object]]]:
    """{name: a function text -> (whether to keep it, the rule that it breaks or what was measured)}, by some options.

    Files of models are read when a first text comes, so that a filter can be sent to any process.
    """
    rules = {group: partial(obey, group) for group, *_ in RULES}
    models = {"language": partial(speaks, o.language),
              "quality": partial(rated, o.quality, o.min_quality, 1.0),
              "harmful": partial(rated, o.harmful, 0.0, o.max_harmful),
              "perplexity": partial(surprise, o.ngrams, o.max_bits)}
    return rules | models


FILTERS = filters(Options())


def read_languages(path: Path) -> dict[str, list[str]]:
    """{code: texts} from a JSON file of that form, or from a folder with files code.txt, a text on each line."""
    if path.is_dir():
        return {file.stem: decode(file.read_bytes()).splitlines() for file in path.glob("*.txt")}
    raw = path.read_bytes()
    with bpe.blaming(f"{path} has not the form {{code: [texts]}}"):
        languages = json.loads(raw)
        return {code: [text + "" for text in texts] for code, texts in languages.items()}


def train_filter(o: Options) -> None:
    """Do what one of the options --train_... asks for: the model is written to --output, if that ends in .npz."""
    def texts(input: str) -> Iterator[str]:
        files = bpe.find_files(input)
        corpus = Corpus(files, o.separator, 1 + sum(map(os.path.getsize, files)))
        return (text for text, _ in corpus.pieces("reading"))

    if o.train_language:
        model, name = train_language(read_languages(Path(o.train_language))), "language.npz"
    elif o.train_classifier:
        if not o.positive or not o.negative:
            raise ValueError("--train_classifier needs --positive and --negative, files of texts of two kinds")
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


def encode(batch: list[tuple[int, str, bool]], tokenizer: bpe.Tokenizer) -> list[tuple[np.ndarray, int, int]]:
    """[(side, text, ends)] -> for train and for val (ids, documents that end, bytes of text)."""
    end = np.full(1, tokenizer.special_tokens[bpe.END], tokenizer.dtype)
    ids, documents, size = [[end[:0]], [end[:0]]], [0, 0], [0, 0]
    for (side, text, ends), row in zip(batch, tokenizer.encode_batch([text for _, text, _ in batch], 1)):
        ids[side] += [row, end[:ends]]
        documents[side] += ends
        size[side] += len(text.encode())
    return list(zip(map(np.concatenate, ids), documents, size))


def batches(pieces: Iterable[tuple[int, str, bool]]) -> Iterator[list[tuple[int, str, bool]]]:
    """Pieces in lists of at least JOB characters."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1]) + 1
        if size >= JOB:
            yield batch
            batch, size = [], 0
    yield batch


def read_pages(files: Iterable[Path], counts: Counter) -> Iterator[tuple[int, bytes, bool]]:
    """The web pages in .html and WARC files, as pieces for `batches`; what else a WARC file holds is counted."""
    for path in files:
        for headers, page in read_warc(path, counts) if ".warc" in path.suffixes else [({}, path.read_bytes())]:
            good = headers.get("WARC-Type") in (None, "response", "resource", "conversion") and b"\0" not in page[:1024]
            counts["pages" if good else "other_records"] += 1
            if good:
                yield 0, page, True


def extract_batch(batch: list[tuple[int, bytes, bool]]) -> list[str]:
    """The main content of each page; plain text as it is."""
    return [extract(page) if b"<" in page[:1024] else decode(page) for _, page, _ in batch]


def extract_pages(files: list[Path], folder: Path, workers: int) -> tuple[list[Path], Counter]:
    """Write the main content of all pages to documents.jsonl, and give it in their place; pages = kept + without_text.

    Memory holds one batch a process, whatever the size of the files.
    """
    counts, pages = Counter(), [path for path in files if PAGES.search(path.name)]
    with open(folder / "documents.jsonl", "w", encoding="utf-8") as file:
        for texts in bpe.parallel(extract_batch, batches(read_pages(pages, counts)), workers):
            lines = [json.dumps({"text": text}) + "\n" for text in texts if text.strip()]
            file.writelines(lines)
            counts.update(kept=len(lines), without_text=len(texts) - len(lines))
    return sorted({*files} - {*pages}) + [folder / "documents.jsonl"], counts


def write_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    """The first 128 bytes of a .npy file of one axis; numpy pads them so that any length fits."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": (length,)})


def tokenise(corpus: Corpus, tokenizer: bpe.Tokenizer, folder: Path, workers: int) -> dict[str, Counter]:
    """Write train.npy and val.npy into `folder`; for each the numbers of documents, bytes (of text) and tokens."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    counts = {"train": Counter(), "val": Counter()}
    answers = bpe.parallel(encode, batches(corpus.sided("encoding")), workers, tokenizer)
    with contextlib.closing(answers), open(folder / "train.npy", "wb") as train, open(folder / "val.npy", "wb") as val:
        for file in (train, val):
            write_header(file, dtype, 0)
        for answer in answers:
            for file, count, (ids, documents, size) in zip((train, val), counts.values(), answer):
                if ids.max(initial=0) >= tokenizer.vocab_size:
                    raise ValueError(f"the tokenizer gave id {ids.max()}, its vocabulary has {tokenizer.vocab_size}")
                file.write(ids.astype(dtype).tobytes())
                count.update(documents=documents, bytes=size, tokens=ids.size)  # adds
        for file, count in zip((train, val), counts.values()):
            write_header(file, dtype, count["tokens"])
            file.flush()
            os.fsync(file.fileno())
    return counts


# --- the whole -------------------------------------------------------------------------------------------------------


def fingerprint(path: Path) -> dict:
    """Path, bytes and hash of a file. Raises ValueError if it looks binary."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(PIECE):
            if not size and b"\0" in block[:8192] and path.suffix != ".gz" and not PAGES.search(path.name):
                raise ValueError(f"{path} is binary (a zero byte within its first 8 kB), not text in UTF-8")
            digest.update(block)
            size += len(block)
    return {"path": str(path), "bytes": size, "sha256": digest.hexdigest()}


def earlier(folder: Path, wanted: dict) -> dict:
    """The manifest of an earlier run, if that began from the same (`wanted`) and its files are whole; else {}."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        whole = all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
        return manifest if whole and all(manifest[key] == value for key, value in wanted.items()) else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def check_options(options: dict, workers: int, folder: Path) -> None:
    """Raise ValueError for options that cannot work, before anything is read."""
    tokenizer, kinds = options["tokenizer"], ", ".join(bpe.TRAINERS)
    if tokenizer not in bpe.TRAINERS and not os.path.exists(tokenizer):
        raise ValueError(f"--tokenizer={tokenizer} is neither a file nor a kind ({kinds})")
    if not 0 < options["val_fraction"] < 1 or workers < 0:
        raise ValueError("--val_fraction must lie between 0 and 1, and --workers must not be negative")
    if options["steps"] not in STEPS:
        raise ValueError(f"--steps={options['steps']}: it can be {' or '.join(STEPS)}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output={folder} is a file; it must be a folder")


@contextlib.contextmanager
def rebuilding(folder: Path) -> Iterator[Path]:
    """A new folder inside `folder`. When the block ends well, its files take the place of those outside."""
    part = folder / "new.part"
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    part.mkdir(parents=True)
    try:
        yield part
        # An old manifest must not vouch for new files, so it goes first and the new one comes last.
        (folder / "manifest.json").unlink(missing_ok=True)
        for path in sorted(part.iterdir(), key=lambda path: path.name == "manifest.json"):
            os.replace(path, folder / path.name)
    except OSError as error:
        if error.errno and not error.filename:  # a full disk
            raise OSError(error.errno, error.strerror, str(folder)) from None
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def prepare(input: str, tokenizer: str, output: str, vocab_size: int, pattern: str = "gpt2", separator: str = "",
            val_fraction: float = 0.02, workers: int = 0, seed: int = 0, steps: str = "tokenise") -> dict:
    """Make train.npy, val.npy, tokenizer.json and manifest.json in the folder `output`; the manifest is returned.

    The arguments are the fields of Options. Files of an earlier run with the same input, options and code are reused.
    Raises ValueError or OSError, with the old files untouched.
    """
    began, folder, tokenizer = time.monotonic(), Path(output), tokenizer or "bpe"
    options = {"tokenizer": tokenizer, "vocab_size": vocab_size, "pattern": pattern, "separator": separator,
               "val_fraction": val_fraction, "seed": seed, "steps": steps}
    kind = tokenizer in bpe.TRAINERS
    check_options(options, workers, folder)
    # An output folder that lies in an input folder is no input.
    files = [path for path in bpe.find_files(input) if folder.resolve() not in path.resolve().parents]
    inputs = [fingerprint(path) for path in files]
    size = sum(file["bytes"] for file in inputs)
    if not size:
        raise ValueError(f"--input={input} holds no text")
    code = [fingerprint(Path(path))["sha256"] for path in (__file__, bpe.__file__, *[tokenizer] * (not kind))]
    wanted = {"format": FORMAT, "options": options, "code": code, "inputs": inputs}
    if manifest := earlier(folder, wanted):
        print(f"{folder}: the files of an earlier run with the same input and options are reused")
        return manifest
    workers = min(workers or os.cpu_count(), 1 + size // JOB)
    with rebuilding(folder) as part:
        coder = None if kind else bpe.load(tokenizer)  # a bad file is told before the work
        files, extracted = extract_pages(files, part, workers) if "extract" in steps else (files, {})
        corpus = Corpus(files, separator, size)
        corpus.split(val_fraction, seed)
        texts = (text for side, text, _ in corpus.sided("training the tokenizer") if side == 0)
        coder = coder or bpe.train(tokenizer, texts, vocab_size, pattern, workers=workers)
        if bpe.END not in coder.special_tokens:
            raise ValueError(f"--tokenizer={tokenizer} has no {bpe.END}, which ends each document")
        encoding = time.monotonic()
        counts = tokenise(corpus, coder, part, workers)
        now, tokens = time.monotonic(), sum(count["tokens"] for count in counts.values())
        coder.save(part / "tokenizer.json")
        manifest = {**wanted, **counts, "extract": extracted, "utf8_errors": corpus.counts["utf8_errors"],
                    "bad_lines": corpus.counts["bad_lines"], "seconds": round(now - began, 3),
                    "tokens_per_s": round(tokens / (now - encoding)),
                    "files": {path.name: path.stat().st_size for path in sorted(part.iterdir())}}
        manifest["inputs"] = manifest.pop("inputs")  # many lines, so last
        (part / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
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
    print(f"xz -9 of the same documents: {bits['xz_bpb']:.4f} bits a byte file by file, "
          f"{bits['xz_concat_bpb']:.4f} concatenated, {bits['xz_after_bpb']:.4f} after the training text")
    return bits


def main() -> None:
    o = options(Options, sys.argv[1:])
    if o.train_language or o.train_classifier or o.train_ngrams:
        return train_filter(o)
    manifest = prepare(**{name: getattr(o, name) for name in inspect.signature(prepare).parameters})
    for side in ("train", "val"):
        count = manifest[side]
        print(f"{side}.npy: {count['documents']:,} documents, {count['bytes']:,} bytes, {count['tokens']:,} tokens, "
              f"{count['bytes'] / count['tokens']:.3f} bytes per token")
    for name, what in (("utf8_errors", "places that were not UTF-8 became U+FFFD"),
                       ("bad_lines", "lines were left out: no JSON object with a text")):
        if manifest[name]:
            print(f"{manifest[name]:,} {what}")
    print(f"{manifest['seconds']} s, {manifest['tokens_per_s']:,} tokens/s\nnext: python train.py --data={o.output}")


if __name__ == "__main__":
    run(main)
