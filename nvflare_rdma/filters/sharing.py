"""One encoding for all sites that are sent the same message."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from nvflare_rdma.codecs import Array, Codec, FixedSizeCodec, is_tensor, marked
from nvflare_rdma.filters.encoding import TensorEncoder


class Shared:
    """Holds what was made of one message for as long as the message's own tensors live.

    FLARE's server filters a message anew for each site that asks for it. The DXO is another one each time, but the
    tensors in it are the same objects: they are held by weak references, so nothing is kept alive and no address is
    taken for an object that is gone.
    """

    def __init__(self, root_id: str, values: Mapping[str, Any]) -> None:
        """Hold the message's tensors, by name, weakly. `root_id` is FLARE's id of the message, one for all sites."""
        self.root_id = root_id
        self.results: dict[str, Any] = {}
        self._values = [(name, self._reference(value)) for name, value in values.items()]

    def is_of(self, root_id: str, values: Mapping[str, Any]) -> bool:
        """Return whether this was made of the message that has these tensors."""
        return (
            root_id == self.root_id
            and len(values) == len(self._values)
            and all(
                name == known and reference() is value
                for (name, value), (known, reference) in zip(values.items(), self._values, strict=True)
            )
        )

    def _reference(self, value: Any) -> Callable[[], Any]:
        if not is_tensor(value):
            return lambda: value
        me = weakref.ref(self)

        def forget(_: Any) -> None:
            shared = me()
            if shared is not None:
                shared.results.clear()

        return weakref.ref(value, forget)


class MarkingEncoder(TensorEncoder):
    """Leaves the encoding to the transfer wherever a tensor's encoded size is known beforehand.

    All sites get the same views while one of them has them, so that a chunk that is encoded for one is there for the
    others. The views are not kept alive here: one of a numpy array would keep the model alive. Codes of the tensors
    that are encoded now are kept.
    """

    def __init__(self, results: dict[str, Any]) -> None:
        """`results` is where what sites share is kept: those of `Shared`, or an empty dict."""
        self._views: dict[str, Callable[[], Any]] = results.setdefault("views", {})
        self._codes: dict[str, Array] = results.setdefault("codes", {})

    def mark(self, name: str, codec: FixedSizeCodec, value: Any) -> Any:
        """Return the view that another site has, or a new one."""
        view = self._views[name]() if name in self._views else None
        if view is None:
            view = marked(value, codec)
            self._views[name] = weakref.ref(view)
        return view

    def encode(self, name: str, codec: Codec, value: Any) -> Array:
        """Return the codes that another site got, or new ones."""
        if name not in self._codes:
            self._codes[name] = super().encode(name, codec, value)
        return self._codes[name]
