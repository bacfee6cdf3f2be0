"""The errors of Ratchet. One base class, one handler (in `app.py`), OpenAI's shape.

RatchetError                500
├── SettingsError           (start-up only: the process ends with this line)
├── BadRequest              400  the message says what to change
├── Forbidden               403
├── NotFound                404
├── Conflict                409
├── TooLarge                413
├── Busy                    429/503 with Retry-After
├── EngineUnavailable       503  with Retry-After
│   ├── EngineGone               a replica could not be reached, or went away
│   └── PolicyNotLoaded          a replica lost a policy; the reconciler brings it back
├── DeadlineExceeded        504
├── MixedPolicy             500  an engine answered with another policy than the one asked for
└── PolicyRefused           (reconciler only: stored as the policy's `reason`)
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


class EngineUnavailable(RatchetError):
    """No replica can answer now."""

    status = 503
    type = "service_unavailable"


class EngineGone(EngineUnavailable):
    """A replica could not be reached, or its connection broke."""


class PolicyNotLoaded(EngineUnavailable):
    """A replica does not know the policy that was asked of it: it restarted a moment ago."""


class DeadlineExceeded(RatchetError):
    status = 504
    type = "timeout"


class MixedPolicy(RatchetError):
    """An engine's chunk names another policy than the one asked for. Must never happen; is counted."""


class PolicyRefused(RatchetError):
    """A policy's folder, load or probe is not what its manifest promises."""
