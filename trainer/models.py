"""One copy of the base weights, and the roles that share it: policy, reference, value, reward models.

Each role but the reference is a LoRA adapter over the frozen base; the reference is the base with all adapters off.
Value and reward roles have a scalar head (the policy's architecture with one output instead of a vocabulary).

Legend: B sequences, L tokens of prompt and reply together, V vocabulary, H hidden size.
Sequences are padded on the right: with a causal model nothing real can see the padding, so no attention mask is needed.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from service.tables import Message

POLICY = "policy"
VALUE = "value"
REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class Batch:
    """Token sequences, padded on the right."""

    ids: Tensor
    """[B, L] prompt and reply."""
    reply_mask: Tensor
    """[B, L] 1.0 at the reply's tokens (its end token included), 0.0 at prompt and padding."""
    last: Tensor
    """[B] index of the last real token."""

    @staticmethod
    def collate(pairs: Sequence[tuple[list[int], list[int]]], pad_id: int, device: torch.device) -> "Batch":
        """Of (prompt ids, reply ids)."""
        lengths = [len(prompt) + len(reply) for prompt, reply in pairs]
        longest = max(lengths)
        ids = [p + r + [pad_id] * (longest - n) for (p, r), n in zip(pairs, lengths, strict=True)]
        mask = [
            [0.0] * len(p) + [1.0] * len(r) + [0.0] * (longest - n) for (p, r), n in zip(pairs, lengths, strict=True)
        ]
        return Batch(
            torch.tensor(ids, device=device),
            torch.tensor(mask, device=device),
            torch.tensor(lengths, device=device) - 1,
        )


class Roles(nn.Module):
    """The base with its adapters and heads. Adapters are kept in float32 and computed in bfloat16 (autocast)."""

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, lora: LoraConfig) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.lora = lora
        self.heads = nn.ModuleDict()

    @staticmethod
    def load(base: str | Path, rank: int, parent: Path | None = None) -> "Roles":
        """The base with one adapter, `policy`: that of the parent policy, or a new one that changes nothing yet."""
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(base)
        lora = LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        if parent is None:
            peft = get_peft_model(model, lora, adapter_name=POLICY, autocast_adapter_dtype=True)
        else:
            peft = PeftModel.from_pretrained(model, parent, adapter_name=POLICY, is_trainable=True)
        return Roles(peft, tokenizer, lora).eval()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def pad_id(self) -> int:
        """What fills the right of a batch; never attended to, so any token serves where the tokenizer has none."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.end_ids[0])

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a reply."""
        configured = self.model.generation_config.eos_token_id
        ids = configured if isinstance(configured, list) else [configured]
        found = {int(token) for token in (*ids, self.tokenizer.eos_token_id) if token is not None}
        if not found:
            raise ValueError("The tokenizer names no end-of-sequence token: a reply could never end.")
        return tuple(sorted(found, key=lambda token: token != self.tokenizer.eos_token_id))

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt as the engine sees it: the chat template with the opening of the reply."""
        ids: list[int] = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False
        )
        return ids

    def reply_ids(self, text: str) -> list[int]:
        """A finished reply: its tokens and the end token."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, self.end_ids[0]]

    def add_scalar_role(self, role: str, seed: int) -> None:
        """A new adapter and a scalar head, initialised N(0, 1/(H+1)) as in arXiv:2009.01325."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model.add_adapter(role, self.lora)
            hidden = self.model.config.get_text_config().hidden_size
            head = nn.Linear(hidden, 1, device=self.device)
            nn.init.normal_(head.weight, std=(hidden + 1) ** -0.5)
            nn.init.zeros_(head.bias)
        self.heads[role] = head

    def copy_scalar_role(self, source: str, target: str) -> None:
        """Makes `target` start as `source` is: the value starts from the reward model."""
        self.add_scalar_role(target, seed=0)
        with torch.no_grad():
            for layer in self._lora_layers():
                layer.lora_A[target].load_state_dict(layer.lora_A[source].state_dict())
                layer.lora_B[target].load_state_dict(layer.lora_B[source].state_dict())
        self.heads[target] = copy.deepcopy(self.heads[source])

    def drop_role(self, role: str) -> None:
        """Frees a role's adapter and head."""
        self.model.delete_adapter(role)
        if role in self.heads:
            del self.heads[role]

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        """The trainable weights of a role; marks them as such (PEFT freezes adapters that are not active)."""
        found: list[nn.Parameter] = []
        for layer in self._lora_layers():
            if role in layer.lora_A:
                found += [*layer.lora_A[role].parameters(), *layer.lora_B[role].parameters()]
        if role in self.heads:
            found += list(self.heads[role].parameters())
        for parameter in found:
            parameter.requires_grad_(True)
        return found

    def _lora_layers(self) -> Iterator[LoraLayer]:
        return (module for module in self.model.modules() if isinstance(module, LoraLayer))

    @contextmanager
    def acting_as(self, role: str) -> Iterator[None]:
        """Within it the model computes as that role, in bfloat16."""
        off: AbstractContextManager[None] = self.model.disable_adapter() if role == REFERENCE else nullcontext()
        if role != REFERENCE and self.model.active_adapter != role:
            self.model.base_model.set_adapter(role)
        with off, torch.autocast(self.device.type, torch.bfloat16):
            yield

    def hidden(self, ids: Tensor) -> Tensor:
        """Last hidden states [B, L, H] of the current role."""
        backbone = self.model.get_base_model().base_model
        states: Tensor = backbone(input_ids=ids, use_cache=False).last_hidden_state
        return states

    def logprobs(self, role: str, batch: Batch, temperature: float = 1.0) -> Tensor:
        """[B, L] log-probability of each reply token given all before it; 0.0 elsewhere.

        The vocabulary is computed at the reply's tokens alone. Logits are divided by the sampling temperature first.
        """
        with self.acting_as(role):
            states = self.hidden(batch.ids)
            at_reply = batch.reply_mask[:, 1:].bool()
            logits = self.model.get_output_embeddings()(states[:, :-1][at_reply])  # (tokens, V)
        targets = batch.ids[:, 1:][at_reply]
        flat = -nn.functional.cross_entropy(logits.float() / temperature, targets, reduction="none")
        result = torch.zeros(batch.ids.shape, device=flat.device)
        result[:, 1:][at_reply] = flat
        return result

    def values(self, role: str, batch: Batch) -> Tensor:
        """[B, L] the scalar head at each position. At i it has seen tokens 0..i."""
        with self.acting_as(role):
            states = self.hidden(batch.ids)
        result: Tensor = self.heads[role](states.float())[..., 0]
        return result

    def scores(self, role: str, batch: Batch) -> Tensor:
        """[B] the scalar head at the last real token."""
        with self.acting_as(role):
            states = self.hidden(batch.ids)
        last = states[torch.arange(len(states), device=states.device), batch.last]
        result: Tensor = self.heads[role](last.float())[..., 0]
        return result
