"""An exported decoder on ONNX Runtime, step by step; neither torch nor transformers is needed.

Shapes: B sequences, T tokens, V vocabulary.
"""

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as onnxruntime_errors

from gpt2x.commands import shell_command
from gpt2x.errors import UserError

Cache = dict[str, onnxruntime.OrtValue]
FILES = {"float32": "model.onnx", "float16": "model_fp16.onnx", "int8": "model_quantized.onnx"}
_UNREADABLE = (
    onnxruntime_errors.NoSuchFile,
    onnxruntime_errors.InvalidProtobuf,
    onnxruntime_errors.InvalidArgument,
    onnxruntime_errors.InvalidGraph,
    onnxruntime_errors.NotImplemented,
    onnxruntime_errors.Fail,
    onnxruntime_errors.RuntimeException,
)
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxDecoder:
    """An exported decoder."""

    def __init__(self, directory: Path, *, dtype: str = "float32", num_threads: int = 0) -> None:
        """Opens the export in a directory.

        Args:
            directory: what scripts/export.py --to onnx wrote.
            dtype: which of its files: float32, float16 or int8.
            num_threads: threads of ONNX Runtime; 0 for all cores.

        Raises:
            UserError: where the directory has no such file, or a damaged one.
        """
        model_file = directory / "onnx" / FILES[dtype]
        if not model_file.is_file():
            raise UserError(
                f"{model_file} does not exist; `{shell_command('export', 'MODEL', '--to', 'onnx')}` writes it."
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        try:
            self._session = onnxruntime.InferenceSession(model_file, options, providers=["CPUExecutionProvider"])
        except _UNREADABLE as error:
            reason = " ".join(str(error).split())
            raise UserError(f"the export in {directory} is damaged: {reason}; export again.") from error
        self._cache_inputs = [value for value in self._session.get_inputs() if value.name.startswith("past_")]
        self._outputs = [value.name for value in self._session.get_outputs()]

    def empty_cache(self, batch_size: int) -> Cache:
        """The cache before the first token: keys and values of length 0."""
        cache = {}
        for value in self._cache_inputs:
            _, heads, _, width = value.shape
            empty = np.empty((batch_size, heads, 0, width), _NUMPY_TYPES[value.type])
            cache[value.name] = onnxruntime.OrtValue.ortvalue_from_numpy(empty)
        return cache

    def step(
        self, ids_BT: NDArray[np.int64], mask_BS: NDArray[np.int64], cache: Cache
    ) -> tuple[NDArray[np.float32], Cache]:
        """Reads T more tokens of each sequence.

        Args:
            ids_BT: the new tokens.
            mask_BS: 1 for every token so far, the new ones included, 0 for padding.
            cache: what the step before returned; it stays in ONNX Runtime's memory.

        Returns:
            Logits (B, T, V) of the new tokens, and the cache to go on with.
        """
        positions_BS = np.maximum(mask_BS.cumsum(-1) - 1, 0)
        arrays = {
            "input_ids": ids_BT,
            "attention_mask": mask_BS,
            "position_ids": positions_BS[:, -ids_BT.shape[1] :],
        }
        inputs = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            for name, array in arrays.items()
        }
        logits, *present = self._session.run_with_ort_values(self._outputs, {**inputs, **cache})
        names = [name.replace("present", "past_key_values") for name in self._outputs[1:]]
        return logits.numpy(), dict(zip(names, present))
