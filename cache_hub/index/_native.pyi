class KeyStore:
    def __init__(
        self,
        address: int,
        dtype: int,
        heads: int,
        n: int,
        dim: int,
        head_stride: int,
        row_stride: int,
        extra: int = 0,
        scales: int = 0,
    ) -> None: ...

def build(
    keys: KeyStore,
    query_lists: int,
    group: int,
    queries: int,
    list_width: int,
    key_lists: int,
    key_list_width: int,
    degree: int,
    query_links: int,
    co_occurrence: bool,
    num_entries: int,
    num_threads: int,
    adjacency: int,
    entries: int,
) -> int: ...
def repair(
    pivots: int,
    heads: int,
    group: int,
    queries: int,
    n: int,
    degree: int,
    num_entries: int,
    num_threads: int,
    adjacency: int,
    entries: int,
) -> int: ...
def insert(
    keys: KeyStore,
    before: int,
    queries: int,
    visible: int,
    group: int,
    count: int,
    lists: int,
    list_scores: int,
    list_width: int,
    near: int,
    near_width: int,
    mean: int,
    form: int,
    reciprocals: int,
    degree: int,
    query_links: int,
    co_occurrence: bool,
    num_entries: int,
    num_threads: int,
    links: int,
    slots: int,
    segments: int,
    entries: int,
) -> int: ...
def extend(
    keys: KeyStore, queries: int, visible: int, count: int, begin: int, k: int, ids: int, scores: int
) -> None: ...
def nearest(keys: KeyStore, queries: int, visible: int, count: int, k: int, kernel: int, ids: int) -> int: ...
def tile_kernels() -> list[str]: ...
def scan(keys: KeyStore, queries: int, group: int, k: int, num_threads: int, ids: int, scores: int) -> None: ...
def search(
    keys: KeyStore,
    links: int,
    slots: int,
    segments: int,
    entries: int,
    num_entries: int,
    queries: int,
    group: int,
    near: int,
    num_near: int,
    k: int,
    ef: int,
    num_threads: int,
    ids: int,
    scores: int,
    keys_scored: int,
    exact: KeyStore | None,
) -> None: ...

class GraphView:
    """The graphs of all kv heads of sequences that share an index, for Retrieving; it holds addresses and keeps nothing
    alive, and is made anew when the index has grown.

    keys, links, slots, segments, entries, num_entries, exact: as for `search`. first: added to ids, gives positions.
    assignment: address of the cluster of each indexed token, int32 [keys.heads, tokens], tokens >= keys.n; or 0.
    ValueError where it has too few tokens.
    """

    def __init__(
        self,
        keys: KeyStore,
        links: int,
        slots: int,
        segments: int,
        entries: int,
        num_entries: int,
        exact: KeyStore | None,
        first: int,
        assignment: int,
        tokens: int,
    ) -> None: ...

class Retrieving:
    """Searches for the `group` queries of each of R kv heads, the rows of all views in their order, and unites what
    they find. Other threads begin at once.

    Addresses of contiguous memory. In: queries [R, group, width] float32, width as KeyStore's dim, and 1 more with
    `extra`; near [R, group, near_stride] int32, of which the first num_near of a query head, -1 pads at the end, are
    ids to start from, or 0; it must not be in `ids`. keys_scored [R, group] int64 comes as the step before left it, or
    zeros, by which searches are dealt out, and goes with this step's. Out: ids [R, group, k] int32, best first, -1
    pads; positions [R, group * k] int32: each id of the group once, plus its view's `first`, in the order met, -1 pads;
    clusters likewise: the position's in its view's assignment, or 0. All must outlive this. The results are the same
    for any number of threads.

    foreseen, or 0: what the queries will be about, like them. Each search is first one for this, with a beam of
    foreseen_ef, and goes on for the query with all the keys that it has met, which are scored for both. posted, or 0:
    where a device writes the queries and `foreseen` meanwhile, like queries; a float32 of the bits 0xffffffff is not
    there yet. The searches wait, and in the end the queries go to `queries`, while both places get these bits again.

    ValueError for views of different widths, for clusters where a view has no assignment, for num_near that `near` has
    not, a negative foreseen_ef.
    """

    def __init__(
        self,
        views: list[GraphView],
        queries: int,
        group: int,
        near: int,
        near_stride: int,
        num_near: int,
        k: int,
        ef: int,
        num_threads: int,
        ids: int,
        keys_scored: int,
        positions: int,
        clusters: int,
        posted: int,
        foreseen: int,
        foreseen_ef: int,
    ) -> None: ...
    def finish(self) -> tuple[int, int, int]:
        """Joins in, waits, and returns how many keys were scored, how many positions there are, and for how many
        nanoseconds every thread waited for queries. -1 positions where something posted did not come within .1 s: then
        both places stay as they are."""

def row_kernels() -> list[str]: ...
def score(keys: KeyStore, kernel: int, query: int, ids: int, count: int, scores: int) -> None: ...
def pack_links(ids: int, rows: int, width: int, segments: int, slots: int, num_threads: int, out: int) -> None: ...
def unpack_links(links: int, rows: int, slots: int, segments: int, out: int) -> None: ...
def unite(ids: int, rows: int, width: int, first: int, positions: int) -> list[int]: ...
def trim_memory() -> None: ...
