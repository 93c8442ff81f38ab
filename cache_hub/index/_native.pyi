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
def row_kernels() -> list[str]: ...
def score(keys: KeyStore, kernel: int, query: int, ids: int, count: int, scores: int) -> None: ...
def pack_links(ids: int, rows: int, width: int, segments: int, slots: int, num_threads: int, out: int) -> None: ...
def unpack_links(links: int, rows: int, slots: int, segments: int, out: int) -> None: ...
def unite(ids: int, rows: int, width: int, first: int, positions: int) -> list[int]: ...
def take_away(
    values: KeyStore,
    assignment: int,
    tokens: int,
    sizes: int,
    clusters: int,
    positions: int,
    width: int,
    first: int,
    num_threads: int,
    touched: int,
    log_left: int,
    scale: int,
    lost_mean: int,
) -> int: ...
def trim_memory() -> None: ...
