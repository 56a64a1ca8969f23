"""The llama.cpp face, over plain HTTP as its clients speak."""

import json

import pytest
from llm_common import RENDERED, SAMPLED, SCHEMAS, SHOP, STEPS, Stream, check_slow_readers, gauge, get, parallel, post, until, until_idle

jsonschema = pytest.importorskip("jsonschema")
PROMPT = "Spell the word"
LONG = {"prompt": PROMPT, "n_predict": 40, "seed": 2, "ignore_eos": True}


def complete(demo, path="/completion", **more):
    status, answer = post(demo.url, path, {**LONG, **more})
    assert status == 200, answer
    return answer


@pytest.mark.smoke
def test_completion(demo):
    got = complete(demo)
    assert got["stop"] is True and got["stop_type"] == "limit" and got["stopping_word"] == "" and got["truncated"] is False
    assert got["tokens_predicted"] == 40 and got["prompt"] == PROMPT and got["model"] == "demo" and got["index"] == 0
    assert got["timings"]["predicted_n"] == 40 and got["timings"]["prompt_n"] == got["tokens_evaluated"] > 0
    assert got["generation_settings"]["n_predict"] == 40 and got["tokens"] == []
    alias = post(demo.url, "/completions", {"prompt": PROMPT, "max_tokens": 40, "seed": 2, "ignore_eos": True})[1]
    assert alias["content"] == got["content"]
    ids = post(demo.url, "/tokenize", {"content": PROMPT})[1]["tokens"]
    assert complete(demo, prompt=ids)["content"] == got["content"]
    assert [a["content"] for a in complete(demo, prompt=[PROMPT, ids])] == [got["content"]] * 2
    ended = post(demo.url, "/completion", {"prompt": RENDERED, "temperature": 0})[1]
    assert ended["stop_type"] == "eos" and ended["content"]
    returned = complete(demo, return_tokens=True)
    assert len(returned["tokens"]) == 40


@pytest.mark.smoke
def test_a_stream_has_no_done(demo):
    whole = complete(demo, return_tokens=True)
    with Stream(demo.url, "/completion", {**LONG, "stream": True}) as s:
        events = [json.loads(e) for e in s.events()]
    assert "".join(e["content"] for e in events) == whole["content"]
    assert [e["stop"] for e in events] == [False] * (len(events) - 1) + [True]
    assert sum((e["tokens"] for e in events), []) == whole["tokens"]
    assert events[-1]["tokens_predicted"] == 40 and events[-1]["stop_type"] == "limit"


def test_options(demo):
    plain = complete(demo)["content"]
    assert complete(demo)["content"] == plain != complete(demo, seed=3)["content"]
    assert len({complete(demo, seed=-1)["content"] for _ in range(3)}) == 3
    assert complete(demo, temperature=0)["content"] == complete(demo, top_k=1, seed=9)["content"]
    stopped = complete(demo, stop=[plain[3:5]])
    assert (stopped["content"], stopped["stop_type"], stopped["stopping_word"]) == (plain[:plain.index(plain[3:5])], "word", plain[3:5])
    probs = complete(demo, n_probs=3)["completion_probabilities"]
    assert len(probs) == 40 and all(len(p["top_logprobs"]) == 3 for p in probs)
    scored = post(demo.url, "/v1/completions", {"model": "demo", "prompt": PROMPT, "max_tokens": 40, "seed": 2, "ignore_eos": True,
                                                "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "logprobs": 0})
    assert [p["logprob"] for p in probs] == scored[1]["choices"][0]["logprobs"]["token_logprobs"]


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_kept(demo, name):
    def one(seed):
        options = {"seed": seed, "temperature": (0.2, 1, 2)[seed % 3], "n_predict": 300, "ignore_eos": False}
        got = complete(demo, json_schema=SCHEMAS[name], **options)
        jsonschema.validate(json.loads(got["content"]), SCHEMAS[name], format_checker=jsonschema.FormatChecker())

    parallel(6, one, range(9))


def test_tokens_and_back(demo):
    for text in ("", "Spell the word moon.", "naïve 🙂 \r\n\t\0 end", "<|im_start|>user", "日本" * 50):
        tokens = post(demo.url, "/tokenize", {"content": text})[1]["tokens"]
        assert post(demo.url, "/detokenize", {"tokens": tokens})[1]["content"] == text
    text = "<|im_start|>naïve 🙂"
    ids = post(demo.url, "/tokenize", {"content": text})[1]["tokens"]
    pieces = post(demo.url, "/tokenize", {"content": text, "with_pieces": True})[1]["tokens"]
    assert [p["id"] for p in pieces] == ids and pieces[0]["piece"] == "<|im_start|>"
    assert any(isinstance(p["piece"], list) for p in pieces)  # a part of a character
    assert b"".join(p.encode() if isinstance(p, str) else bytes(p) for p in (p["piece"] for p in pieces)).decode() == text
    plain = post(demo.url, "/tokenize", {"content": text, "parse_special": False})[1]["tokens"]
    assert ids[0] not in plain and post(demo.url, "/detokenize", {"tokens": plain})[1]["content"] == text
    many = "What is 3 + 4? " * 100000
    tokens = post(demo.url, "/tokenize", {"model": "demo", "content": many})[1]["tokens"]
    assert post(demo.url, "/detokenize", {"tokens": tokens})[1]["content"] == many
    for path, body in (("/tokenize", {}), ("/tokenize", {"content": 3}), ("/tokenize", {"content": "x", "with_pieces": 1}),
                       ("/detokenize", {"tokens": [5000]}), ("/detokenize", {"tokens": "x"}),
                       ("/detokenize", {}), ("/tokenize", "{"), ("/tokenize", "[]")):
        status, answer = post(demo.url, path, body)
        assert status == 400 and answer["error"]["code"] == 400
    assert post(demo.url, "/tokenize", {"model": "none", "content": "x"})[0] == 404


def test_health_and_props(demo):
    assert [json.loads(get(demo.url, p)[1]) for p in ("/health", "/v1/health")] == [{"status": "ok"}] * 2
    props = json.loads(get(demo.url, "/props")[1])
    assert props["default_generation_settings"]["n_ctx"] == 1024 and props["model_path"] == "demo"


def test_refused(demo):
    for change, word in [({"grammar": "root ::= x"}, "grammar"), ({"mirostat": 2}, "mirostat"), ({"n_predict": 0}, "n_predict"),
                         ({"logit_bias": [[1, 2]]}, "logit_bias"), ({"samplers": ["top_k"]}, "samplers"), ({"prompt": []}, "prompt"),
                         ({"prompt": None}, "prompt"), ({"prompt": ["a", "b"], "stream": True}, "prompt"),
                         ({"typical_p": 0.5}, "typical_p"), ({"lora": [{"id": 1}]}, "lora"), ({"n_probs": 101}, "n_probs"),
                         ({"image_data": [{"id": 1}]}, "image_data"), ({"json_schema": SHOP, "n_predict": 2}, "shortest answer")]:
        status, answer = post(demo.url, "/completion", {**LONG, **change})
        error = answer["error"]
        assert status == 400 and set(error) == {"code", "message", "type"} and error["code"] == 400, answer
        assert word in error["message"] and error["type"] == "invalid_request_error"
    status, answer = post(demo.url, "/completion", {**LONG, "model": "nothing"})
    assert status == 404 and answer["error"]["type"] == "not_found_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnected_client_is_cancelled(demo, stream):
    until_idle(demo.url)
    before, steps = gauge(demo.url, SAMPLED), gauge(demo.url, STEPS)
    with Stream(demo.url, "/completion", {**LONG, "n_predict": 1000, "prompt": [PROMPT] * 64 if not stream else PROMPT,
                                          "stream": stream}):
        until(lambda: gauge(demo.url, STEPS) > steps, "tokens")
    until_idle(demo.url)
    assert gauge(demo.url, SAMPLED) == before


def test_slow_readers(demo):
    check_slow_readers(demo, "/completion", {**LONG, "n_predict": 900, "n_probs": 20, "stream": True},
                       lambda line: json.loads(line[len("data: "):])["content"])
