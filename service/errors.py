"""The errors of Ratchet. One base class, one handler (in `app.py`), OpenAI's shape.

    RatchetError                500
    ├── SettingsError           (start-up only: the process ends with this line)
    ├── BadRequest              400  the message says what to change
    ├── NotFound                404
    ├── Conflict                409
    ├── TooLarge                413
    ├── Busy                    429/503 with Retry-After
    └── EngineUnavailable       503
"""


class RatchetError(Exception):
    """Base of all errors that a caller may see. `param` names the field at fault, `code` is for programs."""

    status = 500
    type = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, dict[str, str | None]]:
        """The error in OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class SettingsError(RatchetError):
    """A setting is wrong or names something that is not there. Ends the process with one line."""


class BadRequest(RatchetError):
    status = 400
    type = "invalid_request_error"


class NotFound(RatchetError):
    status = 404
    type = "invalid_request_error"


class Conflict(RatchetError):
    status = 409
    type = "invalid_request_error"


class TooLarge(RatchetError):
    status = 413
    type = "invalid_request_error"


class EngineUnavailable(RatchetError):
    """No replica can answer now."""

    status = 503
    type = "service_unavailable"
