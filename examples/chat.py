"""What the examples share: questions and answers of the demo model as tokens, and rows to train on.

The scripts need the packages tinker and numpy, and two variables: TINKER_BASE_URL names the server, TINKER_API_KEY is any
text that begins with tml-. MODEL is the name that the server was given in --model NAME=DIR.
"""

import os

from tinker import types

MODEL = os.environ.get("MODEL", "demo")


def prompt(tokenizer, question):
    """The tokens before an answer, in ChatML, which the demo model was trained on."""
    return tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")


def answer(tokenizer, text):
    return tokenizer.encode(text) + [tokenizer.eos_token_id]


def row(before, after, **columns):
    """A datum: position i holds token i and predicts token i + 1. A column is one number for each token of `after`, or
    one for all; before the answer it is 0, so that only the answer is trained."""
    tokens = before + after
    inputs = {"target_tokens": tokens[1:]}
    for name, values in columns.items():
        if not isinstance(values, list):
            values = [values] * len(after)
        inputs[name] = [0.0] * (len(before) - 1) + values
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def ask(sampler, tokenizer, questions, samples=1, temperature=0.0, seed=0, **options):
    """The sampled sequences of each question; all requests are in flight at once."""
    futures = []
    for i, question in enumerate(questions):
        params = types.SamplingParams(
            max_tokens=24, temperature=temperature, seed=seed + i, stop=[tokenizer.eos_token_id])
        futures.append(sampler.sample(
            types.ModelInput.from_ints(prompt(tokenizer, question)), samples, params, **options))
    return [future.result().sequences for future in futures]


def text(tokenizer, sequence):
    return tokenizer.decode(sequence.tokens, skip_special_tokens=True)
