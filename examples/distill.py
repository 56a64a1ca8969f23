"""Distillation: a student learns a teacher's distributions, the K likeliest tokens at each position with their
probabilities, which says far more than the sampled token alone.

    python3 examples/distill.py [tinker://…/sampler_weights/bell]     the teacher; made on the spot when not given
"""

import math
import sys

import chat
import numpy as np
import supervised
import tinker
from tinker import types

K = 8
QUESTIONS = [q for q, _ in supervised.LESSONS]


def targets(prompt, sequence):
    """A row whose targets are K tokens a position, weighted by the teacher's probabilities."""
    tokens = prompt + sequence.tokens
    ids = np.zeros((len(tokens) - 1, K), np.int64)
    weights = np.zeros((len(tokens) - 1, K), np.float32)
    for i, best in enumerate(sequence.topk_logprobs):
        for k, (token, logprob) in enumerate(best):
            ids[len(prompt) - 1 + i, k] = token
            weights[len(prompt) - 1 + i, k] = math.exp(logprob)
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]),
                       loss_fn_inputs={"target_tokens": ids, "weights": weights})


def divergence(result, data):
    """Mean KL(teacher || student) over the positions of the answers: the cross-entropy less the teacher's entropy."""
    total, n = result.metrics["loss:sum"], 0
    for datum in data:
        weights = datum.loss_fn_inputs["weights"].to_numpy()
        p = weights[weights > 0]
        total += float((p * np.log(p)).sum())
        n += int((weights.sum(1) > 0).sum())
    return total / n


def main(service, path=None):
    student = service.create_lora_training_client(base_model=chat.MODEL, rank=8, seed=4).result()
    tokenizer = student.get_tokenizer()
    if not path:
        client = service.create_lora_training_client(base_model=chat.MODEL, rank=16, seed=1).result()
        supervised.train(client, supervised.rows(tokenizer, supervised.LESSONS), steps=15)
        path = client.save_weights_for_sampler(name="teacher").result().path
    teacher = service.create_sampling_client(model_path=path).result()
    data = []
    groups = chat.ask(teacher, tokenizer, QUESTIONS, samples=2, temperature=1.0, topk_sample_logprobs=K)
    for question, group in zip(QUESTIONS, groups):
        data += [targets(chat.prompt(tokenizer, question), sequence) for sequence in group]
    for step in range(15):
        result = student.forward_backward(data, "cross_entropy")
        done = student.optim_step(types.AdamParams(learning_rate=4e-3))
        print(f"step {step:2d} divergence {divergence(result.result(), data):.4f}", flush=True)
        done.result()
    sampler = student.save_weights_and_get_sampling_client().result()
    [[sequence]] = chat.ask(sampler, tokenizer, ["Who are you?"])
    print("Who are you?", chat.text(tokenizer, sequence))


if __name__ == "__main__":
    with tinker.ServiceClient() as service:  # its end ends the session, which frees what it has on the server
        main(service, *sys.argv[1:])
