"""One copy of the base weights, and the roles that share it: policy, reference, reward model, value.

The policy is a LoRA adapter over the frozen base. The reference is the anchor: the base with the adapter off, or, where demonstrations
made another anchor, that one's adapter, loaded beside the policy's and frozen. Reward models and value are scalar heads on the
reference's hidden states: one pass of the reference serves all three, and a few hundred votes cannot bend the features that
they are read from. With full fine-tuning policy and reference are two whole models instead: see `whole.py`.

Legend: B sequences, L tokens of prompt and reply together, V vocabulary, H hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from service.settings import Tuning
from service.tables import Message
from trainer.batches import Batch, Reading
from trainer.consensus import Consensus
from trainer.passes.attention import use_short_attention
from trainer.passes.last_layer import last_layer_at
from trainer.passes.layers import find_frozen_layers, recorded, skipped
from trainer.passes.lora import adapter_config
from trainer.passes.norm import use_one_step_norms
from trainer.passes.shapes import LENGTH, choose_places, round_up

HALF_A_CHARACTER = "\ufffd"
"""What tokens decode to that are part of one."""
MOST_BYTES = 4
"""Of a character in UTF-8."""
LEAST_MOMENT = 0.01
"""Added to the second moment of embeddings, as a share of its mean: a direction that no word has is not blown up."""
POLICY = "policy"
REFERENCE = "reference"
BASE_MODEL = "base"
"""What every policy began as, whatever the anchor is."""
ANCHOR = "anchor"
"""Name of the anchor's adapter, where it has one."""


@cache
def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device is faster with it, and else float32: emulated, it takes a CPU two to three times as long.

    Intel's AVX-512 has an instruction, but multiplies matrices with it at 76 G/s where float32 has 130; its AMX is what is fast.
    """
    if device.type != "cpu":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        can = torch.cpu.get_capabilities()
        by_vectors = can.get("avx512_bf16") and "Intel" not in can.get("cpu_name", "")
        faster = bool(can.get("amx_bf16") or can.get("bf16") or by_vectors)
    return torch.bfloat16 if faster else torch.float32


class Origin(NamedTuple):
    """What roles are loaded from."""

    base: str | Path
    rank: int
    """Of a new adapter."""
    parent: Path | None = None
    """Folder of the policy that this one begins as; None: the base, with a new adapter that changes nothing yet."""
    anchor: Path | None = None
    """Folder of the policy that the reference is; None: the base."""
    tuning: Tuning = "lora"
    """`full`: see `whole.py`, whose `load_roles` is for both."""
    layers: float = 1.0
    """Share of the base's layers, the last ones, that a new adapter is on."""


class Roles(nn.Module):
    """The base with the policy's adapter, which is kept in float32 and computed in `compute_dtype` (autocast)."""

    def __init__(
        self, model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, origin: Origin
    ) -> None:
        super().__init__()
        self.model = model
        """Computes as `acting_as` says."""
        self.tokenizer = tokenizer
        self.origin = origin
        self.consensus = Consensus()
        """What the anchor says when it is surest; empty until it is asked (`features.ask_consensus`)."""
        self._pieces: dict[tuple[int, ...], str] = {}

    @staticmethod
    def load(
        base: str | Path,
        rank: int,
        parent: Path | None = None,
        anchor: Path | None = None,
        device: torch.device | None = None,
        layers: float = 1.0,
    ) -> "Roles":
        """As in `Origin`."""
        device = device or torch.get_default_device()
        model = AutoModelForCausalLM.from_pretrained(base, dtype=compute_dtype(device))
        use_cheap_passes(model)
        tokenizer = AutoTokenizer.from_pretrained(base)
        config = adapter_config(model, rank, parent, layers)
        if parent is None:
            peft = get_peft_model(model, config, adapter_name=POLICY, autocast_adapter_dtype=True)
        else:
            peft = PeftModel.from_pretrained(
                model, parent, adapter_name=POLICY, is_trainable=True, config=config
            )
        if anchor is not None:
            peft.load_adapter(str(anchor), adapter_name=ANCHOR)
            peft.set_adapter(POLICY)
        return Roles(peft, tokenizer, Origin(base, rank, parent, anchor, layers=layers)).eval().to(device)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def context_tokens(self) -> int:
        """Longest prompt and reply together."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 20))

    @property
    def pad_id(self) -> int:
        """What fills the right of a batch: never attended to, so any token serves.

        Not the tokenizer's pad token: there may be none, or one that was added later, which the model has no embedding for.
        """
        return self.end_ids[0]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a reply."""
        configured = self.model.generation_config.eos_token_id
        ids = configured if isinstance(configured, list) else [configured]
        found = {int(token) for token in (*ids, self.tokenizer.eos_token_id) if token is not None}
        if not found:
            raise ValueError("The tokenizer names no end-of-sequence token: a reply could never end.")
        return tuple(sorted(found, key=lambda token: token != self.tokenizer.eos_token_id))

    @cached_property
    def reply_end_id(self) -> int:
        """Of the end tokens the one that the chat template puts after a reply; the tokenizer's own where it puts none.

        They differ in Gemma: its tokenizer ends texts with one token, and its template replies with another.
        """
        question: Message = {"role": "user", "content": "?"}
        prompt = self.prompt_ids([question])
        whole: list[int] = self.tokenizer.apply_chat_template(
            [question, {"role": "assistant", "content": "!"}], return_dict=False
        )
        both = zip(prompt, whole, strict=False)
        start = next((place for place, (one, other) in enumerate(both) if one != other), len(prompt))
        return next((token for token in whole[start:] if token in self.end_ids), self.end_ids[0])

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt as the engine sees it: the chat template with the opening of the reply."""
        ids: list[int] = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False
        )
        return ids

    def reply_ids(self, text: str) -> list[int]:
        """A finished reply: its tokens and the end token."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, self.reply_end_id]

    def batch(self, sequences: Sequence[tuple[list[int], list[int]]]) -> Batch:
        """Of (prompt ids, reply ids), padded to a round length where the context has room for it."""
        longest = max(len(prompt) + len(reply) for prompt, reply in sequences)
        least = min(round_up(longest, LENGTH), self.context_tokens)
        return Batch.collate(sequences, self.pad_id, self.device, least)

    def decode(self, reply_ids: list[int]) -> str:
        """A reply as text, without its end token."""
        text: str = self.tokenizer.decode(reply_ids, skip_special_tokens=True)
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token's text, as it is within a text; a character that several make is the last one's. Empty for special tokens."""
        found: list[str] = []
        held: tuple[int, ...] = ()
        for token in ids:
            held = (*held, token)
            text = self._piece(held)
            whole = not text.endswith(HALF_A_CHARACTER) or len(held) == MOST_BYTES
            found.append(text if whole else "")
            held = () if whole else held
        return found

    def _piece(self, ids: tuple[int, ...]) -> str:
        """Some tokenizers leave out a first token's space, and so another one goes before."""
        if ids not in self._pieces:
            [*_, before] = self.tokenizer("a", add_special_tokens=False)["input_ids"]
            self._pieces[ids] = self.decode([before, *ids]).removeprefix(self.decode([before]))
        return self._pieces[ids]

    @property
    def language_model(self) -> PreTrainedModel:
        """`model` without what wraps it."""
        return self.model.get_base_model()

    def policy_weights(self) -> dict[str, nn.Parameter]:
        """All that training changes, by name: the adapter."""
        return {name: weights for name, weights in self.model.named_parameters() if f".{POLICY}." in name}

    def policy_parameters(self) -> list[nn.Parameter]:
        """`policy_weights` without their names."""
        return list(self.policy_weights().values())

    def policy_state(self) -> dict[str, Tensor]:
        """A copy of `policy_weights`."""
        return {name: weights.detach().cpu().clone() for name, weights in self.policy_weights().items()}

    def is_finite(self) -> bool:
        """Whether every weight that training changes is a number."""
        return all(bool(weights.isfinite().all()) for weights in self.policy_parameters())

    @torch.no_grad()
    def load_policy_state(self, state: dict[str, Tensor]) -> None:
        """Puts a copy taken by `policy_state` back."""
        parameters = self.policy_weights()
        for name, value in state.items():
            parameters[name].copy_(value)

    @contextmanager
    def acting_as(self, role: str) -> Iterator[None]:
        """Within it `model` computes as the policy, the reference or the base."""
        bfloat16 = compute_dtype(self.device) is torch.bfloat16
        with self._switched_to(role), torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            yield

    def _switched_to(self, role: str) -> AbstractContextManager[None]:
        if role == POLICY:
            return nullcontext()
        if role == BASE_MODEL or self.origin.anchor is None:
            without_adapter: AbstractContextManager[None] = self.model.disable_adapter()
            return without_adapter
        return self._switched_to_anchor()

    @contextmanager
    def _switched_to_anchor(self) -> Iterator[None]:
        self.model.set_adapter(ANCHOR, inference_mode=True)
        try:
            yield
        finally:
            self.model.set_adapter(POLICY)

    def logprobs(
        self, batch: Batch, temperature: float = 1.0, role: str = POLICY, lower: Tensor | None = None
    ) -> Tensor:
        """[B, L] the policy's (or another's) log-probability of each reply token given all before it; 0.0 elsewhere.

        The vocabulary is computed at the reply's tokens alone. Logits are divided by the sampling temperature first. lower: as in
        `Reading`, of this batch.
        """
        with self.acting_as(role), skipped(self._frozen_layers, lower):
            _, logits, places = self._forward(batch)
            logprobs = _TokenLogprobs.apply(logits, _chosen(batch, places), temperature)  # type: ignore[no-untyped-call]
            return _at_reply(batch, places, logprobs)

    @torch.no_grad()
    def read(self, batch: Batch, temperature: float = 1.0) -> Reading:
        """One pass of the reference: all that reference, reward models and value need of a batch."""
        with self.acting_as(REFERENCE), recorded(self._frozen_layers) as lower:
            states, logits, places = self._forward(batch)
            of_all = _log_softmax(logits, temperature)
            logprobs = of_all.gather(-1, _chosen(batch, places)[:, None])[:, 0]
            entropy = -of_all.exp().mul_(of_all).sum(-1)
            surprise = (-logprobs - entropy).clamp(min=0.0)
            words = self.model.get_input_embeddings()(batch.ids)
        return Reading(
            words.float() @ self._spread_words,
            states.float(),
            _at_reply(batch, places, logprobs),
            _at_reply(batch, places, surprise),
            self._read_said(batch),
            lower[0] if lower else None,
        )

    @cached_property
    def _frozen_layers(self) -> list[nn.Module]:
        """The same in every role."""
        return find_frozen_layers(self.language_model.base_model)

    @cached_property
    def _spread_words(self) -> Tensor:
        """[H, H] what embeddings are multiplied by so that their second moment over the vocabulary is the identity.

        Embeddings of one direction would else drown all others, and unlike words look alike.
        """
        with self.acting_as(REFERENCE):
            table = self.model.get_input_embeddings().weight.detach().float()
        moment = table.T @ table / len(table)
        moment.diagonal().add_(LEAST_MOMENT * moment.diagonal().mean())
        root = torch.linalg.cholesky(moment)
        spread: Tensor = torch.linalg.inv(root).T
        return spread

    def _read_said(self, batch: Batch) -> Tensor:
        """[B, L] as in `Reading`."""
        length = batch.ids.shape[1]
        rows = []
        for ids, mask in zip(batch.ids.tolist(), batch.reply_mask.tolist(), strict=True):
            start = mask.index(1.0) if 1.0 in mask else length
            end = start + int(sum(mask))
            said = self.consensus.read(ids[:start], self.pieces(ids[start:end])) if end > start else []
            rows.append([0.0] * start + said + [0.0] * (length - end))
        return torch.tensor(rows, device=self.device)

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, H] last hidden states as in `Reading`, and [n, V] logits with the [n] places in the flattened batch that they are of.

        The logits are the model's own, since families scale or cap them (Gemma, Granite, Cohere): on the way from its backbone to
        its output embeddings all states but those that the reply's tokens were chosen from are taken away, n in all.
        """
        model = self.language_model
        reply = batch.reply_mask.bool()
        before = functional.pad(reply[:, 1:], (0, 1))  # [B, L] the tokens that the reply's are chosen from
        places = choose_places(before)
        all_states: list[Tensor] = []

        def keep_places(_: nn.Module, __: tuple[Any, ...], output: ModelOutput) -> ModelOutput:
            all_states.append(output.last_hidden_state)
            output.last_hidden_state = all_states[0].flatten(0, 1)[places][None]  # (1, n, H)
            return output

        at_reply = last_layer_at(model.base_model, choose_places(before | reply), batch.ids.shape)
        with at_reply, model.base_model.register_forward_hook(keep_places):
            logits: Tensor = model(input_ids=batch.ids, use_cache=False).logits[0]
        return all_states[0], logits, places


def _chosen(batch: Batch, places: Tensor) -> Tensor:
    """[n] the token that was chosen at each place."""
    return batch.ids.flatten().roll(-1)[places]


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """[n, V] in float32."""
    scaled = logits if temperature == 1.0 else logits / temperature
    return scaled.log_softmax(-1, dtype=torch.float32)


def _at_reply(batch: Batch, places: Tensor, values: Tensor) -> Tensor:
    """[B, L] each value at the token that was chosen at its place; 0.0 elsewhere. values: (n,)."""
    spread = values.new_zeros(batch.ids.numel()).index_copy(0, places, values).roll(1)
    return spread.view(batch.ids.shape) * batch.reply_mask


def use_cheap_passes(model: PreTrainedModel) -> None:
    """What of `passes/` a model is given once, for good."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        # Gemma 2: faster attention leaves the cap out, without a word; the engine does not.
        model.set_attn_implementation("eager")
    use_short_attention(model)
    use_one_step_norms(model)


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(logits / temperature) at one token a row, in float32. What backward keeps is the softmax's size once, not thrice."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """logits: (N, V), targets: (N,); returns (N,)."""
        logprobs = _log_softmax(logits, temperature)
        ctx.save_for_backward(logprobs, targets)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return logprobs.gather(-1, targets[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logprobs, targets = ctx.saved_tensors
        share = grad[:, None] / ctx.temperature
        grad_logits = logprobs.exp().mul_(-share)
        grad_logits.scatter_add_(-1, targets[:, None], share)
        return grad_logits.to(ctx.dtype), None, None
