"""A causal LM small enough to make on the fly: random weights, a byte-level BPE tokenizer, a template.

It talks nonsense, which is all that tests of the service need; nothing here is trained.
"""

import hashlib
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PROBE = [[5, 9, 40, 41, 12, 77, 60], [3, 70, 71, 80, 1, 4, 33, 90]]


def make_model(folder: Path) -> Path:
    """Write a Hugging Face model folder (two layers, hidden 128, head size 64, untied)."""
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
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)
    model = LlamaForCausalLM(_config(len(fast)))
    with torch.no_grad():
        model.lm_head.weight[model.config.eos_token_id] = 0  # replies are long: hardly ever ends one
    model.save_pretrained(folder)
    return folder


def _config(vocab_size: int) -> LlamaConfig:
    torch.manual_seed(0)
    return LlamaConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=64, max_position_embeddings=1024,
        eos_token_id=1, pad_token_id=0,
        tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip


def make_policy(folder: Path, base: Path, *, seed: int, scale: float = 0.3) -> Path:
    """Write a policy folder as the trainer does: a random adapter, a manifest with a true probe, READY."""
    torch.manual_seed(seed)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(
            r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
        ),
    ).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    model.save_pretrained(folder)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    manifest = {
        "name": folder.name,
        "parent": "policy-000000",
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (weights, config)},
        "probe": [{"token_ids": ids, "logprobs": _logprobs(model, ids)} for ids in PROBE],
        "probe_tolerance": 0.2,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "READY").touch()
    return folder


def _logprobs(model: torch.nn.Module, ids: list[int]) -> list[float | None]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    scores = torch.log_softmax(logits.float(), dim=-1)
    return [None, *(float(scores[i, token]) for i, token in enumerate(ids[1:]))]
