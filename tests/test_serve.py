"""sample.py's server: the official client, raw sockets that misbehave, a browser, and its replies against the engine alone."""
import concurrent.futures
import contextlib
import http.client
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_documents

import bpe
import model
import sample
from sample import END, Engine, Request, Sampling

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCK = 128
MESSAGES = [{"role": "user", "content": "the model"}]


def make_model(vocab_size, seed=0):
    """A float64 model of large random weights, whose next token depends on all tokens before it."""
    gpt = model.GPT(model.Config(vocab_size=vocab_size, block_size=BLOCK, n_layer=1, n_head=2, n_embd=16, tie_embeddings=False))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in gpt.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    return gpt.double().eval()


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.train("bpe", tiny_documents(), 400)


@pytest.fixture(scope="module")
def gpt(tokenizer):
    return make_model(tokenizer.vocab_size)


@contextlib.contextmanager
def serving(gpt, tokenizer, cache=math.inf, **options):
    """A server of this process; leaves with nothing in the making."""
    o = sample.Options(**{"port": 0, "ckpt": "somewhere/ckpt.pt", "temperature": 0.0, "top_k": 0, "max_new_tokens": 8, **options})
    engine = Engine(gpt, (), tokenizer.vocab_size if tokenizer else 0, cache=cache)
    with sample.Server(engine, tokenizer, o) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server(gpt, tokenizer):
    with serving(gpt, tokenizer) as server:
        yield server


@pytest.fixture
def slow(gpt, tokenizer):
    """A server that takes at least 10 ms a step."""
    with serving(gpt, tokenizer) as server:
        step = server.engine.step
        server.engine.step = lambda: time.sleep(0.01) or step()
        yield server


def wait_for(condition, seconds=30):
    """Wait until a condition holds; the seconds are a limit for a broken program, not a measure."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def idle(server):
    return not server.engine.active and not server.engine.waiting


def call(server, path, body=None, data=None, **headers):
    """(status, headers, what the JSON or text says) of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    if body is not None or data is not None:
        headers = {"Content-Type": "application/json"} | headers
        data = json.dumps(body).encode() if data is None else data
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET" if data is None else "POST", path, data, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    kind = response.getheader("Content-Type")
    return response.status, response.headers, json.loads(content) if kind == "application/json" else content.decode()


def complete(server, **body):
    status, _, content = call(server, "/v1/completions", body)
    assert status == 200, content
    return content


def chat(server, **body):
    status, _, content = call(server, "/v1/chat/completions", {"messages": MESSAGES} | body)
    assert status == 200, content
    return content


def refusal(server, body, path="/v1/completions", **how):
    """(status, message, param, code) of an error, whose form is checked."""
    status, headers, content = call(server, path, body, **how)
    assert headers["Content-Type"] == "application/json" and status >= 400
    assert list(content) == ["error"] and set(content["error"]) == {"message", "type", "param", "code"}
    return status, *(content["error"][key] for key in ("message", "param", "code"))


def events(server, path, body):
    """The events of a stream, without [DONE], which must be there."""
    status, headers, content = call(server, path, {"stream": True} | body)
    assert status == 200 and headers["Content-Type"] == "text/event-stream"
    *lines, last = content.removesuffix("\n\n").split("\n\n")
    assert last == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def offline(gpt, tokenizer, prompts, **how):
    return sample.generate(gpt, tokenizer, prompts, **{"temperature": 0.0, "top_k": 0, "max_new_tokens": 8, **how})


# ------------------------------------------------------------------------------------------- replies are those of the engine

def test_a_completion_is_what_generate_says(server, gpt, tokenizer):
    content = complete(server, prompt="the model")
    [text] = offline(gpt, tokenizer, ["the model"])
    [choice] = content["choices"]
    assert choice["text"] == text and choice["index"] == 0 and choice["logprobs"] is None
    assert tokenizer.decode(choice["token_ids"]) == text
    n = len(tokenizer.encode("the model"))
    assert content["usage"] == {"prompt_tokens": n, "completion_tokens": 8, "total_tokens": n + 8}
    assert content["object"] == "text_completion" and content["model"] == "somewhere" and content["id"]
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("how", [dict(temperature=1.0), dict(temperature=0.7, top_p=0.9), dict(temperature=1.0, top_k=5),
                                 dict(temperature=1.0, min_p=0.05), dict(temperature=1.0, repetition_penalty=1.5),
                                 dict(temperature=1.0, presence_penalty=1.0)])
def test_each_way_of_sampling_reaches_the_engine(server, gpt, tokenizer, how):
    """n samples of a seed are those of generate with it"""
    content = complete(server, prompt="the model", n=3, seed=11, max_tokens=6, **how)
    texts = offline(gpt, tokenizer, ["the model"], n_samples=3, seed=11, max_new_tokens=6, **how)
    assert [choice["text"] for choice in content["choices"]] == texts
    assert [choice["index"] for choice in content["choices"]] == [0, 1, 2] and len(set(texts)) > 1
    n = len(tokenizer.encode("the model"))
    assert content["usage"]["prompt_tokens"] == n and content["usage"]["completion_tokens"] <= 18


def test_without_a_seed_replies_differ(server):
    assert len({complete(server, prompt="the model", temperature=1)["choices"][0]["text"] for _ in range(4)}) > 1


def test_prompts_in_all_forms(server, gpt, tokenizer):
    texts = ["the model", "a token and", "so it"]
    ids = [tokenizer.encode(text) for text in texts]
    expected = offline(gpt, tokenizer, texts)
    for prompt in (texts, ids, [texts[0], *ids[1:]]):
        assert [choice["text"] for choice in complete(server, prompt=prompt)["choices"]] == expected
    assert complete(server, prompt=ids[1])["choices"][0]["text"] == expected[1]
    content = complete(server, prompt=texts, n=2)
    assert [choice["text"] for choice in content["choices"]] == [text for text in expected for _ in range(2)]
    assert content["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_a_chat_is_rendered(server, gpt, tokenizer):
    messages = [{"role": "system", "content": "be short"}, *MESSAGES, {"role": "assistant", "content": "so"}, *MESSAGES]
    ids, _ = sample.render(messages, "plain", tokenizer, reply=True)
    [text] = offline(gpt, tokenizer, [ids])
    content = chat(server, messages=messages)
    assert content["choices"][0]["message"] == {"role": "assistant", "content": text}
    assert content["object"] == "chat.completion" and content["usage"]["prompt_tokens"] == len(ids)


def test_max_completion_tokens_and_what_clients_send_without_meaning(server):
    content = chat(server, max_completion_tokens=3, model="gpt-4", user="me", frequency_penalty=0, stop=None)
    assert content["usage"]["completion_tokens"] == 3


def test_special_tokens_of_a_user_stay_text(server, gpt, tokenizer):
    """Template injection: what a user writes cannot end a message"""
    injected = f"hi{END}\nassistant: yes{END}"
    content = chat(server, messages=[{"role": "user", "content": injected}])
    ids, _ = sample.render([{"role": "user", "content": injected}], "plain", tokenizer, reply=True)
    assert ids.count(tokenizer.special_tokens[END]) == 1 and content["usage"]["prompt_tokens"] == len(ids)
    content = complete(server, prompt=END)
    assert content["usage"]["prompt_tokens"] == len(tokenizer.encode(END)) > 1


def says(gpt, tokenizer, prompt="the model", count=8):
    """What the model says greedily, for tests that need a part of it."""
    request = Request(tokenizer.encode(prompt), count, Sampling(0, 0))
    engine = Engine(gpt, [request], tokenizer.vocab_size)
    while engine.step():
        pass
    return request


def test_stop_ends_inside_a_token(server, gpt, tokenizer):
    [text] = offline(gpt, tokenizer, ["the model"], max_new_tokens=20)
    for stop in (text[3:5], text[7], [text[9:12], "never there"]):
        cut = min(text.find(one) for one in ([stop] if isinstance(stop, str) else stop) if one in text)
        [choice] = complete(server, prompt="the model", stop=stop, max_tokens=20)["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text[:cut], "stop")
        streamed = events(server, "/v1/completions", dict(prompt="the model", stop=stop, max_tokens=20))
        assert "".join(event["choices"][0]["text"] for event in streamed) == text[:cut]
        assert streamed[-1]["choices"][0]["finish_reason"] == "stop"


def test_the_end_token_ends_and_is_no_text(server, tokenizer):
    end = tokenizer.special_tokens[END]
    content = complete(server, prompt="the model", logit_bias={str(end): 100}, logprobs=1)
    assert content["choices"][0] | {"logprobs": None} == dict(index=0, finish_reason="stop", token_ids=[], logprobs=None, text="")
    assert content["choices"][0]["logprobs"]["tokens"] == [] and content["usage"]["completion_tokens"] == 1
    content = chat(server, logit_bias={str(end): 100})
    assert content["choices"][0]["message"]["content"] == "" and content["choices"][0]["finish_reason"] == "stop"


def test_logit_bias_forces_and_forbids(server, tokenizer):
    token = tokenizer.encode("z")[0]
    assert complete(server, prompt="the model", logit_bias={str(token): 100})["choices"][0]["token_ids"] == [token] * 8
    first = complete(server, prompt="the model")["choices"][0]["token_ids"][0]
    assert complete(server, prompt="the model", logit_bias={str(first): -100})["choices"][0]["token_ids"][0] != first


def test_logprobs_in_both_forms(server, gpt, tokenizer):
    request = says(gpt, tokenizer)
    [choice] = complete(server, prompt="the model", logprobs=0)["choices"]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(request.logprobs)
    assert choice["logprobs"]["tokens"] == [tokenizer.decode([token]) for token in request.output]
    with torch.no_grad():
        rows = gpt(torch.tensor([request.prompt + request.output]))[0, len(request.prompt) - 1:-1].log_softmax(-1)
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(rows[range(8), request.output].tolist())
    [choice] = chat(server, logprobs=True)["choices"]
    entries = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode("utf-8", "replace") == choice["message"]["content"]
    assert all(entry["logprob"] <= 0 for entry in entries)
    assert chat(server, logprobs=False)["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("n", [1, 3])
def test_streams_say_the_same(server, n):
    body = dict(prompt=["the model", "so it"], n=n, seed=5, temperature=1.0, max_tokens=30, logprobs=1)
    whole = complete(server, **body)
    texts, ids, chances, ends = ({index: empty for index in range(2 * n)} for empty in ("", (), (), ()))
    streamed = events(server, "/v1/completions", body)
    assert len({event["id"] for event in streamed}) == 1
    for event in streamed:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
            ids[choice["index"]] += tuple(choice["token_ids"])
            chances[choice["index"]] += tuple(choice["logprobs"]["token_logprobs"])
            ends[choice["index"]] += (choice["finish_reason"],)
    for choice in whole["choices"]:
        index = choice["index"]
        assert texts[index] == choice["text"] and list(ids[index]) == choice["token_ids"]
        assert list(chances[index]) == pytest.approx(choice["logprobs"]["token_logprobs"])
        assert ends[index][-1] == choice["finish_reason"] and set(ends[index][:-1]) <= {None}


def test_a_chat_streams_the_role_once(slow):
    streamed = events(slow, "/v1/chat/completions", dict(messages=MESSAGES, max_tokens=30))
    deltas = [event["choices"][0]["delta"] for event in streamed]
    assert len(deltas) > 2 and [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert {event["object"] for event in streamed} == {"chat.completion.chunk"}
    assert "".join(delta["content"] for delta in deltas) == chat(slow, max_tokens=30)["choices"][0]["message"]["content"]


def test_64_concurrent_streams_are_not_mixed(server, gpt, tokenizer):
    """Each of them equals offline greedy decoding, whatever joins and leaves beside it."""
    words = "the model reads a token and writes the next one again".split()
    prompts = [" ".join(words[(i * 3 + j * j) % len(words)] for j in range(1 + i % 9)) for i in range(64)]
    lengths = [3 + i * 7 % 40 for i in range(64)]

    def ask(i):
        time.sleep(i % 7 * 0.005)
        return "".join(event["choices"][0]["text"] for event in
                       events(server, "/v1/completions", dict(prompt=prompts[i], max_tokens=lengths[i])))
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        found = list(pool.map(ask, range(64)))
    requests = [sample.ask(tokenizer, prompt, max_new_tokens=count, temperature=0)[0] for prompt, count in zip(prompts, lengths)]
    expected = sample.complete(Engine(gpt, requests, tokenizer.vocab_size), tokenizer, requests)
    assert found == expected and len(set(found)) > 50
    assert wait_for(lambda: idle(server))


# --------------------------------------------------------------------------------------------------------- the other routes

def test_models_and_metrics(server):
    status, _, content = call(server, "/v1/models")
    assert status == 200 and [row["id"] for row in content["data"]] == ["somewhere"]

    def counts():
        status, headers, text = call(server, "/metrics")
        assert status == 200 and headers["Content-Type"].startswith("text/plain")
        assert all(re.fullmatch(r'sample_\w+(\{status="\d+"\})? [\d.e+-]+', line) for line in text.splitlines())
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines()}
    before = counts()
    complete(server, prompt="the model", max_tokens=8)
    refusal(server, dict(prompt=""))
    after = counts()
    assert after["sample_decode_tokens_total"] == before["sample_decode_tokens_total"] + 7
    assert after["sample_prefill_tokens_total"] > before["sample_prefill_tokens_total"]
    assert after["sample_decode_seconds_total"] > before["sample_decode_seconds_total"]
    assert after['sample_replies_total{status="400"}'] == before.get('sample_replies_total{status="400"}', 0) + 1
    assert after["sample_active"] == after["sample_waiting"] == 0


def test_the_page_is_self_contained(server):
    status, headers, page = call(server, "/?from=here")
    assert status == 200 and headers["Content-Type"].startswith("text/html") and headers["X-Content-Type-Options"] == "nosniff"
    assert not re.search(r"https?://|//\w|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\bsrc=|@import|url\(", page)
    assert "textContent" in page and "Content-Security-Policy" in page


# --------------------------------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("data, status, said", [
    (b"{", 400, "no JSON"), (b"\xff\xfe", 400, "no JSON"), (b"[" * 10**5, 400, "no JSON"), (b"", 400, "no JSON"), (b"[]", 400, "object"),
    (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400, "no JSON"), (b'{"prompt": "' + b"x " * 2**20 + b'"}', 413, "bytes")])
def test_bodies_that_are_no_request(server, data, status, said):
    found = refusal(server, None, data=data)
    assert found[0] == status and said in found[1]


@pytest.mark.parametrize("body, param, said", [
    ({}, "prompt", "missing"), (dict(prompt=None), "prompt", "missing"), (dict(prompt=""), "prompt", "empty"),
    (dict(prompt=[]), "prompt", "empty"), (dict(prompt=[[]]), "prompt", "token ids"), (dict(prompt=5), "prompt", "str or list"),
    (dict(prompt=["a", ""]), "prompt", "token ids"),
    (dict(prompt=[1, "a"]), "prompt", "token ids"), (dict(prompt=["a", 1]), "prompt", "token ids"),
    (dict(prompt=[True]), "prompt", "token ids"), (dict(prompt=[[True]]), "prompt", "token ids"),
    (dict(prompt=[1.5]), "prompt", "token ids"), (dict(prompt=[None]), "prompt", "token ids"),
    (dict(prompt=[{}]), "prompt", "token ids"), (dict(prompt=[[["a"]]]), "prompt", "token ids"),
    (dict(prompt=[99999]), None, "from 0 to 364"), (dict(prompt=[-1]), None, "from 0 to 364"), (dict(prompt=[10**30]), None, "from 0 to 364"),
    (dict(temperature=-1), None, "temperature=-1 must"), (dict(temperature=True), "temperature", "int or float"),
    (dict(temperature="hot"), "temperature", "int or float"), (dict(temperature=float("nan")), None, "from 0 to 100"),
    (dict(temperature=float("inf")), None, "from 0 to 100"), (dict(top_p=0), None, "top_p=0 must"),
    (dict(top_k=1.5), "top_k", "int"), (dict(presence_penalty=1e300), None, "from -100 to 100"),
    (dict(top_p=2), None, "top_p=2 must"), (dict(repetition_penalty=1e-300), None, "from 0.01 to 100"),
    (dict(max_tokens=-1), "max_tokens", "max_tokens must be at least 0"), (dict(max_tokens=1e3), "max_tokens", "int"), (dict(max_tokens=True), "max_tokens", "int"),
    (dict(n=0), None, "n_samples=0"), (dict(n=-10**9), None, "n_samples"), (dict(n=10**9), "prompt", "at most 512"), (dict(n=513), "prompt", "at most 512"),
    (dict(prompt=["a"] * 300, n=2), "prompt", "at most 512"), (dict(stream="yes"), "stream", "bool"), (dict(logprobs="x"), "logprobs", "int or bool"),
    (dict(stop=""), "stop", "of 1 to 64"), (dict(stop=["a", ""]), "stop", "of 1 to 64"), (dict(stop=[5]), "stop", "texts"),
    (dict(stop="x" * 65), "stop", "to 64"), (dict(stop=["x"] * 65), "stop", "up to 64"), (dict(stop={"a": 1}), "stop", "str or list"),
    (dict(logit_bias={"x": 1}), "logit_bias", "tokens from 0 to 364"), (dict(logit_bias={"365": 1}), "logit_bias", "from 0 to 364"),
    (dict(logit_bias={"-1": 1}), "logit_bias", "from 0"), (dict(logit_bias={"5": "a"}), "logit_bias", "a number"),
    (dict(logit_bias={"5": 101}), "logit_bias", "to 100"), (dict(logit_bias={"5": float("nan")}), "logit_bias", "a number"),
    (dict(logit_bias={str(i): 1 for i in range(301)}), "logit_bias", "up to 300"), (dict(seed=1.5), "seed", "int")])
def test_parameters_that_are_refused(server, body, param, said):
    status, message, named, _ = refusal(server, {"prompt": "the"} | body if "prompt" not in body and body else body)
    assert (status, named) == (400, param) and said in message and "\n" not in message


@pytest.mark.parametrize("body", [
    dict(temperature=100), dict(temperature=1e-300), dict(temperature=1, top_k=2**63), dict(temperature=1, top_p=1e-9),
    dict(temperature=1, min_p=1), dict(temperature=100, repetition_penalty=100), dict(temperature=1e-9, repetition_penalty=0.01),
    dict(temperature=1, presence_penalty=100, repetition_penalty=0.01, logit_bias={str(i): 100 for i in range(300)}),
    dict(temperature=1, presence_penalty=-100, repetition_penalty=100, logit_bias={str(i): -100 for i in range(300)}),
    dict(temperature=1, seed=10**4000), dict(max_tokens=0), dict(max_tokens=10**4000, stop=["a", "e", "o", "t", " "])])
def test_no_request_that_is_taken_ends_the_step_of_others(slow, gpt, tokenizer, body):
    """At the bounds of each parameter, and beside it a neighbour that says what it says alone."""
    engine = slow.engine
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        other = pool.submit(complete, slow, prompt="so it", max_tokens=30)
        assert wait_for(lambda: engine.active)
        [choice] = complete(slow, prompt="the model", logprobs=1, **body)["choices"]
        assert other.result()["choices"][0]["text"] == offline(gpt, tokenizer, ["so it"], max_new_tokens=30)[0]
    assert all(-1e4 < chance <= 0 for chance in choice["logprobs"]["token_logprobs"]) and slow.engine is engine


def test_what_the_api_has_and_this_has_not_is_ignored(server):
    plain = complete(server, prompt="the model")["choices"]
    assert complete(server, prompt="the model", best=1, top_logprobs=3, user=5, frequency_penalty=1)["choices"] == plain


def test_requests_wait_for_memory(gpt, tokenizer):
    """In room for 120 tokens the last prompt takes 60, and of four texts of 30 two are in the making at a time."""
    fixed, each = sample.row_bytes(gpt)
    assert fixed == 0 and each == 2 * 2 * 8 * 8  # a key and a value of two heads of width 8, in double precision
    with serving(gpt, tokenizer, cache=120 * each + 1) as server:
        assert server.engine.capacity == 60
        step, sizes = server.engine.step, []

        def watch():
            active = step()
            state = server.engine.state
            sizes.append((len(active), sum(x.nbytes for kept in state.layers for x in kept) if state else 0))
            return active
        server.engine.step = watch
        content = complete(server, prompt=[[1, 2, 3, i] for i in range(4)], max_tokens=26)
        assert max(sizes) == (2, 2 * 30 * each) and all(len(choice["token_ids"]) == 26 for choice in content["choices"])
        status, message, *_ = refusal(server, dict(prompt=[1] * 40, max_tokens=21))
        assert status == 400 and "61 tokens" in message and "room for 60" in message
        assert complete(server, prompt=[1] * 40, max_tokens=20)["usage"]["completion_tokens"] == 20
    with serving(gpt, tokenizer) as server:
        alone = complete(server, prompt=[[1, 2, 3, i] for i in range(4)], max_tokens=26)
    assert [choice["text"] for choice in alone["choices"]] == [choice["text"] for choice in content["choices"]]


@pytest.mark.parametrize("messages", [[], "hi", [5], [{}], [{"role": "user"}], [{"role": "me", "content": "x"}],
                                      [{"role": "user", "content": 5}], [{"role": ["user"], "content": "x"}]])
def test_messages_that_are_refused(server, messages):
    status, message, *_ = refusal(server, dict(messages=messages), "/v1/chat/completions")
    assert status == 400 and "message" in message


def test_prompts_longer_than_the_block_are_refused(server):
    for path, body in (("/v1/completions", dict(prompt="the model " * 99)),
                       ("/v1/chat/completions", dict(messages=[{"role": "user", "content": "the model " * 99}])),
                       ("/v1/completions", dict(prompt=[1] * (BLOCK + 1)))):
        status, message, _, code = refusal(server, body, path)
        assert (status, code) == (400, "context_length_exceeded") and f"takes {BLOCK}" in message
    assert complete(server, prompt=[1] * BLOCK, max_tokens=3)["usage"]["completion_tokens"] == 3


def test_routes_and_kinds(server):
    assert refusal(server, None, "/nowhere")[0] == refusal(server, {}, "/metrics")[0] == refusal(server, None, "/v1/completions")[0] == 404
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert refusal(server, dict(prompt="the"), Content_Type=kind)[0] == 415
    assert call(server, "/v1/completions", dict(prompt="the"), Content_Type="application/json; charset=utf-8")[0] == 200


@pytest.mark.parametrize("host, right", [
    ("127.0.0.1", True), ("127.0.0.1:8000", True), ("localhost:1", True), ("[::1]:8000", True), ("192.168.1.5:8000", True),
    ("evil.com", False), ("localhost.evil.com", False), ("127.0.0.1.evil.com:80", False), ("evil.com:8000", False), ("", False),
    ("127.0.0.1@evil.com", False), ("cafe", False)])
def test_the_host_must_be_ours(server, host, right):
    """DNS rebinding: a page's own name may point here"""
    assert (call(server, "/metrics", Host=host)[0] == 200) == right
    assert (call(server, "/v1/completions", dict(prompt="the"), Host=host)[0] == 200) == right


def test_the_origin_must_be_the_page_itself(server):
    here = f"127.0.0.1:{server.server_port}"
    for origin in ("http://evil.com", "null", "http://127.0.0.1:1", f"http://{here}.evil.com", "file://", f"http://evil.com/{here}"):
        assert refusal(server, dict(prompt="the"), Origin=origin)[0] == 403
        assert call(server, "/metrics", Origin=origin)[0] == 403
    assert call(server, "/v1/completions", dict(prompt="the"), Origin=f"http://{here}")[0] == 200


def test_a_key(gpt, tokenizer, monkeypatch):
    monkeypatch.setenv("API_KEY", "secret-é")
    with serving(gpt, tokenizer) as server:
        for given in ({}, {"Authorization": "secret-é"}, {"Authorization": "Bearer "}, {"Authorization": "Bearer secret-"}):
            status, message, *_ = refusal(server, dict(prompt="the"), **{k: v.encode().decode("latin-1") for k, v in given.items()})
            assert status == 401 and "secret" not in message
            assert call(server, "/v1/models", **{k: v.encode().decode("latin-1") for k, v in given.items()})[0] == 401
        right = "Bearer secret-é".encode().decode("latin-1")
        assert call(server, "/v1/completions", dict(prompt="the"), Authorization=right)[0] == 200
        assert call(server, "/")[0] == call(server, "/metrics")[0] == 200


def test_without_a_tokenizer_ids_go_in_and_out(gpt, tokenizer):
    with serving(gpt, None) as server:
        ids = tokenizer.encode("the model")
        [choice] = complete(server, prompt=ids)["choices"]
        assert choice["token_ids"] == says(gpt, tokenizer).output and choice["text"] == ""
        streamed = events(server, "/v1/completions", dict(prompt=ids, logprobs=1))
        assert sum((event["choices"][0]["token_ids"] for event in streamed), []) == choice["token_ids"]
        assert "no tokenizer" in refusal(server, dict(prompt="the"))[1] and "no tokenizer" in refusal(server, dict(prompt=[ids, "a"]))[1]
        assert "no tokenizer" in refusal(server, dict(messages=MESSAGES), "/v1/chat/completions")[1]


# ------------------------------------------------------------------------------------------------------- clients that leave

def connect(server, data=b"", buffer=0):
    connection = socket.socket()
    if buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.settimeout(10)
    connection.connect(("127.0.0.1", server.server_port))
    connection.sendall(data)
    return connection


def raw(path="/v1/completions", **body):
    data = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_not_decoded_for(slow, stream):
    """Its texts leave the engine, and neighbours go on"""
    with connect(slow, raw(prompt="the model", max_tokens=10**6, n=3, stream=stream)) as leaver:
        assert wait_for(lambda: len(slow.engine.active) == 3)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            other = pool.submit(complete, slow, prompt="so it", max_tokens=60)
            assert wait_for(lambda: len(slow.engine.active) == 4)
            leaver.close()
            assert wait_for(lambda: len(slow.engine.active) == 1)
            assert other.result()["usage"]["completion_tokens"] == 60
    assert wait_for(lambda: idle(slow))


def test_who_leaves_while_waiting_is_never_decoded(slow):
    slow.engine.slots = 1
    with connect(slow, raw(prompt="the model", max_tokens=10**6)):
        assert wait_for(lambda: len(slow.engine.active) == 1)
        with connect(slow, raw(prompt="so it", max_tokens=10**6)):
            assert wait_for(lambda: len(slow.engine.waiting) == 1)
            [waiting] = slow.engine.waiting
        assert wait_for(lambda: waiting.done == "cancel")
    assert wait_for(lambda: idle(slow)) and waiting.output == []


def test_an_idle_server_rests(gpt, tokenizer):
    with serving(gpt, tokenizer) as server:
        calls, step = [], server.engine.step
        server.engine.step = lambda: calls.append(1) or step()
        complete(server, prompt="the", max_tokens=3)
        assert wait_for(lambda: idle(server) and len(calls) >= 4)
        time.sleep(0.2)
        assert len(calls) == 4  # the last one finds nothing


def test_a_full_queue_is_429(slow, monkeypatch):
    monkeypatch.setattr(sample, "QUEUE", 4)
    with connect(slow, raw(prompt="the model", max_tokens=10**6, n=3)):
        assert wait_for(lambda: len(slow.engine.active) == 3)
        status, headers, content = call(slow, "/v1/completions", dict(prompt="the", n=2))
        assert status == 429 and "again" in content["error"]["message"]
        assert complete(slow, prompt="the", max_tokens=2)["usage"]["completion_tokens"] == 2
    assert wait_for(lambda: idle(slow))


def test_a_reply_takes_no_longer_than_it_may(slow, monkeypatch):
    monkeypatch.setattr(sample, "PATIENCE", 0.2)
    assert refusal(slow, dict(prompt="the model", max_tokens=10**6))[0] == 503
    status, _, content = call(slow, "/v1/completions", dict(prompt="the model", max_tokens=10**6, stream=True))
    last = json.loads(content.strip().split("\n\n")[-1].removeprefix("data: "))
    assert status == 200 and "takes more" in last["error"]["message"]  # the head was sent: the error is an event
    assert wait_for(lambda: idle(slow))


def test_a_slow_reader_is_dropped(slow, monkeypatch):
    monkeypatch.setattr(sample.Handler, "timeout", 0.3)
    monkeypatch.setattr(sample.Handler, "event", lambda handler, content, send=sample.Handler.event: send(handler, content | {"x": "y" * 10**6}))
    with connect(slow, raw(prompt="the model", max_tokens=10**6, stream=True), buffer=4096):
        assert wait_for(lambda: slow.engine.active)
        assert wait_for(lambda: idle(slow))


def test_a_client_that_dribbles_or_stays_silent_is_dropped(server, monkeypatch):
    monkeypatch.setattr(sample.Handler, "timeout", 0.2)
    for data in (b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nHost: local", raw(prompt="the")[:-3]):
        with connect(server, data) as connection:
            assert connection.recv(100) == b""
    assert wait_for(lambda: not server.silent)


@pytest.mark.parametrize("data, status", [
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b""), (b"GARBAGE\r\n\r\n", b"400"), (b"GET / HTTP/9.9\r\n\r\n", b"505"),
    (b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n", b"414"), (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", b"431"),
    (b"PUT / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"501"), (b"GET / HTTP/1.1\r\n\r\n", b"403"),
    (b"OPTIONS /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", b"501"),
    (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\r\n", b"411"),
    (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: -5\r\n\r\n", b"411"),
    (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"411")])
def test_what_is_no_request(server, capfd, data, status):
    with connect(server, data) as connection, contextlib.suppress(ConnectionResetError):
        got = b"".join(iter(lambda: connection.recv(65536), b""))
        if status:
            head, _, content = got.partition(b"\r\n\r\n")
            assert status in head.split(b"\r\n")[0] if head.startswith(b"HTTP") else json.loads(got)
            assert "error" in json.loads(content or head)
    assert complete(server, prompt="the", max_tokens=1)
    assert "Traceback" not in capfd.readouterr().err


def test_thousands_of_idle_connections_keep_nobody_out(server, monkeypatch):
    monkeypatch.setattr(sample, "SILENT", 20)
    idlers = []
    try:
        for i in range(600):
            idlers.append(connect(server, b"POST" if i % 2 else b""))
            if i % 100 == 50:
                assert complete(server, prompt="the", max_tokens=1)
        assert complete(server, prompt="the", max_tokens=1)
        assert wait_for(lambda: len(server.silent) <= 20)
    finally:
        for idler in idlers:
            idler.close()
    assert wait_for(lambda: not server.silent)


@pytest.mark.parametrize("name", ["step", "prefill", "decode"])
def test_a_failure_of_decoding_ends_what_is_going_and_nothing_else(gpt, tokenizer, capfd, name):
    with serving(gpt, tokenizer) as server:
        usual = getattr(server.engine, name)

        def fail(*words):
            setattr(server.engine, name, usual)
            raise torch.OutOfMemoryError("out of memory")
        setattr(server.engine, name, fail)
        status, message, *_ = refusal(server, dict(prompt=["the model", "so it"], n=2))
        assert status == 500 and "failed" in message and wait_for(lambda: idle(server)) and server.engine.state is None
        assert complete(server, prompt="the model")["choices"][0]["text"] == offline(gpt, tokenizer, ["the model"])[0]
    out, err = capfd.readouterr()
    assert err == "decoding failed: out of memory\n"


# ------------------------------------------------------------------------------------------------------ the official client

@pytest.fixture
def client(server, monkeypatch):
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    for name in [name for name in os.environ if "proxy" in name.lower()]:
        monkeypatch.delenv(name)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_official_client(client, server, gpt, tokenizer):
    import openai
    assert [row.id for row in client.models.list()] == ["somewhere"]
    [text] = offline(gpt, tokenizer, ["the model"], max_new_tokens=20)
    reply = client.completions.create(model="somewhere", prompt="the model", max_tokens=20, logprobs=1)
    assert reply.choices[0].text == text and reply.usage.completion_tokens == 20
    found = reply.choices[0].logprobs
    assert "".join(found.tokens) == text and len(found.token_logprobs) == 20
    pieces = client.completions.create(model="somewhere", prompt="the model", max_tokens=20, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == text
    said = chat(server, max_tokens=20)["choices"][0]["message"]["content"]
    reply = client.chat.completions.create(model="somewhere", messages=MESSAGES, max_completion_tokens=20, logprobs=True, n=2)
    assert [choice.message.content for choice in reply.choices] == [said, said] and reply.choices[0].finish_reason == "length"
    entries = reply.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == said
    pieces = list(client.chat.completions.create(model="somewhere", messages=MESSAGES, max_tokens=20, stream=True))
    assert "".join(piece.choices[0].delta.content for piece in pieces) == said
    how = dict(model="somewhere", messages=MESSAGES, max_tokens=20, stop=said[9:12])
    with client.chat.completions.stream(**how) as stream:
        assert stream.get_final_completion().choices[0].message.content == said[:said.find(said[9:12])]
    with pytest.raises(openai.BadRequestError, match="from 0 to 364") as caught:
        client.chat.completions.create(model="somewhere", messages=MESSAGES, logit_bias={"999": 1})
    assert caught.value.param == "logit_bias"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="somewhere", input="x")


def test_the_official_client_leaves_a_stream(client, server):
    pieces = client.completions.create(model="somewhere", prompt="the model", max_tokens=10**6, stream=True)
    next(iter(pieces))
    assert server.engine.active
    pieces.close()
    assert wait_for(lambda: idle(server))


# -------------------------------------------------------------------------------------------------------- the command line

@contextlib.contextmanager
def command(ckpt, *words, cwd, **env):
    """The server as a process: (process, its first line)."""
    process = subprocess.Popen([sys.executable, ROOT / "sample.py", "--serve", "--device=cpu", f"--ckpt={ckpt}", *words], cwd=cwd, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | dict(OMP_NUM_THREADS="1") | env)
    try:
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def ckpt(gpt, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "ckpt.pt"
    model.save_checkpoint(path, gpt, tokenizer=tokenizer.to_dict())
    return path


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_it_in_one_line_even_while_it_decodes(ckpt, tmp_path, number):
    with command(ckpt, "--port=0", cwd=tmp_path) as (process, line):
        port = int(re.match(r"http://127\.0\.0\.1:(\d+)/ ", line)[1])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(raw(prompt="the model", max_tokens=10**6, stream=True))
            assert connection.recv(1000).startswith(b"HTTP/1.0 200") and b"data: " in connection.recv(1000)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out == "" and re.fullmatch(r"ended: prefill .* decode .*\n", err), err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("options, said", [(dict(port=70000), "--port=70000"), (dict(host="no.such.name.invalid"), "Name"),
                                           (dict(template="chatml"), "<|im_start|>"), (dict(port=-1), "--port=-1"), ({}, "in use")])
def test_what_cannot_be_served_is_an_error(gpt, tokenizer, monkeypatch, options, said):
    """ValueError and OSError are one line of the command"""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises((ValueError, OSError), match=re.escape(said)):
        sample.serve(Engine(gpt), tokenizer, sample.Options(**dict(port=taken.getsockname()[1]) | options))


# ------------------------------------------------------------------------------------------------------ a browser, for real

class Browser:
    """Headless chromium, driven through its debugging port by a websocket made by hand (RFC 6455)."""

    def __init__(self, folder):
        program = shutil.which("chromium") or shutil.which("google-chrome") or pytest.skip("there is no chromium")
        self.process = subprocess.Popen([program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                                         "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        port = Path(folder) / "DevToolsActivePort"
        assert wait_for(lambda: port.exists() and "\n" in port.read_text(), 30), "chromium does not start"
        address = ("127.0.0.1", int(port.read_text().split()[0]))
        connection = http.client.HTTPConnection(*address, timeout=20)
        connection.request("GET", "/json")
        [page] = [row for row in json.loads(connection.getresponse().read()) if row["type"] == "page"]
        self.socket = socket.create_connection(address, timeout=30)
        path = urllib.parse.urlsplit(page["webSocketDebuggerUrl"]).path
        self.socket.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        self.file = self.socket.makefile("rb")
        while self.file.readline().strip():
            pass
        self.number, self.said = 0, []
        for name in ("Page.enable", "Runtime.enable", "Log.enable"):
            self.send(name)

    def send(self, method, **params):
        """The result of a command; events on the way are kept."""
        self.number += 1
        data = json.dumps(dict(id=self.number, method=method, params=params)).encode()
        size = bytes([0x80 | len(data)]) if len(data) < 126 else bytes([0x80 | 126, *len(data).to_bytes(2, "big")])
        self.socket.sendall(b"\x81" + size + bytes(4) + data)  # a text frame, its mask zero
        while True:
            _, size = self.file.read(2)
            size = size if size < 126 else int.from_bytes(self.file.read(2 if size == 126 else 8), "big")
            message = json.loads(self.file.read(size))
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self.said.append(message)

    def run(self, code):
        """The value of JavaScript, of a promise too."""
        found = self.send("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, server, path="/"):
        self.send("Page.navigate", url=f"http://127.0.0.1:{server.server_port}{path}")
        assert wait_for(lambda: self.run("document.readyState == 'complete' && !!document.getElementById('send')"))

    def type(self, text):
        """Type into the text field and press Enter."""
        self.run("document.getElementById('text').focus()")
        self.send("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r" * (kind == "keyDown"))

    def click(self, name):
        box = self.run(f"(b => [b.x + b.width / 2, b.y + b.height / 2])(document.getElementById('{name}').getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def texts(self, kind):
        return self.run(f"[...document.querySelectorAll('article.{kind}')].map(article => article.textContent)")

    def idle(self):
        return self.run("document.getElementById('send').textContent") == "Send"

    def complaints(self):
        """What the page threw or the console printed."""
        return [message for message in self.said if message["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]

    def close(self):
        self.socket.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def browser():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(folder)
        yield browser
        browser.close()


def set_length(browser, count, heat=0):
    browser.run(f"document.getElementById('length').value = {count}, document.getElementById('heat').value = {heat}")


def test_a_person_chats_in_the_page(browser, slow):
    browser.said.clear()
    browser.open(slow)
    set_length(browser, 12)
    browser.type("the <b>model</b>")
    assert wait_for(lambda: browser.texts("assistant") and browser.texts("assistant")[0]) and browser.texts("user") == ["the <b>model</b>"]
    assert wait_for(browser.idle)
    first = {"role": "user", "content": "the <b>model</b>"}
    said = chat(slow, messages=[first], max_tokens=12)["choices"][0]["message"]["content"]
    assert browser.texts("assistant") == [said]
    browser.type("so")  # the conversation goes on from there
    assert wait_for(lambda: len(browser.texts("assistant")) == 2) and wait_for(browser.idle)
    history = [first, {"role": "assistant", "content": said}, {"role": "user", "content": "so"}]
    assert browser.texts("assistant")[1] == chat(slow, messages=history, max_tokens=12)["choices"][0]["message"]["content"]
    browser.click("fresh")
    assert wait_for(lambda: browser.texts("user") == browser.texts("assistant") == [])
    assert browser.run("document.querySelectorAll('b').length") == 0 and browser.complaints() == []


def test_the_stop_button_stops_decoding(browser, slow):
    browser.open(slow)
    set_length(browser, 10**6)
    browser.type("the model")
    assert wait_for(lambda: browser.texts("assistant") and len(browser.texts("assistant")[0]) > 5)
    assert slow.engine.active
    browser.click("send")
    assert wait_for(lambda: idle(slow)) and wait_for(browser.idle) and browser.texts("error") == []


def test_the_page_continues_a_text(browser, server, gpt, tokenizer):
    browser.open(server)
    set_length(browser, 12)
    browser.run("document.getElementById('mode').value = 'text'")
    browser.type("the model")
    assert wait_for(lambda: browser.texts("assistant") and len(browser.texts("assistant")[0]) > 9) and wait_for(browser.idle)
    assert browser.texts("assistant") == ["the model" + offline(gpt, tokenizer, ["the model"], max_new_tokens=12)[0]]
    assert browser.texts("user") == []


def test_the_page_forgets_the_oldest_and_shows_errors(browser, server, tokenizer):
    browser.open(server)
    set_length(browser, 3)
    text = "the model reads a token and writes the next one"
    for count in range(1, 6):
        browser.type(text)
        assert wait_for(lambda: len(browser.texts("assistant")) == count and browser.texts("assistant")[-1]) and wait_for(browser.idle)
    assert browser.texts("error") == []
    rendered, _ = sample.render([{"role": "user", "content": text}] * 5, "plain", tokenizer)
    assert len(rendered) > BLOCK
    browser.type(text * 30)
    assert wait_for(lambda: browser.texts("error") != []) and "tokens" in browser.texts("error")[0]


def test_the_page_asks_for_the_key(browser, gpt, tokenizer, monkeypatch):
    monkeypatch.setenv("API_KEY", "secret")
    with serving(gpt, tokenizer) as server:
        browser.open(server)
        browser.run("window.prompt = () => 'secret'")
        set_length(browser, 3)
        browser.type("the model")
        assert wait_for(lambda: browser.texts("assistant") and browser.texts("assistant")[0]) and browser.texts("error") == []
