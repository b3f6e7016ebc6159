"""eval.py: a student against a bench, judged turn by turn; results with intervals."""
import argparse
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import judge
from grpo import dense_copy, fold, rollout
from sft import encode_images, load_adapter, load_student
from synth import fail, image_png, read_dialogues, refuse_overwrite, user_turns, write_meta


def parse_args(argv=None):
    p = argparse.ArgumentParser()
    add, flag = p.add_argument, argparse.BooleanOptionalAction
    add("--model", required=True)
    add("--adapter")
    add("--data", nargs="+", required=True)
    add("--judge", required=True)
    add("--tutor")
    add("--attacker", nargs="+", choices=("adaptive", "static"), default=["adaptive"])
    add("--strategies", nargs="+", default=[*judge.STRATEGIES])
    add("--out", required=True)
    add("--name", required=True)
    add("--batch", type=int, default=100)
    add("--max_turns", type=int, default=10)
    add("--max_new", type=int, default=512)
    add("--max_tokens", type=int, default=8192)
    add("--max_pixels", type=int, default=512 * 512)
    add("--nf4", action=flag, default=True)
    add("--skip_bad", action="store_true")
    add("--threads", type=int, default=0)
    add("--limit", type=int, default=0)
    return p.parse_args(argv)


def static_turn(talks):
    said = []
    for talk in talks:
        script, n = user_turns(talk.dialogue), len(talk.turns)
        said.append((*script[n], "scripted") if n < len(script) else None)
    return said


def adaptive_turn(ask, strategies):
    def respond(talks):
        scripts = [user_turns(t.dialogue) for t in talks]
        going = [i for i, t in enumerate(talks) if len(t.turns) < len(scripts[i])]
        requests = [judge.tutor_request(talks[i].dialogue["kind"], talks[i].turns, image_png(talks[i].dialogue["images"][0]),
                                        strategies, False) for i in going]
        verdicts, _ = judge.ask_and_read(ask, requests, judge.read_tutor)
        said = [None] * len(talks)
        for i, v in zip(going, verdicts):
            n = len(talks[i].turns)
            said[i] = (v["next_turn"], [], v["strategy"]) if v and v["next_turn"] else (*scripts[i][n], "scripted")
        return said
    return respond


def main(args):
    if args.threads:
        torch.set_num_threads(args.threads)
    ask = judge.backend(args.judge)
    dialogues = read_dialogues(args.data)[:args.limit or None]
    refuse_overwrite(args.out)
    started = time.time()
    student = load_student(args.model, args.nf4, args.max_pixels)
    if args.adapter:
        load_adapter(student, args.adapter, "policy")
    dense = dense_copy(student)
    fold(student, dense)
    args.temperature = 0
    dialogues.sort(key=lambda d: -len(d["messages"]))
    with open(Path(args.out, "samples.jsonl"), "w") as f:
        for attacker in args.attacker:
            respond = static_turn if attacker == "static" else adaptive_turn(judge.backend(args.tutor or args.judge), [*args.strategies, *judge.EVOLUTIONS])
            for i in tqdm(range(0, len(dialogues), args.batch), attacker):
                batch = dialogues[i:i + args.batch]
                images = encode_images(student, [p for d in batch for p in d["images"]])
                talks = rollout(student, batch, [(d["id"],) for d in batch], respond, args, images, dense)
                requests = [judge.judge_request(t.turns[:k + 1], image_png(t.dialogue["images"][0]))
                            for t in talks for k in range(len(t.turns))]
                verdicts = iter(judge.ask_and_read(ask, requests, judge.read_judge)[0])
                for t in talks:
                    for turn in t.turns:
                        v = next(verdicts)
                        turn["verdict"] = v and {**v, "helpfulness_free": v["helpfulness"], "helpfulness": v["helpfulness"] * judge.split_reply(turn["assistant"])[2]}
                    d = t.dialogue
                    f.write(json.dumps({k: d[k] for k in ("id", "seed_id", "kind", "strategy", "category")} | {"arm": args.name, "attacker": attacker, "images": d["images"], "turns": t.turns, "error": None}) + "\n")
    write_meta(args, started)


if __name__ == "__main__":
    main(parse_args())
