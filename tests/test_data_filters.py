"""The filters, masks, classifiers, n-gram models and readers of data.py: each rule on both sides of its line, each machine
against a slow one written differently, each pattern against text made to slow it down.
"""
import bz2
import gzip
import http.server
import json
import lzma
import os
import random
import re
import shutil
import sys
import threading
import time
import types
from collections import Counter

import numpy as np
import pytest

import data

WORDS = [a + b + c for a in "blmn" for b in "aeiou" for c in ("ter", "sing", "k", "lo", "p")]  # 100, all different


def prose(count, seed=0):
    """`count` words with stop words and full stops, no two sentences alike."""
    rng = random.Random(seed)
    words = [rng.choice(WORDS) if i % 5 else ("the", "of", "and", "to")[i // 5 % 4] for i in range(count)]
    return " ".join(f"{word}." if i % 10 == 9 else word for i, word in enumerate(words))


def lines(*parts):
    return "\n".join(parts)


def unlike(count, width=40):
    """`count` different lines of `width` characters that end with a full stop."""
    return [f"{prose(60, seed)[:width - 1]}." for seed in range(count)]


# Each rule with a text on the good side of its line and one just beyond.
SIDES = {
    ("length", "characters"): ["a" * 200, "a" * 199],
    ("long", "characters"): ["a" * 16000, "a" * 15999],
    ("gopher", "words"): [prose(50), prose(49)],
    ("gopher", "mean_word_length"): ["the of " + "aaaaaaaaaa " * 60, "the of " + "aaaaaaaaaaa " * 60],
    ("gopher", "hashes"): [prose(60) + "#" * 6, prose(60) + "#" * 7],
    ("gopher", "ellipses"): [prose(60).replace(".", "") + "..." * 6, prose(60).replace(".", "") + "…" * 7],
    ("gopher", "bullets"): [lines(prose(60), *["- lobster"] * 9), lines(*["- the lobster and", "* of " + prose(40)] * 9)],
    ("gopher", "lines_with_ellipsis"): [lines(*["bin."] * 7, *["lo..."] * 3), lines(*["bin."] * 69, *["lo…"] * 31)],
    ("gopher", "alphabetic_words"): ["the of " + "word " * 78 + "123 " * 20, "the of " + "word " * 77 + "123 " * 21],
    ("gopher", "stop_words"): ["The word of " + "word " * 60, "the word the " + "word " * 60],
    ("repetition", "repeated_lines"): [lines(*unlike(70, 50), *["a."] * 31), lines(*unlike(69, 50), *["a."] * 32)],
    ("repetition", "repeated_paragraphs"): ["\n\n".join(map(str, [*range(70), *[7] * 30])),
                                            "\n\n".join(map(str, [*range(69), *[7] * 31]))],
    ("repetition", "repeated_line_characters"): [lines(*unlike(8, 100), *[unlike(8, 100)[0]] * 2),
                                                 lines(*unlike(7, 100), *[unlike(7, 100)[0]] * 2)],
    ("repetition", "repeated_paragraph_characters"): ["\n\n".join(["a\nb" + "c" * 17] * 2 + [*map(str, range(10, 40))]),
                                                      "\n\n".join(["a\nb" + "c" * 18] * 2 + [*map(str, range(10, 40))])],
    ("c4", "sentences"): ["Here are five words again. " * 2 + "And now there are more!", "Here are five words again. " * 2],
    ("c4", "curly_brackets"): [prose(60), prose(60) + " { "],
    ("c4", "lorem_ipsum"): [prose(60) + " lorem, ipsum", prose(60) + " Lorem ipsum"],
    ("fineweb", "final_marks"): [lines(*["It is long enough, as lines go here."] * 3, *["no mark but it is long enough here"] * 22),
                                 lines("It is long enough, as lines go here.", *["no mark but it is long enough here"] * 8)],
    ("fineweb", "repeated_line_characters"): [lines(*unlike(9), unlike(9)[0]), lines(*unlike(8), unlike(8)[0])],
    ("fineweb", "short_lines"): [lines(*unlike(33, 30), *unlike(67, 29)), lines(*unlike(32, 30), *unlike(68, 29))],
}


def measured(rules, name, text):
    """(what the statistic of a rule gives, its low bound, its high bound)"""
    row = next(row for row in data.RULES if row[:2] == [rules, name])
    return float(getattr(data.Document(text), row[2])(row[3])), float(row[4]), float(row[5])


GROUPS = list(dict.fromkeys(row[0] for row in data.RULES))


@pytest.mark.parametrize("rules, name", [row[:2] for row in data.RULES if "gram" not in row[1]])
def test_a_rule_has_two_sides(rules, name):
    """The statistic of one text lies within the bounds and that of the other not, both near the bound."""
    (good, low, high), (bad, _, _) = (measured(rules, name, text) for text in SIDES[rules, name])
    assert low <= good <= high and not low <= bad <= high, (good, bad)
    near = high if bad > high else low
    counted = rules == "c4" or name in ("stop_words", "mean_word_length")
    assert counted or abs(good - near) <= 0.02 * near and abs(bad - near) <= 0.25 * near, (good, bad)


@pytest.mark.parametrize("rules", GROUPS)
def test_obey_names_the_first_rule_that_a_text_breaks(rules):
    good = lines(*unlike(200 if rules == "long" else 40, 90))
    assert data.FILTERS[rules](good) == (True, "")
    for (group, _), (_, bad) in SIDES.items():
        if group == rules:
            values = [(row[1], measured(rules, row[1], bad)) for row in data.RULES if row[0] == rules]
            first = next(name for name, (value, low, high) in values if not low <= value <= high)
            assert data.FILTERS[rules](bad) == (False, first)
    for strange in ["", " ", "\n\n\n", "\0", "a", "\ud800", "…", "{", "-\n-\n-", "の" * 5000]:
        keep, name = data.FILTERS[rules](strange)
        assert keep == (not name)


def test_gophers_published_limits():
    """Rae et al. 2021, appendix A1 and table A1."""
    limits = {row[1]: (float(row[4]), float(row[5])) for row in data.RULES}
    assert (limits["words"], limits["mean_word_length"], limits["alphabetic_words"]) == ((50, 1e5), (3, 10), (0.8, 1))
    assert [limits[name][1] for name in ("hashes", "ellipses", "bullets", "lines_with_ellipsis")] == [0.1, 0.1, 0.9, 0.3]
    assert [limits[f"repeated_{part}"][1] for part in ("lines", "paragraphs", "paragraph_characters")] == [0.3, 0.3, 0.2]
    assert [limits[f"top_{n}gram"][1] for n in (2, 3, 4)] == [0.20, 0.18, 0.16]
    assert [limits[f"repeated_{n}grams"][1] for n in range(5, 11)] == [0.15, 0.14, 0.13, 0.12, 0.11, 0.10]


def by_hand(words, n):
    """(share of the most frequent n-gram, share of repeated n-grams) by tuples and loops."""
    tuples = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    counts, covered, seen = Counter(tuples), set(), set()
    total = sum(map(len, words)) or 1
    most = max(counts.values(), default=0)
    top = max((most * sum(map(len, gram)) for gram in counts if counts[gram] == most > 1), default=0)
    for i, gram in enumerate(tuples):
        covered |= set(range(i, i + n)) if gram in seen else set()
        seen.add(gram)
    return top / total, sum(len(words[i]) for i in covered) / total


def test_repetition_of_n_grams():
    """Against tuples and loops."""
    rng = random.Random(1)
    for trial in range(60):
        words = [rng.choice(WORDS[:rng.choice([1, 2, 3, 9, 90])]) for _ in range(rng.choice([0, 1, 3, 9, 10, 11, 50, 200]))]
        document = data.Document(" ".join(words))
        for n in range(2, 11):
            top, again = by_hand(words, n)
            assert (document.top_gram(n), document.repeated_grams(n)) == pytest.approx((top, again))


@pytest.mark.parametrize("n", range(2, 11))
def test_each_n_gram_rule_has_two_sides(n):
    """A text of different words with one phrase of n words in it often, then once more."""
    name = f"top_{n}gram" if n < 5 else f"repeated_{n}grams"
    limit = measured("repetition", name, "")[2]
    values = []
    for times in range(2, 80, 2):
        words = [f"{i:05}" for i in range(1000)]
        for i in range(times):
            words[i * 11:i * 11 + n] = [word * 2 for word in WORDS[5 * n:6 * n]]
        text = " ".join(words)
        values.append((measured("repetition", name, text)[0], data.obey("repetition", text)))
    good = [value for value, (keep, broken) in values if broken != name]
    assert 0.7 * limit < max(value for value in good if value <= limit) and any(value > limit for value, _ in values)
    assert all((value > limit) or keep or broken != name for value, (keep, broken) in values)
    assert all(not keep for value, (keep, _) in values if value > limit)


# ------------------------------------------------------------------------------------------------------- personal data

FOUND = {
    "email": ["jane.doe+web@mail.example.co.uk", "a@b.de", "x_y%z@sub-domain.example.org"],
    "phone": ["+49 30 1234567", "+1-800-555-0199", "(030) 1234 5678", "555-123-4567", "01 23 45 67 89", "+442071838750"],
    "ip": ["8.8.8.8", "185.199.108.153", "2606:4700:4700::1111", "2a00:1450:4001:81b::200e"],
    "card": ["4111 1111 1111 1111", "5500-0000-0000-0004", "340000000000009", "3400 000000 00009", "6011000000000004"],
    "key": ["AKIAIOSFODNN7EXAMPLE", "ghp_" + "a1B2" * 9, "sk-proj-" + "aZ09_" * 8, "AIza" + "x" * 35, "xoxb-123456789012-abc",
            "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N",
            "-----BEGIN RSA PRIVATE KEY-----\nMIIEow+/=\nProc-Type: 4\n-----END RSA PRIVATE KEY-----"],
}
LEFT = {
    "email": ["a@b", "@user", "user @ example.org", "x@1.2.3", "a@@b.com c", "f(a)@g.h1"],
    "phone": ["2024-11-26", "1990-1995", "01.02.2023", "3.14159265", "01.02.2023 10 11", "10 000 000", "1234567", "192.168.100.200", "12:30-14:45",
              "978-3-16-148410-0", "5551234567", "v1.2.3-45-678", "0.00012345", "MA 02110-1301"],
    "ip": ["127.0.0.1", "192.168.1.1", "10.0.0.7", "999.1.1.1", "1.2.3", "1.2.3.4.5", "12:30:45", "::1", "fe80::1", "std::vector"],
    "card": ["4111 1111 1111 1112", "1234567890123", "0000 0000 0000 0000", "4111 1111-1111 1111", "12345678901234567890"],
    "key": ["AKIA", "sk-", "ghp_short", "sk_memory_allocated_add_", "pk-spawn-test-profiling.sh", "task-force-of-many-different-people", "eyJ.x.y", "-----BEGIN PUBLIC KEY-----\nAAAA"],
}


@pytest.mark.parametrize("kind", list(data.MASKS))
def test_masks_find_what_they_should_and_leave_the_rest(kind):
    for secret in FOUND[kind]:
        for text in ("{}", "call {}, now", "({})", "{}\n{}", "a: {}.", "http://{}:80/, {}: so" if secret == "8.8.8.8" else "{}"):
            text = text.format(secret, secret)
            masked, count = data.MASKS[kind](text)
            assert (masked, count) == (text.replace(secret, f"<{kind.upper()}>"), text.count(secret)), secret
            assert data.MASKS[kind](masked) == (masked, 0)
        assert data.MASKS[kind](f"电话{secret}或연락{secret}입니다")[1] == 2, secret  # no space parts what is Chinese or Korean
    for other in LEFT[kind]:
        for text in ("{}", "see {} there", "({})"):
            assert data.MASKS[kind](text.format(other)) == (text.format(other), 0), other


def test_masks_leave_each_others_places():
    """All masks in their order, on all data at once: each kind is found as often as it stands there."""
    text = "\n".join(f"{kind} is {secret}" for kind in FOUND for secret in FOUND[kind])
    counts = {}
    for kind, mask in data.MASKS.items():
        text, counts[kind] = mask(text)
    assert counts == {kind: len(FOUND[kind]) for kind in FOUND}, text


def test_luhn():
    """Against the textbook's way: double each second digit from the right, subtract 9 from what is above 9."""
    rng = random.Random(0)
    for _ in range(2000):
        number = [rng.randrange(2, 7)] + [rng.randrange(10) for _ in range(rng.randrange(11, 19))]
        doubled = [2 * d - 9 * (2 * d > 9) if (len(number) - i) % 2 == 0 else d for i, d in enumerate(number)]
        assert data.luhn("".join(map(str, number))) == (sum(doubled) % 10 == 0)


ATTACKS = ["a", "a.", "1", "1 ", "1-", "1.", "a@", "a@b.", "@", ":", "a:", "1:", "-----BEGIN PRIVATE KEY-----", "-", "eyJa.", "sk-",
           "(1)", "+1 ", "4111 ", "4111-1111 ", " ", "\n", "#", "...", "…", "{", ".\"", "a\n", "<", "é", "xoxb-1", "\0", "4111 111111 "]


def slow(function, sizes=(1, 4), attacks=ATTACKS):
    """The attacks on which four times the text takes a function more than 9 times as long (and above 0.1 s)."""
    out = []
    for attack in attacks:
        seconds = []
        for size in sizes:
            text = attack * int(size * 12_000 / len(attack)) + "!"
            began = time.process_time()
            function(text)
            seconds.append(time.process_time() - began)
        out += [(attack, seconds)] * (seconds[1] > max(0.1, 9 * seconds[0]))
    return out


@pytest.mark.slow  # it looks at the clock
@pytest.mark.parametrize("name", [*data.MASKS, *GROUPS])
def test_time_is_linear(name):
    """No mask and no rule takes quadratic time on text that is made for it; a pattern that does is found."""
    assert slow(data.MASKS.get(name) or (lambda text: data.obey(name, text))) == []


def test_the_rule_on_time_bites():
    assert slow(re.compile(r"\w+@\w+").search, (0.3, 1.2), ["a", "-"]) == [("a", [pytest.approx(0, abs=99)] * 2)]


# ------------------------------------------------------------------------------------------------ classifiers and language

LETTERS = {"aa": "abcdefgh", "bb": "efghijkl", "cc": "αβγδεζηθ", "dd": "的一是不了在人有"}


def made_up(code, seed, count=40):
    """Text of a made-up language: words of its own letters, in an order of its own."""
    rng = random.Random(f"{code}{seed}")
    return " ".join("".join(rng.choice(LETTERS[code][i % 3:i % 3 + 5]) for i in range(rng.randrange(2, 8))) for _ in range(count))


@pytest.fixture(scope="module")
def languages():
    return {code: [made_up(code, i) for i in range(30)] for code in LETTERS}


def test_features_are_the_n_grams_of_a_text():
    """Buckets against a slow loop over slices; the same text in another process gives the same ones."""
    model = data.Classifier(np.array(["x"]), "characters", 3, 0.0, np.zeros((1 << 12, 1), np.int8), 1.0)
    cleaned = " ab cé 的 "
    found = model.features("AB, cÉ! 1 的")
    slow, at = {}, 0
    for n in (1, 2, 3):
        for i in range(len(cleaned) - n + 1):
            key = 0
            for letter in cleaned[i:i + n]:
                key = (key + ord(letter) + 1) * 0x9E3779B97F4A7C15 % 2 ** 64
                key ^= key >> 32
            assert found[at] == key >> 52
            assert slow.setdefault(cleaned[i:i + n], found[at]) == found[at]
            at += 1
    assert at == found.size and found.min() >= 0 and found.max() < 1 << 12
    words = data.Classifier(np.array(["x"]), "words", 2, 0.0, np.zeros((1 << 18, 1), np.int8), 1.0)
    assert words.features("The cat. THE cat!").size == 11 and len({*words.features("the cat. the cat!")}) == 4 + 4
    assert words.features("").size == 0


def test_language_is_told(languages, tmp_path, monkeypatch):
    """Unseen text of each language; the file is small, the same at each training, and is read again as it was written."""
    model = data.train_language(languages)
    data.save_arrays(tmp_path / "language.npz", model)
    data.save_arrays(tmp_path / "again.npz", data.train_language(languages))
    assert (tmp_path / "language.npz").read_bytes() == (tmp_path / "again.npz").read_bytes()
    assert (tmp_path / "language.npz").stat().st_size < 10_000 * len(languages)
    for code in languages:
        for seed in range(100, 120):
            found, chance = data.detect_language(made_up(code, seed, 8), str(tmp_path / "language.npz"))
            assert found == code and 0.5 < chance <= 1
    mixture = data.detect_language(made_up("aa", 1, 1) + " " + made_up("bb", 1, 1), str(tmp_path / "language.npz"))
    assert mixture[1] < 1 and data.detect_language("12 34!", str(tmp_path / "language.npz")) == ("", 0.0)
    monkeypatch.setattr(data, "__file__", str(tmp_path / "data.py"))  # the file beside data.py
    keep = data.filters(data.Options(language="aa,cc"))["language"]
    assert [keep(made_up(code, 7)) for code in LETTERS] == [(code in ("aa", "cc"), code) for code in LETTERS]
    assert data.FILTERS["language"](made_up("bb", 7)) == (True, "bb")
    assert keep("1, 2, 3") == (False, "no letters")


def test_naive_bayes_by_hand():
    """The weights against a dictionary of counts, text by text."""
    languages = {"x": ["abab", "abc"], "y": ["bcd ab", "dd"]}
    model = data.train_language(languages)
    counts = {code: Counter(b for f in [model.features(" ".join(texts))] for b in f.tolist()) for code, texts in languages.items()}
    counts = {code: {bucket: count ** 0.6 for bucket, count in counter.items()} for code, counter in counts.items()}
    total = {code: sum(counter.values()) for code, counter in counts.items()}
    for label, code in enumerate(languages):
        unseen = 0.3 * len(counts[code]) / total[code]
        for bucket in set().union(*counts.values()) | {5}:
            common = sum(counts[c].get(bucket, 0) / total[c] for c in counts) / 2 + 1e-9
            share = max(0, counts[code].get(bucket, 0) - 0.3) / total[code]
            assert abs(model.weights[bucket, label] * model.step - np.log(share / common + unseen) / 4) <= model.step / 1.99


def test_what_is_not_translated_is_left_out(languages):
    same = {code: texts + ["one text under all codes"] * 9 for code, texts in languages.items()}
    assert np.array_equal(data.train_language(same).weights, data.train_language(languages).weights)
    with pytest.raises(ValueError, match="two languages"):
        data.train_language({"aa": ["the same"], "bb": ["the same"], "cc": ["another"]})


def test_scripts_are_told_apart_without_a_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data, "__file__", str(tmp_path / "data.py"))
    data.tell_once.cache_clear()
    assert data.detect_language("Hello!") == ("latin", 1.0)
    assert data.detect_language("Привет, мир") == ("cyrillic", 1.0)
    assert data.detect_language("abc абвгд") == ("cyrillic", 5 / 8)
    assert data.detect_language(" 123 ") == ("", 0.0)
    assert capsys.readouterr().err.count("only scripts are told apart") == 1


def two_kinds(seed, count):
    """Texts that differ in the order of words alone, so that single words tell little and pairs tell much."""
    rng = random.Random(seed)
    pairs = [(a, b) for a in WORDS[:8] for b in WORDS[20:28]]
    good, bad = [], []
    for i in range(count):
        some = [rng.choice(pairs) for _ in range(12)]
        good.append(" ".join(f"{a} {b}." for a, b in some))
        bad.append(" ".join(f"{b} {a}." for a, b in some))
    return good, bad


def test_classifier_learns_and_its_file_is_used_by_filters(tmp_path):
    good, bad = two_kinds(0, 300)
    model = data.train_classifier(good, bad)
    path = str(tmp_path / "q.npz")
    data.save_arrays(path, model)
    o = data.Options(quality=path, harmful=path, min_quality=0.6, max_harmful=0.4)
    quality, harmful = data.filters(o)["quality"], data.filters(o)["harmful"]
    test_good, test_bad = two_kinds(1, 50)
    assert all(quality(text)[0] and not harmful(text)[0] for text in test_good)
    assert not any(quality(text)[0] or not harmful(text)[0] for text in test_bad)
    keep, value = quality(test_good[0])
    assert value == pytest.approx(model.probabilities(test_good[0])[1]) and 0.6 <= value <= 1
    other = data.train_classifier(good, bad)
    assert np.array_equal(model.weights, other.weights) and model.step == other.step
    assert not np.array_equal(data.train_classifier(good, bad, seed=1).weights, model.weights)
    assert model.probabilities("")[1] == pytest.approx(1 / (1 + np.exp(-model.offset)))
    for kinds in [(good, []), ([], bad), (good, [""]), ([], [])]:
        with pytest.raises(ValueError, match="both kinds"):
            data.train_classifier(*kinds)


def test_one_step_of_adagrad_by_hand():
    """Three texts of one word, one batch, three passes: against the formula in floats."""
    labels = {"yes": 1, "aye": 1, "no": 0}
    model = data.train_classifier(["yes", "aye"], ["no"])
    weight, square = dict.fromkeys([*labels, ""], 0.0), dict.fromkeys([*labels, ""], 1e-8)
    for _ in range(3):
        slopes = {word: 1 / (1 + np.exp(-weight[word] - weight[""])) - label for word, label in labels.items()}
        slopes[""] = sum(slopes.values()) / 3
        for word, slope in slopes.items():
            square[word] += slope ** 2
            weight[word] -= 0.2 * slope / square[word] ** 0.5
    for word in weight:
        assert model.probabilities(word)[1] == pytest.approx(1 / (1 + np.exp(-weight[word] - weight[""] * (word != ""))), abs=2e-3)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04broken", b"\x93NUMPY", "pickle", "other", "npy"])
def test_a_file_that_is_no_model_is_one_line(content, tmp_path):
    path = tmp_path / "m.npz"
    if content == "pickle":
        np.savez(path, labels=np.array([{}], object), unit="words")
    elif content == "other":
        np.savez(path, a=np.zeros(3))
    elif content == "npy":
        np.save(path.open("wb"), np.zeros(3))
    else:
        path.write_bytes(content)
    for kind in (data.Classifier, data.NgramModel):
        with pytest.raises(ValueError, match="holds no model") as caught:
            data.load_arrays(str(path), kind)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        data.FILTERS["quality"]("text") if not os.path.exists("quality.npz") else data.load_arrays("none", data.Classifier)


# -------------------------------------------------------------------------------------------------------- n-gram language model

def slow_kneser_ney(units, vocab_size, order):
    """p(word, history) by dictionaries of tuples and recursion; the discounts are taken from counts of counts."""
    units = tuple(units)
    levels = []
    for n in range(1, order + 1):
        occurrences = Counter(units[i:i + n] for i in range(len(units) - n + 1))
        longer = {units[i:i + n + 1] for i in range(len(units) - n)}
        counts = occurrences if n == order else {gram: max(1, sum(l[1:] == gram for l in longer)) for gram in occurrences}
        n1, n2, n3, n4 = (max(1, sum(count == c for count in counts.values())) for c in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        d = [min(0.95, max(0.1, 1 - 2 * y * n2 / n1)), min(1.9, max(0.1, 2 - 3 * y * n3 / n2)), min(2.85, max(0.1, 3 - 4 * y * n4 / n3))]
        levels.append((counts, d))

    def p(word, history, n):
        if n == 0:
            return 1 / vocab_size
        history = history[-(n - 1):] if n > 1 else ()
        lower = p(word, history, n - 1)
        counts, d = levels[n - 1]
        after = {gram: count for gram, count in counts.items() if gram[:-1] == history}
        if len(history) < n - 1 or not after:
            return lower
        total = sum(after.values())
        back = sum(d[min(count, 3) - 1] for count in after.values()) / total
        count = after.get((*history, word), 0)
        return (count - d[min(count, 3) - 1] if count else 0) / total + back * lower
    return lambda word, history: p(word, tuple(history), min(order, len(history) + 1))


@pytest.mark.parametrize("vocab_size, count, order", [(3, 40, 3), (6, 150, 4), (2, 9, 2), (5, 30, 1), (4, 5, 5)])
def test_kneser_ney(vocab_size, count, order):
    """Against dictionaries and recursion, on text seen and not; and all probabilities add up to 1 after any history."""
    rng = np.random.default_rng(vocab_size)
    units = rng.integers(0, vocab_size, count) * rng.integers(0, 2, count)
    model, slow = data.train_ngrams(units, vocab_size, order), slow_kneser_ney(units.tolist(), vocab_size, order)
    for text in (units, rng.integers(0, vocab_size, 30), units[:2], units[:0]):
        wanted = [-np.log2(slow(int(word), text[:i].tolist())) for i, word in enumerate(text)]
        assert model.bits(text) == pytest.approx(wanted)
    for _ in range(40):
        history = rng.integers(0, vocab_size, rng.integers(0, order + 2))
        chances = [2.0 ** -model.bits(np.append(history, word))[-1] for word in range(vocab_size)]
        assert sum(chances) == pytest.approx(1, abs=1e-12) and min(chances) > 0


def test_kneser_ney_of_too_little():
    for order in (0, 6):
        with pytest.raises(ValueError, match="too few"):
            data.train_ngrams(np.arange(5), 5, order)


def test_perplexity_filter(tmp_path):
    """Text like the training text needs few bits, letters at random many."""
    text = prose(3000).encode()
    data.save_arrays(tmp_path / "n.npz", data.train_ngrams(np.frombuffer(text, np.uint8), 256, 5))
    keep = data.filters(data.Options(ngrams=str(tmp_path / "n.npz"), max_bits=3.0))["perplexity"]
    (good, few), (bad, many) = keep(prose(100, 5)), keep("".join(random.Random(0).choices("abcdefghijklmnop", k=500)))
    assert good and not bad and few < 3 < many and keep("") == (True, 0.0)


def test_bits_per_byte_of_a_folder(tmp_path, documents):
    """Of the files that data.py writes, over the bytes of the held-out text."""
    (tmp_path / "c.txt").write_text("<|endoftext|>".join(documents), encoding="utf-8")
    manifest = data.prepare(str(tmp_path / "c.txt"), "char", str(tmp_path / "out"), 300, separator="<|endoftext|>", val_fraction=0.2)
    train, val = (np.load(tmp_path / "out" / f"{side}.npy") for side in ("train", "val"))
    vocab_size = data.bpe.load(tmp_path / "out" / "tokenizer.json").vocab_size
    wanted = data.train_ngrams(train, vocab_size, 3).bits(val).sum() / manifest["val"]["bytes"]
    assert data.ngram_bits_per_byte(tmp_path / "out", 3) == pytest.approx(wanted) and 0 < wanted < 4
    (tmp_path / "b.txt").write_text("the cat sat on a mat " * 300 + "the cat sat on a rug " * 20)
    data.prepare(str(tmp_path / "b.txt"), "word", str(tmp_path / "b"), 100)
    with pytest.raises(ValueError, match="has <.unk.>, of which nobody knows"):  # it is cheap to tell, and stands for any text
        data.ngram_bits_per_byte(tmp_path / "b", 3)


# --------------------------------------------------------------------------------------------------------------- commands

def test_training_by_command(run_main, tmp_path, languages, monkeypatch, capsys):
    """Each --train_... writes a file that its filter reads; what cannot be trained is one line."""
    (tmp_path / "l.json").write_text(json.dumps(languages), encoding="utf-8")
    (tmp_path / "folder").mkdir()
    for code, texts in languages.items():
        (tmp_path / "folder" / f"{code}.txt").write_text("\n".join(texts), encoding="utf-8")
    good, bad = two_kinds(0, 40)
    for name, texts in (("good", good), ("bad", bad)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "text.txt").write_text(prose(500))
    monkeypatch.chdir(tmp_path)
    done = run_main("data.py", "--train_language=l.json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("language.npz: "), done
    data.train_filter(data.Options(train_language="folder", output="f.npz"))
    data.train_filter(data.Options(train_classifier=True, positive="good.jsonl", negative="bad.jsonl"))
    data.train_filter(data.Options(train_ngrams="text.txt", output="n.npz"))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["f.npz:", "quality.npz:", "n.npz:"]
    assert (tmp_path / "language.npz").read_bytes() == (tmp_path / "f.npz").read_bytes()
    assert data.filters(data.Options(quality=str(tmp_path / "quality.npz")))["quality"](good[0])[0]
    assert data.filters(data.Options(ngrams=str(tmp_path / "n.npz")))["perplexity"](prose(90))[0]
    (tmp_path / "bad.json").write_text('{"de": "text", "en": [1]}')
    (tmp_path / "no.json").write_text("no")
    (tmp_path / "long.json").write_text('{"de": "die das", "en": "the that"}')
    done = run_main("data.py", "--train_language=bad.json", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1) and "{code: [texts]}" in done.stderr
    for words in (dict(train_language="no.json"), dict(train_language="long.json"), dict(train_language="none.json"), dict(train_ngrams="none"), dict(train_classifier=True),
                  dict(train_classifier=True, positive="good.jsonl", negative="none"), dict(train_ngrams="folder/none")):
        with pytest.raises((ValueError, OSError)) as caught:
            data.train_filter(data.Options(**words))
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------- readers

def bytes_of(path):
    return b"".join(block or b"" for block in data.read_blocks(path))


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("kind", PACKERS)
def test_packed_files_are_known_by_how_they_begin(kind, tmp_path):
    """One member, several, a bomb in small blocks, a damaged one and a cut one; whatever the name is."""
    pack, parts = PACKERS[kind], [os.urandom(70_000), b"text " * 300_000, b"end"]
    path = tmp_path / "name.txt"
    path.write_bytes(b"".join(map(pack, parts)))
    assert bytes_of(path) == b"".join(parts) and max(map(len, data.read_blocks(path))) <= 1 << 20
    path.write_bytes(pack(bytes(20_000_000)))
    assert max(map(len, data.read_blocks(path))) <= 1 << 20 and sum(map(len, data.read_blocks(path))) == 20_000_000
    packed = pack(parts[0])
    path.write_bytes(packed[:40_000])
    blocks = list(data.read_blocks(path))
    assert blocks.count(None) == 1 and parts[0].startswith(b"".join(block or b"" for block in blocks))
    path.write_bytes(packed[:1000] + b"\xff" * 500 + packed[1500:] + pack(parts[2]))
    blocks = list(data.read_blocks(path))
    assert None in blocks and blocks[-1] == parts[2]


def test_web_archives_in_any_packing(tmp_path):
    records = [({"WARC-Type": "response", "WARC-Target-URI": f"http://e.org/{i}"}, f"page {i}".encode() * 999) for i in range(20)]
    data.write_warc(tmp_path / "a.warc", records)
    plain = (tmp_path / "a.warc").read_bytes()
    for kind, pack in PACKERS.items():
        (tmp_path / f"a.warc.{kind}").write_bytes(pack(plain))
        assert [payload for _, payload in data.read_warc(tmp_path / f"a.warc.{kind}")] == [payload for _, payload in records]


def test_zstd_where_python_has_it(tmp_path, monkeypatch, capsys):
    """Python 3.14's module, played by a stand-in where there is none: bytes behind the magic, bz2 inside."""
    class Decompressor:
        def __init__(self):
            self.inner = bz2.BZ2Decompressor()

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def decompress(self, block, limit=-1):
            return self.inner.decompress(block.removeprefix(b"\x28\xb5\x2f\xfd"), limit)

    monkeypatch.setitem(sys.modules, "compression", types.ModuleType("compression"))
    monkeypatch.setitem(sys.modules, "compression.zstd", types.SimpleNamespace(ZstdDecompressor=Decompressor, ZstdError=KeyError))
    data.unpackers.cache_clear()
    (tmp_path / "a").write_bytes(b"\x28\xb5\x2f\xfd" + bz2.compress(b"hello" * 9999))
    assert bytes_of(tmp_path / "a") == b"hello" * 9999
    monkeypatch.undo()
    data.unpackers.cache_clear()
    if sys.version_info < (3, 14):
        assert list(data.read_blocks(tmp_path / "a")) == [None] and "needs Python 3.14" in capsys.readouterr().err


CHARSETS = {
    "cp1252": ["Les élèves étaient très heureux de fêter Noël là-bas, où ça brûle.", "Die Straße führt über größere Hügel und schöne Täler.",
               "El niño comió piñones en la montaña con su papá.", "Não há razão para a questão, então irmãos lá estão."],
    "cp1250": ["Zażółć gęślą jaźń, proszę państwa, książki są tańsze.", "Příliš žluťoučký kůň úpěl ďábelské ódy.",
               "Egy hűvös vödör őrült író tükörfúrógépe."],
    "cp1251": ["Съешь же ещё этих мягких французских булок, да выпей чаю."], "koi8-r": ["Съешь же ещё этих мягких французских булок."],
    "cp1253": ["Ο ήλιος λάμπει και τα παιδιά παίζουν στην αυλή."], "cp1255": ["ילדים משחקים בחצר והשמש זורחת מעל הים."],
    "cp1256": ["الأطفال يلعبون في الحديقة والشمس مشرقة اليوم."], "cp874": ["เด็ก ๆ กำลังเล่นอยู่ในสวนและแดดออก"],
    "gb18030": ["我们在学校里学习中国的历史，他说这是一个很大的国家。"], "big5": ["我們在學校裡學習中國的歷史，他說這是一個很大的國家。"],
    "cp932": ["私は毎日学校に行って、日本の歴史を勉強しています。"], "euc-jp": ["私は毎日学校に行って、日本の歴史を勉強しています。"],
    "cp949": ["나는 매일 학교에 가서 한국의 역사를 공부합니다. 이것은 책이다."],
}


@pytest.mark.parametrize("charset", CHARSETS)
def test_character_sets_are_told_by_their_letters(charset):
    for text in CHARSETS[charset]:
        assert data.decode(text.encode(charset)) == text
        assert data.decode((text * 999).encode(charset)) == text * 999  # the sample may end within a character


def test_a_character_set_that_is_told_goes_first():
    """Byte order mark, then valid UTF-8, header, meta, letters; UTF-8 with a few errors stays UTF-8."""
    text = "Съешь же ещё этих булок. "
    assert data.decode(text.encode("koi8-r"), "Content-Type: text/html; charset=windows-1251") != text
    assert data.decode(text.encode("cp1251"), "Content-Type: text/html; charset=windows-1251") == text
    assert data.decode(b"<meta charset=koi8-r>" + text.encode("koi8-r")) == "<meta charset=koi8-r>" + text
    assert data.decode(text.encode("utf-16")) == text and data.decode(b"\xef\xbb\xbf" + text.encode()) == text
    assert data.decode(text.encode() * 9 + b"\xff" + text.encode()) == text * 9 + "\ufffd" + text
    assert data.decode(b"caf\xe9 for all, and no other letter") == "café for all, and no other letter"
    assert data.decode(bytes(range(256)) * 9)[:1] == "\0"


PDF = (b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj 2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj 3 0 obj<</Type/Page"
       b"/Parent 2 0 R/MediaBox[0 0 300 144]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>endobj 4 0 obj<</Length 44>>stream\n"
       b"BT /F1 18 Tf 10 100 Td (Hello from a PDF) Tj ET\nendstream endobj 5 0 obj<</Type/Font/Subtype/Type1/BaseFont/Helvetica"
       b">>endobj trailer<</Root 1 0 R>>")


def test_pdf(monkeypatch, capsys, tmp_path):
    """A file's text; nothing for a damaged one, for one that takes too long and, told once, where pdftotext is missing."""
    if shutil.which("pdftotext"):
        assert data.decode(PDF).strip() == "Hello from a PDF"
        assert data.decode(b"%PDF-1.4 no more") == ""
    for script, wanted in (("sleep 9", ""), ("echo a; sleep 9", "a\n"), ("while true; do echo aaaaaaa; done", "aaaaaaa\n" * 12 + "aaaa")):
        (tmp_path / "pdftotext").write_text(f"#!/bin/sh\n{script.replace('sleep', 'exec sleep')}\n")
        (tmp_path / "pdftotext").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        assert data.pdf_text(PDF, seconds=1, most=100) == wanted
    monkeypatch.setenv("PATH", "/nowhere")
    data.tell_once.cache_clear()
    assert [data.decode(PDF), data.decode(PDF)] == ["", ""]
    assert capsys.readouterr().err.count("pdftotext is not installed") == 1


# --------------------------------------------------------------------------------------------------------------- rewriting

class Answers(http.server.BaseHTTPRequestHandler):
    """A server that says what was asked, after some trouble: self.server.trouble holds statuses to give first."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((body, self.headers.get("Authorization")))
        status = self.server.trouble.pop(0) if self.server.trouble else 200
        if status == "lost":
            return  # the connection ends without an answer
        said = {"choices": [{"message": {"content": "-".join(message["content"] for message in body["messages"])}}]}
        answer = b"no JSON" if status == "broken" else json.dumps(said).encode()
        self.send_response(200 if status == "broken" else status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.asked, server.trouble = [], []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        server.url = f"http://127.0.0.1:{server.server_port}/v1/chat/completions"
        yield server
        server.shutdown()


@pytest.mark.parametrize("style", data.STYLES)
def test_rewriting_is_asked_for_once(server, style, tmp_path, monkeypatch):
    """In order, each different text once, from the cache the second time; the key comes from API_KEY and lies nowhere."""
    monkeypatch.setenv("API_KEY", "secret-key")
    texts = ["one", "zwei ü", "one", "three"]
    said = data.rewrite(texts, style, server.url, "m", tmp_path / "cache", wait=0.001)
    assert said == [f"{data.STYLES[style]}-{text}" for text in texts] and len(server.asked) == 3
    assert {key for _, key in server.asked} == {"Bearer secret-key"} and server.asked[0][0]["model"] == "m"
    server.trouble = [404] * 9
    assert data.rewrite(texts, style, server.url, "m", tmp_path / "cache") == said and len(server.asked) == 3
    assert not any(b"secret-key" in path.read_bytes() for path in (tmp_path / "cache").iterdir())
    monkeypatch.delenv("API_KEY")
    server.trouble = []
    data.rewrite(["four"], style, server.url, "m", tmp_path / "cache")
    assert server.asked[-1][1] is None


def test_rewriting_tries_again(server, tmp_path):
    server.trouble = [429, 503, "lost", "broken", 500]
    assert data.rewrite(["a"], "qa", server.url, cache=tmp_path, wait=0.001, tries=6)[0].endswith("-a")
    assert len(server.asked) == 6
    server.trouble = [500] * 3
    with pytest.raises(ConnectionError, match="gave no answer .*500") as caught:
        data.rewrite(["b"], "qa", server.url, cache=tmp_path, wait=0.001, tries=3)
    assert "\n" not in str(caught.value) and len(server.asked) == 9
    server.trouble = [401]
    with pytest.raises(ConnectionError, match="401"):
        data.rewrite(["b"], "qa", server.url, cache=tmp_path, wait=0.001)
    assert len(server.asked) == 10 and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="none of easy, medium, hard, qa"):
        data.rewrite(["b"], "formal", server.url)
    with pytest.raises(ConnectionError):
        data.rewrite(["b"], "qa", "http://127.0.0.1:9/none", cache=tmp_path, wait=0.001, tries=2)


# ------------------------------------------------------------------------------------------------------------------ fuzzing

PAGE = ("<!doctype html><html><head><meta charset=utf-8><title>t</title><style>p{}</style></head><body class=x><nav><a href=/>home</a>"
        "</nav><article><h1>Über</h1><p>A long first paragraph, with <b>bold</b> &amp; <a href='#'>links</a>.<ul><li>one<li>two</ul>"
        "<table><tr><td>1<td>2</table><pre>code\n  x</pre><!-- c --><![CDATA[d]]><script>if(a<b){}</script></article></body></html>")
PIECES = [b"<", b">", b"<!--", b"-->", b"<![CDATA[", b"]]>", b"<script>", b"</script", b"<pre>", b"</td>", b"&#x110000;", b"&#0;", b"&",
          b"\"", b"'", b"=", b"\0", b"\xff", b"\xfe", b"\xc3", b"\xed\xa0\x80", b"\r\n\r\n", b"WARC/1.0\r\n", b"Content-Length: 9",
          b"Content-Length: -1", b"Content-Length: 99999999999", b"charset=utf-7", b"charset=gb18030", b"\x1f\x8b\x08", b"{\"text\":",
          b"BZh91AY&SY", b"\xfd7zXZ\0", b"%PDF-", b"Transfer-Encoding: chunked\r\n", b"ffffffff\r\n", b"<title>", b"<svg>", b"\xef\xbb\xbf"]


def mutated(rng, seed):
    """A few random cuts, copies, flips and insertions."""
    out = bytearray(seed)
    for _ in range(rng.randrange(1, 8)):
        at, end = sorted((rng.randrange(len(out) + 1), rng.randrange(len(out) + 1)))
        end = min(end, at + 40)
        kind = rng.randrange(5)
        if kind == 0:
            del out[at:end]
        elif kind == 1:
            out[at:at] = out[at:end] * rng.randrange(1, 9)
        elif kind == 2 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            out[at:at] = rng.choice(PIECES) * rng.choice([1, 1, 1, 50])
        else:
            out[at:end] = bytes(rng.randrange(256) for _ in range(end - at))
    return bytes(out)


def seeds(folder):
    """{kind: inputs} that are mutated."""
    records = [({"WARC-Type": "response", "Content-Type": "application/http", "http": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"},
                b"5\r\nhello\r\n0\r\n\r\n"),
               ({"WARC-Type": "response", "Content-Type": "application/http", "http": "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n"},
                gzip.compress(PAGE.encode())), ({"WARC-Type": "warcinfo"}, b"software: x")]
    archives = []
    for name in ("a.warc", "a.warc.gz"):
        data.write_warc(folder / name, records)
        archives.append((folder / name).read_bytes())
    rows = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in ("one", "zwei \ud800", PAGE)) + b"{}\n[1]\nnull\n"
    return {"page": [PAGE.encode(), PAGE.replace("utf-8", "koi8-r").encode("utf-16")], "warc": archives,
            "packed": [pack(PAGE.encode() * 3) for pack in PACKERS.values()], "jsonl": [rows], "text": ["Grüße 的 ".encode() * 9]}


def survive(kind, raw, path, filtered):
    """What a worker does to an input of a kind; an exception comes out of here if one comes out of data.py."""
    texts = []
    if kind in ("warc", "packed", "jsonl"):
        path.write_bytes(raw)
    if kind == "warc":
        counts = Counter()
        found = list(data.read_warc(path, counts))
        assert counts["broken"] or found or not raw.strip()
        texts = [data.extract(payload) + data.decode(payload, headers.get("http", "")) for headers, payload in found]
    elif kind == "packed":
        raw = b"".join(block or b"" for block in data.read_blocks(path))
    elif kind == "jsonl":
        counts = Counter()
        texts = [text for text, _ in data.read_jsonl(path, counts)]
        assert len(texts) + counts["bad_lines"] == sum(not line.isspace() for line in raw.decode("utf-8", "replace").encode().split(b"\n") if line)
    texts += [data.extract(raw), data.extract(raw, main=False), data.decode(raw)]
    for text in texts:
        assert isinstance(text, str) and "\ud800" not in text
        text.encode()
        if not filtered:
            continue
        for name in GROUPS:
            assert isinstance(data.FILTERS[name](text)[0], bool)
        for mask in data.MASKS.values():
            text, count = mask(text)
            assert count >= 0


def fuzz(folder, count, seed):
    """`count` mutated inputs of each kind in turn; the one that fails is left in the folder."""
    rng, kinds = random.Random(seed), seeds(folder)
    pdf_text, data.pdf_text = data.pdf_text, lambda raw: ""  # a process for each would take an hour
    try:
        for i in range(count):
            kind = list(kinds)[i % len(kinds)]
            raw = mutated(rng, rng.choice(kinds[kind]))
            (folder / "input").write_bytes(raw)
            survive(kind, raw, folder / "file", i % 9 == 0)
    finally:
        data.pdf_text = pdf_text


def test_mutated_input_raises_nothing(tmp_path):
    fuzz(tmp_path, 120, 0)


@pytest.mark.slow
def test_100_000_mutated_inputs_raise_nothing(tmp_path):
    fuzz(tmp_path, 100_000, 1)


HUGE = {"nested tags": lambda n: b"<div>" * (n // 5), "nested spans": lambda n: b"<b><i>" * (n // 6), "attributes": lambda n: b"<p " + b"a=b " * (n // 4) + b">",
        "comments": lambda n: b"<!--" * (n // 4), "quotes": lambda n: b"<p a=\"" * (n // 6), "ends": lambda n: b"</p></b>" * (n // 8),
        "cdata": lambda n: b"<![CDATA[" * (n // 9), "scripts": lambda n: b"<script>" * (n // 8), "lists": lambda n: b"<ul><li>" * (n // 8),
        "tables": lambda n: b"<table><tr><td>" * (n // 15), "pre": lambda n: b"<pre>\n" * (n // 6), "entities": lambda n: b"&#1;&amp" * (n // 8),
        "less-than": lambda n: b"<" * n, "equals": lambda n: b"<p =" + b"=" * n, "bytes": lambda n: b"\x80\xff" * (n // 2), "spaces": lambda n: b"<p" + b" " * n}


def seconds_of(function, *given):
    began = time.process_time()
    function(*given)
    return time.process_time() - began


@pytest.mark.slow  # it looks at the clock
@pytest.mark.parametrize("kind", HUGE)
def test_a_page_made_to_be_slow_takes_linear_time(kind):
    """Four times the page takes at most nine times as long."""
    small, large = (seconds_of(data.extract, HUGE[kind](n)) for n in (20_000, 80_000))
    assert large < max(0.2, 9 * small)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nested tags", "attributes", "comments", "quotes", "bytes"])
def test_a_page_of_50_megabytes(kind):
    """Ten times the page takes at most thirty times as long."""
    small, large = (seconds_of(data.extract, HUGE[kind](n)) for n in (5_000_000, 50_000_000))
    assert large < max(1, 30 * small)
