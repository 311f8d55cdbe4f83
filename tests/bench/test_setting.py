"""What is printed before anything is timed."""

from __future__ import annotations

import pytest
import torch

from smc_compile.bench import setting


@pytest.mark.parametrize(("seconds", "warned"), [({"float32": 1.0, "bfloat16": 3.0}, True), ({"bfloat16": 0.5}, False)])
def test_a_type_that_the_processor_emulates_is_named(seconds, warned, monkeypatch):
    monkeypatch.setattr(setting, "product_seconds", lambda dtype, device: seconds.get(str(dtype)[6:], 1.0))
    lines = setting.emulated_dtype(torch.bfloat16, torch.device("cpu"))
    told = "this processor emulates bfloat16: torch's products take 3.0 times what float32 takes, ours do not"
    assert [line.partition(" (")[0] for line in lines] == ([told] if warned else [])
    assert setting.emulated_dtype(torch.float32, torch.device("cpu")) == []
