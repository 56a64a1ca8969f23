"""Sixty-four clients at once for some seconds: no error, and the server's counters tell what the clients did."""

import re
import threading
import time
from collections import Counter

from tinker_raw import Raw, datum

CLIENTS, ROUNDS = 64, 12


def client(url, number, session, counts, errors):
    """Trains a model of its own and samples from it; every result must be a success."""
    done = Counter()
    try:
        with Raw(url) as raw:
            model = raw.create_model(session, "tiny", rank=1 + number % 8, seq=number)
            done["create_model"] += 1
            sampler = raw.create_sampling_session(session, number, base_model="tiny")
            seq = 0
            for i in range(ROUNDS):
                ids = [(number + i + k) % 320 for k in range(9)]
                data = [datum(ids[:-1], target_tokens=ids[1:], weights=[1.0] * 8)]
                raw.forward_backward(model, seq + 1, data)
                raw.optim_step(model, seq + 2, 1e-4)
                out = raw.forward_backward(model, seq + 3, data, forward_only=True)
                assert len(out["logprobs"][0]) == 8
                # submitted together, the second before the first
                late = raw.ok("optim_step", {"model_id": model, "seq_id": seq + 5, "type": "optim_step", "adam_params": {}})
                raw.optim_step(model, seq + 4)
                raw.retrieve(late["request_id"])
                assert len(raw.sample(sampler, i + 1, ids, max_tokens=4, seed=i, stop=[])["sequences"][0]["tokens"]) == 4
                seq += 5
                done.update({"forward_backward": 1, "forward": 1, "optim_step": 3, "sample": 1})
    except Exception as error:  # pylint: disable=broad-except
        errors.append(f"client {number}: {error!r}")
    counts.append(done)


def metrics(raw):
    """{name or name{type}: value}"""
    return {name: float(value) for name, value in re.findall(r"^tinkerbell_(\S+) (\S+)$", raw.get("/metrics").body.decode(), re.M)}


def test_counters_of_many_clients(start):
    server = start()
    counts, errors = [], []
    with Raw(server.url) as raw:
        session = raw.create_session()
        threads = [threading.Thread(target=client, args=(server.url, i, session, counts, errors)) for i in range(CLIENTS)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not errors, errors[:5]
        counts = sum(counts, Counter())
        assert sum(counts.values()) == CLIENTS * (1 + 6 * ROUNDS)
        until = time.monotonic() + 30
        while (m := metrics(raw))["http_connections"] > 1 and time.monotonic() < until:
            time.sleep(0.05)  # the clients' ends are noticed a little later
    for kind in ("submitted", "executed"):
        assert {k: m[f'ops_{kind}_total{{type="{k}"}}'] for k in counts} == counts, kind
    assert sum(v for k, v in m.items() if k.startswith("ops_executed_total")) == sum(counts.values())
    assert not any(v for k, v in m.items() if k.startswith("ops_failed_total"))
    kinds = ("train", "sample", "other")
    left = ["futures_pending", "waiters", "queued_bytes"]
    left += [f'tasks_{s}{{kind="{k}"}}' for s in ("waiting", "running") for k in kinds]
    assert {k: m[k] for k in left} == dict.fromkeys(left, 0)
    assert m["futures_done"] == sum(counts.values())
    assert m["http_connections"] == 1 and m["http_requests"] == 1  # this one
