"""`dsformer-serve doctor`: what the service would find here, line by line, before it is started."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tokenizers

import kernels
from service import artifact, keys
from service.errors import StartError
from service.metrics import version
from service.model import RUNTIME_VERSION
from service.settings import Settings, cgroup_cpus


class Finding(NamedTuple):
    good: bool
    name: str
    text: str


def examine(settings: Settings) -> Iterator[Finding]:
    """Everything that a start depends on; nothing is changed, and no model is loaded."""
    yield Finding(True, "versions", f"dsformer {version()}, Python {platform.python_version()}")
    yield Finding(True, "runtime", f"onnxruntime {RUNTIME_VERSION}, tokenizers {tokenizers.__version__}")
    quota = cgroup_cpus()
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = "no cgroup quota" if quota is None else f"cgroup quota of {quota:g}"
    yield Finding(True, "cpu", f"{kernels.cpu_name()}; {affinity} by affinity, {limit}")
    yield Finding(True, "threads", f"{settings.threads} for one inference")
    yield kernel_library()
    yield from folders(settings.models)
    yield api_keys(settings)
    yield port(settings.host, settings.port)


def kernel_library() -> Finding:
    try:
        isa = kernels.isa()
    except (RuntimeError, ValueError, OSError) as error:
        return Finding(False, "kernels", str(error))
    return Finding(True, "kernels", f"{isa.name}: {isa.reason}")


def folders(root: Path) -> Iterator[Finding]:
    try:
        paths = artifact.find_folders(root)
    except StartError as error:
        yield Finding(False, "models", str(error))
        return
    for path in paths:
        try:
            found = artifact.read(path)
        except StartError as error:
            yield Finding(False, "model", str(error))
        else:
            yield Finding(True, "model", f"{path}: {found.task}, {found.variant}, sha256 {found.sha256[:12]}, whole")


def api_keys(settings: Settings) -> Finding:
    try:
        count = len(keys.load(settings.api_key, settings.api_key_file))
    except StartError as error:
        return Finding(False, "keys", str(error))
    return Finding(True, "keys", f"{count} API keys" if count else "no API key: everybody who reaches the port may ask")


def port(host: str, number: int) -> Finding:
    where = f"{host}:{number}"
    try:
        family, _, _, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        return Finding(False, "port", f"{where} cannot be listened on: {error.strerror or error}")
    return Finding(True, "port", f"{where} is free")


def report(settings: Settings) -> bool:
    """Print the findings; true when all are good."""
    findings = list(examine(settings))
    for finding in findings:
        print(f"{'ok  ' if finding.good else 'FAIL'} {finding.name:<9} {finding.text}")
    return all(finding.good for finding in findings)
