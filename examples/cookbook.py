"""The training loops of tinker-cookbook on the demo model, with local data and the local tokenizer (docs/cookbook.md).

    python3 examples/cookbook.py supervised LOG_DIR
    python3 examples/cookbook.py rl LOG_DIR
"""

import asyncio
import json
import os
import sys
from functools import partial

import chat
import chz
import supervised
from tinker_cookbook import renderers, tokenizer_utils
from tinker_cookbook.rl import train as rl_train
from tinker_cookbook.rl.problem_env import ProblemEnv, ProblemGroupBuilder
from tinker_cookbook.rl.types import RLDataset, RLDatasetBuilder
from tinker_cookbook.supervised import train as supervised_train
from tinker_cookbook.supervised.data import FromConversationFileBuilder
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig
from transformers import AutoTokenizer

MODEL_DIR = os.path.join(os.path.dirname(os.path.abspath(__file__)), "demo-model")
RENDERER = "qwen3_instruct"  # ChatML without thinking
GROUPS, SAMPLES = 12, 8
# the cookbook takes the model's name for a name on the Hugging Face hub, unless it is told otherwise
tokenizer_utils.register_tokenizer(chat.MODEL, lambda: AutoTokenizer.from_pretrained(MODEL_DIR))


def supervised_config(log_dir):
    os.makedirs(log_dir, exist_ok=True)
    path = os.path.join(log_dir, "conversations.jsonl")
    with open(path, "w", encoding="utf-8") as f:
        for question, answer in supervised.LESSONS:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            f.write(json.dumps({"messages": messages}) + "\n")
    common = ChatDatasetBuilderCommonConfig(model_name_for_tokenizer=chat.MODEL, renderer_name=RENDERER,
                                            max_length=256, batch_size=len(supervised.LESSONS))
    return supervised_train.Config(
        log_path=log_dir, model_name=chat.MODEL, recipe_name="demo_supervised", renderer_name=RENDERER,
        dataset_builder=FromConversationFileBuilder(file_path=path, common_config=common),
        learning_rate=4e-3, lr_schedule="constant", num_epochs=15, lora_rank=16, save_every=5, eval_every=0)


class Subtraction(ProblemEnv):
    def __init__(self, a, b, renderer):
        super().__init__(renderer, format_coef=0.0)
        self.a, self.b = a, b

    def get_question(self):
        return f"What is {self.a} - {self.b}?"

    def get_reference_answer(self):
        return str(self.a - self.b)

    def check_answer(self, sample_str):
        return sample_str == self.get_reference_answer()

    def check_format(self, sample_str):
        return True


class Subtractions(RLDataset):
    def __init__(self, n_batches):
        self.n_batches = n_batches
        self.renderer = renderers.get_renderer(RENDERER, tokenizer_utils.get_tokenizer(chat.MODEL))

    def __len__(self):
        return self.n_batches

    def get_batch(self, index):
        pairs = [(2 + (7 * i) % 8, i) for i in range(index * GROUPS, (index + 1) * GROUPS)]
        return [ProblemGroupBuilder(env_thunk=partial(Subtraction, a, i % (a + 1), self.renderer), num_envs=SAMPLES)
                for a, i in pairs]


@chz.chz
class SubtractionsBuilder(RLDatasetBuilder):
    n_batches: int

    async def __call__(self):
        return Subtractions(self.n_batches), None


def rl_config(log_dir):
    return rl_train.Config(
        log_path=log_dir, model_name=chat.MODEL, recipe_name="demo_rl", renderer_name=RENDERER,
        dataset_builder=SubtractionsBuilder(n_batches=15), learning_rate=2e-3, lora_rank=16, max_tokens=16,
        loss_fn="ppo", save_every=10, eval_every=0)


if __name__ == "__main__":
    loop, log_dir = sys.argv[1:]
    if loop == "supervised":
        asyncio.run(supervised_train.main(supervised_config(log_dir)))
    else:
        asyncio.run(rl_train.main(rl_config(log_dir)))
