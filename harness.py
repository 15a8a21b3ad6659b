

# ---- the harness: each form against one process with the same batches

SHAPE = dict(vocab_size=64, block_size=32, n_layer=4, n_head=8, n_kv_head=4, n_embd=32, balance_loss=0.0, router_z=0.0)
BATCH = 8
FORMS = {  # name: options; n is the number of ranks, h half of it
    "ddp, one message a parameter, after": "--mesh=dp{n} --bucket=1e-6 --overlap=False",
    "ddp, one message, after": "--mesh=dp{n} --bucket=1e6 --overlap=False",
    "ddp, one message a parameter": "--mesh=dp{n} --bucket=1e-6",
    "ddp, in buckets": "--mesh=dp{n} --bucket=0.05",
    "zero1": "--mesh=dp{n} --stage=1",
    "zero2": "--mesh=dp{n} --stage=2",
    "fsdp": "--mesh=dp{n} --stage=3",
    "fsdp, recompute": "--mesh=dp{n} --stage=3 --recompute",
    "fsdp, muon": "--mesh=dp{n} --stage=3 --optimizer=muon",
    "tp": "--mesh=tp{n}",
    "tp, muon": "--mesh=tp{n} --optimizer=muon",
    "pp, gpipe": "--mesh=pp{n} --schedule=gpipe",
    "pp, 1f1b": "--mesh=pp{n}",
    "cp": "--mesh=cp{n}",
    "ep": "--mesh=ep{n}",
    "dp x tp": "--mesh=dp{h},tp2 --stage=1",
    "pp x dp": "--mesh=pp2,dp{h} --stage=2",
    "pp x tp": "--mesh=pp{h},tp2",
    "dp x cp": "--mesh=dp{h},cp2 --stage=3",
    "dp x ep": "--mesh=dp{h},ep2 --stage=1 --optimizer=muon",
    "cp x tp": "--mesh=cp{h},tp2",
}
ADAM = SimpleNamespace(beta1=0.9, beta2=0.95, momentum=0.95)


def batches(o: Options, step: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets (BATCH, T) of a step: text in which a token says much about the next"""
    draw = torch.Generator().manual_seed(step)
    T, V = SHAPE["block_size"], SHAPE["vocab_size"]
    noise = torch.randint(3, (BATCH, T + 1), generator=draw)
    windows = (noise.cumsum(1) + torch.randint(V, (BATCH, 1), generator=draw)) % V
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def objective_of(o: Options) -> nn.Module:
    """A model with its loss, the same on all ranks"""
    import train
    torch.manual_seed(0)
    experts = 4 * ("ep" in o.mesh)
    config = Config(**SHAPE, n_expert=experts, recompute=o.recompute, init="gpt2")
    return train.Objective(GPT(config))


def move(named: dict, state: dict, roles: dict, norm: float, count: float, t: int, o: Options, wrap: Callable) -> None:
    """A step of the optimizer on gradients of the loss sum, clipped to a norm of 1"""
    import train
    for name, weight in named.items():
        update = train.OPTIMIZERS[o.optimizer] if model.ROLES[roles[name]].muon else train.adamw
        weight.grad /= count * max(1.0, norm / count)
        wrap(name, update)(weight, state[name], 0.01, t, ADAM)


def alone(o: Options) -> tuple[list, dict]:
    """Losses and weights of one process"""
    objective = objective_of(o)
    model.ops = model.Fast
    named = dict(objective.gpt.named_parameters())
    state, losses, roles = {name: [] for name in named}, [], objective.gpt.roles()
    for step in range(o.steps):
        tokens, targets = batches(o, step)
        loss, count = objective(tokens, targets)
        loss.backward()
        norm = torch.stack([p.grad.square().sum() for p in named.values()]).sum().sqrt().item()
        move(named, state, roles, norm, count.item(), step + 1, o, lambda name, update: update)
        objective.zero_grad()
        losses.append(loss.item() / count.item())
    return losses, {name: p.detach() for name, p in named.items()}


def live_bytes() -> int:
    """Bytes of all tensors that this process holds"""
    import gc
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def measure(o: Options) -> dict:
    """Train a form and one process alike: how far apart they end, bytes sent a step, memory, seconds a step"""
    losses, weights = alone(o)
    before = live_bytes()
    objective = objective_of(o)
    roles, config = objective.gpt.roles(), objective.gpt.config
    mesh = Mesh(o.mesh, dist.get_world_size())
    split = Split(objective, mesh, o, BATCH)
    state, own, seconds = {name: [] for name in split.pieces}, split.rows(BATCH), []
    micro = min(o.micro if split.pp.size > 1 else 2, len(own))
    far = 0.0
    for step in range(o.steps):
        began, sent = time.perf_counter(), Group.sent
        tokens, targets = (x[own] for x in batches(o, step))
        loss, count = split.backward(list(zip(tokens.chunk(micro), targets.chunk(micro))))
        split.sync()
        move(split.pieces, state, roles, split.norm(), count, step + 1, o, split.on_whole)
        split.spread()
        far = max(far, abs(loss / count - losses[step]))
        seconds.append(time.perf_counter() - began)
    sent = Group.sent - sent
    parts = [None] * dist.get_world_size()
    memory = live_bytes() - before
    dist.all_gather_object(parts, split.export(state))
    whole, _ = assemble(parts, config, len(parts))
    apart = max((whole[name] - weights[name]).abs().max().item() for name in weights)
    return dict(loss=far, weights=apart, sent=sent, memory=memory, seconds=sorted(seconds)[len(seconds) // 2])


def harness(o: Options, words: list[str]) -> bool:
    """Print a row for each form; whether all are exact"""
    n = dist.get_world_size()
    limit = 1e-9 if o.dtype == "float64" else 1e-4
    forms = {o.mesh: ""} if o.mesh else {k: FORMS[k] for k in FORMS if os.environ.get("ONLY", "") in k}
    fine = True
    print(f"{n} ranks, {o.steps} steps, {o.dtype}; against one process: difference of loss, of weights")
    print(f"{'form':36} {'loss':>8} {'weights':>8} {'KiB sent':>9} {'MiB':>6} {'ms':>7}")
    for name, form in forms.items():
        form = form.format(n=n, h=n // 2)
        if "1" in re.findall(r"[a-z]{2}(\d+)", form)[:2] and "," in form:
            continue
        row = measure(options(Options, form.split() + words))
        exact = row["loss"] < limit and row["weights"] < (limit if o.dtype == "float64" else 1e-2)
        fine &= exact
        print(f"{name:36} {row['loss']:8.1e} {row['weights']:8.1e} {row['sent'] / 1024:9.1f} "
              f"{row['memory'] / 2**20:6.2f} {1000 * row['seconds']:7.1f}{'' if exact else '  not exact'}", flush=True)
    return fine
