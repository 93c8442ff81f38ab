"""Builds the native code (csrc/) as cache_hub.index._native; all other metadata is in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "cache_hub.index._native",
            sources=[
                "csrc/bindings.cpp",
                "csrc/bindings_search.cpp",
                "csrc/co_occurrence.cpp",
                "csrc/graph_build.cpp",
                "csrc/graph_insert.cpp",
                "csrc/graph_search.cpp",
                "csrc/links.cpp",
                "csrc/nearest.cpp",
                "csrc/prune.cpp",
                "csrc/retrieve.cpp",
                "csrc/rows.cpp",
                "csrc/rows_avx2.cpp",
                "csrc/rows_avx512.cpp",
                "csrc/selection.cpp",
                "csrc/selection_avx512.cpp",
                "csrc/tiles_amx.cpp",
                "csrc/tiles_float.cpp",
            ],
            depends=[
                "csrc/bindings.h",
                "csrc/clones.h",
                "csrc/co_occurrence.h",
                "csrc/graph.h",
                "csrc/graph_insert.h",
                "csrc/graph_search.h",
                "csrc/links.h",
                "csrc/members.h",
                "csrc/nearest.h",
                "csrc/prune.h",
                "csrc/reachability.h",
                "csrc/retrieve.h",
                "csrc/row_kernels.h",
                "csrc/rows.h",
                "csrc/selection.h",
                "csrc/thread_pool.h",
                "csrc/tile_kernels.h",
            ],
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=["-O3", "-fopenmp-simd", "-fno-math-errno", "-Wall"],
        )
    ],
)
