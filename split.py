# ---- parts of a model: what each axis of the mesh cuts

# axis: which parameters, along which dimension, and the sizes of the blocks there, of which each rank gets a part
CUTS = {
    "tp": (
        (r"qkv\.weight$", 0, lambda c: [n * c.head_width for n in (c.n_head, *[c.n_kv_head or c.n_head] * 2)]),
        (r"ffn\.up\.weight$", 0, lambda c: [c.inner] * model.FFNS[c.ffn][0]),
        (r"mixer\.out\.weight$", 1, lambda c: [c.n_head * c.head_width]),
        (r"ffn\.down\.weight$", 1, lambda c: [c.inner]),
        (r"^(embedding|head)\.weight$", 0, lambda c: [c.vocab_size]),
    ),
    "ep": ((r"ffn\.(up|down)\.weight$", 0, lambda c: [c.n_expert]),),
}


def cuts_of(name: str, config: Config, mesh: Mesh) -> list[tuple]:
    """How a parameter is cut: (axis, dimension, sizes), for each axis that has several ranks"""
    found = []
    for axis, rows in CUTS.items():
        for names, dim, sizes in rows:
            experts = axis == "tp" or config.n_expert
            if mesh.size[axis] > 1 and experts and re.search(names, name):
                found.append((axis, dim, sizes(config)))
    return found


def cut(x: Tensor, dim: int, sizes: list[int], n: int, i: int) -> Tensor:
    """Part i of n of each block

    >>> cut(torch.arange(8), 0, [4, 2, 2], 2, 1)
    tensor([2, 3, 5, 7])
    """
    return torch.cat([block.chunk(n, dim)[i] for block in x.split(sizes, dim)], dim)


def join(parts: list[Tensor], dim: int, sizes: list[int]) -> Tensor:
    """The tensor of which `parts` are all parts

    >>> join([torch.tensor([0, 1, 4, 6]), torch.tensor([2, 3, 5, 7])], 0, [4, 2, 2])
    tensor([0, 1, 2, 3, 4, 5, 6, 7])
    """
    small = [size // len(parts) for size in sizes]
    blocks = zip(*(part.split(small, dim) for part in parts))
    return torch.cat([part for block in blocks for part in block], dim)


def vocabulary_rows(gpt: GPT, group: Group) -> tuple[Callable, Callable]:
    """Embedding and loss of a vocabulary of which each rank has some rows: (ids -> vectors), (x, targets -> loss sum)"""
    size = gpt.config.vocab_size // group.size
    first = size * group.rank

    def look_up(ids):
        near, mine = (ids - first).clamp(0, size - 1), (ids >= first) & (ids < first + size)
        rows = F.embedding(near, gpt.embedding.weight) * mine[..., None]  # the others' rows are 0
        return scatter_grad(rows, group, 1)  # (B, T / n, C)

    def loss(x, targets):
        logits = gpt.head(x)  # (R, V / n)
        highest = gathered(logits.detach().amax(1), group, 0).view(group.size, -1).amax(0)  # (R)
        logits = logits - highest[:, None]
        near, mine = (targets - first).clamp(0, size - 1), (targets >= first) & (targets < first + size)
        right = logits.gather(1, near[:, None])[:, 0] * mine
        total, right = summed(torch.stack((logits.exp().sum(1), right)), group)
        return ((total.log() - right) * (targets >= 0)).sum()
    return look_up, loss


def tensor_parallel(gpt: GPT, objective: nn.Module, group: Group) -> None:
    """Each rank has some heads, some hidden units, some of the vocabulary (Shoeybi et al. 2019).

    Between them, where all channels are needed, each has some of the tokens (sequence parallelism, Korthikanti 2022):
    a layer gathers the tokens and scatters sums, in all as much as one all-reduce.
    """
    def here(part):
        return not isinstance(part, Absent)
    look_up, objective.rows = vocabulary_rows(gpt, group)
    if here(gpt.embedding):
        gpt.embedding.forward = look_up
    for block in filter(here, gpt.blocks):
        block.mixer.heads = tuple(n // group.size for n in block.mixer.heads)
        for layer in (block.mixer, block.ffn):
            layer.register_forward_pre_hook(lambda _, x: (gather_grad(x[0], group, 1), *x[1:]))
            layer.register_forward_hook(lambda _, x, y: scatter_grad(y, group, 1))
    if here(gpt.norm):
        gpt.norm.register_forward_hook(lambda _, x, y: gather_grad(y, group, 1))
    for name, p in gpt.named_parameters():
        if "norm" in name:  # which sees some of the tokens, or some of the heads
            p.register_hook(group.all_reduce)


# ---- sequence parallel: ranks with other tokens of the same rows

class Ring(torch.autograd.Function):
    """Causal attention of all tokens, of which each rank has a part; keys and values go round (Liu et al. 2023).

    Rank r of n has the parts r and 2n - 1 - r of 2n, so that all have as much to do. Of a part of queries and one of
    keys the softmax's numerator and log-denominator are enough to add the next; nothing of size T x T is kept.
    """

    @staticmethod
    def pairs(group, turn):
        """(queries' half, keys' half, whether the mask is causal) after some turns of the ring"""
        def number(rank, half):
            return 2 * group.size - 1 - rank if half else rank
        source = (group.rank - turn) % group.size
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            mine, theirs = number(group.rank, i), number(source, j)
            if theirs <= mine:
                yield i, j, mine == theirs

    @staticmethod
    def scores(q, k, causal):
        """(B, H, T, hd) and (B, H_kv, S, hd) -> (B, H, T, S)"""
        s = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[3] ** 0.5
        return s.masked_fill(torch.ones_like(s[0, 0]).triu(1).bool(), -math.inf) if causal else s

    @staticmethod
    def round(x, group, way):
        """x goes one rank on (way 1) or back (-1), and another takes its place"""
        new = torch.empty_like(x)
        group.exchange(x, group.rank + way, new, group.rank - way)
        return new

    @staticmethod
    def forward(ctx, q, k, v, group):
        out = torch.zeros_like(q)
        lse = q.new_full(q.shape[:3], -math.inf)
        kv = torch.stack((k, v))
        for turn in range(group.size):
            for i, j, causal in Ring.pairs(group, turn):
                half_out, half_lse = out.chunk(2, 2)[i], lse.chunk(2, 2)[i]
                k, v = kv.chunk(2, 3)[j]
                s = Ring.scores(q.chunk(2, 2)[i], k, causal)
                new = torch.logaddexp(half_lse, s.logsumexp(-1))
                v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
                half_out.mul_((half_lse - new).exp()[..., None]).add_((s - new[..., None]).exp() @ v)
                half_lse.copy_(new)
            kv = Ring.round(kv, group, 1) if turn < group.size - 1 else kv
        ctx.group = group
        ctx.save_for_backward(q, kv, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, kv, out, lse = ctx.saved_tensors
        group, dq, dkv = ctx.group, torch.zeros_like(q), torch.zeros_like(kv)
        along = (grad * out).sum(-1)
        H_kv = kv.shape[2]
        for turn in reversed(range(group.size)):  # kv is where the last turn left it
            for i, j, causal in Ring.pairs(group, turn):
                qi, gi, li, ai = (x.chunk(2, 2)[i] for x in (q, grad, lse, along))
                (k, v), (dk, dv) = kv.chunk(2, 3)[j], dkv.chunk(2, 3)[j]
                p = (Ring.scores(qi, k, causal) - li[..., None]).exp()
                shared = q.shape[1] // H_kv
                ds = p * (gi @ v.repeat_interleave(shared, 1).mT - ai[..., None]) / q.shape[3] ** 0.5
                dq.chunk(2, 2)[i].add_(ds @ k.repeat_interleave(shared, 1))
                dk.add_((ds.mT @ qi).unflatten(1, (H_kv, shared)).sum(2))
                dv.add_((p.mT @ gi).unflatten(1, (H_kv, shared)).sum(2))
            if turn:  # gradients travel with what they are of
                kv, dkv = Ring.round(torch.cat((kv, dkv)), group, -1).chunk(2)
        return dq, *dkv, None
