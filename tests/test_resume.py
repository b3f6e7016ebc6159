"""
Runs of the four scripts that are killed, interrupted or damaged, that run out of disk or go wrong:
what was done is kept, a resumed run ends in the same bits, and a complaint is one line.
"""
import argparse
import fcntl
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import bitsandbytes
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

import eval as evaluation
import grpo
import judge
import sft
import synth

SCRIPTS = {"sft": sft, "grpo": grpo, "synth": synth, "eval": evaluation}
FORK = multiprocessing.get_context("fork")      # a new process without the seconds of imports
# progress bars share a lock with forked processes, and one that is killed may keep it for ever
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0


def ask(requests):
    """This module is the tutor and the judge. Its scores look random, but depend on the request."""
    replies = []
    for request in requests:
        rng = random.Random(request["text"])
        scores = {name: rng.randint(1, 10) for name in ("safety", "usefulness", "faithfulness")}
        replies.append(json.dumps({"scores": scores, "next_turn": "and?", "helpfulness": 2,
                                   "harmlessness": rng.randint(-3, 3), "refused": False}))
    return replies


@pytest.fixture(scope="module")
def words(base, adapter, world):
    """{script: its arguments without --out}, for runs of a second; sft and grpo take four steps"""
    student = f"--model {base} --no-nf4 --max_tokens 200"
    steps = "--epochs 0.5 --lr 1e-2 --save_every 2"
    lines = {
        "sft": f"{student} {steps} --data {world}/sft.jsonl --batch 2 --lora_r 4 "
               f"--held_out 0.1 --eval_every 3",
        "grpo": f"{student} {steps} --data {world}/rl.jsonl --adapter {adapter} --like released "
                f"--prompts 2 --group 2 --max_turns 2 --max_new 3 --tutor test_resume",
        "synth": f"--seeds {world.parent}/seeds/seeds.jsonl --generator toy --concurrency 1",
        "eval": f"{student} --data {world}/bench.jsonl --adapter {adapter} --name x --batch 4 "
                f"--max_new 2 --judge test_resume --attacker adaptive --tutor test_resume",
    }
    return {script: line.split() for script, line in lines.items()}


def run(script, argv, out, *more):
    """Run a script in this process. -> the line that it ends with, 2 for bad input, None if well"""
    try:
        judge.run(lambda: SCRIPTS[script].main([*argv, "--out", str(out), *more]))
    except SystemExit as stop:
        return stop.code


def start(script, argv, out):
    """Run a script in a process of its own, without its words."""
    def child():
        sys.stdout = sys.stderr = open(os.devnull, "w")
        run(script, argv, out)
    process = FORK.Process(target=child)
    process.start()
    return process


def outcome(out):
    """What a run leaves, {name: content}, without clock times and its own arguments."""
    files, ignored = {}, ("lock", "args.json", "run.json", "optimizer.pt", "report.html")
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.name not in ignored and ".tmp" not in str(path):
            files[str(path.relative_to(out))] = path.read_bytes()
    if "log.jsonl" in files:
        rows = [json.loads(line) for line in files["log.jsonl"].splitlines()]
        files["log.jsonl"] = [{name: value for name, value in row.items() if "seconds" not in name}
                              for row in rows]
    return files


@pytest.fixture(scope="module")
def straight(words, tmp_path_factory):
    """-> a function: script -> the folder of a run that nobody disturbed, and its seconds"""
    runs = {}

    def get(script):
        if script not in runs:
            out, begin = tmp_path_factory.mktemp(script), time.time()
            assert run(script, words[script], out) is None
            runs[script] = out, time.time() - begin
        return runs[script]
    return get


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_a_random_moment_it_ends_in_the_same_bits(words, straight, tmp_path, script):
    expected, seconds = straight(script)
    process = start(script, words[script], tmp_path)
    process.join(random.uniform(0.1, 1) * seconds)
    process.kill()
    process.join()
    assert run(script, words[script], tmp_path, "--resume") is None
    assert outcome(tmp_path) == outcome(expected)


@pytest.mark.parametrize("script, number", [("sft", signal.SIGTERM), ("sft", signal.SIGINT),
                                            ("grpo", signal.SIGHUP)])
def test_a_signal_saves_after_the_step(words, straight, tmp_path, monkeypatch, script, number):
    real, (expected, _) = sft.write_row, straight(script)

    def write_row(log, row):
        real(log, row)
        if row["step"] == 0 and "loss" in row:
            signal.raise_signal(number)
    monkeypatch.setattr(SCRIPTS[script], "write_row", write_row)
    assert "--resume" in run(script, words[script], tmp_path)           # it says how to go on
    assert [folder.name for folder in tmp_path.glob("step*")] == ["step_000001"]
    assert run(script, words[script], tmp_path, "--resume") is None
    assert outcome(tmp_path) == outcome(expected)


def test_a_picture_that_was_copied_by_half_is_copied_again(words, straight, tmp_path, monkeypatch):
    def killed(source, target):
        target.write_bytes(source.read_bytes()[:100])
        raise KeyboardInterrupt
    expected, _ = straight("synth")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", killed)
        assert "--resume" in run("synth", words["synth"], tmp_path)
    assert run("synth", words["synth"], tmp_path, "--resume") is None
    assert outcome(tmp_path) == outcome(expected)


def test_killed_at_any_file_operation_of_a_save_the_last_two_are_complete(fresh, tmp_path):
    student, args = fresh(reference=False), argparse.Namespace(lr=1)
    optimizer = sft.adamw(student, 1e-3)
    (tmp_path / "run").mkdir()

    def save_and_die(out, left):
        def hook(event, _):
            nonlocal left
            left -= event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
            if left < 0:
                os._exit(1)
        sys.addaudithook(hook)
        sft.save_checkpoint(out, 9, student, optimizer, args)
    for step in (3, 6):
        sft.save_checkpoint(tmp_path / "run", step, student, optimizer, args)
    seen = []
    for n in range(99):
        out = shutil.copytree(tmp_path / "run", tmp_path / str(n))
        process = FORK.Process(target=save_and_die, args=(out, n))
        process.start()
        process.join()
        folders = sorted(out.glob("step_??????"))
        seen.append([int(folder.name[5:]) for folder in folders[-2:]])
        for folder, step in zip(folders[-2:], seen[-1]):
            load_file(folder / "adapter_model.safetensors")
            torch.load(folder / "optimizer.pt")
            assert json.loads((folder / "run.json").read_text())["step"] == step
        if process.exitcode == 0:
            break
    assert seen[0] == [3, 6] and seen[-1] == [6, 9] and len(folders) == 2 and n > 10


@pytest.mark.parametrize("script, file, content", [
    ("sft", "args.json", b""), ("sft", "log.jsonl", b"\0\0\n"), ("grpo", "rollouts.jsonl", b"{\n"),
    ("synth", "rl.jsonl", b"{]\n"), ("eval", "samples.jsonl", b"\xff\n"),
    ("sft", "step_000004/adapter_model.safetensors", bytes(9)),
    ("sft", "step_000004/optimizer.pt", bytes(9999)), ("sft", "step_000004/run.json", b"")])
def test_a_damaged_folder_is_one_line(words, straight, tmp_path, capsys, script, file, content):
    out = shutil.copytree(straight(script)[0], tmp_path / "out")
    (out / file).write_bytes(content)
    assert run(script, words[script], out, "--resume") == 2
    assert str((out / file).parent) in capsys.readouterr().err.splitlines()[-1]
    if file.endswith("run.json"):           # without it, the one before leads to the same end
        shutil.rmtree((out / file).parent)
        assert run(script, words[script], out, "--resume") is None
        assert outcome(out) == outcome(straight(script)[0])


@pytest.mark.parametrize("script, flag", [("sft", "--lr 1"), ("grpo", "--clip 0.1"),
                                          ("synth", "--perturb 1"), ("eval", "--max_new 3")])
def test_a_folder_belongs_to_one_run(words, straight, tmp_path, capsys, script, flag):
    """It takes --resume and the same arguments to go on, also in another place, and one process."""
    out = shutil.copytree(straight(script)[0], tmp_path / "moved")
    assert run(script, words[script], out) == 2
    assert "--resume" in capsys.readouterr().err.splitlines()[-1]
    assert run(script, words[script], out, "--resume", *flag.split()) == 2
    assert flag.split()[0] in capsys.readouterr().err.splitlines()[-1]
    with open(out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)                # as another process would
        assert run(script, words[script], out, "--resume") == 2
    assert str(out) in capsys.readouterr().err.splitlines()[-1]
    assert run(script, words[script], out, "--resume") is None      # it is over, and stays so
    assert outcome(out) == outcome(straight(script)[0])


@pytest.mark.parametrize("script, flags", [
    ("sft", "--data nowhere"), ("sft", "--max_tokens 9"), ("grpo", "--max_tokens 16"),
    ("grpo", "--prompts 99"), ("grpo", "--tutor no_such_module"), ("eval", "--judge os")])
def test_flags_that_do_not_fit_the_data_are_refused(words, tmp_path, script, flags):
    assert run(script, words[script], tmp_path / "out", *flags.split()) == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_the_system_refuses_is_one_line(words, tmp_path, script):
    """No place for the folder, no file handles, and a full disk: a log or adapter is too large."""
    (tmp_path / "file").touch()
    for out in ("/proc/out", tmp_path / "file", tmp_path / "file/out"):
        assert "\n" not in run(script, words[script], out)
    for limit, value, said in ((resource.RLIMIT_NOFILE, 0, "Too many open files"),
                               (resource.RLIMIT_FSIZE, 3000, "File too large")):
        before = resource.getrlimit(limit)
        resource.setrlimit(limit, (value, before[1]))
        try:
            last = run(script, words[script], tmp_path / "out")
        finally:
            resource.setrlimit(limit, before)
        assert said in last and "\n" not in last


def test_a_disk_that_is_full_at_the_very_end_is_one_line(words, tmp_path, monkeypatch):
    def full(*args):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(sft, "save_file", full)
    monkeypatch.setattr(sft, "save_checkpoint", lambda *args: None)
    assert "No space" in run("sft", words["sft"], tmp_path)


@pytest.mark.parametrize("script, steps", [("sft", 1), ("sft", 4), ("grpo", 1), ("grpo", 4)])
def test_a_policy_that_becomes_nan_ends_the_run(words, tmp_path, monkeypatch, script, steps):
    """Nothing of it is saved, also if only the last of the four steps made it so."""
    real, calls = torch.optim.AdamW.step, []

    def step(optimizer):
        real(optimizer)
        calls.append(optimizer)
        if len(calls) == steps:
            for p in optimizer.param_groups[0]["params"]:
                p.data.fill_(torch.nan)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    said = run(script, words[script], tmp_path, "--save_every", "9")
    assert "finite" in said and "\n" not in said
    assert not (tmp_path / "adapter_model.safetensors").exists()
    if script == "grpo":                    # before anything is learned from its rollouts
        assert (tmp_path / "log.jsonl").read_text().count("\n") == steps
    for path in tmp_path.rglob("*.safetensors"):
        assert all(weight.isfinite().all() for weight in load_file(path).values())


def test_a_run_without_any_healthy_step_fails(words, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "loss_over", lambda *args, **more: float("nan"))
    assert "finite" in run("sft", words["sft"], tmp_path, "--epochs", "0.1")


@pytest.mark.parametrize("loss, gradient, healthy", [
    (1.0, 1.0, True), (float("nan"), 1.0, False), (1.0, float("inf"), False)])
def test_what_is_not_finite_is_no_step(loss, gradient, healthy):
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), gradient)
    _, stepped = sft.optimizer_step(torch.optim.SGD([weight], lr=1.0), loss)
    assert stepped == healthy and weight.grad is None
    assert (weight == 1).all() != healthy and weight.isfinite().all()


def test_a_resumed_optimizer_does_not_take_ordinary_memory_for_pages(tmp_path, monkeypatch):
    """
    On a GPU its state is paged: CPU memory with a mark, which torch.save keeps. bitsandbytes would
    prefetch whatever has the mark, and the driver would end the process. "meta" stands for a GPU.
    """
    def paged(p, dtype):
        state = torch.zeros(p.shape, dtype=dtype)
        state.is_paged, state.page_deviceid = True, 0
        return state
    cpu, gpu = [torch.nn.Parameter(torch.zeros(64, 128, device=d)) for d in ("cpu", "meta")]
    saved, resumed = [bitsandbytes.optim.PagedAdamW8bit([weight]) for weight in (cpu, gpu)]
    saved.get_state_buffer = paged
    saved.init_state(saved.param_groups[0], cpu, 0, 0)
    (tmp_path / "step_000002").mkdir()
    torch.save(saved.state_dict(), tmp_path / "step_000002/optimizer.pt")
    (tmp_path / "step_000002/run.json").write_text('{"step": 2}')
    monkeypatch.setattr(sft, "load_weights", lambda *args: None)
    assert sft.load_checkpoint(tmp_path, argparse.Namespace(base=gpu), resumed) == 2
    state = resumed.state[gpu]["state1"]
    assert state.is_meta and not getattr(state, "is_paged", False)


@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_other_data_at_the_same_path_are_noticed(words, straight, tmp_path, capsys, script):
    shutil.copytree(straight(script)[0], tmp_path / "out")
    argv = list(words[script])
    path = Path(argv[argv.index("--data") + 1])
    lines = path.read_text().splitlines(keepends=True)
    try:
        path.write_text("".join(lines[1:]))
        assert run(script, argv, tmp_path / "out", "--resume") == 2
    finally:
        path.write_text("".join(lines))
    assert "another data" in capsys.readouterr().err


def test_steps_without_signal_count_over_a_resume(words, tmp_path, monkeypatch):
    """A run that stopped because nothing is learned must not end well when it goes on."""
    monkeypatch.setattr(grpo, "turn_reward", lambda *args: 0.5)
    argv = [*words["grpo"], "--epochs", "4", "--save_every", "1"]
    assert "without any signal" in run("grpo", argv, tmp_path)
    assert "without any signal" in run("grpo", argv, tmp_path, "--resume")
