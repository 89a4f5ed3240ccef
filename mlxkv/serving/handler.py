"""The server's answers over HTTP: mlx-lm's, and the numbers of the store."""

from __future__ import annotations

import json
import logging
from typing import Any

from mlx_lm import server

from mlxkv.serving.generation import Generator

log = logging.getLogger("mlxkv.serving")
STATISTICS = "/v1/mlxkv/store"


class Handler(server.APIHandler):
    """One connection."""

    response_generator: Generator

    def do_GET(self) -> None:  # noqa: N802  # as http.server calls it
        """Answer what mlx-lm answers, and `/v1/mlxkv/store`."""
        if self.path.partition("?")[0].rstrip("/") != STATISTICS:
            super().do_GET()  # type: ignore[no-untyped-call]
            return
        generator = self.response_generator
        facts = {**generator.prompts.statistics(), "learning": generator.model_provider.learning()}
        body = json.dumps(facts).encode()
        self._set_completion_headers(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        """Answer a request.

        Parameters
        ----------
        request
            mlx-lm's request.
        stop_words
            What the client gave as "stop".
        """
        if not isinstance(stop_words, list) or not all(isinstance(word, str) and word for word in stop_words):
            self._refuse("stop has to be a text or a list of texts")  # anything else would end mlx-lm's thread
            return
        with self.response_generator.answering():
            super().handle_completion(request, stop_words)

    def _refuse(self, why: str) -> None:
        self._set_completion_headers(400)
        self.end_headers()
        self.wfile.write(json.dumps({"error": why}).encode())

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        """Log refusals; of what is answered another line tells more.

        Parameters
        ----------
        code
            Status of the response.
        size
            Not known here.
        """
        level = logging.DEBUG if isinstance(code, int) and code < 400 else logging.WARNING
        log.log(level, '%s "%s" %s', self.address_string(), self.requestline, format(code, "d"))

    def log_message(self, format: str, *args: Any) -> None:
        """Log what http.server has to say.

        Parameters
        ----------
        format
            A format of Python's old kind.
        *args
            What it formats.
        """
        log.info("%s %s", self.address_string(), (format % args).translate(self._control_char_table))  # type: ignore[attr-defined]
