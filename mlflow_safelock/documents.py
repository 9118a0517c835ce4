"""Strict YAML documents: every key once, no unknown keys, no coercion, and errors that name the line."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from mlflow_safelock.errors import SafelockError

T = TypeVar("T", bound=BaseModel)


def parse_document(text: str, form: type[T] | TypeAdapter[T], origin: str, error: type[SafelockError]) -> T:
    """Read a YAML document of one form.

    Args:
        text: The document.
        form: What it must be: a pydantic model, or an adapter for a union of models.
        origin: Names the document in errors, such as its path.
        error: The error to raise.

    Raises:
        SafelockError: Of the type ``error``: no YAML, a key twice, an anchor, an unknown key, a wrong type or
            value; every fault with its line.
    """
    root, values = load_yaml(text, origin, error)
    adapter = form if isinstance(form, TypeAdapter) else TypeAdapter(form)
    try:
        # By way of JSON, because pydantic's strict mode takes a JSON array for a tuple.
        return adapter.validate_json(json.dumps(values), strict=True)
    except ValidationError as fault:
        faults = "; ".join(
            f"line {_line(root, one['loc'])}, {_path(one['loc'])}: {one['msg']}" for one in fault.errors()
        )
        raise error(f"{origin} is not valid: {faults}.") from fault


def load_yaml(text: str, origin: str, error: type[SafelockError]) -> tuple[yaml.Node | None, Any]:
    """The node tree of a YAML document, which knows lines, and its plain values.

    Raises:
        SafelockError: Of the type ``error``: no YAML, a key twice, or an anchor.
    """
    loader = _StrictLoader(text)
    try:
        root = loader.get_single_node()
        return root, None if root is None else loader.construct_document(root)
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise error(f"{origin} cannot be read: {line}{fault.problem or fault.context}.") from fault
    except yaml.YAMLError as fault:
        raise error(f"{origin} cannot be read: {fault}.") from fault
    finally:
        loader.dispose()


class _StrictLoader(yaml.SafeLoader):
    """YAML's plain values only: no dates, no anchors, no key twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are not allowed here",
                problem_mark=self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(problem="a key must be a string", problem_mark=key_node.start_mark)
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key_node.value!r} stands here twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _line(root: yaml.Node | None, path: tuple[int | str, ...]) -> int:
    """Line of the innermost value on the path that the document has; of the key itself where it has one."""
    line, node = 1, root
    for part in path:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == part), None)
            if found is None:
                continue  # a part that names a union's member, or a missing key
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def _path(path: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in path) or "document"
