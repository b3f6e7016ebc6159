"""toy.py's tutor, which leaves every next turn to the script: --tutor scripted_tutor."""
import json

import toy


def ask(requests):
    replies = []
    for reply in toy.ask(requests):
        if reply is not None:
            reply = json.dumps({**json.loads(reply), "next_turn": ""})
        replies.append(reply)
    return replies
