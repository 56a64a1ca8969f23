"""Reinforcement learning: samples groups of answers, rewards them, and takes clipped policy-gradient steps (PPO's loss).

The reward asks for subtraction: 1 for the right number, 0 for another.

    python3 examples/rl.py
"""

import random
import sys

import chat
import tinker
from tinker import types

PROMPTS, SAMPLES = 12, 8


def reward(said, right):
    return float(said == right)


def main(service, steps):
    client = service.create_lora_training_client(base_model=chat.MODEL, rank=16, seed=2).result()
    tokenizer = client.get_tokenizer()
    rng = random.Random(0)
    for step in range(steps):
        # the current weights as a sampler: nothing is written to disk, and no base weights are copied
        sampler = client.save_weights_and_get_sampling_client().result()
        tasks = [(a, rng.randint(0, a)) for a in (rng.randint(2, 9) for _ in range(PROMPTS))]
        questions = [f"What is {a} - {b}?" for a, b in tasks]
        groups = chat.ask(sampler, tokenizer, questions, SAMPLES, temperature=1.0, seed=1000 * step)
        data, rewards = [], []
        for (a, b), question, group in zip(tasks, questions, groups):
            got = [reward(chat.text(tokenizer, s), str(a - b)) for s in group]
            rewards += got
            baseline = sum(got) / len(got)  # the group's mean: what is better than usual is made likelier
            for sequence, r in zip(group, got):
                if r != baseline:
                    data.append(chat.row(chat.prompt(tokenizer, question), sequence.tokens,
                                         logprobs=sequence.logprobs, advantages=r - baseline))
        if data:
            result = client.forward_backward(data, "ppo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2})
            done = client.optim_step(types.AdamParams(learning_rate=2e-3))
            result.result()
            done.result()
        print(f"step {step:2d} reward {sum(rewards) / len(rewards):.3f}", flush=True)


if __name__ == "__main__":
    with tinker.ServiceClient() as service:  # its end ends the session, which frees what it has on the server
        main(service, int(sys.argv[1]) if len(sys.argv) > 1 else 20)
