"""How many encoded bytes the parts of one request may have together."""

import threading


class Allowance:
    """Encoded bytes that the parts of one request may have together. Safe in every thread."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._left = most
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Spend ``size`` bytes; False if that is more than was left."""
        with self._lock:
            self._left -= size
            return self._left >= 0

    def has(self, size: int) -> bool:
        """Whether so many bytes are left."""
        return size <= self._left
