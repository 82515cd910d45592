"""Who may ask, and how much: the key, the host, the type and the size of a request."""

import hmac
from dataclasses import dataclass

from anyio import fail_after
from starlette.requests import Request

from ..units import format_bytes
from .api_error import ApiError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
BODY_SECONDS = 60.0


@dataclass(frozen=True)
class Guard:
    """`api_key`: what clients must show; None: nothing, and then the server is on the loopback alone."""

    api_key: str | None
    body: int

    def check(self, request: Request) -> None:
        """Raises ApiError for who may not ask."""
        if self.api_key is not None:
            given = request.headers.get("authorization", "")
            scheme, _, key = given.partition(" ")
            same = hmac.compare_digest(key.strip().encode("latin-1"), self.api_key.encode())
            if scheme.lower() != "bearer" or not same:
                raise ApiError(
                    401, "the API key is missing or wrong: send it as Authorization: Bearer KEY", code="invalid_api_key"
                )
        elif host_of(request.headers.get("host", "")) not in LOOPBACK:
            # A page of another site whose name was made to lead here.
            raise ApiError(403, "without --api-key this server answers to localhost alone", code="wrong_host")

    async def read(self, request: Request) -> bytes:
        """The body of a request. Raises ApiError."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which pages of other sites cannot send unasked
            raise ApiError(415, "send JSON: Content-Type: application/json", code="wrong_content_type")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self.body:
            raise self._too_large()
        body = bytearray()
        try:
            with fail_after(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self.body:
                        raise self._too_large()
        except TimeoutError:
            raise ApiError(408, f"the request did not come within {BODY_SECONDS:.0f} s") from None
        return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is larger than {format_bytes(self.body)}", code="request_too_large")


def host_of(header: str) -> str:
    """'[::1]:8000' -> '::1'."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.rpartition(":")[0] if ":" in header else header
