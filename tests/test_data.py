"""synth.py: the data format and its pictures, the splits, Stage I and Stage II."""
import contextlib
import importlib
import io
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

import judge
import sft
import synth

ROOT = Path(synth.__file__).resolve().parent
HI = [{"type": "image"}, {"type": "text", "text": "hi"}]


def say(*contents):
    """Messages in turn from the user and the assistant."""
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


def record(**change):
    return {"id": "a", "seed_id": "s", "kind": "red_team", "strategy": "", "category": "",
            "split": "sft", "images": ["x.png"], "messages": say(HI, "no"), **change}


def talk(*messages):
    return record(images=[], messages=list(messages))


def seed(**change):
    return {"id": "a", "seed_id": "s", "image": "x.png", "question": "q?", "kind": "harmful",
            "category": "c", **change}


@pytest.fixture
def folder(tmp_path):
    """A data folder with one picture and a link that leads to itself."""
    (tmp_path / "data").mkdir()
    Image.new("RGB", (30, 30)).save(tmp_path / "data/x.png")
    (tmp_path / "data/loop.png").symlink_to("loop.png")
    return tmp_path / "data"


def write(folder, *rows, name="d.jsonl"):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / name).write_bytes(b"".join(line + b"\n" for line in lines))
    return str(folder / name)


def refused(capsys, *paths):
    """The lines that say why files of seeds or dialogues were refused, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        synth.read_dialogues(paths)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()


# ----------------------------------------------------------------------------- reading files

# How a message begins, the field, and records in which this field is bad.
BAD = {
    "": [b"{", b"null", b"[1]", b"\xff\xfe{}", bytes(9), b"[" * 100000, b"9" * 5000,
         record(id="half a character \ud83d"), seed(image="x\0.png"), seed(image="x" * 5000)],
    "id": [{}, record(id=None), record(id=7), record(id=""), record(id=["a"])],
    "seed_id": [record(seed_id=3), seed(seed_id="")],
    "kind": [record(kind="evil"), record(kind=["benign"])],
    "split": [seed(split="train"), record(split=["sft"])],
    "image": [record(images="x.png"), record(images=[1]), record(images=[]), seed(image=["x.png"]),
              record(images=["x.png"] * 2), seed(image="gone.png"), record(images=["."])],
    "messages": [
        record(messages=None), record(messages=[]), record(messages=["hi"]), talk(*say("")),
        talk(*say("hi", " ")), talk(*say(3)), talk(*say([])), talk(*say(["hi"])),
        talk(*say([{"type": "video"}])), talk(*say([{"type": "text"}])), talk({"role": "user"}),
        talk({"role": "tool", "content": "hi"}), talk(*say("a", "b")[1:]), record(messages=say(HI, HI)),
        talk(*say("a", "b", "c"), *say("d")), seed(question=None), seed(turns=["one", ""])],
    "turns": [seed(turns=7), seed(turns="one"), seed(turns={"a": 1})],
    "messages: roles": [talk({"role": ["user"], "content": "hi"})],
    "images: loop": [seed(image="loop.png")],
}
TYPES = pytest.mark.xfail(strict=True, reason="a value of an unexpected type ends in a traceback")


@pytest.mark.parametrize("field", [*list(BAD)[:-3], *(pytest.param(f, marks=TYPES) for f in list(BAD)[-3:])])
def test_a_bad_record_is_named_by_file_line_and_field(folder, capsys, field):
    for bad in BAD[field]:
        path = write(folder, record(id="ok"), bad, record(id="ok too"))
        lines = refused(capsys, path)
        assert len(lines) == 2 and lines[0].startswith(f"{path}:2: {field.split(':')[0]}"), lines


def test_the_first_twenty_bad_records_are_named_and_all_are_counted(folder, capsys):
    path = write(folder, record(id="ok"), *[record(id=f"b{i}", kind="?") for i in range(33)])
    lines = refused(capsys, path)
    assert len(lines) == 21 and lines[19].startswith(f"{path}:21: kind") and "33" in lines[20]


def test_files_that_are_missing_empty_pipes_or_repeat_an_id_are_refused(folder, capsys):
    for path in (str(folder), str(folder / "gone.jsonl"), write(folder, name="empty.jsonl")):
        assert len(refused(capsys, path)) == 1
    one, two = write(folder, record(), name="one.jsonl"), write(folder, record(), name="two.jsonl")
    assert refused(capsys, one, two)[0].startswith(f"{two}:1: id: a")

    # nobody writes into this pipe, so whoever reads it waits without end
    os.mkfifo(folder / "pipe.jsonl")
    command = f"{sys.executable} synth.py --generator toy --out {folder}/out --seeds {folder}/pipe.jsonl"
    done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


WORDS = ["user", "system", "image", "text", "x.png", "../x.png", "benign", "\0", "\ud83d"]
KEYS = st.sampled_from(["type", "text", "role", "content", "id"])
JUNK = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4) | st.sampled_from(WORDS),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(KEYS, part, max_size=3), max_leaves=6)


@settings(max_examples=200, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JUNK, st.sampled_from([*record(), "question", "turns", "image", "role", "content"]))
def test_no_junk_in_a_field_brings_a_traceback(folder, junk, field):
    """The record is refused, or it can be used."""
    if field in ("role", "content"):
        bad = talk({**say("hi")[0], field: junk})
    else:
        bad = {**(record() if field in record() else seed()), field: junk}
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        dialogue, = synth.read_dialogues([write(folder, bad)])
        assert synth.user_turns(dialogue) and json.dumps(dialogue, ensure_ascii=False).encode()


def test_bom_and_crlf_are_read_and_dialogues_and_seeds_become_user_turns(folder):
    picture = [str(folder / "x.png")]
    cases = [
        (record(messages=say(HI, "no", "open")), [(HI, picture), ("open", [])]),
        (record(messages=[{"role": "system", "content": "be"}, *say(HI)]), [(HI, picture)]),
        (talk(*say("ü"), *say("two")), [("ü", []), ("two", [])]),       # no replies, no picture
        (seed(question="hi"), [(HI, picture)]),
        (seed(turns=["hi", "two"]), [(HI, picture), ("two", [])]),
        (seed(image=None), [("q?", [])])]
    rows = [json.dumps({**row, "id": f"{i}"}).encode() for i, (row, _) in enumerate(cases)]
    (folder / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(rows))
    dialogues = synth.read_dialogues([folder / "d.jsonl"])
    assert [synth.user_turns(d) for d in dialogues] == [turns for _, turns in cases]
    assert {d["kind"] for d in synth.read_dialogues([write(folder, seed(kind="benign"))])} == {"benign"}


# ----------------------------------------------------------------------------- pictures


def test_a_picture_is_opened_as_a_person_sees_it(tmp_path):
    def pixels(image, name, **more):
        image.save(tmp_path / name, **more)
        return np.asarray(synth.open_image(tmp_path / name)).astype(int)

    # Pillow alone makes a 16-bit ramp white and a float ramp black
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
    half_red = Image.new("RGB", (40, 20))
    half_red.paste((255, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    seen = pixels(half_red, "turned.jpg", exif=exif)
    assert seen.shape == (40, 20, 3) and seen[5, :, 0].min() > 200 > 50 > seen[35, :, 0].max()

    # a back end gets at most 512 x 512 pixels
    Image.new("CMYK", (1500, 700)).save(tmp_path / "big.jpg")
    sent = Image.open(io.BytesIO(synth.image_png(str(tmp_path / "big.jpg"))))
    assert (sent.format, sent.mode) == ("PNG", "RGB") and max(sent.size) == 512


def test_six_formats_open_and_other_or_broken_or_outsized_pictures_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)        # as if every file were smaller
    noise, files = Image.frombytes("RGB", (40, 30), random.Random(0).randbytes(3600)), {}
    sizes = {"thin": (2, 401), "large": (50, 50), "bomb": (100, 100)}
    for name, image, kind in [*((f"no.{kind}", noise, kind) for kind in ("PPM", "ICO", "EPS")),
                              *((name, Image.new("RGB", size), "PNG") for name, size in sizes.items())]:
        image.save(tmp_path / name, kind)
        files[name] = (tmp_path / name).read_bytes()
    for kind in synth.FORMATS:
        noise.save(tmp_path / "any_name", kind)
        assert synth.open_image(tmp_path / "any_name").mode == "RGB"
        whole = (tmp_path / "any_name").read_bytes()
        files.update({f"cut.{kind}": whole[:60], f"empty.{kind}": b"", f"no.{kind}": b"<svg/>"})
        for at in random.Random(0).sample(range(len(whole)), 30):
            files[f"damaged.{kind}.{at}"] = whole[:at] + b"\xff" + whole[at + 1:]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        try:
            assert synth.open_image(tmp_path / name) and name.startswith("damaged"), name
        except ValueError as error:
            assert name in str(error)


def test_no_path_leads_out_of_the_folder(folder):
    secret = folder.parent / "secret.png"
    Image.new("RGB", (9, 9)).save(secret)
    (folder / "link.png").symlink_to(secret)
    for path in ("../secret.png", "gone/../../secret.png", str(secret), "link.png"):
        with pytest.raises(ValueError, match="^images: .* outside"):
            synth.check_dialogue(record(images=[path]), folder)
    synth.check_dialogue(record(images=["../data/x.png"]), folder)


# ----------------------------------------------------------------------------- splits


def split(folder, links, shares=(1, 1, 1), number=0, fixed=()):
    """The splits of seeds that are given as (seed_id, picture), two numbers."""
    rows = []
    for i, (seed_id, picture) in enumerate(links):
        (folder / f"{picture}").write_text(f"{picture}")
        rows.append({"id": f"{i}", "seed_id": f"s{seed_id}", "images": [str(folder / f"{picture}")],
                     "split": dict(fixed).get(i, "")})
    synth.split_seeds(rows, shares, number)
    return [row["split"] for row in rows]


def test_seeds_that_share_a_seed_id_or_a_picture_are_in_one_split(tmp_path):
    rng = random.Random(0)
    for number in range(20):
        links = [(rng.randint(0, 25), rng.randint(0, 25)) for _ in range(22)]
        found = split(tmp_path, links, number=number)
        for (s, p), mine in zip(links, found):
            assert all(mine == other for (t, q), other in zip(links, found) if s == t or p == q)
        # the order of the file does not matter
        assert split(tmp_path, links[::-1], number=number) == found[::-1]


def test_splits_have_their_shares_and_a_fixed_split_is_kept(tmp_path, capsys):
    links = [(i, i) for i in range(400)]
    found = split(tmp_path, links, (0.75, 0.10, 0.15))
    shares = [found.count(name) / 400 for name in synth.SPLITS]
    assert shares == pytest.approx([0.75, 0.10, 0.15], abs=0.06)
    assert found != split(tmp_path, links, (0.75, 0.10, 0.15), number=1)

    # 0, 1 and 2 hang together by a seed_id and a picture, so all follow the fixed split of 2
    chain = [(1, 1), (1, 2), (3, 2), (4, 4)]
    assert split(tmp_path, chain, (0, 0, 1), fixed={2: "rl"}) == ["rl", "rl", "rl", "bench"]
    with pytest.raises(SystemExit) as stop:
        split(tmp_path, chain, fixed={0: "rl", 2: "sft"})
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("2: ")


# ----------------------------------------------------------------------------- Stage I and II

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

def prober(d):
    return {"benign": "harmless " + d["question"], "obfuscated": "disguised " + d["question"]}

def expander(d):
    return {"turns": [f"{d['kind']} {i}: {d['question']}" for i in range(d["turns"])]}

def red(d):
    return {"user": f"after {len(d['dialogue'])} replies, {d['template']}"}

def blue(d):
    return {"reply": "<thinking>t</thinking><answer>a</answer>"}

def target(d):
    return {"reply": "a leak"}

def tutor(d):
    safety = 1 if d["dialogue"][-1]["assistant"] == "a leak" else 10
    return {"scores": {"safety": safety, "usefulness": 10, "faithfulness": 10}}
'''


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """
    A back end whose replies are functions of the request. Beside it stand twelve harmful seeds as
    data/prepare.py makes them of BeaverTails-V, four for each split; the last has no picture.
    """
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stub", raising=False)
    write_seeds(tmp_path, 12)
    return importlib.import_module("stub")


def write_seeds(folder, n, **change):
    rows = []
    for i in range(n):
        Image.new("RGB", (32, 32), (i, 99, 99)).save(folder / f"{i}.png")
        rows.append(seed(id=f"s{i:02}", seed_id=f"s{i:02}", question=f"q{i}?", image=f"{i}.png",
                         source="beavertails_v", split=synth.SPLITS[i % 3], **change))
    rows[-1]["image"] = None
    write(folder, *rows, name="seeds.jsonl")


def make(folder, *flags, out="out"):
    """Run synth.py with the stub in every role. -> the dialogues by id"""
    synth.main(["--seeds", f"{folder}/seeds.jsonl", "--generator", "stub", "--out", f"{folder}/{out}",
                "--perturb", "0", *flags])
    return made_in(folder / out)


def made_in(out):
    rows = [row for name in synth.SPLITS for row in judge.read_log(out / f"{name}.jsonl")]
    return {row["id"]: row for row in rows}


def files_in(out):
    return {path.name: path.read_bytes() for path in out.rglob("*")
            if path.is_file() and path.name not in ("args.json", "lock")}


def documents(stub, *roles):
    """What these roles were asked; the first three requests to the prober are the preflight's."""
    return [document for role, document, _ in stub.asked[3:] if role in roles]


def test_harmful_seeds_alone_give_a_third_each_of_benign_obfuscated_and_red_team(stub, tmp_path):
    """Equations 7 to 9. The benign third comes from the harmless rewrite."""
    made = make(tmp_path, "--sft_strategies", "yes_ladder", "context_switch")
    assert Counter(d["kind"] for d in made.values()) == {kind: 12 for kind in synth.KINDS}
    for document in documents(stub, "expander"):
        rewrite = "harmless" if document["kind"] == "benign" else "disguised"
        assert document["question"].startswith(rewrite)
    for d in synth.read_dialogues([tmp_path / f"out/{name}.jsonl" for name in synth.SPLITS]):
        low, high = synth.BENCH_TURNS if d["split"] == "bench" else synth.TURNS[d["kind"]]
        assert low <= len(synth.user_turns(d)) <= high and bool(d["images"]) == (d["seed_id"] != "s11")
        assert d["split"] == synth.SPLITS[int(d["seed_id"][1:]) % 3]

    # a red-team dialogue follows one strategy that was drawn, and the expander sees only that one
    expected = {(f"disguised q{int(d['seed_id'][1:])}?", d["strategy"])
                for d in made.values() if d["kind"] == "red_team"}
    found = [d for d in documents(stub, "expander") if d["kind"] == "red_team"]
    assert {(d["question"], *d["strategies"]) for d in found} == expected and len(expected) == 12
    sft_ways = {d["strategy"] for d in made.values() if d["split"] == "sft"}
    assert sft_ways <= {"", "yes_ladder", "context_switch"}


def test_shares_weigh_the_kinds_and_benign_seeds_give_benign_dialogues_only(stub, tmp_path):
    args = synth.parse_args("--seeds s --out o --generator g --shares 1 0 .5".split())
    for kind, expected in (("harmful", [400, 0, 200]), ("benign", [400, 0, 0])):
        kinds = Counter()
        for i in range(400):
            one = seed(id=f"{i}", kind=kind, source="", split="rl", images=[])
            kinds.update(record["kind"] for record in synth.plan(one, args))
        assert [kinds[kind] for kind in synth.KINDS] == pytest.approx(expected, abs=40)
    write_seeds(tmp_path, 4, kind="benign")
    assert {d["kind"] for d in make(tmp_path).values()} == {"benign"} and not documents(stub, "prober")


def test_sft_dialogues_are_played_and_others_stay_user_turns(stub, tmp_path):
    """Equation 12: red rewrites each template turn in the light of the dialogue, blue answers it."""
    made = make(tmp_path)
    for d in made.values():
        users = [synth.text_of(content) for content, _ in synth.user_turns(d)]
        if d["split"] == "sft":
            assert users == [f"after {t} replies, {text}" for t, text in enumerate(d["template"])]
            assert len(d["messages"]) == 2 * len(users)
        else:
            assert users == d["template"] and len(d["messages"]) == len(users)
    for document in documents(stub, "red"):
        assert f" {len(document['dialogue'])}: " in document["template"]
        assert all(turn["assistant"] for turn in document["dialogue"])
    n_turns = sum(len(d["template"]) for d in made.values() if d["split"] == "sft")
    assert len(documents(stub, "red", "blue", "tutor")) == 3 * n_turns


TARGET_CALLS = pytest.mark.xfail(strict=True, reason="the printed number leaves --target out")


@pytest.mark.parametrize("flags", [[], pytest.param(["--target", "stub"], marks=TARGET_CALLS)])
def test_the_printed_number_of_calls_is_the_number_of_calls(stub, tmp_path, capsys, flags):
    """One for each harmful seed and each dialogue, 3 an SFT turn, 2 an attacked red-team turn."""
    turns = Counter()
    for d in make(tmp_path, *flags).values():
        turns[d["split"]] += len(d["template"])
        turns[d["kind"]] += len(d["template"])
    n_calls = 12 + 36 + 3 * turns["sft"] + (2 * turns["red_team"] if flags else 0)
    assert len(stub.asked) - 3 == n_calls
    assert f" {n_calls} calls" in capsys.readouterr().out


def test_requests_carry_a_schema_and_the_picture(stub, tmp_path):
    make(tmp_path, "--target", "stub")
    assert {role for role, _, _ in stub.asked} == {"prober", "expander", "red", "blue", "target", "tutor"}
    for role, document, request in stub.asked:
        reply = json.loads(stub.ask([request])[0])
        assert request["schema"]["required"] and {*reply} <= {*request["schema"]["properties"]}
        shown = request["image"] and Image.open(io.BytesIO(request["image"])).getpixel((0, 0))[0]
        assert f"q{11 if shown is None else shown}?" in json.dumps(document)


def test_with_a_target_attacks_that_fail_are_dropped(stub, tmp_path, monkeypatch):
    """Equation 10."""
    whole = make(tmp_path, out="whole")
    monkeypatch.setattr(stub, "target", lambda d: {
        "reply": "no" if "q4?" in d["dialogue"][0]["user"] else "a leak"})
    assert {*whole} - {*make(tmp_path, "--target", "stub")} == {"s04-red_team"}


def test_keep_drops_unsafe_unhelpful_and_unscored_dialogues_and_counts_them(
        stub, tmp_path, monkeypatch, capsys):
    """Equation 15: the least safety and the mean usefulness; both limits are 6."""
    def tutor(d):
        question, t = d["dialogue"][0]["user"].split(" q")[1], len(d["dialogue"])
        scores = {"safety": 6, "usefulness": 7 if t == 1 else 6, "faithfulness": 1}
        if question == "0?" and t == 2:
            scores["safety"] = 5
        if question == "3?":
            scores["usefulness"] = 5 if t == 2 else 6
        if question == "6?" and t == 3:
            del scores["faithfulness"]
        return {"scores": scores}

    monkeypatch.setattr(stub, "tutor", tutor)
    kept = make(tmp_path)
    assert {d["seed_id"] for d in kept.values() if d["split"] == "sft"} == {"s09"} and len(kept) == 27
    why = {row["id"][:3]: row["why"] for row in judge.read_log(tmp_path / "out/dropped.jsonl")}
    assert [*why] == ["s00", "s03", "s06"] and len({*why.values()}) == 3
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("dropped 1 ")]
    assert len(printed) == 9 and sum("benign" in line for line in printed) == 3


def test_rl_repeats_no_sft_dialogue_and_no_dialogue_comes_twice(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(stub, "expander", lambda d: {"turns": [d["kind"], "the same words"]})
    write(tmp_path, *[seed(id=name, seed_id=name, image=f"{picture}.png", split=split)
                      for name, picture, split in (("a", 0, "sft"), ("b", 0, "sft"), ("c", 1, "sft"),
                                                   ("d", 2, "rl"), ("e", 3, "bench"))],
          name="seeds.jsonl")
    # b: the words and the picture of a; d: for RL, the words alone suffice
    assert {name.split("-")[0] for name in make(tmp_path)} == {"a", "c", "e"}


def test_a_share_of_the_pictures_gets_noise_or_a_text(stub, tmp_path):
    write_seeds(tmp_path, 120, kind="benign")
    made = make(tmp_path, "--perturb", "0.5")
    changed = Counter()
    for d in made.values():
        if d["images"]:
            before = tmp_path / f"{int(d['seed_id'][1:])}.png"
            after = tmp_path / "out" / d["images"][0]
            old, new = (np.asarray(synth.open_image(path), float) for path in (before, after))
            if new.shape[0] == 32 + 24:
                changed["text"] += (new[:32] == old).all() and (new[32:].min() < 100)
            elif before.read_bytes() != after.read_bytes():
                changed["noise"] += abs((new - old)[..., 1:].std() - 0.03 * 255) < 0.5
    assert 15 < changed["text"] < 45 and 15 < changed["noise"] < 45 and 45 < changed.total() < 75
    make(tmp_path, "--perturb", "0.5", out="again")
    assert files_in(tmp_path / "again") == files_in(tmp_path / "out")
    make(tmp_path, "--perturb", "0.5", "--seed", "1", out="other")
    assert files_in(tmp_path / "other") != files_in(tmp_path / "out")


def test_resume_asks_only_for_what_is_missing_and_ends_with_the_same_bytes(stub, tmp_path, monkeypatch):
    """A reply of the blue agent without proper tags is no reply."""
    make(tmp_path, out="whole")
    with monkeypatch.context() as broken, pytest.raises(SystemExit) as stop:
        broken.setattr(stub, "blue", lambda d: {"reply": "q3" if "red_team 1: disguised q3?" in str(d)
                                                else "<thinking>t</thinking><answer>a</answer>"})
        make(tmp_path)
    assert stop.value.code not in (0, None)
    assert {*made_in(tmp_path / "whole")} - {*made_in(tmp_path / "out")} == {"s03-red_team"}
    stub.asked.clear()
    make(tmp_path, "--resume")
    assert all("q3?" in json.dumps(d) for d in documents(stub, *("prober", "expander", "red", "tutor")))
    assert len(documents(stub, "expander")) == 1
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")
