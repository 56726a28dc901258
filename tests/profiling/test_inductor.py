"""Analysis of inductor's output code and of ncu's tables."""

from __future__ import annotations

from typing import Any

import pytest

from byol_fast.profiling import inductor

# A forward and a backward graph of inductor for a GPU, shortened.
FORWARD = """
triton_tem_fused__native_batch_norm_legit_convolution_relu_3 = async_compile.triton('triton_tem_fused_conv', '''
def triton_tem_fused_conv(arg_X, arg_W, in_ptr2, out_ptr0):
    matrix_x = tl.load(x_ptrs, mask=mask_x, other=0.0)
    matrix_w = tl.load(w_ptrs, mask=mask_w, other=0.0)
    acc += tl.dot(matrix_x, matrix_w, allow_tf32=ALLOW_TF32)
    tmp0 = tl.load(in_ptr2 + xindex)
    tmp1 = acc + tmp0
''', device_str='cuda')
triton_tem_fused_mm_relu_4 = async_compile.triton('triton_tem_fused_mm_relu_4', '''
def triton_tem_fused_mm_relu_4(arg_A, arg_B, out_ptr0):
    tmp0 = tl.load(arg_A + idx)
    tmp1 = tl.full([1], 0, tl.int32)
    tmp2 = triton_helpers.maximum(tmp1, tmp0)
    a = tmp2
    b = tl.load(arg_B + idx)
    acc = tl.dot(a, b, acc, allow_tf32=ALLOW_TF32)
''', device_str='cuda')
triton_poi_fused_relu_5 = async_compile.triton('triton_poi_fused_relu_5', '''
def triton_poi_fused_relu_5(in_ptr0, out_ptr0):
    tmp0 = tl.load(in_ptr0)
''', device_str='cuda')

def call(args):
    primals_1, primals_2 = args
    args.clear()
    assert_size_stride(primals_1, (64, 3, 7, 7), (147, 1, 21, 3))
        buf0 = extern_kernels.convolution(primals_2, primals_1, stride=(2, 2))
        triton_tem_fused__native_batch_norm_legit_convolution_relu_3.run(buf0, buf1, grid=1)
        triton_tem_fused_mm_relu_4.run(buf1, buf2, grid=1)
        triton_tem_fused_mm_relu_4.run(buf2, buf3, grid=1)
        triton_poi_fused_relu_5.run(buf3, buf4, 8, grid=1)
        extern_kernels.mm(buf4, buf5, out=buf6)
"""
BACKWARD = """
def call(args):
    primals_1, convolution, relu, relu_1, le, tangents_1 = args
    args.clear()
    assert_size_stride(convolution, (2, 64, 4, 4), (1024, 1, 256, 64))
    assert_size_stride(relu, (2, 64, 4, 4), (1024, 1, 256, 64))
    assert_size_stride(relu_1, (2, 8), (8, 1))
    assert_size_stride(le, (2, 8), (8, 1))
    assert_size_stride(tangents_1, (), ())
        buf0 = torch.ops.aten.convolution_backward.default(tangents_1, relu, primals_1)
"""


def test_inductor_code_is_analyzed() -> None:
    result = inductor.analyze([FORWARD, BACKWARD])
    forward, backward = result["graphs"]
    assert (forward["is_backward"], backward["is_backward"]) == (False, True)
    assert forward["extern"] == {"extern_kernels.convolution": 1, "extern_kernels.mm": 1}
    assert len(forward["templates"]) == 2 and forward["templates_with_prologue"] == ["triton_tem_fused_mm_relu_4"]
    assert forward["kernels"]["triton_tem_fused_mm_relu_4"] == 2
    assert backward["extern"] == {"torch.ops.aten.convolution_backward": 1}
    assert backward["saved"]["relu"] == {"tensors": 2, "elements": 2064}
    assert backward["saved"]["convolution"] == {"tensors": 1, "elements": 2048}
    library, generated, prologues, saved = result["answers"]
    assert "1 convolutions forward, 1 backward, 1 matrix products" in library
    assert "2 kernels, 3 calls" in generated and "1 of 2" in prologues and "0.0 M elements of ReLU outputs" in saved


def test_ncu_table_is_read() -> None:
    header = '"ID","Process ID","Kernel Name",' + ",".join(f'"{metric}"' for metric in inductor.NCU_METRICS)
    rows: list[Any] = [header, '"","","","byte","byte","ns"', '"0","7","triton_poi_fused_relu_5","1,000","500","10"']
    rows += ['"1","7","_lars_apply_kernel","4000","4000","2"', '"2","7","triton_poi_fused_relu_5","1000","500","10"']
    first, second = inductor.read_ncu("\n".join(["==PROF== Connected to process 7", "  compiled in 3 s", *rows]))
    assert first["kernel"] == "_lars_apply_kernel" and first["gb_per_s"] == pytest.approx(4000)
    assert (second["launches"], second["read_bytes"], second["written_bytes"]) == (2, 2000, 1000)
    assert second["seconds"] == pytest.approx(20e-9)
    families = {row["family"]: row for row in inductor.by_family([first, second])}
    assert families["pointwise"]["gb"] == pytest.approx(3e-6)
    assert inductor.read_ncu("==ERROR== LibraryNotLoaded") == []
