"""Training that is killed, interrupted, damaged or led astray: nothing is lost, and what goes on ends in the same bits."""
import json
import multiprocessing.forkserver
import os
import random
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import grpo
import judge
import sft
import synth
from conftest import timeless
from readme import ROOT
from test_rollout import moody

FORKS = multiprocessing.get_context("forkserver")  # real processes without the seconds that the imports take
FORKS.set_forkserver_preload(["conftest", "test_resume"])
STAGES = "sft", "grpo"


def strict(text):
    """JSON as the standard has it: no NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in {text[:200]}"))


def words(stage, base, adapter, world):
    flags = {"sft": ["--data", world / "sft.jsonl", "--batch", 4, "--held_out", 0.2, "--eval_every", 3, "--epochs", 3,
                     "--lora_r", 4, "--lr", "1e-2"],
             "grpo": ["--data", world / "rl.jsonl", "--adapter", adapter, "--tutor", "toy", "--prompts", 2, "--group", 2,
                      "--max_turns", 2, "--max_new", 4, "--max_tokens", 400, "--epochs", 3, "--lr", "1e-2",
                      "--format_bonus", 0.0]}[stage]
    return ["--model", *map(str, [base, *flags, "--save_every", 3, "--no-checkpointing", "--threads", 1])]


def child(stage, argv, said):
    """In a process of its own: the script, as the command line runs it."""
    with open(said, "ab") as f:
        os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
    sys.argv, judge.backend = [f"{stage}.py", *argv], lambda *_: moody  # rewards that differ within a group
    runpy.run_path(str(ROOT / f"{stage}.py"), run_name="__main__")


def start(stage, argv, out, *more):
    process = FORKS.Process(target=child, args=(stage, [*argv, "--out", str(out), *more], f"{out}.txt"))
    process.start()
    return process


def finish(process, code=0):
    process.join(60)
    assert process.exitcode == code


def lines(out):
    path = out / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(process, out, n):
    """Until the log has n lines, or the process is at its end."""
    while process.is_alive() and lines(out) < n:
        time.sleep(0.01)


def outcome(out):
    """All that must be equal: adapter and rollouts byte for byte, the log without clock and memory."""
    log = [timeless(strict(line)) for line in (out / "log.jsonl").read_text().splitlines()]
    book = out / "rollouts.jsonl"
    return (out / "adapter_model.safetensors").read_bytes(), book.exists() and book.read_bytes(), log


@pytest.fixture(scope="module")
def straight(base, adapter, world, tmp_path_factory):
    """-> {stage: (its words, the outcome of a run that nobody disturbed)}"""
    runs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")  # else it would preload nothing, without a word
        multiprocessing.forkserver.ensure_running()
    for stage in STAGES:
        argv, out = words(stage, base, adapter, world), tmp_path_factory.mktemp(stage) / "straight"
        finish(start(stage, argv, out))
        runs[stage] = argv, outcome(out)
    assert [len(log) for _, (*_, log) in runs.values()] == [12, 12]
    return runs


@pytest.mark.parametrize("stage", STAGES)
def test_killed_twice_and_interrupted_it_ends_in_the_same_bits(straight, tmp_path, stage):
    (argv, expected), out = straight[stage], tmp_path / "out"
    for what, after, more in ((signal.SIGINT, 1, 0), (signal.SIGKILL, 4, 0.1), (signal.SIGKILL, 8, 0.1)):
        process = start(stage, argv, out, "--resume")
        wait_for(process, out, after)
        time.sleep(random.uniform(0, more))
        os.kill(process.pid, what)
        process.join()
        assert process.exitcode in ((1,) if what == signal.SIGINT else (-signal.SIGKILL, 0))  # 0: the kill came too late
        if what == signal.SIGINT:  # one Ctrl-C: what was done is saved, and not done again
            newest, said = sorted(out.glob("step_*"))[-1], Path(f"{out}.txt").read_text()
            assert said.splitlines()[-1] == f"interrupted; --resume goes on from {newest}" and "Traceback" not in said
            assert lines(out) == int(newest.name[5:])
    finish(start(stage, argv, out, "--resume"))
    assert outcome(out) == expected


@pytest.mark.torture
@pytest.mark.parametrize("stage", STAGES)
def test_killed_twenty_times_it_ends_in_the_same_bits(straight, tmp_path, stage):
    argv, expected = straight[stage]
    begun, out = time.time(), tmp_path / "0"
    finish(start(stage, argv, out))
    whole, kills = time.time() - begun, 0
    while kills < 20:
        out = tmp_path / f"{kills}"
        shutil.rmtree(out, ignore_errors=True)
        process = None
        while kills < 20 and (process is None or process.exitcode != 0):
            process = start(stage, argv, out, "--resume")
            process.join(random.uniform(0, whole))
            process.kill()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL), Path(f"{out}.txt").read_text()
            kills += process.exitcode != 0
        if process.exitcode != 0:
            finish(start(stage, argv, out, "--resume"))
        assert outcome(out) == expected


# ---------------------------------------------------------------- checkpoints

def args_of(stage, argv, out, *more):
    return {"sft": sft, "grpo": grpo}[stage].parse_args([*argv, "--out", str(out), *more])


def run(stage, argv, out, *more):
    """In this process. -> the exit code, None at the end of the run"""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(judge, "backend", lambda *_: moody)
            {"sft": sft, "grpo": grpo}[stage].main(args_of(stage, argv, out, *more))
    except SystemExit as stop:
        return stop.code


@pytest.fixture(scope="module")
def done(straight, tmp_path_factory):
    """A run of grpo.py that is over, to be copied. -> (its words, its folder)"""
    argv, _ = straight["grpo"]
    out = tmp_path_factory.mktemp("done") / "out"
    assert run("grpo", argv, out) is None
    return argv, out


def test_what_a_checkpoint_holds(done, base, straight):
    argv, out = done
    assert outcome(out) == straight["grpo"][1]  # the same in this process as in its own
    assert sorted(p.name for p in out.glob("step*")) == ["step_000009", "step_000012"]  # the last two
    newest = out / "step_000012"
    assert sorted(p.name for p in newest.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "meta.json", "optimizer.pt"]
    assert (newest / "adapter_model.safetensors").read_bytes() == (out / "adapter_model.safetensors").read_bytes()
    meta = strict((newest / "meta.json").read_text())
    assert meta["args"]["lr"] == 0.01 and meta["step"] == 12 and meta["versions"]["torch"] == torch.__version__
    assert list(meta["data"].values()) == [synth.file_hash(argv[argv.index("--data") + 1])] and "commit" in meta
    student = sft.load_student(base, False)
    sft.load_adapter(student, newest, "policy")  # as eval.py loads it
    state = torch.load(newest / "optimizer.pt", weights_only=True)
    assert {float(s["step"]) for s in state["state"].values()} == {12.0}


def test_a_run_that_is_over_stays_as_it_is(done, tmp_path, capsys):
    argv, out = done
    before = outcome(shutil.copytree(out, tmp_path / "out"))
    assert run("grpo", argv, tmp_path / "out", "--resume") is None and "step  " not in capsys.readouterr().out
    assert outcome(tmp_path / "out") == before


def test_a_torn_checkpoint_is_passed_over_with_a_word(done, tmp_path, capsys):
    argv, out = done
    damages = [lambda f: (f / "meta.json").unlink(), lambda f: (f / "meta.json").write_text("[]"),
               lambda f: (f / "meta.json").write_bytes((f / "meta.json").read_bytes()[:99]),
               lambda f: os.truncate(f / "optimizer.pt", 1000), lambda f: (f / "adapter_config.json").write_text("{}"),
               lambda f: (f / "adapter_model.safetensors").write_bytes(bytes(os.path.getsize(f / "adapter_model.safetensors"))),
               lambda f: shutil.rmtree(f) or f.mkdir()]
    for i, damage in enumerate(damages):
        torn = shutil.copytree(out, tmp_path / f"{i}") / "step_000012"
        damage(torn)
        assert not sft.is_whole(torn) and sft.is_whole(torn.parent / "step_000009")
    os.truncate(tmp_path / "0/rollouts.jsonl", 2000)  # shorter than when the older one was saved: that one is no use either
    assert not sft.is_whole(tmp_path / "0/step_000009")
    assert run("grpo", argv, tmp_path / "1", "--resume") is None
    said = capsys.readouterr()
    assert f"{tmp_path}/1/step_000012 is torn" in said.err and f"going on from {tmp_path}/1/step_000009" in said.out
    assert outcome(tmp_path / "1") == outcome(out) and sft.is_whole(tmp_path / "1/step_000012")
    run_of_one = shutil.copytree(tmp_path / "2", tmp_path / "all")  # nothing but torn ones: from the start
    for name in ("adapter_model.safetensors", "adapter_config.json", "meta.json", "step_000009/meta.json"):
        (run_of_one / name).unlink()
    assert run("grpo", argv, run_of_one, "--resume") is None and outcome(run_of_one) == outcome(out)


def test_a_torn_checkpoint_is_none_of_the_last_two(done, tmp_path, monkeypatch):
    argv, out = done
    out = shutil.copytree(out, tmp_path / "out")
    (out / "step_000012/meta.json").unlink()
    save = sft.save_checkpoint

    def once(run):
        save(run)
        raise SystemExit(99)
    monkeypatch.setattr(sft, "save_checkpoint", once)
    assert run("grpo", argv, out, "--resume", "--save_every", "1") == 99
    assert [f.name for f in sorted(out.glob("step_*")) if sft.is_whole(f)] == ["step_000009", "step_000010"]


def test_killed_at_any_file_operation_of_a_save_the_newest_whole_one_is_there(done, student, tmp_path):
    """A process of its own for each: it saves step 15 where 9 and 12 are, and dies at its nth touch of the disk."""
    argv, out = done
    optimizer = torch.optim.AdamW([p for n, p in student.model.named_parameters() if ".policy." in n])
    seen, n = set(), 0
    while True:
        folder = shutil.copytree(out, tmp_path / f"{n}")
        logs = {name: open(folder / name, "a") for name in ("log.jsonl", "rollouts.jsonl")}
        run = sft.Run(args_of("grpo", argv, folder), 0, {"step": 15}, logs, student=student, optimizer=optimizer)
        pid = os.fork()
        if pid == 0:
            left = [n]

            def hook(event, args):
                if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(hook)
            sft.save_checkpoint(run)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        whole = [f.name for f in sorted(folder.glob("step_??????")) if sft.is_whole(f)]
        seen.add(whole[-1])
        assert "step_000015" in whole or not (folder / "step_000015").exists()  # in full or not at all
        assert whole[-2:] in (["step_000009", "step_000012"], ["step_000012", "step_000015"]), (n, whole)
        n += 1
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert n > 20 and len(seen) == 2


@pytest.mark.parametrize("stage", STAGES)
def test_other_arguments_or_data_are_named_and_stop_it_unless_allowed(straight, tmp_path, capsys, stage, world, monkeypatch):
    argv, out = [*straight[stage][0]], tmp_path / "out"
    argv[argv.index("--epochs") + 1] = "0.3" if stage == "sft" else "0.25"
    assert run(stage, argv, out) is None and run(stage, argv, out) == 2  # not empty, no --resume
    before = outcome(out)
    data = argv.index("--data") + 1
    moved = shutil.copytree(world, tmp_path / "moved") / Path(argv[data]).name
    same = [*argv[:data], str(moved), *argv[data + 1:]]
    assert run(stage, same, out, "--resume", "--save_every", "7") is None  # the same data elsewhere, a free argument
    moved.write_text("\n".join(moved.read_text().splitlines()[:-1]) + "\n")
    capsys.readouterr()
    for words, names in ((same, {"--data"}), ([*argv, "--lr", "1", "--seed", "3"], {"--lr", "--seed"})):
        assert run(stage, words, out, "--resume") == 2
        said = capsys.readouterr().err
        assert {w.strip(",;") for w in said.split() if w.startswith("--")} == names | {"--allow_changes"}
        assert said.count("\n") == 1 and outcome(out) == before
    assert run(stage, [*argv, "--lr", "1"], out, "--resume", "--allow_changes") is None
    assert "--lr" in capsys.readouterr().out


def test_another_adapter_in_the_same_place_is_another_start(done, adapter, tmp_path, capsys):
    argv, out = done
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, tmp_path / name)
    argv = [*argv]
    argv[argv.index("--adapter") + 1] = str(tmp_path)
    out = shutil.copytree(out, tmp_path / "out")
    assert run("grpo", argv, out, "--resume") is None
    state = sft.load_file(tmp_path / "adapter_model.safetensors")
    sft.save_file({k: 2 * v for k, v in state.items()}, tmp_path / "adapter_model.safetensors")
    assert run("grpo", argv, out, "--resume") == 2 and "--adapter" in capsys.readouterr().err


def test_resume_starts_anew_only_where_a_run_began(straight, tmp_path, capsys):
    argv, expected = straight["sft"]
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/log.jsonl").write_text('{"step": 0}\n{"st')  # killed before the first checkpoint
    (tmp_path / "begun/step_part").mkdir()
    (tmp_path / "begun/step_part/junk").write_text("x")
    assert run("sft", argv, tmp_path / "begun", "--resume") is None and outcome(tmp_path / "begun") == expected
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("all of it")
    assert run("sft", argv, tmp_path / "other", "--resume") == 2 and "not empty" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.txt"]
    assert run("sft", argv, tmp_path / "other/thesis.txt", "--resume") == 2 and "--out" in capsys.readouterr().err


def test_early_stopping_goes_on_where_it_was(straight, tmp_path, monkeypatch):
    argv = [*straight["sft"][0], "--lr", "1e-9", "--eval_every", "2", "--patience", "3"]  # nothing ever gets better
    assert run("sft", argv, tmp_path / "a") is None
    real = sft.write_line

    def stop(run, line, steps):
        if line["step"] == 5:
            raise SystemExit(99)
        return real(run, line, steps)
    with monkeypatch.context() as patch:
        patch.setattr(sft, "write_line", stop)
        assert run("sft", argv, tmp_path / "b") == 99
    assert run("sft", argv, tmp_path / "b", "--resume") is None
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b") and len(outcome(tmp_path / "a")[2]) == 8
    assert run("sft", argv, tmp_path / "b", "--resume") is None and outcome(tmp_path / "a") == outcome(tmp_path / "b")


# ---------------------------------------------------------------- a tutor that dies

def test_a_dead_tutor_is_one_line_and_a_checkpoint_to_go_on_from(straight, tmp_path, monkeypatch, capsys):
    (argv, expected), out, calls = straight["grpo"], tmp_path / "out", []

    def dying(requests):
        calls.append(requests)
        if len(calls) == 10:  # the second turn of step 4, where 3 is the last one saved
            raise judge.BackendError("http://tutor/v1, model m: no reply (ConnectError)")
        return moody(requests)
    monkeypatch.setattr(judge, "backend", lambda *_: dying)
    with pytest.raises(SystemExit) as stop:
        grpo.main(args_of("grpo", argv, out))
    said = [line for line in capsys.readouterr().err.splitlines() if "http" in line]
    assert stop.value.code == 1 and said == [
        f"http://tutor/v1, model m: no reply (ConnectError); --resume goes on from {out}/step_000004"]
    assert run("grpo", argv, out, "--resume") is None and outcome(out) == expected


def test_a_tutor_that_is_never_read_ends_the_run(straight, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judge, "backend", lambda *_: lambda requests: ["I am sorry."] * len(requests))
    with pytest.raises(SystemExit) as stop:
        grpo.main(args_of("grpo", straight["grpo"][0], tmp_path / "out"))
    assert stop.value.code == 1 and "step 2: the third in a row" in capsys.readouterr().err
    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert all("tutor not read" in line["warnings"] for line in log) and len(log) == 3


def test_no_key_reaches_a_log_a_checkpoint_or_an_error(straight, tmp_path, monkeypatch, capsys):
    for name in ("TUTOR_API_KEY", "OPENAI_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "sk-secret")
    monkeypatch.setattr(judge, "PAUSE", 0.01)
    argv, out = [*straight["grpo"][0]], tmp_path / "out"
    argv[argv.index("--tutor") + 1] = "http://127.0.0.1:9/v1"
    with pytest.raises(SystemExit) as stop:
        grpo.main(args_of("grpo", [*argv, "--tutor_model", "m"], out))
    assert stop.value.code == 1 and sft.is_whole(out / "step_000000")
    said = capsys.readouterr()
    assert "127.0.0.1:9" in said.err and "secret" not in said.out + said.err
    assert not [p for p in out.rglob("*") if p.is_file() and b"secret" in p.read_bytes()]


# ---------------------------------------------------------------- what is seen of a run

LOGGED = {"sft": "step loss grad_norm skipped tokens seconds memory minutes_left",
          "grpo": "step loss reward reward_std tcsr dead kl clip entropy turns tokens missing fallback over_refusal harm useful "
                  "length distinct grad_norm skipped seconds_generate seconds_tutor seconds_update memory minutes_left warnings"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_line_a_step_is_printed_and_logged_and_the_first_batch_shown(straight, world, tmp_path, stage):
    argv, out = [*straight[stage][0]], tmp_path / "out"
    argv[argv.index("--epochs") + 1] = "0.5"
    finish(start(stage, argv, out))
    log = [strict(line) for line in (out / "log.jsonl").read_text().splitlines()]
    said = Path(f"{out}.txt").read_text()
    printed = [line for line in said.splitlines() if line.startswith("step ")]
    assert len(log) == len(printed) == 2 and all({*LOGGED[stage].split()} <= {*line} for line in log)
    assert log[0]["memory"] > 0.1 and log[-1]["minutes_left"] == 0 < log[0]["minutes_left"]
    for line, text in zip(log, printed):
        assert f"step {line['step']:4}" in text and f"{line['loss']:.3f}" in text and f"{line['tokens']} tokens" in text
    shown = said.split("trained tokens in brackets:")[1].split("step    0")[0]
    if stage == "sft":  # the replies, each with its terminator, and nothing else
        dialogues, order = synth.read_dialogues([str(world / "sft.jsonl")]), iter(shown.split("[")[1:])
        replies = [sft.text_of(m["content"]) + "<|im_end|>" for d in dialogues for m in d["messages"] if m["role"] == "assistant"]
        inside = [part.split("]")[0] for part in order]
        assert inside and {*inside} <= {*replies}
    else:
        book = [strict(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
        assert len(book) == 8 and all("reward" in turn and "advantage" in turn for talk in book for turn in talk["turns"])
        for step, line in enumerate(log):  # r~_T, its mean over the rollouts
            scores = [[turn["reward"] for turn in talk["turns"]] for talk in book if talk["step"] == step]
            assert line["tcsr"] == pytest.approx(sum(0.3 * min(r) + 0.7 * sum(r) / len(r) for r in scores) / len(scores))
        assert all(turn["user"] in shown for talk in book[::2] for turn in talk["turns"] if talk["step"] == 0)


def test_the_tutors_seconds_are_not_the_students(straight, tmp_path, monkeypatch):
    argv = [*straight["grpo"][0], "--epochs", "0.25"]
    monkeypatch.setattr(judge, "backend", lambda *_: lambda requests: time.sleep(0.5) or moody(requests))
    grpo.main(args_of("grpo", argv, tmp_path / "out"))
    line = strict((tmp_path / "out/log.jsonl").read_text())
    assert line["seconds_tutor"] >= 1 > line["seconds_generate"]  # two turns


def test_terminals_are_safe_from_what_strangers_write(student, tmp_path, capsys):
    from conftest import dialogue
    row, _ = sft.render(student, dialogue("x", "\x1b[2J\x9b31m\u202egood\tbye\nü", reply="\x1b]0;you\x07"))
    shown = sft.show_trained(student, row)
    assert all(c.isprintable() or c == "\n" for c in shown) and "ü" in shown and "\\x1b[2J" in shown
    evil = {"id": "\x1b[31m\n9 bad records", "seed_id": "s", "kind": "benign", "messages": [{"role": "user", "content": "hi"}]}
    (tmp_path / "x.jsonl").write_text(2 * (json.dumps(evil) + "\n"))
    synth.read_dialogues([str(tmp_path / "x.jsonl")], skip_bad=True)
    said = capsys.readouterr().err
    assert "\x1b" not in said and said.splitlines()[1:] == ["1 bad records"]


# ---------------------------------------------------------------- health

def poison(monkeypatch, plan):
    """plan: {step: factor of that step's gradient}"""
    calls, real = [], torch.nn.utils.clip_grad_norm_

    def clip(params, most):
        factor = plan.get(len(calls), 1)
        calls.append(factor)
        for p in params:
            p.grad *= factor
        return real(params, most)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)


@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_update_is_skipped_and_counted(straight, tmp_path, monkeypatch, capsys, stage):
    argv, out = straight[stage][0], tmp_path / "out"
    poison(monkeypatch, {2: float("nan"), 5: float("inf"), 6: 1e6, 8: float("nan"), 9: 1e6})
    assert run(stage, argv, out) is None
    log = [strict(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if line["skipped"]] == [2, 5, 6, 8, 9]
    assert capsys.readouterr().out.count("update skipped") == 5
    state = torch.load(out / "step_000012/optimizer.pt", weights_only=True)["state"]
    assert {float(s["step"]) for s in state.values()} == {7.0} and all(torch.isfinite(s["exp_avg"]).all() for s in state.values())
    assert not (out / "step_000009").exists()  # nothing is saved amid bad steps


@pytest.mark.parametrize("stage", STAGES)
def test_three_bad_steps_in_a_row_end_it_and_name_the_last_good_checkpoint(straight, tmp_path, monkeypatch, capsys, stage):
    (argv, expected), out = straight[stage], tmp_path / "out"
    with monkeypatch.context() as patch:
        poison(patch, {7: float("nan"), 8: float("nan"), 9: float("nan")})
        assert run(stage, argv, out) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("step 9: ") and last.endswith(f"last good checkpoint: {out}/step_000006")
    assert lines(out) == 10 and not (out / "adapter_model.safetensors").exists()
    assert run(stage, argv, out, "--resume") is None and outcome(out) == expected


def test_what_is_not_finite_is_no_step(fresh):
    student = fresh(reference=False)
    params = [p for p in student.model.parameters() if p.requires_grad]
    for loss, scale, skipped in ((1.0, 1.0, 0), (float("nan"), 1.0, 1), (float("inf"), 1.0, 1), (1.0, float("nan"), 1),
                                 (1.0, 1e9, 1), (1.0, 900 / sum(p.numel() for p in params) ** 0.5, 0)):
        optimizer, before = torch.optim.SGD(params, lr=1.0), [p.clone() for p in params]
        for p in params:
            p.grad = torch.full_like(p, scale)
        norm, said = sft.step_or_skip(optimizer, loss)
        assert said == skipped and all(torch.equal(a, b) for a, b in zip(before, params)) == bool(skipped)
        assert all(p.grad is None for p in params)


def test_a_collapse_is_seen_and_a_healthy_step_is_not_one(world):
    dialogues = [d for d in synth.read_dialogues([str(world / "rl.jsonl")]) for _ in range(2)]
    seen = {"dead_groups": 0.0, "missing_turns": 0.0}

    def warned(say, n=5, usefulness=10, truncated=False, tokens=20):
        talks = [grpo.Talk(dialogue=d, logps=[0.0] * tokens * n, turns=[{
            "assistant": say(i, t), "reward": 0.5, "safety": 10, "usefulness": usefulness, "strategy": "deepen",
            "truncated": truncated} for t in range(n)]) for i, d in enumerate(dialogues)]
        return grpo.warnings({**grpo.summary(talks, seen, torch.zeros(8, 2).numpy(), 2), "skipped": 0})
    various = lambda i, t: f"<thinking>picture {i // 2}</thinking><answer>about {i // 2} in turn {t} this is said</answer>"
    assert warned(various) == [] and warned(various, usefulness=1) == ["benign refused"]
    assert warned(lambda i, t: "no, I can not help you with any of that, whatever you say.") == ["replies alike"]
    assert warned(various, tokens=3) == ["replies short"] and warned(various, truncated=True) == ["replies cut off"]


# ---------------------------------------------------------------- long runs

@pytest.mark.torture
def test_two_thousand_steps_need_no_more_memory_nor_files_than_two_hundred(base, adapter, world, tmp_path, monkeypatch):
    argv = ["--model", str(base), "--adapter", str(adapter), "--data", str(world / "rl.jsonl"), "--tutor", "toy", "--prompts", "1",
            "--group", "2", "--max_turns", "1", "--max_new", "2", "--max_tokens", "100", "--epochs", "250", "--lr", "1e-6",
            "--save_every", "200", "--no-checkpointing", "--no-nf4", "--threads", "1"]
    used = []

    def ask(requests):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        used.append((pages * os.sysconf("SC_PAGESIZE") / 2 ** 20, len(os.listdir("/proc/self/fd"))))
        return moody(requests)
    monkeypatch.setattr(judge, "backend", lambda *_: ask)
    grpo.main(args_of("grpo", argv, tmp_path / "out"))
    assert len(used) == 2000 == lines(tmp_path / "out")
    memory, files = zip(*used)
    print(f"MB after 200, 1000, 2000 steps: {memory[199]:.1f} {memory[999]:.1f} {memory[1999]:.1f}; files {files[199]} {files[1999]}")
    assert max(memory[1000:]) < max(memory[:1000]) + 5 and max(files) == files[199]
    log = [strict(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [*range(2000)] and (tmp_path / "out/log.jsonl").stat().st_size < 2000 * 1000
