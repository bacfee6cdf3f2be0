"""`/operator/keys`: making, listing and revoking API keys."""

from typing import Annotated

from fastapi import APIRouter, Path
from sqlalchemy import func, select

from service import keyring
from service.auth import OPERATOR_ONLY
from service.context import ContextDep
from service.errors import BadRequest, NotFound
from service.formats import IMPORT_ACCOUNT
from service.operator_schemas import KeyRequest, KeyView, NewKey
from service.tables import Key

router = APIRouter(prefix="/operator/keys", tags=["operator"], dependencies=[OPERATOR_ONLY])


@router.post("", status_code=201)
async def make_key(body: KeyRequest, context: ContextDep) -> NewKey:
    """Make a key for an account. It is shown now and never again."""
    if body.account == IMPORT_ACCOUNT:
        raise BadRequest(
            f"account: {IMPORT_ACCOUNT} holds what was imported. Take another name.",
            param="account",
            code="reserved",
        )
    try:
        key, row = keyring.new_key(body.account, body.role, body.expires_at)
    except ValueError as error:
        raise BadRequest(f"{error}.", param="expires_at", code="expired") from None
    async with context.sessions.begin() as session:
        session.add(row)
        await session.flush()
        await session.refresh(row)
    return NewKey(key=key, **KeyView.model_validate(row).model_dump())


@router.get("")
async def list_keys(context: ContextDep) -> list[KeyView]:
    """Every key, also revoked ones, the newest first; never the key itself."""
    async with context.sessions() as session:
        rows = await session.scalars(select(Key).order_by(Key.id.desc()))
        return [KeyView.model_validate(row) for row in rows]


@router.delete("/{key_id}")
async def revoke_key(
    key_id: Annotated[int, Path(ge=1, lt=1 << 63, description="The key's number.")], context: ContextDep
) -> KeyView:
    """Revoke a key: at once in this process, within seconds in others. Revoking it again changes nothing."""
    async with context.sessions.begin() as session:
        row = await session.get(Key, key_id, with_for_update=True)
        if row is None:
            raise NotFound(f"There is no key {key_id}.", param="key_id")
        if row.revoked_at is None:
            row.revoked_at = func.now()
            await session.flush()
            await session.refresh(row)
        view = KeyView.model_validate(row)
    context.keys.forget()
    return view
