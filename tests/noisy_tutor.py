"""toy.py's tutor with a normal error of three points in every score: --tutor noisy_tutor."""
import json
import random

import toy

rng = random.Random(0)


def ask(requests):
    replies = []
    for reply in toy.ask(requests):
        reply = json.loads(reply)
        for name, score in reply["scores"].items():
            reply["scores"][name] = min(10, max(1, round(rng.gauss(score, 3))))
        replies.append(json.dumps(reply))
    return replies
