#!/usr/bin/env python3
"""Writes the table of values into the chart's README.md from the comments in its values.yaml; --check only compares.

A comment stands above its key. A line that begins with ## begins a table. Every key has a comment, or stands in a value
that is shown whole.
"""

import json
import sys
from pathlib import Path

import yaml

CHART = Path(__file__).resolve().parent / "session-broker"
BEGIN, END = "<!-- values: made by ../docs.py -->\n", "<!-- end of values -->\n"


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


def document(text):
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


def main():
    readme = CHART / "README.md"
    old = readme.read_text()
    before, rest = old.split(BEGIN)
    _, after = rest.split(END)
    new = before + BEGIN + "\n" + document((CHART / "values.yaml").read_text()) + END + after
    if sys.argv[1:] == ["--check"]:
        if new != old:
            sys.exit("helm/session-broker/README.md is not what values.yaml says: run helm/docs.py")
    else:
        readme.write_text(new)


if __name__ == "__main__":
    main()
