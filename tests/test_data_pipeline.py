"""data.py's pipeline: duplicates, evaluation sets, steps, parts, shards, the report. Oracles are brute force over sets."""
import contextlib
import csv
import gzip
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

import bpe
import data
import sample

STEPS = "extract,length,pii,urls,exact,lines,dedup,tokenise"


def prepare(source, output, steps, **more):
    return data.prepare(str(source), "byte", str(output), 300, steps=steps, **more)


def documents_of(folder):
    return [json.loads(line) for line in open(Path(folder) / "documents.jsonl")]


def texts_of(folder):
    return [row["text"] for row in documents_of(folder)]


def through(tmp_path, rows, steps, name="out", **more):
    """Texts or rows of jsonl through steps: (what is kept, the counts of steps)."""
    rows = [row if isinstance(row, dict) else {"text": row} for row in rows]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = prepare(tmp_path / "in.jsonl", tmp_path / name, steps, **more)
    return documents_of(tmp_path / name), manifest["steps"]


def sentence(rng, count):
    return " ".join("".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(count))


def changed(rng, text, count):
    """The text with `count` of its words replaced."""
    words = text.split()
    for place in rng.sample(range(len(words)), count):
        words[place] = f"new{rng.random()}"
    return " ".join(words)


def five_grams(text):
    words = text.split() or [""]
    return {tuple(words[i:i + 5]) for i in range(max(1, len(words) - 4))}


def similarities(texts):
    """{(i, j): Jaccard similarity} of all pairs."""
    sets = [five_grams(text) for text in texts]
    shared = {(i, j): len(sets[i] & sets[j]) for i, j in itertools.combinations(range(len(texts)), 2)}
    return {(i, j): count / (len(sets[i]) + len(sets[j]) - count) for (i, j), count in shared.items()}


def families(rng, count=40):
    """Texts, among them copies with a few words changed, whole copies and texts of few words."""
    texts = [sentence(rng, rng.randint(1, 300)) for _ in range(count)]
    for text in rng.sample(texts, count // 2):
        texts += [changed(rng, text, rng.randint(0, 1 + len(text.split()) // 60)) for _ in range(rng.randint(1, 3))]
        texts += [f"{texts[-1]} and more"] * rng.randint(0, 1)
    rng.shuffle(texts)
    return texts


# ------------------------------------------------------------------------------------------------- the keys of a document

@pytest.mark.parametrize("n", [1, 5, 13])
def test_n_grams_have_one_key_if_and_only_if_they_are_equal(n):
    rng = random.Random(n)
    text = " ".join(rng.choices(["a", "b", "ab", "ba", "é", "x" * 70], k=3000))  # longer than what is hashed at a time
    words = text.split()
    wanted = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    keys = data.grams(text, n).tolist()
    assert len(keys) == len(wanted) and len(set(zip(wanted, keys))) == len(set(wanted)) == len(set(keys))
    assert data.grams("  a\n" + text, n).tolist()[1:] == keys  # where it stands does not matter
    assert data.grams("a b", n).size == max(1, 3 - n) and data.grams("", n).size == 1


def test_words_of_any_length_and_scripts_without_spaces():
    assert data.grams("y" * 10**6 + " b" * 2000, 5).size == 1997
    assert len(set(data.grams("東京は日本の首都です", 3).tolist())) == 8


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_pairs_are_those_of_all_pairs(threshold):
    texts = families(random.Random(0))
    wanted = {pair: value for pair, value in similarities(texts).items() if value >= threshold}
    found = {(i, j): value for i, j, value in data.minhash_pairs(texts, threshold)}
    assert len(wanted) > 10 and found == wanted
    assert {type(value) for value in found.values()} == {float}
    assert data.minhash_pairs([], threshold) == data.minhash_pairs(["one"], threshold) == []


def test_bands_follow_from_the_threshold():
    for threshold in (0.1, 0.3, 0.5, 0.8, 0.9, 1.0):
        bands, rows = data.bands_for(threshold)
        assert bands * rows <= 128 and 1 - (1 - threshold**rows)**bands >= 0.995
        fewer = 128 // (rows + 1)
        assert rows == 32 or 1 - (1 - threshold**(rows + 1))**fewer < 0.995


def test_copies_of_real_files(test_data):
    folder = test_data / "web/dedup"
    with tarfile.open(folder / "debian_copyright.tar.gz") as tar:
        files = [member for member in tar if member.isfile()]
        texts = {Path(member.name).stem: tar.extractfile(member).read().decode("utf-8", "replace") for member in files}
    names = list(texts)
    wanted = {frozenset(pair[:2]) for pair in json.loads((folder / "debian_copyright_pairs.json").read_text()) if pair[2] >= 0.8}
    found = {frozenset((names[i], names[j])) for i, j, _ in data.minhash_pairs(texts.values(), 0.8)}
    assert len(wanted) == 1077 and len(found & wanted) >= 0.99 * len(wanted) and not found - wanted


def test_groups_are_sorted_in_passes(monkeypatch):
    bands = np.random.default_rng(0).integers(0, 50, (3, 400)).astype(np.uint64)
    wanted = sorted(np.flatnonzero(row == key).tolist() for row in bands for key in set(row.tolist()) if (row == key).sum() > 1)
    for rows in (1 << 24, 100, 7):
        monkeypatch.setattr(data, "ROWS", rows)
        assert sorted(group.tolist() for group in data.sharing(bands)) == wanted


def brute_force_clusters(texts, threshold):
    """Connected components of the pairs, each with the longest first."""
    near = {i: {i} for i in range(len(texts))}
    for (i, j), value in similarities(texts).items():
        if value >= threshold:
            union = near[i] | near[j]
            for member in union:
                near[member] = union
    clusters = {frozenset(cluster) for cluster in near.values()}
    return [sorted(cluster, key=lambda i: (-len(five_grams(texts[i])), i)) for cluster in clusters]


@pytest.mark.parametrize("seed", range(2))
def test_the_best_of_each_cluster_is_kept(seed, tmp_path):
    texts = families(random.Random(seed))
    best = sorted(cluster[0] for cluster in brute_force_clusters(texts, 0.8))
    kept, steps = through(tmp_path, texts, "dedup")
    assert [row["text"] for row in kept] == [texts[i] for i in best] and len(best) < len(texts)
    assert steps["dedup"]["dropped"] == {"near copy": len(texts) - len(best)}
    sizes = Counter(len(cluster) for cluster in brute_force_clusters(texts, 0.8) if len(cluster) > 1)
    assert steps["dedup"]["clusters"] == {f"{size} documents": count for size, count in sizes.items()}


@pytest.mark.parametrize("rate", [0.1, 0.01, 1e-4])
def test_a_bloom_filter_keeps_its_promise(rate):
    rng = np.random.default_rng(1)
    keys = rng.integers(0, 1 << 63, 60_000).astype(np.uint64)
    bloom = data.Bloom(50_000, rate)
    before = [bloom.add(keys[at:at + 1000]).mean() for at in range(0, 50_000, 1000)]
    assert all(bloom.add(keys[at:at + 1000]).all() for at in range(0, 50_000, 1000)), "what is in it is known"
    wrong = np.concatenate([bloom.add(keys[at:at + 1]) for at in range(50_000, 50_200)]).mean() if rate > 0.01 else \
        data.np.mean(bloom.add(keys[50_000:]))
    assert np.mean(before) <= rate and wrong <= rate * 2 + 3 / 10_000
    assert bloom.bits.nbytes <= 50_000 * -np.log2(rate) / np.log(2) / 8 + 20
    assert data.Bloom(10, 0.01).add(np.array([5, 6, 5, 7, 6], np.uint64)).tolist() == [False, False, True, False, True]
    small = data.Bloom(50, rate)  # the offender: a thousand times as many keys as it is made for
    assert np.mean([small.add(keys[at:at + 1000]).mean() for at in range(0, 50_000, 1000)]) > 0.5


@pytest.mark.parametrize("a, b, same", [
    ("http://www.Example.com/a/?utm_source=x&b=2&a=1#top", "https://example.com:443/a?a=1&b=2", True),
    ("http://example.com", "http://example.com/", True), ("http://example.com/a", "http://example.com/A", False),
    ("http://example.com:8080/", "http://example.com/", False), ("http://example.com/?id=1", "http://example.com/?id=2", False),
    ("http://[", "http://[", True), ("http://example.com:x/", "http://example.com/", False)])
def test_the_normal_form_of_a_url(a, b, same):
    assert (data.normal_url(a) == data.normal_url(b)) is same


def test_equal_urls_and_texts_are_dropped_but_the_first(tmp_path):
    rows = [{"text": f"text {i}", "url": f"http://a.org/{i % 7}?utm_x={i}"} for i in range(20)] + [{"text": "no url"}, {"text": "none either"}]
    rows += [{"text": "without a path", "url": "http://a.org?b=1"}]
    kept, steps = through(tmp_path, rows, "urls")
    assert [row["text"] for row in kept] == [*(f"text {i}" for i in range(7)), "no url", "none either", "without a path"]
    assert steps["urls"]["dropped"] == {"seen before": 13} and steps["domain"]["documents"] == {"a.org": 8, "unknown": 2}
    kept, _ = through(tmp_path, [{"text": "a", "url": 3}, {"text": "b", "url": [None]}, {"text": "c", "url": {"x": 1}}, {"text": "d", "url": None},
                                  {"text": "e", "url": "http://a/\ud800"}], "urls", "out3")
    assert len(kept) == 5, "what is no URL does no harm"
    kept, steps = through(tmp_path, ["a  b\n", "a b", "a b c", "a\tb"], "exact", "out2")
    assert [row["text"] for row in kept] == ["a  b\n", "a b c"]


def test_lines_are_those_of_a_set(tmp_path):
    rng, seen, wanted = random.Random(0), set(), []
    texts = ["\n".join(rng.choice(["", f"line  {rng.randint(0, 99)}", "menu", " menu "]) for _ in range(rng.randint(1, 20))) for _ in range(150)]
    for text in texts:
        lines = []
        for line in text.split("\n"):
            key = " ".join(line.split())
            if not key or key not in seen:
                lines.append(line)
            seen.add(key)
        wanted.append("\n".join(lines).strip("\n"))
    kept, steps = through(tmp_path, texts, "lines", workers=2)
    assert [row["text"] for row in kept] == [text for text in wanted if text.strip()]
    assert steps["lines"]["in"] == 150 == steps["lines"]["kept"] + steps["lines"]["dropped"]["all lines seen before"]


# -------------------------------------------------------------------------------------------------------- evaluation sets

QUESTION = "a farmer has seventeen sheep and nine of them walk away over the hill how many sheep are left to be sheared"
ANSWER = "the farmer began with seventeen sheep and nine walked away so that seventeen minus nine is eight sheep"
SHORT = "which planet is closest to the sun of all"


@pytest.fixture
def evaluation(tmp_path):
    folder = tmp_path / "eval"
    folder.mkdir()
    rows = [{"question": QUESTION, "answer": ANSWER}, {"question": "why", "answer": "because"}]
    (folder / "gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8-sig")
    with open(folder / "astronomy_test.csv", "w", newline="") as file:
        csv.writer(file).writerow([SHORT, "Mercury", "Venus", "Earth", "Mars", "x" * 200_000])
    (folder / "hellaswag val.jsonl").write_text(json.dumps({"ctx": "he", "endings": [{"text": ["no", " ".join(f"ending{i}" for i in range(20))]}]}))
    return folder


def test_planted_leaks_are_found_and_near_misses_are_not(tmp_path, evaluation):
    rng = random.Random(0)
    words = QUESTION.split()
    around = [sentence(rng, 40) for _ in range(2)]
    leaks = [" ".join([around[0], QUESTION.upper().replace(" ", ", "), around[1]]), around[0] + " " + ANSWER, f"{SHORT}?",
             " ".join(words[4:17]), "so " + " ".join(f"Ending{i}." for i in range(5, 18))]
    misses = [" ".join(around), " ".join(words[:12]), " ".join(words[:12] + ["x"] + words[13:]), SHORT.rsplit(" ", 1)[0], "why because Mercury",
              " ".join(reversed(words)), "so " + " ".join(f"ending{i}" for i in range(5, 17))]
    kept, steps = through(tmp_path, leaks + misses, "decontaminate", eval_data=str(evaluation))
    assert [row["text"] for row in kept] == misses
    assert steps["decontaminate"]["dropped"] == {"found in gsm8k_test.jsonl": 3, "found in astronomy_test.csv": 1, "found in hellaswag val.jsonl": 1}
    report = json.loads((tmp_path / "out/contamination.json").read_text())
    assert report["found"] == {"gsm8k_test.jsonl 0 question": 2, "gsm8k_test.jsonl 0 answer": 1, "astronomy_test.csv 0 question": 1, "hellaswag val.jsonl 0 endings": 1}
    assert report["too_short"] == {"gsm8k_test.jsonl": 2, "astronomy_test.csv": 5, "hellaswag val.jsonl": 2}


def test_real_evaluation_sets(test_data, tmp_path):
    row = json.loads((test_data / "eval/gsm8k_test_400.jsonl").read_text().splitlines()[7])
    texts = [f"My homework: {row['question']} I say {row['answer']}", "Nothing of the kind stands in this text, which is about the sea and its fish."]
    kept, steps = through(tmp_path, texts, "decontaminate", eval_data=f"{test_data}/eval")
    assert [one["text"] for one in kept] == texts[1:]
    assert steps["decontaminate"]["found"] == {"gsm8k_test_400.jsonl 7 question": 1, "gsm8k_test_400.jsonl 7 answer": 1}


def test_items_in_a_script_without_spaces_are_found(tmp_path, evaluation):
    """Their words are characters: no item is too short for being one word."""
    long, short = "下列关于光合作用的说法中，哪一项是正确的并且能够被实验证明的？", "地球离太阳有多远呢"
    (evaluation / "zh.jsonl").write_text(json.dumps({"q": long}) + "\n" + json.dumps({"q": short, "a": "很远"}), encoding="utf-8")
    misses = [f"前言。{long[:13]}。后记。", f"前言。{short[:-1]}。"]
    kept, steps = through(tmp_path, [f"前言{long}后记。", f"前言{short}后记。", *misses], "decontaminate", eval_data=str(evaluation / "zh.jsonl"))
    assert [row["text"] for row in kept] == misses
    report = json.loads((tmp_path / "out/contamination.json").read_text())
    assert report == {"found": {"zh.jsonl 0 q": 1, "zh.jsonl 1 q": 1}, "too_short": {"zh.jsonl": 1}}


@pytest.mark.parametrize("form", [dict(), dict(indent=1), dict(separators=",:", ensure_ascii=False)])
def test_items_of_a_json_array_are_its_strings(form, tmp_path):
    """Not its paragraphs: of a text in escapes none was found, nor any short one."""
    long, short = "下列关于光合作用的说法中，哪一项是正确的并且能够被实验证明的？", 'the "planet"\nclosest to the sun of all is mercury'
    (tmp_path / "set.json").write_text(json.dumps([{"question": long, "n": 1, "choices": [short, "a\\"]}], **form), encoding="utf-8")
    texts = [f"前言{long}后记。", f"So {short}.", "question n choices and nothing else of it in this one"]
    kept, _ = through(tmp_path, texts, "decontaminate", eval_data=str(tmp_path / "set.json"))
    assert [row["text"] for row in kept] == texts[2:]
    report = json.loads((tmp_path / "out/contamination.json").read_text())
    assert report == {"found": {"set.json 0 text": 1, "set.json 1 text": 1}, "too_short": {"set.json": 1}}


def test_a_damaged_evaluation_set_is_told_in_one_line(tmp_path, evaluation):
    (evaluation / "bad.jsonl").write_text("{")
    with pytest.raises(ValueError, match="bad.jsonl is damaged"):
        through(tmp_path, ["a text"], "decontaminate", eval_data=str(evaluation), shard="0/2")
    assert not any((tmp_path / "out").glob("parts-*")), "it is told before the work"


# ---------------------------------------------------------------------------------------------------------- the pipeline

def site(folder, count=60, seed=0):
    """A folder with an archive of pages, pages, texts and rows, among them copies, what is too short, and private data."""
    rng = random.Random(seed)
    folder.mkdir(exist_ok=True)
    bodies = [sentence(rng, 60) for _ in range(count)]
    bodies += [changed(rng, text, 1) for text in rng.sample(bodies, count // 6)] + rng.sample(bodies, count // 10)
    page = "<html><nav><a href=x>menu</a></nav><h1>Title {}</h1><p>{}</p><p>Write to joe@example.com</p></html>".format
    records = []
    for i, text in enumerate(bodies):
        header = {"WARC-Type": "response", "WARC-Target-URI": f"http://site{i % (count - 3) % 5}.org/{i % (count - 3)}",
                  "Content-Type": "application/http", "http": "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n"}
        records.append((header, page(i, text).encode()))
    records[3:3] = [({"WARC-Type": "request"}, b"GET /"), ({"WARC-Type": "response"}, b"<a>\0\1"), ({"WARC-Type": "response"}, b"<p></p>"),
                    ({"WARC-Type": "conversion"}, b"too short")]
    data.write_warc(folder / "crawl.warc.gz", records)
    (folder / "page.html").write_text(page("é", bodies[0]), encoding="latin-1")
    (folder / "book.txt").write_text("<sep>".join([bodies[1] + " fresh words", "short", bodies[2]]))
    (folder / "rows.jsonl").write_text("\n".join([json.dumps({"text": bodies[4] + " and more", "id": 7}), "{", "[]", '{"text": 3}', "", json.dumps({"text": "\ud800 " * 60})]))
    with gzip.open(folder / "more.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": sentence(rng, 50)}) + "\n" for _ in range(10))


@pytest.fixture
def small_parts(monkeypatch):
    """Parts and batches of a few documents, so that small inputs have many."""
    monkeypatch.setattr(data, "JOB", 2000)
    monkeypatch.setattr(data, "PART", 6000)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # many, and the disk may be slow


def balanced(steps, names):
    """Whether for each step in = kept + dropped, and the next step gets what was kept."""
    names = ["read", *(name for name in names.split(",") if name != "tokenise")]
    kept = None
    for name in names:
        row = steps.get(name, {"in": 0})
        if row["in"] != row.get("kept", 0) + sum(row.get("dropped", {}).values()) or kept not in (None, row["in"]):
            return False
        kept = row.get("kept", 0)
    return True


def without_times(manifest):
    return {name: {key: value for key, value in row.items() if key != "seconds"} for name, row in manifest["steps"].items()}


def test_everything_is_counted_and_the_same_for_any_number_of_workers(tmp_path, small_parts):
    site(tmp_path / "in")
    outputs, manifests = [], []
    for workers in (1, 2, 3):
        manifests.append(prepare(tmp_path / "in", tmp_path / str(workers), STEPS, workers=workers, separator="<sep>"))
        outputs.append([(tmp_path / str(workers) / name).read_bytes() for name in ("documents.jsonl", "removed.jsonl", "train.npy", "val.npy")])
    assert outputs[0] == outputs[1] == outputs[2]
    assert without_times(manifests[0]) == without_times(manifests[1]) == without_times(manifests[2])
    steps = manifests[0]["steps"]
    assert balanced(steps, STEPS)
    assert steps["read"]["dropped"] == {"record of another type": 1, "binary": 1, "no JSON with a text or messages": 3}
    assert steps["read"]["in"] == 80 + 1 + 3 + 5 + 10 and steps["extract"]["dropped"] == {"no text": 1}
    assert steps["length"]["dropped"] == {"characters": 3} and steps["pii"]["masked"]["email"] >= 60
    assert all(steps[name]["dropped"] for name in ("urls", "dedup")) and steps["domain"]["documents"]["site1.org"] > 5
    texts = texts_of(tmp_path / "1")
    assert len(texts) == steps["dedup"]["kept"] == manifests[0]["train"]["documents"] + manifests[0]["val"]["documents"]
    assert not any("joe@" in text or "menu" in text for text in texts) and any("<EMAIL>" in text for text in texts)
    assert sorted(os.listdir(tmp_path / "1")) == sorted(["documents.jsonl", "removed.jsonl", "manifest.json", "tokenizer.json", "train.npy", "val.npy"])
    removed = Counter((row["step"], row["reason"]) for row in map(json.loads, open(tmp_path / "1/removed.jsonl")))
    assert removed == {(name, reason): count for name, row in steps.items() for reason, count in row.get("dropped", {}).items()}


def test_order_and_fields_are_those_of_the_input(tmp_path):
    rows = [{"text": f"row {i}", "id": i, "url": f"http://x.org/{i}", "extra": {"a": [None, 1.5]}} for i in range(300)]
    kept, _ = through(tmp_path, rows, "exact,lines", workers=3)
    assert [{key: row[key] for key in ("text", "id", "url", "extra")} for row in kept] == rows
    assert kept[7]["origin"] == f"{tmp_path}/in.jsonl#7"


def test_steps_that_keep_nothing_are_told(tmp_path):
    with pytest.raises(ValueError, match="or the steps keep none"):
        through(tmp_path, ["short"], "length,tokenise")


def test_conversations_keep_their_fields(tmp_path):
    talk = {"messages": [{"role": "user", "content": "I am joe@example.com, hello " + "there " * 60}, {"role": "assistant", "content": "Hi.\nHi."}], "id": 3}
    rows = [talk, {"messages": [{"role": "user", "content": "short"}]}, {"messages": "no"}, {"messages": [{"role": "user"}]}]
    kept, steps = through(tmp_path, rows, "length,pii")
    assert len(kept) == 1 and kept[0]["id"] == 3 and kept[0]["messages"][1] == talk["messages"][1] and "text" not in kept[0]
    assert kept[0]["messages"][0]["content"].startswith("I am <EMAIL>, hello")
    assert steps["read"]["dropped"] == {"no JSON with a text or messages": 2} and steps["length"]["kept"] == 1
    kept, _ = through(tmp_path, rows[:1], "lines", "out2")
    assert kept[0]["messages"][1]["content"] == "Hi." and kept[0]["messages"][0] == talk["messages"][0]
    again = {"messages": [talk["messages"][0], {"role": "assistant", "content": "Hi.\nNew."}]}
    kept, steps = through(tmp_path, [talk, again, again], "lines", "out3")  # a turn without a new line stays, else nobody would have asked
    assert [turn["content"] for turn in kept[1]["messages"]] == [talk["messages"][0]["content"], "New."]
    assert len(kept) == 2 and steps["lines"]["dropped"] == {"all lines seen before": 1}


@pytest.mark.parametrize("steps, message", [
    ("fly", "choose from extract,"), ("tokenise,extract", "extract or chat first"), ("length,chat", "extract or chat first"), ("length,length", "none twice"), ("chat,exact,tokenise", "not of chats"),
    ("", "choose from"), ("extract,,tokenise", "choose from"), ("decontaminate", "--eval_data")])
def test_steps_that_cannot_be(steps, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        through(tmp_path, ["a text"], steps)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [dict(min_quality=0.9), dict(max_harmful=0.1), dict(ngrams="x.npz"), dict(threshold=0.5), dict(false_positives=0.1),
                                    dict(positive="a.txt"), dict(temperature=2.0)])
def test_options_that_no_step_looks_at_are_refused(option, tmp_path):
    with pytest.raises(ValueError, match=f"--{[*option][0]} does nothing here: it is for"):
        through(tmp_path, ["a text"], "length", **option)


@pytest.mark.parametrize("options", [dict(threshold=0.0), dict(threshold=1.5), dict(false_positives=0.0), dict(steps="tokenise", shard="0/2"), dict(steps="tokenise", merge=True), dict(shard="0/2", merge=True),
                                     dict(shard="2/2"), dict(shard="x"), dict(shard="1"), dict(eval_data="nowhere", steps="decontaminate"), dict(eval_data="data.py"),
                                     dict(language="en")])
def test_options_that_cannot_be(options, tmp_path):
    with pytest.raises((ValueError, OSError)) as caught:
        through(tmp_path, ["a text"], **{"steps": "exact", **options})
    assert "--" in str(caught.value) or "nowhere" in str(caught.value)


def broken_filter(text):
    if "bad" in text:
        raise ZeroDivisionError
    return len(text) < 50, len(text)


def test_a_filter_from_outside_and_one_that_fails(tmp_path, monkeypatch):
    monkeypatch.setitem(data.FILTERS, "toy", broken_filter)
    kept, steps = through(tmp_path, ["good", "bad", "long " * 20], "toy")
    assert [(row["text"], row["toy"]) for row in kept] == [("good", 4)]
    assert steps["toy"]["dropped"] == {"error: ZeroDivisionError": 1, "out of bounds": 1}


def needs_a_model(text):
    return len(open("nowhere.npz").read()) > 0, 1


def test_a_missing_model_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(data.FILTERS, "model", needs_a_model)
    with pytest.raises(FileNotFoundError, match="nowhere.npz"):
        through(tmp_path, ["good"], "model")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("between", [b"\n", b"<sep>", b"", b"aab"])
def test_documents_are_cut_wherever_blocks_end(between):
    rng = random.Random(0)
    for _ in range(300):
        raw = b"".join(rng.choice([b"<", b"sep", b">", b"<sep>", b"\n", b"a", b"aab", b"text"]) for _ in range(rng.randint(0, 40)))
        cuts = sorted(rng.sample(range(len(raw) + 1), min(len(raw), rng.randint(0, 9))))
        blocks = [raw[i:j] for i, j in zip([0, *cuts], [*cuts, len(raw)])]
        parts = raw.split(between) if between else [raw]
        wanted = [part for part in parts if part.strip()]
        assert list(data.cut_at(between, blocks, 10**6)) == wanted
        assert list(data.cut_at(between, blocks, 7)) == [part[:7] for part in parts if part.strip() or len(part) > 7]
        assert list(data.cut_at(between, [None, *blocks], 10**6)) == [None, *wanted]


def test_what_is_too_long_or_a_bomb_is_dropped(tmp_path):
    (tmp_path / "in").mkdir()
    with gzip.open(tmp_path / "in/bomb.jsonl.gz", "wb") as file:
        file.write(b'{"text": "first"}\n{"text": "' + b"x" * 3_000_000 + b'"}\n{"text": "last"}\n')
    (tmp_path / "in/long.txt").write_text("short<sep>" + "y" * 200_000 + "<sep>end")
    header = {"WARC-Type": "response", "Content-Type": "application/http", "http": "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n"}
    raw = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(b"<p>" + b"z" * 3_000_000)
    data.write_warc(tmp_path / "in/bomb.warc", [({"WARC-Type": "response", "Content-Type": "application/http"}, raw), (header, b"<p>a page")])
    tracemalloc.start()
    manifest = prepare(tmp_path / "in", tmp_path / "out", "extract,exact", separator="<sep>", max_document_bytes=50_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sorted(texts_of(tmp_path / "out")) == ["a page", "end", "first", "last", "short"] and peak < 4_000_000
    assert manifest["steps"]["read"]["dropped"] == {"longer than --max_document_bytes": 3} and balanced(manifest["steps"], "extract,exact")


def test_damaged_files_cost_no_other_document(tmp_path):
    site(tmp_path / "in")
    raw = (tmp_path / "in/crawl.warc.gz").read_bytes()
    (tmp_path / "in/crawl.warc.gz").write_bytes(raw[:len(raw) // 2])
    raw = (tmp_path / "in/more.jsonl.gz").read_bytes()
    (tmp_path / "in/more.jsonl.gz").write_bytes(raw[:-20])
    steps = prepare(tmp_path / "in", tmp_path / "out", "extract,exact")["steps"]
    assert steps["read"]["dropped"]["damaged"] == 2 and balanced(steps, "extract,exact") and steps["exact"]["kept"] > 20


def test_what_others_keep_in_the_folder_stays(tmp_path):
    (tmp_path / "out/parts-mine").mkdir(parents=True)
    (tmp_path / "out/parts-list.txt").write_text("a")
    through(tmp_path, ["a text"], "exact")
    assert sorted(path.name for path in (tmp_path / "out").glob("parts*")) == ["parts-list.txt", "parts-mine"]


def test_nothing_left_is_told(tmp_path, capsys):
    with pytest.raises(ValueError, match="no document"):
        through(tmp_path, ["a", "b"], "length,tokenise")
    assert "dropped: characters" in capsys.readouterr().out


def test_memory_does_not_grow_with_the_input(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PART", 1 << 14)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(data, "PIECE", 1 << 12)
    rng, tops = random.Random(0), []
    for name, count, job in [("small", 60, 1 << 12), ("large", 360, 1 << 12), ("offender", 360, 1 << 30)]:
        monkeypatch.setattr(data, "JOB", job)
        data.write_warc(tmp_path / f"{name}.warc.gz", (({"WARC-Type": "response"}, f"<p>{sentence(rng, 100)}".encode()) for _ in range(count)))
        tracemalloc.start()
        prepare(tmp_path / f"{name}.warc.gz", tmp_path / name, "extract,lines,dedup", workers=1)
        tops.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert tops[1] < tops[0] + 100_000 and tops[2] > tops[1] + 300_000, tops


# -------------------------------------------------------------------------------------------- kills, shards, full disks

SLOW = """
import sys, time
sys.path.insert(0, sys.argv[1])
import data
data.JOB, data.PART, data.os.fsync = 2000, 6000, lambda file: None
data.FILTERS["slow"] = lambda text: (time.sleep(0.01) or True, None)
data.prepare("in", "byte", "out", 300, separator="<sep>", steps="extract,slow,lines,dedup,tokenise", workers=2)
"""


def parts_done(folder):
    """{name: time of the last change} of all parts that are done."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("parts-*/*-*.json")}


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    site(tmp_path / "in", 30)
    command = [sys.executable, "-c", SLOW, str(ROOT)]
    seen = {}
    for wanted in (1, 3):  # it is killed twice
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while len(parts_done(tmp_path / "out")) < wanted:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        process.wait()
        left = parts_done(tmp_path / "out")
        assert {name: left[name] for name in seen} == seen, "a part that is done was done again"
        seen = left
    assert subprocess.run(command, cwd=tmp_path, stdout=subprocess.DEVNULL).returncode == 0
    after = {name: (tmp_path / "out" / name).read_bytes() for name in ("documents.jsonl", "removed.jsonl", "train.npy")}
    (tmp_path / "out").rename(tmp_path / "interrupted")
    assert subprocess.run(command, cwd=tmp_path, stdout=subprocess.DEVNULL).returncode == 0
    assert after == {name: (tmp_path / "out" / name).read_bytes() for name in after}
    assert balanced(json.loads((tmp_path / "interrupted/manifest.json").read_text())["steps"], "extract,slow,lines,dedup")


def test_any_part_can_be_missing(tmp_path, small_parts, monkeypatch):
    site(tmp_path / "in", 30)
    prepare(tmp_path / "in", tmp_path / "whole", "extract,lines,dedup", separator="<sep>")
    rng = random.Random(0)
    for left in (0, 3, 6, 9):  # it ends before the end, as by a kill, and some parts were not done
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(data.Pipeline, "write", lambda *words: (_ for _ in ()).throw(KeyboardInterrupt))
            prepare(tmp_path / "in", tmp_path / "out", "extract,lines,dedup", separator="<sep>")
        done = sorted(tmp_path.glob("out/parts-*/2-*.json")) + sorted(tmp_path.glob("out/parts-*/1-*.json"))
        assert len(done) > 12
        for path in rng.sample(done, left):
            path.unlink()
    prepare(tmp_path / "in", tmp_path / "out", "extract,lines,dedup", separator="<sep>")
    for name in ("documents.jsonl", "removed.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def deadly(marker):
    """A filter that kills its process: once if `marker` is the path of a file, else always."""
    def check(text):
        if "dead" in text and os.path.exists(marker):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(marker)
            os.kill(os.getpid(), signal.SIGKILL)
        return True, None
    return check


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the filter is made here, and spawned processes do not have it")
def test_what_a_killed_worker_did_is_done_again_once(tmp_path, monkeypatch, small_parts, capsys):
    texts = [f"text {i} {'x' * 300}" for i in range(60)] + ["dead"] + [f"more {i}" for i in range(60)]
    (tmp_path / "marker").touch()
    monkeypatch.setattr(data.os, "cpu_count", lambda: 2)
    monkeypatch.setitem(data.FILTERS, "deadly", deadly(tmp_path / "marker"))
    kept, steps = through(tmp_path, texts, "deadly", workers=2)
    assert [row["text"] for row in kept] == texts and balanced(steps, "deadly")
    assert "begins again" in capsys.readouterr().err
    monkeypatch.setitem(data.FILTERS, "deadly", deadly("/"))
    monkeypatch.setattr(data.os, "unlink", lambda path: None)
    with pytest.raises(ChildProcessError, match="a process was killed"):
        through(tmp_path, texts, "deadly", "out2", workers=2)


def test_shards_and_their_merge_are_the_whole(tmp_path, monkeypatch, small_parts):
    for i in range(3):
        site(tmp_path / f"in{i}", 20, i)
    source = ",".join(f"{tmp_path}/in{i}" for i in range(3))
    more = dict(steps="extract,length,lines,dedup", separator="<sep>")
    whole = prepare(source, tmp_path / "whole", **more)
    first = prepare(source, tmp_path / "out", shard="1/3", **more)
    with pytest.raises(ValueError, match="--merge: no shard has done "):
        prepare(source, tmp_path / "out", merge=True, **more)
    others = [prepare(source, tmp_path / "out", shard=f"{i}/3", **more) for i in (0, 2)]
    assert first["steps"]["read"]["in"] < others[-1]["steps"]["read"]["in"] == whole["steps"]["read"]["in"]
    with monkeypatch.context() as patch:  # all has been done
        patch.setattr(data, "read_raw", None)
        merged = prepare(source, tmp_path / "out", merge=True, **more)
    assert without_times(merged) == without_times(whole) and balanced(merged["steps"], more["steps"])
    for name in ("documents.jsonl", "removed.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(os.listdir(tmp_path / "out")) == ["documents.jsonl", "manifest.json", "removed.jsonl"]


def test_the_shard_of_a_rank(tmp_path, run_script):
    site(tmp_path / "in", 10)
    words = ["--input=in", "--steps=extract,exact", "--output=out"]
    for index in (1, 2):  # as of --array=1-2
        done = run_script("data.py", *words, cwd=tmp_path, env={"SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_TASK_COUNT": "2"})
        assert done.returncode == 0 and done.stdout.endswith("the same command with --merge in place of --shard\n"), done.stderr
    done = run_script("data.py", *words, "--merge", cwd=tmp_path, env={"RANK": "1", "WORLD_SIZE": "2"})
    assert done.returncode == 0 and (tmp_path / "out/documents.jsonl").exists(), done.stderr


def test_two_runs_in_one_folder_are_refused(tmp_path, run_script):
    pytest.importorskip("fcntl")
    site(tmp_path / "in", 10)
    words = ["--input=in", "--steps=extract,exact", "--output=out"]
    with data.claimed(tmp_path / "out", data.Options()):
        for more in ([], ["--shard=0/2"], ["--steps=tokenise"]):
            done = run_script("data.py", *words, *more, cwd=tmp_path)
            assert (done.returncode, done.stderr) == (1, "data.py: another run of data.py works in out\n")
    with data.claimed(tmp_path / "out", data.Options(shard="0/2")):
        assert run_script("data.py", *words, "--shard=0/2", cwd=tmp_path).returncode == 1
        assert run_script("data.py", *words, cwd=tmp_path).returncode == 1
        assert run_script("data.py", *words, "--shard=1/2", cwd=tmp_path).returncode == 0
    assert run_script("data.py", *words, cwd=tmp_path).returncode == 0
    assert not (tmp_path / "out/.data.lock").exists()


def test_tokenising_leaves_the_lock_of_a_training_run(tmp_path):
    """train.py claims its folder, then lets data.prepare write token files there, in the same process."""
    import train
    fcntl = pytest.importorskip("fcntl")
    site(tmp_path / "in", 10)
    ask = "import sys, train; from pathlib import Path; train.claim(Path(sys.argv[1]))"
    (tmp_path / "out").mkdir()
    lock = train.claim(tmp_path / "out")
    prepare(tmp_path / "in", tmp_path / "out", "extract,exact,tokenise")
    done = subprocess.run([sys.executable, "-c", ask, str(tmp_path / "out")], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == 1 and "another run is training" in done.stderr
    fcntl.lockf(lock, fcntl.LOCK_UN)
    subprocess.run([sys.executable, "-c", ask, str(tmp_path / "out")], cwd=ROOT, check=True, timeout=60)
    lock.close()


def test_pages_without_the_step_extract_are_told(tmp_path, capsys):
    def said(steps, source="in"):
        prepare(tmp_path / source, tmp_path / "out", steps)
        return [line for line in capsys.readouterr().out.splitlines() if "markup" in line]
    (tmp_path / "in").mkdir()
    for name in ("a.html", "b.htm", "text.txt"):
        (tmp_path / "in" / name).write_text(f"<p>{sentence(random.Random(name), 500)}</p>")
    data.write_warc(tmp_path / "pages.warc.gz", [({"WARC-Type": "resource"}, b"<p>text and more text</p>" * 50)])
    first = f"{tmp_path}/in/a.html and 1 more: the markup stays; data.py"
    assert said("tokenise") == [f"{first} --steps=extract,tokenise takes it out"]
    assert said("exact,tokenise") == [f"{first} --steps=extract,exact,tokenise takes it out"]
    assert said("tokenise", "pages.warc.gz") == [f"{tmp_path}/pages.warc.gz: the markup stays; data.py --steps=extract,tokenise takes it out"]
    assert said("extract,tokenise") == said("tokenise", "in/text.txt") == []


def test_the_live_line_says_what_a_pass_does(tmp_path):
    pipeline = data.Pipeline([], data.Options(steps="extract,length,dedup,pii,tokenise"), tmp_path, 1)
    assert pipeline.progress(0, 1) == "pass 1 of 2, part 1: read, extract, length, keys of dedup"
    assert pipeline.progress(1, 1000) == "pass 2 of 2, part 1,000: dedup, pii"


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tmp_path, run_script):
    resource = pytest.importorskip("resource")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": sentence(random.Random(i), 30)}) + "\n" for i in range(100)))
    words = ["--input=in.jsonl", "--steps=exact,lines", "--output=out"]
    for limit in (100, 5000):
        done = subprocess.run([sys.executable, "-B", str(ROOT / "data.py"), *words], cwd=tmp_path, text=True, capture_output=True,
                              timeout=60, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        assert done.returncode == 1 and done.stderr == "data.py: [Errno 27] File too large: 'out'\n", done.stderr
    assert run_script("data.py", *words, cwd=tmp_path).returncode == 0
    assert len(documents_of(tmp_path / "out")) == 100


# ------------------------------------------------------------------------------------------------------------ looking

@pytest.mark.parametrize("steps", ["tokenise", "pii"])
def test_a_link_to_a_folder_is_told(steps, tmp_path, run_main):
    for name in ("in/a.txt", "other/b.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("some words of a text\n" * 9)
    for name in ("circle", "more", ".hidden"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "other" if name == "more" else tmp_path)
    (tmp_path / "in/file.txt").symlink_to(tmp_path / "in/a.txt")  # is read
    words = [f"--steps={steps}", "--tokenizer=byte"]
    done = run_main("data.py", "--input=in", "--output=out", *words, cwd=tmp_path)
    assert done.stderr == "in/circle and 1 more: a link to a folder is not followed; name it beside its folder\n"
    names = [Path(entry["path"]).name for entry in json.loads((tmp_path / "out/manifest.json").read_text())["inputs"]]
    assert names == ["a.txt", "file.txt"]
    run_main("data.py", "--input=in,in/more", "--output=out2", *words, cwd=tmp_path)
    assert len(json.loads((tmp_path / "out2/manifest.json").read_text())["inputs"]) == 3


def test_the_report_escapes_and_the_table_is_narrow(tmp_path, run_main):
    evil = "<script>alert(1)</script><img src=http://evil.org/x>"
    rows = [{"text": f"{evil} {i}", "url": f"http://{evil}/"} for i in range(3)] + [{"text": sentence(random.Random(i), 60), "language": "<b>"} for i in range(30)]
    rows += rows[5:9]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_main("data.py", "--input=in.jsonl", "--steps=length,exact,tokenise", "--tokenizer=byte", "--output=out", "--report=report.html", "--look=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in page and "&lt;b&gt;" in page and "characters" in page and "tokens" in page
    tags = set(re.findall(r"<(\w+)", page))
    assert tags <= set("html meta title style h1 h2 h3 pre p table tr td i".split()) and "default-src 'none'" in page
    assert not re.findall(r"<[^>]*\s(?:src|href|on\w+)=|url\(", page)
    lines = done.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines[:8]) and lines[0].split()[:3] == ["step", "documents", "kept"]
    assert sum(line.startswith("--- in.jsonl#") for line in lines) == 3 and sum(line.startswith("--- becomes") or line.startswith("--- dropped") for line in lines) == 3
    again = run_main("data.py", "--input=in.jsonl", "--steps=length,exact,tokenise", "--tokenizer=byte", "--output=out", "--report=again.html", cwd=tmp_path)
    assert "reused" in again.stdout and (tmp_path / "again.html").read_text() == page and "train.npy: " in page
    run_main("data.py", "--input=in.jsonl", "--steps=exact", "--output=kept", "--report=kept.html", cwd=tmp_path)
    assert ".npy" not in (tmp_path / "kept.html").read_text()


def test_the_next_command_takes_what_was_kept(tmp_path, run_main):
    rows = [json.dumps({"text": sentence(random.Random(i), 30)}) for i in range(30)]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    said = run_main("data.py", "--input=in.jsonl", "--steps=exact", cwd=tmp_path).stdout
    name, *words = re.search("next: python (.*)\n", said)[1].split()
    done = run_main(name, *words, "--tokenizer=byte", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("next: python train.py --data=data/tokens\n")
    run_main("data.py", "--input=in.jsonl", "--tokenizer=byte", "--output=both", cwd=tmp_path)
    again = run_main("data.py", "--input=in.jsonl", "--steps=exact", "--output=both", cwd=tmp_path).stdout
    assert "both/train.npy is of an earlier run" in again and "earlier run" not in said
    done = run_main("data.py", "--input=data/documents.jsonl", cwd=tmp_path)
    assert done.stderr == "data.py: --input=data/documents.jsonl holds no text; what lies in --output=data is left out\n"


def test_a_look_shows_no_control_characters(tmp_path, capsys):
    path = tmp_path / "in\udcff.jsonl"  # a name that is not UTF-8, which a terminal cannot show either
    path.write_text(json.dumps({"text": "red \x1b[31m text\nsecond line"}))
    data.look([path], data.Options(input=str(path), steps="exact", look=5))
    out = capsys.readouterr().out
    assert "\x1b" not in out and "red ?[31m text\nsecond line" in out and "in?.jsonl#0 " in out


# ------------------------------------------------------------------------------------------------------- conversations

CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "ü"}'}}
OPENAI = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
          {"role": "tool", "tool_call_id": "1", "content": "3"}, {"role": "assistant", "content": "It is three."}]
SAID = ("user", "q"), ("assistant", "r")
LAYOUTS = [
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]}, SAID),
    ({"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]}, (("system", "s"), *SAID)),
    ({"instruction": "q", "input": "", "output": "r", "text": "### the same as text"}, SAID),
    ({"instruction": "q", "input": "i", "output": "r"}, (("user", "q\n\ni"), ("assistant", "r"))),
    ({"prompt": "q", "completion": "r"}, SAID), ({"prompt": "q", "response": "r", "source": "s"}, SAID),
    ({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "r"}]}, SAID),
    ({"question": "q", "answer": "r"}, SAID),
    ({"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}, SAID),
    ({"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "q"}]},
                   {"role": "assistant", "content": "r"}], "prompt": "q", "completion": "other"}, (("system", "s"), *SAID)),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}], "system": "s"}, (("system", "s"), *SAID)),
    ({"messages": OPENAI, "tools": [{"name": "add"}]}, (
        ("system", '[{"name": "add"}]'), ("user", "q"),
        ("assistant", '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "ü"}}\n</tool_call>'), ("tool", "3"), ("assistant", "It is three."))),
]
MALFORMED = [
    *[(row, "no conversation") for row in (
        {"conversation": []}, {"text": "no conversation"}, {"messages": []}, {"messages": OPENAI[:1]}, {"prompt": "q", "completion": ""},
        {"messages": [{"role": "narrator", "content": "x"}]}, {"messages": [{"content": "x"}]},
        {"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "x"}]})],
    *[(row, "no JSON with a text or messages") for row in (
        [1], 3, {"messages": 5}, {"messages": ["x"]}, {"messages": {"role": "user"}}, {"messages": [{"role": ["user"], "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]})],
]


def test_conversations_in_common_layouts_become_messages_that_align_reads(tmp_path):
    """Each layout; what is none is counted by reason; in = kept + dropped."""
    rows = [row for row, _ in LAYOUTS + MALFORMED]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n", encoding="utf-8-sig")
    (tmp_path / "b.json").write_text(json.dumps(rows[:2]))  # one array, as ShareGPT came: its text is no conversation
    assert prepare(tmp_path / "b.json", tmp_path / "out", "chat")["steps"]["read"]["dropped"] == {"no row of .jsonl": 1}
    manifest = prepare(tmp_path / "a.jsonl", tmp_path / "out", "chat,pii", workers=1)
    found = [tuple((turn["role"], turn["content"]) for turn in row["messages"]) for row in documents_of(tmp_path / "out")]
    assert found == [tuple(said) for _, said in LAYOUTS]
    dropped = Counter(reason for _, reason in MALFORMED) + Counter({"no JSON with a text or messages": 1})
    assert manifest["steps"]["read"]["dropped"] == dropped and balanced(manifest["steps"], "pii")
    assert manifest["steps"]["read"]["in"] == len(rows) + 1
    coder = bpe.train("byte", ["a"], 300)
    for row in documents_of(tmp_path / "out"):
        ids, mask = sample.render(row["messages"], "plain", coder)
        assert len(ids) == len(mask) and 0 < sum(mask) < len(mask)


def test_what_is_masked_stands_in_no_second_copy(tmp_path):
    """The fields that became messages are gone, all others stay."""
    turns = [{"from": "human", "value": "I am joe@example.com"}, {"from": "gpt", "value": "Hi."}]
    rows = [{"conversations": turns, "id": 7}, {"instruction": "Mail joe@example.com", "input": "", "output": "No.", "id": 8}]
    kept, _ = through(tmp_path, rows, "chat,pii")
    assert [set(row) for row in kept] == [{"origin", "messages", "id"}] * 2
    assert "joe@" not in (tmp_path / "out" / "documents.jsonl").read_text()


# ---------------------------------------------------------------------------------------------------------------- mixing

def test_shares_by_size():
    assert data.shares_by_size([1000, 3000], 1).tolist() == [0.25, 0.75]
    assert data.shares_by_size([1000, 9000], 2).tolist() == [0.25, 0.75]  # their roots
    assert data.shares_by_size([1, 10**12, 5], float("inf")).tolist() == [1 / 3] * 3
    assert data.shares_by_size([1000, 10**12], 0.01).tolist() == [0, 1]  # powers beyond what a float holds


@pytest.mark.parametrize("best", [(0.6, 0.3, 0.1), (0.2, 0.2, 0.6), (1.0, 0.0, 0.0), (0.5, 0.5, 0.0)])
def test_the_mixture_of_a_known_loss_is_found(best):
    """log loss is a bowl around the optimum, plus noise of half a percent: the interval holds it, the runs are as many as asked."""
    rng, calls = np.random.default_rng(3), []

    def run(shares):
        calls.append(shares)
        assert min(shares) >= 0 and abs(sum(shares) - 1) < 1e-5
        return 3 * np.exp(0.4 * np.sum((np.array(shares) - best) ** 2) + 0.005 * rng.standard_normal())

    found = data.learn_shares(run, [100, 100, 800], 30, 0)
    assert len(calls) == 30 and calls[0] == [0.1, 0.1, 0.8] and calls[1] == [0.333333] * 3
    assert np.abs(found["shares"] - best).max() < 0.06 and abs(found["shares"].sum() - 1) < 1e-9
    assert (found["low"] - 0.06 <= best).all() and (best <= found["high"] + 0.06).all() and (found["high"] - found["low"]).max() < 0.25
    assert abs(found["loss"] / 3 - 1) < 0.01
    with pytest.raises(ValueError, match="--runs=6 are too few for 3 sources: 7 at least"):
        data.learn_shares(run, [1, 2, 3], 6, 0)


def test_where_shares_do_not_matter_the_interval_says_so():
    rng = np.random.default_rng(0)
    found = data.learn_shares(lambda shares: 3 * np.exp(0.01 * rng.standard_normal()), [1, 1], 16, 0)
    assert (found["high"] - found["low"]).min() > 0.5


def test_a_mixture_learnt_by_runs_of_train(tmp_path, run_main, monkeypatch):
    """Of two sources one is like the target: it gets nearly all. No run is done twice, and train.py reads the file."""
    calls = []

    def launch(command, **_):  # the process of a run, in this one
        calls.append(command[2:])
        assert command[:2] == [sys.executable, ROOT / "train.py"]
        return run_main("train.py", *command[2:], cwd=tmp_path)

    monkeypatch.setattr(data, "subprocess", SimpleNamespace(run=launch))
    rng = np.random.default_rng(0)
    for name, size in (("a", 2000), ("b", 3000), ("t", 500)):
        (tmp_path / name).mkdir()
        for side in ("train", "val"):
            tokens = rng.integers(0, 40, size) if name == "a" else np.arange(size) * 3 % 40
            np.save(tmp_path / name / f"{side}.npy", tokens.astype(np.uint16))
    tiny = "--vocab_size=40 --n_layer=1 --n_embd=16 --ngram=0 --block_size=16 --batch_size=8 --max_iters=40 --learning_rate=0.01"
    words = ["--mix=a,b", "--eval_data=t", f"--train={tiny}", "--runs=4", "--output=mix"]
    done = run_main("data.py", *words, cwd=tmp_path)
    assert done.returncode == 0 and len(calls) == 4, done.stderr
    recipe = json.loads((tmp_path / "mix/mix.json").read_text())
    assert recipe["shares"]["b"] > 0.9 and recipe["low"].keys() == {"a", "b"}
    logs = {str(row[0]["options"]["mix"]): (path, row[-1]["val_loss"]) for path in (tmp_path / "mix").glob("*.jsonl")
            for row in [[json.loads(line) for line in open(path)]]}
    assert len(logs) == 4
    logs[calls[3][1].removeprefix("--mix=")][0].unlink()  # killed before the last
    assert run_main("data.py", *words, cwd=tmp_path).returncode == 0 and calls[3][:-1] == calls[4][:-1] and len(calls) == 5
    assert json.loads((tmp_path / "mix/mix.json").read_text()) == recipe
    done = run_main("train.py", "--data=a,b", "--mix=mix/mix.json", "--eval_data=t", *tiny.split(), cwd=tmp_path)
    assert done.returncode == 0 and "500 for validation" in done.stdout, done.stderr
    log = [json.loads(line) for line in open(tmp_path / "out/log.jsonl")]
    assert log[0]["options"]["mix"] == ",".join(str(recipe["shares"][name]) for name in "ab")
    assert log[-1]["val_loss"] < logs["0.5,0.5"][1]
    for text in ("5\n", "{\n", ""):
        logs["0.5,0.5"][0].write_text(text)
        bad = run_main("data.py", *words, cwd=tmp_path)
        assert bad.returncode == 1 and "jsonl is damaged" in bad.stderr and bad.stderr.count("\n") == 1, bad.stderr
    np.save(tmp_path / "t/val.npy", np.arange(500, dtype=np.uint16) * 7 % 40)  # other held-out tokens: no old loss holds
    assert run_main("data.py", *words, cwd=tmp_path).returncode == 0 and len(calls) == 9
    for words, part in ((["--mix=a"], "two folders"), (["--mix=a,nowhere"], "nowhere"), (["--mix=a,b", "--runs=2"], "--runs=2"),
                        (["--mix=a,b", "--train=--n_layer=-1", "--runs=4"], "n_layer")):
        bad = run_main("data.py", *words, "--output=bad", cwd=tmp_path)
        assert bad.returncode == 1 and part in bad.stderr and bad.stderr.count("\n") == 1, bad.stderr


def test_a_killed_mixture_leaves_no_run_behind(tmp_path):
    for name in "ab":
        data.prepare(str(ROOT / "LICENSE"), "byte", str(tmp_path / name), 300)
    words = ["--mix=a,b", "--runs=4", "--train=--max_iters=1000000", "--output=mix"]
    process = subprocess.Popen([sys.executable, "-B", str(ROOT / "data.py"), *words], cwd=tmp_path, start_new_session=True)
    until = time.monotonic() + 60
    while not list(tmp_path.glob("mix/tmp*")) and time.monotonic() < until:
        time.sleep(0.05)
    process.terminate()
    code = process.wait(60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # a run that was left behind
    assert code == 130 and not list(tmp_path.glob("mix/tmp*"))


def test_a_mixture_by_temperature(tmp_path, run_main):
    for name, size in (("a", 1000), ("b", 9000)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "train.npy", np.zeros(size, np.uint16))
    done = run_main("data.py", "--mix=a/,./b", "--temperature=2", "--output=mix", cwd=tmp_path)  # named as train.py does
    assert done.returncode == 0 and "--mix=mix/mix.json" in done.stdout
    assert json.loads((tmp_path / "mix/mix.json").read_text()) == {"shares": {"a": 0.25, "b": 0.75}}
    done = run_main("data.py", "--mix=a,b", "--temperature=-1", "--output=mix", cwd=tmp_path)
    assert done.returncode == 1 and "--temperature" in done.stderr
    assert run_main("data.py", "--mix=a,a/", "--temperature=1", "--output=mix", cwd=tmp_path).returncode == 1
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/train.npy").touch()
    np.save(tmp_path / "b/train.npy", np.array(5))
    for name in ("empty", "b"):
        done = run_main("data.py", f"--mix=a,{name}", "--temperature=1", "--output=mix", cwd=tmp_path)
        assert done.returncode == 1 and f"a,{name}: not each folder" in done.stderr and done.stderr.count("\n") == 1, done.stderr


# --------------------------------------------------------------------------------------------------------------- fuzz

def mutated(rng, raw):
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 6)):
        at, size = rng.randrange(len(raw) + 1), rng.choice([1, 2, 30, 1000])
        raw[at:at + rng.choice([0, size])] = rng.choice([b"", rng.randbytes(size), raw[at:at + size] * 2, b"<", b'"', b"\n", b"\xff", b"\0"])
    return bytes(raw)


def fuzz(tmp_path, seeds):
    steps = "extract,length,pii,urls,exact,lines,dedup"
    for seed in seeds:
        rng = random.Random(seed)
        folder = tmp_path / f"in{seed}"
        site(folder, 12, seed % 7)
        for path in folder.iterdir():
            path.write_bytes(mutated(rng, path.read_bytes()))
        manifest = prepare(",".join(map(str, sorted(folder.iterdir()))), tmp_path / f"out{seed}", steps, workers=1, max_document_bytes=20_000)
        assert balanced(manifest["steps"], steps), seed
        assert not any(reason.startswith("error") for row in manifest["steps"].values() for reason in row.get("dropped", {})), seed
        assert len(documents_of(tmp_path / f"out{seed}")) == manifest["steps"]["dedup"]["kept"]


def test_mutated_files_are_counted(tmp_path):
    fuzz(tmp_path, range(3))


def test_mutated_conversations_are_counted():
    rng, counts = random.Random(0), Counter()
    for i in range(2000):
        raw = mutated(rng, json.dumps(rng.choice(LAYOUTS + MALFORMED)[0]).encode())
        row = data.do_document({"raw": raw, "kind": "row", "headers": {}, "origin": str(i)}, [], ["read", "pii"], data.Options(steps="chat"), counts)
        assert row is None or not row["reason"].startswith("error"), raw
    steps = data.nested(counts)
    assert balanced(steps, "pii") and steps["read"]["in"] == 2000 and steps["read"]["kept"] > 20


@pytest.mark.slow
def test_many_mutated_files_are_counted(tmp_path):
    fuzz(tmp_path, range(100, 1100))
