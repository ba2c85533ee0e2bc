"""Codecs are loaded in the background, all that a policy may choose."""

from __future__ import annotations

import sys

from nvflare_rdma.codecs import get_codec
from nvflare_rdma.codecs.policy import Policy
from nvflare_rdma.codecs.warming import warm_up


def test_each_codec_of_a_policy_is_used_once():
    used = []

    class Spy(type(get_codec("int8"))):
        def _encode(self, src, out):
            used.append(self.name)
            return super()._encode(src, out)

    spy = Spy()
    warm_up([spy, spy, get_codec("lossless")]).join(60)
    assert used == ["int8"]
    assert "nvflare_rdma.codecs.kernels" in sys.modules
    policy = Policy("normfloat4", [{"role": "head", "quantization_type": "int8"}])
    assert sorted({codec.name for codec in policy.codecs}) == ["int8", "normfloat4"]
