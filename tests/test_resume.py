"""
Runs of the four scripts that are killed, interrupted or damaged, that run out of disk or go wrong:
what was done is kept, a resumed run ends in the same bits, and a complaint is one line.
"""
import argparse
import fcntl
import io
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import grpo
import judge
import sft
import synth

SCRIPTS = {"sft": sft, "grpo": grpo, "synth": synth, "eval": evaluation}
FORK = multiprocessing.get_context("fork")      # a process of its own without the seconds of imports


def ask(requests):
    """This module is the tutor and the judge. Its scores look random, but depend on the request."""
    replies = []
    for request in requests:
        rng = random.Random(request["text"])
        scores = {name: rng.randint(1, 10) for name in ("safety", "usefulness", "faithfulness")}
        replies.append(json.dumps({
            "scores": scores, "next_turn": "and then?", "strategy": "persistence",
            "harmlessness": rng.randint(-3, 3), "helpfulness": 2, "refused": rng.random() < 0.5}))
    return replies


@pytest.fixture(scope="module")
def words(base, adapter, world):
    """{script: its arguments without --out}, for runs of about a second"""
    student = f"--model {base} --no-nf4 --max_tokens 200"
    steps = "--lr 1e-2 --save_every 2"
    lines = {
        "sft": f"{student} {steps} --data {world}/sft.jsonl --batch 2 --held_out 0.1 --eval_every 3 "
               f"--lora_r 4 --epochs 0.5",
        "grpo": f"{student} {steps} --data {world}/rl.jsonl --adapter {adapter} --prompts 2 --group 2 "
                f"--max_turns 2 --max_new 3 --tutor test_resume --like released",
        "synth": f"--seeds {world.parent}/seeds/seeds.jsonl --generator toy --concurrency 1",
        "eval": f"{student} --data {world}/bench.jsonl --adapter {adapter} --name x --batch 4 "
                f"--max_new 2 --judge test_resume --attacker adaptive --tutor test_resume",
    }
    return {script: line.split() for script, line in lines.items()}


def run(script, argv, out, *more):
    """Run a script in this process. -> its exit code, or the line that it ends with"""
    try:
        judge.run(lambda: SCRIPTS[script].main([*argv, "--out", str(out), *more]))
    except SystemExit as stop:
        return stop.code


def start(script, argv, out, *more):
    """Run a script in a process of its own."""
    def child():
        sys.stdout = sys.stderr = open(f"{out}.txt", "a")
        judge.run(lambda: SCRIPTS[script].main([*argv, "--out", str(out), *more]))
    process = FORK.Process(target=child)
    process.start()
    return process


def outcome(out):
    """All that a run leaves, {name: bytes}, without clock times and without its own arguments."""
    files = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.name not in ("lock", "args.json", "run.json", "optimizer.pt"):
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
            out, begin = tmp_path_factory.mktemp(script) / "out", time.time()
            process = start(script, words[script], out)
            process.join(60)
            assert process.exitcode == 0, open(f"{out}.txt").read()
            runs[script] = out, time.time() - begin
        return runs[script]
    return get


def copy_of(straight, script, out):
    """A copy of an undisturbed run, as if it had been made there."""
    shutil.copytree(straight(script)[0], out)
    record = json.loads((out / "args.json").read_text())
    (out / "args.json").write_text(json.dumps({**record, "out": str(out)}))
    return out


# ---------------------------------------------------------------------- killed and interrupted

@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_a_random_moment_and_resumed_it_ends_in_the_same_bits(
        words, straight, tmp_path, script):
    (expected, seconds), out = straight(script), tmp_path / "out"
    for _ in range(2):
        process = start(script, words[script], out, "--resume")
        process.join(random.uniform(0.1, 1) * seconds)
        process.kill()
        process.join()
    assert run(script, words[script], out, "--resume") is None
    assert outcome(out) == outcome(expected)


@pytest.mark.parametrize("script, number", [("sft", signal.SIGTERM), ("sft", signal.SIGINT),
                                            ("grpo", signal.SIGHUP)])
def test_a_signal_saves_after_the_step(words, straight, tmp_path, monkeypatch, script, number):
    out, real = tmp_path / "out", sft.write_row

    def write_row(log, row):
        real(log, row)
        if row["step"] == 0 and "loss" in row:
            signal.raise_signal(number)
    monkeypatch.setattr(SCRIPTS[script], "write_row", write_row)
    assert "--resume" in run(script, words[script], out)        # it says how to go on
    assert [folder.name for folder in out.glob("step*")] == ["step_000001"]
    assert run(script, words[script], out, "--resume") is None
    assert outcome(out) == outcome(straight(script)[0])


def test_a_picture_half_copied_by_a_killed_run_is_copied_again(words, straight, tmp_path, monkeypatch):
    def torn_copy(source, target):
        target.write_bytes(source.read_bytes()[:100])
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", torn_copy)
        assert "--resume" in run("synth", words["synth"], tmp_path)
    assert run("synth", words["synth"], tmp_path, "--resume") is None
    assert outcome(tmp_path) == outcome(straight("synth")[0])


# ---------------------------------------------------------------------- checkpoints

def is_complete(folder):
    load_file(folder / "adapter_model.safetensors")
    torch.load(folder / "optimizer.pt")
    return f"step_{json.loads((folder / 'run.json').read_text())['step']:06}" == folder.name


def test_killed_at_any_file_operation_of_a_save_the_last_two_are_complete(fresh, tmp_path):
    student, args = fresh(reference=False), argparse.Namespace(lr=1)
    optimizer = sft.adamw(student, 1e-3)
    for step in (3, 6):
        sft.save_checkpoint(tmp_path, step, student, optimizer, args)

    def save(left):
        def hook(event, _):
            nonlocal left
            left -= event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
            if left < 0:
                os._exit(1)
        sys.addaudithook(hook)
        sft.save_checkpoint(tmp_path, 9, student, optimizer, args)
    last_two = []
    for n in itertools.count():
        process = FORK.Process(target=save, args=(n,))
        process.start()
        process.join()
        folders = sorted(tmp_path.glob("step_??????"))[-2:]
        assert all(is_complete(folder) for folder in folders)
        last_two.append([int(folder.name[-1]) for folder in folders])
        if process.exitcode == 0:
            break
        shutil.rmtree(tmp_path / "step_000009", ignore_errors=True)
        if last_two[-1] == [6, 9]:
            sft.save_checkpoint(tmp_path, 3, student, optimizer, args)
    assert last_two[0] == [3, 6] and last_two[-1] == [6, 9] and n > 10
