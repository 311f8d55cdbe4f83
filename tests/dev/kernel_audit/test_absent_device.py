"""A GPU is pretended inside, and nothing of it is left outside."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.device_interface import device_interfaces, get_interface_for_device
from torch.utils._triton import has_triton

from smc_compile.dev.kernel_audit import absent_device as file
from smc_compile.dev.kernel_audit.absent_device import TARGETS, absent_device, device_memory_on_the_host, target_named
from smc_compile.errors import OptionError, SMCError


def test_what_the_compilers_ask_is_answered_for_the_target_and_given_back():
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.runtime import driver

    get_interface_for_device("cpu")
    before = dict(device_interfaces), has_triton(), torch.cuda.is_available(), torch.version.cuda, driver._active
    for name, capability in (("sm_80", (8, 0)), ("sm_90", (9, 0))):
        with absent_device(target_named(name)):
            assert has_triton()
            assert torch.cuda.get_device_capability() == capability
            properties = DeviceProperties.create(torch.device("cuda", 0))
            assert properties.cc == 10 * capability[0] + capability[1]
            assert properties.multi_processor_count == TARGETS[name].multi_processor_count
            assert driver.active.get_current_target().arch == properties.cc
    after = dict(device_interfaces), has_triton(), torch.cuda.is_available(), torch.version.cuda, driver._active
    assert after == before


def test_an_error_inside_leaves_nothing_either():
    before = torch.cuda.is_available(), torch.version.cuda, torch.cuda.set_device

    def fails() -> None:
        with absent_device(TARGETS["sm_90"]), device_memory_on_the_host():
            assert torch.cuda.is_available()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert (torch.cuda.is_available(), torch.version.cuda, torch.cuda.set_device) == before


def test_other_internals_are_told(monkeypatch):
    def moved(*_):
        raise AttributeError("no such name")

    monkeypatch.setattr(file, "_replace", moved)
    with pytest.raises(SMCError, match="no such name"), absent_device(TARGETS["sm_90"]):
        pass


def test_an_unknown_target_names_the_known():
    with pytest.raises(OptionError, match="sm_90"):
        target_named("sm_91")
