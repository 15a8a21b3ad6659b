"""README's table of the course: each command at tiny size, in the order of the table, in one folder."""
import re

import pytest
from conftest import ROOT

import data

MODULES = ("textwrap", "string", "shlex", "colorsys", "bisect", "heapq", "fnmatch", "glob", "keyword", "sched", "abc")
SMALL = "--n_layer=1 --n_embd=16 --block_size=32 --batch_size=4 --ngram=0 --sample_tokens=0 --vocab_size=300 --tokenizer=bpe --device=cpu"
# words before a command's own, which count more, and words behind, which count most
TINY = {"train.py": (f"--data=corpus.txt {SMALL}", "--max_iters=6 --eval_interval=3 --eval_tokens=256"), "model.py": ("", "--n_layer=2 --block_size=64"),
        "bpe.py": ("", ""), "sample.py": ("", ""), "data.py": ("--workers=1 --vocab_size=300", ""), "scaling.py": ("--data=out", "--plan")}
ELSEWHERE = {"python ddp.py": "test_ddp.py", "python kernels.py --only=softmax,rmsnorm": "test_kernels.py", "python align.py": "test_align.py"}
SEEN = {  # what one sees, as far as so small a run shows it
    "bpe.py": r"\nword .*\n512 .*\n1024 ", "train.py --mixer": r"cache +\d", "model.py": "gain", "train.py --optimizer": "step +6: ", "train.py --resume": "going on from step 6",
    "sample.py --bench": r"\n +64 ", "train.py --teacher": "step +6: ", "scaling.py": "", "data.py --crawl": "next: python data.py", "data.py --input=crawl": "near copy|dedup",
    "sample.py --eval": r"bits_per_byte: .*\n.*perplexity", "data.py --input=README": "tokens", "train.py --data=data,": "data, data-other: ",
}


def course() -> list[str]:
    """The commands of the table, those of prose (the branch above, what a command prints) in their place."""
    readme = (ROOT / "README.md").read_text()
    table = readme.partition("\n## The course\n")[2].partition("\nWhat a course")[0]
    branch = re.search(r"python train\.py --resume .*--decay_from.*", readme)[0]
    cells = [line.split(" | ")[2] for line in table.splitlines() if line.startswith("| ")]
    return [command for cell in cells for command in [*re.findall(r"`(python \w+\.py[^`]*)`", cell), *[branch] * ("the branch above" in cell)]]


@pytest.mark.usefixtures("accounts_once")
def test_each_command_of_the_course(tmp_path, corpus, run_main, monkeypatch):
    monkeypatch.setattr(data, "documented_modules", lambda: map(__import__, MODULES))
    for name in ("README.md", "model.py"):
        (tmp_path / name).write_text((ROOT / name).read_text()[:12000])
    commands, seen = [*course()], set()
    assert len(commands) > 14
    commands.insert(0, "python train.py")  # which the course begins with
    for command in commands:
        if command in ELSEWHERE:
            script = command.split()[1]
            assert script in (ROOT / "tests" / ELSEWHERE[command]).read_text()
            continue
        _, script, *words = command.replace("--decay_from=1600 --max_iters=2400", "--decay_from=6").split()
        before, after = TINY[script]
        if "--resume" in words:
            before, after = "", "--max_iters=8"
        if any(word.startswith("--data=data,") for word in words):
            before = before.replace("--vocab_size=300 ", "")
        done = run_main(script, *before.split(), *words, *after.split(), cwd=tmp_path)
        assert done.returncode == 0, (command, done.stderr)
        name = next((name for name in SEEN if f"{script} {' '.join(words)}".startswith(name)), None)
        if name:
            assert re.search(SEEN[name], done.stdout), (command, done.stdout)
            seen.add(name)
        if "--crawl=crawl" in words:  # "then the command it prints"
            commands.insert(commands.index(command) + 1, re.search("next: (python .*)", done.stdout)[1])
    assert seen == {*SEEN}
