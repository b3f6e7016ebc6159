"""
The rules of toy.py behind an OpenAI-compatible server. It prints its address:
    python tests/serve_toy.py 8000      then --tutor http://127.0.0.1:8000/v1 --tutor_model toy
"""
import base64
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import toy


def read_chat(body):
    """The body of a chat completion request -> a request as judge.py describes it."""
    system, user = [message["content"] for message in body["messages"]]
    if isinstance(user, str):
        return {"system": system, "text": user, "image": None}
    png = base64.b64decode(user[0]["image_url"]["url"].split(",", 1)[1])
    return {"system": system, "text": user[1]["text"], "image": png}


def completion(content, finish_reason="stop", **message):
    """What a chat server answers. Every reply costs 10 tokens in and 5 out."""
    message = {"role": "assistant", "content": content, **message}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5}}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        status, headers, value = self.reply(self.rfile.read(int(self.headers["Content-Length"])))
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def reply(self, body):
        """-> status, headers, and bytes or a JSON value. The tests override this to misbehave."""
        try:
            return 200, {}, completion(toy.ask([read_chat(json.loads(body))])[0])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            return 400, {}, {"error": {"message": f"no request of this world: {error!r}"}}

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 256      # with 5, forty callers would have to wait


if __name__ == "__main__":
    server = Server(("127.0.0.1", int(sys.argv[1])), Handler)
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()
