"""Backends: threads that arrive, answers that are compared, layers, rows, what is missing."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fastkd.deploy.latency import QUICK, Latency, measure, measure_all
from fastkd.deploy.latency.alone import Asked
from fastkd.deploy.latency.backends import BACKENDS, Subject
from fastkd.deploy.latency.onnx import write_onnx
from fastkd.deploy.latency.runtime import Refused, compare, feed_of, rows_of_events, session
from fastkd.deploy.latency.subject import size_of
from fastkd.errors import RunFailed, UserError

SHAPE = (2, 3, 8, 8)


class Ticks:
    """A clock that a fixed time passes between two looks at."""

    def __init__(self, step=0.5):
        self.now, self.step = 0.0, step

    def __call__(self):
        self.now += self.step
        return self.now


@pytest.fixture(scope="module")
def ort():
    return pytest.importorskip("onnxruntime")


def test_a_module_is_timed_by_the_given_clock(small, fast):
    found = measure(small, SHAPE, rule=fast, clock=Ticks(0.25))
    assert isinstance(found, Latency)
    assert (found.p10_ms, found.p50_ms, found.p90_ms) == (250, 250, 250)
    assert (found.on, found.input, found.threads, found.calls) == ("eager", SHAPE, 1, 3)
    assert (found.warm_up_calls, found.steady, found.difference) == (2, True, 0)


def test_a_network_keeps_its_modes_and_its_gradients(fast):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    net.train()[1].eval()
    before = net[1].running_mean.clone()
    measure(net, SHAPE, rule=fast, clock=Ticks())
    assert [one.training for one in net.modules()] == [True, True, False, True]
    assert torch.equal(net[1].running_mean, before)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_torch_computes_on_so_many_threads_and_has_its_own_back(fast):
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(torch.get_num_threads())
            return x.flatten(1)

    before = torch.get_num_threads()
    measure(Spy(), SHAPE, threads=3, rule=fast, clock=Ticks(), check=False)
    assert set(seen) == {3}
    assert torch.get_num_threads() == before


def test_threads_are_restored_when_a_network_fails(fast):
    class Broken(nn.Module):
        def forward(self, x):
            raise ZeroDivisionError

    before = torch.get_num_threads()
    sentences = {False: "it cannot run the network", True: "the network fails on an input of 2x3x8"}
    for check, said in sentences.items():
        with pytest.raises(RunFailed, match=f"^eager: {said}.*ZeroDivisionError"):
            measure(Broken(), SHAPE, threads=3, rule=fast, check=check)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("threads", [1, 2])
def test_onnxruntime_gets_so_many_threads(ort, onnx_file, threads):
    with session(onnx_file, "ort-cpu", threads) as opened:
        options = opened.get_session_options()
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (threads, 1)


def test_each_number_of_threads_has_a_session_of_its_own(ort, onnx_file, fast, monkeypatch):
    seen = []

    class Spied(ort.InferenceSession):
        def __init__(self, path, options, **more):
            seen.append(options.intra_op_num_threads)
            super().__init__(path, options, **more)

    monkeypatch.setattr(ort, "InferenceSession", Spied)
    for threads in (2, 1):
        measure(onnx_file, SHAPE, "ort-cpu", threads=threads, rule=fast, check=False)
    assert seen == [2, 1]


def test_a_provider_that_does_not_start_is_not_timed_on_the_cpu(ort, onnx_file, monkeypatch):
    everything = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: everything)

    class Fallen(ort.InferenceSession):
        def __init__(self, path, options, providers):
            super().__init__(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", Fallen)
    with pytest.raises(UserError, match="ort-cuda: CUDAExecutionProvider did not start"):
        measure(onnx_file, SHAPE, "ort-cuda", check=False)


@pytest.mark.parametrize("on", ["eager", "ort-cpu"])
def test_a_network_and_its_file_give_the_same_answer(ort, small, fast, on):
    pytest.importorskip("onnxscript")
    found = measure(small, SHAPE, on, rule=fast, clock=Ticks())
    assert found.difference is not None and found.difference < 1e-5


def test_bytes_of_a_file_are_measured(ort, onnx_file, fast):
    found = measure(onnx_file.read_bytes(), SHAPE, "ort-cpu", rule=fast, clock=Ticks())
    assert found.p50_ms == 500


def test_compiled_networks_are_timed(small, fast):
    if reason := BACKENDS["compile"].missing():
        pytest.skip(reason)
    found = measure(small, SHAPE, "compile", threads=2, rule=fast, clock=Ticks())
    assert found.difference is not None and found.difference < 1e-4


def test_openvino_is_timed(small, fast):
    pytest.importorskip("openvino")
    found = measure(small, SHAPE, "openvino", rule=fast, clock=Ticks())
    assert found.difference is not None and found.difference < 1e-3


def test_a_wrong_answer_is_an_error_and_not_timed(ort, small, fast, monkeypatch):
    subject = "fastkd.deploy.latency.backends.Subject.answer"
    monkeypatch.setattr(subject, lambda *_: [np.full((2, 5), 0.5, np.float32)])
    with pytest.raises(RunFailed, match=r"^eager: its answer differs by .* allowed is 0.001: it i"):
        measure(small, SHAPE, rule=fast, clock=lambda: pytest.fail("timed"))


def arrays(*values, dtype=np.float32):
    return [np.array(values, dtype)]


def test_differences_are_shares_of_the_largest_value():
    assert compare(arrays(1, -8.004), arrays(1, -8), "cpu") == pytest.approx(0.0005, rel=1e-3)
    with pytest.raises(Refused, match=r"differs by 0\.002"):
        compare(arrays(1, -8.016), arrays(1, -8), "cpu")
    # TF32 and 16 bits have fewer.
    assert compare(arrays(1, -8.016), arrays(1, -8), "cuda") > 1e-3
    assert compare(arrays(1, -8.02, dtype=np.float16), arrays(1, -8), "cpu") > 1e-3
    assert compare(arrays(0, 0), arrays(0, 0), "cpu") == 0
    for bad in (arrays(1, math.nan), arrays(1, math.inf)):
        with pytest.raises(Refused, match="differs by inf"):
            compare(bad, arrays(1, 2), "cpu")
    with pytest.raises(Refused, match=r"has shapes \[\[1\]\], expected \[\[2\]\]"):
        compare(arrays(1), arrays(1, 2), "cpu")


def test_hooks_time_the_leaves_and_go(small, fast):
    found = measure(small, SHAPE, rule=fast, clock=Ticks(1e-3), layers=True)
    by_name = {layer.name: layer for layer in found.layers}
    # The third module runs twice and has one name; a look at the clock takes 1 ms.
    assert {*by_name} == {"0", "1", "2", "4", "5", "6", "(outside of modules)"}
    assert (by_name["2"].ms, by_name["0"].ms) == pytest.approx((2, 1))
    # 14 looks by hooks and one at the end of the call, of which 7 are in the layers.
    assert by_name["(outside of modules)"].ms == pytest.approx(8)
    assert by_name["0"].kind == "Conv2d" and by_name["2"].share == pytest.approx(2 / 15)
    assert sum(layer.share for layer in found.layers) == pytest.approx(1)
    times = [layer.ms for layer in found.layers]
    assert times == sorted(times, reverse=True)
    assert "eager torch" in (found.layers_by or "")
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in small.modules())


def test_nodes_of_onnxruntime_have_the_paths_of_their_modules(ort, small, fast):
    pytest.importorskip("onnxscript")
    found = measure(small, SHAPE, "ort-cpu", rule=fast, layers=True)
    convs = {layer.name.split("/")[0] for layer in found.layers if layer.kind.endswith("Conv")}
    # The convolution that runs twice has either of its two paths.
    assert "0" in convs and convs <= {"0", "2", "3"} and len(convs) > 1
    assert sum(layer.share for layer in found.layers) == pytest.approx(1)
    assert "profiler" in (found.layers_by or "")


def test_events_of_the_profiler_are_added_by_run():
    def node(name, at, ms):
        event = {"cat": "Node", "name": f"{name}_kernel_time", "ts": at, "dur": 1e3 * ms}
        return event | {"args": {"op_name": name.upper()}}

    def run(begin, conv, loop, whole):
        # The loop's body runs twice in a call.
        parts = [node("conv", begin, conv), node("body", begin + 1, loop)]
        parts += [node("body", begin + 2, loop)]
        end = {"cat": "Session", "name": "model_run", "ts": begin - 1, "dur": 1e3 * whole}
        return [*parts, end]

    warm_up = run(0, 100, 100, 500)
    events = warm_up + run(10**6, 4, 1, 8) + run(2 * 10**6, 6, 2, 10) + run(3 * 10**6, 5, 1, 9)
    rows = rows_of_events(events, warm_up=1)
    assert [(row["name"], row["kind"], row["ms"]) for row in rows] == [
        ("conv", "CONV", 5),
        ("body", "BODY", 2),
        ("(between the nodes)", "", 2),
    ]
    assert [row["share"] for row in rows] == pytest.approx([5 / 9, 2 / 9, 2 / 9])


def report_of(subject, *on, fast, batch=(1,), threads=(1,), size=(8, 8), **more):
    asked = Asked(on, batch, threads)
    return measure_all(subject, asked, size=size, clock=Ticks(), rule=fast, **more)


def test_a_report_has_every_case_and_goes_on_where_something_is_missing(
    ort, small, fast, tmp_path, monkeypatch
):
    pytest.importorskip("onnxscript")
    lost = SimpleNamespace(missing=lambda: "openvino is not installed: ..", takes_files=True)
    monkeypatch.setitem(BACKENDS, "openvino", lost)
    subject = Subject("small", tmp_path, model=small)
    said, begun = [], []
    more = {"say": said.append, "begin": begun.append, "batch": (1, 2), "threads": (1, 2)}
    found = report_of(subject, "openvino", "eager", "ort-cpu", fast=fast, **more)
    cases = [(row.on, row.input[0], row.threads) for row in found.rows]
    assert cases == [(o, b, t) for o in ("eager", "ort-cpu") for b in (1, 2) for t in (1, 2)]
    assert len(said) == 8 and len(begun) == 1
    assert [(one.on, one.reason, one.wrong) for one in found.missing] == [
        ("openvino", "openvino is not installed: ..", False)
    ]
    assert found.reference == "plain torch"
    assert {"fastkd", "torch", "onnxruntime", "python"} <= set(found.versions)
    assert found.rule.calls == fast.calls and "perf_counter" in found.clock
    # One file for each shape, however many backends and threads read it.
    assert sorted(file.name for file in tmp_path.iterdir()) == ["1x3x8x8.onnx", "2x3x8x8.onnx"]


def test_a_file_has_no_torch_network_and_one_batch(ort, onnx_file, fast, tmp_path):
    subject = Subject("small.onnx", tmp_path, file=onnx_file)
    found = report_of(subject, "eager", "ort-cpu", fast=fast, batch=(2, 8))
    assert [row.input for row in found.rows] == [SHAPE]
    assert found.reference == "onnxruntime without graph optimisation"
    said = {(one.on, one.batch): one.reason for one in found.missing}
    assert said["eager", None].startswith("an ONNX file has no torch network")
    assert said["ort-cpu", 8] == "the file takes batches of 2 only"


def test_more_threads_than_cores_are_said(small, fast, tmp_path):
    subject = Subject("small", tmp_path, model=small)
    found = report_of(subject, "eager", fast=fast, threads=(1, 64))
    cores = found.machine.cores
    said = [one for one in found.caveats if one.startswith("64 threads take turns on ")]
    assert len(said) == (cores < 64)


def test_a_file_of_any_size_is_measured_at_height_and_width(ort, any_size, fast, tmp_path):
    subject = Subject("any.onnx", tmp_path, file=any_size)
    found = report_of(subject, "ort-cpu", fast=fast, batch=(1, 3), size=(12, 20))
    assert [row.input for row in found.rows] == [(1, 3, 12, 20), (3, 3, 12, 20)]
    unknown = report_of(subject, "ort-cpu", fast=fast, size=None)
    assert unknown.rows == () and unknown.missing[0].wrong
    assert "name one, --size 224" in unknown.missing[0].reason


def test_a_segmentation_network_is_measured_at_height_and_width(ort, fast, tmp_path):
    pytest.importorskip("onnxscript")
    from fastkd.models import create_model

    subject = Subject("erfnet", tmp_path, model=create_model("erfnet", 3).eval())
    found = report_of(subject, "eager", "ort-cpu", fast=fast, size=(16, 32))
    assert [row.input for row in found.rows] == [(1, 3, 16, 32)] * 2, found.missing


def test_an_answer_in_a_mapping_is_taken_as_everywhere(ort, fast):
    pytest.importorskip("onnxscript")

    class Dense(nn.Module):
        def forward(self, x):
            return {"out": x.mean(1), "aux": x}

    for on in ("eager", "ort-cpu"):
        assert measure(Dense(), SHAPE, on, rule=fast, clock=Ticks()).difference == pytest.approx(
            0, abs=1e-6
        )


def test_what_onnx_cannot_say_is_a_sentence(ort, tmp_path):
    pytest.importorskip("onnxscript")

    class Sorted(nn.Module):
        def forward(self, x):
            return x if x.sum().item() > 0 else -x

    with pytest.raises(Refused, match=r"torch.export cannot capture Sorted: ") as error:
        write_onnx(Sorted().eval(), torch.randn(SHAPE), tmp_path / "a.onnx")
    assert "\n" not in str(error.value) and error.value.wrong


def opened_with(*inputs):
    return SimpleNamespace(get_inputs=lambda: [SimpleNamespace(**one) for one in inputs])


def test_inputs_that_are_not_images_are_a_sentence():
    ids = {"name": "ids", "type": "tensor(int64)", "shape": [1, 8]}
    image = {"name": "x", "type": "tensor(float)", "shape": ["n", 3, "h", 9]}
    for inputs in ([ids], [image, ids]):
        with pytest.raises(Refused, match="expected one input of images"):
            feed_of(opened_with(*inputs), 1, None)
    with pytest.raises(Refused, match="images of hx9 only"):
        feed_of(opened_with(image), 1, (8, 8))
    with pytest.raises(Refused, match=r"the input x has open sizes \['k'\]"):
        feed_of(opened_with(image | {"shape": [1, "k"]}), 1, None)
    bytes_of = image | {"type": "tensor(uint8)", "shape": [None, 3, 4, 4]}
    assert feed_of(opened_with(bytes_of), 2, None)["x"].dtype == np.uint8


def test_a_damaged_file_is_a_sentence(ort, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(RunFailed, match=r"ort-cpu: onnxruntime cannot open .*bad.onnx \("):
        measure(tmp_path / "bad.onnx", SHAPE, "ort-cpu")
    with pytest.raises(RunFailed, match=r"none.onnx: no such file"):
        measure(tmp_path / "none.onnx", SHAPE, "ort-cpu")


def test_a_file_that_fails_is_a_sentence(ort, tmp_path, fast):
    onnx = pytest.importorskip("onnx")
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", ["n", 3, "h", "w"]), ("y", None))
    ]
    five = onnx.helper.make_tensor("five", onnx.TensorProto.INT64, [1], [5])
    node = onnx.helper.make_node("Reshape", ["x", "five"], ["y"])
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [five])
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "a.onnx"
    )
    subject = Subject("a.onnx", tmp_path, file=tmp_path / "a.onnx")
    (one,) = report_of(subject, "ort-cpu", fast=fast).missing
    assert one.wrong and one.reason.startswith("onnxruntime cannot run it (")


def test_onnxruntime_that_is_not_there_is_a_sentence(tmp_path, onnx_file, fast, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    subject = Subject("small.onnx", tmp_path, file=onnx_file)
    with pytest.raises(UserError, match=r"small.onnx: onnxruntime.* pip install onnxruntime$"):
        size_of(subject, None)
    found = report_of(subject, "openvino", "ort-cpu", fast=fast)
    assert not found.rows and all("pip install" in one.reason for one in found.missing)


def test_names_are_checked(small):
    with pytest.raises(UserError, match=r"there is no backend 'ort_cpu': did you mean ort-cpu\?"):
        measure(small, SHAPE, "ort_cpu")


def test_a_layer_is_timed_quickly(small):
    found = measure(small, SHAPE, rule=QUICK, check=False)
    assert found.calls >= QUICK.calls and 0 < found.p10_ms <= found.p50_ms <= found.p90_ms
