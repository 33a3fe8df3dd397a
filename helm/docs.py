#!/usr/bin/env python3
"""Writes the tables of the chart's README.md: of alerts, of panels, and of values from the comments in values.yaml; --check
only compares.

A comment stands above its key. A line that begins with ## begins a table. Every key has a comment, or stands in a value
that is shown whole.
"""

import json
import sys
from pathlib import Path

import yaml

CHART = Path(__file__).resolve().parent / "session-broker"


def comment_above(lines, line):
    """The comment that ends above `line`, as one text."""
    found = []
    while line > 0 and (text := lines[line - 1].strip()).startswith("# "):
        found.insert(0, text[2:])
        line -= 1
    return " ".join(found)


def rows(lines, node, values, prefix=""):
    """A row for each key: its line, name, default and comment. One whose keys have comments of their own has no default."""
    for key, value in node.value:
        name = prefix + key.value
        comment = comment_above(lines, key.start_mark.line)
        if not comment:
            sys.exit(f"values.yaml: {name} has no comment")
        inner = isinstance(value, yaml.MappingNode) and value.value
        explains = inner and comment_above(lines, value.value[0][0].start_mark.line)
        default = None if explains else json.dumps(values[key.value])
        yield key.start_mark.line, name, default, comment
        if explains:
            yield from rows(lines, value, values[key.value], f"{name}.")


def values():
    text = (CHART / "values.yaml").read_text()
    lines = text.splitlines()
    titles = [(number, line[3:]) for number, line in enumerate(lines) if line.startswith("## ")]
    table = list(rows(lines, yaml.compose(text), yaml.safe_load(text)))
    parts = []
    for index, (start, title) in enumerate(titles):
        end = titles[index + 1][0] if index + 1 < len(titles) else len(lines)
        parts.append(f"### {title}\n\n| Value | Default | What it is |\n|---|---|---|\n")
        for line, name, default, comment in table:
            if start < line < end:
                shown = "" if default is None else f"`{default}`"
                parts.append(f"| `{name}` | {shown} | {comment} |\n")
        parts.append("\n")
    return "".join(parts)


def alerts():
    parts = ["| Alert | Severity | After | When | What to do |\n|---|---|---|---|---|\n"]
    text = (CHART / "rules" / "session-broker.yaml").read_text().replace("@drain@", "drain + 72s")
    for group in yaml.safe_load(text)["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                said = rule["annotations"]
                cells = [f"`{rule['alert']}`", rule["labels"]["severity"], rule.get("for", "at once"), said["summary"]]
                parts.append(f"| {' | '.join([*cells, said['action']])} |\n")
    return "".join(parts) + "\n"


def panels():
    parts = []
    for panel in json.loads((CHART / "dashboards" / "session-broker.json").read_text())["panels"]:
        if panel["type"] == "row":
            parts.append(f"\n**{panel['title']}**\n\n| Panel | What it shows, and what a bad picture means |\n|---|---|\n")
        else:
            parts.append(f"| {panel['title']} | {panel['description']} |\n")
    return "".join(parts).lstrip() + "\n"


def main():
    readme = CHART / "README.md"
    old = new = readme.read_text()
    for name, made in (("alerts", alerts()), ("panels", panels()), ("values", values())):
        begin, end = f"<!-- {name}: made by ../docs.py -->\n", f"<!-- end of {name} -->\n"
        before, rest = new.split(begin)
        _, after = rest.split(end)
        new = before + begin + "\n" + made + end + after
    if sys.argv[1:] == ["--check"]:
        if new != old:
            sys.exit("helm/session-broker/README.md is not what values, rules and dashboard say: run helm/docs.py")
    else:
        readme.write_text(new)


if __name__ == "__main__":
    main()
