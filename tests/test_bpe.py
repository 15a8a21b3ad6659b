"""Tests of bpe.py: a brute force, the peers where they are installed, random text, and each refusal."""
import base64
import collections
import doctest
import gzip
import itertools
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import unicodedata
from multiprocessing.connection import Connection

import numpy as np
import pytest
import regex

import bpe
from bpe import END, PATTERNS, UNKNOWN

GPT2 = PATTERNS["gpt2"]


def brute_train(words, size):
    """The definition of BPE training: count every pair anew for each merge. words: {piece: count}"""
    words, merges = {tuple(bytes([b]) for b in word.encode()): count for word, count in words.items()}, []
    while 256 + len(merges) < size:
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        if not pairs:
            break
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        words = {brute_merge(word, merges[-1]): count for word, count in words.items()}
    return merges


def encoded(words):
    """The same counts of the pieces' bytes."""
    return collections.Counter({word.encode(): count for word, count in words.items()})


def brute_merge(word, pair):
    word, i = list(word), 0
    while i < len(word) - 1:
        if (word[i], word[i + 1]) == pair:
            word[i:i + 2] = [word[i] + word[i + 1]]
        i += 1
    return tuple(word)


def brute_encode(text, pattern, merges):
    """The definition of BPE encoding: all merges, one after the other, on each piece."""
    out = []
    for piece in regex.findall(pattern, text):
        word = tuple(bytes([b]) for b in piece.encode())
        for pair in merges:
            word = brute_merge(word, pair)
        out += word
    return out


# Characters that pre-tokenisers and encoders stumble over: marks, controls, NUL, odd spaces, astral, ligatures, U+FFFD.
ALPHABETS = ["ab", "aab ", "abcdefgh  \n", "the cat in hat'slvr \n\t", "a1 ²½Ⅷ٣.!?_-",
             "e\u0301\u0327\u200d\ufe0f\u202e\ufeff a", "\0\x01\x1c\x1d\x1e\x1f\x7f\x85\xa0\u2028\u3000 a\r\n",
             "你好世界。，日本語한국 ", "😀🌍👩‍👩‍👧‍👦🇩🇪 x", "\ufffd\U0010ffff\ufdfa\u1e9e'’S'll 'D"]


def random_text(rng, length):
    alphabet = rng.choice([*ALPHABETS, "".join(ALPHABETS)])
    return "".join(rng.choices(alphabet, k=length))


def random_unicode(rng, length):
    """Any characters but surrogates."""
    points = (rng.choice([rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0x110000)]) for _ in range(length))
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


def documents_of(files, separator="", errors=None):
    """The whole documents of some files."""
    texts, held = [], ""
    for text, ends in bpe.read_parts(files, separator, {} if errors is None else errors):
        held += text
        if ends:
            texts.append(held)
            held = ""
    assert held == ""
    return texts


@pytest.fixture(scope="module")
def library():
    """About 2 MB of the default corpus as documents."""
    files = bpe.find_files("")
    return documents_of(files[:: max(1, len(files) // 100)])


@pytest.fixture(scope="module")
def tokenizer(library):
    return bpe.train("bpe", library, 2000, workers=1)


def test_docstring_examples():
    result = doctest.testmod(bpe)
    assert result.attempted >= 6 and result.failed == 0


# ---------------------------------------------------------------------------------------------------------- training

def test_training_equals_brute_force():
    rng = random.Random(1)
    for round in range(300):
        words = collections.Counter(random_text(rng, rng.randrange(1, 12)) for _ in range(rng.randrange(1, 30)))
        for word in list(words):
            words[word] *= rng.choice([1, 1, 2, 50])
        size = 256 + rng.choice([1, 5, 40, 400])
        vocab, merges = bpe.train_bpe(encoded(words), size)
        assert merges == brute_train(words, size), words
        assert vocab == [bytes([b]) for b in range(256)] + [a + b for a, b in merges]


def test_worked_example():
    """The counts and merges of the usual classroom example, by hand: (s, t) ties with (e, s) and is the greater."""
    words = {"low": 5, "lower": 2, "widest": 3, "newest": 6}
    merges = bpe.train_bpe(encoded(words), 256 + 6)[1]
    assert [a + b" " + b for a, b in merges] == [b"s t", b"e st", b"o w", b"l ow", b"w est", b"n e"]


def test_ties_go_to_the_greater_pair_of_byte_strings():
    # as byte strings (b"ab", b"x") > (b"a", b"z") though "abx" < "az"; bytes above 127 are greater than letters
    words = collections.Counter({"pq": 3, "pr": 3, "é": 3, "qa": 3})
    assert bpe.train_bpe(encoded(words), 260)[1] == [(b"\xc3", b"\xa9"), (b"q", b"a"), (b"p", b"r"), (b"p", b"q")]
    words = collections.Counter({"ab": 9, "abx": 2, "az": 2})
    assert bpe.train_bpe(encoded(words), 259)[1] == [(b"a", b"b"), (b"ab", b"x"), (b"a", b"z")]


def test_runs_of_one_letter_merge_from_the_left():
    for length in range(1, 40):
        words = collections.Counter({"a" * length: 1, "b" + "a" * (length // 2): 2})
        assert bpe.train_bpe(encoded(words), 264)[1] == brute_train(words, 264)


def test_workers_and_order_of_documents_do_not_matter(monkeypatch, library):
    monkeypatch.setattr(bpe, "CHUNK", 1000)  # many batches
    one = bpe.train("bpe", library, 700, workers=1).to_dict()
    assert bpe.train("bpe", library, 700, workers=2).to_dict() == one
    assert bpe.train("bpe", iter(library[::-1]), 700, workers=3).to_dict() == one
    assert len(one["merges"]) == 700 - 257


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'bpx'.*bpe, char, word, byte"):
        bpe.train("bpx", ["text"], 300)


def test_few_texts_are_in_memory_while_counting(monkeypatch):
    monkeypatch.setattr(bpe, "CHUNK", 10)
    monkeypatch.setattr(bpe, "BLOCK", 50)
    alive, most = [0], [0]

    class Text(str):
        def __del__(self):
            alive[0] -= 1

    def texts():
        for i in range(3000):
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            yield Text("word " * 20)
    counts = collections.Counter()
    bpe.train("word", texts(), 10, r"\w+| +", workers=1, counts=counts)
    assert counts == {b"word": 3000 * 20, b" ": 3000 * 20}
    assert most[0] < 20
    counts.clear()
    most[0] = 0
    bpe.train("word", texts(), 10, "gpt2", workers=1, counts=counts)
    assert counts == {b"word": 3000, b" word": 3000 * 19, b" ": 3000} and most[0] < 20


def test_special_tokens_in_training_text_are_boundaries():
    text = "low<|endoftext|>low<|endoftext|>lo<|fim|>w"
    tokenizer = bpe.train("bpe", [text], 400, special_tokens=(END, "<|fim|>"))
    assert tokenizer.to_dict()["merges"] == bpe.train("bpe", ["low", "low", "lo", "w"], 400).to_dict()["merges"]
    assert not any(b"|" in a + b for a, b in tokenizer.merges)
    without = bpe.train("bpe", [text], 400)
    assert any(b"|" in a + b for a, b in without.merges)  # the same text where <|fim|> is ordinary


def test_ids_of_special_tokens_come_last():
    tokenizer = bpe.train("bpe", ["abcabc"], 260, special_tokens=("<a>", END))
    assert tokenizer.special_tokens == {"<a>": 258, END: 259} and tokenizer.vocab_size == 260
    assert tokenizer.vocab[258:] == [b"<a>", END.encode()]
    assert bpe.train("bpe", ["abcabc"], 259, special_tokens=("<a>",)).special_tokens == {"<a>": 257, END: 258}
    assert bpe.train("word", ["a b"], 9).special_tokens == {UNKNOWN: 2, END: 3}


def test_growth_of_training(monkeypatch):
    """Four times the distinct words, about four times the places looked at: merging touches only what it changes."""
    def places(count):
        seen, look = [0], bpe.pairs_at
        monkeypatch.setattr(bpe, "pairs_at", lambda places, *rest: (seen.__setitem__(0, seen[0] + len(places)), look(places, *rest))[1])
        rng = random.Random(3)
        words = collections.Counter("".join(rng.choices("abcdefghij", k=8)) for _ in range(count))
        bpe.train_bpe(encoded(words), 256 + 300)
        monkeypatch.setattr(bpe, "pairs_at", look)
        return seen[0]
    small, large = places(2000), places(8000)
    assert 0 < large < 5 * small
    assert large < 8000 * 8 * 12  # recounting everything for each of 300 merges would be 300 times the row


def test_equal_counts_in_one_step_are_those_of_one_merge_at_a_time():
    """Many ties: small counts over few letters, so that several pairs are merged in a step, and new ones join the tie."""
    rng = random.Random(11)
    for round in range(200):
        words = collections.Counter("".join(rng.choices("abcdefgh", k=rng.randrange(2, 9))) for _ in range(rng.randrange(5, 60)))
        assert bpe.train_bpe(encoded(words), 340)[1] == brute_train(words, 340), words


def test_rare_and_long_pieces_are_left_out(capsys):
    texts = ["the cat the cat the dog", "x" * 100 + " the"]
    whole = bpe.train("word", texts, 100, r"\w+|\s")
    assert {b"dog", b"x" * 100} < whole.index.keys() and capsys.readouterr().err == ""
    few = bpe.train("word", texts, 100, r"\w+|\s", min_count=2, max_chunk_bytes=99)
    assert few.index.keys() == {b"the", b"cat", b" "} and "left out of training: 2 of 5" in capsys.readouterr().err
    assert bpe.train("bpe", ["ab" * 60, "cd cd"], 300, max_chunk_bytes=9).merges == [(b"c", b"d"), (b" ", b"cd")]


# ---------------------------------------------------------------------------------------------------------- encoding

@pytest.mark.parametrize("rounds", [20, pytest.param(60, marks=pytest.mark.slow)])
def test_encoding_equals_brute_force(rounds):
    rng = random.Random(rounds)
    for _ in range(rounds):
        corpus = [random_text(rng, 200) for _ in range(5)]
        pattern = rng.choice(list(PATTERNS))
        tokenizer = bpe.train("bpe", corpus, 256 + rng.choice([10, 100, 300]), pattern)
        for text in [rng.choice(corpus)[:80], random_text(rng, 60), random_unicode(rng, 20), "", "a" * 70]:
            expected = brute_encode(text, tokenizer.pattern, tokenizer.merges)
            assert [tokenizer.vocab[i] for i in tokenizer.encode(text)] == expected, text
            whole = bpe.from_dict({**tokenizer.to_dict(), "pattern": PATTERNS["bytes"]})
            data = text.encode()
            if data and data not in whole.index:  # all as if it were a long piece
                row = bpe.merge_row([data], whole.byte_ids, whole.length, whole._costs, int, lambda pair, cost: cost + whole.vocab_size)
                assert row[row >= 0].tolist() == whole.encode(text)
            assert [whole.vocab[i] for i in whole.encode(text)] == brute_encode(text, PATTERNS["bytes"], whole.merges)


@pytest.mark.parametrize("kind", list(bpe.TRAINERS))
def test_round_trip_of_what_was_trained_on(kind):
    rng = random.Random(kind)
    texts = [random_text(rng, 300) for _ in range(20)] + [random_unicode(rng, 300)]
    tokenizer = bpe.train(kind, texts, 5000)
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_round_trip_of_anything(pattern):
    rng = random.Random(pattern)
    tokenizer = bpe.train("bpe", [random_text(rng, 3000)], 400, pattern)
    for round in range(300):
        text = random_unicode(rng, rng.randrange(40)) + random_text(rng, rng.randrange(40))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(np.array(ids, int)) == text.encode()
    every = "".join(chr(point) for point in range(0, 0x110000, 13) if not 0xD800 <= point < 0xE000)
    assert tokenizer.decode(tokenizer.encode_ordinary(every)) == every


def test_lone_surrogates_become_the_replacement_character():
    tokenizer = bpe.train("bpe", ["a\ud800b " * 20, "\ud83d\ude00 " * 20], 300)
    assert tokenizer.decode(tokenizer.encode("x\ud800y\udfff")) == "x\ufffdy\ufffd"
    assert tokenizer.encode("\ud83d\ude00 \ud835\udc00b") == tokenizer.encode("😀 𝐀b")  # pairs are joined before splitting
    assert bpe.train("char", ["\ud800"], 9).encode("\ufffd") == [0]


def test_pieces_in_arrays_are_those_of_the_definition(monkeypatch):
    """piece_ends and Pieces, which work on much text at once, against split; NULs, marks and astral characters too."""
    monkeypatch.setattr(bpe, "SHORT", 0)
    monkeypatch.setattr(bpe, "CHUNK", 40)
    monkeypatch.setattr(bpe, "SLOTS", 5)  # so that most pieces find their slot taken
    rng, seen = random.Random(8), bpe.Pieces()
    for round in range(600):
        pattern = rng.choice([GPT2, GPT2, GPT2, *PATTERNS.values(), r"\w+|\W"])
        texts = [random_text(rng, rng.randrange(60)) + random_unicode(rng, rng.randrange(9)) for _ in range(rng.randrange(1, 5))]
        texts += rng.choice([[], ["it's 'll 'tis '", "  ", "\0\0\0\0", "\0" * 7, "\0" * 8], ["aaaaaaa\0", "aaaaaaa"], ["\ufffd"]])
        if round % 50 == 0:
            seen.forget()
        which, counts = seen.numbers(texts, pattern)
        expected = [[piece.encode() for piece in bpe.split(text, pattern)] for text in texts]
        assert list(seen.number.values()) == list(range(len(seen.number))) and counts == list(map(len, expected))
        pieces = list(seen.number)
        assert [pieces[i] for i in which] == sum(expected, []), texts


def test_pieces_of_one_beginning_and_end_are_told_apart_by_length():
    """Up to 15 bytes a piece is two numbers; a longer one is none, also where its length is one of a byte's in 8 bits."""
    sizes = [*range(1, 40), *range(250, 280), 511, 512, 513]
    for letter in "a\0":
        texts, seen = [letter * size for size in sizes], bpe.Pieces()
        for _ in range(3):
            which, counts = seen.numbers(texts, PATTERNS["bytes"])
            assert which.tolist() == list(range(len(sizes))) and set(counts) == {1}


def test_kinds_of_all_characters():
    every = "".join(map(chr, range(0x110000)))
    expected = np.zeros(0x110000, np.uint8)
    for number, sign in enumerate((r"\s", r"\p{L}", r"\p{N}"), 1):
        expected[[match.start() for match in regex.finditer(sign, every)]] = number
    assert (bpe.kinds()[np.minimum(np.arange(0x110000), 0x3FFFF)] == expected).all()


def test_the_pattern_of_gpt2_is_gpt2s():
    """The pattern as OpenAI published it; ours has brackets more."""
    published = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    rng = random.Random(12)
    for round in range(2000):
        text = random_text(rng, 40) + random_unicode(rng, 10)
        assert bpe.split(text, GPT2) == regex.findall(published, text)


PUBLISHED = {  # as OpenAI publishes them in tiktoken
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
            r"|\s+(?!\S)|\s",
    "o200k": "|".join([
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])}


@pytest.mark.parametrize("name", PUBLISHED)
def test_ids_equal_tiktoken_with_its_own_spelling_of_the_pattern(name, library):
    tiktoken = pytest.importorskip("tiktoken")
    ours = bpe.train("bpe", library[::9], 1500, name)
    ranks = {token: i for i, token in enumerate(ours.vocab[:-1])}
    peer = tiktoken.Encoding(name, pat_str=PUBLISHED[name], mergeable_ranks=ranks, special_tokens={})
    rng = random.Random(name)
    texts = [random_text(rng, 60) + random_unicode(rng, 20) + random_text(rng, 10) for _ in range(2000)]
    # Both libraries know the characters that Python knows; of newer ones one of them may not know the kind yet.
    texts = ["".join(char for char in text if unicodedata.category(char) != "Cn") for text in texts] + library[:30]
    for text in texts + ["DON'T I'LL wE'Ve", "a\r\n\r\n  b \n", "  \n \n  ", "x = 1234567\n\n", "HTMLParser'S", "//\n//"]:
        assert ours.encode(text) == peer.encode_ordinary(text), repr(text)


def test_the_pattern_that_cuts_nothing():
    tokenizer = bpe.train("bpe", ["the cat in the hat " * 9], 290, "bytes")
    assert tokenizer.encode("the cat in the hat " * 9) == [max(tokenizer.index.values())]
    assert bpe.split("a b\nc", PATTERNS["bytes"]) == ["a b\nc"]


def test_groups_in_a_pattern_keep_their_numbers():
    r"""A pattern of one's own may refer to its groups, by number or name: \\1 is its first one."""
    assert bpe.split("aabbcdd", r"(.)\1|.") == ["aa", "bb", "c", "dd"]
    assert bpe.split("xyxy zz", r"(?<a>x)(y)|\s?(?<b>\w)(?P=b)?|.") == ["xy", "xy", " zz"]
    assert bpe.piece_ends("aabé", r"(.)\1|.").tolist() == [2, 3, 5]


def test_a_pattern_that_backtracks_without_end_is_named(monkeypatch):
    given, repeated = [], bpe.repeated

    class Impatient:
        def __init__(self, pattern):
            self.pattern = repeated(pattern)

        def match(self, text, timeout):
            given.append(timeout)
            return self.pattern.match(text, timeout=0.1)

    monkeypatch.setattr(bpe, "repeated", Impatient)
    with pytest.raises(ValueError, match=r"a\+\)\+b.*too long"):
        bpe.train("bpe", ["a" * 60 + "c"], 300, r"(?:(?:a|a)+)+b|(?:a+)+b|.", workers=1)
    assert 10 <= given[0] < 11
    monkeypatch.undo()
    assert bpe.split("ab1", r"(a)|(?P<letter>b)|.") == ["a", "b", "1"]  # groups of the user's do no harm


def test_pieces_never_hold_a_place_where_text_is_cut():
    """CUT is right for each shipped pattern: split(a) + split(b) == split(a + b) at each of its places."""
    rng, seen = random.Random(5), collections.Counter()
    place = regex.compile(bpe.CUT.pattern.replace("(?r)", ""))
    for round in range(1500):
        text = random_text(rng, 30) if round % 3 else random_unicode(rng, 20) + random_text(rng, 20)
        for pattern in bpe.CUTTABLE:
            name, whole = pattern, bpe.split(text, pattern)
            for match in place.finditer(text):
                assert bpe.split(text[:match.end()], pattern) + bpe.split(text[match.end():], pattern) == whole
                seen[name] += 1
    assert min(seen.values()) > 1000
    with pytest.raises(AssertionError):  # a cut inside a word would show
        assert bpe.split("ab", GPT2) == bpe.split("a", GPT2) + bpe.split("b", GPT2)


@pytest.mark.parametrize("kind,pattern", [("bpe", "gpt2"), ("bpe", "code"), ("char", ""), ("word", "gpt2"),
                                          ("bpe", r"\w+\s+\w+|\s*\w+|\W")])
def test_encode_iterable_equals_the_whole(kind, pattern, monkeypatch):
    rng = random.Random(pattern)
    tokenizer = bpe.train(kind, [random_text(rng, 2000) for _ in range(3)], 600, pattern)
    for chunk in (7, 64, 1 << 20):
        monkeypatch.setattr(bpe, "CHUNK", chunk)
        for round in range(60):
            text = random_text(rng, 200) + "\ud83d\ude00" + random_unicode(rng, 20)
            cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(12)))
            parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)])]
            whole = tokenizer.encode_ordinary(text).tolist()
            assert list(tokenizer.encode_iterable(parts)) == whole
            assert list(tokenizer.encode_iterable(text)) == whole  # one character at a time


def test_encode_iterable_is_lazy_and_holds_little():
    tokenizer = bpe.train("bpe", ["a few words"], 260)
    taken = []

    def endless():
        for i in itertools.count():
            taken.append(i)
            yield "a few words and\nmore, "
    ids = tokenizer.encode_iterable(endless())
    for _ in range(1000):
        next(ids)
    assert len(taken) < 100
    characters = (char for part in endless() for char in part)
    ids = tokenizer.encode_iterable(itertools.islice(characters, 50_000))
    for _ in range(1000):
        next(ids)
    assert len(taken) < 200
    longest = max(map(len, itertools.islice(bpe.chunks(endless(), GPT2), 1000)))
    assert longest < 50
    longest = max(map(len, itertools.islice(bpe.chunks(itertools.islice(endless(), 100), r"\w+|\W"), 1000)))
    assert longest == 100 * 22  # of a pattern of the user's own nothing is known


def test_memory_of_encoding_a_long_text(monkeypatch, tmp_path):
    """The pieces of a long text are never all in memory, but those of a block at a time; so with a file."""
    monkeypatch.setattr(bpe, "CHUNK", 1000)
    monkeypatch.setattr(bpe, "BLOCK", 3000)
    sizes, ends = [], bpe.piece_ends
    monkeypatch.setattr(bpe, "piece_ends", lambda text, pattern: (sizes.append(len(text)), ends(text, pattern))[1])
    tokenizer = bpe.train("byte", ["x"], 257)
    text = "some words and a, b\n" * 5000
    (tmp_path / "long.txt").write_text(text)
    for encode in (lambda: tokenizer.encode_ordinary(text), lambda: tokenizer.encode_batch([text], 1)[0],
                   lambda: np.concatenate(list(tokenizer.encode_file(tmp_path / "long.txt", workers=1)))):
        assert tokenizer.decode(encode()) == text
        assert sum(sizes) >= len(text) - 1000 and max(sizes) <= 4100 and len(sizes) > 24  # what is short goes the simple way
        sizes.clear()


@pytest.mark.parametrize("text", ["a" * 20000, " " * 20000, "ab" * 10000, "random", "\u0301" * 10000])
def test_growth_of_encoding_one_long_piece(text, tokenizer, monkeypatch):
    """The places whose pairs are looked up follow the length: each merge looks at those that it changed."""
    rng = random.Random(4)
    text = "".join(rng.choices("etaoinshr", k=20000)) if text == "random" else text
    asked, seen, look = [], [0], bpe.pairs_at
    monkeypatch.setattr(bpe, "pairs_at", lambda places, *rest: (seen.__setitem__(0, seen[0] + len(places)), look(places, *rest))[1])
    for part in (text[:len(text) // 10], text):
        seen[0] = 0
        ids = tokenizer.encode(part)
        assert tokenizer.decode(ids) == part
        asked.append(seen[0] / len(part.encode()))
    assert 0 < asked[1] < 1.2 * asked[0] + 0.1 and asked[1] < 15  # questions per byte do not grow


def test_the_cache_is_bounded_and_changes_nothing(monkeypatch, tokenizer):
    monkeypatch.setattr(bpe, "CACHE", 50)
    monkeypatch.setattr(bpe, "CHUNK", 20)
    short, long = [], []
    copy = bpe.from_dict(tokenizer.to_dict())
    rng = random.Random(6)
    for _ in range(60):
        text = " ".join(random_text(rng, 9) for _ in range(rng.choice([50, 200])))
        assert copy.encode(text) == tokenizer.encode(text)
        short.append(len(copy.cache))
        long.append(len(copy.seen.number))
        assert len(copy.sizes) == len(copy.seen.number)
    assert 50 < max(short) <= 50 + 450 and 50 < max(long) <= 50 + 2000  # those of one text more
    assert copy.encode("x" * 5000) == tokenizer.encode("x" * 5000) and copy.seen.full  # so large a piece is not kept


def work_on(job, offset):
    """The work of `parallel`: some fail, some are killed, one of them in the midst of its answer."""
    if job == 99:
        raise ValueError("job 99")
    if job == 97:
        Connection._send = lambda pipe, part, _=0: os.write(pipe.fileno(), part[:999]) > 99 and os.kill(os.getpid(), signal.SIGKILL)
    if job == 98:
        os.kill(os.getpid(), signal.SIGKILL)
    return [job * job + offset, b"x" * 300_000]  # more than a pipe holds


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_work_in_processes(workers):
    jobs = range(20)
    assert [answer[0] for answer in bpe.parallel(work_on, jobs, workers, 5)] == [job * job + 5 for job in jobs]
    assert list(bpe.parallel(work_on, [], workers, 5)) == []
    with pytest.raises(ValueError, match="job 99"):
        list(bpe.parallel(work_on, [*jobs, 99, *jobs], workers, 5))
    taken = []
    answers = bpe.parallel(work_on, (taken.append(i) or i for i in range(90)), workers, 0)
    next(answers), next(answers)
    assert len(taken) <= 2 + workers
    answers.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("fatal", [97, 98])
@pytest.mark.parametrize("position", [0, 1, 7])
def test_a_process_that_is_killed_is_an_error(position, fatal):
    usual = signal.signal(signal.SIGTERM, lambda *_: None)  # as in train.py, whose text is tokenised in processes
    try:
        with pytest.raises(ChildProcessError, match="killed"):
            list(bpe.parallel(work_on, [1] * position + [fatal] + [1] * 3, 2, 0))
        assert multiprocessing.active_children() == []
    finally:
        signal.signal(signal.SIGTERM, usual)


def test_a_program_ends_while_work_is_in_processes():
    program = "import operator; import bpe; answers = bpe.parallel(operator.mul, [3] * 50, 2, 5); print(next(answers))"
    done = subprocess.run([sys.executable, "-c", program], cwd=os.path.dirname(bpe.__file__), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "15\n", "")


def test_batches_in_processes_keep_their_order(monkeypatch, library, tokenizer):
    expected = [tokenizer.encode(text) for text in library]
    monkeypatch.setattr(bpe, "BLOCK", 1000)
    for workers in (1, 2, 5):
        assert [ids.tolist() for ids in tokenizer.encode_batch(library, workers)] == expected
    assert tokenizer.encode_batch([]) == [] and [len(ids) for ids in tokenizer.encode_batch(["", "a"])] == [0, 1]


def test_types_of_what_encode_gives(tokenizer):
    assert type(tokenizer.encode("a b")) is list and type(tokenizer.encode("a b")[0]) is int
    ids = tokenizer.encode_ordinary("a b")
    assert ids.dtype == np.uint16 and ids.flags.writeable
    assert [list(ids) for ids in tokenizer.encode_batch(["a b", "", "c"])] == [tokenizer.encode(t) for t in ("a b", "", "c")]
    words = bpe.train("char", ["".join(map(chr, range(0x10000, 0x22000)))], 1 << 20)
    assert words.vocab_size == 0x12002 and words.encode_ordinary("a").dtype == np.uint32
    assert words.decode(words.encode_ordinary("\U00010000\U00021fff")) == "\U00010000\U00021fff"


def test_a_tokenizer_can_be_pickled(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("pickled words") == tokenizer.encode("pickled words") and copy.to_dict() == tokenizer.to_dict()


# ---------------------------------------------------------------------------------------------------- special tokens

@pytest.fixture(scope="module")
def special():
    plain = bpe.train("bpe", ["some text to train on"], 270)
    names = ("<|a|>", "<|a|><|b|>", "b c", END)  # a file of others may have white space in a name
    vocab = plain.vocab[:-1] + [name.encode() for name in names]
    return bpe.Tokenizer("bpe", GPT2, vocab, plain.merges, {name: vocab.index(name.encode()) for name in names})


def test_special_tokens_are_text_unless_allowed(special):
    text = "x<|a|><|b|>y<|endoftext|> b c"
    ids = special.special_tokens
    assert not set(special.encode(text)) & set(ids.values())
    assert special.decode(special.encode(text)) == special.decode(special.encode(text, "all")) == text
    assert [i for i in special.encode(text, "all") if i in ids.values()] == [ids["<|a|><|b|>"], ids[END], ids["b c"]]
    assert [i for i in special.encode(text, {"<|a|>"}) if i in ids.values()] == [ids["<|a|>"]]
    assert special.encode(text, set()) == special.encode(text)
    with pytest.raises(ValueError, match="special token"):
        special.encode(text, "none_raise")
    assert special.encode("plain", "none_raise") == special.encode("plain")
    assert special.encode(text, {"<nope>"}) == special.encode(text, []) == special.encode(text)


def test_nothing_merges_across_a_special_token():
    tokenizer = bpe.train("bpe", ["abab" * 9], 258, pattern=r"(?s).+")
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    assert len(tokenizer.encode("ab")) == 1
    assert tokenizer.encode(f"a{END}b", "all") == [*a, tokenizer.special_tokens[END], *b]


def test_a_special_token_that_is_also_ordinary_text():
    tokenizer = bpe.train("bpe", ["thethethe the"], 300, special_tokens=("the",))
    ordinary = bpe.train("bpe", ["abcabcabc"], 300)
    named = bpe.Tokenizer("bpe", GPT2, [*ordinary.vocab[:-1], b"abc", END.encode()], ordinary.merges,
                          {"abc": len(ordinary.vocab) - 1, END: len(ordinary.vocab)})
    assert named.encode("abc") == ordinary.encode("abc") != [named.special_tokens["abc"]]
    assert named.encode("abc", "all") == [named.special_tokens["abc"]]
    assert tokenizer.decode(tokenizer.encode("the")) == "the" and tokenizer.merges == []


# -------------------------------------------------------------------------------------------- characters, words, bytes

def test_the_four_kinds():
    text = "the cat in the hat. the cat!"
    char, word, byte = (bpe.train(kind, [text], 300) for kind in ("char", "word", "byte"))
    assert char.vocab[0] == b" " and len(char.vocab) == len(set(text)) + 2  # the most frequent character comes first
    assert [char.vocab[i] for i in char.encode("taxi")] == [b"t", b"a", b"<|unk|>", b"i"]
    assert char.decode(char.encode("taxi")) == "ta<|unk|>i"
    assert word.decode(word.encode("the dog in the hat")) == "the<|unk|> in the hat"
    assert word.vocab[:3] == [b" cat", b" the", b" hat"]  # twice, twice, once and the first of the alphabet
    assert byte.encode("né") == [ord("n"), 0xC3, 0xA9] and byte.vocab_size == 257


def test_rare_words_give_way():
    word = bpe.train("word", ["a a a b b c"], 5, pattern=r"\w|\s")
    assert word.vocab == [b" ", b"a", b"b", UNKNOWN.encode(), END.encode()]


def test_one_more_kind_is_one_more_entry(monkeypatch, tmp_path):
    """The extension test: a trainer from outside is trained, saved, loaded and used."""
    def train_longest(counts, size):
        return sorted(counts, key=len)[-size:], []
    monkeypatch.setitem(bpe.TRAINERS, "longest", train_longest)
    tokenizer = bpe.train("longest", ["a bb ccc dddd"], 4)
    tokenizer.save(tmp_path / "t.json")
    again = bpe.load(tmp_path / "t.json")
    assert again.decode(again.encode("x ccc dddd")) == "<|unk|> ccc dddd" and again.to_dict() == tokenizer.to_dict()


# -------------------------------------------------------------------------------------------------------------- decode

def test_decode_never_fails_on_bytes_that_are_not_utf8(tokenizer):
    rng = random.Random(7)
    for _ in range(300):
        ids = rng.choices(range(tokenizer.vocab_size), k=20)
        data = b"".join(tokenizer.vocab[i] for i in ids)
        assert tokenizer.decode_bytes(ids) == data and tokenizer.decode(ids) == data.decode("utf-8", "replace")
    assert tokenizer.decode([0xF0, 0x9F]) == "\ufffd"
    assert tokenizer.decode(iter([104, 105])) == "hi" and tokenizer.decode([]) == ""
    assert tokenizer.decode(np.array([104, 105], np.uint16)) == "hi"


@pytest.mark.parametrize("wrong", [-1, 2000, 10 ** 12, -10 ** 30])
def test_decode_names_an_id_out_of_range(wrong, tokenizer):
    with pytest.raises(ValueError, match=f"id {wrong} "):
        tokenizer.decode([5, wrong, 7])
    assert tokenizer.decode([tokenizer.vocab_size - 1]) == END


# ----------------------------------------------------------------------------------------------------------- the peers

def unicode_of_bytes():
    """GPT-2's printable stand-ins: byte -> character, as in its vocab.json."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(rest)}}


@pytest.fixture(scope="module")
def gpt2(test_data):
    """GPT-2's own tokenizer from its two files."""
    back = {char: byte for byte, char in unicode_of_bytes().items()}
    table = json.loads((test_data / "gpt2/vocab.json").read_text(encoding="utf-8"))
    lines = (test_data / "gpt2/merges.txt").read_text(encoding="utf-8").splitlines()
    vocab = [b""] * len(table)
    for name, i in table.items():
        vocab[i] = name.encode() if name == END else bytes(back[char] for char in name)
    merges = [tuple(bytes(back[char] for char in half) for half in line.split()) for line in lines if not line.startswith("#version")]
    return bpe.Tokenizer("bpe", GPT2, vocab, merges, {END: table[END]})


def test_gpt2_known_ids(gpt2):
    assert gpt2.vocab_size == 50257 and gpt2.dtype == np.uint16
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("Hello, 🌍! 你好!") == [15496, 11, 12520, 234, 235, 0, 220, 19526, 254, 25001, 121, 0]
    assert gpt2.encode("<|endoftext|>", "all") == [50256]


def test_gpt2_ids_equal_tiktoken(gpt2, library):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {token: i for i, token in enumerate(gpt2.vocab) if token != END.encode()}
    peer = tiktoken.Encoding("gpt2", pat_str=GPT2, mergeable_ranks=ranks, special_tokens={END: 50256})
    rng = random.Random(8)
    texts = [random_text(rng, 100) + random_unicode(rng, 30) for _ in range(1500)] + library[:40]
    for text in texts:
        assert gpt2.encode(text) == peer.encode_ordinary(text)
    text = f"a{END}b"
    assert gpt2.encode(text, "all") == peer.encode(text, allowed_special="all")
    assert gpt2.encode("a\ud800b") == peer.encode_ordinary("a\ud800b")


def test_ids_equal_tokenizers_with_the_same_merges(tokenizer, library):
    """The peer breaks ties in another way, so it is given our merges."""
    tokenizers = pytest.importorskip("tokenizers")
    names = unicode_of_bytes()

    def name(token):
        return "".join(names[byte] for byte in token)
    vocab = {name(token): i for i, token in enumerate(tokenizer.vocab[:-1])}
    peer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[(name(a), name(b)) for a, b in tokenizer.merges]))
    peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    rng = random.Random(9)
    for text in library[:30] + [random_text(rng, 200) for _ in range(300)]:
        assert tokenizer.encode(text) == peer.encode(text).ids


@pytest.mark.slow
def test_ids_on_100_000_strings(gpt2, test_data):
    """GPT-2's tokenizer against tiktoken and tokenizers: random and adversarial strings, alone and many at a time.

    Characters that Python's Unicode does not know are left out: the libraries' tables are of different years.
    """
    tiktoken, tokenizers = pytest.importorskip("tiktoken"), pytest.importorskip("tokenizers")
    ranks = {token: i for token, i in gpt2.index.items()}
    published = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    peer = tiktoken.Encoding("gpt2", pat_str=published, mergeable_ranks=ranks, special_tokens={})
    other = tokenizers.ByteLevelBPETokenizer(str(test_data / "gpt2/vocab.json"), str(test_data / "gpt2/merges.txt"))
    rng = random.Random(12)
    texts = [random_text(rng, rng.randrange(80)) + random_unicode(rng, rng.randrange(20)) for _ in range(99_000)]
    texts = ["".join(char for char in text if unicodedata.category(char) != "Cn") for text in texts]
    texts += [rng.choice(["a", " ", "ab", "\0", "\u0301", "1", "'s", "\n "]) * rng.randrange(3000) for _ in range(1000)]
    expected = peer.encode_ordinary_batch(texts)
    assert [ids.tolist() for ids in gpt2.encode_batch(texts, 2)] == expected
    assert [gpt2.encode(text) for text in texts] == expected
    assert [encoding.ids for encoding in other.encode_batch(texts)] == expected


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = LLAMA3.replace("{1,3}", "")


def hugging_face(tokenizer, style):
    """The same tokenizer as an object of the library `tokenizers`, in the style of a family of models."""
    tokenizers = pytest.importorskip("tokenizers")
    names = unicode_of_bytes()

    def name(token):
        return "".join(names[byte] for byte in token)
    vocab = {name(token): i for i, token in enumerate(tokenizer.vocab[:-1])}
    merges = [(name(a), name(b)) for a, b in tokenizer.merges]
    if style == "llama3":  # every split of a token into two tokens, as conversion from ranks writes them
        merges = [(token[:k], token[k:]) for token in vocab for k in range(1, len(token)) if token[:k] in vocab and token[k:] in vocab]
    peer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges, ignore_merges=style == "llama3"))
    pre = tokenizers.pre_tokenizers
    regular = {"llama3": LLAMA3, "qwen": QWEN}.get(style)
    split = [pre.Split(tokenizers.Regex(regular), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)] if regular else None
    peer.pre_tokenizer = pre.Sequence(split) if regular else pre.ByteLevel(add_prefix_space=False)
    peer.normalizer = tokenizers.normalizers.NFC() if style == "qwen" else None
    peer.add_special_tokens([END, "<|im_start|>"])
    return peer


@pytest.mark.parametrize("style", ["gpt2", "llama3", "qwen"])
def test_tokenizer_json_of_hugging_face(style, tokenizer, library, tmp_path):
    peer = hugging_face(tokenizer, style)
    peer.save(str(tmp_path / "tokenizer.json"))
    peer.model.save(str(tmp_path))  # as downloads have it: vocab.json and merges.txt beside it, which know no pattern
    ours = bpe.load(tmp_path / "tokenizer.json")
    assert ours.special_tokens == {END: 1999, "<|im_start|>": 2000} and ours.to_dict() == bpe.load(tmp_path).to_dict()
    rng = random.Random(10)
    texts = library[:20] + [random_text(rng, 200) + random_unicode(rng, 30) for _ in range(400)]
    assert [ids.tolist() for ids in ours.encode_batch(texts, 1)] == [peer.encode(text).ids for text in texts]
    assert ours.encode(f"a{END}b", "all") == peer.encode(f"a{END}b").ids
    assert bpe.from_dict(ours.to_dict()).encode("e\u0301") == ours.encode("e\u0301")
    assert (ours.encode("e\u0301") == ours.encode("\u00e9")) == (style == "qwen")


def test_what_is_no_byte_level_bpe_is_refused_by_name(tokenizer, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    pre, models = tokenizers.pre_tokenizers, tokenizers.models
    words = pre.Split(tokenizers.Regex(LLAMA3), "isolated")
    cases = {"WordPiece": dict(model=models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")), "Unigram": dict(model=models.Unigram()),
             "Lowercase": dict(normalizer=tokenizers.normalizers.Lowercase()), "Metaspace": dict(pre_tokenizer=pre.Metaspace()),
             "Digits": dict(pre_tokenizer=pre.Sequence([pre.Digits(), pre.ByteLevel(add_prefix_space=False)])),
             "no pre_tokenizer": dict(pre_tokenizer=None), "add_prefix_space": dict(pre_tokenizer=pre.ByteLevel(add_prefix_space=True)),
             "byte_fallback": dict(model=models.BPE(byte_fallback=True)),
             "Split, Split, ByteLevel": dict(pre_tokenizer=pre.Sequence([words, words, pre.ByteLevel(False, use_regex=False)])),
             "Split, ByteLevel, use_regex": dict(pre_tokenizer=pre.Sequence([words, pre.ByteLevel(False)]))}
    for way in ("MergedWithPrevious", "MergedWithNext", "Contiguous", "Removed"):  # other cuts of a text
        split = pre.Split(tokenizers.Regex(LLAMA3), "".join("_" * c.isupper() + c.lower() for c in way)[1:])
        cases[f"behavior={way}"] = dict(pre_tokenizer=pre.Sequence([split, pre.ByteLevel(False, use_regex=False)]))
    for flag in ("lstrip", "rstrip", "single_word"):  # of added tokens, as in Phi 4
        cases[flag] = dict(token=tokenizers.AddedToken("<mask>", special=True, **{flag: True}))
    for name, change in cases.items():
        peer = hugging_face(tokenizer, "gpt2")
        peer.add_special_tokens([change.pop("token", END)])
        for field, value in change.items():
            setattr(peer, field, value)
        peer.save(str(tmp_path / "t.json"))
        with pytest.raises(ValueError, match=f"t.json.*{name}"):
            bpe.load(tmp_path / "t.json")


def test_files_of_gpt2_and_of_tiktoken(gpt2, test_data, library, tmp_path):
    folder = bpe.load(test_data / "gpt2")
    assert folder.to_dict() == gpt2.to_dict()
    gpt2.save(tmp_path / "gpt2.tiktoken")
    ranks = bpe.load(tmp_path / "gpt2.tiktoken")
    assert ranks.to_dict() == gpt2.to_dict()  # the merges follow from the ranks, <|endoftext|> gets the free id
    tiktoken = pytest.importorskip("tiktoken")
    load = pytest.importorskip("tiktoken.load")
    peer = tiktoken.Encoding("gpt2", pat_str=GPT2, mergeable_ranks=load.load_tiktoken_bpe(str(tmp_path / "gpt2.tiktoken")), special_tokens={})
    assert [ids.tolist() for ids in ranks.encode_batch(library[:30], 1)] == peer.encode_ordinary_batch(library[:30])


@pytest.mark.parametrize("pattern, specials, told", [("gpt2", [END], False), ("gpt4", [END], True), ("gpt2", ["<s>", END], True)])
def test_ranks_that_will_be_read_as_another_tokenizer(pattern, specials, told, tmp_path, capsys):
    """The file has no place for the pattern and the names of special tokens."""
    tokenizer = bpe.train("bpe", ["the cat in the hat " * 9], 263, pattern, specials)
    capsys.readouterr()
    tokenizer.save(tmp_path / "t.tiktoken")
    assert ("t.tiktoken holds ranks alone" in capsys.readouterr().err) == told
    again = bpe.load(tmp_path / "t.tiktoken")
    assert ((again.pattern, again.special_tokens) != (tokenizer.pattern, tokenizer.special_tokens)) == told


@pytest.mark.parametrize("lines,words", [(b"YQ== 0\n", "missing|unk"), (b"!!! 0\n", "cut.tiktoken"), (b"YQ==\n", "cut.tiktoken"), (b"", "cut.tiktoken"),
                                         (b"".join(base64.b64encode(bytes([i])) + b" %d\n" % (i + 3) for i in range(256)), "several ids are missing")])
def test_damaged_ranks_are_refused(lines, words, tmp_path):
    (tmp_path / "cut.tiktoken").write_bytes(lines)
    with pytest.raises(ValueError, match=words):
        bpe.load(tmp_path / "cut.tiktoken")


def test_training_compresses_as_well_as_tokenizers(library):
    """Ties aside both make the same merges, so the number of tokens agrees closely."""
    tokenizers = pytest.importorskip("tokenizers")
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1999, show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    peer.train_from_iterator(library, trainer)
    ours = bpe.train("bpe", library, 2000)
    count = sum(len(ours.encode_ordinary(text)) for text in library)
    assert abs(sum(len(ids.ids) for ids in peer.encode_batch(library)) / count - 1) < 2e-3


@pytest.mark.parametrize("vocab_size", [1024, pytest.param(2048, marks=pytest.mark.slow)])
def test_the_code_pattern_suits_source_code(vocab_size, library):
    """Fewer tokens for Python than GPT-2's pattern, at each size."""
    size = sum(len(text.encode()) for text in library)
    ratio = {name: size / sum(len(ids) for ids in bpe.train("bpe", library, vocab_size, name).encode_batch(library))
             for name in ("gpt2", "code")}
    assert ratio["code"] > 1.03 * ratio["gpt2"] > 2


# --------------------------------------------------------------------------------------------------------------- files

@pytest.mark.parametrize("kind", list(bpe.TRAINERS))
def test_save_and_load(kind, tmp_path):
    rng = random.Random(kind)
    texts = [random_text(rng, 500) for _ in range(5)] + [random_unicode(rng, 500)]
    tokenizer = bpe.train(kind, texts, 700, special_tokens=("<|ab|>", "ünï\0", END))
    tokenizer.save(tmp_path / "t.json")
    again = bpe.load(tmp_path / "t.json")
    assert vars(again).keys() == vars(tokenizer).keys()
    for name in ("kind", "pattern", "vocab", "merges", "special_tokens", "pairs", "index", "dtype"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    assert [again.encode(text, "all") for text in texts] == [tokenizer.encode(text, "all") for text in texts]
    assert json.loads((tmp_path / "t.json").read_bytes())["version"] == 1
    assert os.listdir(tmp_path) == ["t.json"]


def test_a_file_of_the_first_version_stays_readable():
    vocab = [chr(i) for i in range(256)] + ["th", "the", END]
    data = {"version": 1, "kind": "bpe", "pattern": GPT2, "special_tokens": {END: 258},
            "merges": [[116, 104], [256, 101]], "vocab": vocab}
    assert bpe.from_dict(data).encode("the then é") == [257, 32, 257, 110, 32, 0xC3, 0xA9]
    assert bpe.from_dict(data).to_dict() == data


def damaged(**changes):
    data = bpe.train("bpe", ["the cat in the hat"], 262).to_dict()
    for key, value in changes.items():
        data[key] = value(data[key]) if callable(value) else value
    return data


DAMAGE = {
    "version": damaged(version=2), "not a dict": [1, 2], "number": 7, "no merges": {"version": 1}, "foreign": {"model": {"type": "BPE"}},
    "no vocab": damaged(vocab=None), "kind": damaged(vocab=lambda v: v[:-1]), "short vocab": damaged(vocab=lambda v: v[:200]),
    "merge twice": damaged(merges=lambda m: m + m[:1]), "parts after their merge": damaged(merges=lambda m: m[1:] + m[:1]),
    "part of itself": damaged(vocab=lambda v: [*v[:256], *v[257:259], v[256], *v[259:]]),
    "id out of range": damaged(merges=lambda m: m + [[5, 9999]]), "negative id": damaged(special_tokens={END: -1}),
    "wrong place": damaged(special_tokens={END: 5}),
    "merge missing": damaged(merges=lambda m: m[:-1]), "product missing": damaged(merges=lambda m: m + [[1, 2]]), "same token twice": damaged(vocab=lambda v: [*v[:-1], v[-1], v[97]]),
    "token that is no latin-1": damaged(vocab=lambda v: ["\u0100", *v[1:]]), "pattern": damaged(pattern="(unclosed"),
    "pattern is no text": damaged(pattern=3), "special id is text": damaged(special_tokens={END: "261"}),
    "merges are text": damaged(merges=[["a", "b"]]), "three in a merge": damaged(merges=[[1, 2, 3]]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(name, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(DAMAGE[name]))
    with pytest.raises(ValueError) as error:
        bpe.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    path.write_text(json.dumps(damaged()))
    bpe.load(path)


def test_a_truncated_or_foreign_file_is_refused(tmp_path):
    path = tmp_path / "t.json"
    bpe.train("bpe", ["the cat in the hat"], 262).save(path)
    whole = path.read_bytes()
    for data in [whole[:-1], whole[:len(whole) // 2], b"", b"\x80\x04pickle", b"\xff\xfe"]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match="t.json"):
            bpe.load(path)


@pytest.mark.parametrize("kind", ["char", "word"])
def test_ranks_hold_bytes(kind, tmp_path):
    with pytest.raises(ValueError, match="byte-level"):
        bpe.train(kind, ["the cat"], 9).save(tmp_path / "t.tiktoken")
    assert not list(tmp_path.iterdir())


def test_saving_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "t.json"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        with bpe.replacing(path) as file:
            file.write(b"half")
            raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["t.json"]


# ------------------------------------------------------------------------------------------------------------- reading

def test_find_files(tmp_path):
    for name in ["b.txt", "a.txt", "sub/c.py", ".hidden/d.txt", "site-packages/e.py"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "binary.bin").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    found = [tmp_path / name for name in ("a.txt", "b.txt", "sub/c.py")]
    assert bpe.find_files(str(tmp_path)) == found
    assert bpe.find_files(f"{tmp_path}/b.txt,{tmp_path}") == [tmp_path / "b.txt", *found]
    library = bpe.find_files("")
    assert len(library) > 500 and {path.suffix for path in library} == {".py"}
    assert not any("site-packages" in path.parts for path in library) and library == sorted(library)


@pytest.mark.parametrize("separator", ["", "<|endoftext|>", "\n\n", "x"])
def test_read_parts(separator, tmp_path, monkeypatch):
    rng = random.Random(separator)
    for chunk in (3, 50, 1 << 20):
        monkeypatch.setattr(bpe, "CHUNK", chunk)
        for round in range(20):
            documents = [random_text(rng, rng.choice([1, 5, 40])).translate({0: "", 10: "\r", 120: ""}) for _ in range(9)]
            path = tmp_path / "t.txt"
            path.write_bytes(separator.join(documents).encode())
            assert documents_of([path], separator) == (documents if separator else ["".join(documents)])
            parts = list(bpe.read_parts([path], separator, {}))
            assert max(len(text) for text, _ in parts) <= chunk + len(separator)


def test_lines_of_json_and_gzip_are_read(tmp_path):
    texts = ["one\ntext", "", "naïve \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "a\0b"]
    lines = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines + b"\n \n")  # a byte order mark; blank lines are no documents
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("é one|two".encode()))
    (tmp_path / "d.gz").write_bytes(gzip.compress(b"\0binary"))
    files = bpe.find_files(str(tmp_path))
    assert [path.name for path in files] == ["a.jsonl", "b.jsonl.gz", "c.txt.gz"]
    assert documents_of(files, "|") == texts + texts + ["é one", "two"]
    (tmp_path / "a.jsonl").write_text('{"text": "half \\ud800"}')  # of a surrogate pair, which no file could hold
    assert documents_of([tmp_path / "a.jsonl"], "") == ["half \ufffd"]


def test_newlines_are_not_translated(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"a\r\nb\rc\nd\r")
    assert documents_of([tmp_path / "t.txt"]) == ["a\r\nb\rc\nd\r"]


def test_utf8_errors_are_counted_and_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(bpe, "CHUNK", 2)
    (tmp_path / "t.txt").write_bytes("é\ufffd".encode() + b"\xff ok \xe2\x82 \xf0\x9f\x98\x80 \xc3")
    errors = {}
    assert documents_of([tmp_path / "t.txt"], "", errors) == ["é\ufffd\ufffd ok \ufffd 😀 \ufffd"]
    assert errors == {str(tmp_path / "t.txt"): 3}
    (tmp_path / "good.txt").write_bytes("é\ufffd".encode())
    documents_of([tmp_path / "good.txt"], "", errors)
    assert len(errors) == 1


# ------------------------------------------------------------------------------------------------------------ refusals

@pytest.mark.parametrize("change,words", [
    (dict(vocab_size=256), "at least 257|needs 257"), (dict(kind="char", vocab_size=2), "needs 3"),
    (dict(documents=[]), "no text"), (dict(documents=["", ""]), "no text"), (dict(documents=[END]), "no text"),
    (dict(special_tokens=("a", "a")), "different"), (dict(special_tokens=("",)), "not empty"),
    (dict(special_tokens=("<a b>",)), "white space"),
    (dict(kind="word", special_tokens=(UNKNOWN,)), "different"), (dict(pattern="[a-z]+"), "drops"),
    (dict(pattern="(a"), "regular expression"),
])
def test_training_refuses(change, words):
    good = dict(kind="bpe", documents=["some text"], vocab_size=260, pattern="gpt2", special_tokens=(END,))
    bpe.train(**good)
    with pytest.raises(ValueError, match=words) as error:
        bpe.train(**{**good, **change})
    assert "\n" not in str(error.value)


def test_a_pattern_that_drops_text_later_is_refused():
    tokenizer = bpe.train("bpe", ["abc"], 258, pattern="[a-z]+|[0-9]")
    assert tokenizer.decode(tokenizer.encode("abc1")) == "abc1"
    with pytest.raises(ValueError, match="drops") as error:
        tokenizer.encode("abc \n1")
    advice = "|" + str(error.value).split("write |")[1].removesuffix(" at its end")
    assert bpe.split("abc \n1", tokenizer.pattern + advice) == ["abc", " ", "\n", "1"]


def test_training_stops_early_and_says_so(capsys):
    tokenizer = bpe.train("bpe", ["abc abc"], 1000)
    assert tokenizer.vocab_size == 256 + 3 + 1 and "260" in capsys.readouterr().err
    bpe.train("bpe", ["abc abc"], 258)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------------------- main

def test_command_line(run_main, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"the cat in the hat " * 500 + b"\xff")
    done = run_main("bpe.py", "--input=a.txt", "--vocab_size=270", "--output=t.json", "--show=the cat", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tokenizer = bpe.load(tmp_path / "t.json")
    text = "the cat in the hat " * 500 + "\ufffd"
    tokens = len(tokenizer.encode(text))
    assert f"{len(text.encode()):,} bytes in {tokens:,} tokens: {len(text.encode()) / tokens:.3f} bytes per token" in done.stdout
    assert "1 errors in UTF-8" in done.stderr
    assert [int(line.split()[0]) for line in done.stdout.splitlines()[1:]] == tokenizer.encode("the cat")
    shown = run_main("bpe.py", "--tokenizer=t.json", f"--show=hat{END}", cwd=tmp_path)
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert lines[-1] == [str(tokenizer.special_tokens[END]), END, "|"]
    for words in ["--input=a.txt"], ["--output=other.json"], ["--vocab_size=300"]:  # they were ignored
        told = run_main("bpe.py", "--tokenizer=t.json", *words, cwd=tmp_path)
        assert (told.returncode, told.stdout) == (1, "") and words[0].split("=")[0] in told.stderr, told
    for words in (["--tokenizer=word"], ["--tokenizer=char"], ["--tokenizer=byte"], ["--pattern=code", "--workers=1"],
                  ["--separator=in", "--special_tokens=<a>,<b>"], [r"--pattern=\w+|\W"]):
        done = run_main("bpe.py", "--input=a.txt", "--vocab_size=270", "--output=t.json", *words, cwd=tmp_path)
        assert done.returncode == 0 and bpe.load(tmp_path / "t.json").vocab_size <= 270, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "t.json"]
    (tmp_path / "a.txt").write_text("abab|abab|abc")
    run_main("bpe.py", "--input=a.txt", "--vocab_size=260", "--output=t.json", "--separator=|", cwd=tmp_path)
    assert bpe.load(tmp_path / "t.json").to_dict() == bpe.train("bpe", ["abab", "abab", "abc"], 260).to_dict()


def test_seeing(run_main, tmp_path):
    (tmp_path / "a.txt").write_text("the cat in the hat\n" * 20)
    done = run_main("bpe.py", "--input=a.txt", "--vocab_size=262", "--trace=2", "--dump=vocab.txt", "--show= the\n", cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["   256 b't' + b'h', 40 times", "   257 b'th' + b'e', 40 times"]
    tokenizer = bpe.load(tmp_path / "tokenizer.json")
    assert [tokenizer.vocab[i] for i in tokenizer.encode(" the\n")] == [b" ", b"the", b"\n"]  # " the" has no token yet
    assert [line.split() for line in lines[-3:]] == [["32", "\u00b7"], ["257", "the", "|"], ["10", "\\n", "|"]]
    dump = (tmp_path / "vocab.txt").read_text().splitlines()
    assert len(dump) == 262 and dump[10] == "10\t\\n" and dump[32] == "32\t\u00b7" and dump[200] == "200\t\\\\xc8"
    done = run_main("bpe.py", "--input=a.txt", "--compare=char,word,257,tokenizer.json", "--vocab_size=20", cwd=tmp_path)
    assert max(map(len, done.stdout.splitlines())) <= 80
    rows = [line.split() for line in done.stdout.splitlines()[3:]]
    assert [row[0] for row in rows] == ["char", "word", "257", "tokenizer.json"] and done.returncode == 0, done.stderr
    assert rows[2][3] == "1.000" and rows[0][3] == "1.000" and float(rows[3][3]) > 1.5
    (tmp_path / "empty.txt").touch()
    empty = run_main("bpe.py", "--input=empty.txt", "--compare=tokenizer.json", cwd=tmp_path)
    assert empty.stderr == "bpe.py: there is no text in --input=empty.txt to compare tokenizers on\n"
    few = run_main("bpe.py", "--input=a.txt", "--compare=word", "--vocab_size=4", cwd=tmp_path)
    assert float(few.stdout.splitlines()[3].split()[6].rstrip("%")) > 50  # of the bytes are hidden by <|unk|>


def test_bars_stand_behind_pieces_that_are_unknown_too(capsys):
    bpe.show(bpe.train("word", ["the cat"], 4), "a the cat the")
    assert [line.endswith(" |") for line in capsys.readouterr().out.splitlines()] == [True] * 4


def test_a_trace_shows_the_merges_of_the_tokenizer(run_main, tmp_path):
    (tmp_path / "a.txt").write_text("the cat in the hat\n" * 20)
    for words, merges in (["--vocab_size=259"], 2), (["--tokenizer=byte"], 0), (["--tokenizer=word"], 0):
        done = run_main("bpe.py", "--input=a.txt", "--trace=9", *words, cwd=tmp_path)
        assert done.stdout.count(" times") == merges, done.stdout


def test_colours_are_for_a_terminal(monkeypatch, capsys):
    tokenizer = bpe.train("byte", ["a b"], 300)
    bpe.show(tokenizer, "a b")
    plain = capsys.readouterr().out
    assert "\x1b" not in plain and plain.count(" |") == 2
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    bpe.show(tokenizer, "a b")
    coloured = capsys.readouterr().out
    assert coloured.count("\x1b[3") == 3 and regex.sub(r"\x1b\[\d+m", "", coloured) == plain


@pytest.mark.parametrize("words,message", [
    (["--input=missing.txt"], "missing.txt"), (["--input=empty.txt"], "no text"), (["--input=binary.bin"], "binary"),
    (["--input=."], "no text"), (["--input=a.txt", "--vocab_size=200"], "vocab_size=200"),
    (["--input=a.txt", "--special_tokens=x,x"], "special"), (["--input=a.txt", "--pattern=a"], "pattern"),
    (["--tokenizer=bpx"], "bpx"), (["--tokenizer=a.txt"], "a.txt"),
    (["--input=a.txt", "--vocab_size=260", "--output=no/where.json"], "'no'"),
    (["--input=b.txt", "--output=no/where.json"], "'no'"),  # told before the input is looked at
    (["--input=bad.jsonl"], "bad.jsonl"), (["--input=list.jsonl"], "list.jsonl"), (["--input=cut.txt.gz"], "cut.txt.gz"),
])
def test_bad_input_ends_in_one_line(words, message, run_main, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "a.txt").write_text("some text") if words[0] != "--input=." else None
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.bin").write_bytes(b"\0\1\2")
    if words[0].endswith(("jsonl", "gz")):
        (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"other": 1}\n')
        (tmp_path / "list.jsonl").write_text("[1]\n")
        (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(bytes(random.Random(1).choices(range(32, 127), k=50000)))[:30000])
    before = sorted(os.listdir(tmp_path))
    done = run_main("bpe.py", *words, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert done.stderr.strip().count("\n") == 0 and sorted(os.listdir(tmp_path)) == before


def test_options_are_refused_by_name(run_main, tmp_path):
    done = run_main("bpe.py", "--vocabsize=300", cwd=tmp_path)
    assert done.returncode == 2 and "--vocab_size" in done.stderr


def test_combining_marks_are_in_the_random_texts():
    """The alphabets hold what they promise."""
    kinds = {unicodedata.category(char) for char in "".join(ALPHABETS)}
    assert {"Mn", "Cc", "Cf", "Zs", "Zl", "Nd", "No", "Nl", "So", "Lo", "Cn"} <= kinds
