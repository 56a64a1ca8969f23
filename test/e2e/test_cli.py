"""The SDK's own command line, `tinker`, against the server: every subcommand, as a table and as JSON."""

import json
import os
import subprocess
import sys
import time

import pytest
from common import adam, sft_datum

tinker = pytest.importorskip("tinker")
testing = pytest.importorskip("click.testing")
pytest.importorskip("tinker.cli.commands.model", reason="the command line of this release has no `model`")
from daemon import end  # noqa: E402
from tinker.cli.__main__ import main_cli  # noqa: E402
from tinker.cli.exceptions import TinkerCliError  # noqa: E402


@pytest.fixture(scope="module")
def run(server):
    """One training run with a checkpoint of each kind."""
    service = tinker.ServiceClient(base_url=server.url)
    client = service.create_lora_training_client("tiny", rank=4, seed=1).result()
    client.forward_backward([sft_datum(10)], "cross_entropy")
    client.optim_step(adam()).result()
    for save in (client.save_state, client.save_weights_for_sampler, client.save_weights_external):
        save("one").result()
    yield client
    end(service)


@pytest.fixture
def cli(server, monkeypatch, tmp_path):
    """cli(words...) gives what it prints; cli.json(words...) the same as JSON. A refusal raises TinkerCliError."""
    monkeypatch.setenv("TINKER_BASE_URL", server.url)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.chdir(tmp_path)

    def command(*words, text=None):
        result = testing.CliRunner().invoke(main_cli, [*words], input=text, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    def as_json(*words):
        output = command("--format", "json", *words)
        return json.loads(output[output.index("{"):])

    command.json = as_json
    return command


def test_program(server):
    """The installed program, with a good and a bad command."""
    env = dict(os.environ, TINKER_BASE_URL=server.url)

    def program(*words):
        return subprocess.run([sys.executable, "-m", "tinker.cli", *words], env=env, capture_output=True, text=True, timeout=120,
                              check=False)

    good = program("--format", "json", "model", "list")
    assert good.returncode == 0, good.stderr
    assert "tiny" in [m["model_name"] for m in json.loads(good.stdout)["models"]]
    bad = program("run", "info", "nobody:train:0")
    assert bad.returncode == 1 and "Error: Resource not found" in bad.stderr and "nobody:train:0" in bad.stderr
    assert program("version").stdout.strip() == f"tinker {tinker.__version__}"


def test_every_command_is_tested():
    """A new subcommand of the SDK makes this fail."""
    import click
    from tinker.cli.__main__ import main_cli as top
    context, found = click.Context(top), set()
    for name in top.list_commands(context):
        group = top.get_command(context, name)
        found |= {f"{name} {sub}" for sub in group.list_commands(context)} if isinstance(group, click.Group) else {name}
    with open(__file__, encoding="utf-8") as file:
        text = file.read()
    untested = [c for c in sorted(found) if ", ".join(f'"{word}"' for word in c.split()) not in text]
    assert not untested, untested


def test_models(cli):
    table = cli("model", "list")
    assert "tiny" in table and "512" in table
    assert [m["model_name"] for m in cli.json("model", "list", "LLAMA")["models"]] == ["tiny-llama"]
    with pytest.raises(TinkerCliError, match="no-such-model.*tml:organization:default"):
        cli("model", "list", "no-such-model")


def test_runs(cli, run):
    assert run.model_id in cli("run", "list", "--limit", "0")
    found = {r["training_run_id"]: r for r in cli.json("run", "list", "--limit", "0")["runs"]}
    assert found[run.model_id]["base_model"] == "tiny" and found[run.model_id]["lora_rank"] == 4
    columns = cli("run", "list", "--limit", "1", "--columns", "id,model,owner,lora,updated,status,checkpoint")
    assert "Run ID" in columns and "Rank" in columns
    info = cli.json("run", "info", run.model_id)
    assert info["training_run_id"] == run.model_id and info["base_model"] == "tiny" and info["lora_rank"] == 4
    assert info["last_checkpoint"]["checkpoint_id"] == "weights/one"
    assert "weights/one" in cli("run", "info", run.model_id)
    with pytest.raises(TinkerCliError, match="not found"):
        cli("run", "info", "nobody:train:0")


def test_checkpoint_lists(cli, run):
    paths = {f"tinker://{run.model_id}/{kind}/one" for kind in ("weights", "sampler_weights", "external_weights")}
    listed = {c["tinker_path"]: c for c in cli.json("checkpoint", "list", "--run-id", run.model_id)["checkpoints"]}
    assert paths <= set(listed)
    assert {c["tinker_path"] for c in cli.json("checkpoint", "list", "--limit", "0")["checkpoints"]} >= paths
    assert len(cli.json("checkpoint", "list", "--limit", "2")["checkpoints"]) == 2
    for path in paths:
        assert path.split("/")[3] + "/one" in cli("checkpoint", "list", "--run-id", run.model_id)
        info = cli.json("checkpoint", "info", path)
        assert info["tinker_path"] == path and info["size_bytes"] == listed[path]["size_bytes"] > 1000
        assert path in cli("checkpoint", "info", path)
    with pytest.raises(TinkerCliError, match="not found"):
        cli("checkpoint", "info", f"tinker://{run.model_id}/weights/missing")


def test_checkpoint_publish(cli, run):
    path = run.save_state("published").result().path
    assert cli.json("checkpoint", "info", path)["public"] is False
    cli("checkpoint", "publish", path)
    assert cli.json("checkpoint", "info", path)["public"] is True
    cli("checkpoint", "publish", path)
    cli("checkpoint", "unpublish", path)
    assert cli.json("checkpoint", "info", path)["public"] is False
    with pytest.raises(TinkerCliError, match="not found"):
        cli("checkpoint", "publish", f"tinker://{run.model_id}/weights/missing")


def test_checkpoint_ttl(cli, run):
    path = run.save_state("leased").result().path
    cli("checkpoint", "set-ttl", path, "--ttl", "7200")
    left = tinker.types.Checkpoint.model_validate(
        {"checkpoint_id": "", "checkpoint_type": "training", "time": "2026-01-01T00:00:00Z", "tinker_path": path,
         "expires_at": cli.json("checkpoint", "info", path)["expires_at"]}).expires_at.timestamp() - time.time()
    assert 7000 < left <= 7200
    assert "in 1 hour" in cli("checkpoint", "info", path)
    cli("checkpoint", "set-ttl", path, "--remove")
    assert cli.json("checkpoint", "info", path)["expires_at"] is None
    with pytest.raises(TinkerCliError, match="Invalid request"):
        cli("checkpoint", "set-ttl", path, "--ttl", "10")


def test_checkpoint_delete(cli, run):
    one, two, three, four = (run.save_state(f"doomed-{i}").result().path for i in range(4))
    assert "Aborted" not in cli("checkpoint", "delete", one, two, "--yes")
    assert cli("checkpoint", "delete", three, text="n\n").count("Deleted") == 0
    assert cli.json("checkpoint", "delete", three, one, "--yes")["deleted_count"] == 1  # one is gone already
    other = tinker.ServiceClient(base_url=os.environ["TINKER_BASE_URL"])
    client = other.create_lora_training_client("tiny", rank=1).result()
    for i in range(3):
        client.save_state(f"a-{i}").result()
    client.save_weights_for_sampler("kept").result()
    cli("checkpoint", "delete", "--run-id", client.model_id, "--type", "weights", "--after", "2020-01-01", "--yes")
    left = [c["tinker_path"] for c in cli.json("checkpoint", "list", "--run-id", client.model_id)["checkpoints"]]
    assert left == [f"tinker://{client.model_id}/sampler_weights/kept"]
    assert four in [c["tinker_path"] for c in cli.json("checkpoint", "list", "--run-id", run.model_id)["checkpoints"]]
    end(other)


def test_checkpoint_download(cli, run, tmp_path):
    """Of a training checkpoint: the CLI makes an external one of it, in a session of its own, and deletes that afterwards."""
    before = {c["tinker_path"] for c in cli.json("checkpoint", "list", "--limit", "0")["checkpoints"]}
    out = cli.json("checkpoint", "download", f"tinker://{run.model_id}/weights/one", "--output", str(tmp_path / "a"))
    first = out["destination"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(first))
    assert {c["tinker_path"] for c in cli.json("checkpoint", "list", "--limit", "0")["checkpoints"]} == before
    table = cli("checkpoint", "download", f"tinker://{run.model_id}/external_weights/one", "--output", str(tmp_path / "b"))
    assert "external_weights_one" in table
    second = os.path.join(tmp_path, "b", os.listdir(tmp_path / "b")[0])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        with open(os.path.join(first, name), "rb") as a, open(os.path.join(second, name), "rb") as b:
            assert a.read() == b.read(), name
    with pytest.raises(TinkerCliError, match="already exists"):
        cli("checkpoint", "download", f"tinker://{run.model_id}/external_weights/one", "--output", str(tmp_path / "b"))
    with pytest.raises(TinkerCliError, match="Sampler checkpoints"):
        cli("checkpoint", "download", f"tinker://{run.model_id}/sampler_weights/one")
    with pytest.raises(TinkerCliError, match="missing"):
        cli("checkpoint", "download", f"tinker://{run.model_id}/weights/missing")


def test_checkpoint_push(cli, run, monkeypatch):
    """"checkpoint", "push-hf" up to the hub's own door: what would be uploaded is a PEFT adapter with a card."""
    hub = pytest.importorskip("huggingface_hub")
    pushed = {}

    class Hub:
        def whoami(self):
            return {"name": "someone"}

        def create_repo(self, **options):
            pushed["repo"] = options

        def upload_folder(self, folder_path, **options):
            pushed["files"] = {}
            for name in os.listdir(folder_path):
                with open(os.path.join(folder_path, name), "rb") as file:
                    pushed["files"][name] = file.read()

    def no_card(**_):
        raise FileNotFoundError

    monkeypatch.setattr(hub, "HfApi", Hub)
    monkeypatch.setattr(hub, "hf_hub_download", no_card)
    out = cli.json("checkpoint", "push-hf", f"tinker://{run.model_id}/weights/one", "--repo", "someone/adapter")
    assert out["repo_id"] == "someone/adapter" and pushed["repo"]["private"] is True
    config = json.loads(pushed["files"]["adapter_config.json"])
    assert config["peft_type"] == "LORA" and config["r"] == 4 and len(pushed["files"]["adapter_model.safetensors"]) > 1000
    card = pushed["files"]["README.md"].decode()
    assert "base_model: tiny" in card and "LoRA rank: 4" in card


def test_session_trace(cli, run):
    with pytest.raises(TinkerCliError, match="Trace export failed"):
        cli("session", "export-trace", run.model_id.split(":")[0], "--url-only")


def test_login(cli, monkeypatch):
    """Log in with a pasted key, look, and log out; the key itself belongs to the server's operator and stays."""
    monkeypatch.delenv("TINKER_API_KEY")
    with pytest.raises(TinkerCliError, match="No Tinker credentials"):
        cli("auth", "status")
    assert "Logged in as" in cli("auth", "login", text="tml-pasted\n")
    assert "Tinker accessible: yes" in cli("auth", "status")
    with pytest.raises(TinkerCliError, match="Already logged in"):
        cli("auth", "login", text="tml-pasted\n")
    assert "tml:user:default" in cli("auth", "whoami")
    assert "Removed credential" in cli("auth", "logout")
    with pytest.raises(TinkerCliError, match="No default credential"):
        cli("auth", "logout")


def test_billing(cli, tmp_path):
    window = ("2026-07-13T00:00:00Z", "2026-07-14T00:00:00Z")
    assert cli.json("billing", "usage", *window)["data"] == []
    cli("billing", "usage", *window, "--csv", str(tmp_path / "usage.csv"))
    assert cli("billing", "usage", *window).strip() == ""
    assert cli.json("billing", "checkpoint-storage")["data"] == []
    assert cli("billing", "checkpoint-storage").strip() == ""
