#!/usr/bin/env python3
"""Renders the chart with the values in golden/ and refused/ and compares; --update writes what came out instead.

golden/NAME.values.yaml must lint, render to golden/NAME.yaml and golden/NAME.notes.txt, be what Kubernetes takes, and hold
a broker.toml that is TOML, left in target/helm-configs/NAME.toml for the broker's own tests. refused/NAME.values.yaml must
be refused with what its first line says. Needs helm on the PATH.
"""

import difflib
import json
import os
import re
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kubernetes_validate
import pydantic
import yaml
from cloudcoil.models.prometheus_operator import v1 as prometheus_operator

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CHART = HERE / "session-broker"
CONFIGS = ROOT / "target" / "helm-configs"
# The oldest that Chart.yaml allows, and the newest that there is.
KUBERNETES = ["1.27.0", "1.37.0"]
# What the schema knows only to let the templates say where it belongs.
REFUSED = {"commit_token_key", "owner", "engine.password"}


def helm(*arguments):
    return subprocess.run(["helm", *arguments], capture_output=True, text=True, check=False)


def rendered(values):
    """The objects and the notes that come of a file of values, or why there are none."""
    options = [str(CHART), "--namespace", "data", "--values", str(values)]
    template = helm("template", "broker", *options)
    if template.returncode:
        return None, None, template.stderr
    lint = helm("lint", "--strict", *options)
    if lint.returncode:
        return None, None, lint.stdout + lint.stderr
    # The only way to see notes. It reaches for no cluster.
    install = helm("install", "broker", *options, "--dry-run=client")
    if install.returncode:
        return None, None, install.stderr
    return template.stdout, install.stdout.partition("\nNOTES:\n")[2].strip() + "\n", ""


def compare(path, new, problems):
    if "--update" in sys.argv[1:]:
        path.write_text(new)
        return
    old = path.read_text() if path.exists() else ""
    if new != old:
        names = (f"{path.name}, as it is", "as it is rendered")
        lines = difflib.unified_diff(old.splitlines(), new.splitlines(), *names, lineterm="")
        problems.append("\n".join(lines) + "\nIf that is meant: helm/check --update")


def check_objects(name, text, problems):
    """What Kubernetes says of the objects; and that no two are one."""
    seen = set()
    for thing in filter(None, yaml.safe_load_all(text)):
        key = (thing["kind"], thing["metadata"]["name"])
        if key in seen:
            problems.append(f"{name}: there are two of {key}")
        seen.add(key)
        if thing["apiVersion"] == "monitoring.coreos.com/v1":
            check_monitoring(name, thing, problems)
            continue
        for version in KUBERNETES:
            try:
                kubernetes_validate.validate(thing, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                problems.append(f"{name}: {' '.join(key)} for Kubernetes {version}: {error.message}")
        if key[0] in ("Deployment", "StatefulSet"):
            check_mounts(name, thing["spec"]["template"]["spec"], problems)
            check_environment(name, thing["spec"]["template"]["spec"], problems)
        if key[0] == "Pod":
            check_mounts(name, thing["spec"], problems)


def check_monitoring(name, thing, problems):
    """What the Prometheus operator's own definitions say of an object; they would drop what they do not know."""
    try:
        model = getattr(prometheus_operator, thing["kind"]).model_validate(thing)
    except pydantic.ValidationError as error:
        problems.append(f"{name}: {error}")
        return
    if json.loads(model.model_dump_json(by_alias=True, exclude_unset=True)) != thing:
        problems.append(f"{name}: {thing['kind']} has a key that the Prometheus operator does not know")


def check_mounts(name, pod, problems):
    """Each mount has its volume, and no two files of a volume have one place."""
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    for container in pod["containers"]:
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                problems.append(f"{name}: {container['name']} mounts {mount['name']}, which is no volume")
    for volume in volumes.values():
        sources = volume.get("projected", {}).get("sources", [])
        paths = [item["path"] for source in sources for kind in source.values() for item in kind["items"]]
        if len(paths) != len(set(paths)):
            problems.append(f"{name}: volume {volume['name']} has a path twice: {paths}")


def check_environment(name, pod, problems):
    """No variable is given twice, and one that is made of others stands behind them."""
    for container in pod["containers"]:
        given = []
        for variable in container.get("env", []):
            if variable["name"] in given:
                problems.append(f"{name}: {variable['name']} is given twice")
            for used in re.findall(r"\$\((\w+)\)", variable.get("value", "")):
                if used not in given:
                    problems.append(f"{name}: {variable['name']} is made of {used}, which does not stand before it")
            given.append(variable["name"])


def broker_toml(text):
    maps = [thing for thing in yaml.safe_load_all(text) if thing and thing["kind"] == "ConfigMap"]
    return next(thing["data"]["broker.toml"] for thing in maps if "broker.toml" in thing["data"])


def check_files(name, text, problems):
    """Every file that the configuration or the environment has in the chart's directory is mounted there."""
    kinds = ("Deployment", "StatefulSet")
    workload = next(thing for thing in yaml.safe_load_all(text) if thing and thing["kind"] in kinds)
    pod = workload["spec"]["template"]["spec"]
    sources = next(volume for volume in pod["volumes"] if volume["name"] == "configuration")["projected"]["sources"]
    mounted = {item["path"] for source in sources for kind in source.values() for item in kind["items"]}
    variables = [variable.get("value", "") for variable in pod["containers"][0]["env"]]
    named = set(re.findall(r'"/etc/session-broker/([^"]+)"', broker_toml(text) + json.dumps(variables))) | {"broker.toml"}
    if named != mounted:
        problems.append(f"{name}: broker.toml names {sorted(named)}, and mounted are {sorted(mounted)}")


def leave_config(name, text):
    """Leaves the configuration for the broker to check; the only file that is read for that is put where it is found."""
    key = CONFIGS / "commit-token-key"
    key.write_text("not a secret, but long enough for one\n")
    line = f"commit_token_key_file = {json.dumps(str(key))}"
    (CONFIGS / f"{name}.toml").write_text(re.sub(r'(?m)^commit_token_key_file = ".*"$', lambda _: line, text))


def said(values, schema, definitions, found, place):
    """Notes which properties of the schema the values use: by the definition they stand in, or by their section."""
    for part in schema.get("allOf", []):
        said(values, part, definitions, found, place)
    if "$ref" in schema:
        place = schema["$ref"].rpartition("/")[2]
        schema = definitions[place]
    if not isinstance(values, dict):
        return
    for key, value in values.items():
        if key in schema.get("properties", {}):
            name = f"{place}.{key}".lstrip(".")
            found.add(name)
            said(value, schema["properties"][key], definitions, found, name)
        elif isinstance(schema.get("additionalProperties"), dict):
            said(value, schema["additionalProperties"], definitions, found, place)


def known(schema, definitions, place=""):
    """All properties of the configuration, named as above."""
    names = set()
    for key, part in schema.get("properties", {}).items():
        name = f"{place}.{key}".lstrip(".")
        names |= {name} | known(part, definitions, name)
    return names


def check_schema(problems):
    """Every key of the configuration stands in the schema, and in some set of values."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    definitions = schema["definitions"]
    config = schema["properties"]["config"]
    names = known(config, definitions)
    for place in ("engine", "profile", "class", "principal"):
        names |= known(definitions[place], definitions, place)
    found = set()
    for values in HERE.glob("golden/*.values.yaml"):
        said(yaml.safe_load(values.read_text())["config"], config, definitions, found, "")
    for name in sorted(names - found - REFUSED):
        problems.append(f"no file in golden/ says {name}")
    keys = {name.rpartition(".")[2] for name in names}
    reads = r'\b(?:section|root|others)\s*\.(?:text|list|flag|word|number|duration|optional_\w+|section|has)\(\s*"(\w+)"'
    through = r'\b(?:duration|count|file|required)\(\s*(?:&mut section, )?"(\w+)"'
    for source in sorted((ROOT / "src" / "config").glob("*.rs")):
        code = source.read_text().partition("#[cfg(test)]")[0]
        for key in sorted(set(re.findall(reads, code) + re.findall(through, code)) - keys):
            problems.append(f"values.schema.json: {key}, which {source.name} reads, is in no section of config")


def check_versions(problems):
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    program = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["version"]
    if chart != program:
        problems.append(f"Chart.yaml: appVersion is {chart}, and the program's version {program}")


def main():
    problems = []
    CONFIGS.mkdir(parents=True, exist_ok=True)
    for old in CONFIGS.glob("*.toml"):
        old.unlink()
    golden = sorted(HERE.glob("golden/*.values.yaml"))
    refused = sorted(HERE.glob("refused/*.values.yaml"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(rendered, golden))
        failures = list(pool.map(rendered, refused))
    for values, (objects, notes, failure) in zip(golden, results, strict=True):
        name = values.name.removesuffix(".values.yaml")
        if failure:
            problems.append(f"{name}: {failure}")
            continue
        compare(values.with_name(f"{name}.yaml"), objects, problems)
        compare(values.with_name(f"{name}.notes.txt"), notes, problems)
        check_objects(name, objects, problems)
        try:
            tomllib.loads(broker_toml(objects))
        except tomllib.TOMLDecodeError as error:
            problems.append(f"{name}: broker.toml: {error}")
            continue
        check_files(name, objects, problems)
        leave_config(name, broker_toml(objects))
    for values, (_, _, failure) in zip(refused, failures, strict=True):
        expected = values.read_text().splitlines()[0].removeprefix("# refused: ")
        if expected not in failure:
            problems.append(f"refused/{values.name}: expected {expected!r}, but: {failure or 'it is taken'}")
    check_schema(problems)
    check_versions(problems)
    if problems:
        sys.exit("\n".join(problems))
    print(f"helm: {len(golden)} sets of values are rendered as expected, {len(refused)} are refused")


if __name__ == "__main__":
    main()
