"""deploy/: Debian's nginx with the configuration there, in front of the server and of one that the test holds still; the unit.

Only names, paths and ports of deploy/nginx.conf are replaced. Every client comes through TLS with a certificate made here.
"""

import asyncio
import http.server
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.request

import pytest
import tinker
from common import adam, prompt, sft_datum, tokens
from daemon import ROOT, Daemon, end, find_daemon
from tinker_raw import Raw
from tinker import types

NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
KEY, BODY_LIMIT, EVENTS = "tml-proxied", 256 << 20, 5

needs_nginx = pytest.mark.skipif(not NGINX or not shutil.which("openssl"), reason="no nginx or no openssl here")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def substitute(text, *pairs):
    for old, new in pairs:
        assert old in text, f"deploy/nginx.conf has no {old!r}"
        text = text.replace(old, new)
    return text


def make_certificates(folder):
    """ca.pem signs itself and cert.pem: a certificate that is both is refused by the SDK's TLS."""
    def new(name, subject, *args):
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", subject, "-keyout",
                        f"{name}-key.pem", "-out", f"{name}.pem", *args], check=True, capture_output=True, cwd=folder)

    new("ca", "/CN=test", "-addext", "keyUsage=critical,keyCertSign")
    new("cert", "/CN=localhost", "-addext", "basicConstraints=critical,CA:FALSE", "-addext", "subjectAltName=DNS:localhost",
        "-CA", "ca.pem", "-CAkey", "ca-key.pem")


class Nginx:
    """nginx in front of one upstream ("host:port")."""

    def __init__(self, folder, upstream):
        self.folder, self.port, self.plain = str(folder), free_port(), free_port()
        self.url, self.ca = f"https://localhost:{self.port}", os.path.join(self.folder, "ca.pem")
        cert, key = os.path.join(self.folder, "cert.pem"), os.path.join(self.folder, "cert-key.pem")
        make_certificates(self.folder)
        with open(os.path.join(ROOT, "deploy", "nginx.conf"), encoding="utf-8") as f:
            site = substitute(f.read(), ("server 127.0.0.1:8000;", f"server {upstream};"),
                              ("listen [::]:80;", ""), ("listen 80;", f"listen 127.0.0.1:{self.plain};"),
                              ("listen [::]:443 ssl http2;", ""),
                              ("listen 443 ssl http2;", f"listen 127.0.0.1:{self.port} ssl http2;"),
                              ("server_name tinkerbell.example.com;", "server_name localhost;"),
                              ("/etc/ssl/tinkerbell/fullchain.pem", cert), ("/etc/ssl/tinkerbell/privkey.pem", key))
        temp = "".join(f"{kind}_temp_path {self.folder}/{kind};\n"
                       for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        self.conf = os.path.join(self.folder, "main.conf")
        with open(os.path.join(self.folder, "site.conf"), "w", encoding="utf-8") as f:
            f.write(site)
        with open(self.conf, "w", encoding="utf-8") as f:
            f.write(f"daemon off;\npid {self.folder}/pid;\nerror_log {self.folder}/error.log;\n"
                    + ("user root;\n" if os.getuid() == 0 else "")
                    + "events { worker_connections 1024; }\n"
                    + f"http {{\naccess_log off;\n{temp}include {self.folder}/site.conf;\n}}\n")

    def __enter__(self):
        self.process = subprocess.Popen([NGINX, "-p", self.folder, "-c", self.conf, "-e", self.folder + "/error.log"])
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return self
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, self.errors()
                time.sleep(0.02)

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)

    def errors(self):
        with open(self.folder + "/error.log", encoding="utf-8") as f:
            return f.read()

    def tls(self):
        return ssl.create_default_context(cafile=self.ca)


@pytest.fixture(scope="module")
def proxied(tiny, tmp_path_factory):
    d = Daemon({"tiny": tiny}, tmp_path_factory.mktemp("deploy") / "data", args=["--api-key", KEY, "--long-poll", "2"])
    d.start()
    with Nginx(tmp_path_factory.mktemp("nginx"), d.url.removeprefix("http://")) as proxy:
        proxy.daemon = d
        yield proxy
    d.stop()


@pytest.fixture
def trusted(proxied, monkeypatch):
    """Clients that make their own TLS context take the test's certificate."""
    monkeypatch.setenv("SSL_CERT_FILE", proxied.ca)
    return proxied


# ---------------------------------------------------------------------------------------------- the clients, through nginx
@needs_nginx
def test_sdk(trusted):
    service = tinker.ServiceClient(base_url=trusted.url, api_key=KEY)
    client = service.create_lora_training_client(base_model="tiny", rank=4, seed=1).result()
    losses = []
    for _ in range(3):
        done = client.forward_backward([sft_datum(seed=1)], "cross_entropy")
        client.optim_step(adam()).result()
        losses.append(done.result().metrics["loss:sum"])
    assert losses[2] < losses[1] < losses[0]
    sampler = client.save_weights_and_get_sampling_client().result()
    out = sampler.sample(prompt(tokens(8)), 2, types.SamplingParams(max_tokens=12, seed=1)).result()
    assert [len(s.tokens) for s in out.sequences] == [12, 12]
    # the server's absolute URLs have the name that the client used
    saved = client.save_weights_external("kept").result().path
    urls = tinker.RestClient(base_url=trusted.url, api_key=KEY).get_external_weights_urls(saved).result().urls
    assert urls and all(url.startswith(trusted.url + "/") for url in urls.values())
    with urllib.request.urlopen(urls["adapter_config.json"], context=trusted.tls()) as reply:
        assert b'"r": 4' in reply.read()
    end(service)


@needs_nginx
def test_wrong_key(proxied):
    httpx = pytest.importorskip("httpx")
    with httpx.Client(http2=True, verify=proxied.tls(), base_url=proxied.url) as http:
        for headers in ({}, {"X-API-Key": "tml-wrong"}, {"Authorization": "Bearer tml-wrong"}):
            for path in ("/api/v1/get_server_capabilities", "/v1/models", "/api/tags"):
                assert http.get(path, headers=headers).status_code == 401, (path, headers)
        for headers in ({"X-API-Key": KEY}, {"Authorization": "Bearer " + KEY}):
            assert http.get("/v1/models", headers=headers).status_code == 200


@needs_nginx
def test_http2_in_parallel(proxied):
    """Polls that are held, samples and small requests at once on one connection."""
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("h2")
    with Raw(proxied.daemon.url, key=KEY) as raw:
        session = raw.create_session()
        model = raw.create_model(session, "tiny", seed=1)
        # number 9 waits for those before it, so a poll for it is held for as long as polls may be
        held = raw.ok("optim_step", {"model_id": model, "seq_id": 9, "adam_params": {"learning_rate": 0.001}})["request_id"]

    async def run():
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(http2=True, verify=proxied.tls(), base_url=proxied.url, limits=limits, timeout=120,
                                     headers={"X-API-Key": KEY}) as http:
            polls = [http.post("/api/v1/retrieve_future", json={"request_id": held}) for _ in range(150)]
            texts = [http.post("/v1/completions", json={"model": "tiny", "prompt": [5, 6, i], "max_tokens": 4, "seed": i})
                     for i in range(50)]
            small = [http.get("/api/v1/healthz") for _ in range(200)]
            return await asyncio.gather(*polls, *texts, *small)

    replies = asyncio.run(run())
    assert {r.http_version for r in replies} == {"HTTP/2"}
    assert {r.status_code for r in replies[:150]} == {408}
    assert {r.status_code for r in replies[150:]} == {200}
    assert all(r.json()["usage"]["completion_tokens"] for r in replies[150:200])


@needs_nginx
def test_openai(trusted):
    openai = pytest.importorskip("openai")
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 24, "temperature": 0, "seed": 1}
    with openai.OpenAI(base_url=trusted.url + "/v1", api_key=KEY, max_retries=0) as client:
        whole = client.chat.completions.create(**asked)
        parts = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**asked, stream=True) if c.choices]
        assert len(parts) > 2 and "".join(parts) == whole.choices[0].message.content
    with openai.OpenAI(base_url=trusted.url + "/v1", api_key="tml-wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


@needs_nginx
def test_bodies_up_to_the_limit(proxied):
    httpx = pytest.importorskip("httpx")
    headers = {"X-API-Key": KEY, "Content-Type": "application/json"}
    with httpx.Client(http2=True, verify=proxied.tls(), base_url=proxied.url, timeout=300) as http:
        reply = http.post("/api/v1/forward_backward", content=b'{"more":"' + b"a" * (64 << 20) + b'"}', headers=headers)
        assert reply.status_code == 400 and reply.json()["category"] == "user"
        reply = http.post("/api/v1/forward_backward", content=b"", headers={**headers, "Content-Length": str(BODY_LIMIT + 1)})
        assert reply.status_code == 413


@needs_nginx
def test_plain_http_is_redirected(proxied):
    httpx = pytest.importorskip("httpx")
    reply = httpx.post(f"http://127.0.0.1:{proxied.plain}/api/v1/x?y=1", headers={"Host": "localhost"})
    assert reply.status_code == 308 and reply.headers["location"] == "https://localhost/api/v1/x?y=1"


# ---------------------------------------------------------------------------------------------- what reaches the upstream
class Upstream(http.server.ThreadingHTTPServer):
    """Sends each event of a stream when the test says so; tells the headers that came."""

    daemon_threads = True

    def __init__(self):
        self.go_on, self.connections = threading.Semaphore(0), 0
        super().__init__(("127.0.0.1", 0), Handler)

    def get_request(self):
        self.connections += 1
        return super().get_request()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if self.path == "/sse" else "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if self.path == "/headers":
            self.chunk(str(self.headers).encode())
        else:
            for i in range(EVENTS):
                self.server.go_on.acquire(timeout=60)
                self.chunk(b"data: %d\n\n" % i)
        self.chunk(b"")


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    upstream = Upstream()
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    with Nginx(tmp_path_factory.mktemp("still"), f"127.0.0.1:{upstream.server_port}") as proxy:
        proxy.upstream = upstream
        yield proxy
    upstream.shutdown()
    upstream.server_close()


@needs_nginx
@pytest.mark.parametrize("http2", [True, False])
@pytest.mark.parametrize("path", ["/sse", "/ndjson"])
def test_events_arrive_before_the_end(still, path, http2):
    """The upstream does not send an event before the one before has arrived here."""
    httpx = pytest.importorskip("httpx")
    still.upstream.go_on.release()  # nginx sends the headers with the first event
    with httpx.Client(http2=http2, verify=still.tls(), base_url=still.url, timeout=30) as http, http.stream("GET", path) as reply:
        lines = (line for line in reply.iter_lines() if line)
        for i in range(EVENTS):
            assert next(lines) == f"data: {i}"
            if i + 1 < EVENTS:
                still.upstream.go_on.release()
        assert list(lines) == []


@needs_nginx
def test_headers_and_kept_connections(still):
    httpx = pytest.importorskip("httpx")
    before = still.upstream.connections
    for _ in range(5):
        with httpx.Client(http2=True, verify=still.tls(), base_url=still.url) as http:
            text = http.get("/headers", headers={"X-API-Key": "tml-a", "Authorization": "Bearer tml-b"}).text
    got = {k.lower(): v for k, v in re.findall(r"^(\S+): (.*?)\r?$", text, re.M)}
    assert got["x-api-key"] == "tml-a" and got["authorization"] == "Bearer tml-b"
    assert got["x-forwarded-proto"] == "https" and got["x-forwarded-for"] == "127.0.0.1"
    assert got["host"] == got["x-forwarded-host"] == f"localhost:{still.port}"
    assert "connection" not in got
    assert still.upstream.connections - before <= 1


# ---------------------------------------------------------------------------------------------- the unit
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_unit(tmp_path):
    with open(os.path.join(ROOT, "deploy", "tinkerbell.service"), encoding="utf-8") as f:
        text = f.read()
    program = "ExecStart=/usr/local/bin/tinkerbell "
    assert program in text
    unit = tmp_path / "tinkerbell.service"
    unit.write_text(text.replace(program, f"ExecStart={find_daemon()} "))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
