"""Configuration of models and strategies: one JSON file per model, typed and validated, and the command line flags."""

from config.cli import add_config_args, config_from_args
from config.config import cluster_counts, generate_config, load_config
from config.eviction import EVICTING, CircuitKVConfig, EvictionConfig
from config.schema import (
    ATTENTION_TYPES,
    ESTIMATIONS,
    RETRIEVAL_STRATEGIES,
    FlatConfig,
    GraphConfig,
    HNSWConfig,
    IVFConfig,
    RetroInferConfig,
    resolve_strategy,
    with_estimation,
)
from config.section import ConfigError

__all__ = [
    "ATTENTION_TYPES",
    "ESTIMATIONS",
    "EVICTING",
    "RETRIEVAL_STRATEGIES",
    "CircuitKVConfig",
    "ConfigError",
    "EvictionConfig",
    "FlatConfig",
    "GraphConfig",
    "HNSWConfig",
    "IVFConfig",
    "RetroInferConfig",
    "add_config_args",
    "cluster_counts",
    "config_from_args",
    "generate_config",
    "load_config",
    "resolve_strategy",
    "with_estimation",
]
