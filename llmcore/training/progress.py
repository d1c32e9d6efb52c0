"""What a person at the terminal sees and may ask for: progress, and a stop that keeps the run."""

from __future__ import annotations

import signal
import sys
import threading
import time
from typing import Any


class Progress:
    """A bar with time left on a terminal, plain lines at most every few seconds otherwise, nothing when not shown."""

    def __init__(self, total: int, what: str, *, done: int = 0, show: bool = True, every_seconds: float = 10.0) -> None:
        self.total, self.what, self.show, self.every = total, what, show, every_seconds
        self.begin, self.base, self.last = time.monotonic(), done, 0.0
        self.bar: Any = None
        if show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task(what, total=total, completed=done, note="")
            self.bar.start()

    def update(self, done: int, note: str = "") -> None:
        if not self.show:
            return
        if self.bar is not None:
            self.bar.update(self.task, completed=done, note=note)
            return
        now = time.monotonic()
        if done >= self.total or now - self.last >= self.every:
            left = (now - self.begin) / max(1, done - self.base) * (self.total - done)
            print(
                f"{self.what} {done}/{self.total}  {now - self.begin:.0f} s, {left:.0f} s left  {note}".rstrip(),
                file=sys.stderr,
                flush=True,
            )
            self.last = now

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Interrupt:
    """The first Ctrl-C or SIGTERM asks for a checkpoint at the end of the step; the second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, _frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("stopping after this step; again to stop at once", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
