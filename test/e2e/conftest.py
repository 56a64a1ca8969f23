"""What all end-to-end tests share. They drive a real server process, most of them with the unmodified Tinker SDK.

    TB_DAEMON=build/src/server/tinkerbell python3 -m pytest test/e2e

TB_DAEMON names the binary, so that sanitizer builds can be tested; `-m smoke` is the short tour for those.
"""

import os
import subprocess
import sys
import urllib.request

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
os.environ["TINKER_API_KEY"] = "tml-test"
os.environ.setdefault("TINKER_TELEMETRY", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import daemon as daemon_module  # noqa: E402
from daemon import ROOT, Daemon, end  # noqa: E402
from random_model import make_model  # noqa: E402
from tinker_raw import Raw  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "smoke: the short tour that sanitizer builds run too")
    config.addinivalue_line("markers", "slow: waits for a time-out of the contract")


def pytest_sessionstart(session):
    if daemon_module.find_daemon() is None:
        pytest.exit("no server to test: build it, or name it with TB_DAEMON", returncode=4)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random Qwen3-like model of 320 tokens and 512 positions."""
    return make_model(str(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    return make_model(str(tmp_path_factory.mktemp("models") / "tiny-llama"), family="llama", tied=False, seed=2)


@pytest.fixture(scope="session")
def server(tiny, tiny_llama, tmp_path_factory):
    """The server that most tests share, computing in float32. It must survive all of them and exit with 0."""
    d = Daemon({"tiny": tiny, "tiny-llama": tiny_llama}, tmp_path_factory.mktemp("server") / "data")
    d.start()
    yield d
    d.stop()


@pytest.fixture
def start(tmp_path, tiny):
    """start(**options) gives a server of the test's own; all are stopped, and checked, at the end."""
    started = []

    def make(models=None, data=None, **options):
        d = Daemon(models or {"tiny": tiny}, data or tmp_path / f"data{len(started)}", **options)
        started.append(d)
        return d.start()

    yield make
    for d in started:
        d.stop()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A server of the demo model, as the examples want it."""
    d = Daemon({"demo": os.path.join(ROOT, "examples", "demo-model")}, tmp_path_factory.mktemp("demo") / "data")
    d.start()
    yield d
    d.stop()


@pytest.fixture
def run_example(demo):
    """run_example(name, arguments…) runs a script of examples/ and gives what it printed."""

    def run(name, *args):
        env = {**os.environ, "TINKER_BASE_URL": demo.url, "HF_HUB_OFFLINE": "1"}
        with subprocess.Popen([sys.executable, os.path.join(ROOT, "examples", name), *map(str, args)], env=env, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) as script:
            try:
                out, errors = script.communicate(timeout=240)
                code = script.returncode
            except subprocess.TimeoutExpired:  # see end(): all is done if the session has ended
                script.kill()
                out, errors = script.communicate()
                with urllib.request.urlopen(demo.url + "/metrics", timeout=60) as reply:
                    code = int("\ntinkerbell_sessions 0\n" not in reply.read().decode())
        assert code == 0, out[-2000:] + errors[-4000:]
        return out

    return run


@pytest.fixture
def raw(server):
    with Raw(server.url) as client:
        yield client


@pytest.fixture
def service(server):
    """A ServiceClient of the real SDK with a session of its own."""
    tinker = pytest.importorskip("tinker")
    client = tinker.ServiceClient(base_url=server.url, user_metadata={"test": "e2e"})
    yield client
    end(client)
