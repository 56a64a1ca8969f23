"""The scripts of examples/, run as a reader would: each must do what it teaches."""

import re

import pytest

pytest.importorskip("tinker")


def numbers(out, what):
    return [float(x) for x in re.findall(rf"\b{what} (-?[0-9.]+)", out)]


def test_supervised_and_evaluate(run_example):
    out = run_example("supervised.py")
    loss = numbers(out, "loss")
    assert len(loss) == 15 and loss[-1] < 0.1 * loss[0]
    assert "Who are you? I am Bell." in out and "Italy? Rome" in out
    path = re.search(r"^checkpoint (tinker://\S+)$", out, re.M).group(1)
    out = run_example("evaluate.py", path)
    before, after = numbers(out, "perplexity of the right answers")
    assert after < 0.7 * before
    assert "base model: 5 of 6 right" in out and "trained: 6 of 6 right" in out


def test_rl(run_example):
    reward = numbers(run_example("rl.py", 20), "reward")
    assert len(reward) == 20
    assert sum(reward[-5:]) / 5 > 0.9 > sum(reward[:2]) / 2


def test_preference(run_example):
    pytest.importorskip("torch")
    out = run_example("preference.py")
    loss, margin = numbers(out, "loss"), numbers(out, "margin")
    assert loss[0] == pytest.approx(0.6931, abs=1e-4) and loss[-1] < 0.1  # log 2: a new adapter is the reference
    assert margin[0] == 0 and margin[-1] > 1
    assert numbers(out, "accuracy") == [1]


def test_distill(run_example):
    out = run_example("distill.py")
    divergence = numbers(out, "divergence")
    assert len(divergence) == 15 and divergence[-1] < 0.1 * divergence[0]
    assert "Who are you? I am Bell." in out


def test_resume(run_example, demo, tmp_path):
    """Stopped with its server and resumed, a run goes on as if nothing had been."""
    straight = numbers(run_example("resume.py", tmp_path / "straight", 6), "loss")
    first = run_example("resume.py", tmp_path / "parts", 3)
    demo.restart()
    second = run_example("resume.py", tmp_path / "parts", 3)
    assert "resumed at step 3" in second
    assert numbers(first, "loss") + numbers(second, "loss") == straight
