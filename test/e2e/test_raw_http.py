"""What no SDK would send, and the rules of the wire that the SDK depends on but does not show."""

import http.client
import json
import socket
import struct
import threading
import time
import urllib.parse

import pytest
from tinker_raw import (PROTO, Failed, Raw, datum, field, forward_backward_request, forward_backward_result, parse,
                        sample_result, tensor)

GOOD = {"target_tokens": [2, 3, 4], "weights": [1.0, 1.0, 1.0]}


def good_datum():
    return datum([1, 2, 3], **GOOD)


@pytest.fixture
def session(raw):
    return raw.create_session()


@pytest.fixture
def model(raw, session):
    return raw.create_model(session, "tiny", seed=1)


@pytest.fixture
def sampler(raw, session):
    return raw.create_sampling_session(session, 100, base_model="tiny")


def still_works(raw, model, seq_id):
    out = raw.forward_backward(model, seq_id, [good_datum()])
    assert out["metrics"]["loss:sum"] == pytest.approx(-sum(out["logprobs"][0]), rel=1e-5)
    return out


def refused(reply, status=(400,)):
    """An immediate refusal in the form that SDKs understand."""
    assert reply.status in status, reply
    assert int(reply.headers["content-length"]) > 0
    body = reply.json
    assert body["detail"] == body["message"] and len(body["detail"]) > 5
    assert body["category"] in ("user", "server")
    assert "error" not in body
    return body["detail"]


# ---------------------------------------------------------------------------------------------- bodies
@pytest.mark.smoke
@pytest.mark.parametrize("path", ["create_session", "create_model", "optim_step", "asample", "retrieve_future", "save_weights",
                                  "load_weights", "get_info", "session_heartbeat", "create_sampling_session",
                                  "save_weights_for_sampler", "save_weights_external", "weights_info", "client/config"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"text"', b'{"a":', b"\xff\xfe", b'{"type":1}', b"{}garbage",
                                  b'{"model_id":["x"],"seq_id":"1","session_id":7,"request_id":{},"path":5}',
                                  b"[" * 10000, b'{"a":' * 200 + b"1" + b"}" * 200])
def test_wrong_json(raw, path, body):
    reply = raw.post(path, body)
    if reply.status == 200:  # every field of these may be absent
        assert path == "client/config" or (path == "create_session" and isinstance(json.loads(body), dict))
        return
    if reply.status in (404, 410):
        assert path in ("get_info", "session_heartbeat", "retrieve_future")
        return
    refused(reply, (400, 413, 422))
    assert raw.get("healthz").status == 200


@pytest.mark.parametrize("body", [b"\xff" * 20, field(1, "x")[:-1], b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x1a\x05abc",
                                  field(1, "x") + b"\x1b" * 50, struct.pack("<Q", 2**63) * 3])
def test_wrong_protobuf(raw, model, body):
    refused(raw.post("forward_backward", body, {"Content-Type": PROTO}), (400, 404))
    still_works(raw, model, 1)


def test_empty_protobuf(raw):
    refused(raw.post("forward_backward", b"", {"Content-Type": PROTO}), (400, 404))


def raw_tensor(data, dtype=1, shape=None, dense=True):
    out = field(1, data) if dense else b""
    out += field(3, dtype) if dtype else b""
    return out + (field(4, b"".join(bytes([s]) for s in shape)) if shape is not None else b"")


def csr(values, crow, col, shape, dtype=2):
    inner = field(1, struct.pack(f"<{len(values)}q", *values)) + field(2, struct.pack(f"<{len(crow)}q", *crow)) + \
        field(3, struct.pack(f"<{len(col)}q", *col))
    return field(2, inner) + field(3, dtype) + field(4, bytes(shape))


NAN, INF = float("nan"), float("inf")
BAD_DATA = {
    "token too large": (datum([1, 320, 3], **GOOD), "320"),
    "token negative": (datum([1, -7, 3], **GOOD), "-7"),
    "target too large": (datum([1, 2, 3], target_tokens=[1, 2, 999], weights=[1.0] * 3), "999"),
    "target of 2^40": (datum([1, 2, 3], target_tokens=[1, 2, 1 << 40], weights=[1.0] * 3), "target_tokens"),
    "fewer targets": (datum([1, 2, 3], target_tokens=[1, 2], weights=[1.0] * 2), "target_tokens"),
    "fewer weights": (datum([1, 2, 3], target_tokens=[1, 2, 3], weights=[1.0] * 2), "weights"),
    "NaN weight": (datum([1, 2, 3], target_tokens=[1, 2, 3], weights=[1.0, NAN, 1.0]), "weights"),
    "infinite weight": (datum([1, 2, 3], target_tokens=[1, 2, 3], weights=[1.0, INF, 1.0]), "weights"),
    "no targets": (datum([1, 2, 3], weights=[1.0] * 3), "target_tokens"),
    "no tokens": (datum([], target_tokens=tensor([], "int64"), weights=tensor([], "float32")), ""),
    "nothing at all": (b"", ""),
    "float targets": (datum([1, 2, 3], target_tokens=tensor([1.0, 2.0, 3.0]), weights=[1.0] * 3), "target_tokens"),
    "bytes that are no multiple": (datum([1, 2, 3], target_tokens=[1, 2, 3], weights=raw_tensor(b"\0" * 11)), "weights"),
    "shape of another size": (datum([1, 2, 3], target_tokens=[1, 2, 3], weights=tensor([1.0] * 3, shape=[4])), "weights"),
    "shape that overflows": (datum([1, 2, 3], target_tokens=[1, 2, 3],
                                   weights=tensor([1.0] * 3, shape=[1 << 33, 1 << 33])), "weights"),
    "negative shape": (datum([1, 2, 3], target_tokens=[1, 2, 3], weights=tensor([1.0] * 3, shape=[-3])), "weights"),
    "three dimensions": (datum([1, 2, 3], target_tokens=tensor([1, 2, 3], shape=[3, 1, 1]), weights=[1.0] * 3), "target_tokens"),
    "unknown dtype": (datum([1, 2, 3], target_tokens=[1, 2, 3], weights=raw_tensor(b"\0" * 12, dtype=9)), "weights"),
    "no dtype": (datum([1, 2, 3], target_tokens=[1, 2, 3], weights=raw_tensor(b"\0" * 12, dtype=0)), "weights"),
    "no encoding": (datum([1, 2, 3], target_tokens=[1, 2, 3], weights=raw_tensor(b"", dense=False)), "weights"),
    "CSR rows out of order": (datum([1, 2, 3], target_tokens=csr([5, 6], [0, 2, 1, 2], [0, 1], [3, 4])), "target_tokens"),
    "CSR column outside": (datum([1, 2, 3], target_tokens=csr([5, 6], [0, 1, 1, 2], [0, 4], [3, 4])), "target_tokens"),
    "CSR negative column": (datum([1, 2, 3], target_tokens=csr([5, 6], [0, 1, 1, 2], [0, -1], [3, 4])), "target_tokens"),
    "CSR row pointer too far": (datum([1, 2, 3], target_tokens=csr([5, 6], [0, 1, 1, 9], [0, 1], [3, 4])), "target_tokens"),
    "CSR without rows": (datum([1, 2, 3], target_tokens=csr([5, 6], [], [0, 1], [3, 4])), "target_tokens"),
    "tokens of 3 bytes": (field(1, field(1, field(1, b"\1\0\0"))), ""),
    "an image": (field(1, field(2, field(1, b"png") + field(2, "png"))), "image"),
    "audio": (field(1, field(3, field(1, b"\1"))), ""),
    "longer than the context": (datum([1] * 513, target_tokens=[1] * 513, weights=[1.0] * 513), "512"),
}


@pytest.mark.smoke
def test_bad_data_fails_its_future_only(raw, session):
    """Each bad request takes its number, fails with category user and a message that names the culprit, and leaves neither
    gradient nor a stuck queue."""
    bad, clean = (raw.create_model(session, "tiny", seq=i, seed=1) for i in range(2))
    raw.forward_backward(bad, 1, [good_datum()])
    seq = 2
    for name, (message, word) in BAD_DATA.items():
        reply = raw.submit_forward_backward(bad, seq, [good_datum(), message])
        assert reply.status == 200, (name, reply)
        with pytest.raises(Failed) as error:
            raw.retrieve(reply.json["request_id"])
        assert error.value.category == "user", (name, error.value)
        assert word in error.value.answer["error"], (name, error.value)
        assert "\n" not in error.value.answer["error"] and len(error.value.answer["error"]) > 5
        seq += 1
    raw.optim_step(bad, seq, 1e-2)
    raw.forward_backward(clean, 1, [good_datum()])
    raw.optim_step(clean, 2, 1e-2)
    a = raw.forward_backward(bad, seq + 1, [good_datum()], forward_only=True)
    b = raw.forward_backward(clean, 3, [good_datum()], forward_only=True)
    assert a == b


def test_the_datum_at_fault_is_named(raw, model):
    with pytest.raises(Failed) as error:
        raw.forward_backward(model, 1, [good_datum()] * 7 + [datum([1, 2, 3], target_tokens=[1, 2, 320], weights=[1.0] * 3)])
    assert "7" in error.value.answer["error"]


def test_no_data(raw, model):
    try:
        out = raw.forward_backward(model, 1, [])
        assert out["metrics"]["loss:sum"] == 0
    except Failed as error:
        assert error.category == "user"
    still_works(raw, model, 2)


def test_the_golden_request(raw, session):
    """The contract's own bytes: CSR targets, spans, config; a loss that is not offered fails by name."""
    body = bytes.fromhex(
        "0a036d696410011ab2010a0c0a0a0a08010000000200000012570a0d7461726765745f746f6b656e731246123e0a10050000000000000007"
        "0000000000000012180000000000000000010000000000000002000000000000001a10000000000000000002000000000000001802220202"
        "03122b0a077765696768747312200a180000803f0000803f0000803f0000803f0000803f0000803f1801220202031a080a060a0273311801"
        "1a0812060a0273311801220812060a02733118022210737461626c655f7265696e666f7263652a130a086b6c5f636f656666117b14ae47e1"
        "7a843f3a150a086b6c5f636f6566661209097b14ae47e17a843f")
    assert raw.post("forward_backward", body, {"Content-Type": PROTO}).status == 404  # there is no model "mid"
    model = raw.create_model(session, "tiny")
    ours = field(1, model) + body[5:]
    reply = raw.post("forward_backward", ours, {"Content-Type": PROTO})
    with pytest.raises(Failed, match="stable_reinforce"):
        raw.retrieve(reply.json["request_id"])
    plain = ours.replace(b"\x22\x10stable_reinforce", field(4, "cross_entropy")).split(b"\x2a\x13")[0]
    plain = plain.replace(field(2, 1), field(2, 2), 1)
    out = forward_backward_result(raw.retrieve(raw.post("forward_backward", plain, {"Content-Type": PROTO}).json["request_id"]))
    assert len(out["logprobs"][0]) == 6
    assert out["metrics"]["loss:sum"] == pytest.approx(-sum(out["logprobs"][0]), rel=1e-5)


def test_result_payload_form(raw, model):
    """Exactly what the SDK's decoder needs: names, offsets in bytes, num_datums, one ':' in every metric."""
    reply = raw.submit_forward_backward(model, 1, [good_datum(), datum([5], target_tokens=[6], weights=[1.0])])
    answer = raw.retrieve_once(reply.json["request_id"])
    while answer.status == 408:
        answer = raw.retrieve_once(reply.json["request_id"])
    assert PROTO in answer.headers["content-type"]
    message = parse(answer.body)
    assert message[1] == [b"ArrayRecord"] and len(message[2]) == 1
    record = parse(message[2][0])
    assert record[3] == [2]
    batch = parse(parse(record[2][0])[2][0])
    assert struct.unpack("<3q", batch[2][0]) == (0, 12, 16) and len(batch[1][0]) == 16 and batch[3] == [1]
    keys = [parse(m)[1][0].decode() for m in message[3]]
    assert "loss:sum" in keys and all(k.count(":") == 1 for k in keys)


# ---------------------------------------------------------------------------------------------- other calls
def test_unknown_ids(raw, session):
    adam = {"learning_rate": 1e-4}
    for path, body in (
            ("optim_step", {"model_id": "nope", "seq_id": 1, "adam_params": adam, "type": "optim_step"}),
            ("optim_step", {"model_id": f"{session}:train:99", "seq_id": 1, "adam_params": adam, "type": "optim_step"}),
            ("save_weights", {"model_id": "nope", "path": "x", "seq_id": 1, "type": "save_weights"}),
            ("get_info", {"model_id": "nope", "type": "get_info"}),
            ("create_model", {"session_id": "nope", "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 4},
                              "type": "create_model"}),
            ("create_sampling_session", {"session_id": "nope", "sampling_session_seq_id": 0, "base_model": "tiny"}),
            ("asample", {"sampling_session_id": "nope", "seq_id": 0, "num_samples": 1, "prompt": {"chunks": [
                {"type": "encoded_text", "tokens": [1]}]}, "sampling_params": {"max_tokens": 1}}),
            ("weights_info", {"tinker_path": "tinker://nope/weights/x"}),
            ("sessions/nope/finish", {"reason": {"type": "success"}, "detail": None})):
        refused(raw.post(path, body), (404, 410))
    for path in ("training_runs/nope", "training_runs/nope/checkpoints", "samplers/nope", "sessions/nope", "no_such_route"):
        refused(raw.get(path), (404,))
    refused(raw.call("DELETE", "training_runs/nope/checkpoints/weights/x"), (404,))
    refused(raw.call("GET", "/"), (404,)) if raw.call("GET", "/").status != 200 else None
    assert raw.call("DELETE", "create_session").status == 405


def test_bad_create_model(raw, session):
    for lora, word in (({"rank": 0}, "rank"), ({"rank": -1}, "rank"), ({"rank": 1 << 40}, "rank"),
                       ({"rank": 4, "train_mlp": False, "train_attn": False, "train_unembed": False}, "train_"),
                       ({"rank": "8"}, "rank"), ({"rank": 4, "seed": "x"}, "seed")):
        detail = refused(raw.post("create_model", {"session_id": session, "model_seq_id": 5, "base_model": "tiny",
                                                   "lora_config": lora, "type": "create_model"}))
        assert word in detail
    detail = refused(raw.post("create_model", {"session_id": session, "model_seq_id": 5, "base_model": "who",
                                               "lora_config": {"rank": 4}, "type": "create_model"}))
    assert "who" in detail
    detail = refused(raw.post("create_model", {"session_id": session, "model_seq_id": 5, "base_model": "tiny", "lora_config": {
        "rank": 4}, "optimizer_config": {"type": "dimuon", "version": 1}, "type": "create_model"}))
    assert "dimuon" in detail and "adamw" in detail
    assert raw.create_model(session, "tiny", seq=5)  # none of them used the number up


@pytest.mark.parametrize("name", ["..", ".", "../../x", "a/b", ".x", "", "x" * 129, "a\u0000b", "a\nb", "%2e%2e", "ü", "a b"])
def test_names_that_could_leave_the_folder(raw, model, name):
    for seq, path in enumerate(("save_weights", "save_weights_for_sampler", "save_weights_external"), 1):
        reply = raw.post(path, {"model_id": model, "path": name, "seq_id": seq, "type": path})
        assert reply.status == 200, reply
        with pytest.raises(Failed) as error:
            raw.retrieve(reply.json["request_id"])
        assert error.value.category == "user"
    still_works(raw, model, 4)


@pytest.mark.parametrize("path", ["tinker://../weights/x", "tinker://a/weights/..", "tinker://a/weights/../../etc", "file:///etc",
                                  "tinker://a/elsewhere/x", "tinker://a/weights", "tinker://", "", "x" * 5000,
                                  "tinker://a/weights/x/y"])
def test_paths_that_could_leave_the_folder(raw, model, path):
    reply = raw.post("load_weights", {"model_id": model, "seq_id": 1, "path": path, "optimizer": False, "type": "load_weights"})
    assert reply.status == 200, reply
    with pytest.raises(Failed) as error:
        raw.retrieve(reply.json["request_id"])
    assert error.value.category == "user"
    still_works(raw, model, 2)
    refused(raw.post("weights_info", {"tinker_path": path}), (400, 404))


def test_urls_that_could_leave_the_folder(raw, model):
    quoted = urllib.parse.quote("../../../../etc/passwd", safe="")
    for url in (f"training_runs/{quoted}/checkpoints/weights/x", "training_runs/../../checkpoints",
                f"training_runs/x/checkpoints/weights/{quoted}", "samplers/%00", "training_runs/%zz", "/etc/passwd", "/../etc/passwd",
                f"training_runs/{model}/checkpoints/weights/%2e%2e/archive"):
        reply = raw.get(url)
        assert reply.status in (400, 404, 405), (url, reply)
        assert b"root:" not in reply.body


@pytest.mark.smoke
def test_bad_samples(raw, sampler):
    """asample's mistakes come through the future (or at once with a 400), and the sampler goes on."""
    cases = [([1], {"max_tokens": 0}), ([1], {"max_tokens": 10**6}), ([1], {"max_tokens": 4, "temperature": -1}),
             ([1], {"max_tokens": 4, "temperature": "hot"}), ([1], {"max_tokens": 4, "top_p": 0}), ([1], {"max_tokens": 4, "top_k": 0}),
             ([1], {"max_tokens": 4, "stop": {"a": 1}}), ([1], {"max_tokens": 4, "stop": [1.5]}), ([1], {"max_tokens": 4, "seed": "x"}),
             ([1], {"max_tokens": 4, "seed": 2**64}), ([], {"max_tokens": 4}), ([320], {"max_tokens": 4}), ([-1], {"max_tokens": 4}),
             ([1 << 40], {"max_tokens": 4}), (["a"], {"max_tokens": 4}), ([1.5], {"max_tokens": 4}), ([1] * 600, {"max_tokens": 4})]
    for seq, (ids, params) in enumerate(cases):
        reply = raw.submit_sample(sampler, seq, ids, **params)
        if reply.status == 200:
            with pytest.raises(Failed) as error:
                raw.retrieve(reply.json["request_id"])
            assert error.value.category == "user", (ids[:3], params)
        else:
            refused(reply)
    for n in (0, -1, 10**9):
        reply = raw.submit_sample(sampler, 1000 + n % 7, [1], n=n, max_tokens=1)
        if reply.status == 200:
            with pytest.raises(Failed):
                raw.retrieve(reply.json["request_id"])
        else:
            refused(reply)
    out = raw.sample(sampler, 5000, [1, 2, 3], max_tokens=3, seed=1, stop=[])
    assert len(out["sequences"][0]["tokens"]) == 3


def test_json_forms(raw, session, sampler):
    """Old SDKs get JSON results; null means absent; a seq_id of 10^18 keeps all its digits."""
    big = 142019606000000000
    reply = raw.post("asample", {"sampling_session_id": sampler, "seq_id": big, "num_samples": 2, "prompt": {"chunks": [
        {"tokens": [1, 2]}, {"tokens": [3], "type": "encoded_text"}]}, "sampling_params": {
            "max_tokens": 2, "seed": None, "stop": None, "temperature": 1, "top_k": -1}, "prompt_logprobs": True})
    assert reply.status == 200, reply
    ticket = reply.json
    assert str(big) in ticket["request_id"] and len(ticket["sample_sequence_ids"]) == 2
    answer = raw.retrieve(ticket["request_id"], proto=False)
    assert len(answer["sequences"]) == 2 and answer["prompt_logprobs"][0] is None and len(answer["prompt_logprobs"]) == 3
    assert {s["stop_reason"] for s in answer["sequences"]} <= {"stop", "length"}
    binary = sample_result(raw.retrieve(ticket["request_id"]))
    assert [s["tokens"] for s in binary["sequences"]] == [s["tokens"] for s in answer["sequences"]]
    model = raw.create_model(session, "tiny", seq=3)
    reply = raw.submit_forward_backward(model, 1, [good_datum()])
    answer = raw.retrieve(reply.json["request_id"], proto=False)
    assert answer["loss_fn_outputs"][0]["logprobs"]["dtype"] == "float32" and "loss:sum" in answer["metrics"]
    assert len(answer["loss_fn_outputs"][0]["logprobs"]["data"]) == 3


def test_telemetry_heartbeat_and_stubs(raw, session):
    assert raw.ok("telemetry", {"events": [], "platform": "x", "sdk_version": "0.38.0", "session_id": session,
                                "process_uuid": "x"}) == {"status": "accepted"}
    assert raw.post("session_heartbeat", {"session_id": session, "type": "session_heartbeat"}).status == 200
    assert isinstance(raw.ok("client/config", {"sdk_version": "0.38.0"}), dict)
    assert raw.post("client/dynamic_config", {"sdk_version": "0.38.0"}).status in (200, 404)
    assert raw.get("healthz").json["status"] == "ok"
    assert raw.call("GET", "/metrics").status == 200


# ---------------------------------------------------------------------------------------------- futures
def test_dedupe(raw, session, model, sampler):
    """A repeat gets the same id and does nothing twice."""
    first = raw.submit_forward_backward(model, 1, [good_datum()])
    second = raw.submit_forward_backward(model, 1, [datum([9], target_tokens=[9], weights=[9.0])])
    assert first.json["request_id"] == second.json["request_id"]
    a = forward_backward_result(raw.retrieve(first.json["request_id"]))
    assert len(a["logprobs"][0]) == 3
    assert forward_backward_result(raw.retrieve(second.json["request_id"])) == a
    step = {"model_id": model, "seq_id": 2, "type": "optim_step", "adam_params": {"learning_rate": 1e-2}}
    ids = {raw.ok("optim_step", step)["request_id"] for _ in range(3)}
    assert len(ids) == 1
    raw.retrieve(ids.pop())
    raw.ok("optim_step", step)  # and after it has run
    b = raw.forward_backward(model, 3, [good_datum()], forward_only=True)
    other = raw.create_model(session, "tiny", seq=1, seed=1)
    raw.forward_backward(other, 1, [good_datum()])
    raw.optim_step(other, 2, 1e-2)
    assert raw.forward_backward(other, 3, [good_datum()], forward_only=True) == b
    asks = [raw.submit_sample(sampler, 7, [1, 2], max_tokens=4).json for _ in range(2)]
    assert asks[0] == asks[1]
    create = {"session_id": session, "model_seq_id": 9, "base_model": "tiny", "lora_config": {"rank": 2}, "type": "create_model"}
    assert raw.ok("create_model", create)["request_id"] == raw.ok("create_model", create)["request_id"]
    assert (raw.create_sampling_session(session, 50, base_model="tiny") ==
            raw.create_sampling_session(session, 50, base_model="tiny"))


def test_order_by_number_not_by_arrival(raw, session):
    """5, 6, 4 as chunks arrive: nothing runs out of turn, and the polls for 5 and 6 are already open."""
    a, b = (raw.create_model(session, "tiny", seq=i, seed=1) for i in range(2))
    data = {i: [datum([i, i + 1], target_tokens=[i + 1, i + 2], weights=[1.0, 0.5])] for i in (1, 3, 4, 5, 6)}
    for model, order in ((a, (1, 2, 3, 4, 5, 6, 7)), (b, (2, 1, 7, 5, 6, 4, 3))):
        results, threads = {}, []

        def poll(request_id, key, out):
            with Raw(f"http://{raw.host}:{raw.port}") as own:
                answer = own.retrieve(request_id)
                out[key] = forward_backward_result(answer) if isinstance(answer, bytes) else {}

        for n in order:
            if n in data:
                reply = raw.submit_forward_backward(model, n, data[n])
            else:
                reply = raw.post("optim_step", {"model_id": model, "seq_id": n, "type": "optim_step",
                                                "adam_params": {"learning_rate": 1e-2}})
            assert reply.status == 200
            threads.append(threading.Thread(target=poll, args=(reply.json["request_id"], n, results)))
            threads[-1].start()
        for t in threads:
            t.join(60)
        last = raw.forward_backward(model, 8, [good_datum()], forward_only=True)
        if model == a:
            want = (results, last)
    assert (results, last) == want


def test_long_poll(start):
    """A future that cannot finish: try_again after the hold time, not before and not at once; then the result at once."""
    server = start(args=["--long-poll", "2"])
    with Raw(server.url) as raw:
        model = raw.create_model(raw.create_session(), "tiny")
        ticket = raw.ok("optim_step", {"model_id": model, "seq_id": 2, "type": "optim_step", "adam_params": {}})
        began = time.monotonic()
        reply = raw.retrieve_once(ticket["request_id"], metadata=True)
        held = time.monotonic() - began
        assert reply.status == 408 and reply.json["type"] == "try_again"
        assert reply.json["request_id"] == ticket["request_id"]
        assert reply.json["queue_state"] in ("active", "paused_capacity", "paused_rate_limit")
        assert 1.5 < held < 10
        done = []
        with Raw(server.url) as other:
            thread = threading.Thread(target=lambda: done.append(other.retrieve_once(ticket["request_id"])))
            thread.start()
            time.sleep(0.2)
            assert not done
            raw.optim_step(model, 1)
            thread.join(1.5)  # before the hold time is over
            assert done and done[0].status == 200


@pytest.mark.slow
def test_long_poll_with_the_default_hold(raw, model):
    ticket = raw.ok("optim_step", {"model_id": model, "seq_id": 2, "type": "optim_step", "adam_params": {}})
    began = time.monotonic()
    reply = raw.retrieve_once(ticket["request_id"])
    held = time.monotonic() - began
    assert reply.status == 408 and reply.json["type"] == "try_again"
    assert 15 < held < 44, "the SDK gives up at 45 s"


def test_gone_and_unknown(raw, model, sampler):
    assert raw.retrieve_once(f"{model}:77").status == 410
    assert raw.retrieve_once(f"{sampler}:77").status == 410
    refused(raw.retrieve_once("what is this"), (404,))


def test_read_twice(raw, model):
    reply = raw.submit_forward_backward(model, 1, [good_datum()])
    first = raw.retrieve(reply.json["request_id"])
    assert raw.retrieve(reply.json["request_id"]) == first


def test_metadata_only(raw, model):
    """A big result may be announced by size first; asked again without the flag it comes whole."""
    data = [datum([1] * 500, target_tokens=[2] * 500, weights=[1.0] * 500)] * 40
    reply = raw.submit_forward_backward(model, 1, data, forward_only=True)
    while True:
        answer = raw.retrieve_once(reply.json["request_id"], metadata=True)
        if answer.status != 408:
            break
    assert answer.status == 200
    if PROTO not in answer.headers["content-type"]:
        meta = answer.json
        assert meta["status"] == "complete_metadata" and "error" not in meta
        whole = raw.retrieve_once(reply.json["request_id"])
        assert PROTO in whole.headers["content-type"] and len(whole.body) == meta["response_payload_size"]
        answer = whole
    assert len(forward_backward_result(answer.body)["logprobs"]) == 40


def test_finish(raw):
    session = raw.create_session()
    model = raw.create_model(session, "tiny")
    sampler = raw.create_sampling_session(session, 0, base_model="tiny")
    assert raw.post(f"sessions/{session}/finish", {"reason": {"type": "success"}, "detail": None}).status == 200
    assert raw.post(f"sessions/{session}/finish", {"reason": {"type": "errored"}, "detail": "late"}).status == 200
    assert raw.post("session_heartbeat", {"session_id": session, "type": "session_heartbeat"}).status == 410
    reply = raw.submit_forward_backward(model, 1, [good_datum()])
    assert 400 <= reply.status < 500 and reply.status not in (408, 409, 429)
    reply = raw.submit_sample(sampler, 0, [1], max_tokens=1)
    assert 400 <= reply.status < 500 and reply.status not in (408, 409, 429)


# ---------------------------------------------------------------------------------------------- bytes
def test_compressed_bodies(raw, model):
    zstd = pytest.importorskip("zstandard")
    body = forward_backward_request(model, 1, [good_datum()])
    send = {"Content-Type": PROTO, "Content-Encoding": "zstd"}
    reply = raw.post("forward_backward", zstd.ZstdCompressor().compress(body), send)
    assert reply.status == 200
    out = forward_backward_result(raw.retrieve(reply.json["request_id"]))
    assert len(out["logprobs"][0]) == 3
    streamed = zstd.ZstdCompressor(write_content_size=False).compress(
        forward_backward_request(model, 2, [good_datum()]))  # without the size in its header
    reply = raw.post("forward_backward", streamed, send)
    assert reply.status == 200 and raw.retrieve(reply.json["request_id"])
    import gzip
    reply = raw.post("create_session", gzip.compress(b'{"tags":[],"user_metadata":{},"sdk_version":"x"}'),
                     {"Content-Encoding": "gzip"})
    assert reply.status in (200, 400, 415)
    refused(raw.post("forward_backward", b"not zstd at all", send), (400, 415))
    refused(raw.post("forward_backward", zstd.ZstdCompressor().compress(body)[:-5], send), (400,))
    refused(raw.post("forward_backward", body, {"Content-Type": PROTO, "Content-Encoding": "rot13"}), (400, 415))
    still_works(raw, model, 3)


def test_a_bomb(start):
    """A small body that inflates to far more than --max-body is refused without being held in memory."""
    zstd = pytest.importorskip("zstandard")
    server = start(args=["--max-body", "1M"])
    with Raw(server.url) as raw:
        model = raw.create_model(raw.create_session(), "tiny")
        bomb = zstd.ZstdCompressor().compress(b"\0" * (256 << 20))
        before = server.memory("VmHWM")
        refused(raw.post("forward_backward", bomb, {"Content-Type": PROTO, "Content-Encoding": "zstd"}), (400, 413))
        assert server.memory("VmHWM") - before < 64 << 20
        still_works(raw, model, 1)


@pytest.mark.smoke
def test_oversized_bodies(start):
    server = start(args=["--max-body", "64K"])
    with Raw(server.url) as raw:
        model = raw.create_model(raw.create_session(), "tiny")
        with socket.create_connection((raw.host, raw.port), 30) as s:  # refused by its announcement, before it is sent
            s.sendall(b"POST /api/v1/create_session HTTP/1.1\r\nHost: x\r\nX-API-Key: tml-test\r\n"
                      b"Content-Type: application/json\r\nContent-Length: 1000000000000\r\n\r\n{")
            answer = http.client.HTTPResponse(s)
            answer.begin()
            assert answer.status == 413
        with socket.create_connection((raw.host, raw.port), 30) as s:
            s.sendall(b"POST /api/v1/create_session HTTP/1.1\r\nHost: x\r\nX-API-Key: tml-test\r\n"
                      b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
            try:
                for _ in range(64):
                    s.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
            except OSError:
                pass
            assert b" 413 " in s.recv(1000)
        still_works(raw, model, 1)


BAD_BYTES = [
    b"GARBAGE\r\n\r\n", b"\0\0\0\0\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: abc\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n", b"GET / HTTP/1.1\r\nA: b\r\n folded: c\r\n\r\n",
    b"GET / HTTP/1.1\r\nNo colon here\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
    b"GET /" + b"a" * 100000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"a" * 200000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nX\0Y: z\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]


@pytest.mark.smoke
@pytest.mark.parametrize("data", BAD_BYTES, ids=[b[:24].decode("latin1") for b in BAD_BYTES])
def test_bad_bytes(raw, data):
    """Answered with a 4xx or 5xx, or closed; the server goes on."""
    with socket.create_connection((raw.host, raw.port), 10) as s:
        try:
            s.sendall(data)
            s.settimeout(10)
            got = s.recv(65536)
        except (ConnectionError, socket.timeout) as error:
            assert not isinstance(error, socket.timeout), "no answer within 10 s"
            got = b""
        assert got == b"" or got.split(b" ")[1][:1] in b"45", got[:100]
    assert raw.get("healthz").status == 200


def read_answers(sock, n):
    """n pipelined answers from one socket."""
    file, out = sock.makefile("rb"), []
    for _ in range(n):
        status = int(file.readline().split()[1])
        length = 0
        while (line := file.readline()) not in (b"\r\n", b""):
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        out.append((status, file.read(length)))
    return out


def test_transport(raw):
    """Keep-alive, pipelining, one byte at a time, chunked bodies, HEAD-less HTTP/1.0."""
    request = b"GET /api/v1/healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection((raw.host, raw.port), 30) as s:
        s.sendall(request * 20)
        assert [status for status, _ in read_answers(s, 20)] == [200] * 20
        for byte in request:
            s.sendall(bytes([byte]))
        assert read_answers(s, 1)[0][0] == 200
        body = b'{"tags":[],"user_metadata":{},"sdk_version":"0.38.0","type":"create_session"}'
        head = b"POST /api/v1/create_session HTTP/1.1\r\nHost: x\r\nX-API-Key: tml-x\r\nContent-Type: application/json\r\n"
        s.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(b"%x\r\n%s\r\n" % (1, body[i:i + 1])
                                                                      for i in range(len(body))) + b"0\r\n\r\n")
        status, answer = read_answers(s, 1)[0]
        assert status == 200 and json.loads(answer)["session_id"]
    with socket.create_connection((raw.host, raw.port), 30) as s:
        s.sendall(b"GET /api/v1/healthz HTTP/1.0\r\n\r\n")
        data = b""
        while chunk := s.recv(4096):
            data += chunk
        assert b" 200 " in data.split(b"\r\n")[0] and data.endswith(b"}")
    with socket.create_connection((raw.host, raw.port), 30) as s:
        s.sendall(b"GET /api/v1/healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b" 200 " in s.makefile("rb").read()


def test_slow_client_does_not_stop_others(raw, server):
    """A body that never comes whole holds one connection, nobody else."""
    with socket.create_connection((raw.host, raw.port), 30) as s:
        s.sendall(b"POST /api/v1/create_session HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        for _ in range(20):
            assert raw.get("healthz").status == 200
    assert server.alive()


def test_answer_comes_in_one_piece(raw):
    """Head and body in one write: a split costs 40 ms a call with delayed ACKs. Counted in reads of a quiet socket."""
    with socket.create_connection((raw.host, raw.port), 30) as s:
        for _ in range(10):
            s.sendall(b"GET /api/v1/healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert s.recv(65536).endswith(b"}")


# ---------------------------------------------------------------------------------------------- older SDKs
def json_data(**inputs):
    return [{"model_input": {"chunks": [{"tokens": [1, 2]}, {"tokens": [3], "type": "encoded_text"}]},
             "loss_fn_inputs": {k: {"data": v, "dtype": "int64" if k == "target_tokens" else "float32"}
                                for k, v in inputs.items()}}]


def test_a_client_without_sessions(start):
    """SDK 0.1.5: a model comes with a session, which silence does not end so soon; a repeat finds the same one, and a
    creation that is refused leaves none."""
    server = start(args=["--session-lease", "1", "--tenant-pending", "1"])
    with Raw(server.url) as raw:
        body = {"base_model": "tiny", "lora_config": {"rank": 4}}

        def create(key):
            return raw.post("create_model", body, {"X-Idempotency-Key": key})

        first, again = create("a"), create("a")
        assert first.status == 200 and first.json == again.json
        raw.retrieve(first.json["request_id"])
        model = first.json["model_id"]
        time.sleep(3)  # three leases
        step = raw.post("forward", {"model_id": model, "forward_input": {"loss_fn": "cross_entropy", "data": json_data(**GOOD)}})
        assert step.status == 200
        raw.retrieve(step.json["request_id"])
        made = set(raw.get("sessions?limit=100").json["sessions"])
        replies = [create(f"b{i}") for i in range(20)]
        taken = [r for r in replies if r.status == 200]
        assert {r.status for r in replies} <= {200, 429} and taken
        assert len(set(raw.get("sessions?limit=100").json["sessions"]) - made) == len(taken)


def test_training_in_json(raw, session):
    """What releases before 0.25 send: JSON bodies, /forward, explicit nulls, fields left out. The numbers are protobuf's."""
    old, new = (raw.create_model(session, "tiny", seq=i, seed=1) for i in range(2))
    body = {"data": json_data(**GOOD), "loss_fn": "cross_entropy", "loss_fn_config": None}
    ticket = raw.ok("forward_backward", {"forward_backward_input": body, "model_id": old, "seq_id": 1})
    a = raw.retrieve(ticket["request_id"], proto=False)
    b = raw.forward_backward(new, 1, [good_datum()])
    assert a["metrics"] == b["metrics"]
    assert [struct.unpack("<f", struct.pack("<f", x))[0] for x in a["loss_fn_outputs"][0]["logprobs"]["data"]] == b["logprobs"][0]
    ticket = raw.ok("optim_step", {"model_id": old, "seq_id": 2, "adam_params": {"learning_rate": 1e-2}})
    raw.retrieve(ticket["request_id"])
    raw.optim_step(new, 2, 1e-2, beta1=0.9, beta2=0.95, eps=1e-12, weight_decay=0.0, grad_clip_norm=0.0)
    ticket = raw.ok("forward", {"forward_input": body, "model_id": old, "seq_id": 3})
    a = raw.retrieve(ticket["request_id"], proto=False)
    assert a["metrics"] == raw.forward_backward(new, 3, [good_datum()], forward_only=True)["metrics"]
    bad = ({"data": 5, "loss_fn": "ppo"}, {"loss_fn": "cross_entropy"}, {"data": [{}], "loss_fn": "cross_entropy"},
           {"data": json_data(target_tokens=[2, "x", 4]), "loss_fn": "cross_entropy"},
           {"data": json_data(target_tokens=[2, 1e400, 4]), "loss_fn": "cross_entropy"})
    for wrong in bad:
        model = raw.create_model(session, "tiny", seq=10 + bad.index(wrong))
        reply = raw.post("forward_backward", {"forward_backward_input": wrong, "model_id": model, "seq_id": 1})
        if reply.status == 200:
            with pytest.raises(Failed) as error:
                raw.retrieve(reply.json["request_id"])
            assert error.value.category == "user"
        else:
            refused(reply)


@pytest.mark.parametrize("kind,path", [("weights", "save_weights"), ("sampler_weights", "save_weights_for_sampler"),
                                       ("external_weights", "save_weights_external")])
def test_archives(raw, model, kind, path):
    """The download of older SDKs: a redirect, which they follow themselves, to a tar of plain files, without a key."""
    import io
    import tarfile
    raw.retrieve(raw.ok(path, {"model_id": model, "path": "a", "seq_id": 1, "type": path})["request_id"])
    reply = raw.get(f"training_runs/{model}/checkpoints/{kind}/a/archive")
    assert reply.status == 302, reply
    url = urllib.parse.urlsplit(reply.headers["location"])
    answer = raw.call("GET", url.path, key=False)
    assert answer.status == 200
    with tarfile.open(fileobj=io.BytesIO(answer.body)) as tar:
        members = {m.name.removeprefix("./"): m for m in tar.getmembers() if not m.isdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(members)
        assert all(m.isfile() and not m.name.startswith("/") and ".." not in m.name for m in members.values())
        weights = tar.extractfile(members["adapter_model.safetensors"]).read()
        assert struct.unpack("<Q", weights[:8])[0] < len(weights)
        assert json.load(tar.extractfile(members["adapter_config.json"]))["r"] == 8
    assert raw.call("GET", url.path[:-14] + "0000archive.tar", key=False).status in (401, 403, 404)
    # its size is known, and it is sent in parts to those who ask
    head = raw.call("HEAD", url.path, key=False)
    assert head.status == 200 and int(head.headers["content-length"]) == len(answer.body) and head.body == b""
    assert answer.headers["accept-ranges"] == "bytes" and len(answer.body) % 512 == 0

    def part(value, **more):
        return raw.call("GET", url.path, headers={"Range": value, **more}, key=False)

    size = len(answer.body)
    for a, b in ((0, 0), (257, 261), (511, 512), (100, 3000), (size - 1600, size - 1), (0, size - 1)):
        reply = part(f"bytes={a}-{b}")
        assert reply.status == 206 and reply.body == answer.body[a:b + 1]
        assert reply.headers["content-range"] == f"bytes {a}-{b}/{size}"
    assert part("bytes=-1024").body == b"\0" * 1024 and part(f"bytes={size - 5}-").body == b"\0" * 5
    beyond = part(f"bytes={size}-")
    assert beyond.status == 416 and beyond.headers["content-range"] == f"bytes */{size}"
    assert part("bytes=0-9", **{"If-Range": answer.headers["last-modified"]}).status == 206
    assert part("bytes=0-9", **{"If-Range": "Thu, 01 Jan 1970 00:00:00 GMT"}).body == answer.body
    refused(raw.get(f"training_runs/{model}/checkpoints/{kind}/b/archive"), (404,))


def test_unload(raw, session, model):
    ticket = raw.ok("unload_model", {"model_id": model, "type": "unload_model"})
    assert raw.retrieve(ticket["request_id"])["model_id"] == model
    assert raw.post("get_info", {"model_id": model, "type": "get_info"}).status in (404, 410)


# ---------------------------------------------------------------------------------------------- batch polling
@pytest.fixture
def feed(raw):
    if not raw.ok("client/config", {"sdk_version": "0.38.0"}).get("sample_use_retrieve_futures"):
        pytest.skip("this server has no batch poll")
    return raw


def poll(raw, sampler, cursor=0, clone=0, **more):
    return raw.ok("retrieve_futures", {"target": {"type": "sampling_session", "sampling_session_id": sampler,
                                                  "cloned_sampler_id": clone}, "prev_cursor": cursor, **more})


def test_batch_poll(feed, sampler):
    """Finished and failed samples come once a cursor, again for the same cursor, and apart for each clone."""
    raw, billion = feed, 10**9
    good = [raw.submit_sample(sampler, i, [1, 2, 3 + i], max_tokens=3, stop=[]).json["request_id"] for i in range(5)]
    bad = raw.submit_sample(sampler, 5, [320], max_tokens=3).json["request_id"]
    other = raw.submit_sample(sampler, 7 * billion, [1], max_tokens=3, stop=[]).json["request_id"]
    seen, cursor = {}, 0
    while len(seen) < 6:
        answer = poll(raw, sampler, cursor)
        assert answer["cursor"] > cursor
        assert poll(raw, sampler, cursor, timeout=0.0)["completions"][:len(answer["completions"])] == answer["completions"]
        for c in answer["completions"]:
            assert c["request_id"] not in seen
            seen[c["request_id"]] = c["state"]
        cursor = answer["cursor"]
    assert seen == {**{r: "finished" for r in good}, bad: "failed"}
    began = time.monotonic()
    assert poll(raw, sampler, cursor, timeout=0.0, retrieved_request_ids=good[:1]) == {"completions": [], "cursor": cursor}
    assert time.monotonic() - began < 5
    assert [c["request_id"] for c in poll(raw, sampler, 0, clone=7)["completions"]] == [other]
    for request_id in good[1:]:
        assert len(sample_result(raw.retrieve(request_id))["sequences"][0]["tokens"]) == 3
    with pytest.raises(Failed):
        raw.retrieve(bad)
    # a poll that waits is answered by the next sample
    answers = []

    def wait():
        with Raw(f"http://{raw.host}:{raw.port}") as own:
            answers.append(poll(own, sampler, cursor))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    late = raw.submit_sample(sampler, 6, [9], max_tokens=1, stop=[]).json["request_id"]
    thread.join(20)
    assert [c["request_id"] for c in answers[0]["completions"]] == [late]
    for target in ({"type": "sampling_session", "sampling_session_id": "nope"}, {"type": "?"}, {}, None, 5):
        reply = raw.post("retrieve_futures", {"target": target, "prev_cursor": 0})
        assert 400 <= reply.status < 500 and reply.status not in (408, 409, 429), reply


def test_cancel(feed, sampler):
    """A canceled sample ends as a failure; others, and later ones, are not disturbed."""
    raw = feed
    before = raw.sample(sampler, 0, [1, 2], max_tokens=20, seed=1, stop=[])
    running = [raw.submit_sample(sampler, 1 + i, [1, 2], max_tokens=500, seed=i, n=8, stop=[]).json["request_id"]
               for i in range(4)]
    for request_id in running[:2]:
        assert raw.post("cancel_future", {"request_id": request_id}).status in (200, 204)
    for request_id in running[2:]:
        assert len(sample_result(raw.retrieve(request_id))["sequences"]) == 8
    for request_id in running[:2]:  # canceled, unless it was done before
        try:
            assert len(sample_result(raw.retrieve(request_id))["sequences"]) == 8
        except Failed as error:
            assert "cancel" in str(error)
        except RuntimeError as error:
            assert "410" in str(error)
    assert raw.post("cancel_future", {"request_id": "nope"}).status < 500
    assert raw.sample(sampler, 9, [1, 2], max_tokens=20, seed=1, stop=[]) == before


def test_join(feed, sampler):
    raw = feed
    counters = [raw.ok("join_sampling_session", {"sampling_session_id": sampler})["client_counter"] for _ in range(4)]
    assert len(set(counters)) == 4 and min(counters) >= 1
    refused(raw.post("join_sampling_session", {"sampling_session_id": "nope"}), (404, 410))
