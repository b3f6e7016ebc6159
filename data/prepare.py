"""
Turn a public data set, in the format in which it is published, into seeds.

    python data/prepare.py vlguard PATH --out data/vlguard

PATH is the folder of the set, with its archives unpacked, or one of its files. The command writes
OUT/seeds.jsonl, one JSON object a line, and copies the pictures that are used into OUT/images/:

    {"id", "seed_id", "question", "image", "kind", "category", "source"}

A multi-turn set has "turns", the user's texts in order, instead of "question". The image is a path
relative to OUT, or null. The kind is "harmful" or "benign". Records about the same picture or the
same goal share a seed_id, so that a split can keep them together. Pictures are named after their
content, so that the same picture has the same name in every set.

The Hugging Face hub has some sets as Parquet. Export these first, each split to its own file:

    rows = datasets.load_dataset("PKU-Alignment/BeaverTails-V", "animal_abuse", split="evaluation")
    with open("animal_abuse.jsonl", "w") as file:
        for n, row in enumerate(rows):
            row["image"].convert("RGB").save(f"animal_abuse-{n}.png")
            row["image"] = f"animal_abuse-{n}.png"
            file.write(json.dumps(row, default=str) + "\\n")
"""
import argparse
import csv
import hashlib
import json
import sys
from collections import defaultdict
from pathlib import Path

from PIL import Image

csv.field_size_limit(10 ** 7)

# -------------------------------------------------------------------------------------------------
# One reader per set. row is a record of the file, number is its place in the file.


def seed(id, text, category, image=None, goal=None, harmful=True):
    """
    text is a question or a list of user turns, image a path as the set writes it. Seeds with the
    same goal share a seed_id. Where there is no goal, those with the same picture do.
    """
    kind = "harmful" if harmful else "benign"
    made = {"id": id, "goal": goal, "image": image and Path(image), "kind": kind,
            "category": clean(category)}
    if isinstance(text, list):
        made["turns"] = [clean(turn) for turn in text if clean(turn)]
    else:
        made["question"] = clean(text)
    return made


def clean(text):
    """Strip the text. Half characters, which no file could hold, become '?'."""
    return (text or "").encode("utf-8", "replace").decode().strip()


def digest(content):
    """A short name for a text or for the bytes of a picture."""
    content = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(content).hexdigest()[:16]


def user_turns(messages):
    """What the user says. The scripted replies are left out, the model gives its own."""
    return [message["content"] for message in messages if message["role"] == "user"]


# Sets of questions about pictures

def vlguard(row, number, file):
    """Hub: ys-zong/VLGuard. A harmless picture has a safe and an unsafe question."""
    split = "train" if file.stem == "train" else "test"
    pairs = row.get("instr-resp")
    # gpt4_safe_safes.json repeats the safe questions of test.json, one per record. So it is not
    # in the table SETS, but can be PATH.
    if pairs is None:
        pairs = [{"safe_instruction" if row["safe"] else "instruction": row["instruction"]}]
    for pair in pairs:
        [field] = [key for key in pair if key.endswith("instruction")]
        yield seed(f"{split}/{row['id']}/{field}", pair[field], row.get("harmful_category"),
                   f"{split}/{row['image']}", harmful=field != "safe_instruction")


def vlsbench(row, number, file):
    """Hub: Foreshhh/vlsbench. The words are harmless, the harm is in the picture."""
    yield seed(row["instruction_id"], row["instruction"], row["category"], row["image_path"])


def beavertails_v(row, number, file):
    """Hub: PKU-Alignment/BeaverTails-V, exported. The records have no id."""
    id = f"{file.parent.name}/{file.stem}/{number}"
    yield seed(id, row["question"], row["category"], row["image"])


def spa_vl(row, number, file):
    """Hub: sqrti/SPA-VL, exported. The train split has answers (chosen) but no classes."""
    id = f"{file.parent.name}/{file.stem}/{number}"
    category = row.get("class1") if "chosen" in row else row["class1"]
    yield seed(id, row["question"], category, row["image"])


def mm_safetybench(row, number, file):
    """GitHub: isXinLiu/MM-SafetyBench. Three pictures per question."""
    # The words were changed so that they point at the picture.
    goal = f"{file.stem}/{row['key']}"
    for kind in ("SD", "SD_TYPO", "TYPO"):
        text = row["Rephrased Question(SD)" if kind == "SD" else "Rephrased Question"]
        picture = f"imgs/{file.stem}/{kind}/{row['key']}.jpg"
        yield seed(f"{goal}/{kind}", text, file.stem, picture, goal)


def mossbench(row, number, file):
    """GitHub: xirui-li/MOSSBench. Harmless questions that look harmful, for over-refusal."""
    category = row["meta_data_over"]
    yield seed(row["pid"], row["question"], category, row["image_path"], harmful=False)


def siuo(row, number, file):
    """Hub: sinwang/SIUO. Text and picture are safe, together they are not."""
    yield seed(row["question_id"], row["question"], row["category"], row["image"])


def hades(row, number, file):
    """A folder per scenario; or hub: Monosail/HADES, exported, six steps per id."""
    # Both folders and scenarios count their ids anew, and a picture per step has the same goal.
    scenario = row.get("scenario", file.parent.name)
    goal = f"{scenario}/{row['id']}"
    yield seed(f"{goal}/{row.get('step', 0)}", row["instruction"], scenario, row["image"], goal)


def figstep(row, number, file):
    """GitHub: ThuCCSLab/FigStep. Each question as text, and once more as a picture of the text."""
    goal = f"{row['category_id']}_{row['task_id']}"
    picture = f"SafeBench/query_{row['dataset']}_{goal}_6.png"
    yield seed(f"{goal}/text", row["question"], row["category_name"], goal=goal)
    yield seed(f"{goal}/picture", "Please answer the request in the picture.",
               row["category_name"], picture, goal)


# Sets without pictures. Only the first has single questions.

def xstest(row, number, file):
    """GitHub: paul-rottger/xstest. Safe and unsafe prompts about the same word share a seed_id."""
    goal = row["focus"] or row["id"]
    unsafe = row["type"].startswith("contrast_")
    yield seed(row["id"], row["prompt"], row["type"], goal=goal, harmful=unsafe)


def mhj(row, number, file):
    """Hub: ScaleAI/mhj. Attacks by people. question_id is the HarmBench behaviour."""
    # submission_message is not the goal. It is a comment of the attacker on the attack.
    turns = []
    for i in range(101):
        message = json.loads(row.get(f"message_{i}") or '{"role": null}')
        if message["role"] == "user":
            turns.append(message["body"])
    yield seed(number, turns, row["tactic"], goal=row["question_id"])


def safemtdata(row, number, file):
    """Hub: SafeMTData/SafeMTData, that is ActorAttack."""
    turns = row.get("multi_turn_queries") or user_turns(row["conversations"])
    # The goal is the query itself. Its query_id is counted anew in each of the two files.
    goal = digest(row["plain_query"])
    yield seed(f"{file.stem}/{number}", turns, row.get("category"), goal=goal)


def cosafe(row, number, file):
    """GitHub: ErxinYu/CoSafe-Dataset. A row is a list of messages."""
    yield seed(f"{file.stem}/{number}", user_turns(row), file.stem)


def safedialbench(row, number, file):
    """GitHub: drivetosouth/SafeDialBench-Dataset. The languages share ids and so seed_ids."""
    turns = [turn["user"] for turn in row["history"]]
    yield seed(f"{file.stem}/{row['id']}", turns, row["task"], goal=row["id"])


def redqueen(row, number, file):
    """GitHub: kriti-hippo/red_queen. Only the gpt_4o files hold messages, the others one text."""
    goal = digest(row["action"])
    id = f"{goal}/{row.get('type', file.stem)}/{row['turn']}"
    yield seed(id, user_turns(row["query"]), row["category"], goal=goal)


# Sets of dialogues about pictures

def mtmcs_bench(row, number, file):
    """Hub: ND-25/MCS-bench, exported. A safe and an unsafe dialogue about the same picture."""
    # In type_a the two differ in the last turn, in type_b in the first.
    differs = "r3" if file.stem.startswith("type_a") else "r1"
    for variant in ("safe", "unsafe"):
        # The unimodal_dialogue of the record says the same without a picture. It is left out.
        turns = dict(row["multimodal_dialogue"])
        turns[differs] = turns[f"{variant}_{differs}"] or turns[differs]
        turns = [turns["r1"], turns["r2"], turns["r3"]]
        yield seed(f"{file.stem}/{row['id']}/{variant}", turns, file.stem, row["image"],
                   row["id"], harmful=variant == "unsafe")


def safemt(row, number, file):
    """GitHub: Happy-Corpse/SafeMT. All lengths of a dialogue have the same id."""
    turns = user_turns(row["dialogue"])
    yield seed(f"{file.stem}/{row['id']}", turns, row["scenario"], row["image_path"], row["id"])


def mmds(row, number, file):
    """Hub: leost233/MMDS. The first picture stands for all."""
    # The card names the fields of a record but not those of a message: these are assumed.
    turns = user_turns(row["conversations"])
    pictures = [message["image"] for message in row["conversations"] if message.get("image")]
    goal = digest(row["malicious_intent"]) if row["malicious_intent"] else row["id"]
    yield seed(row["id"], turns, row["dimension"], pictures[0] if pictures else None, goal,
               harmful=row["user_rating"] == "Unsafe")


# Each set with its reader and the names of its files below PATH.
SETS = {
    "vlguard": (vlguard, ["train.json", "test.json"]),
    "vlsbench": (vlsbench, ["data.json"]),
    "beavertails_v": (beavertails_v, ["*.jsonl"]),
    "spa_vl": (spa_vl, ["*.jsonl"]),
    "mm_safetybench": (mm_safetybench, ["processed_questions/*.json"]),
    "mossbench": (mossbench, ["information.csv"]),
    "siuo": (siuo, ["siuo_gen.json"]),
    "hades": (hades, ["data.json", "*.jsonl"]),
    "figstep": (figstep, ["safebench.csv"]),
    "xstest": (xstest, ["xstest*prompts.csv"]),
    "mhj": (mhj, ["harmbench_behaviors.csv"]),
    "safemtdata": (safemtdata, ["Attack_600.json*", "SafeMTData_1K.json*"]),
    "cosafe": (cosafe, ["CoSafe datasets/*.json"]),
    "safedialbench": (safedialbench, ["datasets_*.jsonl"]),
    "redqueen": (redqueen, ["gpt_4o_a*.json"]),
    "mtmcs_bench": (mtmcs_bench, ["type_a*.jsonl", "type_b*.jsonl"]),
    "safemt": (safemt, ["*_turn.json"]),
    "mmds": (mmds, ["mmds.jsonl"]),
}

# -------------------------------------------------------------------------------------------------
# What all sets share


def fail(message):
    """One clear line instead of a traceback."""
    print(message, file=sys.stderr)
    sys.exit(2)


def list_files(name, path):
    """The files of a set below path, or path itself where it is a file."""
    files = [path] if path.is_file() else []
    for pattern in SETS[name][1]:
        files += sorted(path.rglob(pattern))
    # An earlier output may lie below PATH.
    files = [file for file in files if file.name != "seeds.jsonl"]
    if not files or files[0].suffix == ".parquet":
        fail(f"{name}: no {' or '.join(SETS[name][1])} in {path}. For Parquet files see --help.")
    return files


def read_rows(file):
    """The records of a CSV, JSON or JSON Lines file."""
    if file.suffix == ".csv":
        with open(file, encoding="utf-8-sig", newline="") as lines:
            return list(csv.DictReader(lines))

    # JSON first. What is no JSON as a whole may be JSON Lines, whatever the name of the file.
    text = file.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    if isinstance(rows, list):
        return rows
    # One object is either {key: record, ..} or the only line of a JSON Lines file.
    if all(isinstance(row, dict) for row in rows.values()):
        return [{"key": key, **row} for key, row in rows.items()]
    return [rows]


def read_seeds(name, file):
    """The seeds of a file. A record with other fields than the set has stops the program."""
    try:
        rows = read_rows(file)
    except (ValueError, RecursionError, AttributeError, csv.Error) as error:
        fail(f"{name}: {file} cannot be read: {error}")
    for number, row in enumerate(rows):
        # A record of another shape raises whatever its shape makes the reader raise.
        try:
            seeds = list(SETS[name][0](row, number, file))
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            fields = list(row) if isinstance(row, dict) else type(row).__name__
            fail(f"{name}: record {number} of {file} has another format ({error!r}). "
                 f"Its fields are {fields}.")
        yield from seeds


def copy_picture(path, file, root, out):
    """
    Copy the picture that a file names to out. -> its path relative to out, or None if there is
    none that can be read. It lies beside the file or in a folder above, at most in root.
    """
    # The paths are written by strangers: they must not lead out of the data set.
    if path.is_absolute() or ".." in path.parts:
        return None

    # PATH may be the folder of the whole set, with the pictures in another branch than the file.
    folders = [folder for folder in file.parents if folder.is_relative_to(root)]
    folders += [folder / "images" for folder in folders]

    # Pillow reads some formats, not these, with the help of another program.
    try:
        [place, *_] = [folder / path for folder in folders if (folder / path).is_file()]
        with Image.open(place, formats=["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]) as image:
            image.load()
        if max(image.size) > 200 * min(image.size):     # open_image refuses these
            return None
    # There may be no such file, and a damaged one can raise almost anything.
    except Exception:
        return None
    content = place.read_bytes()
    name = f"images/{digest(content)}.{image.format.lower()}"
    (out / name).write_bytes(content)
    return name


def prepare(name, path, out):
    """Read a set and copy its pictures. -> the records, and {reason: ids that were skipped}"""
    path = path.resolve()
    root = path.parent if path.is_file() else path
    records, skipped = {}, defaultdict(list)
    for file in list_files(name, path):
        (out / "images").mkdir(parents=True, exist_ok=True)
        for made in read_seeds(name, file):
            # First find out whether the record can be used.
            id = f"{name}/{made['id']}"
            if id in records:
                skipped["id appears twice"].append(id)
                continue
            if not made.get("question") and not made.get("turns"):
                skipped["empty instruction"].append(id)
                continue
            image = None
            if made["image"]:
                image = copy_picture(made["image"], file, root, out)
                if image is None:
                    skipped["picture not found or damaged"].append(id)
                    continue

            # Then give it its names. They begin with the name of the set, so that they are unique.
            # Without a goal it is the picture that says which records belong together.
            goal = made.pop("goal")
            if goal is None:
                goal = Path(image).stem if image else made["id"]
            records[id] = made
            made.update(id=id, seed_id=f"{name}/{goal}", image=image, source=name)
    return list(records.values()), skipped


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("set", choices=SETS, metavar="SET", help=", ".join(SETS))
    p.add_argument("path", type=Path, metavar="PATH", help="folder of the set, or one of its files")
    p.add_argument("--out", type=Path, required=True, help="folder to write to")
    args = p.parse_args(argv)
    try:
        records, skipped = prepare(args.set, args.path, args.out)
        with open(args.out / "seeds.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    except OSError as error:
        fail(f"{args.set}: {error}")

    # Say what was read and what was not.
    harmful = sum(record["kind"] == "harmful" for record in records)
    alone = sum(record["image"] is None for record in records)
    print(f"{args.out}/seeds.jsonl: {len(records)} records, {harmful} harmful, "
          f"{len(records) - harmful} benign, {alone} without a picture")
    for reason, ids in skipped.items():
        first = ids[0].encode("unicode_escape").decode()        # an id could steer the terminal
        print(f"skipped {len(ids)}: {reason} (the first is {first})")
    if not records:
        fail(f"{args.set}: no record could be used")


if __name__ == "__main__":
    main()
