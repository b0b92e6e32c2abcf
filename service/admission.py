"""Who gets in: one rule for every request, whether it holds one text or a batch.

A request costs the tokens it brings. It is admitted while the tokens of all admitted requests stay within the limit,
or when it would be alone, so that no request is too large for ever. Before anything is parsed, the cost is guessed
from the length of the body. A few requests may wait at the door, for a moment and in order: what leaves is followed at
once, where a client that was told to come back in a second would leave the machine idle. When the door is crowded,
edge.py refuses before it has read anything. Only the event loop comes here, so there is no lock.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from service.errors import Overloaded

# A token of English is four to five bytes, one of Chinese three.
BYTES_PER_TOKEN = 4
# Text and its special tokens: no request has fewer.
MIN_TOKENS = 3
# At the door: requests, and seconds for each. No client may be told to come back sooner than in one second.
MAX_WAITING = 16
WAIT_SECONDS = 1.0
MAX_RETRY_SECONDS = 60
# Refusals in a second that are sent at once, and how long others are held back: a client that pays no heed to
# Retry-After can ask no faster than it is answered.
REFUSALS_PER_SECOND = 200.0
HOLD_SECONDS = 1.0


# Of what was measured before, how much counts after one more request.
MEMORY = 0.98


class Admission:
    """inference_speed: tokens a second of the batches alone, the guess until the whole service's own is known."""

    def __init__(self, limit_tokens: int, inference_speed: Callable[[], float]) -> None:
        self.limit_tokens = limit_tokens
        self.tokens = 0
        self.requests = 0
        self.entered = 0  # ever
        self._inference_speed = inference_speed
        # What left while others waited, so at full speed: tokens, the seconds it took, and when the last one left.
        self._done_tokens = self._done_seconds = 0.0
        self._last_left: float | None = None
        self._waiting: deque[tuple[int, asyncio.Future[Ticket]]] = deque()
        # Refused requests that have not come back yet: when they were told to, and their tokens.
        self._told: deque[tuple[float, int]] = deque()
        self._told_tokens = 0
        self._next_refusal = 0.0

    @property
    def crowded(self) -> bool:
        """Whether nobody more may wait at the door."""
        return len(self._waiting) >= MAX_WAITING

    def has_room(self, tokens: int) -> bool:
        """Whether a request of so many tokens would be admitted at once."""
        return not self._waiting and self._fits(tokens)

    async def enter(self, tokens: int, seconds: float = WAIT_SECONDS) -> Ticket:
        """A ticket to use in a `with`, at the end of which the request has left.

        Raises Overloaded when the door is crowded, or no room was found in so many seconds.
        """
        if self.has_room(tokens):
            return Ticket(self, tokens)
        if self.crowded:
            raise self.refusal(tokens)
        loop = asyncio.get_running_loop()
        place: tuple[int, asyncio.Future[Ticket]] = tokens, loop.create_future()
        self._waiting.append(place)
        timer = loop.call_later(min(seconds, WAIT_SECONDS), self._turn_away, place)
        try:
            return await place[1]
        except asyncio.CancelledError:
            if place[1].done() and not place[1].cancelled():
                place[1].result().leave()
            raise
        finally:
            timer.cancel()

    def refusal(self, tokens: int) -> Overloaded:
        """The error for a request of so many tokens, which is expected to come back when it is told to."""
        return Overloaded(
            f"The service is full: {self.tokens} tokens of {self.requests} requests wait or run, and "
            f"{self.limit_tokens} is the limit; try again later.",
            retry_after=self._retry_after(tokens),
        )

    def hold_seconds(self) -> float:
        """How long to hold back the refusal that is about to be sent."""
        now = time.monotonic()
        self._next_refusal = max(self._next_refusal, now - 1.0) + 1.0 / REFUSALS_PER_SECOND
        return min(max(0.0, self._next_refusal - now), HOLD_SECONDS)

    def tokens_per_second(self) -> float:
        """How fast requests get through when there are more than enough of them."""
        return self._done_tokens / self._done_seconds if self._done_seconds > 0 else self._inference_speed()

    def left(self, tokens: int) -> None:
        """A request of so many tokens has gone."""
        self.tokens -= tokens
        self.requests -= 1
        if self._waiting:
            now = time.monotonic()
            if self._last_left is not None:
                self._done_tokens = MEMORY * self._done_tokens + tokens
                self._done_seconds = MEMORY * self._done_seconds + now - self._last_left
            self._last_left = now
        else:
            self._last_left = None
        self.changed()

    def changed(self) -> None:
        """Let in who waits and fits, in order."""
        while self._waiting and self._fits(self._waiting[0][0]):
            tokens, place = self._waiting.popleft()
            if not place.done():
                place.set_result(Ticket(self, tokens))

    def _fits(self, tokens: int) -> bool:
        return not self.requests or self.tokens + tokens <= self.limit_tokens

    def _turn_away(self, place: tuple[int, asyncio.Future[Ticket]]) -> None:
        if place in self._waiting:
            self._waiting.remove(place)
            if not place[1].done():
                place[1].set_exception(self.refusal(place[0]))
            self.changed()

    def _retry_after(self, tokens: int) -> int:
        """Seconds until the queue and those refused before are through: all at once they would not fit either."""
        now = time.monotonic()
        while self._told and self._told[0][0] <= now:
            self._told_tokens -= self._told.popleft()[1]
        ahead = self.tokens + self._told_tokens
        seconds = min(MAX_RETRY_SECONDS, max(1, math.ceil(ahead / max(self.tokens_per_second(), 1.0))))
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
        """Put the true cost in the place of the guess."""
        self._admission.tokens += tokens - self._tokens
        self._tokens = tokens
        self._admission.changed()

    def leave(self) -> None:
        self._admission.left(self._tokens)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()


def guess(body_bytes: int) -> int:
    """Tokens that a body of this length probably brings."""
    return max(MIN_TOKENS, body_bytes // BYTES_PER_TOKEN)
