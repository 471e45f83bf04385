"""What stands for a layer's keys or values between storing them and attending to them."""

from typing import TYPE_CHECKING, Any, NoReturn

import torch

from vestige.errors import CacheError

if TYPE_CHECKING:
    from vestige.cache.layer import RaggedLayer
    from vestige.cache.overlay import OverlayLayer


class KVHandle:
    """Stands for a layer's keys or values between ``update`` and the attention function. Not a tensor.

    Models that transform keys after storing them would be silently wrong on a ragged layer; with the handle they
    raise at once.
    """

    def __init__(
        self, layer: "RaggedLayer | OverlayLayer", shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layer = layer
        self.shape = shape
        self.dtype = dtype
        self.device = device

    def to(self, device: torch.device) -> "KVHandle":
        """Stay where the layer is: models with KV sharing ask for the query's device, which is that one."""
        if torch.device(device) != self.device:
            self._refuse(f"moving them from {self.device} to {device}")
        return self

    def _refuse(self, what: str) -> NoReturn:
        raise CacheError(
            f"this model uses cached keys or values itself ({what}) between storing and attending to them, which an "
            "evicting cache cannot allow; check it with vestige.check(model), or use a DynamicCache"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(f".{name}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        flat = [x for arg in args for x in (arg if isinstance(arg, list | tuple) else [arg])]
        handle = next(x for x in [*flat, *(kwargs or {}).values()] if isinstance(x, cls))
        handle._refuse(getattr(func, "__name__", "a torch function"))

    def _operator(self, *operands: Any) -> NoReturn:
        self._refuse("indexing or arithmetic")

    __getitem__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _operator
    __matmul__ = __rmatmul__ = __neg__ = _operator
