"""The command line: `ratchet up`, and an operator's commands, thin calls to a running service's HTTP API."""

import json
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, Annotated, Any, NoReturn
from urllib.parse import quote, urlencode

import typer
from rich.console import Console
from rich.table import Table

from service import base_model, preparation
from service.engine_process import engine_command, engine_environment
from service.errors import SettingsError
from service.processes import PartEnded
from service.settings import Settings, get_settings
from service.up import STATUS_SETTINGS, address
from service.up import up as run_everything

KINDS = "votes, pairs, battles, rankings or demonstrations."
UNHURRIED_SECONDS = 3600.0
"""Between two signs of life of an export or an import."""

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Ratchet: a chat service that learns from votes."
)
cycle_app = typer.Typer(no_args_is_help=True, help="Training cycles.")
app.add_typer(cycle_app, name="cycle")
replica_app = typer.Typer(
    no_args_is_help=True, help="Engines: added, drained and removed while the service runs."
)
app.add_typer(replica_app, name="replica")
key_app = typer.Typer(no_args_is_help=True, help="API keys.")
app.add_typer(key_app, name="key")


@app.command()
def up() -> None:
    """Start everything on this machine and run until Ctrl-C."""
    raise typer.Exit(run_everything(_settings()))


@app.command()
def prepare() -> None:
    """Make what the parts need where each runs by itself: the model, all tables, and RATCHET_KEY as an operator's key."""
    try:
        preparation.prepare(_settings())
    except (SettingsError, PartEnded) as error:
        _fail(error.message, STATUS_SETTINGS)


@app.command()
def engine() -> None:
    """Run one engine by itself, on RATCHET_ENGINE_HOST and RATCHET_ENGINE_PORT."""
    settings = _settings()
    try:
        model = base_model.folder_of(settings)
        command = engine_command(settings, model, settings.engine_host)
    except SettingsError as error:
        _fail(error.message, STATUS_SETTINGS)
    os.execve(command[0], command, os.environ | engine_environment(settings, model))


@app.command()
def policies() -> None:
    """List the policies, the newest first, and show which one is live."""
    live = _call("GET", "/operator/deployment")["live"]
    rows = _call("GET", "/operator/policies")
    for row in rows:
        row["live"] = "live" if row["name"] == live else ""
    _show(rows, ["name", "live", "state", "parent", "created_at", "reason"])


@app.command()
def cycles() -> None:
    """List the training cycles, the newest first."""
    _show(_call("GET", "/operator/cycles"), ["id", "trigger", "stage", "policy", "created_at", "reason"])


@cycle_app.command("start")
def start_cycle(
    method: Annotated[
        str, typer.Option(help="ppo, dpo or orpo; sft: a new anchor from demonstrations.")
    ] = "",
) -> None:
    """Ask the trainer for a cycle now."""
    asked = {"method": method} if method else {}
    print(f"Cycle {_call('POST', '/operator/cycles', asked)['id']} is requested.")


@app.command()
def duels() -> None:
    """List the duels between policies, the newest first, with their votes."""
    rows = _call("GET", "/operator/duels")
    for row in rows:
        row |= {name: row["metrics"].get(name, 0) for name in ("wins", "losses", "ties")}
        row["outcome"] = row["outcome"] or "running"
    _show(rows, ["id", "kind", "challenger", "incumbent", "wins", "losses", "ties", "outcome", "created_at"])


@app.command()
def ratings() -> None:
    """Rate all policies by the votes of all duels, the strongest first."""
    rows = _call("GET", "/operator/ratings")
    for row in rows:
        for name in ("win_rate", "strength"):
            numbers = (row[name], row[f"{name}_low"], row[f"{name}_high"])
            row[name] = "" if row[name] is None else "{:.3f} [{:.3f}, {:.3f}]".format(*numbers)
    _show(rows, ["policy", "votes", "win_rate", "strength"])


@app.command()
def actions() -> None:
    """List what operators did, the newest first."""
    _show(_call("GET", "/operator/actions"), ["created_at", "account", "action", "subject", "reason"])


Why = Annotated[str, typer.Option("--why", help="Kept with the action.")]
Address = Annotated[str, typer.Argument(metavar="URL", help="http://host:port")]


@replica_app.command("list")
def list_replicas() -> None:
    """List the replicas, what they hold and what they are doing."""
    _show_replicas(_call("GET", "/operator/replicas"))


@replica_app.command("add")
def add_replica(url: Address, why: Why = "") -> None:
    """Add a replica, or take back one that was drained or removed."""
    _change_replica(url, "serving", why)


@replica_app.command("drain")
def drain_replica(url: Address, why: Why = "") -> None:
    """Send a replica no new requests; it ends those that it has."""
    _change_replica(url, "draining", why)


@replica_app.command("remove")
def remove_replica(url: Address, why: Why = "") -> None:
    """Forget a replica; it ends the requests that it has."""
    _change_replica(url, "removed", why)


def _change_replica(url: str, state: str, why: str) -> None:
    body = {"url": url, "state": state} | ({"reason": why} if why else {})
    _show_replicas(_call("PUT", "/operator/replicas", body))


def _show_replicas(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["policies"] = ", ".join(row["policies"])
        row["refused"] = "; ".join(f"{name}: {reason}" for name, reason in row["refused"].items())
    _show(rows, ["url", "state", "healthy", "running", "policies", "refused"])


@app.command()
def rollback(why: Why = "") -> None:
    """Make the previous policy live again."""
    _move("rollback", why)


@app.command()
def promote(why: Why = "") -> None:
    """Let the challenger go live now, whatever the votes say so far."""
    _move("promote", why)


@app.command()
def reject(why: Why = "") -> None:
    """End the challenger's trial."""
    _move("reject", why)


def _move(action: str, why: str) -> None:
    answer = _call("POST", f"/operator/{action}", {"reason": why} if why else {})
    print(f"{answer['live']} is live.")


@app.command()
def lineage(
    number: Annotated[
        str, typer.Argument(metavar="ID", help="Of a reply (chatcmpl-) or a comparison (cmp-).")
    ],
) -> None:
    """From a reply, the way back to the base; from a comparison's votes, every policy that learnt from them."""
    kind = "comparisons" if number.startswith("cmp-") else "replies"
    answer = _call("GET", f"/operator/{kind}/{quote(number, safe='')}/lineage")
    if kind == "replies":
        _show(
            answer["policies"],
            ["name", "state", "parent", "cycle_id", "num_feedback", "snapshot_sha256", "created_at"],
        )
        return
    for given in answer["feedback"]:
        print(f"{given['kind']} {given['id']}:")
        _show(given["policies"], ["name", "directly"])


@key_app.command("create")
def create_key(
    account: Annotated[str, typer.Option(help="Whose key it is.")],
    role: Annotated[str, typer.Option(help="user, labeler or operator.")] = "user",
) -> None:
    """Make a key. It is shown once."""
    made = _call("POST", "/operator/keys", {"account": account, "role": role})
    print(f"{made['key']}\nKey {made['id']}, {role} of {account}. It is not shown again.")


@key_app.command("list")
def list_keys() -> None:
    """List the keys, the newest first."""
    _show(_call("GET", "/operator/keys"), ["id", "account", "role", "hint", "created_at", "revoked_at"])


@key_app.command("revoke")
def revoke_key(number: Annotated[int, typer.Argument(help="The key's number.")]) -> None:
    """Revoke a key."""
    print(f"Key {_call('DELETE', f'/operator/keys/{number}')['id']} is revoked.")


@app.command("export")
def export(
    kind: Annotated[str, typer.Argument(help=KINDS)],
    file_format: Annotated[str, typer.Option("--format", help="jsonl or parquet.")] = "jsonl",
    rankings: Annotated[bool, typer.Option("--rankings", help="pairs: those of rankings too.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where to; standard output if left out.")] = None,
) -> None:
    """Write out everything of a kind."""
    query = {"format": file_format} | ({"rankings": "true"} if rankings else {})
    with _ask(
        "GET", f"/operator/export/{quote(kind)}?{urlencode(query)}", seconds=UNHURRIED_SECONDS
    ) as answer:
        if out is None:
            shutil.copyfileobj(answer, sys.stdout.buffer)
            return
        partial = out.with_name(out.name + ".partial")
        with partial.open("wb") as file:
            shutil.copyfileobj(answer, file)
        partial.rename(out)


@app.command("import")
def import_file(
    kind: Annotated[str, typer.Argument(help=KINDS)],
    file: Annotated[Path, typer.Argument(help="JSON lines or Parquet.", exists=True, dir_okay=False)],
    name: Annotated[str | None, typer.Option(help="What to call it; the file's name if left out.")] = None,
) -> None:
    """Bring a file in: all of it, or, where a row is wrong, nothing."""
    path = f"/operator/import/{quote(kind)}?{urlencode({'name': name or file.name})}"
    headers = {"content-type": "application/octet-stream", "content-length": str(file.stat().st_size)}
    with file.open("rb") as content, _ask("POST", path, content, headers, UNHURRIED_SECONDS) as answer:
        done = json.load(answer)
    print(f"Import {done['id']}: {done['num_rows']} rows, {done['num_new']} of them new.")
    for reason, num in done["left_out"].items():
        print(f"Left out: {num}, as {reason}.")


def main() -> None:
    """The command `ratchet`."""
    app()


def _settings() -> Settings:
    try:
        return get_settings()
    except SettingsError as error:
        _fail(error.message, STATUS_SETTINGS)


def _call(method: str, path: str, body: dict[str, str] | None = None) -> Any:
    """Ask the running service; ends the process with one line where it refuses or is not there."""
    data = None if body is None else json.dumps(body).encode()
    with _ask(method, path, data, {"content-type": "application/json"}) as answer:
        return json.load(answer)


@contextmanager
def _ask(
    method: str,
    path: str,
    data: bytes | IO[bytes] | None = None,
    headers: dict[str, str] | None = None,
    seconds: float = 30,
) -> Iterator[HTTPResponse]:
    """The answer, to be read in the body of the `with`. Ends the process as `_call` does, also where it breaks off."""
    settings = _settings()
    url = address(settings)
    headers = dict(headers or {})
    if settings.key is not None:
        headers["authorization"] = f"Bearer {settings.key.get_secret_value()}"
    request = urllib.request.Request(url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:
            yield response
    except urllib.error.HTTPError as error:
        _fail(json.load(error)["error"]["message"], 1)
    except urllib.error.URLError as error:
        if isinstance(error.reason, BrokenPipeError | ConnectionResetError):
            _fail("the service refused to read on: the file may be larger than RATCHET_MAX_IMPORT_BYTES", 1)
        _fail(f"no service answers at {url} (RATCHET_HOST, RATCHET_PORT): {error.reason}", 1)
    except (HTTPException, ConnectionResetError, TimeoutError) as error:
        _fail(f"the service broke off: {error or type(error).__name__}", 1)


def _show(rows: list[dict[str, Any]], columns: list[str]) -> None:
    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*("" if row[name] is None else str(row[name]) for name in columns))
    Console().print(table)


def _fail(message: str, status: int) -> NoReturn:
    print(f"ratchet: {message}", file=sys.stderr)
    raise typer.Exit(status)


if __name__ == "__main__":
    main()
