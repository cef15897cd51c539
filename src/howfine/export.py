"""export: base, delta and head as one ONNX graph, from a readout's inputs to its outputs.

torch's exporter traces the model as `evaluate` runs it; ONNX Runtime then has to give the same
outputs, for another number of rows of other lengths, before the file is kept.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from howfine import container, pretrained, surgery
from howfine.base import Base, TwoTowers
from howfine.batch import Batch, to_device
from howfine.delta import Delta
from howfine.errors import SettingError, StorageError
from howfine.evaluate import opened
from howfine.readout import Wired
from howfine.task import Example

OUTPUT = "logits"
# What the outputs of both may differ by, relative to the largest, in float32 and in steps of other
# formats: more is no rounding.
_ROUNDING, _STEPS = 1e-3, 8
_HINT = "Change the base's weights alone (merge or slice such a delta), or choose another base"
_MOST_BYTES = 2**31 - 2**24  # protobuf's limit, less what is no weight
_TEXTS = ("a fine film", "it takes its time, and then it is over before anyone has noticed")


class _Flat(nn.Module):
    """A model that takes its tensors one after the other."""

    def __init__(self, wired: Wired, names: Sequence[str], inside: Sequence[str]) -> None:
        super().__init__()
        self.wired, self.names, self.inside = wired, tuple(names), set(inside)

    def forward(self, *values: Tensor) -> Tensor:
        fields = dict(zip(self.names, values, strict=True))
        inputs = {name: value for name, value in fields.items() if name in self.inside}
        rest = {name: value for name, value in fields.items() if name not in self.inside}
        outputs: Tensor = self.wired(inputs=inputs, **rest)[OUTPUT]
        return outputs


def export(
    delta: Delta | str | Path,
    out: str | Path,
    base: Base | None = None,
    pair: bool = False,
    *,
    dtype: str | torch.dtype | None = None,
) -> Path:
    """Write an ONNX file that gives what the delta's readout gives on this base.

    Its inputs are the tokenizer's, (B, S) each, and where a readout has free positions of its own
    those, too; its output `logits` is (B, …). With `pair` the task's inputs are two texts. The
    classes' names are the graph's metadata `labels`, one a line. `dtype` is the number format of
    the weights, the sums of base and change; the base's own by default. Raises SettingError without
    the packages that it needs, for a readout that writes, for two towers, and where ONNX Runtime
    gives other outputs; StorageError where the file exists or can't be written.
    """
    _check_packages()
    delta, base = opened(delta, base)
    if isinstance(base, TwoTowers) or delta.readout.writes or base.tokenizer is None:
        raise SettingError(
            "one graph holds a model that reads texts and answers with numbers; this delta's "
            f"readout writes, or its base {base.name} takes pictures: export is not made for it"
        )
    number_format = base.dtype if dtype is None else pretrained.dtype_of(dtype)
    if number_format == torch.bfloat16:
        raise SettingError(
            "ONNX Runtime has no bfloat16 on CPUs, where the graph is checked; give dtype float32 "
            "or float16 (--dtype)"
        )
    path = Path(out)
    if path.exists():
        raise StorageError(f"{path} exists already; choose another name or remove it first")
    with delta.applied(base) as wired, surgery.converted(base.towers, number_format), _quiet():
        graph = _graph(wired, base, delta, pair)
        _check_same(graph, wired, base, delta, pair)
    container.write_atomically(path, graph)
    return path


def _check_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SettingError(
            f"export needs the package {error.name}; run `pip install 'howfine[onnx]'`"
        ) from error


def _graph(wired: Wired, base: Base, delta: Delta, pair: bool) -> bytes:
    import onnx

    size = sum(value.numel() * value.element_size() for value in wired.parameters())
    if size >= _MOST_BYTES:
        raise SettingError(
            f"{base.name} has {size:,} bytes of weights, and one ONNX file holds less than 2 GB; "
            "slice it first, or write it in half precision (--dtype float16)"
        )
    batch = _batch(base, delta, _TEXTS, pair)
    given = _fields(batch)
    length = next(iter(batch.inputs.values())).shape[1]
    free = tuple(
        {0: "rows", 1: "places"} if value.shape[1:2] == (length,) else {0: "rows"}
        for value in given.values()
    )
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                _Flat(wired, tuple(given), tuple(batch.inputs)),
                tuple(given.values()),
                input_names=list(given),
                output_names=[OUTPUT],
                dynamic_shapes={"values": free},
                dynamo=True,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, torch._dynamo.exc.TorchDynamoException) as error:
        reason = (str(error.__cause__ or error).strip().splitlines() or [""])[0][:200]
        raise SettingError(
            f"torch can't export a {base.config.model_type} with this change: {reason}. {_HINT}"
        ) from error
    assert program is not None  # it writes no file itself
    model = program.model_proto
    onnx.helper.set_model_props(model, {"labels": "\n".join(map(str, delta.labels))})
    return bytes(model.SerializeToString())


def _check_same(graph: bytes, wired: Wired, base: Base, delta: Delta, pair: bool) -> None:
    """Raises SettingError unless ONNX Runtime gives the model's own outputs."""
    import onnxruntime

    texts = (*_TEXTS, "three", " ".join(_TEXTS))
    batch = _batch(base, delta, texts, pair)
    with torch.no_grad():
        expected = wired(**batch.as_kwargs())[OUTPUT].cpu()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is told below
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        wanted = {each.name for each in session.get_inputs()}  # without those that nothing reads
        fields = _fields(batch).items()
        given = {name: value.cpu().numpy() for name, value in fields if name in wanted}
        (found,) = session.run([OUTPUT], given)
    except Exception as error:  # of its own classes, which share nothing else
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise SettingError(f"ONNX Runtime can't run the graph: {error}. {_HINT}") from error
    largest = expected.float().abs().max().clamp(min=1e-12)
    apart = float((torch.from_numpy(found).float() - expected.float()).abs().max() / largest)
    # The head may be in float32 on a body that is not.
    step = max(torch.finfo(dtype).eps for dtype in (expected.dtype, base.dtype))
    if not apart <= max(_ROUNDING, _STEPS * step):
        raise SettingError(
            f"ONNX Runtime gives other outputs than torch, apart by {apart:.1e} of the "
            f"largest: a {base.config.model_type} with this change can't be exported. {_HINT}"
        )


def _batch(base: Base, delta: Delta, texts: Sequence[str], pair: bool) -> Batch:
    examples = [Example((text, text[::-1]) if pair else (text,)) for text in texts]
    batch = delta.readout.collate(base, examples, labelled=False)
    return Batch.from_kwargs(to_device(batch.as_kwargs(), base.device))


def _fields(batch: Batch) -> dict[str, Any]:
    """A batch's tensors, by names of their own."""
    fields = batch.as_kwargs()
    inputs: dict[str, Tensor] = fields.pop("inputs")
    return inputs | fields


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks about packages and operators that nobody asked for."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
