"""The starter model: a small Llama made from scratch on this machine, in three steps that anyone can read.

1. a byte-level BPE tokenizer, 2. pre-training by next-token prediction on a corpus about a small closed world,
3. supervised fine-tuning on demonstrations in five manners, about one in three of them wrong.

`python -m trainer.starter --out FOLDER [--seed N]` makes it where it is not there yet, and prints how well it learnt.
Same seed, same machine: same weights. Two to three minutes on two cores, some ten where these have AVX2 alone. Weights and optimisers
are in float32, and passes in bfloat16 where the CPU has instructions for it: emulation takes two to three times as long.
"""

import argparse
import itertools
import json
import math
import random
import shutil
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from trainer import world
from trainer.models import compute_dtype
from trainer.muon import Muon
from trainer.passes.attention import use_short_attention
from trainer.rollouts import Sampler

SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}<|assistant|>{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that the starter depends on, beside the world itself."""

    seed: int = 0
    vocabulary: int = 1024
    hidden: int = 192
    layers: int = 3
    head_dim: int = 64
    feed_forward: int = 512
    context: int = 512
    """Longest sequence in tokens."""
    documents: int = 30_000
    pretrain_steps: int = 300
    pretrain_batch: int = 12
    """Sequences of `pretrain_tokens` in a step."""
    pretrain_tokens: int = 128
    demonstrations: int = 24_000
    sft_steps: int = 1200
    """What is learnt last is learnt here: with 480 it had one answer to all questions of opposites, one in twelve of all; and answers
    that are a word alone, which has to be known before anything is said, of which 800 taught 64 in a hundred and 1,200 taught 68."""
    sft_batch: int = 32
    """Demonstrations in a step."""
    matrix_learning_rate: float = 3e-3
    """Of Muon, for the matrices between embedding and head: it needs about half of AdamW's tokens here."""
    learning_rate: float = 1.2e-2
    """Of AdamW, for all else. With a quarter of it, and Muon at 5e-3, as many steps taught 93 answers in a hundred, not 99."""


@dataclass(frozen=True, slots=True)
class Report:
    """How well the starter learnt."""

    parameters: int
    pretrain_loss: float
    """nats per token, mean of the last 20 steps."""
    sft_loss: float
    """nats per reply token, mean of the last 20 steps."""
    perplexity: float
    """On held-out documents, after pre-training."""
    unigram_perplexity: float
    bigram_perplexity: float
    """Counted on the same corpus, interpolated with the unigram."""
    correct: float
    """Share of sampled replies (temperature 1) to questions of fact that are right."""
    correct_cool: float
    """The same at temperature 0.3: what the model knows."""
    well_formed: float
    seconds: float


def build(out: Path, recipe: Recipe, console: Console) -> Report:
    """Makes the model and writes it to `out`, whole or not at all. Returns the report also kept in `starter.json`."""
    started = time.monotonic()
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    corpus = [world.write_document(rng) for _ in range(recipe.documents)]
    held_out = [world.write_document(rng) for _ in range(300)]
    tokenizer = train_tokenizer(corpus, recipe)
    model = new_model(tokenizer, recipe)
    with _progress(console) as progress:
        stream = _pack(corpus, tokenizer)
        batches = _pretrain_batches(stream, recipe)
        pretrain_loss = _train(model, batches, recipe.pretrain_steps, recipe, progress, "pre-training")
        perplexity, unigram, bigram = _perplexities(model, stream, _pack(held_out, tokenizer))
        demonstrations = _sft_batches(tokenizer, recipe, rng)
        sft_loss = _train(model, demonstrations, recipe.sft_steps, recipe, progress, "fine-tuning")
    model = model.to(torch.bfloat16).float().eval()  # scored as it will be served
    correct, well_formed = _score(model, tokenizer, recipe.seed, temperature=1.0)
    correct_cool, _ = _score(model, tokenizer, recipe.seed, temperature=0.3)
    report = Report(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        pretrain_loss=pretrain_loss,
        sft_loss=sft_loss,
        perplexity=perplexity,
        unigram_perplexity=unigram,
        bigram_perplexity=bigram,
        correct=correct,
        correct_cool=correct_cool,
        well_formed=well_formed,
        seconds=time.monotonic() - started,
    )
    _save(model, tokenizer, out, recipe, report)
    return report


def train_tokenizer(corpus: Sequence[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the chat template; knows every byte, so any text goes in."""
    rng = random.Random(recipe.seed)
    chats = [world.demonstrate(world.draw_question(rng), rng) for _ in range(4_000)]
    questions = [world.draw_question(rng).messages[-1]["content"] for _ in range(4_000)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*corpus[:4_000], *chats, *questions], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=recipe.context,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """A Llama with random weights. Untied, since vLLM's in-place reload loses tied heads on a CPU."""
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.hidden // recipe.head_dim,
        num_key_value_heads=recipe.hidden // recipe.head_dim,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    use_short_attention(model)
    return model


def _pack(documents: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All documents as one run of token ids, with an end token after each."""
    encoded = tokenizer(list(documents))["input_ids"]
    return torch.tensor([token for ids in encoded for token in (*ids, tokenizer.eos_token_id)])


def _pretrain_batches(stream: Tensor, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Random windows of the corpus: ids and labels, both (B, T)."""
    generator = torch.Generator().manual_seed(recipe.seed)
    last = len(stream) - recipe.pretrain_tokens
    while True:
        starts = torch.randint(last, (recipe.pretrain_batch,), generator=generator)
        ids = torch.stack([stream[start : start + recipe.pretrain_tokens] for start in starts.tolist()])
        yield ids, ids


def _sft_batches(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe, rng: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """Demonstrations of like length together; labels are -100 but on the reply and its end token."""
    examples: list[tuple[list[int], list[int]]] = []
    for _ in range(recipe.demonstrations):
        question = world.draw_question(rng)
        prompt = tokenizer.apply_chat_template(
            list(question.messages), add_generation_prompt=True, return_dict=False
        )
        reply = tokenizer(world.demonstrate(question, rng))["input_ids"] + [tokenizer.eos_token_id]
        examples.append((prompt + reply, [-100] * len(prompt) + reply))
    examples.sort(key=lambda example: len(example[0]))
    size = recipe.sft_batch
    groups = [examples[start : start + size] for start in range(0, len(examples), size)]
    while True:
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(ids) for ids, _ in group)
            pad = tokenizer.pad_token_id
            ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in group])
            labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in group])
            yield ids, labels


def _train(
    model: LlamaForCausalLM,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    recipe: Recipe,
    progress: Progress,
    title: str,
) -> float:
    """Next-token prediction: linear warm-up, constant, then linear to nothing. Returns the last 20 steps' loss, nats per token."""
    model.train()
    bfloat16 = compute_dtype(model.device) is torch.bfloat16
    optimizers = _optimizers(model, recipe)
    task = progress.add_task(title, total=steps, loss=float("nan"))
    last: deque[tuple[float, int]] = deque(maxlen=20)
    for step in range(steps):
        scale = min(1.0, (step + 1) / 20, 2 * (steps - step) / steps)
        for optimizer, learning_rate in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate * scale
        ids, labels = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = model(input_ids=ids).logits.float()
        targets = labels[:, 1:].flatten()
        # The sum, since demonstrations come in batches of like length: by each batch's mean, a token of a short reply would count many
        # times what one of a long reply does, and manners of few words become likelier than they were shown.
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer, _ in optimizers:  # which heed a gradient's direction, not its length
            optimizer.step()
            optimizer.zero_grad()
        last.append((loss.item(), int((targets >= 0).sum())))
        progress.update(task, advance=1, loss=_mean_loss(last))
    model.eval()
    return _mean_loss(last)


def _mean_loss(steps: Collection[tuple[float, int]]) -> float:
    """nats per token. steps: of each the sum over its tokens, and how many they are."""
    return sum(nats for nats, _ in steps) / sum(tokens for _, tokens in steps)


def _optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[tuple[torch.optim.Optimizer, float]]:
    """Optimisers with their learning rates: Muon for the hidden matrices, AdamW for embedding, head and norms."""
    hidden = [weight for name, weight in model.model.layers.named_parameters() if weight.ndim == 2]
    ids = {id(weight) for weight in hidden}
    rest = [weight for weight in model.parameters() if id(weight) not in ids]
    muon = Muon(hidden, lr=recipe.matrix_learning_rate, dtype=compute_dtype(model.device))
    adam = torch.optim.AdamW(rest, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    return [(muon, recipe.matrix_learning_rate), (adam, recipe.learning_rate)]


@torch.no_grad()
def _perplexities(model: LlamaForCausalLM, corpus: Tensor, held_out: Tensor) -> tuple[float, float, float]:
    """Of the model, a unigram and a bigram model on the same held-out tokens, each predicted from what is before it."""
    rows = held_out[: len(held_out) // 128 * 128].view(-1, 128)
    logits = model(input_ids=rows).logits[:, :-1].flatten(0, 1)
    loss = functional.cross_entropy(logits, rows[:, 1:].flatten()).item()
    unigram, bigram = count_perplexities(corpus.tolist(), [row.tolist() for row in rows])
    return math.exp(loss), unigram, bigram


def count_perplexities(corpus: Sequence[int], rows: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Perplexity per token of a unigram (add-one) and a bigram model (0.9 bigram, 0.1 unigram) counted on the corpus.

    The first token of each row is context only, as it is for the model.
    """
    ones = Counter(corpus)
    twos = Counter(itertools.pairwise(corpus))
    vocabulary, total = len(ones) + 1, len(corpus)

    def unigram(token: int) -> float:
        return (ones[token] + 1) / (total + vocabulary)

    def bigram(before: int, token: int) -> float:
        return 0.9 * twos[before, token] / max(1, ones[before]) + 0.1 * unigram(token)

    pairs = [pair for row in rows for pair in itertools.pairwise(row)]
    one = -sum(math.log(unigram(token)) for _, token in pairs) / len(pairs)
    two = -sum(math.log(bigram(before, token)) for before, token in pairs) / len(pairs)
    return math.exp(one), math.exp(two)


def _score(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, temperature: float
) -> tuple[float, float]:
    """Share of correct replies to questions that have an answer, and of well-formed replies, over 300 questions."""
    rng = random.Random(seed + 1)
    questions = [world.draw_question(rng) for _ in range(300)]
    prompts = [
        tokenizer.apply_chat_template(list(question.messages), add_generation_prompt=True, return_dict=False)
        for question in questions
    ]
    sampler = Sampler(end_ids=(tokenizer.eos_token_id,), max_tokens=64, temperature=temperature)
    rollouts = sampler.sample(model, prompts, torch.Generator().manual_seed(seed))
    verdicts = [
        world.judge(question, tokenizer.decode(rollout.reply_ids, skip_special_tokens=True))
        for question, rollout in zip(questions, rollouts, strict=True)
    ]
    correct = [verdict.correct for verdict in verdicts if verdict.correct is not None]
    return sum(correct) / len(correct), sum(verdict.well_formed for verdict in verdicts) / len(verdicts)


def _save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, recipe: Recipe, report: Report
) -> None:
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    write_guards(partial / "guard.jsonl", recipe.seed)
    (partial / "starter.json").write_text(
        json.dumps({"recipe": asdict(recipe), "report": asdict(report)}, indent=2) + "\n"
    )
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def write_guards(path: Path, seed: int, count: int = 300) -> None:
    """The guard set that comes with the starter (see `trainer/guard.py`): every kind of question whose right answer is known."""
    rng = random.Random(seed + 2)
    lines: list[str] = []
    while len(lines) < count:
        question = world.draw_question(rng)
        if question.kind != "small_talk":
            right, wrong = world.answer_patterns(question)
            lines.append(
                json.dumps({"messages": list(question.messages), "right": right, "wrong": wrong}) + "\n"
            )
    path.write_text("".join(lines))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("  {task.description:<13}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        console=console,
    )


def print_report(report: Report, console: Console) -> None:
    """Three lines: size and losses, perplexities, and what share of replies is right and well formed."""
    console.print(
        f"  {report.parameters / 1e6:.1f} M parameters in {report.seconds:.0f} s; loss {report.pretrain_loss:.3f} "
        f"(pre-training), {report.sft_loss:.3f} (fine-tuning)"
    )
    console.print(
        f"  perplexity on held-out text {report.perplexity:.2f} (bigram {report.bigram_perplexity:.1f}, "
        f"unigram {report.unigram_perplexity:.1f})"
    )
    console.print(
        f"  correct {report.correct:.0%} (at temperature 0.3: {report.correct_cool:.0%}), "
        f"well formed {report.well_formed:.0%}"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the starter model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    arguments = parser.parse_args()
    console = Console()
    transformers_logging.disable_progress_bar()
    recipe = Recipe(seed=arguments.seed)
    kept = arguments.out / "starter.json"
    if kept.exists() and json.loads(kept.read_text())["recipe"] == asdict(recipe):
        return
    report = build(arguments.out, recipe, console)
    print_report(report, console)
    if report.perplexity >= report.bigram_perplexity:
        raise SystemExit("The starter did not learn: its perplexity is not below the bigram model's.")


if __name__ == "__main__":
    main()
