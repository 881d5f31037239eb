"""Peak anonymous memory of this process, watched while something runs."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

STATUS = Path("/proc/self/status")


class PeakMemory:
    """Context manager; `peak` is the largest RssAnon seen, bytes (0 where the system has no /proc).

    RssAnon leaves out memory-mapped files: those pages are the page cache's and are given up when
    another process needs them.
    """

    def __init__(self, interval: float = 0.02) -> None:
        self.peak = 0
        self._interval = interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, rss_anon())
            if self._done.wait(self._interval):
                return


def rss_anon() -> int:
    """RssAnon of this process now, bytes."""
    try:
        text = STATUS.read_text(encoding="ascii")
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    return 0
