"""data/prepare.py: a few records of each public set's shape, with harmless words, become seeds."""
import csv
import json
import shutil

import pytest
from PIL import Image

from conftest import refused
from data import prepare

H, B = "harmful", "benign"


def chat(*texts):
    """Messages in turn from the user and the assistant."""
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts)]


TALK = chat("one", "not a user turn", "two")
MCS = {"r1": "one", "safe_r1": "safe one", "unsafe_r1": "bad one",
       "r2": "two", "r3": "three", "safe_r3": "safe three", "unsafe_r3": "bad three"}
VLGUARD = [{"id": "a", "image": "x.png", "safe": False, "harmful_category": "c",
            "instr-resp": [{"instruction": "q1", "response": "-"}]},
           {"id": "b", "image": "y.png", "safe": True,
            "instr-resp": [{"safe_instruction": "q2", "response": "-"},
                           {"unsafe_instruction": "q3", "response": "-"}]}]
SAFES = [{"id": "b", "image": "y.png", "safe": True, "instruction": "q2", "response": "-"}]
BEAVER = {"question": "q1", "image": "x.png", "category": "c", "image_severity": 1}
MMS = {"0": {"Question": "-", "Rephrased Question(SD)": "q1", "Rephrased Question": "q2"}}
MOSS = {"pid": "1", "question": "q1", "image_path": "images/x.png", "meta_data_over": "c"}
FIG = {"dataset": "ForbidQI", "category_id": "1", "task_id": "2", "category_name": "c",
       "question": "q1", "instruction": "-"}
XS = [{"id": "1", "prompt": "q1", "type": "homonyms", "label": "safe", "focus": "f", "note": ""},
      {"id": "2", "prompt": "q2", "type": "contrast_homonyms", "label": "unsafe", "focus": "f",
       "note": ""}]
MHJ = {"Source": "s", "tactic": "c", "question_id": "7", "submission_message": "-",
       "message_0": json.dumps({"role": "system", "body": "not a user turn"}),
       "message_1": json.dumps({"role": "user", "body": "one"}),
       "message_2": json.dumps({"role": "user", "body": "two"})}
ACTOR = {"id": 1, "query_id": 1, "category": "c", "plain_query": "goal"}
MMDS = {"data_type": "default", "dimension": "c", "malicious_intent": "",
        "conversations": [{**TALK[0], "image": "x.png"}, *TALK[1:]]}
SAFEMT = {"id": "a", "scenario": "c", "image_path": "images/x.png", "dialogue": TALK}

# The set, its files, its pictures; then the kinds, the number of seed_ids, and the texts expected.
CASES = [
    ("vlguard", {"train.json": VLGUARD, "test.json": VLGUARD},
     ["train/x.png", "train/y.png", "test/x.png", "test/y.png"],
     [H, B, H] * 2, 4, ["q1", "q2", "q3"] * 2),
    ("vlsbench", {"data.json": [{"instruction_id": 0, "instruction": "q1", "category": "c",
                                 "image_path": "imgs/0.png"}]}, ["imgs/0.png"], [H], 1, ["q1"]),
    # the same path in two folders is not the same picture
    ("beavertails_v", {"c/evaluation.jsonl": [BEAVER, BEAVER], "d/evaluation.jsonl": [BEAVER]},
     ["c/x.png", "d/x.png"], [H] * 3, 2, ["q1"] * 3),
    ("spa_vl", {"harm.jsonl": [{"image": "x.png", "question": "q1", "class1": "c"}]}, ["x.png"],
     [H], 1, ["q1"]),
    ("mm_safetybench", {"data/processed_questions/01.json": MMS},
     [f"data/imgs/01/{kind}/0.jpg" for kind in ("SD", "SD_TYPO", "TYPO")], [H] * 3, 1,
     ["q1", "q2", "q2"]),
    ("mossbench", {"information.csv": [MOSS]}, ["images/x.png"], [B], 1, ["q1"]),
    ("siuo", {"data/siuo_gen.json": [{"question_id": 1, "image": "x.png", "question": "q1",
                                      "category": "c"}]}, ["data/images/x.png"], [H], 1, ["q1"]),
    ("hades", {"hub.jsonl": [{"id": "1", "scenario": "c", "step": step, "instruction": "q1",
                              "image": f"{step}.png"} for step in (0, 1)]},
     ["0.png", "1.png"], [H, H], 1, ["q1", "q1"]),
    # each of its folders counts from 1
    ("hades", {f"{folder}/data.json": [{"id": 1, "image": "1.png", "instruction": "q1",
                                        "category": "object"}] for folder in "AB"},
     ["A/1.png", "B/1.png"], [H, H], 2, ["q1", "q1"]),
    ("figstep", {"data/question/safebench.csv": [FIG]},
     ["data/images/SafeBench/query_ForbidQI_1_2_6.png"], [H, H], 1,
     ["q1", "Please answer the request in the picture."]),
    ("xstest", {"xstest_prompts.csv": XS}, [], [B, H], 1, ["q1", "q2"]),
    ("mhj", {"harmbench_behaviors.csv": [MHJ, MHJ]}, [], [H, H], 1, [["one", "two"]] * 2),
    ("safemtdata", {"Attack_600.json": [{**ACTOR, "multi_turn_queries": ["one", "two"]}],
                    "SafeMTData_1K.json": [{**ACTOR, "conversations": TALK}]}, [], [H, H], 1,
     [["one", "two"]] * 2),
    ("cosafe", {"CoSafe datasets/c.json": [TALK, TALK]}, [], [H, H], 2,
     [["one", "two"]] * 2),
    ("safedialbench", {f"datasets_{language}.jsonl": [
        {"task": "c", "id": 1, "history": [{"user": "one", "bot": "-"}]}]
        for language in ("en", "zh")}, [], [H, H], 1, [["one"]] * 2),
    ("redqueen", {"gpt_4o_attack_data.json": [
        {"action": "a", "query": TALK, "turn": turn, "type": "t", "category": "c"}
        for turn in (3, 4)]}, [], [H, H], 1, [["one", "two"]] * 2),
    ("mtmcs_bench", {f"type_{letter}.jsonl": [{"id": 0, "image": "x.png",
                                               "multimodal_dialogue": MCS}] for letter in "ab"},
     ["x.png"], [B, H] * 2, 1, [["one", "two", "safe three"], ["one", "two", "bad three"],
                                ["safe one", "two", "three"], ["bad one", "two", "three"]]),
    ("safemt", {"Data/2_turn.json": [SAFEMT], "Data/4_turn.json": [SAFEMT]},
     ["Data/images/x.png"], [H, H], 1, [["one", "two"]] * 2),
    ("mmds", {"mmds.jsonl": [{**MMDS, "id": 1, "user_rating": "Unsafe"},
                             {**MMDS, "id": 2, "user_rating": "Safe"}]}, ["x.png"], [H, B], 2,
     [["one", "two"]] * 2),
]


def write(folder, files, pictures=()):
    """Write the files of a set, and pictures that all differ, below a folder."""
    for name, rows in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        elif ".jsonl" in name or "CoSafe" in name:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            path.write_text(json.dumps(rows))
    for n, name in enumerate(pictures):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), (50 * n, 0, 0)).save(folder / name)


def run(name, path, out):
    prepare.main([name, str(path), "--out", str(out)])
    return [json.loads(line) for line in open(out / "seeds.jsonl")]


@pytest.mark.parametrize("name, files, pictures, kinds, seed_ids, texts", CASES,
                         ids=[case[0] for case in CASES])
def test_a_set_becomes_seeds(tmp_path, name, files, pictures, kinds, seed_ids, texts):
    write(tmp_path / "in", files, pictures)
    seeds = run(name, tmp_path / "in", tmp_path / "out")
    assert [seed["kind"] for seed in seeds] == kinds
    assert [seed.get("question", seed.get("turns")) for seed in seeds] == texts
    assert len({seed["id"] for seed in seeds}) == len(seeds)
    assert len({seed["seed_id"] for seed in seeds}) == seed_ids
    for seed in seeds:
        text = "turns" if isinstance(texts[0], list) else "question"
        assert set(seed) == {"id", "seed_id", text, "image", "kind", "category", "source"}
        assert seed["id"].startswith(f"{name}/") and seed["seed_id"].startswith(f"{name}/")
        assert seed["source"] == name
    # every picture of the input is used, and none is added
    used = {seed["image"] for seed in seeds} - {None}
    copied = {f"images/{path.name}" for path in (tmp_path / "out" / "images").iterdir()}
    assert used == copied and len(used) == len(pictures)


def test_the_safe_questions_of_vlguard_are_benign(tmp_path):
    write(tmp_path, {"gpt4_safe_safes.json": SAFES}, ["test/y.png"])
    seed, = run("vlguard", tmp_path / "gpt4_safe_safes.json", tmp_path / "out")
    assert seed["kind"] == B


def test_what_is_skipped_is_counted(tmp_path, capsys):
    rows = [{**MOSS, "pid": "1"}, {**MOSS, "pid": "1"}, {**MOSS, "pid": "2", "question": " "},
            {**MOSS, "pid": "3", "image_path": "images/none.png"},
            {**MOSS, "pid": "4", "image_path": "../secret.png"},
            {**MOSS, "pid": "5", "image_path": "images/torn.png"}]
    write(tmp_path / "in", {"information.csv": rows}, ["images/x.png", "../secret.png"])
    torn = (tmp_path / "in/images/x.png").read_bytes()[:45]
    (tmp_path / "in/images/torn.png").write_bytes(torn)
    assert len(run("mossbench", tmp_path / "in", tmp_path / "out")) == 1
    said = capsys.readouterr().out
    assert "1 records, 0 harmful, 1 benign, 0 without a picture" in said
    assert "skipped 1: id appears twice" in said
    assert "skipped 1: empty instruction (the first is mossbench/2)" in said
    assert "skipped 3: picture not found or damaged (the first is mossbench/3)" in said


def test_the_same_picture_in_two_folders_is_one_seed(tmp_path):
    """A second run finds the first one's seeds.jsonl below its input, and does not read it."""
    write(tmp_path, {"a/train.jsonl": [BEAVER], "b/train.jsonl": [BEAVER]}, ["a/x.png"])
    shutil.copy(tmp_path / "a/x.png", tmp_path / "b/x.png")
    for _ in range(2):
        first, second = run("beavertails_v", tmp_path, tmp_path / "out")
    assert first["seed_id"] == second["seed_id"] and first["id"] != second["id"]


@pytest.mark.parametrize("name", prepare.SETS)
@pytest.mark.parametrize("content, word", [('[{"foreign": 1}]', "foreign"), ("[{", "read"),
                                           ("[5]", "int")])
def test_another_format_is_named(tmp_path, capsys, name, content, word):
    file = tmp_path / "strange.json"
    file.write_text(content)
    line, = refused(capsys, run, name, file, tmp_path / "out")
    assert name in line and str(file) in line and word in line


def test_parquet_and_empty_folders_are_named(tmp_path, capsys):
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    for path in (tmp_path, tmp_path / "train.parquet", tmp_path / "none"):
        line, = refused(capsys, run, "spa_vl", path, tmp_path / "out")
        assert "spa_vl: no *.jsonl in" in line
