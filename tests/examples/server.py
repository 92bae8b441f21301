"""An app served by uvicorn in a thread of this process, so that tests reach what is behind it."""

from __future__ import annotations

import socket
import threading
from typing import Any


class Server:
    """Serves an app until `stop`.

    Attributes:
        address: where it listens.
        url: of its root, without the last slash.
    """

    def __init__(self, app: Any) -> None:
        import uvicorn

        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]})
        self._thread.start()

    def stop(self) -> None:
        """End the app as a signal would; answers are waited for."""
        self._server.should_exit = True
        self._thread.join(30)
        self._listener.close()
        assert not self._thread.is_alive()
