"""Evaluation by logprobs: which of several answers does a model find likeliest? Nothing is sampled; each answer costs
one pass over its tokens.

    python3 examples/evaluate.py [tinker://…/sampler_weights/bell]     trained weights to compare with the base model
"""

import math
import sys

import chat
import tinker
from tinker import types

# the right answer first
CHOICES = [
    ("What is the capital of Spain?", ["Madrid", "Lisbon", "Rome", "Oslo"]),
    ("What is the capital of Japan?", ["Tokyo", "Cairo", "Paris", "Berlin"]),
    ("What is the opposite of big?", ["small", "slow", "cold", "old"]),
    ("What is the plural of dog?", ["dogs", "dog", "doges", "cats"]),
    ("What is 3 + 4?", ["7", "8", "6", "12"]),
    ("Who are you?", ["I am Bell.", "I am a tiny demo model.", "Hello! Ask me something.", "Paris"]),
]


def score(sampler, tokenizer, questions):
    """[question][answer] -> (sum of the answer's logprobs, its tokens). All requests are in flight at once."""
    waiting = []
    for question, answers in questions:
        before = chat.prompt(tokenizer, question)
        rows = [chat.answer(tokenizer, answer) for answer in answers]
        waiting.append([(len(before), sampler.compute_logprobs(types.ModelInput.from_ints(before + row)))
                        for row in rows])
    scores = []
    for group in waiting:
        logprobs = [future.result()[start:] for start, future in group]
        scores.append([(sum(lp), len(lp)) for lp in logprobs])
    return scores


def evaluate(name, sampler, tokenizer):
    scores = score(sampler, tokenizer, CHOICES)
    right = sum(group.index(max(group)) == 0 for group in scores)
    nll = -sum(group[0][0] for group in scores) / sum(group[0][1] for group in scores)
    print(f"{name}: {right} of {len(CHOICES)} right, perplexity of the right answers {math.exp(nll):.3f}", flush=True)


def main(service, path=None):
    # a training client asks the server where the tokenizer is; a sampling client knows the model's name only
    tokenizer = service.create_lora_training_client(base_model=chat.MODEL, rank=1).result().get_tokenizer()
    evaluate("base model", service.create_sampling_client(base_model=chat.MODEL).result(), tokenizer)
    if path:
        evaluate("trained", service.create_sampling_client(model_path=path).result(), tokenizer)


if __name__ == "__main__":
    with tinker.ServiceClient() as service:  # its end ends the session, which frees what it has on the server
        main(service, *sys.argv[1:])
