"""The training loops and tools of tinker-cookbook, with an interpreter that has it (tools/test --torch)."""

import json
import math
import os

import pytest
from daemon import ROOT

pytest.importorskip("tinker_cookbook")
tinker = pytest.importorskip("tinker")
MODEL_DIR = os.path.join(ROOT, "examples", "demo-model")


def metrics(log_dir, key):
    with open(log_dir / "metrics.jsonl", encoding="utf-8") as f:
        return [row[key] for row in map(json.loads, f) if key in row]


def test_rl(run_example, tmp_path):
    run_example("cookbook.py", "rl", tmp_path)
    correct = metrics(tmp_path, "env/all/correct")
    assert len(correct) == 15
    assert sum(correct[-5:]) / 5 > 0.9 > sum(correct[:2]) / 2
    # the sampler's logprobs and the trainer's are the same bits
    assert set(metrics(tmp_path, "optim/kl_sample_train_v1")) == {0}


def test_supervised_and_tools(run_example, demo, tmp_path, monkeypatch):
    from tinker_cookbook import checkpoint_utils, weights

    monkeypatch.setenv("TINKER_BASE_URL", demo.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    log_dir = tmp_path / "log"
    run_example("cookbook.py", "supervised", log_dir)
    nll = metrics(log_dir, "train_mean_nll")
    assert len(nll) == 15 and nll[-1] < 0.1 * nll[0]
    records = checkpoint_utils.load_checkpoints_file(str(log_dir))
    assert [r.name for r in records] == ["000005", "000010", "final"]

    # as if stopped after the tenth step: the loop goes on from that checkpoint
    lines = (log_dir / "checkpoints.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (log_dir / "checkpoints.jsonl").write_text("".join(lines[:2]), encoding="utf-8")
    run_example("cookbook.py", "supervised", log_dir)
    resumed = metrics(log_dir, "train_mean_nll")
    assert resumed[:10] == nll[:10] and len(resumed) == 15
    assert max(resumed[10:]) < nll[10]
    final = checkpoint_utils.get_last_checkpoint(str(log_dir))

    # out of the server and into PEFT: the same model
    with tinker.ServiceClient() as service:
        client = service.create_training_client_from_state(final.state_path).result()
        external = client.save_weights_external("final").result().path
        sampler = service.create_sampling_client(model_path=final.sampler_path).result()
        tokens = client.get_tokenizer().encode("<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\nI am Bell.")
        served = sampler.compute_logprobs(tinker.ModelInput.from_ints(tokens)).result()
    downloaded = weights.download(tinker_path=external, output_dir=str(tmp_path / "external"))
    adapter = tmp_path / "adapter"
    weights.build_lora_adapter(base_model=MODEL_DIR, adapter_path=downloaded, output_path=str(adapter))
    assert math.exp(sum(served[-4:])) > 0.5
    for got, want in zip(peft_logprobs(adapter, tokens), served[1:], strict=True):
        assert got == pytest.approx(want, abs=2e-3)


def peft_logprobs(adapter, tokens):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
