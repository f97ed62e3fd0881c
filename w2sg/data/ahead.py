"""What a loop needs next is made while it is at work: one thread beside it, the same order, nothing left behind."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Iterates over ``make(place)`` of each place, made by a thread while those before are used.

    An error of ``make`` is raised where its item would have come, with the traceback that it had.

    Args:
        make: is called in the thread alone, in order; it must draw no random numbers that others draw.
        places: what it is called with.
        depth: items that may be ready and not yet taken.
    """

    def __init__(self, make: Callable[[Any], T], places: Iterable[Any], depth: int = 2):
        self._make, self._places = make, places
        self._room, self._ready = threading.Semaphore(depth), queue.SimpleQueue()
        self._over = False
        self._thread = threading.Thread(target=self._work, name="w2sg-ahead", daemon=True)

    def _work(self) -> None:
        try:
            for place in self._places:
                self._room.acquire()
                if self._over:
                    return
                self._ready.put((True, self._make(place)))
        except BaseException as error:  # whatever it is, it belongs to the loop
            self._ready.put((False, error))
        else:
            self._ready.put((False, None))

    def __iter__(self) -> Iterator[T]:
        """Once."""
        self._thread.start()
        try:
            while True:
                more, item = self._ready.get()
                if not more:
                    if item is not None:
                        raise item
                    return
                self._room.release()
                yield item
        finally:
            self.close()

    def close(self) -> None:
        """End the thread, after the item that it is at."""
        self._over = True
        self._room.release()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
