"""Whether and when a client asks again what was refused or lost.

Everything that clients ask may be asked twice: an answer changes nothing in the server. Does not
send or wait itself.
"""

import math
import random
import time
from dataclasses import replace
from typing import Any

import httpx

from server.client import calls
from server.client.calls import Call, ToComServerError

#: How a call is lost: nobody listens, or who did is gone before the answer was there. Not by a
#: timeout, after which the caller no longer wants to wait.
LOST = (httpx.NetworkError, httpx.RemoteProtocolError)

#: Seconds until a call that was lost is tried again; each further loss doubles them.
BACKOFF = 0.1

#: Statuses after which the same request may succeed.
_TRANSIENT = (429, 503)

#: What a proxy (Ray's 500, others' 502) says when the server behind it is gone.
_LOST_BEHIND_PROXY = (500, 502)

_PROBLEM = "application/problem+json"


class Tries:
    """The tries of one call, of which the first is about to be made.

    Args:
        call: what is asked.
        retries: how often it may be asked again.
        timeout: seconds without a sign of the server after which it is not.

    Attributes:
        call: as the next try sends it: what a loss has cost is taken off its `deadline_ms`.
    """

    def __init__(self, call: Call[Any], retries: int, timeout: float) -> None:
        self.call = self._asked = call
        self._left = retries
        self._losses = 0
        self._timeout = timeout
        self._began = time.monotonic()

    def after_refusal(self, response: httpx.Response) -> float:
        """Return the seconds after which to try again.

        Raises:
            ToComServerError: if the server would refuse it again, or too often.
        """
        refusal = calls.refusal(response)
        # What the server says itself is a problem.
        kind: str = response.headers.get("Content-Type", "")
        if response.status_code in _LOST_BEHIND_PROXY and not kind.startswith(_PROBLEM):
            return self.after_loss(refusal)
        if not self._left or response.status_code not in _TRANSIENT:
            raise refusal
        self._left -= 1
        delay = 1.0 if refusal.retry_after is None else refusal.retry_after
        # The server has spoken and wants a new request, which has all of its time.
        self.call = self._asked
        self._began = time.monotonic() + delay
        return delay

    def after_loss(self, error: httpx.TransportError | ToComServerError) -> float:
        """Return the seconds after which to try again, or raise the error.

        That is raised if it has come too often, or if the call's time would be over by then.
        """
        # Spread out, so that those who lost the same server do not come back together.
        delay: float = BACKOFF * 2**self._losses * random.uniform(1, 1.5)
        spent = time.monotonic() + delay - self._began
        left_ms = self._asked.params.get("deadline_ms", math.inf) - 1000 * spent
        if not self._left or spent >= self._timeout or left_ms < 1:
            raise error
        self._left -= 1
        self._losses += 1
        if math.isfinite(left_ms):
            params = {**self._asked.params, "deadline_ms": round(left_ms)}
            self.call = replace(self._asked, params=params)
        return delay
