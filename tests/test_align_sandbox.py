"""Tests of align.py's verifiers and sandbox: hostile programs, tricks on the grader, answers that are equal or differ."""
import json
import os
import random
import socket
import subprocess
import sys
import time

import pytest

import align_verify as align


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
             "def solve(n): return open('/tmp/1/cmdline').read()",
    "leaves the chroot": "import os\nos.mkdir('a')\nos.chroot('a')\nfor _ in range(99): os.chdir('..')\nos.chroot('.')\n"
                         "open('MARKER', 'w').write('x')",
    "becomes root": "import os\nos.setuid(0)\ndef solve(n): return 'root'",
    "raises its limits": "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (999, 999))\n"
                         "def solve(n): return 'raised'",
    "changes Python's files": "import os\nopen(os.__file__, 'a').write('#')",
    "changes a kernel setting": "open('/proc/sys/kernel/core_pattern', 'w').write('|/tmp/x')",
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
            same = victim.read_text() == " ".join(SECRETS) and now.st_mtime_ns == before.st_mtime_ns
            if not same or now.st_mode != before.st_mode or now.st_nlink != 1:
                return "the victim's content"
            with open(f"/proc/{sleeper.pid}/stat") as file:
                return "" if file.read().split()[2] == "S" else "the process"
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
    cases = ["(1, [2])", "{1, 2, 3}", "{'a': None, (1, 2): True}", "'naïve 😀'", "10**30", "-0.5", "[]", "()", "{}", "[()]"]
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


# ------------------------------------------------------------------------------------------------- a user's own verifier

OWN = '''
import time
def length(response, most=10, **row): return len(response) / most
def boom(response, **row): raise KeyError("boom")
def hang(response, **row):
    while True: time.sleep(1)
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


@needs_sandbox
def test_many_are_scored_in_order():
    programs = [RIGHT if n % 3 else "def solve(n): return n" for n in range(12)]
    scores, reasons = align.verify("code", programs, [dict(test_list=TESTS, prompt="?")] * 12)
    assert scores == [float(n % 3 > 0) for n in range(12)] and reasons == []
    scores, reasons = align.verify("code", ["", ""], [dict(test_list=["assert 1"]), dict()])
    assert scores == [0.0, 0.0] and len(reasons) == 2
