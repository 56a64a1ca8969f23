"""The server is killed and started again under clients that retry. None hangs, and all are served in the end."""

import http.client
import threading
import time

import pytest
from daemon import ROOT
from llm_common import QUESTION, Stream, until

openai = pytest.importorskip("openai")
LONG = {"model": "demo", "prompt": "Spell the word", "n": 64, "max_tokens": 1000, "ignore_eos": True}


def rest_of(events):
    got = []
    try:
        for e in events:
            got.append(e)
    except (OSError, http.client.HTTPException):
        pass
    return got


class Breaker:
    """Opens after some failures in a row; then one trial at a time, with a growing pause before each."""

    def __init__(self, limit=3):
        self.limit, self.failures, self.opened, self.pause = limit, 0, 0, 0.05

    def call(self, fn):
        """The result of fn, or the exception that it raised."""
        if self.failures >= self.limit:
            time.sleep(self.pause)
            self.pause = min(2 * self.pause, 1)
        try:
            result = fn()
        except openai.APIError as e:
            self.failures += 1
            self.opened += self.failures == self.limit
            return e
        self.failures, self.pause = 0, 0.05
        return result


class Talker(threading.Thread):
    """Asks again and again; keeps what it was told."""

    def __init__(self, url):
        super().__init__()
        self.url, self.breaker, self.answers, self.errors, self.over = url, Breaker(), [], [], False

    def run(self):
        with openai.OpenAI(base_url=self.url + "/v1", api_key="any", max_retries=1, timeout=30) as client:
            while not self.over:
                got = self.breaker.call(lambda: client.chat.completions.create(
                    model="demo", messages=QUESTION, max_tokens=40, temperature=0))
                if isinstance(got, Exception):
                    self.errors.append(got)
                else:
                    self.answers.append(got.choices[0].message.content)


def test_killed_and_started_again(start):
    server = start({"demo": ROOT + "/examples/demo-model"})
    address = server.url.removeprefix("http://")
    talkers = [Talker(server.url) for _ in range(4)]
    for t in talkers:
        t.start()
    try:
        for _ in range(2):
            n, opened = [len(t.answers) for t in talkers], [t.breaker.opened for t in talkers]
            until(lambda: all(len(t.answers) > k for t, k in zip(talkers, n)), "answers from the server")
            with Stream(server.url, "/v1/completions", {**LONG, "stream": True}) as s:
                events = s.events()
                next(events)
                server.kill()
                assert "[DONE]" not in rest_of(events)  # it breaks off, and does not wait
            until(lambda: all(t.breaker.opened > k for t, k in zip(talkers, opened)), "open breakers")
            server.args = ["--listen", address]
            server.start()
        n = [len(t.answers) for t in talkers]
        until(lambda: all(len(t.answers) > k + 3 for t, k in zip(talkers, n)), "answers after the last start")
    finally:
        for t in talkers:
            t.over = True
        for t in talkers:
            t.join(60)
    assert not any(t.is_alive() for t in talkers)
    assert len({a for t in talkers for a in t.answers}) == 1
    assert all(isinstance(e, (openai.APIConnectionError, openai.InternalServerError)) for t in talkers for e in t.errors)
