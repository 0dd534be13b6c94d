"""The doctor reports what is there, and survives what is broken."""

import json
import sys
import types

import pytest
import torch

from fastkd.cli import doctor
from fastkd.cli.doctor import as_text, facts


def part(name, found=None):
    return next(p for p in (found or facts())["parts"] if p["name"] == name)


def test_the_report_names_versions_devices_and_parts():
    text = as_text(facts())
    assert isinstance(text, str)
    for word in ("fastkd ", "Python 3.", f"torch {torch.__version__}", "CPU ", "GPU "):
        assert word in text
    for name in ("C++ core", "Triton", "DALI", "apex", "onnxruntime", "Ray", "submitit", "wandb"):
        assert f"] {name}" in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_json_report_is_plain_data():
    found = facts()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert {"name", "found", "usable", "used_for", "advice"} == set(found["parts"][0])


def test_what_is_missing_says_how_to_get_it(monkeypatch):
    for name in ("triton", "nvidia.dali", "apex"):
        monkeypatch.setitem(sys.modules, name, None)
    found = facts()
    assert not part("DALI", found)["usable"]
    advice = part("DALI", found)["advice"]
    assert advice.startswith('not installed; pip install "fastkd[dali]"')
    assert "fastkd[dali-cuda12]" in advice
    assert "the apex on PyPI is another project" in part("apex", found)["advice"]
    assert part("Triton", found)["advice"].startswith("not installed")


@pytest.mark.parametrize("error", [OSError("libcuda.so.1: cannot open"), SystemExit(3)], ids=repr)
def test_a_broken_package_is_reported_in_place(monkeypatch, error):
    import_module = doctor.importlib.import_module

    def broken(name):
        if name in ("triton", "nvidia.dali", "fastkd.kernels", "apex.optimizers"):
            raise error if name != "fastkd.kernels" else ImportError("the library is too old")
        return import_module(name)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    found = facts()
    assert f"broken: {type(error).__name__}: {error}" in part("Triton", found)["advice"]
    assert f"broken: {type(error).__name__}: {error}" in part("DALI", found)["advice"]
    assert not part("apex", found)["usable"]
    assert part("C++ core", found)["advice"] == "ImportError: the library is too old"
    assert as_text(facts())


def test_a_package_without_one_of_its_own_parts_is_broken_not_missing(monkeypatch):
    def import_module(name):
        raise ModuleNotFoundError("No module named 'cuda'", name="cuda")

    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    assert part("DALI")["advice"].startswith("broken: ModuleNotFoundError: No module named 'cuda'")


def install_kernels(monkeypatch, **backends):
    kernels = types.ModuleType("fastkd.kernels")
    kernels.status = lambda: {"kd_loss": {"cuda": "triton", "reason": ""} | backends}
    monkeypatch.setitem(sys.modules, "fastkd.kernels", kernels)


def test_the_core_is_asked_for_what_it_runs(monkeypatch):
    install_kernels(monkeypatch, cpu="c++ (avx2)")
    core = part("C++ core")
    assert (core["usable"], core["found"], core["advice"]) == (True, "(avx2)", "")
    assert "kd_loss                cpu: c++ (avx2), cuda: triton" in as_text(facts())


def test_without_the_core_the_doctor_says_why_and_what_runs(monkeypatch):
    why = "C++ core not built: install a C++17 compiler, then run `pip install -e .` again"
    install_kernels(monkeypatch, cpu=f"reference ({why})", reason=why)
    core = part("C++ core")
    assert not core["usable"]
    assert core["advice"] == f"{why}; until then plain torch runs: same numbers, slower"
    assert "kd_loss                cpu: reference, cuda: triton" in as_text(facts())


def test_gpus_and_bf16_are_named(monkeypatch):
    gpu = types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=150 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    text = as_text(facts())
    assert "GPU 0 NVIDIA H200, 150.0 GiB, sm_90" in text
    assert "computes in bf16" in text
    assert part("Triton")["usable"]
