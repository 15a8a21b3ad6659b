"""A sweep of faults over all scripts: whatever is thrown at one, it ends in a line that says why, and loses nothing.

Usage: python tests/faults.py --rounds=50 --seed=0
       python tests/faults.py --only=train,spoil  (scripts and classes of faults)
       python tests/faults.py --seed=0 --repeat=train/spoil/2/17  (one case again, with all that it said)

The table RUNS has tiny runs of each script, the files that they read, and those that they write. The table FAULTS has
what can go wrong with a run. A case is a pure function of (seed, script/class/run/number). It takes place in a folder of
its own, which holds the files of earlier runs, and must leave:

- no process, no temporary file (unless it was killed), no traceback, no exit by a signal of its own making;
- exit code 0, or 1 or 2 with one line on stderr that begins with the script's name; 130 and nothing after Ctrl-C;
- each file that stood there as it was, or moved, or rewritten whole;
- after a kill a folder in which the same command, once more, succeeds.

Importing torch takes seconds, so a server process imports it once, and forks a child for each case: the child gets its
own folder, limits, argv, stdin, stdout and stderr, and then runs the text of the script as `__main__`.
"""
import argparse
import ast
import atexit
import contextlib
import gc
import gzip
import hashlib
import importlib
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
LIMIT, IDLE = 60.0, 12.0  # seconds after which a run hangs: in all, and without having used a processor
GUARD = 4 << 30  # bytes that a run may take on top of what the server has, so that a mistake does not stop the machine


# ------------------------------------------------------------------------------------------------ the server, in its own process

CODE = {}  # path -> compiled script


def serve() -> None:
    """Answer requests, each a JSON list of runs that begin together, on stdin; in a child this function returns the one
    to do. The process ends at the end of stdin.
    """
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    for name in ("numpy", "regex", "torch", "multiprocessing.spawn", "multiprocessing.synchronize", "multiprocessing.queues",
                 "multiprocessing.popen_fork", "encodings.utf_16_le", "encodings.latin_1", "encodings.idna", "encodings.ascii", "encodings.cp437", "concurrent.futures.process", "http.server",
                 "urllib.request", "torch.multiprocessing", "lzma", "csv"):
        importlib.import_module(name)
    sys.path[0] = str(ROOT)
    for name in ("bpe", "data", "model", "sample", "train", "ddp"):  # kernels.py imports triton
        importlib.import_module(name)
    sys.modules["model"].account(sys.modules["model"].Config(), 1)  # on fake tensors, for which torch imports much more
    gc.freeze()
    for line in requests:
        jobs, children = json.loads(line), {}
        for i, job in enumerate(jobs):
            program = CODE.get(job["script"]) or compile(Path(job["script"]).read_bytes(), job["script"], "exec")
            CODE[job["script"]] = program
            pid = os.fork()
            if pid == 0:
                requests.close()
                answers.close()
                become(job)
                return job
            children[pid] = i
        with contextlib.suppress(BrokenPipeError):  # who asked is gone, and stdin has an end
            answers.write(json.dumps(watch(jobs, children)).encode() + b"\n")
            answers.flush()
    os._exit(0)  # without taking torch down, which has words about it


def become(job: dict) -> None:
    """Give this child process the place, the limits and the streams of a job."""
    import resource
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
    os.chdir(job["cwd"])
    if size := job.get("file_size"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if os.path.exists("/proc/self/statm") else 0
    most = pages * os.sysconf("SC_PAGE_SIZE") + (job.get("memory") or GUARD)
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for number, name in ((0, job.get("stdin") or os.devnull), (1, job["stdout"]), (2, job["stderr"])):
        file = os.open(name, os.O_RDWR | os.O_CREAT if number else os.O_RDONLY, 0o666)
        os.dup2(file, number)
        os.close(file)
    if job.get("nobody") and os.getuid() == 0:  # whom file modes hold back
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    for name in job.get("without", ()):
        sys.modules[name] = None
    if job.get("offline"):
        def refuse(self, address):
            raise OSError(101, "Network is unreachable")
        socket.socket.connect = refuse
    os.environ.update(job.get("environ", {}))
    sys.argv = [job["script"], *job["words"]]
    sys.path[0] = str(Path(job["script"]).parent)


def play(path: str) -> None:
    """Run a script as Python does, and end the process as Python ends, but for tearing down modules, which takes longer
    than a tiny run.
    """
    module, code = type(sys)("__main__"), 0
    module.__file__ = path
    sys.modules["__main__"] = module
    try:
        exec(CODE[path], vars(module))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        print("Exception ignored at exit", file=sys.stderr)
        traceback.print_exc()
        code = 120
    sys.stderr.flush()
    os._exit(code)


def watch(jobs: list[dict], children: dict[int, int]) -> list[dict]:
    """Wait for the children, send their signals, end those that hang; what became of each."""
    began, found, ended = time.monotonic(), [{} for _ in jobs], set()
    signals = {pid: [tuple(pair) for pair in jobs[i].get("signals", ())] for pid, i in children.items()}
    worked, spent, look = dict.fromkeys(children, began), dict.fromkeys(children, -1.0), began
    while len(ended) < len(children):
        now = time.monotonic()
        seconds = now - began
        for pid in set(children) - ended:
            job, state = jobs[children[pid]], found[children[pid]]
            done, status, used = os.wait4(pid, os.WNOHANG)
            if done:
                ended.add(pid)
                state.update(code=os.waitstatus_to_exitcode(status), seconds=seconds, cpu=used.ru_utime + used.ru_stime)
                state["left"] = still_there(pid, job.get("patience", 8.0))
                continue
            while signals[pid] and seconds > signals[pid][0][0]:
                number = signals[pid].pop(0)[1]
                state["sent"] = number
                with contextlib.suppress(ProcessLookupError):
                    (os.killpg if number == signal.SIGINT else os.kill)(pid, number)  # a terminal tells the whole group
            if now > look:
                states, ticks = members(pid)
                if ticks > spent[pid] or "R" in states or "D" in states:
                    worked[pid], spent[pid] = now, ticks
                if now - worked[pid] > job.get("idle", IDLE):
                    state["hung"] = True
                    os.killpg(pid, signal.SIGKILL)
            if seconds > job.get("limit", LIMIT) and "long" not in state:
                state["long"] = True
                os.killpg(pid, signal.SIGINT)
            if seconds > job.get("limit", LIMIT) + 20 and "hung" not in state:
                state["hung"] = True
                os.killpg(pid, signal.SIGKILL)
        look = now + 0.5 if now > look else look
        time.sleep(0.002)
    return found


def members(group: int) -> tuple[set[str], int]:
    """States of the processes of a group, and the ticks that they have worked."""
    states, ticks = set(), 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            row = path.read_text().rpartition(")")[2].split()
            if int(row[2]) == group:
                states.add(row[0])
                ticks += int(row[11]) + int(row[12])
    return states, ticks


def still_there(group: int, patience: float) -> bool:
    """Whether processes of a group go on after their first one ended; they are killed then."""
    began = time.monotonic()
    while time.monotonic() - began < patience:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        if members(group)[0] <= {"Z", "X"}:  # their new parent has yet to bury them
            return False
        time.sleep(0.01)
    os.killpg(group, signal.SIGKILL)
    return True


class Server:
    """The process that runs scripts; `python` is its interpreter."""

    def __init__(self, python: str = sys.executable):
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
        self.process = subprocess.Popen([python, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        env=environ, start_new_session=True)

    def run(self, *jobs: dict) -> list[dict]:
        """Run jobs side by side: each gets code, seconds, out, err, and whether it hung or left processes."""
        for i, job in enumerate(jobs):
            base = f"{job['cwd']}.{i}"
            job.setdefault("stdout", f"{base}.out")
            job.setdefault("stderr", f"{base}.err")
            for name in ("stdout", "stderr"):
                if not job[name].startswith("/dev/"):
                    Path(job[name]).unlink(missing_ok=True)
        self.process.stdin.write(json.dumps(jobs).encode() + b"\n")
        self.process.stdin.flush()
        found = json.loads(self.process.stdout.readline())
        for job, state in zip(jobs, found):
            for key, name in (("out", "stdout"), ("err", "stderr")):
                path = Path(job[name])
                state[key] = path.read_text(errors="replace") if path.is_file() else ""
        return found

    def close(self) -> None:
        """End the server."""
        self.process.stdin.close()
        self.process.wait()


# ------------------------------------------------------------------------------------------------ what is run

SHAPE = "--n_layer=1 --n_head=2 --n_embd=16 --block_size=64 --batch_size=4 --eval_interval=2 --ngram=2 --ngram_rows=64 --device=cpu"
ALIGN = "--max_iters=2 --batch_size=4 --max_new_tokens=4 --group=2 --eval_rows=4 --eval_interval=1 --device=cpu"
FILTERS = "extract,length,language,gopher,pii,urls,exact,lines,dedup,tokenise"


class Tiny(NamedTuple):
    """A tiny run: its words, and the files that it reads (of which each is spoiled)."""

    words: str
    reads: str = ""
    stdin: str = ""
    lacks: str = ""  # what it fails for undisturbed, a word of its line: then it need not succeed


RUNS = {
    "bpe": [
        Tiny("--input=corpus.txt --vocab_size=300 --output=new.json --workers=1", "corpus.txt"),
        Tiny("--input=docs.jsonl,corpus.txt.gz --vocab_size=280 --output=tokenizer.json --trace=2 --dump=dump.txt --workers=2",
             "docs.jsonl corpus.txt.gz"),
        Tiny("--tokenizer=tokenizer.json --show=hello --dump=dump.txt", "tokenizer.json"),
        Tiny("--tokenizer=ranks.tiktoken --show=hello", "ranks.tiktoken"),
        Tiny("--tokenizer=letters --show=hello", "letters/vocab.json letters/merges.txt"),
        Tiny("--tokenizer=theirs.json --show=hello", "theirs.json"),
        Tiny("--input=corpus.txt --compare=char,300,tokenizer.json --workers=1", "corpus.txt tokenizer.json"),
    ],
    "data": [
        Tiny("--input=corpus.txt --separator=<|endoftext|> --vocab_size=300 --output=tokens --workers=1", "corpus.txt"),
        Tiny("--input=docs.jsonl --tokenizer=tokenizer.json --output=new", "docs.jsonl tokenizer.json"),
        Tiny(f"--input=crawl.warc.gz,page.html --steps={FILTERS} --vocab_size=300 --output=web --report=web.html --look=1",
             "crawl.warc.gz page.html"),
        Tiny("--input=docs.jsonl --steps=language,quality,perplexity,decontaminate --min_quality=0.1 --max_bits=9 "
             "--quality=quality.npz --ngrams=ngrams.npz --eval_data=exams --output=picked",
             "docs.jsonl quality.npz ngrams.npz exams/hellaswag_val.jsonl"),
        Tiny("--train_language=languages.json --output=language.npz", "languages.json"),
        Tiny("--train_classifier --positive=docs.jsonl --negative=corpus.txt --output=quality.npz", "docs.jsonl corpus.txt"),
        Tiny("--train_ngrams=corpus.txt --output=ngrams.npz", "corpus.txt"),
        Tiny("--train_ngrams=tokens", "tokens/train.npy tokens/val.npy tokens/manifest.json"),
    ],
    "model": [
        Tiny("--n_layer=2 --n_embd=32"),
        Tiny("--import_hf=hf --output=imported.pt", "hf/config.json hf/model.safetensors"),
        Tiny("--ckpt=plain.pt --export_hf=hf", "plain.pt"),
    ],
    "train": [
        Tiny(f"--data=tokens --output=run --max_iters=4 {SHAPE}",
             "tokens/train.npy tokens/val.npy tokens/tokenizer.json"),
        Tiny(f"--data=corpus.txt --tokenizer=char --output=chars --max_iters=3 {SHAPE}", "corpus.txt"),
        Tiny("--resume --data=tokens --output=run --max_iters=8", "run/ckpt.pt run/log.jsonl"),  # or begins on them
        Tiny(f"--init_from=run/ckpt.pt --data=docs.jsonl --output=child --max_iters=2 {SHAPE}", "run/ckpt.pt docs.jsonl"),
        Tiny(f"--data=tokens,masked --mix=0.5,0.5 --output=mixed --max_iters=2 {SHAPE}", "masked/train_mask.npy"),
        Tiny(f"--data=tokens --output=budget --flops=1e8 {SHAPE}", "scaling/recipe.json"),
    ],
    "kernels": [Tiny("--only=add --seconds=0.01 --device=cpu"),
                Tiny("--only=add --roofline --shape=1,8,16,2 --seconds=0.01 --device=cpu --plot=roof.png")],
    "ddp": [Tiny("--merge=parts --output=merged.pt", "parts/part-0.pt parts/part-1.pt"),
            Tiny("--plan --gpus=16 --params=1e9"), Tiny("--show_schedule --mesh=pp2 --micro=2"),
            Tiny("--ranks=2 --steps=1 --only=ddp")],
    "scaling": [Tiny("--fit=runs.csv --predict=1e13 --resamples=20", "runs.csv"),
                Tiny("--fit=runs.jsonl --resamples=20 --output=study", "runs.jsonl"),
                Tiny("--check=run --output=study", "study/prediction.json run/log.jsonl"), Tiny("--runs=run --plan --data=tokens", "run/log.jsonl"),
                Tiny("--plan --data=tokens --output=study --budgets=1e11,2e11 --sizes=3", "tokens/train.npy study/runs.jsonl")],
    "sample": [
        Tiny("--ckpt=run/ckpt.pt --prompt=the --max_new_tokens=4 --device=cpu", "run/ckpt.pt"),
        Tiny("--ckpt=run/ckpt.pt --draft=plain.pt --prompt=the --max_new_tokens=4 --device=cpu", "plain.pt"),
        Tiny("--ckpt=run/ckpt.pt --eval=ppl,hellaswag,mmlu,gsm8k --eval_data=exams --output=eval.json --shots=1 --n_samples=2 "
             "--max_new_tokens=4 --device=cpu",
             "exams/text.txt exams/hellaswag_val.jsonl exams/test/law_test.csv exams/dev/law_dev.csv exams/gsm8k_test.jsonl "
             "exams/gsm8k_train.jsonl eval.json"),
        Tiny("--ckpt=run/ckpt.pt --eval=ppl --eval_data=exams --output=new.json --compare=eval.json --device=cpu", "eval.json"),
        Tiny("--ckpt=run/ckpt.pt --chat --max_new_tokens=4 --device=cpu", "", "lines.txt"),
    ],
    "align": [
        Tiny(f"--algorithm=sft --ckpt=run/ckpt.pt --data=chats.jsonl --output=tuned {ALIGN}", "run/ckpt.pt chats.jsonl"),
        Tiny(f"--algorithm=dpo --ckpt=run/ckpt.pt --data=pairs.jsonl --output=preferred --lora=2 {ALIGN}", "pairs.jsonl"),
        Tiny(f"--algorithm=grpo --ckpt=run/ckpt.pt --data=prompts.jsonl --verifier=regex --output=rewarded {ALIGN}",
             "prompts.jsonl"),
        Tiny(f"--algorithm=grpo --ckpt=run/ckpt.pt --data=prompts.jsonl --verifier=reward/ckpt.pt --output=new {ALIGN}",
             "reward/ckpt.pt"),
        Tiny("--resume --output=tuned --max_iters=4", "tuned/ckpt.pt tuned/log.jsonl"),
        Tiny("--eval=verify --ckpt=run/ckpt.pt --data=prompts.jsonl --verifier=check.py:score --max_new_tokens=4 --device=cpu",
             "prompts.jsonl check.py"),
        Tiny("--label=prompts.jsonl --ckpt=run/ckpt.pt --output=labels --max_new_tokens=4 --device=cpu",
             "prompts.jsonl labels/preferences.jsonl", "answers.txt"),
        Tiny("--eval=winrate --ckpt=run/ckpt.pt --data=chats.jsonl --output=new --judge=http://127.0.0.1:9/v1 --max_new_tokens=4 "
             "--device=cpu", "chats.jsonl", lacks="judge"),
    ],
}
# Runs that make files for others, in this order; then those of RUNS, so that each file that is written is there already.
MAKE = [
    ("bpe", "--input=corpus.txt --vocab_size=300 --output=tokenizer.json --workers=1"),
    ("data", "--input=corpus.txt --separator=<|endoftext|> --vocab_size=300 --output=tokens --workers=1"),
    ("train", f"--data=tokens --output=run --max_iters=4 {SHAPE}"),
    ("train", f"--data=corpus.txt --tokenizer=char --output=chars --max_iters=2 {SHAPE}"),
    ("train", "--data=tokens --output=plain --max_iters=2 --n_layer=1 --n_head=2 --n_embd=16 --block_size=64 --ngram=0 --ngram_rows=65536 "
              "--batch_size=4 --ffn=swiglu --qk_norm=False --device=cpu"),
    ("model", "--ckpt=plain/ckpt.pt --export_hf=hf"),
    ("data", "--train_classifier --positive=docs.jsonl --negative=corpus.txt --output=quality.npz"),
    ("data", "--train_ngrams=corpus.txt --output=ngrams.npz"),
    ("align", f"--algorithm=reward --ckpt=run/ckpt.pt --data=pairs.jsonl --output=reward {ALIGN}"),
    ("align", f"--algorithm=sft --ckpt=run/ckpt.pt --data=chats.jsonl --output=tuned {ALIGN}"),
    ("sample", "--ckpt=run/ckpt.pt --eval=ppl,hellaswag,mmlu,gsm8k --eval_data=exams --output=eval.json --shots=1 "
               "--n_samples=2 --max_new_tokens=4 --device=cpu"),
    ("scaling", "--fit=runs.csv --predict=6.09e7 --preregister --resamples=20 --output=study"),
]


def write_inputs(folder: Path) -> None:
    """The files of a user, to begin with."""
    rng = random.Random(0)
    words = "the model reads a token and writes the next one naïve café 東京 über again so it learns 3.14 😀".split()
    texts = [" ".join(rng.choices(words, k=40)) + f"\ndocument {i}\n" for i in range(40)]
    answers = [dict(prompt=f"say {i}", response=rng.choice(words), answer=str(i), pattern="[a-z ]+") for i in range(24)]
    pairs = [dict(prompt=f"say {i}", chosen="a b", rejected="c") for i in range(24)]
    question = dict(question="one and one?", answer="It is <<1+1=2>>2.\n#### 2")
    ending = dict(ind=0, activity_label="Art", ctx="He draws", ctx_a="He draws", ctx_b="", endings=["a", "b", "c", "d"], label="1",
                  source_id="x", split="val", split_type="indomain")
    page = ("<html><head><title>T</title></head><body><p>" + "</p><p>".join(texts[:8]) + "</p></body></html>").encode()
    reply = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + page
    head = (f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.example/\r\nContent-Type: application/http\r\n"
            f"Content-Length: {len(reply)}\r\n\r\n").encode()
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's letters for bytes
    letters = {chr(i): n for n, i in enumerate([*shown, *range(256, 256 + 256 - len(shown))])}
    letters |= {"th": len(letters), "the": len(letters) + 1}
    files = {
        "corpus.txt": "<|endoftext|>".join(texts),
        "docs.jsonl": "".join(json.dumps(dict(text=text)) + "\n" for text in texts),
        "corpus.txt.gz": gzip.compress("".join(texts).encode(), mtime=0),
        "page.html": page,
        "crawl.warc.gz": gzip.compress(head + reply + b"\r\n\r\n", mtime=0) * 2,
        "languages.json": json.dumps({"en": texts[:9], "de": ["der die das und ist nicht ein Haus"] * 9}),
        "chats.jsonl": "".join(json.dumps(row) + "\n" for row in answers),
        "prompts.jsonl": "".join(json.dumps(row) + "\n" for row in answers),
        "pairs.jsonl": "".join(json.dumps(row) + "\n" for row in pairs),
        "check.py": "def score(response, **row):\n    return float(len(response) > 3)\n",
        "lines.txt": "hello\nagain\n",
        "answers.txt": "a\nb\n" * 40,
        "labels/preferences.jsonl": json.dumps(dict(history=["say 0"], response_a="a", response_b="b", chosen="a")) + "\n",
        "exams/text.txt": texts[0],
        "exams/hellaswag_val.jsonl": json.dumps(ending) + "\n",
        "exams/test/law_test.csv": "What?,a,b,c,d,A\nWho?,a,b,c,d,B\n",
        "exams/dev/law_dev.csv": "Why?,a,b,c,d,C\n",
        "exams/gsm8k_test.jsonl": json.dumps(question) + "\n",
        "exams/gsm8k_train.jsonl": json.dumps(question) + "\n",
        "letters/vocab.json": json.dumps(letters),
        "letters/merges.txt": "#version: 0.2\nt h\nth e\n",
        "theirs.json": json.dumps({"model": {"type": "BPE", "vocab": letters, "merges": ["t h", "th e"]}, "added_tokens": [],
                                   "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}}),
        "runs.csv": "N,D,loss\n" + "".join(f"{N},{D},{2 + 60 / N**0.3 + 300 / D**0.4}\n"
                                           for N in (10**5, 10**6, 10**7) for D in (10**7, 10**8, 10**9)),
        "scaling/recipe.json": json.dumps([dict(C=C, options=dict(batch_size=8, learning_rate=0.01)) for C in (1e8, 1e9)]),
        "study/runs.jsonl": json.dumps(dict(key="a", N=10**4, C=1e9, paid=1e9, D=10**5, loss=3.0, options={})) + "\n",
        "runs.jsonl": "".join(json.dumps(dict(N=N, D=D, loss=2 + 60 / N**0.3 + 300 / D**0.4)) + "\n"
                              for N in (10**5, 10**6, 10**7) for D in (10**7, 10**8, 10**9)),
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


# Files that no script may take for its own: made of others' by these lines, which run where torch is.
FOREIGN = """
import os, pickle, sys, base64, shutil, numpy as np, torch
sys.path.insert(0, ROOT)
import bpe, model
class Bomb:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)
os.makedirs("foreign", exist_ok=True)
torch.save(dict(version=1, config={}, weights=Bomb()), "foreign/bomb.pt")
np.save("foreign/bomb.npy", np.array([Bomb()], object), allow_pickle=True)
np.savez("foreign/bomb.npz", words=np.array([Bomb()], object))
open("foreign/bomb.pkl", "wb").write(pickle.dumps(Bomb()))
np.save("foreign/floats.npy", np.ones(50))
np.save("foreign/square.npy", np.ones((9, 9), np.uint16))
np.save("foreign/large.npy", np.full(900, 60000, np.uint16))
torch.save(torch.ones(3), "foreign/tensor.pt")
torch.save(dict(version=99), "foreign/later.pt")
ranks = [base64.b64encode(bytes([i])).decode() + f" {i}" for i in range(256)] + [base64.b64encode(b"th").decode() + " 256"]
open("ranks.tiktoken", "w").write("\\n".join(ranks) + "\\n")
os.makedirs("masked", exist_ok=True)
for side in ("train", "val"):
    shutil.copy(f"tokens/{side}.npy", f"masked/{side}.npy")
    np.save(f"masked/{side}_mask.npy", np.arange(len(np.load(f"tokens/{side}.npy"))) % 3 > 0)
shutil.copy("tokens/tokenizer.json", "masked/tokenizer.json")
shutil.copy("plain/ckpt.pt", "plain.pt")
"""


def build(server: Server, folder: Path, root: Path = ROOT) -> None:
    """Make the files that cases begin with."""
    folder.mkdir(parents=True)
    write_inputs(folder)
    for name, words in MAKE:
        if name == "model":
            (folder.parent / "foreign.py").write_text(FOREIGN.replace("ROOT", repr(str(root))))
            made(server.run(dict(script=str(folder.parent / "foreign.py"), words=[], cwd=str(folder))))
        made(server.run(dict(script=str(script_of(root, name, folder.parent)), words=words.split(), cwd=str(folder))))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"--data=tokens --output=split --max_iters=2 --parallel=zero1 --parts {SHAPE}".split()
    made(server.run(*[dict(script=str(script_of(root, "train", folder.parent)), words=words, cwd=str(folder), environ=dict(
        RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))) for i in range(2)]))
    shutil.move(folder / "split" / "parts", folder / "parts")
    for path in (folder / ".." ).glob(f"{folder.name}.*"):
        path.unlink()


def script_of(root: Path, name: str, place: Path) -> Path:
    """The path of a script; train.py stands where no sample.py is, which it would start, to import torch anew."""
    if name == "train" and (root / "train.py").exists():
        alone = place / "alone"
        alone.mkdir(exist_ok=True)
        for file in ("train.py", "model.py", "data.py", "bpe.py", "ddp.py"):
            if not (alone / file).exists():
                shutil.copy(root / file, alone / file)
        return alone / "train.py"
    return root / f"{name}.py"


def made(found: list[dict]) -> None:
    """Raise RuntimeError where a run that makes files failed."""
    for done in found:
        if done["code"]:
            raise RuntimeError(f"the files to begin with cannot be made: {done}")


# ------------------------------------------------------------------------------------------------ what goes wrong

class Case(NamedTuple):
    """A run with a fault: `prepare(folder)` spoils its folder, `job` holds the fault's limits and signals.

    Where it fails its line holds `names`. `again`: the same command must succeed after it; `long`: it may take as long
    as it wants, if Ctrl-C ends it.
    """

    what: str
    words: list[str]
    prepare: Callable[[Path], None] = lambda folder: None
    job: dict = {}
    names: str = ""
    copies: int = 1
    again: bool = False
    long: bool = False


VALUES = {
    int: "-1 0 1 2 3 7 65537 2147483648 9223372036854775808 1e30 -1e30 x 1.5 nan inf".split() + ["", None],
    float: "-1 0 1e-308 1e-9 0.5 1 2 1e9 1e308 -1e308 x nan inf 1e999".split() + ["", None],
    bool: ["True", "False", "2", "maybe", "", None],
    str: ["", " ", ",", ",,", "x", "-1", "0", "1e999", "[", "(", "a" * 300, "/", "/dev/null", "/dev/full", "nowhere/x", "tokens",
          "corpus.txt", "run/ckpt.pt", "tokens/train.npy", "é😀", "%s{0}\\", "..", "attention,,", "=", None],
}


def fields(script: str, root: Path = ROOT) -> list[tuple[str, type]]:
    """Names and types of a script's options, read from its --help and its text."""
    names = {"int": int, "float": float, "bool": bool, "str": str}
    classes = {node.name: node for node in ast.walk(ast.parse((root / f"{script}.py").read_text()))
               if isinstance(node, ast.ClassDef)}
    found, wanted = {}, ["Options"]
    while wanted:
        node = classes.get(wanted.pop())
        if node is None:  # model.py's, which train.py goes on from
            node = next(node for node in ast.walk(ast.parse((root / "model.py").read_text()))
                        if isinstance(node, ast.ClassDef) and node.name == "Config")
        wanted += [getattr(base, "id", getattr(base, "attr", "")) for base in node.bases]
        for line in node.body:
            if isinstance(line, ast.AnnAssign):
                found.setdefault(line.target.id, names[line.annotation.id])
    return sorted(found.items())


def option(script: str, number: int, seed: int, rng: random.Random, root: Path) -> Case | None:
    """An option at an extreme, or of the wrong type, on top of one of the script's runs."""
    every = [(name, value) for name, kind in fields(script, root) for value in VALUES[kind]]
    random.Random(seed).shuffle(every)
    if number >= len(every):
        return None
    name, value = every[number]
    row = rng.choice([row for row in RUNS[script] if f"--{name}" in row.words] or RUNS[script])
    word = f"--{name}" if value is None else f"--{name}={value}"
    return Case(f"{word[:60]}", [*row.words.split(), word], job=dict(stdin=row.stdin, limit=8), long=True)


def spoiled(content: bytes, name: str, rng: random.Random) -> tuple[str, bytes]:
    """The content of a file with a wound, and what it is."""
    how = rng.choice(["cut", "flip", "flip", "mutate", "mutate", "noise"])
    at = rng.randrange(max(1, len(content)))
    if how == "cut":
        return f"cut at {at}", content[:at]
    if how == "flip":
        flips = rng.choice([1, 1, 1, 8])
        data = bytearray(content)
        for _ in range(flips if data else 0):
            place = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(300, len(data)))
            data[place] ^= 1 << rng.randrange(8)
        return f"{flips} bits flipped", bytes(data)
    if how == "mutate" and name.endswith((".json", ".jsonl")):
        with contextlib.suppress(ValueError):
            lines = content.decode().splitlines() if name.endswith(".jsonl") else [content.decode()]
            i = rng.randrange(len(lines))
            value, what = mutated(json.loads(lines[i]), rng)
            lines[i] = json.dumps(value)
            return f"line {i}: {what}", "\n".join(lines).encode() + b"\n"
    size = rng.choice([1, 9, 300])
    return f"{size} random bytes at {at}", content[:at] + rng.randbytes(size) + content[at + size:]


ODD = [None, -1, 0, 1.5, 10**30, "", "x", [], {}, True, [[]], {"x": 1}, "\x00", "\ud800"]


def mutated(value: object, rng: random.Random, path: str = "") -> tuple[object, str]:
    """JSON with one value replaced by another kind, one key left out or one too many; and what was done."""
    inner = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    if not inner or not path and rng.random() < 0.1 or path and rng.random() < 0.3:
        odd = rng.choice(ODD)
        return odd, f"{path or 'all'} became {odd!r}"
    key, old = rng.choice(inner[:200])
    if isinstance(value, dict) and rng.random() < 0.2:
        return {name: item for name, item in value.items() if name != key}, f"{path}/{key} is gone"
    new, what = mutated(old, rng, f"{path}/{key}")
    copy = value.copy()
    copy[key] = new
    return copy, what


CHANGE = """
import sys, random, copy, torch
sys.path.insert(0, ROOT)
path, seed = sys.argv[1:]
rng = random.Random(seed)
whole = torch.load(path, weights_only=True)
odd = [None, -1, 0, 1.5, 10**30, "", "x", [], {}, True, torch.zeros(2), torch.tensor(float("nan")), [torch.ones(1)]]
at, name = whole, []
while isinstance(at, dict) and at and (not name or rng.random() < 0.8) or not name:
    inner, key = at, rng.choice(list(at))
    at, name = at[key], name + [str(key)]
if rng.random() < 0.2:
    del inner[key]
    print("/".join(name), "is gone")
else:
    inner[key] = rng.choice(odd)
    print("/".join(name), "became", repr(inner[key]))
torch.save(whole, path)
"""


# As root a run gives up its rights to be held back by a file's mode; it must still reach what Python imports late.
HOMES = [Path(prefix) for prefix in (sys.prefix, sys.base_prefix)]
REACHED = os.getuid() or all(path.stat().st_mode & 1 for home in HOMES for path in (home, *home.parents))


def spoil(script: str, number: int, seed: int, rng: random.Random, root: Path) -> Case | None:
    """One of the files that a run reads is cut, flipped, mutated, or is something else altogether."""
    rows = [(row, name) for row in RUNS[script] for name in row.reads.split()]
    if not rows:
        return None
    row, name = rows[number % len(rows)]
    closed = "unreadable" if REACHED else "missing"
    kinds = ["empty", "folder", "fifo", closed, "missing", "loop", "foreign"]
    turn, rest = divmod(number // len(rows), 3)
    kind = "wound" if rest else kinds[turn % len(kinds)]
    case = Case(kind, row.words.split(), job=dict(stdin=row.stdin, nobody=kind == "unreadable"))
    foreign = rng.choice(["foreign", "foreign", "run/log.jsonl", "run/ckpt.pt", "tokens/train.npy", "tokenizer.json", "quality.npz",
                          "crawl.warc.gz", "hf/model.safetensors", "corpus.txt", "docs.jsonl", "page.html"])
    pick = rng.random()

    def prepare(folder: Path) -> None:
        path = folder / name
        if kind == "wound":
            what, data = spoiled(path.read_bytes(), name, rng)
            path.write_bytes(data)
            return what
        source = folder / foreign
        if source.is_dir():
            source = sorted(source.iterdir())[int(pick * len(list(source.iterdir())))]
        content = source.read_bytes()
        if kind == "unreadable":
            return path.chmod(0)
        path.unlink()
        if kind == "empty":
            path.touch()
        elif kind == "folder":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind == "foreign":
            path.write_bytes(content)
            return source.name

    names = name.split(".")[0] + f"/{row.lacks}" * bool(row.lacks)
    return case._replace(what=f"{name}: {kind}", prepare=prepare, names="" if kind in ("empty", "folder") else names)


def change(script: str, number: int, seed: int, rng: random.Random, root: Path) -> Case | None:
    """A checkpoint that is read with an entry of another type, or without one."""
    rows = [(row, name) for row in RUNS[script] for name in row.reads.split() if name.endswith(".pt")]
    if not rows:
        return None
    row, name = rows[number % len(rows)]
    program = CHANGE.replace("ROOT", repr(str(root)))
    return Case(f"{name}: changed", row.words.split(), job=dict(stdin=row.stdin, change=(program, name, str(rng.random()))))


def stop(script: str, number: int, seed: int, rng: random.Random, root: Path) -> Case:
    """Ctrl-C, SIGTERM or kill -9 at a random moment; then the same command again."""
    row = RUNS[script][number % len(RUNS[script])]
    what = rng.choice(["SIGINT", "SIGKILL", "SIGKILL", "SIGTERM"])
    return Case(f"{what} at a random moment", row.words.split(), again=not row.lacks,
                job=dict(stdin=row.stdin, share=rng.random(), number=int(getattr(signal, what))))


def full(script: str, number: int, seed: int, rng: random.Random, root: Path) -> Case:
    """A full disk: a limit on the size of files, a small file system where one can be mounted, stdout that is full."""
    row = RUNS[script][number % len(RUNS[script])]
    kind = rng.choice(["limit", "limit", "mount", "stdout"])
    size = int(2 ** rng.uniform(10, 18))
    job = dict(stdin=row.stdin)
    if kind == "limit":
        job |= dict(file_size=size, stdout=os.devnull)
    elif kind == "stdout":
        job |= dict(stdout="/dev/full")
    else:
        job |= dict(mount=size)
    return Case(f"full disk: {kind} {size if kind != 'stdout' else ''}", row.words.split(), job=job)


def twice(script: str, number: int, seed: int, rng: random.Random, root: Path) -> Case:
    """Two at once in one folder: each succeeds, or says that the other is there."""
    rows = [row for row in RUNS[script] if not row.lacks]
    row = rows[number % len(rows)]
    return Case("two at once", row.words.split(), copies=2, job=dict(stdin=row.stdin))


def memory(script: str, number: int, seed: int, rng: random.Random, root: Path) -> Case:
    """Little memory, as `ulimit -v` gives it."""
    row = RUNS[script][number % len(RUNS[script])]
    size = int(2 ** rng.uniform(16, 28))
    return Case(f"memory: {size >> 10} KiB", row.words.split(), job=dict(stdin=row.stdin, memory=size))


def without(script: str, number: int, seed: int, rng: random.Random, root: Path) -> Case | None:
    """No Triton, no matplotlib, no network, no CUDA."""
    rows = [(row, kind) for row in RUNS[script] for kind in ("triton", "matplotlib", "network", "cuda")]
    if number >= len(rows):
        return None
    row, kind = rows[number]
    job = dict(stdin=row.stdin)
    job |= {"network": dict(offline=True), "cuda": dict(environ={"CUDA_VISIBLE_DEVICES": ""})}.get(kind, dict(without=[kind]))
    return Case(f"no {kind}", row.words.split(), job=job)


def place(script: str, number: int, seed: int, rng: random.Random, root: Path) -> Case | None:
    """What a run writes to is a folder, a file, a FIFO, a link that leads nowhere, or may not be written."""
    rows = [(row, word) for row in RUNS[script] for word in re.findall(r"--(?:output|dump|report|export_hf|plot)=(\S+)", row.words)]
    kinds = ["folder", "file", "fifo", "dangling", "inside a file"] + ["unwritable", "read-only folder"] * bool(REACHED)
    if number >= len(rows) * len(kinds):
        return None
    (row, name), kind = rows[number // len(kinds)], kinds[number % len(kinds)]
    words = row.words.split()
    if kind == "inside a file":
        words += [f"{word.split('=')[0]}=corpus.txt/{name}" for word in words if word.endswith(f"={name}")]

    def prepare(folder: Path) -> None:
        path = folder / name
        if kind in ("folder", "file", "fifo", "dangling"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if kind == "folder":
            path.mkdir()
        elif kind == "file":
            path.write_text("mine")
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "dangling":
            path.symlink_to("nowhere/at/all")
        elif kind == "unwritable":
            if path.is_dir():
                for file in path.rglob("*"):
                    file.chmod(0o555)
            if path.exists():
                path.chmod(0o555)
        elif kind == "read-only folder":
            folder.chmod(0o555)

    return Case(f"{name} is {kind}", words, prepare, job=dict(stdin=row.stdin, nobody=kind in ("unwritable", "read-only folder")))


FAULTS = dict(option=option, spoil=spoil, change=change, stop=stop, full=full, twice=twice, memory=memory, without=without, place=place)


# ------------------------------------------------------------------------------------------------ the judge

def snapshot(folder: Path) -> dict[str, str]:
    """Path -> hash of each regular file."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*")
            if path.is_file() and not path.is_symlink()}


def whole(path: Path) -> bool:
    """Whether a file that was written is complete."""
    import zipfile
    data = path.read_bytes()
    try:
        if path.suffix in (".json", ".jsonl"):
            lines = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
            return bool(lines) and all(json.loads(line) is not None for line in lines[:-1] or lines)  # a kill may cut the last
        if path.suffix in (".pt", ".npz"):
            return zipfile.ZipFile(io.BytesIO(data)).testzip() is None
        if path.suffix == ".npy":
            import numpy
            return numpy.load(io.BytesIO(data), allow_pickle=False).size > 0
        if path.suffix == ".safetensors":
            size = int.from_bytes(data[:8], "little")
            ends = [about["data_offsets"][1] for name, about in json.loads(data[8:8 + size]).items() if name != "__metadata__"]
            return len(data) == 8 + size + max(ends)
    except Exception:
        return False
    return len(data) > 0


def offences(case: Case, script: str, found: dict, folder: Path, before: dict) -> list[str]:
    """What a run did that none may do."""
    out, name = [], f"{script}.py"
    code, sent, lines = found["code"], found.get("sent"), found["err"].splitlines()
    if found.get("hung") or found.get("long") and not case.long:
        return ["hangs" + f" and does not mind Ctrl-C: {found['err'][-200:]!r}" * ("hung" in found)]
    interrupted = sent == signal.SIGINT or found.get("long")
    killed = sent in (signal.SIGKILL, signal.SIGTERM) and code == -sent
    trace = re.search(r"Traceback|Exception ignored|Fatal Python|terminate called", found["err"])
    if trace and (interrupted or case.job.get("memory")) and "in run\n" not in found["err"]:
        pass  # Python was importing, or ending
    elif trace:
        out.append(f"traceback: {[line for line in lines if line.strip()][-1][:150]}")
    elif interrupted and code == 130:
        out += ["words after Ctrl-C"] * any(line.startswith(name) for line in lines)
    elif code < 0 and not killed:
        out.append(f"ended by signal {-code}")
    elif code not in (0, 1, 2, 130) and not killed:
        out.append(f"exit code {code}")
    elif code in (1, 2):
        last = lines[-1] if lines else ""
        if not last.startswith(f"{name}: ") or len(last) < len(name) + 10:
            out.append(f"its last line does not say what is wrong: {last[:100]!r}")
        elif not any(part in last for part in case.names.split("/")):
            out.append(f"its line does not name {case.names}: {last[:100]!r}")
        elif len(last) > 1200:
            out.append(f"its line has {len(last)} characters: {last[:60]!r}")
        elif sum(line.startswith(name) for line in lines) > 1 or len(lines) > 1 and code == 2:
            out.append(f"{len(lines)} lines on stderr: {lines[0][:100]!r}")
    out += ["it left processes behind"] * bool(found.get("left"))
    if any(path.name == "unpickled" for path in folder.rglob("unpickled")):
        out.append("it unpickled what it was given")
    return out


def losses(case: Case, found: list[dict], folder: Path, before: dict, words: list[str]) -> list[str]:
    """Files that were lost, damaged or left behind, after one run or two."""
    out, now = [], snapshot(folder)
    killed = any(one.get("sent") in (signal.SIGKILL, signal.SIGTERM) for one in found)
    there = set(now.values())
    for name, digest in before.items():
        spoiled = case.names and name.startswith(case.names)
        if killed and name.endswith("manifest.json") and name not in now:
            continue  # it is taken away before the files that it vouches for change
        if now.get(name) != digest and digest not in there and not name.endswith(".lock") and not spoiled and \
                not any(word.endswith(f"={name}") for word in words if "=" in word and "input" not in word and "data" not in word):
            if name not in now:
                out.append(f"{name} is lost")
            elif not whole(folder / name):
                out.append(f"{name} is damaged")
            elif any(f"={name}" == f"={part}" for word in words if "input" in word or "data=" in word for part in word.split("=")[-1].split(",")) \
                    and not any(f"--output={name}" == word for word in words):
                out.append(f"{name}, an input, was changed")
    if not killed and not any("hung" in one for one in found):
        out += [f"{name} is left behind" for name in now if name not in before and re.search(r"\.part\b|\.tmp", name)]
    return out


# ------------------------------------------------------------------------------------------------ the sweep

class Sweep:
    """Cases of a seed, one after the other, in folders below `place`."""

    def __init__(self, place: Path, seed: int, server: Server, root: Path = ROOT):
        self.place, self.seed, self.server, self.root = place, seed, server, root
        self.base = place / "base"
        self.took = {}
        self.mounts = True

    def case(self, name: str) -> Case | None:
        """The case of a name script/class/number."""
        script, kind, number = name.split("/")
        return FAULTS[kind](script, int(number), self.seed, random.Random(f"{self.seed} {name}"), self.root)

    def fresh(self, label: str) -> Path:
        """A folder with the files to begin with."""
        folder = self.place / label
        if folder.exists():
            folder.chmod(0o755)
            shutil.rmtree(folder)
        shutil.copytree(self.base, folder, symlinks=True)
        return folder

    def job(self, script: str, words: list[str], folder: Path, extra: dict) -> dict:
        """A request to the server."""
        job = dict(script=str(script_of(self.root, script, self.place)), words=words, cwd=str(folder), **extra)
        if job.get("stdin"):
            job["stdin"] = str(folder / job["stdin"])
        return job

    def seconds(self, script: str, words: list[str], extra: dict) -> float:
        """How long an undisturbed run takes, measured once."""
        key = (script, *words)
        if key not in self.took:
            folder = self.fresh("clean")
            self.took[key] = self.server.run(self.job(script, words, folder, extra))[0]["seconds"]
        return self.took[key]

    def do(self, name: str) -> tuple[Case, list[dict], list[str]] | None:
        """Run a case: itself, what became of its runs, and its offences. None: there is no such case."""
        script = name.split("/")[0]
        case = self.case(name)
        if case is None:
            return None
        folder, extra = self.fresh("case"), dict(case.job)
        words = case.words
        if share := extra.pop("share", None):
            clean = self.seconds(script, words, dict(stdin=extra.get("stdin")))
            folder = self.fresh("case")
            extra["signals"] = [(share * clean, extra.pop("number"))]
        if changed := extra.pop("change", None):
            program = self.place / "change.py"
            program.write_text(changed[0])
            done, = self.server.run(dict(script=str(program), words=changed[1:], cwd=str(folder)))
            case = case._replace(what=f"{case.what}: {done['out'].strip()}")
        size = extra.pop("mount", 0)
        said = case.prepare(folder)
        case = case._replace(what=f"{case.what}: {said}" if said else case.what)
        if size and not self.mount(folder, size):
            return None
        if extra.get("nobody"):
            for path in [folder, *folder.rglob("*")]:
                if not path.is_symlink():
                    os.chown(path, 65534, 65534)
            self.place.chmod(0o755)
            extra |= {"stdout": f"{folder}.0.out", "stderr": f"{folder}.0.err"}
        try:
            before = snapshot(folder)
            found = self.server.run(*[self.job(script, words, folder, extra) for _ in range(case.copies)])
            bad = [bad for one in found for bad in offences(case, script, one, folder, before)]
            bad += losses(case, found, folder, before, words)
            if case.copies > 1 and all(one["code"] for one in found):
                bad.append("none of the two succeeded")
            if case.again and not bad:
                again, = self.server.run(self.job(script, words, folder, dict(stdin=extra.get("stdin"))))
                bad += [f"then, once more: {word}" for word in offences(case, script, again, folder, before)]
                bad += [f"once more, it fails: {again['err'][-200:]}"] * (again["code"] != 0)
                found.append(again)
        finally:
            if size:
                subprocess.run(["umount", "-l", folder], capture_output=True)
        return case, found, bad

    def mount(self, folder: Path, size: int) -> bool:
        """Move a folder's content to a file system of its own with `size` bytes free. False where that is not allowed."""
        used = sum(-(-path.stat().st_size // 4096) * 4096 + 4096 for path in folder.rglob("*"))
        aside = self.fresh("aside")
        shutil.rmtree(folder)
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={used + size}", "tmpfs", folder], capture_output=True)
        if done.returncode == 0:
            shutil.copytree(aside, folder, dirs_exist_ok=True)
        return done.returncode == 0


def repeat_command(name: str, seed: int) -> str:
    return f"python tests/faults.py --seed={seed} --repeat={name}"


def names_of(rounds: int, only: list[str]) -> Iterator[str]:
    """Names of the cases of a sweep, a class of a script after the other."""
    scripts = [word for word in only if word in SCRIPTS] or SCRIPTS
    kinds = [word for word in only if word in FAULTS] or list(FAULTS)
    for script in scripts:
        for kind in kinds:
            rows = max(1, sum(len(row.reads.split()) for row in RUNS[script])) if kind == "spoil" else 1
            yield from (f"{script}/{kind}/{number}" for number in range(rounds * rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="cases of each class, script and file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="comma list of scripts and classes")
    parser.add_argument("--repeat", default="", help="a case to run again")
    parser.add_argument("--python", default=sys.executable, help="interpreter that runs the scripts")
    parser.add_argument("--keep", default="", help="folder for the files, to keep them")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    o = parser.parse_args()
    with contextlib.ExitStack() as stack:
        place = Path(o.keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="faults"))).resolve()
        place.mkdir(parents=True, exist_ok=True)
        server = Server(o.python)
        stack.callback(server.close)
        sweep = Sweep(place, o.seed, server)
        if not sweep.base.exists():
            build(server, sweep.base)
        if o.repeat:
            case, found, bad = sweep.do(o.repeat)
            script = o.repeat.split("/")[0]
            print(f"{case.what}\npython {script}.py {' '.join(case.words)}")
            for one in found:
                print({key: value for key, value in one.items() if key not in ("out", "err")})
                print(one["out"] + one["err"])
            return print(*(f"OFFENCE {word}" for word in bad), sep="\n")
        tried = wrong = 0
        print("script    class    tried  ended with", flush=True)
        for key, names in itertools.groupby(names_of(o.rounds, o.only.split(",")), lambda name: name.rpartition("/")[0]):
            ended, began = Counter(), time.monotonic()
            for name in names:
                start = time.monotonic()
                if (result := sweep.do(name)) is None:
                    continue
                case, found, bad = result
                ended["long" if found[0].get("long") else str(found[0]["code"])] += 1
                wrong += bool(bad)
                if bad:
                    print(f"{name}: {case.what}: {'; '.join(bad)}\n    {repeat_command(name, o.seed)}", flush=True)
                elif found[0].get("long") or time.monotonic() - start > 15:
                    print(f"{name}: {case.what}: takes long", flush=True)
            tried += ended.total()
            codes = ", ".join(f"{code}: {n}" for code, n in sorted(ended.items()))
            script, kind = key.split("/")
            print(f"{script:9} {kind:8} {ended.total():5}  {codes}  ({time.monotonic() - began:.0f} s)", flush=True)
        print(f"{tried} tried, {wrong} offences")
        sys.exit(bool(wrong))


if __name__ == "__main__":
    if sys.argv[1:] != ["--serve"]:
        main()
    else:
        JOB = serve()  # in the server it does not return, in a child it does
        play(JOB["script"])
