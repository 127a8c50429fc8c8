#!/usr/bin/env python3
"""Renders k8s/ with kustomize and reads the compose files; checks each against its schema.

Prints one JSON object:
  overlays  {name: [object, ...]}; "everything" is an overlay made here: the base with every component
  compose   {file: {...}}, with variables filled in
  raw       {file: {...}}, the compose files before variables are filled in
  gateway   {...}, the template of Envoy's configuration with all of its sections; placeholders are strings
  wrong     [text, ...], what does not fit its schema
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import compose_spec
import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parents[2]
VERSION = "1.34"
wrong = []


def kustomize(folder):
    kubectl = ROOT / ".tools/bin/kubectl"
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, timeout=60)
    if done.returncode:
        wrong.append(f"{folder}: {done.stderr.strip()}")
    if done.stderr and not done.returncode:
        wrong.append(f"{folder}: kustomize warns: {done.stderr.strip()}")
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def check(overlay, found):
    name = f"{overlay}: {found['kind']} {found['metadata']['name']}"
    if found["apiVersion"] == "cert-manager.io/v1":
        return  # no schema of Kubernetes' own: tests/policy/deploy/certificates.rs reads them
    try:
        kubernetes_validate.validate(found, VERSION, strict=True)
    except Exception as error:  # each of the library's errors says what it is
        wrong.append(f"{name}: {error}")


def overlays():
    rendered = {folder.name: kustomize(folder) for folder in sorted((ROOT / "k8s/overlays").iterdir())}
    with tempfile.TemporaryDirectory() as folder:
        place = lambda path: os.path.relpath(path, os.path.realpath(folder))
        components = [place(path) for path in sorted((ROOT / "k8s/components").iterdir())]
        text = yaml.safe_dump({"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "namespace": "hapa",
                               "resources": [place(ROOT / "k8s/base")], "components": components,
                               "images": [{"name": "hapa", "newTag": "test"}, {"name": "hapa-model", "newTag": "test"}]})
        Path(folder, "kustomization.yaml").write_text(text)
        rendered["everything"] = kustomize(folder)
    for overlay, objects in rendered.items():
        for found in objects:
            check(overlay, found)
    return rendered


def filled(text):
    """As compose fills variables in that nobody set, where what is required is "x"."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
    return re.sub(r"\$\{\w+:\?[^}]*\}", "x", text)


def compose():
    files = {path.name: path.read_text() for path in sorted((ROOT / "infra").glob("compose*.yaml"))}
    for name, text in files.items():
        try:
            compose_spec.PyCompose.from_json(json.dumps(yaml.safe_load(filled(text))))
        except ValueError as error:
            wrong.append(f"{name}: {error}")
    return ({name: yaml.safe_load(filled(text)) for name, text in files.items()},
            {name: yaml.safe_load(text) for name, text in files.items()})


read, raw = compose()
gateway = yaml.safe_load((ROOT / "gateway/envoy.yaml").read_text())
output = {"overlays": overlays(), "compose": read, "raw": raw, "gateway": gateway, "wrong": wrong}
json.dump(output, sys.stdout, default=str)
