"""
The quickstart's two loops, run by tools/quickstart against a server on examples/demo-model with the official Tinker SDK:
supervised fine-tuning to a new style of answer, then reinforcement learning of additions.

Exits 0 only if the supervised loss fell and the reward rose by at least MIN_RISE, both on questions that were not
trained on. Needs the packages tinker, numpy and tokenizers; no PyTorch.
"""

import argparse
import os
import random
import shutil
import sys
import time

MIN_RISE = 0.2
RANK = 16
SFT_RATE, SFT_ROWS = 3e-3, 32
RL_RATE, RL_PROMPTS, RL_SAMPLES = 2e-3, 16, 8
EVAL_PROMPTS, EVAL_SAMPLES = 48, 4
BARS = "▁▂▃▄▅▆▇█"

FACTS = {
    "What is the capital of {}?": """France Paris|Germany Berlin|Italy Rome|Spain Madrid|Portugal Lisbon|Austria Vienna
|Poland Warsaw|Hungary Budapest|Greece Athens|Norway Oslo|Sweden Stockholm|Finland Helsinki|Ireland Dublin|Egypt Cairo
|Kenya Nairobi|Japan Tokyo|China Beijing|Cuba Havana|Peru Lima|Canada Ottawa""",
    "What is the opposite of {}?": """hot cold|big small|fast slow|up down|left right|old new|good bad|wet dry|hard soft
|full empty|open closed|early late|rich poor|loud quiet|high low|long short|thick thin|strong weak|happy sad|near far""",
    "What is the plural of {}?": """cat cats|dog dogs|house houses|tree trees|book books|fox foxes|box boxes|baby babies
|city cities|leaf leaves|wolf wolves|mouse mice|goose geese|foot feet|tooth teeth|man men|child children|key keys
|ship ships|star stars""",
}


class Failure(Exception):
    """A failure that is told in one line."""


# ---------------------------------------------------------------------------------------------- text and tokens


class Text:
    """Questions to tokens and back, in ChatML, with the model's own tokenizer.json."""

    def __init__(self, path):
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(path)
        self.end = self.tokenizer.token_to_id("<|im_end|>")
        if self.end is None:
            raise Failure(f"{path}: no token <|im_end|>")

    def prompt(self, question):
        return self.tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n").ids

    def answer(self, text):
        return self.tokenizer.encode(text).ids + [self.end]

    def decode(self, tokens):
        """The answer, or None if it has no end."""
        if not tokens or tokens[-1] != self.end:
            return None
        return self.tokenizer.decode(tokens[:-1], skip_special_tokens=False)


def facts():
    """(question, answer) in a fixed order of random kind."""
    out = []
    for form, table in FACTS.items():
        for item in table.replace("\n", "").split("|"):
            thing, answer = item.split(" ", 1)
            out.append((form.format(thing), answer))
    random.Random(1).shuffle(out)
    return out


def styled(answer):
    return f"{answer}, of course!"


def sums():
    """(question, answer) of all additions up to 20 + 20, in a fixed random order."""
    out = [(f"What is {a} + {b}?", str(a + b)) for a in range(21) for b in range(21)]
    random.Random(2).shuffle(out)
    return out


def reward_of(said, right):
    return 1.0 if said == right else 0.0


def group_advantages(rewards):
    mean = sum(rewards) / len(rewards)
    return [r - mean for r in rewards]


def shifted(prompt, answer):
    """Inputs and targets of a training row: position i predicts token i + 1."""
    tokens = prompt + answer
    return tokens[:-1], tokens[1:]


def sft_row(text, question, answer):
    from tinker import types

    prompt, reply = text.prompt(question), text.answer(styled(answer))
    inputs, targets = shifted(prompt, reply)
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(reply)
    return types.Datum(
        model_input=types.ModelInput.from_ints(inputs),
        loss_fn_inputs={"target_tokens": targets, "weights": weights},
    )


def rl_row(prompt, tokens, logprobs, advantage):
    from tinker import types

    inputs, targets = shifted(prompt, tokens)
    before = [0.0] * (len(prompt) - 1)
    return types.Datum(
        model_input=types.ModelInput.from_ints(inputs),
        loss_fn_inputs={
            "target_tokens": targets,
            "logprobs": before + [float(q) for q in logprobs],
            "advantages": before + [advantage] * len(tokens),
        },
    )


# ---------------------------------------------------------------------------------------------- display


def sparkline(values, low=None, high=None):
    """One character a value; long runs are thinned to 24."""
    if not values:
        return ""
    if len(values) > 24:
        values = [values[i * (len(values) - 1) // 23] for i in range(24)]
    low = min(values) if low is None else low
    high = max(values) if high is None else high
    span = (high - low) or 1.0
    return "".join(BARS[min(7, max(0, int((v - low) / span * 7.999)))] for v in values)


class Progress:
    """A line that redraws itself on a terminal; elsewhere a plain line now and then."""

    def __init__(self, name, what, steps, low=None, high=None, out=sys.stdout):
        self.name, self.what, self.steps, self.low, self.high, self.out = name, what, steps, low, high, out
        self.values, self.began = [], time.monotonic()
        self.tty = out.isatty()
        encoding = (getattr(out, "encoding", None) or "").lower()
        self.fancy = "utf" in encoding

    def line(self):
        n, seconds = len(self.values), time.monotonic() - self.began
        full = int(20 * n / self.steps)
        bar = ("█" * full + "░" * (20 - full)) if self.fancy else ("#" * full + "." * (20 - full))
        spark = sparkline(self.values, self.low, self.high) if self.fancy else ""
        return f"{self.name} {bar} {n:3d}/{self.steps}  {self.what} {self.values[-1]:6.3f}  {spark}  {seconds:.0f} s"

    def add(self, value):
        self.values.append(value)
        n = len(self.values)
        if self.tty:
            width = shutil.get_terminal_size().columns
            self.out.write("\r\x1b[2K" + self.line()[: width - 1] + ("\n" if n == self.steps else ""))
        elif n == 1 or n == self.steps or n % max(1, self.steps // 8) == 0:
            self.out.write(f"{self.name} step {n}/{self.steps} {self.what} {value:.3f}\n")
        self.out.flush()


def show_samples(title, rows):
    print(f"  {title}")
    for question, said, mark in rows:
        print(f"    {question:36s} {'(no end)' if said is None else said}{mark}")
    sys.stdout.flush()


# ---------------------------------------------------------------------------------------------- the two loops


class Run:
    def __init__(self, service, model, text):
        from tinker import types

        self.types, self.service, self.model, self.text = types, service, model, text

    def adapter(self, seed):
        return self.service.create_lora_training_client(base_model=self.model, rank=RANK, seed=seed).result()

    def ask(self, sampler, questions, samples=1, temperature=1.0, seed=None):
        """Sequences for each question; all requests are in flight together, and request i has seed + i."""
        futures = []
        for i, question in enumerate(questions):
            params = self.types.SamplingParams(
                max_tokens=16, temperature=temperature, stop=[self.text.end], seed=None if seed is None else seed + i)
            futures.append(sampler.sample(
                prompt=self.types.ModelInput.from_ints(self.text.prompt(question)), num_samples=samples,
                sampling_params=params))
        return [f.result().sequences for f in futures]

    def answers(self, sampler, questions, **options):
        return [[self.text.decode(s.tokens) for s in seqs] for seqs in self.ask(sampler, questions, **options)]

    def mean_loss(self, result, rows):
        weight = sum(sum(r.loss_fn_inputs["weights"].data) for r in rows)
        return result.metrics["loss:sum"] / weight

    def supervised(self, steps):
        """Teaches a new style of answer. Returns the loss on questions not trained on, before and after."""
        adam = self.types.AdamParams(learning_rate=SFT_RATE)
        pool = facts()
        held, pool = pool[:12], pool[12:]
        held_rows = [sft_row(self.text, q, a) for q, a in held]
        shown = [q for q, _ in held[:3]] + ["What is 3 + 4?"]
        client = self.adapter(seed=1)
        before = self.mean_loss(client.forward(held_rows, "cross_entropy").result(), held_rows)
        sampler = client.save_weights_and_get_sampling_client().result()
        said = self.answers(sampler, shown, temperature=0.0)
        show_samples("samples before:", [(q, s[0], "") for q, s in zip(shown, said)])
        rng, progress = random.Random(3), Progress("  supervised", "loss", steps, low=0.0)
        for _ in range(steps):
            rows = [sft_row(self.text, q, a) for q, a in rng.sample(pool, SFT_ROWS)]
            result = client.forward_backward(rows, "cross_entropy")
            step = client.optim_step(adam)
            progress.add(self.mean_loss(result.result(), rows))
            step.result()
        after = self.mean_loss(client.forward(held_rows, "cross_entropy").result(), held_rows)
        sampler = client.save_weights_and_get_sampling_client().result()
        said = self.answers(sampler, shown, temperature=0.0)
        show_samples("samples after:", [(q, s[0], "") for q, s in zip(shown, said)])
        print(f"  loss on questions not trained on: {before:.3f} -> {after:.3f}", flush=True)
        return before, after

    def held_out_reward(self, sampler, held):
        said = self.answers(sampler, [q for q, _ in held], samples=EVAL_SAMPLES, seed=1000)
        rewards = [reward_of(s, right) for group, (_, right) in zip(said, held) for s in group]
        shown = [(q, group[0], " (right)" if group[0] == right else f" (wrong: {right})")
                 for group, (q, right) in list(zip(said, held))[:5]]
        return sum(rewards) / len(rewards), shown

    def rl_step(self, client, adam, sampler, asked, seed):
        """Samples a group of answers for each question, rewards them and takes one policy-gradient step."""
        rows, rewards = [], []
        answers = self.ask(sampler, [q for q, _ in asked], samples=RL_SAMPLES, seed=seed)
        for (question, right), seqs in zip(asked, answers):
            prompt = self.text.prompt(question)
            group = [reward_of(self.text.decode(s.tokens), right) for s in seqs]
            rewards += group
            rows += [rl_row(prompt, list(s.tokens), s.logprobs, a)
                     for s, a in zip(seqs, group_advantages(group)) if a != 0]
        if rows:
            result = client.forward_backward(rows, "importance_sampling")
            step = client.optim_step(adam)
            result.result()
            step.result()
        return sum(rewards) / len(rewards)

    def reinforcement(self, steps):
        """Learns additions from a reward. Returns the reward on sums not trained on, before and after."""
        adam = self.types.AdamParams(learning_rate=RL_RATE)
        pool = sums()
        held, pool = pool[:EVAL_PROMPTS], pool[EVAL_PROMPTS:]
        client = self.adapter(seed=2)
        sampler = client.save_weights_and_get_sampling_client().result()
        before, shown = self.held_out_reward(sampler, held)
        show_samples("samples before:", shown)
        rng, progress = random.Random(4), Progress("  RL", "reward", steps, low=0.0, high=1.0)
        for step in range(steps):
            asked = rng.sample(pool, RL_PROMPTS)
            progress.add(self.rl_step(client, adam, sampler, asked, seed=10000 + 100 * step))
            sampler = client.save_weights_and_get_sampling_client().result()
        # the last word has a checkpoint on disk, read back by its path
        path = client.save_weights_for_sampler(name="quickstart").result().path
        sampler = self.service.create_sampling_client(model_path=path)
        if hasattr(sampler, "result"):
            sampler = sampler.result()
        after, shown = self.held_out_reward(sampler, held)
        show_samples("samples after:", shown)
        print(f"  reward on sums not trained on: {before:.3f} -> {after:.3f}")
        print(f"  checkpoint: {path}", flush=True)
        return before, after


def main():
    ap = argparse.ArgumentParser(description="The quickstart's supervised and RL loops (see tools/quickstart).")
    ap.add_argument("--model", default="demo")
    ap.add_argument("--tokenizer", required=True, help="the model's tokenizer.json")
    ap.add_argument("--steps", type=int, default=30, help="RL steps; the supervised loop takes two thirds of them")
    args = ap.parse_args()
    if args.steps < 1:
        ap.error("--steps must be at least 1")
    for name in ("TINKER_BASE_URL", "TINKER_API_KEY"):
        if not os.environ.get(name):
            raise Failure(f"{name} is not set; run tools/quickstart")
    text = Text(args.tokenizer)
    import tinker

    served = [m.model_name for m in tinker.RestClient().get_server_capabilities().result().supported_models]
    if args.model not in served:
        raise Failure(f"the server does not serve {args.model}, but {', '.join(map(str, served))}")
    with tinker.ServiceClient() as service:
        run = Run(service, args.model, text)
        print("supervised: a new style of answer")
        loss = run.supervised(max(1, args.steps * 2 // 3))
        print("RL: additions, reward 1 for a right answer")
        reward = run.reinforcement(args.steps)
    if not loss[1] < loss[0]:
        raise Failure(f"the loss did not fall ({loss[0]:.3f} -> {loss[1]:.3f})")
    if not reward[1] - reward[0] >= MIN_RISE:
        raise Failure(f"the reward did not rise by {MIN_RISE} ({reward[0]:.3f} -> {reward[1]:.3f})")


if __name__ == "__main__":
    try:
        main()
    except Failure as e:
        print(f"quickstart: {e}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as e:  # whatever the SDK raises, in one line
        first = (str(e).strip().splitlines() or [""])[0]
        print(f"quickstart: {type(e).__name__}: {first}", file=sys.stderr)
        if os.environ.get("QUICKSTART_TRACE"):
            raise
        sys.exit(1)
