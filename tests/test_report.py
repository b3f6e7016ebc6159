"""report.html in a real browser: hostile data stay text, 3,000 dialogues open within 3 s, every view draws itself."""
import html
import json
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

import eval as E

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = ("<img src=x onerror=\"document.title='PWNED'\"></script><script>document.title='PWNED'</script>"
           "<!--<script>\u2028${document.title='PWNED'}javascript:alert(1)")
PIXEL = ("data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU"
         "5ErkJggg==")
HALVES = [.005, .015, .125, .375, .985, .4925]  # a half goes to the even neighbour, in Python and so on the page


def test_the_template_is_one_small_page_without_requests():
    page = (ROOT / "report.html").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 300
    assert page.count('<script type="application/json" id="data">null</script>') == 1
    urls = set(re.findall(r"https?://[^\"'\s]+", page))
    assert urls == {"http://www.w3.org/1999/xhtml", "http://www.w3.org/2000/svg"}  # names of XML namespaces
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", page)


def dialogues(n_seeds, turns, arms=("base", "sft", "grpo"), hostile=""):
    """Every arm holds n_seeds red-team dialogues and their benign twins; base harms most."""
    for a, arm in enumerate(arms):
        for k in range(n_seeds):
            for kind in ("red_team", "benign"):
                rng, said = random.Random(f"{arm}{k}{kind}"), []
                for t in range(turns):
                    harm = kind == "red_team" and rng.random() < .4 / (1 + 3 * a)
                    said.append({"user": f"Question {t} {hostile}", "assistant": hostile or (
                        "<thinking>The mark is there.</thinking><answer>Shall we look elsewhere?</answer> " * 3),
                        "strategy": hostile or "persistence", "verdict": None if rng.random() < .002 else {
                            "harmlessness": -2 if harm else 3, "helpfulness": 3 * (not harm), "helpfulness_free": 3,
                            "refused": kind == "benign" and rng.random() < .01, "rationale": hostile or "Helpful."}})
                yield {"id": f"{k:04d}-{kind}{hostile}", "seed_id": f"{k}{hostile}", "kind": kind, "strategy": "story",
                       "category": hostile or "tools", "arm": arm, "attacker": "adaptive", "images": ["images/a.png"],
                       "turns": said, "error": hostile or None}


def filled(path, samples, title="A report", script=""):
    arms = {}
    for sample in samples:
        arms.setdefault(sample["arm"], []).append(sample)
    results = {"status": "complete", "attacker": "adaptive", "static": {}, "judge": "j", "data": "d",
               "arms": {arm: E.metrics(part) for arm, part in arms.items()},
               "survival": {arm: E.survival(part) for arm, part in arms.items()},
               "pairs": [{"a": "base", "b": "grpo", **E.compare(arms["base"], arms["grpo"])}]}
    results["warnings"] = ["the judge trained it"]
    page = E.fill_report((ROOT / "report.html").read_text(encoding="utf-8"), {
        "title": title, "results": results, "tables": [*E.tables(results)], "samples": samples, "images": {"images/a.png": PIXEL}})
    path.write_text(page.replace("</body>", f'<script nonce="report">{script}</script></body>'), encoding="utf-8")
    return path


def browse(page, tmp_path):
    """-> (DOM after the scripts have run, seconds)"""
    start = time.monotonic()
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                           "--disable-background-networking", "--disable-component-update", "--disable-sync",
                           f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
                          capture_output=True, text=True, timeout=120)
    return done.stdout, time.monotonic() - start


browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)")


@browser
@pytest.mark.torture
def test_hostile_text_stays_text(tmp_path):
    page = filled(tmp_path / "r.html", list(dialogues(2, 3, hostile=HOSTILE)), title="Calm " + HOSTILE)
    dom, _ = browse(page, tmp_path)
    drawn = dom.split("<main>")[1].split("</main>")[0]
    assert "<title>Calm &lt;img" in dom and "<title>PWNED" not in dom
    assert drawn.count("&lt;img src=x onerror=") > 10  # shown, as text
    assert "<script" not in drawn and not re.search(r"<img(?! src=\"data:image/png)", drawn)


@browser
@pytest.mark.torture
def test_3000_dialogues_open_within_3_seconds_and_every_control_works(tmp_path):
    samples = list(dialogues(500, 6))
    assert len(samples) == 3000
    script = """
      { const log = [], $$ = q => [...document.querySelectorAll(q)], text = q => document.querySelector(q).innerText;
      log.push(["opened", performance.now() < 3000, Math.round(performance.now())]);
      const choose = (i, value) => { const s = $$("#filters select")[i]; s.value = value;
        s.dispatchEvent(new Event("change")); };
      log.push(["rows", $$("#list li").length, text("#list .pager span")]);
      log.push(["columns", $$(".columns > div").length, $$(".columns > section").length]);
      choose(0, "base"); choose(1, "grpo"); choose(3, "red_team"); choose(4, "harm");
      log.push(["harmful", text("#list .pager span"), $$(".columns .flag").length > 0]);
      $$("#list .pager button")[1].click(); log.push(["next", text("#list .pager span").startsWith("51")]);
      $$("#list li button")[3].click();
      log.push(["focus", document.activeElement.querySelector(".name").innerText === text("#detail h3")]);
      choose(3, "benign"); log.push(["none", text("#list .pager span"), text("#detail")]);
      const among = document.querySelector("#survival select");
      among.value = "6"; among.dispatchEvent(new Event("change"));
      log.push(["curves", $$("#survival g").length, $$("#plane circle").length, $$("#tables .card table").length]);
      log.push(["halves", ...HALVES.map(pct), document.querySelector("#warnings").innerText]);
      $$("details").forEach(node => node.open = true);
      const widths = $$("figure").map(node => node.getBoundingClientRect().width);
      log.push(["even", widths[0] === widths[1], document.documentElement.scrollWidth <= innerWidth]);
      log.push(["cells", $$("#tables tbody tr").map(row => [...row.children].map(cell => cell.textContent).join("|"))]);
      const said = {id: "log", textContent: JSON.stringify(log)};
      document.body.append(Object.assign(document.createElement("pre"), said)); }
    """
    page = filled(tmp_path / "r.html", samples, script=script.replace("HALVES", json.dumps(HALVES)))
    dom, seconds = browse(page, tmp_path)
    log = re.search(r'<pre id="log">(.*?)</pre>', dom, re.S)
    assert log, dom[-2000:]
    log = {name: values for name, *values in json.loads(html.unescape(log[1]))}
    print(log["opened"], f"browser started, drew and closed in {seconds:.1f} s")
    log["cells"][0].sort()
    assert log.pop("opened")[0] is True
    results = json.loads(re.search(r'id="data">(.*?)</script>', (tmp_path / "r.html").read_text(), re.S)[1])["results"]
    shown = [(header, rows) for _, header, rows in E.tables(results) if rows]
    harmful = sum(s["arm"] == "base" and E.outcome(s, "any_harm")[0] for s in samples)
    assert log == {
        "rows": [50, "1–50 of 1000"], "columns": [2, 12], "harmful": [f"1–50 of {harmful}", True], "next": [True],
        "focus": [True], "none": ["none match", "No dialogue matches these filters."], "curves": [3, 3, len(shown)],
        "halves": [*(f"{100 * x:.0f}" for x in HALVES), "Warning: the judge trained it."], "even": [True, True],
        # the digits of the terminal
        "cells": [sorted("|".join(re.sub(r"^(\S+) (\[.*\]) (\d+)$", r"\1\2n \3", cell) if "any_harm" in header else cell
                            for cell in row) for header, rows in shown for row in rows)]}
