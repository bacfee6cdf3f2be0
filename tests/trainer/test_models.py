"""The roles over bases of other families, tied embeddings or not, with and without a pad token."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from tests.tiny_model import make_model
from trainer.models import POLICY, Batch, Roles
from trainer.publish import save_adapter
from trainer.rollouts import Sampler

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama, tied": LlamaConfig(vocab_size=384, tie_word_embeddings=True, **SMALL),
    "qwen2": Qwen2Config(vocab_size=384, num_key_value_heads=1, tie_word_embeddings=False, **SMALL),
    "mistral": MistralConfig(vocab_size=384, num_key_value_heads=1, **SMALL),
    "gpt2, tied": GPT2Config(vocab_size=384, n_embd=64, n_layer=2, n_head=2),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_a_base_of_any_family_can_be_read_sampled_trained_and_saved(family: str, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(base)
    torch.manual_seed(0)
    config = CONFIGS[family]
    config.eos_token_id, config.bos_token_id = tokenizer.eos_token_id, None
    AutoModelForCausalLM.from_config(config).save_pretrained(base)

    roles = Roles.load(base, rank=4)
    prompt = roles.prompt_ids([{"role": "user", "content": "lemon?"}])
    batch = Batch.collate([(prompt, roles.reply_ids("yes")), (prompt, [40])], roles.pad_id, roles.device)
    before = roles.read(batch).logprobs
    assert torch.isfinite(before).all()

    optimizer = torch.optim.Adam(roles.policy_parameters(), lr=3e-3)
    for _ in range(5):
        (-roles.logprobs(batch).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = roles.logprobs(batch).detach()
    assert after.sum() > before.sum()
    assert torch.equal(roles.read(batch).logprobs, before), "the anchor moved"

    with roles.acting_as(POLICY):
        rollouts = Sampler(roles.end_ids, max_tokens=4).sample(
            roles.model, [prompt], torch.Generator().manual_seed(0)
        )
    assert 1 <= len(rollouts[0].reply_ids) <= 4

    save_adapter(roles, tmp_path / "policy")
    again = Roles.load(base, rank=4, parent=tmp_path / "policy")
    torch.testing.assert_close(again.logprobs(batch).detach(), after)
