"""What the API says of itself: `/openapi.json`, and `/docs`, which shows it with Swagger UI from this machine's own files.

FastAPI writes the document from the endpoints; `DescribedApp` adds what it cannot know: that a key may be left out where the
settings let it, and the shapes of streams and errors.
"""

from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from service.pages import PAGE_HEADERS, POLICY, WEB
from service.schemas import Chunk, ErrorAnswer

SWAGGER_UI = Path(str(files("fastapi_offline") / "static"))
HEADERS = PAGE_HEADERS | {"content-security-policy": POLICY.replace("img-src 'self'", "img-src 'self' data:")}
"""Swagger UI's style sheet holds its icons as `data:`."""
DESCRIPTION = """A chat service that learns from its users: chat, vote, learn, swap.

Requests, answers and errors of `/v1/chat/completions` and `/v1/models` are OpenAI's, so any client of theirs does. Every
answer carries a header `x-request-id`; every error says in `message` what to change."""
ERROR_CONTENT = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}

router = APIRouter()


class DescribedApp(FastAPI):
    """`key_optional`: whether calls without a key are taken."""

    def __init__(self, *, key_optional: bool, **options: Any) -> None:
        self._key_optional = key_optional
        super().__init__(
            title="Ratchet",
            description=DESCRIPTION,
            docs_url=None,
            redoc_url=None,
            generate_unique_id_function=_operation_id,
            **options,
        )

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            document["components"]["schemas"] |= _models()
            if self._key_optional:
                _let_keys_be_left_out(document)
        assert self.openapi_schema is not None
        return self.openapi_schema


def _models() -> dict[str, Any]:
    """Those that no endpoint returns by itself."""
    wanted: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        (Chunk, "serialization"),
        (ErrorAnswer, "serialization"),
    ]
    _, models = models_json_schema(wanted, ref_template="#/components/schemas/{model}")
    return dict(models["$defs"])


def _let_keys_be_left_out(document: dict[str, Any]) -> None:
    """An empty alternative: OpenAPI's way to say so."""
    for path in document["paths"].values():
        for operation in path.values():
            if "security" in operation:
                operation["security"].append({})


def _operation_id(route: APIRoute) -> str:
    """What generated clients call the method: the name of our function."""
    return route.name


@router.get("/docs", include_in_schema=False)
async def docs() -> FileResponse:
    """The page that shows the API, and tries it."""
    return FileResponse(WEB / "docs.html", headers=HEADERS)


def mount_docs(app: FastAPI) -> None:
    """Serve Swagger UI, which the page loads."""
    app.mount("/docs/swagger-ui", StaticFiles(directory=SWAGGER_UI))
