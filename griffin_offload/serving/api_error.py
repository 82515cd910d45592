"""Errors as OpenAI's error JSON, with their HTTP status."""

from typing import Any

from ..errors import BudgetError, GriffinError, OptionError, PromptError, one_line

INVALID = "invalid_request_error"
LEFT = 499  # no status of HTTP's: nobody reads it


class ApiError(Exception):
    """What a client is told. `param`: the field that is wrong; `retry_after`: seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.retry_after = retry_after

    def to_json(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A request that is wrong, in the field `param`."""
    return ApiError(400, message, param=param, code=code)


def api_error(error: BaseException) -> ApiError:
    """What a client is told of any error. Of one that nobody foresaw its name alone: its text may be another's."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BudgetError | MemoryError):
        return ApiError(400, f"the request does not fit: {one_line(error)}", code="memory_budget_exceeded")
    if isinstance(error, PromptError | OptionError):
        return ApiError(400, " ".join(str(error).split()))
    if isinstance(error, GriffinError):
        return ApiError(500, " ".join(str(error).split()), kind="server_error")
    return ApiError(500, f"the server failed ({type(error).__name__})", kind="server_error")


def stopping() -> ApiError:
    return ApiError(503, "the server is stopping", kind="server_error", code="stopping")


def client_left() -> ApiError:
    return ApiError(LEFT, "the client has left", code="cancelled")
