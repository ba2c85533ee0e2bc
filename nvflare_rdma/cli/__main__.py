"""`python -m nvflare_rdma.cli`, which is the command `nvflare-rdma`."""

from __future__ import annotations

import sys

from nvflare_rdma.cli import main

sys.exit(main())
