"""The recipe: repeatable, whole or not at all, and its counted baselines by hand. How well it learns is `make up`'s to show."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from trainer import starter
from trainer.guard import load_guards
from trainer.publish import sha256_of
from trainer.starter import Recipe

SMALL = Recipe(
    seed=7, vocabulary=400, hidden=64, layers=1, feed_forward=64, documents=200, pretrain_steps=12, pretrain_batch=4,
    demonstrations=64, sft_steps=6, sft_batch=8,
)  # fmt: skip


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    console = Console(quiet=True)
    reports = [starter.build(tmp_path / name, SMALL, console) for name in ("one", "two")]
    one, two = (sha256_of(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one == two
    assert reports[0].pretrain_loss == reports[1].pretrain_loss
    assert json.loads((tmp_path / "one" / "starter.json").read_text())["recipe"]["seed"] == 7
    assert not list(tmp_path.glob("*.partial"))

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert not AutoModelForCausalLM.from_pretrained(tmp_path / "one").config.tie_word_embeddings
    text = "héllo 😀 <b>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|user|>hi<|end|><|assistant|>yo<|end|>"

    guards = load_guards(None, tmp_path / "one")
    assert len(guards) == 300
    assert not guards[0].passes("")


def test_short_replies_are_learnt_to_be_as_likely_as_they_are_shown() -> None:
    end, prompt, short, long = 1, 2, 3, 4
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<|pad|>": 0, "<|end|>": end})), pad_token="<|pad|>", eos_token="<|end|>"
    )  # fmt: skip
    recipe = Recipe(vocabulary=5, hidden=32, head_dim=32, layers=1, feed_forward=32)
    torch.manual_seed(0)
    model = starter.new_model(tokenizer, recipe)
    replies = [short, end], [*[long] * 24, end]
    batches = [
        (torch.tensor([[prompt, *reply]] * 4), torch.tensor([[-100, *reply]] * 4)) for reply in replies
    ]
    with starter._progress(Console(quiet=True)) as progress:
        starter._train(model, itertools.cycle(batches), 300, recipe, progress, "")
    first = model(input_ids=torch.tensor([[prompt]])).logits[0, 0].softmax(-1)
    assert first[short].item() == pytest.approx(0.5, abs=0.15)
    assert first[long].item() == pytest.approx(0.5, abs=0.15)


def test_the_loss_is_per_token() -> None:
    assert starter._mean_loss([(3.0, 1), (9.0, 5)]) == pytest.approx(2.0)


def test_counted_perplexities_by_hand() -> None:
    # corpus a b a b: unigram (2 + 1) / (4 + 3) for both; the row's one prediction is b after a
    unigram, bigram = starter.count_perplexities([0, 1, 0, 1], [[0, 1]])
    assert unigram == pytest.approx(7 / 3)
    assert bigram == pytest.approx(1 / (0.9 + 0.1 * 3 / 7))
    assert math.isfinite(starter.count_perplexities([0, 1], [[5, 6]])[0])
