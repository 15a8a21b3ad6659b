"""Tests of align.py's verifiers and sandbox: hostile programs, tricks on the grader, answers that are equal or differ."""
import json
import os
import random
import socket
import subprocess
import sys
import time

import pytest

import align as align


def sandbox_reason():
    try:
        align.sandbox("", [])
        return ""
    except ValueError as error:
        return str(error)


REASON = sandbox_reason()
needs_sandbox = pytest.mark.skipif(bool(REASON), reason=REASON)

# ------------------------------------------------------------------------------------------------- hostile programs

# what is right: nothing that a program in the sandbox could guess or find
SECRETS = [f"{random.Random(n).getrandbits(64):x}" for n in range(3)]
TESTS = [f"assert solve({n}) == {secret!r}" for n, secret in enumerate(SECRETS)]
RIGHT = f"def solve(n):\n    return {SECRETS!r}[n]\n"

# VICTIM: a file of the host; MARKER: a file that must not come to be; PORT: a socket that listens; PID: a process
HARMLESS = {  # these do what they try when they run outside: see the negative twin
    "write outside": "open('MARKER', 'w').write('was here')",
    "append to a file outside": "open('VICTIM', 'a').write('changed')",
    "truncate by os": "import os\nos.truncate('VICTIM', 0)",
    "remove a file outside": "import os\nos.remove('VICTIM')",
    "rename a file outside": "import os\nos.rename('VICTIM', 'MARKER')",
    "chmod outside": "import os\nos.chmod('VICTIM', 0)",
    "hard link": "import os\nos.link('VICTIM', 'MARKER')",
    "symlink outside": "import os\nos.symlink('VICTIM', 'MARKER')",
    "write through a symlink": "import os, tempfile\np = tempfile.mktemp()\nos.symlink('MARKER', p)\n"
                               "open(p, 'w').write('x')",
    "make a folder outside": "import os\nos.mkdir('MARKER')",
    "copy a file": "import shutil\nshutil.copy('VICTIM', 'MARKER')",
    "connect a socket": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)",
    "http": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:PORT/', timeout=0.3)",
    "kill a process of the host": "import os\nos.kill(PID, 9)",
    "stop a process of the host": "import os\nos.kill(PID, 19)",
    "subprocess": "import subprocess\nsubprocess.run('echo x > MARKER', shell=True)",
    "os.system": "import os\nos.system('touch MARKER')",
    "execve": "import os\nos.execve('/bin/sh', ['sh', '-c', 'touch MARKER'], {})",
    "ctypes open": "import ctypes\nctypes.CDLL(None).open(b'MARKER', 0o101, 0o644)",
    "daemon writes later": "import os, time\nif not os.fork():\n    os.setsid()\n    if not os.fork():\n"
                           "        time.sleep(0.2)\n        open('MARKER', 'w').write('x')\n        os._exit(0)",
    "atexit": "import atexit\natexit.register(lambda: open('MARKER', 'w').write('x'))",
}
# the return value of solve is what the attack found, so that a find would score
HOSTILE = HARMLESS | {
    "read a file outside": "text = open('VICTIM').read()\ndef solve(n): return text.split()[n]",
    "walk the disk for the tests": "import os\nfound = [open(os.path.join(f, x)).read() for f, _, xs in os.walk('/tmp') "
                                   "for x in xs]\ndef solve(n): return found[0].split()[n]",
    "fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "thread bomb": "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(99,)).start()",
    "memory bomb": "x = []\nwhile True:\n    x.append(bytearray(1 << 24))",
    "one big allocation": "x = bytearray(1 << 34)",
    "big number": "x = 9 ** 9 ** 9",
    "file bomb": "f = open('big', 'wb')\nwhile True:\n    f.write(bytes(1 << 20))",
    "many files": "n = 0\nwhile True:\n    open(str(n), 'w').write('x' * 9999)\n    n += 1",
    "endless loop": "while True:\n    pass",
    "sleep": "import time\ntime.sleep(99)",
    "ignores signals": "import signal\nfor n in range(1, 32):\n    try:\n        signal.signal(n, signal.SIG_IGN)\n"
                       "    except OSError:\n        pass\nwhile True:\n    pass",
    "thread that never ends": "import threading\ndef f():\n    while True: pass\nthreading.Thread(target=f).start()",
    "daemon that holds the pipe": "import os, time\nif not os.fork():\n    os.setsid()\n    time.sleep(99)",
    "clears its parent's death signal": "import ctypes, os, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\nos.setsid()\n"
                                        "time.sleep(99)",
    "kills its group": "import os\nos.kill(0, 9)",
    "kills everything": "import os\nos.kill(-1, 9)",
    "kills process 1": "import os\nfor n in range(1, 30):\n    os.kill(1, n)",
    "kills its parent": "import os\nos.kill(os.getppid(), 9)",
    "ptrace process 1": "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
                        "assert libc.ptrace(16, 1, 0, 0) == 0, ctypes.get_errno()\ndef solve(n): return 'traced'",
    "exit 0": "import sys\nsys.exit(0)",
    "os._exit 0": "import os\nos._exit(0)",
    "exit in solve": "import os\ndef solve(n): os._exit(0)",
    "SystemExit in solve": "def solve(n): raise SystemExit(0)",
    "patched equality": "class Any:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
                        "def solve(n): return Any()",
    "str subclass": "class Any(str):\n    def __eq__(self, other): return True\n    __hash__ = str.__hash__\n"
                    "def solve(n): return Any('x')",
    "dict subclass": "class Any(dict):\n    def __eq__(self, other): return True\ndef solve(n): return Any(a=1)",
    "NaN": "def solve(n): return float('nan')",
    "infinity": "def solve(n): return float('inf')",
    "overwritten builtins": "import builtins\nbuiltins.all = builtins.any = builtins.isinstance = lambda *a: True\n"
                            "builtins.len = lambda x: 3\ndef solve(n): return True",
    "patched json": "import json\njson.dumps = lambda *a, **k: '[true]'\ndef solve(n): return 1",
    "patched harness": "import sys\nframe = sys._getframe()\nwhile frame.f_back: frame = frame.f_back\n"
                       "frame.f_globals['plain'] = lambda value: True\ndef solve(n): return 1",
    "replaces stdout": "import io, sys\nsys.stdout = sys.stderr = io.StringIO()\nprint('passed')\ndef solve(n): return 1",
    "closes every file": "import os\nos.closerange(0, 99)\ndef solve(n): return 1",
    "forges the answers": "import os\nfor fd in range(32):\n    try:\n        os.write(fd, b'[true]\\n[1]\\n[\"\"]\\n' * 9)\n"
                          "    except OSError: pass\nos._exit(0)",
    "finds the answers in frames": "import sys\ndef solve(n):\n    frame, seen = sys._getframe(), []\n    while frame:\n"
                                   "        seen += [v for v in {**frame.f_globals, **frame.f_locals}.values()]\n"
                                   "        frame = frame.f_back\n    return repr(seen)",
    "finds the answers by gc": "import gc\ndef solve(n): return repr([x for x in gc.get_objects() "
                               "if isinstance(x, (list, dict))])[:9999]",
    "reads the environment": "import os\ndef solve(n): return ' '.join(os.environ.values())",
    "reads the parent's command line": "def solve(n): return open('/proc/1/cmdline').read()",
    "giant output": "def solve(n): return 'x' * (1 << 26)",
    "floods every file": "import os\nwhile True:\n    for fd in range(32):\n        try: os.write(fd, b'x' * 65536)\n"
                         "        except OSError: pass",
    "floods stdout": "while True:\n    print('x' * 65536)",
    "deep JSON": "import os\nfor fd in range(3, 32):\n    try: os.write(fd, b'[' * 60000 + b'\\n')\n"
                 "    except OSError: pass\nos._exit(0)",
    "no JSON": "import os\nfor fd in range(3, 32):\n    try: os.write(fd, b'\\xff\\x00\\n')\n    except OSError: pass",
    "deep list": "def solve(n):\n    x = []\n    for _ in range(99999): x = [x]\n    return x",
    "list in itself": "def solve(n):\n    x = []\n    x.append(x)\n    return x",
    "endless recursion": "def solve(n): return solve(n)",
    "raised recursion limit": "import sys\nsys.setrecursionlimit(10**9)\ndef solve(n): return solve(n)",
    "zip bomb": "import zlib\ndata = zlib.compress(bytes(1 << 26))\nx = [zlib.decompress(data) for _ in range(99)]",
    "pickle": "import pickle\nclass P:\n    def __reduce__(self): return (open, ('MARKER', 'w'))\n"
              "def solve(n): return pickle.dumps(P()).decode('latin1')",
    "segmentation fault": "import ctypes\nctypes.string_at(0)",
    "abort": "import os\nos.abort()",
    "new user namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0\ndef solve(n): return 'root'",
    "mount": "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/tmp', b'proc', 0, None) == 0\n"
             "def solve(n): return open('/tmp' + '/1/cmdline').read()",
    "leaves the chroot": "import os\nos.mkdir('a')\nos.chroot('a')\nfor _ in range(99): os.chdir('..')\nos.chroot('.')\n"
                         "open('MARKER', 'w').write('x')",
    "becomes root": "import os\nos.setuid(0)\ndef solve(n): return 'root'",
    "raises its limits": "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (999, 999))\n"
                         "def solve(n): return 'raised'",
    "changes Python's files": "import os\nopen(os.__file__, 'a').write('#')",
    "changes a kernel setting": "open('/proc/sys/kernel/core_pattern', 'w').write('|/bin/x')",
    "device": "import os\nos.mknod('disk', 0o60666, os.makedev(254, 0))\nopen('disk', 'rb').read(9)",
    "abstract socket": "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0align-test-PORT')",
    "syntax error": "def solve(n) return",
    "null bytes": "\0",
    "empty": "",
}


@pytest.fixture
def host(tmp_path):
    """Things of the host that a program could harm, and a check that they are unharmed."""
    folder = tmp_path / "host"
    folder.mkdir()
    victim, marker = folder / "victim", folder / "marker"
    victim.write_text(" ".join(SECRETS))
    before = victim.stat()
    sleeper = subprocess.Popen(["sleep", "60"])
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        server.setblocking(False)
        port = server.getsockname()[1]
        abstract.bind(f"\0align-test-{port}")
        abstract.listen()
        abstract.setblocking(False)

        def text(program):
            for word, value in (("VICTIM", victim), ("MARKER", marker), ("PORT", port), ("PID", sleeper.pid)):
                program = program.replace(word, str(value))
            return program

        def harm():
            """What happened, in words; "" if nothing did."""
            for waiting in (server, abstract):
                try:
                    waiting.accept()[0].close()
                    return "a connection"
                except BlockingIOError:
                    pass
            if sorted(folder.iterdir()) != [victim]:
                return "files"
            now = victim.stat()
            if now.st_mode != before.st_mode or now.st_nlink != 1 or now.st_mtime_ns != before.st_mtime_ns:
                return "the victim"
            if victim.read_text() != " ".join(SECRETS):
                return "the victim's content"
            with open(f"/proc/{sleeper.pid}/stat") as file:
                return "the process" if file.read().split()[2] in "TZX" else ""
        yield text, harm
        sleeper.kill()
        sleeper.wait()


def left_over():
    """Processes of sandboxes that still live (zombies have no command line)."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                found += [name] if b"def confine(own" in file.read() else []
        except OSError:
            pass
    return found


def wait_for(condition, seconds=3.0):
    """The first true value of condition(), or its last one."""
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return value


@needs_sandbox
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_neither_escapes_nor_scores(name, host):
    text, harm = host
    files = set(os.listdir("/tmp"))
    assert align.code(text(HOSTILE[name]), TESTS, lenient=True, seconds=1.0) == 0
    assert wait_for(lambda: not left_over()), "processes are left"
    if "later" in name:
        time.sleep(0.4)
    assert harm() == ""
    assert "big" not in set(os.listdir("/tmp")) - files


@needs_sandbox
@pytest.mark.parametrize("name", HARMLESS)
def test_twin_the_same_program_outside_does_harm(name, host):
    """Else the test above would pass for a program that does nothing."""
    text, harm = host
    assert harm() == ""
    subprocess.run([sys.executable, "-c", text(HARMLESS[name])], capture_output=True, timeout=10)
    assert wait_for(harm) != ""


@pytest.mark.parametrize("name", ["os._exit 0", "exit 0", "patched equality"])
def test_twin_a_grader_in_the_same_process_is_fooled(name):
    """The usual grader runs program and assertions together and asks for exit code 0."""
    source = "\n".join([HOSTILE[name], *TESTS])
    assert subprocess.run([sys.executable, "-c", source], capture_output=True).returncode == 0


@needs_sandbox
def test_twin_correct_programs_score():
    assert align.code(RIGHT, TESTS) == 1
    assert align.code(f"Here it is:\n```python\n{RIGHT}```\nDone.", TESTS) == 1
    for start, end in (("Python", "```"), ("python3 title=x", "```"), ("python", ""), ("", "```\n```text\n2\n```\nor\n```py\n1\n```"),
                       ("bash\npip install x\n```\nthen\n```py", "```"), ("python\r", "```")):
        assert align.code(f"```{start}\n{RIGHT}{end}", TESTS) == 1, (start, end)
    assert align.code("import os, threading, tempfile, random, re, math, collections\nprint('debug' * 99999)\n"
                      f"open('scratch', 'w').write('x')\n{RIGHT}", TESTS) == 1
    one = RIGHT.replace(SECRETS[0], "wrong")
    assert align.code(one, TESTS) == 0 and align.code(one, TESTS, lenient=True) == pytest.approx(2 / 3)
    assert align.code("def solve(n): return helper(n)", TESTS, RIGHT.replace("solve", "helper")) == 1


@needs_sandbox
def test_what_is_right_is_nowhere_in_the_request(monkeypatch):
    seen = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *words, **more: seen.append(str((words, more))) or run(*words, **more))
    assert align.code("def solve(n): return 1", TESTS) == 0
    assert len(seen) == 1 and "solve(2)" in seen[0] and not any(secret in seen[0] for secret in SECRETS)


@needs_sandbox
def test_inside_there_is_nothing_but_python():
    calls = ["os.getpid() <= 3", "sorted(os.environ)", "os.listdir('.')", "os.path.exists('/proc/self')",
             "os.path.exists('/etc/passwd')", "os.path.exists('/dev')", "os.getgroups()", "socket.if_nameindex()",
             "len([1 for fd in range(64) if valid(fd)])"]
    program = ("import os, socket\ndef valid(fd):\n    try:\n        os.fstat(fd)\n        return True\n"
               "    except OSError:\n        return False\n")
    pid, environment, here, proc, passwd, dev, groups, nets, files = [v[0] for v in align.sandbox(program, calls)]
    assert pid is True and here == ["list"] and (proc, passwd, dev) == (False, False, False)
    assert [n for n in environment[1:] if n != "LC_CTYPE"] == [] and nets == ["list", ["tuple", 1, "lo"]]
    assert files <= 5  # three to /dev/null, the pipe, and /dev/null once more


@needs_sandbox
def test_values_keep_their_types():
    cases = ["(1, [2])", "{1, 2, 3}", "{'a': None, (1, 2): True}", "'naïve 😀'", str(10**30), "-0.5", "[]", "()",
             "{}", "[()]"]
    for text in cases:
        assert align.code("", [f"assert {text} == {text}"]) == 1
        assert align.code("", [f"assert [{text}] == {text}"]) == 0
    assert align.code("", ["assert [1, 2] == (1, 2)"]) == 0 and align.code("", [["1 + 1", 2], ["[1]", [1]]]) == 1
    assert align.code("", ["assert [2, 1] == [1, 2]"]) == 0 and align.code("", ["assert {2, 1} == {1, 2}"]) == 1


@needs_sandbox
def test_without_unshare_it_refuses_unless_told(monkeypatch, tmp_path):
    monkeypatch.setattr(align.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="unshare.*--unsafe"):
        align.verify("code", [RIGHT], [dict(test_list=TESTS)])
    assert align.verify("code", [RIGHT], [dict(test_list=TESTS)], unsafe=True) == ([1.0], [])
    # a row of the data must not switch it off
    with pytest.raises(ValueError, match="unshare"):
        align.verify("code", [RIGHT], [dict(test_list=TESTS, unsafe=True, how=dict(unsafe=True))])
    broken = tmp_path / "unshare"
    broken.write_text("#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(align.shutil, "which", lambda name: str(broken))
    with pytest.raises(ValueError, match="no sandbox can be made here .*not permitted.*--unsafe"):
        align.verify("code", [RIGHT], [dict(test_list=TESTS)])


def test_unsafe_keeps_limits_and_time():
    started = time.monotonic()
    assert align.sandbox("while True: pass", ["1"], seconds=0.5, unsafe=True) == []
    daemon = "import os, time\nif not os.fork():\n    os.setsid()\n    time.sleep(3)"
    assert align.sandbox(daemon, ["1"], seconds=1.0, unsafe=True)[:1] == [[1]]
    assert align.sandbox("x = bytearray(1 << 34)", ["1"], unsafe=True) == ["MemoryError: "]
    assert time.monotonic() - started < 3


def test_tests_that_are_not_understood_are_named():
    for test in ("assert f(1)", "f(1) == 2", "assert f(1) != 2", "assert 1 < f(1) == 2", "x = 1"):
        with pytest.raises(ValueError, match="is not `assert expression == value`"):
            align.question(test)
    assert align.question("assert f((1, 2), {3}) == -1.5") == ("f((1, 2), {3})", -1.5)
    assert align.question("assert set(f(1)) == set((4, 5))") == ("set(f(1))", {4, 5}), "as MBPP writes sets"


# ------------------------------------------------------------------------------------------------- a user's own verifier

OWN = '''
import time
def length(response, most=10, **row): return len(response) / most
def boom(response, **row): raise KeyError("boom")
def hang(response, **row):
    while True: time.sleep(1)
def named(response, answer): return float(response == answer)
def text(response, **row): return "1"
def nan(response, **row): return float("nan")
def write(response, path, **row):
    open(path, "w").write("x")
    return 1
def leave(response, **row):
    import os
    os._exit(0)
'''


@needs_sandbox
def test_own_verifier(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    rows = [dict(most=4), dict(most=4), dict(most=4, other=[1])]
    for unsafe in (False, True):
        assert align.verify(f"{file}:length", ["", "ab", "abcdefgh"], rows, unsafe=unsafe) == ([0.0, 0.5, 1.0], [])
        whole = [dict(prompt="6+8", answer="14", history=[])] * 2  # of a row of data it gets what it names
        assert align.verify(f"{file}:named", ["14", "15"], whole, unsafe=unsafe) == ([1.0, 0.0], [])
    for name, reason in dict(boom="boom", hang="no answer", text="no number", nan="no number", leave="no answer",
                             missing="NameError").items():
        scores, reasons = align.verify(f"{file}:{name}", ["a"], [{}], seconds=0.7)
        assert scores == [0.0] and len(reasons) == 1 and reason in reasons[0], (name, reasons)
    marker = tmp_path / "marker"
    assert align.verify(f"{file}:write", ["a"], [dict(path=str(marker))])[0] == [0.0] and not marker.exists()
    assert align.verify(f"{file}:write", ["a"], [dict(path=str(marker))], unsafe=True)[0] == [1.0] and marker.exists()


def test_own_verifier_that_is_not_there(tmp_path):
    for spec in ("exakt", "file.py", "file.py:a b", "file.py:f()", "file.txt:f"):
        with pytest.raises(ValueError, match="choose from exact"):
            align.verify(spec, [], [])
    with pytest.raises(OSError, match="nowhere.py"):
        align.verify("nowhere.py:f", ["a"], [{}])
    file = tmp_path / "own.py"
    file.write_text("there = 1\n")
    for name in ("there", "f"):
        with pytest.raises(ValueError, match=f"own.py:{name}: the file has no such function"):
            align.verify(f"{file}:{name}", [], [], unsafe=True)


def test_own_verifier_that_is_no_text(tmp_path):
    file = tmp_path / "own.py"
    file.write_bytes(b"\x80\x00")
    with pytest.raises(ValueError, match="own.py is no text"):
        align.verify(f"{file}:f", ["a"], [{}])


@needs_sandbox
def test_many_are_scored_in_order():
    programs = [RIGHT if n % 3 else "def solve(n): return n" for n in range(12)]
    scores, reasons = align.verify("code", programs, [dict(test_list=TESTS, prompt="?")] * 12)
    assert scores == [float(n % 3 > 0) for n in range(12)] and reasons == []
    scores, reasons = align.verify("code", ["", ""], [dict(test_list=["assert 1"]), dict()])
    assert scores == [0.0, 0.0] and len(reasons) == 2


# ---------------------------------------------------------------------------------------------------------- answers

EQUAL = [  # in both directions
    ("42", "42"), ("42", " 42. "), ("42", "42.0"), ("42", "+42"), ("1,234", "1234"), ("1,234,567.50", "1234567.5"),
    ("$1,200", "1200"), ("$5", "5 dollars"), ("\\$5", "$5.00"), ("1{,}000", "1000"), ("0.5", ".5"), ("0.5", "1/2"),
    ("1/2", "2/4"), ("\\frac{1}{2}", "0.5"), ("\\dfrac{3}{4}", "3/4"), ("\\tfrac34", "0.75"), ("\\frac12", "1/2"),
    ("-\\frac{1}{2}", "-0.5"), ("1\\frac{1}{2}", "1.5"), ("1 1/2", "3/2"), ("-1 1/2", "-1.5"), ("50%", "0.5"),
    ("50%", "50"), ("50\\%", "50 %"), ("12.5%", "1/8"), ("\\boxed{7}", "7"), ("$\\boxed{\\frac{1}{3}}$", "1/3"),
    ("\\text{Paris}", "paris"), ("5\\text{ cm}", "5 cm"), ("5 cm", "5"), ("5 apples", "5 apple"), ("$42$", "42"),
    ("\\(42\\)", "42"), ("\\[42\\]", "42"), ("**42**", "42"), ("x = 5", "5"), ("90^\\circ", "90 degrees"),
    ("90°", "90^{\\circ}"), ("3 \\times 10^2", "300"), ("1.5\\cdot10^{-2}", "0.015"), ("2e3", "2000"), ("−7", "-7"),
    ("- 7", "-7"), ("( 1, 2 )", "(1,2)"), ("\\left(1,2\\right)", "(1, 2)"), ("x^2 + 1", "x^2+1"), ("Yes", "yes."),
    ("0", "-0"), ("007", "7"), ("10/5", "2"), ("\\mathrm{B}", "B"), ("12 km/h", "12 km/h"), ("", " "), ("€", "€"),
    ("x^{2}", "x^2"), ("2\\sqrt{3}", "2\\sqrt3"), ("\\sqrt 2", "\\sqrt{2}"), ("\\frac{\\sqrt{2}}{2}", "\\frac{\\sqrt2}{2}"), ("5\\text{ cm}^{2}", "5"),
]
DIFFERENT = [
    ("42", "43"), ("42", "-42"), ("1,23", "123"), ("1,2345", "12345"), ("1.234", "1234"), ("1/2", "1/3"), ("1/2", "12"),
    ("50%", "0.05"), ("50%", "5000"), ("0.5%", "0.5 cm"), ("5%", "0.5"), ("5 cm", "5 m"), ("5 apples", "5 pears"),
    ("$5", "5 cents"), ("1 1/2", "11/2"), ("1 1/2", "1"), ("\\frac{1}{2}", "\\frac{2}{1}"), ("1e3", "13"),
    ("3 \\times 10^2", "3"), ("3", "three"), ("", "0"), ("4 5", "45"), ("1/0", "0"), ("now here", "nowhere"),
    ("(1,2)", "(2,1)"), ("(1,2)", "12"), ("x^2", "x2"), ("x^{12}", "x^12"), ("nan", "0"), ("inf", "0"), ("0x10", "16"), ("1_000", "1000"),
    ("1 or 2", "1"), ("42", "42 43"), ("Paris", "London"), ("1e999999999", "1"), ("9" * 300, "9" * 301), ("0.1", "0.10001"),
]


@pytest.mark.parametrize("a,b", EQUAL)
def test_equal(a, b):
    assert align.same(a, b) and align.same(b, a)


@pytest.mark.parametrize("a,b", DIFFERENT)
def test_different(a, b):
    assert not align.same(a, b) and not align.same(b, a)


def test_tolerance_is_relative():
    assert align.same("101", "100", 0.01) and not align.same("101.1", "100", 0.01)
    assert align.exact("3.1416", "3.14159", 1e-5) == 1 and align.exact("3.15", "3.14159", 1e-5) == 0


def test_final_answers_strict_and_lenient():
    cases = [  # response, strict, lenient; the right answer is 12
        ("12", 1, 1), ("So 5 + 7 = 12\n#### 12", 1, 1), ("The answer is 12.", 1, 1), ("Final answer: **12**", 1, 1),
        ("The answer is: $12$\nHope it helps with your 3 cats", 1, 1), ("We get \\boxed{12}. Not 13.", 1, 1),
        ("\\boxed{13}, no: \\boxed{12}", 1, 1), ("\\boxed{\\text{12 cm}}", 1, 1), ("#### 12\n\n", 1, 1),
        ("5 and 7 make 12", 0, 1), ("5 + 7 = 12, I think.", 0, 1), ("12 is what 5 and 7 make", 0, 0),
        ("#### 13\n12", 0, 1), ("\\boxed{13}", 0, 0), ("12\n#### 13", 0, 0), ("", 0, 0), ("####", 0, 0),
        ("**Answer**: 12", 1, 1), ("The **answer** is 12.", 1, 1), ("The answer is 12 or 13", 0, 0), ("\\boxed{12", 0, 1), ("twelve", 0, 0), ("#### 12 #### 13", 0, 0),
    ]
    for response, strict, lenient in cases:
        assert align.exact(response, "12") == strict, response
        assert align.exact(response, "12", lenient=True) == lenient, response


def test_gsm8k_strict_and_lenient():
    right = "He has 3*6=18\n#### 1,018"
    for response, strict, lenient in [("so\n#### 1018", 1, 1), ("#### 1,018", 1, 1), ("#### $1,018", 1, 1), ("1018", 0, 1),
                                      ("#### 1018 #### 1019", 0, 0), ("#### 1018\n1019", 1, 1), ("#### 1019", 0, 0),
                                      ("", 0, 0), ("####", 0, 0), ("#### 10181", 0, 0), ("#### -1018", 0, 0)]:
        assert align.word_problem(response, right) == strict, response
        assert align.word_problem(response, right, lenient=True) == lenient, response


def test_all_gsm8k_references_are_right_and_perturbed_ones_wrong(test_data):
    rows = [json.loads(line) for path in sorted(test_data.rglob("*gsm8k*.jsonl")) for line in path.open()]
    assert len(rows) > 100
    for lenient in (False, True):
        scores, reasons = align.verify("gsm8k", [row["answer"] for row in rows], rows, lenient)
        assert set(scores) == {1.0} and reasons == []
    drawn = random.Random(0)
    chosen, wrong = [drawn.choice(rows) for _ in range(1000)], []
    for row in chosen:
        head, gold = row["answer"].split("#### ")
        value = int(gold.replace(",", ""))
        other = drawn.choice([value + 1, value - 1, value * 10, value * 10 + drawn.randrange(1, 9), -value or 1,
                              value + drawn.randrange(2, 99), f"{value}.5", f"{value}/7" if value else 3,
                              f"1{value}" if value >= 0 else 1])
        other = other if str(other) not in ("0", "-0") or value else 5
        wrong.append(f"{head}#### {other}")
    for lenient in (False, True):
        scores, reasons = align.verify("gsm8k", wrong, chosen, lenient)
        assert set(scores) == {0.0} and reasons == [], [w for w, s in zip(wrong, scores) if s][:3]


def test_format():
    for response, strict, lenient in [("3 + 4 = 7\n#### 7", 1, 1), ("a\nb\n#### 7\n", 1, 1), ("#### 7", 0, 0),
                                      ("a #### 7\nmore", 0, 1), ("a\n####", 0, 0), ("a\n####\n7", 0, 0), ("", 0, 0),
                                      ("a #### 7 #### 8", 0, 1), ("7", 0, 0)]:
        assert align.formatted(response) == strict, response
        assert align.formatted(response, lenient=True) == lenient, response
    assert align.formatted("think\n=> 7", mark="=>") == 1 and align.formatted("think\n#### 7", mark="=>") == 0
    assert align.formatted("a.b 7", mark=".") == 1 and align.formatted("axb 7", mark=".") == 0


def test_regex_and_its_time():
    assert align.matched("abc", "a.c") == 1 and align.matched("xabc", "a.c") == 0
    assert align.matched("xabc", "a.c", lenient=True) == 1 and align.matched("", "a") == 0
    scores, reasons = align.verify("regex", ["a" * 40 + "b", "aa", "x"],
                                   [dict(pattern="(a|aa)+$"), dict(pattern="a+"), dict(pattern="(")])
    assert scores == [0.0, 1.0, 0.0] and len(reasons) == 2
    assert any("TimeoutError" in reason for reason in reasons) and any("missing )" in reason for reason in reasons)


# ------------------------------------------------------------------------------------------------------ instructions

LEAST, LESS = "at least", "less than"
IFEVAL = [  # kind, kwargs, texts that follow, texts that do not
    ("keywords:existence", dict(keywords=["cat", "dog"]), ["A Cat and dogs", "dogcat"], ["a cat", "", "c.a.t dog"]),
    ("keywords:frequency", dict(keyword="ab", frequency=2, relation=LEAST), ["ab AB", "abab c"], ["ab", "a b a b"]),
    ("keywords:frequency", dict(keyword="a.", frequency=2, relation=LESS), ["ab ac a.", "x"], ["a. a."]),
    ("keywords:forbidden_words", dict(forbidden_words=["bad", "evil"]), ["badly medieval", "x"], ["Bad", "an EVIL x"]),
    ("keywords:letter_frequency", dict(letter="e", let_frequency=3, let_relation=LEAST), ["eEe", "tree e"], ["ee"]),
    ("keywords:letter_frequency", dict(letter="!", let_frequency=2, let_relation=LESS), ["a!"], ["!!"]),
    ("length_constraints:number_words", dict(num_words=3, relation=LEAST), ["a b c", "a, b-c"], ["a b", "..."]),
    ("length_constraints:number_words", dict(num_words=3, relation=LESS), ["a b"], ["a b c"]),
    ("length_constraints:number_sentences", dict(num_sentences=2, relation=LEAST), ["One. Two", "A? B!", "a... b"],
     ["One", "3.14 is a number", "Wait..."]),
    ("length_constraints:number_sentences", dict(num_sentences=2, relation=LESS), ["One.", "v1.2 works"], ["A. B."]),
    ("length_constraints:number_paragraphs", dict(num_paragraphs=2), ["a\n***\nb", "a *** b\n***"],
     ["a", "a\n\nb", "a***b***c"]),
    ("detectable_content:number_placeholders", dict(num_placeholders=2), ["[a] [b]", "[a][b][c]"], ["[a]", "(a) (b)"]),
    ("detectable_content:postscript", dict(postscript_marker="P.S."), ["x\nP.S. y", "p.s. y"], ["x", "PS y", "pxsx y"]),
    ("detectable_format:number_bullet_lists", dict(num_bullets=2), ["* a\n* b", "- a\n  - b\ntext"],
     ["* a", "* a\n* b\n* c", "a * b\nc - d", "** a\n** b"]),
    ("detectable_format:number_highlighted_sections", dict(num_highlights=2), ["*a* and *b c*", "**a** *b*"],
     ["*a*", "**a**", "* a\n* b", "a * * b"]),
    ("detectable_format:multiple_sections", dict(section_spliter="Section", num_sections=2),
     ["Section 1\na\nSection 2\nb", "Section1 Section 2"], ["Section 1", "Section A Section B", "section 1 section 2"]),
    ("detectable_format:constrained_response", {}, ["My answer is yes.", "Well: My answer is maybe."],
     ["yes", "My answer is perhaps."]),
    ("detectable_format:title", {}, ["<<A title>>\ntext"], ["<A title>", "<<>>", "<< >>", "<<a\nb>>"]),
    ("detectable_format:json_format", {}, ['{"a": 1}', '```json\n[1]\n```', "```\n{}```", "3"], ["{a: 1}", "x", "[" * 9999]),
    ("combination:two_responses", {}, ["a\n******\nb"], ["a", "a******a", "a******", "******b", "a******b******c"]),
    ("combination:repeat_prompt", dict(prompt_to_repeat="Say (it)?"), ["Say (it)? Yes", " say (IT)?\nno"],
     ["Yes. Say (it)?", "Say it Yes"]),
    ("startend:end_checker", dict(end_phrase="The end."), ["x The end.", 'x the END."\n'], ["The end. x", "the end"]),
    ("startend:quotation", {}, ['"a"', ' "a\nb" '], ['"a', 'a"', "'a'", '"']),
    ("change_case:capital_word_frequency", dict(capital_frequency=2, capital_relation=LEAST), ["GPT and I", "A-B c"],
     ["Gpt I", "McD AB", "12 34"]),
    ("change_case:capital_word_frequency", dict(capital_frequency=2, capital_relation=LESS), ["One TWO"], ["ONE TWO"]),
    ("change_case:english_capital", {}, ["ALL 9!", "ÄB"], ["All", "9!", "ALL ä"]),
    ("change_case:english_lowercase", {}, ["all 9!"], ["All", "9!", "all Ä"]),
    ("punctuation:no_comma", {}, ["a b"], ["a, b", ","]),
]


@pytest.mark.parametrize("kind,kwargs,good,bad", IFEVAL, ids=[f"{row[0]} {n}" for n, row in enumerate(IFEVAL)])
def test_instruction(kind, kwargs, good, bad):
    full = dict(dict.fromkeys(["num_words", "keywords", "relation", "letter"]), **kwargs)  # public files fill with null
    for arguments in (kwargs, full):
        for text in good:
            assert align.ifeval(text, [kind], [arguments]) == 1, text
        for text in bad:
            assert align.ifeval(text, [kind], [arguments]) == 0, text


def test_every_kind_is_tested():
    assert {row[0] for row in IFEVAL} == set(align.IFEVAL) and len(align.IFEVAL) >= 15


def test_loose_forgives_an_introduction_a_closing_line_and_asterisks():
    cases = [  # response, kind, kwargs, strict, loose
        ("Sure, here it is:\nno comma", "punctuation:no_comma", {}, 0, 1),
        ("no comma\nSo, that is it", "punctuation:no_comma", {}, 0, 1),
        ("Sure, here:\nno comma\nSo, done", "punctuation:no_comma", {}, 0, 1),
        ("a, b\nc, d\ne, f\ng, h", "punctuation:no_comma", {}, 0, 0),
        ("**The end.**", "startend:end_checker", dict(end_phrase="The end."), 0, 1),
        ('Here:\n"quoted"', "startend:quotation", {}, 0, 1),
        ("a, b", "punctuation:no_comma", {}, 0, 0),  # what is left after the first line is empty, and does not count
        ("", "punctuation:no_comma", {}, 0, 0), (" \n ", "punctuation:no_comma", {}, 0, 0),
    ]
    for response, kind, kwargs, strict, loose in cases:
        assert align.ifeval(response, [kind], [kwargs]) == strict, response
        assert align.ifeval(response, [kind], [kwargs], lenient=True) == loose, response


def test_share_of_instructions():
    kinds = ["punctuation:no_comma", "change_case:english_lowercase"]
    assert align.ifeval("a, b", kinds, [{}, {}]) == 0.5
    scores, reasons = align.verify("ifeval", ["x"] * 3, [
        dict(prompt="p", key=1, instruction_id_list=["language:response_language"], kwargs=[dict(language="de")]),
        dict(instruction_id_list=kinds, kwargs=[{}, {}]), dict(instruction_id_list=kinds, kwargs=[{}])])
    assert scores == [0.0, 1.0, 0.0] and len(reasons) == 2 and "none of keywords:existence" in reasons[0]


def test_a_verifier_that_raises_scores_0_and_is_reported():
    scores, reasons = align.verify("exact", ["1", "1", "2"], [dict(answer="1"), {}, dict(answer=7)])
    assert scores == [1.0, 0.0, 0.0] and len(reasons) == 2 and "'answer'" in reasons[0]
