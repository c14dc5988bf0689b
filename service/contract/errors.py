"""The error tree, shared by both processes.

    IsthmusError                 carries data, never an HTTP number; its docstring is its default message
      RequestError               the caller can fix it
        Malformed                the bytes are not what they claim to be, or the state forbids it for good
        Invalid                  understood, and wrong
        NotFound  Conflict  Forbidden  Unauthenticated  TooLarge  UnsupportedMedia  TooMany
      Unavailable                a dependency is down or full
      JobError                   raised inside a job's run()
        Permanent                never retried
        Transient                retried with backoff until the attempts are used up
        Cancelled                somebody asked for it
        Interrupted              the worker is shutting down; the attempt does not count

`service.app` maps the classes to statuses; `worker.runner` maps them to what the queue does. Nothing else decides.
"""

from __future__ import annotations


class IsthmusError(Exception):
    """Something went wrong."""

    def __init__(
        self, message: str | None = None, *, param: str | None = None, code: str | None = None, item: int | None = None
    ) -> None:
        self.message = message or (type(self).__doc__ or "").strip()
        self.param = param
        self.code = code
        self.item = item
        super().__init__(self.message)

    def at(self, param: str, item: int | None = None) -> IsthmusError:
        """Name where in the request the error lies, keeping a place that is already more exact."""
        if self.param is None:
            self.param = param
        elif not self.param.startswith(param):
            self.param = f"{param}.{self.param}"
        if self.item is None:
            self.item = item
        return self


class RequestError(IsthmusError):
    """The request cannot be served as it stands."""


class Malformed(RequestError):
    """The request cannot be read."""


class Invalid(RequestError):
    """The request is not valid."""


class NotFound(RequestError):
    """There is nothing here by that name."""


class Conflict(RequestError):
    """The request conflicts with the present state."""


class Forbidden(RequestError):
    """The key does not carry the scope that this needs."""


class Unauthenticated(RequestError):
    """A valid API key is needed."""


class TooLarge(RequestError):
    """The request is larger than the limit."""


class UnsupportedMedia(RequestError):
    """The media type is not supported."""


class TooMany(RequestError):
    """Too many requests."""

    retry_after_s: float = 1.0


class Unavailable(IsthmusError):
    """The service cannot take this right now."""

    def __init__(self, message: str | None = None, *, retry_after_s: float = 1.0, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class JobError(IsthmusError):
    """The job did not succeed."""


class Permanent(JobError):
    """The job cannot succeed, however often it is run."""


class Transient(JobError):
    """The job failed for a reason that may pass."""


class Cancelled(JobError):
    """The job was cancelled."""


class Interrupted(JobError):
    """The worker is shutting down."""
