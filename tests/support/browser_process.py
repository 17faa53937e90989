"""A real browser (Chromium, as Qt brings it) without a screen, driven by lines of JSON: run as a script.

Each line on the standard input is ``[command, *arguments]`` and is answered by a line of JSON. All requests of the page
are kept, and none but for the page itself is let through.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ["QT_QPA_PLATFORM"] = "offscreen"
os.environ["QT_QUICK_BACKEND"] = "software"
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--no-sandbox --disable-gpu"

from PyQt6.QtCore import QPoint, QPointF, Qt, QUrl
from PyQt6.QtGui import QWheelEvent
from PyQt6.QtTest import QTest
from PyQt6.QtWebEngineCore import (
    QWebEnginePage,
    QWebEngineProfile,
    QWebEngineSettings,
    QWebEngineUrlRequestInterceptor,
)
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

SECONDS = 30


class Watch(QWebEngineUrlRequestInterceptor):
    """Keeps what a page asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def interceptRequest(self, info: Any) -> None:
        url = info.requestUrl()
        self.asked.append(url.toString()[:200])
        info.block(url.scheme() not in ("file", "about", "data"))


class Page(QWebEnginePage):
    """Keeps what a page complains of."""

    said: list[str]

    def javaScriptConsoleMessage(
        self, level: Any, message: str | None, line: int, source: str | None
    ) -> None:
        self.said.append(f"{message} ({line})")


class Browser:
    """One window."""

    def __init__(self) -> None:
        self.watch = Watch()
        self.profile = QWebEngineProfile()
        self.profile.setUrlRequestInterceptor(self.watch)
        self.page = Page(self.profile)
        self.page.said = []
        # Else requests of a file end before the watch sees them.
        self.page.settings().setAttribute(
            QWebEngineSettings.WebAttribute.LocalContentCanAccessRemoteUrls, True
        )
        self.view = QWebEngineView()
        self.view.setPage(self.page)

    def open(self, path: str, width: int, height: int) -> list[str]:
        """Shows a file; returns what it asked for."""
        self.watch.asked.clear()
        self.page.said.clear()
        loaded: list[bool] = []
        self.view.loadFinished.connect(loaded.append)
        self.view.resize(width, height)
        self.view.show()
        self.view.load(QUrl.fromLocalFile(path))
        self._until(lambda: bool(loaded))
        self.view.loadFinished.disconnect(loaded.append)
        assert loaded[0]
        return self.watch.asked

    def asked(self) -> list[str]:
        """What was asked for since the page was opened, it itself included."""
        return self.watch.asked

    def said(self) -> list[str]:
        """What stands in the console."""
        return self.page.said

    def js(self, code: str) -> Any:
        """What an expression gives."""
        found: list[Any] = []
        self.page.runJavaScript(f"JSON.stringify({code})", found.append)
        self._until(lambda: bool(found))
        return json.loads(found[0]) if found[0] else None

    def until(self, code: str) -> bool:
        """Waits for an expression to be true."""
        self._until(lambda: bool(self.js(code)))
        return True

    def point(self, x: float, y: float) -> None:
        """Moves the mouse there, from beside it: the first move over a new page only enters it."""
        QTest.mouseMove(self._window, QPoint(int(x) + 1, int(y)))
        QTest.qWait(20)
        QTest.mouseMove(self._window, QPoint(int(x), int(y)))
        QTest.qWait(60)

    def click(self, x: float, y: float) -> None:
        """Presses and lets go of the left button."""
        QTest.mouseClick(self._window, Qt.MouseButton.LeftButton, pos=QPoint(int(x), int(y)))
        QTest.qWait(60)

    def key(self, name: str) -> None:
        """Presses a key: ``Right``, ``Escape``."""
        QTest.keyClick(self._window, getattr(Qt.Key, f"Key_{name}"))
        QTest.qWait(60)

    def wheel(self, x: float, y: float, sideways: int, down: int) -> None:
        """Turns the wheel by so many notches."""
        place = QPointF(x, y)
        event = QWheelEvent(
            place,
            self._window.mapToGlobal(place),
            QPoint(),
            QPoint(-120 * sideways, -120 * down),
            Qt.MouseButton.NoButton,
            Qt.KeyboardModifier.NoModifier,
            Qt.ScrollPhase.NoScrollPhase,
            False,
        )
        QApplication.sendEvent(self._window, event)
        QTest.qWait(300)

    def picture(self, path: str) -> None:
        """Writes what is seen to a PNG."""
        QTest.qWait(300)
        self.view.grab().save(path)

    @property
    def _window(self) -> Any:
        return self.view.focusProxy()

    def _until(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + SECONDS
        while not true():
            if time.monotonic() > end:
                raise TimeoutError("the browser did not come to it")
            QTest.qWait(10)


def main() -> None:
    application = QApplication(sys.argv[:1])
    browser = Browser()
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        try:
            answer: Any = {"answer": getattr(browser, command)(*arguments)}
        except Exception as error:  # it is the test that asked who has to hear of it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    browser.view.setPage(None)
    browser.page.deleteLater()
    QTest.qWait(50)
    application.quit()


if __name__ == "__main__":
    main()
