"""Examination of this machine: packages, devices, compiler, disk and weights cache."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import h5py
import torch

from dragn_cache.extraction.estimate import existing_folder
from dragn_cache.extraction.forward import can_compile
from dragn_cache.machine import find_compiler, usable_cores

NEEDED = ("torch", "torchvision", "numpy", "h5py", "zarr", "pillow", "tifffile", "imagecodecs")
EXTRAS = ("anndata",)


@dataclass(frozen=True)
class Finding:
    """One line of the examination; ``remedy`` is empty where all is well."""

    what: str
    found: str
    remedy: str = ""


def examine(out: Path) -> list[Finding]:
    """Python, packages, devices, compiler, disk and weights cache."""
    findings = [
        Finding("python", f"{platform.python_version()} on {platform.platform()}"),
        Finding("processor", f"{usable_cores()} cores, {_memory()} of memory"),
    ]
    for name in NEEDED:
        findings.append(_package(name, f"pip install {name}"))
    for name in EXTRAS:
        findings.append(_package(name, f'pip install "dragn-cache[{name}]" to use it'))
    findings.append(Finding("HDF5", h5py.version.hdf5_version))
    findings.append(_cuda())
    compiler = find_compiler()
    remedy = "" if compiler else "apt install g++: large extractions and DRAGN are faster"
    findings.append(Finding("C++ compiler", compiler or "none", remedy))
    findings.append(_disk(out))
    findings.append(_weights())
    return findings


def _package(name: str, remedy: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", remedy)


def _memory() -> str:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return f"{pages * size / 1e9:.1f} GB"


def _cuda() -> Finding:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return Finding("GPU", f"none that torch can use (built for {built or 'the CPU only'})")
    devices = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
    names = ", ".join(
        f"cuda:{k} {d.name} {d.total_memory / 1e9:.0f} GB" for k, d in enumerate(devices)
    )
    remedy = (
        "" if can_compile("cuda") else "install Triton and a C++ compiler, to have jobs compiled"
    )
    return Finding("GPU", names, remedy)


def _disk(out: Path) -> Finding:
    folder = existing_folder(out)
    usage = shutil.disk_usage(folder)
    writable = os.access(folder, os.W_OK)
    remedy = "" if writable else "choose another folder, or correct its rights"
    text = f"{usage.free / 1e9:.1f} GB free of {usage.total / 1e9:.1f} GB at {folder}"
    return Finding("disk", text if writable else f"{text}, not writable", remedy)


def _weights() -> Finding:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    files = [p for p in folder.iterdir() if p.is_file()] if folder.is_dir() else []
    size = sum(p.stat().st_size for p in files)
    return Finding("weights", f"{len(files)} files, {size / 1e6:.0f} MB in {folder}")
