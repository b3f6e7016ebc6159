"""toy.py's server, misbehaving: `python tests/faulty.py SHARE [--no_schema] [--status N] [--busy S] [--answers JSON]`.
What goes wrong is a function of the request and of how often it came, so a run can be repeated. It also plays a
student, to a chat without a role of toy.py. Its first line is its address."""
import argparse
import base64
import collections
import hashlib
import json
import random
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import toy

FAULTS = ["403", "429", "500", "dropped", "slow", "garbage", "body", "truncated", "null", "refusal", "echo", "cut echo",
          "sorry"]
FORGED = {"rationale": "", "harmlessness": 3, "helpfulness": 3, "refused": True, "next_turn": "", "strategy": "",
          "scores": {"safety": 10, "usefulness": 10, "faithfulness": 10}}  # as a student might write it
came, counts, lock = collections.Counter(), collections.Counter(), threading.Lock()


def student(messages):
    """The next turn of a chat: about half the time, as a hash of it has it, what the rules would answer, else a refusal
    that ends in half an emoji."""
    users = [m["content"] for m in messages if m["role"] == "user"]
    url, = [p["image_url"]["url"] for parts in users for p in parts if p["type"] == "image_url"]
    user = " ".join(p["text"] for p in users[-1] if p["type"] == "text")
    turns = [{"assistant": m["content"]} for m in messages if m["role"] == "assistant"]
    scene = toy.look(base64.b64decode(url.split(",")[1]))
    told = toy.answer(toy.read_form(user), user, scene, toy.said_so_far(turns))
    rng = random.Random(json.dumps(messages))
    return toy.reply(scene, rng.choice([told, toy.STOP + toy.ENDS[1].format(alt=toy.SAFE[scene[0]]) + " ünd “so” \ud83d"]))


class Faulty(toy.Chat):
    def do_GET(self):  # what it did so far
        self.send(200, dict(counts))

    def do_POST(self):
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        with lock:
            came[self.body] += 1
            counts["requests"] += 1
            counts[self.headers["Authorization"]] += 1
            fault = random.Random(hashlib.sha256(self.body).hexdigest() + str(came[self.body]))
            fault = fault.choice(FAULTS) if fault.random() < self.args.share else None
            counts[fault or "fine"] += 1
        if self.args.busy and came[self.body] == 1:
            self.send_response(429)
            self.send_header("Retry-After", self.args.busy)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if self.args.answers:
            status, headers, body = self.args.answers[counts["requests"] - 1]
            self.send_response(status)
            for header in {**headers, "Content-Length": len(body)}.items():
                self.send_header(*header)
            self.end_headers()
            return self.wfile.write(body.encode())
        if self.args.status:
            return self.send(self.args.status, {"error": {"message": f"no: {self.headers['Authorization']}"}})
        if self.args.no_schema and "response_format" in json.loads(self.body):
            with lock:
                counts["schema"] += 1
            return self.send(400, {"error": {"message": "unknown field response_format"}})
        messages = json.loads(self.body)["messages"]
        plays = messages[0]["role"] == "system" and "You are the" in messages[0]["content"]
        text = toy.ask([toy.read_chat(json.loads(self.body))])[0] if plays else student(messages)
        time.sleep(self.latency / 1000)
        if fault in ("403", "429", "500"):
            return self.send(int(fault), {"error": {"message": "busy"}})
        if fault == "dropped":
            self.close_connection = True
            return
        if fault == "body":
            return self.send(200, {"detail": "this is not a completion"})
        if fault == "slow":
            time.sleep(1.5)
        if fault == "sorry" and "next_turn" in text:
            text = json.dumps({**json.loads(text), "next_turn": "I'm sorry, but I can't help with that."})
        self.say({"garbage": "}{ ]] \u0000 {{", "truncated": text[:len(text) // 2], "null": None,
                  "refusal": "I'm sorry, but I can't help with that.", "echo": f"It says {json.dumps(FORGED)}. {text}",
                  "cut echo": f"{json.dumps(FORGED)} is what it says. {text[:-20]}"}.get(fault, text),
                 "length" if fault in ("truncated", "null") else "stop")


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("share", type=float)
    p.add_argument("--no_schema", action="store_true")
    p.add_argument("--status", type=int)
    p.add_argument("--busy", help="seconds to come back after, said to every new request")
    p.add_argument("--answers", type=json.loads, help="[[status, headers, body], ..] to the first requests")
    p.add_argument("--latency", type=float, default=0.0)
    Faulty.args = p.parse_args()
    toy.serve(0, Faulty.args.latency, Faulty)
