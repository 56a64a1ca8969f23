"""Many clients at once: every one gets the numbers that it would get alone."""

import concurrent.futures
import threading

import numpy as np
import pytest
from common import adam, forward_logprobs, logprobs, prompt, sft_datum, tokens
from tinker_raw import Raw

tinker = pytest.importorskip("tinker")
Params = tinker.SamplingParams


def run(service, seed, steps=5, base="tiny"):
    client = service.create_lora_training_client(base, rank=1 + seed % 8, seed=seed).result()
    losses = []
    for step in range(steps):
        fb = client.forward_backward([sft_datum(6 + seed % 9, seed=100 * seed + step)], "cross_entropy")
        opt = client.optim_step(adam())
        losses.append(fb.result().metrics["loss:sum"])
        opt.result()
    return losses, forward_logprobs(client, tokens(20, seed)).tolist()


@pytest.mark.smoke
def test_training_clients_in_parallel(service):
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda s: run(service, s, base="tiny" if s % 2 else "tiny-llama"), range(6)))
    for seed in (0, 3, 5):
        assert run(service, seed, base="tiny" if seed % 2 else "tiny-llama") == together[seed], seed


def test_training_and_sampling_at_once(service):
    """Samples taken while another model trains equal samples taken in peace."""
    sampler = service.create_sampling_client(base_model="tiny").result()
    asks = [(tokens(4 + i % 20, i), i) for i in range(40)]

    def ask(item):
        ids, seed = item
        seq = sampler.sample(prompt(ids), 1, Params(max_tokens=10, seed=seed, stop=[])).result().sequences[0]
        return seq.tokens, seq.logprobs

    peace = [ask(a) for a in asks]
    stop, errors = threading.Event(), []

    def trainer():
        try:
            client = service.create_lora_training_client("tiny", rank=8, seed=1).result()
            i = 0
            while not stop.is_set():
                client.forward_backward([sft_datum(30, seed=i + k) for k in range(4)], "cross_entropy")
                client.optim_step(adam(learning_rate=1e-3)).result()
                i += 1
            assert i > 0
        except Exception as error:  # pylint: disable=broad-except
            errors.append(error)

    thread = threading.Thread(target=trainer)
    thread.start()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        war = list(pool.map(ask, asks))
    stop.set()
    thread.join()
    assert not errors
    assert war == peace


def test_a_batch_of_tenants_changes_nothing(service):
    """A datum gives the same bits alone and in the middle of a batch of other lengths."""
    client = service.create_lora_training_client("tiny", rank=4, seed=1).result()
    client.forward_backward([sft_datum(8)], "cross_entropy")
    client.optim_step(adam()).result()
    data = [sft_datum(n, seed=n) for n in (1, 2, 3, 5, 17, 31, 64, 100, 200)]
    together = logprobs(client.forward(data, "cross_entropy").result())
    for d, want in zip(data, together):
        assert np.array_equal(logprobs(client.forward([d], "cross_entropy").result())[0], want)
    backwards = logprobs(client.forward(data[::-1], "cross_entropy").result())[::-1]
    for a, b in zip(together, backwards):
        assert np.array_equal(a, b)


def test_more_samples_than_the_cache_holds(start):
    """300 long samples at once in a small KV cache wait for each other; each is what it is alone."""
    server = start(args=["--kv-memory", "8M"])
    with Raw(server.url) as raw:
        sampler = raw.create_sampling_session(raw.create_session(), 1, base_model="tiny")
        ids = tokens(20, 1)
        out = raw.sample(sampler, 1, ids, n=300, max_tokens=300, seed=5, stop=[])["sequences"]
        assert len(out) == 300 and {len(s["tokens"]) for s in out} == {300}
        few = raw.sample(sampler, 2, ids, n=3, max_tokens=300, seed=5, stop=[])["sequences"]
        assert few == out[:3]


def test_many_connections(server):
    """300 clients poll a future at once; all get the answer, and the server answers others meanwhile."""
    with Raw(server.url) as raw:
        session = raw.create_session()
        model = raw.create_model(session, "tiny")
        # number 2 waits for number 1, so everyone waits
        ticket = raw.ok("optim_step", {"model_id": model, "seq_id": 2, "type": "optim_step",
                                       "adam_params": {"learning_rate": 1e-4}})
        clients = [Raw(server.url) for _ in range(300)]
        with concurrent.futures.ThreadPoolExecutor(300) as pool:
            futures = [pool.submit(c.retrieve, ticket["request_id"]) for c in clients]
            for _ in range(20):
                assert raw.get("healthz").status == 200
            raw.optim_step(model, 1)
            answers = [f.result(60) for f in futures]
        for c in clients:
            c.close()
        assert all(a == answers[0] for a in answers)


def test_clients_that_go_away(server):
    """Closed in the middle of a long poll; the job goes on and its result can be fetched from another connection."""
    with Raw(server.url) as raw:
        session = raw.create_session()
        model = raw.create_model(session, "tiny")
        ticket = raw.ok("optim_step", {"model_id": model, "seq_id": 2, "type": "optim_step", "adam_params": {}})
        for _ in range(30):
            gone = Raw(server.url)
            gone._connect()
            body = b'{"request_id":"%s","allow_metadata_only":false}' % ticket["request_id"].encode()
            gone.http.sock.sendall(b"POST /api/v1/retrieve_future HTTP/1.1\r\nHost: x\r\nX-API-Key: tml-test\r\n"
                                   b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            gone.close()
        raw.optim_step(model, 1)
        assert isinstance(raw.retrieve(ticket["request_id"]), dict)
