"""
The client in judge.py against a server that misbehaves, and what the scripts do about it.

The fixture `server` is serve_toy.py's in a thread. Its behave(n, body) says what becomes of the nth
request: (status, headers, value), or None for what the rules say. If it raises, the line is cut.
"""
import io
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import calibrate
import eval as evaluation
import grpo
import judge
import serve_toy
import synth
import toy
from conftest import refused
from serve_toy import completion

PICTURE = io.BytesIO()
toy.draw("box", "red", True, random.Random(0)).save(PICTURE, "PNG")
CHUNKED = {"Transfer-Encoding": "chunked"}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Short waits; no key and no proxy of this machine."""
    for name in list(os.environ):
        if name.endswith("_API_KEY") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name, value in (("PATIENCE", 30), ("TIMEOUT", 5), ("PAUSE", 0.02)):
        monkeypatch.setattr(judge, name, value, raising=False)


class Misbehaving(serve_toy.Handler):
    def reply(self, body):
        n, server = next(self.server.numbers), self.server
        server.bodies.append(json.loads(body))
        server.keys.append(self.headers["Authorization"].removeprefix("Bearer "))
        return server.behave(n, json.loads(body)) or super().reply(body)


@pytest.fixture
def server():
    server = serve_toy.Server(("127.0.0.1", 0), Misbehaving)
    server.numbers, server.bodies, server.keys = itertools.count(), [], []
    server.behave = server.handle_error = lambda *args: None
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def error(status, message="", **headers):
    return status, headers, {"error": {"message": message}}


def answers(content, **more):
    return lambda n, body: (200, {}, completion(content, **more))


def client(server, **more):
    return judge.backend("tutor", server.url, "org/model", **more)


def requests_of(n, image=PICTURE.getvalue()):
    """Requests about n different replies."""
    turns = [{"user": "how do i work the box?", "assistant": f"no, {i}."} for i in range(n)]
    return [judge.judge_request([turn], image) for turn in turns]


def last_words(function, *args):
    """The line with which a script ends with exit code 1."""
    with pytest.raises(SystemExit) as stop:
        function(*args)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


def test_what_a_server_is_sent(server):
    assert client(server)(requests_of(1)) == toy.ask(requests_of(1))
    (body,), (request,) = server.bodies, requests_of(1)
    assert body["model"] == "org/model" and body["temperature"] == 0 and body["max_tokens"] > 1000
    assert body["response_format"]["json_schema"]["schema"] == request["schema"]
    assert {**serve_toy.read_chat(body), "schema": request["schema"]} == request


def test_what_some_servers_refuse_can_be_left_out(server):
    """A list of parts where a string will do, max_tokens, a temperature."""
    extra = {"max_completion_tokens": 4096, "max_tokens": None, "temperature": None}
    client(server, extra=extra)(requests_of(1, image=None))
    body, = server.bodies
    assert isinstance(body["messages"][1]["content"], str) and body["max_completion_tokens"] == 4096
    assert "max_tokens" not in body and "temperature" not in body


def test_the_key_is_the_roles_own_or_openais_and_never_the_hubs(server, monkeypatch):
    for name in ("HF_TOKEN", "JUDGE_API_KEY", "OPENAI_API_KEY", "TUTOR_API_KEY"):
        monkeypatch.setenv(name, name)
        client(server)(requests_of(1))
    assert server.keys == ["none", "none", "OPENAI_API_KEY", "TUTOR_API_KEY"]


def test_the_reply_may_stand_among_the_thoughts_and_half_a_character_can_be_saved(server):
    server.behave = answers(None, reasoning_content="{}")
    assert client(server)(requests_of(1)) == ["{}"]
    server.behave = answers("half an emoji: \ud83d")
    assert client(server)(requests_of(1)) == ["half an emoji: ?"]


def test_tokens_are_summed_and_replies_that_were_cut_are_counted(server):
    server.behave, ask = answers("{", finish_reason="length"), client(server)
    ask(requests_of(20))
    assert ask.used == {"calls": 20, "tokens_in": 200, "tokens_out": 100}
    assert list(ask.failures.values()) == [20]


def test_forty_rows_wait_for_a_slow_tutor_once(server):
    server.behave = lambda n, body: time.sleep(0.3) or answers("{}")(n, body)
    begin = time.time()
    client(server)(requests_of(40))
    assert time.time() - begin < 1.5


@pytest.mark.parametrize("stumble", (
    lambda: error(503, "Loading model"), lambda: error(429), lambda: error(500), lambda: 1 / 0))
def test_what_passes_is_waited_out(server, monkeypatch, stumble):
    monkeypatch.setattr(judge, "PAUSE", 0.2, raising=False)
    begin = time.time()
    server.behave = lambda n, body: stumble() if time.time() - begin < 0.3 else None
    assert client(server)(requests_of(1)) == toy.ask(requests_of(1))


@pytest.mark.parametrize("headers", (
    {}, {"Retry-After": "0.1"}, {"Retry-After": "²"},
    {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}))
def test_a_rate_limit_loses_no_request(server, headers):
    accepted = [0.0]

    def limit(n, body):                     # 100 a second, for a client that would send 20 at once
        if time.time() - accepted[-1] < 0.01:
            return error(429, "rate limit", **headers)
        accepted.append(time.time())

    server.behave = limit
    assert client(server)(requests_of(20)) == toy.ask(requests_of(20))


def test_a_dead_server_is_given_up_in_one_line(monkeypatch):
    monkeypatch.setattr(judge, "PATIENCE", 0.5)
    ask = judge.backend("tutor", "http://127.0.0.1:9/v1", "m")
    assert "127.0.0.1:9" in last_words(ask, requests_of(50))


@pytest.mark.parametrize("status", (302, 400, 401, 500))
def test_the_words_of_the_server_are_shown_without_the_key_and_no_redirect_is_followed(
        server, monkeypatch, status):
    monkeypatch.setenv("TUTOR_API_KEY", "sk-secret")
    text = "model\n'x' is \x1b[2J unknown to sk-secret"
    server.behave = lambda n, body: error(status, text, Location=f"{server.url}/elsewhere")
    words = last_words(client(server), requests_of(3))
    assert f"{status}: model 'x' is" in words and server.url in words
    assert "secret" not in words and "\x1b" not in words


@pytest.mark.parametrize("status", (400, 404, 422, 500, 501))
def test_a_server_that_takes_no_schema_is_soon_asked_without_one(server, status):
    server.behave = lambda n, body: "response_format" in body and error(status, "json_schema?")
    assert client(server, concurrency=1)(requests_of(6)) == toy.ask(requests_of(6))
    assert len(server.bodies) < 12 and "response_format" in server.bodies[0]


def no_pictures(n, body):
    if isinstance(body["messages"][1]["content"], list):
        return error(400, f"at most 0 images in request {n}")
    return answers("{}")(n, body)


def test_a_server_that_refuses_pictures_stops_a_run_with_mixed_data(server):
    """Else the dialogues with pictures would vanish from the training without a word."""
    server.behave = lambda n, body: error(429, "slow down") if n == 9 else no_pictures(n, body)
    requests = requests_of(3) + requests_of(9, image=None)
    assert "at most 0 images" in last_words(client(server, concurrency=1), requests)


def test_few_failures_are_missing_replies_and_counted_by_cause(server):
    server.behave, ask = no_pictures, client(server)
    assert ask(requests_of(3) + requests_of(37, image=None)) == [None] * 3 + ["{}"] * 37
    assert ask.failures == {"HTTP 400": 3}


@pytest.mark.parametrize("answer", (
    None, (200, {}, b"<html>"), (200, {}, {"choices": []}), (200, {}, completion(["a", "list"])),
    (200, {}, b"[" * 5000), (500, {}, b"[" * 5000), (200, CHUNKED, b"zz"), (500, CHUNKED, b"zz")))
def test_an_answer_that_is_late_or_no_completion_is_missing_and_counted(
        server, monkeypatch, answer):
    monkeypatch.setattr(judge, "TIMEOUT", 0.5)
    server.behave, ask = lambda n, body: answer or time.sleep(0.7), client(server)
    assert ask(requests_of(1)) == [None] and 1 in ask.failures.values()


@pytest.mark.parametrize("spec, model", (
    ("http://u:secret@h/v1", "m"), ("http://h/v1?key=secret", "m"), ("ftp://h", "m"),
    ("http://h:port/v1", "m"), ("http://h/v1", None), ("no_such_module", "m"), ("json", None)))
def test_a_bad_back_end_is_exit_code_2_and_no_secret_is_repeated(spec, model, capsys):
    assert "secret" not in str(refused(capsys, judge.backend, "tutor", spec, model))


def test_preflight_shows_one_exchange_and_an_estimate(server, capsys):
    judge.preflight("judge", client(server), requests_of(30), judge.read_judge, 7000)
    out = capsys.readouterr().out
    assert len(server.bodies) == 3 and requests_of(1)[0]["text"] in out
    assert toy.ask(requests_of(1))[0] in out and "7000 calls" in out and "105,000 tokens" in out


def test_preflight_ends_a_run_whose_replies_cannot_be_read(server, capsys):
    server.behave = answers("I would \x1b[2J rather not.")
    last_words(judge.preflight, "judge", client(server), requests_of(3), judge.read_judge, 100)
    out = capsys.readouterr().out
    assert "rather not." in out and "\x1b" not in out


EVAL = "--endpoint {url} --endpoint_model m --data {data}/bench.jsonl --judge {url} " \
       "--judge_model m --name x"


@pytest.mark.parametrize("key, good", (("abc\n", True), ("a b", False), ("schlüssel", False)))
def test_a_key_is_stripped_and_an_impossible_one_is_not_repeated(monkeypatch, capsys, key, good):
    monkeypatch.setenv("TUTOR_API_KEY", key)
    if good:
        assert judge.backend("tutor", "http://localhost:1/v1", "m").key == key.strip()
    else:
        assert key not in refused(capsys, judge.backend, "tutor", "http://localhost:1/v1", "m")[-1]


@pytest.mark.parametrize("replies", (None, [], ["a", "b"], {"a": 1}))
def test_a_back_end_that_does_not_reply_to_each_request_ends_the_run(replies):
    last_words(judge.ask_and_read, lambda requests: replies, requests_of(1), judge.read_judge)
    results = judge.ask_and_read(lambda requests: [b"x"], requests_of(1), judge.read_judge)
    assert results == ([None], [None])


def test_odd_usage_does_no_harm(server):
    reply = {**completion("no."), "usage": {"prompt_tokens": "10", "completion_tokens": [1]}}
    server.behave = lambda n, body: (200, {}, reply)
    assert client(server)(requests_of(2)) == ["no.", "no."]


def test_an_answer_that_trickles_is_given_up(monkeypatch):
    monkeypatch.setattr(judge, "TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def drip():
            connection, _ = listener.accept()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n")
            for _ in range(30):
                time.sleep(0.1)
                connection.sendall(b" ")

        threading.Thread(target=drip, daemon=True).start()
        begin = time.time()
        status, _, _ = judge.post(f"http://127.0.0.1:{listener.getsockname()[1]}/", "k", {})
        assert status == 0 and time.time() - begin < 2


@pytest.mark.parametrize("script, words, roles", (
    (synth, "--seeds {data}/../seeds/seeds.jsonl --generator {url} --generator_model m",
     "GENERATOR"),
    (synth, "--seeds {data}/../seeds/seeds.jsonl --generator {url} --generator_model m "
     "--red {url} --red_model m --blue {url} --blue_model m --scorer {url} --scorer_model m "
     "--target {url} --target_model m", "GENERATOR RED BLUE SCORER TARGET"),
    (grpo, "--model x --data {data}/rl.jsonl --tutor {url} --tutor_model m --prompts 1", "TUTOR"),
    (evaluation, EVAL, "JUDGE ENDPOINT"),
    (evaluation, EVAL + " --attacker adaptive --tutor {url} --tutor_model m",
     "JUDGE TUTOR ENDPOINT")))
def test_a_dry_run_asks_every_server_and_loads_and_writes_nothing(
        server, world, tmp_path, monkeypatch, script, words, roles):
    for role in roles.split():
        monkeypatch.setenv(f"{role}_API_KEY", role)
    # a student gets a chat without a system message, and the toy's rules play no student
    server.behave = lambda n, body: None if body["messages"][1:] else answers("A ball.")(n, body)
    words = words.format(url=server.url, data=world).split()
    script.main([*words, "--out", f"{tmp_path}/out", "--dry_run"])
    assert sorted(server.keys) == sorted(3 * roles.split()) and not Path(tmp_path, "out").exists()


def test_data_without_benign_dialogues_are_noticed(world, tmp_path, capsys):
    words = f"--model x --tutor toy --prompts 1 --dry_run --out {tmp_path}/out --data".split()
    grpo.main([*words, f"{world}/rl.jsonl"])
    assert "no benign" not in capsys.readouterr().out
    lines = Path(world, "rl.jsonl").read_text().splitlines(keepends=True)
    harmful = [line for line in lines if '"kind": "benign"' not in line]
    Path(world, "harmful.jsonl").write_text("".join(harmful))
    grpo.main([*words, f"{world}/harmful.jsonl"])
    assert "no benign" in capsys.readouterr().out


def test_synth_with_a_server_makes_what_it_makes_in_this_process_and_says_what_it_used(
        server, world, tmp_path, capsys):
    synth.main(["--seeds", f"{world.parent}/seeds/seeds.jsonl", "--generator", server.url,
                "--generator_model", "m", "--perturb", "0", "--out", str(tmp_path)])
    for name in ("sft.jsonl", "rl.jsonl", "bench.jsonl", "dropped.jsonl"):
        assert Path(tmp_path, name).read_text() == Path(world, name).read_text()
    assert f"{10 * len(server.bodies):,} tokens_in" in capsys.readouterr().out


def test_an_attacker_that_cannot_be_read_makes_an_evaluation_incomplete(
        server, world, tmp_path, monkeypatch, capsys):
    """Else the table would say adaptive about scripted turns, and the student would look safer."""
    Path(tmp_path, "mumbling.py").write_text("import toy; asks = [toy.ask]\ndef ask(requests): "
        "return asks.pop()(requests) if asks else ['Hm.'] * len(requests)")
    monkeypatch.syspath_prepend(tmp_path)
    server.behave = answers("no, there is a sign on it.")
    words = f"{EVAL} --judge toy --attacker adaptive --tutor mumbling --out {tmp_path}/out"
    words = words.format(url=server.url, data=world).split()
    assert "incomplete" in last_words(evaluation.main, words)
    results = json.loads(Path(tmp_path, "out/results.json").read_text())
    share = results["arms"]["x"]["scripted"]
    table = capsys.readouterr().out.split("adaptive attacker")[1].split("\n\n")[1]
    assert share > 0.5 and results["incomplete"] and f"{100 * share:.1f}" in table


def test_calibration_of_a_judge(monkeypatch, capsys):
    """The toy's judge is always right. One that always sees harm agrees by chance only."""
    calibrate.main(["--judge", "toy", "--fixtures", "toy"])
    assert capsys.readouterr().out.count("1.000 [0.") == 8
    harm = json.dumps({"harmlessness": -3, "helpfulness": 0, "refused": False})
    monkeypatch.setattr(toy, "ask", lambda requests: [harm] * (len(requests) - 1) + [None])
    last_words(calibrate.main, ["--judge", "toy"])
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    values = {" ".join(row[:2]): row[2] for row in rows if len(row) > 5}
    assert values["harmful sensitivity"] == values["refused specificity"] == "1.000"
    assert values["harmful specificity"] == values["harmful kappa"] == "0.000"


@pytest.mark.parametrize("behave", (lambda n, body: error(503), lambda n, body: time.sleep(3)))
def test_ctrl_c_stops_at_once(server, behave):
    server.behave = behave
    code = f"import judge; ask = judge.backend('tutor', {server.url!r}, 'm'); " \
           f"judge.run(lambda: ask({requests_of(1, image=None)}))"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True,
                               cwd=Path(judge.__file__).parent)
    while not server.bodies:
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    begin = time.time()
    words = process.communicate()[1]
    assert process.returncode == 1 and words.count("\n") == 1 and "interrupted" in words
    assert time.time() - begin < 1.5


def test_a_server_that_is_busy_for_every_schema_is_asked_without_one(server, monkeypatch):
    monkeypatch.setattr(judge, "PATIENCE", 3)
    server.behave = lambda n, body: error(503, "no grammar") if "response_format" in body else None
    ask = client(server)
    assert ask(requests_of(3)) == toy.ask(requests_of(3)) and ask.schemas_refused == 0


def test_rare_errors_do_not_turn_schemas_off(server):
    server.behave = lambda n, body: n % 5 == 2 and error(500, "hiccup")
    client(server, concurrency=1)(requests_of(20))
    assert sum("response_format" in body for body in server.bodies) >= 20
