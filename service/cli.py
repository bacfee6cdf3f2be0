"""The command line: `ratchet up`, and an operator's commands, thin calls to a running service's HTTP API."""

import json
import sys
import urllib.error
import urllib.request
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from service.errors import SettingsError
from service.settings import Settings, get_settings
from service.up import STATUS_SETTINGS, address
from service.up import up as run_everything

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Ratchet: a chat service that learns from votes."
)
cycle_app = typer.Typer(no_args_is_help=True, help="Training cycles.")
app.add_typer(cycle_app, name="cycle")
key_app = typer.Typer(no_args_is_help=True, help="API keys.")
app.add_typer(key_app, name="key")


@app.command()
def up() -> None:
    """Start everything on this machine and run until Ctrl-C."""
    raise typer.Exit(run_everything(_settings()))


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
def start_cycle() -> None:
    """Ask the trainer for a cycle now."""
    print(f"Cycle {_call('POST', '/operator/cycles')['id']} is requested.")


@app.command()
def rollback() -> None:
    """Make the previous policy live again."""
    print(f"{_call('POST', '/operator/rollback')['live']} is live.")


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
    settings = _settings()
    url = address(settings)
    headers = {"content-type": "application/json"}
    if settings.key is not None:
        headers["authorization"] = f"Bearer {settings.key.get_secret_value()}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        _fail(json.load(error)["error"]["message"], 1)
    except OSError as error:
        _fail(f"no service answers at {url} (RATCHET_HOST, RATCHET_PORT): {error}", 1)


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
