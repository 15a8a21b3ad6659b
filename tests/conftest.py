"""Fixtures that all test files share. Tests write only below tmp_path."""
import atexit
import contextlib
import functools
import importlib
import inspect
import os
import re
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")):
    # no GPU: Triton interprets, its own functions too, which asks to be told before anybody imports it
    os.environ["TRITON_INTERPRET"] = "1"

# A shell lets what it starts in the background ignore Ctrl-C, which the processes of tests would inherit.
with contextlib.suppress(ValueError):  # not the main thread
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

# Each script's options() asks for the source of its dataclass, for which inspect parses the whole file: here once a class.
inspect.getsource = functools.cache(inspect.getsource)


def pytest_collection_modifyitems(items):
    """Skip the tests marked gpu where there is no CUDA device (torch is asked only if such a test was collected)."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch
        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def as_before():
    """What a script's main changes for its whole process is put back: handlers of signals, torch's threads and default type."""
    torch, numbers = sys.modules.get("torch"), (signal.SIGINT, signal.SIGTERM)
    handlers, threads = [signal.getsignal(number) for number in numbers], torch and torch.get_num_threads()
    yield
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)
    if torch:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def test_data():
    """The folder of real files that the environment variable TEST_DATA names (relative to the repository's root)."""
    if not os.environ.get("TEST_DATA"):
        pytest.skip("TEST_DATA is not set")
    folder = (ROOT / os.environ["TEST_DATA"]).resolve()
    assert folder.is_dir(), f"TEST_DATA names no folder: {folder}"
    return folder


@pytest.fixture(scope="session")
def run_script():
    """A function that runs a script with this interpreter and returns the CompletedProcess (text; nothing is checked).

    run_script("data.py", "--workers=1", cwd=tmp_path): `root` is the folder of the script, `python` holds flags of the
    interpreter, `env` adds variables. One thread: the models of tests are tiny, and the cores may be shared.
    """
    def run(name, *words, cwd, root=ROOT, python=(), env=(), timeout=120):
        return subprocess.run([sys.executable, *python, str(Path(root) / name), *map(str, words)], cwd=cwd, text=True,
                              encoding="utf-8", errors="replace", capture_output=True, timeout=timeout,
                              stdin=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1", **dict(env)})
    return run


GLOO = re.compile(r"^\[Gloo\].*\n", re.M)  # what torch 2.9 lets it say on stdout


@pytest.fixture(scope="session")
def server():
    """What forks a process that has torch already and runs a script in it."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("it asks Linux about processes and memory")
    import faults  # after TRITON_INTERPRET is set
    server = faults.Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def run_forked(server):
    """A function that runs a script in processes that have torch already, side by side: what became of each.

    run_forked("train.py", "--max_iters=2", cwd=tmp_path, each=[dict(environ=dict(RANK="0")), dict(environ=dict(RANK="1"))]):
    a process for each dict of what is different in it (see faults.Server).
    """
    def run(name, *words, cwd, root=ROOT, each=({},), limit=200):
        jobs = [dict(script=str(Path(root) / name), words=[*map(str, words)], cwd=str(cwd), limit=limit, idle=60) | own for own in each]
        found = server.run(*jobs)
        return [SimpleNamespace(returncode=job["code"], stdout=GLOO.sub("", job["out"]), stderr=job["err"]) for job in found]
    return run


def ranks(n):
    """For run_forked: n processes with the variables that torchrun would set."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(n))
    return [dict(environ=address | dict(RANK=str(rank), LOCAL_RANK=str(rank))) for rank in range(n)]


@pytest.fixture
def run_ranks(run_forked):
    """A function that runs a script on n ranks, as torchrun would: what became of the first, which alone prints."""
    def run(n, name, *words, cwd):
        first, *others = run_forked(name, *words, cwd=cwd, each=ranks(n))
        assert [(one.returncode, one.stdout) for one in others] == [(first.returncode, "")] * (n - 1), (first, *others)
        return first
    return run


@pytest.fixture
def run_main(monkeypatch, capsys):
    """As run_script, but main runs in this process, which need not import torch anew: for what a command does and says.

    How a process of each script starts and ends is tested in test_repo.py.
    """
    def run(name, *words, cwd):
        module, code = importlib.import_module(name.removesuffix(".py")), 0
        capsys.readouterr()
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as seen:
            patch.chdir(cwd)
            patch.setattr(sys, "argv", [name, *map(str, words)])
            patch.setattr(sys, "addaudithook", lambda hook: None)  # which nothing takes away again
            patch.setitem(sys.modules, "__main__", module)  # its docstring is the help
            try:
                module.run(module.main)
            except SystemExit as end:
                code = end.code or 0
        out, err = capsys.readouterr()
        err += "".join(f"{w.message}\n" for w in seen if issubclass(w.category, (UserWarning, RuntimeWarning)))
        code, err = (1, f"{err}{code}\n") if isinstance(code, str) else (code, err)
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)
    return run


@pytest.fixture(scope="module")
def one_thread():
    """Tiny tensors are slower on two threads."""
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


ACCOUNTS = {}


@pytest.fixture
def accounts_once(monkeypatch):
    """model.account looks up what it was asked before: a fifth of a second each, and most tests ask for the same."""
    import torch

    import model

    def account(config, batch, optimizer="muon", usual=model.account):
        key = (*vars(config).items(), batch, optimizer, torch.get_default_dtype())
        ACCOUNTS[key] = ACCOUNTS.get(key) or usual(config, batch, optimizer)
        return ACCOUNTS[key]
    monkeypatch.setattr(model, "account", account)


@pytest.fixture
def world_of_one(monkeypatch):
    """A function that sets torchrun's variables for one process, this one; the group that then begins ends with the test."""
    import torch.distributed as dist

    def begin():
        for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=0).items():
            monkeypatch.setenv(name, str(value))
    yield begin
    atexit.unregister(dist.destroy_process_group)
    if dist.is_initialized():
        dist.destroy_process_group()


def tiny_documents(count=60):
    """`count` different short documents, each a few lines of words, numbers and letters beyond ASCII."""
    words = "the model reads a token and writes the next one naïve café 東京 über, again; (so it learns) — 3.14 😀".split()
    return ["".join(f"{words[(i * 7 + j * j) % len(words)]}{' ' if j % 9 else chr(10)}" for j in range(40 + i % 11))
            + f"\ndocument {i}\n" for i in range(count)]


@pytest.fixture
def documents():
    """60 different short documents as a list of str."""
    return tiny_documents()


@pytest.fixture
def corpus(tmp_path, documents):
    """The path of a file that holds the tiny documents, each ended by <|endoftext|>."""
    path = tmp_path / "corpus.txt"
    path.write_bytes("".join(text + "<|endoftext|>" for text in documents).encode())
    return path
