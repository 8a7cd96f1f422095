"""Arrays that stay where they are: what came by DLPack (torch, CuPy, JAX) or from onnxruntime, on any device."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxcrp.errors import InputError, QuestionError

HOST = (1, 3)  # DLPack's numbers of the CPU and of pinned memory


class DeviceArray:
    """An OrtValue as far as the rest of this package looks at it: shape, dtype, and all its samples at once."""

    def __init__(self, value: Any) -> None:
        from onnxcrp.session import dtype_of

        self.value = value
        self.shape = tuple(value.shape())
        self.ndim = len(self.shape)
        self.dtype = dtype_of(value.data_type())

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: Any) -> DeviceArray:
        """All samples; raises QuestionError for fewer or repeated ones, which would take a copy."""
        asked = list(range(*rows.indices(len(self)))) if isinstance(rows, slice) else list(rows)
        if asked != list(range(len(self))):
            raise QuestionError(
                "samples that stay on the device are asked all at once",
                hint="one sample, or one condition; or give a numpy array",
            )
        return self

    def numpy(self) -> np.ndarray:
        """A copy on the host (on the CPU, the same memory)."""
        return self.value.numpy()


def is_device_array(value: Any) -> bool:
    """Whether a value speaks DLPack and is no numpy array."""
    return not isinstance(value, (np.ndarray, np.generic)) and (
        hasattr(value, "__dlpack__") or isinstance(value, DeviceArray)
    )


def taken(name: str, value: Any) -> DeviceArray:
    """An input that speaks DLPack, without a copy; raises InputError for what cannot be shared."""
    import onnxruntime

    if isinstance(value, (DeviceArray, onnxruntime.OrtValue)):
        return value if isinstance(value, DeviceArray) else DeviceArray(value)
    if not hasattr(onnxruntime.OrtValue, "from_dlpack"):
        raise InputError(
            f"input {name}: this onnxruntime ({onnxruntime.__version__}) takes no DLPack",
            hint="pip install -U onnxruntime-gpu, or give a numpy array",
        )
    contiguous = getattr(value, "is_contiguous", None)
    if callable(contiguous) and not contiguous():
        raise InputError(f"input {name} is not contiguous", hint="x.contiguous()")
    try:
        return DeviceArray(onnxruntime.OrtValue.from_dlpack(value))
    except Exception as error:  # torch, onnxruntime and others raise several kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"input {name} cannot be taken by DLPack: {reason}", hint="x.detach().contiguous()") from error


def owned(array: np.ndarray | DeviceArray) -> np.ndarray | DeviceArray:
    """An array that its caller may overwrite from now on: a copy of what lies on the host; the rest as it is."""
    if isinstance(array, np.ndarray):
        return array.copy()
    if array.value.device_name() != "cpu":
        return array
    import onnxruntime

    return DeviceArray(onnxruntime.OrtValue.ortvalue_from_numpy(array.numpy().copy()))


def on_host(name: str, value: Any) -> Any:
    """What numpy can read: arrays of other devices as copies, the rest as it is."""
    if not is_device_array(value):
        return value
    readable = hasattr(value, "__array__") and int(value.__dlpack_device__()[0]) in HOST
    return value if readable else taken(name, value).numpy()
