

def sequence_parallel(gpt: GPT, group: Group) -> None:
    """Attention by Ring, and positions of the tokens that this rank has."""
    def look(tokens, state):
        at = zigzag(tokens.shape[1] * group.size, group)[None].to(tokens.device)
        return tokens, at, at
    gpt.look = look
    model.ops = SimpleNamespace(norm=model.Fast.norm, attention=lambda q, k, v, mask: Ring.apply(q, k, v, group))


def zigzag(T: int, group: Group) -> Tensor:
    """Which of T tokens a rank has: a part from the beginning and one from the end, for later tokens see more."""
    parts = torch.arange(T).chunk(2 * group.size)
    return torch.cat((parts[group.rank], parts[-1 - group.rank]))


# ---- expert parallel: ranks with other experts, and other rows of the batch

def dispatch(ffn: nn.Module, group: Group, capacity: float, x: Tensor, ends: Tensor) -> Tensor:
    """What Experts.work does, by the ranks that have the experts: rows x, sorted by expert, go there and come back.

    An expert takes from each rank at most `capacity` times the mean (0: all); the outputs of the others are 0
    (Fedus et al. 2021).
    """
    counts = ends.diff(prepend=ends.new_zeros(1))
    kept = torch.arange(len(x), device=x.device)
    if capacity:
        most = math.ceil(capacity * len(x) / len(counts))
        kept = torch.cat([part[:most] for part in kept.split(counts.tolist())])
        counts = counts.clamp(max=most)
    to = counts.view(group.size, -1)  # rows to each expert of each rank
    come = group.all_to_all(list(to[:, None]), [1] * group.size)  # from each rank, to each expert here
    out, into = to.sum(1).tolist(), come.sum(1).tolist()

    def there(x):
        return group.all_to_all(x.split(out), into)

    def back(x):
        return group.all_to_all(x.split(into), out)
    own = torch.arange(come.shape[1], device=x.device).repeat(group.size).repeat_interleave(come.flatten())
    order = own.argsort(stable=True)  # by expert, no longer by rank
    rows = Through.apply(x[kept], there, back)
    done = type(ffn).work(ffn, rows[order], come.sum(0).cumsum(0))
    done = torch.zeros_like(done).index_copy(0, order, done)
    return torch.zeros_like(x).index_copy(0, kept, Through.apply(done, back, there))


# ---- pipeline: ranks with other layers, which micro-batches pass one behind the other

def gpipe(stage: int, stages: int, micro: int) -> list[tuple[str, int]]:
    """All forward passes, then all backward passes (Huang et al. 2019)."""
    return [("F", i) for i in range(micro)] + [("B", i) for i in range(micro)]


def one_forward_one_backward(stage: int, stages: int, micro: int) -> list[tuple[str, int]]:
    """As soon as there is something to go back, by turns: no more than `stages` micro-batches are kept (2021)."""
    ahead = min(micro, stages - stage - 1)
    turns = [action for i in range(micro - ahead) for action in (("F", ahead + i), ("B", i))]
    return [("F", i) for i in range(ahead)] + turns + [("B", i) for i in range(micro - ahead, micro)]


SCHEDULES = {"gpipe": gpipe, "1f1b": one_forward_one_backward}


def timeline(schedule: str, stages: int, micro: int) -> tuple[list[str], float]:
    """A line of text a stage, time from left to right, and the share of idle time; a backward pass takes two units.

    >>> print("\\n".join(timeline("1f1b", 2, 3)[0]))
    0  1     0 0 2 1 1   2 2
       0 0 0 1 1 1 2 2 2
    """
    plans = [SCHEDULES[schedule](stage, stages, micro) for stage in range(stages)]
    ended, free, at = {}, [0] * stages, [0] * stages
    lines = [""] * stages
    while any(at[s] < len(plans[s]) for s in range(stages)):
        for s in range(stages):
            if at[s] == len(plans[s]):
                continue
            kind, i = plans[s][at[s]]
            first = s == (0 if kind == "F" else stages - 1)
            needs = (kind, i, s - 1 if kind == "F" else s + 1) if not first else (("F", i, s) if kind == "B" else None)
            if needs and needs not in ended:
                continue
            begin, long = max(free[s], ended.get(needs, 0)), 1 if kind == "F" else 2
            lines[s] += "  " * (begin - free[s]) + f"{i % 10}{'' if kind == 'F' else '*'}".ljust(2) * long
            free[s] = ended[kind, i, s] = begin + long
            at[s] += 1
    return lines, 1 - 3 * micro / max(free)


class Absent(nn.Module):
    """Stands where another rank's layer is: passes on what comes, or what `value` holds."""

    value = None
    ffn = SimpleNamespace(loss=0.0)

    def forward(self, x, *_):
        return x if self.value is None else self.value


def stage_of(gpt: GPT, group: Group) -> None:
    """Leave a model the layers of one stage; the names of its parameters stay."""
    bounds = np.linspace(0, len(gpt.blocks), group.size + 1).round().astype(int)
    for layer in range(len(gpt.blocks)):
        if not bounds[group.rank] <= layer < bounds[group.rank + 1]:
            gpt.blocks[layer] = Absent()
    if group.rank < group.size - 1:
        gpt.norm, gpt.head = Absent(), Absent()
    if group.rank:
        gpt.embedding = Absent()
