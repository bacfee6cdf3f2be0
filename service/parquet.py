"""Parquet, a piece at a time: rows into bytes that are handed out as they are made, and a file's rows in batches.

pyarrow takes 0.2 s to import, so this module is imported where it is first needed. Used by `exports.py` and `imports.py`.
"""

import io
from collections.abc import Iterator
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from service.formats import FormatError, Kind, Row

GROUP_ROWS = 10_000
GROUP_BYTES = 16 << 20
"""A row group is as large as either allows: it is held in memory until it is whole."""
READ_ROWS = 200
READ_BYTES = 256 << 20
"""Largest batch that is read: a small file can unpack to a great deal."""
BUFFER_BYTES = 1 << 20

TIME = pa.timestamp("us", tz="UTC")
MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
USER = pa.struct({"account": pa.string(), "name": pa.string()})
PROMPT = pa.struct(
    {
        "id": pa.int64(),
        "user": USER,
        "conversation": pa.struct({"id": pa.string(), "created_at": TIME}),
        "messages": MESSAGES,
        "created_at": TIME,
    }
)
REPLY = pa.struct(
    {
        "id": pa.string(),
        "policy": pa.string(),
        "sampling": pa.string(),  # JSON: its fields are the engine's to choose
        "content": pa.string(),
        "finish_reason": pa.string(),
        "prompt_tokens": pa.int32(),
        "completion_tokens": pa.int32(),
        "created_at": TIME,
        "ended_at": TIME,
    }
)
COMPARISON = pa.struct(
    {
        "id": pa.string(),
        "user": USER,
        "reason": pa.string(),
        "propensity": pa.float64(),
        "created_at": TIME,
        "prompt": PROMPT,
        "replies": pa.list_(REPLY),
    }
)
SAID = {"comment": pa.string(), "tags": pa.list_(pa.string()), "created_at": TIME}
SCHEMAS: dict[Kind, pa.Schema] = {
    "votes": pa.schema(
        {"id": pa.int64(), "user": USER, "choice": pa.string()}
        | SAID
        | {"updated_at": TIME, "comparison": COMPARISON}
    ),
    "rankings": pa.schema(
        {"id": pa.int64(), "user": USER, "ranks": pa.list_(pa.int32())}
        | SAID
        | {"updated_at": TIME, "comparison": COMPARISON}
    ),
    "demonstrations": pa.schema(
        {"id": pa.string(), "user": USER, "content": pa.string(), "corrected": pa.string(), "corrects": REPLY}
        | SAID
        | {"prompt": PROMPT}
    ),
    "pairs": pa.schema({"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES}),
    "battles": pa.schema(
        {
            "question_id": pa.string(),
            "model_a": pa.string(),
            "model_b": pa.string(),
            "winner": pa.string(),
            "judge": pa.string(),
            "conversation_a": MESSAGES,
            "conversation_b": MESSAGES,
            "turn": pa.int64(),
            "anony": pa.bool_(),
            "language": pa.string(),
            "tstamp": pa.float64(),
        }
    ),
}


class Writer:
    """Makes one file. `add` and `close` return the bytes that are ready; joined they are the file."""

    def __init__(self, kind: Kind) -> None:
        self._schema = SCHEMAS[kind]
        self._sink = _Sink()
        self._writer = pq.ParquetWriter(self._sink, self._schema, compression="zstd")
        self._held: list[pa.RecordBatch] = []

    def add(self, rows: list[Row]) -> bytes:
        """Take rows; often there is nothing to hand out yet."""
        batch = pa.RecordBatch.from_pylist([_with_sampling_as_text(row) for row in rows], self._schema)
        self._held.append(batch)
        if (
            sum(held.num_rows for held in self._held) >= GROUP_ROWS
            or sum(held.nbytes for held in self._held) >= GROUP_BYTES
        ):
            self._write_group()
        return self._sink.take()

    def close(self) -> bytes:
        """The rest, and the footer."""
        if self._held:
            self._write_group()
        self._writer.close()
        return self._sink.take()

    def _write_group(self) -> None:
        table = pa.Table.from_batches(self._held, self._schema)
        self._writer.write_table(table, row_group_size=table.num_rows)
        self._held.clear()


class _Sink(io.RawIOBase):
    """Keeps what is written until it is taken."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._position = 0

    def writable(self) -> bool:
        return True

    def write(self, content: object) -> int:
        piece = bytes(content)  # type: ignore[call-overload]
        self._pieces.append(piece)
        self._position += len(piece)
        return len(piece)

    def tell(self) -> int:
        return self._position

    def take(self) -> bytes:
        taken = b"".join(self._pieces)
        self._pieces.clear()
        return taken


def _with_sampling_as_text(row: Row) -> Row:
    if "comparison" in row:
        replies = [_sampling_as_text(reply) for reply in row["comparison"]["replies"]]
        return row | {"comparison": row["comparison"] | {"replies": replies}}
    if row.get("corrects") is not None:
        return row | {"corrects": _sampling_as_text(row["corrects"])}
    return row


def _sampling_as_text(reply: Row) -> Row:
    return reply | {"sampling": bytes(reply["sampling"]).decode()}


def read(file: IO[bytes], kind: Kind) -> Iterator[list[Row]]:
    """The rows of a file, in batches. Raises FormatError where it is no Parquet."""
    try:
        source = pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)
        columns = _columns(kind, source.schema_arrow.names)
        for batch in source.iter_batches(READ_ROWS, columns=columns, use_threads=False):
            if batch.nbytes > READ_BYTES:
                raise FormatError("", f"{READ_ROWS} rows of the file hold more than {READ_BYTES} bytes")
            yield batch.to_pylist()
    except FormatError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise FormatError("", f"the file is not whole Parquet: {type(error).__name__}") from None


def _columns(kind: Kind, there: list[str]) -> list[str]:
    """Of the formats of others only what is used; of ours all, so that what is not known is refused."""
    if kind in ("pairs", "battles"):
        return [name for name in there if name in SCHEMAS[kind].names]
    return there
