"""sample.py's faster decoding against decoding without it, quantised weights against the weights that they stand for, and
the evaluation bench against its definitions.
"""
import csv
import json
import os
import random
import resource
import shutil
import textwrap
from collections import Counter

import pytest
import torch
from test_model import FAMILIES, hf_model
from test_sample import (  # noqa: F401
    GREEDY,
    PLAIN,
    Script,
    brute_logprobs,
    byte_tokenizer,
    chi_square,
    ckpt,
    decode,
    eval_data,
    gpt,
    items_of,
    main,
    make_model,
    odds_of,
    tokenizer,
)

import bpe
import model
import sample
from sample import Engine, Request, Sampling

pytestmark = pytest.mark.usefixtures("one_thread")
DRAFTS = ("lookup", "model", "wrong", "right")


def make_draft(kind, gpt, truth=()):
    """A function (request, count) -> guesses. `right` knows the outputs, by request; `wrong` never guesses right."""
    known = dict(truth)
    if kind == "lookup":
        return sample.look_up
    if kind == "model":
        return sample.Draft(make_model(5, n_layer=1, mixer="attention", block_size=gpt.config.block_size), 40)

    def guess(request, count):
        rest = known[request][len(request.output):][:count]
        return rest if kind == "right" else [(token + 1) % 40 for token in rest]
    return guess


def make_requests():
    """Prompts, lengths, settings, ends and seeds that differ, beyond the block too."""
    prompts = [[7], list(range(9)), [7], list(range(16)), [1, 2, 3] * 4, [i * i % 40 for i in range(30)]]
    settings = [PLAIN, GREEDY, Sampling(0.7, 5), Sampling(1.0, 0, 0.9, repetition_penalty=1.5), GREEDY, PLAIN]
    return [Request(prompt, 5 + 4 * i, sampling, i, end=5 if i % 2 else -1, bias={3: 1.0} if i == 2 else {})
            for i, (prompt, sampling) in enumerate(zip(prompts, settings))]


# ------------------------------------------------------------------------------------------------------------ the drafts

@pytest.mark.parametrize("mixer, kind", [
    *(("attention,window", kind) for kind in DRAFTS), ("mamba2,gdn", "right"), ("mamba2,gdn", "model"), ("latent", "right"),
    *(pytest.param(mixer, kind, marks=pytest.mark.slow) for mixer in model.MIXERS if mixer != "latent" for kind in DRAFTS)])
def test_a_draft_changes_no_token(mixer, kind):
    """Greedy and sampled, in one slot and in several: tokens, ends and log-probabilities are those without a draft."""
    gpt = make_model(1, mixer=mixer)
    plain = make_requests()
    decode(gpt, plain)
    for slots in (1, 3, 100) if kind == "right" else (3,):
        requests = make_requests()
        draft = make_draft(kind, gpt, ((request, other.output) for request, other in zip(requests, plain)))
        engine = Engine(gpt, requests, slots=slots, draft=draft)
        steps = 0
        while engine.step():
            steps += 1
        assert [r.output for r in requests] == [r.output for r in plain]
        assert [r.done for r in requests] == [r.done for r in plain]
        for request, other in zip(requests, plain):
            torch.testing.assert_close(torch.tensor(request.logprobs), torch.tensor(other.logprobs))
        made, right = engine.guessed
        assert (made > 0 or kind == "lookup") and (kind != "wrong" or right == 0)
        if kind == "right":
            assert right > made * 0.8 and steps < 0.6 * max(len(r.output) for r in plain) * len(plain)


def test_a_right_draft_saves_its_steps_and_a_wrong_one_saves_none():
    gpt = make_model(1, mixer="attention", block_size=64)
    [plain] = [Request([1, 2], 41, GREEDY)]
    decode(gpt, [plain])
    for kind, steps in (("right", 1 + 8), ("wrong", 41)):
        request = Request([1, 2], 41, GREEDY)
        engine = Engine(gpt, [request], draft=make_draft(kind, gpt, [(request, plain.output)]))
        count = 0
        while engine.step():
            count += 1
        assert count == steps and request.output == plain.output
    assert "0% of" in engine.report()


@pytest.mark.parametrize("sampling", [PLAIN, pytest.param(Sampling(1.8, 6, 0.97), marks=pytest.mark.slow)])
def test_sampled_tokens_have_the_distribution_of_the_model(sampling):
    """The second token of 500 texts, guessed by the model itself; a rule that favours guesses would be seen."""
    gpt = make_model(3, vocab_size=8, mixer="attention")
    requests = [Request([1, 5, 2], 3, sampling, seed) for seed in range(500)]
    engine = Engine(gpt, requests, draft=sample.Draft(gpt, 8), slots=500)
    while engine.step():
        pass
    assert engine.guessed[1] > 40 and engine.guessed[0] > engine.guessed[1]
    first = Counter(request.output[0] for request in requests).most_common(1)[0][0]
    second = Counter(r.output[1] for r in requests if r.output[0] == first)
    with torch.no_grad():
        row = gpt(torch.tensor([[1, 5, 2, first]]))[0, -1].tolist()
    odds = odds_of(row, sampling)
    assert chi_square(second, odds) < 3.5
    biased = 0.7 * odds  # what a rule gives that takes 30% of the guesses unseen
    biased[row.index(max(row))] += 0.3
    assert chi_square(second, biased) > 3.5


def test_a_draft_says_what_its_model_finds_most_probable():
    """And itself, as a draft, is right each time; where the text has the last tokens already, that counts."""
    small = make_model(4, mixer="attention")
    draft, text = sample.Draft(small, 40), [3, 9, 1, 30]
    request = Request(text, 9)
    request.context = text[:]
    want = decode(small, [Request(text, 3, GREEDY)])[0]
    assert draft(request, 3) == want and draft(request, 1) == want[:1]
    request.context += want[:2] + [7]
    request.output = want[:2] + [7]
    assert draft(request, 2) == decode(small, [Request(request.context, 2, GREEDY)])[0], "behind a wrong guess"
    again = Request([5, 6, 7, 8, 5, 6], 9)
    again.context = again.prompt
    assert draft(again, 2) == [7, 8]


def test_lookup_finds_the_last_place():
    assert sample.look_up(Request([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3]), 3) == [8, 1, 2]
    assert sample.look_up(Request([5, 2, 3, 7, 1, 2, 3]), 3) == [7, 1, 2], "two tokens, where three are nowhere"
    assert sample.look_up(Request([1, 2, 3, 4]), 3) == [] == sample.look_up(Request([1]), 3)
    assert sample.look_up(Request([6, 6, 6, 6]), 2) == [6]


def test_a_stop_string_inside_the_guesses_ends_the_text_there():
    """Text, output and log-probabilities end at the same token as without a draft."""
    tokenizer = bpe.train("byte", ["abc"], 257)
    gpt = make_model(1, vocab_size=257, block_size=64, mixer="attention")
    [plain] = sample.ask(tokenizer, "ab", 1, 30, temperature=0)
    text = sample.complete(Engine(gpt, [plain], 257), tokenizer, [plain])
    stop = tokenizer.decode_bytes(plain.output[9:11]).decode("utf-8", "replace")
    ended = {}
    for kind in ("none", "right"):
        [request] = sample.ask(tokenizer, "ab", 1, 30, [stop], temperature=0)
        draft = make_draft("right", gpt, [(request, plain.output)]) if kind == "right" else lambda request, count: []
        texts = sample.complete(Engine(gpt, [request], 257, draft=draft), tokenizer, [request])
        ended[kind] = texts, request.output, len(request.logprobs), request.done
    assert ended["none"] == ended["right"] and ended["right"][3] == "stop" and len(text[0]) > len(ended["right"][0][0])


def test_long_prompts_go_in_chunks():
    gpt = make_model(1, block_size=2048, n_layer=2, mixer="attention,gdn")
    prompt = [i * i % 40 for i in range(1300)]
    shapes, hidden = [], gpt.hidden
    gpt.hidden = lambda tokens, state: shapes.append(tokens.shape[1]) or hidden(tokens, state)
    [output] = decode(gpt, [Request(prompt, 3, GREEDY)])
    assert shapes == [512, 512, 276, 1, 1, 1]
    whole = make_model(1, block_size=2048, n_layer=2, mixer="attention,gdn")
    with torch.no_grad():
        assert output[0] == int(whole(torch.tensor([prompt]))[0, -1].argmax())


# ---------------------------------------------------------------------------------------------------- whole-number weights

def by_hand(weight, bits, size):
    """Codes and restored weights by loops over groups."""
    lowest, codes, restored = -2 ** (bits - 1), [], []
    for row in weight.tolist():
        for start in range(0, len(row), size):
            group = row[start:start + size]
            scale = torch.tensor(max(group, key=abs) / lowest).bfloat16().item()
            whole = [min(max(round(x / scale), lowest), -lowest - 1) if scale else 0 for x in group]
            codes += whole
            restored += [code * scale for code in whole]
    return codes, torch.tensor(restored).view(weight.shape)


@pytest.fixture(params=["packed", "restored"])
def products(request, monkeypatch):
    """With torch's packed products, and as on a version without them."""
    if request.param == "restored":
        monkeypatch.setattr(sample, "PACKED", {8: "none", 4: "none"})
    elif not all(hasattr(torch.ops.aten, name) for name in sample.PACKED.values()):
        pytest.skip("this torch has no packed products")
    return request.param


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_a_quantised_layer_is_the_product_of_its_codes(products, bits, rows):
    generator = torch.Generator().manual_seed(bits)
    layer = model.Linear(96, 64, bias=True)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(64, 96, generator=generator))
        layer.weight[3] = 0.0
        layer.bias.copy_(torch.randn(64, generator=generator))
    small = sample.Quantised(layer, bits)
    codes, restored = by_hand(layer.weight, bits, 32 if bits == 4 else 96)
    x = torch.randn(2, rows, 96, generator=generator)
    got, want = small(x), x.bfloat16().float() @ restored.T + layer.bias
    assert got.shape == (2, rows, 64) and got.dtype == torch.float32
    assert (got - want).abs().max() < 0.01 * want.abs().max(), "bfloat16 has 8 bits"
    few = torch.cat([small(part) for part in x.flatten(0, 1).split(20)]).view_as(got)
    assert (few != got).float().mean() < 0.02, "a text does not depend on how many are beside it, but for sums at a border of rounding"
    if small.codes.dtype == torch.int8:
        assert small.codes.flatten().tolist() == codes and torch.equal(small.restored(slice(None)), restored)
    error = (restored - layer.weight).norm() / layer.weight.norm()
    assert error < (0.01 if bits == 8 else 0.12), "round to nearest"
    assert (small.codes.nbytes <= layer.weight.nbytes / (32 / bits)) or products == "restored"


@pytest.mark.parametrize("kind, share, gap", [("int8", 0.27, 0.02), ("int4", 0.21, 0.2)])
def test_a_quantised_model(products, kind, share, gap):
    """Its bytes, its logits near those of the model, tied embeddings, the limit of the logits, its generation."""
    torch.manual_seed(0)
    config = model.Config(vocab_size=320, block_size=64, n_layer=2, n_head=2, n_embd=64, init="gpt2", softcap=3.0)
    gpt = model.GPT(config).eval()
    with torch.no_grad():
        for weight in gpt.parameters():
            weight.mul_(3.0 if weight.ndim > 1 else 1.0)
    tokens = torch.arange(60)[None]
    before, size = gpt(tokens).detach(), sum(p.nbytes for p in gpt.parameters())
    line = sample.quantise(gpt, kind)
    after = gpt(tokens).detach()
    assert (after - before).norm() < gap * before.norm() and after.abs().max() <= 3.0
    if products == "packed":
        assert sum(p.nbytes for p in gpt.parameters()) < share * size
    assert line.startswith(f"{kind}: {size / 1e6:,.1f} MB of weights now take ")
    [output] = decode(gpt, [Request([1, 2, 3], 20, GREEDY)])
    [drafted] = decode(gpt, [Request([1, 2, 3], 20, GREEDY)], draft=sample.look_up)
    assert len(output) == len(drafted) == 20 and output[0] == drafted[0]
    with pytest.raises(ValueError, match="choose from int8, int4"):
        sample.quantise(gpt, "int5")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", model.NORMS)
def test_a_quantised_model_computes_in_its_own_type(dtype, norm):
    """Tied embeddings are rows of the quantised head; torch's LayerNorm takes no other type than that of its gains."""
    gpt = model.GPT(model.Config(vocab_size=40, block_size=8, n_layer=1, n_head=1, n_embd=32, norm=norm, bias=True, init="gpt2")).eval()
    want, seen = gpt(torch.tensor([[1, 2]])).detach(), []
    sample.quantise(gpt.to(dtype), "int8")
    gpt.norm.register_forward_hook(lambda layer, x, y: seen.append((x[0].dtype, y.dtype)))
    got = gpt(torch.tensor([[1, 2]])).float()
    assert seen == [(dtype, dtype)] and (got - want).norm() < 0.03 * want.norm()


def test_quantised_layers_that_do_not_fit_int4_take_int8():
    gpt = model.GPT(model.Config(vocab_size=40, block_size=8, n_layer=1, n_head=1, n_embd=20, n_expert=2)).eval()
    sample.quantise(gpt, "int4")
    kinds = {name: part.codes.dtype for name, part in gpt.named_modules() if isinstance(part, sample.Quantised)}
    assert set(kinds.values()) == {torch.int8} and "head" in kinds and "blocks.0.mixer.qkv" in kinds
    assert not any("router" in name for name in kinds) and gpt(torch.tensor([[1, 2]])).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------- pruning

def held(gpt, **rest):
    return dict(version=1, config=vars(gpt.config), weights=gpt.state_dict(), train={}, tokenizer=None, **rest)


def test_the_smallest_of_each_matrix_become_0():
    gpt = make_model(n_layer=2)
    found = sample.pruned(held(gpt), "0.25")["weights"]
    for name, weight in gpt.state_dict().items():
        if name.startswith("blocks.") and weight.ndim == 2:
            gone = found[name] == 0
            assert gone.sum() == weight.numel() // 4 and weight[gone].abs().max() <= weight[~gone].abs().min()
            assert torch.equal(found[name][~gone], weight[~gone])
        else:
            assert torch.equal(found[name], weight)


@pytest.mark.parametrize("mixer", ["attention", "attention,window,attention", "valued,gdn"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_without_a_layer(mixer, layer):
    """The model without a layer is the one that passes it by."""
    gpt, tokens = make_model(n_layer=3, mixer=mixer).float(), torch.randint(40, (2, 16))
    left = sample.without(gpt, layer)
    left = model.from_checkpoint(held(left)).eval()  # its config and its weights fit together
    assert left.config.n_layer == 2 and gpt.config.n_layer == len(gpt.blocks) == 3
    kept = [i for i in range(3) if i != layer]
    gpt.blocks, gpt.turned = torch.nn.ModuleList(gpt.blocks[i] for i in kept), [gpt.turned[i] for i in kept]
    assert torch.equal(left(tokens), gpt(tokens))


def test_the_layers_that_do_nothing_go_first():
    gpt = make_model(n_layer=4).float()
    with torch.no_grad():
        for layer in (0, 2):
            gpt.blocks[layer].mixer.out.weight.zero_()
            gpt.blocks[layer].ffn.down.weight.zero_()
    tokens = torch.randint(40, (2, 16))
    left = model.from_checkpoint(sample.pruned(held(gpt), "layers:2")).eval()
    assert left.config.n_layer == 2 and torch.equal(left(tokens), gpt(tokens))
    assert not torch.allclose(model.from_checkpoint(sample.pruned(held(gpt), "layers:3")).eval()(tokens), gpt(tokens))


def test_prune_from_the_command_line(ckpt, main, tmp_path):
    words, short = [f"--ckpt={ckpt}", "--device=cpu"], ["--max_new_tokens=5", "--temperature=0"]
    code, out, err = main(*words, "--prune=0.5", f"--output={tmp_path / 'half.pt'}")
    assert code == 0 and "--init_from=" in out, err
    half = torch.load(tmp_path / "half.pt", weights_only=True)
    assert (half["weights"]["blocks.0.ffn.up.weight"] == 0).double().mean() == 0.5
    assert "optimizer" not in half and half["tokenizer"] == torch.load(ckpt, weights_only=True)["tokenizer"]
    assert main(f"--ckpt={tmp_path / 'half.pt'}", *short)[1] != main(*words, *short)[1] and half["pruned"] is True
    assert main(*words, "--prune=layers:1", f"--output={tmp_path / 'one.pt'}")[0] == 0
    assert main(f"--ckpt={tmp_path / 'one.pt'}", *short)[0] == 0
    for how, said in (("layers:2", "the model has 2, of which one must stay"), ("half", "a share such as 0.5, or layers:N"),
                      ("0.0", "above 0 and below 1")):
        code, _, err = main(*words, f"--prune={how}", f"--output={tmp_path / 'bad.pt'}")
        assert code == 1 and said in err and len(err.strip().splitlines()) == 1, err
    for more in ("--quantize=int8", "--dtype=bfloat16", "--eval=mmlu", "--top_k=3"):  # would not be in the file
        code, _, err = main(*words, "--prune=0.5", f"--output={tmp_path / 'more.pt'}", more)
        assert code == 1 and ("nothing for prune" in err or "--prune and --eval" in err) and not (tmp_path / "more.pt").exists(), err
    code, _, err = main(*words, "--prune=0.5", f"--output={tmp_path / 'small'}")
    assert code == 1 and "written to a FILE.pt" in err, err
    code, _, err = main(*words, "--prune=0.5", f"--output={ckpt}")
    assert code == 1 and "take the place of --ckpt" in err and "optimizer" in torch.load(ckpt, weights_only=True), err
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, usual[1]))
        code, _, err = main(*words, "--prune=0.5", f"--output={tmp_path / 'more.pt'}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert code == 1 and "cannot write" in err and not (tmp_path / "more.pt").exists(), err


# ------------------------------------------------------------------------------------------------------------ evaluation

def test_the_vote_and_the_likeliest_text(byte_tokenizer):
    """Of five answers the most frequent and that of the likeliest tokens; both differ from the first here."""
    said = ["4", "7", "7", "9", ""]
    script = Script([0])
    o = sample.Options(n_samples=5)
    exam = sample.Exam(Engine(script, (), 257), byte_tokenizer, o)

    def answer(engine, tokenizer, requests):
        for request in requests:
            request.logprobs = [next(means)] * (3 if request is requests[3] else 1)  # a longer text is no worse
        return said
    for gold, right in (("7", (1, 0)), ("9", (0, 1)), ("4", (0, 0))):
        means = iter([-3.0, -2.0, -5.0, -1.0, -9.0])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sample, "complete", answer)
            patch.setattr(exam.engine, "submit", lambda *requests: None)
            scores = exam.solution(("x", [f"#### {gold}"], 0))
        assert (scores["maj@5"], scores["best@5"]) == ([right[0], 1], [right[1], 1])
        assert scores["pass@5"] == [1, 1] and scores["pass@1"] == [pytest.approx(said.count(gold) / 5), 1]


def test_passkeys(byte_tokenizer):
    """Each context holds its key once, fits its length, and is right only if the model says the key."""
    script = Script([0], vocab_size=257)
    script.config.block_size = 4096
    exam = sample.Exam(Engine(script, (), 257), byte_tokenizer, sample.Options())
    rows = items_of(exam, "passkey")
    assert Counter(item[2] for _, item in rows) == {512: 20, 1024: 20, 2048: 20, 4096: 20}
    places = set()
    for _, (context, key, length) in rows:
        assert context.count(key + ".") == 1 and len(key) == 6 and context.endswith("The pass key is")
        assert length - 95 < len(context + key) <= length
        places.add(round(context.index(key) / len(context), 1))
    assert len(places) >= 8, "the key stands at all depths"
    for (_, item), says in zip(rows[:4], (True, False, True, False)):
        text = item[1] if says else " 99x99"
        script = Script(list(text.encode()), len(item[0]))
        script.config.block_size = 4096
        exam.engine = Engine(script, (), 257)
        assert exam.found(item) == {"answer": text, "found_in_512": [int(says), 1]}
    small = Script([0])
    small.config.block_size = 40
    exam.engine = Engine(small, (), 257)
    assert items_of(exam, "passkey") == [], "too short for the question itself"


def test_a_paired_comparison_is_narrower():
    """Two models that are right on nearly the same items: paired draws see the difference, separate ones do not."""
    rng = random.Random(0)
    hard = [rng.random() < 0.5 for _ in range(300)]
    ours = [[int(right), 1] for right in hard]
    theirs = [[int(right and i % 12 > 0), 1] for i, right in enumerate(hard)]
    gap, low, high = sample.summary(ours, theirs)
    lost = sum(a[0] - b[0] for a, b in zip(ours, theirs)) / 300
    assert gap == pytest.approx(lost) and 0 < low < gap < high
    deviation = (lost * (1 - lost) / 300) ** 0.5  # of the mean of the differences
    assert low == pytest.approx(lost - 1.96 * deviation, abs=0.3 * deviation)
    assert sample.summary(theirs)[2] > sample.summary(ours)[1], "their intervals overlap"
    assert sample.summary(ours, ours) == [0, 0, 0]


def test_compare_swap_and_notes_on_leaks(ckpt, main, eval_data, tmp_path):
    def grade(name, *words):
        return main(f"--ckpt={ckpt}", "--eval=hellaswag,ppl", f"--eval_data={eval_data}", f"--output={tmp_path / name}", *words)
    code, out, err = grade("a.json")
    assert code == 0 and ": note that" not in out and " over " not in out, err
    code, swapped, err = grade("b.json", "--swap", f"--compare={tmp_path / 'a.json'}")
    assert code == 0, err
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    keys = list(a["hellaswag"])
    assert len(keys) == 7 and {record["item"][0] for record in a["hellaswag"].values()} == {
        record["item"][0] for record in b["hellaswag"].values()}
    for key in keys:
        one, other = a["hellaswag"][key]["item"], b["hellaswag"][key]["item"]
        assert one[1:] == other[1:] and one[0] != other[0], "the answers stay, the question is another's"
    gap = sum(b["hellaswag"][key]["acc_norm"][0] - a["hellaswag"][key]["acc_norm"][0] for key in keys) / 7
    assert f"hellaswag acc_norm: {gap:+.4f} (" in swapped and "on 7 items" in swapped
    assert "ppl bits_per_byte: +0.0000 (+0.0000 to +0.0000) over" in swapped
    assert "other settings" in grade("a.json", "--swap")[2] and "other settings" in grade("a.json", "--quantize=int8")[2]
    assert "other settings" in grade("a.json", "--dtype=bfloat16")[2]
    whole = model.load_checkpoint(ckpt)
    model.save_checkpoint(tmp_path / "half.pt", model.GPT(model.Config(**whole["config"] | {"block_size": 16})), tokenizer=whole["tokenizer"])
    code, out, _ = grade("half.json", f"--ckpt={tmp_path / 'half.pt'}", "--eval=ppl", f"--compare={tmp_path / 'a.json'}")
    windows = [json.loads((tmp_path / name).read_text())["ppl"] for name in ("half.json", "a.json")]
    assert code == 0 and len(windows[0].keys() & windows[1].keys()) == 9
    assert out.count(f"over {tmp_path / 'a.json'}, on 1 items") == 2, "of windows that are longer, only the last is the same"
    (tmp_path / "few.json").write_text("{}")
    assert f"ppl: {tmp_path / 'few.json'} has none of these items" in grade("a.json", f"--compare={tmp_path / 'few.json'}")[1]
    (tmp_path / "bad.json").write_text("{")
    for bad, message in (("bad.json", "no file of results"), ("none.json", "No such file")):
        code, _, err = grade("a.json", f"--compare={tmp_path / bad}")
        assert code == 1 and message in err and err.count("\n") == 1
    report = {"found": {"hellaswag_val.jsonl 1 ctx": 3, "hellaswag_val.jsonl 2 ctx": 1, "other.jsonl 1 x": 5}}
    (eval_data / "contamination.json").write_text(json.dumps(report))
    out = grade("a.json")[1]
    assert "hellaswag: note that documents with 2 of its passages were dropped, says" in out and out.count(": note that") == 1
    shutil.copy(ckpt, eval_data / "ckpt.pt")  # the folder of the data is that of the checkpoint, too
    assert grade("own.json", f"--ckpt={eval_data / 'ckpt.pt'}")[1].count(": note that") == 1
    (eval_data / "contamination.json").unlink()


# ---------------------------------------------------------------------------------------------------------- command line

def test_quantize_draft_bench_and_profile(ckpt, main, tmp_path, monkeypatch):
    words = f"--ckpt={ckpt}", "--prompt=the tokens, the tokens", "--max_new_tokens=90", "--top_k=2"
    plain = main(*words, "--seed=1")
    code, out, err = main(*words, "--draft=lookup", "--seed=1")
    assert code == 0 and out == plain[1] and "guesses right" in err and "guesses" not in plain[2]
    code, out, err = main(*words, f"--draft={ckpt}", "--temperature=0")
    assert code == 0 and out == main(*words, "--temperature=0")[1] and "guesses right" in err
    code, out, err = main(*words, "--quantize=int8")
    assert code == 0 and err.startswith("int8: 0.") and "MB of weights now take" in err
    code, out, err = main(f"--ckpt={ckpt}", "--profile")
    assert code == 0 and {line.split()[0] for line in out.splitlines()} == {"all", "forward"}
    assert all(f"forward {kind} " in out for kind in ("embedding", "mixer", "ffn", "norm", "head"))
    batches = []
    monkeypatch.setattr(sample, "pick", lambda logits, requests, pick=sample.pick: batches.append(len(requests)) or pick(logits, requests))
    assert main(f"--ckpt={ckpt}", "--profile", "--n_samples=3")[0] == 0 and max(batches) == 3, "all samples are decoded together"
    code, out, err = main(f"--ckpt={ckpt}", "--bench")
    assert code == 0 and out.count("%") == 4 and "GB/s" in out
    asked = []
    monkeypatch.setattr(sample, "look_up", lambda request, count: asked.append(count) or [])
    assert main(f"--ckpt={ckpt}", "--bench", "--draft=lookup")[0] == 0 and asked, "--bench measures with the draft"


def test_drafts_that_are_refused(ckpt, main, tmp_path):
    whole = model.load_checkpoint(ckpt)
    short = model.GPT(model.Config(**whole["config"] | {"block_size": 8}))
    other = bpe.train("byte", ["abc"], 257).to_dict()
    model.save_checkpoint(tmp_path / "short.pt", short, tokenizer=whole["tokenizer"])
    model.save_checkpoint(tmp_path / "other.pt", model.from_checkpoint(whole), tokenizer=other)
    for name, message in ((tmp_path / "short.pt", "a block_size of 32 or more"), (tmp_path / "other.pt", "the tokenizer of"),
                          (tmp_path / "none.pt", "does not exist")):
        code, out, err = main(f"--ckpt={ckpt}", f"--draft={name}")
        assert (code, out, err.count("\n")) == (1, "", 1) and message in err, err
    code, out, err = main(f"--ckpt={ckpt}", "--quantize=int3")
    assert (code, out, err.count("\n")) == (1, "", 1) and "choose from int8, int4" in err


# ------------------------------------------------------------------------------------------------- against other packages

@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hundred_greedy_texts_of_transformers(family, tmp_path):
    """In one ragged batch, 12 slots, with a draft and without; float64 on both sides, so that no tie decides."""
    theirs = hf_model(family).double()
    if hasattr(theirs, "set_experts_implementation"):
        theirs.set_experts_implementation("eager")  # the usual one has no double precision
    theirs.save_pretrained(tmp_path)
    ours = model.import_hf(tmp_path).double().eval()
    if not family.startswith("gpt2"):  # they compute angles in single precision
        ours.position.table = ours.position.table.float().double()
    rng = random.Random(1)
    prompts = [[rng.randrange(61) for _ in range(rng.randint(1, 9))] for _ in range(100)]
    with torch.no_grad():
        want = [theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=14,
                                do_sample=False, eos_token_id=None, pad_token_id=0)[0, len(prompt):].tolist() for prompt in prompts]
    assert len(set(map(tuple, want))) > 60
    assert decode(ours, [Request(prompt, 14, GREEDY) for prompt in prompts], slots=12) == want
    assert decode(ours, [Request(prompt, 14, GREEDY) for prompt in prompts], draft=sample.look_up) == want


HARNESS = {
    "hellaswag": """
        task: local_hellaswag
        dataset_path: json
        dataset_kwargs: {{data_files: {{validation: {folder}/hellaswag_val.jsonl}}}}
        output_type: multiple_choice
        validation_split: validation
        process_docs: !function utils.process_docs
        doc_to_text: "{{{{query}}}}"
        doc_to_target: "{{{{label}}}}"
        doc_to_choice: "choices"
        """,
    "mmlu": """
        task: local_mmlu
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: {folder}/test.json, dev: {folder}/dev.json}}}}
        test_split: test
        fewshot_split: dev
        num_fewshot: 5
        fewshot_config: {{sampler: first_n}}
        description: "The following are multiple choice questions (with answers) about astronomy.\\n\\n"
        output_type: multiple_choice
        doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{choices[0]}}}}\\nB. {{{{choices[1]}}}}\\nC. {{{{choices[2]}}}}\\nD. {{{{choices[3]}}}}\\nAnswer:"
        doc_to_choice: ["A", "B", "C", "D"]
        doc_to_target: answer
        """}


def hellaswag_rows(rng, count):
    words = "a man stirs [title] the soup [step] then he [substeps] eats it all, café (hot) and  goes".split(" ")
    def text(n):
        return " ".join(rng.choices(words, k=n))
    return [dict(ind=i, activity_label=text(2), ctx_a=text(8), ctx_b=text(3), endings=[text(rng.randint(2, 7)) for _ in range(4)],
                 label=str(rng.randrange(4))) for i in range(count)]


@pytest.mark.slow
def test_scores_are_those_of_the_harness(test_data, tokenizer, tmp_path, monkeypatch):
    """lm-evaluation-harness on the same model and files: its own prompts, requests and metrics, item by item."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    harness = pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    folder = tmp_path / "files"
    folder.mkdir()
    rows = hellaswag_rows(random.Random(4), 40)
    (folder / "hellaswag_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for part, count in (("dev", 5), ("test", 40)):
        with open(test_data / f"eval/mmlu/{part}/astronomy_{part}.csv", newline="") as file:
            rows = list(csv.reader(file))[:count]
        with open(folder / f"astronomy_{part}.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
        (folder / f"{part}.json").write_text("".join(
            json.dumps(dict(question=q, choices=choices, answer="ABCD".index(letter))) + "\n" for q, *choices, letter in rows))
    shutil.copy(os.path.join(os.path.dirname(harness.__file__), "tasks/hellaswag/utils.py"), folder)
    for name, text in HARNESS.items():
        metrics = "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
        (folder / f"{name}.yaml").write_text(textwrap.dedent(text.format(folder=folder)).lstrip() + metrics)
    big = make_model(vocab_size=tokenizer.vocab_size, block_size=4096, n_layer=1)

    class Ours(LM):
        def loglikelihood(self, requests):
            out = []
            for request in requests:
                context, end = request.args
                ids = tokenizer.encode(context)
                whole = tokenizer.encode(context + end)
                out.append((sum(brute_logprobs(big, ids, whole[len(ids):])), False))
            return out

        loglikelihood_rolling = generate_until = None
    Ours.__abstractmethods__ = frozenset()
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = harness.simple_evaluate(Ours(), tasks=["local_hellaswag", "local_mmlu"], task_manager=manager, bootstrap_iters=0)
    model.save_checkpoint(tmp_path / "ckpt.pt", big)
    o = sample.Options(ckpt=str(tmp_path / "ckpt.pt"), eval="hellaswag,mmlu", eval_data=str(folder), output=str(tmp_path / "e.json"))
    lines = list(sample.Exam(Engine(big, (), tokenizer.vocab_size), tokenizer, o).run())
    held = json.loads((tmp_path / "e.json").read_text())
    for name in HARNESS:
        theirs = sorted(found["samples"][f"local_{name}"], key=lambda row: row["doc_id"])
        assert len(theirs) == len(held[name]) == 40
        for row, record in zip(theirs, held[name].values()):
            likely = [float(pair[0]) for pair in row["filtered_resps"]]
            assert max(abs(a - b) for a, b in zip(likely, record["answer"], strict=True)) < 1e-3
            assert [row["acc"], row["acc_norm"]] == [record["acc"][0], record["acc_norm"][0]]
        assert f"{name} acc: {found['results'][f'local_{name}']['acc,none']:.4f} (" in "\n".join(lines)
