"""The CUDA backend behind a server: the module of the emulation in test/cuda/ in the place of tb-cuda.so; or a GPU where all
servers are told to use it, as test/gpu/tour does."""

import os
import re
import subprocess
import urllib.request

import pytest
from daemon import OPTIONS, find_daemon
from tinker_raw import Failed, Raw, datum

TOKENS = [(7 * i * i + 3) % 300 for i in range(40)]
PROMPT = TOKENS[:9]
CUDA = ["--backend", "cuda", "--memory", "256M"]


@pytest.fixture
def emulated(monkeypatch):
    """set(**environment): servers started from now on find the emulated module. Device memory is out of the host's reach."""
    if "cuda" in OPTIONS:
        pytest.skip("of the emulation")
    module = os.path.join(os.path.dirname(find_daemon()), "..", "..", "test", "cuda", "tb-cuda-emulated.so")
    if not os.path.exists(module):
        pytest.skip("the emulation is not built")

    def set_up(**environment):
        monkeypatch.setenv("TB_CUDA_MODULE", module)
        monkeypatch.setenv("TB_EMU_PROTECT", "1")
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))

    return set_up


@pytest.fixture
def cuda(request):
    """set(**environment): servers started from now on with CUDA find a GPU, or the emulated module."""
    return (lambda **_: None) if "cuda" in OPTIONS else request.getfixturevalue("emulated")


def example(n=30):
    return datum(TOKENS[:n], target_tokens=TOKENS[1:n + 1], weights=[1.0] * n)


def train(raw, model):
    """Losses and logprobs of two steps, and what comes after them."""
    said = []
    for seq in (1, 3):
        said.append(raw.forward_backward(model, seq, [example(), example(11)]))
        raw.optim_step(model, seq + 1, 1e-2)
    said.append(raw.forward_backward(model, 5, [example()], forward_only=True))
    return said


def numbers(said):
    return [x for step in said for row in step["logprobs"] for x in row]


def test_computes_what_the_cpu_computes(cuda, start, tiny, tiny_llama):
    models = {"tiny": tiny, "tiny-llama": tiny_llama}
    cpu = start(models, args=["--backend", "cpu"])
    cuda(TB_EMU_DEVICES=2)
    gpu = start(models, args=CUDA if "cuda" in OPTIONS else [*CUDA, "--devices", "1,0"])
    assert re.search(r"cuda: device \d \(.+\): 256 MiB of ", gpu.log()) and "cuda: " not in cpu.log()
    for name in ("tiny", "tiny-llama"):
        results = []
        for url in (cpu.url, gpu.url):
            with Raw(url) as raw:
                session = raw.create_session()
                results.append(train(raw, raw.create_model(session, name, seed=3)))
        want, got = map(numbers, results)
        assert len(want) == len(got) > 100
        assert max(abs(a - b) for a, b in zip(want, got)) < 1e-3


def test_sampled_logprobs_are_forward_logprobs(cuda, start):
    cuda()
    with Raw(start(args=CUDA, dtype="bf16").url) as raw:
        session = raw.create_session()
        model = raw.create_model(session, "tiny", seed=3)
        train(raw, model)
        saved = raw.ok("save_weights_for_sampler", {"model_id": model, "path": "s", "seq_id": 6, "type": "save_weights_for_sampler"})
        sampler = raw.create_sampling_session(session, 0, model_path=raw.retrieve(saved["request_id"])["path"])
        sequences = raw.sample(sampler, 1, PROMPT, n=3, max_tokens=20, seed=5, temperature=1.0)["sequences"]
        for i, s in enumerate(sequences):
            row = PROMPT + s["tokens"]
            scored = raw.forward_backward(model, 7 + i, [datum(row[:-1], target_tokens=row[1:], weights=[1.0] * (len(row) - 1))],
                                          forward_only=True)
            assert scored["logprobs"][0][len(PROMPT) - 1:] == s["logprobs"]


def test_replicas_compute_the_same(emulated, start):
    """One model on three GPUs: each tenant's numbers and samples are those of one GPU, to the bit."""
    emulated(TB_EMU_DEVICES=3)
    said = []
    for devices in ("0", "0,1,2"):
        with Raw(start(args=[*CUDA, "--devices", devices]).url) as raw:
            session = raw.create_session()
            models = [raw.create_model(session, "tiny", seq=i, seed=i) for i in range(4)]
            base = raw.create_sampling_session(session, 0, base_model="tiny")
            said.append([numbers(train(raw, m)) for m in models])
            said[-1] += [raw.sample(base, i + 1, PROMPT, n=2, max_tokens=8, seed=i)["sequences"] for i in range(3)]
    assert said[0] == said[1]
    assert said[0][0] != said[0][1]


def test_a_lost_device(emulated, start):
    """What needs it fails with category server and says why, at once and for good; the server answers and drains."""
    emulated(TB_EMU_FAIL_AFTER=6000)
    server = start(args=CUDA)
    with Raw(server.url) as raw:
        session = raw.create_session()
        model = raw.create_model(session, "tiny", seed=3)
        with pytest.raises(Failed) as first:
            for seq in range(1, 1000):
                raw.forward_backward(model, seq, [example()])
        assert first.value.category == "server"
        assert "CUDA device 0 (emulated GPU) is lost: " in first.value.answer["error"]
        with pytest.raises(Failed) as again:
            raw.create_model(session, "tiny", seq=1)
        assert (again.value.category, again.value.answer["error"]) == ("server", first.value.answer["error"])
        sampler = raw.create_sampling_session(session, 0, base_model="tiny")
        with pytest.raises(Failed) as sampled:
            raw.sample(sampler, 1, PROMPT, max_tokens=4)
        assert (sampled.value.category, sampled.value.answer["error"]) == ("server", first.value.answer["error"])
        assert raw.get("healthz").status == 200
    with urllib.request.urlopen(server.url + "/metrics", timeout=60) as reply:
        assert b"tinkerbell_memory_limit_bytes 268435456" in reply.read()


@pytest.mark.parametrize("environment,word", [({"TB_EMU_DEVICES": 0}, "no CUDA device can be used: "),
                                              ({"TB_EMU_MEMORY": 50 << 20}, "staging buffers need")])
def test_no_device(emulated, tiny, tmp_path, environment, word):
    emulated(**environment)
    run = subprocess.run([find_daemon(), "serve", "--model", f"x={tiny}", "--backend", "cuda", "--data", str(tmp_path / "data"),
                          "--log-level", "error"], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2 and word in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


def test_auto_takes_the_cpu(emulated, start, monkeypatch):
    """Where no GPU can be used `auto` says so in a line, and the server runs on the CPU."""
    emulated(TB_EMU_DEVICES=0)
    lines = [line for line in start(args=["--backend", "auto"]).log().splitlines() if " takes the CPU: " in line]
    assert len(lines) == 1
    monkeypatch.setenv("TB_CUDA_MODULE", "/nowhere/tb-cuda.so")
    lines = [line for line in start(args=["--backend", "auto"]).log().splitlines() if " takes the CPU: " in line]
    assert len(lines) == 1
