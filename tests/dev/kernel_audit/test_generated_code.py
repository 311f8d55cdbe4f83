"""Reading what Inductor writes."""

from __future__ import annotations

from smc_compile.dev.kernel_audit.audited_regions import short_name
from smc_compile.dev.kernel_audit.generated_code import kernel_sources, library_calls

CODE = """
async_compile = AsyncCompile()
triton_poi_fused_add_0 = async_compile.triton('triton_poi_fused_add_0', '''
def triton_poi_fused_add_0(): extern_kernels.mm(nothing)
''', device_str='cuda')
cpp_fused_mul_1 = async_compile.cpp_pybinding(['float*'], 'int kernel;')
class Runner:
    def call(self, args):
        extern_kernels.mm(a, b, out=c)  # extern_kernels.mm(
        extern_kernels.bmm(a, b, out=c)
        extern_kernels.mm(a, b, out=c)
        buf1 = torch.ops.aten.sort.stable(c)
"""


def test_kernels_are_found_by_name():
    sources = kernel_sources(CODE)
    assert list(sources) == ["triton_poi_fused_add_0", "cpp_fused_mul_1"]
    assert "def triton_poi_fused_add_0" in sources["triton_poi_fused_add_0"]
    assert sources["cpp_fused_mul_1"] == "int kernel;"


def test_library_calls_are_counted_where_the_code_runs_only():
    assert library_calls(CODE) == {"mm": 2, "bmm": 1, "aten.sort.stable": 1}


def test_short_names_fit_and_say_kind_and_number():
    assert short_name("triton_per_fused__softmax_add_12", 40) == "per 12  softmax add"
    assert short_name("triton_poi_fused_" + "add_" * 40 + "3", 30).startswith("poi 3   add add")
    assert len(short_name("triton_poi_fused_" + "add_" * 40 + "3", 30)) == 30
    assert short_name("something_else", 9) == "something"
