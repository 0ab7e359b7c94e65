"""A TCP proxy that a test can cut, as trains, lifts and laptops do with connections."""

import contextlib
import socket
import threading

EVENT = b"\n\n"  # ends an event of a stream; neither heads nor JSON have it


class Cable:
    """Carries bytes between a browser and the server at ``port``, from ``url``."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._is_cut = False
        self._left: int | None = None
        self.held = threading.Event()
        self._start(self._accept)

    def hold_after(self, events: int) -> None:
        """The next stream stops after so many events, and ``held`` is set; until it is cut."""
        self.held.clear()
        self._left = events

    def cut(self) -> None:
        """End all connections, and refuse new ones."""
        with self._lock:
            self._is_cut = True
            for end in self._open:
                with contextlib.suppress(OSError):
                    # A reset, not an orderly end.
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._is_cut = False

    def close(self) -> None:
        self.cut()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(60)

    def __enter__(self) -> "Cable":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, work, *given: socket.socket) -> None:  # type: ignore[no-untyped-def]
        thread = threading.Thread(target=work, args=given, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self._is_cut:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._port))
                with self._lock:
                    self._open |= {near, far}
                self._start(self._carry_pair, near, far)

    def _carry_pair(self, near: socket.socket, far: socket.socket) -> None:
        back = threading.Thread(target=self._carry, args=(near, far))
        back.start()
        self._carry(far, near, answers=True)
        back.join()
        with self._lock:
            self._open -= {near, far}
            near.close()
            far.close()

    def _carry(self, source: socket.socket, sink: socket.socket, answers: bool = False) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if answers and self._left is not None:
                    data = self._shorten(data)
                sink.sendall(data)
                if answers and self.held.is_set() and self._left == 0:
                    self._left = None
                    self._swallow(source)
                    break
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _shorten(self, data: bytes) -> bytes:
        """``data`` up to the end of the last event that may pass."""
        end = 0
        while self._left and (found := data.find(EVENT, end)) >= 0:
            end = found + len(EVENT)
            self._left -= 1
        if self._left:
            return data
        self.held.set()
        return data[:end]

    @staticmethod
    def _swallow(source: socket.socket) -> None:
        while source.recv(1 << 16):
            pass
