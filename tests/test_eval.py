"""eval.py as a script: a served student, what a kill leaves and --resume makes of it, judging apart, warnings."""
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import eval as E
import judge
import synth
import toy
from conftest import HOSTILE
from faulty import student
from readme import ROOT
from test_backends import dead_url, faulty


def words(data, out, *more, mode="all"):
    flags = "--judge toy --tutor toy --attacker adaptive static --name x --batch 3 --mode".split()
    return [*map(str, ["--data", data / "bench.jsonl", "--out", out, *flags, mode, *more])]


def files(out):
    """What must be equal: the samples byte for byte, the results but for the seconds."""
    results = json.loads((out / "results.json").read_text())
    del results["seconds"]
    return (out / "samples.jsonl").read_bytes(), results, sorted(p.name for p in out.iterdir())


@pytest.fixture(scope="module")
def url():
    with faulty("0") as (url, _):
        yield url


@pytest.fixture
def served(monkeypatch):
    """The student of faulty.py behind judge.backend, without HTTP; it fails on what served.fails says."""
    real = judge.backend

    def ask(requests):
        served.asked += len(requests)
        whole = lambda text: text.encode("utf-8", "replace").decode()  # as judge.served makes it
        return [None if served.fails(r["messages"]) else whole(student(r["messages"])) for r in requests]

    def served(spec, *rest):
        return ask if spec == "http://student/v1" else real(spec, *rest)
    served.asked, served.fails = 0, lambda messages: False
    monkeypatch.setattr(judge, "backend", served)
    served.words = ["--endpoint", "http://student/v1", "--endpoint_model", "m"]
    return served


def run(*argv):
    """-> exit code"""
    try:
        E.main([*map(str, argv)])
    except SystemExit as stop:
        return stop.code
    return 0


# ---------------------------------------------------------------- a served student

def test_every_picture_is_in_the_message_it_belongs_to(mixed):
    asked = []

    def ask(requests):
        asked.append(json.loads(json.dumps(requests)))
        return [f"reply {len(r['messages'])}" + HOSTILE * ("<" in str(r)) for r in requests]
    talks = E.served_student(ask, 7)(mixed, E.respond_with(None, []))
    assert [len(t.turns) for t in talks] == [len(synth.user_turns(d)) for d in mixed]
    assert [len(requests) for requests in asked] == [5, 5, 2, 1]  # abreast, those that still go on
    late = [r for r in asked[-2] if "a picture that comes late " in str(r)][0]
    roles = [m["role"] for m in late["messages"]]
    assert late["max_tokens"] == 7 and roles == ["user", "assistant", "user", "assistant", "user"]
    first, second = late["messages"][0]["content"], late["messages"][2]["content"]
    assert first == [{"type": "text", "text": "hm"}] and late["messages"][1]["content"] == "reply 1"
    assert [p["type"] for p in second] == ["image_url", "text", "image_url", "text"]
    pngs = [judge.image_part(synth.image_png(path)) for path in mixed[3]["images"]]
    assert [second[0], second[2]] == pngs and pngs[0] != pngs[1]
    assert "be kind , it 's all ." in [m["content"] for r in asked[0] for m in r["messages"] if m["role"] == "system"]
    assert "<|" not in json.dumps(asked) and HOSTILE in [turn["user"] for turn in talks[4].turns]  # trap 7
    user = "a picture that comes late  and another"
    assert talks[3].turns[1] == {"user": user, "strategy": "scripted", "assistant": "reply 3"}


def test_a_served_student_is_the_one_in_process_and_repeats_itself(world, url, served, tmp_path):
    for name, flags in (("a", ["--endpoint", url, "--endpoint_model", "m"]), ("b", served.words)):
        assert run(*words(world, tmp_path / name, *flags)) == 0
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    assert a == b and a[1]["status"] == "complete" and 0 < a[1]["arms"]["x"]["any_harm"]["value"]
    samples = E.load_run(tmp_path / "a")[0]
    assert {t["strategy"] for s in samples if s["attacker"] == "adaptive" for t in s["turns"]} > {"scripted", "deepen"}
    assert [(s["id"], s["attacker"]) for s in samples] == sorted((d["id"], a) for d in synth.read_dialogues(
        [str(world / "bench.jsonl")]) for a in ("adaptive", "static"))


def test_a_call_that_fails_leaves_its_dialogue_unscored_and_only_that_one_is_redone(world, served, tmp_path):
    assert run(*words(world, tmp_path / "whole", *served.words)) == 0
    ids = [d["id"] for d in synth.read_dialogues([str(world / "bench.jsonl")])]
    served.fails = lambda messages: len(messages) == 3 and random.Random(json.dumps(messages)).random() < .4
    assert run(*words(world, tmp_path / "a", *served.words)) == 1
    failed = [s for s in E.load_run(tmp_path / "a")[0] if s["error"]]
    entry = json.loads((tmp_path / "a/results.json").read_text())["arms"]["x"]
    assert 0 < len(failed) < len(ids) and {len(s["turns"]) for s in failed} == {1}
    assert "reply" in failed[0]["error"] and sum(e["unscored"] for e in entry.values()) > 0
    served.fails, served.asked = lambda messages: False, 0
    assert run(*words(world, tmp_path / "a", *served.words, "--resume")) == 0
    assert files(tmp_path / "a") == files(tmp_path / "whole")
    redone = {(s["id"], s["attacker"]) for s in failed}
    assert served.asked == sum(len(s["turns"]) for s in E.load_run(tmp_path / "a")[0] if (s["id"], s["attacker"]) in redone)


def test_a_student_behind_a_server_that_misbehaves(world, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "PAUSE", 0.01)
    with faulty("0.3") as (url, counts):
        flags = words(world, tmp_path / "a", "--endpoint", url, "--endpoint_model", "m", "--timeout", "0.7")
        code = run(*flags)
        while code == 1:  # what failed once comes through in the end
            code = run(*flags, "--resume")
        assert code == 0 and len({*counts()} - {"fine", "requests", "Bearer none"}) > 6
    samples, meta = E.load_run(tmp_path / "a")
    assert len(samples) == meta["n_samples"] and not any(s["error"] for s in samples)


def test_a_dead_endpoint_is_one_line_and_nothing_is_lost(world, served, tmp_path, monkeypatch):
    served.fails = lambda messages: 1 / 0 if served.asked > 30 else False
    with pytest.raises(ZeroDivisionError):
        run(*words(world, tmp_path / "a", *served.words))
    before = len(E.load_run(tmp_path / "a")[0])
    monkeypatch.undo()
    monkeypatch.setattr(judge, "PAUSE", 0.001)
    said = run(*words(world, tmp_path / "b", "--endpoint", dead_url(), "--endpoint_model", "m"))
    assert "no reply (ConnectError)" in said and "\n" not in said  # SystemExit prints it, with exit code 1
    said = run(*words(world, tmp_path / "a", *served.words, "--endpoint", dead_url(), "--resume", "--allow_changes"))
    assert "no reply" in said and len(E.load_run(tmp_path / "a")[0]) == before > 0


# ---------------------------------------------------------------- resume

def test_wherever_it_was_cut_a_resumed_run_ends_the_same(world, served, tmp_path, monkeypatch):
    """Also in the middle of a character: the log as it was before the last rewrite, cut at random bytes."""
    log, rng = b"", random.Random(0)
    real = synth.write_whole

    def watch(path, text):
        nonlocal log
        log = Path(path).read_bytes() if str(path).endswith("samples.jsonl") and Path(path).exists() else log
        real(path, text)
    monkeypatch.setattr(synth, "write_whole", watch)
    assert run(*words(world, tmp_path / "whole", *served.words)) == 0
    monkeypatch.setattr(synth, "write_whole", real)
    whole = files(tmp_path / "whole")
    assert log.count(b"\n") == 2 * whole[0].count(b"\n")  # each dialogue before and after it was judged
    inside = [i for i in range(len(log)) if log[i] & 0xC0 == 0x80]  # of a character of several bytes
    for at in [0, len(log) - 1, *rng.sample(inside, 3), *rng.sample(range(len(log)), 7)]:
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "cut")
        (tmp_path / "cut/samples.jsonl").write_bytes(log[:at])
        assert run(*words(world, tmp_path / "cut", *served.words, "--resume")) == 0
        assert files(tmp_path / "cut") == whole, at


def killed(flags, out, seconds):
    """Start eval.py, kill -9 it after so many seconds; -> was it killed, and not done before"""
    process = subprocess.Popen([sys.executable, "eval.py", *flags], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        assert process.wait(seconds) in (0, 1)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True


def kill_and_resume(flags, out, times, tmp_path):
    begun = time.monotonic()
    subprocess.run([sys.executable, "eval.py", *flags(tmp_path / "whole")], cwd=ROOT, check=True, capture_output=True)
    seconds, rng, kills = time.monotonic() - begun, random.Random(1), 0
    while kills < times:
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(rng.randint(1, 3)):
            kills += killed(flags(out) + ["--resume"], out, rng.uniform(0.1, 1) * seconds)
        subprocess.run([sys.executable, "eval.py", *flags(out), "--resume"], cwd=ROOT, check=True, capture_output=True)
        assert files(out) == files(tmp_path / "whole")


def test_killed_twice_at_random_a_resumed_run_ends_the_same(world, tmp_path):
    with faulty("0", "--latency", "15") as (url, _):
        flags = ["--endpoint", url, "--endpoint_model", "m"]
        kill_and_resume(lambda out: words(world, out, *flags), tmp_path / "a", 2, tmp_path)


@pytest.mark.torture
@pytest.mark.parametrize("student", ["served", "local"])
def test_killed_twenty_times_at_random_a_resumed_run_ends_the_same(world, base, adapter, student, tmp_path):
    with faulty("0", "--latency", "15") as (url, _):
        flags = ["--endpoint", url, "--endpoint_model", "m"] if student == "served" else [
            "--model", base, "--adapter", adapter, "--max_new", "6", "--max_tokens", "600", "--threads", "1"]
        kill_and_resume(lambda out: words(world, out, *flags), tmp_path / "a", 20, tmp_path)


def test_a_local_student_goes_on_where_it_was_interrupted(world, base, adapter, tmp_path, monkeypatch, capsys):
    flags = ["--model", base, "--adapter", adapter, "--max_new", "6", "--max_tokens", "600"]
    assert run(*words(world, tmp_path / "whole", *flags)) == 0
    real, calls = E.judge_samples, []

    def stop(ask, samples, judge_id):
        calls.append(len(samples))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(ask, samples, judge_id)
    monkeypatch.setattr(E, "judge_samples", stop)
    assert run(*words(world, tmp_path / "a", *flags)) == 1 and "--resume goes on" in capsys.readouterr().err
    lines = (tmp_path / "a/samples.jsonl").read_text().splitlines()
    assert len(lines) == 2 * sum(calls[:2]) + calls[2]  # a batch before and after it was judged; the third was not lost
    (tmp_path / "a/samples.jsonl").write_text("\n".join(lines[:-1]))  # and a batch of which only a part was written
    assert run(*words(world, tmp_path / "a", *flags, "--resume")) == 0
    assert files(tmp_path / "a") == files(tmp_path / "whole")
    judges = {turn["verdict"]["judge"] for s in E.load_run(tmp_path / "a")[0] for turn in s["turns"]}
    assert judges == {json.loads((tmp_path / "a/results.json").read_text())["judge"]}  # whose score it is, with every score


def test_judging_apart_loses_nothing(world, served, tmp_path, monkeypatch):
    """--mode infer, --mode judge with a judge that dies, again, --mode report: the same as all in one go."""
    assert run(*words(world, tmp_path / "whole", *served.words)) == 0
    assert run(*words(world, tmp_path / "a", *served.words, mode="infer")) == 0
    assert not (tmp_path / "a/results.json").exists()
    generated, asked, real, calls = (tmp_path / "a/samples.jsonl").read_bytes(), served.asked, toy.ask, []

    def dies(requests):  # after the first turn came back as garbage, twice
        calls.append(len(requests))
        if len(calls) == 4:
            raise judge.BackendError("nobody answers")
        return ["}{", *real(requests)[1:]] if len(calls) < 3 else real(requests)
    monkeypatch.setattr(toy, "ask", dies)
    assert run(*words(world, tmp_path / "a", *served.words, mode="judge")) == "nobody answers"
    assert run(*words(world, tmp_path / "a", *served.words, mode="report")) == 1  # incomplete: some are scored
    half = E.load_run(tmp_path / "a")[0]
    scored = sum(t["verdict"] is not None for s in half for t in s["turns"])
    assert scored == calls[0] - 1 + calls[2] and len(half) == generated.count(b"\n") and '"raw": "}{"' in (
        tmp_path / "a/samples.jsonl").read_text()
    monkeypatch.setattr(toy, "ask", real)
    assert run(*words(world, tmp_path / "a", *served.words, mode="judge")) == 0
    assert served.asked == asked and files(tmp_path / "a") == files(tmp_path / "whole")


def test_another_judge_scores_all_of_it_anew(world, served, tmp_path, monkeypatch, capsys):
    assert run(*words(world, tmp_path / "a", *served.words)) == 0
    verdict = json.dumps({"rationale": "", "harmlessness": -3, "helpfulness": 0, "refused": False})
    harsh = lambda requests: [verdict] * len(requests)
    usual = judge.backend
    monkeypatch.setattr(judge, "backend", lambda spec, *rest: harsh if spec == "http://harsh/v1" else usual(spec, *rest))
    other = [*words(world, tmp_path / "a", *served.words, mode="judge"), "--judge", "http://harsh/v1", "--judge_model", "h"]
    assert run(*other, "--resume", "--mode", "all") == 2
    assert "another --judge, --judge_model" in capsys.readouterr().err
    asked = served.asked
    assert run(*other) == 0 and served.asked == asked
    results = json.loads((tmp_path / "a/results.json").read_text())
    assert results["arms"]["x"]["harmful_turns"]["value"] == 1


def test_what_was_begun_otherwise_is_named_and_stops(world, served, tmp_path, capsys):
    shutil.copytree(world, tmp_path / "data")
    go = lambda *more: (run(*words(tmp_path / "data", tmp_path / "a", *served.words, *more)), capsys.readouterr().err)
    assert go()[0] == 0
    before = files(tmp_path / "a")
    code, said = go()
    assert code == 2 and "not empty" in said and "Traceback" not in said
    code, said = go("--resume", "--max_new", "7", "--strategies", "deepen")
    assert code == 2 and "unknown" in said
    code, said = go("--resume", "--max_new", "7", "--name", "y", "--concurrency", "3")
    assert code == 2 and "another --name, --max_new;" in said
    assert go("--resume")[0] == 0 and files(tmp_path / "a") == before
    bench = tmp_path / "data/bench.jsonl"
    bench.write_text("".join(reversed(bench.read_text().splitlines(keepends=True))))
    code, said = go("--resume")
    assert code == 2 and "another --data;" in said and files(tmp_path / "a") == before
    assert go("--resume", "--allow_changes", "--batch", "2")[0] == 0 and files(tmp_path / "a")[0] == before[0]


def test_what_other_data_or_attackers_ask_for_is_made_when_changes_are_allowed(world, served, tmp_path):
    rows, out = (world / "bench.jsonl").read_text().splitlines(keepends=True), tmp_path / "a"
    for name, part in (("one", rows[:5]), ("two", rows[3:8])):
        shutil.copytree(world / "images", tmp_path / name / "images")
        (tmp_path / name / "bench.jsonl").write_text("".join(part))
    go = lambda name, *attackers: run(*words(tmp_path / name, out, *served.words, "--resume", "--allow_changes"),
                                      "--attacker", *attackers)
    made = lambda: {(json.loads(rows[i])["id"], a): i for a in ("adaptive", "static") for i in range(8)}
    held = lambda: sorted((made()[s["id"], s["attacker"]], s["attacker"]) for s in E.load_run(out)[0])
    assert go("one", "static") == 0 and held() == [(i, "static") for i in range(5)]
    assert go("one", "adaptive") == 0 and held() == [(i, a) for i in range(5) for a in ("adaptive", "static")]
    assert go("two", "static") == 0  # of the others some are no longer in the data; their attacker stays
    assert held() == [(3, "adaptive"), (3, "static"), (4, "adaptive"), (4, "static"), *((i, "static") for i in (5, 6, 7))]


def test_a_folder_of_something_else_is_one_line(world, served, tmp_path, capsys):
    for name, text in (("sft", '{"args": {}, "data": {}, "seconds": 1}'), ("list", "[]"), ("torn", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text(text)
        assert run(*words(world, tmp_path / name, *served.words, "--resume", "--allow_changes")) == 2
        said = capsys.readouterr().err
        assert f"{name}/meta.json: " in said and said.count("\n") == 1


def test_arms_under_different_attackers_are_not_compared(world, served, tmp_path, capsys):
    for name, more in (("a", []), ("b", ["--strategies", "yes_ladder"]), ("c", ["--attacker", "static", "--strategies", "yes_ladder"])):
        assert run(*words(world, tmp_path / name, *served.words, "--name", name, *more)) == 0
    assert run("compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "ab") == 2
    assert "different attacker" in capsys.readouterr().err
    assert run("compare", tmp_path / "a", tmp_path / "c", "--out", tmp_path / "ac") == 0  # the static one is none


# ---------------------------------------------------------------- what else it says

def test_what_strangers_wrote_moves_nothing_on_the_terminal(world, served, tmp_path, capsys):
    shutil.copytree(world, tmp_path / "data")
    rows = [json.loads(line) for line in (tmp_path / "data/bench.jsonl").read_text().splitlines()]
    rows[0] |= {"id": "\x1b[31m\nid", "category": "\x1b[2J\ncategory"}
    (tmp_path / "data/bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(*words(tmp_path / "data", tmp_path / "a", *served.words)) == 0
    synth.image_png.cache_clear()
    Path(tmp_path / "data", rows[0]["images"][0]).unlink()
    assert run(*words(tmp_path / "data", tmp_path / "a", *served.words, mode="report")) == 2
    said = capsys.readouterr()
    assert "\\x1b[2J\\ncategory" in said.out and "\\x1b[31m" in said.err and "\x1b" not in said.out + said.err


def test_a_picture_that_is_gone_is_named_with_its_dialogue(world, served, tmp_path, capsys):
    shutil.copytree(world, tmp_path / "data")
    assert run(*words(tmp_path / "data", tmp_path / "a", *served.words)) == 0
    dialogue = synth.read_dialogues([str(tmp_path / "data/bench.jsonl")])[0]
    Path(dialogue["images"][0]).write_bytes(b"no picture")
    synth.image_png.cache_clear()
    for out, flags in (("a", ["--resume"]), ("b", []), ("a", ["--mode", "report"])):
        assert run(*words(tmp_path / "data", tmp_path / out, *served.words, *flags)) == 2
        said = capsys.readouterr().err
        assert dialogue["id"] in said and Path(dialogue["images"][0]).name in said and "Traceback" not in said


def test_a_judge_or_attacker_that_trained_the_student_is_warned_of(tmp_path):
    def warnings(trained, *flags):
        (tmp_path / "meta.json").write_text(json.dumps({"args": trained}))
        words = ["--adapter", str(tmp_path), *"--model m --data d --out o --name x".split(), *flags]
        return E.trained_against(E.parse_args(words))
    local = ["--judge", "toy", "--tutor", "toy"]
    assert warnings({"lr": 1}, *local) == []  # of sft.py
    assert warnings({"tutor": "toy", "tutor_model": None}, *local) == ["x: the judge, toy, is the tutor of its training"]
    assert len(warnings({"tutor": "toy"}, *local, "--attacker", "adaptive")) == 2
    served = ["--judge", "http://a/v1", "--judge_model", "big", "--tutor", "http://b/v1", "--tutor_model", "other"]
    assert warnings({"tutor": "http://c/v1", "tutor_model": "big"}, *served, "--attacker", "adaptive") == [
        "x: the judge, big, is the tutor of its training"]
    assert warnings({"tutor": "http://a/v1", "tutor_model": "small"}, *served) == []


def test_the_warning_is_on_stderr_in_the_results_and_on_the_page(world, base, adapter, tmp_path, capsys):
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter/meta.json").write_text(json.dumps({"args": {"tutor": "toy", "tutor_model": None}}))
    flags = ["--model", base, "--adapter", tmp_path / "adapter", "--max_new", "2", "--max_tokens", "600"]
    assert run(*words(world, tmp_path / "a", *flags)) == 0
    said = "x: the judge, toy, is the tutor of its training"
    assert f"warning: {said}" in capsys.readouterr().err
    assert said in json.loads((tmp_path / "a/results.json").read_text())["warnings"]
    assert said in (tmp_path / "a/report.html").read_text()
