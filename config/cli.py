"""The command line flags of the configuration."""

from __future__ import annotations

import argparse
import json
from typing import Any, Literal, get_origin

from pydantic.fields import FieldInfo

from config.config import generate_config, override_key, read_config
from config.schema import ATTENTION_TYPES, RETRIEVAL_STRATEGIES, GraphConfig, RetroInferConfig
from config.section import ConfigError, allowed_values

_GRAPH = "attention_aware_graph"
_RETROINFER_FLAGS = ("retrieval_budget", "estimation_budget", "cache_ratio", "use_cuda_graph", "gpu_only")
# The graph's estimation_budget is not the wave index's: --set reaches it.
_GRAPH_FLAGS = tuple(name for name in GraphConfig.model_fields if name not in _RETROINFER_FLAGS)


def add_config_args(parser: argparse.ArgumentParser) -> None:
    """Add RetroInfer's flags, --retrieval_strategy, one flag for each key of `GraphConfig`, and --set.

    A flag that is not given stays None, so that the value of the model's file holds.
    """
    group = parser.add_argument_group("configuration", "a flag not given keeps the value of config/<model>.json")
    group.add_argument(
        "--attn_type",
        default="RetroInfer",
        help=f"{', '.join(ATTENTION_TYPES)} (the configured strategy), or a strategy: "
        f"{', '.join(RETRIEVAL_STRATEGIES)} (default: RetroInfer)",
    )
    for name in (*_RETROINFER_FLAGS, "retrieval_strategy"):
        _add_flag(group, name, RetroInferConfig.model_fields[name])
    for name in _GRAPH_FLAGS:
        _add_flag(group, name, GraphConfig.model_fields[name])
    group.add_argument(
        "--set",
        action="append",
        type=_parse_setting,
        metavar="SECTION.KEY=VALUE",
        help="any other key, for example RetroInfer.core=8; VALUE is JSON or else text; may be repeated",
    )


def config_from_args(args: argparse.Namespace, model_name: str, context_len: int) -> dict[str, Any]:
    """`generate_config` for parsed flags: a flag wins over the model's file, the file over the default.

    Raises:
        ConfigError: as generate_config, and where a key is set twice, by a flag and --set or by two --set.
    """
    flags = {
        name: getattr(args, name)
        for name in (*_RETROINFER_FLAGS, "retrieval_strategy", *_GRAPH_FLAGS)
        if getattr(args, name) is not None
    }
    overrides = {f"{_GRAPH}.{name}": flags[name] for name in _GRAPH_FLAGS if name in flags}
    flag_keys = {key: f"--{key.rpartition('.')[2]}" for key in (*flags.keys() - set(_GRAPH_FLAGS), *overrides)}
    for full_key, value in args.set or ():
        key = override_key(full_key)
        for other, source in flag_keys.items():
            if key == other or key.startswith(f"{other}.") or other.startswith(f"{key}."):
                raise ConfigError(f"--set {full_key}: got {value!r}, but {source} sets it too; allowed: one of them")
        flag_keys[key] = f"--set {full_key}"
        overrides[key] = value

    section = read_config(model_name)["RetroInfer"]
    for name in _RETROINFER_FLAGS:
        flags.setdefault(name, section.get(name, RetroInferConfig.model_fields[name].default))
    return generate_config(
        model_name,
        context_len,
        args.attn_type,
        *(flags[name] for name in _RETROINFER_FLAGS),
        retrieval_strategy=flags.get("retrieval_strategy"),
        overrides=overrides,
    )


def _add_flag(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    default = f"default: the file's, {field.default!r} where it has none"
    text = f"{field.description} (allowed: {allowed_values(field)}; {default})".replace("%", "%%")
    if field.annotation is bool:
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=text)
    else:
        kind: Any = str if get_origin(field.annotation) is Literal else field.annotation
        group.add_argument(f"--{name}", type=kind, metavar=name.upper(), help=text)


def _parse_setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed: SECTION.KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
