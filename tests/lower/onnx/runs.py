"""ONNX files against the model they were written from: the error of each in units of eager's own."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normfuse.capture.export import capture
from normfuse.errors import InputError
from normfuse.evaluate.float64 import run_float64
from normfuse.graph.program import Program
from normfuse.verification.numerics import max_abs_error, relative_error, rounding

from ...zoo.entry import Entry, Example


def session(path: Path, *, optimized: bool = True) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_operators(path: Path) -> set[str]:
    """The operators that onnxruntime runs in the end."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".run.onnx"))
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}


def feeds(names: list[str], example: Example) -> dict[str, np.ndarray]:
    """The tensors of a call, in the order of the file's inputs."""
    kwargs = example[1]
    by_name = {f"{key}": value for key, value in kwargs.items()}
    tensors = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
    assert len(tensors) >= len(names)
    named = all(name in by_name for name in names)
    chosen = [by_name[name] for name in names] if named else tensors[: len(names)]
    return {name: tensor.numpy() for name, tensor in zip(names, chosen, strict=True)}


def run(path: Path, example: Example, *, optimized: bool = True) -> list[Tensor]:
    made = session(path, optimized=optimized)
    results = made.run(None, feeds([i.name for i in made.get_inputs()], example))
    return [torch.from_numpy(np.asarray(r)) for r in results]


def run_reference(path: Path, example: Example) -> list[Tensor]:
    """In onnx's own evaluator: another runtime than onnxruntime."""
    from onnx.reference import ReferenceEvaluator

    made = ReferenceEvaluator(str(path))
    results = made.run(None, feeds(list(made.input_names), example))
    return [torch.from_numpy(np.asarray(r)) for r in results]


@torch.no_grad()
def tensors_of(model: nn.Module, example: Example) -> list[Tensor]:
    args, kwargs = copy.deepcopy(example)
    return [leaf for leaf in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


def error_ratio(model: nn.Module, examples: list[Example], run: Callable[[Example], list[Tensor]]) -> float:
    """The error against the float64 model in units of eager's error (or of one rounding, where that is larger).

    Of all examples together: the error of a few numbers is a matter of luck.
    """
    captured = capture(model, *examples[0])
    leaves = [captured.signature.flatten(*copy.deepcopy(example)) for example in examples]
    wanted = [[leaf for leaf in outputs if isinstance(leaf, Tensor)] for outputs in run_float64(captured, leaves)]
    own = [tensors_of(model, example) for example in examples]
    got = [run(example) for example in examples]
    errors, theirs = relative_error(got, wanted), relative_error(own, wanted)
    return max(e / max(t, r) for e, t, r in zip(errors, theirs, rounding(own[0]), strict=True))


def file_error(model: nn.Module, examples: list[Example], path: Path, *, optimized: bool = True) -> float:
    """`error_ratio` of an ONNX file in onnxruntime."""
    return error_ratio(model, examples, lambda example: run(path, example, optimized=optimized))


def largest_difference(left: list[Tensor], right: list[Tensor]) -> float:
    return max_abs_error([left], [right])


def domains(path: Path) -> set[str]:
    """Domains of everything that the file calls, functions' bodies included, that the file does not define itself."""
    model = onnx.load(str(path), load_external_data=False)
    own = {(f.domain, f.name) for f in model.functions}
    called = [*model.graph.node, *(node for f in model.functions for node in f.node)]
    return {node.domain for node in called if (node.domain, node.op_type) not in own}


def sizes(entry: Entry, program: Program) -> list[Example]:
    """The example, other batches, and another length where the architecture and the capture allow one."""
    examples = [entry.example(), entry.example(batch=16), entry.example(batch=entry.least_batch)]
    if entry.vary_length and entry.free_length:
        other = entry.example(batch=2, length=entry.length + 3)
        with contextlib.suppress(InputError):  # a length that is fixed, or with which the model takes another branch
            program.signature.flatten(*other)
            examples.append(other)
    return examples
