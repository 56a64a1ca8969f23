"""Memory: a server with room for one or two of twelve adapters gives what one with ample memory gives, and what can never fit is refused."""

import os
import re
import urllib.request

import pytest
import tinker
from daemon import Daemon, end
from tinker import types

RANK, TENANTS, ROUNDS = 256, 12, 2


def metrics(server):
    with urllib.request.urlopen(server.url + "/metrics", timeout=60) as reply:
        text = reply.read().decode()
    return {m[1]: float(m[2]) for m in re.finditer(r"^tinkerbell_(\S+) (\S+)$", text, re.M)}


def datum(seed, n=24):
    tokens = [(seed * 31 + i * i * 7) % 300 for i in range(n + 1)]
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]),
                       loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * n})


def run(server):
    """Training, sampling and saving of all tenants in a mixed order; everything that they were told."""
    service = tinker.ServiceClient(base_url=server.url)
    clients = [service.create_lora_training_client(base_model="tiny", rank=RANK, seed=i).result() for i in range(TENANTS)]
    said, samplers = [], {}
    for turn in range(ROUNDS):
        futures = []
        for i, client in enumerate(clients):
            futures += [client.forward_backward([datum(i), datum(i + 50)], "cross_entropy"),
                        client.forward_backward([datum(i + turn)], "cross_entropy"),
                        client.optim_step(types.AdamParams(learning_rate=1e-2))]
            if i % 3 == turn % 3:  # accumulated, and still there when it comes back
                futures.append(client.forward_backward([datum(i + 100)], "cross_entropy"))
        for future in futures:
            result = future.result()
            said.append(sorted(result.metrics.items()) if result.metrics else None)
        for i in (turn, turn + 4, turn + 8):
            samplers[i] = clients[i].save_weights_and_get_sampling_client().result()
        clients[turn].save_state(f"turn-{turn}").result()
        params = types.SamplingParams(max_tokens=8, seed=turn, temperature=1.0)
        prompt = types.ModelInput.from_ints(list(range(5, 25)))
        futures = [samplers[i].sample(prompt, num_samples=2, sampling_params=params) for i in sorted(samplers)]
        for future in futures:
            said.append([(s.tokens, s.logprobs) for s in future.result().sequences])
    path = clients[0].save_state("last").result().path
    clients[3].load_state_with_optimizer(path).result()
    for client in clients:
        said.append(client.forward([datum(7)], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].tolist())
    use = metrics(server)
    end(service)
    return said, use


def test_paging_changes_nothing(start, tmp_path):
    ample = start()
    want, use = run(ample)
    assert use["page_outs_total"] == 0
    kinds = {kind: use[f'memory_bytes{{kind="{kind}"}}'] for kind in ("weights", "other", "workspaces", "adapters", "versions")}
    adapters = kinds.pop("adapters") + kinds.pop("versions")
    limit = int((sum(kinds.values()) + 2.5 * adapters / TENANTS) * 8 / 7)  # the KV pool takes an eighth
    small = start(args=["--memory", str(limit)])
    got, use = run(small)
    assert got == want
    assert use["page_outs_total"] > TENANTS and use["page_ins_total"] > TENANTS
    assert sum(v for k, v in use.items() if k.startswith("memory_bytes")) <= use["memory_limit_bytes"] == limit
    small.stop()
    assert not os.path.exists(os.path.join(small.data, "paging"))


def test_what_never_fits(start):
    server = start(args=["--memory", "4M"])
    service = tinker.ServiceClient(base_url=server.url)
    with pytest.raises(Exception, match=r"need \d+\.\d MiB; \d+\.\d MiB of the limit of 4\.0 MiB are free"):
        service.create_lora_training_client("tiny", rank=256).result().forward([datum(1)], "cross_entropy").result()
    small = service.create_lora_training_client("tiny", rank=1).result()
    with pytest.raises(Exception, match=r"\d+ tokens need \d+\.\d MiB of activations; there is room for \d+\.\d MiB"):
        small.forward([datum(1, 500)], "cross_entropy").result()
    end(service)


def test_kv_memory(start, tiny):
    pages = [metrics(start(args=args))["kv_pages"] for args in ([], ["--kv-memory", "1M"], ["--kv-memory=3MiB"])]
    assert pages[1] > 1 and pages[2] in (3 * pages[1], 3 * pages[1] + 1, 3 * pages[1] + 2) and pages[0] not in pages[1:]
    two = start(models={"tiny": tiny, "other": tiny}, args=["--kv-memory", "2M"])
    assert metrics(two)["kv_pages"] == 2 * pages[1]


@pytest.mark.parametrize("args, says", [
    (["--kv-memory", "64M", "--memory", "32M"], r"do not fit into 32 MiB \(--memory\), 64 MiB of it for the KV cache \(--kv-memory\): .*"
                                                r"the KV pages need 6\d\.\d MiB; \d+\.\d MiB of the limit of 32\.0 MiB are free"),
    (["--kv-memory", "0"], r"--kv-memory 0: expected a whole number from 1048576 to \d+, with K, M, G or T for a unit"),
    (["--kv-memory", "many"], "--kv-memory many: expected a whole number"),
])
def test_kv_memory_that_is_refused(tiny, tmp_path, args, says):
    with pytest.raises(RuntimeError, match=says):
        Daemon({"tiny": tiny}, tmp_path / "data", args=args).start()


def test_folder_that_cannot_be_made(tiny, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "paging").write_text("not a folder")
    with pytest.raises(RuntimeError, match="cannot open folder .*paging"):
        Daemon({"tiny": tiny}, data).start()
