"""What a user of the real SDK sees of each kind of error, and how many requests it took: nothing is retried for ever.

The first half is what this server answers. The second half puts an answer of the contract's table into its place, also those that
only a proxy or a hosted service would give."""

import asyncio
import time

import pytest
from common import adam, prompt, sft_datum, tokens
from daemon import end
from fault_proxy import FaultProxy
from tinker_raw import Raw

tinker = pytest.importorskip("tinker")
types = tinker.types
SPEED = 1000  # the client's clock runs so much faster, so that its five minutes of retries take seconds


class Fast:
    """A module whose sleeps are shorter and whose clock is faster."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)

    async def sleep(self, seconds, *rest):
        return await asyncio.sleep(seconds / SPEED, *rest)

    def time(self):
        return time.time() * SPEED

    def monotonic(self):
        return time.monotonic() * SPEED


@pytest.fixture
def fast(monkeypatch):
    from tinker import _base_client
    from tinker.lib import api_future_impl, internal_client_holder, retry_handler
    for module in (internal_client_holder, api_future_impl, retry_handler):
        monkeypatch.setattr(module, "asyncio", Fast(asyncio))
        monkeypatch.setattr(module, "time", Fast(time))
    monkeypatch.setattr(_base_client, "anyio", Fast(_base_client.anyio))


def connect(url, **options):
    service = tinker.ServiceClient(base_url=url, **options)
    return service, service.create_lora_training_client("tiny", rank=2, seed=1).result()


@pytest.fixture
def proxy(server):
    with FaultProxy(server.url) as p:
        yield p


@pytest.fixture
def user(proxy):
    """A training client behind the proxy, and the service it belongs to."""
    service, client = connect(proxy.url)
    proxy.clear()
    yield service, client
    proxy.clear()
    end(service)


@pytest.fixture
def rest(proxy):
    return tinker.RestClient(base_url=proxy.url)


# ------------------------------------------------------------------------------------------ what this server answers
def test_refused_at_once(proxy, user, rest):
    """400 and 404: one request, and the text names what is wrong."""
    service, client = user
    path = f"tinker://{client.model_id}/weights/missing"
    for wanted, word, where, what in (
            (tinker.BadRequestError, "no-such-model", "create_model",
             lambda: service.create_lora_training_client("no-such-model", rank=2).result()),
            (tinker.BadRequestError, "rank", "create_model", lambda: service.create_lora_training_client("tiny", rank=9999).result()),
            (tinker.NotFoundError, "no-such-model", "create_sampling_session",
             lambda: service.create_sampling_client(base_model="no-such-model").result()),
            (tinker.NotFoundError, "missing", "create_sampling_session",
             lambda: service.create_sampling_client(model_path=path).result()),
            (tinker.NotFoundError, "nobody:train:0", "training_runs/nobody:train:0",
             lambda: rest.get_training_run("nobody:train:0").result()),
            (tinker.NotFoundError, "missing", "weights/missing", lambda: rest.delete_checkpoint_from_tinker_path(path).result()),
            (tinker.BadRequestError, "ttl_seconds", "weights/missing/ttl",
             lambda: rest.set_checkpoint_ttl_from_tinker_path(path, 5).result())):
        proxy.clear()
        with pytest.raises(wanted) as error:
            what()
        assert word in str(error.value), error.value
        assert error.value.body["category"] == "user" and error.value.body["detail"] == error.value.body["message"]
        assert proxy.count(where) == 1, where


def test_failed_results(proxy, user):
    """Wrong work is accepted, fails by its result with category user, and is asked for once; the next call works."""
    service, client = user
    bad = types.Datum(model_input=prompt([1, 2]), loss_fn_inputs={"target_tokens": [3, 400], "weights": [1.0, 1.0]})
    path = f"tinker://{client.model_id}/weights/missing"
    for kind, word, what in (
            ("ForwardBackward", "400", lambda: client.forward_backward([bad], "cross_entropy")),
            ("OptimStep", "learning_rate", lambda: client.optim_step(adam(learning_rate=-1.0))),
            ("LoadWeights", "missing", lambda: service.create_training_client_from_state(path))):
        proxy.clear()
        with pytest.raises(tinker.RequestFailedError) as error:
            what().result()
        assert word in str(error.value) and error.value.category == types.RequestErrorCategory.User
        assert proxy.count("retrieve_future", kind) == 1
    assert client.forward_backward([sft_datum(5)], "cross_entropy").result().metrics["loss:sum"] > 0


def test_failed_sample(proxy, user):
    service, _ = user
    sampler = service.create_sampling_client(base_model="tiny").result()
    proxy.clear()
    with pytest.raises(tinker.TinkerError, match="context"):
        sampler.sample(prompt(tokens(8)), 1, types.SamplingParams(max_tokens=5000)).result()
    assert proxy.count("asample") == 1, "not sampled again"


def test_wrong_key(start):
    server = start(args=["--api-key", "tml-right"])
    with FaultProxy(server.url) as proxy:
        with pytest.raises(tinker.AuthenticationError, match="401"):
            tinker.RestClient(base_url=proxy.url, api_key="tml-wrong").get_server_capabilities().result()
        assert proxy.count("/client/config") + proxy.count("get_server_capabilities") <= 2
        right = tinker.RestClient(base_url=proxy.url, api_key="tml-right")
        assert right.get_server_capabilities().result().supported_models


def test_body_too_large(start):
    """The server's own config keeps chunks below the limit; one datum above it is refused at once."""
    server = start(args=["--max-body", "65536"])
    with FaultProxy(server.url) as proxy:
        service, client = connect(proxy.url)
        proxy.clear()
        wide = types.Datum(model_input=prompt(tokens(300)), loss_fn_inputs={
            "target_tokens": [[1] * 64] * 300, "weights": [[1.0] * 64] * 300})
        with pytest.raises(tinker.APIStatusError, match="413") as error:
            client.forward_backward([wide], "cross_entropy").result()
        assert error.value.status_code == 413 and "too large" in str(error.value)
        assert proxy.count("forward_backward") == 1
        service.close("errored").result()


def test_finished_session(proxy, user):
    """Work for a session that ended is refused, and its heart stops beating."""
    _, client = user
    session = client.model_id.split(":")[0]
    with Raw(proxy.url) as raw:
        assert raw.post(f"sessions/{session}/finish", {"reason": {"type": "success"}, "detail": None}).status == 200
    proxy.clear()
    with pytest.raises(tinker.APIStatusError) as error:
        client.forward_backward([sft_datum(5)], "cross_entropy").result()
    assert error.value.status_code in (404, 410) and client.model_id in str(error.value)
    assert proxy.count("forward_backward") == 1
    with Raw(proxy.url) as raw:
        assert raw.post("session_heartbeat", {"session_id": session}).status == 410


def test_lost_server_state(start):
    """After a restart a live model is gone: the user is told so, at once, and can go on from a checkpoint."""
    server = start()
    with FaultProxy(server.url) as proxy:
        service, client = connect(proxy.url)
        path = client.save_state("kept").result().path
        server.restart()
        url = server.url.rsplit(":", 1)
        proxy.upstream = ("127.0.0.1", int(url[1]))
        proxy.clear()
        with pytest.raises(tinker.NotFoundError, match="restarted"):
            client.forward_backward([sft_datum(5)], "cross_entropy").result()
        assert proxy.count("forward_backward") == 1
        again = tinker.ServiceClient(base_url=proxy.url)
        resumed = again.create_training_client_from_state_with_optimizer(path).result()
        assert resumed.forward_backward([sft_datum(5)], "cross_entropy").result().metrics["loss:sum"] > 0
        end(again)


@pytest.mark.slow
def test_number_that_never_comes(start):
    """A submit that failed for good leaves a gap in the numbers; what waits behind it is given up after a lease, although the
    client lives and beats."""
    server = start(args=["--session-lease", "12"])
    with FaultProxy(server.url) as proxy:
        service, client = connect(proxy.url)
        proxy.fail("forward_backward", 400, times=1)
        with pytest.raises(tinker.BadRequestError):
            client.forward_backward([sft_datum(5)], "cross_entropy").result()
        with pytest.raises(tinker.RequestFailedError, match="seq_id 1 never came"):
            client.optim_step(adam()).result()
        assert proxy.count("session_heartbeat") >= 1
        assert client.forward_backward([sft_datum(5)], "cross_entropy").result().metrics["loss:sum"] > 0
        end(service)


# ------------------------------------------------------------------------------------------ each row of the table
@pytest.mark.parametrize("status,wanted", [
    (400, tinker.BadRequestError), (401, tinker.AuthenticationError), (403, tinker.PermissionDeniedError),
    (404, tinker.NotFoundError), (410, tinker.APIStatusError), (413, tinker.APIStatusError),
    (422, tinker.UnprocessableEntityError)])
def test_raised_at_once(proxy, rest, status, wanted):
    proxy.fail("training_runs", status)
    with pytest.raises(wanted, match=f"Error code: {status}.*fault {status}") as error:
        rest.list_training_runs().result()
    assert error.value.status_code == status
    assert proxy.count("training_runs") == 1


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, None])
def test_retried(proxy, rest, status):
    """Twice, then the server itself: the user sees only the result. None: the connection breaks."""
    proxy.fail("training_runs", status, headers={"retry-after-ms": "5"}, times=2)
    assert rest.list_training_runs(limit=1).result().cursor.limit == 1
    assert proxy.count("training_runs") == 3


@pytest.mark.parametrize("status,wanted", [(408, tinker.APIStatusError), (409, tinker.ConflictError), (429, tinker.RateLimitError),
                                           (500, tinker.InternalServerError), (503, tinker.InternalServerError),
                                           (None, tinker.APIConnectionError)])
def test_retries_end(proxy, rest, fast, status, wanted):
    """A server that never recovers: the SDK gives up after five minutes of its clock."""
    proxy.fail("training_runs", status)
    with pytest.raises(wanted):
        rest.list_training_runs().result()
    assert 2 <= proxy.count("training_runs") <= 200


def test_billing(proxy, rest, fast):
    """402 is the hosted service's: the SDK waits up to an hour for the bill to be paid, then raises."""
    proxy.fail("training_runs", 402)
    with pytest.raises(tinker.BillingError):
        rest.list_training_runs().result()
    assert proxy.count("training_runs") <= 3600 / 5 + 20


def test_redirect(proxy, rest, server):
    proxy.fail("training_runs", 307, headers={"Location": server.url + "/api/v1/training_runs?limit=1"})
    assert rest.list_training_runs().result().cursor.limit == 1
    assert proxy.count("training_runs") == 1


@pytest.mark.parametrize("status,requests", [(400, 4), (401, 1), (403, 1), (404, 1), (409, 1), (413, 1), (422, 1)])
def test_poll_that_fails(proxy, user, status, requests):
    """A poll that is answered so ends the call; 400 is asked again three times."""
    _, client = user
    proxy.fail("retrieve_future", status, kind="OptimStep")
    with pytest.raises(ValueError, match=f"fault {status}"):
        client.optim_step(adam()).result()
    assert proxy.count("retrieve_future", "OptimStep") == requests
    proxy.clear()
    client.optim_step(adam()).result()


@pytest.mark.parametrize("status", [408, 429, 500, 503, None])
def test_poll_that_is_repeated(proxy, user, fast, status):
    body = {"type": "try_again", "request_id": "x", "queue_state": "paused_capacity", "queue_state_reason": "memory is short"}
    _, client = user
    proxy.fail("retrieve_future", status, body if status == 408 else None, times=3, kind="OptimStep")
    client.optim_step(adam()).result()
    assert proxy.count("retrieve_future", "OptimStep") == 4


def test_gone_while_training(proxy, user):
    """410 on a training result: the call fails, it is not run twice."""
    _, client = user
    proxy.fail("retrieve_future", 410, kind="OptimStep")
    with pytest.raises(Exception, match="expired"):
        client.optim_step(adam()).result()
    assert proxy.count("retrieve_future", "OptimStep") == 1 and proxy.count("optim_step") == 1


def test_gone_while_sampling(proxy, user, fast):
    """410 on a sample: it is sampled anew, under a new number."""
    service, _ = user
    sampler = service.create_sampling_client(base_model="tiny").result()
    proxy.fail("retrieve_future", 410, times=2, kind="Sample")
    out = sampler.sample(prompt(tokens(5)), 1, types.SamplingParams(max_tokens=3, seed=1, stop=[])).result()
    assert len(out.sequences[0].tokens) == 3
    assert proxy.count("asample") == 3


@pytest.mark.parametrize("category", ["user", "server", "unknown", "no such category"])
@pytest.mark.parametrize("kind", ["OptimStep", "Sample"])
def test_failed_future(proxy, user, category, kind):
    """200 with an error is final, for sampling too, whatever its category."""
    service, client = user
    sampler = service.create_sampling_client(base_model="tiny").result()
    proxy.fail("retrieve_future", 200, {"error": "it did not work", "category": category}, kind=kind)
    with pytest.raises(tinker.RequestFailedError, match="it did not work") as error:
        if kind == "Sample":
            sampler.sample(prompt(tokens(5)), 1, types.SamplingParams(max_tokens=3)).result()
        else:
            client.optim_step(adam()).result()
    known = {"user": types.RequestErrorCategory.User, "server": types.RequestErrorCategory.Server}
    assert error.value.category == known.get(category, types.RequestErrorCategory.Unknown)
    assert proxy.count("retrieve_future", kind) == 1


def test_backpressure_while_sampling(proxy, user, fast):
    """429 on a submit: the same sample is sent again, and nothing is lost or doubled."""
    service, _ = user
    sampler = service.create_sampling_client(base_model="tiny").result()
    params = [types.SamplingParams(max_tokens=3, seed=i, stop=[]) for i in range(5)]
    want = [sampler.sample(prompt(tokens(5)), 1, p).result().sequences[0].tokens for p in params]
    proxy.fail("asample", 429, times=3)
    futures = [sampler.sample(prompt(tokens(5)), 1, p) for p in params]
    assert [f.result().sequences[0].tokens for f in futures] == want
    assert proxy.count("asample") == 8


def test_submit_that_is_repeated(proxy, user):
    """Submits of training are retried under their number; a lost answer does not run the step twice."""
    _, client = user
    for status in (429, 503, None):
        proxy.fail("forward_backward", status, headers={"retry-after-ms": "5"}, times=2)
        client.forward_backward([sft_datum(5)], "cross_entropy").result()
        assert proxy.count("forward_backward") == 3
        proxy.clear()
