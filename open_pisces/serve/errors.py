"""Errors in OpenAI's form, which its clients read."""

from __future__ import annotations

from typing import Any

from open_pisces.errors import PiscesError


class ApiError(PiscesError):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: what is wrong, and the remedy.
        param: the field of the request that it is about.
        code: a short word for programs.
        headers: further headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """``{"error": {"message", "type", "param", "code"}}``."""
        return {
            "error": {"message": self.message, "type": kind_of(self.status), "param": self.param, "code": self.code}
        }


def kind_of(status: int) -> str:
    """OpenAI's type of error for a status."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "service_unavailable"}
    return kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
