"""Losses that clients write. The SDK evaluates a plain callable itself; a LossHandle runs on the server where the server says that
it can. Both must give the same gradient. Needs torch, except for what only the wire shows."""

import numpy as np
import pytest
from common import adam, forward_logprobs, rl_datum, sft_datum, tokens, topk_datum
from tinker_raw import Failed, datum, field, forward_backward_result

tinker = pytest.importorskip("tinker")


def graph_losses():
    torch = pytest.importorskip("torch")

    def weighted(logprobs, weights):
        loss = -(logprobs * weights).sum()
        return loss, {"custom/nll:sum": loss, "custom/nll:mean": loss}

    def reinforce(logprobs, advantages, q):
        ratio = torch.exp(logprobs - q)
        loss = -torch.minimum(ratio * advantages, torch.clamp(ratio, 0.8, 1.2) * advantages).sum()
        return loss, {"custom/ratio:mean": ratio.mean().detach()}

    def soft(logprobs, weights):
        p = torch.softmax(logprobs, -1)
        loss = -(weights * torch.log(p + 1e-6)).sum(-1).mean()
        return loss, {"custom/entropy:sum": -(p * torch.log(p)).sum()}

    def fancy(logprobs, weights):
        x = logprobs[1:] - logprobs[:-1]
        loss = torch.nn.functional.softplus(x).sum() + 0.1 * (logprobs ** 2).mean() - torch.logsumexp(logprobs * weights, 0)
        return loss, {}

    sft = [sft_datum(9, seed=1), sft_datum(6, seed=2)]
    rl = []
    for i in range(3):
        d = rl_datum(8, seed=i)
        inputs = dict(d.loss_fn_inputs)
        inputs["q"] = inputs.pop("logprobs")
        rl.append(tinker.Datum(model_input=d.model_input, loss_fn_inputs=inputs))
    return {"weighted": (weighted, {"logprobs": 1, "weights": 1}, sft),
            "clipped ratio": (reinforce, {"logprobs": 1, "advantages": 1, "q": 1}, rl),
            "top-k": (soft, {"logprobs": 2, "weights": 2}, [topk_datum(6, 3, seed=1), topk_datum(4, 3, seed=2)]),
            "indexing": (fancy, {"logprobs": 1, "weights": 1}, sft)}


@pytest.mark.parametrize("name", ["weighted", "clipped ratio", "top-k", "indexing"])
def test_handle_equals_callable(service, name):
    fn, ranks, data = graph_losses()[name]
    handle = service.create_custom_loss(fn, ranks).result()

    def by_hand(batch, lps):
        total, sums = 0, {}
        for d, lp in zip(batch, lps):
            loss, metrics = fn(lp, *(d.loss_fn_inputs[k].to_torch() for k in list(ranks)[1:]))
            total = total + loss
            for k, v in metrics.items():
                sums.setdefault(k, []).append(float(v.detach() if hasattr(v, "detach") else v))
        return total, {k: sum(v) if k.endswith(":sum") else sum(v) / len(v) for k, v in sums.items()}

    a, b = (service.create_lora_training_client("tiny", rank=4, seed=9).result() for _ in range(2))
    for _ in range(2):
        one = a.forward_backward_custom(data, handle).result()
        two = b.forward_backward_custom(data, by_hand).result()
        assert one.metrics["loss:sum"] == pytest.approx(two.metrics["loss:sum"], rel=1e-4, abs=1e-4)
        for key in (k for k in two.metrics if k.startswith("custom/")):
            assert one.metrics[key] == pytest.approx(two.metrics[key], rel=1e-4, abs=1e-4), key
        for client in (a, b):
            client.optim_step(adam(learning_rate=1e-3, eps=1e-4)).result()
    assert np.allclose(forward_logprobs(a, tokens(12)), forward_logprobs(b, tokens(12)), atol=2e-4)


# ---------------------------------------------------------------------------------------------- the wire alone
def node(op, name, target, *args, **kwargs):
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}


def ref(name):
    return {"ref": name}


def graph(*nodes):
    return {"format": 1, "nodes": list(nodes)}


# loss = -(logprobs * weights).sum()
NLL = graph(node("placeholder", "logprobs", "logprobs"), node("placeholder", "weights", "weights"),
            node("call_function", "mul", "operator.mul", ref("logprobs"), ref("weights")),
            node("call_method", "s", "sum", ref("mul")), node("call_function", "neg", "operator.neg", ref("s")),
            node("output", "output", "output", {"tuple": [ref("neg"), {"dict": {"custom/nll:sum": ref("neg")}}]}))
INPUTS = [{"name": "logprobs", "rank": 1}, {"name": "weights", "rank": 1}]


@pytest.fixture
def uploads(raw):
    if not raw.ok("client/config", {"sdk_version": "0.38.0"}).get("custom_loss_server_side"):
        pytest.skip("this server leaves custom losses to the client")
    return raw


def create(raw, session, seq, nodes, inputs=None):
    return raw.post("create_custom_loss", {"session_id": session, "custom_loss_seq_id": seq, "name": "mine", "graph": nodes,
                                           "inputs": INPUTS if inputs is None else inputs, "type": "create_custom_loss"})


def custom_request(model, seq, loss_id, data):
    return (field(1, model) + field(2, seq) + b"".join(field(3, d) for d in data) + field(4, "custom") +
            field(7, field(1, "loss_id") + field(2, field(2, loss_id))))


def test_uploaded_loss(uploads):
    raw = uploads
    session = raw.create_session()
    ticket = create(raw, session, 0, NLL)
    assert ticket.status == 200, ticket
    assert create(raw, session, 0, NLL).json["request_id"] == ticket.json["request_id"]
    loss_id = raw.retrieve(ticket.json["request_id"])["loss_id"]
    data = [datum([1, 2, 3], target_tokens=[2, 3, 4], weights=[1.0, -0.5, 2.0]), datum([5], target_tokens=[6], weights=[1.0])]
    a, b = (raw.create_model(session, "tiny", seq=i, seed=1) for i in range(2))
    reply = raw.post("forward_backward", custom_request(a, 1, loss_id, data), {"Content-Type": "application/x-protobuf"})
    got = forward_backward_result(raw.retrieve(reply.json["request_id"]))
    want = raw.forward_backward(b, 1, data)
    assert got["logprobs"] == want["logprobs"]
    assert got["metrics"]["loss:sum"] == pytest.approx(want["metrics"]["loss:sum"], rel=1e-6)
    assert got["metrics"]["custom/nll:sum"] == pytest.approx(want["metrics"]["loss:sum"], rel=1e-6)
    for model in (a, b):
        raw.optim_step(model, 2, 1e-2)
    assert raw.forward_backward(a, 3, data, forward_only=True) == raw.forward_backward(b, 3, data, forward_only=True)
    # a loss belongs to its session; an unknown one fails by name, and the model goes on
    other = raw.create_model(raw.create_session(), "tiny")
    for model, seq, which in ((other, 1, loss_id), (a, 4, "no-such-loss")):
        reply = raw.post("forward_backward", custom_request(model, seq, which, data), {"Content-Type": "application/x-protobuf"})
        with pytest.raises(Failed) as error:
            raw.retrieve(reply.json["request_id"])
        assert error.value.category == "user"
    raw.forward_backward(a, 5, data)
    # data that do not fit the graph
    reply = raw.post("forward_backward", custom_request(a, 6, loss_id, [datum([1, 2], target_tokens=[2, 3])]),
                     {"Content-Type": "application/x-protobuf"})
    with pytest.raises(Failed, match="weights"):
        raw.retrieve(reply.json["request_id"])
    raw.forward_backward(a, 7, data)


def bad_graphs():
    def swap(i, new):
        nodes = list(NLL["nodes"])
        nodes[i] = new
        return graph(*nodes)

    deep = ref("logprobs")
    for _ in range(200):
        deep = {"tuple": [deep]}
    yield "unknown function", swap(2, node("call_function", "mul", "os.system", ref("logprobs"), ref("weights")))
    yield "unknown method", swap(3, node("call_method", "s", "item", ref("mul")))
    yield "get_attr", swap(3, node("get_attr", "s", "secret"))
    yield "call_module", swap(3, node("call_module", "s", "secret", ref("mul")))
    yield "reference to nothing", swap(3, node("call_method", "s", "sum", ref("nowhere")))
    yield "reference forwards", swap(2, node("call_function", "mul", "operator.mul", ref("s"), ref("weights")))
    yield "no output", graph(*NLL["nodes"][:-1])
    yield "empty", graph()
    yield "another format", {"format": 2, "nodes": NLL["nodes"]}
    yield "deep arguments", swap(2, node("call_function", "mul", "operator.mul", deep, ref("weights")))
    yield "bad metric key", swap(5, node("output", "output", "output", {"tuple": [ref("neg"), {"dict": {"loss:sum": ref("neg")}}]}))
    yield "too many nodes", graph(*NLL["nodes"][:2], *[node("call_function", f"x{i}", "operator.neg", ref("logprobs"))
                                                       for i in range(100000)], *NLL["nodes"][2:])
    yield "nodes are no list", {"format": 1, "nodes": {"a": 1}}


@pytest.mark.parametrize("name", [n for n, _ in bad_graphs()])
def test_bad_graphs(uploads, name):
    raw = uploads
    reply = create(raw, raw.create_session(), 0, dict(bad_graphs())[name])
    if reply.status == 200:
        with pytest.raises(Failed) as error:
            raw.retrieve(reply.json["request_id"])
        assert error.value.category == "user"
    else:
        assert reply.status in (400, 413), reply
    assert raw.get("healthz").status == 200
