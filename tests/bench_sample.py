"""Decoding against `transformers` `generate`: one set of weights in both, the same prompts, by turns in one run.

Usage: python tests/bench_sample.py [runs] [layers: fewer than the 30 of SmolLM-135M take less time]

Prints for one stream, and for 16 requests of mixed lengths, tokens/s of both (useful tokens only: `generate` decodes a
static batch until its longest request ends), their ratio, whether the greedy tokens are the same, the share of the
ideal (what the engine would reach if all 16 decoded at its full-batch rate from start to end), and the share of the
machine's copy bandwidth that one stream reads in weights. Skips with a message where `transformers` is missing.
"""
import copy
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model  # noqa: E402
import sample  # noqa: E402

SHAPE = dict(vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_inner=1536)  # SmolLM-135M's
BLOCK = 512
CLOCK = time.process_time if torch.get_num_threads() == 1 else time.perf_counter  # steadier where others work beside us


def twins(peer):
    """A Llama of `transformers` with random weights, and ours with the same."""
    torch.manual_seed(0)
    config = peer.LlamaConfig(vocab_size=SHAPE["vocab_size"], hidden_size=SHAPE["n_embd"], intermediate_size=SHAPE["n_inner"],
                              num_hidden_layers=SHAPE["n_layer"], num_attention_heads=SHAPE["n_head"],
                              num_key_value_heads=SHAPE["n_kv_head"], max_position_embeddings=BLOCK, rope_theta=10000.0,
                              rms_norm_eps=1e-6, tie_word_embeddings=True, initializer_range=0.05,
                              bos_token_id=None, eos_token_id=None, pad_token_id=0)
    theirs = peer.LlamaForCausalLM(config).eval()
    ours = model.GPT(model.Config(**SHAPE, block_size=BLOCK, qk_norm=False)).eval()
    held, new = theirs.state_dict(), ours.state_dict()
    new["embedding.weight"] = new["head.weight"] = held["model.embed_tokens.weight"]
    new["norm.weight"] = held["model.norm.weight"]
    for i in range(SHAPE["n_layer"]):
        at, to = f"model.layers.{i}.", f"blocks.{i}."
        parts = {"norm1.weight": ["input_layernorm"], "norm2.weight": ["post_attention_layernorm"],
                 "mixer.qkv.weight": [f"self_attn.{p}_proj" for p in "qkv"], "mixer.out.weight": ["self_attn.o_proj"],
                 "ffn.up.weight": ["mlp.gate_proj", "mlp.up_proj"], "ffn.down.weight": ["mlp.down_proj"]}
        for name, sources in parts.items():
            new[to + name] = torch.cat([held[f"{at}{source}.weight"] for source in sources])
    ours.load_state_dict(new)
    return ours, theirs


def run_ours(gpt, work):
    requests = [sample.Request(prompt, count, sample.Sampling(temperature=0)) for prompt, count in work]
    engine = sample.Engine(gpt, requests)
    while engine.step():
        pass
    return [request.output for request in requests]


@torch.inference_mode()
def run_theirs(gpt, work):
    longest = max(len(prompt) for prompt, _ in work)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in work])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in work])
    count = max(count for _, count in work)
    out = gpt.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
    return [row[longest:longest + count].tolist() for row, (_, count) in zip(out, work)]


def compare(ours, theirs, work, runs, run_other=run_theirs):
    """Median tokens/s of both on some work, by turns; and whether the tokens are the same."""
    tokens, speeds, outputs = sum(count for _, count in work), {ours: [], theirs: []}, {}
    for run, gpt in ((run_ours, ours), (run_other, theirs)) * (runs + 1):
        started = CLOCK()
        outputs[gpt] = run(gpt, work)
        speeds[gpt].append(tokens / (CLOCK() - started))
    a, b = (statistics.median(speeds[gpt][1:]) for gpt in (ours, theirs))  # the first of each warms up
    return a, b, outputs[ours] == outputs[theirs]


def main(runs=3, layers=30):
    SHAPE["n_layer"] = layers
    try:
        import transformers as peer
    except ImportError:
        sys.exit("skipped: transformers is not installed")
    peer.logging.set_verbosity_error()
    ours, theirs = twins(peer)
    rng = random.Random(0)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, "
          f"torch {torch.__version__}, transformers {peer.__version__}, {sum(p.numel() for p in ours.parameters()):,} parameters")

    columns = copy.deepcopy(ours)
    sample.by_columns(columns)
    one = [([rng.randrange(1, 49152) for _ in range(16)], 48)]
    a, b, same = compare(ours, theirs, one, runs)
    weights, bandwidth = sample.weight_bytes(ours), sample.copy_bandwidth(torch.device("cpu"), CLOCK)
    print(f"one stream       {a:7.1f} tokens/s, transformers {b:7.1f}, ratio {a / b:.2f}, tokens {'the same' if same else 'DIFFERENT'}, "
          f"bandwidth {a * weights / bandwidth:.0%} of a copy's {bandwidth / 1e9:.1f} GB/s")
    c, d, _ = compare(columns, ours, one, runs, run_ours)
    print(f"by columns       {c:7.1f} tokens/s, {c / d:.2f} times the {d:.1f} by rows")
    for kind in ("int8", "int4"):
        small = copy.deepcopy(ours)
        line = sample.quantise(small, kind)
        c, d, _ = compare(small, ours, one, runs, run_ours)
        print(f"{line}: {c:.1f} tokens/s, {c / d:.2f} times the {d:.1f} of fp32, "
              f"bandwidth {c * sample.weight_bytes(small) / bandwidth:.0%}")

    work = [([rng.randrange(1, 49152) for _ in range(rng.randint(8, 40))], rng.choice((8, 16, 24, 96))) for _ in range(16)]
    a, b, same = compare(ours, theirs, work, max(1, runs - 1))
    engine = sample.Engine(ours, [sample.Request(prompt, 24, sample.Sampling(temperature=0)) for prompt, _ in work])
    while engine.step():
        pass
    tokens, seconds = engine.spent["decode"]
    print(f"16 of 8 to 96    {a:7.1f} tokens/s, transformers {b:7.1f}, ratio {a / b:.2f}, tokens {'the same' if same else 'DIFFERENT'}, "
          f"{a / (tokens / seconds):.0%} of the full-batch rate of {tokens / seconds:.1f}")


if __name__ == "__main__":
    if "--help" in sys.argv:
        sys.exit(print(__doc__))
    main(*map(int, sys.argv[1:]))
