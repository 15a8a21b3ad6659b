"""A model of one's own under train.py's loop: patches of bytes (MegaByte, Yu et al. 2023), made of model.py's parts.

Usage: python tests/patches.py --patch=4 --tokenizer=byte --flops=1e12 --ngram=0   (and any other option of train.py)
       python tests/bench_recipe.py patches --threads=1 --seeds=1                  (beside bytes and BPE, at equal FLOPs)

Patches of P bytes pass the blocks of the model, as tokens do; one more block of half the width then writes the P bytes, each
from what the last patch said and from those before it in its own. So most of the arithmetic is done once in P bytes.
Here a class takes the place of GPT in model.py and train.py: whatever has its methods is trained, accounted for, given
its FLOPs, and measured in bits per byte, alike. A state for decoding is left out: sample.py cannot read what is written, and
the line about the half that attention masks, which is reckoned from the state, does not hold.
"""
import dataclasses
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model  # noqa: E402
import train  # noqa: E402
from model import Block, Call, Embedding, Linear  # noqa: E402


class Patches(model.GPT):
    """Bytes (B, T) -> logits (B, T, V), as GPT; T is filled up to a multiple of `size`."""

    size = 4

    def __init__(self, config):
        config = dataclasses.replace(config, tie_embeddings=False)
        super().__init__(config)
        C, c = config.n_embd, config.n_embd // 2
        small = dataclasses.replace(config, n_embd=c, n_head=max(1, config.n_head // 2), head_dim=config.head_width)
        self.embedding = Embedding(c, config.vocab_size)
        self.join, self.part = Linear(self.size * c, C), Linear(C, self.size * c)
        self.writer, self.last_norm = Block(small, 0, self.noise), model.NORMS[config.norm](config, c)
        self.head = Linear(c, config.vocab_size)
        self.initialise()

    def through_blocks(self, blocks, x, state):
        """The stream x (B, n, width) through blocks that see what came before"""
        at = torch.arange(x.shape[1], device=x.device)[None]
        call, x0 = Call(at, at, at, self.position.turn(at), state), x
        for layer, block in enumerate(blocks):
            x = block(x, x0, call, layer)
        return x

    def hidden(self, tokens, state=None):
        """Bytes (B, T) -> (B, T, C/2), from which `head` tells the byte after each; patch k ends with byte k * size."""
        T, P = tokens.shape[1], self.size
        e = self.embedding(F.pad(tokens, (0, -T % P)))  # (B, nP, c)
        seen = F.pad(e, (0, 0, P - 1, 0))[:, :e.shape[1]]
        patches = self.join(seen.unflatten(1, (-1, P)).flatten(2))  # (B, n, C)
        said = self.part(self.norm(self.through_blocks(self.blocks, patches, state or self.new_state(1, 0))))
        x = (said.view_as(e) + e).view(-1, P, e.shape[2])  # (Bn, P, c): a row a patch
        x = self.last_norm(self.through_blocks([self.writer], x, self.new_state(1, 0)))
        return x.view_as(e)[:, :T]


if __name__ == "__main__":
    size = [word for word in sys.argv if word.startswith("--patch=")]
    if len(size) != 1 or not size[0][8:].isdigit() or size[0] == "--patch=0":
        sys.exit("patches.py: --patch=P says how many bytes a patch has")
    sys.argv.remove(size[0])
    Patches.size = int(size[0][8:])
    model.GPT = train.GPT = Patches
    train.run(train.main)
