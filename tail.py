

def work(rank: int, world: int, port: int, words: list[str]) -> None:
    """A process of the harness"""
    o = options(Options, words)
    torch.set_default_dtype(getattr(torch, o.dtype))
    torch.set_num_threads(1)
    Group.timeout = limit = datetime.timedelta(seconds=o.timeout)
    if "LOCAL_RANK" in os.environ:
        dist.init_process_group("gloo", timeout=limit)
    else:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, timeout=limit)
    sys.stdout = open(os.devnull, "w") if dist.get_rank() else sys.stdout
    fine = harness(o, words)
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(not fine)


def main():
    words = sys.argv[1:]
    o = options(Options, words)
    if "LOCAL_RANK" in os.environ:
        work(0, 0, 0, words)
    else:
        torch.multiprocessing.spawn(work, (o.ranks, 29511, words), o.ranks)


if __name__ == "__main__":
    run(main)
