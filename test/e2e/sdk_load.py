"""Load by many real SDK clients at once; see sdk_load --help. Each worker process (this file with --worker) holds its share of
the training clients, of their pipelined steps and of the concurrent samples; the parent compares what they counted with the
server's own counters."""

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import threading
import time

from common import adam, prompt, sft_datum, tokens
from daemon import end

WORDS = 6  # tokens of a prompt
LONG = 256  # tokens of a datum


# ------------------------------------------------------------------------------------------ a worker process
class Worker:
    """Counts what it was given results for, and checks their values."""

    def __init__(self, url, options):
        import tinker
        self.types, self.options = tinker.types, options
        self.service = tinker.ServiceClient(base_url=url)
        self.trainers = [f.result() for f in [self.service.create_lora_training_client("tiny", rank=2, seed=1)
                                              for _ in range(options["clients"])]]
        self.sampler = self.service.create_sampling_client(base_model="tiny").result()
        self.lock, self.counts, self.errors = threading.Lock(), collections.Counter(), []
        self.losses = [[] for _ in self.trainers]
        self.samples = {}

    def guarded(self, work, *args):
        try:
            work(*args)
        except Exception as error:  # noqa: BLE001 - any error is the finding
            with self.lock:
                self.errors.append(f"{type(error).__name__}: {error}")

    def train(self, number, until):
        """Keeps `depth` futures of one client waiting; every client does the same steps, so all must see the same losses."""
        client, waiting, step = self.trainers[number], collections.deque(), 0
        batches = [[sft_datum(LONG, seed=i * 100 + j) for j in range(self.options["data"])] for i in range(7)]
        while time.monotonic() < until or waiting:
            while time.monotonic() < until and len(waiting) < self.options["depth"]:
                waiting.append(("forward_backward", client.forward_backward(batches[step % 7], "cross_entropy")))
                waiting.append(("optim_step", client.optim_step(adam(learning_rate=1e-3))))
                step += 1
            kind, future = waiting.popleft()
            result = future.result()
            if kind == "forward_backward":
                self.losses[number].append(result.metrics["loss:sum"])
            with self.lock:
                self.counts[kind] += 1

    def sample(self, until):
        """Keeps so many samples under way; one that is repeated must repeat its tokens."""
        waiting, number = collections.deque(), 0
        while time.monotonic() < until or waiting:
            while time.monotonic() < until and len(waiting) < self.options["samples"]:
                seed = number % 50
                params = self.types.SamplingParams(max_tokens=4, seed=seed, stop=[])
                waiting.append((seed, self.sampler.sample(prompt(tokens(WORDS, seed)), 1, params)))
                number += 1
            seed, future = waiting.popleft()
            got = list(future.result().sequences[0].tokens)
            assert got == self.samples.setdefault(seed, got), f"sample {seed} gave {got}, and before {self.samples[seed]}"
            with self.lock:
                self.counts["sample"] += 1

    def run(self, seconds):
        until = time.monotonic() + seconds
        work = [(self.train, i, until) for i in range(len(self.trainers))] + [(self.sample, until)]
        threads = [threading.Thread(target=self.guarded, args=w) for w in work]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        return {"counts": self.counts, "errors": self.errors, "losses": self.losses, "samples": self.samples}


def worker(url, options):
    one = Worker(url, options)
    print("ready", flush=True)
    seconds = float(sys.stdin.readline())
    print(json.dumps(one.run(seconds)), flush=True)
    sys.stdin.readline()  # the parent has read the counters
    end(one.service)
    os._exit(0)


# ------------------------------------------------------------------------------------------ the parent
def metrics(url):
    import urllib.request
    with urllib.request.urlopen(url + "/metrics", timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    return {line.rsplit(" ", 1)[0].removeprefix("tinkerbell_"): float(line.rsplit(" ", 1)[1]) for line in lines if line[0] != "#"}


def share(total, parts, index):
    return total // parts + (index < total % parts)


def load(server, seconds, clients=64, samples=300, futures=2000, processes=4, data=4, say=lambda text: None):
    """Runs the load against a Daemon; returns what was measured, and raises AssertionError on any fault."""
    depth = -(-futures // clients)
    workers = []
    for i in range(processes):
        options = {"clients": share(clients, processes, i), "samples": share(samples, processes, i), "depth": depth, "data": data}
        command = [sys.executable, os.path.abspath(__file__), "--worker", server.url, json.dumps(options)]
        env = dict(os.environ, TINKER_API_KEY="tml-load", TINKER_TELEMETRY="0")
        workers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env))
    try:
        for w in workers:
            assert w.stdout.readline().strip() == "ready", "a worker did not start"
        before = metrics(server.url)
        say(f"{processes} processes are ready")
        for w in workers:
            print(seconds, file=w.stdin, flush=True)
        memory, waiting = watch(server, workers, seconds, say)
        found = [json.loads(w.stdout.readline()) for w in workers]
        after = metrics(server.url)
        for w in workers:
            print("end", file=w.stdin, flush=True)
        for w in workers:
            assert w.wait(60) == 0
    finally:
        for w in workers:
            if w.poll() is None:
                w.kill()
            w.stdin.close()
            w.stdout.close()
    return judge(found, before, after, memory, waiting)


def watch(server, workers, seconds, say):
    """The server's memory every half second, and the most futures and samples that were waiting at once."""
    memory, waiting, until = [], collections.Counter(), time.monotonic() + seconds
    while time.monotonic() < until and all(w.poll() is None for w in workers):
        m = metrics(server.url)
        memory.append(server.memory())
        for name in ("futures_pending", "waiters", "http_connections"):
            waiting[name] = max(waiting[name], int(m[name]))
        if len(memory) % 20 == 0:
            say(f"{memory[-1] >> 20} MiB, {int(m['futures_pending'])} futures pending, {int(m['futures_done'])} done and kept")
        time.sleep(0.5)
    return memory, dict(waiting)


def judge(found, before, after, memory, waiting):
    errors = [e for f in found for e in f["errors"]]
    assert not errors, f"{len(errors)} errors, the first: {errors[0]}"
    counts = sum((collections.Counter(f["counts"]) for f in found), collections.Counter())
    for what in ("executed", "submitted"):
        for kind, n in counts.items():
            key = f'ops_{what}_total{{type="{kind}"}}'
            assert after[key] - before[key] == n > 0, f"the server {what} {after[key] - before[key]:.0f} {kind}, clients have {n}"
    for name in after:
        assert not name.startswith("ops_failed") or after[name] == before[name], name
    assert after["futures_pending"] == 0
    losses = [one for f in found for one in f["losses"]]
    longest = max(losses, key=len)
    for one in losses:
        assert one == longest[:len(one)], "clients with equal steps saw different losses"
    samples = {}
    for f in found:
        for seed, got in f["samples"].items():
            assert got == samples.setdefault(seed, got), f"sample {seed} differs between processes"
    return {"counts": dict(counts), "memory": memory, "most": waiting, "steps": len(longest), "kept": int(after["futures_done"])}


def main():
    from daemon import Daemon, find_daemon
    from random_model import make_model
    parser = argparse.ArgumentParser(prog="sdk_load", description="Many real SDK clients against one server: training clients that "
                                     "pipeline their steps, and samples, at once. No error may come, no operation may be lost or "
                                     "run twice (the server's counters against the clients'), and equal work must give equal numbers.")
    parser.add_argument("--duration", type=float, default=60, metavar="SECONDS", help="default 60")
    parser.add_argument("--clients", type=int, default=64, help="training clients (64)")
    parser.add_argument("--samples", type=int, default=300, help="samples under way at once (300)")
    parser.add_argument("--futures", type=int, default=2000, help="training futures that wait at once (2000)")
    parser.add_argument("--processes", type=int, default=4, help="SDK processes (4)")
    parser.add_argument("--data", type=int, default=4, help=f"data of {LONG} tokens in each step: more of them keep more futures "
                        "waiting (4)")
    parser.add_argument("--daemon", help="the server (default: $TB_DAEMON, or what is built in build/)")
    options = parser.parse_args()
    if options.daemon:
        os.environ["TB_DAEMON"] = options.daemon
    if not find_daemon():
        parser.error("no server to test: build it, or name it with --daemon")
    with tempfile.TemporaryDirectory() as folder:
        server = Daemon({"tiny": make_model(os.path.join(folder, "tiny"))}, os.path.join(folder, "data")).start()
        try:
            got = load(server, options.duration, options.clients, options.samples, options.futures, options.processes, options.data, print)
        finally:
            server.stop()
    memory = got["memory"]
    before, end = max(memory[:len(memory) * 2 // 3]), max(memory)
    print("operations: " + ", ".join(f"{n} {kind}" for kind, n in sorted(got["counts"].items())))
    print("most at once: " + ", ".join(f"{n} {name}" for name, n in got["most"].items()))
    print(f"memory: {memory[0] >> 20} MiB at first, at most {before >> 20} in the first two thirds and {end >> 20} in all")
    if options.duration >= 60 and end > 1.2 * before:
        print("sdk_load: memory grows", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
