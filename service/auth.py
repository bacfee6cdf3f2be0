"""Who asks: what each router depends on. Without a key only this machine may ask, and only where nobody else can.

On loopback no key is needed (unless a setting says so): who is on this machine owns the database anyway.
"""

from functools import lru_cache
from ipaddress import ip_address
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from service.context import ContextDep, context_of
from service.errors import Forbidden, Unauthorized
from service.keyring import PREFIX, Identity
from service.settings import Settings

_bearer = HTTPBearer(auto_error=False, description="A key that an operator made: `rk-...`.")


async def identify(
    request: Request,
    context: ContextDep,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Identity:
    """Who asks, within its rate limit. Raises Unauthorized, TooManyRequests.

    OpenAI's clients always send some key: what does not begin like one of ours counts as none.
    """
    key = credentials.credentials if credentials else ""
    if key.startswith(PREFIX):
        identity = await context.keys.find(context.sessions, key)
        context.limits.count_key(identity.key_id)
        return identity
    if not may_be_anonymous(context.settings):
        raise Unauthorized(
            "A key is needed: send `Authorization: Bearer rk-...`. The operator makes keys.",
            code="invalid_api_key",
        )
    return Identity("", "operator" if is_from_this_machine(request) else "user", None)


async def identity_of(request: Request) -> Identity:
    """Who asks, as `identify` finds it, where FastAPI does not call that. Raises the same."""
    return await identify(request, context_of(request), await _bearer(request))


def may_be_anonymous(settings: Settings) -> bool:
    """Only where nobody but this machine can reach the service."""
    return is_loopback(settings.host) and not settings.require_keys


def is_from_this_machine(request: Request) -> bool:
    """Whether somebody on this machine asks, and not a web page that makes their browser ask.

    A foreign page gives itself away by `Origin`, or, where its name was pointed at loopback, by `Host`.
    """
    host = request.headers.get("host", "")
    origin = request.headers.get("origin")
    local = request.client is not None and is_loopback(request.client.host)
    try:
        ours = origin is None or urlsplit(origin).netloc == host
        return local and ours and is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:  # one of them is no address at all
        return False


@lru_cache(maxsize=64)
def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


IdentityDep = Annotated[Identity, Depends(identify)]


def require(role: str, identity: Identity) -> Identity:
    if not identity.at_least(role):
        raise Forbidden(
            f"This call needs a key of role {role}"
            + (
                ", or to be made on this machine."
                if identity.key_id is None
                else f"; yours is {identity.role}."
            ),
            code=f"needs_{role}",
        )
    return identity


async def _labeler(identity: IdentityDep) -> Identity:
    return require("labeler", identity)


async def _operator(identity: IdentityDep) -> Identity:
    return require("operator", identity)


LabelerDep = Annotated[Identity, Depends(_labeler)]
OperatorDep = Annotated[Identity, Depends(_operator)]
KNOWN_CALLER = Depends(identify)
OPERATOR_ONLY = Depends(_operator)
