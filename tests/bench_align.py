"""How many demonstrations does fine-tuning need? The demonstration's base model after 10, 100, 1,000 and all of them.

Usage: python tests/bench_align.py ALIGNED [--seeds=3]      (the folder that `python align.py` wrote)
       python tests/bench_align.py --lora=16                (of no folder: what adapters save, in GPT-2's shape)
       python tests/bench_align.py --rollouts               (against transformers, in two settings)

The second line takes one step of `--algorithm=sft` with all weights and one with adapters of this rank, in single precision, and adds
up the bytes of the gradients that come to be and of what the optimizer keeps. The third writes the responses of a step of GRPO, 8 to
each prompt: by align.respond, which keeps their log-probabilities; by transformers' `generate` with the same weights on the same
prompts and, for the log-probabilities, its forward pass over all; and by `generate` alone; in turns, the median of 5. The settings are
32 prompts of 8 tokens and 20 new ones, the model of the demonstration; 8 prompts of 400 tokens, as with solved examples, and 60 new
ones at most, 4 layers of width 256. Of the first line each row is `python align.py --algorithm=sft` as in the demonstration, on the first rows of demonstrations.jsonl, another part of
them for each seed, for the same number of steps. Then the 300 held-out sums are graded: strict, and lenient about the form.
"""
import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SETTINGS = {  # shape, prompts, their tokens, those of a response
    "as the demonstration": ("--block_size=128 --n_layer=2 --n_embd=64", 32, 8, 20),
    "prompts of 400 tokens, 4 layers of width 256": ("--block_size=512 --n_layer=4 --n_embd=256", 8, 400, 60),
}
HOW = "--template=bare --max_new_tokens=20 --verifier=gsm8k"


def kept_bytes(rank, preset="gpt2"):
    """(bytes of weights, of gradients, of the optimizer's tensors) of one step; rank 0: all weights are trained."""
    import align
    import bpe
    import model
    config = align.options(model.Config, model.PRESETS[preset].split())
    tokenizer = bpe.train("char", ["abc"], 5, workers=1)
    trainer = align.Trainer(align.options(align.Options, [f"--lora={rank}"]), model.GPT(config), tokenizer, {})
    grads = []
    for weight in trainer.weights.values():
        weight.register_post_accumulate_grad_hook(lambda weight: grads.append(weight.grad.nbytes))
    trainer.update([[dict(ids=[0, 1, 2, 0, 1], mask=[0, 1, 1, 1, 1])]])
    states = [tensor.nbytes for tensors in trainer.state.values() for tensor in tensors]
    weights = [weight.nbytes for weight in trainer.policy.gpt.parameters()]
    return sum(weights), sum(grads), sum(states)


def rollouts(shape, prompts, length, new, group=8):
    """Seconds for the responses of one step, 8 to each prompt: by align.respond, by transformers with and without log-probabilities."""
    import torch
    import transformers

    import align
    import bpe
    import model
    torch.manual_seed(0)
    tokenizer = bpe.train("char", ["".join(map(chr, range(32, 127))) + "\n"], 100, workers=1)
    shape += " --n_head=2 --ffn=gelu --norm=layernorm --qk_norm=False --position=learned --bias=True"
    gpt = model.GPT(align.options(model.Config, f"{shape} --vocab_size={tokenizer.vocab_size}".split())).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.export_hf(gpt, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = [tokenizer.encode(f"{100 + n}+{999 - n} ".ljust(length, "x")) for n in range(prompts) for _ in range(group)]
    o = align.options(align.Options, f"--template=bare --max_new_tokens={new}".split())
    rows = torch.tensor(ids)
    assert torch.allclose(theirs(rows).logits, gpt(rows), atol=1e-4)
    how = dict(attention_mask=torch.ones_like(rows), do_sample=True, max_new_tokens=new, top_k=0, pad_token_id=0,
               eos_token_id=tokenizer.special_tokens["<|endoftext|>"])

    @torch.no_grad()
    def judged():  # as a trainer has it that wants the log-probabilities of what was drawn
        texts = theirs.generate(rows, **how)
        logits = theirs(texts).logits[:, length - 1:-1]
        return logits.log_softmax(-1).gather(2, texts[:, length:, None])
    ways = (lambda: align.respond(gpt, tokenizer, ids, o, str(turn)), judged, lambda: theirs.generate(rows, **how))
    spent = [], [], []
    for turn in range(6):  # the first is not like the others
        for times, write in zip(spent, ways):
            began = time.perf_counter()
            write()
            times += [time.perf_counter() - began] * (turn > 0)
    return [statistics.median(times) for times in spent]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=lambda name: Path(name).resolve() / "sums-0")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lora", type=int, default=0)
    parser.add_argument("--rollouts", action="store_true")
    o = parser.parse_args()
    if o.rollouts:
        for name, (shape, prompts, length, new) in SETTINGS.items():
            own, judged, theirs = rollouts(shape, prompts, length, new)
            each = [f"{8 * prompts / seconds:,.1f}" for seconds in (own, judged, theirs)]
            print(f"{name}, responses a second: align.py {each[0]}, transformers {each[1]}, {judged / own:.2f} times; "
                  f"without log-probabilities {each[2]}, {theirs / own:.2f} times", flush=True)
        return
    if o.lora:
        print("| GPT-2's shape | weights | gradients | optimizer | of both, share of full |\n|---|---|---|---|---|")
        full = kept_bytes(0)
        for rank, sizes in ((0, full), (o.lora, kept_bytes(o.lora))):
            cells = [f"{size / 1e6:,.1f} MB" for size in sizes] + [f"{sum(sizes[1:]) / sum(full[1:]):.2%}"]
            print(f"| {f'adapters of rank {rank}' if rank else 'all weights'} | {' | '.join(cells)} |", flush=True)
        return
    rows = (o.folder / "demonstrations.jsonl").read_text().splitlines(keepends=True)

    def run(*words):
        command = [sys.executable, ROOT / "align.py", *HOW.split(), *words]
        done = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", **os.environ})
        assert done.returncode == 0, done.stderr
        return done.stdout

    print("| demonstrations | held-out sums right, strict | lenient |\n|---|---|---|")
    for n in (10, 100, 1000, len(rows)):
        found = []
        for seed in range(o.seeds):
            with tempfile.TemporaryDirectory() as folder:
                first = seed * n % len(rows)
                (Path(folder) / "some.jsonl").write_text("".join((rows + rows)[first:first + n]))
                run("--algorithm=sft", "--optimizer=muon", "--learning_rate=0.003", "--max_iters=150", f"--data={folder}/some.jsonl",
                    f"--ckpt={o.folder}/base/ckpt.pt", f"--output={folder}/sft", f"--seed={seed}")
                said = run("--eval=verify", f"--ckpt={folder}/sft/ckpt.pt", f"--data={o.folder}/test.jsonl")
                found.append([100 * float(share) for share in re.findall(r"(?:strict|lenient) +([\d.]+)", said)])
        spread = [f"{statistics.median(part):.1f}% ({min(part):.1f} to {max(part):.1f})" for part in zip(*found)]
        print(f"| {n:,} | {' | '.join(spread)} |", flush=True)


if __name__ == "__main__":
    main()
