"""What survives a restart, what is answered about what did not, and what a kill leaves behind."""

import os
import random
import signal
import subprocess
import threading
import time

import numpy as np
import pytest
from common import adam, forward_logprobs, sft_datum, tokens
from daemon import end, find_daemon
from tinker_raw import PROTO, Failed, Raw, datum, forward_backward_request

tinker = pytest.importorskip("tinker")


@pytest.mark.smoke
def test_restart(start):
    server = start()
    service = tinker.ServiceClient(base_url=server.url)
    client = service.create_lora_training_client("tiny", rank=4, seed=1, user_metadata={"k": "v"}).result()

    def train(c, seeds):
        losses = []
        for seed in seeds:
            losses.append(c.forward_backward([sft_datum(8, seed=seed)], "cross_entropy").result().metrics["loss:sum"])
            c.optim_step(adam()).result()
        return losses

    train(client, range(3))
    state = client.save_state("state").result().path
    sampler_path = client.save_weights_for_sampler("sampler").result().path
    sampler = service.create_sampling_client(model_path=sampler_path).result()
    lps = sampler.compute_logprobs(tinker.ModelInput.from_ints(tokens(9))).result()
    model_id = client.get_info().model_id
    session_id = model_id.split(":")[0]
    sampler_id = tinker.RestClient(base_url=server.url).get_session(session_id).result().sampler_ids[-1]
    wanted = train(client, range(3, 6))

    server.restart()
    with Raw(server.url) as raw:
        # live things are gone, and each says so in the way that its client understands
        assert raw.post("session_heartbeat", {"session_id": session_id, "type": "session_heartbeat"}).status == 410
        assert raw.retrieve_once(f"{model_id}:1").status == 410
        assert raw.retrieve_once(f"{sampler_id}:0").status == 410
        assert raw.retrieve_once("no such form").status == 404
        assert raw.post("optim_step", {"model_id": model_id, "seq_id": 50, "type": "optim_step",
                                       "adam_params": {}}).status == 404
        body = forward_backward_request(model_id, 51, [datum([1, 2], target_tokens=[2, 3], weights=[1.0, 1.0])])
        assert raw.post("forward_backward", body, {"Content-Type": PROTO}).status == 404
        assert raw.submit_sample(sampler_id, 1, [1, 2], max_tokens=1).status == 404
        assert raw.post("get_info", {"model_id": model_id, "type": "get_info"}).status == 404
    again = tinker.ServiceClient(base_url=server.url)
    rest = tinker.RestClient(base_url=server.url)
    run = rest.get_training_run(model_id).result()
    assert run.base_model == "tiny" and run.lora_rank == 4
    assert {c.tinker_path for c in rest.list_checkpoints(model_id).result().checkpoints} == {state, sampler_path}
    assert session_id in rest.list_sessions(limit=100).result().sessions
    assert train(again.create_training_client_from_state_with_optimizer(state).result(), range(3, 6)) == wanted
    reborn = again.create_sampling_client(model_path=sampler_path).result()
    assert reborn.compute_logprobs(tinker.ModelInput.from_ints(tokens(9))).result() == lps
    end(again)


def test_data_folder_has_one_owner(start):
    server = start()
    command = server.command()
    second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 2
    assert len(second.stderr.strip().splitlines()) == 1 and server.data in second.stderr
    assert server.alive()


def test_sigterm_answers_what_runs(start):
    """A submit just before SIGTERM: the server exits with 0 and the client is not left hanging."""
    server = start()
    with Raw(server.url) as raw:
        session = raw.create_session()
        model = raw.create_model(session, "tiny")
        data = [datum(tokens(400, i), target_tokens=tokens(400, i + 1), weights=[1.0] * 400) for i in range(8)]
        reply = raw.submit_forward_backward(model, 1, data)
        assert reply.status == 200
        waiting = []
        with Raw(server.url) as other:
            thread = threading.Thread(target=lambda: waiting.append(_try(other, reply.json["request_id"])))
            thread.start()
            time.sleep(0.05)
            server.stop()
            thread.join(60)
            assert not thread.is_alive() and waiting


def _try(client, request_id):
    try:
        return client.retrieve_once(request_id).status
    except OSError:
        return "closed"


@pytest.mark.slow
def test_kill_while_saving(start, tmp_path):
    """Killed at any moment of a loop of saves, the server starts again, and every checkpoint that it lists loads and holds
    what was saved under that name."""
    data = tmp_path / "data"
    rng = random.Random(1)
    expected = {}
    server = start(data=data)
    for round_number in range(4):
        with Raw(server.url) as raw:
            session = raw.create_session()
            model = raw.create_model(session, "tiny", rank=32, seed=round_number)
            stop = threading.Timer(0.2 + rng.random() * 0.6, server.kill)
            seq, n = 1, 0
            stop.start()
            try:
                while True:
                    out = raw.forward_backward(model, seq, [datum([1, 2, 3], target_tokens=[2, 3, 4], weights=[1.0] * 3)])
                    raw.optim_step(model, seq + 1, 1e-2)
                    # the state being saved is told by the loss of the next forward: noted before the save is sent
                    next_loss = raw.forward_backward(model, seq + 2, [datum([1, 2, 3], target_tokens=[2, 3, 4],
                                                                            weights=[1.0] * 3)], forward_only=True)
                    name = f"r{round_number}-{n}"
                    expected[f"tinker://{model}/weights/{name}"] = next_loss["metrics"]["loss:sum"]
                    assert np.isfinite(out["metrics"]["loss:sum"])
                    ticket = raw.ok("save_weights", {"model_id": model, "path": name, "seq_id": seq + 3, "overwrite": False,
                                                     "type": "save_weights"})
                    raw.retrieve(ticket["request_id"])
                    seq, n = seq + 4, n + 1
            except (OSError, RuntimeError, EOFError) as error:
                last = error
            except Exception as error:  # http.client's
                last = error
            stop.join()
            assert not server.alive(), last
        server.start()
    with Raw(server.url) as raw:
        listed = [c["tinker_path"] for c in raw.get("checkpoints?limit=10000").json["checkpoints"]]
        assert listed and set(listed) <= set(expected)
        session = raw.create_session()
        for i, path in enumerate(listed):
            ticket = raw.ok("load_weights", {"session_id": session, "model_seq_id": i, "path": path, "optimizer": True,
                                             "type": "load_weights"})
            raw.retrieve(ticket["request_id"])
            out = raw.forward_backward(f"{session}:train:{i}", 1, [datum([1, 2, 3], target_tokens=[2, 3, 4],
                                                                         weights=[1.0] * 3)], forward_only=True)
            assert out["metrics"]["loss:sum"] == expected[path], path
    temporary = os.path.join(server.data, "tmp")
    assert not os.path.isdir(temporary) or os.listdir(temporary) == []
    folders = {f"tinker://{run}/{kind}/{name}" for run in os.listdir(os.path.join(server.data, "checkpoints"))
               for kind in os.listdir(os.path.join(server.data, "checkpoints", run))
               for name in os.listdir(os.path.join(server.data, "checkpoints", run, kind))}
    assert folders == set(listed), "folders without a row, or rows without a folder"


@pytest.mark.parametrize("args,word", [
    (["serve"], "--model"), (["serve", "--model", "x"], "NAME=DIR"), (["serve", "--model", "x=/no/such/folder"], "/no/such"),
    (["serve", "--no-such-option"], "--no-such-option"), (["serve", "--model", "x=/tmp", "--listen", "nowhere"], "HOST:PORT"),
    (["serve", "--model", "x=/tmp", "--dtype", "f8"], "--dtype"),
    (["serve", "--model", "x=/tmp", "--devices", "0,"], "--devices"), (["serve", "--model", "x=/tmp", "--devices", "1,1"], "twice"),
    (["serve", "--model", "x=/tmp", "--devices", "0", "--backend", "cpu"], "--devices"),
    (["serve", "--model", "x=/tmp", "--api-key", "secret"], "tml-"), (["dance"], "dance"),
])
def test_bad_command_lines(args, word, tmp_path):
    quiet = ["--log-level", "error"] if args[0] == "serve" else []
    run = subprocess.run([find_daemon(), *args[:1], *quiet, *args[1:]], capture_output=True, text=True, timeout=60, check=False,
                         cwd=tmp_path)
    assert run.returncode == 2, run
    assert word in run.stderr and run.stdout == ""
    assert len(run.stderr.strip().splitlines()) == 1


def test_models_that_cannot_be_served(tiny, tmp_path):
    """One clear line and exit code 2, whatever is wrong with a model's files."""
    import json
    import shutil

    def broken(name, change):
        folder = tmp_path / name
        shutil.copytree(tiny, folder)
        change(folder)
        run = subprocess.run([find_daemon(), "serve", "--model", f"m={folder}", "--listen", "127.0.0.1:0", "--data",
                              str(tmp_path / "data"), "--dtype", "f32", "--log-level", "error"], capture_output=True, text=True,
                             timeout=60, check=False)
        assert run.returncode == 2, (name, run)
        assert len(run.stderr.strip().splitlines()) == 1, (name, run.stderr)
        return run.stderr

    def config(**changes):
        def change(folder):
            path = folder / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return change

    def cut(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])

    def header(folder):
        path = folder / "model.safetensors"
        path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])

    assert "config.json" in broken("no-config", lambda f: (f / "config.json").unlink())
    assert "safetensors" in broken("no-weights", lambda f: (f / "model.safetensors").unlink())
    assert "safetensors" in broken("cut", cut)
    assert "safetensors" in broken("header", header)
    assert "Mystery" in broken("family", config(model_type="mystery", architectures=["MysteryForCausalLM"]))
    broken("layers", config(num_hidden_layers=3))
    broken("shape", config(hidden_size=128))
    broken("json", lambda f: (f / "config.json").write_text("{"))


def test_keys(start, tiny):
    server = start(args=["--api-key", "tml-one", "--api-key", "tml-two"])
    with Raw(server.url, key="tml-one") as raw:
        assert raw.create_session()
        assert raw.call("POST", "create_session", {"tags": [], "user_metadata": {}, "sdk_version": "0.38.0"},
                        {"Authorization": "Bearer tml-two"}, key=False).status == 200
        for bad in ({"X-API-Key": "tml-three"}, {"X-API-Key": "tml-on"}, {"Authorization": "Bearer tml-x"}, {}):
            reply = raw.call("POST", "create_session", {"tags": [], "user_metadata": {}, "sdk_version": "0.38.0"}, bad,
                             key=False)
            assert reply.status == 401, (bad, reply)
            assert "tml-" not in reply.json["detail"] or "must" in reply.json["detail"]
        assert raw.call("GET", "healthz", key=False).status == 200


def test_signal_while_idle_is_quick(start):
    server = start()
    began = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    server.process.wait(30)
    assert server.process.returncode == 0
    assert time.monotonic() - began < 30
    server.process.stdout.close()
    server.process = None


def test_a_session_without_heartbeat_ends(start):
    """And one with a heartbeat lives on; what the other had is answered as gone."""
    server = start(args=["--session-lease", "2"])
    with Raw(server.url) as raw:
        kept, lost = raw.create_session(), raw.create_session()
        model = raw.create_model(lost, "tiny")
        raw.optim_step(model, 1)
        for _ in range(16):  # any other question about the session would keep it alive
            time.sleep(0.5)
            assert raw.post("session_heartbeat", {"session_id": kept, "type": "session_heartbeat"}).status == 200
        assert raw.post("get_info", {"model_id": model, "type": "get_info"}).status in (404, 410)
        assert raw.post("session_heartbeat", {"session_id": lost, "type": "session_heartbeat"}).status == 410
        assert raw.retrieve_once(f"{model}:1").status == 410
        assert raw.create_model(kept, "tiny")


def test_limits_of_the_operator(start):
    server = start(args=["--max-rank", "4", "--max-context", "64"])
    with Raw(server.url) as raw:
        session = raw.create_session()
        models = raw.get("get_server_capabilities").json["supported_models"]
        assert [m["max_context_length"] for m in models] == [64]
        reply = raw.post("create_model", {"session_id": session, "model_seq_id": 0, "base_model": "tiny",
                                          "lora_config": {"rank": 5}, "type": "create_model"})
        assert reply.status == 400 and "4" in reply.json["detail"]
        model = raw.create_model(session, "tiny", rank=4)
        raw.forward_backward(model, 1, [datum([1] * 64, target_tokens=[2] * 64, weights=[1.0] * 64)])
        reply = raw.submit_forward_backward(model, 2, [datum([1] * 65, target_tokens=[2] * 65, weights=[1.0] * 65)])
        with pytest.raises(Failed, match="64"):
            raw.retrieve(reply.json["request_id"])
        sampler = raw.create_sampling_session(session, 1, base_model="tiny")
        assert len(raw.sample(sampler, 1, [1] * 60, max_tokens=4, stop=[])["sequences"][0]["tokens"]) == 4


def test_weights_of_another_restart_still_sample(start):
    """forward of a resumed model equals forward before the restart."""
    server = start()
    service = tinker.ServiceClient(base_url=server.url)
    client = service.create_lora_training_client("tiny", rank=4, seed=1).result()
    client.forward_backward([sft_datum(8)], "cross_entropy").result()
    client.optim_step(adam()).result()
    path = client.save_state("s").result().path
    want = forward_logprobs(client, tokens(30))
    server.restart()
    other = tinker.ServiceClient(base_url=server.url).create_training_client_from_state(path).result()
    assert np.array_equal(forward_logprobs(other, tokens(30)), want)


def test_unknown_future_forms(raw):
    for request_id in ("", "x", "a:b", "../../etc/passwd", "a" * 300, "sess:train:x:1"):
        reply = raw.retrieve_once(request_id)
        assert reply.status in (400, 404), (request_id, reply)


