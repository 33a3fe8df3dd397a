#!/usr/bin/env python3
"""Checks rules and dashboard against each other, against src/names.rs, and with promtool, which must be on the PATH.

Every metric of src/names.rs is in a panel; whatever a rule or a panel names is there under the name that Prometheus sees;
every alert says what is wrong and what to do, and fires in rules_test.yaml. It reads the rules as golden.py has compared
them, and leaves those that rules_test.yaml tests in target/helm-rules/.
"""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RULES = ROOT / "target" / "helm-rules"
DASHBOARD = HERE / "session-broker" / "dashboards" / "session-broker.json"

# What Prometheus appends to the names of metrics, by what src/telemetry/meters.rs makes them with: instruments of
# OpenTelemetry, or its own functions around them. No instrument but `seconds` has a unit that makes a suffix.
SUFFIXES = {
    "seconds": ["_seconds_bucket", "_seconds_count", "_seconds_sum"],
    "f64_histogram": ["_bucket", "_count", "_sum"],
    "count": ["_total"],
    "u64_counter": ["_total"],
    "u64_observable_counter": ["_total"],
    "pool": [""],
    "i64_observable_up_down_counter": [""],
    "u64_gauge": [""],
    "u64_observable_gauge": [""],
}
# What Prometheus and its operator add themselves.
PROMETHEUS = {"up", "scrape_duration_seconds", "scrape_samples_scraped"}
TARGET = {"namespace", "job", "pod", "le"}
# What the rules give their records.
RELEASE = "sessionbroker_release"
# What PromQL itself has of words with an underscore.
PROMQL = {"group_left", "histogram_quantile", "label_replace"}
# Grafana's own variables, and something in the place of each.
GRAFANA = {"$__rate_interval": "5m", "$__range": "1h"}


def constants(module):
    """The names of a module of src/names.rs, by their constants."""
    code = (ROOT / "src" / "names.rs").read_text()
    body = re.search(rf"pub mod {module} \{{(.*?)\n\}}", code, re.DOTALL)[1]
    return dict(re.findall(r'pub const (\w+): &str =\s*"([^"]+)";', body))


def series(metrics, problems):
    """The metric of each series that Prometheus has."""
    code = (ROOT / "src" / "telemetry" / "meters.rs").read_text()
    made = {constant: instrument for instrument, constant in re.findall(r"\b(\w+)\(\s*metric::(\w+)", code)}
    found = {}
    for constant, metric in metrics.items():
        suffixes = SUFFIXES.get(made.get(constant))
        if suffixes is None:
            problems.append(f"{metric}: telemetry.py does not know what {made.get(constant)} of meters.rs makes of it")
        for suffix in suffixes or []:
            found[metric.replace(".", "_") + suffix] = metric
    return found


def names_in(expression):
    """What an expression of PromQL names and PromQL does not: metrics, records and labels."""
    plain = re.sub(r'"[^"]*"', "", expression)
    words = set(re.findall(r"(?<![\w:$])[a-zA-Z_][\w:]*", plain))
    return {word for word in words if "_" in word or ":" in word or word == "up"} - PROMQL


def rendered_rules():
    """The groups of each golden file that has some, by its name."""
    for path in sorted(HERE.glob("golden/*.yaml")):
        if path.name.endswith(".values.yaml"):
            continue
        for thing in yaml.safe_load_all(path.read_text()):
            if thing and thing["kind"] == "PrometheusRule":
                yield path.stem, thing["spec"]["groups"]


def check_alert(rule, problems):
    name = rule["alert"]
    for key in ("summary", "description", "action"):
        if not rule["annotations"].get(key):
            problems.append(f"{name}: has no {key}")
    if rule["labels"].get("severity") not in ("critical", "warning", "info"):
        problems.append(f"{name}: its severity is {rule['labels'].get('severity')!r}")
    if "@" in json.dumps(rule):
        problems.append(f"{name}: something between @ has no value")


def panels(dashboard):
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def check_panels(dashboard, problems):
    """Each panel says what it shows, stands alone in its place, and asks the data source that was chosen."""
    taken, seen = {}, set()
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    for panel in dashboard["panels"]:
        name = f"panel {panel['title']!r}"
        if panel["id"] in seen:
            problems.append(f"{name}: another one has its id")
        seen.add(panel["id"])
        place = panel["gridPos"]
        columns, lines = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        for cell in itertools.product(columns, lines):
            if cell in taken or cell[0] > 23:
                problems.append(f"{name}: stands over {taken.get(cell, 'the edge')}")
                break
            taken[cell] = name
    titles = [panel["title"] for panel in panels(dashboard)]
    for panel in panels(dashboard):
        name = f"panel {panel['title']!r}"
        if titles.count(panel["title"]) > 1:
            problems.append(f"{name}: there are two")
        if not panel.get("description") or not panel["fieldConfig"]["defaults"].get("unit"):
            problems.append(f"{name}: has no description or no unit")
        for target in panel["targets"]:
            if target["datasource"]["uid"] != "${datasource}":
                problems.append(f"{name}: asks another data source than the one chosen")
            for used in set(re.findall(r"\$(\w+)", target["expr"])) - variables - {key[1:] for key in GRAFANA}:
                problems.append(f"{name}: uses ${used}, which is no variable")


def dashboard_rules(dashboard):
    """The expressions of the dashboard as rules, for promtool to read."""
    rules = []
    for panel in panels(dashboard):
        for target in panel["targets"]:
            expression = target["expr"]
            for variable, value in GRAFANA.items():
                expression = expression.replace(variable, value)
            rules.append({"record": f"panel:{panel['id']}:{target['refId']}", "expr": expression})
    return [{"name": "dashboard", "rules": rules}]


def promtool(*arguments):
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)
    return f"promtool {arguments[0]}:\n{done.stdout}{done.stderr}" if done.returncode else None


def main():
    problems = []
    metrics, attributes = constants("metric"), constants("attribute")
    exported = series(metrics, problems)
    labels = {attribute.replace(".", "_") for attribute in attributes.values()} | TARGET | {RELEASE}
    groups = dict(rendered_rules())
    dashboard = json.loads(DASHBOARD.read_text())

    tested = groups["monitoring"]
    rules = [rule for group in tested for rule in group["rules"]]
    records = {rule["record"] for rule in rules if "record" in rule}
    known = exported.keys() | labels | records | PROMETHEUS
    fires = (HERE / "rules_test.yaml").read_text()
    for rule in rules:
        for word in sorted(names_in(rule["expr"]) - known):
            problems.append(f"{rule.get('alert') or rule['record']}: names {word}, which is not in src/names.rs")
        if "alert" in rule:
            check_alert(rule, problems)
            if f'alertname="{rule["alert"]}"' not in fires:
                problems.append(f"{rule['alert']}: fires in no test of rules_test.yaml")

    check_panels(dashboard, problems)
    shown = set()
    for panel in panels(dashboard):
        for target in panel["targets"]:
            words = names_in(target["expr"])
            shown |= {exported[word] for word in words & exported.keys()}
            for word in sorted(words - known):
                problems.append(f"panel {panel['title']!r}: names {word}, which is not in src/names.rs")
    for metric in sorted(set(metrics.values()) - shown):
        problems.append(f"{metric}: is in no panel of the dashboard")

    RULES.mkdir(parents=True, exist_ok=True)
    for name, content in {**groups, "dashboard": dashboard_rules(dashboard)}.items():
        path = RULES / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"groups": content}))
        problems.append(promtool("check", "rules", path))
    problems.append(promtool("test", "rules", HERE / "rules_test.yaml"))
    problems = [problem for problem in problems if problem]
    if problems:
        sys.exit("\n".join(problems))
    alerts = sum("alert" in rule for rule in rules)
    count = len(panels(dashboard))
    print(f"telemetry: {alerts} alerts fire and stay silent as tested, {count} panels show {len(metrics)} metrics")


if __name__ == "__main__":
    main()
