"""What the scripts of this folder share: options, the server and its peers, the machine's limits, the report.

A script measures in rounds; in each round every side does the same work in turn, and the machine's own rates are taken
once more, so that all meet the same machine. Only the standard library drives the server, so the client costs little.
"""

import argparse
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, os.path.join(ROOT, "test", "e2e"))
from daemon import Daemon, find_daemon  # noqa: E402
from tinker_raw import Raw, datum, sample_result  # noqa: E402

OURS, HF, LLAMA = "tinkerbell", "HF + PEFT", "llama.cpp"
LOWER_IS_BETTER = ("s", "ms", "us", "MiB", "%")


# ---------------------------------------------------------------------------------------------- options
def arguments(doc, repeat=3, extra=None, **defaults):
    """The options of every script, those of one in `extra`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--daemon", default=find_daemon(), help="the server to measure")
    parser.add_argument("--hf", metavar="PYTHON", help="interpreter with torch, transformers and peft")
    parser.add_argument("--llama", metavar="PYTHON", help="interpreter with llama-cpp-python and gguf")
    parser.add_argument("--models", default=os.path.join(ROOT, "build", "bench-models"),
                        help="folder where the random models are kept; made when missing, which needs numpy")
    parser.add_argument("--shape", default="qwen3-0.6b", help="the large model, as bench/make-random-model knows it")
    parser.add_argument("--backend", default="cpu", choices=["cpu", "cuda"], help="what the server and each peer compute on")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the server and of each peer")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bf16", "f32"])
    parser.add_argument("--option", action="append", default=[], help="one more for the server, as --option=--memory=8G")
    parser.add_argument("--repeat", type=int, help=f"rounds (default {repeat}, 1 with --quick)")
    parser.add_argument("--quick", action="store_true", help="one round, and less work in it")
    parser.add_argument("--json", metavar="FILE", help="write all values here")
    for name, settings in (extra or {}).items():
        parser.add_argument(name, **settings)
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    if not args.daemon:
        parser.error("no server found: build it, or name it with --daemon or TB_DAEMON")
    os.environ["TB_DAEMON"] = args.daemon
    args.repeat = args.repeat or (1 if args.quick else repeat)
    module = built(args, "src/cuda/tb-cuda.so")
    if args.backend == "cuda" and module:
        os.environ.setdefault("TB_CUDA_MODULE", module)
    return args


def built(args, name):
    """The path of a file in the server's build folder, None where it is not built."""
    build = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(args.daemon))))
    path = os.path.join(build, name)
    return path if os.access(path, os.R_OK) else None


def load_of(args, port, pid, *words):
    """What one run of bench/load measured; pid: whose CPU time and memory it takes down."""
    path = built(args, "bench/load")
    if not path:
        sys.exit("bench/load is not built: ninja -C BUILD bench/load")
    command = [path, *map(str, words), "--port", str(port), "--pid", str(pid)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def model(args, shape):
    folder = os.path.join(args.models, shape)
    if not os.path.exists(os.path.join(folder, "tokenizer_config.json")):
        print(f"making {folder}", file=sys.stderr)
        subprocess.run([sys.executable, os.path.join(HERE, "make-random-model"), folder, "--shape", shape], check=True,
                       stdout=subprocess.DEVNULL)
    return folder


# ---------------------------------------------------------------------------------------------- work
class Shape:
    """Counts a model's arithmetic and bytes. Flops are the least that the result needs: nothing is computed twice, and a
    query meets only the keys before it."""

    def __init__(self, folder, dtype):
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            c = json.load(f)
        self.vocab, self.context = c["vocab_size"], c["max_position_embeddings"]
        h, hd, ffn, self.layers = c["hidden_size"], c["head_dim"], c["intermediate_size"], c["num_hidden_layers"]
        q, kv = c["num_attention_heads"] * hd, c["num_key_value_heads"] * hd
        self.linears = [(h, q), (h, kv), (h, kv), (q, h), (h, ffn), (h, ffn), (ffn, h)]
        self.body = self.layers * sum(i * o for i, o in self.linears)
        self.head = h * self.vocab
        self.query = q * self.layers
        self.size = 4 if dtype == "f32" else 2

    def lora(self, rank):
        return rank * (self.layers * sum(i + o for i, o in self.linears) + self.linears[0][0] + self.vocab)

    def attention(self, length):
        return 2 * self.query * (length + 1)

    def training(self, rank, n, length):
        """fwd+bwd of n sequences: base products twice (their weights are frozen), LoRA and attention three times."""
        token = 4 * (self.body + self.head) + 6 * self.lora(rank) + 3 * self.attention(length)
        return {"flops": n * length * token, "tokens": n * length}

    def prefill(self, length, n=1):
        return {"flops": n * (length * (2 * self.body + self.attention(length)) + 2 * self.head), "tokens": n * length}

    def decode(self, n, rank=0, steps=1, adapters=None):
        """Steps of n sequences; where there is a rank each has an adapter of its own, or they share that many."""
        return {"bytes": steps * self.size * (self.body + self.head + (adapters or n) * self.lora(rank)),
                "flops": steps * 2 * n * (self.body + self.head + self.lora(rank)), "tokens": steps * n}


def least_seconds(work, machine):
    """Of one piece of work, or of several done one after the other; None where the machine's rates were not measured."""
    if not work or not machine:
        return None
    if isinstance(work, list):
        return sum(least_seconds(w, machine) for w in work)
    return max(work.get("bytes", 0) / (1e9 * machine["GB/s"]), work.get("flops", 0) / (1e9 * machine["GFLOP/s"]))


# ---------------------------------------------------------------------------------------------- the server
class Adapter:
    """A model in training."""

    def __init__(self, server, rank):
        self.server, self.seq = server, 0
        self.id = server.raw.create_model(server.session, "bench", rank=rank, seq=server.next(), seed=1)

    def submit(self, data, loss="cross_entropy"):
        self.seq += 1
        reply = self.server.raw.submit_forward_backward(self.id, self.seq, data, loss)
        if reply.status != 200:
            raise RuntimeError(f"forward_backward: {reply}")
        return reply.json["request_id"]

    def step(self):
        self.seq += 1
        return self.server.raw.optim_step(self.id, self.seq, 1e-5)

    def change(self):
        """One small step, so that B is not zero and every version differs."""
        self.server.finish([self.submit(self.server.data(1, 8))])
        self.step()

    def publish(self):
        """A sampler of the weights as they are now."""
        self.seq += 1
        ticket = self.server.raw.ok("save_weights_for_sampler", {
            "model_id": self.id, "sampling_session_seq_id": self.server.next(), "kind": "snapshot", "seq_id": self.seq,
            "type": "save_weights_for_sampler"})
        return self.server.raw.retrieve(ticket["request_id"])["sampling_session_id"]


class Server:
    """One server with one model, `bench`, and one client. As a context manager it is stopped at the end."""

    def __init__(self, args, shape):
        self.folder = model(args, shape)
        self.tmp = tempfile.TemporaryDirectory()
        self.daemon = Daemon({"bench": self.folder}, os.path.join(self.tmp.name, "data"), dtype=args.dtype,
                             args=["--backend", args.backend, "--threads", str(args.threads), *args.option])
        self.daemon.start(timeout=600)
        self.raw = Raw(self.daemon.url, timeout=600)
        self.session = self.raw.create_session()
        self.shape = Shape(self.folder, self.dtype(args))
        self.rng = random.Random(1)
        self.count = 0

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.raw.close()
        if kind is None:
            self.daemon.stop()
        else:
            self.daemon.kill()
        self.tmp.cleanup()

    def dtype(self, args):
        if args.dtype != "auto":
            return args.dtype
        if args.backend == "cuda":
            return "bf16"
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as f:
            return "bf16" if "avx512_bf16" in f.read() else "f32"

    def next(self):
        self.count += 1
        return self.count

    def ids(self, n):
        return [self.rng.randrange(self.shape.vocab) for _ in range(n)]

    def data(self, n, length):
        out = []
        for _ in range(n):
            t = self.ids(length + 1)
            out.append(datum(t[:-1], target_tokens=t[1:], weights=[1.0] * length))
        return out

    def finish(self, tickets):
        return [self.raw.retrieve(t) for t in tickets]

    def train(self, adapters, data):
        """Seconds of one forward_backward of each adapter, submitted together."""
        began = time.perf_counter()
        self.finish([a.submit(d) for a, d in zip(adapters, data)])
        return time.perf_counter() - began

    def base_sampler(self):
        return self.raw.create_sampling_session(self.session, self.next(), base_model="bench")

    def submit_sample(self, sampler, prompt, tokens, n=1, **params):
        reply = self.raw.submit_sample(sampler, self.next(), prompt, n=n, max_tokens=tokens, stop=[],
                                       **{"seed": self.count, **params})
        if reply.status != 200:
            raise RuntimeError(f"asample: {reply}")
        return reply.json["request_id"]

    def sample(self, samplers, prompts, tokens, n=1):
        """(seconds, sequences of each request) of requests that are submitted together; each sample has all its tokens."""
        began = time.perf_counter()
        results = self.finish([self.submit_sample(s, p, tokens, n) for s, p in zip(samplers, prompts)])
        seconds = time.perf_counter() - began
        results = [sample_result(r)["sequences"] for r in results]
        assert all(len(r) == n and len(s["tokens"]) == tokens for r in results for s in r)
        return seconds, results

    def prefill(self, sampler, length, n=1):
        return self.sample([sampler] * n, [self.ids(length) for _ in range(n)], 1)[0]

    def touch_cache(self):
        """Fills the KV cache once: the first use of a page of memory is the machine's time, paid by a server's first minutes."""
        base = self.base_sampler()
        while self.metric("tinkerbell_kv_pages_free") > 0:
            self.sample([base], [self.ids(2000)], 1)

    def metric(self, name):
        with urllib.request.urlopen(f"http://{self.raw.host}:{self.raw.port}/metrics") as answer:
            return sum(float(line.split()[-1]) for line in answer.read().decode().splitlines()
                       if line.split()[0].split("{")[0] == name)

    def decode(self, samplers, steps):
        """Seconds of `steps` tokens of a sequence of each sampler: what long answers take beyond answers of one token."""
        def run(tokens):
            return self.sample(samplers, [self.ids(16) for _ in samplers], tokens)[0]
        return run(steps + 1) - run(1)

    def memory(self, what="VmRSS"):
        return self.daemon.memory(what)


# ---------------------------------------------------------------------------------------------- peers
class Peer:
    """A process that does the same work with another library, one command a line; see the workers for the commands."""

    def __init__(self, name, python, args, worker, *words):
        env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
               "PYTHONWARNINGS": "ignore"}
        self.name = name
        began = time.perf_counter()
        self.process = subprocess.Popen([python, os.path.join(HERE, worker), args.backend, str(args.threads), *map(str, words)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.versions = self.answer()
        self.start_seconds = time.perf_counter() - began

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self.name} process ended")
        return json.loads(line)

    def ask(self, *words):
        self.process.stdin.write(" ".join(str(w) for w in words) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def seconds(self, *words):
        return self.ask(*words)["seconds"]

    def memory(self):
        return self.ask("memory")["rss"]


def hugging_face(args, folder, rank, memory=1.0):
    """rank 0: the base model alone. memory: the part of a GPU's that it may use."""
    return Peer(HF, args.hf, args, "hf_worker.py", folder, rank, memory)


def llama(args, folder):
    gguf = os.path.join(folder, "model.gguf")
    if not os.path.exists(gguf):
        print(f"making {gguf}", file=sys.stderr)
        subprocess.run([args.llama, os.path.join(HERE, "make-gguf"), folder, gguf], check=True)
    return Peer(LLAMA, args.llama, args, "llama_worker.py", gguf)


def peers(args, server, report, stack):
    """Those that were named, with the base model; each must give the server's greedy tokens about the same logprobs."""
    started = []
    if args.hf:
        started.append(stack.enter_context(hugging_face(args, server.folder, 0)))
    if args.llama:
        started.append(stack.enter_context(llama(args, server.folder)))
    same_model(server, report, started)
    return started


def same_model(server, report, started):
    """Peers must give the server's greedy tokens about the same logprobs."""
    prompt = server.ids(32)
    ticket = server.submit_sample(server.base_sampler(), prompt, 16, temperature=0)
    ours = sample_result(server.raw.retrieve(ticket))["sequences"][0]
    for peer in started:
        theirs = peer.ask("logprobs", *prompt, *ours["tokens"])["logprobs"][-16:]
        apart = statistics.mean(abs(a - b) for a, b in zip(ours["logprobs"], theirs))
        report.fact(peer.name, {**peer.versions, "logprobs apart, mean": apart})
        if apart > 0.25:
            raise RuntimeError(f"{peer.name} computes something else: logprobs {theirs}, ours {ours['logprobs']}")


# ---------------------------------------------------------------------------------------------- the report
class Report:
    """Rows of values of several sides, printed as one table and kept as JSON."""

    def __init__(self, script, args):
        self.args, self.rows = args, {}
        self.machine = {"GB/s": [], "GFLOP/s": []}
        self.out = {"script": script, "facts": {
            "backend": args.backend, "cpu": cpu_name(), "cores": os.cpu_count(), "threads": args.threads, "dtype": args.dtype,
            "rounds": args.repeat, "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime())}}

    def fact(self, name, value):
        self.out["facts"][name] = value

    def add(self, what, value, unit="tokens/s", side=OURS, work=None, curve=None):
        """work: what the limit is computed from, see Shape; curve: (name of the curve, label of its axis of x, x),
        a name for each curve of one unit."""
        row = self.rows.setdefault(what, {"what": what, "unit": unit, "work": work, "curve": curve, "values": {}})
        row["values"].setdefault(side, []).append(value)
        print(f"  {what}, {side}: {value:.4g} {unit}", file=sys.stderr, flush=True)

    def rates(self):
        """Measures the CPU or the GPU: how fast it reads memory, and its fastest product. Nothing where bench/kernels is not
        built."""
        kernels = built(self.args, "bench/kernels")
        if not kernels:
            return
        command = [kernels, "--backend", self.args.backend, "--threads", str(self.args.threads), "--dtype", self.args.dtype,
                   "--only", "limits"]
        text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        self.fact("device", text.split("\n", 1)[0])
        for unit in self.machine:
            self.machine[unit].append(float(re.search(r": ([\d.]+) " + unit + "$", text, re.M).group(1)))

    def rate(self, unit):
        """None where it was not measured."""
        return statistics.median(self.machine[unit]) if self.machine[unit] else None

    def finish(self):
        machine = {u: self.rate(u) for u in self.machine} if self.machine["GB/s"] else None
        for row in self.rows.values():
            row["median"] = {side: statistics.median(v) for side, v in row["values"].items()}
            seconds = least_seconds(row["work"], machine)
            row["limit"] = None
            if seconds:
                row["limit"] = row["work"]["tokens"] / seconds if row["unit"] == "tokens/s" else seconds * (
                    1e3 if row["unit"] == "ms" else 1)
        self.out.update(machine=machine, machine_values=self.machine, rows=list(self.rows.values()))
        print(table(self.out))
        if self.args.json:
            save(self.args.json, self.out)


def save(path, content):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(content, f, indent=1)
        f.write("\n")


def load(path):
    """The runs in a file of one script, or of bench/run."""
    with open(path, encoding="utf-8") as f:
        content = json.load(f)
    return content.get("runs", [content])


def cpu_name():
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as f:
        for line in f:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def number(x):
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def cell(values):
    if not values:
        return ""
    text = number(statistics.median(values))
    return text if len(values) == 1 else f"{text} ({number(min(values))} - {number(max(values))})"


def table(run):
    """One script's results as a Markdown table: medians, in brackets the lowest and highest."""
    rows = run["rows"]
    peers = [side for side in dict.fromkeys(s for r in rows for s in r["values"]) if side != OURS]
    with_limit = any(r["limit"] for r in rows)
    head = ["", OURS, *peers] + (["limit", "of it"] if with_limit else []) + (["of the best peer"] if peers else [])
    lines = [head]
    for r in rows:
        ours, lower = r["median"].get(OURS), r["unit"] in LOWER_IS_BETTER
        line = [f"{r['what']}, {r['unit']}", *(cell(r["values"].get(side)) for side in (OURS, *peers))]
        if with_limit:
            part = r["limit"] and (r["limit"] / ours if lower else ours / r["limit"])
            line += [number(r["limit"]), f"{100 * part:.0f} %"] if part else ["", ""]
        if peers:
            others = [r["median"][p] for p in peers if p in r["median"]]
            best = (min if lower else max)(others) if others and ours else None
            line.append(f"{number(ours / best)} x" if best else "")
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    facts = run["facts"]
    device = f"{facts.get('device', 'cuda')}, " if facts.get("backend") == "cuda" else ""
    title = f"{run['script']}: {device}{facts['cpu']}, {facts['threads']} threads, {facts['dtype']}"
    if run["machine"]:
        title += ", " + ", ".join(f"{number(v)} {u}" for u, v in run["machine"].items())
    return "\n".join([title, "", *text, ""])
