"""A model folder on disk, checked before anything in it is used.

    <name>/model.onnx  tokenizer.json  config.json  golden.json  [card.json]

`config.json` is Hugging Face's, with one section "dsformer" of our own; `golden.json` signs the other files and says
what the model must answer. Reading loads no code and asks no network. What is wrong becomes a `StartError` that names
the folder and the reason.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service import golden
from service.errors import StartError
from service.golden import Golden
from service.settings import Variant

FORMAT_VERSION = 1
Task = Literal["classify", "qa"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
FILES = ("model.onnx", "tokenizer.json", "config.json", golden.FILE)
CUSTOM_OP = b"DSLinear"
SIGN = "`python -m compressor.golden FOLDER` writes it"
# These models number positions from pad_token_id + 1, so they take that many tokens fewer than they have positions.
OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "camembert"})


class DsformerSection(BaseModel):
    """The part of config.json that is ours."""

    # Later writers may add facts; what changes the meaning of a folder raises format_version instead.
    model_config = ConfigDict(extra="ignore", strict=True)

    task: Task
    variant: Variant
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    preset: str | None = None
    precision: str | None = None
    base_model: str | None = None
    block_size: int | None = None
    # Shown by /info as they are: a number, a fraction in words, or one per kind of matrix.
    gamma: Any = None
    delta: Any = None


class Config(BaseModel):
    """The part of config.json that the service reads."""

    # model_type is Hugging Face's name; pydantic before 2.10 would warn of it.
    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    dsformer: DsformerSection
    model_type: str = "bert"
    max_position_embeddings: int = Field(ge=8)
    pad_token_id: int | None = 0
    id2label: dict[int, str] = Field(default_factory=dict)
    problem_type: ProblemType | None = None

    @property
    def max_length(self) -> int:
        """Tokens that the model takes, special tokens included."""
        offset = (self.pad_token_id or 0) + 1 if self.model_type in OFFSET_POSITIONS else 0
        return self.max_position_embeddings - offset


@dataclass(frozen=True)
class Artifact:
    """A folder that passed every check that needs no ONNX Runtime."""

    path: Path
    config: Config
    golden: Golden

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def task(self) -> Task:
        return self.config.dsformer.task

    @property
    def variant(self) -> Variant:
        return self.config.dsformer.variant

    @property
    def sha256(self) -> str:
        return self.config.dsformer.sha256

    @property
    def labels(self) -> list[str]:
        """Label of each logit, in order."""
        return [self.config.id2label[i] for i in range(len(self.config.id2label))]

    @property
    def onnx_path(self) -> Path:
        return self.path / "model.onnx"

    @property
    def tokenizer_path(self) -> Path:
        return self.path / "tokenizer.json"


def find_folders(root: Path) -> list[Path]:
    """Model folders under `root`, by name; `root` itself where it is one."""
    if not root.is_dir():
        raise StartError(f"There is no model directory {root}: set --models (DSFORMER_MODELS).")
    if (root / "config.json").exists():
        return [root]
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise StartError(f"The model directory {root} holds no model folder: set --models (DSFORMER_MODELS).")
    return folders


def read(path: Path) -> Artifact:
    """Check one model folder and read its configuration."""
    for name in FILES:
        if not (path / name).is_file():
            raise broken(path, f"{name} is missing" + (f"; {SIGN}" if name == golden.FILE else ""))
    config = read_config(path)
    found = sha256(path / "model.onnx")
    if found != config.dsformer.sha256:
        raise broken(
            path,
            f"model.onnx has sha256 {found}, config.json says {config.dsformer.sha256}; "
            "the file is damaged or belongs to another folder",
        )
    check_op(path, config)
    return Artifact(path, config, read_golden(path))


def read_golden(path: Path) -> Golden:
    """The folder's golden.json, once the other files are those that it signs."""
    try:
        found = Golden.model_validate_json((path / golden.FILE).read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise broken(path, f"{golden.FILE}, {where}: {problem['msg']}; {SIGN} anew") from error
    for name in ("model.onnx", "tokenizer.json", "config.json"):
        if found.sha256.get(name) != sha256(path / name):
            raise broken(
                path,
                f"{name} is not the file that {golden.FILE} was made with; if it was changed on purpose, {SIGN} anew",
            )
    return found


def check_op(path: Path, config: Config) -> None:
    """A folder says that it is compressed exactly if its graph uses the custom op."""
    with (path / "model.onnx").open("rb") as file:
        if path.joinpath("model.onnx").stat().st_size == 0:
            raise broken(path, "model.onnx is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            has_op = content.find(CUSTOM_OP) >= 0
    if has_op != (config.dsformer.variant == "dsformer"):
        raise broken(
            path,
            f"config.json says variant {config.dsformer.variant}, but model.onnx "
            f"{'uses' if has_op else 'does not use'} the op {CUSTOM_OP.decode()}",
        )


def read_config(path: Path) -> Config:
    try:
        raw = json.loads((path / "config.json").read_bytes())
    except (ValueError, RecursionError) as error:
        raise broken(path, f"config.json is not valid JSON: {error}") from error
    section = raw.get("dsformer") if isinstance(raw, dict) else None
    if not isinstance(section, dict):
        raise broken(path, 'config.json has no object "dsformer"; was the folder written by dsformer-compress?')
    # Before all else: another format may well lack the fields that this one has.
    version = section.get("format_version")
    if version != FORMAT_VERSION:
        raise broken(path, f"format_version is {version!r}, this service reads {FORMAT_VERSION}")
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise broken(path, f"config.json, {where}: {problem['msg']}") from error
    if config.dsformer.task == "classify":
        check_labels(path, config)
    return config


def check_labels(path: Path, config: Config) -> None:
    if not config.id2label:
        raise broken(path, "config.json has no id2label, which names the labels of a classify model")
    if sorted(config.id2label) != list(range(len(config.id2label))):
        raise broken(path, f"the keys of id2label are {sorted(config.id2label)}, expected 0 to n - 1")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def broken(path: Path, reason: str) -> StartError:
    return StartError(f"Model folder {path}: {reason}.")
