# SPDX-License-Identifier: Apache-2.0
"""What the pickles of torch checkpoints may name, and how it is built without running code of the file's choosing."""

from __future__ import annotations

import argparse
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from parallel.stored.stored_tensor import StorageRecord, StoredTensor
from parallel.stored.vocabulary import Global, RefusedError, StandIn, Vocabulary

#: Classes that old training scripts left in their checkpoints (loss scalers, enumerations, recipes). They become inert
#: stand-ins: their names are kept, nothing of them is imported or run.
_INERT = (
    *("megatron.", "apex.", "fp16.", "fp16_utils.", "mpu.", "transformer_engine."),
    # What argument parsers and random states of training scripts hold besides.
    *("pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib._local.PosixPath", "pathlib._local.PurePosixPath"),
    *("signal.SIG", "signal.Signals", "datetime.", "collections.deque", "collections.Counter", "types.SimpleNamespace"),
    *("functools.partial", "fractions.Fraction", "decimal.Decimal", "uuid.UUID", "_io.BytesIO"),
    *("torch.device", "torch.serialization._get_layout", "torch.nn.init.", "torch.nn.functional.", "torch._C._nn.gelu"),
    *("numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    *(
        f"{module}.{kind}"
        for module in ("builtins", "__builtin__")
        for kind in ("slice", "range", "int", "float", "bool", "str", "bytes", "list", "dict", "tuple")
    ),
    *("__builtin__.xrange", "__builtin__.long", "__builtin__.unicode"),
)

#: Class of the storage, in a pickle, of the elements of each type.
STORAGE_CLASSES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
#: ``torch.float32`` and the like.
DTYPE_VALUES = {
    str(dtype): dtype for dtype in (getattr(torch, name) for name in dir(torch)) if isinstance(dtype, torch.dtype)
}
_VALUES = DTYPE_VALUES | {
    f"{module}.{name}": dtype
    for name, dtype in (("UntypedStorage", torch.uint8), *((kind.__name__, d) for d, kind in STORAGE_CLASSES.items()))
    for module in ("torch", "torch.cuda", "torch.storage")
}


def torch_vocabulary(storage: Callable[[Any], StorageRecord]) -> Vocabulary:
    """What a torch checkpoint may name; ``storage`` makes the record of a storage from a persistent id."""
    vocabulary = Vocabulary(values=_VALUES, inert=_INERT, storage=storage)

    vocabulary.calls = {
        "argparse.Namespace": argparse.Namespace,
        "collections.OrderedDict": _ordered_dict,
        "collections.defaultdict": lambda *_: {},
        "torch.Size": lambda sizes=(): tuple(sizes),
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor_v3": _tensor_v3,
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
        "torch._tensor._rebuild_from_type_v2": lambda function, _kind, arguments, _: vocabulary.call(
            function, arguments
        ),
        "torch.nn.parameter.Parameter": lambda data, *_: data,
        "torch.Tensor": lambda *_: _refuse_tensor_class(),
        "_codecs.encode": _encode,
        "numpy.core.multiarray.scalar": _numpy_scalar,
        "numpy._core.multiarray.scalar": _numpy_scalar,
    }
    for builtins in ("builtins", "__builtin__"):
        vocabulary.calls |= {
            f"{builtins}.set": lambda items=(): list(items),
            f"{builtins}.frozenset": lambda items=(): list(items),
            f"{builtins}.complex": lambda real, imaginary: complex(float(real), float(imaginary)),
            f"{builtins}.bytearray": _bytearray,
        }
    return vocabulary


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    if not isinstance(storage, StorageRecord):
        raise ValueError("a tensor without storage")
    return StoredTensor.checked(storage, storage.dtype, offset, shape, stride)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> StoredTensor:
    if not isinstance(storage, StorageRecord) or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor without storage")
    return StoredTensor.checked(storage, dtype, offset, shape, stride)


def _refuse_tensor_class() -> Any:
    raise RefusedError("torch.Tensor, a tensor of torch before 0.4")


def _ordered_dict(items: Any = ()) -> dict[Any, Any]:
    if isinstance(items, dict):
        return dict(items)
    result = {}
    for key, value in items:
        if not isinstance(key, (str, int)):
            raise ValueError("a key is not a plain value")
        result[key] = value
    return result


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes in an unknown encoding")
    return text.encode("latin-1")


def _bytearray(content: Any = b"", encoding: Any = "latin-1") -> bytes:
    return content if isinstance(content, bytes) else _encode(content, encoding)


def _numpy_scalar(dtype: Any, content: Any = b"") -> Any:
    """A number of numpy's; arrays (random states) are of no use here and stay stand-ins."""
    code = dtype.arguments[0] if isinstance(dtype, StandIn) and dtype.kind == Global("numpy", "dtype") else None
    if code not in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1"):
        raise ValueError("a numpy scalar of an unknown kind")
    if isinstance(content, str):
        content = _encode(content, "latin-1")
    if len(content) != int(code[1]):
        raise struct.error("a numpy scalar of a wrong length")
    return np.frombuffer(content, dtype=f"<{code}")[0].item()
