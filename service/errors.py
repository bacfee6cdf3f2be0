"""The errors of Ratchet. One base class, one handler (in `app.py`), OpenAI's shape.

RatchetError                500
├── SettingsError           (start-up only: the process ends with this line)
├── BadRequest              400  the message says what to change
├── Unauthorized            401
├── Forbidden               403
├── NotFound                404
├── Conflict                409
├── TooLarge                413
├── TooManyRequests         429  with Retry-After: this caller asks too much
├── Overloaded              503  with Retry-After: all callers together do
├── DatabaseUnavailable     503  with Retry-After
├── EngineUnavailable       503  with Retry-After
│   ├── EngineGone               a replica went away, with what was asked of it
│   │   └── EngineUnreachable        ... before it was asked anything
│   └── PolicyNotLoaded          a replica lost a policy; the reconciler brings it back
├── DeadlineExceeded        504
├── MixedPolicy             500  an engine answered with another policy than the one asked for
└── PolicyRefused           (reconciler only: stored as the policy's `reason`)
"""


class RatchetError(Exception):
    """Base of all errors that a caller may see. `param` names the field at fault, `code` is for programs."""

    status = 500
    type = "server_error"
    retry_after_seconds: int | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code

    def headers(self) -> dict[str, str]:
        """What the answer says beside its body."""
        return {} if self.retry_after_seconds is None else {"retry-after": str(self.retry_after_seconds)}

    def body(self) -> dict[str, dict[str, str | None]]:
        """The error in OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class SettingsError(RatchetError):
    """A setting is wrong or names something that is not there. Ends the process with one line."""


class BadRequest(RatchetError):
    status = 400
    type = "invalid_request_error"


class Unauthorized(RatchetError):
    status = 401
    type = "authentication_error"

    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


class Forbidden(RatchetError):
    status = 403
    type = "permission_error"


class NotFound(RatchetError):
    status = 404
    type = "invalid_request_error"


class Conflict(RatchetError):
    status = 409
    type = "invalid_request_error"


class TooLarge(RatchetError):
    status = 413
    type = "invalid_request_error"


class TooManyRequests(RatchetError):
    """This caller asks too much, or too much at once."""

    status = 429
    type = "rate_limit_error"

    def __init__(self, message: str, *, code: str, retry_after_seconds: int = 1) -> None:
        super().__init__(message, code=code)
        self.retry_after_seconds = retry_after_seconds


class Overloaded(RatchetError):
    """More is asked in all than can wait."""

    status = 503
    type = "service_unavailable"
    retry_after_seconds = 2


class DatabaseUnavailable(RatchetError):
    """PostgreSQL does not answer now. What was asked is not stored."""

    status = 503
    type = "service_unavailable"
    retry_after_seconds = 1


class EngineUnavailable(RatchetError):
    """No replica can answer now."""

    status = 503
    type = "service_unavailable"
    retry_after_seconds = 1


class NotReady(EngineUnavailable):
    """No replica has the policy ready; nothing was asked of any."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="engine_not_ready")


class EngineGone(EngineUnavailable):
    """A replica's connection broke, or it did not answer in time."""


class EngineUnreachable(EngineGone):
    """There was no connection to be had: the replica was asked nothing."""


class PolicyNotLoaded(EngineUnavailable):
    """A replica does not know the policy that was asked of it: it restarted a moment ago."""


class DeadlineExceeded(RatchetError):
    status = 504
    type = "timeout"


class MixedPolicy(RatchetError):
    """An engine's chunk names another policy than the one asked for. Must never happen; is counted."""


class PolicyRefused(RatchetError):
    """A policy's folder, load or probe is not what its manifest promises."""
