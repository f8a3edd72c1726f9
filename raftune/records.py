"""Records of a run (prompts, samples, scores, verdicts) and their Arrow columns, one row of Parquet a record."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import pyarrow as pa

TOOLS = "tools"  # the column beside messages whose value a chat template gets as `tools`, as in TRL
_AT_ONCE = 1024  # values that are held a second time, to compare them
Row = dict[str, Any]  # of a table, by column
PromptContent = str | int | list[dict[str, Any]]


class JsonScalar(pa.ExtensionScalar):  # type: ignore[misc]
    """A cell of a column of JSON text, read as the value."""

    def as_py(self, **kwargs: Any) -> Any:
        return None if self.value is None else json.loads(self.value.as_py())


class JsonType(pa.ExtensionType):  # type: ignore[misc]
    """A column of JSON text whose cells are read as the values, each with exactly its own keys.

    Arrow's structs give every row the keys of all others. Readers that do not know the type see the text.
    """

    def __init__(self) -> None:
        super().__init__(pa.string(), "raftune.json")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> JsonType:
        return cls()

    def __arrow_ext_scalar_class__(self) -> type[JsonScalar]:
        return JsonScalar


with contextlib.suppress(pa.ArrowKeyError):  # imported anew: the type is known by its name
    pa.register_extension_type(JsonType())


def json_array(values: Sequence[Any]) -> pa.Array:
    """A column of the values as JSON text. Raises TypeError for what JSON cannot represent."""
    texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    return pa.ExtensionArray.from_storage(JsonType(), pa.array(texts, pa.string()))


def arrow_array(values: Sequence[Any]) -> pa.Array:
    """A column that returns the values unchanged: of an Arrow type where possible, else of JSON text.

    Raises pa.ArrowInvalid, pa.ArrowTypeError, TypeError, OverflowError or UnicodeEncodeError where neither can.
    """
    kinds = set(map(type, values))
    if kinds >= {int, float} and kinds <= {int, float, type(None)}:
        return json_array(values)  # an Arrow column would return 18 as 18.0 because another row holds 0.5
    if not any(issubclass(kind, list | dict | tuple) for kind in kinds):
        return pa.array(values)
    try:
        parts = [values[at : at + _AT_ONCE] for at in range(0, len(values), _AT_ONCE)]
        for value in values:
            _check_keys(value)
        texts = [json.dumps(list(part), ensure_ascii=False, default=_as_list) for part in parts]
    except (TypeError, ValueError):  # dates, bytes and the like: Arrow's own or nothing
        array = pa.array(values)
        if array.to_pylist() != list(values):
            raise pa.ArrowInvalid("nested values that are not JSON would not come back as they are") from None
        return array
    with contextlib.suppress(pa.ArrowException, OverflowError, TypeError):
        array = pa.array(values)
        # a struct with None may be padded: only JSON text is known to be unchanged
        if not any(map(_has_none, values)) and all(
            json.dumps(array.slice(number * _AT_ONCE, _AT_ONCE).to_pylist(), ensure_ascii=False) == text
            for number, text in enumerate(texts)
        ):
            return array
    return json_array([value for text in texts for value in json.loads(text)])


def _check_keys(value: Any) -> None:
    """Raises TypeError for a key that is no text, which JSON would make one."""
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        raise TypeError("a key must be a text")
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_keys(inner)


def _as_list(value: Any) -> Any:
    """A NumPy number or array as Python values."""
    if not hasattr(value, "tolist"):
        raise TypeError(f"{type(value).__name__} is no JSON")
    return value.tolist()


def _has_none(value: Any) -> bool:
    """Whether a dictionary inside holds None, or is empty."""
    if isinstance(value, dict):
        return not value or any(inner is None or _has_none(inner) for inner in value.values())
    return isinstance(value, list | tuple) and any(map(_has_none, value))


def without_none(value: Any) -> Any:
    """The value without the keys of dictionaries that hold None; a message keeps its content."""
    if isinstance(value, dict):
        return {
            key: without_none(inner)
            for key, inner in value.items()
            if inner is not None or (key == "content" and "role" in value)
        }
    return [without_none(inner) for inner in value] if isinstance(value, list) else value


def table_of(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """As pa.Table.from_pylist with this schema, which may have columns of JSON."""
    columns = {}
    for column in schema:
        values = [row.get(column.name) for row in rows]
        columns[column.name] = json_array(values) if column.type == JsonType() else pa.array(values, column.type)
    return pa.table(columns, schema=schema)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text, a list of messages or a class label; rewards get the other `columns` of its row."""

    id: str
    content: PromptContent
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion of a prompt. `seed` is None where it was given; `payload` holds the family's own columns."""

    id: str
    prompt_id: str
    k: int
    source: str
    seed: int | None
    version: str
    completion: Any
    payload: Mapping[str, Any] = field(default_factory=dict)


class ScoreStatus(StrEnum):
    """How a score, or one part of it, came about. Only OK samples can be selected."""

    OK = "ok"
    NOT_APPLICABLE = "not_applicable"
    INVALID = "invalid"
    ERROR = "error"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True)
class RewardPart:
    """One reward's value of one sample, None unless the status is OK."""

    value: float | None
    status: ScoreStatus
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """The weighted sum of the parts that apply, None unless the status is OK. `detail`: why no reward was called."""

    value: float | None
    status: ScoreStatus
    parts: Mapping[str, RewardPart]
    detail: str = ""


# Columns of a payload that mean the same in every family that has them.
INVALID = "invalid"  # why the sample cannot be trained on, else null: then no reward is called for it
LATENTS = "latents"  # what only training reads, and `keep_latents` may drop once a round is trained
EXTRA = "extra/"  # prefix of the columns that rewards logged

# The columns that identify a sample in every table of a run.
IDENTITY_FIELDS: tuple[pa.Field, ...] = (
    pa.field("sample_id", pa.string(), nullable=False),
    pa.field("prompt_id", pa.string(), nullable=False),
    pa.field("k", pa.int32(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
)
IDENTITY = tuple(column.name for column in IDENTITY_FIELDS)
VERDICT_SCHEMA = pa.schema(
    [
        *IDENTITY_FIELDS,
        pa.field("score", pa.float64()),
        pa.field("ranked_by", pa.float64()),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
        pa.field("reason", pa.dictionary(pa.int8(), pa.string()), nullable=False),
        pa.field("cut_off", pa.bool_()),
    ]
)


def samples_table(samples: Iterable[Sample], payload: pa.Schema) -> pa.Table:
    """One row a sample, in the given order; `payload` has the family's columns, `completion` among them."""
    columns = (pa.field("seed", pa.int64()), pa.field("version", pa.string(), nullable=False))
    rows = [
        {
            "sample_id": s.id,
            "prompt_id": s.prompt_id,
            "k": s.k,
            "source": s.source,
            "seed": s.seed,
            "version": s.version,
            "completion": s.completion,
            **s.payload,
        }
        for s in samples
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema([*IDENTITY_FIELDS, *columns, *payload]))


def scores_table(
    samples: pa.Table, scores: Sequence[Score], names: Sequence[str], extras: Mapping[str, list[Any]] | None = None
) -> pa.Table:
    """One row a score, beside the identity of its sample; `samples` is the chunk file of samples, row for row.

    `extras` are columns that rewards logged, each value as JSON text: a reward may log numbers here and texts there.
    """
    columns: list[tuple[pa.Field, Any]] = [(column, samples.column(column.name)) for column in IDENTITY_FIELDS]
    columns.append((pa.field("score", pa.float64()), [s.value for s in scores]))
    columns.append((pa.field("status", pa.string(), nullable=False), [s.status.value for s in scores]))
    for name in names:
        columns.append((pa.field(f"rewards/{name}", pa.float64()), [s.parts[name].value for s in scores]))
        columns.append((pa.field(f"status/{name}", pa.string()), [s.parts[name].status.value for s in scores]))
    details = [s.detail or "; ".join(f"{n}: {p.detail}" for n, p in s.parts.items() if p.detail) for s in scores]
    columns.append((pa.field("detail", pa.string(), nullable=False), details))
    for name, values in sorted((extras or {}).items()):
        texts = [None if value is None else json_text(value) for value in values]
        columns.append((pa.field(f"{EXTRA}{name}", pa.string()), texts))
    return pa.table({field.name: values for field, values in columns}, schema=pa.schema([f for f, _ in columns]))


def json_text(value: Any) -> str:
    """The value as JSON, other types as their text. Equal values give equal texts in every process."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=_known_to_json)
    except (TypeError, ValueError, RecursionError):  # keys that are no texts, a list that holds itself
        text = json.dumps(_without_address(value), ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()


def _known_to_json(value: Any) -> Any:
    if isinstance(value, set | frozenset):  # the order of a set's texts is another in every process
        return sorted(value, key=json_text)
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        return value.tolist()
    return _without_address(value)


def _without_address(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))


def extras_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What rewards logged of the sample in this row of a chunk file of scores, by name."""
    return {
        name.removeprefix(EXTRA): None if value is None else json.loads(value)
        for name, value in row.items()
        if name.startswith(EXTRA)
    }


def prompt_ids(contents: Iterable[PromptContent]) -> list[str]:
    """For each prompt the hash of its content and its occurrence number: equal prompts get distinct, stable ids."""
    seen: dict[str, int] = {}
    ids = []
    for content in contents:
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        digest = hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        occurrence = seen[digest] = seen.get(digest, -1) + 1
        ids.append(f"{digest}-{occurrence}")
    return ids


_COMPACT = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would build an encoder for each sample


def derive_seed(*parts: str | int) -> int:
    """A seed in [0, 2**63) that depends on every part and on nothing else (BLAKE2b)."""
    return int.from_bytes(hashlib.blake2b(_COMPACT(parts).encode(), digest_size=8).digest(), "big") >> 1


def content_hash(completion: Any) -> int:
    """A 64-bit hash by which identical completions of a prompt are found."""
    data = completion if isinstance(completion, bytes) else str(completion).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
