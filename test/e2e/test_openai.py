"""The OpenAI face, through the unmodified `openai` package and over plain HTTP."""

import asyncio
import itertools
import json
import os
import random
import threading
import time

import pytest
from llm_common import (QUESTION, RENDERED, RUNNING, SAMPLED, SCHEMAS, SHOP, STEPS, Stream, Training, gauge, parallel, post, until,
                        until_idle)
from tinker_raw import Raw, datum, floats, parse

openai = pytest.importorskip("openai")
jsonschema = pytest.importorskip("jsonschema")

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LONG = {"ignore_eos": True}  # the demo model's answers are short


@pytest.fixture(scope="module")
def client(demo):
    with openai.OpenAI(base_url=demo.url + "/v1", api_key="any", max_retries=0, timeout=120) as c:
        yield c


@pytest.fixture(scope="module")
def raw_demo(demo):
    with Raw(demo.url) as r:
        yield r


@pytest.fixture(scope="module")
def training(raw_demo):
    return Training(raw_demo, "demo")


def tokenize(url, text):
    return post(url, "/tokenize", {"content": text})[1]["tokens"]


def chat(client, **more):
    return client.chat.completions.create(**{"model": "demo", "messages": QUESTION, "max_tokens": 40, **more})


def long_text(client, **more):
    return client.completions.create(**{"model": "demo", "prompt": "Spell the word", "max_tokens": 80, "seed": 3,
                                        "extra_body": LONG, **more})


# ---------------------------------------------------------------------------------------------- answers
@pytest.mark.smoke
def test_chat(client):
    got = chat(client, temperature=0)
    choice = got.choices[0]
    assert got.object == "chat.completion" and got.model == "demo" and got.id.startswith("chatcmpl-") and got.created > 1.7e9
    assert choice.message.role == "assistant" and choice.message.content and choice.finish_reason == "stop"
    assert got.usage.prompt_tokens + got.usage.completion_tokens == got.usage.total_tokens
    assert chat(client, temperature=0, max_tokens=1).choices[0].finish_reason == "length"
    assert chat(client, temperature=0, max_tokens=100000).choices[0].message.content == choice.message.content
    parts = [{"role": "developer", "content": [{"type": "text", "text": "You "}, {"type": "text", "text": "answer."}]}, QUESTION[1]]
    assert chat(client, messages=parts, temperature=0).choices[0].message.content == choice.message.content


def test_the_prompt_is_the_rendered_template(client, demo):
    ids = tokenize(demo.url, RENDERED)
    assert chat(client).usage.prompt_tokens == len(ids)
    plain = client.completions.create(model="demo", prompt=ids, max_tokens=40, seed=9)
    assert plain.choices[0].text == chat(client, seed=9).choices[0].message.content


@pytest.mark.smoke
@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_is_the_whole(client, n):
    options = dict(n=n, seed=5, temperature=1.5, max_tokens=60, extra_body=LONG)
    whole = chat(client, **options)
    text, finish, roles, ids, usage = [""] * n, [None] * n, [0] * n, set(), None
    for chunk in chat(client, stream=True, stream_options={"include_usage": True}, **options):
        assert chunk.object == "chat.completion.chunk" and usage is None
        ids.add(chunk.id)
        usage = chunk.usage
        for c in chunk.choices:
            assert finish[c.index] is None
            roles[c.index] += c.delta.role == "assistant"
            text[c.index] += c.delta.content or ""
            finish[c.index] = c.finish_reason
    assert text == [c.message.content for c in whole.choices] and len(set(text)) == n
    assert finish == ["length"] * n and roles == [1] * n and len(ids) == 1
    assert usage.completion_tokens == whole.usage.completion_tokens == 60 * n


def test_events_as_they_are_sent(demo):
    with Stream(demo.url, CHAT, {"model": "demo", "messages": QUESTION, "stream": True, "max_tokens": 5}) as s:
        events = list(s.events())
        assert s.answer.getheader("Content-Type").startswith("text/event-stream")
    assert events[-1] == "[DONE]"
    first = json.loads(events[0])["choices"][0]
    assert first["delta"] == {"role": "assistant", "content": ""} and first["finish_reason"] is None
    last = json.loads(events[-2])["choices"][0]
    assert last["delta"] == {} and last["finish_reason"] in ("stop", "length")


def test_prompts_of_a_completion(client, demo):
    words = ["Spell the word", "What is 3 + 4?"]
    ids = [tokenize(demo.url, w) for w in words]

    def texts(prompt, n=1):
        got = client.completions.create(model="demo", prompt=prompt, n=n, seed=4, max_tokens=8, extra_body=LONG)
        assert [c.index for c in got.choices] == list(range(len(got.choices)))
        return [c.text for c in got.choices]

    each = [texts(w, 2) for w in words]
    assert texts(words, 2) == each[0] + each[1]
    assert texts(ids, 2) == each[0] + each[1] and texts(ids[1], 2) == each[1]
    streamed = [""] * 4
    for chunk in client.completions.create(model="demo", prompt=words, n=2, seed=4, max_tokens=8, stream=True, extra_body=LONG):
        for c in chunk.choices:
            streamed[c.index] += c.text
    assert streamed == each[0] + each[1]


def test_stops(client, demo):
    specials = {str(tokenize(demo.url, t)[0]): -100 for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}

    def text(**more):
        return long_text(client, logit_bias=specials, **more)

    whole = text().choices[0].text
    rng = random.Random(1)
    for _ in range(25):
        at = rng.randrange(len(whole) - 6)
        stop = whole[at:at + rng.randint(1, 6)]
        want = whole[:whole.index(stop)]
        for extra in ([], ["never", "of these"]):
            got = text(stop=[stop, *extra]).choices[0]
            assert (got.text, got.finish_reason) == (want, "stop")
        parts = [c.choices[0] for c in text(stop=stop, stream=True)]
        assert "".join(p.text for p in parts) == want and parts[-1].finish_reason == "stop"
    assert text(stop=whole[-5:] + "~").choices[0].text == whole  # held back, then given


def test_special_tokens_do_not_show_but_stop(client):
    whole = long_text(client, logprobs=0).choices[0]
    assert "<|im_end|>" in whole.logprobs.tokens and "<|" not in whole.text
    turn = "".join(whole.logprobs.tokens[:whole.logprobs.tokens.index("<|im_end|>")])
    got = long_text(client, stop="im_end").choices[0]
    assert (got.text, got.finish_reason) == (turn, "stop")
    next_turn = long_text(client, stop="<|im_start|>user").choices[0]
    assert whole.text.startswith(next_turn.text) and next_turn.finish_reason == "stop"


def test_seeds_repeat_under_load(client):
    alone = {seed: long_text(client, seed=seed).choices[0].text for seed in range(4)}
    assert len(set(alone.values())) == 4
    got = parallel(16, lambda i: long_text(client, seed=i % 8, max_tokens=80).choices[0].text, range(48))
    assert all(got[i] == alone[i % 8] for i in range(48) if i % 8 in alone)
    cold = {chat(client, temperature=0, seed=i).choices[0].message.content for i in range(4)}
    assert len(cold) == 1
    assert len({long_text(client, seed=None).choices[0].text for _ in range(3)}) == 3


# ---------------------------------------------------------------------------------------------- logprobs
def sampler(raw, seq):
    return raw.create_sampling_session(raw.create_session(), seq, base_model="demo")


def test_logprobs_are_the_tinker_apis(client, raw_demo, demo):
    ids = tokenize(demo.url, RENDERED)
    sequence = raw_demo.sample(sampler(raw_demo, 1), 1, ids, seed=11, max_tokens=30, stop=[])["sequences"][0]
    got = chat(client, seed=11, max_tokens=30, logprobs=True, top_logprobs=4, extra_body=LONG).choices[0].logprobs.content
    assert [t.logprob for t in got] == pytest.approx(sequence["logprobs"], abs=0, rel=1e-7)
    text = b"".join(bytes(t.bytes) for t in got).decode("utf-8", "replace")
    assert text == post(demo.url, "/detokenize", {"tokens": sequence["tokens"]})[1]["content"]
    for t in got:
        tops = [x.logprob for x in t.top_logprobs]
        assert len(tops) == 4 and tops == sorted(tops, reverse=True) and t.logprob <= tops[0]
    greedy = chat(client, temperature=0, logprobs=True, top_logprobs=1).choices[0].logprobs.content
    assert all(t.token == t.top_logprobs[0].token and t.logprob == t.top_logprobs[0].logprob for t in greedy)
    streamed = [t for chunk in chat(client, seed=11, max_tokens=30, logprobs=True, top_logprobs=4, stream=True, extra_body=LONG)
                for c in chunk.choices if c.logprobs for t in c.logprobs.content]
    assert streamed == got


def test_logprobs_of_a_completion(client, raw_demo, demo):
    ids = tokenize(demo.url, "Spell the word")
    sequence = raw_demo.sample(sampler(raw_demo, 2), 1, ids, seed=3, max_tokens=80, stop=[])["sequences"][0]
    choice = long_text(client, logprobs=3).choices[0]
    got = choice.logprobs
    assert got.token_logprobs == pytest.approx(sequence["logprobs"], abs=0, rel=1e-7)
    assert len(got.tokens) == len(got.text_offset) == len(got.top_logprobs) == 80
    assert all(1 <= len(top) <= 3 for top in got.top_logprobs)


def test_offsets_are_of_characters(client):
    prompt = "\u00e9t\u00e9 \u2013 \U0001f642 and text"
    got = client.completions.create(model="demo", prompt=prompt, max_tokens=0, echo=True, logprobs=0).choices[0].logprobs
    whole = [(t, at) for t, at in zip(got.tokens, got.text_offset) if "\ufffd" not in t]
    assert whole and all(prompt[at:at + len(t)] == t for t, at in whole)
    stream = list(long_text(client, logprobs=0, stream=True))
    streamed = [at for chunk in stream for c in chunk.choices if c.logprobs for at in c.logprobs.text_offset]
    assert streamed == long_text(client, logprobs=0).choices[0].logprobs.text_offset


def test_echo_scores_a_prompt(client, raw_demo, demo):
    prompt = "What is the capital of France?"
    ids = tokenize(demo.url, prompt)
    ticket = raw_demo.ok("asample", {
        "sampling_session_id": sampler(raw_demo, 3), "seq_id": 1, "num_samples": 1, "type": "sample",
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": ids}]}, "sampling_params": {"max_tokens": 1, "seed": 1},
        "prompt_logprobs": True, "topk_prompt_logprobs": 0})
    want = floats(parse(raw_demo.retrieve(ticket["request_id"]))[2][0])
    got = client.completions.create(model="demo", prompt=prompt, max_tokens=0, echo=True, logprobs=2)
    choice = got.choices[0]
    assert choice.text == prompt and "".join(choice.logprobs.tokens) == prompt
    assert got.usage.completion_tokens == 0 and got.usage.prompt_tokens == len(ids)
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(want[1:], abs=0, rel=1e-7)
    assert choice.logprobs.text_offset == [prompt.index(t, at) for t, at in zip(choice.logprobs.tokens, choice.logprobs.text_offset)]
    more = client.completions.create(model="demo", prompt=prompt, max_tokens=4, echo=True, logprobs=0, temperature=0, extra_body=LONG)
    assert more.choices[0].text.startswith(prompt) and len(more.choices[0].logprobs.tokens) == len(ids) + 4


def test_large_answers_say_what_small_ones_do(client, demo):
    """Written in the pool: the same text and numbers, and a client that leaves meanwhile disturbs nobody."""
    prompt = "What is the capital of France? " * 20
    small = client.completions.create(model="demo", prompt=prompt, max_tokens=0, echo=True, logprobs=2).choices[0]
    n, asked = len(small.logprobs.tokens), dict(model="demo", prompt=prompt, n=16, seed=3, max_tokens=20, extra_body=LONG)
    streamed = [""] * 16
    for chunk in client.completions.create(stream=True, **asked):
        for c in chunk.choices:
            streamed[c.index] += c.text
    large = client.completions.create(echo=True, logprobs=2, **asked)
    assert [c.text for c in large.choices] == [prompt + s for s in streamed]
    for c in large.choices:
        assert c.logprobs.tokens[:n] == small.logprobs.tokens and len(c.logprobs.tokens) == n + 20
        assert c.logprobs.token_logprobs[:n] == small.logprobs.token_logprobs
        assert c.logprobs.text_offset[:n] == small.logprobs.text_offset
    for i in range(10):
        with Stream(demo.url, TEXT, {"model": "demo", "prompt": prompt, "n": 64, "echo": True, "logprobs": 2, "max_tokens": 1}):
            time.sleep(i / 200)
    assert client.completions.create(model="demo", prompt=prompt, max_tokens=0, echo=True).choices[0].text == prompt
    until_idle(demo.url)


def test_penalties_and_bias(client, demo):
    def text(**more):
        return long_text(client, temperature=0, **more).choices[0]

    plain = text(logprobs=0)
    for change in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"extra_body": {**LONG, "repetition_penalty": 5}}):
        assert text(**change).text != plain.text, change
    first = plain.logprobs.tokens[0]
    token = tokenize(demo.url, "Spell the word" + first)[len(tokenize(demo.url, "Spell the word"))]
    assert text(logit_bias={str(token): -100}, logprobs=0).logprobs.tokens[0] != first
    letter = tokenize(demo.url, "x")[0]
    assert text(logit_bias={str(letter): 100}, max_tokens=5).text == "xxxxx"
    assert text(extra_body={**LONG, "top_k": 1}, seed=1).text == plain.text


# ---------------------------------------------------------------------------------------------- grammars
def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_kept(client, name):
    schema = SCHEMAS[name]
    jsonschema.Draft202012Validator.check_schema(schema)

    def one(seed):
        options = dict(temperature=(0, 0.7, 1, 1.5, 2)[seed % 5], seed=seed, max_tokens=(120, 200, 400)[seed % 3])
        got = chat(client, response_format=schema_format(schema), **options).choices[0]
        jsonschema.validate(json.loads(got.message.content), schema, format_checker=jsonschema.FormatChecker())
        assert got.finish_reason == "stop"
        return got.message.content

    texts = parallel(6, one, range(15))
    assert texts[0] == one(0)
    if name not in ("const", "enum"):
        assert len(set(texts)) > 1


@pytest.mark.smoke
def test_json_object(client):
    def one(seed):
        got = chat(client, response_format={"type": "json_object"}, seed=seed, temperature=2, max_tokens=60)
        assert isinstance(json.loads(got.choices[0].message.content), dict)
        assert got.choices[0].finish_reason == "stop" and got.usage.completion_tokens <= 60

    parallel(6, one, range(30))


@pytest.mark.smoke
def test_a_schema_in_a_stream(client):
    options = dict(response_format=schema_format(SHOP), seed=2, max_tokens=300)
    text = "".join(c.choices[0].delta.content or "" for c in chat(client, stream=True, **options))
    jsonschema.validate(json.loads(text), SHOP)
    assert text == chat(client, **options).choices[0].message.content


def test_too_few_tokens_for_a_schema(client):
    with pytest.raises(openai.BadRequestError, match="shortest answer that fits the schema") as e:
        chat(client, response_format=schema_format(SHOP), max_tokens=5)
    least = int(str(e.value).split("may take ")[1].split()[0])
    for seed in range(5):
        got = chat(client, response_format=schema_format(SHOP), max_tokens=least, seed=seed, temperature=2)
        jsonschema.validate(json.loads(got.choices[0].message.content), SHOP)
    with pytest.raises(openai.BadRequestError):
        chat(client, response_format=schema_format(SHOP), max_tokens=least - 1)


# ---------------------------------------------------------------------------------------------- refusals
REFUSED = [
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    (CHAT, {"functions": [{"name": "f"}]}, "functions"),
    (CHAT, {"audio": {"voice": "x"}}, "audio"),
    (CHAT, {"modalities": ["audio"]}, "modalities"),
    (CHAT, {"prediction": {"type": "content"}}, "prediction"),
    (CHAT, {"web_search_options": {"user_location": {}}}, "web_search_options"),
    (CHAT, {"n": 0}, "n"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_completion_tokens": -1}, "max_completion_tokens"),
    (CHAT, {"temperature": 2.5}, "temperature"),
    (CHAT, {"temperature": "hot"}, "temperature"),
    (CHAT, {"top_p": 0}, "top_p"),
    (CHAT, {"top_logprobs": 3}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"presence_penalty": 3}, "presence_penalty"),
    (CHAT, {"logit_bias": {"x": 1}}, "logit_bias.x"),
    (CHAT, {"logit_bias": {"5": 101}}, "logit_bias.5"),
    (CHAT, {"stop": list("abcdefghijklmnopq")}, "stop"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0]"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0]"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "images": ["x"]}]}, "messages[0].images"),
    (TEXT, {"suffix": "x"}, "suffix"),
    (TEXT, {"best_of": 3}, "best_of"),
    (TEXT, {"max_tokens": 0}, "max_tokens"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": None}, "prompt"),
    (TEXT, {"prompt": [["x"]]}, "prompt[0][0]"),
    (TEXT, {"echo": True, "stream": True}, "echo"),
    (TEXT, {"n": 100000}, "n"),
]


@pytest.mark.parametrize("path, change, field", REFUSED, ids=[f"{p.rsplit('/')[-2]}-{json.dumps(c)[:40]}" for p, c, _ in REFUSED])
def test_refused_by_name(demo, path, change, field):
    body = {"model": "demo", **({"messages": QUESTION} if path == CHAT else {"prompt": "x"}), **change}
    status, answer = post(demo.url, path, body)
    assert status == 400, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == field, error


def test_bad_schemas(client):
    for schema, word in [({"type": "strin"}, "type"), ({"not": {}}, "not"), ({"pattern": "("}, "pattern"),
                         ({"$ref": "#/nowhere"}, "ref"), ({"enum": []}, "enum")]:
        with pytest.raises(openai.BadRequestError, match=word):
            chat(client, response_format=schema_format(schema))


def test_error_classes(client, demo):
    with pytest.raises(openai.NotFoundError) as e:
        chat(client, model="nothing")
    assert e.value.code == "model_not_found" and "nothing" in str(e.value)
    with pytest.raises(openai.NotFoundError) as e:
        chat(client, model="tinker://none:train:0/sampler_weights/x")
    assert e.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")
    with pytest.raises(openai.BadRequestError) as e:
        client.completions.create(model="demo", prompt="What is that? " * 600)
    assert e.value.code == "context_length_exceeded" and "1024" in str(e.value)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="demo", prompt=[1, 2, 1024])
    for body in ("", "[]", "{", '{"model": 3}', '{"messages": []}'):
        status, answer = post(demo.url, CHAT, body)
        assert status == 400 and answer["error"]["message"]
    assert post(demo.url, "/v1/embeddings", {"model": "demo"})[0] == 404


def test_keys(start, tmp_path):
    from daemon import ROOT

    keyed = start({"demo": ROOT + "/examples/demo-model"}, args=["--api-key", "tml-secret"])
    with openai.OpenAI(base_url=keyed.url + "/v1", api_key="wrong", max_retries=0) as c:
        with pytest.raises(openai.AuthenticationError):
            chat(c)
        with pytest.raises(openai.AuthenticationError):
            c.models.list()
    with openai.OpenAI(base_url=keyed.url + "/v1", api_key="tml-secret", max_retries=0) as c:
        assert chat(c).choices and c.models.list().data


# ---------------------------------------------------------------------------------------------- models
def test_models(client):
    (model,) = [m for m in client.models.list() if m.id == "demo"]
    assert model.object == "model" and model.created > 1.7e9 and client.models.retrieve("demo").id == "demo"
    assert client.models.retrieve("demo:latest")


def test_a_checkpoint_is_chatted_with_while_it_trains(client, training, demo):
    answer = tokenize(demo.url, RENDERED + "nowhere<|im_end|>")
    n = len(tokenize(demo.url, RENDERED))
    lesson = datum(answer[:-1], target_tokens=answer[1:], weights=[float(i + 1 >= n) for i in range(len(answer) - 1)])
    training.step(lesson, 1e-4)
    before = training.publish("before")
    path = training.publish("to-talk-to")
    assert {before, path} <= {m.id for m in client.models.list()} and client.models.retrieve(path).id == path
    untaught = chat(client, model=path, temperature=0, logprobs=True)
    said, stop = [], threading.Event()

    def talk():
        with openai.OpenAI(base_url=demo.url + "/v1", api_key="any", max_retries=0) as own:
            while not stop.is_set():
                said.append(chat(own, model=path, temperature=0, logprobs=True).choices[0])

    talker = threading.Thread(target=talk)
    talker.start()
    try:
        for _ in range(40):
            training.step(lesson, 5e-3)
        until(lambda: len(said) > 3, "answers during training")
    finally:
        stop.set()
        talker.join()
    assert all(s == untaught.choices[0] for s in said)  # a checkpoint does not change
    taught = training.publish("taught")
    assert chat(client, model=taught, temperature=0).choices[0].message.content == "nowhere"


def test_parallel_clients(demo, client):
    want = [chat(client, seed=i).choices[0].message.content for i in range(32)]

    async def all_at_once():
        async with openai.AsyncOpenAI(base_url=demo.url + "/v1", api_key="any", max_retries=0) as c:
            async def one(i):
                if i % 2:
                    return (await c.chat.completions.create(model="demo", messages=QUESTION, max_tokens=40, seed=i)
                            ).choices[0].message.content
                stream = await c.chat.completions.create(model="demo", messages=QUESTION, max_tokens=40, seed=i, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return await asyncio.gather(*(one(i) for i in range(32)))

    assert asyncio.run(all_at_once()) == want


# ---------------------------------------------------------------------------------------------- streams
@pytest.mark.smoke
def test_characters_are_never_split(server):
    """A random model at temperature 2 gives random bytes. Each event is UTF-8, and all are the whole text."""
    odd = 0
    for seed in range(20):
        body = {"model": "tiny", "prompt": [1, 2, 3], "seed": seed, "temperature": 2, "max_tokens": 100, "ignore_eos": True}
        whole = post(server.url, TEXT, body)[1]["choices"][0]["text"]
        with Stream(server.url, TEXT, {**body, "stream": True}) as s:
            parts = [json.loads(e)["choices"][0]["text"] for e in s.events() if e != "[DONE]"]
        assert "".join(parts) == whole
        odd += "\ufffd" in whole or any(ord(c) > 127 for c in whole)
    assert odd > 10  # else this shows nothing


MANY = {"model": "demo", "prompt": "Spell the word", "n": 64, "max_tokens": 1000, "ignore_eos": True}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["before the first token", "within"])
def test_a_disconnected_client_is_cancelled(demo, stream, when):
    until_idle(demo.url)
    before, steps = gauge(demo.url, SAMPLED), gauge(demo.url, STEPS)
    with Stream(demo.url, TEXT, {**MANY, "stream": stream}) as s:
        if when == "within":
            if stream:
                next(s.events())
            else:
                until(lambda: gauge(demo.url, STEPS) > steps + 10, "tokens")
    until_idle(demo.url)
    assert gauge(demo.url, SAMPLED) == before and gauge(demo.url, STEPS) - steps < MANY["max_tokens"]


def test_a_slow_reader(demo, client):
    """It holds nobody up, its unread text takes bounded memory, and in the end it has all of it."""
    body = {**MANY, "seed": 1, "stream": True}
    with Stream(demo.url, TEXT, body) as s:
        whole = texts_of(s.events())
    memory = demo.memory()
    with Stream(demo.url, TEXT, body) as s:
        events = s.events()
        first = next(events)
        for _ in range(10):
            assert chat(client).choices
        until(lambda: gauge(demo.url, RUNNING) == 0, "the end of its samples")
        assert demo.memory() - memory < 24 << 20
        assert texts_of(itertools.chain([first], events)) == whole


def texts_of(events):
    texts = [""] * MANY["n"]
    for e in events:
        if e != "[DONE]":
            for c in json.loads(e)["choices"]:
                texts[c["index"]] += c["text"]
    return texts


def test_a_folder_without_tokenizer_json(demo, start, tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    for name in os.listdir(demo.models["demo"]):
        if not name.startswith("tokenizer"):
            os.symlink(os.path.join(demo.models["demo"], name), folder / name)
    (folder / "tokenizer.model").write_bytes(b"")
    old = start({"old": str(folder)})
    assert "tokenizer.model is not read; make a tokenizer.json of it" in old.log()
    for path, body in ((CHAT, {"messages": QUESTION}), (TEXT, {"prompt": [1, 2, 3]}), ("/api/generate", {"prompt": "x"}),
                       ("/completion", {"prompt": "x"}), ("/tokenize", {"content": "x"})):
        status, answer = post(old.url, path, {"model": "old", **body})
        assert status == 400 and "tokenizer.model" in json.dumps(answer), (path, answer)


def test_a_schema_that_is_too_complex_is_known_the_second_time(demo):
    body = {"model": "demo", "messages": QUESTION, "max_tokens": 50, "response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "schema": {"type": "string", "pattern": "^((a?){1,10000}){1,10000}$"}}}}
    first, again = (post(demo.url, CHAT, body) for _ in range(2))
    assert first[0] >= 400 and "grammar" in first[1]["error"]["message"]
    assert again[0] == 400 and "too many ways" in again[1]["error"]["message"]
