"""Every command of README.md and docs: its options exist, its files are there, and the short ones run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from compressor.__main__ import app
from service import bench, bench_card, bench_eval, bench_http, bench_main
from service.settings import Settings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BENCHES = {"folders": bench, "http": bench_http, "eval": bench_eval, "card": bench_card}
SERVE_ONLY = {"print-config", "help"}


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command in the page's fenced sh blocks; comments left out."""
    for block in re.findall(r"^ *```sh\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                yield words


def ours() -> list[tuple[str, str, list[str]]]:
    """(page, program, words after it) of each command of ours."""
    found = []
    for page in PAGES:
        for words in commands(page):
            program = words[0].removeprefix(".venv/bin/")
            if program.startswith("dsformer-"):
                found.append((page.name, program, words[1:]))
    return found


def flags_of(program: str, words: list[str]) -> tuple[set[str], list[str]]:
    """The options that a command knows, and its words without the command's own name."""
    if program == "dsformer-serve":
        return {name.replace("_", "-") for name in Settings.model_fields} | SERVE_ONLY, words
    if program == "dsformer-bench":
        name, rest = (words[0], words[1:]) if words[0] in BENCHES else ("folders", words)
        fields = BENCHES[name].Options.model_fields
        return {(field.alias or key).replace("_", "-") for key, field in fields.items()} | {"help"}, rest
    assert program == "dsformer-compress", program
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    if words[0] == "--help":
        return {"help"}, words
    return {flag.removeprefix("--") for p in known[words[0]].params for flag in (*p.opts, *p.secondary_opts)}, words[1:]


def test_pages_have_commands() -> None:
    assert {program for _, program, _ in ours()} == {"dsformer-bench", "dsformer-compress", "dsformer-serve"}
    assert {words[0] for _, program, words in ours() if program == "dsformer-bench"} >= BENCHES.keys()
    assert bench_main.MODULES.keys() == BENCHES.keys()


@pytest.mark.parametrize(("page", "program", "words"), ours())
def test_options_exist(page: str, program: str, words: list[str]) -> None:
    known, rest = flags_of(program, words)
    used = {word.removeprefix("--").split("=")[0] for word in rest if word.startswith("--")}
    assert used <= known, f"{page}: {program} {' '.join(words)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        if path.startswith("http"):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if heading:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", each).strip().lower().replace(" ", "-") for each in headings}
    for words in commands(page):
        for word in words:
            if word.startswith(("deploy/", "docs/", "tests/")) and word.endswith((".py", ".yml", "-dense")):
                assert (ROOT / word).exists(), f"{page.name}: {word}"


def test_the_table_of_the_readme_is_that_of_the_cards() -> None:
    """Quality and the three sizes of the default models."""
    lines = [line for line in PAGES[0].read_text().splitlines() if line.startswith("| ")]
    cells = {title.strip(): [cell.strip() for cell in line] for _, title, *line, _ in (row.split("|") for row in lines)}

    def expected(pair: str) -> Iterator[tuple[str, str, str, str]]:
        card = json.loads((ROOT / "docs" / "cards" / pair / "card.json").read_text())
        for which in ("dense", "compressed"):
            told = card[which]
            scores = [
                f"{told['metrics'][name]:.2f}" for name in ("accuracy", "f1", "exact_match") if name in told["metrics"]
            ]
            quality = scores[0] + "".join(f" ({score})" for score in scores[1:])
            ratio = "1" if which == "dense" else f"{told['compression_ratio']:.2f}"
            yield quality, megabytes(told["file_bytes"]), megabytes(told["factorized_bytes"]), ratio

    titles = ("accuracy; F1 (exact match)", "model.onnx", "factorized matrices", "compression by eq. 11")
    models = [*expected("sst2"), *expected("squad")]
    for title, wanted in zip(titles, zip(*models, strict=True), strict=True):
        (found,) = [row for name, row in cells.items() if name.replace("`", "").startswith(title)]
        assert found == list(wanted), title


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def short() -> list[tuple[str, str]]:
    """(page, command) of what can run beside a service of deploy/models: no training, no other packages."""
    placeholders = ("mine/", "FOLDER", "DATA", "--peers", "--synthetic")
    found = []
    for page in PAGES:
        for words in commands(page):
            line = shlex.join(words)
            if re.match(r"(curl|\S*dsformer-bench|\S*dsformer-serve doctor) ", line) and not any(
                one in line for one in placeholders
            ):
                found.append((page.name, line))
    return found


@pytest.mark.slow
def test_short_commands_run(tmp_path: Path) -> None:
    from harness import Served

    assert len(short()) >= 10
    own = tmp_path / "mine-dev.tsv"
    own.write_text("text\tlabel\na fine film\tPOSITIVE\na dull film\tNEGATIVE\n")
    modules = {"dsformer-bench": "service.bench_main", "dsformer-serve": "service"}
    with Served(ROOT / "deploy" / "models", threads=2) as service:
        for page, line in short():
            line = re.sub(r"(localhost|127\.0\.0\.1):8000", f"127.0.0.1:{service.port}", line)
            line = re.sub(r"--rounds \d+", "--rounds 1", line).replace("runs/", f"{tmp_path}/")
            line = line.replace("mine-dev.tsv", str(own)).replace("--models mine", "--models deploy/models")
            words = shlex.split(line)
            if words[0] == "curl":
                words += ["--fail", "--silent", "--show-error"]
            else:
                words = [sys.executable, "-m", modules[words[0].removeprefix(".venv/bin/")], *words[1:]]
                if words[3] in ("http", "eval") and "--url" not in words:
                    words += ["--url", f"http://127.0.0.1:{service.port}"]
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{page}: {line}: {done.stderr}"
            assert done.stdout.strip(), line
