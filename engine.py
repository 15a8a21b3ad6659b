

# ---- the whole: a model on a mesh

def refuse(config: Config, mesh: Mesh, o: Options, batch: int) -> None:
    """Raise ValueError, naming what to change, for a model that cannot be split so."""
    size, plain = mesh.size, Config()
    parts = (("tp", "n_head", config.n_head), ("tp", "n_kv_head", config.n_kv_head or config.n_head),
             ("tp", "n_inner", config.inner), ("tp", "vocab_size", config.vocab_size), ("ep", "n_expert", config.n_expert),
             ("tp", "block_size", config.block_size // size["cp"]), ("cp", "block_size", config.block_size // 2))
    for axis, name, value in parts:
        divisors = [n for n in range(2, value + 1) if value % n == 0][:8]
        require(value % size[axis] == 0 and (value or size[axis] == 1),
                f"--mesh={mesh.text}: {axis}{size[axis]} does not divide --{name} ({value}; {divisors} do)")
    require(size["pp"] <= config.n_layer, f"--mesh={mesh.text}: more stages than --n_layer={config.n_layer}")
    ways = size["dp"] * size["ep"]
    require(batch % ways == 0, f"--mesh={mesh.text}: --batch_size={batch} is no multiple of dp x ep = {ways}")
    require(o.stage in (0, 1, 2, 3), f"--stage={o.stage}: choose from 0, 1, 2, 3")
    require(o.schedule in SCHEDULES, f"--schedule={o.schedule}: choose from {', '.join(SCHEDULES)}")
    require(o.stage < 3 or size["pp"] == size["ep"] == 1, "--stage=3 goes with dp, cp and tp; use 2 with pp and ep")
    require(not config.n_expert or size["tp"] == 1, "tp does not cut experts: use ep")
    if math.prod(size.values()) > size["dp"]:
        for name in ("mixer", "position", "ngram", "end_token", "bias", "qkv_bias", "residual", "dropout"):
            same = getattr(config, name) in (getattr(plain, name), 1 if name == "ngram" else None)
            require(same, f"--mesh={mesh.text} is for --{name}={getattr(plain, name)}; others go with dp alone")


class Split:
    """What one rank of a mesh holds of `objective`: a module with `gpt` and `rows`, as train.py's Objective.

    A step is backward(), sync(), an optimizer's step on `pieces` (by their names in the whole model), spread().
    """

    def __init__(self, objective: nn.Module, mesh: Mesh, o: Options, batch: int):
        gpt, config = objective.gpt, objective.gpt.config
        refuse(config, mesh, o, batch)
        self.objective, self.gpt, self.mesh, self.o, self.config = objective, gpt, mesh, o, config
        self.pp, self.cp, self.tp = mesh.group("pp"), mesh.group("cp"), mesh.group("tp")
        ep, both = mesh.group("ep"), mesh.group("dp", "ep", "cp")
        self.totals, self.every = mesh.group("pp", "dp", "ep", "cp"), mesh.group(*AXES)
        self.tied = "embedding.weight" if config.tie_embeddings and self.pp.size > 1 else ""
        self.ends = mesh.group("pp", ends=True)
        self.cuts = {name: cuts_of(name, config, mesh) for name, _ in gpt.named_parameters()}
        for name, p in gpt.named_parameters():
            for axis, dim, sizes in self.cuts[name]:
                p.data = cut(p.data, dim, sizes, mesh.size[axis], mesh.at[axis])
        stage_of(gpt, self.pp)
        model.ops = model.Fast
        if self.tp.size > 1:
            tensor_parallel(gpt, objective, self.tp)
        if self.cp.size > 1:
            sequence_parallel(gpt, self.cp)
        for ffn in [part for part in gpt.modules() if isinstance(part, model.Experts)] if ep.size > 1 else ():
            ffn.work = partial(dispatch, ffn, ep, o.capacity)
        # parameters in up to three lots: of these experts alone, in two stages, all others
        lots = {}
        for name, _ in gpt.named_parameters():
            whole = self.tied if self.tied and name in ("embedding.weight", "head.weight") else name
            axes = [axis for axis, *_ in self.cuts[whole]]
            lots.setdefault("experts" if "ep" in axes else whole if whole == self.tied else "", set()).add(name)
        self.sharders = []
        for lot, names in sorted(lots.items()):
            group = mesh.group("dp", "cp") if lot == "experts" else both
            self.sharders.append(Sharder(gpt, group, o.stage, o.bucket * 2**20, o.overlap, o.optimizer != "adamw",
                                         names=names))
            if o.stage == 3:
                objective.register_forward_pre_hook(self.sharders[-1].begin)
        self.pieces, self.begins, self.copies = {}, {}, {}  # copies: how many ranks have the same numbers
        for sharder in self.sharders:
            for unit in sharder.units:
                for own, piece in unit.pieces.items():
                    name = self.tied if self.tied and own == "head.weight" else own
                    self.pieces[name], self.begins[name] = piece, unit.begins[own]
                    same = 1 if o.stage else sharder.group.size
                    same *= self.tp.size ** (not self.cuts[name])
                    self.copies[name] = same * (1 + (name == self.tied))

    def rows(self, batch: int) -> np.ndarray:
        """Which rows of a batch are for this rank"""
        size, at = self.mesh.size, self.mesh.at
        return np.arange(at["dp"] * size["ep"] + at["ep"], batch, size["dp"] * size["ep"])

    def part(self, x: Tensor) -> Tensor:
        """Which tokens of its rows (B, T) are for this rank"""
        return x[:, zigzag(x.shape[1], self.cp)] if self.cp.size > 1 else x

    def backward(self, parts: list[tuple[Tensor, Tensor]], train: bool = True) -> tuple[float, float]:
        """Gradients of micro-batches (tokens, targets) of this rank's rows; loss sum and count of the whole batch."""
        micro, totals = len(parts), torch.zeros(2, dtype=torch.float64)
        parts = [tuple(map(self.part, part)) for part in parts]
        actions = SCHEDULES[self.o.schedule](self.pp.rank, self.pp.size, micro)
        first, last = self.pp.rank == 0, self.pp.rank == self.pp.size - 1
        kept, sent = {}, []
        for kind, i in actions if train else [action for action in actions if action[0] == "F"]:
            tokens, targets = parts[i]
            if kind == "F":
                x = None
                if not first:
                    x = torch.empty(len(tokens), tokens.shape[1] // self.tp.size, self.config.n_embd)
                    self.pp.exchange(None, 0, x, self.pp.rank - 1)
                    self.gpt.embedding.value = x.requires_grad_(train)
                y, count = self.objective(tokens, targets) if last else (self.gpt.hidden(tokens), 0)
                totals += torch.tensor([y.item(), count]) if last else 0.0
                sent += [] if last else self.pp.start(y.detach(), self.pp.rank + 1)
                kept[i] = (x, y) if train else None
            else:
                x, y = kept.pop(i)
                grad = None if last else torch.empty_like(y)
                if not last:
                    self.pp.exchange(None, 0, grad, self.pp.rank + 1)
                for sharder in self.sharders:
                    sharder.last = i == micro - 1
                y.backward(grad)
                sent += [] if first else self.pp.start(x.grad, self.pp.rank - 1)
        for job in sent:
            job.wait()
        loss, count = self.totals.all_reduce(totals).tolist()
        return loss, count

    def sync(self) -> None:
        """Gradients of `pieces` are those of the sum over the whole batch."""
        for sharder in self.sharders:
            sharder.sync()
        if self.tied in self.pieces:
            grad = self.pieces[self.tied].grad
            grad.copy_(self.ends.all_reduce(grad))

    def norm(self) -> float:
        """The norm of the gradient of the whole model"""
        squares = [piece.grad.square().sum().double() / self.copies[name] for name, piece in self.pieces.items()]
        return self.every.all_reduce(torch.stack(squares).sum()).sqrt().item()

    def spread(self) -> None:
        """Parameters, changed by their owners, to all that use them"""
        for sharder in self.sharders:
            sharder.spread()

    def on_whole(self, name: str, update: Callable) -> Callable:
        """An optimizer's update of a matrix, for a rank that has a part: on all of it, then cut again."""
        if not self.cuts[name] or self.cuts[name][0][0] != "tp" or self.pieces[name].ndim < 2:
            return update
        (_, dim, sizes), group = self.cuts[name][0], self.tp

        def whole(x):
            rows = x.new_empty(group.size, *x.shape)
            rows[group.rank] = x
            return join(list(group.all_gather(rows)), dim, sizes)

        def own(x):
            return cut(x, dim, sizes, group.size, group.rank)

        @torch.no_grad()
        def run(weight, state, *rest):
            all_of_it = nn.Parameter(whole(weight))
            all_of_it.grad, states = whole(weight.grad), [whole(x) for x in state]
            update(all_of_it, states, *rest)
            weight.copy_(own(all_of_it))
            state[:] = [own(x) for x in states]
        return run

    def export(self, state: dict[str, list[Tensor]]) -> dict:
        """This rank's part of a checkpoint: its place, and of each piece where it begins, its numbers, and `state`"""
        shapes = {name: p.shape for sharder in self.sharders for unit in sharder.units for name, p in unit.named.items()}
        pieces = {}
        for name, piece in self.pieces.items():
            own = name if name in shapes else "head.weight"
            pieces[name] = self.begins[name], list(shapes[own]), [piece.detach(), *state.get(name, [])]
        return dict(at=self.mesh.at, mesh=self.mesh.text, pieces=pieces)


def assemble(parts: list[dict], config: Config, world: int) -> tuple[dict, dict]:
    """Weights and optimizer state of the whole model from all ranks' parts. Raises ValueError where one is missing."""
    require(len(parts) == world, f"{len(parts)} parts of {world} are there")
    weights, states = {}, {}
    for name in {name: 0 for part in parts for name in part["pieces"]}:
        size = {axis: 1 + max(part["at"][axis] for part in parts) for axis in AXES}
        cuts = cuts_of(name, config, SimpleNamespace(size=size))
        found = {}  # place on the axis that cuts it -> beginning -> numbers
        for part in [part for part in parts if name in part["pieces"]]:
            begin, shape, tensors = part["pieces"][name]
            place = part["at"][cuts[0][0]] if cuts else 0
            found.setdefault(place, {})[begin] = tensors, shape
        columns = []
        for place, pieces in sorted(found.items()):
            rows = [pieces[begin][0] for begin in sorted(pieces)]
            shape = pieces[0][1]
            columns.append([torch.cat([x.flatten() for x in column]).view(shape) if column[0].numel() == row_size else column[0]
                            for column in zip(*rows) for row_size in [rows[0][0].numel()]])
        whole = [join(list(column), *cuts[0][1:]) if cuts else column[0] for column in zip(*columns)]
        weights[name], states[name] = whole[0], whole[1:]
    return weights, states
