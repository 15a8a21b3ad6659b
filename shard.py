# ---- data parallel: ranks with other rows of the batch; what all would keep alike may be sharded (Rajbhandari 2020)

def layout(sizes: list[int], n: int, whole: bool) -> tuple[int, list[int]]:
    """Length of each of n rows that hold tensors of these sizes, and where in the rows, one behind the other, each begins.

    `whole`: none lies in two rows (the largest first, to the emptiest row); else they lie one behind the other.

    >>> layout([2, 3, 4], 2, False), layout([2, 3, 4], 2, True)
    ((5, [0, 2, 5]), (5, [7, 4, 0]))
    """
    if not whole:
        return -(-sum(sizes) // n), [sum(sizes[:i]) for i in range(len(sizes))]
    rows = [[] for _ in range(n)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        min(rows, key=lambda row: sum(sizes[j] for j in row)).append(i)
    length = max(sum(sizes[i] for i in row) for row in rows)
    starts = {}
    for number, row in enumerate(rows):
        for place, i in enumerate(row):
            starts[i] = number * length + sum(sizes[j] for j in row[:place])
    return length, [starts[i] for i in range(len(sizes))]


class Unit:
    """Parameters that travel together: they are views of one buffer (n, length), of which rank r owns row r.

    `master` is this rank's row, and `pieces` its parameters or parts of them, which an optimizer moves. Without
    sharding there is one row, which all ranks own.
    """

    def __init__(self, named: dict[str, nn.Parameter], group: Group, stage: int, whole: bool, low: torch.dtype | None):
        self.named, self.stage, self.group = named, stage, group
        n, self.row = (group.size, group.rank) if stage else (1, 0)
        length, starts = layout([p.numel() for p in named.values()], n, whole)
        first = next(iter(named.values()))
        self.full = first.new_zeros(n, length, dtype=low or first.dtype)
        self.spans = {name: (start, p.shape) for (name, p), start in zip(named.items(), starts)}
        wide = first.new_zeros(n, length)
        for name, view in self.views(wide).items():
            view.copy_(named[name].data)
        group.broadcast(wide)
        self.full.copy_(wide)
        for name, view in self.views(self.full).items():
            named[name].data = view
        own = wide[self.row] if low else self.full[self.row]
        self.master = own.clone() if stage == 3 or low else own
        self.grad = torch.zeros_like(self.master)
        self.pieces, self.begins = {}, {}  # of each, and where in its parameter it begins
        for name, (start, shape) in self.spans.items():
            begin, end = (max(0, min(length, at - self.row * length)) for at in (start, start + shape.numel()))
            if begin < end:
                self.begins[name] = begin + self.row * length - start
                form = shape if end - begin == shape.numel() else (end - begin,)
                self.pieces[name] = nn.Parameter(self.master[begin:end].view(form))
                self.pieces[name].grad = self.grad[begin:end].view(form)
        self.there, self.sent, self.job, self.waiting = True, False, None, len(named)

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """The parameters, or what stands in their place, in a buffer"""
        return {name: rows.flatten()[start:start + shape.numel()].view(shape)
                for name, (start, shape) in self.spans.items()}

    def collect(self) -> None:
        """Parameters of all rows, from their owners"""
        self.full[self.row] = self.master
        if self.stage:
            self.group.all_gather(self.full)

    def free(self) -> None:
        """Give the memory of all rows back; this rank's own is kept in `master`."""
        self.full.untyped_storage().resize_(0)
        self.there, self.job = False, None

    def reduce(self, rows: Tensor) -> None:
        """Add the sum of gradients over all ranks to those of the pieces"""
        total = self.group.reduce_scatter(rows) if self.stage else self.group.all_reduce(rows)
        self.grad += total.view_as(self.grad)


WIRE = ThreadPoolExecutor(1)  # sends for all sharders of a process, one message after the other: the same order on all


class Sharder:
    """Any module, trained by several processes on parts of a batch, with any optimizer on `pieces`.

    Each rank: loss.backward() (`last` says whether more micro-batches follow), then sync(), which leaves sums over the
    ranks in the gradients of `pieces`, the optimizer's step on them, then spread().

    stage: 0 nothing is sharded, 1 the optimizer's state, 2 gradients, 3 parameters too: these are fetched before a
    module of `module`'s lists is used, the next one's meanwhile, and freed after. Gradients travel in buckets of
    `bucket` bytes (stage 3: those of a module together), `overlap`: as soon as they are there, while the backward pass
    goes on. `whole`: no parameter is cut, for optimizers that work on matrices (their owner computes).
    """

    def __init__(self, module: nn.Module, group: Group, stage: int = 0, bucket: float = 25 * 2**20,
                 overlap: bool = True, whole: bool = False, low: torch.dtype | None = None,
                 names: set[str] | None = None):
        self.group, self.stage, self.overlap, self.last = group, stage, overlap, True
        self.backward = False
        unit = partial(Unit, group=group, stage=stage, whole=whole, low=low)
        named = {name: p for name, p in module.named_parameters() if names is None or name in names}
        lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)] if stage == 3 else []
        self.units, blocks = [], []
        for block in [block for part in lists for block in part]:
            own = {id(p) for p in block.parameters()}
            mine = {name: named.pop(name) for name in list(named) if id(named[name]) in own}
            if mine:
                self.units.append(unit(mine))
                blocks.append(block)
        rest, size = {}, 0
        for name, p in reversed(named.items()):  # gradients come from the last layer on
            if rest and stage < 3 and size + p.nbytes > bucket:
                self.units.append(unit(rest))
                rest, size = {}, 0
            rest[name], size = p, size + p.nbytes
        self.units += [unit(rest)] if rest else []
        self.pieces = {name: piece for unit in self.units for name, piece in unit.pieces.items()}
        for unit in self.units:
            for p in unit.named.values():
                p.register_post_accumulate_grad_hook(partial(self.arrived, unit))
        self.blocks = len(blocks)  # these units are first
        if stage == 3:
            self.hook(module, blocks)

    def hook(self, module: nn.Module, blocks: list[nn.Module]) -> None:
        """Fetch what a module needs before it is used in either direction, the neighbour's too; free it after."""
        units = self.units[:len(blocks)]

        def before(i, step, *_):
            self.backward |= step < 0
            self.need(units[i])
            again = self.backward and step > 0  # computed again, for its gradient
            if 0 <= i + step < len(units) and not again:
                self.fetch(units[i + step])

        def after(i, *_):
            if not self.backward:
                units[i].free()
        module.register_forward_pre_hook(self.begin)
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(before, i, 1))
            block.register_forward_hook(partial(after, i))
            block.register_full_backward_pre_hook(partial(before, i, -1))
        for unit in self.units:
            unit.free()

    def begin(self, *_) -> None:
        """Before the forward pass of the whole (of what wraps `module`, if not of that): fetch what no list holds."""
        self.backward = False
        for unit in self.units[self.blocks:]:
            self.need(unit)

    def start(self, unit: Unit, action: Callable, *x) -> None:
        """Do what talks to other ranks beside what goes on here, or (overlap=False) now."""
        unit.job = WIRE.submit(torch.no_grad()(action), *x)
        if not self.overlap:
            unit.job.result()

    def fetch(self, unit: Unit) -> None:
        """Begin to collect parameters that are not there."""
        if not unit.there:
            unit.full.untyped_storage().resize_(unit.full.nbytes)
            unit.there = True
            self.start(unit, unit.collect)

    def need(self, unit: Unit | None) -> None:
        """Go on when the parameters are there."""
        if unit:
            self.fetch(unit)
            unit.job and unit.job.result()

    def arrived(self, unit: Unit, p: nn.Parameter) -> None:
        """A gradient is there; the last one of a unit sends them all."""
        unit.waiting -= 1
        if unit.waiting == 0:
            unit.waiting = len(unit.named)
            if self.stage > 1 or self.last and self.overlap:
                self.send(unit)

    def send(self, unit: Unit) -> None:
        """Begin to sum a unit's gradients; they, and with stage 3 the parameters, are given back."""
        rows = unit.master.new_zeros(unit.full.shape)
        for name, view in unit.views(rows).items():
            if unit.named[name].grad is not None:
                view.copy_(unit.named[name].grad)
                unit.named[name].grad = None
        if self.stage == 3:
            unit.free()
        self.start(unit, unit.reduce, rows)
        unit.sent = True

    def sync(self) -> None:
        """After the backward pass: the gradients of `pieces` are summed over all ranks."""
        for unit in self.units:
            if not unit.sent or unit.waiting < len(unit.named):  # not yet, or a parameter had no part in it
                self.send(unit)
        for unit in self.units:
            unit.job.result()
            unit.sent, unit.waiting = False, len(unit.named)

    @torch.no_grad()
    def spread(self) -> None:
        """After the optimizer's step: parameters to all ranks, gradients to zero."""
        for unit in self.units:
            unit.grad.zero_()
            if self.stage == 3:
                unit.free()
            elif self.stage or unit.full.dtype != unit.master.dtype:
                self.start(unit, unit.collect)
        for unit in self.units:
            unit.job and unit.job.result()


