"""The rules of the house: one option function everywhere, who may import whom, how long and how dense a file may be, that
a script runs when it is copied alone, and that the README's first commands work. Each rule is a function that gives a list
of complaints, so that every rule is also run on an offender that must be complained about.
"""
import ast
import dataclasses
import doctest
import functools
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tokenize

import numpy as np
import pytest
from conftest import ROOT, tiny_documents

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
CEILING = {
    "bpe.py": 812,
    "data.py": 1798,
    "model.py": 1238,
    "train.py": 1036,
    "kernels.py": 1634,
    "ddp.py": 1219,
    "scaling.py": 1042,
    "align.py": 1395,
    "sample.py": 1396,
}
# Who may import whom: at the top of the file, and on demand inside a function.
OURS = {"bpe.py": ("", ""), "data.py": ("bpe", ""), "model.py": ("", "kernels"), "train.py": ("model", "bpe data ddp kernels"),
        "kernels.py": ("", ""), "ddp.py": ("", "model train"), "scaling.py": ("model", ""),
        "align.py": ("model bpe sample train", ""), "sample.py": ("model bpe", "")}
PACKAGES = {"torch", "numpy", "regex"}                  # at the top
ON_DEMAND = PACKAGES | {"triton", "matplotlib"}         # inside a function (kernels.py: triton at the top as well)
MAY_DIFFER = {"main", "load", "Options", "Config", "adamw"}      # one name, another meaning in each room
TINY_MODEL = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=4", "--max_iters=3", "--device=cpu",
              "--ngram_rows=64"]


def parsed(name, root=ROOT):
    return ast.parse((root / name).read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------ the same text everywhere

@functools.cache
def versions(root=ROOT):
    """{name of a module-level function or class: {its source text: [files]}}"""
    out = {}
    for path in sorted(root.glob("*.py")):
        lines = path.read_bytes().split(b"\n")  # ast.get_source_segment would split the file anew for each node
        for node in ast.parse(b"\n".join(lines)).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                text = [*lines[node.lineno - 1:node.end_lineno - 1], lines[node.end_lineno - 1][:node.end_col_offset]]
                out.setdefault(node.name, {}).setdefault(b"\n".join(text).decode(), []).append(path.name)
    return out


def different_copies(root=ROOT):
    return [f"{name} differs between {sorted(sum(texts.values(), []))}" for name, texts in versions(root).items()
            if len(texts) > 1 and name not in MAY_DIFFER]


def test_what_stands_in_two_files_is_the_same_text(tmp_path):
    assert different_copies() == []
    (tmp_path / "a.py").write_text("def run(x):\n    return x\ndef main():\n    pass\n")
    (tmp_path / "b.py").write_text("def run(x):\n    return  x\ndef main():\n    return 1\n")
    assert different_copies(tmp_path) == ["run differs between ['a.py', 'b.py']"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_options_run_and_main(name):
    tree, all_versions = parsed(name), versions()
    names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert {"options", "run", "main", "Options"} <= names
    assert len(all_versions["options"]) == len(all_versions["run"]) == 1
    assert ast.unparse(tree.body[-1]) == "if __name__ == '__main__':\n    run(main)"
    words = ast.get_docstring(tree)
    assert re.match(r"[^\n]+\.\n(.*\n)*Usage:", words), "the docstring begins with one sentence and has Usage:"


# ------------------------------------------------------------------------------------------------------------- the imports

def bad_imports(name, tree):
    """Imports that the table does not allow, as `line: module`."""
    top, inside = (set(words.split()) for words in OURS[name])
    out = []
    in_function = {id(child) for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda))
                   for child in ast.walk(node)}
    for node in ast.walk(tree):
        modules = {ast.Import: lambda: [a.name for a in node.names], ast.ImportFrom: lambda: [node.module or "."]}
        for module in modules.get(type(node), list)():
            first = module.split(".")[0]
            lazy = id(node) in in_function
            good = top | (inside if lazy else set()) | (ON_DEMAND if lazy or name == "kernels.py" else PACKAGES)
            if f"{first}.py" in CEILING and first not in top | inside or \
                    first not in good and (f"{first}.py" in CEILING or first not in sys.stdlib_module_names):
                out.append(f"{node.lineno}: {module}")
    return out


@pytest.mark.parametrize("name", SCRIPTS)
def test_only_the_allowed_imports(name):
    assert bad_imports(name, parsed(name)) == []


@pytest.mark.parametrize("name, source, found", [
    ("bpe.py", "import data", ["1: data"]), ("bpe.py", "import tiktoken", ["1: tiktoken"]),
    ("train.py", "import bpe", ["1: bpe"]), ("train.py", "def f():\n    import bpe", []),
    ("model.py", "def f():\n    from train import main", ["2: train"]), ("sample.py", "from bpe import load", []),
    ("data.py", "import os, bpe, numpy.lib.format, torch", []), ("data.py", "import matplotlib", ["1: matplotlib"]),
    ("data.py", "from . import bpe", ["1: ."])])
def test_the_import_rule_bites(name, source, found):
    assert bad_imports(name, ast.parse(source)) == found


# ------------------------------------------------------------------------------------------- how long and how dense a file is

def tokens_of(source):
    """Tokens of a source text; an f-string is one, as it was before Python 3.12."""
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        if name in ("FSTRING_START", "TSTRING_START"):
            if not depth:
                first = token
            depth += 1
        elif name in ("FSTRING_END", "TSTRING_END"):
            depth -= 1
            token = token._replace(type=tokenize.STRING, start=first.start)
        if depth == 0:
            yield token


def lines_of(source):
    """(code tokens by line, lines that are comment or docstring, all lines). A line inside a longer token is code."""
    words, code = set(), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            words.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    docstrings = set(words)
    layout = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokens_of(source):
        if token.type == tokenize.COMMENT:
            words.add(token.start[0])
        elif token.type not in layout and token.start[0] not in docstrings:
            code[token.start[0]] = code.get(token.start[0], 0) + 1
            for line in range(token.start[0] + 1, token.end[0] + 1):
                code.setdefault(line, 0)
    return code, words, source.splitlines()


def too_much(name, source):
    code, words, lines = lines_of(source)
    per_line = sorted(code.values())
    out = [f"{len(code)} code lines"] * (len(code) > CEILING[name])
    out += ["more than 12 tokens a line"] * (sum(per_line) > 12 * len(per_line))
    out += ["p95 above 30 tokens"] * (per_line[int(0.95 * (len(per_line) - 1))] > 30)
    out += ["less than 18% comments and docstrings"] * (len(words) < 0.18 * len(lines))
    out += ["wider than 120"] * any(len(line) > 120 for line in lines)
    out += ["a semicolon"] * any(token.string == ";" for token in tokens_of(source))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > (80 if node.name == "main" else 60):
            out.append(f"{node.name} is too long")
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            out.append("a __future__ import (annotations must stay types for the option function)")
    return out


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_file_stays_under_its_ceiling(name):
    source = (ROOT / name).read_text(encoding="utf-8")
    assert too_much(name, source) == []
    ast.parse(source, feature_version=(3, 10))  # the oldest Python that README promises


def test_the_ceiling_bites():
    good = '"""Words."""\n# more words\n' + "x = 1\n" * 8
    assert too_much("bpe.py", good) == []
    most = CEILING["scaling.py"]
    assert too_much("scaling.py", good + "x = 1  # a\n" * (most - 8)) == []
    assert too_much("scaling.py", good + "x = 1  # a\n" * (most - 7)) == [f"{most + 1} code lines"]
    assert too_much("bpe.py", good + "x = 1\n" * 9) == ["less than 18% comments and docstrings"]
    assert too_much("bpe.py", '"""Words."""\nx = 1; y = 2\n') == ["a semicolon"]
    assert too_much("bpe.py", good + "#" * 121) == ["wider than 120"]
    assert "more than 12 tokens a line" in too_much("bpe.py", good + "x = " + "1+" * 50 + "1\n")
    assert "p95 above 30 tokens" in too_much("bpe.py", '"""Words."""\n' + ("x = " + "1+" * 20 + "1\n") * 2)
    assert "f is too long" in too_much("bpe.py", good + "def f():\n" + "    x = 1  # a\n" * 60)


@pytest.mark.parametrize("name", SCRIPTS)
def test_public_functions_explain_themselves(name):
    for node in parsed(name).body:
        if isinstance(node, ast.FunctionDef) and node.name not in MAY_DIFFER and node.name[0] != "_":
            assert ast.get_docstring(node), f"{name}: {node.name} has no docstring"
            triton = any(getattr(decorator, "id", "") == "jit" for decorator in node.decorator_list)  # annotations are types there
            assert triton or all(a.annotation for a in node.args.args), f"{name}: an argument of {node.name} has no annotation"


# ------------------------------------------------------------------------------------------------- importing has no effect

EFFECTS = """
import json, os, random, signal, sys, threading
import numpy
folder, *modules = sys.argv[1:]
if torch := any("torch" in open(f"{folder}/{name}.py", encoding="utf-8").read() for name in modules):
    import torch
def state():
    return [dict(os.environ), threading.active_count(), signal.getsignal(signal.SIGINT), sorted(os.listdir(".")),
            random.getstate(), sys.argv[:], sys.path[:], numpy.random.get_state()[1].tolist(),
            torch and [torch.get_default_dtype(), torch.get_num_threads(), torch.random.get_rng_state().tolist(),
                       torch.is_grad_enabled(), torch.get_float32_matmul_precision()]]
sys.path.insert(0, folder)
stdout, stderr = sys.stdout, sys.stderr
for name in modules:
    with open("said", "w+") as said:
        sys.stdout = sys.stderr = said
        before = state()
        __import__(name)
        after = state()
        sys.stdout, sys.stderr = stdout, stderr
        said.seek(0)
        print(json.dumps([name, said.read() + "".join(f"{b!r:.99} became {a!r:.99}" for b, a in zip(before, after) if a != b)]))
"""


def effects_of_imports(modules, folder, cwd):
    """{module: what its import prints or changes, "" if nothing}, in one process that imports one after the other."""
    cwd.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", EFFECTS, str(folder), *modules], cwd=cwd, text=True, capture_output=True,
                          env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, timeout=100)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


def test_importing_a_file_has_no_effect(tmp_path):
    names = [name[:-3] for name in SCRIPTS]
    assert effects_of_imports(names, ROOT, tmp_path / "cwd") == dict.fromkeys(names, "")


def test_the_rule_on_effects_bites(tmp_path):
    lines = ["print(1)", "open('f', 'w')", "import os; os.environ['A'] = '1'", "import torch; torch.manual_seed(1)",
             "import sys; print(1, file=sys.stderr)", "pass"]
    for i, line in enumerate(lines):
        (tmp_path / f"offender{i}.py").write_text(line)
    effects = effects_of_imports([f"offender{i}" for i in range(6)], tmp_path, tmp_path / "cwd")
    assert [bool(effect) for effect in effects.values()] == [True] * 5 + [False]


# ------------------------------------------------------------------------------------------------------------- the options

@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, run_main, tmp_path):
    done = run_main(name, "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr, os.listdir(tmp_path)) == (0, "", [])
    assert ast.get_docstring(parsed(name)).strip() in done.stdout
    kind = importlib.import_module(name[:-3]).Options
    for field in dataclasses.fields(kind):
        shown = f"{field.default:g}" if field.type is float else field.default
        assert f"\n  --{field.name}={shown} " in done.stdout
        assert type(field.default) is field.type and field.type in (bool, int, float, str), f"{name}: {field.name}"
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_wrong_word_exits_2_with_one_line(name, run_main, tmp_path):
    first = dataclasses.fields(importlib.import_module(name[:-3]).Options)[0].name
    done = run_main(name, f"--{first}x=1", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{name}: ") and done.stderr.count("\n") == 1 and f"--{first}=" in done.stderr
    assert os.listdir(tmp_path) == []


TOY = '''"""A toy."""
import argparse, contextlib, dataclasses, difflib, inspect, os, re, sys, textwrap
from pathlib import Path
from typing import BinaryIO, Callable, Iterator
@dataclasses.dataclass
class Base:
    tokens: int = 5  # how many tokens
@dataclasses.dataclass
class Options(Base):
    lr: float = 1e-3  # how fast
    compile: bool = True  # compile it
    prompt: str = "# no: comment"  # what to say: anything
@dataclasses.dataclass
class Bare:
    lr: float = 1e-3
'''


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A module with the house's option function and dataclasses of its own."""
    if not SCRIPTS:
        pytest.skip("no script yet")
    path = tmp_path_factory.mktemp("toy") / "toy.py"
    path.write_text(TOY + next(iter(versions()["options"])) + "\n" + next(iter(versions()["run"])) + "\n")
    spec = importlib.util.spec_from_file_location("toy", path)
    module = sys.modules["toy"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("words, name, value", [
    ("", "tokens", 5), ("--tokens=1e9", "tokens", 10 ** 9), ("--tokens=-3", "tokens", -3), ("--lr=1", "lr", 1.0),
    ("--lr=1 --lr=2", "lr", 2.0), ("--compile", "compile", True), ("--compile=False", "compile", False),
    ("--compile=true", "compile", True), ("--compile=False --compile", "compile", True), ("--prompt=a=b", "prompt", "a=b"),
    ("--prompt=", "prompt", ""), ("--prompt=--lr=3", "prompt", "--lr=3"), ("--prompt=a#b", "prompt", "a#b"),
    ("", "prompt", "# no: comment")])
def test_option_values(toy, words, name, value):
    found = getattr(toy.options(toy.Options, words.split()), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("words, message", [
    ("--token=3", "--tokens="), ("--tkens=3", "--tokens="), ("--Lr=3", "--lr="), ("stray", "'stray'"), ("-lr=3", "--lr="),
    ("--tokens 3", "--tokens=3"), ("--prompt hello", "--prompt=hello"), ("--compile False", "--compile=False"),
    ("--tokens=many", "int"), ("--tokens=1.5", "int"), ("--tokens=inf", "int"), ("--lr=fast", "float"), ("--lr=nan", "float"),
    ("--lr=inf", "float"), ("--compile=2", "bool"), ("--tokens=", "int"), ("--tokens", "--tokens: expected one"),
    ("--lr", "--lr: expected one"), ("--prompt --lr=1", "--prompt: expected one"), ("--prompt", "--prompt: expected one"),
    ("--tok=1", "--tokens="), ("--", "--")])
def test_option_refusals(toy, words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        toy.options(toy.Options, words.split())
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err.count("\n")) == (2, "", 1) and message in err, err


def test_option_help_and_comments(toy, capsys):
    with pytest.raises(SystemExit) as caught:
        toy.options(toy.Options, ["--lr=1", "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert re.search(r"\n  --tokens=5 +how many tokens\n  --lr=0.001 +how fast\n", out) and "what to say: anything" in out
    with pytest.raises(KeyError):  # a field without a comment is a mistake of the script's author
        toy.options(toy.Bare, [])


def test_run_turns_errors_into_one_line(toy, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["folder/toy.py"])
    for error, code in [(ValueError("bad"), "toy.py: bad"), (FileNotFoundError("gone"), "toy.py: gone"), (KeyboardInterrupt(), 130)]:
        def fail():
            raise error
        with pytest.raises(SystemExit) as caught:
            toy.run(fail)
        assert caught.value.code == code
    with pytest.raises(ZeroDivisionError):  # our own mistakes keep their traceback
        toy.run(lambda: 1 / 0)


# ----------------------------------------------------------------------------------------------------------- the copy test

def ready_tokens(folder, vocab=300):
    """A folder of ready token files: a counting sequence that a model can learn."""
    folder.mkdir()
    tokens = (np.arange(4000) % vocab).astype(np.uint16)
    np.save(folder / "train.npy", tokens)
    np.save(folder / "val.npy", tokens[:700])


# script -> (the files beside it, the words of a tiny run, a file that it must leave behind or a text that it must print)
COPIES = {
    "bpe.py": ("", ["--input=corpus.txt", "--vocab_size=300", "--output=tok.json"], "tok.json"),
    "data.py": ("bpe", ["--input=corpus.txt", "--separator=<|endoftext|>", "--vocab_size=300", "--output=tokens"], "tokens/val.npy"),
    "model.py": ("", [], "parameters"),
    "train.py": ("model", ["--data=ready", "--output=out", *TINY_MODEL], "out/ckpt.pt"),
    "ddp.py": ("", ["--plan"], "MFU"),
    "kernels.py": ("", ["--only=add", "--seconds=0.01", "--device=cpu"], "forward"),
    "scaling.py": ("model", ["--fit=runs.csv"], "scaling/fit.json"),
    "sample.py": ("model bpe", ["--ckpt=trained/ckpt.pt", "--prompt=the ", "--device=cpu"], "the "),
    "align.py": ("model bpe sample train", ["--algorithm=sft", "--ckpt=trained/ckpt.pt", "--data=chats.jsonl", "--output=tuned",
                                            "--max_iters=2", "--max_new_tokens=4", "--device=cpu"], "tuned/ckpt.pt"),
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory, run_script):
    """(folder, [(words, what came of them)]): the README's quick start at tiny size, run once where all scripts are copied."""
    folder, done = tmp_path_factory.mktemp("quick"), []
    for name in SCRIPTS:
        shutil.copy(ROOT / name, folder / name)
    commands = quick_start((ROOT / "README.md").read_text(encoding="utf-8"))
    # Files that the commands name stand ready: any text does.
    text = "<|endoftext|>".join(tiny_documents())
    for name in {"corpus.txt", *re.findall(r"[\w/.-]+\.txt", json.dumps(commands))}:
        (folder / name).write_text(text, encoding="utf-8")
    for words in commands:
        assert words[0] in TINY, f"add a row for {words[0]} to TINY"
        done.append((words, run_script(*tiny_command(words), cwd=folder, root=folder)))
    return folder, done


@pytest.fixture(scope="module")
def trained(quick):
    """The folder of the quick start's tiny run of train.py on text: its checkpoint holds a tokenizer."""
    return quick[0] / "out"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_copied_alone_runs(name, tmp_path, run_script, request):
    assert name in COPIES, f"add a row for {name} to COPIES"
    beside, words, left = COPIES[name]
    if "trained/" in " ".join(words):
        shutil.copytree(request.getfixturevalue("trained"), tmp_path / "trained")
    for file in [name, *(f"{other}.py" for other in beside.split())]:
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "corpus.txt").write_text("<|endoftext|>".join(tiny_documents()), encoding="utf-8")
    ready_tokens(tmp_path / "ready")
    rows = [f"{N},{D},{2 + 60 / N**0.3 + 300 / D**0.4}" for N in (10**5, 10**6, 10**7) for D in (10**7, 10**8, 10**9)]
    (tmp_path / "chats.jsonl").write_text('{"prompt": "the", "response": "model"}\n' * 20)
    (tmp_path / "runs.csv").write_text("\n".join(["N,D,loss", *rows]))
    # what torch.compile makes of the kernels' twins is a matter of test_kernels.py, and takes 15 s
    done = run_script(name, *words, cwd=tmp_path, root=tmp_path, env={"TORCH_COMPILE_DISABLE": "1"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / left).is_file() or left in done.stdout, done.stdout


# ---------------------------------------------------------------------------------------- the README's quick-start commands

# What makes a command tiny: words that are always added, and words that are added where the command names no such option.
TINY = {"train.py": (TINY_MODEL, ["--data=corpus.txt", "--tokenizer=char"]), "sample.py": (["--device=cpu"], []),
        "bpe.py": (["--vocab_size=300"], ["--input=corpus.txt"]), "data.py": (["--vocab_size=300"], ["--input=corpus.txt"]),
        "model.py": ([], [])}


def quick_start(text):
    """The `python script.py ...` commands in the fenced blocks of README's section "Quick start"."""
    section = re.search(r"^(#+) *quick.?start.*?\n(.*?)(?=^\1 |\Z)", text, re.I | re.M | re.S)
    blocks = re.findall(r"^```\w*\n(.*?)^```", section[2], re.M | re.S) if section else []
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [part.split("  #")[0].strip() for line in lines for part in line.lstrip("$ ").split("&&")]
    return [shlex.split(command)[1:] for command in commands if re.match(r"python3? \S+\.py", command)]


def tiny_command(words):
    always, otherwise = TINY[words[0]]
    names = {word.split("=")[0] for word in words}
    return [*words, *always, *(word for word in otherwise if word.split("=")[0] not in names)]


def test_quick_start_is_found():
    text = "# T\n## Quick start\n```\npip install x && python train.py\n```\nwords\n```bash\n$ python sample.py \\\n  --prompt=\"a b\"  # c\n```\n## Next\n```\npython no.py\n```\n"
    assert quick_start(text) == [["train.py"], ["sample.py", "--prompt=a b"]]
    assert quick_start(text.replace("Quick", "Slow")) == []
    assert tiny_command(["bpe.py", "--input=a"]) == ["bpe.py", "--input=a", "--vocab_size=300"]


def test_readme_quick_start_runs(quick):
    folder, done = quick
    assert any(words[0] == "train.py" for words, _ in done), "README's section Quick start has no `python train.py`"
    for words, process in done:
        assert process.returncode == 0, f"python {' '.join(words)}: {process.stderr}"
        assert process.stdout.strip()


# ------------------------------------------------------------------------------------------------------- words and examples

TEXT = {".py", ".md", ".toml", ".txt", ".json", ".ini", ".cfg", ".sh", ".yml", ""}
# Paths of one machine and numbers of a tracker mean nothing to a reader. (Written so that this file does not contain them.)
FORBIDDEN = re.compile(r"/(?:work|root)/|/tmp/(?!\*)\w|\bissues? #?\d|\.\./" + r"shared", re.I)


def project_files(root=ROOT):
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in {".git", "data", "__pycache__"} and not name.startswith(("out", ".venv", ".pytest", ".ruff", ".mypy"))]
        files = [name for name in files if name != ".git"]  # a worktree's is a file
        yield from (os.path.join(folder, name) for name in files if os.path.splitext(name)[1] in TEXT)


TOP = {*SCRIPTS, "LICENSE", "CHANGES.md", "README.md", "pyproject.toml", "requirements.txt", ".gitignore", ".ci", "plots", "tests"}


def strangers(names):
    """Tracked files that have no place in the house, such as what a test or a run left behind."""
    return [name for name in names if name.split("/")[0] not in TOP or name.endswith((".jsonl", ".pt", ".npy", ".whl"))]


def test_no_file_is_there_by_accident():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is no clone")
    assert strangers(done.stdout.splitlines()) == []
    assert strangers(["runs/a/log.jsonl", "lock", "torch.whl", "tests/out.pt", "train.py", "tests/test_repo.py"]) == [
        "runs/a/log.jsonl", "lock", "torch.whl", "tests/out.pt"]


def forbidden_words(root=ROOT):
    out = []
    for path in project_files(root):
        for number, line in enumerate(open(path, encoding="utf-8", errors="replace"), 1):
            allowed = os.path.relpath(path, root) == os.path.join(".ci", "run") and "TEST_DATA" in line
            if FORBIDDEN.search(line) and not allowed and "FORBIDDEN = " not in line:
                out.append(f"{os.path.relpath(path, root)}:{number}: {line.strip()}")
    return out


def test_no_file_mentions_a_workplace(tmp_path):
    assert forbidden_words() == []
    for i, line in enumerate(["see /wo" + "rk/main", "as iss" + "ue 3 says", "../sha" + "red/data", "/tm" + "p/house"]):
        (tmp_path / f"{i}.md").write_text(line)
    assert len(forbidden_words(tmp_path)) == 4


@pytest.mark.parametrize("name", SCRIPTS)
def test_docstring_examples(name):
    found = doctest.testmod(importlib.import_module(name[:-3]))
    assert found.failed == 0


def test_ruff_finds_nothing(tmp_path):
    """With the rules of pyproject.toml; and it does find an unused name in a file of the same folder (the twin)."""
    pytest.importorskip("ruff", reason="ruff is not installed")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "new.py").write_text("import os\n")
    for folder, code in ((ROOT, 0), (tmp_path, 1)):
        done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", folder], text=True, capture_output=True)
        assert done.returncode == code, done.stdout


def test_tables_can_be_drawn():
    """README holds a table for each picture that plot_tables.py makes of one, and shows the picture."""
    import plot_tables
    assert doctest.testmod(plot_tables).failed == 0
    readme = (ROOT / "README.md").read_text()
    found = {plot_tables.NAMES.get(first): (label, rows) for first, label, rows in plot_tables.tables(readme)}
    assert {*found} >= {*plot_tables.NAMES.values()}
    for name in plot_tables.NAMES.values():
        label, rows = found[name]
        assert f"plots/{name}.png" in readme and label.startswith("bits per byte") and len(rows) > 5
        assert all(1 < low <= middle <= high < 5 for _, middle, low, high in rows)


@pytest.mark.slow  # half a minute
def test_mypy_finds_nothing(tmp_path):
    """With the settings of pyproject.toml; and it does find an argument of the wrong type in a call of a public function (the twin)."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    for name in ("pyproject.toml", *CEILING):
        shutil.copy(ROOT / name, tmp_path)
    for folder, code in ((ROOT, 0), (tmp_path, 1)):
        if code:
            with open(tmp_path / "bpe.py", "a") as file:
                file.write('\n\nload(7)\n')
        done = subprocess.run([sys.executable, "-m", "mypy", f"--cache-dir={tmp_path}/cache"], text=True, capture_output=True, cwd=folder)
        assert done.returncode == code, done.stdout


def test_results_can_be_made_again():
    """Each command beside a figure names files that are there; what a reader has to put in is known, and nothing else."""
    import bench
    found = bench.rows((ROOT / "README.md").read_text())
    assert len(found) > 30 and len({command for command, _ in found}) == len(found)
    for command, _ in found:
        for path in re.findall(r"[\w/]+\.py\b", command):
            assert (ROOT / path).is_file(), command
    table = "## Results\n| what | command |\n|---|---|\n| a `b` | `time python x.py --a=NEWS` |\n| c | the same |\n\n## Licence\n| d | `python y.py` |\n"
    assert bench.rows("# T\n" + table) == [("time python x.py --a=NEWS", "a `b`")]
    assert bench.filled("python x.py --a=NEWS val.npy", {"val.npy": "HOUSE/val.npy"}) == ("python x.py --a=NEWS HOUSE/val.npy", ["NEWS"])
