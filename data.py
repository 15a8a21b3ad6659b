"""Web pages and text become tokens: the main content is extracted, documents are held out and encoded.

Reads:  --input: text files, folders, .jsonl files (field "text" or "messages"), with other --steps also .html and WARC
        files; without it the text of Python's standard library
Writes: --output, a folder: train.npy and val.npy (1-D, uint16 or uint32; every document ends with <|endoftext|>),
        tokenizer.json, manifest.json; with other steps documents.jsonl, examples.json, contamination.json, the --report
Usage:  python data.py --input=stories.txt --separator="<|endoftext|>"
        python data.py --input=crawl.warc.gz --steps=extract,length,pii,dedup,tokenise --report=report.html --look=3
        SLURM_ARRAY_TASK_ID=0 SLURM_ARRAY_TASK_COUNT=4 python data.py ..., for each of 0 to 3; then data.py ... --merge

The input may be larger than memory: each pass (extract, split, train the tokenizer,
encode) streams it. A second run with the same input and options reuses the
files. Documents are held out by a hash of their content, so that equal ones
are never on both sides; of fewer than 20 documents the last tenth of the text.
"""
import argparse
import array
import contextlib
import csv
import dataclasses
import difflib
import functools
import gzip
import hashlib
import html
import inspect
import itertools
import json
import lzma
import math
import os
import re
import shutil
import sys
import textwrap
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Callable, Iterable, Iterator
from urllib.parse import urlsplit

import numpy as np

import bpe

FORMAT = 1  # of the manifest; counts up when files of the same manifest would become different
PIECE = 1 << 20  # characters of the longest piece of a document
PAGES = re.compile(r"\.(html?|warc|warc\.wet)(\.gz)?$", re.I)  # the files that the step extract is for
JOB = 1 << 22  # characters that a process encodes: bounds memory
FEW = 20  # fewer documents than this are too few to hold out whole ones
FREE = {"input", "output", "workers", "shard", "merge", "report", "look"}  # options that change no file


@dataclasses.dataclass
class Options:
    input: str = ""  # files and folders, a comma list; empty: the text of the standard library
    output: str = "data"  # folder for the token files
    tokenizer: str = "bpe"  # a file, or a kind to train on the training part: bpe, char, byte, word
    vocab_size: int = 8192  # tokens of a tokenizer that is trained here
    pattern: str = "gpt2"  # how a tokenizer that is trained here cuts text before merging
    separator: str = ""  # text between the documents of a file, such as <|endoftext|>; empty: a file is a document
    val_fraction: float = 0.02  # share of the documents that is held out for validation
    workers: int = 0  # processes; 0: one per core
    seed: int = 0  # another seed holds out other documents
    steps: str = "tokenise"  # in this order, such as extract,length,pii,dedup,tokenise (a wrong name lists all)
    shard: str = ""  # i/n: do every n-th part of the input, one machine of n on one folder; then --merge
    merge: bool = False  # go on behind what the shards have done
    threshold: float = 0.8  # dedup: Jaccard similarity of the word 5-grams from which documents are copies
    false_positives: float = 1e-6  # urls, exact, lines: share of the new that is taken for seen
    eval_data: str = ""  # decontaminate: files and folders of evaluation sets (jsonl, csv, txt), a comma list
    max_document_bytes: int = 100000000  # longer documents are dropped
    report: str = ""  # write a page about what each step removed, such as report.html
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
MEMBER = b"\x1f\x8b\x08"  # a gzip member begins
HEAD = 1 << 16  # bytes of the longest header of a record; as many of a file are read at a time


def read_blocks(path: str | Path) -> Iterator[bytes | None]:
    """The bytes of a file in blocks, gzip unpacked; None at a damaged place, behind which the next member follows."""
    with open(path, "rb") as file:
        packed, unpacker = file.peek(3)[:3] == MEMBER, zlib.decompressobj(31)
        while rest := file.read(HEAD):
            if not packed:
                yield rest
            while packed and rest:
                try:
                    unpacker = zlib.decompressobj(31) if unpacker.eof else unpacker
                    yield unpacker.decompress(rest, 16 * HEAD)
                    rest = unpacker.unconsumed_tail or unpacker.unused_data
                except zlib.error:
                    yield None
                    unpacker, at = zlib.decompressobj(31), rest.find(MEMBER, 1)
                    rest = rest[at:] * (at > 0)
        if packed and not unpacker.eof:  # the file was cut
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


def decode(raw: bytes, header: str = "") -> str:
    """Text of bytes, in the character set that a byte order mark, their form, an HTTP header or a <meta> tells."""
    told = CHARSET.search(header.encode() + raw[:4096])
    name = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else told[1].decode().lower() if told else "cp1252"
    with contextlib.suppress(UnicodeDecodeError):
        return raw.decode("utf-8-sig")  # other character sets almost never happen to be UTF-8
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


# --- filters ---------------------------------------------------------------------------------------------------------

# Filters: text -> (whether it is kept, the rule that it broke or the number that was measured).
FILTERS: dict[str, Callable[[str], tuple[bool, object]]] = {
    "length": lambda text: (len(text) >= 100, "under 100 characters"),
}
ADDRESS = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+")
# Masks: text -> (text without what is private, the number of places).
MASKS: dict[str, Callable[[str], tuple[str, int]]] = {"email": lambda text: ADDRESS.subn("<email>", text)}


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


# --- keys of documents: duplicates and evaluation sets -----------------------------------------------------------------
# A document has keys of 64 bits: of its URL, its text, its lines, or its n-grams of words. What has a key that was seen
# before, in an earlier document or in an evaluation set, is dropped. Near copies share many n-grams.

PERMUTATIONS = 128  # of a MinHash signature
GRAM = 5  # words of the n-grams by which near copies are found
LEAKED = (8, 13)  # words of the shortest text of an evaluation set that is looked for, and of the n-grams of longer ones
RANDOM = np.random.default_rng(0)
LETTER = RANDOM.integers(0, 1 << 64, 256, np.uint64)
POWER = np.cumprod(np.full(1 << 17, 0x9E3779B97F4A7C15, np.uint64))
INVERSE = np.cumprod(np.full(1 << 17, pow(0x9E3779B97F4A7C15, -1, 1 << 64), np.uint64))
FACTOR, SHIFT = RANDOM.integers(0, 1 << 32, (2, PERMUTATIONS, 1), np.uint32)
FACTOR |= 1  # odd, so that x -> FACTOR x + SHIFT (mod 2^32) is a permutation
SPACELESS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")  # no spaces between words
TRACKING = re.compile("(utm_|fbclid=|gclid=|msclkid=|mc_[ce]id=|phpsessid=|jsessionid=|sessionid=|ref=)", re.I)
ROWS = 1 << 24  # keys that are sorted at a time


def mixed(keys: np.ndarray) -> np.ndarray:
    """Numbers of 64 bits, scrambled one to one, in place."""
    keys ^= keys >> np.uint64(32)
    keys *= np.uint64(0xD6E8FEB86659FD93)
    keys ^= keys >> np.uint64(29)
    return keys


def grams(text: str, n: int) -> np.ndarray:
    """A key for each n words in a row (for the whole text if it has fewer); words are what white space parts.

    sums[i] = sum of LETTER[byte j] r^j over j < i, so the difference at two places, over r^start, is a hash of the bytes
    between them (Karp and Rabin 1987), for all n-grams at once.
    """
    words = (text if text.isascii() else SPACELESS.sub(r" \g<0> ", text)).split() or [""]
    n, keys = min(n, len(words)), []
    for at in range(0, len(words) - n + 1, 1024):
        part = words[at:at + 1023 + n]
        if sum(map(len, part)) + len(part) > len(POWER) // 4:  # in bytes as many as there are powers
            part = [word[:64] for word in part]
        letters = np.frombuffer(" ".join(part)[:len(POWER) // 4].encode(), np.uint8)
        sums = np.zeros(len(letters) + 1, np.uint64)
        np.cumsum(LETTER[letters] * POWER[:len(letters)], out=sums[1:])
        spaces = np.flatnonzero(letters == 32)
        starts, ends = np.append(0, spaces + 1), np.append(spaces, len(letters))
        starts = starts[:len(starts) - n + 1]
        keys.append((sums[ends[n - 1:]] - sums[starts]) * INVERSE[starts])
    return mixed(np.concatenate(keys))


def digests(texts: Iterable[str]) -> np.ndarray:
    """A key for each text, however long."""
    raw = (hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(raw), "<u8")


def signature(shingles: np.ndarray) -> np.ndarray:
    """The least of a set of keys under each of the permutations, (PERMUTATIONS,) uint32 (Broder 1997)."""
    keys, least = (shingles >> np.uint64(32)).astype(np.uint32), np.full(PERMUTATIONS, 0xFFFFFFFF, np.uint32)
    for at in range(0, len(keys), 512):  # (128, 512) stays in the cache
        values = FACTOR * keys[at:at + 512]
        values += SHIFT
        np.minimum(least, values.min(1), out=least)
    return least


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands b, rows r): the most rows with which 99.5% of the pairs at the threshold share a band.

    Two documents of Jaccard similarity s share one with probability 1 - (1 - s^r)^b (Leskovec et al. 2014, chapter 3).
    """
    rows = [r for r in range(1, 33) if (1 - threshold**r) ** (PERMUTATIONS // r) <= 0.005]
    return PERMUTATIONS // max(rows, default=1), max(rows, default=1)


def near_keys(text: str, threshold: float) -> np.ndarray:
    """The bands of a document's signature, as one key each, and behind them its different 5-grams, sorted."""
    shingles = np.unique(grams(text, GRAM))
    b, r = bands_for(threshold)
    rows = signature(shingles)[:b * r].reshape(b, r).astype(np.uint64)
    return np.concatenate([mixed((rows * POWER[:r]).sum(1, dtype=np.uint64)), shingles])


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Size of the intersection over size of the union of two sets, each sorted."""
    both = np.sort(np.concatenate([a, b]), kind="stable")  # merges the two in linear time
    shared = np.count_nonzero(both[1:] == both[:-1])
    return shared / (len(both) - shared)


def sharing(bands: np.ndarray) -> Iterator[np.ndarray]:
    """Groups of two or more documents, ascending, that have a band in common; bands is (b, documents), and may lie on
    disk: ROWS keys at a time are in memory."""
    for band in bands:
        passes = 1 + len(band) // ROWS
        for residue in range(passes):
            parts = (at + np.flatnonzero(band[at:at + ROWS] % passes == residue) for at in range(0, len(band), ROWS))
            index = np.concatenate([*parts])
            keys = band[index]
            order = np.argsort(keys, kind="stable")
            keys, index = keys[order], index[order]
            same = keys[1:] == keys[:-1]
            found = np.append(same, False) | np.append(False, same)
            cuts = np.flatnonzero(np.diff(keys[found])) + 1
            yield from np.split(index[found], cuts) if found.any() else []


def minhash_pairs(texts: Iterable[str], threshold: float = 0.8) -> list[tuple[int, int, float]]:
    """All pairs (i, j, similarity) of texts whose word 5-grams have a Jaccard similarity of at least the threshold.

    Pairs come from MinHash and LSH (Broder 1997; 128 permutations), which find at least 99% of them; the similarity
    is exact, so no pair is wrong.
    """
    keys = [near_keys(text, threshold) for text in texts]
    b = bands_for(threshold)[0]
    pairs = {pair for group in sharing(np.array([key[:b] for key in keys]).T) for pair in
             itertools.combinations(group.tolist(), 2)}
    scored = ((i, j, jaccard(keys[i][b:], keys[j][b:])) for i, j in sorted(pairs))
    return [pair for pair in scored if pair[2] >= threshold]


class Bloom:
    """A set of keys in -log2(rate) / ln 2 bits each, which says of a new key that it is known with probability `rate`
    once `count` keys are in it (Bloom 1970)."""

    def __init__(self, count: int, rate: float):
        self.size = 64 + math.ceil(-count * math.log(rate) / math.log(2) ** 2)  # bits
        self.probes = max(1, round(-math.log2(rate)))
        self.bits = np.zeros(self.size // 8 + 1, np.uint8)

    def places(self, keys: np.ndarray, probe: int) -> tuple[np.ndarray, np.ndarray]:
        """Byte and bit of the keys for one of the probes: hash1 + probe hash2 (Kirsch and Mitzenmacher 2006)."""
        place = (keys + np.uint64(probe) * (mixed(keys.copy()) | np.uint64(1))) % np.uint64(self.size)
        return place >> np.uint64(3), np.uint8(1) << (place & np.uint64(7)).astype(np.uint8)

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Put keys in; for each whether it was known, or stands earlier among them."""
        known = np.ones(len(keys), bool)
        known[np.unique(keys, return_index=True)[1]] = False
        left = np.flatnonzero(~known)
        for probe in range(self.probes):  # of the new ones half are out after each probe
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
        port = "" if parts.port in (None, 80, 443) else f":{parts.port}"
    except ValueError:  # as http://[
        return url
    query = "&".join(sorted(word for word in parts.query.split("&") if not TRACKING.match(word)))
    host = (parts.hostname or "").removeprefix("www.").rstrip(".")
    return f"{host}{port}{parts.path.rstrip('/')}?{query}".rstrip("?")


def letters_of(text: str) -> str:
    """Letters and digits alone, in small letters: what is compared with evaluation sets."""
    return " ".join(re.findall(r"\w+", text.lower()))


def read_evaluation(path: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of each field of a file of an evaluation set: rows of jsonl, of csv (MMLU's), paragraphs of text."""
    with bpe.opened(path, "rt", encoding="utf-8", errors="replace", newline="") as file:
        if ".jsonl" in path.suffixes:
            rows = (json.loads(line) for line in file if line.strip())
        elif ".csv" in path.suffixes:
            rows = (dict(zip(("question", *["answer"] * (len(row) - 1)), row)) | {"answer": row[1:]}
                    for row in csv.reader(file))
        else:
            rows = ({"text": text} for text in file.read().split("\n\n"))
        for number, row in enumerate(rows):
            for field, value in row.items():
                texts = value if isinstance(value, list) else [value]
                yield from ((f"{number} {field}", text) for text in texts if isinstance(text, str))


@functools.lru_cache(1)
def evaluation_keys(eval_data: str) -> tuple[dict, list[tuple[str, str, bool]]]:
    """({n: (sorted keys, the item of each)}, [(file, "number field", whether it has keys) of each item]) of some evaluation sets.

    An item of LEAKED[1] words or more has its n-grams of that many words, a shorter one itself; (Brown et al. 2020,
    appendix C). Those below LEAKED[0] words would be found everywhere, and have none.
    """
    items, parts = [], {}
    for path in bpe.find_files(eval_data):
        with bpe.blaming(f"--eval_data: {path} is damaged"):
            for name, text in read_evaluation(path):
                text = letters_of(text)
                n = min(len(text.split()), LEAKED[1])
                if n >= LEAKED[0]:
                    keys = grams(text, n)
                    parts.setdefault(n, []).append((keys, np.full(len(keys), len(items))))
                items.append((path.name, name, n >= LEAKED[0]))
    tables = {}
    for n, rows in parts.items():
        keys, owners = map(np.concatenate, zip(*rows))
        order = np.argsort(keys)
        tables[n] = keys[order], owners[order]
    return tables, items


# --- the pipeline ------------------------------------------------------------------------------------------------------
# Documents are records, dicts with "text" (or "messages"), "origin", "url" and what steps add. The steps are cut into
# stages: what looks at one document alone runs in one pass, in parallel; behind it the keys of all documents are compared.
# The input is cut into parts, and a file for each part and stage lies on disk, so a run that was killed goes on.

PART = 1 << 26  # bytes of documents, as they are read, in a part
FIRST = 4  # examples that are kept of what a step removes for one reason
SAMPLE = 64  # random documents that are kept for --look
GLANCE = 2000  # characters that are kept of an example


def places(record: dict) -> list[tuple[dict, str]]:
    """Where the text of a record stands, as (dict, key): in "text", or in each of its messages."""
    return [(record, "text")] if "text" in record else [(message, "content") for message in record["messages"]]


def text_of(record: dict) -> str:
    """All text of a record."""
    return "\n\n".join(holder[key] for holder, key in places(record))


def size_of(record: dict) -> int:
    """Bytes of a record's text, or of what was read."""
    return len(record["raw"]) if "raw" in record else len(text_of(record).encode())


def read_record(record: dict, o: Options, notes: "Notes") -> str:
    """What was read becomes text; the fields of a row of jsonl stay."""
    kind, raw, header = (record.pop(key) for key in ("kind", "raw", "header"))
    if kind != "row":
        record |= {"text": decode(raw, header), "markup": kind == "page"}
        return ""
    try:
        row = {"origin": record["origin"]} | json.loads(raw.decode("utf-8", "replace"))
        record.clear()
        record |= row
        for holder, key in places(record):  # JSON can spell half of a surrogate pair
            holder[key] = bpe.well_formed(holder[key])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "no JSON with text or messages"
    return ""


def extract_page(record: dict, o: Options, notes: "Notes") -> str:
    """A page becomes its main content; other records stay."""
    if record.get("markup") and "<" in record["text"][:1024]:
        record["text"] = extract(record["text"])
    return "" if text_of(record).strip() else "no text"


def mask_all(record: dict, o: Options, notes: "Notes") -> str:
    """Masks take the place of what is private."""
    for name, mask in MASKS.items():
        for holder, key in places(record):
            holder[key], count = mask(holder[key])
            notes.counts[f"pii/masked/{name}"] += count
    return ""


def decontaminate(record: dict, o: Options, notes: "Notes") -> str:
    """A document that shares an n-gram with an evaluation set is dropped; each item that it shares one with is noted."""
    tables, items = evaluation_keys(o.eval_data)
    text, hits = letters_of(text_of(record)), set()
    for n, (keys, owners) in tables.items():
        found = grams(text, n)
        left, right = np.searchsorted(keys, found), np.searchsorted(keys, found, "right")
        for i in np.flatnonzero(right > left):
            hits.update(owners[left[i]:right[i]].tolist())
    for hit in hits:
        notes.counts["decontaminate/found/" + " ".join(items[hit][:2])] += 1
    return f"in {items[min(hits)][0]}" if hits else ""


# Steps that look at one document: they change the record in place, and give the reason why it is dropped, or "".
STEPS: dict[str, Callable[[dict, Options, "Notes"], str]] = {
    "read": read_record, "extract": extract_page, "pii": mask_all, "decontaminate": decontaminate}
# Steps that look at all documents: the keys of one.
KEYS: dict[str, Callable[[dict, Options], np.ndarray]] = {
    "urls": lambda record, o: digests([normal_url(record["url"])] if record.get("url") else []),
    "exact": lambda record, o: digests([" ".join(text_of(record).split())]),
    "lines": lambda record, o: digests(" ".join(line.split()) for holder, key in places(record)
                                       for line in holder[key].split("\n")),
    "dedup": lambda record, o: near_keys(text_of(record), o.threshold),
}


def stages(steps: str) -> list[tuple[str, list[str], str]]:
    """The steps as passes (whose keys decide first, steps on one document, whose keys are noted at the end)."""
    out, before, local = [], "", []
    for name in steps.split(","):
        if name in KEYS:
            out.append((before, local, name))
            before, local = name, []
        elif name != "tokenise":
            local.append(name)
    return [*out, (before, local, "")]


def check_steps(o: Options) -> None:
    """Raise ValueError for steps that are none, or stand in a wrong order."""
    names, known = o.steps.split(","), ["extract", *FILTERS, "pii", *KEYS, "decontaminate", "tokenise"]
    if {*names} - {*known} or len({*names}) < len(names) or {"extract", "tokenise"} & {*names[1:-1]} \
            or len(names) > 1 and ("extract" == names[-1] or "tokenise" == names[0]):
        raise ValueError(f"--steps={o.steps}: choose from {', '.join(known)}; extract comes first, tokenise last, "
                         "and none twice")
    if "decontaminate" in names and not o.eval_data:
        raise ValueError("the step decontaminate needs --eval_data, the evaluation sets")
    if not 0 < o.false_positives < 1 or not 0 < o.threshold <= 1 or o.max_document_bytes < 1 or o.look < 0:
        raise ValueError("--threshold and --false_positives lie between 0 and 1, --max_document_bytes above 0, "
                         "--look not below")


@dataclasses.dataclass
class Notes:
    """What steps did to some documents."""
    # step/in, step/kept, step/dropped/REASON, step/bytes_in, step/bytes_kept, step/seconds, ...
    counts: Counter = dataclasses.field(default_factory=Counter)
    examples: dict = dataclasses.field(default_factory=dict)  # step/reason -> the first texts that were dropped
    sample: list = dataclasses.field(default_factory=list)  # of random documents [a random number, origin, fate, text]

    def add(self, counts: dict, examples: dict, sample: list) -> None:
        """Take in the notes on the documents that follow."""
        self.counts.update(counts)
        for reason, texts in examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + texts)[:FIRST]
        self.sample = sorted(self.sample + sample)[:SAMPLE]

    def drop(self, step: str, reason: str, origin: str, text: str) -> None:
        """A document is dropped."""
        self.counts[f"{step}/dropped/{reason}"] += 1
        row = [int(digests([origin])[0]), origin, f"dropped by {step}: {reason}", text[:GLANCE]]
        self.add({}, {f"{step}/{reason}": [text[:GLANCE]]}, [row])

    def keep(self, record: dict) -> None:
        """A document has come through all steps."""
        where = {"language": record.get("language"), "domain": normal_url(record.get("url") or "").split("/")[0]}
        self.counts.update(f"{kind}/documents/{name}" for kind, name in where.items() if isinstance(name, str) and name)
        text, origin = text_of(record), str(record.get("origin"))
        self.add({}, {}, [[int(digests([origin])[0]), origin, "kept", text[:GLANCE]]])

    def steps(self) -> dict[str, dict]:
        """The counts as {step: {"in": n, "kept": n, "dropped": {reason: n}, ...}}."""
        out = {}
        for name, value in self.counts.items():
            step, what, *reason = name.split("/", 2)
            inner = out.setdefault(step, {}).setdefault(what, {}) if reason else out.setdefault(step, {})
            inner[reason[0] if reason else what] = round(value, 3)
        return out


def cut_at(between: bytes, blocks: Iterable[bytes | None], most: int, broken: Counter) -> Iterator[bytes]:
    """What stands between separators (if that is b"": the whole), without what is blank.

    Of what is longer than `most` bytes no more than these are given. Damaged places are counted in broken["broken"].
    """
    held, searched, ends = bytearray(), 0, False  # ends: the document was given, its rest is passed over
    for block in itertools.chain(blocks, [between]):
        broken["broken"] += block is None
        held += block or b""
        while between and (end := held.find(between, searched)) >= 0:
            if held[:end].strip() and not ends:
                yield bytes(held[:min(end, most)])
            del held[:end + len(between)]
            searched, ends = 0, False
        searched = max(0, len(held) + 1 - len(between or b"."))
        if len(held) > most:
            if not ends:
                yield bytes(held[:most])
            del held[:searched]
            searched, ends = 0, True
    if held.strip() and not ends:
        yield bytes(held)


def read_raw(files: Iterable[Path], o: Options, notes: Notes) -> Iterator[dict]:
    """What files hold, as records with "kind" (page, row of jsonl, text), "raw" (bytes), "header" (of HTTP), "origin".

    What is damaged, too long or no document is dropped and counted in notes.
    """
    for path in files:
        kind = "page" if PAGES.search(path.name) else "row" if ".jsonl" in path.suffixes else "text"
        between, broken = {"row": b"\n", "text": o.separator.encode()}.get(kind, b""), Counter()
        if ".warc" in path.suffixes:
            found = read_warc(path, broken, o.max_document_bytes)
        else:
            found = (({}, raw) for raw in cut_at(between, read_blocks(path), o.max_document_bytes, broken))
        for number, (headers, raw) in enumerate(itertools.chain(found, [({}, None)])):
            lost = broken.pop("broken", 0)
            notes.counts.update({"read/in": lost, "read/dropped/damaged": lost} if lost else {})
            reason = ""
            if headers.get("WARC-Type") not in (None, "response", "resource", "conversion"):
                reason = "record of another type"
            elif len(raw or b"") >= o.max_document_bytes:
                reason = "longer than max_document_bytes"
            elif b"\0" in (raw or b"")[:1024] and raw[:2] not in (b"\xff\xfe", b"\xfe\xff"):
                reason = "binary"
            if reason:
                notes.counts["read/in"] += 1
                notes.drop("read", reason, f"{path}#{number}", headers.get("WARC-Target-URI", ""))
            elif raw is not None:
                yield {"origin": f"{path}#{number}", "url": headers.get("WARC-Target-URI", ""), "kind": kind, "raw": raw,
                       "header": headers.get("http", "")}


def by_keys(name: str, record: dict, flags: np.ndarray) -> str:
    """Drop what has been seen before, as the flags of a document's keys say: lines, or the whole."""
    if name != "lines":
        return {"dedup": "near copy"}.get(name, "seen before") * bool(flags.any())
    for holder, key in places(record):
        lines = holder[key].split("\n")
        known, flags = flags[:len(lines)], flags[len(lines):]
        holder[key] = "\n".join(line for line, seen in zip(lines, known) if not seen or not line.strip()).strip("\n")
    return "" if text_of(record).strip() else "all lines seen before"


def take_step(name: str, record: dict, flags: np.ndarray, o: Options, notes: Notes) -> str:
    """Do a step on a record, in place; the reason why it is dropped, or ""."""
    if name in KEYS:
        return by_keys(name, record, flags)
    if name in STEPS:
        return STEPS[name](record, o, notes)
    keep, value = FILTERS[name](text_of(record))
    record[name] = value
    return "" if keep else value if isinstance(value, str) else name


def do_document(record: dict, flags: np.ndarray, steps: list[str], o: Options, notes: Notes) -> dict | None:
    """A document goes through steps; None if it is dropped. Whatever it does to a step, it is dropped and counted."""
    for step in steps:
        began, text = time.process_time(), ""
        notes.counts.update({f"{step}/in": 1, f"{step}/bytes_in": size_of(record)})
        try:
            text = "" if step == "read" else text_of(record)
            reason = take_step(step, record, flags, o, notes)
        except Exception as error:  # of a filter that was not made for such a text
            reason = f"error {type(error).__name__}"
        notes.counts[f"{step}/seconds"] += time.process_time() - began
        if reason:
            notes.drop(step, reason, record.get("origin", "?"), text)
            return None
        notes.counts.update({f"{step}/kept": 1, f"{step}/bytes_kept": size_of(record)})
    return record


def do_batch(job: tuple, given: str) -> tuple[tuple, bytes, np.ndarray, np.ndarray, Notes]:
    """A stage's steps on a batch: (its part, lines of JSON, keys, number of keys of each document, notes)."""
    part, records, flags, sizes, notes = job
    number, words = json.loads(given)
    o, lines, keys = Options(**words), [], [np.zeros(0, "<u8")]
    first, local, last = stages(o.steps)[number]
    steps = [first] * (number > 0) + ["read"] * (number == 0) + local
    for record, flag in zip(records, np.split(flags, np.cumsum(sizes))):
        record = do_document(json.loads(record) if number else record, flag, steps, o, notes)
        if record is None:
            continue
        record.pop("markup", None)
        if last:
            keys.append(KEYS[last](record, o))
        else:
            notes.keep(record)
        lines.append(json.dumps(record, default=str) + "\n")
    return part, "".join(lines).encode(), np.concatenate(keys), np.array([*map(len, keys[1:])], np.int64), notes


# --- the parts of a run on disk


def shard_of(o: Options) -> tuple[int, int]:
    """(i, n) of --shard=i/n; (0, 1) without."""
    found = re.fullmatch(r"(\d+)/(\d+)", o.shard or "0/1")
    if not found or not int(found[1]) < int(found[2]):
        raise ValueError(f"--shard={o.shard}: write i/n, such as 0/4, with i from 0 to n - 1")
    return int(found[1]), int(found[2])


def finished(work: Path, group: int) -> tuple[list[str], bool]:
    """The parts of a group of files that are done, up to the first that is not; whether that are all."""
    names = []
    for piece in itertools.count():
        path = work / f"0-{group:05}.{piece:04}.json"
        if not path.exists():
            return names, False
        names.append(path.stem[2:])
        if json.loads(path.read_bytes())["last"]:
            return names, True


def raw_jobs(groups: list[list[Path]], o: Options, work: Path) -> Iterator[tuple]:
    """The input in batches for the first stage, without the parts that are done or another machine's."""
    index, count = shard_of(o)
    for group, files in enumerate(groups):
        if finished(work, group)[1] or len(groups) >= count and group % count != index:
            continue
        notes, batch, held, total, piece = Notes(), [], 0, 0, 0
        for record in itertools.chain(read_raw(files, o, notes), [None]):
            batch += [record] * (record is not None)
            held += len(record["raw"]) if record else JOB
            if held < JOB:
                continue
            total += held
            ends, name = record is None or total >= PART, f"{group:05}.{piece:04}"
            if not (work / f"0-{name}.json").exists() and (len(groups) >= count or piece % count == index):
                none = np.zeros(len(batch), np.int64)
                yield (name, ends, record is None), batch, none[:0], none, Notes(**vars(notes))
            notes.__init__()
            batch, held, total, piece = [], 0, total * (not ends), piece + ends


def part_jobs(number: int, parts: list[str], work: Path) -> Iterator[tuple]:
    """What the stage before kept, in batches, with what was found out about its keys; without the parts that are done."""
    for name in parts:
        if (work / f"{number}-{name}.json").exists():
            continue
        sizes, at, used = np.fromfile(work / f"{number - 1}-{name}.sizes", np.int64), 0, 0
        flags = np.fromfile(work / f"{number - 1}-{name}.flags", bool)
        with open(work / f"{number - 1}-{name}.jsonl", "rb") as file:
            lines = [b""]
            while lines:
                lines = file.readlines(JOB)
                count = sizes[at:at + len(lines)]
                yield (name, not lines, not lines), lines, flags[used:used + count.sum()], count, Notes()
                at, used = at + len(lines), used + count.sum()


def do_stage(number: int, jobs: Callable[[], Iterator], o: Options, work: Path, workers: int) -> None:
    """Do the jobs of a stage; for each part four files, of which the notes come last: they say that it is done.

    If a process is killed, the parts that it left are done once more. Raises ChildProcessError if that happens again.
    """
    given = json.dumps([number, dataclasses.asdict(o)])
    for again in (True, False):
        try:
            written, notes = "", Notes()
            for (name, ends, last), lines, keys, sizes, more in bpe.parallel(do_batch, jobs(), workers, given):
                notes = notes if name == written else Notes()
                notes.add(**vars(more))
                for kind, content in (("jsonl", lines), ("keys", keys.tobytes()), ("sizes", sizes.tobytes())):
                    with open(work / f"{number}-{name}.{kind}", "ab" if name == written else "wb") as file:
                        file.write(content)
                        if ends:
                            file.flush()
                            os.fsync(file.fileno())
                written = "" if ends else name
                show_live(f"stage {number + 1} of {len(stages(o.steps))}, part {name}")
                if ends:
                    with bpe.replacing(work / f"{number}-{name}.json") as file:
                        file.write(json.dumps({"last": last, **vars(notes)}).encode())
            show_live("")
            return
        except ChildProcessError:
            if not again:
                raise
            print("a process was killed, perhaps for want of memory: what it did is done again", file=sys.stderr)


def find_copies(parts: list[str], work: Path, o: Options) -> tuple[list[np.ndarray], list[list[int]]]:
    """(first document of each part, clusters of near copies, as numbers of documents, the one to keep first).

    Kept is the copy with the most different 5-grams, of equal ones the earliest. A cluster is what verified pairs
    connect. The keys stay on disk; memory holds some 40 bytes a document.
    """
    b, files, starts = bands_for(o.threshold)[0], [], []
    for name in parts:
        sizes = np.fromfile(work / f"{name}.sizes", np.int64)
        starts.append(np.append(0, np.cumsum(sizes)))
        empty = not sizes.any()
        files.append(np.zeros(0, "<u8") if empty else np.memmap(work / f"{name}.keys", "<u8", "r"))
    first = np.cumsum([0] + [len(start) - 1 for start in starts])
    bands = np.lib.format.open_memmap(work / "bands.npy", "w+", "<u8", (b, first[-1]))
    for at, start, keys in zip(first, starts, files):
        bands[:, at:at + len(start) - 1] = keys[start[:-1] + np.arange(b)[:, None]]
    parent = np.arange(first[-1])

    def shingles(i: int) -> np.ndarray:
        part = np.searchsorted(first, i, "right") - 1
        return files[part][starts[part][i - first[part]] + b:starts[part][i - first[part] + 1]]

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return int(i)

    for group in sharing(bands):
        members = {}  # root -> documents of this group; one is compared until a document of a root is near
        for i in group.tolist():
            for other in [other for other in members if other != root(i)]:
                if any(jaccard(shingles(i), shingles(j)) >= o.threshold for j in members[other]):
                    members.setdefault(root(i), []).extend(members.pop(other))
                    parent[other] = root(i)
            members.setdefault(root(i), []).append(i)
    clusters = {}
    for i in np.flatnonzero(parent != np.arange(len(parent))).tolist():
        clusters.setdefault(root(i), [root(i)]).append(i)
    return first, [sorted(cluster, key=lambda i: (-len(shingles(i)), i)) for cluster in clusters.values()]


def find_seen(number: int, name: str, parts: list[str], o: Options, work: Path) -> None:
    """Write for each part of a stage which of its keys were seen before (of near copies: the first key of each)."""
    done, began, clusters = work / f"{number}.json", time.process_time(), []
    parts = [f"{number}-{part}" for part in parts]
    if done.exists():
        return
    if name == "dedup":
        first, clusters = find_copies(parts, work, o)
        copies = np.sort(np.array([i for cluster in clusters for i in cluster[1:]], np.int64))
    else:
        bloom = Bloom(sum((work / f"{part}.keys").stat().st_size for part in parts) // 8, o.false_positives)
    for at, part in enumerate(parts):
        sizes, keys = np.fromfile(work / f"{part}.sizes", np.int64), np.fromfile(work / f"{part}.keys", "<u8")
        flags = np.zeros(len(keys), bool)
        if name == "dedup":
            here = copies[np.searchsorted(copies, first[at]):np.searchsorted(copies, first[at + 1])] - first[at]
            flags[(np.cumsum(sizes) - sizes)[here]] = True
        else:
            for start in range(0, len(keys), 1 << 16):
                flags[start:start + (1 << 16)] = bloom.add(keys[start:start + (1 << 16)])
        flags.tofile(work / f"{part}.flags")
    shown = []
    for cluster in sorted(clusters, key=len)[:-9:-1]:
        texts = []
        for i in cluster[:FIRST]:
            at = np.searchsorted(first, i, "right") - 1
            with open(work / f"{parts[at]}.jsonl", "rb") as file:
                texts.append(text_of(json.loads(next(itertools.islice(file, int(i - first[at]), None))))[:GLANCE])
        shown.append([len(cluster), texts])
    with bpe.replacing(done) as file:
        file.write(json.dumps({"clusters": shown, "seconds": time.process_time() - began}).encode())


def work_through(files: list[Path], o: Options, work: Path, workers: int) -> tuple[list[Path], Notes, list]:
    """All steps but tokenise: (files of what is kept, notes on what is not, the largest clusters of copies)."""
    work.mkdir(exist_ok=True)
    index, count = shard_of(o)
    groups, size = [[]], 0
    for path in files:  # of many small files some make a group
        size += path.stat().st_size
        groups[-1].append(path)
        if size >= PART:
            groups, size = [*groups, []], 0
    groups = [group for group in groups if group]
    plan, notes, clusters = stages(o.steps), Notes(), []
    for number, (_, _, last) in enumerate(plan):
        if number == 0 and not o.merge:
            do_stage(0, lambda: raw_jobs(groups, o, work), o, work, workers)
        elif number:
            do_stage(number, lambda: part_jobs(number, parts, work), o, work, workers)
        if number == 0:
            done = [finished(work, group) for group in range(len(groups))]
            parts = [name for names, _ in done for name in names]
            lacking = [group for group, (_, whole) in enumerate(done) if not whole]
            if lacking and count == 1:
                raise ValueError(f"--merge: the shards have not done all of {groups[lacking[0]][0]} yet")
        if count == 1 and last:
            find_seen(number, last, parts, o, work)
            found = json.loads((work / f"{number}.json").read_bytes())
            clusters += found["clusters"]
            notes.counts[f"{last}/seconds"] += found["seconds"]
        for path in sorted(work.glob(f"{number}-*.json")):
            meta = json.loads(path.read_bytes())
            notes.add(meta["counts"], meta["examples"], meta["sample"])
        if count > 1:
            return [], notes, []
    return [work / f"{len(plan) - 1}-{name}.jsonl" for name in parts], notes, clusters


# --- looking at it


def table(steps: dict[str, dict]) -> list[str]:
    """What each step got, kept and dropped, for what reasons, in lines of up to 80 characters."""
    lines = [f"{'step':26}{'documents':>12}{'kept':>12}{'share':>8}{'MB kept':>11}{'seconds':>11}"]
    for name, row in steps.items():
        if "in" in row:
            lines.append(f"{name:26}{row['in']:>12,}{row.get('kept', 0):>12,}{row.get('kept', 0) / row['in']:>8.1%}"
                         f"{row.get('bytes_kept', 0) / 1e6:>11,.1f}{row.get('seconds', 0):>11,.1f}")
        for what in ("dropped", "masked", "removed"):
            for reason, count in sorted(row.get(what, {}).items(), key=lambda pair: -pair[1]):
                lines.append(f"  {f'{what}: {reason}':<48.48}{-count:>12,}")
    return lines


PAGE = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>What the steps removed</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>body{font:15px sans-serif;max-width:60em;margin:2em auto;padding:0 1em}
td,th{padding:2px 12px;text-align:right}td:first-child,th:first-child{text-align:left}
pre{white-space:pre-wrap;background:#f4f4f4;padding:8px;max-height:14em;overflow:auto;font-size:12px}
i{display:inline-block;height:10px;background:#47c}</style>"""


def bars(title: str, counts: dict[str, int]) -> str:
    """A table of numbers with bars, the largest first, as HTML."""
    top = sorted(counts.items(), key=lambda pair: -pair[1])[:25]
    rows = [f"<tr><td>{html.escape(name)}<td>{count:,}<td style='text-align:left'><i style='width:"
            f"{300 * count / max(1, top[0][1]):.0f}px'></i>" for name, count in top]
    return f"<h2>{html.escape(title)}</h2><table>{''.join(rows)}</table>" if rows else ""


def write_report(path: str, manifest: dict, found: dict) -> None:
    """A page about what each step removed, with examples: no script, nothing from outside, all text escaped."""
    steps, quoted = manifest["steps"], lambda text: f"<pre>{html.escape(text)}</pre>"
    out = [PAGE, "<h1>What the steps removed</h1>", quoted("\n".join(table(steps)))]
    out += [f"<p>{side}.npy: {manifest[side]['documents']:,} documents, {manifest[side]['tokens']:,} tokens</p>"
            for side in ("train", "val") if side in manifest]
    for title in ("language", "domain"):
        out.append(bars(f"Kept, by {title}", steps.get(title, {}).get("documents", {})))
    for name, row in steps.items():
        out.append(bars(f"{name}: dropped", row.get("dropped", {})))
        for reason in row.get("dropped", {}):
            texts = [text for text in found["examples"].get(f"{name}/{reason}", []) if text]
            out += [f"<h3>{html.escape(f'{name}: {reason}')}</h3>" * bool(texts), *map(quoted, texts)]
    out += ["<h2>The largest clusters of near copies; the first is kept</h2>"] * bool(found["clusters"])
    for size, texts in found["clusters"]:
        out += [f"<h3>{size} documents</h3>", *map(quoted, texts)]
    with bpe.replacing(path) as file:
        file.write("\n".join(out).encode("utf-8", "replace"))


def write_documents(files: list[Path], notes: Notes, clusters: list, o: Options, part: Path) -> list[Path]:
    """Write what the steps kept as documents.jsonl (returned), what they removed as examples.json, leaks they found."""
    with open(part / "documents.jsonl", "wb") as whole:
        for path in files:
            with open(path, "rb") as file:
                shutil.copyfileobj(file, whole)
    found = {"examples": notes.examples, "sample": notes.sample, "clusters": clusters}
    (part / "examples.json").write_text(json.dumps(found))
    if "decontaminate" in o.steps:
        hits, sets = notes.steps().get("decontaminate", {}).get("found", {}), {}
        for file, item, checked in evaluation_keys(o.eval_data)[1]:
            row = sets.setdefault(file, {"texts": 0, "too_short": 0, "found": {}})
            row["texts"] += checked
            row["too_short"] += not checked
            if f"{file} {item}" in hits:
                row["found"][item] = hits[f"{file} {item}"]
        (part / "contamination.json").write_text(json.dumps(sets, indent=1))
    return [part / "documents.jsonl"]


def present(o: Options, manifest: dict) -> None:
    """Write --report; print --look's random documents as they were read, and what became of them."""
    path = Path(o.output) / "examples.json"
    found = json.loads(path.read_bytes()) if path.exists() else {"examples": {}, "sample": [], "clusters": []}
    if o.report:
        write_report(o.report, manifest, found)
        print(f"{o.report}: what each step removed, a page to read before trusting the data")
    for _, origin, fate, text in found["sample"][:o.look]:
        path, _, number = origin.rpartition("#")
        raws = (record for record in read_raw([Path(path)], o, Notes()) if record["origin"] == origin)
        raw = next(raws, {"raw": b"(not found)"})["raw"]
        for title, words in ((f"{origin} as it was", decode(raw[:GLANCE])), (fate, text)):
            print(f"--- {title} ".ljust(80, "-"))
            print("\n".join(line.encode("unicode_escape").decode() if not line.isprintable() else line
                            for line in words[:GLANCE].split("\n")))


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
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output={folder} is a file; it must be a folder")


@contextlib.contextmanager
def claimed(folder: Path, o: Options) -> Iterator[None]:
    """Make a folder and keep other runs out of it, but those of other shards. Raises ValueError if one is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    index, count = shard_of(o)
    path = folder / ".lock"
    try:
        with open(path, "w") as lock:
            with contextlib.suppress(ImportError):  # not on Windows
                import fcntl
                try:  # a shard locks one byte, a whole run all
                    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, count > 1, index)
                except OSError:
                    raise ValueError(f"another run of data.py works in {folder}") from None
            try:
                yield
            finally:
                if count == 1:
                    path.unlink(missing_ok=True)
    except OSError as error:
        if error.errno and not error.filename:  # a full disk
            raise OSError(error.errno, error.strerror, str(folder)) from None
        raise


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
    finally:
        shutil.rmtree(part, ignore_errors=True)


def encode_all(files: list[Path], size: int, o: Options, coder: bpe.Tokenizer | None, part: Path, workers: int) -> dict:
    """Hold documents out, train the tokenizer unless one is given, write token files; what the manifest says of it."""
    corpus = Corpus(files, o.separator, size)
    corpus.split(o.val_fraction, o.seed)
    texts = (text for side, text, _ in corpus.sided("training the tokenizer") if side == 0)
    coder = coder or bpe.train(o.tokenizer, texts, o.vocab_size, o.pattern, workers=workers)
    if bpe.END not in coder.special_tokens:
        raise ValueError(f"--tokenizer={o.tokenizer} has no {bpe.END}, which ends each document")
    began = time.monotonic()
    counts = tokenise(corpus, coder, part, workers)
    tokens = sum(count["tokens"] for count in counts.values())
    coder.save(part / "tokenizer.json")
    return {**counts, "utf8_errors": corpus.counts["utf8_errors"], "bad_lines": corpus.counts["bad_lines"],
            "tokens_per_s": round(tokens / (time.monotonic() - began))}


def prepare(input: str, tokenizer: str, output: str, vocab_size: int, pattern: str = "gpt2", separator: str = "",
            val_fraction: float = 0.02, workers: int = 0, seed: int = 0, **more: object) -> dict:
    """Make train.npy, val.npy, tokenizer.json and manifest.json in the folder `output`; the manifest is returned.

    The arguments are the fields of Options. Files of an earlier run with the same input, options and code are reused.
    With steps before tokenise, the parts of a run that ended early are, too. Raises ValueError or OSError, with the old
    files untouched.
    """
    began, folder, tokenizer = time.monotonic(), Path(output), tokenizer or "bpe"
    o = Options(input, output, tokenizer, vocab_size, pattern, separator, val_fraction, workers, seed, **more)
    options = {name: value for name, value in vars(o).items() if name not in FREE}
    kind = tokenizer in bpe.TRAINERS
    check_options(options, workers, folder)
    check_steps(o)
    # An output folder that lies in an input folder is no input.
    files = [path for path in bpe.find_files(input) if folder.resolve() not in path.resolve().parents]
    inputs = [fingerprint(path) for path in files]
    size = sum(file["bytes"] for file in inputs)
    if not size:
        raise ValueError(f"--input={input} holds no text")
    beside = [tokenizer] * (not kind) + (bpe.find_files(o.eval_data) if o.eval_data else [])
    code = [fingerprint(Path(path))["sha256"] for path in (__file__, bpe.__file__, *beside)]
    wanted = {"format": FORMAT, "options": options, "code": code, "inputs": inputs}
    if manifest := earlier(folder, wanted):
        print(f"{folder}: the files of an earlier run with the same input and options are reused")
        return manifest
    workers = min(workers or os.cpu_count(), 1 + size // JOB)
    with claimed(folder, o):
        coder, manifest = None if kind else bpe.load(tokenizer), {}  # a bad file is told before the work
        if o.steps != "tokenise":
            work = folder / f"parts-{hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]}"
            files, notes, clusters = work_through(files, o, work, workers)
            manifest = {"steps": notes.steps()}
            print("\n".join(table(manifest["steps"])))
            if not files:
                return manifest
        with rebuilding(folder) as part:
            if o.steps != "tokenise":
                files = write_documents(files, notes, clusters, o, part)
            if "tokenise" in o.steps:
                manifest |= encode_all(files, size, o, coder, part, workers)
            manifest = {**wanted, **manifest, "seconds": round(time.monotonic() - began, 3),
                        "files": {path.name: path.stat().st_size for path in sorted(part.iterdir())}}
            manifest["inputs"] = manifest.pop("inputs")  # many lines, so last
            (part / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in folder.glob("parts-*"):
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
    print(f"xz -9 of the same documents: {bits['xz_bpb']:.4f} bits a byte file by file, "
          f"{bits['xz_concat_bpb']:.4f} concatenated, {bits['xz_after_bpb']:.4f} after the training text")
    return bits


def main() -> None:
    o = options(Options, sys.argv[1:])
    if not o.shard and not o.merge and o.steps != "tokenise":  # under torchrun, or of an array job
        for index, count in (("RANK", "WORLD_SIZE"), ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")):
            if int(os.environ.get(count, 1)) > 1:
                o.shard = f"{os.environ[index]}/{os.environ[count]}"
    manifest = prepare(**dataclasses.asdict(o))
    if o.shard:
        print("this shard is done; when all are: the same command with --merge in place of --shard")
        return
    present(o, manifest)
    for side in ("train", "val"):
        count = manifest.get(side)
        if count:
            print(f"{side}.npy: {count['documents']:,} documents, {count['bytes']:,} bytes, {count['tokens']:,} tokens, "
                  f"{count['bytes'] / count['tokens']:.3f} bytes per token")
    for name, what in (("utf8_errors", "places that were not UTF-8 became U+FFFD"),
                       ("bad_lines", "lines were left out: no JSON object with a text")):
        if manifest.get(name):
            print(f"{manifest[name]:,} {what}")
    if "train" not in manifest:
        print(f"{manifest['seconds']} s\nnext: python data.py --input={o.output}/documents.jsonl")
        return
    print(f"{manifest['seconds']} s, {manifest['tokens_per_s']:,} tokens/s\nnext: python train.py --data={o.output}")


if __name__ == "__main__":
    run(main)
