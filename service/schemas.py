"""Bodies of requests and answers. Unknown fields are refused, so a misspelt parameter is never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, RootModel, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError

from service.settings import Truncation

FunctionName = Literal["default", "softmax", "sigmoid", "none"]
OffsetEncoding = Literal["codepoint", "utf16", "byte"]

# Names of the union members below. They show up in pydantic's error locations and are taken out there.
ONE_TEXT, ONE_OBJECT, MANY = "<text>", "<object>", "<list>"
CLASSIFY, QA = "<classify>", "<qa>"
TAGS = frozenset({ONE_TEXT, ONE_OBJECT, MANY, CLASSIFY, QA})


def real_text(text: str) -> str:
    """Refuse nothing but white space."""
    if not text or text.isspace():
        raise PydanticCustomError("blank", "the text is empty or only white space")
    return text


def kind_of(value: Any) -> str | None:
    """Which union member a value is meant to be, so that an error speaks of that one only."""
    if isinstance(value, str):
        return ONE_TEXT
    if isinstance(value, list):
        return MANY
    return ONE_OBJECT if isinstance(value, dict | BaseModel) else None


Text = Annotated[str, AfterValidator(real_text), WithJsonSchema({"type": "string", "minLength": 1, "pattern": r"\S"})]
# For the document only: tasks.py refuses an empty batch with a status of its own.
NOT_EMPTY = Field(json_schema_extra={"minItems": 1})
ONE_OR_TWO = Field(json_schema_extra={"minItems": 1, "maxItems": 2})


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPair(Strict):
    """One text, or two that the model reads together (premise and hypothesis)."""

    text: Text
    text_pair: Text | None = None


ClassifyInput = Annotated[
    Annotated[Text, Tag(ONE_TEXT)] | Annotated[TextPair, Tag(ONE_OBJECT)],
    Discriminator(
        kind_of,
        custom_error_type="input_type",
        custom_error_message='expected a text, or an object with "text" and "text_pair"',
    ),
]


class ClassifyParameters(Strict):
    top_k: int | None = Field(
        default=None, ge=1, strict=True, description="Labels per input; null gives all, best first."
    )
    function_to_apply: FunctionName = Field(
        default="default",
        description="From logits to scores. `default` follows the model: softmax for single-label, sigmoid for "
        "multi-label, none for regression.",
    )
    truncation: Truncation | None = Field(
        default=None,
        description="Text longer than the model takes: refuse it (`error`), or keep its start (`right` is cut off) or "
        "its end (`left` is cut off). Null is the server's default, shown by /info.",
    )
    variant: str | None = Field(default=None, description="`dense`, `dsformer` or other; null is the default.")


class ClassifyRequest(Strict):
    inputs: Annotated[
        Annotated[Text, Tag(ONE_TEXT)]
        | Annotated[TextPair, Tag(ONE_OBJECT)]
        | Annotated[list[ClassifyInput], NOT_EMPTY, Tag(MANY)],
        Discriminator(
            kind_of,
            custom_error_type="inputs_type",
            custom_error_message='expected a text, an object with "text" and "text_pair", or a list of these',
        ),
    ]
    parameters: ClassifyParameters = Field(default_factory=ClassifyParameters)
    options: dict[str, Any] | None = Field(default=None, description="Sent by old clients; accepted and ignored.")

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"inputs": ["a gripping film", "two hours of my life, gone"]}]},
    )

    def items(self) -> list[TextPair]:
        items = self.inputs if isinstance(self.inputs, list) else [self.inputs]
        return [TextPair(text=item) if isinstance(item, str) else item for item in items]


class PredictRequest(Strict):
    """The body of Text Embeddings Inference. There a list of two texts is a pair, and a batch is a list of lists."""

    inputs: Annotated[
        Annotated[Text, Tag(ONE_TEXT)]
        | Annotated[
            Annotated[list[Text], ONE_OR_TWO] | Annotated[list[Annotated[list[Text], ONE_OR_TWO]], NOT_EMPTY],
            Tag(MANY),
        ],
        Discriminator(
            kind_of,
            custom_error_type="inputs_type",
            custom_error_message="expected a text, a list of one or two texts, or a list of such lists",
        ),
    ]
    truncate: bool | None = Field(default=None, strict=True, description="Cut what is too long; null: as /info says.")
    truncation_direction: Literal["left", "right", "Left", "Right"] = "right"
    raw_scores: bool = Field(default=False, strict=True, description="Logits in the place of scores.")

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"inputs": "a gripping film"}]})

    @property
    def many(self) -> bool:
        """Whether the answer is a list of lists."""
        return not isinstance(self.inputs, str) and any(isinstance(each, list) for each in self.inputs)

    def classify(self) -> ClassifyRequest:
        """The same in the words of /classify. Raises ValueError where an input is not one text or two."""
        inputs = [self.inputs] if isinstance(self.inputs, str) else self.inputs
        lists = [each for each in inputs if isinstance(each, list)]
        if not self.many:
            lists = [[each for each in inputs if isinstance(each, str)]]
        items: list[str | TextPair] = []
        for i, texts in enumerate(lists):
            if not 1 <= len(texts) <= 2:
                raise ValueError(f"inputs[{i}] has {len(texts)} texts; one text or a pair is expected")
            items.append(TextPair(text=texts[0], text_pair=texts[1]) if len(texts) == 2 else texts[0])
        cut = self.truncation_direction.lower() if self.truncate else None if self.truncate is None else "error"
        parameters = {"truncation": cut, "function_to_apply": "none" if self.raw_scores else "default"}
        return ClassifyRequest(inputs=list(items), parameters=ClassifyParameters.model_validate(parameters))


class LabelScore(BaseModel):
    label: str
    score: float


class Question(Strict):
    question: Text
    context: Text


class QaParameters(Strict):
    top_k: int | None = Field(
        default=None,
        ge=1,
        le=100,
        strict=True,
        description="Answers per input, best first, as a list; null gives one object.",
    )
    doc_stride: int | None = Field(
        default=None,
        ge=0,
        strict=True,
        description="Tokens that neighbouring windows share. Null: 128, or half a window where that is less.",
    )
    max_answer_len: int = Field(default=15, ge=1, le=512, strict=True, description="Longest answer in tokens.")
    max_seq_len: int | None = Field(
        default=None,
        ge=8,
        strict=True,
        description="Tokens of one window, question included. Null: 384 or the model's limit.",
    )
    max_question_len: int = Field(
        default=64,
        ge=1,
        strict=True,
        description="A longer question is cut to this many tokens, and X-Truncated counts it.",
    )
    handle_impossible_answer: bool = Field(
        default=False, strict=True, description="Allow the empty answer where it scores best."
    )
    offset_encoding: OffsetEncoding = Field(
        default="codepoint",
        description="Unit of `start` and `end`: `codepoint` (Python), `utf16` (JavaScript, Java) or `byte` (UTF-8).",
    )
    variant: str | None = Field(default=None, description="`dense`, `dsformer` or other; null is the default.")


class QaRequest(Strict):
    inputs: Annotated[
        Annotated[Question, Tag(ONE_OBJECT)] | Annotated[list[Question], NOT_EMPTY, Tag(MANY)],
        Discriminator(
            kind_of,
            custom_error_type="inputs_type",
            custom_error_message='expected an object with "question" and "context", or a list of these',
        ),
    ]
    parameters: QaParameters = Field(default_factory=QaParameters)
    options: dict[str, Any] | None = Field(default=None, description="Sent by old clients; accepted and ignored.")

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "inputs": {
                        "question": "Who lives in Berkeley?",
                        "context": "My name is Clara and I live in Berkeley.",
                    }
                }
            ]
        },
    )

    def items(self) -> list[Question]:
        return self.inputs if isinstance(self.inputs, list) else [self.inputs]


class Answer(BaseModel):
    answer: str = Field(description="`context[start:end]`; empty for the empty answer.")
    score: float = Field(description="Probability in [0, 1]; service/qa.py defines it.")
    start: int
    end: int


class FieldError(BaseModel):
    field: str
    message: str


class ErrorBody(BaseModel):
    error: str = Field(description="A sentence a person can act on.")
    error_type: str
    request_id: str
    detail: list[FieldError]


class Status(BaseModel):
    status: str


DEFAULT_REPEATS = 20
REPEATS = Field(
    default=DEFAULT_REPEATS,
    ge=1,
    le=100,
    strict=True,
    description="Timed rounds, in each of which every variant runs once; fewer where the deadline comes first.",
)
NO_VARIANT_HERE = Field(default=None, description="Null: a comparison runs every variant.")


class ClassifyComparisonParameters(ClassifyParameters):
    repeats: int = REPEATS
    variant: None = NO_VARIANT_HERE


class QaComparisonParameters(QaParameters):
    repeats: int = REPEATS
    variant: None = NO_VARIANT_HERE


class ClassifyComparison(Strict):
    task: Literal["classify"]
    inputs: ClassifyInput
    parameters: ClassifyComparisonParameters = Field(default_factory=ClassifyComparisonParameters)

    def item(self) -> TextPair:
        return TextPair(text=self.inputs) if isinstance(self.inputs, str) else self.inputs


class QaComparison(Strict):
    task: Literal["qa"]
    inputs: Question
    parameters: QaComparisonParameters = Field(default_factory=QaComparisonParameters)

    def item(self) -> Question:
        return self.inputs


def task_of(value: Any) -> str | None:
    """Which of the two bodies below a value is meant to be."""
    task = value.get("task") if isinstance(value, dict) else getattr(value, "task", None)
    return {"classify": CLASSIFY, "qa": QA}.get(task) if isinstance(task, str) else None


class CompareRequest(
    RootModel[
        Annotated[
            Annotated[ClassifyComparison, Tag(CLASSIFY)] | Annotated[QaComparison, Tag(QA)],
            Discriminator(
                task_of,
                custom_error_type="task",
                custom_error_message='expected an object with "task": "classify" or "qa", and "inputs"',
            ),
        ]
    ]
):
    """One input, for every variant of its task."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"task": "classify", "inputs": "a gripping film"}]})


class StageSeconds(BaseModel):
    """Medians over the rounds."""

    tokenize: float
    queue: float = Field(description="Waiting for the inference thread.")
    infer: float
    postprocess: float


class SpeedUp(BaseModel):
    """The baseline's time over the variant's, of tokenize + infer + postprocess, in pairs of one round."""

    median: float
    low: float | None = Field(description="Bootstrap interval of the median, 95 %; null under 5 rounds.")
    high: float | None


class Compared(BaseModel):
    """One variant."""

    variant: str
    name: str
    preset: str | None
    precision: str | None
    file_bytes: int
    answer: list[LabelScore] | Answer | list[Answer] = Field(description="As the task's own route gives it.")
    agrees: bool | None = Field(
        description="With the baseline: the same best label, labels above 0.5, or answer text; null for regression."
    )
    score_difference: float | None = Field(description="Largest difference of a score from the baseline's.")
    tokens: int
    windows: int
    truncated: bool
    stage_seconds: StageSeconds
    work_seconds: list[float] = Field(description="tokenize + infer + postprocess of each round, in order.")
    speed_up: SpeedUp


class Comparison(BaseModel):
    task: str
    baseline: str
    repeats: int = Field(description="Rounds that were timed.")
    agreement: bool | None = Field(description="Whether every variant agrees with the baseline.")
    variants: list[Compared] = Field(description="The baseline first.")
