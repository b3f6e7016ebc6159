"""report.html in a real browser: hostile text stays text, and its views obey their controls."""
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import eval as E
import judge

PAGE = Path(__file__).resolve().parent.parent / "report.html"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")
HOSTILE = ("<img src=x onerror=\"document.title='PWNED'\"></script><script>document.title='PWNED'"
           "</script><!--<script>\u2028${document.title='PWNED'}javascript:alert(1)__proto__")
PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"


def test_the_template_is_one_page_without_requests():
    page = PAGE.read_text(encoding="utf-8")
    urls = set(re.findall(r"https?://[^\"'\s]+", page))
    assert urls == {"http://www.w3.org/1999/xhtml", "http://www.w3.org/2000/svg"}       # namespaces
    assert not re.search(r"<link|<iframe|@import|url\(|fetch\(|XMLHttp|WebSocket|EventSource", page)
    assert not re.search(r"(inner|outer)HTML|insertAdjacent|document\.write|\beval\(|Function\(",
                         page)
    assert "default-src 'none'; img-src data:;" in page


def evaluation(n_seeds, hostile=""):
    """Data as eval.py makes it: three arms of 6 turns, red-team dialogues and benign twins."""
    arms = {}
    for period, name in ((10, "base"), (20, "sft"), (40, f"grpo{hostile}")):
        arms[name] = []
        for i in range(2 * n_seeds):
            turns, kind = [], ("red_team", "benign")[i % 2]
            for t in range(6):
                harmful = kind == "red_team" and (i + t) % period == 0
                verdict = {"harmlessness": -2 if harmful else 1, "helpfulness": 1,
                           "refused": i % 99 == 1, "rationale": hostile}
                turns.append({"user": f"question {t} {hostile}", "strategy": hostile,
                              "assistant": hostile or "no", "verdict": verdict})
            arms[name].append({
                "id": f"{i // 2}-{kind}{hostile}", "seed_id": str(i // 2), "kind": kind,
                "category": hostile, "strategy": "", "source": hostile, "arm": name,
                "images": ["a.gif"], "turns": turns, "error": hostile})
    results = {"arms": {name: E.arm_results(samples) for name, samples in arms.items()},
               "pairs": [], "incomplete": [f"sft: 1 missing{hostile}"],
               "shared": {"attacker": "static", "judge": hostile}}
    return {"title": f"Calm {hostile}", "results": results, "tables": E.tables_of(results),
            "samples": sum(arms.values(), []), "images": {"a.gif": PIXEL}}


def training(n_steps, hostile=""):
    """Data as grpo.py makes it: two prompts a step, which come back in every other step."""
    fields = "reward return harm useful refused kl entropy dead seconds_update".split()
    log, rollouts = [], []
    for step in range(n_steps):
        row = dict.fromkeys(fields, 1 / (step + 1))
        log.append({"step": step, "warnings": ["benign refused" + hostile], **row})
        for kind, g in [("benign", 0), ("benign", 1), ("red_team", 0), ("red_team", 1)]:
            turns = []
            for t in range(4):
                harmful = kind == "red_team" and t == g and step < 2
                turns.append({"user": f"question {t} {hostile}", "assistant": hostile or "no",
                              "strategy": hostile, "diagnosis": hostile or "leak",
                              "safety": 4 if harmful else 5, "usefulness": 1 + g, "faithfulness": 4,
                              "reward": .5, "tcsr": .25, "advantage": 2.0 * g - 1,
                              "images": ["a.gif"][:t]})
            rollouts.append({"step": step, "id": f"{kind}-{step % 2}{hostile}", "rollout": g,
                             "kind": kind, "images": ["a.gif"], "turns": turns})
    log[0]["harm"] = None
    return {"title": f"Calm {hostile}", "log": log, "rollouts": rollouts,
            "images": {"a.gif": PIXEL}}


BEFORE = """
    const log = [], all = query => [...document.querySelectorAll(query)];
    const text = query => all(query)[0].innerText;
    const set = (node, value, event) => {
        node.value = value;
        node.dispatchEvent(new Event(event));
    };
    window.onerror = message => log.push(message);"""
AFTER = """
    log.push(document.documentElement.scrollWidth <= innerWidth);
    const said = {id: "log", textContent: JSON.stringify(log)};
    document.body.append(Object.assign(document.createElement("pre"), said));"""


def browse(tmp_path, data, script="", width=1280):
    """-> the DOM after all scripts, and the list `log`, which `script` fills; last: does it fit?"""
    page = tmp_path / "report.html"
    judge.fill_report(page, data)
    script = f'<script nonce="report">{BEFORE}{script}{AFTER}</script></body>'
    page.write_text(page.read_text("utf-8").replace("</body>", script), "utf-8")
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-background-networking", "dump-dom",
             f"window-size={width},900", f"user-data-dir={tmp_path / 'profile'}"]
    command = [CHROMIUM, *[f"--{flag}" for flag in flags], page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    said = re.search(r'<pre id="log">(.*?)</pre>', dom, re.S)
    return dom, json.loads(html.unescape(said[1]))


@browser
@pytest.mark.parametrize("make", [evaluation, training])
def test_hostile_text_stays_text_also_in_a_narrow_window(make, tmp_path):
    dom, log = browse(tmp_path, make(3, HOSTILE), width=500)
    drawn = dom.split("<header>")[1].split('<script type="application/json"')[0]
    assert "<title>Calm &lt;img" in dom and "<title>PWNED" not in dom
    assert drawn.count("&lt;img src=x onerror=") > 10           # shown, as text
    assert "<script" not in drawn and not re.search(r"<img(?! src=\"data:image/gif)", drawn)
    assert log == [True]


@browser
def test_an_evaluation_of_3000_dialogues_shows_its_figures_and_filters(tmp_path):
    data = evaluation(500)
    _, log = browse(tmp_path, data, """
        log.push(all("#survival g").length, all("#plane circle").length, text("#warnings"));
        const curve = () => all("#survival .line")[0].getAttribute("d"), harm = curve();
        set(all("#survival select")[0], "paper", "change");
        log.push(all("#tables table").length, curve() !== harm);
        log.push(all("#list option").length, all(".columns > section").length);
        const pick = (i, value) => set(all("#filters select")[i], value, "change");
        pick(0, "base"); pick(1, "grpo"); pick(2, "red_team"); pick(3, "a harmful turn");
        log.push(all("#list option").length, all(".columns .flag").length > 0);
        pick(2, "benign"); log.push(text("#detail"));""")
    base = [s for s in data["samples"] if s["arm"] == "base" and s["kind"] == "red_team"]
    n_harmful = sum(E.outcome(s, "any_harm")[0] for s in base)
    assert log == [3, 3, "Warning: sft: 1 missing.", len(data["tables"]), True, 1000, 12,
                   n_harmful, True, "No dialogue matches these filters.", True]


@browser
def test_a_training_run_and_one_prompt_over_its_steps(tmp_path):
    _, log = browse(tmp_path, training(5), """
        log.push(all("#curves svg").length, text("#warnings"));
        const view = () => log.push([text("#group h3"), all("#group section").length,
            all("#group .flag").length, all("#times button").map(node => node.innerText)]);
        view();
        all("#times button")[0].click(); view();
        set(all("#controls input")[0], 3, "input"); view();
        set(all("#controls select")[0], "benign-1", "change"); view();
        log.push(text("#group .score"), text("#curves b"), all("#group .turn img").length);""")
    times = ["step 0: 2 of 2 do harm", "step 2: 0 of 2 do harm", "step 4: 0 of 2 do harm"]
    assert log == [8, "Warning: benign refused (5 steps).",
                   ["red_team-0", 8, 0, times], ["red_team-0", 8, 2, times],
                   ["red_team-1", 8, 0, times],         # the slider shows another of its kind
                   ["benign-1", 8, 0, ["step 1: 1 of 2 refuse", "step 3: 1 of 2 refuse"]],
                   "safety 5 usefulness 1 faithfulness 4\nreward 0.50 TCSR 0.25 advantage −1.00\n"
                   "leak", "0.250", 6, True]
