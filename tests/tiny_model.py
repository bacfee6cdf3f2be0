"""A causal LM small enough to make on the fly: random weights, a byte-level BPE tokenizer, a template.

It talks nonsense, which is all that tests of the service need; nothing here is trained.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128,
}  # fmt: skip
WINDOW = {"sliding_window": 8}  # shorter than prompts, so that it matters
GEMMA = SMALL | WINDOW | {"head_dim": 16, "query_pre_attn_scalar": 16}
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, SMALL),
    "qwen2": (Qwen2Config, SMALL),
    "qwen3": (Qwen3Config, SMALL | {"head_dim": 16}),
    "mistral": (MistralConfig, SMALL | WINDOW),
    "gemma2": (Gemma2Config, GEMMA | {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 0.5}),
    "gemma3": (Gemma3TextConfig, GEMMA | {"sliding_window_pattern": 2}),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}),
    "granite": (GraniteConfig, SMALL | {"logits_scaling": 4.0}),
    "cohere": (CohereConfig, SMALL | {"logit_scale": 0.25}),
}
"""Small ones, in which what sets a family apart is large enough to be seen."""
CONSTANT, END_WEIGHT = 30.0, 2.3
"""With these a reply has some dozens of tokens."""
PROBE = [[5, 9, 40, 41, 12, 77, 60], [3, 70, 71, 80, 1, 4, 33, 90]]


def make_model(folder: Path, *, ends: bool = False, tied: bool = False) -> Path:
    """Write a Hugging Face model folder (two layers, hidden 128, head size 64, its embeddings tied or not).

    It hardly ever ends a reply, or, with `ends`, at any token with a probability of some percent.
    """
    tokenizer = _make_tokenizer()
    tokenizer.save_pretrained(folder)
    model = LlamaForCausalLM(_config(len(tokenizer), tied))
    with torch.no_grad():
        model.lm_head.weight[model.config.eos_token_id] = 0
        if ends:
            _end_often(model)
    model.save_pretrained(folder)
    return folder


def _end_often(model: LlamaForCausalLM) -> None:
    """Of the hidden state, one channel is the same for all tokens, and only the end's logit reads it."""
    model.model.embed_tokens.weight[:, 0] = CONSTANT
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    model.lm_head.weight[:, 0] = 0
    model.lm_head.weight[model.config.eos_token_id, 0] = END_WEIGHT


def make_family(folder: Path, family: str, *, tied: bool = True, padded: bool = True) -> Path:
    """Write a model folder of a family in `FAMILIES`, with its embeddings tied or not, with a pad token or without one."""
    tokenizer = _make_tokenizer()
    if family.startswith(
        "gemma"
    ):  # as Gemma's own: what ends a reply is not what the tokenizer calls the end
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    if not padded:
        tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    kind, settings = FAMILIES[family]
    ends = sorted({tokenizer.eos_token_id, SPECIAL.index("<|end|>")})
    torch.manual_seed(0)
    config = kind(
        **settings, vocab_size=len(tokenizer), tie_word_embeddings=tied, initializer_range=0.2,
        bos_token_id=None, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def _make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["what colour is a lemon? a lemon is yellow."] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", chat_template=TEMPLATE
    )


def _config(vocab_size: int, tied: bool) -> LlamaConfig:
    torch.manual_seed(0)
    return LlamaConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=64, max_position_embeddings=1024,
        eos_token_id=1, pad_token_id=0,
        tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip


def make_policy(
    folder: Path,
    base: Path,
    *,
    seed: int,
    scale: float = 0.3,
    merged: bool = False,
    adapted: Sequence[str] = ("q_proj", "v_proj", "down_proj"),
) -> Path:
    """Write a policy folder as the trainer does: a random adapter, a manifest with a true probe, READY.

    merged: with the whole model, merged by PEFT. adapted: how the names end of what has an adapter, beside output embeddings.
    """
    torch.manual_seed(seed)
    plain = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    outputs = [] if plain.config.tie_word_embeddings else ["lm_head"]
    model = get_peft_model(
        plain,
        LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=[*adapted, *outputs],
            task_type="CAUSAL_LM",
        ),
    ).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    model.save_pretrained(folder, save_embedding_layers=False)  # else PEFT adds the base's own
    (folder / "README.md").unlink()
    probe = [make_probe(model, ids) for ids in PROBE]
    if merged:
        model.merge_and_unload().save_pretrained(folder / "merged")
    files = [path for path in folder.rglob("*") if path.is_file()]
    manifest = {
        "name": folder.name,
        "parent": "policy-000000",
        "files": {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        },
        "probe": probe,
        "probe_tolerance": 0.2,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "READY").touch()
    return folder


def make_probe(model: PeftModel, ids: list[int]) -> dict[str, object]:
    """What the policy gives each token, and what the base does."""
    with model.disable_adapter():
        base = read_logprobs(model, ids)
    return {"token_ids": ids, "logprobs": read_logprobs(model, ids), "base_logprobs": base}


def read_logprobs(model: torch.nn.Module, ids: list[int]) -> list[float | None]:
    """Of each token after those before it, by the model's whole forward on this one sequence; null for the first."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    scores = torch.log_softmax(logits.float(), dim=-1)
    return [None, *(float(scores[i, token]) for i, token in enumerate(ids[1:]))]
