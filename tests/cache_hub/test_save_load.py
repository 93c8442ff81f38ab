"""Saved indexes: what was saved is found again bit for bit, and nothing else is taken for it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_files import DIGEST, damage, mapped_files, replace_tensor, same, seal
from torch import Tensor

from cache_hub.index import INDEXES, SearchResult, TokenIndex, make_index
from cache_hub.index.persistence import load_index
from cache_hub.index.tensor_file import check_file, open_tensors, take, write_tensors

ROWS, GROUP, DIM = 2, 3, 16
OPTIONS: dict[str, dict[str, Any]] = {
    "attention_aware_graph": {"index_dtype": "auto", "key_degree": 8, "key_links": 4, "num_entries": 6},
    "ivf": {},
    "hnsw": {"m": 4},
    "flat": {},
}


def states(n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, prompt queries of as many positions, and extra."""
    generator = torch.Generator().manual_seed(n)
    keys, queries = (
        torch.randn(ROWS, n, DIM, generator=generator),
        torch.randn(ROWS, GROUP, n, DIM, generator=generator),
    )
    return keys.to(dtype), queries.to(dtype), torch.rand(ROWS, n, generator=generator)


def built(strategy: str, n: int = 300, dtype: torch.dtype = torch.float32, lifted: bool = False, **options: Any) -> Any:
    keys, queries, extra = states(n, dtype)
    index = make_index(strategy, **{**OPTIONS[strategy], **options})
    index.build(keys, queries, torch.arange(n), extra if lifted else None)
    return index, keys, extra if lifted else None


def found(index: TokenIndex, k: int = 20) -> SearchResult:
    return index.search(torch.randn(ROWS, GROUP, DIM, generator=torch.Generator().manual_seed(1)), k)


def assert_same(left: SearchResult, right: SearchResult) -> None:
    for name in ("ids", "scores", "keys_scored"):
        assert same(getattr(left, name), getattr(right, name)), name


@pytest.mark.parametrize("lifted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 7, 300])
@pytest.mark.parametrize("strategy", INDEXES)
def test_a_loaded_index_finds_the_same(strategy: str, n: int, dtype: torch.dtype, lifted: bool, tmp_path: Path) -> None:
    index, keys, extra = built(strategy, n, dtype, lifted)
    digest = index.save(tmp_path / "index")
    assert check_file(tmp_path / "index") == digest
    loaded = type(index).load(tmp_path / "index", keys, extra)
    assert_same(found(index), found(loaded))
    assert (loaded.nbytes, loaded.all_options()) == (index.nbytes, index.all_options())
    # What was loaded can be saved again, to the same bytes.
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "index").read_bytes()


@pytest.mark.parametrize("index_dtype", ["bfloat16", "int8"])
def test_the_compact_copy_of_the_keys_is_saved_with_the_graph(tmp_path: Path, index_dtype: str) -> None:
    index, keys, _ = built("attention_aware_graph", index_dtype=index_dtype)
    index.save(tmp_path / "index")
    loaded = type(index).load(tmp_path / "index", keys)
    assert_same(found(index), found(loaded))
    assert loaded.nbytes == index.nbytes
    assert loaded.keys.dtype == (torch.bfloat16 if index_dtype == "bfloat16" else torch.float32)


def test_links_of_more_than_one_segment(tmp_path: Path) -> None:
    n = 66000
    keys, queries = torch.randn(1, n, 4), torch.randn(1, 1, 200, 4)
    index = make_index("attention_aware_graph", key_degree=8, key_links=0, q_knn=4, index_dtype="auto")
    index.build(keys, queries)
    index.save(tmp_path / "index")
    loaded = type(index).load(tmp_path / "index", keys)
    assert index.links.segments == loaded.links.segments == 2
    assert same(index.links.data, loaded.links.data)
    # One link too many in the counts of a key's segments would lead the search out of its row.
    data = index.links.data.clone()
    data.view(torch.uint8)[0, 65999, :2] = torch.tensor([7, 1], dtype=torch.uint8)
    replace_tensor(tmp_path / "index", "links", data)
    with pytest.raises(ValueError, match="links: got more than 7 of a key"):
        type(index).load(tmp_path / "index", keys)


def test_large_tables_are_mapped_and_never_written(tmp_path: Path) -> None:
    index, keys, _ = built("attention_aware_graph", index_dtype="bfloat16")
    digest = index.save(tmp_path / "index")
    loaded = type(index).load(tmp_path / "index", keys)
    for table in (loaded.links.data, loaded.entries, loaded.keys):
        assert mapped_files(table) == ["index"]
    assert not mapped_files(index.links.data)
    assert loaded.links.data.data_ptr() % 64 == 0
    loaded.links.data.zero_()
    assert check_file(tmp_path / "index") == digest


def test_options_of_the_search_may_change_those_of_the_build_may_not(tmp_path: Path) -> None:
    index, keys, _ = built("attention_aware_graph", ef_search=30)
    index.save(tmp_path / "index")
    wide, _, _ = built("attention_aware_graph", ef_search=90)
    assert_same(found(type(index).load(tmp_path / "index", keys, ef_search=90)), found(wide))
    with pytest.raises(ValueError, match="key_links: got 2, allowed: 4"):
        type(index).load(tmp_path / "index", keys, key_links=2)
    with pytest.raises(ValueError, match="options: got beam, allowed: q_knn, query_stride"):
        type(index).load(tmp_path / "index", keys, beam=2)


def other_keys(keys: Tensor) -> Tensor:
    changed = keys.clone()
    changed[1, 0, 0] += 1
    return changed


@pytest.mark.parametrize("strategy", INDEXES)
@pytest.mark.parametrize(
    "change", [other_keys, lambda keys: keys[:, 1:], lambda keys: keys[:1], lambda keys: keys.bfloat16()]
)
def test_other_keys_are_refused(strategy: str, change: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    index, keys, _ = built(strategy)
    index.save(tmp_path / "index")
    with pytest.raises(ValueError, match="keys: got"):
        type(index).load(tmp_path / "index", change(keys))
    with pytest.raises(ValueError, match="keys: got"):
        type(index).load(tmp_path / "index", keys, torch.zeros(keys.shape[:2]))


def test_another_strategy_or_version_or_kind_of_file_is_refused(tmp_path: Path) -> None:
    index, keys, _ = built("flat")
    index.save(tmp_path / "index")
    with pytest.raises(ValueError, match="got an index of flat, allowed: ivf"):
        INDEXES["ivf"].load(tmp_path / "index", keys)
    write_tensors(tmp_path / "newer", {}, {"format": "token index", "version": 2})
    with pytest.raises(ValueError, match="got token index version 2, allowed: token index version 1"):
        INDEXES["flat"].load(tmp_path / "newer", keys)
    (tmp_path / "text").write_text("something else" * 20)
    with pytest.raises(ValueError, match="another kind"):
        INDEXES["flat"].load(tmp_path / "text", keys)
    with pytest.raises(FileNotFoundError):
        INDEXES["flat"].load(tmp_path / "nothing", keys)
    with pytest.raises(FileExistsError):
        index.save(tmp_path / "index")


def full(tensor: Tensor, value: int) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1:] = value
    return changed


@pytest.mark.parametrize(
    ("strategy", "name", "change", "message"),
    [
        ("attention_aware_graph", "links", lambda t: full(t, 300), "links: got ids .* to 300, allowed: -1 to 299"),
        ("attention_aware_graph", "links", lambda t: t[..., :4], "links: got"),
        ("attention_aware_graph", "links", lambda t: t.int(), "links: got torch.int32"),
        ("attention_aware_graph", "links", lambda t: None, "links: got"),
        ("attention_aware_graph", "entries", lambda t: full(t, 300), "entries: got ids .* to 300"),
        ("attention_aware_graph", "entries", lambda t: full(t, -2), "entries: got ids -2"),
        ("attention_aware_graph", "entries", lambda t: torch.full_like(t, -1), "first entries: got ids -1"),
        ("attention_aware_graph", "entries", lambda t: None, "entries: missing"),
        ("attention_aware_graph", "mean", lambda t: None, "mean: missing"),
        ("attention_aware_graph", "mean", lambda t: t / 0, "mean: got NaN or infinite"),
        ("attention_aware_graph", "root", lambda t: t[:, 1:], "root: got"),
        ("attention_aware_graph", "root", lambda t: t * float("nan"), "root: got NaN or infinite"),
        ("ivf", "lists.1", lambda t: full(t, 99), "lists: got ids 0 to 99"),
        ("ivf", "lists.1", lambda t: full(t, -1), "lists: got ids -1"),
        ("ivf", "centroids.0", lambda t: t[1:], "lists: got ids"),
        ("ivf", "centroids.0", lambda t: t[:, 1:], "centroids: got"),
        ("ivf", "centroids.0", lambda t: None, "centroids: missing"),
        ("hnsw", "neighbors.1", lambda t: full(t, 300), "neighbors: got ids .* to 300"),
        ("hnsw", "neighbors.1", lambda t: t[1:], "neighbors: got"),
        ("hnsw", "levels.0", lambda t: full(t, 9), r"neighbors: got|levels: got"),
        ("hnsw", "levels.0", lambda t: full(t, 0), "levels: got ids 0"),
        ("hnsw", "entry.0", lambda t: t * 0 + 300, "entry: got ids 300"),
    ],
)
def test_tables_that_lead_nowhere_are_refused(
    strategy: str, name: str, change: Callable[[Tensor], Tensor | None], message: str, tmp_path: Path
) -> None:
    """Even with a right digest: the native code believes every id."""
    index, keys, _ = built(strategy)
    index.save(tmp_path / "index")
    replace_tensor(tmp_path / "index", name, change(open_tensors(tmp_path / "index")[0][name].clone()))
    with pytest.raises(ValueError, match=message):
        type(index).load(tmp_path / "index", keys)


def test_hnsw_links_stay_within_their_levels(tmp_path: Path) -> None:
    index, keys, _ = built("hnsw")
    index.save(tmp_path / "index")
    tensors, _ = open_tensors(tmp_path / "index")
    levels, neighbors = tensors["levels.0"].clone(), tensors["neighbors.0"].clone()
    low = int((levels == 1).nonzero()[0])
    high = int((levels > 1).nonzero()[0])
    places = torch.where(levels > 1, 8 + 4 * (levels - 1), 8)
    neighbors[int(places[:high].sum()) + 8] = low
    replace_tensor(tmp_path / "index", "neighbors.0", neighbors)
    with pytest.raises(ValueError, match="a link to a key that its level does not have"):
        type(index).load(tmp_path / "index", keys)


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("strategy", INDEXES)
def test_a_damaged_index_never_crashes(strategy: str, sealed: bool, tmp_path: Path) -> None:
    """Refused; or, where the digest was made right again, at least no id leads anywhere but to a key."""
    index, keys, _ = built(strategy)
    index.save(tmp_path / "index")
    refused = 0
    for seed in range(60):
        shutil.copy(tmp_path / "index", tmp_path / "damaged")
        damage(tmp_path / "damaged", seed)
        if sealed:
            seal(tmp_path / "damaged")
        try:
            loaded = type(index).load(tmp_path / "damaged", keys)
        except ValueError:
            refused += 1
            continue
        assert sealed, f"seed {seed} was not noticed"
        ids = found(loaded).ids
        assert -1 <= int(ids.min()) <= int(ids.max()) < keys.shape[1]
    assert refused == 60 or (sealed and refused > 10)


def test_every_byte_of_a_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "file"
    digest = write_tensors(path, {"a": torch.arange(5), "b": torch.ones(3, 2, dtype=torch.bfloat16)}, {"c": [1, "ä"]})
    whole = path.read_bytes()
    assert whole[DIGEST].decode() == digest == check_file(path) == seal(path)
    tensors, description = open_tensors(path)
    assert same(tensors["a"], torch.arange(5))
    assert description == {"c": [1, "ä"]}
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="file: got"):
            check_file(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="file: got"):
            check_file(path)


def test_taking_a_tensor_of_another_type_or_shape() -> None:
    tensors = {"a": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"a: got torch.float32 \[2, 3\], allowed: torch.float32 \[2, 4\]"):
        take(dict(tensors), "a", (2, 4), torch.float32)
    with pytest.raises(ValueError, match=r"allowed: torch\.int32"):
        take(dict(tensors), "a", (2, 3), torch.int32)
    with pytest.raises(ValueError, match="b: missing"):
        take(dict(tensors), "b", (None,), torch.int32)
    assert take(tensors, "a", (None, 3), torch.float32).shape == (2, 3)
    assert not tensors


def test_bytes_checked_before_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, keys, _ = built("flat")
    index.save(tmp_path / "index")
    monkeypatch.setattr("cache_hub.index.persistence.check_file", lambda path: pytest.fail("read twice"))
    load_index(type(index), tmp_path / "index", keys, None, None, {}, checked=True)
