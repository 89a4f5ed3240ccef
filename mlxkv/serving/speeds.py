"""How fast prompts are computed and read from disk here, as requests have shown."""

from __future__ import annotations

from threading import Lock

LEAST_GAIN = 64  # tokens that a disk has to save, at least
GAIN_SHARE = 8  # and this share of what is read, while speeds are not known
LEAST_MEASURED = 256  # tokens of which a speed is measured: with fewer it is the time of something else
_KNOWN = 2  # measurements until a speed is used: the first one often waits for kernels
_KEPT = 0.5  # of what was measured before, at each measurement
_FORGIVEN = 0.98  # of the seconds of reading, each time it is found too slow: some time it is tried again


class _Speed:
    """Tokens and seconds, the newest of which count most."""

    def __init__(self) -> None:
        self.tokens = self.seconds = 0.0
        self.count = 0

    def add(self, tokens: int, seconds: float) -> None:
        self.tokens, self.seconds = self.tokens * _KEPT + tokens, self.seconds * _KEPT + seconds
        self.count += 1

    @property
    def seconds_each(self) -> float | None:
        """Seconds of a token; None while it is not known."""
        return self.seconds / self.tokens if self.count >= _KNOWN else None


class Speeds:
    """Speeds of computing and of reading prompts of one model. Any thread may use it."""

    def __init__(self) -> None:
        self._computing, self._reading, self._lock = _Speed(), _Speed(), Lock()

    def computed(self, tokens: int, seconds: float) -> None:
        """Take note of tokens that were computed while nothing else was.

        Parameters
        ----------
        tokens
            Their number; few ones are not counted.
        seconds
            Seconds that it took.
        """
        self._note(self._computing, tokens, seconds)

    def read(self, tokens: int, seconds: float) -> None:
        """Take note of tokens that were read from disk.

        Parameters
        ----------
        tokens
            Their number; few ones are not counted.
        seconds
            Seconds until the model could go on from them.
        """
        self._note(self._reading, tokens, seconds)

    def is_worth(self, stored: int, kept: int) -> bool:
        """Return whether reading tokens takes less time than computing those that it saves.

        Parameters
        ----------
        stored
            Tokens of a prompt that would be read.
        kept
            The first ones of them that are in memory as well.

        Returns
        -------
        bool
            By what was measured; while that is little, whether it saves an eighth of what is read.
        """
        if (saved := stored - kept) < LEAST_GAIN:
            return False
        with self._lock:
            computing, reading = self._computing.seconds_each, self._reading.seconds_each
            if computing is None or reading is None:
                return saved >= stored // GAIN_SHARE
            if stored * reading < saved * computing:
                return True
            if stored * reading > stored * computing:  # even with nothing in memory
                self._reading.seconds *= _FORGIVEN
            return False

    def statistics(self) -> dict[str, float | None]:
        """Return what is known.

        Returns
        -------
        dict
            `computed_tokens_per_second` and `read_tokens_per_second`, None while they are not known.
        """
        with self._lock:
            each = {"computed": self._computing.seconds_each, "read": self._reading.seconds_each}
        return {f"{key}_tokens_per_second": round(1 / value, 1) if value else None for key, value in each.items()}

    def _note(self, speed: _Speed, tokens: int, seconds: float) -> None:
        if tokens >= LEAST_MEASURED and seconds > 0:
            with self._lock:
                speed.add(tokens, seconds)
