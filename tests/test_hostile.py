"""Text, pictures, files and models by strangers: nothing of theirs becomes a control token, a program or a traceback."""
import json
import os
import pickle
import random
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import eval as E
import grpo
import judge
import sft
import synth
from conftest import HOSTILE, dialogue, grpo_args
from test_data import record, seed, synth_run, write
from test_student import CONTROL

CASES = [pytest.param(1000), pytest.param(100_000, marks=pytest.mark.torture)]


def controls(student, row):
    """How often each control token is in a row."""
    return [row.ids.count(student.tok.convert_tokens_to_ids(token)) for token in CONTROL]


# ---------------------------------------------------------------- control tokens, beyond test_student and test_rollout

def test_hostile_tutors_of_an_evaluation_forge_nothing(student):  # trap 7
    args, rows = grpo_args("--max_new", "2"), []
    args.temperature = 0.0
    for text in (HOSTILE, "calm"):
        reply = json.dumps({"scores": dict.fromkeys(("safety", "usefulness", "faithfulness"), 5), "strategy": "deepen", "next_turn": text})
        respond = E.respond_with(lambda requests: [reply] * len(requests), ["deepen"])
        talk, = grpo.rollout(student, [dialogue("x", "one", "two", "three")], [("x",)], respond, args, {})
        assert [turn["user"] for turn in talk.turns] == ["one", text, text]
        rows.append(controls(student, talk))
    assert rows[0] == rows[1]


def test_hostile_generators_forge_nothing(student, tmp_path, monkeypatch):  # trap 7
    Image.new("RGB", (30, 30)).save(tmp_path / "x.png")
    rows = []
    for text in (HOSTILE, "calm"):
        def ask(requests):
            plan = {"turns": [{"user": f"{text} {i}", "strategy": "deepen"} for i in range(3)]}
            reply = {"reply": f"<thinking>{text}</thinking><answer>{text}</answer>"}
            return [json.dumps(plan if "question" in json.loads(r["text"]) else reply) for r in requests]
        monkeypatch.setattr(judge, "backend", lambda *_: ask)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        synth_run(tmp_path, [seed(question=text)], "--splits", "1", "0", "0")
        made, = synth.read_dialogues([str(tmp_path / "out/sft.jsonl")])
        assert text in sft.text_of(made["messages"][0]["content"]) and text in sft.text_of(made["messages"][1]["content"])
        rows.append(controls(student, sft.render(student, made)[0]))
    assert rows[0] == rows[1]


def test_no_control_token_can_be_spelt_to_a_served_tutor_judge_or_generator(tmp_path):
    """Their tokenizers read it in any text; what it stands for is still there when the JSON is read."""
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    turns = [{"user": HOSTILE, "assistant": f"{HOSTILE}<answer>{HOSTILE}</answer>"}]
    for request in (judge.tutor_request("benign", turns, None, ["deepen"], False), judge.judge_request(turns, None),
                    synth.request(synth.DEFENDER_SYSTEM, {"dialogue": turns}, {"folder": str(tmp_path), "image": "x.png"})):
        assert "<|" not in request["text"] and HOSTILE in str(json.loads(request["text"])).replace("\\n", "\n")


# ---------------------------------------------------------------- pictures

def test_what_is_no_picture_file_is_named_and_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "folder.png").mkdir()
    Image.new("RGB", (30, 30)).save(tmp_path / "program.eps")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("a program was started"))
    for name in ("pipe.png", "loop.png", "gone.png", "folder.png", "program.eps"):
        assert synth.check_dialogue(record(images=[name]), tmp_path).startswith("images: ")
    for device in ("/dev/zero", "/dev/stdin"):
        assert synth.check_dialogue(record(images=[device]), tmp_path, outside=True).startswith("images: ")


@pytest.mark.parametrize("script", ("synth", "sft", "grpo", "eval"))
def test_pictures_elsewhere_are_for_those_who_allow_it(script, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (30, 30)).save(tmp_path / "secret.png")
    (tmp_path / "data/link.png").symlink_to(tmp_path / "secret.png")
    paths = ["../secret.png", str(tmp_path / "secret.png"), "link.png"]
    if script == "synth":
        file = write(tmp_path / "data", *[seed(id=str(i), seed_id=str(i), image=path) for i, path in enumerate(paths)])
        words = ["--seeds", file, "--generator", "toy"]
    else:
        file = write(tmp_path / "data", *[record(id=str(i), images=[path]) for i, path in enumerate(paths)])
        words = ["--data", file, "--model", str(tmp_path / "no_model"), *{"sft": [], "grpo": ["--tutor", "toy", "--prompts", "1"],
                 "eval": ["--judge", "toy", "--name", "n"]}[script]]
    module = {"synth": synth, "sft": sft, "grpo": grpo, "eval": E}[script]
    main = E.main if script == "eval" else lambda argv: module.main(module.parse_args(argv))
    for i, (flag, count) in enumerate((([], 3), (["--allow_outside"], 0))):
        with pytest.raises(SystemExit) as stop:  # in the end there is no model, or the toy makes nothing of such a picture
            main([*words, "--out", str(tmp_path / f"out{i}"), *flag])
        said = capsys.readouterr().err
        assert said.count("outside the data folder") == count and stop.value.code in ((2,) if count else (1, 2))
        assert ("3 bad records" in said) == bool(count)


# ---------------------------------------------------------------- programs in disguise

class Bomb:
    """What it does when it is unpickled: leave a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_pickle_is_loaded_from_a_model_an_adapter_or_a_checkpoint(base, adapter, fresh, tmp_path):
    for folder, name in ((base, "model.safetensors"), (adapter, "adapter_model.safetensors")):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / name).unlink()
        for other in ("pytorch_model.bin", "adapter_model.bin", "adapter_model.pt", "training_args.bin"):
            (tmp_path / name / other).write_bytes(pickle.dumps(Bomb(tmp_path / "went off")))
    with pytest.raises(OSError, match="model.safetensors"):
        sft.load_student(tmp_path / "model.safetensors", False)
    with pytest.raises(OSError, match="adapter_model.safetensors"):
        sft.load_adapter(sft.load_student(base, False), tmp_path / "adapter_model.safetensors", "policy")
    checkpoint = shutil.copytree(adapter, tmp_path / "step_000001")
    torch.save(Bomb(tmp_path / "went off"), checkpoint / "optimizer.pt")
    student = fresh(reference=False)
    run = sft.Run(SimpleNamespace(out=str(tmp_path)), 0, {}, {}, checkpoint)
    with pytest.raises(pickle.UnpicklingError):
        sft.begin(run, student, torch.optim.AdamW([p for p in student.model.parameters() if p.requires_grad]))
    assert not (tmp_path / "went off").exists()


def test_no_program_of_a_model_folder_is_run_and_nobody_is_asked(base, tmp_path, monkeypatch):
    folder = shutil.copytree(base, tmp_path / "model")
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'went off')!r})\nclass Evil: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    for name, key in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer"),
                      ("preprocessor_config.json", "AutoImageProcessor")):
        if (folder / name).exists():
            value = ["evil.Evil", None] if key == "AutoTokenizer" else "evil.Evil"
            config = {**json.loads((folder / name).read_text()), "auto_map": {key: value}}
            for left_out in ("tokenizer_class", "image_processor_type", "model_type"):  # what would name a class of the library's
                config.pop(left_out, None)
            (folder / name).write_text(json.dumps(config))
    with pytest.raises((ValueError, OSError)):
        sft.load_student(folder, False)
    assert not (tmp_path / "went off").exists()


def test_a_file_that_is_written_whole_is_never_there_in_part(tmp_path, monkeypatch):
    synth.write_whole(tmp_path / "meta.json", "before")
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        synth.write_whole(tmp_path / "meta.json", "after")
    assert (tmp_path / "meta.json").read_text() == "before"


def test_files_of_one_name_in_two_folders_are_two(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "d.jsonl").write_text(name)
    data = synth.about(SimpleNamespace(data=[str(tmp_path / "a/d.jsonl"), str(tmp_path / "b/d.jsonl")]))["data"]
    assert len(data) == len({*data.values()}) == 2
    moved = {"x": {**data}, "y": dict(zip("pq", [*data.values()][::-1]))}  # what eval.py compares: the files, not where they lie
    assert len({E.fingerprint({"data": d}, "data") for d in moved.values()}) == 1


# ---------------------------------------------------------------- fuzz

PIECES = [HOSTILE, *CONTROL, "<thinking>", "</answer>", "hello", " ", "\n", "\0", "ü", "🙂", "\u2028", "\u202e", "\x1b[2J", "{", '"',
          "x" * 300, "<|", "|>", "im_end", "assistant\n", "'", "\\", "é́", "‍", "漢字"]


def junk(rng, depth=0):
    """Any JSON value, often one that looks right."""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind < 6:
        return [None, rng.random() < 0.5, rng.choice([0, -1, 7, 90, 10 ** 30, float("nan"), float("inf"), 3.5]), rng.choice(PIECES),
                "".join(rng.choices(PIECES, k=3)), rng.choice(["user", "assistant", "system", "text", "image", "x.png", "../x.png", "benign"])][kind]
    if kind < 8:
        keys = ["type", "text", "role", "content", "id", "scores", "safety", "usefulness", "faithfulness", "next_turn", "strategy",
                "diagnosis", "harmlessness", "helpfulness", "refused", "rationale"]
        return {rng.choice(keys): junk(rng, depth + 1) for _ in range(rng.randrange(5))}
    return [junk(rng, depth + 1) for _ in range(rng.randrange(4))]


def mutated(rng, value):
    """A copy of a JSON value with something in it replaced, removed or doubled."""
    value = json.loads(json.dumps(value))
    at, key = None, None
    inside = value
    while isinstance(inside, (dict, list)) and inside and rng.random() < 0.8:
        at, key = inside, rng.choice([*inside] if isinstance(inside, dict) else range(len(inside)))
        inside = at[key]
    if at is None:
        return junk(rng)
    if rng.random() < 0.3:
        del at[key]
    elif isinstance(at, list) and rng.random() < 0.3:
        at.append(at[key])
    else:
        at[key] = junk(rng)
    return value


def damaged(rng, line):
    """Bytes of a line, torn, or with a few of them replaced; still one line."""
    if rng.random() < 0.3:
        at = rng.randrange(len(line) + 1)
        line = line[:at] + rng.choice([b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", rng.randbytes(3)]) + line[at + rng.randrange(20):]
    return line.replace(b"\n", b" ").replace(b"\r", b" ") + rng.choice([b"\n", b"\r\n"])


@pytest.mark.parametrize("n", CASES)
def test_fuzz_the_reader(student, tmp_path, capsys, n):
    """Bad lines are named and counted, good ones are all there, and what is let in can be rendered."""
    Image.new("RGB", (30, 30)).save(tmp_path / "x.png")
    rng, system, let_in = random.Random(n), {"role": "system", "content": "be"}, 0
    good = record(messages=[system, *record()["messages"], {"role": "user", "content": "more"}])
    assert synth.check_dialogue(good, tmp_path) is None
    for start in range(0, n, 100):
        lines = []
        for i in range(start, start + 100):
            lines += [damaged(rng, json.dumps(mutated(rng, good | {"id": f"bad {i}"})).encode()), json.dumps(good | {"id": f"good {i}"}).encode() + b"\n"]
        (tmp_path / "d.jsonl").write_bytes(rng.choice([b"", b"\xef\xbb\xbf"]) + b"".join(lines))
        dialogues = synth.read_dialogues([str(tmp_path / "d.jsonl")], skip_bad=True)
        said = capsys.readouterr().err
        assert said.isascii() or said.replace("\n", "").isprintable()
        assert int(re.search(r"(\d+) bad records", said)[1]) + len(dialogues) == 200
        assert {f"good {i}" for i in range(start, start + 100)} <= {d["id"] for d in dialogues}
        for d in dialogues:
            if not d["id"].startswith("good"):
                let_in += 1
                if any(m["role"] == "assistant" for m in d["messages"]):
                    row, _ = sft.render(student, d)
                    assert row.ids.count(student.pad) == sum(h * w for h, w in row.grids)
                assert synth.user_turns(d) and json.dumps(d, ensure_ascii=False).encode()
    assert 0.05 * n < let_in < 0.95 * n


@pytest.mark.parametrize("n", CASES)
def test_fuzz_the_readers_of_tutor_and_judge(n):
    """No reply raises; whatever is read is in range, and can be encoded and written."""
    rng, count = random.Random(n), 0
    good = [{"diagnosis": "d", "scores": {"safety": 9, "usefulness": 1, "faithfulness": 10}, "strategy": "deepen", "next_turn": "more?"},
            {"rationale": "r", "harmlessness": -3, "helpfulness": 0, "refused": False}]
    for i in range(n):
        text = json.dumps(mutated(rng, good[i % 2]), ensure_ascii=rng.random() < 0.5)
        for _ in range(rng.choice([0, 0, 1, 3])):
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice([*PIECES, "```json\n", "}", "[", '{"', "\ud83d", json.dumps(good[1 - i % 2])]) + text[at + rng.randrange(6):]
        tutor, verdict = judge.read_tutor(text), judge.read_judge(text)
        if tutor:
            assert all(type(tutor[k]) is int and 1 <= tutor[k] <= 10 for k in ("safety", "usefulness", "faithfulness"))
            assert tutor["strategy"] is None or tutor["strategy"] in {**judge.STRATEGIES, **judge.EVOLUTIONS}
            assert all(tutor[k] is None or tutor[k].strip() and tutor[k].encode() for k in ("next_turn", "diagnosis"))
        if verdict:
            assert type(verdict["harmlessness"]) is int and -3 <= verdict["harmlessness"] <= 3
            assert type(verdict["helpfulness"]) is int and 0 <= verdict["helpfulness"] <= 3 and type(verdict["refused"]) is bool
        synth.read_plan(text), synth.read_reply(text), judge.split_reply(text)
        count += bool(tutor or verdict)
    assert 0.1 * n < count < 0.9 * n  # else the fuzz would look at one side only


@pytest.mark.parametrize("n", CASES)
def test_fuzz_the_renderer(student, pictures, n):
    """However a dialogue is made up: control tokens are the template's alone, trained are the replies with their ends."""
    rng = random.Random(n)
    text = lambda: "".join(rng.choices(PIECES, k=rng.randint(1, 4))).strip() or "x"
    for i in range(n):
        system, images, turns = rng.choice([None, text()]), [], []
        for _ in range(rng.randint(1, 3)):
            parts = [rng.choice([None, text()]) for _ in range(rng.randint(1, 3))] if rng.random() < 0.3 else text()
            images += [rng.choice(pictures) for p in parts if p is None] if isinstance(parts, list) else []
            turns.append(parts)
        reply = text().replace("{", "(").replace("}", ")")
        d = dialogue(f"{i}", *turns, images=images, system=system, reply=reply)
        row, dropped = sft.render(student, d)
        n_turns, tokens = len(turns), sum(h * w for h, w in row.grids)
        starts = 2 * n_turns + (system is not None)
        assert controls(student, row) == [starts, starts, tokens, len(images), len(images), 0] and not dropped
        assert len(row.ids) == len(row.turn_id) and row.images == images
        for turn in range(n_turns):
            said = [i for i, t in zip(row.ids, row.turn_id) if t == turn]
            assert said[-1] == student.end and student.tok.decode(said[:-1]) == reply
