"""What folders were made with: settings side by side, and which of them must not differ within a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .load import Folder

# of a strategy nothing but the speed, or stated by the results themselves
_NO_MATTER = frozenset({"RetroInfer.core", "RetroInfer.retrieval_strategy"})
# made by generate_config from the context length
_FOLLOW_LENGTH = frozenset({"RetroInfer.n_centroids", "RetroInfer.n_segment", "RetroInfer.buffer_cluster_num"})


def flat_settings(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as one level, {"RetroInfer.attention_aware_graph.top_k": "100"}: texts as they are, "none" for
    null, all else as JSON."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat.update(flat_settings(value, f"{prefix}{key}."))
        elif value is None:
            flat[prefix + key] = "none"
        else:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def side_by_side(settings: Sequence[dict[str, str]]) -> tuple[dict[str, str], dict[str, list[str | None]]]:
    """(settings that are equal in all, values of the others in each; None where one has no such setting)."""
    keys = list(dict.fromkeys(key for each in settings for key in each))
    columns = {key: [each.get(key) for each in settings] for key in keys}
    equal = {key: values[0] for key, values in columns.items() if values[0] is not None and len(set(values)) == 1}
    return equal, {key: values for key, values in columns.items() if key not in equal}


def mixed_settings(folders: Sequence[Folder]) -> dict[str, list[str | None]]:
    """Settings other than the length, and what follows from it, that differ between folders of one table."""
    _, differing = side_by_side([flat_settings(folder.protocol) for folder in folders])
    mixed = {}
    for key, values in differing.items():
        if key == "length" or key in _NO_MATTER:
            continue
        if key in _FOLLOW_LENGTH:
            pairs = {(folder.length, value) for folder, value in zip(folders, values, strict=True)}
            if len(pairs) == len({length for length, _ in pairs}):
                continue
        mixed[key] = values
    return mixed
