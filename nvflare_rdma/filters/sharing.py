"""One encoding for all sites that are sent the same message."""

import weakref
from collections.abc import Callable
from typing import Any

from nvflare_rdma.codecs.tensors import is_tensor
from nvflare_rdma.filters.flat_params import flatten


class Shared:
    """What was made of one message, for as long as the message's own tensors live.

    FLARE's server filters a message anew for each site that asks for it. The DXO is another one each time, but the
    tensors in it are the same objects: they are held by weak references, so nothing is kept alive and no address is
    taken for an object that is gone.
    """

    def __init__(self, message: str, params: dict[str, Any]) -> None:
        """`message`: FLARE's id of the message, the same for all sites."""
        self.message = message
        self.results: dict[Any, Any] = {}
        self._values = [(name, self._reference(value)) for name, value in flatten(params).items()]

    def _reference(self, value: Any) -> Callable[[], Any]:
        if not is_tensor(value):
            return lambda: value
        me = weakref.ref(self)

        def forget(_: Any) -> None:
            shared = me()
            if shared is not None:
                shared.results.clear()

        return weakref.ref(value, forget)

    def is_of(self, message: str, params: dict[str, Any]) -> bool:
        """Whether this was made of the message that `params` are from."""
        values = flatten(params)
        return (
            message == self.message
            and len(values) == len(self._values)
            and all(
                name == known and reference() is value
                for (name, value), (known, reference) in zip(values.items(), self._values, strict=True)
            )
        )
