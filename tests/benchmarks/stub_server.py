"""A server that answers as mlx_lm.server does, without a model: its answer is the length of the prompt, and it forgets all at the end."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOW = sys.argv[1]
SEEN: list[str] = []


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = body.get("prompt") or "".join(message["content"] for message in body["messages"])
        if HOW == "refuses" and said != "1 2 3":
            self.send_error(404, "no such model")
            return
        self.send_response(200)
        self.end_headers()
        events = [": keepalive 1/2", {"choices": [self.choice(f"<{len(said)}>")]}]
        if HOW != "ends early" or said == "1 2 3":
            cached = max((len(before) for before in SEEN if said.startswith(before)), default=0)
            usage = {
                "prompt_tokens": len(said),
                "completion_tokens": 3,
                "prompt_tokens_details": {"cached_tokens": cached},
            }
            events += [{"choices": [], "usage": usage}, "[DONE]"]
        for event in events:
            line = event if str(event).startswith(":") else f"data: {event if event == '[DONE]' else json.dumps(event)}"
            self.wfile.write(f"{line}\n\n".encode())
        SEEN.append(said)

    def choice(self, text):
        return {"text": text} if self.path == "/v1/completions" else {"delta": {"role": "assistant", "content": text}}

    def log_message(self, *_):
        pass


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
