"""What of a host, its kernel and its FLARE makes transfers slow, or ends them: the checks of `nvflare-rdma doctor` that
have a verdict. Nothing is changed, and what this kernel does not tell is left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare_rdma.cli.port_use import PROC, listening_ports, who_listens
from nvflare_rdma.errors import UnsupportedVersionError
from nvflare_rdma.flare_compat import TRIED
from nvflare_rdma.settings import Settings, as_time

OK, NOTE, PROBLEM = "ok", "note", "problem"
MIB = 1024 * 1024
#: What one connection has to be able to have in flight: 2 MiB are 420 Mbit/s at 40 ms.
_LEAST_WINDOW, _LONG_WAY = 2 * MIB, 0.04
_BUFFERS = 'sysctl -w net.ipv4.tcp_rmem="4096 131072 16777216" net.ipv4.tcp_wmem="4096 16384 16777216"'
_LEAST_QUEUE = 128
_USUAL = ("cubic", "bbr")
#: FLARE's own timers of a message that does not move, in seconds, where a site's files can shorten them.
_STREAMING = {"streaming_read_timeout": 300.0, "streaming_ack_wait": 300.0}
_COMMUNICATION = ("communication_timeout", 300.0)
_ASK_GPU = """
import json
told = {"cuda": None, "devices": [], "bitsandbytes": ""}
try:
    import torch
    told["cuda"] = torch.version.cuda
    told["devices"] = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
except Exception as error:
    told["torch"] = repr(error)
try:
    import bitsandbytes
except ModuleNotFoundError:
    told["bitsandbytes"] = "not installed"
except Exception as error:
    told["bitsandbytes"] = repr(error)
print(json.dumps(told))
"""
_ASK_SECONDS = 120


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what it is here, whether that is `OK`, worth a `NOTE` or a `PROBLEM`, and then what
    to do about it."""

    name: str
    verdict: str
    value: str
    advice: str = ""


def check_host(
    settings: Settings, workspace: Path | None, flare: str | None, huge_pages: str, proc: Path = PROC
) -> list[Check]:
    """All checks. `workspace` is a site's folder, `flare` the version of FLARE, `huge_pages` what the kernel says."""
    return [
        *_flare(flare),
        *_huge_pages(huge_pages),
        *_congestion(settings, proc / "sys/net"),
        *_buffers(settings, proc / "sys/net"),
        *_queues(proc / "sys/net"),
        *_data_ports(settings, proc),
        *_gpu(proc),
        *_timers(settings, workspace),
    ]


def _flare(flare: str | None) -> Iterator[Check]:
    if flare is None:
        return  # that is among the errors
    if flare in TRIED:
        yield Check("NVIDIA FLARE", OK, f"{flare}, with which this release was tried")
    else:
        advice = f"this release was tried with {', '.join(TRIED)}; if something goes wrong, try that"
        yield Check("NVIDIA FLARE", NOTE, f"{flare} was not tried", advice)


def _huge_pages(found: str) -> Iterator[Check]:
    if found == "never":
        advice = "`echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`"
        yield Check("huge pages", NOTE, "never: large messages take longer", advice)
    else:
        yield Check("huge pages", OK, found or "unknown to this kernel")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _congestion(settings: Settings, net: Path) -> Iterator[Check]:
    used = settings.rdma_tcp_congestion or _read(net / "ipv4/tcp_congestion_control")
    if not used:
        return
    whose = "rdma_tcp_congestion" if settings.rdma_tcp_congestion else "the kernel's"
    offered = _read(net / "ipv4/tcp_available_congestion_control").split()
    others = [name for name in offered if name != used]
    value = f"{used} ({whose}; there is {', '.join(others)}, too)" if others else f"{used} ({whose})"
    better = next((f"rdma_tcp_congestion={name}" for name in _USUAL if name in others), "`modprobe tcp_bbr` adds one")
    if settings.rdma_tcp_congestion and used not in offered:
        offers = f"{used} ({whose}): this kernel does not offer it, only {', '.join(offered) or 'none that it tells'}"
        yield Check("congestion control", PROBLEM, offers, f"`modprobe tcp_{used}`, or another rdma_tcp_congestion")
    elif used in _USUAL:
        yield Check("congestion control", OK, value)
    else:
        yield Check("congestion control", NOTE, f"{value}: over a WAN, cubic and bbr do better", better)
    qdisc = _read(net / "core/default_qdisc")
    if qdisc and used.startswith("bbr") and qdisc != "fq":
        advice = "`sysctl -w net.core.default_qdisc=fq`, for interfaces that come up from then on"
        yield Check("default_qdisc", NOTE, f"{qdisc}: the kernel paces bbr with less work by fq", advice)
    elif qdisc:
        yield Check("default_qdisc", OK, qdisc)


def _buffers(settings: Settings, net: Path) -> Iterator[Check]:
    most = [_read(net / f"ipv4/{name}").split()[-1:] for name in ("tcp_rmem", "tcp_wmem")]
    if not all(most):
        return
    receive, send = (int(each[0]) for each in most)
    window = min(receive, send) // 2  # the rest is for the kernel's own book-keeping
    rate = window / _LONG_WAY * 8 / 1e6
    value = (
        f"up to {receive / MIB:.3g} MiB to receive, {send / MIB:.3g} MiB to send: {rate:.3g} Mbit/s a rail at 40 ms; "
        f"there are up to {settings.rdma_rails} rails"
    )
    if window >= _LEAST_WINDOW:
        yield Check("tcp buffers", OK, value)
    else:
        yield Check("tcp buffers", NOTE, f"{value}: too small for a long and fast line", f"`{_BUFFERS}`")


def _queues(net: Path) -> Iterator[Check]:
    if not (text := _read(net / "core/somaxconn")):
        return
    if int(text) >= _LEAST_QUEUE:
        yield Check("somaxconn", OK, text)
    else:
        value = f"{text}: more connections than that are lost where many sites come at once"
        yield Check("somaxconn", NOTE, value, "`sysctl -w net.core.somaxconn=4096`")


def _data_ports(settings: Settings, proc: Path) -> Iterator[Check]:
    ports = settings.rdma_data_ports
    if not isinstance(ports, tuple):
        return
    wanted = range(ports[0], ports[1] + 1)
    text = "-".join(str(port) for port in dict.fromkeys(ports))
    used = sorted(listening_ports(proc) & set(wanted))
    user = who_listens(used[0], proc) if used else ""
    if not used:
        yield Check("data ports", OK, f"{text}: {'free' if len(wanted) == 1 else 'all free'}")
    elif len(used) < len(wanted):
        yield Check("data ports", OK, f"{text}: {len(wanted) - len(used)} of {len(wanted)} are free")
    elif "nvflare" in user:
        yield Check("data ports", OK, f"{text}: in use by FLARE, {user}")
    else:
        who = user or "a process that this user may not see"
        advice = "right, if that is this site's FLARE; else end it, or set another rdma_data_ports"
        verdict = PROBLEM if user else NOTE
        yield Check("data ports", verdict, f"{text}: in use by {who}", advice)
    yield from _odd_ports(text, wanted, proc)


def _odd_ports(text: str, wanted: range, proc: Path) -> Iterator[Check]:
    """Ports that can be had, but not by everybody, or not always."""
    if wanted[0] < 1024 and os.geteuid():
        advice = "set others as rdma_data_ports"
        yield Check("data ports", NOTE, f"{text}: only root may listen at ports below 1024", advice)
    outgoing = _read(proc / "sys/net/ipv4/ip_local_port_range").split()
    if len(outgoing) == 2 and wanted[0] <= int(outgoing[1]) and wanted[-1] >= int(outgoing[0]):
        reserved = f"`sysctl -w net.ipv4.ip_local_reserved_ports={text}`, or ports below {outgoing[0]}"
        value = (
            f"{text}: the kernel also gives ports of {'-'.join(outgoing)} to whoever dials, and one may be gone then"
        )
        yield Check("data ports", NOTE, value, reserved)


def _gpu(proc: Path) -> Iterator[Check]:
    driver = _read(proc / "driver/nvidia/version").splitlines()
    if not driver:
        yield Check("GPU", OK, "none of NVIDIA's here: models are encoded by the processor")
        return
    try:  # in a process of its own: torch takes seconds, and memory of the GPU
        command = [sys.executable, "-P", "-c", _ASK_GPU]  # nothing comes from the folder that the user is in
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_ASK_SECONDS, check=True, stdin=subprocess.DEVNULL
        )
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, LookupError) as error:
        yield Check("GPU", NOTE, f"there is one, but torch can't be asked: {error}", "see what `import torch` says")
        return
    yield _torch_on(driver[0], told)
    if told["bitsandbytes"] != "not installed":
        broken = told["bitsandbytes"]
        advice = "FLARE's own quantizer needs it; this package's does not" if broken else ""
        yield Check("bitsandbytes", NOTE if broken else OK, broken or "can be loaded", advice)


def _torch_on(driver: str, told: dict[str, Any]) -> Check:
    where = driver.removeprefix("NVRM version: ").strip()
    if "torch" in told:
        return Check(
            "GPU", NOTE, f"{where}, but torch can't be loaded: {told['torch']}", "pip install nvflare-rdma[torch]"
        )
    if not told["cuda"]:
        advice = "install a torch with CUDA (https://pytorch.org/get-started)"
        return Check("GPU", NOTE, f"{where}, but torch is built without CUDA: trainers can't use it", advice)
    if not told["devices"]:
        advice = "look at CUDA_VISIBLE_DEVICES, at /dev/nvidia*, and at whether the driver is new enough"
        return Check("GPU", NOTE, f"{where}, but torch (CUDA {told['cuda']}) sees no device", advice)
    return Check("GPU", OK, f"{', '.join(told['devices'])}; torch has CUDA {told['cuda']}")


def _timers(settings: Settings, workspace: Path | None) -> Iterator[Check]:
    """What of FLARE's would end a transfer that waits, or a message that is slow, at a site."""
    if workspace is None or not (workspace / "startup").is_dir():
        return
    try:
        from nvflare.fuel.f3.comm_config import CommConfigurator
        from nvflare.fuel.utils.app_config_utils import get_positive_float_var

        from nvflare_rdma.timers import too_short

        startup = workspace / "startup" / "fed_server.json"
        server = startup.is_file()
        found = too_short(settings.rdma_patience, server, get_positive_float_var, startup if server else None)
        configured = CommConfigurator().get_config() or {}
    except (ImportError, UnsupportedVersionError, ValueError):
        return  # that is among the errors
    value = f"transfers wait {as_time(settings.rdma_patience)} for a peer that is out of reach (rdma_patience)"
    if found:
        value += f", but FLARE gives up earlier where a job does not say otherwise: {', '.join(found)} (seconds)"
        advice = f'add_transfer(recipe, patience="{as_time(settings.rdma_patience).replace(" ", "")}") in the job'
        yield Check("time-outs", NOTE, value, advice.replace("min", "m"))
    else:
        yield Check("time-outs", OK, value)
    short = {name: configured.get(name) for name, usual in _STREAMING.items() if _below(configured.get(name), usual)}
    if not server and _below(seconds := _communication_timeout(workspace), _COMMUNICATION[1]):
        short[_COMMUNICATION[0]] = seconds
    if short:
        text = ", ".join(f"{name}={seconds}" for name, seconds in short.items())
        value = f"{text}: FLARE gives up a message that is slow sooner than by its defaults"
        usual = ", ".join(f"{name}={each:g}" for name, each in (*_STREAMING.items(), _COMMUNICATION) if name in short)
        yield Check("slow messages", NOTE, value, f"leave them out, or set {usual}")


def _below(value: Any, usual: float) -> bool:
    try:
        return 0 < float(value) < usual
    except (TypeError, ValueError):
        return False


def _communication_timeout(workspace: Path) -> Any:
    try:
        told = json.loads((workspace / "startup" / "fed_client.json").read_text())
        return told["client"].get(_COMMUNICATION[0])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
