"""Verifiers of responses, and the sandbox in which programs are tried: sections of align.py."""
import ast
import concurrent.futures
import contextlib
import inspect
import json
import os
import runpy
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Callable, Sequence

import regex

from model import require
from sample import final_number

# ---- answers: are two texts the same value?

# how LaTeX, and what people write around a number, becomes plain text, in this order
LATEX = (
    (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}|\\[dt]?frac\s*(\d)\s*(\d)", r" \1\3/\2\4"),
    (r"\\(?:text|textbf|mathrm|mathbf|mbox|boxed)\s*\{([^{}]*)\}", r" \1 "),
    (r"\{,\}", ","),
    (r"\s*(?:\\times|\\cdot|×)\s*10\s*\^\s*\{?\s*(-?\d+)\s*\}?", r"e\1"),
    (r"\A\s*(-?)\s*\\?\$([^$]+)\Z", r"\1\2 dollar"),  # a dollar sign that no second one closes is money
    (r"\\(?:left|right|displaystyle)\b|\\[,;:!()\[\]]|[$*`]|(?<=\d)\\ (?=\d{3})", ""),
    (r"\\(?=[%$ ])", ""),
    (r"\^?\s*\{?\s*(?:\\circ|°)\s*\}?", " degree"),
    ("[−–]", "-"),
    (r"\A\s*[A-Za-z]\s*=", ""),
    (r"\s+(?=\W)|(?<=\W)\s+", ""),  # of the spaces those stay that stand alone between words or digits
)
NUMBER = (r"(?P<sign>[-+]?)(?:(?P<whole>\d+) (?=\d+/))?(?P<top>\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)"
          r"(?:/(?P<bottom>0*[1-9]\d*))?(?P<power>e[-+]?\d{1,3}\b)?")


def tidy(text: str) -> str:
    r"""A short answer without LaTeX, capitals, idle spaces and the final full stop.

    >>> tidy(r"$\boxed{1\frac{1}{2}}$."), tidy(r"$5"), tidy("( 1, 2 )")
    ('1 1/2', '5 dollar', '(1,2)')
    """
    for pattern, plain_text in LATEX:
        text = regex.sub(pattern, plain_text, text)
    return text.strip().rstrip(".").lower()


def number(text: str) -> tuple[Fraction, str] | None:
    """The value and unit of a text that is one number (unit "": none given), else None.

    >>> number("1,250.5 dollars"), number("-1 1/2"), number("12,50")
    ((Fraction(2501, 2), 'dollar'), (Fraction(-3, 2), ''), None)
    """
    # a unit is one word, as in 5 km/h or 5 cm^2: "5 or 6" is no number
    found = len(text) < 200 and regex.fullmatch(NUMBER + r" ?(%|[a-z]+(?:/[a-z]+|\^\d)?|)", tidy(text))
    if not found:
        return None
    sign, whole, top, bottom, power, unit = found.groups("")
    value = int(whole or 0) + Fraction(top.replace(",", "") + power) / int(bottom or 1)
    return value * int(sign + "1"), unit.removesuffix("s") or unit


def same(a: str, b: str, tolerance: float = 0.0) -> bool:
    """Equal as numbers, or as texts. A unit may be left out but not be another one; 50% is 50, and 0.5 too."""
    if not (number(a) and number(b)):
        return tidy(a) == tidy(b)
    (x, unit), (y, other) = sorted([number(a), number(b)], key=lambda pair: pair[1] != "%")  # percent comes first
    scales = (1, 100) if unit == "%" != other else (1,)
    near = any(abs(x / scale - y) <= tolerance * abs(y) for scale in scales)
    return near and (unit == other or "" in (unit, other))


def exact(response: str, answer: str, tolerance: float = 0.0, lenient: bool = False) -> float:
    r"""1 if the final answer is the right one (see `same`), to a relative `tolerance`.

    That is the last \boxed{}, or what follows "####", "answer is" or "answer:" in its line, or else the whole text;
    lenient: it may also be the last number of the text.
    """
    marked = regex.split(r"####|(?i:\banswer(?: is:?|:))", response)[-1].strip()
    boxed = regex.findall(r"\\boxed\{((?:[^{}]|\{(?1)\})*+)\}", response)
    found = [(boxed or marked.splitlines() or [""])[-1 if boxed else 0]]
    if lenient:
        found += [match[0] for match in regex.finditer(NUMBER + "%?", tidy(response))][-1:]
    return float(any(same(text, answer, tolerance) for text in found))


def word_problem(response: str, answer: str, lenient: bool = False) -> float:
    """GSM8K (Cobbe et al. 2021): the number behind the one ####. Lenient: any final answer, or the last number."""
    marked = lenient or response.count("####") == 1
    return exact(response if marked else "", final_number(answer), 0.0, lenient)


def matched(response: str, pattern: str, lenient: bool = False) -> float:
    """1 if all of the response matches (lenient: a part of it). TimeoutError where that takes over a second."""
    search = regex.search if lenient else regex.fullmatch
    return float(bool(search(pattern, response, timeout=1.0)))


def formatted(response: str, mark: str = "####", lenient: bool = False) -> float:
    """1 for working, then the mark, then an answer that ends its line and the text. Lenient: more may stand around."""
    mark = regex.escape(mark)
    return matched(response, rf"\s*\S(?:(?!{mark})[\s\S])*{mark}(?!.*{mark}).*\S.*\s*", lenient)


# ---- instructions that a program can check (Zhou et al. 2023, IFEval), under the names of the public data

def is_json(text: str) -> bool:
    """Is the text, without the fence of a code block, JSON?"""
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(regex.sub(r"\A```(?i:json)?|```\Z", "", text.strip()))
        return True
    return False


# kind: pattern with the kwargs in braces, how many matches are wanted, in what relation: values, or the names of kwargs
IFEVAL = {
    "keywords:existence": (r"(?i){word}", 1, "at least"),
    "keywords:frequency": (r"(?i){keyword}", "frequency", "relation"),
    "keywords:forbidden_words": (r"(?i)\b{word}\b", 1, "less than"),
    "keywords:letter_frequency": (r"(?i){letter}", "let_frequency", "let_relation"),
    "length_constraints:number_words": (r"\w+", "num_words", "relation"),
    "length_constraints:number_sentences": (r"(?s)\w.*?(?:[.!?]+(?!\S)|\Z)", "num_sentences", "relation"),
    "length_constraints:number_paragraphs": (r"(?:\A|\*\*\*)\s*(?!\*\*\*)\S", "num_paragraphs", "exactly"),
    "detectable_content:number_placeholders": (r"\[.*?\]", "num_placeholders", "at least"),
    "detectable_content:postscript": (r"(?i){postscript_marker}", 1, "at least"),
    "detectable_format:number_bullet_lists": (r"(?m)^[ \t]*(?:\*[^*\n]|-)", "num_bullets", "exactly"),
    "detectable_format:number_highlighted_sections": (r"(\*\*?)[^*\n]*[^*\s][^*\n]*\1", "num_highlights", "at least"),
    "detectable_format:multiple_sections": (r"{section_spliter}\s?\d+", "num_sections", "at least"),
    "detectable_format:constrained_response": (r"My answer is (?:yes|no|maybe)\.", 1, "at least"),
    "detectable_format:title": (r"<<[^\n]*?[^\s<>][^\n]*?>>", 1, "at least"),
    "detectable_format:json_format": is_json,
    "combination:two_responses": (
        r"(?s)\A\s*((?:(?!\*{{6}}).)+?)\s*\*{{6}}(?!\s*\1\s*\Z)(?:(?!\*{{6}}).)*\S\s*\Z", 1, "at least"),
    "combination:repeat_prompt": (r"(?i)\A\s*{prompt_to_repeat}", 1, "at least"),
    "startend:end_checker": (r'(?i){end_phrase}["\s]*\Z', 1, "at least"),
    "startend:quotation": (r'(?s)\A\s*".*"\s*\Z', 1, "at least"),
    "change_case:capital_word_frequency": (r"\b[^\W\p{{Ll}}]*\p{{Lu}}[^\W\p{{Ll}}]*\b", "capital_frequency",
                                           "capital_relation"),
    "change_case:english_capital": (r"\A\P{{Ll}}*\p{{Lu}}\P{{Ll}}*\Z", 1, "at least"),
    "change_case:english_lowercase": (r"\A\P{{Lu}}*\p{{Ll}}\P{{Lu}}*\Z", 1, "at least"),
    "punctuation:no_comma": (",", 1, "less than"),
}


def obeys(text: str, kind: str, kwargs: dict) -> bool:
    """Does a text follow one instruction? One with `keywords` or `forbidden_words` must hold for each of them."""
    require(kind in IFEVAL, f"the instruction {kind!r} is none of {', '.join(IFEVAL)}")
    if kind == "detectable_format:json_format":
        return is_json(text)
    pattern, *limits = IFEVAL[kind]
    count, relation = (kwargs.get(limit, limit) for limit in limits)
    for word in kwargs.get("keywords") or kwargs.get("forbidden_words") or [""]:
        words = {key: regex.escape(str(value).strip()) for key, value in {**kwargs, "word": word}.items()}
        found = len(regex.findall(pattern.format(**words), text, timeout=1.0))
        if not {"at least": found >= count, "less than": found < count, "exactly": found == count}[relation]:
            return False
    return True


def ifeval(response: str, instruction_id_list: list[str], kwargs: list[dict], lenient: bool = False) -> float:
    """The share of instructions followed; lenient ("loose"): without first line, last line or asterisks counts, too."""
    lines, texts = response.split("\n"), [response]
    for cut in (lines, lines[1:], lines[:-1], lines[1:-1]) if lenient else ():
        text = "\n".join(cut).strip()
        texts += [text, text.replace("*", "")]
    texts = [text for text in texts if text.strip()]
    followed = [any(obeys(text, *pair) for text in texts) for pair in zip(instruction_id_list, kwargs, strict=True)]
    return sum(followed) / len(followed)


# ---- the sandbox: what a program is run in

def plain(value):
    """A value as JSON in which a list is no tuple and a set has no order: what two sides can compare without its class.

    >>> plain({"a": (1, [2])})
    ['dict', ['tuple', 'a', ['tuple', 1, ['list', 2]]]]
    """
    if isinstance(value, (list, tuple)):
        return ["list" if isinstance(value, list) else "tuple", *map(plain, value)]
    if isinstance(value, dict):
        return ["dict", *sorted(map(plain, value.items()), key=repr)]
    if isinstance(value, (set, frozenset)):
        return ["set", *sorted(map(plain, value), key=repr)]
    return value


def confine(own: list[str], root: bool) -> None:
    """In new namespaces: go where nothing but Python's own files is, and give up every right for good."""
    import ctypes
    import os
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name, *words):
        if getattr(libc, name)(*words) < 0:
            raise OSError(f"{name}{words}: {os.strerror(ctypes.get_errno())}")

    # the new root is mounted over /proc: a folder that is everywhere, and that nobody in here shall see
    call("mount", b"none", b"/proc", b"tmpfs", 6, b"size=1m")  # MS_NOSUID | MS_NODEV
    for path in filter(os.path.isdir, own):
        os.makedirs("/proc" + path, exist_ok=True)
        call("mount", path.encode(), b"/proc" + path.encode(), None, 0x5000, None)  # MS_BIND | MS_REC
    os.makedirs("/proc/sandbox", exist_ok=True)
    # mount_setattr (Linux 5.12), AT_RECURSIVE: MOUNT_ATTR_RDONLY | NOSUID | NODEV for all that is mounted below /proc
    call("syscall", 442, -100, b"/proc", 0x8000, (ctypes.c_uint64 * 4)(7), 32)
    call("mount", b"none", b"/proc/sandbox", b"tmpfs", 6, b"size=16m,nr_inodes=1k,mode=1777")
    child = os.fork()
    if child:  # this is process 1 of the namespace: all others die with it, daemons too
        os.waitpid(child, 0)
        os._exit(0)
    if root:  # limits do not bind the true root: go on as nobody
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    call("unshare", 0x10000000)  # CLONE_NEWUSER: puts process 1 and the mounts out of reach
    os.chroot("/proc")  # from a chroot no other user namespace can be made, which would bring rights back
    os.chdir("/sandbox")
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    call("capset", (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)())  # no capability is left


def work() -> None:
    """Answer the request on stdin: "ready", then a line of JSON for each call: [its value], or the error as text."""
    import json
    import os
    import resource
    import sys
    request = json.load(sys.stdin)
    answers, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    if request["own"]:
        confine(request["own"], request["root"])
    for number in range(3):
        os.dup2(null, number)
    for name, limit in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    os.write(answers, b"ready\n")
    names = {"__name__": "program", "given": request["given"]}
    for call in request["calls"]:
        try:
            if "program" in request:
                exec(request.pop("program"), names)
            line = json.dumps([plain(eval(call, names))])
        except BaseException as error:  # SystemExit, too
            line = json.dumps(f"{type(error).__name__}: {error}"[:200])
        os.write(answers, line.encode() + b"\n")
    os._exit(0)


# of each process in the sandbox: bytes, processes, files
LIMITS = dict(RLIMIT_AS=1 << 29, RLIMIT_FSIZE=1 << 20, RLIMIT_NPROC=16, RLIMIT_NOFILE=32, RLIMIT_CORE=0)


def sandbox(program: str, calls: Sequence[str], given: object = None, seconds: float = 5.0,
            unsafe: bool = False) -> list:
    """Run a program, then evaluate expressions in its names: for each [its value, as of `plain`] or an error's text.

    Against accidents and reward hacks, not against an attacker who knows a hole in the kernel. The program sees
    `given` and Python's own files (which it cannot change), an empty folder, no network, no other process. It may write
    any answer, so what is right must not be in there: the caller compares. Answers are missing where the process died,
    ran out of `seconds`, or wrote over 64 KB. ValueError: no sandbox can be made here; `unsafe` does with the limits.
    """
    tool, root = shutil.which("unshare"), os.geteuid() == 0
    require(tool or unsafe, "the sandbox needs util-linux's `unshare`; --unsafe does without one")
    command = [tool, "--fork", "--kill-child", "--pid", "--net", "--mount", "--ipc", "--uts"]
    command += [] if root else ["--user", "--map-root-user"]  # root's is made inside, when it has become nobody
    command = [] if unsafe else command
    own = [] if unsafe else [f"{sys.base_prefix}/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    limits = LIMITS | dict(RLIMIT_CPU=int(seconds) + 1)
    request = json.dumps(dict(program=program, calls=calls, given=given, own=own, root=root, limits=limits))
    source = "".join(map(inspect.getsource, (plain, confine, work))) + "work()"
    reader, writer = os.pipe()  # its 64 KB are the bound of what comes back: a program that writes more has to wait
    os.set_blocking(reader, False)
    with open(reader, "rb", 0) as answers:
        with open(writer, "wb", 0) as out, contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run([*command, sys.executable, "-ISc", source], input=request.encode(), stdout=out, stderr=out,
                           timeout=seconds, env={}, cwd="/tmp", start_new_session=True)
        first, *lines = (answers.read(1 << 16) or b"timed out").splitlines()
    reason = [first, *lines][-1].decode()
    require(first == b"ready", f"no sandbox can be made here ({reason}); --unsafe does without one")
    values = []
    with contextlib.suppress(ValueError, RecursionError):
        values += map(json.loads, lines[:len(calls)])
    return values


# ---- verifiers that run programs

def question(test: str | list) -> tuple:
    """(expression, its right value) of a test: such a pair, or a text `assert expression == value` as in MBPP.

    >>> question("assert add(1, 2) == (3,)")
    ('add(1, 2)', (3,))
    """
    if not isinstance(test, str):
        return tuple(test)
    match ast.parse(test.strip()).body:
        case [ast.Assert(ast.Compare(left, [ast.Eq()], [right]))]:
            return ast.unparse(left), ast.literal_eval(right)
    raise ValueError(f"the test {test!r} is not `assert expression == value`")


def code(response: str, test_list: list, test_setup_code: str = "", lenient: bool = False, **how) -> float:
    """1 if the program in the response (its blocks of code, if it has any) passes all tests; lenient: the share.

    `how`: seconds and unsafe of `sandbox`.
    """
    blocks = regex.findall(r"(?s)```(?:python|py)?[ \t]*\n(.*?)```", response) or [response]
    calls, right = zip(*map(question, test_list))
    values = sandbox("\n".join([test_setup_code, *blocks]), calls, **how)
    passed = sum(value == [plain(wanted)] for value, wanted in zip(values, right)) / len(calls)
    return passed if lenient else float(passed == 1)


def own_verifier(spec: str, seconds: float, unsafe: bool) -> Callable:
    """The verifier of file.py:function, as function(response, **row): in the sandbox, or imported if `unsafe`."""
    path, _, name = spec.rpartition(":")
    require(path.endswith(".py") and name.isidentifier(),
            f"--verifier={spec}: choose from {', '.join(VERIFIERS)}, or name file.py:function")
    if unsafe:
        return runpy.run_path(path)[name]
    program = Path(path).read_text(encoding="utf-8")

    def call(response: str, **row):
        values = sandbox(program, [f"{name}(given[0], **given[1])"], [response, row], seconds)
        require(values, f"no answer within {seconds} s")
        return values[0][0] if isinstance(values[0], list) else values[0]
    return call


VERIFIERS = {
    "exact": exact,
    "gsm8k": word_problem,
    "format": formatted,
    "regex": matched,
    "ifeval": ifeval,
    "code": code,
}


def verify(name: str, responses: Sequence[str], rows: Sequence[dict], lenient: bool = False, unsafe: bool = False,
           seconds: float = 5.0) -> tuple[list[float], list[str]]:
    """Score responses, each with the arguments in its row: scores in [0, 1], and the reasons of those that failed.

    `name` is a key of VERIFIERS or file.py:function. A verifier that raises, hangs or returns no number scores 0.
    ValueError: there is no such verifier, or no sandbox for it.
    """
    ours = name in VERIFIERS
    function = VERIFIERS[name] if ours else own_verifier(name, seconds, unsafe)
    if name == "code" or not ours:
        sandbox("", [], unsafe=unsafe)  # where none can be made, that is no response's failure
    # these come last: no row of the data can switch the sandbox off
    settings = dict(lenient=lenient) if ours else {}
    settings |= dict(seconds=seconds, unsafe=unsafe) if name == "code" else {}
    known = inspect.signature(function).parameters
    reasons = []

    def score(response: str, row: dict) -> float:
        try:
            row = {key: value for key, value in row.items() if key in known or not ours}
            value = function(response, **row | settings)
            require(isinstance(value, (int, float)) and value == value, f"{value!r:.200} is no number")
            return float(min(max(value, 0), 1))
        except Exception as error:  # of any kind, as a row may hold anything
            reasons.append(f"{name}: {type(error).__name__}: {error}")
            return 0.0

    with concurrent.futures.ThreadPoolExecutor(1 if unsafe else os.cpu_count()) as pool:
        return list(pool.map(score, responses, rows)), reasons
