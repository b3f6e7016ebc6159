"""
Measure a folder that synth.py wrote: do its splits leak into each other, and how alike is the text?

    python tests/audit.py data/synth        # exit code 1 if a seed or a picture is in two splits

text         the words of the user turns of a dialogue, for the first --limit dialogues of a split
Jaccard      trigrams in both texts / trigrams in either, of each text and the nearest one of the
             other split; 1 is the same words
distinct-n   different n-grams / all n-grams of the split (Li et al. 2016); higher is more varied
self-BLEU-4  mean BLEU-4, without brevity penalty, of each text against all others of its split
             (Zhu et al. 2018); lower is more varied
"""
import argparse
import hashlib
import itertools
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.dialogues import SPLITS, read_dialogues, text_of, user_turns


def spoken(dialogue):
    turns = [text_of(content) for content, _ in user_turns(dialogue)]
    return " ".join(turns).lower().split()


def ngrams(words, n):
    return [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]


def jaccard(a, b):
    a, b = set(ngrams(a, 3)), set(ngrams(b, 3))
    return len(a & b) / max(1, len(a | b))


def bleu(text, others):
    """The geometric mean, over n = 1..4, of the share of n-grams that another text has as well."""
    product = 1.0
    for n in range(1, 5):
        mine, most = Counter(ngrams(text, n)), Counter()
        for other in others:                # most: how often the text that has most of it has it
            most |= Counter(ngrams(other, n))
        product *= (mine & most).total() / max(1, mine.total())
    return product ** 0.25


def main():
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("folder", help="a folder with sft.jsonl, rl.jsonl and bench.jsonl")
    parser.add_argument("--limit", type=int, default=500, help="default 500; it compares all pairs")
    args = parser.parse_args()
    splits = {}
    for name in SPLITS:
        file = Path(args.folder, f"{name}.jsonl")
        if file.is_file() and file.stat().st_size:
            splits[name] = read_dialogues([file])
    if not splits:
        parser.error(f"{args.folder}: no dialogues")

    texts, seeds, pictures = {}, {}, {}
    for name, rows in splits.items():
        texts[name] = [spoken(d) for d in rows[:args.limit]]
        seeds[name] = {d["seed_id"] for d in rows}
        paths = sum([d["images"] for d in rows], [])
        pictures[name] = {hashlib.sha256(Path(path).read_bytes()).digest() for path in paths}

    leaks = 0
    for a, b in itertools.combinations(splits, 2):
        shared, both = seeds[a] & seeds[b], pictures[a] & pictures[b]
        leaks += len(shared) + len(both)
        print(f"{a} and {b}: {len(shared)} seeds and {len(both)} pictures in both")
        best = [max(jaccard(text, other) for other in texts[a]) for text in texts[b]]
        print(f"  nearest: Jaccard {sum(best) / len(best):.2f} on average, {max(best):.2f} at most")
    for name, rows in splits.items():
        for n in 1, 2, 3:
            grams = sum([ngrams(text, n) for text in texts[name]], [])
            print(f"{name}: distinct-{n} {len(set(grams)) / max(1, len(grams)):.3f}")
        scores = [bleu(text, texts[name][:i] + texts[name][i + 1:])
                  for i, text in enumerate(texts[name])]
        print(f"{name}: self-BLEU-4 {sum(scores) / len(scores):.3f}")
        print(f"{name}: strategies", dict(Counter(d["strategy"] for d in rows)))
        print(f"{name}: turns", sorted(Counter(len(user_turns(d)) for d in rows).items()))
    sys.exit(int(leaks > 0))


if __name__ == "__main__":
    main()
