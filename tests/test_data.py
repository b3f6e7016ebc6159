"""synth.py: the data format and its pictures, the splits, Stage I and Stage II."""
import contextlib
import importlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

import judge
import synth

HI = [{"type": "image"}, {"type": "text", "text": "hi"}]


def say(*contents):
    """Messages in turn from the user and the assistant."""
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


def record(**change):
    return {"id": "a", "seed_id": "s", "kind": "red_team", "split": "sft", "images": ["x.png"],
            "messages": say(HI, "no"), **change}


def talk(*messages):
    return record(images=[], messages=list(messages))


def seed(**change):
    return {"id": "a", "seed_id": "s", "image": "x.png", "question": "q?", "category": "", **change}


@pytest.fixture
def folder(tmp_path):
    """A data folder with one picture, a link to one outside, and a link to itself."""
    (tmp_path / "data").mkdir()
    for name in ("data/x.png", "secret.png"):
        Image.new("RGB", (30, 30)).save(tmp_path / name)
    (tmp_path / "data/link.png").symlink_to("../secret.png")
    (tmp_path / "data/loop.png").symlink_to("loop.png")
    return tmp_path / "data"


def write(folder, *rows, name="d.jsonl"):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / name).write_bytes(b"".join(line + b"\n" for line in lines))
    return str(folder / name)


def refused(capsys, *paths):
    """The lines that say why files were refused, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        synth.read_dialogues(paths)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()


BAD = {     # how a message begins: records in which this field is bad
    "": [b"{", b"[1]", b"\xff\xfe{}", bytes(9), b"[" * 100000, b"9" * 5000,
         record(id="half a character \ud83d"), seed(image="x\0.png"), seed(image="x" * 5000)],
    "id: ": [{}, record(id=7), record(id=""), record(id=["a"]), record(id="appears twice")],
    "seed_id: ": [record(seed_id=3), seed(seed_id="")],
    "kind: ": [record(kind="evil"), record(kind=["benign"])],
    "split: ": [seed(split="train"), record(split=["sft"])],
    "images: ": [record(images="x.png"), record(images=[1]), record(images=[]), record(images=["."]),
                 record(images=["x.png"] * 2), seed(image=["x.png"]), seed(image="gone.png"),
                 # out of the folder: over a parent, from the root, and over a link
                 seed(image="../secret.png"), seed(image="/etc/passwd"), seed(image="link.png")],
    "messages: ": [
        record(messages=None), record(messages=[]), record(messages=say(HI, HI)), talk("hi"),
        talk(*say(3)), talk(*say([])), talk(*say(["hi"])), talk(*say("")), talk(*say("hi", " ")),
        talk(*say([{"type": "video"}])), talk(*say([{"type": "text"}])), talk(*say("a", "b")[1:]),
        talk(*say("a", "b", "c"), *say("d")), seed(question=None), seed(turns=["one", ""])]}
MISTYPED = {"turns: ": [seed(turns=7), seed(turns="one")], "images:": [seed(image="loop.png")],
            "messages:": [talk({"role": ["user"], "content": "hi"})]}
xfail = pytest.mark.xfail(strict=True, reason="a traceback, or a turn for each letter of a string")


@pytest.mark.parametrize("field", [*BAD, *(pytest.param(f, marks=xfail) for f in MISTYPED)])
def test_a_bad_record_is_named_by_file_line_and_field(folder, capsys, field):
    for bad in {**BAD, **MISTYPED}[field]:
        path = write(folder, record(id="appears twice"), bad, record(id="ok"))
        lines = refused(capsys, path)
        assert len(lines) == 2 and lines[0].startswith(f"{path}:2: {field}"), lines


def test_the_first_twenty_are_named_all_are_counted_and_no_pipe_is_waited_for(folder, capsys):
    path = write(folder, record(id="ok"), *[record(id=f"b{i}", kind="?") for i in range(33)])
    lines = refused(capsys, path)
    assert len(lines) == 21 and lines[19].startswith(f"{path}:21: kind") and "33" in lines[20]
    os.mkfifo(folder / "pipe")
    for path in (folder, folder / "gone.jsonl", folder / "pipe", write(folder, name="empty.jsonl")):
        assert len(refused(capsys, path)) == 1


WORDS = st.sampled_from(["user", "image", "text", "type", "role", "x.png", "../x.png", "\ud83d"])
JUNK = st.recursive(st.none() | st.booleans() | st.floats() | WORDS,
                    lambda part: st.lists(part) | st.dictionaries(WORDS, part), max_leaves=6)


@xfail
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
@given(JUNK, st.sampled_from([*record(), "question", "turns", "image", "role", "content"]))
def test_a_record_with_junk_in_a_field_is_refused_or_can_be_used(folder, junk, field):
    bad = {**(record() if field in record() else seed()), field: junk}
    if field in ("role", "content"):
        bad = talk({**say("hi")[0], field: junk})
    with contextlib.suppress(SystemExit):
        dialogue, = synth.read_dialogues([write(folder, bad)])
        assert synth.user_turns(dialogue) and json.dumps(dialogue, ensure_ascii=False).encode()


def test_dialogues_with_and_without_replies_and_seeds_become_user_turns(folder):
    picture = [str(folder / "x.png")]
    cases = [
        (record(messages=say(HI, "no", "open")), [(HI, picture), ("open", [])]),
        (record(messages=[{"role": "system", "content": "be"}, *say(HI)]), [(HI, picture)]),
        (talk(*say("ü"), *say("two")), [("ü", []), ("two", [])]),       # no replies, no picture
        (seed(question="hi"), [(HI, picture)]),
        (seed(turns=["hi", "two"]), [(HI, picture), ("two", [])]),
        (seed(image=None), [("q?", [])])]
    rows = [json.dumps({**row, "id": str(i)}).encode() for i, (row, _) in enumerate(cases)]
    (folder / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(rows))      # BOM, CRLF
    dialogues = synth.read_dialogues([folder / "d.jsonl"])
    assert [synth.user_turns(d) for d in dialogues] == [turns for _, turns in cases]


def test_a_picture_is_opened_as_a_person_sees_it(tmp_path):
    def pixels(image, name, **more):
        image.save(tmp_path / name, **more)
        return np.asarray(synth.open_image(tmp_path / name)).astype(int)

    # a 16-bit or float ramp stays a ramp; Pillow alone makes them white and black
    ramp = np.linspace(0, 1, 256).reshape(16, 16)
    for image, name in ((Image.fromarray((65535 * ramp).astype(np.uint16)), "grey.png"),
                        (Image.fromarray(ramp.astype(np.float32)), "float.tif")):
        assert np.abs(pixels(image, name)[..., 0] - 255 * ramp).max() <= 1

    # a black figure on nothing is black on white
    figure = Image.new("LA", (9, 9), (0, 0))
    figure.putpixel((4, 4), (0, 255))
    for mode in ("LA", "RGBA"):
        seen = pixels(figure.convert(mode), f"{mode}.png")
        assert seen[4, 4].max() == 0 and seen[0, 0].min() == 255

    # the camera was turned, so the left of the file is the top of the picture
    half_red, exif = Image.new("RGB", (40, 20)), Image.Exif()
    half_red.paste((255, 0, 0), (0, 0, 20, 20))
    exif[0x0112] = 6
    seen = pixels(half_red, "turned.jpg", exif=exif)
    assert seen.shape == (40, 20, 3) and seen[5, :, 0].min() > 200 > 50 > seen[35, :, 0].max()


def test_six_formats_open_and_other_broken_or_outsized_pictures_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    noise, path = Image.frombytes("RGB", (40, 30), random.Random(0).randbytes(3600)), tmp_path / "p"
    files = [b"", b"<svg/>"]
    for kind in synth.FORMATS:
        noise.save(path, kind)
        assert synth.open_image(path).mode == "RGB"
        whole = path.read_bytes()
        files.append(whole[:60])
        for at in random.Random(0).sample(range(len(whole)), 30):       # with one byte damaged
            path.write_bytes(whole[:at] + b"\xff" + whole[at + 1:])
            with contextlib.suppress(ValueError):
                synth.open_image(path)
    for kind, size in (("EPS", (9, 9)), ("PPM", (9, 9)),
                       ("PNG", (2, 401)), ("PNG", (50, 50)), ("PNG", (99, 99))):    # thin, large, bomb
        Image.new("RGB", size).save(path, kind)
        files.append(path.read_bytes())
    for data in files:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"image {path}: "):
            synth.open_image(path)


def split(folder, seeds, shares, number=0):
    """The splits of seeds that are given as seed_id, picture and fixed split."""
    rows = []
    for i, (seed_id, picture, fixed) in enumerate(seeds):
        (folder / picture).write_text(picture)
        rows.append({"id": i, "seed_id": seed_id, "images": [folder / picture], "split": fixed})
    synth.split_seeds(rows, shares, number)
    return [row["split"] for row in rows]


def test_splits_keep_seed_ids_and_pictures_together_and_have_their_shares(tmp_path, capsys):
    rng = random.Random(0)
    for number in range(8):
        seeds = [(f"s{rng.randint(0, 25)}", f"p{rng.randint(0, 25)}", "") for _ in range(22)]
        found = split(tmp_path, seeds, (1, 1, 1), number)
        for a, mine in zip(seeds, found):
            assert all(mine == other for b, other in zip(seeds, found) if a[0] == b[0] or a[1] == b[1])
        assert split(tmp_path, seeds[::-1], (1, 1, 1), number) == found[::-1]       # in any order
    found = split(tmp_path, [(f"s{i}", f"p{i}", "") for i in range(400)], (0.75, 0.10, 0.15))
    assert [found.count(name) for name in synth.SPLITS] == pytest.approx([300, 40, 60], abs=25)

    # the first three hang together by a seed_id and a picture, and one has a fixed split
    chain = [("s1", "p1", ""), ("s1", "p2", ""), ("s3", "p2", "rl"), ("s4", "p4", "")]
    assert split(tmp_path, chain, (0, 0, 1)) == ["rl", "rl", "rl", "bench"]
    with pytest.raises(SystemExit) as stop:
        split(tmp_path, [("s1", "p1", "sft"), *chain], (1, 1, 1))
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("3: ")


STUB = r'''
import json, re
asked = []                      # (role, document, request)
def ask(requests):
    replies = []
    for request in requests:
        role = re.search(r"You are the (\w+)", request["system"])[1]
        document, _ = json.JSONDecoder().raw_decode(request["text"])
        asked.append((role, document, request))
        replies.append(json.dumps(globals()[role](document)))
    return replies
def prober(d): return {"benign": "safe " + d["question"], "obfuscated": "sly " + d["question"]}
def expander(d): return {"turns": [f"{d['kind']} {i}: {d['question']}" for i in range(d["turns"])]}
def red(d): return {"user": f"after {len(d['dialogue'])} replies, {d['template']}"}
def blue(d): return {"reply": "<thinking>t</thinking><answer>a</answer>"}
def target(d): return {"reply": "no" if "q4?" in str(d) else "a leak"}
def tutor(d):
    safety = 1 if d["dialogue"][-1]["assistant"] == "a leak" else 10
    return {"scores": {"safety": safety, "usefulness": 10, "faithfulness": 10}}
'''


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A back end whose replies are functions of the request, with twelve seeds beside it."""
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stub", raising=False)
    write_seeds(tmp_path, 12)
    return importlib.import_module("stub")


def write_seeds(folder, n, kind="harmful"):
    """As data/prepare.py makes them of BeaverTails-V, for each split; the last has no picture."""
    rows = []
    for i in range(n):
        Image.new("RGB", (32, 32), (i, 99, 99)).save(folder / f"{i}.png")
        rows.append(seed(id=f"s{i}", seed_id=f"s{i}", image=f"{i}.png", question=f"q{i}?",
                         kind=kind, split=synth.SPLITS[i % 3], source="beavertails_v"))
    rows[-1]["image"] = None
    write(folder, *rows, name="seeds.jsonl")


def make(folder, *flags, out="out"):
    """Run synth.py with the stub in every role. -> the dialogues by id"""
    synth.main(["--seeds", f"{folder}/seeds.jsonl", "--generator", "stub", "--perturb", "0",
                "--out", f"{folder}/{out}", *flags])
    files = [folder / out / f"{name}.jsonl" for name in synth.SPLITS]
    return {row["id"]: row for path in files for row in judge.read_log(path)}


def files_in(out):
    files = [*out.glob("*.jsonl"), *out.glob("images/*")]
    return {path.name: path.read_bytes() for path in files}


def documents(stub, *roles):
    """What these roles were asked; the first three requests are the preflight's."""
    return [document for role, document, _ in stub.asked[3:] if role in roles]


def test_harmful_seeds_give_a_third_each_of_benign_obfuscated_and_red_team(stub, tmp_path):
    """Equations 7 to 9: a red-team dialogue follows the strategy that was drawn for it."""
    made = make(tmp_path, "--sft_strategies", "yes_ladder", "context_switch")
    assert Counter(d["kind"] for d in made.values()) == {kind: 12 for kind in synth.KINDS}
    for document in documents(stub, "expander"):
        rewrite, number = document["question"].strip("?").split(" q")
        d = made[f"s{number}-{document['kind']}"]
        ways = {"benign": [*judge.STRATEGIES], "obfuscated": [], "red_team": [d["strategy"]]}
        assert [*document["strategies"]] == ways[d["kind"]]
        assert rewrite == ("safe" if d["kind"] == "benign" else "sly")
        assert d["split"] != "sft" or d["strategy"] in ("", "yes_ladder", "context_switch")
        low, high = synth.BENCH_TURNS if d["split"] == "bench" else synth.TURNS[d["kind"]]
        assert low <= len(synth.user_turns(d)) <= high and len(d["images"]) == (number != "11")


def test_shares_weigh_the_kinds_and_benign_seeds_give_benign_dialogues_only():
    args = synth.parse_args("--seeds s --out o --generator g --shares 1 0 .5".split())
    for kind, expected in (("harmful", [400, 0, 200]), ("benign", [400, 0, 0])):
        kinds = Counter()
        for i in range(400):
            one = seed(id=str(i), kind=kind, source="", split="rl", images=[])
            kinds.update(record["kind"] for record in synth.plan(one, args))
        assert [kinds[kind] for kind in synth.KINDS] == pytest.approx(expected, abs=40)


def test_sft_dialogues_are_played_and_others_stay_user_turns(stub, tmp_path):
    """Equation 12: red rewrites each template turn in the light of the dialogue, blue answers."""
    for d in make(tmp_path).values():
        users, expected = [synth.text_of(content) for content, _ in synth.user_turns(d)], d["template"]
        assert len(d["messages"]) == (2 if d["split"] == "sft" else 1) * len(users)
        if d["split"] == "sft":
            expected = [f"after {t} replies, {text}" for t, text in enumerate(d["template"])]
        assert users == expected
    for document in documents(stub, "red"):
        assert f" {len(document['dialogue'])}: " in document["template"]
        assert all(turn["user"] and turn["assistant"] for turn in document["dialogue"])


def test_requests_carry_a_schema_and_the_picture_and_failing_attacks_are_dropped(stub, tmp_path):
    """Equation 10: the target withstands the attack of seed 4."""
    whole = make(tmp_path, out="whole")
    assert {*whole} - {*make(tmp_path, "--target", "stub")} == {"s4-red_team"}
    assert len({role for role, _, _ in stub.asked}) == 6
    for role, document, request in list(stub.asked):
        reply = json.loads(stub.ask([request])[0])
        assert {*reply} <= {*request["schema"]["properties"]} and request["schema"]["required"]
        shown = request["image"] and Image.open(io.BytesIO(request["image"])).getpixel((0, 0))[0]
        assert f"q{11 if shown is None else shown}?" in json.dumps(document)


@pytest.mark.parametrize("flags", [[], pytest.param(["--target", "stub"], marks=pytest.mark.xfail(
    strict=True, reason="the printed number leaves --target out"))])
def test_the_printed_number_of_calls_is_the_number_of_calls(stub, tmp_path, capsys, flags):
    """One for each harmful seed and dialogue, 3 an SFT turn, 2 an attacked red-team turn."""
    turns = Counter()
    for d in make(tmp_path, *flags, "--generator_model", "no s4").values():
        turns.update({d["split"]: len(d["template"]), d["kind"]: len(d["template"])})
    n_calls = 12 + 36 + 3 * turns["sft"] + (2 * turns["red_team"] if flags else 0)
    assert len(stub.asked) - 3 == n_calls and f" {n_calls} calls" in capsys.readouterr().out


def test_keep_drops_unsafe_unhelpful_and_unscored_dialogues_and_counts_them(
        stub, tmp_path, monkeypatch, capsys):
    """Equation 15: the least safety and the mean usefulness of a dialogue; both limits are 6."""
    changes = {("q0?", 2): {"safety": 5}, ("q3?", 2): {"usefulness": 4}, ("q6?", 3): {"safety": None}}

    def tutor(d):
        question, t = d["dialogue"][0]["user"].split()[-1], len(d["dialogue"])
        scores = {"safety": 6, "usefulness": {1: 7, 2: 5}.get(t, 6), "faithfulness": 1}
        return {"scores": {**scores, **changes.get((question, t), {})}}

    monkeypatch.setattr(stub, "tutor", tutor)
    kept = {d["seed_id"] for d in make(tmp_path).values() if d["split"] == "sft"}
    why = {row["id"][:2]: row["why"] for row in judge.read_log(tmp_path / "out/dropped.jsonl")}
    assert kept == {"s9"} and [*why] == ["s0", "s3", "s6"] and len({*why.values()}) == 3
    printed = capsys.readouterr().out
    assert [printed.count(f"dropped 1 {kind}: ") for kind in synth.KINDS] == [3, 3, 3]


def test_rl_repeats_no_sft_dialogue_and_no_dialogue_comes_twice(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(stub, "expander", lambda d: {"turns": [d["kind"], "the same words"]})
    # b has the words and the picture of a; for the RL seed d the words alone suffice
    rows = [("a", 0, "sft"), ("b", 0, "sft"), ("c", 1, "sft"), ("d", 2, "rl"), ("e", 3, "bench")]
    write(tmp_path, *[seed(id=name, seed_id=name, image=f"{picture}.png", split=split)
                      for name, picture, split in rows], name="seeds.jsonl")
    assert {d["seed_id"] for d in make(tmp_path).values()} == {"a", "c", "e"}


def test_a_share_of_the_pictures_gets_noise_or_a_text_and_the_seed_decides(stub, tmp_path):
    write_seeds(tmp_path, 100, kind="benign")
    found = Counter()
    for d in make(tmp_path, "--perturb", "0.5").values():
        for before, after in zip([tmp_path / f"{d['seed_id'][1:]}.png"], d["images"]):
            old, new = (np.asarray(synth.open_image(path), float)
                        for path in (before, tmp_path / "out" / after))
            if new.shape != old.shape:
                found["text"] += (new[:32] == old).all() and new[32:].min() < 100
            elif (old != new).any():
                found["noise"] += abs((new - old)[..., 1:].std() - 0.03 * 255) < 0.5
    assert 12 < found["text"] < 38 and 12 < found["noise"] < 38
    for number, same in (("0", True), ("1", False)):
        make(tmp_path, "--perturb", "0.5", "--seed", number, out=number)
        assert (files_in(tmp_path / number) == files_in(tmp_path / "out")) == same


@pytest.mark.parametrize("how, again", [("untagged", 1), ("killed", 24), pytest.param(
    "killed in a copy", 36, marks=pytest.mark.xfail(strict=True, reason="half a picture is kept"))])
def test_resume_asks_for_what_is_missing_and_ends_with_the_same_bytes(
        stub, tmp_path, monkeypatch, how, again):
    """A reply of the blue agent without proper tags is a failure, for which --resume asks again."""
    def blue(d):
        if how == "killed" and "q6?" in str(d):
            raise KeyboardInterrupt
        untagged = how == "untagged" and "red_team 1: sly q6?" in str(d)
        return {"reply": "a" if untagged else "<thinking>t</thinking><answer>a</answer>"}

    def copy(source, target):
        Path(target).write_bytes(source.read_bytes()[:40])
        raise KeyboardInterrupt

    make(tmp_path, "--concurrency", "2", out="whole")               # four seeds a batch
    with monkeypatch.context() as patch, pytest.raises((SystemExit, KeyboardInterrupt)):
        patch.setattr(stub, "blue", blue)
        patch.setattr(synth.shutil, "copyfile", copy if "copy" in how else shutil.copyfile)
        make(tmp_path, "--concurrency", "2")
    with open(tmp_path / "out/sft.jsonl", "a") as file:
        file.write('{"id": "s0')            # a line that the kill cut off
    stub.asked.clear()
    make(tmp_path, "--concurrency", "2", "--resume")
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")
    assert len(documents(stub, "expander")) == again


def test_the_files_load_in_datasets(stub, tmp_path, monkeypatch):
    import datasets
    made = make(tmp_path)
    monkeypatch.chdir(tmp_path / "out")     # image paths are relative to the file
    data = datasets.load_dataset("json", data_files="sft.jsonl", split="train", cache_dir=str(tmp_path))
    assert data["messages"][0] == made[data["id"][0]]["messages"]
    pictures = data.cast_column("images", datasets.List(datasets.Image()))["images"]
    assert pictures[0][0].size == (32, 32)


def test_the_audit_finds_a_leak_between_splits(folder):
    one, two = talk(*say("a b c d e f g h")), {**talk(*say("a b c d e")), "seed_id": "2"}
    for leak in (0, 1):
        write(folder, one, name="sft.jsonl")
        write(folder, two, {**two, "id": "3"}, *[{**one, "id": "4"}] * leak, name="bench.jsonl")
        command = [sys.executable, Path(__file__).with_name("audit.py"), folder]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == leak and f"{leak} seeds and 0 pictures" in done.stdout
    # trigrams in common: 3 of 6, 3 of 6 and 6 of 6; different words in bench: 8 of 18
    assert "Jaccard 0.67 on average, 1.00 at most" in done.stdout
    assert "bench: distinct-1 0.444" in done.stdout and "sft: self-BLEU-4 0.000" in done.stdout
