"""What goes wrong over HTTP, in OpenAI's error form, and the status that each of our errors gets.

Messages say what to do and never quote a file's contents or its name. Not here: who logs them.
"""

import re
from dataclasses import dataclass
from typing import Any

from medmo_edge.errors import ImageError, MedmoError

# What a parser said about damaged bytes can quote them.
_DETAIL = re.compile(r"(damaged or not supported) \(.*\)$", re.DOTALL)


@dataclass(eq=False)
class Problem(Exception):
    """A request that cannot be served: HTTP status, one line, OpenAI's ``type`` and ``code``.

    ``retry_after``: seconds after which trying again makes sense; None: it never does.
    """

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after: int | None = None

    def __str__(self) -> str:
        return self.message

    @property
    def type(self) -> str:
        """OpenAI's error type."""
        if self.status == 429:
            return "rate_limit_error"
        if self.status == 401:
            return "authentication_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """OpenAI's clients try again on their own unless told not to."""
        again = self.retry_after is not None
        headers = {"x-should-retry": "true" if again else "false"}
        if again:
            headers["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> Problem:
    """Status 400."""
    return Problem(400, message, code, param)


def too_large(what: str, limit: int) -> Problem:
    """Status 413; ``limit`` in bytes."""
    return Problem(413, f"{what} is larger than this server's limit of {limit} bytes", "too_large")


def not_found(what: str) -> Problem:
    """Status 404; ``what`` is one of our own words, never the caller's."""
    return Problem(404, f"there is no such {what} here: it was deleted or has expired", "not_found")


def of_error(error: MedmoError) -> Problem:
    """The problem behind one of the package's errors: the caller can put it right."""
    if isinstance(error, ImageError):
        return bad_request(image_message(error), code="invalid_image")
    return bad_request(str(error))


def image_message(error: ImageError) -> str:
    """``error`` without what a parser quoted from the file."""
    return _DETAIL.sub(r"\1", str(error))
