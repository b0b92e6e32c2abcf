"""Who gets in: one rule for every request, whether it holds one text or a batch.

A request costs the tokens it brings. It is admitted while the tokens of all admitted requests stay within the limit,
or when it would be alone, so that no request is too large for ever. Before tokenizing, the cost is an estimate; a
request that is refused has cost no more than reading its body. Only the event loop comes here, so there is no lock.
"""

from __future__ import annotations

import math
import time
from collections import deque
from types import TracebackType

from service.errors import Overloaded

# A token of English is four to five bytes, one of Chinese three.
BYTES_PER_TOKEN = 4
MAX_RETRY_SECONDS = 60


class Admission:
    def __init__(self, limit_tokens: int) -> None:
        self.limit_tokens = limit_tokens
        self.tokens = 0
        self.requests = 0
        self.entered = 0  # ever
        # Refused requests that have not come back yet: when they were told to, and their tokens.
        self._told: deque[tuple[float, int]] = deque()
        self._told_tokens = 0

    def enter(self, tokens: int, tokens_per_second: float) -> Ticket:
        """A ticket to use in a `with`, at the end of which the request has left; Overloaded when there is no room."""
        if self.requests and self.tokens + tokens > self.limit_tokens:
            raise Overloaded(
                f"The service is full: {self.tokens} tokens of {self.requests} requests wait or run, and "
                f"{self.limit_tokens} is the limit; try again later.",
                retry_after=self._retry_after(tokens, tokens_per_second),
            )
        return Ticket(self, tokens)

    def _retry_after(self, tokens: int, tokens_per_second: float) -> int:
        """Seconds until the queue and those refused before are through: all at once they would not fit either."""
        now = time.monotonic()
        while self._told and self._told[0][0] <= now:
            self._told_tokens -= self._told.popleft()[1]
        ahead = self.tokens + self._told_tokens
        seconds = min(MAX_RETRY_SECONDS, max(1, math.ceil(ahead / max(tokens_per_second, 1.0))))
        self._told.append((now + seconds, tokens))
        self._told_tokens += tokens
        return seconds


class Ticket:
    def __init__(self, admission: Admission, tokens: int) -> None:
        self._admission = admission
        self._tokens = tokens
        admission.tokens += tokens
        admission.requests += 1
        admission.entered += 1

    def settle(self, tokens: int) -> None:
        """Put the true cost in the place of the estimate."""
        self._admission.tokens += tokens - self._tokens
        self._tokens = tokens

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.tokens -= self._tokens
        self._admission.requests -= 1


def estimate(texts: list[str]) -> int:
    """Tokens that texts will probably have, special tokens included."""
    return sum(2 + len(text.encode(errors="replace")) // BYTES_PER_TOKEN for text in texts)
