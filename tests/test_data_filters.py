"""The filters, masks, classifiers, n-gram models and readers of data.py: each rule on both sides of its line, each machine
against a slow one written differently, each pattern against text made to slow it down.
"""
import random
import re
import time
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
    good = lines(*unlike(40, 90))
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
    for times in range(2, 80):
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
    "phone": ["2024-11-26", "1990-1995", "01.02.2023", "3.14159265", "10 000 000", "1234567", "192.168.100.200", "12:30-14:45",
              "978-3-16-148410-0", "5551234567", "v1.2.3-45-678"],
    "ip": ["127.0.0.1", "192.168.1.1", "10.0.0.7", "999.1.1.1", "1.2.3", "1.2.3.4.5", "12:30:45", "::1", "fe80::1", "std::vector"],
    "card": ["4111 1111 1111 1112", "1234567890123", "0000 0000 0000 0000", "4111 1111-1111 1111", "12345678901234567890"],
    "key": ["AKIA", "sk-", "ghp_short", "task-force-of-many-different-people", "eyJ.x.y", "-----BEGIN PUBLIC KEY-----\nAAAA"],
}


@pytest.mark.parametrize("kind", list(data.MASKS))
def test_masks_find_what_they_should_and_leave_the_rest(kind):
    for secret in FOUND[kind]:
        for text in ("{}", "call {}, now", "({})", "{}\n{}", "a: {}."):
            text = text.format(secret, secret)
            masked, count = data.MASKS[kind](text)
            assert (masked, count) == (text.replace(secret, f"<{kind.upper()}>"), text.count(secret)), secret
            assert data.MASKS[kind](masked) == (masked, 0)
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


def slow(function, sizes=(1, 4)):
    """The attacks on which four times the text takes a function more than 9 times as long (and above 0.1 s)."""
    out = []
    for attack in ATTACKS:
        seconds = []
        for size in sizes:
            text = attack * int(size * 12_000 / len(attack)) + "!"
            began = time.process_time()
            function(text)
            seconds.append(time.process_time() - began)
        out += [(attack, seconds)] * (seconds[1] > max(0.1, 9 * seconds[0]))
    return out


@pytest.mark.parametrize("name", [*data.MASKS, *GROUPS])
def test_time_is_linear(name):
    """No mask and no rule takes quadratic time on text that is made for it; a pattern that does is found."""
    assert slow(data.MASKS.get(name) or (lambda text: data.obey(name, text))) == []


def test_the_rule_on_time_bites():
    assert slow(re.compile(r"\w+@\w+").search, (0.3, 1.2)) != []
