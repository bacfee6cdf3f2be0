"""`/operator/import/{kind}`: votes, rankings and demonstrations from a file of JSONL or Parquet, all of them or none.

The file is spooled to disk first: its hash, which tells whether it was imported before, is known before anything is stored, a
slow upload holds no transaction open, and Parquet's index lies at its end anyway. What a file says never goes to the log.
"""

import asyncio
import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import count
from typing import IO, Annotated

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel, Field
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from starlette.requests import ClientDisconnect

from service.auth import OPERATOR_ONLY
from service.context import ContextDep
from service.errors import BadRequest, Conflict, TooLarge
from service.formats import AnyRecord, FileFormat, FormatError, Kind, LeftOut, Row, Source, read_line, reader
from service.intake import Intake, Numbered, RowRefused, Users
from service.schemas import Name
from service.tables import Import

router = APIRouter(prefix="/operator/import", tags=["operator"], dependencies=[OPERATOR_ONLY])

BATCH_ROWS = 500
BATCH_BYTES = 8 << 20
MOST_LINE_BYTES = 4 << 20
"""A battle holds its prompt twice, and a prompt can be as long as a request (1 MiB)."""
LOCK = 7_203_002
"""Number of the advisory lock that an import holds."""
PARQUET_MAGIC = b"PAR1"
KIND = (
    "`votes`, `rankings`, `demonstrations`: as exported. `pairs`: TRL's preferences (conversational with explicit or implicit "
    "prompt, or standard) or Anthropic's HH-RLHF, told apart by their shape. `battles`: FastChat's format."
)
FILE = {"schema": {"type": "string", "format": "binary"}}
BODY = {
    "requestBody": {
        "description": "The file. JSONL or Parquet: it is told by its first bytes, whatever the content type.",
        "required": True,
        "content": {"application/jsonl": FILE, "application/vnd.apache.parquet": FILE},
    }
}


class ImportAnswer(BaseModel):
    """What came in."""

    id: int = Field(description="The number of the import.")
    name: str = Field(description="Its name.")
    format: str = Field(description="Kind and file format.", examples=["pairs.jsonl"])
    sha256: str = Field(description="Of the file as it came.")
    num_rows: int = Field(description="Rows of the file.")
    num_new: int = Field(description="Votes, rankings or demonstrations that were not there before.")
    left_out: dict[str, int] = Field(
        description="Rows that are right but have no place here, such as two conversations that differ before the last reply: "
        "how many, by reason. Always empty for Ratchet's own formats."
    )


@router.post("/{kind}", status_code=201, openapi_extra=BODY)
async def import_file(
    kind: Annotated[Kind, Path(description=KIND)],
    request: Request,
    context: ContextDep,
    name: Annotated[Name, Query(description="What to call it; its rows that name no user are its own.")],
) -> ImportAnswer:
    """Store what is not there yet. The same file again is refused; where one row is wrong, nothing is stored."""
    with tempfile.TemporaryFile() as file:
        sha256 = await _receive(request, file, context.settings.max_import_bytes)
        batches = _Batches(file, kind, Source(name, sha256, datetime.now(UTC)))
        row = Import(name=name, format=f"{kind}.{batches.format}", sha256=sha256, num_rows=0, num_new=0)
        await _store(context.sessions, row, batches)
    return ImportAnswer(
        id=row.id,
        name=name,
        format=row.format,
        sha256=sha256,
        num_rows=row.num_rows,
        num_new=row.num_new,
        left_out=dict(batches.left_out),
    )


async def _receive(request: Request, file: IO[bytes], most_bytes: int) -> str:
    """Spool the body; gives its SHA-256. Raises TooLarge, before it is read where it says its length."""
    too_large = TooLarge(
        f"The file is larger than {most_bytes} bytes (RATCHET_MAX_IMPORT_BYTES). Split it.",
        code="import_too_large",
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most_bytes:
        raise too_large
    sha256 = hashlib.sha256()
    num_bytes = 0

    def keep(chunk: bytes) -> None:
        sha256.update(chunk)
        file.write(chunk)

    try:
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > most_bytes:
                raise too_large
            await asyncio.to_thread(keep, chunk)
    except ClientDisconnect:
        raise BadRequest("The upload ended early.", code="upload_ended") from None
    file.seek(0)
    return sha256.hexdigest()


class _Batches:
    """A file's rows as records, a batch at a time. Each reads on where the last one ended; to be called in a thread."""

    def __init__(self, file: IO[bytes], kind: Kind, source: Source) -> None:
        self.kind = kind
        self.format: FileFormat = "parquet" if file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC else "jsonl"
        self.num_rows = 0
        self.left_out: Counter[str] = Counter()
        file.seek(0)
        self._rows = _lines(file) if self.format == "jsonl" else _parquet_rows(file, kind)
        self._read = reader(kind, source)

    def next(self) -> list[Numbered] | None:
        """None at the end. Raises RowRefused, and FormatError where the whole file is wrong."""
        batch = next(self._rows, None)
        if batch is None:
            return None
        self.num_rows += len(batch)
        return [(number, record) for number, row in batch if (record := self._record(number, row))]

    def _record(self, number: int, row: Row) -> AnyRecord | None:
        try:
            return self._read(number, row)
        except FormatError as error:
            raise RowRefused(number, error) from None
        except LeftOut as reason:
            self.left_out[str(reason)] += 1
            return None


def _lines(file: IO[bytes]) -> Iterator[list[tuple[int, Row]]]:
    """A JSONL file's objects and the numbers of their lines. Empty lines are passed over."""
    batch: list[tuple[int, Row]] = []
    num_bytes = 0
    for number, content in enumerate(iter(lambda: file.readline(MOST_LINE_BYTES + 1), b""), 1):
        if not content.isspace():
            batch.append((number, _read_line(number, content)))
        num_bytes += len(content)
        if len(batch) == BATCH_ROWS or num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    yield batch


def _read_line(number: int, content: bytes) -> Row:
    try:
        if len(content) > MOST_LINE_BYTES:
            raise FormatError("", f"is longer than {MOST_LINE_BYTES} bytes")
        return read_line(content)
    except FormatError as error:
        raise RowRefused(number, error) from None


def _parquet_rows(file: IO[bytes], kind: Kind) -> Iterator[list[tuple[int, Row]]]:
    from service.parquet import read  # here, as pyarrow is slow to import

    numbers = count(1)
    for batch in read(file, kind):
        yield list(zip(numbers, batch))  # noqa: B905 (the numbers have no end)


async def _store(sessions: async_sessionmaker[AsyncSession], row: Import, batches: _Batches) -> None:
    """Store all records in one transaction, and the import's own row with its counts."""
    try:
        async with Users(sessions) as users, sessions.begin() as session:
            await _check_alone_and_new(session, row)
            session.add(row)
            await session.flush()
            intake = Intake(session, users, row.id, foreign=batches.kind in ("pairs", "battles"))
            while (batch := await asyncio.to_thread(batches.next)) is not None:
                row.num_new += await intake.add(batch)
            row.num_rows = batches.num_rows
            if row.num_rows == 0:
                raise BadRequest("The file holds no rows.", code="import_empty")
    except RowRefused as refused:
        unit = "line" if batches.format == "jsonl" else "row"
        raise _refusal(f"{unit} {refused.number}: {refused.error}", refused.error) from None
    except FormatError as error:
        raise _refusal(str(error), error) from None


def _refusal(message: str, error: FormatError) -> BadRequest:
    return BadRequest(f"{message} (nothing was stored)", param=error.path or None, code="import_refused")


async def _check_alone_and_new(session: AsyncSession, row: Import) -> None:
    """Raises Conflict where another import runs, or this file was imported before."""
    if not await session.scalar(select(func.pg_try_advisory_xact_lock(LOCK))):
        raise Conflict("Another import is running. Try again when it has ended.", code="import_running")
    before = await session.scalar(
        select(Import).where(Import.format == row.format, Import.sha256 == row.sha256)
    )
    if before is not None:
        raise Conflict(
            f"This very file was imported before: import {before.id}, {before.name!r}, {before.num_rows} rows. "
            "Nothing was stored again.",
            code="import_known",
        )
