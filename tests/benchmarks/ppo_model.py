"""What the PPO benchmark trains: a Llama with random weights that never ends a reply, and prompts; and what that costs at least."""

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from trainer import world
from trainer.models import compute_dtype
from trainer.passes.layers import count_adapted
from trainer.starter import Recipe, new_model, train_tokenizer

SHORTEST, LONGEST = 16, 48
"""Tokens of a prompt."""
FORBIDDEN = -10.0
"""Weight from the constant channel to the logits of padding and end; the channel is 1 or more after the last norm."""


@dataclass(frozen=True, slots=True)
class Size:
    """Of a model and of a visit to it."""

    name: str
    recipe: Recipe
    samples: int
    minibatch: int


SIZES = (
    Size("2.5 M", Recipe(hidden=256, layers=3, feed_forward=512), samples=128, minibatch=64),
    Size("20 M", Recipe(hidden=512, layers=6, feed_forward=1408), samples=16, minibatch=8),
)


def make_base(folder: Path, recipe: Recipe, num_prompts: int) -> LlamaForCausalLM:
    """Write model, tokenizer and prompts."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    tokenizer = train_tokenizer([world.write_document(rng) for _ in range(1000)], recipe)
    model = new_model(tokenizer, recipe)
    never_end(model, [tokenizer.pad_token_id, tokenizer.eos_token_id])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = range(len(tokenizer.all_special_ids), len(tokenizer))
    prompts = [rng.choices(words, k=rng.randint(SHORTEST, LONGEST)) for _ in range(num_prompts)]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return model


@torch.no_grad()
def never_end(model: LlamaForCausalLM, ids: list[int]) -> None:
    """Make these tokens impossible by weights alone, which every sampler heeds: one channel is the same for every token and large."""
    model.model.embed_tokens.weight[:, 0] = 1.0
    model.lm_head.weight[:, 0] = 0.0
    model.lm_head.weight[ids] = 0.0
    model.lm_head.weight[ids, 0] = FORBIDDEN


@dataclass(frozen=True, slots=True)
class Floor:
    """Floating point operations that training an adapter on the last layers needs, counted from shapes."""

    sampling: float
    reading: float
    """A pass of the reference. The policy's old log-probabilities are the sampler's."""
    updates: float

    @property
    def total(self) -> float:
        """All that a sample needs."""
        return self.sampling + self.reading + self.updates


def count_floor(
    recipe: Recipe, prompt_tokens: float, reply_tokens: int, epochs: int, share: float = 1.0
) -> Floor:
    """Of one sample. Two operations for each weight and token, and attention over what is before a token; logits at replies alone.

    Passes of updates go through the layers with an adapter alone, a share of all. Backward, frozen weights take as much as forward
    (of their inputs alone is there a gradient), and attention twice that. Adapters, norms, softmax, reward and value heads are left
    out: small, or not needed.
    """
    hidden = recipe.hidden
    tokens = prompt_tokens + reply_tokens - 1  # nothing is read from the last one
    products = 2 * (4 * hidden * hidden + 3 * hidden * recipe.feed_forward) * tokens
    attention = 4 * hidden * tokens * (tokens + 1) / 2
    logits = 2 * recipe.vocabulary * hidden * reply_tokens
    forward = recipe.layers * (products + attention) + logits
    update = count_adapted(recipe.layers, share) * (2 * products + 3 * attention) + 2 * logits
    return Floor(sampling=forward, reading=forward, updates=epochs * update)


def measure_matrix_rate(size: int = 2048, repeats: int = 4) -> dict[str, float]:
    """Operations a second of a large matrix product, the best of some: in float32, and in bfloat16 where that is what is faster."""
    dtypes = dict.fromkeys([torch.float32, compute_dtype(torch.device("cpu"))])
    return {str(dtype).removeprefix("torch."): _product_rate(dtype, size, repeats) for dtype in dtypes}


def _product_rate(dtype: torch.dtype, size: int, repeats: int) -> float:
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)
