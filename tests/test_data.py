"""data.py against a few lines that do the same with everything in memory, and against every way in which a run can end."""
import contextlib
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import bpe
import data

END = "<|endoftext|>"
FILES = ["train.npy", "val.npy", "tokenizer.json", "manifest.json"]


def by_hand(documents, tokenizer, fraction=0.02, seed=0):
    """Token ids of the training and of the validation part, with everything in memory."""
    documents = [text for text in documents if text]
    if len(documents) < 20:
        border, parts = len("".join(documents)) * 9 // 10, ([], [])
        for text in documents:
            border, head, tail = border - len(text), text[:max(0, border)], text[max(0, border):]
            parts[0].extend([head] * bool(head))
            parts[1].extend([tail] * bool(tail))
    else:
        share = [int(hashlib.sha256(f"{seed}\n{text}".encode()).hexdigest()[:8], 16) / 2 ** 32 for text in documents]
        limit = max(fraction, min(share))
        parts = [[t for t, x in zip(documents, share) if x > limit], [t for t, x in zip(documents, share) if x <= limit]]
    end = tokenizer.special_tokens[END]
    return [sum((tokenizer.encode(text) + [end] for text in part), []) for part in parts]


def read(folder):
    """The token files of a folder as lists."""
    return [np.load(Path(folder) / f"{side}.npy", mmap_mode="r").tolist() for side in ("train", "val")]


def state(folder):
    """Everything that lies in a folder: {name: bytes}."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def prepare(source, output, tokenizer="byte", vocab_size=300, **more):
    return data.prepare(str(source), tokenizer, str(output), vocab_size, **more)


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of a few dozen characters, so that short texts are long ones."""
    monkeypatch.setattr(data, "PIECE", 60)
    monkeypatch.setattr(data, "JOB", 60)
    monkeypatch.setattr(bpe, "CHUNK", 50)


def random_text(rng, length):
    """Words, numbers, signs, white space of many kinds, letters of one to four bytes."""
    return "".join(rng.choice(["a", "the", "I'm", "7", "2024", " ", " ", "  ", "\n", "\r\n", "\t ", "é", "ß ", "東京", "😀", "...",
                               "_", "\u0301", "\u3000", "-", " 'll", "\ufffd"]) for _ in range(length))


# ------------------------------------------------------------------------------------------------------ the right tokens

@pytest.mark.parametrize("kind", ["bpe", "char", "byte", "word"])
def test_tokens_of_each_kind(kind, corpus, documents, tmp_path):
    manifest = prepare(corpus, tmp_path / "out", kind, separator=END)
    tokenizer = bpe.load(tmp_path / "out/tokenizer.json")
    assert read(tmp_path / "out") == by_hand(documents, tokenizer)
    assert manifest["train"]["documents"] + manifest["val"]["documents"] == 60 and manifest["val"]["documents"] > 0
    assert tokenizer.kind == kind


def test_the_tokenizer_sees_the_training_part_only(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"a" * 900 + b"b" * 100)
    prepare(path, tmp_path / "out", "char")
    tokenizer = bpe.load(tmp_path / "out/tokenizer.json")
    assert b"a" in tokenizer.vocab and b"b" not in tokenizer.vocab
    train, val = read(tmp_path / "out")
    assert len(train) == 901 and val == [tokenizer.special_tokens["<|unk|>"]] * 100 + [tokenizer.special_tokens[END]]


def test_bpe_is_trained_on_the_training_documents(corpus, documents, tmp_path):
    prepare(corpus, tmp_path / "out", "bpe", separator=END, val_fraction=0.3)
    share = [int(hashlib.sha256(f"0\n{text}".encode()).hexdigest()[:8], 16) / 2 ** 32 for text in documents]
    expected = bpe.train("bpe", [text for text, x in zip(documents, share) if x > 0.3], 300)
    assert bpe.load(tmp_path / "out/tokenizer.json").to_dict() == expected.to_dict()


def test_a_tokenizer_file_is_used_as_it_is(corpus, documents, tmp_path):
    tokenizer = bpe.train("bpe", ["another text altogether"], 270)
    tokenizer.save(tmp_path / "mine.json")
    prepare(corpus, tmp_path / "out", str(tmp_path / "mine.json"), separator=END)
    assert read(tmp_path / "out") == by_hand(documents, tokenizer)
    assert bpe.load(tmp_path / "out/tokenizer.json").to_dict() == tokenizer.to_dict()


@pytest.mark.parametrize("seed", range(3))
def test_shuffled_documents_are_those_of_the_input(seed, small_pieces, tmp_path):
    """The same documents on the same sides, in an order that only the seed decides, for any number of workers."""
    rng = random.Random(seed)
    documents = [random_text(rng, rng.choice([1, 50, 400])) + "x" for _ in range(60)]
    (tmp_path / "text.txt").write_bytes("<sep>".join(documents).encode())
    for name, more in (("plain", {}), ("one", dict(shuffle=True)), ("two", dict(shuffle=True, workers=2)), ("other", dict(shuffle=True, seed=seed + 9))):
        prepare(tmp_path / "text.txt", tmp_path / name, "char", separator="<sep>", **{"val_fraction": 0.3, "workers": 1, "seed": seed, **more})
    plain, one, other = ([cut_at_ends(ids, tmp_path / name) for ids in read(tmp_path / name)] for name in ("plain", "one", "other"))
    assert list(map(sorted, one)) == list(map(sorted, plain)) and one[0] != plain[0] and one[1] != plain[1]
    assert state(tmp_path / "one")["train.npy"] == state(tmp_path / "two")["train.npy"] and sorted(sum(other, [])) == sorted(sum(plain, []))
    assert sorted(os.listdir(tmp_path / "one")) == sorted(FILES) and json.loads(state(tmp_path / "one")["manifest.json"])["options"]["shuffle"]
    fixed = sum(a == b for a, b in zip(one[0], plain[0]))
    assert fixed < len(plain[0]) / 4, "an order drawn at random leaves about one document in its place"


def cut_at_ends(ids, folder):
    """The documents of a token file as texts."""
    tokenizer = bpe.load(folder / "tokenizer.json")
    return tokenizer.decode(ids).split(tokenizer.decode([tokenizer.special_tokens[END]]))[:-1]


@pytest.mark.parametrize("seed", range(3))
def test_long_documents_encode_like_short_ones(seed, small_pieces, tmp_path):
    rng = random.Random(seed)
    documents = [random_text(rng, rng.choice([0, 1, 50, 400])) for _ in range(60)]
    (tmp_path / "text.txt").write_bytes("<sep>".join(documents).encode())
    tokenizer = bpe.train("bpe", documents, 350)
    tokenizer.save(tmp_path / "t.json")
    prepare(tmp_path / "text.txt", tmp_path / "out", str(tmp_path / "t.json"), separator="<sep>", val_fraction=0.2)
    assert read(tmp_path / "out") == by_hand(documents, tokenizer, 0.2)


@pytest.mark.parametrize("pattern", sorted({*bpe.PATTERNS} - {"bytes"}))
def test_pieces_are_cut_where_the_pattern_does_not_look_across(pattern, small_pieces, tmp_path):
    rng = random.Random(pattern)
    for _ in range(50):
        text = random_text(rng, 300)
        (tmp_path / "text.txt").write_bytes(text.encode())
        pieces = [piece for piece, _ in data.Corpus([tmp_path / "text.txt"], "").pieces()]
        assert len(pieces) > 3 and max(map(len, pieces)) < 600
        assert "".join(pieces) == text
        assert sum((bpe.split(piece, bpe.PATTERNS[pattern]) for piece in pieces), []) == bpe.split(text, bpe.PATTERNS[pattern])


def test_a_text_without_white_space_is_cut_anyway(small_pieces, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"x" * 5000)
    pieces = list(data.Corpus([tmp_path / "text.txt"], "").pieces())
    assert "".join(text for text, _ in pieces) == "x" * 5000 and max(len(text) for text, _ in pieces) < 400
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize("separator", ["", END, "\n\n", "<"])
def test_the_separator_is_no_text(separator, tmp_path, small_pieces):
    texts = [f"text {i} <b> {END[:-1]} <{'word ' * (i * 7 % 40)}" for i in range(40)]
    (tmp_path / "a.txt").write_bytes(END.join(texts).encode() + b"\n\n\n\n<")
    whole = (tmp_path / "a.txt").read_text()
    documents = whole.split(separator) if separator else [whole]
    prepare(tmp_path / "a.txt", tmp_path / "out", separator=separator)
    tokenizer = bpe.load(tmp_path / "out/tokenizer.json")
    assert read(tmp_path / "out") == by_hand(documents, tokenizer)
    # Ordinary text never gives the id of <|endoftext|>, so there are as many as documents.
    ends = sum(ids.count(tokenizer.special_tokens[END]) for ids in read(tmp_path / "out"))
    assert ends == sum(map(bool, documents)) + (len(documents) < 20)


def test_a_folder_gives_a_document_for_each_file_in_order(tmp_path):
    texts = {f"{i:02}.txt": f"file {i}\r\nwith two lines\n" for i in range(30)}
    (tmp_path / "in/deeper").mkdir(parents=True)
    for name, text in texts.items():
        (tmp_path / ("in/deeper" if name == "07.txt" else "in") / name).write_bytes(text.encode())
    (tmp_path / "in/empty.txt").write_bytes(b"")
    prepare(tmp_path / "in", tmp_path / "out")
    files = bpe.find_files(str(tmp_path / "in"))
    assert read(tmp_path / "out") == by_hand([path.read_bytes().decode() for path in files], bpe.load(tmp_path / "out/tokenizer.json"))


def test_the_output_folder_is_no_input(tmp_path, capsys):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"some text {i} " * 9)
    first = prepare(tmp_path, tmp_path / "out")
    assert prepare(tmp_path, tmp_path / "out") == first and "reused" in capsys.readouterr().out
    assert first["train"]["documents"] + first["val"]["documents"] == 4  # one of three was cut in two


# ----------------------------------------------------------------------------------------------------- the validation set

@pytest.mark.parametrize("count", [1, 2, 3, 10, 19])
def test_few_documents_are_cut_at_nine_tenths(count, small_pieces, tmp_path, capsys):
    rng = random.Random(count)
    for trial in range(3):
        documents = [random_text(rng, rng.choice([1, 3, 10, 100, 400])) + "x" for _ in range(count)]
        if trial == 0:  # the border lies between two documents
            documents = ["e" * 9 * 10, "é" * 10] if count == 2 else documents
        (tmp_path / "text.txt").write_bytes("<sep>".join(documents).encode())
        prepare(tmp_path / "text.txt", tmp_path / f"out{trial}", separator="<sep>")
        assert read(tmp_path / f"out{trial}") == by_hand(documents, bpe.load(tmp_path / f"out{trial}/tokenizer.json"))
        assert capsys.readouterr().out == f"fewer than 20 documents ({count}): the last tenth of the text is for validation\n"


def test_shakespeare_is_cut_like_everywhere(test_data, tmp_path):
    path = test_data / "text/shakespeare.txt"
    prepare(path, tmp_path, "char", 1000)
    train, val = read(tmp_path)
    assert (len(train), len(val)) == (1003854 + 1, 111540 + 1)
    assert bpe.load(tmp_path / "tokenizer.json").decode(val[:-1]) == path.read_text()[1003854:]


def sides_of(documents, folder, **more):
    """The sets of documents that came to lie in the training and the validation file."""
    (folder / "text.txt").write_bytes("<sep>".join(documents).encode())
    prepare(folder / "text.txt", folder / "out", separator="<sep>", **more)
    tokenizer = bpe.load(folder / "out/tokenizer.json")
    end = tokenizer.decode([tokenizer.special_tokens[END]])
    return [tokenizer.decode(ids).split(end)[:-1] for ids in read(folder / "out")]


def test_equal_documents_stay_on_one_side_and_order_does_not_matter(tmp_path):
    documents = [f"document {i % 100}" for i in range(1000)]
    train, val = sides_of(documents, tmp_path, val_fraction=0.2)
    assert not set(train) & set(val) and 10 * len(set(val)) == len(val) and 8 <= len(set(val)) <= 35
    again = sides_of(sorted(documents)[::-1], tmp_path, val_fraction=0.2)
    assert [set(train), set(val)] == list(map(set, again))
    other = sides_of(documents, tmp_path, val_fraction=0.2, seed=1)
    assert set(other[1]) != set(val) and not set(other[0]) & set(other[1])


def test_the_fraction_is_met_and_never_empty(tmp_path):
    _, val = sides_of([f"text {i}" for i in range(5000)], tmp_path, val_fraction=0.1)
    assert abs(len(val) - 500) < 4 * 21  # four standard deviations of a binomial
    for count in range(20, 40):
        documents = [f"text {i}" for i in range(count)]
        train, val = sides_of(documents, tmp_path, val_fraction=1e-6)
        assert val == [min(documents, key=lambda text: hashlib.sha256(f"0\n{text}".encode()).digest())]
        assert len(train) == count - 1


# -------------------------------------------------------------------------------------------------------- what is counted

def test_invalid_utf8_is_replaced_and_counted(tmp_path, small_pieces):
    rng = random.Random(0)
    raw = b"".join(rng.choice([b"a ", b"\xff", b"\xc3\xa9", b"\xe6\x9d", b"\xf0\x9f\x98\x80", b"\x80", b"\xef\xbf\xbd", b"\n"])
                   for _ in range(3000))
    (tmp_path / "text.txt").write_bytes(raw)
    manifest = prepare(tmp_path / "text.txt", tmp_path / "out")
    faults, rest = 0, raw
    while True:
        try:
            rest.decode()
            break
        except UnicodeDecodeError as error:
            faults, rest = faults + 1, rest[error.end:]
    assert manifest["utf8_errors"] == faults > 300
    text = raw.decode("utf-8", "replace")
    assert read(tmp_path / "out") == by_hand([text], bpe.load(tmp_path / "out/tokenizer.json"))
    assert manifest["train"]["bytes"] + manifest["val"]["bytes"] == len(text.encode())


def test_jsonl(tmp_path, documents):
    bad = ['{"text": 1}', "[1]", "{}", '"text"', "{", "nonsense", '{"text": null}', "[" * 99999]
    lines = [json.dumps({"text": text, "more": i}, ensure_ascii=i % 2 == 0) for i, text in enumerate(documents)]
    lines[3:3] = [*bad, "", "  ", '{"text": ""}']
    lines.append('{"text": "a true \ufffd"}')
    raw = "\n".join(lines).encode() + b'\n{"text": "half \\ud83d of \xff"}'
    (tmp_path / "text.jsonl").write_bytes(b"\xef\xbb\xbf" + raw)  # a byte order mark, as Windows writes it
    manifest = prepare(tmp_path / "text.jsonl", tmp_path / "out", separator=" ")  # a separator is for text files
    assert (manifest["bad_lines"], manifest["utf8_errors"]) == (len(bad), 1)
    expected = [*documents, "a true \ufffd", "half \ufffd of \ufffd"]
    assert read(tmp_path / "out") == by_hand(expected, bpe.load(tmp_path / "out/tokenizer.json"))


def test_a_long_jsonl_document(tmp_path, small_pieces):
    documents = [random_text(random.Random(i), 3000) for i in range(21)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    prepare(tmp_path / "text.jsonl", tmp_path / "out", "bpe")
    assert read(tmp_path / "out") == by_hand(documents, bpe.load(tmp_path / "out/tokenizer.json"))


def test_the_manifest_tells_the_truth(corpus, documents, tmp_path):
    (tmp_path / "more.txt").write_bytes(b"one more")
    manifest = prepare(f"{corpus},{tmp_path}/more.txt", tmp_path / "out", separator=END, workers=2)
    assert json.loads((tmp_path / "out/manifest.json").read_text()) == manifest
    assert sorted(os.listdir(tmp_path / "out")) == sorted(FILES)
    assert manifest["inputs"] == [{"path": str(path), "bytes": len(path.read_bytes()), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
                                  for path in (corpus, tmp_path / "more.txt")]
    assert manifest["files"] == {name: (tmp_path / "out" / name).stat().st_size for name in FILES if name != "manifest.json"}
    train, val = read(tmp_path / "out")
    assert [manifest[side]["tokens"] for side in ("train", "val")] == [len(train), len(val)]
    assert manifest["train"]["bytes"] + manifest["val"]["bytes"] == len("".join([*documents, "one more"]).encode())
    assert manifest["options"]["separator"] == END and manifest["seconds"] > 0


# ---------------------------------------------------------------------------------------------------------- reuse

def test_the_same_input_and_options_are_reused(corpus, tmp_path, capsys):
    first = prepare(corpus, tmp_path / "out", separator=END)
    before = {name: os.stat(tmp_path / "out" / name).st_mtime_ns for name in FILES}
    capsys.readouterr()
    assert prepare(corpus, tmp_path / "out", separator=END, workers=3) == first
    assert capsys.readouterr().out == f"{tmp_path}/out: the files of an earlier run with the same input and options are reused\n"
    assert before == {name: os.stat(tmp_path / "out" / name).st_mtime_ns for name in FILES}


@pytest.mark.parametrize("change", [
    lambda folder: dict(separator=""), lambda folder: dict(val_fraction=0.3), lambda folder: dict(seed=1),
    lambda folder: dict(tokenizer="char"), lambda folder: dict(tokenizer="bpe", vocab_size=301),
    lambda folder: (folder / "corpus.txt").write_text("other text " * 50),
    lambda folder: (folder / "out/val.npy").unlink(), lambda folder: os.truncate(folder / "out/train.npy", 200),
    lambda folder: (folder / "out/manifest.json").write_text("[]"), lambda folder: (folder / "out/manifest.json").write_text("{"),
    lambda folder: os.rename(folder / "corpus.txt", folder / "b.txt") or dict(source=folder / "b.txt")])
def test_a_change_rebuilds(change, corpus, tmp_path, capsys):
    prepare(corpus, tmp_path / "out", separator=END)
    changed = change(tmp_path)
    options = {"source": corpus, "separator": END, **(changed if isinstance(changed, dict) else {})}
    capsys.readouterr()
    prepare(output=tmp_path / "out", **options)
    assert "reused" not in capsys.readouterr().out
    prepare(output=tmp_path / "new", **options)
    assert all(state(tmp_path / "out")[name] == state(tmp_path / "new")[name] for name in FILES[:3])


@pytest.mark.parametrize("name", ["mine.json", "folder"])
def test_another_tokenizer_file_of_the_same_name_rebuilds(name, corpus, tmp_path):
    (tmp_path / "folder").mkdir()
    for text in ("first text", "second text"):
        bpe.train("bpe", [text], 262).save(tmp_path / name / "tokenizer.json" if name == "folder" else tmp_path / name)
        prepare(corpus, tmp_path / "out", str(tmp_path / name), separator=END)
        assert bpe.load(tmp_path / "out/tokenizer.json").to_dict() == bpe.load(tmp_path / name).to_dict()


def test_code_that_changed_rebuilds(corpus, tmp_path, run_script):
    for name in ("data.py", "bpe.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    words = ["--input=corpus.txt", "--tokenizer=byte", "--output=out"]
    outputs = [run_script("data.py", *words, cwd=tmp_path, root=tmp_path).stdout]
    outputs += [run_script("data.py", *words, cwd=tmp_path, root=tmp_path).stdout]
    for name in ("bpe.py", "language.npz"):  # the latter is what the step language reads
        with open(tmp_path / name, "a") as file:
            file.write("# changed\n")
        outputs += [run_script("data.py", *words, cwd=tmp_path, root=tmp_path).stdout]
    assert ["reused" in output for output in outputs] == [False, True, False, False]


# ------------------------------------------------------------------------------------------------- processes and memory

def test_the_same_bytes_for_any_number_of_workers(small_pieces, tmp_path, corpus):
    for workers in (1, 2, 5):
        prepare(corpus, tmp_path / str(workers), "bpe", separator=END, workers=workers)
    for name in FILES[:3]:
        assert len({state(tmp_path / str(workers))[name] for workers in (1, 2, 5)}) == 1


SPAWN = """
import multiprocessing, sys
sys.path.insert(0, sys.argv[1])
import data
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    data.PIECE = data.JOB = 1000
    data.prepare("corpus.txt", "tok.json", sys.argv[2], 300, separator="<|endoftext|>", workers=int(sys.argv[3]))
"""


def test_spawned_workers_give_the_same(tmp_path, corpus, documents):
    bpe.train("bpe", documents, 300).save(tmp_path / "tok.json")
    (tmp_path / "main.py").write_text(SPAWN)
    for output, workers in [("a", 1), ("b", 2)]:
        subprocess.run([sys.executable, "main.py", str(ROOT), output, str(workers)], cwd=tmp_path, check=True, timeout=60)
    assert [state(tmp_path / "a")[name] for name in FILES[:3]] == [state(tmp_path / "b")[name] for name in FILES[:3]]


def peak(source, output):
    """Peak of the memory that Python holds while a file is prepared, in bytes."""
    tracemalloc.start()
    prepare(source, output, "bpe", workers=1, separator="<sep>")
    top = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return top


@pytest.mark.parametrize("separator", ["", "<sep>"])
def test_memory_does_not_grow_with_the_input(separator, tmp_path, monkeypatch):
    text = ("".join(map(chr, range(97, 123))) + " some words, 123\n") * 40 + separator
    for name, count in (("small", 150), ("large", 600)):
        (tmp_path / name).write_text("".join(f"{i % 50} {text}" for i in range(count)))
    monkeypatch.setattr(data, "PIECE", 1 << 14)
    monkeypatch.setattr(data, "JOB", 1 << 14)
    monkeypatch.setattr(bpe, "CHUNK", 1 << 14)
    monkeypatch.setattr(bpe, "BLOCK", 1 << 14)
    monkeypatch.setattr(bpe, "SLOTS", 8)  # a table of its own size
    bpe.kinds()  # another one
    small, large = (peak(tmp_path / name, tmp_path / f"{name}.out") for name in ("small", "large"))
    assert large < small + 100_000 < 1_000_000  # the large one has a million characters
    # An offender: a piece that holds everything.
    monkeypatch.setattr(data, "PIECE", 1 << 30)
    monkeypatch.setattr(data, "JOB", 1 << 30)
    monkeypatch.setattr(bpe, "CHUNK", 1 << 30)
    assert peak(tmp_path / "large", tmp_path / "offender") > 3_000_000


# ------------------------------------------------------------------------------------------------------- the token files

def test_the_header_has_one_size():
    for dtype in ("<u2", "<u4"):
        for length in (0, 1, 10 ** 9, 10 ** 18):
            file = io.BytesIO()
            data.write_header(file, np.dtype(dtype), length)
            assert file.tell() == 128
            file.seek(0)
            assert np.lib.format.read_magic(file) == (1, 0)
            assert np.lib.format.read_array_header_1_0(file) == ((length,), False, np.dtype(dtype))


@pytest.mark.parametrize("words, dtype", [(65536 - 2, np.uint16), (65536 - 1, np.uint32)])
def test_the_dtype_follows_the_vocabulary(words, dtype, tmp_path):
    vocabulary = [f"w{i}".encode() for i in range(words)] + [b"<|unk|>", END.encode()]
    tokenizer = bpe.Tokenizer("word", r"\w+|\s|.", vocabulary, [], {"<|unk|>": words, END: words + 1})
    tokenizer.save(tmp_path / "t.json")
    (tmp_path / "text.txt").write_text("\n".join(f"w{words - 1 - i}" for i in range(50)))
    prepare(tmp_path / "text.txt", tmp_path / "out", str(tmp_path / "t.json"), separator="\n")
    assert np.load(tmp_path / "out/train.npy").dtype == np.load(tmp_path / "out/val.npy").dtype == dtype
    ids = sum(read(tmp_path / "out"), [])
    assert set(ids) == {*range(words - 50, words), words + 1}


def test_an_id_beyond_the_vocabulary_is_refused(corpus, tmp_path, monkeypatch):
    prepare(corpus, tmp_path / "out")
    before = state(tmp_path / "out")
    monkeypatch.setattr(bpe.Tokenizer, "encode_batch", lambda self, texts, workers: [np.full(3, 65536 + 5)] * len(texts))
    with pytest.raises(ValueError, match="65541"):
        prepare(corpus, tmp_path / "out", separator=END)
    assert state(tmp_path / "out") == before


@pytest.mark.parametrize("length", [1, 40])
def test_an_input_that_grows_meanwhile_is_refused(length, corpus, tmp_path, monkeypatch):
    train, raw = bpe.train, corpus.read_bytes()

    def change(*words, **more):
        corpus.write_bytes(raw + f"{END} more text{END}".encode()[:length + 13])
        return train(*words, **more)
    monkeypatch.setattr(bpe, "train", change)
    with pytest.raises(ValueError, match="changed while it was read"):
        prepare(corpus, tmp_path / "out", separator=END)
    assert state(tmp_path / "out") == {}


# -------------------------------------------------------------------------------------------------- the command and faults

def test_the_command(corpus, documents, tmp_path, run_main):
    words = ["--input=corpus.txt", f"--separator={END}", "--tokenizer=bpe", "--vocab_size=300"]
    done = run_main("data.py", *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"train.npy: {manifest['train']['documents']} documents, {manifest['train']['bytes']:,} bytes, "
                               f"{manifest['train']['tokens']:,} tokens, ") and lines[1].startswith("val.npy: ")
    assert re.fullmatch(r"[\d.]+ s in all; encoded at [\d,]+ tokens/s", lines[-2]) and lines[-1] == "next: python train.py --data=data"
    assert read(tmp_path / "data") == by_hand(documents, bpe.load(tmp_path / "data/tokenizer.json"))
    again = run_main("data.py", *words, cwd=tmp_path)
    assert "are reused" in again.stdout and again.returncode == 0


def test_lines_about_xz_fit_a_terminal(corpus, tmp_path, capsys):
    prepare(corpus, tmp_path / "out", separator=END)
    capsys.readouterr()
    bits = data.xz_bits_per_byte(str(tmp_path / "out"))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and re.findall(r"\d\.\d{4}", " ".join(lines)) == [f"{value:.4f}" for value in bits.values()]


def test_errors_in_the_input_are_reported(tmp_path, run_main):
    (tmp_path / "a.txt").write_bytes(b"good text \xff" * 30)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "good"}\n{"no": 1}\n')
    done = run_main("data.py", "--input=a.txt,b.jsonl", "--tokenizer=byte", cwd=tmp_path)
    assert "30 places that were not UTF-8 became U+FFFD\n1 lines were left out" in done.stdout and done.returncode == 0


REFUSED = {
    "missing": (["--input=nowhere.txt"], "nowhere.txt"),
    "empty file": (["--input=empty.txt"], "empty.txt"),
    "empty folder": (["--input=folder"], "folder"),
    "binary": (["--input=binary.bin"], "binary.bin"),
    "binary beside text": (["--input=corpus.txt,binary.bin"], "binary.bin"),
    "no line of jsonl": (["--input=bad.jsonl"], "3 lines"),
    "only separators": (["--input=corpus.txt", "--separator=a", "--input=as.txt"], "no document"),
    "one character": (["--input=one.txt"], "validation"),
    "documents all equal": (["--input=same.txt", "--separator=-"], "validation"),
    "output is a file": (["--input=corpus.txt", "--output=one.txt"], "one.txt"),
    "output below a file": (["--input=corpus.txt", "--output=one.txt/out"], "one.txt"),
    "output cannot be made": (["--input=corpus.txt", "--output=/proc/out"], "/proc/out"),
    "tokenizer neither file nor kind": (["--input=corpus.txt", "--tokenizer=bep"], "neither a file nor a kind"),
    "foreign tokenizer": (["--input=corpus.txt", "--tokenizer=foreign.json"], "foreign.json"),
    "tokenizer is text": (["--input=corpus.txt", "--tokenizer=corpus.txt"], "corpus.txt"),
    "vocabulary too small": (["--input=corpus.txt", "--vocab_size=200", "--tokenizer=bpe"], "200"),
    "pattern": (["--input=corpus.txt", "--tokenizer=bpe", "--pattern=("], "pattern"),
    "pattern that drops text": (["--input=corpus.txt", "--tokenizer=bpe", "--pattern=a"], "pattern"),
    "fraction": (["--input=corpus.txt", "--val_fraction=0"], "--val_fraction"),
    "all held out": (["--input=corpus.txt", f"--separator={END}", "--val_fraction=1"], "--val_fraction"),
    "workers": (["--input=corpus.txt", "--workers=-1"], "--workers"),
    "step": (["--input=corpus.txt", "--steps=tokenise,fly"], "tokenise,fly"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, corpus, tmp_path, run_main):
    words, named = REFUSED[case]
    (tmp_path / "folder").mkdir()
    for name, text in {"empty.txt": b"", "binary.bin": b"PK\0\1", "bad.jsonl": b"{\n[]\n{}\n", "as.txt": b"aaa", "one.txt": b"x",
                       "same.txt": b"same-" * 30, "foreign.json": b'{"model": {"type": "BPE"}}'}.items():
        (tmp_path / name).write_bytes(text)
    prepare(corpus, tmp_path / "data", separator=END)
    before = state(tmp_path)
    done = run_main("data.py", "--tokenizer=byte", *words, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("data.py: ") and done.stderr.count("\n") == 1 and named in done.stderr, done.stderr
    assert state(tmp_path) == before


def as_nobody(folder, *words, pipe):
    """Run data.py's main as a user without rights (root may read and write everything)."""
    os.chdir(folder)
    if os.geteuid() == 0:
        os.setuid(65534)
    sys.argv = ["data.py", *words]
    try:
        data.run(data.main)
    except SystemExit as end:
        pipe.send(end.code)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="rights of files work otherwise here")
def test_no_right_to_read_or_write(corpus):
    with tempfile.TemporaryDirectory() as name:  # below tmp_path another user may not pass
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "corpus.txt").write_bytes(corpus.read_bytes())
        (folder / "secret.txt").write_bytes(b"secret")
        (folder / "secret.txt").chmod(0)
        (folder / "locked").mkdir(mode=0o555)
        for words, path in [(["--input=secret.txt", "--output=out"], "secret.txt"), (["--input=corpus.txt", "--output=locked"], "locked"),
                            (["--input=corpus.txt", "--output=locked/out"], "locked/out")]:
            here, there = multiprocessing.Pipe()
            child = multiprocessing.get_context("fork").Process(
                target=as_nobody, args=(folder, *words, "--tokenizer=byte"), kwargs={"pipe": there})
            child.start()
            assert here.poll(30)
            message = here.recv()
            child.join()
            assert message.startswith("data.py: ") and "ermission denied" in message and path in message, message
        assert os.listdir(folder / "locked") == []


def test_a_full_disk_leaves_the_old_files(corpus, tmp_path):
    resource = pytest.importorskip("resource")
    prepare(corpus, tmp_path / "out", separator=END)
    before = state(tmp_path)
    for limit in (5000, 100):  # bytes a file may have: in the middle of train.npy, in its header
        done = subprocess.run([sys.executable, "-B", str(ROOT / "data.py"), "--input=corpus.txt", "--output=out", "--tokenizer=byte"],
                              cwd=tmp_path, text=True, capture_output=True, timeout=60,
                              preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        assert done.returncode == 1 and done.stderr.endswith("data.py: [Errno 27] File too large: 'out'\n"), done.stderr
        assert state(tmp_path) == before


def children_of(process):
    """The ids of the processes that a process has started; none if it has ended."""
    with contextlib.suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    return []


@pytest.fixture
def long_run(tmp_path, documents):
    """A function that starts a run of some seconds over a folder that holds an earlier one, and waits for its first bytes."""
    (tmp_path / "small.txt").write_text("<sep>".join(documents))
    (tmp_path / "large.txt").write_text("".join(random_text(random.Random(0), 40) for _ in range(500)) * 450)
    prepare(tmp_path / "small.txt", tmp_path / "out", separator="<sep>")
    started = []

    def start(stage="encoding"):
        words = {"encoding": [f"--tokenizer={tmp_path}/out/tokenizer.json"], "training": ["--vocab_size=300"]}[stage]
        process = subprocess.Popen([sys.executable, str(ROOT / "data.py"), "--input=large.txt", "--output=out", "--workers=2", *words],
                                   cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # `pytest &` ignores it
        started.append(process)
        part, deadline = tmp_path / "out/train.npy.part", time.monotonic() + 30
        if not Path(f"/proc/{process.pid}/task/{process.pid}/children").exists():
            pytest.skip("the system does not tell the children of a process")
        def ready():
            return children_of(process) and (stage == "training" or part.exists() and part.stat().st_size > 128)

        while not ready():
            assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be disturbed"
            time.sleep(0.005)
        return process, children_of(process)
    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def gone(pids):
    """Whether the processes have ended, after some seconds' grace."""
    alive = pids
    for _ in range(200):
        alive = [pid for pid in alive if os.path.exists(f"/proc/{pid}") and " Z " not in Path(f"/proc/{pid}/stat").read_text()]
        if not alive:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("stage", ["training", "encoding"])
def test_kill_leaves_the_old_files_and_no_workers(stage, long_run, tmp_path):
    before = state(tmp_path / "out")
    process, workers = long_run(stage)
    process.kill()
    process.communicate()
    assert gone(workers)
    left = state(tmp_path / "out")
    assert {name: left[name] for name in FILES} == before
    prepare(tmp_path / "small.txt", tmp_path / "out", separator="<sep>", seed=1)  # the next run clears up
    assert sorted(state(tmp_path / "out")) == sorted(FILES)


def test_ctrl_c_leaves_the_old_files_and_no_workers(long_run, tmp_path):
    before = state(tmp_path)
    process, workers = long_run()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "") and gone(workers)
    assert state(tmp_path) == before


@pytest.mark.parametrize("stage", ["training", "encoding"])
def test_a_killed_worker_ends_the_run_in_one_line(stage, long_run, tmp_path):
    before = state(tmp_path)
    process, workers = long_run(stage)
    deadline = time.monotonic() + 60
    while process.poll() is None:  # a process may have given its answer just before it is killed
        assert time.monotonic() < deadline, "it waits for ever"
        for pid in children_of(process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 1 and err.count("\n") == 1
    assert err.startswith("data.py: ") and ("a process was killed" in err or "end of file" in err)
    assert gone(workers) and state(tmp_path) == before


@pytest.mark.slow
def test_the_default_corpus(tmp_path, run_script):
    done = run_script("data.py", cwd=tmp_path)
    assert done.returncode == 0 and json.loads((tmp_path / "data/manifest.json").read_text())["train"]["documents"] > 500


# ---------------------------------------------------------------------------------------------------------- HTML to text

def four_grams(text):
    words = re.findall(r"\w+", text)
    return Counter(tuple(words[i:i + 4]) for i in range(max(bool(words), len(words) - 3)))


def f1(texts, truths):
    """The harmonic mean of macro precision and recall of the multisets of 4-grams."""
    precision, recall = [], []
    for text, truth in zip(texts, truths):
        found, wanted = four_grams(text), four_grams(truth)
        both = sum((found & wanted).values())
        precision.append(both / max(1, sum(found.values())))
        recall.append(both / max(1, sum(wanted.values())))
    p, r = sum(precision) / len(precision), sum(recall) / len(recall)
    return 2 * p * r / (p + r)


def test_the_main_content_of_real_pages(test_data):
    folder = test_data / "web/aeb_dev"
    truth = json.loads((folder / "ground-truth.json").read_text())
    pages = {name: gzip.decompress((folder / f"{name}.html.gz").read_bytes()) for name in truth}
    wanted = [truth[name]["articleBody"] for name in pages]
    assert len(pages) == 88 and f1(map(data.extract, pages.values()), wanted) > 0.965
    assert f1([data.extract(page, main=False) for page in pages.values()], wanted) < 0.75  # an offender: all text
    sites = {part for entry in truth.values() for part in re.split(r"[./]+", entry["url"])[1:3] if len(part) > 3}
    assert len(sites) > 50 and not sites & data.NOISE - {"news", "blog"}


PAGE = """<html><head><title>no</title><style>p {}</style></head><body class="menu"><nav><a href=x>Home</a> of all</nav>
<div id="page"><h1>The title</h1><p>First <b>para</b>graph &amp; more,<br>a line<p class='related-posts'>Read this, too<ul>
<li>one<li>two <code>x = 1</code><ol><li><p>inner</ol></ul><h3>Data</h3>
<table><thead><tr><th></th><th>Name<th>Age</thead><tr><td><p>1</p></td><td><a href=a>Ann</a></td><td>7</td></tr></table>
<table><tr><td>%s<td>short</table><pre><code>def f():
    return 1 &lt; 2

</code></pre><!-- <p>no --><script>var a = "<p>no</p>";</script><![CDATA[<p>no</p>]]><blockquote>Said.</blockquote>
<div style="display: none">no</div><div><a href=1>one link</a> <a href=2>more links</a></div><p>The last, long paragraph. %s
</div></section><footer>Copyright</footer></body></html>""" % ("long cell " * 30, "More of it. " * 30)
MARKDOWN = f"""# The title

First paragraph & more,
a line

- one
- two `x = 1`

- inner

### Data

|  | Name | Age |
|---|---|---|
| 1 | Ann | 7 |

{("long cell " * 30).strip()}
short

```
def f():
    return 1 < 2
```

> Said.

The last, long paragraph. {("More of it. " * 30).strip()}"""


def test_structure_is_kept_as_markdown():
    found = data.extract(PAGE)
    assert re.sub("\n+", "\n", found) == re.sub("\n+", "\n", MARKDOWN)
    for part in ("a line\n\n", "- one\n- two `x = 1`\n", "\n\n### Data\n\n|", "|---|\n| 1 |", "```\ndef f():\n    return 1 < 2\n```\n"):
        assert part in found
    everything = data.extract(PAGE, main=False)
    assert all(word in everything for word in ("Home", "Copyright", "Read this", "one link", *found.split()))
    assert everything.split().count("no") == 1  # of the element that is not displayed


def test_tables_are_kept_apart_and_code_keeps_its_blank_lines():
    row = "<tr><td>1|2</td><td>3</td></tr>"
    table = "| 1\\|2 | 3 |\n|---|---|\n| 1\\|2 | 3 |"
    assert data.extract(f"<table>{row * 2}</table><table>{row * 2}</table>") == f"{table}\n\n{table}"
    assert data.extract(row * 2) == table
    assert data.extract("<pre>x\n<br>y<br><br>z</pre>") == "```\nx\n\ny\n\nz\n```"
    assert data.extract("<pre>\n<div>x</div>\n<div>\n</div>\n<div> y</div><div><br></div>z</pre>") == "```\nx\n\n y\n\nz\n```"
    assert data.extract("<pre>x\n```\ny\n```</pre><pre> </pre>") == "````\nx\n```\ny\n```\n````"


def test_an_item_or_heading_of_several_lines_is_one():
    assert data.extract("<h2>a<br>b</h2><ul><li><p>c</p><p>d</p><li>e<br>f</ul>") == "## a b\n\n- c\n  d\n- e\n  f"
    assert data.extract("<blockquote><p>a<p>b</blockquote>c<br>d") == "> a\n\n> b\n\nc\nd"
    assert data.extract("<p>a <code>b<br>c</code> d<p>e <b>f<br></b>g") == "a `b\nc` d\n\ne f\ng"


def test_rows_and_items_need_no_end():
    rows, items = "<tr><td>1<td>2" * 150, "<li><p>a" * 150
    found = data.extract(f"<table>{rows}</table><p>one<ul>{items}</ul><p>two", main=False)
    assert found == "| 1 | 2 |\n|---|---|" + "\n| 1 | 2 |" * 149 + "\n\none\n\n" + "- a\n" * 150 + "\ntwo"


@pytest.mark.parametrize("name, charset", [("utf-8", ""), ("utf-8-sig", ""), ("utf-16", ""), ("cp1252", ""), ("cp1251", "windows-1251"),
                                           ("gb18030", "gb2312"), ("shift_jis", "Shift_JIS"), ("latin-1", "ISO-8859-1"),
                                           ("cp949", "euc-kr"), ("cp1254", "iso-8859-9"), ("cp932", "windows-31j"), ("koi8-r", "windows-9999")])
def test_character_sets(name, charset):
    text = {"cp1251": "Привет, мир", "gb18030": "你好,世界", "shift_jis": "こんにちは", "cp949": "똠방각하", "cp932": "①髙い", "koi8-r": "Привет, мир"}.get(name, "naïve café – “yes”" if name != "latin-1" else "naïve")
    page = f"<meta charset='{charset}'><p>{text}</p>" if charset else f"<p>{text}</p>"
    assert data.extract(page.encode(name)) == text
    assert data.decode(text.encode(name), f"Content-Type: text/html; charset={charset}") == text


def test_a_hostile_character_set_is_not_tried():
    for name in ("unicode_escape", "idna", "zip", "utf-7", "utf-99", "gbfoo", "none"):
        assert data.extract(f"<meta charset={name}><p>a\\u0041+AEE-é".encode("cp1252")) == "a\\u0041+AEE-é"


HOSTILE = ["<div>x", "<b>x<br>", "<!--", "<![CDATA[", "<script>", '<a "', "<a =x", '<a b="', "<", "<table><td>x", "</div>", "<a></b>", "&amp",
           "<ul><li>x", "<a class=class ", "<pre>x\n", "<script></scrip", "<!", "a=b ", "<p></q>", "\0", "<h1><table>"]


def test_hostile_pages_take_linear_time():
    """A quadratic step would take an hour, not the seconds of a linear one."""
    def late(*_):
        raise TimeoutError
    signal.signal(signal.SIGALRM, late)
    signal.alarm(50)
    try:
        for unit in HOSTILE:
            text = data.extract("<a " * (unit == "a=b ") + unit * (100_000 // len(unit)))
            assert len(text) < 1_000_000
    finally:
        signal.alarm(0)


def mutated(rng, raw):
    """Bytes with a few cuts, repetitions and strange bytes."""
    raw = bytearray(raw)
    for _ in range(rng.randrange(1, 12)):
        at, length = rng.randrange(len(raw) + 1), rng.choice([1, 2, 10, 100])
        raw[at:at + length] = rng.choice([b"", bytes(raw[at:at + length]) * 3, rng.randbytes(length), b"<", b">", b'"', b"&#x110000;", b"</", b"\0"])
    return bytes(raw)


def test_mutated_pages_give_text():
    rng = random.Random(0)
    for _ in range(int(os.environ.get("FUZZ", 1500))):
        page = mutated(rng, PAGE.encode())
        text = data.extract(page)
        assert text.encode() is not None and len(text) < 3 * len(page) + 100  # no half of a surrogate pair


# ------------------------------------------------------------------------------------------------------------------ WARC

WARCS = {"example.warc": 6, "example.warc.gz": 6, "example-trunc.warc": 4, "example-wget-bad-target-uri.warc.gz": 6,
         "example-resource.warc.gz": 3, "example-iana.org-chunked.warc": 3, "whirlwind.warc.gz": 4, "whirlwind.warc.wet.gz": 2}


@pytest.mark.parametrize("name", WARCS)
def test_records_of_real_files(name, test_data):
    counts = Counter()
    records = list(data.read_warc(test_data / "web/warc" / name, counts))
    assert len(records) == WARCS[name] and counts["broken"] == (name == "example-trunc.warc")  # a length two bytes short
    pages = [(headers, payload) for headers, payload in records if headers["WARC-Type"] in ("response", "conversion")]
    for headers, payload in pages:  # chunks are joined, gzip is unpacked
        assert headers["WARC-Target-URI"].startswith(("http", "<http"))
        assert "http" not in headers or payload[:14].lower() == b"<!doctype html" and payload.rstrip().endswith(b"</html>")
        assert not re.search("^(content|transfer)-encoding", headers.get("http", ""), re.I | re.M)


def example_records(count=40, size=3000):
    rng = random.Random(0)
    return [({"WARC-Type": "resource", "WARC-Target-URI": f"http://example.com/{i}", "Note": "ä: b"} |
             ({"http": f"HTTP/1.1 200 OK\r\nX-Number: {i}\r\n", "Content-Type": "application/http"} if i % 2 else {}),
             rng.choice([b"", b"\r\n\r\n", rng.randbytes(size), b"WARC/1.0\r\n" * 9])) for i in range(count)]


def without_length(records):
    return [({key: value for key, value in headers.items() if key != "Content-Length"}, payload) for headers, payload in records]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_written_records_are_read_again(name, tmp_path, monkeypatch):
    records = example_records()
    data.write_warc(tmp_path / name, records)
    assert without_length(data.read_warc(tmp_path / name)) == records
    raw = (tmp_path / name).read_bytes()
    assert (raw[:2] == b"\x1f\x8b") == name.endswith("gz") and raw.count(b"\x1f\x8b\x08") >= 40 * name.endswith("gz")
    os.rename(tmp_path / name, tmp_path / "renamed")  # what a file is says its content
    assert without_length(data.read_warc(tmp_path / "renamed")) == records
    (tmp_path / "one").write_bytes(gzip.compress(gzip.decompress(raw) if name.endswith("gz") else raw))  # a single member
    assert without_length(data.read_warc(tmp_path / "one")) == records


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_a_damaged_record_costs_no_other(name, tmp_path):
    records = example_records(30, 500)
    data.write_warc(tmp_path / name, records)
    raw = (tmp_path / name).read_bytes()
    rng, lost = random.Random(1), 0
    for _ in range(40):
        damaged, at = bytearray(raw), rng.randrange(len(raw) - 10)
        damaged[at:at + 10] = rng.randbytes(10)
        (tmp_path / name).write_bytes(damaged)
        counts = Counter()
        found = without_length(data.read_warc(tmp_path / name, counts))
        good = [record for record in found if record in records]
        assert len(good) >= 28
        lost += counts["broken"] > 0
    assert lost > (30 if name.endswith("gz") else 3)


def test_chunks_and_codings(tmp_path):
    body, packed = b"<p>text</p>" * 20, gzip.compress(b"<p>text</p>" * 20)
    chunks = b"".join(b"%x;x=y\r\n%s\r\n" % (len(part), part) for part in (packed[:7], packed[7:])) + b"0\r\n\r\n"
    for fields, sent in [(b"Transfer-Encoding: chunked\r\nContent-Encoding: gzip\r\n", chunks), (b"Content-Encoding: GZIP\r\n", packed),
                         (b"Content-Encoding: deflate\r\n", zlib.compress(body)), (b"Content-Encoding: gzip\r\n", body),
                         (b"Transfer-Encoding: chunked\r\n", body), (b"", body)]:
        head, found = data.http_body(b"HTTP/1.1 200 OK\r\nA: b\r\n" + fields + b"\r\n" + sent, 1 << 20)
        assert (head, found) == ("HTTP/1.1 200 OK\r\nA: b\r\n", body)
    bomb = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(bytes(10 ** 7))
    assert len(data.http_body(bomb, 1000)[1]) == 1000 and len(data.http_body(bomb, 1 << 30)[1]) == 10 ** 7


def test_a_bomb_is_read_in_bounded_memory(tmp_path):
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(b"WARC/1.0\r\nContent-Length: 100000000\r\n\r\n" + bytes(10 ** 8)))
    for most, records, limit in [(10 ** 6, 0, 5_000_000), (10 ** 9, 1, 10 ** 9)]:
        tracemalloc.start()
        counts = Counter()
        assert sum(1 for _ in data.read_warc(tmp_path / "bomb.gz", counts, most)) == records
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert top < limit and bool(counts["broken"]) != records and (records == 0 or top > 10 ** 8)


def test_mutated_archives_end_well(tmp_path):
    rng = random.Random(0)
    data.write_warc(tmp_path / "a.warc.gz", example_records(5, 50))
    packed = (tmp_path / "a.warc.gz").read_bytes()
    for i in range(int(os.environ.get("FUZZ", 600))):
        raw = mutated(rng, [packed, gzip.decompress(packed)][i % 2])
        (tmp_path / "b").write_bytes(raw)
        assert all(isinstance(payload, bytes) for _, payload in data.read_warc(tmp_path / "b"))


# -------------------------------------------------------------------------------------------------------- the step extract

def site(folder, count=60):
    """A folder with pages, an archive of pages and other records, and a text: {name: documents that it holds}."""
    folder.mkdir()
    pages = [f"<html><nav><a href=x>menu</a></nav><h1>Page {i}</h1><p>{'Some words é. ' * (i % 7 + 3)}</p></html>" for i in range(count)]
    for i in range(10):
        (folder / f"{i:02}.html").write_text(pages[i])
    records = [({"WARC-Type": "response", "Content-Type": "application/http", "http": "HTTP/1.1 200 OK\r\n"}, page.encode()) for page in pages[10:]]
    records[5:5] = [({"WARC-Type": "request"}, b"GET /"), ({"WARC-Type": "response"}, b"<img>"), ({"WARC-Type": "response"}, b"<a>\0\1"),
                    ({"WARC-Type": "conversion"}, b"plain text <of@two>\nlines with 1 < 2")]
    data.write_warc(folder / "x.warc.gz", records)
    (folder / "text.txt").write_text("A text of no page.")
    documents = [data.extract(page) for page in pages]
    return [*documents[:10], "A text of no page.", *documents[10:15], "plain text <of@two>\nlines with 1 < 2", *documents[15:]]


def test_what_a_crawl_saves_beside_pages_is_dropped(tmp_path):
    """Styles, scripts, pictures and pages of errors, as `wget --warc-file` stores them."""
    page, kinds = b"<html><p>Some words of a page.</p></html>", ["text/css", "application/javascript; charset=utf-8", "application/ld+json", "image/svg+xml", "font/woff2"]
    heads = ["200 OK\r\nContent-Type: text/html", "203 So\r\ncontent-type:application/xhtml+xml", "200", *[f"200 OK\r\nContent-Type: {kind}" for kind in kinds],
             "404 Not Found\r\nContent-Type: text/html", "301 Moved"]
    data.write_warc(tmp_path / "x.warc", [({"WARC-Type": "response", "Content-Type": "application/http", "http": f"HTTP/1.1 {head}\r\n"}, page) for head in heads])
    manifest = prepare(tmp_path / "x.warc", tmp_path / "out", steps="extract")
    assert manifest["steps"]["read"]["dropped"] == {"no page, by its content type": 5, "HTTP status 404": 1, "HTTP status 301": 1}
    assert manifest["steps"]["extract"]["kept"] == 3


def test_plain_text_of_a_crawl_stays_as_it_is(tmp_path):
    """A file of code, as servers give it: what stands between < and > is no tag, and lines stay lines."""
    code, http = "#include <stdio.h>\n\nint main() {\n    return 1 < 2;\n}\n", "HTTP/1.1 200 OK\r\ncontent-type: Text/Plain; charset=utf-8\r\n"
    data.write_warc(tmp_path / "x.warc", [({"WARC-Type": "response", "Content-Type": "application/http", "http": http}, code.encode())])
    prepare(tmp_path / "x.warc", tmp_path / "out", steps="extract")
    assert json.loads((tmp_path / "out/documents.jsonl").read_text())["text"] == code


def test_pages_become_documents_and_each_is_counted(tmp_path, monkeypatch):
    documents = site(tmp_path / "in")
    monkeypatch.setattr(data, "JOB", 2000)
    names = ",".join(str(path) for path in sorted((tmp_path / "in").iterdir()))
    for workers in (1, 2, 3):
        manifest = prepare(names, tmp_path / str(workers), steps="extract,tokenise", workers=workers)
        assert manifest["steps"]["read"]["dropped"] == {"record of another type": 1, "binary": 1}
        assert manifest["steps"]["extract"]["in"] == 63 and manifest["steps"]["extract"]["dropped"] == {"no text": 1}
    tokenizer = bpe.load(tmp_path / "1/tokenizer.json")
    assert read(tmp_path / "1") == by_hand(documents, tokenizer)
    assert "menu" not in documents[0] and documents[0].startswith("# Page 0\n\nSome words é.")
    for name in [*FILES[:3], "documents.jsonl"]:
        assert len({state(tmp_path / str(workers))[name] for workers in (1, 2, 3)}) == 1
    assert prepare(names, tmp_path / "1", steps="extract,tokenise") == json.loads((tmp_path / "1/manifest.json").read_text())


def test_a_broken_archive_is_counted(tmp_path):
    site(tmp_path / "in")
    raw = (tmp_path / "in/x.warc.gz").read_bytes()
    (tmp_path / "in/x.warc.gz").write_bytes(raw[:len(raw) // 2])
    manifest = prepare(tmp_path / "in/x.warc.gz", tmp_path / "out", steps="extract,tokenise")["steps"]
    assert manifest["read"]["dropped"]["damaged"] == 1 and 10 < manifest["extract"]["in"] < 50


def test_gzip_text_and_jsonl_give_what_they_hold(documents, tmp_path):
    raw = {"a.txt": END.join(documents).encode(), "b.jsonl": "\n".join(json.dumps({"text": text}) for text in documents).encode()}
    for name, content in raw.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        for path in (name, f"{name}.gz"):
            prepare(tmp_path / path, tmp_path / f"{path}.out", separator=END)
        assert read(tmp_path / f"{name}.out") == read(tmp_path / f"{name}.gz.out")
