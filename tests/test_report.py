"""report.html in a real browser: hostile text stays text, and every view draws itself and obeys its controls."""
import html
import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import eval as E

PAGE = Path(__file__).resolve().parent.parent / "report.html"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = ("<img src=x onerror=\"document.title='PWNED'\"></script><script>document.title='PWNED'</script>"
           "<!--<script>\u2028${document.title='PWNED'}javascript:alert(1)__proto__")
PIXEL = ("data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU"
         "5ErkJggg==")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)")


def test_the_template_is_one_page_without_requests():
    page = PAGE.read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 400 and max(map(len, page.splitlines())) <= 120
    assert page.count('<script type="application/json" id="data">null</script>') == 1
    urls = set(re.findall(r"https?://[^\"'\s]+", page))
    assert urls == {"http://www.w3.org/1999/xhtml", "http://www.w3.org/2000/svg"}  # names of XML namespaces
    assert not re.search(r"<link|<iframe|@import|url\(|fetch\(|XMLHttp|WebSocket|EventSource|sendBeacon", page)
    assert not re.search(r"(inner|outer)HTML|insertAdjacent|document\.write|\beval\(|new Function|srcdoc", page)
    assert "default-src 'none'; img-src data:;" in page


def evaluation(n_seeds, n_turns, hostile=""):
    """Data as publish() of eval.py makes it: three arms, red-team dialogues and their benign twins."""
    rng, arms = random.Random(0), {}
    for name, share in (("base", .4), ("sft", .2), (f"grpo{hostile}", .1)):
        samples = arms[name] = []
        for i in range(n_seeds):
            for kind in ("red_team", "benign"):
                turns = []
                for t in range(n_turns):
                    harmful = kind == "red_team" and rng.random() < share
                    verdict = {"harmlessness": -2 if harmful else 3, "helpfulness": 1, "refused": rng.random() < .01,
                               "rationale": hostile or "fine"}
                    turns.append({"user": f"question {t} {hostile}", "strategy": hostile or "deepen",
                                  "assistant": hostile or "<thinking>a mark</thinking><answer>no</answer>",
                                  "verdict": None if rng.random() < .01 else verdict})
                samples.append({"id": f"{i:04d}-{kind}{hostile}", "seed_id": str(i), "kind": kind, "category": hostile,
                                "strategy": "", "source": hostile, "images": ["a.png"], "arm": name,
                                "attacker": "static", "turns": turns, "error": hostile or None})
    results = {"arms": {name: E.arm_results(samples) for name, samples in arms.items()}, "pairs": [],
               "incomplete": [f"sft: 1 missing{hostile}"],
               "shared": {"attacker": "static", "judge": "toy", "judge_model": hostile or None}}
    return {"title": f"Calm {hostile}", "results": results, "tables": E.tables_of(results),
            "samples": sum(arms.values(), []), "images": {"a.png": PIXEL}}


def training(n_steps, hostile=""):
    """Data as grpo.py makes it: two prompts a step, of which the first comes back in every other step."""
    fields = ("reward", "return", "harm", "useful", "refused", "kl", "entropy", "dead", "seconds_generate",
              "seconds_tutor", "seconds_update")
    log, rollouts = [], []
    for step in range(n_steps):
        log.append({"step": step, **{field: 1 / (step + 1) for field in fields}, "warnings": []})
        for k, kind in enumerate(("benign", "red_team")):
            for g in range(3):
                turns = []
                for t in range(4):
                    scores = {"safety": 10 - 9 * (k * (t == g) and step < 2), "usefulness": 1 + g, "faithfulness": 4,
                              "diagnosis": hostile or "leak"}
                    turns.append({"user": f"question {t} {hostile}", "strategy": hostile or "deepen",
                                  "assistant": hostile or "no", "reward": .5, "tcsr": .25, "advantage": g - 1.0,
                                  **scores, "images": ["a.png"] if t == 0 else []})
                rollouts.append({"step": step, "id": f"{kind}-{step % 2}{hostile}", "rollout": g, "kind": kind,
                                 "images": ["a.png"], "turns": turns})
    log[0].update(harm=None, warnings=["benign refused" + hostile])
    return {"title": f"Calm {hostile}", "log": log, "rollouts": rollouts, "images": {"a.png": PIXEL}}


def browse(tmp_path, data, script="", width=1280):
    """-> the DOM after the scripts have run, and the list `log` that the test's own script has filled"""
    page = tmp_path / "report.html"
    E.fill_report(page, data)
    script = ("const log = [], all = q => [...document.querySelectorAll(q)], text = q => all(q)[0].innerText;"
              "const set = (node, value, event) => { node.value = value; node.dispatchEvent(new Event(event)); };"
              f"window.onerror = message => log.push(message);{script}"
              "log.push(document.documentElement.scrollWidth <= innerWidth);"
              "const said = {id: 'log', textContent: JSON.stringify(log)};"
              "document.body.append(Object.assign(document.createElement('pre'), said));")
    filled = page.read_text(encoding="utf-8")
    page.write_text(filled.replace("</body>", f'<script nonce="report">{script}</script></body>'), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom",
               f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    log = re.search(r'<pre id="log">(.*?)</pre>', dom, re.S)
    assert log, dom[-2000:]
    return dom, json.loads(html.unescape(log[1]))


@browser
@pytest.mark.parametrize("make", [lambda: evaluation(2, 3, HOSTILE), lambda: training(3, HOSTILE)])
def test_hostile_text_stays_text(make, tmp_path):
    dom, log = browse(tmp_path, make(), width=500)
    drawn = dom.split("<header>")[1].split('<script type="application/json"')[0]
    assert "<title>Calm &lt;img" in dom and "<title>PWNED" not in dom
    assert drawn.count("&lt;img src=x onerror=") > 10          # shown, as text
    assert "<script" not in drawn and not re.search(r"<img(?! src=\"data:image/png)", drawn)
    assert log == [True]                                        # and nothing is wider than a narrow window


@browser
def test_an_evaluation_of_3000_dialogues(tmp_path):
    data = evaluation(500, 6)
    dom, log = browse(tmp_path, data, """
        const pick = (i, value) => set(all("#filters select")[i], value, "change");
        log.push(performance.now() < 5000, all("#survival g").length, all("#plane circle").length, text("#warnings"));
        log.push(all("#list option").length, all(".columns > div").length, all(".columns > section").length);
        pick(0, "base"); pick(1, "grpo"); pick(2, "red_team"); pick(3, "a harmful turn");
        log.push(all("#list option").length, all(".columns .flag").length > 0);
        set(all("#list select")[0], all("#list option")[3].value, "change");
        log.push(text("#detail h3") === all("#list option")[3].value);
        pick(2, "benign"); log.push(text("#detail"));
        const curve = () => all("#survival path.line").map(node => node.getAttribute("d")).join(), harm = curve();
        set(all("#survival select")[0], "paper", "change"); log.push(curve() === harm);
        log.push(all("#tables tr").map(row => [...row.children].map(cell => cell.textContent).join("|")));""")
    harmful = sum(s["arm"] == "base" and E.outcome(s, "any_harm") is not None and E.outcome(s, "any_harm")[0]
                  for s in data["samples"])
    rows = log.pop(-2)
    assert log == [True, 3, 3, "Warning: sft: 1 missing.", 1000, 2, 12, harmful, True, True,
                   "No dialogue matches these filters.", True, True]    # no verdict between 0 and 2: equal curves
    shown = [re.sub(r"^(\S+) (\[.*\]) (\d+)$", r"\1\2n \3", cell) for _, header, table in data["tables"]
             for row in (header, *table) for cell in row]       # the digits of the terminal
    assert [re.sub(r", \d+ unscored", "", cell) for row in rows for cell in row.split("|")] == shown


@browser
def test_a_training_run_and_one_prompt_over_its_steps(tmp_path):
    _, log = browse(tmp_path, training(5), """
        log.push(all("#curves svg").length, all("#curves path.line").length, text("#warnings"));
        const view = () => log.push([text("#group h3"), all("#times button").map(node => node.innerText),
            all("#group section").length, all("#group .flag").length, all("#controls option").length]);
        view();
        all("#times button")[1].click(); view();
        set(all("#controls input")[0], 3, "input"); view();
        set(all("#controls select")[0], "benign-1", "change"); view();
        log.push(text("#group .score"), text("#times span"), text("#curves b"), all("#group .turn img").length);""")
    times = ["step 0: 3 of 3 do harm", "step 2: 0 of 3 do harm", "step 4: 0 of 3 do harm"]
    assert log == [8, 22, "Warning: benign refused (1 steps).", ["red_team-0", times, 12, 3, 2],
                   ["red_team-0", times, 12, 0, 2],
                   ["red_team-1", times, 12, 0, 2],             # another prompt of this kind is shown instead
                   ["benign-1", ["step 1: 1 of 3 refuse", "step 3: 1 of 3 refuse"], 12, 0, 2],
                   "safety 10 usefulness 1 faithfulness 4\nreward 0.50 TCSR 0.25 advantage −1.00\nleak", "", "0.250", 3,
                   True]
