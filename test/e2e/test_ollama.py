"""The Ollama face, through the unmodified `ollama` package and over plain HTTP."""

import asyncio
import json
import re

import pytest
from llm_common import (QUESTION, RENDERED, SAMPLED, SCHEMAS, SHOP, STEPS, Stream, Training, check_slow_readers, gauge, get, parallel,
                        post, until, until_idle)
from tinker_raw import Raw

ollama = pytest.importorskip("ollama")
jsonschema = pytest.importorskip("jsonschema")

GENERATE, CHAT = "/api/generate", "/api/chat"
PROMPT = "What is the capital of France?"
STATS = {"total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration"}


@pytest.fixture(scope="module")
def client(demo):
    return ollama.Client(host=demo.url, timeout=120)


def generate(client, **more):
    return client.generate(**{"model": "demo", "prompt": PROMPT, "options": {"num_predict": 40, "seed": 1}, **more})


def chat(client, **more):
    return client.chat(**{"model": "demo", "messages": QUESTION, "options": {"num_predict": 40, "seed": 1}, **more})


@pytest.mark.smoke
def test_generate(client):
    got = generate(client)
    assert got.done and got.done_reason == "stop" and got.response and got.model == "demo"
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", got.created_at)
    assert got.eval_count + got.prompt_eval_count == len(got.context)
    assert 0 < got.eval_duration <= got.total_duration and got.prompt_eval_duration > 0 and got.load_duration == 0
    assert generate(client, model="demo:latest").response == got.response
    assert generate(client, options={"num_predict": 1, "seed": 1}).done_reason == "length"
    assert generate(client, options={"num_predict": 100000, "seed": 1}).response == got.response
    assert generate(client, system="You answer.").response == chat(client).message.content
    assert generate(client, raw=True).prompt_eval_count < got.prompt_eval_count


@pytest.mark.smoke
def test_a_stream_is_the_whole(client, demo):
    for call, text in ((generate, lambda r: r.response), (chat, lambda r: r.message.content)):
        whole, parts = call(client), list(call(client, stream=True))
        assert "".join(text(p) for p in parts) == text(whole)
        assert [p.done for p in parts] == [False] * (len(parts) - 1) + [True]
        last = parts[-1]
        assert text(last) == "" and last.done_reason == whole.done_reason and last.eval_count == whole.eval_count
    with Stream(demo.url, GENERATE, {"model": "demo", "prompt": PROMPT}) as s:  # a stream, when nothing is said
        lines = [json.loads(line) for line in s.lines()]
        assert s.answer.getheader("Content-Type").startswith("application/x-ndjson")
    assert all(set(line) == {"model", "created_at", "response", "done"} for line in lines[:-1])
    assert STATS < set(lines[-1]) and lines[-1]["done"] is True


def test_a_form_type_is_json(demo):
    status, answer = post(demo.url, GENERATE, {"model": "demo", "prompt": PROMPT, "stream": False},
                          {"Content-Type": "application/x-www-form-urlencoded"})
    assert status == 200 and answer["response"]


def test_options(client):
    def text(**options):
        return generate(client, raw=True, prompt="Spell the word", options={"num_predict": 30, "seed": 2, **options}).response

    plain = text()
    assert text() == plain != text(seed=3)
    assert text(temperature=0) == text(temperature=0, seed=5) == text(top_k=1, seed=6) == text(top_p=1e-6) == text(min_p=1)
    assert text(repeat_penalty=5, temperature=0) != text(temperature=0)
    assert text(repeat_penalty=5, repeat_last_n=0, temperature=0) == text(temperature=0)
    assert text(tfs_z=1.0, typical_p=1.0, mirostat=0, mirostat_tau=5.0, mirostat_eta=0.1) == plain  # as they change nothing
    assert text(stop=[plain[3:5]]) == plain[:plain.index(plain[3:5])]
    for name, value in [("num_predict", "x"), ("temperature", -1), ("top_p", 2), ("mirostat", 1), ("typical_p", 0.5), ("tfs_z", 0.9)]:
        with pytest.raises(ollama.ResponseError, match=name) as e:
            text(**{name: value})
        assert e.value.status_code == 400


def test_logprobs(client, demo):
    got = post(demo.url, CHAT, {"model": "demo", "messages": QUESTION, "stream": False, "logprobs": True, "top_logprobs": 3,
                                "options": {"seed": 1}})[1]
    assert len(got["logprobs"]) == got["eval_count"] and all(len(t["top_logprobs"]) == 3 for t in got["logprobs"])
    with Stream(demo.url, CHAT, {"model": "demo", "messages": QUESTION, "logprobs": True, "top_logprobs": 3,
                                 "options": {"seed": 1}}) as s:
        assert sum((json.loads(line).get("logprobs", []) for line in s.lines()), []) == got["logprobs"]
    want = post(demo.url, "/v1/chat/completions", {"model": "demo", "messages": QUESTION, "logprobs": True, "seed": 1, "top_k": 40,
                                                   "temperature": 0.8, "top_p": 0.9})[1]["choices"][0]["logprobs"]["content"]
    assert [(t["token"], t["logprob"]) for t in got["logprobs"]] == [(t["token"], t["logprob"]) for t in want]
    status, answer = post(demo.url, CHAT, {"model": "demo", "messages": QUESTION, "top_logprobs": 3})
    assert status == 400 and "top_logprobs" in answer["error"]


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_format_is_kept(client, name):
    def one(seed):
        options = {"seed": seed, "temperature": (0.2, 0.8, 2)[seed % 3], "num_predict": 300}
        text = generate(client, format=SCHEMAS[name], options=options).response
        jsonschema.validate(json.loads(text), SCHEMAS[name], format_checker=jsonschema.FormatChecker())

    parallel(6, one, range(9))


@pytest.mark.smoke
def test_json(client):
    for seed in range(5):
        options = {"seed": seed, "temperature": 2, "num_predict": 40}
        assert isinstance(json.loads(generate(client, format="json", options=options).response), dict)
        parts = chat(client, format=SHOP, options={"seed": seed, "num_predict": 300}, stream=True)
        jsonschema.validate(json.loads("".join(p.message.content for p in parts)), SHOP)
    with pytest.raises(ollama.ResponseError, match="shortest answer"):
        generate(client, format=SHOP, options={"num_predict": 3})


def test_load_and_unload(client):
    assert (generate(client, prompt="").done_reason, chat(client, messages=[]).done_reason) == ("load", "load")
    for keep in (0, "0"):
        got = generate(client, prompt="", keep_alive=keep)
        assert got.done and got.done_reason == "unload" and got.response == ""
    for keep in ("5m", -1, 300):
        assert generate(client, keep_alive=keep).response
    (line,) = generate(client, prompt="", stream=True)
    assert line.done_reason == "load"


def test_refused(client, demo):
    for path, change, word in [(GENERATE, {"suffix": "x"}, "suffix"), (GENERATE, {"template": "x"}, "template"),
                               (GENERATE, {"images": ["aGk="]}, "images"), (GENERATE, {"context": [1, 2]}, "context"),
                               (GENERATE, {"format": "xml"}, "format"), (GENERATE, {"prompt": 3}, "prompt"),
                               (CHAT, {"tools": [{"type": "function"}]}, "tools"), (CHAT, {"messages": [{"role": "user"}]}, "content"),
                               (CHAT, {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "images")]:
        body = {"model": "demo", **({"prompt": "x"} if path == GENERATE else {"messages": QUESTION}), **change}
        status, answer = post(demo.url, path, body)
        assert status == 400 and list(answer) == ["error"] and word in answer["error"], answer
    for body in ("", "{", "[]"):
        assert post(demo.url, GENERATE, body)[0] == 400
    with pytest.raises(ollama.ResponseError) as e:
        generate(client, model="nothing")
    assert e.value.status_code == 404 and e.value.error == "model 'nothing' not found"
    with pytest.raises(ollama.ResponseError):
        list(generate(client, model="nothing", stream=True))
    with pytest.raises(ollama.ResponseError) as e:
        generate(client, prompt="What is that? " * 600)
    assert e.value.status_code in (400, 413)


def test_models(client, demo):
    (model,) = [m for m in client.list().models if m.model == "demo"]
    assert model.details.format == "safetensors" and model.modified_at
    shown = client.show("demo")
    assert shown.capabilities == ["completion"] and any(k.endswith(".context_length") and v == 1024 for k, v in shown.modelinfo.items())
    assert [m.model for m in client.ps().models] == ["demo"]
    assert re.match(r"\d+\.\d+\.\d+$", json.loads(get(demo.url, "/api/version")[1])["version"])
    with pytest.raises(ollama.ResponseError) as e:
        client.show("nothing")
    for body in ("{", "[]", {}, {"model": 3}):
        status, answer = post(demo.url, "/api/show", body)
        assert status == 400 and set(answer) == {"error"}, (body, answer)
    assert e.value.status_code == 404
    with Raw(demo.url) as raw:
        path = Training(raw, "demo").publish("mine")
    assert path in {m.model for m in client.list().models} and client.show(path).capabilities == ["completion"]
    assert chat(client, model=path).message.content == chat(client).message.content  # not trained yet


def test_parallel_clients(client, demo):
    want = [generate(client, options={"seed": i, "num_predict": 40}).response for i in range(24)]

    async def all_at_once():
        own = ollama.AsyncClient(host=demo.url, timeout=120)
        return await asyncio.gather(*(own.generate(model="demo", prompt=PROMPT, options={"seed": i, "num_predict": 40})
                                      for i in range(24)))

    assert [r.response for r in asyncio.run(all_at_once())] == want


def test_characters_are_never_split(server):
    odd = 0
    for seed in range(15):
        body = {"model": "tiny", "prompt": "abc", "raw": True,
                "options": {"seed": seed, "temperature": 3, "top_p": 1, "top_k": 0, "num_predict": 100}}
        whole = post(server.url, GENERATE, {**body, "stream": False})[1]["response"]
        with Stream(server.url, GENERATE, body) as s:
            assert "".join(json.loads(line)["response"] for line in s.lines()) == whole
        odd += any(ord(c) > 127 for c in whole)
    assert odd > 5


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnected_client_is_cancelled(demo, stream):
    schema = {"type": "array", "items": {"type": "string", "minLength": 900}, "minItems": 1}  # nothing shorter is an answer
    until_idle(demo.url)
    before, steps = gauge(demo.url, SAMPLED), gauge(demo.url, STEPS)
    with Stream(demo.url, GENERATE, {"model": "demo", "prompt": PROMPT, "format": schema, "stream": stream}):
        until(lambda: gauge(demo.url, STEPS) > steps, "tokens")
    until_idle(demo.url)
    assert gauge(demo.url, SAMPLED) == before


def test_slow_readers(demo):
    check_slow_readers(demo, GENERATE, {"model": "demo", "prompt": "Spell the word", "raw": True, "logprobs": True, "top_logprobs": 20,
                                        "options": {"seed": 1, "num_predict": 900, "ignore_eos": True}},
                       lambda line: json.loads(line)["response"])


def test_what_trinity_sends(demo):
    """The requests of its clients as they are, twenty at once: the async engine's, and the llama.cpp provider's."""
    def one(i):
        if i % 2:
            return post(demo.url, "/completion", {"prompt": RENDERED, "temperature": 0.2, "max_tokens": 2000})
        return post(demo.url, GENERATE, {"model": "demo", "prompt": "What is the capital of France?", "stream": False,
                                         "options": {"temperature": 0.2}, "system": "You answer."})

    answers = parallel(20, one, range(20))
    assert [status for status, _ in answers] == [200] * 20
    assert all((a["content"] if i % 2 else a["response"]) for i, (_, a) in enumerate(answers))
