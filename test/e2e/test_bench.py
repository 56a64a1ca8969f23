"""The scripts of bench/ run on a tiny model and write what bench/table and bench/plot read. Nothing is asserted of speed."""

import json
import os
import subprocess
import sys

import pytest
from daemon import ROOT, find_daemon
from random_model import make_model
from tinker_raw import Raw

ROWS = {
    "start": {"exec to ready", "ready to first sample", "small model: exec to ready"},
    "training": {"fwd+bwd 2 x 128", "small model: fwd+bwd 2 x 128", "optim_step, rank 32", "fwd+bwd, 256 tokens a datum"},
    "prefill": {"prefill of 256", "prefill, 128 tokens"},
    "decode": {"decode 1, base", "decode 4, rank 8", "decode 4, rank 32"},
    "tenants": {"tenants 16: fwd+bwd, together", "tenants 16: decode, one by one", "tenants 16: fwd+bwd, 1 datum each"},
    "rl": {"RL step: whole step", "publish to first token, prompt of 16"},
    "futures": {"smallest operation, 64 clients", "forward of 8 tokens, 1 client: p99", "1,000 waiting polls: memory"},
    "tinkerbell": {"5 batches, sync", "5 batches, async", "users 16", "small model: users 4: a batch and its step"},
    "http": {"64 connections, per second of CPU time", "1,024 connections, per second"},
    "chat": {"openai, 3 requests: one at a time", "ollama, 3 requests with a schema: all at once",
             "demo model: llama.cpp, 3 requests: times more"},
}


def bench(name, *args):
    run = subprocess.run([sys.executable, os.path.join(ROOT, "bench", name), *map(str, args)], capture_output=True, text=True,
                         timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("bench-models")


@pytest.mark.parametrize("script", ROWS)
def test_script(script, models, tmp_path):
    out = tmp_path / "out.json"
    bench("run", "--only", script, "--daemon", find_daemon(), "--models", models, "--shape", "tiny", "--threads", 2, "--quick",
          "--json", out)
    (run,) = json.loads(out.read_text())["runs"]
    rows = {row["what"]: row for row in run["rows"]}
    assert run["script"] == script and ROWS[script] <= set(rows)
    assert all(row["values"]["tinkerbell"] and row["unit"] for row in rows.values())
    table = bench("table", out)
    assert all(what in table for what in rows)
    if any(row["curve"] for row in rows.values()):
        bench("plot", out, tmp_path / "out.svg")
        assert (tmp_path / "out.svg").read_text().count("<polyline") >= 1


def test_gpu(models, tmp_path):
    """The script for a GPU, tried on the CPU."""
    out = tmp_path / "out.json"
    bench("gpu", "--backend", "cpu", "--daemon", find_daemon(), "--models", models, "--shape", "tiny,tiny", "--threads", 2,
          "--peak", 1, "--quick", "--json", out)
    runs = json.loads(out.read_text())["runs"]
    for run in runs:
        rows = {row["what"]: row for row in run["rows"]}
        assert {"fwd+bwd 2 x 128, rank 32", "decode 1, base", "decode 4, 1 adapter", "decode 4, 4 adapters", "prefill of 2 x 64",
                "fwd+bwd: model FLOPs of the data sheet's peak", "decode 4, 4 adapters: over base"} <= set(rows)
        assert all(row["values"]["tinkerbell"] and row["unit"] for row in rows.values())
        tokens, = rows["fwd+bwd 2 x 128, rank 32"]["values"]["tinkerbell"]
        work, = (row["work"] for what, row in rows.items() if what.startswith("fwd+bwd 2"))
        part, = rows["fwd+bwd: model FLOPs of the data sheet's peak"]["values"]["tinkerbell"]
        assert part == pytest.approx(100 * tokens * work["flops"] / work["tokens"] / 1e12)
    assert len(runs) == 2 and (tmp_path / "out.md").read_text() + "\n" == bench("table", out)


def test_shards(start, tiny, tmp_path):
    """A model in several files, as the large ones are, is the same model."""
    parts = make_model(str(tmp_path / "parts"), shard=50000)
    assert len([name for name in os.listdir(parts) if name.endswith(".safetensors")]) > 3
    with Raw(start({"one": tiny, "parts": parts}).url) as raw:
        session = raw.create_session()
        one, many = (raw.sample(raw.create_sampling_session(session, seq, base_model=name), 1, [3, 1, 4, 1, 5], max_tokens=20,
                                seed=7)["sequences"] for seq, name in enumerate(("one", "parts")))
    assert one == many


def test_run_names_what_failed(models):
    run = subprocess.run([sys.executable, os.path.join(ROOT, "bench", "run"), "--only", "prefill", "--daemon", find_daemon(),
                          "--models", str(models), "--shape", "none"], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1 and run.stderr.strip().endswith("failed: prefill")
