"""What is wrong with a configuration, in words a person can act on.

pydantic's errors → one line each: dotted path, what is wrong, the valid values, the nearest name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

_QUOTE_LIMIT = 60
_ALSO = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "a mapping",
}
"""What else may stand where a union takes one of a few names, by the error of the other branch."""
_OF_THE_RIGHT_TYPE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}


def describe(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """One line for every problem pydantic found, in the order of the file; no line twice."""
    found = [dict(problem) for problem in error.errors(include_url=False)]
    return list(dict.fromkeys(_line(problem, root) for problem in _one_of_each(found, root)))


def nearest(name: str, names: Iterable[str]) -> str:
    """`" Did you mean 'x'?"`, or nothing when no name is near."""
    match = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""


def _one_of_each(
    problems: Sequence[dict[str, Any]], root: type[BaseModel]
) -> Iterator[dict[str, Any]]:
    """The problems without those of a union's other branches.

    Where one of a few names may stand, or something else, pydantic complains of both.
    """
    paths = [_walk(tuple(problem["loc"]), root)[0] for problem in problems]
    for problem, path in zip(problems, paths, strict=True):
        others = [o for o, p in zip(problems, paths, strict=True) if p == path and o is not problem]
        if problem["type"] == "literal_error":
            inner = any(p.startswith(f"{path}.") for p in paths)
            if isinstance(problem["input"], (dict, list)) and (others or inner):
                continue
            if any(o["type"] in _OF_THE_RIGHT_TYPE for o in others):
                continue  # the other branch was meant, and knows better
            names = [o["ctx"]["expected"] for o in others if o["type"] == "literal_error"]
            if names and problem is not next(
                p for p, at in zip(problems, paths, strict=True)
                if at == path and p["type"] == "literal_error"
            ):  # fmt: skip
                continue  # said with the first branch
            also = [_ALSO[o["type"]] for o in others if o["type"] in _ALSO]
            expected = ", or ".join([problem["ctx"]["expected"], *names, *also])
            yield {**problem, "ctx": {"expected": expected}}
        elif not (
            problem["type"] in _ALSO
            and any(o["type"] == "literal_error" and not isinstance(o["input"], (dict, list))
                    for o in others)
        ):  # fmt: skip
            yield problem


def _line(problem: dict[str, Any], root: type[BaseModel]) -> str:
    location = tuple(problem["loc"])
    kind, context = problem["type"], problem.get("ctx") or {}
    path, models = _walk(location, root)
    if kind == "extra_forbidden":
        valid = sorted({name for model in models for name in model.model_fields})
        key = str(location[-1])
        near = nearest(key, valid) or _elsewhere(key, root)
        return f"{path}: unknown key.{near} Valid here: {', '.join(valid)}"
    if kind == "missing":
        return f"{path}: this key is required"
    if kind == "literal_error":
        given = problem["input"]
        valid_text = context.get("expected", "")
        near = nearest(str(given), _unquote(valid_text)) if isinstance(given, str) else ""
        return f"{path}: {_quote(given)} is not valid; valid: {valid_text}.{near}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        valid_text = context.get("expected_tags", "")
        given = context.get("tag", "")
        near = nearest(given, _unquote(valid_text))
        label = f"{given!r} is not valid" if given else "this key is required"
        return f"{path}.adapter: {label}; valid: {valid_text}.{near}"
    if kind == "value_error":
        return f"{path}: {context.get('error', problem['msg'])}" if path else str(context["error"])
    message = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"{path}: {message}, not {_quote(problem['input'])}"


def _elsewhere(key: str, root: type[BaseModel]) -> str:
    """`" There is sft.packing."`, or nothing when no section has a key of this name."""
    found = [
        f"{section}.{key}"
        for section, field in root.model_fields.items()
        if any(key in model.model_fields for model in _models([field.annotation]))
    ]
    return f" There is {' and '.join(found)}." if found else ""


def _unquote(expected: str) -> list[str]:
    return [part.strip(" '") for part in expected.replace(" or ", ",").split(",")]


def _quote(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _QUOTE_LIMIT else text[: _QUOTE_LIMIT - 1] + "…"


def _walk(location: tuple[Any, ...], root: type[BaseModel]) -> tuple[str, list[type[BaseModel]]]:
    """The dotted path as a user writes it, and the models whose keys are valid at its last step.

    pydantic puts the names of union branches into a location; those that are no key of the model
    reached so far are left out of the path.
    """
    path: list[str] = []
    here: list[type[BaseModel]] = [root]
    pending: list[Any] = []
    for position, step in enumerate(location):
        last = position == len(location) - 1
        fields = {name: f.annotation for model in here for name, f in model.model_fields.items()}
        if isinstance(step, int):
            path.append(str(step))
            here = _models(pending)
        elif step in fields:
            path.append(step)
            pending = [fields[step]]
            here = here if last else _models(pending)
        elif tagged := [m for m in here if _tag(m) == step or m.__name__ == step]:
            here = tagged
        elif last and not _is_branch(step):
            path.append(str(step))
    return ".".join(path), here


def _is_branch(step: Any) -> bool:
    text = str(step)
    return text in {"str", "int", "float", "bool"} or text.startswith("constrained-") or "[" in text


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("adapter")
    return get_args(field.annotation)[0] if field and get_args(field.annotation) else None


def _models(annotations: Iterable[Any]) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = []
    for annotation in annotations:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        elif get_origin(annotation) in (list, dict, tuple, Union, UnionType, Annotated):
            found.extend(_models(get_args(annotation)))
    return found
