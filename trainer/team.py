"""The processes that train one policy together, one to a device: who this one is, and what all of them know at once.

`accelerate launch` (or `torchrun`) starts them. The first leads: it alone reads votes, writes files and rows, and decides. Started
otherwise there is one process, which leads nobody, and to which every call here gives back what it was given.

Tensors are summed where they are, by NCCL on GPUs and by gloo on CPUs; all else goes by gloo. Called by `ppo.py` and `followers.py`.
"""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
WAIT = timedelta(days=24)
"""How long a process waits for the others, which may wait for votes; then all end (torch counts milliseconds, in 31 bits). That one
has died is noticed at once, by its connections."""


class Parted(BaseException):
    """The processes cannot reach each other any more. No `Exception`, since the cycle has not failed: it is taken up again."""


@dataclass(slots=True, eq=False)
class Team:
    """The processes, as one of them sees them."""

    rank: int = 0
    size: int = 1
    on_machine: int = 1
    """How many of them share this machine."""
    device: torch.device | None = None
    """This one's own; None: torch's default."""
    in_step: bool = True
    """False once this process has left the path that all take: then all must be started again."""

    @staticmethod
    def join() -> "Team":
        """Those that were started together with this one, on their GPUs where there are any."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return Team()
        local = int(os.environ["LOCAL_RANK"])
        device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=WAIT)
        return Team(dist.get_rank(), size, int(os.environ["LOCAL_WORLD_SIZE"]), device)

    @property
    def leads(self) -> bool:
        """Whether this is the one that reads votes, writes, and decides."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's own part of something that all have."""
        return items if self.size == 1 else items[self.rank :: self.size]

    def gather(self, mine: list[T]) -> list[T]:
        """Everyone's part, in the order before `share`."""
        if self.size == 1:
            return mine
        parts: list[Any] = [None] * self.size
        with self._calling():
            dist.all_gather_object(parts, mine)
        whole: list[Any] = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            whole[rank :: self.size] = part
        return whole

    def join_rows(self, mine: Tensor) -> Tensor:
        """Everyone's rows, those of the first process first: the same on all."""
        if self.size == 1:
            return mine
        parts: list[Any] = [None] * self.size
        with self._calling():
            dist.all_gather_object(parts, mine.cpu())
        return torch.cat(parts).to(mine.device)

    def sum(self, mine: Tensor) -> Tensor:
        """Over all processes, the same to the last bit on each."""
        if self.size == 1:
            return mine
        total = mine.clone()
        with self._calling():
            dist.all_reduce(total)
        return total

    def sum_numbers(self, *mine: float) -> list[float]:
        """Each over all processes."""
        if self.size == 1:
            return list(mine)
        total = self.sum(torch.tensor(mine, dtype=torch.float64, device=self.device))
        return [float(number) for number in total]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Of parameters that all processes have, over all of them, in place."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        total = self.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        sizes = [gradient.numel() for gradient in gradients]
        parts = total.split(sizes)  # type: ignore[no-untyped-call]
        for gradient, summed in zip(gradients, parts, strict=True):
            gradient.copy_(summed.view_as(gradient))

    def tell(self, mine: Any) -> Any:
        """What the first process gives, on all of them; its tensors are on this one's device."""
        if self.size == 1:
            return mine
        told: list[Any] = [None]
        if self.leads:
            file = io.BytesIO()
            torch.save(mine, file)
            told = [file.getvalue()]
        with self._calling():
            dist.broadcast_object_list(told)
        return mine if self.leads else torch.load(io.BytesIO(told[0]), self.device, weights_only=False)

    @contextmanager
    def _calling(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.in_step = False
            raise Parted(f"The other training processes cannot be reached: {error}") from error


ALONE = Team()
"""One process, as it is without a launcher."""
