"""sample.py's server under load: 64 clients that come at random, ask, read, and leave early or in the middle.

Usage: python tests/bench_serve.py [seconds of the first part] [layers: more take more time] [turns of the second part]

Part 1: random arrivals for so many seconds; of the requests a tenth is cancelled while it streams, and a twentieth is
reset right after it was sent. Every reply that is read to its end must be, token for token, what the engine decodes offline.
Prints replies, cancels, resets, what was lost or mixed, and the server's memory over the time.
Part 2: 64 clients without pauses against offline decoding of the same requests with 64 slots, by turns: useful tokens
over the seconds that the engine works, over all seconds, and, as cores may be shared, over the processor time of the
thread that decodes and of the whole process.
Part 3: the command line's time from its start to the first sampled text.
"""
import asyncio
import json
import os
import platform
import random
import re
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bpe  # noqa: E402
import model  # noqa: E402
import sample  # noqa: E402

CLIENTS = 64


def make_checkpoint(path, layers):
    """A model of large random weights, whose text depends on all that was before, with a tokenizer of our own files."""
    text = [file.read_text(encoding="utf-8") for file in sorted(ROOT.glob("*.py"))]
    tokenizer = bpe.train("bpe", text, 2048)
    torch.manual_seed(0)
    gpt = model.GPT(model.Config(vocab_size=2048, block_size=256, n_layer=layers, n_head=4, n_embd=256, tie_embeddings=False)).eval()
    with torch.no_grad():
        for weight in gpt.parameters():
            if weight.ndim > 1:
                weight.normal_(std=2 / weight.shape[-1] ** 0.5)
    model.save_checkpoint(path, gpt, tokenizer=tokenizer.to_dict())
    return gpt, tokenizer


def make_work(tokenizer, count):
    """Requests (prompt ids, new tokens) that all differ."""
    rng = random.Random(0)
    return [([rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(4, 48))], rng.randint(8, 128)) for _ in range(count)]


def offline(gpt, tokenizer, work):
    """Outputs; seconds of the engine, all seconds, processor time of the thread, and of the process."""
    started, cpu = time.perf_counter(), (time.thread_time(), time.process_time())
    end = tokenizer.special_tokens[sample.END]
    requests = [sample.Request(ids, count, sample.Sampling(0, 0), end=end) for ids, count in work]
    engine = sample.Engine(gpt, (), tokenizer.vocab_size, CLIENTS)
    for request in requests:
        engine.submit(request)
    while engine.step():
        pass
    times = [sum(s for _, s in engine.spent.values()), time.perf_counter() - started, time.thread_time() - cpu[0], time.process_time() - cpu[1]]
    return [request.output[:-1] if request.done == "end" else request.output for request in requests], times


def tie(gpt, tokenizer, ids, expected, found):
    """Whether two outputs part where the two best tokens are equal but for rounding, which depends on the batch."""
    at = next((i for i, (a, b) in enumerate(zip(expected, found)) if a != b), None)
    if at is None:
        return False
    with torch.inference_mode():
        logits = gpt(torch.tensor([(ids + expected[:at])[-256:]]))[0, -1, :tokenizer.vocab_size]
    return (logits[expected[at]] - logits[found[at]]).abs().item() < 1e-3


class Service:
    """The server as a process."""

    def __init__(self, ckpt):
        self.process = subprocess.Popen([sys.executable, ROOT / "sample.py", "--serve", "--port=0", "--device=cpu", f"--ckpt={ckpt}"],
                                        stdout=subprocess.PIPE, text=True)
        self.port = int(re.search(r":(\d+)/", self.process.stdout.readline())[1])

    def memory(self):
        """Resident megabytes"""
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[1]) / 1024

    def metrics(self):
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n")
            text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
        return {name: float(value) for name, value in re.findall(r"^(sample_\w+) ([\d.e+-]+)$", text, re.M)}

    def times(self):
        """Seconds of the engine, of the clock, of the busiest thread, of the process"""
        def ticks(path):
            return sum(map(int, path.read_text().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")
        metrics, folder = self.metrics(), Path(f"/proc/{self.process.pid}")
        busy = metrics["sample_prefill_seconds_total"] + metrics["sample_decode_seconds_total"]
        return [busy, time.perf_counter(), max(ticks(task / "stat") for task in (folder / "task").iterdir()), ticks(folder / "stat")]

    def close(self):
        self.process.terminate()
        self.process.wait()


async def ask(port, ids, count, leave=-1):
    """The tokens of a streamed reply; after `leave` events (0: before any) the client goes away, and gets None."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps(dict(prompt=ids, max_tokens=count, temperature=0, top_k=0, stream=True)).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    await writer.drain()
    tokens, events = [], 0
    try:
        if leave == 0:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
            return None
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head:
            return head + await reader.read()
        while True:
            event = await reader.readuntil(b"\n\n")
            if event == b"data: [DONE]\n\n":
                return tokens
            tokens += json.loads(event[6:])["choices"][0]["token_ids"]
            events += 1
            if events == leave:
                return None
    finally:
        writer.close()


async def storm(service, work, expected, seconds, judge):
    """Part 1: counts of what happened."""
    until, counts, rng = time.monotonic() + seconds, Counter(), random.Random(1)

    async def client():
        while time.monotonic() < until:
            await asyncio.sleep(rng.expovariate(2))
            which = rng.randrange(len(work))
            leave = rng.choices((-1, 0, rng.randint(1, 4)), (17, 1, 2))[0]
            try:
                tokens = await ask(service.port, *work[which], leave)
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                counts["lost"] += 1
                print("lost:", repr(error))
                continue
            if isinstance(tokens, bytes):
                counts["refused"] += 1
            elif tokens is None:
                counts["reset" if leave == 0 else "cancelled"] += 1
            elif leave < 0 and tokens == expected[which]:
                counts["right"] += 1
            elif leave < 0:
                counts[judge(which, tokens)] += 1
            else:
                counts["over before its cancel"] += 1

    async def watch():
        for fifth in range(1, 6):  # the lowest is what stays; state that grows or shrinks is copied, which makes peaks
            found = []
            for _ in range(max(1, seconds // 5)):
                found.append(service.memory())
                await asyncio.sleep(1)
            print(f"memory in fifth {fifth} of the time: {min(found):.0f} to {max(found):.0f} MB", flush=True)

    await asyncio.gather(watch(), *(client() for _ in range(CLIENTS)))
    return counts


async def rush(service, work):
    """Part 2: the replies to all requests, by 64 clients without pauses."""
    todo, replies = list(range(len(work)))[::-1], {}

    async def client():
        while todo:
            which = todo.pop()
            replies[which] = await ask(service.port, *work[which])
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return [replies[which] for which in range(len(work))]


def first_text(ckpt):
    """Seconds from the start of the command to its first sampled text, and processor time of the whole command."""
    started, before = time.perf_counter(), os.times()
    process = subprocess.Popen([sys.executable, ROOT / "sample.py", f"--ckpt={ckpt}", "--prompt=def ", "--max_new_tokens=20", "--device=cpu"],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdout.read(5)  # the prompt and a byte
    seconds = time.perf_counter() - started
    process.communicate()
    after = os.times()
    return seconds, after.children_user + after.children_system - before.children_user - before.children_system


def main(seconds=150, layers=4, turns=3):
    with tempfile.TemporaryDirectory() as folder:
        ckpt = Path(folder) / "ckpt.pt"
        gpt, tokenizer = make_checkpoint(ckpt, layers)
        print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, "
              f"torch {torch.__version__}, {sum(p.numel() for p in gpt.parameters()):,} parameters", flush=True)
        work = make_work(tokenizer, 192)
        expected, _ = offline(gpt, tokenizer, work)
        service = Service(ckpt)
        try:
            def judge(which, found):
                return "right but for a tie" if tie(gpt, tokenizer, work[which][0], expected[which], found) else "MIXED"
            asyncio.run(rush(service, work[:CLIENTS]))  # warms up, so that memory is that of 64 streams
            if seconds:
                print(f"before: {service.memory():.0f} MB")
                counts = asyncio.run(storm(service, work, expected, seconds, judge))
                print(f"{seconds} s, {CLIENTS} clients:", ", ".join(f"{n:,} {name}" for name, n in counts.most_common()))
                time.sleep(1)
                print(f"then {service.memory():.0f} MB, active {service.metrics()['sample_active']:.0f}, waiting {service.metrics()['sample_waiting']:.0f}")
            tokens, rates = sum(map(len, expected)), {"offline": [], "server": []}
            for turn in range(turns):
                _, times = offline(gpt, tokenizer, work)
                rates["offline"].append([tokens / each for each in times])
                before = service.times()
                found = asyncio.run(rush(service, work))
                rates["server"].append([tokens / (b - a) for a, b in zip(before, service.times())])
                wrong = sum(a != b and judge(i, b) == "MIXED" for i, (a, b) in enumerate(zip(expected, found)))
                print(f"turn {turn}, tokens/s:", *(f"{kind} {' '.join(f'{rate:,.0f}' for rate in rates[kind][-1])}," for kind in rates),
                      f"wrong replies {wrong}", flush=True)
            for number, name in enumerate(("seconds of the engine", "all seconds", "the decoding thread's time", "the process's time")[:4 * turns]):
                a, b = (statistics.median(rate[number] for rate in rates[kind]) for kind in ("server", "offline"))
                print(f"server over offline, by {name}: {a / b:.2f}")
        finally:
            service.close()
        times, cpu = zip(*(first_text(ckpt) for _ in range(5)))
        print(f"first sampled text of the command line after {statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f}); "
              f"processor time of the whole command {statistics.median(cpu):.2f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
