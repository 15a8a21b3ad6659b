"""The README's path at tiny size: a crawl, its documents and tokens, a model, its grades, an aligned model, its words."""
import json
import re
import textwrap

import pytest

import data

HELD = "colorsys"
MODULES = ("textwrap", "string", "shlex", "colorsys", "bisect", "heapq", "fnmatch", "glob", "keyword", "sched", "abc")


@pytest.fixture
def crawl(tmp_path, monkeypatch):
    """A crawl of some modules."""
    monkeypatch.setattr(data, "documented_modules", lambda: map(__import__, MODULES))
    data.write_crawl(tmp_path / "crawl")
    return tmp_path / "crawl"


def test_modules_are_those_of_the_library_and_one_level_below():
    names = [module.__name__ for module in data.documented_modules()]
    assert len(set(names)) == len(names) > 200 and {"json", "json.decoder", "os.path", "textwrap"} - {"os.path"} <= set(names)
    assert not {name.partition(".")[0] for name in names} & data.NOT_IMPORTED and not any("._" in name for name in names)


def test_a_crawl_is_read_as_any_other(crawl, capsys):
    records = list(data.read_warc(crawl / "pages.warc.gz"))
    urls = [headers["WARC-Target-URI"] for headers, _ in records]
    assert [url for url in urls if "docs" in url] == [f"https://docs.example/{name}.html" for name in MODULES if name != HELD]
    assert sum("mirror" in url for url in urls) == sum("shop" in url for url in urls) == 2
    page = dict(zip(urls, (payload.decode() for _, payload in records)))["https://docs.example/textwrap.html"]
    text = data.extract(page)
    first = textwrap.dedent.__doc__.split("\n")[0].strip()
    assert first in text and "cookies" in page and not re.search("cookies|Sign in|You may also like", text)


def test_conversations_are_what_the_documentation_says(crawl):
    rows = [json.loads(line) for line in (crawl / "chats.jsonl").read_text().splitlines()]
    assert dict(prompt="What does textwrap.dedent do?", response="Remove any common leading whitespace from every line in `text`.") in rows
    assert len({row["prompt"] for row in rows}) == len(rows) > 20 and all(row["response"].endswith(".") for row in rows)
    assert not any("_" == row["prompt"].rpartition(".")[2][0] for row in rows)


def test_copies_and_empty_pages_do_not_stay(crawl, tmp_path, run_main):
    run_main("data.py", f"--input={crawl / 'pages.warc.gz'}", f"--steps={','.join(data.PATH)}", f"--eval_data={crawl / 'held'}",
             "--vocab_size=300", "--workers=1", cwd=tmp_path)
    kept = [json.loads(line) for line in (tmp_path / "data/documents.jsonl").read_text().splitlines()]
    lost = [json.loads(line) for line in (tmp_path / "data/removed.jsonl").read_text().splitlines()]
    assert len(kept) + len(lost) == len(MODULES) - 1 + 4 and not any("Buy now" in row["text"] for row in kept)
    assert sum("near copy" in json.dumps(row) for row in lost) == 2


def test_the_path(crawl, tmp_path, run_forked):
    def go(*words):
        done, = run_forked(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    steps = ",".join(data.PATH)
    said = go("data.py", "--input=crawl/pages.warc.gz", f"--steps={steps}", "--eval_data=crawl/held", "--vocab_size=300", "--workers=1")
    assert "next: python train.py --data=data" in said
    said = go("train.py", "--data=data", "--max_iters=4", "--n_embd=32", "--block_size=64", "--ngram=0", "--eval_tokens=500")
    assert "next: python sample.py --ckpt=out/ckpt.pt" in said
    said = go("sample.py", "--eval=ppl", "--eval_data=crawl/held")
    assert re.search(r"ppl.*bits", said), said
    said = go("align.py", "--algorithm=sft", "--data=crawl/chats.jsonl", "--max_iters=2", "--batch_size=4", "--eval_interval=2")
    said = re.search("next: python (.*)", said)[1]
    assert said.startswith("sample.py --ckpt=aligned/ckpt.pt --chat"), said
