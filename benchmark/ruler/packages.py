"""Installed packages at the versions that samples depend on; their data files are read, their code is not imported."""

from __future__ import annotations

from importlib import metadata


def pinned(package: str, version: str, remedy: str, any_version: bool = False) -> metadata.Distribution:
    """An installed package. Raises ModuleNotFoundError where it is missing, ValueError for another version unless
    `any_version`; both end with `remedy`.
    """
    try:
        found = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise ModuleNotFoundError(f"{package} is missing: {remedy}") from None
    if found.version != version and not any_version:
        raise ValueError(f"{package}: got version {found.version}, allowed: {version}: {remedy}")
    return found
